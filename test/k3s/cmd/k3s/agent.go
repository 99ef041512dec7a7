package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/yaml"
)

const (
	// passwordFile of the node.
	passwordFile = "/etc/rancher/node/password"
	// tokenRetry and configRetry are k3s's; the second is jittered up to twice.
	tokenRetry, configRetry = 2 * time.Second, 5 * time.Second
)

// agent is the part of k3s that every node has.
type agent struct {
	o      *options
	n      node
	g      *group
	server string // URL
	token  string
	local  bool // on a server

	config controlConfig
	lb     *balancer
}

func runAgentCommand(parent context.Context, o *options) (err error) {
	n, err := o.node()
	if err != nil {
		return err
	}
	if err := extract(o.get("data-dir")); err != nil {
		return err
	}
	slog.Info("Starting k3s agent "+k3sVersion, "node", n.name, "ip", n.ip)
	ctx, g := newGroup(parent)
	defer func() {
		notify("STOPPING=1")
		g.stop()
		if parent.Err() != nil {
			err = nil // asked to end
		} else if cause := context.Cause(ctx); cause != nil {
			err = cause // a program ended
		}
	}()
	a := &agent{o: o, n: n, g: g, token: o.get("token")}
	if a.lb, err = newBalancer(ctx, o.get("server"), o.get("lb-server-port"), o.dataDir("agent/etc/k3s-agent-load-balancer.json")); err != nil {
		return err
	}
	a.server = "https://127.0.0.1:" + o.get("lb-server-port")
	// A token that is wrong in form ends the agent; everything else it waits
	// out, for ever.
	if _, err := parseToken(a.token); err != nil {
		return err
	}
	for {
		if _, err := connect(ctx, a.server, a.token, ""); err == nil {
			break
		} else {
			slog.Error("Failed to validate connection to cluster at "+o.get("server"), "error", err)
		}
		if err := sleep(ctx, tokenRetry); err != nil {
			return err
		}
	}
	if err := a.run(ctx); err != nil {
		return err
	}
	slog.Info("k3s agent is up and running")
	notify("READY=1")
	<-ctx.Done()
	return context.Cause(ctx)
}

func (a *agent) dir(elem ...string) string {
	return a.o.dataDir(append([]string{"agent"}, elem...)...)
}

// run brings the node up and returns when k3s would say READY=1, which does not
// mean that the Node is Ready.
func (a *agent) run(ctx context.Context) error {
	for {
		err := a.fetch(ctx)
		if err == nil {
			break
		}
		var status *statusError
		if errors.As(err, &status) && status.status == http.StatusForbidden {
			err = fmt.Errorf("Node password rejected, duplicate hostname or contents of '%s' may not match server node-passwd entry, try enabling a unique node name with the --with-node-id flag: %w", passwordFile, err) //nolint:staticcheck // k3s's own words
		}
		slog.Info("Waiting to retrieve agent configuration; server is not ready", "error", err)
		if err := sleep(ctx, configRetry+mathrand.N(configRetry)); err != nil {
			return err
		}
	}
	kubelet := a.dir("kubelet.kubeconfig")
	config, err := clientcmd.BuildConfigFromFlags("", kubelet)
	if err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	if err := a.startContainerd(ctx); err != nil {
		return err
	}
	if err := a.startKubelet(); err != nil {
		return err
	}
	// The API must answer before kube-proxy and the network start.
	if err := poll(ctx, time.Second, func() (bool, error) {
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		_, err := client.CoreV1().Nodes().Get(ctx, a.n.name, metav1.GetOptions{})
		if err != nil {
			slog.Info("Waiting for the node to be registered", "error", err)
		}
		return err == nil, nil
	}); err != nil {
		return err
	}
	if a.lb != nil {
		// A kubelet may not read endpoints; k3s's own user may.
		config, err := clientcmd.BuildConfigFromFlags("", a.dir("k3scontroller.kubeconfig"))
		if err != nil {
			return err
		}
		controller, err := kubernetes.NewForConfig(config)
		if err != nil {
			return err
		}
		go a.lb.follow(ctx, controller)
	}
	if !a.config.DisableKubeProxy {
		if err := a.startProxy(); err != nil {
			return err
		}
	}
	if a.config.FlannelBackend != "none" {
		return a.startNetwork(ctx, client)
	}
	return nil
}

