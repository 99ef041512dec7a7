package v1alpha1

import (
	"fmt"
	"time"
)

// KindNodeConfig is the kind of the document that tells `bootstrap` what a
// machine is to become.
const KindNodeConfig = "NodeConfig"

// NodeConfig tells `bootstrap` what a machine is to become. Documents of
// several sources are laid over each other, later ones win: the profile of
// the pool, /etc/hearth/*.yaml, user-data, instance tags. Maps are merged key
// by key and taints by key and effect; everything else, lists too, is replaced.
//
// Anyone on the instance can read user-data and tags, so no field holds a
// secret: credentials come from the instance's role.
type NodeConfig struct {
	// APIVersion is hearth.sh/v1alpha1.
	APIVersion string `json:"apiVersion"`
	// Kind is NodeConfig.
	Kind string `json:"kind"`
	// Spec is the wish itself; a source says as much of it as it likes.
	Spec NodeConfigSpec `json:"spec"`
}

// NodeConfigSpec is the wish itself.
type NodeConfigSpec struct {
	// Role is what k3s runs as: server (control plane and etcd) or agent.
	// Default: server in the pool control-plane, agent in all others.
	Role NodeRole `json:"role,omitempty"`
	// Pool is the profile the machine follows: control-plane, observability,
	// wasm, build or backend. It decides about role, labels, taints and shims,
	// which the fields below add to or replace. Default: wasm.
	Pool NodePool `json:"pool,omitempty"`
	// Node is what the machine is called and marked with in Kubernetes.
	Node NodeRegistration `json:"node,omitzero"`
	// Cluster is what the machine founds or joins.
	Cluster ClusterConfig `json:"cluster,omitzero"`
	// K3s is the version to run and settings of its own.
	K3s K3sConfig `json:"k3s,omitzero"`
	// Artifacts is where files come from, and the digests they must have.
	Artifacts ArtifactsConfig `json:"artifacts,omitzero"`
	// Shims are the WebAssembly runtimes of containerd to install, by their
	// handler's name. Default: spin on the pools wasm and backend, none elsewhere.
	Shims []ShimConfig `json:"shims,omitempty"`
	// Network says who connects pods.
	Network NetworkConfig `json:"network,omitzero"`
	// Registries says where images come from.
	Registries RegistriesConfig `json:"registries,omitzero"`
	// Addons are installed by the first server as k3s manifests.
	Addons AddonsConfig `json:"addons,omitzero"`
	// Host is what the machine must offer and how it is prepared.
	Host HostConfig `json:"host,omitzero"`
	// Signal says who else hears how it went.
	Signal SignalConfig `json:"signal,omitzero"`
	// Timeouts bound the phases.
	Timeouts TimeoutsConfig `json:"timeouts,omitzero"`
}

// NodeRole is what k3s runs as.
type NodeRole string

// Roles.
const (
	RoleServer NodeRole = "server"
	RoleAgent  NodeRole = "agent"
)

// NodePool is a built-in profile.
type NodePool string

// Pools.
const (
	PoolControlPlane  NodePool = "control-plane"
	PoolObservability NodePool = "observability"
	PoolWasm          NodePool = "wasm"
	PoolBuild         NodePool = "build"
	PoolBackend       NodePool = "backend"
)

// NodeRegistration is what the machine is called and marked with. Its name is
// always the instance ID.
type NodeRegistration struct {
	// Labels are added to those of the pool's profile. Keys under
	// kubernetes.io and k8s.io are refused but for those that a kubelet may set
	// itself (kubelet.kubernetes.io/..., node.kubernetes.io/...), and so is what
	// Hearth sets: hearth.sh/..., topology.kubernetes.io/zone and so on.
	Labels map[string]string `json:"labels,omitempty"`
	// Taints are added to those of the pool's profile and of earlier sources.
	// One with the same key and effect replaces the earlier one. With the
	// hearth addon and a shim, the startup taint hearth.sh/not-ready:NoSchedule
	// is added, which the node agent removes after its first proof.
	Taints []NodeTaint `json:"taints,omitempty"`
	// AllowSpotServer lets a server run on a Spot instance, which can take a
	// member of etcd away at two minutes' notice. Default: false.
	AllowSpotServer bool `json:"allowSpotServer,omitempty"`
}

