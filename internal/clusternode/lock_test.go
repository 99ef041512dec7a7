package clusternode

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// quickly is patience for what must not come to pass anyway.
const quickly = 50 * time.Millisecond

func ignore(string) {}

func TestANodeHasOneAgentAtATime(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", "node.lock")
	first, err := lockNode(t.Context(), path, "pod hearth-system/first", quickly, ignore)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the lock is %v, %v; unprivileged users must not hold it", info, err)
	}

	t.Run("a second one is refused and told who the first is", func(t *testing.T) {
		var reasons []string
		second, err := lockNode(t.Context(), path, "second", quickly, func(r string) { reasons = append(reasons, r) })
		if !errors.Is(err, errSecondAgent) || second != nil || !strings.Contains(err.Error(), "(pod hearth-system/first)") || strings.Contains(err.Error(), "\n") {
			t.Errorf("%v", err)
		}
		if len(reasons) != 1 || !strings.Contains(reasons[0], "pod hearth-system/first") {
			t.Errorf("while it waited it said %q", reasons)
		}
	})

	t.Run("one that replaces the first waits for its end", func(t *testing.T) {
		waits := make(chan struct{})
		got := make(chan error, 1)
		go func() {
			second, err := lockNode(t.Context(), path, "second", time.Minute, func(string) { close(waits) })
			if err == nil {
				err = second.Close()
			}
			got <- err
		}()
		<-waits
		if err := first.Close(); err != nil {
			t.Fatal(err)
		}
		if err := <-got; err != nil {
			t.Error(err)
		}
	})

	t.Run("nobody's lock is taken at once, whatever the file says", func(t *testing.T) {
		if err := os.WriteFile(path, []byte(strings.Repeat("\x00\xff\x1b[2J", 1000)), 0o600); err != nil {
			t.Fatal(err)
		}
		third, err := lockNode(t.Context(), path, "third", quickly, func(r string) { t.Error(r) })
		if err != nil {
			t.Fatal(err)
		}
		defer third.Close()
		if text, err := os.ReadFile(path); err != nil || string(text) != "third\n" {
			t.Errorf("%.40q, %v", text, err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		if _, err := lockNode(ctx, path, "fourth", time.Hour, func(string) { cancel() }); !errors.Is(err, context.Canceled) {
			t.Errorf("an agent that is stopped while it waits: %v", err)
		}
	})

	t.Run("a link in its place is not followed", func(t *testing.T) {
		link := filepath.Join(t.TempDir(), "node.lock")
		if err := os.Symlink(path, link); err != nil {
			t.Fatal(err)
		}
		if _, err := lockNode(t.Context(), link, "fifth", quickly, ignore); err == nil {
			t.Error("it was")
		}
	})
}

func TestWhoHoldsTheLockIsShownAsPlainText(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	for text, want := range map[string]string{
		"":                         "",
		"pod a/b\n":                " (pod a/b)",
		"\x1b[31mred\xff\n more":   " ([31mred)",
		strings.Repeat("x", 1<<20): " (" + strings.Repeat("x", maxHolderBytes) + ")",
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		file, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		if got := holder(file); got != want {
			t.Errorf("%.20q is shown as %.40q", text, got)
		}
		_ = file.Close()
	}
}
