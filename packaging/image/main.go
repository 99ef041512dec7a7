// Command image writes Hearth's container image as an OCI image layout,
// without a container engine: static binaries need no base image.
//
//	image -version 1.2.3 -output dist/image linux/arm64=bin/arm64 linux/amd64=bin/amd64
//
// Each argument names a platform and the directory with its binaries. The
// result is the same, byte for byte, for the same binaries: no clock, no user
// and no file system goes into it. With -archive the layout is also written as
// one tar file, which `ctr images import` and `crane push` take.
package main

import (
	"archive/tar"
	"bytes"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/crypto/x509roots/fallback/bundle"
)

// nonRoot is the user of the engine and of anything whose pod does not say
// otherwise; the agent's pod says root, for it drives containerd.
const nonRoot = "65532:65532"

// epoch is every file's time: 1980 is the oldest that all archive formats know.
var epoch = time.Date(1980, 1, 1, 0, 0, 0, 0, time.UTC)

func main() {
	if err := run(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
}

func run(args []string, out io.Writer) error {
	flags := flag.NewFlagSet("image", flag.ContinueOnError)
	version := flags.String("version", "dev", "version, for the image's labels")
	name := flags.String("name", "hearth.sh/nodeagent:dev", "name the archive carries, for `ctr images import`")
	output := flags.String("output", "dist/image", "directory of the OCI image layout; replaced if it exists")
	archive := flags.String("archive", "", "also write the layout as a tar file")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() == 0 {
		return errors.New("say which platforms: linux/arm64=DIRECTORY linux/amd64=DIRECTORY")
	}
	index, err := buildIndex(*version, flags.Args())
	if err != nil {
		return err
	}
	if err := writeLayout(*output, *name, index); err != nil {
		return err
	}
	if *archive != "" {
		if err := archiveLayout(*output, *archive); err != nil {
			return err
		}
	}
	digest, err := index.Digest()
	if err != nil {
		return err
	}
	fmt.Fprintln(out, digest)
	return nil
}

// buildIndex makes an image per PLATFORM=DIRECTORY.
func buildIndex(version string, platforms []string) (v1.ImageIndex, error) {
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, arg := range platforms {
		platform, dir, ok := strings.Cut(arg, "=")
		if !ok || dir == "" {
			return nil, fmt.Errorf("%q is not PLATFORM=DIRECTORY", arg)
		}
		p, err := v1.ParsePlatform(platform)
		if err != nil || p.OS == "" || p.Architecture == "" {
			return nil, fmt.Errorf("%q is not a platform such as linux/arm64", platform)
		}
		img, err := buildImage(version, *p, dir)
		if err != nil {
			return nil, fmt.Errorf("image for %s: %w", platform, err)
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: p}})
	}
	return index, nil
}

