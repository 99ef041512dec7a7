package registry

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

func TestReopenedRegistryHasEverything(t *testing.T) {
	dir := t.TempDir()
	e := openEmbedded(t, dir)
	c := newClient(t, serve(t, e.Handler()))
	a := publish(t, c, "functions/hello", wasmBytes(1000, 1))
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Resolve(context.Background(), "functions/hello"); !errors.Is(err, ErrUnavailable) {
		t.Errorf("a closed registry answers %v", err)
	}
	c = newClient(t, serve(t, openEmbedded(t, dir).Handler()))
	if _, err := c.Pull(context.Background(), a, filepath.Join(t.TempDir(), "m"), PullOptions{}); err != nil {
		t.Error(err)
	}
	st, err := os.Stat(dir)
	if err != nil || st.Mode().Perm()&0o077 != 0 && st.Mode().Perm() != 0o755 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
}

func TestGarbageCollectionKeepsWhatIsNamedAndForeignRepositories(t *testing.T) {
	dir := t.TempDir()
	e := openEmbedded(t, dir)
	c := newClient(t, serve(t, e.Handler()))
	if _, err := e.CollectGarbage(context.Background(), "functions/", nil); err != nil {
		t.Fatalf("on an empty registry: %v", err)
	}
	shared := wasmBytes(1000, 1)
	kept := publish(t, c, "functions/kept", shared)
	old := publish(t, c, "functions/kept", wasmBytes(1001, 2))
	gone := publish(t, c, "functions/gone", wasmBytes(1002, 3))
	foreign := publish(t, c, "team/tool", wasmBytes(1003, 4))
	got, err := e.CollectGarbage(context.Background(), "functions/", []v1alpha1.Artifact{kept})
	if err != nil {
		t.Fatal(err)
	}
	if got != (Collected{Manifests: 2, Repositories: 1}) {
		t.Errorf("collected %+v", got)
	}
	pull := func(a v1alpha1.Artifact) error {
		_, err := c.Pull(context.Background(), a, filepath.Join(t.TempDir(), "m"), PullOptions{})
		return err
	}
	for _, a := range []v1alpha1.Artifact{kept, foreign} {
		if err := pull(a); err != nil {
			t.Errorf("kept %v: %v", a, err)
		}
	}
	for _, a := range []v1alpha1.Artifact{old, gone} {
		if err := pull(a); !errors.Is(err, ErrNotFound) {
			t.Errorf("removed %v: %v", a, err)
		}
	}
	blobs := 0
	filepath.WalkDir(dir, func(p string, d fs.DirEntry, _ error) error {
		if d != nil && d.Name() == "data" {
			blobs++
		}
		return nil
	})
	if blobs != 8 { // manifest, config, module, application of two artifacts
		t.Errorf("%d blobs left, want 8", blobs)
	}
	// What was removed can be published again, whatever was cached.
	if again := publish(t, c, "functions/gone", wasmBytes(1002, 3)); again != gone || pull(gone) != nil {
		t.Errorf("publishing again: %v, %v", again, pull(gone))
	}
	if got, err := e.CollectGarbage(context.Background(), "functions/", []v1alpha1.Artifact{kept, gone}); err != nil || got != (Collected{}) {
		t.Errorf("second run: %+v, %v", got, err)
	}
}

