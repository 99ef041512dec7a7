package v1alpha1

import "time"

// NodeState is the overall word on a node. The exit code of
// `nodeagent status` follows it.
type NodeState string

// A node is failed when a critical check fails, degraded when only warnings do
// or when a critical check has not reported yet, else healthy.
const (
	NodeHealthy  NodeState = "healthy"
	NodeDegraded NodeState = "degraded"
	NodeFailed   NodeState = "failed"
)

// CheckState is the result of one check.
type CheckState string

// A check is unknown until its first report.
const (
	CheckOK      CheckState = "ok"
	CheckFailing CheckState = "failing"
	CheckUnknown CheckState = "unknown"
)

// Severity is what a failing check means for the node.
type Severity string

// A failing critical check makes the node failed and not ready, a warning
// makes it degraded, an info changes nothing.
const (
	SeverityCritical Severity = "critical"
	SeverityWarning  Severity = "warning"
	SeverityInfo     Severity = "info"
)

// NodeStatus is everything a person or a script may want to know of one node,
// as one document. Its JSON Schema is docs/status.schema.json. Sections the
// node could not fill in time are absent, never zero.
type NodeStatus struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"` // "NodeStatus"
	// Node is the node's name.
	Node string `json:"node"`
	// Time is when the document was made, StartedAt when the agent started.
	Time      time.Time `json:"time"`
	StartedAt time.Time `json:"startedAt"`
	Versions  Versions  `json:"versions"`
	// State is the overall state, Since when it last changed, Summary one
	// sentence that names the root cause first.
	State   NodeState `json:"state"`
	Since   time.Time `json:"since"`
	Summary string    `json:"summary"`
	// Checks come root causes first, then other failing ones, then unknown
	// ones, then those that pass; within each group in order of severity,
	// then code.
	Checks    []Check          `json:"checks"`
	Functions *FunctionsStatus `json:"functions,omitempty"`
	Store     *StoreStatus     `json:"store,omitempty"`
	Engine    *EngineStatus    `json:"engine,omitempty"`
	Disk      *DiskStatus      `json:"disk,omitempty"`
	// Runtimes are the node's Wasm runtimes, by handler. They and the three
	// below are of nodes of a cluster only.
	Runtimes []RuntimeStatus `json:"runtimes,omitempty"`
	Images   *ImagesStatus   `json:"images,omitempty"`
	Instance *InstanceStatus `json:"instance,omitempty"`
	// Interruption is what was announced for this machine and how far leaving
	// it is; absent while nothing is.
	Interruption *InterruptionStatus `json:"interruption,omitempty"`
	// LastErrors are the most recent distinct errors, newest first, at most 16.
	LastErrors []ErrorRecord `json:"lastErrors"`
}

// Versions says what the node runs.
type Versions struct {
	// Hearth is the version of nodeagent, Wazero of the engine's compiler, Go
	// of the toolchain both were built with.
	Hearth string `json:"hearth"`
	Wazero string `json:"wazero,omitempty"`
	Go     string `json:"go,omitempty"`
	OS     string `json:"os,omitempty"`
	Arch   string `json:"arch,omitempty"`
	Kernel string `json:"kernel,omitempty"`
}

// Check is one named check of a node.
type Check struct {
	// Code is stable and kebab-case; it is also the label of the metric
	// hearth_health_check.
	Code     string     `json:"code"`
	Severity Severity   `json:"severity"`
	State    CheckState `json:"state"`
	// Since is when State last changed.
	Since   time.Time `json:"since"`
	Message string    `json:"message,omitempty"`
	// Remedy says what a person can do; only while the check does not pass.
	Remedy string `json:"remedy,omitempty"`
	// DependsOn are the checks without which this one cannot pass.
	DependsOn []string `json:"dependsOn,omitempty"`
	// CausedBy is the failing check that explains this one; such a check
	// does not count for the node's state.
	CausedBy string `json:"causedBy,omitempty"`
}

// FunctionsStatus counts the functions that the node should serve.
type FunctionsStatus struct {
	Total int `json:"total"`
	// Warm functions answer without compiling; Pulling counts those on their
	// way (queued, pulling, compiling, loading).
	Warm    int `json:"warm"`
	Pulling int `json:"pulling"`
	// Failed lists functions whose newest revision cannot be served here, by
	// name, at most 100; FailedCount is their number.
	FailedCount int              `json:"failedCount"`
	Failed      []FailedFunction `json:"failed,omitempty"`
}

// FailedFunction is a function whose newest revision cannot be served.
type FailedFunction struct {
	Name     string `json:"name"`
	Revision int    `json:"revision"`
	// Serving is the revision that answers meanwhile, 0 for none.
	Serving  int           `json:"serving"`
	Retrying bool          `json:"retrying"`
	Error    FunctionError `json:"error"`
}

// StoreStatus is the store of compiled functions.
type StoreStatus struct {
	Path    string `json:"path"`
	Objects int    `json:"objects"`
	// UsedBytes may be up to BudgetBytes (0: no budget) before objects that no
	// function needs are evicted.
	UsedBytes   int64 `json:"usedBytes"`
	BudgetBytes int64 `json:"budgetBytes"`
	// Quarantined counts objects set aside because their bytes changed.
	Quarantined int `json:"quarantined"`
}

