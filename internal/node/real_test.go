package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	clocktesting "k8s.io/utils/clock/testing"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/kube"
	"github.com/hearth-sh/hearth/test/cluster"
)

const (
	systemNamespace = "hearth-system"
	agentAccount    = "hearth-nodeagent"
	apiAccount      = "hearth-api"
)

// makePod makes a pod that sleeps on a node; it goes with the test. change may be
// nil.
func makePod(t *testing.T, c *cluster.Cluster, node, namespace, name string, change func(*corev1.Pod)) *corev1.Pod {
	t.Helper()
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: map[string]string{"app": name}},
		Spec: corev1.PodSpec{
			NodeName: node, TerminationGracePeriodSeconds: new(int64(2)),
			Tolerations: []corev1.Toleration{{Operator: corev1.TolerationOpExists}},
			Containers:  []corev1.Container{{Name: "main", Image: toolboxImage, Args: []string{"sleep", "1h"}, ImagePullPolicy: corev1.PullIfNotPresent}},
		},
	}
	if change != nil {
		change(p)
	}
	if _, err := c.Client().CoreV1().Pods(namespace).Create(t.Context(), p, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { deletePod(t, c, namespace, name) })
	p, err := c.WaitPodReady(t.Context(), namespace, name)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func deletePod(t *testing.T, c *cluster.Cluster, namespace, name string) {
	ctx, cancel := context.WithTimeout(context.Background(), soon)
	defer cancel()
	err := c.Client().CoreV1().Pods(namespace).Delete(ctx, name, metav1.DeleteOptions{GracePeriodSeconds: new(int64(0))})
	if err != nil && !apierrors.IsNotFound(err) {
		t.Error(err)
	}
	if err := c.WaitFor(ctx, "pod "+name+" to be gone", soon, func(ctx context.Context) (bool, error) {
		_, err := c.Client().CoreV1().Pods(namespace).Get(ctx, name, metav1.GetOptions{})
		return apierrors.IsNotFound(err), nil
	}); err != nil {
		t.Error(err)
	}
}

