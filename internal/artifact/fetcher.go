package artifact

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/net/http/httpproxy"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
)

const (
	// DefaultParallel is how many downloads run at once. One connection to S3
	// gives about 100 MB/s, so that several are needed to fill a link.
	DefaultParallel = 4
	// DefaultTimeout bounds one Fetch with everything in it. It suffices for
	// 1 GiB at 2 MB/s.
	DefaultTimeout = 10 * time.Minute
	// DefaultStallTimeout is how long a mirror may send next to nothing before
	// the connection is given up.
	DefaultStallTimeout = 20 * time.Second
	// DefaultAttempts is how often every mirror is tried without getting
	// further. With the waits between, that is about 20 s, in which an
	// instance that has just booted gets its routes, names and role.
	DefaultAttempts = 8
	// DefaultRetryWait is about the first wait before all mirrors are tried
	// again; it doubles up to DefaultMaxRetryWait.
	DefaultRetryWait    = 300 * time.Millisecond
	DefaultMaxRetryWait = 5 * time.Second

	// checkParallel bounds hashing what is there already. Two streams keep the
	// processors of small instances busy, and volumes that load lazily from a
	// snapshot answer several readers better than one.
	checkParallel = 4
	// lockWait is how long another run may still hold the state directory.
	lockWait = 10 * time.Second
	lockPoll = 50 * time.Millisecond
)

// Options configure a Fetcher.
type Options struct {
	// StateDir keeps unfinished downloads, the serials of manifests and the
	// lock that makes runs exclude each other. All runs of a machine must use
	// the same, since each removes what others left unfinished. It is made
	// with mode 0700 when it is missing.
	StateDir string

	// Parallel, Timeout, StallTimeout, Attempts, RetryWait and MaxRetryWait
	// are the defaults of those names when 0.
	Parallel     int
	Timeout      time.Duration
	StallTimeout time.Duration
	Attempts     int
	RetryWait    time.Duration
	MaxRetryWait time.Duration
	// MaxSize bounds downloads and installed files of unknown size, in bytes;
	// 0 means DefaultMaxSize.
	MaxSize int64

	// S3 reads objects; nil means that s3:// URLs fail.
	S3 ObjectGetter
	// AllowHTTP permits http:// to other machines. The digest still protects
	// what is fetched, but not what is asked for.
	AllowHTTP bool
	// Proxy chooses the proxy for a URL; nil means by the environment
	// (HTTPS_PROXY, HTTP_PROXY, NO_PROXY) as it is now. Link-local addresses
	// are never asked through a proxy.
	Proxy func(*url.URL) (*url.URL, error)
	// RootCAs are those that https servers are verified with; nil means the system's.
	RootCAs *x509.CertPool
	// UserAgent is sent to http servers.
	UserAgent string

	// Platform is what artifacts must be for, such as "linux/arm64"; empty
	// means this machine.
	Platform string

	// Installing is called before an artifact's download when its file is
	// missing or another: a place to note that, or to keep what is there. Its
	// error fails the artifact, which then stays as it is. It is called from
	// several goroutines at once; nil does nothing.
	Installing func(ctx context.Context, a Artifact) error

	// Progress is told how things go: on every change of phase, and about
	// bytes at most every ProgressInterval for one artifact. It is called from
	// several goroutines, one at a time, and must not block.
	Progress func(Event)
	// Logger gets what is worth noting but fails nothing; nil discards it.
	Logger *slog.Logger
}

// Fetcher installs artifacts. It may be used by several goroutines; what they
// ask for is done one after the other.
type Fetcher struct {
	o      Options
	goos   string
	goarch string
	client *http.Client
	log    *slog.Logger
	// zstd is held while decoding Zstandard: a decoder needs up to
	// maxZstdWindow of memory, and there is room for one. It is kept for the
	// rest of a Fetch, since a second one would be there before the collector
	// has freed the first.
	zstd    *semaphore.Weighted
	decoder *zstd.Decoder
	// progressMu keeps events of several artifacts from reaching Progress at once.
	progressMu sync.Mutex
}

