package supervise

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/hearth-sh/hearth/internal/sandbox"
)

// patience bounds waits on real processes on a loaded machine.
const patience = 30 * time.Second

func TestMain(m *testing.M) {
	if role := os.Getenv("SUPERVISE_TEST_ROLE"); role != "" {
		child(role)
	}
	goleak.VerifyTestMain(m)
}

// child is what the test binary does when the tests start it as a child.
func child(role string) {
	if err := sandbox.Lifeline(3); err != nil {
		fmt.Println("lifeline:", err)
		os.Exit(1)
	}
	switch role {
	case "polite":
		terminated := make(chan os.Signal, 1)
		signal.Notify(terminated, syscall.SIGTERM)
		fmt.Println("pid", os.Getpid())
		<-terminated
		fmt.Println("bye")
		os.Exit(0)
	case "stubborn":
		signal.Ignore(syscall.SIGTERM)
		fmt.Println("pid", os.Getpid())
		select {}
	case "parent":
		// A parent that is killed, with a polite child of its own.
		p := New(Options{
			Name: "grandchild", Env: []string{"SUPERVISE_TEST_ROLE=polite"},
			Line: func(line []byte) { fmt.Printf("grandchild %s", line) },
		})
		_ = p.Run(context.Background())
	}
	os.Exit(1)
}

// start runs a child in the given role and returns its output lines.
func start(t *testing.T, role string) (p *Process, lines <-chan string, stop func()) {
	t.Helper()
	out := make(chan string, 100)
	p = New(Options{
		Name: role, Env: []string{"SUPERVISE_TEST_ROLE=" + role},
		Line: func(line []byte) { out <- strings.TrimSpace(string(line)) },
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	stop = func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Run returned %v after its context ended", err)
			}
		case <-time.After(patience):
			t.Error("Run did not return after its context ended")
		}
	}
	return p, out, stop
}

func nextPID(t *testing.T, lines <-chan string, prefix string) int {
	t.Helper()
	deadline := time.After(patience)
	for {
		select {
		case line := <-lines:
			if rest, ok := strings.CutPrefix(line, prefix); ok {
				pid, err := strconv.Atoi(rest)
				if err != nil {
					t.Fatalf("line %q: %v", line, err)
				}
				return pid
			}
		case <-deadline:
			t.Fatalf("no line with prefix %q", prefix)
		}
	}
}

func awaitGone(t *testing.T, pid int) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; {
		if syscall.Kill(pid, 0) == syscall.ESRCH {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("process %d is still there", pid)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func TestChildIsStartedAgainAfterItWasKilled(t *testing.T) {
	p, lines, stop := start(t, "polite")
	defer stop()
	first := nextPID(t, lines, "pid ")
	if p.PID() != first {
		t.Errorf("PID() = %d, the child says %d", p.PID(), first)
	}
	if err := syscall.Kill(first, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	second := nextPID(t, lines, "pid ")
	if second == first {
		t.Fatalf("the same process %d again", first)
	}
	if n, end := p.Restarts(); n != 1 || !strings.Contains(end, "killed") {
		t.Errorf("Restarts() = %d, %q, want 1 and that it was killed", n, end)
	}
}

func TestStopLetsTheChildEndByItself(t *testing.T) {
	p, lines, stop := start(t, "polite")
	pid := nextPID(t, lines, "pid ")
	stop()
	awaitGone(t, pid)
	select {
	case line := <-lines:
		if line != "bye" {
			t.Errorf("last line is %q, want the child's own word", line)
		}
	default:
		t.Error("the child was not asked to end")
	}
	if p.PID() != 0 {
		t.Errorf("PID() = %d after the end", p.PID())
	}
}

func TestStopKillsAChildThatDoesNotListen(t *testing.T) {
	if testing.Short() {
		t.Skip("waits for the whole grace period")
	}
	_, lines, stop := start(t, "stubborn")
	pid := nextPID(t, lines, "pid ")
	stop()
	awaitGone(t, pid)
}

func TestChildrenEndWithAParentThatIsKilled(t *testing.T) {
	p, lines, stop := start(t, "parent")
	grandchild := nextPID(t, lines, "grandchild pid ")
	if err := syscall.Kill(p.PID(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	awaitGone(t, grandchild)
	stop()
}

func TestRunReturnsWhenTheProgramDoesNotExist(t *testing.T) {
	p := New(Options{Name: "nothing", Program: "/nonexistent/nodeagent"})
	if err := p.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "nothing") {
		t.Fatalf("Run() = %v, want an error that names the process", err)
	}
}

func TestOverlongLinesAreCut(t *testing.T) {
	var got []int
	p := New(Options{Line: func(line []byte) { got = append(got, len(line)) }})
	p.lines(strings.NewReader(strings.Repeat("x", 3*maxOutputLine/2) + "\nshort\n"))
	if len(got) != 3 || got[0] != maxOutputLine || got[2] != len("short\n") {
		t.Fatalf("line lengths %v", got)
	}
}
