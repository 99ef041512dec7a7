package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"mime"
	"mime/multipart"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/localsocket"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// seen is what the server got of one request.
type seen struct {
	method, uri, key, contentType, body string
	header                              http.Header
}

// api is a server that answers from a script, one handler a request.
type api struct {
	*httptest.Server
	mu       sync.Mutex
	requests []seen
	slept    []time.Duration
	client   *Client
}

func serve(t *testing.T, script ...http.HandlerFunc) *api {
	t.Helper()
	a := &api{}
	a.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		a.mu.Lock()
		n := len(a.requests)
		a.requests = append(a.requests, seen{r.Method, r.RequestURI, r.Header.Get("Idempotency-Key"), r.Header.Get("Content-Type"), string(body), r.Header})
		a.mu.Unlock()
		script[min(n, len(script)-1)](w, r)
	}))
	var err error
	a.client, err = New(Options{URL: a.URL, UserAgent: "nodeagent/test", Sleep: func(ctx context.Context, d time.Duration) error {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.slept = append(a.slept, d)
		return ctx.Err()
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.client.Close(); a.Close() })
	return a
}

func problem(status int, code string, retryable bool, retryAfter string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/problem+json")
		if retryAfter != "" {
			w.Header().Set("Retry-After", retryAfter)
		}
		w.WriteHeader(status)
		_ = json.NewEncoder(w).Encode(v1alpha1.Problem{Type: "https://hearth.sh/problems/" + code, Title: "A title", Detail: "A detail.", Status: status, Retryable: retryable})
	}
}

func answer(status int, v any) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("ETag", `"7"`)
		w.WriteHeader(status)
		_ = json.NewEncoder(w).Encode(v)
	}
}

func hello(state v1alpha1.FunctionState) v1alpha1.Function {
	return v1alpha1.Function{APIVersion: v1alpha1.APIVersion, Kind: "Function", Name: "hello", State: state, Revision: 1}
}

func module(content string) Source {
	return Source{Size: int64(len(content)), Module: func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader(content)), nil }}
}

func TestPutSendsTheModuleAsItIs(t *testing.T) {
	a := serve(t, answer(201, hello(v1alpha1.StateReady)))
	var last int64
	f, err := a.client.Put(t.Context(), "hello", module("\x00asm"), Change{Tenant: "team", Wait: time.Minute, IfNew: true, Progress: func(sent, _ int64) { last = sent }})
	if err != nil || f.State != v1alpha1.StateReady || last != 4 {
		t.Fatalf("%+v %v, %d sent", f, err, last)
	}
	r := a.requests[0]
	if r.method != "PUT" || r.uri != "/v1/functions/hello?tenant=team&wait=1m0s" || r.contentType != "application/wasm" || r.body != "\x00asm" ||
		r.header.Get("If-None-Match") != "*" || r.header.Get("User-Agent") != "nodeagent/test" || len(r.key) != 32 {
		t.Errorf("%+v", r)
	}
}

