package k3s

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"net/url"
	"path"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
	"github.com/hearth-sh/hearth/internal/host"
	"github.com/hearth-sh/hearth/internal/k3s/pki"
)

// Node is who the machine is, from instance metadata.
type Node struct {
	InstanceID   string // also the node's name
	InstanceType string
	Region, Zone string
	// LifeCycle is spot, on-demand or another word of EC2's; "" is left out.
	LifeCycle string
	// IPv4 and IPv6 are the primary addresses; one is set.
	IPv4, IPv6 netip.Addr
	// ServicesDomain is the partition's: amazonaws.com if empty.
	ServicesDomain string
}

// ProviderID is how AWS's cloud provider and Karpenter name the instance.
func (n Node) ProviderID() string { return "aws:///" + n.Zone + "/" + n.InstanceID }

// Membership is the node's part in its cluster.
type Membership struct {
	// Founder is the server that begins the cluster; k3s ignores it once etcd
	// has data, so it stays set for that server.
	Founder bool
	// Server is what everybody else joins through: https://HOST:6443.
	Server string
	// Addons makes this server carry the addons' manifests.
	Addons bool
	// ServerToken and AgentToken are the generation's. An agent has only the
	// second.
	ServerToken, AgentToken pki.Token
}

// Proxy is the environment that k3s reaches the internet through.
type Proxy struct {
	HTTP, HTTPS, No string
}

// Input is all that Render looks at.
type Input struct {
	// Config is the complete configuration, with every default filled in.
	Config     v1alpha1.NodeConfigSpec
	Node       Node
	Membership Membership
	// Paths. Default: DefaultPaths.
	Paths Paths
	Proxy Proxy
	// Charts are archives (.tgz) that come with bootstrap, by the addon's name
	// ("hearth", "spinkube", "certManager"); an addon's own Chart wins.
	Charts map[string][]byte
	// Values are those of charts that come with bootstrap, by the addon's name;
	// the NodeConfig's are laid over them.
	Values map[string]map[string]any
	// SpinKubeCRDs is the manifest of the operator's resource definitions, which
	// its chart lacks.
	SpinKubeCRDs []byte
	// AirgapImages says that an archive of images was put into Paths.Images.
	AirgapImages bool
}

// Rendered are the files of a node.
type Rendered struct {
	Files []host.File
	// Absent are files that another configuration would have and this one does
	// not: what of them bootstrap installed must go (host.Retire).
	Absent []string
}

// lifecycleLabel is what AWS's tools and many manifests select Spot nodes by; a
// kubelet may set it (node.kubernetes.io/*).
const lifecycleLabel = "node.kubernetes.io/lifecycle"

// Render returns the files that make k3s run as the configuration says. Its
// errors are *fault.Error or joined ones.
func Render(in Input) (Rendered, error) {
	if in.Paths == (Paths{}) {
		in.Paths = DefaultPaths()
	}
	if err := in.check(); err != nil {
		return Rendered{}, err
	}
	var r renderer
	server := in.Config.Role == v1alpha1.RoleServer
	for _, step := range []func(Input) error{r.directories, r.images, r.config, r.extra, r.tokens, r.registries, r.credentialProvider, r.environment, r.unit} {
		if err := step(in); err != nil {
			return Rendered{}, err
		}
	}
	if server && in.Membership.Addons {
		if err := r.addons(in); err != nil {
			return Rendered{}, err
		}
	}
	return Rendered{r.files, r.absent}, nil
}

