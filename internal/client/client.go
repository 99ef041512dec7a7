// Package client is the Go client of the submit API, as the command line uses it.
//
// It owns requests, retries and the shape of errors. Every call that changes
// something carries an Idempotency-Key, so trying it again is safe; what the
// API answers is passed on as it is. It must not print, read files it was not
// given or decide what a person sees.
package client

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/localsocket"
)

const (
	// DefaultURL is where `nodeagent dev` listens.
	DefaultURL = "http://127.0.0.1:8080"

	// maxAttempts bounds how often one call is sent; with the delays below
	// the last attempt comes about 6 s after the first.
	maxAttempts = 6
	firstDelay  = 200 * time.Millisecond
	maxDelay    = 3 * time.Second
	// firstTurn is how long at least a call that finds the server busy waits for
	// its turn; a longer Change.Wait is for that, too. A place becomes free after
	// each submit that is being worked on.
	firstTurn = 15 * time.Second
	// maxRetryAfter is the longest Retry-After that is waited for: beyond it
	// (a full disk, say) a person would rather have the answer now.
	maxRetryAfter = 10 * time.Second
	// shortCall bounds calls that only read or write the API's database.
	shortCall = 30 * time.Second
	// uploadAllowance is added to the wait of a call that carries a module:
	// 50 MiB at 1 Mbit/s takes seven minutes.
	uploadAllowance = 10 * time.Minute
	// readyAllowance is added to the wait of a call without a body.
	readyAllowance = 30 * time.Second
	// MaxServerWait is the longest ?wait= that the API takes.
	MaxServerWait = 300 * time.Second

	// maxDocument bounds a JSON answer: a list of 1,000 functions with full
	// environments would be larger, and is paged.
	maxDocument = 80 << 20
	// maxProblem bounds a problem document.
	maxProblem = 64 << 10
	// expectContinueFrom is the body size from which the server is asked
	// first: a refusal then comes before megabytes have been sent.
	expectContinueFrom = 1 << 20
	// expectContinueWait is how long to wait for that word before sending anyway.
	expectContinueWait = time.Second
)

// Options configure a Client; the zero value reaches DefaultURL.
type Options struct {
	// URL of the API: http://…, https://…, or unix:///path/of/api.sock.
	URL string
	// UserAgent is sent with every request.
	UserAgent string
	// OnRetry is told before a call is tried again. May be nil.
	OnRetry func(err error, delay time.Duration)
	// Transport defaults to one of its own that honours HTTP(S)_PROXY.
	Transport http.RoundTripper
	// RootCAs verify the server of an https URL instead of the system's; for
	// the client's own transport. May be nil.
	RootCAs *x509.CertPool
	// Token is asked for the bearer token of each call. rejected is the one
	// that the server did not accept at the attempt before, "" otherwise: when
	// it is returned again, or "", the refusal stands. Functions never get the
	// token. May be nil.
	Token func(ctx context.Context, rejected string) (string, error)
	// Name says for people which API this is; defaults to the URL.
	Name string
	// Closer is closed with the client: what the transport goes through. May be nil.
	Closer io.Closer
	// Sleep waits between attempts; defaults to a timer that ends with the context.
	Sleep func(context.Context, time.Duration) error
}

// Client calls the API. It is safe for concurrent use; Close ends the
// connections it keeps.
type Client struct {
	o    Options
	base *url.URL
	http *http.Client
	// functions sends what is for a function at its own URL.
	functions *http.Client
}

