package artifact

import (
	"errors"
	"math"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// reserve has the file system set aside space for a file of that size without
// changing how long it is, so that a full disk shows at once. File systems
// that cannot do it say nothing.
func reserve(file *os.File, size int64) error {
	for {
		err := unix.Fallocate(int(file.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, size)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOSYS):
			return nil
		}
		return err
	}
}

// startWriteback begins to write a range to the disk without waiting, so that
// the last sync has little left to do and gigabytes of dirty pages do not
// gather.
func startWriteback(file *os.File, from, n int64) {
	_ = unix.SyncFileRange(int(file.Fd()), from, n, unix.SYNC_FILE_RANGE_WRITE) // a hint
}

// willNeed has the kernel read a whole file ahead with many requests at once.
// Volumes that load lazily from a snapshot have a high latency for each.
func willNeed(file *os.File, size int64) {
	_ = unix.Fadvise(int(file.Fd()), 0, size, unix.FADV_WILLNEED) // a hint
}

// freeBytes is what an account like ours may still write below dir.
func freeBytes(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, err
	}
	blocks := st.Bavail
	if os.Geteuid() == 0 {
		blocks = st.Bfree // what file systems keep for root
	}
	size := uint64(max(st.Bsize, 1))
	if blocks > math.MaxInt64/size {
		return math.MaxInt64, nil
	}
	return int64(blocks * size), nil
}

func deviceOf(path string) (uint64, bool) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, false
	}
	return st.Dev, true
}

// allocated is the space that a file takes on its disk already.
func allocated(path string) int64 {
	info, err := os.Lstat(path)
	if err != nil {
		return 0
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 0
	}
	return st.Blocks * 512 // the unit of st_blocks whatever the file system
}
