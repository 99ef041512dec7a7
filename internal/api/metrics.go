package api

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// The leader's duties, as labels.
const (
	dutyFunctions = "functions" // one function: adopt what was applied
	dutyRollout   = "rollout"   // one spin function: a step of its rollout
	dutyHosts     = "hosts"     // the Ingresses of all resident functions
	dutyCollect   = "collect"   // what nobody refers to any more
)

// dutyMetrics tell what the leader does. Replicas that do not lead have them
// too, so that sums over replicas need not know which one does.
type dutyMetrics struct {
	leader   prometheus.Gauge
	queue    prometheus.Gauge
	duration *prometheus.HistogramVec
	errors   *prometheus.CounterVec
}

func newDutyMetrics(reg prometheus.Registerer) (*dutyMetrics, error) {
	m := &dutyMetrics{
		leader: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "hearth_leader", Help: "1 while this replica of the API is the one that reconciles, else 0.",
		}),
		queue: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "hearth_reconcile_queue_length", Help: "Functions that wait to be looked at by the leader.",
		}),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "hearth_reconcile_duration_seconds", Help: "How long one pass of one of the leader's duties took.",
			Buckets: []float64{.0001, .001, .005, .025, .1, .5, 1, 5, 15, 60},
		}, []string{"duty"}),
		errors: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hearth_reconcile_errors_total", Help: "Passes of the leader's duties that failed and are tried again.",
		}, []string{"duty"}),
	}
	for _, duty := range []string{dutyFunctions, dutyRollout, dutyHosts, dutyCollect} {
		m.duration.WithLabelValues(duty)
		m.errors.WithLabelValues(duty)
	}
	for _, c := range []prometheus.Collector{m.leader, m.queue, m.duration, m.errors} {
		if err := reg.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// passed counts one pass that began at the time; cut says that the term ended
// meanwhile, which is no failure.
func (m *dutyMetrics) passed(duty string, began time.Time, err error, cut bool) {
	if cut {
		return
	}
	m.duration.WithLabelValues(duty).Observe(time.Since(began).Seconds())
	if err != nil {
		m.errors.WithLabelValues(duty).Inc()
	}
}