// New returns a client; it does not connect yet.
func New(o Options) (*Client, error) {
	if o.URL == "" {
		o.URL = DefaultURL
	}
	if !strings.Contains(o.URL, "://") {
		o.URL = "http://" + o.URL
	}
	base, err := url.Parse(o.URL)
	if err != nil {
		return nil, fmt.Errorf("the server's URL is not valid: %w", err)
	}
	if o.Sleep == nil {
		o.Sleep = sleep
	}
	c := &Client{o: o, base: base}
	switch base.Scheme {
	case "http", "https":
		if base.Host == "" {
			return nil, fmt.Errorf("the server's URL %q names no host; give one such as %s", o.URL, DefaultURL)
		}
		base.Path = strings.TrimRight(base.Path, "/")
		base.RawQuery, base.Fragment = "", ""
		transport := o.Transport
		if transport == nil {
			own := newTransport()
			if o.RootCAs != nil {
				own.TLSClientConfig = &tls.Config{RootCAs: o.RootCAs, MinVersion: tls.VersionTLS12}
			}
			transport = own
		}
		c.http = &http.Client{Transport: transport, CheckRedirect: noRedirect}
	case "unix":
		c.http = localsocket.HTTPClient(base.Path)
		c.base, _ = url.Parse(localsocket.BaseURL)
	default:
		return nil, fmt.Errorf("the server's URL %q has scheme %q; http, https and unix are known", o.URL, base.Scheme)
	}
	functions := newTransport()
	functions.DialContext = dialNamed(functions.DialContext)
	c.functions = &http.Client{Transport: functions, CheckRedirect: noRedirect}
	if c.o.Name == "" {
		c.o.Name = c.URL()
	}
	return c, nil
}

func newTransport() *http.Transport {
	return &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: 10 * time.Second}).DialContext,
		TLSHandshakeTimeout:   10 * time.Second,
		ExpectContinueTimeout: expectContinueWait,
		IdleConnTimeout:       time.Minute,
		ForceAttemptHTTP2:     true,
	}
}

// noRedirect keeps modules and secrets from following a Location elsewhere.
func noRedirect(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

// Close ends idle connections and closes Options.Closer.
func (c *Client) Close() {
	c.http.CloseIdleConnections()
	c.functions.CloseIdleConnections()
	if c.o.Closer != nil {
		_ = c.o.Closer.Close() // nothing is lost: every answer was read
	}
}

// URL is the server's URL, without a trailing slash.
func (c *Client) URL() string { return strings.TrimRight(c.base.String(), "/") }

// ProblemError is the API's refusal, an RFC 9457 problem document.
type ProblemError struct {
	v1alpha1.Problem
	// RetryAfter is the answer's Retry-After, 0 for none.
	RetryAfter time.Duration
	// API is the name of the one that refused; "" for a function's gateway.
	API string
}

// Code is the last segment of the problem's type; "" when it has none.
func (e *ProblemError) Code() string {
	if e.Type == "" || e.Type == "about:blank" {
		return ""
	}
	return e.Type[strings.LastIndexByte(e.Type, '/')+1:]
}

func (e *ProblemError) Error() string {
	switch {
	case e.Title != "" && e.Detail != "":
		return e.Title + ": " + e.Detail
	case e.Detail != "":
		return e.Detail
	case e.Title != "":
		return e.Title
	}
	return fmt.Sprintf("the server answered %d %s", e.Status, http.StatusText(e.Status))
}

// UnreachableError says that no HTTP answer came from the server.
type UnreachableError struct {
	// URL is that of the server, or its name when that says more.
	URL string
	Err error
}

func (e *UnreachableError) Error() string {
	return fmt.Sprintf("no answer from %s: %v", e.URL, rootCause(e.Err))
}

func (e *UnreachableError) Unwrap() error { return e.Err }

// rootCause drops the layers that only repeat method and URL.
func rootCause(err error) error {
	var urlErr *url.Error
	if errors.As(err, &urlErr) {
		return urlErr.Err
	}
	return err
}

// call is one request that may be sent several times.
type call struct {
	method string
	path   []string // escaped and joined
	query  url.Values
	header http.Header
	// body opens the body anew for each attempt; nil for none.
	body func() (io.ReadCloser, error)
	size int64
	// timeout bounds all attempts together.
	timeout time.Duration
	// patience is how long the caller waits for what the call is to do.
	patience time.Duration
}

// do sends the call until it is answered with anything but a passing failure.
// The answer's status is below 400; the caller closes its body.
func (c *Client) do(ctx context.Context, k call) (*http.Response, error) {
	key := ""
	if k.method != http.MethodGet {
		key = newKey()
	}
	delays := &backoff.ExponentialBackOff{
		InitialInterval: firstDelay, RandomizationFactor: 0.3, Multiplier: 2, MaxInterval: maxDelay,
	}
	delays.Reset()
	patience := max(k.patience, firstTurn)
	began, waited := time.Now(), time.Duration(0)
	rejected := ""
	for attempt := 1; ; attempt++ {
		token, err := c.token(ctx, rejected)
		if err != nil {
			return nil, err
		}
		resp, err := c.send(ctx, k, key, token)
		if err == nil {
			return resp, nil
		}
		// A refused token may have expired on the way. Nothing was done, so
		// another is tried at once, but only one.
		if rejected == "" && token != "" && unauthenticated(err) {
			rejected = token
			if fresh, err := c.token(ctx, rejected); err == nil && fresh != "" && fresh != rejected {
				continue
			}
		}
		delay, again := retryDelay(err, attempt, delays, patience-max(waited, time.Since(began)))
		if !again || ctx.Err() != nil {
			return nil, err
		}
		if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) < delay {
			return nil, err // the word of the server says more than a timeout
		}
		if c.o.OnRetry != nil {
			c.o.OnRetry(err, delay)
		}
		if c.o.Sleep(ctx, delay) != nil {
			return nil, err
		}
		waited += delay
	}
}

