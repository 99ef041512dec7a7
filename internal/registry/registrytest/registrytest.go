// Package registrytest runs Debian's build of the distribution registry for
// tests: one that is not ours and that wants a password.
package registrytest

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/test/needs"
)

// startTimeout bounds the registry's start on a busy machine.
const startTimeout = time.Minute

// Start runs a registry on loopback for as long as the test, which lets in one
// user, and returns its host:port. It speaks HTTP. Without the programs
// docker-registry and htpasswd the test is skipped, but with CI set it fails.
func Start(t testing.TB, user, password string) (host string) {
	t.Helper()
	server, htpasswd := needs.Program(t, "docker-registry"), needs.Program(t, "htpasswd")
	dir := t.TempDir()
	// The cheapest hash: the registry computes it for every request.
	entry, err := exec.CommandContext(t.Context(), htpasswd, "-bnBC", "4", user, password).Output()
	if err != nil {
		t.Fatalf("htpasswd: %v", err)
	}
	ln, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	host = ln.Addr().String()
	_ = ln.Close() // it takes an address, not a socket
	config := fmt.Sprintf("version: 0.1\nlog: {level: error}\nstorage: {filesystem: {rootdirectory: %s/data}, delete: {enabled: true}}\n"+
		"http: {addr: %s, secret: x}\nauth: {htpasswd: {realm: test, path: %s/htpasswd}}\n", dir, host, dir)
	for file, content := range map[string][]byte{"htpasswd": bytes.TrimSpace(entry), "config.yml": []byte(config)} {
		if err := os.WriteFile(filepath.Join(dir, file), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background()) // the test's own ends before its clean-up
	cmd := exec.CommandContext(ctx, server, "serve", filepath.Join(dir, "config.yml"))
	if err := cmd.Start(); err != nil {
		cancel()
		t.Fatal(err)
	}
	t.Cleanup(func() { cancel(); _ = cmd.Wait() })
	for began := time.Now(); time.Since(began) < startTimeout; time.Sleep(20 * time.Millisecond) {
		if conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", host); err == nil {
			_ = conn.Close()
			return host
		}
	}
	t.Fatal("docker-registry did not start in time")
	return ""
}