// agentOn returns what somebody has who stole the token of the agent on a
// node: a configuration with that token, and the agent's own clients.
func agentOn(t *testing.T, c *cluster.Cluster, node string) (*rest.Config, *kube.Clients) {
	t.Helper()
	pod := makePod(t, c, node, systemNamespace, "agent-"+node, func(p *corev1.Pod) {
		p.Spec.ServiceAccountName = agentAccount
		p.Spec.PriorityClassName = "system-node-critical" // as the DaemonSet's will be
	})
	token, err := c.Client().CoreV1().ServiceAccounts(systemNamespace).CreateToken(t.Context(), agentAccount, &authenticationv1.TokenRequest{
		Spec: authenticationv1.TokenRequestSpec{BoundObjectRef: &authenticationv1.BoundObjectReference{APIVersion: "v1", Kind: "Pod", Name: pod.Name, UID: pod.UID}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	config := withToken(c, token.Status.Token)
	clients, err := kube.FromServiceAccount(config, node, kube.Options{UserAgent: "hearth-test/" + t.Name()})
	if err != nil {
		t.Fatal(err)
	}
	return config, clients
}

func withToken(c *cluster.Cluster, token string) *rest.Config {
	config := rest.AnonymousClientConfig(c.RESTConfig())
	config.BearerToken = token
	return config
}

// asAdmin returns clients that may do everything, for tests of what is done
// and not of who may.
func asAdmin(c *cluster.Cluster, node string) *kube.Clients {
	return &kube.Clients{NodeName: node, Node: c.Client(), Tainter: c.Client(), Reader: c.Dynamic()}
}

func readNode(t *testing.T, c *cluster.Cluster, name string) *corev1.Node {
	t.Helper()
	n, err := c.Client().CoreV1().Nodes().Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// writes counts what was tried to be written by whom, from the audit log.
func writes(t *testing.T, c *cluster.Cluster, userAgent string) int {
	t.Helper()
	entries, err := c.AuditEntries()
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, e := range entries {
		if e.Write() && e.UserAgent == userAgent {
			n++
		}
	}
	return n
}

func TestAuthorityIsBoundToTheNode(t *testing.T) {
	c := realCluster(t)
	config, clients := agentOn(t, c, nodeA)
	otherConfig := rest.CopyConfig(config)
	otherConfig.Impersonate = rest.ImpersonationConfig{UserName: "system:node:" + nodeB}
	mastersConfig := rest.CopyConfig(config)
	mastersConfig.Impersonate = rest.ImpersonationConfig{UserName: "system:node:" + nodeA, Groups: []string{"system:masters"}}
	unbound, err := c.Client().CoreV1().ServiceAccounts(systemNamespace).CreateToken(t.Context(), agentAccount, &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	client := func(config *rest.Config) kubernetes.Interface { return kubernetes.NewForConfigOrDie(config) }
	other, masters, loose := client(otherConfig), client(mastersConfig), client(withToken(c, unbound.Status.Token))
	victim := makePod(t, c, nodeB, metav1.NamespaceDefault, "victim", nil)
	if _, err := c.Client().CoreV1().Secrets(metav1.NamespaceDefault).Create(t.Context(), &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: "used-on-a"}, StringData: map[string]string{"key": "value"},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	// A kubelet may read the Secrets of its pods; the agent in its name must not.
	mine := makePod(t, c, nodeA, metav1.NamespaceDefault, "mine", func(p *corev1.Pod) {
		p.Spec.Containers[0].EnvFrom = []corev1.EnvFromSource{{SecretRef: &corev1.SecretEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "used-on-a"}}}}
	})

	merge := func(cl kubernetes.Interface, node, body string, sub ...string) error {
		_, err := cl.CoreV1().Nodes().Patch(t.Context(), node, types.MergePatchType, []byte(body), metav1.PatchOptions{}, sub...)
		return err
	}
	condition := `{"status":{"conditions":[{"type":"WasmReady","status":"True","reason":"X"}]}}`
	status := func(cl kubernetes.Interface, node string) error {
		_, err := cl.CoreV1().Nodes().Patch(t.Context(), node, types.StrategicMergePatchType, []byte(condition), metav1.PatchOptions{}, "status")
		return err
	}
	taints := func(node, change string) string {
		n := readNode(t, c, node)
		list := slices.Clone(n.Spec.Taints)
		switch change {
		case "ours":
			list = append(list, corev1.Taint{Key: v1alpha1.TaintInterruption, Effect: corev1.TaintEffectNoSchedule})
		case "foreign":
			list = append(list, corev1.Taint{Key: "example.com/mine", Effect: corev1.TaintEffectNoExecute})
		}
		data, _ := json.Marshal(map[string]any{"spec": map[string]any{"taints": list}})
		return string(data)
	}
	evict := func(cl kubernetes.Interface, p *corev1.Pod) error {
		return cl.PolicyV1().Evictions(p.Namespace).Evict(t.Context(), &policyv1.Eviction{ObjectMeta: metav1.ObjectMeta{Name: p.Name, Namespace: p.Namespace}, DeleteOptions: &metav1.DeleteOptions{DryRun: []string{metav1.DryRunAll}}})
	}
	label := `{"metadata":{"labels":{"hearth.sh/runtime-x":"true"}}}`
	account := clients.Tainter

	for name, try := range map[string]func() error{
		"read a Secret as the account": func() error {
			_, err := account.CoreV1().Secrets("default").Get(t.Context(), "used-on-a", metav1.GetOptions{})
			return err
		},
		"read a Secret of one's own pods as the node": func() error {
			_, err := clients.Node.CoreV1().Secrets("default").Get(t.Context(), "used-on-a", metav1.GetOptions{})
			return err
		},
		"list Secrets": func() error {
			_, err := account.CoreV1().Secrets("").List(t.Context(), metav1.ListOptions{})
			return err
		},
		"request another token as the node": func() error {
			_, err := clients.Node.CoreV1().ServiceAccounts(systemNamespace).CreateToken(t.Context(), apiAccount, &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
			return err
		},
		"list the pods of all nodes": func() error {
			_, err := clients.Node.CoreV1().Pods("").List(t.Context(), metav1.ListOptions{})
			return err
		},
		"list the pods of another node": func() error {
			_, err := clients.Node.CoreV1().Pods("").List(t.Context(), metav1.ListOptions{FieldSelector: "spec.nodeName=" + nodeB})
			return err
		},
		"list pods as the account": func() error {
			_, err := account.CoreV1().Pods("").List(t.Context(), metav1.ListOptions{FieldSelector: "spec.nodeName=" + nodeA})
			return err
		},
		"label another node":                func() error { return merge(clients.Node, nodeB, label) },
		"label another node as that node":   func() error { return merge(other, nodeB, label) },
		"label another node as the account": func() error { return merge(account, nodeB, label) },
		"be in system:masters":              func() error { return merge(masters, nodeA, label) },
		"be the node with a token that is bound to none": func() error {
			return merge(client(func() *rest.Config {
				config := withToken(c, unbound.Status.Token)
				config.Impersonate.UserName = "system:node:" + nodeA
				return config
			}()), nodeA, label)
		},
		"condition of another node":                func() error { return status(clients.Node, nodeB) },
		"condition of another node as that node":   func() error { return status(other, nodeB) },
		"condition as the account":                 func() error { return status(account, nodeA) },
		"cordon another node":                      func() error { return merge(clients.Node, nodeB, `{"spec":{"unschedulable":true}}`) },
		"cordon as the account":                    func() error { return merge(account, nodeA, `{"spec":{"unschedulable":true}}`) },
		"label oneself as the account":             func() error { return merge(account, nodeA, label) },
		"annotate oneself as the account":          func() error { return merge(account, nodeA, `{"metadata":{"annotations":{"a":"b"}}}`) },
		"finalizer as the account":                 func() error { return merge(account, nodeA, `{"metadata":{"finalizers":["example.com/x"]}}`) },
		"taint another node":                       func() error { return merge(account, nodeB, taints(nodeB, "ours")) },
		"taint with a foreign key":                 func() error { return merge(account, nodeA, taints(nodeA, "foreign")) },
		"taint as the node":                        func() error { return merge(clients.Node, nodeA, taints(nodeA, "ours")) },
		"taint with a token that is bound to none": func() error { return merge(loose, nodeA, taints(nodeA, "ours")) },
		"evict a pod of another node":              func() error { return evict(clients.Node, victim) },
		"evict a pod of another node as it":        func() error { return evict(other, victim) },
		"evict as the account":                     func() error { return evict(account, mine) },
		"delete a pod of another node": func() error {
			return clients.Node.CoreV1().Pods("default").Delete(t.Context(), victim.Name, metav1.DeleteOptions{})
		},
		"delete a node":  func() error { return account.CoreV1().Nodes().Delete(t.Context(), nodeB, metav1.DeleteOptions{}) },
		"delete oneself": func() error { return clients.Node.CoreV1().Nodes().Delete(t.Context(), nodeA, metav1.DeleteOptions{}) },
		"create a pod as the node": func() error {
			_, err := clients.Node.CoreV1().Pods("default").Create(t.Context(), &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "x"}, Spec: victim.Spec}, metav1.CreateOptions{})
			return err
		},
	} {
		t.Run("denied/"+name, func(t *testing.T) {
			if err := try(); !apierrors.IsForbidden(err) {
				t.Errorf("want forbidden, got %v", err)
			}
		})
	}
	for name, try := range map[string]func() error{
		"read one's own node": func() error {
			_, err := get(t.Context(), clients.Node, nodeA)
			return err
		},
		"list one's own pods": func() error {
			pods, err := NewDrainer(clients, DrainOptions{}).pods(t.Context())
			if err == nil && !slices.ContainsFunc(pods, func(p corev1.Pod) bool { return p.Name == "mine" }) {
				err = errors.New("the pod is missing")
			}
			return err
		},
		"label oneself": func() error {
			return merge(clients.Node, nodeA, `{"metadata":{"labels":{"hearth.sh/runtime-x":null}}}`)
		},
		"condition of oneself": func() error { return status(clients.Node, nodeA) },
		"cordon oneself":       func() error { return merge(clients.Node, nodeA, `{"spec":{"unschedulable":true}}`) },
		"uncordon oneself":     func() error { return merge(clients.Node, nodeA, `{"spec":{"unschedulable":null}}`) },
		"taint oneself":        func() error { return NewTaints(clients, Options{}).Interrupted(t.Context(), true) },
		"evict one's own pod":  func() error { return evict(clients.Node, mine) },
	} {
		t.Run("allowed/"+name, func(t *testing.T) {
			if err := try(); err != nil {
				t.Error(err)
			}
		})
	}
	if err := merge(clients.Node, nodeA, `{"spec":{"unschedulable":null}}`); err != nil {
		t.Error(err)
	}
	if err := NewTaints(clients, Options{}).Interrupted(t.Context(), false); err != nil {
		t.Error(err)
	}
}

func TestTheAPIMayTurnConditionsUnknownAndNothingElse(t *testing.T) {
	c := realCluster(t)
	token, err := c.Client().CoreV1().ServiceAccounts(systemNamespace).CreateToken(t.Context(), apiAccount, &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	client := kubernetes.NewForConfigOrDie(withToken(c, token.Status.Token))
	for name, test := range map[string]struct {
		patch   string
		allowed bool
	}{
		"unknown":           {`{"status":{"conditions":[{"type":"WasmReady","status":"Unknown","reason":"X"}]}}`, true},
		"true":              {`{"status":{"conditions":[{"type":"WasmReady","status":"True","reason":"X"}]}}`, false},
		"another condition": {`{"status":{"conditions":[{"type":"Ready","status":"Unknown","reason":"X"}]}}`, false},
		"capacity":          {`{"status":{"capacity":{"example.com/x":"1"}}}`, false},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := client.CoreV1().Nodes().Patch(t.Context(), nodeB, types.StrategicMergePatchType, []byte(test.patch), metav1.PatchOptions{}, "status")
			if test.allowed != (err == nil) || err != nil && !apierrors.IsForbidden(err) {
				t.Errorf("allowed %t: %v", test.allowed, err)
			}
		})
	}
	for name, test := range map[string]struct {
		patch   string
		allowed bool
	}{
		"remove a runtime's label":  {`{"metadata":{"labels":{"hearth.sh/runtime-old":null}}}`, true},
		"add a runtime's label":     {`{"metadata":{"labels":{"hearth.sh/runtime-new":"true"}}}`, false},
		"change a runtime's label":  {`{"metadata":{"labels":{"hearth.sh/runtime-stays":"false"}}}`, false},
		"remove another label":      {`{"metadata":{"labels":{"kubernetes.io/os":null}}}`, false},
		"cordon":                    {`{"spec":{"unschedulable":true}}`, false},
		"taint":                     {`{"spec":{"taints":[{"key":"hearth.sh/not-ready","effect":"NoSchedule"}]}}`, false},
		"annotate":                  {`{"metadata":{"annotations":{"example.com/x":"y"}}}`, false},
		"remove a label and cordon": {`{"metadata":{"labels":{"hearth.sh/runtime-stays":null}},"spec":{"unschedulable":true}}`, false},
	} {
		t.Run(name, func(t *testing.T) {
			set := `{"metadata":{"labels":{"hearth.sh/runtime-old":"true","hearth.sh/runtime-stays":"true"}}}`
			if _, err := c.Client().CoreV1().Nodes().Patch(t.Context(), nodeB, types.MergePatchType, []byte(set), metav1.PatchOptions{}); err != nil {
				t.Fatal(err)
			}
			_, err := client.CoreV1().Nodes().Patch(t.Context(), nodeB, types.MergePatchType, []byte(test.patch), metav1.PatchOptions{})
			if test.allowed != (err == nil) || err != nil && !apierrors.IsForbidden(err) {
				t.Errorf("allowed %t: %v", test.allowed, err)
			}
		})
	}
	set := `{"metadata":{"labels":{"hearth.sh/runtime-old":null,"hearth.sh/runtime-stays":null}}}`
	if _, err := c.Client().CoreV1().Nodes().Patch(t.Context(), nodeB, types.MergePatchType, []byte(set), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
}

func TestLabelsFollowProofAndNothingElseIsWritten(t *testing.T) {
	c := realCluster(t)
	_, clients := agentOn(t, c, nodeA)
	agent := "hearth-test/" + t.Name()
	before := readNode(t, c, nodeA)
	// Bootstrap registered the node with a label of a runtime that is no more.
	if _, err := c.Client().CoreV1().Nodes().Patch(t.Context(), nodeA, types.MergePatchType, []byte(`{"metadata":{"labels":{"hearth.sh/runtime-old":"true"}}}`), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	l := NewLabels(clients, 0, Options{})
	step := func(proofs map[string]ProofState, wantWrites int, want ...string) {
		t.Helper()
		start := writes(t, c, agent)
		if err := l.Sync(t.Context(), proofs); err != nil {
			t.Fatal(err)
		}
		if got := writes(t, c, agent) - start; got != wantWrites {
			t.Errorf("%d writes, want %d", got, wantWrites)
		}
		var got []string
		for key := range readNode(t, c, nodeA).Labels {
			if name, ours := strings.CutPrefix(key, v1alpha1.RuntimeLabelPrefix); ours {
				got = append(got, name)
			}
		}
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Errorf("labels %v, want %v", got, want)
		}
	}
	step(map[string]ProofState{"resident": Proven, "spin": Proven}, 1, "resident", "spin")
	step(map[string]ProofState{"resident": Proven, "spin": Proven}, 0, "resident", "spin")
	step(map[string]ProofState{"resident": Proven, "spin": Unknown}, 0, "resident", "spin")
	step(map[string]ProofState{"resident": Proven, "spin": Failed}, 1, "resident")
	step(map[string]ProofState{"resident": Unknown, "spin": Unknown}, 0, "resident")
	step(map[string]ProofState{}, 1)
	if after := readNode(t, c, nodeA); !maps.Equal(after.Labels, before.Labels) || !maps.Equal(after.Annotations, before.Annotations) {
		t.Errorf("other keys changed: %v %v", after.Labels, after.Annotations)
	}
}

func TestConditionHeartbeatsAndEndsUnknown(t *testing.T) {
	c := realCluster(t)
	_, clients := agentOn(t, c, nodeA)
	condition := NewCondition(clients, 2*time.Second, Options{})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- condition.Run(ctx) }()
	condition.Set(Readiness{Status: corev1.ConditionTrue, Reason: "Proven", Message: "A probe just ran."})
	wait := func(what string, ok func(*corev1.NodeCondition) bool) corev1.NodeCondition {
		t.Helper()
		if err := c.WaitNode(t.Context(), nodeA, "to be "+what, soon, func(n *corev1.Node) bool {
			w := wasmReady(n)
			return w != nil && ok(w)
		}); err != nil {
			t.Fatal(err)
		}
		return *wasmReady(readNode(t, c, nodeA))
	}
	first := wait("true", func(w *corev1.NodeCondition) bool { return w.Status == corev1.ConditionTrue && w.Reason == "Proven" })
	second := wait("heard of again", func(w *corev1.NodeCondition) bool { return w.LastHeartbeatTime.After(first.LastHeartbeatTime.Time) })
	if !second.LastTransitionTime.Equal(&first.LastTransitionTime) {
		t.Error("a heartbeat changed the transition time")
	}
	if readNode(t, c, nodeA).Status.Conditions[0].Type == "" || !cluster.NodeReady(readNode(t, c, nodeA)) {
		t.Error("the kubelet's conditions are gone")
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if last := wasmReady(readNode(t, c, nodeA)); last.Status != corev1.ConditionUnknown || last.Reason != "AgentStopped" {
		t.Errorf("after a stop: %+v", last)
	}
}

func TestStaleConditionsAreTurnedUnknownFromOutside(t *testing.T) {
	c := realCluster(t)
	ctx := t.Context()
	set := func(node string) {
		if err := NewCondition(asAdmin(c, node), 0, Options{}).write(ctx, Readiness{Status: corev1.ConditionTrue, Reason: "Proven"}); err != nil {
			t.Fatal(err)
		}
	}
	set(nodeA)
	set(nodeB)
	clock := clocktesting.NewFakeClock(time.Now())
	s := NewStaleConditions(c.Client(), time.Minute, Options{Clock: clock})
	sweep := func(want ...string) {
		t.Helper()
		got, err := s.Sweep(ctx)
		slices.Sort(got)
		if err != nil || !slices.Equal(got, want) {
			t.Fatalf("turned %v, want %v: %v", got, want, err)
		}
	}
	sweep()
	clock.Step(50 * time.Second)
	time.Sleep(time.Second) // heartbeats have a resolution of one second
	set(nodeB)
	sweep()
	clock.Step(11 * time.Second)
	sweep(nodeA)
	sweep()
	if w := wasmReady(readNode(t, c, nodeA)); w.Status != corev1.ConditionUnknown || w.Reason != "HeartbeatStopped" {
		t.Errorf("%+v", w)
	}
	if w := wasmReady(readNode(t, c, nodeB)); w.Status != corev1.ConditionTrue {
		t.Errorf("%+v", w)
	}
	// The labels stay until the proofs would be too old for an agent as well.
	label := v1alpha1.RuntimeLabelPrefix + "stale"
	for _, node := range []string{nodeA, nodeB} {
		body := fmt.Sprintf(`{"metadata":{"labels":{%q:"true"}}}`, label)
		if _, err := c.Client().CoreV1().Nodes().Patch(ctx, node, types.MergePatchType, []byte(body), metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	sweep()
	if readNode(t, c, nodeA).Labels[label] == "" {
		t.Error("the label went with the condition")
	}
	time.Sleep(time.Second)
	set(nodeB)
	clock.Step(DefaultProofStaleAfter)
	sweep()
	if a, b := readNode(t, c, nodeA).Labels[label], readNode(t, c, nodeB).Labels[label]; a != "" || b != "true" {
		t.Errorf("label of the silent node %q, of the other %q", a, b)
	}
}

func TestTaintsSurviveWritersWhoRace(t *testing.T) {
	c := realCluster(t)
	_, clients := agentOn(t, c, nodeA)
	foreign := corev1.Taint{Key: "example.com/theirs", Effect: corev1.TaintEffectPreferNoSchedule}
	admin := NewTaints(asAdmin(c, nodeA), Options{})
	if err := admin.change(t.Context(), foreign.Key, foreign.Effect); err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var racer sync.WaitGroup
	racer.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
				body := fmt.Sprintf(`{"metadata":{"annotations":{"example.com/n":"%d"}}}`, i)
				_, _ = c.Client().CoreV1().Nodes().Patch(context.Background(), nodeA, types.MergePatchType, []byte(body), metav1.PatchOptions{})
				time.Sleep(30 * time.Millisecond)
			}
		}
	})
	ours := NewTaints(clients, Options{})
	for range 5 {
		if err := errors.Join(ours.NotReady(t.Context()), ours.Interrupted(t.Context(), true)); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(ours.Proven(t.Context()), ours.Interrupted(t.Context(), false)); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	racer.Wait()
	if got := readNode(t, c, nodeA).Spec.Taints; !slices.ContainsFunc(got, func(t corev1.Taint) bool { return t.Key == foreign.Key }) || slices.ContainsFunc(got, func(t corev1.Taint) bool { return strings.HasPrefix(t.Key, "hearth.sh/") }) {
		t.Errorf("taints %v", got)
	}
	if err := admin.change(t.Context(), foreign.Key, ""); err != nil {
		t.Error(err)
	}
	if err := NewTaints(&kube.Clients{NodeName: nodeA, Node: clients.Node}, Options{}).NotReady(t.Context()); !errors.Is(err, ErrNoTaintAuthority) {
		t.Errorf("without authority: %v", err)
	}
}

// running is a Drainer and its Recorder that run.
type running struct {
	*Drainer
	cancel context.CancelFunc
	done   sync.WaitGroup
}

func (r *running) stop() {
	r.cancel()
	r.done.Wait()
}

func runDrainer(t *testing.T, clients *kube.Clients, o DrainOptions) *running {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	o.Events = NewRecorder(clients.Node, clients.NodeName, Options{})
	o.PollEvery, o.RetryBlocked = 300*time.Millisecond, time.Second
	r := &running{Drainer: NewDrainer(clients, o), cancel: cancel}
	r.done.Go(func() { _ = r.Run(ctx) })
	r.done.Go(func() { o.Events.Run(ctx) })
	t.Cleanup(r.stop)
	return r
}

// giveBackAtEnd leaves the node as tests expect it.
func giveBackAtEnd(t *testing.T, c *cluster.Cluster, node string) {
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), soon)
		defer cancel()
		d := NewDrainer(asAdmin(c, node), DrainOptions{})
		if err := errors.Join(d.taints.Interrupted(ctx, false), d.uncordon(ctx, "test")); err != nil {
			t.Error(err)
		}
	})
}

