package submit

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

// Defaults of Limits.
const (
	defaultReceives  = 32
	defaultSubmits   = 8
	defaultAdmission = 15 * time.Second
	defaultStall     = 10 * time.Second
	defaultReceive   = 10 * time.Minute
	defaultWork      = 2 * time.Minute

	// refusedBody is how long the rest of a refused body may take: what is on
	// its way already arrives, a stalled sender does not delay its answer.
	refusedBody = 500 * time.Millisecond
	// answerWrite is how long a client may take to read an answer whole. Who
	// does not read would keep its connection and what serves it for ever. Logs,
	// which have no end, have a limit of their own.
	answerWrite = time.Minute
)

// Server is the API. Its methods are safe for concurrent use.
type Server struct {
	o        Options
	log      *slog.Logger
	metrics  *metrics
	receives *places
	submits  *places
	openapi  []byte
	quotas   *quotas // nil: none
	// accessEvery and answerWrite are constants to all but tests.
	accessEvery, answerWrite time.Duration

	// stopping ends waits, followed logs and long polls.
	stopping context.Context
	stop     context.CancelFunc
}

// New checks the options, prepares the temporary directory (what an earlier
// run left there is removed) and registers metrics.
func New(o Options) (*Server, error) {
	switch {
	case o.Store == nil:
		return nil, errors.New("submit: no store given")
	case o.Checker == nil:
		return nil, errors.New("submit: no checker given")
	case o.Publisher == nil:
		return nil, errors.New("submit: no publisher given")
	case o.URLs == nil:
		return nil, errors.New("submit: no URL builder given")
	case o.TempDir == "":
		return nil, errors.New("submit: no temporary directory given")
	}
	l := &o.Limits
	if l.ModuleBytes <= 0 || l.ModuleBytes > v1alpha1.MaxModuleBytes {
		l.ModuleBytes = v1alpha1.MaxModuleBytes
	}
	l.Receives = cmp.Or(l.Receives, defaultReceives)
	l.Submits = cmp.Or(l.Submits, defaultSubmits)
	l.Admission = cmp.Or(l.Admission, defaultAdmission)
	l.Stall = cmp.Or(l.Stall, defaultStall)
	l.Receive = cmp.Or(l.Receive, defaultReceive)
	l.Work = cmp.Or(l.Work, defaultWork)
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Image == nil {
		o.Image = func(a v1alpha1.Artifact) string {
			ref := a.Repository + "@" + a.Digest
			if a.Registry != "" {
				ref = a.Registry + "/" + ref
			}
			return ref
		}
	}
	if err := clearTemp(o.TempDir); err != nil {
		return nil, fmt.Errorf("submit: %w", err)
	}
	m, err := newMetrics(o.Registerer, o.Store)
	if err != nil {
		return nil, fmt.Errorf("submit: register metrics: %w", err)
	}
	s := &Server{
		o: o, log: o.Logger, metrics: m,
		receives: newPlaces(l.Receives),
		submits:  newPlaces(l.Submits),
		openapi:  buildOpenAPI(o.Version, o.Access != nil),
		quotas:   newQuotas(o.Quotas, o.Store, o.Now), accessEvery: accessEvery, answerWrite: answerWrite,
	}
	s.stopping, s.stop = context.WithCancel(context.Background())
	return s, nil
}

// Close ends waits for readiness (they answer 202), followed logs and long
// polls, so that the HTTP server around can shut down without waiting for
// their time limits. Requests go on being answered.
func (s *Server) Close() { s.stop() }

// operation is one method on one path. The table of them is what is routed,
// what OPTIONS-less 405 answers are made of, and what the OpenAPI document lists.
type operation struct {
	method, path string
	// query lists the parameters that are accepted; others are refused.
	query []string
	serve func(s *Server, w http.ResponseWriter, r *http.Request) error
}

// needsCaller says whether access control, where there is any, guards it.
func (o operation) needsCaller() bool { return strings.HasPrefix(o.path, "/v1/") }

// change is what the audit log calls the operation; empty for what changes
// nothing that a caller wants.
func (o operation) change() string {
	if !o.needsCaller() {
		return ""
	}
	return map[string]string{"PUT": "submit", "PATCH": "patch", "DELETE": "delete", "POST": "rollback"}[o.method]
}

