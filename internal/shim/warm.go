package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// DefaultWarmDeadline bounds one warming. Compiling is slow: a component
	// of 10 MB takes some ten seconds alone, more on a busy node.
	DefaultWarmDeadline = 5 * time.Minute
	// warmAttempts: runwasi compiles under a lease with a constant name, so a
	// pod that starts in the same moment makes one of the two fail silently.
	warmAttempts = 3
	warmPause    = 2 * time.Second
	// maxManifest bounds a manifest; registries commonly refuse more.
	maxManifest = 4 << 20
)

// ErrImageNotFound says that the node does not have an image.
var ErrImageNotFound = errors.New("the image is not on this node")

// ErrNotCompilable says that shims keep no compiled form of an image.
var ErrNotCompilable = errors.New("shims do not compile this image")

// ErrNotCompiled says that a shim created a task and left no compiled code.
var ErrNotCompiled = errors.New("the shim did not keep compiled code")

// ImageCache is what the shims keep compiled of one image.
type ImageCache struct {
	// Image is the name that was asked for, Digest the manifest's.
	Image, Digest string
	// WasmLayers are those that shims compile, by digest.
	WasmLayers []string
	// Complete are the keys under which every Wasm layer is there, sorted.
	Complete []CompileKey
	// Partial are the keys under which something is missing, sorted.
	Partial []CompileKey
}

// Warm says whether a shim with this key would compile nothing.
func (c ImageCache) Warm(key CompileKey) bool { return slices.Contains(c.Complete, key) }

// CacheNode is what warming needs of a node. It works on the images that
// Kubernetes uses.
type CacheNode interface {
	// CreateTask has the runtime create a task from an image, which is when
	// runwasi compiles, and removes it without starting it. Like Node.Run it
	// is serialised across the node. Errors are *RunError.
	CreateTask(ctx context.Context, runtime Runtime, image string) error
	// Compiled reads what is compiled of an image: ErrImageNotFound,
	// ErrNotCompilable, ErrUnreachable.
	Compiled(ctx context.Context, image string) (ImageCache, error)
}

// WarmerOptions are optional.
type WarmerOptions struct {
	// Deadline of one warming (default DefaultWarmDeadline).
	Deadline time.Duration
	// Logger (default slog.Default).
	Logger *slog.Logger
}

// Warmer makes shims compile images before pods need them.
type Warmer struct {
	node     CacheNode
	deadline time.Duration
	log      *slog.Logger
}

// NewWarmer returns a Warmer for a node.
func NewWarmer(node CacheNode, options WarmerOptions) *Warmer {
	w := &Warmer{node: node, deadline: options.Deadline, log: options.Logger}
	if w.deadline <= 0 {
		w.deadline = DefaultWarmDeadline
	}
	if w.log == nil {
		w.log = slog.Default()
	}
	return w
}

// Warmth is the result of warming one image.
type Warmth struct {
	ImageCache
	// Key is the engine's key; zero when it was not known.
	Key CompileKey
	// Created is how many tasks had to be created; 0: it was warm.
	Created int
	Took    time.Duration
}

// Cached reads whether an image is compiled under key, and creates nothing.
func (w *Warmer) Cached(ctx context.Context, key CompileKey, image string) (bool, error) {
	cache, err := w.node.Compiled(ctx, image)
	if err != nil {
		return false, err
	}
	return cache.Warm(key), nil
}

// Warm makes a runtime compile an image that the node already has. key is the
// one that a Proof of this runtime reports; with it an image that is warm
// costs nothing and the result is checked against it. With the zero key a task
// is always created, and code that an older shim left cannot be told from the
// present one's.
func (w *Warmer) Warm(ctx context.Context, runtime Runtime, key CompileKey, image string) (Warmth, error) {
	begin := time.Now()
	ctx, cancel := context.WithTimeout(ctx, w.deadline)
	defer cancel()
	result := Warmth{Key: key}
	done := func(err error) (Warmth, error) {
		result.Took = time.Since(begin)
		if err != nil {
			return result, fmt.Errorf("warming %s for %s: %w", image, runtime.Key(), err)
		}
		w.log.DebugContext(ctx, "an image is warm", "image", image, "runtime", runtime.Key(), "tasks", result.Created, "took", result.Took)
		return result, nil
	}
	var err error
	if result.ImageCache, err = w.node.Compiled(ctx, image); err != nil {
		return done(err)
	}
	known := key != (CompileKey{})
	if known && result.Warm(key) {
		return done(nil)
	}
	for {
		if err := w.node.CreateTask(ctx, runtime, image); err != nil {
			return done(err)
		}
		result.Created++
		if result.ImageCache, err = w.node.Compiled(ctx, image); err != nil {
			return done(err)
		}
		if known && result.Warm(key) || !known && len(result.Complete) > 0 {
			return done(nil)
		}
		if result.Created == warmAttempts {
			return done(fmt.Errorf("%w after %d attempts: look at the shim's messages in containerd's log", ErrNotCompiled, warmAttempts))
		}
		if err := pause(ctx, warmPause); err != nil {
			return done(err)
		}
	}
}

