package imdstest

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

const (
	headerToken = "X-Aws-Ec2-Metadata-Token" //nolint:gosec // the name of a header, not a token
	headerTTL   = "X-Aws-Ec2-Metadata-Token-Ttl-Seconds"
	// maxTTL is the longest that a token may live: six hours.
	maxTTL = 21600
	// maxTokens bounds the tokens that are remembered; the oldest expire first.
	maxTokens = 1024
	// maxRequests bounds what Requests returns.
	maxRequests = 4096
)

// versions are what the root lists; any date is served.
var versions = []string{"1.0", "2009-04-04", "2014-11-05", "2016-09-02", "2018-09-24", "2021-03-23", "2021-07-15", "2022-09-24", "2024-04-11", "latest"}

var versionPattern = regexp.MustCompile(`^(?:1\.0|latest|[0-9]{4}-[0-9]{2}-[0-9]{2})$`)

// Server is the service; it is an http.Handler. Its methods are safe for
// concurrent use, so everything can change while clients read.
type Server struct {
	closed chan struct{}
	close  sync.Once

	mu       sync.Mutex
	now      func() time.Time
	config   Config
	faults   []*armed
	tokens   map[string]time.Time // to their expiry
	requests []Request
}

// Request is one request that the server got.
type Request struct {
	Method string
	// Path without its version: "meta-data/instance-id".
	Path string
	// Token says whether it carried a session token.
	Token bool
}

// New returns a server of this instance.
func New(c Config) *Server {
	s := &Server{closed: make(chan struct{}), now: time.Now, config: c.clone(), tokens: map[string]time.Time{}}
	for _, f := range c.Faults {
		s.Fault(f)
	}
	return s
}

// Close ends the requests that wait. A server that Start started closes itself.
func (s *Server) Close() { s.close.Do(func() { close(s.closed) }) }

// Start serves on a loopback address for as long as the test runs, and returns
// the URL. network is "tcp4" or "tcp6".
func (s *Server) Start(t testing.TB, network string) string {
	t.Helper()
	address := "127.0.0.1:0"
	if network == "tcp6" {
		address = "[::1]:0"
	}
	ln, err := (&net.ListenConfig{}).Listen(t.Context(), network, address)
	if err != nil {
		t.Fatalf("listening for the metadata service: %v", err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, ln) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("serving metadata: %v", err)
		}
	})
	return "http://" + ln.Addr().String()
}

// Serve serves on the listener until the context ends, and closes it.
func (s *Server) Serve(ctx context.Context, ln net.Listener) error {
	return Serve(ctx, ln, s, s.Close)
}

// Serve is Server.Serve for a handler around the server, whose Close is closing.
func Serve(ctx context.Context, ln net.Listener, h http.Handler, closing func()) error {
	server := &http.Server{Handler: h, ReadHeaderTimeout: 10 * time.Second, MaxHeaderBytes: 16 << 10}
	stop := context.AfterFunc(ctx, func() {
		closing()
		_ = server.Close()
	})
	defer stop()
	if err := server.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// Update changes what the instance is.
func (s *Server) Update(change func(*Config)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.config.clone()
	change(&c)
	s.config = c
}

// Reset makes the instance another one, with that one's faults only. Tokens
// stay valid.
func (s *Server) Reset(c Config) {
	s.Update(func(old *Config) { *old = c.clone() })
	s.ClearFaults()
	for _, f := range c.Faults {
		s.Fault(f)
	}
}

// SetSpotAction announces an interruption; an empty action takes it back.
func (s *Server) SetSpotAction(action string, at time.Time) {
	s.Update(func(c *Config) {
		if c.SpotAction = nil; action != "" {
			c.SpotAction = &SpotAction{Action: action, Time: at}
		}
	})
}

// SetRebalance recommends to rebalance; the zero time takes it back.
func (s *Server) SetRebalance(at time.Time) {
	s.Update(func(c *Config) {
		if c.Rebalance = nil; !at.IsZero() {
			c.Rebalance = &at
		}
	})
}

// SetMaintenance replaces the scheduled events.
func (s *Server) SetMaintenance(events ...Maintenance) {
	s.Update(func(c *Config) { c.Maintenance = slices.Clone(events) })
}

// SetTargetState sets the target life-cycle state; "" is outside of a group.
func (s *Server) SetTargetState(state string) {
	s.Update(func(c *Config) { c.TargetState = state })
}

// SetCredentials replaces the role's credentials.
func (s *Server) SetCredentials(cr Credentials) {
	s.Update(func(c *Config) { c.Credentials = cr })
}

// SetClock replaces time.Now for the expiry of tokens and faults.
func (s *Server) SetClock(now func() time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.now = now
}

// RevokeTokens forgets all tokens, as a restart of the service does.
func (s *Server) RevokeTokens() {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.tokens)
}

// Fault adds a fault, which meets requests after those set before. The
// returned function takes it away.
func (s *Server) Fault(f Fault) (remove func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	a := &armed{Fault: f}
	if f.For > 0 {
		a.until = s.now().Add(f.For)
	}
	s.faults = append(s.faults, a)
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.faults = slices.DeleteFunc(s.faults, func(o *armed) bool { return o == a })
	}
}

// ClearFaults takes all faults away.
func (s *Server) ClearFaults() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults = nil
}

