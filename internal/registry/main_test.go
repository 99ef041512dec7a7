package registry

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv("REGISTRY_CRASH_DIR"); dir != "" {
		crashServer(dir)
		return
	}
	goleak.VerifyTestMain(m,
		// distribution starts one event broadcaster per App and has no way
		// to end it; a process has one App for its whole life.
		goleak.IgnoreTopFunction("github.com/docker/go-events.(*Broadcaster).run"),
	)
}

// wasmBytes makes bytes that begin like a Wasm module; this package looks no
// further.
func wasmBytes(n int, seed byte) []byte {
	b := bytes.Repeat([]byte{seed, 0x5a, 0x01}, n/3+1)[:n]
	copy(b, "\x00asm\x01\x00\x00\x00")
	return b
}

func moduleFile(t testing.TB, data []byte) Module {
	t.Helper()
	path := filepath.Join(t.TempDir(), "module.wasm")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(data)
	return Module{Path: path, Digest: "sha256:" + hex.EncodeToString(sum[:]), Size: int64(len(data))}
}

func openEmbedded(t testing.TB, dir string) *Embedded {
	t.Helper()
	e, err := OpenEmbedded(context.Background(), EmbeddedOptions{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Close() })
	return e
}

// serve starts the handler on a real TCP listener and returns its host:port.
func serve(t testing.TB, h http.Handler) string {
	t.Helper()
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	return strings.TrimPrefix(srv.URL, "http://")
}

func newClient(t testing.TB, host string, change ...func(*ClientOptions)) *Client {
	t.Helper()
	o := ClientOptions{Registry: host, PlainHTTP: true, StallTimeout: 10 * time.Second}
	for _, f := range change {
		f(&o)
	}
	c, err := NewClient(o)
	if err != nil {
		t.Fatal(err)
	}
	c.backoff = func(int) time.Duration { return time.Millisecond }
	t.Cleanup(c.Close)
	return c
}
