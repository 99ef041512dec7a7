//go:build local

package main

import (
	"log/slog"

	"github.com/urfave/cli/v2"

	"github.com/hearth-sh/hearth/internal/agent"
)

// A build with the tag "local" is for one machine: it has everything that
// `nodeagent dev` starts and none of the clients of Kubernetes, containerd and
// AWS, which are four fifths of what a first build compiles.

func clusterCommands() []*cli.Command { return nil }

// clusterOptions refuses what this build cannot do.
func clusterOptions(c *cli.Context, _ string, _ *slog.Logger) (func(agent.ClusterParts) (agent.ClusterNode, error), error) {
	switch mode := c.String("kubernetes"); mode {
	case kubernetesOff:
	case kubernetesAuto:
		if c.String("api-socket") == "" {
			return nil, cli.Exit("this nodeagent was built for one machine; on a node of a cluster use one from `make build` or a package, or say --kubernetes=off", exitUsage)
		}
	default:
		return nil, cli.Exit("this nodeagent was built for one machine and cannot do --kubernetes="+mode+"; use one from `make build` or a package", exitUsage)
	}
	return nil, nil
}

func (d *doctor) nodeChecks() []doctorCheck { return nil }
