package systemd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/dbus"
	godbus "github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
)

const (
	// DefaultCallTimeout bounds one exchange with systemd. It answers within
	// milliseconds unless it is reloading hundreds of units on a busy machine.
	DefaultCallTimeout = 15 * time.Second
	// jobMode replaces a contrary job that is waiting, as systemctl does.
	jobMode = "replace"
)

// Options of a connection.
type Options struct {
	// CallTimeout bounds connecting and each exchange. Default: DefaultCallTimeout.
	CallTimeout time.Duration
}

// bus is what of go-systemd's connection is used.
type bus interface {
	SystemStateContext(ctx context.Context) (*dbus.Property, error)
	GetAllPropertiesContext(ctx context.Context, unit string) (map[string]any, error)
	StartUnitContext(ctx context.Context, name, mode string, ch chan<- string) (int, error)
	RestartUnitContext(ctx context.Context, name, mode string, ch chan<- string) (int, error)
	StopUnitContext(ctx context.Context, name, mode string, ch chan<- string) (int, error)
	ResetFailedUnitContext(ctx context.Context, name string) error
	ReloadContext(ctx context.Context) error
	EnableUnitFilesContext(ctx context.Context, files []string, runtime, force bool) (bool, []dbus.EnableUnitFileChange, error)
	DisableUnitFilesContext(ctx context.Context, files []string, runtime bool) ([]dbus.DisableUnitFileChange, error)
	Close()
}

// Manager is a connection to this machine's systemd. It is safe for concurrent
// use. Close it.
type Manager struct {
	o     Options
	bus   bus
	lines func(ctx context.Context, unit string, n int) []string
	after func(time.Duration) <-chan time.Time
}

// Connect connects to systemd: over the system bus, or, for root where there is
// none, over systemd's own socket.
func Connect(ctx context.Context, o Options) (*Manager, error) {
	if o.CallTimeout <= 0 {
		o.CallTimeout = DefaultCallTimeout
	}
	// The connection lives as long as the context it is made with, so the
	// deadline is for getting through to systemd only.
	lifetime, cut := context.WithCancel(context.WithoutCancel(ctx))
	ctx, cancel := context.WithTimeout(ctx, o.CallTimeout)
	defer cancel()
	stop := context.AfterFunc(ctx, cut)
	conn, err := dbus.NewWithContext(lifetime)
	if err == nil {
		_, err = conn.SystemStateContext(ctx)
		if err != nil {
			conn.Close()
		}
	}
	if !stop() && err == nil {
		conn.Close()
		err = ctx.Err()
	}
	if err != nil {
		cut()
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, classifyCall(err, "connecting to systemd", o.CallTimeout)
	}
	return &Manager{o: o, bus: closer{conn, cut}, lines: journalLines, after: time.After}, nil
}

// closer ends a connection's context with it.
type closer struct {
	*dbus.Conn
	cut context.CancelFunc
}

func (c closer) Close() {
	c.Conn.Close()
	c.cut()
}

// Close ends the connection. What was started stays.
func (m *Manager) Close() { m.bus.Close() }

// call bounds one exchange and classifies its failure.
func (m *Manager) call(ctx context.Context, doing string, f func(context.Context) error) error {
	bounded, cancel := context.WithTimeout(ctx, m.o.CallTimeout)
	defer cancel()
	err := f(bounded)
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return fmt.Errorf("%s: %w", doing, ctx.Err())
	}
	if bounded.Err() != nil {
		err = bounded.Err()
	}
	return classifyCall(err, doing, m.o.CallTimeout)
}

