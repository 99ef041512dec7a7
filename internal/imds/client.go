package imds

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/ratelimit"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	sdk "github.com/aws/aws-sdk-go-v2/feature/ec2/imds"
	smithyhttp "github.com/aws/smithy-go/transport/http"
)

const (
	// EndpointIPv4 and EndpointIPv6 are the service's addresses on every instance.
	EndpointIPv4 = "http://169.254.169.254"
	EndpointIPv6 = "http://[fd00:ec2::254]"

	// DefaultAttemptTimeout bounds one exchange. The service answers within
	// milliseconds; a second leaves room for an instance that is busy booting.
	DefaultAttemptTimeout = time.Second
	// DefaultTimeout bounds one read with all its attempts, and so the wait for
	// the sentence that says why there is no answer.
	DefaultTimeout = 5 * time.Second
	// DefaultAttempts is how often one exchange is tried.
	DefaultAttempts = 3

	// firstBackoff and maxBackoff bound the wait between attempts, which
	// doubles; the service recovers at once or not within any caller's patience.
	firstBackoff = 100 * time.Millisecond
	maxBackoff   = 500 * time.Millisecond
	// idleTimeout closes kept connections. It is longer than the interval of
	// the watcher, so that polling does not connect anew each time.
	idleTimeout = 20 * time.Second

	// maxAnswerBytes bounds every answer but user-data. The largest others,
	// role credentials and scheduled events, stay far below.
	maxAnswerBytes = 16 << 10
	// maxTokenBytes bounds session tokens, which have 56 bytes today.
	maxTokenBytes = 1 << 10
	// maxUserDataBytes is EC2's limit of 16 KiB for raw user-data, and as much
	// again: other implementations of the service are less strict.
	maxUserDataBytes = 32 << 10

	pathToken    = "api/token"
	pathUserData = "user-data"

	envDisabled     = "AWS_EC2_METADATA_DISABLED"
	envEndpoint     = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
	envEndpointMode = "AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE"
)

// Mode says at which address the service is looked for.
type Mode string

// The modes.
const (
	// ModeAuto tries IPv4, then IPv6, and keeps the first that answers anything.
	ModeAuto Mode = ""
	ModeIPv4 Mode = "ipv4"
	ModeIPv6 Mode = "ipv6"
)

// Options configure a Client; the zero value is right on an instance.
type Options struct {
	// Endpoint is the service's URL, such as "http://[::1]:1338". Empty means
	// AWS_EC2_METADATA_SERVICE_ENDPOINT, and without that what Mode says.
	Endpoint string
	// Mode chooses the address where no endpoint is given. ModeAuto gives way
	// to AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE (IPv4 or IPv6).
	Mode Mode
	// AttemptTimeout bounds one exchange; 0 means DefaultAttemptTimeout.
	AttemptTimeout time.Duration
	// Timeout bounds one read with all attempts; 0 means DefaultTimeout.
	Timeout time.Duration
	// Attempts is how often an exchange is tried, 1 to 10; 0 means
	// DefaultAttempts. Only failures that may pass are tried again: no answer,
	// 5xx, 429, and once a refused token. Waits grow, with jitter.
	Attempts int
	// Getenv defaults to os.Getenv.
	Getenv func(string) string
	// Logger gets one event when the endpoint is found; nil discards.
	Logger *slog.Logger
}

// Client reads instance metadata. It is safe for concurrent use, starts no
// goroutine of its own and keeps idle connections for seconds; Close drops them.
type Client struct {
	attemptTimeout time.Duration
	timeout        time.Duration
	log            *slog.Logger
	transport      *http.Transport
	disabled       bool

	candidates []*endpoint
	// chosen holds the candidate in use, or nil before the first answer. It is
	// a channel so that those who wait for a probe can leave with their context.
	chosen chan *endpoint
}

