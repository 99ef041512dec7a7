package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/hearth-sh/hearth/internal/artifact"
	"github.com/hearth-sh/hearth/internal/imds/imdstest"
	"github.com/hearth-sh/hearth/test/cluster"
	"github.com/hearth-sh/hearth/test/k3s"
	"github.com/hearth-sh/hearth/test/machine"
	"github.com/hearth-sh/hearth/test/shims"
)

const (
	stateBucket, filesBucket = "state", "files"
	// k3sSize and imagesSize are what k3s v1.36 for arm64 weighs: its binary, and
	// its archive of images in Zstandard. The stand-in's are filled up to them.
	k3sSize, imagesSize = 72 << 20, 170 << 20
	// blobSize and blobs are downloaded while memory is watched.
	blobSize, blobs = 512 << 20, 4
	// removeTimeout bounds the end of a machine.
	removeTimeout = time.Minute
)

// lab is a network with what machines download from, and what they download.
type lab struct {
	dir       string
	network   *machine.Network
	k3s       *k3s.Distribution
	store     *store
	url       string
	server    *http.Server
	served    chan struct{}
	key       artifact.PublicKey
	artifacts []artifact.Artifact
	// local has, by the path on a machine, the file on this one.
	local     map[string]string
	bootstrap string
	machines  int
}

func (l *lab) setUp(ctx context.Context, rate int64) error {
	var err error
	if l.dir, err = os.MkdirTemp("", "hearth-bench-bootstrap-"); err != nil {
		return err
	}
	if l.k3s, err = k3s.Load(ctx, l.dir, os.Stderr); err != nil {
		return err
	}
	wasm, err := shims.Compile(ctx, os.Stderr)
	if err != nil {
		return err
	}
	binary, err := cluster.GoBinary(ctx, "./cmd/bootstrap")
	if err != nil {
		return err
	}
	agent, err := cluster.GoBinary(ctx, "./cmd/nodeagent")
	if err != nil {
		return err
	}
	// Copies: others may build these programs anew meanwhile.
	if l.bootstrap, err = l.padded(binary, "bootstrap", 0); err != nil {
		return err
	}
	if agent, err = l.padded(agent, "nodeagent", 0); err != nil {
		return err
	}
	if l.network, err = machine.New(ctx, machine.Options{Progress: os.Stderr}); err != nil {
		return err
	}
	if err := l.listen(ctx, rate); err != nil {
		return err
	}
	// Bytes after the end of an ELF file or a tar archive are of no meaning.
	padded, err := l.padded(l.k3s.Binary, "k3s", k3sSize)
	if err != nil {
		return err
	}
	images, err := l.padded(l.k3s.Images, "images.tar", imagesSize)
	if err != nil {
		return err
	}
	l.local = map[string]string{
		k3s.InstallPath: padded, k3s.ImagesDir + "/images.tar": images,
		"/usr/local/bin/containerd-shim-wasmtime-v1": wasm.Wasmtime, "/usr/local/bin/nodeagent": agent,
	}
	if err := l.publish(map[string]string{
		"k3s": padded, "k3s-airgap-images": images, "containerd-shim-wasmtime-v1": wasm.Wasmtime, "nodeagent": agent,
	}); err != nil {
		return err
	}
	return l.makeBlobs()
}

func (l *lab) close() error {
	var errs []error
	if l.network != nil {
		errs = append(errs, l.network.Close())
	}
	if l.server != nil {
		errs = append(errs, l.server.Close())
		<-l.served
	}
	if l.dir != "" {
		errs = append(errs, os.RemoveAll(l.dir))
	}
	return errors.Join(errs...)
}

func (l *lab) listen(ctx context.Context, rate int64) error {
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", net.JoinHostPort(l.network.HostIP(), "0"))
	if err != nil {
		return err
	}
	l.store = newStore(rate)
	l.server, l.served = &http.Server{Handler: l.store, ReadHeaderTimeout: 10 * time.Second}, make(chan struct{})
	l.url = "http://" + listener.Addr().String()
	go func() { defer close(l.served); _ = l.server.Serve(listener) }()
	return nil
}

// padded is a copy of a file, filled up to a size if it is smaller.
func (l *lab) padded(path, name string, size int64) (string, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	if more := size - int64(len(content)); more > 0 {
		noise := make([]byte, more)
		if strings.HasSuffix(name, ".tar") {
			// Readers of tar archives skip zeros at the end, and nothing else.
			noise = make([]byte, more/512*512)
		} else if _, err := rand.Read(noise); err != nil {
			return "", err
		}
		content = append(content, noise...)
	}
	out := filepath.Join(l.dir, name)
	return out, os.WriteFile(out, content, 0o755)
}

