package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/test/needs"
)

func publish(t testing.TB, c *Client, repo string, data []byte) v1alpha1.Artifact {
	t.Helper()
	a, err := c.Publish(context.Background(), repo, moduleFile(t, data), PublishOptions{
		Spin: SpinOptions{Name: "hello", Version: "1"}, Tags: []string{"latest"},
	})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestPublishedModuleComesBackByDigest(t *testing.T) {
	host := serve(t, openEmbedded(t, t.TempDir()).Handler())
	c := newClient(t, host)
	data := wasmBytes(3<<20, 7)
	a := publish(t, c, "functions/hello", data)
	if again := publish(t, c, "functions/hello", data); again != a {
		t.Errorf("publishing again gives %v, not %v", again, a)
	}
	dst := filepath.Join(t.TempDir(), "m.wasm")
	var last, total int64
	p, err := c.Pull(context.Background(), a, dst, PullOptions{Progress: func(d, n int64) { last, total = d, n }})
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(dst)
	if err != nil || !bytes.Equal(got, data) {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
	if p.Format != FormatSpin || p.Size != int64(len(data)) || p.Digest != hashOf(data).String() || last != total || total != p.Size {
		t.Errorf("pulled %+v, progress %d of %d", p, last, total)
	}
	if len(p.Phases) != 2 || p.Phases[0].Name != "pull" || p.Phases[1].Name != "verify" {
		t.Errorf("phases %+v", p.Phases)
	}
	for _, ref := range []string{"functions/hello:latest", host + "/functions/hello", host + "/functions/hello@" + a.Digest, "oci://" + host + "/functions/hello:latest"} {
		if r, err := c.Resolve(context.Background(), ref); err != nil || r != a {
			t.Errorf("resolve %s: %v, %v", ref, r, err)
		}
	}
	if ra, p, err := c.Fetch(context.Background(), "functions/hello:latest", dst, PullOptions{}); err != nil || ra != a || p.Size == 0 {
		t.Errorf("fetch: %v %v %v", ra, p, err)
	}
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(dst), ".pull-*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestRegistryBehindASocketIsReached(t *testing.T) {
	e := openEmbedded(t, t.TempDir())
	sock := filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: e.Handler()}
	done := make(chan struct{})
	go func() { srv.Serve(ln); close(done) }()
	t.Cleanup(func() { srv.Close(); <-done })
	c := newClient(t, "registry.internal", func(o *ClientOptions) {
		o.PlainHTTP = false
		o.Dial = func(ctx context.Context) (net.Conn, error) { return new(net.Dialer).DialContext(ctx, "unix", sock) }
	})
	a := publish(t, c, "functions/hello", wasmBytes(1000, 1))
	if _, err := c.Pull(context.Background(), a, filepath.Join(t.TempDir(), "m"), PullOptions{}); err != nil {
		t.Fatal(err)
	}
}

func TestErrorsAreTyped(t *testing.T) {
	host := serve(t, openEmbedded(t, t.TempDir()).Handler())
	c := newClient(t, host)
	a := publish(t, c, "functions/hello", wasmBytes(1000, 1))
	dst := filepath.Join(t.TempDir(), "m")
	pull := func(a v1alpha1.Artifact, o PullOptions) error {
		_, err := c.Pull(context.Background(), a, dst, o)
		return err
	}
	with := func(f func(*v1alpha1.Artifact)) v1alpha1.Artifact { b := a; f(&b); return b }
	canceled, cancel := context.WithCancel(context.Background())
	cancel()
	for what, c := range map[string]struct{ got, want error }{
		"unknown digest":      {pull(with(func(b *v1alpha1.Artifact) { b.Digest = digestA }), PullOptions{}), ErrNotFound},
		"unknown repository":  {pull(with(func(b *v1alpha1.Artifact) { b.Repository = "functions/none" }), PullOptions{}), ErrNotFound},
		"a tag":               {pull(with(func(b *v1alpha1.Artifact) { b.Digest = "latest" }), PullOptions{}), ErrInvalidReference},
		"bad repository":      {pull(with(func(b *v1alpha1.Artifact) { b.Repository = "../x" }), PullOptions{}), ErrInvalidReference},
		"climbing repository": {pull(with(func(b *v1alpha1.Artifact) { b.Repository = "a/../../b" }), PullOptions{}), ErrInvalidReference},
		"no repository":       {pull(with(func(b *v1alpha1.Artifact) { b.Repository = "" }), PullOptions{}), ErrInvalidReference},
		"bad registry":        {pull(with(func(b *v1alpha1.Artifact) { b.Registry = "a/b" }), PullOptions{}), ErrInvalidReference},
		"metadata service":    {pull(with(func(b *v1alpha1.Artifact) { b.Registry = "169.254.169.254" }), PullOptions{}), ErrInvalidReference},
		"too large":           {pull(a, PullOptions{MaxBytes: 10}), ErrTooLarge},
		"nobody listens":      {pull(with(func(b *v1alpha1.Artifact) { b.Registry = "127.0.0.1:1" }), PullOptions{}), ErrUnavailable},
		"canceled":            {func() error { _, err := c.Resolve(canceled, "functions/hello"); return err }(), context.Canceled},
		"unknown tag":         {func() error { _, err := c.Resolve(context.Background(), "functions/hello:7"); return err }(), ErrNotFound},
	} {
		if !errors.Is(c.got, c.want) {
			t.Errorf("%s: %v (code %s), want %v", what, c.got, Code(c.got), c.want)
		}
	}
	if _, err := os.Stat(dst); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a failed pull left its file: %v", err)
	}
}

