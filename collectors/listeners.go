package collectors

import (
	"sockq/collectors/catalogue"
	"sockq/probes"
	"sockq/probes/diagnose"
	"sockq/probes/tracker"
)

var listenerColumns = func() (out columns[probes.Listener]) {
	add := func(m *catalogue.Metric, value func(*probes.Listener) (float64, bool), more ...string) {
		out.values = append(out.values, valueColumn[probes.Listener]{m, value, more})
	}
	add(catalogue.AcceptQueueLength, func(l *probes.Listener) (float64, bool) { return float64(l.AcceptQueue), l.Live })
	add(catalogue.AcceptQueueLimit, func(l *probes.Listener) (float64, bool) { return float64(l.AcceptQueueLimit), l.Live })
	add(catalogue.AcceptQueueFillRatio, func(l *probes.Listener) (float64, bool) { return l.FillRatio, l.Live })
	add(catalogue.AcceptQueuePeak, func(l *probes.Listener) (float64, bool) { return float64(l.Peak), true })
	add(catalogue.AcceptQueuePeakRatio, func(l *probes.Listener) (float64, bool) { return l.PeakRatio, true })
	add(catalogue.AcceptQueueFullSeconds, func(l *probes.Listener) (float64, bool) { return l.FullSeconds, true })
	add(catalogue.AcceptQueueConnectionSeconds, func(l *probes.Listener) (float64, bool) { return l.ConnectionSeconds, true })
	add(catalogue.SynQueueLength, func(l *probes.Listener) (float64, bool) { return float64(l.SynQueue), l.Live && l.SynQueueKnown })
	add(catalogue.SynQueuePeak, func(l *probes.Listener) (float64, bool) { return float64(l.SynPeak), l.SynQueueKnown })
	add(catalogue.SynQueueLimit, func(l *probes.Listener) (float64, bool) { return float64(l.SynQueueLimit), l.Live && l.SynLimitKnown })
	add(catalogue.AcceptQueueGaveUp, func(l *probes.Listener) (float64, bool) { return float64(l.GaveUp), l.Live && l.GaveUpKnown })
	add(catalogue.ListenerSockets, func(l *probes.Listener) (float64, bool) { return float64(l.Sockets), l.Live })
	add(catalogue.SocketDrops, func(l *probes.Listener) (float64, bool) { return float64(l.SocketDrops), true })

	add(catalogue.BacklogRequested, func(l *probes.Listener) (float64, bool) {
		return float64(l.BacklogRequested), l.Live && l.BacklogRequestedKnown
	})
	add(catalogue.Syns, func(l *probes.Listener) (float64, bool) { return float64(l.Syns), l.RefusalsKnown })
	add(catalogue.Connections, func(l *probes.Listener) (float64, bool) { return float64(l.Connections), l.ConnectionsKnown })
	add(catalogue.Accepts, func(l *probes.Listener) (float64, bool) { return float64(l.Accepts), l.AcceptsKnown })
	add(catalogue.LastAccept, func(l *probes.Listener) (float64, bool) {
		return sinceEpoch(l.LastAccept), l.AcceptsKnown && !l.LastAccept.IsZero()
	})
	for i, reason := range tracker.DropReasonNames {
		add(catalogue.Drops, func(l *probes.Listener) (float64, bool) { return counted(l.Drops[i]) }, reason)
	}
	add(catalogue.SynCookiesSent, func(l *probes.Listener) (float64, bool) { return float64(l.CookiesSent), l.RefusalsKnown })
	add(catalogue.SynCookiesValidated, func(l *probes.Listener) (float64, bool) {
		return float64(l.CookiesValidated), l.RefusalsKnown
	})
	add(catalogue.SynackRetransmits, func(l *probes.Listener) (float64, bool) {
		return float64(l.SynackRetransmits), l.RetransmitsKnown
	})
	for i, how := range tracker.HalfOpenEndNames {
		add(catalogue.HalfOpenEnded, func(l *probes.Listener) (float64, bool) {
			return float64(l.HalfOpenEnded[i]), l.HalfOpenKnown && l.HalfOpenEnded[i] > 0
		}, how)
	}
	add(catalogue.Abandoned, func(l *probes.Listener) (float64, bool) { return float64(l.Abandoned), l.HalfOpenKnown })
	for kind := range diagnose.Kinds {
		add(catalogue.Verdict, func(l *probes.Listener) (float64, bool) { return verdict(l, kind) }, kind.String())
	}
	out.histograms = []histogramColumn[probes.Listener]{
		{metric: catalogue.HandshakeSeconds, value: func(l *probes.Listener) *tracker.Histogram {
			if !l.HalfOpenKnown {
				return nil
			}
			return &l.Handshake
		}},
		{metric: catalogue.AcceptWaitSeconds, value: func(l *probes.Listener) *tracker.Histogram {
			if !l.AcceptWaitKnown {
				return nil
			}
			return &l.AcceptWait
		}},
	}
	return out
}()

// counted is n for a series that begins when something is first counted.
func counted(n uint64) (float64, bool) { return float64(n), n > 0 }

// verdict is 1 for the current verdict, 0 for one of those before.
func verdict(l *probes.Listener, kind diagnose.Kind) (float64, bool) {
	if !l.Live || l.Verdict == nil || !l.Verdicts.Has(kind) {
		return 0, false
	}
	if l.Verdict.Kind == kind {
		return 1, true
	}
	return 0, true
}

func listenerKey(l *probes.Listener) key {
	o := &l.Owner
	return key{
		validUTF8(l.Namespace), validUTF8(l.Address), validUTF8(o.Process), validUTF8(o.Namespace), validUTF8(o.Pod), validUTF8(o.Container),
	}
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
