//go:build !local

package main

import (
	"encoding/json"
	"fmt"
	"os"
	"time"

	"github.com/urfave/cli/v2"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"

	"github.com/hearth-sh/hearth/internal/api"
	"github.com/hearth-sh/hearth/internal/command"
	"github.com/hearth-sh/hearth/internal/deploy"
	"github.com/hearth-sh/hearth/internal/imds"
	"github.com/hearth-sh/hearth/internal/sandbox"
	"github.com/hearth-sh/hearth/internal/submit"
)

func apiCommand() *cli.Command {
	return &cli.Command{
		Name:     "api",
		Category: "services",
		Usage:    "run the submit API of a cluster, and as one of its replicas the controller of its functions",
		Description: "Started by the Deployment hearth-api. Everything it knows is in the cluster: any number of replicas are one, and one that is killed loses nothing. " +
			"Callers come with a token of the cluster whose audience is hearth.sh, and may do with functions what their roles allow.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "listen", Usage: "`ADDRESS` on which the API is served over HTTP, for an Ingress", Value: ":8080", EnvVars: []string{"HEARTH_API_LISTEN"}},
			&cli.StringFlag{Name: "tls-listen", Usage: "`ADDRESS` on which it is served over HTTPS, for agents and command lines", Value: ":8443", EnvVars: []string{"HEARTH_API_TLS_LISTEN"}},
			&cli.StringFlag{Name: "http-listen", Usage: "`ADDRESS` on which /livez, /readyz and /metrics answer; empty for none", Value: ":9642", EnvVars: []string{"HEARTH_API_HTTP_LISTEN"}},
			&cli.StringFlag{Name: "namespace", Usage: "Hearth's own namespace", Value: "hearth-system", EnvVars: []string{"POD_NAMESPACE"}},
			&cli.StringFlag{Name: "instance", Usage: "`NAME` that no other replica has (default: the host's)", EnvVars: []string{"POD_NAME"}},
			&cli.StringFlag{Name: "kubeconfig", Usage: "`FILE` that says how to reach the cluster (default: as a pod of it)", EnvVars: []string{"HEARTH_KUBECONFIG"}},
			&cli.StringFlag{Name: "temp-dir", Usage: "where uploads are while they are worked on", Value: os.TempDir()},
			&cli.StringFlag{Name: "base-domain", Usage: "`DOMAIN` below which functions answer; empty: <ip>.nip.io with the address of the ingress controller's load balancer", EnvVars: []string{"HEARTH_BASE_DOMAIN"}},
			&cli.StringFlag{Name: "host-template", Usage: "the host of a function; {name}, {tenant} and {base} are replaced", Value: "{name}.{base}", EnvVars: []string{"HEARTH_HOST_TEMPLATE"}},
			&cli.StringFlag{Name: "ingress-class", Usage: "`CLASS` of the Ingresses that are made", Value: deploy.DefaultIngressClass, EnvVars: []string{"HEARTH_INGRESS_CLASS"}},
			&cli.StringFlag{Name: "ingress-annotations", Usage: "annotations of the Ingresses that are made, as a `JSON` object", EnvVars: []string{"HEARTH_INGRESS_ANNOTATIONS"}},
			&cli.StringFlag{Name: "registry", Usage: "`HOST[:PORT][/PREFIX]` where uploaded functions are published; empty: only images that are in a registry already can be submitted", EnvVars: []string{"HEARTH_REGISTRY"}},
			&cli.BoolFlag{Name: "registry-plain-http", Usage: "speak HTTP without TLS to --registry", EnvVars: []string{"HEARTH_REGISTRY_PLAIN_HTTP"}},
			registryConfigFlag(),
			&cli.StringFlag{Name: "spin-pull-secret", Usage: "`NAME` of the Secret with which pods of spin functions pull their images, in each tenant's namespace, where whoever runs the cluster puts it; empty: nodes have credentials of their own, as for ECR", EnvVars: []string{"HEARTH_SPIN_PULL_SECRET"}},
			&cli.StringFlag{Name: "imds", Usage: "ask the EC2 instance metadata service for the credentials of ECR: on, off, or auto (on where one answers at start)", Value: "auto", EnvVars: []string{"HEARTH_IMDS"}},
			&cli.IntFlag{Name: "quota-functions", Usage: "how many functions one tenant may have (0: no limit)", Value: 100, EnvVars: []string{"HEARTH_QUOTA_FUNCTIONS"}},
			&cli.Int64Flag{Name: "quota-mib", Usage: "`MIB` of all wanted modules of one tenant (0: no limit)", Value: 1024, EnvVars: []string{"HEARTH_QUOTA_MIB"}},
			&cli.Float64Flag{Name: "quota-changes", Usage: "changes that one tenant may make a second, on average (0: no limit)", Value: 5, EnvVars: []string{"HEARTH_QUOTA_CHANGES"}},
			&cli.Float64Flag{Name: "quota-requests", Usage: "requests of all kinds that one tenant may make a second of each replica, on average (0: no limit)", Value: submit.DefaultQuotaRequests, EnvVars: []string{"HEARTH_QUOTA_REQUESTS"}},
			&cli.DurationFlag{Name: "stale-after", Usage: "how long the heartbeat of a node's agent may be missing before what it said of the node is taken back (default: 3m30s)", EnvVars: []string{"HEARTH_STALE_AFTER"}, Action: checkStaleAfter},
			command.LogLevelFlag("info"),
		},
		Action: apiAction,
	}
}