func (in Input) check() error {
	c, m := in.Config, in.Membership
	invalid := func(remedy, format string, args ...any) error {
		return fault.New(CodeConfig, nil, remedy, format, args...)
	}
	switch {
	case c.Role != v1alpha1.RoleServer && c.Role != v1alpha1.RoleAgent:
		return invalid("set spec.role to server or agent", "%q is no role", c.Role)
	case in.Node.InstanceID == "" || in.Node.Zone == "" || in.Node.Region == "" || !in.Node.IPv4.IsValid() && !in.Node.IPv6.IsValid():
		return invalid("see whether instance metadata is complete", "the node's identity lacks its ID, zone, region or address")
	case m.Founder && c.Role == v1alpha1.RoleAgent:
		return invalid("give servers the role server", "an agent cannot found a cluster")
	case m.Founder == (m.Server != ""):
		return invalid("report it: this is a mistake of bootstrap", "a node either founds the cluster or joins through a server")
	case c.Role == v1alpha1.RoleAgent && !m.ServerToken.IsZero():
		return invalid("report it: this is a mistake of bootstrap", "an agent was given the servers' token")
	case m.AgentToken.IsZero() || c.Role == v1alpha1.RoleServer && m.ServerToken.IsZero():
		return invalid("see the cluster's store", "the cluster's token is missing")
	}
	if m.Server != "" {
		u, err := url.Parse(m.Server)
		if err != nil || u.Scheme != "https" || u.Hostname() == "" || u.User != nil || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" {
			return invalid("write it like https://10.0.0.1:6443", "%q is no address of a server", m.Server)
		}
	}
	return nil
}

type renderer struct {
	files  []host.File
	absent []string
}

const header = "# Written by bootstrap; a change made here is undone by its next run.\n"

func (r *renderer) yaml(name, reason string, v any) error {
	b, err := yaml.Marshal(v)
	if err != nil {
		return fault.New(CodeConfig, err, "correct the NodeConfig", "writing %s failed", name)
	}
	r.files = append(r.files, host.File{Path: name, Content: append([]byte(header), b...), Mode: 0o644, Reason: reason})
	return nil
}

// directories are those that k3s makes for its own eyes only; made by somebody
// else beforehand, they would keep other modes (pkg/server/server.go).
func (r *renderer) directories(in Input) error {
	if in.Config.Role == v1alpha1.RoleServer {
		for _, dir := range []string{path.Dir(in.Paths.ServerTLS), in.Paths.ServerTLS} {
			r.files = append(r.files, host.File{Path: dir, Mode: fs.ModeDir | 0o700, Reason: "k3s's data of servers"})
		}
	}
	return nil
}

// images makes k3s remember which archives it has imported; else every start
// imports them again, and kubelet waits for it.
func (r *renderer) images(in Input) error {
	if in.AirgapImages {
		r.files = append(r.files, host.File{Path: in.Paths.ImagesCache, Mode: 0o644, IfAbsent: true, Reason: "k3s's memory of imported images"})
	}
	return nil
}

// AllowsCgroupV1 says whether settings laid over k3s's (k3s.config) tell kubelet
// to run on version 1 of control groups, which it refuses from 1.35 on.
func AllowsCgroupV1(config map[string]any) bool {
	for _, key := range []string{"kubelet-arg", "kubelet-arg+"} {
		for _, v := range toList(config[key]) {
			if s, _ := v.(string); strings.TrimPrefix(s, "--") == "fail-cgroupv1=false" {
				return true
			}
		}
	}
	return false
}

// config is what bootstrap decides.
func (r *renderer) config(in Input) error {
	values := baseConfig(in)
	b, err := marshalConfig(in.Config, values)
	if err != nil {
		return err
	}
	r.files = append(r.files, host.File{Path: HearthConfig, Content: b, Mode: 0o600, Reason: "tells k3s how to run"})
	return nil
}

// marshalConfig writes keys of config.yaml in the order of their names, and
// refuses those that k3s of this role and version does not have.
func marshalConfig(c v1alpha1.NodeConfigSpec, values map[string]any) ([]byte, error) {
	role, flags := c.Role, Flags()
	for _, key := range slices.Sorted(maps.Keys(values)) {
		flag, known := flags[strings.TrimSuffix(key, "+")]
		switch {
		case !known && mayHaveMore(c.K3s.Version):
		case !known:
			return nil, fault.New(CodeConfig, nil, "look for it in the documentation of k3s "+FlagsVersion, "k3s has no flag %q", key)
		case !flag.Takes(role):
			return nil, fault.New(CodeConfig, nil, "take it out of this role's configuration", "k3s as %s has no flag %q", role, key)
		case strings.HasSuffix(key, "+") && !flag.List:
			return nil, fault.New(CodeConfig, nil, "write it without the plus sign", "the flag %q of k3s is no list", key)
		}
	}
	b, err := yaml.Marshal(values)
	if err != nil {
		return nil, fault.New(CodeConfig, err, "correct k3s.config", "writing the configuration of k3s failed")
	}
	return append([]byte(header), b...), nil
}

