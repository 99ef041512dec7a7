package prefetch

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"log"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/engine/control"
	"github.com/hearth-sh/hearth/internal/precompile"
)

// authority signs certificates for servers.
type authority struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
	pem  []byte
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "authority"}, IsCA: true,
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{key, cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}
}

func (a *authority) sign(t *testing.T, name string) *tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}, a.cert, key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// remoteAPI is an API of a cluster on one machine.
type remoteAPI struct {
	server *httptest.Server
	// certificate is what it shows.
	certificate atomic.Pointer[tls.Certificate]
	dials       atomic.Int32

	mu      sync.Mutex
	token   string
	answer  func(w http.ResponseWriter, r *http.Request)
	reports []v1alpha1.NodeReport
}

const apiServerName = "hearth-api.hearth-system.svc"

func newRemoteAPI(t *testing.T, a *authority) *remoteAPI {
	t.Helper()
	api := &remoteAPI{token: "first-token"}
	api.certificate.Store(a.sign(t, apiServerName))
	api.desire(v1alpha1.Desired{Generation: 7, Functions: []v1alpha1.DesiredFunction{{Name: "a", Tenant: "team"}}})
	mux := http.NewServeMux()
	authorized := func(next http.HandlerFunc) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			api.mu.Lock()
			token := api.token
			api.mu.Unlock()
			if r.Header.Get("Authorization") != "Bearer "+token {
				w.WriteHeader(http.StatusUnauthorized)
				_ = json.NewEncoder(w).Encode(v1alpha1.Problem{Title: "Token refused", Detail: "token is expired"})
				return
			}
			next(w, r)
		}
	}
	mux.HandleFunc("GET /node/v1/desired", authorized(func(w http.ResponseWriter, r *http.Request) {
		api.mu.Lock()
		answer := api.answer
		api.mu.Unlock()
		answer(w, r)
	}))
	mux.HandleFunc("POST /node/v1/report", authorized(func(w http.ResponseWriter, r *http.Request) {
		var report v1alpha1.NodeReport
		if err := json.NewDecoder(r.Body).Decode(&report); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		api.mu.Lock()
		api.reports = append(api.reports, report)
		api.mu.Unlock()
		w.WriteHeader(http.StatusNoContent)
	}))
	api.server = httptest.NewUnstartedServer(mux)
	api.server.Config.ErrorLog = log.New(io.Discard, "", 0)
	api.server.TLS = &tls.Config{GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		api.dials.Add(1)
		return api.certificate.Load(), nil
	}}
	api.server.StartTLS()
	t.Cleanup(api.server.Close)
	return api
}

func (a *remoteAPI) desire(d v1alpha1.Desired) {
	a.respond(func(w http.ResponseWriter, _ *http.Request) { _ = json.NewEncoder(w).Encode(d) })
}

func (a *remoteAPI) respond(answer func(http.ResponseWriter, *http.Request)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.answer = answer
}

