package nodeconfig

import (
	"slices"
	"strconv"
	"strings"
)

// k3sOwned are the keys of k3s's configuration that bootstrap writes or that
// would break what it promises, with the reason and what to do.
var k3sOwned = map[string]string{ //nolint:gosec // names of settings, not their values
	"token":                             "credentials of the cluster are made and kept in spec.cluster.store",
	"token-file":                        "bootstrap writes the token's file from spec.cluster.store",
	"agent-token":                       "credentials of the cluster are made and kept in spec.cluster.store",
	"agent-token-file":                  "bootstrap writes the token's file from spec.cluster.store",
	"cluster-secret":                    "credentials of the cluster are made and kept in spec.cluster.store",
	"vpn-auth":                          "it is a secret; use vpn-auth-file with a file that is on the machine",
	"server":                            "servers are found through spec.cluster.store; a fixed address is spec.cluster.server",
	"cluster-init":                      "the first server is elected; a second founder would split the cluster",
	"cluster-reset":                     "a cluster is founded anew with spec.cluster.restore",
	"cluster-reset-restore-path":        "a cluster is founded anew with spec.cluster.restore",
	"datastore-endpoint":                "servers keep their state in embedded etcd",
	"datastore-cafile":                  "servers keep their state in embedded etcd",
	"datastore-certfile":                "servers keep their state in embedded etcd",
	"datastore-keyfile":                 "servers keep their state in embedded etcd",
	"disable-etcd":                      "servers keep their state in embedded etcd",
	"disable-apiserver":                 "every server runs the whole control plane",
	"disable-controller-manager":        "every server runs the whole control plane",
	"disable-scheduler":                 "every server runs the whole control plane",
	"disable-agent":                     "a machine is proven by a WebAssembly module that ran on it",
	"node-name":                         "a node's name is its instance ID",
	"with-node-id":                      "a node's name is its instance ID",
	"node-label":                        "use spec.node.labels",
	"node-taint":                        "use spec.node.taints",
	"tls-san":                           "use spec.cluster.tlsSANs",
	"data-dir":                          "files are where bootstrap installs and removes them",
	"config":                            "files are where bootstrap installs and removes them",
	"private-registry":                  "use spec.registries",
	"system-default-registry":           "use spec.registries.systemDefault",
	"image-credential-provider-bin-dir": "use spec.registries.ecr",
	"image-credential-provider-config":  "use spec.registries.ecr",
	"flannel-backend":                   "use spec.network.flannelBackend",
	"no-flannel":                        "use spec.network.cni",
	"cluster-cidr":                      "use spec.network.clusterCIDR",
	"service-cidr":                      "use spec.network.serviceCIDR",
	"etcd-disable-snapshots":            "use spec.cluster.snapshots",
	"etcd-snapshot-schedule-cron":       "use spec.cluster.snapshots.schedule",
	"etcd-snapshot-retention":           "use spec.cluster.snapshots.retention",
	"etcd-s3":                           "use spec.cluster.snapshots.bucket",
	"etcd-s3-bucket":                    "use spec.cluster.snapshots.bucket",
	"etcd-s3-folder":                    "use spec.cluster.snapshots.bucket, s3://BUCKET/FOLDER",
	"etcd-s3-region":                    "use spec.cluster.snapshots.region",
	"etcd-s3-access-key":                "snapshots are written with the instance's role",
	"etcd-s3-secret-key":                "snapshots are written with the instance's role",
	"etcd-s3-session-token":             "snapshots are written with the instance's role",
	"docker":                            "WebAssembly runtimes need k3s's containerd",
	"container-runtime-endpoint":        "WebAssembly runtimes need k3s's containerd",
	"image-service-endpoint":            "WebAssembly runtimes need k3s's containerd",
	"rootless":                          "bootstrap runs k3s as root",
	"https-listen-port":                 "nodes join at port 6443 of the servers",
	"supervisor-port":                   "nodes join at port 6443 of the servers",
	"apiserver-port":                    "nodes join at port 6443 of the servers",
	"apiserver-bind-address":            "nodes join at port 6443 of the servers",
	"disable-selinux":                   "k3s lost it in 1.26; SELinux is off unless selinux is true",
	"no-deploy":                         "k3s lost it in 1.26; use disable",
	"multi-cluster-cidr":                "k3s lost it in 1.29",
	"kube-controller-arg":               "it is an old name; use kube-controller-manager-arg",
	"kube-cloud-controller-arg":         "it is an old name; use kube-cloud-controller-manager-arg",
}

// k3sMinor is the minor version of k3s, 1.36, whose keys these are. A later one
// may have others.
const k3sMinor = 36

// k3sOnlyAgentKeys are those that only agents take; a server would ignore them.
var k3sOnlyAgentKeys = []string{"disable-apiserver-lb"}

// k3sAgentKeys are those that both servers and agents take.
var k3sAgentKeys = []string{
	"debug", "v", "vmodule", "log", "alsologtostderr",
	"selinux", "lb-server-port", "protect-kernel-defaults", "pause-image", "default-runtime",
	"snapshotter", "airgap-extra-registry", "disable-default-registry-endpoint", "nonroot-devices",
	"node-ip", "bind-address", "node-external-ip", "node-internal-dns", "node-external-dns", "resolv-conf",
	"flannel-iface", "flannel-conf", "flannel-cni-conf", "vpn-auth-file",
	"kubelet-arg", "kube-proxy-arg", "enable-pprof", "prefer-bundled-bin",
}

