package main

import (
	"strings"
	"testing"
)

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
