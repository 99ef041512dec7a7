package api

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"k8s.io/client-go/kubernetes"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/access/kubeaccess"
	"github.com/hearth-sh/hearth/internal/deploy"
	"github.com/hearth-sh/hearth/internal/function"
	"github.com/hearth-sh/hearth/internal/function/clusterstore"
	"github.com/hearth-sh/hearth/internal/precompile"
	"github.com/hearth-sh/hearth/internal/publish"
	"github.com/hearth-sh/hearth/internal/submit"
)

// api is a running replica.
type api struct {
	o       Options
	log     *slog.Logger
	closers []func() error // run in reverse
	servers []*http.Server

	public, secure, probes net.Listener

	client      kubernetes.Interface
	certificate *certificate
	store       *clusterstore.Store
	known       atomic.Pointer[clusterstore.Store] // store, for who may come before it
	cluster     *deploy.Cluster
	submit      atomic.Pointer[submit.Server] // nil until everything is prepared
	queue       atomic.Pointer[queue]         // of the leader's term; nil otherwise
	metrics     *dutyMetrics

	// waiting is why the replica does not serve yet, stopping that it is about
	// to end.
	waiting  atomic.Pointer[error]
	stopping atomic.Bool
}

func (a *api) close() error {
	var errs []error
	for i := len(a.closers) - 1; i >= 0; i-- {
		if err := a.closers[i](); err != nil && !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	a.closers = nil
	return errors.Join(errs...)
}

// listen takes the ports first: one that is in use is a person's to settle.
func (a *api) listen(ctx context.Context) error {
	for _, l := range []struct {
		address, flag string
		to            *net.Listener
	}{{a.o.Listen, "--listen", &a.public}, {a.o.TLSListen, "--tls-listen", &a.secure}, {a.o.HTTPListen, "--http-listen", &a.probes}} {
		if l.address == "" {
			continue
		}
		listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", l.address)
		if err != nil {
			return fmt.Errorf("listen on %s: %w; choose another address with %s", l.address, err, l.flag)
		}
		a.closers = append(a.closers, listener.Close)
		*l.to = listener
	}
	return nil
}

func (a *api) server(group *errgroup.Group, name string, listener net.Listener, handler http.Handler) {
	server := &http.Server{
		Handler:           handler,
		ReadHeaderTimeout: readHeaderDeadline,
		IdleTimeout:       idleDeadline,
		ErrorLog:          slog.NewLogLogger(a.log.Handler(), slog.LevelDebug),
	}
	a.servers = append(a.servers, server)
	group.Go(func() error {
		if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("serve %s: %w", name, err)
		}
		return nil
	})
}

// serveProbes answers before there is anything else: a replica that waits for
// the API server lives, and says what it waits for.
func (a *api) serveProbes(group *errgroup.Group) {
	if a.probes == nil {
		return
	}
	mux := http.NewServeMux()
	answer := func(w http.ResponseWriter, r *http.Request) {
		if s := a.submit.Load(); s != nil && (r.URL.Path != "/readyz" || !a.stopping.Load()) {
			s.Handler().ServeHTTP(w, r)
			return
		}
		switch {
		case r.URL.Path == "/livez":
			fmt.Fprintln(w, "ok")
		case a.stopping.Load():
			http.Error(w, "stopping", http.StatusServiceUnavailable)
		default:
			reason := "starting"
			if why := a.waiting.Load(); why != nil {
				reason = "starting: " + (*why).Error()
			}
			http.Error(w, reason, http.StatusServiceUnavailable)
		}
	}
	for _, path := range []string{"/livez", "/readyz", "/metrics"} {
		mux.HandleFunc("GET "+path, answer)
	}
	a.server(group, "probes", a.probes, mux)
}

