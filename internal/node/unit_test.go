package node

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes/fake"
	clocktesting "k8s.io/utils/clock/testing"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/kube"
	"github.com/hearth-sh/hearth/test/wallclock"
)

var epoch = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func TestLabelChangeNamesOnlyWhatChanges(t *testing.T) {
	for name, test := range map[string]struct {
		have   map[string]string
		wanted map[string]wish
		change map[string]any
	}{
		"a proven runtime is labelled":             {nil, map[string]wish{"spin": present}, map[string]any{"hearth.sh/runtime-spin": "true"}},
		"a label that is there is not written":     {map[string]string{"hearth.sh/runtime-spin": "true"}, map[string]wish{"spin": present}, map[string]any{}},
		"a wrong value is put right":               {map[string]string{"hearth.sh/runtime-spin": "yes"}, map[string]wish{"spin": present}, map[string]any{"hearth.sh/runtime-spin": "true"}},
		"a failed runtime loses its label":         {map[string]string{"hearth.sh/runtime-spin": "true"}, map[string]wish{"spin": absent}, map[string]any{"hearth.sh/runtime-spin": nil}},
		"an unnamed runtime loses its label":       {map[string]string{"hearth.sh/runtime-old": "true"}, map[string]wish{}, map[string]any{"hearth.sh/runtime-old": nil}},
		"an unknown runtime keeps its label":       {map[string]string{"hearth.sh/runtime-spin": "true"}, map[string]wish{"spin": keep}, map[string]any{}},
		"an unknown runtime gets no label":         {nil, map[string]wish{"spin": keep}, map[string]any{}},
		"a label of others is never touched":       {map[string]string{"kubernetes.io/arch": "arm64", "hearth.sh/pool": "a"}, map[string]wish{}, map[string]any{}},
		"absent and wanted absent is not a change": {nil, map[string]wish{"spin": absent}, map[string]any{}},
	} {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(test.change, labelChange(test.have, test.wanted)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestAMissingAnswerRemovesALabelOnlyWhenStale(t *testing.T) {
	clock := clocktesting.NewFakeClock(epoch)
	l := NewLabels(&kube.Clients{NodeName: "a"}, 10*time.Minute, Options{Clock: clock})
	ask := func(p ProofState) wish { return l.wanted(map[string]ProofState{"spin": p})["spin"] }
	steps := []struct {
		after time.Duration
		proof ProofState
		want  wish
	}{
		{0, Unknown, keep},                 // just started: what a previous process wrote stays
		{9 * time.Minute, Unknown, keep},   // not yet stale
		{2 * time.Minute, Unknown, absent}, // stale since the start
		{0, Proven, present},
		{9 * time.Minute, Unknown, keep},
		{0, Failed, absent},  // an answer counts at once
		{0, Unknown, keep},   // keeps that there is none
		{0, Proven, present}, //
		{time.Hour, Proven, present},
		{11 * time.Minute, Unknown, absent},
	}
	for i, s := range steps {
		clock.Step(s.after)
		if got := ask(s.proof); got != s.want {
			t.Fatalf("step %d: wish %d, want %d", i, got, s.want)
		}
	}
}

func TestNoRuntimesAtAllIsAMistake(t *testing.T) {
	l := NewLabels(&kube.Clients{NodeName: "a"}, 0, Options{})
	if err := l.Sync(t.Context(), nil); err == nil {
		t.Error("nil proofs must not remove every label")
	}
	if err := l.Sync(t.Context(), map[string]ProofState{"no/such name": Proven}); err == nil {
		t.Error("a name that cannot be a label is an error")
	}
}

func TestWithTaintTouchesOnlyItsKey(t *testing.T) {
	other := corev1.Taint{Key: "node.kubernetes.io/unschedulable", Effect: corev1.TaintEffectNoSchedule}
	ours := corev1.Taint{Key: v1alpha1.TaintNotReady, Effect: corev1.TaintEffectNoSchedule}
	wrong := corev1.Taint{Key: v1alpha1.TaintNotReady, Effect: corev1.TaintEffectNoExecute}
	for name, test := range map[string]struct {
		have    []corev1.Taint
		effect  corev1.TaintEffect
		want    []corev1.Taint
		changed bool
	}{
		"added":                   {[]corev1.Taint{other}, ours.Effect, []corev1.Taint{other, ours}, true},
		"there already":           {[]corev1.Taint{ours, other}, ours.Effect, []corev1.Taint{ours, other}, false},
		"removed":                 {[]corev1.Taint{ours, other}, "", []corev1.Taint{other}, true},
		"gone already":            {[]corev1.Taint{other}, "", []corev1.Taint{other}, false},
		"another effect is ours":  {[]corev1.Taint{wrong}, ours.Effect, []corev1.Taint{ours}, true},
		"every effect is removed": {[]corev1.Taint{wrong, ours, other}, "", []corev1.Taint{other}, true},
	} {
		t.Run(name, func(t *testing.T) {
			got, changed := withTaint(test.have, v1alpha1.TaintNotReady, test.effect)
			if diff := cmp.Diff(test.want, got); diff != "" || changed != test.changed {
				t.Errorf("changed %t, want %t; %s", changed, test.changed, diff)
			}
		})
	}
}

func podOf(change func(*corev1.Pod)) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "p", OwnerReferences: []metav1.OwnerReference{{Kind: "ReplicaSet", Controller: new(true)}}}}
	change(p)
	return p
}

