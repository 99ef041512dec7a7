package submit

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime/multipart"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/function"
	"github.com/hearth-sh/hearth/test/needs"
)

func TestSubmitAnswersWhenReady(t *testing.T) {
	f := newFixture(t)
	f.runNode()
	a := f.put("hello", 1).want(201)
	v := a.function()
	if v.State != v1alpha1.StateReady || v.Revision != 1 || v.ActiveRevision != 1 || v.Digest != "sha256:"+hash(module(1)) ||
		v.URL != "http://hello.localhost:8080/" || v.Image != "functions/hello@"+v.Digest || v.Tenant != "default" {
		t.Fatalf("%s", a.body)
	}
	var names []string
	for _, p := range v.Phases {
		names = append(names, p.Name)
	}
	if got := strings.Join(names, " "); got != "receive check publish record compile" {
		t.Fatalf("phases %s", got)
	}
	if a.header.Get("Location") != "/v1/functions/hello" {
		t.Fatal("no location")
	}
	if v := f.put("hello", 1).want(200).function(); v.Revision != 1 {
		t.Fatal("the same module made a new revision")
	}
	if v := f.put("hello", 2).want(200).function(); v.Revision != 2 || v.State != v1alpha1.StateReady {
		t.Fatalf("%+v", v)
	}
	tag := f.do("GET", "/v1/functions/hello", nil).want(200).header.Get("ETag")
	if a := f.do("GET", "/v1/functions/hello", nil, "If-None-Match: "+tag).want(304); len(a.body) != 0 {
		t.Fatal("a body with 304")
	}
	f.do("HEAD", "/v1/functions/hello", nil).want(200)
	var l v1alpha1.RevisionList
	if err := json.Unmarshal(f.do("GET", "/v1/functions/hello/revisions", nil).want(200).body, &l); err != nil || len(l.Items) != 2 || !l.Items[0].Active || l.Items[0].SizeBytes == 0 {
		t.Fatalf("%+v %v", l, err)
	}
	if v := f.do("POST", "/v1/functions/hello/rollback", nil).want(200).function(); v.Revision != 1 || v.ActiveRevision != 1 {
		t.Fatalf("%+v", v)
	}
	if v := f.do("POST", "/v1/functions/hello/rollback", []byte(`{"revision":2}`), js).want(200).function(); v.Revision != 2 {
		t.Fatalf("%+v", v)
	}
	f.do("DELETE", "/v1/functions/hello", nil).want(204)
	f.do("GET", "/v1/functions/hello", nil).want(404).problem("function-not-found")
}

func TestSubmitThatDoesNotWait(t *testing.T) {
	f := newFixture(t)
	for i, a := range []answer{
		f.do("PUT", "/v1/functions/a?wait=0s", module(1), wasm),
		f.put("b", 1, "Prefer: handling=lenient, respond-async"),
		f.do("PUT", "/v1/functions/c?wait=10ms", module(1), wasm),
	} {
		if v := a.want(202).function(); v.State != v1alpha1.StatePending || a.header.Get("Location") == "" {
			t.Fatalf("%d: %s", i, a.body)
		}
	}
	f.do("PATCH", "/v1/functions/a?wait=0s", []byte(`{"env":{"A":"1"}}`), mp).want(202)
	f.do("POST", "/v1/functions/a/rollback?wait=0s", []byte(`{"revision":1}`), js).want(202)
}

func TestCloseEndsWaits(t *testing.T) {
	f := newFixture(t)
	time.AfterFunc(10*time.Millisecond, f.server.Close)
	f.put("hello", 1).want(202)
}

func TestFailedRevisionIsAProblemAndStaysRecorded(t *testing.T) {
	f := newFixture(t)
	f.set(func() {
		f.nodeFails = &v1alpha1.FunctionError{Code: "invalid-module", Detail: "section code, offset 7"}
	})
	f.runNode()
	p := f.put("hello", 1).want(422).problem("invalid-module")
	if !strings.Contains(p.Detail, "offset 7") {
		t.Fatal(p.Detail)
	}
	if v := f.do("GET", "/v1/functions/hello", nil).want(200).function(); v.State != v1alpha1.StateFailed || v.Error.Code != "invalid-module" {
		t.Fatalf("%+v", v)
	}
	f.set(func() { f.nodeFails = &v1alpha1.FunctionError{Code: "never-heard-of", Detail: "x"} })
	f.put("hello", 2).want(422).problem("revision-failed")
	f.set(func() { f.nodeFails = nil })
	if v := f.put("hello", 2).want(200).function(); v.Revision != 3 {
		t.Fatalf("%+v", v)
	}
}

