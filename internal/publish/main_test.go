package publish

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/hearth-sh/hearth/internal/registry"
	"github.com/hearth-sh/hearth/internal/submit"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m,
		// distribution starts one event broadcaster per App and has no way
		// to end it; a process has one App for its whole life.
		goleak.IgnoreTopFunction("github.com/docker/go-events.(*Broadcaster).run"),
	)
}

// quiet gets what proxies say of connections that tests cut.
var quiet = log.New(io.Discard, "", 0)

// module is a file as submit has received it.
type module struct {
	path, digest string
	meta         submit.ArtifactMeta
	data         []byte
}

// moduleOf makes bytes that begin like a Wasm module; nothing here looks further.
func moduleOf(t testing.TB, size int, seed string) module {
	t.Helper()
	data := bytes.Repeat([]byte(seed+"\x5a\x01"), size/(len(seed)+2)+1)[:size]
	copy(data, "\x00asm\x01\x00\x00\x00")
	path := filepath.Join(t.TempDir(), "module.wasm")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(data)
	return module{path, "sha256:" + hex.EncodeToString(sum[:]), submit.ArtifactMeta{SizeBytes: int64(size), Kind: "core module"}, data}
}

// embedded serves the registry that comes with Hearth.
func embedded(t testing.TB) (host string) {
	t.Helper()
	e, err := registry.OpenEmbedded(t.Context(), registry.EmbeddedOptions{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = e.Close() })
	return serve(t, e.Handler())
}

func serve(t testing.TB, h http.Handler) (host string) {
	t.Helper()
	server := httptest.NewServer(h)
	t.Cleanup(server.Close)
	return strings.TrimPrefix(server.URL, "http://")
}

func clientOf(t testing.TB, host string, change ...func(*registry.ClientOptions)) *registry.Client {
	t.Helper()
	o := registry.ClientOptions{
		Registry: host, PlainHTTP: true, StallTimeout: 10 * time.Second,
		Backoff: func(int) time.Duration { return time.Millisecond },
	}
	for _, f := range change {
		f(&o)
	}
	c, err := registry.NewClient(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func publisherOf(t testing.TB, o Options) *Publisher {
	t.Helper()
	p, err := NewPublisher(o)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func (m module) publish(ctx context.Context, p *Publisher, tenant, name string) (string, error) {
	a, err := p.PublishFor(ctx, tenant, name, m.path, m.digest, m.meta)
	if err != nil {
		return "", err
	}
	return a.Repository + "@" + a.Digest, nil
}

// there fails the test unless the registry gives the module's bytes under the
// name that was returned.
func (m module) there(t testing.TB, c *registry.Client, reference string) {
	t.Helper()
	dst := filepath.Join(t.TempDir(), "pulled")
	_, pulled, err := c.Fetch(context.Background(), reference, dst, registry.PullOptions{})
	if err != nil {
		t.Errorf("pull %s: %v", reference, err)
		return
	}
	if got, err := os.ReadFile(dst); err != nil || !bytes.Equal(got, m.data) || pulled.Digest != m.digest {
		t.Errorf("%s has other bytes: %d of %d, %v", reference, len(got), len(m.data), err)
	}
}

func fileOf(t testing.TB, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
