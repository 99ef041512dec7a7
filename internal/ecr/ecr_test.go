package ecr_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"go.uber.org/goleak"

	"github.com/hearth-sh/hearth/internal/ecr"
	"github.com/hearth-sh/hearth/internal/ecr/mototest"
	"github.com/hearth-sh/hearth/internal/imds"
	"github.com/hearth-sh/hearth/internal/imds/imdstest"
	"github.com/hearth-sh/hearth/test/wallclock"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const host = "123456789012.dkr.ecr.eu-central-1.amazonaws.com"

// service answers GetAuthorizationToken as ECR does: the password is counted,
// so that a test sees which token it has. fault may answer instead.
type service struct {
	mu      sync.Mutex
	asked   int
	issued  int
	now     func() time.Time
	life    time.Duration
	fault   func(n int, w http.ResponseWriter, r *http.Request) bool
	headers []http.Header
	next    http.Handler // what answers instead of this, when there is one
}

func (s *service) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked++
	s.headers = append(s.headers, r.Header.Clone())
	if s.fault != nil && s.fault(s.asked, w, r) {
		return
	}
	if s.next != nil {
		s.next.ServeHTTP(w, r)
		return
	}
	s.issued++
	datum := map[string]any{
		"authorizationToken": base64.StdEncoding.EncodeToString(fmt.Appendf(nil, "AWS:token-%d", s.issued)),
		"expiresAt":          float64(s.now().Add(s.life).UnixMilli()) / 1000,
	}
	w.Header().Set("Content-Type", "application/x-amz-json-1.1")
	if strings.Contains(r.Header.Get("X-Amz-Target"), "SpencerFrontendService") { // ECR Public
		_ = json.NewEncoder(w).Encode(map[string]any{"authorizationData": datum})
		return
	}
	_ = json.NewEncoder(w).Encode(map[string]any{"authorizationData": []any{datum}})
}

func (s *service) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.asked
}

func refuse(status int, code string) func(http.ResponseWriter) {
	return func(w http.ResponseWriter) {
		w.Header().Set("Content-Type", "application/x-amz-json-1.1")
		w.WriteHeader(status)
		fmt.Fprintf(w, `{"__type": %q, "message": "as the test wants it"}`, code)
	}
}

// rig is a source with everything it talks to.
type rig struct {
	*ecr.Source
	service *service
	imds    *imdstest.Server
	log     *lines
	clock   func(time.Duration) // moves the source's time on
}

type lines struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *lines) Write(p []byte) (int, error) { l.mu.Lock(); defer l.mu.Unlock(); return l.b.Write(p) }
func (l *lines) String() string              { l.mu.Lock(); defer l.mu.Unlock(); return l.b.String() }

func newRig(t *testing.T, change ...func(*ecr.Options, *service)) *rig {
	t.Helper()
	var mu sync.Mutex
	now := time.Date(2026, 11, 22, 3, 0, 0, 0, time.UTC)
	clock := func() time.Time { mu.Lock(); defer mu.Unlock(); return now }
	s := &service{life: 12 * time.Hour, now: clock}
	web := httptest.NewServer(s)
	t.Cleanup(web.Close)
	t.Setenv("AWS_ENDPOINT_URL", web.URL)
	metadata := imdstest.New(imdstest.Default())
	client, err := imds.New(imds.Options{Endpoint: metadata.Start(t, "tcp4"), AttemptTimeout: 10 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	log := &lines{}
	o := ecr.Options{Metadata: client, Now: clock, Logger: slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug}))}
	for _, f := range change {
		f(&o, s)
	}
	source, err := ecr.New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(source.Close)
	t.Cleanup(func() {
		if strings.Contains(log.String(), "token-") || strings.Contains(log.String(), "secret") {
			t.Errorf("a secret was logged:\n%s", log)
		}
	})
	return &rig{source, s, metadata, log, func(d time.Duration) { mu.Lock(); defer mu.Unlock(); now = now.Add(d) }}
}