// checkStaleAfter refuses what would take back the word of agents that live: the
// shortest heartbeat is two seconds, and a busy node is late.
func checkStaleAfter(_ *cli.Context, value time.Duration) error {
	const least, most = 10 * time.Second, 24 * time.Hour
	if value < least || value > most {
		return cli.Exit(fmt.Sprintf("--stale-after %s is not between %s and %s; three heartbeats of the agents and half a minute suit most", value, least, most), exitUsage)
	}
	return nil
}

func apiAction(c *cli.Context) error {
	logger, err := command.Logger(c)
	if err != nil {
		return err
	}
	var config *rest.Config
	if file := c.String("kubeconfig"); file != "" {
		config, err = clientcmd.BuildConfigFromFlags("", file)
	} else {
		config, err = rest.InClusterConfig()
	}
	if err != nil {
		return cli.Exit(fmt.Sprintf("cannot tell how to reach the cluster: %v; run it as the Deployment of the chart does, or give --kubeconfig", err), exitUsage)
	}
	// The libraries of Kubernetes speak through it: one log, one form.
	klog.SetSlogLogger(logger)
	config.UserAgent = "hearth-api/" + buildVersion()
	instance := c.String("instance")
	if instance == "" {
		if instance, err = os.Hostname(); err != nil {
			return fmt.Errorf("find the host's name: %w; give --instance", err)
		}
	}
	var annotations map[string]string
	if text := c.String("ingress-annotations"); text != "" {
		if err := json.Unmarshal([]byte(text), &annotations); err != nil {
			return cli.Exit(fmt.Sprintf("--ingress-annotations is not a JSON object of texts: %v", err), exitUsage)
		}
	}
	template, err := deploy.ParseHostTemplate(c.String("host-template"))
	if err != nil {
		return cli.Exit("--host-template: "+err.Error(), exitUsage)
	}
	var metadata *imds.Client
	if c.String("registry") != "" {
		if metadata, err = metadataClient(c, kubernetesInCluster, logger); err != nil {
			return err
		}
		if metadata != nil {
			defer metadata.Close()
		}
	}
	var pullSecrets []string
	if name := c.String("spin-pull-secret"); name != "" {
		pullSecrets = []string{name}
	}
	quota := submit.Quota{
		Functions: noLimit(c.Int("quota-functions")), Bytes: noLimit(c.Int64("quota-mib") << 20),
		Rate: noLimit(c.Float64("quota-changes")), Requests: noLimit(c.Float64("quota-requests")),
	}
	return api.Run(c.Context, api.Options{
		Config: config, Namespace: c.String("namespace"), Instance: instance,
		Listen: c.String("listen"), TLSListen: c.String("tls-listen"), HTTPListen: c.String("http-listen"),
		TempDir: c.String("temp-dir"),
		Deploy: deploy.Settings{
			BaseDomain: c.String("base-domain"), HostTemplate: template,
			IngressClass: c.String("ingress-class"), IngressAnnotations: annotations,
			ImagePullSecrets: pullSecrets,
		},
		Registry: c.String("registry"), RegistryPlainHTTP: c.Bool("registry-plain-http"), RegistryConfig: c.String("registry-config"), Metadata: metadata,
		Quotas: &submit.Quotas{Default: quota}, StaleAfter: c.Duration("stale-after"),
		CheckCommand: []string{sandbox.Executable(), "precompile"}, Build: executableBuild(), Version: buildVersion(), Logger: logger,
	})
}

// executableBuild tells builds apart that have the same version, as those from
// source have.
func executableBuild() string {
	build := buildVersion()
	if info, err := os.Stat(sandbox.Executable()); err == nil {
		build += fmt.Sprintf(" %d %d", info.Size(), info.ModTime().UnixNano())
	}
	return build
}

// noLimit is a quota's way to say what a flag says with 0.
func noLimit[T int | int64 | float64](v T) T {
	if v == 0 {
		return -1
	}
	return v
}