func TestPutWithSettingsSendsThemFirst(t *testing.T) {
	a := serve(t, answer(201, hello(v1alpha1.StateReady)))
	memory, value := 64, "s3cret"
	_, err := a.client.Put(t.Context(), "hello", module("\x00asm"), Change{Settings: Settings{MemoryMiB: &memory, Secrets: map[string]*string{"KEY": &value}}})
	if err != nil {
		t.Fatal(err)
	}
	mediaType, parameters, err := mime.ParseMediaType(a.requests[0].contentType)
	if err != nil || mediaType != "multipart/form-data" {
		t.Fatal(a.requests[0].contentType)
	}
	if n := a.requests[0].header.Get("Content-Length"); n == "" && len(a.requests[0].body) == 0 {
		t.Error("no body")
	}
	form := multipart.NewReader(strings.NewReader(a.requests[0].body), parameters["boundary"])
	var got []string
	for {
		part, err := form.NextPart()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		data, _ := io.ReadAll(part)
		got = append(got, part.FormName()+": "+strings.TrimSpace(string(data)))
	}
	want := []string{`settings: {"memoryMiB":64,"secrets":{"KEY":"s3cret"}}`, "module: \x00asm"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestPutImage(t *testing.T) {
	a := serve(t, answer(201, hello(v1alpha1.StateReady)))
	if _, err := a.client.Put(t.Context(), "hello", Source{Image: "example.org/x:1"}, Change{}); err != nil {
		t.Fatal(err)
	}
	if r := a.requests[0]; r.body != `{"image":"example.org/x:1"}` || r.contentType != "application/json" || r.uri != "/v1/functions/hello?wait=0s" {
		t.Errorf("%+v", r)
	}
}

func TestPutRefusesTooLargeAModuleWithoutSendingIt(t *testing.T) {
	a := serve(t, answer(201, hello(v1alpha1.StateReady)))
	_, err := a.client.Put(t.Context(), "hello", Source{Size: v1alpha1.MaxModuleBytes + 1}, Change{})
	if err == nil || len(a.requests) != 0 {
		t.Errorf("%v, %d requests", err, len(a.requests))
	}
}

func TestRetriesUseTheSameKeyAndTheWholeBody(t *testing.T) {
	a := serve(t,
		problem(503, "registry-unavailable", true, "2"),
		func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, // the connection breaks
		problem(409, "request-in-flight", true, ""),
		answer(201, hello(v1alpha1.StateReady)),
	)
	if _, err := a.client.Put(t.Context(), "hello", module("\x00asm"), Change{}); err != nil {
		t.Fatal(err)
	}
	if len(a.requests) != 4 {
		t.Fatalf("%d requests", len(a.requests))
	}
	for _, r := range a.requests {
		if r.key != a.requests[0].key || r.key == "" || r.body != "\x00asm" {
			t.Errorf("%+v", r)
		}
	}
	if a.slept[0] < 2*time.Second {
		t.Errorf("Retry-After was not kept: %v", a.slept)
	}
	if _, err := a.client.Put(t.Context(), "hello", module("\x00asm"), Change{}); err != nil {
		t.Fatal(err)
	}
	if a.requests[4].key == a.requests[0].key {
		t.Error("two calls had the same key")
	}
}

func TestWhatIsNotRetried(t *testing.T) {
	for name, handler := range map[string]http.HandlerFunc{
		"a refusal":           problem(422, "unsupported-import", false, ""),
		"a long Retry-After":  problem(507, "disk-full", true, "30"),
		"a redirect":          func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/elsewhere", 307) },
		"a page of a proxy":   func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "nope\nmore", 403) },
		"not JSON at success": func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "<html>") },
	} {
		t.Run(name, func(t *testing.T) {
			a := serve(t, handler)
			_, err := a.client.Put(t.Context(), "hello", module("x"), Change{})
			if err == nil || len(a.requests) != 1 {
				t.Errorf("%v, %d requests", err, len(a.requests))
			}
		})
	}
}

func TestRetriesEnd(t *testing.T) {
	a := serve(t, problem(503, "not-ready", true, ""))
	_, _, err := a.client.Get(t.Context(), "hello")
	var p *ProblemError
	if !errors.As(err, &p) || p.Code() != "not-ready" || p.Error() != "A title: A detail." {
		t.Errorf("%v", err)
	}
	if len(a.requests) != maxAttempts {
		t.Errorf("%d requests", len(a.requests))
	}
	if a.requests[0].key != "" {
		t.Error("reading sent an Idempotency-Key")
	}
}

func TestNobodyThereIsSaidAtOnce(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := ln.Addr().String()
	_ = ln.Close()
	for _, target := range []string{"http://" + address, "unix://" + t.TempDir() + "/api.sock"} {
		c, err := New(Options{URL: target, Sleep: func(context.Context, time.Duration) error { t.Error("waited"); return nil }})
		if err != nil {
			t.Fatal(err)
		}
		_, err = c.List(t.Context(), "")
		var unreachable *UnreachableError
		if !errors.As(err, &unreachable) {
			t.Errorf("%v", err)
		}
		c.Close()
	}
}

