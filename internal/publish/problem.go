package publish

import (
	"context"
	"errors"
	"fmt"

	"github.com/hearth-sh/hearth/internal/registry"
	"github.com/hearth-sh/hearth/internal/submit"
)

// fetchProblem translates the registry's errors into what the API's problem
// table says of images that callers name.
func fetchProblem(err error) error {
	if ended(err) {
		return err
	}
	code := registry.Code(err)
	switch code {
	case "artifact-not-found":
		code = "image-not-found"
	case "invalid-reference", "not-wasm":
		code = "image-invalid"
	case "internal":
		return err
	}
	return &submit.PublishError{Code: code, Detail: err.Error(), Retryable: registry.Retryable(err), Err: err}
}

// pushProblem translates the registry's errors into what the table says of our
// own registry. That it does not take a module is never the caller's fault.
func pushProblem(repository string, err error) error {
	detail := err.Error()
	var unmade *ensureError
	if errors.As(err, &unmade) {
		code, passing := "registry-refused", temporary(unmade.err)
		if passing {
			code = "registry-unavailable"
		}
		return &submit.PublishError{Code: code, Detail: detail, Retryable: passing, Err: err}
	}
	if ended(err) {
		return err
	}
	code := registry.Code(err)
	switch code {
	case "registry-unauthorized":
		code = "registry-refused"
		detail = "Hearth may not push to its registry; whoever runs it has to look at the credentials and the permissions of the repository " + repository + ": " + detail
	case "artifact-not-found":
		code = "registry-refused"
		detail = fmt.Sprintf("The registry has no repository %s and makes none by itself; create it, or configure a registry that does: %s", repository, detail)
	case "invalid-reference":
		code = "registry-refused"
	case "not-wasm":
		code = "image-invalid"
	case "internal":
		return err
	}
	return &submit.PublishError{Code: code, Detail: detail, Retryable: registry.Retryable(err), Err: err}
}

// ended says whether the caller's context, not the registry, ended the call.
func ended(err error) bool {
	return errors.Is(err, context.Canceled) || (errors.Is(err, context.DeadlineExceeded) && !registry.Retryable(err))
}

func temporary(err error) bool {
	var t interface{ Temporary() bool }
	return errors.As(err, &t) && t.Temporary()
}