// client makes a client whose token is in the file it returns.
func (a *remoteAPI) client(t *testing.T, certificates func(context.Context) ([]byte, error)) (*APIClient, string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte("first-token\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := NewRemoteAPIClient(RemoteOptions{URL: a.server.URL, TokenFile: file, ServerName: apiServerName, Authority: certificates})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c, file
}

func TestRemoteAPIIsAskedWithTheTokenOfTheMoment(t *testing.T) {
	signer := newAuthority(t)
	api := newRemoteAPI(t, signer)
	c, file := api.client(t, func(context.Context) ([]byte, error) { return signer.pem, nil })
	d, err := c.Desired(t.Context(), 0)
	if err != nil || d.Generation != 7 || len(d.Functions) != 1 || d.Functions[0].Name != "a" {
		t.Fatalf("%+v, %v", d, err)
	}
	if err := c.Report(t.Context(), v1alpha1.NodeReport{Node: "n", Generation: 7}); err != nil || len(api.reports) != 1 || api.reports[0].Node != "n" {
		t.Errorf("%+v, %v", api.reports, err)
	}

	api.mu.Lock()
	api.token = "second-token"
	api.mu.Unlock()
	_, err = c.Desired(t.Context(), 0)
	if err == nil || !strings.Contains(err.Error(), "does not take this node's token") || !strings.Contains(err.Error(), "token is expired") {
		t.Errorf("a refused token: %v", err)
	}
	// As the kubelet does: a new file in the place of the old one.
	if err := os.WriteFile(file+".new", []byte("second-token"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(file+".new", file); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Desired(t.Context(), 0); err != nil {
		t.Errorf("with the renewed token: %v", err)
	}

	for content, want := range map[string]string{"": "holds no token", "two words": "holds no token"} {
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Desired(t.Context(), 0); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("token %q: %v", content, err)
		}
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Desired(t.Context(), 0); err == nil || !strings.Contains(err.Error(), "projected") {
		t.Errorf("without a token: %v", err)
	}
}

func TestRemoteAPIsAuthorityMayBeReplaced(t *testing.T) {
	signer := newAuthority(t)
	api := newRemoteAPI(t, signer)
	var asked atomic.Int32
	var current atomic.Pointer[authority]
	current.Store(signer)
	c, _ := api.client(t, nil)
	dialer := &verifyingDialer{name: apiServerName, authority: func(context.Context) ([]byte, error) {
		asked.Add(1)
		return current.Load().pem, nil
	}}
	c.http.Transport.(*http.Transport).DialTLSContext = dialer.dial
	ask := func() error {
		c.Close() // or the connection stays
		_, err := c.Desired(t.Context(), 0)
		return err
	}
	for range 3 {
		if err := ask(); err != nil {
			t.Fatal(err)
		}
	}
	if asked.Load() != 1 {
		t.Errorf("asked %d times for what did not change", asked.Load())
	}
	next := newAuthority(t)
	api.certificate.Store(next.sign(t, apiServerName))
	if err := ask(); err == nil || !strings.Contains(err.Error(), "not to be trusted") {
		t.Errorf("an authority that nobody named: %v", err)
	}
	current.Store(next)
	if err := ask(); err != nil {
		t.Errorf("after the authority was replaced: %v", err)
	}
	// For another name, it is not asked for at every attempt.
	dialer.pause = time.Hour
	api.certificate.Store(next.sign(t, "other.example.com"))
	before := asked.Load()
	for range 5 {
		if err := ask(); err == nil {
			t.Error("a certificate for another name is taken")
		}
	}
	if asked.Load() != before {
		t.Errorf("asked %d times in a row", asked.Load()-before)
	}

	// The API server does not say yet.
	fresh, _ := api.client(t, func(context.Context) ([]byte, error) { return nil, errors.New("the API server is away") })
	if _, err := fresh.Desired(t.Context(), 0); err == nil || !strings.Contains(err.Error(), "API server is away") {
		t.Errorf("%v", err)
	}
	garbage, _ := api.client(t, func(context.Context) ([]byte, error) { return []byte("no PEM"), nil })
	if _, err := garbage.Desired(t.Context(), 0); err == nil || !strings.Contains(err.Error(), "no certificate") {
		t.Errorf("%v", err)
	}
	own, _ := api.client(t, nil)
	if _, err := own.Desired(t.Context(), 0); err == nil {
		t.Error("an authority that the machine does not know is trusted")
	}
}

func TestRemoteAPIsGarbageIsNoDesiredState(t *testing.T) {
	signer := newAuthority(t)
	api := newRemoteAPI(t, signer)
	c, _ := api.client(t, func(context.Context) ([]byte, error) { return signer.pem, nil })
	var elsewhere atomic.Int32
	other := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { elsewhere.Add(1) }))
	t.Cleanup(other.Close)
	for name, test := range map[string]struct {
		answer func(http.ResponseWriter, *http.Request)
		want   string
	}{
		"empty":      {func(http.ResponseWriter, *http.Request) {}, "no desired state"},
		"null":       {func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "null") }, "no desired state"},
		"other JSON": {func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, `{"kind":"Status"}`) }, "no desired state"},
		"HTML":       {func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "<html>") }, "no desired state"},
		"half": {func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, `{"generation":1,"functions":[{`)
		}, "no desired state"},
		"redirect":     {func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, other.URL, http.StatusFound) }, "302"},
		"other node":   {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusForbidden) }, "may not speak for it"},
		"unavailable":  {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) }, "503"},
		"ends halfway": {func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, "EOF"},
	} {
		api.respond(test.answer)
		if d, err := c.Desired(t.Context(), 0); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %+v, %v", name, d, err)
		}
	}
	if elsewhere.Load() != 0 {
		t.Error("a redirection was followed, with the token")
	}
}

