package shim

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"
	"unicode/utf8"
)

const (
	// DefaultProofDeadline bounds one proof. A shim needs well below a second
	// on an idle node; this is for one that is pulling and starting pods.
	DefaultProofDeadline = 30 * time.Second
	// doubtDeadline bounds the question that tells a stuck shim from a stuck
	// containerd.
	doubtDeadline = 3 * time.Second
	// maxMessage bounds what is repeated of others' error texts, in bytes.
	maxMessage = 1 << 10
)

// Code says how a proof ended. The values are stable: they are condition
// reasons and metric labels elsewhere.
type Code string

// Codes of answers: the runtime was tried, or need not be.
const (
	// CodeOK: the runtime ran the probe and the answer was right.
	CodeOK Code = "ok"
	// CodeNotFound: no shim binary, or containerd does not find it.
	CodeNotFound Code = "not-found"
	// CodeNoHandler: the shim is there, but no pod could ask for it.
	CodeNoHandler Code = "no-handler"
	// CodeVersionTooOld: the shim is older than the minimum; it was not run.
	CodeVersionTooOld Code = "version-too-old"
	// CodeNoProbe: a runtime of KindUnproven.
	CodeNoProbe Code = "no-probe"
	// CodeCreateFailed: the shim could not create the task.
	CodeCreateFailed Code = "create-failed"
	// CodeStartFailed: the task was created but did not start.
	CodeStartFailed Code = "start-failed"
	// CodeExited: the probe ended with another status than 0.
	CodeExited Code = "exited"
	// CodeWrongOutput: the probe ended well without the right answer: what
	// should run WebAssembly ran nothing.
	CodeWrongOutput Code = "wrong-output"
	// CodeTimeout: no answer in time although containerd answers.
	CodeTimeout Code = "timeout"
)

// Codes of missing answers: they say nothing about the runtime.
const (
	// CodeUnreachable: containerd does not answer.
	CodeUnreachable Code = "containerd-unreachable"
	// CodeCancelled: the caller gave up.
	CodeCancelled Code = "cancelled"
	// CodeInternal: our side could not do its part, a directory or lock.
	CodeInternal Code = "internal"
)

// Answered says whether the code is an answer about the runtime.
func (c Code) Answered() bool {
	return c != CodeUnreachable && c != CodeCancelled && c != CodeInternal
}

// Proof is the result of trying a runtime.
type Proof struct {
	// Key and Identity are those of the Runtime that was tried.
	Key      string `json:"key"`
	Identity string `json:"identity"`
	// At is when the proof ended, Took how long it ran.
	At   time.Time     `json:"at"`
	Took time.Duration `json:"took"`
	OK   bool          `json:"ok"`
	Code Code          `json:"code"`
	// Message is one sentence for people.
	Message string `json:"message"`
	// CompileKeys are the keys under which the shim keeps compiled modules
	// now; nil when it keeps none.
	CompileKeys []CompileKey `json:"compileKeys,omitempty"`
}

// Stage is a step of running a container.
type Stage string

// The steps in order.
const (
	StageConnect Stage = "connect" // reaching containerd at all
	StagePrepare Stage = "prepare" // lock, image, container object: our side
	StageCreate  Stage = "create"  // task create: the shim starts
	StageStart   Stage = "start"   // task start
	StageAnswer  Stage = "answer"  // waiting for the end, or for HTTP
)

// RunError is what a Node returns when a container could not be run to its
// end.
type RunError struct {
	Stage Stage
	Err   error
}

func (e *RunError) Error() string { return string(e.Stage) + ": " + e.Err.Error() }

// Unwrap returns the cause.
func (e *RunError) Unwrap() error { return e.Err }

// ErrUnreachable says that containerd does not answer.
var ErrUnreachable = errors.New("containerd does not answer")

// ErrShimNotFound says that containerd does not find a shim's binary.
var ErrShimNotFound = errors.New("containerd does not find the shim's binary")

// Server identifies the containerd process that answers.
type Server struct {
	// UUID is the installation's, kept across restarts.
	UUID string
	// PID is its process, as containerd's own PID namespace counts.
	PID int
	// Started tells two processes with the same PID apart; empty when the
	// process cannot be seen.
	Started string
}

