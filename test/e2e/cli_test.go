package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/test/guests"
)

// cliTimeout bounds one command; building a Go function takes longest.
const cliTimeout = 5 * time.Minute

// Exit codes of `nodeagent status`, as its help documents them.
const (
	exitHealthy     = 0
	exitDegraded    = 3
	exitUnreachable = 5
)

type result struct {
	stdout, stderr string
	code           int
	took           time.Duration
}

// cli runs the shipped binary as a person would, pointed at this dev.
func (d dev) cli(argv ...string) result {
	d.t.Helper()
	return command(d.t, []string{"HEARTH_URL=" + d.URL, "HEARTH_SOCKET=" + d.agentSocket()}, d.withSocket(argv)...)
}

func (d dev) agentSocket() string { return filepath.Join(d.DataDir, "run", "agent.sock") }

// withSocket adds --socket to the commands that read the agent's socket.
func (d dev) withSocket(argv []string) []string {
	if argv[0] == "status" || argv[0] == "doctor" {
		return append([]string{argv[0], "--socket", d.agentSocket()}, argv[1:]...)
	}
	return argv
}

func command(t *testing.T, env []string, argv ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), cliTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, nodeagent, argv...)
	cmd.Env = append(os.Environ(), env...)
	cmd.Dir = root(t)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	start := time.Now()
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("nodeagent %s: %v", strings.Join(argv, " "), err)
	}
	return result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode(), time.Since(start)}
}