// token asks for the token of a call; "" when there is none to send.
func (c *Client) token(ctx context.Context, rejected string) (string, error) {
	if c.o.Token == nil {
		return "", nil
	}
	return c.o.Token(ctx, rejected)
}

func unauthenticated(err error) bool {
	var problem *ProblemError
	return errors.As(err, &problem) && problem.Status == http.StatusUnauthorized
}

// retryDelay is before the next attempt, if there is to be one; left is how much
// of the caller's patience there is.
func retryDelay(err error, attempt int, delays *backoff.ExponentialBackOff, left time.Duration) (time.Duration, bool) {
	delay := delays.NextBackOff()
	var problem *ProblemError
	if errors.As(err, &problem) {
		if problem.Retryable && problem.Status == http.StatusTooManyRequests {
			// A turn comes for all who go on asking. Those who were told the same
			// time do not come back at once.
			delay += problem.RetryAfter
			return delay, delay <= left || attempt < maxAttempts && problem.RetryAfter <= maxRetryAfter
		}
		switch {
		case !problem.Retryable, problem.RetryAfter > maxRetryAfter:
			return 0, false
		case problem.Status == http.StatusConflict:
			// The first attempt is still at work: its answer is worth
			// waiting for as long as the caller does.
			return max(delay, problem.RetryAfter), true
		}
		return max(delay, problem.RetryAfter), attempt < maxAttempts
	}
	var unreachable *UnreachableError
	if errors.As(err, &unreachable) {
		// Nobody there at the first attempt is no passing failure: say so at once.
		return delay, attempt < maxAttempts && (attempt > 1 || !refused(err)) && !untrusted(err)
	}
	return 0, false
}

// untrusted says that the server's certificate was not accepted, which trying
// again does not change.
func untrusted(err error) bool {
	var verification *tls.CertificateVerificationError
	return errors.As(err, &verification)
}

func refused(err error) bool {
	var dns *net.DNSError
	return errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, localsocket.ErrNotRunning) || errors.As(err, &dns)
}

func (c *Client) send(ctx context.Context, k call, key, token string) (*http.Response, error) {
	target := c.base.JoinPath(k.path...)
	target.RawQuery = k.query.Encode()
	var body io.ReadCloser
	if k.body != nil {
		var err error
		if body, err = k.body(); err != nil {
			return nil, err
		}
	}
	req, err := http.NewRequestWithContext(ctx, k.method, target.String(), nil)
	if err != nil {
		if body != nil {
			_ = body.Close()
		}
		return nil, err
	}
	for name, values := range k.header {
		req.Header[name] = values
	}
	if body != nil {
		req.Body, req.ContentLength = body, k.size
		if k.size >= expectContinueFrom {
			req.Header.Set("Expect", "100-continue")
		}
	}
	if key != "" {
		req.Header.Set("Idempotency-Key", key)
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	if c.o.UserAgent != "" {
		req.Header.Set("User-Agent", c.o.UserAgent)
	}
	if req.Header.Get("Accept") == "" {
		req.Header.Set("Accept", "application/json, application/problem+json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			return nil, contextError(ctx, c.o.Name)
		}
		return nil, &UnreachableError{URL: c.o.Name, Err: err}
	}
	if resp.StatusCode >= 300 {
		defer drain(resp.Body)
		return nil, c.readProblem(resp)
	}
	return resp, nil
}

// contextError tells a person's Ctrl-C from a deadline.
func contextError(ctx context.Context, target string) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return &UnreachableError{URL: target, Err: fmt.Errorf("it took too long: %w", context.DeadlineExceeded)}
	}
	return context.Cause(ctx)
}

