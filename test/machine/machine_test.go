package machine_test

import (
	"context"
	"os"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/hearth-sh/hearth/internal/imds/imdstest"
	"github.com/hearth-sh/hearth/test/machine"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// limit bounds what one test may take; an idle machine needs a tenth of it.
const limit = 3 * time.Minute

func bounded(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	t.Cleanup(cancel)
	return ctx
}

func add(t *testing.T, network *machine.Network, spec machine.Spec) *machine.Machine {
	t.Helper()
	m, err := network.Add(bounded(t), spec)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func boot(t *testing.T, m *machine.Machine) {
	t.Helper()
	ctx := bounded(t)
	if err := m.Boot(ctx); err != nil {
		t.Fatal(err)
	}
	if err := m.WaitCloudInit(ctx); err != nil {
		t.Fatal(err)
	}
	if err := m.WaitBooted(ctx); err != nil {
		t.Fatal(err)
	}
}

func run(t *testing.T, m *machine.Machine, name string, args ...string) string {
	t.Helper()
	out, err := m.Exec(bounded(t), name, args...)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

func TestUserDataRunsOnAMachineThatKnowsItself(t *testing.T) {
	network := machine.Start(t, machine.Options{})
	shared := t.TempDir()
	if err := os.WriteFile(shared+"/program", []byte("#!/bin/sh\necho shared\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	m := add(t, network, machine.Spec{
		Name: "one", Tags: map[string]string{"hearth.sh:pool": "wasm"}, Binds: map[string]string{"/usr/local/lib/shared": shared},
		UserData:  "#!/bin/sh\nset -eu\necho once >>/var/tmp/proof\n",
		Configure: func(c *imdstest.Config) { c.LifeCycle = "spot" },
	})
	boot(t, m)
	if got := run(t, m, "cat", "/var/tmp/proof"); got != "once" {
		t.Errorf("user-data left %q", got)
	}
	if got := run(t, m, "/usr/local/lib/shared/program"); got != "shared" {
		t.Errorf("the bound program says %q", got)
	}
	if got := run(t, m, "systemctl", "is-system-running"); got != "running" {
		t.Errorf("systemd is %s: %s", got, run(t, m, "systemctl", "--failed", "--no-legend"))
	}
	if got := run(t, m, "hostname"); !strings.HasPrefix(got, "ip-198-18-") {
		t.Errorf("host name %s", got)
	}
	const ask = `token=$(curl -sf -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' http://169.254.169.254/latest/api/token)
for key in instance-id instance-life-cycle tags/instance/hearth.sh:pool local-ipv4; do curl -sf -H "X-aws-ec2-metadata-token: $token" http://169.254.169.254/latest/meta-data/$key; echo; done`
	if got, want := run(t, m, "sh", "-c", ask), m.InstanceID+"\nspot\nwasm\n"+m.IP; got != want {
		t.Errorf("the metadata service says %q, want %q", got, want)
	}
	if out, err := m.Exec(bounded(t), "curl", "-sf", "http://169.254.169.254/latest/meta-data/instance-id"); err == nil {
		t.Errorf("version 1 of the metadata service answers %q", out)
	}

	// In order off and on: the disk is the same, user-data runs once.
	if err := m.WriteFile("/etc/from-outside", []byte("kept"), 0o600); err != nil {
		t.Fatal(err)
	}
	before := run(t, m, "cat", "/etc/machine-id")
	if err := m.PowerOff(bounded(t)); err != nil {
		t.Fatal(err)
	}
	if m.Running() {
		t.Error("it runs after it was switched off")
	}
	boot(t, m)
	if got := run(t, m, "cat", "/var/tmp/proof", "/etc/from-outside"); got != "once\nkept" {
		t.Errorf("after a reboot: %q", got)
	}
	if got := run(t, m, "cat", "/etc/machine-id"); got != before || len(got) != 32 {
		t.Errorf("the machine's id changed from %q to %q", before, got)
	}
}

func TestMachinesReachEachOtherUnlessTheNetworkFails(t *testing.T) {
	network := machine.Start(t, machine.Options{})
	a, b := add(t, network, machine.Spec{Name: "a"}), add(t, network, machine.Spec{Name: "b"})
	boot(t, a)
	boot(t, b)
	reaches := func() bool {
		_, err := a.Exec(bounded(t), "ping", "-c", "1", "-W", "1", b.IP)
		return err == nil
	}
	carrier := func() bool { return strings.Contains(run(t, a, "ip", "link", "show", "eth0"), "LOWER_UP") }
	if !reaches() || !carrier() {
		t.Fatal("a does not reach b")
	}
	if err := a.Isolate(bounded(t)); err != nil {
		t.Fatal(err)
	}
	if reaches() || !carrier() {
		t.Error("an isolated machine should see a link and reach nobody")
	}
	if err := a.Unplug(bounded(t)); err != nil {
		t.Fatal(err)
	}
	if err := a.WaitFor(bounded(t), "the link to be gone", func(context.Context) (bool, error) { return !carrier(), nil }); err != nil {
		t.Error(err)
	}
	if reaches() {
		t.Error("a machine reaches others without its cable")
	}
	if err := a.Plug(bounded(t)); err != nil {
		t.Fatal(err)
	}
	if err := a.WaitFor(bounded(t), "the network to be back", func(context.Context) (bool, error) { return reaches(), nil }); err != nil {
		t.Error(err)
	}
}

func TestALossOfPowerLosesWhatWasNotSynced(t *testing.T) {
	network := machine.Start(t, machine.Options{})
	m := add(t, network, machine.Spec{Name: "disk", Disk: 2 << 30})
	boot(t, m)
	// cloud-init itself syncs nothing: a machine that loses its power in the
	// first half minute has files of its that are empty, and it fails on them.
	run(t, m, "sync")
	run(t, m, "sh", "-c", "echo safe >/etc/safe && sync /etc/safe /etc && echo safe >/var/safe && sync /var/safe /var && echo lost >/etc/lost && echo lost >/var/lost")
	saved := t.TempDir() + "/disk.img"
	ctx := bounded(t)
	if err := m.CutPower(ctx); err != nil {
		t.Fatal(err)
	}
	if m.Running() {
		t.Error("it runs without power")
	}
	if err := m.SaveDisk(ctx, saved); err != nil {
		t.Fatal(err)
	}
	if err := m.CheckDisk(ctx); err != nil {
		t.Error(err)
	}
	boot(t, m)
	if got := run(t, m, "cat", "/etc/safe", "/var/safe"); got != "safe\nsafe" {
		t.Errorf("what was synced is %q", got)
	}
	for _, path := range []string{"/etc/lost", "/var/lost"} {
		if out, err := m.Exec(ctx, "cat", path); err == nil && strings.Contains(out, "lost") {
			t.Errorf("%s survived without a sync: this disk shows nothing", path)
		}
	}

	// The same loss again, from the copy.
	run(t, m, "sh", "-c", "echo later >/etc/later; sync")
	if err := m.PowerOff(ctx); err != nil {
		t.Fatal(err)
	}
	if err := m.RestoreDisk(ctx, saved); err != nil {
		t.Fatal(err)
	}
	boot(t, m)
	if _, err := m.Exec(ctx, "test", "-e", "/etc/later"); err == nil {
		t.Error("the restored disk knows the future")
	}
	if got := run(t, m, "cat", "/etc/safe"); got != "safe" {
		t.Errorf("what was synced is %q after another recovery", got)
	}
}

func TestARemovedMachineMakesRoomForAnother(t *testing.T) {
	network := machine.Start(t, machine.Options{})
	m := add(t, network, machine.Spec{Name: "old"})
	boot(t, m)
	if err := m.Kill(bounded(t)); err != nil {
		t.Fatal(err)
	}
	if err := m.Remove(bounded(t)); err != nil {
		t.Fatal(err)
	}
	next := add(t, network, machine.Spec{Name: "new"})
	if next.InstanceID == m.InstanceID || next.IP == m.IP {
		t.Errorf("the new machine is %s at %s like the old one", next.InstanceID, next.IP)
	}
	boot(t, next)
}
