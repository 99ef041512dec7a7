package artifact

import (
	"bytes"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func FuzzParseManifest(f *testing.F) {
	good := encoded(f, testManifest(1))
	f.Add(good)
	f.Add(bytes.Replace(good, []byte("k3s"), []byte(`k\u0000`), 1))
	f.Add([]byte(`{"artifacts":[{}]}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		m, err := ParseManifest(raw)
		if err != nil {
			wantCode(t, err, CodeManifestInvalid)
			return
		}
		// What parses means the same after another round.
		b, err := m.Encode()
		if err != nil {
			t.Fatal(err)
		}
		again, err := ParseManifest(b)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(m, again); diff != "" {
			t.Error(diff)
		}
	})
}

func FuzzOpenManifest(f *testing.F) {
	k := newKey(f)
	manifest := encoded(f, testManifest(1))
	signatures := signedBy(f, manifest, k)
	f.Add(manifest, signatures)
	f.Fuzz(func(t *testing.T, raw, sigs []byte) {
		if _, err := OpenManifest(raw, sigs, Trust{Keys: []PublicKey{k.Public()}}); err == nil && !bytes.Equal(raw, manifest) {
			t.Error("a manifest that nobody signed was opened")
		}
	})
}

func FuzzUnpack(f *testing.F) {
	content := []byte("a shim")
	archive := tarOf(f, entry{"x", '0', content}, entry{"bin/shim", '0', content})
	for format, served := range map[Format][]byte{
		FormatGzip: gzipped(f, content), FormatZstd: zstandard(f, content, 1<<20),
		FormatTar: archive, FormatTarGzip: gzipped(f, archive), FormatTarZstd: zstandard(f, archive, 1<<20),
	} {
		f.Add(served, string(format))
		f.Add(served[:len(served)/2], string(format))
	}
	f.Fuzz(func(t *testing.T, served []byte, format string) {
		if !Format(format).known() || Format(format).raw() {
			return
		}
		const limit = 1 << 16
		decoder, err := newZstdDecoder()
		if err != nil {
			t.Fatal(err)
		}
		out := &countingWriter{}
		n, err := unpack(bytes.NewReader(served), out, Format(format), "bin/shim", limit, decoder)
		if n != out.n || n > limit+1 || err == nil && n > limit {
			t.Errorf("%d bytes were written, %d counted, %d allowed: %v", out.n, n, limit, err)
		}
	})
}

type countingWriter struct{ n int64 }

func (c *countingWriter) Write(p []byte) (int, error) {
	c.n += int64(len(p))
	return len(p), nil
}

func FuzzParseLocation(f *testing.F) {
	for _, s := range []string{"https://mirror.example/a?b=c", "s3://bucket/key?region=eu-west-1", "http://[::1]:80/", "https://u:p@h/", "s3://b.b/%2F"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		l, err := parseLocation(s)
		if err != nil {
			return
		}
		if _, err := parseLocation(l.url.String()); err != nil && len(l.url.String()) <= maxURLLength {
			t.Errorf("%q became %q: %v", s, l.url, err)
		}
		if l.url.RawQuery != "" && l.url.Scheme != "s3" && bytes.Contains([]byte(l.String()), []byte("?"+l.url.RawQuery)) {
			t.Errorf("%q is shown as %q", s, l)
		}
	})
}

func FuzzParseKeys(f *testing.F) {
	k := newKey(f)
	text, err := k.Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte(k.Public().String()))
	f.Fuzz(func(t *testing.T, b []byte) {
		if k, err := ParsePublicKey(string(b)); err == nil && k.String() != string(b) {
			t.Errorf("%q is also written %q", b, k)
		}
		if k, err := ParsePrivateKey(b); err == nil {
			if _, err := k.Encode(); err != nil {
				t.Error(err)
			}
		}
	})
}

func FuzzContentRange(f *testing.F) {
	f.Add("bytes 1-2/3")
	f.Fuzz(func(t *testing.T, s string) {
		if first, total, ok := parseContentRange(s); ok && (first < 0 || total != -1 && total <= first) {
			t.Errorf("%q: %d of %d", s, first, total)
		}
	})
}
