package systemd

import (
	"crypto/sha256"
	"encoding/hex"
	"os"
	"path/filepath"
	"testing"
)

// TestWhatIsExpectedIsWhatWillBeThere: the digest of files that are yet to be
// written is that which reading them gives once they are.
func TestWhatIsExpectedIsWhatWillBeThere(t *testing.T) {
	dir := t.TempDir()
	there, changes, comes := filepath.Join(dir, "there"), filepath.Join(dir, "changes"), filepath.Join(dir, "comes")
	for _, path := range []string{there, changes} {
		if err := os.WriteFile(path, []byte("before"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	before, err := ReadInputs(there, changes, comes)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256([]byte("after"))
	will := hex.EncodeToString(sum[:])
	expected, err := ExpectInputs(map[string]string{changes: will, comes: will}, there, changes, comes)
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{changes, comes} {
		if err := os.WriteFile(path, []byte("after"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	after, err := ReadInputs(there, changes, comes)
	if err != nil {
		t.Fatal(err)
	}
	if expected.SHA256 != after.SHA256 || expected.SHA256 == before.SHA256 {
		t.Errorf("expected %s; it was %s and is %s", expected.SHA256, before.SHA256, after.SHA256)
	}
	if !expected.Newest.After(before.Newest) {
		t.Error("what is yet to be written is not newer than what is there")
	}
}
