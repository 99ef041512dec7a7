package main

import (
	"context"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/kube"
	"github.com/hearth-sh/hearth/test/bench/report"
)

const (
	// targetRead is of one read of the API, p99.
	targetRead = 10 * time.Millisecond
	// targetGrowth is how many times the requests of a submit at few functions
	// may be needed at many: retries of conflicting writes differ from run to run.
	targetGrowth = 1.25
	// few is how many functions there are in the comparison.
	few = 10
	// counted is how many submits the requests are counted of.
	counted = 20
	// quiet is how long after the last change something may still be written,
	// idle how long an idle cluster is watched.
	quiet = 5 * time.Second
	idle  = 30 * time.Second
	// lookEvery is between two looks at all functions.
	lookEvery = 500 * time.Millisecond
	// writers is how many objects are applied at once.
	writers = 8
)

// manyFunctions fills the cluster and measures what depends on how many there are.
func manyFunctions(ctx context.Context, b *bench) error {
	if least := max(few, b.tenants); b.functions <= least {
		return fmt.Errorf("-functions must be above %d", least)
	}
	tenants, err := b.newTenants(ctx, b.tenants)
	if err != nil {
		return err
	}
	// A tenant runs no other's image.
	images := make([]string, len(tenants))
	for i, tenant := range tenants {
		seed, err := b.submit(ctx, tenant, fmt.Sprintf("bench-seed-%d", i))
		if err != nil {
			return err
		}
		images[i] = seed.function.Image
	}
	seeds := len(tenants)
	atFirst := max(few, seeds)
	if err := b.apply(ctx, tenants, images, seeds, atFirst); err != nil {
		return err
	}
	if _, _, err := b.settled(ctx, atFirst); err != nil {
		return err
	}
	atFew, err := b.requests(ctx, tenants[0], "bench-few")
	if err != nil {
		return err
	}
	begin := time.Now()
	if err := b.apply(ctx, tenants, images, atFirst, b.functions); err != nil {
		return err
	}
	applied := time.Since(begin)
	recorded, warm, err := b.settled(ctx, b.functions)
	if err != nil {
		return err
	}
	b.table.Title(fmt.Sprintf("%d functions of %d tenants applied as objects, one image a tenant", b.functions, len(tenants)))
	b.table.Add("applied after", report.Milliseconds(applied), fmt.Sprintf("%d at a time", writers))
	b.table.Add("all recorded after", report.Milliseconds(recorded.Sub(begin)), fmt.Sprintf("%.0f a second", float64(b.functions)/recorded.Sub(begin).Seconds()))
	b.table.Add("all warm on all nodes after", report.Milliseconds(warm.Sub(begin)), fmt.Sprintf("%.0f a second", float64(b.functions)/warm.Sub(begin).Seconds()))
	if err := b.readAll(ctx, tenants, atFirst); err != nil {
		return err
	}
	atMany, err := b.requests(ctx, tenants[0], "bench-many")
	if err != nil {
		return err
	}
	watched, err := b.watchIdle(ctx)
	if err != nil {
		return err
	}
	b.table.Title("Requests of the API's replicas to the API server for one submit to first answer, all nodes warm")
	b.table.Add(fmt.Sprintf("among %d functions", atFirst), fmt.Sprintf("%.1f", atFew.each), "")
	b.table.Note("  " + atFew.what)
	b.table.Hold(fmt.Sprintf("among %d functions", b.functions), fmt.Sprintf("%.1f", atMany.each), fmt.Sprintf("%.2f×", atMany.each/max(atFew.each, 1)), fmt.Sprintf("≤ %.2f× of above", targetGrowth), atMany.each <= targetGrowth*atFew.each)
	b.table.Note("  " + atMany.what)
	b.table.Add(fmt.Sprintf("submit to first answer among %d functions, p50", atFirst), report.Milliseconds(report.Median(atFew.answered)), "")
	b.table.Add(fmt.Sprintf("submit to first answer among %d functions, p50", b.functions), report.Milliseconds(report.Median(atMany.answered)), report.Times(report.Median(atMany.answered), report.Median(atFew.answered))+" of above")
	b.table.Add(fmt.Sprintf("while nothing changes, in %s", idle), fmt.Sprint(watched.total), "")
	b.table.Note("  " + watched.what)
	return nil
}