func buildImage(version string, p v1.Platform, dir string) (v1.Image, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		return nil, err
	}
	slices.Sort(files)
	if !slices.ContainsFunc(files, func(f string) bool { return filepath.Base(f) == "nodeagent" }) {
		return nil, fmt.Errorf("no nodeagent in %s; build it first", dir)
	}
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	add := func(h tar.Header, content []byte) error {
		h.ModTime, h.Format, h.Size = epoch, tar.FormatPAX, int64(len(content))
		if err := w.WriteHeader(&h); err != nil {
			return err
		}
		_, err := w.Write(content)
		return err
	}
	for _, d := range []tar.Header{
		{Name: "etc/", Mode: 0o755, Typeflag: tar.TypeDir},
		{Name: "tmp/", Mode: 0o1777, Typeflag: tar.TypeDir},
		{Name: "usr/bin/", Mode: 0o755, Typeflag: tar.TypeDir},
	} {
		if err := add(d, nil); err != nil {
			return nil, err
		}
	}
	roots, err := trusted()
	if err != nil {
		return nil, err
	}
	for _, d := range []string{"etc/ssl/", "etc/ssl/certs/"} {
		if err := add(tar.Header{Name: d, Mode: 0o755, Typeflag: tar.TypeDir}, nil); err != nil {
			return nil, err
		}
	}
	if err := add(tar.Header{Name: "etc/ssl/certs/ca-certificates.crt", Mode: 0o644, Typeflag: tar.TypeReg}, roots); err != nil {
		return nil, err
	}
	users := "root:x:0:0:root:/:/sbin/nologin\nhearth:x:65532:65532:hearth:/:/sbin/nologin\n"
	if err := add(tar.Header{Name: "etc/passwd", Mode: 0o644, Typeflag: tar.TypeReg}, []byte(users)); err != nil {
		return nil, err
	}
	for _, f := range files {
		content, err := os.ReadFile(f)
		if err != nil {
			return nil, err
		}
		if err := add(tar.Header{Name: "usr/bin/" + filepath.Base(f), Mode: 0o755, Typeflag: tar.TypeReg}, content); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(buf.Bytes())), nil
	}, tarball.WithMediaType(types.OCILayer))
	if err != nil {
		return nil, err
	}
	img := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	img = mutate.ConfigMediaType(img, types.OCIConfigJSON)
	if img, err = mutate.Append(img, mutate.Addendum{Layer: layer, History: v1.History{
		Created: v1.Time{Time: epoch}, CreatedBy: "hearth packaging/image", Comment: "static binaries, no base image",
	}}); err != nil {
		return nil, err
	}
	config, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture, config.Variant = p.OS, p.Architecture, p.Variant
	config.Created = v1.Time{Time: epoch}
	config.Config = v1.Config{
		User: nonRoot, Entrypoint: []string{"/usr/bin/nodeagent"}, WorkingDir: "/",
		Env: []string{"PATH=/usr/bin"},
		Labels: map[string]string{
			"org.opencontainers.image.title":    "hearth nodeagent",
			"org.opencontainers.image.version":  version,
			"org.opencontainers.image.licenses": "Apache-2.0",
			"org.opencontainers.image.source":   "https://github.com/hearth-sh/hearth",
		},
	}
	return mutate.ConfigFile(img, config)
}

// trusted are Mozilla's authorities as PEM: without them no program in the image
// could speak to ECR, or to any registry, over TLS. They come from a module and
// not from this machine, so that the image stays the same everywhere. Authorities
// that are trusted for older certificates only are left out: PEM cannot say it.
func trusted() ([]byte, error) {
	var out bytes.Buffer
	for root := range bundle.Roots() {
		if root.Constraint != nil {
			continue
		}
		if err := pem.Encode(&out, &pem.Block{Type: "CERTIFICATE", Bytes: root.Certificate}); err != nil {
			return nil, err
		}
	}
	if out.Len() == 0 {
		return nil, errors.New("the bundle of authorities is empty")
	}
	return out.Bytes(), nil
}

// writeLayout replaces the directory only when the new layout is complete.
func writeLayout(dir, name string, index v1.ImageIndex) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	temp, err := os.MkdirTemp(filepath.Dir(dir), ".image-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(temp)
	if err := os.Chmod(temp, 0o755); err != nil {
		return err
	}
	l, err := layout.Write(temp, empty.Index)
	if err != nil {
		return err
	}
	_, tag, _ := strings.Cut(name[strings.LastIndex(name, "/")+1:], ":")
	if tag == "" {
		return fmt.Errorf("the image's name %q has no tag", name)
	}
	if err := l.AppendIndex(index, layout.WithAnnotations(map[string]string{
		"org.opencontainers.image.ref.name": tag,
		// containerd's importer takes the whole name from here.
		"io.containerd.image.name": name,
	})); err != nil {
		return err
	}
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	return os.Rename(temp, dir)
}

func archiveLayout(dir, file string) (err error) {
	temp := file + ".part"
	f, err := os.Create(temp)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(temp)
		}
	}()
	w := tar.NewWriter(f)
	if err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if err := w.WriteHeader(&tar.Header{
			Name: filepath.ToSlash(name), Mode: 0o644, Typeflag: tar.TypeReg,
			Size: int64(len(content)), ModTime: epoch, Format: tar.FormatPAX,
		}); err != nil {
			return err
		}
		_, err = w.Write(content)
		return err
	}); err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(temp, file)
}
