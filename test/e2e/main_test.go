// Package e2e proves the product from outside: it starts the shipped binary
// as a person would, `nodeagent dev`, and speaks HTTP to it.
//
// It knows the API's types and nothing else of Hearth. Tests that can share
// one running dev do; tests that kill, stop or corrupt start their own.
package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/test/guests"
	"github.com/hearth-sh/hearth/test/harness"
)

// settle is how long a thing that happens by itself (a report, a restart, a
// clean-up) may take before a test fails. Generous: machines are slow at times.
const settle = 45 * time.Second

// tick is between two looks at such a thing.
const tick = 25 * time.Millisecond

var nodeagent string

// common is the dev that tests share; started by the first that asks.
var common struct {
	once sync.Once
	dev  *harness.Dev
	err  error
}

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	flag.Parse()
	if testing.Short() {
		fmt.Println("e2e: skipped: these tests start the whole product, which -short leaves out")
		return 0
	}
	dir, err := os.MkdirTemp("", "hearth-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	defer os.RemoveAll(dir)
	if nodeagent, err = harness.Binary(context.Background(), dir); err != nil {
		fmt.Fprintln(os.Stderr, "e2e: no binary to test:", err)
		return 1
	}
	code := m.Run()
	if d := common.dev; d != nil {
		running := d.Running()
		if took, err := d.Stop(); err != nil {
			fmt.Fprintf(os.Stderr, "e2e: stopping the shared dev after %v: %v\n", took, err)
			code = 1
		}
		if !running {
			fmt.Fprintf(os.Stderr, "e2e: the shared dev ended by itself:\n%s\n", d.Output())
			code = 1
		}
		if out := d.Output(); strings.Contains(out, "panic: ") || strings.Contains(out, "DATA RACE") {
			fmt.Fprintf(os.Stderr, "e2e: the shared dev's output tells of a panic or a race:\n%s\n", out)
			code = 1
		}
		if code != 0 && os.Getenv("HEARTH_E2E_OUTPUT") != "" {
			fmt.Fprintf(os.Stderr, "--- output of the shared dev ---\n%s\n", d.Output())
		}
		os.RemoveAll(d.DataDir)
	}
	return code
}

// dev is a running product with a test's assertions on top.
type dev struct {
	*harness.Dev
	t *testing.T
}

// shared returns the dev that tests share.
func shared(t *testing.T) dev {
	t.Helper()
	common.once.Do(func() {
		var dir string
		if dir, common.err = os.MkdirTemp("", "hearth-e2e-data-"); common.err != nil {
			return
		}
		// Readable for others, so that workers can give up root where tests
		// run as root; tests with a directory of their own cover the other case.
		if common.err = os.Chmod(dir, 0o755); common.err != nil {
			return
		}
		// t's context ends with this test; the shared dev outlives it.
		common.dev, common.err = harness.Start(context.WithoutCancel(t.Context()), harness.Options{Binary: nodeagent, DataDir: dir})
	})
	if common.err != nil {
		t.Fatal(common.err)
	}
	return dev{common.dev, t}
}

// start runs a dev for this test alone; opts.DataDir is made when empty.
func start(t *testing.T, opts harness.Options) dev {
	t.Helper()
	opts.Binary = nodeagent
	if opts.DataDir == "" {
		opts.DataDir = t.TempDir()
	}
	d, err := harness.Start(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		d.KillAll()
		if t.Failed() {
			t.Logf("--- output of nodeagent dev ---\n%s", tail(d.Output(), 16<<10))
		}
	})
	return dev{d, t}
}

func tail(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return "…" + s[len(s)-n:]
}

// stop ends dev as Ctrl-C does and fails the test when that is not clean.
func (d dev) stop() time.Duration {
	d.t.Helper()
	took, err := d.Stop()
	if err != nil {
		d.t.Fatal(err)
	}
	return took
}

// call sends a request and fails the test only when no answer comes.
func (d dev) call(method, target string, body io.Reader, header http.Header) *harness.Answer {
	d.t.Helper()
	a, err := d.Do(d.t.Context(), method, target, body, header)
	if err != nil {
		d.t.Fatalf("%s %s: %v", method, target, err)
	}
	return a
}

func (d dev) get(target string) *harness.Answer {
	d.t.Helper()
	return d.call(http.MethodGet, target, nil, nil)
}

// put submits a raw module and fails the test only when no answer comes.
func (d dev) put(name string, module []byte, query string, header http.Header) *harness.Answer {
	d.t.Helper()
	a, err := d.Submit(d.t.Context(), name, module, query, header)
	if err != nil {
		d.t.Fatalf("submitting %s: %v", name, err)
	}
	return a
}

// submit submits a raw module and wants it ready.
func (d dev) submit(name string, module []byte, query string) v1alpha1.Function {
	d.t.Helper()
	return d.ready(d.put(name, module, query, nil))
}

// submitWith is submit with settings.
func (d dev) submitWith(name string, module []byte, settings harness.Settings) v1alpha1.Function {
	d.t.Helper()
	a, err := d.SubmitWith(d.t.Context(), name, module, settings, "")
	if err != nil {
		d.t.Fatalf("submitting %s: %v", name, err)
	}
	return d.ready(a)
}

