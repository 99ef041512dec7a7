package imds

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"
)

// Source is one place where EC2 announces what it will do with the instance.
type Source string

// The sources.
const (
	SourceSpot        Source = "spot"
	SourceRebalance   Source = "rebalance"
	SourceMaintenance Source = "maintenance"
	SourceTargetState Source = "target-state"
)

// Sources returns all sources, the most urgent first.
func Sources() []Source {
	return []Source{SourceSpot, SourceTargetState, SourceRebalance, SourceMaintenance}
}

var sourcePaths = map[Source]string{
	SourceSpot:        "meta-data/spot/instance-action",
	SourceRebalance:   "meta-data/events/recommendations/rebalance",
	SourceMaintenance: "meta-data/events/maintenance/scheduled",
	SourceTargetState: "meta-data/autoscaling/target-lifecycle-state",
}

// Action is what EC2 does to an interrupted Spot instance. EC2 may add values;
// take unknown ones for ActionTerminate.
type Action string

// Actions known today. A hibernation begins at once, the others two minutes
// after their notice, at best.
const (
	ActionTerminate Action = "terminate"
	ActionStop      Action = "stop"
	ActionHibernate Action = "hibernate"
)

// SpotAction is the notice that a Spot instance is interrupted.
type SpotAction struct {
	Action Action    `json:"action"`
	Time   time.Time `json:"time"` // when it happens, approximately
}

// Rebalance is the recommendation to move work off a Spot instance that is at
// elevated risk. An interruption may follow soon, late or never.
type Rebalance struct {
	NoticeTime time.Time `json:"noticeTime"`
}

// MaintenanceEvent is one scheduled event of the instance.
type MaintenanceEvent struct {
	ID   string
	Code string // instance-reboot, system-reboot, system-maintenance, instance-retirement, instance-stop
	// State is active, completed or canceled.
	State       string
	NotBefore   time.Time
	NotAfter    time.Time // zero when the event has no end
	Description string
}

// Active says whether the event is still to come or under way.
func (e MaintenanceEvent) Active() bool { return e.State == "active" }

// LifecycleState is the state into which an Auto Scaling group is moving the
// instance; "" outside of a group. Groups may add values.
type LifecycleState string

// Target states known today.
const (
	LifecycleInService        LifecycleState = "InService"
	LifecycleStandby          LifecycleState = "Standby"
	LifecycleDetached         LifecycleState = "Detached"
	LifecycleTerminated       LifecycleState = "Terminated"
	LifecycleWarmedRunning    LifecycleState = "Warmed:Running"
	LifecycleWarmedStopped    LifecycleState = "Warmed:Stopped"
	LifecycleWarmedHibernated LifecycleState = "Warmed:Hibernated"
	LifecycleWarmedTerminated LifecycleState = "Warmed:Terminated"
)

// Terminating says whether the group is ending the instance.
func (s LifecycleState) Terminating() bool {
	return s == LifecycleTerminated || s == LifecycleWarmedTerminated
}

// Notices is what EC2 announces at one time. It is never changed once made.
type Notices struct {
	Spot        *SpotAction        // nil without a notice
	Rebalance   *Rebalance         // nil without a recommendation
	Maintenance []MaintenanceEvent // by ID
	TargetState LifecycleState
}

// with returns the notices with one source's part taken from another.
func (n Notices) with(s Source, from Notices) Notices {
	switch s {
	case SourceSpot:
		n.Spot = from.Spot
	case SourceRebalance:
		n.Rebalance = from.Rebalance
	case SourceMaintenance:
		n.Maintenance = from.Maintenance
	case SourceTargetState:
		n.TargetState = from.TargetState
	}
	return n
}

// maxMaintenance bounds the scheduled events of one instance; there are rarely two.
const maxMaintenance = 64

var (
	wordPattern    = regexp.MustCompile(`^[a-z](?:-?[a-z0-9]){0,63}$`)
	eventIDPattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)
	statePattern   = regexp.MustCompile(`^[A-Z][A-Za-z]{0,31}(?::[A-Z][A-Za-z]{0,31})?$`)
)

// maxDescriptionBytes bounds the text of a scheduled event; the rest is cut.
const maxDescriptionBytes = 512

// Notices reads all sources. An error joins those of the sources that failed;
// what they would say is then not known, and the other sources' parts are valid.
func (c *Client) Notices(ctx context.Context) (Notices, error) {
	var all Notices
	parts, errs := make([]Notices, len(Sources())), make([]error, len(Sources()))
	var group errgroup.Group // not cancelled by the first failure: each counts
	for i, s := range Sources() {
		group.Go(func() error {
			parts[i], errs[i] = c.ReadNotice(ctx, s)
			return nil
		})
	}
	_ = group.Wait()
	for i, s := range Sources() {
		if errs[i] == nil {
			all = all.with(s, parts[i])
		}
	}
	return all, errors.Join(errs...)
}

// ReadNotice reads one source, and returns notices with only its part. That
// EC2 has nothing to say (404) is no error.
func (c *Client) ReadNotice(ctx context.Context, s Source) (Notices, error) {
	path, ok := sourcePaths[s]
	if !ok {
		return Notices{}, fmt.Errorf("instance metadata has no source of notices %s", quote(string(s)))
	}
	b, err := c.read(ctx, path)
	if errors.Is(err, ErrNotFound) {
		return Notices{}, nil
	} else if err != nil {
		return Notices{}, err
	}
	var n Notices
	switch s {
	case SourceSpot:
		n.Spot, err = ParseSpotAction(b)
	case SourceRebalance:
		n.Rebalance, err = ParseRebalance(b)
	case SourceMaintenance:
		n.Maintenance, err = ParseMaintenance(b)
	case SourceTargetState:
		n.TargetState, err = ParseLifecycleState(b)
	}
	if err != nil {
		return Notices{}, err
	}
	return n, nil
}

