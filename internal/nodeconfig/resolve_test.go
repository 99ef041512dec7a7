package nodeconfig

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
)

const (
	head   = "apiVersion: hearth.sh/v1alpha1\nkind: NodeConfig\n"
	digest = "2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"
	key    = "ed25519:MCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqA="
	// least is what no source may leave out.
	least = head + `spec:
  cluster: {store: s3://bucket/prefix}
  k3s: {version: v1.36.2+k3s1}
  artifacts: {manifest: https://example.com/m.json, publicKeys: ["` + key + `"]}
  registries: {systemDefault: registry.example.com}
`
)

// spec is a document of one section.
func spec(lines ...string) string { return head + "spec:\n  " + strings.Join(lines, "\n  ") + "\n" }

func write(t *testing.T, dir, name, text string) string {
	t.Helper()
	name = filepath.Join(dir, name)
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// resolve lays documents over what is the least.
func resolve(t *testing.T, documents ...string) (Resolved, error) {
	t.Helper()
	dir := t.TempDir()
	files := []string{write(t, dir, "least.yaml", least)}
	for i, d := range documents {
		files = append(files, write(t, dir, fmt.Sprintf("%d.yaml", i), d))
	}
	return Resolve(t.Context(), Sources{Files: files})
}

func mustResolve(t *testing.T, s Sources) Resolved {
	t.Helper()
	r, err := Resolve(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func problemsOf(t *testing.T, err error) []Problem {
	t.Helper()
	var invalid *Invalid
	if !errors.As(err, &invalid) {
		t.Fatalf("the error has no problems: %v", err)
	}
	return invalid.Problems
}

func TestLaterSourcesWin(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "10-first.yaml", least+"---\n"+spec("pool: build", "node: {labels: {a.example/x: file, a.example/y: file}}", "timeouts: {fetch: 1m}"))
	write(t, dir, "20-second.yaml", spec("node: {labels: {a.example/y: second}}", "timeouts: {fetch: 2m, join: 2m}"))
	write(t, dir, "README.txt", "not read")
	write(t, dir, ".hidden.yaml", "not read: [")
	r := mustResolve(t, Sources{
		Dir:      dir,
		UserData: []byte(spec("pool: backend", "timeouts: {join: 3m}")),
		Tags:     map[string]string{"hearth.sh:pool": "observability", "hearth.sh:cluster": "tagged", "Name": "x"},
		Instance: &Instance{Region: "eu-central-1", Arch: "arm64"},
	})
	s := r.Config.Spec
	for what, c := range map[string]struct{ got, want any }{
		"the tag's pool":               {s.Pool, v1alpha1.PoolObservability},
		"its profile's role":           {s.Role, v1alpha1.RoleAgent},
		"its label":                    {s.Node.Labels["hearth.sh/pool"], "observability"},
		"a label of the first file":    {s.Node.Labels["a.example/x"], "file"},
		"the second file over it":      {s.Node.Labels["a.example/y"], "second"},
		"a time of the second file":    {s.Timeouts.Fetch, v1alpha1.Duration("2m")},
		"user-data over it":            {s.Timeouts.Join, v1alpha1.Duration("3m")},
		"a default":                    {s.Timeouts.Total, v1alpha1.Duration("30m")},
		"the region of the instance":   {s.Cluster.Region, "eu-central-1"},
		"a name of a tag":              {s.Cluster.Name, "tagged"},
		"origin: tag":                  {r.Origins["spec.pool"].String(), "tag hearth.sh:pool"},
		"origin: profile":              {r.Origins["spec.role"].String(), "built-in profile observability"},
		"origin: first file":           {r.Origins[`spec.node.labels["a.example/x"]`].String(), filepath.Join(dir, "10-first.yaml") + ", line 13"},
		"origin: second file":          {r.Origins["spec.timeouts.fetch"].String(), filepath.Join(dir, "20-second.yaml") + ", line 5"},
		"origin: user-data":            {r.Origins["spec.timeouts.join"].String(), "user-data, line 5"},
		"origin: default":              {r.Origins["spec.timeouts.total"].String(), "default"},
		"origin: instance":             {r.Origins["spec.cluster.region"].String(), "instance metadata"},
		"no taint of the other pools":  {len(s.Node.Taints), 1},
		"no shim of the other pools":   {len(s.Shims), 0},
		"no startup taint without one": {s.Node.Taints[0].Key, "hearth.sh/pool"},
	} {
		if c.got != c.want {
			t.Errorf("%s: got %v, want %v", what, c.got, c.want)
		}
	}
}

func TestNamedFilesReplaceTheSources(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "bad.yaml", "nonsense: true")
	r := mustResolve(t, Sources{
		Files:    []string{write(t, t.TempDir(), "x.yaml", least)},
		Dir:      dir,
		UserData: []byte{0, 1, 2},
		Tags:     map[string]string{"hearth.sh:pool": "nonsense", tagAutoScalingGroup: "group"},
	})
	if r.Config.Spec.Pool != v1alpha1.PoolWasm {
		t.Errorf("the pool is %s", r.Config.Spec.Pool)
	}
}

func TestMergeOfValues(t *testing.T) {
	taint := func(key, value, effect string) v1alpha1.NodeTaint {
		return v1alpha1.NodeTaint{Key: key, Value: value, Effect: effect}
	}
	pool := taint("hearth.sh/pool", "build", "NoSchedule")
	for name, c := range map[string]struct {
		documents []string
		got       func(v1alpha1.NodeConfigSpec) any
		want      any
	}{
		"taints of another key are added": {
			[]string{spec("pool: build", "node: {taints: [{key: a, effect: NoExecute}]}"), spec("node: {taints: [{key: b, effect: NoExecute}]}")},
			func(s v1alpha1.NodeConfigSpec) any { return s.Node.Taints },
			[]v1alpha1.NodeTaint{pool, taint("a", "", "NoExecute"), taint("b", "", "NoExecute")},
		},
		"a taint of another effect is added": {
			[]string{spec("pool: build", "node: {taints: [{key: hearth.sh/pool, value: build, effect: NoExecute}]}")},
			func(s v1alpha1.NodeConfigSpec) any { return s.Node.Taints },
			[]v1alpha1.NodeTaint{pool, taint("hearth.sh/pool", "build", "NoExecute")},
		},
		"a taint of the same key and effect replaces": {
			[]string{spec("pool: build", "node: {taints: [{key: hearth.sh/pool, value: other, effect: NoSchedule}]}")},
			func(s v1alpha1.NodeConfigSpec) any { return s.Node.Taints },
			[]v1alpha1.NodeTaint{taint("hearth.sh/pool", "other", "NoSchedule")},
		},
		"a pool with shims gets the startup taint": {
			[]string{spec("pool: wasm")},
			func(s v1alpha1.NodeConfigSpec) any { return s.Node.Taints },
			[]v1alpha1.NodeTaint{taint("hearth.sh/not-ready", "", "NoSchedule")},
		},
		"without our addon nobody would remove the startup taint": {
			[]string{spec("addons: {hearth: {enabled: false}}")},
			func(s v1alpha1.NodeConfigSpec) any { return len(s.Node.Taints) },
			0,
		},
		"lists are replaced": {
			[]string{spec("cluster: {tlsSANs: [a.example, b.example]}"), spec("cluster: {tlsSANs: [c.example]}")},
			func(s v1alpha1.NodeConfigSpec) any { return s.Cluster.TLSSANs },
			[]string{"c.example"},
		},
		"an empty list replaces the profile's": {
			[]string{spec("shims: []")},
			func(s v1alpha1.NodeConfigSpec) any { return len(s.Shims) + len(s.Node.Taints) },
			0,
		},
		"free-form maps are merged": {
			[]string{spec("addons: {hearth: {values: {a: {b: 1, c: [1, 2]}}}}"), spec("addons: {hearth: {values: {a: {c: [3], d: null}}}}")},
			func(s v1alpha1.NodeConfigSpec) any { return s.Addons.Hearth.Values },
			map[string]any{"a": map[string]any{"b": 1.0, "c": []any{3.0}, "d": nil}},
		},
		"the documents of a file are layers": {
			[]string{spec("pool: build") + "---\n" + spec("pool: backend") + "---\n# nothing\n---\n"},
			func(s v1alpha1.NodeConfigSpec) any { return s.Pool },
			v1alpha1.PoolBackend,
		},
		"phases of a short run are not longer": {
			[]string{spec("timeouts: {total: 4m}")},
			func(s v1alpha1.NodeConfigSpec) any { return s.Timeouts },
			v1alpha1.TimeoutsConfig{Total: "4m", Fetch: "4m", Join: "4m", Ready: "4m", Prove: "2m"},
		},
		"a section without lines says nothing": {
			[]string{spec("cluster:", "node: {labels: }", "timeouts:")},
			func(s v1alpha1.NodeConfigSpec) any { return s.Cluster.Store },
			"s3://bucket/prefix",
		},
		"aliases are followed": {
			[]string{spec("registries: {mirrors: {quay.io: &m {endpoints: [https://mirror.example]}, ghcr.io: *m}}")},
			func(s v1alpha1.NodeConfigSpec) any { return s.Registries.Mirrors["ghcr.io"].Endpoints },
			[]string{"https://mirror.example"},
		},
		"cert-manager follows SpinKube": {
			[]string{spec("addons: {spinkube: {enabled: true}}")},
			func(s v1alpha1.NodeConfigSpec) any { return *s.Addons.CertManager.Enabled },
			true,
		},
		"flannel is off where the network is handed over": {
			[]string{spec("network: {cni: cilium}")},
			func(s v1alpha1.NodeConfigSpec) any { return s.Network.FlannelBackend },
			"none",
		},
		"the version of k3s is its artifact's": {
			[]string{head + "spec: {artifacts: {files: [{name: k3s, version: v1.30.1+k3s2, urls: [https://x.example/k3s], sha256: " + digest + "}]}, k3s: {version: v1.30.1+k3s2}}"},
			func(s v1alpha1.NodeConfigSpec) any { return s.K3s.Version + s.Artifacts.Files[0].Format },
			"v1.30.1+k3s2raw",
		},
		"a shim knows its artifact": {
			[]string{spec("shims: [{name: wasmtime, required: false}, {name: spin}]")},
			func(s v1alpha1.NodeConfigSpec) any {
				return []any{s.Shims[0].Artifact, *s.Shims[0].Required, s.Shims[1].Artifact, *s.Shims[1].Required}
			},
			[]any{"containerd-shim-wasmtime-v1", false, "containerd-shim-spin-v2", true},
		},
		"a server may be in another pool when it says so": {
			[]string{spec("role: server")},
			func(s v1alpha1.NodeConfigSpec) any { return []any{s.Role, s.Pool, s.Node.Labels["hearth.sh/pool"]} },
			[]any{v1alpha1.RoleServer, v1alpha1.PoolWasm, "wasm"},
		},
		"text that looks like a date stays text": {
			[]string{spec("cluster: {restore: {generation: 2, snapshot: 2026-01-02}, snapshots: {bucket: s3://b-b/x}}")},
			func(s v1alpha1.NodeConfigSpec) any { return s.Cluster.Restore.Snapshot },
			"2026-01-02",
		},
	} {
		t.Run(name, func(t *testing.T) {
			r, err := resolve(t, c.documents...)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, c.got(r.Config.Spec)); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			for path := range r.Origins {
				if r.Origins[path].Source == "" {
					t.Errorf("%s comes from nowhere", path)
				}
			}
		})
	}
}

