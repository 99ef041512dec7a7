package images

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"
)

// State is how far an image is.
type State string

// The states of an image. Only warm images are ready for their first pod.
const (
	StateQueued    State = "queued"
	StatePulling   State = "pulling"
	StateWarming   State = "warming"
	StateCompiling State = "compiling"
	StateWarm      State = "warm"
	StateFailed    State = "failed"
	// StateDeferred: left to kubelet, which may read the pull secret that the
	// registry asks for. Once kubelet brought the image it is warmed.
	StateDeferred State = "deferred"
)

var states = []State{StateQueued, StatePulling, StateWarming, StateCompiling, StateWarm, StateFailed, StateDeferred}

// Status is a snapshot of the loop for the health model and for people.
type Status struct {
	// Known is false until it is known what is wanted; Complete is false
	// until the whole source has answered since the process started.
	Known, Complete bool
	// StaleSince is when the source stopped answering (zero: it answers).
	StaleSince  time.Time
	StaleReason string
	// Problems are sentences about wishes that could not be read.
	Problems []string
	// RuntimeError is why containerd cannot be used, since RuntimeSince;
	// empty while it can.
	RuntimeError string
	RuntimeSince time.Time
	// LastPass is when the loop last looked; it does so at least every 30
	// seconds while the process is healthy.
	LastPass time.Time
	// Counts has every state; Total is their sum.
	Counts map[State]int
	Total  int
	// Images is sorted by name.
	Images []ImageStatus
	// Summary is one line: "12/14 warm, 1 pulling 43 %, 1 failed: …".
	Summary string
}

// ImageStatus is one image's part of Status.
type ImageStatus struct {
	Image string
	// Digest is what the name points at on this node, empty while it is not
	// here. For an image wanted by tag it is the digest the tag had when it
	// was pulled last.
	Digest   string
	State    State
	Handlers []string
	// Users are at most [MaxUsers] of UserCount.
	Users     []string
	UserCount int
	// Done and Total are bytes while pulling; Total 0 is not known yet.
	Done, Total int64
	// Modules is how many core modules the store has objects of. Notes say
	// which it has not and why; that does not keep shims from running them.
	Modules int
	Notes   []string
	// Code, Message, Failures and NextTry are those of the last failure,
	// kept while it is tried again.
	Code, Message string
	Failures      int
	NextTry       time.Time
}

// Status returns a snapshot, and a channel that is closed when there is a
// newer one.
func (l *Loop) Status() (Status, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := Status{
		Known: l.snapshot.Known, Complete: l.snapshot.Complete,
		StaleSince: l.snapshot.StaleSince, StaleReason: l.snapshot.StaleReason,
		Problems: l.snapshot.Problems, RuntimeError: l.runtimeErr, LastPass: l.lastPass,
		Counts: make(map[State]int, len(states)), Total: len(l.images),
		Images: make([]ImageStatus, 0, len(l.images)),
	}
	if l.runtimeErr != "" {
		s.RuntimeSince = l.runtimeSince
	}
	for _, st := range states {
		s.Counts[st] = 0
	}
	for name, img := range l.images {
		i := ImageStatus{
			Image: name, Digest: img.digest, State: img.state, Handlers: img.want.Handlers,
			Users: img.want.Users, UserCount: img.want.UserCount, Failures: img.failures,
		}
		if img.state == StatePulling {
			i.Done, i.Total = img.done, img.total
		}
		if m := l.memory[img.digest]; m != nil {
			i.Modules, i.Notes = len(m.Found.Modules), m.Found.Notes
		}
		if img.err != nil {
			i.Code, i.Message, i.NextTry = img.err.Code, img.err.Error(), img.nextTry
		}
		s.Counts[img.state]++
		s.Images = append(s.Images, i)
	}
	slices.SortFunc(s.Images, func(a, b ImageStatus) int { return cmp.Compare(a.Image, b.Image) })
	s.Summary = s.summary()
	return s, l.changed
}

func (s *Status) summary() string {
	if !s.Known {
		if s.StaleReason != "" {
			return "not known which images are wanted: " + s.StaleReason
		}
		return "not known yet which images are wanted"
	}
	parts := []string{fmt.Sprintf("%d/%d warm", s.Counts[StateWarm], s.Total)}
	for _, st := range []State{StatePulling, StateWarming, StateCompiling, StateQueued} {
		n := s.Counts[st]
		if n == 0 {
			continue
		}
		p := fmt.Sprintf("%d %s", n, st)
		if st == StatePulling {
			var done, total int64
			for _, i := range s.Images {
				done, total = done+i.Done, total+i.Total
			}
			if total > 0 {
				p += fmt.Sprintf(" %d %%", done*100/total)
			}
		}
		parts = append(parts, p)
	}
	for _, st := range []State{StateFailed, StateDeferred} {
		if n := s.Counts[st]; n > 0 {
			i := s.Images[slices.IndexFunc(s.Images, func(i ImageStatus) bool { return i.State == st })]
			parts = append(parts, fmt.Sprintf("%d %s: %s: %s", n, st, i.Image, i.Message))
		}
	}
	if s.RuntimeError != "" {
		parts = append(parts, "containerd does not answer")
	}
	if !s.StaleSince.IsZero() {
		parts = append(parts, "wishes are those of "+s.StaleSince.UTC().Format(time.RFC3339))
	}
	return clip(strings.Join(parts, ", "), 500)
}

// clip keeps the beginning of a message.
func clip(s string, limit int) string {
	if len(s) <= limit {
		return s
	}
	return strings.ToValidUTF8(s[:limit-len("…")], "") + "…"
}
