package join

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
	"github.com/hearth-sh/hearth/internal/k3s/pki"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func (s *supervisor) options(server bool) Options {
	o := Options{
		Servers: []string{s.host}, ServerCA: s.authorities.ServerCA(), AgentToken: s.agent, NodeName: "i-9", NodePassword: Password{"0123456789abcdef"},
		Version: "v1.36.2+k3s1", Timeout: 10 * time.Second, Grace: 300 * time.Millisecond,
	}
	if server {
		o.ServerToken = s.server
	}
	return o
}

func TestAgentsAndServersPassAServerThatIsReady(t *testing.T) {
	for _, server := range []bool{false, true} {
		t.Run(fmt.Sprintf("server %t", server), func(t *testing.T) {
			s := start(t, newCluster(t), leafOptions{})
			got, err := Preflight(t.Context(), s.options(server))
			if err != nil {
				t.Fatal(err)
			}
			if got.Server != s.url || got.Version != "v1.36.2+k3s1" || got.Rounds != 1 || server != (got.Members == 1) {
				t.Errorf("got %+v", got)
			}
			if s.passwords["i-9"] != "0123456789abcdef" {
				t.Errorf("the server knows %v", s.passwords)
			}
		})
	}
}

// TestEveryFailureIsClassified has what cannot pass by itself, and must end at
// once, and what can, and must be tried until the time is up.
func TestEveryFailureIsClassified(t *testing.T) {
	answer := func(code int, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code); _, _ = io.WriteString(w, body) }
	}
	stranger := newCluster(t)
	for name, c := range map[string]struct {
		leaf    leafOptions
		server  bool
		set     func(s *supervisor, o *Options)
		code    fault.Code
		passing bool
		says    string
		silent  bool // no token may be sent
	}{
		"the name does not resolve":        {set: func(_ *supervisor, o *Options) { o.Servers = []string{"nowhere.invalid"} }, code: CodeDNS, passing: true, says: "nowhere.invalid"},
		"nothing listens":                  {set: func(_ *supervisor, o *Options) { o.Servers = []string{unused(t)} }, code: CodeRefused, passing: true, says: "systemctl status k3s"},
		"the server is of another cluster": {leaf: leafOptions{by: stranger}, code: CodeCAMismatch, says: "no token was sent", silent: true},
		"the CA is right and /cacerts is not": {set: func(s *supervisor, _ *Options) {
			s.override["/cacerts"] = answer(200, string(stranger.authorities.ServerCA()))
		}, code: CodeCAMismatch, silent: true},
		"the certificate is for another name": {leaf: leafOptions{name: "10.1.2.3"}, code: CodeServerName, says: "tls-san", silent: true},
		"the certificate has expired":         {leaf: leafOptions{begin: -2 * time.Hour, expire: -time.Hour}, code: CodeClock, says: "clock", silent: true},
		"the certificate is not valid yet":    {leaf: leafOptions{begin: time.Hour, expire: 2 * time.Hour}, code: CodeClock, says: "clock", silent: true},
		"another service answers":             {set: func(s *supervisor, _ *Options) { s.override["/ping"] = answer(404, "<html>") }, code: CodeNotK3s, says: "<html>", silent: true},
		"a redirect is not followed": {set: func(s *supervisor, _ *Options) {
			s.override["/ping"] = func(w http.ResponseWriter, r *http.Request) {
				http.Redirect(w, r, "https://example.invalid/", http.StatusFound)
			}
		}, code: CodeNotK3s, silent: true},
		"an endless answer": {set: func(s *supervisor, _ *Options) {
			s.override["/cacerts"] = answer(200, strings.Repeat("x", maxBodyBytes+1))
		}, code: CodeNotK3s, silent: true},
		"the agent token is wrong":         {set: func(s *supervisor, o *Options) { o.AgentToken = forge(t, s.authorities, pki.UserNode) }, code: CodeBadToken, says: "node token"},
		"the server token is wrong":        {server: true, set: func(s *supervisor, o *Options) { o.ServerToken = forge(t, s.authorities, pki.UserServer) }, code: CodeBadToken, says: "server token"},
		"the token may not do this":        {set: func(s *supervisor, _ *Options) { s.override["/v1-k3s/readyz"] = answer(403, "forbidden") }, code: CodeTokenRole},
		"the API server is not ready":      {set: func(s *supervisor, _ *Options) { s.notReady = true }, code: CodeNotReady, passing: true, says: "runtime core not ready"},
		"the server is overloaded":         {set: func(s *supervisor, _ *Options) { s.override["/v1-k3s/readyz"] = answer(429, "Too many requests") }, code: CodeNotReady, passing: true},
		"etcd does not answer":             {server: true, set: func(s *supervisor, _ *Options) { s.members = []map[string]any{{"name": "i-1-0a1b2c3d"}} }, code: CodeNotReady, passing: true, says: "etcd does not answer"},
		"the cluster has no embedded etcd": {server: true, set: func(s *supervisor, _ *Options) { s.noEtcd = true }, code: CodeRejected, says: "cluster-init"},
		"the member list is garbage":       {server: true, set: func(s *supervisor, _ *Options) { s.override["/db/info"] = answer(200, "<html>") }, code: CodeNotK3s},
		"etcd takes in another server": {server: true, set: func(s *supervisor, _ *Options) {
			s.members = []map[string]any{{"ID": 1, "name": "i-1-0a1b2c3d"}, {"ID": 2, "name": "i-2-0a1b2c3d", "isLearner": true}}
		}, code: CodeLearner, passing: true, says: "i-2"},
		"a member has the node's name": {server: true, set: func(s *supervisor, _ *Options) {
			s.members = []map[string]any{{"ID": 1, "name": "i-1-0a1b2c3d"}, {"ID": 2, "name": "i-9-0a1b2c3d"}}
		}, code: CodeNodeClash, says: "kubectl delete node i-9"},
		"another machine has the node's name": {set: func(s *supervisor, _ *Options) { s.passwords["i-9"] = "another" }, code: CodeNodeClash, says: "i-9.node-password.k3s"},
		"the request is rejected": {set: func(s *supervisor, _ *Options) {
			s.override["/v1-k3s/client-kubelet.crt"] = answer(400, `{"message":"because"}`)
		}, code: CodeRejected, says: "because"},
		"the certificate is garbage": {set: func(s *supervisor, _ *Options) { s.override["/v1-k3s/client-kubelet.crt"] = answer(200, "x") }, code: CodeNotK3s},
		"the certificate is for another key": {set: func(s *supervisor, _ *Options) {
			s.override["/v1-k3s/client-kubelet.crt"] = answer(200, string(stranger.authorities.ServerCA()))
		}, code: CodeNotK3s},
		"the agent is newer":         {set: func(s *supervisor, _ *Options) { s.version = "v1.35.4+k3s1" }, code: CodeVersionSkew, says: "v1.35.4+k3s1"},
		"the server is much older":   {server: true, set: func(s *supervisor, _ *Options) { s.version = "v1.34.1+k3s1" }, code: CodeVersionSkew, says: "1 minor version apart"},
		"/version fails for a while": {set: func(s *supervisor, _ *Options) { s.override["/version"] = answer(500, "etcdserver: leader changed") }, code: CodeNotReady, passing: true},
		"no server":                  {set: func(_ *supervisor, o *Options) { o.Servers = nil }, code: CodeNoServers},
		"an address that is none":    {set: func(_ *supervisor, o *Options) { o.Servers = []string{"https://x"} }, code: CodeNoServers, says: "https://x"},
		"a name that is none":        {set: func(_ *supervisor, o *Options) { o.NodeName = "Node 1\r\n" }, code: CodeRejected},
		"a CA that is none":          {set: func(_ *supervisor, o *Options) { o.ServerCA = []byte("x") }, code: CodeCAMismatch},
		"tokens of another CA":       {set: func(_ *supervisor, o *Options) { o.AgentToken = stranger.agent }, code: CodeCAMismatch},
		"tokens the wrong way round": {set: func(s *supervisor, o *Options) { o.AgentToken = s.server }, code: CodeTokenRole},
		"no node password":           {set: func(_ *supervisor, o *Options) { o.NodePassword = Password{} }, code: CodeNodePassword},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := start(t, newCluster(t), c.leaf)
			o := s.options(c.server)
			if c.set != nil {
				c.set(s, &o)
			}
			if c.passing {
				o.Timeout = 1500 * time.Millisecond
			}
			var logged bytes.Buffer
			o.Logger = slog.New(slog.NewTextHandler(&logged, &slog.HandlerOptions{Level: slog.LevelDebug}))
			began := time.Now()
			got, err := Preflight(t.Context(), o)
			if got != nil || fault.CodeOf(err) != c.code || !strings.Contains(err.Error(), c.says) {
				t.Fatalf("got code %q, %+v: %v", fault.CodeOf(err), got, err)
			}
			if fault.IsTransient(err) != c.passing && c.code != CodeNoServers {
				t.Errorf("transient is %t: %v", fault.IsTransient(err), err)
			}
			if took := time.Since(began); c.passing != (took >= time.Second) && c.code != CodeDNS && c.code != CodeBadToken {
				t.Errorf("took %s: %v", took, err)
			}
			if s.mu.Lock(); c.silent && s.tokens > 0 {
				t.Errorf("a token was sent: %v", s.requests)
			}
			s.mu.Unlock()
			for _, secret := range []string{o.AgentToken.Secret(), o.ServerToken.Secret(), o.NodePassword.secret} {
				if secret != "" && strings.Contains(logged.String()+err.Error(), secret) {
					t.Errorf("a secret is in %s%v", logged.String(), err)
				}
			}
		})
	}
}