// NodeTaint keeps pods away that do not tolerate it.
type NodeTaint struct {
	// Key is the taint's qualified name.
	Key string `json:"key"`
	// Value is optional, with the syntax of a label's value.
	Value string `json:"value,omitempty"`
	// Effect is NoSchedule, PreferNoSchedule or NoExecute.
	Effect string `json:"effect"`
}

// ClusterConfig is what the machine founds or joins.
type ClusterConfig struct {
	// Name tells clusters apart in messages; 1 to 63 characters like a DNS
	// label. Default: hearth.
	Name string `json:"name,omitempty"`
	// Store is where the first server is elected and credentials are kept:
	// s3://BUCKET/PREFIX or ssm:///PATH. Required in one of the sources.
	Store string `json:"store,omitempty"`
	// Region is the store's region. Default: the instance's.
	Region string `json:"region,omitempty"`
	// KMSKey encrypts the credentials in the store: the ID or ARN of a key of
	// AWS KMS, or alias/NAME. The same on all nodes; their roles need
	// kms:Decrypt with it, servers also kms:GenerateDataKey (S3) or kms:Encrypt
	// (SSM). Default: the bucket's encryption, or alias/aws/ssm.
	KMSKey string `json:"kmsKey,omitempty"`
	// Server is a fixed address of the servers, such as a load balancer's,
	// https://HOST:6443. Default: the addresses servers publish in the store.
	Server string `json:"server,omitempty"`
	// TLSSANs are further DNS names and IP addresses in the servers'
	// certificate, at most 64. The host of Server is one of them anyway.
	TLSSANs []string `json:"tlsSANs,omitempty"`
	// Lease is how long a founding server may be silent before another one
	// takes over, 15s to 10m. Default: 60s.
	Lease Duration `json:"lease,omitempty"`
	// Snapshots are etcd's backups.
	Snapshots SnapshotsConfig `json:"snapshots,omitzero"`
	// Restore founds the next generation of the cluster from a snapshot.
	Restore *RestoreConfig `json:"restore,omitempty"`
}

// SnapshotsConfig is etcd's backup.
type SnapshotsConfig struct {
	// Bucket is the S3 bucket that gets them, s3://BUCKET or
	// s3://BUCKET/PREFIX. Default: none, snapshots stay on the servers.
	Bucket string `json:"bucket,omitempty"`
	// Region is the bucket's. Default: the instance's.
	Region string `json:"region,omitempty"`
	// Schedule is when, in cron's form of five fields or @hourly, @daily and so
	// on, in the machine's time zone. Default: 0 */6 * * *.
	Schedule string `json:"schedule,omitempty"`
	// Retention is how many are kept, 1 to 1000: on each server its own, in the
	// bucket those of all servers together. Default: 28.
	Retention int `json:"retention,omitempty"`
}

// RestoreConfig founds a cluster anew from a snapshot. It is done once: as
// soon as a later generation than Generation exists it is ignored, so it may
// stay in the configuration.
type RestoreConfig struct {
	// Generation is the one whose servers are lost (`bootstrap status` and the
	// store show it).
	Generation int `json:"generation"`
	// Snapshot is the snapshot's name in the bucket, or an absolute path.
	Snapshot string `json:"snapshot"`
}

// K3sConfig is k3s's version and settings.
type K3sConfig struct {
	// Version is the release, such as v1.36.2+k3s1. Default: the version of
	// the artifact k3s.
	Version string `json:"version,omitempty"`
	// Config is laid over what bootstrap writes: keys of k3s's config.yaml,
	// without "--". Keys bootstrap must own (token, server, cluster-init,
	// node-name and so on) are refused, and keys of servers on an agent.
	Config map[string]any `json:"config,omitempty"`
}

// ArtifactsConfig says where files come from.
type ArtifactsConfig struct {
	// Manifest is the URL of the signed list of artifacts with their digests:
	// https://…, s3://BUCKET/KEY or file:///PATH. The signature is at the same
	// URL with ".sig" appended. Default: none, all artifacts are in Files.
	Manifest string `json:"manifest,omitempty"`
	// PublicKeys are the keys one of which must have signed the manifest:
	// "ed25519:" and the key's 32 bytes in base64. Required with a manifest.
	PublicKeys []string `json:"publicKeys,omitempty"`
	// Mirrors are asked before an artifact's own URLs, in this order:
	// https://…, s3://BUCKET/PREFIX or file:///DIRECTORY, to which the last
	// element of the artifact's first URL is appended.
	Mirrors []string `json:"mirrors,omitempty"`
	// Files are artifacts named here, with their digest; one with the same
	// name replaces the manifest's.
	Files []ArtifactFile `json:"files,omitempty"`
}