func TestSettings(t *testing.T) {
	f := newFixture(t)
	f.runNode()
	multi := func(settings string, m []byte) ([]byte, string) {
		var b bytes.Buffer
		w := multipart.NewWriter(&b)
		if settings != "" {
			_ = w.WriteField("settings", settings)
		}
		if m != nil {
			p, _ := w.CreateFormFile("module", "m.wasm")
			_, _ = p.Write(m)
		}
		_ = w.Close()
		return b.Bytes(), "Content-Type: " + w.FormDataContentType()
	}
	body, ct := multi(`{"memoryMiB":64,"env":{"A":"1"},"secrets":{"TOKEN":"hunter2"}}`, module(1))
	v := f.do("PUT", "/v1/functions/hello", body, ct).want(201).function()
	if v.Settings.MemoryMiB != 64 || v.Settings.Env["A"] != "1" || len(v.Settings.SecretNames) != 1 || v.Settings.SecretNames[0] != "TOKEN" {
		t.Fatalf("%+v", v.Settings)
	}
	// A raw module keeps them, and may set the plain ones.
	v = f.do("PUT", "/v1/functions/hello?timeoutMs=500&concurrency=3", module(2), wasm).want(200).function()
	if v.Settings.MemoryMiB != 64 || v.Settings.TimeoutMS != 500 || v.Settings.Concurrency != 3 || len(v.Settings.SecretNames) != 1 {
		t.Fatalf("%+v", v.Settings)
	}
	digest := v.Digest
	v = f.do("PATCH", "/v1/functions/hello", []byte(`{"env":{"A":null,"B":"2"},"memoryMiB":null}`), mp).want(200).function()
	if v.Digest != digest || v.Settings.MemoryMiB != 128 || v.Settings.Env["B"] != "2" || v.Settings.Env["A"] != "" || v.Revision != 3 {
		t.Fatalf("%+v", v)
	}
	d, err := f.store.Desired(context.Background(), 0)
	if err != nil || d.Functions[0].Candidates[0].Secrets["TOKEN"] != "hunter2" {
		t.Fatalf("the node did not get the secret: %v", err)
	}
	f.set(func() { f.image = module(7) })
	v = f.do("PUT", "/v1/functions/img", []byte(`{"image":"r.example/a/b:1","settings":{"memoryMiB":2,"secrets":{"S":"hunter2"}}}`), js).want(201).function()
	if v.Image != "r.example/a/b@sha256:"+hash(module(7)) || v.Settings.MemoryMiB != 2 || v.Digest != "sha256:"+hash(module(7)) {
		t.Fatalf("%+v", v)
	}
	for _, path := range []string{"/v1/functions", "/v1/functions/hello", "/v1/functions/hello/revisions", "/v1/functions/img", "/metrics", "/readyz?verbose", "/"} {
		if a := f.do("GET", path, nil).want(200); bytes.Contains(a.body, []byte("hunter2")) {
			t.Errorf("%s shows a secret", path)
		}
	}
	if strings.Contains(f.log.String(), "hunter2") {
		t.Error("the log shows a secret")
	}
	for _, c := range []struct {
		name, settings string
		module         []byte
		code           string
	}{
		{"unknown member", `{"secret":{}}`, module(1), "malformed-request"},
		{"no module", `{}`, nil, "malformed-request"},
		{"out of limits", `{"memoryMiB":4096}`, module(1), "invalid-settings"},
		{"settings too long", `{"env":{"A":"` + strings.Repeat("x", maxJSONBytes) + `"}}`, module(1), "body-too-large"},
	} {
		body, ct := multi(c.settings, c.module)
		a := f.do("PUT", "/v1/functions/other", body, ct)
		a.problem(c.code)
	}
	f.do("PATCH", "/v1/functions/hello", []byte(`{"secrets":{"B":"x"}}`), mp).want(422).problem("invalid-settings")
	f.do("PUT", "/v1/functions/other", []byte("--x\r\nbroken"), "Content-Type: multipart/form-data; boundary=x").want(400).problem("malformed-request")
	f.do("GET", "/v1/functions/other", nil).want(404)
}

func TestMemoryLimitBelowTheModulesMinimum(t *testing.T) {
	f := newFixture(t)
	f.runNode()
	f.set(func() { f.pages = 16 * 10 })
	f.do("PUT", "/v1/functions/hello?memoryMiB=9", module(1), wasm).want(422).problem("memory-over-limit")
	f.do("PUT", "/v1/functions/hello?memoryMiB=10", module(1), wasm).want(201)
	f.do("PATCH", "/v1/functions/hello", []byte(`{"memoryMiB":9}`), mp).want(422).problem("memory-over-limit")
	if v := f.do("GET", "/v1/functions/hello", nil).function(); v.Revision != 1 {
		t.Fatal("something was recorded")
	}
}