// fetch takes settings and certificates from the server.
func (a *agent) fetch(ctx context.Context) error {
	access, err := connect(ctx, a.server, a.token, "")
	if err != nil {
		return err
	}
	if access.user == "" {
		access.user = "node" // a short token
	}
	content, err := access.get(ctx, "/v1-k3s/config")
	if err != nil {
		return fmt.Errorf("failed to retrieve configuration from server: %w", err)
	}
	if err := json.Unmarshal(content, &a.config); err != nil {
		return err
	}
	if a.lb != nil {
		content, err := access.get(ctx, "/v1-k3s/apiservers")
		if err != nil {
			return err
		}
		var known []string
		if err := json.Unmarshal(content, &known); err != nil {
			return err
		}
		if err := a.lb.learn(known); err != nil {
			return err
		}
	}
	password, err := ensureSecretFile(passwordFile, 16, 0o600)
	if err != nil {
		return err
	}
	for _, name := range []string{"client-ca.crt", "server-ca.crt"} {
		content, err := access.get(ctx, "/v1-k3s/"+name)
		if err != nil {
			return err
		}
		if err := writeFile(a.dir(name), content, 0o600); err != nil {
			return err
		}
	}
	for _, name := range []string{"serving-kubelet", "client-kubelet", "client-kube-proxy", "client-k3s-controller"} {
		asNode := *access
		if strings.HasSuffix(name, "kubelet") {
			asNode.nodeName, asNode.password2, asNode.nodeIP = a.n.name, password, a.n.ip.String()
		}
		if err := a.certificate(ctx, &asNode, name); err != nil {
			return fmt.Errorf("%s: %w", a.dir(name+".crt"), err)
		}
	}
	api := a.server
	for file, cert := range map[string]string{"kubelet": "client-kubelet", "kubeproxy": "client-kube-proxy", "k3scontroller": "client-k3s-controller"} {
		if err := kubeconfig(a.dir(file+".kubeconfig"), api, a.dir("server-ca.crt"), a.dir(cert+".crt"), a.dir(cert+".key")); err != nil {
			return err
		}
	}
	return nil
}

func (a *agent) certificate(ctx context.Context, access *access, name string) error {
	key, err := readKey(a.dir(name + ".key"))
	if err != nil {
		fresh, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return err
		}
		if err := writeKey(a.dir(name+".key"), fresh); err != nil {
			return err
		}
		key = fresh
	}
	request, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: name}}, key)
	if err != nil {
		return err
	}
	cert, err := access.post(ctx, "/v1-k3s/"+name+".crt", request)
	if err != nil {
		return err
	}
	if block, _ := pem.Decode(cert); block == nil {
		return errors.New("the server's answer is no certificate")
	}
	return writeFile(a.dir(name+".crt"), cert, 0o600)
}