func TestLeftoversOfUploadsAreRemovedAtStart(t *testing.T) {
	dir := t.TempDir()
	e := openEmbedded(t, dir)
	host := serve(t, e.Handler())
	a := publish(t, newClient(t, host), "functions/hello", wasmBytes(1000, 1))
	tr := &http.Transport{}
	t.Cleanup(tr.CloseIdleConnections)
	hc := &http.Client{Transport: tr}
	resp, err := hc.Post("http://"+host+"/v2/functions/hello/blobs/uploads/", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	loc := resp.Header.Get("Location")
	if !strings.HasPrefix(loc, "/v2/") {
		t.Errorf("upload location %q is not relative", loc)
	}
	req, _ := http.NewRequest(http.MethodPatch, "http://"+host+loc, bytes.NewReader(make([]byte, 5000)))
	if resp, err = hc.Do(req); err != nil || resp.StatusCode != http.StatusAccepted {
		t.Fatalf("%v %v", resp, err)
	}
	resp.Body.Close()
	os.WriteFile(filepath.Join(dir, "docker", "registry", "v2", "x.tmp"), []byte("x"), 0o600)
	e.Close()
	c := newClient(t, serve(t, openEmbedded(t, dir).Handler()))
	filepath.WalkDir(dir, func(p string, d fs.DirEntry, _ error) error {
		if strings.Contains(p, "_uploads/") || strings.HasSuffix(p, ".tmp") {
			t.Errorf("left behind: %s", p)
		}
		return nil
	})
	if _, err := c.Pull(context.Background(), a, filepath.Join(t.TempDir(), "m"), PullOptions{}); err != nil {
		t.Error(err)
	}
}

func TestUploadsAreBounded(t *testing.T) {
	e, err := OpenEmbedded(context.Background(), EmbeddedOptions{Dir: t.TempDir(), MaxBlobBytes: 5 << 20})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Close() })
	host := serve(t, e.Handler())
	_, err = newClient(t, host).Publish(context.Background(), "functions/big", moduleFile(t, wasmBytes(6<<20, 1)), PublishOptions{Spin: SpinOptions{Name: "big"}})
	if !errors.Is(err, ErrTooLarge) {
		t.Errorf("announced: %v", err)
	}
	tr := &http.Transport{}
	t.Cleanup(tr.CloseIdleConnections)
	hc := &http.Client{Transport: tr}
	resp, err := hc.Post("http://"+host+"/v2/functions/big/blobs/uploads/", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	loc, refused := resp.Header.Get("Location"), false
	for range 4 {
		req, _ := http.NewRequest(http.MethodPatch, "http://"+host+loc, io.LimitReader(zeros{}, 2<<20))
		resp, err := hc.Do(req)
		if err != nil {
			refused = true
			break
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusAccepted {
			refused = true
			break
		}
		loc = resp.Header.Get("Location")
	}
	if !refused {
		t.Error("8 MiB were taken in chunks although 5 MiB are allowed")
	}
}

func TestForeignSitesCannotWrite(t *testing.T) {
	host := serve(t, openEmbedded(t, t.TempDir()).Handler())
	tr := &http.Transport{}
	t.Cleanup(tr.CloseIdleConnections)
	req, _ := http.NewRequest(http.MethodPost, "http://"+host+"/v2/x/blobs/uploads/", nil)
	req.Header.Set("Origin", "https://evil.example")
	req.Header.Set("Sec-Fetch-Site", "cross-site")
	resp, err := (&http.Client{Transport: tr}).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusForbidden {
		t.Errorf("status %d", resp.StatusCode)
	}
}

func TestRegistryLogsGoToTheGivenLoggerOnly(t *testing.T) {
	var buf bytes.Buffer
	e, err := OpenEmbedded(context.Background(), EmbeddedOptions{Dir: t.TempDir(), Logger: slog.New(slog.NewTextHandler(&buf, nil))})
	if err != nil {
		t.Fatal(err)
	}
	c := newClient(t, serve(t, e.Handler()))
	publish(t, c, "functions/hello", wasmBytes(1000, 1))
	if _, err := c.Resolve(context.Background(), "functions/none"); err == nil {
		t.Error("found")
	}
	e.Close()
	routeLogs(slog.New(slog.DiscardHandler))
	if buf.Len() > 0 {
		t.Errorf("ordinary use logs: %s", buf.String())
	}
}

func TestCheckSeesAnUnwritableDirectory(t *testing.T) {
	dir := t.TempDir()
	e := openEmbedded(t, dir)
	if err := e.Check(context.Background()); err != nil {
		t.Error(err)
	}
	os.RemoveAll(dir)
	if err := e.Check(context.Background()); err == nil {
		t.Error("a missing directory passes")
	}
}

// crashServer is this test binary as a registry that will be killed.
func crashServer(dir string) {
	e, err := OpenEmbedded(context.Background(), EmbeddedOptions{Dir: dir})
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		os.Exit(1)
	}
	fmt.Println(ln.Addr())
	http.Serve(ln, e.Handler())
}

func TestAcknowledgedArtifactsSurviveKills(t *testing.T) {
	rounds := 12
	if testing.Short() {
		rounds = 3
	}
	dir := t.TempDir()
	var acked []v1alpha1.Artifact
	n := 0
	for round := range rounds {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "REGISTRY_CRASH_DIR="+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		host, err := bufio.NewReader(out).ReadString('\n')
		if err != nil || strings.HasPrefix(host, "error") {
			t.Fatalf("round %d: %s %v", round, host, err)
		}
		c := newClient(t, strings.TrimSpace(host))
		kill := time.AfterFunc(time.Duration(rand.IntN(150))*time.Millisecond, func() { cmd.Process.Kill() })
		for {
			data := wasmBytes(20_000+rand.IntN(200_000), byte(n))
			copy(data[8:], fmt.Sprint(n))
			n++
			a, err := c.Publish(context.Background(), fmt.Sprintf("functions/f%d", n%5), moduleFile(t, data), PublishOptions{Spin: SpinOptions{Name: "f"}, Tags: []string{"latest"}})
			if err != nil {
				break
			}
			acked = append(acked, a)
		}
		kill.Stop()
		cmd.Process.Kill()
		cmd.Wait()
		c.Close()
	}
	e := openEmbedded(t, dir)
	if _, err := e.CollectGarbage(context.Background(), "functions/", acked); err != nil {
		t.Fatal(err)
	}
	c := newClient(t, serve(t, e.Handler()))
	dst := filepath.Join(t.TempDir(), "m")
	for _, a := range acked {
		if _, err := c.Pull(context.Background(), a, dst, PullOptions{}); err != nil {
			t.Errorf("acknowledged and lost: %v", err)
		}
	}
	t.Logf("%d artifacts over %d kills", len(acked), rounds)
}