// Output is what a container left behind.
type Output struct {
	// Stdout holds the first bytes of standard output, or of the HTTP
	// response's body for KindSpin. Truncated says that there was more.
	Stdout    []byte
	Truncated bool
	// Stderr holds the first bytes of standard error.
	Stderr []byte
	// ExitStatus is the process's; 0 for KindSpin, which is stopped by us.
	ExitStatus uint32
	// CompileKeys are the keys of runwasi's cache that the shim put on the
	// image.
	CompileKeys []CompileKey
}

// Node runs the probe on this machine. Implementations run one container at a
// time, whoever asks, and leave nothing behind: not after an error, not after
// cancellation.
type Node interface {
	// Server asks who answers. ErrUnreachable when nobody does.
	Server(ctx context.Context) (Server, error)
	// Run has the runtime execute the probe with a nonce, and returns what it
	// put out, bounded. Errors are *RunError; with ErrUnreachable in the chain
	// when containerd went away, and ErrShimNotFound when it lacks the shim.
	Run(ctx context.Context, runtime Runtime, nonce string) (Output, error)
	// Clean removes what an earlier process left behind, and says how many
	// containers that were.
	Clean(ctx context.Context) (removed int, err error)
}

// ProverOptions are optional.
type ProverOptions struct {
	// Deadline of one proof (default DefaultProofDeadline).
	Deadline time.Duration
	// Logger (default slog.Default).
	Logger *slog.Logger
}

// Prover tries runtimes on a Node.
type Prover struct {
	node     Node
	deadline time.Duration
	log      *slog.Logger
}

// createAttempts is how often a runtime that does not come up is tried before
// that is held against it: under load, runwasi's shims now and then lose a race
// between the processes they fork ("received unexpected message: InitReady"),
// and a node must not lose its label over that. A broken shim fails each time.
const (
	createAttempts = 3
	createPause    = 250 * time.Millisecond
)

// NewProver returns a Prover for a node.
func NewProver(node Node, options ProverOptions) *Prover {
	p := &Prover{node: node, deadline: options.Deadline, log: options.Logger}
	if p.deadline <= 0 {
		p.deadline = DefaultProofDeadline
	}
	if p.log == nil {
		p.log = slog.Default()
	}
	return p
}

// Prove makes the runtime run the probe with a question that was never asked
// before, and compares the answer with its own. It never fails: what went
// wrong is in the Proof.
func (p *Prover) Prove(ctx context.Context, runtime Runtime) Proof {
	begin := time.Now()
	proof := p.prove(ctx, runtime)
	for attempt := 1; attempt < createAttempts && (proof.Code == CodeCreateFailed || proof.Code == CodeStartFailed); attempt++ {
		p.log.InfoContext(ctx, "a Wasm runtime did not start, trying once more", "runtime", runtime.Key(), "code", proof.Code, "message", clip(proof.Message))
		if pause(ctx, createPause) != nil {
			break
		}
		proof = p.prove(ctx, runtime)
	}
	proof.Key, proof.Identity = runtime.Key(), runtime.Identity()
	proof.At = time.Now()
	proof.Took = proof.At.Sub(begin)
	proof.OK = proof.Code == CodeOK
	proof.Message = clip(proof.Message)
	p.log.DebugContext(ctx, "tried a Wasm runtime", "runtime", proof.Key, "code", proof.Code, "took", proof.Took, "message", proof.Message)
	return proof
}

