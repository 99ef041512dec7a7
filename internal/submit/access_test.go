package submit

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/access"
	"github.com/hearth-sh/hearth/internal/function"
)

// tokens is a token file with the token of each user.
type tokens struct {
	t    testing.TB
	path string
	of   map[string]string
	file *access.File
}

// newTokens makes a file of lines "user tenants"; the token of a user is of[user].
func newTokens(t testing.TB, lines ...string) *tokens {
	t.Helper()
	k := &tokens{t: t, path: filepath.Join(t.TempDir(), "tokens"), of: map[string]string{}}
	k.write(lines...)
	var err error
	if k.file, err = access.OpenFile(k.path, access.FileOptions{}); err != nil {
		t.Fatal(err)
	}
	return k
}

func (k *tokens) write(lines ...string) {
	k.t.Helper()
	var b strings.Builder
	for _, line := range lines {
		user, tenants, _ := strings.Cut(line, " ")
		token, line, err := access.GenerateToken(user, strings.Split(tenants, ",")...)
		if err != nil {
			k.t.Fatal(err)
		}
		k.of[user] = token
		fmt.Fprintln(&b, line)
	}
	if err := os.WriteFile(k.path, []byte(b.String()), 0o600); err != nil {
		k.t.Fatal(err)
	}
}

// as is the header of a user.
func (k *tokens) as(user string) string { return "Authorization: Bearer " + k.of[user] }

func (k *tokens) options(o *Options) { o.Access = k.file }

// twoTenants is an API with a function in each of two tenants, and users of
// either, of both and of none.
func twoTenants(t testing.TB, change ...func(*Options)) (*fixture, *tokens) {
	k := newTokens(t, "alice team-a", "bob team-b", "eve team-a:read", "root *", "auditor *:read")
	f := newFixture(t, append([]func(*Options){k.options}, change...)...)
	f.runNode()
	f.do("PUT", "/v1/functions/a1?tenant=team-a", module(1), wasm, k.as("alice")).want(201)
	f.do("PUT", "/v1/functions/b1?tenant=team-b", module(1), wasm, k.as("bob")).want(201)
	return f, k
}

// rules is access control with any rule: the token is the user's name.
type rules func(user string, a access.Action) bool

func (rules) Authenticate(_ context.Context, r *http.Request) (access.Caller, error) {
	token, err := access.BearerToken(r)
	return access.Caller{User: token}, err
}

func (may rules) Authorize(_ context.Context, c access.Caller, a access.Action) error {
	if may(c.User, a) {
		return nil
	}
	return &access.DeniedError{User: c.User, Action: a, Why: "the test says so"}
}

func TestOperationsBelowV1NeedACaller(t *testing.T) {
	f, k := twoTenants(t)
	for _, op := range publicOperations {
		path := strings.ReplaceAll(op.path, "{name}", "a1")
		for _, c := range []struct{ name, header, challenge string }{
			{"no token", "X-Nothing: x", `Bearer realm="hearth.sh"`},
			{"a token of nobody", "Authorization: Bearer nobody", `Bearer realm="hearth.sh", error="invalid_token"`},
			{"a password", "Authorization: Basic cm9vdDpyb290", `Bearer realm="hearth.sh"`},
		} {
			a := f.do(op.method, path, nil, c.header)
			if !strings.HasPrefix(op.path, "/v1/") {
				a.want(200)
				continue
			}
			p := a.want(401).problem("unauthorized")
			if got := a.header.Get("WWW-Authenticate"); got != c.challenge {
				t.Errorf("%s %s with %s: challenge %q", op.method, path, c.name, got)
			}
			if p.Retryable || !strings.Contains(p.Detail, "token") {
				t.Errorf("%s %s with %s: %+v", op.method, path, c.name, p)
			}
		}
	}
	f.do("GET", "/v1/functions/a1?access_token="+k.of["alice"], nil).want(401)
	f.do("GET", "/v1/functions/a1", nil, k.as("alice"), k.as("bob")).want(401)
	f.do("HEAD", "/v1/functions/a1", nil).want(401)
	if strings.Contains(f.log.String(), k.of["alice"]) {
		t.Error("a token is in the log")
	}
}

// anonymous is a problem without what tells one request from another.
func anonymous(a answer) string {
	var p v1alpha1.Problem
	if err := json.Unmarshal(a.body, &p); err != nil {
		a.t.Fatal(err)
	}
	p.Instance = ""
	return fmt.Sprintf("%d %+v", a.status, p)
}

func TestFunctionThatMayNotBeReadIsLikeOneThatIsMissing(t *testing.T) {
	f, k := twoTenants(t)
	for _, c := range []struct {
		method, tail string
		body         []byte
		headers      []string
	}{
		{"GET", "", nil, nil},
		{"GET", "/revisions", nil, nil},
		{"GET", "/logs", nil, nil},
		{"PATCH", "", []byte(`{"timeoutMs":100}`), []string{mp}},
		{"PATCH", "", []byte(`{"timeoutMs":100}`), []string{mp, "Idempotency-Key: p-%s"}},
		{"PATCH", "", []byte(`nonsense`), []string{mp}},
		{"PATCH", "", []byte(`nonsense`), []string{mp, "Idempotency-Key: n-%s"}},
		{"DELETE", "", nil, nil},
		{"DELETE", "", nil, []string{"Idempotency-Key: d-%s"}},
		{"DELETE", "", nil, []string{`If-Match: "x"`}},
		{"POST", "/rollback", nil, nil},
		{"POST", "/rollback", []byte(`{"revision":1}`), []string{js, "Idempotency-Key: r-%s"}},
	} {
		ask := func(name string) answer {
			headers := []string{k.as("bob")}
			for _, h := range c.headers {
				headers = append(headers, strings.ReplaceAll(h, "%s", name))
			}
			return f.do(c.method, "/v1/functions/"+name+c.tail, c.body, headers...)
		}
		if foreign, missing := anonymous(ask("a1")), anonymous(ask("missing")); foreign != missing {
			t.Errorf("%s %s %v:\n%s\n%s", c.method, c.tail, c.headers, foreign, missing)
		} else if !strings.HasPrefix(foreign, "404 ") && !bytes.Equal(c.body, []byte("nonsense")) {
			t.Errorf("%s %s: %s", c.method, c.tail, foreign)
		}
	}
	if v := f.do("GET", "/v1/functions/a1", nil, k.as("alice")).want(200).function(); v.Revision != 1 {
		t.Errorf("something changed: %+v", v)
	}
}

