package process_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/test/process"
)

func TestTheEndOfALog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	if got := process.TailFile(path, 3); !strings.Contains(got, "no such file") {
		t.Errorf("missing: %q", got)
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := process.TailFile(path, 3); got != "(empty)" {
		t.Errorf("empty: %q", got)
	}
	if err := os.WriteFile(path, []byte(strings.Repeat("x", 1<<20)+"\na\nb\nc\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := process.TailFile(path, 2); got != "b\nc" {
		t.Errorf("got %q", got)
	}
}

func TestAQuotedWordIsOneWordForTheShell(t *testing.T) {
	for _, word := range []string{"", "plain", "two words", `it's "quoted" $HOME \ *`, "a\nb"} {
		got, err := process.Output(t.Context(), "sh", "-c", "printf %s "+process.Quote(word))
		if err != nil || got != word {
			t.Errorf("%q became %q: %v", word, got, err)
		}
	}
}

func TestAFailedProgramsErrorHoldsWhatItSaid(t *testing.T) {
	_, err := process.Output(t.Context(), "sh", "-c", "echo out; echo err >&2; exit 3")
	if err == nil || !strings.Contains(err.Error(), "out\nerr") || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("the error is: %v", err)
	}
}

func TestCgroupsEndWhatIsBelowThem(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("making cgroups needs root: run the test with sudo")
	}
	whole, err := process.FindCgroups(fmt.Sprintf("hearthp%d", os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	group := whole.Below("a", "b")
	t.Cleanup(func() { // a second time it finds nothing
		if err := whole.Destroy(t.Context()); err != nil && t.Context().Err() == nil {
			t.Error(err)
		}
	})
	for range 2 { // making one that exists is no error
		if err := group.Create(); err != nil {
			t.Fatal(err)
		}
	}
	start := func() (*exec.Cmd, chan error) {
		script := ""
		for _, dir := range group.Dirs() {
			script += "echo $$ >" + process.Quote(filepath.Join(dir, "cgroup.procs")) + "\n"
		}
		cmd := exec.CommandContext(t.Context(), "sh", "-c", script+"sleep 1000 & exec sleep 1000")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		deadline := time.Now().Add(time.Minute)
		for len(whole.Processes()) < 2 && time.Now().Before(deadline) {
			time.Sleep(10 * time.Millisecond)
		}
		if got := whole.Processes(); len(got) != 2 {
			t.Fatalf("the cgroups hold processes %v, want two", got)
		}
		return cmd, ended
	}
	_, ended := start()
	if err := group.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	<-ended
	if got := group.Existing(); len(got) != len(group.Dirs()) {
		t.Errorf("killing left only the groups %v", got)
	}
	_, ended = start()
	if err := whole.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
	<-ended
	if left := whole.Existing(); len(left) > 0 {
		t.Errorf("cgroups are left: %v", left)
	}
}