func (p *Prover) prove(ctx context.Context, runtime Runtime) Proof {
	switch {
	case runtime.Kind == KindUnproven:
		return Proof{Code: CodeNoProbe, Message: fmt.Sprintf("%s cannot run the probe, so it is never called proven", runtime.Name)}
	case runtime.Handler == "":
		return Proof{Code: CodeNoHandler, Message: firstProblem(runtime, "containerd has no runtime handler for this shim: add one to its configuration")}
	case runtime.TooOld:
		return Proof{Code: CodeVersionTooOld, Message: fmt.Sprintf("%s %s is too old: upgrade the shim", runtime.Name, runtime.Version)}
	}
	nonce := NewNonce()
	limited, cancel := context.WithTimeout(ctx, p.deadline)
	defer cancel()
	output, err := p.node.Run(limited, runtime, nonce)
	if err != nil {
		return p.failure(ctx, limited, err)
	}
	proof := Proof{CompileKeys: output.CompileKeys}
	switch {
	case output.Truncated:
		proof.Code, proof.Message = CodeWrongOutput, fmt.Sprintf("the runtime wrote more than %d bytes where %d were due: it did not run the probe", maxOutput, answerSize)
	case output.ExitStatus != 0:
		proof.Code, proof.Message = CodeExited, fmt.Sprintf("the probe ended with status %d instead of 0%s", output.ExitStatus, quoted(output.Stderr))
	case !answered(output.Stdout, nonce):
		proof.Code, proof.Message = CodeWrongOutput, "the runtime reported success without the right answer: it ran nothing"
	default:
		proof.Code, proof.Message = CodeOK, "the runtime ran the probe"
	}
	return proof
}

// failure tells apart whose fault it was that a run did not end.
func (p *Prover) failure(parent, limited context.Context, err error) Proof {
	if parent.Err() != nil {
		return Proof{Code: CodeCancelled, Message: "the proof was cancelled"}
	}
	if errors.Is(err, ErrUnreachable) {
		return Proof{Code: CodeUnreachable, Message: fmt.Sprintf("containerd does not answer: check that it runs (%v)", err)}
	}
	stage := StagePrepare
	if failed, ok := errors.AsType[*RunError](err); ok {
		stage = failed.Stage
	}
	if limited.Err() != nil {
		// Late. A containerd that does not answer either is to blame itself,
		// and the time spent waiting for our own turn is nobody's failure.
		ctx, cancel := context.WithTimeout(parent, doubtDeadline)
		defer cancel()
		if _, err := p.node.Server(ctx); err != nil && parent.Err() == nil {
			return Proof{Code: CodeUnreachable, Message: fmt.Sprintf("containerd stopped answering: check that it runs (%v)", err)}
		}
		if stage == StageConnect || stage == StagePrepare {
			return Proof{Code: CodeInternal, Message: fmt.Sprintf("the proof did not get to the runtime within %v: %v", p.deadline, err)}
		}
		return Proof{Code: CodeTimeout, Message: fmt.Sprintf("the runtime did not run the probe within %v (it hung at %q): look at the shim's messages in containerd's log", p.deadline, stage)}
	}
	switch {
	case errors.Is(err, ErrShimNotFound):
		return Proof{Code: CodeNotFound, Message: fmt.Sprintf("containerd does not find the shim: install it into %s (%v)", installDir, err)}
	case stage == StageCreate:
		return Proof{Code: CodeCreateFailed, Message: fmt.Sprintf("the shim could not create the probe's task: %v", err)}
	case stage == StageStart || stage == StageAnswer:
		return Proof{Code: CodeStartFailed, Message: fmt.Sprintf("the shim could not start the probe: %v", err)}
	default:
		return Proof{Code: CodeInternal, Message: fmt.Sprintf("the proof could not be prepared: %v", err)}
	}
}

func firstProblem(runtime Runtime, otherwise string) string {
	if len(runtime.Problems) > 0 {
		return runtime.Problems[0]
	}
	return otherwise
}

// quoted makes a process's last words fit into a sentence.
func quoted(stderr []byte) string {
	if text := strings.TrimSpace(string(stderr)); text != "" {
		return fmt.Sprintf(": %q", text[:min(len(text), 200)])
	}
	return ""
}

// clip keeps a message to one line of at most maxMessage bytes of valid UTF-8.
func clip(message string) string {
	message = strings.Join(strings.Fields(message), " ")
	if len(message) > maxMessage {
		message = message[:maxMessage-len("…")] + "…"
	}
	if !utf8.ValidString(message) {
		message = strings.ToValidUTF8(message, "")
	}
	return message
}
