package join

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
	"github.com/hearth-sh/hearth/internal/k3s/pki"
)

// stage is how far asking a server got, from nearest to farthest.
type stage int

const (
	stageConnect stage = iota
	stageVerify        // TLS and the CA
	stageToken         // from here on, it is a server of our cluster that speaks
	stageReady
	stageEtcd
	stageName
	stageVersion
)

const (
	connectTimeout = 3 * time.Second
	// requestTimeout bounds one request, of which asking takes six.
	requestTimeout = 5 * time.Second
	// maxBodyBytes bounds every answer that is read.
	maxBodyBytes = 256 << 10
	// maxMembers bounds the etcd members that are looked at.
	maxMembers = 100
)

// candidate is one server that might be joined.
type candidate struct {
	host    string
	base    string
	options Options
	roots   *x509.CertPool
	client  *http.Client
	// denied is since when the server answers 401 to a user, without a pause.
	denied map[pki.User]time.Time
}

func newCandidate(host string, roots *x509.CertPool, o Options) *candidate {
	c := &candidate{host: host, base: "https://" + host, options: o, roots: roots, denied: make(map[pki.User]time.Time)}
	c.client = c.newClient(nil)
	return c
}

// newClient trusts the roots and nothing else, follows nobody elsewhere, and
// uses no proxy, as k3s does not either.
func (c *candidate) newClient(certificates []tls.Certificate) *http.Client {
	dialer := &net.Dialer{Timeout: connectTimeout}
	return &http.Client{
		Timeout:       requestTimeout,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{
			DialContext:            dialer.DialContext,
			TLSClientConfig:        &tls.Config{RootCAs: c.roots, MinVersion: tls.VersionTLS12, Certificates: certificates},
			TLSHandshakeTimeout:    connectTimeout,
			MaxResponseHeaderBytes: 64 << 10,
		},
	}
}

func (c *candidate) close() { c.client.CloseIdleConnections() }

// ask goes through everything that k3s will need of the server, in its order.
func (c *candidate) ask(ctx context.Context) answer {
	result := &Result{Server: c.base}
	for _, step := range []struct {
		stage stage
		do    func(context.Context, *Result) *fault.Error
	}{
		{stageVerify, c.verify},
		{stageToken, c.ready},
		{stageEtcd, c.etcd},
		{stageName, c.name},
	} {
		if failure := step.do(ctx, result); failure != nil {
			at := step.stage
			switch failure.Code {
			case CodeDNS, CodeRefused, CodeConnectTimeout, CodeNoRoute, CodeUnreachable:
				at = stageConnect
			case CodeCAMismatch, CodeServerName, CodeClock, CodeNotK3s:
				at = stageVerify
			case CodeNotReady:
				at = max(at, stageReady)
			case CodeVersionSkew:
				at = stageVersion
			}
			return answer{failure: failure, stage: at}
		}
	}
	return answer{result: result, stage: stageVersion}
}

// verify makes sure that the server is k3s and of our cluster. The comparison
// of /cacerts is the one k3s makes; TLS has verified the server before.
func (c *candidate) verify(ctx context.Context, _ *Result) *fault.Error {
	status, body, failure := c.get(ctx, "/ping", pki.Token{})
	if failure != nil {
		return failure
	}
	if status != http.StatusOK || strings.TrimSpace(string(body)) != "pong" {
		return c.notK3s(fmt.Errorf("GET /ping: status %d, %.60q", status, body))
	}
	status, body, failure = c.get(ctx, "/cacerts", pki.Token{})
	if failure != nil {
		return failure
	}
	if status >= 500 {
		return c.notReady(fmt.Errorf("GET /cacerts: status %d", status))
	}
	if status != http.StatusOK {
		return c.notK3s(fmt.Errorf("GET /cacerts: status %d", status))
	}
	if err := c.options.AgentToken.VerifyCA(body); err != nil {
		return c.mismatch(err)
	}
	return nil
}