func TestWhichPodsLeaveAndWhen(t *testing.T) {
	self := podName{"hearth-system", "agent"}
	for name, test := range map[string]struct {
		pod          *corev1.Pod
		final        wave
		machineStays wave
	}{
		"ordinary":         {podOf(func(*corev1.Pod) {}), ordinary, ordinary},
		"DaemonSet":        {podOf(func(p *corev1.Pod) { p.OwnerReferences[0].Kind = "DaemonSet" }), stays, stays},
		"mirror":           {podOf(func(p *corev1.Pod) { p.Annotations = map[string]string{corev1.MirrorPodAnnotationKey: "x"} }), stays, stays},
		"succeeded":        {podOf(func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded }), stays, stays},
		"failed":           {podOf(func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed }), stays, stays},
		"node-critical":    {podOf(func(p *corev1.Pod) { p.Spec.PriorityClassName = "system-node-critical" }), stays, stays},
		"more than that":   {podOf(func(p *corev1.Pod) { p.Spec.Priority = new(int32(2_000_001_000)) }), stays, stays},
		"cluster-critical": {podOf(func(p *corev1.Pod) { p.Spec.Priority = new(int32(2_000_000_000)) }), critical, critical},
		"unmanaged":        {podOf(func(p *corev1.Pod) { p.OwnerReferences = nil }), ordinary, stays},
		"own":              {podOf(func(p *corev1.Pod) { p.Namespace, p.Name = self.namespace, self.name }), own, own},
	} {
		t.Run(name, func(t *testing.T) {
			if got := waveOf(test.pod, self, true); got != test.final {
				t.Errorf("when the machine goes: wave %d, want %d", got, test.final)
			}
			if got := waveOf(test.pod, self, false); got != test.machineStays {
				t.Errorf("when it may stay: wave %d, want %d", got, test.machineStays)
			}
		})
	}
}