func (r *rig) want(t *testing.T, what, password string) ecr.Credentials {
	t.Helper()
	c, err := r.Credentials(t.Context(), host)
	if err != nil || c.Username != "AWS" || c.Password != password {
		t.Errorf("%s: %q %q, %v; want %q", what, c.Username, c.Password, err, password)
	}
	return c
}

func TestHosts(t *testing.T) {
	private := func(region string, fips, dual bool) ecr.Registry {
		return ecr.Registry{Account: "123456789012", Region: region, FIPS: fips, DualStack: dual}
	}
	for in, want := range map[string]ecr.Registry{
		host:          private("eu-central-1", false, false),
		host + ":443": private("eu-central-1", false, false),
		"123456789012.dkr.ecr-fips.us-gov-west-1.amazonaws.com":       private("us-gov-west-1", true, false),
		"123456789012.dkr-ecr.eu-central-1.on.aws":                    private("eu-central-1", false, true),
		"123456789012.dkr-ecr-fips.us-east-1.on.aws":                  private("us-east-1", true, true),
		"123456789012.dkr.ecr.cn-north-1.amazonaws.com.cn":            private("cn-north-1", false, false),
		"123456789012.dkr-ecr.cn-north-1.on.amazonwebservices.com.cn": private("cn-north-1", false, true),
		"123456789012.dkr.ecr.us-iso-east-1.c2s.ic.gov":               private("us-iso-east-1", false, false),
		"123456789012.dkr.ecr.us-isob-east-1.sc2s.sgov.gov":           private("us-isob-east-1", false, false),
		"123456789012.dkr.ecr.eu-isoe-west-1.cloud.adc-e.uk":          private("eu-isoe-west-1", false, false),
		"123456789012.dkr.ecr.us-isof-south-1.csp.hci.ic.gov":         private("us-isof-south-1", false, false),
		"123456789012.dkr.ecr.eusc-de-east-1.amazonaws.eu":            private("eusc-de-east-1", false, false),
		"public.ecr.aws":     {Region: "us-east-1", Public: true},
		"ecr-public.aws.com": {Region: "us-east-1", Public: true, DualStack: true},
	} {
		if got, ok := ecr.ParseHost(in); !ok || got != want {
			t.Errorf("%s: %+v, %v", in, got, ok)
		}
	}
	for _, in := range []string{
		"", "docker.io", "ecr.aws", "gallery.ecr.aws", "x.public.ecr.aws", host + ".evil.example", "evil.example/" + host, host + ":5000", host + "/x", "https://" + host,
		"12345678901.dkr.ecr.eu-central-1.amazonaws.com", "123456789012.dkr.ecr.eu-central-1.evil.amazonaws.com", "123456789012.dkr.ecr..amazonaws.com",
		"x123456789012.dkr.ecr.eu-central-1.amazonaws.com", "123456789012.dkr-ecr.eu-central-1.amazonaws.com", "123456789012.dkr.ecr.eu-central-1.on.aws",
		"123456789012.dkrXecr.eu-central-1.amazonaws.com", "123456789012.dkr.ecr.EU-CENTRAL-1.amazonaws.com", "123456789012.dkr.ecr.eu-central-1.amazonaws.com\n",
	} {
		if got, ok := ecr.ParseHost(in); ok {
			t.Errorf("%q was taken for %+v", in, got)
		}
	}
}

func FuzzParseHost(f *testing.F) {
	f.Add(host)
	f.Add("123456789012.dkr-ecr-fips.us-east-1.on.aws:443")
	f.Fuzz(func(t *testing.T, s string) {
		r, ok := ecr.ParseHost(s)
		if ok && !r.Public && (len(r.Account) != 12 || !strings.HasPrefix(s, r.Account+".dkr") || !strings.Contains(s, r.Region) || strings.ContainsAny(s, "/@ \n")) {
			t.Errorf("%q: %+v", s, r)
		}
	})
}

