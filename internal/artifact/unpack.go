package artifact

import (
	"archive/tar"
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

const (
	// maxZstdWindow bounds the memory of a decoder, in bytes. k3s packs its
	// images with a window of 2^25 (`zstd --long=25`), the largest in use.
	maxZstdWindow = 32 << 20
	// unpackBuffer is what is read at once from the download.
	unpackBuffer = 64 << 10
)

// errTooLarge says that more is unpacked than was pinned.
var errTooLarge = errors.New("it unpacks to more bytes than it may")

// unpack writes what is to be installed of a download, at most limit bytes.
// The bytes come from strangers: nothing of the result is used before the
// digests of the download and of the result both hold. It may return before
// the download has been read to its end. The decoder is for Zstandard only.
func unpack(from io.Reader, to io.Writer, format Format, member string, limit int64, decoder *zstd.Decoder) (int64, error) {
	var r io.Reader = bufio.NewReaderSize(from, unpackBuffer)
	switch format {
	case FormatGzip, FormatTarGzip:
		z, err := gzip.NewReader(r)
		if err != nil {
			return 0, fmt.Errorf("it is not in gzip's format: %w", err)
		}
		defer z.Close()
		r = z
	case FormatZstd, FormatTarZstd:
		if err := decoder.Reset(r); err != nil {
			return 0, fmt.Errorf("it is not in Zstandard's format: %w", err)
		}
		defer func() { _ = decoder.Reset(nil) }() // lets go of the reader
		r = decoder
	}
	if format.tar() {
		var err error
		if r, err = findMember(r, member); err != nil {
			return 0, err
		}
	}
	b := buffers.Get().(*buffer)
	defer buffers.Put(b)
	n, err := io.CopyBuffer(onlyWriter{to}, onlyReader{io.LimitReader(r, limit+1)}, b[:])
	if err == nil && n > limit {
		err = errTooLarge
	}
	return n, err
}

// newZstdDecoder returns a decoder that allocates one window, when it knows its
// size, and starts no goroutines.
func newZstdDecoder() (*zstd.Decoder, error) {
	return zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxZstdWindow))
}

// findMember reads a tar archive up to the content of a regular file.
func findMember(r io.Reader, member string) (io.Reader, error) {
	archive := tar.NewReader(r)
	for {
		h, err := archive.Next()
		switch {
		case errors.Is(err, io.EOF):
			return nil, fmt.Errorf("the archive has no member %q", member)
		case err != nil:
			return nil, fmt.Errorf("it is not a tar archive: %w", err)
		case cleanMember(h.Name) != cleanMember(member):
			continue
		case h.Typeflag != tar.TypeReg:
			return nil, fmt.Errorf("member %q of the archive is not a regular file", member)
		}
		return archive, nil
	}
}

// onlyWriter and onlyReader hide other methods, so that the buffer is used.
type onlyWriter struct{ io.Writer }
type onlyReader struct{ io.Reader }

// unpacker unpacks what is written to it, in a goroutine of its own that ends
// with finish or abort.
type unpacker struct {
	pipe *io.PipeWriter
	file *os.File
	done chan struct{}

	// These are set when done is closed.
	size int64
	sum  Digest
	err  error
}

// errUnpackerEnded ends writes to an unpacker that needs no more.
var errUnpackerEnded = errors.New("unpacker ended")

// startUnpacker unpacks into a new file beside the destination.
func (f *Fetcher) startUnpacker(a *Artifact) (*unpacker, error) {
	var decoder *zstd.Decoder
	if a.Format.zstd() { // and so we hold f.zstd
		if f.decoder == nil {
			var err error
			if f.decoder, err = newZstdDecoder(); err != nil {
				return nil, err
			}
		}
		decoder = f.decoder
	}
	file, err := createTemp(tempPath(a))
	if err != nil {
		return nil, diskFault(err, "write to %s", dirOf(a))
	}
	limit := f.o.MaxSize
	if a.InstalledSize > 0 {
		limit = a.InstalledSize
		if err := reserve(file, a.InstalledSize); err != nil {
			_ = file.Close()
			_ = os.Remove(file.Name())
			return nil, diskFault(err, "reserve %s for %s in %s", megabytes(a.InstalledSize), a, dirOf(a))
		}
	}
	pr, pw := io.Pipe()
	u := &unpacker{pipe: pw, file: file, done: make(chan struct{})}
	go func() {
		defer close(u.done)
		hash := sha256.New()
		out := &flushingFile{file: file}
		u.size, u.err = unpack(pr, io.MultiWriter(out, hash), a.Format, a.Member, limit, decoder)
		u.sum = Digest(hash.Sum(nil))
		if out.err != nil {
			u.err = diskFault(out.err, "write %s", a.Path)
		}
		_ = pr.CloseWithError(errUnpackerEnded)
	}()
	return u, nil
}

// Write feeds the unpacker. That it ended is no error of the download, which
// still has to be hashed to its end, unless the disk failed.
func (u *unpacker) Write(p []byte) (int, error) {
	if _, err := u.pipe.Write(p); errors.Is(err, errUnpackerEnded) {
		<-u.done
		if isFault(u.err) {
			return 0, u.err
		}
	} else if err != nil {
		return 0, err
	}
	return len(p), nil
}

// finish waits for the end of unpacking after all bytes were written.
func (u *unpacker) finish() error {
	_ = u.pipe.Close()
	<-u.done
	return u.err
}

// abort ends unpacking and removes the file.
func (u *unpacker) abort() {
	_ = u.pipe.CloseWithError(context.Canceled)
	<-u.done
	_ = u.file.Close()
	_ = os.Remove(u.file.Name())
}

// flushEvery is how many bytes are written before the disk is told to begin.
const flushEvery = 8 << 20

// flushingFile writes a file and starts its way to the disk on the fly.
type flushingFile struct {
	file     *os.File
	n, flush int64
	err      error
}

func (w *flushingFile) Write(p []byte) (int, error) {
	n, err := w.file.Write(p)
	w.n += int64(n)
	if err != nil {
		w.err = err
		return n, err
	}
	if w.n-w.flush >= flushEvery {
		startWriteback(w.file, w.flush, w.n-w.flush)
		w.flush = w.n
	}
	return n, nil
}
