package publish

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/registry"
	"github.com/hearth-sh/hearth/internal/registry/registrytest"
	"github.com/hearth-sh/hearth/internal/submit"
)

// counted stands before a registry and counts uploads; hold, when set, is
// called for each request before it is passed on.
type counted struct {
	requests, uploads, manifests atomic.Int64
	hold                         atomic.Pointer[func(*http.Request)]
}

func countedBefore(t testing.TB, upstream string) (*counted, string) {
	t.Helper()
	c := &counted{}
	target := &url.URL{Scheme: "http", Host: upstream}
	transport := &http.Transport{}
	t.Cleanup(transport.CloseIdleConnections)
	proxy := &httputil.ReverseProxy{Transport: transport, ErrorLog: quiet, Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(target)
		r.Out.Host = r.In.Host // uploads continue here, not behind
	}}
	return c, serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c.requests.Add(1)
		switch {
		case r.Method == http.MethodPost:
			c.uploads.Add(1)
		case r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/manifests/"):
			c.manifests.Add(1)
		}
		if hold := c.hold.Load(); hold != nil {
			(*hold)(r)
		}
		proxy.ServeHTTP(w, r)
	}))
}

func TestConcurrentSubmitsOfTheSameBytesPushOnce(t *testing.T) {
	count, host := countedBefore(t, embedded(t))
	p := publisherOf(t, Options{Client: clientOf(t, host), DigestTags: true})
	var waiting sync.WaitGroup // all are there before the first goes on
	waiting.Add(1)
	hold := func(*http.Request) { waiting.Wait() }
	count.hold.Store(&hold)
	m := moduleOf(t, 300_000, "same")
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			ref, err := moduleOf(t, 300_000, "same").publish(t.Context(), p, "", "hello")
			if err != nil {
				t.Error(err)
				return
			}
			m.there(t, p.o.Client, ref)
		})
	}
	waiting.Done()
	wg.Wait()
	if n := count.uploads.Load(); n != 3 { // module, application, configuration
		t.Errorf("%d blobs were uploaded, want 3", n)
	}
	if n := count.manifests.Load(); n != 1 {
		t.Errorf("%d manifests were put, want 1", n)
	}
	// Later, and from another process: found there.
	before := count.requests.Load()
	later := publisherOf(t, Options{Client: clientOf(t, host), DigestTags: true})
	if _, err := m.publish(t.Context(), later, "", "hello"); err != nil {
		t.Error(err)
	}
	if u, n := count.uploads.Load(), count.requests.Load()-before; u != 3 || n > 2 {
		t.Errorf("bytes that were there took %d uploads and %d requests", u-3, n)
	}
	if len(p.flights) != 0 {
		t.Errorf("%d pushes are remembered", len(p.flights))
	}
}

