package submit

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/function"
)

// CheckReport is what is known of a module that passed the check.
type CheckReport struct {
	// Kind of module, e.g. "module".
	Kind string
	// Digest is "sha256:<hex>" of the module's bytes; empty: not computed.
	Digest string
	// MemoryMinPages is the module's minimum memory in pages of 64 KiB.
	MemoryMinPages uint32
}

// Checker looks at a module before anything is recorded.
type Checker interface {
	// Check reads the module at path. An error that is a *CheckError is the
	// module's fault or names a passing trouble; any other is ours.
	Check(ctx context.Context, path string, memoryMiB int) (CheckReport, error)
}

// CheckError is why a module was not accepted. Code is one of the problem
// codes of this package's table (see Problems); an unknown one is answered as
// an internal error.
type CheckError struct {
	Code      string
	Detail    string
	Retryable bool
}

func (e *CheckError) Error() string { return e.Code + ": " + e.Detail }

// ArtifactMeta goes into the published artifact.
type ArtifactMeta struct {
	// SizeBytes of the module.
	SizeBytes int64
	// Kind as the checker reported it.
	Kind string
	// Application is what the artifact says of the function's environment.
	Application Application
}

// Application is what an artifact tells Spin of a function's environment; the
// zero value, which all but spin functions have, is nothing. It has no secret's
// value: whoever may read the registry reads artifacts.
type Application struct {
	// Env are environment variables with their values.
	Env map[string]string
	// Secrets are names of those that are given at run time, sorted.
	Secrets []string
}

// applicationOf is the Application of a function with these settings.
func applicationOf(s function.Settings) Application {
	if !s.Spin() {
		return Application{}
	}
	return Application{Env: s.Env, Secrets: s.Secrets.Names()}
}

// Equal says whether both make the same artifact.
func (a Application) Equal(b Application) bool {
	return maps.Equal(a.Env, b.Env) && slices.Equal(a.Secrets, b.Secrets)
}

// Publisher puts modules into the registry and gets them from one.
type Publisher interface {
	// Publish returns once the artifact is durable in the registry. digest is
	// "sha256:<hex>" of the module's bytes.
	Publish(ctx context.Context, name, modulePath, digest string, meta ArtifactMeta) (v1alpha1.Artifact, error)
	// Fetch resolves an OCI reference to a digest and writes the artifact's
	// one Wasm layer, at most maxBytes of it, to dst, which exists and is
	// empty. Errors of both may be a *PublishError.
	Fetch(ctx context.Context, imageRef, dst string, maxBytes int64) (v1alpha1.Artifact, error)
}

// TenantPublisher is a Publisher that keeps tenants apart: each has
// repositories of its own, and none can have another's fetched for it. A Server
// uses these methods in place of Publisher's where a publisher has them.
type TenantPublisher interface {
	Publisher
	PublishFor(ctx context.Context, tenant, name, modulePath, digest string, meta ArtifactMeta) (v1alpha1.Artifact, error)
	FetchFor(ctx context.Context, tenant, imageRef, dst string, maxBytes int64) (v1alpha1.Artifact, error)
}

// Configurer is a Publisher that can publish what it has published before with
// another Application. A Server that runs spin functions uses it when settings
// change and the module does not.
type Configurer interface {
	Publisher
	// Configure returns the artifact of the tenant's function with the
	// Application app in place of was. The module, its digest and size are those
	// that from was published with; its bytes are not sent again. An artifact
	// that somebody else made comes back as it is.
	Configure(ctx context.Context, tenant, name string, from v1alpha1.Artifact, module string, size int64, was, app Application) (v1alpha1.Artifact, error)
}

// Inspector is a Publisher that can say of an image whether a tenant may run it,
// and how large it is, without fetching it.
type Inspector interface {
	Publisher
	// Inspect returns the size of the image's module in bytes; for a spin
	// function, whose application may have several, that of all layers. size is
	// what is known of it already, 0 for nothing. Errors may be a *PublishError,
	// which is ErrImageOfAnother for what another tenant has published.
	Inspect(ctx context.Context, tenant string, a v1alpha1.Artifact, spin bool, size int64) (int64, error)
}

// ErrImageOfAnother says that an image is another tenant's.
var ErrImageOfAnother = errors.New("the image is another tenant's")

// PublishError is why a registry did not do as asked. Codes: those of the
// problem table, foremost registry-unavailable, registry-unauthorized,
// image-not-found, image-invalid, digest-mismatch, module-too-large, disk-full.
type PublishError struct {
	Code      string
	Detail    string
	Retryable bool
	Err       error
}

