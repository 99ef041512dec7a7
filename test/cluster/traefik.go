package cluster

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hearth-sh/hearth/test/process"
	"github.com/hearth-sh/hearth/test/slot"
)

const (
	// traefikController is what IngressClasses of Traefik name.
	traefikController = "traefik.io/ingress-controller"
	legoModule        = "github.com/go-acme/lego/v5"
)

// TraefikBinary returns the path of Traefik, the ingress controller of k3s,
// built from its module on first use (minutes) into the user's cache directory.
//
// Two of its dependencies cannot all be had, and no test needs them: the
// providers of DNS challenges, each of which imports a vendor's SDK, and a fork
// of go-http-auth. Small packages below test/tools/traefik stand in their
// places; the rest is Traefik's own.
func TraefikBinary(ctx context.Context, progress io.Writer) (string, error) {
	root, err := repository()
	if err != nil {
		return "", err
	}
	module := os.DirFS(filepath.Join(root, "test", "tools", "traefik"))
	key := sha256.New()
	fmt.Fprintln(key, recipe, runtime.GOARCH)
	if err := fs.WalkDir(module, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		content, err := fs.ReadFile(module, path)
		fmt.Fprintln(key, path, len(content))
		key.Write(content)
		return err
	}); err != nil {
		return "", fmt.Errorf("reading the module of Traefik: %w", err)
	}
	cache, err := cacheDir("traefik")
	if err != nil {
		return "", err
	}
	binary := filepath.Join(cache, hex.EncodeToString(key.Sum(nil))[:24])
	ctx, cancel := context.WithTimeout(ctx, lockTimeout)
	defer cancel()
	made := func() bool { _, err := os.Stat(binary); return err == nil }
	return binary, slot.Once(ctx, binary, made, func() error {
		start := time.Now()
		fmt.Fprintln(progress, "cluster: building Traefik; some five minutes when nothing is cached")
		if err := buildTraefik(ctx, module, binary); err != nil {
			return err
		}
		fmt.Fprintf(progress, "cluster: built in %s\n", time.Since(start).Round(time.Second))
		return nil
	})
}

func buildTraefik(ctx context.Context, module fs.FS, binary string) error {
	temp, err := os.MkdirTemp(filepath.Dir(binary), "build-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(temp)
	if err := os.CopyFS(temp, module); err != nil {
		return err
	}
	run := func(args ...string) ([]byte, error) {
		var stderr strings.Builder
		cmd := exec.CommandContext(ctx, "go", args...)
		cmd.Dir, cmd.Stderr, cmd.WaitDelay = temp, &stderr, 10*time.Second
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=", "GOWORK=off", "GOOS=linux")
		out, err := cmd.Output()
		if err != nil {
			return nil, fmt.Errorf("building Traefik: go %s: %w\n%s", args[0], err, process.Tail([]byte(stderr.String()), 30))
		}
		return out, nil
	}
	content, err := fs.ReadFile(module, "go.mod")
	if err != nil {
		return err
	}
	version, err := requiredVersion(content, legoModule)
	if err != nil {
		return err
	}
	out, err := run("mod", "download", "-json", legoModule+"@"+version)
	if err != nil {
		return err
	}
	var downloaded struct{ Dir string }
	if err := json.Unmarshal(out, &downloaded); err != nil {
		return err
	}
	if err := copyWithout(filepath.Join(temp, "lego"), downloaded.Dir, "providers/dns", "cmd", "e2e"); err != nil {
		return err
	}
	if err := os.CopyFS(filepath.Join(temp, "lego", "providers", "dns"), os.DirFS(filepath.Join(temp, "dns"))); err != nil {
		return err
	}
	if _, err := run("build", "-trimpath", "-buildvcs=false", "-mod=readonly", "-ldflags", "-s -w", "-o", filepath.Join(temp, "out"), "tool"); err != nil {
		return err
	}
	return os.Rename(filepath.Join(temp, "out"), binary)
}

// copyWithout copies a directory of the module cache, whose files are read
// only, without some of its directories.
func copyWithout(to, from string, without ...string) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		relative, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		for _, w := range without {
			if relative == w {
				return fs.SkipDir
			}
		}
		if d.IsDir() {
			return os.MkdirAll(filepath.Join(to, relative), 0o755)
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(to, relative), content, 0o644)
	})
}

// Traefik runs Traefik on address, host:port of HostIP, as k3s configures it:
// the controller of Ingresses of the class, which it makes. It ends with the
// cluster, or by the returned function.
func (c *Cluster) Traefik(ctx context.Context, address, class string) (stop func(), err error) {
	binary, err := TraefikBinary(ctx, os.Stderr)
	if err != nil {
		return nil, err
	}
	if _, err := c.Client().NetworkingV1().IngressClasses().Create(ctx, &networkingv1.IngressClass{
		ObjectMeta: metav1.ObjectMeta{Name: class}, Spec: networkingv1.IngressClassSpec{Controller: traefikController},
	}, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		return nil, err
	}
	d := &daemon{
		name: "traefik", log: filepath.Join(c.dir, "logs", "traefik.log"),
		env: []string{"KUBECONFIG=" + c.Kubeconfig()},
		argv: []string{
			filepath.Join(c.dir, "enter"), binary,
			"--global.checknewversion=false", "--global.sendanonymoususage=false", "--log.level=INFO",
			"--entrypoints.web.address=" + address, "--ping=true", "--ping.entrypoint=web",
			"--providers.kubernetesingress=true", "--providers.kubernetesingress.ingressclass=" + class,
		},
	}
	c.mu.Lock()
	c.others = append(c.others, d)
	c.mu.Unlock()
	if err := d.start(); err != nil {
		return nil, err
	}
	client := &http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	err = c.WaitFor(ctx, "Traefik to answer", registryTimeout, func(ctx context.Context) (bool, error) {
		if err := d.exited(); err != nil {
			return false, err
		}
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/ping", nil)
		if err != nil {
			return false, err
		}
		response, err := client.Do(request)
		if err != nil {
			return false, nil
		}
		return response.StatusCode == http.StatusOK, errors.Join(response.Body.Close())
	})
	return d.kill, err
}