func TestACallerThatLeavesDoesNotFailTheOthers(t *testing.T) {
	count, host := countedBefore(t, embedded(t))
	p := publisherOf(t, Options{Client: clientOf(t, host)})
	first, leave := context.WithCancel(t.Context())
	began, left := make(chan struct{}), make(chan struct{})
	var once sync.Once
	hold := func(r *http.Request) {
		if r.Method == http.MethodPatch {
			once.Do(func() { close(began); <-left })
		}
	}
	count.hold.Store(&hold)
	var wg sync.WaitGroup
	theirs := moduleOf(t, 200_000, "leaving")
	wg.Go(func() {
		_, err := theirs.publish(first, p, "", "hello")
		if !errors.Is(err, context.Canceled) {
			t.Errorf("who left was told %v", err)
		}
		_ = os.Remove(theirs.path) // as submit does
		close(left)
	})
	<-began
	for range 5 {
		wg.Go(func() {
			m := moduleOf(t, 200_000, "leaving")
			ref, err := m.publish(t.Context(), p, "", "hello")
			if err != nil {
				t.Errorf("who stayed was told %v", err)
				return
			}
			m.there(t, p.o.Client, ref)
		})
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := moduleOf(t, 200_000, "leaving").publish(gone, p, "", "hello"); !errors.Is(err, context.Canceled) {
		t.Errorf("who waited and left was told %v", err)
	}
	leave()
	wg.Wait()
	if n := count.manifests.Load(); n != 1 {
		t.Errorf("%d manifests were put, want 1", n)
	}
}

func TestTheFileOfOneCallerDoesNotFailTheOthers(t *testing.T) {
	count, host := countedBefore(t, embedded(t))
	p := publisherOf(t, Options{Client: clientOf(t, host)})
	bad := moduleOf(t, 1000, "good")
	other := moduleOf(t, 1000, "evil")
	if err := os.WriteFile(bad.path, other.data, 0o600); err != nil {
		t.Fatal(err)
	}
	began, queued := make(chan struct{}), make(chan struct{})
	var once sync.Once
	hold := func(*http.Request) { once.Do(func() { close(began); <-queued }) }
	count.hold.Store(&hold)
	var wg sync.WaitGroup
	wg.Go(func() {
		_, err := bad.publish(t.Context(), p, "", "hello")
		var pe *submit.PublishError
		if !errors.As(err, &pe) || pe.Code != "digest-mismatch" {
			t.Errorf("other bytes than their digest were published: %v", err)
		}
	})
	<-began
	wg.Go(func() {
		good := moduleOf(t, 1000, "good")
		ref, err := good.publish(t.Context(), p, "", "hello")
		if err != nil {
			t.Errorf("%v", err)
			return
		}
		good.there(t, p.o.Client, ref)
	})
	close(queued)
	wg.Wait()
}

func TestRepositoriesAreNamedByTenantAndFunction(t *testing.T) {
	c := clientOf(t, "127.0.0.1:1")
	shared, apart := publisherOf(t, Options{Client: c}), publisherOf(t, Options{Client: c, RepositoryPrefix: "acme/hearth/", Tenants: true})
	for _, tc := range []struct{ tenant, name, shared, apart string }{
		{"team", "hello", "functions/hello", "acme/hearth/team/hello"},
		{"a--b", "c---d-e", "functions/c-x.x.d-e", "acme/hearth/a-x.b/c-x.x.d-e"},
	} {
		if got := shared.Repository(tc.tenant, tc.name); got != tc.shared || !registry.ValidRepository(got) {
			t.Errorf("%s of %s is in %s", tc.name, tc.tenant, got)
		}
		if got := apart.Repository(tc.tenant, tc.name); got != tc.apart || !registry.ValidRepository(got) {
			t.Errorf("%s of %s is in %s", tc.name, tc.tenant, got)
		}
	}
	for _, prefix := range []string{"functions", "/", "Functions/", "../", "a//", strings.Repeat("a", 256) + "/"} {
		if _, err := NewPublisher(Options{Client: c, RepositoryPrefix: prefix}); err == nil {
			t.Errorf("the prefix %.20q was taken", prefix)
		}
	}
	if _, err := NewPublisher(Options{}); err == nil {
		t.Error("no client was taken")
	}
	m := moduleOf(t, 100, "x")
	if _, err := m.publish(t.Context(), apart, "", "hello"); err == nil {
		t.Error("no tenant was taken")
	}
	m.digest = ""
	if _, err := m.publish(t.Context(), shared, "", "hello"); err == nil {
		t.Error("no digest was taken")
	}
}

func FuzzComponent(f *testing.F) {
	f.Add("a--b", "a-x.b")
	f.Add("a---b", "a-x-b")
	f.Fuzz(func(t *testing.T, a, b string) {
		label := func(s string) bool {
			for _, c := range []byte(s) {
				if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
					return false
				}
			}
			return s != "" && len(s) <= 63 && s[0] >= 'a' && s[len(s)-1] != '-'
		}
		if !label(a) || !label(b) {
			return
		}
		if a != b && component(a) == component(b) {
			t.Errorf("%q and %q are both %q", a, b, component(a))
		}
		if c := component(a); !registry.ValidRepository(c) || strings.Contains(c, "--") {
			t.Errorf("%q becomes %q", a, c)
		}
	})
}