func TestMotoIssuesATokenForTheInstancesRole(t *testing.T) {
	backend, err := url.Parse(mototest.Start(t))
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	r := newRig(t, func(_ *ecr.Options, s *service) {
		s.next = &httputil.ReverseProxy{Rewrite: func(p *httputil.ProxyRequest) { p.SetURL(backend); p.Out.Host = p.In.Host }, Transport: transport}
	})
	c, err := r.Credentials(t.Context(), host)
	if err != nil || c.Username != "AWS" || c.Password != "123456789012-auth-token" {
		t.Fatalf("%q %q, %v", c.Username, c.Password, err)
	}
	// moto's tokens expired in 2015, which stands for a node's wrong clock.
	if !strings.Contains(r.log.String(), "clock") {
		t.Errorf("nothing was said of the clock: %s", r.log)
	}
	if _, err := r.Credentials(t.Context(), "210987654321.dkr.ecr.us-west-2.amazonaws.com"); err != nil {
		t.Error(err)
	}
	for i, region := range []string{"eu-central-1", "us-west-2"} {
		h := r.service.headers[i]
		if auth := h.Get("Authorization"); !strings.Contains(auth, "ASIAEXAMPLEEXAMPLE00") || !strings.Contains(auth, "/"+region+"/ecr/") {
			t.Errorf("not signed by the role for %s: %s", region, auth)
		}
		if h.Get("X-Amz-Security-Token") != "example-session-token" {
			t.Error("the role's session token is missing")
		}
	}
}

func TestATokenIsKeptForHalfItsLife(t *testing.T) {
	r := newRig(t)
	c := r.want(t, "first", "token-1")
	if d := c.Expires.Sub(time.Date(2026, 11, 22, 15, 0, 0, 0, time.UTC)); d != 0 {
		t.Errorf("expires %v too late", d)
	}
	r.clock(6*time.Hour - time.Second)
	r.want(t, "just before half", "token-1")
	r.clock(time.Second)
	r.want(t, "at half", "token-2")
	if _, err := r.Credentials(t.Context(), "210987654321.dkr.ecr.eu-central-1.amazonaws.com"); err != nil || r.service.count() != 3 {
		t.Errorf("another registry has no token of its own: %d, %v", r.service.count(), err)
	}
}

func TestATokenIsAsGoodAfterTheClockWasSet(t *testing.T) {
	for name, by := range map[string]time.Duration{"an hour forward": time.Hour, "a day forward": 24 * time.Hour, "a day back": -24 * time.Hour} {
		t.Run(name, func(t *testing.T) {
			began := time.Now()
			var passed, jump time.Duration
			r := newRig(t, func(o *ecr.Options, s *service) {
				o.Now = func() time.Time { return wallclock.Jumped(began.Add(passed), jump) }
				s.now = func() time.Time { return began.Add(passed) }
			})
			r.want(t, "first", "token-1")
			jump, passed = by, time.Hour
			r.want(t, "an hour later", "token-1")
			if n := r.service.count(); n != 1 {
				t.Errorf("asked %d times", n)
			}
			// Not to be given another does not make a good token a bad one.
			deny := refuse(403, "AccessDeniedException")
			r.service.fault = func(_ int, w http.ResponseWriter, _ *http.Request) bool { deny(w); return true }
			passed = 11 * time.Hour
			r.want(t, "an hour before its end", "token-1")
			passed = 12*time.Hour - time.Minute
			if _, err := r.Credentials(t.Context(), host); err == nil {
				t.Error("a token is handed out that ends within a minute")
			}
		})
	}
}

