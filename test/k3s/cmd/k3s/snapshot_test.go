package main

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestTheNewestSnapshotsAreKept(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"etcd-snapshot-b-100", "etcd-snapshot-a-300", "etcd-snapshot-a-90.zip", "etcd-snapshot-a-200.zip", "on-demand-a-1"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := pruneDir(dir, "etcd-snapshot", 2); err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, entry := range left {
		names = append(names, entry.Name())
	}
	if want := []string{"etcd-snapshot-a-200.zip", "etcd-snapshot-a-300", "on-demand-a-1"}; !slices.Equal(names, want) {
		t.Errorf("%q are left, not %q", names, want)
	}
}

func TestWhatIsRestoredWithoutABucketIsAFileByItsWholePath(t *testing.T) {
	dir := t.TempDir()
	plain, packed := filepath.Join(dir, "plain"), filepath.Join(dir, "packed")
	if err := errors.Join(os.WriteFile(plain, []byte("data"), 0o600), os.WriteFile(packed, []byte("data"), 0o600)); err != nil {
		t.Fatal(err)
	}
	if _, err := compress(packed); err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	for given, want := range map[string]string{plain: plain, packed + ".zip": packed, "plain": "", dir: "", packed: ""} {
		o, err := loadOptions(serverCommand, []string{"--config=" + config(t, map[string]string{"config.yaml": ""}), "--data-dir=" + dir, "--etcd-s3=false"}, nil)
		if err != nil {
			t.Fatal(err)
		}
		if given == packed {
			_ = os.Remove(packed) // an earlier one may have unpacked it
		}
		got, err := (&server{o: o}).given(t.Context(), given)
		if got != want || (err == nil) != (want != "") || err != nil && !strings.Contains(err.Error(), "does not exist") {
			t.Errorf("%s: %q, %v", given, got, err)
		}
		if content, _ := os.ReadFile(got); want != "" && string(content) != "data" {
			t.Errorf("%s has %q", got, content)
		}
	}
}
