package node

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"

	"github.com/hearth-sh/hearth/internal/kube"
)

// DrainOptions configure a Drainer; the zero value is usable.
type DrainOptions struct {
	Options
	// PodNamespace and PodName are this process's own pod, which leaves last;
	// empty outside a pod.
	PodNamespace, PodName string
	// Margin is how long before the deadline every pod should be gone (default
	// 10 s): kubelet, volumes and our own farewell need it.
	Margin time.Duration
	// ForceBefore is how long before the deadline pods that a disruption budget
	// still holds back are deleted with what grace is left, since they will
	// lose the machine anyway (default 30 s; negative: never). It applies to
	// notices with a deadline whose machine goes whatever we do.
	ForceBefore time.Duration
	// DrainOnRebalance evicts on a rebalance recommendation too, instead of
	// only keeping new pods away.
	DrainOnRebalance bool
	// EvictUnmanaged evicts pods without a controller also when the machine may
	// live on (rebalance, manual); otherwise they stay then.
	EvictUnmanaged bool
	// RebalanceTTL is how long a rebalance recommendation counts when nothing
	// follows (default 30 min).
	RebalanceTTL time.Duration
	// ExpireAfter is how long after its deadline a notice counts as not carried
	// out, the machine being still there (default 10 min).
	ExpireAfter time.Duration
	// Concurrency is how many evictions are asked for at once (default 10).
	Concurrency int
	// PollEvery is how often pods are looked at again (default 2 s);
	// RetryBlocked how long a pod that a budget holds back is left in peace
	// (default 5 s, with jitter).
	PollEvery, RetryBlocked time.Duration
}

func (o DrainOptions) withDefaults() DrainOptions {
	o.Options = o.Options.withDefaults()
	for _, d := range []struct {
		value *time.Duration
		def   time.Duration
	}{
		{&o.Margin, 10 * time.Second},
		{&o.ForceBefore, 30 * time.Second},
		{&o.RebalanceTTL, 30 * time.Minute},
		{&o.ExpireAfter, 10 * time.Minute},
		{&o.PollEvery, 2 * time.Second},
		{&o.RetryBlocked, 5 * time.Second},
	} {
		if *d.value == 0 {
			*d.value = d.def
		}
	}
	if o.Concurrency == 0 {
		o.Concurrency = 10
	}
	return o
}

// DrainPhase is how far leaving the node is.
type DrainPhase string

// Idle is the normal state. Cordoned keeps pods away and evicts none. Draining
// ends in Drained, when every pod that leaves is gone, or goes on until the
// machine stops.
const (
	DrainIdle     DrainPhase = "idle"
	DrainCordoned DrainPhase = "cordoned"
	Draining      DrainPhase = "draining"
	Drained       DrainPhase = "drained"
)

// maxNamedPods bounds the pods that a DrainStatus names.
const maxNamedPods = 32

// DrainStatus is a snapshot of a Drainer.
type DrainStatus struct {
	Phase  DrainPhase
	Since  time.Time
	Notice Notice
	// Total counts the pods that leave, Gone those that have left, Terminating
	// those that are ending, Blocked those that a disruption budget holds back.
	Total, Gone, Terminating, Blocked int
	// Forced counts pods deleted past their budget, near the deadline.
	Forced int
	// Left names pods that are still there, at most 32.
	Left []string
	// LastError is what is in the way, "" if nothing.
	LastError string
}

// Drainer leaves the node when a notice says so: it cordons it, taints it and
// evicts its pods within the time that is left, and takes all that back when
// the notice is withdrawn or proves empty. What it does is on the Node object,
// so a restarted agent goes on where the last one stopped.
type Drainer struct {
	clients *kube.Clients
	o       DrainOptions
	taints  *Taints
	notices chan Notice
	undo    chan Notice

	mu     sync.Mutex
	status DrainStatus // guarded by mu
}

// noticeQueue holds words that Run has not taken up yet; sources repeat
// themselves, so more than a few are never outstanding.
const noticeQueue = 16

