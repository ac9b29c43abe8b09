package collectors

import (
	"sockq/collectors/catalogue"
	"sockq/probes"
	"sockq/probes/census"
	"sockq/probes/tcpstate"
	"sockq/probes/tracker"
)

var namespaceColumns = func() (out columns[probes.Namespace]) {
	add := func(m *catalogue.Metric, value func(*probes.Namespace) (float64, bool), more ...string) {
		out.values = append(out.values, valueColumn[probes.Namespace]{m, value, more})
	}
	for _, state := range tcpstate.All {
		add(catalogue.TCPSockets, func(n *probes.Namespace) (float64, bool) {
			return float64(n.States[state]), n.SocketsKnown && (state != tcpstate.Close || n.BoundKnown)
		}, state.String())
	}
	for i, event := range census.EventNames {
		add(catalogue.KernelTCPEvents, func(n *probes.Namespace) (float64, bool) {
			return float64(n.Events[i]), n.SettingsKnown && n.EventsKnown[i]
		}, event)
	}
	for i, name := range census.SysctlNames {
		add(catalogue.Sysctl, func(n *probes.Namespace) (float64, bool) {
			return float64(n.Sysctls[i]), n.SettingsKnown && n.Sysctls[i] != -1
		}, name)
	}
	for i, check := range probes.AuditCheckNames {
		add(catalogue.AuditDifference, func(n *probes.Namespace) (float64, bool) {
			return float64(n.Differences[i]), n.Audited[i]
		}, check)
	}

	for _, t := range tcpstate.Transitions {
		i, taken := tcpstate.Index(t.Edge)
		if !taken {
			continue
		}
		add(catalogue.Transitions, func(n *probes.Namespace) (float64, bool) {
			return float64(n.Transitions[i]), n.TransitionsKnown && n.Transitions[i] > 0
		}, t.From.String(), t.To.String())
	}
	for i, name := range tracker.ConnectErrorNames {
		add(catalogue.ConnectFailures, func(n *probes.Namespace) (float64, bool) {
			return float64(n.ConnectFailures[i]), n.ConnectsKnown && n.ConnectFailures[i] > 0
		}, name)
	}
	add(catalogue.ResetsReceived, func(n *probes.Namespace) (float64, bool) {
		return float64(n.ResetsReceived), n.ResetsReceivedKnown
	})

	out.histograms = append(stateColumns(func(n *probes.Namespace) *[tcpstate.Count]tracker.Histogram { return n.StateSeconds }),
		histogramColumn[probes.Namespace]{metric: catalogue.ConnectSeconds, value: func(n *probes.Namespace) *tracker.Histogram {
			if !n.ConnectsKnown {
				return nil
			}
			return &n.Connects
		}})

	out.varying = []varyingColumn[probes.Namespace]{
		{catalogue.UnexpectedTransitions, func(n *probes.Namespace, v *varying) {
			if !n.TransitionsKnown {
				return
			}
			for edge, count := range n.Unexpected {
				if count > 0 {
					v.set(float64(count), edge.From.String(), edge.To.String())
				}
			}
		}},
		{catalogue.ResetsSent, func(n *probes.Namespace, v *varying) {
			if !n.ResetsSentKnown {
				return
			}
			for reason, count := range n.ResetsSent {
				if count > 0 {
					v.set(float64(count), reason)
				}
			}
		}},
	}
	return out
}()

// nodeColumns are what is counted for all namespaces together.
var nodeColumns = columns[probes.Snapshot]{
	histograms: stateColumns(func(s *probes.Snapshot) *[tcpstate.Count]tracker.Histogram { return s.StateSeconds }),
}

// stateColumns are the times spent in each state that was ever left: which
// those are depends on the tier.
func stateColumns[T any](of func(*T) *[tcpstate.Count]tracker.Histogram) (out []histogramColumn[T]) {
	for _, state := range tcpstate.All {
		out = append(out, histogramColumn[T]{catalogue.StateSeconds, func(item *T) *tracker.Histogram {
			all := of(item)
			if all == nil || all[state].Count() == 0 {
				return nil
			}
			return &all[state]
		}, []string{state.String()}})
	}
	return out
}

func namespaceKey(n *probes.Namespace) key {
	return key{validUTF8(n.Name), validUTF8(n.PodNamespace), validUTF8(n.Pod)}
}

// preferNamespace keeps the first of two namespaces of one name.
func preferNamespace(_, _ *probes.Namespace) bool { return false }
