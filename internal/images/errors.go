package images

import (
	"errors"
	"fmt"
)

// Codes of an [Error]. They are stable: status, metrics and people use them.
const (
	// CodeInvalidReference: the image's name cannot be read.
	CodeInvalidReference = "invalid-reference"
	// CodeNotFound: the registry has no such image.
	CodeNotFound = "image-not-found"
	// CodeUnauthorized: the registry refused the credentials, fresh ones too.
	CodeUnauthorized = "registry-unauthorized"
	// CodePullSecret: the registry wants what is in a pull secret of the
	// workload, and this process reads no Secrets. Not a failure: kubelet
	// reads it when a pod starts.
	CodePullSecret = "pull-secret-needed"
	// CodeRegistryUnavailable: the registry does not answer, or with errors.
	CodeRegistryUnavailable = "registry-unavailable"
	// CodeDigestMismatch: what was delivered is not what the digest says.
	CodeDigestMismatch = "digest-mismatch"
	// CodeTooLarge: the image has more bytes than this node takes.
	CodeTooLarge = "image-too-large"
	// CodeDiskLow: pulling it would leave too little room on the disk.
	CodeDiskLow = "disk-low"
	// CodeDiskFull: there was no room left in the middle of the work.
	CodeDiskFull = "disk-full"
	// CodeStalled: no byte arrived for too long.
	CodeStalled = "pull-stalled"
	// CodeUnpullable: containerd cannot make an image of what the registry
	// delivered, such as an index without this platform.
	CodeUnpullable = "image-unsupported"
	// CodeRuntimeUnavailable: containerd does not answer.
	CodeRuntimeUnavailable = "runtime-unavailable"
	// CodeCredentials: no credentials could be had for the registry.
	CodeCredentials = "credentials-unavailable"
	// CodeWarmFailed: the shim did not fill its compile cache.
	CodeWarmFailed = "warm-failed"
	// CodeCompileFailed: a module could not be compiled, for a reason that
	// may pass. One that cannot is a note, not a failure.
	CodeCompileFailed = "compile-failed"
	// CodeInternal: anything else.
	CodeInternal = "internal"
)

// knownCodes are all of the above, to bound metric labels.
var knownCodes = map[string]bool{
	CodeInvalidReference: true, CodeNotFound: true, CodeUnauthorized: true, CodePullSecret: true, CodeRegistryUnavailable: true,
	CodeDigestMismatch: true, CodeTooLarge: true, CodeDiskLow: true, CodeDiskFull: true, CodeStalled: true,
	CodeUnpullable: true, CodeRuntimeUnavailable: true, CodeCredentials: true, CodeWarmFailed: true,
	CodeCompileFailed: true, CodeInternal: true,
}

// Error is why an image is not warm.
type Error struct {
	// Code is one of the constants above.
	Code string
	// Detail is one sentence for a person.
	Detail string

	err error
}

func (e *Error) Error() string {
	if e.err != nil {
		return fmt.Sprintf("%s: %v", e.Detail, e.err)
	}
	return e.Detail
}

// Unwrap returns the cause, if there is one beyond Detail.
func (e *Error) Unwrap() error { return e.err }

// CodeOf is the code of an error of this package, [CodeInternal] for others.
func CodeOf(err error) string {
	var e *Error
	if errors.As(err, &e) {
		return e.Code
	}
	return CodeInternal
}

func fail(code string, err error, format string, args ...any) *Error {
	return &Error{Code: code, Detail: fmt.Sprintf(format, args...), err: err}
}
