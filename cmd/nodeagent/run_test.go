package main

import (
	"strings"
	"testing"
)

func TestRunRefusesAHeartbeatThatNobodyCouldJudge(t *testing.T) {
	for _, interval := range []string{"0s", "1s", "-1m", "6m"} {
		dir := t.TempDir()
		o := execute(t, t.Context(), "", "run", "--kubernetes=off", "--socket", dir+"/a.sock", "--store-dir", dir, "--state-dir", dir, "--heartbeat="+interval)
		if o.code != exitUsage || !strings.Contains(o.stderr, "at least 2s and at most 5m0s") {
			t.Errorf("%s: exit code %d, %s", interval, o.code, o.stderr)
		}
	}
}

func TestRunRefusesIntervalsOfNoUse(t *testing.T) {
	for _, flag := range []string{"--shim-interval=0s", "--shim-interval=61s", "--imds-interval=10ms", "--imds-interval=2m"} {
		dir := t.TempDir()
		o := execute(t, t.Context(), "", "run", "--kubernetes=off", "--socket", dir+"/a.sock", "--store-dir", dir, "--state-dir", dir, flag)
		if o.code != exitUsage || !strings.Contains(o.stderr, "give at least 1s and at most 1m0s") {
			t.Errorf("%s: exit code %d, %s", flag, o.code, o.stderr)
		}
	}
}

func TestRunRefusesAnAPIThatItCannotUse(t *testing.T) {
	for _, test := range []struct {
		args []string
		want string
	}{
		{[]string{"--api-url", "http://api:80", "--api-token-file", "t"}, "https://"},
		{[]string{"--api-url", "https://api:443"}, "--api-token-file"},
		{[]string{"--api-url", "https://api:443", "--api-socket", "s", "--registry", "r:5000"}, "one of them"},
	} {
		dir := t.TempDir()
		o := execute(t, t.Context(), "", append([]string{"run", "--kubernetes=off", "--socket", dir + "/a.sock", "--store-dir", dir, "--state-dir", dir}, test.args...)...)
		if o.code != exitUsage || !strings.Contains(o.stderr, test.want) {
			t.Errorf("%q: exit code %d, %s", test.args, o.code, o.stderr)
		}
	}
}
