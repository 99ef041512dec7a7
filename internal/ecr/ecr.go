package ecr

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials/ec2rolecreds"
	"github.com/aws/aws-sdk-go-v2/service/ecr"
	"github.com/aws/aws-sdk-go-v2/service/ecrpublic"
	"github.com/aws/smithy-go"

	"github.com/hearth-sh/hearth/internal/imds"
)

const (
	// DefaultTimeout bounds getting one token, with all attempts and the
	// role's credentials.
	DefaultTimeout = 30 * time.Second
	// attemptTimeout bounds one request.
	attemptTimeout = 10 * time.Second
	// attempts of one request; throttling and failures of the service are
	// tried again after a growing, random wait of at most maxBackoff.
	attempts   = 4
	maxBackoff = 5 * time.Second

	// failurePause is how long a failure is repeated to callers, rather than
	// asking again: every pull on a node asks.
	failurePause = 5 * time.Second
	// renewPause is how long a token past half its life is used on after a
	// renewal failed.
	renewPause = time.Minute
	// expiryMargin is how long before its end a token is no longer handed out:
	// a pull of large layers must be able to finish with it.
	expiryMargin = 5 * time.Minute
	// rejectionPause is the least time between two tokens that are asked for
	// because a registry rejected the one before: the second was rejected for
	// what the role may not do, and so would be the third.
	rejectionPause = time.Minute
	// assumedLife is taken for that of a token which seems to have expired
	// before it was issued. The clock of this machine is wrong then, or not
	// set yet, and the token most likely good.
	assumedLife = 10 * time.Minute

	// maxTokenBytes bounds tokens; they have about 2 KiB.
	maxTokenBytes = 16 << 10
	// maxRegistries bounds the registries whose tokens are kept: host names
	// come from whoever names an image.
	maxRegistries = 64
)

// What can be wrong; errors of Credentials and Ensure are one of these, of the
// context or of internal/imds. Each has a method Temporary() bool, which says
// whether the same call may succeed later with nothing changed by anyone.
var (
	// ErrNotECR: the host is none of ECR's.
	ErrNotECR error = &kind{text: "not an ECR registry"}
	// ErrDenied: the role must not have a token.
	ErrDenied error = &kind{text: "ECR denies a token"}
	// ErrUnavailable: ECR or the role's credentials cannot be had now.
	ErrUnavailable error = &kind{text: "ECR is unavailable", temporary: true}
	// ErrMalformed: ECR's answer has no usable token.
	ErrMalformed error = &kind{text: "ECR's answer is malformed"}
	// ErrRepositoryDenied: the role must not look for or make a repository.
	ErrRepositoryDenied error = &kind{text: "ECR denies a repository"}
	// ErrLimit: a quota of the account is used up.
	ErrLimit error = &kind{text: "a quota of ECR is used up"}
	// ErrRefused: ECR does not take the repository as it is asked for.
	ErrRefused error = &kind{text: "ECR refuses the repository"}
)

// kind is a class of errors.
type kind struct {
	text      string
	temporary bool
}

func (k *kind) Error() string   { return k.text }
func (k *kind) Temporary() bool { return k.temporary }

// Credentials are a user name and a password for one registry. Printing or
// logging them shows no password.
type Credentials struct {
	Username string
	Password string
	// Expires is when the registry stops taking them.
	Expires time.Time
}

// String hides the password.
func (c Credentials) String() string {
	return fmt.Sprintf("credentials of %s until %s", c.Username, c.Expires.UTC().Format(time.RFC3339))
}

// GoString hides the password.
func (c Credentials) GoString() string { return c.String() }

// LogValue hides the password.
func (c Credentials) LogValue() slog.Value { return slog.StringValue(c.String()) }

// MarshalJSON refuses: who must pass credentials on takes the fields.
func (c Credentials) MarshalJSON() ([]byte, error) {
	return nil, errors.New("credentials for a registry are not to be written down")
}

// Options configure a Source. One of Metadata and Provider is required.
type Options struct {
	// Metadata is where the instance's role gets its credentials; *imds.Client
	// of internal/imds is one.
	Metadata ec2rolecreds.GetMetadataAPIClient
	// Provider gives AWS credentials in place of the instance's role.
	Provider aws.CredentialsProvider
	// Timeout bounds getting one token; 0 means DefaultTimeout.
	Timeout time.Duration
	// FirstUse is called before the first token of a registry is asked for,
	// and may wait: the nodes of a fleet that start together would otherwise
	// ask together. Jitter makes one that does. An error is returned to the caller. Nil does not wait.
	FirstUse func(ctx context.Context, r Registry) error
	// Now defaults to time.Now.
	Now func() time.Time
	// HTTPClient defaults to one with a deadline of 10 s for each request that
	// uses the proxy and the certificates (AWS_CA_BUNDLE) of the environment.
	HTTPClient *http.Client
	// Logger gets events without secrets; nil discards.
	Logger *slog.Logger
}

