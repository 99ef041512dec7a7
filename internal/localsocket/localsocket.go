// Package localsocket opens and dials the unix sockets through which Hearth's
// processes on one machine speak to each other.
//
// It owns the socket file: its mode (0600 from the moment it exists), its
// removal when stale and when closed, and paths longer than the kernel's 107
// bytes. It must not touch anything that is not a socket, and knows nothing of
// what is said over a connection.
package localsocket

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxPath is the longest path that fits sockaddr_un.sun_path (108 bytes)
	// with its terminating NUL; see unix(7).
	maxPath = 107
	// socketMode lets only the owner (and root) connect.
	socketMode = 0o600
	// directoryMode is for directories that Listen has to create.
	directoryMode = 0o700
	// lockWait bounds waiting for another process that is binding a socket in
	// the same directory; that takes microseconds unless the other is stopped.
	lockWait = 5 * time.Second
	// lockPoll is how often the directory lock is tried again: flock has no
	// timeout of its own.
	lockPoll = 10 * time.Millisecond
	// probeWait bounds the dial that finds out whether a socket that is
	// already there is alive. Connecting to a unix socket does not wait for
	// Accept, so only a full backlog can take this long.
	probeWait = time.Second
)

var (
	// ErrInUse says that another process listens on the socket.
	ErrInUse = errors.New("another process listens on it")
	// ErrNotSocket says that the path exists and is something else; it is left alone.
	ErrNotSocket = errors.New("the path exists and is not a socket")
	// ErrNotRunning says that nobody listens: the socket is missing or stale.
	ErrNotRunning = errors.New("nothing listens on it")
)

// Error says which socket could not be used and what to do about it.
// Unwrap gives ErrInUse, ErrNotSocket, ErrNotRunning or the system's error.
type Error struct {
	Op     string // "listen" or "dial"
	Path   string
	Remedy string // one clause, may be empty
	Err    error
}

func (e *Error) Error() string {
	s := fmt.Sprintf("%s on socket %s: %v", e.Op, e.Path, e.Err)
	if e.Op == "dial" {
		s = fmt.Sprintf("connect to socket %s: %v", e.Path, e.Err)
	}
	if e.Remedy != "" {
		s += "; " + e.Remedy
	}
	return s
}

func (e *Error) Unwrap() error { return e.Err }

// Listener is a listening unix socket. Besides net.Listener it has the
// methods of *net.UnixListener, so it can be handed to a child with File.
type Listener struct {
	*net.UnixListener
	addr net.UnixAddr
	base string
	id   fileID

	mu  sync.Mutex
	dir *os.File // nil once closed
}

type fileID struct{ dev, ino uint64 }

// Listen binds a unix stream socket at path with mode 0600, creating missing
// parent directories with 0700. A socket left behind by a process that died
// is replaced; anything else at path is an error and stays. The socket file is
// removed on Close if it is still the one that was bound.
//
// Errors are *Error around ErrInUse, ErrNotSocket or the system's error.
// Safe for use by several processes at once: exactly one gets the path.
func Listen(path string) (net.Listener, error) {
	ln, err := listen(path)
	if err != nil {
		return nil, listenError(path, err)
	}
	return ln, nil
}

func listen(path string) (_ *Listener, err error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(abs), directoryMode); err != nil {
		return nil, err
	}
	// A real descriptor rather than O_PATH: flock needs it.
	dir, err := os.OpenFile(filepath.Dir(abs), os.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = dir.Close()
		}
	}()
	// Without the lock two starters could both find the stale socket, and the
	// slower one would remove the socket the faster one has just bound.
	unlock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	defer unlock()

	addr, err := shortAddress(dir, abs)
	if err != nil {
		return nil, err
	}
	base := filepath.Base(abs)
	if err := removeStale(dir, base, addr); err != nil {
		return nil, err
	}
	// The kernel gives the file the mode of the socket's own inode less the
	// umask, so setting it before bind leaves no moment in which others
	// could connect, and needs no process-wide umask.
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var chmodErr error
		if err := c.Control(func(fd uintptr) { chmodErr = unix.Fchmod(int(fd), socketMode) }); err != nil {
			return err
		}
		return chmodErr
	}}
	bound, err := config.Listen(context.Background(), "unix", addr)
	if err != nil {
		return nil, err
	}
	unixListener := bound.(*net.UnixListener)
	// Close removes the file itself: net's own removal goes by path and
	// would take a successor's socket with it.
	unixListener.SetUnlinkOnClose(false)
	defer func() {
		if err != nil {
			_ = unixListener.Close()
			_ = unix.Unlinkat(int(dir.Fd()), base, 0)
		}
	}()
	// An umask such as 0277 may have taken the owner's own bits.
	if err := unix.Fchmodat(int(dir.Fd()), base, socketMode, 0); err != nil {
		return nil, fmt.Errorf("set mode 0600: %w", err)
	}
	id, _, err := statAt(dir, base)
	if err != nil {
		return nil, err
	}
	return &Listener{
		UnixListener: unixListener,
		addr:         net.UnixAddr{Name: abs, Net: "unix"},
		base:         base,
		id:           id,
		dir:          dir,
	}, nil
}

// Addr is the path as it was asked for, made absolute.
func (l *Listener) Addr() net.Addr { return &l.addr }

