package registry

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

const (
	// pullTimeout bounds one Pull with all its attempts: 50 MiB at 1 MiB/s
	// take 50 s, three attempts of that fit.
	pullTimeout = 5 * time.Minute
	// publishTimeout bounds one Publish, sized like pullTimeout.
	publishTimeout = 5 * time.Minute
	// resolveTimeout bounds the lookup of a tag: one small document.
	resolveTimeout = 30 * time.Second
	// defaultStall is how long a transfer may go without a byte in either
	// direction. A registry that syncs 50 MiB to a slow disk stays below it.
	defaultStall = 20 * time.Second
	// dialTimeout bounds connecting to a registry's host.
	dialTimeout = 10 * time.Second

	// attempts is how often a passing error is tried within one call; the
	// caller's own loop goes on from there at a slower pace.
	attempts = 4
	// mismatchAttempts is how often wrong bytes are asked for again: once
	// is a flipped bit, twice is a registry that lies.
	mismatchAttempts = 2
	// firstBackoff doubles with each attempt, and half of it is jitter.
	firstBackoff = 200 * time.Millisecond
	// maxRetryAfter is the longest pause that a registry's Retry-After is
	// granted within one call: a person waits behind it.
	maxRetryAfter = 10 * time.Second
)

// ClientOptions configure a Client.
type ClientOptions struct {
	// Registry is the host, or host:port, of the registry that artifacts
	// without one of their own are in. Required.
	Registry string
	// Dial, when set, connects to Registry (a unix socket, say); Registry
	// is then only a name, and plain HTTP is spoken to it.
	Dial func(ctx context.Context) (net.Conn, error)
	// PlainHTTP allows HTTP to Registry. Loopback and private addresses
	// are tried with HTTPS first, then HTTP, without it.
	PlainHTTP bool
	// Keychain has the credentials for registries other than Registry;
	// default: the Docker configuration of the process's user.
	Keychain authn.Keychain
	// RegistryKeychain has those for Registry; default: anonymous. It, and the
	// authenticators it gives, are asked anew for each attempt. An error of
	// theirs with a method Temporary() bool that says true is retryable, any
	// other is ErrUnauthorized.
	RegistryKeychain authn.Keychain
	// Rejected, when set, is told the credentials that a registry has just
	// refused with 401 or 403. When it says that the keychain has others now, a
	// token having expired early or been revoked, the attempt is repeated with
	// those, once per call.
	Rejected func(registry string, used authn.AuthConfig) (retry bool)
	// Backoff is the pause before attempt n+1 (n is 1, 2, …). Default: 200 ms
	// that double with each attempt, half of it random. A Retry-After of the
	// registry, up to 10 s, is waited for when it is longer.
	Backoff func(n int) time.Duration
	// Transport replaces the default HTTP transport for other registries.
	Transport http.RoundTripper
	// StallTimeout is the longest a transfer may go without a byte
	// (default 20 s).
	StallTimeout time.Duration
	// Logger gets a line for each retried attempt (default: none).
	Logger *slog.Logger
}

// Client publishes to one registry and pulls from any. Its methods may be
// called concurrently; each has its own deadline and bounded retries, and
// returns errors that Code and Retryable classify.
type Client struct {
	opts    ClientOptions
	home    name.Registry
	homeRT  http.RoundTripper
	otherRT http.RoundTripper
	log     *slog.Logger
	// backoff is the pause before attempt n (1, 2, …); replaced in tests.
	backoff func(n int) time.Duration
	// close drops idle connections.
	close []func()
}

// NewClient checks the options; it opens no connection.
func NewClient(opts ClientOptions) (*Client, error) {
	c := &Client{opts: opts, log: opts.Logger, backoff: opts.Backoff}
	if c.backoff == nil {
		c.backoff = jittered
	}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	if c.opts.StallTimeout <= 0 {
		c.opts.StallTimeout = defaultStall
	}
	if c.opts.Keychain == nil {
		c.opts.Keychain = authn.DefaultKeychain
	}
	plain := opts.PlainHTTP || opts.Dial != nil
	var no []name.Option
	if plain {
		no = append(no, name.Insecure)
	}
	var err error
	if opts.Registry == "" {
		return nil, fmt.Errorf("registry client: %w: no registry is named", ErrInvalidReference)
	}
	if c.home, err = name.NewRegistry(opts.Registry, no...); err != nil {
		return nil, fmt.Errorf("registry client: %w: %w", ErrInvalidReference, err)
	}
	homeBase := newTransport(opts.Dial, true)
	c.close = append(c.close, homeBase.CloseIdleConnections)
	c.homeRT = &guard{next: homeBase, stall: c.opts.StallTimeout, plainOnly: plain, home: c.home.RegistryStr()}
	other := opts.Transport
	if other == nil {
		t := newTransport(nil, false)
		c.close = append(c.close, t.CloseIdleConnections)
		other = t
	}
	c.otherRT = &guard{next: other, stall: c.opts.StallTimeout}
	return c, nil
}

