package node

import (
	"encoding/json"
	"fmt"
	"time"
)

// NoticeKind says why a node should be left.
type NoticeKind string

// The kinds, most urgent first.
const (
	// SpotInterruption: EC2 takes the instance at the deadline, about two
	// minutes after the notice. It cannot be withdrawn.
	SpotInterruption NoticeKind = "spot-interruption"
	// LifecycleTermination: an Auto Scaling group waits for us until the
	// deadline, then terminates.
	LifecycleTermination NoticeKind = "lifecycle-termination"
	// Maintenance: the host is stopped or rebooted at the deadline. Whoever
	// gives the notice does so when it is time to act on it.
	Maintenance NoticeKind = "maintenance"
	// Manual: a person wants the node empty.
	Manual NoticeKind = "manual"
	// Rebalance: the instance is at elevated risk. Often nothing follows.
	Rebalance NoticeKind = "rebalance"
)

// urgency orders the kinds; 0 is none of them.
func (k NoticeKind) urgency() int {
	switch k {
	case SpotInterruption:
		return 5
	case LifecycleTermination:
		return 4
	case Maintenance:
		return 3
	case Manual:
		return 2
	case Rebalance:
		return 1
	}
	return 0
}

// final says whether the machine goes whatever we do, so that leaving a pod
// alone does not spare it.
func (k NoticeKind) final() bool {
	return k == SpotInterruption || k == LifecycleTermination || k == Maintenance
}

// Notice is the word that this node should be left.
type Notice struct {
	Kind NoticeKind `json:"kind"`
	// ID tells notices of one kind apart, such as a maintenance event's; it is
	// what Withdraw names. At most 128 bytes.
	ID string `json:"id,omitempty"`
	// Deadline is when the machine stops. Zero: nobody knows; pods then get
	// their own grace periods, and budgets are never overridden.
	Deadline time.Time `json:"deadline,omitzero"`
	// At is when the notice was first heard; Notify sets it when it is zero.
	At time.Time `json:"at,omitzero"`
}

const (
	maxNoticeID = 128
	// maxNotice bounds the annotation that is read back: anyone who may
	// annotate nodes can write it.
	maxNotice = 1024
)

func (n Notice) validate() error {
	switch {
	case n.Kind.urgency() == 0:
		return fmt.Errorf("notice of unknown kind %.40q", n.Kind)
	case len(n.ID) > maxNoticeID:
		return fmt.Errorf("notice %s: its ID is longer than %d bytes", n.Kind, maxNoticeID)
	}
	return nil
}

// same says whether two words are about one notice.
func (n Notice) same(m Notice) bool { return n.Kind == m.Kind && n.ID == m.ID }

// anchored returns the notice with its times on the clock that nobody can set:
// what was read from elsewhere is compared with now once, and from then on only
// the time that passes counts. Setting the machine's clock while the node is
// being left would otherwise take the pods' grace periods and budgets away, or
// leave them more time than there is.
func (n Notice) anchored(now time.Time) Notice {
	if !n.Deadline.IsZero() {
		n.Deadline = now.Add(n.Deadline.Sub(now))
	}
	if !n.At.IsZero() {
		n.At = now.Add(min(0, n.At.Sub(now))) // nothing was heard in the future
	}
	return n
}

// overrides says whether n, heard while m is acted upon, takes its place.
func (n Notice) overrides(m Notice) bool {
	if n.same(m) {
		return !n.Deadline.Equal(m.Deadline)
	}
	return n.Kind.urgency() > m.Kind.urgency()
}

// parseNotice reads the annotation hearth.sh/interruption.
func parseNotice(s string) (Notice, error) {
	var n Notice
	if len(s) > maxNotice {
		return n, fmt.Errorf("notice of %d bytes; at most %d", len(s), maxNotice)
	}
	if err := json.Unmarshal([]byte(s), &n); err != nil {
		return Notice{}, fmt.Errorf("notice is not JSON: %w", err)
	}
	return n, n.validate()
}
