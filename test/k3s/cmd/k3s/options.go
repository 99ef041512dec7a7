package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"sigs.k8s.io/yaml"
)

// kind of a flag's value.
type kind int

const (
	text kind = iota
	boolean
	number
	list
)

type command string

const (
	serverCommand command = "server"
	agentCommand  command = "agent"
)

// flag is one of k3s's; see pkg/cli/cmds of k3s.
type flag struct {
	kind kind
	// env is the variable that sets it, where there is one.
	env string
	// short is its one-letter name, where there is one.
	short string
	// fallback is its value when it is not set.
	fallback string
}

// agentFlags are those of an agent; every one is a server's, too, unless
// agentOnly says otherwise.
var agentFlags = map[string]flag{
	"config": {short: "c", env: "K3S_CONFIG_FILE"}, "debug": {kind: boolean, env: "K3S_DEBUG"}, "v": {kind: number}, "vmodule": {},
	"log": {short: "l"}, "alsologtostderr": {kind: boolean},
	"token": {short: "t", env: "K3S_TOKEN"}, "token-file": {env: "K3S_TOKEN_FILE"}, "server": {short: "s", env: "K3S_URL"},
	"data-dir": {short: "d", env: "K3S_DATA_DIR", fallback: defaultDataDir}, "node-name": {env: "K3S_NODE_NAME"}, "with-node-id": {kind: boolean},
	"node-label": {kind: list}, "node-taint": {kind: list},
	"image-credential-provider-bin-dir": {fallback: "/var/lib/rancher/credentialprovider/bin"},
	"image-credential-provider-config":  {fallback: "/var/lib/rancher/credentialprovider/config.yaml"},
	"selinux":                           {kind: boolean, env: "K3S_SELINUX"}, "lb-server-port": {kind: number, env: "K3S_LB_SERVER_PORT", fallback: "6444"},
	"protect-kernel-defaults": {kind: boolean}, "container-runtime-endpoint": {}, "default-runtime": {}, "image-service-endpoint": {},
	"disable-default-registry-endpoint": {kind: boolean}, "nonroot-devices": {kind: boolean},
	"pause-image": {fallback: "rancher/mirrored-pause:3.6"}, "snapshotter": {fallback: "overlayfs"},
	"private-registry": {fallback: "/etc/rancher/k3s/registries.yaml"}, "airgap-extra-registry": {kind: list},
	"node-ip": {kind: list, short: "i"}, "node-external-ip": {kind: list}, "node-internal-dns": {kind: list}, "node-external-dns": {kind: list},
	"resolv-conf": {env: "K3S_RESOLV_CONF"}, "flannel-iface": {}, "flannel-conf": {}, "flannel-cni-conf": {}, "vpn-auth": {env: "K3S_VPN_AUTH"}, "vpn-auth-file": {env: "K3S_VPN_AUTH_FILE"},
	"kubelet-arg": {kind: list}, "kube-proxy-arg": {kind: list}, "rootless": {kind: boolean}, "prefer-bundled-bin": {kind: boolean},
	"docker": {kind: boolean}, "bind-address": {}, "disable-apiserver-lb": {kind: boolean}, "enable-pprof": {kind: boolean},
}

// agentOnly are agents' flags that a server does not know.
var agentOnly = []string{"disable-apiserver-lb"}