// drain reads the rest of a small body so that its connection can be used
// again, and closes it.
func drain(body io.ReadCloser) {
	_, _ = io.CopyN(io.Discard, body, maxProblem)
	_ = body.Close()
}

func (c *Client) readProblem(resp *http.Response) error {
	data, _ := io.ReadAll(io.LimitReader(resp.Body, maxProblem))
	p := parseProblem(resp.StatusCode, resp.Header.Get("Content-Type"), data)
	p.RetryAfter = parseRetryAfter(resp.Header.Get("Retry-After"), time.Now())
	p.API = c.o.Name
	return p
}

// parseProblem makes the best of an error answer: a problem document, or
// whatever a proxy in between has written.
func parseProblem(status int, contentType string, data []byte) *ProblemError {
	p := &ProblemError{}
	mediaType, _, _ := mime.ParseMediaType(contentType)
	if mediaType == "application/problem+json" && json.Unmarshal(data, &p.Problem) == nil {
		p.Status = status // the document's own is advisory (RFC 9457, 3.1.2)
		return p
	}
	p.Problem = v1alpha1.Problem{
		Title:  fmt.Sprintf("the server answered %d %s", status, http.StatusText(status)),
		Status: status,
		Retryable: status == http.StatusTooManyRequests || status == http.StatusBadGateway ||
			status == http.StatusServiceUnavailable || status == http.StatusGatewayTimeout,
	}
	if mediaType == "text/plain" || mediaType == "" {
		line, _, _ := strings.Cut(strings.TrimSpace(strings.ToValidUTF8(string(data), "")), "\n")
		if len(line) > 200 {
			line = strings.ToValidUTF8(line[:200], "") + "…"
		}
		p.Detail = line
	}
	return p
}

// parseRetryAfter reads both forms of RFC 9110, 10.2.3. Nonsense is 0.
func parseRetryAfter(s string, now time.Time) time.Duration {
	if seconds, err := strconv.Atoi(s); err == nil {
		if seconds < 0 {
			return 0
		}
		return time.Duration(min(seconds, 24*60*60)) * time.Second
	}
	if t, err := http.ParseTime(s); err == nil {
		return max(0, t.Sub(now))
	}
	return 0
}

// answer sends the call and decodes the JSON it is answered with into out
// (nil: the body is ignored). It returns the answer's header and status.
func (c *Client) answer(ctx context.Context, k call, out any) (http.Header, int, error) {
	if k.timeout == 0 {
		k.timeout = shortCall
	}
	ctx, cancel := context.WithTimeout(ctx, k.timeout)
	defer cancel()
	resp, err := c.do(ctx, k) //nolint:bodyclose // drain closes it
	if err != nil {
		return nil, 0, err
	}
	defer drain(resp.Body)
	if out == nil || resp.StatusCode == http.StatusNoContent {
		return resp.Header, resp.StatusCode, nil
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxDocument+1))
	switch {
	case err != nil && ctx.Err() != nil:
		return nil, 0, contextError(ctx, c.o.Name)
	case err != nil:
		return nil, 0, &UnreachableError{URL: c.o.Name, Err: fmt.Errorf("the answer broke off: %w", err)}
	case len(data) > maxDocument:
		return nil, 0, fmt.Errorf("the answer of %s is larger than %d MiB", c.o.Name, maxDocument>>20)
	}
	if err := json.Unmarshal(data, out); err != nil {
		return nil, 0, fmt.Errorf("the answer of %s is not the JSON that was asked for; is it a Hearth server? (%w)", c.o.Name, err)
	}
	return resp.Header, resp.StatusCode, nil
}

func jsonBody(v any) (func() (io.ReadCloser, error), int64, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return nil, 0, err
	}
	return func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil }, int64(len(data)), nil
}

// newKey returns an Idempotency-Key that nobody else has.
func newKey() string {
	var key [16]byte
	_, _ = rand.Read(key[:]) // never fails: see crypto/rand
	return hex.EncodeToString(key[:])
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
