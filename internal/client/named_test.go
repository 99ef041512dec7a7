package client

import (
	"context"
	"errors"
	"net"
	"testing"
)

func TestANameThatHasItsAddressInItIsNotLookedUp(t *testing.T) {
	errSeen := errors.New("seen")
	for _, c := range []struct{ dialled, reaches string }{
		{"hello.203.0.113.7.nip.io:80", "203.0.113.7:80"},
		{"hello.team-a.10.0.0.1.nip.io.:8080", "10.0.0.1:8080"},
		{"Hello.10.0.0.1.NIP.io:80", "10.0.0.1:80"},
		{"hello.2001-db8--1.sslip.io:80", "[2001:db8::1]:80"},
		{"hello.2001-db8--0.sslip.io:443", "[2001:db8::]:443"},
		{"hello.0--1.sslip.io:80", "[::1]:80"},
		// What is not known for sure is the resolver's.
		{"hello.0a000001.nip.io:80", "hello.0a000001.nip.io:80"},
		{"10.0.0.nip.io:80", "10.0.0.nip.io:80"},
		{"hello.10.0.0.256.nip.io:80", "hello.10.0.0.256.nip.io:80"},
		{"hello.10-0-0-1.sslip.io:80", "hello.10-0-0-1.sslip.io:80"},
		{"hello.example.com:80", "hello.example.com:80"},
		{"10.0.0.1.nip.io.example.com:80", "10.0.0.1.nip.io.example.com:80"},
		{"no port", "no port"},
	} {
		var got string
		dial := dialNamed(func(_ context.Context, _, address string) (net.Conn, error) {
			got = address
			return nil, errSeen
		})
		if _, err := dial(t.Context(), "tcp", c.dialled); !errors.Is(err, errSeen) || got != c.reaches {
			t.Errorf("%s: dialled %s (%v), want %s", c.dialled, got, err, c.reaches)
		}
	}
}
