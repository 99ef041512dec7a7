package artifact

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
)

const (
	bufferSize = 256 << 10
	// minBlock is what is gathered from a connection before it is handed on.
	minBlock = 64 << 10
	// blocksAhead is how many buffers a connection may be ahead of the hash
	// and the disk.
	blocksAhead = 2
	// minRate is the slowest transfer, in bytes per second over StallTimeout,
	// that does not count as stalled.
	minRate = 1 << 10
)

type buffer [bufferSize]byte

// buffers are shared by everything that copies, so that what is in use
// depends on how many downloads run and not on how large they are.
var buffers = sync.Pool{New: func() any { return new(buffer) }}

func dirOf(a *Artifact) string { return filepath.Dir(a.Path) }

// download is one artifact on its way from a mirror to its place. One
// goroutine owns it.
type download struct {
	f     *Fetcher
	state *stateDir
	a     *Artifact
	r     *Result
	t     *tracker

	record record
	// part has the bytes so far, n of them, which hash and unpack have seen.
	part   *flushingFile
	n      int64
	hash   hash.Hash
	unpack *unpacker // nil when the download is what is installed
	// most is the largest n there ever was.
	most int64
	// source says where the bytes came from; unsure that they are not all of
	// one version of one mirror seen by this process, so that when they turn
	// out to be wrong it cannot be said whose fault that is.
	source string
	unsure bool
	// head is how the bytes begin.
	head []byte
}

// install downloads one artifact and puts it in its place.
func (f *Fetcher) install(ctx context.Context, state *stateDir, a *Artifact, r *Result, t *tracker) (err error) {
	began := time.Now()
	if a.Format.zstd() {
		if err := f.zstd.Acquire(ctx, 1); err != nil {
			return timedOut(ctx, a, "waiting for its turn")
		}
		defer f.zstd.Release(1)
		r.Timing.Wait += time.Since(began)
		began = time.Now()
	}
	t.phase(PhaseDownload)
	if r.CreatedDirs, err = makeDirs(dirOf(a), 0o755); err != nil {
		return err
	}
	d := &download{f: f, state: state, a: a, r: r, t: t}
	defer func() { d.close(err) }()
	if err := d.begin(ctx); err != nil {
		return err
	}
	err = d.complete(ctx)
	r.Timing.Download = time.Since(began)
	if err != nil {
		return err
	}

	t.phase(PhaseInstall)
	began = time.Now()
	file := d.part.file
	r.Installed = d.n
	if d.unpack != nil {
		file, r.Installed = d.unpack.file, d.unpack.size
	}
	if err := checkExecutable(file, a, f.goarch); err != nil {
		return err
	}
	err = publish(file, a.Path, a.mode())
	r.Timing.Install = time.Since(began)
	if err != nil {
		return err
	}
	state.forget(a)
	return nil
}

// begin takes up what an earlier run left, or starts with nothing.
func (d *download) begin(ctx context.Context) error {
	path := d.state.partPath(d.a)
	d.record = d.state.readRecord(key(d.a))
	file, err := openPart(path)
	if err == nil {
		var info fs.FileInfo
		if info, err = file.Stat(); err == nil && (info.Size() == 0 || info.Size() > d.limit()) {
			err = fs.ErrInvalid
		}
		if err != nil {
			_ = file.Close()
		}
	}
	d.hash = sha256.New()
	if err != nil {
		d.record = record{Dir: dirOf(d.a)}
		if err := d.state.writeRecord(key(d.a), d.record); err != nil {
			return err
		}
		if file, err = createTemp(path); err != nil {
			return diskFault(err, "write to %s", filepath.Dir(path))
		}
		d.part = &flushingFile{file: file}
	} else {
		d.part = &flushingFile{file: file}
		// What a dead run left is as good as its digest says at the end.
		d.unsure, d.source = true, d.record.Source
	}
	if d.a.Size > 0 {
		if err := reserve(file, d.a.Size); err != nil {
			return diskFault(err, "reserve %s for %s in %s", megabytes(d.a.Size), d.a, filepath.Dir(path))
		}
	}
	if !d.a.Format.raw() {
		if d.unpack, err = d.f.startUnpacker(d.a); err != nil {
			return err
		}
	}
	if !d.unsure {
		return nil
	}
	began := time.Now()
	_, err = copyBuffered(ctx, writerFunc(d.see), file, func(n int64) { d.t.bytes(n, d.a.Size) })
	d.r.Timing.Hash = time.Since(began)
	if err != nil && ctx.Err() != nil {
		return timedOut(ctx, d.a, "hashing what was downloaded before")
	}
	d.r.Resumed, d.most, d.part.n, d.part.flush = d.n, d.n, d.n, d.n
	return diskFault(err, "read %s", path)
}