func baseConfig(in Input) map[string]any {
	c, n, m := in.Config, in.Node, in.Membership
	values := map[string]any{
		"node-name":   n.InstanceID,
		"node-ip":     nodeIPs(in),
		"node-label":  labels(c, n),
		"kubelet-arg": []string{"provider-id=" + n.ProviderID()},
		"token-file":  in.Paths.TokenFile,
	}
	if taints := taints(c); len(taints) > 0 {
		values["node-taint"] = taints
	}
	if in.Paths.DataDir != DefaultDataDir {
		values["data-dir"] = in.Paths.DataDir
	}
	if m.Server != "" {
		values["server"] = m.Server
	}
	if c.Role == v1alpha1.RoleAgent {
		return values
	}

	if m.Founder {
		values["cluster-init"] = true
	}
	values["agent-token-file"] = in.Paths.AgentTokenFile
	values["write-kubeconfig-mode"] = "0600"
	if sans := serverNames(c.Cluster); len(sans) > 0 {
		values["tls-san"] = sans
	}
	// Flags that must be the same on all servers are written even where they are
	// k3s's defaults, so that another version's defaults change nothing.
	if s := c.Network.ClusterCIDR; s != "" {
		values["cluster-cidr"] = s
	}
	if s := c.Network.ServiceCIDR; s != "" {
		values["service-cidr"] = s
	}
	if handedOver(c.Network) {
		values["flannel-backend"] = "none"
		values["disable-network-policy"] = true
	} else if c.Network.FlannelBackend != "" {
		values["flannel-backend"] = c.Network.FlannelBackend
	}
	if s := c.Registries.SystemDefault; s != "" {
		values["system-default-registry"] = s
	}
	snapshots(values, c, n)
	return values
}

// handedOver says whether somebody else than k3s connects pods.
func handedOver(n v1alpha1.NetworkConfig) bool { return n.CNI != "" && n.CNI != "flannel" }

// nodeIPs is the primary address, or one of each family where pods have both.
// Without it k3s takes the default route's interface, which on a machine with
// several need not be the primary one.
func nodeIPs(in Input) []string {
	n := in.Node
	dual := strings.Contains(in.Config.Network.ClusterCIDR, ",")
	switch {
	case n.IPv4.IsValid() && n.IPv6.IsValid() && dual:
		return []string{n.IPv4.String(), n.IPv6.String()}
	case n.IPv4.IsValid():
		return []string{n.IPv4.String()}
	}
	return []string{n.IPv6.String()}
}

// labels are those of the configuration, and what the instance is, which nobody
// may claim otherwise. k3s's cloud provider takes over zone, region and type.
func labels(c v1alpha1.NodeConfigSpec, n Node) (out []string) {
	all := maps.Clone(c.Node.Labels)
	if all == nil {
		all = map[string]string{}
	}
	all["topology.kubernetes.io/region"] = n.Region
	all["topology.kubernetes.io/zone"] = n.Zone
	if n.InstanceType != "" {
		all["node.kubernetes.io/instance-type"] = n.InstanceType
	}
	if n.LifeCycle != "" {
		all[lifecycleLabel] = n.LifeCycle
	}
	for _, key := range slices.Sorted(maps.Keys(all)) {
		out = append(out, key+"="+all[key])
	}
	return out
}

// taints are in the form of kubelet's --register-with-taints.
func taints(c v1alpha1.NodeConfigSpec) (out []string) {
	for _, t := range c.Node.Taints {
		s := t.Key
		if t.Value != "" {
			s += "=" + t.Value
		}
		out = append(out, s+":"+t.Effect)
	}
	return out
}

// serverNames are further names in the servers' certificate: also that of the
// fixed address, or nobody could join through it.
func serverNames(c v1alpha1.ClusterConfig) []string {
	names := slices.Clone(c.TLSSANs)
	if u, err := url.Parse(c.Server); err == nil && u.Hostname() != "" && !slices.Contains(names, u.Hostname()) {
		names = append(names, u.Hostname())
	}
	return names
}

