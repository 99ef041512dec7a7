package shim

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hearth-sh/hearth/test/needs"
)

func TestParseVersion(t *testing.T) {
	cases := []struct{ behaviour, output, want string }{
		{"runwasi's shims", "containerd-shim-spin-v2:\n  Runtime: spin\n  Version: 0.24.0\n  Revision: <none>\n\n", "0.24.0"},
		{"containerd's own shim", "containerd-shim-runc-v2:\n  Version:  v2.4.2\n  Revision: 12345\n  Go version: go1.26.8\n", "2.4.2"},
		{"the toolchain's version is not the shim's", "shim:\n  Go version: 1.26.8\n", ""},
		{"a pre-release", "Version: 0.15.0-rc.1+build.7\n", "0.15.0-rc.1+build.7"},
		{"one line", "containerd-shim-wasmedge 0.3.0\n", "0.3.0"},
		{"the label wins over what comes before", "built with 9.9.9\nVersion: 1.2.3\n", "1.2.3"},
		{"no version", "Version: <none>\n", ""},
		{"a number is no version", "Version: 7\n", ""},
		{"an address is no version", "listening on 127.0.0.1:80\n", ""},
		{"nothing", "", ""},
		{"more than is read", strings.Repeat("x", maxVersionOutput) + "\nVersion: 1.2.3\n", ""},
	}
	for _, tc := range cases {
		t.Run(tc.behaviour, func(t *testing.T) {
			got, err := ParseVersion([]byte(tc.output))
			if got != tc.want || (tc.want == "") != errors.Is(err, ErrNoVersion) {
				t.Errorf("ParseVersion() = %q, %v, want %q", got, err, tc.want)
			}
		})
	}
}

func FuzzParseVersion(f *testing.F) {
	f.Add([]byte("containerd-shim-spin-v2:\n  Runtime: spin\n  Version: 0.24.0\n"))
	f.Add([]byte("shim v1.2.3-rc.1, go1.26"))
	f.Fuzz(func(t *testing.T, output []byte) {
		version, err := ParseVersion(output)
		if (err == nil) != (version != "") {
			t.Fatalf("%q, %v", version, err)
		}
		if again, err := ParseVersion([]byte("Version: " + version)); version != "" && again != version {
			t.Fatalf("%q is read as %q, %v", version, again, err)
		}
	})
}

func TestOlderThan(t *testing.T) {
	cases := []struct {
		version, minimum string
		want             bool
	}{
		{"0.14.1", "0.15.0", true},
		{"0.15.0", "0.15.0", false},
		{"0.24.0", "0.15.0", false},
		{"0.9.0", "0.15.0", true},
		{"0.15.0-rc.1", "0.15.0", true},
		{"1.0.0", "", false},
		{"unknown", "0.15.0", false},
	}
	for _, tc := range cases {
		if got := olderThan(tc.version, tc.minimum); got != tc.want {
			t.Errorf("olderThan(%q, %q) = %t", tc.version, tc.minimum, got)
		}
	}
}

// script writes an executable shell script as a shim.
func script(t *testing.T, dir, name, body string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+body), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestRunVersion(t *testing.T) {
	needs.Root(t, "a shim")
	dir := t.TempDir()
	t.Setenv("SECRET", "token")
	cases := []struct{ behaviour, body, want, fails string }{
		{"a version is read", "[ \"$1\" = -v ] && echo 'Version: 1.2.3'", "1.2.3", ""},
		{"standard error counts", "echo 'Version: 1.2.3' >&2", "1.2.3", ""},
		{"the exit status does not matter when there is a version", "echo 'Version: 1.2.3'; exit 3", "1.2.3", ""},
		{"the environment is not passed on", "echo \"Version: 1.2.${SECRET:-4}\"", "1.2.4", ""},
		{"input is empty", "cat; echo 'Version: 1.2.3'", "1.2.3", ""},
		{"failure is said", "exit 3", "", "exit status 3"},
		{"silence is said", "exit 0", "", "names no version"},
		{"endless output ends with the deadline", "while :; do echo yyyyyyyyyyyyyyyyyyyyyyyyyyyy; done", "", "no answer within"},
	}
	for _, tc := range cases {
		t.Run(tc.behaviour, func(t *testing.T) {
			path := script(t, dir, "shim", tc.body)
			got, err := runVersion(t.Context(), "/", path)
			if got != tc.want || (err == nil) != (tc.fails == "") || err != nil && !strings.Contains(err.Error(), tc.fails) {
				t.Errorf("runVersion() = %q, %v, want %q, %q", got, err, tc.want, tc.fails)
			}
		})
	}
}

