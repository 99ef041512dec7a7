package node

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"strconv"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/util/flowcontrol"
	"k8s.io/utils/clock"

	"github.com/hearth-sh/hearth/internal/kube"
)

// EventType is how serious an event is.
type EventType string

// Kubernetes knows these two.
const (
	Normal  = EventType(corev1.EventTypeNormal)
	Warning = EventType(corev1.EventTypeWarning)
)

const (
	// reporter names us in events; the API server wants a qualified name.
	reporter = "hearth.sh/nodeagent"
	// eventQueue holds what waits to be written. A drain of the 110 pods that a
	// kubelet admits by default makes one event for each.
	eventQueue = 256
	// eventBurst events are written at once, then eventsPerSecond.
	eventBurst      = 150
	eventsPerSecond = 1
	// An event that repeats within seriesWindow is counted in the one that is
	// there; at most maxSeries are remembered.
	seriesWindow = 10 * time.Minute
	maxSeries    = 256
	// maxNote is the API server's bound for an event's note (1 kB).
	maxNote = 1000
	// flushDeadline bounds what is written after Run was told to stop.
	flushDeadline = 2 * time.Second
)

// Recorder writes events.k8s.io/v1 events. Recording never blocks: when the
// queue is full an event is dropped and counted. A nil Recorder discards.
type Recorder struct {
	client   kubernetes.Interface
	log      *slog.Logger
	clock    clock.WithTicker
	instance string
	queue    chan eventsv1.Event
	limit    flowcontrol.RateLimiter
	dropped  atomic.Int64

	series map[seriesKey]*series // Run's own
}

type seriesKey struct {
	regarding    types.UID
	reason, note string
}

type series struct {
	namespace, name string
	count           int32
	last            time.Time
}

// NewRecorder returns a recorder that writes as client once Run runs. instance
// tells this reporter from others, such as the node's name.
func NewRecorder(client kubernetes.Interface, instance string, o Options) *Recorder {
	o = o.withDefaults()
	return &Recorder{
		client: client, log: o.Logger, clock: o.Clock, instance: instance,
		queue:  make(chan eventsv1.Event, eventQueue),
		limit:  flowcontrol.NewTokenBucketRateLimiter(eventsPerSecond, eventBurst),
		series: map[seriesKey]*series{},
	}
}

// Node records an event about a Node. reason is one word in CamelCase, note
// one sentence.
func (r *Recorder) Node(n *corev1.Node, kind EventType, reason, note string) {
	// Nodes have no namespace; their events are in "default". The UID is the
	// object's own: an event of a deleted node must not show on its successor.
	r.record(corev1.ObjectReference{APIVersion: "v1", Kind: "Node", Name: n.Name, UID: n.UID}, metav1.NamespaceDefault, kind, reason, note)
}

// Pod records an event about a pod.
func (r *Recorder) Pod(p *corev1.Pod, kind EventType, reason, note string) {
	r.record(corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: p.Namespace, Name: p.Name, UID: p.UID}, p.Namespace, kind, reason, note)
}

// Dropped is how many events found the queue full.
func (r *Recorder) Dropped() int64 {
	if r == nil {
		return 0
	}
	return r.dropped.Load()
}

func (r *Recorder) record(regarding corev1.ObjectReference, namespace string, kind EventType, reason, note string) {
	if r == nil {
		return
	}
	now := r.clock.Now()
	e := eventsv1.Event{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: eventName(regarding.Name, now)},
		EventTime:  metav1.NewMicroTime(now), ReportingController: reporter, ReportingInstance: truncate(r.instance, 128),
		Action: reason, Reason: reason, Regarding: regarding, Type: string(kind), Note: truncate(note, maxNote),
	}
	select {
	case r.queue <- e:
	default:
		r.dropped.Add(1)
	}
}

// eventName is unique like those of client-go: the object's name (at most 253
// bytes with the suffix) and the time in hexadecimal nanoseconds.
func eventName(object string, now time.Time) string {
	const most = 253 - 1 - 16
	return object[:min(len(object), most)] + "." + strconv.FormatInt(now.UnixNano(), 16)
}

// Run writes what is recorded until ctx ends, then what is left, for two
// seconds at most.
func (r *Recorder) Run(ctx context.Context) {
	for {
		select {
		case e := <-r.queue:
			if r.limit.Wait(ctx) == nil {
				r.write(ctx, e)
				continue
			}
			r.flush(ctx, &e)
			return
		case <-ctx.Done():
			r.flush(ctx, nil)
			return
		}
	}
}

func (r *Recorder) flush(ctx context.Context, first *eventsv1.Event) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), flushDeadline)
	defer cancel()
	if first != nil {
		r.write(ctx, *first)
	}
	for ctx.Err() == nil && r.limit.TryAccept() {
		select {
		case e := <-r.queue:
			r.write(ctx, e)
		default:
			return
		}
	}
}

func (r *Recorder) write(ctx context.Context, e eventsv1.Event) {
	ctx, cancel := context.WithTimeout(ctx, kube.CallTimeout)
	defer cancel()
	key := seriesKey{e.Regarding.UID, e.Reason, e.Note}
	if s := r.series[key]; s != nil && e.EventTime.Sub(s.last) <= seriesWindow {
		s.count++
		s.last = e.EventTime.Time
		err := r.repeat(ctx, s)
		if err == nil {
			return
		}
		// The API server forgets events after an hour: then this is a new one.
		if !apierrors.IsNotFound(err) {
			r.log.Warn("event not written", "reason", e.Reason, "error", err)
			return
		}
	}
	if _, err := r.client.EventsV1().Events(e.Namespace).Create(ctx, &e, metav1.CreateOptions{FieldManager: FieldManager}); err != nil {
		// An event is news, not state: it is not worth a retry that would hold
		// up the next one.
		r.log.Warn("event not written", "reason", e.Reason, "error", err)
		return
	}
	if len(r.series) >= maxSeries {
		for k, s := range r.series {
			if e.EventTime.Sub(s.last) > seriesWindow || len(r.series) >= maxSeries {
				delete(r.series, k)
			}
		}
	}
	r.series[key] = &series{namespace: e.Namespace, name: e.Name, count: 1, last: e.EventTime.Time}
}

func (r *Recorder) repeat(ctx context.Context, s *series) error {
	data, err := json.Marshal(map[string]any{"series": eventsv1.EventSeries{Count: s.count, LastObservedTime: metav1.NewMicroTime(s.last)}})
	if err != nil {
		return fmt.Errorf("encode an event series: %w", err)
	}
	_, err = r.client.EventsV1().Events(s.namespace).Patch(ctx, s.name, types.StrategicMergePatchType, data, metav1.PatchOptions{FieldManager: FieldManager})
	return err
}