// Close drops idle connections. Calls in progress go on.
func (c *Client) Close() {
	for _, f := range c.close {
		f()
	}
}

// Registry is the host, or host:port, that the client publishes to.
func (c *Client) Registry() string { return c.home.RegistryStr() }

// Locate says which repository, on which registry, a reference names, as
// Resolve would look for it. It asks nobody.
func (c *Client) Locate(ref string) (registry, repository string, err error) {
	r, err := c.parseReference(ref)
	if err != nil {
		return "", "", fmt.Errorf("locate: %w", err)
	}
	return r.Context().RegistryStr(), r.Context().RepositoryStr(), nil
}

// newTransport makes an HTTP transport. The configured registry may be
// anywhere; one that a tenant names may not be on a link-local address, where
// clouds keep their instance metadata.
func newTransport(dial func(context.Context) (net.Conn, error), trusted bool) *http.Transport {
	d := &net.Dialer{Timeout: dialTimeout}
	if !trusted {
		d.Control = func(_, address string, _ syscall.RawConn) error {
			host, _, err := net.SplitHostPort(address)
			if err != nil {
				return err
			}
			host, _, _ = strings.Cut(host, "%")
			if ip := net.ParseIP(host); ip == nil || ip.IsLinkLocalUnicast() || ip.IsMulticast() || ip.IsUnspecified() {
				return fmt.Errorf("%w: registries on the address %s are not contacted", ErrInvalidReference, host)
			}
			return nil
		}
	}
	t := &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           d.DialContext,
		ForceAttemptHTTP2:     true,
		MaxIdleConnsPerHost:   8,
		IdleConnTimeout:       30 * time.Second,
		TLSHandshakeTimeout:   10 * time.Second,
		ExpectContinueTimeout: time.Second,
		// A compressed transfer would hide the real size from the bounds.
		DisableCompression: true,
	}
	if dial != nil {
		t.Proxy = nil
		t.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) }
	}
	return t
}

// Pulled says what a Pull brought.
type Pulled struct {
	// Format is how the module was packaged.
	Format Format
	// Digest is the sha256 of the module's bytes, Size their number.
	Digest string
	Size   int64
	// Phases are "pull" (network) and "verify" (hashing and making durable).
	Phases []v1alpha1.Phase
}

// PullOptions bound and watch a Pull.
type PullOptions struct {
	// MaxBytes bounds the module (default and at most v1alpha1.MaxModuleBytes).
	MaxBytes int64
	// Progress is called now and then, from the calling goroutine, with the
	// bytes received so far and the number declared.
	Progress func(done, total int64)
}

// Pull writes the module of an artifact to dst, durably and atomically: dst
// is complete and verified, or not there. The artifact is named by digest
// only. The manifest's and the module's digests and sizes are verified while
// they stream.
//
// Errors: ErrNotFound, ErrUnauthorized, ErrDigestMismatch (after a second
// try), ErrNotWasm, ErrTooLarge, ErrInvalidReference, and the retryable
// ErrUnavailable and ErrNoSpace.
func (c *Client) Pull(ctx context.Context, a v1alpha1.Artifact, dst string, opts PullOptions) (Pulled, error) {
	if opts.MaxBytes <= 0 || opts.MaxBytes > v1alpha1.MaxModuleBytes {
		opts.MaxBytes = v1alpha1.MaxModuleBytes
	}
	repo, err := c.repository(a)
	if err != nil {
		return Pulled{}, fmt.Errorf("pull: %w", err)
	}
	want, err := parseDigest(a.Digest)
	if err != nil {
		return Pulled{}, fmt.Errorf("pull from %s: %w", repo, err)
	}
	var out Pulled
	err = c.retry(ctx, pullTimeout, "pull", func(ctx context.Context) error {
		var err error
		out, err = c.pullOnce(ctx, repo, want, dst, opts)
		return err
	})
	if err != nil {
		return Pulled{}, fmt.Errorf("pull %s@%s: %w", repo, want, err)
	}
	return out, nil
}

