package engine

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/engine/control"
	"github.com/hearth-sh/hearth/internal/localsocket"
)

// longLimit is a function's time limit in tests that must not see it pass.
const longLimit = v1alpha1.MaxTimeoutMS

// dial connects to the public listener without net/http.
func (n *node) dial() *net.TCPConn {
	n.t.Helper()
	conn, err := net.Dial("tcp", n.address)
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { _ = conn.Close() })
	return conn.(*net.TCPConn)
}

// upload sends as much of a request as the other side takes without reading it.
func upload(t *testing.T, conn net.Conn, head string, body []byte) {
	t.Helper()
	if _, err := io.WriteString(conn, head); err != nil {
		t.Fatal(err)
	}
	_ = conn.SetWriteDeadline(time.Now().Add(time.Second))
	if n, err := conn.Write(body); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("after %d bytes of the body: %v", n, err)
	}
}

func TestClientThatLeavesDuringItsUploadTakesItsGuestWithIt(t *testing.T) {
	const whole, sent = 5 << 20, 1 << 20
	sized := fmt.Sprintf("Content-Length: %d\r\n\r\n", whole)
	chunked := fmt.Sprintf("Transfer-Encoding: chunked\r\n\r\n%x\r\n", whole)
	leave := map[string]func(*net.TCPConn) error{
		"closing": (*net.TCPConn).Close,
		"resetting": func(c *net.TCPConn) error {
			return errors.Join(c.SetLinger(0), c.Close())
		},
		"closing its half": (*net.TCPConn).CloseWrite,
	}
	n := startNode(t, nil)
	n.deploy(n.function("c", "c", func(f *control.Function) { f.TimeoutMS = longLimit }))
	for how, leave := range leave {
		for framing, header := range map[string]string{"sized": sized, "chunked": chunked} {
			for _, guest := range []string{"/spin", "/sleep", "/drip"} {
				t.Run(how+" "+framing+guest, func(t *testing.T) {
					conn := n.dial()
					upload(t, conn, "POST "+guest+" HTTP/1.1\r\nHost: c.localhost\r\n"+header, make([]byte, sent))
					n.awaitInFlight("c", 1)
					if err := leave(conn); err != nil {
						t.Fatal(err)
					}
					n.awaitInFlight("c", 0)
				})
			}
		}
	}
	n.eventually("the guests have ended as well", func() bool {
		before := processorTime(t, n.worker("default").PID)
		time.Sleep(200 * time.Millisecond)
		return processorTime(t, n.worker("default").PID)-before < 100*time.Millisecond
	})
	wantBody(t, n.get("c", "/"), 200, "hello from c\n")
}

// processorTime is what the process has used (proc(5), stat).
func processorTime(t *testing.T, pid int) time.Duration {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	var ticks int
	for _, field := range fields[11:13] { // utime, stime
		v, err := strconv.Atoi(field)
		if err != nil {
			t.Fatal(err)
		}
		ticks += v
	}
	return time.Duration(ticks) * 10 * time.Millisecond // USER_HZ is 100
}

func TestClientThatLeavesWhileItsUploadIsQueuedGivesUpItsTurn(t *testing.T) {
	n := startNode(t, nil)
	n.deploy(n.function("c", "c", func(f *control.Function) { f.Concurrency, f.TimeoutMS = 1, longLimit }))
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if resp, err := n.http.Do(n.request(ctx, http.MethodGet, "c.localhost", "/sleep", nil)); err == nil {
			_ = resp.Body.Close()
		}
	}()
	defer func() { cancel(); <-ended }()
	n.awaitInFlight("c", 1)
	conn := n.dial()
	upload(t, conn, "POST /count HTTP/1.1\r\nHost: c.localhost\r\nContent-Length: 1000000\r\n\r\n", make([]byte, 1000))
	queued := func(want int) func() bool {
		return func() bool { return n.status().Functions[0].Queued == want }
	}
	n.eventually("the upload is queued", queued(1))
	_ = conn.Close()
	n.eventually("the upload is queued no more", queued(0))
}

