package registry

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

const digestA = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"

func manifestOf(config string, layers ...string) string {
	var ls []string
	for _, l := range layers {
		ls = append(ls, fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":100}`, l, digestA))
	}
	return fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":%q,"digest":%q,"size":2},"layers":[%s]}`,
		MediaTypeManifest, config, digestA, strings.Join(ls, ","))
}

func TestManifestsAreRecognised(t *testing.T) {
	for name, c := range map[string]struct {
		raw    string
		format Format
		err    error
		says   string
	}{
		"spin":              {raw: manifestOf(MediaTypeImageConfig, MediaTypeSpinWasm, MediaTypeSpinApp), format: FormatSpin},
		"cncf":              {raw: manifestOf(MediaTypeWasmConfig, MediaTypeWasm), format: FormatWasm},
		"two components":    {raw: manifestOf(MediaTypeImageConfig, MediaTypeSpinWasm, MediaTypeSpinWasm, MediaTypeSpinApp), err: ErrNotWasm, says: "more than one component"},
		"spin without wasm": {raw: manifestOf(MediaTypeImageConfig, MediaTypeSpinApp), err: ErrNotWasm, says: "without a Wasm layer"},
		"spin with files":   {raw: manifestOf(MediaTypeImageConfig, MediaTypeSpinWasm, MediaTypeSpinData, MediaTypeSpinApp), err: ErrNotWasm, says: "with files"},
		"cncf two layers":   {raw: manifestOf(MediaTypeWasmConfig, MediaTypeWasm, MediaTypeWasm), err: ErrNotWasm, says: "exactly one layer"},
		"container":         {raw: manifestOf(MediaTypeImageConfig, "application/vnd.oci.image.layer.v1.tar+gzip"), err: ErrNotWasm, says: "container image"},
		"docker container":  {raw: manifestOf("application/vnd.docker.container.image.v1+json", "application/vnd.docker.image.rootfs.diff.tar.gzip"), err: ErrNotWasm, says: "container image"},
		"helm chart":        {raw: manifestOf("application/vnd.cncf.helm.config.v1+json", "application/vnd.cncf.helm.chart.content.v1.tar+gzip"), err: ErrNotWasm},
		"no layers":         {raw: manifestOf(MediaTypeImageConfig), err: ErrNotWasm, says: "no layers"},
		"index":             {raw: `{"schemaVersion":2,"mediaType":"` + MediaTypeIndex + `","manifests":[]}`, err: ErrNotWasm, says: "index"},
		"index, no type":    {raw: `{"schemaVersion":2,"manifests":[{}]}`, err: ErrNotWasm, says: "index"},
		"schema 1":          {raw: `{"schemaVersion":1}`, err: ErrNotWasm},
		"not JSON":          {raw: `hello`, err: ErrNotWasm},
		"empty":             {raw: ``, err: ErrNotWasm},
		"bad layer digest":  {raw: strings.ReplaceAll(manifestOf(MediaTypeWasmConfig, MediaTypeWasm), digestA, "sha256:../../x"), err: ErrNotWasm},
		"negative size":     {raw: strings.ReplaceAll(manifestOf(MediaTypeWasmConfig, MediaTypeWasm), `"size":100`, `"size":-1`), err: ErrNotWasm},
		"huge manifest":     {raw: strings.Repeat(" ", maxManifestBytes+1), err: ErrTooLarge},
	} {
		t.Run(name, func(t *testing.T) {
			l, err := parseManifest([]byte(c.raw))
			if !errors.Is(err, c.err) || l.Format != c.format {
				t.Fatalf("got %+v, %v; want format %q, error %v", l, err, c.format, c.err)
			}
			if err != nil && !strings.Contains(err.Error(), c.says) {
				t.Errorf("%q does not say %q", err, c.says)
			}
		})
	}
}

func FuzzParseManifest(f *testing.F) {
	f.Add([]byte(manifestOf(MediaTypeImageConfig, MediaTypeSpinWasm, MediaTypeSpinApp)))
	f.Add([]byte(manifestOf(MediaTypeWasmConfig, MediaTypeWasm)))
	f.Add([]byte(`{"schemaVersion":2,"manifests":null,"layers":[{"size":9e99}]}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		l, err := parseManifest(raw)
		if err != nil {
			if len(err.Error()) > 2000 {
				t.Errorf("error of %d bytes", len(err.Error()))
			}
			return
		}
		if l.Size < 4 || len(l.Digest.Hex) != 64 || l.Digest.Algorithm != "sha256" {
			t.Errorf("accepted %+v", l)
		}
	})
}

func FuzzParseReference(f *testing.F) {
	for _, s := range []string{"hello", "functions/hello:1", "ghcr.io/a/b@" + digestA, "localhost:5000/x", "oci://a.b/c", "127.0.0.1:1/../x", "[::1]:80/a"} {
		f.Add(s)
	}
	c, err := NewClient(ClientOptions{Registry: "127.0.0.1:5000"})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, err := c.parseReference(s)
		if err != nil {
			if !errors.Is(err, ErrInvalidReference) {
				t.Errorf("%q: %v", s, err)
			}
			return
		}
		if h := r.Context().RegistryStr(); h == "index.docker.io" && !strings.Contains(s, "docker.io/") {
			t.Errorf("%q goes to a public registry nobody named", s)
		}
	})
}