// classifyCall gives a failure of an exchange its code. D-Bus has names for
// failures (org.freedesktop.DBus.Error of the D-Bus specification, and
// systemd's bus-common-errors.h).
func classifyCall(err error, doing string, timeout time.Duration) error {
	var name string
	if e := (godbus.Error{}); errors.As(err, &e) {
		name = e.Name
	}
	switch {
	case errors.Is(err, context.Canceled):
		return fmt.Errorf("%s: %w", doing, err)
	case errors.Is(err, context.DeadlineExceeded), name == "org.freedesktop.DBus.Error.NoReply", name == "org.freedesktop.DBus.Error.Timeout":
		return fault.Passing(CodeNoAnswer, err, remedyNoAnswer, "%s: no answer within %s", doing, timeout)
	case name == "org.freedesktop.DBus.Error.AccessDenied", name == "org.freedesktop.DBus.Error.AuthFailed",
		name == "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired", errors.Is(err, fs.ErrPermission), errors.Is(err, unix.EACCES):
		return fault.New(CodePermission, err, "run it as root", "%s was refused", doing)
	case name == "org.freedesktop.systemd1.NoSuchUnit", name == "org.freedesktop.DBus.Error.FileNotFound":
		return fault.New(CodeUnitMissing, err, "see whether its file is in /etc/systemd/system", "%s: there is no such unit", doing)
	case name == "org.freedesktop.systemd1.UnitMasked", name == "org.freedesktop.systemd1.BadUnitSetting", name == "org.freedesktop.systemd1.LoadFailed":
		return fault.New(CodeUnitInvalid, err, "see `systemctl status` of it, and systemctl unmask if it is masked", "%s: the unit cannot be used", doing)
	case name == "org.freedesktop.DBus.Error.ServiceUnknown", name == "org.freedesktop.DBus.Error.NameHasNoOwner", name == "", strings.HasPrefix(name, "org.freedesktop.DBus.Error.Spawn"):
		return fault.New(CodeNoBus, err, remedyBus, "%s is not possible", doing)
	}
	return fault.New(CodeRefused, err, "see the reason; systemctl does the same by hand", "%s was refused", doing)
}

// Unit is what systemd says of a service.
type Unit struct {
	Name string `json:"name"`
	// LoadState: loaded, not-found, bad-setting, error, masked.
	LoadState string `json:"loadState"`
	// ActiveState: active, reloading, inactive, failed, activating, deactivating.
	ActiveState string `json:"activeState"`
	// SubState is finer: start, running, auto-restart, ...
	SubState string `json:"subState"`
	// UnitFileState: enabled, disabled, static, masked, ...
	UnitFileState string `json:"unitFileState,omitempty"`
	// Result says why it failed: success, exit-code, signal, timeout,
	// oom-kill, start-limit-hit, ...
	Result string `json:"result,omitempty"`
	// Restarts is how often systemd restarted it since it was last started.
	Restarts uint32 `json:"restarts"`
	// ExitStatus is the last process's exit status, or the signal that killed
	// it, as Killed says.
	ExitStatus int32  `json:"exitStatus"`
	Killed     bool   `json:"killed,omitempty"`
	MainPID    uint32 `json:"mainPID,omitempty"`
	// StatusText is what the service says of itself (sd_notify STATUS=).
	StatusText string `json:"statusText,omitempty"`
	// Started is when the current or last main process began; zero if none did.
	Started time.Time `json:"started,omitzero"`
	// InvocationID is another one after each start.
	InvocationID string `json:"invocationID,omitempty"`
	// Job says that a job for it is waiting or running.
	Job bool `json:"job,omitempty"`
	// NeedsReload says that its file changed since systemd read it.
	NeedsReload bool `json:"needsReload,omitempty"`
}

// Active says whether the unit is up; for Type=notify, that it said so.
func (u Unit) Active() bool { return u.ActiveState == "active" || u.ActiveState == "reloading" }

// String is one line for people.
func (u Unit) String() string {
	s := fmt.Sprintf("%s is %s (%s)", u.Name, u.ActiveState, u.SubState)
	if u.Restarts > 0 {
		s += fmt.Sprintf(", restarted %d times", u.Restarts)
	}
	if u.StatusText != "" {
		s += ": " + u.StatusText
	}
	return s
}

