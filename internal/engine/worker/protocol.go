package worker

import (
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

// File descriptors a worker inherits.
const (
	ListenerFD = 3
	LifelineFD = 4
	LogFD      = 5
)

// Config is what the engine writes to a worker's stdin, as JSON.
type Config struct {
	// ID names the worker in its own reports.
	ID string `json:"id"`
	// MemoryBytes caps the linear memory of all instances together.
	MemoryBytes uint64 `json:"memoryBytes"`
	// StoreDir is the one directory the worker may read.
	StoreDir string `json:"storeDir,omitempty"`
	// RequireSandbox makes a worker exit where a layer of it is missing.
	RequireSandbox bool `json:"requireSandbox,omitempty"`
}

// Spec is a function to load.
type Spec struct {
	// Key identifies this load; requests name it.
	Key       string            `json:"key"`
	Name      string            `json:"name"`
	Revision  int               `json:"revision"`
	ObjectDir string            `json:"objectDir"`
	MemoryMiB int               `json:"memoryMiB"`
	Env       map[string]string `json:"env,omitempty"`
	Secrets   map[string]string `json:"secrets,omitempty"`
}

// Loaded answers a load. Phases are load and instantiate.
type Loaded struct {
	Phases []v1alpha1.Phase `json:"phases"`
}

// Pong answers a ping.
type Pong struct {
	// Requests is how many run, MemoryBytes what their instances and the
	// prepared ones have committed.
	Requests    int      `json:"requests"`
	Functions   int      `json:"functions"`
	MemoryBytes uint64   `json:"memoryBytes"`
	DroppedLogs uint64   `json:"droppedLogs"`
	Sandbox     []string `json:"sandbox,omitempty"`
}

// Header fields between engine and worker. The engine removes every field of
// this prefix from what clients send, and the worker from what guests answer,
// so both sides can believe them.
const (
	HeaderPrefix = "Hearth-"
	// HeaderControl holds an operation below; requests without it run a guest.
	HeaderControl = "Hearth-Control"
	// HeaderKey names the load, HeaderRequest the request in logs.
	HeaderKey     = "Hearth-Key"
	HeaderRequest = "Hearth-Request-Id"
	// HeaderTimeout is what is left of the request's time, in microseconds.
	HeaderTimeout = "Hearth-Timeout"
	// HeaderScript, HeaderScheme and HeaderRemote are SCRIPT_NAME, http or
	// https, and the client's address and port.
	HeaderScript = "Hearth-Script-Name"
	HeaderScheme = "Hearth-Scheme"
	HeaderRemote = "Hearth-Remote"
	// HeaderFault marks an answer that is the worker's word about a request
	// that failed: the body is a Fault.
	HeaderFault = "Hearth-Fault"
	// HeaderInstantiate is how long getting an instance took, in microseconds.
	HeaderInstantiate = "Hearth-Instantiate"
)

// Operations of HeaderControl.
const (
	// OpPing answers with a Pong.
	OpPing = "ping"
	// OpLoad takes a Spec and answers with Loaded, or a Fault with 422.
	OpLoad = "load"
	// OpUnload takes HeaderKey and answers 204 when nothing of it is left.
	OpUnload = "unload"
	// OpCancel takes HeaderRequest and ends that request's guest.
	OpCancel = "cancel"
)

// Fault is why a request or a load failed. Status and Code become the problem
// that the client sees.
type Fault struct {
	Status    int    `json:"status"`
	Code      string `json:"code"`
	Detail    string `json:"detail"`
	Retryable bool   `json:"retryable,omitempty"`
}

func (f *Fault) Error() string { return f.Detail }

// Codes of a Fault of a request.
const (
	FaultTrap       = "function-trapped"
	FaultExit       = "function-exited"
	FaultOutput     = "invalid-response"
	FaultTooLarge   = "response-too-large"
	FaultDeadline   = "deadline-exceeded"
	FaultMemory     = "function-out-of-memory"
	FaultStack      = "stack-overflow"
	FaultNoRoom     = "worker-out-of-memory"
	FaultNotLoaded  = "function-not-loaded"
	FaultClientGone = "client-gone"
	FaultRequest    = "request-body-failed"
	FaultInternal   = "internal"
)

const (
	// SmallBody is the size of request bodies that are read before a guest
	// starts: the connection is then free to tell that the client went away.
	SmallBody = 64 << 10
	// MaxLogLine bounds one line of a guest's stderr, MaxLogBytes all of one
	// request's.
	MaxLogLine  = 16 << 10
	MaxLogBytes = 1 << 20
	// MaxLogRecord bounds one encoded record on the log pipe: a line in which
	// every byte is escaped as six.
	MaxLogRecord = 6*MaxLogLine + 4096
)

// controlBodyMax bounds a Spec on the wire: v1alpha1.MaxEnvBytes twice, escaped.
const controlBodyMax = 1 << 20

// answerTimeout is how long the worker tries to give an answer after the
// guest's time is over. The engine reads at once, so only a lost engine waits.
const answerTimeout = 5 * time.Second