func TestGracePeriodsAreShortenedOnlyToFit(t *testing.T) {
	for name, test := range map[string]struct {
		own      *int64
		left     time.Duration
		deadline bool
		want     *int64
	}{
		"enough time":              {new(int64(30)), 2 * time.Minute, true, nil},
		"too little time":          {new(int64(600)), 2 * time.Minute, true, new(int64(110))},
		"the default of 30 s":      {nil, 20 * time.Second, true, new(int64(10))},
		"never 0":                  {new(int64(600)), -time.Minute, true, new(int64(1))},
		"a pod's own 0 stays":      {new(int64(0)), time.Minute, true, nil},
		"no deadline, no changing": {new(int64(600)), 0, false, nil},
	} {
		t.Run(name, func(t *testing.T) {
			p := &corev1.Pod{Spec: corev1.PodSpec{TerminationGracePeriodSeconds: test.own}}
			if diff := cmp.Diff(test.want, graceFor(p, test.left, 10*time.Second, test.deadline)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestMoreUrgentNoticesTakeOver(t *testing.T) {
	rebalance := Notice{Kind: Rebalance}
	spot := Notice{Kind: SpotInterruption, Deadline: epoch}
	later := Notice{Kind: SpotInterruption, Deadline: epoch.Add(time.Minute)}
	for name, test := range map[string]struct {
		new, current Notice
		want         bool
	}{
		"spot over rebalance":         {spot, rebalance, true},
		"rebalance under spot":        {rebalance, spot, false},
		"the same again":              {spot, spot, false},
		"a new deadline":              {later, spot, true},
		"another of the same urgency": {Notice{Kind: Maintenance, ID: "b"}, Notice{Kind: Maintenance, ID: "a"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			if got := test.new.overrides(test.current); got != test.want {
				t.Errorf("overrides: %t", got)
			}
		})
	}
}

func TestSettingTheClockMovesNoDeadline(t *testing.T) {
	began := time.Now()
	d := NewDrainer(&kube.Clients{NodeName: "a"}, DrainOptions{})
	// As instance metadata and annotations have it: without a monotonic reading.
	if err := d.Notify(Notice{Kind: SpotInterruption, Deadline: began.Round(0).Add(2 * time.Minute)}); err != nil {
		t.Fatal(err)
	}
	n := <-d.notices
	p := podOf(func(p *corev1.Pod) { p.Spec.TerminationGracePeriodSeconds = new(int64(600)) })
	for name, by := range map[string]time.Duration{"not at all": 0, "an hour forward": time.Hour, "an hour back": -time.Hour} {
		t.Run(name, func(t *testing.T) {
			now := wallclock.Jumped(began.Add(time.Minute), by)
			if d.force(n, now) || d.hurry(n, now) {
				t.Error("budgets count no more although there is a minute left")
			}
			if g := graceFor(p, n.Deadline.Sub(now), d.o.Margin, true); g == nil || *g < 45 || *g > 50 {
				t.Errorf("a pod is given %v seconds of the minute that is left", g)
			}
			late := wallclock.Jumped(began.Add(95*time.Second), by)
			if !d.force(n, late) {
				t.Error("budgets still count although there are 25 seconds left")
			}
			if left := d.expiresAt(n).Sub(now); left < 10*time.Minute || left > 12*time.Minute {
				t.Errorf("the notice counts for %s more", left)
			}
		})
	}
}

func TestAnchoredTimesStayWhatTheyAre(t *testing.T) {
	now := time.Now()
	n := Notice{Kind: Rebalance, At: now.Round(0).Add(-time.Minute), Deadline: now.Round(0).Add(time.Minute)}
	if got := n.anchored(now); !got.At.Equal(n.At) || !got.Deadline.Equal(n.Deadline) {
		t.Errorf("%+v became %+v", n, got)
	}
	if got := (Notice{Kind: Manual}).anchored(now); !got.At.IsZero() || !got.Deadline.IsZero() {
		t.Errorf("no times became %+v", got)
	}
	// A recommendation of the future would count for longer than its time.
	if got := (Notice{Kind: Rebalance, At: now.Add(time.Hour)}).anchored(now); !got.At.Equal(now) {
		t.Errorf("heard at %s, now is %s", got.At, now)
	}
}

func TestSettingTheClockMakesNoProofOrHeartbeatStale(t *testing.T) {
	for name, by := range map[string]time.Duration{"an hour forward": time.Hour, "an hour back": -time.Hour} {
		t.Run(name, func(t *testing.T) {
			began := time.Now()
			clock := &setClock{FakeClock: clocktesting.NewFakeClock(began), now: began}
			l := NewLabels(&kube.Clients{NodeName: "a"}, 10*time.Minute, Options{Clock: clock})
			ask := func(p ProofState) wish { return l.wanted(map[string]ProofState{"spin": p})["spin"] }
			s := NewStaleConditions(nil, 3*time.Minute, Options{Clock: clock})
			n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "a", UID: "1"}, Status: corev1.NodeStatus{
				Conditions: []corev1.NodeCondition{{Type: v1alpha1.NodeConditionWasmReady, LastHeartbeatTime: metav1.NewTime(began)}}}}
			ask(Proven)
			s.silence(n)
			clock.now = wallclock.Jumped(began.Add(time.Minute), by)
			if got := ask(Unknown); got != keep {
				t.Errorf("a minute after its proof a label has the wish %d", got)
			}
			if silent := s.silence(n); silent != time.Minute {
				t.Errorf("a minute of silence is taken for %s", silent)
			}
			clock.now = wallclock.Jumped(began.Add(11*time.Minute), by)
			if got := ask(Unknown); got != absent {
				t.Errorf("11 minutes after its proof a label has the wish %d", got)
			}
		})
	}
}

// setClock tells the time it was given.
type setClock struct {
	*clocktesting.FakeClock
	now time.Time
}

func (c *setClock) Now() time.Time { return c.now }

func FuzzParseNotice(f *testing.F) {
	f.Add(`{"kind":"rebalance","at":"2026-03-01T12:00:00Z"}`)
	f.Add(`{"kind":"spot-interruption","id":"x","deadline":"2026-03-01T12:02:00Z"}`)
	f.Add(`[]`)
	f.Add(strings.Repeat("x", 2000))
	f.Fuzz(func(t *testing.T, s string) {
		n, err := parseNotice(s)
		if err == nil && n.validate() != nil {
			t.Errorf("%q was accepted and is not valid", s)
		}
	})
}

func TestNoticesThatMakeNoSenseAreRefused(t *testing.T) {
	d := NewDrainer(&kube.Clients{NodeName: "a"}, DrainOptions{})
	if err := d.Notify(Notice{Kind: "flood"}); err == nil {
		t.Error("an unknown kind")
	}
	if err := d.Notify(Notice{Kind: Manual, ID: strings.Repeat("x", 200)}); err == nil {
		t.Error("a huge ID")
	}
	for range noticeQueue {
		if err := d.Notify(Notice{Kind: Manual}); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Notify(Notice{Kind: Manual}); err == nil {
		t.Error("a full queue must not block")
	}
}

func TestStaleMeansUnchangedByOurOwnClock(t *testing.T) {
	clock := clocktesting.NewFakeClock(epoch)
	s := NewStaleConditions(nil, 3*time.Minute, Options{Clock: clock})
	stale := func(n *corev1.Node) bool { return s.silence(n) > s.staleAfter }
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "a", UID: "1"}}
	beat := func(at time.Time, status corev1.ConditionStatus) {
		n.Status.Conditions = []corev1.NodeCondition{{Type: v1alpha1.NodeConditionWasmReady, Status: status, LastHeartbeatTime: metav1.NewTime(at)}}
	}
	if stale(n) {
		t.Error("a node without the condition")
	}
	beat(epoch.Add(-24*time.Hour), corev1.ConditionTrue) // a clock that is a day behind
	if stale(n) {
		t.Error("a heartbeat that was just seen for the first time")
	}
	clock.Step(2 * time.Minute)
	beat(epoch.Add(-24*time.Hour+time.Minute), corev1.ConditionTrue)
	if stale(n) {
		t.Error("a heartbeat that goes on")
	}
	clock.Step(3*time.Minute + time.Second)
	if !stale(n) {
		t.Error("a heartbeat that stopped")
	}
}

func TestWhatACrashedAgentSaidStandsWhileTheNextOneStarts(t *testing.T) {
	for name, test := range map[string]struct{ heartbeat, stands time.Duration }{
		"with the usual heartbeat": {0, 3 * DefaultHeartbeat},
		"with the fastest":         {MinHeartbeat, leftAlone},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client := fake.NewClientset(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "a"}, Status: corev1.NodeStatus{
					Conditions: []corev1.NodeCondition{{Type: v1alpha1.NodeConditionWasmReady, Status: corev1.ConditionTrue, Reason: "RuntimesProven"}}}})
				says := func() string {
					t.Helper()
					n, err := client.CoreV1().Nodes().Get(t.Context(), "a", metav1.GetOptions{})
					if err != nil || wasmReady(n) == nil {
						t.Fatalf("%+v, %v", n, err)
					}
					return wasmReady(n).Reason
				}
				ctx, cancel := context.WithCancel(t.Context())
				done := make(chan error)
				go func() {
					done <- NewCondition(&kube.Clients{Node: client, NodeName: "a"}, test.heartbeat, Options{}).Run(ctx)
				}()
				time.Sleep(test.stands - time.Second)
				if got := says(); got != "RuntimesProven" {
					t.Errorf("while the agent starts the node says %s", got)
				}
				time.Sleep(2 * time.Second)
				if got := says(); got != "NotProbedYet" {
					t.Errorf("after %s the node says %s", test.stands, got)
				}
				cancel()
				if err := <-done; err != nil || says() != reasonStopped {
					t.Errorf("at its end it says %s: %v", says(), err)
				}
			})
		})
	}
}

