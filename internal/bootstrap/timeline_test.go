package bootstrap

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hearth-sh/hearth/internal/artifact"
	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
	"github.com/hearth-sh/hearth/internal/host"
	"github.com/hearth-sh/hearth/internal/k3s"
)

func newRecorder(dir string) (*recorder, *[]Line) {
	var lines []Line
	r := &recorder{begin: time.Now(), dir: dir, log: slog.New(slog.DiscardHandler), tell: func(l Line) { lines = append(lines, l) }}
	r.result = Result{APIVersion: "hearth.sh/v1alpha1", Kind: KindResult, Outcome: OutcomeRunning, StartedAt: r.begin.UTC()}
	return r, &lines
}

var errPlain = errors.New("plain")

func TestAPhaseIsTriedAgainWhileItsFailureMayPass(t *testing.T) {
	passing := fault.Passing(artifact.CodeUnreachable, errPlain, "wait", "no answer")
	lasting := fault.New(artifact.CodeDigestMismatch, errPlain, "correct it", "other bytes")
	const within = time.Minute
	for _, tt := range []struct {
		name     string
		fail     func(ctx context.Context, attempt int) error
		attempts int // -1 for several
		code     fault.Code
		longest  time.Duration
	}{
		{"success at once", func(context.Context, int) error { return nil }, 1, "", 0},
		{"failures that pass", func(_ context.Context, n int) error {
			if n < 4 {
				return passing
			}
			return nil
		}, 4, "", 10 * time.Second},
		{"a failure that stays", func(context.Context, int) error { return lasting }, 1, artifact.CodeDigestMismatch, 0},
		{"one that nobody classified", func(context.Context, int) error { return errPlain }, 1, CodeInternal, 0},
		{"one that passes until time is over keeps its code", func(context.Context, int) error { return passing }, -1, artifact.CodeUnreachable, within},
		{"a phase that hangs", func(ctx context.Context, _ int) error { <-ctx.Done(); return ctx.Err() }, 1, CodeTimeout, within},
		{"one that hangs and knows why", func(ctx context.Context, _ int) error {
			<-ctx.Done()
			return fault.Passing(CodeNodeNotReady, ctx.Err(), "", "not Ready")
		}, 1, CodeNodeNotReady, within},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r, _ := newRecorder("")
				began, attempts := time.Now(), 0
				err := r.run(t.Context(), PhaseFetch, within, func(ctx context.Context) error {
					attempts++
					return tt.fail(ctx, attempts)
				})
				if fault.CodeOf(err) != tt.code || (err == nil) != (tt.code == "") {
					t.Errorf("it ended with %q: %v", fault.CodeOf(err), err)
				}
				if took := time.Since(began); took > tt.longest {
					t.Errorf("it took %v", took)
				}
				if attempts != tt.attempts && (tt.attempts >= 0 || attempts < 5) {
					t.Errorf("%d attempts", attempts)
				}
				p := r.result.Phases[0]
				if p.Attempts != attempts || p.Code != tt.code || (p.Outcome == OutcomeSucceeded) != (err == nil) || p.DurationMS != time.Since(began).Milliseconds() {
					t.Errorf("the timeline says %+v", p)
				}
			})
		})
	}
}

func TestARunThatIsToldToEndSaysSo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _ := newRecorder("")
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(3*time.Second, cancel)
		err := r.run(ctx, PhaseElect, time.Hour, func(context.Context) error { return fault.Passing(artifact.CodeUnreachable, nil, "", "no answer") })
		if fault.CodeOf(err) != CodeInterrupted || ExitCode(err, PhaseElect) != ExitInterrupted {
			t.Errorf("%v", err)
		}
	})
}

// TestTheTotalTimeIsNoInterruption: what ends with spec.timeouts.total did not
// have the time, and was not told to end.
func TestTheTotalTimeIsNoInterruption(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _ := newRecorder("")
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		err := r.run(ctx, PhaseReady, time.Hour, func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() })
		if fault.CodeOf(err) != CodeTimeout {
			t.Errorf("%v", err)
		}
	})
}

