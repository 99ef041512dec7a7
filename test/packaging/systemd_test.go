package packaging_test

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/imds/imdstest"
	"github.com/hearth-sh/hearth/test/harness"
	"github.com/hearth-sh/hearth/test/needs"
)

const (
	agentUnit  = "hearth-nodeagent.service"
	engineUnit = "hearth-engine.service"
	// bootUnit runs bootstrap at every boot.
	bootUnit = "hearth-bootstrap.service"
	// The exposure of `systemd-analyze security`, 0 to 10, that the units must
	// stay below: what root needs for containerd and its children, and little
	// more than network and executable memory for the engine.
	agentExposure, engineExposure = "3.2", "1.8"
	// bootExposure is that of a program that installs programs, units and
	// kernel settings: much of what systemd could forbid is its work.
	bootExposure = "8.8"
)

// shippedDeb is the package with the real binary.
func shippedDeb(t *testing.T) string {
	t.Helper()
	binary, err := nodeagent()
	if err != nil {
		needs.Missing(t, "%v", err)
	}
	boot, err := bootstrapper()
	if err != nil {
		needs.Missing(t, "%v", err)
	}
	dir := t.TempDir()
	for name, from := range map[string]string{"nodeagent": binary, "bootstrap": boot} {
		// Copies: nfpm packs a link as a link.
		must(t, "", nil, "cp", from, filepath.Join(dir, name))
		write(t, filepath.Join(dir, name+".8"), must(t, "", []string{"HOME=/home/you"}, from, "man"), 0o644)
	}
	return buildPackage(t, "deb", runtime.GOARCH, "1.2.3", dir)
}

// TestThePackageInstallsWithoutSystemd is how machine images are made: nothing
// runs, and yet the engine's user is there for the first boot.
func TestThePackageInstallsWithoutSystemd(t *testing.T) {
	needs.Root(t, "starting containers")
	need(t)
	deb, directory := shippedDeb(t), debianRoot(t)
	script := `set -eu
dpkg -i /package/` + filepath.Base(deb) + `
getent passwd hearth
nodeagent --version
bootstrap --version
bootstrap status || test $? = 1
systemctl enable hearth-bootstrap.service
test -L /etc/systemd/system/multi-user.target.wants/hearth-bootstrap.service
dpkg --verify hearth
echo changed >>/etc/hearth/nodeagent.env
dpkg -i /package/` + filepath.Base(deb) + ` </dev/null
tail -1 /etc/hearth/nodeagent.env
dpkg -r hearth
test -e /etc/hearth/nodeagent.env
dpkg -P hearth
test ! -e /etc/hearth
test ! -e /var/lib/hearth
dpkg -i /package/` + filepath.Base(deb) + `
mkdir -p /var/lib/hearth/bootstrap /var/lib/hearth/store
echo {} >/var/lib/hearth/bootstrap/installed.json
dpkg -P hearth
test ! -e /var/lib/hearth/store
test -e /var/lib/hearth/bootstrap/installed.json
echo done`
	ctx, cancel := context.WithTimeout(t.Context(), commandTimeout)
	defer cancel()
	cmd := nspawn(ctx, directory, "--private-network", "--bind-ro="+filepath.Dir(deb)+":/package", "/bin/sh", "-c", script)
	cmd.Stdin = bytes.NewReader(nil)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{"hearth:x:", "changed", "`bootstrap reset --yes`", "done"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("%q is missing in\n%s", want, out)
		}
	}
}

