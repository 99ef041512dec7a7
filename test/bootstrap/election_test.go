package bootstrap_test

import (
	"context"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/test/machine"
)

// diskSize of machines that lose power: sparse, so it costs what is written.
const diskSize = 16 << 30

// TestALeaderThatLosesPowerWhileItFoundsIsSucceededByAnother cuts the power of a
// server that holds the first generation and whose k3s has begun to make a
// cluster that nobody may join any more.
func TestALeaderThatLosesPowerWhileItFoundsIsSucceededByAnother(t *testing.T) {
	t.Parallel()
	l := newLab(t, "election")
	ctx := boundedBy(t, soon)
	first := l.add("first", l.userData("control-plane", ""), machine.Spec{Disk: diskSize})
	second := l.add("second", l.userData("control-plane", ""), machine.Spec{})
	// It may get as far as it likes, but nobody hears of it.
	refuse := l.gate.keepBack("/" + stateBucket + "/" + l.name + "/generation/1/outcome")
	t.Cleanup(refuse)
	l.boot(first)
	waitFor(t, first, "it to found generation 1", func(context.Context) (bool, error) {
		// etcd has its data, so the cluster that must not come to life exists.
		_, err := os.Stat(first.Path("/var/lib/rancher/k3s/server/db/etcd/member/snap/db"))
		return err == nil, nil
	})
	if err := first.CutPower(ctx); err != nil {
		t.Fatal(err)
	}
	refuse()
	if outcomes := l.outcomes(t); !slices.Equal(outcomes, []string{""}) {
		t.Fatalf("the generations are %q before anybody takes over", outcomes)
	}
	if err := first.CheckDisk(ctx); err != nil {
		t.Fatal(err)
	}

	began := time.Now()
	l.boot(second)
	r := l.succeeded(second)
	t.Logf("the second is a node %s after its boot: %s", time.Since(began).Round(time.Second), phases(r))
	if r.Node.Action != "found" || r.Node.Generation != 2 {
		t.Errorf("the second became %+v", r.Node)
	}
	hash := caHash(t, second)

	began = time.Now()
	l.boot(first)
	r = l.succeeded(first)
	t.Logf("the first is a node %s after its boot: %s; %q", time.Since(began).Round(time.Second), phases(r), r.Warnings)
	if r.Node.Action != "join" || r.Node.Generation != 2 {
		t.Errorf("the first became %+v", r.Node)
	}
	if !slices.ContainsFunc(r.Warnings, func(w string) bool { return strings.Contains(w, "what was made of generation 1 was removed") }) {
		t.Errorf("what the first had made was not discarded: %q", r.Warnings)
	}
	if got := caHash(t, first); got != hash {
		t.Errorf("two authorities: %s on the first, %s on the second", got, hash)
	}
	if got := l.outcomes(t); !slices.Equal(got, []string{"abandoned", "founded"}) {
		t.Errorf("the generations ended %q", got)
	}
	etcdMembers(t, second, 2)
	seen := nodes(t, client(t, first))
	for _, m := range []*machine.Machine{first, second} {
		if !ready(seen[m.InstanceID]) {
			t.Errorf("%s is not Ready in the cluster", m.Name)
		}
	}
	if len(seen) != 2 {
		t.Errorf("the cluster has %d nodes", len(seen))
	}
}

// caHash is the digest of the authority that a server's tokens are bound to.
func caHash(t *testing.T, m *machine.Machine) string {
	t.Helper()
	out, err := m.Exec(t.Context(), "sh", "-c", "sha256sum </var/lib/rancher/k3s/server/tls/server-ca.crt; cut -c4-67 /var/lib/rancher/k3s/server/node-token")
	if err != nil {
		t.Fatal(err)
	}
	words := strings.Fields(out)
	if len(words) != 3 {
		t.Fatalf("the authority of %s: %q", m.Name, out)
	}
	return words[0] + " " + words[2]
}
