package artifact

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
)

// Measure reads a download to its end and sets SHA256, Size, InstalledSHA256
// and InstalledSize of the artifact from it, as Format and Member say. It is
// for whoever writes manifests; the bytes must come from a source that is
// trusted for other reasons.
func (a *Artifact) Measure(ctx context.Context, from io.Reader) error {
	if !a.Format.known() || a.Format.tar() != (a.Member != "") {
		return fmt.Errorf("measure %s: format %q and member %q do not fit", a, a.Format, a.Member)
	}
	decoder, err := newZstdDecoder()
	if err != nil {
		return fmt.Errorf("measure %s: %w", a, err)
	}
	defer decoder.Close()
	download, installed := newMeter(), newMeter()
	if a.Format.raw() {
		installed = download
	} else if _, err := unpack(io.TeeReader(contextReader{ctx, from}, download), installed, a.Format, a.Member, DefaultMaxSize, decoder); err != nil {
		return fmt.Errorf("measure %s: %w", a, err)
	}
	if _, err := copyBuffered(ctx, download, from, nil); err != nil {
		return fmt.Errorf("measure %s: %w", a, err)
	}
	if download.n == 0 || download.n > DefaultMaxSize {
		return fmt.Errorf("measure %s: %w", a, errors.New("it is empty or larger than any download may be"))
	}
	a.SHA256, a.Size, a.InstalledSHA256, a.InstalledSize = download.sum(), download.n, Digest{}, 0
	if !a.Format.raw() {
		a.InstalledSHA256, a.InstalledSize = installed.sum(), installed.n
	}
	return nil
}

// meter hashes and counts what is written to it.
type meter struct {
	hash io.Writer
	sum  func() Digest
	n    int64
}

func newMeter() *meter {
	h := sha256.New()
	return &meter{hash: h, sum: func() Digest { return Digest(h.Sum(nil)) }}
}

func (m *meter) Write(p []byte) (int, error) {
	m.n += int64(len(p))
	return m.hash.Write(p)
}

// contextReader ends with its context.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (r contextReader) Read(p []byte) (int, error) {
	if err := context.Cause(r.ctx); err != nil {
		return 0, err
	}
	return r.r.Read(p)
}
