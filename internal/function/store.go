package function

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

// Limits of the durable record.
const (
	// MaxRevisions is how many revisions of one function are kept. The
	// wanted, the active and the last active one are never dropped.
	MaxRevisions = 50
	// KeepArtifacts is how many older revisions stay compiled on a node, so
	// that rolling back to one of them takes one request.
	KeepArtifacts = 5
	// IdempotencyExpiry is how long an Idempotency-Key is remembered.
	IdempotencyExpiry = 24 * time.Hour
)

// Revision is one immutable revision of a function: module, settings and
// number never change. What a node says of it does.
//
// Maps and slices in a Revision are shared with the store: read only.
type Revision struct {
	// Number starts at 1 and is never used twice under one name, not even
	// after the function was deleted and submitted again: everything
	// downstream may take name and number as the identity of content.
	Number int
	// ModuleDigest is "sha256:<hex>" of the module as it was uploaded.
	ModuleDigest string
	SizeBytes    int64
	// MemoryMinPages is the memory, in pages of 64 KiB, that the module cannot
	// start without.
	MemoryMinPages uint32
	Artifact       v1alpha1.Artifact
	Settings       Settings
	CreatedAt      time.Time
	// Phases are the API's own steps, NodePhases the node's.
	Phases     []v1alpha1.Phase
	NodePhases []v1alpha1.Phase
	State      v1alpha1.FunctionState
	// Error says why State is failed, or, with Retrying, what is in the way
	// while State is pending.
	Error    *v1alpha1.FunctionError
	Retrying bool
	// ActivatedAt is when the revision last began to answer requests; zero: never.
	ActivatedAt time.Time
}

// Function is a function with its wanted revision.
type Function struct {
	Name      string
	Tenant    string
	CreatedAt time.Time
	// UpdatedAt is the time of the last change of what is wanted.
	UpdatedAt time.Time
	// Wanted is the revision that should answer requests, Active the one that
	// does (0: none), LastActive the one that did last (0: none ever).
	Wanted, Active, LastActive int
	// Warm says on how many of the nodes that should have the function it
	// answers without compiling, such as 2/3; empty where there is one node.
	Warm string
	// Revision is the wanted revision.
	Revision Revision
	// ETag identifies this state as a strong entity tag (RFC 9110, 8.8.3),
	// quotes included. It changes with everything a client can see.
	ETag string
}

// NewRevision is what a caller adds; the store numbers it.
type NewRevision struct {
	ModuleDigest   string
	SizeBytes      int64
	MemoryMinPages uint32
	Artifact       v1alpha1.Artifact
	// Settings must be valid (Settings.Validate).
	Settings Settings
	Phases   []v1alpha1.Phase
}

// Precondition is checked in the same transaction as the change. The zero
// value always holds.
type Precondition struct {
	// IfMatch lists entity tags with their quotes, one of which must name the
	// function's configuration as it is now; "*" matches any existing function.
	// Tags are compared by configuration only: a node's report in between
	// changes the tag a reader sees, but it cannot be overwritten by a writer.
	IfMatch []string
	// IfNoneMatchAny holds when the function does not exist yet.
	IfNoneMatchAny bool
}

// Change is what every change of a function has in common.
type Change struct {
	// Tenant must own the function or be the first to claim the name. Empty:
	// the owner, or v1alpha1.DefaultTenant for a new name.
	Tenant       string
	Precondition Precondition
	// IdempotencyKey, when set, must have been begun. That the change
	// happened is recorded under it in the same transaction.
	IdempotencyKey string
}

// Admits says whether the change may be made to the function as it is (nil: it
// does not exist): nil, ErrTaken or ErrPrecondition. A store decides with it
// in the transaction; others can find out early what is bound to be refused.
func (c Change) Admits(name string, f *Function) error {
	if f != nil && c.Tenant != "" && c.Tenant != f.Tenant {
		return fmt.Errorf("%w: %s", ErrTaken, name)
	}
	if f != nil && c.Precondition.IfNoneMatchAny {
		return fmt.Errorf("%w: %s exists already", ErrPrecondition, name)
	}
	tags := c.Precondition.IfMatch
	if len(tags) == 0 {
		return nil
	}
	if f == nil || !slices.ContainsFunc(tags, func(tag string) bool {
		return tag == "*" || configPart(tag) != "" && configPart(tag) == configPart(f.ETag)
	}) {
		return fmt.Errorf("%w: %s was changed since, or does not exist", ErrPrecondition, name)
	}
	return nil
}

// Result is what a change came to.
type Result struct {
	Function Function
	// Created: the function did not exist before.
	Created bool
	// Unchanged: what was asked for was already so; nothing was written.
	Unchanged bool
}

// ListOptions selects a page of functions, ordered by name.
type ListOptions struct {
	// Tenant, when set, is the only one listed.
	Tenant string
	// After is the name after which the page begins.
	After string
	// Limit bounds the page; 0 means all.
	Limit int
}

