package bootstrap

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/hearth-sh/hearth/internal/k3s"
)

func TestARestoreIsDoneOnceAndAnewWhereItWasInterrupted(t *testing.T) {
	broken := errors.New("no such snapshot")
	for _, tt := range []struct {
		name string
		// restored is what is remembered of an earlier restore.
		restored string
		// before are files that are there, below the data directory.
		before []string
		fails  error
		calls  int
		// after are files that must be there in the end, gone those that must not.
		after, gone []string
	}{
		{name: "a new machine", calls: 1, after: []string{"server/db/etcd/member/new", "server/db/hearth-restored"}, gone: []string{"server/db/hearth-restoring"}},
		{name: "it was done", restored: "2\n", before: []string{"server/db/etcd/member/old", "server/db/reset-flag"}, after: []string{"server/db/etcd/member/old", "server/db/reset-flag"}},
		// k3s puts aside what is there.
		{name: "there is data of the generation that was lost", before: []string{"server/db/etcd/member/old", "server/db/reset-flag"}, calls: 1,
			after: []string{"server/db/etcd/member/old", "server/db/hearth-restored"}, gone: []string{"server/db/reset-flag"}},
		{name: "an older generation was restored here", restored: "1\n", before: []string{"server/db/etcd/member/old"}, calls: 1, after: []string{"server/db/etcd/member/old"}},
		{name: "an earlier one was interrupted", before: []string{"server/db/etcd/member/old", "server/db/reset-flag", "server/db/hearth-restoring", "server/db/snapshots/s"}, calls: 1,
			after: []string{"server/db/etcd/member/new", "server/db/snapshots/s"}, gone: []string{"server/db/etcd/member/old", "server/db/reset-flag", "server/db/hearth-restoring"}},
		{name: "an earlier one was interrupted before k3s began", before: []string{"server/db/hearth-restoring"}, calls: 1,
			after: []string{"server/db/etcd/member/new"}, gone: []string{"server/db/hearth-restoring"}},
		{name: "it fails", fails: broken, calls: 1, after: []string{"server/db/etcd/member/new", "server/db/hearth-restoring"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			paths := k3s.NewPaths(t.TempDir())
			at := func(name string) string { return filepath.Join(paths.DataDir, name) }
			write := func(name string) {
				if err := errors.Join(os.MkdirAll(filepath.Dir(at(name)), 0o700), os.WriteFile(at(name), []byte("x"), 0o600)); err != nil {
					t.Fatal(err)
				}
			}
			for _, name := range tt.before {
				write(name)
			}
			if tt.restored != "" {
				write("server/db/hearth-restored")
				if err := os.WriteFile(paths.Restored, []byte(tt.restored), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			_, err := os.Lstat(paths.Restoring)
			interrupted := err == nil
			calls := 0
			restore := func() error {
				calls++
				if _, err := os.Lstat(paths.Restoring); err != nil {
					t.Errorf("nothing would tell that it was interrupted: %v", err)
				}
				for name, must := range map[string]bool{paths.EtcdDir: interrupted, paths.ResetFlag: true} {
					if _, err := os.Lstat(name); err == nil && must {
						t.Errorf("k3s finds %s", name)
					}
				}
				write("server/db/etcd/member/new")
				return tt.fails
			}
			err = restoreOnce(paths, 2, restore)
			if !errors.Is(err, tt.fails) || calls != tt.calls {
				t.Errorf("%d calls, %v", calls, err)
			}
			// What was done is not done again, and what failed is.
			if err := restoreOnce(paths, 2, restore); !errors.Is(err, tt.fails) || tt.fails == nil && calls != tt.calls {
				t.Errorf("another run: %d calls, %v", calls, err)
			}
			for _, name := range tt.after {
				if _, err := os.Lstat(at(name)); err != nil {
					t.Error(err)
				}
			}
			for _, name := range tt.gone {
				if _, err := os.Lstat(at(name)); err == nil {
					t.Errorf("%s is still there", name)
				}
			}
		})
	}
}
