// Package bootstrap_test brings clusters up from nothing but user-data: machines
// with a real systemd and a real cloud-init, instance metadata, AWS by moto, and
// k3s (a real one with HEARTH_TEST_K3S, else the stand-in that keeps to its
// contract and wraps real etcd, Kubernetes and containerd).
package bootstrap_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hearth-sh/hearth/internal/artifact"
	"github.com/hearth-sh/hearth/internal/bootstrap"
	"github.com/hearth-sh/hearth/internal/ecr/mototest"
	"github.com/hearth-sh/hearth/internal/imds/imdstest"
	"github.com/hearth-sh/hearth/test/cluster"
	"github.com/hearth-sh/hearth/test/k3s"
	"github.com/hearth-sh/hearth/test/machine"
	"github.com/hearth-sh/hearth/test/shims"
)

const (
	// soon bounds waits for what takes a minute on an idle machine.
	soon = 6 * time.Minute
	// stateBucket has the election, filesBucket what nodes are made of.
	stateBucket, filesBucket = "hearth-state", "hearth-files"
	role                     = "hearth-node"
)

// lab is a network with everything around the machines.
type lab struct {
	t       *testing.T
	network *machine.Network
	k3s     *k3s.Distribution
	aws     string // base URL, as machines see it
	key     artifact.PublicKey
	// bootstrap is the binary's digest; it is fetched from files.
	bootstrapSum string
	files        string // base URL of files for the script in user-data
	// slow is how much of a download passes per second; 0 for all.
	gate *gate
}

// gate is in front of moto: it lets one conditional write through at a time,
// since moto checks and writes in two steps, and counts.
type gate struct {
	proxy *httputil.ReverseProxy
	mu    sync.Mutex
}

func (g *gate) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodPut || r.Method == http.MethodPost {
		g.mu.Lock()
		defer g.mu.Unlock()
	}
	g.proxy.ServeHTTP(w, r)
}

// newLab needs root and what machines and clusters need; without it the test
// is skipped, but fails where CI is set.
func newLab(t *testing.T) *lab {
	t.Helper()
	for _, check := range []func() error{cluster.Check, machine.Check} {
		if err := check(); err != nil {
			if os.Getenv("CI") == "" {
				t.Skip(err)
			}
			t.Fatal(err)
		}
	}
	dir := t.TempDir()
	distribution, err := k3s.Load(t.Context(), dir, os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	wasm, err := shims.Compile(t.Context(), os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	binary, err := cluster.GoBinary(t.Context(), "./cmd/bootstrap")
	if err != nil {
		t.Fatal(err)
	}
	agent, err := cluster.GoBinary(t.Context(), "./cmd/nodeagent")
	if err != nil {
		t.Fatal(err)
	}
	l := &lab{t: t, network: machine.Start(t, machine.Options{}), k3s: distribution}
	moto, err := url.Parse(mototest.Start(t))
	if err != nil {
		t.Fatal(err)
	}
	l.gate = &gate{proxy: httputil.NewSingleHostReverseProxy(moto)}
	l.aws = l.serve(l.gate)
	for _, bucket := range []string{stateBucket, filesBucket} {
		l.put(bucket, "", nil)
	}
	l.publish(map[string]string{
		"k3s": distribution.Binary, "k3s-airgap-images": distribution.Images,
		"containerd-shim-wasmtime-v1": wasm.Wasmtime, "nodeagent": agent,
	})

	content, err := os.ReadFile(binary)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(content)
	l.bootstrapSum = hex.EncodeToString(sum[:])
	var compressed bytes.Buffer
	w, _ := gzip.NewWriterLevel(&compressed, gzip.BestSpeed)
	if _, err := w.Write(content); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	l.files = l.serve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "bootstrap.gz", time.Time{}, bytes.NewReader(compressed.Bytes()))
	}))
	return l
}