func (c *Client) pullOnce(ctx context.Context, repo name.Repository, want v1.Hash, dst string, opts PullOptions) (Pulled, error) {
	start := time.Now()
	rt, err := c.session(ctx, repo)
	if err != nil {
		return Pulled{}, err
	}
	hc := &http.Client{Transport: rt}
	raw, err := getManifest(ctx, hc, repo, want.String())
	if err != nil {
		return Pulled{}, err
	}
	if got := hashOf(raw); got != want {
		return Pulled{}, fmt.Errorf("%w: the manifest is %s", ErrDigestMismatch, got)
	}
	layer, err := parseManifest(raw)
	if err != nil {
		return Pulled{}, err
	}
	if layer.Size > opts.MaxBytes {
		return Pulled{}, fmt.Errorf("%w: the module declares %d bytes, at most %d are accepted", ErrTooLarge, layer.Size, opts.MaxBytes)
	}

	verify, err := fetchBlob(ctx, hc, repo, layer, dst, opts.Progress)
	if err != nil {
		return Pulled{}, err
	}
	total := time.Since(start)
	return Pulled{
		Format: layer.Format, Digest: layer.Digest.String(), Size: layer.Size,
		Phases: []v1alpha1.Phase{
			{Name: "pull", Milliseconds: ms(total - verify)},
			{Name: "verify", Milliseconds: ms(verify)},
		},
	}, nil
}

// Resolve finds the artifact that a reference (tag or digest) names now. A
// reference without a host is looked for in the client's own registry, never
// in a public one. The artifact is checked to be one that Pull accepts.
func (c *Client) Resolve(ctx context.Context, ref string) (v1alpha1.Artifact, error) {
	r, err := c.parseReference(ref)
	if err != nil {
		return v1alpha1.Artifact{}, fmt.Errorf("resolve: %w", err)
	}
	var a v1alpha1.Artifact
	err = c.retry(ctx, resolveTimeout, "resolve", func(ctx context.Context) error {
		rt, err := c.session(ctx, r.Context())
		if err != nil {
			return err
		}
		raw, err := getManifest(ctx, &http.Client{Transport: rt}, r.Context(), r.Identifier())
		if err != nil {
			return err
		}
		got := hashOf(raw)
		if d, ok := r.(name.Digest); ok && d.DigestStr() != got.String() {
			return fmt.Errorf("%w: the manifest is %s", ErrDigestMismatch, got)
		}
		if _, err := parseManifest(raw); err != nil {
			return err
		}
		a = v1alpha1.Artifact{Repository: r.Context().RepositoryStr(), Digest: got.String()}
		if r.Context().RegistryStr() != c.home.RegistryStr() {
			a.Registry = r.Context().RegistryStr()
		}
		return nil
	})
	if err != nil {
		return v1alpha1.Artifact{}, fmt.Errorf("resolve %s: %w", r, err)
	}
	return a, nil
}

// Fetch resolves a reference and pulls its module to dst.
func (c *Client) Fetch(ctx context.Context, ref, dst string, opts PullOptions) (v1alpha1.Artifact, Pulled, error) {
	a, err := c.Resolve(ctx, ref)
	if err != nil {
		return v1alpha1.Artifact{}, Pulled{}, err
	}
	p, err := c.Pull(ctx, a, dst, opts)
	return a, p, err
}

// PublishOptions describe a published artifact.
type PublishOptions struct {
	// Spin names the application.
	Spin SpinOptions
	// DigestTag pushes the artifact under the tag that the function DigestTag
	// gives, in one step. It is then never in the repository without a tag,
	// which most registries' clean-up policies take for garbage.
	DigestTag bool
	// Tags are set to the artifact after it is there, in order.
	Tags []string
}

// DigestTag is the tag under which an artifact of that digest is kept:
// "sha256.<hex>". It has the whole digest, so that two artifacts never want the
// same tag and immutable tags are no obstacle, and a dot, because
// "sha256-<hex>" is where the OCI distribution specification has the list of
// an artifact's referrers in registries that lack the API for it.
func DigestTag(digest string) string { return strings.Replace(digest, ":", ".", 1) }

