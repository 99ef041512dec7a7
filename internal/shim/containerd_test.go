package shim_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	toml "github.com/pelletier/go-toml/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hearth-sh/hearth/internal/shim"
	"github.com/hearth-sh/hearth/internal/shim/shimtest"
	"github.com/hearth-sh/hearth/test/cluster"
	"github.com/hearth-sh/hearth/test/needs"
	"github.com/hearth-sh/hearth/test/shims"
)

// kubernetes is CRI's namespace.
const kubernetes = "k8s.io"

// daemon is a containerd of the test's own: its state, socket and PATH.
type daemon struct {
	dir, socket, log, binary, path string

	mu      sync.Mutex // a suite stops the process from another goroutine
	command *exec.Cmd
	client  *containerd.Client
}

// needContainerd skips where no container can be run. In CI that is a failure.
func needContainerd(t *testing.T) (binary string) {
	t.Helper()
	if testing.Short() {
		t.Skip("runs real containers: left out with -short")
	}
	needs.Root(t, "running containers")
	if dir := os.Getenv("HEARTH_TEST_CONTAINERD_DIR"); dir != "" {
		return filepath.Join(dir, "containerd")
	}
	tools, err := cluster.Tools(t.Context(), os.Stderr)
	if err != nil {
		t.Fatalf("building containerd: %v", err)
	}
	return filepath.Join(tools, "containerd")
}

