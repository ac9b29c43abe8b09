package collectors

import (
	"sockq/collectors/catalogue"
	"sockq/probes"
)

var listenerColumns = []column[probes.Listener]{
	{catalogue.AcceptQueueLength, "", func(l *probes.Listener) (float64, bool) { return float64(l.AcceptQueue), l.Live }},
	{catalogue.AcceptQueueLimit, "", func(l *probes.Listener) (float64, bool) { return float64(l.AcceptQueueLimit), l.Live }},
	{catalogue.AcceptQueueFillRatio, "", func(l *probes.Listener) (float64, bool) { return l.FillRatio, l.Live }},
	{catalogue.AcceptQueuePeak, "", func(l *probes.Listener) (float64, bool) { return float64(l.Peak), true }},
	{catalogue.AcceptQueuePeakRatio, "", func(l *probes.Listener) (float64, bool) { return l.PeakRatio, true }},
	{catalogue.AcceptQueueFullSeconds, "", func(l *probes.Listener) (float64, bool) { return l.FullSeconds, true }},
	{catalogue.AcceptQueueConnectionSeconds, "", func(l *probes.Listener) (float64, bool) { return l.ConnectionSeconds, true }},
	{catalogue.SynQueueLength, "", func(l *probes.Listener) (float64, bool) { return float64(l.SynQueue), l.Live && l.SynQueueKnown }},
	{catalogue.SynQueuePeak, "", func(l *probes.Listener) (float64, bool) { return float64(l.SynPeak), l.SynQueueKnown }},
	{catalogue.SynQueueLimit, "", func(l *probes.Listener) (float64, bool) { return float64(l.SynQueueLimit), l.Live && l.SynLimitKnown }},
	{catalogue.ListenerSockets, "", func(l *probes.Listener) (float64, bool) { return float64(l.Sockets), l.Live }},
	{catalogue.SocketDrops, "", func(l *probes.Listener) (float64, bool) { return float64(l.SocketDrops), true }},
}

func listenerKey(l *probes.Listener) key {
	return key{validUTF8(l.Namespace), validUTF8(l.Address)}
}

// preferListener chooses between two sets with the same labels: for some
// minutes there are two where a namespace went and another came under its name.
// The younger one counts from 0, which Prometheus takes for the reset of a
// counter that it is.
func preferListener(a, b *probes.Listener) bool {
	if a.Live != b.Live {
		return a.Live
	}
	return a.ID > b.ID
}