func TestAServerThatSpeaksNoTLSIsNamed(t *testing.T) {
	s := start(t, newCluster(t), leafOptions{})
	plain := httptest.NewServer(http.NotFoundHandler())
	defer plain.Close()
	o := s.options(false)
	o.Servers = []string{plain.Listener.Addr().String()}
	if _, err := Preflight(t.Context(), o); fault.CodeOf(err) != CodeNotK3s {
		t.Errorf("got %v", err)
	}
}

func TestAServerThatAcceptsAndSaysNothingTimesOut(t *testing.T) {
	s := start(t, newCluster(t), leafOptions{})
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	o := s.options(false)
	o.Servers, o.Timeout = []string{ln.Addr().String()}, time.Second
	if _, err := Preflight(t.Context(), o); fault.CodeOf(err) != CodeConnectTimeout {
		t.Errorf("got %v", err)
	}
}

func TestWhatPassesIsSeenSoon(t *testing.T) {
	for name, c := range map[string]struct{ before, after func(s *supervisor) }{
		"a server that starts and cannot tell tokens apart": {func(s *supervisor) { s.starting = true }, func(s *supervisor) { s.starting = false }},
		"an API server that becomes ready":                  {func(s *supervisor) { s.notReady = true }, func(s *supervisor) { s.notReady = false }},
	} {
		t.Run(name, func(t *testing.T) {
			s := start(t, newCluster(t), leafOptions{})
			c.before(s)
			o := s.options(true)
			o.Grace = 5 * time.Second
			timer := time.AfterFunc(500*time.Millisecond, func() {
				s.mu.Lock()
				defer s.mu.Unlock()
				c.after(s)
			})
			defer timer.Stop()
			got, err := Preflight(t.Context(), o)
			if err != nil {
				t.Fatal(err)
			}
			if got.Rounds < 2 || got.Elapsed > 4*time.Second {
				t.Errorf("got %+v", got)
			}
		})
	}
}

