package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

const (
	kedaModule = "github.com/kedacore/keda/v2"
	// kedaNamespace is where KEDA keeps what is nobody's own.
	kedaNamespace = "keda"
	kedaTimeout   = 2 * time.Minute
)

// kedaPrograms are for the tests that ask for KEDA, which cost minutes of
// building: Tools does not have them.
var kedaPrograms = map[string][]string{"keda": {"operator"}}

// KEDA runs KEDA's operator, built from its module on first use (minutes), with
// its resource definitions. Its admission webhooks and its metrics API, which
// triggers of processor time do not use, are left out. It ends with the
// cluster.
func (c *Cluster) KEDA(ctx context.Context) error {
	tools, err := buildOnce(ctx, kedaPrograms, "six", os.Stderr)
	if err != nil {
		return err
	}
	definitions, err := kedaDefinitions(ctx)
	if err != nil {
		return err
	}
	namespace := "apiVersion: v1\nkind: Namespace\nmetadata: {name: " + kedaNamespace + "}\n---\n"
	if _, err := c.ApplyManifest(ctx, append([]byte(namespace), definitions...)); err != nil {
		return err
	}
	// The certificates of what it serves to a metrics API.
	if err := c.ca.issue("keda", subject{name: "keda-operator", ips: []string{c.HostIP()}}); err != nil {
		return err
	}
	certificates := filepath.Join(c.dir, "keda")
	if err := os.MkdirAll(certificates, 0o700); err != nil {
		return err
	}
	for from, to := range map[string]string{"ca.crt": "ca.crt", "keda.crt": "tls.crt", "keda.key": "tls.key"} {
		content, err := os.ReadFile(filepath.Join(c.pki, from))
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(certificates, to), content, 0o600); err != nil {
			return err
		}
	}
	health := net.JoinHostPort(c.HostIP(), "8081")
	d := &daemon{
		name: "keda-operator", log: filepath.Join(c.dir, "logs", "keda-operator.log"),
		env: []string{"KUBECONFIG=" + c.Kubeconfig(), "WATCH_NAMESPACE=", "POD_NAMESPACE=" + kedaNamespace, "KEDA_CLUSTER_OBJECT_NAMESPACE=" + kedaNamespace},
		argv: []string{
			filepath.Join(c.dir, "enter"), filepath.Join(tools, "operator"),
			"--enable-prometheus-metrics=false", "--health-probe-bind-address=" + health,
			"--metrics-service-bind-address=" + net.JoinHostPort(c.HostIP(), "9666"), "--cert-dir=" + certificates,
			"--zap-encoder=console", "--zap-time-encoding=rfc3339",
		},
	}
	c.mu.Lock()
	c.others = append(c.others, d)
	c.mu.Unlock()
	if err := d.start(); err != nil {
		return err
	}
	client := &http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	return c.WaitFor(ctx, "KEDA to answer", kedaTimeout, func(ctx context.Context) (bool, error) {
		if err := d.exited(); err != nil {
			return false, err
		}
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+health+"/readyz", nil)
		if err != nil {
			return false, err
		}
		response, err := client.Do(request)
		if err != nil {
			return false, nil
		}
		return response.StatusCode == http.StatusOK, errors.Join(response.Body.Close())
	})
}

// kedaDefinitions are those of its module.
func kedaDefinitions(ctx context.Context) ([]byte, error) {
	root, err := repository()
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(root, "test", "tools", "keda")
	content, err := os.ReadFile(filepath.Join(dir, "go.mod"))
	if err != nil {
		return nil, err
	}
	version, err := requiredVersion(content, kedaModule)
	if err != nil {
		return nil, err
	}
	var stderr strings.Builder
	cmd := exec.CommandContext(ctx, "go", "mod", "download", "-json", kedaModule+"@"+version)
	cmd.Dir, cmd.Stderr, cmd.WaitDelay = dir, &stderr, 10*time.Second
	cmd.Env = append(os.Environ(), "GOFLAGS=", "GOWORK=off")
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("getting the resource definitions of KEDA: %w\n%s", err, stderr.String())
	}
	var downloaded struct{ Dir string }
	if err := json.Unmarshal(out, &downloaded); err != nil {
		return nil, err
	}
	files, err := filepath.Glob(filepath.Join(downloaded.Dir, "config", "crd", "bases", "*.yaml"))
	if err != nil {
		return nil, err
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("%s %s has no resource definitions where they used to be", kedaModule, version)
	}
	var all [][]byte
	for _, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		all = append(all, content)
	}
	return bytes.Join(all, []byte("\n---\n")), nil
}
