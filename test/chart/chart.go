// Package chart installs the shipped chart on a test cluster, as `helm
// install` would, with nodeagent as it is built from this tree.
package chart

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hearth-sh/hearth/test/cluster"
	"github.com/hearth-sh/hearth/test/guests"
)

const (
	// Namespace is where the chart is installed.
	Namespace = "hearth-system"

	image = "hearth.test/nodeagent"
	tag   = "e2e"
)

// LoadImage gives every node an image of nodeagent: of the binary that
// HEARTH_BINARY names, or of one it builds. It returns the binary's path. The
// shipped image trusts Mozilla's authorities; this one trusts those that are
// given, as PEM.
func LoadImage(ctx context.Context, c *cluster.Cluster, authorities ...[]byte) (agent string, err error) {
	if agent = os.Getenv("HEARTH_BINARY"); agent == "" {
		if agent, err = cluster.GoBinary(ctx, "./cmd/nodeagent"); err != nil {
			return "", err
		}
	}
	if err := static(agent); err != nil {
		return "", err
	}
	files := map[string]string{"/usr/bin/nodeagent": agent}
	if len(authorities) > 0 {
		trusted, err := os.CreateTemp("", "hearth-authorities-")
		if err != nil {
			return "", err
		}
		defer os.Remove(trusted.Name())
		if _, err := trusted.Write(bytes.Join(authorities, []byte("\n"))); err != nil {
			return "", errors.Join(err, trusted.Close())
		}
		if err := errors.Join(trusted.Chmod(0o644), trusted.Close()); err != nil {
			return "", err
		}
		files["/etc/ssl/certs/ca-certificates.crt"] = trusted.Name()
	}
	return agent, c.LoadBinaryImage(ctx, image+":"+tag, files, "/usr/bin/nodeagent")
}

// static refuses a program that needs libraries, which the image lacks: its
// pods would say no more than "no such file or directory".
func static(path string) error {
	f, err := elf.Open(path)
	if err != nil {
		return fmt.Errorf("read HEARTH_BINARY: %w", err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return fmt.Errorf("%s is linked dynamically; build it with CGO_ENABLED=0, as make build does", path)
		}
	}
	return nil
}

// Install applies what helm renders with the values, each KEY=VALUE as --set
// takes it. It may be called again with others.
func Install(ctx context.Context, c *cluster.Cluster, values ...string) error {
	root, err := guests.Root()
	if err != nil {
		return err
	}
	helm := filepath.Join(root, "bin", "helm")
	if _, err := os.Stat(helm); err != nil {
		build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", helm, "helm.sh/helm/v4/cmd/helm")
		build.Dir, build.Env = filepath.Join(root, "packaging", "tools"), append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			return fmt.Errorf("build helm: %w\n%s", err, out)
		}
	}
	args := []string{"template", "hearth", filepath.Join(root, "packaging", "chart", "hearth"), "--namespace", Namespace, "--include-crds", "--kube-version", "1.36.3",
		"--set", "image.repository=" + image, "--set", "image.tag=" + tag, "--set", "agent.imds=off", "--set", "api.imds=off", "--set", "engine.networkPolicy=false"}
	for _, v := range values {
		args = append(args, "--set", v)
	}
	var stderr strings.Builder
	render := exec.CommandContext(ctx, helm, args...)
	render.Stderr = &stderr
	manifest, err := render.Output()
	if err != nil {
		return fmt.Errorf("render the chart: %w\n%s", err, stderr.String())
	}
	head := fmt.Sprintf("apiVersion: v1\nkind: Namespace\nmetadata: {name: %s}\n---\n", Namespace)
	_, err = c.ApplyManifest(ctx, append([]byte(head), manifest...))
	return err
}

// Dump writes what the chart's pods said.
func Dump(ctx context.Context, c *cluster.Cluster, w io.Writer) {
	pods, err := c.Client().CoreV1().Pods(Namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		fmt.Fprintln(w, err)
		return
	}
	for _, p := range pods.Items {
		fmt.Fprintf(w, "--- %s on %s: %s %+v\n", p.Name, p.Spec.NodeName, p.Status.Phase, p.Status.ContainerStatuses)
		if log, err := c.PodLogs(ctx, p.Namespace, p.Name, ""); err == nil {
			fmt.Fprintln(w, log)
		}
	}
}

// Ready says whether a pod is.
func Ready(p corev1.Pod) bool {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}