func TestTheResultCanBeReadAtEveryStep(t *testing.T) {
	dir := t.TempDir()
	r, lines := newRecorder(filepath.Join(dir, "state"))
	read := func() Result {
		t.Helper()
		got, err := LastResult(r.dir)
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	if _, err := LastResult(r.dir); !errors.Is(err, ErrNoResult) {
		t.Errorf("before the first run: %v", err)
	}
	err := r.run(t.Context(), PhaseDiscover, time.Minute, func(context.Context) error {
		if got := read(); got.Phase != PhaseDiscover || got.Outcome != OutcomeRunning || len(got.Phases) != 1 || got.Phases[0].Outcome != OutcomeRunning {
			t.Errorf("while it runs: %+v", got)
		}
		r.doing("reading %s", "tags")
		r.doing("reading %s", "tags") // told once
		if got := read(); got.Doing != "reading tags" {
			t.Errorf("it does %q", got.Doing)
		}
		r.note("an instance")
		r.warn("a slow clock")
		r.changed()
		r.node(func(n *NodeResult) { n.Name = "i-1" })
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if got := read(); got.Phases[0].Outcome != OutcomeSucceeded || !got.Phases[0].Changed || !got.Changed || got.Node.Name != "i-1" {
		t.Errorf("after the phase: %+v", got)
	}
	failure := r.run(t.Context(), PhaseFetch, time.Minute, func(context.Context) error {
		return fault.New(artifact.CodeNoSpace, errPlain, "free space", "the disk is full")
	})
	finished := r.finish(failure)
	if diff := cmp.Diff(finished, read()); diff != "" {
		t.Errorf("the file is another result: %s", diff)
	}
	want := Result{Outcome: OutcomeFailed, Phase: PhaseFetch, Code: artifact.CodeNoSpace, Message: "the disk is full: plain", Remedy: "free space", ExitCode: ExitFetch}
	got := Result{Outcome: finished.Outcome, Phase: finished.Phase, Code: finished.Code, Message: finished.Message, Remedy: finished.Remedy, ExitCode: finished.ExitCode}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{"a slow clock"}, finished.Warnings); diff != "" {
		t.Error(diff)
	}
	var texts []string
	for _, l := range *lines {
		texts = append(texts, fmt.Sprintf("%s %s", l.Phase, l.Text))
	}
	told := []string{"discover reading tags", "discover an instance", "discover a slow clock", "discover done", "fetch the disk is full: plain; free space"}
	if diff := cmp.Diff(told, texts); diff != "" {
		t.Errorf("told: %s", diff)
	}
	if left, _ := filepath.Glob(filepath.Join(r.dir, ".*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestWhatARunSaysIsBounded(t *testing.T) {
	r, _ := newRecorder("")
	if err := r.run(t.Context(), PhaseFetch, time.Minute, func(context.Context) error {
		for range 3 * maxNotes {
			r.note("again")
			r.warn("again")
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if n, w := len(r.result.Phases[0].Notes), len(r.result.Warnings); n != maxNotes || w != maxNotes {
		t.Errorf("%d notes, %d warnings", n, w)
	}
}

func TestAStateDirectoryThatCannotBeWrittenStopsNoRun(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r, _ := newRecorder(filepath.Join(dir, "file", "state"))
	if err := r.run(t.Context(), PhaseDiscover, time.Minute, func(context.Context) error { return nil }); err != nil {
		t.Error(err)
	}
}

func TestResultsThatAreNone(t *testing.T) {
	for name, content := range map[string]string{
		"empty": "", "cut off": `{"kind":"BootstrapResult","pha`, "another document": `{"kind":"BootstrapPlan"}`, "huge": strings.Repeat(" ", maxResultBytes+1),
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, resultFile), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := LastResult(dir); err == nil || !strings.Contains(err.Error(), "is no result") || strings.Contains(err.Error(), "%!") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestExitCodes(t *testing.T) {
	any := func(code fault.Code) error { return fmt.Errorf("wrapped: %w", fault.New(code, nil, "", "failed")) }
	for _, tt := range []struct {
		err   error
		phase PhaseName
		want  int
	}{
		{nil, PhaseSignal, ExitOK},
		{any(CodeMetadataDisabled), PhaseDiscover, ExitMetadata},
		{any("config-invalid"), PhaseConfigure, ExitConfig},
		{any(host.CodeMemory), PhasePreflight, ExitHost},
		{any(artifact.CodeNoSpace), PhaseFetch, ExitFetch},
		{any(host.CodeReadOnly), PhaseFetch, ExitHost}, // the machine's fault, wherever it shows
		{any("kernel"), PhasePrepare, ExitHost},
		{any("election-timeout"), PhaseElect, ExitCluster},
		{any(CodeRestore), PhaseInstall, ExitCluster},
		{any(k3s.CodeAddon), PhaseInstall, ExitConfig},
		{any("election-state"), PhaseInstall, ExitHost},
		{any("unit-failed"), PhaseStart, ExitStart},
		{any(CodeNodeNotReady), PhaseReady, ExitStart},
		{any(CodeRuntimeUnproven), PhaseProve, ExitProof},
		{any(CodeSignalDenied), PhaseSignal, ExitSignal},
		{any(CodeInterrupted), PhaseElect, ExitInterrupted},
		{any(CodeInternal), PhaseFetch, ExitInternal},
		{errPlain, PhaseFetch, ExitInternal},
		{any(CodeBusy), "", ExitInternal}, // before the first phase
	} {
		if got := ExitCode(tt.err, tt.phase); got != tt.want {
			t.Errorf("%v in %s: %d, want %d", tt.err, tt.phase, got, tt.want)
		}
	}
	seen := map[int]bool{}
	for _, e := range ExitMeanings() {
		if seen[e.Code] || e.Meaning == "" || e.Remedy == "" {
			t.Errorf("%+v", e)
		}
		seen[e.Code] = true
	}
	for _, p := range PhaseNames() {
		if code := ExitCode(any("any"), p); !seen[code] || code == ExitInternal {
			t.Errorf("phase %s ends with %d", p, code)
		}
	}
}

func TestOneRunAtATime(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	release, err := lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lock(dir); fault.CodeOf(err) != CodeBusy {
		t.Errorf("the second one: %v", err)
	}
	// The busy one leaves the other's record alone.
	if r, err := Run(t.Context(), Options{StateDir: dir, Logger: slog.New(slog.DiscardHandler)}); fault.CodeOf(err) != CodeBusy || r.Outcome != OutcomeFailed {
		t.Errorf("%+v %v", r, err)
	}
	if _, err := LastResult(dir); !errors.Is(err, ErrNoResult) {
		t.Errorf("its result was written: %v", err)
	}
	release()
	if release, err = lock(dir); err != nil {
		t.Fatal(err)
	}
	release()
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := lock(filepath.Join(file, "state")); fault.CodeOf(err) != host.CodeWriteFailed {
		t.Errorf("no directory: %v", err)
	}
}

func TestErrorsBecomeOneLine(t *testing.T) {
	for in, want := range map[string]string{
		"plain": "plain", "a\nb": "a; b", "two problems:\n  first\n  second\n": "two problems: first; second", "a\r\n\r\nb": "a; b",
	} {
		if got := oneLine(errors.New(in)); got != want {
			t.Errorf("%q: %q", in, got)
		}
	}
}
