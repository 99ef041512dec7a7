package publish

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/hearth-sh/hearth/internal/registry"
	"github.com/hearth-sh/hearth/internal/registry/registrytest"
	"github.com/hearth-sh/hearth/internal/submit"
)

// saboteur stands before a real registry and breaks the requests it is told to.
type saboteur struct {
	mu          sync.Mutex
	kind        string
	first, last int // requests that are broken, counted from 1
	seen, hits  int
}

func (s *saboteur) arm(kind string, first, last int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.kind, s.first, s.last, s.seen, s.hits = kind, first, last, 0, 0
}

func (s *saboteur) next() (kind string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.seen++; s.seen < s.first || s.seen > s.last {
		return ""
	}
	s.hits++
	return s.kind
}

func (s *saboteur) counts() (seen, hits int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.seen, s.hits
}

// kinds of faults. Those after the line happen when the registry has already
// done what was asked.
var kinds = []string{
	"cut", "401", "403", "404", "413", "429", "500", "503", "redirect", "nonsense",
	// –
	"cut-after", "500-after", "truncated", "wrong-digest",
}

// theirs are those that a registry of another make is shown with as well.
var theirs = []string{"cut", "401", "429", "500", "503", "cut-after", "truncated", "wrong-digest"}

type sabotageKey struct{}

func sabotaged(t testing.TB, upstream string) (*saboteur, string) {
	t.Helper()
	s := &saboteur{}
	transport := &http.Transport{}
	t.Cleanup(transport.CloseIdleConnections)
	target := &url.URL{Scheme: "http", Host: upstream}
	elsewhere := serve(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusBadGateway) }))
	proxy := &httputil.ReverseProxy{
		Transport: transport, ErrorLog: quiet,
		Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(target); r.Out.Host = r.In.Host },
		ModifyResponse: func(resp *http.Response) error {
			switch kind, _ := resp.Request.Context().Value(sabotageKey{}).(string); kind {
			case "cut-after":
				return errors.New("cut")
			case "500-after":
				resp.StatusCode = http.StatusInternalServerError
			case "truncated":
				// Announces more than comes: the connection is cut in the middle.
				resp.Header.Set("Content-Length", "4096")
				resp.Body = io.NopCloser(io.MultiReader(resp.Body, strings.NewReader("{")))
			case "wrong-digest":
				if resp.Header.Get("Docker-Content-Digest") != "" {
					resp.Header.Set("Docker-Content-Digest", "sha256:"+strings.Repeat("0", 64))
				}
			}
			return nil
		},
		ErrorHandler: func(http.ResponseWriter, *http.Request, error) { panic(http.ErrAbortHandler) },
	}
	return s, serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		kind := s.next()
		switch kind {
		case "cut":
			panic(http.ErrAbortHandler)
		case "redirect":
			w.Header().Set("Location", "http://"+elsewhere+"/")
			w.WriteHeader(http.StatusTemporaryRedirect)
			return
		case "nonsense":
			_, _ = w.Write([]byte("<html>please log in</html>"))
			return
		case "503", "429":
			w.Header().Set("Retry-After", "0")
		}
		if code, err := strconv.Atoi(kind); err == nil {
			w.WriteHeader(code)
			return
		}
		proxy.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), sabotageKey{}, kind)))
	}))
}

// broken says whether a test breaks request k of steps in way i of kinds: the
// one that commits in every way, of the others each in some ways, and all with
// HEARTH_SOAK.
func broken(k, steps, i int) bool {
	return os.Getenv("HEARTH_SOAK") != "" || k == steps || k%sampled == i%sampled
}

// sampled is how many of the other requests there are for one that is broken.
const sampled = 5

// TestARegistryThatFailsAtAnyStepOfAPush breaks request k of a push, for every
// k, once and for good, in every way (see broken). Publish must succeed or say
// what happened, in a class; what it returned must be there; and a retry on the
// healthy registry must succeed.
func TestARegistryThatFailsAtAnyStepOfAPush(t *testing.T) {
	for name, start := range map[string]func(testing.TB) string{
		"embedded":        embedded,
		"docker-registry": func(t testing.TB) string { return registrytest.Start(t, "alice", "sesame") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			upstream := start(t)
			breaker, host := sabotaged(t, upstream)
			login := func(o *registry.ClientOptions) {
				if name == "docker-registry" {
					o.RegistryKeychain = registry.PasswordKeychain(o.Registry, passwordFile(t))
				}
			}
			healthy := clientOf(t, upstream, login)
			p := publisherOf(t, Options{Client: clientOf(t, host, login), Tenants: true, DigestTags: true})

			breaker.arm("", 0, 0)
			if _, err := moduleOf(t, 40_000, "steps").publish(t.Context(), p, "team", "steps"); err != nil {
				t.Fatal(err)
			}
			steps, _ := breaker.counts()
			if steps < 10 {
				t.Fatalf("a push has only %d requests; nothing is shown", steps)
			}
			outcomes := map[string]int{}
			for i, kind := range kinds {
				if name != "embedded" && !slices.Contains(theirs, kind) {
					continue
				}
				for k := 1; k <= steps; k++ {
					for what, last := range map[string]int{"once": k, "for good": 1 << 30} {
						// That a registry stays broken is the client's concern, and
						// fewer steps of one registry show it.
						if !broken(k, steps, i) || what != "once" && (name != "embedded" || k%3 != 1) {
							continue
						}
						step := fmt.Sprintf("%s in request %d of %d, %s", kind, k, steps, what)
						function := "f-" + strings.NewReplacer(" ", "-", ",", "").Replace(fmt.Sprintf("%s-%d-%s", kind, k, what))
						m := moduleOf(t, 40_000, step)
						breaker.arm(kind, k, last)
						ref, err := m.publish(t.Context(), p, "team", function)
						if _, hits := breaker.counts(); hits == 0 {
							t.Errorf("%s: nothing was broken", step)
						}
						breaker.arm("", 0, 0)
						var pe *submit.PublishError
						switch {
						case err == nil:
							outcomes[kind+" "+what+": succeeded"]++
							m.there(t, healthy, ref)
						case !errors.As(err, &pe):
							t.Errorf("%s: the error has no class: %v", step, err)
						default:
							outcomes[kind+" "+what+": "+pe.Code]++
							if want := retryables[pe.Code]; want != pe.Retryable {
								t.Errorf("%s: retryable %v: %v", step, pe.Retryable, err)
							}
						}
						if err != nil && what == "once" && !mayFailOnce[kind] {
							t.Errorf("%s: not survived: %v", step, err)
						}
						again, retried := m.publish(t.Context(), p, "team", function)
						switch {
						case retried != nil:
							t.Errorf("%s: the retry afterwards: %v", step, retried)
						case again != ref: // else it was looked at already
							m.there(t, healthy, again)
						}
					}
				}
			}
			for what, n := range outcomes {
				t.Logf("%3d times %s", n, what)
			}
		})
	}
}

// retryables are the classes that a fault may be given, and whether the same
// request may then succeed later.
var retryables = map[string]bool{
	"registry-unavailable": true, "registry-refused": false, "module-too-large": false, "digest-mismatch": false,
}

// mayFailOnce are answers that say that another attempt is of no use.
var mayFailOnce = map[string]bool{"401": true, "403": true, "404": true, "413": true}

func passwordFile(t testing.TB) string {
	t.Helper()
	return fileOf(t, "alice:sesame\n")
}
