package v1alpha1

import "time"

// Limits of what a function may ask for. They are part of the API: a value
// outside them is refused, never clamped.
const (
	DefaultMemoryMiB   = 128
	MinMemoryMiB       = 1
	MaxMemoryMiB       = 1024
	DefaultTimeoutMS   = 30_000
	MinTimeoutMS       = 10
	MaxTimeoutMS       = 300_000
	DefaultConcurrency = 32
	MinConcurrency     = 1
	MaxConcurrency     = 1000
	// MaxModuleBytes bounds an uploaded module (50 MiB).
	MaxModuleBytes = 50 << 20
	// MaxRequestBytes and MaxResponseBytes bound what passes through one
	// invocation (10 MiB each).
	MaxRequestBytes  = 10 << 20
	MaxResponseBytes = 10 << 20
	// MaxEnvBytes bounds all names and values of env and secrets together.
	MaxEnvBytes = 64 << 10
	// DefaultTenant owns functions submitted without naming a tenant.
	DefaultTenant = "default"
)

// FunctionState says how far the newest wanted revision of a function is.
type FunctionState string

// A function is pending until a node serves its newest wanted revision,
// then ready; failed when that revision cannot be served (an older one may
// still be, see Function.ActiveRevision).
const (
	StatePending FunctionState = "pending"
	StateReady   FunctionState = "ready"
	StateFailed  FunctionState = "failed"
)

// Phase is the time one step took. Names are stable and bounded: receive,
// check, publish, record (API), pull, verify, compile, store, load,
// instantiate (node).
type Phase struct {
	// Name is the step's.
	Name string `json:"name"`
	// Milliseconds is wall-clock time.
	Milliseconds float64 `json:"ms"`
}

// Settings are the per-revision settings of a function as they are shown.
// Secret values are never part of it.
type Settings struct {
	// MemoryMiB caps the guest's linear memory.
	MemoryMiB int `json:"memoryMiB"`
	// TimeoutMS is the deadline of one request, from its arrival.
	TimeoutMS int `json:"timeoutMs"`
	// Concurrency is how many requests run at once before others queue.
	Concurrency int `json:"concurrency"`
	// Env is given to the guest as environment variables.
	Env map[string]string `json:"env,omitempty"`
	// SecretNames lists, sorted, the environment variables whose values are secret.
	SecretNames []string `json:"secrets,omitempty"`
	// Runtime is what runs the function; empty means resident.
	Runtime FunctionRuntime `json:"runtime,omitempty"`
	// Host is an additional DNS name that the function answers to, and Routes
	// the paths of it that reach the function (default "/").
	Host   string   `json:"host,omitempty"`
	Routes []string `json:"routes,omitempty"`
	// Placement says on which nodes a resident function is kept ready.
	Placement *FunctionPlacement `json:"placement,omitempty"`
	// Autoscaling says how many pods a spin function has.
	Autoscaling *FunctionAutoscaling `json:"autoscaling,omitempty"`
}

// Function is what the submit API shows of a function.
type Function struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"` // "Function"
	Name       string `json:"name"`
	// Tenant is the isolation domain: functions of two tenants never share a process.
	Tenant string `json:"tenant"`
	// URL and PathURL both reach the function; PathURL needs no name resolution.
	URL     string        `json:"url"`
	PathURL string        `json:"pathUrl"`
	State   FunctionState `json:"state"`
	// Revision is the newest wanted revision, ActiveRevision the one that
	// answers requests (0: none yet).
	Revision       int `json:"revision"`
	ActiveRevision int `json:"activeRevision"`
	// Warm says on how many of the nodes that should have the function it
	// answers without compiling, such as 2/3; empty on one machine.
	Warm string `json:"warm,omitempty"`
	// Digest is the sha256 of the module's bytes, Image the OCI reference
	// (by digest) it was published as.
	Digest   string   `json:"digest"`
	Image    string   `json:"image"`
	Settings Settings `json:"settings"`
	// Phases says where the time of the newest wanted revision went.
	Phases    []Phase   `json:"phases,omitempty"`
	CreatedAt time.Time `json:"createdAt"`
	UpdatedAt time.Time `json:"updatedAt"`
	// Error says why State is failed.
	Error *FunctionError `json:"error,omitempty"`
	// Warnings are what is not as it was asked for whatever State is, such as a
	// host that does not lead to the function.
	Warnings []FunctionError `json:"warnings,omitempty"`
}

// FunctionError is a failure of a revision on its way to being served, or a
// warning about one.
type FunctionError struct {
	// Code is stable, kebab-case, and is the last segment of a problem type.
	Code string `json:"code"`
	// Detail is one sentence for people.
	Detail string `json:"detail"`
}

// FunctionList answers a list request.
type FunctionList struct {
	APIVersion string     `json:"apiVersion"`
	Kind       string     `json:"kind"` // "FunctionList"
	Items      []Function `json:"items"`
	// Continue is given to the next request to get the next page; empty on
	// the last one.
	Continue string `json:"continue,omitempty"`
}

// Revision is one immutable revision of a function.
type Revision struct {
	Revision  int            `json:"revision"`
	Digest    string         `json:"digest"`
	Image     string         `json:"image"`
	SizeBytes int64          `json:"sizeBytes"`
	Settings  Settings       `json:"settings"`
	State     FunctionState  `json:"state"`
	Active    bool           `json:"active"`
	Phases    []Phase        `json:"phases,omitempty"`
	CreatedAt time.Time      `json:"createdAt"`
	Error     *FunctionError `json:"error,omitempty"`
}

// RevisionList answers a request for a function's revisions, newest first.
type RevisionList struct {
	APIVersion string     `json:"apiVersion"`
	Kind       string     `json:"kind"` // "RevisionList"
	Items      []Revision `json:"items"`
}

// LogLine is one line of a function's log, one JSON object a line (NDJSON).
type LogLine struct {
	Time     time.Time `json:"time"`
	Function string    `json:"function"`
	Revision int       `json:"revision"`
	// Request is the identifier of the request that wrote the line, as in
	// the response's Hearth-Request-Id header.
	Request string `json:"request,omitempty"`
	// Stream is "stderr" for the guest's own lines, "system" for Hearth's
	// word on a request that failed.
	Stream string `json:"stream"`
	Line   string `json:"line"`
}

// Problem is an RFC 9457 problem document.
type Problem struct {
	// Type is "https://hearth.sh/problems/<code>", stable.
	Type   string `json:"type"`
	Title  string `json:"title"`
	Status int    `json:"status"`
	Detail string `json:"detail,omitempty"`
	// Instance identifies this occurrence, for finding it in the logs.
	Instance string `json:"instance,omitempty"`
	// Retryable says whether the same request can succeed later unchanged.
	Retryable bool `json:"retryable"`
}
