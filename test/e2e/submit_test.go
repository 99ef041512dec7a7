package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/test/guests"
	"github.com/hearth-sh/hearth/test/harness"
)

func TestSubmittedModulesAnswerAtBothURLForms(t *testing.T) {
	d := shared(t)
	for guest, want := range map[string]string{
		"hello-c":  "Hello, world, from C!",
		"hello-go": "Hello, world, from Go!",
		"hello":    "never seen before",
	} {
		t.Run(guest, func(t *testing.T) {
			d := dev{d.Dev, t}
			function := "forms-" + guest
			// The first two may have been compiled for another test already.
			phases := []string{"receive", "check", "publish", "record", "pull", "verify", "load", "instantiate"}
			module := guests.Read(t, guest)
			if guest == "hello" {
				module, phases = marked(t, want), append(phases, "compile", "store")
			}
			a := d.put(function, module, "", nil)
			f := d.ready(a)
			if a.Status != http.StatusCreated || a.Header.Get("Location") == "" || a.Header.Get("ETag") == "" {
				t.Errorf("a new function wants 201, Location and ETag: %s", a)
			}
			if f.Name != function || f.Revision != 1 || f.Tenant != v1alpha1.DefaultTenant ||
				!strings.HasPrefix(f.Digest, "sha256:") || !strings.Contains(f.Image, "@sha256:") {
				t.Errorf("not the function that was submitted: %s", a.Body)
			}
			seen := map[string]bool{}
			for _, p := range f.Phases {
				seen[p.Name] = true
			}
			for _, phase := range phases {
				if !seen[phase] {
					t.Errorf("phase %s has no time: %v", phase, f.Phases)
				}
			}
			d.answers(function, want)
			if b := d.get(strings.Replace(f.URL, "https:", "http:", 1)); b.Status != http.StatusOK || !bytes.Contains(b.Body, []byte(want)) {
				t.Errorf("the URL it told, %s: %s", f.URL, b)
			}
			if b := d.get(f.PathURL); b.Status != http.StatusOK || !bytes.Contains(b.Body, []byte(want)) {
				t.Errorf("the path URL it told, %s: %s", f.PathURL, b)
			}
		})
	}
}

func TestGoHandlerThroughNetHTTPCGI(t *testing.T) {
	d := shared(t)
	d.submit("gocgi", guests.Read(t, "go-cgi"), "")
	a := d.call(http.MethodPost, d.PathURL("gocgi", "/some/where?q=1%202"), strings.NewReader("payload"), http.Header{"User-Agent": {"e2e"}})
	if a.Status != http.StatusAccepted || a.Header.Get("X-Guest") != "go-cgi" {
		t.Fatalf("status and header of the handler are missing: %s", a)
	}
	if !strings.Contains(string(a.Body), "q=1 2 ua=e2e body=payload") {
		t.Errorf("the handler did not see the request: %s", a.Body)
	}
}

func TestRequestReachesTheGuestAsRFC3875Says(t *testing.T) {
	d := shared(t)
	d.submitWith("cgi", guests.Read(t, "echo"), harness.Settings{Env: map[string]string{"GREETING": "hi there", "REQUEST_METHOD": "FORGED"}})
	for _, form := range []struct{ url, script string }{
		{d.HostURL("cgi", "/a%20b/c?x=1&y=2"), ""},
		{d.PathURL("cgi", "/a%20b/c?x=1&y=2"), "/f/cgi"},
	} {
		a := d.call(http.MethodPost, form.url, strings.NewReader("the body"), http.Header{
			"Content-Type":  {"text/x-test"},
			"X-Custom":      {"value"},
			"Proxy":         {"http://evil.example"},
			"X-Echo-Status": {"418 Short and stout"},
			"X-Echo-Header": {"header from the guest"},
		})
		if a.Status != http.StatusTeapot || a.Header.Get("X-Echo") != "header from the guest" {
			t.Errorf("%s: the guest's status or header did not arrive: %s", form.url, a)
		}
		for _, want := range []string{
			"GATEWAY_INTERFACE=CGI/1.1\n", "REQUEST_METHOD=POST\n", "QUERY_STRING=x=1&y=2\n", "PATH_INFO=/a b/c\n",
			"SCRIPT_NAME=" + form.script + "\n", "CONTENT_TYPE=text/x-test\n", "CONTENT_LENGTH=8\n",
			"HTTP_X_CUSTOM=value\n", "SERVER_PROTOCOL=HTTP/1.1\n", "REMOTE_ADDR=127.0.0.1\n", "GREETING=hi there\n",
			"--- body ---\nthe body",
		} {
			if !strings.Contains(string(a.Body), want) {
				t.Errorf("%s: no %q in\n%s", form.url, want, a.Body)
			}
		}
		for _, bad := range []string{"HTTP_PROXY=", "FORGED", "LEAKED", "PATH=/usr"} {
			if strings.Contains(string(a.Body), bad) {
				t.Errorf("%s: %q must not reach the guest:\n%s", form.url, bad, a.Body)
			}
		}
	}
}

