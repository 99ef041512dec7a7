package clusternode

import (
	"log/slog"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hearth-sh/hearth/internal/imds"
	"github.com/hearth-sh/hearth/internal/node"
)

// told records what reaches the drainer.
type told []string

func (t *told) Notify(n node.Notice) error {
	s := "notify " + string(n.Kind) + "/" + n.ID
	if !n.Deadline.IsZero() {
		s += " at " + n.Deadline.UTC().Format("15:04:05")
	}
	*t = append(*t, s)
	return nil
}

func (t *told) Withdraw(kind node.NoticeKind, id string) error {
	*t = append(*t, "withdraw "+string(kind)+"/"+id)
	return nil
}

var noon = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func TestEveryAnnouncementReachesTheDrainerOnce(t *testing.T) {
	spot := imds.Notices{Spot: &imds.SpotAction{Action: imds.ActionTerminate, Time: noon.Add(2 * time.Minute)}}
	event := func(in time.Duration) imds.Notices {
		return imds.Notices{Maintenance: []imds.MaintenanceEvent{{ID: "instance-event-1", Code: "system-reboot", State: "active", NotBefore: noon.Add(in)}}}
	}
	for _, c := range []struct {
		name string
		says []imds.Notices
		want []string
	}{
		{"nothing", []imds.Notices{{}, {}}, nil},
		{"an interruption, said again and again", []imds.Notices{spot, spot, spot}, []string{"notify spot-interruption/ at 12:02:00"}},
		{"an interruption of an unknown kind", []imds.Notices{{Spot: &imds.SpotAction{Action: "vanish", Time: noon}}}, []string{"notify spot-interruption/ at 12:00:00"}},
		{"an interruption that is moved", []imds.Notices{spot, {Spot: &imds.SpotAction{Time: noon.Add(time.Minute)}}},
			[]string{"notify spot-interruption/ at 12:02:00", "notify spot-interruption/ at 12:01:00"}},
		{"a recommendation that nothing follows", []imds.Notices{{Rebalance: &imds.Rebalance{NoticeTime: noon}}, {}},
			[]string{"notify rebalance/", "withdraw rebalance/"}},
		{"an event in two weeks", []imds.Notices{event(14 * 24 * time.Hour)}, nil},
		{"an event in five minutes", []imds.Notices{event(5 * time.Minute)}, []string{"notify maintenance/instance-event-1 at 12:05:00"}},
		{"an event that is cancelled", []imds.Notices{event(5 * time.Minute), {Maintenance: []imds.MaintenanceEvent{{ID: "instance-event-1", State: "canceled", NotBefore: noon}}}},
			[]string{"notify maintenance/instance-event-1 at 12:05:00", "withdraw maintenance/instance-event-1"}},
		{"a group that lets the instance go", []imds.Notices{{TargetState: "Terminated"}}, []string{"notify lifecycle-termination/"}},
		{"a group that keeps it", []imds.Notices{{TargetState: imds.LifecycleInService}}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			var got told
			n := newNotices(&got, 10*time.Minute, slog.New(slog.DiscardHandler))
			n.now = func() time.Time { return noon }
			for _, says := range c.says {
				n.settle(says)
			}
			if d := cmp.Diff(c.want, []string(got)); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestAWrongClockNeitherEmptiesANoticeNorGivesItTimeThatIsNotThere(t *testing.T) {
	for name, test := range map[string]struct {
		wrong time.Duration
		want  string
	}{
		"right":          {0, "12:02:00"},
		"a bit fast":     {time.Minute, "12:02:00"},
		"a bit slow":     {-20 * time.Second, "12:02:00"},
		"an hour fast":   {time.Hour, "13:02:00"}, // in two minutes, as this clock has it
		"an hour slow":   {-time.Hour, "11:02:00"},
		"years slow":     {-20 * 365 * 24 * time.Hour, "12:02:00"},
		"minutes fast":   {3 * time.Minute, "12:05:00"},
		"a minute slow":  {-time.Minute, "12:01:00"},
		"years, forward": {365 * 24 * time.Hour, "12:02:00"},
	} {
		t.Run(name, func(t *testing.T) {
			var got told
			n := newNotices(&got, 10*time.Minute, slog.New(slog.DiscardHandler))
			now := noon.Add(test.wrong)
			n.now = func() time.Time { return now }
			spot := imds.Notices{Spot: &imds.SpotAction{Action: imds.ActionTerminate, Time: noon.Add(2 * time.Minute)}}
			n.settle(spot)
			// Said once, however the clock goes on: a deadline that moves is none.
			for _, by := range []time.Duration{5 * time.Second, time.Hour, -2 * time.Hour} {
				now = now.Add(by)
				n.settle(spot)
			}
			if d := cmp.Diff([]string{"notify spot-interruption/ at " + test.want}, []string(got)); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestSimulationsEndAndGiveWayToTheRealThing(t *testing.T) {
	var got told
	n := newNotices(&got, time.Minute, slog.New(slog.DiscardHandler))
	n.now = func() time.Time { return noon }
	if err := n.begin(Simulation{Kind: node.SpotInterruption, Seconds: 90}); err != nil {
		t.Fatal(err)
	}
	n.settle(imds.Notices{}) // the metadata service knows nothing of it
	n.settle(imds.Notices{Spot: &imds.SpotAction{Time: noon.Add(time.Minute)}})
	n.end()
	n.settle(imds.Notices{})
	want := []string{
		"notify spot-interruption/simulated at 12:01:30",
		"withdraw spot-interruption/simulated", "notify spot-interruption/ at 12:01:00",
		"withdraw spot-interruption/",
	}
	if d := cmp.Diff(want, []string(got)); d != "" {
		t.Error(d)
	}
}

func TestNonsenseIsNotSimulated(t *testing.T) {
	for _, s := range []Simulation{
		{}, {Kind: "meteor", Seconds: 5}, {Kind: node.SpotInterruption}, {Kind: node.SpotInterruption, Seconds: -1},
		{Kind: node.SpotInterruption, Seconds: 1 << 40}, {Kind: node.Rebalance, Seconds: 5}, {Kind: node.LifecycleTermination, Seconds: 5},
	} {
		var got told
		n := newNotices(&got, time.Minute, slog.New(slog.DiscardHandler))
		if err := n.begin(s); err == nil {
			t.Errorf("%+v was simulated", s)
		}
		if len(got) > 0 {
			t.Errorf("%+v: the drainer was told %v", s, slices.Clone(got))
		}
	}
}