func (e *PublishError) Error() string {
	if e.Err == nil {
		return e.Code + ": " + e.Detail
	}
	return fmt.Sprintf("%s: %s: %v", e.Code, e.Detail, e.Err)
}

// Unwrap returns the cause.
func (e *PublishError) Unwrap() error { return e.Err }

// LogSource has the logs of functions.
type LogSource interface {
	// Logs returns v1alpha1.LogLine documents, one a line. tail is the number
	// of past lines (0: none), since, when set, leaves out older ones. With
	// follow it ends with the context only.
	Logs(ctx context.Context, function string, follow bool, tail int, since time.Time) (io.ReadCloser, error)
}

// Check is one line of the readiness answer.
type Check struct {
	Name string `json:"name"`
	OK   bool   `json:"ok"`
	// Message says why it is not OK and what to do.
	Message string `json:"message,omitempty"`
}

// Health knows what this API needs to do its work.
type Health interface {
	// Ready answers within a second.
	Ready(ctx context.Context) []Check
}

// Limits bound what the API takes on. Zero fields get the defaults.
type Limits struct {
	// ModuleBytes bounds a module; default and maximum v1alpha1.MaxModuleBytes.
	ModuleBytes int64
	// Receives is how many module bodies are received at once (default 32):
	// it bounds temporary disk space, and is above Submits so that slow
	// senders do not keep fast ones out.
	Receives int
	// Submits is how many modules are checked and published at once (default 8).
	Submits int
	// Admission is how long a request waits for one of these places before
	// 429 (default 15 s: long enough for a burst of many tenants, short enough for
	// proxies in between). Tenants take turns.
	Admission time.Duration
	// Stall is how long a body may bring no byte before 408 (default 10 s).
	Stall time.Duration
	// Receive bounds receiving a whole body (default 10 min: 50 MiB over 1 Mbit/s).
	Receive time.Duration
	// Work bounds check and publish together (default 2 min).
	Work time.Duration
}

// Options of a Server. Store, Checker, Publisher and TempDir are required.
type Options struct {
	Store     function.Store
	Checker   Checker
	Publisher Publisher
	// Logs nil: the logs endpoint answers 503.
	Logs LogSource
	// Health nil: ready whenever the store answers.
	Health Health
	// Live, when set, says whether the process's loops make progress. It must
	// not look beyond the process.
	Live func(ctx context.Context) error

	// Access says who may do what. nil: everybody may do everything, which is
	// for one machine that only its owner reaches. With it every operation
	// below /v1 needs a caller; the OpenAPI document, probes, metrics and the
	// front page stay open.
	Access Access
	// Quotas bound what a tenant may take; nil: nothing but disk does.
	Quotas *Quotas
	// Audit gets one line for every change, made or refused, with who asked
	// and what became of it; nil: none is written. It never gets a secret.
	Audit *slog.Logger
	// Runtimes are those that functions may choose. nil: the resident one
	// alone, and none of the settings that only a cluster can honour (runtime,
	// host, routes, placement, autoscaling).
	Runtimes []v1alpha1.FunctionRuntime

	// NodeAccess says which node makes a call of NodeHandler, whose reports
	// must then be about that node. nil: whoever can connect is believed.
	// Errors are as of Access, or an *access.NodeError.
	NodeAccess func(ctx context.Context, r *http.Request) (node string, err error)
	// NodeDesired is what a node should have; nil: Store.Desired, the same for
	// every node. It waits like that until the generation is not after, which
	// no generation is that is math.MaxUint64. node is empty without NodeAccess.
	NodeDesired func(ctx context.Context, node string, after uint64) (v1alpha1.Desired, error)

	// URLs returns a function's URL and its path form. Required.
	URLs func(name string) (url, pathURL string)
	// Warnings returns what is not as a function's owner asked for, beside what
	// its state says; nil: nothing ever. It must not block.
	Warnings func(f function.Function) []v1alpha1.FunctionError
	// Image returns the OCI reference (by digest) that people can pull an
	// artifact with. nil: repository@digest, with the registry when it has one.
	Image func(v1alpha1.Artifact) string
	// BaseDomain and Version are shown on the front page and in the OpenAPI
	// document.
	BaseDomain string
	Version    string

	// TempDir holds bodies while they are worked on. It is created, belongs
	// to the server alone, and is cleared of leftovers by New.
	TempDir string
	Limits  Limits
	Logger  *slog.Logger
	// Registerer gets this package's metrics; nil: they are not exported.
	Registerer prometheus.Registerer
	// Gatherers are what /metrics shows; called for each scrape, bounded by
	// its context. nil: /metrics is empty.
	Gatherers func(ctx context.Context) []prometheus.Gatherer
	// Now is the clock for time stamps; nil: time.Now.
	Now func() time.Time
}
