package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// The API server listens where nobody else does, on the port that the service
// "kubernetes" has to name; the supervisor, on that port of every other
// address, passes requests on.
const apiAddress = "127.0.0.2"

// server is a running one.
type server struct {
	o    *options
	n    node
	pki  pki
	etcd *etcd
	g    *group

	secret    string // of the server token
	nodePass  string // of the agent token
	serviceIP net.IP

	// core is set once the API answers: k3s's Runtime.Core.
	core atomic.Pointer[clients]
}

type clients struct {
	config  *rest.Config
	typed   kubernetes.Interface
	dynamic dynamic.Interface
}

func runServer(parent context.Context, o *options) (err error) {
	n, err := o.node()
	if err != nil {
		return err
	}
	if err := extract(o.get("data-dir")); err != nil {
		return err
	}
	slog.Info("Starting k3s "+k3sVersion, "node", n.name, "ip", n.ip)
	s := &server{o: o, n: n, pki: pki{dir: o.dataDir("server/tls")}}
	s.etcd = &etcd{o: o, n: n, pki: s.pki}
	_, services, err := net.ParseCIDR(o.split("service-cidr")[0])
	if err != nil {
		return fmt.Errorf("invalid service-cidr: %w", err)
	}
	s.serviceIP = nthIP(services.IP, 1)
	ctx, g := newGroup(parent)
	s.g = g
	defer func() {
		notify("STOPPING=1")
		s.g.stop()
		if parent.Err() != nil {
			err = nil // asked to end
		} else if cause := context.Cause(ctx); cause != nil {
			err = cause // a program ended
		}
	}()
	return s.run(ctx)
}

func (s *server) run(ctx context.Context) error {
	if err := s.etcd.bury(); err != nil {
		return err
	}
	if s.o.is("cluster-reset") {
		return s.reset(ctx)
	}
	if exists(s.resetFlag()) {
		_ = os.Remove(s.resetFlag())
	}
	var join *access
	joining := s.o.get("server") != "" && !s.etcd.initialized()
	if joining {
		var err error
		if join, err = s.fetchBootstrap(ctx); err != nil {
			return fmt.Errorf("starting kubernetes: preparing server: failed to bootstrap cluster data: %w", err)
		}
	}
	if err := s.etcd.setName(false); err != nil {
		return err
	}
	if err := s.prepare(); err != nil {
		return fmt.Errorf("starting kubernetes: preparing server: %w", err)
	}
	if err := s.listen(ctx); err != nil {
		return err
	}
	switch {
	case s.etcd.initialized():
		slog.Info("Managed etcd cluster bootstrap already complete and initialized")
		if err := s.etcd.start(s.g, "", ""); err != nil {
			return err
		}
	case joining:
		slog.Info("Managed etcd cluster not yet initialized")
		if err := s.etcd.join(ctx, s.g, join); err != nil {
			return err
		}
	default:
		slog.Info("Managed etcd cluster initializing")
		if err := s.etcd.start(s.g, s.etcd.name+"="+s.etcd.peerURL(), "new"); err != nil {
			return err
		}
	}
	go s.etcd.promote(ctx)
	if err := s.etcd.ready(ctx); err != nil {
		return err
	}
	if err := s.etcd.saveBootstrap(ctx, s.secret); err != nil {
		return err
	}
	if err := s.schedule(ctx); err != nil {
		return err
	}
	if err := s.startControlPlane(ctx); err != nil {
		return err
	}
	go s.controllers(ctx)

	// A server is an agent of itself.
	a := &agent{o: s.o, n: s.n, g: s.g, server: "https://127.0.0.1:" + s.port(), token: "K10::node:" + s.nodePass, local: true}
	hash, err := s.caHash()
	if err != nil {
		return err
	}
	a.token = "K10" + hash + "::node:" + s.nodePass
	if err := a.run(ctx); err != nil {
		return err
	}
	slog.Info("k3s is up and running")
	notify("READY=1")
	<-ctx.Done()
	return context.Cause(ctx)
}

func (s *server) port() string { return s.o.get("https-listen-port") }

func (s *server) resetFlag() string { return s.o.dataDir("server/db/reset-flag") }

func (s *server) caHash() (string, error) {
	ca, err := os.ReadFile(s.pki.path("server-ca.crt"))
	if err != nil {
		return "", err
	}
	return hashCA(ca)
}