func (r *running) wait(t *testing.T, c *cluster.Cluster, what string, ok func(DrainStatus) bool) {
	t.Helper()
	if err := c.WaitFor(t.Context(), what, soon, func(context.Context) (bool, error) { return ok(r.Status()), nil }); err != nil {
		t.Fatalf("%v; status %+v", err, r.Status())
	}
}

func exists(t *testing.T, c *cluster.Cluster, p *corev1.Pod) bool {
	t.Helper()
	got, err := c.Client().CoreV1().Pods(p.Namespace).Get(t.Context(), p.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return false
	}
	if err != nil {
		t.Fatal(err)
	}
	return got.UID == p.UID
}

func TestDrainLeavesWhatBelongsToTheNodeAndEvictsTheRest(t *testing.T) {
	c := realCluster(t)
	_, clients := agentOn(t, c, nodeB)
	giveBackAtEnd(t, c, nodeB)
	ctx := t.Context()
	labels := map[string]string{"app": "daemon"}
	daemons := c.Client().AppsV1().DaemonSets(metav1.NamespaceDefault)
	if _, err := daemons.Create(ctx, &appsv1.DaemonSet{
		ObjectMeta: metav1.ObjectMeta{Name: "daemon"},
		Spec: appsv1.DaemonSetSpec{Selector: &metav1.LabelSelector{MatchLabels: labels}, Template: corev1.PodTemplateSpec{
			ObjectMeta: metav1.ObjectMeta{Labels: labels},
			Spec:       corev1.PodSpec{NodeSelector: map[string]string{"kubernetes.io/hostname": nodeB}, TerminationGracePeriodSeconds: new(int64(1)), Containers: []corev1.Container{{Name: "main", Image: toolboxImage, Args: []string{"sleep", "1h"}, ImagePullPolicy: corev1.PullIfNotPresent}}},
		}},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = daemons.Delete(context.Background(), "daemon", metav1.DeleteOptions{}) })
	ordinaryPod := makePod(t, c, nodeB, "default", "ordinary", nil)
	// Ends only when it is killed: its grace period has to be shortened.
	stubborn := makePod(t, c, nodeB, "default", "stubborn", func(p *corev1.Pod) {
		p.Spec.TerminationGracePeriodSeconds = new(int64(600))
		p.Spec.Containers[0].Lifecycle = &corev1.Lifecycle{PreStop: &corev1.LifecycleHandler{Sleep: &corev1.SleepAction{Seconds: 500}}}
	})
	guarded := makePod(t, c, nodeB, "default", "guarded", nil)
	budgets := c.Client().PolicyV1().PodDisruptionBudgets("default")
	if _, err := budgets.Create(ctx, &policyv1.PodDisruptionBudget{
		ObjectMeta: metav1.ObjectMeta{Name: "guarded"},
		Spec:       policyv1.PodDisruptionBudgetSpec{MinAvailable: new(intstr.FromInt32(1)), Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "guarded"}}},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = budgets.Delete(context.Background(), "guarded", metav1.DeleteOptions{}) })

	// The margin is what a busy machine has left to see the last pod off.
	r := runDrainer(t, clients, DrainOptions{Margin: 20 * time.Second, ForceBefore: 26 * time.Second})
	deadline := time.Now().Add(50 * time.Second)
	if err := r.Notify(Notice{Kind: SpotInterruption, Deadline: deadline}); err != nil {
		t.Fatal(err)
	}
	r.wait(t, c, "a pod to be held back", func(s DrainStatus) bool { return s.Blocked == 1 })
	if !exists(t, c, guarded) {
		t.Error("the budget was not respected while there was time")
	}
	// The evictions do not wait for the cordon, nor the test for both at once.
	if err := c.WaitNode(ctx, nodeB, "to be cordoned", soon, func(n *corev1.Node) bool {
		return n.Spec.Unschedulable && n.Annotations[v1alpha1.AnnotationCordonedBy] == string(SpotInterruption)
	}); err != nil {
		t.Error(err)
	}
	n := readNode(t, c, nodeB)
	if err := c.WaitNode(ctx, nodeB, "to be tainted", soon, func(n *corev1.Node) bool {
		return slices.ContainsFunc(n.Spec.Taints, func(t corev1.Taint) bool { return t.Key == v1alpha1.TaintInterruption })
	}); err != nil {
		t.Error(err)
	}
	r.wait(t, c, "the node to be empty", func(s DrainStatus) bool { return s.Phase == Drained })
	if late := time.Since(deadline); late > 0 {
		t.Errorf("drained %s after the deadline", late)
	}
	for _, p := range []*corev1.Pod{ordinaryPod, stubborn, guarded} {
		if exists(t, c, p) {
			t.Errorf("pod %s is still there", p.Name)
		}
	}
	if s := r.Status(); s.Forced != 1 || s.Total != 3 {
		t.Errorf("status %+v", s)
	}
	pods, err := c.Client().CoreV1().Pods("default").List(ctx, metav1.ListOptions{LabelSelector: "app=daemon"})
	if err != nil || len(pods.Items) != 1 || pods.Items[0].DeletionTimestamp != nil {
		t.Errorf("the DaemonSet's pod: %v %v", len(pods.Items), err)
	}
	r.stop()
	reasons := map[string]bool{}
	events, err := c.Client().EventsV1().Events("default").List(ctx, metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range events.Items {
		if e.ReportingController == reporter && (e.Regarding.Kind != "Node" || e.Regarding.UID == n.UID) {
			reasons[e.Reason] = true
		}
	}
	for _, want := range []string{"Cordoned", "DrainStarted", "DrainCompleted", "NodeLeaving", "EvictionBlocked"} {
		if !reasons[want] {
			t.Errorf("no event %s in %v", want, slices.Sorted(maps.Keys(reasons)))
		}
	}
}