// Source gives credentials for ECR. It is safe for concurrent use and starts
// no goroutine: those who need a token get it, one at a time per registry.
type Source struct {
	config   aws.Config
	http     *http.Client
	role     *aws.CredentialsCache
	timeout  time.Duration
	firstUse func(context.Context, Registry) error
	now      func() time.Time
	log      *slog.Logger

	mu      sync.Mutex
	entries map[Registry]*entry
}

// entry is what is known of one registry.
type entry struct {
	// turn is held by the caller that asks for a token. A channel, so that
	// those who wait can leave with their context.
	turn chan struct{}

	// Guarded by Source.mu; written only by the holder of turn, but for stale.
	credentials Credentials // zero before the first
	issued      time.Time
	stale       bool      // rejected by the registry
	rejected    time.Time // when a rejection last was a reason for a new one
	quiet       time.Time // until then, no new attempt after a failure
	failure     error
	used        bool // FirstUse was called and let the caller go on
}

// New returns a source. It reads AWS_ENDPOINT_URL and the like from the
// environment, no files, and exchanges nothing yet.
func New(ctx context.Context, o Options) (*Source, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Timeout == 0 {
		o.Timeout = DefaultTimeout
	}
	provider := o.Provider
	if provider == nil {
		if o.Metadata == nil {
			return nil, errors.New("credentials for ECR need the instance's metadata or a provider")
		}
		provider = ec2rolecreds.New(func(p *ec2rolecreds.Options) { p.Client = o.Metadata })
	}
	// Half of the jitter at expiry is the SDK's; the window has the role's
	// credentials replaced before a request with them can fail.
	role := aws.NewCredentialsCache(provider, func(c *aws.CredentialsCacheOptions) {
		c.ExpiryWindow, c.ExpiryWindowJitterFrac = expiryMargin, 0.5
	})
	cfg, err := config.LoadDefaultConfig(ctx,
		config.WithCredentialsProvider(role),
		config.WithRegion(publicRegion), // each request says its own
		config.WithSharedConfigFiles([]string{}), config.WithSharedCredentialsFiles([]string{}),
		config.WithRetryer(func() aws.Retryer {
			return retry.NewStandard(func(s *retry.StandardOptions) { s.MaxAttempts, s.MaxBackoff = attempts, maxBackoff })
		}))
	if err != nil {
		return nil, fmt.Errorf("reading the AWS settings of the environment: %w", err)
	}
	if o.HTTPClient == nil {
		// The SDK's own transport, for it knows AWS_CA_BUNDLE, in a client
		// whose connections can be closed.
		sdk, ok := cfg.HTTPClient.(*awshttp.BuildableClient)
		if !ok {
			sdk = awshttp.NewBuildableClient()
		}
		o.HTTPClient = &http.Client{Transport: sdk.GetTransport(), Timeout: attemptTimeout}
	}
	cfg.HTTPClient = o.HTTPClient
	return &Source{
		config: cfg, http: o.HTTPClient, role: role, timeout: o.Timeout, firstUse: o.FirstUse, now: o.Now, log: o.Logger,
		entries: map[Registry]*entry{},
	}, nil
}