// startKubelet runs the kubelet with k3s's settings.
func (a *agent) startKubelet() error {
	resolv := a.o.get("resolv-conf")
	if resolv == "" {
		resolv = a.resolvConf()
	}
	driver := "cgroupfs"
	if a.systemd() {
		driver = "systemd"
	}
	config := map[string]any{
		"apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
		"address":            "0.0.0.0",
		"authentication":     map[string]any{"anonymous": map[string]any{"enabled": false}, "webhook": map[string]any{"enabled": true}, "x509": map[string]any{"clientCAFile": a.dir("client-ca.crt")}},
		"authorization":      map[string]any{"mode": "Webhook"},
		"tlsCertFile":        a.dir("serving-kubelet.crt"),
		"tlsPrivateKeyFile":  a.dir("serving-kubelet.key"),
		"healthzBindAddress": "127.0.0.1", "cgroupDriver": driver, "clusterDomain": a.config.ClusterDomain, "clusterDNS": strings.Split(a.config.ClusterDNS, ","),
		"containerRuntimeEndpoint": "unix://" + containerdSocket, "serializeImagePulls": false, "resolvConf": resolv, "failSwapOn": false,
		"staticPodPath": a.dir("pod-manifests"), "volumePluginDir": "/var/lib/kubelet/volumeplugins",
		"evictionHard":           map[string]string{"imagefs.available": "5%", "nodefs.available": "5%"},
		"evictionMinimumReclaim": map[string]string{"imagefs.available": "10%", "nodefs.available": "10%"},
		"protectKernelDefaults":  a.o.is("protect-kernel-defaults"),
	}
	content, err := yaml.Marshal(config)
	if err != nil {
		return err
	}
	if err := writeFile(a.dir("etc/kubelet.conf.d/00-k3s-defaults.conf"), content, 0o600); err != nil {
		return err
	}
	if err := os.MkdirAll(a.dir("pod-manifests"), 0o755); err != nil {
		return err
	}
	args := []string{
		filepath.Join(toolsDir, "kubelet"), "--config-dir=" + a.dir("etc/kubelet.conf.d"), "--kubeconfig=" + a.dir("kubelet.kubeconfig"),
		"--hostname-override=" + a.n.name, "--node-ip=" + a.n.ip.String(),
	}
	if !a.config.DisableCCM {
		args = append(args, "--cloud-provider=external")
	}
	if labels := a.o.split("node-label"); len(labels) > 0 {
		args = append(args, "--node-labels="+strings.Join(labels, ","))
	}
	if taints := a.o.split("node-taint"); len(taints) > 0 {
		args = append(args, "--register-with-taints="+strings.Join(taints, ","))
	}
	bin, providers := a.o.get("image-credential-provider-bin-dir"), a.o.get("image-credential-provider-config")
	if info, err := os.Stat(bin); err == nil && info.IsDir() && exists(providers) {
		slog.Info("Kubelet image credential provider bin dir and configuration file found.")
		args = append(args, "--image-credential-provider-bin-dir="+bin, "--image-credential-provider-config="+providers)
	} else if a.o.set["image-credential-provider-bin-dir"] || a.o.set["image-credential-provider-config"] {
		return fmt.Errorf("image credential provider: %s and %s must both exist; k3s would go on without it and say nothing", bin, providers)
	}
	_, err = a.g.start("kubelet", "", nil, extra(args, a.o.all("kubelet-arg"))...)
	return err
}

func (a *agent) resolvConf() string {
	for _, path := range []string{"/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"} {
		content, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		found, usable := false, true
		for line := range strings.Lines(string(content)) {
			if fields := strings.Fields(line); len(fields) > 1 && fields[0] == "nameserver" {
				ip := net.ParseIP(fields[1])
				found, usable = true, usable && ip != nil && ip.IsGlobalUnicast()
			}
		}
		if found && usable {
			return path
		}
	}
	path := a.dir("etc/resolv.conf")
	if err := writeFile(path, []byte("nameserver 8.8.8.8\n"), 0o644); err != nil {
		slog.Error("writing resolv.conf", "error", err)
	}
	return path
}

// startProxy runs kube-proxy. k3s's uses iptables; nftables needs less of the
// kernel of the machine that runs tests.
func (a *agent) startProxy() error {
	args := []string{
		filepath.Join(toolsDir, "kube-proxy"), "--kubeconfig=" + a.dir("kubeproxy.kubeconfig"), "--proxy-mode=nftables", "--healthz-bind-address=127.0.0.1",
		"--cluster-cidr=" + a.config.ClusterIPRange, "--hostname-override=" + a.n.name, "--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0s", "--conntrack-tcp-timeout-close-wait=0s",
	}
	_, err := a.g.start("kube-proxy", "", nil, extra(args, a.o.all("kube-proxy-arg"))...)
	return err
}

