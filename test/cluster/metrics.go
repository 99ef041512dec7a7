package cluster

import (
	"context"
	"encoding/base64"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"
)

const (
	// metricsUser is the account of metrics-server's own manifest.
	metricsUser = "system:serviceaccount:kube-system:metrics-server"
	metricsPort = 4443
	// metricsTimeout is for the API server to hand requests on: it looks at an
	// API service that did not answer once in half a minute.
	metricsTimeout = 2 * time.Minute
)

// metricsManifest has the rights and the API service of metrics-server's own
// manifest (Apache-2.0). Its Service has no pods: what runs beside the control
// plane is the one endpoint. It is a format of the authority, the address and
// the port.
const metricsManifest = `apiVersion: v1
kind: ServiceAccount
metadata: {name: metrics-server, namespace: kube-system}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: "system:metrics-server"}
rules:
- {apiGroups: [""], resources: [nodes/metrics], verbs: [get]}
- {apiGroups: [""], resources: [pods, nodes], verbs: [get, list, watch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: "system:metrics-server"}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: "system:metrics-server"}
subjects: [{kind: ServiceAccount, name: metrics-server, namespace: kube-system}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: "metrics-server:system:auth-delegator"}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: "system:auth-delegator"}
subjects: [{kind: ServiceAccount, name: metrics-server, namespace: kube-system}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: metrics-server-auth-reader, namespace: kube-system}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: extension-apiserver-authentication-reader}
subjects: [{kind: ServiceAccount, name: metrics-server, namespace: kube-system}]
---
apiVersion: v1
kind: Service
metadata: {name: metrics-server, namespace: kube-system}
spec:
  ports: [{name: https, port: 443, protocol: TCP, targetPort: %[3]d}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: metrics-server, namespace: kube-system, labels: {kubernetes.io/service-name: metrics-server}}
addressType: IPv4
endpoints: [{addresses: [%[2]q], conditions: {ready: true}}]
ports: [{name: https, port: %[3]d, protocol: TCP}]
---
apiVersion: apiregistration.k8s.io/v1
kind: APIService
metadata: {name: v1beta1.metrics.k8s.io}
spec:
  service: {name: metrics-server, namespace: kube-system}
  group: metrics.k8s.io
  version: v1beta1
  caBundle: %[1]s
  groupPriorityMinimum: 100
  versionPriority: 100
`

// MetricsServer runs metrics-server, with which k3s comes: it asks every
// kubelet each ten seconds what its pods use, and answers as metrics.k8s.io
// through the API server. It returns when that is served, at once where it was
// asked for before; what a pod uses is known after two of those askings. It
// ends with the cluster.
func (c *Cluster) MetricsServer(ctx context.Context) error {
	kubeconfig := filepath.Join(c.dir, "metrics-server.kubeconfig")
	pki := func(name string) string { return filepath.Join(c.pki, name) }
	d := &daemon{
		name: "metrics-server", log: filepath.Join(c.dir, "logs", "metrics-server.log"),
		argv: []string{
			filepath.Join(c.dir, "enter"), filepath.Join(c.tools, "metrics-server"),
			"--kubeconfig=" + kubeconfig, "--authentication-kubeconfig=" + kubeconfig, "--authorization-kubeconfig=" + kubeconfig,
			"--bind-address=" + c.HostIP(), "--secure-port=" + strconv.Itoa(metricsPort),
			"--tls-cert-file=" + pki("metrics-server.crt"), "--tls-private-key-file=" + pki("metrics-server.key"),
			"--kubelet-certificate-authority=" + pki("ca.crt"), "--kubelet-preferred-address-types=InternalIP",
			"--kubelet-use-node-status-port", "--kubelet-request-timeout=8s", "--metric-resolution=10s",
		},
	}
	c.mu.Lock()
	running := slices.ContainsFunc(c.others, func(o *daemon) bool { return o.name == d.name })
	if !running {
		c.others = append(c.others, d)
	}
	c.mu.Unlock()
	if running {
		return nil // one is enough for all tests of a package
	}
	if err := c.IssueKubeconfig(kubeconfig, metricsUser, "system:serviceaccounts", "system:serviceaccounts:kube-system"); err != nil {
		return err
	}
	if err := c.ca.issue("metrics-server", subject{name: "metrics-server", ips: []string{c.HostIP()}, dns: []string{"metrics-server.kube-system.svc"}}); err != nil {
		return err
	}
	authority, err := os.ReadFile(pki("ca.crt"))
	if err != nil {
		return err
	}
	manifest := fmt.Sprintf(metricsManifest, base64.StdEncoding.EncodeToString(authority), c.HostIP(), metricsPort)
	if _, err := c.ApplyManifest(ctx, []byte(manifest)); err != nil {
		return err
	}
	if err := d.start(); err != nil {
		return err
	}
	return c.WaitFor(ctx, "metrics-server to answer at "+net.JoinHostPort(c.HostIP(), strconv.Itoa(metricsPort))+" through the API server", metricsTimeout, func(ctx context.Context) (bool, error) {
		if err := d.exited(); err != nil {
			return false, err
		}
		var status int
		c.client.Discovery().RESTClient().Get().AbsPath("/apis/metrics.k8s.io/v1beta1/nodes").Do(ctx).StatusCode(&status)
		return status == http.StatusOK, nil
	})
}