// Jitter returns a FirstUse that waits for a random part of most, or until the
// context ends.
func Jitter(most time.Duration) func(context.Context, Registry) error {
	return func(ctx context.Context, _ Registry) error {
		if most <= 0 {
			return nil
		}
		timer := time.NewTimer(rand.N(most))
		defer timer.Stop()
		select {
		case <-timer.C:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Close drops idle connections to ECR. The source stays usable.
func (s *Source) Close() { s.http.CloseIdleConnections() }

// Credentials returns those for a host of ECR, at least five minutes before
// their end unless ECR issues shorter ones. It asks ECR when there are none, at
// half of their life and after Invalidate. When it cannot renew credentials
// that are still good, it returns these.
func (s *Source) Credentials(ctx context.Context, host string) (Credentials, error) {
	r, ok := ParseHost(host)
	if !ok {
		return Credentials{}, fmt.Errorf("%w: %.100q", ErrNotECR, host)
	}
	asked := s.now()
	s.mu.Lock()
	e := s.entryLocked(r)
	c, ok := e.readyLocked(asked)
	s.mu.Unlock()
	if ok {
		return c, nil
	}
	select {
	case e.turn <- struct{}{}:
	case <-ctx.Done():
		return Credentials{}, fmt.Errorf("waiting for credentials of %s: %w", host, ctx.Err())
	}
	defer func() { <-e.turn }()
	now := s.now()
	s.mu.Lock()
	c, ok = e.readyLocked(now) // another caller may have renewed them
	failure, quiet, used := e.failure, now.Before(e.quiet), e.used
	s.mu.Unlock()
	switch {
	case ok:
		return c, nil
	case quiet:
		return Credentials{}, failure
	}
	if !used && s.firstUse != nil {
		if err := s.firstUse(ctx, r); err != nil {
			return Credentials{}, fmt.Errorf("before the first token of %s: %w", host, err)
		}
		s.mu.Lock()
		e.used = true
		s.mu.Unlock()
	}
	fresh, err := s.fetch(ctx, r)
	return s.settle(ctx, e, host, fresh, err)
}

// entryLocked finds or makes the entry. A full table forgets the registry
// whose credentials end first; callers that hold its entry go on with that.
func (s *Source) entryLocked(r Registry) *entry {
	if e := s.entries[r]; e != nil {
		return e
	}
	if len(s.entries) >= maxRegistries {
		var victim *Registry
		for k, e := range s.entries {
			if victim == nil || e.credentials.Expires.Before(s.entries[*victim].credentials.Expires) {
				victim = &k
			}
		}
		delete(s.entries, *victim)
	}
	e := &entry{turn: make(chan struct{}, 1)}
	s.entries[r] = e
	return e
}

// readyLocked returns credentials that need no renewal now.
func (e *entry) readyLocked(now time.Time) (Credentials, bool) {
	if e.credentials.Password == "" || e.stale || !e.goodLocked(now) {
		return Credentials{}, false
	}
	half := e.issued.Add(e.credentials.Expires.Sub(e.issued) / 2)
	if now.Before(half) || now.Before(e.quiet) {
		return e.credentials, true
	}
	return Credentials{}, false
}

// goodLocked says whether the registry still takes the credentials for long
// enough. The clock may have been set back since they were issued.
func (e *entry) goodLocked(now time.Time) bool {
	margin := min(expiryMargin, e.credentials.Expires.Sub(e.issued)/4)
	return now.Before(e.credentials.Expires.Add(-margin))
}

// settle enters the outcome of a fetch and returns what the caller gets.
func (s *Source) settle(ctx context.Context, e *entry, host string, fresh Credentials, err error) (Credentials, error) {
	now := s.now()
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil {
		e.credentials, e.issued, e.stale, e.failure, e.quiet = fresh, now, false, nil, time.Time{}
		// On the clock that nobody can set: a token is as good after this
		// machine's clock was set as it was before.
		e.credentials.Expires = now.Add(fresh.Expires.Sub(now))
		if !fresh.Expires.After(now) {
			e.credentials.Expires = now.Add(assumedLife)
			s.log.Warn("a token of ECR seems to have expired before it was issued; check this machine's clock", "registry", host, "expires", fresh.Expires)
		}
		s.log.Debug("got a token of ECR", "registry", host, "expires", e.credentials.Expires)
		return e.credentials, nil
	}
	if ctx.Err() != nil { // the caller's own end says nothing about ECR
		return Credentials{}, err
	}
	e.failure = err
	if e.credentials.Password != "" && !e.stale && e.goodLocked(now) {
		e.quiet = now.Add(renewPause)
		s.log.Warn("a token of ECR could not be renewed; the old one is used on", "registry", host, "expires", e.credentials.Expires, "error", err)
		return e.credentials, nil
	}
	e.quiet = now.Add(failurePause)
	return Credentials{}, err
}

// Invalidate says that the registry rejected credentials (401, or 403 with
// tokens that died early) and reports whether asking Credentials again is
// worth it. Of many callers that were rejected with one token, the first has
// it replaced; so exactly one new token is asked for. It is not worth it when
// the one before was rejected a moment ago, too: then the role lacks a
// permission on the repository.
func (s *Source) Invalidate(host string, rejected Credentials) (retry bool) {
	r, ok := ParseHost(host)
	if !ok {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.entries[r]
	switch {
	case e == nil, e.stale:
		return true
	case e.credentials.Password != rejected.Password:
		return true // already replaced
	case !e.rejected.IsZero() && s.now().Sub(e.rejected).Abs() < rejectionPause:
		return false
	}
	e.stale, e.rejected = true, s.now()
	s.log.Info("a registry rejected its token", "registry", host)
	return true
}

// fetch asks ECR for a token.
func (s *Source) fetch(ctx context.Context, r Registry) (Credentials, error) {
	ctx, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	token, expires, err := s.ask(ctx, r)
	if expiredRole(err) {
		// Someone revoked the role's sessions, or the clock jumped.
		s.role.Invalidate()
		token, expires, err = s.ask(ctx, r)
	}
	if err != nil {
		return Credentials{}, explain(ctx, r, err)
	}
	return decode(token, expires)
}

func (s *Source) ask(ctx context.Context, r Registry) (token string, expires time.Time, err error) {
	if r.Public {
		out, err := ecrpublic.NewFromConfig(s.config, func(o *ecrpublic.Options) {
			o.Region = r.Region
		}).GetAuthorizationToken(ctx, &ecrpublic.GetAuthorizationTokenInput{})
		if err != nil || out.AuthorizationData == nil {
			return "", time.Time{}, err
		}
		return aws.ToString(out.AuthorizationData.AuthorizationToken), aws.ToTime(out.AuthorizationData.ExpiresAt), nil
	}
	out, err := s.private(r).GetAuthorizationToken(ctx, &ecr.GetAuthorizationTokenInput{
		RegistryIds: []string{r.Account}, //nolint:staticcheck // deprecated, since one token opens all registries; but implementations with more than one account need it
	})
	if err != nil || len(out.AuthorizationData) == 0 {
		return "", time.Time{}, err
	}
	return aws.ToString(out.AuthorizationData[0].AuthorizationToken), aws.ToTime(out.AuthorizationData[0].ExpiresAt), nil
}

// private is a client for the API of a private registry.
func (s *Source) private(r Registry) *ecr.Client {
	return ecr.NewFromConfig(s.config, func(o *ecr.Options) {
		o.Region = r.Region
		if r.FIPS {
			o.EndpointOptions.UseFIPSEndpoint = aws.FIPSEndpointStateEnabled
		}
		if r.DualStack {
			o.EndpointOptions.UseDualStackEndpoint = aws.DualStackEndpointStateEnabled
		}
	})
}

// decode reads a token: base64 of "user:password".
func decode(token string, expires time.Time) (Credentials, error) {
	bad := func(why string) (Credentials, error) {
		return Credentials{}, fmt.Errorf("%w: its token %s; check what answers at ECR's endpoint", ErrMalformed, why)
	}
	if token == "" || len(token) > maxTokenBytes {
		return bad(fmt.Sprintf("has %d bytes", len(token)))
	}
	b, err := base64.StdEncoding.DecodeString(token)
	if err != nil {
		return bad("is not base64")
	}
	user, password, ok := strings.Cut(string(b), ":")
	if !ok || user == "" || password == "" || strings.ContainsFunc(string(b), func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return bad("is not a user and a password")
	}
	return Credentials{Username: user, Password: password, Expires: expires}, nil
}

// expiredRole says whether ECR refused the role's credentials for their age.
func expiredRole(err error) bool {
	var api smithy.APIError
	if !errors.As(err, &api) {
		return false
	}
	switch api.ErrorCode() {
	case "ExpiredTokenException", "ExpiredToken", "UnrecognizedClientException", "InvalidClientTokenId", "RequestExpired", "InvalidSignatureException":
		return true
	}
	return false
}

// explain makes one sentence of the SDK's error. ECR's message is kept: it
// names the missing permission, and never a token.
func explain(ctx context.Context, r Registry, err error) error {
	where := r.Account + " in " + r.Region
	if r.Public {
		where = "the public gallery"
	}
	var metadata *imds.Error
	if errors.As(err, &metadata) {
		if errors.Is(metadata, imds.ErrNotFound) {
			return fmt.Errorf("%w: the instance has no IAM role; attach an instance profile whose role allows ecr:GetAuthorizationToken (%w)", ErrUnavailable, metadata)
		}
		return fmt.Errorf("%w: the instance's role gives no credentials: %w", ErrUnavailable, metadata)
	}
	var api smithy.APIError
	if errors.As(err, &api) {
		var answer interface{ HTTPStatusCode() int }
		status := 0
		if errors.As(err, &answer) {
			status = answer.HTTPStatusCode()
		}
		switch code := api.ErrorCode(); {
		case expiredRole(err):
			return fmt.Errorf("%w for %s, for it does not accept the role's credentials (%s); check this machine's clock, and that the role still exists", ErrDenied, where, code)
		case (status == http.StatusForbidden || status == http.StatusBadRequest) && code != "ThrottlingException":
			return fmt.Errorf("%w for %s (%s: %.300s); allow ecr:GetAuthorizationToken to the instance's role", ErrDenied, where, code, api.ErrorMessage())
		default:
			return fmt.Errorf("%w: no token for %s (%s); it usually recovers, else see the AWS health dashboard", ErrUnavailable, where, code)
		}
	}
	if errors.Is(ctx.Err(), context.Canceled) {
		return fmt.Errorf("asking for a token of ECR for %s: %w", where, context.Canceled)
	}
	return fmt.Errorf("%w: no token for %s; check the instance's role and its way to ECR: %w", ErrUnavailable, where, err)
}