func TestTwoPublishersAtOnceLeaveOneImage(t *testing.T) {
	host := embedded(t)
	// As two processes: both have looked for the bytes before either sends them.
	var looked sync.WaitGroup
	looked.Add(2)
	refs := make(chan string, 2)
	for range 2 {
		front, own := countedBefore(t, host)
		var first sync.Once
		hold := func(r *http.Request) {
			if r.Method == http.MethodPost {
				first.Do(func() { looked.Done(); looked.Wait() })
			}
		}
		front.hold.Store(&hold)
		p := publisherOf(t, Options{Client: clientOf(t, own), Tenants: true, DigestTags: true})
		m := moduleOf(t, 300_000, "same")
		go func() {
			ref, err := m.publish(context.Background(), p, "alice", "hello")
			if err != nil {
				t.Error(err)
			}
			refs <- ref
		}()
	}
	one, two := <-refs, <-refs
	if one != two || one == "" {
		t.Fatalf("%s and %s", one, two)
	}
	moduleOf(t, 300_000, "same").there(t, clientOf(t, host), one)
	response, err := http.Get("http://" + host + "/v2/functions/alice/hello/tags/list")
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	var list struct{ Tags []string }
	if err := json.NewDecoder(response.Body).Decode(&list); err != nil || len(list.Tags) != 1 {
		t.Errorf("tags %v, %v", list.Tags, err)
	}
}

func TestAnImageIsInspectedWithoutItsBytes(t *testing.T) {
	count, host := countedBefore(t, embedded(t))
	c := clientOf(t, host)
	p := publisherOf(t, Options{Client: c, Tenants: true, Located: true, Alias: func(h string) bool { return h == "registry.example.org" }})
	m := moduleOf(t, 300_000, "large")
	a, err := p.PublishFor(t.Context(), "alice", "hello", m.path, m.digest, m.meta)
	if err != nil {
		t.Fatal(err)
	}
	before := count.requests.Load()
	if size, err := p.Inspect(t.Context(), "alice", a, false, 0); err != nil || size != 300_000 {
		t.Errorf("%d bytes, %v", size, err)
	}
	if n := count.requests.Load() - before; n > 2 { // what the registry is, and the manifest
		t.Errorf("it took %d requests", n)
	}
	if size, err := p.Inspect(t.Context(), "alice", a, true, 0); err != nil || size != 300_000 {
		t.Errorf("for a spin function: %d bytes, %v", size, err)
	}
	before = count.requests.Load()
	if size, err := p.Inspect(t.Context(), "alice", a, false, 77); err != nil || size != 77 || count.requests.Load() != before {
		t.Errorf("what is known was asked for: %d bytes, %v", size, err)
	}

	_, port, _ := net.SplitHostPort(host)
	at := func(registry, repository, digest string) v1alpha1.Artifact {
		return v1alpha1.Artifact{Registry: registry, Repository: repository, Digest: digest}
	}
	none := "sha256:" + strings.Repeat("ab", 32)
	for what, tc := range map[string]struct {
		tenant    string
		artifact  v1alpha1.Artifact
		size      int64
		code      string
		anothers  bool
		retryable bool
	}{
		"another's":                       {"bob", a, 0, "registry-unauthorized", true, false},
		"another's, of a known size":      {"bob", a, 300_000, "registry-unauthorized", true, false},
		"another's, without the registry": {"bob", at("", a.Repository, a.Digest), 0, "registry-unauthorized", true, false},
		"another's, by an alias":          {"bob", at("registry.example.org", a.Repository, a.Digest), 0, "registry-unauthorized", true, false},
		"a tenant that begins alike":      {"ali", a, 0, "registry-unauthorized", true, false},
		// The digest alone gives nothing: it must be in one's own repository.
		"another's digest in one's own repository": {"bob", at(host, "functions/bob/hello", a.Digest), 0, "image-not-found", false, false},
		"what is not there":                        {"alice", at(host, "functions/alice/hello", none), 0, "image-not-found", false, false},
		"a registry that is away":                  {"alice", at("127.0.0.1:1", "team/hello", none), 0, "registry-unavailable", false, true},
	} {
		_, err := p.Inspect(t.Context(), tc.tenant, tc.artifact, false, tc.size)
		var pe *submit.PublishError
		if !errors.As(err, &pe) || pe.Code != tc.code || pe.Retryable != tc.retryable || errors.Is(err, submit.ErrImageOfAnother) != tc.anothers {
			t.Errorf("%s: %v (port %s)", what, err, port)
		}
	}
}

func TestHostsThatAreTheSameRegistryAreTold(t *testing.T) {
	for host, want := range map[string]string{
		"Registry.Example.com": "registry.example.com", "registry.example.com.": "registry.example.com", "registry.example.com:443": "registry.example.com",
		"registry.example.com:5000": "registry.example.com:5000", "[::1]:443": "::1", "[fd00::1]:5000": "[fd00::1]:5000",
	} {
		if got := canonical(host); got != want {
			t.Errorf("%s is %s, want %s", host, got, want)
		}
	}
}

