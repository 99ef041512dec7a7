package connect

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/transport/spdy"
	"k8s.io/client-go/transport/websocket"
	"k8s.io/klog/v2"
	"k8s.io/streaming/pkg/httpstream"
	streamspdy "k8s.io/streaming/pkg/httpstream/spdy"
)

const (
	// upgradeTimeout bounds opening one port-forward, which passes the API
	// server and a kubelet.
	upgradeTimeout = 15 * time.Second
	// dialTimeout bounds one connection to the API, waiting for a ready pod
	// included once there was one: as long as a pod takes to be replaced.
	dialTimeout = time.Minute
	// findInterval is between two looks for a ready pod.
	findInterval = 500 * time.Millisecond
	// handshakeTimeout bounds TLS with the pod.
	handshakeTimeout = 10 * time.Second
	// pingAfter and pingTimeout find a connection whose other end is gone
	// without a word, as with a node that lost its power.
	pingAfter   = 10 * time.Second
	pingTimeout = 10 * time.Second
	// errorGrace is how long the end of the data waits for the reason, which
	// comes in a stream of its own.
	errorGrace = 300 * time.Millisecond
	// maxForwardError bounds that reason.
	maxForwardError = 4 << 10
	// closeGrace bounds saying goodbye when a connection is closed.
	closeGrace = 2 * time.Second
	// dialAttempts is how many pods one connection tries.
	dialAttempts = 3
)

// ConnectOptions say what of the API is known already.
type ConnectOptions struct {
	// Token is used instead of one that is made for Options.ServiceAccount.
	// rejected is the token that the API did not accept, if any. May be nil.
	Token func(ctx context.Context, rejected string) (string, error)
	// RootCAs is used instead of the authority that the API published. May be nil.
	RootCAs *x509.CertPool
}

// Connection speaks to the API through a port-forward. It survives the pod:
// when that is replaced, the next connection goes to another ready one. It is
// safe for concurrent use; Close ends everything it started.
type Connection struct {
	cluster   *Cluster
	portName  string
	transport *http.Transport
	given     func(ctx context.Context, rejected string) (string, error)

	// tokens has room for one: who holds it may make the token.
	tokens chan struct{}
	held   heldToken // guarded by tokens

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup // every goroutine of this connection
	// opening has room for one: who holds it may replace current.
	opening chan struct{}
	mu      sync.Mutex // guards current and closed: Close comes while a session or a stream is being opened
	current *session
	closed  bool
}

// Connect finds the API, makes a token and opens the port-forward, so that
// whatever is missing is said at once. Errors are *Error.
func (c *Cluster) Connect(ctx context.Context, o ConnectOptions) (*Connection, error) {
	k := &Connection{cluster: c, given: o.Token, tokens: make(chan struct{}, 1), opening: make(chan struct{}, 1)}
	k.ctx, k.cancel = context.WithCancel(context.Background())
	roots := o.RootCAs

	// Three questions that do not depend on each other. What is missing first
	// in this order is the reason of what is missing after it.
	var questions sync.WaitGroup
	var findErr, authorityErr, tokenErr error
	questions.Go(func() { k.portName, findErr = c.portName(ctx) })
	if roots == nil {
		questions.Go(func() { roots, authorityErr = c.authority(ctx) })
	}
	if o.Token == nil {
		questions.Go(func() { _, tokenErr = k.Token(ctx, "") })
	}
	questions.Wait()
	for _, err := range []error{findErr, authorityErr, tokenErr} {
		if err != nil {
			k.cancel()
			return nil, err
		}
	}
	k.transport = &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return k.dial(ctx) },
		TLSClientConfig: &tls.Config{
			RootCAs: roots, ServerName: c.serverName(), MinVersion: tls.VersionTLS12,
		},
		TLSHandshakeTimeout:   handshakeTimeout,
		ExpectContinueTimeout: time.Second,
		IdleConnTimeout:       time.Minute,
		ForceAttemptHTTP2:     true,
		HTTP2:                 &http.HTTP2Config{SendPingTimeout: pingAfter, PingTimeout: pingTimeout},
	}
	if _, err := k.session(ctx, true); err != nil {
		_ = k.Close() // what was not opened ends at once
		return nil, err
	}
	return k, nil
}

