package shim

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

// As k3s renders it for containerd 2 (pkg/agent/templates).
const configV3 = `
version = 3
imports = ["/var/lib/rancher/k3s/agent/etc/containerd/config-v3.toml.d/*.toml"]
root = "/var/lib/rancher/k3s/agent/containerd"

[plugins.'io.containerd.cri.v1.images']
  snapshotter = "overlayfs"

[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
  SystemdCgroup = true

[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.'spin']
  runtime_type = "io.containerd.spin.v2"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.'spin'.options]
  BinaryName = "/usr/local/bin/containerd-shim-spin-v2"
  SystemdCgroup = true
`

// As KWasm and RCM append it for containerd 1.
const configV2 = `
version = 2
[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "native"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.wasmtime]
  runtime_type = "/opt/rcm/bin/containerd-shim-wasmtime-v1"
  snapshotter = "overlayfs"
`

func TestParseConfig(t *testing.T) {
	cases := []struct {
		behaviour, config string
		want              map[string]handlerConfig
		imports           []string
	}{
		{"version 3", configV3, map[string]handlerConfig{
			"runc": {Type: "io.containerd.runc.v2", Snapshotter: "overlayfs", Options: map[string]any{"SystemdCgroup": true}},
			"spin": {Type: "io.containerd.spin.v2", Snapshotter: "overlayfs", Options: map[string]any{
				"BinaryName": "/usr/local/bin/containerd-shim-spin-v2", "SystemdCgroup": true}},
		}, []string{"/var/lib/rancher/k3s/agent/etc/containerd/config-v3.toml.d/*.toml"}},
		{"version 2", configV2, map[string]handlerConfig{
			"wasmtime": {Type: "/opt/rcm/bin/containerd-shim-wasmtime-v1", Snapshotter: "overlayfs"},
		}, nil},
		{"nothing about runtimes", "version = 3\n", map[string]handlerConfig{}, nil},
	}
	for _, tc := range cases {
		t.Run(tc.behaviour, func(t *testing.T) {
			got, imports, err := parseConfig([]byte(tc.config))
			if err != nil || !reflect.DeepEqual(got, tc.want) || !reflect.DeepEqual(imports, tc.imports) {
				t.Errorf("parseConfig() = %+v, %v, %v", got, imports, err)
			}
		})
	}
	for behaviour, config := range map[string]string{
		"broken TOML":         "version = ",
		"tables of no type":   "[plugins.'io.containerd.cri.v1.runtime'.containerd]\nruntimes = 3\n",
		"larger than allowed": strings.Repeat("#", maxConfig+1),
	} {
		if _, _, err := parseConfig([]byte(config)); err == nil {
			t.Errorf("%s: no error", behaviour)
		}
	}
}

func FuzzParseConfig(f *testing.F) {
	f.Add([]byte(configV3))
	f.Add([]byte(configV2))
	f.Fuzz(func(t *testing.T, data []byte) {
		handlers, _, err := parseConfig(data)
		if err != nil && handlers != nil || len(handlers) > maxHandlers {
			t.Fatalf("%d handlers, %v", len(handlers), err)
		}
	})
}

