package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	ggcr "github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/test/guests"
)

// module assembles a Wasm binary of sections, each an id and its content.
func module(sections ...any) []byte {
	out := []byte("\x00asm\x01\x00\x00\x00")
	for i := 0; i < len(sections); i += 2 {
		content := sections[i+1].([]byte)
		out = append(out, byte(sections[i].(int)))
		out = binary.AppendUvarint(out, uint64(len(content)))
		out = append(out, content...)
	}
	return out
}

// uv is n as LEB128.
func uv(n uint64) []byte { return binary.AppendUvarint(nil, n) }

// startModule has one empty _start and whatever else the test adds: tables and
// memories go before the export section, so they are given apart.
func startModule(body []byte, extra ...any) []byte {
	sections := []any{1, []byte{1, 0x60, 0, 0}, 3, []byte{1, 0}}
	sections = append(sections, extra...)
	sections = append(sections, 7, append([]byte{1, 6}, append([]byte("_start"), 0, 0)...))
	code := append(uv(uint64(len(body))), body...)
	sections = append(sections, 10, append([]byte{1}, code...))
	return module(sections...)
}

// manyLocals declares n i32 locals in one function.
func manyLocals(n uint64) []byte {
	return startModule(slices.Concat([]byte{1}, uv(n), []byte{0x7f, 0x0b}))
}

// bigTable has a table of n entries at start.
func bigTable(n uint64) []byte {
	return startModule([]byte{0, 0x0b}, 4, slices.Concat([]byte{1, 0x70, 0}, uv(n)))
}

func TestBadModulesAreRefusedAndNothingChanges(t *testing.T) {
	d := shared(t)
	hello := guests.Read(t, "hello")
	d.submit("steady", marked(t, "steady"), "")

	elf := append([]byte("\x7fELF\x02\x01\x01"), make([]byte, 200)...)
	for _, c := range []struct {
		behaviour string
		body      []byte
		query     string
		status    int
		codes     []string
		says      []string // all must be in the detail, in any case
	}{
		{"not wasm", []byte("#!/bin/sh\necho hello\n"), "", 415, []string{"not-wasm"}, nil},
		{"empty", nil, "", 415, []string{"not-wasm"}, nil},
		{"truncated wasm", hello[:len(hello)/2], "", 422, []string{"malformed-module"}, nil},
		{"header alone cut short", hello[:6], "", 0, []string{"malformed-module", "not-wasm"}, nil},
		{"component", []byte("\x00asm\x0d\x00\x01\x00\x07\x00"), "", 422, []string{"component-unsupported"}, []string{"component", "yet", "spin"}},
		{"native ELF", elf, "", 422, []string{"native-artifact"}, nil},
		{"minimum memory over the limit", guests.Read(t, "big-memory"), "?memoryMiB=16", 422, []string{"memory-over-limit"}, []string{"16"}},
		{"minimum memory over the maximum", startModule([]byte{0, 0x0b}, 5, slices.Concat([]byte{1, 0}, uv(65536))), "", 422, []string{"memory-over-limit"}, nil},
		{"millions of locals", manyLocals(5_000_000), "", 422, []string{"limit-exceeded", "invalid-module", "malformed-module"}, []string{"local"}},
		{"millions of table entries", bigTable(20_000_000), "", 422, []string{"limit-exceeded"}, []string{"table"}},
		{"unknown imports", guests.Read(t, "unknown-import"), "", 422, []string{"unsupported-import"}, []string{"launch_missiles", "fd_teleport"}},
		{"no start function", module(), "", 422, []string{"no-start-function"}, []string{"_start"}},
		{"body that does not validate", startModule([]byte{0, 0x6a, 0x0b}), "", 422, []string{"invalid-module"}, nil},
		{"garbage after the header", append(module(), bytes.Repeat([]byte{0xff}, 100)...), "", 422, []string{"malformed-module"}, nil},
	} {
		t.Run(strings.ReplaceAll(c.behaviour, " ", "-"), func(t *testing.T) {
			d := dev{d.Dev, t}
			before := d.state()
			for _, function := range []string{"bad-new", "steady"} {
				a := d.put(function, c.body, c.query, nil)
				status := c.status
				if status == 0 {
					status = a.Status
				}
				p := d.problem(a, status, c.codes...)
				for _, word := range c.says {
					if !strings.Contains(strings.ToLower(p.Detail), word) {
						t.Errorf("the detail does not say %q: %q", word, p.Detail)
					}
				}
				if p.Retryable {
					t.Errorf("called retryable, but the same bytes fail again: %+v", p)
				}
			}
			d.unchanged(before)
		})
	}
	d.answers("steady", "steady")
}

