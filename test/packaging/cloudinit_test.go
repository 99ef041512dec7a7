package packaging_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hearth-sh/hearth/internal/nodeconfig"
	ec2 "github.com/hearth-sh/hearth/test/machine"
	"github.com/hearth-sh/hearth/test/needs"
)

const (
	templates = root + "/cloud-init"
	examples  = root + "/examples/nodeconfig"
	// fetchPool is the pool of the example in fetch.yaml.
	fetchPool = "wasm"
)

// userData are the templates by their file's name, made of the examples and of
// fetch.sh.
func userData(t *testing.T) map[string]string {
	t.Helper()
	read := func(path string) string {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	config := func(pool string) string {
		return "write_files:\n- path: /etc/hearth/node.yaml\n  content: |\n" + indented(read(filepath.Join(examples, pool+".yaml")), "    ")
	}
	const generated = "# Generated from examples/nodeconfig by TestUserDataIsTheExamples; copy it and change the copy.\n"
	all := map[string]string{
		"fetch.yaml": "#cloud-config\n" +
			"# User-data of an instance whose image does not bring bootstrap: fetches it. For another pool\n" +
			"# put that pool's node.yaml in place of this one.\n" + generated +
			config(fetchPool) + "bootcmd:\n- |\n" + indented(read(filepath.Join(templates, "fetch.sh")), "  "),
	}
	for _, pool := range nodeconfig.Pools() {
		all[string(pool)+".yaml"] = "#cloud-config\n" +
			"# User-data of an instance of the pool " + string(pool) + " whose image brings bootstrap,\n" +
			"# with hearth-bootstrap.service enabled.\n" + generated + config(string(pool))
	}
	return all
}

func indented(s, by string) string {
	var b strings.Builder
	for line := range strings.Lines(s) {
		if strings.TrimSpace(line) != "" {
			b.WriteString(by)
		}
		b.WriteString(line)
	}
	return b.String()
}

func TestUserDataIsTheExamples(t *testing.T) {
	want := userData(t)
	files, err := filepath.Glob(templates + "/*.yaml")
	if err != nil || !*update && len(files) != len(want) {
		t.Errorf("%d templates for %d (%v)", len(files), len(want), err)
	}
	for name, content := range want {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(templates, name)
			if *update {
				write(t, path, content, 0o644)
			}
			got, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(content, string(got)); diff != "" {
				t.Errorf("run go test ./test/packaging -run TestUserDataIsTheExamples -update\n%s", diff)
			}
			if len(got) > nodeconfig.MaxUserDataBytes {
				t.Errorf("%d bytes do not fit into user-data", len(got))
			}
			pool := strings.TrimSuffix(name, ".yaml")
			if name == "fetch.yaml" {
				pool = fetchPool
			}
			example, err := nodeconfig.Resolve(t.Context(), nodeconfig.Sources{Files: []string{filepath.Join(examples, pool+".yaml")}})
			if err != nil {
				t.Fatal(err)
			}
			r, err := nodeconfig.Resolve(t.Context(), nodeconfig.Sources{UserData: got})
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(example.Config, r.Config); diff != "" {
				t.Errorf("as user-data it is another configuration: %s", diff)
			}
			// cloud-init has written the file by the second boot.
			dir := t.TempDir()
			content, err := os.ReadFile(filepath.Join(examples, pool+".yaml"))
			if err != nil {
				t.Fatal(err)
			}
			write(t, filepath.Join(dir, "node.yaml"), string(content), 0o644)
			if r, err = nodeconfig.Resolve(t.Context(), nodeconfig.Sources{Dir: dir, UserData: got}); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(example.Config, r.Config); diff != "" {
				t.Errorf("at the second boot it is another configuration: %s", diff)
			}
		})
	}
}