func TestARecorderNeverBlocksAndCountsWhatItDrops(t *testing.T) {
	r := NewRecorder(nil, "a", Options{})
	for range eventQueue + 3 {
		r.Node(&corev1.Node{}, Normal, "X", "y")
	}
	if got := r.Dropped(); got != 3 {
		t.Errorf("dropped %d", got)
	}
	var none *Recorder
	none.Node(&corev1.Node{}, Normal, "X", "y") // discards
}

func TestEventNamesFitAndDiffer(t *testing.T) {
	long := strings.Repeat("n", 253)
	a, b := eventName(long, epoch), eventName(long, epoch.Add(1))
	if len(a) > 253 || a == b {
		t.Errorf("%d bytes, equal %t", len(a), a == b)
	}
}

func TestSpotServersAreCalledOut(t *testing.T) {
	server := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "a", Labels: map[string]string{"node-role.kubernetes.io/control-plane": "true"}}}
	if _, warn := SpotServer(server, "spot"); !warn {
		t.Error("a server on Spot")
	}
	if _, warn := SpotServer(server, "on-demand"); warn {
		t.Error("a server on demand")
	}
	if _, warn := SpotServer(&corev1.Node{}, "spot"); warn {
		t.Error("a worker on Spot")
	}
}

func TestTruncateKeepsWholeCharacters(t *testing.T) {
	if got := truncate(strings.Repeat("ä", 300), 512); len(got) > 512 || !strings.HasSuffix(got, "ä…") {
		t.Errorf("%d bytes: …%q", len(got), got[len(got)-8:])
	}
}

func TestDrainMetrics(t *testing.T) {
	registry := prometheus.NewPedanticRegistry()
	if err := registry.Register(NewDrainer(&kube.Clients{NodeName: "a"}, DrainOptions{}).Collector()); err != nil {
		t.Fatal(err)
	}
	families, err := registry.Gather()
	if err != nil || len(families) != 4 {
		t.Errorf("%d families: %v", len(families), err)
	}
}

func TestRetryOnConflictGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		attempts := 0
		err := retryOnConflict(t.Context(), Options{}.withDefaults().Clock, func(ctx context.Context) error {
			attempts++
			return apierrors.NewConflict(schema.GroupResource{Resource: "nodes"}, "a", errors.New("changed"))
		})
		if !apierrors.IsConflict(err) || attempts < 5 {
			t.Errorf("after %d attempts: %v", attempts, err)
		}
	})
}