func TestHeadAnswersWithoutBody(t *testing.T) {
	d := shared(t)
	d.submit("head", marked(t, "head"), "")
	if a := d.call(http.MethodHead, d.PathURL("head", "/"), nil, nil); a.Status != http.StatusOK || len(a.Body) != 0 {
		t.Errorf("HEAD: %s", a)
	}
}

func TestSubmitByOCIReference(t *testing.T) {
	d := shared(t)
	wasm := func(text string) v1.Layer { return static.NewLayer(marked(t, text), "application/wasm") }
	push := func(tag, text string) v1.Hash {
		ref, err := name.ParseReference(d.Address+"/outside/app:"+tag, name.Insecure)
		if err != nil {
			t.Fatal(err)
		}
		// The CNCF Wasm artifact, as wkg and oras push it.
		image := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), "application/vnd.wasm.config.v0+json")
		if image, err = mutate.Append(image, mutate.Addendum{Layer: wasm(text), MediaType: "application/wasm"}); err != nil {
			t.Fatal(err)
		}
		if err := remote.Write(ref, image, remote.WithContext(t.Context())); err != nil {
			t.Fatalf("pushing to the embedded registry: %v", err)
		}
		digest, err := image.Digest()
		if err != nil {
			t.Fatal(err)
		}
		return digest
	}
	put := func(image string) *harness.Answer {
		a, err := d.JSON(t.Context(), http.MethodPut, "/v1/functions/byref", "application/json", map[string]any{"image": image}, nil)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	first := push("v1", "by tag")
	d.ready(put(d.Address + "/outside/app:v1"))
	d.answers("byref", "by tag")

	// A tag that moves must not move the function.
	push("v1", "tag moved")
	d.answers("byref", "by tag")
	d.ready(put(d.Address + "/outside/app:v1"))
	d.answers("byref", "tag moved")

	d.ready(put(d.Address + "/outside/app@" + first.String()))
	d.answers("byref", "by tag")

	// What was submitted as bytes is in the registry too, and can be named.
	f := d.submit("bybytes", marked(t, "published"), "")
	d.ready(put(f.Image))
	d.answers("byref", "published")

	before := d.state()
	d.problem(put(d.Address+"/outside/app:nosuchtag"), http.StatusUnprocessableEntity)
	d.problem(put("::not a reference::"), http.StatusBadRequest)
	d.unchanged(before)
}