// fetchBootstrap takes the cluster's authorities from the server to join, and
// compares settings that must be the same.
func (s *server) fetchBootstrap(ctx context.Context) (*access, error) {
	if s.o.get("token") == "" {
		return nil, errors.New("K3S_TOKEN is required to join a cluster")
	}
	a, err := connect(ctx, s.o.get("server"), s.o.get("token"), "server")
	if err != nil {
		return nil, err
	}
	content, err := a.get(ctx, "/v1-k3s/server-bootstrap")
	if err != nil {
		return nil, err
	}
	var files map[string][]byte
	if err := json.Unmarshal(content, &files); err != nil {
		return nil, err
	}
	// The settings are read as an agent would: with the agent token.
	asAgent := *a
	asAgent.user = "node"
	if agentToken := s.o.get("agent-token"); agentToken != "" {
		asAgent.password = agentToken
	}
	theirs, err := asAgent.get(ctx, "/v1-k3s/config")
	if err != nil {
		return nil, fmt.Errorf("failed to validate server configuration: %w", err)
	}
	var config controlConfig
	if err := json.Unmarshal(theirs, &config); err != nil {
		return nil, err
	}
	mine := s.control().Critical
	for _, name := range critical {
		if !slices.Equal(config.Critical[name], mine[name]) {
			return nil, fmt.Errorf("failed to validate server configuration: critical configuration value mismatch: %s is %v on the cluster and %v here", name, config.Critical[name], mine[name])
		}
	}
	return a, writeShared(s.o, files)
}

// controlConfig is what /v1-k3s/config says: fields of k3s's, and the values
// that must be the same.
type controlConfig struct {
	HTTPSPort             int
	SupervisorPort        int
	FlannelBackend        string
	ClusterDomain         string
	ClusterDNS            string
	ClusterIPRange        string
	ServiceIPRange        string
	DisableCCM            bool
	DisableKubeProxy      bool
	SystemDefaultRegistry string
	Critical              map[string][]string
}

func (s *server) control() controlConfig {
	port, _ := strconv.Atoi(s.port()) // checked while loading
	c := controlConfig{
		HTTPSPort: port, SupervisorPort: port, FlannelBackend: s.o.get("flannel-backend"), ClusterDomain: s.o.get("cluster-domain"),
		ClusterDNS: nthIP(s.serviceIP, 9).String(), ClusterIPRange: strings.Join(s.o.split("cluster-cidr"), ","), ServiceIPRange: strings.Join(s.o.split("service-cidr"), ","),
		DisableCCM: s.o.is("disable-cloud-controller"), DisableKubeProxy: s.o.is("disable-kube-proxy"), SystemDefaultRegistry: s.o.get("system-default-registry"),
		Critical: map[string][]string{},
	}
	if dns := s.o.split("cluster-dns"); len(dns) > 0 {
		c.ClusterDNS = strings.Join(dns, ",")
	}
	for _, name := range critical {
		value := s.o.split(name)
		if serverFlags[name].kind == boolean {
			value = []string{strconv.FormatBool(s.o.is(name))}
		}
		slices.Sort(value)
		c.Critical[name] = value
	}
	return c
}

func nthIP(ip net.IP, n byte) net.IP {
	out := slices.Clone(ip.To4())
	out[3] += n
	return out
}

// prepare writes keys, certificates, kubeconfigs and tokens.
func (s *server) prepare() error {
	if err := s.pki.generate(); err != nil {
		return err
	}
	sans := s.o.split("tls-san")
	if address := s.o.get("advertise-address"); address != "" {
		sans = append(sans, address)
	}
	if err := s.pki.issueAll(s.n, sans, s.serviceIP, s.o.get("cluster-domain")); err != nil {
		return err
	}
	if _, err := ensureSecretFile(s.o.dataDir("server/cred/ipsec.psk"), 48, 0o600); err != nil {
		return err
	}
	if s.o.is("secrets-encryption") && !exists(s.o.dataDir("server/cred/encryption-config.json")) {
		config := fmt.Sprintf(`{"kind":"EncryptionConfiguration","apiVersion":"apiserver.config.k8s.io/v1","resources":[{"resources":["secrets"],"providers":[{"aescbc":{"keys":[{"name":"aescbckey","secret":%q}]}},{"identity":{}}]}]}`,
			secretKey())
		if err := writeFile(s.o.dataDir("server/cred/encryption-config.json"), []byte(config), 0o600); err != nil {
			return err
		}
	}
	if err := s.tokens(); err != nil {
		return err
	}
	api := "https://" + apiAddress + ":" + s.port()
	cred := func(name string) string { return s.o.dataDir("server/cred", name) }
	for file, who := range map[string]string{"admin": "client-admin", "supervisor": "client-supervisor", "controller": "client-controller", "scheduler": "client-scheduler", "api-server": "client-kube-apiserver"} {
		if err := kubeconfig(cred(file+".kubeconfig"), api, s.pki.path("server-ca.crt"), s.pki.path(who+".crt"), s.pki.path(who+".key")); err != nil {
			return err
		}
	}
	return s.writeAdminKubeconfig()
}