// TestTheUnitsUnderARealSystemd follows a machine from the package's
// installation to its removal; the steps build on each other.
func TestTheUnitsUnderARealSystemd(t *testing.T) {
	deb := shippedDeb(t)
	m := boot(t)
	m.unpack(t, filepath.Dir(deb), []string{filepath.Base(deb)}, "/var/lib")
	installed := m.must(t, "dpkg", "-i", "/var/lib/"+filepath.Base(deb))
	step := func(name string, f func(t *testing.T)) {
		t.Helper()
		if !t.Run(name, f) {
			t.FailNow()
		}
	}

	step("installing starts nothing and says how to", func(t *testing.T) {
		if !strings.Contains(installed, "systemctl enable --now hearth-nodeagent hearth-engine") {
			t.Errorf("dpkg said %s", installed)
		}
		for _, unit := range []string{agentUnit, engineUnit, bootUnit} {
			if state := m.property(t, unit, "ActiveState"); state != "inactive" {
				t.Errorf("%s is %s", unit, state)
			}
		}
	})

	step("systemd has no complaint about the units", func(t *testing.T) {
		if out := m.must(t, "systemd-analyze", "verify", agentUnit, engineUnit, bootUnit); out != "" {
			t.Error(out)
		}
	})

	step("the agent is up when systemd says so", func(t *testing.T) {
		m.must(t, "systemctl", "start", agentUnit)
		if state := m.must(t, "systemctl", "is-active", agentUnit); state != "active" {
			t.Errorf("it is %s", state)
		}
		if kind := m.property(t, agentUnit, "Type"); kind != "notify" {
			t.Errorf("type %s", kind)
		}
		if watchdog := m.property(t, agentUnit, "WatchdogUSec"); watchdog != "1min" {
			t.Errorf("watchdog %s", watchdog)
		}
		m.await(t, "STATUS= says the node's state", func() bool {
			return strings.HasPrefix(m.property(t, agentUnit, "StatusText"), string(v1alpha1.NodeHealthy)+": ")
		})
		// Without a cluster there is nothing to do, and that is healthy.
		m.must(t, "nodeagent", "status")
		var status v1alpha1.NodeStatus
		if err := json.Unmarshal([]byte(m.must(t, "nodeagent", "status", "-o", "json")), &status); err != nil {
			t.Fatal(err)
		}
		if status.State != v1alpha1.NodeHealthy {
			t.Errorf("it is %s: %s", status.State, status.Summary)
		}
	})

	step("the agent has the capabilities it uses", func(t *testing.T) {
		pid := m.property(t, agentUnit, "MainPID")
		status := m.must(t, "cat", "/proc/"+pid+"/status")
		// CHOWN 0, DAC_OVERRIDE 1, FOWNER 3, KILL 5, SETGID 6, SETUID 7, SYS_PTRACE 19.
		for _, want := range []string{"CapBnd:\t00000000000800eb", "NoNewPrivs:\t1", "Seccomp:\t2"} {
			if !strings.Contains(status, want) {
				t.Errorf("%q is missing in\n%s", want, status)
			}
		}
	})

	step("the engine is an ordinary user on loopback", func(t *testing.T) {
		m.must(t, "systemctl", "start", engineUnit)
		m.await(t, "the engine answers", func() bool {
			code, _, err := m.get(t.Context(), "http://127.0.0.1:8080/")
			return err == nil && code == http.StatusNotFound
		})
		user := m.must(t, "id", "--user", "hearth")
		pid := m.property(t, engineUnit, "MainPID")
		status := m.must(t, "cat", "/proc/"+pid+"/status")
		for _, want := range []string{"Uid:\t" + user + "\t" + user + "\t", "CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"} {
			if !strings.Contains(status, want) {
				t.Errorf("%q is missing in\n%s", want, status)
			}
		}
		// 1F90 is 8080; 0A is listening.
		table := m.must(t, "cat", "/proc/net/tcp", "/proc/net/tcp6")
		if !strings.Contains(table, " 0100007F:1F90 00000000:0000 0A ") || strings.Count(table, ":1F90 00000000") != 1 {
			t.Errorf("it listens elsewhere:\n%s", table)
		}
	})

	step("doctor finds nothing broken", func(t *testing.T) {
		var d struct {
			State    string
			Findings []struct{ Code, State, Message string }
		}
		out, _ := m.run(t.Context(), nil, "nodeagent", "doctor", "-o", "json") // warnings have an exit code
		if err := json.Unmarshal([]byte(out), &d); err != nil {
			t.Fatalf("%v in %s", err, out)
		}
		for _, f := range d.Findings {
			if f.State == "broken" {
				t.Errorf("%s: %s", f.Code, f.Message)
			}
		}
		if len(d.Findings) < 5 {
			t.Errorf("only %d findings", len(d.Findings))
		}
	})

	step("the engine does not reach instance metadata", func(t *testing.T) { deniesMetadata(t, m) })
	step("a function answers, in a worker that is seen", func(t *testing.T) { answers(t, m) })

	step("a stopped agent is restarted by the watchdog", func(t *testing.T) {
		m.must(t, "mkdir", "-p", "/run/systemd/system/"+agentUnit+".d")
		m.must(t, "sh", "-c", "printf '[Service]\\nWatchdogSec=3\\n' >/run/systemd/system/"+agentUnit+".d/50-impatient.conf")
		m.must(t, "systemctl", "daemon-reload")
		m.must(t, "systemctl", "restart", agentUnit)
		before := m.property(t, agentUnit, "MainPID")
		m.must(t, "systemctl", "kill", "--signal=STOP", "--kill-whom=main", agentUnit)
		m.await(t, "systemd restarted the agent", func() bool {
			return m.property(t, agentUnit, "NRestarts") != "0" && m.property(t, agentUnit, "ActiveState") == "active"
		})
		if after := m.property(t, agentUnit, "MainPID"); after == before || after == "0" {
			t.Errorf("process %s before, %s after", before, after)
		}
		if log := m.must(t, "journalctl", "--no-pager", "--unit="+agentUnit); !strings.Contains(log, "Failed with result 'watchdog'") {
			t.Error("it was not the watchdog")
		}
	})

	step("an upgrade restarts what runs", func(t *testing.T) {
		agent, engine := m.property(t, agentUnit, "MainPID"), m.property(t, engineUnit, "MainPID")
		m.must(t, "dpkg", "-i", "/var/lib/"+filepath.Base(deb))
		for unit, before := range map[string]string{agentUnit: agent, engineUnit: engine} {
			if after := m.property(t, unit, "MainPID"); after == before || after == "0" {
				t.Errorf("%s: process %s before, %s after", unit, before, after)
			}
		}
	})

	step("a stop is clean", func(t *testing.T) {
		m.must(t, "systemctl", "stop", agentUnit, engineUnit)
		for _, unit := range []string{agentUnit, engineUnit} {
			if result := m.property(t, unit, "Result"); result != "success" {
				t.Errorf("%s ended with %s", unit, result)
			}
		}
		if left := m.must(t, "find", "/run/hearth", "-type", "s"); left != "" {
			t.Errorf("sockets are left: %s", left)
		}
	})

	step("the units expose no more than they must", func(t *testing.T) {
		for unit, most := range map[string]string{agentUnit: agentExposure, engineUnit: engineExposure, bootUnit: bootExposure} {
			out, err := m.run(t.Context(), nil, "systemd-analyze", "security", "--no-pager", "--threshold="+strings.ReplaceAll(most, ".", ""), unit)
			lines := strings.Split(strings.TrimSpace(out), "\n")
			t.Log(lines[len(lines)-1])
			if err != nil {
				t.Errorf("%s is more exposed than %s:\n%s", unit, most, out)
			}
		}
	})

	step("bootstrap that finds a wrong configuration says so and is not tried again", func(t *testing.T) { refusesConfiguration(t, m) })

	step("a purge takes everything along", func(t *testing.T) {
		m.must(t, "systemctl", "enable", "--now", agentUnit, engineUnit)
		m.must(t, "systemctl", "enable", bootUnit)
		m.must(t, "dpkg", "-P", "hearth")
		for _, unit := range []string{agentUnit, engineUnit, bootUnit} {
			if state := m.property(t, unit, "LoadState"); state != "not-found" {
				t.Errorf("%s is %s, %s", unit, state, m.property(t, unit, "ActiveState"))
			}
		}
		if left := m.must(t, "sh", "-c", "find /etc /usr /var/lib/hearth /var/log/hearth -name '*hearth*' -o -name '*nodeagent*' 2>/dev/null || true"); left != "" {
			t.Errorf("left behind: %s", left)
		}
	})
}

