package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/test/guests"
	"github.com/hearth-sh/hearth/test/harness"
)

// TestTheBuildForOneMachineServesWithoutAClustersClients holds `make run` to
// its promise: the first build is short, and what it leaves out is not missed.
func TestTheBuildForOneMachineServesWithoutAClustersClients(t *testing.T) {
	const pkg = "github.com/hearth-sh/hearth/cmd/nodeagent"
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	deps, err := exec.CommandContext(ctx, "go", "list", "-deps", "-tags", "local", pkg).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, deps)
	}
	for dep := range strings.Lines(string(deps)) {
		for _, heavy := range []string{"k8s.io/", "github.com/containerd/containerd/", "github.com/aws/"} {
			if strings.HasPrefix(dep, heavy) {
				t.Errorf("it compiles %s", dep)
			}
		}
	}

	// What `make run` does.
	binary := filepath.Join(t.TempDir(), "nodeagent")
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-tags", "local", "-ldflags", "-s -w", "-o", binary, pkg)
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	one, err := harness.Start(t.Context(), harness.Options{Binary: binary, DataDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(one.KillAll)
	d := dev{one, t}
	d.submit("local", guests.Read(t, "hello-c"), "")
	d.answersSoon("local", "Hello, world, from C!")
	if a := d.get("/readyz"); a.Status != http.StatusOK {
		t.Errorf("readiness: %s", a)
	}
	eventually(t, func() error {
		out, err := exec.CommandContext(ctx, binary, "status", "--data-dir", d.DataDir).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})

	// On a node it must not look like an agent that does its work.
	for _, args := range [][]string{{"run", "--kubernetes=in-cluster"}, {"run"}} {
		out, err := exec.CommandContext(ctx, binary, args...).CombinedOutput()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 2 || !strings.Contains(string(out), "built for one machine") {
			t.Errorf("%v ended with %v: %s", args, err, out)
		}
	}
	d.stop()
}