// Page is a page of functions. Next is the After of the following page,
// empty on the last one.
type Page struct {
	Items []Function
	Next  string
}

// PageOf returns the page that o selects. names are those of all functions,
// sorted, and get returns the function of one of them.
func PageOf(names []string, o ListOptions, get func(name string) *Function) Page {
	var p Page
	first := 0
	if o.After != "" {
		var found bool
		if first, found = slices.BinarySearch(names, o.After); found {
			first++
		}
	}
	for _, name := range names[first:] {
		f := get(name)
		if o.Tenant != "" && f.Tenant != o.Tenant {
			continue
		}
		if o.Limit > 0 && len(p.Items) == o.Limit {
			p.Next = p.Items[len(p.Items)-1].Name
			break
		}
		p.Items = append(p.Items, *f)
	}
	return p
}

// Stats are counts for metrics.
type Stats struct {
	ByState map[v1alpha1.FunctionState]int
}

// Reader reads functions. All methods are cheap and return consistent,
// current state.
type Reader interface {
	// Get returns the function or ErrNotFound.
	Get(ctx context.Context, name string) (Function, error)
	List(ctx context.Context, o ListOptions) (Page, error)
	// Revisions returns all kept revisions, newest first, or ErrNotFound.
	Revisions(ctx context.Context, name string) ([]Revision, error)
	// Watch waits until the function's ETag is not etag and returns it, or
	// ErrNotFound once it is deleted, or the context's error.
	Watch(ctx context.Context, name, etag string) (Function, error)
	Stats(ctx context.Context) (Stats, error)
}

// Writer changes what is wanted. A change that returned without error is
// durable; one that failed changed nothing.
type Writer interface {
	// AddRevision adds the revision that build returns and makes it the
	// wanted one. build gets the function as it is (nil: it does not exist),
	// within the transaction, so that settings can be carried over without
	// losing another writer's; it must be quick and may be called again. Its
	// error is returned as it is. A revision with the wanted one's module and
	// settings is not added again, unless that one failed.
	AddRevision(ctx context.Context, name string, c Change, build func(current *Function) (NewRevision, error)) (Result, error)
	// Rollback makes an existing revision the wanted one; to 0 means the
	// newest older than the wanted one that has been active.
	Rollback(ctx context.Context, name string, to int, c Change) (Result, error)
	// Delete forgets the function and all its revisions.
	Delete(ctx context.Context, name string, c Change) error
}

// NodeSource is the node's side: what to run and how far it is.
type NodeSource interface {
	// Desired waits until the generation is not after, then returns the
	// snapshot, which the caller must not modify. When the context ends
	// first, its error is returned.
	Desired(ctx context.Context, after uint64) (v1alpha1.Desired, error)
	// SetProgress takes in a node's complete report. It is made durable only
	// where it changes a state or the active revision; parts that speak of
	// functions or revisions no longer known are passed over.
	SetProgress(ctx context.Context, r v1alpha1.NodeReport) error
}

// IdempotencyState says what Begin found under a key.
type IdempotencyState int

// What Begin can find.
const (
	// IdempotencyNew: the caller holds the key now and must end with Complete
	// or Release.
	IdempotencyNew IdempotencyState = iota
	// IdempotencyResume: the caller holds the key now, and the change was
	// made before by a request that never got to its answer.
	IdempotencyResume
	// IdempotencyReplay: the request was answered before.
	IdempotencyReplay
	// IdempotencyInFlight: the request is being worked on right now.
	IdempotencyInFlight
	// IdempotencyMismatch: the key was used for a different request.
	IdempotencyMismatch
)

// Response is a stored answer. It must not contain secrets.
type Response struct {
	Status int               `json:"status"`
	Header map[string]string `json:"header,omitempty"`
	Body   []byte            `json:"body,omitempty"`
}

// Outcome is the change a request made before it was interrupted.
type Outcome struct {
	Name     string `json:"name"`
	Revision int    `json:"revision,omitempty"`
	Created  bool   `json:"created,omitempty"`
	Deleted  bool   `json:"deleted,omitempty"`
}

// Begun is what Begin found. Response is set for IdempotencyReplay, Outcome
// for IdempotencyResume.
type Begun struct {
	State    IdempotencyState
	Response *Response
	Outcome  *Outcome
}

// Idempotency remembers which requests were made and what was answered.
type Idempotency interface {
	// Begin claims key for the request that fingerprint identifies. Keys held
	// by a process that ended are taken over.
	Begin(ctx context.Context, key, fingerprint string) (Begun, error)
	// Complete stores the answer for IdempotencyExpiry.
	Complete(ctx context.Context, key string, r Response) error
	// Release lets the key go without an answer: it is forgotten, or, when a
	// change was recorded under it, the next Begin resumes from there.
	Release(ctx context.Context, key string) error
}

// Store is the durable record of functions. Implementations are safe for
// concurrent use and pass the suite of package storetest.
type Store interface {
	Reader
	Writer
	NodeSource
	Idempotency
	Close() error
}
