// Package wasip1 is what a guest can ask of its host: the functions of
// wasi_snapshot_preview1, served for one request at a time.
//
// A guest sees arguments, environment, clocks, randomness, sleep and three
// streams, and nothing else: no files, no sockets, no other process. All
// functions of the snapshot exist, with the signatures that wazero's own
// module gives them, so every module that links there links here; the ones
// that need a directory or a socket answer that the descriptor is bad.
//
// It owns the translation between guest memory and a Process and no policy:
// limits, logs and HTTP are the Process's streams' business. Wazero's own
// module is not used, because it blocks without regard to a kill, copies
// paths and walks vectors of any length the guest names, and binds streams
// when an instance is made rather than when a request arrives.
//
// Format: https://github.com/WebAssembly/WASI/blob/main/legacy/preview1/docs.md
package wasip1

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"io"
	"runtime"
	"time"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/api"
	"github.com/tetratelabs/wazero/sys"
)

// ModuleName is the import module of all functions.
const ModuleName = "wasi_snapshot_preview1"

// ExitKilled is the exit code a guest ends with when a host function finds it
// killed. Guests can ask for the same number with proc_exit, so look at the
// reason of the kill and not at this.
const ExitKilled = uint32(0xffff_fff0)

const (
	// maxVectors bounds the buffers one call uses (IOV_MAX of Linux); what is
	// left is the guest's to ask for again, as with any partial read or write.
	maxVectors = 1024
	// maxTransfer bounds the bytes of one read or write, so that a kill is
	// noticed between.
	maxTransfer = 1 << 20
	// maxSubscriptions bounds one poll; the guest's runtime uses a handful.
	maxSubscriptions = 1024
	// randomChunk bounds what is filled between two looks at the kill.
	randomChunk = 64 << 10
)

// Process is what one request gives the guest. It is used by one instance.
type Process struct {
	// Args and Env are NUL-free.
	Args, Env []string
	// Stdin is read by fd_read on 0. A Read that blocks must return when the
	// process is killed.
	Stdin io.Reader
	// Stdout and Stderr take writes to 1 and 2. An error other than a short
	// write reaches the guest as EPIPE.
	Stdout, Stderr io.Writer
	// Killed is closed when the guest is to stop, at the latest then every
	// host function ends it.
	Killed <-chan struct{}

	closed [3]bool
}

type processKey struct{}

// processContext carries a Process without the chain of lookups of
// context.WithValue on each host call.
type processContext struct {
	context.Context
	process *Process
}

func (c *processContext) Value(key any) any {
	if _, ok := key.(processKey); ok {
		return c.process
	}
	return c.Context.Value(key)
}

// WithProcess returns the context to call a guest's functions with.
func WithProcess(ctx context.Context, p *Process) context.Context {
	return &processContext{ctx, p}
}

type errno uint32

// The numbers of the errno type of the snapshot.
const (
	success errno = 0
	badf    errno = 8
	fault   errno = 21
	inval   errno = 28
	eio     errno = 29
	nosys   errno = 52
	pipe    errno = 64
	spipe   errno = 70
)

const (
	i32 = api.ValueTypeI32
	i64 = api.ValueTypeI64
)

var le = binary.LittleEndian

// hostFunc takes its parameters as wazero has them: the upper half of one of 32
// bits is undefined, so each is cut to its size where it is used.
type hostFunc func(p *Process, mem api.Memory, a []uint64) errno

type function struct {
	name   string
	params []api.ValueType
	call   hostFunc
}

// constant is for functions that need nothing of the guest to answer.
func constant(e errno) hostFunc {
	return func(*Process, api.Memory, []uint64) errno { return e }
}

// onStream is for functions that make no sense on a stream: a descriptor that
// is open answers e, any other is bad.
func onStream(e errno) hostFunc {
	return func(p *Process, _ api.Memory, a []uint64) errno {
		if !p.open(uint32(a[0])) {
			return badf
		}
		return e
	}
}