func (l *lab) publish(files map[string]string) error {
	list := artifact.Manifest{APIVersion: "hearth.sh/v1alpha1", Kind: artifact.ManifestKind, Name: "hearth", Serial: 1, Issued: time.Now().UTC().Truncate(time.Second)}
	for name, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		key := filepath.Base(file)
		l.store.serve("/"+filesBucket+"/"+key, file)
		a := artifact.Artifact{
			Name: name, Version: "v1.0.0", OS: "linux", Arch: runtime.GOARCH, URLs: []string{"s3://" + filesBucket + "/" + key},
			SHA256: sha256.Sum256(content), Size: int64(len(content)),
		}
		if strings.HasPrefix(name, "k3s") {
			a.Version = l.k3s.Version
		}
		list.Artifacts = append(list.Artifacts, a)
	}
	l.artifacts = list.Artifacts
	encoded, err := list.Encode()
	if err != nil {
		return err
	}
	private, err := artifact.GenerateKey()
	if err != nil {
		return err
	}
	signatures, err := artifact.Sign(encoded, private)
	if err != nil {
		return err
	}
	l.key = private.Public()
	l.store.put("/"+filesBucket+"/artifacts.json", encoded)
	l.store.put("/"+filesBucket+"/artifacts.json"+artifact.SignatureSuffix, signatures)
	return nil
}

// makeBlobs makes sparse files, each with another first byte.
func (l *lab) makeBlobs() error {
	for i := range blobs {
		path := filepath.Join(l.dir, fmt.Sprintf("blob-%d", i))
		file, err := os.Create(path)
		if err != nil {
			return err
		}
		_, err = file.WriteAt([]byte{byte(i + 1)}, 0)
		if err := errors.Join(err, file.Truncate(blobSize), file.Close()); err != nil {
			return err
		}
		l.store.serve(fmt.Sprintf("/%s/blob-%d", filesBucket, i), path)
	}
	return nil
}

// blobFiles are the blobs for spec.artifacts.files.
func (l *lab) blobFiles() (string, error) {
	var out strings.Builder
	out.WriteString("    files:\n")
	for i := range blobs {
		file, err := os.Open(filepath.Join(l.dir, fmt.Sprintf("blob-%d", i)))
		if err != nil {
			return "", err
		}
		hash := sha256.New()
		_, err = io.Copy(hash, file)
		if err := errors.Join(err, file.Close()); err != nil {
			return "", err
		}
		fmt.Fprintf(&out, "    - {name: blob-%d, urls: [\"s3://%s/blob-%d\"], sha256: %s, size: %d, path: /var/lib/blobs/%d, mode: \"0644\"}\n",
			i, filesBucket, i, hex.EncodeToString(hash.Sum(nil)), blobSize, i)
	}
	return out.String(), nil
}

// config is a server's that founds a cluster of its own.
func (l *lab) config(name, files string) []byte {
	return fmt.Appendf(nil, `apiVersion: hearth.sh/v1alpha1
kind: NodeConfig
spec:
  pool: control-plane
  cluster:
    name: %s
    store: s3://%s/%s
  artifacts:
    manifest: s3://%s/artifacts.json
    publicKeys: [%q]
%s  k3s:
    version: %s
    config:
      kubelet-arg: [fail-cgroupv1=false]
  shims:
  - name: wasmtime
  addons:
    hearth: {values: {image: {repository: hearth.sh/nodeagent}}}
  host:
    minDiskFree: 512Mi
`, name, stateBucket, name, filesBucket, l.key, files, l.k3s.Version)
}

// boot is a machine that has booted and is idle. A baked one has all files.
func (l *lab) boot(ctx context.Context, baked bool) (*machine.Machine, error) {
	l.machines++
	m, err := l.network.Add(ctx, machine.Spec{
		Name: fmt.Sprintf("m%d", l.machines), Binds: l.k3s.Binds,
		Configure: func(c *imdstest.Config) { c.Role = "hearth-node" },
	})
	if err != nil {
		return nil, err
	}
	if err := copyTo(m, l.bootstrap, "/usr/local/bin/bootstrap"); err != nil {
		return nil, err
	}
	if baked {
		for to, from := range l.local {
			if err := copyTo(m, from, to); err != nil {
				return nil, err
			}
		}
	}
	if err := errors.Join(
		m.WriteFile("/etc/hearth/node.yaml", l.config(m.Name, ""), 0o600),
		m.WriteFile("/opt/bench/list", l.list(), 0o600),
		m.WriteFile("/opt/bench/baseline.sh", baseline, 0o755),
		m.Boot(ctx),
	); err != nil {
		return nil, err
	}
	return m, m.WaitBooted(ctx)
}

func copyTo(m *machine.Machine, from, to string) error {
	content, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	mode := os.FileMode(0o755)
	if strings.HasSuffix(to, ".tar") {
		mode = 0o644
	}
	return m.WriteFile(to, content, mode)
}

// list is what baseline.sh downloads.
func (l *lab) list() []byte {
	var out bytes.Buffer
	for to, from := range l.local {
		mode := "0755"
		if strings.HasSuffix(to, ".tar") {
			mode = "0644"
		}
		for _, a := range l.artifacts {
			if key := filepath.Base(from); strings.HasSuffix(a.URLs[0], "/"+key) {
				fmt.Fprintf(&out, "%s/%s/%s %s %s %s\n", l.url, filesBucket, key, a.SHA256, to, mode)
			}
		}
	}
	return out.Bytes()
}

// remove ends a machine, also when ctx ended.
func (l *lab) remove(ctx context.Context, m *machine.Machine) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), removeTimeout)
	defer cancel()
	return m.Remove(ctx)
}