func TestRightsDecide(t *testing.T) {
	f, k := twoTenants(t)
	for _, c := range []struct {
		name, user, method, path string
		body                     []byte
		headers                  []string
		status                   int
		code                     string
		says                     []string
	}{
		{name: "reader reads", user: "eve", path: "/a1", status: 200},
		{name: "reader reads logs", user: "eve", path: "/a1/logs", status: 200},
		{name: "reader lists", user: "eve", path: "?tenant=team-a", status: 200},
		{name: "reader lists another tenant", user: "eve", path: "?tenant=team-b", status: 403, code: "forbidden", says: []string{`"eve"`, "list", "functions.hearth.sh", `"team-b"`}},
		{name: "list of all", user: "alice", status: 403, code: "forbidden", says: []string{"all namespaces", "?tenant="}},
		{name: "list of all by who may", user: "auditor", status: 200},
		{name: "reader patches", user: "eve", method: "PATCH", path: "/a1", body: []byte(`{}`), headers: []string{mp}, status: 403, code: "forbidden", says: []string{`"eve"`, "update", "functions.hearth.sh", `"team-a"`}},
		{name: "reader rolls back", user: "eve", method: "POST", path: "/a1/rollback", status: 403, code: "forbidden", says: []string{"update"}},
		{name: "reader deletes", user: "eve", method: "DELETE", path: "/a1", status: 403, code: "forbidden", says: []string{"delete"}},
		{name: "reader deletes under a key", user: "eve", method: "DELETE", path: "/a1", headers: []string{"Idempotency-Key: k"}, status: 403, code: "forbidden"},
		{name: "reader submits over", user: "eve", method: "PUT", path: "/a1", headers: []string{wasm}, status: 403, code: "forbidden", says: []string{"update"}},
		{name: "reader submits", user: "eve", method: "PUT", path: "/a2?tenant=team-a", headers: []string{wasm}, status: 403, code: "forbidden", says: []string{"create", `"team-a"`}},
		{name: "submit to the default tenant", user: "alice", method: "PUT", path: "/a2", headers: []string{wasm}, status: 403, code: "forbidden", says: []string{"create", `"default"`}},
		{name: "submit to another tenant", user: "bob", method: "PUT", path: "/b2?tenant=team-a", headers: []string{wasm}, status: 403, code: "forbidden", says: []string{"create", `"team-a"`}},
		{name: "submit over another tenant's, naming it", user: "bob", method: "PUT", path: "/a1?tenant=team-a", headers: []string{wasm}, status: 403, code: "forbidden", says: []string{"create", `"team-a"`}},
		{name: "submit over another tenant's", user: "bob", method: "PUT", path: "/a1", headers: []string{wasm}, status: 409, code: "name-taken"},
		{name: "submit over another tenant's, naming one's own", user: "bob", method: "PUT", path: "/a1?tenant=team-b", headers: []string{wasm}, status: 409, code: "name-taken"},
		{name: "submit over another tenant's under a key", user: "bob", method: "PUT", path: "/a1", headers: []string{wasm, "Idempotency-Key: k"}, status: 409, code: "name-taken"},
		{name: "owner submits over, naming nothing", user: "alice", method: "PUT", path: "/a1", body: module(1), headers: []string{wasm}, status: 200},
		{name: "administrator submits over", user: "root", method: "PUT", path: "/a1", body: module(1), headers: []string{wasm}, status: 200},
		{name: "administrator deletes", user: "root", method: "DELETE", path: "/b1", status: 204},
	} {
		t.Run(c.name, func(t *testing.T) {
			f.t = t
			method := c.method
			if method == "" {
				method = "GET"
			}
			a := f.do(method, "/v1/functions"+c.path, c.body, append(c.headers, k.as(c.user))...).want(c.status)
			if c.code == "" {
				return
			}
			p := a.problem(c.code)
			for _, s := range c.says {
				if !strings.Contains(p.Detail, s) {
					t.Errorf("%q does not say %s", p.Detail, s)
				}
			}
			if strings.Contains(p.Detail, "token file") {
				t.Errorf("%q says more than the caller should know", p.Detail)
			}
		})
	}
	f.t = t
	var l v1alpha1.FunctionList
	if err := json.Unmarshal(f.do("GET", "/v1/functions?tenant=team-a", nil, k.as("eve")).want(200).body, &l); err != nil || len(l.Items) != 1 || l.Items[0].Tenant != "team-a" {
		t.Fatalf("%+v %v", l, err)
	}
}

func TestRefusedSubmitIsAnsweredBeforeItsBody(t *testing.T) {
	f, k := twoTenants(t)
	for path, status := range map[string]int{"/a1": 409, "/a1?tenant=team-b": 409, "/new?tenant=team-a": 403, "/new": 403} {
		for _, key := range []string{"", "Idempotency-Key: k\r\n"} {
			conn := dial(t, f.url)
			fmt.Fprintf(conn, "PUT /v1/functions%s HTTP/1.1\r\nHost: x\r\n%s\r\nContent-Type: application/wasm\r\n%sContent-Length: 1000000\r\n\r\n", path, k.as("bob"), key)
			resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Fatal(err)
			}
			_ = resp.Body.Close()
			if resp.StatusCode != status {
				t.Errorf("%s %q: %s", path, key, resp.Status)
			}
		}
	}
}