// ArtifactFile is one file to install. Names that bootstrap knows: k3s,
// k3s-airgap-images, containerd-shim-spin-v2 (and other shims by their binary's
// name), ecr-credential-provider, nodeagent, hearth-image (what the pods of our
// chart run, an archive as `make image` writes it), cni-manifest.
type ArtifactFile struct {
	// Name says what it is.
	Name string `json:"name"`
	// Version is informative, for messages and skew checks.
	Version string `json:"version,omitempty"`
	// Arch is arm64 or amd64; empty means any.
	Arch string `json:"arch,omitempty"`
	// URLs are tried in order, at most 16: https://…, s3://BUCKET/KEY or file:///PATH.
	URLs []string `json:"urls"`
	// SHA256 is the digest of what is downloaded, in hex.
	SHA256 string `json:"sha256"`
	// Size is the download's, in bytes; 0 means not known.
	Size int64 `json:"size,omitempty"`
	// Format is what the download is: raw, gzip, zstd, tar, tar+gzip or
	// tar+zstd. Default: raw.
	Format string `json:"format,omitempty"`
	// Member is the path of the file within a tar archive, which needs it.
	Member string `json:"member,omitempty"`
	// InstalledSHA256 is the digest, in hex, of what is installed. Every format
	// but raw needs it: it is how a file that is already there is recognised.
	InstalledSHA256 string `json:"installedSHA256,omitempty"`
	// Path is where to install it, absolute. Default: decided by the name.
	Path string `json:"path,omitempty"`
	// Mode is the file's mode in octal, such as "0755". Default: decided by
	// the name.
	Mode string `json:"mode,omitempty"`
}

// ShimConfig is one WebAssembly runtime.
type ShimConfig struct {
	// Name is the handler's: spin, wasmtime, wasmedge, wasmer or another that
	// k3s finds by its binary in the PATH.
	Name string `json:"name"`
	// Artifact is the name of the file under artifacts. Default: the shim's
	// binary, such as containerd-shim-spin-v2.
	Artifact string `json:"artifact,omitempty"`
	// Required makes a machine fail whose proof of this runtime fails.
	// Default: true.
	Required *bool `json:"required,omitempty"`
}

// NetworkConfig says who connects pods.
type NetworkConfig struct {
	// CNI is flannel (k3s's own), or calico, cilium or custom, whose manifest
	// is the artifact cni-manifest. Default: flannel.
	CNI string `json:"cni,omitempty"`
	// FlannelBackend is vxlan, host-gw or wireguard-native, or none where the
	// CNI is not flannel. Default: vxlan with flannel, else none.
	FlannelBackend string `json:"flannelBackend,omitempty"`
	// ClusterCIDR is the pods' addresses, one CIDR or one of each family
	// separated by a comma; the same on all servers. Default: 10.42.0.0/16.
	ClusterCIDR string `json:"clusterCIDR,omitempty"`
	// ServiceCIDR is the services' addresses, in the same form and with the
	// same families. Default: 10.43.0.0/16.
	ServiceCIDR string `json:"serviceCIDR,omitempty"`
}

// RegistriesConfig says where images come from.
type RegistriesConfig struct {
	// SystemDefault is put before the names of k3s's own images: a registry's
	// host, with a path if need be. Servers hand theirs to agents, whose k3s has
	// no such setting; an agent's own changes nothing and only says that the
	// servers have one. Default: none. Something must keep a fresh cluster from
	// Docker Hub's rate limits: this, a mirror of docker.io, or the artifact
	// k3s-airgap-images.
	SystemDefault string `json:"systemDefault,omitempty"`
	// Mirrors maps a registry's host (or "*" for all others) to the endpoints
	// asked instead.
	Mirrors map[string]RegistryMirror `json:"mirrors,omitempty"`
	// CAFiles maps a registry to a file of certificates that are already on
	// the machine.
	CAFiles map[string]string `json:"caFiles,omitempty"`
	// ECR lets kubelet pull from ECR with the instance's role. Default: true if
	// the artifact ecr-credential-provider is known, which a manifest decides.
	ECR *bool `json:"ecr,omitempty"`
}

