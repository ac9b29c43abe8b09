// Package collectors shows a probes.Snapshot to Prometheus.
package collectors

import (
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"sockq/collectors/catalogue"
	"sockq/probes"
)

// Snapshotter hands out the node at one instant, as probes.Probes does.
type Snapshotter interface {
	Snapshot() (*probes.Snapshot, error)
}

// Gatherer shows the Snapshot of the moment as Prometheus metrics.
//
// It keeps the series of every listener and namespace from scrape to scrape and
// sets only their values, so that a scrape allocates next to nothing. That is
// why it is a prometheus.TransactionalGatherer and no Collector: what Gather
// returns is its own until done is called, and it belongs to one caller at a time.
type Gatherer struct {
	source Snapshotter

	mu         sync.Mutex // held from Gather to done
	families   []*family  // ordered by name
	byMetric   map[*catalogue.Metric]*family
	listeners  table[probes.Listener]
	namespaces table[probes.Namespace]
	processes  table[probes.Process]
	node       table[probes.Snapshot] // of one row
	out        []*dto.MetricFamily
}

var _ prometheus.TransactionalGatherer = (*Gatherer)(nil)

// New returns a Gatherer of source's Snapshots.
func New(source Snapshotter) *Gatherer {
	g := &Gatherer{source: source, byMetric: make(map[*catalogue.Metric]*family)}
	for _, m := range catalogue.All {
		if m != catalogue.BuildInfo {
			f := newFamily(m)
			g.families = append(g.families, f)
			g.byMetric[m] = f
		}
	}
	slices.SortFunc(g.families, func(a, b *family) int { return strings.Compare(a.metric.Name, b.metric.Name) })
	g.listeners = newTable(g, listenerColumns, listenerKey, preferListener)
	g.namespaces = newTable(g, namespaceColumns, namespaceKey, preferNamespace)
	g.processes = newTable(g, processColumns, processKey, preferProcess)
	g.node = newTable(g, nodeColumns, func(*probes.Snapshot) key { return key{} }, nil)
	return g
}

func (g *Gatherer) family(m *catalogue.Metric) *family { return g.byMetric[m] }

// Gather takes a Snapshot and shows it. It waits while another caller has not
// called its done.
func (g *Gatherer) Gather() (families []*dto.MetricFamily, done func(), err error) {
	// Taken before the lock, a Snapshot could be shown after a younger one,
	// and counters would fall.
	g.mu.Lock()
	taken := false
	defer func() {
		if !taken { // an error or a panic
			g.mu.Unlock()
		}
	}()
	s, err := g.source.Snapshot()
	if err != nil {
		return nil, func() {}, fmt.Errorf("take snapshot: %w", err)
	}
	for _, f := range g.families {
		clear(f.Metric) // or it would keep what is gone
		f.Metric = f.Metric[:0]
	}
	g.listeners.show(s.Listeners)
	g.namespaces.show(s.Namespaces)
	g.processes.show(s.Processes)
	g.node.show([]probes.Snapshot{*s})
	g.showAgent(s)
	g.out = g.out[:0]
	for _, f := range g.families {
		if len(f.Metric) > 0 {
			g.out = append(g.out, &f.MetricFamily)
		}
	}
	taken = true
	return g.out, g.mu.Unlock, nil
}
