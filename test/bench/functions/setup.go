package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/client"
	"github.com/hearth-sh/hearth/test/bench/report"
	"github.com/hearth-sh/hearth/test/chart"
	"github.com/hearth-sh/hearth/test/cluster"
	"github.com/hearth-sh/hearth/test/cluster/ingress"
	"github.com/hearth-sh/hearth/test/guests"
)

const (
	class   = "traefik" // the chart's default
	toolbox = "hearth.test/toolbox:bench"
	// soon bounds waits for what takes seconds; the machine may be busy.
	soon = 3 * time.Minute
	// askEvery is between two looks at a URL that does not answer yet: what is
	// measured is late by half of it.
	askEvery = 5 * time.Millisecond
	// tokenLifetime is that of the token of a run, in seconds.
	tokenLifetime = 2 * 3600
)

var nodes = []string{"node-a", "node-b", "node-c"}

// bench is one run.
type bench struct {
	options
	table    report.Table
	cluster  *cluster.Cluster
	registry *cluster.Registry
	front    *ingress.Controller
	visitor  *http.Client
	apis     []*client.Client // one per replica
	next     atomic.Int64     // of apis
	retries  atomic.Int64     // of calls of the API
	hello    []byte           // a guest that can be marked
	marks    atomic.Int64     // given to guests
	base     string           // domain of functions
}

// SetUp starts the cluster with the chart on it.
func (b *bench) SetUp(ctx context.Context) (err error) {
	if err := cluster.Check(); err != nil {
		return err
	}
	if min(b.submits, b.concurrent, b.tenants, b.reads) < 1 || b.functions <= few {
		return fmt.Errorf("there must be at least one of everything, and more than %d functions", few)
	}
	path, err := guests.Compile(ctx, "hello-large")
	if err != nil {
		return err
	}
	if b.hello, err = os.ReadFile(path); err != nil {
		return err
	}
	var o cluster.Options
	for _, name := range nodes {
		o.Nodes = append(o.Nodes, cluster.Node{Name: name})
	}
	if b.cluster, err = cluster.New(ctx, o); err != nil {
		return err
	}
	if _, err := chart.LoadImage(ctx, b.cluster); err != nil {
		return err
	}
	tools, err := cluster.GoBinary(ctx, "./test/cluster/images/toolbox")
	if err != nil {
		return err
	}
	if err := b.cluster.LoadBinaryImage(ctx, toolbox, map[string]string{"/toolbox": tools}); err != nil {
		return err
	}
	if b.registry, err = b.cluster.Registry(ctx, cluster.RegistryOptions{}); err != nil {
		return err
	}
	address := net.JoinHostPort(b.cluster.HostIP(), "80")
	if b.front, err = ingress.Start(ctx, b.cluster.Client(), ingress.Options{Class: class, Listen: address}); err != nil {
		return err
	}
	b.base = b.cluster.HostIP() + ".nip.io"
	dialer := &net.Dialer{Timeout: 10 * time.Second}
	b.visitor = &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{
		MaxIdleConnsPerHost: 64,
		// What nip.io's name servers answer, without asking them.
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, network, address)
		},
	}}
	if err := chart.Install(ctx, b.cluster,
		"api.registry="+b.registry.Host+"/hearth", "api.registryPlainHTTP=true",
		"agent.extraArgs[0]=--registry="+b.registry.Host, "agent.extraArgs[1]=--registry-plain-http",
		// What is measured are not the quotas.
		"api.quotas.changesPerSecond=10000", "api.quotas.functions=10000", "api.quotas.requestsPerSecond=1000000",
	); err != nil {
		return err
	}
	return b.connect(ctx)
}

