package clusternode

import (
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/hearth-sh/hearth/internal/imds"
	"github.com/hearth-sh/hearth/internal/node"
)

const (
	// maxSimulation bounds the time a simulated interruption leaves.
	maxSimulation = time.Hour
	// simulatedID tells a simulated notice from one that EC2 announced.
	simulatedID = "simulated"
	// spotLead is how long before it takes a Spot instance EC2 says so, and
	// spotSlack by how much its word and a good clock may differ.
	spotLead  = 2 * time.Minute
	spotSlack = 30 * time.Second
)

// drainer is what notices are passed on to; *node.Drainer is one.
type drainer interface {
	Notify(n node.Notice) error
	Withdraw(kind node.NoticeKind, id string) error
}

// notices turns what EC2 announces, and what a person simulates, into what the
// node is to be left for. It is level-triggered: every call of settle makes
// the drainer know exactly what holds now.
type notices struct {
	drainer drainer
	// lead is how long before a scheduled event it is time to act.
	lead time.Duration
	log  *slog.Logger
	now  func() time.Time

	mu        sync.Mutex
	announced imds.Notices
	simulated map[node.NoticeKind]node.Notice
	known     map[string]node.Notice // what the drainer was told, by kind/ID
}

func newNotices(d drainer, lead time.Duration, log *slog.Logger) *notices {
	return &notices{
		drainer: d, lead: lead, log: log, now: time.Now,
		simulated: map[node.NoticeKind]node.Notice{}, known: map[string]node.Notice{},
	}
}

// settle takes in what the metadata service says now. It never blocks.
func (n *notices) settle(announced imds.Notices) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.announced = announced
	n.settleLocked()
}

func (n *notices) settleLocked() {
	current := map[string]node.Notice{}
	for _, notice := range n.currentLocked() {
		current[string(notice.Kind)+"/"+notice.ID] = notice
	}
	for key, old := range n.known {
		if _, ok := current[key]; ok {
			continue
		}
		n.log.Info("a notice no longer holds", "kind", old.Kind, "id", old.ID)
		if err := n.drainer.Withdraw(old.Kind, old.ID); err != nil {
			n.log.Warn("notice not withdrawn", "kind", old.Kind, "id", old.ID, "err", err)
		}
	}
	for key, notice := range current {
		if old, ok := n.known[key]; ok && old.Deadline.Equal(notice.Deadline) {
			continue
		}
		if notice.Kind == node.SpotInterruption && notice.ID != simulatedID {
			notice.Deadline = n.plausible(notice.Deadline)
		}
		n.log.Warn("this node is about to be left", "kind", notice.Kind, "id", notice.ID, "deadline", notice.Deadline)
		if err := n.drainer.Notify(notice); err != nil {
			n.log.Error("notice not acted upon", "kind", notice.Kind, "id", notice.ID, "err", err)
		}
	}
	n.known = current
}

// plausible returns when a Spot instance goes. EC2 says so two minutes ahead: by
// a clock that is an hour fast the notice would have proved empty already, and
// the node be given back, and by one that is slow pods would be left until they
// are cut off.
func (n *notices) plausible(announced time.Time) time.Time {
	now := n.now()
	if left := announced.Sub(now); left >= 0 && left <= spotLead+spotSlack {
		return announced
	}
	n.log.Warn("this machine's clock is wrong: EC2 announces an interruption two minutes ahead; two minutes from now are assumed",
		"announced", announced, "now", now)
	return now.Add(spotLead)
}

func (n *notices) currentLocked() []node.Notice {
	var current []node.Notice
	real := map[node.NoticeKind]bool{}
	add := func(notice node.Notice) {
		current = append(current, notice)
		real[notice.Kind] = true
	}
	if a := n.announced.Spot; a != nil {
		// Whatever the action (an unknown one may be the worst): the machine goes.
		add(node.Notice{Kind: node.SpotInterruption, Deadline: a.Time})
	}
	if n.announced.TargetState.Terminating() {
		add(node.Notice{Kind: node.LifecycleTermination})
	}
	for _, event := range n.announced.Maintenance {
		// Events are announced weeks ahead; pods need not leave until shortly before.
		if event.Active() && n.now().Add(n.lead).After(event.NotBefore) {
			add(node.Notice{Kind: node.Maintenance, ID: event.ID, Deadline: event.NotBefore})
		}
	}
	if r := n.announced.Rebalance; r != nil {
		add(node.Notice{Kind: node.Rebalance, At: r.NoticeTime})
	}
	for kind, notice := range n.simulated {
		if !real[kind] { // the real thing takes over
			current = append(current, notice)
		}
	}
	return current
}

// Simulation is what `nodeagent simulate` asks for.
type Simulation struct {
	// Kind is spot-interruption, rebalance or maintenance.
	Kind node.NoticeKind `json:"kind"`
	// Seconds until the machine would go; 0 for kinds without a deadline.
	Seconds int `json:"seconds,omitempty"`
}

// begin acts as if the metadata service had announced it.
func (n *notices) begin(s Simulation) error {
	switch s.Kind {
	case node.SpotInterruption, node.Maintenance:
		if s.Seconds < 1 || s.Seconds > int(maxSimulation.Seconds()) {
			return fmt.Errorf("an interruption comes in 1 to %d seconds, not in %d", int(maxSimulation.Seconds()), s.Seconds)
		}
	case node.Rebalance:
		if s.Seconds != 0 {
			return errors.New("a rebalance recommendation has no deadline")
		}
	default:
		return fmt.Errorf("%.40q cannot be simulated; spot-interruption, rebalance and maintenance can", s.Kind)
	}
	notice := node.Notice{Kind: s.Kind, ID: simulatedID}
	if s.Seconds > 0 {
		notice.Deadline = n.now().Add(time.Duration(s.Seconds) * time.Second)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.simulated[s.Kind] = notice
	n.settleLocked()
	return nil
}

// end takes all simulations back.
func (n *notices) end() {
	n.mu.Lock()
	defer n.mu.Unlock()
	clear(n.simulated)
	n.settleLocked()
}