func TestOversizedModuleIsRefused(t *testing.T) {
	d := shared(t)
	before := d.state()
	const size = v1alpha1.MaxModuleBytes + 1<<20
	d.problem(d.put("oversize", make([]byte, size), "", nil), http.StatusRequestEntityTooLarge, "module-too-large")

	// Without a length the bytes must be counted as they come. The server may
	// cut the connection once it has answered.
	body := io.LimitReader(zeros{}, size)
	a, err := d.Do(t.Context(), http.MethodPut, "/v1/functions/oversize", io.MultiReader(body), http.Header{"Content-Type": {"application/wasm"}})
	if err != nil {
		t.Fatalf("streaming 51 MiB: %v", err)
	}
	d.problem(a, http.StatusRequestEntityTooLarge, "module-too-large")
	d.unchanged(before)
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func TestInvalidNamesAreRefused(t *testing.T) {
	d := shared(t)
	before := d.state()
	hello := guests.Read(t, "hello")
	for _, name := range []string{"Upper", "under_score", "-dash", "dash-", "1digit", "xn--abc", "dot.dot", "..", strings.Repeat("a", 64), "ümlaut", "a b", "a%00b"} {
		a, err := d.Submit(t.Context(), name, hello, "", nil)
		if err != nil {
			t.Errorf("%q: %v", name, err)
			continue
		}
		if name == ".." { // not a name at all but another path
			if a.Status < 300 || a.Status >= 500 {
				t.Errorf("%q: %s", name, a)
			}
			continue
		}
		if a.Status != http.StatusBadRequest && a.Status != http.StatusUnprocessableEntity {
			t.Errorf("%q: want 400 or 422: %s", name, a)
			continue
		}
		d.problem(a, a.Status, "invalid-name")
	}
	d.unchanged(before)
}

func TestMalformedRequestsAreRefused(t *testing.T) {
	d := shared(t)
	d.submit("formal", marked(t, "formal"), "")
	before := d.state()
	hello := guests.Read(t, "hello")
	for _, c := range []struct {
		behaviour, method, path, contentType string
		body                                 []byte
		status                               int
	}{
		{"unknown content type", "PUT", "/v1/functions/formal", "text/plain", hello, 415},
		{"no content type", "PUT", "/v1/functions/formal", "", hello, 415},
		{"unknown query parameter", "PUT", "/v1/functions/formal?memory=5", "application/wasm", hello, 400},
		{"query value that is no number", "PUT", "/v1/functions/formal?memoryMiB=lots", "application/wasm", hello, 400},
		{"unknown JSON member", "PUT", "/v1/functions/formal", "application/json", []byte(`{"image":"a","extra":1}`), 400},
		{"not JSON", "PUT", "/v1/functions/formal", "application/json", []byte(`{"image":`), 400},
		{"multipart without parts", "PUT", "/v1/functions/formal", "multipart/form-data; boundary=x", []byte("--x--\r\n"), 400},
		{"multipart without boundary", "PUT", "/v1/functions/formal", "multipart/form-data", []byte("x"), 415},
		{"patch of another type", "PATCH", "/v1/functions/formal", "application/json-patch+json", []byte(`[]`), 415},
		{"unknown route", "GET", "/v1/nothing", "", nil, 404},
		{"unknown function", "GET", "/v1/functions/nobody", "", nil, 404},
		{"method not allowed", "POST", "/v1/functions/formal", "application/json", []byte(`{}`), 405},
		{"revisions of an unknown function", "GET", "/v1/functions/nobody/revisions", "", nil, 404},
		{"logs of an unknown function", "GET", "/v1/functions/nobody/logs", "", nil, 404},
		{"rollback of an unknown function", "POST", "/v1/functions/nobody/rollback", "application/json", []byte(`{}`), 404},
	} {
		t.Run(strings.ReplaceAll(c.behaviour, " ", "-"), func(t *testing.T) {
			d := dev{d.Dev, t}
			header := http.Header{}
			if c.contentType != "" {
				header.Set("Content-Type", c.contentType)
			}
			a := d.call(c.method, c.path, bytes.NewReader(c.body), header)
			d.problem(a, c.status)
			if c.status == http.StatusMethodNotAllowed && a.Header.Get("Allow") == "" {
				t.Error("405 without Allow")
			}
		})
	}
	d.unchanged(before)
}

// raw opens a connection and sends the head of a submit and some of its body.
func (d dev) raw(name, framing, body string) net.Conn {
	d.t.Helper()
	conn, err := net.Dial("tcp", d.Address)
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() { conn.Close() })
	_, err = fmt.Fprintf(conn, "PUT /v1/functions/%s HTTP/1.1\r\nHost: %s\r\nContent-Type: application/wasm\r\n%s\r\n\r\n%s", name, d.Address, framing, body)
	if err != nil {
		d.t.Fatal(err)
	}
	return conn
}

func TestStalledUploadIsGivenUp(t *testing.T) {
	d := shared(t)
	before := d.state()
	// Together, because each takes as long as the server is patient.
	var uploads sync.WaitGroup
	for framing, body := range map[string]string{
		"Content-Length: 1000000":    "\x00asm\x01\x00\x00\x00",
		"Transfer-Encoding: chunked": "8\r\n\x00asm\x01\x00\x00\x00\r\n",
	} {
		conn := d.raw("stalled", framing, body)
		uploads.Go(func() {
			if err := conn.SetReadDeadline(time.Now().Add(settle)); err != nil {
				t.Error(err)
				return
			}
			resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Errorf("%s: no answer to a stalled body: %v", framing, err)
				return
			}
			defer resp.Body.Close()
			if resp.StatusCode != http.StatusRequestTimeout || !strings.HasPrefix(resp.Header.Get("Content-Type"), "application/problem+json") {
				t.Errorf("%s: answer is %s %s, want 408 and a problem", framing, resp.Status, resp.Header.Get("Content-Type"))
			}
		})
	}
	uploads.Wait()
	d.unchanged(before)
}

