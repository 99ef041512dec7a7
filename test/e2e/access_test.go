package e2e

import (
	"bytes"
	"context"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/test/guests"
	"github.com/hearth-sh/hearth/test/harness"
)

// TestATokenFileLetsInWhomItNames makes tokens with the command line, as its
// owner would.
func TestATokenFileLetsInWhomItNames(t *testing.T) {
	if testing.Short() {
		t.Skip("starts the product")
	}
	tokens := filepath.Join(t.TempDir(), "tokens")
	token := func(user string, tenants ...string) string {
		t.Helper()
		command := exec.CommandContext(t.Context(), nodeagent, append([]string{"token", "line", user}, tenants...)...)
		var secret strings.Builder
		command.Stderr = &secret
		line, err := command.Output()
		if err != nil {
			t.Fatalf("%v: %s", err, secret.String())
		}
		file, err := os.OpenFile(tokens, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := file.Write(line); err != nil {
			t.Fatal(err)
		}
		if err := file.Close(); err != nil {
			t.Fatal(err)
		}
		_, value, _ := strings.Cut(secret.String(), ": ")
		return strings.TrimSpace(value)
	}
	ann := token("ann", "ann")
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	d, err := harness.Start(ctx, harness.Options{Binary: nodeagent, DataDir: t.TempDir(), Args: []string{"--token-file", tokens}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if _, err := d.Stop(); err != nil {
			t.Error(err)
		}
	}()
	module := guests.Read(t, "hello")
	ask := func(method, path, token string, body []byte) *harness.Answer {
		t.Helper()
		header := http.Header{"Content-Type": {"application/wasm"}}
		if token != "" {
			header.Set("Authorization", "Bearer "+token)
		}
		a, err := d.Do(ctx, method, path, bytes.NewReader(body), header)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	if a := ask("PUT", "/v1/functions/hello", "", module); a.Status != http.StatusUnauthorized || !strings.HasPrefix(a.Header.Get("WWW-Authenticate"), "Bearer") {
		t.Errorf("without a token: %s", a)
	}
	if a := ask("PUT", "/v1/functions/hello?tenant=ann", ann+"x", module); a.Status != http.StatusUnauthorized {
		t.Errorf("with a wrong token: %s", a)
	}
	if a := ask("PUT", "/v1/functions/hello?tenant=bob", ann, module); a.Status != http.StatusForbidden {
		t.Errorf("for another tenant: %s", a)
	}
	if a := ask("PUT", "/v1/functions/hello?tenant=ann", ann, module); a.Status != http.StatusCreated {
		t.Fatalf("for her own tenant: %s", a)
	}
	if a := ask("GET", "/v2/", "", nil); a.Status == http.StatusOK {
		t.Errorf("the registry lets anybody in: %s", a)
	}
	if a := ask("GET", "/f/hello/", "", nil); a.Status != http.StatusOK {
		t.Errorf("the function is for everybody: %s", a)
	}
	// Somebody who is let in while it runs, and only to look.
	bob := token("bob", "ann:read")
	if a := ask("GET", "/v1/functions/hello", bob, nil); a.Status != http.StatusOK {
		t.Errorf("a reader: %s", a)
	}
	if a := ask("DELETE", "/v1/functions/hello", bob, nil); a.Status != http.StatusForbidden {
		t.Errorf("a reader that deletes: %s", a)
	}
	// The command line takes the token as well.
	list := exec.CommandContext(ctx, nodeagent, "functions", "list", "--api", d.URL, "-n", "ann")
	list.Env = append(os.Environ(), "HEARTH_TOKEN="+ann)
	if out, err := list.CombinedOutput(); err != nil || !strings.Contains(string(out), "hello") {
		t.Errorf("%v: %s", err, out)
	}
}
