package v1alpha1

// Desired is everything a node should have warm, as one snapshot. A node
// that applied it needs no earlier one.
type Desired struct {
	// Generation grows with every change; it orders snapshots of one source.
	Generation uint64            `json:"generation"`
	Functions  []DesiredFunction `json:"functions"`
	// BaseDomain is what function names are prefixed to for their hosts. Empty:
	// what the engine was started with.
	BaseDomain string `json:"baseDomain,omitempty"`
	// Gateways are those (IP address:port) of other nodes, whatever they serve,
	// at most MaxPeers. An engine whose agent fell silent asks them what changed
	// since.
	Gateways []string `json:"gateways,omitempty"`
}

// DesiredFunction is one function a node should serve.
type DesiredFunction struct {
	Name   string `json:"name"`
	Tenant string `json:"tenant"`
	// Candidates are the revisions that may answer requests, best first: the
	// newest wanted one, then the one that answered before. A node serves the
	// first that it has warm. Empty where the function is not placed on the node:
	// requests are then forwarded to Peers, or asked to come back while there are
	// none.
	Candidates []DesiredRevision `json:"candidates"`
	// Keep lists artifacts of older revisions that stay compiled, so that a
	// rollback takes one request.
	Keep []Artifact `json:"keep,omitempty"`
	// Routes are further ways to the function beside its own name.
	Routes []HostRoute `json:"routes,omitempty"`
	// Peers are the gateways (IP address:port) of other nodes that serve the
	// function now, at most MaxPeers of which are used. A node that does not
	// serve it forwards to one of them.
	Peers []string `json:"peers,omitempty"`
	// TimeoutMS bounds a request that is forwarded where there are no
	// Candidates to say so; 0: the longest that any function may have.
	TimeoutMS int `json:"timeoutMs,omitempty"`
}

// MaxPeers is how many Peers of one function a node uses.
const MaxPeers = 32

// HostRoute is a DNS name and a path below which a function answers.
type HostRoute struct {
	// Host is in lower case and has no port.
	Host string `json:"host"`
	// Path begins with a slash and matches itself and everything below it.
	Path string `json:"path"`
}

// Artifact names a published module.
type Artifact struct {
	// Registry is the host of the registry; empty means the registry that
	// comes with Hearth, wherever it listens today.
	Registry   string `json:"registry,omitempty"`
	Repository string `json:"repository"`
	// Digest is the digest of the manifest, "sha256:…".
	Digest string `json:"digest"`
}

// DesiredRevision is a revision with all that is needed to run it.
type DesiredRevision struct {
	Revision    int      `json:"revision"`
	Artifact    Artifact `json:"artifact"`
	MemoryMiB   int      `json:"memoryMiB"`
	TimeoutMS   int      `json:"timeoutMs"`
	Concurrency int      `json:"concurrency"`
	// Env is the guest's environment; Secrets the part of it that must never
	// be printed or logged.
	Env     map[string]string `json:"env,omitempty"`
	Secrets map[string]string `json:"secrets,omitempty"`
}

// RevisionProgress is where a revision is on its way to being served.
type RevisionProgress string

// The steps a node reports, in order; failed can follow any of them.
const (
	ProgressQueued    RevisionProgress = "queued"
	ProgressPulling   RevisionProgress = "pulling"
	ProgressCompiling RevisionProgress = "compiling"
	ProgressLoading   RevisionProgress = "loading"
	ProgressReady     RevisionProgress = "ready"
	ProgressFailed    RevisionProgress = "failed"
)

// NodeReport is what a node says of the Desired snapshot it works on. Each
// report is complete: what it does not name is not on the node.
type NodeReport struct {
	Node       string           `json:"node"`
	Generation uint64           `json:"generation"`
	Functions  []FunctionReport `json:"functions"`
}

// FunctionReport is one function's part of a NodeReport.
type FunctionReport struct {
	Name string `json:"name"`
	// Revision is the first candidate's number and Progress how far it is.
	Revision int              `json:"revision"`
	Progress RevisionProgress `json:"progress"`
	// Serving is the revision that answers requests on this node now, 0 for none.
	Serving int            `json:"serving"`
	Phases  []Phase        `json:"phases,omitempty"`
	Error   *FunctionError `json:"error,omitempty"`
	// Retrying is true while Error is thought to be passing (registry down,
	// disk full) and the node goes on trying.
	Retrying bool `json:"retrying,omitempty"`
}