// newDaemon starts a containerd whose CRI has one handler per test shim.
func newDaemon(t *testing.T, paths shims.Paths) *daemon {
	t.Helper()
	binary := needContainerd(t)
	// Sockets have short names: t.TempDir's are too long for them.
	dir, err := os.MkdirTemp("", "hearth-shim-")
	if err != nil {
		t.Fatal(err)
	}
	d := &daemon{
		dir: dir, socket: filepath.Join(dir, "containerd.sock"), log: filepath.Join(dir, "containerd.log"),
		binary: binary, path: paths.Dir + ":" + filepath.Dir(binary) + ":/usr/sbin:/usr/bin:/sbin:/bin",
	}
	t.Cleanup(func() { d.cleanup(t) })

	runtimes := map[string]any{}
	for _, engine := range []string{"wasmtime", "hollow", "broken", "stuck", "chatty", "absent"} {
		runtimes[engine] = map[string]any{
			"runtime_type": "io.containerd." + engine + ".v1",
			"options":      map[string]any{"SystemdCgroup": false},
		}
	}
	type table = map[string]any
	config, err := toml.Marshal(table{
		"version": 3,
		"root":    filepath.Join(dir, "root"), "state": filepath.Join(dir, "state"),
		"grpc":  table{"address": d.socket},
		"ttrpc": table{"address": d.socket + ".ttrpc"},
		// runwasi logs at level info what it compiles.
		"debug": table{"level": "info"},
		"plugins": table{
			"io.containerd.cri.v1.runtime": table{
				"restrict_oom_score_adj": true,
				"containerd":             table{"runtimes": runtimes},
				"cni":                    table{"bin_dirs": []string{dir}, "conf_dir": filepath.Join(dir, "net.d")},
			},
			"io.containerd.internal.v1.opt": table{"path": filepath.Join(dir, "opt")},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.toml"), config, 0o600); err != nil {
		t.Fatal(err)
	}
	d.start(t)
	d.client, err = containerd.New(d.socket)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func (d *daemon) start(t *testing.T) {
	t.Helper()
	log, err := os.OpenFile(d.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.command = exec.Command(d.binary, "--config", filepath.Join(d.dir, "config.toml"))
	d.command.Env = []string{"PATH=" + d.path, "HOME=/root"}
	d.command.Stdout, d.command.Stderr = log, log
	if err := d.command.Start(); err != nil {
		t.Fatal(err)
	}
	node := d.node(t, t.TempDir())
	deadline := time.Now().Add(time.Minute)
	for {
		_, err := node.Server(t.Context())
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("containerd does not answer: %v", err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// stop kills containerd; the shims live on, as they do on a node.
func (d *daemon) stop() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.command != nil {
		d.command.Process.Kill()
		d.command.Wait()
		d.command = nil
	}
}

// cleanup removes everything through containerd, so that no shim or mount
// outlives the test, then containerd.
func (d *daemon) cleanup(t *testing.T) {
	d.mu.Lock()
	running := d.command != nil
	d.mu.Unlock()
	if running {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		node := d.node(t, filepath.Join(d.dir, "hearth"))
		if _, err := node.Clean(ctx); err != nil {
			t.Errorf("cleaning up: %v", err)
		}
	}
	if d.client != nil {
		d.client.Close()
	}
	d.stop()
	if t.Failed() {
		if log, err := os.ReadFile(d.log); err == nil {
			t.Logf("containerd's log ends:\n%s", log[max(0, len(log)-8<<10):])
		}
	}
	if err := os.RemoveAll(d.dir); err != nil {
		t.Errorf("removing containerd's directory: %v", err)
	}
}

// node returns a Node on the daemon.
func (d *daemon) node(t *testing.T, state string) *shim.Containerd {
	t.Helper()
	logger := slog.New(slog.NewTextHandler(t.Output(), nil))
	node, err := shim.NewContainerd(shim.ContainerdOptions{Address: d.socket, StateDir: state, Logger: logger})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { node.Close() })
	return node
}

// left names what a run of ours would have to remove, in all places.
func (d *daemon) left(t *testing.T) []string {
	t.Helper()
	var left []string
	for _, namespace := range []string{shim.Namespace, kubernetes} {
		ctx := namespaces.WithNamespace(t.Context(), namespace)
		containers, err := d.client.Containers(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, container := range containers {
			left = append(left, namespace+"/container/"+container.ID())
		}
	}
	ctx := namespaces.WithNamespace(t.Context(), shim.Namespace)
	found, err := d.client.ImageService().List(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, image := range found {
		left = append(left, "image/"+image.Name)
	}
	held, err := d.client.LeasesService().List(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, lease := range held {
		left = append(left, "lease/"+lease.ID)
	}
	err = d.client.ContentStore().Walk(ctx, func(info content.Info) error {
		left = append(left, "content/"+info.Digest.String())
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	commands, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range commands {
		// The process may have ended since.
		if command, err := os.ReadFile(path); err == nil && bytes.Contains(command, []byte("-address\x00"+d.socket+"\x00")) {
			left = append(left, "process/"+strings.ReplaceAll(string(command), "\x00", " "))
		}
	}
	entries, err := os.ReadDir(filepath.Join(d.dir, "hearth", "pipes"))
	if err == nil {
		for _, entry := range entries {
			left = append(left, "pipe/"+entry.Name())
		}
	}
	return left
}

// discover finds the daemon's runtimes the way a node's agent does.
func (d *daemon) discover(t *testing.T, node *shim.Containerd, extra map[string]shim.Kind) shim.Inventory {
	t.Helper()
	server, err := node.Server(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	connection, err := grpc.NewClient("unix://"+d.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer connection.Close()
	inventory, err := shim.Discover(t.Context(), shim.DiscoverOptions{
		ContainerdPID: server.PID, CRI: runtimeapi.NewRuntimeServiceClient(connection),
		Configs: []string{filepath.Join(d.dir, "config.toml")}, Extra: extra,
		ExtraDirs: []string{},
		RuntimeClasses: []shim.RuntimeClass{
			{Name: "wasm", Handler: "wasmtime"}, {Name: "old-wasm", Handler: "wasmtime-v1"}, {Name: "lunatic", Handler: "lunatic"},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return inventory
}

func find(t *testing.T, inventory shim.Inventory, key string) shim.Runtime {
	t.Helper()
	at := slices.IndexFunc(inventory.Runtimes, func(r shim.Runtime) bool { return r.Key() == key })
	if at < 0 {
		t.Fatalf("no runtime %q among %+v", key, inventory.Runtimes)
	}
	return inventory.Runtimes[at]
}

var faulty = map[string]shim.Kind{
	"hollow": shim.KindCommand, "broken": shim.KindCommand, "stuck": shim.KindCommand,
	"chatty": shim.KindCommand, "absent": shim.KindCommand,
}

func TestContainerd(t *testing.T) {
	paths := shims.Build(t)
	d := newDaemon(t, paths)
	node := d.node(t, filepath.Join(d.dir, "hearth"))
	inventory := d.discover(t, node, faulty)
	good := find(t, inventory, "wasmtime")

	t.Run("what is on the node is found", func(t *testing.T) { testDiscovered(t, inventory, paths) })

	// Discover would say that it is missing, and Prove believe it; the suite
	// wants to hear it from containerd.
	missing := find(t, inventory, "absent")
	missing.Binary = "/usr/local/bin/containerd-shim-absent-v1"
	file := good
	file.Kind = shim.KindFile
	t.Run("Node", func(t *testing.T) {
		shimtest.TestNode(t, shimtest.NodeFixture{
			Node: node, Good: good, File: file, Missing: missing,
			Hollow: find(t, inventory, "hollow"), Broken: find(t, inventory, "broken"),
			Stuck: find(t, inventory, "stuck"), Chatty: find(t, inventory, "chatty"),
			Abandon: func(t *testing.T) { abandon(t, d, find(t, inventory, "stuck")) },
			Left:    d.left,
			Stop:    func(*testing.T) { d.stop() },
			Start:   d.start,
		})
	})
	t.Run("CacheNode", func(t *testing.T) {
		proof := shim.NewProver(node, shim.ProverOptions{}).Prove(t.Context(), good)
		if !proof.OK || len(proof.CompileKeys) != 1 || proof.CompileKeys[0].Shim != "wasmtime" {
			t.Fatalf("a proof of runwasi's shim must tell its compile key: %+v", proof)
		}
		t.Logf("proof took %v, compile key %v", proof.Took, proof.CompileKeys)
		shimtest.TestCacheNode(t, shimtest.CacheFixture{
			Node: node, Good: good, Hollow: find(t, inventory, "hollow"), Key: proof.CompileKeys[0],
			Images: func(t *testing.T, n int) []string {
				var names []string
				for i := range n {
					names = append(names, fmt.Sprintf("registry.test/function-%d:1", i))
					// A custom section makes each module another one, whose
					// compiled code is the same: they share one blob.
					module := append(shim.ProbeModule(), 0, 3, 1, 'n', byte(i))
					importImage(t, d.client, names[i], "wasm", "application/wasm", module)
				}
				importImage(t, d.client, "registry.test/native:1", "amd64", ocispec.MediaTypeImageLayer, make([]byte, 1024))
				return names
			},
			Native: "registry.test/native:1", Absent: "registry.test/absent:1",
			Compilations: d.compilations,
			Evict:        d.evict,
			Left: func(t *testing.T) []string {
				return slices.DeleteFunc(d.left(t), func(s string) bool { return strings.HasPrefix(s, "image/registry.test/") })
			},
		})
	})
}

func testDiscovered(t *testing.T, inventory shim.Inventory, paths shims.Paths) {
	if !slices.Contains(inventory.Path, paths.Dir) {
		t.Errorf("containerd's PATH was not read from its process: %v", inventory.Path)
	}
	good := find(t, inventory, "wasmtime")
	if good.Binary != paths.Wasmtime || good.Version != shims.Version || len(good.Digest) != 64 || good.Kind != shim.KindCommand {
		t.Errorf("the shim was not read: %+v", good)
	}
	if good.RuntimeType != "io.containerd.wasmtime.v1" || good.Options["SystemdCgroup"] != false {
		t.Errorf("the handler's settings were not read: %+v", good)
	}
	if want := []shim.Source{shim.SourceBinary, shim.SourceConfig, shim.SourceCRI, shim.SourceRuntimeClass}; !slices.Equal(good.Sources, want) {
		t.Errorf("sources %v, want %v", good.Sources, want)
	}
	if len(good.Problems) > 0 || !slices.Equal(good.RuntimeClasses, []string{"wasm"}) {
		t.Errorf("problems %q, classes %q", good.Problems, good.RuntimeClasses)
	}
	absent := find(t, inventory, "absent")
	if absent.Binary != "" || len(absent.Problems) != 1 || !strings.Contains(absent.Problems[0], "containerd-shim-absent-v1 is not on its PATH") {
		t.Errorf("the missing shim: %+v", absent)
	}
	if len(inventory.Problems) != 1 || !strings.Contains(inventory.Problems[0], `"old-wasm" asks for the handler "wasmtime-v1"`) {
		t.Errorf("problems of the node: %q", inventory.Problems)
	}
}

// abandon runs a container in a process that dies in the middle of it.
func abandon(t *testing.T, d *daemon, runtime shim.Runtime) {
	t.Helper()
	encoded, err := json.Marshal(runtime)
	if err != nil {
		t.Fatal(err)
	}
	child := exec.Command(os.Args[0], "-test.run=^TestAbandonChild$")
	child.Env = append(os.Environ(), "HEARTH_TEST_ABANDON="+string(encoded),
		"HEARTH_TEST_SOCKET="+d.socket, "HEARTH_TEST_STATE="+filepath.Join(d.dir, "hearth"))
	child.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	ctx := namespaces.WithNamespace(t.Context(), shim.Namespace)
	deadline := time.Now().Add(time.Minute)
	for {
		containers, err := d.client.Containers(ctx)
		if err == nil && len(containers) == 1 {
			if task, err := containers[0].Task(ctx, nil); err == nil {
				if status, err := task.Status(ctx); err == nil && status.Status == containerd.Running {
					break
				}
			}
		}
		if time.Now().After(deadline) {
			t.Error("the child's container does not run")
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	child.Process.Kill()
	child.Wait()
}

// TestAbandonChild is the process that abandon kills.
func TestAbandonChild(t *testing.T) {
	encoded := os.Getenv("HEARTH_TEST_ABANDON")
	if encoded == "" {
		t.Skip("only runs as the child of another test")
	}
	var runtime shim.Runtime
	if err := json.Unmarshal([]byte(encoded), &runtime); err != nil {
		t.Fatal(err)
	}
	node, err := shim.NewContainerd(shim.ContainerdOptions{Address: os.Getenv("HEARTH_TEST_SOCKET"), StateDir: os.Getenv("HEARTH_TEST_STATE")})
	if err != nil {
		t.Fatal(err)
	}
	defer node.Close()
	_, err = node.Run(t.Context(), runtime, shim.NewNonce())
	t.Fatalf("a stuck run ended: %v", err)
}

// importImage puts an image of one layer where CRI would have.
func importImage(t *testing.T, client *containerd.Client, name, architecture, mediaType string, layer []byte) {
	t.Helper()
	ctx, done, err := client.WithLease(namespaces.WithNamespace(t.Context(), kubernetes), leases.WithRandomID(), leases.WithExpiration(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	defer done(context.WithoutCancel(ctx))
	write := func(mediaType string, data []byte, labels map[string]string) ocispec.Descriptor {
		descriptor := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
		if err := content.WriteBlob(ctx, client.ContentStore(), descriptor.Digest.String(), bytes.NewReader(data), descriptor, content.WithLabels(labels)); err != nil {
			t.Fatal(err)
		}
		return descriptor
	}
	marshal := func(value any) []byte {
		data, err := json.Marshal(value)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	blob := write(mediaType, layer, nil)
	config := write(ocispec.MediaTypeImageConfig, marshal(ocispec.Image{
		Platform: ocispec.Platform{Architecture: architecture, OS: "wasip1"},
		RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{blob.Digest}},
	}), nil)
	manifest := write(ocispec.MediaTypeImageManifest, marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: config, Layers: []ocispec.Descriptor{blob},
	}), map[string]string{
		"containerd.io/gc.ref.content.config": config.Digest.String(),
		"containerd.io/gc.ref.content.l.0":    blob.Digest.String(),
	})
	if _, err := client.ImageService().Create(ctx, images.Image{Name: name, Target: manifest}); err != nil {
		t.Fatal(err)
	}
}

// compilations counts what runwasi says in containerd's log each time before
// it compiles an image (containerd/client.rs, load_modules).
func (d *daemon) compilations(t *testing.T, image string) int {
	t.Helper()
	log, err := os.ReadFile(d.log)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(log), "precompiling layers for image: "+image)
}

// evict deletes the compiled blobs of an image.
func (d *daemon) evict(t *testing.T, name string) {
	t.Helper()
	ctx := namespaces.WithNamespace(t.Context(), kubernetes)
	image, err := d.client.GetImage(ctx, name)
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := images.Manifest(ctx, d.client.ContentStore(), image.Target(), nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, layer := range manifest.Layers {
		info, err := d.client.ContentStore().Info(ctx, layer.Digest)
		if err != nil {
			t.Fatal(err)
		}
		for label, value := range info.Labels {
			if strings.HasPrefix(label, "runwasi.io/precompiled/") {
				if err := d.client.ContentStore().Delete(ctx, digest.Digest(value)); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
}

// Without containerd there is no answer, rather than a failed proof.
func TestContainerdDown(t *testing.T) {
	node, err := shim.NewContainerd(shim.ContainerdOptions{Address: filepath.Join(t.TempDir(), "none.sock"), StateDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer node.Close()
	proof := shim.NewProver(node, shim.ProverOptions{Logger: slog.New(slog.NewTextHandler(io.Discard, nil))}).Prove(t.Context(),
		shim.Runtime{Name: "wasmtime", Kind: shim.KindCommand, Handler: "wasmtime", RuntimeType: "io.containerd.wasmtime.v1", Binary: "/x"})
	if proof.Code != shim.CodeUnreachable {
		t.Errorf("code %q (%s)", proof.Code, proof.Message)
	}
	if _, err := node.Clean(t.Context()); err == nil {
		t.Error("cleaning without containerd reported success")
	}
}

// A runtime for native code cannot run the probe, and leaves nothing either.
// This needs no test shims, so it holds the handling of containerd where there
// is no Rust.
func TestContainerdNativeRuntime(t *testing.T) {
	needs.Program(t, "runc")
	d := newDaemon(t, shims.Paths{Dir: "/usr/local/bin"})
	node := d.node(t, filepath.Join(d.dir, "hearth"))
	runc := shim.Runtime{Name: "runc", Handler: "runc", RuntimeType: "io.containerd.runc.v2", Binary: "/runc", Options: map[string]any{"SystemdCgroup": false}}
	for _, kind := range []shim.Kind{shim.KindCommand, shim.KindFile} {
		runc.Kind = kind
		proof := shim.NewProver(node, shim.ProverOptions{}).Prove(t.Context(), runc)
		// runc finds no file in the first form, and no native program in the second.
		if want := map[shim.Kind]shim.Code{shim.KindCommand: shim.CodeCreateFailed, shim.KindFile: shim.CodeExited}[kind]; proof.Code != want {
			t.Errorf("%s: code %q (%s), want %q", kind, proof.Code, proof.Message, want)
		}
	}
	if left := d.left(t); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}
