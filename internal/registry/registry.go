// Package registry builds, publishes and pulls functions as OCI artifacts and
// serves the registry that comes with Hearth.
//
// It owns the artifact formats (Spin's OCI layout and the CNCF Wasm artifact),
// the client that moves them by digest, and the embedded distribution server
// with its directory on disk. It knows nothing of functions, revisions or
// nodes, never executes or parses Wasm beyond its four magic bytes, and trusts
// no registry: a name is resolved once, everything after that is verified
// against a digest while it streams.
package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
)

// Media types of the artifacts this package reads and writes. The Spin ones
// are fixed by Spin's OCI client, the CNCF ones by the Wasm OCI artifact
// layout of the CNCF TAG Runtime.
const (
	MediaTypeManifest       = "application/vnd.oci.image.manifest.v1+json"
	MediaTypeDockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	MediaTypeIndex          = "application/vnd.oci.image.index.v1+json"
	MediaTypeDockerIndex    = "application/vnd.docker.distribution.manifest.list.v2+json"
	MediaTypeImageConfig    = "application/vnd.oci.image.config.v1+json"
	MediaTypeSpinWasm       = "application/vnd.wasm.content.layer.v1+wasm"
	MediaTypeSpinData       = "application/vnd.wasm.content.layer.v1+data"
	MediaTypeSpinApp        = "application/vnd.fermyon.spin.application.v1+config"
	MediaTypeWasmConfig     = "application/vnd.wasm.config.v0+json"
	MediaTypeWasm           = "application/wasm"
)

// Errors that calls of this package wrap. Test with errors.Is; Code and
// Retryable classify the same set for reports and retry loops.
var (
	// ErrNotFound: the registry has no such repository, tag, manifest or blob.
	ErrNotFound = errors.New("not found in the registry")
	// ErrDigestMismatch: the registry sent bytes that are not those the
	// digest names, more than once.
	ErrDigestMismatch = errors.New("the registry sent bytes that do not match the digest")
	// ErrUnauthorized: the registry wants other credentials (401, 403).
	ErrUnauthorized = errors.New("the registry refused the credentials")
	// ErrRefused: the registry does not take what is pushed (400, 405, 409 and
	// the like): a policy or a quota of the registry, mostly.
	ErrRefused = errors.New("the registry refused the artifact")
	// ErrUnavailable: no connection, a stall, a cut body, or 408, 429, 5xx. Retryable.
	ErrUnavailable = errors.New("the registry is not available")
	// ErrTooLarge: a manifest or module beyond its limit.
	ErrTooLarge = errors.New("the artifact is too large")
	// ErrNotWasm: the manifest is valid but not a Wasm artifact served here.
	ErrNotWasm = errors.New("not a Wasm artifact")
	// ErrNoSpace: the local disk is full. Retryable.
	ErrNoSpace = errors.New("no space left on the local disk")
	// ErrInvalidReference: a name, repository or digest that cannot exist.
	ErrInvalidReference = errors.New("invalid artifact reference")
)

// errStalled is the cause of a transfer cancelled because no byte moved.
var errStalled = errors.New("no data moved before the progress deadline")

// Code names an error of this package for reports and metrics: a short,
// stable, kebab-case word. Unknown errors are "internal".
func Code(err error) string {
	switch {
	case err == nil:
		return ""
	case errors.Is(err, ErrNoSpace):
		return "disk-full"
	case errors.Is(err, ErrDigestMismatch):
		return "digest-mismatch"
	case errors.Is(err, ErrTooLarge):
		return "module-too-large"
	case errors.Is(err, ErrNotWasm):
		return "not-wasm"
	case errors.Is(err, ErrInvalidReference):
		return "invalid-reference"
	case errors.Is(err, ErrNotFound):
		return "artifact-not-found"
	case errors.Is(err, ErrUnauthorized):
		return "registry-unauthorized"
	case errors.Is(err, ErrRefused):
		return "registry-refused"
	case errors.Is(err, ErrUnavailable):
		return "registry-unavailable"
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return "canceled"
	default:
		return "internal"
	}
}

// Retryable says whether the same call can succeed later with nothing
// changed on our side: the registry was away, or the disk was full.
func Retryable(err error) bool {
	return errors.Is(err, ErrUnavailable) || errors.Is(err, ErrNoSpace)
}

// classify turns whatever HTTP, the registry client or the file system
// returned into one of the errors above, keeping the cause.
func classify(err error) error {
	if err == nil {
		return nil
	}
	for _, known := range []error{
		ErrNotFound, ErrDigestMismatch, ErrUnauthorized, ErrUnavailable,
		ErrTooLarge, ErrNotWasm, ErrNoSpace, ErrInvalidReference, ErrRefused,
	} {
		if errors.Is(err, known) {
			return err
		}
	}
	if errors.Is(err, errStalled) {
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%w: %w", ErrNoSpace, err)
	}
	var te *transport.Error
	if errors.As(err, &te) {
		return classifyStatus(te, err)
	}
	var ne net.Error
	if errors.As(err, &ne) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, net.ErrClosed) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) {
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return err
}

func classifyStatus(te *transport.Error, err error) error {
	for _, d := range te.Errors {
		switch d.Code {
		case transport.DigestInvalidErrorCode:
			return fmt.Errorf("%w: %w", ErrDigestMismatch, err)
		case transport.ManifestBlobUnknownErrorCode, transport.BlobUploadUnknownErrorCode:
			// A push that raced with a restart or a clean-up: the next
			// attempt uploads everything again.
			return fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
	}
	switch code := te.StatusCode; {
	case code == http.StatusUnauthorized, code == http.StatusForbidden:
		return fmt.Errorf("%w: %w", ErrUnauthorized, err)
	case code == http.StatusNotFound:
		return fmt.Errorf("%w: %w", ErrNotFound, err)
	case code == http.StatusRequestEntityTooLarge:
		return fmt.Errorf("%w: %w", ErrTooLarge, err)
	case code == http.StatusInsufficientStorage:
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	case code == http.StatusRequestTimeout, code == http.StatusTooManyRequests, code >= 500:
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return err
}

// sleep waits for d or until ctx ends, whichever is first.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}