// passwd has the secrets of both tokens.
func (s *server) passwd() string { return s.o.dataDir("server/cred/passwd") }

// savedSecret is the server token's of an earlier start, or "".
func (s *server) savedSecret() (secret string) {
	content, err := os.ReadFile(s.passwd())
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(content)) {
		if fields := strings.Split(strings.TrimSpace(line), ","); len(fields) > 1 && fields[1] == "server" {
			secret = fields[0]
		}
	}
	return secret
}

// tokens settles the secrets and writes them in the forms that k3s does.
func (s *server) tokens() error {
	hash, err := s.caHash()
	if err != nil {
		return err
	}
	if given := s.o.get("token"); given != "" {
		a, err := parseToken(given)
		if err != nil {
			return err
		}
		// A server that restores has the cluster's authority only afterwards.
		if a.hash != "" && a.hash != hash && !s.o.is("cluster-reset") {
			return fmt.Errorf("token CA hash does not match the Cluster CA certificate hash: %s != %s", a.hash, hash)
		}
		s.secret = a.password
	} else {
		s.secret = s.savedSecret()
	}
	if s.secret == "" {
		s.secret = randomHex(16)
	}
	s.nodePass = s.secret
	if given := s.o.get("agent-token"); given != "" {
		s.nodePass = given // as it is: k3s does not take a K10 form apart here
	}
	if err := writeFile(s.passwd(), fmt.Appendf(nil, "%s,node,node,k3s:agent\n%s,server,server,k3s:server\n", s.nodePass, s.secret), 0o600); err != nil {
		return err
	}
	for name, content := range map[string]string{"token": "server:" + s.secret, "agent-token": "node:" + s.nodePass} {
		if err := writeFile(s.o.dataDir("server", name), []byte("K10"+hash+"::"+content+"\n"), 0o600); err != nil {
			return err
		}
	}
	link := s.o.dataDir("server/node-token")
	_ = os.Remove(link)
	return os.Symlink(s.o.dataDir("server/token"), link)
}

// writeAdminKubeconfig writes k3s.yaml with everything inside.
func (s *server) writeAdminKubeconfig() error {
	path := s.o.get("write-kubeconfig")
	if path == "" {
		path = "/etc/rancher/k3s/k3s.yaml"
	}
	mode := uint64(0o600)
	if given := s.o.get("write-kubeconfig-mode"); given != "" {
		parsed, err := strconv.ParseUint(given, 8, 32)
		if err != nil {
			return fmt.Errorf("invalid write-kubeconfig-mode %q", given)
		}
		mode = parsed
	}
	var parts [3]string
	for i, name := range []string{"server-ca.crt", "client-admin.crt", "client-admin.key"} {
		content, err := os.ReadFile(s.pki.path(name))
		if err != nil {
			return err
		}
		parts[i] = base64Of(content)
	}
	return writeFile(path, fmt.Appendf(nil, `apiVersion: v1
clusters:
- cluster:
    certificate-authority-data: %s
    server: https://127.0.0.1:%s
  name: default
contexts:
- context:
    cluster: default
    user: default
  name: default
current-context: default
kind: Config
preferences: {}
users:
- name: default
  user:
    client-certificate-data: %s
    client-key-data: %s
`, parts[0], s.port(), parts[1], parts[2]), os.FileMode(mode))
}

