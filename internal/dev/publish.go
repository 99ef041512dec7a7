package dev

import (
	"context"
	"errors"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/registry"
	"github.com/hearth-sh/hearth/internal/submit"
)

// functionsPrefix begins the repositories that Hearth publishes functions to.
// What is in them and belongs to no revision is garbage; other repositories
// are their pushers' own.
const functionsPrefix = "functions/"

// publisher lets the submit API publish to the embedded registry and fetch
// from any.
type publisher struct{ client *registry.Client }

func (p publisher) Publish(ctx context.Context, name, modulePath, digest string, meta submit.ArtifactMeta) (v1alpha1.Artifact, error) {
	artifact, err := p.client.Publish(ctx, functionsPrefix+name,
		registry.Module{Path: modulePath, Digest: digest, Size: meta.SizeBytes},
		registry.PublishOptions{Spin: registry.SpinOptions{Name: name, Executor: registry.ExecutorWAGI}})
	return artifact, publishError(err)
}

func (p publisher) Fetch(ctx context.Context, imageRef, dst string, maxBytes int64) (v1alpha1.Artifact, error) {
	artifact, _, err := p.client.Fetch(ctx, imageRef, dst, registry.PullOptions{MaxBytes: maxBytes})
	return artifact, publishError(err)
}

// publishError translates the registry's errors into what the API's problem
// table knows.
func publishError(err error) error {
	if err == nil || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
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