func TestATenantFetchesNothingOfAnother(t *testing.T) {
	host := embedded(t)
	c := clientOf(t, host)
	p := publisherOf(t, Options{Client: c, Tenants: true, Alias: func(h string) bool { return h == "registry.example.org" }})
	m := moduleOf(t, 5000, "secret")
	ref, err := m.publish(t.Context(), p, "alice", "hello")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Publish(t.Context(), "library/hello", registry.Module{Path: m.path}, registry.PublishOptions{Spin: registry.SpinOptions{Name: "hello"}, Tags: []string{"1"}}); err != nil {
		t.Fatal(err)
	}
	dst := filepath.Join(t.TempDir(), "m")
	for _, tc := range []struct{ tenant, ref, code string }{
		{"alice", ref, ""},
		{"alice", host + "/" + ref, ""},
		{"bob", "library/hello:1", ""},
		{"bob", ref, "registry-unauthorized"},
		{"bob", "oci://" + host + "/" + ref, "registry-unauthorized"},
		{"bob", "registry.example.org/" + ref, "registry-unauthorized"},
		{"ali", ref, "registry-unauthorized"},
		{"", ref, "registry-unauthorized"},
		{"alice", "functions/bob/none:1", "registry-unauthorized"},
		{"alice", "functions/alice/none:1", "image-not-found"},
		{"alice", "no such reference", "image-invalid"},
	} {
		a, err := p.FetchFor(t.Context(), tc.tenant, tc.ref, dst, 1<<20)
		var pe *submit.PublishError
		switch {
		case tc.code == "" && (err != nil || a.Digest == ""):
			t.Errorf("%s of %q: %v", tc.ref, tc.tenant, err)
		case tc.code != "" && (!errors.As(err, &pe) || pe.Code != tc.code || pe.Retryable):
			t.Errorf("%s of %q: %v, want %s", tc.ref, tc.tenant, err, tc.code)
		}
	}
	if _, err := p.Fetch(t.Context(), ref, dst, 1<<20); err == nil {
		t.Error("a tenant's module was fetched for nobody")
	}
	var pe *submit.PublishError
	if _, err := p.FetchFor(t.Context(), "bob", "library/hello:1", dst, 10); !errors.As(err, &pe) || pe.Code != "module-too-large" {
		t.Errorf("%v", err)
	}
}

func TestARegistryWithPasswordsIsPushedToWithEachKindOfKeychain(t *testing.T) {
	host := registrytest.Start(t, "alice", "ses:ame")
	dir := t.TempDir()
	file := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	config := file("config.json", `{"auths": {"`+host+`": {"auth": "YWxpY2U6c2VzOmFtZQ=="}}}`)
	t.Setenv("DOCKER_CONFIG", dir)
	found, err := registry.DockerConfigFile()
	if err != nil || found != config {
		t.Fatalf("%s, %v", found, err)
	}
	broken := file("broken.json", `{"auths": {"`+host+`": {"username": "alice"}}}`)
	for name, tc := range map[string]struct {
		keychain authn.Keychain
		code     string
	}{
		"the Docker configuration": {registry.ConfigKeychain(found), ""},
		"a password file":          {registry.PasswordKeychain(host, file("password", "alice:ses:ame\n")), ""},
		"several":                  {authn.NewMultiKeychain(registry.PasswordKeychain("other.example.org", broken), registry.ConfigKeychain(config)), ""},
		"a wrong password":         {registry.PasswordKeychain(host, file("wrong", "alice:open\n")), "registry-refused"},
		"nothing":                  {nil, "registry-refused"},
		"a broken file":            {registry.ConfigKeychain(broken), "registry-refused"},
		"a missing file":           {registry.ConfigKeychain(filepath.Join(dir, "none")), "registry-refused"},
	} {
		t.Run(name, func(t *testing.T) {
			c := clientOf(t, host, func(o *registry.ClientOptions) { o.RegistryKeychain = tc.keychain })
			p := publisherOf(t, Options{Client: c, Tenants: true, DigestTags: true})
			m := moduleOf(t, 100_000, name)
			ref, err := m.publish(t.Context(), p, "team", "hello")
			var pe *submit.PublishError
			switch {
			case tc.code == "" && err != nil:
				t.Fatal(err)
			case tc.code != "":
				if !errors.As(err, &pe) || pe.Code != tc.code || pe.Retryable || strings.Contains(pe.Detail, "ses:ame") {
					t.Errorf("%v", err)
				}
				return
			}
			m.there(t, c, ref)
			_, digest, _ := strings.Cut(ref, "@")
			if a, err := c.Resolve(t.Context(), "functions/team/hello:"+registry.DigestTag(digest)); err != nil || a.Digest != digest {
				t.Errorf("under its tag there is %v, %v", a, err)
			}
		})
	}
}