func TestOfSeveralServersTheOneThatAgreesIsTaken(t *testing.T) {
	c := newCluster(t)
	good := start(t, c, leafOptions{})
	notReady := start(t, c, leafOptions{})
	notReady.notReady = true
	stranger := start(t, newCluster(t), leafOptions{})
	o := good.options(false)
	o.Servers = []string{unused(t), stranger.host, notReady.host, "nowhere.invalid", good.host, good.host}
	got, err := Preflight(t.Context(), o)
	if err != nil || got.Server != good.url {
		t.Fatalf("got %+v, %v", got, err)
	}
	if stranger.tokens > 0 {
		t.Error("a stranger was sent a token")
	}
}

func TestOfSeveralServersTheMostTellingFailureIsReported(t *testing.T) {
	c := newCluster(t)
	clash := start(t, c, leafOptions{})
	clash.passwords["i-9"] = "another"
	notReady := start(t, c, leafOptions{})
	notReady.notReady = true
	stranger := start(t, newCluster(t), leafOptions{})
	for name, x := range map[string]struct {
		servers []string
		code    fault.Code
	}{
		"what one server says of the cluster ends it": {[]string{unused(t), notReady.host, clash.host}, CodeNodeClash},
		"a stale address does not":                    {[]string{stranger.host, notReady.host}, CodeNotReady},
		"the one that came closest":                   {[]string{unused(t), notReady.host}, CodeNotReady},
		"strangers only":                              {[]string{stranger.host, stranger.host}, CodeCAMismatch},
	} {
		t.Run(name, func(t *testing.T) {
			o := clash.options(false)
			o.Servers, o.Timeout = x.servers, time.Second
			if _, err := Preflight(t.Context(), o); fault.CodeOf(err) != x.code {
				t.Errorf("got %v, want %s", err, x.code)
			}
		})
	}
}