// serve answers machines until the test ends.
func (l *lab) serve(handler http.Handler) string {
	l.t.Helper()
	listener, err := new(net.ListenConfig).Listen(l.t.Context(), "tcp", net.JoinHostPort(l.network.HostIP(), "0"))
	if err != nil {
		l.t.Fatal(err)
	}
	server := &http.Server{Handler: handler, ReadHeaderTimeout: 10 * time.Second}
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(listener) }()
	l.t.Cleanup(func() { _ = server.Close(); <-done })
	return "http://" + listener.Addr().String()
}

// put writes an object to S3, or makes a bucket with an empty key. moto looks
// at no signature.
func (l *lab) put(bucket, key string, content []byte) {
	l.t.Helper()
	request, err := http.NewRequestWithContext(l.t.Context(), http.MethodPut, l.aws+"/"+bucket+"/"+key, bytes.NewReader(content))
	if err != nil {
		l.t.Fatal(err)
	}
	// The region of a bucket is that of the request that makes it.
	request.Header.Set("Authorization", "AWS4-HMAC-SHA256 Credential=test/20260101/eu-central-1/s3/aws4_request, SignedHeaders=host, Signature=0")
	if key == "" {
		request.Body = io.NopCloser(strings.NewReader(`<CreateBucketConfiguration xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><LocationConstraint>eu-central-1</LocationConstraint></CreateBucketConfiguration>`))
		request.ContentLength = -1
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		l.t.Fatal(err)
	}
	defer response.Body.Close()
	if body, _ := io.ReadAll(response.Body); response.StatusCode != http.StatusOK {
		l.t.Fatalf("put s3://%s/%s: %s: %s", bucket, key, response.Status, body)
	}
}

// publish puts files and their signed list into S3.
func (l *lab) publish(files map[string]string) {
	l.t.Helper()
	list := artifact.Manifest{APIVersion: "hearth.sh/v1alpha1", Kind: artifact.ManifestKind, Name: "hearth", Serial: 1, Issued: time.Now().UTC().Truncate(time.Second)}
	for name, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			l.t.Fatal(err)
		}
		key := filepath.Base(file)
		l.put(filesBucket, key, content)
		a := artifact.Artifact{
			Name: name, Version: "v1.0.0", OS: "linux", Arch: runtime.GOARCH, URLs: []string{"s3://" + filesBucket + "/" + key},
			SHA256: sha256.Sum256(content), Size: int64(len(content)),
		}
		if strings.HasPrefix(name, "k3s") {
			a.Version = l.k3s.Version
		}
		list.Artifacts = append(list.Artifacts, a)
	}
	encoded, err := list.Encode()
	if err != nil {
		l.t.Fatal(err)
	}
	private, err := artifact.GenerateKey()
	if err != nil {
		l.t.Fatal(err)
	}
	signatures, err := artifact.Sign(encoded, private)
	if err != nil {
		l.t.Fatal(err)
	}
	l.key = private.Public()
	l.put(filesBucket, "artifacts.json", encoded)
	l.put(filesBucket, "artifacts.json"+artifact.SignatureSuffix, signatures)
}

// userData is what an owner of such a cluster launches instances with.
func (l *lab) userData(pool, more string) string {
	config := fmt.Sprintf(`apiVersion: hearth.sh/v1alpha1
kind: NodeConfig
spec:
  pool: %s
  cluster:
    name: lab
    store: s3://%s/lab
    lease: 15s
  artifacts:
    manifest: s3://%s/artifacts.json
    publicKeys: [%q]
  k3s:
    version: %s
    config:
      kubelet-arg: [fail-cgroupv1=false]
  shims:
  - name: wasmtime
  host:
    minDiskFree: 512Mi
%s`, pool, stateBucket, filesBucket, l.key, l.k3s.Version, more)
	return fmt.Sprintf(`#cloud-config
write_files:
- path: /etc/hearth/node.yaml
  content: |
%s
bootcmd:
- |
%s
`, indent(config, "    "), indent(l.fetchScript(), "  "))
}