// CreateTask implements CacheNode. CRI ignores containers that lack its own
// labels, so neither it nor kubelet sees this one.
func (c *Containerd) CreateTask(ctx context.Context, runtime Runtime, image string) error {
	unlock, err := c.lock(ctx)
	if err != nil {
		return &RunError{StagePrepare, err}
	}
	defer unlock()
	ctx = namespaces.WithNamespace(ctx, kubernetesNamespace)
	id := newID("warm")
	ctx, release, err := c.lease(ctx, id)
	if err != nil {
		return err
	}
	defer release()
	container, err := c.create(ctx, containerSpec{
		id: id, image: image, runtime: runtime,
		args:   []string{"/"}, // the module comes from the image's layers
		labels: map[string]string{ownerLabel: ownerWarm},
	})
	if err != nil {
		return err
	}
	container.remove(ctx)
	return nil
}

// Compiled implements CacheNode.
func (c *Containerd) Compiled(ctx context.Context, image string) (ImageCache, error) {
	ctx = namespaces.WithNamespace(ctx, kubernetesNamespace)
	cache := ImageCache{Image: image}
	record, err := c.client.ImageService().Get(ctx, image)
	if errdefs.IsNotFound(err) {
		return cache, fmt.Errorf("%s: %w: pull it first", image, ErrImageNotFound)
	}
	if err != nil {
		return cache, c.wrap(StageConnect, err)
	}
	cache.Digest = record.Target.Digest.String()
	manifest, err := c.manifest(ctx, record.Target)
	if err != nil {
		return cache, fmt.Errorf("%s: %w", image, err)
	}
	var layers []map[string]string
	for _, layer := range manifest.Layers {
		if !slices.Contains(wasmMediaTypes, layer.MediaType) {
			continue
		}
		info, err := c.client.ContentStore().Info(ctx, layer.Digest)
		if err != nil {
			return cache, fmt.Errorf("%s: reading layer %s: %w", image, layer.Digest, c.wrap(StageConnect, err))
		}
		cache.WasmLayers = append(cache.WasmLayers, layer.Digest.String())
		layers = append(layers, info.Labels)
	}
	if len(layers) == 0 {
		return cache, fmt.Errorf("%s has no WebAssembly layer: %w", image, ErrNotCompilable)
	}
	info, err := c.client.ContentStore().Info(ctx, record.Target.Digest)
	if err != nil {
		return cache, fmt.Errorf("%s: reading the manifest's labels: %w", image, c.wrap(StageConnect, err))
	}
	for _, key := range compileKeys(append(slices.Clone(layers), info.Labels)...) {
		complete := info.Labels[key.label()] == "true"
		for _, labels := range layers {
			if !complete {
				break
			}
			if complete, err = c.isCompiled(ctx, key, labels[key.label()]); err != nil {
				return cache, fmt.Errorf("%s: %w", image, err)
			}
		}
		if complete {
			cache.Complete = append(cache.Complete, key)
		} else {
			cache.Partial = append(cache.Partial, key)
		}
	}
	return cache, nil
}

// manifest reads a single manifest. runwasi 1.0 reads no index either, so an
// image that is one never gets compiled.
func (c *Containerd) manifest(ctx context.Context, target ocispec.Descriptor) (ocispec.Manifest, error) {
	var manifest ocispec.Manifest
	if !images.IsManifestType(target.MediaType) {
		return manifest, fmt.Errorf("it is of type %s, not a single manifest: %w", target.MediaType, ErrNotCompilable)
	}
	if target.Size > maxManifest {
		return manifest, fmt.Errorf("its manifest is larger than %d bytes: %w", maxManifest, ErrNotCompilable)
	}
	data, err := content.ReadBlob(ctx, c.client.ContentStore(), target)
	if err != nil {
		return manifest, fmt.Errorf("reading the manifest: %w", c.wrap(StageConnect, err))
	}
	if err := json.Unmarshal(data, &manifest); err != nil {
		return manifest, fmt.Errorf("reading the manifest: %w", err)
	}
	return manifest, nil
}

// isCompiled says whether the blob that a layer's label names is there and came
// out of a shim's compiler. Which layer it names as its original does not
// matter: modules that compile to the same code share one blob, and it keeps
// the name of the first.
func (c *Containerd) isCompiled(ctx context.Context, key CompileKey, blob string) (bool, error) {
	compiled, err := digest.Parse(blob)
	if err != nil {
		return false, nil //nolint:nilerr // no label, or one that leads nowhere: not compiled
	}
	info, err := c.client.ContentStore().Info(ctx, compiled)
	if errdefs.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, c.wrap(StageConnect, err)
	}
	return info.Labels[key.label()+compileLabelBlob] != "", nil
}

// compileKeys are the keys in sets of labels, sorted, each once.
func compileKeys(sets ...map[string]string) []CompileKey {
	var keys []CompileKey
	for _, labels := range sets {
		for label := range labels {
			if key, ok := parseCompileLabel(label); ok && !slices.Contains(keys, key) {
				keys = append(keys, key)
			}
		}
	}
	slices.SortFunc(keys, func(a, b CompileKey) int { return strings.Compare(a.String(), b.String()) })
	return keys
}
