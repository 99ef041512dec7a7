package systemd

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coreos/go-systemd/v22/dbus"
	godbus "github.com/godbus/dbus/v5"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestConnectClassifiesWhatIsInTheWay(t *testing.T) {
	if os.Getenv(insideEnv) != "" {
		t.Skip("a systemd answers here")
	}
	if _, err := os.Stat("/run/systemd/private"); err == nil {
		t.Skip("systemd's own socket would answer")
	}
	dir := t.TempDir()
	silent, err := net.Listen("unix", filepath.Join(dir, "silent"))
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	for _, tt := range []struct {
		name, address string
		want          fault.Code
	}{
		{"no bus", "unix:path=" + dir + "/absent", CodeNoBus},
		{"a bus that says nothing", "unix:path=" + dir + "/silent", CodeNoAnswer},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", tt.address)
			began := time.Now()
			_, err := Connect(t.Context(), Options{CallTimeout: 300 * time.Millisecond})
			if fault.CodeOf(err) != tt.want {
				t.Errorf("got %v, want %s", err, tt.want)
			}
			if took := time.Since(began); took > 20*time.Second {
				t.Errorf("it took %v", took)
			}
		})
	}
}

func TestFailuresOfCallsAreClassified(t *testing.T) {
	named := func(name string) error { return godbus.Error{Name: name, Body: []any{"reason"}} }
	for _, tt := range []struct {
		err  error
		want fault.Code
	}{
		{context.DeadlineExceeded, CodeNoAnswer},
		{named("org.freedesktop.DBus.Error.NoReply"), CodeNoAnswer},
		{named("org.freedesktop.DBus.Error.AccessDenied"), CodePermission},
		{&net.OpError{Op: "dial", Err: os.NewSyscallError("connect", unix.EACCES)}, CodePermission},
		{named("org.freedesktop.systemd1.NoSuchUnit"), CodeUnitMissing},
		{named("org.freedesktop.systemd1.UnitMasked"), CodeUnitInvalid},
		{named("org.freedesktop.DBus.Error.ServiceUnknown"), CodeNoBus},
		{named("org.freedesktop.DBus.Error.Spawn.ChildExited"), CodeNoBus},
		{errors.New("EOF"), CodeNoBus},
		{named("org.freedesktop.systemd1.TransactionIsDestructive"), CodeRefused},
		{context.Canceled, ""},
	} {
		if got := classifyCall(tt.err, "asking", time.Second); fault.CodeOf(got) != tt.want {
			t.Errorf("%v: %v", tt.err, got)
		}
	}
}

// scripted answers with one state after the other, and then the last one on.
type scripted struct {
	bus
	states []map[string]any
	hang   bool
	asked  int
}

func (s *scripted) GetAllPropertiesContext(ctx context.Context, _ string) (map[string]any, error) {
	if s.hang && s.asked > 0 {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	i := min(s.asked, len(s.states)-1)
	s.asked++
	return s.states[i], nil
}
func (s *scripted) StartUnitContext(context.Context, string, string, chan<- string) (int, error) {
	return 1, nil
}
func (s *scripted) ResetFailedUnitContext(context.Context, string) error { return nil }
func (s *scripted) Close()                                               {}
func (s *scripted) SystemStateContext(context.Context) (*dbus.Property, error) {
	return nil, nil
}

func look(active, sub string, restarts uint32) map[string]any {
	return map[string]any{"LoadState": "loaded", "ActiveState": active, "SubState": sub, "NRestarts": restarts}
}

func fake(s *scripted) *Manager {
	return &Manager{o: Options{CallTimeout: DefaultCallTimeout}, bus: s, after: time.After,
		lines: func(context.Context, string, int) []string { return []string{"last words"} }}
}

func TestWaitTellsRestartsFromLoops(t *testing.T) {
	for _, tt := range []struct {
		name   string
		states []map[string]any
		most   int
		want   fault.Code
	}{
		{"a few restarts are a difficult start", []map[string]any{look("activating", "start", 0), look("activating", "auto-restart", 2), look("active", "running", 4)}, 5, ""},
		{"one too many is a loop", []map[string]any{look("activating", "start", 0), look("activating", "auto-restart", 6)}, 5, CodeUnitLoops},
		{"none may be tolerated", []map[string]any{look("activating", "start", 0), look("activating", "auto-restart", 1)}, -1, CodeUnitLoops},
		{"restarts before the wait do not count", []map[string]any{look("activating", "auto-restart", 90), look("active", "running", 92)}, 5, ""},
		{"a counter that began anew counts from there", []map[string]any{look("activating", "auto-restart", 90), look("activating", "start", 0), look("active", "running", 3)}, 5, ""},
		{"starting is no failure of before", []map[string]any{look("activating", "start", 0), look("failed", "failed", 0)}, 5, CodeUnitFailed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				_, err := fake(&scripted{states: tt.states}).Wait(t.Context(), "x.service", WaitOptions{Timeout: time.Minute, MaxRestarts: tt.most})
				if fault.CodeOf(err) != tt.want || (err == nil) != (tt.want == "") {
					t.Errorf("got %v, want %q", err, tt.want)
				}
				if err != nil && !strings.Contains(err.Error(), "last words") {
					t.Errorf("the journal is not quoted: %v", err)
				}
			})
		})
	}
}

