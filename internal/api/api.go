package api

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/sync/errgroup"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/hearth-sh/hearth/internal/deploy"
	"github.com/hearth-sh/hearth/internal/ecr"
	"github.com/hearth-sh/hearth/internal/imds"
	"github.com/hearth-sh/hearth/internal/publish"
	"github.com/hearth-sh/hearth/internal/registry"
	"github.com/hearth-sh/hearth/internal/submit"
)

const (
	// serviceName is the Service of the replicas.
	serviceName = "hearth-api"
	// fieldManager is who writes, in the API server's books.
	fieldManager = "hearth-api"

	// readHeaderDeadline and idleDeadline bound connections; an agent's long
	// poll is asked for and answered well within the latter.
	readHeaderDeadline = 10 * time.Second
	idleDeadline       = 2 * time.Minute
	// drainDeadline is for requests that are being answered when the replica
	// is told to stop; the pod has 30 s.
	drainDeadline = 20 * time.Second
	// farewell is how long the replica goes on answering new connections after
	// it was told to stop: endpoints take a moment to be told of.
	farewell = 2 * time.Second
	// startPause is between attempts while the API server does not answer.
	startPause = 2 * time.Second
	// checkConcurrency is how many modules are checked at once.
	checkConcurrency = 2
	// noRegistry is a name that resolves nowhere (RFC 6761).
	noRegistry = "registry.invalid"
	// Requests of this process's own clients; reviews and logs.
	clientQPS   = 100
	clientBurst = 200
)

// Options say where and how to run. Config, Namespace, Instance, Listen,
// TLSListen and CheckCommand are required.
type Options struct {
	// Config reaches the API server.
	Config *rest.Config
	// Namespace is Hearth's own, Instance this replica's name in it: the pod's.
	Namespace, Instance string
	// Listen serves the API over HTTP for an Ingress, TLSListen over HTTPS for
	// agents and command lines, HTTPListen probes and metrics (empty: nowhere).
	Listen, TLSListen, HTTPListen string
	// TempDir holds uploads while they are worked on.
	TempDir string
	// Deploy says how functions are reached.
	Deploy deploy.Settings
	// Registry is where functions are published: HOST[:PORT][/PREFIX]. Empty:
	// nowhere, only images that are in a registry already can be submitted.
	Registry          string
	RegistryPlainHTTP bool
	// RegistryConfig is a file of credentials for registries as
	// registry.ConfigKeychain takes it, read for each use; empty: those of this
	// process's user.
	RegistryConfig string
	// Metadata is where the instance's role gets credentials for ECR; nil: not
	// an EC2 instance, or not to be asked.
	Metadata *imds.Client
	// Quotas bound what a tenant may take; nil: nothing does.
	Quotas *submit.Quotas
	// StaleAfter is how long a node's heartbeat may be missing; 0: the default
	// of package node.
	StaleAfter time.Duration
	// CheckCommand starts a child that checks a module, Build names what it is:
	// what another one said of a module is not believed.
	CheckCommand []string
	Build        string
	Version      string
	Logger       *slog.Logger
}

// Run serves until ctx ends, then lets requests finish and returns nil. An API
// server that does not answer at the start is waited for.
func Run(ctx context.Context, o Options) error {
	a := &api{o: o, log: o.Logger}
	group, groupCtx := errgroup.WithContext(ctx)
	if err := a.listen(groupCtx); err != nil {
		return errors.Join(err, a.close())
	}
	// Probes are answered from the first moment: starting is alive.
	a.serveProbes(group)
	if err := a.prepare(groupCtx, group); err != nil {
		if ctx.Err() != nil {
			err = nil // told to stop while starting
		}
		return errors.Join(err, a.stop(group))
	}
	a.serve(group)
	group.Go(func() error { a.certificate.Run(groupCtx); return nil })
	group.Go(func() error {
		return lead(groupCtx, a.client, o.Namespace, o.Instance, o.Logger, a.duties)
	})
	a.log.Info("serving", "http", a.public.Addr().String(), "https", a.secure.Addr().String(), "registry", o.Registry)
	<-groupCtx.Done()
	if ctx.Err() != nil {
		a.stopping.Store(true)
		pause(context.WithoutCancel(ctx), farewell)
	}
	return a.stop(group)
}

// ownLabels mark what Hearth made.
func ownLabels() map[string]string {
	return map[string]string{"app.kubernetes.io/managed-by": fieldManager}
}

// clientFor is this process's own client of the API server.
func clientFor(config *rest.Config) (kubernetes.Interface, error) {
	config = rest.CopyConfig(config)
	config.QPS, config.Burst = clientQPS, clientBurst
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("make a client of the API server: %w", err)
	}
	return client, nil
}

// untilDone tries again while ctx lasts: an API server that is away, or objects
// of the chart that come after this pod, are waited for.
func (a *api) untilDone(ctx context.Context, what string, try func(context.Context) error) error {
	for {
		err := try(ctx)
		if err == nil || ctx.Err() != nil {
			return err
		}
		a.waiting.Store(&err)
		a.log.Warn("waiting", "for", what, "error", err)
		pause(ctx, startPause)
	}
}

// publisher is where uploads go, and who makes the way.
func (a *api) publisher(ctx context.Context) (submit.Publisher, error) {
	host, prefix, _ := strings.Cut(a.o.Registry, "/")
	if a.o.Registry == "" {
		host = noRegistry
	}
	var keychain authn.Keychain = authn.DefaultKeychain
	if a.o.RegistryConfig != "" {
		keychain = registry.ConfigKeychain(a.o.RegistryConfig)
	}
	options := registry.ClientOptions{
		Registry: host, PlainHTTP: a.o.RegistryPlainHTTP, Logger: a.log,
		Keychain: keychain, RegistryKeychain: keychain,
	}
	target := publish.Options{RepositoryPrefix: strings.TrimSuffix(prefix, "/") + "/", Tenants: true, DigestTags: true, Located: true}
	if prefix == "" {
		target.RepositoryPrefix = publish.DefaultPrefix
	}
	if _, isECR := ecr.ParseHost(host); isECR {
		if a.o.Metadata == nil {
			return nil, fmt.Errorf("the registry %s is ECR, whose credentials come from the instance's role, and instance metadata does not answer this pod: raise the instance's hop limit to 2, or set api.hostNetwork", host)
		}
		tokens, err := ecr.New(ctx, ecr.Options{Metadata: a.o.Metadata, Logger: a.log})
		if err != nil {
			return nil, err
		}
		a.closers = append(a.closers, func() error { tokens.Close(); return nil })
		keychain = authn.NewMultiKeychain(tokens.Keychain(), keychain)
		options.Keychain, options.RegistryKeychain, options.Rejected = keychain, keychain, tokens.Rejected
		if target.Repositories, err = tokens.Repositories(ecr.RepositoryOptions{}); err != nil {
			return nil, err
		}
		target.Alias = func(other string) bool { return ecr.SameRegistry(host, other) }
	}
	client, err := registry.NewClient(options)
	if err != nil {
		return nil, err
	}
	a.closers = append(a.closers, func() error { client.Close(); return nil })
	target.Client = client
	publisher, err := publish.NewPublisher(target)
	if err != nil {
		return nil, err
	}
	if a.o.Registry == "" {
		return nowhere{publisher}, nil
	}
	return publisher, nil
}

// newMetrics are this process's, with what every Go process says of itself.
func newMetrics() *prometheus.Registry {
	metrics := prometheus.NewRegistry()
	own := prometheus.WrapRegistererWith(prometheus.Labels{"process": "api"}, metrics)
	own.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return metrics
}
