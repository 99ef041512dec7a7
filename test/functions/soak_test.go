package functions_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/client"
	"github.com/hearth-sh/hearth/internal/function"
	"github.com/hearth-sh/hearth/test/chart"
	"github.com/hearth-sh/hearth/test/guests"
)

var soakFor = flag.Duration("functions.soak", 10*time.Minute, "how long TestSoak changes functions and breaks things")

const (
	// writers change functions at the same time, each those of a tenant of its
	// own, so that the order of one function's changes is known.
	soakWriters = 3
	// soakFunctions is of each writer.
	soakFunctions = 3
	// healing is how long everything may take to be as it was after one fault.
	healing = 4 * time.Minute
	// darkness is how long a function may answer nobody: a node that is lost
	// is not told of for 40 s and more, and the visitors of the two others are
	// answered meanwhile.
	darkness = 30 * time.Second
	// impatience is when a visitor asks again: the ingress controller goes on
	// choosing a node that is off the network, a third of all times, until
	// Kubernetes says so. Much shorter than darkness, which then is no bad luck.
	impatience = 2 * time.Second
	// awayAtMost is how long a lost node stays so; beyond 40 s Kubernetes
	// takes it out.
	awayAtMost = 60 * time.Second
)

// TestSoak changes functions while replicas, engines, agents and nodes are
// killed. In the end every acknowledged revision is there and answers.
func TestSoak(t *testing.T) {
	if os.Getenv("HEARTH_SOAK") == "" {
		t.Skip("it takes its time: make soak sets HEARTH_SOAK")
	}
	ctx, cancel := context.WithTimeout(t.Context(), *soakFor)
	defer cancel()
	steady := submit(t, newTenant(t), "soak-steady", "always there")
	answers(t, steady.URL, "always there")
	waitObject(t, steady.Tenant, "soak-steady", "every node to be warm", allWarm)

	var running sync.WaitGroup
	visits := &visits{last: time.Now()}
	running.Go(func() { visits.run(ctx, steady.URL, "always there") })
	var writers []*soakWriter
	for i := range soakWriters {
		w := newSoakWriter(t, i)
		writers = append(writers, w)
		running.Go(func() { w.run(ctx) })
	}
	running.Go(func() { breakThings(ctx, t) })
	running.Wait()

	t.Logf("%d requests of the steady function, %d of them failed, the longest time without an answer was %s", visits.asked, visits.failed, visits.longest.Round(time.Millisecond))
	if visits.longest > darkness {
		t.Errorf("%s answered nobody for %s: %s", steady.URL, visits.longest, strings.Join(visits.why, "; "))
	}
	waitWhole(t.Context(), t)
	for _, w := range writers {
		w.verify()
	}
}

// visits are those of one function.
type visits struct {
	asked, failed int
	last          time.Time // answer
	longest       time.Duration
	why           []string // what was seen during the longest time without an answer
}

func (v *visits) run(ctx context.Context, url, text string) {
	var seen []string
	for ctx.Err() == nil {
		attempt, cancel := context.WithTimeout(ctx, impatience)
		status, body, err := get(attempt, url)
		cancel()
		if ctx.Err() != nil {
			return
		}
		v.asked++
		now := time.Now()
		answered := err == nil && status == http.StatusOK && strings.Contains(body, text)
		if !answered {
			v.failed++
			seen = append(seen, fmt.Sprintf("at %s: %d %s %v", now.Format(time.TimeOnly), status, strings.TrimSpace(body), err))
		}
		if without := now.Sub(v.last); without > v.longest {
			v.longest, v.why = without, slices.Clone(seen)
		}
		if answered {
			v.last, seen = now, seen[:0]
		}
		_ = sleep(ctx, 20*time.Millisecond)
	}
}

// fault is one thing that goes wrong, and is put right again.
type fault struct {
	name string
	do   func(ctx context.Context, t *testing.T) error
}

var faults = []fault{
	{"a replica is killed", func(ctx context.Context, _ *testing.T) error { return killOne(ctx, "api") }},
	{"all replicas are killed", func(ctx context.Context, _ *testing.T) error { return killAll(ctx, "api") }},
	{"an engine is killed", func(ctx context.Context, _ *testing.T) error { return killOne(ctx, "engine") }},
	{"an agent is killed", func(ctx context.Context, _ *testing.T) error { return killOne(ctx, "agent") }},
	{"all agents are killed", func(ctx context.Context, _ *testing.T) error { return killAll(ctx, "agent") }},
	{"a replica's pod is replaced", func(ctx context.Context, _ *testing.T) error { return replaceOne(ctx, "api") }},
	{"an engine's pod is replaced", func(ctx context.Context, _ *testing.T) error { return replaceOne(ctx, "engine") }},
	{"a node's network is down", unplugNode},
	{"a node is lost", loseNode},
}