func TestAnInterruptionTakesOverFromARebalance(t *testing.T) {
	c := realCluster(t)
	giveBackAtEnd(t, c, nodeB)
	stubborn := makePod(t, c, nodeB, "default", "patient", func(p *corev1.Pod) {
		p.Spec.TerminationGracePeriodSeconds = new(int64(600))
		p.Spec.Containers[0].Lifecycle = &corev1.Lifecycle{PreStop: &corev1.LifecycleHandler{Sleep: &corev1.SleepAction{Seconds: 500}}}
	})
	r := runDrainer(t, asAdmin(c, nodeB), DrainOptions{DrainOnRebalance: true, EvictUnmanaged: true, Margin: 8 * time.Second})
	if err := r.Notify(Notice{Kind: Rebalance}); err != nil {
		t.Fatal(err)
	}
	r.wait(t, c, "the pod to be told to end in its own time", func(s DrainStatus) bool { return s.Terminating == 1 })
	if err := r.Notify(Notice{Kind: SpotInterruption, Deadline: time.Now().Add(20 * time.Second)}); err != nil {
		t.Fatal(err)
	}
	// That is all there is to ask for: kubelet 1.36 does not always cut short a
	// preStop hook that has begun.
	if err := c.WaitFor(t.Context(), "the pod's time to be shortened", soon, func(ctx context.Context) (bool, error) {
		p, err := c.Client().CoreV1().Pods("default").Get(ctx, stubborn.Name, metav1.GetOptions{})
		if err != nil {
			return apierrors.IsNotFound(err), nil
		}
		return p.DeletionGracePeriodSeconds != nil && *p.DeletionGracePeriodSeconds <= 12, nil
	}); err != nil {
		t.Error(err)
	}
	if err := c.WaitNode(t.Context(), nodeB, "to name the new notice", soon, func(n *corev1.Node) bool {
		return n.Annotations[v1alpha1.AnnotationCordonedBy] == string(SpotInterruption)
	}); err != nil {
		t.Error(err)
	}
	r.stop()
}