// serverFlags are those of a server alone.
var serverFlags = map[string]flag{
	"https-listen-port": {kind: number, fallback: "6443"}, "supervisor-metrics": {kind: boolean}, "advertise-address": {}, "advertise-port": {kind: number}, "tls-san": {kind: list},
	"tls-san-security": {kind: boolean, fallback: "true"}, "cluster-cidr": {kind: list, fallback: "10.42.0.0/16"}, "service-cidr": {kind: list, fallback: "10.43.0.0/16"},
	"service-node-port-range": {fallback: "30000-32767"}, "cluster-dns": {kind: list}, "cluster-domain": {fallback: "cluster.local"},
	"flannel-backend": {fallback: "vxlan"}, "flannel-ipv6-masq": {kind: boolean}, "flannel-external-ip": {kind: boolean},
	"egress-selector-mode": {fallback: "agent"}, "servicelb-namespace": {fallback: "kube-system"},
	"write-kubeconfig": {short: "o", env: "K3S_KUBECONFIG_OUTPUT"}, "write-kubeconfig-mode": {env: "K3S_KUBECONFIG_MODE"}, "write-kubeconfig-group": {env: "K3S_KUBECONFIG_GROUP"},
	"helm-job-image": {}, "agent-token": {env: "K3S_AGENT_TOKEN"}, "agent-token-file": {env: "K3S_AGENT_TOKEN_FILE"},
	"cluster-init": {kind: boolean, env: "K3S_CLUSTER_INIT"}, "cluster-reset": {kind: boolean, env: "K3S_CLUSTER_RESET"}, "cluster-reset-restore-path": {},
	"kube-apiserver-arg": {kind: list}, "etcd-arg": {kind: list}, "kube-controller-manager-arg": {kind: list}, "kube-scheduler-arg": {kind: list}, "kube-cloud-controller-manager-arg": {kind: list},
	"kine-tls": {kind: boolean}, "datastore-endpoint": {env: "K3S_DATASTORE_ENDPOINT"}, "datastore-cafile": {env: "K3S_DATASTORE_CAFILE"}, "datastore-certfile": {env: "K3S_DATASTORE_CERTFILE"}, "datastore-keyfile": {env: "K3S_DATASTORE_KEYFILE"},
	"etcd-expose-metrics": {kind: boolean}, "etcd-disable-snapshots": {kind: boolean}, "etcd-snapshot-name": {fallback: "etcd-snapshot"},
	"etcd-snapshot-schedule-cron": {fallback: "0 */12 * * *"}, "etcd-snapshot-retention": {kind: number, fallback: "5"}, "etcd-snapshot-reconcile-interval": {}, "etcd-snapshot-dir": {}, "etcd-snapshot-compress": {kind: boolean},
	"etcd-s3": {kind: boolean}, "etcd-s3-endpoint": {fallback: "s3.amazonaws.com"}, "etcd-s3-endpoint-ca": {}, "etcd-s3-skip-ssl-verify": {kind: boolean}, "etcd-s3-access-key": {}, "etcd-s3-secret-key": {}, "etcd-s3-session-token": {},
	"etcd-s3-bucket": {}, "etcd-s3-bucket-lookup-type": {}, "etcd-s3-region": {fallback: "us-east-1"}, "etcd-s3-folder": {}, "etcd-s3-proxy": {}, "etcd-s3-config-secret": {}, "etcd-s3-insecure": {kind: boolean}, "etcd-s3-timeout": {fallback: "5m0s"}, "etcd-s3-retention": {kind: number, fallback: "5"},
	"default-local-storage-path": {}, "disable": {kind: list}, "disable-scheduler": {kind: boolean}, "disable-cloud-controller": {kind: boolean}, "disable-kube-proxy": {kind: boolean},
	"disable-network-policy": {kind: boolean}, "disable-helm-controller": {kind: boolean}, "disable-apiserver": {kind: boolean}, "disable-controller-manager": {kind: boolean}, "disable-etcd": {kind: boolean}, "disable-agent": {kind: boolean},
	"embedded-registry": {kind: boolean}, "system-default-registry": {env: "K3S_SYSTEM_DEFAULT_REGISTRY"}, "secrets-encryption": {kind: boolean}, "secrets-encryption-provider": {},
}

// unsupported would change what a cluster does, and the stand-in does not do
// it: better an error than a test that proves nothing.
var unsupported = []string{
	"docker", "rootless", "container-runtime-endpoint", "image-service-endpoint", "datastore-endpoint", "vpn-auth", "vpn-auth-file", "embedded-registry", "disable-apiserver",
	"disable-etcd", "disable-agent", "disable-controller-manager", "selinux", "etcd-s3-config-secret",
}

// packaged are what --disable may name.
var packaged = []string{"coredns", "servicelb", "traefik", "local-storage", "metrics-server", "runtimes"}

// critical must be the same on every server.
var critical = []string{
	"cluster-cidr", "service-cidr", "cluster-dns", "cluster-domain", "flannel-backend", "flannel-ipv6-masq", "flannel-external-ip", "egress-selector-mode",
	"disable-cloud-controller", "disable-helm-controller", "disable-network-policy", "disable-kube-proxy", "secrets-encryption", "servicelb-namespace", "disable",
}

func flagsOf(c command) map[string]flag {
	all := maps.Clone(agentFlags)
	if c == serverCommand {
		for _, name := range agentOnly {
			delete(all, name)
		}
		maps.Copy(all, serverFlags)
	}
	return all
}

// options are the settings of a run: every flag's values, last one wins except
// for lists.
type options struct {
	command command
	values  map[string][]string
	set     map[string]bool
}

func (o *options) get(name string) string {
	values := o.values[name]
	if len(values) == 0 {
		return ""
	}
	return values[len(values)-1]
}

func (o *options) is(name string) bool {
	b, _ := strconv.ParseBool(o.get(name)) // checked while loading
	return b
}

// number is a flag's value; 0 where it has none.
func (o *options) number(name string) int {
	n, _ := strconv.Atoi(o.get(name)) // checked while loading
	return n
}

// all returns a list; a value may hold several, separated by commas, in the
// flags where k3s splits them.
func (o *options) all(name string) []string { return o.values[name] }

