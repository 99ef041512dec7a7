package cluster

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"
)

// apiServerTimeout is for the API server to be ready, hooks included: some
// five seconds on an idle machine.
const apiServerTimeout = 90 * time.Second

// auditPolicy records who did what to which object, without bodies.
const auditPolicy = `apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- level: Metadata
`

// writeControlPlane makes keys, certificates, kubeconfigs and command lines.
func (c *Cluster) writeControlPlane() error {
	logs := filepath.Join(c.dir, "logs")
	if err := os.MkdirAll(logs, 0o755); err != nil {
		return err
	}
	var err error
	if c.ca, err = newAuthority(c.pki, "ca"); err != nil {
		return err
	}
	front, err := newAuthority(c.pki, "front-proxy-ca")
	if err != nil {
		return err
	}
	key, err := newKey()
	if err != nil {
		return err
	}
	if err := writeKeyPair(c.pki, "service-account", key); err != nil {
		return err
	}
	server, local := hostIP(c.slot), loopbackIP(c.slot)
	if err := c.ca.issue("apiserver", subject{
		name: "kube-apiserver", ips: []string{server, firstServiceIP},
		dns: []string{"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"},
	}); err != nil {
		return err
	}
	if err := c.ca.issue("apiserver-kubelet-client", subject{name: "kube-apiserver-kubelet-client", groups: []string{"system:masters"}}); err != nil {
		return err
	}
	if err := front.issue("front-proxy-client", subject{name: "front-proxy-client"}); err != nil {
		return err
	}
	manager, scheduler := filepath.Join(c.dir, "controller-manager.kubeconfig"), filepath.Join(c.dir, "scheduler.kubeconfig")
	for path, who := range map[string]subject{
		c.Kubeconfig(): {name: "admin", groups: []string{"system:masters"}},
		manager:        {name: "system:kube-controller-manager"},
		scheduler:      {name: "system:kube-scheduler"},
	} {
		if err := c.ca.kubeconfig(path, c.server(), who); err != nil {
			return err
		}
	}
	if err := c.clients(); err != nil {
		return err
	}
	policy := filepath.Join(c.dir, "audit-policy.yaml")
	if err := os.WriteFile(policy, []byte(auditPolicy), 0o644); err != nil {
		return err
	}
	launch := filepath.Join(c.dir, "enter")
	if err := launcher(launch, c.daemonCgroups(controlPlane)); err != nil {
		return err
	}
	program := func(name, path string, args ...string) *daemon {
		return &daemon{name: name, log: filepath.Join(logs, name+".log"), argv: append([]string{launch, path}, args...)}
	}
	pki := func(name string) string { return filepath.Join(c.pki, name) }

	etcdURL, etcdPeer := "http://"+local+":2379", "http://"+local+":2380"
	c.etcd = program("etcd", "etcd",
		"--name=default", "--data-dir="+filepath.Join(c.dir, "etcd"),
		"--listen-client-urls="+etcdURL, "--advertise-client-urls="+etcdURL,
		"--listen-peer-urls="+etcdPeer, "--initial-advertise-peer-urls="+etcdPeer,
		"--initial-cluster=default="+etcdPeer, "--log-level=warn", "--logger=zap")
	if runtime.GOARCH == "arm64" {
		c.etcd.env = []string{"ETCD_UNSUPPORTED_ARCH=arm64"} // etcd 3.4 refuses to start without
	}

	c.api = program("kube-apiserver", filepath.Join(c.tools, "kube-apiserver"), append(c.featureGates(
		"--etcd-servers="+etcdURL,
		"--bind-address="+server, "--advertise-address="+server, "--secure-port=6443",
		"--tls-cert-file="+pki("apiserver.crt"), "--tls-private-key-file="+pki("apiserver.key"),
		"--client-ca-file="+pki("ca.crt"),
		"--service-cluster-ip-range="+serviceCIDR,
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
		"--anonymous-auth=true", "--allow-privileged=true",
		"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
		"--service-account-key-file="+pki("service-account.pub"), "--service-account-signing-key-file="+pki("service-account.key"),
		"--kubelet-certificate-authority="+pki("ca.crt"),
		"--kubelet-client-certificate="+pki("apiserver-kubelet-client.crt"), "--kubelet-client-key="+pki("apiserver-kubelet-client.key"),
		"--kubelet-preferred-address-types=InternalIP",
		"--requestheader-client-ca-file="+pki("front-proxy-ca.crt"), "--requestheader-allowed-names=front-proxy-client",
		"--requestheader-username-headers=X-Remote-User", "--requestheader-group-headers=X-Remote-Group", "--requestheader-extra-headers-prefix=X-Remote-Extra-",
		"--proxy-client-cert-file="+pki("front-proxy-client.crt"), "--proxy-client-key-file="+pki("front-proxy-client.key"),
		// Service addresses exist on nodes only; endpoints are reachable.
		"--enable-aggregator-routing=true",
		"--audit-policy-file="+policy, "--audit-log-path="+c.auditLog(), "--audit-log-mode=blocking",
		"--shutdown-delay-duration=0s",
	), c.options.APIServerArgs...)...)

	c.manager = program("kube-controller-manager", filepath.Join(c.tools, "kube-controller-manager"), append(c.featureGates(
		"--kubeconfig="+manager, "--authentication-kubeconfig="+manager, "--authorization-kubeconfig="+manager,
		"--bind-address="+local, "--leader-elect=false", "--use-service-account-credentials=true",
		"--service-account-private-key-file="+pki("service-account.key"), "--root-ca-file="+pki("ca.crt"),
		"--cluster-signing-cert-file="+pki("ca.crt"), "--cluster-signing-key-file="+pki("ca.key"),
		"--cert-dir="+filepath.Join(c.dir, "controller-manager"),
	), c.options.ControllerManagerArgs...)...)

	c.sched = program("kube-scheduler", filepath.Join(c.tools, "kube-scheduler"), c.featureGates(
		"--kubeconfig="+scheduler, "--authentication-kubeconfig="+scheduler, "--authorization-kubeconfig="+scheduler,
		"--bind-address="+local, "--leader-elect=false", "--cert-dir="+filepath.Join(c.dir, "scheduler"))...)
	return nil
}

