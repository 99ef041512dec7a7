package main

import (
	"bytes"
	"crypto/sha256"
	"net/http"
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

func TestServerTimingIsRead(t *testing.T) {
	got := serverTiming(http.Header{"Server-Timing": {`queue;dur=0.5, load;desc="x";dur=2`, "firstbyte;dur=1.25"}})
	want := map[string]time.Duration{"queue": 500 * time.Microsecond, "load": 2 * time.Millisecond, "firstbyte": 1250 * time.Microsecond}
	for name, d := range want {
		if got[name] != d {
			t.Errorf("%s is %v, want %v", name, got[name], d)
		}
	}
}

func TestControlIsLateByNothingNegative(t *testing.T) {
	c, err := newControl()
	if err != nil {
		t.Fatal(err)
	}
	for range 5 {
		if late := c.turn(5 * time.Millisecond); late <= 0 || late > time.Minute {
			t.Errorf("late by %v", late)
		}
	}
	c.close()
}
