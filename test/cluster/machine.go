package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/pelletier/go-toml/v2"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	containerd "github.com/containerd/containerd/v2/client"

	"github.com/hearth-sh/hearth/test/process"
)

const (
	// holderTimeout is for making a node's namespaces and mounts.
	holderTimeout = 15 * time.Second
	// containerdTimeout is for containerd to answer on its socket.
	containerdTimeout = 30 * time.Second
	// containerdNamespace is where CRI keeps what it knows.
	containerdNamespace = "k8s.io"
	// pauseImage is the sandbox image of every node.
	pauseImage = "hearth.test/pause:1"
	// cniDir is where Debian's containernetworking-plugins are.
	cniDir = "/usr/lib/cni"
	// runtimeBinDir is, on a node, what stands first on containerd's PATH.
	runtimeBinDir = "/opt/hearth-test/bin"
)

// Node says what a node of the cluster is to be. Only Name is needed.
type Node struct {
	// Name is a DNS label, unique in the cluster.
	Name string
	// Labels are given at registration; NodeRestriction limits those under
	// kubernetes.io to the well-known ones.
	Labels map[string]string
	// Taints are there from the start.
	Taints []corev1.Taint
	// ProviderID becomes spec.providerID, like "aws:///eu-central-1a/i-0123456789abcdef0".
	ProviderID string
	// Runtimes are configured beside runc.
	Runtimes []Runtime
	// KubeletConfig overrides fields of the KubeletConfiguration (its JSON names).
	KubeletConfig map[string]any
	// KubeletArgs are appended to the kubelet's command line.
	KubeletArgs []string
}

// Runtime is a containerd runtime: a handler for RuntimeClasses and the shim
// behind it.
type Runtime struct {
	// Name is the handler, like "spin".
	Name string
	// Type is how containerd finds the shim: "io.containerd.spin.v2" is
	// containerd-shim-spin-v2 on its PATH.
	Type string
	// BinaryPath is the shim on this machine. It is copied to the node. Empty:
	// the shim gets onto the node otherwise, or stays missing.
	BinaryPath string
	// Options become the runtime's options table.
	Options map[string]any
	// Extra are further keys of the runtime's table, like sandboxer.
	Extra map[string]any
}

// Machine is a running node: processes in network, mount and host name
// namespaces of their own. /etc, /opt, /run, /var/lib and /var/log are the
// machine's own, so everything has the path it has on a real node
// (/run/containerd/containerd.sock, /var/lib/kubelet, /etc/containerd), for
// hostPath volumes too. /proc, /sys, process ids and /tmp are shared.
type Machine struct {
	// Name is the node's name.
	Name string
	// IP is its address, reachable from this machine and the other nodes.
	IP string
	// Dir holds the machine's files; see Path.
	Dir string
	// ContainerdSocket is the path of containerd's socket on this machine.
	ContainerdSocket string
	// ContainerdConfigDir is the machine's /etc/containerd: config.toml,
	// conf.d/*.toml (merged into it at start) and certs.d.
	ContainerdConfigDir string
	// RuntimeBinDir stands first on containerd's PATH: a shim that is put
	// there is found without a restart.
	RuntimeBinDir string
	// NetNS is the path of the network namespace.
	NetNS string
	// KubeletKubeconfig is the kubelet's own: user system:node:<name>.
	KubeletKubeconfig string

	spec       Node
	cluster    *Cluster
	launch     string // launcher script
	holder     *daemon
	containerd *daemon
	kubelet    *daemon
	proxy      *daemon
}

// Path returns where a file of the machine is found from outside: Path("/etc/hosts").
// It holds until the cluster is closed.
func (m *Machine) Path(inside string) string {
	return filepath.Join(fmt.Sprintf("/proc/%d/root", m.holder.pid()), inside)
}

// Command is a program that runs on the machine: in its namespaces and
// cgroups, found on the PATH that its daemons have. It ends with the cluster
// at the latest.
func (m *Machine) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, m.launch, append([]string{name}, args...)...)
	cmd.Env = append(os.Environ(), m.env()...)
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// Shell is a command line for a person that opens a shell on the machine.
func (m *Machine) Shell() string { return process.Quote(m.launch) + " sh" }

