package engine

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/engine/control"
	"github.com/hearth-sh/hearth/internal/localsocket"
)

func TestRequestWaitsForAnEngineThatWasNotToldYetWhatToServe(t *testing.T) {
	n := startNode(t, nil)
	answered := make(chan answer, 1)
	go func() { answered <- n.get("early", "/env") }()
	// The request is on its way or waiting; either way it must be answered
	// by the function, not by "no such function".
	n.put(n.function("early", "c", nil))
	select {
	case a := <-answered:
		if a.StatusCode != http.StatusOK {
			t.Fatalf("status %d: %s", a.StatusCode, a.body)
		}
	case <-time.After(patience):
		t.Fatal("no answer")
	}
}

func TestFunctionOnItsWayIsNotReadyRatherThanUnknown(t *testing.T) {
	n := startNode(t, nil)
	put := func(s control.State) {
		t.Helper()
		if err := n.control.PutState(t.Context(), s); err != nil {
			t.Fatal(err)
		}
	}
	put(control.State{Generation: 7, Pending: []control.Pending{{Name: "soon", Tenant: "default"}}})
	a := n.get("soon", "/")
	wantProblem(t, a, http.StatusServiceUnavailable, "function-not-ready")
	if a.Header.Get("Retry-After") == "" {
		t.Error("no Retry-After")
	}
	wantProblem(t, n.get("never", "/"), http.StatusNotFound, "function-not-found")

	put(control.State{Generation: 8, Functions: []control.Function{n.function("soon", "c", nil)}})
	n.awaitStatus("soon", func(s control.FunctionStatus) bool { return s.Serving == 1 })
	wantBody(t, n.get("soon", "/nocontent"), http.StatusNoContent, "")

	// The name was deleted and made anew: what answered before must not.
	put(control.State{Generation: 9, Pending: []control.Pending{{Name: "soon", Tenant: "default"}}})
	wantProblem(t, n.get("soon", "/nocontent"), http.StatusServiceUnavailable, "function-not-ready")
	s := n.awaitStatus("soon", func(s control.FunctionStatus) bool { return s.Serving == 0 })
	if s.Progress != v1alpha1.ProgressLoading {
		t.Errorf("progress %s", s.Progress)
	}
}

// An API that refuses before it read the body, as it does for bodies that
// stall: the answer must reach a client that sends nothing more.
func TestRefusalOfAStalledBodyReachesTheClient(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "api.sock")
	listener, err := localsocket.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	api := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.ReadFull(r.Body, make([]byte, 4))
		// As the API does: its own server must not wait for the rest either.
		_ = http.NewResponseController(w).SetReadDeadline(time.Now())
		w.WriteHeader(http.StatusRequestTimeout)
	})}
	served := make(chan struct{})
	go func() { defer close(served); _ = api.Serve(listener) }()
	t.Cleanup(func() { _ = api.Close(); <-served })

	n := startNode(t, func(o *Options) { o.APISocket = socket })
	conn, err := net.Dial("tcp", n.address)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(patience))
	fmt.Fprint(conn, "PUT /v1/functions/slow HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/wasm\r\nContent-Length: 1000\r\n\r\n\x00asm")
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	_ = response.Body.Close()
	if response.StatusCode != http.StatusRequestTimeout {
		t.Errorf("status %d", response.StatusCode)
	}
}
