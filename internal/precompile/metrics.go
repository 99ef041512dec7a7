package precompile

import (
	"errors"
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics of a store. Labels are the phases below, nothing from outside.
type metrics struct {
	hits, misses, quarantined, evictions prometheus.Counter
	durations                            *prometheus.HistogramVec
	all                                  []prometheus.Collector
}

// durationBuckets reach from a small C module (milliseconds) to the timeout.
var durationBuckets = []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120}

func newMetrics(r prometheus.Registerer, usage func() Usage) (metrics, error) {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	}
	m := metrics{
		hits:        counter("hearth_store_hits_total", "Images whose precompiled object was there and verified."),
		misses:      counter("hearth_store_misses_total", "Images that had to be compiled or recorded."),
		quarantined: counter("hearth_store_quarantined_total", "Objects taken out of use because they did not verify."),
		evictions:   counter("hearth_store_evictions_total", "Objects deleted to stay within the budget."),
		durations: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "hearth_precompile_duration_seconds",
			Help:    "Time of each phase of making an object: lower, validate, compile, child (all of the former with the process around them), store.",
			Buckets: durationBuckets,
		}, []string{"phase"}),
	}
	bytes := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "hearth_store_bytes", Help: "Size of all precompiled objects.",
	}, func() float64 { return float64(usage().Bytes) })
	m.all = []prometheus.Collector{m.hits, m.misses, m.quarantined, m.evictions, m.durations, bytes}
	if r == nil {
		return m, nil
	}
	for i, c := range m.all {
		if err := r.Register(c); err != nil {
			for _, c := range m.all[:i] {
				r.Unregister(c)
			}
			var already prometheus.AlreadyRegisteredError
			if errors.As(err, &already) {
				return m, errors.New("register the store's metrics: another store uses this registry")
			}
			return m, fmt.Errorf("register the store's metrics: %w", err)
		}
	}
	return m, nil
}

func (m *metrics) unregister(r prometheus.Registerer) {
	if r == nil {
		return
	}
	for _, c := range m.all {
		r.Unregister(c)
	}
}

func (m *metrics) observe(phase string, milliseconds float64) {
	m.durations.WithLabelValues(phase).Observe(milliseconds / 1000)
}