// InNetNS calls do on a thread that is in the machine's network namespace:
// connections that do itself opens are the machine's; goroutines that it
// starts are not, and neither are names resolved by Go's resolver.
func (m *Machine) InNetNS(do func() error) error { return process.InNetNS(m.NetNS, do) }

// env is what every process of the machine has beside this one's environment.
func (m *Machine) env() []string {
	return []string{
		"PATH=" + runtimeBinDir + ":" + m.Dir + "/tools:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		// What a developer's shell says of proxies must not reach a cluster.
		"HTTP_PROXY=", "HTTPS_PROXY=", "http_proxy=", "https_proxy=", "NO_PROXY=*",
	}
}

// StartContainerd starts containerd and waits until it answers.
func (m *Machine) StartContainerd(ctx context.Context) error {
	if err := m.containerd.start(); err != nil {
		return err
	}
	return m.cluster.WaitFor(ctx, "containerd of "+m.Name+" to answer", containerdTimeout, func(ctx context.Context) (bool, error) {
		if err := m.containerd.exited(); err != nil {
			return false, err
		}
		client, err := m.Containerd()
		if err != nil {
			return false, nil
		}
		defer client.Close()
		ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		serving, err := client.IsServing(ctx)
		return err == nil && serving, nil
	})
}

// StopContainerd stops containerd; containers run on under their shims.
func (m *Machine) StopContainerd(ctx context.Context) error { return m.containerd.stop(ctx) }

// RestartContainerd makes changes of its configuration take effect.
func (m *Machine) RestartContainerd(ctx context.Context) error {
	if err := m.StopContainerd(ctx); err != nil {
		return err
	}
	return m.StartContainerd(ctx)
}

// StartKubelet starts the kubelet, which like the node's other daemons is
// started again should it end by itself (ten times at most), and returns without waiting for it.
func (m *Machine) StartKubelet(_ context.Context) error { return m.kubelet.start() }

// StopKubelet stops the kubelet; pods run on.
func (m *Machine) StopKubelet(ctx context.Context) error { return m.kubelet.stop(ctx) }

// RestartKubelet stops the kubelet and starts it again.
func (m *Machine) RestartKubelet(ctx context.Context) error {
	if err := m.StopKubelet(ctx); err != nil {
		return err
	}
	return m.StartKubelet(ctx)
}

// Containerd returns a client whose default namespace is the one of CRI. The
// caller closes it.
func (m *Machine) Containerd() (*containerd.Client, error) {
	return containerd.New(m.ContainerdSocket, containerd.WithDefaultNamespace(containerdNamespace), containerd.WithTimeout(5*time.Second))
}