func TestRemoteOptionsAreChecked(t *testing.T) {
	for _, o := range []RemoteOptions{
		{}, {URL: "https://api:443"}, {URL: "http://api:443", TokenFile: "t"}, {URL: "api:443", TokenFile: "t"},
		{URL: "https://", TokenFile: "t"}, {URL: "https://api/path", TokenFile: "t"}, {URL: "https://u:p@api", TokenFile: "t"}, {URL: "https://a pi", TokenFile: "t"},
	} {
		if _, err := NewRemoteAPIClient(o); err == nil {
			t.Errorf("accepted %+v", o)
		}
	}
}

// The loop with the real client: what was served is served again by an agent
// that starts while the API is away, or answers nonsense.
func TestNodeServesWhatItServedWhileTheRemoteAPIIsAway(t *testing.T) {
	signer := newAuthority(t)
	api := newRemoteAPI(t, signer)
	w := newWorld(t)
	w.objects[digestOf("a", 1)] = precompile.ObjectRef{ID: "object-a", Dir: "/objects/a"}
	c, _ := api.client(t, func(context.Context) ([]byte, error) { return signer.pem, nil })
	dir := t.TempDir()
	start := func() (*Loop, func()) {
		l, err := New(Options{Source: c, Reporter: c, Puller: w, Store: w, Engine: w, Node: "n1", TempDir: dir, CachePath: filepath.Join(dir, "desired.json"), Fleet: true})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- l.Run(ctx) }()
		return l, func() { cancel(); <-done }
	}
	until := func(what string, ok func() bool) {
		t.Helper()
		for deadline := time.Now().Add(2 * time.Minute); !ok(); time.Sleep(5 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("never: " + what)
			}
		}
	}
	api.respond(func(rw http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(rw, "<html>") })
	l, stop := start()
	until("the failure is seen", func() bool { return l.Status().API.Error != "" })
	if l.Status().Known {
		t.Error("something is wanted although nobody said so")
	}
	stop()

	d := v1alpha1.Desired{Generation: 9, BaseDomain: "fn.example.org", Functions: []v1alpha1.DesiredFunction{want("a", 1)}}
	api.respond(func(rw http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("after") == "9" {
			<-r.Context().Done() // held
			return
		}
		_ = json.NewEncoder(rw).Encode(d)
	})
	_, stop = start()
	until("it is served", func() bool { return w.engineHas("a") == 1 })
	until("and reported", func() bool {
		api.mu.Lock()
		defer api.mu.Unlock()
		n := len(api.reports)
		return n > 0 && len(api.reports[n-1].Functions) == 1 && api.reports[n-1].Functions[0].Serving == 1
	})
	stop()

	api.server.Close()
	w.restartEngine()
	l, stop = start()
	until("it is served from memory", func() bool { return w.engineHas("a") == 1 })
	until("the failure is seen", func() bool { return l.Status().API.Error != "" })
	if s := l.Status(); !s.FromCache || s.API.OK || w.state.BaseDomain != "fn.example.org" {
		t.Errorf("%+v, base %q", s, w.state.BaseDomain)
	}
	stop()
}

func TestPeersAndRoutesReachTheEngineAndReloadNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		_, stop := w.run()
		defer stop()
		here := want("here", 1)
		here.Routes = []v1alpha1.HostRoute{{Host: "shop.example.com", Path: "/"}}
		coming := want("coming", 1)
		coming.Peers = []string{"10.0.0.9:8080"}
		block := make(chan struct{})
		w.pullBlock[digestOf("coming", 1)] = block
		elsewhere := v1alpha1.DesiredFunction{Name: "elsewhere", Tenant: "default", Peers: []string{"10.0.0.8:8080"}, TimeoutMS: 700}
		nowhere := v1alpha1.DesiredFunction{Name: "nowhere", Tenant: "default"}
		submit := func() {
			w.do(func() {
				w.desired = v1alpha1.Desired{Generation: w.desired.Generation + 1, BaseDomain: "fn.example.org",
					Functions: []v1alpha1.DesiredFunction{here, coming, elsewhere, nowhere}}
			})
			settle(0)
		}
		submit()
		s := w.state
		if s.BaseDomain != "fn.example.org" || len(s.Functions) != 1 || len(s.Functions[0].Routes) != 1 {
			t.Errorf("%+v", s)
		}
		wantPending := []control.Pending{
			{Name: "coming", Tenant: "default", TimeoutMS: 1000, Reach: control.Reach{Peers: coming.Peers}},
			{Name: "elsewhere", Tenant: "default", TimeoutMS: 700, Reach: control.Reach{Peers: elsewhere.Peers}},
			{Name: "nowhere", Tenant: "default"},
		}
		if d := cmp.Diff(wantPending, s.Pending); d != "" {
			t.Error(d)
		}
		if raw, _ := json.Marshal(s.Pending); strings.Contains(string(raw), secretValue) {
			t.Error("a secret is where only peers should be")
		}
		if n := len(w.reports[len(w.reports)-1].Functions); n != 2 {
			t.Errorf("%d functions in the report", n)
		}

		// Peers come and go: the engine is told, in no new generation, and no
		// function seems to be loaded again.
		generation, puts, reports := w.state.Generation, w.puts, len(w.reports)
		here.Peers, elsewhere.Peers = []string{"10.0.0.7:8080"}, nil
		submit()
		if w.state.Generation != generation || w.puts != puts+1 || len(w.state.Functions[0].Peers) != 1 || w.state.Pending[1].Peers != nil {
			t.Errorf("%d puts: %+v", w.puts-puts, w.state)
		}
		for _, r := range w.reports[reports:] {
			for _, f := range r.Functions {
				if f.Name == "here" && f.Progress != v1alpha1.ProgressReady {
					t.Errorf("reported as %s", f.Progress)
				}
			}
		}
		close(block)
		settle(0)
		if w.engineHas("coming") != 1 || len(w.state.Pending) != 2 || w.state.Generation == generation {
			t.Errorf("%+v", w.state)
		}
	})
}

