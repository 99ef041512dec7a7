package health

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

// Collector returns the registry as metrics:
//
//	hearth_health_check{code}   1 while the check passes, else 0 (unknown too)
//	hearth_node_state{state}    1 for the state the node is in, 0 for the others
//
// The labels are bounded by the registered checks and the three states.
func (r *Registry) Collector() prometheus.Collector {
	return &collector{
		registry: r,
		check: prometheus.NewDesc("hearth_health_check",
			"Whether a health check passes (1) or fails or is unknown (0).", []string{"code"}, nil),
		state: prometheus.NewDesc("hearth_node_state",
			"The overall state of the node: 1 for the one it is in.", []string{"state"}, nil),
	}
}

type collector struct {
	registry     *Registry
	check, state *prometheus.Desc
}

func (c *collector) Describe(ch chan<- *prometheus.Desc) {
	ch <- c.check
	ch <- c.state
}

func (c *collector) Collect(ch chan<- prometheus.Metric) {
	snapshot := c.registry.Snapshot()
	for _, check := range snapshot.Checks {
		ch <- prometheus.MustNewConstMetric(c.check, prometheus.GaugeValue, oneIf(check.State == v1alpha1.CheckOK), check.Code)
	}
	for _, state := range []v1alpha1.NodeState{v1alpha1.NodeHealthy, v1alpha1.NodeDegraded, v1alpha1.NodeFailed} {
		ch <- prometheus.MustNewConstMetric(c.state, prometheus.GaugeValue, oneIf(snapshot.State == state), string(state))
	}
}

func oneIf(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
