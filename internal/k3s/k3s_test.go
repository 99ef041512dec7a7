package k3s

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"sigs.k8s.io/yaml"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
	"github.com/hearth-sh/hearth/internal/host"
	"github.com/hearth-sh/hearth/internal/k3s/pki"
	"github.com/hearth-sh/hearth/test/needs"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var update = flag.Bool("update", false, "write the golden files anew")

// Tokens with known secrets, so that they are found wherever they leak to.
const (
	hash         = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	serverSecret = "server-secret-5f2c"
	agentSecret  = "agent-secret-91ab"
)

func token(t testing.TB, s string) pki.Token {
	t.Helper()
	tok, err := pki.ParseToken(s)
	if err != nil {
		t.Fatal(err)
	}
	return tok
}

func yes() *bool { b := true; return &b }
func no() *bool  { b := false; return &b }

func node() Node {
	return Node{InstanceID: "i-0123456789abcdef0", InstanceType: "t4g.xlarge", Region: "eu-central-1", Zone: "eu-central-1a", LifeCycle: "spot",
		IPv4: netip.MustParseAddr("10.0.1.7"), ServicesDomain: "amazonaws.com"}
}

// base is a resolved configuration of a pool, as the profiles make it.
func base(t testing.TB, role v1alpha1.NodeRole, pool v1alpha1.NodePool) Input {
	in := Input{Node: node(), Config: v1alpha1.NodeConfigSpec{
		Role: role, Pool: pool,
		Node:       v1alpha1.NodeRegistration{Labels: map[string]string{"hearth.sh/pool": string(pool)}},
		Cluster:    v1alpha1.ClusterConfig{Name: "hearth", Store: "s3://b/p", Snapshots: v1alpha1.SnapshotsConfig{Schedule: "0 */6 * * *", Retention: 28}},
		K3s:        v1alpha1.K3sConfig{Version: "v1.36.2+k3s1"},
		Network:    v1alpha1.NetworkConfig{CNI: "flannel", FlannelBackend: "vxlan", ClusterCIDR: "10.42.0.0/16", ServiceCIDR: "10.43.0.0/16"},
		Registries: v1alpha1.RegistriesConfig{ECR: no()},
		Addons:     v1alpha1.AddonsConfig{Hearth: v1alpha1.AddonConfig{Enabled: yes()}},
	}}
	taint := func(key, value string) {
		in.Config.Node.Taints = append(in.Config.Node.Taints, v1alpha1.NodeTaint{Key: key, Value: value, Effect: "NoSchedule"})
	}
	switch pool {
	case v1alpha1.PoolControlPlane:
		taint("node-role.kubernetes.io/control-plane", "")
	case v1alpha1.PoolBuild, v1alpha1.PoolObservability:
		taint("hearth.sh/pool", string(pool))
	case v1alpha1.PoolWasm, v1alpha1.PoolBackend:
		in.Config.Shims = []v1alpha1.ShimConfig{{Name: "spin"}}
		taint(v1alpha1.TaintNotReady, "")
	}
	in.Membership = Membership{Server: "https://10.0.1.4:6443", AgentToken: token(t, "K10"+hash+"::node:"+agentSecret)}
	if role == v1alpha1.RoleServer {
		in.Membership.ServerToken = token(t, "K10"+hash+"::server:"+serverSecret)
	}
	return in
}

func founder(t testing.TB) Input {
	in := base(t, v1alpha1.RoleServer, v1alpha1.PoolControlPlane)
	in.Node.LifeCycle = "on-demand"
	in.Membership.Founder, in.Membership.Server, in.Membership.Addons = true, "", true
	in.Charts = map[string][]byte{AddonHearth: []byte("the chart's archive")}
	return in
}

