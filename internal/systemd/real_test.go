package systemd

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
	"github.com/hearth-sh/hearth/test/needs"
)

// insideEnv is set for the copy of this test program that runs on a machine
// with a systemd of its own.
const insideEnv = "HEARTH_TEST_INSIDE_SYSTEMD"

// The same packages as test/packaging's machines have, so that one directory
// serves both.
const (
	suite        = "bookworm"
	rootPackages = "systemd,systemd-sysv,dbus,man-db"
	bootTimeout  = 2 * time.Minute
)

// TestOnARealSystemd boots a small Debian in a container and runs the tests
// whose names begin with TestReal there.
func TestOnARealSystemd(t *testing.T) {
	if os.Getenv(insideEnv) != "" {
		t.Skip("this is the copy inside the machine")
	}
	if testing.Short() {
		t.Skip("booting a machine takes seconds")
	}
	needs.Root(t, "booting a machine in a container")
	for _, tool := range []string{"systemd-nspawn", "nsenter", "mmdebstrap"} {
		if _, err := exec.LookPath(tool); err != nil {
			needs.Missing(t, "%v: test/packaging/install-deps.sh installs it", err)
		}
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	// The test binary may be linked against this machine's C library, which
	// Debian's is compatible with or older than; a static copy always runs.
	static := filepath.Join(dir, "systemd.test")
	build := exec.CommandContext(t.Context(), "go", "test", "-c", "-o", static, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Logf("no static copy (%v), taking this one: %s", err, out)
		static = self
	}
	root := debianRoot(t)

	var console bytes.Buffer // read only after the process ended
	cmd := exec.Command("systemd-nspawn", "--quiet", "--directory="+root, "--volatile=overlay", "--register=no", "--keep-unit",
		"--machine=hearth-sd-"+strconv.Itoa(os.Getpid()), "--console=pipe", "--private-network", "--bind-ro="+static+":/run/host-systemd.test", "--boot")
	cmd.Env = append(os.Environ(), "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1", "SYSTEMD_SECCOMP=0")
	cmd.Stdout, cmd.Stderr = &console, &console
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	cmd.WaitDelay = time.Minute
	if err := cmd.Start(); err != nil {
		needs.Missing(t, "%v", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM) // an orderly end of the machine
		select {
		case <-ended:
		case <-time.After(time.Minute):
			_ = cmd.Process.Kill()
			<-ended
			t.Errorf("the machine did not power off:\n%s", console.String())
		}
	})
	run := func(ctx context.Context, init, name string, args ...string) ([]byte, error) {
		cmd := exec.CommandContext(ctx, "nsenter", append([]string{"-t", init, "-m", "-u", "-i", "-n", "-p", "-C", name}, args...)...)
		cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8", insideEnv + "=1"}
		cmd.WaitDelay = time.Second
		return cmd.CombinedOutput()
	}
	deadline := time.Now().Add(bootTimeout)
	var init string
	for state := ""; state != "running" && state != "degraded"; {
		select {
		case err := <-ended:
			ended <- err
			needs.Missing(t, "the container ended: %v\n%s", err, console.String())
		case <-time.After(100 * time.Millisecond):
		}
		children, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", cmd.Process.Pid, cmd.Process.Pid))
		if fields := strings.Fields(string(children)); len(fields) > 0 {
			init = fields[0]
			out, _ := run(t.Context(), init, "systemctl", "is-system-running") // every state but one is an error
			state = strings.TrimSpace(string(out))
		}
		if time.Now().After(deadline) {
			t.Fatalf("systemd is %q after %v", state, bootTimeout)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	out, err := run(ctx, init, "/run/host-systemd.test", "-test.v", "-test.run=^TestReal")
	t.Logf("inside:\n%s", out)
	if err != nil || !bytes.Contains(out, []byte("--- PASS: TestReal")) {
		t.Errorf("the tests inside failed: %v", err)
	}
}

// debianRoot is a directory with a Debian that nobody changes, made on first
// use (two minutes) in the user's cache.
func debianRoot(t *testing.T) string {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		needs.Missing(t, "%v", err)
	}
	key := sha256.Sum256([]byte(suite + " " + rootPackages))
	dir := filepath.Join(cache, "hearth", "debian-"+hex.EncodeToString(key[:6]))
	if _, err := os.Stat(filepath.Join(dir, "etc")); err == nil {
		return dir
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	temp, err := os.MkdirTemp(filepath.Dir(dir), "debian-build-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(temp)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	made := filepath.Join(temp, "root")
	if out, err := exec.CommandContext(ctx, "mmdebstrap", "--quiet", "--variant=minbase", "--include="+rootPackages, suite, made).CombinedOutput(); err != nil {
		needs.Missing(t, "make a Debian root: %v\n%s", err, out)
	}
	if err := os.Rename(made, dir); err != nil {
		if _, err2 := os.Stat(filepath.Join(dir, "etc")); err2 != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// inside connects to the machine's systemd.
func inside(t *testing.T) *Manager {
	t.Helper()
	if os.Getenv(insideEnv) == "" {
		t.Skip("needs a systemd of its own; TestOnARealSystemd runs it there")
	}
	m, err := Connect(t.Context(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	return m
}

// install writes units that are gone after the machine is.
func install(t *testing.T, m *Manager, units map[string]string) {
	t.Helper()
	for name, content := range units {
		if err := os.WriteFile("/etc/systemd/system/"+name, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func service(lines ...string) string { return "[Service]\n" + strings.Join(lines, "\n") + "\n" }

const generous = 30 * time.Second

func TestRealStartWaitsForReadinessAndReportsProgress(t *testing.T) {
	m := inside(t)
	install(t, m, map[string]string{"slow.service": service("Type=notify", "NotifyAccess=all", "TimeoutStartSec=0",
		"ExecStart=/bin/sh -c 'systemd-notify --status=\"loading things\"; sleep 1; systemd-notify --ready; exec sleep 1000'")})
	var seen []string
	u, err := m.Start(t.Context(), "slow.service", WaitOptions{Timeout: generous, Poll: 20 * time.Millisecond, Progress: func(p Progress) {
		seen = append(seen, p.Unit.ActiveState+"/"+p.Unit.SubState+"/"+p.Unit.StatusText)
	}})
	if err != nil {
		t.Fatal(err)
	}
	if !u.Active() || u.MainPID == 0 || u.Started.IsZero() || len(u.InvocationID) != 32 {
		t.Errorf("got %+v", u)
	}
	if all := strings.Join(seen, " "); !strings.Contains(all, "activating/start/loading things") || !strings.Contains(all, "active/running") {
		t.Errorf("progress: %v", seen)
	}
	again, err := m.Start(t.Context(), "slow.service", WaitOptions{Timeout: generous})
	if err != nil || again.InvocationID != u.InvocationID {
		t.Errorf("starting what runs made another one: %+v, %v", again, err)
	}
	anew, err := m.Restart(t.Context(), "slow.service", WaitOptions{Timeout: generous})
	if err != nil || anew.InvocationID == u.InvocationID || anew.MainPID == u.MainPID {
		t.Errorf("restarting did not: %+v, %v", anew, err)
	}
	if err := m.Stop(t.Context(), "slow.service", generous); err != nil {
		t.Error(err)
	}
	if u, err := m.Unit(t.Context(), "slow.service"); err != nil || u.ActiveState != "inactive" && u.ActiveState != "failed" {
		t.Errorf("after Stop: %+v, %v", u, err)
	}
}

func TestRealEveryEndIsClassified(t *testing.T) {
	m := inside(t)
	install(t, m, map[string]string{
		"hang.service":            service("Type=notify", "TimeoutStartSec=0", "ExecStart=/bin/sh -c 'echo waiting for a server; exec sleep 1000'"),
		"loop.service":            "[Unit]\nStartLimitIntervalSec=0\n" + service("Type=notify", "Restart=always", "RestartSec=50ms", "ExecStart=/bin/sh -c 'echo cannot bind; exit 3'"),
		"fail.service":            service("Type=oneshot", "ExecStart=/bin/sh -c 'echo no good; exit 7'"),
		"killed.service":          service("Type=notify", "ExecStart=/bin/sh -c 'kill -KILL $$$$'"),
		"ended.service":           service("Type=oneshot", "ExecStart=/bin/true"),
		"invalid.service":         service("Type=notify"),
		"limit.service":           "[Unit]\nStartLimitIntervalSec=60\nStartLimitBurst=2\n" + service("Type=notify", "Restart=always", "RestartSec=10ms", "ExecStart=/bin/false"),
		"missing-program.service": service("Type=notify", "ExecStart=/usr/local/bin/no-such-program"),
	})
	if err := os.Symlink("/dev/null", "/etc/systemd/system/masked.service"); err != nil {
		t.Fatal(err)
	}
	if err := m.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		unit  string
		o     WaitOptions
		code  fault.Code
		words []string
	}{
		{"absent.service", WaitOptions{Timeout: generous}, CodeUnitMissing, []string{"absent.service"}},
		{"masked.service", WaitOptions{Timeout: generous}, CodeUnitInvalid, []string{"masked"}},
		{"invalid.service", WaitOptions{Timeout: generous}, CodeUnitInvalid, []string{"invalid.service"}},
		{"fail.service", WaitOptions{Timeout: generous}, CodeUnitFailed, []string{"exit-code", "status 7", "no good"}},
		{"killed.service", WaitOptions{Timeout: generous}, CodeUnitFailed, []string{"signal 9", "SIGKILL"}},
		{"missing-program.service", WaitOptions{Timeout: generous}, CodeUnitFailed, []string{"status 203", "no-such-program"}},
		{"ended.service", WaitOptions{Timeout: generous}, CodeUnitEnded, []string{"status 0"}},
		{"loop.service", WaitOptions{Timeout: generous, MaxRestarts: 3}, CodeUnitLoops, []string{"restarted", "status 3", "cannot bind"}},
		{"limit.service", WaitOptions{Timeout: generous, MaxRestarts: 10}, CodeUnitFailed, []string{"limit.service failed"}},
		{"hang.service", WaitOptions{Timeout: 2 * time.Second}, CodeUnitTimeout, []string{"activating", "waiting for a server"}},
	} {
		t.Run(tt.unit, func(t *testing.T) {
			_, err := m.Start(t.Context(), tt.unit, tt.o)
			if fault.CodeOf(err) != tt.code {
				t.Fatalf("got %v, want %s", err, tt.code)
			}
			for _, word := range tt.words {
				if !strings.Contains(err.Error(), word) {
					t.Errorf("%q is not in: %v", word, err)
				}
			}
			if err := m.Stop(context.Background(), tt.unit, generous); err != nil {
				t.Error(err)
			}
			t.Log(err)
		})
	}
	// What hit its start limit can be started again at once: that is what a
	// second run of bootstrap does after somebody repaired it.
	if err := os.WriteFile("/etc/systemd/system/limit.service", []byte(service("ExecStart=/bin/sleep 1000")), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := m.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Start(t.Context(), "limit.service", WaitOptions{Timeout: generous}); err != nil {
		t.Error(err)
	}
}

func TestRealStartDoesNotOutliveItsContext(t *testing.T) {
	m := inside(t)
	install(t, m, map[string]string{"hang2.service": service("Type=notify", "TimeoutStartSec=0", "ExecStart=/bin/sleep 1000")})
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(500*time.Millisecond, cancel)
	if _, err := m.Start(ctx, "hang2.service", WaitOptions{Timeout: time.Hour}); err == nil || fault.CodeOf(err) != "" || !strings.Contains(err.Error(), "canceled") {
		t.Errorf("got %v", err)
	}
	if err := m.Stop(t.Context(), "hang2.service", generous); err != nil {
		t.Error(err)
	}
}

func TestRealStopHasADeadline(t *testing.T) {
	m := inside(t)
	install(t, m, map[string]string{"stubborn.service": service("TimeoutStopSec=5", "ExecStart=/bin/sh -c 'trap \"\" TERM; while :; do sleep 1; done'")})
	if _, err := m.Start(t.Context(), "stubborn.service", WaitOptions{Timeout: generous}); err != nil {
		t.Fatal(err)
	}
	time.Sleep(300 * time.Millisecond) // until the shell has its trap
	if err := m.Stop(t.Context(), "stubborn.service", time.Second); fault.CodeOf(err) != CodeStopTimeout {
		t.Errorf("got %v", err)
	}
	if err := m.Stop(t.Context(), "stubborn.service", generous); err != nil {
		t.Error(err)
	}
	if err := m.Stop(t.Context(), "never-heard-of.service", generous); err != nil {
		t.Error(err)
	}
}

func TestRealEnableAndDisableAreIdempotent(t *testing.T) {
	m := inside(t)
	install(t, m, map[string]string{"wanted.service": service("ExecStart=/bin/sleep 1000") + "[Install]\nWantedBy=multi-user.target\n"})
	const link = "/etc/systemd/system/multi-user.target.wants/wanted.service"
	for i, want := range []bool{true, false} {
		changed, err := m.Enable(t.Context(), "wanted.service")
		if err != nil || changed != want {
			t.Errorf("Enable %d: %v, %v", i, changed, err)
		}
	}
	if _, err := os.Lstat(link); err != nil {
		t.Error(err)
	}
	if u, err := m.Unit(t.Context(), "wanted.service"); err != nil || u.UnitFileState != "enabled" {
		t.Errorf("once enabled it is %+v, %v", u, err)
	}
	for i, want := range []bool{true, false} {
		changed, err := m.Disable(t.Context(), "wanted.service")
		if err != nil || changed != want {
			t.Errorf("Disable %d: %v, %v", i, changed, err)
		}
	}
	if _, err := m.Enable(t.Context(), "absent.service"); fault.CodeOf(err) != CodeUnitMissing {
		t.Errorf("enabling what is not there: %v", err)
	}
	if changed, err := m.Disable(t.Context(), "absent.service"); err != nil || changed {
		t.Errorf("disabling what is not there: %v, %v", changed, err)
	}
	if err := m.ResetFailed(t.Context(), "absent.service"); err != nil {
		t.Error(err)
	}
}

func TestRealNeedsRestartFollowsContents(t *testing.T) {
	m := inside(t)
	config, markers := "/etc/watched.conf", "/run/hearth-test"
	write := func(content string) {
		if err := os.WriteFile(config+".tmp", []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(config+".tmp", config); err != nil {
			t.Fatal(err)
		}
	}
	read := func() Inputs {
		in, err := ReadInputs("/etc/systemd/system/watched.service", config, "/etc/absent.conf")
		if err != nil {
			t.Fatal(err)
		}
		return in
	}
	write("1")
	install(t, m, map[string]string{"watched.service": service("ExecStart=/bin/sleep 1000")})
	u, err := m.Unit(t.Context(), "watched.service")
	if err != nil {
		t.Fatal(err)
	}
	if need, why := NeedsRestart(markers, u, read()); need {
		t.Error(why)
	}
	u, err = m.Start(t.Context(), "watched.service", WaitOptions{Timeout: generous})
	if err != nil {
		t.Fatal(err)
	}
	if need, why := NeedsRestart(markers, u, read()); need {
		t.Errorf("without a marker, just started: %s", why)
	}
	if err := MarkStarted(markers, u, read()); err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		content string
		want    bool
	}{{"1", false}, {"2", true}, {"1", false}} { // the same content again is no change, however new the file
		write(step.content)
		if need, why := NeedsRestart(markers, u, read()); need != step.want {
			t.Errorf("with %q: %v, %s", step.content, need, why)
		}
	}
	write("2")
	u, err = m.Restart(t.Context(), "watched.service", WaitOptions{Timeout: generous})
	if err != nil {
		t.Fatal(err)
	}
	if need, why := NeedsRestart(markers, u, read()); need {
		t.Errorf("restarted by somebody else: %s", why)
	}
	time.Sleep(20 * time.Millisecond) // more than the kernel's clock for files lags behind
	write("3")
	if need, why := NeedsRestart(markers, u, read()); !need {
		t.Errorf("changed after another's restart: %s", why)
	}
}

func TestRealJournalGetsFields(t *testing.T) {
	_ = inside(t)
	if err := Send(PriorityWarning, "two\nlines", map[string]string{"HEARTH_PHASE": "fetch", "HEARTH_RESULT": "{\n}"}); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(generous)
	for {
		out, err := exec.Command("journalctl", "--output=json", "HEARTH_PHASE=fetch").CombinedOutput()
		if err == nil && bytes.Contains(out, []byte(`"PRIORITY":"4"`)) && bytes.Contains(out, []byte(`"HEARTH_RESULT":"{\n}"`)) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the journal has %s, %v", out, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// Root needs no system bus: systemd has a socket of its own.
func TestRealSystemdIsReachedWithoutABus(t *testing.T) {
	_ = inside(t)
	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/run/no-bus")
	m, err := Connect(t.Context(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	install(t, m, map[string]string{"private.service": service("ExecStart=/bin/sleep 1000")})
	if _, err := m.Start(t.Context(), "private.service", WaitOptions{Timeout: generous}); err != nil {
		t.Error(err)
	}
}
