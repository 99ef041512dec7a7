package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/urfave/cli/v2"
	"go.uber.org/goleak"

	"github.com/hearth-sh/hearth/internal/artifact"
	"github.com/hearth-sh/hearth/internal/bootstrap"
	"github.com/hearth-sh/hearth/internal/command"
	"github.com/hearth-sh/hearth/internal/nodeconfig"
)

var update = flag.Bool("update", false, "write the generated part of docs/bootstrap.md")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type outputs struct {
	code           int
	stdout, stderr string
}

// execute runs one command line as main does.
func execute(t *testing.T, args ...string) outputs {
	t.Helper()
	clearEnvironment(t)
	var stdout, stderr bytes.Buffer
	app := command.Prepare(newApp())
	app.Writer, app.ErrWriter = &stdout, &stderr
	err := app.RunContext(t.Context(), command.Reorder(app, append([]string{"bootstrap"}, args...)))
	o := outputs{stdout: stdout.String(), stderr: stderr.String()}
	if err != nil {
		o.code = bootstrap.ExitInternal
		var exit cli.ExitCoder
		if errors.As(err, &exit) {
			o.code = exit.ExitCode()
		}
		o.stderr += err.Error()
	}
	return o
}

func clearEnvironment(t *testing.T) {
	t.Helper()
	for _, variable := range os.Environ() {
		if name, _, _ := strings.Cut(variable, "="); strings.HasPrefix(name, "HEARTH_") {
			t.Setenv(name, "")
		}
	}
}

func write(t *testing.T, path, content string) string {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestExitCodesOfCommandLines(t *testing.T) {
	dir := t.TempDir()
	broken := write(t, filepath.Join(dir, "broken.yaml"), "apiVersion: hearth.sh/v1alpha1\nkind: NodeConfig\nspec:\n  pool: wasm\n  colour: red\n")
	example := "../../examples/nodeconfig/wasm.yaml"
	for _, tt := range []struct {
		name string
		args []string
		want int
		say  string // in stdout or stderr
	}{
		{"no command shows help", nil, 0, "plan"},
		{"unknown command", []string{"rnu"}, bootstrap.ExitUsage, "did you mean `bootstrap run`?"},
		{"unknown subcommand", []string{"config", "chekc"}, bootstrap.ExitUsage, "did you mean `bootstrap config check`?"},
		{"unknown option", []string{"plan", "--colour"}, bootstrap.ExitUsage, "bootstrap plan --help"},
		{"an argument too many", []string{"run", "now"}, bootstrap.ExitUsage, "now"},
		{"an unknown format", []string{"plan", "-o", "xml"}, bootstrap.ExitUsage, "text or json"},
		{"an unknown log level", []string{"plan", "--log-level", "loud"}, bootstrap.ExitUsage, "debug, info"},
		{"status without a run", []string{"status", "--state-dir", dir}, bootstrap.ExitInternal, "has not run"},
		{"explain", []string{"explain", "artifact-digest-mismatch"}, 0, "nothing of them was used"},
		{"explain of nothing", []string{"explain", "nothing"}, bootstrap.ExitUsage, "lists all"},
		{"options after arguments", []string{"explain", "artifact-digest-mismatch", "-o", "json"}, 0, `"remedy"`},
		{"a valid configuration", []string{"config", "check", "--config", example}, 0, "wasm"},
		{"an invalid one", []string{"config", "check", "--config", broken}, bootstrap.ExitConfig, "colour"},
		{"an invalid one as JSON", []string{"config", "check", "-o", "json", "--config", broken}, bootstrap.ExitConfig, `"problems"`},
		{"a dump of an invalid one", []string{"config", "dump", "--config", broken}, bootstrap.ExitConfig, "colour"},
		{"a dump", []string{"config", "dump", "--origins", "--config", example}, 0, "pool: wasm"},
		{"the schema", []string{"config", "schema"}, 0, `"$schema"`},
		{"a missing file", []string{"config", "check", "--config", filepath.Join(dir, "none")}, bootstrap.ExitConfig, "none"},
		{"a list that is not there", []string{"manifest", "verify", "--public-key", "x", filepath.Join(dir, "none")}, bootstrap.ExitInternal, "none"},
		{"no key to sign with", []string{"manifest", "sign", broken}, bootstrap.ExitUsage, "--key"},
		{"nobody to trust", []string{"manifest", "verify", broken}, bootstrap.ExitUsage, "--public-key"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := execute(t, tt.args...)
			if got.code != tt.want || !strings.Contains(got.stdout+got.stderr, tt.say) {
				t.Errorf("%+v, want %d and %q", got, tt.want, tt.say)
			}
			if tt.want == bootstrap.ExitUsage && got.stdout != "" {
				t.Errorf("stdout has %q", got.stdout)
			}
		})
	}
}

