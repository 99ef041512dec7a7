package prefetch

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

// metrics of the loop. Labels take values from fixed sets only.
type metrics struct {
	phases      *prometheus.HistogramVec
	errors      *prometheus.CounterVec
	pulledBytes prometheus.Counter
}

// knownPhases and knownCodes bound the label values; anything else is "other".
var knownPhases = map[string]bool{"pull": true, "verify": true, "check": true, "lower": true, "compile": true, "store": true}

var knownCodes = map[string]bool{
	"not-wasm": true, "component-unsupported": true, "native-artifact": true, "module-too-large": true,
	"malformed-module": true, "invalid-module": true, "unsupported-import": true, "memory-over-limit": true,
	"limit-exceeded": true, "no-start-function": true, "unsupported-feature": true, "compile-timeout": true,
	"compile-memory": true, "compiler-crashed": true, "disk-full": true, "internal": true,
	"digest-mismatch": true, "invalid-reference": true, "artifact-not-found": true,
	"registry-unauthorized": true, "registry-unavailable": true,
	"object-unusable": true, "instantiate-failed": true, "invalid-function": true,
}

func metricCode(code string) string {
	if knownCodes[code] {
		return code
	}
	return "other"
}

func newMetrics(l *Loop, reg prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		phases: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "hearth_prefetch_phase_duration_seconds",
			Help:    "Time each step of getting an artifact onto this node took.",
			Buckets: prometheus.ExponentialBuckets(0.001, 2.5, 13),
		}, []string{"phase"}),
		errors: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hearth_prefetch_errors_total",
			Help: "Failed attempts to get an artifact onto this node, by error code.",
		}, []string{"code"}),
		pulledBytes: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "hearth_prefetch_pulled_bytes_total",
			Help: "Bytes of modules pulled from registries.",
		}),
	}
	if reg == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.phases, m.errors, m.pulledBytes, artifacts{l}} {
		if err := reg.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

func (m *metrics) phase(p v1alpha1.Phase) {
	name := p.Name
	if !knownPhases[name] {
		name = "other"
	}
	m.phases.WithLabelValues(name).Observe(p.Milliseconds / 1000)
}

// artifacts counts images by state when asked.
type artifacts struct{ l *Loop }

var artifactsDesc = prometheus.NewDesc("hearth_prefetch_artifacts",
	"Artifacts that functions of this node refer to, by state.", []string{"state"}, nil)

// Describe implements prometheus.Collector.
func (artifacts) Describe(ch chan<- *prometheus.Desc) { ch <- artifactsDesc }

// Collect implements prometheus.Collector.
func (a artifacts) Collect(ch chan<- prometheus.Metric) {
	counts := make(map[imageState]int, len(imageStates))
	a.l.mu.Lock()
	for _, img := range a.l.images {
		counts[img.state]++
	}
	a.l.mu.Unlock()
	for _, s := range imageStates {
		ch <- prometheus.MustNewConstMetric(artifactsDesc, prometheus.GaugeValue, float64(counts[s]), string(s))
	}
}
