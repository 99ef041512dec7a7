package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/images"
	"github.com/hearth-sh/hearth/test/bench/report"
	"github.com/hearth-sh/hearth/test/chart"
	"github.com/hearth-sh/hearth/test/cluster"
	"github.com/hearth-sh/hearth/test/shims"
)

const (
	agentPods = "app.kubernetes.io/component=agent"

	// agentNode has the agent, bareNode only the same shim.
	agentNode = "node-agent"
	bareNode  = "node-bare"
	// agentLabel is what the chart is told to select nodes by.
	agentLabel = "bench-agent"
	// handler is the shim's; runtimeClass names it without asking for the
	// agent's label, so that pods go to both nodes.
	handler      = "wasmtime"
	runtimeClass = "bench-wasmtime"
	runtimeLabel = v1alpha1.RuntimeLabelPrefix + handler

	// soon bounds waits for what takes seconds; the machine may be busy.
	soon = 3 * time.Minute
	// statusEvery is between two questions to the agent; each starts a process.
	statusEvery = time.Second
)

// bench is one run.
type bench struct {
	options
	table    report.Table
	cluster  *cluster.Cluster
	registry *cluster.Registry
	agent    string // the binary
	dir      string
	events   map[string]*events // by node
}

// SetUp starts the cluster with the chart on it.
func (b *bench) SetUp(ctx context.Context) (err error) {
	if err := cluster.Check(); err != nil {
		return err
	}
	if b.dir, err = os.MkdirTemp("", "hearth-bench-"); err != nil {
		return err
	}
	shim, err := shims.Compile(ctx, os.Stderr)
	if err != nil {
		return err
	}
	runtimes := []cluster.Runtime{{Name: handler, Type: "io.containerd.wasmtime.v1", BinaryPath: shim.Wasmtime}}
	b.cluster, err = cluster.New(ctx, cluster.Options{Nodes: []cluster.Node{
		{Name: agentNode, Runtimes: runtimes, Labels: map[string]string{agentLabel: "yes"}},
		{Name: bareNode, Runtimes: runtimes},
	}})
	if err != nil {
		return err
	}
	if b.registry, err = b.cluster.Registry(ctx, cluster.RegistryOptions{}); err != nil {
		return err
	}
	b.events = map[string]*events{}
	for _, m := range b.cluster.Nodes() {
		if b.events[m.Name], err = listen(ctx, m); err != nil {
			return err
		}
	}
	if b.agent, err = chart.LoadImage(ctx, b.cluster); err != nil {
		return err
	}
	class := &nodev1.RuntimeClass{ObjectMeta: metav1.ObjectMeta{Name: runtimeClass}, Handler: handler}
	if _, err := b.cluster.Client().NodeV1().RuntimeClasses().Create(ctx, class, metav1.CreateOptions{}); err != nil {
		return err
	}
	// The agent on one node only.
	if err := chart.Install(ctx, b.cluster, "agent.nodeSelector."+agentLabel+"=yes", "engine.nodeSelector."+agentLabel+"=yes"); err != nil {
		return err
	}
	return b.cluster.WaitNode(ctx, agentNode, "to be labelled", soon, func(n *corev1.Node) bool { return n.Labels[runtimeLabel] == "true" })
}

// Close removes everything.
func (b *bench) Close() error {
	var errs []error
	for _, e := range b.events {
		errs = append(errs, e.close())
	}
	if b.cluster != nil {
		errs = append(errs, b.cluster.Close())
	}
	if b.dir != "" {
		errs = append(errs, os.RemoveAll(b.dir))
	}
	return errors.Join(errs...)
}

// Dump writes what the chart's pods said.
func (b *bench) Dump(w io.Writer) {
	if b.cluster == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	chart.Dump(ctx, b.cluster, w)
}

// status is `nodeagent status -o json` of the agent's node, asked from outside
// so that it is not counted with the node's processor time. The command's exit
// code follows the node's state, so it is no error here.
func (b *bench) status(ctx context.Context) (v1alpha1.NodeStatus, error) {
	var s v1alpha1.NodeStatus
	ask := exec.CommandContext(ctx, b.agent, "status", "--socket", b.cluster.Node(agentNode).Path("/run/hearth/agent.sock"), "-o", "json")
	out, err := ask.Output()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return s, err
	}
	if err := json.Unmarshal(out, &s); err != nil {
		return s, fmt.Errorf("status of %s: %w: %s", agentNode, err, out)
	}
	return s, nil
}

