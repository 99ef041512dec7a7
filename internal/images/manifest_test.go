package images

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	cimages "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// blobs are a content store in memory, of which a blob may be as large as said
// without being there.
type blobs map[digest.Digest]blob

type blob struct {
	*bytes.Reader
	size int64
	t    *testing.T
	open *int
}

func (b blob) Size() int64  { return b.size }
func (b blob) Close() error { *b.open--; return nil }
func (b blob) ReadAt(p []byte, off int64) (int, error) {
	if b.size > maxManifestBytes {
		b.t.Errorf("%d bytes of a blob of %d were read into memory", len(p), b.size)
	}
	return b.Reader.ReadAt(p, off)
}

func (b blobs) ReaderAt(_ context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	r, ok := b[desc.Digest]
	if !ok {
		return nil, errdefs.ErrNotFound
	}
	*r.open++
	return r, nil
}

func TestABlobIsNotReadBecauseItsDescriptorSaysThatItIsSmall(t *testing.T) {
	var open int
	store := blobs{}
	put := func(v any, size int64) ocispec.Descriptor {
		raw, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		desc := ocispec.Descriptor{Digest: digest.FromBytes(raw), Size: int64(len(raw)), MediaType: ocispec.MediaTypeImageManifest}
		if size == 0 {
			size = desc.Size
		}
		store[desc.Digest] = blob{Reader: bytes.NewReader(raw), size: size, t: t, open: &open}
		return desc
	}
	large := put(map[string]any{"schemaVersion": 2}, 2<<30) // said to have a few bytes
	if _, err := content.ReadBlob(t.Context(), smallBlobs{store}, large); !errors.Is(err, errLargeBlob) {
		t.Errorf("a configuration of 2 GiB: %v", err)
	}
	platform := platforms.DefaultSpec()
	large.Platform = &platform
	index := put(ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{large}}, 0)
	index.MediaType = ocispec.MediaTypeImageIndex
	if _, err := cimages.Manifest(t.Context(), smallBlobs{store}, index, platforms.Default()); !errors.Is(err, errLargeBlob) {
		t.Errorf("an index that leads to a manifest of 2 GiB: %v", err)
	}
	if open != 0 {
		t.Errorf("%d blobs are still open", open)
	}
}

func FuzzManifestType(f *testing.F) {
	for _, seed := range []string{
		``, `{}`, `[]`, `{"schemaVersion":2}`, `{"schemaVersion":1,"mediaType":"x"}`,
		`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json"}`,
		`{"schemaVersion":2,"manifests":[{}]}`, `{"schemaVersion":2,"config":{},"layers":[]}`, `{"architecture":"wasm"}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		kind, err := manifestType(raw)
		if (err == nil) != (cimages.IsManifestType(kind) || cimages.IsIndexType(kind)) {
			t.Errorf("type %q, %v", kind, err)
		}
		if err != nil && len(err.Error()) > 1000 {
			t.Errorf("an error of %d bytes", len(err.Error()))
		}
		architecture(raw)
	})
}
