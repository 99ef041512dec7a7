package images

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"net/http"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/hearth-sh/hearth/test/needs"
)

// twoGiB is more than a node takes ahead of time and less than what somebody
// may well push.
const twoGiB = 2 << 30

// bounded fails the test when it made this process, which has the agent's part
// and the registry's, much larger.
func bounded(t *testing.T) {
	t.Helper()
	size := func() uint64 {
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapSys // does not shrink: it is a peak
	}
	before := size()
	t.Cleanup(func() {
		if more := int64(size()) - int64(before); more > 128<<20 {
			t.Errorf("the heap grew by %d MiB", more>>20)
		}
	})
}

// zeros is a layer of files that unpacks to 2 GiB and has 2 MiB.
func zeros(t *testing.T) []byte {
	t.Helper()
	pack := func(content []byte) []byte {
		var b bytes.Buffer
		z := gzip.NewWriter(&b)
		if _, err := z.Write(content); err != nil {
			t.Fatal(err)
		}
		if err := z.Close(); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	var header bytes.Buffer
	if err := tar.NewWriter(&header).WriteHeader(&tar.Header{Name: "zeros", Mode: 0o644, Size: twoGiB, Typeflag: tar.TypeReg}); err != nil {
		t.Fatal(err)
	}
	const member = 16 << 20
	// Members of one gzip stream follow each other; each unpacks to the same.
	return slices.Concat(pack(header.Bytes()), bytes.Repeat(pack(make([]byte, member)), twoGiB/member), pack(make([]byte, 1024)))
}

func TestALayerOfTwoGiBIsRefusedBeforeItIsHere(t *testing.T) {
	u := startUpstream(t, "", "")
	r := newRealLoop(t, startNode(t), u)
	r.start()
	bounded(t)
	config := []byte(spinConfig)
	manifestOf := func(layer string) []byte {
		return fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json",`+
			`"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":%q,"size":%d},`+
			`"layers":[{"mediaType":"application/vnd.wasm.content.layer.v1+wasm","digest":%q,"size":%d}]}`, sum(config), len(config), layer, twoGiB)
	}
	var manifest atomic.Pointer[[]byte]
	const most = 64 << 20
	var sent atomic.Int64
	let := make(chan struct{}, 8)
	u.breakWith(func(w http.ResponseWriter, req *http.Request) bool {
		switch path := req.URL.Path; {
		case strings.Contains(path, "/manifests/"):
			w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
			w.Header().Set("Docker-Content-Digest", sum(*manifest.Load()))
			w.Header().Set("Content-Length", fmt.Sprint(len(*manifest.Load())))
			if req.Method == http.MethodGet {
				_, _ = w.Write(*manifest.Load())
			}
		case strings.HasSuffix(path, sum(config)):
			_, _ = w.Write(config)
		case strings.Contains(path, "/blobs/"):
			w.Header().Set("Content-Length", fmt.Sprint(twoGiB))
			for chunk := make([]byte, 1<<20); sent.Load() < most; sent.Add(int64(len(chunk))) {
				if _, err := w.Write(chunk); err != nil {
					break
				}
			}
			_ = http.NewResponseController(w).Flush()
			// Whoever waits for the rest is let go by nobody but itself.
			<-req.Context().Done()
			let <- struct{}{}
		default:
			return false
		}
		return true
	})
	for _, by := range []string{"digest", "tag"} {
		t.Run("by "+by, func(t *testing.T) {
			sent.Store(0)
			raw := manifestOf(sum([]byte("two gibibytes that nobody has, by " + by)))
			manifest.Store(&raw)
			w := wanting(u.host + "/huge@" + sum(raw))
			if by == "tag" {
				w = wanting(u.host + "/huge:1")
			}
			w.Urgent = true
			r.src.want(w)
			s := r.until("a failure", func(s Status) bool {
				return s.Counts[StateFailed] == 1 && s.Images[0].Image == w.Reference.Name
			})
			t.Logf("a person reads: %s", s.Summary)
			if i := s.Images[0]; i.Code != CodeTooLarge || !strings.Contains(i.Message, "2048 MiB") || !strings.Contains(i.Message, "512 MiB") {
				t.Errorf("%+v", i)
			}
			<-let
			list, err := r.o.Runtime.Images(context.Background())
			if err != nil || slices.ContainsFunc(list, func(i Image) bool { return strings.Contains(i.Name, "/huge") }) {
				t.Errorf("it is here all the same: %+v, %v", list, err)
			}
		})
	}
	t.Run("and others come meanwhile", func(t *testing.T) {
		u.breakWith(nil)
		r.src.want(wanting(u.host+"/huge:1"), wanting(u.host+"/app@"+u.pushSpin("app", "", startModule('s', 100))))
		r.until("the other image to be warm", func(s Status) bool { return s.Counts[StateWarm] == 1 })
	})
}

