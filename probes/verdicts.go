package probes

import (
	"slices"
	"time"

	"sockq/probes/census"
	"sockq/probes/diagnose"
	"sockq/probes/tracker"
)

// verdictWindow is the time that a verdict is about. What is remembered of it, and
// the verdict, take some 2 kB for each set of sockets that has labels of its own.
const verdictWindow = time.Minute

// observe looks at all listeners, after a sample, and says what is wrong with them.
// It costs O(sets).
func (l *ledger) observe() {
	for _, s := range l.all {
		switch {
		case !s.own:
		case !s.Live:
			s.history, s.Verdict = nil, nil
		case s.history == nil: // it came back
			s.history = diagnose.New(l.window, l.observation(s))
		case s.history.Due(l.last):
			s.history.Add(l.observation(s))
			verdict := s.history.Verdict()
			s.Verdict = &verdict
			s.Verdicts.Add(verdict.Kind)
		}
	}
}

// observation is what is known of a set's listeners.
func (l *ledger) observation(s *set) diagnose.Observation {
	shown := l.show(s)
	o := diagnose.Observation{
		Time: l.last, Namespace: s.Namespace, Process: s.Owner.Process,
		Sockets:     s.Sockets,
		AcceptQueue: s.AcceptQueue, AcceptQueueLimit: s.AcceptQueueLimit, FillRatio: s.FillRatio,
		Peak: shown.Peak, PeakRatio: shown.PeakRatio,
		FullSeconds: s.FullSeconds, ConnectionSeconds: s.ConnectionSeconds,
		SynQueueKnown: s.SynQueueKnown, SynQueue: s.SynQueue, SynPeak: shown.SynPeak,
		SynQueueLimitKnown: s.SynLimitKnown, SynQueueLimit: s.SynQueueLimit,
		SocketDrops:      s.SocketDrops,
		ConnectionsKnown: shown.ConnectionsKnown, Connections: s.Connections,
		AcceptsKnown: shown.AcceptsKnown, Accepts: s.Accepts, LastAccept: s.LastAccept,
		Waits: s.AcceptWait.Count(), WaitSeconds: s.AcceptWait.Sum,
		RefusalsKnown: shown.RefusalsKnown, Syns: s.Syns,
		RefusedSyns:           s.Drops[tracker.DropAcceptQueueFullSYN],
		RefusedACKs:           s.Drops[tracker.DropAcceptQueueFullACK] + s.Drops[tracker.DropAcceptQueueFullReset],
		SynQueueDrops:         s.Drops[tracker.DropSynQueueFull] + s.Drops[tracker.DropMaxSynBacklog],
		OtherSyns:             s.Drops[tracker.DropNoMemory] + s.Drops[tracker.DropNoRoute] + s.Drops[tracker.DropPolicy] + s.Drops[tracker.DropOther],
		CookiesSent:           s.CookiesSent,
		CookiesValidated:      s.CookiesValidated,
		BacklogRequestedKnown: s.BacklogRequestedKnown, BacklogRequested: s.BacklogRequested,
		Somaxconn: -1, Syncookies: -1,
	}
	if s.Owner.Pod != "" {
		o.Pod = s.Owner.Namespace + "/" + s.Owner.Pod
	}
	if n, ok := l.namespace(s.Inode, s.cookie); ok {
		o.Somaxconn, o.Syncookies = n.Sysctls[census.SysctlSomaxconn], n.Sysctls[census.SysctlSyncookies]
		o.NamespaceKnown = n.EventsKnown[listenOverflows] && n.EventsKnown[listenDrops]
		o.ListenOverflows, o.ListenDrops = n.Events[listenOverflows], n.Events[listenDrops]
		o.SyncookiesSent, o.SyncookiesRecv = n.Events[syncookiesSent], n.Events[syncookiesRecv]
	}
	return o
}

// The kernel's counters that the rules look at.
var (
	listenOverflows = slices.Index(census.EventNames[:], "ListenOverflows")
	listenDrops     = slices.Index(census.EventNames[:], "ListenDrops")
	syncookiesSent  = slices.Index(census.EventNames[:], "SyncookiesSent")
	syncookiesRecv  = slices.Index(census.EventNames[:], "SyncookiesRecv")
)

// observe gives each listener its verdict.
func (p *Probes) observe() {
	p.listeners.Lock()
	defer p.listeners.Unlock()
	p.ledger.observe()
}

// namespace is what was last read of a namespace.
func (r *registry) namespace(inode uint32, cookie uint64) (census.Namespace, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := r.known[identity{inode, cookie}]
	if n == nil {
		return census.Namespace{}, false
	}
	return n.read, true
}