func TestAutoScalingGroupIsTheTags(t *testing.T) {
	s := Sources{UserData: []byte(least + "  signal: {lifecycleHook: hook}\n"), Tags: map[string]string{"aws:autoscaling:groupName": "group"}, Instance: &Instance{}}
	if r := mustResolve(t, s); r.Config.Spec.Signal.AutoScalingGroup != "group" {
		t.Errorf("the group is %q", r.Config.Spec.Signal.AutoScalingGroup)
	}
	s.Tags = nil
	_, err := Resolve(t.Context(), s)
	if err == nil || !strings.Contains(err.Error(), "InstanceMetadataTags") {
		t.Errorf("a hook without a group: %v", err)
	}
}

// TestWhoWaitsIsKnownInSpiteOfErrors: an Auto Scaling group would wait out its
// hook for an instance that will never be a node.
func TestWhoWaitsIsKnownInSpiteOfErrors(t *testing.T) {
	const hook = "\n  signal: {lifecycleHook: hook, cloudFormation: {stack: s, resource: R}}\n"
	tags := map[string]string{tagAutoScalingGroup: "group"}
	whole := v1alpha1.SignalConfig{LifecycleHook: "hook", AutoScalingGroup: "group", CloudFormation: &v1alpha1.CloudFormationSignal{Stack: "s", Resource: "R"}}
	dir := t.TempDir()
	write(t, dir, "node.yaml", head+"spec:"+hook)
	for name, c := range map[string]struct {
		source Sources
		want   v1alpha1.SignalConfig
	}{
		"a server on Spot":         {Sources{UserData: []byte(least + "  pool: control-plane" + hook), Instance: &Instance{Spot: true}}, whole},
		"an unknown field":         {Sources{UserData: []byte(least + "  colour: red" + hook)}, whole},
		"a value of another kind":  {Sources{UserData: []byte(least + "  node: {labels: [x]}" + hook)}, whole},
		"user-data that is broken": {Sources{UserData: []byte(head + "spec: {"), Dir: dir}, whole},
		"a hook that is none":      {Sources{UserData: []byte(least + "  signal: {lifecycleHook: 'a b', cloudFormation: {stack: s, resource: R}}")}, v1alpha1.SignalConfig{}},
		"nobody waits":             {Sources{UserData: []byte(least + "  colour: red")}, v1alpha1.SignalConfig{AutoScalingGroup: ""}},
	} {
		t.Run(name, func(t *testing.T) {
			c.source.Tags = tags
			r, err := Resolve(t.Context(), c.source)
			if err == nil {
				t.Fatal("it is valid")
			}
			if diff := cmp.Diff(c.want, r.Signal); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestServerOnSpot(t *testing.T) {
	for name, c := range map[string]struct {
		lines   string
		spot    bool
		refused bool
	}{
		"a server on demand":         {"pool: control-plane", false, false},
		"a server on Spot":           {"pool: control-plane", true, true},
		"a server on Spot, allowed":  {"pool: control-plane\n  node: {allowSpotServer: true}", true, false},
		"an agent on Spot":           {"pool: wasm", true, false},
		"a server in another pool":   {"role: server", true, true},
		"a server's machine unknown": {"pool: control-plane", false, false},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Resolve(t.Context(), Sources{UserData: []byte(least + "  " + c.lines), Instance: &Instance{Spot: c.spot}})
			if refused := fault.CodeOf(err) == CodeSpotServer; refused != c.refused || !refused && err != nil {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestTags(t *testing.T) {
	for name, c := range map[string]struct {
		tags map[string]string
		want string // of the error, "" when there is none
	}{
		"others are not ours":          {map[string]string{"Name": "x", "kubernetes.io/cluster/x": "owned", "aws:x": ""}, ""},
		"EC2's form":                   {map[string]string{"hearth.sh:pool": "build", "hearth.sh:role": "agent", "hearth.sh:cluster-store": "ssm:///a/b", "hearth.sh:k3s-version": "v1.30.1+k3s2"}, ""},
		"Kubernetes' form":             {map[string]string{"hearth.sh/pool": "build"}, ""},
		"both forms":                   {map[string]string{"hearth.sh/pool": "build", "hearth.sh:pool": "build"}, "tag hearth.sh:pool: spec.pool: tag hearth.sh/pool says the same field"},
		"a misspelt one":               {map[string]string{"hearth.sh:pol": "build"}, "tag hearth.sh:pol: this tag is not known; did you mean pool?"},
		"an unknown one":               {map[string]string{"hearth.sh:whatever": "build"}, "this tag is not known; known are artifacts-manifest, "},
		"a value that is not allowed":  {map[string]string{"hearth.sh:pool": "builds"}, `tag hearth.sh:pool: spec.pool: "builds" is not one of`},
		"an empty value":               {map[string]string{"hearth.sh:pool": ""}, "must have 1 to 256 characters"},
		"a value that is too long":     {map[string]string{"hearth.sh:cluster": strings.Repeat("a", 257)}, "must have 1 to 256 characters"},
		"a secret":                     {map[string]string{"hearth.sh:cluster-server": "https://u:hunter2@x:6443"}, "it may hold no secrets"},
		"control characters in a name": {map[string]string{"hearth.sh:a\nb": "x"}, "tag hearth.sh:a?b"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Resolve(t.Context(), Sources{UserData: []byte(least), Tags: c.tags})
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("got %v, want %q", err, c.want)
			}
			if err != nil && strings.Contains(err.Error(), "hunter2") {
				t.Errorf("the error shows a secret: %v", err)
			}
		})
	}
}

func TestFilesThatCannotBeRead(t *testing.T) {
	dir := t.TempDir()
	pipe := filepath.Join(dir, "pipe.yaml")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	open := write(t, dir, "open.yaml", least)
	if err := os.Chmod(open, 0o666); err != nil {
		t.Fatal(err)
	}
	many := t.TempDir()
	for i := range MaxFiles + 1 {
		write(t, many, fmt.Sprintf("%d.yaml", i), least)
	}
	other := t.TempDir()
	write(t, other, "a.yml", least)
	plain := write(t, dir, "plain.yaml", "text")
	for name, c := range map[string]struct {
		sources Sources
		code    fault.Code
		want    string
	}{
		"a file that is not there":      {Sources{Files: []string{filepath.Join(dir, "absent.yaml")}}, CodeUnreadable, "no such file"},
		"a pipe":                        {Sources{Files: []string{pipe}}, CodeUnreadable, "not a regular file"},
		"a directory":                   {Sources{Files: []string{dir}}, CodeUnreadable, "not a regular file"},
		"a file that everybody writes":  {Sources{Files: []string{open}}, CodeUnreadable, "everybody may write it"},
		"a file that is too large":      {Sources{Files: []string{write(t, dir, "large.yaml", strings.Repeat("#", MaxDocumentBytes+1))}}, CodeUnreadable, "more than 262144 bytes"},
		"more files than are read":      {Sources{Dir: many}, CodeUnreadable, "at most 64"},
		"a directory that is a file":    {Sources{Dir: open}, CodeUnreadable, "not a directory"},
		"an ending that is not read":    {Sources{Dir: other}, CodeInvalid, "only files *.yaml are read"},
		"a file that is no map":         {Sources{Files: []string{plain}}, CodeInvalid, `must be a map of apiVersion, kind and spec, not the text "text"`},
		"nothing at all":                {Sources{}, CodeMissing, "there is no user-data"},
		"an empty directory":            {Sources{Dir: t.TempDir()}, CodeMissing, "there is no NodeConfig"},
		"a directory that is not there": {Sources{Dir: filepath.Join(dir, "absent")}, CodeMissing, "--config"},
		"an empty file":                 {Sources{Files: []string{write(t, dir, "empty.yaml", "# nothing\n")}}, CodeMissing, "no NodeConfig in"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Resolve(t.Context(), c.sources)
			if fault.CodeOf(err) != c.code || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v (%s), want %q (%s)", err, fault.CodeOf(err), c.want, c.code)
			}
		})
	}
}

func TestResolveStopsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	gone := errors.New("gone")
	cancel(gone)
	_, err := Resolve(ctx, Sources{Files: []string{write(t, t.TempDir(), "a.yaml", least)}})
	if !errors.Is(err, gone) {
		t.Errorf("got %v", err)
	}
}

func TestDumpCanBeReadAgain(t *testing.T) {
	files, err := filepath.Glob(filepath.Join(examplesDir, "*.yaml"))
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	validate := schemaValidator(t)
	for _, file := range files {
		for _, format := range []Format{FormatYAML, FormatJSON} {
			for _, origins := range []bool{false, true} {
				if format == FormatJSON && origins {
					continue // has another shape
				}
				t.Run(fmt.Sprintf("%s, %s, origins %v", filepath.Base(file), format, origins), func(t *testing.T) {
					first := mustResolve(t, Sources{Files: []string{file}, Instance: &Instance{Region: "eu-central-1", Arch: "arm64"}, Tags: map[string]string{tagAutoScalingGroup: "g"}})
					var dumped bytes.Buffer
					if err := Dump(&dumped, first, format, origins); err != nil {
						t.Fatal(err)
					}
					if err := validate(dumped.Bytes()); err != nil {
						t.Errorf("the schema refuses it: %v", err)
					}
					second := mustResolve(t, Sources{Files: []string{write(t, t.TempDir(), "dump.yaml", dumped.String())}})
					if diff := cmp.Diff(first.Config, second.Config); diff != "" {
						t.Errorf("-first +second:\n%s", diff)
					}
				})
			}
		}
	}
}

func TestDumpSaysWhereValuesComeFrom(t *testing.T) {
	s := Sources{UserData: []byte(least), Instance: &Instance{Region: "eu-central-1"}}
	var text, object bytes.Buffer
	if err := DumpSources(t.Context(), &text, DumpOptions{s, FormatYAML, true}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"store: s3://bucket/prefix # from user-data, line 4\n",
		"region: eu-central-1 # from instance metadata\n",
		"pool: wasm # from built-in profile wasm\n",
		"total: 30m # from default\n",
	} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("%q is not in\n%s", want, text.String())
		}
	}
	if err := DumpSources(t.Context(), &object, DumpOptions{s, FormatJSON, true}); err != nil {
		t.Fatal(err)
	}
	var got struct {
		Config  v1alpha1.NodeConfig
		Origins map[string]Origin
	}
	if err := json.Unmarshal(object.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	if got.Config.Spec.Cluster.Store != "s3://bucket/prefix" || got.Origins["spec.cluster.store"] != (Origin{Source: "user-data", Line: 4}) {
		t.Errorf("got %+v", got)
	}
	if err := DumpSources(t.Context(), &text, DumpOptions{Sources: s, Format: "xml"}); !errors.Is(err, ErrFormat) {
		t.Errorf("got %v", err)
	}
}

func TestCheckListsAllProblems(t *testing.T) {
	file := write(t, t.TempDir(), "bad.yaml", spec("pool: wasn", "rolle: agent", "k3s: {versino: v1}", "cluster: {name: UPPER}"))
	var text, object bytes.Buffer
	err := Check(t.Context(), &text, CheckOptions{Sources: Sources{Files: []string{file}}})
	if fault.CodeOf(err) != CodeInvalid {
		t.Errorf("got %v", err)
	}
	want := file + `, line 4: spec.pool: "wasn" is not one of control-plane, observability, wasm, build, backend; did you mean wasm?
` + file + `, line 5: spec.rolle: unknown field; did you mean role?
` + file + `, line 6: spec.k3s.versino: unknown field; did you mean version?
` + file + `, line 7: spec.cluster.name: "UPPER" is not a cluster's name: 1 to 63 small letters, digits and dashes, such as production
`
	if diff := cmp.Diff(want, text.String()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if err := Check(t.Context(), &object, CheckOptions{Sources: Sources{Files: []string{file}}, Format: FormatJSON}); err == nil {
		t.Error("it is valid")
	}
	var result CheckResult
	if err := json.Unmarshal(object.Bytes(), &result); err != nil {
		t.Fatal(err)
	}
	if result.Valid || len(result.Problems) != 4 || result.Problems[1].Path != "spec.rolle" || result.Problems[1].Origin.Line != 5 {
		t.Errorf("got %+v", result)
	}
}

func TestCheckSaysWhatItWouldBecome(t *testing.T) {
	var text bytes.Buffer
	if err := Check(t.Context(), &text, CheckOptions{Sources: Sources{Dir: filepath.Dir(write(t, t.TempDir(), "a.yaml", least)), UserData: []byte("#!/bin/sh\n")}}); err != nil {
		t.Fatal(err)
	}
	if got, want := text.String(), "valid: role agent, pool wasm\nspec.artifacts.manifest must have k3s, hearth-image, containerd-shim-spin-v2, which is seen when it is read\nnote: no NodeConfig in user-data: it is a script\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestCheckNamesWhatTheManifestMustHave(t *testing.T) {
	for name, c := range map[string]struct {
		lines []string
		want  []string
	}{
		"a server":          {[]string{"pool: control-plane"}, []string{"k3s", "hearth-image"}},
		"all is pulled":     {[]string{"pool: control-plane", "addons: {hearth: {values: {image: {repository: x.example/y}}}}"}, []string{"k3s"}},
		"what files have":   {[]string{"pool: control-plane", "artifacts: {manifest: https://example.com/m.json, publicKeys: ['" + key + "'], files: [{name: hearth-image, urls: [s3://bucket/x.tar], sha256: " + digest + "}]}"}, []string{"k3s"}},
		"a network and ECR": {[]string{"pool: build", "network: {cni: calico}", "registries: {ecr: true}"}, []string{"k3s", "ecr-credential-provider", "cni-manifest"}},
	} {
		t.Run(name, func(t *testing.T) {
			r, err := resolve(t, spec(c.lines...))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, ofManifest(r)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestCheckArtifactsOnceTheManifestIsKnown(t *testing.T) {
	r, err := resolve(t, spec("registries: {systemDefault: registry.example.com, ecr: true}", "network: {cni: calico}"))
	if err != nil {
		t.Fatal(err)
	}
	all := []string{"k3s", "containerd-shim-spin-v2", "cni-manifest", "ecr-credential-provider", "hearth-image"}
	if err := CheckArtifacts(r, all); err != nil {
		t.Error(err)
	}
	for _, without := range all {
		err := CheckArtifacts(r, slices.DeleteFunc(slices.Clone(all), func(n string) bool { return n == without }))
		if fault.CodeOf(err) != CodeInvalid || !strings.Contains(err.Error(), without) {
			t.Errorf("without %s: %v", without, err)
		}
	}
}

// TestHostileTreesAreCheap: what a few kilobytes can stand for must neither
// take long nor much memory.
func TestHostileTreesAreCheap(t *testing.T) {
	bomb := "a: &a [x,x,x,x,x,x,x,x,x]\n"
	for c := 'b'; c < 'p'; c++ {
		bomb += fmt.Sprintf("%c: &%c [*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c]\n", c, c, c-1, c-1, c-1, c-1, c-1, c-1, c-1, c-1, c-1)
	}
	for name, text := range map[string]string{
		"a bomb of aliases":       head + bomb,
		"an alias of itself":      head + "spec: &s {node: {labels: {a: *s}}}",
		"deep lists":              head + "spec: " + strings.Repeat("[", 5000) + strings.Repeat("]", 5000),
		"deep maps":               head + "spec: " + strings.Repeat("{a: ", 2000) + "1" + strings.Repeat("}", 2000),
		"many wrong items":        head + "spec: {shims: [" + strings.Repeat("{name: A},", 1500) + "]}",
		"many unknown fields":     head + "spec: {" + manyKeys("rol%d: 1, ", 1200) + "}",
		"many unknown keys":       head + "spec: {k3s: {config: {" + manyKeys("kubelet-ar%d: 1, ", 800) + "}}}",
		"many comments":           strings.Repeat("#\n", 8000) + head,
		"many documents":          strings.Repeat("---\n", 4000),
		"many documents of ours":  strings.Repeat("---\n"+spec("pool: wasm"), 200),
		"long keys":               head + "spec: {" + strings.Repeat("a", 15000) + ": 1}",
		"many taints":             head + "spec: {node: {taints: [" + strings.Repeat("{key: a, effect: b},", 700) + "]}}",
		"a pattern that explodes": spec(`registries: {mirrors: {docker.io: {endpoints: [https://x], rewrite: {"(((a{100}){100}){100}){100}": x}}}}`),
	} {
		t.Run(name, func(t *testing.T) {
			began := time.Now()
			_, err := Resolve(t.Context(), Sources{UserData: []byte(text)})
			if err == nil || fault.CodeOf(err) == "" {
				t.Errorf("got %v", err)
			}
			if took := time.Since(began); took > 10*time.Second {
				t.Errorf("it took %s", took)
			}
			if len(err.Error()) > 200_000 {
				t.Errorf("the error has %d bytes", len(err.Error()))
			}
		})
	}
}

func manyKeys(format string, n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, format, i)
	}
	return b.String()
}