// balancer spreads connections to 127.0.0.1 over the API servers that it knows,
// also after the one it was told of is gone.
type balancer struct {
	path string
	url  string

	mu        sync.Mutex
	addresses []string
}

func newBalancer(ctx context.Context, server, port, path string) (*balancer, error) {
	u, err := url.Parse(server)
	if err != nil {
		return nil, err
	}
	host := u.Host
	if u.Port() == "" {
		host = net.JoinHostPort(u.Hostname(), "443")
	}
	b := &balancer{path: path, url: server, addresses: []string{host}}
	var saved struct {
		ServerURL       string   `json:"ServerURL"`
		ServerAddresses []string `json:"ServerAddresses"`
	}
	if content, err := os.ReadFile(path); err == nil && json.Unmarshal(content, &saved) == nil && saved.ServerURL == server {
		b.add(saved.ServerAddresses)
	}
	ln, err := (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:"+port)
	if err != nil {
		return nil, err
	}
	context.AfterFunc(ctx, func() { ln.Close() })
	go func() { // ends with its listener
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			go b.serve(ctx, conn)
		}
	}()
	return b, b.save()
}

func (b *balancer) add(addresses []string) {
	for _, address := range addresses {
		if !slices.Contains(b.addresses, address) {
			b.addresses = append(b.addresses, address)
		}
	}
}

func (b *balancer) save() error {
	content, err := json.Marshal(map[string]any{"ServerURL": b.url, "ServerAddresses": b.addresses})
	if err != nil {
		return err
	}
	return writeFile(b.path, content, 0o600)
}

// serve copies one connection; a server that cannot be reached goes to the end
// of the list.
func (b *balancer) serve(ctx context.Context, conn net.Conn) {
	defer conn.Close()
	b.mu.Lock()
	tries := len(b.addresses)
	b.mu.Unlock()
	for range tries {
		b.mu.Lock()
		address := b.addresses[0]
		b.mu.Unlock()
		upstream, err := (&net.Dialer{Timeout: 2 * time.Second}).DialContext(ctx, "tcp", address)
		if err != nil {
			b.mu.Lock()
			if b.addresses[0] == address {
				b.addresses = append(b.addresses[1:], address)
			}
			b.mu.Unlock()
			continue
		}
		defer upstream.Close()
		stop := context.AfterFunc(ctx, func() { conn.Close(); upstream.Close() })
		defer stop()
		done := make(chan struct{}, 2)
		for _, pair := range [][2]net.Conn{{conn, upstream}, {upstream, conn}} {
			go func() { // ends when either side does
				_, _ = io.Copy(pair[0], pair[1])
				done <- struct{}{}
			}()
		}
		<-done
		return
	}
}

// follow keeps the list to what the service "kubernetes" has.
func (b *balancer) follow(ctx context.Context, client kubernetes.Interface) {
	for sleep(ctx, 5*time.Second) == nil {
		list, err := client.DiscoveryV1().EndpointSlices(metav1.NamespaceDefault).List(ctx, metav1.ListOptions{LabelSelector: "kubernetes.io/service-name=kubernetes"})
		if err != nil {
			slog.Error("reading the API servers' addresses", "error", err)
			continue
		}
		var found []string
		for _, slice := range list.Items {
			for _, endpoint := range slice.Endpoints {
				for _, address := range endpoint.Addresses {
					if len(slice.Ports) > 0 && slice.Ports[0].Port != nil {
						found = append(found, fmt.Sprintf("%s:%d", address, *slice.Ports[0].Port))
					}
				}
			}
		}
		if len(found) == 0 {
			continue
		}
		b.mu.Lock()
		b.addresses = slices.DeleteFunc(b.addresses, func(have string) bool { return !slices.Contains(found, have) })
		b.mu.Unlock()
		if err := b.learn(found); err != nil {
			slog.Error("saving the load balancer's servers", "error", err)
		}
	}
}

// learn adds servers and saves them for the next start.
func (b *balancer) learn(addresses []string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.add(addresses)
	return b.save()
}