// New returns a Fetcher. It touches nothing yet.
func New(o Options) (*Fetcher, error) {
	if !filepath.IsAbs(o.StateDir) {
		return nil, fmt.Errorf("artifact state directory %q is not an absolute path", o.StateDir)
	}
	o.StateDir = filepath.Clean(o.StateDir)
	setDefault(&o.Parallel, DefaultParallel)
	setDefault(&o.Timeout, DefaultTimeout)
	setDefault(&o.StallTimeout, DefaultStallTimeout)
	setDefault(&o.Attempts, DefaultAttempts)
	setDefault(&o.RetryWait, DefaultRetryWait)
	setDefault(&o.MaxRetryWait, DefaultMaxRetryWait)
	setDefault(&o.MaxSize, DefaultMaxSize)
	if o.Proxy == nil {
		o.Proxy = httpproxy.FromEnvironment().ProxyFunc()
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Platform == "" {
		o.Platform = runtime.GOOS + "/" + runtime.GOARCH
	}
	f := &Fetcher{o: o, log: o.Logger, zstd: semaphore.NewWeighted(1)}
	var ok bool
	if f.goos, f.goarch, ok = strings.Cut(o.Platform, "/"); !ok {
		return nil, fmt.Errorf("platform %q is not of the form \"linux/arm64\"", o.Platform)
	}
	f.client = f.newHTTPClient()
	return f, nil
}

// Close closes idle connections.
func (f *Fetcher) Close() { f.client.CloseIdleConnections() }

func setDefault[T int | int64 | time.Duration](v *T, d T) {
	if *v <= 0 {
		*v = d
	}
}

// Outcome says what Fetch did about an artifact.
type Outcome string

// The outcomes.
const (
	// OutcomePresent: the right file was there, nothing was changed.
	OutcomePresent Outcome = "present"
	// OutcomeRepaired: the right bytes were there, mode or owner were set.
	OutcomeRepaired Outcome = "repaired"
	// OutcomeInstalled: the file was installed where none was.
	OutcomeInstalled Outcome = "installed"
	// OutcomeReplaced: the file was installed in place of another.
	OutcomeReplaced Outcome = "replaced"
	// OutcomeFailed: see Result.Err.
	OutcomeFailed Outcome = "failed"
)

// Result says what became of one artifact and where the time went.
type Result struct {
	Artifact Artifact
	Outcome  Outcome
	// Err is a *fault.Error when Outcome is OutcomeFailed, else nil.
	Err error
	// CreatedDirs are the directories that were made for it, outermost first.
	CreatedDirs []string
	// Mirror is the URL that the last byte came from, without its query, or ""
	// when nothing was downloaded.
	Mirror string
	// Downloaded counts bytes received, those thrown away included; Resumed
	// those kept from an earlier run; Installed those of the installed file.
	Downloaded, Resumed, Installed int64
	// Attempts are the failed ones, at most the last 32.
	Attempts []Attempt
	Timing   Timing
}

// Attempt is a failed attempt at a mirror.
type Attempt struct {
	Mirror   string
	Err      error
	Bytes    int64
	Duration time.Duration
}

// Timing says where the time for one artifact went.
type Timing struct {
	// Check is hashing what was there.
	Check time.Duration
	// Wait is for a free slot among parallel downloads.
	Wait time.Duration
	// Download is all of the transfer with hashing, unpacking and retries; of
	// it, Hash was spent on rehashing bytes kept from an earlier run.
	Download, Hash time.Duration
	// Install is syncing to the disk and renaming.
	Install time.Duration
	Total   time.Duration
}

// Fetch makes every artifact present: those whose file is there with the right
// digest cost reading it once, which also brings it into the page cache; the
// others are downloaded in parallel and installed. It returns one result per
// artifact in their order, also when it fails. The error joins a *fault.Error
// for each failed artifact; one that fails does not stop the others, so that
// one run shows all that is wrong and the next needs only what is missing. One
// call should name all artifacts of a run, since it removes what earlier calls
// left unfinished of others.
func (f *Fetcher) Fetch(ctx context.Context, artifacts []Artifact) ([]Result, error) {
	began := time.Now()
	ctx, cancel := context.WithTimeoutCause(ctx, f.o.Timeout, errTimeout)
	defer cancel()
	results := make([]Result, len(artifacts))
	for i := range artifacts {
		results[i] = Result{Artifact: artifacts[i]}
	}
	if err := f.validate(artifacts); err != nil {
		return failAll(results, err), err
	}
	state, err := f.openState(ctx)
	if err != nil {
		return failAll(results, err), err
	}
	defer state.close()
	defer func() { f.decoder = nil }() // nobody else uses it while we hold the state

	// Whether each is there.
	checks := make([]check, len(artifacts))
	f.forEach(len(artifacts), checkParallel, func(i int) {
		t := f.track(&artifacts[i])
		t.phase(PhaseCheck)
		start := time.Now()
		checks[i] = f.check(ctx, &artifacts[i], t)
		results[i].Timing.Check = time.Since(start)
		r := &results[i]
		switch c := checks[i]; {
		case c.err != nil:
			r.fail(c.err)
		case c.state == StatePresent:
			r.Outcome, r.Installed = OutcomePresent, c.size
		case c.state == StateAttributes:
			if err := repair(&artifacts[i], c); err != nil {
				r.fail(err)
				break
			}
			r.Outcome, r.Installed = OutcomeRepaired, c.size
		}
		if r.Outcome != "" {
			r.Timing.Total = time.Since(began)
			t.end(r)
		}
	})

	var missing []int
	keep := make(map[string]bool)
	for i := range results {
		if results[i].Outcome == "" {
			missing = append(missing, i)
			keep[key(&artifacts[i])] = true
		}
	}
	state.clean(artifacts, keep)
	if err := f.checkSpace(state, artifacts, missing); err != nil {
		for _, i := range missing {
			results[i].fail(err)
		}
		return results, collect(results)
	}

	queued := time.Now()
	f.forEach(len(missing), f.o.Parallel, func(n int) {
		i := missing[n]
		r := &results[i]
		r.Timing.Wait = time.Since(queued)
		t := f.track(&artifacts[i])
		var err error
		if f.o.Installing != nil {
			err = f.o.Installing(ctx, artifacts[i])
		}
		if err == nil {
			err = f.install(ctx, state, &artifacts[i], r, t)
		}
		if err != nil {
			r.fail(err)
		} else if r.Outcome = OutcomeInstalled; checks[i].state == StateDiffers {
			r.Outcome = OutcomeReplaced
		}
		r.Timing.Total = time.Since(began)
		t.end(r)
	})
	return results, collect(results)
}

var errTimeout = errors.New("the time for all artifacts ran out")

func (r *Result) fail(err error) { r.Outcome, r.Err = OutcomeFailed, err }

func failAll(results []Result, err error) []Result {
	for i := range results {
		results[i].fail(err)
	}
	return results
}

// collect joins what failed, each cause once.
func collect(results []Result) error {
	var errs []error
	seen := make(map[error]bool)
	for i := range results {
		if err := results[i].Err; err != nil && !seen[err] {
			seen[err] = true
			errs = append(errs, err)
		}
	}
	if len(errs) == 1 {
		return errs[0]
	}
	return errors.Join(errs...)
}

// forEach runs do(0) … do(n-1), at most limit at once, and waits for all.
func (f *Fetcher) forEach(n, limit int, do func(int)) {
	var g errgroup.Group
	g.SetLimit(limit)
	for i := range n {
		g.Go(func() error { do(i); return nil })
	}
	_ = g.Wait() // do reports by other means
}

// validate refuses artifacts that cannot be meant.
func (f *Fetcher) validate(artifacts []Artifact) error {
	var errs []error
	paths := make(map[string]string, len(artifacts))
	for i := range artifacts {
		a := &artifacts[i]
		if err := a.Validate(); err != nil {
			errs = append(errs, fault.New(CodeInvalid, err, "correct its definition", "an artifact is not well defined"))
			continue
		}
		if a.OS != "" && a.OS != f.goos || a.Arch != "" && a.Arch != f.goarch {
			errs = append(errs, fault.New(CodePlatform, nil, "choose the artifact for this machine's processor, or another instance type",
				"%s is for %s/%s, but this machine is %s/%s", a, orAny(a.OS), orAny(a.Arch), f.goos, f.goarch))
		}
		if other, taken := paths[a.Path]; taken {
			errs = append(errs, fault.New(CodeInvalid, nil, "give each its own path", "artifacts %s and %s would both be installed as %s", other, a, a.Path))
		}
		paths[a.Path] = a.String()
		for _, u := range a.URLs {
			if l, err := parseLocation(u); err == nil {
				if err := f.permitted(l.url); err != nil {
					errs = append(errs, fault.New(CodeInvalid, err, "use https", "artifact %s cannot be fetched from %s", a, l))
				}
			}
		}
	}
	if len(errs) == 1 {
		return errs[0]
	}
	return errors.Join(errs...)
}

func orAny(s string) string {
	if s == "" {
		return "any"
	}
	return s
}

// checkSpace compares what is missing with what each file system has free, so
// that an instance with too small a volume says so before it downloads
// gigabytes. Space is reserved once more for each file when it is opened.
func (f *Fetcher) checkSpace(state *stateDir, artifacts []Artifact, missing []int) error {
	type need struct {
		dir   string
		bytes int64
		names []string
	}
	needs := make(map[uint64]*need)
	add := func(dir string, bytes int64, name string) {
		dir, _ = existingParent(dir)
		device, ok := deviceOf(dir)
		if !ok || bytes <= 0 {
			return
		}
		n := needs[device]
		if n == nil {
			n = &need{dir: dir}
			needs[device] = n
		}
		n.bytes += bytes
		n.names = append(n.names, name)
	}
	for _, i := range missing {
		a := &artifacts[i]
		part := state.partPath(a)
		add(filepath.Dir(part), a.Size-allocated(part), a.String())
		if !a.Format.raw() {
			add(filepath.Dir(a.Path), a.InstalledSize, a.String())
		}
	}
	for _, n := range needs {
		free, err := freeBytes(n.dir)
		if err != nil {
			continue // writing will tell
		}
		if n.bytes > free {
			return fault.New(CodeNoSpace, nil, "free space there or give the instance a larger volume, then run again",
				"%s need %s below %s, where %s are free", list(n.names), megabytes(n.bytes), n.dir, megabytes(free))
		}
	}
	return nil
}

func list(names []string) string {
	seen := make(map[string]bool)
	s := ""
	for _, n := range names {
		if seen[n] {
			continue
		}
		if seen[n] = true; s != "" {
			s += ", "
		}
		s += n
	}
	return s
}

func megabytes(n int64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }

// existingParent returns the nearest directory that exists, and those below it
// that do not, outermost first.
func existingParent(dir string) (string, []string) {
	var missing []string
	for {
		if _, err := os.Lstat(dir); !errors.Is(err, fs.ErrNotExist) || dir == "/" {
			return dir, missing
		}
		missing = append([]string{dir}, missing...)
		dir = filepath.Dir(dir)
	}
}