var publicOperations = []operation{
	{"GET", "/v1/functions", []string{"tenant", "limit", "continue"}, (*Server).list},
	{"PUT", "/v1/functions/{name}", []string{"tenant", "wait", "memoryMiB", "timeoutMs", "concurrency", "runtime"}, (*Server).put},
	{"GET", "/v1/functions/{name}", nil, (*Server).get},
	{"PATCH", "/v1/functions/{name}", []string{"wait"}, (*Server).patch},
	{"DELETE", "/v1/functions/{name}", nil, (*Server).delete},
	{"GET", "/v1/functions/{name}/revisions", nil, (*Server).revisions},
	{"POST", "/v1/functions/{name}/rollback", []string{"wait"}, (*Server).rollback},
	{"GET", "/v1/functions/{name}/logs", []string{"follow", "tail", "since"}, (*Server).logs},
	{"GET", "/openapi.json", nil, (*Server).serveOpenAPI},
	{"GET", "/livez", []string{"verbose"}, (*Server).livez},
	{"GET", "/readyz", []string{"verbose"}, (*Server).readyz},
	{"GET", "/metrics", nil, (*Server).serveMetrics},
	{"GET", "/", nil, (*Server).front},
}

var nodeOperations = []operation{
	{"GET", "/node/v1/desired", []string{"after", "wait"}, (*Server).desired},
	{"POST", "/node/v1/report", nil, (*Server).report},
}

// Handler serves the public API: /v1, /openapi.json, /livez, /readyz,
// /metrics and the front page.
func (s *Server) Handler() http.Handler {
	// A page that a function serves is on the same machine, often the same
	// site: it must not be able to submit in its visitor's name.
	guard := http.NewCrossOriginProtection()
	guard.SetDenyHandler(s.endpoint("", func(s *Server, _ http.ResponseWriter, r *http.Request) error {
		auditOf(r.Context()).begin("cross-origin", "", "")
		return newProblem("cross-origin", "This request came from a web page of another origin. Send it from a program, or from a page of this origin.")
	}))
	return guard.Handler(s.mux(publicOperations))
}

// NodeHandler serves the calls of a node under /node/v1/. It hands out
// secrets and, without Options.NodeAccess, believes what it is told: never
// expose it beyond a socket then, and never without TLS.
func (s *Server) NodeHandler() http.Handler { return s.mux(nodeOperations) }

func (s *Server) mux(operations []operation) http.Handler {
	byPath := map[string]map[string]operation{}
	for _, op := range operations {
		if byPath[op.path] == nil {
			byPath[op.path] = map[string]operation{}
		}
		byPath[op.path][op.method] = op
	}
	mux := http.NewServeMux()
	for path, methods := range byPath {
		pattern := path
		if path == "/" {
			pattern = "/{$}"
		}
		mux.Handle(pattern, s.endpoint(path, func(s *Server, w http.ResponseWriter, r *http.Request) error {
			method := r.Method
			if method == http.MethodHead {
				method = http.MethodGet
			}
			op, ok := methods[method]
			if !ok {
				return notAllowed(r.Method, methods)
			}
			auditOf(r.Context()).begin(op.change(), r.PathValue("name"), r.URL.Query().Get("tenant"))
			if op.needsCaller() {
				var err error
				if r, err = s.authenticate(r); err != nil {
					return err
				}
			}
			if err := checkQuery(r, op.query); err != nil {
				return err
			}
			return op.serve(s, w, r)
		}))
	}
	mux.Handle("/", s.endpoint("", func(*Server, http.ResponseWriter, *http.Request) error {
		return newProblem("not-found", "There is nothing at this path; /openapi.json lists what there is.")
	}))
	return mux
}

func notAllowed(method string, methods map[string]operation) error {
	var allow []string
	for m := range methods {
		allow = append(allow, m)
		if m == http.MethodGet {
			allow = append(allow, http.MethodHead)
		}
	}
	slices.Sort(allow)
	p := newProblem("method-not-allowed", "%.20s is not allowed here; allowed: %s.", method, strings.Join(allow, ", "))
	p.header = map[string]string{"Allow": strings.Join(allow, ", ")}
	return p
}

// checkQuery refuses what a handler would silently not see.
func checkQuery(r *http.Request, known []string) error {
	q, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return newProblem("invalid-parameter", "The query string is malformed.").because(err)
	}
	for name, values := range q {
		if !slices.Contains(known, name) {
			accepted := "none is accepted here"
			if len(known) > 0 {
				accepted = "accepted here: " + strings.Join(known, ", ")
			}
			return newProblem("unknown-parameter", "The query parameter %.60q is not known; %s.", name, accepted)
		}
		if len(values) > 1 {
			return newProblem("invalid-parameter", "The query parameter %q is given more than once.", name)
		}
	}
	return nil
}

