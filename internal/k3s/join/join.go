package join

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
	"github.com/hearth-sh/hearth/internal/k3s/pki"
)

// What is used where Options say 0.
const (
	DefaultPort = "6443"
	// DefaultTimeout lets a server that was just founded, or restarted, start.
	DefaultTimeout = 5 * time.Minute
	// DefaultGrace outlasts the moment in which a starting k3s listens but
	// cannot yet tell good tokens from bad ones: it answers 401 to all.
	DefaultGrace = 10 * time.Second

	// firstPause and maxPause bound the pauses between two rounds, which are
	// drawn from half to one and a half times a growing length: a server that
	// becomes ready is seen within a second.
	firstPause = 150 * time.Millisecond
	maxPause   = 600 * time.Millisecond
	// maxServers bounds whom is asked; more are left out.
	maxServers = 16
)

// nodeName is a Kubernetes node name: a DNS subdomain.
var nodeName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$`)

// Options say who wants to join where. All but Version, Timeout, Grace and
// Logger are required; ServerToken only of servers.
type Options struct {
	// Servers are addresses: IP addresses or DNS names, with or without a port
	// (DefaultPort). They are asked at once; the first 16 count.
	Servers []string
	// ServerCA is the CA certificate from the cluster's store, PEM.
	ServerCA []byte
	// AgentToken is what the agent of every node, also of servers, joins with.
	AgentToken pki.Token
	// ServerToken makes it a server that joins; zero for agents.
	ServerToken pki.Token
	// NodeName and NodePassword are what the node will register with.
	NodeName     string
	NodePassword Password
	// Version of the k3s to be started, such as "v1.36.2+k3s1"; empty or
	// unreadable is not compared.
	Version string
	// Timeout bounds Preflight.
	Timeout time.Duration
	// Grace is how long a server may answer 401 before the token is held for
	// bad.
	Grace  time.Duration
	Logger *slog.Logger
}

// Result is what Preflight found out.
type Result struct {
	// Server is the URL of a server that will let this machine join, such as
	// "https://10.0.0.1:6443".
	Server string
	// Version is the server's, such as "v1.36.2+k3s1"; empty if it was not
	// told.
	Version string
	// Members is the number of etcd members; 0 for agents.
	Members int
	// Rounds is how often servers were asked.
	Rounds int
	// Elapsed is how long it took.
	Elapsed time.Duration
}

// Preflight returns once a server will let this machine join. It asks all
// servers at once, again while something may change, until one is found, the
// time is up, or it is certain that none will. Errors have a code of this
// package and are of the server that came closest; or say that the context was
// cancelled.
//
// For a node's name that no server has seen, the servers remember the password
// that is presented, as they do when k3s joins.
func Preflight(ctx context.Context, o Options) (*Result, error) {
	began := time.Now()
	p, err := newPreflight(o)
	if err != nil {
		return nil, err
	}
	defer p.close()
	ctx, cancel := context.WithTimeoutCause(ctx, p.timeout, errTimeUp)
	defer cancel()
	pause := firstPause
	var last *fault.Error
	for round := 1; ; round++ {
		result, failure := p.round(ctx)
		if result != nil {
			result.Rounds, result.Elapsed = round, time.Since(began)
			return result, nil
		}
		if ctx.Err() == nil {
			last = failure
			if !failure.Transient {
				return nil, failure
			}
			p.log.DebugContext(ctx, "no server takes this machine in yet", "code", failure.Code, "reason", failure.Message)
			timer := time.NewTimer(pause/2 + rand.N(pause))
			select {
			case <-timer.C:
			case <-ctx.Done():
				timer.Stop()
			}
			pause = min(pause*3/2, maxPause)
		}
		if ctx.Err() != nil {
			// A deadline of the caller's is as good as ours: why nobody could be
			// joined is worth more to it than that its time is up.
			if errors.Is(ctx.Err(), context.Canceled) {
				return nil, fmt.Errorf("waiting for a server to join: %w", ctx.Err())
			}
			if last == nil {
				last = failure
			}
			last.Message = fmt.Sprintf("no server could be joined within %s: %s", time.Since(began).Round(time.Second), last.Message)
			return nil, last
		}
	}
}

var errTimeUp = errors.New("the time for the preflight is up")

type preflight struct {
	servers []*candidate
	timeout time.Duration
	log     *slog.Logger
}

func newPreflight(o Options) (*preflight, error) {
	pool, err := pki.Pool(o.ServerCA)
	switch {
	case err != nil:
		return nil, fault.New(CodeCAMismatch, err, "found a new cluster under another prefix", "the CA from the cluster's store is unusable")
	case o.AgentToken.User() != pki.UserNode || !o.ServerToken.IsZero() && o.ServerToken.User() != pki.UserServer:
		return nil, fault.New(CodeTokenRole, nil, "give agents the agent token and servers both", "the tokens are not those of an agent and a server")
	case !nodeName.MatchString(o.NodeName):
		return nil, fault.New(CodeRejected, nil, "use lower-case letters, digits, - and .", "%.260q is not a node name", o.NodeName)
	case o.NodePassword.secret == "":
		return nil, fault.New(CodeNodePassword, nil, "get one from NodePassword", "a node needs a password")
	}
	for _, token := range []pki.Token{o.AgentToken, o.ServerToken} {
		if err := token.VerifyCA(o.ServerCA); err != nil && !token.IsZero() {
			return nil, fault.New(CodeCAMismatch, err, "found a new cluster under another prefix", "token and CA from the cluster's store do not belong together")
		}
	}
	p := &preflight{timeout: o.Timeout, log: o.Logger}
	if p.timeout <= 0 {
		p.timeout = DefaultTimeout
	}
	if p.log == nil {
		p.log = slog.New(slog.DiscardHandler)
	}
	if o.Grace <= 0 {
		o.Grace = DefaultGrace
	}
	seen := make(map[string]bool)
	for _, server := range o.Servers {
		host, err := hostPort(server)
		if err != nil {
			p.close()
			return nil, fault.New(CodeNoServers, err, "use IP addresses or DNS names, with or without a port", "a server's address cannot be used")
		}
		if seen[host] || len(p.servers) == maxServers {
			continue
		}
		seen[host] = true
		p.servers = append(p.servers, newCandidate(host, pool, o))
	}
	if len(p.servers) == 0 {
		return nil, fault.Passing(CodeNoServers, nil, "wait for a server to announce itself, or set a fixed address of the cluster", "there is no server to join")
	}
	return p, nil
}

func (p *preflight) close() {
	for _, c := range p.servers {
		c.close()
	}
}

// hostPort accepts what can be a server and adds the port.
func hostPort(server string) (string, error) {
	host, port := server, DefaultPort
	if addr, err := netip.ParseAddr(strings.Trim(server, "[]")); err == nil {
		return net.JoinHostPort(addr.String(), DefaultPort), nil
	}
	if strings.Contains(server, ":") {
		var err error
		if host, port, err = net.SplitHostPort(server); err != nil {
			return "", fmt.Errorf("%.300q: %w", server, err)
		}
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return "", fmt.Errorf("%.300q has no usable port", server)
	}
	if _, err := netip.ParseAddr(host); err != nil && !nodeName.MatchString(strings.ToLower(host)) {
		return "", fmt.Errorf("%.300q is neither an IP address nor a DNS name", server)
	}
	return net.JoinHostPort(host, port), nil
}

// round asks every server once. It returns the first that agrees, or the
// failure that says most: one that settles the matter for the whole cluster, or
// else of the server that came closest, or else one that may pass.
func (p *preflight) round(ctx context.Context) (*Result, *fault.Error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	answers := make([]answer, len(p.servers))
	var all sync.WaitGroup
	for i, c := range p.servers {
		all.Go(func() {
			answers[i] = c.ask(ctx)
			if answers[i].result != nil {
				cancel() // one is enough
			}
		})
	}
	all.Wait()
	for _, a := range answers {
		if a.result != nil {
			return a.result, nil
		}
	}
	// Any server that may still change its mind keeps the round open, unless
	// one spoke for the cluster.
	passing := slices.ContainsFunc(answers, func(a answer) bool { return a.failure.Transient })
	best := answers[0]
	for _, a := range answers[1:] {
		if a.better(best, passing) {
			best = a
		}
	}
	return nil, best.failure
}

// answer is what came of asking one server.
type answer struct {
	result  *Result
	failure *fault.Error
	stage   stage
}

// final says whether no server will answer differently.
func (a answer) final() bool { return !a.failure.Transient && a.stage >= stageToken }

func (a answer) better(b answer, passing bool) bool {
	if a.final() != b.final() {
		return a.final()
	}
	if passing && a.failure.Transient != b.failure.Transient {
		return a.failure.Transient
	}
	return a.stage > b.stage
}
