package k3s_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/hearth-sh/hearth/test/cluster"
	"github.com/hearth-sh/hearth/test/k3s"
	"github.com/hearth-sh/hearth/test/machine"
	"github.com/hearth-sh/hearth/test/needs"
)

// soon bounds waits for what takes half a minute on an idle machine, and a real
// k3s two on a slow disk.
const soon = 6 * time.Minute

// userData is a shell script as an owner of k3s nodes would write it: settings,
// upstream's unit, and a start that does not wait.
func userData(command, config string) string {
	return `#!/bin/sh
set -eu
mkdir -p /etc/rancher/k3s
cat >/etc/rancher/k3s/config.yaml <<'END'
` + config + `
END
cat >/etc/systemd/system/k3s.service <<'END'
[Unit]
Description=Lightweight Kubernetes
Wants=network-online.target
After=network-online.target

[Install]
WantedBy=multi-user.target

[Service]
Type=notify
KillMode=process
Delegate=yes
User=root
LimitNOFILE=1048576
LimitNPROC=infinity
LimitCORE=infinity
TasksMax=infinity
TimeoutStartSec=0
Restart=always
RestartSec=5s
ExecStartPre=-/sbin/modprobe br_netfilter
ExecStartPre=-/sbin/modprobe overlay
ExecStart=/usr/local/bin/k3s ` + command + `
END
systemctl daemon-reload
systemctl enable k3s
systemctl start --no-block k3s
`
}

// inSoak leaves to `make soak`, and to runs with a real k3s, what the tests of
// bootstrap (test/bootstrap) show with the same stand-in in passing.
func inSoak(t *testing.T) {
	t.Helper()
	if os.Getenv("HEARTH_SOAK") == "" && os.Getenv(k3s.BinaryEnv) == "" {
		t.Skip("make soak runs it; test/bootstrap shows the same")
	}
}

