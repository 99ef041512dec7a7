package functions_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/kube"
	"github.com/hearth-sh/hearth/test/chart"
)

const (
	// askEvery is between two requests of a visitor who does not stop.
	askEvery = 20 * time.Millisecond
	// outage is how long the API server is away: longer than the leader may
	// renew its lease and than what is known of tokens and rights holds.
	outage = 20 * time.Second
)

// visit asks for a URL again and again until the test ends or the returned
// function is called. Whatever is not text is a failure of the test.
func visit(t *testing.T, url, text string) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var asked int
	var bad []string
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			status, body, err := get(ctx, url)
			if ctx.Err() != nil {
				return
			}
			asked++
			if err != nil || status != http.StatusOK || !strings.Contains(body, text) {
				if len(bad) < 10 {
					bad = append(bad, fmt.Sprintf("at %s: %d %s %v", time.Now().Format(time.TimeOnly), status, strings.TrimSpace(body), err))
				}
			}
			select {
			case <-ctx.Done():
			case <-time.After(askEvery):
			}
		}
	}()
	var once sync.Once
	stop = func() {
		once.Do(func() {
			cancel()
			<-done
			if t.Logf("%s was asked %d times meanwhile", url, asked); asked == 0 || len(bad) > 0 {
				t.Errorf("%d requests of %d or more failed: %s", len(bad), asked, strings.Join(bad, "; "))
			}
		})
	}
	t.Cleanup(stop)
	return stop
}