func TestAnAgentOnTheHostActsAsItsKubelet(t *testing.T) {
	c := realCluster(t)
	giveBackAtEnd(t, c, nodeA)
	clients, err := kube.FromKubeconfig(c.Node(nodeA).KubeletKubeconfig, nodeA, kube.Options{})
	if err != nil {
		t.Fatal(err)
	}
	labels := NewLabels(clients, 0, Options{})
	if err := errors.Join(labels.Sync(t.Context(), map[string]ProofState{"resident": Proven}), labels.Sync(t.Context(), map[string]ProofState{})); err != nil {
		t.Error(err)
	}
	if err := NewCondition(clients, 0, Options{}).write(t.Context(), Readiness{Status: corev1.ConditionTrue, Reason: "Proven"}); err != nil {
		t.Error(err)
	}
	guest := makePod(t, c, nodeA, "default", "guest", nil)
	r := runDrainer(t, clients, DrainOptions{EvictUnmanaged: true})
	if err := r.Notify(Notice{Kind: Manual}); err != nil {
		t.Fatal(err)
	}
	r.wait(t, c, "the node to be empty", func(s DrainStatus) bool { return s.Phase == Drained })
	if n := readNode(t, c, nodeA); exists(t, c, guest) || !n.Spec.Unschedulable {
		t.Errorf("the pod is there: %t; cordoned: %t", exists(t, c, guest), n.Spec.Unschedulable)
	}
	if err := r.Withdraw(Manual, ""); err != nil {
		t.Fatal(err)
	}
	r.wait(t, c, "the node to be given back", func(s DrainStatus) bool { return s.Phase == DrainIdle })
	if readNode(t, c, nodeA).Spec.Unschedulable {
		t.Error("still cordoned")
	}
	r.stop()
}

