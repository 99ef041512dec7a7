package main

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"os"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const (
	maxReads  = 20 // of agents in flight: pkg/server/handlers/router.go
	maxWrites = 10
	// maxRequest bounds what is read of an agent's request.
	maxRequest = 1 << 20
)

func base64Of(b []byte) string { return base64.StdEncoding.EncodeToString(b) }

func secretKey() string {
	key := make([]byte, 32)
	copy(key, randomHex(16))
	return base64Of(key)
}

// identity is who asks, and in which groups.
type identity struct {
	name   string
	groups []string
}

// listen serves the supervisor on every address but the API server's own, on
// the port they share.
func (s *server) listen(ctx context.Context) error {
	clientCA := x509.NewCertPool()
	ca, err := os.ReadFile(s.pki.path("client-ca.crt"))
	if err != nil {
		return err
	}
	clientCA.AppendCertsFromPEM(ca)
	cert, err := tls.LoadX509KeyPair(s.pki.path("serving-supervisor.crt"), s.pki.path("serving-supervisor.key"))
	if err != nil {
		return err
	}
	proxy, err := s.proxy()
	if err != nil {
		return err
	}
	handler := s.handler(clientCA, proxy)
	addresses := []string{"127.0.0.1", s.n.ip.String(), "[::1]"}
	if bind := s.o.get("bind-address"); bind != "" && bind != "0.0.0.0" {
		addresses = []string{"127.0.0.1", bind}
	}
	config := &tls.Config{Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequestClientCert, MinVersion: tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1"}}
	for _, address := range addresses {
		ln, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address+":"+s.port())
		if err != nil {
			if address == "[::1]" {
				continue // a machine without IPv6
			}
			return err
		}
		// Handshakes that fail are the clients' own: k3s logs them, too.
		httpServer := &http.Server{Handler: handler, TLSConfig: config, ReadHeaderTimeout: 30 * time.Second, ErrorLog: log.New(io.Discard, "", 0)}
		context.AfterFunc(ctx, func() { _ = httpServer.Close() })
		go func() {
			if err := httpServer.ServeTLS(ln, "", ""); !errors.Is(err, http.ErrServerClosed) {
				s.g.cancel(fmt.Errorf("the supervisor on %s ended: %w", ln.Addr(), err))
			}
		}()
	}
	return nil
}