func render(t testing.TB, in Input) Rendered {
	t.Helper()
	r, err := Render(in)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func find(r Rendered, name string) *host.File {
	for i := range r.Files {
		if r.Files[i].Path == name {
			return &r.Files[i]
		}
	}
	return nil
}

func config(t testing.TB, r Rendered) map[string]any {
	t.Helper()
	var files [][]byte
	for _, name := range []string{HearthConfig, ExtraConfig} {
		if f := find(r, name); f != nil {
			files = append(files, f.Content)
		}
	}
	values, err := ReadConfig(files...)
	if err != nil {
		t.Fatal(err)
	}
	return values
}

// show writes everything into one text.
func show(r Rendered) string {
	var b strings.Builder
	for _, f := range r.Files {
		fmt.Fprintf(&b, "==> %s %v secret=%v (%s)\n%s", f.Path, f.Mode, f.Secret, f.Reason, f.Content)
		if len(f.Content) > 0 && !bytes.HasSuffix(f.Content, []byte("\n")) {
			b.WriteByte('\n')
		}
	}
	for _, name := range r.Absent {
		fmt.Fprintf(&b, "==> absent %s\n", name)
	}
	return b.String()
}

func goldenCases(t testing.TB) map[string]Input {
	cases := map[string]Input{"founder": founder(t)}
	for _, pool := range []v1alpha1.NodePool{v1alpha1.PoolControlPlane, v1alpha1.PoolObservability, v1alpha1.PoolWasm, v1alpha1.PoolBuild, v1alpha1.PoolBackend} {
		for _, role := range []v1alpha1.NodeRole{v1alpha1.RoleServer, v1alpha1.RoleAgent} {
			cases[string(role)+"-"+string(pool)] = base(t, role, pool)
		}
	}
	full := founder(t)
	full.Config.Cluster.TLSSANs = []string{"k8s.example.org"}
	full.Config.Cluster.Server = "https://lb.example.org:6443"
	full.Config.Cluster.Snapshots.Bucket, full.Config.Cluster.Snapshots.Region = "s3://backups/prod/etcd", "eu-west-1"
	full.Config.Network.CNI, full.Config.Network.FlannelBackend = "cilium", "none"
	full.Config.Registries = v1alpha1.RegistriesConfig{ECR: yes(), SystemDefault: "public.ecr.aws",
		Mirrors: map[string]v1alpha1.RegistryMirror{"docker.io": {Endpoints: []string{"https://mirror.example.org"}, Rewrite: map[string]string{"^rancher/(.*)": "k3s/$1"}}},
		CAFiles: map[string]string{"mirror.example.org": "/etc/ssl/mirror.pem"}}
	full.Config.K3s.Config = map[string]any{"disable": []any{"traefik"}, "kubelet-arg": []any{"max-pods=200"}, "secrets-encryption": true}
	full.Config.Addons.SpinKube = v1alpha1.AddonConfig{Enabled: yes()}
	full.Config.Addons.CertManager = v1alpha1.AddonConfig{Enabled: yes(), Values: map[string]any{"crds": map[string]any{"keep": true}}}
	full.Config.Addons.Hearth.Values = map[string]any{"engine": map[string]any{"enabled": true}}
	full.AirgapImages = true
	full.SpinKubeCRDs = []byte("# the definitions\n")
	full.Proxy = Proxy{HTTPS: "http://user:pa$$@proxy:3128", No: "example.org, 10.0.0.0/8"}
	cases["founder-with-everything"] = full
	return cases
}

func TestGolden(t *testing.T) {
	for name, in := range goldenCases(t) {
		t.Run(name, func(t *testing.T) {
			got := show(render(t, in))
			file := filepath.Join("testdata", name+".golden")
			if *update {
				if err := errors.Join(os.MkdirAll("testdata", 0o755), os.WriteFile(file, []byte(got), 0o644)); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatalf("%v; -update writes it", err)
			}
			if d := cmp.Diff(string(want), got); d != "" {
				t.Errorf("-want +got:\n%s\n-update writes it anew", d)
			}
		})
	}
}

// Whatever is asked for, k3s of that role must know every key, or it would not
// start (agent) or ignore it (server).
func TestEveryKeyIsAFlagOfItsRole(t *testing.T) {
	flags := Flags()
	if len(flags) < 100 || !flags["cluster-init"].Server || flags["cluster-init"].Agent || !flags["node-label"].List || !flags["node-label"].Agent {
		t.Fatalf("the list of flags is broken: %d", len(flags))
	}
	for name, in := range goldenCases(t) {
		t.Run(name, func(t *testing.T) {
			values := config(t, render(t, in))
			for key, value := range values {
				f, known := flags[key]
				if !known || !f.Takes(in.Config.Role) {
					t.Errorf("k3s as %s has no flag %q", in.Config.Role, key)
				}
				if _, isList := value.([]any); isList && !f.List {
					t.Errorf("%q takes no list", key)
				}
			}
			if values["node-name"] != in.Node.InstanceID || !slices.Contains(values["kubelet-arg"].([]any), any("provider-id=aws:///eu-central-1a/i-0123456789abcdef0")) {
				t.Errorf("the node's name or provider ID is missing: %v", values)
			}
		})
	}
}

func TestSecretsAreOnlyInFilesOfTheirOwn(t *testing.T) {
	for name, in := range goldenCases(t) {
		t.Run(name, func(t *testing.T) {
			in.Proxy = Proxy{HTTP: "http://user:proxy-password@proxy"}
			for _, f := range render(t, in).Files {
				for _, secret := range []string{serverSecret, agentSecret, "proxy-password"} {
					if bytes.Contains(f.Content, []byte(secret)) && (!f.Secret || f.Mode != 0o600) {
						t.Errorf("%s (%#o) has a secret in it", f.Path, f.Mode)
					}
					if in.Config.Role == v1alpha1.RoleAgent && bytes.Contains(f.Content, []byte(serverSecret)) {
						t.Errorf("%s of an agent has the servers' token", f.Path)
					}
				}
			}
			if s := fmt.Sprintf("%v %+v %#v", in, in.Membership, in.Membership); strings.Contains(s, serverSecret) || strings.Contains(s, agentSecret) {
				t.Error("printing the input shows a token")
			}
		})
	}
}

func TestTokenFormsFollowWhoReadsThem(t *testing.T) {
	paths := DefaultPaths()
	joiner := base(t, v1alpha1.RoleServer, v1alpha1.PoolControlPlane)
	for _, tt := range []struct {
		name          string
		in            Input
		token, agents string
	}{
		{"a founder verifies nobody", founder(t), serverSecret, agentSecret},
		{"a joining server verifies the authority", joiner, "K10" + hash + "::server:" + serverSecret, agentSecret},
		{"an agent verifies the authority", base(t, v1alpha1.RoleAgent, v1alpha1.PoolWasm), "K10" + hash + "::node:" + agentSecret, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := render(t, tt.in)
			if f := find(r, paths.TokenFile); f == nil || string(f.Content) != tt.token {
				t.Errorf("the token file is %+v", f)
			}
			f := find(r, paths.AgentTokenFile)
			if tt.agents == "" && f != nil || tt.agents != "" && (f == nil || string(f.Content) != tt.agents) {
				t.Errorf("the agents' token file is %+v", f)
			}
		})
	}
}