type writerFunc func([]byte) error

func (w writerFunc) Write(p []byte) (int, error) { return len(p), w(p) }

// limit is how many bytes the download may have.
func (d *download) limit() int64 {
	if d.a.Size > 0 {
		return d.a.Size
	}
	return d.f.o.MaxSize
}

// see takes the next bytes into account, which are in the file already.
func (d *download) see(p []byte) error {
	if len(d.head) < 512 {
		d.head = append(d.head, p[:min(len(p), 512-len(d.head))]...)
	}
	_, _ = d.hash.Write(p)
	d.n += int64(len(p))
	if d.unpack != nil {
		_, err := d.unpack.Write(p)
		return err
	}
	return nil
}

// restart throws all bytes away.
func (d *download) restart() error {
	d.n, d.head, d.unsure, d.source = 0, nil, false, ""
	d.r.Resumed = 0
	d.hash.Reset()
	file := d.part.file
	d.part = &flushingFile{file: file}
	if err := file.Truncate(0); err != nil {
		return diskFault(err, "write %s", file.Name())
	}
	if _, err := file.Seek(0, io.SeekStart); err != nil {
		return diskFault(err, "write %s", file.Name())
	}
	if d.a.Size > 0 {
		if err := reserve(file, d.a.Size); err != nil { // truncating gave it back
			return diskFault(err, "reserve %s for %s in %s", megabytes(d.a.Size), d.a, filepath.Dir(file.Name()))
		}
	}
	if d.unpack != nil {
		d.unpack.abort()
		d.unpack = nil
		var err error
		if d.unpack, err = d.f.startUnpacker(d.a); err != nil {
			return err
		}
	}
	return nil
}

// close ends the download. What it has so far is kept for the next run, but
// not where it is known to be wrong or in the way.
func (d *download) close(err error) {
	if d.unpack != nil {
		d.unpack.abort() // the file has its final name by now if all went well
	}
	if d.part == nil {
		return
	}
	code := fault.CodeOf(err)
	if err != nil && (d.n == 0 || code == CodeNoSpace || code == CodeDigestMismatch || code == CodeUnpack || code == CodePlatform) {
		_ = os.Remove(d.part.file.Name())
		_ = os.Remove(d.state.recordPath(key(d.a)))
	}
	_ = d.part.file.Close()
}

// complete gets all bytes and verifies them.
func (d *download) complete(ctx context.Context) error {
	if d.n > 0 && d.n == d.a.Size {
		switch good, err := d.verify(); {
		case good || err != nil:
			return err
		default:
			if err := d.restart(); err != nil {
				return err
			}
		}
	}
	err := d.f.mirrors(ctx, d.a.URLs, d.try, func(a Attempt) {
		if d.r.Attempts = append(d.r.Attempts, a); len(d.r.Attempts) > maxAttemptsKept {
			d.r.Attempts = slices.Delete(d.r.Attempts, 0, 1)
		}
		d.t.retry(fmt.Errorf("%s: %w", a.Mirror, a.Err))
	})
	var all *mirrorsError
	switch {
	case err == nil || isFault(err):
		return err
	case errors.As(err, &all):
		return all.classify(d.a)
	case ctx.Err() != nil:
		doing := "downloading it"
		if n := len(d.r.Attempts); n > 0 {
			doing += fmt.Sprintf(" (last, %s: %v)", d.r.Attempts[n-1].Mirror, d.r.Attempts[n-1].Err)
		}
		return timedOut(ctx, d.a, doing)
	}
	return fault.New(CodeInvalid, err, "correct its definition", "%s cannot be fetched", d.a)
}

