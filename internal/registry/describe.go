package registry

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"net/http"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

// Description is what an artifact's manifest says of it.
type Description struct {
	// ModuleBytes is the size of the one Wasm layer; 0 with NotWasm.
	ModuleBytes int64
	// LayerBytes is the size of all layers together.
	LayerBytes int64
	// NotWasm is why Pull does not take the artifact, an ErrNotWasm; nil: it
	// does. A Spin application of several components is an example.
	NotWasm error
}

// Describe reads the manifest of an artifact, and no layer: that the registry
// has it under this name, and how large it is. The artifact is named by digest
// only, and the manifest is verified against it. What is no single image, such
// as an index, is ErrNotWasm.
//
// Other errors are those of Pull.
func (c *Client) Describe(ctx context.Context, a v1alpha1.Artifact) (Description, error) {
	repo, err := c.repository(a)
	if err != nil {
		return Description{}, fmt.Errorf("describe: %w", err)
	}
	want, err := parseDigest(a.Digest)
	if err != nil {
		return Description{}, fmt.Errorf("describe an artifact of %s: %w", repo, err)
	}
	var raw []byte
	err = c.retry(ctx, resolveTimeout, "describe", func(ctx context.Context) error {
		rt, err := c.session(ctx, repo)
		if err != nil {
			return err
		}
		if raw, err = getManifest(ctx, &http.Client{Transport: rt}, repo, want.String()); err != nil {
			return err
		}
		if got := hashOf(raw); got != want {
			return fmt.Errorf("%w: the manifest is %s", ErrDigestMismatch, got)
		}
		return nil
	})
	if err != nil {
		return Description{}, fmt.Errorf("describe %s@%s: %w", repo, want, err)
	}
	d, err := describe(raw)
	if err != nil {
		return Description{}, fmt.Errorf("describe %s@%s: %w", repo, want, err)
	}
	return d, nil
}

func describe(raw []byte) (d Description, err error) {
	layer, err := parseManifest(raw)
	if err == nil {
		d.ModuleBytes = layer.Size
	} else {
		d.NotWasm = err
	}
	var m manifestDoc
	if json.Unmarshal(raw, &m) != nil || len(m.Layers) == 0 || m.MediaType == MediaTypeIndex || m.MediaType == MediaTypeDockerIndex || len(m.Manifests) > 0 {
		return Description{}, err // parseManifest said why
	}
	for _, l := range m.Layers {
		if l.Size < 0 || l.Size > math.MaxInt64-d.LayerBytes {
			return Description{}, fmt.Errorf("%w: a layer of %d bytes", ErrNotWasm, l.Size)
		}
		d.LayerBytes += l.Size
	}
	return d, nil
}