func TestExtraConfigIsLaidOver(t *testing.T) {
	for _, tt := range []struct {
		name  string
		role  v1alpha1.NodeRole
		extra map[string]any
		want  map[string]any
		code  fault.Code
	}{
		{"lists that bootstrap writes are added to", v1alpha1.RoleAgent, map[string]any{"kubelet-arg": "max-pods=200"},
			map[string]any{"kubelet-arg": []any{"provider-id=aws:///eu-central-1a/i-0123456789abcdef0", "max-pods=200"}}, ""},
		{"also with a plus sign", v1alpha1.RoleAgent, map[string]any{"kubelet-arg+": []any{"a=1", "b=2"}},
			map[string]any{"kubelet-arg": []any{"provider-id=aws:///eu-central-1a/i-0123456789abcdef0", "a=1", "b=2"}}, ""},
		{"other lists are as they are", v1alpha1.RoleServer, map[string]any{"disable": []any{"traefik"}}, map[string]any{"disable": []any{"traefik"}}, ""},
		{"values win", v1alpha1.RoleServer, map[string]any{"write-kubeconfig-mode": "0640"}, map[string]any{"write-kubeconfig-mode": "0640"}, ""},
		{"both forms at once are a mistake", v1alpha1.RoleAgent, map[string]any{"kubelet-arg": "a=1", "kubelet-arg+": "b=2"}, nil, CodeConfig},
		{"unknown keys are refused", v1alpha1.RoleServer, map[string]any{"no-such-flag": 1}, nil, CodeConfig},
		{"servers' keys are refused on agents", v1alpha1.RoleAgent, map[string]any{"disable": "traefik"}, nil, CodeConfig},
		{"agents' keys are refused on servers", v1alpha1.RoleServer, map[string]any{"disable-apiserver-lb": true}, nil, CodeConfig},
		{"appending to what is no list is refused", v1alpha1.RoleServer, map[string]any{"snapshotter+": "x"}, nil, CodeConfig},
	} {
		t.Run(tt.name, func(t *testing.T) {
			in := base(t, tt.role, v1alpha1.PoolBuild)
			in.Config.K3s.Config = tt.extra
			r, err := Render(in)
			if fault.CodeOf(err) != tt.code || (err == nil) != (tt.code == "") {
				t.Fatalf("got %v, want %q", err, tt.code)
			}
			if err != nil {
				return
			}
			got := config(t, r)
			for key, want := range tt.want {
				if d := cmp.Diff(want, got[key]); d != "" {
					t.Errorf("%s: %s", key, d)
				}
			}
		})
	}
}

func TestCgroupV1IsAllowedByKubeletsFlagAlone(t *testing.T) {
	for _, tt := range []struct {
		config map[string]any
		want   bool
	}{
		{nil, false},
		{map[string]any{"kubelet-arg": []any{"max-pods=1", "fail-cgroupv1=false"}}, true},
		{map[string]any{"kubelet-arg+": "--fail-cgroupv1=false"}, true},
		{map[string]any{"kubelet-arg": "fail-cgroupv1=true"}, false},
		{map[string]any{"kube-proxy-arg": "fail-cgroupv1=false"}, false},
	} {
		if got := AllowsCgroupV1(tt.config); got != tt.want {
			t.Errorf("%v: %v", tt.config, got)
		}
	}
}

func TestRetentionHoldsInTheBucketToo(t *testing.T) {
	for version, want := range map[string]any{"v1.36.2+k3s1": 28.0, "v1.33.1+k3s1": nil} {
		in := founder(t)
		in.Config.K3s.Version, in.Config.Cluster.Snapshots.Bucket = version, "s3://backups"
		values := config(t, render(t, in))
		if values["etcd-snapshot-retention"] != 28.0 || values["etcd-s3-retention"] != want || values["etcd-s3-folder"] != nil || values["etcd-s3-region"] != "eu-central-1" {
			t.Errorf("%s: %v", version, values)
		}
	}
}

func TestIdentityCannotBeClaimedOtherwise(t *testing.T) {
	in := base(t, v1alpha1.RoleAgent, v1alpha1.PoolWasm)
	in.Config.Node.Labels["topology.kubernetes.io/zone"] = "mars"
	in.Node.LifeCycle, in.Node.InstanceType = "", ""
	labels := config(t, render(t, in))["node-label"].([]any)
	want := []any{"hearth.sh/pool=wasm", "topology.kubernetes.io/region=eu-central-1", "topology.kubernetes.io/zone=eu-central-1a"}
	if d := cmp.Diff(want, labels); d != "" {
		t.Error(d)
	}
}

