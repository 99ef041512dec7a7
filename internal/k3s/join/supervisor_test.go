package join

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/internal/k3s/pki"
)

// cluster has the credentials of one generation.
type cluster struct {
	authorities *pki.Authorities
	server      pki.Token
	agent       pki.Token
}

func newCluster(t testing.TB) *cluster {
	t.Helper()
	a, err := pki.Generate(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	c := &cluster{authorities: a}
	if c.server, err = pki.NewToken(pki.UserServer, a.ServerCA()); err != nil {
		t.Fatal(err)
	}
	if c.agent, err = pki.NewToken(pki.UserNode, a.ServerCA()); err != nil {
		t.Fatal(err)
	}
	return c
}

// client returns the authority of clients.
func (c *cluster) client() (*x509.Certificate, any) { return c.pair("client-ca") }

func (c *cluster) pair(name string) (*x509.Certificate, any) {
	files, err := c.authorities.Files()
	if err != nil {
		panic(err)
	}
	found := map[string][]byte{}
	for _, f := range files {
		found[f.Path] = f.Data
	}
	p, err := tls.X509KeyPair(found[name+".crt"], found[name+".key"])
	if err != nil {
		panic(err)
	}
	return p.Leaf, p.PrivateKey
}

// supervisor answers as k3s's supervisor does: who may ask what, and with which
// status, is from pkg/server/handlers/router.go, pkg/server/auth,
// pkg/nodepassword and pkg/etcd of k3s.
type supervisor struct {
	*cluster
	url  string
	host string

	mu        sync.Mutex
	starting  bool // no authenticator yet: 401 for everything
	notReady  bool // runtime core not ready
	members   any  // of /db/info
	noEtcd    bool // /db/info is not routed
	passwords map[string]string
	version   string
	override  map[string]http.HandlerFunc // by path, in place of k3s's
	requests  []string
	tokens    int // requests that carried credentials
}

type leafOptions struct {
	name          string // IP address or DNS name
	begin, expire time.Duration
	by            *cluster
}

// start runs the supervisor on a loopback port.
func start(t *testing.T, c *cluster, o leafOptions) *supervisor {
	t.Helper()
	s := &supervisor{
		cluster: c, passwords: map[string]string{}, version: "v1.36.2+k3s1", override: map[string]http.HandlerFunc{},
		members: []map[string]any{{"ID": uint64(14841639068965178418), "name": "i-1-0a1b2c3d", "peerURLs": []string{"https://10.0.0.1:2380"}, "clientURLs": []string{"https://10.0.0.1:2379"}}},
	}
	if o.name == "" {
		o.name = "127.0.0.1"
	}
	if o.expire == 0 {
		o.begin, o.expire = -time.Hour, time.Hour
	}
	if o.by == nil {
		o.by = c
	}
	ca, caKey := o.by.pair("server-ca")
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "k3s"}, NotBefore: time.Now().Add(o.begin), NotAfter: time.Now().Add(o.expire), ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	if ip := net.ParseIP(o.name); ip != nil {
		template.IPAddresses = []net.IP{ip}
	} else {
		template.DNSNames = []string{o.name}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca, key.Public(), caKey)
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewUnstartedServer(http.HandlerFunc(s.serve))
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.TLS = &tls.Config{ClientAuth: tls.RequestClientCert, Certificates: []tls.Certificate{{Certificate: [][]byte{der, ca.Raw}, PrivateKey: key}}}
	server.StartTLS()
	t.Cleanup(server.Close)
	s.url, s.host = server.URL, server.Listener.Addr().String()
	return s
}

func status(w http.ResponseWriter, code int, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(map[string]any{"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": code})
}

func (s *supervisor) serve(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.requests = append(s.requests, r.Method+" "+r.URL.Path)
	if r.Header.Get("Authorization") != "" {
		s.tokens++
	}
	if h := s.override[r.URL.Path]; h != nil {
		h(w, r)
		return
	}
	switch r.URL.Path {
	case "/ping":
		_, _ = io.WriteString(w, "pong")
	case "/cacerts":
		_, _ = w.Write(s.authorities.ServerCA())
	case "/db/info":
		if s.noEtcd {
			http.NotFound(w, r)
		} else if s.allowed(w, r, "server") {
			_ = json.NewEncoder(w).Encode(map[string]any{"members": s.members})
		}
	case "/v1-k3s/readyz":
		if s.allowed(w, r, "node") && s.coreReady(w) {
			_, _ = io.WriteString(w, "ok")
		}
	case "/v1-k3s/client-kubelet.crt":
		if s.allowed(w, r, "node") {
			s.kubeletCertificate(w, r)
		}
	case "/version":
		s.apiVersion(w, r)
	default:
		http.NotFound(w, r)
	}
}

func (s *supervisor) allowed(w http.ResponseWriter, r *http.Request, role string) bool {
	user, password, ok := r.BasicAuth()
	known := map[string]string{"server": s.server.Secret(), "node": s.agent.Secret()}
	switch {
	case s.starting || ok && (known[user] == "" || known[user] != password):
		status(w, http.StatusUnauthorized, "not authorized")
	case !ok || user != role:
		status(w, http.StatusForbidden, "forbidden")
	default:
		return true
	}
	return false
}

func (s *supervisor) coreReady(w http.ResponseWriter) bool {
	if s.notReady {
		status(w, http.StatusServiceUnavailable, "runtime core not ready")
	}
	return !s.notReady
}

func (s *supervisor) kubeletCertificate(w http.ResponseWriter, r *http.Request) {
	name, password := strings.ToLower(r.Header.Get("k3s-Node-Name")), r.Header.Get("k3s-Node-Password")
	if name == "" || password == "" {
		status(w, http.StatusBadRequest, "node name or password not set")
		return
	}
	if !s.coreReady(w) {
		return
	}
	if known, ok := s.passwords[name]; ok && known != password {
		status(w, http.StatusForbidden, "hash does not match")
		return
	}
	s.passwords[name] = password
	body, err := io.ReadAll(r.Body)
	if err != nil || r.Method != http.MethodPost {
		status(w, http.StatusBadRequest, "no request")
		return
	}
	csr, err := x509.ParseCertificateRequest(body)
	if err != nil {
		status(w, http.StatusBadRequest, err.Error())
		return
	}
	ca, caKey := s.client()
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "system:node:" + name, Organization: []string{"system:nodes"}},
		NotBefore: ca.NotBefore, NotAfter: time.Now().Add(time.Hour), ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, ca, csr.PublicKey, caKey)
	if err != nil {
		status(w, http.StatusInternalServerError, err.Error())
		return
	}
	for _, b := range [][]byte{der, ca.Raw} {
		_ = pem.Encode(w, &pem.Block{Type: "CERTIFICATE", Bytes: b})
	}
}

func (s *supervisor) apiVersion(w http.ResponseWriter, r *http.Request) {
	ca, _ := s.client()
	roots := x509.NewCertPool()
	roots.AddCert(ca)
	if len(r.TLS.PeerCertificates) == 0 {
		status(w, http.StatusUnauthorized, "Unauthorized") // anonymous-auth is off in k3s
		return
	}
	if _, err := r.TLS.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		status(w, http.StatusUnauthorized, "Unauthorized")
		return
	}
	_, _ = fmt.Fprintf(w, `{"major":"1","minor":"36","gitVersion":%q}`, s.version)
}
