package submit

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"path/filepath"
	"testing"
	"time"
)

// behindProxy puts the API where it is in production: on a unix socket,
// behind a reverse proxy that clients talk to.
func behindProxy(t *testing.T, f *fixture) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "api.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	api := &http.Server{Handler: f.server.Handler(), ReadHeaderTimeout: testWait}
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = api.Serve(l)
	}()
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}}
	forward := &httputil.ReverseProxy{
		Transport: transport,
		ErrorLog:  log.New(io.Discard, "", 0),
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(&url.URL{Scheme: "http", Host: "api"})
			r.Out.Host = r.In.Host
		},
	}
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		forward.ServeHTTP(&refusing{w}, r)
	}))
	f.url = proxy.URL
	t.Cleanup(func() {
		f.client.CloseIdleConnections()
		proxy.Close()
		transport.CloseIdleConnections()
		_ = api.Close()
		<-served
	})
}

// refusing is what a proxy in front of the API has to do: once the API has
// refused a request, stop waiting for the rest of its body. Without it
// net/http reads on before it passes the answer to a stalled sender.
type refusing struct{ http.ResponseWriter }

func (w *refusing) WriteHeader(code int) {
	if code >= 400 {
		_ = http.NewResponseController(w.ResponseWriter).SetReadDeadline(time.Now().Add(refusedBody))
	}
	w.ResponseWriter.WriteHeader(code)
}

func (w *refusing) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func TestBehindAProxyOnAUnixSocket(t *testing.T) {
	f := newFixture(t, func(o *Options) {
		o.Limits = Limits{ModuleBytes: 1 << 20, Stall: 200 * time.Millisecond}
	})
	behindProxy(t, f)
	f.runNode()
	f.put("hello", 1).want(201)

	// Larger by far than what is discarded, so the answer overtakes the body.
	f.do("PUT", "/v1/functions/big", make([]byte, 3<<20), wasm).want(413).problem("module-too-large")
	f.do("DELETE", "/v1/functions/hello", nil, "Origin: "+f.url).want(204)
	f.do("DELETE", "/v1/functions/hello", nil, "Origin: http://evil.example").want(403).problem("cross-origin")

	t.Run("stalled body", func(t *testing.T) {
		conn := dial(t, f.url)
		fmt.Fprint(conn, "PUT /v1/functions/slow HTTP/1.1\r\nHost: x\r\nContent-Type: application/wasm\r\nContent-Length: 1000\r\n\r\n\x00asm")
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = resp.Body.Close() }()
		body, _ := io.ReadAll(resp.Body)
		answer{t, resp.StatusCode, resp.Header, body}.want(408).problem("body-stalled")
	})
	t.Run("client leaves during the check", func(t *testing.T) {
		entered, left := make(chan struct{}), make(chan struct{})
		f.set(func() {
			f.checking = func(ctx context.Context) error {
				close(entered)
				<-ctx.Done()
				close(left)
				return ctx.Err()
			}
		})
		ctx, cancel := context.WithCancel(context.Background())
		req, _ := http.NewRequestWithContext(ctx, "PUT", f.url+"/v1/functions/gone", bytes.NewReader(module(1)))
		req.Header.Set("Content-Type", "application/wasm")
		done := make(chan struct{})
		go func() {
			defer close(done)
			if resp, err := f.client.Do(req); err == nil {
				_ = resp.Body.Close()
			}
		}()
		<-entered
		cancel()
		select {
		case <-left:
		case <-time.After(testWait):
			t.Fatal("the check was not told")
		}
		<-done
		f.do("GET", "/v1/functions/gone", nil).want(404)
	})
}