// verify compares the digests once all bytes are there. It returns false when
// they are not those of the download, and an error when what they unpack to is
// not what it must be, which no mirror can help.
func (d *download) verify() (bool, error) {
	if Digest(d.hash.Sum(nil)) != d.a.SHA256 {
		return false, nil
	}
	if d.unpack == nil {
		return true, nil
	}
	remedy := "correct its format, member, installedSize or installedSHA256: the download is what was pinned"
	switch err := d.unpack.finish(); {
	case isFault(err):
		return false, err
	case err != nil:
		return false, fault.New(CodeUnpack, err, remedy, "%s cannot be unpacked", d.a)
	case d.unpack.sum != d.a.InstalledSHA256 || d.a.InstalledSize > 0 && d.unpack.size != d.a.InstalledSize:
		return false, fault.New(CodeUnpack, nil, remedy, "%s unpacks to %d bytes with digest %s instead of %s", d.a, d.unpack.size, d.unpack.sum, d.a.InstalledSHA256)
	}
	return true, nil
}

// try asks one mirror for what is missing.
func (d *download) try(ctx context.Context, from location) (progress, error) {
	received, most := d.r.Downloaded, d.most
	source := digestOf([]byte(from.url.String())).String()
	var err error
	for {
		if err = d.once(ctx, from, source); !errors.Is(err, errDigest) {
			break
		}
		// The mirror is to blame for bytes only that it gave itself.
		sure := !d.unsure
		if restarted := d.restart(); restarted != nil {
			err = restarted
			break
		}
		if sure {
			break
		}
	}
	return progress{bytes: d.r.Downloaded - received, advance: d.most - most}, err
}

var errDigest = errors.New("its bytes are not those pinned")

func (d *download) once(ctx context.Context, from location, source string) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	w := newWatch(d.f.o.StallTimeout, cancel)
	defer w.stop()

	d.t.mirror(from.String())
	var r *reply
	for {
		var v validator
		if d.source == source {
			v = d.record.Validator
		}
		var err error
		w.start()
		r, err = d.f.open(ctx, from, d.n, v)
		w.stop()
		if err == nil {
			break
		}
		if !errors.Is(err, errRange) {
			return err
		}
		if err := d.restart(); err != nil {
			return err
		}
	}
	defer func() { _ = r.body.Close() }()
	if err := d.acceptable(r); err != nil {
		return err
	}
	if r.offset == 0 && d.n > 0 {
		if err := d.restart(); err != nil {
			return err
		}
	}
	if d.n > 0 && (d.source != source || d.record.Validator != r.validator || r.validator == (validator{})) {
		d.unsure = true
	}
	if next := (record{Dir: dirOf(d.a), Source: source, Validator: r.validator}); next != d.record {
		d.record = next
		if err := d.state.writeRecord(key(d.a), next); err != nil {
			return err
		}
	}
	d.source, d.r.Mirror = source, from.String()
	if err := d.transfer(ctx, cancel, r, w); err != nil {
		return err
	}
	if size := max(d.a.Size, r.total); d.n < size {
		return mirrorErrorf(kindBroken, "it ended after %d of %d bytes", d.n, size)
	}
	good, err := d.verify()
	if err != nil || good {
		return err
	}
	what := "with digest " + Digest(d.hash.Sum(nil)).String()
	if looksLikePage(d.head) {
		what = "that are a web page"
	}
	return &mirrorError{kind: kindWrong, err: fmt.Errorf("%w: it served %d bytes %s instead of %s", errDigest, d.n, what, d.a.SHA256)}
}

// acceptable looks at what a mirror announces before reading it.
func (d *download) acceptable(r *reply) error {
	switch {
	case r.page && (d.a.Size == 0 || r.total != d.a.Size):
		return mirrorErrorf(kindWrong, "it served a web page, as captive portals and login pages do")
	case r.total >= 0 && d.a.Size > 0 && r.total != d.a.Size:
		return mirrorErrorf(kindWrong, "it announced %d bytes instead of %d", r.total, d.a.Size)
	case r.total > d.limit():
		return mirrorErrorf(kindWrong, "it announced %d bytes: at most %d are allowed", r.total, d.limit())
	}
	return nil
}

func looksLikePage(head []byte) bool {
	s := strings.ToLower(string(bytes.TrimLeft(head, " \t\r\n\ufeff")))
	return strings.HasPrefix(s, "<!doctype html") || strings.HasPrefix(s, "<html")
}

// block is what the reader hands to the writer.
type block struct {
	b   *buffer
	n   int
	err error
}

