package cluster

import (
	"context"
	"fmt"

	"github.com/hearth-sh/hearth/test/process"
)

// Unplug takes the machine off the network, as if somebody pulled its cable:
// nothing reaches it or its pods, and nothing in it is told. Plug ends it.
func (m *Machine) Unplug(ctx context.Context) error { return m.link(ctx, "down") }

// Plug puts the machine back on the network.
func (m *Machine) Plug(ctx context.Context) error { return m.link(ctx, "up") }

// link sets the bridge's end of the cable: the machine's own end would lose its
// routes.
func (m *Machine) link(ctx context.Context, state string) error {
	for n := range maxNodes {
		if nodeIP(m.cluster.slot, n) != m.IP {
			continue
		}
		if _, err := process.Output(ctx, "ip", "-n", lanNS(m.cluster.slot), "link", "set", fmt.Sprintf("node%d", n), state); err != nil {
			return fmt.Errorf("setting the link of %s %s: %w", m.Name, state, err)
		}
		return nil
	}
	return fmt.Errorf("%s has no address of this cluster", m.Name)
}