// breakThings does one at a time: each is put right before the next.
func breakThings(ctx context.Context, t *testing.T) {
	for _, f := range slices.Backward(faults) { // each once, the slowest first
		if ctx.Err() == nil {
			breakOne(ctx, t, f)
		}
	}
	for ctx.Err() == nil && !t.Failed() {
		breakOne(ctx, t, faults[rand.IntN(len(faults))])
	}
}

func breakOne(ctx context.Context, t *testing.T, f fault) {
	begin := time.Now()
	// Not ended with the soak's time: a node that was stopped is started again.
	if err := f.do(context.WithoutCancel(ctx), t); err != nil {
		t.Errorf("when %s: %v", f.name, err)
		return
	}
	waitWhole(context.WithoutCancel(ctx), t)
	t.Logf("%s: whole again after %s", f.name, time.Since(begin).Round(100*time.Millisecond))
	_ = sleep(ctx, rand.N(5*time.Second))
}

// waitWhole waits until all is as the chart wants it.
func waitWhole(ctx context.Context, t *testing.T) {
	ctx, cancel := context.WithTimeout(ctx, healing)
	defer cancel()
	for _, node := range nodes {
		if err := bench.WaitNodeReady(ctx, node); err != nil {
			t.Error(err)
		}
	}
	if err := ready(ctx); err != nil {
		t.Error(err)
	}
}

func killOne(ctx context.Context, component string) error {
	pods, err := podsOf(ctx, component)
	if err != nil || len(pods) == 0 {
		return errors.Join(err, fmt.Errorf("there are %d pods of %s", len(pods), component))
	}
	return killPods(ctx, pods[rand.IntN(len(pods))])
}

func killAll(ctx context.Context, component string) error {
	pods, err := podsOf(ctx, component)
	if err != nil {
		return err
	}
	return killPods(ctx, pods...)
}

// killPods ends main processes without a word, and waits until they are
// started again.
func killPods(ctx context.Context, pods ...corev1.Pod) error {
	for _, p := range pods {
		pid, err := process(ctx, p)
		if err == nil {
			err = syscall.Kill(pid, syscall.SIGKILL)
		}
		if err != nil && !errors.Is(err, syscall.ESRCH) {
			return err
		}
	}
	return bench.WaitFor(ctx, "what was killed to be started again", healing, func(ctx context.Context) (bool, error) {
		for _, p := range pods {
			now, err := bench.Client().CoreV1().Pods(p.Namespace).Get(ctx, p.Name, metav1.GetOptions{})
			if err != nil || len(now.Status.ContainerStatuses) == 0 || now.Status.ContainerStatuses[0].RestartCount <= p.Status.ContainerStatuses[0].RestartCount {
				return false, nil
			}
		}
		return true, nil
	})
}

// replaceOne deletes a pod without letting it end in good order.
func replaceOne(ctx context.Context, component string) error {
	pods, err := podsOf(ctx, component)
	if err != nil || len(pods) == 0 {
		return errors.Join(err, fmt.Errorf("there are %d pods of %s", len(pods), component))
	}
	p, now := pods[rand.IntN(len(pods))], int64(0)
	if err := bench.Client().CoreV1().Pods(p.Namespace).Delete(ctx, p.Name, metav1.DeleteOptions{GracePeriodSeconds: &now}); err != nil {
		return err
	}
	return bench.WaitFor(ctx, p.Name+" to be replaced", healing, func(ctx context.Context) (bool, error) {
		left, err := podsOf(ctx, component)
		return err == nil && len(left) >= len(pods) && !slices.ContainsFunc(left, func(o corev1.Pod) bool { return o.UID == p.UID }), nil
	})
}