// repositories is a Repositories whose registry makes none by itself.
type repositories struct {
	mu              sync.Mutex
	exists          map[string]bool
	ensured, forgot int
	err             error
}

func (r *repositories) Ensure(_ context.Context, _, repository string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ensured++
	if r.err == nil {
		r.exists[repository] = true
	}
	return r.err
}

func (r *repositories) Forget(_, _ string) { r.mu.Lock(); defer r.mu.Unlock(); r.forgot++ }

// strict answers for repositories that do not exist as ECR does.
func (r *repositories) strict(t testing.TB, upstream string) (host string) {
	_, inner := countedBefore(t, upstream)
	target := &url.URL{Scheme: "http", Host: inner}
	transport := &http.Transport{}
	t.Cleanup(transport.CloseIdleConnections)
	proxy := &httputil.ReverseProxy{Transport: transport, ErrorLog: quiet, Rewrite: func(p *httputil.ProxyRequest) { p.SetURL(target); p.Out.Host = p.In.Host }}
	return serve(t, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		repository, _, _ := strings.Cut(strings.TrimPrefix(req.URL.Path, "/v2/"), "/blobs/")
		repository, _, _ = strings.Cut(repository, "/manifests/")
		r.mu.Lock()
		there := repository == "" || r.exists[repository]
		r.mu.Unlock()
		if !there {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusNotFound)
			_, _ = w.Write([]byte(`{"errors":[{"code":"NAME_UNKNOWN","message":"The repository does not exist"}]}`))
			return
		}
		proxy.ServeHTTP(w, req)
	}))
}

type passing struct{ error }

func (passing) Temporary() bool { return true }

func TestARepositoryIsEnsuredBeforeAndOnceInThePush(t *testing.T) {
	upstream := embedded(t)
	m := moduleOf(t, 50_000, "ensured")
	try := func(t *testing.T, r *repositories, made Repositories) (ref string, c *registry.Client, err error) {
		c = clientOf(t, r.strict(t, upstream))
		ref, err = m.publish(t.Context(), publisherOf(t, Options{Client: c, Repositories: made}), "", "hello")
		return ref, c, err
	}
	t.Run("before", func(t *testing.T) {
		r := &repositories{exists: map[string]bool{}}
		ref, c, err := try(t, r, r)
		if err != nil || r.ensured != 1 || r.forgot != 0 {
			t.Fatalf("%v, ensured %d times, forgotten %d times", err, r.ensured, r.forgot)
		}
		m.there(t, c, ref)
	})
	t.Run("deleted behind our back", func(t *testing.T) {
		r := &repositories{exists: map[string]bool{}}
		// Remembered wrongly until it is forgotten.
		made := ensureFunc(func(ctx context.Context, host, repository string) error {
			if r.ensured++; r.ensured == 1 {
				return nil
			}
			return r.Ensure(ctx, host, repository)
		})
		ref, c, err := try(t, r, made)
		if err != nil {
			t.Fatal(err)
		}
		m.there(t, c, ref)
	})
	t.Run("never there", func(t *testing.T) {
		r := &repositories{exists: map[string]bool{}}
		calls := 0
		_, _, err := try(t, r, ensureFunc(func(context.Context, string, string) error { calls++; return nil }))
		var pe *submit.PublishError
		if !errors.As(err, &pe) || pe.Code != "registry-refused" || pe.Retryable || calls != 2 {
			t.Errorf("%v after %d calls", err, calls)
		}
	})
	t.Run("made by someone who lets us push alone", func(t *testing.T) {
		r := &repositories{exists: map[string]bool{"functions/hello": true}, err: errors.New("denied")}
		ref, c, err := try(t, r, r)
		if err != nil {
			t.Fatal(err)
		}
		m.there(t, c, ref)
	})
	for name, tc := range map[string]struct {
		err       error
		code      string
		retryable bool
	}{
		"denied":          {errors.New("allow ecr:CreateRepository to the role x"), "registry-refused", false},
		"its API is away": {passing{errors.New("ECR is unavailable")}, "registry-unavailable", true},
	} {
		t.Run(name, func(t *testing.T) {
			r := &repositories{exists: map[string]bool{}, err: tc.err}
			_, _, err := try(t, r, r)
			var pe *submit.PublishError
			if !errors.As(err, &pe) || pe.Code != tc.code || pe.Retryable != tc.retryable || !strings.Contains(pe.Detail, tc.err.Error()) {
				t.Errorf("%v", err)
			}
		})
	}
}

