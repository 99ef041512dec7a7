// Package k3s gives test machines (test/machine) a k3s: a real binary where
// HEARTH_TEST_K3S names one, and otherwise the stand-in of cmd/k3s, which keeps
// to k3s's documented contract and wraps the real etcd, Kubernetes and
// containerd of test/cluster. Tests are written against the contract and run
// with either.
package k3s

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/hearth-sh/hearth/test/cluster"
	"github.com/hearth-sh/hearth/test/machine"
)

const (
	// BinaryEnv names a real k3s binary for this machine's architecture.
	BinaryEnv = "HEARTH_TEST_K3S"
	// InstallPath is where k3s belongs on a machine.
	InstallPath = "/usr/local/bin/k3s"
	// Kubeconfig is the administrator's on a server.
	Kubeconfig = "/etc/rancher/k3s/k3s.yaml"
	// ImagesDir is where images lie that k3s imports before the kubelet starts.
	ImagesDir = "/var/lib/rancher/k3s/agent/images"
	// PauseImage is the sandbox image that the stand-in uses by default, as k3s
	// does up to some version; NewPauseImage is that of later ones.
	PauseImage    = "docker.io/rancher/mirrored-pause:3.6"
	NewPauseImage = "docker.io/rancher/mirrored-pause:3.10"
	// programsDir is where a real k3s finds programs that it does not bring.
	programsDir = "/usr/local/sbin"
	// toolsDir is where the stand-in finds the programs that it wraps.
	toolsDir = "/usr/local/lib/hearth-test-k3s"
)

// Distribution is a k3s, and what it needs on this bench.
type Distribution struct {
	// Binary is the file to install at InstallPath, and to serve to those that
	// download it.
	Binary string
	// Version as "k3s --version" says it, like "v1.36.3+k3s1". For one that was
	// built from a working copy, the release that it is nearest to.
	Version string
	// Real says that it is not the stand-in.
	Real bool
	// Binds belong into machine.Spec.Binds of every machine that runs it.
	Binds map[string]string
	// Config are settings that every node on this bench needs beside its own,
	// as a file for config.yaml.d; they say what the machine below lacks.
	Config string
	// Images is a tar file with the sandbox image, for ImagesDir.
	Images string
}

// Load finds or builds a k3s. Building the programs of Kubernetes on first use
// takes minutes. dir holds what is made; progress may be nil.
func Load(ctx context.Context, dir string, progress io.Writer) (*Distribution, error) {
	d := &Distribution{Binary: os.Getenv(BinaryEnv), Binds: map[string]string{}}
	if d.Real = d.Binary != ""; !d.Real {
		tools, err := cluster.Tools(ctx, progress)
		if err != nil {
			return nil, err
		}
		if d.Binary, err = cluster.GoBinary(ctx, "./test/k3s/cmd/k3s"); err != nil {
			return nil, err
		}
		d.Binds[toolsDir] = tools
	} else {
		d.Binds = externals(ctx, d.Binary, progress)
	}
	out, err := exec.CommandContext(ctx, d.Binary, "--version").Output()
	if err != nil {
		return nil, fmt.Errorf("asking %s for its version: %w", d.Binary, err)
	}
	fields := strings.Fields(string(out))
	if len(fields) < 3 || fields[0] != "k3s" {
		return nil, fmt.Errorf("%s is no k3s: --version says %q", d.Binary, out)
	}
	d.Version = release(fields[2])
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err != nil {
		d.Config = "# Machines of this bench have version 1 of cgroups.\nkubelet-arg+:\n- fail-cgroupv1=false\n"
	}
	pause, err := cluster.GoBinary(ctx, "./test/cluster/images/pause")
	if err != nil {
		return nil, err
	}
	image, err := cluster.BinaryImage(map[string]string{"/pause": pause})
	if err != nil {
		return nil, err
	}
	d.Images = filepath.Join(dir, "images-"+runtime.GOARCH+".tar")
	return d, WriteImages(d.Images, map[string]v1.Image{PauseImage: image, NewPauseImage: image})
}

var (
	releaseForm = regexp.MustCompile(`^v1\.\d+\.\d+(-(alpha|beta|rc)\.?\d+)?\+k3s\d+$`)
	numberForm  = regexp.MustCompile(`^v1\.\d+\.\d+`)
)

