package submit

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/hearth-sh/hearth/internal/function"
)

const (
	// readyTime bounds the checks of /readyz: a prober gives up after seconds.
	readyTime = 2 * time.Second
	// scrapeTime bounds gathering for /metrics, Prometheus' default timeout is 10 s.
	scrapeTime = 8 * time.Second
)

// readiness is the verbose answer of /readyz.
type readiness struct {
	Ready  bool    `json:"ready"`
	Checks []Check `json:"checks"`
}

// livez serves GET /livez.
func (s *Server) livez(w http.ResponseWriter, r *http.Request) error {
	if s.o.Live != nil {
		if err := s.o.Live(r.Context()); err != nil {
			return newProblem("not-ready", "The process makes no progress: %v.", err)
		}
	}
	plain("ok\n").write(w)
	return nil
}

// readyz serves GET /readyz.
func (s *Server) readyz(w http.ResponseWriter, r *http.Request) error {
	ctx, cancel := context.WithTimeout(r.Context(), readyTime)
	defer cancel()
	db := Check{Name: "database", OK: true}
	if _, err := s.o.Store.List(ctx, function.ListOptions{Limit: 1}); err != nil {
		db.OK, db.Message = false, err.Error()
	}
	answer := readiness{Ready: true, Checks: []Check{db}}
	if s.o.Health != nil {
		answer.Checks = append(answer.Checks, s.o.Health.Ready(ctx)...)
	}
	var bad []string
	for _, c := range answer.Checks {
		if !c.OK {
			answer.Ready = false
			bad = append(bad, fmt.Sprintf("%s (%s)", c.Name, c.Message))
		}
	}
	if r.URL.Query().Has("verbose") {
		status := http.StatusOK
		if !answer.Ready {
			status = http.StatusServiceUnavailable
		}
		jsonReply(status, answer, nil).write(w)
		return nil
	}
	if !answer.Ready {
		return newProblem("not-ready", "Not ready: %s.", strings.Join(bad, ", "))
	}
	plain("ready\n").write(w)
	return nil
}

// serveMetrics serves GET /metrics.
func (s *Server) serveMetrics(w http.ResponseWriter, r *http.Request) error {
	ctx, cancel := context.WithTimeout(r.Context(), scrapeTime)
	defer cancel()
	var all prometheus.Gatherers
	if s.o.Gatherers != nil {
		all = s.o.Gatherers(ctx)
	}
	// One process that does not answer must not hide the others.
	promhttp.HandlerFor(all, promhttp.HandlerOpts{ErrorHandling: promhttp.ContinueOnError}).ServeHTTP(w, r)
	return nil
}

// front serves GET /.
func (s *Server) front(w http.ResponseWriter, _ *http.Request) error {
	url, pathURL := s.o.URLs("hello")
	plain(fmt.Sprintf(`Hearth %s: WebAssembly functions on machines you own.

Submit one:     nodeagent submit DIR|FILE --name hello
            or  curl -T hello.wasm -H 'Content-Type: application/wasm' %s
Call it:        curl %s
            or  curl %s
List them:      %s
The API:        %s
Health:         %s  %s  %s
`, s.o.Version,
		sibling(pathURL, "/v1/functions/hello"), url, pathURL, sibling(pathURL, "/v1/functions"), sibling(pathURL, "/openapi.json"),
		sibling(pathURL, "/livez"), sibling(pathURL, "/readyz"), sibling(pathURL, "/metrics"))).write(w)
	return nil
}

// sibling is another path on the host of the URL u.
func sibling(u, path string) string {
	if i := strings.Index(u, "://"); i >= 0 {
		if j := strings.IndexByte(u[i+3:], '/'); j >= 0 {
			return u[:i+3+j] + path
		}
		return u + path
	}
	return path
}

// serveOpenAPI serves GET /openapi.json.
func (s *Server) serveOpenAPI(w http.ResponseWriter, _ *http.Request) error {
	(&reply{status: http.StatusOK, header: map[string]string{"Content-Type": "application/json"}, body: s.openapi}).write(w)
	return nil
}

func plain(text string) *reply {
	return &reply{
		status: http.StatusOK,
		header: map[string]string{"Content-Type": "text/plain; charset=utf-8", "Cache-Control": "no-store"},
		body:   []byte(text),
	}
}
