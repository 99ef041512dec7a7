// Package ecr is Amazon ECR for tests, under its own names and over TLS: moto is
// the API, a registry that is given keeps what is pushed, and what stands before
// both does what neither can: tokens differ, expire and are asked for at the door,
// nothing is pushed where no repository was made, and a role may be denied an
// action in IAM's words.
//
// It owns its listeners and what it saw. That names lead here and its authority
// is trusted, the test sees to: see Names and Authority.
package ecr

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	awsecr "github.com/aws/aws-sdk-go-v2/service/ecr"
	"github.com/aws/aws-sdk-go-v2/service/ecr/types"
	"github.com/google/go-containerregistry/pkg/registry"

	"github.com/hearth-sh/hearth/internal/ecr/mototest"
)

const (
	// Account is moto's.
	Account = "123456789012"
	// Region of everything here; instance metadata should say the same.
	Region = "eu-central-1"
	// Host is the registry's name.
	Host = Account + ".dkr.ecr." + Region + ".amazonaws.com"
	// APIHost is the name of ECR's API: where every SDK looks for it that is not
	// told otherwise.
	APIHost = "api.ecr." + Region + ".amazonaws.com"

	user = "AWS"
	// life of a token, as Amazon's.
	life = 12 * time.Hour
	// maxAnswer bounds what is read of moto.
	maxAnswer = 1 << 20
)

// Names lead to a Service: the registry's and the API's.
func Names() []string { return []string{Host, APIHost} }

// Hosts are lines for /etc/hosts by which the names lead to an address.
func Hosts(ip string) string {
	var b strings.Builder
	for _, name := range Names() {
		fmt.Fprintf(&b, "%s %s\n", ip, name)
	}
	return b.String()
}

// Authority is whom a Service's certificate is from.
type Authority struct {
	// PEM is what must be trusted.
	PEM []byte

	pair tls.Certificate
}

// NewAuthority makes one, for tests that need it before there is a Service.
func NewAuthority() (*Authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ECR of tests"}, DNSNames: Names(), IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-24 * time.Hour), NotAfter: time.Now().Add(24 * time.Hour), KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	raw, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	return &Authority{
		PEM:  pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: raw}),
		pair: tls.Certificate{Certificate: [][]byte{raw}, PrivateKey: key},
	}, nil
}

// Options of a Service. IP is required.
type Options struct {
	// IP is the address of this machine to serve at: port 443 under ECR's names,
	// and the API at some port without TLS as well.
	IP string
	// Registry is the host:port of one that lets everybody in, over HTTP; empty:
	// one in memory.
	Registry string
	// Moto is the URL of one that runs already; empty: one for this Service.
	Moto string
	// Authority of the certificate; nil: a new one.
	Authority *Authority
}

// Token is one that was issued.
type Token struct {
	Password string
	// Key is the access key of the role that asked for it.
	Key     string
	Expires time.Time
}

// Request is one that the registry let in.
type Request struct {
	Method, Repository string
	// Password is that of the token.
	Password string
}

// Push says whether something was written.
func (r Request) Push() bool { return r.Method != http.MethodGet && r.Method != http.MethodHead }

// Service is ECR while a test runs. Its methods may be called at any time.
type Service struct {
	Authority *Authority
	// Endpoint is the API's URL without TLS, for AWS_ENDPOINT_URL.
	Endpoint string
	// Registry is the host:port of what keeps the images: a test may push past
	// the door.
	Registry string
	// API is a client of it that may do everything and is not counted.
	API *awsecr.Client

	ip       string
	upstream *http.Transport

	mu       sync.Mutex
	life     time.Duration
	tokens   []Token
	revoked  map[string]bool
	denied   map[[2]string]bool // access key, action
	requests []Request
	refusals int
}