// A phase's deadline is usually the unit's as well, and the first to fire.
func TestACallersDeadlineSaysWhatWasWaitedForAndACancellationDoesNot(t *testing.T) {
	starting := []map[string]any{{"LoadState": "loaded", "ActiveState": "activating", "SubState": "start"}}
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		_, err := fake(&scripted{states: starting}).Wait(ctx, "x.service", WaitOptions{Timeout: time.Minute})
		if fault.CodeOf(err) != CodeUnitTimeout || !strings.Contains(err.Error(), "after 10s") || !strings.Contains(err.Error(), "last words") {
			t.Errorf("its deadline: %v", err)
		}
		ctx, stop := context.WithCancel(t.Context())
		defer time.AfterFunc(10*time.Second, stop).Stop()
		if _, err := fake(&scripted{states: starting}).Wait(ctx, "x.service", WaitOptions{Timeout: time.Minute}); fault.CodeOf(err) != "" || !errors.Is(err, context.Canceled) {
			t.Errorf("its cancellation: %v", err)
		}
	})
}

func TestWaitEndsWhenSystemdHangs(t *testing.T) {
	for _, tt := range []struct {
		name    string
		timeout time.Duration
		want    fault.Code
	}{
		{"before the unit's own deadline", time.Hour, CodeNoAnswer},
		{"at the unit's own deadline", time.Second, CodeUnitTimeout},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				began := time.Now()
				_, err := fake(&scripted{states: []map[string]any{look("activating", "start", 0)}, hang: true}).Wait(t.Context(), "x.service", WaitOptions{Timeout: tt.timeout})
				if fault.CodeOf(err) != tt.want || !fault.IsTransient(err) {
					t.Errorf("got %v, want %s", err, tt.want)
				}
				if took := time.Since(began); took > tt.timeout+DefaultCallTimeout {
					t.Errorf("it took %v", took)
				}
			})
		})
	}
	if _, err := fake(&scripted{}).Wait(t.Context(), "x.service", WaitOptions{}); err == nil {
		t.Error("a wait without a deadline was accepted")
	}
}

func TestUnknownPropertiesAreAsIfAbsent(t *testing.T) {
	u := readUnit("x.service", map[string]any{"ActiveState": 5, "NRestarts": "many", "InvocationID": "x", "Job": []any{}, "ExecMainStartTimestamp": ^uint64(0)})
	if u.ActiveState != "" || u.Restarts != 0 || u.InvocationID != "" || u.Job || !u.Started.IsZero() {
		t.Errorf("got %+v", u)
	}
}

func TestSendRefusesWhatTheJournalWould(t *testing.T) {
	for _, name := range []string{"", "lower", "_PID", "1A", "A-B", "A=B", "A\n", strings.Repeat("A", 65)} {
		if err := Send(PriorityInfo, "x", map[string]string{name: "x"}); err == nil || errors.Is(err, ErrNoJournal) {
			t.Errorf("%q: %v", name, err)
		}
	}
	if err := Send(PriorityInfo, "x", map[string]string{"A": strings.Repeat("x", maxField+1)}); err == nil || errors.Is(err, ErrNoJournal) {
		t.Errorf("a value without end: %v", err)
	}
}

func TestMarkersStayInTheirDirectory(t *testing.T) {
	for _, name := range []string{"", "../x", "a/b", ".x"} {
		if err := MarkStarted(t.TempDir(), Unit{Name: name}, Inputs{}); err == nil {
			t.Errorf("%q was accepted", name)
		}
	}
}
