package systemd

import (
	"crypto/sha256"
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestWhatIsVerifiedIsNotReadUnlessItChangedSince(t *testing.T) {
	dir := t.TempDir()
	program, config := filepath.Join(dir, "program"), filepath.Join(dir, "config")
	for _, path := range []string{program, config} {
		if err := os.WriteFile(path, []byte(path), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	sum := sha256.Sum256([]byte(program))
	right, wrong := hex.EncodeToString(sum[:]), strings.Repeat("0", 64)
	read, err := ReadInputs(program, config)
	if err != nil {
		t.Fatal(err)
	}
	later, earlier := time.Now().Add(time.Hour), time.Now().Add(-time.Hour)
	for name, c := range map[string]struct {
		verified Verified
		path     string
		same     bool
	}{
		"the digest that it has is as good as reading it": {Verified{later, map[string]string{program: right}}, program, true},
		"what is said of it is believed":                  {Verified{later, map[string]string{program: wrong}}, program, false},
		"a file that changed later is read":               {Verified{earlier, map[string]string{program: wrong}}, program, true},
		"another file's digest is nothing to it":          {Verified{later, map[string]string{dir: wrong}}, program, true},
		"a file that is gone is missing":                  {Verified{later, map[string]string{program + "x": right}}, program + "x", false},
	} {
		t.Run(name, func(t *testing.T) {
			in, err := c.verified.ReadInputs(c.path, config)
			if err != nil || (in.SHA256 == read.SHA256) != c.same {
				t.Errorf("got %+v, %v; reading both gives %+v", in, err, read)
			}
			if c.path == program && !in.Newest.Equal(read.Newest) {
				t.Errorf("the newest is of %v, not of %v", in.Newest, read.Newest)
			}
		})
	}
	gone, err := ReadInputs(program+"x", config)
	if err != nil {
		t.Fatal(err)
	}
	if in, err := (Verified{later, map[string]string{program + "x": right}}).ReadInputs(program+"x", config); err != nil || in != gone {
		t.Errorf("a missing file that was verified is %+v, %v, not %+v", in, err, gone)
	}
}