// prepare makes everything that serving needs.
func (a *api) prepare(ctx context.Context, group *errgroup.Group) error {
	var err error
	if a.client, err = clientFor(a.o.Config); err != nil {
		return err
	}
	a.certificate = &certificate{client: a.client, namespace: a.o.Namespace, now: time.Now, log: a.log}
	if err := a.untilDone(ctx, "the API's certificate", a.certificate.Ensure); err != nil {
		return err
	}
	if a.cluster, err = deploy.NewCluster(deploy.Options{
		Config: a.o.Config, Namespace: a.o.Namespace, Settings: a.o.Deploy, Logger: a.log,
	}); err != nil {
		return err
	}
	group.Go(func() error { return a.cluster.Run(ctx, a.notify()) })
	if err := a.untilDone(ctx, "the cluster's Ingresses", func(ctx context.Context) error {
		bounded, cancel := context.WithTimeout(ctx, time.Minute)
		defer cancel()
		return a.cluster.WaitSynced(bounded)
	}); err != nil {
		return err
	}
	admission := newAdmission(func() admitter {
		if server := a.submit.Load(); server != nil {
			return server
		}
		return nil
	})
	if err := a.untilDone(ctx, "the cluster's functions", func(ctx context.Context) error {
		a.store, err = clusterstore.New(ctx, clusterstore.Options{
			Config: a.o.Config, Namespace: a.o.Namespace, Instance: a.o.Instance,
			Host: a.host, BaseDomain: a.baseDomain, Logger: a.log,
			Admission: admission, Audit: a.log.With("audit", true),
		})
		return err
	}); err != nil {
		return err
	}
	a.closers = append(a.closers, a.store.Close, admission.close)
	a.known.Store(a.store)
	return a.prepareSubmit(ctx)
}

func (a *api) prepareSubmit(ctx context.Context) error {
	access, err := kubeaccess.New(kubeaccess.Options{
		Tokens: a.client.AuthenticationV1(), Rights: a.client.AuthorizationV1(), Logger: a.log,
		Agent: "system:serviceaccount:" + a.o.Namespace + ":hearth-nodeagent",
	})
	if err != nil {
		return err
	}
	publisher, err := a.publisher(ctx)
	if err != nil {
		return err
	}
	metrics := newMetrics()
	if a.metrics, err = newDutyMetrics(metrics); err != nil {
		return err
	}
	compiler := precompile.NewCompiler(precompile.CompilerOptions{Command: a.o.CheckCommand, Concurrency: checkConcurrency, Logger: a.log})
	server, err := submit.New(submit.Options{
		Store: a.store,
		Checker: publish.Remember(publish.NewChecker(compiler), publish.RememberOptions{
			// The pod's disk: a container that is started again remembers.
			File: filepath.Join(a.o.TempDir, "checks.json"), Build: a.o.Build, Logger: a.log,
		}),
		Publisher: publisher,
		Logs:      &engineLogs{client: a.client, namespace: a.o.Namespace, log: a.log, tenant: a.tenant},
		Health:    readiness{a},
		Access:    access,
		Quotas:    a.o.Quotas,
		Audit:     a.log.With("audit", true),
		Runtimes:  []v1alpha1.FunctionRuntime{v1alpha1.RuntimeResident, v1alpha1.RuntimeSpin},

		NodeAccess:  access.Node,
		NodeDesired: a.store.DesiredFor,

		URLs:       a.urls,
		Warnings:   a.warnings,
		BaseDomain: a.baseDomain(),
		Version:    a.o.Version,
		TempDir:    filepath.Join(a.o.TempDir, "uploads"),
		Logger:     a.log,
		Registerer: metrics,
		Gatherers:  func(context.Context) []prometheus.Gatherer { return []prometheus.Gatherer{metrics} },
	})
	if err != nil {
		return err
	}
	a.submit.Store(server)
	return nil
}

// serve opens the API's own listeners.
func (a *api) serve(group *errgroup.Group) {
	server := a.submit.Load()
	handler := server.Handler()
	public := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/livez", "/readyz", "/metrics":
			// For the cluster, on a port of their own; not for the internet.
			http.NotFound(w, r)
		default:
			handler.ServeHTTP(w, r)
		}
	})
	a.server(group, "the API", a.public, public)
	mux := http.NewServeMux()
	mux.Handle("/node/", server.NodeHandler())
	mux.Handle("/", public)
	a.server(group, "the API over TLS", tls.NewListener(a.secure, &tls.Config{
		MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}, GetCertificate: a.certificate.Get,
	}), mux)
}

