package ecr

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/hearth-sh/hearth/test/cluster"
)

// On makes the names lead here on a node until the test ends, and has its
// containerd trust the authority. Pods on the host's network learn of the names
// when they are created.
func (s *Service) On(t testing.TB, m *cluster.Machine) {
	t.Helper()
	dir := filepath.Join(m.ContainerdConfigDir, "certs.d", Host)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	hosts := fmt.Sprintf("server = \"https://%s\"\n\n[host.\"https://%s\"]\n  capabilities = [\"pull\", \"resolve\"]\n  ca = \"ca.crt\"\n", Host, Host)
	for file, content := range map[string][]byte{"ca.crt": s.Authority.PEM, "hosts.toml": []byte(hosts)} {
		if err := os.WriteFile(filepath.Join(dir, file), content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	before, err := os.ReadFile(m.Path("/etc/hosts"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.WriteFile(m.Path("/etc/hosts"), before, 0o644) })
	if err := os.WriteFile(m.Path("/etc/hosts"), fmt.Appendf(before, "\n%s", s.Hosts()), 0o644); err != nil {
		t.Fatal(err)
	}
}
