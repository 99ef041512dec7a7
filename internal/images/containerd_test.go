package images

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/hearth-sh/hearth/test/cluster"
	"github.com/hearth-sh/hearth/test/needs"
)

func tool(t testing.TB, env, file string) string {
	t.Helper()
	if p := os.Getenv(env); p != "" {
		return p
	}
	p, err := exec.LookPath(file)
	if err != nil && file == "containerd" {
		var dir string
		if dir, err = cluster.Tools(context.Background(), os.Stderr); err == nil {
			return filepath.Join(dir, file)
		}
	}
	if err != nil {
		needs.Missing(t, "%s is neither on PATH nor named by %s (%v)", file, env, err)
	}
	return p
}

// process is a program that is killed at the end of the test.
type process struct {
	cmd  *exec.Cmd
	done chan struct{}
}

func startProcess(t testing.TB, log string, file string, args ...string) *process {
	t.Helper()
	out, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	p := &process{cmd: exec.Command(file, args...), done: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = out, out
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { _ = p.cmd.Wait(); close(p.done) }()
	return p
}

func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	<-p.done
}

// node is a machine with a real containerd. Its registries' names lead
// through hosts.toml, as in k3s.
type node struct {
	t      testing.TB
	dir    string
	socket string
	binary string
	proc   *process
}

func startNode(t testing.TB) *node {
	t.Helper()
	needs.Root(t, "containerd")
	n := &node{t: t, binary: tool(t, "HEARTH_CONTAINERD", "containerd")}
	// Not t.TempDir: a unix socket's path has at most 107 bytes.
	var err error
	if n.dir, err = os.MkdirTemp("", "hearth-node"); err != nil {
		t.Fatal(err)
	}
	n.socket = filepath.Join(n.dir, "c.sock")
	config := fmt.Sprintf(`version = 3
root = %[1]q
state = %[2]q
disabled_plugins = ["io.containerd.nri.v1.nri", "io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.blockfile", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.erofs", "io.containerd.snapshotter.v1.zfs", "io.containerd.tracing.processor.v1.otlp"]
[grpc]
  address = %[3]q
[ttrpc]
  address = %[4]q
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "overlayfs"
  [plugins."io.containerd.cri.v1.images".registry]
    config_path = %[5]q
[plugins."io.containerd.cri.v1.runtime"]
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = [%[6]q]
    conf_dir = %[6]q
[plugins."io.containerd.grpc.v1.cri"]
  disable_tcp_service = true
`, n.dir+"/root", n.dir+"/state", n.socket, n.socket+".t", n.dir+"/certs.d", n.dir+"/cni")
	for _, d := range []string{"root", "state", "certs.d", "cni"} {
		if err := os.MkdirAll(filepath.Join(n.dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(n.dir, "config.toml"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if n.proc != nil {
			n.proc.kill()
		}
		if t.Failed() {
			raw, _ := os.ReadFile(filepath.Join(n.dir, "log"))
			t.Logf("containerd's log ends with:\n%s", raw[max(0, len(raw)-4000):])
		}
		_ = os.RemoveAll(n.dir)
	})
	n.start()
	return n
}

func (n *node) start() {
	n.t.Helper()
	n.proc = startProcess(n.t, filepath.Join(n.dir, "log"), n.binary, "--config", filepath.Join(n.dir, "config.toml"))
	rt := n.runtime()
	defer rt.Close()
	eventually(n.t, "containerd's CRI answers", func() bool {
		_, err := rt.Images(context.Background())
		return err == nil
	})
}

func (n *node) runtime() *Containerd {
	n.t.Helper()
	c, err := NewContainerd(n.socket)
	if err != nil {
		n.t.Fatal(err)
	}
	return c
}

// mirror has containerd ask target for everything of host.
func (n *node) mirror(host, target string) {
	n.t.Helper()
	dir := filepath.Join(n.dir, "certs.d", host)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		n.t.Fatal(err)
	}
	text := fmt.Sprintf("server = %q\n[host.%q]\n  capabilities = [\"pull\", \"resolve\"]\n", target, target)
	if err := os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(text), 0o600); err != nil {
		n.t.Fatal(err)
	}
}

// eventually polls what has no event; its deadline is generous.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(90 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("never came true: %s", what)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// upstream is a real registry behind a proxy that logs and breaks things.
type upstream struct {
	t testing.TB
	// host is the proxy's, direct that of the registry itself.
	host, direct   string
	user, password string

	mu    sync.Mutex
	log   []access
	fault func(w http.ResponseWriter, r *http.Request) bool // true: it answered
}

type access struct {
	at           time.Time
	method, path string
	auth         string
}

