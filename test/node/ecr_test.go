package node_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"hash/fnv"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/ecr/mototest"
	"github.com/hearth-sh/hearth/test/cluster"
)

const (
	ecrAccount = "123456789012" // moto's
	ecrRegion  = "eu-west-1"
	ecrHost    = ecrAccount + ".dkr.ecr." + ecrRegion + ".amazonaws.com"
	// ecrUser and ecrPassword are what moto's GetAuthorizationToken gives.
	ecrUser     = "AWS"
	ecrPassword = ecrAccount + "-auth-token"
)

// serve runs an HTTP server until the test ends.
func serve(t *testing.T, listener net.Listener, handler http.Handler) {
	t.Helper()
	server := &http.Server{Handler: handler, ReadHeaderTimeout: 10 * time.Second, ErrorLog: log.New(io.Discard, "", 0)}
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(listener) }()
	t.Cleanup(func() { _ = server.Close(); <-done })
}

func listen(t *testing.T, port string) net.Listener {
	t.Helper()
	listener, err := new(net.ListenConfig).Listen(t.Context(), "tcp", net.JoinHostPort(bench.HostIP(), port))
	if err != nil {
		t.Fatal(err)
	}
	return listener
}

// forward passes requests on to another server; no connection outlives it.
func forward(t *testing.T, to string, rewrite func(*http.Request), modify func(*http.Response) error) http.Handler {
	t.Helper()
	target, err := url.Parse(to)
	if err != nil {
		t.Fatal(err)
	}
	return &httputil.ReverseProxy{
		Transport: &http.Transport{DisableKeepAlives: true}, ModifyResponse: modify,
		Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(target); rewrite(r.Out) },
	}
}

// tokenService is moto's ECR as the nodes reach it. What it adds is that tokens
// differ, as Amazon's do: the first is moto's own, later ones have a number.
type tokenService struct {
	mu     sync.Mutex
	issued []string // passwords
	keys   []string // the access keys that asked for them
}

func (s *tokenService) handler(t *testing.T, moto string) http.Handler {
	return forward(t, moto, func(r *http.Request) {
		r.Header.Del("Accept-Encoding")
		r.Host = "" // moto tells its services apart by the signature
	}, func(response *http.Response) error {
		request := response.Request
		if response.StatusCode != http.StatusOK || !strings.HasSuffix(request.Header.Get("X-Amz-Target"), ".GetAuthorizationToken") {
			return nil
		}
		var answer struct {
			AuthorizationData []map[string]any `json:"authorizationData"`
		}
		if err := json.NewDecoder(response.Body).Decode(&answer); err != nil || len(answer.AuthorizationData) != 1 {
			return fmt.Errorf("moto's answer has no token: %w", err)
		}
		_ = response.Body.Close()
		_, credential, _ := strings.Cut(request.Header.Get("Authorization"), "Credential=")
		key, _, _ := strings.Cut(credential, "/")
		s.mu.Lock()
		password := ecrPassword
		if n := len(s.issued); n > 0 {
			password = fmt.Sprintf("%s-%d", ecrPassword, n+1)
			answer.AuthorizationData[0]["authorizationToken"] = base64.StdEncoding.EncodeToString([]byte(ecrUser + ":" + password))
		}
		s.issued, s.keys = append(s.issued, password), append(s.keys, key)
		s.mu.Unlock()
		body, err := json.Marshal(answer)
		response.Body, response.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
		response.Header.Set("Content-Length", fmt.Sprint(len(body)))
		return err
	})
}

func (s *tokenService) asked() (passwords, keys []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.issued...), append([]string(nil), s.keys...)
}

// frontDoor is how a node reaches the registry under ECR's name: over TLS, with
// any token that was issued and not revoked. What it does not let in meets the
// registry's own refusal.
type frontDoor struct {
	tokens *tokenService

	mu      sync.Mutex
	revoked map[string]bool
	refused int
}

func (d *frontDoor) handler(t *testing.T, registry string) http.Handler {
	return forward(t, registry, func(r *http.Request) {
		user, password, given := r.BasicAuth()
		if !given {
			return
		}
		issued, _ := d.tokens.asked()
		d.mu.Lock()
		defer d.mu.Unlock()
		for _, p := range issued {
			if user == ecrUser && p == password && !d.revoked[p] {
				r.SetBasicAuth(ecrUser, ecrPassword)
				return
			}
		}
		d.refused++
		r.SetBasicAuth(ecrUser, "revoked")
	}, nil)
}

func (d *frontDoor) revoke(password string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.revoked[password] = true
}

func (d *frontDoor) refusals() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.refused
}

// certificate is one for a host name, and the PEM of what signed it: itself.
func certificate(t *testing.T, host string) (tls.Certificate, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: host}, DNSNames: []string{host}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	raw, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{raw}, PrivateKey: key}, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: raw})
}