// EngineStatus is the engine and its workers, as it last answered.
type EngineStatus struct {
	// Reachable is whether the engine answered for this document.
	Reachable bool `json:"reachable"`
	PID       int  `json:"pid,omitempty"`
	// Generation is the last state of functions that the engine accepted.
	Generation uint64         `json:"generation"`
	Workers    []WorkerStatus `json:"workers"`
}

// WorkerStatus is one process that runs guests.
type WorkerStatus struct {
	ID        string    `json:"id"`
	Tenant    string    `json:"tenant"`
	PID       int       `json:"pid"`
	State     string    `json:"state"`
	Since     time.Time `json:"since"`
	Functions int       `json:"functions"`
	Restarts  int       `json:"restarts"`
	RSSBytes  uint64    `json:"rssBytes"`
}

// RuntimeStatus is one way in which pods of this node can run Wasm.
type RuntimeStatus struct {
	// Name is the engine ("spin"), Handler what a RuntimeClass names; empty
	// when containerd has none for this shim.
	Name    string `json:"name"`
	Handler string `json:"handler,omitempty"`
	// Version and Binary are the shim's, empty when not known.
	Version string `json:"version,omitempty"`
	Binary  string `json:"binary,omitempty"`
	// Proven is whether a module ran, with the right result, the last time it
	// was tried; the node's label follows it.
	Proven bool `json:"proven"`
	// Since is when Proven last changed, ProvedAt when it was last tried.
	Since    time.Time  `json:"since"`
	ProvedAt *time.Time `json:"provedAt,omitempty"`
	// Code is how the last attempt ended ("ok", "wrong-output"), Message the
	// same in a sentence.
	Code    string `json:"code,omitempty"`
	Message string `json:"message,omitempty"`
	// Problems say what is wrong with the installation and what to do.
	Problems []string `json:"problems,omitempty"`
}

// ImagesStatus counts the container images that should be on the node.
type ImagesStatus struct {
	Total int `json:"total"`
	Warm  int `json:"warm"`
	// Failed counts those that are tried again later; Images has the reason.
	Failed int `json:"failed"`
	// Summary is one line: "12/14 warm, 1 pulling 43 %, 1 failed: …".
	Summary string `json:"summary"`
	// Images lists those that are not warm, by name, at most 100.
	Images []ImageStatus `json:"images,omitempty"`
}

// ImageStatus is an image that is not warm yet.
type ImageStatus struct {
	Image string `json:"image"`
	State string `json:"state"`
	// Percent is how much of it is here while it is pulled, else absent.
	Percent *int           `json:"percent,omitempty"`
	Users   []string       `json:"users,omitempty"`
	Error   *FunctionError `json:"error,omitempty"`
	NextTry *time.Time     `json:"nextTry,omitempty"`
}

// InstanceStatus is what the instance metadata service says of this machine.
type InstanceStatus struct {
	ID        string `json:"id"`
	Type      string `json:"type"`
	Zone      string `json:"zone"`
	LifeCycle string `json:"lifeCycle"`
	Role      string `json:"role,omitempty"`
}

// InterruptionStatus says why this machine is being left, and how far that is.
type InterruptionStatus struct {
	// Kind is spot-interruption, rebalance, maintenance, lifecycle-termination
	// or manual.
	Kind string `json:"kind"`
	// Simulated is true for one that `nodeagent simulate` began.
	Simulated bool `json:"simulated,omitempty"`
	// Phase is cordoned, draining, drained and so on.
	Phase    string     `json:"phase"`
	Since    time.Time  `json:"since"`
	Deadline *time.Time `json:"deadline,omitempty"`
	// Pods is how many pods leave, Gone how many have; the others are
	// terminating or blocked by a disruption budget.
	Pods        int `json:"pods"`
	Gone        int `json:"gone"`
	Terminating int `json:"terminating"`
	Blocked     int `json:"blocked"`
	// Forced counts pods deleted past their budget because time ran out.
	Forced int      `json:"forced"`
	Left   []string `json:"left,omitempty"`
	Error  string   `json:"error,omitempty"`
}

// DiskStatus is the filesystem of the data directory.
type DiskStatus struct {
	Path       string `json:"path"`
	TotalBytes uint64 `json:"totalBytes"`
	// FreeBytes is what an ordinary user may still write.
	FreeBytes uint64 `json:"freeBytes"`
}

// ErrorRecord is an error that happened on the node, counted when it repeats.
type ErrorRecord struct {
	// Time is when it last happened, FirstTime when it first did.
	Time      time.Time `json:"time"`
	FirstTime time.Time `json:"firstTime"`
	Count     int       `json:"count"`
	// Code is stable and kebab-case; Subject is what it happened to, such as
	// a function's name.
	Code    string `json:"code"`
	Subject string `json:"subject,omitempty"`
	Message string `json:"message"`
}
