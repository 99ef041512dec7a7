package node_test

import (
	"context"
	"maps"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/imds/imdstest"
)

const labelControlPlane = "node-role.kubernetes.io/control-plane"

// metadata installs the chart anew with agents that ask an instance metadata
// service, one instance per node, until the test ends, and with further values.
// Nodes are told apart by their addresses: the agent is on the host's network.
func metadata(t *testing.T, instances map[string]imdstest.Config, values ...string) map[string]*imdstest.Server {
	t.Helper()
	ctx := t.Context()
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", net.JoinHostPort(bench.HostIP(), "0"))
	if err != nil {
		t.Fatal(err)
	}
	servers, byIP := map[string]*imdstest.Server{}, map[string]*imdstest.Server{}
	for name, config := range instances {
		servers[name] = imdstest.New(config)
		byIP[bench.Node(name).IP] = servers[name]
	}
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host, _, _ := net.SplitHostPort(r.RemoteAddr)
		if s := byIP[host]; s != nil {
			s.ServeHTTP(w, r)
			return
		}
		http.Error(w, "no instance has the address "+host, http.StatusNotFound)
	})
	serving, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- imdstest.Serve(serving, listener, handler, func() {
			for _, s := range servers {
				s.Close()
			}
		})
	}()
	t.Cleanup(func() {
		restore, stop := context.WithTimeout(context.Background(), soon)
		defer stop()
		if err := install(restore); err != nil {
			t.Errorf("install the chart as it was: %v", err)
		} else if err := rolledOut(restore); err != nil {
			t.Error(err)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	if err := install(ctx, append([]string{"agent.imds=on", "agent.env[0].name=AWS_EC2_METADATA_SERVICE_ENDPOINT",
		"agent.env[0].value=http://" + listener.Addr().String()}, values...)...); err != nil {
		t.Fatal(err)
	}
	if err := rolledOut(ctx); err != nil {
		t.Fatal(err)
	}
	return servers
}

// rolledOut waits until every node has an agent of the last revision that is ready.
func rolledOut(ctx context.Context) error {
	return bench.WaitFor(ctx, "the new agents to be ready", soon, func(ctx context.Context) (bool, error) {
		d, err := bench.Client().AppsV1().DaemonSets(namespace).Get(ctx, "hearth-nodeagent", metav1.GetOptions{})
		return err == nil && d.Status.ObservedGeneration == d.Generation && d.Status.UpdatedNumberScheduled == d.Status.DesiredNumberScheduled &&
			d.Status.NumberReady == d.Status.DesiredNumberScheduled && d.Status.DesiredNumberScheduled > 0, nil
	})
}

// mark sets a label of a node, or removes it with an empty value.
func mark(ctx context.Context, node, key, value string) error {
	patch := `{"metadata":{"labels":{"` + key + `":"` + value + `"}}}`
	if value == "" {
		patch = `{"metadata":{"labels":{"` + key + `":null}}}`
	}
	_, err := bench.Client().CoreV1().Nodes().Patch(ctx, node, types.MergePatchType, []byte(patch), metav1.PatchOptions{})
	return err
}

func waitEvent(t *testing.T, node, reason string, since time.Time) {
	t.Helper()
	if err := bench.WaitFor(t.Context(), "the event "+reason+" on "+node, soon, func(ctx context.Context) (bool, error) {
		events, err := bench.Client().EventsV1().Events("").List(ctx, metav1.ListOptions{})
		if err != nil {
			return false, err
		}
		for _, e := range events.Items {
			at := e.EventTime.Time
			if e.Series != nil {
				at = e.Series.LastObservedTime.Time
			}
			if e.Regarding.Kind == "Node" && e.Regarding.Name == node && e.Reason == reason && !at.Before(since) {
				return true, nil
			}
		}
		return false, nil
	}); err != nil {
		t.Fatal(err)
	}
}

func check(s v1alpha1.NodeStatus, code string) v1alpha1.Check {
	for _, c := range s.Checks {
		if c.Code == code {
			return c
		}
	}
	return v1alpha1.Check{}
}

// free says that nothing keeps pods off a node because of a notice.
func free(n *corev1.Node) bool {
	return !n.Spec.Unschedulable && !tainted(n, v1alpha1.TaintInterruption)
}

// TestNodesThatAreInstances has all that needs agents which ask instance
// metadata: to have the chart installed otherwise, and as it was, takes time.
func TestNodesThatAreInstances(t *testing.T) {
	ctx := t.Context()
	begin := time.Now().Add(-time.Second)
	if err := mark(ctx, plainNode, labelControlPlane, "true"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = mark(context.Background(), plainNode, labelControlPlane, "") })
	worker, server := imdstest.Default(), imdstest.Default()
	server.InstanceID = "i-0fedcba9876543210"
	worker.Credentials.AccessKeyID = "ASIATHISNODESROLE000"
	ecr := startECR(t)
	services := metadata(t, map[string]imdstest.Config{wasmNode: worker, plainNode: server},
		"agent.env[1].name=AWS_ENDPOINT_URL", "agent.env[1].value="+ecr.endpoint)
	service := services[wasmNode]

	t.Run("images of ECR come by the node's role alone", func(t *testing.T) {
		ecr.imagesComeByTheNodesRoleAlone(t, worker.Credentials.AccessKeyID)
	})

	t.Run("each node knows which instance it is", func(t *testing.T) {
		for name, want := range map[string]string{wasmNode: worker.InstanceID, plainNode: server.InstanceID} {
			s := waitStatus(t, name, "the instance", func(s v1alpha1.NodeStatus) bool { return s.Instance != nil })
			if s.Instance.ID != want || s.Instance.Type != worker.InstanceType || s.Instance.LifeCycle != "spot" || s.Instance.Role != worker.Role {
				t.Errorf("%s is %+v, want %s", name, s.Instance, want)
			}
			waitStatus(t, name, "metadata to be well", func(s v1alpha1.NodeStatus) bool {
				return check(s, "instance-metadata").State == v1alpha1.CheckOK
			})
		}
	})

	t.Run("a server of the cluster on a Spot instance is called out, a worker is not", func(t *testing.T) {
		waitStatus(t, plainNode, "the check to fail", func(s v1alpha1.NodeStatus) bool {
			return check(s, "spot-server").State == v1alpha1.CheckFailing
		})
		waitEvent(t, plainNode, "ServerOnSpot", begin)
		waitStatus(t, wasmNode, "the check to pass", func(s v1alpha1.NodeStatus) bool {
			return check(s, "spot-server").State == v1alpha1.CheckOK
		})
	})

	t.Run("while nothing is announced nothing happens", func(t *testing.T) {
		polls := func() int { return service.Count(http.MethodGet, "meta-data/spot/instance-action") }
		before := polls()
		if err := bench.WaitFor(ctx, "two polls", soon, func(context.Context) (bool, error) { return polls() >= before+2, nil }); err != nil {
			t.Fatal(err)
		}
		waitNode(t, wasmNode, "the node", free)
		if s, err := status(ctx, wasmNode); err != nil || s.Interruption != nil {
			t.Errorf("status says %+v, %v", s.Interruption, err)
		}
	})

	t.Run("a rebalance recommendation cordons until it is taken back", func(t *testing.T) {
		from := time.Now().Add(-time.Second)
		service.SetRebalance(time.Now())
		waitNode(t, wasmNode, "the cordon", func(n *corev1.Node) bool { return n.Spec.Unschedulable })
		waitEvent(t, wasmNode, "Cordoned", from)
		service.SetRebalance(time.Time{})
		waitNode(t, wasmNode, "the node to take pods again", free)
		waitEvent(t, wasmNode, "Uncordoned", from)
	})

	// A notice is bad news that needs an answer: no answer is no news. A
	// cordon for what was announced before must hold, too.
	// The two that a soak leaves to itself differ from one of these in what the
	// client reports only, which its own tests show.
	faults := map[string]imdstest.Fault{
		"silent":     {Path: "*", Silent: true},
		"unreadable": {Path: "meta-data/*", Body: new("<html>not what was asked for</html>")},
	}
	maps.Copy(faults, soaked(nil, map[string]imdstest.Fault{
		"failing":      {Path: "*", Status: http.StatusServiceUnavailable},
		"disconnected": {Path: "*", Reset: true},
	}))
	for name, fault := range faults {
		t.Run("a service that is "+name+" degrades the node and moves nothing", func(t *testing.T) {
			remove := service.Fault(fault)
			defer remove()
			s := waitStatus(t, wasmNode, "the check to fail", func(s v1alpha1.NodeStatus) bool {
				return check(s, "instance-metadata").State == v1alpha1.CheckFailing
			})
			c := check(s, "instance-metadata")
			t.Logf("a person reads: %s; %s", c.Message, c.Remedy)
			if c.Message == "" || c.Remedy == "" || strings.Contains(c.Message, "context deadline exceeded") || s.State == v1alpha1.NodeHealthy {
				t.Errorf("%s: %+v", s.State, c)
			}
			if n, err := bench.Client().CoreV1().Nodes().Get(ctx, wasmNode, metav1.GetOptions{}); err != nil || !free(n) || s.Interruption != nil {
				t.Errorf("the node is left although nothing was announced: %+v, %v", s.Interruption, err)
			}
			remove()
			waitStatus(t, wasmNode, "metadata to be well again", func(s v1alpha1.NodeStatus) bool {
				return check(s, "instance-metadata").State == v1alpha1.CheckOK
			})
		})
	}

	t.Run("an interruption empties the node, and silence afterwards takes nothing back", func(t *testing.T) {
		from := time.Now().Add(-time.Second)
		service.SetSpotAction("terminate", time.Now().Add(2*time.Minute))
		waitNode(t, wasmNode, "cordon and taint", func(n *corev1.Node) bool {
			return n.Spec.Unschedulable && tainted(n, v1alpha1.TaintInterruption)
		})
		s := waitStatus(t, wasmNode, "the node to be drained", func(s v1alpha1.NodeStatus) bool {
			return s.Interruption != nil && s.Interruption.Phase == "drained"
		})
		if s.Interruption.Kind != "spot-interruption" || s.Interruption.Simulated || s.Interruption.Deadline == nil {
			t.Errorf("%+v", s.Interruption)
		}
		for _, reason := range []string{"Cordoned", "DrainStarted", "DrainCompleted"} {
			waitEvent(t, wasmNode, reason, from)
		}
		remove := service.Fault(imdstest.Fault{Path: "*", Silent: true})
		defer remove()
		waitStatus(t, wasmNode, "the check to fail", func(s v1alpha1.NodeStatus) bool {
			return check(s, "instance-metadata").State == v1alpha1.CheckFailing
		})
		if n, err := bench.Client().CoreV1().Nodes().Get(ctx, wasmNode, metav1.GetOptions{}); err != nil || !n.Spec.Unschedulable || !tainted(n, v1alpha1.TaintInterruption) {
			t.Errorf("the node takes pods although nobody took the notice back: %v, %v", n.Spec, err)
		}
		remove()
		service.SetSpotAction("", time.Time{})
		waitNode(t, wasmNode, "the node to take pods again", free)
	})
}