// endpoint is one address of the service. Tokens belong to an address, so each
// has an SDK client of its own.
type endpoint struct {
	url string
	sdk *sdk.Client
}

// New returns a client. It exchanges nothing yet; an error is a mistake in the
// options or the environment.
func New(o Options) (*Client, error) {
	if o.Getenv == nil {
		o.Getenv = os.Getenv
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.AttemptTimeout == 0 {
		o.AttemptTimeout = DefaultAttemptTimeout
	}
	if o.Timeout == 0 {
		o.Timeout = DefaultTimeout
	}
	if o.Attempts == 0 {
		o.Attempts = DefaultAttempts
	}
	if o.AttemptTimeout < 0 || o.Timeout < 0 || o.Attempts < 1 || o.Attempts > 10 {
		return nil, errors.New("instance metadata timeouts must be positive, and attempts 1 to 10")
	}
	urls, err := endpoints(o)
	if err != nil {
		return nil, err
	}
	c := &Client{
		attemptTimeout: o.AttemptTimeout,
		timeout:        o.Timeout,
		log:            o.Logger,
		disabled:       strings.EqualFold(o.Getenv(envDisabled), "true"),
		chosen:         make(chan *endpoint, 1),
		transport: &http.Transport{
			// No proxy, whatever the environment says: a proxy would hand this
			// instance the metadata of its own host.
			Proxy:               nil,
			DialContext:         (&net.Dialer{Timeout: o.AttemptTimeout}).DialContext,
			MaxIdleConnsPerHost: 8,
			IdleConnTimeout:     idleTimeout,
			DisableCompression:  true,
			// The header is small; what is longer is no metadata service.
			MaxResponseHeaderBytes: 16 << 10,
		},
	}
	for _, u := range urls {
		c.candidates = append(c.candidates, c.newEndpoint(u, o.Attempts))
	}
	var first *endpoint
	if len(c.candidates) == 1 {
		first = c.candidates[0]
	}
	c.chosen <- first
	return c, nil
}

// Close drops idle connections. The client stays usable.
func (c *Client) Close() { c.transport.CloseIdleConnections() }

// endpoints resolves options and environment to URLs in the order to try.
func endpoints(o Options) ([]string, error) {
	from, given := "the endpoint", o.Endpoint
	if given == "" {
		from, given = envEndpoint, o.Getenv(envEndpoint)
		if o.Mode != ModeAuto {
			given = "" // an explicit option beats the environment
		}
	}
	if given != "" {
		u, err := url.Parse(given)
		if err != nil || u.Scheme != "http" || u.Host == "" || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.User != nil {
			return nil, fmt.Errorf("%s %s of instance metadata is not a URL like http://169.254.169.254; correct or unset it", from, quote(given))
		}
		return []string{"http://" + u.Host}, nil
	}
	mode := o.Mode
	if mode == ModeAuto {
		mode = Mode(strings.ToLower(o.Getenv(envEndpointMode)))
	}
	switch mode {
	case ModeAuto:
		return []string{EndpointIPv4, EndpointIPv6}, nil
	case ModeIPv4:
		return []string{EndpointIPv4}, nil
	case ModeIPv6:
		return []string{EndpointIPv6}, nil
	}
	return nil, fmt.Errorf("instance metadata endpoint mode %s is neither ipv4 nor ipv6; correct or unset it (%s)", quote(string(mode)), envEndpointMode)
}

func (c *Client) newEndpoint(u string, attempts int) *endpoint {
	return &endpoint{url: u, sdk: sdk.New(sdk.Options{
		Endpoint:   u,
		HTTPClient: &exchanger{http: &http.Client{Transport: c.transport, CheckRedirect: noRedirect}, timeout: c.attemptTimeout},
		Retryer: retry.NewStandard(func(o *retry.StandardOptions) {
			o.MaxAttempts = attempts
			o.Backoff = retry.BackoffDelayerFunc(func(attempt int, _ error) (time.Duration, error) { return backoff(attempt), nil })
			// The SDK's own limiter runs dry when an instance has many
			// readers, and then even a healthy service cannot be read.
			o.RateLimiter = ratelimit.None
			o.Retryables = []retry.IsErrorRetryable{retry.IsErrorRetryableFunc(retryable)}
		}),
		// The environment was read by New, and is answered with our sentence.
		ClientEnableState:        sdk.ClientEnabled,
		EnableFallback:           aws.FalseTernary,
		DisableDefaultTimeout:    true, // do sets one
		DisableDefaultMaxBackoff: true, // it replaces our waits by whole seconds
	})}
}

// backoff is the wait after an attempt, counted from 0: the upper half of a
// doubling bound, by chance, so that many readers do not return together.
func backoff(attempt int) time.Duration {
	bound := min(maxBackoff, firstBackoff<<min(attempt, 8))
	return bound/2 + rand.N(bound/2)
}

func noRedirect(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

// retryable says which failures may pass.
func retryable(err error) aws.Ternary {
	if errors.Is(err, errTooLong) || errors.Is(err, errRefusedTwice) || errors.Is(err, context.Canceled) {
		return aws.FalseTernary
	}
	// The token provider says so of a 401 (yes) and of a failed token
	// exchange, which had its own attempts (no).
	var said interface{ RetryableError() bool }
	if errors.As(err, &said) {
		return aws.BoolTernary(said.RetryableError())
	}
	var status interface{ HTTPStatusCode() int }
	if errors.As(err, &status) && status.HTTPStatusCode() != 0 {
		code := status.HTTPStatusCode()
		return aws.BoolTernary(code >= 500 || code == http.StatusTooManyRequests)
	}
	var sending *smithyhttp.RequestSendError
	return aws.BoolTernary(errors.As(err, &sending))
}

var (
	errTooLong      = errors.New("the answer is longer than allowed")
	errRefusedTwice = errors.New("a token was refused right after it was issued")
)

// call records what happened in one read, because the SDK's errors do not keep
// the status of a failed token exchange.
type call struct {
	token   bool // whether the last exchange was for a token
	status  int  // of the last exchange; 0 without an answer
	err     error
	refused int // answers 401
}

type callKey struct{}

// exchanger is the HTTP client under the SDK's. It holds each exchange to a
// deadline that covers the body, and each body to a size.
type exchanger struct {
	http    *http.Client
	timeout time.Duration
}

// Do makes one exchange and returns it with its whole body read.
func (x *exchanger) Do(req *http.Request) (*http.Response, error) {
	rec, _ := req.Context().Value(callKey{}).(*call)
	if rec == nil {
		rec = &call{} // nobody asks afterwards
	}
	path := strings.TrimPrefix(req.URL.Path, "/latest/")
	limit := int64(maxAnswerBytes)
	switch path {
	case pathToken:
		limit = maxTokenBytes
	case pathUserData:
		limit = maxUserDataBytes
	}
	rec.token, rec.status = path == pathToken, 0
	ctx, cancel := context.WithTimeout(req.Context(), x.timeout)
	defer cancel()
	resp, err := x.exchange(req.WithContext(ctx), limit)
	if resp != nil {
		rec.status = resp.StatusCode
		if resp.StatusCode == http.StatusUnauthorized && !rec.token {
			if rec.refused++; rec.refused > 1 && err == nil {
				// Without the answer: the SDK would try any 401 once more.
				resp, err = nil, errRefusedTwice
			}
		}
	}
	rec.err = err
	return resp, err
}

func (x *exchanger) exchange(req *http.Request, limit int64) (*http.Response, error) {
	resp, err := x.http.Do(req) //nolint:gosec // G107: the URL is the configured endpoint
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, limit+1))
	resp.Body = io.NopCloser(bytes.NewReader(body))
	switch {
	case err != nil:
		return resp, fmt.Errorf("reading the answer: %w", err)
	case int64(len(body)) > limit:
		return resp, fmt.Errorf("%w: more than %d bytes", errTooLong, limit)
	}
	return resp, nil
}

