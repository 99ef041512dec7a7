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
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"slices"
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
	"github.com/hearth-sh/hearth/test/needs"
	"github.com/hearth-sh/hearth/test/shims"
)

const (
	// soon bounds waits for what takes a minute on an idle machine.
	soon = 6 * time.Minute
	// stateBucket has the election, filesBucket what nodes are made of.
	stateBucket, filesBucket = "hearth-state", "hearth-files"
	role                     = "hearth-node"
)

// world is what machines of all tests have around them. It is made once: that
// takes as long as a test. Each test has a part of it for itself, a lab.
type world struct {
	network *machine.Network
	k3s     *k3s.Distribution
	aws     string // base URL, as machines see it
	gate    *gate
	key     artifact.PublicKey
	program []byte // the bootstrap binary, which is fetched from files
	sum     string // its digest
	files   string // base URL of files for the script in user-data

	closers []func() error // in the order of what they undo
}

// theWorld is nil until the first test needs it, and closed by TestMain.
var theWorld struct {
	sync.Mutex
	*world
	err error
}

// sharedWorld makes the world, or returns what went wrong when it was made.
func sharedWorld(ctx context.Context) (*world, error) {
	theWorld.Lock()
	defer theWorld.Unlock()
	if theWorld.world == nil && theWorld.err == nil {
		w := &world{}
		theWorld.world, theWorld.err = w, w.make(context.WithoutCancel(ctx))
	}
	return theWorld.world, theWorld.err
}

func (w *world) make(ctx context.Context) (err error) {
	dir, err := os.MkdirTemp("", "hearth-bootstrap-test-")
	if err != nil {
		return err
	}
	w.closers = append(w.closers, func() error { return os.RemoveAll(dir) })
	if w.k3s, err = k3s.Load(ctx, dir, os.Stderr); err != nil {
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
	if w.network, err = machine.New(ctx, machine.Options{}); err != nil {
		return err
	}
	w.closers = append(w.closers, w.network.Close)
	log, err := os.Create(filepath.Join(dir, "moto.log"))
	if err != nil {
		return err
	}
	address, stop, err := mototest.Run(ctx, log)
	if err != nil {
		return err
	}
	w.closers = append(w.closers, func() error { stop(); return log.Close() })
	moto, err := url.Parse(address)
	if err != nil {
		return err
	}
	w.gate = &gate{proxy: httputil.NewSingleHostReverseProxy(moto), refused: map[string]chan struct{}{}, files: map[string][]string{}}
	if w.aws, err = w.serve(ctx, w.gate); err != nil {
		return err
	}
	for _, bucket := range []string{stateBucket, filesBucket} {
		if err := w.put(ctx, bucket, "", nil); err != nil {
			return err
		}
	}
	if err := w.publish(ctx, map[string]string{
		"k3s": w.k3s.Binary, "k3s-airgap-images": w.k3s.Images,
		"containerd-shim-wasmtime-v1": wasm.Wasmtime, "nodeagent": agent,
	}); err != nil {
		return err
	}
	if w.program, err = os.ReadFile(binary); err != nil {
		return err
	}
	sum := sha256.Sum256(w.program)
	w.sum = hex.EncodeToString(sum[:])
	var compressed bytes.Buffer
	z, _ := gzip.NewWriterLevel(&compressed, gzip.BestSpeed)
	if _, err := z.Write(w.program); err != nil {
		return err
	}
	if err := z.Close(); err != nil {
		return err
	}
	w.files, err = w.serve(ctx, http.HandlerFunc(func(out http.ResponseWriter, r *http.Request) {
		http.ServeContent(out, r, "bootstrap.gz", time.Time{}, bytes.NewReader(compressed.Bytes()))
	}))
	return err
}

// close ends what make made, also half of it.
func (w *world) close() error {
	var errs []error
	for _, c := range slices.Backward(w.closers) {
		errs = append(errs, c())
	}
	http.DefaultTransport.(*http.Transport).CloseIdleConnections()
	return errors.Join(errs...)
}

// serve answers machines until the world ends.
func (w *world) serve(ctx context.Context, handler http.Handler) (base string, err error) {
	base, stop, err := serve(ctx, w.network.HostIP(), handler)
	if err == nil {
		w.closers = append(w.closers, stop)
	}
	return base, err
}

func serve(ctx context.Context, ip string, handler http.Handler) (base string, stop func() error, err error) {
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", net.JoinHostPort(ip, "0"))
	if err != nil {
		return "", nil, err
	}
	server := &http.Server{Handler: handler, ReadHeaderTimeout: time.Minute}
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(listener) }()
	return "http://" + listener.Addr().String(), func() error { err := server.Close(); <-done; return err }, nil
}