func types(t ...api.ValueType) []api.ValueType { return t }

var functions = []function{
	{"args_get", types(i32, i32), func(p *Process, m api.Memory, a []uint64) errno {
		return putStrings(m, p.Args, uint32(a[0]), uint32(a[1]))
	}},
	{"args_sizes_get", types(i32, i32), func(p *Process, m api.Memory, a []uint64) errno {
		return putSizes(m, p.Args, uint32(a[0]), uint32(a[1]))
	}},
	{"environ_get", types(i32, i32), func(p *Process, m api.Memory, a []uint64) errno {
		return putStrings(m, p.Env, uint32(a[0]), uint32(a[1]))
	}},
	{"environ_sizes_get", types(i32, i32), func(p *Process, m api.Memory, a []uint64) errno {
		return putSizes(m, p.Env, uint32(a[0]), uint32(a[1]))
	}},
	{"clock_res_get", types(i32, i32), clockRes},
	{"clock_time_get", types(i32, i64, i32), clockTime},
	{"fd_advise", types(i32, i64, i64, i32), onStream(spipe)},
	{"fd_allocate", types(i32, i64, i64), onStream(spipe)},
	{"fd_close", types(i32), fdClose},
	{"fd_datasync", types(i32), onStream(inval)},
	{"fd_fdstat_get", types(i32, i32), fdStat},
	{"fd_fdstat_set_flags", types(i32, i32), fdSetFlags},
	{"fd_fdstat_set_rights", types(i32, i64, i64), onStream(nosys)},
	{"fd_filestat_get", types(i32, i32), fdFileStat},
	{"fd_filestat_set_size", types(i32, i64), onStream(inval)},
	{"fd_filestat_set_times", types(i32, i64, i64, i32), onStream(inval)},
	{"fd_pread", types(i32, i32, i32, i64, i32), onStream(spipe)},
	{"fd_prestat_get", types(i32, i32), constant(badf)},
	{"fd_prestat_dir_name", types(i32, i32, i32), constant(badf)},
	{"fd_pwrite", types(i32, i32, i32, i64, i32), onStream(spipe)},
	{"fd_read", types(i32, i32, i32, i32), fdRead},
	{"fd_readdir", types(i32, i32, i32, i64, i32), constant(badf)},
	{"fd_renumber", types(i32, i32), constant(badf)},
	{"fd_seek", types(i32, i64, i32, i32), onStream(spipe)},
	{"fd_sync", types(i32), onStream(inval)},
	{"fd_tell", types(i32, i32), onStream(spipe)},
	{"fd_write", types(i32, i32, i32, i32), fdWrite},
	{"path_create_directory", types(i32, i32, i32), constant(badf)},
	{"path_filestat_get", types(i32, i32, i32, i32, i32), constant(badf)},
	{"path_filestat_set_times", types(i32, i32, i32, i32, i64, i64, i32), constant(badf)},
	{"path_link", types(i32, i32, i32, i32, i32, i32, i32), constant(badf)},
	{"path_open", types(i32, i32, i32, i32, i32, i64, i64, i32, i32), constant(badf)},
	{"path_readlink", types(i32, i32, i32, i32, i32, i32), constant(badf)},
	{"path_remove_directory", types(i32, i32, i32), constant(badf)},
	{"path_rename", types(i32, i32, i32, i32, i32, i32), constant(badf)},
	{"path_symlink", types(i32, i32, i32, i32, i32), constant(badf)},
	{"path_unlink_file", types(i32, i32, i32), constant(badf)},
	{"poll_oneoff", types(i32, i32, i32, i32), pollOneoff},
	{"proc_raise", types(i32), constant(nosys)},
	{"random_get", types(i32, i32), randomGet},
	{"sched_yield", nil, func(*Process, api.Memory, []uint64) errno { runtime.Gosched(); return success }},
	{"sock_accept", types(i32, i32, i32), constant(badf)},
	{"sock_recv", types(i32, i32, i32, i32, i32, i32), constant(badf)},
	{"sock_send", types(i32, i32, i32, i32, i32), constant(badf)},
	{"sock_shutdown", types(i32, i32), constant(badf)},
}

