package client

import (
	"context"
	"net"
	"net/netip"
	"strings"
)

// Domains whose names resolve to the address written in them: nip.io knows
// IPv4 with dots, sslip.io IPv6 with dashes for colons.
const (
	ipv4Domain = ".nip.io"
	ipv6Domain = ".sslip.io"
)

type dialFunc func(ctx context.Context, network, address string) (net.Conn, error)

// dialNamed connects to the address that is written in a function's name
// without asking anybody for it. Many resolvers refuse to answer with the
// private address of a cluster at home or in a network of one's own (protection
// against DNS rebinding), and some networks have none that reaches outside.
func dialNamed(dial dialFunc) dialFunc {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		host, port, err := net.SplitHostPort(address)
		if err == nil {
			if ip, ok := addressIn(host); ok {
				address = net.JoinHostPort(ip.String(), port)
			}
		}
		return dial(ctx, network, address)
	}
}

// addressIn returns the address that a host name is made of.
func addressIn(host string) (netip.Addr, bool) {
	host = strings.TrimSuffix(strings.ToLower(host), ".")
	if name, ok := strings.CutSuffix(host, ipv4Domain); ok {
		labels := strings.Split(name, ".")
		if len(labels) < 4 {
			return netip.Addr{}, false
		}
		ip, err := netip.ParseAddr(strings.Join(labels[len(labels)-4:], "."))
		return ip, err == nil
	}
	if name, ok := strings.CutSuffix(host, ipv6Domain); ok {
		label := name[strings.LastIndexByte(name, '.')+1:]
		ip, err := netip.ParseAddr(strings.ReplaceAll(label, "-", ":"))
		return ip, err == nil && ip.Is6()
	}
	return netip.Addr{}, false
}