func (o *options) split(name string) []string {
	var out []string
	for _, value := range o.values[name] {
		for part := range strings.SplitSeq(value, ",") {
			if part = strings.TrimSpace(part); part != "" {
				out = append(out, part)
			}
		}
	}
	return out
}

func (o *options) dataDir(elem ...string) string {
	return filepath.Join(append([]string{o.get("data-dir")}, elem...)...)
}

// loadOptions merges environment, configuration files and arguments, from the
// weakest to the strongest, as k3s does.
func loadOptions(c command, args, environ []string) (*options, error) {
	flags := flagsOf(c)
	short := map[string]string{}
	for name, f := range flags {
		if f.short != "" {
			short[f.short] = name
		}
	}
	o := &options{command: c, values: map[string][]string{}, set: map[string]bool{}}
	byEnv := map[string]string{}
	for name, f := range flags {
		if f.fallback != "" {
			o.values[name] = []string{f.fallback}
		}
		if f.env != "" {
			byEnv[f.env] = name
		}
	}
	for _, variable := range environ {
		name, value, _ := strings.Cut(variable, "=")
		if !strings.HasPrefix(name, "K3S_") || value == "" {
			continue
		}
		target, ok := byEnv[name]
		if !ok {
			return nil, fmt.Errorf("the environment variable %s is none of k3s %s", name, c)
		}
		o.values[target], o.set[target] = []string{value}, true
	}

	cli, err := parseArgs(flags, short, args)
	if err != nil {
		return nil, err
	}
	path, given := "/etc/rancher/k3s/config.yaml", false
	for _, pair := range cli {
		if pair.name == "config" {
			path, given = pair.value, true
		}
	}
	if value := o.get("config"); value != "" {
		path, given = value, true
	}
	file, err := readConfig(path, given)
	if err != nil {
		return nil, err
	}
	for _, pair := range file {
		full := pair.name
		if name, ok := short[full]; ok {
			full = name
		}
		if _, ok := flags[full]; !ok {
			if _, other := serverFlags[full]; other {
				return nil, fmt.Errorf("%s: %q is a server's setting and fatal in an agent's configuration", pair.file, pair.name)
			}
			return nil, fmt.Errorf("%s: %q is no setting of k3s %s", pair.file, pair.name, c)
		}
	}
	o.apply(flags, short, file)
	o.apply(flags, short, cli)
	return o, o.check(flags)
}

type pair struct{ name, value, file string }

// apply gives every named flag the values of this source alone.
func (o *options) apply(flags map[string]flag, short map[string]string, pairs []pair) {
	fresh := map[string]bool{}
	for _, p := range pairs {
		name := p.name
		if full, ok := short[name]; ok {
			name = full
		}
		if !fresh[name] || flags[name].kind != list {
			o.values[name] = nil
		}
		fresh[name], o.set[name] = true, true
		o.values[name] = append(o.values[name], p.value)
	}
}

func parseArgs(flags map[string]flag, short map[string]string, args []string) ([]pair, error) {
	var out []pair
	for i := 0; i < len(args); i++ {
		name, value, assigned := strings.Cut(strings.TrimLeft(args[i], "-"), "=")
		if !strings.HasPrefix(args[i], "-") {
			return nil, fmt.Errorf("flags are expected, not %q", args[i])
		}
		if full, ok := short[name]; ok {
			name = full
		}
		f, ok := flags[name]
		if !ok {
			return nil, fmt.Errorf("flag provided but not defined: -%s", name)
		}
		switch {
		case assigned:
		case f.kind == boolean:
			value = "true"
		case i+1 < len(args):
			i++
			value = args[i]
		default:
			return nil, fmt.Errorf("flag needs an argument: -%s", name)
		}
		out = append(out, pair{name: name, value: value})
	}
	return out, nil
}

// readConfig reads a file and the drop-ins beside it in the order of their
// names: the last value of a key wins, "key+" appends.
func readConfig(path string, given bool) ([]pair, error) {
	var files []string
	entries, err := os.ReadDir(path + ".d")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	for _, entry := range entries { // sorted
		if ext := strings.ToLower(filepath.Ext(entry.Name())); !entry.IsDir() && (ext == ".yaml" || ext == ".yml") {
			files = append(files, filepath.Join(path+".d", entry.Name()))
		}
	}
	if _, err := os.Stat(path); err == nil {
		files = append([]string{path}, files...)
	} else if !errors.Is(err, os.ErrNotExist) || given && len(files) == 0 {
		return nil, err
	}
	var order []string
	values, from := map[string][]string{}, map[string]string{}
	for _, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		document, err := decodeYAML(content)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		for _, name := range slices.Sorted(maps.Keys(document)) {
			key, add := strings.CutSuffix(name, "+")
			read, err := plain(document[name])
			if err != nil {
				return nil, fmt.Errorf("%s: %s: %w", file, key, err)
			}
			if _, seen := values[key]; !seen {
				order = append(order, key)
			}
			if add {
				values[key] = append(values[key], read...)
			} else {
				values[key] = read
			}
			from[key] = file
		}
	}
	var out []pair
	for _, key := range order {
		for _, value := range values[key] {
			out = append(out, pair{name: key, value: value, file: from[key]})
		}
	}
	return out, nil
}

