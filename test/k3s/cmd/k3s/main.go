// Command k3s is a stand-in for the k3s binary in tests, where the real one
// cannot be had. It keeps to k3s's documented contract (commands, flags,
// configuration files, environment, files, unit behaviour, tokens, supervisor
// endpoints, etcd membership) strictly: what k3s would only warn about is an
// error here. Inside, it runs real programs that tests put beside it (see
// toolsDir): etcd, the Kubernetes control plane, kubelet, kube-proxy,
// containerd, runc and CNI plugins.
//
// Known differences: no packaged components but the RuntimeClasses, HelmChart
// objects are stored and not rendered, flannel is always host-gw, the API
// server reaches kubelets directly, a server without --cluster-init has a
// single etcd in place of SQLite, and kubectl and crictl are missing.
package main

import (
	"context"
	"errors"
	"fmt"
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

// extract makes data/<hash> and data/current with links to the programs, where
// k3s extracts those that it carries, and puts them first on PATH.
func extract(dataDir string) error {
	dir := filepath.Join(dataDir, "data", strings.Repeat("0123456789abcdef", 4))
	bin := filepath.Join(dir, "bin")
	cni := filepath.Join(dataDir, "data", "cni")
	for _, d := range []string{bin, cni} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	links := map[string]string{}
	for _, name := range []string{"containerd", "containerd-shim-runc-v2", "ctr"} {
		links[filepath.Join(bin, name)] = filepath.Join(toolsDir, name)
	}
	runc, err := exec.LookPath("runc")
	if err != nil {
		return fmt.Errorf("the machine needs runc: %w", err)
	}
	links[filepath.Join(bin, "runc")] = runc
	for _, name := range []string{"ptp", "host-local", "portmap", "loopback", "bridge", "bandwidth"} {
		links[filepath.Join(cni, name)] = "/usr/lib/cni/" + name
	}
	links[filepath.Join(dataDir, "data", "current")] = dir
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