func TestSettingsAreKeptCheckedAndPatched(t *testing.T) {
	d := shared(t)
	f := d.submitWith("settings", guests.Read(t, "echo"), harness.Settings{MemoryMiB: 32, TimeoutMS: 5000, Concurrency: 4, Env: map[string]string{"A": "one"}})
	if f.Settings.MemoryMiB != 32 || f.Settings.TimeoutMS != 5000 || f.Settings.Concurrency != 4 || f.Settings.Env["A"] != "one" {
		t.Errorf("settings not kept: %+v", f.Settings)
	}

	patch := func(document any) *harness.Answer {
		a, err := d.JSON(t.Context(), http.MethodPatch, "/v1/functions/settings", "application/merge-patch+json", document, nil)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	g := d.ready(patch(map[string]any{"env": map[string]any{"A": nil, "B": "two"}, "timeoutMs": 6000}))
	if g.Revision != f.Revision+1 || g.Digest != f.Digest || g.Settings.TimeoutMS != 6000 || g.Settings.MemoryMiB != 32 ||
		g.Settings.Env["B"] != "two" || g.Settings.Env["A"] != "" {
		t.Errorf("merge patch gave %+v", g)
	}
	if body := string(d.get(d.PathURL("settings", "/")).Body); !strings.Contains(body, "B=two\n") || strings.Contains(body, "A=one\n") {
		t.Errorf("the guest sees\n%s", body)
	}

	// A new module keeps the settings.
	h := d.submit("settings", marked(t, "kept"), "")
	if h.Settings.TimeoutMS != 6000 || h.Settings.Env["B"] != "two" {
		t.Errorf("a raw submit lost settings: %+v", h.Settings)
	}

	before := d.state()
	for _, bad := range []any{
		map[string]any{"memoryMiB": 0}, map[string]any{"memoryMiB": v1alpha1.MaxMemoryMiB + 1},
		map[string]any{"timeoutMs": 1}, map[string]any{"timeoutMs": v1alpha1.MaxTimeoutMS + 1},
		map[string]any{"concurrency": -1}, map[string]any{"concurrency": v1alpha1.MaxConcurrency + 1},
		map[string]any{"memory": 5}, map[string]any{"env": map[string]any{"BAD NAME=": "x"}},
		map[string]any{"env": map[string]any{"BIG": strings.Repeat("x", v1alpha1.MaxEnvBytes+1)}},
		"not an object",
	} {
		a := patch(bad)
		if a.Status != http.StatusBadRequest && a.Status != http.StatusUnprocessableEntity && a.Status != http.StatusRequestEntityTooLarge {
			t.Errorf("%.60v: status %s", bad, a)
		}
		d.problem(a, a.Status)
	}
	d.unchanged(before)
}

func TestSameModuleAndSettingsMakeNoNewRevision(t *testing.T) {
	d := shared(t)
	first := d.submit("noop", marked(t, "noop"), "")
	a := d.put("noop", marked(t, "noop"), "", nil)
	if second := d.ready(a); a.Status != http.StatusOK || second.Revision != first.Revision {
		t.Errorf("the same submit again: %s", a)
	}
}

func TestConditionalRequests(t *testing.T) {
	d := shared(t)
	created := d.put("etag", marked(t, "v1"), "", http.Header{"If-None-Match": {"*"}})
	d.ready(created)
	tag := d.get("/v1/functions/etag").Header.Get("ETag")
	if tag == "" {
		t.Fatal("no ETag")
	}
	if a := d.call(http.MethodGet, "/v1/functions/etag", nil, http.Header{"If-None-Match": {tag}}); a.Status != http.StatusNotModified || len(a.Body) != 0 {
		t.Errorf("If-None-Match on GET: %s", a)
	}
	before := d.state()
	d.problem(d.put("etag", marked(t, "v2"), "", http.Header{"If-None-Match": {"*"}}), http.StatusPreconditionFailed)
	d.problem(d.put("etag", marked(t, "v2"), "", http.Header{"If-Match": {`"other"`}}), http.StatusPreconditionFailed)
	d.problem(d.put("etag-new", marked(t, "v2"), "", http.Header{"If-Match": {tag}}), http.StatusPreconditionFailed)
	d.problem(d.call(http.MethodDelete, "/v1/functions/etag", nil, http.Header{"If-Match": {`"other"`}}), http.StatusPreconditionFailed)
	d.unchanged(before)
	d.ready(d.put("etag", marked(t, "v2"), "", http.Header{"If-Match": {tag}}))
	if now := d.get("/v1/functions/etag").Header.Get("ETag"); now == tag || now == "" {
		t.Errorf("the ETag stayed %q after a change", now)
	}

	// Of many writers that saw the same state one wins.
	tag = d.get("/v1/functions/etag").Header.Get("ETag")
	var won, lost atomic.Int32
	var writers sync.WaitGroup
	for i := range 6 {
		writers.Go(func() {
			a, err := d.Submit(t.Context(), "etag", marked(t, fmt.Sprintf("writer %d", i)), "", http.Header{"If-Match": {tag}})
			switch {
			case err != nil:
				t.Error(err)
			case a.Status == http.StatusOK:
				won.Add(1)
			case a.Status == http.StatusPreconditionFailed:
				lost.Add(1)
			default:
				t.Errorf("status %s", a)
			}
		})
	}
	writers.Wait()
	if won.Load() != 1 || lost.Load() != 5 {
		t.Errorf("%d writers won and %d lost, want 1 and 5", won.Load(), lost.Load())
	}
}

func TestIdempotencyKeyMakesRetriesSafe(t *testing.T) {
	d := shared(t)
	key := http.Header{"Idempotency-Key": {`"7d8f-e2e-one"`}}
	first := d.put("idem", marked(t, "first"), "", key)
	d.ready(first)
	again := d.put("idem", marked(t, "first"), "", key)
	if again.Status != first.Status || !bytes.Equal(again.Body, first.Body) || again.Header.Get("Idempotency-Replayed") != "true" {
		t.Errorf("the replay differs: first %s\nthen %s", first, again)
	}
	before := d.state()
	d.problem(d.put("idem", marked(t, "other"), "", key), http.StatusUnprocessableEntity)
	d.problem(d.put("idem", marked(t, "other"), "", http.Header{"Idempotency-Key": {strings.Repeat("k", 5000)}}), http.StatusBadRequest)
	d.unchanged(before)

	// The same key from many connections at once: one revision.
	var callers sync.WaitGroup
	for range 6 {
		callers.Go(func() {
			a, err := d.Submit(t.Context(), "idem", marked(t, "concurrent"), "", http.Header{"Idempotency-Key": {`"7d8f-e2e-two"`}})
			if err != nil {
				t.Error(err)
			} else if a.Status != http.StatusOK && a.Status != http.StatusConflict {
				t.Errorf("status %s", a)
			}
		})
	}
	callers.Wait()
	if f := d.function("idem"); f.Revision != 2 {
		t.Errorf("revision is %d after one more submit, want 2", f.Revision)
	}

	// A replayed delete stays a success although the function is gone.
	gone := http.Header{"Idempotency-Key": {`"7d8f-e2e-del"`}}
	for range 2 {
		if a := d.call(http.MethodDelete, "/v1/functions/idem", nil, gone); a.Status != http.StatusNoContent {
			t.Errorf("delete with a key: %s", a)
		}
	}
}

func TestAsyncSubmitAnswersAtOnceAndBecomesReady(t *testing.T) {
	d := shared(t)
	a := d.put("async", marked(t, "async"), "", http.Header{"Prefer": {"respond-async"}})
	if a.Status != http.StatusAccepted || a.Header.Get("Location") == "" {
		t.Fatalf("want 202 and Location: %s", a)
	}
	eventually(t, func() error {
		if f := d.function("async"); f.State != v1alpha1.StateReady {
			return fmt.Errorf("state %s", f.State)
		}
		return nil
	})
	d.answers("async", "async")
}

func TestRevisionsAndRollbackUnderLoadWithoutAFailedRequest(t *testing.T) {
	d := shared(t)
	d.submit("switch", marked(t, "revision 1"), "")

	stop := make(chan struct{})
	var clients sync.WaitGroup
	var served atomic.Int64
	for range 3 {
		clients.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				a, err := d.Do(t.Context(), http.MethodGet, d.HostURL("switch", "/"), nil, nil)
				if err != nil || a.Status != http.StatusOK || !strings.HasPrefix(string(a.Body), "revision ") {
					t.Errorf("during a switch: %v %v", err, a)
					return
				}
				served.Add(1)
			}
		})
	}
	rollback := func(body string) v1alpha1.Function {
		return d.ready(d.call(http.MethodPost, "/v1/functions/switch/rollback", strings.NewReader(body), http.Header{"Content-Type": {"application/json"}}))
	}
	for i := 2; i <= 5; i++ {
		want := fmt.Sprintf("revision %d", i)
		d.submit("switch", marked(t, want), "")
		d.answers("switch", want) // ready means this one answers from now on
	}
	if f := rollback(`{"revision":2}`); f.Revision != 2 {
		t.Errorf("rolled back to 2, wanted revision is %d", f.Revision)
	}
	d.answers("switch", "revision 2")
	rollback("")
	d.answers("switch", "revision 1")
	rollback(`{"revision":5}`)
	d.answers("switch", "revision 5")
	close(stop)
	clients.Wait()
	if served.Load() == 0 {
		t.Error("no request was served during the switches")
	}

	revisions := d.revisions("switch")
	if len(revisions) != 5 {
		t.Fatalf("%d revisions, want 5", len(revisions))
	}
	for i, r := range revisions {
		if r.Revision != 5-i || r.Active != (r.Revision == 5) {
			t.Errorf("revision %d at place %d, active %v", r.Revision, i, r.Active)
		}
	}
	before := d.state()
	for _, bad := range []string{`{"revision":99}`, `{"revision":-1}`, `{"revison":1}`, `{`} {
		a := d.call(http.MethodPost, "/v1/functions/switch/rollback", strings.NewReader(bad), http.Header{"Content-Type": {"application/json"}})
		if a.Status < 400 || a.Status >= 500 {
			t.Errorf("rollback %s: %s", bad, a)
		}
		d.problem(a, a.Status)
	}
	d.unchanged(before)
}