// endpoint is what surrounds every handler: identifier, problem, metrics and
// one log line. route is the path pattern, empty for what is not routed.
func (s *Server) endpoint(route string, serve func(*Server, http.ResponseWriter, *http.Request) error) http.Handler {
	return http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		started := time.Now()
		id := newRequestID()
		w := &responseWriter{ResponseWriter: rw, limit: s.answerWrite}
		// What an earlier answer on this connection left is not for this one,
		// which may begin with an interim one (100 Continue) and last.
		_ = http.NewResponseController(rw).SetWriteDeadline(time.Time{}) // not every ResponseWriter can
		h := w.Header()
		h.Set("Hearth-Request-Id", id)
		h.Set("X-Content-Type-Options", "nosniff")
		ctx, audit := s.newAudit(context.WithValue(r.Context(), requestIDKey{}, id), r, id)
		r = r.WithContext(s.counting(ctx))

		err := serve(s, w, r)
		var p *problem
		// net/http also cancels the context when a read deadline passes, so with
		// an answer at hand it says nothing of the client.
		gone := err != nil && (errors.Is(err, errClientGone) || (r.Context().Err() != nil && !errors.As(err, &p)))
		begun := w.status != 0
		if err != nil && !gone {
			p = toProblem(err)
			if !begun {
				if r.ContentLength != 0 {
					// net/http reads on in a refused body before it answers.
					_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(refusedBody))
				}
				p.reply("urn:uuid:" + id).write(w)
			}
		}
		audit.end(p, gone)
		code := cmp.Or(w.status, http.StatusOK)
		if gone {
			code = 499 // as others log it: the client closed the request
		}
		s.metrics.request(route, r.Method, code, time.Since(started))
		s.logRequest(r, route, id, code, time.Since(started), p)
		if begun && p != nil {
			// Headers are out; cut the connection so that the client notices.
			panic(http.ErrAbortHandler)
		}
	})
}

// logRequest writes one line a request, with nothing that a client chose but
// method and path.
func (s *Server) logRequest(r *http.Request, route, id string, code int, took time.Duration, p *problem) {
	level := slog.LevelDebug
	switch {
	case code >= 500 && code != http.StatusServiceUnavailable && code != http.StatusInsufficientStorage:
		level = slog.LevelError
	case code >= 500:
		level = slog.LevelWarn
	case r.Method != http.MethodGet && r.Method != http.MethodHead && !strings.HasPrefix(route, "/node/"):
		level = slog.LevelInfo
	}
	ctx := context.WithoutCancel(r.Context())
	if !s.log.Enabled(ctx, level) {
		return
	}
	attrs := []slog.Attr{
		slog.String("request", id), slog.String("method", r.Method), slog.String("path", r.URL.Path),
		slog.Int("status", code), slog.Duration("took", took.Round(time.Microsecond)),
	}
	if p != nil {
		attrs = append(attrs, slog.String("problem", p.kind.Code))
		if p.cause != nil {
			attrs = append(attrs, slog.Any("error", p.cause))
		}
	}
	s.log.LogAttrs(ctx, level, "api request", attrs...)
}

// responseWriter remembers the status, and bounds from then on how long the
// client may take to read.
type responseWriter struct {
	http.ResponseWriter
	limit  time.Duration
	status int
}

func (w *responseWriter) begin(status int) {
	if w.status == 0 {
		w.status = status
		_ = http.NewResponseController(w.ResponseWriter).SetWriteDeadline(time.Now().Add(w.limit)) // not every ResponseWriter can
	}
}

func (w *responseWriter) WriteHeader(code int) {
	if code >= 200 {
		w.begin(code)
	}
	w.ResponseWriter.WriteHeader(code)
}

func (w *responseWriter) Write(p []byte) (int, error) {
	w.begin(http.StatusOK)
	return w.ResponseWriter.Write(p)
}

// Unwrap is for http.ResponseController.
func (w *responseWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

type requestIDKey struct{}

func requestInstance(ctx context.Context) string {
	id, _ := ctx.Value(requestIDKey{}).(string)
	return "urn:uuid:" + id
}

// newRequestID returns a random UUID (RFC 9562, version 4).
func newRequestID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// place waits for one of a limited number of places, in the tenant's turn, and
// returns the function that gives it back.
func (s *Server) place(ctx context.Context, of *places, tenant string) (func(), error) {
	ok, err := of.take(ctx, tenant, s.o.Limits.Admission)
	switch {
	case err != nil:
		return nil, errClientGone
	case !ok:
		return nil, newProblem("too-many-submits", "Too many functions are being submitted at once. Send the same request again in a moment.")
	}
	return of.give, nil
}

// untilStop is a request's context that also ends with Close.
func (s *Server) untilStop(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	unhook := context.AfterFunc(s.stopping, cancel)
	return ctx, func() { unhook(); cancel() }
}