// Requests returns the last 4096 requests, oldest first.
func (s *Server) Requests() []Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.requests)
}

// Count returns how many of Requests had this method and path.
func (s *Server) Count(method, path string) int {
	n := 0
	for _, r := range s.Requests() {
		if r.Method == method && r.Path == path {
			n++
		}
	}
	return n
}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	version, path, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	s.mu.Lock()
	if len(s.requests) >= maxRequests {
		s.requests = slices.Delete(s.requests, 0, maxRequests/2)
	}
	s.requests = append(s.requests, Request{Method: r.Method, Path: path, Token: r.Header.Get(headerToken) != ""})
	fault, faulty := s.faultLocked(path, s.now())
	c := s.config.clone()
	now := s.now()
	s.mu.Unlock()

	w.Header().Set("Server", "EC2ws")
	right := func() (int, string) { return s.answer(w, r, version, path, c, now) }
	if faulty && s.misbehave(w, r, fault, right) {
		return
	}
	status, body := right()
	if status != http.StatusOK {
		refuse(w, status)
		return
	}
	w.Header().Set("Content-Type", "text/plain")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	_, _ = w.Write([]byte(body))
}

// answer is what a well-behaved service says.
func (s *Server) answer(w http.ResponseWriter, r *http.Request, version, path string, c Config, now time.Time) (int, string) {
	switch {
	case c.Disabled:
		return http.StatusForbidden, ""
	case version == "latest" && path == "api/token":
		if c.HopLimitTooLow {
			s.silence(r)
		}
		return s.issue(w, r, c)
	case r.Method != http.MethodGet && r.Method != http.MethodHead:
		return http.StatusMethodNotAllowed, ""
	}
	switch token := r.Header.Get(headerToken); {
	case c.OnlyV1, token == "" && c.AllowV1:
	case token == "":
		return http.StatusUnauthorized, ""
	default:
		s.mu.Lock()
		expires, ok := s.tokens[token]
		s.mu.Unlock()
		if !ok || !now.Before(expires) {
			return http.StatusUnauthorized, ""
		}
		w.Header().Set(headerTTL, strconv.Itoa(int(expires.Sub(now)/time.Second)))
	}
	if version == "" {
		return http.StatusOK, strings.Join(versions, "\n")
	}
	if !versionPattern.MatchString(version) {
		return http.StatusNotFound, ""
	}
	return lookup(c, path, now)
}

// issue answers a request for a token.
func (s *Server) issue(w http.ResponseWriter, r *http.Request, c Config) (int, string) {
	ttl, err := strconv.Atoi(r.Header.Get(headerTTL))
	switch {
	case c.OnlyV1:
		return http.StatusNotFound, ""
	case r.Method != http.MethodPut:
		return http.StatusMethodNotAllowed, ""
	case r.Header.Get("X-Forwarded-For") != "":
		// What came through a proxy may be someone else's request.
		return http.StatusForbidden, ""
	case err != nil || ttl < 1 || ttl > maxTTL:
		return http.StatusBadRequest, ""
	}
	token := rand.Text() + rand.Text()
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.tokens) >= maxTokens {
		oldest := slices.SortedFunc(maps.Keys(s.tokens), func(a, b string) int { return s.tokens[a].Compare(s.tokens[b]) })[0]
		delete(s.tokens, oldest)
	}
	s.tokens[token] = s.now().Add(time.Duration(ttl) * time.Second)
	w.Header().Set(headerTTL, strconv.Itoa(ttl))
	return http.StatusOK, token
}

// lookup finds the value at a path, or lists the directory there.
func lookup(c Config, path string, now time.Time) (int, string) {
	path = strings.Trim(path, "/")
	for _, m := range c.Missing {
		if m = strings.Trim(m, "/"); path == m || strings.HasPrefix(path, m+"/") {
			return http.StatusNotFound, ""
		}
	}
	tree := c.tree(now)
	if v, ok := tree[path]; ok {
		return http.StatusOK, v
	}
	if path == "meta-data/public-keys" && len(c.PublicKeys) > 0 {
		var names []string
		for i, name := range sortedKeys(c.PublicKeys) {
			names = append(names, fmt.Sprintf("%d=%s", i, name))
		}
		return http.StatusOK, strings.Join(names, "\n")
	}
	prefix := path + "/"
	if path == "" {
		prefix = ""
	}
	entries := map[string]bool{}
	for p := range tree {
		rest, ok := strings.CutPrefix(p, prefix)
		if !ok {
			continue
		}
		name, _, directory := strings.Cut(rest, "/")
		if directory && prefix != "" { // the root lists them without a slash
			name += "/"
		}
		entries[name] = true
	}
	if len(entries) == 0 {
		return http.StatusNotFound, ""
	}
	return http.StatusOK, strings.Join(sortedKeys(entries), "\n")
}

func refuse(w http.ResponseWriter, status int) {
	w.Header().Set("Content-Type", "text/html")
	w.WriteHeader(status)
	_, _ = fmt.Fprintf(w, "<html><head><title>%d - %s</title></head><body><h1>%d - %s</h1></body></html>\n",
		status, http.StatusText(status), status, http.StatusText(status))
}

func sortedKeys[K cmp.Ordered, V any](m map[K]V) []K { return slices.Sorted(maps.Keys(m)) }