func TestAFailedRenewalUsesTheOldTokenOn(t *testing.T) {
	r := newRig(t)
	r.want(t, "first", "token-1")
	r.clock(6 * time.Hour)
	deny := refuse(403, "AccessDeniedException")
	r.service.fault = func(_ int, w http.ResponseWriter, _ *http.Request) bool { deny(w); return true }
	r.want(t, "renewal fails", "token-1")
	asked := r.service.count()
	r.want(t, "and is not repeated at once", "token-1")
	if n := r.service.count(); n != asked {
		t.Errorf("asked %d more times", n-asked)
	}
	r.clock(6*time.Hour - 4*time.Minute) // within the margin
	if _, err := r.Credentials(t.Context(), host); !errors.Is(err, ecr.ErrDenied) || !strings.Contains(err.Error(), "ecr:GetAuthorizationToken") {
		t.Errorf("%v", err)
	}
	r.service.fault = nil
	if _, err := r.Credentials(t.Context(), host); !errors.Is(err, ecr.ErrDenied) {
		t.Errorf("a failure was not repeated to the next caller: %v", err)
	}
	r.clock(10 * time.Second)
	r.want(t, "allowed again", "token-2")
}

func TestARejectedTokenIsReplacedExactlyOnce(t *testing.T) {
	r := newRig(t)
	c := r.want(t, "first", "token-1")
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			if !r.Invalidate(host, c) {
				t.Error("it is worth trying again")
			}
			if got, err := r.Credentials(t.Context(), host); err != nil || got.Password != "token-2" {
				t.Errorf("%q, %v", got.Password, err)
			}
		})
	}
	wg.Wait()
	if n := r.service.count(); n != 2 {
		t.Errorf("%d tokens were asked for, want 2", n)
	}
	c = r.want(t, "replaced", "token-2")
	if r.Invalidate(host, c) {
		t.Error("a third token would not be better than the second, which was rejected at once")
	}
	r.want(t, "rejected twice", "token-2")
	r.clock(2 * time.Minute)
	if !r.Invalidate(host, c) {
		t.Error("a rejection after some time is worth another token")
	}
	r.want(t, "rejected later", "token-3")
	if r.Invalidate("docker.io", c) {
		t.Error("a host that is not ECR's")
	}
}

func TestManyCallersShareOneToken(t *testing.T) {
	used := 0
	r := newRig(t, func(o *ecr.Options, _ *service) {
		o.FirstUse = func(_ context.Context, reg ecr.Registry) error {
			if used++; reg.Account != "123456789012" {
				t.Errorf("%+v", reg)
			}
			return nil
		}
	})
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() { r.want(t, "one of many", "token-1") })
	}
	wg.Wait()
	r.clock(7 * time.Hour)
	r.want(t, "renewed", "token-2")
	if n := r.service.count(); n != 2 || used != 1 {
		t.Errorf("asked %d times, first use %d times", n, used)
	}
}

func TestACallerThatLeavesDoesNotFailTheOthers(t *testing.T) {
	reached, release := make(chan struct{}), make(chan struct{})
	r := newRig(t, func(o *ecr.Options, _ *service) {
		first := true
		o.FirstUse = func(ctx context.Context, _ ecr.Registry) error {
			if !first {
				return nil
			}
			first = false
			close(reached)
			<-ctx.Done()
			<-release
			return ctx.Err()
		}
	})
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := r.Credentials(ctx, host); !errors.Is(err, context.Canceled) {
			t.Errorf("%v", err)
		}
	})
	<-reached
	cancel()
	waiting, leave := context.WithCancel(t.Context())
	leave()
	if _, err := r.Credentials(waiting, host); !errors.Is(err, context.Canceled) {
		t.Errorf("a caller in the queue was not let go: %v", err)
	}
	wg.Go(func() { r.want(t, "the next one", "token-1") })
	close(release)
	wg.Wait()
}