// decodeYAML reads a mapping; a key that comes twice is an error. Numbers keep
// their digits.
func decodeYAML(content []byte) (map[string]any, error) {
	converted, err := yaml.YAMLToJSONStrict(content)
	if err != nil {
		return nil, err
	}
	decoder := json.NewDecoder(bytes.NewReader(converted))
	decoder.UseNumber()
	var document map[string]any
	if err := decoder.Decode(&document); err != nil {
		return nil, errors.New("a mapping is expected")
	}
	return document, nil
}

// plain is a value, or a list of values, in the form of command lines.
func plain(value any) ([]string, error) {
	switch value := value.(type) {
	case nil:
		return []string{""}, nil
	case []any:
		var out []string
		for _, item := range value {
			text, err := plain(item)
			if _, nested := item.([]any); err != nil || nested {
				return nil, errors.New("a list of plain values is expected")
			}
			out = append(out, text...)
		}
		return out, nil
	case map[string]any:
		return nil, errors.New("a value or a list is expected")
	default:
		return []string{fmt.Sprint(value)}, nil
	}
}

func (o *options) check(flags map[string]flag) error {
	for _, name := range slices.Sorted(maps.Keys(o.values)) {
		for _, value := range o.values[name] {
			switch flags[name].kind {
			case boolean:
				if _, err := strconv.ParseBool(value); err != nil {
					return fmt.Errorf("invalid value %q for flag -%s: it is a boolean", value, name)
				}
			case number:
				if _, err := strconv.Atoi(value); err != nil {
					return fmt.Errorf("invalid value %q for flag -%s: it is a number", value, name)
				}
			}
		}
	}
	for _, name := range unsupported {
		if o.set[name] && o.get(name) != "false" && o.get(name) != "" {
			return fmt.Errorf("this stand-in for k3s does not do --%s", name)
		}
	}
	for _, name := range o.split("disable") {
		if !slices.Contains(packaged, name) {
			return fmt.Errorf("--disable knows %v, not %q", packaged, name)
		}
	}
	if o.command == agentCommand && o.get("server") == "" {
		return errors.New("--server is required") // as k3s says it
	}
	if server := o.get("server"); server != "" && !strings.HasPrefix(server, "https://") {
		return fmt.Errorf("only https:// URLs are supported, invalid scheme: %s", server)
	}
	if o.is("cluster-init") && o.get("server") != "" && o.command == serverCommand {
		return errors.New("--cluster-init and --server exclude each other in this stand-in; k3s would ignore one of them")
	}
	for _, pair := range [][2]string{{"token", "token-file"}, {"agent-token", "agent-token-file"}} {
		path := o.get(pair[1])
		if path == "" {
			continue
		}
		if o.get(pair[0]) != "" {
			return fmt.Errorf("--%s and --%s exclude each other", pair[0], pair[1])
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		value := strings.TrimSpace(string(content))
		if value == "" {
			return fmt.Errorf("--%s: %s is empty", pair[1], path)
		}
		o.values[pair[0]] = []string{value}
	}
	if o.command == agentCommand && o.get("token") == "" {
		return errors.New("--token is required") // as k3s says it
	}
	if o.command == serverCommand {
		return checkSnapshots(o)
	}
	return nil
}

// node is who and where this machine is.
type node struct {
	name string
	ip   net.IP
}

func (o *options) node() (node, error) {
	n := node{name: o.get("node-name")}
	if n.name == "" {
		name, err := os.Hostname()
		if err != nil {
			return n, err
		}
		n.name = name
	}
	n.name = strings.ToLower(n.name)
	if o.is("with-node-id") {
		id, err := ensureSecretFile("/etc/rancher/node/id", 4, 0o644)
		if err != nil {
			return n, err
		}
		n.name += "-" + id
	}
	if ips := o.split("node-ip"); len(ips) > 0 {
		if n.ip = net.ParseIP(ips[0]); n.ip == nil {
			return n, fmt.Errorf("--node-ip %s is no address", ips[0])
		}
		return n, nil
	}
	// The address that the default route would use; nothing is sent.
	conn, err := net.Dial("udp", "192.0.2.1:9")
	if err != nil {
		return n, fmt.Errorf("no default route found: %w", err)
	}
	defer conn.Close()
	n.ip = conn.LocalAddr().(*net.UDPAddr).IP
	return n, nil
}
