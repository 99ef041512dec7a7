package artifact

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
)

// ManifestSource says where a manifest comes from and which one will do.
type ManifestSource struct {
	// Name is the series that the manifest must belong to.
	Name string
	// Files are paths of local copies, such as an image has baked in. The
	// first that exists is used and nothing is downloaded. Signatures are
	// beside it, see SignatureSuffix.
	Files []string
	// URLs are mirrors like those of an Artifact; the signatures' URL is that
	// with SignatureSuffix after its path.
	URLs []string
	// SHA256 pins one manifest; zero means the newest. A pinned one that was
	// accepted before is not downloaded again.
	SHA256 Digest
	// MinSerial is the oldest serial to accept, for machines that have not
	// seen any manifest yet.
	MinSerial int64
	Trust     Trust
}

// Validate says what is wrong with the source.
func (s *ManifestSource) Validate() error {
	var errs []error
	if !nameSyntax.MatchString(s.Name) {
		errs = append(errs, fmt.Errorf("manifest name %.120q is not valid", s.Name))
	}
	if len(s.URLs)+len(s.Files) == 0 || len(s.URLs) > MaxURLs || len(s.Files) > MaxURLs {
		errs = append(errs, fmt.Errorf("a manifest needs between 1 and %d URLs or files", MaxURLs))
	}
	for _, u := range s.URLs {
		if _, err := parseLocation(u); err != nil {
			errs = append(errs, err)
		}
	}
	for _, p := range s.Files {
		if !filepath.IsAbs(p) {
			errs = append(errs, fmt.Errorf("manifest file %.100q is not an absolute path", p))
		}
	}
	if s.MinSerial < 0 {
		errs = append(errs, errors.New("the least serial of a manifest cannot be negative"))
	}
	return errors.Join(append(errs, s.Trust.Validate())...)
}

// ledger is what is remembered of a series: the newest manifest accepted.
type ledger struct {
	Serial int64  `json:"serial"`
	SHA256 Digest `json:"sha256"`
}

// maxLedgerBytes bounds a ledger's file.
const maxLedgerBytes = 4 << 10

// Manifest returns a manifest whose signatures hold and that is not older than
// any accepted on this machine before, from the local copies or else the
// mirrors. Where no mirror can be reached, the last one accepted is used. What
// it returns was recorded durably.
func (f *Fetcher) Manifest(ctx context.Context, src ManifestSource) (*Manifest, error) {
	return f.manifest(ctx, src, func() (*stateDir, error) { return f.openState(ctx) })
}

// InspectManifest returns what Manifest would and touches nothing on this
// machine: it takes no lock and records nothing.
func (f *Fetcher) InspectManifest(ctx context.Context, src ManifestSource) (*Manifest, error) {
	return f.manifest(ctx, src, func() (*stateDir, error) { return &stateDir{path: f.o.StateDir, readOnly: true}, nil })
}