// want makes the agent's list of images these and waits until all are warm.
func (b *bench) want(ctx context.Context, timeout time.Duration, lines []string) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	if err := b.list(ctx, lines); err != nil {
		return err
	}
	last := "no status"
	for {
		s, err := b.status(ctx)
		switch {
		case err != nil:
			last = err.Error()
		case s.Images != nil:
			if last = s.Images.Summary; s.Images.Total == len(lines) && s.Images.Warm == len(lines) {
				return nil
			}
		}
		if err := pause(ctx, statusEvery); err != nil {
			return fmt.Errorf("waiting for images to be warm: %w: %s", err, last)
		}
	}
}

// list writes the ConfigMap that tells the agent which images are wanted.
func (b *bench) list(ctx context.Context, lines []string) error {
	list := &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: "bench", Namespace: chart.Namespace, Labels: map[string]string{images.ListLabel: "true"}},
		Data:       map[string]string{"images": strings.Join(lines, "\n")},
	}
	maps := b.cluster.Client().CoreV1().ConfigMaps(chart.Namespace)
	if _, err := maps.Update(ctx, list, metav1.UpdateOptions{}); err == nil {
		return nil
	}
	_, err := maps.Create(ctx, list, metav1.CreateOptions{})
	return err
}

// largeModule builds the guest of some 12 MB.
func (b *bench) largeModule(ctx context.Context) ([]byte, error) {
	path := filepath.Join(b.dir, "large.wasm")
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", path, "./test/bench/cluster/testdata/large")
	build.Env = append(os.Environ(), "GOOS=wasip1", "GOARCH=wasm", "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := build.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build the large module: %w\n%s", err, out)
	}
	return os.ReadFile(path)
}

// smallModule is a wasip1 command that does nothing: one function, exported as
// _start.
var smallModule = []byte("\x00asm\x01\x00\x00\x00" +
	"\x01\x04\x01\x60\x00\x00" + // type: () -> ()
	"\x03\x02\x01\x00" + // one function of it
	"\x07\x0a\x01\x06_start\x00\x00" +
	"\x0a\x04\x01\x02\x00\x0b") // its body: end

// variant appends a custom section (WebAssembly core specification 5.5.3), so
// that the same code has another digest and nobody has it cached.
func variant(module []byte, number int) []byte {
	const title = "variant"
	content := fmt.Appendf(append([]byte{byte(len(title))}, title...), "%08d", number)
	return append(append(bytes.Clone(module), 0, byte(len(content))), content...)
}

// push puts a module into the registry as an image of architecture wasm, the
// form runwasi's shims run, and returns its reference by digest.
func (b *bench) push(ctx context.Context, repository string, module []byte) (string, error) {
	target, err := name.NewRepository(b.registry.Host+"/"+repository, name.Insecure)
	if err != nil {
		return "", err
	}
	upload := func(data []byte, kind types.MediaType) (map[string]any, error) {
		layer := static.NewLayer(data, kind)
		digest, err := layer.Digest()
		if err != nil {
			return nil, err
		}
		return map[string]any{"mediaType": string(kind), "digest": digest.String(), "size": len(data)}, remote.WriteLayer(target, layer, remote.WithContext(ctx))
	}
	// Without diff IDs containerd unpacks nothing; there is nothing to unpack.
	config, err := upload([]byte(`{"architecture":"wasm","os":"wasip1","config":{"Entrypoint":["/"]},"rootfs":{"type":"layers","diff_ids":[]}}`), types.OCIConfigJSON)
	if err != nil {
		return "", err
	}
	layer, err := upload(module, "application/wasm")
	if err != nil {
		return "", err
	}
	raw, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": string(types.OCIManifestSchema1), "config": config, "layers": []any{layer}})
	if err != nil {
		return "", err
	}
	m := manifest(raw)
	digest := static.NewLayer(raw, types.OCIManifestSchema1)
	h, err := digest.Digest()
	if err != nil {
		return "", err
	}
	reference := target.Digest(h.String())
	return reference.String(), remote.Put(reference, m, remote.WithContext(ctx))
}

// manifest is a remote.Taggable of bytes.
type manifest []byte

func (m manifest) RawManifest() ([]byte, error)      { return m, nil }
func (manifest) MediaType() (types.MediaType, error) { return types.OCIManifestSchema1, nil }
