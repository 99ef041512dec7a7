package packaging_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/test/needs"
	"github.com/hearth-sh/hearth/test/process"
	"golang.org/x/sys/unix"
)

const (
	// suite and rootPackages make a small Debian with systemd; man is what
	// systemd-analyze asks whether a unit's manual page is there.
	suite        = "bookworm"
	rootPackages = "systemd,systemd-sysv,dbus,man-db"
	// bootTimeout is for a start of systemd, which takes some five seconds.
	bootTimeout = 2 * time.Minute
	// soon bounds waits for what takes a few seconds at most.
	soon = time.Minute
	// pause is between two looks at what has no event.
	pause = 100 * time.Millisecond
	// maxAnswer bounds what is read of an HTTP answer.
	maxAnswer = 1 << 20
)

// debianRoot returns a directory with a Debian that nobody changes: machines
// write to an overlay. It is made on first use (two minutes) in the user's cache.
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
	// mmdebstrap leaves no mounts behind, so this stays within the cache.
	defer os.RemoveAll(temp)
	ctx, cancel := context.WithTimeout(t.Context(), buildTimeout)
	defer cancel()
	made := filepath.Join(temp, "root")
	cmd := exec.CommandContext(ctx, "mmdebstrap", "--quiet", "--variant=minbase", "--include="+rootPackages, suite, made)
	if out, err := cmd.CombinedOutput(); err != nil {
		needs.Missing(t, "make a Debian root: %v\n%s", err, out)
	}
	if err := os.Rename(made, dir); err != nil && !errors.Is(err, fs.ErrExist) && !errors.Is(err, unix.ENOTEMPTY) {
		t.Fatal(err)
	}
	return dir
}

// machine is a booted Debian in a container, with a network of its own that
// reaches nothing: only loopback, where the metadata address is, too.
type machine struct {
	init      int // systemd's process, as the host sees it
	namespace string
}

// nspawn is the command of a container that leaves no trace, neither in its
// root directory nor with this machine's systemd, if it has one.
func nspawn(ctx context.Context, directory string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "systemd-nspawn", append([]string{"--quiet", "--directory=" + directory, "--volatile=overlay",
		"--register=no", "--keep-unit", "--machine=hearth-" + strconv.Itoa(os.Getpid()), "--console=pipe"}, args...)...)
	// A unified hierarchy for the container on hosts that have both; filters
	// of system calls are the units' own.
	cmd.Env = append(os.Environ(), "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1", "SYSTEMD_SECCOMP=0")
	return cmd
}

// boot starts a machine that ends with the test.
func boot(t *testing.T) *machine {
	t.Helper()
	needs.Root(t, "starting containers")
	need(t)
	root := debianRoot(t)
	m := &machine{namespace: "hearth-pk-" + strconv.Itoa(os.Getpid())}
	must(t, "", nil, "ip", "netns", "add", m.namespace)
	t.Cleanup(func() {
		if out, err := exec.Command("ip", "netns", "delete", m.namespace).CombinedOutput(); err != nil {
			t.Errorf("remove the network: %v %s", err, out)
		}
	})
	must(t, "", nil, "ip", "-n", m.namespace, "link", "set", "lo", "up")
	must(t, "", nil, "ip", "-n", m.namespace, "address", "add", "169.254.169.254/32", "dev", "lo")

	var console bytes.Buffer // read only after the process ended
	cmd := nspawn(context.Background(), root, "--boot", "--network-namespace-path=/run/netns/"+m.namespace)
	cmd.Stdout, cmd.Stderr = &console, &console
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	cmd.WaitDelay = soon
	if err := cmd.Start(); err != nil {
		needs.Missing(t, "%v", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() {
		if t.Failed() && m.init != 0 {
			out, _ := m.run(context.Background(), nil, "journalctl", "--no-pager", "-b", "-n", "200")
			t.Logf("the machine's journal:\n%s", out)
		}
		_ = cmd.Process.Signal(syscall.SIGTERM) // an orderly end of the machine
		select {
		case <-ended:
		case <-time.After(soon):
			_ = cmd.Process.Kill()
			<-ended
			t.Errorf("the machine did not power off:\n%s", console.String())
		}
	})
	deadline := time.Now().Add(bootTimeout)
	for {
		select {
		case err := <-ended:
			ended <- err
			needs.Missing(t, "the container ended: %v\n%s", err, console.String())
		case <-time.After(pause):
		}
		state := "no systemd yet"
		if children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", cmd.Process.Pid, cmd.Process.Pid)); err == nil {
			if m.init, _ = strconv.Atoi(firstWord(string(children))); m.init != 0 {
				// Exit codes other than 0 come with a word too.
				out, _ := m.run(t.Context(), nil, "systemctl", "is-system-running")
				state = strings.TrimSpace(out)
			}
		}
		if state == "running" || state == "degraded" {
			return m
		}
		if time.Now().After(deadline) {
			t.Fatalf("systemd is %q after %v", state, bootTimeout)
		}
	}
}

func firstWord(s string) string {
	if fields := strings.Fields(s); len(fields) > 0 {
		return fields[0]
	}
	return ""
}

// run executes a command on the machine, and returns stdout and stderr as one.
func (m *machine) run(ctx context.Context, stdin io.Reader, name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"-t", strconv.Itoa(m.init), "-m", "-u", "-i", "-n", "-p", "-C", name}, args...)...)
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8"}
	cmd.Stdin, cmd.WaitDelay = stdin, time.Second
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return string(out), err
}

func (m *machine) must(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := m.run(t.Context(), nil, name, args...)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// unpack puts a host's file or directory to a directory of the machine.
func (m *machine) unpack(t *testing.T, from string, names []string, to string) {
	t.Helper()
	tar := exec.CommandContext(t.Context(), "tar", append([]string{"-C", from, "-c"}, names...)...)
	content, err := tar.Output()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.run(t.Context(), bytes.NewReader(content), "tar", "-x", "--no-same-owner", "-C", to); err != nil {
		t.Fatal(err)
	}
}

// property asks systemd about a unit.
func (m *machine) property(t *testing.T, unit, name string) string {
	t.Helper()
	return m.must(t, "systemctl", "show", "--value", "--property="+name, unit)
}

// await looks until something is so.
func (m *machine) await(t *testing.T, what string, so func() bool) {
	t.Helper()
	for deadline := time.Now().Add(soon); !so(); time.Sleep(pause) {
		if time.Now().After(deadline) {
			t.Fatalf("after %v still not: %s", soon, what)
		}
	}
}

// within calls f on a thread in the machine's network; the thread ends with it.
func (m *machine) within(f func() error) error {
	return process.InNetNS("/run/netns/"+m.namespace, f)
}

// listen opens a listener in the machine's network.
func (m *machine) listen(address string) (ln net.Listener, err error) {
	err = m.within(func() (err error) {
		ln, err = net.Listen("tcp", address)
		return err
	})
	return ln, err
}

// get asks an address of the machine, which is an IP address.
func (m *machine) get(ctx context.Context, url string) (status int, body string, err error) {
	ctx, cancel := context.WithTimeout(ctx, soon)
	defer cancel()
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, network, address string) (conn net.Conn, err error) {
		err = m.within(func() (err error) {
			conn, err = (&net.Dialer{}).DialContext(ctx, network, address)
			return err
		})
		return conn, err
	}}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, "", err
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	return resp.StatusCode, string(data), err
}