// Publish builds the module's Spin artifact and pushes it into repository of
// the client's registry. When it returns, the registry has acknowledged every
// part under its digest. Publishing the same bytes again asks for the manifest
// and uploads nothing, and gives the same artifact; publishing after a failure
// uploads what is missing.
//
// Errors: ErrNotFound (no such repository, in registries that do not make one
// on the first push), ErrUnauthorized, ErrRefused, ErrDigestMismatch,
// ErrNotWasm, ErrTooLarge, ErrInvalidReference, and the retryable
// ErrUnavailable.
func (c *Client) Publish(ctx context.Context, repository string, m Module, opts PublishOptions) (v1alpha1.Artifact, error) {
	a := v1alpha1.Artifact{Repository: repository}
	repo, err := c.repository(a)
	if err != nil {
		return a, fmt.Errorf("publish: %w", err)
	}
	img, err := BuildSpin(m, opts.Spin)
	if err != nil {
		return a, fmt.Errorf("publish: %w", err)
	}
	a.Digest = img.hash.String()
	tags := make([]name.Tag, 0, len(opts.Tags))
	for _, t := range opts.Tags {
		tag, err := name.NewTag(repo.Name()+":"+t, c.nameOptions(true)...)
		if err != nil {
			return a, fmt.Errorf("publish: %w: %w", ErrInvalidReference, err)
		}
		tags = append(tags, tag)
	}
	target := name.Reference(repo.Digest(a.Digest))
	if opts.DigestTag {
		if target, err = name.NewTag(repo.Name()+":"+DigestTag(a.Digest), c.nameOptions(true)...); err != nil {
			return a, fmt.Errorf("publish: %w: %w", ErrInvalidReference, err)
		}
	}
	err = c.retry(ctx, publishTimeout, "publish", func(ctx context.Context) error {
		auth, err := c.homeAuth(ctx, repo)
		if err != nil {
			return err
		}
		seen := &witness{next: c.homeRT, manifest: a.Digest}
		ro := []remote.Option{
			remote.WithContext(ctx),
			remote.WithTransport(seen),
			remote.WithAuth(auth),
			// Retries are this client's own: one policy, one count.
			remote.WithRetryBackoff(remote.Backoff{Steps: 1}),
			remote.WithRetryStatusCodes(),
			remote.WithRetryPredicate(func(error) bool { return false }),
		}
		if err := remote.Write(target, img, ro...); err != nil && !c.tagged(err, target, img, ro) {
			return pushError(err)
		}
		if !seen.acknowledged.Load() {
			if err := c.confirm(ctx, repo, a.Digest); err != nil {
				return err
			}
		}
		for _, t := range tags {
			if err := remote.Tag(t, img, ro...); err != nil && !c.tagged(err, t, img, ro) {
				return fmt.Errorf("tag %s: %w", t.TagStr(), pushError(err))
			}
		}
		return nil
	})
	if err != nil {
		return a, fmt.Errorf("publish %s@%s: %w", repo, a.Digest, err)
	}
	return a, nil
}

// tagged says whether a push that was refused for its tag need not have been
// made: somebody else has put the same artifact there first, and the
// repository does not let tags be set twice.
func (c *Client) tagged(err error, ref name.Reference, img *SpinImage, options []remote.Option) bool {
	var te *transport.Error
	if _, ok := ref.(name.Tag); !ok || !errors.As(err, &te) ||
		(te.StatusCode != http.StatusBadRequest && te.StatusCode != http.StatusConflict) {
		return false
	}
	there, err := remote.Head(ref, options...)
	return err == nil && there.Digest == img.hash
}

// pushError classifies an error of the client library's push. What is left
// without a class is an answer that makes no sense, from the registry or from
// something on the way to it: that may pass.
func pushError(err error) error {
	err = classify(err)
	var (
		te *transport.Error
		pe *os.PathError
	)
	switch {
	case Code(err) != "internal", errors.As(err, &pe):
		return err
	case errors.As(err, &te) && te.StatusCode >= http.StatusBadRequest:
		return fmt.Errorf("%w: %w", ErrRefused, err)
	}
	return fmt.Errorf("%w: its answer does not follow the protocol: %w", ErrUnavailable, err)
}