// k3sServerKeys are those that only servers take; an agent would not start.
var k3sServerKeys = []string{
	"advertise-address", "advertise-port", "tls-san-security",
	"service-node-port-range", "cluster-dns", "cluster-domain", "flannel-ipv6-masq", "flannel-external-ip",
	"egress-selector-mode", "servicelb-namespace", "write-kubeconfig", "write-kubeconfig-mode", "write-kubeconfig-group",
	"helm-job-image", "kube-apiserver-arg", "etcd-arg", "kube-controller-manager-arg", "kube-scheduler-arg",
	"kube-cloud-controller-manager-arg", "kine-tls", "etcd-expose-metrics", "etcd-snapshot-name", "etcd-snapshot-dir",
	"etcd-snapshot-compress", "etcd-snapshot-reconcile-interval", "etcd-s3-endpoint", "etcd-s3-endpoint-ca",
	"etcd-s3-skip-ssl-verify", "etcd-s3-insecure", "etcd-s3-timeout", "etcd-s3-proxy", "etcd-s3-config-secret",
	"etcd-s3-bucket-lookup-type", "etcd-s3-retention", "default-local-storage-path", "disable", "disable-cloud-controller",
	"disable-kube-proxy", "disable-network-policy", "disable-helm-controller", "embedded-registry",
	"supervisor-metrics", "secrets-encryption", "secrets-encryption-provider",
}

// kubeletOwned are kubelet's flags that bootstrap sets through k3s.
var kubeletOwned = map[string]string{ //nolint:gosec // names of settings, not their values
	"provider-id":                       "bootstrap sets it from instance metadata",
	"hostname-override":                 "a node's name is its instance ID",
	"node-labels":                       "use spec.node.labels",
	"register-with-taints":              "use spec.node.taints",
	"image-credential-provider-bin-dir": "use spec.registries.ecr",
	"image-credential-provider-config":  "use spec.registries.ecr",
	"container-runtime-endpoint":        "WebAssembly runtimes need k3s's containerd",
	"kubeconfig":                        "k3s writes it",
	"root-dir":                          "files are where bootstrap installs and removes them",
}

// k3sConfig checks the keys that are handed on to k3s.
func (v *validator) k3sConfig() {
	const path = "spec.k3s.config"
	settings := v.tree.at("spec", "k3s", "config")
	if settings == nil {
		return
	}
	known := slices.Concat(k3sAgentKeys, k3sServerKeys, k3sOnlyAgentKeys)
	near := slices.Concat(known, keysOf(k3sOwned))
	for _, f := range settings.fields {
		if v.ps.full() {
			return
		}
		at := joinKey(path, f.key)
		switch reason := k3sOwned[strings.TrimSuffix(f.key, "+")]; {
		case secretKey(f.key) && k3sOwned[f.key] == "":
			continue // reported, if there is a value
		case reason != "":
			v.ps.addf(f.origin, at, "is not to be set here: %s", reason)
		case strings.HasSuffix(f.key, "+"):
			v.ps.addf(f.origin, at, "write the key without the +; lists are added to bootstrap's own")
		case strings.HasPrefix(f.key, "-"):
			v.ps.addf(f.origin, at, "write the key without dashes in front, as in k3s's config.yaml")
		case v.config.Spec.Role == roleAgent && slices.Contains(k3sServerKeys, f.key):
			v.ps.addf(f.origin, at, "only servers take this key; an agent would not start")
		case v.config.Spec.Role == roleServer && slices.Contains(k3sOnlyAgentKeys, f.key):
			v.ps.addf(f.origin, at, "only agents take this key; a server would ignore it")
		case !slices.Contains(known, f.key):
			if best := nearest(f.key, near); best != "" {
				v.ps.addf(f.origin, at, "k3s has no such key; did you mean %s?", best)
			} else if !k3sKeySyntax.MatchString(f.key) {
				v.ps.addf(f.origin, at, "is not the form of k3s's keys: small letters, digits and dashes")
			} else if minor := k3sMinorOf(v.config.Spec.K3s.Version); minor != 0 && minor <= k3sMinor {
				// A server would ignore it, an agent would not start. k3s gains keys
				// with its versions, and the version may be the manifest's.
				v.ps.addf(f.origin, at, "k3s 1.%d has no such key; remove it", minor)
			}
		}
		if f.value.kind == mapping {
			v.ps.addf(f.value.origin, at, "must be text, a number, true, false, or a list, not a map")
		}
		if f.value.kind == scalar && f.value.value == nil {
			v.ps.addf(f.value.origin, at, "has no value; write one or remove the line")
		}
		if f.key == "kubelet-arg" {
			v.kubeletArgs(f.value, at)
		}
	}
}

// k3sMinorOf is the minor version of a release of k3s 1; 0 where it is none.
func k3sMinorOf(version string) int {
	rest, ok := strings.CutPrefix(version, "v1.")
	minor, _, _ := strings.Cut(rest, ".")
	n, err := strconv.Atoi(minor)
	if !ok || err != nil {
		return 0
	}
	return n
}

func (v *validator) kubeletArgs(n *node, path string) {
	args := n.items
	if n.kind == scalar {
		args = []*node{n}
	}
	for i, arg := range args {
		name, _, _ := strings.Cut(strings.TrimLeft(arg.text(), "-"), "=")
		if reason := kubeletOwned[name]; reason != "" {
			v.ps.addf(arg.origin, joinIndex(path, i), "kubelet's %s is not to be set here: %s", name, reason)
		}
	}
}