func TestDeletedFunctionIsGoneAndItsNameIsFree(t *testing.T) {
	d := shared(t)
	d.submit("short-lived", marked(t, "here"), "")
	if a := d.call(http.MethodDelete, "/v1/functions/short-lived", nil, nil); a.Status != http.StatusNoContent {
		t.Fatalf("delete: %s", a)
	}
	d.problem(d.get("/v1/functions/short-lived"), http.StatusNotFound, "function-not-found")
	d.problem(d.call(http.MethodDelete, "/v1/functions/short-lived", nil, nil), http.StatusNotFound, "function-not-found")
	eventually(t, func() error {
		if a := d.get(d.PathURL("short-lived", "/")); a.Status != http.StatusNotFound {
			return fmt.Errorf("its URL still answers %d", a.Status)
		}
		return nil
	})
	d.problem(d.get(d.HostURL("short-lived", "/")), http.StatusNotFound, "function-not-found")
	d.submit("short-lived", marked(t, "again"), "")
	d.answers("short-lived", "again")
}

func TestANameBelongsToItsTenant(t *testing.T) {
	d := shared(t)
	d.submit("claimed", marked(t, "mine"), "?tenant=alpha")
	before := d.state()
	a := d.put("claimed", marked(t, "theirs"), "?tenant=beta", nil)
	if a.Status != http.StatusConflict && a.Status != http.StatusForbidden {
		t.Errorf("another tenant's submit: %s", a)
	}
	d.problem(a, a.Status)
	d.unchanged(before)
	d.answers("claimed", "mine")
}

func TestListPagesThroughEveryFunction(t *testing.T) {
	d := shared(t)
	for i := range 3 {
		d.submit(fmt.Sprintf("page-%d", i), marked(t, "page"), "?tenant=pages")
	}
	seen := map[string]bool{}
	next := ""
	for range 10 {
		a := d.get("/v1/functions?tenant=pages&limit=2" + next)
		var list v1alpha1.FunctionList
		if err := json.Unmarshal(a.Body, &list); err != nil || a.Status != http.StatusOK {
			t.Fatalf("list: %v: %s", err, a)
		}
		if len(list.Items) > 2 {
			t.Errorf("%d items on a page of 2", len(list.Items))
		}
		for _, f := range list.Items {
			seen[f.Name] = true
		}
		if list.Continue == "" {
			break
		}
		next = "&continue=" + list.Continue
	}
	if len(seen) != 3 {
		t.Errorf("pages held %v", seen)
	}
}
