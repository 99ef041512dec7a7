package bootstrap

import (
	"context"
	"errors"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
	"github.com/hearth-sh/hearth/internal/imds"
)

// What can be wrong with instance metadata.
const (
	CodeMetadataUnreachable fault.Code = "metadata-unreachable"
	CodeMetadataDisabled    fault.Code = "metadata-disabled"
	CodeMetadataVersion1    fault.Code = "metadata-version-1"
	CodeMetadataFailing     fault.Code = "metadata-failing"
	CodeMetadataMalformed   fault.Code = "metadata-malformed"
	CodeMetadataMissing     fault.Code = "metadata-missing"
)

// Snapshot is what instance metadata said, read once: everything that a run
// derives from the instance comes from here.
type Snapshot struct {
	Identity imds.Identity
	// Tags is nil where the instance does not have them in metadata.
	Tags     map[string]string
	UserData []byte
}

// Metadata is what is read of *imds.Client.
type Metadata interface {
	Identity(ctx context.Context) (imds.Identity, error)
	Tags(ctx context.Context) (map[string]string, error)
	UserData(ctx context.Context) ([]byte, error)
}

// metadataAttempt bounds one reading of everything; the phase repeats it.
const metadataAttempt = 20 * time.Second

// discover reads identity, tags and user-data at the same time.
func discover(ctx context.Context, client Metadata) (Snapshot, error) {
	ctx, cancel := context.WithTimeout(ctx, metadataAttempt)
	defer cancel()
	var s Snapshot
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() (err error) {
		s.Identity, err = client.Identity(ctx)
		return classifyMetadata(err)
	})
	group.Go(func() error {
		tags, err := client.Tags(ctx)
		if errors.Is(err, imds.ErrNoTags) {
			return nil
		}
		s.Tags = tags
		return classifyMetadata(err)
	})
	group.Go(func() (err error) {
		s.UserData, err = client.UserData(ctx)
		return classifyMetadata(err)
	})
	return s, group.Wait()
}

// classifyMetadata keeps imds's sentence, which says what to do, and adds the
// code and whether waiting helps.
func classifyMetadata(err error) error {
	if err == nil || fault.CodeOf(err) != "" {
		return err
	}
	for _, c := range []struct {
		kind    error
		code    fault.Code
		passing bool
	}{
		{imds.ErrUnreachable, CodeMetadataUnreachable, true},
		{imds.ErrUnavailable, CodeMetadataFailing, true},
		{imds.ErrDisabled, CodeMetadataDisabled, false},
		{imds.ErrVersion1, CodeMetadataVersion1, false},
		{imds.ErrMalformed, CodeMetadataMalformed, true},
		{imds.ErrNotFound, CodeMetadataMissing, true},
	} {
		if errors.Is(err, c.kind) {
			return &fault.Error{Code: c.code, Message: err.Error(), Transient: c.passing}
		}
	}
	return err
}
