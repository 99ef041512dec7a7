package function

import (
	"errors"
	"fmt"
	"io/fs"
	"syscall"

	berrors "go.etcd.io/bbolt/errors"
)

// What a Store refuses. All are matched with errors.Is.
var (
	// ErrNotFound: no function has that name.
	ErrNotFound = errors.New("no such function")
	// ErrRevisionNotFound: the function has no revision of that number (any
	// more: see MaxRevisions).
	ErrRevisionNotFound = errors.New("no such revision")
	// ErrTaken: the name belongs to another tenant.
	ErrTaken = errors.New("the name is taken by another tenant")
	// ErrPrecondition: If-Match or If-None-Match did not hold.
	ErrPrecondition = errors.New("the function is not in the state the request expects")
	// ErrHostTaken: the additional DNS name, or a path of it, belongs to
	// another function.
	ErrHostTaken = errors.New("the host is taken by another function")
	// ErrTenantNotFound: the tenant has no namespace in the cluster, or it is
	// being deleted.
	ErrTenantNotFound = errors.New("the tenant has no namespace")
	// ErrUnavailable: what holds the durable record does not answer, or did so
	// too late. The same request can succeed later; whether it did already is
	// known only when it is made again with the same Idempotency-Key.
	ErrUnavailable = errors.New("the record of functions is not available")
	// ErrCRDMissing: the cluster does not know the custom resources.
	ErrCRDMissing = errors.New("the cluster lacks a custom resource of Hearth")
	// ErrNoRollbackTarget: no older revision has ever answered requests.
	ErrNoRollbackTarget = errors.New("no older revision has ever been active")

	// ErrClosed: the store was closed.
	ErrClosed = errors.New("the function database is closed")
	// ErrLocked: another process has the database open.
	ErrLocked = errors.New("the function database is in use by another process")
	// ErrCorrupt: the database file cannot be read as one.
	ErrCorrupt = errors.New("the function database is damaged")
	// ErrFormat: the file was written by a later version of Hearth.
	ErrFormat = errors.New("the function database was written by a later version")
	// ErrReadOnly: the file or its file system cannot be written.
	ErrReadOnly = errors.New("the function database cannot be written")
	// ErrDiskFull: no room for the write. Nothing was changed; the same
	// request can succeed later.
	ErrDiskFull = errors.New("no space left for the function database")
)

// ValidationError is a value from outside that breaks a rule. It never
// carries the value of an environment variable or secret.
type ValidationError struct {
	// Field is the member's name as the API spells it, e.g. "memoryMiB" or "env.PATH".
	Field string
	// Reason completes the sentence "<field> …".
	Reason string
}

func (e *ValidationError) Error() string { return e.Field + " " + e.Reason }

// storeError puts what was being done and the typed cause in front of what
// the operating system or bbolt said.
func storeError(doing string, err error) error {
	if err == nil {
		return nil
	}
	var kind error
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT), errors.Is(err, syscall.EFBIG),
		errors.Is(err, berrors.ErrMaxSizeReached):
		kind = ErrDiskFull
	case errors.Is(err, berrors.ErrTimeout):
		kind = ErrLocked
	case errors.Is(err, berrors.ErrInvalid), errors.Is(err, berrors.ErrChecksum), errors.Is(err, berrors.ErrVersionMismatch):
		kind = ErrCorrupt
	case errors.Is(err, syscall.EROFS), errors.Is(err, fs.ErrPermission), errors.Is(err, berrors.ErrDatabaseReadOnly):
		kind = ErrReadOnly
	case errors.Is(err, berrors.ErrDatabaseNotOpen):
		kind = ErrClosed
	default:
		return fmt.Errorf("%s: %w", doing, err)
	}
	return fmt.Errorf("%s: %w: %w", doing, kind, err)
}
