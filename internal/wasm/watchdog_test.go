package wasm_test

import (
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"testing"
	"time"
)

// watchdog kills this process after d unless it is stopped before. It is a
// process of its own, because Go's timers stand still in the very failure it
// is there for.
func watchdog(t *testing.T, d time.Duration) (stop func()) {
	t.Helper()
	seconds := strconv.Itoa(int(d.Seconds()))
	cmd := exec.Command("sh", "-c", `sleep "$0" & trap 'kill $!' TERM; wait $! && kill -KILL "$1"`, seconds, strconv.Itoa(os.Getpid()))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
	}
}