// apply makes functions number from to before until, of the tenants in turns, each
// with its image, as kubectl would.
func (b *bench) apply(ctx context.Context, tenants, images []string, from, until int) error {
	// Of its own, without client-go's limit: what is measured is what Hearth
	// does with them.
	config := b.cluster.RESTConfig()
	config.QPS = -1
	config.RateLimiter = nil
	objects, err := dynamic.NewForConfig(rest.AddUserAgent(config, "bench"))
	if err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(writers)
	for i := from; i < until; i++ {
		tenant, image, name := tenants[i%len(tenants)], images[i%len(tenants)], fmt.Sprintf("bench-%d", i)
		group.Go(func() error {
			u := &unstructured.Unstructured{Object: map[string]any{
				"apiVersion": v1alpha1.APIVersion, "kind": kube.FunctionKind,
				"metadata": map[string]any{"name": name, "namespace": tenant}, "spec": map[string]any{"image": image},
			}}
			_, err := objects.Resource(kube.FunctionGVR()).Namespace(tenant).Apply(ctx, name, u, metav1.ApplyOptions{FieldManager: "kubectl", Force: true})
			return err
		})
	}
	return group.Wait()
}

// settled waits until there are n functions that are recorded, and warm on
// every node.
func (b *bench) settled(ctx context.Context, n int) (recorded, warm time.Time, err error) {
	ctx, cancel := context.WithTimeout(ctx, soon+time.Duration(n)*time.Second)
	defer cancel()
	want := fmt.Sprintf("%d/%d", len(nodes), len(nodes))
	said := time.Now()
	for {
		all, err := kube.NewFunctions(b.cluster.Dynamic()).List(ctx, "")
		if err != nil {
			return recorded, warm, err
		}
		var numbered, ready int
		for _, f := range all.Items {
			if f.Status.Revision > 0 && f.Status.ObservedGeneration == f.Generation {
				numbered++
				if f.Status.Warm == want && f.Status.ActiveRevision == f.Status.Revision {
					ready++
				}
			}
		}
		if numbered >= n && recorded.IsZero() {
			recorded = time.Now()
		}
		if ready >= n && len(all.Items) == ready {
			return recorded, time.Now(), nil
		}
		if b.verbose && time.Since(said) > quiet {
			said = time.Now()
			fmt.Fprintf(os.Stderr, "  of %d functions %d are recorded and %d warm\n", len(all.Items), numbered, ready)
		}
		if err := pause(ctx, lookEvery); err != nil {
			return recorded, warm, fmt.Errorf("of %d functions %d are recorded and %d warm: %w", n, numbered, ready, err)
		}
	}
}

// work is what changes cost.
type work struct {
	total    int
	each     float64 // requests of a submit
	what     string  // they are
	answered []time.Duration
}

// requests counts what the API's replicas ask of the API server for submits.
func (b *bench) requests(ctx context.Context, tenant, prefix string) (work, error) {
	if err := pause(ctx, quiet); err != nil {
		return work{}, err
	}
	begin := time.Now()
	var names []string
	var answered []time.Duration
	for i := range counted {
		name := fmt.Sprintf("%s-%d", prefix, i)
		s, err := b.submit(ctx, tenant, name)
		if err != nil {
			return work{}, err
		}
		names, answered = append(names, name), append(answered, s.answered)
	}
	if err := b.allWarm(ctx, tenant, names); err != nil {
		return work{}, err
	}
	if err := pause(ctx, quiet); err != nil {
		return work{}, err
	}
	w, err := b.count(begin, time.Now(), counted)
	w.answered = answered
	if err != nil {
		return w, err
	}
	return w, b.remove(ctx, names...)
}