// exited says how the last process ended.
func (u Unit) exited() string {
	if u.Killed {
		return fmt.Sprintf("was killed by signal %d (%s)", u.ExitStatus, unix.SignalName(unix.Signal(u.ExitStatus)))
	}
	return fmt.Sprintf("ended with status %d", u.ExitStatus)
}

// Unit asks for the state of a unit; one that does not exist has the LoadState
// not-found, and is no error.
func (m *Manager) Unit(ctx context.Context, name string) (u Unit, err error) {
	err = m.call(ctx, "asking for "+name, func(ctx context.Context) error {
		p, err := m.bus.GetAllPropertiesContext(ctx, name)
		if err == nil {
			u = readUnit(name, p)
		}
		return err
	})
	return u, err
}

// readUnit takes what it knows; properties of other types are as if absent.
func readUnit(name string, p map[string]any) Unit {
	u := Unit{
		Name: name, LoadState: get[string](p, "LoadState"), ActiveState: get[string](p, "ActiveState"), SubState: get[string](p, "SubState"),
		UnitFileState: get[string](p, "UnitFileState"), Result: get[string](p, "Result"), Restarts: get[uint32](p, "NRestarts"),
		ExitStatus: get[int32](p, "ExecMainStatus"), MainPID: get[uint32](p, "MainPID"), StatusText: get[string](p, "StatusText"),
		NeedsReload: get[bool](p, "NeedDaemonReload"),
	}
	code := get[int32](p, "ExecMainCode") // waitid(2)'s si_code
	u.Killed = code == 2 || code == 3     // CLD_KILLED, CLD_DUMPED
	if us := get[uint64](p, "ExecMainStartTimestamp"); us > 0 && us < 1<<60 {
		u.Started = time.UnixMicro(int64(us))
	}
	u.InvocationID = fmt.Sprintf("%x", get[[]byte](p, "InvocationID"))
	if job, ok := p["Job"].([]any); ok && len(job) > 0 {
		id, _ := job[0].(uint32)
		u.Job = id != 0
	}
	return u
}

func get[T any](p map[string]any, name string) T {
	v, _ := p[name].(T)
	return v
}

// Reload makes systemd read its unit files again.
func (m *Manager) Reload(ctx context.Context) error {
	return m.call(ctx, "reloading systemd's units", m.bus.ReloadContext)
}

// Enable makes a unit start at every boot, and says whether that is new.
// Reload before, if the file is. systemd reads its files again when it is:
// until then it would call the unit disabled.
func (m *Manager) Enable(ctx context.Context, name string) (changed bool, err error) {
	err = m.call(ctx, "enabling "+name, func(ctx context.Context) error {
		_, changes, err := m.bus.EnableUnitFilesContext(ctx, []string{name}, false, true)
		changed = len(changes) > 0
		return err
	})
	if err == nil && changed {
		err = m.Reload(ctx)
	}
	return changed, err
}

// Disable undoes Enable. A unit that does not exist is disabled already.
func (m *Manager) Disable(ctx context.Context, name string) (changed bool, err error) {
	err = m.call(ctx, "disabling "+name, func(ctx context.Context) error {
		changes, err := m.bus.DisableUnitFilesContext(ctx, []string{name}, false)
		changed = len(changes) > 0
		return err
	})
	if fault.CodeOf(err) == CodeUnitMissing {
		return false, nil
	}
	if err == nil && changed {
		err = m.Reload(ctx)
	}
	return changed, err
}

// ResetFailed makes systemd forget that a unit failed, and how often it was
// restarted. For a unit that is not loaded there is nothing to forget.
func (m *Manager) ResetFailed(ctx context.Context, name string) error {
	err := m.call(ctx, "resetting "+name, func(ctx context.Context) error { return m.bus.ResetFailedUnitContext(ctx, name) })
	if fault.CodeOf(err) == CodeUnitMissing {
		return nil
	}
	return err
}
