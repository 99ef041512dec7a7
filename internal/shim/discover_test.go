package shim

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/hearth-sh/hearth/test/needs"
	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// node is a file system as Discover sees it, with a /proc beside it.
type node struct {
	root, proc string
}

// newNode makes a node whose containerd has a PATH.
func newNode(t *testing.T, path string) node {
	t.Helper()
	needs.Root(t, "a shim")
	n := node{root: t.TempDir(), proc: t.TempDir()}
	if err := os.MkdirAll(filepath.Join(n.proc, "7"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(n.proc, "7", "environ"), []byte("PATH="+path+"\x00"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/opt/containerd/containerd", filepath.Join(n.proc, "7", "exe")); err != nil {
		t.Fatal(err)
	}
	return n
}

func (n node) write(t *testing.T, path, data string) {
	t.Helper()
	path = filepath.Join(n.root, path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(data), 0o755); err != nil {
		t.Fatal(err)
	}
}

func (n node) options() DiscoverOptions {
	return DiscoverOptions{Root: n.root, Proc: n.proc, ContainerdPID: 7, Binaries: &BinaryCache{}}
}

// knows makes the cache say what a binary would, without running it: it could
// not run in a root without a shell.
func (n node) knows(t *testing.T, options DiscoverOptions, path, version string) {
	t.Helper()
	info, err := os.Stat(filepath.Join(n.root, path))
	if err != nil {
		t.Fatal(err)
	}
	if options.Binaries.known == nil {
		options.Binaries.known = map[string]inspected{}
	}
	options.Binaries.known[path] = inspected{stateOf(info), strings.Repeat("0", 64), version}
}

// cri is a RuntimeService that reports handlers.
type cri struct {
	handlers []string
	config   string
	err      error
}

func (c cri) Status(context.Context, *runtimeapi.StatusRequest, ...grpc.CallOption) (*runtimeapi.StatusResponse, error) {
	response := &runtimeapi.StatusResponse{Info: map[string]string{}}
	for _, name := range c.handlers {
		response.RuntimeHandlers = append(response.RuntimeHandlers, &runtimeapi.RuntimeHandler{Name: name})
	}
	if c.config != "" {
		response.Info["config"] = c.config
	}
	return response, c.err
}

const k3sConfig = "/var/lib/rancher/k3s/agent/etc/containerd/config.toml"

func TestDiscover(t *testing.T) {
	const spin = "containerd-shim-spin-v2"
	handler := func(name, runtimeType, more string) string {
		return fmt.Sprintf("[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.'%s']\nruntime_type = %q\n%s\n", name, runtimeType, more)
	}
	cases := []struct {
		behaviour string
		// place is where the Spin shim is; version what it says.
		place, version string
		config         string
		cri            *cri
		classes        []RuntimeClass
		// wants: the key, binary and problems' beginnings; nothing with "".
		key, binary string
		problems    []string
		nodeProblem string
		tooOld      bool
	}{
		{
			behaviour: "a shim on the PATH behind a handler", place: "/usr/local/bin", version: "0.24.0",
			config: handler("spin", "io.containerd.spin.v2", ""),
			key:    "spin", binary: "/usr/local/bin/" + spin,
		},
		{
			behaviour: "a shim beside containerd itself", place: "/opt/containerd", version: "0.24.0",
			config: handler("spin", "io.containerd.spin.v2", ""),
			key:    "spin", binary: "/opt/containerd/" + spin,
		},
		{
			behaviour: "a shim where KWasm drops it", place: "/opt/kwasm/bin", version: "0.24.0",
			config: handler("spin", "io.containerd.spin.v2", ""),
			key:    "spin", binary: "/opt/kwasm/bin/" + spin,
			problems: []string{"containerd-shim-spin-v2 is in /opt/kwasm/bin, but containerd's PATH does not include that directory: link it into /usr/local/bin"},
		},
		{
			behaviour: "BinaryName does not help", place: "/opt/kwasm/bin", version: "0.24.0",
			config: handler("spin", "io.containerd.spin.v2", "options.BinaryName = '/opt/kwasm/bin/containerd-shim-spin-v2'"),
			key:    "spin", binary: "/opt/kwasm/bin/" + spin,
			problems: []string{"containerd-shim-spin-v2 is in /opt/kwasm/bin, but containerd's PATH does not include that directory: link it into /usr/local/bin; the option BinaryName does not help"},
		},
		{
			behaviour: "runtime_path does", place: "/opt/kwasm/bin", version: "0.24.0",
			config: handler("spin", "io.containerd.spin.v2", "runtime_path = '/opt/kwasm/bin/containerd-shim-spin-v2'"),
			key:    "spin", binary: "/opt/kwasm/bin/" + spin,
		},
		{
			behaviour: "a handler without a shim", config: handler("spin", "io.containerd.spin.v2", ""), key: "spin",
			problems: []string{`containerd has the runtime handler "spin" of type io.containerd.spin.v2, but containerd-shim-spin-v2 is not on its PATH: install it`},
		},
		{
			behaviour: "a fixed path that leads nowhere", config: handler("spin", "io.containerd.spin.v2", "runtime_path = '/none/containerd-shim-spin-v2'"), key: "spin",
			problems: []string{"the configuration fixes the shim's place"},
		},
		{
			behaviour: "a shim without a handler", place: "/usr/local/bin", version: "0.24.0",
			key: "io.containerd.spin.v2", binary: "/usr/local/bin/" + spin,
			problems: []string{"containerd-shim-spin-v2 is installed, but containerd has no runtime handler of type io.containerd.spin.v2: restart k3s"},
		},
		{
			behaviour: "an old shim", place: "/usr/local/bin", version: "0.14.1",
			config: handler("spin", "io.containerd.spin.v2", ""),
			key:    "spin", binary: "/usr/local/bin/" + spin, tooOld: true,
			problems: []string{"containerd-shim-spin-v2 0.14.1 is older than 0.15.0"},
		},
		{
			behaviour: "a handler that containerd has not read yet", place: "/usr/local/bin", version: "0.24.0",
			config: handler("spin", "io.containerd.spin.v2", ""), cri: &cri{handlers: []string{"", "runc"}},
			key: "spin", binary: "/usr/local/bin/" + spin,
			problems: []string{`the handler "spin" is in containerd's configuration file, but the running containerd does not have it: restart containerd`},
		},
		{
			behaviour: "containerd's memory wins over files", place: "/usr/local/bin", version: "0.24.0",
			config: handler("spin", "io.containerd.spin.v1", ""),
			cri:    &cri{handlers: []string{"spin"}, config: `{"containerd":{"runtimes":{"spin":{"runtimeType":"io.containerd.spin.v2"}}}}`},
			key:    "spin", binary: "/usr/local/bin/" + spin,
		},
		{
			behaviour: "a cgroup driver of its own", place: "/usr/local/bin", version: "0.24.0",
			config: handler("spin", "io.containerd.spin.v2", "options.SystemdCgroup = false") + handler("runc", "io.containerd.runc.v2", "options.SystemdCgroup = true"),
			key:    "spin", binary: "/usr/local/bin/" + spin,
			problems: []string{`the handler "spin" has SystemdCgroup = false where runc has true`},
		},
		{
			behaviour: "a RuntimeClass with the other handler's name", place: "/usr/local/bin", version: "0.24.0",
			config: handler("spin", "io.containerd.spin.v2", ""), classes: []RuntimeClass{{"wasmtime-spin-v2", "spin-v2"}, {"spin", "spin"}, {"slight", "slight"}},
			key: "spin", binary: "/usr/local/bin/" + spin,
			nodeProblem: `the RuntimeClass "wasmtime-spin-v2" asks for the handler "spin-v2", which this node does not have; it has spin as "spin"`,
		},
		{behaviour: "native runtimes are left out", config: handler("runc", "io.containerd.runc.v2", "") + handler("kata", "io.containerd.kata.v2", "") + handler("nvidia", "io.containerd.runc.v2", "")},
	}
	for _, tc := range cases {
		t.Run(tc.behaviour, func(t *testing.T) {
			n := newNode(t, "/usr/local/bin:/usr/bin")
			options := n.options()
			options.RuntimeClasses = tc.classes
			if tc.cri != nil {
				options.CRI = tc.cri
			}
			if tc.config != "" {
				n.write(t, k3sConfig, "version = 3\n"+tc.config)
			}
			if tc.place != "" {
				n.write(t, tc.place+"/"+spin, tc.version)
				n.knows(t, options, tc.place+"/"+spin, tc.version)
			}
			inventory, err := Discover(t.Context(), options)
			if err != nil {
				t.Fatal(err)
			}
			if tc.key == "" {
				if len(inventory.Runtimes) > 0 {
					t.Errorf("found %+v", inventory.Runtimes)
				}
				return
			}
			if len(inventory.Runtimes) != 1 {
				t.Fatalf("found %d runtimes: %+v", len(inventory.Runtimes), inventory.Runtimes)
			}
			runtime := inventory.Runtimes[0]
			if runtime.Key() != tc.key || runtime.Name != "spin" || runtime.Kind != KindSpin || runtime.Binary != tc.binary || runtime.Version != tc.version || runtime.TooOld != tc.tooOld {
				t.Errorf("found %+v", runtime)
			}
			if len(runtime.Problems) != len(tc.problems) {
				t.Fatalf("problems %q, want %q", runtime.Problems, tc.problems)
			}
			for i, problem := range tc.problems {
				if !strings.HasPrefix(runtime.Problems[i], problem) {
					t.Errorf("problem %q, want %q", runtime.Problems[i], problem)
				}
			}
			if tc.nodeProblem == "" && len(inventory.Problems) > 0 || tc.nodeProblem != "" && (len(inventory.Problems) != 1 || !strings.HasPrefix(inventory.Problems[0], tc.nodeProblem)) {
				t.Errorf("problems of the node %q, want %q", inventory.Problems, tc.nodeProblem)
			}
		})
	}
}

func TestDiscoverTakesExtraEngines(t *testing.T) {
	n := newNode(t, "/usr/bin")
	n.write(t, "/usr/bin/containerd-shim-acme-v1", "x")
	options := n.options()
	if inventory, err := Discover(t.Context(), options); err != nil || len(inventory.Runtimes) > 0 {
		t.Errorf("an unknown engine is taken for Wasm: %+v, %v", inventory.Runtimes, err)
	}
	options.Extra = map[string]Kind{"acme": KindCommand}
	inventory, err := Discover(t.Context(), options)
	if err != nil || len(inventory.Runtimes) != 1 || inventory.Runtimes[0].Kind != KindCommand {
		t.Errorf("found %+v, %v", inventory.Runtimes, err)
	}
}

func TestDiscoverSaysWhatItCouldNotLearn(t *testing.T) {
	n := newNode(t, "/usr/bin")
	n.write(t, "/usr/bin/containerd-shim-spin-v2", "x")
	n.write(t, k3sConfig, "version = ")
	options := n.options()
	options.CRI = cri{err: errors.New("connection refused")}
	options.ContainerdPID = 8 // of a process that is not there
	inventory, err := Discover(t.Context(), options)
	if err == nil || !strings.Contains(err.Error(), "connection refused") || !strings.Contains(err.Error(), k3sConfig) {
		t.Errorf("error %v", err)
	}
	if len(inventory.Runtimes) != 1 || !slices.Equal(inventory.Path, defaultPath) || len(inventory.Problems) != 1 {
		t.Errorf("what could be found was left out: %+v", inventory)
	}
}

func TestResolveStaysInTheRoot(t *testing.T) {
	n := newNode(t, "/usr/bin")
	n.write(t, "/opt/real", "x")
	for link, target := range map[string]string{
		"/absolute": "/opt/real", "/opt/relative": "real", "/up": "../../../opt/real", "/chain": "absolute", "/dir": "opt", "/loop": "loop",
	} {
		if err := os.Symlink(target, filepath.Join(n.root, link)); err != nil {
			t.Fatal(err)
		}
	}
	for _, path := range []string{"/opt/real", "/absolute", "/opt/relative", "/up", "/chain", "/dir/real"} {
		if got, err := resolve(n.root, path); err != nil || got != "/opt/real" {
			t.Errorf("resolve(%q) = %q, %v", path, got, err)
		}
	}
	if _, err := resolve(n.root, "/loop"); err == nil {
		t.Error("a loop has an end")
	}
}

func TestIdentityFollowsWhatAProofDependsOn(t *testing.T) {
	base := Runtime{Handler: "spin", RuntimeType: "io.containerd.spin.v2", Binary: "/b", Version: "1", Digest: "d", Options: map[string]any{"SystemdCgroup": true}}
	for what, change := range map[string]func(*Runtime){
		"binary":  func(r *Runtime) { r.Digest = "e" },
		"version": func(r *Runtime) { r.Version = "2" },
		"place":   func(r *Runtime) { r.Binary = "/c" },
		"type":    func(r *Runtime) { r.RuntimeType = "io.containerd.spin.v3" },
		"options": func(r *Runtime) { r.Options = map[string]any{"SystemdCgroup": false} },
	} {
		other := base
		change(&other)
		if other.Identity() == base.Identity() {
			t.Errorf("another %s is not noticed", what)
		}
	}
	same := base
	same.Problems, same.RuntimeClasses = []string{"x"}, []string{"y"}
	if same.Identity() != base.Identity() {
		t.Error("what does not matter changes the identity")
	}
}
