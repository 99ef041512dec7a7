package registry

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/distribution/distribution/v3"
	"github.com/distribution/distribution/v3/configuration"
	"github.com/distribution/distribution/v3/registry/handlers"
	"github.com/distribution/distribution/v3/registry/storage"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/sirupsen/logrus"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

// EmbeddedOptions configure the registry that comes with Hearth.
type EmbeddedOptions struct {
	// Dir holds everything; it is created 0700 and belongs to this process alone.
	Dir string
	// MaxBlobBytes bounds one blob (default v1alpha1.MaxModuleBytes).
	MaxBlobBytes int64
	// Logger gets the registry's warnings and errors (default: none).
	Logger *slog.Logger
}

// Embedded is a distribution registry with its blobs in a directory. What it
// acknowledged survives a crash and a power cut. It has no authentication:
// whoever can reach the handler can read and write.
type Embedded struct {
	dir    string
	log    *slog.Logger
	app    *handlers.App
	driver *durableDriver
	ns     distribution.Namespace
	max    int64

	// mu keeps CollectGarbage from sweeping a blob while a request that
	// will refer to it is being served.
	mu     sync.RWMutex
	closed bool
}

// OpenEmbedded prepares the directory, removes what interrupted uploads left
// behind, and returns a registry ready to serve. The directory must not be in
// use by another process; the caller's data directory lock sees to that.
func OpenEmbedded(ctx context.Context, opts EmbeddedOptions) (e *Embedded, err error) {
	if opts.MaxBlobBytes <= 0 {
		opts.MaxBlobBytes = v1alpha1.MaxModuleBytes
	}
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	dir, err := filepath.Abs(opts.Dir)
	if err != nil {
		return nil, fmt.Errorf("open registry: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("open registry: %w", err)
	}
	if err := syncDir(filepath.Dir(dir)); err != nil {
		return nil, fmt.Errorf("open registry: %w", err)
	}
	removed, err := removeLeftovers(dir)
	if err != nil {
		return nil, fmt.Errorf("open registry: clean up after interrupted uploads: %w", err)
	}
	if removed > 0 {
		opts.Logger.InfoContext(ctx, "removed leftovers of interrupted uploads", "count", removed)
	}
	routeLogs(opts.Logger)

	var secret [32]byte
	if _, err := rand.Read(secret[:]); err != nil {
		return nil, fmt.Errorf("open registry: %w", err)
	}
	driver := newDurableDriver(dir, opts.MaxBlobBytes)
	conf := &configuration.Configuration{
		Version: configuration.CurrentVersion,
		Storage: configuration.Storage{
			driverName: configuration.Parameters{"driver": driver},
			"delete":   configuration.Parameters{"enabled": true},
			"redirect": configuration.Parameters{"disable": true},
			// Uploads are purged at start, when none can be in progress.
			"maintenance": configuration.Parameters{"uploadpurging": map[any]any{"enabled": false}},
		},
	}
	// Signs upload URLs. A new one per process is right: uploads do not
	// survive a restart.
	conf.HTTP.Secret = hex.EncodeToString(secret[:])
	// Clients reach the registry under several names, behind a proxy.
	conf.HTTP.RelativeURLs = true

	// The page size that clients ask /v2/_catalog for; without it they are refused.
	conf.Catalog.MaxEntries = 1000

	// distribution reports bad configuration by panicking.
	defer func() {
		if p := recover(); p != nil {
			e, err = nil, fmt.Errorf("open registry: %v", p)
		}
	}()
	ns, err := storage.NewRegistry(ctx, driver, storage.EnableDelete)
	if err != nil {
		return nil, fmt.Errorf("open registry: %w", err)
	}
	// The registry lives until Close, longer than the context of its start.
	app := handlers.NewApp(context.WithoutCancel(ctx), conf)
	return &Embedded{dir: dir, log: opts.Logger, app: app, driver: driver, ns: ns, max: opts.MaxBlobBytes}, nil
}

// requestSlack is what a request may carry beyond a blob's bytes.
const requestSlack = 4 << 10

// Handler serves the distribution API under /v2/. Bodies beyond the blob
// limit are refused with 413; requests that a browser sends on behalf of
// another site are refused when they would change something.
func (e *Embedded) Handler() http.Handler {
	limit := max(e.max, maxManifestBytes) + requestSlack
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength > limit {
			w.Header().Set("Content-Type", "application/json")
			w.Header().Set("Connection", "close")
			w.WriteHeader(http.StatusRequestEntityTooLarge)
			fmt.Fprintf(w, `{"errors":[{"code":"SIZE_INVALID","message":"a blob may have at most %d bytes"}]}`+"\n", e.max)
			return
		}
		e.mu.RLock()
		defer e.mu.RUnlock()
		if e.closed {
			w.Header().Set("Retry-After", "1")
			http.Error(w, `{"errors":[{"code":"UNAVAILABLE","message":"the registry is shutting down"}]}`, http.StatusServiceUnavailable)
			return
		}
		if r.Body != nil {
			r.Body = http.MaxBytesReader(w, r.Body, limit)
		}
		e.app.ServeHTTP(w, r)
	})
	return http.NewCrossOriginProtection().Handler(h)
}