func TestCancelEndsACall(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	block := make(chan struct{})
	a := serve(t, func(http.ResponseWriter, *http.Request) { cancel(); <-block })
	_, _, err := a.client.Get(ctx, "hello")
	close(block)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

func TestOverAUnixSocket(t *testing.T) {
	path := t.TempDir() + "/api.sock"
	ln, err := localsocket.Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: answer(200, hello(v1alpha1.StateReady))}
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(ln) }()
	c, err := New(Options{URL: "unix://" + path})
	if err != nil {
		t.Fatal(err)
	}
	if f, etag, err := c.Get(t.Context(), "hello"); err != nil || f.Name != "hello" || etag != `"7"` {
		t.Errorf("%+v %s %v", f, etag, err)
	}
	c.Close()
	_ = server.Close()
	<-done
}

func TestWrongURLs(t *testing.T) {
	for _, target := range []string{"ftp://x", "http://", "http://%zz"} {
		if _, err := New(Options{URL: target}); err == nil {
			t.Errorf("%s was taken", target)
		}
	}
	c, err := New(Options{URL: "10.0.0.1:8080"})
	if err != nil || c.URL() != "http://10.0.0.1:8080" {
		t.Errorf("%v", err)
	}
}

func TestOtherCalls(t *testing.T) {
	a := serve(t, answer(200, hello(v1alpha1.StateReady)))
	value := "hi"
	ctx := t.Context()
	calls := []struct {
		do   func() error
		want string
	}{
		{func() error {
			_, err := a.client.Patch(ctx, "hello", Change{Settings: Settings{Env: map[string]*string{"A": &value, "B": nil}}, Tenant: "x", IfMatch: `"7"`})
			return err
		}, `PATCH /v1/functions/hello?wait=0s application/merge-patch+json {"env":{"A":"hi","B":null}}`},
		{func() error { _, err := a.client.Rollback(ctx, "hello", 3, Change{Wait: time.Hour}); return err }, `POST /v1/functions/hello/rollback?wait=5m0s application/json {"revision":3}`},
		{func() error { _, err := a.client.Rollback(ctx, "hello", 0, Change{}); return err }, `POST /v1/functions/hello/rollback?wait=0s  `},
		{func() error { return a.client.Delete(ctx, "hello", "") }, `DELETE /v1/functions/hello  `},
		{func() error { _, err := a.client.Revisions(ctx, "hello"); return err }, `GET /v1/functions/hello/revisions  `},
		{func() error { _, err := a.client.Revisions(ctx, "../x?y"); return err }, `GET /v1/functions/..%2Fx%3Fy/revisions  `},
	}
	for i, call := range calls {
		if err := call.do(); err != nil {
			t.Errorf("%s: %v", call.want, err)
		}
		r := a.requests[i]
		if got := fmt.Sprintf("%s %s %s %s", r.method, r.uri, r.contentType, r.body); got != call.want {
			t.Errorf("got  %s\nwant %s", got, call.want)
		}
	}
}

func TestListFollowsPages(t *testing.T) {
	page := func(next string, names ...string) http.HandlerFunc {
		list := v1alpha1.FunctionList{Continue: next}
		for _, name := range names {
			list.Items = append(list.Items, v1alpha1.Function{Name: name})
		}
		return answer(200, list)
	}
	a := serve(t, page("abc", "a", "b"), page("", "c"))
	list, err := a.client.List(t.Context(), "team")
	if err != nil || len(list.Items) != 3 || list.Continue != "" {
		t.Fatalf("%+v %v", list, err)
	}
	if a.requests[1].uri != "/v1/functions?continue=abc&tenant=team" {
		t.Error(a.requests[1].uri)
	}
}