// refusesConfiguration has the unit run on an instance whose user-data is wrong.
func refusesConfiguration(t *testing.T, m *machine) {
	ln, err := m.listen("169.254.169.254:80")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	config := imdstest.Default()
	config.Tags = nil // they would win
	config.UserData = "apiVersion: hearth.sh/v1alpha1\nkind: NodeConfig\nspec:\n  pool: swimming\n"
	service := imdstest.New(config)
	go func() { served <- service.Serve(ctx, ln) }()
	defer func() {
		cancel()
		<-served
	}()
	m.must(t, "systemctl", "start", "--no-block", bootUnit)
	m.await(t, "the unit failed", func() bool { return m.property(t, bootUnit, "ActiveState") == "failed" })
	if code := m.property(t, bootUnit, "ExecMainStatus"); code != "3" {
		t.Errorf("it ended with %s", code)
	}
	if restarts := m.property(t, bootUnit, "NRestarts"); restarts != "0" {
		t.Errorf("it was restarted %s times", restarts)
	}
	out, err := m.run(t.Context(), nil, "bootstrap", "status")
	if err == nil || !strings.Contains(out, "failed in phase configure") || !strings.Contains(out, "swimming") {
		t.Errorf("`bootstrap status` says %v: %s", err, out)
	}
	for _, want := range []string{"HEARTH_CODE=config-invalid", "HEARTH_PHASE=configure"} {
		if log := m.must(t, "journalctl", "--no-pager", "--output=verbose", "--unit="+bootUnit); !strings.Contains(log, want) {
			t.Errorf("the journal has no %s", want)
		}
	}
}

