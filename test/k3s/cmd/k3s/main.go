// Command k3s is a stand-in for the k3s binary in tests, where the real one
// cannot be had. It keeps to k3s's documented contract (commands, flags,
// configuration files, environment, files, unit behaviour, tokens, supervisor
// endpoints, etcd membership) strictly: what k3s would only warn about is an
// error here. Inside, it runs real programs that tests put beside it (see
// toolsDir): etcd, the Kubernetes control plane, kubelet, kube-proxy,
// containerd, runc and CNI plugins.
//
// Known differences: no packaged components but the RuntimeClasses, HelmChart
// objects are stored and not rendered, flannel is host-gw or none, snapshots have
// no objects, the API server reaches kubelets directly, a server without --cluster-init has a
// single etcd in place of SQLite, and kubectl and crictl are missing.
package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
)

const (
	// k3sVersion is of the Kubernetes that test/tools/kubernetes builds.
	k3sVersion = "v1.36.3+k3s1"
	// toolsDir holds the wrapped programs.
	toolsDir = "/usr/local/lib/hearth-test-k3s"
	// defaultDataDir is k3s's for root.
	defaultDataDir = "/var/lib/rancher/k3s"
)

func main() {
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, nil)))
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil {
		// k3s's own form of last words.
		fmt.Fprintf(os.Stderr, "level=fatal msg=%q\n", err.Error())
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return errors.New("a command is needed: server, agent, etcd-snapshot, token, ctr")
	}
	switch args[0] {
	case "--version", "-v":
		fmt.Printf("k3s version %s (hearth-test)\ngo version %s\n", k3sVersion, runtime.Version())
		return nil
	case "server":
		o, err := loadOptions(serverCommand, args[1:], os.Environ())
		if err != nil {
			return err
		}
		return runServer(ctx, o)
	case "agent":
		o, err := loadOptions(agentCommand, args[1:], os.Environ())
		if err != nil {
			return err
		}
		return runAgentCommand(ctx, o)
	case "etcd-snapshot":
		return snapshotCommand(ctx, args[1:])
	case "ctr":
		argv := append([]string{"ctr", "--address=" + containerdSocket}, args[1:]...)
		return syscall.Exec(filepath.Join(toolsDir, "ctr"), argv, os.Environ())
	case "token":
		if len(args) > 1 && args[1] == "generate" {
			fmt.Println(randomHex(16))
			return nil
		}
		return errors.New("of the token command only generate is there")
	}
	return fmt.Errorf("no such command: %s", args[0])
}

// payload stands for the programs that k3s carries.
var payload = bytes.Repeat([]byte("the programs of "+k3sVersion+"\n"), 300_000)

// extract unpacks what k3s carries into data/<hash>, with links to the programs
// that stand for it, and puts them first on PATH. As k3s does, it writes the
// lists that somebody may compare them with, syncs nothing, and takes a directory
// that is there for a good one: what a loss of power truncated does not run.
func extract(dataDir string) error {
	dir := filepath.Join(dataDir, "data", strings.Repeat("0123456789abcdef", 4))
	bin := filepath.Join(dir, "bin")
	cni := filepath.Join(dataDir, "data", "cni")
	runc, err := exec.LookPath("runc")
	if err != nil {
		return fmt.Errorf("the machine needs runc: %w", err)
	}
	programs := map[string]string{"runc": runc, "k3s-server": "k3s", "k3s-agent": "k3s"}
	for _, name := range []string{"containerd", "containerd-shim-runc-v2", "ctr"} {
		programs[name] = filepath.Join(toolsDir, name)
	}
	if !exists(dir) {
		if err := unpack(dir, programs); err != nil {
			return fmt.Errorf("extracting data: %w", err)
		}
	}
	switch program, err := os.ReadFile(filepath.Join(bin, "k3s")); {
	case errors.Is(err, fs.ErrNotExist):
		return errors.New(`exec: "k3s-server": executable file not found in $PATH`)
	case err != nil:
		return err
	case !bytes.Equal(program, payload):
		return fmt.Errorf("fork/exec %s/k3s-server: exec format error", bin)
	}
	if err := os.MkdirAll(cni, 0o755); err != nil {
		return err
	}
	links := map[string]string{filepath.Join(dataDir, "data", "current"): dir}
	for _, name := range []string{"ptp", "host-local", "portmap", "loopback", "bridge", "bandwidth"} {
		links[filepath.Join(cni, name)] = "/usr/lib/cni/" + name
	}
	for link, target := range links {
		if have, err := os.Readlink(link); err == nil && have == target {
			continue
		}
		_ = os.Remove(link)
		if err := os.Symlink(target, link); err != nil {
			return err
		}
	}
	return os.Setenv("PATH", cni+":"+bin+":"+os.Getenv("PATH"))
}

// unpack makes a directory of programs beside its place and renames it.
func unpack(dir string, programs map[string]string) error {
	made := dir + "-tmp"
	if err := os.RemoveAll(made); err != nil {
		return err
	}
	bin := filepath.Join(made, "bin")
	sum := sha256.Sum256(payload)
	var links strings.Builder
	for name, target := range programs {
		fmt.Fprintf(&links, "%s %s\n", name, target)
	}
	for name, content := range map[string][]byte{
		"k3s": payload, ".sha256sums": fmt.Appendf(nil, "%x  k3s\n", sum), ".links": []byte(links.String()),
	} {
		if err := writeFile(filepath.Join(bin, name), content, 0o755); err != nil {
			return err
		}
	}
	for name, target := range programs {
		if err := os.Symlink(target, filepath.Join(bin, name)); err != nil {
			return err
		}
	}
	return os.Rename(made, dir)
}

// notify tells systemd a state, as sd_notify(3) says.
func notify(state string) {
	socket := os.Getenv("NOTIFY_SOCKET")
	if socket == "" {
		return
	}
	if socket[0] == '@' {
		socket = "\x00" + socket[1:]
	}
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_DGRAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		slog.Error("notifying systemd", "error", err)
		return
	}
	defer syscall.Close(fd)
	if err := syscall.Sendto(fd, []byte(state), 0, &syscall.SockaddrUnix{Name: socket}); err != nil {
		slog.Error("notifying systemd", "error", err)
	}
}
