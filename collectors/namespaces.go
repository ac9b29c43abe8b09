package collectors

import (
	"sockq/collectors/catalogue"
	"sockq/probes"
	"sockq/probes/census"
	"sockq/probes/tcpstate"
)

// auditStates is the one audit of this version.
const auditStates = "states"

var namespaceColumns = func() []column[probes.Namespace] {
	var out []column[probes.Namespace]
	add := func(m *catalogue.Metric, label string, value func(*probes.Namespace) (float64, bool)) {
		out = append(out, column[probes.Namespace]{m, label, value})
	}
	for _, state := range tcpstate.All {
		add(catalogue.TCPSockets, state.String(), func(n *probes.Namespace) (float64, bool) {
			return float64(n.States[state]), n.SocketsKnown && (state != tcpstate.Close || n.BoundKnown)
		})
	}
	for d := range census.Directions {
		add(catalogue.ReceiveQueueBytes, d.String(), func(n *probes.Namespace) (float64, bool) {
			return float64(n.Queues[d].ReceiveBytes), n.SocketsKnown
		})
		add(catalogue.SendQueueBytes, d.String(), func(n *probes.Namespace) (float64, bool) {
			return float64(n.Queues[d].SendBytes), n.SocketsKnown
		})
		add(catalogue.ReceiveQueueMaxBytes, d.String(), func(n *probes.Namespace) (float64, bool) {
			return float64(n.Queues[d].ReceiveMaxBytes), n.SocketsKnown && n.Name != probes.Other
		})
		add(catalogue.SendQueueMaxBytes, d.String(), func(n *probes.Namespace) (float64, bool) {
			return float64(n.Queues[d].SendMaxBytes), n.SocketsKnown && n.Name != probes.Other
		})
	}
	for i, event := range census.EventNames {
		add(catalogue.KernelTCPEvents, event, func(n *probes.Namespace) (float64, bool) {
			return float64(n.Events[i]), n.SettingsKnown && n.EventsKnown[i]
		})
	}
	for i, name := range census.SysctlNames {
		add(catalogue.Sysctl, name, func(n *probes.Namespace) (float64, bool) {
			return float64(n.Sysctls[i]), n.SettingsKnown && n.Sysctls[i] != -1
		})
	}
	add(catalogue.AuditDifference, auditStates, func(n *probes.Namespace) (float64, bool) {
		return float64(n.StateDifference), n.Audited
	})
	return out
}()

func namespaceKey(n *probes.Namespace) key { return key{validUTF8(n.Name)} }

// preferNamespace keeps the first of two namespaces of one name.
func preferNamespace(_, _ *probes.Namespace) bool { return false }