// defaultRelease is what a binary that does not know its version counts as.
const defaultRelease = "v1.36.3+k3s1"

// release is a version as releases of k3s have it: "v1.36.2+k3s-1a2b3c4d-dirty",
// "v1.36.2" and "dev" are what builds from a working copy say.
func release(version string) string {
	if releaseForm.MatchString(version) {
		return version
	}
	if number := numberForm.FindString(version); number != "" {
		return number + "+k3s1"
	}
	return defaultRelease
}

// externals are programs that a k3s made without its bundle takes from its PATH:
// those beside the binary, or else this machine's. One with its bundle finds its
// own first. What is nowhere is left out.
func externals(ctx context.Context, binary string, progress io.Writer) map[string]string {
	dirs := []string{filepath.Dir(binary)}
	if tools, err := cluster.Tools(ctx, progress); err == nil {
		dirs = append(dirs, tools)
	}
	dirs = append(dirs, "/usr/lib/cni", "/opt/cni/bin", "/usr/local/bin", "/usr/local/sbin", "/usr/bin", "/usr/sbin")
	binds := map[string]string{}
	for _, program := range []string{"containerd", "containerd-shim-runc-v2", "runc", "host-local", "loopback", "bridge", "portmap", "bandwidth", "firewall", "flannel"} {
		for _, dir := range dirs {
			if info, err := os.Stat(filepath.Join(dir, program)); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
				binds[filepath.Join(programsDir, program)] = filepath.Join(dir, program)
				break
			}
		}
	}
	return binds
}

// WriteImages writes a tar file with images under their references, for
// ImagesDir.
func WriteImages(path string, images map[string]v1.Image) error {
	tags := map[name.Tag]v1.Image{}
	for ref, image := range images {
		tag, err := name.NewTag(ref)
		if err != nil {
			return err
		}
		tags[tag] = image
	}
	return tarball.MultiWriteToFile(path, tags)
}

// WriteLayout is WriteImages for images whose layers are no tar files, as those
// of Wasm modules: an OCI layout.
func WriteLayout(path string, images map[string]v1.Image) error {
	dir, err := os.MkdirTemp(filepath.Dir(path), "layout-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	into, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	for ref, image := range images {
		// The annotation by which containerd names what it imports.
		if err := into.AppendImage(image, layout.WithAnnotations(map[string]string{"io.containerd.image.name": ref})); err != nil {
			return fmt.Errorf("writing image %s: %w", ref, err)
		}
	}
	file, err := os.Create(path)
	if err != nil {
		return err
	}
	archive := tar.NewWriter(file)
	return errors.Join(archive.AddFS(os.DirFS(dir)), archive.Close(), file.Close())
}

// Install puts the binary, its settings and the images on a machine's disk, as
// an image of a machine for nodes would have them.
func (d *Distribution) Install(m *machine.Machine) error {
	for to, from := range map[string]string{InstallPath: d.Binary, filepath.Join(ImagesDir, "images.tar"): d.Images} {
		content, err := os.ReadFile(from)
		if err != nil {
			return err
		}
		if err := m.WriteFile(to, content, 0o755); err != nil {
			return err
		}
	}
	if d.Config == "" {
		return nil
	}
	return m.WriteFile("/etc/rancher/k3s/config.yaml.d/00-bench.yaml", []byte(d.Config), 0o600)
}

// RESTConfig is the administrator's of a running server, from this machine.
func RESTConfig(ctx context.Context, server *machine.Machine) (*rest.Config, error) {
	content, err := server.Exec(ctx, "cat", Kubeconfig)
	if err != nil {
		return nil, err
	}
	config, err := clientcmd.RESTConfigFromKubeConfig([]byte(content))
	if err != nil {
		return nil, err
	}
	config.Host = "https://" + server.IP + ":6443"
	config.QPS, config.Burst = 100, 200
	return config, nil
}

// Client is the administrator's of a running server, from this machine.
func Client(ctx context.Context, server *machine.Machine) (kubernetes.Interface, error) {
	config, err := RESTConfig(ctx, server)
	if err != nil {
		return nil, err
	}
	return kubernetes.NewForConfig(config)
}
