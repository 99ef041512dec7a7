package ecr

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/hearth-sh/hearth/test/guests"
)

// providerTimeout is for a cold build cache on a busy machine.
const providerTimeout = 10 * time.Minute

// BuildProvider builds the real ecr-credential-provider, by which a kubelet gets
// ECR's tokens, as a static program into dir, and returns its path. Seconds, when
// the programs of Kubernetes (test/cluster) and Hearth's own were built before.
func BuildProvider(ctx context.Context, dir string) (string, error) {
	root, err := guests.Root()
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "ecr-credential-provider")
	ctx, cancel := context.WithTimeout(ctx, providerTimeout)
	defer cancel()
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", path, "tool")
	build.Dir, build.WaitDelay = filepath.Join(root, "test", "tools", "ecr"), 10*time.Second
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=", "GOWORK=off", "GOOS=linux")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building the credential provider of ECR: %w\n%.2000s", err, out)
	}
	return path, nil
}