// ready wants an answer to be a function that is ready.
func (d dev) ready(a *harness.Answer) v1alpha1.Function {
	d.t.Helper()
	f, err := a.Function()
	if err != nil {
		d.t.Fatal(err)
	}
	if (a.Status != http.StatusOK && a.Status != http.StatusCreated) || f.State != v1alpha1.StateReady || f.ActiveRevision != f.Revision {
		d.t.Fatalf("not ready: %s", a)
	}
	return f
}

// function reads a function that must exist.
func (d dev) function(name string) v1alpha1.Function {
	d.t.Helper()
	a := d.get("/v1/functions/" + name)
	f, err := a.Function()
	if err != nil {
		d.t.Fatal(err)
	}
	return f
}

func (d dev) revisions(name string) []v1alpha1.Revision {
	d.t.Helper()
	a := d.get("/v1/functions/" + name + "/revisions")
	var list v1alpha1.RevisionList
	if err := json.Unmarshal(a.Body, &list); err != nil || a.Status != http.StatusOK {
		d.t.Fatalf("listing revisions of %s: %v: %s", name, err, a)
	}
	return list.Items
}

// problem wants a problem document with this status and one of the codes.
func (d dev) problem(a *harness.Answer, status int, codes ...string) v1alpha1.Problem {
	d.t.Helper()
	p, code, err := a.Problem()
	if err != nil {
		d.t.Fatal(err)
	}
	if a.Status != status || (len(codes) > 0 && !slices.Contains(codes, code)) {
		d.t.Errorf("answer is %d %s, want %d %v: %s", a.Status, code, status, codes, a)
	}
	if p.Title == "" || p.Detail == "" || !strings.HasPrefix(p.Type, "https://hearth.sh/problems/") {
		d.t.Errorf("the problem document is not complete: %s", a)
	}
	return p
}

// answers wants a function to answer 200 with a body that contains want, in
// both URL forms.
func (d dev) answers(name, want string) {
	d.t.Helper()
	for _, target := range []string{d.HostURL(name, "/"), d.PathURL(name, "/")} {
		if a := d.get(target); a.Status != http.StatusOK || !bytes.Contains(a.Body, []byte(want)) {
			d.t.Errorf("GET %s: want 200 and %q, got %s", target, want, a)
		}
	}
}

// eventually wants check to return nil before settle has passed.
func eventually(t *testing.T, check func() error) {
	t.Helper()
	deadline := time.Now().Add(settle)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("still not after %v: %v", settle, err)
		}
		time.Sleep(tick)
	}
}

// answersSoon is answers for a product that is recovering.
func (d dev) answersSoon(name, want string) {
	d.t.Helper()
	eventually(d.t, func() error {
		a, err := d.Do(d.t.Context(), http.MethodGet, d.PathURL(name, "/"), nil, nil)
		if err != nil {
			return err
		}
		if a.Status != http.StatusOK || !bytes.Contains(a.Body, []byte(want)) {
			return fmt.Errorf("GET %s: want 200 and %q, got %s", name, want, a)
		}
		return nil
	})
}

// marked is a module that answers with text.
func marked(t *testing.T, text string) []byte {
	t.Helper()
	module, err := guests.Mark(guests.Read(t, "hello"), text)
	if err != nil {
		t.Fatal(err)
	}
	return module
}

// state is everything a refused submit must leave as it was.
func (d dev) state() string {
	d.t.Helper()
	var out strings.Builder
	a := d.get("/v1/functions")
	fmt.Fprintf(&out, "list %d %s\n", a.Status, a.Body)
	var list v1alpha1.FunctionList
	if err := json.Unmarshal(a.Body, &list); err != nil {
		d.t.Fatalf("listing: %v: %s", err, a)
	}
	for _, f := range list.Items {
		fmt.Fprintf(&out, "revisions %s\n", d.get("/v1/functions/"+f.Name+"/revisions").Body)
	}
	fmt.Fprintf(&out, "catalog %s\n", d.get("/v2/_catalog?n=1000").Body)
	// Directories that grow by themselves (logs), hold sockets, or are one
	// file with pages of its own (the database) say nothing by their names.
	for _, sub := range []string{"registry", "store", "tmp"} {
		err := filepath.WalkDir(filepath.Join(d.DataDir, sub), func(path string, e os.DirEntry, err error) error {
			if err != nil || e.IsDir() {
				return nil // gone meanwhile, or not made yet
			}
			info, err := e.Info()
			if err != nil {
				return nil
			}
			rel, _ := filepath.Rel(d.DataDir, path)
			fmt.Fprintf(&out, "%s %d\n", rel, info.Size())
			return nil
		})
		if err != nil {
			d.t.Fatal(err)
		}
	}
	return out.String()
}

// unchanged wants state to be what it was, soon: temporary files may take a
// moment to go.
func (d dev) unchanged(before string) {
	d.t.Helper()
	eventually(d.t, func() error {
		after := d.state()
		if after == before {
			return nil
		}
		return fmt.Errorf("state changed:\n%s", difference(before, after))
	})
}

// difference lists lines that only one of two texts has.
func difference(before, after string) string {
	var out strings.Builder
	old, now := strings.Split(before, "\n"), strings.Split(after, "\n")
	for _, line := range old {
		if !slices.Contains(now, line) {
			fmt.Fprintln(&out, "-", line)
		}
	}
	for _, line := range now {
		if !slices.Contains(old, line) {
			fmt.Fprintln(&out, "+", line)
		}
	}
	return out.String()
}