// ready makes sure that the server takes our token and that its API server is
// up, without which no agent gets its certificates.
func (c *candidate) ready(ctx context.Context, _ *Result) *fault.Error {
	const path = "/v1-k3s/readyz"
	status, body, failure := c.get(ctx, path, c.options.AgentToken)
	if failure != nil {
		return failure
	}
	return c.judge("GET "+path, status, body, c.options.AgentToken)
}

// judge classifies the answer to a request that needed a token.
func (c *candidate) judge(request string, status int, body []byte, token pki.Token) *fault.Error {
	cause := fmt.Errorf("%s: status %d, %.200q", request, status, message(body))
	if status != http.StatusUnauthorized {
		delete(c.denied, token.User())
	}
	switch {
	case status == http.StatusOK:
		return nil
	case status == http.StatusUnauthorized:
		if c.denied[token.User()].IsZero() {
			c.denied[token.User()] = time.Now()
		}
		f := fault.New(CodeBadToken, cause, "find out who changed the tokens: those of the cluster's store belong to the cluster it founded (k3s token rotate changes them)",
			"server %s does not know this cluster's %s token", c.host, token.User())
		f.Transient = time.Since(c.denied[token.User()]) < c.options.Grace
		return f
	case status == http.StatusForbidden:
		return fault.New(CodeTokenRole, cause, "start servers with both token and agent-token of the cluster's store", "server %s does not let the %s token do this", c.host, token.User())
	case status == http.StatusTooManyRequests || status >= 500:
		return c.notReady(cause)
	}
	return fault.New(CodeRejected, cause, "compare the k3s versions of server and node", "server %s rejects this node", c.host)
}

// member is part of an etcd member, as /db/info has it.
type member struct {
	ID       uint64   `json:"ID"`
	Name     string   `json:"name"`
	PeerURLs []string `json:"peerURLs"`
	Learner  bool     `json:"isLearner"`
}

// parseMembers reads the answer of /db/info.
func parseMembers(b []byte) ([]member, error) {
	var info struct {
		Members []member `json:"members"`
	}
	if err := json.Unmarshal(b, &info); err != nil {
		return nil, fmt.Errorf("not a list of etcd members: %w", err)
	}
	if len(info.Members) == 0 || len(info.Members) > maxMembers {
		return nil, fmt.Errorf("%d etcd members", len(info.Members))
	}
	return info.Members, nil
}

// nodeOf returns the node of a member: k3s names members <node>-<8 hex digits>.
func (m member) nodeOf() string {
	if i := strings.LastIndexByte(m.Name, '-'); i > 1 {
		return m.Name[:i]
	}
	return m.Name
}

// etcd makes sure that a server can become a member.
func (c *candidate) etcd(ctx context.Context, result *Result) *fault.Error {
	if c.options.ServerToken.IsZero() {
		return nil
	}
	const path = "/db/info"
	status, body, failure := c.get(ctx, path, c.options.ServerToken)
	if failure != nil {
		return failure
	}
	if status == http.StatusNotFound {
		return fault.New(CodeRejected, fmt.Errorf("GET %s: status 404", path), "found the cluster with embedded etcd (cluster-init)", "server %s has no embedded etcd to join", c.host)
	}
	if failure := c.judge("GET "+path, status, body, c.options.ServerToken); failure != nil {
		return failure
	}
	members, err := parseMembers(body)
	if err != nil {
		return c.notK3s(fmt.Errorf("GET %s: %w", path, err))
	}
	// Where etcd does not answer, k3s makes up a list of itself without an id.
	if len(members) == 1 && members[0].ID == 0 {
		return c.notReady(errors.New("its etcd does not answer"))
	}
	result.Members = len(members)
	for _, m := range members {
		if m.nodeOf() == c.options.NodeName {
			return fault.New(CodeNodeClash, fmt.Errorf("etcd member %.100q at %.200q", m.Name, m.PeerURLs),
				fmt.Sprintf("if that server is gone for good: kubectl delete node %s, which removes its etcd member; else give this one another name", c.options.NodeName),
				"another server is a member of etcd under the name %s", c.options.NodeName)
		}
	}
	for _, m := range members {
		if m.Learner {
			return fault.Passing(CodeLearner, fmt.Errorf("etcd member %.100q is a learner", m.Name), "wait for the other server to be taken in; if it is gone, kubectl delete node of it",
				"etcd is taking in another server")
		}
	}
	return nil
}