// loseNode takes the kubelet and containerd of a node away: nothing on it can
// be started, stopped or seen. What runs goes on.
func loseNode(ctx context.Context, t *testing.T) error {
	m := bench.Node(nodes[rand.IntN(len(nodes))])
	if err := errors.Join(m.StopKubelet(ctx), m.StopContainerd(ctx)); err != nil {
		return err
	}
	away := 5*time.Second + rand.N(awayAtMost)
	t.Logf("%s is away for %s", m.Name, away.Round(time.Second))
	_ = sleep(ctx, away)
	if err := errors.Join(m.StartContainerd(ctx), m.StartKubelet(ctx)); err != nil {
		return err
	}
	return nil
}

// unplugNode takes a node off the network: what runs on it goes on, and talks to
// nobody.
func unplugNode(ctx context.Context, t *testing.T) error {
	m := bench.Node(nodes[rand.IntN(len(nodes))])
	if err := m.Unplug(ctx); err != nil {
		return err
	}
	away := 5*time.Second + rand.N(awayAtMost)
	t.Logf("%s is off the network for %s", m.Name, away.Round(time.Second))
	_ = sleep(ctx, away)
	return m.Plug(ctx)
}

// soakWriter makes, changes, rolls back and deletes functions of one tenant,
// and remembers what was acknowledged.
type soakWriter struct {
	t         *testing.T
	api       *client.Client
	tenant    string
	number    int
	marks     int
	functions map[string]*soaked
	done      map[string]int // acknowledged changes by kind
}

// soaked is what was acknowledged of one function.
type soaked struct {
	wanted    int            // revision; 0: deleted
	revisions map[int]string // digests
	texts     map[string]string
}

func newSoakWriter(t *testing.T, number int) *soakWriter {
	t.Helper()
	w := &soakWriter{t: t, tenant: newTenant(t), number: number, functions: map[string]*soaked{}, done: map[string]int{}}
	for i := range soakFunctions {
		w.functions[fmt.Sprintf("soak-%d-%d", number, i)] = &soaked{revisions: map[int]string{}, texts: map[string]string{}}
	}
	seconds := int64(max(2**soakFor, time.Hour).Seconds())
	token, err := bench.Client().CoreV1().ServiceAccounts(chart.Namespace).CreateToken(t.Context(), "hearth-cli", &authenticationv1.TokenRequest{
		Spec: authenticationv1.TokenRequestSpec{Audiences: []string{v1alpha1.Group}, ExpirationSeconds: &seconds},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	// Any replica that is ready, as the Service would take: a second attempt
	// reaches another one.
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
		pods, err := podsOf(ctx, "api")
		if err != nil {
			return nil, err
		}
		pods = slices.DeleteFunc(pods, func(p corev1.Pod) bool { return !chart.Ready(p) })
		if len(pods) == 0 {
			return nil, errors.New("no replica is ready")
		}
		dialer := net.Dialer{Timeout: 5 * time.Second}
		return dialer.DialContext(ctx, network, net.JoinHostPort(pods[rand.IntN(len(pods))].Status.PodIP, "8080"))
	}}
	if w.api, err = client.New(client.Options{
		URL: "http://hearth-api", Transport: transport, UserAgent: "soak",
		Token: func(context.Context, string) (string, error) { return token.Status.Token, nil },
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.api.Close)
	return w
}

func (w *soakWriter) run(ctx context.Context) {
	names := slices.Sorted(maps.Keys(w.functions))
	for ctx.Err() == nil && !w.t.Failed() {
		name := names[rand.IntN(len(names))]
		f := w.functions[name]
		var kind string
		var err error
		// A change that was begun is finished after the soak's time: only so is
		// it known what was acknowledged.
		work, cancel := context.WithTimeout(context.WithoutCancel(ctx), healing)
		switch n := rand.IntN(10); {
		case n == 0 && f.wanted != 0:
			kind, err = "delete", w.remove(work, name, f)
		case n <= 2 && len(f.revisions) > 1:
			kind, err = "rollback", w.rollBack(work, name, f)
		default:
			kind, err = "submit", w.submit(work, name, f)
		}
		cancel()
		if err != nil {
			w.t.Errorf("%s of %s was never acknowledged: %v", kind, name, err)
			return
		}
		w.done[kind]++
		_ = sleep(ctx, rand.N(500*time.Millisecond))
	}
}

// insist does a change again until it is acknowledged. Each change says what is
// wanted in the end, so that doing it twice does no more.
func (w *soakWriter) insist(ctx context.Context, change func(ctx context.Context) error) error {
	for {
		attempt, cancel := context.WithTimeout(ctx, 30*time.Second)
		err := change(attempt)
		cancel()
		var problem *client.ProblemError
		if err == nil || errors.As(err, &problem) && !problem.Retryable {
			return err
		}
		if sleep(ctx, 200*time.Millisecond) != nil {
			return err
		}
	}
}

func (w *soakWriter) submit(ctx context.Context, name string, f *soaked) error {
	w.marks++
	text := fmt.Sprintf("soak %d of %s", w.marks, name)
	module, err := guests.Mark(hello, text)
	if err != nil {
		return err
	}
	sum := sha256.Sum256(module)
	f.texts["sha256:"+hex.EncodeToString(sum[:])] = text
	source := client.Source{Module: func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(module)), nil }, Size: int64(len(module))}
	return w.insist(ctx, func(ctx context.Context) error {
		got, err := w.api.Put(ctx, name, source, client.Change{Tenant: w.tenant})
		if err == nil {
			f.acknowledged(got)
		}
		return err
	})
}

