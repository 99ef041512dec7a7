package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"
)

const (
	// clientTimeout is k3s's for one request to a server.
	clientTimeout = 10 * time.Second
	// maxAnswer bounds what is read of an answer.
	maxAnswer = 4 << 20
)

// access is how to talk to a server: pkg/clientaccess of k3s.
type access struct {
	base                string
	hash                string // of the server's CA, or empty
	user, password      string
	ca                  []byte
	certFile, certKey   string
	nodeName, password2 string
	nodeIP              string
}

// parseToken reads "secret", "user:secret" behind "K10<hash>::", as k3s does.
func parseToken(token string) (*access, error) {
	if token == "" {
		return nil, errors.New("token must not be empty")
	}
	a := &access{}
	rest, full := strings.CutPrefix(token, "K10")
	if !full {
		a.password = token
		return a, nil
	}
	hash, creds, ok := strings.Cut(rest, "::")
	if !ok {
		hash, creds = "", rest
	}
	if len(hash) != 0 && len(hash) != 2*sha256.Size {
		return nil, errors.New("invalid token CA hash length")
	}
	a.hash = hash
	if a.user, a.password, ok = strings.Cut(creds, ":"); !ok || a.password == "" {
		return nil, errors.New("invalid token format")
	}
	return a, nil
}

// connect reads the server's CA and holds it against the token's hash.
func connect(ctx context.Context, server, token, user string) (*access, error) {
	a, err := parseToken(token)
	if err != nil {
		return nil, err
	}
	if user != "" {
		a.user = user
	}
	u, err := url.Parse(server)
	if err != nil {
		return nil, fmt.Errorf("invalid server url: %w", err)
	}
	if u.Scheme != "https" {
		return nil, fmt.Errorf("only https:// URLs are supported, invalid scheme: %s", server)
	}
	a.base = strings.TrimRight(u.String(), "/")
	blind := &http.Client{Timeout: clientTimeout, Transport: &http.Transport{
		DisableKeepAlives: true,
		TLSClientConfig:   &tls.Config{InsecureSkipVerify: true}, // the answer is verified below
	}}
	if a.ca, err = a.do(ctx, blind, http.MethodGet, "/cacerts", nil, false); err != nil {
		return nil, fmt.Errorf("failed to get CA certs: %w", err)
	}
	if _, err := a.do(ctx, a.client(), http.MethodGet, "/cacerts", nil, false); err != nil {
		return nil, fmt.Errorf("CA cert validation failed: %w", err)
	}
	have, err := hashCA(a.ca)
	if err != nil {
		return nil, err
	}
	if a.hash != "" && a.hash != have {
		return nil, fmt.Errorf("token CA hash does not match the Cluster CA certificate hash: %s != %s", a.hash, have)
	}
	if a.hash == "" {
		slog.Warn("Cluster CA certificate is not trusted by the host CA bundle, but the token does not include a CA hash. Use the full token from the server's node-token file to enable Cluster CA validation.")
	}
	return a, nil
}

func (a *access) client() *http.Client {
	config := &tls.Config{RootCAs: x509.NewCertPool()}
	config.RootCAs.AppendCertsFromPEM(a.ca)
	if a.certFile != "" {
		if cert, err := tls.LoadX509KeyPair(a.certFile, a.certKey); err == nil {
			config.Certificates = []tls.Certificate{cert}
		}
	}
	return &http.Client{Timeout: clientTimeout, Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: config}}
}

// statusError is an answer that is none of the 200s.
type statusError struct {
	url    string
	status int
	body   string
}

func (e *statusError) Error() string {
	return fmt.Sprintf("%s: %d %s: %s", e.url, e.status, http.StatusText(e.status), e.body)
}

func (a *access) do(ctx context.Context, client *http.Client, method, path string, body []byte, authenticated bool) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, a.base+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	if authenticated {
		req.SetBasicAuth(a.user, a.password)
	}
	if a.nodeName != "" {
		req.Header.Set("k3s-Node-Name", a.nodeName)
		req.Header.Set("k3s-Node-Password", a.password2)
		req.Header.Set("k3s-Node-IP", a.nodeIP)
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	content, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return nil, err
	}
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		return nil, &statusError{url: a.base + path, status: resp.StatusCode, body: strings.TrimSpace(string(content))}
	}
	return content, nil
}

func (a *access) get(ctx context.Context, path string) ([]byte, error) {
	return a.do(ctx, a.client(), http.MethodGet, path, nil, true)
}

func (a *access) post(ctx context.Context, path string, body []byte) ([]byte, error) {
	return a.do(ctx, a.client(), http.MethodPost, path, body, true)
}

// hashCA is the hash of a K10 token: of a single certificate's file, of the DER
// of the root of a chain.
func hashCA(bundle []byte) (string, error) {
	certs, err := parseCerts(bundle)
	if err != nil {
		return "", err
	}
	hashed := bundle
	if len(certs) > 1 {
		roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
		for _, cert := range certs[1:] {
			if len(cert.AuthorityKeyId) == 0 || bytes.Equal(cert.AuthorityKeyId, cert.SubjectKeyId) {
				roots.AddCert(cert)
			} else {
				intermediates.AddCert(cert)
			}
		}
		if chains, err := certs[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: intermediates}); err == nil {
			hashed = chains[0][len(chains[0])-1].Raw
		}
	}
	sum := sha256.Sum256(hashed)
	return hex.EncodeToString(sum[:]), nil
}

func parseCerts(bundle []byte) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for block, rest := pem.Decode(bundle); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		out = append(out, cert)
	}
	if len(out) == 0 {
		return nil, errors.New("data does not contain any valid RSA or ECDSA certificates")
	}
	return out, nil
}

func randomHex(n int) string {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

// ensureSecretFile reads a file, or makes it with n random bytes.
func ensureSecretFile(path string, n int, mode os.FileMode) (string, error) {
	content, err := os.ReadFile(path)
	if err == nil && strings.TrimSpace(string(content)) == "" {
		err = fmt.Errorf("%s is empty", path)
	}
	if err == nil {
		return strings.TrimSpace(string(content)), nil
	}
	if !errors.Is(err, os.ErrNotExist) {
		return "", err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return "", err
	}
	secret := randomHex(n)
	return secret, writeFile(path, []byte(secret+"\n"), mode)
}

// writeFile writes a file as k3s does, which syncs nothing: a loss of power in
// the next half minute leaves it empty.
func writeFile(path string, content []byte, mode os.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(path, content, mode); err != nil {
		return err
	}
	return os.Chmod(path, mode)
}
