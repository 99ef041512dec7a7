package submit

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/access"
	"github.com/hearth-sh/hearth/internal/function"
)

// ProblemBase is what every problem type begins with; the code follows.
const ProblemBase = "https://hearth.sh/problems/"

// ProblemKind is one line of the table of everything that this API answers
// other than success. Codes are part of the API: added, never renamed.
type ProblemKind struct {
	Code   string
	Status int
	Title  string
	// Retryable says whether the same request can succeed later. A cause that
	// knows better (a compiler that was only short of memory) overrides it.
	Retryable bool
}

var problemKinds = []ProblemKind{
	{"malformed-request", 400, "The request cannot be understood", false},
	{"invalid-parameter", 400, "A query parameter or header has an invalid value", false},
	{"unknown-parameter", 400, "A query parameter is not known", false},
	{"invalid-name", 400, "The name cannot be a function's or tenant's", false},
	{"invalid-idempotency-key", 400, "The Idempotency-Key is malformed", false},
	{"unauthorized", 401, "The request names nobody who is known here", false},
	{"forbidden", 403, "You may not do this", false},
	{"quota-exceeded", 403, "The tenant has no room for this", false},
	{"cross-origin", 403, "A web page of another origin may not do this", false},
	{"not-found", 404, "There is nothing at this path", false},
	{"function-not-found", 404, "There is no function of that name", false},
	{"tenant-not-found", 404, "There is no tenant of that name", false},
	{"revision-not-found", 404, "The function has no such revision", false},
	{"method-not-allowed", 405, "The method is not allowed here", false},
	{"body-stalled", 408, "The request's body did not arrive in time", true},
	{"name-taken", 409, "The name belongs to another tenant", false},
	{"request-in-flight", 409, "A request with this Idempotency-Key is being worked on", true},
	{"no-rollback-target", 409, "There is no earlier revision to roll back to", false},
	{"precondition-failed", 412, "The function is not in the expected state", false},
	{"module-too-large", 413, "The module is too large", false},
	{"body-too-large", 413, "The request's body is too large", false},
	{"unsupported-media-type", 415, "The body is of a type that is not accepted here", false},
	{"not-wasm", 415, "The module is not WebAssembly", false},
	{"idempotency-mismatch", 422, "The Idempotency-Key was used for another request", false},
	{"invalid-settings", 422, "A setting is outside its limits", false},
	{"runtime-unsupported", 422, "A setting cannot be honoured here", false},
	{"component-unsupported", 422, "Components are not supported yet", false},
	{"native-artifact", 422, "The module is native code", false},
	{"malformed-module", 422, "The module cannot be decoded", false},
	{"invalid-module", 422, "The module is not valid", false},
	{"unsupported-import", 422, "The module imports what is not provided", false},
	{"memory-over-limit", 422, "The module needs more memory than its limit", false},
	{"limit-exceeded", 422, "The module exceeds a limit", false},
	{"no-start-function", 422, "The module has no _start function", false},
	{"unsupported-feature", 422, "The module uses a feature that is not supported", false},
	{"compile-timeout", 422, "The module takes too long to compile", false},
	{"compile-memory", 422, "The module takes too much memory to compile", false},
	{"compiler-crashed", 422, "The module cannot be compiled", false},
	{"image-invalid", 422, "The image is not a WebAssembly artifact that can run here", false},
	{"image-not-found", 422, "The image does not exist", false},
	{"registry-unauthorized", 422, "The registry does not let us pull the image", false},
	{"revision-failed", 422, "The revision cannot be served", false},
	{"too-many-submits", 429, "Too many functions are being submitted", true},
	{"too-many-changes", 429, "The tenant changes its functions too often", true},
	{"too-many-api-requests", 429, "The tenant asks too often", true},
	{"internal", 500, "Something unexpected went wrong on our side", true},
	{"digest-mismatch", 502, "The registry returned other bytes than it promised", true},
	{"registry-refused", 502, "The registry does not take the module", false},
	{"registry-unavailable", 503, "The registry cannot be reached", true},
	{"logs-unavailable", 503, "The logs cannot be read right now", true},
	{"compiler-unavailable", 503, "The module cannot be checked right now", true},
	{"not-ready", 503, "The API is not ready", true},
	{"access-unavailable", 503, "It cannot be found out right now who may do this", true},
	{"not-installed", 503, "The cluster does not know functions yet", false},
	{"store-unavailable", 503, "The function database is not available", true},
	{"disk-full", 507, "There is no disk space left", true},
}

var problemByCode = func() map[string]ProblemKind {
	m := make(map[string]ProblemKind, len(problemKinds))
	for _, k := range problemKinds {
		m[k.Code] = k
	}
	return m
}()

// Problems returns the table of all problem types, ordered by status.
func Problems() []ProblemKind { return append([]ProblemKind(nil), problemKinds...) }