// faults stands between a client and the real registry and breaks what it is
// told to, the first n times a blob is asked for.
type faults struct {
	kind  atomic.Value // string
	times atomic.Int64
	hits  atomic.Int64
	stop  chan struct{}
}

func faulty(t *testing.T, upstream string, stop chan struct{}) (*faults, string) {
	f := &faults{stop: stop}
	f.kind.Store("")
	target, _ := url.Parse("http://" + upstream)
	// A registry that serves other bytes must keep serving: the proxy's own
	// complaints about that are not news.
	proxy := &httputil.ReverseProxy{ErrorLog: log.New(io.Discard, "", 0), Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(target) }, FlushInterval: -1, ModifyResponse: f.modify}
	proxy.ErrorHandler = func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) }
	return f, serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		kind, _, _ := strings.Cut(f.kind.Load().(string), ":")
		blob := strings.Contains(r.URL.Path, "/blobs/sha256") && r.Method == http.MethodGet
		manifest := strings.Contains(r.URL.Path, "/manifests/") && r.Method == http.MethodGet
		if (blob || (manifest && strings.HasPrefix(kind, "manifest"))) && f.times.Add(-1) >= 0 {
			f.hits.Add(1)
			switch kind {
			case "500", "503", "429", "401", "403", "404":
				code, _ := strconv.Atoi(kind)
				w.WriteHeader(code)
				return
			case "drop":
				conn, _, err := http.NewResponseController(w).Hijack()
				if err == nil {
					conn.Close()
				}
				return
			case "stall-header":
				select {
				case <-r.Context().Done():
				case <-stop:
				}
				return
			}
			r = r.WithContext(context.WithValue(r.Context(), faultKey{}, kind))
		}
		defer func() {
			// The proxy panics with ErrAbortHandler for a cut body.
			if p := recover(); p != nil {
				panic(http.ErrAbortHandler)
			}
		}()
		proxy.ServeHTTP(w, r)
	}))
}

type faultKey struct{}

