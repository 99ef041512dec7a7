package submit

import (
	"context"
	"log/slog"
	"net/http"
	"strings"

	"github.com/hearth-sh/hearth/internal/access"
	"github.com/hearth-sh/hearth/internal/function"
)

// maxForwarded bounds what is logged of a header that anybody can send.
const maxForwarded = 256

// auditRecord becomes the one line that says who changed what, or was not let.
// Its methods do nothing on nil, which is what there is without an audit log.
// It belongs to the goroutine of its request.
type auditRecord struct {
	log *slog.Logger
	id  string
	r   *http.Request

	action           string // of the operation; empty: changes nothing
	caller           access.Caller
	tenant, function string
	revision         int
	digest           string
	replayed         bool
	written          bool
}

type auditKey struct{}

func auditOf(ctx context.Context) *auditRecord {
	a, _ := ctx.Value(auditKey{}).(*auditRecord)
	return a
}

// newAudit puts a record for the request into its context.
func (s *Server) newAudit(ctx context.Context, r *http.Request, id string) (context.Context, *auditRecord) {
	if s.o.Audit == nil {
		return ctx, nil
	}
	a := &auditRecord{log: s.o.Audit, id: id, r: r}
	return context.WithValue(ctx, auditKey{}, a), a
}

// begin says what the request is about to do.
func (a *auditRecord) begin(action, name, tenant string) {
	if a == nil || action == "" {
		return
	}
	a.action = action
	// What is not a name is a client's text.
	if function.ValidateName(name) == nil {
		a.function = name
	}
	if function.ValidateTenant(tenant) == nil {
		a.tenant = tenant
	}
}

func (a *auditRecord) setCaller(c access.Caller) {
	if a != nil {
		a.caller = c
	}
}

func (a *auditRecord) setTenant(tenant string) {
	if a != nil {
		a.tenant = tenant
	}
}

func (a *auditRecord) setDigest(digest string) {
	if a != nil {
		a.digest = digest
	}
}

func (a *auditRecord) setReplayed() {
	if a != nil {
		a.replayed = true
	}
}

// recorded writes the line as soon as the change is durable: whatever becomes
// of the wait for a node, or of this process, it happened.
func (a *auditRecord) recorded(res function.Result) {
	if a == nil {
		return
	}
	f := res.Function
	a.tenant, a.revision, a.digest = f.Tenant, f.Wanted, f.Revision.ModuleDigest
	outcome := "accepted"
	if res.Unchanged {
		outcome = "unchanged"
	}
	a.write(outcome, "")
}

// deleted is recorded for a function that is gone; was is what it was.
func (a *auditRecord) deleted(was *function.Function) {
	if a == nil {
		return
	}
	if was != nil {
		a.tenant, a.revision, a.digest = was.Tenant, was.Wanted, was.Revision.ModuleDigest
	}
	a.write("accepted", "")
}

// end writes the line of a request that changed nothing. p is its problem,
// nil when there is none; gone says that the client left.
func (a *auditRecord) end(p *problem, gone bool) {
	if a == nil || a.action == "" || a.written {
		return
	}
	switch {
	case gone:
		a.write("abandoned", "")
	case p == nil && a.replayed:
		a.write("replayed", "")
	case p == nil:
		a.write("resumed", "") // an earlier request's change was answered
	case p.kind.Status >= 500:
		a.write("failed", p.kind.Code)
	default:
		a.write("refused", p.kind.Code)
	}
}

func (a *auditRecord) write(outcome, problem string) {
	a.written = true
	attrs := []slog.Attr{
		slog.String("outcome", outcome), slog.String("action", a.action),
		slog.String("user", a.caller.User), slog.Int("groups", len(a.caller.Groups)),
		slog.String("tenant", a.tenant), slog.String("function", a.function),
		slog.Int("revision", a.revision), slog.String("digest", a.digest),
		slog.String("request", a.id), slog.String("source", a.r.RemoteAddr),
	}
	if problem != "" {
		attrs = append(attrs, slog.String("problem", problem))
	}
	// What proxies say; whoever reaches us without one can say anything.
	if via := strings.Join(a.r.Header.Values("X-Forwarded-For"), ", "); via != "" {
		attrs = append(attrs, slog.String("forwarded", via[:min(len(via), maxForwarded)]))
	}
	a.log.LogAttrs(context.WithoutCancel(a.r.Context()), slog.LevelInfo, "function change", attrs...)
}