// Retry-After values, in seconds.
const (
	retrySoon = 2  // a place becomes free, a request in flight ends
	retryIn   = 5  // a process or registry is restarted
	retryDisk = 30 // someone has to make room
)

// problem is an error with its answer.
type problem struct {
	kind       ProblemKind
	detail     string
	retryAfter int // seconds; 0: none
	header     map[string]string
	cause      error // for the log; never shown
}

func (p *problem) Error() string {
	if p.cause != nil {
		return fmt.Sprintf("%s: %v", p.kind.Code, p.cause)
	}
	return p.kind.Code + ": " + p.detail
}

func (p *problem) Unwrap() error { return p.cause }

// newProblem panics on a code that is not in the table; a test calls it for all.
func newProblem(code, format string, args ...any) *problem {
	kind, ok := problemByCode[code]
	if !ok {
		panic("problem code not in the table: " + code)
	}
	p := &problem{kind: kind, detail: fmt.Sprintf(format, args...)}
	switch {
	case code == "disk-full":
		p.retryAfter = retryDisk
	case kind.Status == http.StatusTooManyRequests, code == "request-in-flight":
		p.retryAfter = retrySoon
	case kind.Status == http.StatusServiceUnavailable && kind.Retryable:
		p.retryAfter = retryIn
	}
	return p
}

func (p *problem) because(err error) *problem {
	p.cause = err
	return p
}

// errClientGone: nobody is there to be answered.
var errClientGone = errors.New("the client went away")

// toProblem finds the answer to an error.
func toProblem(err error) *problem {
	var (
		p  *problem
		ce *CheckError
		pe *PublishError
		ve *function.ValidationError
		ue *access.UnauthenticatedError
		de *access.DeniedError
		ne *access.NodeError
	)
	switch {
	case errors.As(err, &p):
		return p
	case errors.As(err, &ue):
		return unauthorized(ue)
	case errors.As(err, &de):
		return forbidden(de)
	case errors.As(err, &ne):
		return newProblem("forbidden", "%s.", ne)
	case errors.Is(err, access.ErrUnavailable):
		return newProblem("access-unavailable", "Who may do this cannot be found out right now; the server's log says why. Nothing was changed; send the same request again.").because(err)
	case errors.As(err, &ce):
		return coded(ce.Code, ce.Detail, ce.Retryable, err)
	case errors.As(err, &pe):
		return coded(pe.Code, pe.Detail, pe.Retryable, err)
	case errors.As(err, &ve):
		if ve.Field == "name" || ve.Field == "tenant" {
			return newProblem("invalid-name", "%s", sentence(ve.Error()))
		}
		return newProblem("invalid-settings", "%s", sentence(ve.Error()))
	case errors.Is(err, function.ErrNotFound):
		return newProblem("function-not-found", "There is no function of that name. Submit it with PUT, or list the functions at /v1/functions.")
	case errors.Is(err, function.ErrRevisionNotFound):
		return newProblem("revision-not-found", "There is no such revision (any more); GET …/revisions lists those that can be rolled back to.")
	case errors.Is(err, function.ErrTaken):
		return newProblem("name-taken", "The name belongs to a function of another tenant. Choose another name.")
	case errors.Is(err, function.ErrPrecondition):
		return newProblem("precondition-failed", "The function was changed since you read it, does not exist, or exists already. GET it again and decide.")
	case errors.Is(err, function.ErrNoRollbackTarget):
		return newProblem("no-rollback-target", "No earlier revision has ever answered requests. Name one with {\"revision\": N}.")
	case errors.Is(err, function.ErrDiskFull), errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return newProblem("disk-full", "There is no disk space left. Nothing was changed; free some space and send the same request again.").because(err)
	case errors.Is(err, function.ErrTenantNotFound):
		return newProblem("tenant-not-found", "A tenant is a namespace of the cluster, and there is none of that name. Create it, or name another with ?tenant=.")
	case errors.Is(err, function.ErrCRDMissing):
		return newProblem("not-installed", "The cluster does not know functions.hearth.sh. Install Hearth's chart, which brings it.").because(err)
	case errors.Is(err, function.ErrUnavailable):
		return newProblem("store-unavailable", "The cluster, which keeps the functions, does not answer right now. Send the same request again.").because(err)
	case errors.Is(err, function.ErrClosed), errors.Is(err, function.ErrReadOnly), errors.Is(err, function.ErrCorrupt):
		return newProblem("store-unavailable", "The function database cannot be used right now; the server's log says why.").because(err)
	case errors.Is(err, context.DeadlineExceeded):
		return newProblem("compiler-unavailable", "Checking and publishing the module took too long. Nothing was changed; send the same request again.").because(err)
	}
	return newProblem("internal", "Nothing was recorded. Send the same request again; if it keeps happening, look for this instance in the server's log.").because(err)
}