func startUpstream(t testing.TB, user, password string) *upstream {
	t.Helper()
	binary := tool(t, "HEARTH_DOCKER_REGISTRY", "docker-registry")
	dir := t.TempDir()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	u := &upstream{t: t, direct: l.Addr().String(), user: user, password: password}
	l.Close()
	config := fmt.Sprintf("version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\nstorage: {filesystem: {rootdirectory: %s/data}}\nhttp: {addr: %q}\n", dir, u.direct)
	if user != "" {
		htpasswd := needs.Program(t, "htpasswd")
		out, err := exec.Command(htpasswd, "-nbB", user, password).Output()
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "htpasswd"), out, 0o600); err != nil {
			t.Fatal(err)
		}
		config += fmt.Sprintf("auth: {htpasswd: {realm: test, path: %s/htpasswd}}\n", dir)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.yml"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	p := startProcess(t, filepath.Join(dir, "log"), binary, "serve", filepath.Join(dir, "config.yml"))
	t.Cleanup(p.kill)
	target, _ := url.Parse("http://" + u.direct)
	proxy := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
		r.Out.URL.Scheme, r.Out.URL.Host = target.Scheme, target.Host
		r.Out.Host = r.In.Host // the registry makes its URLs of it
	}, ErrorHandler: func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(502) }}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		u.mu.Lock()
		u.log = append(u.log, access{time.Now(), r.Method, r.URL.Path, r.Header.Get("Authorization")})
		fault := u.fault
		u.mu.Unlock()
		if fault != nil && fault(w, r) {
			return
		}
		proxy.ServeHTTP(w, r)
	}))
	t.Cleanup(srv.Close)
	t.Cleanup(srv.CloseClientConnections)
	u.host = strings.TrimPrefix(srv.URL, "http://")
	eventually(t, "the registry answers", func() bool {
		resp, err := http.Get("http://" + u.direct + "/v2/")
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode < 500
	})
	return u
}

func (u *upstream) breakWith(f func(w http.ResponseWriter, r *http.Request) bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.fault = f
}

func (u *upstream) accesses() []access {
	u.mu.Lock()
	defer u.mu.Unlock()
	return append([]access(nil), u.log...)
}

type rawManifest []byte

func (m rawManifest) RawManifest() ([]byte, error)        { return m, nil }
func (m rawManifest) MediaType() (types.MediaType, error) { return types.OCIManifestSchema1, nil }

// part is a layer or configuration to push.
type part struct {
	mediaType string
	bytes     []byte
}

const spinConfig = `{"architecture":"wasm","os":"wasip1","rootfs":{"type":"layers","diff_ids":[]},"config":{}}`

// push puts an image into the registry behind the proxy's back and returns
// its digest.
func (u *upstream) push(repo, tag string, config part, layers ...part) string {
	u.t.Helper()
	opts := []remote.Option{}
	if u.user != "" {
		opts = append(opts, remote.WithAuth(&authn.Basic{Username: u.user, Password: u.password}))
	}
	r, err := name.NewRepository(u.direct+"/"+repo, name.Insecure)
	if err != nil {
		u.t.Fatal(err)
	}
	type desc struct {
		MediaType string `json:"mediaType"`
		Digest    string `json:"digest"`
		Size      int    `json:"size"`
	}
	upload := func(p part) desc {
		l := static.NewLayer(p.bytes, types.MediaType(p.mediaType))
		if err := remote.WriteLayer(r, l, opts...); err != nil {
			u.t.Fatal(err)
		}
		h, _ := l.Digest()
		return desc{p.mediaType, h.String(), len(p.bytes)}
	}
	m := struct {
		SchemaVersion int    `json:"schemaVersion"`
		MediaType     string `json:"mediaType"`
		Config        desc   `json:"config"`
		Layers        []desc `json:"layers"`
	}{SchemaVersion: 2, MediaType: string(types.OCIManifestSchema1), Config: upload(config)}
	for _, l := range layers {
		m.Layers = append(m.Layers, upload(l))
	}
	raw, err := json.Marshal(m)
	if err != nil {
		u.t.Fatal(err)
	}
	h, _, _ := v1.SHA256(bytes.NewReader(raw))
	if tag == "" {
		tag = "t" + h.Hex[:12]
	}
	if err := remote.Put(r.Tag(tag), rawManifest(raw), opts...); err != nil {
		u.t.Fatal(err)
	}
	return h.String()
}

// pushSpin pushes a Spin image with one module.
func (u *upstream) pushSpin(repo, tag string, module []byte) string {
	u.t.Helper()
	return u.push(repo, tag, part{"application/vnd.oci.image.config.v1+json", []byte(spinConfig)},
		part{"application/vnd.wasm.content.layer.v1+wasm", module},
		part{"application/vnd.fermyon.spin.application.v1+config", []byte(`{"spin_lock_version":0,"app":"` + repo + `"}`)})
}

