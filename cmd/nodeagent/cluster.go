//go:build !local

package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/hearth-sh/hearth/internal/agent"
	"github.com/hearth-sh/hearth/internal/clusternode"
	"github.com/hearth-sh/hearth/internal/imds"
	"github.com/hearth-sh/hearth/internal/kube"
	"github.com/hearth-sh/hearth/internal/node"
)

// clusterCommands are those that a build for one machine does not have.
func clusterCommands() []*cli.Command { return []*cli.Command{apiCommand(), simulateCommand()} }

// clusterOptions decides whether this machine is a node of a cluster; nil when
// it is not.
func clusterOptions(c *cli.Context, nodeName string, logger *slog.Logger) (func(agent.ClusterParts) (agent.ClusterNode, error), error) {
	if err := node.CheckHeartbeat(c.Duration("heartbeat")); err != nil {
		return nil, cli.Exit("--heartbeat: "+err.Error(), exitUsage)
	}
	mode, file := c.String("kubernetes"), c.String("kubeconfig")
	switch mode {
	case kubernetesAuto:
		switch {
		case c.String("api-socket") != "" && !c.IsSet("kubernetes"):
			mode = kubernetesOff // one machine: the API says what should be here
		case os.Getenv("KUBERNETES_SERVICE_HOST") != "":
			mode = kubernetesInCluster
		case file != "":
			mode = kubernetesKubeconfig
		default:
			mode = kubernetesOff
			if file = firstFile(kubeletKubeconfigs); file != "" {
				mode = kubernetesKubeconfig
			}
		}
	case kubernetesKubeconfig:
		if file == "" {
			file = firstFile(kubeletKubeconfigs)
		}
		if file == "" {
			return nil, cli.Exit("no kubelet's kubeconfig is where k3s, RKE2 or kubeadm keep it; give --kubeconfig", exitUsage)
		}
	case kubernetesInCluster, kubernetesOff:
	default:
		return nil, cli.Exit(fmt.Sprintf("--kubernetes %q is not in-cluster, kubeconfig, auto or off", mode), exitUsage)
	}
	metadata, err := metadataClient(c, mode, logger)
	if err != nil || mode == kubernetesOff {
		return nil, err
	}
	o := kube.Options{UserAgent: "hearth-nodeagent/" + buildVersion(), TainterKubeconfig: c.String("tainter-kubeconfig")}
	var clients *kube.Clients
	if mode == kubernetesInCluster {
		clients, err = kube.InCluster(nodeName, o)
	} else {
		clients, err = kube.FromKubeconfig(file, nodeName, o)
	}
	if err != nil {
		return nil, err
	}
	return clusternode.New(clusternode.Options{
		Clients: clients, Namespace: c.String("namespace"), Pod: c.String("pod-name"),
		ContainerdSocket: c.String("containerd-socket"), HostRoot: c.String("host-root"),
		Metadata: metadata, DrainOnRebalance: c.Bool("drain-on-rebalance"), Heartbeat: c.Duration("heartbeat"),
		ShimInterval: c.Duration("shim-interval"), NoticeInterval: c.Duration("imds-interval"),
	}), nil
}

// metadataProbe bounds the question whether there is instance metadata at all.
const metadataProbe = 3 * time.Second

// metadataClient returns nil where there is nobody to ask.
func metadataClient(c *cli.Context, mode string, logger *slog.Logger) (*imds.Client, error) {
	ask := c.String("imds")
	switch {
	case ask != "auto" && ask != "on" && ask != "off":
		return nil, cli.Exit(fmt.Sprintf("--imds %q is not on, off or auto", ask), exitUsage)
	case ask == "off" || mode == kubernetesOff:
		return nil, nil
	}
	client, err := imds.New(imds.Options{Logger: logger})
	if err != nil {
		return nil, err
	}
	if ask == "on" {
		return client, nil
	}
	ctx, cancel := context.WithTimeout(c.Context, metadataProbe)
	defer cancel()
	if _, err := client.Identity(ctx); err != nil {
		// An instance whose service is broken is worth a warning; a machine
		// that is no instance is not, and looks the same from here.
		logger.Info("no instance metadata: notices of interruption cannot be heard here; --imds=on insists", "err", err)
		client.Close()
		return nil, nil
	}
	return client, nil
}