// Check says whether the registry's directory can be read and written.
func (e *Embedded) Check(context.Context) error {
	f, err := os.CreateTemp(e.dir, ".check-*.tmp")
	if err != nil {
		return fmt.Errorf("the registry's directory is not writable: %w", classify(err))
	}
	err = errors.Join(f.Close(), os.Remove(f.Name()))
	if err != nil {
		return fmt.Errorf("the registry's directory is not writable: %w", err)
	}
	return nil
}

// Close waits for requests in progress and refuses later ones.
func (e *Embedded) Close() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return nil
	}
	e.closed = true
	if err := e.app.Shutdown(); err != nil {
		return fmt.Errorf("close registry: %w", err)
	}
	return nil
}

// Collected counts what a garbage collection removed.
type Collected struct {
	Manifests, Repositories int
}

// CollectGarbage deletes, from the repositories whose names begin with
// prefix, every manifest that keep does not list, then every blob nothing
// refers to any more. Other repositories keep all their manifests: they were
// put there by somebody else.
//
// Requests wait while it runs; a push of several requests that it falls into
// must be repeated. Call it at start, before the handler is served. A crash
// in the middle leaves garbage behind, never a manifest without its blobs.
func (e *Embedded) CollectGarbage(ctx context.Context, prefix string, keep []v1alpha1.Artifact) (Collected, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	kept := make(map[string]map[digest.Digest]bool)
	for _, a := range keep {
		if a.Registry != "" {
			continue
		}
		if kept[a.Repository] == nil {
			kept[a.Repository] = make(map[digest.Digest]bool)
		}
		kept[a.Repository][digest.Digest(a.Digest)] = true
	}

	var out Collected
	enum, ok := e.ns.(distribution.RepositoryEnumerator)
	if !ok {
		return out, errors.New("collect garbage: the registry cannot list its repositories")
	}
	var repos []string
	err := enum.Enumerate(ctx, func(name string) error {
		repos = append(repos, name)
		return ctx.Err()
	})
	if err != nil && !isPathNotFound(err) {
		return out, fmt.Errorf("collect garbage: list repositories: %w", err)
	}
	vacuum := storage.NewVacuum(ctx, e.driver)
	for _, repo := range repos {
		if !strings.HasPrefix(repo, prefix) {
			continue
		}
		n, empty, err := e.pruneRepository(ctx, vacuum, repo, kept[repo])
		if err != nil {
			return out, fmt.Errorf("collect garbage in %s: %w", repo, err)
		}
		out.Manifests += n
		if empty {
			if err := vacuum.RemoveRepository(repo); err != nil {
				return out, fmt.Errorf("collect garbage: remove repository %s: %w", repo, err)
			}
			out.Repositories++
		}
	}
	if err := storage.MarkAndSweep(ctx, e.driver, e.ns, storage.GCOpts{Quiet: true}); err != nil && !isPathNotFound(err) {
		return out, fmt.Errorf("collect garbage: %w", err)
	}
	return out, nil
}

