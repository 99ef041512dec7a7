package functions_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

// follow starts `nodeagent logs -f` and returns the lines it has printed so
// far, until the test ends.
func follow(t *testing.T, args ...string) (lines func() []string) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	command := exec.CommandContext(ctx, agent, append([]string{"logs", "--follow", "-o", "json"}, args...)...)
	command.Env = append(os.Environ(), "KUBECONFIG="+bench.Kubeconfig(), "HOME=/nonexistent")
	out, err := command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	var (
		mu   sync.Mutex
		seen []string
		done sync.WaitGroup
	)
	done.Go(func() {
		for scanner := bufio.NewScanner(out); scanner.Scan(); {
			var l v1alpha1.LogLine
			line := scanner.Text()
			if err := json.Unmarshal([]byte(line), &l); err == nil {
				line = l.Line
			}
			mu.Lock()
			seen = append(seen, line)
			mu.Unlock()
		}
	})
	t.Cleanup(func() {
		cancel()
		done.Wait()
		_ = command.Wait() // it was killed
	})
	return func() []string {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(seen)
	}
}

// wanted counts each line of want in lines; others are returned.
func wanted(lines []string, want ...string) (counts map[string]int, others []string) {
	counts = map[string]int{}
	for _, l := range lines {
		if slices.Contains(want, l) {
			counts[l]++
		} else {
			others = append(others, l)
		}
	}
	return counts, others
}

func TestLogsComeFromWhicheverNodeServed(t *testing.T) {
	tenant := newTenant(t)
	for _, name := range []string{"talker", "talker-b"} {
		submitGuest(t, tenant, name, "log-query")
		waitObject(t, tenant, name, "every node to be warm", allWarm)
	}
	// say has the engine of every node run both functions.
	say := func(word string) (want []string) {
		t.Helper()
		for _, node := range nodes {
			engine, err := onNode(t.Context(), "engine", node)
			if err != nil {
				t.Fatal(err)
			}
			for _, name := range []string{"talker", "talker-b"} {
				query := word + "-" + name + "-" + node
				if err := bench.WaitFor(t.Context(), "the engine of "+node+" to answer", soon, func(ctx context.Context) (bool, error) {
					_, body, err := ask(ctx, engine, name, query)
					return err == nil && strings.Contains(body, "logged"), nil
				}); err != nil {
					t.Fatal(err)
				}
				if name == "talker" {
					want = append(want, "asked "+query)
				}
			}
		}
		return want
	}
	past := say("past")
	var shown string
	if err := bench.WaitFor(t.Context(), "the lines of every node to be shown", soon, func(context.Context) (bool, error) {
		shown = must(t, "logs", "--kubeconfig", bench.Kubeconfig(), "--tenant", tenant, "talker")
		for _, l := range past {
			if !strings.Contains(shown, l) {
				return false, nil
			}
		}
		return true, nil
	}); err != nil {
		t.Fatalf("%v; shown was\n%s", err, shown)
	}
	if n := strings.Count(shown, "\n"); n != len(past) || strings.Contains(shown, "talker-b") {
		t.Errorf("%d lines, want %d and no other function's:\n%s", n, len(past), shown)
	}
	if one := must(t, "logs", "--kubeconfig", bench.Kubeconfig(), "--tenant", tenant, "--tail", "1", "talker"); strings.TrimSpace(one) != strings.TrimSpace(shown[strings.LastIndexByte(strings.TrimSpace(shown), '\n')+1:]) {
		t.Errorf("--tail 1 is not the last line: %s", one)
	}

	lines := follow(t, "--kubeconfig", bench.Kubeconfig(), "--tenant", tenant, "talker")
	want := past
	await := func(what string) {
		t.Helper()
		if err := bench.WaitFor(t.Context(), what, soon, func(context.Context) (bool, error) {
			counts, _ := wanted(lines(), want...)
			return len(counts) == len(want), nil
		}); err != nil {
			t.Fatalf("%v; followed were\n%s", err, strings.Join(lines(), "\n"))
		}
	}
	await("the follower to show what was before")
	want = append(want, say("next")...)
	await("the follower to show what came since")
	want = append(want, say("last")...)
	await("the follower to show what came later still")
	counts, others := wanted(lines(), want...)
	for _, l := range slices.Sorted(maps.Keys(counts)) {
		if counts[l] != 1 {
			t.Errorf("%q was followed %d times", l, counts[l])
		}
	}
	if len(others) > 0 {
		t.Errorf("lines that are not the function's: %s", fmt.Sprint(others))
	}
}