// put writes an object to S3, or makes a bucket with an empty key. moto looks
// at no signature.
func (w *world) put(ctx context.Context, bucket, key string, content []byte) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodPut, w.aws+"/"+bucket+"/"+key, bytes.NewReader(content))
	if err != nil {
		return err
	}
	// The region of a bucket is that of the request that makes it.
	request.Header.Set("Authorization", "AWS4-HMAC-SHA256 Credential=test/20260101/eu-central-1/s3/aws4_request, SignedHeaders=host, Signature=0")
	if key == "" {
		request.Body = io.NopCloser(strings.NewReader(`<CreateBucketConfiguration xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><LocationConstraint>eu-central-1</LocationConstraint></CreateBucketConfiguration>`))
		request.ContentLength = -1
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if body, _ := io.ReadAll(response.Body); response.StatusCode != http.StatusOK {
		return fmt.Errorf("put s3://%s/%s: %s: %s", bucket, key, response.Status, body)
	}
	return nil
}

// publish puts files and their signed list into S3.
func (w *world) publish(ctx context.Context, files map[string]string) error {
	list := artifact.Manifest{APIVersion: "hearth.sh/v1alpha1", Kind: artifact.ManifestKind, Name: "hearth", Serial: 1, Issued: time.Now().UTC().Truncate(time.Second)}
	for name, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		key := filepath.Base(file)
		if err := w.put(ctx, filesBucket, key, content); err != nil {
			return err
		}
		a := artifact.Artifact{
			Name: name, Version: "v1.0.0", OS: "linux", Arch: runtime.GOARCH, URLs: []string{"s3://" + filesBucket + "/" + key},
			SHA256: sha256.Sum256(content), Size: int64(len(content)),
		}
		if strings.HasPrefix(name, "k3s") {
			a.Version = w.k3s.Version
		}
		list.Artifacts = append(list.Artifacts, a)
	}
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
	w.key = private.Public()
	if err := w.put(ctx, filesBucket, "artifacts.json", encoded); err != nil {
		return err
	}
	return w.put(ctx, filesBucket, "artifacts.json"+artifact.SignatureSuffix, signatures)
}

// gate is in front of moto: it lets one conditional write through at a time,
// since moto checks and writes in two steps, and keeps writes back.
type gate struct {
	proxy  *httputil.ReverseProxy
	writes sync.Mutex

	mu      sync.Mutex
	refused map[string]chan struct{} // by path, closed when those who wait are refused
	files   map[string][]string      // paths that were read of what nodes are made of, by who read
}

// keepBack makes every write of a path wait until refuse is called, and fail
// then without having been done.
func (g *gate) keepBack(path string) (refuse func()) {
	refused := make(chan struct{})
	g.mu.Lock()
	g.refused[path] = refused
	g.mu.Unlock()
	return sync.OnceFunc(func() {
		g.mu.Lock()
		delete(g.refused, path)
		g.mu.Unlock()
		close(refused)
	})
}