func (b *bench) allWarm(ctx context.Context, tenant string, names []string) error {
	want := fmt.Sprintf("%d/%d", len(nodes), len(nodes))
	for _, name := range names {
		if err := b.cluster.WaitFor(ctx, name+" to be warm everywhere", soon, func(ctx context.Context) (bool, error) {
			f, err := kube.NewFunctions(b.cluster.Dynamic()).Get(ctx, tenant, name)
			return err == nil && f.Status.Warm == want, nil
		}); err != nil {
			return err
		}
	}
	return nil
}

// watchIdle counts what is asked while nothing changes.
func (b *bench) watchIdle(ctx context.Context) (work, error) {
	if err := pause(ctx, quiet); err != nil {
		return work{}, err
	}
	begin := time.Now()
	if err := pause(ctx, idle); err != nil {
		return work{}, err
	}
	return b.count(begin, time.Now(), 1)
}

// count looks into the audit log for requests of the API's replicas. Leases are
// renewed and watches begun anew whatever changes.
func (b *bench) count(from, until time.Time, among int) (work, error) {
	entries, err := b.cluster.AuditEntries()
	if err != nil {
		return work{}, err
	}
	by := map[string]int{}
	var w work
	for _, e := range entries {
		if e.RequestReceivedTimestamp.Before(from) || e.RequestReceivedTimestamp.After(until) || !strings.HasPrefix(e.UserAgent, "hearth-api/") ||
			e.Verb == "watch" || e.ObjectRef.Resource == "leases" {
			continue
		}
		what := e.Verb + " " + e.ObjectRef.Resource
		if e.ObjectRef.Subresource != "" {
			what += "/" + e.ObjectRef.Subresource
		}
		if code := e.ResponseStatus.Code; code >= 300 {
			what += fmt.Sprintf(" (%d)", code)
		}
		by[what]++
		w.total++
	}
	var parts []string
	for _, what := range slices.Sorted(maps.Keys(by)) {
		if each := float64(by[what]) / float64(among); each >= 0.1 {
			parts = append(parts, fmt.Sprintf("%s %.1f", what, each))
		}
	}
	w.each, w.what = float64(w.total)/float64(among), strings.Join(parts, ", ")
	return w, nil
}

// readAll measures reads, over connections that are kept, from both replicas, of
// the functions that were applied from number first on.
func (b *bench) readAll(ctx context.Context, tenants []string, first int) error {
	if err := pause(ctx, quiet); err != nil {
		return err
	}
	var one, list, revisions []time.Duration
	size := 0
	for i := range b.reads {
		name := fmt.Sprintf("bench-%d", first+i%(b.functions-first))
		begin := time.Now()
		if _, _, err := b.api().Get(ctx, name); err != nil {
			return err
		}
		one = append(one, time.Since(begin))
		begin = time.Now()
		if _, err := b.api().Revisions(ctx, name); err != nil {
			return err
		}
		revisions = append(revisions, time.Since(begin))
		begin = time.Now()
		all, err := b.api().List(ctx, tenants[i%len(tenants)])
		if err != nil {
			return err
		}
		list, size = append(list, time.Since(begin)), max(size, len(all.Items))
	}
	b.table.Title(fmt.Sprintf("Reads of the API over HTTP with a token at %d functions, %d of each in turns, one at a time", b.functions, b.reads))
	for _, kind := range []struct {
		name string
		took []time.Duration
	}{{"one function", one}, {"its revisions", revisions}, {fmt.Sprintf("all %d of a tenant", size), list}} {
		p50, p99 := report.Median(kind.took), report.Quantile(kind.took, 0.99)
		b.table.Hold(kind.name+", p99", report.Milliseconds(p99), "p50 "+report.Milliseconds(p50), "< "+report.Milliseconds(targetRead), p99 < targetRead)
	}
	return nil
}