func load(t *testing.T) *k3s.Distribution {
	t.Helper()
	for _, check := range []func() error{cluster.Check, machine.Check} {
		if err := check(); err != nil {
			needs.Missing(t, "%v", err)
		}
	}
	d, err := k3s.Load(t.Context(), t.TempDir(), os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// add makes a machine with k3s installed and boots it.
func add(t *testing.T, d *k3s.Distribution, network *machine.Network, name, command string, config func(m *machine.Machine) string) *machine.Machine {
	t.Helper()
	m, err := network.Add(t.Context(), machine.Spec{Name: name, Binds: d.Binds})
	if err != nil {
		t.Fatal(err)
	}
	m.SetUserData(userData(command, config(m)))
	if err := d.Install(m); err != nil {
		t.Fatal(err)
	}
	if err := m.Boot(t.Context()); err != nil {
		t.Fatal(err)
	}
	return m
}

func nodeReady(t *testing.T, client kubernetes.Interface, m *machine.Machine) *corev1.Node {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	var node *corev1.Node
	last := errors.New("not looked yet")
	err := m.WaitFor(ctx, "its Node to be Ready", func(ctx context.Context) (bool, error) {
		node, last = client.CoreV1().Nodes().Get(ctx, m.InstanceID, metav1.GetOptions{})
		if last != nil {
			return false, nil
		}
		for _, c := range node.Status.Conditions {
			if c.Type == corev1.NodeReady {
				last = fmt.Errorf("%s: %s", c.Reason, c.Message)
				return c.Status == corev1.ConditionTrue, nil
			}
		}
		return false, nil
	})
	if err != nil {
		t.Fatalf("%v; last seen: %v", err, last)
	}
	return node
}

func connect(t *testing.T, m *machine.Machine) kubernetes.Interface {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	var client kubernetes.Interface
	if err := m.WaitFor(ctx, "the API to answer", func(ctx context.Context) (bool, error) {
		c, err := k3s.Client(ctx, m)
		if err != nil {
			return false, nil
		}
		if _, err := c.CoreV1().Namespaces().Get(ctx, "kube-system", metav1.GetOptions{}); err != nil {
			return false, nil
		}
		client = c
		return true, nil
	}); err != nil {
		t.Fatal(err)
	}
	return client
}

func serverConfig(m *machine.Machine, more string) string {
	return "node-name: " + m.InstanceID + "\ntoken: a-server-secret\nagent-token: an-agent-secret\nkubelet-arg:\n- provider-id=aws:///eu-central-1a/" + m.InstanceID +
		"\nnode-label: [hearth.sh/pool=control-plane]\ndisable: [traefik, servicelb, coredns, local-storage, metrics-server]\nflannel-backend: host-gw\n" + more
}

func TestAServerComesUpFromItsUserData(t *testing.T) {
	inSoak(t)
	d := load(t)
	network := machine.Start(t, machine.Options{})
	began := time.Now()
	m := add(t, d, network, "server", "server", func(m *machine.Machine) string { return serverConfig(m, "cluster-init: true") })
	if err := m.WaitCloudInit(t.Context()); err != nil {
		t.Fatal(err)
	}
	client := connect(t, m)
	t.Logf("API after %s", time.Since(began).Round(time.Millisecond))
	node := nodeReady(t, client, m)
	t.Logf("Node Ready after %s", time.Since(began).Round(time.Millisecond))
	if err := m.WaitUnit(t.Context(), "k3s.service", "active"); err != nil {
		t.Fatal(err)
	}
	if want := "aws:///eu-central-1a/" + m.InstanceID; node.Spec.ProviderID != want {
		t.Errorf("provider ID %q, want %q", node.Spec.ProviderID, want)
	}
	if node.Labels["hearth.sh/pool"] != "control-plane" {
		t.Errorf("labels %v", node.Labels)
	}
	for path, mode := range map[string]string{
		"/etc/rancher/k3s/k3s.yaml": "600", "/var/lib/rancher/k3s/server/token": "600", "/var/lib/rancher/k3s/server/agent-token": "600",
		"/etc/rancher/node/password": "600", "/var/lib/rancher/k3s/agent/kubelet.kubeconfig": "600",
		"/var/lib/rancher/k3s/agent/etc/containerd/config.toml": "600",
	} {
		if out, err := m.Exec(t.Context(), "stat", "-c", "%a", path); err != nil || strings.TrimSpace(out) != mode {
			t.Errorf("%s has mode %q, want %s: %v", path, strings.TrimSpace(out), mode, err)
		}
	}
}

func TestServersAndAgentsFormAClusterThatSurvivesALostServer(t *testing.T) {
	inSoak(t)
	d := load(t)
	network := machine.Start(t, machine.Options{})
	began := time.Now()
	first := add(t, d, network, "server-1", "server", func(m *machine.Machine) string { return serverConfig(m, "cluster-init: true") })
	client := connect(t, first)
	nodeReady(t, client, first)
	t.Logf("first server Ready after %s", time.Since(began).Round(time.Millisecond))
	joining := "server: https://" + first.IP + ":6443"
	second := add(t, d, network, "server-2", "server", func(m *machine.Machine) string { return serverConfig(m, joining) })
	third := add(t, d, network, "server-3", "server", func(m *machine.Machine) string { return serverConfig(m, joining) })
	token, err := first.Exec(t.Context(), "cat", "/var/lib/rancher/k3s/server/agent-token")
	if err != nil {
		t.Fatal(err)
	}
	worker := add(t, d, network, "worker", "agent", func(m *machine.Machine) string {
		return "node-name: " + m.InstanceID + "\n" + joining + "\ntoken: " + strings.TrimSpace(token)
	})
	for _, m := range []*machine.Machine{second, third, worker} {
		nodeReady(t, client, m)
		t.Logf("%s Ready after %s", m.Name, time.Since(began).Round(time.Millisecond))
	}
	for _, m := range []*machine.Machine{first, second, third} {
		ctx, cancel := context.WithTimeout(t.Context(), soon)
		if err := m.WaitUnit(ctx, "k3s.service", "active"); err != nil {
			t.Fatal(err)
		}
		cancel()
	}
	members(t, third, 3)
	runPod(t, client, "on-worker", worker.InstanceID)

	// A machine fails for good; its Node is deleted, as whoever replaces it does,
	// and another joins in its place.
	if err := first.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	client = connect(t, second)
	if err := client.CoreV1().Nodes().Delete(t.Context(), first.InstanceID, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	members(t, second, 2)
	fourth := add(t, d, network, "server-4", "server", func(m *machine.Machine) string {
		return serverConfig(m, "server: https://"+second.IP+":6443")
	})
	nodeReady(t, client, fourth)
	members(t, fourth, 3)
	t.Logf("replacement Ready after %s", time.Since(began).Round(time.Millisecond))
	runPod(t, client, "after-the-loss", worker.InstanceID)
}

// members waits until etcd has that many voting members.
func members(t *testing.T, m *machine.Machine, want int) {
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

// runPod runs a pod of the sandbox image on a node, which stays Running.
func runPod(t *testing.T, client kubernetes.Interface, name, node string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	pods := client.CoreV1().Pods("default")
	for { // the default service account comes with the namespace, a moment later
		_, err := pods.Create(ctx, &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: name},
			Spec:       corev1.PodSpec{NodeName: node, Containers: []corev1.Container{{Name: "main", Image: k3s.PauseImage, ImagePullPolicy: corev1.PullNever}}},
		}, metav1.CreateOptions{})
		if err == nil {
			break
		}
		select {
		case <-ctx.Done():
			t.Fatal(err)
		case <-time.After(time.Second):
		}
	}
	var last corev1.PodStatus
	for {
		pod, err := pods.Get(ctx, name, metav1.GetOptions{})
		if err == nil && pod.Status.Phase == corev1.PodRunning && pod.Status.PodIP != "" {
			return
		}
		if err == nil {
			last = pod.Status
		}
		select {
		case <-ctx.Done():
			t.Fatalf("pod %s does not run; %v; last seen: %+v", name, err, last)
		case <-time.After(500 * time.Millisecond):
		}
	}
}

// authority is a server CA of the test's own, and the hash that K10 tokens have.
func authority(t *testing.T) (cert, key []byte, hash string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test-server-ca"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := x509.MarshalECPrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	cert = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	sum := sha256.Sum256(cert)
	return cert, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: raw}), hex.EncodeToString(sum[:])
}

