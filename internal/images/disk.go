package images

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// diskError is a failure to write a temporary file.
func diskError(err error, format string, args ...any) error {
	code := CodeInternal
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		code = CodeDiskFull
	}
	return fail(code, err, "could not "+format, args...)
}

// freeBytes is what unprivileged writers may still use of path's filesystem.
func freeBytes(path string) (int64, error) {
	var s syscall.Statfs_t
	if err := syscall.Statfs(path, &s); err != nil {
		return 0, fmt.Errorf("ask for the free space at %s: %w", path, err)
	}
	return int64(s.Bavail) * s.Bsize, nil
}

// room is what is free for images and for what is made of them, in bytes; -1
// where it is not known.
type room struct{ images, temporary int64 }

// needsRoom says whether a failure passes when there is more room.
func needsRoom(code string) bool { return code == CodeDiskLow || code == CodeDiskFull }

func (l *Loop) roomNow() room {
	look := func(path string) int64 {
		if path == "" {
			return -1
		}
		free, err := l.free(path)
		if err != nil {
			return -1
		}
		return free
	}
	return room{look(l.o.DiskPath), look(l.dir)}
}

// lookForRoom has images that failed for lack of room tried again as soon as
// there is more of it, and says whether there are any. Called with mu held.
func (l *Loop) lookForRoom(now time.Time) (full bool) {
	var free room
	for _, img := range l.images {
		if img.err == nil || !needsRoom(img.err.Code) {
			continue
		}
		if !full {
			full, free = true, l.roomNow()
		}
		if img.cancel == nil && (free.images-img.room.images >= roomStep || free.temporary-img.room.temporary >= roomStep) {
			img.nextTry = now
		}
	}
	return full
}

// emptyDir makes parent/name exist, private and empty.
func emptyDir(parent, name string) (string, error) {
	dir := filepath.Join(parent, name)
	if err := os.RemoveAll(dir); err != nil {
		return "", fmt.Errorf("remove temporary files of an earlier run: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("make a directory for temporary files: %w", err)
	}
	return dir, nil
}
