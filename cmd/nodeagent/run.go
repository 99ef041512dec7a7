package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/hearth-sh/hearth/internal/agent"
	"github.com/hearth-sh/hearth/internal/command"
	"github.com/hearth-sh/hearth/internal/paths"
	"github.com/hearth-sh/hearth/internal/sandbox"
)

func storeBudgetFlag() *cli.Int64Flag {
	return &cli.Int64Flag{
		Name:    "store-budget",
		Usage:   "`MIB` of disk for compiled functions; the least recently used that nothing needs go first",
		Value:   4096,
		EnvVars: []string{"HEARTH_STORE_BUDGET"},
		Action: func(_ *cli.Context, value int64) error {
			if value < 64 {
				return cli.Exit(fmt.Sprintf("--store-budget %d is too small to compile anything; give at least 64", value), exitUsage)
			}
			return nil
		},
	}
}

// registryConfigFlag names the credentials that are not ECR's.
func registryConfigFlag() *cli.StringFlag {
	return &cli.StringFlag{
		Name:    "registry-config",
		Usage:   "`FILE` of credentials for registries as docker login and Secrets of type kubernetes.io/dockerconfigjson have them, read anew for each use; ECR's come from the instance's role (default: those of this user)",
		EnvVars: []string{"HEARTH_REGISTRY_CONFIG"},
	}
}

// intervalFlag is for what the agent looks at again and again: often enough to
// be of use, and not so often that it is all the agent does.
func intervalFlag(name, variable string, value time.Duration, usage string) *cli.DurationFlag {
	const least, most = time.Second, time.Minute
	return &cli.DurationFlag{
		Name: name, Usage: usage + ", 1s to 1m", Value: value, EnvVars: []string{variable},
		Action: func(_ *cli.Context, value time.Duration) error {
			if value < least || value > most {
				return cli.Exit(fmt.Sprintf("--%s %s is out of range; give at least %s and at most %s", name, value, least, most), exitUsage)
			}
			return nil
		},
	}
}

// How `nodeagent run` finds the API server.
const (
	kubernetesAuto       = "auto"
	kubernetesInCluster  = "in-cluster"
	kubernetesKubeconfig = "kubeconfig"
	kubernetesOff        = "off"
)

// kubeletKubeconfigs are where k3s, RKE2 and kubeadm keep the kubelet's.
var kubeletKubeconfigs = []string{
	"/var/lib/rancher/k3s/agent/kubelet.kubeconfig",
	"/var/lib/rancher/rke2/agent/kubelet.kubeconfig",
	"/etc/kubernetes/kubelet.conf",
}