func TestTheEngineIsToldWhenNobodyKnowsWhatChanged(t *testing.T) {
	cache := filepath.Join(t.TempDir(), "desired.json")
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		withCache := func(o *Options) { o.CachePath = cache }
		_, stop := w.run(withCache)
		// The loop goes on by itself between two looks.
		told := func() (s control.State, puts int, outOfTouch bool) {
			w.mu.Lock()
			defer w.mu.Unlock()
			return w.state, w.puts, w.outOfTouch
		}
		w.do(func() {
			w.desired = v1alpha1.Desired{Generation: 1, Functions: []v1alpha1.DesiredFunction{want("a", 1)}, Gateways: []string{"10.0.0.9:8080"}}
		})
		settle(0)
		first, puts, _ := told()
		if first.Stale || len(first.Gateways) != 1 {
			t.Errorf("%+v", first)
		}
		// Replicas of the API are replaced sooner than that.
		w.do(func() { w.apiErr = errors.New("connection refused") })
		settle(sourceGrace - tick)
		if s, _, _ := told(); s.Stale {
			t.Error("told too early")
		}
		settle(3 * tick)
		if s, n, _ := told(); !s.Stale || s.Generation != first.Generation || n != puts+1 {
			t.Errorf("%d puts, %+v", n-puts, s)
		}
		// An engine that says it is out of touch is not told the same again and again.
		w.do(func() { w.outOfTouch = true; w.version++ })
		settle(time.Minute)
		if _, n, _ := told(); n != puts+1 {
			t.Errorf("%d puts", n-puts)
		}
		w.do(func() { w.apiErr = nil; w.outOfTouch = false })
		settle(time.Minute)
		if s, n, _ := told(); s.Stale || n != puts+2 {
			t.Errorf("%d puts, %+v", n-puts, s)
		}
		// As after a pause of this process.
		w.do(func() { w.outOfTouch = true; w.version++ })
		settle(0)
		if s, n, lost := told(); n != puts+3 || s.Generation != first.Generation || lost {
			t.Errorf("%d puts, %+v", n-puts, s)
		}
		stop()

		// What was kept from before is stale until the API answers.
		w.do(func() { w.apiErr = errors.New("connection refused"); w.state = control.State{} })
		_, stop = w.run(withCache)
		defer stop()
		settle(0)
		if s, _, _ := told(); !s.Stale || len(s.Functions) != 1 || len(s.Gateways) != 1 {
			t.Errorf("%+v", s)
		}
		w.do(func() { w.apiErr = nil })
		settle(tick)
		if s, _, _ := told(); s.Stale {
			t.Error("still stale")
		}
	})
}

func TestReportOfAFleetComesAgainNowAndThen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		_, stop := w.run(func(o *Options) { o.Fleet = true })
		defer stop()
		w.submit(want("a", 1))
		settle(time.Second)
		count := func() int {
			w.mu.Lock()
			defer w.mu.Unlock()
			return len(w.reports)
		}
		n := count()
		settle(time.Hour)
		if again := count() - n; again < 20 || again > 45 {
			t.Errorf("%d reports in an hour without a change", again)
		}
	})
}