// Instantiate adds the module to r, with the functions that guest imports (nil:
// all of them): making one costs about ten microseconds, and most guests use
// few. Guests of r find their Process in the context they are called with, and
// end at once when there is none.
func Instantiate(ctx context.Context, r wazero.Runtime, guest wazero.CompiledModule) error {
	wanted := func(string) bool { return true }
	if guest != nil {
		names := make(map[string]bool)
		for _, f := range guest.ImportedFunctions() {
			if module, name, _ := f.Import(); module == ModuleName {
				names[name] = true
			}
		}
		if len(names) == 0 {
			return nil
		}
		wanted = func(name string) bool { return names[name] }
	}
	b := r.NewHostModuleBuilder(ModuleName)
	for _, f := range functions {
		if wanted(f.name) {
			b.NewFunctionBuilder().
				WithGoModuleFunction(f.goFunc(), f.params, types(i32)).
				Export(f.name)
		}
	}
	if wanted("proc_exit") {
		b.NewFunctionBuilder().
			WithGoModuleFunction(api.GoModuleFunc(procExit), types(i32), nil).
			Export("proc_exit")
	}
	_, err := b.Instantiate(ctx)
	return err
}

func (f function) goFunc() api.GoModuleFunc {
	return func(ctx context.Context, mod api.Module, stack []uint64) {
		p, _ := ctx.Value(processKey{}).(*Process)
		if p == nil {
			panic(sys.NewExitError(ExitKilled))
		}
		p.exitIfKilled()
		e := f.call(p, mod.Memory(), stack)
		// A call that was cut short by the kill must not return to the guest,
		// or one that retries on every error would spin between its checks.
		p.exitIfKilled()
		stack[0] = uint64(e)
	}
}

// procExit unwinds and leaves closing the instance to its owner: closing here
// would unmap memory under the guest's own frames.
func procExit(_ context.Context, _ api.Module, stack []uint64) {
	panic(sys.NewExitError(uint32(stack[0])))
}

func (p *Process) exitIfKilled() {
	select {
	case <-p.Killed:
		panic(sys.NewExitError(ExitKilled))
	default:
	}
}

func (p *Process) open(fd uint32) bool { return fd < uint32(len(p.closed)) && !p.closed[fd] }

// putSizes writes the number of values and their bytes with a NUL each.
func putSizes(m api.Memory, values []string, count, size uint32) errno {
	total := 0
	for _, v := range values {
		total += len(v) + 1
	}
	if !m.WriteUint32Le(count, uint32(len(values))) || !m.WriteUint32Le(size, uint32(total)) {
		return fault
	}
	return success
}

// putStrings writes an array of pointers to pointers and the values, each
// with a NUL, from data on.
func putStrings(m api.Memory, values []string, pointers, data uint32) errno {
	for _, v := range values {
		if !m.WriteUint32Le(pointers, data) || !m.WriteString(data, v) ||
			!m.WriteByte(data+uint32(len(v)), 0) {
			return fault
		}
		pointers += 4
		data += uint32(len(v)) + 1
	}
	return success
}

const (
	clockRealtime  = 0
	clockMonotonic = 1
)

// monotonicBase is arbitrary; guests must not learn the host's uptime.
var monotonicBase = time.Now()

func clockRes(_ *Process, m api.Memory, a []uint64) errno {
	if id := uint32(a[0]); id != clockRealtime && id != clockMonotonic {
		return inval
	}
	if !m.WriteUint64Le(uint32(a[1]), 1) {
		return fault
	}
	return success
}

