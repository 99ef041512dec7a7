package cluster

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/mod/modfile"

	"github.com/hearth-sh/hearth/test/process"
	"github.com/hearth-sh/hearth/test/slot"
)

const (
	// buildTimeout is for all programs with a cold build cache: about seven
	// minutes on two idle cores.
	buildTimeout = 40 * time.Minute
	// goBuildTimeout is for one program of this repository.
	goBuildTimeout = 10 * time.Minute
	// lockTimeout is how long to wait for another process that builds.
	lockTimeout = buildTimeout + time.Minute
	// recipe is part of the cache key: raise it when the build flags change.
	recipe = "1"
)

// programs are what Tools builds: by module below test/tools, as the tool
// directives there name them.
var programs = map[string][]string{
	"containerd": {"containerd", "containerd-shim-runc-v2", "ctr"},
	"kubernetes": {"kube-apiserver", "kube-controller-manager", "kube-proxy", "kube-scheduler", "kubectl", "kubelet", "metrics-server"},
}

// Tools returns a directory that holds the static programs of Kubernetes and
// containerd at the versions of the modules below test/tools. They are built on
// first use (minutes) into the user's cache directory, under a key made of
// those modules' files and the architecture; processes that ask at the same
// time build once. What is going on is written to progress, which may be nil.
func Tools(ctx context.Context, progress io.Writer) (string, error) {
	return buildOnce(ctx, programs, "seven", progress)
}

// buildOnce is Tools for some modules; minutes is what they take when nothing
// is cached.
func buildOnce(ctx context.Context, programs map[string][]string, minutes string, progress io.Writer) (string, error) {
	if progress == nil {
		progress = io.Discard
	}
	root, err := repository()
	if err != nil {
		return "", err
	}
	key := sha256.New()
	fmt.Fprintln(key, recipe, runtime.GOARCH)
	for _, module := range slices.Sorted(maps.Keys(programs)) {
		for _, name := range []string{"go.mod", "go.sum"} {
			content, err := os.ReadFile(filepath.Join(root, "test", "tools", module, name))
			if err != nil {
				return "", fmt.Errorf("reading the versions of the cluster's programs: %w", err)
			}
			key.Write(content)
		}
	}
	cache, err := cacheDir("tools")
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, hex.EncodeToString(key.Sum(nil))[:24])
	if complete(dir, programs) == nil {
		return dir, nil
	}

	ctx, cancel := context.WithTimeout(ctx, lockTimeout)
	defer cancel()
	fmt.Fprintln(progress, "cluster: its programs are not built yet; waiting for the lock on their cache")
	return dir, slot.Once(ctx, dir, func() bool { return complete(dir, programs) == nil }, func() error {
		return buildTools(ctx, filepath.Join(root, "test", "tools"), dir, programs, minutes, progress)
	})
}

func buildTools(ctx context.Context, modules, dir string, programs map[string][]string, minutes string, progress io.Writer) error {
	temp, err := os.MkdirTemp(filepath.Dir(dir), "build-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(temp)
	ctx, cancel := context.WithTimeout(ctx, buildTimeout)
	defer cancel()
	for _, module := range slices.Sorted(maps.Keys(programs)) {
		start := time.Now()
		fmt.Fprintf(progress, "cluster: building %s; some %s minutes for all when nothing is cached\n", strings.Join(programs[module], ", "), minutes)
		flags, err := versionFlags(filepath.Join(modules, module, "go.mod"))
		if err != nil {
			return err
		}
		cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false",
			"-ldflags", flags, "-o", temp+string(filepath.Separator), "tool")
		cmd.Dir = filepath.Join(modules, module)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=", "GOWORK=off", "GOOS=linux")
		cmd.WaitDelay = 10 * time.Second
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("building the programs of test/tools/%s: %w\n%s", module, err, process.Tail(out, 30))
		}
		fmt.Fprintf(progress, "cluster: built in %s\n", time.Since(start).Round(time.Second))
	}
	if err := complete(temp, programs); err != nil {
		return fmt.Errorf("a tool directive is missing in test/tools: %w", err)
	}
	if err := os.Chmod(temp, 0o755); err != nil {
		return err
	}
	if err := os.RemoveAll(dir); err != nil { // an older, incomplete one
		return err
	}
	if err := os.Rename(temp, dir); err != nil {
		return fmt.Errorf("publishing the cluster's programs: %w", err)
	}
	return nil
}

