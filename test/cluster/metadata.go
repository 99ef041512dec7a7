package cluster

import (
	"context"
	"fmt"
	"net"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/hearth-sh/hearth/test/process"
)

// metadataIP is where EC2's instances find their metadata.
const metadataIP = "169.254.169.254"

// ListenMetadata listens where the nodes of this cluster, as instances of EC2,
// find their metadata: http://169.254.169.254. Callers are told apart by the
// addresses of nodes. Answers live for one hop, as EC2's do unless an instance
// says otherwise: nodes and pods on the host's network get them, pods with a
// network of their own do not.
func (c *Cluster) ListenMetadata(ctx context.Context) (net.Listener, error) {
	lan := lanNS(c.slot)
	steps := [][]string{
		{"-n", lan, "address", "replace", metadataIP + "/32", "dev", "br0"},
		{"-n", lan, "route", "replace", fmt.Sprintf("198.18.%d.0/24", c.slot), "dev", "br0", "src", metadataIP},
	}
	for n, name := range c.names {
		steps = append(steps,
			[]string{"-n", nodeNS(c.slot, name), "route", "replace", metadataIP + "/32", "dev", "eth0"},
			[]string{"-n", lan, "route", "replace", podSubnet(c.slot, n), "via", nodeIP(c.slot, n)})
	}
	for _, step := range steps {
		if _, err := process.Output(ctx, "ip", step...); err != nil {
			return nil, fmt.Errorf("leading the nodes to their metadata: %w", err)
		}
	}
	oneHop := net.ListenConfig{Control: func(_, _ string, conn syscall.RawConn) (err error) {
		if e := conn.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_TTL, 1) }); e != nil {
			return e
		}
		return err
	}}
	var listener net.Listener
	err := process.InNetNS(netnsPath(lan), func() (err error) {
		listener, err = oneHop.Listen(ctx, "tcp4", net.JoinHostPort(metadataIP, "80"))
		return err
	})
	return listener, err
}