func (f *Fetcher) manifest(ctx context.Context, src ManifestSource, open func() (*stateDir, error)) (*Manifest, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, f.o.Timeout, errTimeout)
	defer cancel()
	if err := src.Validate(); err != nil {
		return nil, fault.New(CodeManifestInvalid, err, "correct the configuration", "the artifact manifest's source is not well defined")
	}
	for _, u := range src.URLs {
		if l, err := parseLocation(u); err != nil || f.permitted(l.url) != nil {
			return nil, fault.New(CodeManifestInvalid, errors.Join(err, f.permitted(l.url)), "use https", "the artifact manifest cannot be fetched from %s", l)
		}
	}
	state, err := open()
	if err != nil {
		return nil, err
	}
	defer state.close()
	seen, err := state.readLedger(src.Name)
	if err != nil {
		return nil, err
	}
	for _, path := range src.Files {
		raw, err := readSmallFile(path, MaxManifestBytes)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		signatures, err2 := readSmallFile(path+SignatureSuffix, maxSignaturesBytes)
		if err := errors.Join(err, err2); err != nil {
			return nil, diskFault(err, "read the artifact manifest %s and its signatures", path)
		}
		return state.accept(raw, signatures, &src, seen)
	}
	cached := func() (*Manifest, error) {
		raw, err := readSmallFile(state.manifestPath(src.Name, seen.SHA256), MaxManifestBytes)
		if err != nil {
			return nil, err
		}
		signatures, err := readSmallFile(state.manifestPath(src.Name, seen.SHA256)+SignatureSuffix, maxSignaturesBytes)
		if err != nil {
			return nil, err
		}
		return src.open(raw, signatures, seen)
	}
	if !src.SHA256.IsZero() && src.SHA256 == seen.SHA256 {
		if m, err := cached(); err == nil {
			return m, nil
		}
	}
	if len(src.URLs) == 0 {
		return nil, fault.New(CodeManifestUnreachable, nil, "put it there or name a URL", "the artifact manifest is in none of the files it may be in")
	}

	var m *Manifest
	var last error // of what the manifest said, rather than of the connection
	err = f.mirrors(ctx, src.URLs, func(ctx context.Context, l location) (progress, error) {
		raw, signatures, err := f.readManifest(ctx, l)
		if err != nil {
			return progress{}, err
		}
		if m, err = state.accept(raw, signatures, &src, seen); err == nil {
			return progress{}, nil
		}
		if code := fault.CodeOf(err); code != CodeManifestInvalid && code != CodeManifestUntrusted && code != CodeManifestRollback {
			return progress{}, err // the disk
		}
		last = err
		return progress{}, &mirrorError{kind: kindWrong, err: err}
	}, func(a Attempt) {
		f.log.Warn("cannot get the artifact manifest", "mirror", a.Mirror, "error", a.Err)
	})
	var all *mirrorsError
	switch {
	case err == nil:
		return m, nil
	case isFault(err) && !errors.As(err, &all):
		return nil, err
	case last != nil:
		return nil, fault.New(fault.CodeOf(last), err, "see who publishes it there and with which key", "no mirror has an artifact manifest that can be used")
	}
	if ctx.Err() == nil && errors.As(err, &all) && !slices.ContainsFunc(all.kinds, func(k kind) bool { return !k.passing() }) {
		if old, cachedErr := cached(); cachedErr == nil {
			f.log.Warn("using the artifact manifest of an earlier run, since no mirror can be reached", "serial", old.Serial, "error", err)
			return old, nil
		}
	}
	return nil, fault.Passing(CodeManifestUnreachable, err, "see whether this machine may and can reach it, then run again", "the artifact manifest cannot be had")
}

// readManifest reads a manifest and its signatures from one mirror.
func (f *Fetcher) readManifest(ctx context.Context, l location) (raw, signatures []byte, err error) {
	if raw, err = f.readSmall(ctx, l, MaxManifestBytes); err != nil {
		return nil, nil, err
	}
	u := *l.url
	u.Path += SignatureSuffix
	if u.RawPath != "" {
		u.RawPath += SignatureSuffix
	}
	beside, err := parseLocation(u.String())
	if err != nil {
		return nil, nil, mirrorErrorf(kindRefused, "its signatures have no address: %w", err)
	}
	if signatures, err = f.readSmall(ctx, beside, maxSignaturesBytes); err != nil {
		var e *mirrorError
		if errors.As(err, &e) {
			err = &mirrorError{kind: e.kind, after: e.after, err: fmt.Errorf("its signatures: %w", e.err)}
		}
		return nil, nil, err
	}
	return raw, signatures, nil
}

// readSmall reads a whole document of at most limit bytes.
func (f *Fetcher) readSmall(ctx context.Context, l location, limit int64) ([]byte, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	w := newWatch(f.o.StallTimeout, cancel)
	defer w.stop()
	w.start()
	r, err := f.open(ctx, l, 0, validator{})
	w.stop()
	if err != nil {
		return nil, err
	}
	defer func() { _ = r.body.Close() }()
	if r.page {
		return nil, mirrorErrorf(kindWrong, "it served a web page, as captive portals and login pages do")
	}
	b, err := io.ReadAll(io.LimitReader(watchedReader{w, r.body}, limit+1))
	switch {
	case err != nil:
		return nil, mirrorErrorf(kindBroken, "it broke off after %d bytes: %w", len(b), withoutURL(err))
	case int64(len(b)) > limit:
		return nil, mirrorErrorf(kindWrong, "it served more than %d bytes", limit)
	case r.total >= 0 && int64(len(b)) < r.total:
		return nil, mirrorErrorf(kindBroken, "it ended after %d of %d bytes", len(b), r.total)
	}
	return b, nil
}

