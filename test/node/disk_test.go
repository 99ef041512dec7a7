package node_test

import (
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/images"
	"github.com/hearth-sh/hearth/test/cluster"
)

// smallDisk is in bytes; it must have room for one object, and be larger than
// what the agent takes for a disk that got room again.
const smallDisk = 64 << 20

func TestFullDiskIsSaidAndLeftBehindWhenThereIsRoom(t *testing.T) {
	ctx := t.Context()
	waitProved(t)
	mount := func(args ...string) {
		t.Helper()
		if out, err := bench.Node(wasmNode).Command(t.Context(), args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
	}
	// The agent of now keeps the directory below; its next pod gets the disk.
	mount("mount", "-t", "tmpfs", "-o", fmt.Sprintf("mode=0755,size=%d", smallDisk), "tmpfs", agentData)
	t.Cleanup(func() {
		out, err := bench.Node(wasmNode).Command(context.Background(), "umount", "-l", agentData).CombinedOutput()
		if err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
		replaceAgent(t)
	})
	replaceAgent(t)
	waitProved(t)
	watchLabels(t, wasmNode)

	data := bench.Node(wasmNode).Path(agentData)
	free := func() int64 {
		var s syscall.Statfs_t
		if err := syscall.Statfs(data, &s); err != nil {
			t.Fatal(err)
		}
		return int64(s.Bavail) * s.Bsize
	}
	module := marked(t, "for a full disk "+rand.Text())
	// Enough for the module on its way to the compiler, and not for the object:
	// that has the module once more, its code and a manifest.
	page := int64(os.Getpagesize())
	room := (int64(len(module))+page-1)/page*page + page
	filler := filepath.Join(data, "filler")
	if err := os.WriteFile(filler, make([]byte, free()-room), 0o600); err != nil {
		t.Fatal(err)
	}

	registry, err := bench.Registry(ctx, cluster.RegistryOptions{})
	if err != nil {
		t.Fatal(err)
	}
	reference, _ := push(t, registry, earlyRepository(wasmNode, registry.Host, "full"), wasmImage(t, module))
	deploy(t, "full", reference, 0)
	s := waitStatus(t, wasmNode, "the status to say that the disk is full", func(s v1alpha1.NodeStatus) bool {
		return s.Images != nil && s.Images.Failed == 1 && len(s.Images.Images) == 1 && s.Images.Images[0].Error != nil &&
			check(s, "images").State == v1alpha1.CheckFailing && check(s, "disk").State == v1alpha1.CheckFailing
	})
	e := s.Images.Images[0].Error
	t.Logf("a person reads: %s: %s; %s", s.State, check(s, "images").Message, check(s, "images").Remedy)
	if e.Code != images.CodeDiskFull || s.State != v1alpha1.NodeDegraded || strings.Contains(e.Detail, "\n") {
		t.Errorf("%s: %+v, %+v", s.State, e, check(s, "images"))
	}
	if n := verifyStore(t, wasmNode); n != 0 {
		t.Errorf("%d objects are in the store of a full disk", n)
	}
	if left, err := os.ReadDir(filepath.Join(data, "store", "tmp")); err == nil && len(left) > 0 {
		t.Errorf("%d unfinished entries are left in the store, such as %s", len(left), left[0].Name())
	}

	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	allWarm(t, 1)
	if n := verifyStore(t, wasmNode); n != 1 || !compiled(wasmNode, module) {
		t.Errorf("%d objects are in the store, the module's is there: %t", n, compiled(wasmNode, module))
	}
	waitStatus(t, wasmNode, "the images to be well", func(s v1alpha1.NodeStatus) bool { return check(s, "images").State == v1alpha1.CheckOK })
}
