// Package kube is how Hearth talks to a Kubernetes API server: under which
// identities, with which limits, and the Function objects of a cluster.
//
// It owns connections and the shape of the custom resource. It decides nothing
// about nodes (internal/node) or functions (internal/function), and reads no
// Secret.
package kube

import (
	"errors"
	"fmt"
	"net/http"
	"time"

	"k8s.io/apimachinery/pkg/api/validation"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

const (
	// CallTimeout bounds one request that is not a watch. An API server that
	// needs longer is treated as one that does not answer.
	CallTimeout = 10 * time.Second

	// A node agent makes a handful of requests a minute; during a drain it
	// evicts every pod of its node at once, which is what the burst is for.
	clientQPS   = 20
	clientBurst = 50

	// nodeUserPrefix makes a node's name the user that its kubelet is.
	nodeUserPrefix = "system:node:"
)

// Clients are the identities of one node's agent. They are separate because
// no single one of them may do everything: what the agent of one node cannot
// do to another is decided by the API server, not by us.
type Clients struct {
	// NodeName is the node all of this is about.
	NodeName string

	// Node acts as system:node:<name>: reads its own Node and its own pods,
	// writes labels, annotations, cordon and status of its own Node, evicts
	// its own pods, records events. The node authorizer and NodeRestriction
	// hold it to that.
	Node kubernetes.Interface

	// Tainter changes the taints of its own Node, which NodeRestriction denies
	// to a node; a ValidatingAdmissionPolicy holds it to our taints and to its
	// own node. It is nil where there is no such identity (a kubeconfig of the
	// kubelet alone); taints then stay as they are.
	Tainter kubernetes.Interface

	// Reader reads what is not bound to a node: Function objects. In a pod it
	// is the ServiceAccount; nil where there is only a kubelet's identity.
	Reader dynamic.Interface
}

// Options configure the constructors of Clients; the zero value is usable.
type Options struct {
	// UserAgent names the program in the API server's audit log.
	UserAgent string
	// TainterKubeconfig is the file of an identity that may change taints, for
	// FromKubeconfig. Empty: none.
	TainterKubeconfig string
	// WrapTransport sees every request; nil for none. Used to count or break
	// requests.
	WrapTransport func(http.RoundTripper) http.RoundTripper
}

// InCluster returns the clients of an agent in a pod. It acts as its
// ServiceAccount, and as its node through constrained impersonation (KEP-5284,
// Kubernetes 1.36 or newer), which the API server allows for the node the pod
// runs on and no other. nodeName comes from the downward API
// (spec.nodeName).
func InCluster(nodeName string, o Options) (*Clients, error) {
	config, err := rest.InClusterConfig()
	if errors.Is(err, rest.ErrNotInCluster) {
		return nil, errors.New("this process is not in a pod; name a kubeconfig file instead")
	}
	if err != nil {
		return nil, fmt.Errorf("read the pod's ServiceAccount: %w", err)
	}
	return FromServiceAccount(config, nodeName, o)
}

// FromServiceAccount is InCluster for a configuration that was already read:
// one that authenticates with a ServiceAccount token bound to a pod on the
// node.
func FromServiceAccount(config *rest.Config, nodeName string, o Options) (*Clients, error) {
	if err := validateNodeName(nodeName); err != nil {
		return nil, err
	}
	account := o.apply(config)
	node := rest.CopyConfig(account)
	// Only the user may be named: with groups, UID or extra fields the API
	// server would not take this for a node impersonating itself.
	node.Impersonate = rest.ImpersonationConfig{UserName: nodeUserPrefix + nodeName}
	c := &Clients{NodeName: nodeName}
	var err error
	if c.Node, err = kubernetes.NewForConfig(node); err != nil {
		return nil, fmt.Errorf("make the client of node %s: %w", nodeName, err)
	}
	if c.Tainter, err = kubernetes.NewForConfig(account); err != nil {
		return nil, fmt.Errorf("make the client of the ServiceAccount: %w", err)
	}
	if c.Reader, err = dynamic.NewForConfig(account); err != nil {
		return nil, fmt.Errorf("make the client of the ServiceAccount: %w", err)
	}
	return c, nil
}

// FromKubeconfig returns the clients of an agent that runs on the host, with
// the kubelet's own kubeconfig (on k3s <data-dir>/agent/kubelet.kubeconfig).
// That identity cannot change taints; Options.TainterKubeconfig names one that
// can.
func FromKubeconfig(path, nodeName string, o Options) (*Clients, error) {
	if err := validateNodeName(nodeName); err != nil {
		return nil, err
	}
	config, err := clientcmd.BuildConfigFromFlags("", path)
	if err != nil {
		return nil, fmt.Errorf("read the kubeconfig %s: %w", path, err)
	}
	c := &Clients{NodeName: nodeName}
	if c.Node, err = kubernetes.NewForConfig(o.apply(config)); err != nil {
		return nil, fmt.Errorf("make the client of node %s from %s: %w", nodeName, path, err)
	}
	if o.TainterKubeconfig == "" {
		return c, nil
	}
	config, err = clientcmd.BuildConfigFromFlags("", o.TainterKubeconfig)
	if err != nil {
		return nil, fmt.Errorf("read the kubeconfig %s: %w", o.TainterKubeconfig, err)
	}
	if c.Tainter, err = kubernetes.NewForConfig(o.apply(config)); err != nil {
		return nil, fmt.Errorf("make the client for taints from %s: %w", o.TainterKubeconfig, err)
	}
	if c.Reader, err = dynamic.NewForConfig(o.apply(config)); err != nil {
		return nil, fmt.Errorf("make the client for functions from %s: %w", o.TainterKubeconfig, err)
	}
	return c, nil
}

func (o Options) apply(config *rest.Config) *rest.Config {
	config = rest.CopyConfig(config)
	config.QPS, config.Burst = clientQPS, clientBurst
	if o.UserAgent != "" {
		config.UserAgent = o.UserAgent
	}
	if o.WrapTransport != nil {
		config.Wrap(o.WrapTransport)
	}
	return config
}

func validateNodeName(name string) error {
	if problems := validation.NameIsDNSSubdomain(name, false); len(problems) > 0 {
		return fmt.Errorf("node name %q: %s", name, problems[0])
	}
	return nil
}