func TestKeysOfTwoCallersAreTwoKeys(t *testing.T) {
	f, k := twoTenants(t)
	const key = "Idempotency-Key: same"
	first := f.do("PATCH", "/v1/functions/a1", []byte(`{"env":{"PRIVATE":"1"}}`), mp, key, k.as("alice")).want(200)
	again := f.do("PATCH", "/v1/functions/a1", []byte(`{"env":{"PRIVATE":"1"}}`), mp, key, k.as("alice")).want(200)
	if again.header.Get("Idempotency-Replayed") != "true" || !bytes.Equal(first.body, again.body) {
		t.Error("not replayed to the one who asked")
	}
	if a := f.do("PATCH", "/v1/functions/a1", []byte(`{"env":{"PRIVATE":"1"}}`), mp, key, k.as("bob")).want(404); bytes.Contains(a.body, []byte("PRIVATE")) {
		t.Error("replayed to another")
	}
	f.do("DELETE", "/v1/functions/a1", nil, "Idempotency-Key: d", k.as("alice")).want(204)
	if f.do("DELETE", "/v1/functions/a1", nil, "Idempotency-Key: d", k.as("alice")).want(204).header.Get("Idempotency-Replayed") != "true" {
		t.Error("a deletion is not replayed")
	}
}

func TestCreatorsRetryIsAnswered(t *testing.T) {
	may := rules(func(_ string, a access.Action) bool { return a.Verb == access.VerbCreate })
	f := newFixture(t, func(o *Options) { o.Access = may })
	f.runNode()
	const as, key = "Authorization: Bearer ci", "Idempotency-Key: k"
	f.put("hello", 1, as, key).want(201)
	if f.put("hello", 1, as, key).want(201).header.Get("Idempotency-Replayed") != "true" {
		t.Error("not replayed")
	}
	f.put("hello", 2, as).want(409).problem("name-taken") // for all that this caller may know
	f.do("PUT", "/v1/functions/hello?tenant=default", module(2), wasm, as).want(403).problem("forbidden")
}

// store directly, as another writer of the same store would.
func (f *fixture) record(name, tenant string, n int) function.Function {
	f.t.Helper()
	res, err := f.store.AddRevision(context.Background(), name, function.Change{Tenant: tenant}, func(*function.Function) (function.NewRevision, error) {
		return function.NewRevision{ModuleDigest: "sha256:" + hash(module(n)), SizeBytes: int64(len(module(n))), Settings: function.DefaultSettings()}, nil
	})
	if err != nil {
		f.t.Fatal(err)
	}
	return res.Function
}

func TestDecisionHoldsForTheFunctionItWasMadeFor(t *testing.T) {
	ctx := context.Background()
	t.Run("name claimed by another tenant while the module is checked", func(t *testing.T) {
		f, k := twoTenants(t)
		f.set(func() { f.checking = func(context.Context) error { f.record("new", "team-b", 9); return nil } })
		f.do("PUT", "/v1/functions/new?tenant=team-a", module(1), wasm, k.as("alice")).want(409).problem("name-taken")
	})
	t.Run("function becomes another tenant's while its owner submits without naming one", func(t *testing.T) {
		f, k := twoTenants(t)
		f.set(func() {
			f.checking = func(context.Context) error {
				if err := f.store.Delete(ctx, "a1", function.Change{}); err != nil {
					return err
				}
				f.record("a1", "team-b", 9)
				return nil
			}
		})
		f.do("PUT", "/v1/functions/a1", module(2), wasm, k.as("alice")).want(409).problem("name-taken")
		if fn, err := f.store.Get(ctx, "a1"); err != nil || fn.Tenant != "team-b" || fn.Revision.ModuleDigest != "sha256:"+hash(module(9)) {
			t.Errorf("%+v %v", fn, err)
		}
	})
	t.Run("who may create only does not update what came in between", func(t *testing.T) {
		f := newFixture(t, func(o *Options) {
			o.Access = rules(func(_ string, a access.Action) bool { return a.Verb == access.VerbCreate || a.Verb == access.VerbGet })
		})
		f.runNode()
		f.set(func() { f.checking = func(context.Context) error { f.record("new", "default", 9); return nil } })
		f.put("new", 1, "Authorization: Bearer ci").want(403).problem("forbidden")
		if fn, _ := f.store.Get(ctx, "new"); fn.Wanted != 1 || fn.Revision.ModuleDigest != "sha256:"+hash(module(9)) {
			t.Errorf("%+v", fn)
		}
	})
	t.Run("who may do both creates what went in between", func(t *testing.T) {
		f, k := twoTenants(t)
		f.set(func() {
			f.checking = func(context.Context) error { return f.store.Delete(ctx, "a1", function.Change{}) }
		})
		if v := f.do("PUT", "/v1/functions/a1?tenant=team-a", module(2), wasm, k.as("alice")).want(201).function(); v.Tenant != "team-a" {
			t.Errorf("%+v", v)
		}
	})
	t.Run("another tenant's function is not shown to who waits for the one before", func(t *testing.T) {
		f, k := twoTenants(t)
		f.set(func() {
			f.nodeFails = &v1alpha1.FunctionError{Code: "registry-unavailable", Detail: "x"}
			f.checking = func(context.Context) error {
				f.server.stop() // so that nobody waits
				return nil
			}
		})
		s := f.server
		f.record("c1", "team-b", 1)
		r, _ := http.NewRequestWithContext(context.WithValue(ctx, callerKey{}, access.Caller{User: "alice"}), "GET", "/", nil)
		_, err := s.await(r.Context(), "c1", "team-a", 1, false, 0)
		var p *problem
		if !errors.As(err, &p) || p.kind.Code != "function-not-found" {
			t.Errorf("%v", err)
		}
		_ = k
	})
}

