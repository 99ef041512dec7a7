package images

import (
	"context"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

// ConditionType is the node condition that shows [Status] to kubectl:
//
//	kubectl get nodes -o custom-columns='NODE:.metadata.name,IMAGES:.status.conditions[?(@.type=="hearth.sh/ImagesWarm")].message'
//
// A condition, because a node's own identity may write it for itself and for
// no other node, so it needs no further rights, and because nobody else has
// to define or clean up anything.
const ConditionType = v1alpha1.Group + "/ImagesWarm"

// maxConditionMessage bounds the message: every watcher of nodes gets it.
const maxConditionMessage = 256

// Condition is what a node condition says.
type Condition struct {
	// Status is "True", "False" or "Unknown".
	Status string
	// Reason is one word from a fixed set.
	Reason string
	// Message is Status.Summary, shortened.
	Message string
}

// Condition puts the status into a node condition.
func (s Status) Condition() Condition {
	c := Condition{Message: clip(s.Summary, maxConditionMessage)}
	switch {
	case !s.Known:
		c.Status, c.Reason = "Unknown", "NotKnownYet"
	case s.RuntimeError != "":
		c.Status, c.Reason = "Unknown", "RuntimeUnavailable"
	case s.Counts[StateFailed] > 0:
		c.Status, c.Reason = "False", "ImagesFailed"
	case s.Counts[StateDeferred] > 0 && s.Counts[StateWarm]+s.Counts[StateDeferred] == s.Total:
		c.Status, c.Reason = "False", "ImagesDeferred"
	case s.Counts[StateWarm] < s.Total:
		c.Status, c.Reason = "False", "ImagesPending"
	case !s.StaleSince.IsZero():
		c.Status, c.Reason = "True", "WishesStale"
	default:
		c.Status, c.Reason = "True", "AllWarm"
	}
	return c
}

const (
	// announceEvery is the least time between two writes: 1,000 nodes that
	// all pull make 33 writes per second at most.
	announceEvery = 30 * time.Second
	// announceTimeout bounds one write.
	announceTimeout = 10 * time.Second
)

// Announce writes the status as a condition until ctx ends: the first at
// once, later ones when the condition changed and at least 30 seconds after
// the last write, a failed one included. While nothing changes it writes
// nothing; the condition's heartbeat is the business of who writes nodes.
func (l *Loop) Announce(ctx context.Context, write func(context.Context, Condition) error) {
	var last Condition
	for ctx.Err() == nil {
		s, newer := l.Status()
		if c := s.Condition(); c != last && !l.warmingUp(s) {
			call, cancel := context.WithTimeout(ctx, announceTimeout)
			err := write(call, c)
			cancel()
			if err == nil {
				last = c
			} else if ctx.Err() == nil {
				l.log.Warn("state of images not announced", "err", err)
			}
			if !wait(ctx, announceEvery) {
				return
			}
			continue
		}
		select {
		case <-ctx.Done():
		case <-newer:
		}
	}
}

// warmingUp is true in the first moments of a process, when what it would
// announce is that it knows nothing.
func (l *Loop) warmingUp(s Status) bool { return s.LastPass.IsZero() }