// pointTo makes a name lead to this machine on a node, over TLS with this CA.
func pointTo(t *testing.T, node, host string, ca []byte) {
	t.Helper()
	m := bench.Node(node)
	dir := filepath.Join(m.ContainerdConfigDir, "certs.d", host)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	hosts := fmt.Sprintf("server = \"https://%s\"\n\n[host.\"https://%s\"]\n  capabilities = [\"pull\", \"resolve\"]\n  ca = \"ca.crt\"\n", host, host)
	for file, content := range map[string]string{"ca.crt": string(ca), "hosts.toml": hosts} {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	before, err := os.ReadFile(m.Path("/etc/hosts"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.WriteFile(m.Path("/etc/hosts"), before, 0o644) })
	if err := os.WriteFile(m.Path("/etc/hosts"), fmt.Appendf(before, "\n%s %s\n", bench.HostIP(), host), 0o644); err != nil {
		t.Fatal(err)
	}
}

// earlyRepository finds a repository whose image this node pulls among the
// first of a fleet. Nodes start to pull an image at a place between 0 and 30 s
// that a hash of both names gives (images.Options.Spread); a test need not wait.
func earlyRepository(node, host, prefix string) string {
	for i := 0; ; i++ {
		repository := fmt.Sprintf("%s-%d", prefix, i)
		h := fnv.New64a()
		_, _ = h.Write([]byte(node + "\x00" + host + "/" + repository + ":1"))
		if h.Sum64()%100_003 < 2_000 { // 0.6 s
			return repository
		}
	}
}

// pushAs is push to a registry that wants a user's password.
func pushAs(t *testing.T, host, user, password, repository string, image v1.Image) {
	t.Helper()
	reference, err := name.ParseReference(host+"/"+repository+":1", name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{DisableKeepAlives: true}
	if err := remote.Write(reference, image, remote.WithContext(t.Context()), remote.WithTransport(transport),
		remote.WithAuth(&authn.Basic{Username: user, Password: password})); err != nil {
		t.Fatal(err)
	}
}

// allWarm waits until all images that wasmNode wants are warm, so many.
func allWarm(t *testing.T, n int) {
	t.Helper()
	waitStatus(t, wasmNode, fmt.Sprintf("%d images to be warm", n), func(s v1alpha1.NodeStatus) bool {
		return s.Images != nil && s.Images.Total == n && s.Images.Warm == n
	})
}

// emulatedECR is moto's ECR and a registry under its name.
type emulatedECR struct {
	tokens   *tokenService
	door     *frontDoor
	registry *cluster.Registry
	endpoint string // of ECR's API, as nodes reach it
}

func startECR(t *testing.T) *emulatedECR {
	t.Helper()
	moto := mototest.Start(t)
	registry, err := bench.Registry(t.Context(), cluster.RegistryOptions{User: ecrUser, Password: ecrPassword})
	if err != nil {
		t.Fatal(err)
	}
	tokens := &tokenService{}
	door := &frontDoor{tokens: tokens, revoked: map[string]bool{}}
	api := listen(t, "0")
	serve(t, api, tokens.handler(t, moto))
	pair, ca := certificate(t, ecrHost)
	serve(t, tls.NewListener(listen(t, "443"), &tls.Config{Certificates: []tls.Certificate{pair}}), door.handler(t, "http://"+registry.Host))
	pointTo(t, wasmNode, ecrHost, ca)
	return &emulatedECR{tokens: tokens, door: door, registry: registry, endpoint: "http://" + api.Addr().String()}
}

// imagesComeByTheNodesRoleAlone wants an agent of wasmNode that has asked e for
// nothing yet and whose instance has the role's access key.
func (e *emulatedECR) imagesComeByTheNodesRoleAlone(t *testing.T, role string) {
	tokens, door := e.tokens, e.door
	bring := func(t *testing.T, app string, n int) {
		t.Helper()
		module := marked(t, "out of ECR "+rand.Text())
		repository := earlyRepository(wasmNode, ecrHost, app)
		pushAs(t, e.registry.Host, ecrUser, ecrPassword, repository, wasmImage(t, module))
		deploy(t, app, ecrHost+"/"+repository+":1", 0)
		allWarm(t, n)
		if !compiled(wasmNode, module) {
			t.Error("the store has no object of the module")
		}
	}
	bring(t, "ecr-first", 1)
	issued, keys := tokens.asked()
	if len(issued) != 1 || issued[0] != ecrPassword {
		t.Errorf("tokens %q were issued, want moto's one", issued)
	}
	if len(keys) == 0 || keys[0] != role {
		t.Errorf("the token was asked for with the access keys %q, the role's is %q", keys, role)
	}
	if n := door.refusals(); n != 0 {
		t.Errorf("the registry refused %d requests", n)
	}

	door.revoke(ecrPassword)
	bring(t, "ecr-second", 2)
	if issued, _ := tokens.asked(); len(issued) != 2 {
		t.Errorf("tokens %q were issued, want exactly one in place of the revoked", issued)
	}
	if n := door.refusals(); n == 0 {
		t.Error("the revoked token was never refused: nothing was shown")
	}
}