// confirm reads a manifest back whose digest the registry has not said. Most
// do; what answers every request with "200 OK" does not, and is no registry.
func (c *Client) confirm(ctx context.Context, repo name.Repository, digest string) error {
	rt, err := c.session(ctx, repo)
	if err != nil {
		return err
	}
	raw, err := getManifest(ctx, &http.Client{Transport: rt}, repo, digest)
	switch err = pushError(err); {
	case errors.Is(err, ErrNotFound):
		return fmt.Errorf("%w: it has acknowledged the artifact and does not have it: %w", ErrUnavailable, err)
	case err != nil:
		return err
	case hashOf(raw).String() != digest:
		return fmt.Errorf("%w: the manifest reads back as %s", ErrDigestMismatch, hashOf(raw))
	}
	return nil
}

// witness stands below a push and holds the registry to the digests that it
// says it has stored, where it says so: the client library does not look.
type witness struct {
	next     http.RoundTripper
	manifest string
	// acknowledged: the registry has named the manifest's digest.
	acknowledged atomic.Bool
}

func (w *witness) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := w.next.RoundTrip(req)
	if err != nil || resp.StatusCode/100 != 2 {
		return resp, err
	}
	said, want := resp.Header.Get("Docker-Content-Digest"), ""
	kind, last := path.Split(req.URL.Path)
	if said == w.manifest && strings.HasSuffix(kind, "/manifests/") {
		w.acknowledged.Store(true)
	}
	switch {
	case req.Method == http.MethodPut && strings.HasSuffix(kind, "/manifests/"):
		want = w.manifest
	case req.Method == http.MethodPut:
		want = req.URL.Query().Get("digest")
	case req.Method == http.MethodHead && strings.Contains(last, ":"):
		want = last
	}
	if said == "" || want == "" || said == want {
		return resp, nil
	}
	_ = resp.Body.Close()
	return nil, fmt.Errorf("%w: it has stored %.100q in place of %s", ErrDigestMismatch, said, want)
}

// call is what one call learns below the client library, in the transport and
// from the keychain; the context carries it there.
type call struct {
	mu sync.Mutex
	// after is the Retry-After of the attempt's last refusal, 0 without one.
	after time.Duration
	// registry and used are who was shown which credentials in this attempt.
	registry string
	used     *authn.AuthConfig
}

type callKey struct{}

func (c *call) reset() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.after, c.registry, c.used = 0, "", nil
}

// noteAnswer remembers how long the registry wants to be left alone.
func (c *call) noteAnswer(resp *http.Response) {
	if resp.StatusCode != http.StatusTooManyRequests && resp.StatusCode != http.StatusServiceUnavailable {
		return
	}
	value := resp.Header.Get("Retry-After")
	after := time.Duration(0)
	if seconds, err := strconv.Atoi(value); err == nil {
		after = time.Duration(min(max(seconds, 0), int(maxRetryAfter/time.Second))) * time.Second
	} else if at, err := http.ParseTime(value); err == nil {
		after = min(max(time.Until(at), 0), maxRetryAfter)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.after = after
}

func (c *call) learned() (after time.Duration, registry string, used *authn.AuthConfig) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.after, c.registry, c.used
}

// credentials are an authenticator whose errors have a class and whose use is
// remembered.
type credentials struct {
	inner    authn.Authenticator
	registry string
	call     *call
}

var _ authn.ContextAuthenticator = credentials{}

func (a credentials) Authorization() (*authn.AuthConfig, error) {
	return a.AuthorizationContext(context.Background()) // bounded by what is inside
}

func (a credentials) AuthorizationContext(ctx context.Context) (*authn.AuthConfig, error) {
	config, err := authn.Authorization(ctx, a.inner)
	if err != nil {
		return nil, credentialsError(a.registry, err)
	}
	if a.call != nil {
		a.call.mu.Lock()
		a.call.registry, a.call.used = a.registry, config
		a.call.mu.Unlock()
	}
	return config, nil
}

func credentialsError(registry string, err error) error {
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	var passing interface{ Temporary() bool }
	if errors.As(err, &passing) && passing.Temporary() {
		return fmt.Errorf("%w: no credentials for %s now: %w", ErrUnavailable, registry, err)
	}
	return fmt.Errorf("%w: no credentials for %s: %w", ErrUnauthorized, registry, err)
}