// versionFlags are the linker flags that tell the programs of a module their
// version: an API server without one says v0.0.0, which some clients refuse.
func versionFlags(path string) (string, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	file, err := modfile.ParseLax(path, content, nil)
	if err != nil {
		return "", err
	}
	flags := []string{"-s", "-w"}
	for _, require := range file.Require {
		switch version := require.Mod.Version; require.Mod.Path {
		case "github.com/containerd/containerd/v2":
			flags = append(flags, "-X", "github.com/containerd/containerd/v2/version.Version="+version)
		case "k8s.io/kubernetes":
			parts := strings.SplitN(strings.TrimPrefix(version, "v"), ".", 3)
			if len(parts) != 3 {
				return "", fmt.Errorf("%s requires a version of Kubernetes that is none: %s", path, version)
			}
			for _, pkg := range []string{"k8s.io/component-base/version", "k8s.io/client-go/pkg/version"} {
				flags = append(flags, "-X", pkg+".gitVersion="+version, "-X", pkg+".gitMajor="+parts[0], "-X", pkg+".gitMinor="+parts[1])
			}
		}
	}
	return strings.Join(flags, " "), nil
}

// requiredVersion is the version of a module that a go.mod requires.
func requiredVersion(gomod []byte, module string) (string, error) {
	file, err := modfile.ParseLax("go.mod", gomod, nil)
	if err != nil {
		return "", err
	}
	for _, require := range file.Require {
		if require.Mod.Path == module {
			return require.Mod.Version, nil
		}
	}
	return "", fmt.Errorf("go.mod does not require %s", module)
}

// complete returns an error that names a program that dir lacks.
func complete(dir string, programs map[string][]string) error {
	for _, names := range programs {
		for _, name := range names {
			if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
				return err
			}
		}
	}
	return nil
}

// GoBinary builds a main package of this repository as a static Linux program
// for this machine's architecture and returns its path in the user's cache,
// ready for LoadBinaryImage. pkg is relative to the repository's root, like
// "./cmd/nodeagent".
func GoBinary(ctx context.Context, pkg string) (string, error) {
	root, err := repository()
	if err != nil {
		return "", err
	}
	cache, err := cacheDir("bin")
	if err != nil {
		return "", err
	}
	// Trees differ, and two of them may build the same package at a time.
	sum := sha256.Sum256([]byte(root + "\x00" + pkg))
	dir := filepath.Join(cache, hex.EncodeToString(sum[:8]))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	temp, err := os.MkdirTemp(dir, "build-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(temp)
	ctx, cancel := context.WithTimeout(ctx, goBuildTimeout)
	defer cancel()
	name := filepath.Base(filepath.Clean(pkg))
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", filepath.Join(temp, name), pkg)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=", "GOOS=linux")
	cmd.WaitDelay = 10 * time.Second
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building %s: %w\n%s", pkg, err, process.Tail(out, 30))
	}
	path := filepath.Join(dir, name)
	if err := os.Rename(filepath.Join(temp, name), path); err != nil {
		return "", err
	}
	return path, nil
}

// repository is the root of this repository, found from this file's place.
func repository() (string, error) {
	_, file, _, ok := runtime.Caller(0)
	if !ok {
		return "", errors.New("the place of the cluster's sources is unknown")
	}
	root := filepath.Dir(filepath.Dir(filepath.Dir(file)))
	if _, err := os.Stat(filepath.Join(root, "test", "tools", "kubernetes", "go.mod")); err != nil {
		return "", fmt.Errorf("finding the repository (was the test built with -trimpath?): %w", err)
	}
	return root, nil
}

func cacheDir(name string) (string, error) {
	user, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("finding the cache directory (set HOME or XDG_CACHE_HOME): %w", err)
	}
	dir := filepath.Join(user, "hearth", name)
	return dir, os.MkdirAll(dir, 0o755)
}