// Start runs it until the test ends. Without moto the test is skipped, but with
// CI set it fails.
func Start(t testing.TB, o Options) *Service {
	t.Helper()
	if o.Moto == "" {
		o.Moto = mototest.Start(t)
	}
	s := &Service{
		Authority: o.Authority, Registry: o.Registry, ip: o.IP, life: life, revoked: map[string]bool{}, denied: map[[2]string]bool{},
		upstream: &http.Transport{DisableKeepAlives: true}, // no connection outlives its request
	}
	if s.Authority == nil {
		made, err := NewAuthority()
		if err != nil {
			t.Fatal(err)
		}
		s.Authority = made
	}
	s.API = awsecr.New(awsecr.Options{
		Region: Region, BaseEndpoint: aws.String(o.Moto), HTTPClient: &http.Client{Transport: s.upstream},
		Credentials: credentials.NewStaticCredentialsProvider("AKIAOFTHETEST", "example", ""),
	})
	if s.Registry == "" {
		memory := s.listen(t, "0")
		s.Registry = memory.Addr().String()
		serve(t, memory, registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	}
	api, door := s.api(s.forward(t, o.Moto)), s.door(s.forward(t, "http://"+s.Registry))
	plain := s.listen(t, "0")
	s.Endpoint = "http://" + plain.Addr().String()
	serve(t, plain, api)
	secure := tls.NewListener(s.listen(t, "443"), &tls.Config{Certificates: []tls.Certificate{s.Authority.pair}, MinVersion: tls.VersionTLS12})
	serve(t, secure, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch host, _, _ := strings.Cut(r.Host, ":"); host {
		case APIHost:
			api.ServeHTTP(w, r)
		case Host:
			door.ServeHTTP(w, r)
		default:
			http.Error(w, "ECR of tests has no name "+host, http.StatusMisdirectedRequest)
		}
	}))
	return s
}

// Hosts are lines for /etc/hosts by which the names lead here.
func (s *Service) Hosts() string { return Hosts(s.ip) }

func (s *Service) listen(t testing.TB, port string) net.Listener {
	t.Helper()
	listener, err := new(net.ListenConfig).Listen(t.Context(), "tcp", net.JoinHostPort(s.ip, port))
	if err != nil {
		t.Fatal(err)
	}
	return listener
}

func serve(t testing.TB, listener net.Listener, handler http.Handler) {
	t.Helper()
	server := &http.Server{Handler: handler, ReadHeaderTimeout: 10 * time.Second, ErrorLog: log.New(io.Discard, "", 0)}
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(listener) }()
	t.Cleanup(func() { _ = server.Close(); <-done })
}

func (s *Service) forward(t testing.TB, to string) http.Handler {
	t.Helper()
	target, err := url.Parse(to)
	if err != nil {
		t.Fatal(err)
	}
	return &httputil.ReverseProxy{
		Transport: s.upstream, ErrorLog: log.New(io.Discard, "", 0),
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(target)
			r.SetXForwarded()      // what the registry names as its own address
			r.Out.Host = r.In.Host // is the one it was asked at
		},
	}
}

// SetLife is how long tokens live that are issued from now on; 12 h at first.
func (s *Service) SetLife(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.life = d
}

// Deny refuses an action ("GetAuthorizationToken") to an access key until undone.
func (s *Service) Deny(key, action string) (undo func()) {
	set := func(to bool) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.denied[[2]string{key, action}] = to
	}
	set(true)
	return func() { set(false) }
}

// Revoke ends a token before its time.
func (s *Service) Revoke(password string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.revoked[password] = true
}

// Tokens are those that were issued, the oldest first.
func (s *Service) Tokens() []Token {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]Token(nil), s.tokens...)
}

// Requests are those that the registry let in, the oldest first.
func (s *Service) Requests() []Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]Request(nil), s.requests...)
}

// Refusals is how many requests came with a token that is none, or no more.
func (s *Service) Refusals() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.refusals
}

