package machine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/hearth-sh/hearth/test/process"
)

const (
	// ext4Shutdown is EXT4_IOC_SHUTDOWN, _IOR('X', 125, __u32) in
	// include/uapi/linux/ext4.h; noLogFlush is EXT4_GOING_FLAGS_NOLOGFLUSH: the
	// file system ends here and now, and what its journal had not written is lost.
	ext4Shutdown = 0x8004587d
	noLogFlush   = 2
)

// makeDisk makes the machine's empty disk.
func (m *Machine) makeDisk(ctx context.Context) error {
	if err := os.MkdirAll(m.dir, 0o755); err != nil {
		return err
	}
	if m.spec.Disk == 0 {
		return nil
	}
	image := m.DiskImage()
	file, err := os.OpenFile(image, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	if err := errors.Join(file.Truncate(m.spec.Disk), file.Close()); err != nil {
		return err
	}
	if _, err := process.Output(ctx, "mkfs.ext4", "-q", image); err != nil {
		return fmt.Errorf("making the disk of %s: %w", m.Name, err)
	}
	return nil
}

// DiskImage is the file behind the machine's disk. After CutPower it is what
// the power left, unrecovered, until the next Boot; a copy of it can be put
// through RestoreDisk later.
func (m *Machine) DiskImage() string { return filepath.Join(m.dir, "disk.img") }

// CutPower switches the machine off as a loss of power does: at one instant
// the disk takes nothing any more (data that no fsync or writeback had brought
// there is gone, and the journal is left as it was), and every process ends.
// The machine needs a Disk. The next Boot recovers the file system.
//
// This is the kernel's own device for such tests (EXT4_IOC_SHUTDOWN without a
// flush). Copying the backing file of a file system in use would give blocks of
// different instants, which no loss of power does.
func (m *Machine) CutPower(ctx context.Context) error {
	if m.spec.Disk == 0 {
		return fmt.Errorf("%s has no disk that could lose anything: set Spec.Disk", m.Name)
	}
	m.mu.Lock()
	holder := m.holder
	m.mu.Unlock()
	if holder == nil {
		return fmt.Errorf("the power of %s is cut already", m.Name)
	}
	disk, err := os.Open(filepath.Join(fmt.Sprintf("/proc/%d/root", holder.Process.Pid), m.dir, "disk"))
	if err != nil {
		return err
	}
	flags := uint32(noLogFlush)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, disk.Fd(), ext4Shutdown, uintptr(unsafe.Pointer(&flags)))
	_ = disk.Close() // only read
	if errno != 0 {
		return fmt.Errorf("ending the file system of %s: %w", m.Name, errno)
	}
	if err := m.Kill(ctx); err != nil {
		return err
	}
	if err := m.release(ctx); err != nil {
		return err
	}
	return m.awaitDetached(ctx)
}

// awaitDetached waits until no loop device has the disk: a file system that was
// ended stays so until its last mount is gone, and the kernel takes its time.
func (m *Machine) awaitDetached(ctx context.Context) error {
	return m.WaitFor(ctx, "its disk to be free", func(ctx context.Context) (bool, error) {
		out, err := process.Output(ctx, "losetup", "--associated", m.DiskImage())
		return strings.TrimSpace(out) == "", err
	})
}

// CheckDisk checks the file system of a machine whose power was cut, on a copy
// whose journal was replayed, and returns an error for any damage.
func (m *Machine) CheckDisk(ctx context.Context) error {
	copied := filepath.Join(m.dir, fmt.Sprintf("check-%d.img", time.Now().UnixNano()))
	defer os.Remove(copied)
	if err := m.SaveDisk(ctx, copied); err != nil {
		return err
	}
	// Exit code 1 is "errors corrected", and a replayed journal is one to it.
	if out, err := process.Output(ctx, "e2fsck", "-fp", copied); err != nil && !strings.Contains(err.Error(), "exit status 1:") {
		return fmt.Errorf("the disk of %s: %w %s", m.Name, err, out)
	}
	if _, err := process.Output(ctx, "e2fsck", "-fn", copied); err != nil {
		return fmt.Errorf("the disk of %s after recovery: %w", m.Name, err)
	}
	return nil
}

// SaveDisk copies the disk of a machine that is off to a file.
func (m *Machine) SaveDisk(ctx context.Context, to string) error {
	if m.spec.Disk == 0 || m.Running() {
		return fmt.Errorf("%s must have a disk and be off for its disk to be copied", m.Name)
	}
	if err := m.release(ctx); err != nil {
		return err
	}
	if err := m.awaitDetached(ctx); err != nil {
		return err
	}
	_, err := process.Output(ctx, "cp", "--sparse=always", "--reflink=auto", m.DiskImage(), to)
	return err
}

// RestoreDisk puts a saved disk in the place of the machine's, which is off.
func (m *Machine) RestoreDisk(ctx context.Context, from string) error {
	if m.spec.Disk == 0 || m.Running() {
		return fmt.Errorf("%s must have a disk and be off for its disk to be exchanged", m.Name)
	}
	if err := m.release(ctx); err != nil {
		return err
	}
	if err := m.awaitDetached(ctx); err != nil {
		return err
	}
	_, err := process.Output(ctx, "cp", "--sparse=always", "--reflink=auto", from, m.DiskImage())
	return err
}
