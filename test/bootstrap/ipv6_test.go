package bootstrap_test

import (
	"encoding/json"
	"net/http"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/internal/bootstrap"
	"github.com/hearth-sh/hearth/internal/imds/imdstest"
	"github.com/hearth-sh/hearth/test/machine"
	"github.com/hearth-sh/hearth/test/needs"
)

// TestAnInstanceWhoseMetadataIsAtIPv6Alone takes a machine the service's IPv4
// address and gives it that of IPv6. Nothing says so to bootstrap, which finds
// identity, user-data and the role's credentials there.
func TestAnInstanceWhoseMetadataIsAtIPv6Alone(t *testing.T) {
	t.Parallel()
	l := newLab(t, "ipv6")
	ctx := boundedBy(t, soon)
	m := l.bare("server", machine.Spec{Configure: func(c *imdstest.Config) { c.LocalIPv6 = "2001:db8::17" }})
	m.SetUserData(l.spec("control-plane", l.name, l.rest("")))
	if out, err := m.Exec(ctx, "sh", "-ec", "ip address add fd00:ec2::254/128 dev lo nodad; ip address delete 169.254.169.254/32 dev lo"); err != nil {
		needs.Missing(t, "the machine has no IPv6: %v: %s", err, out)
	}
	listener, err := m.Listen("tcp6", "[fd00:ec2::254]:80")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: m.IMDS, ReadHeaderTimeout: time.Minute}
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(listener) }()
	t.Cleanup(func() { _ = server.Close(); <-done })

	command := m.Command(ctx, "env", "AWS_ENDPOINT_URL="+l.aws, program, "plan", "-o", "json")
	out, err := command.Output()
	var plan bootstrap.Plan
	if decoding := json.Unmarshal(out, &plan); err != nil || decoding != nil {
		t.Fatalf("%v, %v: %s", err, decoding, out)
	}
	if plan.Node.Name != m.InstanceID || plan.Node.Role != "server" || len(plan.Downloads) == 0 {
		t.Errorf("the plan is for %+v, with %d downloads", plan.Node, len(plan.Downloads))
	}
}
