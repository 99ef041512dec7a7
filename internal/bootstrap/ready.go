package bootstrap

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"time"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
)

// What can keep a node from being Ready.
const (
	CodeNodeNotReady      fault.Code = "node-not-ready"
	CodeNodeNotRegistered fault.Code = "node-not-registered"
)

const (
	// readyPoll is between two looks at the node: one small request to the
	// API server, which is this machine's own or behind its load balancer.
	readyPoll = 250 * time.Millisecond
	// readyCall bounds one of them.
	readyCall = 5 * time.Second
	// maxNodeBytes bounds what is read of a Node.
	maxNodeBytes = 2 << 20
	// believedAfter is how long a node that is called Ready must have stayed so
	// for it to be true whatever the clocks say: Kubernetes gives up a kubelet
	// that is silent for 50 seconds.
	believedAfter = 70 * time.Second
)

// nodeState is what the API server says of the node.
type nodeState struct {
	Known bool
	Ready bool
	// Heard is when kubelet last said so, in whole seconds of this machine's
	// clock; zero if it is not told.
	Heard time.Time
	// Why is the condition's message while it is not Ready.
	Why string
	// Version is the kubelet's.
	Version string
	// Labels and Annotations are all that the Node has.
	Labels, Annotations map[string]string
}

// nodeClient asks for one node with the node's own identity.
type nodeClient struct {
	http *http.Client
	url  string
}

// newNodeClient reads a kubeconfig, which is an error that is fs.ErrNotExist
// until k3s has written it.
func newNodeClient(kubeconfig, node string) (*nodeClient, error) {
	if _, err := os.Stat(kubeconfig); err != nil {
		return nil, err
	}
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", kubeconfig, err)
	}
	config.Timeout = readyCall
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		return nil, fmt.Errorf("use %s: %w", kubeconfig, err)
	}
	return &nodeClient{http: client, url: config.Host + "/api/v1/nodes/" + url.PathEscape(node)}, nil
}

func (c *nodeClient) close() { c.http.CloseIdleConnections() }

func (c *nodeClient) state(ctx context.Context) (nodeState, error) {
	ctx, cancel := context.WithTimeout(ctx, readyCall)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, c.url, nil)
	if err != nil {
		return nodeState{}, err
	}
	request.Header.Set("Accept", "application/json")
	response, err := c.http.Do(request)
	if err != nil {
		return nodeState{}, err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, maxNodeBytes))
	switch {
	case err != nil:
		return nodeState{}, err
	case response.StatusCode == http.StatusNotFound:
		return nodeState{Why: "the node has not registered yet"}, nil
	case response.StatusCode != http.StatusOK:
		return nodeState{}, fmt.Errorf("the API server answers %s", response.Status)
	}
	var node struct {
		Metadata struct {
			Labels, Annotations map[string]string
		} `json:"metadata"`
		Status struct {
			NodeInfo struct {
				KubeletVersion string `json:"kubeletVersion"`
			} `json:"nodeInfo"`
			Conditions []struct {
				Type, Status, Reason, Message string
				LastHeartbeatTime             time.Time
			} `json:"conditions"`
		} `json:"status"`
	}
	if err := json.Unmarshal(body, &node); err != nil {
		return nodeState{}, fmt.Errorf("the API server's answer is no Node: %w", err)
	}
	s := nodeState{
		Known: true, Version: node.Status.NodeInfo.KubeletVersion, Why: "kubelet has not reported yet",
		Labels: node.Metadata.Labels, Annotations: node.Metadata.Annotations,
	}
	for _, c := range node.Status.Conditions {
		if c.Type == "Ready" {
			s.Ready, s.Why, s.Heard = c.Status == "True", c.Message, c.LastHeartbeatTime
		}
	}
	return s, nil
}

// waitReady waits until the API server says that the node is Ready, and has
// heard so from the kubelet that began at since: after a reboot the Node still
// says what it said before, for most of a minute. watch is asked at every look
// whether waiting still makes sense.
func waitReady(ctx context.Context, kubeconfig, node string, since time.Time, watch func(ctx context.Context) error, doing func(string, ...any)) (nodeState, error) {
	var client *nodeClient
	defer func() {
		if client != nil {
			client.close()
		}
	}()
	last := nodeState{Why: "k3s has not written the kubelet's kubeconfig"}
	var lastErr error
	var readySince time.Time // by the clock that nobody sets
	for {
		if err := watch(ctx); err != nil {
			return last, err
		}
		var err error
		if client == nil {
			if client, err = newNodeClient(kubeconfig, node); errors.Is(err, fs.ErrNotExist) {
				err = nil
			}
		}
		if client != nil {
			var s nodeState
			if s, err = client.state(ctx); err == nil {
				last = s
				switch {
				case !s.Ready:
					readySince = time.Time{}
				case !s.Heard.Before(since.Truncate(time.Second)), !readySince.IsZero() && time.Since(readySince) > believedAfter:
					return s, nil
				default:
					last.Ready, last.Why = false, "kubelet has not reported since it was started"
					if readySince.IsZero() {
						readySince = time.Now()
					}
				}
			}
		}
		if ctx.Err() == nil {
			lastErr = err
		}
		switch {
		case err != nil:
			doing("waiting for the API server: %s", oneLine(err))
		default:
			doing("waiting for the node to be Ready: %s", last.Why)
		}
		if !sleep(ctx, readyPoll) {
			return last, notReady(ctx, node, last, lastErr)
		}
	}
}

func notReady(ctx context.Context, node string, s nodeState, err error) error {
	if errors.Is(ctx.Err(), context.Canceled) {
		return ctx.Err()
	}
	if s.Known {
		return fault.Passing(CodeNodeNotReady, err, "see `journalctl -u k3s -u k3s-agent`", "node %s is not Ready: %s", node, s.Why)
	}
	return fault.Passing(CodeNodeNotRegistered, err, "see `journalctl -u k3s -u k3s-agent`", "node %s did not register: %s", node, s.Why)
}