func (w *soakWriter) rollBack(ctx context.Context, name string, f *soaked) error {
	numbers := slices.Sorted(maps.Keys(f.revisions))
	numbers = numbers[max(0, len(numbers)-function.MaxRevisions/2):]
	number := numbers[rand.IntN(len(numbers))]
	return w.insist(ctx, func(ctx context.Context) error {
		if now, _, err := w.api.Get(ctx, name); err == nil && now.Digest == f.revisions[number] {
			f.acknowledged(now) // by an attempt whose answer was lost
			return nil
		}
		got, err := w.api.Rollback(ctx, name, number, client.Change{})
		if err == nil {
			f.acknowledged(got)
		}
		return err
	})
}

func (w *soakWriter) remove(ctx context.Context, name string, f *soaked) error {
	err := w.insist(ctx, func(ctx context.Context) error {
		err := w.api.Delete(ctx, name, "")
		var problem *client.ProblemError
		if errors.As(err, &problem) && problem.Status == http.StatusNotFound {
			return nil // by an attempt whose answer was lost
		}
		return err
	})
	if err == nil {
		f.wanted = 0
		clear(f.revisions)
	}
	return err
}

func (f *soaked) acknowledged(got v1alpha1.Function) {
	f.wanted = got.Revision
	f.revisions[got.Revision] = got.Digest
}

// verify holds the product to what it acknowledged.
func (w *soakWriter) verify() {
	t := w.t
	t.Logf("writer %d was acknowledged %v", w.number, w.done)
	for _, name := range slices.Sorted(maps.Keys(w.functions)) {
		f, url := w.functions[name], "http://"+name+"."+base+"/"
		if f.wanted == 0 {
			waitStatusCode(t, url, http.StatusNotFound)
			continue
		}
		now, _, err := w.api.Get(t.Context(), name)
		if err != nil || now.Revision != f.wanted || now.Digest != f.revisions[f.wanted] {
			t.Errorf("%s is at revision %d (%s, %v), want %d (%s)", name, now.Revision, now.Digest, err, f.wanted, f.revisions[f.wanted])
			continue
		}
		list, err := w.api.Revisions(t.Context(), name)
		if err != nil {
			t.Error(err)
			continue
		}
		there := map[int]string{}
		for _, r := range list.Items {
			there[r.Revision] = r.Digest
		}
		for number, digest := range f.revisions {
			if number > list.Items[0].Revision-function.MaxRevisions && there[number] != digest {
				t.Errorf("revision %d of %s is %q, acknowledged was %q", number, name, there[number], digest)
			}
		}
		answers(t, url, f.texts[f.revisions[f.wanted]])
		waitObject(t, w.tenant, name, name+" to be warm everywhere", allWarm)
		// All others that are kept answer, too, when they are asked for.
		asked := 0
		for _, number := range slices.Sorted(maps.Keys(there)) {
			digest := f.revisions[number]
			if digest == "" || number == f.wanted {
				continue
			}
			if err := w.rollBackTo(name, number); err != nil {
				t.Errorf("going back to revision %d of %s: %v", number, name, err)
				continue
			}
			answers(t, url, f.texts[digest])
			asked++
		}
		t.Logf("%s: %d revisions are kept, and the %d that are not wanted answered, too", name, len(there), asked)
	}
}

func (w *soakWriter) rollBackTo(name string, number int) error {
	_, err := w.api.Rollback(w.t.Context(), name, number, client.Change{Wait: soon})
	return err
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}