func TestEveryProblemHappensAndChangesNothing(t *testing.T) {
	f := newFixture(t, func(o *Options) {
		o.Limits = Limits{ModuleBytes: 4096, Submits: 1, Admission: 10 * time.Millisecond, Stall: 100 * time.Millisecond}
	})
	f.runNode()
	f.put("taken", 1).want(201)
	before := f.do("GET", "/v1/functions", nil).body

	check := func(code string, retryable bool) func() {
		return func() { f.checkErr = &CheckError{Code: code, Detail: "Because.", Retryable: retryable} }
	}
	publish := func(code string) func() {
		return func() {
			f.pubErr = &PublishError{Code: code, Detail: "Because.", Retryable: code == "registry-unavailable"}
		}
	}
	image := []byte(`{"image":"r.example/a:1"}`)
	for _, c := range []struct {
		name               string
		with               func()
		method, path       string
		body               []byte
		headers            []string
		status             int
		code               string
		retryable, retryIn bool
	}{
		{name: "unknown path", path: "/v2/x", status: 404, code: "not-found"},
		{name: "name with a slash", path: "/v1/functions/a/b", status: 404, code: "not-found"},
		{name: "method", method: "POST", path: "/v1/functions/hello", status: 405, code: "method-not-allowed"},
		{name: "method on the list", method: "DELETE", path: "/v1/functions", status: 405, code: "method-not-allowed"},
		{name: "unknown parameter", path: "/v1/functions?x=1", status: 400, code: "unknown-parameter"},
		{name: "parameter twice", path: "/v1/functions?limit=1&limit=2", status: 400, code: "invalid-parameter"},
		{name: "limit", path: "/v1/functions?limit=0", status: 400, code: "invalid-parameter"},
		{name: "continue", path: "/v1/functions?continue=%21", status: 400, code: "invalid-parameter"},
		{name: "list of a bad tenant", path: "/v1/functions?tenant=A", status: 400, code: "invalid-name"},
		{name: "get a bad name", path: "/v1/functions/A", status: 400, code: "invalid-name"},
		{name: "get nothing", path: "/v1/functions/nothing", status: 404, code: "function-not-found"},
		{name: "revisions of nothing", path: "/v1/functions/nothing/revisions", status: 404, code: "function-not-found"},
		{name: "logs of nothing", path: "/v1/functions/nothing/logs", status: 404, code: "function-not-found"},
		{name: "logs tail", path: "/v1/functions/taken/logs?tail=-1", status: 400, code: "invalid-parameter"},
		{name: "logs follow", path: "/v1/functions/taken/logs?follow=yes", status: 400, code: "invalid-parameter"},
		{name: "logs since", path: "/v1/functions/taken/logs?since=yesterday", status: 400, code: "invalid-parameter"},
		{name: "no logs", with: func() { f.logErr = errors.New("gone") }, path: "/v1/functions/taken/logs", status: 503, code: "logs-unavailable", retryable: true, retryIn: true},
		{name: "bad name", method: "PUT", path: "/v1/functions/xn--a", status: 400, code: "invalid-name", headers: []string{wasm}},
		{name: "bad tenant", method: "PUT", path: "/v1/functions/a?tenant=-", status: 400, code: "invalid-name", headers: []string{wasm}},
		{name: "wait", method: "PUT", path: "/v1/functions/a?wait=301s", status: 400, code: "invalid-parameter", headers: []string{wasm}},
		{name: "memory in the query", method: "PUT", path: "/v1/functions/a?memoryMiB=x", status: 400, code: "invalid-parameter", headers: []string{wasm}},
		{name: "memory over the API's limit", method: "PUT", path: "/v1/functions/a?memoryMiB=4096", body: module(1), status: 422, code: "invalid-settings", headers: []string{wasm}},
		{name: "settings twice", method: "PUT", path: "/v1/functions/a?memoryMiB=1", body: image, status: 400, code: "unknown-parameter", headers: []string{js}},
		{name: "no content type", method: "PUT", path: "/v1/functions/a", status: 415, code: "unsupported-media-type"},
		{name: "other content type", method: "PUT", path: "/v1/functions/a", status: 415, code: "unsupported-media-type", headers: []string{"Content-Type: text/plain"}},
		{name: "patch as json", method: "PATCH", path: "/v1/functions/taken", status: 415, code: "unsupported-media-type", headers: []string{js}},
		{name: "too large", method: "PUT", path: "/v1/functions/a", body: make([]byte, 4097), status: 413, code: "module-too-large", headers: []string{wasm}},
		{name: "json too large", method: "PATCH", path: "/v1/functions/taken", body: make([]byte, maxJSONBytes+1), status: 413, code: "body-too-large", headers: []string{mp}},
		{name: "not wasm", method: "PUT", path: "/v1/functions/a", body: []byte("#!/bin/sh"), status: 415, code: "not-wasm", headers: []string{wasm}},
		{name: "empty", method: "PUT", path: "/v1/functions/a", status: 415, code: "not-wasm", headers: []string{wasm}},
		{name: "json", method: "PUT", path: "/v1/functions/a", body: []byte(`{"image":`), status: 400, code: "malformed-request", headers: []string{js}},
		{name: "json member", method: "PUT", path: "/v1/functions/a", body: []byte(`{"image":"a","x":1}`), status: 400, code: "malformed-request", headers: []string{js}},
		{name: "no image", method: "PUT", path: "/v1/functions/a", body: []byte(`{"image":" "}`), status: 400, code: "malformed-request", headers: []string{js}},
		{name: "patch of nothing", method: "PATCH", path: "/v1/functions/nothing", body: []byte(`{}`), status: 404, code: "function-not-found", headers: []string{mp}},
		{name: "patch with garbage", method: "PATCH", path: "/v1/functions/taken", body: []byte(`[]`), status: 400, code: "malformed-request", headers: []string{mp}},
		{name: "delete nothing", method: "DELETE", path: "/v1/functions/nothing", status: 404, code: "function-not-found"},
		{name: "roll back with nothing before", method: "POST", path: "/v1/functions/taken/rollback", status: 409, code: "no-rollback-target"},
		{name: "roll back to nothing", method: "POST", path: "/v1/functions/taken/rollback", body: []byte(`{"revision":9}`), status: 404, code: "revision-not-found", headers: []string{js}},
		{name: "roll back to zero", method: "POST", path: "/v1/functions/taken/rollback", body: []byte(`{"revision":0}`), status: 400, code: "malformed-request", headers: []string{js}},
		{name: "other tenant", method: "PUT", path: "/v1/functions/taken?tenant=bob", body: module(2), status: 409, code: "name-taken", headers: []string{wasm}},
		{name: "exists", method: "PUT", path: "/v1/functions/taken", body: module(2), status: 412, code: "precondition-failed", headers: []string{wasm, "If-None-Match: *"}},
		{name: "does not exist", method: "PUT", path: "/v1/functions/a", body: module(2), status: 412, code: "precondition-failed", headers: []string{wasm, "If-Match: *"}},
		{name: "was changed", method: "PUT", path: "/v1/functions/taken", body: module(2), status: 412, code: "precondition-failed", headers: []string{wasm, `If-Match: "x"`}},
		{name: "delete what was changed", method: "DELETE", path: "/v1/functions/taken", status: 412, code: "precondition-failed", headers: []string{`If-Match: "x", "y"`}},
		{name: "malformed tag", method: "DELETE", path: "/v1/functions/taken", status: 400, code: "invalid-parameter", headers: []string{`If-Match: x`}},
		{name: "key with a space", method: "DELETE", path: "/v1/functions/taken", status: 400, code: "invalid-idempotency-key", headers: []string{"Idempotency-Key: a b"}},
		{name: "key too long", method: "DELETE", path: "/v1/functions/taken", status: 400, code: "invalid-idempotency-key", headers: []string{"Idempotency-Key: " + strings.Repeat("k", 256)}},
		{name: "two keys", method: "DELETE", path: "/v1/functions/taken", status: 400, code: "invalid-idempotency-key", headers: []string{"Idempotency-Key: a", "Idempotency-Key: b"}},
		{name: "another site", method: "DELETE", path: "/v1/functions/taken", status: 403, code: "cross-origin", headers: []string{"Sec-Fetch-Site: cross-site"}},
		{name: "another origin", method: "PUT", path: "/v1/functions/a", status: 403, code: "cross-origin", headers: []string{wasm, "Origin: http://evil.localhost:8080"}},

		{name: "component", with: check("component-unsupported", false), method: "PUT", path: "/v1/functions/a", body: module(1), status: 422, code: "component-unsupported", headers: []string{wasm}},
		{name: "native", with: check("native-artifact", false), method: "PUT", path: "/v1/functions/a", body: module(1), status: 422, code: "native-artifact", headers: []string{wasm}},
		{name: "checker says too large", with: check("module-too-large", false), method: "PUT", path: "/v1/functions/a", body: module(1), status: 413, code: "module-too-large", headers: []string{wasm}},
		{name: "malformed", with: check("malformed-module", false), method: "PUT", path: "/v1/functions/a", body: module(1), status: 422, code: "malformed-module", headers: []string{wasm}},
		{name: "invalid", with: check("invalid-module", false), method: "PUT", path: "/v1/functions/a", body: module(1), status: 422, code: "invalid-module", headers: []string{wasm}},
		{name: "import", with: check("unsupported-import", false), method: "PUT", path: "/v1/functions/a", body: module(1), status: 422, code: "unsupported-import", headers: []string{wasm}},
		{name: "memory", with: check("memory-over-limit", false), method: "PUT", path: "/v1/functions/a", body: module(1), status: 422, code: "memory-over-limit", headers: []string{wasm}},
		{name: "limit of the module", with: check("limit-exceeded", false), method: "PUT", path: "/v1/functions/a", body: module(1), status: 422, code: "limit-exceeded", headers: []string{wasm}},
		{name: "no start", with: check("no-start-function", false), method: "PUT", path: "/v1/functions/a", body: module(1), status: 422, code: "no-start-function", headers: []string{wasm}},
		{name: "feature", with: check("unsupported-feature", false), method: "PUT", path: "/v1/functions/a", body: module(1), status: 422, code: "unsupported-feature", headers: []string{wasm}},
		{name: "bomb in time", with: check("compile-timeout", false), method: "PUT", path: "/v1/functions/a", body: module(1), status: 422, code: "compile-timeout", headers: []string{wasm}},
		{name: "bomb in memory", with: check("compile-memory", false), method: "PUT", path: "/v1/functions/a", body: module(1), status: 422, code: "compile-memory", headers: []string{wasm}},
		{name: "crash", with: check("compiler-crashed", false), method: "PUT", path: "/v1/functions/a", body: module(1), status: 422, code: "compiler-crashed", headers: []string{wasm}},
		{name: "killed for want of memory", with: check("compiler-crashed", true), method: "PUT", path: "/v1/functions/a", body: module(1), status: 503, code: "compiler-unavailable", headers: []string{wasm}, retryable: true, retryIn: true},
		{name: "checker has no disk", with: check("disk-full", true), method: "PUT", path: "/v1/functions/a", body: module(1), status: 507, code: "disk-full", headers: []string{wasm}, retryable: true, retryIn: true},
		{name: "unknown code", with: check("what", false), method: "PUT", path: "/v1/functions/a", body: module(1), status: 500, code: "internal", headers: []string{wasm}, retryable: true},
		{name: "bare error", with: func() { f.checkErr = errors.New("boom") }, method: "PUT", path: "/v1/functions/a", body: module(1), status: 500, code: "internal", headers: []string{wasm}, retryable: true},
		{name: "disk full while publishing", with: func() { f.pubErr = fmt.Errorf("write: %w", syscall.ENOSPC) }, method: "PUT", path: "/v1/functions/a", body: module(1), status: 507, code: "disk-full", headers: []string{wasm}, retryable: true, retryIn: true},
		{name: "registry down", with: publish("registry-unavailable"), method: "PUT", path: "/v1/functions/a", body: module(1), status: 503, code: "registry-unavailable", headers: []string{wasm}, retryable: true, retryIn: true},
		{name: "registry refuses", with: publish("registry-refused"), method: "PUT", path: "/v1/functions/a", body: module(1), status: 502, code: "registry-refused", headers: []string{wasm}},
		{name: "registry lies", with: publish("digest-mismatch"), method: "PUT", path: "/v1/functions/a", body: image, status: 502, code: "digest-mismatch", headers: []string{js}, retryable: true},
		{name: "no such image", with: publish("image-not-found"), method: "PUT", path: "/v1/functions/a", body: image, status: 422, code: "image-not-found", headers: []string{js}},
		{name: "not that kind of image", with: publish("image-invalid"), method: "PUT", path: "/v1/functions/a", body: image, status: 422, code: "image-invalid", headers: []string{js}},
		{name: "not our image", with: publish("registry-unauthorized"), method: "PUT", path: "/v1/functions/a", body: image, status: 422, code: "registry-unauthorized", headers: []string{js}},
		{name: "image too large", with: func() { f.image = append(module(1), make([]byte, 5000)...) }, method: "PUT", path: "/v1/functions/a", body: image, status: 413, code: "module-too-large", headers: []string{js}},
		{name: "not ready", with: func() { f.health = []Check{{Name: "registry", Message: "down"}} }, path: "/readyz", status: 503, code: "not-ready", retryable: true, retryIn: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			f.t = t
			if c.with != nil {
				f.set(c.with)
			}
			defer f.set(func() { f.checkErr, f.pubErr, f.logErr, f.health, f.image = nil, nil, nil, nil, nil })
			method := c.method
			if method == "" {
				method = "GET"
			}
			a := f.do(method, c.path, c.body, c.headers...).want(c.status)
			p := a.problem(c.code)
			if p.Retryable != c.retryable {
				t.Errorf("retryable is %t", p.Retryable)
			}
			if (a.header.Get("Retry-After") != "") != c.retryIn {
				t.Errorf("Retry-After is %q", a.header.Get("Retry-After"))
			}
			if c.status == 405 && a.header.Get("Allow") == "" {
				t.Error("no Allow")
			}
		})
	}
	f.t = t
	if after := f.do("GET", "/v1/functions", nil).body; !bytes.Equal(before, after) {
		t.Fatalf("something changed:\n%s\n%s", before, after)
	}

	t.Run("too many submits", func(t *testing.T) {
		f.t = t
		entered, leave := make(chan struct{}), make(chan struct{})
		f.set(func() {
			f.checking = func(context.Context) error {
				close(entered)
				<-leave
				return nil
			}
		})
		first := make(chan answer, 1)
		go func() { first <- f.put("one", 1) }()
		<-entered
		a := f.put("two", 1).want(429)
		if p := a.problem("too-many-submits"); !p.Retryable || a.header.Get("Retry-After") == "" {
			t.Error("not retryable")
		}
		f.set(func() { f.checking = nil })
		close(leave)
		(<-first).want(201)
	})
	t.Run("keys", func(t *testing.T) {
		f.t = t
		const key = `Idempotency-Key: "k1"`
		entered, leave := make(chan struct{}), make(chan struct{})
		f.set(func() {
			f.checking = func(context.Context) error {
				close(entered)
				<-leave
				return nil
			}
		})
		first := make(chan answer, 1)
		go func() { first <- f.put("keyed", 1, key) }()
		<-entered
		if p := f.put("keyed", 1, key).want(409).problem("request-in-flight"); !p.Retryable {
			t.Error("not retryable")
		}
		f.set(func() { f.checking = nil })
		close(leave)
		a := (<-first).want(201)
		again := f.put("keyed", 1, "Idempotency-Key: k1").want(201)
		if !bytes.Equal(a.body, again.body) || again.header.Get("Idempotency-Replayed") != "true" || again.header.Get("ETag") != a.header.Get("ETag") {
			t.Errorf("replay differs: %s\n%s", a.body, again.body)
		}
		f.put("keyed", 2, key).want(422).problem("idempotency-mismatch")
		f.do("DELETE", "/v1/functions/keyed", nil, "Idempotency-Key: k2").want(204)
		if f.do("DELETE", "/v1/functions/keyed", nil, "Idempotency-Key: k2").want(204).header.Get("Idempotency-Replayed") != "true" {
			t.Error("not replayed")
		}
		f.put("keyed", 1, key).want(201) // still the replay
		f.do("GET", "/v1/functions/keyed", nil).want(404)
	})
	t.Run("stalled body", func(t *testing.T) {
		f.t = t
		conn := dial(t, f.url)
		fmt.Fprintf(conn, "PUT /v1/functions/slow HTTP/1.1\r\nHost: x\r\nContent-Type: application/wasm\r\nContent-Length: 1000\r\n\r\n\x00asm")
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = resp.Body.Close() }()
		body, _ := io.ReadAll(resp.Body)
		a := answer{t, resp.StatusCode, resp.Header, body}
		documented.check(t, "PUT", "/v1/functions/slow", a)
		a.want(408).problem("body-stalled")
		f.do("GET", "/v1/functions/slow", nil).want(404)
	})
	t.Run("refused while the body stalls", func(t *testing.T) {
		conn := dial(t, f.url)
		fmt.Fprint(conn, "PUT /v1/functions/slow HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\nContent-Length: 1000\r\n\r\nx")
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = resp.Body.Close() }()
		if resp.StatusCode != 415 {
			t.Fatal(resp.Status)
		}
	})
	t.Run("too large without a length", func(t *testing.T) {
		f.t = t
		conn := dial(t, f.url)
		fmt.Fprintf(conn, "PUT /v1/functions/big HTTP/1.1\r\nHost: x\r\nContent-Type: application/wasm\r\nTransfer-Encoding: chunked\r\n\r\n1001\r\n%s", strings.Repeat("x", 0x1001))
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = resp.Body.Close() }()
		if resp.StatusCode != 413 {
			t.Fatal(resp.Status)
		}
	})
	t.Run("closed store", func(t *testing.T) {
		g := newFixture(t)
		_ = g.store.Close()
		g.do("GET", "/v1/functions", nil).want(503).problem("store-unavailable")
		g.do("GET", "/readyz", nil).want(503).problem("not-ready")
		g.do("GET", "/livez", nil).want(200)
	})
	t.Run("no progress", func(t *testing.T) {
		g := newFixture(t, func(o *Options) { o.Live = func(context.Context) error { return errors.New("stuck") } })
		g.do("GET", "/livez", nil).want(503).problem("not-ready")
	})

	t.Run("access", testProblemsOfAccess)

	documented.mu.Lock()
	defer documented.mu.Unlock()
	elsewhere := []string{"revision-failed"} // of a node: see the test of failed revisions
	for _, k := range Problems() {
		if !documented.seen["problem "+k.Code] && k.Code != elsewhere[0] {
			t.Errorf("problem %s was never answered", k.Code)
		}
	}
}