// snapshots are etcd's. Without keys k3s takes the instance's role
// (pkg/etcd/s3).
func snapshots(values map[string]any, c v1alpha1.NodeConfigSpec, n Node) {
	s := c.Cluster.Snapshots
	if s.Schedule != "" {
		values["etcd-snapshot-schedule-cron"] = s.Schedule
	}
	if s.Retention > 0 {
		values["etcd-snapshot-retention"] = s.Retention
	}
	bucket, ok := strings.CutPrefix(s.Bucket, "s3://")
	if !ok {
		return
	}
	bucket, folder, _ := strings.Cut(bucket, "/")
	region := s.Region
	if region == "" {
		region = n.Region
	}
	domain := n.ServicesDomain
	if domain == "" {
		domain = "amazonaws.com"
	}
	values["etcd-s3"] = true
	// From 1.34 on the bucket has a number of its own, 5 unless it is said; and
	// before, the flag above held for both.
	if v, err := ParseVersion(c.K3s.Version); s.Retention > 0 && (err != nil || v.Major > 1 || v.Minor >= 34) {
		values["etcd-s3-retention"] = s.Retention
	}
	values["etcd-s3-bucket"] = bucket
	values["etcd-s3-region"] = region
	// The default is us-east-1's, which redirects, and is another partition's
	// in China and GovCloud.
	values["etcd-s3-endpoint"] = "s3." + region + "." + domain
	if folder = strings.Trim(folder, "/"); folder != "" {
		values["etcd-s3-folder"] = folder
	}
}

// extra is the NodeConfig's k3s.config. Values of lists that bootstrap has
// written too are added ("key+" of pkg/configfilearg/parser.go), or a kubelet
// flag of one's own would take the provider ID away.
func (r *renderer) extra(in Input) error {
	if len(in.Config.K3s.Config) == 0 {
		r.absent = append(r.absent, ExtraConfig)
		return nil
	}
	base := baseConfig(in)
	values := map[string]any{}
	for key, value := range in.Config.K3s.Config {
		name := strings.TrimSuffix(key, "+")
		if _, taken := base[name]; taken && Flags()[name].List {
			key = name + "+"
		}
		if _, twice := values[key]; twice {
			return fault.New(CodeConfig, nil, "write it once", "k3s.config has both %q and %q", name, name+"+")
		}
		values[key] = value
	}
	b, err := marshalConfig(in.Config, values)
	if err != nil {
		return err
	}
	r.files = append(r.files, host.File{Path: ExtraConfig, Content: b, Mode: 0o600, Reason: "k3s.config of the NodeConfig"})
	return nil
}

// tokens writes secrets as k3s reads them. The founder has nobody to verify, and
// k3s takes its own token and the agents' (--token-file, --agent-token-file)
// for the password itself (getServerPass and getNodePass of
// pkg/daemons/control/deps), so these are the secrets alone; whoever joins gets
// the secure form, which names the authority to expect.
func (r *renderer) tokens(in Input) error {
	m := in.Membership
	secret := func(name, content, reason string) {
		r.files = append(r.files, host.File{Path: name, Content: []byte(content), Mode: 0o600, Secret: true, Reason: reason})
	}
	if in.Config.Role == v1alpha1.RoleAgent {
		secret(in.Paths.TokenFile, m.AgentToken.Reveal(), "lets the agent join")
		r.absent = append(r.absent, in.Paths.AgentTokenFile)
		return nil
	}
	if m.Founder {
		secret(in.Paths.TokenFile, m.ServerToken.Secret(), "what servers join with")
	} else {
		secret(in.Paths.TokenFile, m.ServerToken.Reveal(), "lets the server join")
	}
	secret(in.Paths.AgentTokenFile, m.AgentToken.Secret(), "what agents join with")
	return nil
}

