package bootstrap

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/k3s"
	"github.com/hearth-sh/hearth/internal/k3s/pki"
	"github.com/hearth-sh/hearth/internal/nodeconfig"
)

// TestEveryKeyThatIsPermittedIsRendered goes over every flag of k3s, and over
// words that are none: what a NodeConfig may say must be what k3s takes, and
// what it may not say must have a reason other than that nobody knows it.
func TestEveryKeyThatIsPermittedIsRendered(t *testing.T) {
	authorities, err := pki.Generate(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	token := func(u pki.User) pki.Token {
		made, err := pki.NewToken(u, authorities.ServerCA())
		if err != nil {
			t.Fatal(err)
		}
		return made
	}
	flags := k3s.Flags()
	keys := slices.Sorted(maps.Keys(flags))
	keys = append(keys, "disable-selinux", "multi-cluster-cidr", "no-flannel", "cluster-secret", "no-deploy", "an-entirely-new-setting")
	for _, role := range []v1alpha1.NodeRole{v1alpha1.RoleServer, v1alpha1.RoleAgent} {
		permitted := 0
		for _, key := range keys {
			spec, err := resolveKey(t, role, key, flags[key].List)
			takes := flags[key].Takes(role)
			if err != nil {
				var invalid *nodeconfig.Invalid
				if !errors.As(err, &invalid) || len(invalid.Problems) != 1 {
					t.Fatalf("%s as %s: %v", key, role, err)
				}
				if message := invalid.Problems[0].Message; takes && (strings.Contains(message, "no such key") || strings.Contains(message, "only ")) {
					t.Errorf("k3s as %s takes %s, which is refused: %s", role, key, message)
				}
				continue
			}
			permitted++
			if !takes {
				t.Errorf("%s is permitted, but k3s as %s has no such flag", key, role)
			}
			in := k3s.Input{
				Config:     spec,
				Node:       k3s.Node{InstanceID: "i-1", Region: "eu-central-1", Zone: "eu-central-1a", IPv4: netip.MustParseAddr("10.0.0.1")},
				Membership: k3s.Membership{Server: "https://10.0.0.2:6443", AgentToken: token(pki.UserNode)},
			}
			if role == v1alpha1.RoleServer {
				in.Membership.ServerToken = token(pki.UserServer)
			}
			if _, err := k3s.Render(in); err != nil {
				t.Errorf("%s is permitted as %s, but not rendered: %v", key, role, err)
			}
		}
		if permitted < 25 {
			t.Errorf("only %d keys are permitted as %s", permitted, role)
		}
	}
}

// resolveKey is what a NodeConfig with one key of k3s's comes to.
func resolveKey(t *testing.T, role v1alpha1.NodeRole, key string, list bool) (v1alpha1.NodeConfigSpec, error) {
	t.Helper()
	value := "true"
	if list {
		value = "[a=b]"
	}
	file := filepath.Join(t.TempDir(), "node.yaml")
	if err := os.WriteFile(file, fmt.Appendf(nil, `apiVersion: hearth.sh/v1alpha1
kind: NodeConfig
spec:
  pool: build
  role: %s
  cluster: {store: s3://bucket/prefix}
  artifacts: {manifest: https://example.com/m.json, publicKeys: ["ed25519:MCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqA="]}
  registries: {systemDefault: registry.example.com}
  k3s: {version: %s.2+k3s1, config: {%s: %s}}
`, role, k3s.FlagsVersion, key, value), 0o600); err != nil {
		t.Fatal(err)
	}
	r, err := nodeconfig.Resolve(t.Context(), nodeconfig.Sources{Files: []string{file}})
	if err != nil {
		return v1alpha1.NodeConfigSpec{}, err
	}
	return r.Config.Spec, nil
}