// transfer reads a reply to its end. A goroutine of its own reads, so that
// decrypting goes on while hashing and writing; it ends before transfer does.
func (d *download) transfer(ctx context.Context, cancel context.CancelCauseFunc, r *reply, w *watch) (err error) {
	blocks := make(chan block, blocksAhead)
	go func() {
		defer close(blocks)
		for {
			b := block{b: buffers.Get().(*buffer)}
			for b.n < minBlock && b.err == nil {
				var n int
				n, b.err = w.read(r.body, b.b[b.n:])
				b.n += n
			}
			blocks <- b
			if b.err != nil {
				return
			}
		}
	}()
	defer func() {
		cancel(context.Canceled) // has the reader end
		for b := range blocks {
			buffers.Put(b.b)
		}
	}()
	total := max(d.a.Size, r.total)
	for b := range blocks {
		err := d.take(b.b[:b.n])
		buffers.Put(b.b)
		d.t.bytes(d.n, total)
		if err != nil {
			return err
		}
		switch {
		case b.err == nil:
		case errors.Is(b.err, io.EOF):
			return nil
		case errors.Is(b.err, errStalled) || errors.Is(context.Cause(ctx), errStalled):
			return mirrorErrorf(kindBroken, "%w: less than %d bytes came in %v, after %d bytes", errStalled, w.least()+1, d.f.o.StallTimeout, d.n)
		default:
			return mirrorErrorf(kindBroken, "it broke off after %d bytes: %w", d.n, withoutURL(b.err))
		}
	}
	return nil
}

// take appends bytes that a mirror sent.
func (d *download) take(p []byte) error {
	d.r.Downloaded += int64(len(p))
	if d.n+int64(len(p)) > d.limit() {
		return mirrorErrorf(kindWrong, "it served more than %d bytes", d.limit())
	}
	if _, err := d.part.Write(p); err != nil {
		return diskFault(err, "write %s to %s", d.a, filepath.Dir(d.part.file.Name()))
	}
	err := d.see(p)
	d.most = max(d.most, d.n)
	return err
}

// watch ends a request that waits too long for its next byte, or whose bytes
// trickle. Time that we take ourselves does not count.
type watch struct {
	timeout time.Duration
	timer   *time.Timer
	spent   time.Duration
	bytes   int64
}

func newWatch(timeout time.Duration, cancel context.CancelCauseFunc) *watch {
	w := &watch{timeout: timeout, timer: time.AfterFunc(timeout, func() { cancel(errStalled) })}
	w.timer.Stop()
	return w
}

func (w *watch) start() { w.timer.Reset(w.timeout) }
func (w *watch) stop()  { w.timer.Stop() }

// least is how many bytes must come in the time.
func (w *watch) least() int64 { return int64(w.timeout.Seconds() * minRate) }

func (w *watch) read(r io.Reader, p []byte) (int, error) {
	w.start()
	began := time.Now()
	n, err := r.Read(p)
	w.stop()
	w.spent += time.Since(began)
	w.bytes += int64(n)
	if w.spent >= w.timeout {
		if err == nil && w.bytes <= w.least() {
			err = errStalled
		}
		w.spent, w.bytes = 0, 0
	}
	return n, err
}

// elfMachines are the e_machine values of executables by Go's name of the
// processor (System V ABI and its processor supplements).
var elfMachines = map[string]uint16{"amd64": 62, "arm64": 183}

// checkExecutable refuses a program for another processor, which a digest
// pinned for the wrong artifact would let through.
func checkExecutable(file *os.File, a *Artifact, goarch string) error {
	want, known := elfMachines[goarch]
	if !known || a.mode()&0o111 == 0 {
		return nil
	}
	var head [20]byte
	if _, err := file.ReadAt(head[:], 0); err != nil && !errors.Is(err, io.EOF) {
		return diskFault(err, "read %s", file.Name())
	}
	const littleEndian = 1
	if !bytes.HasPrefix(head[:], []byte("\x7fELF")) || head[5] != littleEndian {
		return nil // a script, say
	}
	if got := binary.LittleEndian.Uint16(head[18:]); got != want {
		return fault.New(CodePlatform, nil, "pin the digest of the file for this machine's processor", "%s is a program for another processor (ELF machine %d) than %s", a, got, goarch)
	}
	return nil
}