func TestWaitEndsWithTheState(t *testing.T) {
	a := serve(t, answer(200, hello(v1alpha1.StatePending)), answer(200, hello(v1alpha1.StatePending)), answer(200, hello(v1alpha1.StateFailed)))
	n := 0
	f, err := a.client.Wait(t.Context(), "hello", func(v1alpha1.Function) { n++ })
	if err != nil || f.State != v1alpha1.StateFailed || n != 3 || len(a.slept) != 2 {
		t.Errorf("%+v %v %d %v", f, err, n, a.slept)
	}
}

func line(second int, text string) v1alpha1.LogLine {
	return v1alpha1.LogLine{Time: time.Unix(int64(second), 0).UTC(), Function: "hello", Revision: 1, Stream: "stderr", Line: text}
}

func lines(broken bool, lines ...v1alpha1.LogLine) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/x-ndjson")
		for _, l := range lines {
			_ = json.NewEncoder(w).Encode(l)
		}
		w.(http.Flusher).Flush()
		if broken {
			panic(http.ErrAbortHandler)
		}
	}
}

func TestFollowedLogsGoOnWithoutRepeating(t *testing.T) {
	a := serve(t,
		lines(true, line(10, "a"), line(11, "same"), line(11, "same")),
		problem(503, "logs-unavailable", true, ""),
		lines(false, line(10, "a"), line(11, "same"), line(11, "same"), line(11, "same"), line(9, "late")),
		lines(true, line(10, "a"), line(11, "same"), line(11, "same"), line(11, "same"), line(9, "late"), line(12, "end")),
	)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var got []string
	err := a.client.Logs(ctx, "hello", LogOptions{Follow: true, Tail: 10}, func(l v1alpha1.LogLine) error {
		got = append(got, l.Line)
		if l.Line == "end" {
			cancel()
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"a", "same", "same", "same", "late", "end"}, got); diff != "" {
		t.Error(diff)
	}
	if want := "/v1/functions/hello/logs?follow=true&since=1970-01-01T00%3A00%3A09Z&tail=1000"; a.requests[2].uri != want {
		t.Errorf("got %s\nwant %s", a.requests[2].uri, want)
	}
}

func TestLogsOfAFunctionThatIsDeletedEnd(t *testing.T) {
	a := serve(t, lines(true, line(1, "a")), problem(404, "function-not-found", false, ""))
	err := a.client.Logs(t.Context(), "hello", LogOptions{Follow: true, Tail: -1}, func(v1alpha1.LogLine) error { return nil })
	var p *ProblemError
	if !errors.As(err, &p) || p.Status != 404 {
		t.Errorf("%v", err)
	}
}

func TestLogsStopWhenTheCallerCannotGoOn(t *testing.T) {
	full := errors.New("pipe is gone")
	a := serve(t, lines(false, line(1, "a"), line(2, "b")))
	n := 0
	err := a.client.Logs(t.Context(), "hello", LogOptions{Follow: true}, func(v1alpha1.LogLine) error { n++; return full })
	if !errors.Is(err, full) || n != 1 {
		t.Errorf("%v after %d", err, n)
	}
}

func TestInvokeKeepsThePathAndTellsProblemsApart(t *testing.T) {
	a := serve(t, problem(502, "function-trapped", false, ""), func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/problem+json")
		w.WriteHeader(400)
		_, _ = io.WriteString(w, `{"type":"https://example.org/mine","title":"own"}`)
	})
	for i, path := range []string{"/a//b%2Fc?x=1&y=%20", "/"} {
		req, err := http.NewRequestWithContext(t.Context(), "POST", "http://x/", strings.NewReader("in"))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := a.client.Invoke(t.Context(), req, "hello", path)
		if err != nil {
			t.Fatal(err)
		}
		if a.requests[i].uri != "/f/hello"+path || a.requests[i].body != "in" {
			t.Errorf("%+v", a.requests[i])
		}
		p, ours := ProblemOf(resp)
		body, _ := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if i == 0 && (!ours || p.Code() != "function-trapped") {
			t.Errorf("%v", p)
		}
		if i == 1 && (ours || !bytes.Contains(body, []byte("own"))) {
			t.Errorf("%v %s", p, body)
		}
	}
}

