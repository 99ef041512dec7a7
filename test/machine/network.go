package machine

import (
	"context"
	"fmt"
	"strings"

	"github.com/hearth-sh/hearth/test/process"
)

// Addresses come from 198.18.0.0/15, which RFC 2544 sets aside for tests of
// network devices; test/cluster has the third bytes below 16.
//
//	198.18.<100+slot>.1       this machine
//	198.18.<100+slot>.<10+n>  machine n
const (
	// maxSlots is how many networks may exist on one machine at a time.
	maxSlots = 8
	// maxMachines is how many machines a network may ever have.
	maxMachines = 64
	// metadataIP is the instance metadata service's, resolverIP that of the
	// VPC's resolver; every machine has its own of both on its loopback.
	metadataIP, resolverIP = "169.254.169.254", "169.254.169.253"
)

func hostIP(slot int) string           { return fmt.Sprintf("198.18.%d.1", 100+slot) }
func machineIP(slot, n int) string     { return fmt.Sprintf("198.18.%d.%d", 100+slot, 10+n) }
func hostLink(slot int) string         { return fmt.Sprintf("hearthm%d", slot) }
func lanNS(slot int) string            { return fmt.Sprintf("hearthm%d-lan", slot) }
func machineNS(slot int, n int) string { return fmt.Sprintf("hearthm%d-%d", slot, n) }
func port(n int) string                { return fmt.Sprintf("port%d", n) }
func netnsPath(name string) string     { return "/run/netns/" + name }

func ip(ctx context.Context, steps ...[]string) error {
	for _, step := range steps {
		if _, err := process.Output(ctx, "ip", step...); err != nil {
			return err
		}
	}
	return nil
}

// makeLAN makes the bridge, in a namespace of its own: on this machine's side a
// firewall that other software put there would see the frames.
func makeLAN(ctx context.Context, slot int) error {
	lan := lanNS(slot)
	if err := ip(ctx,
		[]string{"netns", "add", lan},
		[]string{"-n", lan, "link", "set", "lo", "up"},
		[]string{"-n", lan, "link", "add", "br0", "type", "bridge"},
		[]string{"-n", lan, "link", "set", "br0", "up"},
		[]string{"link", "add", hostLink(slot), "type", "veth", "peer", "name", "host", "netns", lan},
		[]string{"-n", lan, "link", "set", "host", "master", "br0", "up"},
		[]string{"address", "add", hostIP(slot) + "/24", "dev", hostLink(slot)},
		[]string{"link", "set", hostLink(slot), "up"},
	); err != nil {
		return fmt.Errorf("making a network for machines: %w", err)
	}
	return nil
}

// attach gives machine n its network namespace.
func attach(ctx context.Context, slot, n int, mac string) error {
	ns, lan := machineNS(slot, n), lanNS(slot)
	if err := ip(ctx,
		[]string{"netns", "add", ns},
		[]string{"-n", lan, "link", "add", port(n), "type", "veth", "peer", "name", "eth0", "netns", ns},
		[]string{"-n", lan, "link", "set", port(n), "master", "br0", "up"},
		[]string{"-n", ns, "link", "set", "eth0", "address", mac},
		[]string{"-n", ns, "link", "set", "lo", "up"},
		[]string{"-n", ns, "address", "add", metadataIP + "/32", "dev", "lo"},
		[]string{"-n", ns, "address", "add", resolverIP + "/32", "dev", "lo"},
		[]string{"-n", ns, "address", "add", machineIP(slot, n) + "/24", "dev", "eth0"},
		[]string{"-n", ns, "link", "set", "eth0", "up"},
		[]string{"-n", ns, "route", "add", "default", "via", hostIP(slot)},
	); err != nil {
		return fmt.Errorf("attaching a machine to the network: %w", err)
	}
	return nil
}

// detach removes machine n's network namespace.
func detach(ctx context.Context, slot, n int) error {
	return ip(ctx, []string{"-n", lanNS(slot), "link", "delete", port(n)}, []string{"netns", "delete", machineNS(slot, n)})
}

// removeLAN removes all that makeLAN and attach made, also half of it. Links
// and routes go with their namespaces and peers.
func removeLAN(ctx context.Context, slot int) error {
	// The end on this machine first: a namespace may live on for a moment in
	// processes that are being killed.
	if err := ip(ctx, []string{"link", "show", hostLink(slot)}); err == nil {
		if err := ip(ctx, []string{"link", "delete", hostLink(slot)}); err != nil {
			return err
		}
	}
	list, err := process.Output(ctx, "ip", "netns", "list")
	if err != nil {
		return err
	}
	for line := range strings.Lines(list) {
		if fields := strings.Fields(line); len(fields) > 0 && strings.HasPrefix(fields[0], fmt.Sprintf("hearthm%d-", slot)) {
			if err := ip(ctx, []string{"netns", "delete", fields[0]}); err != nil {
				return err
			}
		}
	}
	return nil
}

// Unplug takes the cable out: eth0 has no carrier until Plug.
func (m *Machine) Unplug(ctx context.Context) error {
	return ip(ctx, []string{"-n", lanNS(m.network.slot), "link", "set", port(m.n), "down"})
}

// Isolate loses every frame to and from the machine, which itself sees a
// working link: a network that fails silently. Until Plug.
func (m *Machine) Isolate(ctx context.Context) error {
	return ip(ctx, []string{"-n", lanNS(m.network.slot), "link", "set", port(m.n), "nomaster"})
}

// Plug ends Unplug and Isolate.
func (m *Machine) Plug(ctx context.Context) error {
	return ip(ctx, []string{"-n", lanNS(m.network.slot), "link", "set", port(m.n), "master", "br0", "up"})
}
