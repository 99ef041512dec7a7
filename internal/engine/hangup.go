package engine

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// hangupBatch is how many hang-ups are taken from the kernel at a time.
const hangupBatch = 64

// hangups tells requests whose body is still on its way that their client went
// away. net/http sees that only while somebody reads from the connection, which
// nobody does when a guest leaves its body alone. One descriptor watches all
// such connections (epoll(7)): one that is quiet costs nothing, and nothing is
// ever read, so the body stays where it is.
type hangups struct {
	poll   *os.File
	raw    syscall.RawConn
	closed atomic.Bool

	mu      sync.Mutex
	next    uint64
	watched map[uint64]context.CancelFunc
}

// newHangups makes a watcher. It works while run runs.
func newHangups() (*hangups, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("watch for clients that leave: %w", err)
	}
	// Or Go would block a thread in waiting instead of its own poller.
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, errors.Join(fmt.Errorf("watch for clients that leave: %w", err), unix.Close(fd))
	}
	poll := os.NewFile(uintptr(fd), "hangups")
	raw, err := poll.SyscallConn()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("watch for clients that leave: %w", err), poll.Close())
	}
	return &hangups{poll: poll, raw: raw, watched: make(map[uint64]context.CancelFunc)}, nil
}

// run passes hang-ups on until close.
func (h *hangups) run() error {
	var events [hangupBatch]unix.EpollEvent
	for {
		var n int
		var failed error
		err := h.raw.Read(func(fd uintptr) bool {
			n, failed = unix.EpollWait(int(fd), events[:], 0)
			return n != 0 // nothing there (and no error): wait for more
		})
		switch {
		case err != nil && h.closed.Load():
			return nil
		case err != nil:
			return fmt.Errorf("wait for clients that leave: %w", err)
		case failed != nil && !errors.Is(failed, unix.EINTR):
			return fmt.Errorf("wait for clients that leave: %w", failed)
		}
		for _, event := range events[:max(n, 0)] {
			h.mu.Lock()
			cancel := h.watched[eventID(event)]
			h.mu.Unlock()
			if cancel != nil {
				cancel()
			}
		}
	}
}

// close ends run.
func (h *hangups) close() error {
	h.closed.Store(true)
	return h.poll.Close()
}

// watch calls cancel when the client has closed the connection or its sending
// side of it, as net/http does for a request whose body it has read. What is
// still to be read does not hold that up. The result ends the watching; cancel
// may be running then still. A connection without a descriptor is not watched.
func (h *hangups) watch(c net.Conn, cancel context.CancelFunc) (stop func()) {
	s, ok := c.(syscall.Conn)
	if !ok {
		return func() {}
	}
	raw, err := s.SyscallConn()
	if err != nil {
		return func() {}
	}
	h.mu.Lock()
	h.next++
	id := h.next
	h.watched[id] = cancel
	h.mu.Unlock()
	// Once is enough. EPOLLERR and EPOLLHUP are reported unasked.
	event := unix.EpollEvent{Events: unix.EPOLLRDHUP | unix.EPOLLONESHOT, Fd: int32(uint32(id)), Pad: int32(uint32(id >> 32))}
	if h.control(raw, unix.EPOLL_CTL_ADD, &event) != nil {
		cancel() // the connection is closed already, or the server is
	}
	return func() {
		h.mu.Lock()
		delete(h.watched, id)
		h.mu.Unlock()
		_ = h.control(raw, unix.EPOLL_CTL_DEL, &event) // a closed connection has left the set by itself
	}
}

// control changes the set of connections, with both descriptors held open.
func (h *hangups) control(conn syscall.RawConn, op int, event *unix.EpollEvent) error {
	var failed, inner error
	err := h.raw.Control(func(poll uintptr) {
		inner = conn.Control(func(fd uintptr) { failed = unix.EpollCtl(int(poll), op, int(fd), event) })
	})
	return errors.Join(err, inner, failed)
}

func eventID(e unix.EpollEvent) uint64 { return uint64(uint32(e.Fd)) | uint64(uint32(e.Pad))<<32 }

// connectionKey finds a request's connection in its context.
type connectionKey struct{}

// keepConnection is an http.Server's ConnContext.
func keepConnection(ctx context.Context, c net.Conn) context.Context {
	return context.WithValue(ctx, connectionKey{}, c)
}

// untilHangup returns a context that also ends when r's client goes away while
// the body is not read to its end. The result's second part must be called.
func (h *hangups) untilHangup(r *http.Request) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(r.Context())
	c, ok := r.Context().Value(connectionKey{}).(net.Conn)
	if !ok {
		return ctx, cancel
	}
	stop := h.watch(c, cancel)
	return ctx, func() {
		stop()
		cancel()
	}
}
