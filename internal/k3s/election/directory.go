package election

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
)

// Directory is a Store in a directory of this machine, durable against power
// loss. Its files are readable to their owner only.
type Directory struct{ root string }

// NewDirectory returns the store in a directory, which is made when first
// written to.
func NewDirectory(root string) *Directory { return &Directory{root: root} }

// Location returns the directory as a URL.
func (d *Directory) Location() string { return "file://" + filepath.ToSlash(d.root) }

// Get returns the value of a key.
func (d *Directory) Get(ctx context.Context, key string) ([]byte, error) {
	if err := errors.Join(ctx.Err(), checkKey(key)); err != nil {
		return nil, err
	}
	f, err := os.Open(d.file(key))
	if err != nil {
		return nil, d.classify("read", err)
	}
	defer func() { _ = f.Close() }()
	b, err := io.ReadAll(io.LimitReader(f, MaxValueBytes+1))
	if err != nil {
		return nil, d.classify("read", err)
	}
	if len(b) > MaxValueBytes {
		return nil, fmt.Errorf("%s has more than %d bytes", d.file(key), MaxValueBytes)
	}
	return b, nil
}

// Create stores a value under a key that has none: a complete, synced file is
// linked to its name, which fails where the name exists.
func (d *Directory) Create(ctx context.Context, key string, value []byte) error {
	return d.write(ctx, key, value, func(temporary, file string) error {
		err := os.Link(temporary, file)
		return errors.Join(err, os.Remove(temporary))
	})
}

// Put stores a value whatever was there.
func (d *Directory) Put(ctx context.Context, key string, value []byte) error {
	return d.write(ctx, key, value, os.Rename)
}

func (d *Directory) write(ctx context.Context, key string, value []byte, publish func(temporary, file string) error) error {
	if err := errors.Join(ctx.Err(), checkWrite(key, value)); err != nil {
		return err
	}
	file := d.file(key)
	if err := makeDirectories(filepath.Dir(file)); err != nil {
		return d.classify("write", err)
	}
	// The dot keeps it out of listings: no key has one.
	f, err := os.CreateTemp(filepath.Dir(file), ".new-")
	if err != nil {
		return d.classify("write", err)
	}
	_, err = f.Write(value)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		_ = os.Remove(f.Name())
		return d.classify("write", err)
	}
	err = publish(f.Name(), file)
	if errors.Is(err, fs.ErrExist) {
		// The winner may not have synced the name yet; whoever acts on its
		// being there must find it there after a loss of power, too.
		if err := syncDirectory(filepath.Dir(file)); err != nil {
			return d.classify("write", err)
		}
		return ErrExists
	}
	if err != nil {
		_ = os.Remove(f.Name())
		return d.classify("write", err)
	}
	if err := syncDirectory(filepath.Dir(file)); err != nil {
		return d.classify("write", err)
	}
	return nil
}

// List returns the keys directly below a prefix.
func (d *Directory) List(ctx context.Context, prefix string) ([]string, error) {
	if err := errors.Join(ctx.Err(), checkPrefix(prefix)); err != nil {
		return nil, err
	}
	f, err := os.Open(d.file(prefix))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, d.classify("list", err)
	}
	defer func() { _ = f.Close() }()
	var keys []string
	for {
		entries, err := f.ReadDir(maxKeys)
		for _, e := range entries {
			if e.Type().IsRegular() && !strings.HasPrefix(e.Name(), ".") {
				keys = append(keys, prefix+e.Name())
			}
		}
		if len(keys) > maxKeys {
			return nil, fmt.Errorf("more than %d keys below %s", maxKeys, prefix)
		}
		if errors.Is(err, io.EOF) {
			return keys, nil
		}
		if err != nil {
			return nil, d.classify("list", err)
		}
	}
}

func (d *Directory) file(key string) string { return filepath.Join(d.root, filepath.FromSlash(key)) }

func (d *Directory) classify(action string, err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return ErrNotFound
	case errors.Is(err, fs.ErrPermission):
		return fault.New(CodeDenied, err, "run as root, or give this user the directory", "the cluster's store %s cannot be used", d.root)
	}
	return fmt.Errorf("%s the cluster's store: %w", action, err)
}

// makeDirectories makes a directory and those above it, durably.
func makeDirectories(dir string) error {
	if info, err := os.Stat(dir); err == nil {
		if !info.IsDir() {
			return fmt.Errorf("%s is not a directory", dir)
		}
		return nil
	}
	parent := filepath.Dir(dir)
	if parent == dir {
		return fmt.Errorf("%s is missing", dir)
	}
	if err := makeDirectories(parent); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return syncDirectory(parent)
}

func syncDirectory(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