func TestRunVersionInAnotherRoot(t *testing.T) {
	needs.Root(t, "a shim")
	// The shell is not there, which is how we know that the root was changed.
	root := t.TempDir()
	script(t, filepath.Join(root, "bin"), "shim", "echo 'Version: 1.2.3'")
	if version, err := runVersion(t.Context(), root, "/bin/shim"); err == nil {
		t.Errorf("ran outside the node's root: %q", version)
	}
}

func TestRunVersionRefusesWhatOthersCanChange(t *testing.T) {
	needs.Root(t, "a shim")
	dir := t.TempDir()
	inner := filepath.Join(dir, "inner")
	path := script(t, inner, "shim", "echo 'Version: 1.2.3'")
	cases := []struct {
		behaviour string
		change    func() error
		restore   func() error
	}{
		{"writable by all", func() error { return os.Chmod(path, 0o777) }, func() error { return os.Chmod(path, 0o755) }},
		{"writable by the group", func() error { return os.Chmod(path, 0o775) }, func() error { return os.Chmod(path, 0o755) }},
		{"another owner", func() error { return os.Chown(path, 1000, 0) }, func() error { return os.Chown(path, 0, 0) }},
		{"a directory writable by all", func() error { return os.Chmod(inner, 0o777) }, func() error { return os.Chmod(inner, 0o755) }},
		{"a directory of another owner", func() error { return os.Chown(inner, 1000, 0) }, func() error { return os.Chown(inner, 0, 0) }},
	}
	for _, tc := range cases {
		t.Run(tc.behaviour, func(t *testing.T) {
			if err := tc.change(); err != nil {
				t.Fatal(err)
			}
			if _, err := runVersion(t.Context(), "/", path); !errors.Is(err, ErrUnsafeBinary) {
				t.Errorf("error %v, want ErrUnsafeBinary", err)
			}
			if err := tc.restore(); err != nil {
				t.Fatal(err)
			}
		})
	}
	if _, err := runVersion(t.Context(), "/", path); err != nil {
		t.Errorf("a safe binary was refused: %v", err)
	}
}

func TestBinaryCache(t *testing.T) {
	needs.Root(t, "a shim")
	dir := t.TempDir()
	ran := filepath.Join(dir, "ran")
	path := script(t, dir, "shim", "echo x >>"+ran+"; echo 'Version: 1.2.3'")
	var cache BinaryCache
	inspect := func() (string, string) {
		t.Helper()
		digest, version, err := cache.inspect(context.Background(), "/", path)
		if err != nil {
			t.Fatal(err)
		}
		return digest, version
	}
	digest, version := inspect()
	if again, _ := inspect(); version != "1.2.3" || again != digest {
		t.Errorf("version %q, digests %s and %s", version, digest, again)
	}
	if data, _ := os.ReadFile(ran); string(data) != "x\n" {
		t.Errorf("an unchanged shim was run %d times", len(data)/2)
	}
	script(t, dir, "shim", "echo 'Version: 1.2.4'")
	if changed, version := inspect(); changed == digest || version != "1.2.4" {
		t.Errorf("a changed shim was not read again: %s, %q", changed, version)
	}
}
