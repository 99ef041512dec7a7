// Package control is how other processes speak with the engine: the types
// that cross its control socket and a client for them.
//
// It owns shapes, paths and the client. It decides nothing about workers or
// routes, and imports nothing of the engine, so that the agent and the
// command line can use it without linking a Wasm runtime.
//
// The protocol is HTTP/1.1 with JSON bodies over a unix socket of mode 0600;
// whoever may open the socket may do everything. State carries secrets and is
// never logged or written to disk by either side.
package control

import (
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

// Paths of the control socket.
const (
	// PathState takes a State with PUT and answers 204.
	PathState = "/v1/state"
	// PathStatus answers GET with a Status; see Client.Status for the long poll.
	PathStatus = "/v1/status"
	// PathLogs followed by a function's name answers GET with NDJSON.
	PathLogs = "/v1/logs/"
	// PathMetrics answers GET in the Prometheus text format.
	PathMetrics = "/metrics"
	// PathLive answers GET with 200 while the engine's loops make progress.
	PathLive = "/livez"
)

const (
	// MaxStateBytes bounds an encoded State. Ten thousand functions with 4 KiB
	// of environment each fit.
	MaxStateBytes = 64 << 20
	// MaxStatusWait bounds one long poll, so that a lost peer is noticed.
	MaxStatusWait = time.Minute
	// MaxLogTail bounds the lines a tail may ask for.
	MaxLogTail = 10_000
)

// State is everything the engine should serve, as one declarative snapshot:
// what it does not name is unloaded.
type State struct {
	// Generation orders snapshots of one agent. It is echoed in Status and not
	// compared: the newest request to arrive wins, so that an agent that lost
	// its counter is not locked out.
	Generation uint64     `json:"generation"`
	Functions  []Function `json:"functions"`
	// Pending are functions that should answer but have nothing on this node
	// yet, or never will: requests for them are forwarded or asked to come back
	// instead of being told that there is no such function.
	Pending []Pending `json:"pending,omitempty"`
	// BaseDomain replaces the one the engine was started with while it is set.
	BaseDomain string `json:"baseDomain,omitempty"`
	// Gateways are those (IP address:port) of other nodes' engines, which are
	// asked what changed since when this one is out of touch.
	Gateways []string `json:"gateways,omitempty"`
	// Stale says that the agent itself does not know what changed lately: the
	// engine is out of touch as if there were no agent.
	Stale bool `json:"stale,omitempty"`
}

// Pending is a function that this node cannot answer for: it is on its way
// here, or kept on other nodes only.
type Pending struct {
	Name   string `json:"name"`
	Tenant string `json:"tenant"`
	// TimeoutMS bounds a request that is forwarded; 0: the longest that any
	// function may have.
	TimeoutMS int `json:"timeoutMs,omitempty"`
	Reach
}

// Reach is what is known of a function beside how to run it. A change of it
// reloads nothing.
type Reach struct {
	// Routes are further ways to the function beside its own name.
	Routes []v1alpha1.HostRoute `json:"routes,omitempty"`
	// Peers are the gateways (IP address:port) of other nodes that serve the
	// function. A request is forwarded to one of them while this node does not;
	// nothing of Env and Secrets goes there.
	Peers []string `json:"peers,omitempty"`
}

// Function is one revision of a function that should answer requests.
// A change of Revision, Object or a setting loads the new one beside the old
// and switches when it is warm.
type Function struct {
	// Name is a DNS label, Tenant the isolation domain it runs in.
	Name   string `json:"name"`
	Tenant string `json:"tenant"`
	// Revision is what answers are attributed to, from 1.
	Revision int `json:"revision"`
	// ObjectDir is the absolute path of the compiled object, Object its name
	// (sha256 of the lowered module, hex).
	ObjectDir string `json:"objectDir"`
	Object    string `json:"object"`
	// MemoryMiB caps one instance's linear memory, TimeoutMS one request,
	// Concurrency the requests that run at once.
	MemoryMiB   int `json:"memoryMiB"`
	TimeoutMS   int `json:"timeoutMs"`
	Concurrency int `json:"concurrency"`
	// Env and Secrets become environment variables; Secrets win over Env and
	// neither can replace a CGI variable.
	Env     map[string]string `json:"env,omitempty"`
	Secrets map[string]string `json:"secrets,omitempty"`
	Reach
}

// Status is what the engine does at this moment.
type Status struct {
	// Version grows with every change of what follows other than counters;
	// pass it to Client.Status to wait for the next. It starts anew when the
	// engine restarts, then from a value that differs from the last with
	// overwhelming probability.
	Version uint64 `json:"version"`
	// Generation is the last accepted State's, 0 when none was since start:
	// the agent sees 0 and sends its State again.
	Generation uint64 `json:"generation"`
	// OutOfTouch says that no agent was heard of for a while, or only a stale
	// State: the next that is not ends it, even if it says the same.
	OutOfTouch bool             `json:"outOfTouch,omitempty"`
	Functions  []FunctionStatus `json:"functions"`
	Workers    []WorkerStatus   `json:"workers"`
}

// FunctionStatus is one function's part of a Status.
type FunctionStatus struct {
	Name   string `json:"name"`
	Tenant string `json:"tenant"`
	// Wanted is the revision of the last State, Serving the one that answers
	// requests now (0: none).
	Wanted  int `json:"wanted"`
	Serving int `json:"serving"`
	// Progress is loading, ready or failed and speaks of Wanted.
	Progress v1alpha1.RevisionProgress `json:"progress"`
	// Phases says where the time of getting Wanted ready went: load, instantiate.
	Phases []v1alpha1.Phase `json:"phases,omitempty"`
	// Error says why Progress is failed. Code object-unusable asks for the
	// object to be quarantined and compiled again.
	Error *v1alpha1.FunctionError `json:"error,omitempty"`
	// InFlight counts requests that run, Queued those that wait for their turn.
	InFlight int `json:"inFlight"`
	Queued   int `json:"queued"`
	// Requests and Failures count since the engine started; a failure is an
	// answer of 5xx that Hearth made, or a broken-off one.
	Requests uint64 `json:"requests"`
	Failures uint64 `json:"failures"`
}

// Codes of FunctionStatus.Error.
const (
	// ErrorObjectUnusable: the compiled object is missing, damaged or made for
	// another engine.
	ErrorObjectUnusable = "object-unusable"
	// ErrorWorkerFailed: the worker process could not be started or kept
	// crashing; tried again with growing pauses.
	ErrorWorkerFailed = "worker-failed"
	// ErrorInstantiate: the module loads but no instance of it can be made.
	ErrorInstantiate = "instantiate-failed"
	// ErrorInvalid: the State's entry contradicts itself.
	ErrorInvalid = "invalid-function"
)

// WorkerStatus is one worker process.
type WorkerStatus struct {
	// ID is stable over restarts and unique within the engine.
	ID     string `json:"id"`
	Tenant string `json:"tenant"`
	// PID is 0 while none runs.
	PID      int    `json:"pid"`
	RSSBytes uint64 `json:"rssBytes"`
	// Functions is how many are loaded.
	Functions int `json:"functions"`
	// Restarts counts since the engine started.
	Restarts int       `json:"restarts"`
	Since    time.Time `json:"since"`
	// State is starting, ready, backoff or stopping.
	State string `json:"state"`
	// LastExit says why the process ended last, empty when it never did.
	LastExit string `json:"lastExit,omitempty"`
}

// States of a worker.
const (
	WorkerStarting = "starting"
	WorkerReady    = "ready"
	WorkerBackoff  = "backoff"
	WorkerStopping = "stopping"
)