// TestALayerThatUnpacksToTwoGiBFillsNoDisk has containerd's images on a disk
// that is too small for what a layer of two MiB becomes.
func TestALayerThatUnpacksToTwoGiBFillsNoDisk(t *testing.T) {
	u := startUpstream(t, "", "")
	n := startNode(t)
	n.proc.kill()
	root := filepath.Join(n.dir, "root")
	// More than is unpacked between two looks at the room that is left.
	const size, keep = 2200 << 20, 1536 << 20
	needs.Tmpfs(t, root, fmt.Sprintf("size=%d", size))
	t.Cleanup(n.proc.kill) // before its disk goes
	n.start()
	r := newRealLoop(t, n, u)
	r.o.DiskPath, r.o.MinFreeBytes = root, keep
	r.start()
	bounded(t)
	free := func() int64 {
		free, err := freeBytes(root)
		if err != nil {
			t.Fatal(err)
		}
		return free
	}
	before := free()
	bomb := u.push("bomb", "", part{"application/vnd.oci.image.config.v1+json", []byte(`{"architecture":"` + runtime.GOARCH +
		`","os":"linux","rootfs":{"type":"layers","diff_ids":["` + sum([]byte("never seen")) + `"]},"config":{}}`)},
		part{"application/vnd.oci.image.layer.v1.tar+gzip", zeros(t)})
	w := wanting(u.host + "/bomb@" + bomb)
	w.Urgent, w.Handlers = true, []string{"spin"}
	r.src.want(w)
	s := r.until("a failure", func(s Status) bool { return s.Counts[StateFailed] == 1 })
	t.Logf("a person reads: %s", s.Summary)
	if i := s.Images[0]; i.Code != CodeDiskLow && i.Code != CodeDiskFull {
		t.Errorf("%+v", i)
	}
	eventually(t, "the disk has its room again", func() bool { return before-free() < 16<<20 })

	other := u.host + "/app@" + u.pushSpin("app", "", startModule('b', 100))
	r.src.want(w, wanting(other))
	r.until("an image that fits to be warm", func(s Status) bool { return s.Counts[StateWarm] == 1 })
}

// TestAnArchiveIsSearchedOnlySoFar is about our own reading of what containerd
// has unpacked without complaint.
func TestAnArchiveIsSearchedOnlySoFar(t *testing.T) {
	bounded(t)
	rt := newFakeRuntime()
	digest := rt.publish("r.example/bomb:1", "wasm", part{"application/vnd.oci.image.layer.v1.tar+gzip", zeros(t)})
	m, err := rt.Manifest(t.Context(), digest)
	if err != nil {
		t.Fatal(err)
	}
	w := walker{runtime: rt, dir: t.TempDir(), archives: true, have: func(string) bool { return false },
		ensure: func(context.Context, string, string) error { t.Error("a module of zeros"); return nil }}
	found, err := w.walk(t.Context(), m)
	if err != nil || len(found.Modules) != 0 || len(found.Notes) != 1 || !strings.Contains(found.Notes[0], "unpacks to more than 256 MiB") {
		t.Errorf("%+v, %v", found, err)
	}
}