// stop lets requests finish and ends everything.
func (a *api) stop(group *errgroup.Group) error {
	if server := a.submit.Load(); server != nil {
		server.Close() // long polls, followed logs and waits end now
	}
	ctx, cancel := context.WithTimeout(context.Background(), drainDeadline)
	defer cancel()
	for _, server := range a.servers {
		if err := server.Shutdown(ctx); err != nil {
			_ = server.Close()
		}
	}
	err := group.Wait()
	if errors.Is(err, context.Canceled) {
		err = nil
	}
	return errors.Join(err, a.close())
}

// host is a function's own host, empty while it cannot be known.
func (a *api) host(namespace, name string) string {
	host, err := a.cluster.Host(namespace, name)
	if err != nil {
		return ""
	}
	return host
}

func (a *api) baseDomain() string {
	base, err := a.cluster.BaseDomain()
	if err != nil {
		return ""
	}
	return base
}

// urls are where a function answers. There is no path form: paths of the base
// domain are nobody's in a cluster.
func (a *api) urls(name string) (string, string) {
	tenant, _ := a.tenant(context.Background(), name)
	url, err := a.cluster.URL(tenant, name)
	if err != nil {
		return "", ""
	}
	return url, ""
}

// warnings are what a function's owner is told beside its state: that a host
// does not lead to it, and what its runtime does not heed.
func (a *api) warnings(f function.Function) []v1alpha1.FunctionError {
	var out []v1alpha1.FunctionError
	s := f.Revision.Settings
	var err error
	if s.Runtime == v1alpha1.RuntimeSpin {
		_, err = a.cluster.Host(f.Tenant, f.Name) // the rest is said of its rollout
	} else {
		err = a.cluster.Unreached(deploy.Resident{Namespace: f.Tenant, Name: f.Name, Host: s.Host})
	}
	if err != nil {
		out = append(out, *deploy.FunctionError(err))
	}
	if w := function.TimeoutIgnored(s.Runtime, s.TimeoutMS); w != nil {
		out = append(out, *w)
	}
	return out
}

func (a *api) tenant(ctx context.Context, function string) (string, error) {
	f, err := a.store.Get(ctx, function)
	return f.Tenant, err
}

// readiness is what this replica needs to do its work: its certificate and
// what it knows of the cluster. An API server that is away makes no replica
// unready: all would be, and reads are answered from what is known.
type readiness struct{ a *api }

// Ready implements submit.Health.
func (r readiness) Ready(context.Context) []submit.Check {
	checks := []submit.Check{{Name: "functions", OK: true}, {Name: "certificate", OK: true}, {Name: "base-domain", OK: true}}
	if _, err := r.a.cluster.BaseDomain(); err != nil {
		// Said, and no reason to refuse submits.
		checks[2].Message = err.Error()
	}
	return checks
}

// nowhere is the publisher of a cluster without a registry for uploads; it
// fetches all the same.
type nowhere struct{ *publish.Publisher }

// Publish implements submit.Publisher.
func (n nowhere) Publish(ctx context.Context, name, path, digest string, meta submit.ArtifactMeta) (v1alpha1.Artifact, error) {
	return n.PublishFor(ctx, "", name, path, digest, meta)
}

// PublishFor implements submit.TenantPublisher.
func (nowhere) PublishFor(context.Context, string, string, string, string, submit.ArtifactMeta) (v1alpha1.Artifact, error) {
	return v1alpha1.Artifact{}, &submit.PublishError{
		Code:   "registry-unavailable",
		Detail: "This cluster was not told where to publish functions: set the chart's api.registry, or submit the reference of an image that is in a registry already.",
	}
}
