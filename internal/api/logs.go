package api

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/hearth-sh/hearth/internal/engine/control"
)

const (
	// searchLines is how many of an engine's last lines are searched for those
	// of one function: containers' logs are rotated at about as many.
	searchLines = 20_000
	// maxLogLine bounds one line of an engine; guests' lines are cut at less.
	maxLogLine = 128 << 10
	// enginesEvery is how often a follower looks for engines that are new.
	enginesEvery = 5 * time.Second
	// logPieces is how many lines a follower may be behind an engine.
	logPieces = 1024
)

// engineLogs finds functions' logs in the logs of the engines' pods, where
// they are written as control.LogRecord lines. They last as long as kubelet
// keeps them; whoever wants more collects the pods' logs.
type engineLogs struct {
	client    kubernetes.Interface
	namespace string
	log       *slog.Logger
	// tenant says whose a function is: a name may have had another owner, whose
	// lines are not for the new one.
	tenant func(ctx context.Context, function string) (string, error)
}

// Logs implements submit.LogSource.
func (l *engineLogs) Logs(ctx context.Context, function string, follow bool, tail int, since time.Time) (io.ReadCloser, error) {
	tenant, err := l.tenant(ctx, function)
	if err != nil {
		return nil, err
	}
	pods, err := l.engines(ctx)
	if err != nil {
		return nil, err
	}
	past, seen, err := l.past(ctx, pods, tenant, function, since)
	if err != nil {
		return nil, err
	}
	if len(past) > tail {
		past = past[len(past)-tail:]
	}
	var head bytes.Buffer
	for _, line := range past {
		head.Write(line.text)
	}
	if !follow {
		return io.NopCloser(&head), nil
	}
	ctx, cancel := context.WithCancel(ctx)
	f := &follower{
		logs: l, tenant: tenant, function: function, seen: seen, began: time.Now(),
		lines: make(chan []byte, logPieces), cancel: cancel, rest: head.Bytes(), ctx: ctx,
	}
	f.running.Go(func() { f.run(ctx, pods) })
	return f, nil
}

func (l *engineLogs) engines(ctx context.Context) ([]corev1.Pod, error) {
	list, err := l.client.CoreV1().Pods(l.namespace).List(ctx, metav1.ListOptions{
		LabelSelector: "app.kubernetes.io/name=hearth,app.kubernetes.io/component=engine", ResourceVersion: "0",
	})
	if err != nil {
		return nil, fmt.Errorf("look for the engines: %w", err)
	}
	return slices.DeleteFunc(list.Items, func(p corev1.Pod) bool { return p.Status.Phase != corev1.PodRunning }), nil
}

type logLine struct {
	at   time.Time
	text []byte // with its newline
}

// past collects what the engines have of a function, oldest first, and per pod
// the time of the last line that was looked at. An engine that does not answer
// is left out: its node may be gone, the others' lines are still worth having.
func (l *engineLogs) past(ctx context.Context, pods []corev1.Pod, tenant, function string, since time.Time) ([]logLine, map[string]time.Time, error) {
	var (
		mu    sync.Mutex
		lines []logLine
		seen  = map[string]time.Time{}
		fails []error
		all   sync.WaitGroup
	)
	for _, pod := range pods {
		all.Go(func() {
			o := &corev1.PodLogOptions{Container: "engine", Timestamps: true, TailLines: new(int64(searchLines))}
			if !since.IsZero() {
				o.SinceTime = new(metav1.NewTime(since))
			}
			var found []logLine
			last, err := l.read(ctx, pod.Name, o, time.Time{}, func(_ time.Time, record []byte) {
				if line, when, ok := ownLine(record, tenant, function); ok && !when.Before(since) {
					found = append(found, logLine{when, line})
				}
			})
			mu.Lock()
			defer mu.Unlock()
			lines = append(lines, found...)
			seen[pod.Name] = last
			if err != nil {
				l.log.Warn("an engine's log was not read", "pod", pod.Name, "error", err)
				fails = append(fails, err)
			}
		})
	}
	all.Wait()
	if len(pods) > 0 && len(fails) == len(pods) {
		return nil, nil, fmt.Errorf("no engine's log can be read: %w", errors.Join(fails...))
	}
	slices.SortStableFunc(lines, func(a, b logLine) int { return a.at.Compare(b.at) })
	return lines, seen, nil
}