func TestFollowedLogEndsWithTheRight(t *testing.T) {
	for _, c := range []struct {
		name string
		then func(f *fixture, k *tokens)
	}{
		{"the token is removed", func(_ *fixture, k *tokens) { k.write("bob team-b") }},
		{"the function is deleted", func(f *fixture, _ *tokens) {
			if err := f.store.Delete(context.Background(), "a1", function.Change{}); err != nil {
				f.t.Error(err)
			}
		}},
		{"the name becomes another tenant's", func(f *fixture, _ *tokens) {
			if err := f.store.Delete(context.Background(), "a1", function.Change{}); err != nil {
				f.t.Error(err)
			}
			f.record("a1", "team-b", 3)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			f, k := twoTenants(t)
			f.server.accessEvery = 20 * time.Millisecond
			f.set(func() { f.logLines = "{\"line\":\"one\"}\n" })
			ctx, cancel := context.WithTimeout(context.Background(), testWait)
			defer cancel()
			req, _ := http.NewRequestWithContext(ctx, "GET", f.url+"/v1/functions/a1/logs?follow=true", nil)
			req.Header.Set("Authorization", "Bearer "+k.of["alice"])
			resp, err := f.client.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = resp.Body.Close() }()
			in := bufio.NewReader(resp.Body)
			if line, err := in.ReadString('\n'); err != nil || !strings.Contains(line, "one") {
				t.Fatal(line, err)
			}
			// What is reported of the function in between does not end it.
			f.do("PATCH", "/v1/functions/a1", []byte(`{"timeoutMs":500}`), mp, k.as("alice")).want(200)
			c.then(f, k)
			if rest, err := io.ReadAll(in); err != nil || len(rest) > 0 {
				t.Errorf("%q %v", rest, err)
			}
		})
	}
}