// unauthorized is the answer to a request without a good token, with the
// challenge of RFC 6750, section 3.
func unauthorized(e *access.UnauthenticatedError) *problem {
	detail := sentence(e.Reason)
	if e.Remedy != "" {
		detail += " " + sentence(e.Remedy)
	}
	p := newProblem("unauthorized", "%s", detail)
	challenge := `Bearer realm="` + v1alpha1.Group + `"`
	if e.Presented {
		challenge += `, error="invalid_token"`
	}
	p.header = map[string]string{"WWW-Authenticate": challenge}
	return p
}

func forbidden(e *access.DeniedError) *problem {
	remedy := "Ask whoever looks after that namespace for the right."
	if e.Action.Tenant == "" {
		remedy = "Name a namespace with ?tenant=."
	}
	p := newProblem("forbidden", "%s. %s", e, remedy)
	if e.Why != "" {
		return p.because(errors.New(e.Why))
	}
	return p
}

// coded turns a code of the checker, a publisher or a node into a problem.
func coded(code, detail string, retryable bool, err error) *problem {
	kind, ok := problemByCode[code]
	if !ok {
		return newProblem("internal", "The step failed with the code %q. Look for this instance in the server's log.", code).because(err)
	}
	if retryable && kind.Status == http.StatusUnprocessableEntity {
		// Not the module's fault after all: the compiler was killed for lack of
		// memory, or was starved of processor time.
		p := newProblem("compiler-unavailable", "%s", detail).because(err)
		if len(code) > 8 && (code[:5] == "image" || code[:8] == "registry") {
			p = newProblem("registry-unavailable", "%s", detail).because(err)
		}
		return p
	}
	p := newProblem(code, "%s", detail).because(err)
	p.kind.Retryable = retryable || kind.Retryable
	return p
}

// failed is the answer for a revision that no node could serve. What answers
// instead is said: it is the first thing its author wants to know.
func failed(f function.Function) *problem {
	recorded, e := fmt.Sprintf("Revision %d was recorded, but ", f.Wanted), f.Revision.Error
	instead := ""
	if f.Active != 0 && f.Active != f.Wanted {
		instead = fmt.Sprintf("; revision %d goes on answering", f.Active)
	}
	if e == nil {
		return newProblem("revision-failed", "%sno node can serve it%s.", recorded, instead)
	}
	detail := strings.TrimSuffix(e.Detail, ".") + instead
	kind, ok := problemByCode[e.Code]
	if !ok || kind.Status < 413 {
		return newProblem("revision-failed", "%scannot be served (%s): %s", recorded, e.Code, detail)
	}
	// The node has given up: the same request makes a new revision, which is
	// worth trying only if the trouble may have passed.
	return newProblem(e.Code, "%scannot be served: %s", recorded, detail)
}

func (p *problem) document(instance string) v1alpha1.Problem {
	return v1alpha1.Problem{
		Type: ProblemBase + p.kind.Code, Title: p.kind.Title, Status: p.kind.Status,
		Detail: p.detail, Instance: instance, Retryable: p.kind.Retryable,
	}
}

// reply makes the problem an answer.
func (p *problem) reply(instance string) *reply {
	body, err := json.Marshal(p.document(instance))
	if err != nil {
		panic(err) // strings, a bool and an int
	}
	h := map[string]string{"Content-Type": "application/problem+json", "Cache-Control": "no-store"}
	for k, v := range p.header {
		h[k] = v
	}
	if p.retryAfter > 0 {
		h["Retry-After"] = strconv.Itoa(p.retryAfter)
	}
	return &reply{status: p.kind.Status, header: h, body: append(body, '\n')}
}

// sentence makes an error's text one that can stand alone.
func sentence(s string) string {
	if s == "" {
		return s
	}
	return s + "."
}

// reply is a whole answer, small enough to be stored for a replay.
type reply struct {
	status int
	header map[string]string
	body   []byte
}

func (a *reply) write(w http.ResponseWriter) {
	h := w.Header()
	for k, v := range a.header {
		h.Set(k, v)
	}
	if a.status != http.StatusNoContent && a.status != http.StatusNotModified {
		h.Set("Content-Length", strconv.Itoa(len(a.body)))
	}
	w.WriteHeader(a.status)
	_, _ = w.Write(a.body) // a client that left is seen elsewhere
}

// jsonReply marshals v, which holds no secrets and cannot fail to marshal.
func jsonReply(status int, v any, header map[string]string) *reply {
	body, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		panic(err)
	}
	h := map[string]string{"Content-Type": "application/json", "Cache-Control": "no-store"}
	for k, v := range header {
		h[k] = v
	}
	return &reply{status: status, header: h, body: append(body, '\n')}
}

// listReply is jsonReply for what can be long, and is read by programs: on one
// line, which takes half the bytes and half the time.
func listReply(v any) *reply {
	body, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return &reply{
		status: http.StatusOK, body: append(body, '\n'),
		header: map[string]string{"Content-Type": "application/json", "Cache-Control": "no-store"},
	}
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
