package cluster

import (
	"context"
	"fmt"
	"strings"

	"github.com/hearth-sh/hearth/test/process"
)

// Addresses come from 198.18.0.0/15, which RFC 2544 sets aside for tests of
// network devices: no real network has them, so neither this machine's routes
// nor what a test reaches outside can clash with them.
//
//	198.18.<slot>.1         this machine: API server, registries
//	198.18.<slot>.<10+n>    node n
//	198.19.<16*slot+n>.0/24 pods of node n
//	127.77.<slot>.1         what only this machine talks to: etcd and friends
const (
	// maxSlots is how many clusters may run on one machine at a time.
	maxSlots = 16
	// maxNodes is how many nodes a cluster may have.
	maxNodes = 16
	// serviceCIDR is the same in every cluster: it exists only inside the
	// network namespaces of its nodes.
	serviceCIDR = "10.96.0.0/16"
	// firstServiceIP is what the API server gives the service "kubernetes".
	firstServiceIP = "10.96.0.1"
)

func hostIP(slot int) string           { return fmt.Sprintf("198.18.%d.1", slot) }
func nodeIP(slot, n int) string        { return fmt.Sprintf("198.18.%d.%d", slot, 10+n) }
func podSubnet(slot, n int) string     { return fmt.Sprintf("198.19.%d.0/24", maxNodes*slot+n) }
func clusterCIDR(slot int) string      { return fmt.Sprintf("198.19.%d.0/20", maxNodes*slot) }
func loopbackIP(slot int) string       { return fmt.Sprintf("127.77.%d.1", slot) }
func hostLink(slot int) string         { return fmt.Sprintf("hearth%d", slot) }
func lanNS(slot int) string            { return fmt.Sprintf("hearth%d-lan", slot) }
func nodeNS(slot int, n string) string { return fmt.Sprintf("hearth%d-node-%s", slot, n) }

// netnsPath is where iproute2 keeps a named network namespace.
func netnsPath(name string) string { return "/run/netns/" + name }

// makeNetwork joins this machine and the nodes by a bridge. The bridge lives in
// a namespace of its own: on this machine's side a firewall that other
// software put there (container engines drop what they do not know) would see
// the frames between nodes.
func makeNetwork(ctx context.Context, slot int, nodes []string) error {
	lan := lanNS(slot)
	steps := [][]string{
		{"netns", "add", lan},
		{"-n", lan, "link", "set", "lo", "up"},
		{"-n", lan, "link", "add", "br0", "type", "bridge"},
		{"-n", lan, "link", "set", "br0", "up"},
		{"link", "add", hostLink(slot), "type", "veth", "peer", "name", "host", "netns", lan},
		{"-n", lan, "link", "set", "host", "master", "br0", "up"},
		{"address", "add", hostIP(slot) + "/24", "dev", hostLink(slot)},
		{"link", "set", hostLink(slot), "up"},
	}
	for n, name := range nodes {
		ns := nodeNS(slot, name)
		port := fmt.Sprintf("node%d", n)
		steps = append(steps,
			[]string{"netns", "add", ns},
			[]string{"-n", lan, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", ns},
			[]string{"-n", lan, "link", "set", port, "master", "br0", "up"},
			[]string{"-n", ns, "link", "set", "lo", "up"},
			[]string{"-n", ns, "address", "add", nodeIP(slot, n) + "/24", "dev", "eth0"},
			[]string{"-n", ns, "link", "set", "eth0", "up"},
			[]string{"-n", ns, "route", "add", "default", "via", hostIP(slot)},
			// Webhooks and tests reach pods from this machine.
			[]string{"route", "replace", podSubnet(slot, n), "via", nodeIP(slot, n), "dev", hostLink(slot)},
		)
		for other := range nodes {
			if other != n {
				steps = append(steps, []string{"-n", ns, "route", "add", podSubnet(slot, other), "via", nodeIP(slot, other)})
			}
		}
	}
	for _, step := range steps {
		if _, err := process.Output(ctx, "ip", step...); err != nil {
			return fmt.Errorf("joining the nodes by a network: %w", err)
		}
	}
	return nil
}

// networkNamespaces lists those of a slot that exist.
func networkNamespaces(ctx context.Context, slot int) ([]string, error) {
	list, err := process.Output(ctx, "ip", "netns", "list")
	if err != nil {
		return nil, err
	}
	var out []string
	for line := range strings.Lines(list) {
		fields := strings.Fields(line)
		if len(fields) > 0 && strings.HasPrefix(fields[0], fmt.Sprintf("hearth%d-", slot)) {
			out = append(out, fields[0])
		}
	}
	return out, nil
}

// removeNetwork removes all that makeNetwork made, also half of it. Links and
// routes go with their namespaces and peers.
func removeNetwork(ctx context.Context, slot int) error {
	// The end on this machine first: a namespace may live on for a moment in
	// processes that are being killed.
	if _, err := process.Output(ctx, "ip", "link", "show", hostLink(slot)); err == nil {
		if _, err := process.Output(ctx, "ip", "link", "delete", hostLink(slot)); err != nil {
			return err
		}
	}
	names, err := networkNamespaces(ctx, slot)
	if err != nil {
		return err
	}
	for _, name := range names {
		if _, err := process.Output(ctx, "ip", "netns", "delete", name); err != nil {
			return err
		}
	}
	return nil
}