func dial(t *testing.T, rawURL string) net.Conn {
	t.Helper()
	u, err := url.Parse(rawURL)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("tcp", u.Host)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(testWait))
	return conn
}

func TestSlowButSteadyBodyIsReceived(t *testing.T) {
	f := newFixture(t, func(o *Options) { o.Limits.Stall = 300 * time.Millisecond })
	f.runNode()
	conn := dial(t, f.url)
	body := module(1)
	fmt.Fprintf(conn, "PUT /v1/functions/slow HTTP/1.1\r\nHost: x\r\nContent-Type: application/wasm\r\nContent-Length: %d\r\n\r\n", len(body))
	for _, b := range body {
		time.Sleep(20 * time.Millisecond) // in all longer than one stall
		if _, err := conn.Write([]byte{b}); err != nil {
			t.Fatal(err)
		}
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil || resp.StatusCode != 201 {
		t.Fatalf("%v %v", resp, err)
	}
	_ = resp.Body.Close()
}

// The read deadline of the body must not end the wait that follows it.
func TestWaitOutlivesTheBodysDeadline(t *testing.T) {
	f := newFixture(t, func(o *Options) { o.Limits.Stall = 50 * time.Millisecond })
	f.do("PUT", "/v1/functions/hello?wait=300ms", module(1), wasm).want(202)
}

func TestClientThatLeavesBeforeTheRecordLeavesNothing(t *testing.T) {
	for _, keyed := range []bool{false, true} {
		f := newFixture(t)
		entered := make(chan struct{})
		left := make(chan struct{})
		f.set(func() {
			f.checking = func(ctx context.Context) error {
				close(entered)
				<-ctx.Done() // the check is told
				close(left)
				return ctx.Err()
			}
		})
		ctx, cancel := context.WithCancel(context.Background())
		req, _ := http.NewRequestWithContext(ctx, "PUT", f.url+"/v1/functions/hello", bytes.NewReader(module(1)))
		req.Header.Set("Content-Type", "application/wasm")
		if keyed {
			req.Header.Set("Idempotency-Key", "k")
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			if resp, err := f.client.Do(req); err == nil {
				_ = resp.Body.Close()
				t.Error("answered")
			}
		}()
		<-entered
		cancel()
		<-left
		<-done
		f.set(func() { f.checking = nil })
		f.do("GET", "/v1/functions/hello", nil).want(404)
		waitFor(t, func() bool { return strings.Contains(f.log.String(), "status=499") })
		// And the same request can be made anew.
		f.runNode()
		headers := []string{}
		if keyed {
			headers = append(headers, "Idempotency-Key: k")
		}
		f.put("hello", 1, headers...).want(201)
	}
}

func TestClientThatLeavesWhileWaitingCanResume(t *testing.T) {
	f := newFixture(t)
	ctx, cancel := context.WithCancel(context.Background())
	req, _ := http.NewRequestWithContext(ctx, "PUT", f.url+"/v1/functions/hello", bytes.NewReader(module(1)))
	req.Header.Set("Content-Type", "application/wasm")
	req.Header.Set("Idempotency-Key", "k")
	done := make(chan struct{})
	go func() {
		defer close(done)
		if resp, err := f.client.Do(req); err == nil {
			_ = resp.Body.Close()
			t.Error("answered")
		}
	}()
	waitFor(t, func() bool { _, err := f.store.Get(context.Background(), "hello"); return err == nil })
	cancel()
	<-done
	waitFor(t, func() bool { return strings.Contains(f.log.String(), "status=499") })
	f.runNode()
	if v := f.put("hello", 1, "Idempotency-Key: k").want(201).function(); v.Revision != 1 || v.State != v1alpha1.StateReady {
		t.Fatalf("%+v", v)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.checks != 1 {
		t.Fatalf("checked %d times", f.checks)
	}
}

func waitFor(t *testing.T, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(testWait); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it did not happen")
		}
	}
}

