package images

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	cimages "github.com/containerd/containerd/v2/core/images"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/backoff"
)

// reconnect is how the connection to containerd is made again: at once, then
// at most every three seconds.
var reconnect = backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 3 * time.Second}

// errLargeBlob says that something to be read into memory is too large for that.
var errLargeBlob = fmt.Errorf("it has more than %d bytes", maxManifestBytes)

// smallBlobs reads only what is as small as manifests and configurations are.
// The size in a descriptor is what an image's maker says of a blob; what
// [content.ReadBlob] reads into memory is all of the blob that is there, which
// may as well be a layer.
type smallBlobs struct{ content.Provider }

// ReaderAt implements [content.Provider].
func (b smallBlobs) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	r, err := b.Provider.ReaderAt(ctx, desc)
	if err != nil {
		return nil, err
	}
	if r.Size() > maxManifestBytes {
		return nil, errors.Join(errLargeBlob, r.Close())
	}
	return r, nil
}

// manifestType finds out what a blob of a content store is, which does not
// keep media types.
func manifestType(raw []byte) (string, error) {
	var m struct {
		SchemaVersion int             `json:"schemaVersion"`
		MediaType     string          `json:"mediaType"`
		Config        json.RawMessage `json:"config"`
		Layers        json.RawMessage `json:"layers"`
		Manifests     json.RawMessage `json:"manifests"`
	}
	if err := json.Unmarshal(raw, &m); err != nil {
		return "", err
	}
	switch {
	case m.SchemaVersion != 2:
		return "", fmt.Errorf("schema version %d, not 2", m.SchemaVersion)
	case cimages.IsManifestType(m.MediaType), cimages.IsIndexType(m.MediaType):
		return m.MediaType, nil
	case m.MediaType != "":
		return "", fmt.Errorf("media type %.100q", m.MediaType)
	case len(m.Manifests) > 0 && len(m.Config) == 0:
		return "application/vnd.oci.image.index.v1+json", nil
	case len(m.Config) > 0 && len(m.Layers) > 0:
		return "application/vnd.oci.image.manifest.v1+json", nil
	default:
		return "", errors.New("neither a manifest nor an index")
	}
}

// architecture reads one field of an image's configuration.
func architecture(raw []byte) string {
	var c struct {
		Architecture string `json:"architecture"`
	}
	if json.Unmarshal(raw, &c) != nil {
		return ""
	}
	return c.Architecture
}
