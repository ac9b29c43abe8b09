package collectors

import (
	"sockq/collectors/catalogue"
	"sockq/probes"
	"sockq/probes/census"
)

var processColumns = func() (out columns[probes.Process]) {
	add := func(m *catalogue.Metric, value func(*probes.Process) (float64, bool), more ...string) {
		out.values = append(out.values, valueColumn[probes.Process]{m, value, more})
	}
	for d := range census.Directions {
		add(catalogue.ReceiveQueueBytes, func(p *probes.Process) (float64, bool) {
			return float64(p.Queues[d].ReceiveBytes), p.QueuesKnown
		}, d.String())
		add(catalogue.SendQueueBytes, func(p *probes.Process) (float64, bool) {
			return float64(p.Queues[d].SendBytes), p.QueuesKnown
		}, d.String())
		add(catalogue.ReceiveQueueMaxBytes, func(p *probes.Process) (float64, bool) {
			return float64(p.Queues[d].ReceiveMaxBytes), p.ReceiveMaxKnown[d]
		}, d.String())
		add(catalogue.SendQueueMaxBytes, func(p *probes.Process) (float64, bool) {
			return float64(p.Queues[d].SendMaxBytes), p.SendMaxKnown[d]
		}, d.String())
	}
	add(catalogue.CloseWaitSockets, func(p *probes.Process) (float64, bool) { return float64(p.CloseWait), p.Process != "" })
	add(catalogue.CloseWaitOldest, func(p *probes.Process) (float64, bool) {
		return p.OldestCloseWait.Seconds(), p.Process != "" && p.CloseWait > 0
	})
	add(catalogue.FinWait2Sockets, func(p *probes.Process) (float64, bool) { return float64(p.FinWait2), p.Process != "" })
	add(catalogue.FinWait2Oldest, func(p *probes.Process) (float64, bool) {
		return p.OldestFinWait2.Seconds(), p.Process != "" && p.FinWait2 > 0
	})
	return out
}()

func processKey(p *probes.Process) key {
	return key{validUTF8(p.Namespace), validUTF8(p.Process), validUTF8(p.PodNamespace), validUTF8(p.Pod)}
}

// preferProcess keeps the first of two of one name.
func preferProcess(_, _ *probes.Process) bool { return false }
