package main

import (
	"context"
	"fmt"
	"slices"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/paths"
)

// nodeDataDir is where the units and the chart keep the agent's data.
const nodeDataDir = "/var/lib/hearth"

// nodeOptions are what doctor looks at on a node of a cluster.
type nodeOptions struct {
	hostRoot         string
	containerdSocket string
	kubeconfig       string
	tainter          bool // whether the agent has an identity for taints
	// imds is on, off or auto.
	imds string
	// inPod is whether this process is in a pod.
	inPod bool
	// nodeName is the node's; empty: the agent's word, or the host's name.
	nodeName string
}

// isCluster says whether this machine is a node of a cluster, as far as can be
// seen without the cluster.
func (d *doctor) isCluster() bool {
	if d.status != nil {
		return len(d.status.Runtimes) > 0 || d.status.Images != nil ||
			slices.ContainsFunc(d.status.Checks, func(c v1alpha1.Check) bool { return c.Code == "kubernetes" })
	}
	return d.system && (d.node.inPod || d.node.kubeconfig != "")
}

// failingChecks explains what the agent says is wrong, unless a check of
// doctor's own has a closer look.
func (d *doctor) failingChecks(known []doctorCheck) []doctorCheck {
	if d.status == nil {
		return nil
	}
	var checks []doctorCheck
	for _, c := range d.status.Checks {
		own := slices.ContainsFunc(known, func(k doctorCheck) bool { return k.code == c.Code })
		if c.State != v1alpha1.CheckFailing || c.CausedBy != "" || own {
			continue
		}
		checks = append(checks, doctorCheck{c.Code, "the agent watches it all the time", func(context.Context) finding {
			remedy := c.Remedy
			if remedy == "" {
				remedy = "`nodeagent status` and the agent's log say more"
			}
			if c.Severity == v1alpha1.SeverityCritical {
				return broken(remedy, "%s", c.Message)
			}
			return warning(remedy, "%s", c.Message)
		}})
	}
	return checks
}

// systemDataDir is where the agent keeps its data if it is a service of the
// machine, by systemd or in a pod, which the place of its socket tells.
func systemDataDir(socket string) (string, bool) {
	if socket == paths.NodeAgentSocket {
		return nodeDataDir, true
	}
	return "", false
}

// startRemedy says how to start an agent that is not there.
func (d *doctor) startRemedy() string {
	if d.system {
		return "start it with `systemctl start hearth-nodeagent`, or look at its pod: kubectl -n hearth-system get pods -o wide"
	}
	return "start it with `nodeagent dev`, or say where it is with --socket or --data-dir"
}

// restartRemedy says what to do about an agent that does not answer.
func (d *doctor) restartRemedy() string {
	if d.system {
		return fmt.Sprintf("see its log (`journalctl -u hearth-nodeagent`, or kubectl -n hearth-system logs), then restart it; --socket says which agent is meant (now %s)", d.socket)
	}
	return "restart nodeagent; its log says why it stopped"
}
