package images

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/klauspost/compress/zstd"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/component"
	"github.com/hearth-sh/hearth/internal/wasm"
)

const (
	// maxImageModules bounds the core modules compiled of one image.
	maxImageModules = 256
	// maxArchiveBytes bounds the layer archives of one image that are
	// searched for Wasm, compressed and unpacked each: an image of more is a
	// container that happens to be in a Wasm pod.
	maxArchiveBytes = 256 << 20
	// maxArchiveFiles bounds the files of one archive that are looked at.
	maxArchiveFiles = 100_000
	// maxNotes bounds the notes of one image.
	maxNotes = 5
	// walkVersion changes whenever a walk could find something else than
	// before, so that what was remembered of earlier walks is dropped.
	walkVersion = 1
)

// rawLayers are the media types of layers that are Wasm as it is: of the CNCF
// artifact and of runwasi, of Spin, and of runwasi's components.
var rawLayers = map[string]bool{
	"application/wasm":                                              true,
	"application/vnd.wasm.content.layer.v1+wasm":                    true,
	"application/vnd.bytecodealliance.wasm.component.layer.v0+wasm": true,
	"application/vnd.bytecodealliance.wasm.module.layer.v0+wasm":    true,
}

// findings are what one walk of an image brought to light.
type findings struct {
	// Version is walkVersion at the time.
	Version int `json:"version"`
	// Shim is shimLayers of the image.
	Shim bool `json:"shim,omitempty"`
	// Wasm says that any Wasm was found in it.
	Wasm bool `json:"wasm,omitempty"`
	// Modules are the digests of the core modules, each of the bytes of one
	// module, that the store can have an object of.
	Modules []string `json:"modules,omitempty"`
	// Notes say what could not be compiled and why.
	Notes []string `json:"notes,omitempty"`
}

func (f *findings) note(format string, args ...any) {
	if len(f.Notes) < maxNotes {
		f.Notes = append(f.Notes, shorten(fmt.Sprintf(format, args...), 300))
	}
}

// isArchive says whether a layer is a tar archive of files, and of which
// compression: "", "gzip" or "zstd".
func isArchive(mediaType string) (compression string, ok bool) {
	base, suffix, _ := strings.Cut(mediaType, "+")
	switch {
	case base == "application/vnd.oci.image.layer.v1.tar" || base == "application/vnd.oci.image.layer.nondistributable.v1.tar":
		return suffix, suffix == "" || suffix == "gzip" || suffix == "zstd"
	case mediaType == "application/vnd.docker.image.rootfs.diff.tar":
		return "", true
	case mediaType == "application/vnd.docker.image.rootfs.diff.tar.gzip":
		return "gzip", true
	}
	return "", false
}

// walker takes the core modules out of an image.
type walker struct {
	runtime Runtime
	// dir is for modules between the image and the store, one at a time.
	dir string
	// have says that the store has an object of that module.
	have func(digest string) bool
	// ensure puts a module into the store. A *refusal means that the module
	// is not for the store; any other error ends the walk.
	ensure func(ctx context.Context, digest, path string) error
	// archives says to look into layers that are archives of files.
	archives bool

	found findings
	seen  map[string]bool
}

// refusal is why the store will never have an object of a module.
type refusal struct{ reason string }

func (r *refusal) Error() string { return r.reason }

// walk visits every core module of an image once.
func (w *walker) walk(ctx context.Context, m Manifest) (findings, error) {
	w.found = findings{Version: walkVersion}
	w.seen = make(map[string]bool)
	var archived int64
	wasmLayers := false
	for _, l := range m.Layers {
		if rawLayers[l.MediaType] {
			wasmLayers = true
			if err := w.layer(ctx, l); err != nil {
				return findings{}, err
			}
			continue
		}
		if compression, ok := isArchive(l.MediaType); ok && w.archives {
			if archived += max(l.Size, 0); archived > maxArchiveBytes {
				w.found.note("its file layers have more than %d MiB and are not searched for modules", maxArchiveBytes>>20)
				w.archives = false
				continue
			}
			if err := w.archive(ctx, l, compression); err != nil {
				return findings{}, err
			}
		}
	}
	w.found.Wasm = w.found.Wasm || wasmLayers
	w.found.Shim = shimLayers(m)
	return w.found, nil
}

// layer visits a layer that is one module or component.
func (w *walker) layer(ctx context.Context, l Layer) error {
	if l.Size <= v1alpha1.MaxModuleBytes && w.have(l.Digest) {
		// Only a whole module can have been made into an object under the
		// layer's own digest.
		w.add(l.Digest)
		return nil
	}
	blob, err := w.runtime.Open(ctx, l)
	if err != nil {
		return err
	}
	defer blob.Close()
	return w.visit(ctx, blob, blob.Size(), "layer "+shortDigest(l.Digest))
}

// visit takes the modules out of what is a module or a component.
func (w *walker) visit(ctx context.Context, r io.ReaderAt, size int64, name string) error {
	head := make([]byte, wasm.SniffBytes)
	n, err := r.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return fail(CodeRuntimeUnavailable, err, "%s could not be read", name)
	}
	switch kind := wasm.Sniff(head[:n]); kind {
	case wasm.KindModule:
		w.found.Wasm = true
		return w.module(ctx, io.NewSectionReader(r, 0, size), name)
	case wasm.KindComponent:
		w.found.Wasm = true
		sections, err := component.CoreModules(r, size)
		switch {
		case errors.Is(err, component.ErrMalformed), errors.Is(err, component.ErrLimit), errors.Is(err, component.ErrNotComponent):
			w.found.note("not resident-servable: %s: %v", name, err)
			return nil
		case err != nil:
			return fail(CodeRuntimeUnavailable, err, "%s could not be read", name)
		}
		for i, s := range sections {
			if err := w.module(ctx, io.NewSectionReader(r, s.Offset, s.Size), fmt.Sprintf("core module %d of %s", i, name)); err != nil {
				return err
			}
		}
		return nil
	default:
		w.found.note("not resident-servable: %s is neither a core module nor a component (%s)", name, kind)
		return nil
	}
}