func send(w http.ResponseWriter, status int, err error) {
	if status >= http.StatusInternalServerError {
		slog.Error("Sending HTTP response", "status", status, "error", err)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(metav1.Status{
		TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusFailure, Message: err.Error(), Code: int32(status),
		Reason: reasonOf(status),
	})
}

func reasonOf(status int) metav1.StatusReason {
	switch status {
	case http.StatusUnauthorized:
		return metav1.StatusReasonUnauthorized
	case http.StatusForbidden:
		return metav1.StatusReasonForbidden
	case http.StatusServiceUnavailable:
		return metav1.StatusReasonServiceUnavailable
	case http.StatusTooManyRequests:
		return metav1.StatusReasonTooManyRequests
	}
	return metav1.StatusReasonInternalError
}

func (s *server) handler(clientCA *x509.CertPool, api http.Handler) http.Handler {
	reads, writes := make(chan struct{}, maxReads), make(chan struct{}, maxWrites)
	agents, servers := []string{"k3s:agent", "system:nodes"}, []string{"k3s:server"}
	mux := http.NewServeMux()
	handle := func(path string, roles []string, f http.HandlerFunc) {
		mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
			who, status := s.authenticate(r, clientCA)
			switch {
			case status == http.StatusUnauthorized:
				send(w, status, errors.New("not authorized"))
				return
			case !slices.ContainsFunc(who.groups, func(g string) bool { return slices.Contains(roles, g) }):
				send(w, http.StatusForbidden, errors.New("forbidden"))
				return
			}
			if roles[0] == agents[0] {
				slots := reads
				if r.Method != http.MethodGet {
					slots = writes
				}
				select {
				case slots <- struct{}{}:
					defer func() { <-slots }()
				default:
					w.Header().Set("Retry-After", "1")
					send(w, http.StatusTooManyRequests, errors.New("too many requests, please try again later"))
					return
				}
			}
			f(w, r.WithContext(context.WithValue(r.Context(), identityKey{}, who)))
		})
	}
	file := func(name string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/plain")
			http.ServeFile(w, r, s.pki.path(name))
		}
	}
	mux.HandleFunc("/ping", func(w http.ResponseWriter, _ *http.Request) { plainText(w, []byte("pong")) })
	mux.HandleFunc("/cacerts", func(w http.ResponseWriter, _ *http.Request) {
		ca, err := os.ReadFile(s.pki.path("server-ca.crt"))
		if err != nil {
			send(w, http.StatusInternalServerError, err)
			return
		}
		plainText(w, ca)
	})
	handle("/v1-k3s/client-ca.crt", agents, file("client-ca.crt"))
	handle("/v1-k3s/server-ca.crt", agents, file("server-ca.crt"))
	handle("/v1-k3s/config", agents, func(w http.ResponseWriter, _ *http.Request) { sendJSON(w, s.control()) })
	handle("/v1-k3s/apiservers", agents, func(w http.ResponseWriter, r *http.Request) { sendJSON(w, s.apiServers(r.Context())) })
	handle("/v1-k3s/readyz", agents, func(w http.ResponseWriter, _ *http.Request) {
		if s.core.Load() == nil {
			send(w, http.StatusServiceUnavailable, errors.New("runtime core not ready"))
			return
		}
		plainText(w, []byte("ok"))
	})
	handle("/v1-k3s/serving-kubelet.crt", agents, func(w http.ResponseWriter, r *http.Request) {
		s.nodeCert(w, r, "server-ca", func(name string) (subject, error) {
			ips := []net.IP{net.IPv4(127, 0, 0, 1)}
			for text := range strings.SplitSeq(r.Header.Get("k3s-Node-IP"), ",") {
				ip := net.ParseIP(text)
				if ip == nil {
					return subject{}, fmt.Errorf("invalid node IP address %q", text)
				}
				ips = append(ips, ip)
			}
			return subject{name: name, dns: []string{name, "localhost"}, ips: ips, server: true}, nil
		})
	})
	handle("/v1-k3s/client-kubelet.crt", agents, func(w http.ResponseWriter, r *http.Request) {
		s.nodeCert(w, r, "client-ca", func(name string) (subject, error) {
			return subject{name: "system:node:" + name, groups: []string{"system:nodes"}, client: true}, nil
		})
	})
	for path, name := range map[string]string{"client-kube-proxy": "system:kube-proxy", "client-k3s-controller": "system:k3s-controller"} {
		handle("/v1-k3s/"+path+".crt", agents, func(w http.ResponseWriter, r *http.Request) {
			s.signCSR(w, r, "client-ca", subject{name: name, client: true})
		})
	}
	handle("/v1-k3s/server-bootstrap", servers, func(w http.ResponseWriter, _ *http.Request) {
		files, err := readShared(s.o)
		if err != nil {
			send(w, http.StatusInternalServerError, err)
			return
		}
		sendJSON(w, files)
	})
	handle("/db/info", servers, func(w http.ResponseWriter, r *http.Request) {
		// k3s asks for as long (infoHandler of pkg/etcd).
		ctx, cancel := context.WithTimeout(r.Context(), 2*time.Second)
		defer cancel()
		members, err := s.etcd.members(ctx)
		if err != nil {
			members = []member{{Name: s.etcd.name, PeerURLs: []string{s.etcd.peerURL()}, ClientURLs: []string{s.etcd.clientURL()}}}
		}
		sendJSON(w, map[string]any{"members": members})
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, "/v1-k3s/") {
			http.NotFound(w, r)
			return
		}
		if s.core.Load() == nil {
			send(w, http.StatusServiceUnavailable, errors.New("apiserver not ready"))
			return
		}
		r = r.Clone(r.Context())
		for name := range r.Header {
			if strings.HasPrefix(http.CanonicalHeaderKey(name), "X-Remote-") {
				r.Header.Del(name)
			}
		}
		if who, ok := certIdentity(r, clientCA); ok {
			r.Header.Set("X-Remote-User", who.name)
			for _, group := range who.groups {
				r.Header.Add("X-Remote-Group", group)
			}
		}
		api.ServeHTTP(w, r)
	})
	return mux
}

