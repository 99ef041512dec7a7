package bootstrap

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
	"github.com/hearth-sh/hearth/internal/systemd"
)

// apiServer answers for one node, each answer once and the last one for ever.
func apiServer(t *testing.T, answers ...http.HandlerFunc) (kubeconfig string, asked *atomic.Int32) {
	t.Helper()
	asked = &atomic.Int32{}
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n := int(asked.Add(1))
		if r.URL.Path != "/api/v1/nodes/i-1" {
			t.Errorf("asked for %s", r.URL.Path)
		}
		answers[min(n, len(answers))-1](w, r)
	}))
	t.Cleanup(server.Close)
	ca := filepath.Join(t.TempDir(), "ca.crt")
	certificate := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	if err := os.WriteFile(ca, certificate, 0o600); err != nil {
		t.Fatal(err)
	}
	kubeconfig = filepath.Join(t.TempDir(), "kubelet.kubeconfig")
	content := fmt.Sprintf("apiVersion: v1\nkind: Config\nclusters: [{name: c, cluster: {server: %q, certificate-authority: %q}}]\ncontexts: [{name: d, context: {cluster: c, user: u}}]\ncurrent-context: d\nusers: [{name: u, user: {token: t}}]\n", server.URL, ca)
	if err := os.WriteFile(kubeconfig, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return kubeconfig, asked
}

func nodeIs(ready, message string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, `{"status":{"nodeInfo":{"kubeletVersion":"v1.36.2+k3s1"},"conditions":[{"type":"MemoryPressure","status":"False"},{"type":"Ready","status":%q,"message":%q}]}}`, ready, message)
	}
}

func answer(status int, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(status)
		_, _ = w.Write([]byte(body))
	}
}

func watchNothing(context.Context) error { return nil }

func TestWaitingForANodeToBeReady(t *testing.T) {
	began := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	heardAt := func(ready string, at time.Time) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprintf(w, `{"status":{"nodeInfo":{"kubeletVersion":"v1.36.2+k3s1"},"conditions":[{"type":"Ready","status":%q,"lastHeartbeatTime":%q}]}}`, ready, at.Format(time.RFC3339))
		}
	}
	for _, tt := range []struct {
		name    string
		answers []http.HandlerFunc
		code    fault.Code // "" for Ready
		says    string
		since   time.Time
	}{
		{"ready at once", []http.HandlerFunc{nodeIs("True", "kubelet is posting ready status")}, "", "", time.Time{}},
		{"after everything else", []http.HandlerFunc{answer(503, "starting"), answer(403, "{}"), answer(404, "{}"), answer(200, "{}"), nodeIs("False", "no CNI"), nodeIs("True", "")}, "", "", time.Time{}},
		{"not an answer of an API server, then one", []http.HandlerFunc{answer(200, "<html>"), nodeIs("True", "")}, "", "", time.Time{}},
		{"never registered", []http.HandlerFunc{answer(404, "{}")}, CodeNodeNotRegistered, "has not registered", time.Time{}},
		{"never ready", []http.HandlerFunc{nodeIs("False", "cni plugin not initialized")}, CodeNodeNotReady, "cni plugin not initialized", time.Time{}},
		{"ready is unknown", []http.HandlerFunc{nodeIs("Unknown", "kubelet stopped posting")}, CodeNodeNotReady, "stopped posting", time.Time{}},
		{"errors only", []http.HandlerFunc{answer(500, "")}, CodeNodeNotRegistered, "500", time.Time{}},
		{"ready as it was before a reboot, then not, then again", []http.HandlerFunc{heardAt("True", began.Add(-time.Minute)), heardAt("False", began), heardAt("True", began.Add(time.Second))}, "", "", began},
		{"ready in the very second", []http.HandlerFunc{heardAt("True", began)}, "", "", began.Add(900 * time.Millisecond)},
		{"ready as it was before a reboot, for ever", []http.HandlerFunc{heardAt("True", began.Add(-time.Second))}, CodeNodeNotReady, "has not reported since", began},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			kubeconfig, _ := apiServer(t, tt.answers...)
			within := 30 * time.Second
			if tt.code != "" {
				within = 600 * time.Millisecond
			}
			ctx, cancel := context.WithTimeout(t.Context(), within)
			defer cancel()
			state, err := waitReady(ctx, kubeconfig, "i-1", tt.since, watchNothing, func(string, ...any) {})
			if fault.CodeOf(err) != tt.code || (err == nil) != (tt.code == "") {
				t.Fatalf("%q: %v", fault.CodeOf(err), err)
			}
			if err == nil && (!state.Ready || state.Version != "v1.36.2+k3s1") {
				t.Errorf("%+v", state)
			}
			if err != nil && !strings.Contains(err.Error(), tt.says) {
				t.Errorf("%q is missing in %v", tt.says, err)
			}
		})
	}
}

func TestWaitingEndsWithItsReason(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "kubelet.kubeconfig")
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := waitReady(ctx, missing, "i-1", time.Time{}, watchNothing, func(string, ...any) {}); fault.CodeOf(err) != CodeNodeNotRegistered || !strings.Contains(err.Error(), "kubeconfig") {
		t.Errorf("without a kubeconfig: %v", err)
	}
	loops := fault.Passing(systemd.CodeUnitLoops, nil, "", "k3s does not stay up")
	if _, err := waitReady(t.Context(), missing, "i-1", time.Time{}, func(context.Context) error { return loops }, func(string, ...any) {}); !errors.Is(err, loops) {
		t.Errorf("with a k3s that ends: %v", err)
	}
	interrupted, stop := context.WithCancel(t.Context())
	stop()
	if _, err := waitReady(interrupted, missing, "i-1", time.Time{}, watchNothing, func(string, ...any) {}); !errors.Is(err, context.Canceled) {
		t.Errorf("told to end: %v", err)
	}
}