// module brings one core module into the store.
func (w *walker) module(ctx context.Context, r *io.SectionReader, name string) error {
	if len(w.seen) >= maxImageModules {
		w.found.note("it has more than %d core modules, the others are not compiled", maxImageModules)
		return nil
	}
	if r.Size() > v1alpha1.MaxModuleBytes {
		w.found.note("not resident-servable: %s has %d MiB, more than %d", name, r.Size()>>20, v1alpha1.MaxModuleBytes>>20)
		return nil
	}
	f, err := os.CreateTemp(w.dir, "module-*.wasm")
	if err != nil {
		return diskError(err, "make a temporary file for %s", name)
	}
	defer os.Remove(f.Name())
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(io.MultiWriter(f, h), contextReader{ctx, r}); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return diskError(err, "copy %s out of its image", name)
	}
	digest := "sha256:" + hex.EncodeToString(h.Sum(nil))
	if w.seen[digest] {
		return nil
	}
	w.seen[digest] = true
	if w.have(digest) {
		w.add(digest)
		return nil
	}
	err = w.ensure(ctx, digest, f.Name())
	var no *refusal
	if errors.As(err, &no) {
		w.found.note("not resident-servable: %s: %s", name, no.reason)
		return nil
	}
	if err != nil {
		return err
	}
	w.add(digest)
	return nil
}

func (w *walker) add(digest string) {
	w.seen[digest] = true
	w.found.Wasm = true
	w.found.Modules = append(w.found.Modules, digest)
}

// archive looks for Wasm files in a layer of files. A damaged archive is a
// note: containerd unpacked it, or will tell kubelet why not.
func (w *walker) archive(ctx context.Context, l Layer, compression string) error {
	blob, err := w.runtime.Open(ctx, l)
	if err != nil {
		return err
	}
	defer blob.Close()
	name := "layer " + shortDigest(l.Digest)
	var r io.Reader = contextReader{ctx, io.NewSectionReader(blob, 0, blob.Size())}
	switch compression {
	case "gzip":
		z, err := gzip.NewReader(r)
		if err != nil {
			w.found.note("%s cannot be unpacked: %v", name, err)
			return ctx.Err()
		}
		r = z
	case "zstd":
		z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(64<<20))
		if err != nil {
			w.found.note("%s cannot be unpacked: %v", name, err)
			return ctx.Err()
		}
		defer z.Close()
		r = z
	}
	limited := &io.LimitedReader{R: r, N: maxArchiveBytes}
	t := tar.NewReader(limited)
	for files := 0; ; files++ {
		h, err := t.Next()
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, io.EOF):
			return nil
		case limited.N <= 0, files == maxArchiveFiles:
			w.found.note("%s unpacks to more than %d MiB or %d files, the rest is not searched", name, maxArchiveBytes>>20, maxArchiveFiles)
			return nil
		case err != nil:
			w.found.note("%s cannot be unpacked: %v", name, err)
			return nil
		}
		if h.Typeflag != tar.TypeReg || h.Size < 8 {
			continue
		}
		if err := w.file(ctx, t, h, name); err != nil {
			return err
		}
	}
}

// file visits one file of an archive if it is Wasm.
func (w *walker) file(ctx context.Context, t io.Reader, h *tar.Header, layer string) error {
	head := make([]byte, 8)
	if _, err := io.ReadFull(t, head); err != nil {
		return ctx.Err() // the next header says what is wrong
	}
	if kind := wasm.Sniff(head); kind != wasm.KindModule && kind != wasm.KindComponent {
		return nil
	}
	name := fmt.Sprintf("file %s of %s", shorten(fmt.Sprintf("%.100q", h.Name), 120), layer)
	if h.Size > 2*v1alpha1.MaxModuleBytes {
		w.found.note("not resident-servable: %s has %d MiB", name, h.Size>>20)
		return nil
	}
	f, err := os.CreateTemp(w.dir, "file-*.wasm")
	if err != nil {
		return diskError(err, "make a temporary file for %s", name)
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if _, err = f.Write(head); err == nil {
		var out diskWriter
		out.f = f
		if _, err = io.Copy(&out, t); err != nil && out.err == nil {
			return ctx.Err() // the archive is cut off; the next header says so
		}
	}
	if err != nil {
		return diskError(err, "copy %s out of its image", name)
	}
	return w.visit(ctx, f, h.Size, name)
}

// diskWriter tells errors of the file from those of what is copied to it.
type diskWriter struct {
	f   *os.File
	err error
}

func (d *diskWriter) Write(p []byte) (int, error) {
	n, err := d.f.Write(p)
	d.err = err
	return n, err
}

// contextReader ends with its context: content is read over a connection.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (c contextReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}

func shortDigest(d string) string {
	d = strings.TrimPrefix(d, "sha256:")
	return d[:min(len(d), 12)]
}