// read returns the answer to one path below /latest/, at most limit bytes.
func (c *Client) read(ctx context.Context, path string) ([]byte, error) {
	body, err := c.do(ctx, path, func(ctx context.Context, s *sdk.Client) (io.ReadCloser, error) {
		switch {
		case path == pathUserData:
			out, err := s.GetUserData(ctx, nil)
			if err != nil {
				return nil, err
			}
			return out.Content, nil
		case strings.HasPrefix(path, "dynamic/"):
			out, err := s.GetDynamicData(ctx, &sdk.GetDynamicDataInput{Path: strings.TrimPrefix(path, "dynamic/")})
			if err != nil {
				return nil, err
			}
			return out.Content, nil
		default:
			out, err := s.GetMetadata(ctx, &sdk.GetMetadataInput{Path: strings.TrimPrefix(path, "meta-data/")})
			if err != nil {
				return nil, err
			}
			return out.Content, nil
		}
	})
	if err != nil {
		return nil, err
	}
	defer body.Close()
	return io.ReadAll(body) // from memory, and already bounded
}

// GetMetadata is the SDK's operation of that name with this package's limits,
// endpoint and errors, so that a *Client can be the source of the SDK's
// provider of role credentials (credentials/ec2rolecreds).
func (c *Client) GetMetadata(ctx context.Context, in *sdk.GetMetadataInput, opts ...func(*sdk.Options)) (*sdk.GetMetadataOutput, error) {
	if in == nil {
		in = &sdk.GetMetadataInput{}
	}
	var out *sdk.GetMetadataOutput
	_, err := c.do(ctx, "meta-data/"+strings.TrimPrefix(in.Path, "/"), func(ctx context.Context, s *sdk.Client) (io.ReadCloser, error) {
		o, err := s.GetMetadata(ctx, in, opts...)
		if err != nil {
			return nil, err
		}
		out = o
		return o.Content, nil
	})
	return out, err
}

