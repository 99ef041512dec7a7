package prefetch

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
	"os"
	"strings"
	"sync"
	"time"
)

const (
	// remoteDialLimit bounds connecting to the API, remoteHandshakeLimit the TLS
	// handshake that follows.
	remoteDialLimit      = 5 * time.Second
	remoteHandshakeLimit = 5 * time.Second
	// authorityPause is between two questions for the API's certificate
	// authority while it does not verify the API: each node of a fleet asks.
	authorityPause = 5 * time.Second
	// authorityLimit bounds one such question.
	authorityLimit = 10 * time.Second
	// maxTokenBytes and maxAuthorityBytes bound what is read.
	maxTokenBytes     = 64 << 10
	maxAuthorityBytes = 1 << 20
)

// remoteKeepAlive finds out within half a minute that the API's pod was lost
// with its node while a poll was held there.
var remoteKeepAlive = net.KeepAliveConfig{Enable: true, Idle: 10 * time.Second, Interval: 5 * time.Second, Count: 3}

// RemoteOptions say where the API of a cluster is and how both sides know each
// other. URL and TokenFile are required.
type RemoteOptions struct {
	// URL is https://host:port.
	URL string
	// TokenFile holds the bearer token. It is read again when it changes.
	TokenFile string
	// Authority gives the certificates (PEM) that sign the API's. It is asked
	// before the first connection and when one cannot be verified. Nil: the
	// machine's own authorities.
	Authority func(ctx context.Context) ([]byte, error)
	// Address is where to connect in place of URL's host, host:port, as it was
	// found together with Authority; nil or empty: URL's host. It is for agents in
	// the host's network: the cluster's names may not resolve there, or not yet.
	Address func() string
	// ServerName is what the API's certificate is for; URL's host when empty.
	ServerName string
	// UserAgent names the program to the API.
	UserAgent string
}

// NewRemoteAPIClient makes a client of a cluster's API. Nothing is opened or
// read until the first call.
func NewRemoteAPIClient(o RemoteOptions) (*APIClient, error) {
	u, err := url.Parse(o.URL)
	switch {
	case err != nil:
		return nil, fmt.Errorf("the API's URL cannot be used: %w", err)
	case u.Scheme != "https" || u.Hostname() == "" || u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.User != nil:
		// A token goes nowhere without TLS.
		return nil, fmt.Errorf("the API's URL %q is not https://host:port", o.URL)
	case o.TokenFile == "":
		return nil, errors.New("the file of the token for the API is required")
	}
	if o.ServerName == "" {
		o.ServerName = u.Hostname()
	}
	d := &verifyingDialer{
		dialer: net.Dialer{Timeout: remoteDialLimit, KeepAliveConfig: remoteKeepAlive},
		name:   o.ServerName, authority: o.Authority, address: o.Address, pause: authorityPause,
	}
	return &APIClient{
		base: "https://" + u.Host, where: o.URL, agent: o.UserAgent,
		token: &tokenFile{path: o.TokenFile},
		http: &http.Client{
			// No proxy: the API is in the same cluster, and sees a token.
			Transport: &http.Transport{
				DialTLSContext:         d.dial,
				MaxIdleConnsPerHost:    2,
				IdleConnTimeout:        time.Minute,
				MaxResponseHeaderBytes: 64 << 10,
			},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}, nil
}

// tokenFile is a token that somebody else renews, as the kubelet does for a
// projected volume.
type tokenFile struct {
	path string

	mu    sync.Mutex
	token string
	as    os.FileInfo // the file that token was read from
}

// read gives the token, from memory while the file is the same.
func (t *tokenFile) read() (string, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	info, err := os.Stat(t.path)
	if err != nil {
		return "", fmt.Errorf("read the token for the API: %w; the agent's pod needs a projected ServiceAccount token there", err)
	}
	if t.token != "" && os.SameFile(info, t.as) && info.ModTime().Equal(t.as.ModTime()) && info.Size() == t.as.Size() {
		return t.token, nil
	}
	f, err := os.Open(t.path)
	if err != nil {
		return "", fmt.Errorf("read the token for the API: %w", err)
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxTokenBytes))
	if err != nil {
		return "", fmt.Errorf("read the token for the API: %w", err)
	}
	token := strings.TrimSpace(string(raw))
	if token == "" || strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "", fmt.Errorf("the file %s holds no token", t.path)
	}
	t.token, t.as = token, info
	return token, nil
}

// forget has the file read again although it seems unchanged.
func (t *tokenFile) forget() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.token = ""
}

// verifyingDialer connects to a server whose authority may be replaced.
type verifyingDialer struct {
	dialer    net.Dialer
	name      string
	authority func(context.Context) ([]byte, error)
	address   func() string
	pause     time.Duration

	// mu is held over a question for the authority: others wait for its answer.
	mu    sync.Mutex
	pool  *x509.CertPool // nil before the first answer
	asked time.Time
}

func (d *verifyingDialer) dial(ctx context.Context, network, address string) (net.Conn, error) {
	pool, err := d.trusted(ctx, nil)
	if err != nil {
		return nil, err
	}
	conn, err := d.connect(ctx, network, address, pool)
	if wrong := (*tls.CertificateVerificationError)(nil); d.authority == nil || !errors.As(err, &wrong) {
		return conn, err
	}
	renewed, askErr := d.trusted(ctx, pool)
	if askErr != nil {
		return nil, errors.Join(err, askErr)
	}
	if renewed.Equal(pool) {
		return nil, fmt.Errorf("the API's certificate for %s is not to be trusted: %w", d.name, err)
	}
	return d.connect(ctx, network, address, renewed)
}

func (d *verifyingDialer) connect(ctx context.Context, network, address string, pool *x509.CertPool) (net.Conn, error) {
	if d.address != nil {
		if found := d.address(); found != "" {
			address = found
		}
	}
	conn, err := d.dialer.DialContext(ctx, network, address)
	if err != nil {
		d.doubt()
		return nil, err
	}
	secure := tls.Client(conn, &tls.Config{MinVersion: tls.VersionTLS12, ServerName: d.name, RootCAs: pool})
	ctx, cancel := context.WithTimeout(ctx, remoteHandshakeLimit)
	defer cancel()
	if err := secure.HandshakeContext(ctx); err != nil {
		_ = conn.Close() // the handshake's error says more
		return nil, err
	}
	return secure, nil
}

// doubt has the authority, and the address with it, asked for again: what does
// not answer may have moved.
func (d *verifyingDialer) doubt() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if time.Since(d.asked) >= d.pause {
		d.pool = nil
	}
}

// trusted gives the authorities: others than wrong where there are such. Nil
// stands for the machine's own.
func (d *verifyingDialer) trusted(ctx context.Context, wrong *x509.CertPool) (*x509.CertPool, error) {
	if d.authority == nil {
		return nil, nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.pool != nil && (wrong == nil || !d.pool.Equal(wrong) || time.Since(d.asked) < d.pause) {
		return d.pool, nil
	}
	d.asked = time.Now()
	ctx, cancel := context.WithTimeout(ctx, authorityLimit)
	defer cancel()
	pem, err := d.authority(ctx)
	if err != nil {
		return nil, fmt.Errorf("ask for the authority of the API's certificate: %w", err)
	}
	pool := x509.NewCertPool()
	if len(pem) > maxAuthorityBytes || !pool.AppendCertsFromPEM(pem) {
		return nil, errors.New("the authority of the API's certificate is no certificate in PEM")
	}
	d.pool = pool
	return pool, nil
}