func (c *Cluster) serverName() string { return Service + "." + c.system + ".svc" }

// URL is the base of the API's paths; only RoundTripper reaches it.
func (k *Connection) URL() string { return "https://" + k.cluster.serverName() }

// RoundTripper sends requests to the API. It adds no token.
func (k *Connection) RoundTripper() http.RoundTripper { return k.transport }

// String names what is spoken to, for people.
func (k *Connection) String() string {
	return fmt.Sprintf("the API %s of %s", k.cluster.serverName(), k.cluster)
}

// Token returns a token that is good for some time. rejected is one that the
// API did not accept, which is not returned again; "" for none.
func (k *Connection) Token(ctx context.Context, rejected string) (string, error) {
	if k.given != nil {
		return k.given(ctx, rejected)
	}
	select {
	case k.tokens <- struct{}{}:
		defer func() { <-k.tokens }()
	case <-ctx.Done():
		return "", ctx.Err()
	}
	now := time.Now()
	if k.held.good(now) && k.held.value != rejected {
		return k.held.value, nil
	}
	made, err := k.cluster.NewToken(ctx, TokenLifetime)
	if err != nil {
		return "", err
	}
	k.held = hold(made, now)
	return made.Value, nil
}

// Close ends every forwarded connection and waits for what it started.
func (k *Connection) Close() error {
	k.cancel()
	if k.transport != nil {
		k.transport.CloseIdleConnections()
	}
	k.mu.Lock()
	k.closed = true
	current := k.current
	k.current = nil
	k.mu.Unlock()
	ended := make(chan struct{})
	go func() { // ends when the sockets are closed, at the latest by TCP's own timeout
		defer close(ended)
		if current != nil {
			current.close()
		}
		k.wg.Wait()
	}()
	timer := time.NewTimer(closeGrace)
	defer timer.Stop()
	select {
	case <-ended:
		return nil
	case <-timer.C:
		return errors.New("the port-forward did not end in time")
	}
}

// dial opens one connection to a ready pod.
func (k *Connection) dial(ctx context.Context) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	defer context.AfterFunc(k.ctx, cancel)()
	var last error
	for range dialAttempts {
		s, err := k.session(ctx, false)
		if err != nil {
			return nil, err
		}
		conn, err := s.open(k)
		if err == nil {
			return conn, nil
		}
		s.failed.Store(true)
		last = err
	}
	return nil, &Error{Err: last, Message: fmt.Sprintf("the port-forward to the API in %s broke: %s", k.cluster, oneLine(last.Error()))}
}

// begin counts goroutines that are about to start, unless Close came first.
func (k *Connection) begin(goroutines int) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed {
		return false
	}
	k.wg.Add(goroutines)
	return true
}

// session is one upgraded connection to one pod, over which streams are opened.
type session struct {
	backend backend
	streams httpstream.Connection
	nextID  atomic.Int64
	// suspect is set when the pod ended a stream: it may be on its way out.
	// failed is set when a stream could not be forwarded: it is.
	suspect, failed atomic.Bool
	closing         sync.Once
}

func (s *session) ended() bool {
	select {
	case <-s.streams.CloseChan():
		return true
	default:
		return s.failed.Load()
	}
}

func (s *session) close() { s.closing.Do(func() { _ = s.streams.Close() }) }

// session returns the present one, or opens another. The first time it fails
// at once when nobody is ready; later it waits, because a pod that is replaced
// takes its time.
func (k *Connection) session(ctx context.Context, first bool) (*session, error) {
	select {
	case k.opening <- struct{}{}:
		defer func() { <-k.opening }()
	case <-ctx.Done():
		return nil, k.interrupted(ctx)
	}
	k.mu.Lock()
	present := k.current
	k.mu.Unlock()
	if present != nil && !present.ended() && !present.suspect.Load() {
		return present, nil
	}
	avoid := ""
	if present != nil {
		avoid = present.backend.uid
	}
	for {
		s, err := k.replace(ctx, present, avoid)
		var known *Error
		if err == nil || first || errors.As(err, &known) && (known.Denied || known.Usage) {
			return s, err
		}
		timer := time.NewTimer(findInterval)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil, err
		}
	}
}

