package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestMistakesAreNamedBeforeAnythingIsServed(t *testing.T) {
	file := filepath.Join(t.TempDir(), "instance.json")
	if err := os.WriteFile(file, []byte(`{"nonsense": 1}`), 0o600); err != nil {
		t.Fatal(err)
	}
	for says, args := range map[string][]string{
		"nonsense":         {"-config", file},
		"no such file":     {"-config", file + ".missing"},
		"unknown argument": {"-listen", "127.0.0.1:0", "now"},
		"listening":        {"-listen", "not an address"},
	} {
		if err := run(args); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%v: %v", args, err)
		}
	}
}
