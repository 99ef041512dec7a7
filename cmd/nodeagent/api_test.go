//go:build !local

package main

import (
	"strings"
	"testing"
)

func TestServicesRefuseTimesOfNoUse(t *testing.T) {
	for _, args := range [][]string{
		{"api", "--stale-after=1s"}, {"api", "--stale-after=25h"},
		{"engine", "--shutdown-delay=-1s"}, {"engine", "--drain-limit=0s"}, {"engine", "--drain-limit=2h"},
	} {
		if o := execute(t, t.Context(), "", args...); o.code != exitUsage || !strings.Contains(o.stderr, "is not between") {
			t.Errorf("%v: exit code %d, %s", args, o.code, o.stderr)
		}
	}
}
