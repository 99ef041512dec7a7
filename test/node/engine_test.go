package node_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hearth-sh/hearth/test/chart"
	"github.com/hearth-sh/hearth/test/process"
)

// TestWhoeverTakesOverTheEngineHasNothingToGoOnWith looks at the engine's pod
// from where tenants' code runs: with its files, its network and its rights.
func TestWhoeverTakesOverTheEngineHasNothingToGoOnWith(t *testing.T) {
	ctx := t.Context()
	var pid int
	if err := bench.WaitFor(ctx, "the engine's process", soon, func(ctx context.Context) (bool, error) {
		pods, err := bench.Client().CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{
			FieldSelector: "spec.nodeName=" + wasmNode, LabelSelector: "app.kubernetes.io/component=engine",
		})
		if err != nil || len(pods.Items) != 1 || !chart.Ready(pods.Items[0]) {
			return false, err
		}
		pid, err = mainProcess(ctx, wasmNode, pods.Items[0])
		return err == nil, nil
	}); err != nil {
		t.Fatal(err)
	}
	proc := fmt.Sprintf("/proc/%d", pid)
	root := func(path string) string { return filepath.Join(proc, "root", path) }

	t.Run("it is nobody, and stays that", func(t *testing.T) {
		text, err := os.ReadFile(filepath.Join(proc, "status"))
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{"Uid:\t65532\t65532\t65532\t65532", "CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"} {
			if !strings.Contains(string(text), want+"\n") {
				t.Errorf("the engine's process has not %q:\n%s", want, text)
			}
		}
	})

	t.Run("it sees no token and no other process's socket", func(t *testing.T) {
		for _, path := range []string{
			"/var/run/secrets", "/run/secrets", "/run/hearth/agent.sock", "/run/containerd/containerd.sock", "/etc/kubernetes",
			agentData + "/agent",
		} {
			if _, err := os.Stat(root(path)); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("%s is there: %v", path, err)
			}
		}
	})

	t.Run("it cannot change what was compiled", func(t *testing.T) {
		// This test is root: what stops it is the mount, not a mode.
		for _, path := range []string{agentData + "/store/planted", agentData + "/store/objects/planted", "/planted"} {
			err := os.WriteFile(root(path), []byte("x"), 0o600)
			if !errors.Is(err, syscall.EROFS) {
				t.Errorf("writing %s: %v", path, err)
			}
		}
		if _, err := os.Stat(root(agentData + "/store/objects")); err != nil {
			t.Errorf("it does not even see the store: %v", err)
		}
	})

	t.Run("the API server does not know it", func(t *testing.T) {
		environment, err := os.ReadFile(filepath.Join(proc, "environ"))
		if err != nil {
			t.Fatal(err)
		}
		var host string
		for v := range strings.SplitSeq(string(environment), "\x00") {
			if value, ok := strings.CutPrefix(v, "KUBERNETES_SERVICE_HOST="); ok {
				host = value
			}
		}
		if host == "" {
			t.Fatalf("where the API server is stands nowhere: %q", environment)
		}
		client := &http.Client{Timeout: soon, Transport: &http.Transport{
			DisableKeepAlives: true,
			TLSClientConfig:   &tls.Config{InsecureSkipVerify: true}, // whoever answers must refuse
			DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
				return dialFrom(ctx, filepath.Join(proc, "ns", "net"), network, address)
			},
		}}
		for _, path := range []string{"/api/v1/nodes", "/api/v1/secrets", "/api/v1/namespaces/" + namespace + "/pods", "/apis/hearth.sh/v1alpha1/functions"} {
			request, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+net.JoinHostPort(host, "443")+path, nil)
			if err != nil {
				t.Fatal(err)
			}
			response, err := client.Do(request)
			if err != nil {
				t.Fatalf("the API server is not reached from the pod's network: %v", err)
			}
			_, _ = io.Copy(io.Discard, io.LimitReader(response.Body, 1<<20))
			_ = response.Body.Close()
			if response.StatusCode != http.StatusUnauthorized && response.StatusCode != http.StatusForbidden {
				t.Errorf("GET %s: %s", path, response.Status)
			}
		}
	})
}

// dialFrom connects from within a network namespace.
func dialFrom(ctx context.Context, namespace, network, address string) (conn net.Conn, err error) {
	err = process.InNetNS(namespace, func() (err error) {
		conn, err = new(net.Dialer).DialContext(ctx, network, address)
		return err
	})
	return conn, err
}