type identityKey struct{}

func plainText(w http.ResponseWriter, content []byte) {
	w.Header().Set("Content-Type", "text/plain")
	_, _ = w.Write(content)
}

func sendJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v)
}

func certIdentity(r *http.Request, clientCA *x509.CertPool) (identity, bool) {
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
		return identity{}, false
	}
	intermediates := x509.NewCertPool()
	for _, cert := range r.TLS.PeerCertificates[1:] {
		intermediates.AddCert(cert)
	}
	leaf := r.TLS.PeerCertificates[0]
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: clientCA, Intermediates: intermediates, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		return identity{}, false
	}
	return identity{name: leaf.Subject.CommonName, groups: leaf.Subject.Organization}, true
}

// authenticate says who asks. A wrong password is 401; nobody at all is an
// identity without groups, which the callers refuse with 403.
func (s *server) authenticate(r *http.Request, clientCA *x509.CertPool) (identity, int) {
	if who, ok := certIdentity(r, clientCA); ok {
		return who, http.StatusOK
	}
	user, password, ok := r.BasicAuth()
	if !ok {
		if r.Header.Get("Authorization") != "" {
			return identity{}, http.StatusUnauthorized
		}
		return identity{}, http.StatusOK
	}
	for _, known := range []struct{ user, password, role string }{{"server", s.secret, "k3s:server"}, {"node", s.nodePass, "k3s:agent"}} {
		if user == known.user && subtle.ConstantTimeCompare([]byte(password), []byte(known.password)) == 1 {
			return identity{name: user, groups: []string{known.role}}, http.StatusOK
		}
	}
	return identity{}, http.StatusUnauthorized
}

// nodeCert signs for a node that knows its password.
func (s *server) nodeCert(w http.ResponseWriter, r *http.Request, by string, make func(name string) (subject, error)) {
	name, password := strings.ToLower(r.Header.Get("k3s-Node-Name")), r.Header.Get("k3s-Node-Password")
	switch {
	case name == "":
		send(w, http.StatusBadRequest, errors.New("node name not set"))
		return
	case password == "":
		send(w, http.StatusBadRequest, errors.New("node password not set"))
		return
	}
	if status, err := s.verifyNode(r.Context(), name, password); err != nil {
		send(w, status, err)
		return
	}
	subject, err := make(name)
	if err != nil {
		send(w, http.StatusInternalServerError, err)
		return
	}
	s.signCSR(w, r, by, subject)
}

// verifyNode holds the password against the secret of the node, which the
// first one to come makes.
func (s *server) verifyNode(ctx context.Context, name, password string) (int, error) {
	if who, ok := ctx.Value(identityKey{}).(identity); ok && strings.HasPrefix(who.name, "system:node:") && who.name != "system:node:"+name {
		return http.StatusBadRequest, errors.New("header node name does not match auth node name")
	}
	core := s.core.Load()
	if core == nil {
		return http.StatusServiceUnavailable, errors.New("runtime core not ready")
	}
	if who, ok := ctx.Value(identityKey{}).(identity); ok && strings.HasPrefix(who.name, "system:node:") {
		if _, err := core.typed.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{}); err != nil {
			return http.StatusUnauthorized, fmt.Errorf("unable to verify node identity: %w", err)
		}
	}
	secrets := core.typed.CoreV1().Secrets(metav1.NamespaceSystem)
	for range 2 {
		secret, err := secrets.Get(ctx, name+".node-password.k3s", metav1.GetOptions{})
		if err == nil {
			salt, _, _ := strings.Cut(string(secret.Data["hash"]), ":")
			if subtle.ConstantTimeCompare(secret.Data["hash"], hashPassword(salt, password)) != 1 {
				return http.StatusForbidden, fmt.Errorf("unable to verify password for node %s: hash does not match", name)
			}
			return http.StatusOK, nil
		}
		if !apierrors.IsNotFound(err) {
			return http.StatusInternalServerError, err
		}
		immutable := true
		_, err = secrets.Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: name + ".node-password.k3s"}, Immutable: &immutable, Data: map[string][]byte{"hash": hashPassword(randomHex(8), password)}}, metav1.CreateOptions{})
		if err == nil {
			return http.StatusOK, nil
		}
		if !apierrors.IsAlreadyExists(err) {
			return http.StatusInternalServerError, err
		}
	}
	return http.StatusInternalServerError, errors.New("the node's password is made and removed at the same time")
}

