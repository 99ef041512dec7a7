package node

import "github.com/prometheus/client_golang/prometheus"

// Collector returns what the drainer is at as metrics:
//
//	hearth_drain_phase{phase}           1 for the phase it is in, 0 for the others
//	hearth_drain_pods{state}            pods that leave, by state
//	hearth_drain_deadline_timestamp_seconds  when the machine stops, 0 if unknown
//	hearth_node_events_dropped_total    events that found the queue full
//
// The labels come from fixed sets.
func (d *Drainer) Collector() prometheus.Collector { return drainCollector{d} }

type drainCollector struct{ d *Drainer }

var (
	drainPhaseDesc    = prometheus.NewDesc("hearth_drain_phase", "How far leaving the node is: 1 for the phase it is in.", []string{"phase"}, nil)
	drainPodsDesc     = prometheus.NewDesc("hearth_drain_pods", "Pods that leave the node, by state.", []string{"state"}, nil)
	drainDeadlineDesc = prometheus.NewDesc("hearth_drain_deadline_timestamp_seconds", "When the machine stops, 0 if that is not known.", nil, nil)
	eventsDroppedDesc = prometheus.NewDesc("hearth_node_events_dropped_total", "Kubernetes events that were not written because too many were waiting.", nil, nil)
)

// Describe implements prometheus.Collector.
func (drainCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{drainPhaseDesc, drainPodsDesc, drainDeadlineDesc, eventsDroppedDesc} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c drainCollector) Collect(ch chan<- prometheus.Metric) {
	s := c.d.Status()
	for _, phase := range []DrainPhase{DrainIdle, DrainCordoned, Draining, Drained} {
		value := 0.0
		if s.Phase == phase {
			value = 1
		}
		ch <- prometheus.MustNewConstMetric(drainPhaseDesc, prometheus.GaugeValue, value, string(phase))
	}
	for state, n := range map[string]int{"total": s.Total, "gone": s.Gone, "terminating": s.Terminating, "blocked": s.Blocked, "forced": s.Forced} {
		ch <- prometheus.MustNewConstMetric(drainPodsDesc, prometheus.GaugeValue, float64(n), state)
	}
	deadline := 0.0
	if !s.Notice.Deadline.IsZero() {
		deadline = float64(s.Notice.Deadline.UnixMilli()) / 1000
	}
	ch <- prometheus.MustNewConstMetric(drainDeadlineDesc, prometheus.GaugeValue, deadline)
	ch <- prometheus.MustNewConstMetric(eventsDroppedDesc, prometheus.CounterValue, float64(c.d.o.Events.Dropped()))
}