func (f *faults) modify(resp *http.Response) error {
	kind, _ := resp.Request.Context().Value(faultKey{}).(string)
	if kind == "" {
		return nil
	}
	orig := resp.Body
	body, err := io.ReadAll(orig)
	orig.Close()
	if err != nil {
		return err
	}
	switch kind {
	case "lie", "manifest-lie":
		body[len(body)/2] ^= 1
		resp.Body = io.NopCloser(bytes.NewReader(body))
	case "longer":
		resp.ContentLength = -1
		resp.Header.Del("Content-Length")
		resp.Body = io.NopCloser(io.MultiReader(bytes.NewReader(body), bytes.NewReader(body)))
	case "shorter":
		resp.ContentLength = -1
		resp.Header.Del("Content-Length")
		resp.Body = io.NopCloser(bytes.NewReader(body[:len(body)/2]))
	case "announce-other":
		resp.ContentLength = int64(len(body) / 2)
		resp.Header.Set("Content-Length", fmt.Sprint(len(body)/2))
		resp.Body = io.NopCloser(bytes.NewReader(body[:len(body)/2]))
	case "cut":
		resp.Body = io.NopCloser(io.MultiReader(bytes.NewReader(body[:len(body)/2]), iotestErr{}))
	case "stall":
		resp.Body = io.NopCloser(io.MultiReader(bytes.NewReader(body[:len(body)/2]), blocked{resp.Request.Context(), f.stop}))
	case "endless":
		resp.ContentLength = -1
		resp.Header.Del("Content-Length")
		resp.Body = io.NopCloser(io.MultiReader(bytes.NewReader(body), zeros{}))
	case "manifest-endless":
		resp.ContentLength = -1
		resp.Header.Del("Content-Length")
		resp.Body = io.NopCloser(zeros{})
	}
	return nil
}

type iotestErr struct{}

func (iotestErr) Read([]byte) (int, error) { return 0, errors.New("cut") }

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

type blocked struct {
	ctx  context.Context
	stop chan struct{}
}

func (b blocked) Read([]byte) (int, error) {
	select {
	case <-b.ctx.Done():
	case <-b.stop:
	}
	return 0, io.ErrUnexpectedEOF
}

func TestPullOverBrokenRegistries(t *testing.T) {
	upstream := serve(t, openEmbedded(t, t.TempDir()).Handler())
	data := wasmBytes(1<<20, 3)
	a := publish(t, newClient(t, upstream), "functions/hello", data)

	for _, c := range []struct {
		fault string
		times int64
		want  error // nil: the pull succeeds
		hits  int64
	}{
		{"", 0, nil, 0},
		{"500", 2, nil, 2},
		{"503", 100, ErrUnavailable, attempts},
		{"429", 1, nil, 1},
		{"401", 100, ErrUnauthorized, 1},
		{"403", 100, ErrUnauthorized, 1},
		{"404", 100, ErrNotFound, 1},
		{"drop", 1, nil, 1},
		{"cut", 2, nil, 2},
		{"cut", 100, ErrUnavailable, attempts},
		{"shorter", 1, nil, 1},
		{"lie", 1, nil, 1}, // a flipped bit on the way
		{"lie", 100, ErrDigestMismatch, mismatchAttempts},
		{"longer", 100, ErrDigestMismatch, mismatchAttempts},
		{"endless", 100, ErrDigestMismatch, mismatchAttempts},
		{"announce-other", 100, ErrDigestMismatch, mismatchAttempts},
		{"manifest-lie", 100, ErrDigestMismatch, mismatchAttempts},
		{"manifest-endless", 100, ErrTooLarge, 1},
		{"stall", 1, nil, 1},
		{"stall", 100, ErrUnavailable, attempts},
		{"stall-header", 100, ErrUnavailable, attempts},
	} {
		t.Run(fmt.Sprintf("%s %d times", c.fault, c.times), func(t *testing.T) {
			stop := make(chan struct{})
			f, host := faulty(t, upstream, stop)
			t.Cleanup(func() { close(stop) }) // runs before the server's Close
			f.kind.Store(c.fault)
			f.times.Store(c.times)
			cl := newClient(t, host, func(o *ClientOptions) {
				if strings.HasPrefix(c.fault, "stall") {
					// Long enough for a busy machine to move a byte.
					o.StallTimeout = 1500 * time.Millisecond
				}
			})
			dir := t.TempDir()
			dst := filepath.Join(dir, "m")
			_, err := cl.Pull(context.Background(), a, dst, PullOptions{})
			if !errors.Is(err, c.want) {
				t.Fatalf("got %v (code %s), want %v", err, Code(err), c.want)
			}
			if f.hits.Load() != c.hits {
				t.Errorf("broken %d times, want %d", f.hits.Load(), c.hits)
			}
			if got, _ := os.ReadFile(dst); c.want == nil && !bytes.Equal(got, data) {
				t.Error("other bytes arrived")
			}
			if ents, _ := os.ReadDir(dir); c.want != nil && len(ents) > 0 {
				t.Errorf("left behind: %v", ents)
			}
		})
	}
}

