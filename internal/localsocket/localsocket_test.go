package localsocket

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// echo serves connections until the listener closes.
func echo(t *testing.T, ln net.Listener) {
	t.Helper()
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer conn.Close()
				_, _ = io.Copy(conn, conn)
			})
		}
	})
	t.Cleanup(func() { _ = ln.Close(); wg.Wait() })
}

func mustEcho(t *testing.T, path string) {
	t.Helper()
	conn, err := Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("warm")); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 4)
	if _, err := io.ReadFull(conn, buf); err != nil || string(buf) != "warm" {
		t.Fatalf("read %q, %v", buf, err)
	}
}

func TestListenGivesMode0600AndRemovesOnClose(t *testing.T) {
	for _, umask := range []int{0, 0o022, 0o277} {
		path := filepath.Join(t.TempDir(), "run", "agent.sock")
		if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		old := syscall.Umask(umask)
		ln, err := Listen(path)
		syscall.Umask(old)
		if err != nil {
			t.Fatal(err)
		}
		info, err := os.Lstat(path)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != 0o600 {
			t.Errorf("umask %o: mode %v", umask, info.Mode())
		}
		if err := ln.Close(); err != nil {
			t.Error(err)
		}
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("socket is still there: %v", err)
		}
		if err := ln.Close(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("second close: %v", err)
		}
	}
}

func TestListenCreatesPrivateParents(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a", "b", "agent.sock")
	ln, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	echo(t, ln)
	info, err := os.Stat(filepath.Dir(path))
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%v %v", info.Mode(), err)
	}
	mustEcho(t, path)
}

func TestLongPathsWork(t *testing.T) {
	path := filepath.Join(t.TempDir(), strings.Repeat("d", 120), strings.Repeat("e", 90), "agent.sock")
	ln, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if ln.Addr().String() != path {
		t.Errorf("address %s", ln.Addr())
	}
	if _, err := Listen(path); !errors.Is(err, ErrInUse) {
		t.Errorf("second listener: %v", err)
	}
	echo(t, ln)
	mustEcho(t, path)
	if err := ln.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := Dial(t.Context(), path); !errors.Is(err, ErrNotRunning) {
		t.Errorf("after close: %v", err)
	}
}

func TestNameTooLongIsSaid(t *testing.T) {
	_, err := Listen(filepath.Join(t.TempDir(), strings.Repeat("n", 120)))
	if !errors.Is(err, syscall.ENAMETOOLONG) || !strings.Contains(err.Error(), "shorter") {
		t.Errorf("%v", err)
	}
}

// stale leaves a socket file behind as a killed process would.
func stale(t *testing.T, path string) {
	t.Helper()
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	if err := ln.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestStaleSocketIsReplaced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	stale(t, path)
	if _, err := Dial(t.Context(), path); !errors.Is(err, ErrNotRunning) || !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("dial: %v", err)
	}
	ln, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	echo(t, ln)
	mustEcho(t, path)
}

func TestLiveSocketIsNotTaken(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	ln, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	echo(t, ln)
	_, err = Listen(path)
	var typed *Error
	if !errors.Is(err, ErrInUse) || !errors.As(err, &typed) || typed.Remedy == "" {
		t.Errorf("%v", err)
	}
	mustEcho(t, path)
}

func TestOtherFilesAreLeftAlone(t *testing.T) {
	dir := t.TempDir()
	target := filepath.Join(dir, "target")
	tests := map[string]func(path string) error{
		"regular file": func(p string) error { return os.WriteFile(p, []byte("keep me"), 0o600) },
		"directory":    func(p string) error { return os.Mkdir(p, 0o700) },
		"symlink to a stale socket": func(p string) error {
			stale(t, target)
			return os.Symlink(target, p)
		},
		"named pipe": func(p string) error { return syscall.Mkfifo(p, 0o600) },
	}
	for name, create := range tests {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(dir, strings.ReplaceAll(name, " ", "-"))
			if err := create(path); err != nil {
				t.Fatal(err)
			}
			before, err := os.Lstat(path)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := Listen(path); !errors.Is(err, ErrNotSocket) {
				t.Errorf("%v", err)
			}
			after, err := os.Lstat(path)
			if err != nil || !os.SameFile(before, after) {
				t.Errorf("was replaced: %v", err)
			}
		})
	}
}

func TestCloseLeavesASuccessorsSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	first, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil { // as an over-eager cleaner would
		t.Fatal(err)
	}
	second, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	echo(t, second)
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	mustEcho(t, path)
}

func TestOfManyStartersExactlyOneListens(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	stale(t, path)
	const starters = 16
	listeners := make(chan net.Listener, starters)
	var wg sync.WaitGroup
	for range starters {
		wg.Go(func() {
			ln, err := Listen(path)
			if err == nil {
				listeners <- ln
			} else if !errors.Is(err, ErrInUse) {
				t.Errorf("%v", err)
			}
		})
	}
	wg.Wait()
	close(listeners)
	if len(listeners) != 1 {
		t.Fatalf("%d listen", len(listeners))
	}
	echo(t, <-listeners)
	mustEcho(t, path)
}

func TestMissingSocketSaysWhatToDo(t *testing.T) {
	_, err := Dial(t.Context(), filepath.Join(t.TempDir(), "none.sock"))
	if !errors.Is(err, ErrNotRunning) || !strings.Contains(err.Error(), "start nodeagent") {
		t.Errorf("%v", err)
	}
}

func TestHTTPClientReachesTheSocketAndFollowsNoRedirect(t *testing.T) {
	path := filepath.Join(t.TempDir(), "api.sock")
	ln, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/away" {
			http.Redirect(w, r, "http://192.0.2.1/", http.StatusFound)
			return
		}
		_, _ = io.WriteString(w, "ready")
	})}
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(ln) }()
	defer func() { _ = server.Close(); <-done }()

	client := HTTPClient(path)
	defer client.CloseIdleConnections()
	for path, want := range map[string]int{"/": http.StatusOK, "/away": http.StatusFound} {
		req, err := http.NewRequestWithContext(context.WithoutCancel(t.Context()), http.MethodGet, BaseURL+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		_ = resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("%s: %d", path, resp.StatusCode)
		}
	}
}

func BenchmarkDial(b *testing.B) {
	path := filepath.Join(b.TempDir(), "s")
	ln, err := Listen(path)
	if err != nil {
		b.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			_ = conn.Close()
		}
	}()
	defer func() { _ = ln.Close(); <-done }()
	for b.Loop() {
		conn, err := Dial(b.Context(), path)
		if err != nil {
			b.Fatal(err)
		}
		_ = conn.Close()
	}
}