// RegistryMirror is a registry's replacement.
type RegistryMirror struct {
	// Endpoints are asked in order: https://HOST or http://HOST, with a path if
	// need be.
	Endpoints []string `json:"endpoints"`
	// Rewrite maps regular expressions on repository names to what replaces them.
	Rewrite map[string]string `json:"rewrite,omitempty"`
}

// AddonsConfig are installed by servers.
type AddonsConfig struct {
	// Hearth is our own chart: node agent, engine. Servers install it, with what
	// they say of it; on an agent enabled decides whether it registers with the
	// taint that only the node agent removes. Its image is the artifact
	// hearth-image, or is pulled from values.image.repository. Default: enabled.
	Hearth AddonConfig `json:"hearth,omitzero"`
	// SpinKube is the SpinKube operator. Default: disabled.
	SpinKube AddonConfig `json:"spinkube,omitzero"`
	// CertManager is what SpinKube's webhooks need. Default: like SpinKube.
	CertManager AddonConfig `json:"certManager,omitzero"`
}

// AddonConfig is one HelmChart.
type AddonConfig struct {
	// Enabled turns it on or off.
	Enabled *bool `json:"enabled,omitempty"`
	// Chart is the chart's reference, such as oci://HOST/NAME, or the https
	// URL of its archive. Default: the addon's own.
	Chart string `json:"chart,omitempty"`
	// Version is the chart's. Default: the one this version of bootstrap knows.
	Version string `json:"version,omitempty"`
	// Values are the chart's values, laid over bootstrap's.
	Values map[string]any `json:"values,omitempty"`
}

// HostConfig is what the machine must offer and how it is prepared.
type HostConfig struct {
	// MinDiskFree is how much of /var/lib/rancher's file system must be free,
	// such as 8Gi. Default: 4Gi.
	MinDiskFree string `json:"minDiskFree,omitempty"`
	// MaxClockOffset is how wrong the clock may be, 1s to 5m. Default: 30s.
	MaxClockOffset Duration `json:"maxClockOffset,omitempty"`
	// Sysctls are set beside bootstrap's own, such as vm.max_map_count: "262144".
	Sysctls map[string]string `json:"sysctls,omitempty"`
	// Modules are loaded beside bootstrap's own.
	Modules []string `json:"modules,omitempty"`
}

// SignalConfig says who else hears how it went.
type SignalConfig struct {
	// LifecycleHook is the Auto Scaling lifecycle hook that waits for this
	// machine. Default: none.
	LifecycleHook string `json:"lifecycleHook,omitempty"`
	// AutoScalingGroup is the hook's group. Default: the tag
	// aws:autoscaling:groupName.
	AutoScalingGroup string `json:"autoScalingGroup,omitempty"`
	// CloudFormation names the stack and resource to signal.
	CloudFormation *CloudFormationSignal `json:"cloudFormation,omitempty"`
}

// CloudFormationSignal names who waits.
type CloudFormationSignal struct {
	// Stack is the stack's name or ARN.
	Stack string `json:"stack"`
	// Resource is the resource's logical ID.
	Resource string `json:"resource"`
}

// TimeoutsConfig bounds the phases. Each is between 10s and 24h, and none is
// longer than Total.
type TimeoutsConfig struct {
	// Total bounds a run, and how long runs may fail together before a machine
	// that never was a node is given up. Default: 30m.
	Total Duration `json:"total,omitempty"`
	// Fetch bounds all downloads. Default: 10m.
	Fetch Duration `json:"fetch,omitempty"`
	// Join bounds electing or finding a cluster that can be joined. Default: 15m.
	Join Duration `json:"join,omitempty"`
	// Ready bounds the wait from the start of k3s to the node's Ready.
	// Default: 5m.
	Ready Duration `json:"ready,omitempty"`
	// Prove bounds the proof that WebAssembly runs. Default: 2m.
	Prove Duration `json:"prove,omitempty"`
}

// Duration is a time span in Go's form: "90s", "5m".
type Duration string

// Span returns the time span, or an error that names what was written.
func (d Duration) Span() (time.Duration, error) {
	span, err := time.ParseDuration(string(d))
	if err != nil {
		return 0, fmt.Errorf("%.40q is no time span: write it like 90s or 5m", string(d))
	}
	return span, nil
}