// name makes sure that the node's name is free or ours, the way k3s does, by
// asking for a kubelet certificate; and with that certificate, which is thrown
// away, learns the server's version.
func (c *candidate) name(ctx context.Context, result *Result) *fault.Error {
	const path = "/v1-k3s/client-kubelet.crt"
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fault.New(CodeRejected, err, "try again", "cannot make a key")
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "system:node:" + c.options.NodeName}}, key)
	if err != nil {
		return fault.New(CodeRejected, err, "try again", "cannot make a certificate request")
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.base+path, bytes.NewReader(csr))
	if err != nil {
		return fault.New(CodeRejected, err, "check the server's address", "cannot ask server %s", c.host)
	}
	req.SetBasicAuth(string(c.options.AgentToken.User()), c.options.AgentToken.Secret())
	req.Header.Set("k3s-Node-Name", c.options.NodeName)
	req.Header.Set("k3s-Node-Password", c.options.NodePassword.Reveal())
	status, body, failure := c.do(c.client, req)
	if failure != nil {
		return failure
	}
	if status == http.StatusForbidden {
		return fault.New(CodeNodeClash, fmt.Errorf("POST %s: status 403, %.200q", path, message(body)),
			fmt.Sprintf("give this machine another name; or, if the other is gone for good, kubectl delete node %[1]s and kubectl -n kube-system delete secret %[1]s.node-password.k3s", c.options.NodeName),
			"another machine joined under the name %s before, with another node password", c.options.NodeName)
	}
	if failure := c.judge("POST "+path, status, body, c.options.AgentToken); failure != nil {
		return failure
	}
	certificate, err := leaf(body)
	if err != nil {
		return c.notK3s(fmt.Errorf("POST %s: %w", path, err))
	}
	if !key.PublicKey.Equal(certificate.PublicKey) {
		return c.notK3s(fmt.Errorf("POST %s: the certificate is for another key", path))
	}
	version, failure := c.version(ctx, tls.Certificate{Certificate: [][]byte{certificate.Raw}, PrivateKey: key})
	if failure != nil {
		return failure
	}
	result.Version = version
	if why := skew(c.options.Version, version, !c.options.ServerToken.IsZero()); why != "" {
		return fault.New(CodeVersionSkew, errors.New(why), "install the server's version, or upgrade the servers first", "server %s runs k3s %s, this machine is to run %s", c.host, version, c.options.Version)
	}
	return nil
}

// leaf returns the first certificate of an answer.
func leaf(b []byte) (*x509.Certificate, error) {
	block, _ := pem.Decode(b)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, errors.New("no certificate in the answer")
	}
	return x509.ParseCertificate(block.Bytes)
}

// version asks the API server, which shares the port. It may not tell, which is
// no reason not to join.
func (c *candidate) version(ctx context.Context, certificate tls.Certificate) (string, *fault.Error) {
	client := c.newClient([]tls.Certificate{certificate})
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.base+"/version", nil)
	if err != nil {
		return "", fault.New(CodeRejected, err, "check the server's address", "cannot ask server %s", c.host)
	}
	status, body, failure := c.do(client, req)
	switch {
	case failure != nil:
		return "", failure
	case status == http.StatusTooManyRequests || status >= 500:
		return "", c.notReady(fmt.Errorf("GET /version: status %d, %.200q", status, message(body)))
	case status != http.StatusOK:
		return "", nil
	}
	return parseVersion(body), nil
}

// parseVersion reads the answer of /version; "" if it has no version.
func parseVersion(b []byte) string {
	var info struct {
		GitVersion string `json:"gitVersion"`
	}
	if json.Unmarshal(b, &info) != nil {
		return ""
	}
	if _, _, err := minorVersion(info.GitVersion); err != nil {
		return ""
	}
	return info.GitVersion
}