// NewDrainer returns the drainer of the clients' node, idle until Run.
func NewDrainer(clients *kube.Clients, o DrainOptions) *Drainer {
	o = o.withDefaults()
	return &Drainer{
		clients: clients, o: o, taints: NewTaints(clients, o.Options),
		notices: make(chan Notice, noticeQueue), undo: make(chan Notice, noticeQueue),
		status: DrainStatus{Phase: DrainIdle, Since: o.Clock.Now()},
	}
}

// Notify says that the node should be left. Saying so again changes nothing,
// except that a new deadline takes the place of the old; a more urgent kind
// takes the place of a less urgent one. It does not wait for anything to
// happen; it fails when the notice makes no sense or Run takes none up.
func (d *Drainer) Notify(n Notice) error {
	now := d.o.Clock.Now()
	if n.At.IsZero() {
		n.At = now
	}
	n = n.anchored(now)
	if err := n.validate(); err != nil {
		return err
	}
	select {
	case d.notices <- n:
		return nil
	default:
		return fmt.Errorf("notice %s of node %s: too many notices are waiting", n.Kind, d.clients.NodeName)
	}
}

// Withdraw says that a notice no longer holds. If it is the one that is acted
// upon, the node is given back.
func (d *Drainer) Withdraw(kind NoticeKind, id string) error {
	n := Notice{Kind: kind, ID: id}
	if err := n.validate(); err != nil {
		return err
	}
	select {
	case d.undo <- n:
		return nil
	default:
		return fmt.Errorf("withdrawal of notice %s of node %s: too many are waiting", kind, d.clients.NodeName)
	}
}

// Status returns a snapshot.
func (d *Drainer) Status() DrainStatus {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := d.status
	s.Left = slices.Clone(s.Left)
	return s
}

func (d *Drainer) report(change func(*DrainStatus)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	phase := d.status.Phase
	change(&d.status)
	if d.status.Phase != phase {
		d.status.Since = d.o.Clock.Now()
	}
}

// Run acts on notices until ctx ends, first of all on the one that an earlier
// process left on the Node. When ctx ends, what was begun stays as it is for
// the next process. It always returns ctx's error.
func (d *Drainer) Run(ctx context.Context) error {
	current, resumed := d.resume(ctx)
	var work *drainWork
	if at := d.expiresAt(current); resumed && !at.IsZero() && !d.o.Clock.Now().Before(at) {
		// The machine was stopped and started again, or the notice came to
		// nothing while we were away: nobody must be evicted for it now.
		if !d.giveBack(ctx, current, true) {
			return ctx.Err()
		}
	} else if resumed {
		work = d.begin(ctx, current)
	}
	defer func() { work.stop() }()
	for {
		expiry, stopExpiry := d.expiry(work, current)
		var expired bool
		select {
		case <-ctx.Done():
			stopExpiry()
			return ctx.Err()
		case n := <-d.notices:
			stopExpiry()
			if work != nil && !n.overrides(current) {
				continue
			}
			if work != nil && n.same(current) {
				n.At = current.At
			}
			work.stop()
			current = n
			work = d.begin(ctx, n)
			continue
		case n := <-d.undo:
			stopExpiry()
			if work == nil || !n.same(current) {
				continue
			}
		case <-expiry:
			expired = true
		}
		work.stop()
		if !d.giveBack(ctx, current, expired) {
			return ctx.Err()
		}
		work = nil
	}
}

// expiry fires when the current notice proves empty.
func (d *Drainer) expiry(work *drainWork, n Notice) (<-chan time.Time, func()) {
	if work == nil {
		return nil, func() {}
	}
	at := d.expiresAt(n)
	if at.IsZero() {
		return nil, func() {}
	}
	timer := d.o.Clock.NewTimer(max(0, at.Sub(d.o.Clock.Now())))
	return timer.C(), func() { timer.Stop() }
}

func (d *Drainer) expiresAt(n Notice) time.Time {
	switch {
	case n.Kind == Rebalance:
		return n.At.Add(d.o.RebalanceTTL)
	case n.Kind == Manual || n.Deadline.IsZero():
		return time.Time{} // until somebody withdraws it
	}
	return n.Deadline.Add(d.o.ExpireAfter)
}