func TestTheCallersEndIsObeyed(t *testing.T) {
	s := start(t, newCluster(t), leafOptions{})
	s.notReady = true
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := Preflight(ctx, s.options(false)); fault.CodeOf(err) != CodeNotReady {
		t.Errorf("its deadline: got %v", err)
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	time.AfterFunc(200*time.Millisecond, stop)
	if _, err := Preflight(ctx, s.options(false)); !errors.Is(err, context.Canceled) || fault.CodeOf(err) != "" {
		t.Errorf("its cancellation: got %v", err)
	}
}

func TestAVersionThatIsNotToldIsNoReason(t *testing.T) {
	s := start(t, newCluster(t), leafOptions{})
	s.override["/version"] = func(w http.ResponseWriter, _ *http.Request) { status(w, http.StatusForbidden, "forbidden") }
	if got, err := Preflight(t.Context(), s.options(false)); err != nil || got.Version != "" {
		t.Errorf("got %+v, %v", got, err)
	}
}

// unused returns an address on which nothing listens.
func unused(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	return ln.Addr().String()
}

// forge makes a token for the right CA with a secret no server knows.
func forge(t *testing.T, a *pki.Authorities, user pki.User) pki.Token {
	t.Helper()
	token, err := pki.NewToken(user, a.ServerCA())
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func TestVersionSkew(t *testing.T) {
	for _, c := range []struct {
		ours, theirs string
		server, ok   bool
	}{
		{"v1.36.2+k3s1", "v1.36.2+k3s1", false, true},
		{"v1.36.2+k3s1", "v1.36.0+k3s2", false, true},
		{"v1.33.9+k3s1", "v1.36.2+k3s1", false, true},
		{"v1.32.9+k3s1", "v1.36.2+k3s1", false, false},
		{"v1.37.0+k3s1", "v1.36.2+k3s1", false, false},
		{"v2.36.0+k3s1", "v1.36.2+k3s1", false, false},
		{"v1.37.0+k3s1", "v1.36.2+k3s1", true, true},
		{"v1.35.0+k3s1", "v1.36.2+k3s1", true, true},
		{"v1.38.0+k3s1", "v1.36.2+k3s1", true, false},
		{"v1.34.0+k3s1", "v1.36.2+k3s1", true, false},
		{"", "v1.36.2+k3s1", true, true},
		{"v1.36.2+k3s1", "", true, true},
		{"dev", "v1.36.2+k3s1", true, true},
	} {
		if why := skew(c.ours, c.theirs, c.server); (why == "") != c.ok {
			t.Errorf("%s at %s, server %t: got %q", c.ours, c.theirs, c.server, why)
		}
	}
}

func TestHostPort(t *testing.T) {
	for in, want := range map[string]string{
		"10.0.0.1": "10.0.0.1:6443", "10.0.0.1:9345": "10.0.0.1:9345", "fd00::1": "[fd00::1]:6443", "[fd00::1]": "[fd00::1]:6443", "[fd00::1]:443": "[fd00::1]:443",
		"k3s.example": "k3s.example:6443", "k3s.example:443": "k3s.example:443",
		"": "", ":6443": "", "x:": "", "x:0": "", "x:http": "", "x:99999": "", "https://x": "", "x/y": "", "a b": "", "x:1:2": "", "-x": "", "x@y": "",
	} {
		got, err := hostPort(in)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q: got %q, %v; want %q", in, got, err, want)
		}
	}
}

func TestNodePasswordIsMadeOnceAndKept(t *testing.T) {
	file := filepath.Join(t.TempDir(), "rancher", "node", "password")
	first, err := NodePassword(file)
	if err != nil {
		t.Fatal(err)
	}
	again, err := NodePassword(file)
	if err != nil || again != first || len(first.Reveal()) != 32 {
		t.Errorf("got %q then %q, %v", first.Reveal(), again.Reveal(), err)
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	if s := fmt.Sprintf("%v %+v %#v %s %q", first, first, first, first, []any{first}); strings.Contains(s, first.Reveal()) {
		t.Errorf("printed: %s", s)
	}
	if b, err := json.Marshal(first); err != nil || bytes.Contains(b, []byte(first.Reveal())) {
		t.Errorf("marshalled: %s, %v", b, err)
	}
	for name, content := range map[string]string{"empty": "", "blank": " \n", "binary": "\x00\x01", "two lines": "a\nb", "huge": strings.Repeat("x", 10_000)} {
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := NodePassword(file); fault.CodeOf(err) != CodeNodePassword {
			t.Errorf("%s: got %v", name, err)
		}
	}
	if _, err := NodePassword(t.TempDir()); fault.CodeOf(err) != CodeNodePassword {
		t.Errorf("a directory: got %v", err)
	}
}

func FuzzParseMembers(f *testing.F) {
	f.Add([]byte(`{"members":[{"ID":14841639068965178418,"name":"i-1-0a1b2c3d","peerURLs":["https://10.0.0.1:2380"],"isLearner":true}]}`))
	f.Add([]byte(`{"members":null}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		members, err := parseMembers(b)
		if err == nil && len(members) == 0 {
			t.Fatal("no members and no error")
		}
		for _, m := range members {
			if !strings.HasPrefix(m.Name, m.nodeOf()) {
				t.Fatalf("%q of %q", m.nodeOf(), m.Name)
			}
		}
	})
}

func FuzzParseVersion(f *testing.F) {
	f.Add([]byte(`{"gitVersion":"v1.36.2+k3s1"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if v := parseVersion(b); v != "" && (len(v) > maxVersionBytes || v[0] != 'v') {
			t.Fatalf("%q", v)
		}
		_, _ = leaf(b)
		_ = message(b)
		_, _ = ParseNodePassword(b)
	})
}
