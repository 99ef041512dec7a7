package control

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hearth-sh/hearth/internal/localsocket"
)

func serve(t *testing.T, h http.HandlerFunc) *Client {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "engine.sock")
	l, err := localsocket.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: h}
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	c := NewClient(socket)
	t.Cleanup(func() { c.CloseIdle(); _ = s.Close(); <-done })
	return c
}

func TestStateArrivesWhole(t *testing.T) {
	want := State{Generation: 7, Functions: []Function{{
		Name: "f", Tenant: "t", Revision: 3, ObjectDir: "/o", Object: "ab", MemoryMiB: 1, TimeoutMS: 2, Concurrency: 3,
		Env: map[string]string{"A": "1"}, Secrets: map[string]string{"S": "2"},
	}}}
	var got State
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPut || r.URL.Path != PathState || json.NewDecoder(r.Body).Decode(&got) != nil {
			t.Errorf("%s %s", r.Method, r.URL)
		}
		w.WriteHeader(http.StatusNoContent)
	})
	if err := c.PutState(t.Context(), want); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestRefusalsAreTyped(t *testing.T) {
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == PathStatus {
			w.WriteHeader(http.StatusTeapot)
			_, _ = io.WriteString(w, "no problem document")
			return
		}
		w.WriteHeader(http.StatusNotFound)
		_, _ = io.WriteString(w, `{"type":"https://hearth.sh/problems/function-not-found","title":"No such function","detail":"none","retryable":true}`)
	})
	_, err := c.Logs(t.Context(), "f", LogOptions{Tail: 3, Since: time.Unix(1, 0)})
	var refused *Error
	if !errors.As(err, &refused) || refused.Status != 404 || !refused.Retryable || err.Error() != "none" {
		t.Errorf("%v", err)
	}
	if _, err := c.Status(t.Context(), 1, time.Millisecond); !errors.As(err, &refused) || refused.Status != http.StatusTeapot {
		t.Errorf("%v", err)
	}
}

func TestEngineThatIsNotThereIsSaidSo(t *testing.T) {
	c := NewClient(filepath.Join(t.TempDir(), "none.sock"))
	if err := c.PutState(t.Context(), State{}); !errors.Is(err, localsocket.ErrNotRunning) {
		t.Errorf("%v", err)
	}
}