func TestOnesOwnPodLeavesLast(t *testing.T) {
	c := realCluster(t)
	giveBackAtEnd(t, c, nodeB)
	// Takes its time to end, so that the order shows.
	slow := makePod(t, c, nodeB, "default", "slow", func(p *corev1.Pod) {
		p.Spec.TerminationGracePeriodSeconds = new(int64(5))
		p.Spec.Containers[0].Lifecycle = &corev1.Lifecycle{PreStop: &corev1.LifecycleHandler{Sleep: &corev1.SleepAction{Seconds: 3}}}
	})
	self := makePod(t, c, nodeB, "default", "self", nil)
	r := runDrainer(t, asAdmin(c, nodeB), DrainOptions{PodNamespace: "default", PodName: "self", EvictUnmanaged: true})
	if err := r.Notify(Notice{Kind: Manual}); err != nil {
		t.Fatal(err)
	}
	if err := c.WaitFor(t.Context(), "slow to be told", soon, func(ctx context.Context) (bool, error) {
		p, err := c.Client().CoreV1().Pods("default").Get(ctx, slow.Name, metav1.GetOptions{})
		return err == nil && p.DeletionTimestamp != nil, nil
	}); err != nil {
		t.Fatal(err)
	}
	if p, err := c.Client().CoreV1().Pods("default").Get(t.Context(), self.Name, metav1.GetOptions{}); err != nil || p.DeletionTimestamp != nil {
		t.Errorf("told to leave before the others had left: %v", err)
	}
	r.wait(t, c, "the node to be empty", func(s DrainStatus) bool { return s.Phase == Drained })
	if exists(t, c, slow) {
		t.Error("done while a pod was there")
	}
	r.stop()
}