func TestAccessThatCannotBeDecidedIsNotDenied(t *testing.T) {
	f, k := twoTenants(t)
	if err := os.WriteFile(k.path, []byte("what?\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	a := f.do("GET", "/v1/functions/a1", nil, k.as("alice")).want(503)
	if p := a.problem("access-unavailable"); !p.Retryable || a.header.Get("Retry-After") == "" || strings.Contains(p.Detail, "what?") {
		t.Errorf("%+v", p)
	}
}

// auditLog collects lines as JSON.
type auditLog struct {
	lockedBuffer
	t testing.TB
}

func (l *auditLog) options(o *Options) { o.Audit = slog.New(slog.NewJSONHandler(l, nil)) }

// last returns the newest line, and that there are n.
func (l *auditLog) last(n int) map[string]any {
	l.t.Helper()
	// The line of a refusal may be written after its answer was read.
	deadline := time.Now().Add(testWait)
	var lines []string
	for {
		lines = strings.Split(strings.TrimSpace(l.String()), "\n")
		if len(lines) >= n || time.Now().After(deadline) {
			break
		}
		time.Sleep(time.Millisecond)
	}
	if len(lines) != n {
		l.t.Fatalf("%d lines, want %d:\n%s", len(lines), n, l.String())
	}
	var m map[string]any
	if err := json.Unmarshal([]byte(lines[n-1]), &m); err != nil {
		l.t.Fatal(err)
	}
	return m
}

func TestEveryChangeIsAudited(t *testing.T) {
	l := &auditLog{t: t}
	f, k := twoTenants(t, l.options)
	n := 2
	digest := "sha256:" + hash(module(1))
	for _, c := range []struct {
		name, user, method, path string
		body                     string
		headers                  []string
		want                     map[string]any
	}{
		{"submit", "alice", "PUT", "/a2?tenant=team-a", string(module(1)), []string{wasm}, map[string]any{"outcome": "accepted", "action": "submit", "user": "alice", "tenant": "team-a", "function": "a2", "revision": 1.0, "digest": digest}},
		{"the same again", "alice", "PUT", "/a2", string(module(1)), []string{wasm}, map[string]any{"outcome": "unchanged", "revision": 1.0, "tenant": "team-a"}},
		{"settings", "alice", "PATCH", "/a2", `{"secrets":{"KEY":"hunter2"}}`, []string{mp, "Idempotency-Key: s"}, map[string]any{"outcome": "accepted", "action": "patch", "revision": 2.0, "digest": digest}},
		{"settings again", "alice", "PATCH", "/a2", `{"secrets":{"KEY":"hunter2"}}`, []string{mp, "Idempotency-Key: s"}, map[string]any{"outcome": "replayed", "action": "patch", "function": "a2"}},
		{"rollback", "alice", "POST", "/a2/rollback", "", nil, map[string]any{"outcome": "accepted", "action": "rollback", "revision": 1.0}},
		{"not allowed", "eve", "DELETE", "/a2", "", nil, map[string]any{"outcome": "refused", "action": "delete", "user": "eve", "tenant": "team-a", "problem": "forbidden"}},
		{"not to be seen", "bob", "DELETE", "/a2", "", nil, map[string]any{"outcome": "refused", "user": "bob", "function": "a2", "problem": "function-not-found", "tenant": ""}},
		{"nobody", "", "DELETE", "/a2", "", nil, map[string]any{"outcome": "refused", "user": "", "problem": "unauthorized"}},
		{"not wasm", "alice", "PUT", "/a3?tenant=team-a", "x", []string{wasm}, map[string]any{"outcome": "refused", "tenant": "team-a", "function": "a3", "problem": "not-wasm", "digest": "sha256:" + hash([]byte("x"))}},
		{"a bad name", "alice", "DELETE", "/A%0Ab", "", nil, map[string]any{"outcome": "refused", "function": "", "problem": "invalid-name"}},
		{"from a web page", "alice", "DELETE", "/a2", "", []string{"Sec-Fetch-Site: cross-site"}, map[string]any{"outcome": "refused", "problem": "cross-origin"}},
		{"delete", "root", "DELETE", "/a2", "", []string{"X-Forwarded-For: 192.0.2.7"}, map[string]any{"outcome": "accepted", "action": "delete", "user": "root", "tenant": "team-a", "function": "a2", "revision": 1.0, "forwarded": "192.0.2.7"}},
	} {
		headers := c.headers
		if c.user != "" {
			headers = append(headers, k.as(c.user))
		}
		a := f.do(c.method, "/v1/functions"+c.path, []byte(c.body), headers...)
		n++
		got := l.last(n)
		for name, v := range c.want {
			if got[name] != v {
				t.Errorf("%s: %s is %v, want %v", c.name, name, got[name], v)
			}
		}
		if got["request"] != a.header.Get("Hearth-Request-Id") || !strings.HasPrefix(got["source"].(string), "127.0.0.1:") {
			t.Errorf("%s: %v", c.name, got)
		}
	}
	f.do("GET", "/v1/functions/a1", nil, k.as("alice")).want(200)
	f.do("GET", "/v1/functions/a1", nil).want(401)
	l.last(n)
	for _, secret := range []string{"hunter2", k.of["alice"], "PRIVATE"} {
		if strings.Contains(l.String(), secret) {
			t.Errorf("the audit log has %q", secret)
		}
	}
}

func TestWithoutAccessControlChangesAreAuditedToo(t *testing.T) {
	l := &auditLog{t: t}
	f := newFixture(t, l.options)
	f.do("PUT", "/v1/functions/a?wait=0s", module(1), wasm).want(202)
	if got := l.last(1); got["outcome"] != "accepted" || got["tenant"] != "default" || got["user"] != "" {
		t.Errorf("%v", got)
	}
}

func quota(q Quota) func(*Options) {
	return func(o *Options) {
		if q.Rate == 0 {
			q.Rate = -1
		}
		o.Quotas = &Quotas{Default: q}
	}
}

func TestQuotaOfFunctions(t *testing.T) {
	f := newFixture(t, quota(Quota{Functions: 2}))
	f.runNode()
	f.put("a", 1).want(201)
	f.put("b", 1).want(201)
	const key = "Idempotency-Key: k"
	for _, headers := range [][]string{nil, {key}} {
		p := f.put("c", 1, headers...).want(403).problem("quota-exceeded")
		if p.Retryable || !strings.Contains(p.Detail, "has 2 functions and may have 2") {
			t.Errorf("%+v", p)
		}
	}
	f.do("PUT", "/v1/functions/d?tenant=other", module(1), wasm).want(201) // another tenant's share
	f.put("a", 2).want(200)
	f.do("PATCH", "/v1/functions/a", []byte(`{"timeoutMs":100}`), mp).want(200)
	f.do("POST", "/v1/functions/a/rollback", nil).want(200)
	f.do("DELETE", "/v1/functions/a", nil).want(204)
	f.put("c", 1, key).want(201) // what was refused for want of room is not refused again for the key
	if f.published != 5 {
		t.Errorf("%d modules were published, want 5", f.published)
	}
}

func TestQuotaOfBytes(t *testing.T) {
	small, large := module(1), append(module(1), make([]byte, 1000)...)
	f := newFixture(t, quota(Quota{Bytes: 1500}))
	f.runNode()
	submit := func(name string, m []byte, headers ...string) answer {
		return f.do("PUT", "/v1/functions/"+name, m, append(headers, wasm)...)
	}
	submit("a", large).want(201)
	if p := submit("b", large).want(403).problem("quota-exceeded"); !strings.Contains(p.Detail, "may have 1500") {
		t.Error(p.Detail)
	}
	if f.published != 1 {
		t.Error("what was refused reached the registry")
	}
	f.set(func() { f.image = large })
	f.do("PUT", "/v1/functions/b", []byte(`{"image":"r.example/a:1"}`), js).want(403).problem("quota-exceeded")
	submit("b", small).want(201)
	submit("a", small).want(200)
	submit("b", large).want(200)
	// Back to the large one would be too much.
	f.do("POST", "/v1/functions/a/rollback", nil).want(403).problem("quota-exceeded")
	f.do("POST", "/v1/functions/a/rollback", []byte(`{"revision":1}`), js).want(403).problem("quota-exceeded")
	f.do("POST", "/v1/functions/b/rollback", nil).want(200)
	f.do("POST", "/v1/functions/a/rollback", nil).want(200)
}

func TestWhoIsOverALoweredQuotaCanStillMend(t *testing.T) {
	var q Quota
	var mu sync.Mutex
	f := newFixture(t, func(o *Options) {
		o.Quotas = &Quotas{Default: Quota{Rate: -1}, For: func(context.Context, string) (Quota, error) {
			mu.Lock()
			defer mu.Unlock()
			return q, nil
		}}
	})
	f.runNode()
	large := append(module(1), make([]byte, 1000)...)
	f.do("PUT", "/v1/functions/a", large, wasm).want(201)
	f.put("b", 1).want(201)
	mu.Lock()
	q = Quota{Functions: 1, Bytes: 10}
	mu.Unlock()
	f.do("PATCH", "/v1/functions/a", []byte(`{"timeoutMs":100}`), mp).want(200)
	f.do("PUT", "/v1/functions/a", append([]byte(nil), large[:500]...), wasm).want(200)
	f.do("PUT", "/v1/functions/a", large, wasm).want(403).problem("quota-exceeded")
	f.put("c", 1).want(403).problem("quota-exceeded")
	f.do("DELETE", "/v1/functions/b", nil).want(204)
}

func TestTwoSubmitsDoNotBothTakeTheLastPlace(t *testing.T) {
	const places, submits = 3, 12
	f := newFixture(t, quota(Quota{Functions: places}), func(o *Options) { o.Limits.Submits, o.Limits.Admission = submits, testWait })
	var all sync.WaitGroup
	all.Add(submits)
	f.set(func() {
		f.checking = func(context.Context) error { // every one was let through by now
			all.Done()
			all.Wait()
			return nil
		}
	})
	statuses := make(chan int, submits)
	for i := range submits {
		go func() {
			statuses <- f.do("PUT", fmt.Sprintf("/v1/functions/f%d?wait=0s", i), module(i), wasm).status
		}()
	}
	accepted := 0
	for range submits {
		switch s := <-statuses; s {
		case 202:
			accepted++
		case 403:
		default:
			t.Errorf("status %d", s)
		}
	}
	page, err := f.store.List(context.Background(), function.ListOptions{})
	if err != nil || accepted != places || len(page.Items) != places {
		t.Errorf("%d accepted, %d recorded, %v", accepted, len(page.Items), err)
	}
}

// laggard is a store whose lists are those of a moment ago.
type laggard struct {
	function.Store
	page function.Page
}

func (l *laggard) List(context.Context, function.ListOptions) (function.Page, error) {
	return l.page, nil
}

func TestQuotaRemembersWhatTheListDoesNotShowYet(t *testing.T) {
	l := &laggard{}
	now := time.Now()
	f := newFixture(t, quota(Quota{Functions: 1}), func(o *Options) {
		l.Store, o.Store = o.Store, l
		o.Now = func() time.Time { return now }
	})
	f.runNode()
	f.put("a", 1).want(201)
	f.put("b", 1).want(403).problem("quota-exceeded")
	a, err := f.store.Get(context.Background(), "a")
	if err != nil {
		t.Fatal(err)
	}
	l.page.Items = []function.Function{a}
	f.do("DELETE", "/v1/functions/a", nil).want(204)
	f.put("b", 1).want(201) // though the list still has the other
	l.page.Items = nil
	f.put("c", 1).want(403)
	now = now.Add(2 * recentFor) // the list is right by then
	f.put("c", 1).want(201)
}

func TestRateOfChanges(t *testing.T) {
	now := time.Now()
	var mu sync.Mutex
	f := newFixture(t, quota(Quota{Rate: 0.25, Burst: 2}), func(o *Options) {
		o.Now = func() time.Time { mu.Lock(); defer mu.Unlock(); return now }
	})
	pass := func(d time.Duration) { mu.Lock(); defer mu.Unlock(); now = now.Add(d) }
	f.runNode()
	f.put("a", 1).want(201)
	f.do("PATCH", "/v1/functions/a", []byte(`{"timeoutMs":100}`), mp, "Idempotency-Key: k").want(200)
	for _, c := range []struct {
		method, path string
		body         []byte
		header       string
	}{
		{"PUT", "/v1/functions/b", module(1), wasm},
		{"PATCH", "/v1/functions/a", []byte(`{}`), mp},
		{"POST", "/v1/functions/a/rollback", nil, js},
		{"DELETE", "/v1/functions/a", nil, js},
	} {
		a := f.do(c.method, c.path, c.body, c.header).want(429)
		if p := a.problem("too-many-changes"); !p.Retryable || a.header.Get("Retry-After") != "4" {
			t.Errorf("%s: %+v, Retry-After %q", c.method, p, a.header.Get("Retry-After"))
		}
	}
	f.do("GET", "/v1/functions/a", nil).want(200)
	f.do("PUT", "/v1/functions/c?tenant=other", module(1), wasm).want(201)
	pass(2 * time.Second)
	if a := f.put("b", 1).want(429); a.header.Get("Retry-After") != "2" {
		t.Errorf("Retry-After %q", a.header.Get("Retry-After"))
	}
	pass(2 * time.Second)
	f.put("b", 1).want(201)
	f.put("b", 2).want(429)
	pass(time.Hour) // no more than the burst
	f.put("b", 2).want(200)
	f.put("b", 3).want(200)
	f.put("b", 4).want(429)
}

func TestRateOfAllRequests(t *testing.T) {
	now := time.Now()
	var mu sync.Mutex
	f, k := twoTenants(t, quota(Quota{Requests: 0.5, RequestBurst: 5}), func(o *Options) {
		o.Now = func() time.Time { mu.Lock(); defer mu.Unlock(); return now }
	})
	pass := func(d time.Duration) { mu.Lock(); defer mu.Unlock(); now = now.Add(d) }
	one := func(name, user string, status int) answer {
		t.Helper()
		return f.do("GET", "/v1/functions/"+name, nil, k.as(user)).want(status)
	}
	for range 4 { // and one was spent on the submit
		one("a1", "alice", 200)
	}
	for _, c := range []struct {
		method, path, user string
		body               []byte
		header             string
	}{
		{"GET", "/v1/functions/a1", "alice", nil, js},
		{"GET", "/v1/functions/a1", "eve", nil, js}, // who may read counts
		{"GET", "/v1/functions/a1/revisions", "alice", nil, js},
		{"GET", "/v1/functions/a1/logs", "alice", nil, js},
		{"GET", "/v1/functions?tenant=team-a", "alice", nil, js},
		{"PUT", "/v1/functions/a1", "alice", module(2), wasm},
		{"PUT", "/v1/functions/a2?tenant=team-a", "root", module(2), wasm},
		{"PATCH", "/v1/functions/a1", "alice", []byte(`{}`), mp},
		{"POST", "/v1/functions/a1/rollback", "alice", nil, js},
		{"DELETE", "/v1/functions/a1", "alice", nil, js},
	} {
		a := f.do(c.method, c.path, c.body, c.header, k.as(c.user)).want(429)
		if p := a.problem("too-many-api-requests"); !p.Retryable || a.header.Get("Retry-After") != "2" || !strings.Contains(p.Detail, `"team-a"`) {
			t.Errorf("%s %s: %+v, Retry-After %q", c.method, c.path, p, a.header.Get("Retry-After"))
		}
	}
	// Neither another tenant's rate nor what may be known of this one is touched.
	for range 4 {
		one("b1", "bob", 200)
	}
	one("a1", "bob", 404)
	for range 5 {
		f.do("GET", "/v1/functions", nil, k.as("root")).want(200)
	}
	if p := f.do("GET", "/v1/functions", nil, k.as("root")).want(429).problem("too-many-api-requests"); !strings.Contains(p.Detail, `user "root"`) {
		t.Error(p.Detail)
	}
	f.do("GET", "/v1/functions", nil, k.as("auditor")).want(200)
	pass(2 * time.Second)
	one("a1", "alice", 200)
	one("a1", "alice", 429)
	for range 1000 {
		f.do("GET", "/livez", nil).want(200)
	}
}

func TestTenantsOwnQuota(t *testing.T) {
	q := newQuotas(&Quotas{Default: Quota{Functions: 3}, For: func(_ context.Context, tenant string) (Quota, error) {
		switch tenant {
		case "large":
			return Quota{Functions: -1, Bytes: -1, Rate: -1, Burst: -1, Requests: -1, RequestBurst: -1}, nil
		case "broken":
			return Quota{}, errors.New("no such namespace")
		}
		return Quota{Burst: 1}, nil
	}}, nil, time.Now)
	for tenant, want := range map[string]Quota{
		"small": {3, DefaultQuotaBytes, DefaultQuotaRate, 1, DefaultQuotaRequests, DefaultQuotaRequestBurst},
		"large": {-1, -1, -1, -1, -1, -1},
	} {
		if got, err := q.of(context.Background(), tenant); err != nil || got != want {
			t.Errorf("%s: %+v, %v", tenant, got, err)
		}
	}
	if err := q.spend(context.Background(), "broken"); err == nil {
		t.Error("a quota that is not known does not bind")
	}
	if err := q.spend(context.Background(), "small"); err != nil {
		t.Error(err)
	}
	if err := q.spend(context.Background(), "small"); err == nil {
		t.Error("the tenant's own burst does not bind")
	}
	for range 1000 {
		if err := q.spend(context.Background(), "large"); err != nil {
			t.Fatal(err)
		}
	}
}

func TestSharesOfIdleTenantsAreForgotten(t *testing.T) {
	now := time.Now()
	q := newQuotas(&Quotas{}, nil, func() time.Time { return now })
	for i := range 3 * maxShares {
		if err := q.spend(context.Background(), fmt.Sprintf("t%d", i)); err != nil {
			t.Fatal(err)
		}
		now = now.Add(time.Second)
	}
	if len(q.shares) > maxShares {
		t.Errorf("%d shares", len(q.shares))
	}
}

func TestRuntimesAndSettingsOfACluster(t *testing.T) {
	local := newFixture(t)
	local.runNode()
	local.put("a", 1).want(201)
	cluster := newFixture(t, func(o *Options) {
		o.Runtimes = []v1alpha1.FunctionRuntime{v1alpha1.RuntimeResident, v1alpha1.RuntimeSpin}
	})
	cluster.runNode()
	cluster.put("a", 1).want(201)
	resident := newFixture(t, func(o *Options) { o.Runtimes = []v1alpha1.FunctionRuntime{v1alpha1.RuntimeResident} })
	resident.runNode()
	resident.put("a", 1).want(201)
	for _, c := range []struct {
		name, settings           string
		local, resident, cluster string // problem codes
	}{
		{"resident", `{"runtime":"resident"}`, "", "", ""},
		{"back to the default", `{"runtime":null,"host":null,"routes":null,"placement":null,"autoscaling":null}`, "", "", ""},
		{"spin", `{"runtime":"spin"}`, "runtime-unsupported", "runtime-unsupported", ""},
		{"no such runtime", `{"runtime":"native"}`, "invalid-settings", "invalid-settings", "invalid-settings"},
		{"host", `{"runtime":null,"host":"a.example.com"}`, "runtime-unsupported", "", ""},
		{"routes", `{"host":"a.example.com","routes":["/api"]}`, "runtime-unsupported", "", ""},
		{"placement", `{"placement":{"nodeSelector":{"disk":"ssd"}}}`, "runtime-unsupported", "", ""},
		{"autoscaling", `{"placement":null,"runtime":"spin","autoscaling":{"minReplicas":2}}`, "runtime-unsupported", "runtime-unsupported", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, x := range []struct {
				f    *fixture
				code string
			}{{local, c.local}, {resident, c.resident}, {cluster, c.cluster}} {
				x.f.t = t
				a := x.f.do("PATCH", "/v1/functions/a", []byte(c.settings), mp)
				if x.code == "" {
					a.want(200)
				} else {
					a.want(422).problem(x.code)
				}
			}
		})
	}
	local.t, cluster.t = t, t
	if v := cluster.do("GET", "/v1/functions/a", nil).want(200).function(); v.Settings.Runtime != v1alpha1.RuntimeSpin || v.Settings.Autoscaling == nil || v.Settings.Host != "a.example.com" {
		t.Errorf("%+v", v.Settings)
	}
	if v := cluster.do("PUT", "/v1/functions/s?runtime=spin", module(1), wasm).want(201).function(); v.Settings.Runtime != v1alpha1.RuntimeSpin {
		t.Errorf("%+v", v.Settings)
	}
	p := local.do("PUT", "/v1/functions/s?runtime=spin", module(1), wasm).want(422).problem("runtime-unsupported")
	if !strings.Contains(p.Detail, "cluster") {
		t.Error(p.Detail)
	}
	local.do("PUT", "/v1/functions/s?runtime=spin", []byte(`{"image":"r.example/a:1"}`), js).want(400).problem("unknown-parameter")
}

// unavailable is a store that answers everything with one error.
type unavailable struct {
	function.Store
	err error
}

func (u unavailable) Get(context.Context, string) (function.Function, error) {
	return function.Function{}, u.err
}

func TestTroubleOfAClustersStore(t *testing.T) {
	for _, c := range []struct {
		err       error
		status    int
		code      string
		retryable bool
	}{
		{function.ErrUnavailable, 503, "store-unavailable", true},
		{function.ErrCRDMissing, 503, "not-installed", false},
		{function.ErrTenantNotFound, 404, "tenant-not-found", false},
	} {
		f := newFixture(t, func(o *Options) { o.Store = unavailable{o.Store, fmt.Errorf("get: %w", c.err)} })
		a := f.put("a", 1).want(c.status)
		if p := a.problem(c.code); p.Retryable != c.retryable || (a.header.Get("Retry-After") != "") != c.retryable {
			t.Errorf("%+v, Retry-After %q", p, a.header.Get("Retry-After"))
		}
	}
}

func TestNodeSpeaksForItselfOnly(t *testing.T) {
	var mu sync.Mutex
	var asked []string
	f := newFixture(t, func(o *Options) {
		o.NodeAccess = func(_ context.Context, r *http.Request) (string, error) {
			token, err := access.BearerToken(r)
			if token == "tenant" {
				return "", &access.NodeError{User: token, Reason: "only the agents of nodes may make this call"}
			}
			if token == "nowhere" {
				return "", nil
			}
			return token, err
		}
		o.NodeDesired = func(ctx context.Context, node string, after uint64) (v1alpha1.Desired, error) {
			if after != math.MaxUint64 {
				<-ctx.Done()
				return v1alpha1.Desired{}, ctx.Err()
			}
			mu.Lock()
			asked = append(asked, node)
			mu.Unlock()
			return v1alpha1.Desired{Generation: 7, Functions: []v1alpha1.DesiredFunction{{Name: "of-" + node}}}, nil
		}
	})
	f.do("PUT", "/v1/functions/a?wait=0s", module(1), wasm).want(202)
	call := func(method, path, token, body string) (int, []byte) {
		t.Helper()
		req, _ := http.NewRequestWithContext(t.Context(), method, f.node+path, strings.NewReader(body))
		req.Header.Set("Content-Type", "application/json")
		if token != "" {
			req.Header.Set("Authorization", "Bearer "+token)
		}
		resp, err := f.client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = resp.Body.Close() }()
		data, _ := io.ReadAll(resp.Body)
		return resp.StatusCode, data
	}
	ready := `{"node":"%s","generation":9,"functions":[{"name":"a","revision":1,"progress":"ready","serving":1}]}`
	for _, c := range []struct {
		name, token, about string
		status             int
	}{
		{"no token", "", "node-a", 401},
		{"a tenant's token", "tenant", "node-a", 403},
		{"a token that names no node", "nowhere", "", 500},
		{"another node's token", "node-b", "node-a", 403},
		{"a report about no node", "node-b", "", 403},
	} {
		if status, body := call("POST", "/node/v1/report", c.token, fmt.Sprintf(ready, c.about)); status != c.status {
			t.Errorf("%s: %d %s", c.name, status, body)
		}
		if c.token == "node-b" {
			continue
		}
		if status, body := call("GET", "/node/v1/desired", c.token, ""); status != c.status || bytes.Contains(body, []byte("of-")) {
			t.Errorf("%s: %d %s", c.name, status, body)
		}
	}
	if v := f.do("GET", "/v1/functions/a", nil).want(200).function(); v.State != v1alpha1.StatePending {
		t.Errorf("a refused report changed something: %+v", v)
	}
	if status, body := call("POST", "/node/v1/report", "node-a", fmt.Sprintf(ready, "node-a")); status != 204 {
		t.Errorf("%d %s", status, body)
	}
	if v := f.do("GET", "/v1/functions/a", nil).want(200).function(); v.State != v1alpha1.StateReady {
		t.Errorf("%+v", v)
	}
	if status, body := call("GET", "/node/v1/desired?after=1&wait=10ms", "node-a", ""); status != 200 || !bytes.Contains(body, []byte("of-node-a")) {
		t.Errorf("%d %s", status, body)
	}
}

