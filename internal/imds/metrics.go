package imds

import "github.com/prometheus/client_golang/prometheus"

// metrics of the watcher. Labels take values from fixed sets only.
type metrics struct {
	errors *prometheus.CounterVec
}

func newMetrics(w *Watcher, reg prometheus.Registerer) (*metrics, error) {
	m := &metrics{errors: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "hearth_imds_poll_errors_total",
		Help: "Failed reads of notices from instance metadata, by source and kind of error.",
	}, []string{"source", "kind"})}
	if reg == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.errors, watcherCollector{w}} {
		if err := reg.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// watcherCollector derives gauges from the watcher's state when asked.
type watcherCollector struct{ w *Watcher }

var (
	degradedDesc = prometheus.NewDesc("hearth_imds_degraded",
		"1 while notices of some source cannot be read from instance metadata.", nil, nil)
	successDesc = prometheus.NewDesc("hearth_imds_last_success_timestamp_seconds",
		"When all notices were last read from instance metadata; 0 before that.", nil, nil)
	noticesDesc = prometheus.NewDesc("hearth_imds_notices",
		"Notices in effect, by source: interruptions, recommendations, active scheduled events, terminating target states.", []string{"source"}, nil)
)

// Describe implements prometheus.Collector.
func (watcherCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- degradedDesc
	ch <- successDesc
	ch <- noticesDesc
}

// Collect implements prometheus.Collector.
func (c watcherCollector) Collect(ch chan<- prometheus.Metric) {
	s := c.w.State()
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	gauge(degradedDesc, count(s.Degraded))
	last := 0.0
	if !s.LastSuccess.IsZero() {
		last = float64(s.LastSuccess.UnixMilli()) / 1000
	}
	gauge(successDesc, last)
	active := 0.0
	for _, e := range s.Notices.Maintenance {
		active += count(e.Active())
	}
	gauge(noticesDesc, count(s.Notices.Spot != nil), string(SourceSpot))
	gauge(noticesDesc, count(s.Notices.Rebalance != nil), string(SourceRebalance))
	gauge(noticesDesc, active, string(SourceMaintenance))
	gauge(noticesDesc, count(s.Notices.TargetState.Terminating()), string(SourceTargetState))
}

func count(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
