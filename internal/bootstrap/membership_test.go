package bootstrap

import (
	"context"
	"errors"
	"net"
	"testing"
)

// TestWhereAnAgentGoesOn is about the server that it joined through: it may be
// gone before k3s knew the others.
func TestWhereAnAgentGoesOn(t *testing.T) {
	there, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = there.Close() }()
	gone, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = gone.Close()
	broken := errors.New("systemd does not answer")
	for _, tt := range []struct {
		name   string
		server string
		active bool
		err    error
		want   bool
	}{
		{"it runs, and the server is gone", "https://" + gone.Addr().String(), true, nil, true},
		{"it does not run, and the server is there", "https://" + there.Addr().String(), false, nil, true},
		{"it does not run, and the server is gone", "https://" + gone.Addr().String(), false, nil, false},
		{"what was remembered is no address", "https://%zz", false, nil, false},
		{"whether it runs is not known", "https://" + there.Addr().String(), false, broken, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := leadsIn(t.Context(), tt.server, func(context.Context) (bool, error) { return tt.active, tt.err })
			if got != tt.want || !errors.Is(err, tt.err) {
				t.Errorf("got %v, %v", got, err)
			}
		})
	}
}
