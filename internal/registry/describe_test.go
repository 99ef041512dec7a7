package registry

import (
	"errors"
	"strings"
	"testing"
)

func TestAManifestIsDescribed(t *testing.T) {
	for name, c := range map[string]struct {
		raw            string
		module, layers int64
		notWasm        bool // and described all the same
		err            error
	}{
		"spin":           {raw: manifestOf(MediaTypeImageConfig, MediaTypeSpinWasm, MediaTypeSpinApp), module: 100, layers: 200},
		"cncf":           {raw: manifestOf(MediaTypeWasmConfig, MediaTypeWasm), module: 100, layers: 100},
		"two components": {raw: manifestOf(MediaTypeImageConfig, MediaTypeSpinWasm, MediaTypeSpinWasm, MediaTypeSpinApp), layers: 300, notWasm: true},
		"no layers":      {raw: manifestOf(MediaTypeImageConfig), err: ErrNotWasm},
		"index":          {raw: `{"schemaVersion":2,"manifests":[{}],"layers":[{"size":1}]}`, err: ErrNotWasm},
		"not JSON":       {raw: `hello`, err: ErrNotWasm},
		"negative size":  {raw: strings.ReplaceAll(manifestOf(MediaTypeImageConfig, MediaTypeWasm), `"size":100`, `"size":-1`), err: ErrNotWasm},
		"sizes that overflow": {
			raw: strings.ReplaceAll(manifestOf(MediaTypeImageConfig, MediaTypeWasm, MediaTypeWasm), `"size":100`, `"size":9223372036854775807`), err: ErrNotWasm,
		},
	} {
		t.Run(name, func(t *testing.T) {
			d, err := describe([]byte(c.raw))
			if !errors.Is(err, c.err) || d.ModuleBytes != c.module || d.LayerBytes != c.layers || errors.Is(d.NotWasm, ErrNotWasm) != c.notWasm {
				t.Errorf("%+v, %v", d, err)
			}
		})
	}
}
