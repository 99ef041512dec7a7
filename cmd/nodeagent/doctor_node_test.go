//go:build !local

package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/imds/imdstest"
)

// expect compares a finding; want are parts of its message and remedy.
func expect(t *testing.T, got finding, state string, want ...string) {
	t.Helper()
	if got.State != state {
		t.Errorf("it is %s, want %s: %+v", got.State, state, got)
	}
	if (state == findingBroken || state == findingWarning) && got.Remedy == "" {
		t.Errorf("there is nothing to do about %q", got.Message)
	}
	for _, part := range want {
		if !strings.Contains(got.Message+"\n"+got.Remedy, part) {
			t.Errorf("%q is missing in %+v", part, got)
		}
	}
}

func TestDoctorClassifiesInstanceMetadata(t *testing.T) {
	change := func(f func(*imdstest.Config)) imdstest.Config {
		c := imdstest.Default()
		f(&c)
		return c
	}
	silent := change(func(c *imdstest.Config) { c.HopLimitTooLow = true })
	for name, tt := range map[string]struct {
		service imdstest.Config
		node    nodeOptions
		ec2     bool
		state   string
		want    []string
	}{
		"healthy":                     {imdstest.Default(), nodeOptions{imds: "auto"}, true, findingOK, []string{imdstest.Default().InstanceID, imdstest.Default().Role}},
		"healthy, but without a role": {change(func(c *imdstest.Config) { c.Role = "" }), nodeOptions{imds: "auto"}, true, findingWarning, []string{"no role", "instance profile"}},
		"silent in a pod": {silent, nodeOptions{imds: "auto", inPod: true}, true, findingBroken,
			[]string{"a pod cannot reach IMDS: the hop limit is 1", "use host networking for the agent", "HttpPutResponseHopLimit to 2", "every pod then gets the node's role"}},
		"silent on the host":  {silent, nodeOptions{imds: "auto"}, true, findingBroken, []string{"does not answer this host", "firewall"}},
		"silent, insisted on": {silent, nodeOptions{imds: "on"}, false, findingBroken, []string{"does not answer this host"}},
		"silent, no instance": {silent, nodeOptions{imds: "auto"}, false, findingSkipped, []string{"does not look like an EC2 instance"}},
		"disabled":            {change(func(c *imdstest.Config) { c.Disabled = true }), nodeOptions{imds: "auto"}, false, findingBroken, []string{"403", "--http-endpoint enabled"}},
		"version 1 only":      {change(func(c *imdstest.Config) { c.OnlyV1 = true }), nodeOptions{imds: "auto"}, false, findingBroken, []string{"IMDSv1", "IMDSv2"}},
		"failing":             {change(func(c *imdstest.Config) { c.Faults = []imdstest.Fault{{Path: "*", Status: 503}} }), nodeOptions{imds: "auto"}, false, findingWarning, []string{"503"}},
		"somebody else":       {change(func(c *imdstest.Config) { c.Extra = map[string]string{"meta-data/instance-id": "<html>"} }), nodeOptions{imds: "auto"}, false, findingBroken, []string{"what answers at"}},
		"not asked":           {silent, nodeOptions{imds: "off"}, true, findingSkipped, []string{"--imds=off"}},
	} {
		t.Run(name, func(t *testing.T) {
			service := imdstest.New(tt.service)
			t.Setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", service.Start(t, "tcp4"))
			tt.node.hostRoot = t.TempDir()
			if tt.ec2 {
				vendor := filepath.Join(tt.node.hostRoot, "sys/class/dmi/id/sys_vendor")
				if err := os.MkdirAll(filepath.Dir(vendor), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(vendor, []byte("Amazon EC2\n"), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			ctx, cancel := context.WithTimeout(t.Context(), doctorStepWait)
			defer cancel()
			expect(t, (&doctor{node: tt.node}).instanceMetadata(ctx), tt.state, tt.want...)
		})
	}
}

func codes(checks []doctorCheck) []string {
	var all []string
	for _, c := range checks {
		all = append(all, c.code)
	}
	return all
}

func TestDoctorLooksAtWhatTheMachineIs(t *testing.T) {
	node := &v1alpha1.NodeStatus{Checks: []v1alpha1.Check{{Code: "kubernetes", State: v1alpha1.CheckOK}}}
	for name, tt := range map[string]struct {
		d           doctor
		has, hasNot []string
	}{
		"a laptop":                       {doctor{}, []string{"go", "api", "port", "base-domain"}, []string{"containerd", "instance-metadata"}},
		"a laptop with a kubelet's file": {doctor{node: nodeOptions{kubeconfig: "/x"}}, []string{"go", "port"}, []string{"containerd"}},
		"a service without a cluster":    {doctor{system: true, status: &v1alpha1.NodeStatus{}}, []string{"agent", "engine"}, []string{"go", "api", "port", "containerd"}},
		"a service, a URL given":         {doctor{system: true, status: &v1alpha1.NodeStatus{}, explicitURL: true}, []string{"api"}, []string{"go", "port"}},
		"a node":                         {doctor{system: true, status: node}, []string{"agent", "containerd", "identity", "startup-taint", "instance-metadata", "image-disk", "runtimes"}, []string{"go", "api", "images"}},
		"a node whose agent is away":     {doctor{system: true, node: nodeOptions{kubeconfig: "/x"}}, []string{"containerd", "identity", "instance-metadata"}, []string{"go", "runtimes"}},
		"a pod whose agent is away":      {doctor{system: true, node: nodeOptions{inPod: true}}, []string{"containerd", "instance-metadata"}, []string{"go"}},
	} {
		t.Run(name, func(t *testing.T) {
			got := codes(tt.d.checks())
			for _, code := range tt.has {
				if !slices.Contains(got, code) {
					t.Errorf("%s is missing in %v", code, got)
				}
			}
			for _, code := range tt.hasNot {
				if slices.Contains(got, code) {
					t.Errorf("%s makes no sense here", code)
				}
			}
		})
	}
}

func TestDoctorExplainsEachUnprovenRuntime(t *testing.T) {
	d := doctor{system: true, status: &v1alpha1.NodeStatus{Runtimes: []v1alpha1.RuntimeStatus{
		{Name: "wasmtime", Handler: "wasmtime", Proven: true},
		{Name: "spin", Handler: "spin", Code: "version-too-old", Message: "version 0.14.0 is older than 0.15.1"},
		{Name: "wasmedge", Code: "no-handler", Message: "containerd has no handler for it", Problems: []string{"add [runtimes.wasmedge] to the configuration"}},
		{Name: "slight", Handler: "slight"},
	}}}
	got := map[string]finding{}
	for _, c := range d.nodeChecks() {
		if strings.HasPrefix(c.code, "runtime") {
			got[c.code] = c.run(t.Context())
		}
	}
	expect(t, got["runtimes"], findingOK, "1 of 4")
	expect(t, got["runtime-spin"], findingWarning, "0.14.0", "install a newer version")
	expect(t, got["runtime-wasmedge"], findingWarning, "no handler for it", "[runtimes.wasmedge]")
	expect(t, got["runtime-slight"], findingWarning, "not tried yet", "look again")
	if len(got) != 4 {
		t.Errorf("findings: %v", got)
	}
	d.status.Runtimes = d.status.Runtimes[1:]
	expect(t, d.runtimes(t.Context()), findingBroken, "no runtime of this node is proven")
	d.status.Runtimes = nil
	expect(t, d.runtimes(t.Context()), findingWarning, "no runtime for Wasm", "containerd-shim-spin")
}

func TestDoctorExplainsEachFailingCheck(t *testing.T) {
	d := doctor{system: true, status: &v1alpha1.NodeStatus{Checks: []v1alpha1.Check{
		{Code: "kubernetes", State: v1alpha1.CheckFailing, Severity: v1alpha1.SeverityWarning, Message: "the API server is away", Remedy: "wait"},
		{Code: "store", State: v1alpha1.CheckFailing, Severity: v1alpha1.SeverityCritical, Message: "read-only"},
		{Code: "functions", State: v1alpha1.CheckFailing, Severity: v1alpha1.SeverityWarning, CausedBy: "store"},
		{Code: "containerd", State: v1alpha1.CheckFailing, Severity: v1alpha1.SeverityCritical, Message: "no socket"},
		{Code: "disk", State: v1alpha1.CheckOK},
		{Code: "workers", State: v1alpha1.CheckUnknown},
	}}}
	var got []string
	for _, c := range d.failingChecks(d.nodeChecks()) {
		got = append(got, c.code)
		switch f := c.run(t.Context()); c.code {
		case "kubernetes":
			expect(t, f, findingWarning, "the API server is away", "wait")
		case "store":
			expect(t, f, findingBroken, "read-only", "nodeagent status")
		}
	}
	if !slices.Equal(got, []string{"kubernetes", "store"}) {
		t.Errorf("explained: %v", got)
	}
}

func TestDoctorNamesTheFirstFailedImage(t *testing.T) {
	d := doctor{status: &v1alpha1.NodeStatus{Images: &v1alpha1.ImagesStatus{Total: 3, Warm: 1, Failed: 2, Summary: "1/3 warm", Images: []v1alpha1.ImageStatus{
		{Image: "a:1", State: "pulling"}, {Image: "b:1", State: "failed", Error: &v1alpha1.FunctionError{Detail: "no such tag"}},
	}}}}
	expect(t, d.images(t.Context()), findingWarning, "b:1: no such tag", "2 failed")
	d.status.Images = &v1alpha1.ImagesStatus{Summary: "3/3 warm"}
	expect(t, d.images(t.Context()), findingOK, "3/3 warm")
}

type versionServer struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	err error
}

func (s versionServer) Version(context.Context, *runtimeapi.VersionRequest) (*runtimeapi.VersionResponse, error) {
	return &runtimeapi.VersionResponse{RuntimeName: "containerd", RuntimeVersion: "v2.4.2"}, s.err
}

func TestDoctorAsksContainerd(t *testing.T) {
	for name, tt := range map[string]struct {
		serve bool
		err   error
		state string
		want  []string
	}{
		"it answers":         {true, nil, findingOK, []string{"containerd v2.4.2"}},
		"it refuses":         {true, errors.New("CRI is disabled"), findingBroken, []string{"CRI is disabled", "journalctl"}},
		"there is no socket": {false, nil, findingBroken, []string{"no socket", "--containerd-socket"}},
	} {
		t.Run(name, func(t *testing.T) {
			socket := filepath.Join(t.TempDir(), "c.sock")
			if tt.serve {
				ln, err := net.Listen("unix", socket)
				if err != nil {
					t.Fatal(err)
				}
				server := grpc.NewServer()
				runtimeapi.RegisterRuntimeServiceServer(server, versionServer{err: tt.err})
				done := make(chan struct{})
				go func() { defer close(done); _ = server.Serve(ln) }()
				defer func() { server.Stop(); <-done }()
			}
			ctx, cancel := context.WithTimeout(t.Context(), doctorStepWait)
			defer cancel()
			d := doctor{node: nodeOptions{containerdSocket: socket}}
			expect(t, d.containerd(ctx), tt.state, append(tt.want, socket)...)
		})
	}
	t.Run("it hangs", func(t *testing.T) {
		socket := filepath.Join(t.TempDir(), "c.sock")
		ln, err := net.Listen("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		expect(t, (&doctor{node: nodeOptions{containerdSocket: socket}}).containerd(ctx), findingBroken, "does not answer")
	})
}

// kubeconfigOf writes a kubelet's kubeconfig for the user, to a server.
func kubeconfigOf(t *testing.T, user string, expires time.Time, server string) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: user, Organization: []string{"system:nodes"}},
		NotBefore: expires.Add(-24 * 365 * time.Hour), NotAfter: expires,
	}
	certificate, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	// Beside the file and named by it, as k3s does.
	for name, block := range map[string]*pem.Block{"client.crt": {Type: "CERTIFICATE", Bytes: certificate}, "client.key": {Type: "EC PRIVATE KEY", Bytes: private}} {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	config := clientcmdapi.NewConfig()
	config.Clusters["local"] = &clientcmdapi.Cluster{Server: server}
	config.AuthInfos["user"] = &clientcmdapi.AuthInfo{ClientCertificate: "client.crt", ClientKey: "client.key"}
	config.Contexts["default"] = &clientcmdapi.Context{Cluster: "local", AuthInfo: "user"}
	config.CurrentContext = "default"
	file := filepath.Join(dir, "kubelet.kubeconfig")
	if err := clientcmd.WriteToFile(*config, file); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestDoctorLooksAtTheIdentity(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	year := now.Add(365 * 24 * time.Hour)
	garbage := filepath.Join(t.TempDir(), "k")
	if err := os.WriteFile(garbage, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	empty := filepath.Join(t.TempDir(), "k")
	if err := os.WriteFile(empty, []byte("apiVersion: v1\nkind: Config\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	const server = "https://127.0.0.1:6443"
	for name, tt := range map[string]struct {
		file  string
		state string
		want  []string
	}{
		"the node's own":     {kubeconfigOf(t, "system:node:a", year, server), findingOK, []string{"system:node:a"}},
		"another node's":     {kubeconfigOf(t, "system:node:b", year, server), findingBroken, []string{"system:node:b, not of system:node:a", "--node-name"}},
		"an administrator's": {kubeconfigOf(t, "admin", year, server), findingBroken, []string{"admin"}},
		"expired":            {kubeconfigOf(t, "system:node:a", now.Add(-time.Hour), server), findingBroken, []string{"expired at 2026-01-02T02:04:05Z", "clock"}},
		"about to expire":    {kubeconfigOf(t, "system:node:a", now.Add(time.Hour), server), findingWarning, []string{"expires at"}},
		"not a kubeconfig":   {garbage, findingBroken, []string{"no kubeconfig"}},
		"without a user":     {empty, findingWarning, []string{"no current context"}},
		"missing":            {garbage + "x", findingBroken, []string{"--kubeconfig"}},
		"none":               {"", findingSkipped, nil},
	} {
		t.Run(name, func(t *testing.T) {
			d := doctor{now: now, node: nodeOptions{kubeconfig: tt.file, nodeName: "a"}}
			expect(t, d.identity(t.Context()), tt.state, tt.want...)
		})
	}
}

func TestDoctorSeesTheStartupTaint(t *testing.T) {
	proven := []v1alpha1.RuntimeStatus{{Name: "spin", Handler: "spin", Proven: true}}
	notReady := []corev1.Taint{{Key: v1alpha1.TaintNotReady, Effect: corev1.TaintEffectNoSchedule}}
	for name, tt := range map[string]struct {
		taints   []corev1.Taint
		runtimes []v1alpha1.RuntimeStatus
		tainter  bool
		status   int
		state    string
		want     []string
	}{
		"none":                           {nil, proven, true, 200, findingOK, nil},
		"another":                        {[]corev1.Taint{{Key: "dedicated"}}, proven, true, 200, findingOK, nil},
		"nothing is proven":              {notReady, nil, true, 200, findingWarning, []string{"no proven runtime"}},
		"nobody may remove it":           {notReady, proven, false, 200, findingWarning, []string{"may not remove it", "kubectl taint node a hearth.sh/not-ready-", "--tainter-kubeconfig"}},
		"it should be gone in a moment":  {notReady, proven, true, 200, findingWarning, []string{"wait"}},
		"the API server does not let us": {nil, proven, true, 403, findingWarning, []string{"roles are installed"}},
	} {
		t.Run(name, func(t *testing.T) {
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Content-Type", "application/json")
				w.WriteHeader(tt.status)
				var answer any = corev1.Node{
					TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Node"}, ObjectMeta: metav1.ObjectMeta{Name: "a"}, Spec: corev1.NodeSpec{Taints: tt.taints},
				}
				if tt.status != 200 || r.URL.Path != "/api/v1/nodes/a" {
					answer = metav1.Status{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: "Failure", Reason: metav1.StatusReasonForbidden, Code: 403}
				}
				_ = json.NewEncoder(w).Encode(answer)
			}))
			defer server.Close()
			d := doctor{
				node:   nodeOptions{kubeconfig: kubeconfigOf(t, "system:node:a", time.Now().Add(24*time.Hour), server.URL), nodeName: "a", tainter: tt.tainter},
				status: &v1alpha1.NodeStatus{Runtimes: tt.runtimes},
			}
			ctx, cancel := context.WithTimeout(t.Context(), doctorStepWait)
			defer cancel()
			expect(t, d.startupTaint(ctx), tt.state, tt.want...)
		})
	}
}

func TestDoctorSeesADiskThatTheKubeletWillClean(t *testing.T) {
	root := t.TempDir()
	d := doctor{node: nodeOptions{hostRoot: root}}
	expect(t, d.imageDisk(t.Context()), findingSkipped, "/var/lib/containerd")
	if err := os.MkdirAll(filepath.Join(root, "var/lib/containerd"), 0o755); err != nil {
		t.Fatal(err)
	}
	// How full this machine is decides which of the two it is.
	if f := d.imageDisk(t.Context()); f.State != findingOK && f.State != findingWarning || !strings.Contains(f.Message, "% of the disk of /var/lib/containerd are used") {
		t.Errorf("%+v", f)
	}
}