// read calls each for every line of a pod's log that is later than after, and
// returns the time of the last one.
func (l *engineLogs) read(ctx context.Context, pod string, o *corev1.PodLogOptions, after time.Time, each func(at time.Time, record []byte)) (time.Time, error) {
	stream, err := l.client.CoreV1().Pods(l.namespace).GetLogs(pod, o).Stream(ctx)
	if err != nil {
		return after, err
	}
	defer stream.Close()
	lines := bufio.NewScanner(stream)
	lines.Buffer(make([]byte, 64<<10), maxLogLine)
	for lines.Scan() {
		stamp, record, ok := bytes.Cut(lines.Bytes(), []byte(" "))
		at, err := time.Parse(time.RFC3339Nano, string(stamp))
		if !ok || err != nil || !at.After(after) {
			continue
		}
		after = at
		each(at, record)
	}
	return after, lines.Err()
}

// ownLine takes a line that is the function's out of an engine's log.
func ownLine(record []byte, tenant, function string) (line []byte, at time.Time, ok bool) {
	// Most lines are other functions': look before decoding.
	if !bytes.HasPrefix(record, []byte(control.LogRecordPrefix)) || !bytes.Contains(record, []byte(`"`+function+`"`)) {
		return nil, time.Time{}, false
	}
	var r control.LogRecord
	if err := json.Unmarshal(record, &r); err != nil || r.Tenant != tenant || r.Function != function {
		return nil, time.Time{}, false
	}
	line, err := json.Marshal(r.LogLine)
	if err != nil {
		return nil, time.Time{}, false
	}
	return append(line, '\n'), r.Time, true
}

// follower is the log of a function as it goes on, from all engines.
type follower struct {
	logs             *engineLogs
	tenant, function string
	seen             map[string]time.Time
	began            time.Time
	lines            chan []byte
	rest             []byte
	ctx              context.Context //nolint:containedctx // Read takes none; it ends with the request's
	cancel           context.CancelFunc
	running          sync.WaitGroup
}

func (f *follower) run(ctx context.Context, pods []corev1.Pod) {
	following := map[string]bool{}
	var mu sync.Mutex
	for {
		for _, pod := range pods {
			key := pod.Name
			mu.Lock()
			known := following[key]
			following[key] = true
			after := f.seen[key]
			mu.Unlock()
			if known {
				continue
			}
			f.running.Go(func() {
				// Whole seconds, so some lines come again; their times tell.
				from := f.began
				if !after.IsZero() {
					from = after
				}
				last, err := f.logs.read(ctx, key, &corev1.PodLogOptions{
					Container: "engine", Timestamps: true, Follow: true, SinceTime: new(metav1.NewTime(from.Add(-time.Second))),
				}, after, func(_ time.Time, record []byte) {
					if line, _, ok := ownLine(record, f.tenant, f.function); ok {
						select {
						case f.lines <- line:
						case <-ctx.Done():
						}
					}
				})
				if err != nil && ctx.Err() == nil && !strings.Contains(err.Error(), "not found") {
					f.logs.log.Debug("following an engine's log ended", "pod", key, "error", err)
				}
				mu.Lock()
				defer mu.Unlock()
				f.seen[key], following[key] = last, false
			})
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(enginesEvery):
		}
		if list, err := f.logs.engines(ctx); err == nil {
			pods = list
		}
	}
}

// Read implements io.Reader.
func (f *follower) Read(p []byte) (int, error) {
	if len(f.rest) == 0 {
		select {
		case <-f.ctx.Done():
			return 0, io.EOF
		case f.rest = <-f.lines:
		}
	}
	n := copy(p, f.rest)
	f.rest = f.rest[n:]
	return n, nil
}

// Close ends the following and waits for it.
func (f *follower) Close() error {
	f.cancel()
	f.running.Wait()
	return nil
}
