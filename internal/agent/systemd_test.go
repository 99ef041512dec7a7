package agent

import (
	"context"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/internal/health"
)

// TestSystemdHearsReadyStatusWatchdogAndStopping plays systemd's side of
// sd_notify(3): a datagram socket.
func TestSystemdHearsReadyStatusWatchdogAndStopping(t *testing.T) {
	said, stop := startNotified(t, 300*time.Millisecond, func(*health.Registry) {})
	for _, want := range []string{"READY=1", "STATUS=healthy: no checks are registered", "WATCHDOG=1"} {
		said.wait(t, want)
	}
	stop()
	said.wait(t, "STOPPING=1")
}

func TestWatchdogHearsNothingWhileALoopIsStuck(t *testing.T) {
	said, stop := startNotified(t, 150*time.Millisecond, func(r *health.Registry) { r.Loop("stuck", -time.Second) })
	said.wait(t, "STATUS=healthy: no checks are registered")
	time.Sleep(500 * time.Millisecond)
	stop()
	said.wait(t, "STOPPING=1")
	for _, s := range said.seen {
		if s == "WATCHDOG=1" {
			t.Fatal("systemd was told that the agent is well")
		}
	}
}

func TestStatusCannotCarryAssignments(t *testing.T) {
	if got := oneLine("bad\nREADY=1\r"); strings.ContainsAny(got, "\n\r") {
		t.Errorf("%q", got)
	}
}

type datagrams struct {
	conn *net.UnixConn
	seen []string
}

func (d *datagrams) wait(t *testing.T, want string) {
	t.Helper()
	for _, s := range d.seen {
		if s == want {
			return
		}
	}
	buf := make([]byte, 4096)
	for {
		if err := d.conn.SetReadDeadline(time.Now().Add(2 * time.Minute)); err != nil {
			t.Fatal(err)
		}
		n, err := d.conn.Read(buf)
		if err != nil {
			t.Fatalf("systemd never heard %q, only %q: %v", want, d.seen, err)
		}
		d.seen = append(d.seen, string(buf[:n]))
		if string(buf[:n]) == want {
			return
		}
	}
}

func startNotified(t *testing.T, watchdog time.Duration, prepare func(*health.Registry)) (*datagrams, func()) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	t.Setenv("NOTIFY_SOCKET", socket)
	t.Setenv("WATCHDOG_USEC", strconv.FormatInt(watchdog.Microseconds(), 10))
	t.Setenv("WATCHDOG_PID", strconv.Itoa(os.Getpid()))
	a := &agent{health: health.NewRegistry(health.Options{Logger: slog.New(slog.DiscardHandler)})}
	prepare(a.health)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- a.notifySystemd(ctx) }()
	stopped := false
	stop := func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(stop)
	return &datagrams{conn: conn}, stop
}
