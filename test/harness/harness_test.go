package harness

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// script writes a program that behaves as its text says.
func script(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "nodeagent")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestStartTellsWhatAFailingProgramPrintedAndItsExitCode(t *testing.T) {
	_, err := Start(t.Context(), Options{Binary: script(t, "echo the reason >&2\nexit 7\n"), DataDir: t.TempDir()})
	var failed *StartError
	if !errors.As(err, &failed) {
		t.Fatalf("started: %v", err)
	}
	if failed.ExitCode != 7 || !strings.Contains(failed.Output, "the reason") {
		t.Errorf("exit code %d, output %q", failed.ExitCode, failed.Output)
	}
}

func TestNothingOfAFailedStartKeepsRunning(t *testing.T) {
	pids := filepath.Join(t.TempDir(), "pid")
	// The child outlives its parent and is in the same session.
	_, err := Start(t.Context(), Options{Binary: script(t, "sleep 1000 >/dev/null 2>&1 &\necho $! >"+pids+"\nexit 1\n"), DataDir: t.TempDir()})
	if err == nil {
		t.Fatal("started")
	}
	pid, err := os.ReadFile(pids)
	if err != nil {
		t.Fatal(err)
	}
	stat, err := os.ReadFile("/proc/" + strings.TrimSpace(string(pid)) + "/stat")
	if err == nil && !strings.Contains(string(stat), ") Z ") {
		t.Errorf("the orphan still runs: %s", stat)
	}
}

func TestProblemMustAgreeWithItsAnswer(t *testing.T) {
	good := &Answer{Status: 422, Header: map[string][]string{"Content-Type": {"application/problem+json"}},
		Body: []byte(`{"type":"https://hearth.sh/problems/some-code","title":"t","status":422}`)}
	if _, code, err := good.Problem(); err != nil || code != "some-code" {
		t.Errorf("code %q, %v", code, err)
	}
	for _, bad := range []*Answer{
		{Status: 500, Header: good.Header, Body: good.Body},
		{Status: 422, Header: map[string][]string{"Content-Type": {"text/plain"}}, Body: good.Body},
		{Status: 422, Header: good.Header, Body: []byte("{")},
	} {
		if _, _, err := bad.Problem(); err == nil {
			t.Errorf("accepted: %s", bad)
		}
	}
}

func TestOutputKeepsTheLatest(t *testing.T) {
	var o Output
	for range outputBound/1024 + 10 {
		if _, err := o.Write(make([]byte, 1024)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := o.Write([]byte("the end")); err != nil {
		t.Fatal(err)
	}
	if s := o.String(); len(s) > outputBound || !strings.HasSuffix(s, "the end") {
		t.Errorf("%d bytes kept", len(s))
	}
}