func TestReadConfigFollowsImports(t *testing.T) {
	root := t.TempDir()
	write := func(path, data string) {
		t.Helper()
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(data), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	dir := "/var/lib/rancher/k3s/agent/etc/containerd"
	write(dir+"/config.toml", configV3)
	write(dir+"/config-v3.toml.d/spin.toml", strings.ReplaceAll(configV3, "spin.v2", "spin.v3"))
	handlers, err := readConfig(root, dir+"/config.toml")
	if err != nil || handlers["spin"].Type != "io.containerd.spin.v3" || handlers["runc"].Type == "" {
		t.Errorf("readConfig() = %+v, %v", handlers, err)
	}
	for i := range maxImports {
		write(dir+"/config-v3.toml.d/"+strings.Repeat("x", i+1)+".toml", "version = 3")
	}
	if _, err := readConfig(root, dir+"/config.toml"); err == nil {
		t.Error("any number of imports is read")
	}
}

func TestParseCRIConfig(t *testing.T) {
	const status = `{"containerd":{"defaultRuntimeName":"runc","runtimes":{
		"spin":{"runtimeType":"io.containerd.spin.v2","runtimePath":"","PodAnnotations":null,
			"options":{"SystemdCgroup":true,"Level":3,"Ratio":0.5,"List":[1]},"snapshotter":""},
		"runc":{"runtimeType":"io.containerd.runc.v2","options":null}}},"cni":{}}`
	got, err := parseCRIConfig(status)
	want := map[string]handlerConfig{
		"spin": {Type: "io.containerd.spin.v2", Options: map[string]any{
			"SystemdCgroup": true, "Level": int64(3), "Ratio": 0.5, "List": []any{int64(1)}}},
		"runc": {Type: "io.containerd.runc.v2"},
	}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("parseCRIConfig() = %+v, %v", got, err)
	}
	if _, err := parseCRIConfig("{"); err == nil {
		t.Error("broken JSON is read")
	}
}

func FuzzParseCRIConfig(f *testing.F) {
	f.Add(`{"containerd":{"runtimes":{"spin":{"runtimeType":"io.containerd.spin.v2","options":{"n":1e400}}}}}`)
	f.Fuzz(func(t *testing.T, data string) {
		handlers, err := parseCRIConfig(data)
		if err == nil && len(handlers) > maxHandlers {
			t.Fatal(len(handlers))
		}
	})
}

func TestParseEnviron(t *testing.T) {
	path, ok := parseEnviron([]byte("HOME=/root\x00PATH=/var/lib/rancher/k3s/data/x/bin:/usr/bin/:relative:\x00XPATH=/no\x00"))
	if want := []string{"/var/lib/rancher/k3s/data/x/bin", "/usr/bin"}; !ok || !reflect.DeepEqual(path, want) {
		t.Errorf("parseEnviron() = %q, %t, want %q", path, ok, want)
	}
	if _, ok := parseEnviron([]byte("XPATH=/no\x00")); ok {
		t.Error("found a PATH where there is none")
	}
}

func TestParseCompileLabel(t *testing.T) {
	cases := []struct {
		label string
		want  CompileKey
		ok    bool
	}{
		{"runwasi.io/precompiled/spin/17767192358106208183", CompileKey{"spin", "17767192358106208183"}, true},
		{"runwasi.io/precompiled/wasmtime/0", CompileKey{"wasmtime", "0"}, true},
		{"runwasi.io/precompiled/spin/17767192358106208183/original", CompileKey{}, false},
		{"runwasi.io/precompiled/spin/18446744073709551616", CompileKey{}, false},
		{"runwasi.io/precompiled/spin/-1", CompileKey{}, false},
		{"runwasi.io/precompiled/spin/007", CompileKey{}, false},
		{"runwasi.io/precompiled//7", CompileKey{}, false},
		{"containerd.io/gc.ref.content.precompile.0", CompileKey{}, false},
	}
	for _, tc := range cases {
		got, ok := parseCompileLabel(tc.label)
		if got != tc.want || ok != tc.ok {
			t.Errorf("parseCompileLabel(%q) = %v, %t", tc.label, got, ok)
		}
	}
}

func FuzzParseCompileLabel(f *testing.F) {
	f.Add("runwasi.io/precompiled/spin/17767192358106208183")
	f.Fuzz(func(t *testing.T, label string) {
		key, ok := parseCompileLabel(label)
		if ok && key.label() != label {
			t.Fatalf("%q is written back as %q", label, key.label())
		}
		if ok {
			var again CompileKey
			text, _ := key.MarshalText()
			if err := again.UnmarshalText(text); err != nil || again != key {
				t.Fatalf("%q: %v, %v", text, again, err)
			}
		}
	})
}