func TestReady(t *testing.T) {
	a := serve(t, func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "not ready: registry", 503) }, answer(200, "ok"))
	var p *ProblemError
	if err := a.client.Ready(t.Context()); !errors.As(err, &p) || p.Status != 503 || !strings.Contains(p.Error(), "not ready: registry") {
		t.Errorf("%v", err)
	}
	if err := a.client.Ready(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestRetryAfterForms(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for s, want := range map[string]time.Duration{
		"": 0, "5": 5 * time.Second, "-1": 0, "soon": 0, "99999999999": 0, "9999999": 24 * time.Hour,
		"Fri, 02 Jan 2026 03:04:15 GMT": 10 * time.Second, "Thu, 01 Jan 2026 03:04:15 GMT": 0,
	} {
		if got := parseRetryAfter(s, now); got != want && s != "99999999999" {
			t.Errorf("%q: %v", s, got)
		}
	}
}

func TestSettingsDoNotPrintSecrets(t *testing.T) {
	value := "s3cret"
	s := Settings{Secrets: map[string]*string{"KEY": &value}}
	if text := fmt.Sprintf("%v %+v %s", s, s, Change{Settings: s}.Settings); strings.Contains(text, value) {
		t.Error(text)
	}
}

func FuzzParseProblem(f *testing.F) {
	f.Add(422, "application/problem+json", []byte(`{"type":"https://hearth.sh/problems/not-wasm","title":"t","detail":"d","retryable":true}`))
	f.Add(502, "text/html", []byte("<html>Bad gateway"))
	f.Add(503, "text/plain; charset=utf-8", []byte("line\nmore"))
	f.Add(500, "application/problem+json", []byte(`{"status":"x"}`))
	f.Add(400, ";", []byte{0xff, 0xfe})
	f.Fuzz(func(t *testing.T, status int, contentType string, data []byte) {
		p := parseProblem(status, contentType, data)
		if p.Status != status || p.Error() == "" {
			t.Errorf("%+v", p)
		}
		_ = p.Code()
	})
}

func BenchmarkGet(b *testing.B) {
	server := httptest.NewServer(answer(200, hello(v1alpha1.StateReady)))
	defer server.Close()
	c, err := New(Options{URL: server.URL})
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	for b.Loop() {
		if _, _, err := c.Get(b.Context(), "hello"); err != nil {
			b.Fatal(err)
		}
	}
}

func TestRefusedTokenIsReplacedOnce(t *testing.T) {
	for name, tt := range map[string]struct {
		tokens []string // what Token returns in turn; the last one again and again
		good   string
		want   []string // what the server got
	}{
		"a fresh one is accepted":     {[]string{"old", "new"}, "new", []string{"Bearer old", "Bearer new", "Bearer new"}},
		"a fresh one is refused, too": {[]string{"old", "new"}, "other", []string{"Bearer old", "Bearer new"}},
		"there is no other":           {[]string{"old"}, "other", []string{"Bearer old"}},
		"there is none":               {[]string{""}, "other", []string{""}},
	} {
		t.Run(name, func(t *testing.T) {
			var got []string
			bodies := 0
			a := serve(t, func(w http.ResponseWriter, r *http.Request) {
				got = append(got, r.Header.Get("Authorization"))
				if r.Header.Get("Authorization") != "Bearer "+tt.good {
					problem(http.StatusUnauthorized, "unauthorized", false, "")(w, r)
					return
				}
				w.Header().Set("Content-Type", "application/json")
				_, _ = io.WriteString(w, `{"name":"hello"}`)
			})
			asked := 0
			a.client.o.Token = func(_ context.Context, rejected string) (string, error) {
				if rejected != "" && asked < len(tt.tokens)-1 {
					asked++
				}
				return tt.tokens[asked], nil
			}
			_, err := a.client.Put(t.Context(), "hello", Source{Size: 4, Module: func() (io.ReadCloser, error) {
				bodies++
				return io.NopCloser(strings.NewReader("wasm")), nil
			}}, Change{})
			accepted := tt.want[len(tt.want)-1] == "Bearer "+tt.good
			var refusal *ProblemError
			if accepted != (err == nil) || !accepted && (!errors.As(err, &refusal) || refusal.API != a.URL) {
				t.Errorf("%v", err)
			}
			if accepted {
				if _, _, err := a.client.Get(t.Context(), "hello"); err != nil {
					t.Error(err)
				}
			}
			if diff := cmp.Diff(tt.want, got); diff != "" || bodies == 0 {
				t.Error(diff, bodies)
			}
			for _, r := range a.requests {
				if r.method == http.MethodPut && (r.key == "" || r.key != a.requests[0].key || r.body != "wasm") {
					t.Errorf("another request was made of it: %+v", r)
				}
			}
		})
	}
}

func TestFunctionsOwnURLIsCalledWithoutTheToken(t *testing.T) {
	var got *http.Request
	function := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { got = r; _, _ = io.WriteString(w, "hi") }))
	defer function.Close()
	c, err := New(Options{URL: "https://api.invalid", Token: func(context.Context, string) (string, error) { return "secret", nil }})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	req, err := http.NewRequest(http.MethodGet, "http://function.invalid/", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Host = ""
	resp, err := c.InvokeURL(t.Context(), req, function.URL+"/", "//a/../b?c=d")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if got.RequestURI != "//a/../b?c=d" || got.Header.Get("Authorization") != "" || "http://"+got.Host != function.URL {
		t.Errorf("%s %s %v", got.Host, got.RequestURI, got.Header)
	}
	for _, base := range []string{"", "file:///etc/passwd", "http://", "hello"} {
		if _, err := c.InvokeURL(t.Context(), req, base, "/"); err == nil {
			t.Errorf("%q was called", base)
		}
	}
}