// Close stops listening and removes the socket file if it is still this
// listener's own. Further calls do nothing and return net.ErrClosed.
func (l *Listener) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.dir == nil {
		return net.ErrClosed
	}
	defer func() {
		_ = l.dir.Close()
		l.dir = nil
	}()
	// Removed before closing: between the two a dialer finds no file, which
	// is the truth, rather than one that refuses it.
	var unlinkErr error
	if id, _, err := statAt(l.dir, l.base); err == nil && id == l.id {
		unlinkErr = unix.Unlinkat(int(l.dir.Fd()), l.base, 0)
	}
	return errors.Join(l.UnixListener.Close(), unlinkErr)
}

// Dial connects to the unix socket at path. It returns at once when nobody
// listens; ctx bounds the rest. Errors are *Error around ErrNotRunning or the
// system's error.
func Dial(ctx context.Context, path string) (net.Conn, error) {
	conn, err := dial(ctx, path)
	if err != nil {
		return nil, dialError(path, err)
	}
	return conn, nil
}

func dial(ctx context.Context, path string) (net.Conn, error) {
	var d net.Dialer
	if len(path) <= maxPath {
		return d.DialContext(ctx, "unix", path)
	}
	dir, err := os.OpenFile(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	addr, err := shortAddress(dir, path)
	if err != nil {
		return nil, err
	}
	return d.DialContext(ctx, "unix", addr)
}

// BaseURL is what requests through an HTTPClient start with; the host says
// nothing, the client dials its socket whatever it is.
const BaseURL = "http://localhost"

// HTTPClient returns a client all of whose requests go to the socket at path.
// It has no timeout of its own, since some requests are long polls: bound each
// with its context. CloseIdleConnections ends what it keeps open.
func HTTPClient(path string) *http.Client {
	return &http.Client{
		Transport: &http.Transport{
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return Dial(ctx, path)
			},
			// Long polls occupy a connection each, so leave room beside them.
			MaxIdleConnsPerHost: 16,
			IdleConnTimeout:     90 * time.Second,
			DisableCompression:  true, // local: compressing costs more than it saves
		},
		// The peer is one fixed socket; a redirect could only be a mistake.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// shortAddress returns an address for path that fits sun_path, through the
// directory's descriptor when the path itself is too long. It is valid while
// dir is open.
func shortAddress(dir *os.File, path string) (string, error) {
	if len(path) <= maxPath {
		return path, nil
	}
	addr := fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), filepath.Base(path))
	if len(addr) > maxPath {
		return "", fmt.Errorf("the file name is %d bytes, too long for a unix socket: %w", len(filepath.Base(path)), unix.ENAMETOOLONG)
	}
	return addr, nil
}

func lockDir(dir *os.File) (unlock func(), err error) {
	deadline := time.Now().Add(lockWait)
	for {
		err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return func() { _ = unix.Flock(int(dir.Fd()), unix.LOCK_UN) }, nil
		case errors.Is(err, unix.EINTR):
			continue
		case !errors.Is(err, unix.EWOULDBLOCK):
			return nil, fmt.Errorf("lock directory %s: %w", dir.Name(), err)
		case time.Now().After(deadline):
			return nil, fmt.Errorf("another process has held directory %s locked for %v: %w", dir.Name(), lockWait, err)
		}
		time.Sleep(lockPoll)
	}
}

// removeStale clears the way for bind. It removes only a socket that refuses
// connections; every doubt is an error.
func removeStale(dir *os.File, base, addr string) error {
	_, mode, err := statAt(dir, base)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case err != nil:
		return err
	case mode&unix.S_IFMT != unix.S_IFSOCK:
		return ErrNotSocket
	}
	ctx, cancel := context.WithTimeout(context.Background(), probeWait)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", addr)
	switch {
	case err == nil:
		_ = conn.Close()
		return ErrInUse
	case errors.Is(err, unix.ECONNREFUSED):
		return unix.Unlinkat(int(dir.Fd()), base, 0)
	case errors.Is(err, os.ErrNotExist):
		return nil // its owner removed it in between
	case errors.Is(err, unix.EAGAIN), errors.Is(err, context.DeadlineExceeded):
		return ErrInUse // somebody listens, with a full backlog
	}
	return err
}

func statAt(dir *os.File, base string) (fileID, uint32, error) {
	var st unix.Stat_t
	if err := unix.Fstatat(int(dir.Fd()), base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fileID{}, 0, err
	}
	return fileID{dev: st.Dev, ino: st.Ino}, st.Mode, nil
}

func listenError(path string, err error) error {
	remedy := ""
	switch {
	case errors.Is(err, ErrInUse):
		remedy = "stop the other process or choose another data directory"
	case errors.Is(err, ErrNotSocket):
		remedy = "move it away or choose another path"
	case errors.Is(err, os.ErrPermission):
		remedy = "run as the user who owns the directory or choose another one"
	case errors.Is(err, unix.ENAMETOOLONG):
		remedy = "choose a shorter name"
	case errors.Is(err, unix.EROFS), errors.Is(err, unix.ENOSPC):
		remedy = "choose a directory that can be written to"
	}
	return &Error{Op: "listen", Path: path, Remedy: remedy, Err: err}
}

func dialError(path string, err error) error {
	e := &Error{Op: "dial", Path: path, Err: err}
	switch {
	case errors.Is(err, os.ErrNotExist), errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.ENOTDIR):
		e.Err = fmt.Errorf("%w (%w)", ErrNotRunning, unwrapErrno(err))
		e.Remedy = "start nodeagent, or give the right path"
	case errors.Is(err, os.ErrPermission):
		e.Remedy = "run as the user who started nodeagent, or with sudo"
	}
	return e
}

// unwrapErrno drops the "dial unix /path:" that net puts before the errno: the
// path is in the message already.
func unwrapErrno(err error) error {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return errno
	}
	return err
}