func TestADrainGoesOnAfterARestartAndIsUndoneWhenWithdrawn(t *testing.T) {
	c := realCluster(t)
	_, clients := agentOn(t, c, nodeB)
	giveBackAtEnd(t, c, nodeB)
	first := runDrainer(t, clients, DrainOptions{})
	if err := first.Notify(Notice{Kind: Rebalance, ID: "r1"}); err != nil {
		t.Fatal(err)
	}
	cordoned := func(n *corev1.Node) bool { return n.Spec.Unschedulable }
	if err := c.WaitNode(t.Context(), nodeB, "to be cordoned", soon, cordoned); err != nil {
		t.Fatal(err)
	}
	first.stop()
	if !cordoned(readNode(t, c, nodeB)) {
		t.Fatal("a stopped agent must leave the cordon to its successor")
	}
	second := runDrainer(t, clients, DrainOptions{})
	second.wait(t, c, "the notice to be taken up", func(s DrainStatus) bool { return s.Phase == DrainCordoned && s.Notice.ID == "r1" })
	if err := second.Withdraw(Rebalance, "r1"); err != nil {
		t.Fatal(err)
	}
	second.wait(t, c, "the node to be given back", func(s DrainStatus) bool { return s.Phase == DrainIdle })
	n := readNode(t, c, nodeB)
	if n.Spec.Unschedulable || n.Annotations[v1alpha1.AnnotationCordonedBy] != "" || n.Annotations[v1alpha1.AnnotationInterruption] != "" ||
		slices.ContainsFunc(n.Spec.Taints, func(t corev1.Taint) bool { return t.Key == v1alpha1.TaintInterruption }) {
		t.Errorf("left behind: %v %v %v", n.Spec.Unschedulable, n.Annotations, n.Spec.Taints)
	}
	second.stop()
}