func TestCallerThatGivesUpIsObeyed(t *testing.T) {
	upstream := serve(t, openEmbedded(t, t.TempDir()).Handler())
	a := publish(t, newClient(t, upstream), "functions/hello", wasmBytes(1000, 3))
	stop := make(chan struct{})
	f, host := faulty(t, upstream, stop)
	t.Cleanup(func() { close(stop) })
	f.kind.Store("stall")
	f.times.Store(100)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		_, err := newClient(t, host).Pull(ctx, a, filepath.Join(t.TempDir(), "m"), PullOptions{})
		done <- err
	}()
	for f.hits.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) || Retryable(err) {
		t.Errorf("got %v", err)
	}
}

func TestFullDiskIsSaid(t *testing.T) {
	dir := t.TempDir()
	needs.Tmpfs(t, dir, "size=256k")
	c := newClient(t, serve(t, openEmbedded(t, t.TempDir()).Handler()))
	a := publish(t, c, "functions/hello", wasmBytes(1<<20, 3))
	_, err := c.Pull(context.Background(), a, filepath.Join(dir, "m"), PullOptions{})
	if !errors.Is(err, ErrNoSpace) || !Retryable(err) || Code(err) != "disk-full" {
		t.Errorf("got %v", err)
	}
	if ents, _ := os.ReadDir(dir); len(ents) > 0 {
		t.Errorf("left behind: %v", ents)
	}

	// The same for a registry whose disk is full: nothing is acknowledged.
	full := newClient(t, serve(t, openEmbedded(t, filepath.Join(dir, "registry")).Handler()))
	_, err = full.Publish(context.Background(), "functions/hello", moduleFile(t, wasmBytes(1<<20, 3)), PublishOptions{Spin: SpinOptions{Name: "hello"}})
	if !errors.Is(err, ErrUnavailable) {
		t.Errorf("publish: %v", err)
	}
}

