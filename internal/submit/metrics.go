package submit

import (
	"context"
	"errors"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/function"
)

// metrics of this package. Every label has a bounded set of values: routes
// are path patterns, methods other than the usual are "other".
type metrics struct {
	submits  *prometheus.CounterVec
	phases   *prometheus.HistogramVec
	requests *prometheus.CounterVec
	duration *prometheus.HistogramVec
}

// newMetrics registers with reg, unless that is nil.
func newMetrics(reg prometheus.Registerer, store function.Store) (*metrics, error) {
	m := &metrics{
		submits: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hearth_submits_total",
			Help: "Submitted changes by outcome: ready, pending, superseded, failed (recorded, cannot be served), rejected (the request's fault), abandoned (the client left), error (ours).",
		}, []string{"outcome"}),
		phases: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "hearth_submit_phase_duration_seconds",
			Help:    "Time of each step of a submit: receive, check, publish, record, ready.",
			Buckets: prometheus.ExponentialBuckets(0.001, 2.5, 13), // 1 ms to a minute
		}, []string{"phase"}),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hearth_api_requests_total",
			Help: "Requests to the API by route, method and status.",
		}, []string{"route", "method", "code"}),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "hearth_api_request_duration_seconds",
			Help:    "Time of requests to the API by route, long polls included.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 4, 9), // 0.5 ms to 33 s
		}, []string{"route"}),
	}
	if reg == nil {
		return m, nil
	}
	var err error
	for _, c := range []prometheus.Collector{m.submits, m.phases, m.requests, m.duration, functionCount{store}} {
		err = errors.Join(err, reg.Register(c))
	}
	return m, err
}

func (m *metrics) submit(outcome string) { m.submits.WithLabelValues(outcome).Inc() }

// rejected counts a submit that ended before it was recorded. Those that
// were recorded and failed are counted where that is found out.
func (m *metrics) rejected(err error) {
	p := toProblem(err)
	switch {
	case errors.Is(err, errClientGone):
		m.submit("abandoned")
	case p.header["Location"] != "":
	case p.kind.Status >= 500:
		m.submit("error")
	default:
		m.submit("rejected")
	}
}

func (m *metrics) phase(name string, took time.Duration) {
	m.phases.WithLabelValues(name).Observe(took.Seconds())
}

func (m *metrics) request(route, method string, code int, took time.Duration) {
	switch method {
	case "GET", "HEAD", "PUT", "POST", "PATCH", "DELETE", "OPTIONS":
	default:
		method = "other"
	}
	if route == "" {
		route = "other"
	}
	m.requests.WithLabelValues(route, method, strconv.Itoa(code)).Inc()
	m.duration.WithLabelValues(route).Observe(took.Seconds())
}

// functionCount reads the number of functions when it is asked for.
type functionCount struct{ store function.Store }

var functionsDesc = prometheus.NewDesc("hearth_functions", "Functions by the state of their wanted revision.", []string{"state"}, nil)

func (functionCount) Describe(ch chan<- *prometheus.Desc) { ch <- functionsDesc }

func (c functionCount) Collect(ch chan<- prometheus.Metric) {
	st, err := c.store.Stats(context.Background()) // memory only
	if err != nil {
		return // closing down
	}
	for _, state := range []v1alpha1.FunctionState{v1alpha1.StatePending, v1alpha1.StateReady, v1alpha1.StateFailed} {
		ch <- prometheus.MustNewConstMetric(functionsDesc, prometheus.GaugeValue, float64(st.ByState[state]), string(state))
	}
}