// message returns what a Kubernetes Status says, or the body's start.
func message(b []byte) string {
	var status struct {
		Message string `json:"message"`
	}
	if json.Unmarshal(b, &status) == nil && status.Message != "" {
		return status.Message
	}
	return string(b[:min(len(b), 200)])
}

// get makes a request, with a token if it is one.
func (c *candidate) get(ctx context.Context, path string, token pki.Token) (int, []byte, *fault.Error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.base+path, nil)
	if err != nil {
		return 0, nil, fault.New(CodeRejected, err, "check the server's address", "cannot ask server %s", c.host)
	}
	if !token.IsZero() {
		req.SetBasicAuth(string(token.User()), token.Secret())
	}
	return c.do(c.client, req)
}

func (c *candidate) do(client *http.Client, req *http.Request) (int, []byte, *fault.Error) {
	resp, err := client.Do(req)
	if err != nil {
		return 0, nil, c.classify(err)
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxBodyBytes+1))
	if err != nil {
		return 0, nil, c.classify(err)
	}
	if len(b) > maxBodyBytes {
		return 0, nil, c.notK3s(fmt.Errorf("%s %s: more than %d bytes", req.Method, req.URL.Path, maxBodyBytes))
	}
	return resp.StatusCode, b, nil
}

// classify tells apart why a request got no answer.
func (c *candidate) classify(err error) *fault.Error {
	var (
		dns       *net.DNSError
		unknown   x509.UnknownAuthorityError
		invalid   x509.CertificateInvalidError
		host      x509.HostnameError
		record    tls.RecordHeaderError
		wrapped   *url.Error
		networkly net.Error
	)
	if errors.As(err, &wrapped) {
		err = wrapped.Err // the URL is in the message already
	}
	switch {
	case errors.As(err, &dns):
		return fault.Passing(CodeDNS, err, "correct the server's name, or the resolver (/etc/resolv.conf, the VPC's DNS settings)", "the name of server %s does not resolve", c.host)
	case errors.As(err, &unknown):
		return c.mismatch(err)
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return fault.New(CodeClock, err, "set this machine's clock (chronyd uses 169.254.169.123 on EC2); if it is right, the server's is wrong, or its certificates expired: restart its k3s", "the certificate of server %s is not valid at this machine's time, %s", c.host, time.Now().UTC().Format(time.RFC3339))
	case errors.As(err, &invalid):
		return c.mismatch(err)
	case errors.As(err, &host):
		return fault.New(CodeServerName, err, "add the name to the servers' tls-san, or join by an address the certificate has", "the certificate of server %s is not for that name", c.host)
	case errors.As(err, &record), strings.Contains(err.Error(), "server gave HTTP response to HTTPS client"):
		return c.notK3s(err)
	case errors.Is(err, syscall.ECONNREFUSED):
		return fault.Passing(CodeRefused, err, "see on the server whether k3s runs: systemctl status k3s", "nothing listens on server %s", c.host)
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		return fault.Passing(CodeNoRoute, err, "check subnets and route tables, and whether the server still exists", "there is no route to server %s", c.host)
	case errors.As(err, &networkly) && networkly.Timeout(), errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded), errors.Is(err, errTimeUp):
		return fault.Passing(CodeConnectTimeout, err, "let this machine reach the servers' port "+DefaultPort+" in security groups and network ACLs", "server %s does not answer", c.host)
	}
	return fault.Passing(CodeUnreachable, err, "see on the server whether k3s runs: systemctl status k3s", "the connection to server %s failed", c.host)
}

func (c *candidate) mismatch(cause error) *fault.Error {
	return fault.New(CodeCAMismatch, cause, "find out what has this address now: a server of another cluster, one founded before this store was used, or an impostor; no token was sent to it",
		"server %s is not of this cluster", c.host)
}

func (c *candidate) notK3s(cause error) *fault.Error {
	return fault.New(CodeNotK3s, cause, "check address and port of the server, and what is in between", "what answers at %s is not a k3s server", c.host)
}

func (c *candidate) notReady(cause error) *fault.Error {
	return fault.Passing(CodeNotReady, cause, "see on the server why etcd or the API server does not become ready: journalctl -u k3s", "server %s is not ready", c.host)
}