// pruneRepository removes the manifests not kept; empty says none is left.
func (e *Embedded) pruneRepository(ctx context.Context, vacuum storage.Vacuum, repo string, keep map[digest.Digest]bool) (removed int, empty bool, err error) {
	named, err := reference.WithName(repo)
	if err != nil {
		return 0, false, err
	}
	r, err := e.ns.Repository(ctx, named)
	if err != nil {
		return 0, false, err
	}
	manifests, err := r.Manifests(ctx)
	if err != nil {
		return 0, false, err
	}
	enum, ok := manifests.(distribution.ManifestEnumerator)
	if !ok {
		return 0, false, errors.New("the registry cannot list manifests")
	}
	var all []digest.Digest
	if err := enum.Enumerate(ctx, func(d digest.Digest) error {
		all = append(all, d)
		return ctx.Err()
	}); err != nil && !isPathNotFound(err) {
		return 0, false, err
	}
	tags, err := r.Tags(ctx).All(ctx)
	var unknown distribution.ErrRepositoryUnknown
	if err != nil && !errors.As(err, &unknown) && !isPathNotFound(err) {
		return 0, false, err
	}
	left := 0
	for _, d := range all {
		if keep[d] {
			left++
			continue
		}
		// A tag that points here goes first: it must not be found dangling.
		for _, t := range tags {
			if desc, err := r.Tags(ctx).Get(ctx, t); err == nil && desc.Digest == d {
				if err := r.Tags(ctx).Untag(ctx, t); err != nil {
					return removed, false, err
				}
			}
		}
		if err := vacuum.RemoveManifest(repo, d, tags); err != nil {
			return removed, false, err
		}
		removed++
	}
	return removed, left == 0, nil
}

// isPathNotFound recognises distribution's "nothing there yet", which comes
// as a value type, sometimes inside text only.
func isPathNotFound(err error) bool {
	return err != nil && (strings.Contains(err.Error(), "Path not found") || errors.Is(err, fs.ErrNotExist))
}

// removeLeftovers deletes unfinished uploads and temporary files. Nothing is
// being uploaded when it runs.
func removeLeftovers(root string) (removed int, err error) {
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		}
		switch {
		case d.IsDir() && d.Name() == "_uploads":
			entries, err := os.ReadDir(path)
			if err != nil {
				return err
			}
			for _, ent := range entries {
				if err := os.RemoveAll(filepath.Join(path, ent.Name())); err != nil {
					return err
				}
				removed++
			}
			return fs.SkipDir
		case !d.IsDir() && strings.HasSuffix(d.Name(), ".tmp"):
			removed++
			return os.Remove(path)
		}
		return nil
	})
	return removed, err
}

// routeLogs sends distribution's log lines, which go to one process-wide
// logger, to log: warnings and errors as such, the rest at debug level.
func routeLogs(log *slog.Logger) {
	std := logrus.StandardLogger()
	std.SetOutput(io.Discard)
	std.SetLevel(logrus.InfoLevel)
	std.ReplaceHooks(logrus.LevelHooks{})
	std.AddHook(slogHook{log: log})
}

type slogHook struct{ log *slog.Logger }

func (slogHook) Levels() []logrus.Level { return logrus.AllLevels }

// quietFields would repeat a whole request in every line.
var shownFields = []string{"err.code", "err.message", "err.detail", "http.request.method", "http.request.uri", "vars.name", "vars.digest"}

func (h slogHook) Fire(e *logrus.Entry) error {
	level := slog.LevelDebug
	switch {
	case e.Level <= logrus.ErrorLevel:
		level = slog.LevelError
	case e.Level == logrus.WarnLevel:
		level = slog.LevelWarn
	}
	// What a client did wrong is the client's to hear, not the operator's.
	if code, ok := e.Data["err.code"]; ok && level == slog.LevelError {
		if s := fmt.Sprint(code); s != "unknown" {
			level = slog.LevelDebug
		}
	}
	ctx := e.Context
	if ctx == nil {
		ctx = context.Background()
	}
	if !h.log.Enabled(ctx, level) {
		return nil
	}
	attrs := []slog.Attr{slog.String("message", e.Message)}
	for k, v := range e.Data {
		if slices.Contains(shownFields, k) {
			attrs = append(attrs, slog.String(k, fmt.Sprint(v)))
		}
	}
	h.log.LogAttrs(ctx, level, "registry", attrs...)
	return nil
}
