package bootstrap_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/hearth-sh/hearth/internal/bootstrap"
	"github.com/hearth-sh/hearth/internal/imds/imdstest"
	"github.com/hearth-sh/hearth/test/k3s"
	"github.com/hearth-sh/hearth/test/machine"
)

func client(t *testing.T, server *machine.Machine) kubernetes.Interface {
	t.Helper()
	c, err := k3s.Client(t.Context(), server)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func nodes(t *testing.T, c kubernetes.Interface) map[string]corev1.Node {
	t.Helper()
	list, err := c.CoreV1().Nodes().List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]corev1.Node{}
	for _, n := range list.Items {
		all[n.Name] = n
	}
	return all
}

func ready(n corev1.Node) bool {
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

// etcdMembers waits until etcd has that many voting members.
func etcdMembers(t *testing.T, m *machine.Machine, want int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	var last string
	const tls = "/var/lib/rancher/k3s/server/tls/etcd/"
	if err := m.WaitFor(ctx, fmt.Sprintf("etcd to have %d members", want), func(ctx context.Context) (bool, error) {
		out, err := m.Exec(ctx, "env", "ETCDCTL_API=3", "etcdctl", "--endpoints=https://127.0.0.1:2379", "--cacert="+tls+"server-ca.crt", "--cert="+tls+"client.crt", "--key="+tls+"client.key", "member", "list")
		last = out
		return err == nil && strings.Count(out, "started") == want && strings.Count(out, "false") == want, nil
	}); err != nil {
		t.Fatalf("%v; it has\n%s", err, last)
	}
}

// TestAClusterComesUpFromUserDataAlone boots three servers at once and two
// agents with them, one of which pulls from ECR; then one server is lost and
// replaced.
func TestAClusterComesUpFromUserDataAlone(t *testing.T) {
	t.Parallel()
	l := newLab(t, "cluster")
	l.lease = "5m"
	began := time.Now()
	var servers, all []*machine.Machine
	for i := range 3 {
		m := l.add(fmt.Sprintf("server-%d", i+1), l.userData("control-plane", ""), machine.Spec{})
		servers, all = append(servers, m), append(all, m)
	}
	spot := l.add("worker-spot", l.userData("wasm", ""), machine.Spec{Configure: func(c *imdstest.Config) { c.LifeCycle = "spot" }})
	registry, undo := l.startECR()
	// The same lab, for one whose images are in ECR.
	withProvider := *l
	withProvider.artifacts = l.provider()
	backend := l.add("worker-backend", withProvider.userData("backend", ""), asRole(pullerKey))
	for _, m := range []*machine.Machine{spot, backend} {
		reaches(t, m, registry)
	}
	all = append(all, spot, backend)
	var wait sync.WaitGroup
	for _, m := range all {
		wait.Go(func() {
			if err := m.Boot(t.Context()); err != nil {
				t.Errorf("%s: %v", m.Name, err)
			}
		})
	}
	wait.Wait()
	if t.Failed() {
		return
	}
	founders := 0
	for _, m := range all {
		r := l.succeeded(m)
		t.Logf("%s is a node %s after its boot: %s, bootstrap took %d ms: %v", m.Name, time.Since(began).Round(time.Second), r.Node.Action, r.DurationMS, phases(r))
		if r.Node.Name != m.InstanceID || r.Node.Generation != 1 || len(r.Node.Proven) != 1 || r.Node.Proven[0] != "wasmtime" {
			t.Errorf("%s became %+v", m.Name, r.Node)
		}
		if r.Node.Action == "found" {
			founders++
		}
	}
	if founders != 1 {
		t.Errorf("%d servers founded a cluster", founders)
	}
	etcdMembers(t, servers[0], 3)
	kube := client(t, servers[0])
	seen := nodes(t, kube)
	if len(seen) != len(all) {
		t.Errorf("the cluster has %d nodes, not %d", len(seen), len(all))
	}
	for _, m := range all {
		n := seen[m.InstanceID]
		if !ready(n) || n.Spec.ProviderID != "aws:///"+n.Labels["topology.kubernetes.io/zone"]+"/"+m.InstanceID || n.Labels["node.kubernetes.io/instance-type"] == "" {
			t.Errorf("%s: ready %t, provider ID %s, labels %v", m.Name, ready(n), n.Spec.ProviderID, n.Labels)
		}
	}
	if got := seen[spot.InstanceID].Labels["node.kubernetes.io/lifecycle"]; got != "spot" {
		t.Errorf("the lifecycle of a Spot instance is %q", got)
	}
	l.tokensStayWhereTheyBelong(t, all)
	pulled := nodesPullFromECR(t, kube, registry, undo, backend, spot)
	for _, m := range all {
		if out, err := m.Exec(t.Context(), "nodeagent", "--version"); err != nil {
			t.Errorf("nodeagent on %s: %v: %s", m.Name, err, out)
		}
	}

	// Again, and nothing changes: no file, no restart.
	for _, m := range []*machine.Machine{servers[0], servers[1], backend} {
		unit := "k3s.service"
		if m == backend {
			unit = "k3s-agent.service"
		}
		before, err := m.Exec(t.Context(), "systemctl", "show", "--value", "--property=InvocationID", unit)
		if err != nil {
			t.Fatal(err)
		}
		if out, err := m.Exec(t.Context(), "systemctl", "restart", "hearth-bootstrap"); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		r, err := result(t.Context(), m)
		if err != nil || r.Outcome != bootstrap.OutcomeSucceeded || r.Changed {
			t.Errorf("the second run on %s: %v, %+v", m.Name, err, r)
		}
		t.Logf("the second run on %s took %d ms: %v", m.Name, r.DurationMS, phases(r))
		if after, _ := m.Exec(t.Context(), "systemctl", "show", "--value", "--property=InvocationID", unit); after != before {
			t.Errorf("%s of %s was restarted", unit, m.Name)
		}
	}
	pulled()

	// A server is terminated and another one launched in its place.
	lost := servers[0]
	if err := lost.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	replacement := l.add("server-4", l.userData("control-plane", ""), machine.Spec{})
	l.boot(replacement)
	r := l.succeeded(replacement)
	t.Logf("the replacement took %d ms: %v", r.DurationMS, phases(r))
	if r.Node.Action != "join" || r.Node.Generation != 1 {
		t.Errorf("the replacement became %+v", r.Node)
	}
	etcdMembers(t, replacement, 3)
	kube = client(t, replacement)
	if _, still := nodes(t, kube)[lost.InstanceID]; still {
		t.Error("the terminated server is still a node")
	}
	for _, m := range []*machine.Machine{servers[1], servers[2], replacement} {
		if n := nodes(t, kube)[m.InstanceID]; !ready(n) {
			t.Errorf("%s is not Ready", m.Name)
		}
	}
	nothingOfAnAgentIsLeft(t, backend, l.k3s.Binds)
}

// nothingOfAnAgentIsLeft resets an agent. That a reset leaves nothing at all is
// shown with a server, whose every file is known from before.
func nothingOfAnAgentIsLeft(t *testing.T, m *machine.Machine, binds map[string]string) {
	t.Helper()
	if out, err := m.Exec(t.Context(), "bootstrap", "reset", "--yes"); err != nil {
		t.Fatalf("reset: %v: %s", err, out)
	}
	for _, line := range running(t, m) {
		switch kind, what, _ := strings.Cut(line, " "); kind {
		case "interface":
			if what != "lo" && !strings.HasPrefix(what, "eth0") {
				t.Errorf("after the reset of an agent there is the %s", line)
			}
		case "route":
			if !strings.Contains(what, "eth0") {
				t.Errorf("after the reset of an agent there is the %s", line)
			}
		case "mount":
			if _, bench := binds[strings.Fields(what)[0]]; !bench {
				t.Errorf("after the reset of an agent there is the %s", line)
			}
		default:
			t.Errorf("after the reset of an agent there is the %s", line)
		}
	}
	for _, path := range []string{"/var/lib/rancher", "/etc/rancher", "/var/lib/kubelet", "/etc/systemd/system/k3s-agent.service", binDir + "/k3s", binDir + "/nodeagent"} {
		if _, err := os.Lstat(m.Path(path)); err == nil {
			t.Errorf("after the reset of an agent there is %s", path)
		}
	}
}

func phases(r bootstrap.Result) string {
	var parts []string
	for _, p := range r.Phases {
		parts = append(parts, fmt.Sprintf("%s %d", p.Name, p.DurationMS))
	}
	return strings.Join(parts, ", ")
}

// tokensStayWhereTheyBelong looks for the cluster's secrets in all places that
// somebody else can read. It looks for the secrets alone: a founder's files have
// them without what makes a token of them.
func (l *lab) tokensStayWhereTheyBelong(t *testing.T, all []*machine.Machine) {
	t.Helper()
	var tokens struct{ ServerToken, AgentToken string }
	if err := json.Unmarshal(l.object(t, stateBucket, l.name+"/server/1/credentials"), &tokens); err != nil {
		t.Fatal(err)
	}
	secret := func(token string) string { return token[strings.LastIndexByte(token, ':')+1:] }
	ofServers, ofAgents := secret(tokens.ServerToken), secret(tokens.AgentToken)
	if len(ofServers) < 16 || len(ofAgents) < 16 || ofServers == ofAgents {
		t.Fatalf("the secrets have %d and %d characters", len(ofServers), len(ofAgents))
	}
	// The secrets come on standard input, since arguments are looked at. That the
	// user nobody cannot read a file counts, whichever directory keeps it from that.
	const script = `umask 077; cat >/run/patterns; tail -n 1 /run/patterns >/run/pattern-of-servers
everywhere='/etc /run /opt /tmp /usr/local /var/backups /var/cache /var/lib /var/log /var/tmp'
setpriv --reuid=65534 --regid=65534 --clear-groups grep -rIlF -f - $everywhere </run/patterns 2>/dev/null | sed 's/$/ is readable for nobody/'
journalctl --no-pager --all --output=verbose | grep -cF -f /run/patterns | grep -vx 0 | sed 's/$/ lines of the journal/'
for file in /proc/[0-9]*/cmdline /proc/[0-9]*/environ; do grep -qaF -f /run/patterns "$file" 2>/dev/null && echo "$file has it"; done
grep -rIlF -f /run/patterns /etc/systemd /run/systemd /usr/lib/systemd /var/lib/cloud /var/log 2>/dev/null | sed 's/$/ has it/'
if [ ! -d /var/lib/rancher/k3s/server ]; then grep -rIlF -f /run/pattern-of-servers /etc /var/lib/hearth /var/lib/rancher 2>/dev/null | sed 's/$/ has what is for servers/'; fi
grep -rlF -f /run/patterns /var/lib/rancher/k3s/server/token /var/lib/rancher/k3s/server/agent-token /etc/rancher /var/lib/hearth 2>/dev/null | sed 's/^/found: /'
rm /run/patterns /run/pattern-of-servers`
	for _, m := range all {
		out, err := m.ExecInput(t.Context(), strings.NewReader(ofAgents+"\n"+ofServers+"\n"), "sh", "-c", script)
		if err != nil {
			t.Errorf("tokens on %s: %v", m.Name, err)
		}
		found := 0
		for line := range strings.Lines(out) {
			if strings.HasPrefix(line, "found: ") {
				found++
				continue
			}
			t.Errorf("tokens on %s: %s", m.Name, line)
		}
		// Else nothing was looked for.
		if found == 0 {
			t.Errorf("no file of %s has a token at all", m.Name)
		}
	}
}
