package health

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sync/singleflight"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

const (
	// sectionsWait bounds collecting the sections of a status: the command
	// that asks gives up after 800 ms, and half a document beats none.
	sectionsWait = 500 * time.Millisecond
	// readHeaderWait and idleWait bound a connection on the control socket;
	// its peers are local.
	readHeaderWait = 2 * time.Second
	idleWait       = 2 * time.Minute
	// shutdownWait lets answers under way end; none takes longer than
	// sectionsWait.
	shutdownWait = time.Second
	// maxScrapes bounds what collecting metrics can cost at once.
	maxScrapes = 4
	// maxHeaderBytes is ample for what our own client sends.
	maxHeaderBytes = 16 << 10
)

// Sections are the parts of a NodeStatus that are not checks. nil means not known.
type Sections struct {
	Functions *v1alpha1.FunctionsStatus
	Store     *v1alpha1.StoreStatus
	Engine    *v1alpha1.EngineStatus
	Disk      *v1alpha1.DiskStatus
	// The following are of nodes of a cluster only.
	Runtimes     []v1alpha1.RuntimeStatus
	Images       *v1alpha1.ImagesStatus
	Instance     *v1alpha1.InstanceStatus
	Interruption *v1alpha1.InterruptionStatus
}

// ServerOptions configure a Server.
type ServerOptions struct {
	Registry *Registry // required
	Node     string
	Versions v1alpha1.Versions
	// Sections collects what a status shows beside the checks. It must return
	// soon after its context ends (500 ms); an answer that is later is left out of the
	// document. Calls never overlap. May be nil.
	Sections func(context.Context) Sections
	// Gatherer feeds /metrics; nil means no such path.
	Gatherer prometheus.Gatherer
	// Routes adds to the control socket's routes; nil for none. They are not
	// served to the network.
	Routes func(*http.ServeMux)
	Logger *slog.Logger
}

// Server answers on the agent's control socket:
//
//	GET /v1/status   v1alpha1.NodeStatus as JSON
//	GET /livez       200 or 503, text
//	GET /readyz      200 or 503, text (?verbose lists every check)
//	GET /metrics     Prometheus exposition format
type Server struct {
	o      ServerOptions
	flight singleflight.Group
}

// NewServer returns a server; Handler or Serve puts it to work.
func NewServer(o ServerOptions) *Server {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return &Server{o: o}
}

// Handler returns the routes.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, r *http.Request) {
		writeJSON(w, s.Status(r.Context()))
	})
	if s.o.Routes != nil {
		s.o.Routes(mux)
	}
	s.probes(mux)
	return mux
}

func (s *Server) probes(mux *http.ServeMux) {
	probes := Handler(s.o.Registry)
	mux.Handle("GET /livez", probes)
	mux.Handle("GET /readyz", probes)
	if s.o.Gatherer != nil {
		mux.Handle("GET /metrics", promhttp.HandlerFor(s.o.Gatherer, promhttp.HandlerOpts{MaxRequestsInFlight: maxScrapes}))
	}
}

// ServeProbes answers /livez, /readyz and /metrics, and nothing else, on a
// listener of the network, as Serve does on the control socket.
func (s *Server) ServeProbes(ctx context.Context, ln net.Listener) error {
	mux := http.NewServeMux()
	s.probes(mux)
	return s.serve(ctx, ln, mux)
}

// Serve answers on ln until ctx ends, then lets answers under way finish for
// up to a second. It closes ln and returns nil when ctx ended it.
func (s *Server) Serve(ctx context.Context, ln net.Listener) error {
	return s.serve(ctx, ln, s.Handler())
}

func (s *Server) serve(ctx context.Context, ln net.Listener, handler http.Handler) error {
	server := &http.Server{
		Handler:           handler,
		ReadHeaderTimeout: readHeaderWait,
		IdleTimeout:       idleWait,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          slog.NewLogLogger(s.o.Logger.Handler(), slog.LevelDebug),
	}
	done := make(chan error, 1)
	go func() { done <- server.Serve(ln) }()
	select {
	case err := <-done:
		return fmt.Errorf("serve status and probes: %w", err)
	case <-ctx.Done():
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownWait)
	defer cancel()
	if err := server.Shutdown(stop); err != nil {
		_ = server.Close()
	}
	if err := <-done; !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve status and probes: %w", err)
	}
	return nil
}

// Status returns the node's status now. It takes at most 500 ms.
func (s *Server) Status(ctx context.Context) v1alpha1.NodeStatus {
	sections := s.sections(ctx)
	if e := sections.Engine; e != nil && e.Workers == nil {
		withList := *e // the collector's own value is not ours to change
		withList.Workers = []v1alpha1.WorkerStatus{}
		sections.Engine = &withList
	}
	snapshot := s.o.Registry.Snapshot()
	return v1alpha1.NodeStatus{
		APIVersion: v1alpha1.APIVersion,
		Kind:       "NodeStatus",
		Node:       s.o.Node,
		Time:       snapshot.Time,
		StartedAt:  snapshot.StartedAt,
		Versions:   s.o.Versions,
		State:      snapshot.State,
		Since:      snapshot.Since,
		Summary:    snapshot.Summary,
		Checks:     snapshot.Checks,
		Functions:  sections.Functions,
		Store:      sections.Store,
		Engine:     sections.Engine,
		Disk:       sections.Disk,
		Runtimes:   sections.Runtimes, Images: sections.Images,
		Instance: sections.Instance, Interruption: sections.Interruption,
		LastErrors: snapshot.LastErrors,
	}
}

func (s *Server) sections(ctx context.Context) Sections {
	if s.o.Sections == nil {
		return Sections{}
	}
	ctx, cancel := context.WithTimeout(ctx, sectionsWait)
	defer cancel()
	// One collection serves everybody who asks meanwhile, so a part that
	// hangs costs one goroutine, not one per question.
	result := s.flight.DoChan("sections", func() (any, error) {
		// Not the asker's own context: others may be waiting for the same.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), sectionsWait)
		defer cancel()
		return s.o.Sections(ctx), nil
	})
	select {
	case r := <-result:
		sections, _ := r.Val.(Sections)
		return sections
	case <-ctx.Done():
		return Sections{}
	}
}

// Handler returns /livez and /readyz of a registry, for any server. Liveness
// follows loop progress only; readiness the critical checks.
func Handler(r *Registry) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) { answerProbe(w, r.Live()) })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, req *http.Request) {
		if req.URL.Query().Has("verbose") {
			snapshot := r.Snapshot()
			if r.Ready() != nil {
				w.Header().Set("Content-Type", "application/json")
				w.WriteHeader(http.StatusServiceUnavailable)
			}
			writeJSON(w, map[string]any{"state": snapshot.State, "summary": snapshot.Summary, "checks": snapshot.Checks})
			return
		}
		answerProbe(w, r.Ready())
	})
	return mux
}

func answerProbe(w http.ResponseWriter, err error) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	if err != nil {
		w.WriteHeader(http.StatusServiceUnavailable)
		_, _ = fmt.Fprintln(w, err)
		return
	}
	_, _ = fmt.Fprintln(w, "ok")
}

func writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	encoder := json.NewEncoder(w)
	encoder.SetIndent("", "  ")
	_ = encoder.Encode(v) // the asker is gone; nobody is left to tell
}