// ParseSpotAction reads spot/instance-action, such as
// {"action": "terminate", "time": "2017-09-18T08:22:00Z"}.
func ParseSpotAction(b []byte) (*SpotAction, error) {
	path := sourcePaths[SourceSpot]
	var n *struct {
		Action string `json:"action"`
		Time   string `json:"time"`
	}
	if err := decode(path, b, &n); err != nil {
		return nil, err
	}
	if n == nil || !wordPattern.MatchString(n.Action) {
		return nil, malformed(path, "it has no action")
	}
	at, err := parseTime(n.Time)
	if err != nil {
		return nil, malformed(path, "its time is %s", quote(n.Time))
	}
	return &SpotAction{Action: Action(n.Action), Time: at}, nil
}

// ParseRebalance reads events/recommendations/rebalance, such as
// {"noticeTime": "2020-10-27T08:22:00Z"}.
func ParseRebalance(b []byte) (*Rebalance, error) {
	path := sourcePaths[SourceRebalance]
	var n *struct {
		NoticeTime string `json:"noticeTime"`
	}
	if err := decode(path, b, &n); err != nil {
		return nil, err
	}
	if n == nil {
		return nil, malformed(path, "it has no noticeTime")
	}
	at, err := parseTime(n.NoticeTime)
	if err != nil {
		return nil, malformed(path, "its noticeTime is %s", quote(n.NoticeTime))
	}
	return &Rebalance{NoticeTime: at}, nil
}

// ParseMaintenance reads events/maintenance/scheduled: a JSON array of at most
// 64 events with distinct EventIds, or nothing. It returns them by ID.
func ParseMaintenance(b []byte) ([]MaintenanceEvent, error) {
	path := sourcePaths[SourceMaintenance]
	if len(b) == 0 {
		return nil, nil
	}
	var list []struct {
		NotBefore, NotAfter, Code, Description, EventID, State string
	}
	if err := decode(path, b, &list); err != nil {
		return nil, err
	}
	if len(list) > maxMaintenance {
		return nil, malformed(path, "it has %d events, more than %d", len(list), maxMaintenance)
	}
	events := make([]MaintenanceEvent, 0, len(list))
	for _, e := range list {
		switch {
		case !eventIDPattern.MatchString(e.EventID):
			return nil, malformed(path, "the id of an event is %s", quote(e.EventID))
		case !wordPattern.MatchString(e.Code):
			return nil, malformed(path, "the code of event %s is %s", e.EventID, quote(e.Code))
		case !wordPattern.MatchString(e.State):
			return nil, malformed(path, "the state of event %s is %s", e.EventID, quote(e.State))
		}
		ev := MaintenanceEvent{ID: e.EventID, Code: e.Code, State: e.State, Description: cut(e.Description, maxDescriptionBytes)}
		var err error
		if ev.NotBefore, err = parseTime(e.NotBefore); err != nil {
			return nil, malformed(path, "event %s begins at %s", e.EventID, quote(e.NotBefore))
		}
		if e.NotAfter != "" {
			if ev.NotAfter, err = parseTime(e.NotAfter); err != nil {
				return nil, malformed(path, "event %s ends at %s", e.EventID, quote(e.NotAfter))
			}
		}
		events = append(events, ev)
	}
	slices.SortFunc(events, func(a, b MaintenanceEvent) int { return cmp.Compare(a.ID, b.ID) })
	for i := 1; i < len(events); i++ {
		if events[i-1].ID == events[i].ID {
			return nil, malformed(path, "event %s is there twice", events[i].ID)
		}
	}
	if len(events) == 0 {
		return nil, nil
	}
	return events, nil
}

// ParseLifecycleState reads autoscaling/target-lifecycle-state: one word, or
// two with a colon between.
func ParseLifecycleState(b []byte) (LifecycleState, error) {
	if !statePattern.Match(b) {
		return "", malformed(sourcePaths[SourceTargetState], "it is %s", quote(string(b)))
	}
	return LifecycleState(b), nil
}

func decode(path string, b []byte, into any) error {
	if len(b) > maxAnswerBytes {
		return malformed(path, "it has %d bytes, more than %d", len(b), maxAnswerBytes)
	}
	if err := json.Unmarshal(b, into); err != nil {
		return malformed(path, "%w", shortJSONError(err))
	}
	return nil
}

// parseTime knows both of the service's formats: RFC 3339 of Spot notices, and
// "21 Jan 2019 09:00:43 GMT" of scheduled events.
func parseTime(s string) (time.Time, error) {
	t, err := time.Parse(time.RFC3339, s)
	if err != nil {
		t, err = time.Parse("2 Jan 2006 15:04:05 GMT", s)
	}
	if err == nil && t.Year() < 2006 { // EC2 is not older
		err = errors.New("before EC2")
	}
	return t.UTC(), err
}

// cut shortens text to whole runes within n bytes.
func cut(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && s[n]&0xc0 == 0x80 {
		n--
	}
	return s[:n]
}
