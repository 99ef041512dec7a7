package images

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics of the loop. Labels take values from fixed sets only.
type metrics struct {
	phases   *prometheus.HistogramVec
	failures *prometheus.CounterVec
}

func newMetrics(l *Loop, reg prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		phases: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "hearth_images_phase_duration_seconds",
			Help:    "Time each successful step of making a container image warm took.",
			Buckets: prometheus.ExponentialBuckets(0.05, 2.5, 11),
		}, []string{"phase"}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hearth_images_failures_total",
			Help: "Failed attempts to make a container image warm, by error code.",
		}, []string{"code"}),
	}
	// Every series exists from the start, so that a rate over it is right.
	for c := range knownCodes {
		m.failures.WithLabelValues(c)
	}
	if reg == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.phases, m.failures, counts{l}} {
		if err := reg.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

func (m *metrics) pulled(d time.Duration) { m.phases.WithLabelValues("pull").Observe(d.Seconds()) }
func (m *metrics) warmed(d time.Duration) { m.phases.WithLabelValues("warm").Observe(d.Seconds()) }

// counts counts images by state when asked.
type counts struct{ l *Loop }

var (
	countsDesc = prometheus.NewDesc("hearth_images", "Container images wanted on this node, by state.", []string{"state"}, nil)
	staleDesc  = prometheus.NewDesc("hearth_images_source_stale", "Whether it is not known at present which container images are wanted (1) or is (0).", nil, nil)
)

// Describe implements prometheus.Collector.
func (counts) Describe(ch chan<- *prometheus.Desc) { ch <- countsDesc; ch <- staleDesc }

// Collect implements prometheus.Collector.
func (c counts) Collect(ch chan<- prometheus.Metric) {
	n := make(map[State]int, len(states))
	c.l.mu.Lock()
	for _, img := range c.l.images {
		n[img.state]++
	}
	stale := 0.0
	if !c.l.snapshot.Known || !c.l.snapshot.StaleSince.IsZero() {
		stale = 1
	}
	c.l.mu.Unlock()
	for _, s := range states {
		ch <- prometheus.MustNewConstMetric(countsDesc, prometheus.GaugeValue, float64(n[s]), string(s))
	}
	ch <- prometheus.MustNewConstMetric(staleDesc, prometheus.GaugeValue, stale)
}
