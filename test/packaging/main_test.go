// Package packaging_test holds what Hearth ships to what it promises: the
// chart, the container image, the deb and rpm packages, and the units of
// systemd, which run under a real one.
package packaging_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/hearth-sh/hearth/test/cluster"
	"github.com/hearth-sh/hearth/test/harness"
	"github.com/hearth-sh/hearth/test/needs"
)

var update = flag.Bool("update", false, "write packaging/manifests/hearth.yaml and the table of docs/operations.md")

const (
	// root of the repository, as seen from here.
	root = "../.."
	// commandTimeout bounds programs that have seconds of work.
	commandTimeout = 2 * time.Minute
	// buildTimeout is for helm and nfpm on a cold build cache and a busy machine.
	buildTimeout = 15 * time.Minute
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var installDependencies = sync.OnceValue(func() error {
	ctx, cancel := context.WithTimeout(context.Background(), buildTimeout)
	defer cancel()
	out, err := exec.CommandContext(ctx, "sh", "install-deps.sh").CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: %s", err, bytes.TrimSpace(out))
	}
	return nil
})

// need installs what install-deps.sh installs.
func need(t *testing.T) {
	t.Helper()
	if err := installDependencies(); err != nil {
		needs.Missing(t, "%v", err)
	}
	// What only root can run is beside everyone else's PATH.
	t.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin")
}

var buildTools = sync.OnceValues(func() (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), buildTimeout)
	defer cancel()
	bin, err := filepath.Abs(filepath.Join(root, "bin"))
	if err != nil {
		return "", err
	}
	if _, err := os.Stat(filepath.Join(bin, "helm")); err == nil {
		if _, err := os.Stat(filepath.Join(bin, "nfpm")); err == nil {
			return bin, nil
		}
	}
	cmd := exec.CommandContext(ctx, "make", "packaging-tools")
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("make packaging-tools: %w\n%s", err, out)
	}
	return bin, nil
})

// tool is the path of helm or nfpm, which packaging/tools pins; they are built
// when they are missing.
func tool(t *testing.T, name string) string {
	t.Helper()
	bin, err := buildTools()
	if err != nil {
		needs.Missing(t, "%v", err)
	}
	return filepath.Join(bin, name)
}

// nodeagent is the binary that the packages hold: that of HEARTH_BINARY, or
// one built from this tree.
var nodeagent = sync.OnceValues(func() (string, error) {
	if os.Getenv(harness.BinaryEnv) != "" {
		return harness.Binary(context.Background(), "")
	}
	return cluster.GoBinary(context.Background(), "./cmd/nodeagent")
})

// bootstrapper is the other one.
var bootstrapper = sync.OnceValues(func() (string, error) {
	return cluster.GoBinary(context.Background(), "./cmd/bootstrap")
})

// output runs a program to its end and returns what it printed.
func output(t *testing.T, dir string, env []string, name string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), commandTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), env...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		err = fmt.Errorf("%s %s: %w\n%s", filepath.Base(name), strings.Join(args, " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return stdout.String(), err
}

// must is output of a program that has no reason to fail.
func must(t *testing.T, dir string, env []string, name string, args ...string) string {
	t.Helper()
	out, err := output(t, dir, env, name, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}