func mustRef(t testing.TB, s string) Reference {
	t.Helper()
	r, err := ParseReference(s)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func quiet(Progress) error { return nil }

func TestContainerdPullsWhatTheRegistryHas(t *testing.T) {
	n := startNode(t)
	u := startUpstream(t, "", "")
	rt := n.runtime()
	defer rt.Close()
	ctx := context.Background()
	module := startModule('a', 2000)
	spin := u.pushSpin("team/app", "v1", module)

	t.Run("a Spin image by digest", func(t *testing.T) {
		ref := mustRef(t, u.host+"/team/app@"+spin)
		got, err := rt.Pull(ctx, ref, nil, quiet)
		if err != nil || got != spin {
			t.Fatal(got, err)
		}
		m, err := rt.Manifest(ctx, got)
		if err != nil || len(m.Layers) != 2 || m.Architecture != "wasm" {
			t.Fatal(m, err)
		}
		b, err := rt.Open(ctx, m.Layers[0])
		if err != nil {
			t.Fatal(err)
		}
		defer b.Close()
		raw, err := io.ReadAll(io.NewSectionReader(b, 0, b.Size()))
		if err != nil || !bytes.Equal(raw, module) {
			t.Fatal(len(raw), err)
		}
	})
	t.Run("by tag, and both names are listed", func(t *testing.T) {
		got, err := rt.Pull(ctx, mustRef(t, u.host+"/team/app:v1"), nil, quiet)
		if err != nil || got != spin {
			t.Fatal(got, err)
		}
		list, err := rt.Images(ctx)
		if err != nil {
			t.Fatal(err)
		}
		names := map[string]Image{}
		for _, i := range list {
			names[i.Name] = i
		}
		for _, want := range []string{u.host + "/team/app:v1", u.host + "/team/app@" + spin} {
			if i := names[want]; !i.Ready || i.Digest != spin {
				t.Errorf("%s: %+v", want, i)
			}
		}
	})
	t.Run("the CNCF artifact", func(t *testing.T) {
		d := u.push("cncf", "", part{"application/vnd.wasm.config.v0+json", []byte(`{"created":"2026-01-01T00:00:00Z","architecture":"wasm","os":"wasip1","layerDigests":[]}`)},
			part{"application/wasm", module})
		got, err := rt.Pull(ctx, mustRef(t, u.host+"/cncf@"+d), nil, quiet)
		t.Log(got, err)
		if err != nil && CodeOf(err) != CodeUnpullable {
			t.Error(err)
		}
	})
	t.Run("through the mirror of a registry that does not exist", func(t *testing.T) {
		n.mirror("registry.invalid:5000", "http://"+u.host)
		if got, err := rt.Pull(ctx, mustRef(t, "registry.invalid:5000/team/app@"+spin), nil, quiet); err != nil || got != spin {
			t.Fatal(got, err)
		}
	})
	for _, tt := range []struct {
		name  string
		ref   string
		fault func(w http.ResponseWriter, r *http.Request) bool
		want  string
	}{
		{"an unknown image", u.host + "/nobody/has:this", nil, CodeNotFound},
		{"an unknown digest", u.host + "/team/app@sha256:" + strings.Repeat("0", 64), nil, CodeNotFound},
		{"a host that does not exist", "nowhere.invalid/x:1", nil, CodeRegistryUnavailable},
		{"a port nobody listens at", "127.0.0.1:1/x:1", nil, CodeRegistryUnavailable},
		{"errors", u.host + "/team/app:broken", func(w http.ResponseWriter, r *http.Request) bool { w.WriteHeader(500); return true }, CodeRegistryUnavailable},
		{"unauthorized", u.host + "/team/app:secret", func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(401)
			return true
		}, CodeUnauthorized},
		{"forbidden", u.host + "/team/app:forbidden", func(w http.ResponseWriter, r *http.Request) bool { w.WriteHeader(403); return true }, CodeUnauthorized},
		{"another manifest than the digest says", u.host + "/lies/app@sha256:" + strings.Repeat("1", 64), func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Content-Type", string(types.OCIManifestSchema1))
			fmt.Fprint(w, `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{},"layers":[]}`)
			return true
		}, CodeDigestMismatch},
		{"not a manifest at all", u.host + "/team/app:html", func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Content-Type", "text/html")
			fmt.Fprint(w, `<html>welcome</html>`)
			return true
		}, CodeUnpullable},
	} {
		t.Run(tt.name, func(t *testing.T) {
			u.breakWith(tt.fault)
			defer u.breakWith(nil)
			_, err := rt.Pull(ctx, mustRef(t, tt.ref), nil, quiet)
			if CodeOf(err) != tt.want {
				t.Errorf("code %s, want %s: %v", CodeOf(err), tt.want, err)
			}
		})
	}
}