func TestCertificateThatIsNotTrustedIsNotTriedAgain(t *testing.T) {
	server := httptest.NewTLSServer(http.NotFoundHandler())
	defer server.Close()
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	c, err := New(Options{URL: server.URL, OnRetry: func(err error, _ time.Duration) { t.Errorf("tried again: %v", err) }})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var unreachable *UnreachableError
	if _, _, err := c.Get(t.Context(), "hello"); !errors.As(err, &unreachable) {
		t.Errorf("%v", err)
	}
}

func TestBusyServerIsAskedForAsLongAsTheCallerWaits(t *testing.T) {
	busy := problem(429, "too-many-submits", true, "2")
	handlers := make([]http.HandlerFunc, 0, 2*maxAttempts+1)
	for range 2 * maxAttempts {
		handlers = append(handlers, busy)
	}
	a := serve(t, append(handlers, answer(201, hello(v1alpha1.StateReady)))...)
	if _, err := a.client.Put(t.Context(), "hello", module("\x00asm"), Change{Wait: 5 * time.Minute}); err != nil {
		t.Fatal(err)
	}
	if len(a.requests) != 2*maxAttempts+1 {
		t.Errorf("%d requests", len(a.requests))
	}
	for _, test := range []struct{ wait, least, most time.Duration }{
		{0, firstTurn / 2, firstTurn + 10*time.Second},
		{2 * time.Minute, 100 * time.Second, 2 * time.Minute},
	} {
		a := serve(t, busy)
		_, err := a.client.Put(t.Context(), "hello", module("\x00asm"), Change{Wait: test.wait})
		var p *ProblemError
		if !errors.As(err, &p) || p.Code() != "too-many-submits" {
			t.Errorf("%v", err)
		}
		var waited time.Duration
		for _, d := range a.slept {
			if waited += d; d < 2*time.Second {
				t.Errorf("Retry-After was not kept: %v", a.slept)
			}
		}
		if waited < test.least || waited > test.most {
			t.Errorf("with --wait %s it went on for %s in %d requests", test.wait, waited, len(a.requests))
		}
	}
}