func TestSlowUploadOfAClientThatStaysIsServed(t *testing.T) {
	n := startNode(t, nil)
	n.deploy(n.function("c", "c", nil))
	const pieces, piece = 10, 50_000
	conn := n.dial()
	_ = conn.SetDeadline(time.Now().Add(patience))
	upload(t, conn, fmt.Sprintf("POST /count HTTP/1.1\r\nHost: c.localhost\r\nContent-Length: %d\r\n\r\n", pieces*piece), nil)
	_ = conn.SetDeadline(time.Now().Add(patience))
	for range pieces {
		if _, err := conn.Write(make([]byte, piece)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond)
	}
	reader := bufio.NewReader(conn)
	// The same connection serves the next request, and is watched anew.
	for _, next := range []string{fmt.Sprintf("POST /count HTTP/1.1\r\nHost: c.localhost\r\nContent-Length: %d\r\n\r\n%s", pieces*piece, make([]byte, pieces*piece)), ""} {
		resp, err := http.ReadResponse(reader, nil)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if err != nil || string(b) != fmt.Sprintln(pieces*piece) {
			t.Errorf("%d %q %v", resp.StatusCode, b, err)
		}
		if _, err := io.WriteString(conn, next); err != nil {
			t.Fatal(err)
		}
	}
}

func TestClientThatLeavesDuringAnUploadToTheAPIIsNoticed(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "api.sock")
	listener, err := localsocket.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	asked, left := make(chan struct{}), make(chan struct{})
	api := &http.Server{Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		close(asked)
		// Busy with something else than reading. Its own server sees nothing
		// before somebody reads; then it must not be the client's stall.
		for {
			if _, err := io.Copy(io.Discard, r.Body); err != nil {
				close(left)
				return
			}
		}
	})}
	served := make(chan struct{})
	go func() { defer close(served); _ = api.Serve(listener) }()
	t.Cleanup(func() { _ = api.Close(); <-served })
	n := startNode(t, func(o *Options) { o.APISocket = socket })
	conn := n.dial()
	upload(t, conn, "PUT /v1/functions/c HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n", make([]byte, 1000))
	<-asked
	_ = conn.Close()
	select {
	case <-left:
	case <-time.After(patience):
		t.Error("the API goes on waiting for a client that left")
	}
}

// A body that nobody read to its end must not be read as the next request.
func TestRestOfABodyIsNotTakenForARequest(t *testing.T) {
	n := startNode(t, nil)
	n.deploy(n.function("c", "c", func(f *control.Function) { f.TimeoutMS = 300 }))
	for _, test := range []struct{ path, length string }{
		{"/hello", "100000"}, {"/hello", "5000000"}, {"/count", "100000"}, {"/spin", "100000"}, {"/count", "1000"},
	} {
		t.Run(test.path+" "+test.length, func(t *testing.T) {
			conn := n.dial()
			upload(t, conn, "POST "+test.path+" HTTP/1.1\r\nHost: c.localhost\r\nContent-Length: "+test.length+"\r\n\r\n", make([]byte, 500))
			_ = conn.SetDeadline(time.Now().Add(patience))
			reader := bufio.NewReader(conn)
			resp, err := http.ReadResponse(reader, nil)
			if err != nil {
				t.Fatal(err)
			}
			_, _ = io.Copy(io.Discard, resp.Body)
			_ = resp.Body.Close()
			t.Log(resp.Status, resp.Close)
			time.Sleep(time.Second)
			_, _ = io.WriteString(conn, "GET /hello HTTP/1.1\r\nHost: c.localhost\r\n\r\n")
			if second, err := http.ReadResponse(reader, nil); err == nil {
				_ = second.Body.Close()
				t.Errorf("the body's rest was answered with %s", second.Status)
			}
		})
	}
}
