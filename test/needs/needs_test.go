package needs_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/hearth-sh/hearth/test/needs"
)

// TestLacksSomething is what the next test runs with and without CI.
func TestLacksSomething(t *testing.T) {
	if os.Getenv("HEARTH_TEST_LACKING") == "" {
		t.Skip("only runs as the child of another test")
	}
	needs.Program(t, "hearth-no-such-program")
	t.Fatal("went on without the program")
}

func TestWhatIsMissingSkipsATestButFailsItInCI(t *testing.T) {
	for _, tt := range []struct {
		ci     string
		passes bool
		says   string
	}{
		{"", true, "--- SKIP: TestLacksSomething"},
		{"true", false, "--- FAIL: TestLacksSomething"},
	} {
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestLacksSomething$", "-test.v")
		cmd.Env = append(slices.DeleteFunc(os.Environ(), func(e string) bool { return strings.HasPrefix(e, "CI=") }), "HEARTH_TEST_LACKING=1", "CI="+tt.ci)
		out, err := cmd.CombinedOutput()
		if (err == nil) != tt.passes || !strings.Contains(string(out), tt.says) || !strings.Contains(string(out), "hearth-no-such-program is missing: run test/install-deps.sh") {
			t.Errorf("CI=%s: %v\n%s", tt.ci, err, out)
		}
	}
}

func TestATmpfsIsBoundedAndGoesWithItsTest(t *testing.T) {
	dir := t.TempDir()
	t.Run("mounted", func(t *testing.T) {
		needs.Tmpfs(t, dir, "size=64k")
		var s unix.Statfs_t
		if err := unix.Statfs(dir, &s); err != nil {
			t.Fatal(err)
		}
		if size := s.Blocks * uint64(s.Bsize); s.Type != unix.TMPFS_MAGIC || size != 64<<10 {
			t.Errorf("a file system of type %x and %d bytes is mounted", s.Type, size)
		}
		if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	})
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("the mount is still there: %v, %v", left, err)
	}
}