// hashPassword is "salt:hash". Node passwords are random: rounds add nothing.
func hashPassword(salt, password string) []byte {
	sum := sha256.Sum256([]byte(salt + ":" + password))
	return fmt.Appendf(nil, "%s:%x", salt, sum)
}

func (s *server) signCSR(w http.ResponseWriter, r *http.Request, by string, who subject) {
	if r.Method != http.MethodPost {
		send(w, http.StatusMethodNotAllowed, errors.New("this stand-in wants a certificate request; k3s would still hand out a common key"))
		return
	}
	body, err := io.ReadAll(io.LimitReader(r.Body, maxRequest))
	if err != nil {
		send(w, http.StatusBadRequest, err)
		return
	}
	request, err := x509.ParseCertificateRequest(body)
	if err == nil {
		err = request.CheckSignature()
	}
	if err != nil {
		send(w, http.StatusBadRequest, err)
		return
	}
	a, err := s.pki.authority(by)
	if err != nil {
		send(w, http.StatusInternalServerError, err)
		return
	}
	cert, err := a.sign(request.PublicKey, who)
	if err != nil {
		send(w, http.StatusInternalServerError, err)
		return
	}
	plainText(w, cert)
}

// apiServers are the addresses of the API servers, as the service knows them.
func (s *server) apiServers(ctx context.Context) []string {
	out := []string{}
	core := s.core.Load()
	if core == nil {
		return out
	}
	slices_, err := core.typed.DiscoveryV1().EndpointSlices(metav1.NamespaceDefault).List(ctx, metav1.ListOptions{LabelSelector: "kubernetes.io/service-name=kubernetes"})
	if err != nil {
		return out
	}
	for _, slice := range slices_.Items {
		for _, endpoint := range slice.Endpoints {
			for _, address := range endpoint.Addresses {
				for _, port := range slice.Ports {
					if port.Port != nil {
						out = append(out, fmt.Sprintf("%s:%d", address, *port.Port))
					}
				}
			}
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// proxy passes requests on to the API server, saying who asks as an
// authenticating proxy does.
func (s *server) proxy() (http.Handler, error) {
	cert, err := tls.LoadX509KeyPair(s.pki.path("client-auth-proxy.crt"), s.pki.path("client-auth-proxy.key"))
	if err != nil {
		return nil, err
	}
	ca, err := os.ReadFile(s.pki.path("server-ca.crt"))
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	transport := func(protocols ...string) *http.Transport {
		return &http.Transport{
			TLSClientConfig:   &tls.Config{Certificates: []tls.Certificate{cert}, RootCAs: roots, NextProtos: protocols},
			ForceAttemptHTTP2: slices.Contains(protocols, "h2"), MaxIdleConnsPerHost: 100, DisableCompression: true,
		}
	}
	// Upgrades (exec, port-forward) exist in HTTP/1.1 only.
	plain, upgrade := transport("h2", "http/1.1"), transport("http/1.1")
	return &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme, r.Out.URL.Host = "https", apiAddress+":"+s.port()
			r.Out.Host = r.In.Host
		},
		Transport: roundTripper(func(r *http.Request) (*http.Response, error) {
			if r.Header.Get("Upgrade") != "" {
				return upgrade.RoundTrip(r)
			}
			return plain.RoundTrip(r)
		}),
		FlushInterval: -1,
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
			if r.Context().Err() == nil {
				send(w, http.StatusServiceUnavailable, err)
			}
		},
		ErrorLog: log.New(io.Discard, "", 0),
	}, nil
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }
