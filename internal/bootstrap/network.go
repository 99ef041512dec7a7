package bootstrap

import (
	"path/filepath"
	"slices"
	"strings"

	"github.com/hearth-sh/hearth/internal/host"
)

// foreignNetwork is where networks that k3s was not to make leave what a reset
// knows nothing about: containerd's usual configuration, which k3s's own does not
// use, and interfaces and state of Calico and Cilium.
var foreignNetwork = []string{
	"/etc/cni/net.d/*", "/var/lib/calico", "/var/run/calico", "/var/run/cilium",
	"/sys/class/net/cali*", "/sys/class/net/vxlan.calico", "/sys/class/net/cilium_*",
}

// networkLeft lists what is there of a network that somebody else made for the
// pods. It is below a root directory, "/" for the machine itself.
func networkLeft(root string) []host.Left {
	var left []host.Left
	for _, pattern := range foreignNetwork {
		found, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			continue // no pattern is malformed
		}
		for _, path := range found {
			name, err := filepath.Rel(root, path)
			if err != nil {
				continue
			}
			left = append(left, host.Left{Path: "/" + name, Why: "it is of a network that was not k3s's; remove it as that network's documentation says"})
		}
	}
	slices.SortFunc(left, func(a, b host.Left) int { return strings.Compare(a.Path, b.Path) })
	return left
}
