package cluster

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/platforms"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/opencontainers/go-digest"
)

// importTimeout bounds importing and unpacking one image on one node.
const importTimeout = 2 * time.Minute

// LoadBinaryImage makes an image of static programs and other files and
// imports it on every node, so that a pod with imagePullPolicy IfNotPresent
// runs it. ref is a full reference with registry and tag, "hearth.test/x:1";
// files maps absolute paths in the image to files of this machine, whose modes
// are kept. The entrypoint may be left out when there is one file.
func (c *Cluster) LoadBinaryImage(ctx context.Context, ref string, files map[string]string, entrypoint ...string) error {
	image, err := BinaryImage(files, entrypoint...)
	if err != nil {
		return err
	}
	return c.LoadImage(ctx, ref, image)
}

// LoadImage imports an image on every node.
func (c *Cluster) LoadImage(ctx context.Context, ref string, image v1.Image) error {
	for _, m := range c.Nodes() {
		if err := m.LoadImage(ctx, ref, image); err != nil {
			return err
		}
	}
	return nil
}

// ImportImage imports the images of a tar file (OCI layout or docker save) on
// every node.
func (c *Cluster) ImportImage(ctx context.Context, tarPath string) error {
	for _, m := range c.Nodes() {
		if err := m.ImportImage(ctx, tarPath); err != nil {
			return err
		}
	}
	return nil
}

// LoadBinaryImage is Cluster.LoadBinaryImage on this node only.
func (m *Machine) LoadBinaryImage(ctx context.Context, ref string, files map[string]string, entrypoint ...string) error {
	image, err := BinaryImage(files, entrypoint...)
	if err != nil {
		return err
	}
	return m.LoadImage(ctx, ref, image)
}

// ImportImage is Cluster.ImportImage on this node only.
func (m *Machine) ImportImage(ctx context.Context, tarPath string) error {
	file, err := os.Open(tarPath)
	if err != nil {
		return err
	}
	defer file.Close()
	return m.importTar(ctx, file)
}

// LoadImage imports an image under ref and under its digest, manifest and
// layers unchanged. One for another platform (a Wasm module, say) is imported
// and left packed, as a pull would find it.
func (m *Machine) LoadImage(ctx context.Context, ref string, image v1.Image) error {
	tag, err := name.NewTag(ref, name.StrictValidation)
	if err != nil {
		return fmt.Errorf("an image of a test needs registry, repository and tag: %w", err)
	}
	dir, err := os.MkdirTemp(m.Dir, "image-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	into, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	if err := into.AppendImage(image, layout.WithAnnotations(map[string]string{images.AnnotationImageName: tag.Name()})); err != nil {
		return fmt.Errorf("writing image %s: %w", ref, err)
	}
	read, write := io.Pipe()
	go func() { write.CloseWithError(tarDirectory(write, dir)) }() // ends with the reader
	defer read.Close()
	repository := tag.Context().Name()
	return m.importTar(ctx, read, containerd.WithDigestRef(func(d digest.Digest) string { return repository + "@" + d.String() }))
}

func (m *Machine) importTar(ctx context.Context, tar io.Reader, options ...containerd.ImportOpt) error {
	ctx, cancel := context.WithTimeout(ctx, importTimeout)
	defer cancel()
	client, err := m.Containerd()
	if err != nil {
		return err
	}
	defer client.Close()
	options = append(options, containerd.WithAllPlatforms(true),
		containerd.WithImageLabels(map[string]string{"io.cri-containerd.image": "managed"})) // CRI takes no notice of others
	imported, err := client.Import(ctx, tar, options...)
	if err != nil {
		return fmt.Errorf("importing an image on %s: %w", m.Name, err)
	}
	for _, image := range imported {
		available, err := images.Platforms(ctx, client.ContentStore(), image.Target)
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(available, platforms.Default().Match) {
			continue
		}
		if err := containerd.NewImage(client, image).Unpack(ctx, ""); err != nil {
			return fmt.Errorf("unpacking image %s on %s: %w", image.Name, m.Name, err)
		}
	}
	return m.awaitCRI(ctx, imported)
}

// BinaryImage makes an image for this machine's architecture; see
// Cluster.LoadBinaryImage. It also has a world-writable /tmp.
func BinaryImage(files map[string]string, entrypoint ...string) (v1.Image, error) {
	if len(entrypoint) == 0 {
		if len(files) != 1 {
			return nil, fmt.Errorf("an image of %d files needs an entrypoint", len(files))
		}
		entrypoint = slices.Collect(maps.Keys(files))
	}
	var content bytes.Buffer
	archive := tar.NewWriter(&content)
	made := map[string]bool{"/": true}
	directory := func(dir string, mode int64) error {
		made[dir] = true
		return archive.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: strings.TrimPrefix(dir, "/") + "/", Mode: mode})
	}
	if err := directory("/tmp", 0o1777); err != nil {
		return nil, err
	}
	for _, to := range slices.Sorted(maps.Keys(files)) {
		if !path.IsAbs(to) || path.Clean(to) != to {
			return nil, fmt.Errorf("a path in an image must be absolute and clean, not %q", to)
		}
		var parents []string
		for dir := path.Dir(to); !made[dir]; dir = path.Dir(dir) {
			parents = append(parents, dir)
		}
		for _, dir := range slices.Backward(parents) {
			if err := directory(dir, 0o755); err != nil {
				return nil, err
			}
		}
		if err := addFile(archive, strings.TrimPrefix(to, "/"), files[to]); err != nil {
			return nil, fmt.Errorf("adding %s to an image: %w", to, err)
		}
	}
	if err := archive.Close(); err != nil {
		return nil, err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(content.Bytes())), nil })
	if err != nil {
		return nil, err
	}
	image, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		return nil, err
	}
	config, err := image.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", runtime.GOARCH
	config.Config.Entrypoint = entrypoint
	config.Config.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	return mutate.ConfigFile(image, config)
}

func addFile(archive *tar.Writer, to, from string) error {
	file, err := os.Open(from)
	if err != nil {
		return err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return err
	}
	if err := archive.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: to, Size: info.Size(), Mode: int64(info.Mode().Perm())}); err != nil {
		return err
	}
	_, err = io.Copy(archive, file)
	return err
}

func tarDirectory(w io.Writer, dir string) error {
	archive := tar.NewWriter(w)
	err := filepath.WalkDir(dir, func(p string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		relative, err := filepath.Rel(dir, p)
		if err != nil {
			return err
		}
		return addFile(archive, filepath.ToSlash(relative), p)
	})
	if err != nil {
		return err
	}
	return archive.Close()
}

// awaitCRI waits until the kubelet's view of images has the imported ones: CRI
// learns of them by events, and a pod that comes first would try a pull.
func (m *Machine) awaitCRI(ctx context.Context, imported []images.Image) error {
	return m.cluster.WaitFor(ctx, "CRI of "+m.Name+" to see an image", importTimeout, func(ctx context.Context) (bool, error) {
		for _, image := range imported {
			ok, err := m.hasImage(ctx, image.Name)
			if err != nil || !ok {
				return false, err
			}
		}
		return true, nil
	})
}