func TestConcurrentPatchesLoseNothing(t *testing.T) {
	f := newFixture(t)
	f.do("PUT", "/v1/functions/hello?wait=0s", module(1), wasm).want(202)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			f.do("PATCH", "/v1/functions/hello?wait=0s", fmt.Appendf(nil, `{"env":{"V%d":"1"}}`, i), mp).want(202)
		})
	}
	for i := range 4 {
		wg.Go(func() { f.do("PUT", "/v1/functions/hello?wait=0s", module(10+i), wasm).want(202) })
	}
	wg.Wait()
	v := f.do("GET", "/v1/functions/hello", nil).want(200).function()
	if len(v.Settings.Env) != 8 || v.Revision != 13 {
		t.Fatalf("revision %d, env %v", v.Revision, v.Settings.Env)
	}
}

func TestListPages(t *testing.T) {
	f := newFixture(t)
	for i := range 5 {
		f.do("PUT", fmt.Sprintf("/v1/functions/f%d?wait=0s&tenant=t%d", i, i%2), module(1), wasm).want(202)
	}
	var names []string
	path := "/v1/functions?limit=2"
	for range 3 {
		var l v1alpha1.FunctionList
		if err := json.Unmarshal(f.do("GET", path, nil).want(200).body, &l); err != nil {
			t.Fatal(err)
		}
		for _, i := range l.Items {
			names = append(names, i.Name)
		}
		path = "/v1/functions?limit=2&continue=" + l.Continue
		if l.Continue == "" {
			break
		}
	}
	if got := strings.Join(names, " "); got != "f0 f1 f2 f3 f4" {
		t.Fatal(got)
	}
	var l v1alpha1.FunctionList
	if err := json.Unmarshal(f.do("GET", "/v1/functions?tenant=t1", nil).want(200).body, &l); err != nil || len(l.Items) != 2 || l.Items[0].Tenant != "t1" {
		t.Fatalf("%+v %v", l, err)
	}
}