func TestFaultsOfTheService(t *testing.T) {
	for name, tc := range map[string]struct {
		fault  func(http.ResponseWriter)
		times  int
		err    error // nil: survived
		asked  int
		tokens int // of the role
	}{
		"throttled twice":             {refuse(400, "ThrottlingException"), 2, nil, 3, 1},
		"429 once":                    {refuse(429, "TooManyRequestsException"), 1, nil, 2, 1},
		"500 once":                    {refuse(500, "ServerException"), 1, nil, 2, 1},
		"denied":                      {refuse(403, "AccessDeniedException"), 99, ecr.ErrDenied, 1, 1},
		"the role's credentials aged": {refuse(403, "ExpiredTokenException"), 1, nil, 2, 2},
		"and age for ever":            {refuse(403, "ExpiredTokenException"), 99, ecr.ErrDenied, 2, 2},
		"an answer without a token":   {func(w http.ResponseWriter) { fmt.Fprint(w, `{"authorizationData": []}`) }, 99, ecr.ErrMalformed, 1, 1},
		"a token that is not base64": {func(w http.ResponseWriter) {
			fmt.Fprint(w, `{"authorizationData": [{"authorizationToken": "token-!"}]}`)
		}, 99, ecr.ErrMalformed, 1, 1},
		"a token without a password": {func(w http.ResponseWriter) {
			fmt.Fprint(w, `{"authorizationData": [{"authorizationToken": "QVdTOg=="}]}`)
		}, 99, ecr.ErrMalformed, 1, 1},
		"a token with a header inside": {func(w http.ResponseWriter) {
			fmt.Fprint(w, `{"authorizationData": [{"authorizationToken": "QVdTOmENCmI6Yw=="}]}`)
		}, 99, ecr.ErrMalformed, 1, 1},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			r.service.fault = func(n int, w http.ResponseWriter, _ *http.Request) bool {
				if n > tc.times {
					return false
				}
				tc.fault(w)
				return true
			}
			c, err := r.Credentials(t.Context(), host)
			if !errors.Is(err, tc.err) || tc.err == nil && c.Password != "token-1" {
				t.Errorf("%q, %v", c.Password, err)
			}
			if err != nil && (strings.Contains(err.Error(), "token-") || strings.Contains(err.Error(), "\n")) {
				t.Errorf("%q", err)
			}
			if n := r.service.count(); n != tc.asked {
				t.Errorf("asked %d times, want %d", n, tc.asked)
			}
			if n := r.imds.Count("GET", "meta-data/iam/security-credentials/hearth-node"); n != tc.tokens {
				t.Errorf("the role's credentials were read %d times, want %d", n, tc.tokens)
			}
		})
	}
}

func TestAnInstanceWithoutARoleIsToldSo(t *testing.T) {
	r := newRig(t)
	r.imds.Update(func(c *imdstest.Config) { c.Role = "" })
	_, err := r.Credentials(t.Context(), host)
	if !errors.Is(err, ecr.ErrUnavailable) || !errors.Is(err, imds.ErrNotFound) || !strings.Contains(err.Error(), "attach an instance profile") {
		t.Errorf("%v", err)
	}
}

func TestJitterSpreadsFirstUses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		wait := ecr.Jitter(time.Minute)
		distinct := map[time.Duration]bool{}
		for range 50 {
			began := time.Now()
			if err := wait(t.Context(), ecr.Registry{}); err != nil {
				t.Fatal(err)
			}
			d := time.Since(began)
			if d >= time.Minute {
				t.Errorf("waited %v", d)
			}
			distinct[d] = true
		}
		if len(distinct) < 25 {
			t.Errorf("only %d different waits", len(distinct))
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := wait(ctx, ecr.Registry{}); !errors.Is(err, context.Canceled) {
			t.Errorf("%v", err)
		}
	})
}

func TestUnreachableMetadataIsToldSo(t *testing.T) {
	r := newRig(t)
	r.imds.Update(func(c *imdstest.Config) { c.Disabled = true })
	_, err := r.Credentials(t.Context(), host)
	if !errors.Is(err, ecr.ErrUnavailable) || !errors.Is(err, imds.ErrDisabled) || !strings.Contains(err.Error(), "HttpEndpoint") {
		t.Errorf("%v", err)
	}
}