// drainWork is the goroutine that acts on one notice.
type drainWork struct {
	cancel context.CancelFunc
	done   chan struct{}
}

func (w *drainWork) stop() {
	if w == nil {
		return
	}
	w.cancel()
	<-w.done
}

func (d *Drainer) begin(ctx context.Context, n Notice) *drainWork {
	ctx, cancel := context.WithCancel(ctx)
	w := &drainWork{cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(w.done)
		defer cancel()
		d.leave(ctx, n)
	}()
	return w
}

// leave acts on one notice until the node is empty or ctx ends.
func (d *Drainer) leave(ctx context.Context, n Notice) {
	evicts := n.Kind != Rebalance || d.o.DrainOnRebalance
	d.report(func(s *DrainStatus) {
		*s = DrainStatus{Phase: DrainCordoned, Since: s.Since, Notice: n}
		if evicts {
			s.Phase = Draining
		}
	})
	log := d.o.Logger.With("node", d.clients.NodeName, "notice", n.Kind, "deadline", n.Deadline)
	log.Warn("leaving the node")
	// The cordon must not hold up the evictions: with two minutes left, a
	// Node that cannot be written is no reason to let pods die unwarned.
	var background sync.WaitGroup
	var cordoned atomic.Bool
	background.Go(func() {
		d.keepTrying(ctx, "cordon", func(ctx context.Context) error { return d.cordon(ctx, n) })
		cordoned.Store(ctx.Err() == nil)
	})
	background.Go(func() {
		d.keepTrying(ctx, "taint", func(ctx context.Context) error {
			err := d.taints.Interrupted(ctx, true)
			if errors.Is(err, ErrNoTaintAuthority) {
				log.Info("interruption taint not set", "reason", err)
				return nil // the cordon does as well
			}
			return err
		})
	})
	if evicts {
		d.drain(ctx, n, &cordoned)
	}
	background.Wait()
}

// keepTrying repeats a step that failed until it succeeds or ctx ends.
func (d *Drainer) keepTrying(ctx context.Context, step string, do func(context.Context) error) {
	for {
		err := do(ctx)
		if err == nil || ctx.Err() != nil {
			return
		}
		d.o.Logger.Warn("drain step failed, will retry", "step", step, "error", err)
		d.report(func(s *DrainStatus) { s.LastError = err.Error() })
		select {
		case <-ctx.Done():
			return
		case <-d.o.Clock.After(d.o.PollEvery/2 + rand.N(d.o.PollEvery)):
		}
	}
}

// leaving is what a drain knows of one pod, by UID.
type leaving struct {
	wave wave
	// next is when it may be asked (again) to go.
	next time.Time
	// accepted: the API server agreed. blocked: a budget holds it back.
	// forced: it was deleted past its budget.
	accepted, blocked, forced bool
}

// drain evicts wave after wave until nothing is left or ctx ends. Everything is
// looked at again in each round, so pods that were bound before the cordon took
// effect are found, and nothing needs to be remembered across a restart.
func (d *Drainer) drain(ctx context.Context, n Notice, cordoned *atomic.Bool) {
	known := map[types.UID]*leaving{}
	announced := false
	for {
		// Read before the pods are: what is bound afterwards is bound against
		// the cordon.
		closed := cordoned.Load()
		pods, err := d.pods(ctx)
		if err == nil {
			if !announced {
				announced = true
				d.announce(ctx, Warning, "DrainStarted", fmt.Sprintf("Evicting pods because of a notice of %s%s.", n.Kind, until(n.Deadline)))
			}
			left := d.round(ctx, n, pods, known)
			if left == 0 && closed {
				d.report(func(s *DrainStatus) { s.Phase = Drained })
				d.announce(ctx, Normal, "DrainCompleted", fmt.Sprintf("All %d pods that can leave have left.", len(known)))
				d.o.Logger.Info("node drained", "node", d.clients.NodeName, "pods", len(known))
				return
			}
		} else if ctx.Err() == nil {
			d.report(func(s *DrainStatus) { s.LastError = err.Error() })
			d.o.Logger.Warn("pods of the node not listed", "node", d.clients.NodeName, "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-d.o.Clock.After(d.o.PollEvery):
		}
	}
}

// podPage bounds one answer of the API server.
const podPage = 500

func (d *Drainer) pods(ctx context.Context) ([]corev1.Pod, error) {
	var pods []corev1.Pod
	options := metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector("spec.nodeName", d.clients.NodeName).String(), Limit: podPage}
	for {
		page, err := func() (*corev1.PodList, error) {
			ctx, cancel := context.WithTimeout(ctx, kube.CallTimeout)
			defer cancel()
			return d.clients.Node.CoreV1().Pods(metav1.NamespaceAll).List(ctx, options)
		}()
		if err != nil {
			return nil, fmt.Errorf("list the pods of node %s: %w", d.clients.NodeName, err)
		}
		pods = append(pods, page.Items...)
		if options.Continue = page.Continue; options.Continue == "" {
			return pods, nil
		}
	}
}

