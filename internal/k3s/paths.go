package k3s

import (
	"path"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

// DefaultDataDir is where k3s keeps everything (pkg/datadir of k3s).
const DefaultDataDir = "/var/lib/rancher/k3s"

// Files outside the data directory, by their origin in k3s.
const (
	// Binary is where install.sh puts k3s (INSTALL_K3S_BIN_DIR).
	Binary = "/usr/local/bin/k3s"
	// ShimDir is on the PATH of systemd's services, which is where k3s looks for
	// shims when it starts, and containerd when it runs one
	// (pkg/agent/containerd/runtimes.go).
	ShimDir = "/usr/local/bin"
	// ConfigFile is read first (pkg/configfilearg/defaultparser.go). bootstrap
	// leaves it to others.
	ConfigFile = "/etc/rancher/k3s/config.yaml"
	// ConfigDir is read after ConfigFile, in the order of names.
	ConfigDir = ConfigFile + ".d"
	// HearthConfig is what bootstrap decides, and ExtraConfig what the
	// NodeConfig's k3s.config lays over it.
	HearthConfig = ConfigDir + "/10-hearth.yaml"
	ExtraConfig  = ConfigDir + "/90-hearth-extra.yaml"
	// RegistriesFile says where images come from (--private-registry of
	// pkg/cli/cmds/agent.go); read at start.
	RegistriesFile = "/etc/rancher/k3s/registries.yaml"
	// CredentialProviderDir and CredentialProviderConfig are given to kubelet if
	// both exist when k3s starts (--image-credential-provider-* of
	// pkg/cli/cmds/agent.go); "rancher", not "rancher/k3s".
	CredentialProviderDir    = "/var/lib/rancher/credentialprovider/bin"         //nolint:gosec // a path, and no credential
	CredentialProviderConfig = "/var/lib/rancher/credentialprovider/config.yaml" //nolint:gosec // a path, and no credential
	// AdminKubeconfig is written by servers (pkg/server/server.go).
	AdminKubeconfig = "/etc/rancher/k3s/k3s.yaml"
	// NodePassword proves a node's name to servers (pkg/agent/config/config.go).
	NodePassword = "/etc/rancher/node/password" //nolint:gosec // a path, and no credential
	// ContainerdSocket and RunDir: pkg/agent/config/config.go, containerd's state.
	ContainerdSocket = "/run/k3s/containerd/containerd.sock"
	RunDir           = "/run/k3s"
	// UnitDir is where install.sh puts units (INSTALL_K3S_SYSTEMD_DIR).
	UnitDir = "/etc/systemd/system"
	// SecretDir has the tokens. It is not k3s's, so that nothing of k3s's is
	// mistaken for it.
	SecretDir = "/var/lib/hearth/bootstrap/k3s" //nolint:gosec // a path, and no credential
)

// Paths are the files of one data directory.
type Paths struct {
	DataDir string
	// ServerTLS has the authorities; files placed there before the first start
	// are used (pkg/daemons/control/deps).
	ServerTLS string
	// Manifests are applied by servers, every 15 seconds (pkg/deploy).
	Manifests string
	// ServerToken is written by servers, in the secure format.
	ServerToken string
	// EtcdDir is etcd's data, Snapshots its backups (pkg/etcd).
	EtcdDir, Snapshots string
	// ResetFlag is what k3s leaves when it has put etcd back, so that it does not
	// do so twice (pkg/etcd). The others are bootstrap's: with Restoring etcd is
	// being put back and its data is not whole, Restored has the generation that
	// it was put back for.
	ResetFlag, Restoring, Restored string
	// Images are imported before kubelet starts (pkg/agent/containerd). With
	// ImagesCache beside them (an empty file is enough) archives that have not
	// changed are left out, from v1.33.1 on.
	Images, ImagesCache string
	// KubeletKubeconfig has the node's own identity (pkg/agent/config).
	KubeletKubeconfig string
	// ContainerdConfig is rendered at every start, ContainerdCertsDir with it.
	ContainerdConfig, ContainerdCertsDir string
	// ContainerdLog is containerd's.
	ContainerdLog string
	// Marker is bootstrap's: which generation of the cluster the data is of. It
	// lies within the data, so that it goes with it.
	Marker string
	// CNIManifest is where the manifest of a CNI goes that is not k3s's.
	CNIManifest string
	// TokenFile and AgentTokenFile are bootstrap's.
	TokenFile, AgentTokenFile string
}

// DefaultPaths are those of the default data directory.
func DefaultPaths() Paths { return NewPaths(DefaultDataDir) }

// NewPaths are those of a data directory.
func NewPaths(dataDir string) Paths {
	at := func(elem ...string) string { return path.Join(append([]string{dataDir}, elem...)...) }
	return Paths{
		DataDir: dataDir, ServerTLS: at("server/tls"), Manifests: at("server/manifests"), ServerToken: at("server/token"),
		EtcdDir: at("server/db/etcd"), Snapshots: at("server/db/snapshots"),
		ResetFlag: at("server/db/reset-flag"), Restoring: at("server/db/hearth-restoring"), Restored: at("server/db/hearth-restored"), Images: at("agent/images"), ImagesCache: at("agent/images/.cache.json"),
		KubeletKubeconfig: at("agent/kubelet.kubeconfig"), ContainerdConfig: at("agent/etc/containerd/config.toml"),
		ContainerdCertsDir: at("agent/etc/containerd/certs.d"), ContainerdLog: at("agent/containerd/containerd.log"),
		Marker: at("hearth-generation.json"), CNIManifest: at("server/manifests/hearth-cni.yaml"),
		TokenFile: SecretDir + "/token", AgentTokenFile: SecretDir + "/agent-token",
	}
}

// Unit is the name of a role's service, as install.sh names it.
func Unit(role v1alpha1.NodeRole) string {
	if role == v1alpha1.RoleServer {
		return "k3s.service"
	}
	return "k3s-agent.service"
}