func TestLogs(t *testing.T) {
	f := newFixture(t)
	f.do("PUT", "/v1/functions/hello?wait=0s", module(1), wasm).want(202)
	line := `{"time":"2026-01-02T03:04:05Z","function":"hello","revision":1,"stream":"stderr","line":"hi"}` + "\n"
	f.set(func() { f.logLines = line + line })
	a := f.do("GET", "/v1/functions/hello/logs?tail=2&since=10m", nil).want(200)
	if string(a.body) != line+line || a.header.Get("Content-Type") != "application/x-ndjson" {
		t.Fatalf("%s", a.body)
	}
	// Following: lines arrive while the answer goes on, and leaving ends it.
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	req, _ := http.NewRequestWithContext(ctx, "GET", f.url+"/v1/functions/hello/logs?follow=true&since=2026-01-01T00:00:00Z", nil)
	resp, err := f.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	if got, err := bufio.NewReader(resp.Body).ReadString('\n'); err != nil || got != line {
		t.Fatalf("%q %v", got, err)
	}
	f.server.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		t.Fatalf("closing the server cuts the log: %v", err)
	}
}

func TestProbesMetricsAndFrontPage(t *testing.T) {
	f := newFixture(t)
	f.runNode()
	f.put("hello", 1).want(201)
	f.put("bad", 1, "If-Match: *").want(412)
	f.do("GET", "/livez", nil).want(200)
	f.do("GET", "/livez?verbose", nil).want(200)
	f.do("GET", "/readyz", nil).want(200)
	f.set(func() { f.health = []Check{{Name: "engine", Message: "not started"}, {Name: "agent", OK: true}} })
	a := f.do("GET", "/readyz?verbose=1", nil).want(503)
	var r readiness
	if err := json.Unmarshal(a.body, &r); err != nil || r.Ready || len(r.Checks) != 3 || !r.Checks[0].OK {
		t.Fatalf("%s", a.body)
	}
	text := string(f.do("GET", "/metrics", nil).want(200).body)
	for _, want := range []string{
		`hearth_submits_total{outcome="ready"} 1`, `hearth_submits_total{outcome="rejected"} 1`,
		`hearth_functions{state="ready"} 1`, `hearth_submit_phase_duration_seconds_count{phase="record"} 1`,
		`hearth_submit_phase_duration_seconds_count{phase="ready"} 1`,
		`hearth_api_requests_total{code="201",method="PUT",route="/v1/functions/{name}"} 1`,
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %s in\n%s", want, text)
		}
	}
	families, err := f.reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	if problems, err := promlint.NewWithMetricFamilies(families).Lint(); err != nil || len(problems) > 0 {
		t.Errorf("%v %v", problems, err)
	}
	if front := string(f.do("GET", "/", nil).want(200).body); !strings.Contains(front, "http://127.0.0.1:8080/v1/functions/hello") {
		t.Error(front)
	}
}