type watchedReader struct {
	w *watch
	r io.Reader
}

func (r watchedReader) Read(p []byte) (int, error) { return r.w.read(r.r, p) }

// open verifies a manifest and holds it against what was seen.
func (s *ManifestSource) open(raw, signatures []byte, seen ledger) (*Manifest, error) {
	m, err := OpenManifest(raw, signatures, s.Trust)
	if err != nil {
		return nil, err
	}
	sum := digestOf(raw)
	if m.Name != s.Name {
		return nil, fault.New(CodeManifestInvalid, nil, "publish the right one there", "the artifact manifest is of series %s instead of %s", m.Name, s.Name)
	}
	if !s.SHA256.IsZero() && sum != s.SHA256 {
		return nil, fault.New(CodeManifestInvalid, nil, "correct the pinned digest or publish the right one", "the artifact manifest has digest %s instead of %s", sum, s.SHA256)
	}
	rollback := func(format string, args ...any) error {
		return fault.New(CodeManifestRollback, nil, "publish it with a higher serial", format, args...)
	}
	switch {
	case m.Serial < s.MinSerial:
		return nil, rollback("the artifact manifest has serial %d: at least %d is asked for", m.Serial, s.MinSerial)
	case m.Serial < seen.Serial:
		return nil, rollback("the artifact manifest has serial %d: this machine has accepted %d before", m.Serial, seen.Serial)
	case m.Serial == seen.Serial && sum != seen.SHA256:
		return nil, rollback("the artifact manifest differs from the one with the same serial %d that this machine has accepted before", m.Serial)
	}
	return m, nil
}

// accept opens a manifest and records it durably, unless nothing may be written.
func (s *stateDir) accept(raw, signatures []byte, src *ManifestSource, seen ledger) (*Manifest, error) {
	m, err := src.open(raw, signatures, seen)
	if err != nil || s.readOnly {
		return m, err
	}
	now := ledger{Serial: m.Serial, SHA256: digestOf(raw)}
	path := s.manifestPath(m.Name, now.SHA256)
	// The copies come first: the ledger never names one that is not there.
	if old, err := readSmallFile(path, MaxManifestBytes); err != nil || digestOf(old) != now.SHA256 {
		if err := writeDurable(path, raw); err != nil {
			return nil, err
		}
	}
	if old, err := readSmallFile(path+SignatureSuffix, maxSignaturesBytes); err != nil || digestOf(old) != digestOf(signatures) {
		if err := writeDurable(path+SignatureSuffix, signatures); err != nil {
			return nil, err
		}
	}
	if now == seen {
		return m, nil
	}
	b, err := json.Marshal(now)
	if err != nil {
		return nil, err
	}
	if err := writeDurable(s.ledgerPath(m.Name), b); err != nil {
		return nil, err
	}
	if !seen.SHA256.IsZero() && seen.SHA256 != now.SHA256 {
		old := s.manifestPath(m.Name, seen.SHA256)
		if err := errors.Join(os.Remove(old), os.Remove(old+SignatureSuffix)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			s.log("cannot remove an old artifact manifest", "path", old, "error", err)
		}
	}
	return m, nil
}

func (s *stateDir) ledgerPath(name string) string {
	return filepath.Join(s.path, manifestsName, name+".ledger")
}

func (s *stateDir) manifestPath(name string, sum Digest) string {
	return filepath.Join(s.path, manifestsName, name+"-"+sum.String()+".json")
}

// readLedger returns the zero ledger when no manifest was accepted yet. One
// that cannot be read is an error: to go on would forget what was accepted.
func (s *stateDir) readLedger(name string) (ledger, error) {
	var l ledger
	path := s.ledgerPath(name)
	b, err := readSmallFile(path, maxLedgerBytes)
	if errors.Is(err, fs.ErrNotExist) {
		return l, nil
	}
	if err == nil {
		err = parseStrict(b, maxLedgerBytes, &l)
	}
	if err == nil && (l.Serial < 1 || l.SHA256.IsZero()) {
		err = errors.New("it has no serial or digest")
	}
	if err != nil {
		return l, fault.New(CodeDisk, err, "see who changed it, then remove it and give the least serial to accept in the configuration", "%s, which remembers the newest artifact manifest, cannot be read", path)
	}
	return l, nil
}