// retry runs f until it succeeds, fails for good, or has used its attempts
// or time. The error is always classified; running out of the client's own
// time counts as the registry being unavailable.
func (c *Client) retry(ctx context.Context, limit time.Duration, what string, f func(context.Context) error) error {
	own, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	mismatches, renewed := 0, false
	learned := &call{}
	own = context.WithValue(own, callKey{}, learned)
	for n := 1; ; n++ {
		learned.reset()
		err := classify(f(own))
		if err == nil {
			return nil
		}
		if cause := ctx.Err(); cause != nil {
			return fmt.Errorf("%w: %w", cause, err)
		}
		if own.Err() == nil && errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, ErrUnavailable) {
			// A connection's own deadline, which package net gives the same
			// identity as a context's.
			err = fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
		if own.Err() != nil && !errors.Is(err, ErrUnavailable) {
			return fmt.Errorf("%w: not done after %s: %w", ErrUnavailable, limit, err)
		}
		after, registry, used := learned.learned()
		if errors.Is(err, ErrUnauthorized) && used != nil && c.opts.Rejected != nil && !renewed && own.Err() == nil {
			if renewed = true; c.opts.Rejected(registry, *used) {
				c.log.DebugContext(ctx, "registry refused its credentials, trying again with others", "call", what, "err", err)
				continue
			}
		}
		mismatch := errors.Is(err, ErrDigestMismatch)
		if mismatch {
			mismatches++
		}
		if n >= attempts || own.Err() != nil || (mismatch && mismatches >= mismatchAttempts) ||
			(!mismatch && !errors.Is(err, ErrUnavailable)) {
			return err
		}
		c.log.DebugContext(ctx, "registry call failed, trying again", "call", what, "attempt", n, "err", err)
		if sleep(own, max(c.backoff(n), after)) != nil {
			return err
		}
	}
}

// jittered doubles with each attempt; half of it is random, so that nodes
// that failed together do not come back together.
func jittered(n int) time.Duration {
	d := firstBackoff << min(n-1, 6)
	return d/2 + rand.N(d)
}

// repositoryName is the grammar of the OCI distribution specification, which
// the client library does not enforce: it would let ".." into a URL path.
var repositoryName = regexp.MustCompile(`^[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*$`)

// maxRepositoryName is the longest name registries are required to take.
const maxRepositoryName = 255

// ValidRepository says whether s can name a repository, by the grammar of the
// OCI distribution specification and with at most 255 characters.
func ValidRepository(s string) bool {
	return len(s) <= maxRepositoryName && repositoryName.MatchString(s)
}

// repository validates an artifact's registry and repository.
func (c *Client) repository(a v1alpha1.Artifact) (name.Repository, error) {
	if !ValidRepository(a.Repository) {
		return name.Repository{}, fmt.Errorf("%w: repository %.200q", ErrInvalidReference, a.Repository)
	}
	host, home := a.Registry, false
	if host == "" || host == c.home.RegistryStr() {
		host, home = c.home.RegistryStr(), true
	}
	r, err := name.NewRepository(host+"/"+a.Repository, c.nameOptions(home)...)
	if err != nil {
		return name.Repository{}, fmt.Errorf("%w: repository %.200q", ErrInvalidReference, a.Repository)
	}
	if r.RegistryStr() != host && host != "docker.io" {
		return name.Repository{}, fmt.Errorf("%w: registry %.200q", ErrInvalidReference, a.Registry)
	}
	return r, nil
}

func (c *Client) nameOptions(home bool) []name.Option {
	opts := []name.Option{name.StrictValidation}
	if home && (c.opts.PlainHTTP || c.opts.Dial != nil) {
		opts = append(opts, name.Insecure)
	}
	return opts
}

func (c *Client) parseReference(ref string) (name.Reference, error) {
	ref = strings.TrimPrefix(strings.TrimSpace(ref), "oci://")
	host, _, _ := strings.Cut(ref, "/")
	// The convention every OCI tool follows: a first part with a dot, a
	// colon, or "localhost" is a host.
	named := strings.Contains(ref, "/") && (strings.ContainsAny(host, ".:") || host == "localhost")
	home := !named || host == c.home.RegistryStr()
	opts := []name.Option{name.WithDefaultRegistry(c.home.RegistryStr())}
	if home && (c.opts.PlainHTTP || c.opts.Dial != nil) {
		opts = append(opts, name.Insecure)
	}
	r, err := name.ParseReference(ref, opts...)
	if err != nil {
		return nil, fmt.Errorf("%w: %.200q: %w", ErrInvalidReference, ref, err)
	}
	if repo := r.Context().RepositoryStr(); !ValidRepository(repo) {
		return nil, fmt.Errorf("%w: repository %.200q", ErrInvalidReference, repo)
	}
	return r, nil
}

