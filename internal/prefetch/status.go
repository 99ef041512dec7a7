package prefetch

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

// Status is a snapshot of the loop for the health model and for people.
type Status struct {
	// Generation is that of the desired state being worked on; FromCache is
	// true while it comes from disk because the API has not answered yet.
	// Known is false while there is none at all.
	Generation uint64
	Known      bool
	FromCache  bool
	// API and Engine say whether the two answer.
	API, Engine Peer
	// Total is the number of functions; each is in exactly one of the
	// others. Warm functions answer with the wanted revision, Failed ones
	// have an error that does not pass by itself, Retrying ones one that may.
	Total, Warm, Queued, Pulling, Compiling, Loading, Retrying, Failed int
	// Functions is sorted by name.
	Functions []FunctionStatus
	// Recent holds the last errors, newest first.
	Recent []RecentError
	// LastPass is when the loop last looked; it does so at least every five
	// seconds while the process is healthy.
	LastPass time.Time
	// Summary is one line, such as "12/14 warm, 1 pulling 43 %, 1 failed: …".
	Summary string
}

// Peer is the reachability of another process.
type Peer struct {
	OK    bool
	Since time.Time
	// Error is the last failure while OK is false, empty before the first call.
	Error string
}

// FunctionStatus is one function's part of Status.
type FunctionStatus struct {
	v1alpha1.FunctionReport
	// Percent is how much of the module is there while pulling, else -1.
	Percent int
	// NextTry is when a failed artifact is tried again.
	NextTry time.Time
}

// RecentError is an error of the last time.
type RecentError struct {
	Time time.Time
	// Subject is the artifact's digest, the function or the peer.
	Subject string
	Message string
}

// Status may be called at any time, from any goroutine.
func (l *Loop) Status() Status {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	s := Status{
		Generation: l.desired.Generation, Known: l.have, FromCache: l.fromCache,
		API:    Peer{OK: l.source.ok, Since: l.source.since, Error: l.source.err},
		Engine: Peer{OK: l.eng.ok, Since: l.eng.since, Error: l.eng.err},
		Recent: slices.Clone(l.recent), LastPass: l.lastPass,
	}
	slices.Reverse(s.Recent)
	for _, f := range l.desired.Functions {
		if len(f.Candidates) == 0 {
			continue
		}
		fs := FunctionStatus{FunctionReport: l.functionReport(f, now), Percent: -1}
		if img := l.images[f.Candidates[0].Artifact.Digest]; img != nil {
			if img.state == imagePulling && img.total > 0 {
				fs.Percent = int(img.done * 100 / img.total)
			}
			if img.err != nil {
				fs.NextTry = img.nextTry
			}
		}
		s.Functions = append(s.Functions, fs)
		s.Total++
		switch {
		case fs.Progress == v1alpha1.ProgressReady:
			s.Warm++
		case fs.Progress == v1alpha1.ProgressFailed && !fs.Retrying:
			s.Failed++
		case fs.Retrying:
			s.Retrying++
		case fs.Progress == v1alpha1.ProgressQueued:
			s.Queued++
		case fs.Progress == v1alpha1.ProgressPulling:
			s.Pulling++
		case fs.Progress == v1alpha1.ProgressCompiling:
			s.Compiling++
		default:
			s.Loading++
		}
	}
	slices.SortFunc(s.Functions, func(a, b FunctionStatus) int { return strings.Compare(a.Name, b.Name) })
	s.Summary = s.summary()
	return s
}

func (s *Status) summary() string {
	if !s.Known {
		if s.API.Error != "" {
			return "waiting for the API: " + s.API.Error
		}
		return "waiting for the API"
	}
	if s.Total == 0 {
		return "no functions"
	}
	parts := []string{fmt.Sprintf("%d/%d warm", s.Warm, s.Total)}
	add := func(n int, what string) {
		if n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n, what))
		}
	}
	pulling := "pulling"
	if i := slices.IndexFunc(s.Functions, func(f FunctionStatus) bool { return f.Percent >= 0 && !f.Retrying }); i >= 0 && s.Pulling == 1 {
		pulling = fmt.Sprintf("pulling %d %%", s.Functions[i].Percent)
	}
	add(s.Queued, "queued")
	add(s.Pulling, pulling)
	add(s.Compiling, "compiling")
	add(s.Loading, "loading")
	first := func(retrying bool) string {
		for _, f := range s.Functions {
			if f.Error != nil && f.Retrying == retrying {
				return ": " + f.Name + ": " + f.Error.Detail
			}
		}
		return ""
	}
	if s.Retrying > 0 {
		add(s.Retrying, "retrying"+first(true))
	}
	if s.Failed > 0 {
		add(s.Failed, "failed"+first(false))
	}
	if s.FromCache {
		parts = append(parts, "as last known before the API went away")
	}
	return strings.Join(parts, ", ")
}

// note keeps an error for Status.
func (l *Loop) note(subject, message string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.noteLocked(subject, message)
}

func (l *Loop) noteLocked(subject, message string) {
	if n := len(l.recent); n > 0 && l.recent[n-1].Subject == subject && l.recent[n-1].Message == message {
		l.recent[n-1].Time = l.now() // the same again, not news
		return
	}
	l.recent = append(l.recent, RecentError{Time: l.now(), Subject: subject, Message: message})
	if len(l.recent) > errorsKept {
		l.recent = slices.Delete(l.recent, 0, len(l.recent)-errorsKept)
	}
}
