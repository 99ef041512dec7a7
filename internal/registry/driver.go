package registry

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	storagedriver "github.com/distribution/distribution/v3/registry/storage/driver"
	"github.com/distribution/distribution/v3/registry/storage/driver/factory"
	"github.com/distribution/distribution/v3/registry/storage/driver/filesystem"
)

// durableDriver makes distribution's filesystem driver keep what it
// acknowledged through a power cut. That driver syncs file contents and the
// directory of a small file, but not the directory a blob is moved into, nor
// the parents of directories it makes: after a crash a manifest could be
// there whose blob, or whose repository, is not. It also bounds what one
// upload may grow to, whatever number of chunks it arrives in.
type durableDriver struct {
	storagedriver.StorageDriver
	root     string
	maxBytes int64

	// mu guards known: directories whose entry in their parent is synced
	// since this process started. Without it two writers could both see a
	// directory as already there while neither had synced it.
	mu    sync.Mutex
	known map[string]struct{}
}

// driverName is how distribution's configuration refers to the driver.
const driverName = "hearth-durable"

// maxKnownDirs bounds the memory of known; forgetting costs a sync each.
const maxKnownDirs = 8192

// distribution finds drivers by name only; the constructor's parameters hand
// the value through.
type driverFactory struct{}

func init() { factory.Register(driverName, driverFactory{}) }

func (driverFactory) Create(_ context.Context, params map[string]any) (storagedriver.StorageDriver, error) {
	d, ok := params["driver"].(*durableDriver)
	if !ok {
		return nil, fmt.Errorf("storage driver %s is not configured", driverName)
	}
	return d, nil
}

func newDurableDriver(root string, maxBytes int64) *durableDriver {
	return &durableDriver{
		StorageDriver: filesystem.New(filesystem.DriverParameters{RootDirectory: root, MaxThreads: 100}),
		root:          root, maxBytes: maxBytes,
		known: map[string]struct{}{filepath.Clean(root): {}},
	}
}

func (d *durableDriver) Name() string { return driverName }

// PutContent is durable when it returns: the inner driver syncs the file and
// its directory, this one the directories above.
func (d *durableDriver) PutContent(ctx context.Context, path string, content []byte) error {
	if strings.Contains(path, "/_uploads/") {
		return d.putScratch(path, content)
	}
	if err := d.StorageDriver.PutContent(ctx, path, content); err != nil {
		return err
	}
	return d.syncParents(filepath.Dir(filepath.Join(d.root, path)))
}

// putScratch writes the bookkeeping of an upload in progress (its start time,
// the state of its hash). Start removes uploads, so syncing these files, half
// of all syncs of a push, would buy nothing. They are replaced atomically all
// the same: a resumed upload reads them.
func (d *durableDriver) putScratch(path string, content []byte) error {
	full := filepath.Join(d.root, path)
	if err := os.MkdirAll(filepath.Dir(full), 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(full), "."+filepath.Base(full)+"-*.tmp")
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), full)
	}
	if err != nil {
		_ = os.Remove(f.Name())
	}
	return err
}

// Move is durable when it returns. Only the destination matters: a source
// entry that comes back after a crash is an upload that start removes.
func (d *durableDriver) Move(ctx context.Context, source, dest string) error {
	if err := d.StorageDriver.Move(ctx, source, dest); err != nil {
		return err
	}
	dir := filepath.Dir(filepath.Join(d.root, dest))
	if err := syncDir(dir); err != nil {
		return err
	}
	return d.syncParents(dir)
}

// Delete forgets directories that are gone: made again, they need a sync again.
func (d *durableDriver) Delete(ctx context.Context, path string) error {
	full := filepath.Join(d.root, path)
	d.mu.Lock()
	for k := range d.known {
		if k == full || strings.HasPrefix(k, full+string(filepath.Separator)) {
			delete(d.known, k)
		}
	}
	d.mu.Unlock()
	if err := d.StorageDriver.Delete(ctx, path); err != nil {
		return err
	}
	// Best effort: a deletion undone by a crash is repeated by the caller or
	// the next clean-up.
	_ = syncDir(filepath.Dir(full))
	return nil
}

// syncParents makes dir's name, and those of the directories above it,
// durable up to the root.
func (d *durableDriver) syncParents(dir string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.known) > maxKnownDirs {
		d.known = map[string]struct{}{filepath.Clean(d.root): {}}
	}
	for p := dir; ; p = filepath.Dir(p) {
		if _, ok := d.known[p]; ok {
			return nil
		}
		if err := syncDir(filepath.Dir(p)); err != nil {
			if os.IsNotExist(err) {
				return nil // removed meanwhile, nothing to keep
			}
			return err
		}
		d.known[p] = struct{}{}
	}
}

// Writer bounds uploads: the limit holds for the sum of all chunks.
func (d *durableDriver) Writer(ctx context.Context, path string, add bool) (storagedriver.FileWriter, error) {
	w, err := d.StorageDriver.Writer(ctx, path, add)
	if err != nil {
		return nil, err
	}
	return &boundedWriter{FileWriter: w, max: d.maxBytes}, nil
}

type boundedWriter struct {
	storagedriver.FileWriter
	max int64
}

func (w *boundedWriter) Write(p []byte) (int, error) {
	if w.Size()+int64(len(p)) > w.max {
		return 0, fmt.Errorf("%w: an upload may have at most %d bytes", ErrTooLarge, w.max)
	}
	return w.FileWriter.Write(p)
}