func TestNodeSide(t *testing.T) {
	f := newFixture(t)
	f.do("PUT", "/v1/functions/hello?wait=0s", module(1), wasm).want(202)
	get := func(path string) v1alpha1.Desired {
		t.Helper()
		resp, err := f.client.Get(f.node + path)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = resp.Body.Close() }()
		var d v1alpha1.Desired
		if err := json.NewDecoder(resp.Body).Decode(&d); err != nil || resp.StatusCode != 200 {
			t.Fatal(resp.Status, err)
		}
		return d
	}
	d := get("/node/v1/desired")
	if len(d.Functions) != 1 {
		t.Fatalf("%+v", d)
	}
	// The wait ends without news: the same snapshot.
	if same := get(fmt.Sprintf("/node/v1/desired?after=%d&wait=10ms", d.Generation)); same.Generation != d.Generation || len(same.Functions) != 1 {
		t.Fatalf("%+v", same)
	}
	for _, c := range []struct {
		method, path, body string
		status             int
	}{
		{"GET", "/node/v1/desired?after=-1", "", 400},
		{"GET", "/node/v1/desired?wait=61s", "", 400},
		{"POST", "/node/v1/report", "{", 400},
		{"POST", "/node/v1/report", `{"node":"n","generation":1,"functions":[],"new":1}`, 204},
		{"GET", "/node/v1/report", "", 405},
		{"GET", "/v1/functions", "", 404},
	} {
		req, _ := http.NewRequest(c.method, f.node+c.path, strings.NewReader(c.body))
		req.Header.Set("Content-Type", "application/json")
		resp, err := f.client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if resp.StatusCode != c.status {
			t.Errorf("%s %s: %s", c.method, c.path, resp.Status)
		}
	}
	f.do("GET", "/node/v1/desired", nil).want(404).problem("not-found")
}

func TestNewClearsItsLeftoversOnly(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"module-1.part", "precious.txt"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := clearTemp(dir); err != nil {
		t.Fatal(err)
	}
	left, _ := os.ReadDir(dir)
	if len(left) != 1 || left[0].Name() != "precious.txt" {
		t.Fatalf("%v", left)
	}
}

func TestFullDiskWhileReceiving(t *testing.T) {
	dir := t.TempDir()
	needs.Tmpfs(t, dir, "size=64k")
	f := newFixture(t, func(o *Options) { o.TempDir = filepath.Join(dir, "tmp") })
	f.temp = filepath.Join(dir, "tmp")
	f.runNode()
	big := append(module(1), make([]byte, 200_000)...)
	f.do("PUT", "/v1/functions/hello", big, wasm).want(507).problem("disk-full")
	f.do("GET", "/v1/functions/hello", nil).want(404)
	f.put("hello", 1).want(201)
}