func clockNow(id uint32) (uint64, bool) {
	switch id {
	case clockRealtime:
		return uint64(time.Now().UnixNano()), true
	case clockMonotonic:
		return uint64(time.Since(monotonicBase)), true
	}
	return 0, false
}

func clockTime(_ *Process, m api.Memory, a []uint64) errno {
	now, ok := clockNow(uint32(a[0]))
	if !ok {
		return inval
	}
	if !m.WriteUint64Le(uint32(a[2]), now) {
		return fault
	}
	return success
}

func fdClose(p *Process, _ api.Memory, a []uint64) errno {
	if !p.open(uint32(a[0])) {
		return badf
	}
	p.closed[uint32(a[0])] = true
	return success
}

const (
	rightRead      = 1 << 1
	rightWrite     = 1 << 6
	rightFilestat  = 1 << 21
	rightPoll      = 1 << 27
	flagAppend     = 1
	fdstatSize     = 24
	filestatSize   = 64
	filestatLinks  = 24
	fdstatFlags    = 2
	fdstatRights   = 8
	subscriptionSz = 48
	eventSz        = 32
)

// fdStat says "unknown" for the type of a stream: a terminal would make libc
// flush on every line, and preview1 has no word for a pipe.
func fdStat(p *Process, m api.Memory, a []uint64) errno {
	fd := uint32(a[0])
	if !p.open(fd) {
		return badf
	}
	b, ok := m.Read(uint32(a[1]), fdstatSize)
	if !ok {
		return fault
	}
	clear(b)
	rights := uint64(rightRead | rightFilestat | rightPoll)
	if fd != 0 {
		rights = rightWrite | rightFilestat | rightPoll
		le.PutUint16(b[fdstatFlags:], flagAppend)
	}
	le.PutUint64(b[fdstatRights:], rights)
	return success
}

// fdSetFlags accepts what changes nothing; non-blocking streams are not had.
func fdSetFlags(p *Process, _ api.Memory, a []uint64) errno {
	if !p.open(uint32(a[0])) {
		return badf
	}
	if uint32(a[1])&^flagAppend != 0 {
		return nosys
	}
	return success
}

func fdFileStat(p *Process, m api.Memory, a []uint64) errno {
	if !p.open(uint32(a[0])) {
		return badf
	}
	b, ok := m.Read(uint32(a[1]), filestatSize)
	if !ok {
		return fault
	}
	clear(b)
	le.PutUint64(b[filestatLinks:], 1)
	return success
}

// vectors calls f with each buffer of an iovec array, up to the bounds of one
// call; f says whether to go on.
func vectors(m api.Memory, at, count uint32, f func([]byte) bool) errno {
	count = min(count, maxVectors)
	table, ok := m.Read(at, count*8)
	if !ok {
		return fault
	}
	left := uint32(maxTransfer)
	for ; len(table) >= 8 && left > 0; table = table[8:] {
		size := min(le.Uint32(table[4:]), left)
		b, ok := m.Read(le.Uint32(table), size)
		if !ok {
			return fault
		}
		left -= size
		if size > 0 && !f(b) {
			break
		}
	}
	return success
}

func fdRead(p *Process, m api.Memory, a []uint64) errno {
	if uint32(a[0]) != 0 || !p.open(0) {
		return badf
	}
	var n uint32
	var failed error
	e := vectors(m, uint32(a[1]), uint32(a[2]), func(b []byte) bool {
		got, err := p.Stdin.Read(b)
		n += uint32(got)
		if err != nil && !errors.Is(err, io.EOF) {
			failed = err
		}
		// One read that may block is enough: what came is better given now.
		return err == nil && got == len(b) && p.ready()
	})
	if e != success {
		return e
	}
	if failed != nil && n == 0 {
		return eio
	}
	if !m.WriteUint32Le(uint32(a[3]), n) {
		return fault
	}
	return success
}

// ready tells whether more input is at hand without waiting.
func (p *Process) ready() bool {
	l, ok := p.Stdin.(interface{ Len() int })
	return ok && l.Len() > 0
}

