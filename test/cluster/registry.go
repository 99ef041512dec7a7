package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

const (
	// registryTimeout is for the registry to answer.
	registryTimeout = 20 * time.Second
	// firstRegistryPort is the port of the cluster's first registry.
	firstRegistryPort = 5000
)

// RegistryOptions say what registry to run.
type RegistryOptions struct {
	// User and Password are required for everything when User is set.
	User, Password string
}

// Registry is a real one (distribution, as Debian ships it) that nodes, pods
// and this machine reach over plain HTTP. It ends with the cluster.
type Registry struct {
	// Host is its address as it stands in references: "198.18.0.1:5000".
	Host string
	// Log is the path of its log, one line per request.
	Log string

	cluster  *Cluster
	daemon   *daemon
	htpasswd string
}

// Registry runs a registry and tells every node's containerd that it speaks
// HTTP.
func (c *Cluster) Registry(ctx context.Context, options RegistryOptions) (*Registry, error) {
	binary, err := exec.LookPath("docker-registry")
	if err != nil {
		return nil, fmt.Errorf("%w: docker-registry is missing; run test/install-deps.sh", ErrCannotRun)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	number := len(c.registries)
	dir := filepath.Join(c.dir, "registry-"+strconv.Itoa(number))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	host := net.JoinHostPort(c.HostIP(), strconv.Itoa(firstRegistryPort+number))
	config := fmt.Sprintf("version: 0.1\nlog: {level: info, accesslog: {disabled: false}}\nstorage: {filesystem: {rootdirectory: %s/data}, delete: {enabled: true}}\nhttp: {addr: %q, secret: test}\n", dir, host)
	if options.User != "" {
		if err := writeUsers(ctx, filepath.Join(dir, "htpasswd"), map[string]string{options.User: options.Password}); err != nil {
			return nil, err
		}
		config += fmt.Sprintf("auth: {htpasswd: {realm: test, path: %s/htpasswd}}\n", dir)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.yml"), []byte(config), 0o644); err != nil {
		return nil, err
	}
	for _, m := range c.Nodes() {
		hosts := filepath.Join(m.ContainerdConfigDir, "certs.d", host)
		if err := os.MkdirAll(hosts, 0o755); err != nil {
			return nil, err
		}
		content := fmt.Sprintf("server = \"http://%s\"\n\n[host.\"http://%s\"]\n  capabilities = [\"pull\", \"resolve\"]\n", host, host)
		if err := os.WriteFile(filepath.Join(hosts, "hosts.toml"), []byte(content), 0o644); err != nil {
			return nil, err
		}
	}
	name := "registry-" + strconv.Itoa(number)
	r := &Registry{Host: host, cluster: c, Log: filepath.Join(c.dir, "logs", name+".log"), htpasswd: filepath.Join(dir, "htpasswd")}
	r.daemon = &daemon{name: name, log: r.Log, argv: []string{filepath.Join(c.dir, "enter"), binary, "serve", filepath.Join(dir, "config.yml")}}
	c.registries = append(c.registries, r)
	return r, r.Start(ctx)
}

// Admit lets in these users (passwords by name) from now on, and no others. The
// registry must have been started with one.
func (r *Registry) Admit(ctx context.Context, users map[string]string) error {
	return writeUsers(ctx, r.htpasswd, users)
}

// writeUsers writes the file of passwords, which the registry reads again when
// it changes.
func writeUsers(ctx context.Context, file string, users map[string]string) error {
	var entries strings.Builder
	for user, password := range users {
		// -i reads the password from standard input: arguments are public.
		cmd := exec.CommandContext(ctx, "htpasswd", "-Bin", user)
		cmd.Stdin = strings.NewReader(password)
		entry, err := cmd.Output()
		if err != nil {
			return fmt.Errorf("hashing the registry's password (htpasswd is in apache2-utils; run test/install-deps.sh): %w", err)
		}
		entries.WriteString(strings.TrimSpace(string(entry)) + "\n")
	}
	return os.WriteFile(file, []byte(entries.String()), 0o600)
}

// Start starts the registry, when it is stopped, and waits until it answers.
func (r *Registry) Start(ctx context.Context) error {
	if err := r.daemon.start(); err != nil {
		return err
	}
	client := &http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	return r.cluster.WaitFor(ctx, "the registry to answer", registryTimeout, func(ctx context.Context) (bool, error) {
		if err := r.daemon.exited(); err != nil {
			return false, err
		}
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+r.Host+"/v2/", nil)
		if err != nil {
			return false, err
		}
		response, err := client.Do(request)
		if err != nil {
			return false, nil
		}
		return true, errors.Join(response.Body.Close())
	})
}

// Stop stops it; what it holds stays.
func (r *Registry) Stop(ctx context.Context) error { return r.daemon.stop(ctx) }