func (g *gate) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodPut && r.Method != http.MethodPost {
		if host, _, err := net.SplitHostPort(r.RemoteAddr); err == nil && r.Method == http.MethodGet && strings.HasPrefix(r.URL.Path, "/"+filesBucket+"/") {
			g.mu.Lock()
			g.files[host] = append(g.files[host], r.URL.Path)
			g.mu.Unlock()
		}
		g.proxy.ServeHTTP(w, r)
		return
	}
	g.mu.Lock()
	refused := g.refused[r.URL.Path]
	g.mu.Unlock()
	if refused != nil {
		<-refused
		w.WriteHeader(http.StatusServiceUnavailable)
		return
	}
	g.writes.Lock()
	defer g.writes.Unlock()
	g.proxy.ServeHTTP(w, r)
}

// lab is a test's part of the world: a store and machines of its own.
type lab struct {
	*world
	t *testing.T
	// name is that of the store, and what the machines' names begin with.
	name string
	// store is where the cluster is elected.
	store string
	// lease of a founder: long where nobody is to take over on a busy machine.
	lease string
	// artifacts are more of spec.artifacts, indented by four.
	artifacts string
}

// newLab needs root and what machines and clusters need; without it the test
// is skipped, but fails where CI is set.
func newLab(t *testing.T, name string) *lab {
	t.Helper()
	for _, check := range []func() error{cluster.Check, machine.Check} {
		if err := check(); err != nil {
			needs.Missing(t, "%v", err)
		}
	}
	w, err := sharedWorld(t.Context())
	if errors.Is(err, mototest.ErrMissing) {
		needs.Missing(t, "%v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return &lab{world: w, t: t, name: name, store: "s3://" + stateBucket + "/" + name, lease: "15s"}
}

// serve answers machines until the test ends.
func (l *lab) serve(handler http.Handler) string {
	l.t.Helper()
	base, stop, err := serve(l.t.Context(), l.network.HostIP(), handler)
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { _ = stop() })
	return base
}

// userData is what an owner of such a cluster launches instances with.
func (l *lab) userData(pool, more string) string {
	disable := "" // their images are out of reach
	if pool == "control-plane" {
		disable = "      disable: [traefik, servicelb, coredns, local-storage, metrics-server]\n"
	}
	config := fmt.Sprintf(`apiVersion: hearth.sh/v1alpha1
kind: NodeConfig
spec:
  pool: %s
  cluster:
    name: lab
    store: %s
    lease: %s
  artifacts:
    manifest: s3://%s/artifacts.json
    publicKeys: [%q]
%s  k3s:
    version: %s
    config:
      kubelet-arg: [fail-cgroupv1=false]
%s  network:
    flannelBackend: host-gw
  shims:
  - name: wasmtime
%s  host:
    minDiskFree: 512Mi
%s`, pool, l.store, l.lease, filesBucket, l.key, l.artifacts, l.k3s.Version, disable, pulls, more)
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
			line = name + "=" + l.sum + "\n"
		}
		out.WriteString(line)
	}
	return out.String()
}

func indent(s, by string) string {
	return by + strings.ReplaceAll(strings.TrimRight(s, "\n"), "\n", "\n"+by)
}

// add makes a machine as its image has it: with nothing of ours but the address
// of the AWS endpoint. It goes when the test ends.
func (l *lab) add(name, userData string, spec machine.Spec) *machine.Machine {
	l.t.Helper()
	spec.Name, spec.UserData = l.name+"-"+name, userData
	binds := maps.Clone(l.k3s.Binds)
	maps.Copy(binds, spec.Binds)
	spec.Binds = binds
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
	l.t.Cleanup(func() { l.end(m) })
	l.prepare(m)
	return m
}

// endWithin bounds the end of one machine.
const endWithin = 2 * time.Minute

// end removes a machine, of which other tests' machines must feel nothing.
func (l *lab) end(m *machine.Machine) {
	if l.t.Failed() {
		var logs strings.Builder
		m.DumpLogs(&logs)
		l.t.Log(logs.String())
	}
	ctx, cancel := context.WithTimeout(context.Background(), endWithin)
	defer cancel()
	end := m.Remove
	if os.Getenv(machine.KeepEnv) != "" {
		end = m.Kill // its files go, or are kept, with the network
	}
	if err := end(ctx); err != nil {
		l.t.Error(err)
	}
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
