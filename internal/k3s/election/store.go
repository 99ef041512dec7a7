package election

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
)

const (
	// MaxValueBytes bounds every value, whatever the store: a standard
	// parameter of AWS Systems Manager holds no more.
	MaxValueBytes = 4096
	// maxKeyBytes bounds a key and maxKeys a listing.
	maxKeyBytes = 512
	maxKeys     = 1000
	// requestTimeout bounds one request to a store.
	requestTimeout = 10 * time.Second
)

var (
	// ErrNotFound says that a key has no value, as far as the store can tell.
	ErrNotFound = errors.New("no such key")
	// ErrExists says that a key already had a value.
	ErrExists = errors.New("the key has a value already")
)

// Store keeps small values under keys, for all machines of one cluster.
//
// Keys are path-like, in lower case: segments of a-z, 0-9 and "-" joined by
// "/". No key may be a prefix segment of another ("a" beside "a/b"). Values
// have 1 to MaxValueBytes bytes. Nothing is ever removed: a key that was
// created stays, which is what fences. Methods return ErrNotFound, ErrExists,
// a *fault.Error for what only people can mend, and any other error for what
// may pass; they try once and are safe for concurrent use.
type Store interface {
	// Get returns the value of a key. It may lag behind what was written: only
	// Create decides.
	Get(ctx context.Context, key string) ([]byte, error)
	// Create stores a value under a key that has none. Of any number of calls
	// for one key, by anybody, at any time, at most one takes effect. nil says
	// that this call did. ErrExists says that the key has a value, which may be
	// this very one if the answer to an earlier attempt was lost. After any
	// other error the call may still take effect, even later.
	Create(ctx context.Context, key string, value []byte) error
	// Put stores a value whatever was there. After an error it may still take
	// effect. Only heartbeats and members are written so.
	Put(ctx context.Context, key string, value []byte) error
	// List returns the keys directly below a prefix, which ends in "/", in no
	// particular order. It may lag behind. More than 1000 are an error.
	List(ctx context.Context, prefix string) ([]string, error)
	// Location names the store for messages, such as "s3://bucket/prefix".
	Location() string
}

// Secret says whether a key's value must be encrypted and readable to few.
// It is part of the layout, so that stores and access policies agree.
func Secret(key string) bool {
	return strings.HasPrefix(key, prefixServer) || strings.HasPrefix(key, prefixAgent)
}

// OpenOptions say how a store is reached.
type OpenOptions struct {
	// AWS has region and credentials for s3:// and ssm:// locations. Retries
	// and timeouts are the election's own.
	AWS aws.Config
	// KMSKeyID encrypts secrets in place of the account's default key; empty
	// means that default.
	KMSKeyID string
	// PathStyle addresses buckets in the path of URLs, for S3 of other makers.
	PathStyle bool
}

// Open returns the store of a location:
//
//	s3://bucket/prefix   objects; the bucket must support conditional writes
//	ssm:///path          parameters of AWS Systems Manager below /path
//	file:///path         a directory, for clusters of one machine and tests
//
// Nothing is asked of it yet. Errors have the code CodeLocation.
func Open(location string, o OpenOptions) (Store, error) {
	refuse := func(format string, args ...any) error {
		return fault.New(CodeLocation, fmt.Errorf(format, args...),
			"set the cluster's store to s3://bucket/prefix, ssm:///path or file:///path", "the cluster's store %.200q cannot be used", location)
	}
	u, err := url.Parse(location)
	switch {
	case err != nil:
		return nil, refuse("it is not a URL")
	case u.RawQuery != "" || u.Fragment != "" || u.User != nil || u.Opaque != "":
		return nil, refuse("it has more than scheme, host and path")
	case path.Clean("/"+u.Path) != "/"+strings.Trim(u.Path, "/"):
		return nil, refuse("its path is not clean")
	}
	p := strings.Trim(u.Path, "/")
	switch u.Scheme {
	case "s3":
		if u.Host == "" || p == "" {
			return nil, refuse("it needs a bucket and a prefix of its own")
		}
		return newS3(u.Host, p, o), nil
	case "ssm":
		if u.Host != "" || p == "" {
			return nil, refuse("it needs three slashes and a path")
		}
		return newSSM("/"+p, o), nil
	case "file":
		if u.Host != "" || p == "" {
			return nil, refuse("it needs three slashes and a path")
		}
		return NewDirectory(filepath.FromSlash("/" + p)), nil
	}
	return nil, refuse("no such scheme as %.20q", u.Scheme)
}

// checkKey refuses what some store could not keep.
func checkKey(key string) error {
	if key == "" || len(key) > maxKeyBytes {
		return fmt.Errorf("a key of %d bytes", len(key))
	}
	for segment := range strings.SplitSeq(key, "/") {
		if segment == "" || strings.Trim(segment, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
			return fmt.Errorf("key %.100q has other segments than a-z, 0-9 and -", key)
		}
	}
	return nil
}

func checkWrite(key string, value []byte) error {
	if err := checkKey(key); err != nil {
		return err
	}
	if len(value) == 0 || len(value) > MaxValueBytes {
		return fmt.Errorf("the value of %s has %d bytes, want 1 to %d", key, len(value), MaxValueBytes)
	}
	return nil
}

func checkPrefix(prefix string) error {
	if !strings.HasSuffix(prefix, "/") {
		return fmt.Errorf("prefix %.100q does not end in /", prefix)
	}
	return checkKey(strings.TrimSuffix(prefix, "/"))
}