func TestClientThatDisappearsChangesNothing(t *testing.T) {
	d := shared(t)
	before := d.state()
	for range 3 {
		conn := d.raw("vanished", "Content-Length: 1000000", strings.Repeat("\x00asm\x01\x00\x00\x00", 1000))
		conn.Close()
	}
	d.unchanged(before)
	d.problem(d.get("/v1/functions/vanished"), http.StatusNotFound)
}

// outsideRegistry serves one image, "app:v1", behind a handler that may lie.
func outsideRegistry(t *testing.T, content []byte, wrap func(http.Handler) http.Handler) string {
	t.Helper()
	honest := ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0)))
	var handler http.Handler = honest
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { handler.ServeHTTP(w, r) }))
	t.Cleanup(server.Close)
	u, err := url.Parse(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	ref, err := name.ParseReference(u.Host+"/app:v1", name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	image := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), "application/vnd.wasm.config.v0+json")
	image, err = mutate.Append(image, mutate.Addendum{Layer: static.NewLayer(content, "application/wasm"), MediaType: "application/wasm"})
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, image, remote.WithContext(t.Context())); err != nil {
		t.Fatal(err)
	}
	handler = wrap(honest)
	return ref.Name()
}

func TestLyingRegistryIsCaught(t *testing.T) {
	d := shared(t)
	hello := guests.Read(t, "hello")
	evil, err := guests.Mark(hello, "evil")
	if err != nil {
		t.Fatal(err)
	}
	// The layer's bytes are other ones, of the same length and good Wasm.
	lie := func(honest http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			answer := httptest.NewRecorder()
			honest.ServeHTTP(answer, r)
			body := answer.Body.Bytes()
			if r.Method == http.MethodGet && bytes.Equal(body, hello) {
				body = evil
			}
			for k, v := range answer.Header() {
				w.Header()[k] = v
			}
			w.WriteHeader(answer.Code)
			_, _ = w.Write(body) // the client may be gone
		})
	}
	before := d.state()
	a, err := d.JSON(t.Context(), http.MethodPut, "/v1/functions/lied", "application/json", map[string]any{"image": outsideRegistry(t, hello, lie)}, nil)
	if err != nil {
		t.Fatal(err)
	}
	d.problem(a, http.StatusBadGateway, "digest-mismatch")
	d.unchanged(before)

	// The same registry, honest, works: the refusal was about the lie.
	honest := outsideRegistry(t, hello, func(h http.Handler) http.Handler { return h })
	if a, err = d.JSON(t.Context(), http.MethodPut, "/v1/functions/lied", "application/json", map[string]any{"image": honest}, nil); err != nil {
		t.Fatal(err)
	}
	d.ready(a)
	d.answers("lied", "HEARTH-MARKER")
}

func TestRegistryThatIsDownIsRetryable(t *testing.T) {
	d := shared(t)
	before := d.state()
	// A port that was free a moment ago: nobody answers there.
	l, err := new(net.ListenConfig).Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	a, err := d.JSON(t.Context(), http.MethodPut, "/v1/functions/nowhere", "application/json", map[string]any{"image": address + "/app:v1"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	p := d.problem(a, http.StatusServiceUnavailable)
	if !p.Retryable || a.Header.Get("Retry-After") == "" {
		t.Errorf("a registry that is down passes: want retryable and Retry-After: %s", a)
	}
	d.unchanged(before)
}

func TestControlAPIIsNotServedToForeignHosts(t *testing.T) {
	d := shared(t)
	d.submit("own-host", marked(t, "own host"), "")
	for _, host := range []string{"evil.example", "own-host.localhost"} {
		target := "http://" + host + ":80/v1/functions"
		a := d.get(target)
		if bytes.Contains(a.Body, []byte("FunctionList")) {
			t.Errorf("the API was served to host %s: %s", host, a)
		}
	}
	// A page of another origin must not be able to change anything.
	before := d.state()
	a := d.put("own-host", marked(t, "forged"), "", http.Header{"Sec-Fetch-Site": {"cross-site"}, "Origin": {"http://evil.example"}})
	if a.Status != http.StatusForbidden {
		t.Errorf("a cross-origin submit: %s", a)
	}
	d.unchanged(before)
	if csp := d.get(d.PathURL("own-host", "/")).Header.Get("Content-Security-Policy"); !strings.Contains(csp, "sandbox") {
		t.Errorf("a tenant's page on the API's origin is not sandboxed: %q", csp)
	}
	// Node endpoints are for the agent's socket only.
	if a := d.get("/node/v1/desired?after=0&wait=0s"); a.Status != http.StatusNotFound {
		t.Errorf("node endpoints are public: %s", a)
	}
}
