package engine

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
)

// metrics are the engine's. No label takes a value from outside.
type metrics struct {
	registry   *prometheus.Registry
	requests   *prometheus.CounterVec
	phases     *prometheus.HistogramVec
	restarts   *prometheus.CounterVec
	loads      *prometheus.CounterVec
	loadPhases *prometheus.HistogramVec
	inFlight   prometheus.Gauge
	retries    prometheus.Counter
	forwarded  *prometheus.CounterVec
	outOfTouch prometheus.Gauge
	logLines   prometheus.Counter
	logDrops   prometheus.Counter
}

func newMetrics() *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hearth_requests_total",
			Help: "Requests to functions by outcome (ok, or the code of the problem) and class of the status code.",
		}, []string{"outcome", "code_class"}),
		phases: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "hearth_request_phase_duration_seconds",
			Help: "Time requests spent by phase: queue, load (waiting for a worker), instantiate, first_byte (from arrival), total.",
			// From a prepared instance (tens of microseconds) to the longest deadline.
			Buckets: []float64{.00005, .0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300},
		}, []string{"phase"}),
		restarts: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hearth_worker_restarts_total",
			Help: "Worker processes that ended unasked, by reason: exit, silent, memory, start.",
		}, []string{"reason"}),
		loads: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hearth_function_loads_total",
			Help: "Loads of a function's object into a worker by result: ok, unusable, failed, crashed.",
		}, []string{"result"}),
		loadPhases: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "hearth_function_load_duration_seconds",
			Help: "Time it took to make a function warm in its worker, by phase: load, instantiate.",
			// From a shared object (microseconds) to a large module on a busy machine.
			Buckets: []float64{.0001, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10},
		}, []string{"phase"}),
		inFlight: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "hearth_inflight_requests",
			Help: "Requests to functions that are in the engine now, queued ones included.",
		}),
		retries: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "hearth_request_retries_total",
			Help: "Requests sent to a worker a second time because the first one died.",
		}),
		forwarded: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hearth_gateway_forwarded_total",
			Help: "Requests for functions that another node has, by result: ok (its answer was passed on, whatever it was), broken-off, client-gone, or the code of the problem.",
		}, []string{"result"}),
		outOfTouch: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "hearth_engine_out_of_touch",
			Help: "1 while no agent says what changes, and other nodes are asked instead.",
		}),
		logLines: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "hearth_log_lines_total",
			Help: "Lines written to function logs.",
		}),
		logDrops: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "hearth_log_lines_dropped_total",
			Help: "Lines that function logs lost, because they came too fast or could not be written.",
		}),
	}
	m.registry.MustRegister(m.requests, m.phases, m.restarts, m.loads, m.loadPhases, m.inFlight, m.retries, m.forwarded, m.outOfTouch, m.logLines, m.logDrops)
	// The label keeps several processes of a machine apart in one scrape.
	prometheus.WrapRegistererWith(prometheus.Labels{"process": "engine"}, m.registry).MustRegister(
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

func (m *metrics) phase(name string, d time.Duration) {
	m.phases.WithLabelValues(name).Observe(d.Seconds())
}