func TestDocumentedAndRegisteredAreTheSame(t *testing.T) {
	doc := documented.load(t)
	n := 0
	for path, item := range doc.Paths.Map() {
		for method := range item.Operations() {
			n++
			if _, ok := operationDocs[method+" "+path]; !ok {
				t.Errorf("%s %s is described nowhere", method, path)
			}
		}
	}
	if n != len(publicOperations) || n != len(operationDocs) {
		t.Errorf("%d documented, %d registered, %d described", n, len(publicOperations), len(operationDocs))
	}
	for _, op := range publicOperations {
		d := operationDocs[op.method+" "+op.path]
		if d.id == "" || d.summary == "" || len(d.answers) == 0 {
			t.Errorf("%s %s is not described", op.method, op.path)
		}
		for _, q := range op.query {
			if parameterDocs[q] == nil {
				t.Errorf("parameter %s is not described", q)
			}
		}
		for _, code := range d.problems {
			if _, ok := problemByCode[code]; !ok {
				t.Errorf("%s %s: no problem %s", op.method, op.path, code)
			}
		}
	}
}

func TestEverySuccessIsAnsweredAsDocumented(t *testing.T) {
	f := newFixture(t)
	f.runNode()
	f.put("hello", 1).want(201)
	tag := f.put("hello", 2).want(200).header.Get("ETag")
	f.do("PUT", "/v1/functions/other?wait=0s", module(1), wasm) // 201 where the node is quick; g below has none
	f.do("GET", "/v1/functions", nil).want(200)
	f.do("GET", "/v1/functions/hello", nil).want(200)
	f.do("GET", "/v1/functions/hello", nil, "If-None-Match: W/"+tag).want(304)
	f.do("PATCH", "/v1/functions/hello", []byte(`{"timeoutMs":77}`), mp).want(200)
	f.do("PATCH", "/v1/functions/hello?wait=0s", []byte(`{"timeoutMs":78}`), mp)
	f.do("GET", "/v1/functions/hello/revisions", nil).want(200)
	f.do("POST", "/v1/functions/hello/rollback", nil).want(200)
	f.do("POST", "/v1/functions/hello/rollback?wait=0s", []byte(`{"revision":2}`), js)
	f.do("GET", "/v1/functions/hello/logs", nil).want(200)
	for _, path := range []string{"/openapi.json", "/livez", "/readyz", "/metrics", "/"} {
		f.do("GET", path, nil).want(200)
	}
	f.do("DELETE", "/v1/functions/hello", nil).want(204)
	g := newFixture(t) // without a node
	g.do("PUT", "/v1/functions/hello?wait=0s", module(1), wasm).want(202)
	g.do("PATCH", "/v1/functions/hello?wait=0s", []byte(`{"timeoutMs":78}`), mp).want(202)
	g.do("POST", "/v1/functions/hello/rollback?wait=0s", []byte(`{"revision":1}`), js).want(202)
	documented.mu.Lock()
	defer documented.mu.Unlock()
	for op, d := range operationDocs {
		for status := range d.answers {
			if !documented.seen[fmt.Sprintf("%s %d", op, status)] {
				t.Errorf("%s never answered %d", op, status)
			}
		}
	}
}

func FuzzMultipart(f *testing.F) {
	f.Add([]byte("--x\r\nContent-Disposition: form-data; name=\"settings\"\r\n\r\n{}\r\n--x\r\nContent-Disposition: form-data; name=\"module\"\r\n\r\n\x00asm\r\n--x--\r\n"))
	f.Add([]byte("--x\r\nContent-Disposition: form-data; name=\"module\"\r\n\r\n"))
	f.Add([]byte("--x--\r\n"))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, data []byte) {
		s := &Server{o: Options{TempDir: dir, Limits: Limits{ModuleBytes: 1000}}}
		b := &submission{}
		_, err := s.receiveParts(b, multipart.NewReader(bytes.NewReader(data), "x"))
		if err == nil && (b.path == "" || b.digest == "" || b.size > 1000) {
			t.Fatalf("accepted %q", data)
		}
		b.remove()
		if left, _ := os.ReadDir(dir); len(left) > 0 {
			t.Fatal("left a file")
		}
	})
}

func FuzzHeaders(f *testing.F) {
	for _, s := range []string{`"k"`, "k", `"a", W/"b"`, "*", `""`, `"`, "a b", "\x7f"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, v string) {
		r := &http.Request{Header: http.Header{"Idempotency-Key": {v}, "If-Match": {v}}}
		if key, err := idempotencyKey(r); err == nil && (key == "" || len(key) > 255 || strings.ContainsAny(key, "\" \n\x00")) {
			t.Fatalf("key %q from %q", key, v)
		}
		tags, err := entityTags(r, "If-Match")
		if err == nil {
			for _, tag := range tags {
				if tag != "*" && !strings.HasSuffix(tag, `"`) {
					t.Fatalf("tag %q from %q", tag, v)
				}
			}
		}
	})
}

func FuzzImageSubmission(f *testing.F) {
	f.Add([]byte(`{"image":"r.example/a@sha256:00","settings":{"env":null}}`))
	f.Add([]byte(`{"image":1}`))
	f.Add([]byte(`{}{}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var doc struct {
			Image    string          `json:"image"`
			Settings json.RawMessage `json:"settings"`
		}
		var p *problem
		if err := strictJSON(data, &doc); err != nil && !errors.As(err, &p) {
			t.Fatalf("untyped error %v", err)
		}
	})
}

func BenchmarkGet(b *testing.B) {
	f := newFixture(b, func(o *Options) { o.Logger = nil })
	for i := range 1000 {
		_, err := f.store.AddRevision(context.Background(), fmt.Sprintf("f%d", i), function.Change{}, func(*function.Function) (function.NewRevision, error) {
			return function.NewRevision{ModuleDigest: "sha256:0", Settings: function.DefaultSettings()}, nil
		})
		if err != nil {
			b.Fatal(err)
		}
	}
	for b.Loop() {
		resp, err := f.client.Get(f.url + "/v1/functions/f500")
		if err != nil {
			b.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		_ = resp.Body.Close()
	}
}