// round asks the pods whose turn it is to go and returns how many are left.
func (d *Drainer) round(ctx context.Context, n Notice, pods []corev1.Pod, known map[types.UID]*leaving) int {
	self := podName{d.o.PodNamespace, d.o.PodName}
	here := map[types.UID]*corev1.Pod{}
	turn := own
	for i := range pods {
		p := &pods[i]
		w := waveOf(p, self, n.Kind.final() || d.o.EvictUnmanaged)
		l := known[p.UID]
		if l == nil {
			if w == stays {
				continue
			}
			l = &leaving{wave: w}
			known[p.UID] = l
		}
		// A pod that was asked to go counts until its object is gone, even when
		// its containers have ended: kubelet still has volumes to unmount.
		here[p.UID] = p
		turn = min(turn, l.wave)
	}
	now := d.o.Clock.Now()
	if d.hurry(n, now) {
		turn = max(turn, critical) // no time left for one wave after the other
	}
	d.report(func(s *DrainStatus) { s.LastError = "" }) // said again by what still is in the way
	var asks sync.WaitGroup
	slots := make(chan struct{}, d.o.Concurrency)
	for uid, p := range here {
		l := known[uid]
		force := d.force(n, now) && !l.accepted
		switch {
		case p.DeletionTimestamp != nil:
			// Somebody else (or we, for a less urgent notice) gave it more time
			// than there is. The API server takes the shorter period; a kubelet
			// may still wait for a preStop hook that has begun.
			if n.Deadline.IsZero() || !p.DeletionTimestamp.After(n.Deadline.Add(-d.o.Margin+time.Second)) || now.Before(l.next) {
				continue
			}
			l.next = now.Add(d.o.RetryBlocked)
			force = true
		case l.accepted || l.wave > turn || now.Before(l.next) && !force:
			continue
		}
		asks.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			d.ask(ctx, n, p, l, force)
		})
	}
	asks.Wait()

	d.report(func(s *DrainStatus) {
		s.Total, s.Gone = len(known), len(known)-len(here)
		s.Terminating, s.Blocked, s.Forced, s.Left = 0, 0, 0, nil
		for _, l := range known {
			if l.forced {
				s.Forced++
			}
		}
		for uid, p := range here {
			switch l := known[uid]; {
			case p.DeletionTimestamp != nil || l.accepted:
				s.Terminating++
			case l.blocked:
				s.Blocked++
				s.LastError = fmt.Sprintf("pod %s is held back by a disruption budget", nameOf(p))
			}
			s.Left = append(s.Left, nameOf(p).String())
		}
		slices.Sort(s.Left)
		s.Left = s.Left[:min(len(s.Left), maxNamedPods)]
	})
	// Our own pod cannot wait for its own end.
	left := 0
	for uid := range here {
		if l := known[uid]; l.wave != own || !l.accepted {
			left++
		}
	}
	return left
}