func TestARebalanceThatNothingFollowsIsUndone(t *testing.T) {
	c := realCluster(t)
	giveBackAtEnd(t, c, nodeB)
	r := runDrainer(t, asAdmin(c, nodeB), DrainOptions{RebalanceTTL: 6 * time.Second})
	if err := r.Notify(Notice{Kind: Rebalance}); err != nil {
		t.Fatal(err)
	}
	r.wait(t, c, "the cordon", func(s DrainStatus) bool { return s.Phase == DrainCordoned })
	r.wait(t, c, "the end of the notice", func(s DrainStatus) bool { return s.Phase == DrainIdle })
	if readNode(t, c, nodeB).Spec.Unschedulable {
		t.Error("still cordoned")
	}
	r.stop()
	// The same for a notice that expired while the machine was switched off.
	d := NewDrainer(asAdmin(c, nodeB), DrainOptions{})
	past := time.Now().Add(-time.Hour)
	if err := d.cordon(t.Context(), Notice{Kind: SpotInterruption, Deadline: past, At: past.Add(-2 * time.Minute)}); err != nil {
		t.Fatal(err)
	}
	bystander := makePod(t, c, nodeB, "default", "bystander", nil)
	again := runDrainer(t, asAdmin(c, nodeB), DrainOptions{})
	if err := c.WaitNode(t.Context(), nodeB, "to be given back", soon, func(n *corev1.Node) bool { return !n.Spec.Unschedulable }); err != nil {
		t.Fatal(err)
	}
	if p, err := c.Client().CoreV1().Pods("default").Get(t.Context(), bystander.Name, metav1.GetOptions{}); err != nil || p.DeletionTimestamp != nil {
		t.Errorf("a pod was evicted for a notice that had expired: %v", err)
	}
	again.stop()
}

func TestACordonOfOthersStays(t *testing.T) {
	c := realCluster(t)
	giveBackAtEnd(t, c, nodeB)
	set := func(v string) {
		t.Helper()
		if _, err := c.Client().CoreV1().Nodes().Patch(t.Context(), nodeB, types.MergePatchType, []byte(`{"spec":{"unschedulable":`+v+`}}`), metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	set("true")
	r := runDrainer(t, asAdmin(c, nodeB), DrainOptions{})
	if err := r.Notify(Notice{Kind: Rebalance}); err != nil {
		t.Fatal(err)
	}
	if err := c.WaitNode(t.Context(), nodeB, "to have the notice", soon, func(n *corev1.Node) bool { return n.Annotations[v1alpha1.AnnotationInterruption] != "" }); err != nil {
		t.Fatal(err)
	}
	if owner := readNode(t, c, nodeB).Annotations[v1alpha1.AnnotationCordonedBy]; owner != "" {
		t.Errorf("took the cordon of somebody else as %s's", owner)
	}
	if err := r.Withdraw(Rebalance, ""); err != nil {
		t.Fatal(err)
	}
	r.wait(t, c, "the withdrawal", func(s DrainStatus) bool { return s.Phase == DrainIdle })
	if !readNode(t, c, nodeB).Spec.Unschedulable {
		t.Error("undid the cordon of somebody else")
	}
	r.stop()
	set("null")
}

func TestRepeatedEventsBecomeASeries(t *testing.T) {
	c := realCluster(t)
	n := readNode(t, c, nodeA)
	r := NewRecorder(c.Client(), nodeA, Options{})
	for range 3 {
		r.Node(n, Warning, "SeriesTest", "The same again.")
	}
	ctx, cancel := context.WithCancel(t.Context())
	var done sync.WaitGroup
	done.Go(func() { r.Run(ctx) })
	err := c.WaitFor(t.Context(), "the series", soon, func(ctx context.Context) (bool, error) {
		events, err := c.Client().EventsV1().Events("default").List(ctx, metav1.ListOptions{FieldSelector: "reason=SeriesTest"})
		return err == nil && len(events.Items) == 1 && events.Items[0].Series != nil && events.Items[0].Series.Count == 3, nil
	})
	cancel()
	done.Wait()
	if err != nil {
		t.Error(err)
	}
}