func TestCredentialsHideTheirPassword(t *testing.T) {
	c := ecr.Credentials{Username: "AWS", Password: "hunter2", Expires: time.Now()}
	out := &lines{}
	slog.New(slog.NewTextHandler(out, nil)).Info("x", "c", c, "p", &c)
	slog.New(slog.NewJSONHandler(out, nil)).Info("x", "c", c, "in", struct{ C ecr.Credentials }{c})
	text := out.String() + fmt.Sprintf("%v %+v %#v %s", c, c, c, c)
	if strings.Contains(text, "hunter2") {
		t.Error(text)
	}
}

func TestTheKeychainOpensARegistry(t *testing.T) {
	r := newRig(t)
	for _, image := range []string{"docker.io/library/alpine", "localhost:5000/x"} {
		ref, err := name.ParseReference(image)
		if err != nil {
			t.Fatal(err)
		}
		if a, err := r.Keychain().Resolve(ref.Context()); err != nil || a != authn.Anonymous {
			t.Errorf("%s: %v, %v", image, a, err)
		}
	}
	// A real client pushes to and pulls from a real registry that asks for the
	// password as ECR does, and finds it at ECR's name.
	var mu sync.Mutex
	password := "token-1"
	inner := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	web := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		if user, pass, _ := req.BasicAuth(); user != "AWS" || pass != password {
			w.Header().Set("WWW-Authenticate", `Basic realm="https://`+host+`/",service="ecr.amazonaws.com"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		inner.ServeHTTP(w, req)
	}))
	defer web.Close()
	client := web.Client().Transport.(*http.Transport).Clone()
	client.DialContext = func(ctx context.Context, network, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, network, web.Listener.Addr().String())
	}
	client.TLSClientConfig.ServerName = "example.com" // httptest's certificate
	defer client.CloseIdleConnections()
	ref, err := name.ParseReference(host + "/functions/hello:v1")
	if err != nil {
		t.Fatal(err)
	}
	image, err := random.Image(1024, 1)
	if err != nil {
		t.Fatal(err)
	}
	options := []remote.Option{remote.WithAuthFromKeychain(r.Keychain()), remote.WithTransport(client), remote.WithContext(t.Context())}
	if err := remote.Write(ref, image, options...); err != nil {
		t.Fatal(err)
	}
	puller, err := remote.NewPuller(options...)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := puller.Get(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	// A puller that lives longer than its token goes on with the next.
	mu.Lock()
	password = "token-2"
	mu.Unlock()
	r.clock(7 * time.Hour)
	if _, err := puller.Get(t.Context(), ref); err != nil {
		t.Errorf("after the token was renewed: %v", err)
	}
}

func TestThePublicGalleryIsUsedAnonymouslyWithoutPermission(t *testing.T) {
	r := newRig(t)
	ref, err := name.ParseReference("public.ecr.aws/docker/library/alpine:3")
	if err != nil {
		t.Fatal(err)
	}
	auth, err := r.Keychain().Resolve(ref.Context())
	if err != nil {
		t.Fatal(err)
	}
	if got, err := authn.Authorization(t.Context(), auth); err != nil || got.Password != "token-1" {
		t.Errorf("%v, %v", got, err)
	}
	if !strings.Contains(r.service.headers[0].Get("Authorization"), "/us-east-1/ecr-public/") {
		t.Error("not asked in us-east-1")
	}
	deny := refuse(403, "AccessDeniedException")
	r2 := newRig(t, func(_ *ecr.Options, s *service) {
		s.fault = func(_ int, w http.ResponseWriter, _ *http.Request) bool { deny(w); return true }
	})
	auth, err = r2.Keychain().Resolve(ref.Context())
	if err != nil {
		t.Fatal(err)
	}
	if got, err := authn.Authorization(t.Context(), auth); err != nil || *got != (authn.AuthConfig{}) {
		t.Errorf("%v, %v", got, err)
	}
}