// ask evicts one pod, or deletes it when force is set.
func (d *Drainer) ask(ctx context.Context, n Notice, p *corev1.Pod, l *leaving, force bool) {
	ctx, cancel := context.WithTimeout(ctx, kube.CallTimeout)
	defer cancel()
	now := d.o.Clock.Now()
	// UID: not the pod that took its name meanwhile.
	options := metav1.DeleteOptions{
		GracePeriodSeconds: graceFor(p, n.Deadline.Sub(now), d.o.Margin, !n.Deadline.IsZero()),
		Preconditions:      &metav1.Preconditions{UID: &p.UID},
	}
	var err error
	if force {
		err = d.clients.Node.CoreV1().Pods(p.Namespace).Delete(ctx, p.Name, options)
	} else {
		err = d.clients.Node.PolicyV1().Evictions(p.Namespace).Evict(ctx, &policyv1.Eviction{
			ObjectMeta: metav1.ObjectMeta{Namespace: p.Namespace, Name: p.Name}, DeleteOptions: &options,
		})
	}
	switch {
	case err == nil:
		l.accepted, l.blocked = true, false
		note := fmt.Sprintf("Evicted because of a notice of %s%s.", n.Kind, until(n.Deadline))
		switch {
		case force && p.DeletionTimestamp != nil:
			note = fmt.Sprintf("Told to end sooner because of a notice of %s%s.", n.Kind, until(n.Deadline))
		case force:
			l.forced = true
			note = fmt.Sprintf("Deleted past its disruption budget because of a notice of %s%s.", n.Kind, until(n.Deadline))
		}
		if g := options.GracePeriodSeconds; g != nil {
			note += " Its grace period was shortened to " + strconv.FormatInt(*g, 10) + " s to fit."
		}
		d.o.Events.Pod(p, Normal, "NodeLeaving", note)
		d.o.Logger.Info("pod asked to leave", "pod", nameOf(p).String(), "forced", force)
	case apierrors.IsNotFound(err) || apierrors.IsConflict(err):
		l.next = now.Add(d.o.PollEvery) // gone; the next list will say so
	case apierrors.IsTooManyRequests(err):
		// A disruption budget, or the API server itself; both ask for time.
		if !l.blocked {
			d.o.Events.Pod(p, Warning, "EvictionBlocked", "A disruption budget does not let this pod leave its node now: "+err.Error())
		}
		l.blocked = true
		pause := d.o.RetryBlocked
		if after, ok := apierrors.SuggestsClientDelay(err); ok {
			pause = max(pause, time.Duration(after)*time.Second)
		}
		l.next = now.Add(min(pause, time.Minute) + rand.N(pause/4+1))
	default:
		// Also 500, which the API server answers for a pod with two budgets.
		l.next = now.Add(d.o.RetryBlocked)
		if ctx.Err() == nil || errors.Is(ctx.Err(), context.DeadlineExceeded) {
			d.o.Logger.Warn("pod not evicted", "pod", nameOf(p).String(), "error", err)
			d.report(func(s *DrainStatus) { s.LastError = fmt.Sprintf("evict pod %s: %v", nameOf(p), err) })
		}
	}
}

// force says whether budgets no longer count.
func (d *Drainer) force(n Notice, now time.Time) bool {
	return n.Kind.final() && !n.Deadline.IsZero() && d.o.ForceBefore >= 0 && n.Deadline.Sub(now) <= d.o.ForceBefore
}

// hurry says whether critical pods must go now to get any grace at all.
func (d *Drainer) hurry(n Notice, now time.Time) bool {
	return !n.Deadline.IsZero() && n.Deadline.Sub(now) <= d.o.Margin+max(0, d.o.ForceBefore)
}

func (d *Drainer) announce(ctx context.Context, kind EventType, reason, note string) {
	if d.o.Events == nil {
		return
	}
	n, err := get(ctx, d.clients.Node, d.clients.NodeName)
	if err != nil {
		return // the event is for people; the log has it as well
	}
	d.o.Events.Node(n, kind, reason, note)
}

func until(deadline time.Time) string {
	if deadline.IsZero() {
		return ""
	}
	return ", with time until " + deadline.UTC().Format(time.RFC3339)
}