// TestCloudInitAcceptsTheUserData asks the cloud-init of the machine image.
func TestCloudInitAcceptsTheUserData(t *testing.T) {
	if err := ec2.Check(); err != nil {
		needs.Missing(t, "%v", err)
	}
	directory, err := ec2.Root(t.Context(), os.Stderr)
	if err != nil {
		needs.Missing(t, "%v", err)
	}
	dir, err := filepath.Abs(templates)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), commandTimeout)
	defer cancel()
	var names []string
	for name := range userData(t) {
		names = append(names, name)
	}
	slices.Sort(names)
	wrong := t.TempDir()
	write(t, filepath.Join(wrong, "wrong.yaml"), "#cloud-config\nwrite_files:\n- content: without a path\n", 0o644)
	script := "set -eu\nfor f in " + strings.Join(names, " ") + `; do cloud-init schema --config-file "/templates/$f"; done
if cloud-init schema --config-file /wrong/wrong.yaml; then echo "the schema accepts anything"; exit 1; fi
echo all accepted`
	cmd := nspawn(ctx, directory, "--private-network", "--bind-ro="+dir+":/templates", "--bind-ro="+wrong+":/wrong", "/bin/sh", "-c", script)
	cmd.Stdin = bytes.NewReader(nil)
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "all accepted") {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestFetchScriptPassesShellcheck(t *testing.T) {
	need(t)
	if out, err := output(t, "", nil, "shellcheck", "--shell=sh", templates+"/fetch.sh"); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// TestFetchScript runs the script of user-data with a server that misbehaves.
func TestFetchScript(t *testing.T) {
	for _, program := range []string{"curl", "gunzip", "sha256sum"} {
		if _, err := exec.LookPath(program); err != nil {
			needs.Missing(t, "%v", err)
		}
	}
	source, err := os.ReadFile(templates + "/fetch.sh")
	if err != nil {
		t.Fatal(err)
	}
	if len(source) > 2048 {
		t.Errorf("the script has %d bytes; nobody reads that", len(source))
	}
	type answer func(http.ResponseWriter, []byte)
	whole := func(w http.ResponseWriter, b []byte) { _, _ = w.Write(b) }
	status := func(code int) answer { return func(w http.ResponseWriter, _ []byte) { w.WriteHeader(code) } }
	cut := func(w http.ResponseWriter, b []byte) {
		w.Header().Set("Content-Length", fmt.Sprint(len(b)))
		_, _ = w.Write(b[:len(b)/2])
	}
	// program tells that it was executed, and as what.
	program := func(dir, what string) []byte {
		return []byte("#!/bin/sh\necho " + what + ` "$@" >>` + dir + "/executed\n")
	}
	for _, tt := range []struct {
		name     string
		there    string // what is installed before
		answers  []answer
		served   string
		requests int
		executed string
		fails    bool
	}{
		{name: "it is fetched, verified and enabled", answers: []answer{whole}, served: "good", requests: 1, executed: "good enable\n"},
		{name: "what is there already is not fetched", there: "good", requests: 0, executed: "good enable\n"},
		{name: "what is there and wrong is replaced unexecuted", there: "old", answers: []answer{whole}, served: "good", requests: 1, executed: "good enable\n"},
		{name: "errors and broken connections pass", answers: []answer{status(503), cut, status(404), whole}, served: "good", requests: 4, executed: "good enable\n"},
		{name: "wrong bytes are never executed", answers: []answer{whole}, served: "evil", requests: 10, fails: true},
		{name: "nor is what was there before", there: "old", answers: []answer{whole}, served: "evil", requests: 10, fails: true},
		{name: "a server that has nothing", answers: []answer{status(403)}, requests: 10, fails: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			to := filepath.Join(dir, "bootstrap")
			if tt.there != "" {
				write(t, to, string(program(dir, tt.there)), 0o755)
			}
			var compressed bytes.Buffer
			w := gzip.NewWriter(&compressed)
			_, _ = w.Write(program(dir, tt.served))
			_ = w.Close()
			requests := 0
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				tt.answers[min(requests, len(tt.answers)-1)](w, compressed.Bytes())
				requests++
			}))
			defer server.Close()

			sum := sha256.Sum256(program(dir, "good"))
			var script strings.Builder
			for line := range strings.Lines(string(source)) {
				switch name, _, _ := strings.Cut(line, "="); {
				case name == "url":
					line = "url=" + server.URL + "/bootstrap.gz\n"
				case name == "to":
					line = "to=" + to + "\n"
				case strings.HasPrefix(name, "sha256_"):
					line = name + "=" + hex.EncodeToString(sum[:]) + "\n"
				}
				script.WriteString(line)
			}
			// Pauses are noted instead of slept.
			write(t, filepath.Join(dir, "bin", "sleep"), "#!/bin/sh\necho \"$1\" >>"+dir+"/pauses\n", 0o755)
			_, err := output(t, dir, []string{"PATH=" + filepath.Join(dir, "bin") + ":" + os.Getenv("PATH")}, "sh", "-c", script.String())
			if (err != nil) != tt.fails {
				t.Errorf("it ended with %v", err)
			}
			if requests != tt.requests {
				t.Errorf("%d requests, want %d", requests, tt.requests)
			}
			executed, _ := os.ReadFile(filepath.Join(dir, "executed"))
			if string(executed) != tt.executed {
				t.Errorf("executed %q, want %q", executed, tt.executed)
			}
			if _, err := os.Lstat(to + ".new"); err == nil {
				t.Error("a download was left")
			}
			if info, err := os.Stat(to); !tt.fails && (err != nil || info.Mode().Perm() != 0o755) {
				t.Errorf("%v %v", info, err)
			}
			if pauses, _ := os.ReadFile(filepath.Join(dir, "pauses")); strings.Count(string(pauses), "\n") < tt.requests-1 {
				t.Errorf("it does not pause between tries: %q", pauses)
			}
		})
	}
}