// do runs one operation at the right endpoint and explains its failure.
func (c *Client) do(ctx context.Context, path string, operation func(context.Context, *sdk.Client) (io.ReadCloser, error)) (io.ReadCloser, error) {
	if c.disabled {
		return nil, &Error{Kind: ErrDisabled, Path: path,
			sentence: fmt.Sprintf("instance metadata is not read because %s is true in the environment; unset it", envDisabled)}
	}
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	ep, err := c.find(ctx)
	if err != nil {
		return nil, err
	}
	rec := &call{}
	body, err := operation(context.WithValue(ctx, callKey{}, rec), ep.sdk)
	if err != nil {
		return nil, explain(ctx, ep.url, path, rec, err)
	}
	return body, nil
}

// find returns the endpoint in use, probing the candidates when there is none.
// Any answer decides, even a refusal: the service is there. When none answers
// nothing is remembered, so an instance whose network comes up late is found.
func (c *Client) find(ctx context.Context) (*endpoint, error) {
	var ep *endpoint
	select {
	case ep = <-c.chosen:
	case <-ctx.Done():
		return nil, explain(ctx, c.candidates[0].url, pathToken, &call{token: true}, ctx.Err())
	}
	defer func() { c.chosen <- ep }()
	if ep != nil {
		return ep, nil
	}
	var failures []string
	var cause error
	for _, candidate := range c.candidates {
		rec := &call{}
		// One attempt each: whoever reads afterwards has more.
		probe, cancel := context.WithTimeout(context.WithValue(ctx, callKey{}, rec), c.attemptTimeout)
		out, err := candidate.sdk.GetMetadata(probe, &sdk.GetMetadataInput{Path: "instance-id"}, func(o *sdk.Options) { o.Retryer = aws.NopRetryer{} })
		cancel()
		if err == nil {
			_ = out.Content.Close()
		}
		if rec.status != 0 {
			ep = candidate
			c.log.Info("found instance metadata", "endpoint", ep.url)
			return ep, nil
		}
		cause = errors.Join(cause, rec.err)
		failures = append(failures, fmt.Sprintf("%s: %s", candidate.url, transportReason(rec.err)))
	}
	if errors.Is(ctx.Err(), context.Canceled) {
		return nil, fmt.Errorf("looking for instance metadata: %w", ctx.Err())
	}
	return nil, &Error{Kind: ErrUnreachable, Path: pathToken, Err: cause,
		sentence: fmt.Sprintf("instance metadata answers neither over IPv4 nor IPv6 (%s); %s", strings.Join(failures, "; "), unreachableAdvice)}
}