// deniesMetadata compares a process in the engine's control group with one
// outside of it.
func deniesMetadata(t *testing.T, m *machine) {
	ln, err := m.listen("169.254.169.254:80")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	service := imdstest.New(imdstest.Default())
	go func() { served <- service.Serve(ctx, ln) }()
	defer func() {
		cancel()
		<-served
	}()
	const connect = "timeout 3 bash -c '</dev/tcp/169.254.169.254/80'"
	m.must(t, "bash", "-c", connect)
	group := m.property(t, engineUnit, "ControlGroup")
	inGroup := func(command string) error {
		_, err := m.run(t.Context(), nil, "bash", "-c", "echo $$ >/sys/fs/cgroup"+group+"/cgroup.procs && "+command)
		return err
	}
	if err := inGroup("timeout 3 bash -c '</dev/tcp/127.0.0.1/8080'"); err != nil {
		t.Fatalf("not even loopback is reached: %v", err)
	}
	if err := inGroup(connect); err == nil {
		if log := m.must(t, "journalctl", "--no-pager", "-b"); strings.Contains(log, "does not support BPF/cgroup firewalling") {
			t.Skip("systemd cannot filter addresses on this kernel, IPAddressDeny= has no effect; everything else of the unit holds")
		}
		t.Error("the engine's control group reaches instance metadata")
	}
}

// answers gives the agent what `nodeagent dev` had left behind: a compiled
// function and the instructions to serve it, with which an agent starts while
// the API is away.
func answers(t *testing.T, m *machine) {
	module := filepath.Join(t.TempDir(), "hello.wasm")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", module, ".")
	build.Dir = filepath.Join(root, "examples", "hello-go")
	build.Env = append(os.Environ(), "GOOS=wasip1", "GOARCH=wasm")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	wasm, err := os.ReadFile(module)
	if err != nil {
		t.Fatal(err)
	}
	binary, err := nodeagent()
	if err != nil {
		t.Fatal(err)
	}
	dev, err := harness.Start(t.Context(), harness.Options{Binary: binary, DataDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	answer, err := dev.Submit(t.Context(), "hello", wasm, "", nil)
	if err == nil && answer.Status/100 != 2 {
		t.Errorf("submit: %s", answer)
	}
	if _, stopErr := dev.Stop(); stopErr != nil {
		t.Fatal(stopErr)
	}
	if err != nil {
		t.Fatal(err)
	}
	m.must(t, "systemctl", "stop", agentUnit)
	m.unpack(t, dev.DataDir, []string{"store", "agent"}, "/var/lib/hearth")
	m.must(t, "mkdir", "-p", "/run/systemd/system/"+agentUnit+".d")
	// The shipped command with an API that is away.
	m.must(t, "sh", "-c", `command=$(sed -n '/^ExecStart=/,/[^\\]$/p' /usr/lib/systemd/system/`+agentUnit+`)
printf '[Service]\nExecStart=\n%s --api-socket /run/hearth/api.sock --registry 127.0.0.1:1\n' "$command" >/run/systemd/system/`+agentUnit+`.d/50-api.conf`)
	m.must(t, "systemctl", "daemon-reload")
	m.must(t, "systemctl", "start", agentUnit)
	var last string
	m.await(t, "the function answers", func() bool {
		code, body, err := m.get(t.Context(), "http://127.0.0.1:8080/f/hello/")
		last = body
		return err == nil && code == http.StatusOK
	})
	if !strings.Contains(strings.ToLower(last), "hello") {
		t.Errorf("it answers %q", last)
	}
	// The supervisor kills workers by their memory, so it must see it.
	m.await(t, "the engine sees its worker's memory", func() bool {
		out, _ := m.run(t.Context(), nil, "nodeagent", "status", "-o", "json") // degraded without the API
		var status v1alpha1.NodeStatus
		if err := json.Unmarshal([]byte(out), &status); err != nil || status.Engine == nil || len(status.Engine.Workers) != 1 {
			return false
		}
		return status.Engine.Workers[0].RSSBytes > 0
	})
	m.must(t, "rm", "/run/systemd/system/"+agentUnit+".d/50-api.conf")
	m.must(t, "systemctl", "daemon-reload")
	m.must(t, "systemctl", "restart", agentUnit)
}