// homeAuth has the credentials for a repository of the client's registry.
func (c *Client) homeAuth(ctx context.Context, repo name.Repository) (authn.Authenticator, error) {
	if c.opts.RegistryKeychain == nil {
		return authn.Anonymous, nil
	}
	return authenticate(ctx, c.opts.RegistryKeychain, repo)
}

func authenticate(ctx context.Context, keychain authn.Keychain, repo name.Repository) (authn.Authenticator, error) {
	a, err := authn.Resolve(ctx, keychain, repo)
	if err != nil {
		return nil, credentialsError(repo.RegistryStr(), err)
	}
	if a == authn.Anonymous {
		return a, nil
	}
	current, _ := ctx.Value(callKey{}).(*call)
	return credentials{inner: a, registry: repo.RegistryStr(), call: current}, nil
}

// session authenticates for pulls from one repository. It is made anew for
// each attempt: tokens expire, and a registry that was away may come back
// with another scheme of authentication.
func (c *Client) session(ctx context.Context, repo name.Repository) (http.RoundTripper, error) {
	var (
		rt   = c.otherRT
		auth authn.Authenticator
		err  error
	)
	if repo.RegistryStr() == c.home.RegistryStr() {
		rt = c.homeRT
		auth, err = c.homeAuth(ctx, repo)
	} else {
		auth, err = authenticate(ctx, c.opts.Keychain, repo)
	}
	if err != nil {
		return nil, err
	}
	return transport.NewWithContext(ctx, repo.Registry, auth, rt, []string{repo.Scope(transport.PullScope)})
}

// getManifest fetches a manifest or index, bounded.
func getManifest(ctx context.Context, hc *http.Client, repo name.Repository, id string) ([]byte, error) {
	resp, err := get(ctx, hc, repo, "manifests/"+id, strings.Join([]string{
		MediaTypeManifest, MediaTypeDockerManifest, MediaTypeIndex, MediaTypeDockerIndex,
	}, ", "))
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxManifestBytes+1))
	if err != nil {
		return nil, fmt.Errorf("read manifest: %w", err)
	}
	if len(raw) > maxManifestBytes {
		return nil, fmt.Errorf("%w: the manifest has more than %d bytes", ErrTooLarge, maxManifestBytes)
	}
	return raw, nil
}

func get(ctx context.Context, hc *http.Client, repo name.Repository, document, accept string) (*http.Response, error) {
	u := fmt.Sprintf("%s://%s/v2/%s/%s", repo.Scheme(), repo.RegistryStr(), repo.RepositoryStr(), document)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u, nil)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalidReference, err)
	}
	if accept != "" {
		req.Header.Set("Accept", accept)
	}
	resp, err := hc.Do(req)
	if err != nil {
		return nil, err
	}
	if err := transport.CheckError(resp, http.StatusOK); err != nil {
		resp.Body.Close()
		return nil, err
	}
	return resp, nil
}

// fetchBlob streams a layer into dst: hashed on the way, bounded by the
// declared size, synced before it gets its name. It returns the time spent
// on hashing and syncing.
func fetchBlob(ctx context.Context, hc *http.Client, repo name.Repository, l wasmLayer, dst string, progress func(done, total int64)) (verify time.Duration, err error) {
	resp, err := get(ctx, hc, repo, "blobs/"+l.Digest.String(), "")
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	if cl := resp.ContentLength; cl >= 0 && cl != l.Size {
		return 0, fmt.Errorf("%w: the module has %d bytes, its manifest declares %d", ErrDigestMismatch, cl, l.Size)
	}

	f, err := os.CreateTemp(filepath.Dir(dst), ".pull-*")
	if err != nil {
		return 0, fmt.Errorf("create file for the module: %w", err)
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
		}
	}()
	w := &blobWriter{f: f, sum: sha256.New(), total: l.Size, progress: progress}
	if _, err := io.Copy(w, io.LimitReader(resp.Body, l.Size+1)); err != nil {
		return 0, fmt.Errorf("receive module after %d of %d bytes: %w", w.done, l.Size, err)
	}
	if w.done < l.Size {
		return 0, fmt.Errorf("receive module: %d of %d bytes: %w", w.done, l.Size, io.ErrUnexpectedEOF)
	}
	if w.done > l.Size {
		return 0, fmt.Errorf("%w: the module has more bytes than the %d its manifest declares", ErrDigestMismatch, l.Size)
	}
	if got := hex.EncodeToString(w.sum.Sum(nil)); got != l.Digest.Hex {
		return 0, fmt.Errorf("%w: the module is sha256:%s, not %s", ErrDigestMismatch, got, l.Digest)
	}
	if [4]byte(wasmMagic) != w.head {
		return 0, fmt.Errorf("%w: the module does not begin with the Wasm magic bytes", ErrNotWasm)
	}
	start := time.Now()
	if err := f.Sync(); err != nil {
		return 0, fmt.Errorf("sync module: %w", err)
	}
	if err := f.Close(); err != nil {
		return 0, fmt.Errorf("close module: %w", err)
	}
	if err := os.Rename(f.Name(), dst); err != nil {
		return 0, fmt.Errorf("publish module: %w", err)
	}
	if err := syncDir(filepath.Dir(dst)); err != nil {
		os.Remove(dst)
		return 0, err
	}
	return w.hashing + time.Since(start), nil
}