// replace looks who is ready and opens a session, unless the present one turns
// out to be good.
func (k *Connection) replace(ctx context.Context, present *session, avoid string) (*session, error) {
	ready, err := k.cluster.backends(ctx, k.portName)
	if err != nil {
		return nil, err
	}
	if len(ready) == 0 {
		return nil, k.cluster.nobodyReady()
	}
	chosen := ready[0]
	for _, b := range ready {
		if present != nil && !present.ended() && b.uid == present.backend.uid {
			present.suspect.Store(false)
			return present, nil
		}
		if chosen.uid == avoid {
			chosen = b
		}
	}
	streams, err := k.upgrade(ctx, chosen)
	if err != nil {
		return nil, err
	}
	s := &session{backend: chosen, streams: streams}
	k.mu.Lock()
	closed := k.closed
	if !closed {
		k.current = s
	}
	k.mu.Unlock()
	if closed {
		s.close()
		return nil, k.interrupted(ctx)
	}
	if present != nil {
		present.close()
	}
	return s, nil
}

func (k *Connection) interrupted(ctx context.Context) error {
	if k.ctx.Err() != nil {
		return net.ErrClosed
	}
	return &Error{Err: ctx.Err(), Message: fmt.Sprintf("no port-forward to the API in %s could be opened in time", k.cluster)}
}

// upgrade opens the port-forward to one pod.
func (k *Connection) upgrade(ctx context.Context, b backend) (httpstream.Connection, error) {
	ctx, cancel := context.WithTimeout(ctx, upgradeTimeout)
	defer cancel()
	type result struct {
		streams httpstream.Connection
		err     error
	}
	results := make(chan result)
	if !k.begin(1) {
		return nil, net.ErrClosed
	}
	// The SPDY client reads its answer without a deadline.
	go func() {
		defer k.wg.Done()
		streams, err := k.cluster.forward(ctx, b)
		select {
		case results <- result{streams, err}:
		case <-ctx.Done():
			if streams != nil {
				_ = streams.Close()
			}
		}
	}()
	select {
	case r := <-results:
		return r.streams, r.err
	case <-ctx.Done():
		return nil, k.interrupted(ctx)
	}
}

// forward asks for a port-forward by WebSocket, which every proxy lets
// through, and by SPDY where the API server or a proxy knows no better.
func (c *Cluster) forward(ctx context.Context, b backend) (httpstream.Connection, error) {
	target := c.client.CoreV1().RESTClient().Post().Resource("pods").Namespace(c.system).Name(b.pod).SubResource("portforward").URL()
	streams, err := c.forwardWebSocket(ctx, target)
	if err == nil {
		return streams, nil
	}
	if httpstream.IsUpgradeFailure(err) || httpstream.IsHTTPSProxyError(err) {
		var spdyErr error
		if streams, spdyErr = c.forwardSPDY(ctx, target); spdyErr == nil {
			return streams, nil
		}
		err = upgradeCause(err, spdyErr)
	}
	explained := c.explain(err, "forward ports of pods", "the verbs get and create on pods/portforward", c.notInstalled())
	if apierrors.IsNotFound(err) {
		explained = &Error{Err: err, Message: fmt.Sprintf("the pod %s is gone", b.pod), Remedy: "another may be ready in a moment: try again"}
	}
	return nil, explained
}

// upgradeCause chooses what says more: the API server's own status, which the
// SPDY client has lost, or the SPDY client's error.
func upgradeCause(webSocket, spdyErr error) error {
	var upgrade *httpstream.UpgradeFailureError
	var status *apierrors.StatusError
	if errors.As(webSocket, &upgrade) && errors.As(upgrade.Cause, &status) {
		return status
	}
	return spdyErr
}

func (c *Cluster) forwardWebSocket(ctx context.Context, target *url.URL) (httpstream.Connection, error) {
	transport, holder, err := websocket.RoundTripperFor(c.config)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target.String(), nil)
	if err != nil {
		return nil, err
	}
	// "SPDY/3.1+" says what is tunnelled; see KEP-4006.
	conn, err := websocket.Negotiate(transport, holder, req, "SPDY/3.1+"+portforward.PortForwardProtocolV1Name)
	if err != nil {
		return nil, err
	}
	return streamspdy.NewClientConnectionWithPings(portforward.NewTunnelingConnectionWithLogger(klog.Background(), conn), portforward.PingPeriod)
}