// killer returns what ends a replica at once, as a lack of memory would:
// without a word.
func killer(t *testing.T, replica corev1.Pod) (kill func()) {
	t.Helper()
	pid, err := process(t.Context(), replica)
	if err != nil {
		t.Fatal(err)
	}
	return func() {
		t.Helper()
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
}

// waitRestarted waits until the replica's container was started again and all
// are ready.
func waitRestarted(t *testing.T, killed ...corev1.Pod) {
	t.Helper()
	if err := bench.WaitFor(t.Context(), "the killed replicas to be started again", soon, func(ctx context.Context) (bool, error) {
		for _, k := range killed {
			p, err := bench.Client().CoreV1().Pods(k.Namespace).Get(ctx, k.Name, metav1.GetOptions{})
			if err != nil || restarts([]corev1.Pod{*p}) <= restarts([]corev1.Pod{k}) || !chart.Ready(*p) {
				return false, nil
			}
		}
		return true, nil
	}); err != nil {
		t.Fatal(err)
	}
	if err := ready(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestASubmitWhoseReplicaIsKilledIsMadeOnceByAnother(t *testing.T) {
	tenant := newTeam(t)
	before := submit(t, tenant, "before", "acknowledged before")
	pods := replicas(t)
	token := tokenOf(t, tenant, v1alpha1.Group)
	stop := visit(t, before.URL, "acknowledged before")
	requests := func(ctx context.Context) (int, error) {
		list, err := bench.Client().CoreV1().ConfigMaps(chart.Namespace).List(ctx, metav1.ListOptions{LabelSelector: "hearth.sh/request"})
		if err != nil {
			return 0, err
		}
		return len(list.Items), nil
	}
	were, err := requests(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for n, c := range []struct {
		name string
		// begun tells that the request is where the replica is to die.
		begun func(ctx context.Context) bool
	}{
		{"received", func(ctx context.Context) bool {
			are, err := requests(ctx)
			return err == nil && are > were
		}},
		{"recorded", func(ctx context.Context) bool {
			_, err := kube.NewFunctions(bench.Dynamic()).Get(ctx, tenant, "killed-recorded")
			return err == nil
		}},
	} {
		name, text := "killed-"+c.name, "killed when "+c.name
		victim, other := pods[n%len(pods)], newPerson(t, pods[(n+1)%len(pods)], token)
		wasm, idempotencyKey := module(t, text), "key-"+tenant+"-"+c.name
		first := newPerson(t, victim, token)
		first.must(t, http.MethodGet, "/v1/functions?tenant="+tenant, nil).want(t, "a list", http.StatusOK, "")
		type outcome struct {
			answered
			err error
		}
		kill, asked := killer(t, victim), make(chan outcome, 1)
		go func() {
			a, err := first.do(t.Context(), http.MethodPut, "/v1/functions/"+name+"?tenant="+tenant, wasm, "Content-Type", "application/wasm", "Idempotency-Key", idempotencyKey)
			asked <- outcome{a, err}
		}()
		for until := time.Now().Add(soon); !c.begun(t.Context()); time.Sleep(2 * time.Millisecond) {
			if time.Now().After(until) {
				t.Fatal("the request was never begun")
			}
		}
		kill()
		was := <-asked
		t.Logf("killed when %s: the client saw %d %v", c.name, was.status, was.err)

		var again answered
		if err := bench.WaitFor(t.Context(), "the same request to succeed at the other replica", soon, func(ctx context.Context) (bool, error) {
			if again, err = other.do(ctx, http.MethodPut, "/v1/functions/"+name+"?tenant="+tenant, wasm, "Content-Type", "application/wasm", "Idempotency-Key", idempotencyKey); err != nil {
				return false, nil
			}
			if again.status >= 300 && !again.problem.Retryable {
				return false, fmt.Errorf("it was refused for good: %s", again)
			}
			return again.status < 300, nil
		}); err != nil {
			t.Fatalf("%v; the last answer was %s", err, again)
		}
		f := again.function(t)
		if again.status != http.StatusCreated || f.Revision != 1 {
			t.Errorf("%s", again)
		}
		answers(t, f.URL, text)
		if is := readBack(t, other, name); len(is) != 1 || is[0].Revision != 1 {
			t.Errorf("revisions %+v, want one", is)
		}
		waitRestarted(t, victim)
	}
	stop()
	shown := must(t, "functions", "get", "--kubeconfig", bench.Kubeconfig(), "--tenant", tenant, "-o", "json", "before")
	if !strings.Contains(shown, `"revision": 1`) {
		t.Errorf("%s", shown)
	}
}

// readBack returns a function's revisions.
func readBack(t *testing.T, p person, name string) []v1alpha1.Revision {
	t.Helper()
	a := p.must(t, http.MethodGet, "/v1/functions/"+name+"/revisions", nil)
	var list v1alpha1.RevisionList
	if err := json.Unmarshal(a.body, &list); err != nil || a.status != http.StatusOK {
		t.Fatalf("%s: %v", a, err)
	}
	return list.Items
}

func TestFunctionsAnswerWhileAllReplicasAreKilled(t *testing.T) {
	tenant := newTenant(t)
	f := submit(t, tenant, "goes-on", "it goes on")
	waitObject(t, tenant, "goes-on", "every node to be warm", allWarm)
	stop := visit(t, f.URL, "it goes on")
	pods := replicas(t)
	for _, p := range pods {
		killer(t, p)()
	}
	// Nobody is there to record it; the leader that comes does.
	apply(t, tenant, "meanwhile", map[string]any{"image": f.Image})
	recorded := waitObject(t, tenant, "meanwhile", "what was applied meanwhile to be recorded and warm", allWarm)
	if recorded.Status.Revision != 1 {
		t.Errorf("%+v", recorded.Status)
	}
	answers(t, recorded.Status.URL, "it goes on")
	waitRestarted(t, pods...)
	stop()
	shown := must(t, "functions", "get", "--kubeconfig", bench.Kubeconfig(), "--tenant", tenant, "-o", "json", "goes-on")
	if !strings.Contains(shown, `"revision": 1`) {
		t.Errorf("%s", shown)
	}
	if next := submit(t, tenant, "goes-on", "it goes on and on"); next.Revision != 2 {
		t.Errorf("%+v", next)
	}
	answers(t, f.URL, "it goes on and on")
}

// isRetryable wants a 503 that says when to come again.
func isRetryable(t *testing.T, what string, a answered, code string) {
	t.Helper()
	a.want(t, what, http.StatusServiceUnavailable, code)
	if after, err := strconv.Atoi(a.header.Get("Retry-After")); err != nil || after <= 0 || !a.problem.Retryable || a.problem.Detail == "" {
		t.Errorf("%s: nobody would know to try again: %v %s", what, a.header, a)
	}
	t.Logf("%s: %d %s: %s", what, a.status, a.problem.Title, a.problem.Detail)
}

func TestNothingIsRecordedWithoutTheRegistry(t *testing.T) {
	tenant := newTeam(t)
	dev := newPerson(t, replicas(t)[0], tokenOf(t, tenant, v1alpha1.Group))
	there := submit(t, tenant, "published", "published before")
	answers(t, there.URL, "published before")
	if err := registry.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	stopped := true
	t.Cleanup(func() {
		if stopped {
			_ = registry.Start(context.Background())
		}
	})
	stop := visit(t, there.URL, "published before")
	file := wasmFile(t, "late")
	command := []string{"submit", "--kubeconfig", bench.Kubeconfig(), "--tenant", tenant, "--name", "late-command", "-o", "json", file}
	type outcome struct {
		stdout, stderr string
		err            error
	}
	// A command goes on trying for a while by itself.
	patient := make(chan outcome, 1)
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	go func() {
		stdout, stderr, err := nodeagent(ctx, command...)
		patient <- outcome{stdout, stderr, err}
	}()
	isRetryable(t, "a new function", dev.put(t, tenant, "late", module(t, "late"), "Idempotency-Key", "late"), "registry-unavailable")
	isRetryable(t, "a new revision", dev.put(t, tenant, "published", module(t, "published later")), "registry-unavailable")
	dev.must(t, http.MethodGet, "/v1/functions/late", nil).want(t, "what could not be published", http.StatusNotFound, "function-not-found")
	if _, err := kube.NewFunctions(bench.Dynamic()).Get(t.Context(), tenant, "late"); err == nil {
		t.Error("a function without an image was recorded")
	}
	if is := readBack(t, dev, "published"); len(is) != 1 {
		t.Errorf("revisions %+v, want one", is)
	}
	if err := registry.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	stopped = false
	dev.put(t, tenant, "late", module(t, "late"), "Idempotency-Key", "late").want(t, "the same request", http.StatusCreated, "")
	if o := <-patient; o.err != nil {
		t.Logf("the command had given up: %v %s%s", o.err, o.stdout, o.stderr)
	}
	must(t, command...)
	if is := readBack(t, dev, "late-command"); len(is) != 1 {
		t.Errorf("revisions %+v, want one", is)
	}
	stop()
	if f := submit(t, tenant, "published", "published later"); f.Revision != 2 {
		t.Errorf("%+v", f)
	}
	answers(t, there.URL, "published later")
}

func TestFunctionsAnswerWithoutTheAPIServer(t *testing.T) {
	tenant := newTeam(t)
	pods := replicas(t)
	dev := newPerson(t, pods[0], tokenOf(t, tenant, v1alpha1.Group))
	// Both answers begin with the same words, for who asks all the time.
	f := dev.put(t, tenant, "steady", module(t, "steady as ever")).function(t)
	answers(t, f.URL, "steady as ever")
	waitObject(t, tenant, "steady", "every node to be warm", allWarm)
	before := restarts(allPods(t))
	dev.must(t, http.MethodGet, "/v1/functions/steady", nil).want(t, "a look", http.StatusOK, "")
	file := wasmFile(t, "steady and new")

	if err := bench.StopAPIServer(t.Context()); err != nil {
		t.Fatal(err)
	}
	from, stopped := time.Now(), true
	t.Cleanup(func() {
		if stopped {
			_ = bench.StartAPIServer(context.Background())
		}
	})
	stop := visit(t, f.URL, "steady")
	// Who was known a moment ago may read, and is told why a change cannot be.
	if a := dev.must(t, http.MethodGet, "/v1/functions/steady", nil); a.status != http.StatusOK {
		isRetryable(t, "a look", a, "access-unavailable")
	}
	// Whoever keeps functions is away; later nobody knows who asks.
	if a := dev.put(t, tenant, "steady", module(t, "steady and new"), "Idempotency-Key", "steadier"); a.code() != "access-unavailable" {
		isRetryable(t, "a change", a, "store-unavailable")
	} else {
		isRetryable(t, "a change", a, "access-unavailable")
	}
	if _, stderr, err := nodeagent(t.Context(), "submit", "--kubeconfig", bench.Kubeconfig(), "--tenant", tenant, "--name", "steady", file); err == nil || !strings.Contains(stderr, "does not answer") {
		t.Errorf("the command: %v %s", err, stderr)
	} else {
		t.Logf("a person reads: %s", stderr)
	}
	time.Sleep(time.Until(from.Add(outage)))
	isRetryable(t, "a change after a while", dev.put(t, tenant, "steady", module(t, "steady and new"), "Idempotency-Key", "steadier"), "access-unavailable")
	if err := bench.StartAPIServer(t.Context()); err != nil {
		t.Fatal(err)
	}
	stopped = false
	back := time.Now()

	// By itself, and what was asked again is done once.
	var again answered
	if err := bench.WaitFor(t.Context(), "the same change to be taken", soon, func(ctx context.Context) (_ bool, err error) {
		if again, err = dev.do(ctx, http.MethodPut, "/v1/functions/steady?tenant="+tenant, module(t, "steady and new"), "Content-Type", "application/wasm", "Idempotency-Key", "steadier"); err != nil {
			return false, nil
		}
		if again.status >= 300 && !again.problem.Retryable {
			return false, fmt.Errorf("it was refused for good: %s", again)
		}
		return again.status < 300, nil
	}); err != nil {
		t.Fatalf("%v; the last answer was %s", err, again)
	}
	t.Logf("the change was served %s after the API server was back", time.Since(back).Round(100*time.Millisecond))
	stop()
	if now := again.function(t); now.Revision != 2 || now.State != v1alpha1.StateReady {
		t.Errorf("%s", again)
	}
	answers(t, f.URL, "steady and new")
	waitObject(t, tenant, "steady", "every node to be warm again", allWarm)
	if is := readBack(t, dev, "steady"); len(is) != 2 || is[0].Revision != 2 || is[1].Revision != 1 {
		t.Errorf("revisions %+v, want two", is)
	}
	// There is a leader, too.
	apply(t, tenant, "steady-applied", map[string]any{"image": f.Image})
	if applied := waitObject(t, tenant, "steady-applied", "what is applied to be recorded and warm", allWarm); applied.Status.Revision != 1 {
		t.Errorf("%+v", applied.Status)
	}
	if err := ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	if after := restarts(allPods(t)); after != before {
		t.Errorf("%d containers were restarted", after-before)
	}
}

// allPods are Hearth's.
func allPods(t *testing.T) []corev1.Pod {
	t.Helper()
	list, err := bench.Client().CoreV1().Pods(chart.Namespace).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return list.Items
}
