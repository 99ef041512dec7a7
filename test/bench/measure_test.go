package main

import (
	"bytes"
	"crypto/sha256"
	"net/http"
	"strings"
	"testing"
	"time"
)

func TestVariantsAreDifferentModulesThatAnswerDifferently(t *testing.T) {
	for _, lang := range languages {
		seen := map[[32]byte]bool{}
		for n := range 3 {
			module, err := variant(t.Context(), lang.guest, n)
			if err != nil {
				t.Fatal(err)
			}
			seen[sha256.Sum256(module)] = true
			r, err := newRunner(t.Context(), module, false)
			if err != nil {
				t.Fatal(err)
			}
			out, _, err := r.run(t.Context(), "")
			if err != nil || !bytes.Contains(out, []byte("Hello,")) {
				t.Errorf("%s %d said %q %v", lang.name, n, out, err)
			}
			if err := r.Close(t.Context()); err != nil {
				t.Error(err)
			}
		}
		if len(seen) != 3 {
			t.Errorf("%s: %d different modules of 3", lang.name, len(seen))
		}
	}
}

func TestQuantile(t *testing.T) {
	values := []time.Duration{5, 1, 4, 2, 3}
	for q, want := range map[float64]time.Duration{0: 1, 0.5: 3, 1: 5} {
		if got := quantile(values, q); got != want {
			t.Errorf("quantile %v is %v, want %v", q, got, want)
		}
	}
	if quantile(nil, 0.5) != 0 {
		t.Error("quantile of nothing")
	}
}

func TestServerTimingIsRead(t *testing.T) {
	got := serverTiming(http.Header{"Server-Timing": {`queue;dur=0.5, load;desc="x";dur=2`, "firstbyte;dur=1.25"}})
	want := map[string]time.Duration{"queue": 500 * time.Microsecond, "load": 2 * time.Millisecond, "firstbyte": 1250 * time.Microsecond}
	for name, d := range want {
		if got[name] != d {
			t.Errorf("%s is %v, want %v", name, got[name], d)
		}
	}
}

func TestTableCountsMissedTargets(t *testing.T) {
	var b table
	b.title("group")
	b.add("row", "1", "")
	b.hold("good", "1", "", "≤ 2", true)
	b.hold("bad", "3", "", "≤ 2", false)
	if missed := b.print(); missed != 1 {
		t.Errorf("%d missed, want 1", missed)
	}
	if !strings.Contains(b.rows[3].verdict, "MISSED") {
		t.Error("a missed target is not marked")
	}
}