func TestStatusFollowsTheRun(t *testing.T) {
	at := time.Now().UTC().Truncate(time.Second)
	base := bootstrap.Result{
		APIVersion: "hearth.sh/v1alpha1", Kind: bootstrap.KindResult, Run: "R", Outcome: bootstrap.OutcomeSucceeded, StartedAt: at, FinishedAt: at, DurationMS: 31_200,
		Node:     bootstrap.NodeResult{Name: "i-1", Role: "server", Pool: "control-plane", Cluster: "lab", Generation: 2, Action: "join", Proven: []string{"spin"}},
		Phases:   []bootstrap.PhaseResult{{Name: bootstrap.PhaseDiscover, Outcome: bootstrap.OutcomeSucceeded, DurationMS: 12, Attempts: 1, Changed: true}},
		Warnings: []string{"the clock is off by 3s"},
	}
	for _, tt := range []struct {
		name   string
		change func(*bootstrap.Result)
		code   int
		say    []string
	}{
		{"succeeded", func(*bootstrap.Result) {}, 0, []string{"succeeded in 31.2s", "generation 2 of cluster lab (join)", "ran WebAssembly through spin", "warning: the clock", "discover", "yes"}},
		{"under way", func(r *bootstrap.Result) {
			r.Outcome, r.Phase, r.PhaseSince, r.Doing = bootstrap.OutcomeRunning, bootstrap.PhaseReady, at, "waiting for the node"
		}, exitUnderWay, []string{"under way: phase ready since", "waiting for the node"}},
		{"failed", func(r *bootstrap.Result) {
			r.Outcome, r.Phase, r.ExitCode, r.Code, r.Message, r.Remedy = bootstrap.OutcomeFailed, bootstrap.PhaseFetch, bootstrap.ExitFetch, artifact.CodeNoSpace, "the disk is full", "free space"
		}, bootstrap.ExitFetch, []string{"failed in phase fetch", "the disk is full", "free space", "bootstrap explain artifact-no-space"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := base
			tt.change(&r)
			document, err := json.Marshal(r)
			if err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			write(t, filepath.Join(dir, "result.json"), string(document))
			got := execute(t, "status", "--state-dir", dir)
			if got.code != tt.code {
				t.Errorf("exit code %d, want %d", got.code, tt.code)
			}
			for _, want := range tt.say {
				if !strings.Contains(got.stdout, want) {
					t.Errorf("%q is missing in\n%s", want, got.stdout)
				}
			}
			got = execute(t, "status", "--state-dir", dir, "-o", "json")
			var again bootstrap.Result
			if err := json.Unmarshal([]byte(got.stdout), &again); err != nil || got.code != tt.code {
				t.Fatalf("%v in %+v", err, got)
			}
			if diff := cmp.Diff(r, again); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestAListIsSignedAndVerified(t *testing.T) {
	dir := t.TempDir()
	list := artifact.Manifest{APIVersion: "hearth.sh/v1alpha1", Kind: artifact.ManifestKind, Name: "hearth", Serial: 3, Issued: time.Now().UTC().Truncate(time.Second),
		Artifacts: []artifact.Artifact{{Name: "k3s", Version: "v1.36.2+k3s1", OS: "linux", Arch: "arm64", URLs: []string{"https://example.com/k3s"}, SHA256: artifact.Digest{1}, Size: 3}}}
	encoded, err := list.Encode()
	if err != nil {
		t.Fatal(err)
	}
	key, file := filepath.Join(dir, "key"), write(t, filepath.Join(dir, "artifacts.json"), string(encoded))
	made := execute(t, "manifest", "keygen", key)
	public := strings.TrimSpace(made.stdout)
	if made.code != 0 || !strings.HasPrefix(public, "ed25519:") {
		t.Fatalf("%+v", made)
	}
	if info, err := os.Stat(key); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the private key is %v (%v)", info, err)
	}
	if again := execute(t, "manifest", "keygen", key); again.code == 0 {
		t.Error("a key was overwritten")
	}
	if got := execute(t, "manifest", "sign", "--key", key, file); got.code != 0 {
		t.Fatalf("%+v", got)
	}
	if got := execute(t, "manifest", "verify", "--public-key", public, file); got.code != 0 || got.stdout != "hearth serial 3, 1 artifacts\n" {
		t.Errorf("%+v", got)
	}
	other := strings.TrimSpace(execute(t, "manifest", "keygen", filepath.Join(dir, "other")).stdout)
	if got := execute(t, "manifest", "verify", "--public-key", other, file); got.code != bootstrap.ExitFetch {
		t.Errorf("a stranger's key: %+v", got)
	}
	write(t, file, strings.Replace(string(encoded), "example.com", "example.org", 1))
	if got := execute(t, "manifest", "verify", "--public-key", public, file); got.code != bootstrap.ExitFetch {
		t.Errorf("a changed list: %+v", got)
	}
	if got := execute(t, "manifest", "verify", "--public-key", "ed25519:x", file); got.code != bootstrap.ExitUsage {
		t.Errorf("no key: %+v", got)
	}
}

func TestEveryCommandAndOptionSaysWhatItIs(t *testing.T) {
	app := command.Prepare(newApp())
	var walk func(path []string, commands []*cli.Command)
	walk = func(path []string, commands []*cli.Command) {
		for _, c := range commands {
			path := append(slices.Clone(path), c.Name)
			if c.Usage == "" {
				t.Errorf("%v has no usage", path)
			}
			for _, f := range c.Flags {
				if d, ok := f.(cli.DocGenerationFlag); !ok || d.GetUsage() == "" {
					t.Errorf("%v: option %s has no usage", path, f.Names()[0])
				}
			}
			if got := execute(t, append(path, "--help")...); got.code != 0 || !strings.Contains(got.stdout, c.Usage) {
				t.Errorf("%v --help: %+v", path, got)
			}
			walk(path, c.Subcommands)
		}
	}
	walk(nil, app.Commands)
}

func TestCompletionAndManual(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		got := execute(t, "completion", shell)
		if got.code != 0 || !strings.Contains(got.stdout, "bootstrap") || strings.Contains(got.stdout, "PROGRAM") {
			t.Errorf("%s: %+v", shell, got)
		}
		tool, err := exec.LookPath(shell)
		if err != nil || shell == "powershell" {
			continue
		}
		check := exec.CommandContext(t.Context(), tool, "-n")
		check.Stdin = strings.NewReader(got.stdout)
		if out, err := check.CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", shell, err, out)
		}
	}
	for _, section := range []string{"1", "8"} {
		got := execute(t, "man", "--section", section)
		if !strings.Contains(got.stdout, ".TH bootstrap "+section) || !strings.Contains(got.stdout, "keygen") {
			t.Errorf("section %s: %.200s", section, got.stdout)
		}
	}
	before := os.Args
	t.Cleanup(func() { os.Args = before })
	os.Args = []string{"bootstrap", "explain", command.CompletionRequest} // the library looks there
	if got := execute(t, "explain", command.CompletionRequest); !strings.Contains(got.stdout, "artifact-no-space\n") {
		t.Errorf("%+v", got)
	}
}

// codePackages have the codes with which a run can end.
var codePackages = []string{"artifact", "bootstrap", "host", "k3s", "nodeconfig", "systemd"}

// TestEveryCodeIsExplained reads the codes from the sources, so that a new one
// cannot be forgotten.
func TestEveryCodeIsExplained(t *testing.T) {
	defined := map[string]string{}
	for _, name := range codePackages {
		if err := filepath.WalkDir(filepath.Join("../../internal", name), func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || filepath.Ext(path) != ".go" || strings.HasSuffix(path, "_test.go") {
				return err
			}
			file, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
			if err != nil {
				return err
			}
			for _, c := range codesOf(file) {
				if before, there := defined[c]; there {
					t.Errorf("%s is defined in %s and in %s", c, before, path)
				}
				defined[c] = path
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	if len(defined) < 90 {
		t.Fatalf("only %d codes found", len(defined))
	}
	explained := map[string]bool{}
	for _, e := range bootstrap.Explanations() {
		code := string(e.Code)
		if explained[code] {
			t.Errorf("%s is explained twice", code)
		}
		explained[code] = true
		if defined[code] == "" {
			t.Errorf("%s is explained and nothing ends with it", code)
		}
		if e.Meaning == "" || e.Remedy == "" || strings.HasSuffix(e.Meaning, ".") || strings.HasSuffix(e.Remedy, ".") {
			t.Errorf("%s: one sentence each, without the full stop: %+v", code, e)
		}
	}
	for code, path := range defined {
		if !explained[code] {
			t.Errorf("`bootstrap explain` does not know %s of %s", code, path)
		}
	}
}

// codesOf lists the constants of type fault.Code in a file.
func codesOf(file *ast.File) []string {
	var codes []string
	for _, declaration := range file.Decls {
		general, ok := declaration.(*ast.GenDecl)
		if !ok || general.Tok != token.CONST {
			continue
		}
		for _, spec := range general.Specs {
			value := spec.(*ast.ValueSpec)
			selector, ok := value.Type.(*ast.SelectorExpr)
			if !ok || selector.Sel.Name != "Code" || fmt.Sprint(selector.X) != "fault" {
				continue
			}
			for _, v := range value.Values {
				if literal, ok := v.(*ast.BasicLit); ok {
					if code, err := strconv.Unquote(literal.Value); err == nil {
						codes = append(codes, code)
					}
				}
			}
		}
	}
	return codes
}

const (
	referenceFile = "../../docs/bootstrap.md"
	generatedMark = "<!-- Generated by TestReferenceIsUpToDate in cmd/bootstrap; do not edit below. -->\n"
)

// TestReferenceIsUpToDate generates the second part of docs/bootstrap.md from
// the program itself.
func TestReferenceIsUpToDate(t *testing.T) {
	clearEnvironment(t)
	document, err := os.ReadFile(referenceFile)
	if err != nil {
		t.Fatal(err)
	}
	prose, had, found := strings.Cut(string(document), generatedMark)
	if !found {
		t.Fatalf("%s has no line %q", referenceFile, generatedMark)
	}
	want := reference(t)
	if *update {
		if err := os.WriteFile(referenceFile, []byte(prose+generatedMark+want), 0o644); err != nil {
			t.Fatal(err)
		}
		had = want
	}
	if diff := cmp.Diff(want, had); diff != "" {
		t.Errorf("%s is not what the program does; run go test ./cmd/bootstrap -update\n%s", referenceFile, diff)
	}
}

func reference(t *testing.T) string {
	var b strings.Builder
	b.WriteString("\n## Exit codes\n\n`bootstrap status` ends with the code of the run it shows, and with 75 while it is under way.\n\n| code | meaning | what to do |\n|---|---|---|\n")
	for _, e := range bootstrap.ExitMeanings() {
		fmt.Fprintf(&b, "| %d | %s | %s |\n", e.Code, e.Meaning, e.Remedy)
	}
	defaults, err := nodeconfig.Resolve(t.Context(), nodeconfig.Sources{Files: []string{"../../examples/nodeconfig/wasm.yaml"}})
	if err != nil {
		t.Fatal(err)
	}
	timeouts := defaults.Config.Spec.Timeouts
	fields := map[string]string{"fetch": string(timeouts.Fetch), "join": string(timeouts.Join), "ready": string(timeouts.Ready), "prove": string(timeouts.Prove)}
	fmt.Fprintf(&b, "\n## Phases\n\nIn this order. A failure that may pass by itself is tried again with growing, jittered pauses until the phase's time is over; "+
		"all together end after `spec.timeouts.total` (%s).\n\n| phase | what it does | within |\n|---|---|---|\n", timeouts.Total)
	for _, p := range bootstrap.PhaseDescriptions() {
		within := strings.TrimSuffix(p.Within.String(), "0s")
		if p.Within < time.Minute {
			within = p.Within.String()
		}
		if p.Field != "" {
			within = fmt.Sprintf("`spec.timeouts.%s` (%s)", p.Field, fields[p.Field])
		}
		fmt.Fprintf(&b, "| %s | %s | %s |\n", p.Name, p.Does, within)
	}
	b.WriteString("\n## Codes of failures\n\nPrinted with every failure, in result.json, in the journal (`HEARTH_CODE`), and explained by `bootstrap explain CODE`. A code never changes its meaning.\n\n| code | meaning | what to do |\n|---|---|---|\n")
	for _, e := range bootstrap.Explanations() {
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", e.Code, cell(e.Meaning), cell(e.Remedy))
	}
	fmt.Fprintf(&b, "\n## Commands\n\n%s", command.Reference(command.Prepare(newApp()), 3))
	return b.String()
}

func cell(s string) string { return strings.ReplaceAll(s, "|", `\|`) }

func TestPhasesAreDescribed(t *testing.T) {
	var names []bootstrap.PhaseName
	for _, p := range bootstrap.PhaseDescriptions() {
		names = append(names, p.Name)
		if (p.Within == 0) == (p.Field == "") {
			t.Errorf("%s: a time or a field", p.Name)
		}
	}
	if diff := cmp.Diff(bootstrap.PhaseNames(), names); diff != "" {
		t.Error(diff)
	}
}

// TestTheDocumentsExamplesAreWhatTheySay parses the JSON of docs/bootstrap.md.
func TestTheDocumentsExamplesAreWhatTheySay(t *testing.T) {
	document, err := os.ReadFile(referenceFile)
	if err != nil {
		t.Fatal(err)
	}
	lists, policies := 0, 0
	for _, part := range strings.Split(string(document), "```json\n")[1:] {
		example, _, _ := strings.Cut(part, "```")
		if strings.Contains(example, artifact.ManifestKind) {
			lists++
			if _, err := artifact.ParseManifest([]byte(example)); err != nil {
				t.Errorf("the list: %v", err)
			}
			continue
		}
		policies++
		var policy struct {
			Version   string
			Statement []struct {
				Effect           string
				Action, Resource any
				Condition        map[string]any
			}
		}
		decoder := json.NewDecoder(strings.NewReader(example))
		decoder.DisallowUnknownFields()
		if err := decoder.Decode(&policy); err != nil || policy.Version != "2012-10-17" || len(policy.Statement) == 0 {
			t.Errorf("%v in\n%s", err, example)
		}
	}
	if lists != 1 || policies != 4 {
		t.Errorf("%d lists and %d policies", lists, policies)
	}
}
