package artifact

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
)

// The codes of failures, which never change their meaning.
const (
	// CodeInvalid: the definition of an artifact contradicts itself.
	CodeInvalid fault.Code = "artifact-invalid"
	// CodePlatform: the artifact is for another operating system or processor.
	CodePlatform fault.Code = "artifact-wrong-platform"
	// CodeUnreachable: no mirror could be talked to, or none finished.
	CodeUnreachable fault.Code = "artifact-unreachable"
	// CodeNotFound: every mirror says that it has no such file or keeps it from us.
	CodeNotFound fault.Code = "artifact-not-found"
	// CodeDigestMismatch: a mirror served other bytes than those pinned, and
	// none served the right ones.
	CodeDigestMismatch fault.Code = "artifact-digest-mismatch"
	// CodeUnpack: the download is what was pinned, but what it unpacks to is not.
	CodeUnpack fault.Code = "artifact-unpack-failed"
	// CodeNoSpace: the destination's file system is full.
	CodeNoSpace fault.Code = "artifact-no-space"
	// CodeReadOnly: the destination's file system is read-only.
	CodeReadOnly fault.Code = "artifact-read-only"
	// CodeDisk: reading or writing the destination failed otherwise.
	CodeDisk fault.Code = "artifact-disk"
	// CodeTimeout: the time for all artifacts together ran out.
	CodeTimeout fault.Code = "artifact-timeout"
	// CodeInterrupted: the run was told to end.
	CodeInterrupted fault.Code = "artifact-interrupted"
	// CodeBusy: another process is installing artifacts.
	CodeBusy fault.Code = "artifact-busy"

	// CodeManifestInvalid: the manifest's form is wrong.
	CodeManifestInvalid fault.Code = "manifest-invalid"
	// CodeManifestUntrusted: too few trusted keys signed the manifest.
	CodeManifestUntrusted fault.Code = "manifest-untrusted"
	// CodeManifestRollback: the manifest is older than one seen before.
	CodeManifestRollback fault.Code = "manifest-rollback"
	// CodeManifestUnreachable: the manifest could not be had.
	CodeManifestUnreachable fault.Code = "manifest-unreachable"
	// CodeManifestNoEntry: the manifest has no such artifact.
	CodeManifestNoEntry fault.Code = "manifest-no-entry"
)

// diskFault classifies an error of a local file; action says what was being
// done to what, such as "write /usr/local/bin/k3s".
func diskFault(err error, action string, args ...any) error {
	var known *fault.Error
	if err == nil || errors.As(err, &known) {
		return err
	}
	what := fmt.Sprintf(action, args...)
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return fault.New(CodeNoSpace, err, "free space there or give the instance a larger volume, then run again", "cannot %s", what)
	case errors.Is(err, unix.EROFS):
		return fault.New(CodeReadOnly, err, "mount it read-write or choose a destination that is writable, then run again", "cannot %s", what)
	case errors.Is(err, os.ErrPermission):
		return fault.New(CodeDisk, err, "run as root, and see whether a security module or an immutable flag forbids it", "cannot %s", what)
	case errors.Is(err, unix.EISDIR), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.EEXIST), errors.Is(err, unix.ELOOP):
		return fault.New(CodeDisk, err, "remove what is in its place, then run again", "cannot %s", what)
	}
	return fault.New(CodeDisk, err, "look for disk errors in the kernel log (dmesg), then run again", "cannot %s", what)
}
