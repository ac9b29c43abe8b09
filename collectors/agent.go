package collectors

import (
	"maps"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/collectors/version"

	"sockq/collectors/catalogue"
	"sockq/probes"
)

// showAgent shows what the agent says of itself, a few series only.
func (g *Gatherer) showAgent(s *probes.Snapshot) {
	add := func(m *catalogue.Metric, value float64, labelValues ...string) {
		g.family(m).add(value, labelValues...)
	}
	add(catalogue.KernelInfo, 1, s.Kernel.Release, s.Kernel.Tier)
	for _, p := range s.Probes {
		add(catalogue.ProbeAttached, oneIf(p.Attached), p.Name, p.Mechanism)
		if p.StatsKnown {
			add(catalogue.ProbeRuns, float64(p.Runs), p.Name)
			add(catalogue.ProbeRunSeconds, p.RunTime.Seconds(), p.Name)
		}
		if p.MissesKnown {
			add(catalogue.ProbeMisses, float64(p.Misses), p.Name)
		}
	}
	for _, src := range s.Sources {
		add(catalogue.SourceUp, oneIf(src.Up), src.Name)
		if src.Duration > 0 { // else it was never read
			add(catalogue.SourceDuration, src.Duration.Seconds(), src.Name)
		}
		if !src.LastSuccess.IsZero() {
			add(catalogue.SourceLastSuccess, sinceEpoch(src.LastSuccess), src.Name)
		}
	}
	for _, a := range s.Audits {
		add(catalogue.AuditChecks, float64(a.Checks), a.Check)
		add(catalogue.AuditSkipped, float64(a.Skipped), a.Check)
	}
	for _, what := range slices.Sorted(maps.Keys(s.Lost)) {
		add(catalogue.Lost, float64(s.Lost[what]), what)
	}
}

// sinceEpoch is t in seconds, as exact as they can be.
func sinceEpoch(t time.Time) float64 { return float64(t.Unix()) + float64(t.Nanosecond())/1e9 }

func oneIf(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// NewRegistry returns a registry with what is true of every exporter: its
// build, its Go runtime and its process.
func NewRegistry() *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(
		version.NewCollector("sockq"),
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	)
	return r
}