// fetchScript is cloud-init/fetch.sh with this lab's values.
func (l *lab) fetchScript() string {
	l.t.Helper()
	script, err := os.ReadFile("../../cloud-init/fetch.sh")
	if err != nil {
		l.t.Fatal(err)
	}
	var out strings.Builder
	for line := range strings.Lines(string(script)) {
		switch {
		case strings.HasPrefix(line, "url="):
			line = "url=" + l.files + "/bootstrap.gz\n"
		case strings.HasPrefix(line, "sha256_"):
			name, _, _ := strings.Cut(line, "=")
			line = name + "=" + l.bootstrapSum + "\n"
		}
		out.WriteString(line)
	}
	return out.String()
}

func indent(s, by string) string {
	return by + strings.ReplaceAll(strings.TrimRight(s, "\n"), "\n", "\n"+by)
}

// add makes a machine as its image has it: with nothing of ours but the address
// of the AWS endpoint.
func (l *lab) add(name, userData string, spec machine.Spec) *machine.Machine {
	l.t.Helper()
	spec.Name, spec.UserData, spec.Binds = name, userData, l.k3s.Binds
	configure := spec.Configure
	spec.Configure = func(c *imdstest.Config) {
		c.Role = role
		if configure != nil {
			configure(c)
		}
	}
	m, err := l.network.Add(l.t.Context(), spec)
	if err != nil {
		l.t.Fatal(err)
	}
	l.prepare(m)
	return m
}

func (l *lab) prepare(m *machine.Machine) {
	l.t.Helper()
	if err := m.WriteFile("/etc/hearth/bootstrap.env", []byte("AWS_ENDPOINT_URL="+l.aws+"\n"), 0o644); err != nil {
		l.t.Fatal(err)
	}
	// What an image has is on its disk whenever the power goes.
	dir, err := os.Open(m.Path("/etc/hearth"))
	if err != nil {
		l.t.Fatal(err)
	}
	defer dir.Close()
	if err := unix.Syncfs(int(dir.Fd())); err != nil {
		l.t.Fatal(err)
	}
}

func (l *lab) boot(m *machine.Machine) {
	l.t.Helper()
	if err := m.Boot(l.t.Context()); err != nil {
		l.t.Fatal(err)
	}
}

// result is `bootstrap status` on a machine.
func result(ctx context.Context, m *machine.Machine) (bootstrap.Result, error) {
	var r bootstrap.Result
	// The exit code follows the run, so it says nothing about the command.
	out, err := m.Command(ctx, "bootstrap", "status", "-o", "json").Output()
	if len(out) == 0 {
		return r, fmt.Errorf("no status: %w", err)
	}
	return r, json.Unmarshal(out, &r)
}

// succeeded waits until a machine is a node.
func (l *lab) succeeded(m *machine.Machine) bootstrap.Result {
	l.t.Helper()
	ctx, cancel := context.WithTimeout(l.t.Context(), soon)
	defer cancel()
	var last bootstrap.Result
	var lastErr error
	if err := m.WaitFor(ctx, "bootstrap to succeed", func(ctx context.Context) (bool, error) {
		r, err := result(ctx, m)
		if lastErr = err; err == nil {
			last = r
		}
		return err == nil && r.Outcome == bootstrap.OutcomeSucceeded, nil
	}); err != nil {
		journal, _ := m.Journal(context.WithoutCancel(ctx), "hearth-bootstrap.service")
		k3sJournal, _ := m.Journal(context.WithoutCancel(ctx), "k3s.service")
		l.t.Fatalf("%v: %v; last result %+v\nits journal: %s\nk3s: %s", err, lastErr, last, tail(journal, 6000), tail(k3sJournal, 4000))
	}
	return last
}

func tail(s string, n int) string { return s[max(0, len(s)-n):] }