func (c *Cluster) forwardSPDY(ctx context.Context, target *url.URL) (httpstream.Connection, error) {
	transport, upgrader, err := spdy.RoundTripperFor(c.config)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, target.String(), nil)
	if err != nil {
		return nil, err
	}
	streams, protocol, err := spdy.NegotiateStreaming(upgrader, &http.Client{Transport: transport}, req, portforward.PortForwardProtocolV1Name)
	if err != nil {
		return nil, err
	}
	if protocol != portforward.PortForwardProtocolV1Name {
		_ = streams.Close()
		return nil, fmt.Errorf("the API server speaks %q where %q was asked for", protocol, portforward.PortForwardProtocolV1Name)
	}
	return streams, nil
}

// open makes one connection to the pod's port: a stream for the data and one
// for the reason when it cannot be forwarded. No port of this machine is
// opened, so no other user of it can come along.
func (s *session) open(k *Connection) (net.Conn, error) {
	headers := http.Header{}
	headers.Set(corev1.PortHeader, strconv.Itoa(int(s.backend.port)))
	headers.Set(corev1.PortForwardRequestIDHeader, strconv.FormatInt(s.nextID.Add(1), 10))
	headers.Set(corev1.StreamType, corev1.StreamTypeError)
	reasons, err := s.streams.CreateStream(headers)
	if err != nil {
		return nil, err
	}
	_ = reasons.Close() // only read
	headers.Set(corev1.StreamType, corev1.StreamTypeData)
	data, err := s.streams.CreateStream(headers)
	if err != nil {
		_ = reasons.Reset()
		s.streams.RemoveStreams(reasons)
		return nil, err
	}
	if !k.begin(3) {
		return nil, net.ErrClosed // with the session its streams end
	}
	near, far := net.Pipe() // gives deadlines, which a stream has not
	conn := &forwarded{Conn: near}
	told := make(chan struct{})
	var ours atomic.Bool // this end was closed first
	go func() {
		defer k.wg.Done()
		defer close(told)
		text, _ := io.ReadAll(io.LimitReader(reasons, maxForwardError))
		if reason := oneLine(string(text)); reason != "" {
			conn.reason.Store(&reason)
			s.failed.Store(true)
			_ = far.Close()
		}
	}()
	go func() { // ends when the other end does, or the next one resets the stream
		defer k.wg.Done()
		_, err := io.Copy(far, data)
		if !ours.Load() && !errors.Is(err, io.ErrClosedPipe) {
			s.suspect.Store(true)
			timer := time.NewTimer(errorGrace)
			defer timer.Stop()
			select {
			case <-told:
			case <-timer.C:
			}
		}
		_ = far.Close()
	}()
	go func() { // ends when this end does
		defer k.wg.Done()
		if _, err := io.Copy(data, far); err == nil {
			ours.Store(true)
		}
		_ = far.Close()
		_ = data.Close()
		_ = data.Reset()
		_ = reasons.Reset()
		s.streams.RemoveStreams(data, reasons)
	}()
	return conn, nil
}

// forwarded is the near end of a connection to the pod.
type forwarded struct {
	net.Conn
	reason atomic.Pointer[string]
}

// Read tells why the connection could not be forwarded instead of that it ended.
func (f *forwarded) Read(p []byte) (int, error) {
	n, err := f.Conn.Read(p)
	return n, f.because(err)
}

// Write is as Read.
func (f *forwarded) Write(p []byte) (int, error) {
	n, err := f.Conn.Write(p)
	return n, f.because(err)
}

func (f *forwarded) because(err error) error {
	if reason := f.reason.Load(); err != nil && reason != nil {
		return errors.New("the pod's port was not reached: " + shortReason(*reason))
	}
	return err
}

// shortReason leaves out the container's and the sandbox's identifiers.
func shortReason(s string) string {
	if i := strings.LastIndex(s, "failed to "); i > 0 {
		return s[i:]
	}
	return s
}
