package functions_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/internal/kube"
)

// throughTraefik runs Traefik, as k3s has it, beside the controller that the
// other tests go through, and returns how a visitor asks for a URL through it.
func throughTraefik(t *testing.T) func(ctx context.Context, url string) (int, string, error) {
	t.Helper()
	address := net.JoinHostPort(bench.HostIP(), "81")
	stop, err := bench.Traefik(t.Context(), address, class)
	if err != nil {
		t.Fatal(err)
	}
	dialer := &net.Dialer{Timeout: 10 * time.Second}
	client := &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, network, address)
		},
	}}
	t.Cleanup(func() {
		client.CloseIdleConnections()
		stop()
	})
	return func(ctx context.Context, url string) (int, string, error) {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return 0, "", err
		}
		response, err := client.Do(request)
		if err != nil {
			return 0, "", err
		}
		defer response.Body.Close()
		body, err := io.ReadAll(io.LimitReader(response.Body, 1<<20))
		return response.StatusCode, string(body), err
	}
}

func TestTraefikLeadsToFunctionsWhateverRunsThem(t *testing.T) {
	const host = "shop.traefik.example"
	get := throughTraefik(t)
	await := func(url, text string, status int) {
		t.Helper()
		var last string
		if err := bench.WaitFor(t.Context(), url+" to answer "+text+" through Traefik", soon, func(ctx context.Context) (bool, error) {
			got, body, err := get(ctx, url)
			last = fmt.Sprintf("%d %s %v", got, body, err)
			return err == nil && got == status && strings.Contains(body, text), nil
		}); err != nil {
			t.Fatalf("%v; the last answer was %s", err, last)
		}
	}
	tenant := spinTenant(t)
	f := submit(t, tenant, "routed", "resident behind traefik", "--host", host)
	custom := "http://" + host + "/"
	await(f.URL, "resident behind traefik", http.StatusOK)
	await(custom, "resident behind traefik", http.StatusOK)
	waitObject(t, tenant, "routed", "every node to be warm", allWarm)

	// There and back, while both of its names are asked for.
	polling, stop := context.WithCancel(t.Context())
	failed := make(chan error, 2)
	for _, url := range []string{f.URL, custom} {
		go func() {
			var all []error
			asked := 0
			for polling.Err() == nil && len(all) < 10 {
				status, body, err := get(polling, url)
				if polling.Err() == nil && (err != nil || status != http.StatusOK) {
					all = append(all, fmt.Errorf("%s at %s: %d %s (%w)", url, time.Now().Format(time.TimeOnly), status, strings.TrimSpace(body), err))
				}
				asked++
				select {
				case <-polling.Done():
				case <-time.After(10 * time.Millisecond): // the machine has other work
				}
			}
			t.Logf("%s was asked %d times", url, asked)
			failed <- errors.Join(all...)
		}()
	}
	must(t, "functions", "set", "--kubeconfig", bench.Kubeconfig(), "--tenant", tenant, "--runtime", "spin", "--wait", "2m", "routed")
	for _, url := range []string{f.URL, custom} {
		await(url, "sha256:", http.StatusOK) // its pods say which image they are
	}
	waitObject(t, tenant, "routed", "the engines to have given it up", func(o *kube.Function) bool { return len(o.Status.Nodes) == 1 })
	must(t, "functions", "set", "--kubeconfig", bench.Kubeconfig(), "--tenant", tenant, "--runtime", "resident", "--wait", "2m", "routed")
	for _, url := range []string{f.URL, custom} {
		await(url, "resident behind traefik", http.StatusOK)
	}
	var left map[string]bool
	err := bench.WaitFor(t.Context(), "what spin had to be gone", soon, func(ctx context.Context) (bool, error) {
		var err error
		left, err = made(ctx, tenant, "routed")
		return err == nil && len(left) == 0, nil
	})
	stop()
	if err := errors.Join(err, <-failed, <-failed); err != nil {
		t.Errorf("%v; left: %v", err, left)
	}
	must(t, "functions", "delete", "--kubeconfig", bench.Kubeconfig(), "--tenant", tenant, "routed")
	await(f.URL, "", http.StatusNotFound)
	await(custom, "", http.StatusNotFound)
}