func TestAddressesFollowTheFamiliesOfPods(t *testing.T) {
	v6 := netip.MustParseAddr("2a05:d014::7")
	for _, tt := range []struct {
		name   string
		change func(*Input)
		want   []any
	}{
		{"version 4 alone", func(*Input) {}, []any{"10.0.1.7"}},
		{"version 6 alone", func(in *Input) { in.Node.IPv4, in.Node.IPv6 = netip.Addr{}, v6 }, []any{"2a05:d014::7"}},
		{"both, pods have one", func(in *Input) { in.Node.IPv6 = v6 }, []any{"10.0.1.7"}},
		{"both, pods have both", func(in *Input) { in.Node.IPv6 = v6; in.Config.Network.ClusterCIDR = "10.42.0.0/16,fd42::/56" }, []any{"10.0.1.7", "2a05:d014::7"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			in := base(t, v1alpha1.RoleAgent, v1alpha1.PoolWasm)
			tt.change(&in)
			if d := cmp.Diff(any(tt.want), config(t, render(t, in))["node-ip"]); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestInconsistentInputIsRefused(t *testing.T) {
	for name, change := range map[string]func(*Input){
		"no role":                  func(in *Input) { in.Config.Role = "" },
		"no identity":              func(in *Input) { in.Node.InstanceID = "" },
		"no address":               func(in *Input) { in.Node.IPv4 = netip.Addr{} },
		"an agent that founds":     func(in *Input) { in.Membership.Founder, in.Membership.Server = true, "" },
		"founding and joining":     func(in *Input) { in.Config.Role, in.Membership.Founder = v1alpha1.RoleServer, true },
		"neither":                  func(in *Input) { in.Membership.Server = "" },
		"http":                     func(in *Input) { in.Membership.Server = "http://10.0.0.1:6443" },
		"a path":                   func(in *Input) { in.Membership.Server = "https://10.0.0.1:6443/x" },
		"no token":                 func(in *Input) { in.Membership.AgentToken = pki.Token{} },
		"a server without one":     func(in *Input) { in.Config.Role = v1alpha1.RoleServer },
		"an agent with a server's": func(in *Input) { in.Membership.ServerToken = token(t, "K10"+hash+"::server:x") },
		"a proxy of two lines":     func(in *Input) { in.Proxy.HTTP = "http://x\nK3S_TOKEN=y" },
	} {
		t.Run(name, func(t *testing.T) {
			in := base(t, v1alpha1.RoleAgent, v1alpha1.PoolWasm)
			change(&in)
			if _, err := Render(in); fault.CodeOf(err) != CodeConfig {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestAddons(t *testing.T) {
	chartOf := func(t *testing.T, r Rendered, manifest string) helmChart {
		t.Helper()
		f := find(r, DefaultPaths().Manifests+"/"+manifest+".yaml")
		if f == nil {
			t.Fatalf("no %s", manifest)
		}
		var h helmChart
		if err := yaml.UnmarshalStrict(f.Content, &h); err != nil {
			t.Fatal(err)
		}
		return h
	}
	t.Run("a chart that comes along is embedded", func(t *testing.T) {
		h := chartOf(t, render(t, founder(t)), manifestHearth)
		if b, _ := base64.StdEncoding.DecodeString(h.Spec.ChartContent); string(b) != "the chart's archive" || h.Spec.Chart != "" || !h.Spec.Bootstrap {
			t.Errorf("got %+v", h)
		}
	})
	t.Run("one's own chart wins", func(t *testing.T) {
		in := founder(t)
		in.Config.Addons.Hearth.Chart, in.Config.Addons.Hearth.Version = "oci://example.org/hearth", "1.2.3"
		h := chartOf(t, render(t, in), manifestHearth)
		if h.Spec.Chart != "oci://example.org/hearth" || h.Spec.Version != "1.2.3" || h.Spec.ChartContent != "" {
			t.Errorf("got %+v", h)
		}
	})
	t.Run("values are laid over the addon's", func(t *testing.T) {
		h := chartOf(t, render(t, goldenCases(t)["founder-with-everything"]), manifestCertManager)
		if h.Spec.ValuesContent != "crds:\n  enabled: true\n  keep: true\n" {
			t.Errorf("got %q", h.Spec.ValuesContent)
		}
	})
	t.Run("values are laid over those of a chart that comes along", func(t *testing.T) {
		in := founder(t)
		in.Values = map[string]map[string]any{AddonHearth: {"image": map[string]any{"tag": "v1", "pullPolicy": "Never"}}}
		in.Config.Addons.Hearth.Values = map[string]any{"image": map[string]any{"tag": "v2"}}
		if h := chartOf(t, render(t, in), manifestHearth); h.Spec.ValuesContent != "image:\n  pullPolicy: Never\n  tag: v2\n" {
			t.Errorf("got %q", h.Spec.ValuesContent)
		}
		in.Config.Addons.Hearth.Chart = "oci://example.org/hearth"
		if h := chartOf(t, render(t, in), manifestHearth); h.Spec.ValuesContent != "image:\n  tag: v2\n" {
			t.Errorf("a chart of the owner's has values of ours: %q", h.Spec.ValuesContent)
		}
	})
	t.Run("nothing comes from Docker Hub", func(t *testing.T) {
		for name, up := range upstreams {
			if strings.Contains(up.chart, "docker.io") {
				t.Error(name)
			}
		}
	})
	t.Run("without the agent no class waits for its label", func(t *testing.T) {
		in := goldenCases(t)["founder-with-everything"]
		in.Config.Addons.Hearth.Enabled = no()
		f := find(render(t, in), DefaultPaths().Manifests+"/"+manifestSpinExecutor+".yaml")
		if f == nil || bytes.Contains(f.Content, []byte("nodeSelector")) {
			t.Errorf("got %s", f.Content)
		}
	})
	t.Run("manifests have names of their own before the first dot", func(t *testing.T) {
		seen := map[string]bool{}
		for _, f := range render(t, goldenCases(t)["founder-with-everything"]).Files {
			if filepath.Dir(f.Path) != DefaultPaths().Manifests || f.Mode.IsDir() {
				continue
			}
			name, _, _ := strings.Cut(filepath.Base(f.Path), ".")
			if seen[name] || !strings.HasPrefix(name, "hearth-") {
				t.Errorf("%s", f.Path)
			}
			seen[name] = true
		}
		if len(seen) != 5 {
			t.Errorf("got %v", seen)
		}
	})
	for name, change := range map[string]func(*Input){
		"no chart":                  func(in *Input) { in.Charts = nil },
		"too large a chart":         func(in *Input) { in.Charts[AddonHearth] = make([]byte, maxChart+1) },
		"SpinKube's resources lack": func(in *Input) { in.Config.Addons.SpinKube.Enabled = yes() },
	} {
		t.Run(name, func(t *testing.T) {
			in := founder(t)
			change(&in)
			if _, err := Render(in); fault.CodeOf(err) != CodeAddon {
				t.Errorf("got %v", err)
			}
		})
	}
	t.Run("a server that carries none needs no chart", func(t *testing.T) {
		in := base(t, v1alpha1.RoleServer, v1alpha1.PoolControlPlane)
		for _, f := range render(t, in).Files {
			if strings.HasPrefix(f.Path, DefaultPaths().Manifests) {
				t.Errorf("%s", f.Path)
			}
		}
	})
}

// The files must be installable, and installed twice must change nothing.
func TestRenderedFilesAreAcceptedByHost(t *testing.T) {
	for name, in := range goldenCases(t) {
		t.Run(name, func(t *testing.T) {
			h, err := host.New(host.Options{Root: t.TempDir()})
			if err != nil {
				t.Fatal(err)
			}
			r := render(t, in)
			for _, absent := range r.Absent {
				if find(r, absent) != nil {
					t.Errorf("%s is wanted and unwanted", absent)
				}
			}
			if _, err := h.Apply(t.Context(), r.Files); err != nil {
				t.Fatal(err)
			}
			again, err := h.Apply(t.Context(), render(t, in).Files)
			if err != nil || slices.ContainsFunc(again, host.Change.Changed) {
				t.Errorf("the second time: %s %v", host.Text(again), err)
			}
		})
	}
}

func TestReadConfigMergesLikeK3s(t *testing.T) {
	got, err := ReadConfig([]byte("a: 1\nb: [x]\nc: old\n"), []byte("b+: [u, z]\nc: new\nd+: only\n"), nil, []byte("b+: w\n"))
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]any{"a": 1.0, "b": []any{"x", "u", "z", "w"}, "c": "new", "d": "only"}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	for _, bad := range []string{"a: [", "- a", "a: 1\na: 2"} {
		if _, err := ReadConfig([]byte(bad)); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

func TestUnitIsLikeUpstreams(t *testing.T) {
	unit := string(find(render(t, founder(t)), "/etc/systemd/system/k3s.service").Content)
	for _, line := range []string{"Type=notify", "TimeoutStartSec=0", "Delegate=yes", "KillMode=process", "Restart=always", "RestartSec=5s", "LimitNOFILE=1048576",
		"TasksMax=infinity", "ExecStart=/usr/local/bin/k3s server", "After=network-online.target", "WantedBy=multi-user.target"} {
		if !strings.Contains(unit, "\n"+line+"\n") {
			t.Errorf("lacks %s", line)
		}
	}
	// A unit that cloud-init starts must not wait for cloud-init's end.
	for _, word := range []string{"cloud-final", "cloud-init", "After=multi-user"} {
		if strings.Contains(unit, word) {
			t.Errorf("has %s", word)
		}
	}
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		t.Log("systemd-analyze is not here; internal/systemd starts such units for real")
		return
	}
	dir := t.TempDir()
	for _, in := range []Input{founder(t), base(t, v1alpha1.RoleAgent, v1alpha1.PoolWasm)} {
		f := find(render(t, in), "/etc/systemd/system/"+Unit(in.Config.Role))
		file := filepath.Join(dir, Unit(in.Config.Role))
		// Only the program is not on this machine.
		if err := os.WriteFile(file, bytes.ReplaceAll(f.Content, []byte(Binary), []byte("/bin/true")), 0o644); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command("systemd-analyze", "verify", "--man=no", file).CombinedOutput(); err != nil || bytes.Contains(out, []byte(filepath.Base(file)+":")) {
			t.Errorf("%v %s", err, out)
		}
	}
}

func TestVersions(t *testing.T) {
	for s, want := range map[string]Version{
		"v1.36.2+k3s1":      {1, 36, 2, "", "k3s1"},
		"v1.37.0-rc2+k3s10": {1, 37, 0, "rc2", "k3s10"},
		"v1.36.2":           {1, 36, 2, "", ""},
	} {
		got, err := ParseVersion(s)
		if err != nil || got != want || got.String() != s {
			t.Errorf("%s: %+v, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "1.36.2", "v1.36", "v1.36.2+", "v01.2.3", "v1.2.3 ", "v1.2.3\n", "v99999.1.1", "stable", "v1.36.2+k3s1/../x"} {
		if v, err := ParseVersion(s); err == nil {
			t.Errorf("%q is %v", s, v)
		}
	}
	if v, err := ParseVersionOutput("k3s version v1.36.2+k3s1 (4a1b2c3d)\ngo version go1.25.5\n"); err != nil || v.String() != "v1.36.2+k3s1" {
		t.Errorf("got %v, %v", v, err)
	}
	if _, err := ParseVersionOutput("bash: k3s: command not found"); err == nil {
		t.Error("accepted")
	}
	ordered := []string{"v1.35.9", "v1.36.0-rc1", "v1.36.0-rc2", "v1.36.0", "v1.36.2+k3s1", "v1.36.10", "v1.37.0"}
	for i, a := range ordered {
		for j, b := range ordered {
			va, _ := ParseVersion(a)
			vb, _ := ParseVersion(b)
			if got := va.Compare(vb); (got < 0) != (i < j) || (got > 0) != (i > j) {
				t.Errorf("%s to %s: %d", a, b, got)
			}
		}
	}
}

func TestSkew(t *testing.T) {
	for _, tt := range []struct {
		role          v1alpha1.NodeRole
		node, cluster string
		ok            bool
	}{
		{v1alpha1.RoleAgent, "v1.36.2+k3s1", "v1.36.1+k3s1", true},
		{v1alpha1.RoleAgent, "v1.33.0", "v1.36.0", true},
		{v1alpha1.RoleAgent, "v1.32.0", "v1.36.0", false},
		{v1alpha1.RoleAgent, "v1.37.0", "v1.36.0", false},
		{v1alpha1.RoleServer, "v1.37.0", "v1.36.0", true},
		{v1alpha1.RoleServer, "v1.35.0", "v1.36.0", true},
		{v1alpha1.RoleServer, "v1.34.0", "v1.36.0", false},
		{v1alpha1.RoleServer, "v1.38.0", "v1.36.0", false},
		{v1alpha1.RoleServer, "v2.36.0", "v1.36.0", false},
	} {
		node, _ := ParseVersion(tt.node)
		cluster, _ := ParseVersion(tt.cluster)
		err := Skew(tt.role, node, cluster)
		if (err == nil) != tt.ok || err != nil && fault.CodeOf(err) != CodeSkew {
			t.Errorf("%+v: %v", tt, err)
		}
	}
}

func put(t testing.TB, root, name, content string) {
	t.Helper()
	p := filepath.Join(root, name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(p), 0o755), os.WriteFile(p, []byte(content), 0o644)); err != nil {
		t.Fatal(err)
	}
}

func TestReadState(t *testing.T) {
	root, p := t.TempDir(), DefaultPaths()
	s, err := ReadState(root, p)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(State{}, s); d != "" {
		t.Errorf("an empty machine: %s", d)
	}
	m := Marker{Cluster: "hearth", Generation: 3, Role: v1alpha1.RoleServer, Node: "i-1", CAHash: hash}
	f, err := m.File(p)
	if err != nil {
		t.Fatal(err)
	}
	put(t, root, f.Path, string(f.Content))
	for _, name := range []string{Binary, p.DataDir + "/data/current/bin/k3s", p.EtcdDir + "/member/wal/x", p.KubeletKubeconfig, ConfigFile, HearthConfig, ConfigDir + "/50-mine.yaml", ConfigDir + "/readme.txt"} {
		put(t, root, name, "")
	}
	s, err = ReadState(root, p)
	if err != nil {
		t.Fatal(err)
	}
	want := State{Binary: true, Extracted: true, ServerData: true, AgentData: true, Etcd: true, Marker: &m, OtherConfig: []string{ConfigFile, ConfigDir + "/50-mine.yaml"}}
	if d := cmp.Diff(want, s); d != "" {
		t.Error(d)
	}
	for _, bad := range []string{"", "{", `{"cluster":"x"}`, `{"cluster":"x","generation":0,"role":"server","node":"i"}`, string(f.Content) + "x", `{"cluster":"x","generation":1,"role":"king","node":"i"}`} {
		put(t, root, p.Marker, bad)
		if _, err := ReadState(root, p); fault.CodeOf(err) != CodeState {
			t.Errorf("%q: %v", bad, err)
		}
	}
	if _, err := (Marker{}).File(p); err == nil {
		t.Error("an empty marker was written")
	}
}

func FuzzParseMarker(f *testing.F) {
	f.Add([]byte(`{"cluster":"hearth","generation":3,"role":"server","node":"i-1"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := ParseMarker(b)
		if err != nil {
			return
		}
		again, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		if n, err := ParseMarker(again); err != nil || n != m {
			t.Errorf("%+v became %+v, %v", m, n, err)
		}
	})
}

func FuzzParseVersion(f *testing.F) {
	f.Add("v1.36.2+k3s1")
	f.Fuzz(func(t *testing.T, s string) {
		v, err := ParseVersion(s)
		if err == nil && v.String() != s {
			t.Errorf("%q became %q", s, v)
		}
	})
}

func FuzzReadConfig(f *testing.F) {
	f.Add([]byte("a: 1\nb+: [x]\n"), []byte("b+: y"))
	f.Fuzz(func(t *testing.T, a, b []byte) {
		if len(a)+len(b) > 1<<14 {
			return
		}
		_, _ = ReadConfig(a, b) // must come to an end
	})
}

func TestOnlyK3sProcessesAreDoomed(t *testing.T) {
	o := CleanupOptions{Paths: DefaultPaths()}
	all := []process{
		{1, 0, "/usr/lib/systemd/systemd", []string{"/sbin/init"}},
		{10, 1, "/var/lib/rancher/k3s/data/abc/bin/containerd", []string{"containerd"}},
		{11, 1, "/var/lib/rancher/k3s/data/abc/bin/containerd-shim-runc-v2", []string{"/var/lib/rancher/k3s/data/abc/bin/containerd-shim-runc-v2", "-address", "/run/k3s/containerd/containerd.sock"}},
		{12, 11, "/pause", []string{"/pause"}},
		{13, 12, "/bin/app", []string{"app"}},
		{14, 1, "/usr/local/bin/containerd-shim-spin-v2", []string{"/usr/local/bin/containerd-shim-spin-v2", "-namespace", "k8s.io", "-address", "/run/k3s/containerd/containerd.sock"}},
		{20, 1, "/usr/bin/containerd-shim-runc-v2", []string{"/usr/bin/containerd-shim-runc-v2", "-address", "/run/containerd/containerd.sock"}},
		{21, 20, "/bin/other", []string{"other"}},
		{22, 1, "/usr/bin/vi", []string{"vi", "/run/k3s/containerd/containerd.sock"}},
		{23, 1, "/var/lib/rancher/k3s-other/data/x", []string{"x"}},
		{30, 11, "/bin/sh", []string{"sh"}}, // a shell in a container, from which reset is run
		{31, 30, "/usr/bin/bootstrap", []string{"bootstrap", "reset"}},
	}
	if d := cmp.Diff([]int{10, 12, 13, 14}, o.doomed(all, 31)); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff([]int{10, 11, 12, 13, 14, 30, 31}, o.doomed(all, 99)); d != "" {
		t.Error(d)
	}
}

func TestMountsAreFoundInnermostFirst(t *testing.T) {
	info := `22 1 8:1 / / rw - ext4 /dev/root rw
30 22 0:25 / /run rw - tmpfs tmpfs rw
31 30 0:26 / /run/k3s/containerd/x rw - overlay overlay rw
32 31 0:27 / /run/k3s/containerd/x/shm\040dir rw - tmpfs shm rw
33 22 0:28 / /run/k3s-other rw - tmpfs tmpfs rw
34 22 0:29 / /var/lib/kubelet/pods/a/volumes/t rw - tmpfs tmpfs rw
35 30 0:4 net:[1] /run/netns/cni-123 rw - nsfs nsfs rw
36 30 0:4 net:[1] /run/netns/mine rw - nsfs nsfs rw
broken
`
	want := []string{"/run/netns/cni-123", "/var/lib/kubelet/pods/a/volumes/t", "/run/k3s/containerd/x/shm dir", "/run/k3s/containerd/x"}
	if d := cmp.Diff(want, mounts(info, mountPrefixes)); d != "" {
		t.Error(d)
	}
}

func TestRulesOfOthersStay(t *testing.T) {
	rules := "*filter\n:INPUT ACCEPT [0:0]\n:KUBE-SERVICES - [0:0]\n-A INPUT -p tcp --dport 22 -j ACCEPT\n-A INPUT -j KUBE-FIREWALL\n-A POSTROUTING -m comment --comment \"flanneld masq\" -j FLANNEL-POSTRTG\n-A X -j CNI-HOSTPORT\nCOMMIT\n"
	kept, dropped := withoutOurs([]byte(rules))
	if want := "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -p tcp --dport 22 -j ACCEPT\nCOMMIT\n"; string(kept) != want || dropped != 4 {
		t.Errorf("dropped %d, kept %q", dropped, kept)
	}
}

// Real mounts and a real process, below a root of the test's own.
func TestCleanup(t *testing.T) {
	root, p := t.TempDir(), DefaultPaths()
	for _, name := range []string{p.EtcdDir + "/member/x", p.DataDir + "/data/abc/bin/x", p.DataDir + "/agent/images/a.tar", p.DataDir + "/agent/containerd/blob", p.DataDir + "/agent/client-ca.crt",
		p.KubeletKubeconfig, p.Marker, AdminKubeconfig, NodePassword, "/var/lib/cni/networks/x", "/var/lib/kubelet/pki/x", "/var/lib/kubelet/pods/a/v/x", "/run/k3s/containerd/x/y", "/var/lib/other/x", "/etc/rancher/k3s/registries.yaml"} {
		put(t, root, name, "x")
	}
	mount := func(name string) {
		target := filepath.Join(root, name)
		if err := os.MkdirAll(target, 0o755); err != nil {
			t.Fatal(err)
		}
		needs.Tmpfs(t, target, "size=64k")
	}
	mount("/run/k3s/containerd/x")
	mount("/run/k3s/containerd/x/shm")
	mount("/var/lib/kubelet/pods/a/v")
	mount("/var/lib/other/mine")
	put(t, root, "/var/lib/other/mine/keep", "x")

	// The process is really there; /proc of the test's root tells of it alone.
	sleeper := exec.Command("sleep", "1000")
	if err := sleeper.Start(); err != nil {
		t.Fatal(err)
	}
	proc := "/proc/" + fmt.Sprint(sleeper.Process.Pid)
	put(t, root, proc+"/stat", fmt.Sprintf("%d (containerd-shim (x)) S 1 0", sleeper.Process.Pid))
	put(t, root, proc+"/cmdline", "/usr/local/bin/containerd-shim-spin-v2\x00-address\x00/run/k3s/containerd/containerd.sock\x00")
	ended := make(chan struct{})
	go func() {
		_ = sleeper.Wait() // killed
		_ = os.RemoveAll(filepath.Join(root, proc))
		close(ended)
	}()
	defer func() { _ = sleeper.Process.Kill(); <-ended }()

	put(t, root, "/sys/class/net/cni0/brif/veth1/x", "")
	put(t, root, "/sys/class/net/eth0/x", "")
	var calls []string
	o := CleanupOptions{root: root, Data: ClusterData, run: func(_ context.Context, stdin []byte, name string, args ...string) ([]byte, error) {
		calls = append(calls, strings.Join(append([]string{name}, args...), " "))
		switch name {
		case "iptables-save":
			return []byte("*nat\n-A X -j KUBE-SVC\nCOMMIT\n"), nil
		case "ip6tables-save":
			return nil, fmt.Errorf("ip6tables-save: %w", exec.ErrNotFound)
		case "nft":
			return []byte("table ip kube-proxy\ntable inet firewalld\ntable ip6 kube-proxy\n"), nil
		}
		return nil, nil
	}}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	r, err := Cleanup(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Killed) != 1 || r.Rules != 1 || len(r.Unmounted) != 3 {
		t.Errorf("got %+v", r)
	}
	if d := cmp.Diff([]string{"ip link delete veth1", "ip link delete cni0", "iptables-save", "iptables-restore", "ip6tables-save",
		"nft list tables", "nft delete table ip kube-proxy", "nft delete table ip6 kube-proxy"}, calls); d != "" {
		t.Error(d)
	}
	check := func(gone, there []string) {
		t.Helper()
		for _, name := range gone {
			if exists(filepath.Join(root, name)) {
				t.Errorf("%s is still there", name)
			}
		}
		for _, name := range there {
			if !exists(filepath.Join(root, name)) {
				t.Errorf("%s is gone", name)
			}
		}
	}
	strangers := []string{"/var/lib/other/mine/keep", "/etc/rancher/k3s/registries.yaml"}
	check([]string{p.EtcdDir, p.Marker, p.KubeletKubeconfig, p.DataDir + "/agent/client-ca.crt", AdminKubeconfig, "/run/k3s", "/var/lib/kubelet/pki"},
		append(strangers, p.DataDir+"/data/abc/bin/x", p.DataDir+"/agent/images/a.tar", p.DataDir+"/agent/containerd/blob", NodePassword))

	put(t, root, "/usr/libexec/kubernetes/owner", "")
	if err := os.MkdirAll(filepath.Join(root, "/usr/libexec/kubernetes/kubelet-plugins/volume/exec"), 0o755); err != nil {
		t.Fatal(err)
	}
	o.Data = AllData
	if _, err := Cleanup(ctx, o); err != nil {
		t.Fatal(err)
	}
	check([]string{p.DataDir, filepath.Dir(NodePassword), "/var/lib/kubelet", "/var/lib/cni", "/usr/libexec/kubernetes/kubelet-plugins"},
		append(strangers, "/usr/libexec/kubernetes/owner"))
	if r, err := Cleanup(ctx, o); err != nil || len(r.Directories)+len(r.Killed)+len(r.Unmounted) > 0 {
		t.Errorf("a second time: %+v, %v", r, err)
	}
}

func TestDataOnAVolumeOfItsOwnIsEmptied(t *testing.T) {
	root, volume := t.TempDir(), t.TempDir()
	put(t, volume, "server/db/x", "x")
	if err := errors.Join(os.MkdirAll(filepath.Join(root, "/var/lib/rancher"), 0o755), os.Mkdir(filepath.Join(root, "proc"), 0o755), os.Symlink(volume, filepath.Join(root, DefaultDataDir))); err != nil {
		t.Fatal(err)
	}
	o := CleanupOptions{root: root, Data: AllData, run: func(context.Context, []byte, string, ...string) ([]byte, error) { return nil, nil }}
	if _, err := Cleanup(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	if entries, err := os.ReadDir(volume); err != nil || len(entries) > 0 {
		t.Errorf("left %v, %v", entries, err)
	}
	if !exists(filepath.Join(root, DefaultDataDir)) {
		t.Error("the link is gone")
	}
}

func TestNothingIsRemovedThroughAMount(t *testing.T) {
	root := t.TempDir()
	mine := filepath.Join(root, "/var/lib/kubelet/mine")
	if err := errors.Join(os.MkdirAll(mine, 0o755), os.Mkdir(filepath.Join(root, "proc"), 0o755)); err != nil {
		t.Fatal(err)
	}
	needs.Tmpfs(t, mine, "size=64k")
	put(t, mine, "keep", "x")
	o := CleanupOptions{root: root, Data: AllData, run: func(context.Context, []byte, string, ...string) ([]byte, error) { return nil, nil }}
	if _, err := Cleanup(t.Context(), o); fault.CodeOf(err) != CodeCleanup || !strings.Contains(err.Error(), mine) {
		t.Errorf("got %v", err)
	}
	if !exists(filepath.Join(mine, "keep")) {
		t.Error("a file on somebody's mount is gone")
	}
}

func TestEveryCodeIsExplained(t *testing.T) {
	source, err := os.ReadFile("codes.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range Explanations() {
		if e.Meaning == "" || e.Remedy == "" {
			t.Errorf("%+v", e)
		}
	}
	if n := bytes.Count(source, []byte("fault.Code = ")); n != len(Explanations()) {
		t.Errorf("%d codes, %d explanations", n, len(Explanations()))
	}
}

func TestASnapshotIsLookedForWhereItIs(t *testing.T) {
	for snapshot, want := range map[string][]string{
		"etcd-snapshot-i-1-1790000000": {"server", "--cluster-reset", "--cluster-reset-restore-path=etcd-snapshot-i-1-1790000000"},
		// Even where there is a bucket, which is in the configuration.
		"/var/backups/snapshot": {"server", "--cluster-reset", "--cluster-reset-restore-path=/var/backups/snapshot", "--etcd-s3=false"},
	} {
		if got := RestoreArguments(snapshot); !slices.Equal(got, want) {
			t.Errorf("%s: %q", snapshot, got)
		}
	}
}