// prepare writes the machine's files. Nothing runs yet.
func (m *Machine) prepare() error {
	for _, dir := range []string{
		"tools", "logs", "run/containerd", "var/lib/kubelet", "var/lib/containerd", "var/lib/cni", "var/log/pods", "var/log/containers",
		"opt", runtimeBinDir, "etc/containerd/conf.d", "etc/containerd/certs.d", "etc/cni/net.d", "etc/kubernetes", "overlay/etc", "overlay/etc.work",
	} {
		if err := os.MkdirAll(filepath.Join(m.Dir, dir), 0o755); err != nil {
			return err
		}
	}
	for _, r := range m.spec.Runtimes {
		if r.BinaryPath == "" {
			continue
		}
		name, err := shimName(r.Type)
		if err != nil {
			return err
		}
		if err := copyFile(filepath.Join(m.RuntimeBinDir, name), r.BinaryPath); err != nil {
			return fmt.Errorf("installing the shim of runtime %s on %s: %w", r.Name, m.Name, err)
		}
	}
	kubernetes := filepath.Join(m.Dir, "etc/kubernetes")
	if err := m.cluster.ca.issue("kubelet-"+m.Name, subject{name: "system:node:" + m.Name, groups: []string{"system:nodes"}, dns: []string{m.Name}, ips: []string{m.IP}}); err != nil {
		return err
	}
	for from, to := range map[string]string{"kubelet-" + m.Name + ".crt": "kubelet.crt", "kubelet-" + m.Name + ".key": "kubelet.key", "ca.crt": "ca.crt"} {
		if err := copyFile(filepath.Join(kubernetes, to), filepath.Join(m.cluster.pki, from)); err != nil {
			return err
		}
	}
	server := m.cluster.server()
	if err := m.cluster.ca.kubeconfig(m.KubeletKubeconfig, server, subject{name: "system:node:" + m.Name, groups: []string{"system:nodes"}}); err != nil {
		return err
	}
	if err := m.cluster.ca.kubeconfig(filepath.Join(kubernetes, "kube-proxy.kubeconfig"), server, subject{name: "system:kube-proxy"}); err != nil {
		return err
	}

	config, err := toml.Marshal(m.containerdConfig())
	if err != nil {
		return err
	}
	kubelet, err := yaml.Marshal(m.kubeletConfig())
	if err != nil {
		return err
	}
	proxy, err := yaml.Marshal(m.proxyConfig())
	if err != nil {
		return err
	}
	for path, content := range map[string]string{
		"etc/containerd/config.toml":       string(config),
		"etc/cni/net.d/10-hearth.conflist": m.cniConfig(),
		"etc/kubernetes/kubelet.yaml":      string(kubelet),
		"etc/kubernetes/kube-proxy.yaml":   string(proxy),
		"etc/kubernetes/resolv.conf":       "# The cluster has no DNS.\n",
		"overlay/etc/hostname":             m.Name + "\n",
		"holder.sh":                        m.holderScript(),
	} {
		if err := os.WriteFile(filepath.Join(m.Dir, path), []byte(content), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// shimName is containerd's rule: the last two parts of the type.
func shimName(runtimeType string) (string, error) {
	parts := strings.Split(runtimeType, ".")
	if len(parts) < 3 {
		return "", fmt.Errorf("a runtime type looks like io.containerd.spin.v2, not %q", runtimeType)
	}
	return "containerd-shim-" + strings.Join(parts[len(parts)-2:], "-"), nil
}

// holderScript makes the machine's mounts in the namespaces it was started in
// and keeps them alive. Mounts of the machine are invisible outside and go
// away with its last process.
func (m *Machine) holderScript() string {
	return fmt.Sprintf(`set -eu
machine=%s
# Names of other namespaces are not this machine's, and would be held busy.
umount -R -l /run/netns 2>/dev/null || true
hostname %s
mount --bind %s "$machine/tools"
mount -t overlay overlay -o "lowerdir=/etc,upperdir=$machine/overlay/etc,workdir=$machine/overlay/etc.work" /etc
mkdir -p /etc/containerd /etc/cni /etc/kubernetes
for dir in /etc/containerd /etc/cni /etc/kubernetes /opt /var/lib /var/log /run; do
	mount --bind "$machine$dir" "$dir"
done
# Volumes with mount propagation need shared mounts.
mount --make-rshared /
echo 1 >/proc/sys/net/ipv4/ip_forward
echo 1 >"$machine/ready"
exec sleep infinity
`, process.Quote(m.Dir), process.Quote(m.Name), process.Quote(m.cluster.tools))
}

// hold makes the namespaces.
func (m *Machine) hold(ctx context.Context) error {
	if err := m.cluster.daemonCgroups(m.Name).Create(); err != nil {
		return err
	}
	into := filepath.Join(m.Dir, "hold")
	if err := launcher(into, m.cluster.daemonCgroups(m.Name),
		"nsenter", "--net="+m.NetNS, "unshare", "--mount", "--uts", "--propagation", "slave", "sh", filepath.Join(m.Dir, "holder.sh")); err != nil {
		return err
	}
	m.holder = &daemon{name: "namespaces of " + m.Name, log: m.logPath("holder"), argv: []string{into}}
	if err := m.holder.start(); err != nil {
		return err
	}
	err := m.cluster.WaitFor(ctx, "the namespaces of "+m.Name, holderTimeout, func(context.Context) (bool, error) {
		if err := m.holder.exited(); err != nil {
			return false, err
		}
		_, err := os.Stat(filepath.Join(m.Dir, "ready"))
		return err == nil, nil
	})
	if err != nil {
		return err
	}
	ns := fmt.Sprintf("/proc/%d/ns/", m.holder.pid())
	return launcher(m.launch, m.cluster.daemonCgroups(m.Name), "nsenter", "--net="+ns+"net", "--uts="+ns+"uts", "--mount="+ns+"mnt", "--")
}

func (m *Machine) logPath(name string) string { return filepath.Join(m.Dir, "logs", name+".log") }

func (m *Machine) daemon(name string, args ...string) *daemon {
	return &daemon{
		name: name + " of " + m.Name, log: m.logPath(name), env: m.env(), respawn: true,
		argv: append([]string{m.launch, filepath.Join(m.Dir, "tools", name)}, args...),
	}
}

// boot makes namespaces, starts containerd and gives it the sandbox image.
func (m *Machine) boot(ctx context.Context) error {
	if err := m.hold(ctx); err != nil {
		return err
	}
	m.containerd = m.daemon("containerd", "--config", "/etc/containerd/config.toml")
	args := []string{
		"--config=/etc/kubernetes/kubelet.yaml", "--kubeconfig=/etc/kubernetes/kubelet.kubeconfig",
		"--hostname-override=" + m.Name, "--node-ip=" + m.IP, "--v=2",
	}
	if len(m.spec.Labels) > 0 {
		var labels []string
		for key, value := range m.spec.Labels {
			labels = append(labels, key+"="+value)
		}
		args = append(args, "--node-labels="+strings.Join(labels, ","))
	}
	m.kubelet = m.daemon("kubelet", append(args, m.spec.KubeletArgs...)...)
	m.proxy = m.daemon("kube-proxy", "--config=/etc/kubernetes/kube-proxy.yaml", "--v=1")
	if err := m.StartContainerd(ctx); err != nil {
		return err
	}
	pause, err := GoBinary(ctx, "./test/cluster/images/pause")
	if err != nil {
		return err
	}
	return m.LoadBinaryImage(ctx, pauseImage, map[string]string{"/pause": pause})
}

func (m *Machine) containerdConfig() map[string]any {
	runtimes := map[string]any{"runc": map[string]any{
		"runtime_type": "io.containerd.runc.v2",
		"options":      map[string]any{"SystemdCgroup": false},
	}}
	for _, r := range m.spec.Runtimes {
		table := map[string]any{"runtime_type": r.Type}
		if len(r.Options) > 0 {
			table["options"] = r.Options
		}
		for key, value := range r.Extra {
			table[key] = value
		}
		runtimes[r.Name] = table
	}
	return map[string]any{
		"version": 3,
		"root":    "/var/lib/containerd",
		"state":   "/run/containerd",
		"imports": []string{"/etc/containerd/conf.d/*.toml"},
		"grpc":    map[string]any{"address": "/run/containerd/containerd.sock"},
		"plugins": map[string]any{
			"io.containerd.cri.v1.runtime": map[string]any{
				// Lowering a score needs CAP_SYS_RESOURCE, which virtual
				// machines for tests may lack.
				"restrict_oom_score_adj": true,
				"disable_apparmor":       true,
				"cni":                    map[string]any{"bin_dirs": []string{cniDir}, "conf_dir": "/etc/cni/net.d"},
				"containerd":             map[string]any{"default_runtime_name": "runc", "runtimes": runtimes},
			},
			"io.containerd.cri.v1.images": map[string]any{
				"pinned_images": map[string]any{"sandbox": pauseImage},
				"registry":      map[string]any{"config_path": "/etc/containerd/certs.d"},
			},
		},
	}
}

// cniConfig routes every pod by a link of its own. A bridge would need
// br_netfilter (else replies between two pods of a node bypass the translation
// of service addresses), which not every kernel has.
func (m *Machine) cniConfig() string {
	return fmt.Sprintf(`{
  "cniVersion": "1.0.0",
  "name": "hearth",
  "plugins": [
    {
      "type": "ptp",
      "ipMasq": false,
      "ipam": {"type": "host-local", "dataDir": "/run/cni-ipam", "ranges": [[{"subnet": %q}]], "routes": [{"dst": "0.0.0.0/0"}]}
    },
    {"type": "portmap", "capabilities": {"portMappings": true}}
  ]
}
`, m.podSubnet())
}

func (m *Machine) podSubnet() string {
	for n, name := range m.cluster.names {
		if name == m.Name {
			return podSubnet(m.cluster.slot, n)
		}
	}
	return ""
}

func (m *Machine) kubeletConfig() map[string]any {
	config := map[string]any{
		"apiVersion": "kubelet.config.k8s.io/v1beta1",
		"kind":       "KubeletConfiguration",
		"address":    m.IP,
		"authentication": map[string]any{
			"anonymous": map[string]any{"enabled": false},
			"webhook":   map[string]any{"enabled": true},
			"x509":      map[string]any{"clientCAFile": "/etc/kubernetes/ca.crt"},
		},
		"authorization":            map[string]any{"mode": "Webhook"},
		"tlsCertFile":              "/etc/kubernetes/kubelet.crt",
		"tlsPrivateKeyFile":        "/etc/kubernetes/kubelet.key",
		"healthzBindAddress":       "127.0.0.1",
		"containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
		"cgroupDriver":             "cgroupfs",
		// Two kubelets with one root would clean up each other's pods.
		"cgroupRoot":    m.cluster.cgroups.Below(m.Name).Path(),
		"failCgroupV1":  false,
		"failSwapOn":    false,
		"oomScoreAdj":   0, // lowering it needs CAP_SYS_RESOURCE
		"clusterDomain": "cluster.local",
		"resolvConf":    "/etc/kubernetes/resolv.conf",
		// A full disk of the developer's must not evict pods of tests.
		"evictionHard":                map[string]string{"memory.available": "10Mi", "nodefs.available": "0%", "imagefs.available": "0%", "nodefs.inodesFree": "0%", "imagefs.inodesFree": "0%"},
		"imageGCHighThresholdPercent": 100,
		"makeIPTablesUtilChains":      false, // only iptables mode of kube-proxy wants them
		"nodeStatusUpdateFrequency":   "5s",
		"volumePluginDir":             "/var/lib/kubelet/volumeplugins",
	}
	if len(m.spec.Taints) > 0 {
		config["registerWithTaints"] = m.spec.Taints
	}
	if m.spec.ProviderID != "" {
		config["providerID"] = m.spec.ProviderID
	}
	for key, value := range m.spec.KubeletConfig {
		config[key] = value
	}
	return config
}

func (m *Machine) proxyConfig() map[string]any {
	return map[string]any{
		"apiVersion":         "kubeproxy.config.k8s.io/v1alpha1",
		"kind":               "KubeProxyConfiguration",
		"mode":               "nftables",
		"clientConnection":   map[string]any{"kubeconfig": "/etc/kubernetes/kube-proxy.kubeconfig"},
		"clusterCIDR":        clusterCIDR(m.cluster.slot),
		"hostnameOverride":   m.Name,
		"healthzBindAddress": "127.0.0.1:10256",
		"metricsBindAddress": "127.0.0.1:10249",
		"oomScoreAdj":        0,
		// Sizes of the connection table are the machine's, not the node's.
		"conntrack": map[string]any{"maxPerCore": 0, "min": 0},
	}
}

func copyFile(to, from string) error {
	source, err := os.Open(from)
	if err != nil {
		return err
	}
	defer source.Close()
	info, err := source.Stat()
	if err != nil {
		return err
	}
	// See launcher: what is copied may be executed at once. These files take
	// milliseconds to write.
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	target, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, info.Mode().Perm())
	if err != nil {
		return err
	}
	_, err = io.Copy(target, source)
	return errors.Join(err, target.Close())
}

// dumpLogs writes the end of every log of one directory.
func dumpLogs(w io.Writer, title, dir string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	for _, entry := range entries {
		text := process.TailFile(filepath.Join(dir, entry.Name()), logTail)
		fmt.Fprintf(w, "--- %s/%s\n%s\n", title, entry.Name(), bytes.TrimSpace([]byte(text)))
	}
}