const unreachableAdvice = "in a pod, use the host network or set the instance's metadata hop limit to 2; else check that this is an EC2 instance whose firewall lets the metadata address through"

// explain turns what happened into one sentence and a kind.
func explain(ctx context.Context, endpoint, path string, rec *call, err error) error {
	if errors.Is(ctx.Err(), context.Canceled) {
		return fmt.Errorf("reading instance metadata %s: %w", path, ctx.Err())
	}
	e := &Error{Path: path, Status: rec.status, Err: rec.err}
	if e.Err == nil {
		e.Err = err
	}
	switch status := rec.status; {
	case errors.Is(rec.err, errTooLong):
		e.Kind = ErrMalformed
		e.sentence = fmt.Sprintf("instance metadata %s is malformed: %v; check what answers at %s", path, rec.err, endpoint)
	case errors.Is(rec.err, errRefusedTwice), status == http.StatusUnauthorized:
		e.Kind = ErrUnavailable
		e.sentence = fmt.Sprintf("instance metadata at %s refuses the tokens that it issues (401 for %s); check for a proxy or a second metadata service in between", endpoint, path)
	case rec.err != nil || status == 0 || errors.Is(ctx.Err(), context.DeadlineExceeded):
		e.Kind = ErrUnreachable
		e.sentence = fmt.Sprintf("instance metadata at %s does not answer (%s: %s); %s", endpoint, path, transportReason(e.Err), unreachableAdvice)
	case status == http.StatusForbidden:
		e.Kind = ErrDisabled
		e.sentence = fmt.Sprintf("instance metadata at %s is disabled (403); enable the metadata endpoint (HttpEndpoint) in the instance's metadata options", endpoint)
	case rec.token && (status == http.StatusNotFound || status == http.StatusMethodNotAllowed):
		e.Kind = ErrVersion1
		e.sentence = fmt.Sprintf("instance metadata at %s issues no session tokens (%d), so it knows only IMDSv1, which is not used; update or replace what answers there", endpoint, status)
	case status == http.StatusNotFound:
		e.Kind = ErrNotFound
		e.sentence = fmt.Sprintf("instance metadata has no %s (404)", path)
	case status >= 500 || status == http.StatusTooManyRequests:
		e.Kind = ErrUnavailable
		e.sentence = fmt.Sprintf("instance metadata at %s keeps failing (%d for %s); it usually recovers, else reboot the instance", endpoint, status, path)
	default:
		// A redirect, a 400, or a token that cannot be parsed.
		e.Kind = ErrMalformed
		e.sentence = fmt.Sprintf("instance metadata at %s answers %s in an unknown way (%d: %v); check what answers there", endpoint, path, status, err)
	}
	return e
}

// transportReason is the end of an error's chain, without the URL that every
// layer repeats.
func transportReason(err error) string {
	var timeout interface{ Timeout() bool }
	switch {
	case err == nil:
		return "no answer"
	case errors.As(err, &timeout) && timeout.Timeout():
		return "timed out"
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		return "the answer was cut off"
	}
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Err.Error()
	}
	return err.Error()
}