func TestOpenAPISaysWhereATokenIsNeeded(t *testing.T) {
	for _, secured := range []bool{false, true} {
		var doc struct {
			Paths      map[string]map[string]json.RawMessage
			Components struct{ SecuritySchemes map[string]any }
		}
		if err := json.Unmarshal(buildOpenAPI("test", secured), &doc); err != nil || doc.Components.SecuritySchemes["bearer"] == nil {
			t.Fatalf("%+v %v", doc.Components, err)
		}
		for path, item := range doc.Paths {
			for method, raw := range item {
				var op struct{ Security []map[string][]string }
				if method == "parameters" || json.Unmarshal(raw, &op) != nil {
					continue
				}
				if want := secured && strings.HasPrefix(path, "/v1/"); (len(op.Security) == 1) != want {
					t.Errorf("secured %t: %s %s has %v", secured, method, path, op.Security)
				}
			}
		}
	}
}

// problemsOfAccess makes every problem of this file happen, for the test that
// counts them.
func testProblemsOfAccess(t *testing.T) {
	f, k := twoTenants(t, quota(Quota{Functions: 1, Rate: 0.001, Burst: 2}))
	f.do("GET", "/v1/functions", nil).want(401).problem("unauthorized")
	f.do("GET", "/v1/functions", nil, k.as("alice")).want(403).problem("forbidden")
	f.do("PUT", "/v1/functions/a2?tenant=team-a", module(1), wasm, k.as("alice")).want(403).problem("quota-exceeded")
	f.do("DELETE", "/v1/functions/a1", nil, k.as("alice")).want(429).problem("too-many-changes")
	TestRateOfAllRequests(t)
	f.do("PATCH", "/v1/functions/b1", []byte(`{"host":"b.example.com"}`), mp, k.as("bob")).want(422).problem("runtime-unsupported")
	TestAccessThatCannotBeDecidedIsNotDenied(t)
	TestTroubleOfAClustersStore(t)
}