func runCommand() *cli.Command {
	dataDir := paths.DataDir()
	return &cli.Command{
		Name:     "run",
		Category: "services",
		Usage:    "run the node agent: prove runtimes, pull, verify and compile, feed the engine, leave in time, report",
		Description: "Started by `nodeagent dev`, by the DaemonSet or by systemd. The agent is the only writer of the store and never runs a guest; " +
			"`nodeagent status` asks it how the node is. On a node of a cluster it proves each Wasm runtime by running a module through it, labels the node " +
			"accordingly, brings wanted images here, and empties the node before the machine goes.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "socket", Usage: "unix socket on which `nodeagent status` asks", Value: paths.AgentSocket(dataDir), EnvVars: []string{"HEARTH_SOCKET"}},
			&cli.StringFlag{Name: "api-socket", Usage: "unix socket of the submit API, which says which functions should be here; empty for none"},
			&cli.StringFlag{Name: "api-url", Usage: "`URL` of the cluster's API, https://hearth-api.hearth-system.svc:443; empty: the cluster's Functions are followed as they are, and nothing is reported", EnvVars: []string{"HEARTH_API_URL"}},
			&cli.StringFlag{Name: "api-token-file", Usage: "`FILE` of the token for --api-url, a projected ServiceAccount token of audience hearth.sh; read again when it changes", EnvVars: []string{"HEARTH_API_TOKEN_FILE"}},
			&cli.StringFlag{Name: "api-ca-file", Usage: "`FILE` of the certificates that sign that of --api-url (default: what ConfigMap hearth-api of --namespace says, outside a cluster the system's)", EnvVars: []string{"HEARTH_API_CA_FILE"}},
			&cli.StringFlag{Name: "engine-socket", Usage: "control socket of the engine; empty where there is none", Value: paths.EngineSocket(dataDir)},
			&cli.IntFlag{Name: "engine-user", Usage: "numeric `UID` that the directory of --engine-socket is given to, for an engine that is another user (0: leave it)", EnvVars: []string{"HEARTH_ENGINE_USER"}},
			&cli.StringFlag{Name: "registry", Usage: "`HOST:PORT` of the registry that artifacts without a host of their own are in, and that --registry-plain-http is about; needed with --api-socket", EnvVars: []string{"HEARTH_REGISTRY"}},
			&cli.BoolFlag{Name: "registry-plain-http", Usage: "speak HTTP without TLS to --registry", EnvVars: []string{"HEARTH_REGISTRY_PLAIN_HTTP"}},
			registryConfigFlag(),
			&cli.StringFlag{Name: "store-dir", Usage: "the store of compiled functions; this process is its only writer", Value: filepath.Join(dataDir, "store")},
			&cli.StringFlag{Name: "state-dir", Usage: "where the last instructions are kept for a start without the API", Value: filepath.Join(dataDir, "agent")},
			storeBudgetFlag(),
			&cli.StringFlag{Name: "node-name", Usage: "name of this node (default: the host's name)", EnvVars: []string{"NODE_NAME"}},
			&cli.StringFlag{Name: "http-listen", Usage: "`ADDRESS` on which /livez, /readyz and /metrics answer, such as :9640; empty for none", EnvVars: []string{"HEARTH_HTTP_LISTEN"}},
			&cli.StringFlag{Name: "kubernetes", Usage: "how to reach the API server: in-cluster (as a pod), kubeconfig, off, or auto (as a pod, else the kubelet's kubeconfig where it is known to be, else off)",
				Value: kubernetesAuto, EnvVars: []string{"HEARTH_KUBERNETES"}},
			&cli.StringFlag{Name: "kubeconfig", Usage: "`FILE` of the kubelet's identity, with --kubernetes=kubeconfig (default: k3s's, RKE2's or kubeadm's)", EnvVars: []string{"HEARTH_KUBECONFIG"}},
			&cli.StringFlag{Name: "tainter-kubeconfig", Usage: "`FILE` of an identity that may change this node's taints and read workloads, which a kubelet may not", EnvVars: []string{"HEARTH_TAINTER_KUBECONFIG"}},
			&cli.StringFlag{Name: "namespace", Usage: "namespace of this pod and of the ConfigMaps that list images", EnvVars: []string{"POD_NAMESPACE"}, Value: "hearth-system"},
			&cli.StringFlag{Name: "pod-name", Usage: "this pod, which leaves last when the node is emptied", EnvVars: []string{"POD_NAME"}},
			&cli.StringFlag{Name: "containerd-socket", Usage: "`PATH` of containerd's socket (default: k3s's, else /run/containerd/containerd.sock, whichever appears first)", EnvVars: []string{"HEARTH_CONTAINERD_SOCKET"}},
			&cli.StringFlag{Name: "host-root", Usage: "`DIR` at which the host's file system is seen", Value: "/", EnvVars: []string{"HEARTH_HOST_ROOT"}},
			&cli.StringFlag{Name: "imds", Usage: "ask the EC2 instance metadata service: on, off, or auto (on where one answers at start)", Value: "auto", EnvVars: []string{"HEARTH_IMDS"}},
			&cli.BoolFlag{Name: "drain-on-rebalance", Usage: "empty the node on a rebalance recommendation too, instead of only keeping new pods away", EnvVars: []string{"HEARTH_DRAIN_ON_REBALANCE"}},
			intervalFlag("shim-interval", "HEARTH_SHIM_INTERVAL", 15*time.Second, "how often containerd and the shims of this node are looked at for changes; what changed is proved again at once"),
			intervalFlag("imds-interval", "HEARTH_IMDS_INTERVAL", 5*time.Second, "how often the instance metadata service is asked for notices, and how long it may take to answer"),
			&cli.DurationFlag{Name: "heartbeat", Usage: "how often the agent says on the Node that it is there when nothing changes, 2s to 5m; --stale-after of the API must be more than three of them", Value: time.Minute, EnvVars: []string{"HEARTH_HEARTBEAT"}},
			command.LogLevelFlag("info"),
			lifelineFlag(),
		},
		Action: runAction,
	}
}

func runAction(c *cli.Context) error {
	logger, err := command.Logger(c)
	if err != nil {
		return err
	}
	if err := holdLifeline(c); err != nil {
		return err
	}
	name := c.String("node-name")
	if name == "" {
		if name, err = os.Hostname(); err != nil {
			return fmt.Errorf("find the host's name: %w; give --node-name", err)
		}
	}
	if c.String("api-socket") != "" && c.String("registry") == "" {
		return cli.Exit("--api-socket needs --registry: say where artifacts without a host of their own are", exitUsage)
	}
	if c.String("api-socket") != "" && c.String("api-url") != "" {
		return cli.Exit("--api-socket is for one machine, --api-url for a cluster; give one of them", exitUsage)
	}
	if url := c.String("api-url"); url != "" {
		if !strings.HasPrefix(url, "https://") {
			return cli.Exit("--api-url "+url+" is not https://…: a token goes nowhere else", exitUsage)
		}
		if c.String("api-token-file") == "" {
			return cli.Exit("--api-url needs --api-token-file: the API answers nodes only", exitUsage)
		}
	}
	cluster, err := clusterOptions(c, name, logger)
	if err != nil {
		return err
	}
	return agent.Run(c.Context, agent.Options{
		Node:              name,
		Socket:            c.String("socket"),
		APISocket:         c.String("api-socket"),
		APIURL:            c.String("api-url"),
		APITokenFile:      c.String("api-token-file"),
		APICAFile:         c.String("api-ca-file"),
		EngineSocket:      c.String("engine-socket"),
		EngineUser:        c.Int("engine-user"),
		Registry:          c.String("registry"),
		RegistryPlainHTTP: c.Bool("registry-plain-http"),
		RegistryConfig:    c.String("registry-config"),
		StoreDir:          c.String("store-dir"),
		StateDir:          c.String("state-dir"),
		StoreBudgetBytes:  c.Int64("store-budget") << 20,
		CompilerCommand:   []string{sandbox.Executable(), "precompile"},
		HTTPListen:        c.String("http-listen"),
		Cluster:           cluster,
		Version:           buildVersion(),
		Logger:            logger,
	})
}

func firstFile(files []string) string {
	for _, f := range files {
		if info, err := os.Stat(f); err == nil && info.Mode().IsRegular() {
			return f
		}
	}
	return ""
}
