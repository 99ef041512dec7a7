package shim_test

import (
	"fmt"
	"testing"

	"go.uber.org/goleak"

	"github.com/hearth-sh/hearth/internal/shim"
	"github.com/hearth-sh/hearth/internal/shim/shimtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestFakeNode(t *testing.T) {
	fake := shimtest.NewFake()
	shimtest.TestNode(t, shimtest.NodeFixture{
		Node:    fake,
		Good:    fake.Runtime("good", shimtest.Working),
		Hollow:  fake.Runtime("hollow", shimtest.Hollow),
		Broken:  fake.Runtime("broken", shimtest.Broken),
		Stuck:   fake.Runtime("stuck", shimtest.Stuck),
		Chatty:  fake.Runtime("chatty", shimtest.Chatty),
		Missing: fake.Runtime("missing", shimtest.Missing),
		Abandon: func(*testing.T) { fake.Abandon() },
		Left:    func(*testing.T) []string { return fake.Left() },
		Stop:    func(*testing.T) { fake.Stop() },
		Start:   func(*testing.T) { fake.Start() },
	})
}

func TestFakeCacheNode(t *testing.T) {
	fake := shimtest.NewFake()
	fake.Image("native", false)
	shimtest.TestCacheNode(t, shimtest.CacheFixture{
		Node:   fake,
		Good:   fake.Runtime("good", shimtest.Working),
		Hollow: fake.Runtime("hollow", shimtest.Hollow),
		Key:    shimtest.FakeKey,
		Images: func(_ *testing.T, n int) []string {
			var names []string
			for i := range n {
				names = append(names, fmt.Sprint("image-", i))
				fake.Image(names[i], true)
			}
			return names
		},
		Native: "native", Absent: "absent",
		Compilations: func(_ *testing.T, image string) int { return fake.Compilations(image) },
		Evict:        func(_ *testing.T, image string) { fake.Evict(image) },
		Left:         func(*testing.T) []string { return fake.Left() },
	})
}

var (
	_ shim.Node      = (*shim.Containerd)(nil)
	_ shim.CacheNode = (*shim.Containerd)(nil)
)
