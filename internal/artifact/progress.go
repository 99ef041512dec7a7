package artifact

import "time"

// ProgressInterval is the shortest time between two events of one artifact
// that differ in bytes only.
const ProgressInterval = 250 * time.Millisecond

// Phase is what is being done about an artifact.
type Phase string

// The phases.
const (
	// PhaseCheck hashes what is there.
	PhaseCheck Phase = "check"
	// PhaseDownload transfers, hashes and unpacks.
	PhaseDownload Phase = "download"
	// PhaseRetry reports a failed attempt with its error; the download goes on.
	PhaseRetry Phase = "retry"
	// PhaseInstall syncs to the disk and renames.
	PhaseInstall Phase = "install"
	// PhaseDone ends the events of an artifact, with Err when it failed.
	PhaseDone Phase = "done"
)

// Event is one step of one artifact.
type Event struct {
	Name, Version string
	Phase         Phase
	// Bytes are those done in this phase out of Total; Total is 0 when it is
	// unknown.
	Bytes, Total int64
	// Mirror is where bytes come from, without its query.
	Mirror string
	// Outcome is set in PhaseDone.
	Outcome Outcome
	// Err is what failed, in PhaseRetry and PhaseDone.
	Err error
}

// tracker turns the work on one artifact, which one goroutine does at a time,
// into events. A nil tracker tracks nothing.
type tracker struct {
	f     *Fetcher
	event Event
	next  time.Time
}

func (f *Fetcher) track(a *Artifact) *tracker {
	if f.o.Progress == nil {
		return nil
	}
	return &tracker{f: f, event: Event{Name: a.Name, Version: a.Version}}
}

func (t *tracker) send() {
	t.f.progressMu.Lock()
	defer t.f.progressMu.Unlock()
	t.f.o.Progress(t.event)
	t.next = time.Now().Add(ProgressInterval)
}

func (t *tracker) phase(p Phase) {
	if t == nil {
		return
	}
	t.event.Phase, t.event.Bytes, t.event.Total, t.event.Err = p, 0, 0, nil
	t.send()
}

// bytes sets how far the phase is.
func (t *tracker) bytes(n, total int64) {
	if t == nil {
		return
	}
	t.event.Bytes, t.event.Total = n, max(total, 0)
	if time.Now().After(t.next) {
		t.send()
	}
}

func (t *tracker) mirror(m string) {
	if t != nil {
		t.event.Mirror = m
	}
}

// retry reports a failed attempt and goes back to the phase it was in.
func (t *tracker) retry(err error) {
	if t == nil {
		return
	}
	was := t.event.Phase
	t.event.Phase, t.event.Err = PhaseRetry, err
	t.send()
	t.event.Phase, t.event.Err = was, nil
}

func (t *tracker) end(r *Result) {
	if t == nil {
		return
	}
	t.event.Phase, t.event.Outcome, t.event.Err = PhaseDone, r.Outcome, r.Err
	t.event.Bytes, t.event.Total, t.event.Mirror = r.Installed, r.Installed, r.Mirror
	t.send()
}