// connect waits for the API and the engines, and makes a client of each
// replica with one token.
func (b *bench) connect(ctx context.Context) error {
	var replicas []corev1.Pod
	if err := b.cluster.WaitFor(ctx, "the API and the engines to be ready", soon, func(ctx context.Context) (bool, error) {
		for component, want := range map[string]int{"api": 2, "engine": len(nodes), "agent": len(nodes)} {
			pods, err := b.cluster.Client().CoreV1().Pods(chart.Namespace).List(ctx, metav1.ListOptions{LabelSelector: "app.kubernetes.io/component=" + component})
			if err != nil || len(pods.Items) != want {
				return false, err
			}
			for _, p := range pods.Items {
				if !chart.Ready(p) {
					return false, nil
				}
			}
			if component == "api" {
				replicas = pods.Items
			}
		}
		return true, nil
	}); err != nil {
		return err
	}
	seconds := int64(tokenLifetime)
	token, err := b.cluster.Client().CoreV1().ServiceAccounts(chart.Namespace).CreateToken(ctx, "hearth-cli", &authenticationv1.TokenRequest{
		Spec: authenticationv1.TokenRequestSpec{Audiences: []string{v1alpha1.Group}, ExpirationSeconds: &seconds},
	}, metav1.CreateOptions{})
	if err != nil {
		return err
	}
	for _, p := range replicas {
		api, err := client.New(client.Options{
			URL: "http://" + net.JoinHostPort(p.Status.PodIP, "8080"), UserAgent: "bench",
			Token: func(context.Context, string) (string, error) { return token.Status.Token, nil },
			OnRetry: func(err error, _ time.Duration) {
				b.retries.Add(1)
				if b.verbose {
					fmt.Fprintln(os.Stderr, "  again:", err)
				}
			},
		})
		if err != nil {
			return err
		}
		b.apis = append(b.apis, api)
	}
	return nil
}

// Close removes everything.
func (b *bench) Close() error {
	for _, api := range b.apis {
		api.Close()
	}
	if b.visitor != nil {
		b.visitor.CloseIdleConnections()
	}
	if b.front != nil {
		b.front.Close()
	}
	if b.cluster == nil {
		return nil
	}
	return b.cluster.Close()
}

// api takes the replicas in turns, as their Service would.
func (b *bench) api() *client.Client {
	return b.apis[int(b.next.Add(1))%len(b.apis)]
}

// newTenants makes namespaces.
func (b *bench) newTenants(ctx context.Context, n int) ([]string, error) {
	var names []string
	for range n {
		made, err := b.cluster.Client().CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "tenant-"}}, metav1.CreateOptions{})
		if err != nil {
			return nil, err
		}
		names = append(names, made.Name)
	}
	return names, nil
}

// fresh is a module that nobody has seen, and what it answers.
func (b *bench) fresh() (module []byte, text string, err error) {
	text = fmt.Sprintf("Hello, number %d", b.marks.Add(1))
	module, err = guests.Mark(b.hello, text)
	return module, text, err
}

// submission is one function on its way, each time from the submit's begin.
type submission struct {
	function     v1alpha1.Function
	acknowledged time.Duration // durable
	answered     time.Duration // the first answer of the new revision at its URL
}

// submit makes a function and asks for it at its URL until it answers.
func (b *bench) submit(ctx context.Context, tenant, name string) (submission, error) {
	var s submission
	module, text, err := b.fresh()
	if err != nil {
		return s, err
	}
	begin := time.Now()
	source := client.Source{Module: func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(module)), nil }, Size: int64(len(module))}
	if s.function, err = b.api().Put(ctx, name, source, client.Change{Tenant: tenant}); err != nil {
		return s, fmt.Errorf("submit %s: %w", name, err)
	}
	s.acknowledged = time.Since(begin)
	if err := b.answers(ctx, s.function.URL, text); err != nil {
		return s, err
	}
	s.answered = time.Since(begin)
	if b.verbose {
		fmt.Fprintf(os.Stderr, "  %s acknowledged after %s, answered after %s\n", name, report.Milliseconds(s.acknowledged), report.Milliseconds(s.answered))
	}
	return s, nil
}

// answers asks a URL until it answers with text.
func (b *bench) answers(ctx context.Context, url, text string) error {
	ctx, cancel := context.WithTimeout(ctx, soon)
	defer cancel()
	last := "no answer"
	for {
		status, body, err := b.get(ctx, url)
		if err == nil && status == http.StatusOK && strings.Contains(body, text) {
			return nil
		}
		if err == nil {
			last = fmt.Sprintf("%d %s", status, body)
		} else if ctx.Err() == nil {
			last = err.Error()
		}
		if err := pause(ctx, askEvery); err != nil {
			return fmt.Errorf("%s does not answer %q: %w; at last %s", url, text, err, last)
		}
	}
}

func (b *bench) get(ctx context.Context, url string) (int, string, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, "", err
	}
	response, err := b.visitor.Do(request)
	if err != nil {
		return 0, "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, 64<<10))
	return response.StatusCode, string(body), err
}

// remove deletes functions.
func (b *bench) remove(ctx context.Context, names ...string) error {
	var errs []error
	for _, name := range names {
		errs = append(errs, b.api().Delete(ctx, name, ""))
	}
	return errors.Join(errs...)
}

func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}