func fdWrite(p *Process, m api.Memory, a []uint64) errno {
	var w io.Writer
	switch fd := uint32(a[0]); {
	case !p.open(fd) || fd == 0:
		return badf
	case fd == 1:
		w = p.Stdout
	default:
		w = p.Stderr
	}
	var n uint32
	var failed error
	e := vectors(m, uint32(a[1]), uint32(a[2]), func(b []byte) bool {
		put, err := w.Write(b)
		n += uint32(put)
		failed = err
		return err == nil
	})
	if e != success {
		return e
	}
	if failed != nil && n == 0 {
		return pipe
	}
	if !m.WriteUint32Le(uint32(a[3]), n) {
		return fault
	}
	return success
}

func randomGet(p *Process, m api.Memory, a []uint64) errno {
	b, ok := m.Read(uint32(a[0]), uint32(a[1]))
	if !ok {
		return fault
	}
	for len(b) > 0 {
		n := min(len(b), randomChunk)
		_, _ = rand.Read(b[:n]) // never fails, see crypto/rand
		b = b[n:]
		p.exitIfKilled()
	}
	return success
}

const (
	eventClock = 0
	eventRead  = 1
	eventWrite = 2
)

// pollOneoff waits for the earliest clock. Streams count as ready at once:
// they block in their read or write, which a kill ends.
func pollOneoff(p *Process, m api.Memory, a []uint64) errno {
	in, out, count, result := uint32(a[0]), uint32(a[1]), uint32(a[2]), uint32(a[3])
	if count == 0 || count > maxSubscriptions {
		return inval
	}
	src, ok := m.Read(in, count*subscriptionSz)
	if !ok {
		return fault
	}
	if _, ok := m.Read(out, count*eventSz); !ok {
		return fault
	}
	// The guest may let the arrays overlap, so decide everything first.
	type subscription struct {
		userdata uint64
		kind     byte
		errno    errno
		wait     time.Duration
	}
	subs := make([]subscription, count)
	streams := false
	earliest := time.Duration(1<<63 - 1)
	for i := range subs {
		s, b := &subs[i], src[i*subscriptionSz:]
		s.userdata, s.kind = le.Uint64(b), b[8]
		switch s.kind {
		case eventClock:
			s.wait = clockWait(le.Uint32(b[16:]), le.Uint64(b[24:]), le.Uint16(b[40:]), &s.errno)
			earliest = min(earliest, s.wait)
		case eventRead, eventWrite:
			streams = true
			if fd := le.Uint32(b[16:]); !p.open(fd) || (fd == 0) != (s.kind == eventRead) {
				s.errno = badf
			}
		default:
			return inval
		}
	}
	if !streams {
		p.sleep(earliest)
	} else {
		earliest = 0
	}
	var events uint32
	for _, s := range subs {
		if s.kind == eventClock && s.wait > earliest {
			continue
		}
		b, _ := m.Read(out+events*eventSz, eventSz)
		clear(b)
		le.PutUint64(b, s.userdata)
		le.PutUint16(b[8:], uint16(s.errno))
		b[10] = s.kind
		if s.kind != eventClock && s.errno == success {
			le.PutUint64(b[16:], 1) // bytes that can pass without blocking
		}
		events++
	}
	if !m.WriteUint32Le(result, events) {
		return fault
	}
	return success
}

// clockWait is how long until a clock subscription fires.
func clockWait(id uint32, timeout uint64, flags uint16, e *errno) time.Duration {
	now, ok := clockNow(id)
	if !ok {
		*e = inval
		return 0
	}
	const absolute = 1
	if flags&absolute != 0 {
		if timeout <= now {
			return 0
		}
		timeout -= now
	}
	return time.Duration(min(timeout, 1<<63-1))
}

// sleep waits for d or the kill.
func (p *Process) sleep(d time.Duration) {
	if d <= 0 {
		return
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-p.Killed:
	}
}