type ensureFunc func(ctx context.Context, host, repository string) error

func (f ensureFunc) Ensure(ctx context.Context, host, repository string) error {
	return f(ctx, host, repository)
}
func (ensureFunc) Forget(string, string) {}

func TestATagThatIsThereAlreadyIsNoObstacle(t *testing.T) {
	// A repository with immutable tags, and somebody who was faster by the
	// blink between our look and our push.
	upstream := embedded(t)
	fast := publisherOf(t, Options{Client: clientOf(t, upstream), DigestTags: true})
	m := moduleOf(t, 20_000, "raced")
	_, inner := countedBefore(t, upstream)
	target := &url.URL{Scheme: "http", Host: inner}
	transport := &http.Transport{}
	t.Cleanup(transport.CloseIdleConnections)
	proxy := &httputil.ReverseProxy{Transport: transport, ErrorLog: quiet, Rewrite: func(p *httputil.ProxyRequest) { p.SetURL(target); p.Out.Host = p.In.Host }}
	var refused atomic.Int64
	same := atomic.Bool{}
	host := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/manifests/") {
			if same.Load() {
				if _, err := m.publish(t.Context(), fast, "", "hello"); err != nil {
					t.Error(err)
				}
			}
			refused.Add(1)
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusBadRequest)
			_, _ = w.Write([]byte(`{"errors":[{"code":"TAG_INVALID","message":"the image tag already exists and cannot be overwritten because the tag is immutable"}]}`))
			return
		}
		proxy.ServeHTTP(w, r)
	}))
	p := publisherOf(t, Options{Client: clientOf(t, host), DigestTags: true})
	var pe *submit.PublishError
	if _, err := m.publish(t.Context(), p, "", "hello"); !errors.As(err, &pe) || pe.Code != "registry-refused" || pe.Retryable {
		t.Errorf("refused for good: %v", err)
	}
	same.Store(true)
	ref, err := m.publish(t.Context(), p, "", "hello")
	if err != nil || refused.Load() != 2 {
		t.Fatalf("%v after %d refusals", err, refused.Load())
	}
	m.there(t, p.o.Client, ref)
}

func TestProblemsAreThoseOfTheTable(t *testing.T) {
	known := map[string]bool{}
	for _, k := range submit.Problems() {
		known[k.Code] = true
	}
	for _, err := range []error{
		registry.ErrNotFound, registry.ErrDigestMismatch, registry.ErrUnauthorized, registry.ErrRefused, registry.ErrUnavailable,
		registry.ErrTooLarge, registry.ErrNotWasm, registry.ErrNoSpace, registry.ErrInvalidReference,
		&ensureError{errors.New("denied")}, &ensureError{passing{errors.New("away")}},
	} {
		problems := []error{pushProblem("functions/hello", err)}
		if _, unmade := err.(*ensureError); !unmade && !errors.Is(err, registry.ErrRefused) {
			problems = append(problems, fetchProblem(err))
		}
		for _, got := range problems {
			var pe *submit.PublishError
			if !errors.As(got, &pe) || !known[pe.Code] || !errors.Is(got, err) {
				t.Errorf("%v becomes %v", err, got)
			}
		}
	}
	for _, err := range []error{context.Canceled, context.DeadlineExceeded, errors.New("a bug")} {
		if pushProblem("x", err) != err || fetchProblem(err) != err {
			t.Errorf("%v became a problem of the registry", err)
		}
	}
}