// startControlPlane runs the API server, waits for it, and runs the rest.
func (s *server) startControlPlane(ctx context.Context) error {
	p, cred := s.pki.path, func(name string) string { return s.o.dataDir("server/cred", name) }
	advertise := s.n.ip.String()
	if given := s.o.get("advertise-address"); given != "" {
		advertise = given
	}
	args := []string{
		filepath.Join(toolsDir, "kube-apiserver"),
		"--bind-address=" + apiAddress, "--secure-port=" + s.port(), "--advertise-address=" + advertise,
		"--tls-cert-file=" + p("serving-kube-apiserver.crt"), "--tls-private-key-file=" + p("serving-kube-apiserver.key"),
		"--etcd-servers=https://127.0.0.1:2379", "--etcd-cafile=" + p("etcd/server-ca.crt"), "--etcd-certfile=" + p("etcd/client.crt"), "--etcd-keyfile=" + p("etcd/client.key"),
		"--client-ca-file=" + p("client-ca.crt"), "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
		"--anonymous-auth=false", "--allow-privileged=true", "--profiling=false",
		"--service-cluster-ip-range=" + strings.Join(s.o.split("service-cidr"), ","), "--service-node-port-range=" + s.o.get("service-node-port-range"),
		"--service-account-issuer=https://kubernetes.default.svc." + s.o.get("cluster-domain"),
		"--service-account-key-file=" + p("service.key"), "--service-account-signing-key-file=" + p("service.current.key"), "--api-audiences=https://kubernetes.default.svc." + s.o.get("cluster-domain") + ",k3s",
		"--kubelet-certificate-authority=" + p("server-ca.crt"), "--kubelet-client-certificate=" + p("client-kube-apiserver.crt"), "--kubelet-client-key=" + p("client-kube-apiserver.key"),
		"--kubelet-preferred-address-types=InternalIP,ExternalIP,Hostname", "--enable-aggregator-routing=true",
		"--requestheader-client-ca-file=" + p("request-header-ca.crt"), "--requestheader-allowed-names=system:auth-proxy",
		"--requestheader-username-headers=X-Remote-User", "--requestheader-group-headers=X-Remote-Group", "--requestheader-extra-headers-prefix=X-Remote-Extra-",
		"--proxy-client-cert-file=" + p("client-auth-proxy.crt"), "--proxy-client-key-file=" + p("client-auth-proxy.key"),
		"--shutdown-delay-duration=0s",
	}
	if s.o.is("secrets-encryption") {
		args = append(args, "--encryption-provider-config="+cred("encryption-config.json"))
	}
	if _, err := s.g.start("kube-apiserver", "", nil, extra(args, s.o.all("kube-apiserver-arg"))...); err != nil {
		return err
	}
	config, err := clientcmd.BuildConfigFromFlags("", cred("supervisor.kubeconfig"))
	if err != nil {
		return err
	}
	config.QPS, config.Burst = 50, 100
	c := &clients{config: config}
	if c.typed, err = kubernetes.NewForConfig(config); err != nil {
		return err
	}
	if c.dynamic, err = dynamic.NewForConfig(config); err != nil {
		return err
	}
	slog.Info("Waiting for API server to become available")
	if err := poll(ctx, 500*time.Millisecond, func() (bool, error) {
		ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		var status int
		c.typed.Discovery().RESTClient().Get().AbsPath("/readyz").Do(ctx).StatusCode(&status)
		return status == http.StatusOK, nil
	}); err != nil {
		return err
	}
	manager := []string{
		filepath.Join(toolsDir, "kube-controller-manager"),
		"--kubeconfig=" + cred("controller.kubeconfig"), "--authentication-kubeconfig=" + cred("controller.kubeconfig"), "--authorization-kubeconfig=" + cred("controller.kubeconfig"),
		"--bind-address=127.0.0.1", "--leader-elect=true", "--use-service-account-credentials=true", "--profiling=false",
		"--service-account-private-key-file=" + p("service.current.key"), "--root-ca-file=" + p("server-ca.crt"),
		"--cluster-signing-cert-file=" + p("client-ca.crt"), "--cluster-signing-key-file=" + p("client-ca.key"),
		"--allocate-node-cidrs=true", "--cluster-cidr=" + strings.Join(s.o.split("cluster-cidr"), ","), "--service-cluster-ip-range=" + strings.Join(s.o.split("service-cidr"), ","),
		"--controllers=*,tokencleaner,-service,-route,-cloud-node-lifecycle", "--cert-dir=" + s.o.dataDir("server/tls/kube-controller-manager"),
	}
	if _, err := s.g.start("kube-controller-manager", "", nil, extra(manager, s.o.all("kube-controller-manager-arg"))...); err != nil {
		return err
	}
	if !s.o.is("disable-scheduler") {
		scheduler := []string{
			filepath.Join(toolsDir, "kube-scheduler"),
			"--kubeconfig=" + cred("scheduler.kubeconfig"), "--authentication-kubeconfig=" + cred("scheduler.kubeconfig"), "--authorization-kubeconfig=" + cred("scheduler.kubeconfig"),
			"--bind-address=127.0.0.1", "--leader-elect=true", "--profiling=false", "--cert-dir=" + s.o.dataDir("server/tls/kube-scheduler"),
		}
		if _, err := s.g.start("kube-scheduler", "", nil, extra(scheduler, s.o.all("kube-scheduler-arg"))...); err != nil {
			return err
		}
	}
	s.core.Store(c)
	return nil
}

// extra appends the owner's arguments, which win; "key=value" as k3s wants
// them, without dashes.
func extra(args, given []string) []string {
	for _, arg := range given {
		name, _, _ := strings.Cut(arg, "=")
		args = slices.DeleteFunc(args, func(have string) bool { return strings.HasPrefix(have, "--"+name+"=") })
		args = append(args, "--"+arg)
	}
	return args
}