func (c *Cluster) featureGates(args ...string) []string {
	var gates []string
	for _, name := range slices.Sorted(maps.Keys(c.options.FeatureGates)) {
		gates = append(gates, fmt.Sprintf("%s=%t", name, c.options.FeatureGates[name]))
	}
	if len(gates) > 0 {
		args = append(args, "--feature-gates="+strings.Join(gates, ","))
	}
	return args
}

// StartAPIServer starts the API server, waits until it is ready, and starts
// what stands beside it.
func (c *Cluster) StartAPIServer(ctx context.Context) error {
	if err := c.api.start(); err != nil {
		return err
	}
	if err := c.WaitFor(ctx, "the API server to be ready", apiServerTimeout, func(ctx context.Context) (bool, error) {
		if err := c.etcd.exited(); err != nil {
			return false, err
		}
		if err := c.api.exited(); err != nil {
			return false, err
		}
		return c.ready(ctx), nil
	}); err != nil {
		return err
	}
	return errors.Join(c.manager.start(), c.sched.start())
}

// StopAPIServer ends the API server at once, as when its machine fails; an
// orderly end would wait a minute for watches. The controller manager and the
// scheduler, which k3s runs in the same process, go with it: left alone they
// would sleep for half a minute after it is back. Kubelets, pods and etcd run
// on.
func (c *Cluster) StopAPIServer(context.Context) error {
	c.api.kill()
	c.manager.kill()
	c.sched.kill()
	return nil
}

// ready asks /readyz.
func (c *Cluster) ready(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	var status int
	c.client.Discovery().RESTClient().Get().AbsPath("/readyz").Do(ctx).StatusCode(&status)
	return status == http.StatusOK
}