func TestConcurrentPushesOfTheSameContent(t *testing.T) {
	c := newClient(t, serve(t, openEmbedded(t, t.TempDir()).Handler()))
	m := moduleFile(t, wasmBytes(1<<20, 9))
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			repo := "functions/a" + strconv.Itoa(i%2)
			a, err := c.Publish(context.Background(), repo, m, PublishOptions{Spin: SpinOptions{Name: "a"}, Tags: []string{"latest"}})
			if err != nil {
				t.Error(err)
				return
			}
			if _, err := c.Pull(context.Background(), a, filepath.Join(t.TempDir(), "m"), PullOptions{}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

func TestModuleThatChangedOnDiskIsNotPublished(t *testing.T) {
	c := newClient(t, serve(t, openEmbedded(t, t.TempDir()).Handler()))
	m := moduleFile(t, wasmBytes(1000, 1))
	if err := os.WriteFile(m.Path, wasmBytes(1000, 2), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := c.Publish(context.Background(), "functions/hello", m, PublishOptions{Spin: SpinOptions{Name: "hello"}})
	if !errors.Is(err, ErrDigestMismatch) {
		t.Errorf("got %v", err)
	}
}

// TestDebianRegistryWithPasswords uses an older, independent build of the
// distribution server with basic authentication.
func TestDebianRegistryWithPasswords(t *testing.T) {
	bin, err := exec.LookPath("docker-registry")
	if err != nil {
		needs.Missing(t, "docker-registry is not installed")
	}
	htpasswd, err := exec.LookPath("htpasswd")
	if err != nil {
		needs.Missing(t, "htpasswd (apache2-utils) is not installed")
	}
	dir := t.TempDir()
	entry, err := exec.Command(htpasswd, "-Bbn", "alice", "sesame").Output()
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	host := ln.Addr().String()
	ln.Close()
	os.WriteFile(filepath.Join(dir, "htpasswd"), bytes.TrimSpace(entry), 0o600)
	conf := fmt.Sprintf("version: 0.1\nlog: {level: error}\nstorage: {filesystem: {rootdirectory: %s/data}, delete: {enabled: true}}\nhttp: {addr: %s, secret: x}\nauth: {htpasswd: {realm: test, path: %s/htpasswd}}\n", dir, host, dir)
	os.WriteFile(filepath.Join(dir, "config.yml"), []byte(conf), 0o600)
	cmd := exec.Command(bin, "serve", filepath.Join(dir, "config.yml"))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	for range 200 {
		if conn, err := net.Dial("tcp", host); err == nil {
			conn.Close()
			break
		}
		time.Sleep(20 * time.Millisecond)
	}

	// As the configured registry, with its own credentials.
	login := func(user, pass string) authn.Keychain {
		return keychainFunc(func() authn.Authenticator { return &authn.Basic{Username: user, Password: pass} })
	}
	owner := newClient(t, host, func(o *ClientOptions) { o.RegistryKeychain = login("alice", "sesame") })
	a := publish(t, owner, "team/hello", wasmBytes(200_000, 5))
	dst := filepath.Join(t.TempDir(), "m")
	if _, err := owner.Pull(context.Background(), a, dst, PullOptions{}); err != nil {
		t.Error(err)
	}
	// As somebody else's registry, found by reference.
	other := newClient(t, "127.0.0.1:1", func(o *ClientOptions) { o.Keychain = login("alice", "sesame") })
	got, _, err := other.Fetch(context.Background(), host+"/team/hello:latest", dst, PullOptions{})
	if err != nil || got.Registry != host || got.Digest != a.Digest {
		t.Errorf("%v, %v", got, err)
	}
	for what, k := range map[string]authn.Keychain{"wrong password": login("alice", "open"), "no password": keychainFunc(func() authn.Authenticator { return authn.Anonymous })} {
		c := newClient(t, "127.0.0.1:1", func(o *ClientOptions) { o.Keychain = k })
		if _, err := c.Resolve(context.Background(), host+"/team/hello:latest"); !errors.Is(err, ErrUnauthorized) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

type keychainFunc func() authn.Authenticator

func (f keychainFunc) Resolve(authn.Resource) (authn.Authenticator, error) { return f(), nil }

func TestOutsideClientsSeeAnOrdinaryRegistry(t *testing.T) {
	host := serve(t, openEmbedded(t, t.TempDir()).Handler())
	c := newClient(t, host)
	a := publish(t, c, "functions/hello", wasmBytes(1000, 1))
	ref, err := name.ParseReference(host + "/functions/hello:latest")
	if err != nil {
		t.Fatal(err)
	}
	tr := http.DefaultTransport.(*http.Transport).Clone()
	t.Cleanup(tr.CloseIdleConnections)
	opt := remote.WithTransport(tr)
	img, err := remote.Image(ref, opt)
	if err != nil {
		t.Fatal(err)
	}
	if d, _ := img.Digest(); d.String() != a.Digest {
		t.Errorf("digest %s, not %s", d, a.Digest)
	}
	if err := remote.Write(ref.Context().Tag("copy"), img, opt); err != nil {
		t.Errorf("push: %v", err)
	}
	tags, err := remote.List(ref.Context(), opt)
	if err != nil || strings.Join(tags, " ") != "copy latest" {
		t.Errorf("tags %v, %v", tags, err)
	}
	reg, _ := name.NewRegistry(host)
	if repos, err := remote.Catalog(context.Background(), reg, opt); err != nil || len(repos) != 1 {
		t.Errorf("catalog %v, %v", repos, err)
	}
	if err := remote.Delete(ref.Context().Digest(a.Digest), opt); err != nil {
		t.Errorf("delete: %v", err)
	}
	if _, err := remote.Head(ref.Context().Digest(a.Digest), opt); err == nil {
		t.Error("still there after its deletion")
	}
	hc := &http.Client{Transport: tr}
	for path, want := range map[string]string{
		"/v2/functions/none/manifests/latest":       "MANIFEST_UNKNOWN",
		"/v2/functions/none/tags/list":              "NAME_UNKNOWN",
		"/v2/functions/hello/blobs/" + digestA:      "BLOB_UNKNOWN",
		"/v2/functions/hello/manifests/" + a.Digest: "MANIFEST_UNKNOWN",
	} {
		resp, err := hc.Get("http://" + host + path)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != 404 || !strings.Contains(string(body), want) {
			t.Errorf("%s: %d %s", path, resp.StatusCode, body)
		}
	}
}

func BenchmarkPublishAndPull(b *testing.B) {
	c := newClient(b, serve(b, openEmbedded(b, b.TempDir()).Handler()))
	dst := filepath.Join(b.TempDir(), "m")
	for i := 0; b.Loop(); i++ {
		data := wasmBytes(100_000, 1)
		copy(data[8:], strconv.Itoa(i))
		a := publish(b, c, "functions/hello", data)
		if _, err := c.Pull(context.Background(), a, dst, PullOptions{}); err != nil {
			b.Fatal(err)
		}
	}
}

func TestAConnectionThatTimesOutIsAnUnavailableRegistry(t *testing.T) {
	dials := 0
	c := newClient(t, "registry.internal", func(o *ClientOptions) {
		o.Dial = func(ctx context.Context) (net.Conn, error) {
			dials++
			// What net gives when its own time is over, whoever listens.
			return (&net.Dialer{Timeout: time.Nanosecond}).DialContext(ctx, "tcp", "127.0.0.1:1")
		}
	})
	_, err := c.Resolve(context.Background(), "functions/hello:1")
	if !errors.Is(err, ErrUnavailable) || !Retryable(err) || dials < attempts {
		t.Errorf("%v (code %s) after %d dials", err, Code(err), dials)
	}
}

// never is a network that nothing may be sent to.
type never struct{ t *testing.T }

func (n never) RoundTrip(r *http.Request) (*http.Response, error) {
	n.t.Errorf("%s was sent", r.URL)
	return nil, errors.New("sent")
}

func TestLinkLocalAddressesAreNotContactedThroughAProxyEither(t *testing.T) {
	g := &guard{next: never{t}, stall: time.Minute, home: "169.254.7.7:5000"}
	for _, u := range []string{"http://169.254.169.254/v2/", "http://169.254.7.7:80/v2/", "https://[fe80::1]/v2/", "http://[fe80::1%25eth0]:5000/"} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, u, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := g.RoundTrip(req); !errors.Is(err, ErrInvalidReference) {
			t.Errorf("%s: %v", u, err)
		}
	}
	// A registry that was configured may be there; whoever it redirects to not.
	passed := false
	g.next = passes(func() { passed = true })
	req, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://169.254.7.7:5000/v2/", nil)
	if resp, err := g.RoundTrip(req); err != nil || !passed {
		t.Errorf("the configured registry: %v", err)
	} else {
		resp.Body.Close()
	}
}

type passes func()

func (f passes) RoundTrip(*http.Request) (*http.Response, error) {
	f()
	return &http.Response{StatusCode: 200, Body: http.NoBody, Header: http.Header{}}, nil
}