// registries is k3s's registries.yaml (pkg/agent/containerd of k3s, and
// github.com/rancher/wharfie/pkg/registries).
func (r *renderer) registries(in Input) error {
	type mirror struct {
		Endpoint []string          `json:"endpoint,omitempty"`
		Rewrite  map[string]string `json:"rewrite,omitempty"`
	}
	type tls struct {
		CAFile string `json:"ca_file,omitempty"`
	}
	type config struct {
		TLS *tls `json:"tls,omitempty"`
	}
	c := in.Config.Registries
	if len(c.Mirrors) == 0 && len(c.CAFiles) == 0 {
		r.absent = append(r.absent, RegistriesFile)
		return nil
	}
	file := struct {
		Mirrors map[string]mirror `json:"mirrors,omitempty"`
		Configs map[string]config `json:"configs,omitempty"`
	}{map[string]mirror{}, map[string]config{}}
	for name, m := range c.Mirrors {
		file.Mirrors[name] = mirror{m.Endpoints, m.Rewrite}
	}
	for name, ca := range c.CAFiles {
		file.Configs[name] = config{&tls{ca}}
	}
	return r.yaml(RegistriesFile, "where images come from", file)
}

// ecrHosts are the registries of every AWS partition (ECR's endpoints in AWS's
// general reference, with IPv6 and FIPS), and the public one.
// ecr-public.aws.com needs ecr-credential-provider 1.32 or later; older ones
// fail for it, and kubelet then pulls without credentials.
var ecrHosts = []string{
	"*.dkr.ecr.*.amazonaws.com", "*.dkr-ecr.*.on.aws",
	"*.dkr.ecr.*.amazonaws.com.cn", "*.dkr-ecr.*.on.amazonwebservices.com.cn",
	"*.dkr.ecr-fips.*.amazonaws.com", "*.dkr-ecr-fips.*.on.aws",
	"*.dkr.ecr.*.c2s.ic.gov", "*.dkr.ecr.*.sc2s.sgov.gov", "*.dkr.ecr.*.cloud.adc-e.uk", "*.dkr.ecr.*.csp.hci.ic.gov", "*.dkr.ecr.*.amazonaws.eu",
	"public.ecr.aws", "ecr-public.aws.com",
}

// ECRProvider is the file name of the credential provider; kubelet looks for a
// program of the provider's name in CredentialProviderDir.
const ECRProvider = "ecr-credential-provider"

// credentialProvider is kubelet's CredentialProviderConfig
// (kubelet.config.k8s.io/v1).
func (r *renderer) credentialProvider(in Input) error {
	if in.Config.Registries.ECR == nil || !*in.Config.Registries.ECR {
		r.absent = append(r.absent, CredentialProviderConfig)
		return nil
	}
	type provider struct {
		Name                 string   `json:"name"`
		MatchImages          []string `json:"matchImages"`
		DefaultCacheDuration string   `json:"defaultCacheDuration"`
		APIVersion           string   `json:"apiVersion"`
	}
	return r.yaml(CredentialProviderConfig, "lets kubelet pull from ECR with the instance's role", struct {
		APIVersion string     `json:"apiVersion"`
		Kind       string     `json:"kind"`
		Providers  []provider `json:"providers"`
	}{"kubelet.config.k8s.io/v1", "CredentialProviderConfig", []provider{
		// A token of ECR lives twelve hours; the provider names half of what is
		// left, so this is for answers that do not say.
		{ECRProvider, ecrHosts, "12h0m0s", "credentialprovider.kubelet.k8s.io/v1"},
	}})
}

// environment is the unit's environment: proxies, which may carry a password,
// and nothing else. k3s adds the cluster's own networks to NO_PROXY.
func (r *renderer) environment(in Input) error {
	name := path.Join(UnitDir, Unit(in.Config.Role)+".env")
	p := in.Proxy
	if p.HTTP == "" && p.HTTPS == "" {
		r.absent = append(r.absent, name)
		return nil
	}
	no := []string{}
	for _, entry := range append(strings.Split(p.No, ","), "localhost", "127.0.0.0/8", "::1", "169.254.169.254", "fd00:ec2::254") {
		if entry = strings.TrimSpace(entry); entry != "" && !slices.Contains(no, entry) {
			no = append(no, entry)
		}
	}
	var b strings.Builder
	b.WriteString(header)
	for _, v := range []struct{ name, value string }{{"HTTP_PROXY", p.HTTP}, {"HTTPS_PROXY", p.HTTPS}, {"NO_PROXY", strings.Join(no, ",")}} {
		if v.value == "" {
			continue
		}
		if strings.ContainsAny(v.value, "\n\r\x00") {
			return fault.New(CodeConfig, nil, "correct the environment of bootstrap", "%s has more than one line", v.name)
		}
		fmt.Fprintf(&b, "%s=%s\n", v.name, quoteEnvironment(v.value))
	}
	r.files = append(r.files, host.File{Path: name, Content: []byte(b.String()), Mode: 0o600, Secret: true, Reason: "proxies for k3s"})
	return nil
}