func awaitJournal(t *testing.T, m *machine.Machine, words ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	var last string
	if err := m.WaitFor(ctx, fmt.Sprintf("its journal to say %q", words), func(ctx context.Context) (bool, error) {
		last, _ = m.Journal(ctx, "k3s.service")
		for _, word := range words {
			if strings.Contains(last, word) {
				return true, nil
			}
		}
		return false, nil
	}); err != nil {
		t.Fatalf("%v; it says\n%s", err, last)
	}
}

func TestTokensGuardTheCluster(t *testing.T) {
	d := load(t)
	network := machine.Start(t, machine.Options{})
	cert, key, hash := authority(t)
	server, err := network.Add(t.Context(), machine.Spec{Name: "server", Binds: d.Binds})
	if err != nil {
		t.Fatal(err)
	}
	// With an authority of one's own the whole token is known before the first start.
	for name, content := range map[string][]byte{"server-ca.crt": cert, "server-ca.key": key} {
		if err := server.WriteFile("/var/lib/rancher/k3s/server/tls/"+name, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	config := strings.Replace(serverConfig(server, "cluster-init: true"), "token: a-server-secret", "token: K10"+hash+"::server:a-server-secret", 1)
	server.SetUserData(userData("server", config))
	if err := d.Install(server); err != nil {
		t.Fatal(err)
	}
	if err := server.Boot(t.Context()); err != nil {
		t.Fatal(err)
	}
	client := connect(t, server)
	if got, err := server.Exec(t.Context(), "cat", "/var/lib/rancher/k3s/server/agent-token"); err != nil || strings.TrimSpace(got) != "K10"+hash+"::node:an-agent-secret" {
		t.Errorf("agent token %q, %v", got, err)
	}

	agentConfig := func(m *machine.Machine, token string) string {
		return "node-name: " + m.InstanceID + "\nserver: https://" + server.IP + ":6443\ntoken: " + token
	}
	agent := add(t, d, network, "agent", "agent", func(m *machine.Machine) string {
		return agentConfig(m, "K10"+strings.Repeat("0", 64)+"::node:an-agent-secret")
	})
	awaitJournal(t, agent, "token CA hash does not match")
	again := func(token string) {
		t.Helper()
		if err := agent.WriteFile("/etc/rancher/k3s/config.yaml", []byte(agentConfig(agent, token)), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, verb := range []string{"stop", "start"} {
			if out, err := agent.Exec(t.Context(), "systemctl", "--no-block", verb, "k3s"); err != nil {
				t.Fatal(out, err)
			}
			if verb == "stop" {
				ctx, cancel := context.WithTimeout(t.Context(), soon)
				if err := agent.WaitUnit(ctx, "k3s.service", "inactive"); err != nil {
					t.Fatal(err)
				}
				cancel()
			}
		}
	}
	again("K10" + hash + "::node:a-wrong-secret")
	awaitJournal(t, agent, "401 Unauthorized")
	// k3s waits for ever and never says READY.
	if out, err := agent.Exec(t.Context(), "systemctl", "show", "--value", "--property=ActiveState,NRestarts", "k3s"); err != nil || strings.Fields(out)[0] != "activating" && strings.Fields(out)[1] != "activating" {
		t.Errorf("with a wrong token the unit is %q, %v", out, err)
	}
	again("K10" + hash + "::node:an-agent-secret")
	nodeReady(t, client, agent)

	// Another machine under the same name does not know its password.
	thief := add(t, d, network, "thief", "agent", func(*machine.Machine) string {
		return agentConfig(agent, "K10"+hash+"::node:an-agent-secret")
	})
	awaitJournal(t, thief, "Node password rejected")

	// An agent's token opens nothing of a server's.
	out, err := thief.Exec(t.Context(), "curl", "-sk", "-o", "/dev/null", "-w", "%{http_code}", "-u", "node:an-agent-secret", "https://"+server.IP+":6443/v1-k3s/server-bootstrap")
	if err != nil || strings.TrimSpace(out) != "403" {
		t.Errorf("bootstrap data for an agent: %q, %v", out, err)
	}
}

func TestASnapshotBringsAClusterBackOnAnotherMachine(t *testing.T) {
	inSoak(t)
	d := load(t)
	network := machine.Start(t, machine.Options{})
	old := add(t, d, network, "old", "server", func(m *machine.Machine) string { return serverConfig(m, "cluster-init: true") })
	client := connect(t, old)
	nodeReady(t, client, old)
	if _, err := client.CoreV1().ConfigMaps("default").Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "before"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if out, err := old.Exec(t.Context(), "k3s", "etcd-snapshot", "save"); err != nil {
		t.Fatal(out, err)
	}
	if _, err := client.CoreV1().ConfigMaps("default").Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "after"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	listed, err := old.Exec(t.Context(), "sh", "-c", "ls /var/lib/rancher/k3s/server/db/snapshots/on-demand-*; cat /var/lib/rancher/k3s/server/tls/server-ca.crt")
	if err != nil {
		t.Fatal(err)
	}
	path, ca, _ := strings.Cut(listed, "\n")
	snapshot, err := os.ReadFile(old.Path(path))
	if err != nil {
		t.Fatal(err)
	}
	if err := old.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}

	fresh, err := network.Add(t.Context(), machine.Spec{Name: "fresh", Binds: d.Binds})
	if err != nil {
		t.Fatal(err)
	}
	fresh.SetUserData(strings.Replace(userData("server", serverConfig(fresh, "cluster-init: true")), "systemctl daemon-reload",
		"/usr/local/bin/k3s server --cluster-reset --cluster-reset-restore-path=/var/tmp/snapshot\nsystemctl daemon-reload", 1))
	if err := fresh.WriteFile("/var/tmp/snapshot", snapshot, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := d.Install(fresh); err != nil {
		t.Fatal(err)
	}
	if err := fresh.Boot(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := fresh.WaitCloudInit(t.Context()); err != nil {
		t.Fatal(err)
	}
	client = connect(t, fresh)
	nodeReady(t, client, fresh)
	if _, err := client.CoreV1().ConfigMaps("default").Get(t.Context(), "before", metav1.GetOptions{}); err != nil {
		t.Error(err)
	}
	if _, err := client.CoreV1().ConfigMaps("default").Get(t.Context(), "after", metav1.GetOptions{}); err == nil {
		t.Error("the cluster knows what came after the snapshot")
	}
	if got, err := fresh.Exec(t.Context(), "cat", "/var/lib/rancher/k3s/server/tls/server-ca.crt"); err != nil || got != ca {
		t.Errorf("the authority is another one: %v", err)
	}
}