// blobWriter writes and hashes, and counts the time hashing takes.
type blobWriter struct {
	f           *os.File
	sum         hash.Hash
	head        [4]byte
	done, total int64
	hashing     time.Duration
	progress    func(done, total int64)
}

func (w *blobWriter) Write(p []byte) (int, error) {
	if w.done < int64(len(w.head)) {
		copy(w.head[w.done:], p)
	}
	start := time.Now()
	w.sum.Write(p)
	w.hashing += time.Since(start)
	n, err := w.f.Write(p)
	w.done += int64(n)
	if w.progress != nil && err == nil {
		w.progress(min(w.done, w.total), w.total)
	}
	return n, err
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync directory: %w", err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("sync directory %s: %w", dir, err)
	}
	return nil
}

func ms(d time.Duration) float64 { return float64(max(d, 0).Microseconds()) / 1000 }

// guard is the transport under every call: it cancels a transfer in which no
// byte moved for the stall time, and refuses HTTPS where the registry is
// known to speak HTTP, which saves a failed handshake per call.
type guard struct {
	next      http.RoundTripper
	stall     time.Duration
	plainOnly bool
	// home is the one host that may have a link-local address: the one that
	// was configured.
	home string
}

func (g *guard) RoundTrip(req *http.Request) (*http.Response, error) {
	if g.plainOnly && req.URL.Scheme == "https" {
		return nil, errors.New("this registry is configured to speak HTTP")
	}
	address, _, _ := strings.Cut(req.URL.Hostname(), "%")
	if ip := net.ParseIP(address); ip != nil && ip.IsLinkLocalUnicast() && req.URL.Host != g.home {
		// Where a redirect or an upload's location may lead. Behind a proxy
		// the dialer cannot see it.
		if req.Body != nil {
			_ = req.Body.Close()
		}
		return nil, fmt.Errorf("%w: registries on the address %s are not contacted", ErrInvalidReference, ip)
	}
	ctx, cancel := context.WithCancelCause(req.Context())
	timer := time.AfterFunc(g.stall, func() { cancel(errStalled) })
	done := func() {
		timer.Stop()
		cancel(nil)
	}
	out := req.Clone(ctx)
	if req.Body != nil && req.Body != http.NoBody {
		out.Body = &watchedBody{ReadCloser: req.Body, ctx: ctx, moved: func() { timer.Reset(g.stall) }}
	}
	resp, err := g.next.RoundTrip(out)
	if err != nil {
		err = stallCause(ctx, err)
		done()
		return nil, err
	}
	timer.Reset(g.stall)
	if current, ok := ctx.Value(callKey{}).(*call); ok {
		current.noteAnswer(resp)
	}
	resp.Body = &watchedBody{ReadCloser: resp.Body, ctx: ctx, moved: func() { timer.Reset(g.stall) }, done: done}
	return resp, nil
}

// stallCause replaces "context canceled" by the reason when it was ours.
func stallCause(ctx context.Context, err error) error {
	if errors.Is(context.Cause(ctx), errStalled) {
		return fmt.Errorf("%w (%s)", errStalled, strconv.Quote(err.Error()))
	}
	return err
}

type watchedBody struct {
	io.ReadCloser
	ctx   context.Context
	moved func()
	done  func()
}

func (b *watchedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if n > 0 && err == nil {
		b.moved()
	}
	if err != nil && !errors.Is(err, io.EOF) {
		err = stallCause(b.ctx, err)
	}
	return n, err
}

func (b *watchedBody) Close() error {
	err := b.ReadCloser.Close()
	if b.done != nil {
		b.done()
	}
	return err
}