// quoteEnvironment writes a value for EnvironmentFile (systemd.exec(5)).
func quoteEnvironment(s string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, `$`, `\$`, "`", "\\`").Replace(s) + `"`
}

// unit is the service as install.sh of k3s writes it (create_systemd_service_file):
// KillMode=process leaves pods running while k3s is restarted, Delegate=yes
// gives it the control groups below its own, and TimeoutStartSec=0 is for
// agents whose server is not there yet, which bootstrap watches with a deadline
// of its own.
func (r *renderer) unit(in Input) error {
	name := Unit(in.Config.Role)
	file := path.Join(UnitDir, name)
	content := header + `[Unit]
Description=Lightweight Kubernetes (` + string(in.Config.Role) + `)
Documentation=https://k3s.io
Wants=network-online.target
After=network-online.target

[Install]
WantedBy=multi-user.target

[Service]
Type=notify
EnvironmentFile=-/etc/default/%N
EnvironmentFile=-/etc/sysconfig/%N
EnvironmentFile=-` + file + `.env
KillMode=process
Delegate=yes
User=root
LimitNOFILE=1048576
LimitNPROC=infinity
LimitCORE=infinity
TasksMax=infinity
TimeoutStartSec=0
Restart=always
RestartSec=5s
ExecStartPre=-/sbin/modprobe br_netfilter
ExecStartPre=-/sbin/modprobe overlay
ExecStart=` + Binary + ` ` + string(in.Config.Role) + `
`
	r.files = append(r.files, host.File{Path: file, Content: []byte(content), Mode: 0o644, Reason: "runs k3s"})
	other := v1alpha1.RoleServer
	if in.Config.Role == v1alpha1.RoleServer {
		other = v1alpha1.RoleAgent
	}
	r.absent = append(r.absent, path.Join(UnitDir, Unit(other)), path.Join(UnitDir, Unit(other)+".env"))
	return nil
}

// RestoreArguments are the arguments of the k3s command that turns a snapshot
// into the only member of a new cluster, and then ends (--cluster-reset of
// pkg/cli/server). It reads the same configuration files as the service; the
// snapshot is an absolute path, or a name in the configured bucket.
func RestoreArguments(snapshot string) []string {
	arguments := []string{"server", "--cluster-reset", "--cluster-reset-restore-path=" + snapshot}
	if path.IsAbs(snapshot) {
		// With a bucket k3s looks for everything there, paths too (Reset of
		// pkg/etcd/etcd.go).
		arguments = append(arguments, "--etcd-s3=false")
	}
	return arguments
}

// ReadConfig merges configuration files as k3s does (readConfigFile of
// pkg/configfilearg/parser.go), given in their order: the last one wins, and
// "key+" appends.
func ReadConfig(files ...[]byte) (map[string]any, error) {
	merged := map[string]any{}
	for _, file := range files {
		var values map[string]any
		b, err := yaml.YAMLToJSONStrict(file)
		if err == nil {
			err = json.Unmarshal(b, &values)
		}
		if err != nil {
			return nil, fmt.Errorf("reading a configuration of k3s: %w", err)
		}
		for _, key := range slices.Sorted(maps.Keys(values)) {
			name, appends := strings.CutSuffix(key, "+")
			if old, there := merged[name]; there && appends {
				merged[name] = append(toList(old), toList(values[key])...)
			} else {
				merged[name] = values[key]
			}
		}
	}
	return merged, nil
}

func toList(v any) []any {
	if list, ok := v.([]any); ok {
		return slices.Clip(list)
	}
	return []any{v}
}