// api is moto with IAM, and with tokens that differ.
func (s *Service) api(moto http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, action, _ := strings.Cut(r.Header.Get("X-Amz-Target"), ".")
		_, credential, _ := strings.Cut(r.Header.Get("Authorization"), "Credential=")
		key, _, _ := strings.Cut(credential, "/")
		s.mu.Lock()
		denied := s.denied[[2]string{key, action}]
		s.mu.Unlock()
		if denied {
			w.Header().Set("Content-Type", "application/x-amz-json-1.1")
			w.WriteHeader(http.StatusBadRequest)
			_ = json.NewEncoder(w).Encode(map[string]string{
				"__type": "AccessDeniedException",
				"message": "User: arn:aws:sts::" + Account + ":assumed-role/hearth-node/i-0123456789abcdef0 is not authorized to perform: ecr:" + action +
					" on resource: * because no identity-based policy allows the ecr:" + action + " action",
			})
			return
		}
		r.Header.Del("Accept-Encoding")
		if action != "GetAuthorizationToken" {
			moto.ServeHTTP(w, r)
			return
		}
		answer := &recorder{header: http.Header{}, status: http.StatusOK}
		moto.ServeHTTP(answer, r)
		var content struct {
			AuthorizationData []map[string]any `json:"authorizationData"`
		}
		if err := json.Unmarshal(answer.body.Bytes(), &content); answer.status != http.StatusOK || err != nil || len(content.AuthorizationData) != 1 {
			http.Error(w, "moto's answer has no token: "+answer.body.String(), http.StatusInternalServerError)
			return
		}
		s.mu.Lock()
		issued := Token{Password: fmt.Sprintf("%s-auth-token-%d", Account, len(s.tokens)+1), Key: key, Expires: time.Now().Add(s.life)}
		s.tokens = append(s.tokens, issued)
		s.mu.Unlock()
		content.AuthorizationData[0]["authorizationToken"] = base64.StdEncoding.EncodeToString([]byte(user + ":" + issued.Password))
		content.AuthorizationData[0]["expiresAt"] = float64(issued.Expires.UnixMilli()) / 1000
		w.Header().Set("Content-Type", answer.header.Get("Content-Type"))
		_ = json.NewEncoder(w).Encode(content)
	})
}

// recorder keeps an answer instead of sending it.
type recorder struct {
	header http.Header
	status int
	body   bytes.Buffer
}

func (r *recorder) Header() http.Header    { return r.header }
func (r *recorder) WriteHeader(status int) { r.status = status }
func (r *recorder) Write(p []byte) (int, error) {
	if r.body.Len() > maxAnswer {
		return 0, errors.New("the answer is too long")
	}
	return r.body.Write(p)
}

// good says whether the registry takes a password now.
func (s *Service) good(password string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, t := range s.tokens {
		if t.Password == password {
			return !s.revoked[password] && time.Now().Before(t.Expires)
		}
	}
	return false
}

// repositoryPath is a repository in the paths of the distribution protocol.
var repositoryPath = regexp.MustCompile(`^/v2/(.+)/(blobs|manifests|tags|referrers)/`)

// door is the registry as ECR guards it.
func (s *Service) door(kept http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		name, password, given := r.BasicAuth()
		if !given || name != user || !s.good(password) {
			if given {
				s.mu.Lock()
				s.refusals++
				s.mu.Unlock()
			}
			w.Header().Set("Www-Authenticate", `Basic realm="https://`+Host+`/",service="ecr.amazonaws.com"`)
			refuse(w, http.StatusUnauthorized, "DENIED", "Your authorization token has expired. Reauthenticate and try again.")
			return
		}
		r.Header.Del("Authorization")
		request := Request{Method: r.Method, Password: password}
		if m := repositoryPath.FindStringSubmatch(r.URL.Path); m != nil {
			request.Repository = m[1]
		}
		if request.Push() && request.Repository != "" {
			if made, err := s.made(r.Context(), request.Repository); err != nil {
				refuse(w, http.StatusInternalServerError, "UNKNOWN", err.Error())
				return
			} else if !made {
				refuse(w, http.StatusNotFound, "NAME_UNKNOWN", "The repository with name '"+request.Repository+"' does not exist in the registry with id '"+Account+"'")
				return
			}
		}
		s.mu.Lock()
		s.requests = append(s.requests, request)
		s.mu.Unlock()
		kept.ServeHTTP(w, r)
	})
}

func refuse(w http.ResponseWriter, status int, code, message string) {
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]any{"errors": []map[string]string{{"code": code, "message": message}}})
}

// made says whether moto has the repository.
func (s *Service) made(ctx context.Context, repository string) (bool, error) {
	_, err := s.API.DescribeRepositories(ctx, &awsecr.DescribeRepositoriesInput{RepositoryNames: []string{repository}})
	var missing *types.RepositoryNotFoundException
	if errors.As(err, &missing) {
		return false, nil
	}
	return err == nil, err
}