func root(t *testing.T) string {
	t.Helper()
	dir, err := guests.Root()
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// works wants exit code 0 and each text in the standard output.
func (r result) works(t *testing.T, wants ...string) {
	t.Helper()
	if r.code != 0 {
		t.Errorf("exit code %d\nstdout: %s\nstderr: %s", r.code, r.stdout, r.stderr)
	}
	for _, want := range wants {
		if !strings.Contains(r.stdout, want) {
			t.Errorf("no %q in\n%s\nstderr: %s", want, r.stdout, r.stderr)
		}
	}
}

// fails wants a code that is not 0 and each text in the standard error.
func (r result) fails(t *testing.T, wants ...string) {
	t.Helper()
	if r.code == 0 {
		t.Errorf("exit code 0\nstdout: %s\nstderr: %s", r.stdout, r.stderr)
	}
	for _, want := range wants {
		if !strings.Contains(r.stderr, want) {
			t.Errorf("no %q in the standard error:\n%s", want, r.stderr)
		}
	}
	if strings.Contains(r.stderr, "goroutine ") || strings.Contains(r.stderr, "%!") {
		t.Errorf("not a message for people:\n%s", r.stderr)
	}
}

func TestCommandLineLifeOfAFunction(t *testing.T) {
	d := shared(t)
	// The README's way: a directory with a Go module.
	submitted := d.cli("submit", "--name", "cli-go", "--env", "GREETING_NAME=Ada", "--memory", "64", "examples/hello-go")
	submitted.works(t, "cli-go")
	d.answers("cli-go", "Hello, Ada, from Go!")

	file := filepath.Join(t.TempDir(), "cli-file.wasm")
	if err := os.WriteFile(file, marked(t, "from a file"), 0o644); err != nil {
		t.Fatal(err)
	}
	var f struct {
		Name, State, URL string
		Revision         int
	}
	r := d.cli("submit", "-o", "json", file)
	r.works(t)
	if err := json.Unmarshal([]byte(r.stdout), &f); err != nil || f.Name != "cli-file" || f.State != "ready" {
		t.Errorf("submit -o json: %v: %s", err, r.stdout)
	}
	d.answers("cli-file", "from a file")

	d.cli("functions", "list").works(t, "cli-go", "cli-file")
	r = d.cli("functions", "list", "-o", "json")
	r.works(t, `"cli-file"`)
	if !json.Valid([]byte(r.stdout)) {
		t.Errorf("functions list -o json is no JSON: %s", r.stdout)
	}
	d.cli("functions", "get", "cli-file").works(t, "cli-file")
	d.cli("functions", "set", "cli-go", "--env", "GREETING_NAME=Grace").works(t)
	d.cli("invoke", "cli-go").works(t, "Hello, Grace, from Go!")
	d.cli("invoke", "cli-go", "/?name=you").works(t, "Hello, you, from Go!")
	d.cli("functions", "revisions", "cli-go").works(t, "1", "2")
	d.cli("functions", "rollback", "cli-go").works(t)
	d.cli("invoke", "cli-go").works(t, "Hello, Ada, from Go!")
	eventually(t, func() error {
		if r := d.cli("logs", "cli-go"); r.code != 0 || !strings.Contains(r.stdout, "greeted Ada") {
			return errors.New(r.stdout + r.stderr)
		}
		return nil
	})
	d.cli("functions", "delete", "cli-file").works(t)
	d.cli("functions", "get", "cli-file").fails(t, "no function")

	if _, err := os.Stat(filepath.Join(root(t), "examples", "hello-go", "hello-go.wasm")); err == nil {
		t.Error("submit left its build in the source directory")
	}
}

func TestCommandLineSaysWhatIsWrong(t *testing.T) {
	d := shared(t)
	text := filepath.Join(t.TempDir(), "notes.wasm")
	if err := os.WriteFile(text, []byte("no module"), 0o644); err != nil {
		t.Fatal(err)
	}
	before := d.state()
	d.cli("submit", text).fails(t)
	d.cli("submit", filepath.Join(t.TempDir(), "missing.wasm")).fails(t, "missing.wasm")
	d.cli("submit", t.TempDir()).fails(t)
	d.cli("submit", "--memory", "1000000", text).fails(t)
	d.cli("submit", "--name", "Not_A_Name", text).fails(t)
	d.cli("invoke", "nobody-home").fails(t)
	d.cli("functions", "get", "nobody-home").fails(t, "no function")
	d.cli("no-such-command").fails(t)
	d.unchanged(before)
	// Nobody listens on port 1.
	command(t, []string{"HEARTH_URL=http://127.0.0.1:1"}, "functions", "list").fails(t, "127.0.0.1:1")
}

func TestStatusExitCodesAndSpeed(t *testing.T) {
	d := shared(t)
	d.submit("status", marked(t, "status"), "")
	eventually(t, func() error {
		if r := d.cli("status"); r.code != exitHealthy {
			return errors.New(r.stdout + r.stderr)
		}
		return nil
	})
	r := d.cli("status", "-o", "json")
	var doc struct {
		APIVersion string `json:"apiVersion"`
		Kind       string `json:"kind"`
	}
	if err := json.Unmarshal([]byte(r.stdout), &doc); err != nil || doc.Kind != "NodeStatus" || doc.APIVersion == "" {
		t.Errorf("status -o json: %v: %s", err, r.stdout)
	}
	gone := command(t, nil, "status", "--socket", filepath.Join(t.TempDir(), "agent.sock"))
	if gone.code != exitUnreachable || gone.stderr+gone.stdout == "" {
		t.Errorf("status without an agent: code %d, want %d\n%s%s", gone.code, exitUnreachable, gone.stdout, gone.stderr)
	}
}

func TestDoctorExplainsItsChecks(t *testing.T) {
	d := shared(t)
	r := d.cli("doctor")
	if r.code != 0 && r.code != exitDegraded {
		t.Errorf("doctor on a healthy dev: code %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	for _, word := range []string{"andlock", "eccomp", "disk"} {
		if !strings.Contains(r.stdout, word) {
			t.Errorf("doctor says nothing of %q:\n%s", word, r.stdout)
		}
	}
}

func TestHelpManAndCompletion(t *testing.T) {
	for _, argv := range [][]string{{"--help"}, {"man"}, {"completion", "bash"}, {"completion", "zsh"}, {"completion", "fish"}, {"completion", "powershell"}} {
		r := command(t, nil, argv...)
		r.works(t, "nodeagent")
	}
	help := command(t, nil, "--help").stdout
	for _, sub := range []string{"dev", "submit", "functions", "logs", "invoke", "status", "doctor"} {
		if !strings.Contains(help, sub) {
			t.Errorf("--help does not name %s", sub)
		}
	}
	// Completion scripts must at least be scripts.
	script := command(t, nil, "completion", "bash").stdout
	check := exec.CommandContext(t.Context(), "bash", "-n")
	check.Stdin = strings.NewReader(script)
	if out, err := check.CombinedOutput(); err != nil {
		t.Errorf("bash does not accept its completion: %v\n%s", err, out)
	}
}
