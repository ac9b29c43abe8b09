package diagnose

// What the rules compare with. They are shares and multiples of what a listener
// has, so that they hold for listen(5) and for listen(65535); the two times are
// what a client can wait, whatever the backlog.
const (
	// nearLimit is the peak, of the fullest socket, from which a queue is near its limit.
	nearLimit = 0.8
	// longWait is the mean wait in seconds from which accept() does not keep up. A
	// longer backlog would make it even longer.
	longWait = 0.5
	// busy is the mean length, as a share of the queue, from which accept() does not
	// keep up however short the wait is: a burst is gone most of the time.
	busy = 0.5
	// stalledShare is the share of the window without an accept() from which a
	// listener is stalled: 10 s of a minute. One that takes seconds for each
	// connection is only slow.
	stalledShare = 1. / 6
)

// view is what the rules look at.
type view struct {
	*Observation
	sums
	window float64 // in seconds, what was asked for
	// What was refused by a full accept queue and by a full SYN queue. Unless
	// RefusalsKnown these are upper bounds.
	refused, refusedSynQueue uint64
	// silent are the handshakes that were answered and not completed.
	silent   uint64
	pressure uint64 // SYNs for which the SYN queue had no place
}

// Verdict is the diagnosis now. Where several would do it is the one that makes
// the others pointless:
//
//   - stalled: nothing that is said of queues helps while nobody calls accept();
//   - syn_flood, if it cost more than the accept queue did: its requests are not
//     real, and a longer backlog holds more of them;
//   - slow_accept: a longer queue makes connections wait longer;
//   - clamped, which is burst or near_limit where listen() asked for more;
//   - burst, then near_limit, then ok.
//
// It is of the whole window, so that it does not change with each observation;
// only stalled ends with the first accept().
func (h *History) Verdict() Verdict {
	v := h.view()
	full := v.refused > 0 || v.fullSeconds > 0
	short := v.refused > 0 || v.refusedSynQueue > 0 || v.PeakRatio >= nearLimit
	switch {
	case v.idle >= v.window*stalledShare/slack:
		return v.verdict(Stalled)
	case v.flooded():
		return v.verdict(SynFlood)
	case full && v.slow():
		return v.verdict(SlowAccept)
	case short && v.cut() != uncut:
		return v.verdict(Clamped)
	case v.refused > 0 || v.refusedSynQueue > 0:
		return v.verdict(Burst)
	case short:
		return v.verdict(NearLimit)
	}
	return v.verdict(OK)
}

func (h *History) view() *view {
	v := &view{Observation: &h.last, sums: h.sum(), window: h.window.Seconds()}
	if v.RefusalsKnown {
		v.refused, v.refusedSynQueue = v.refusedSyns+v.refusedACKs, v.synQueueDrops
		v.pressure = v.synQueueDrops + v.cookiesSent
		answered := less(v.syns, v.refusedSyns+v.synQueueDrops+v.otherSyns)
		// A request whose final ACK was ignored is not silent.
		v.silent = max(v.synQueue, less(answered, v.connections+v.refusedACKs))
		return v
	}
	// Both counters rise with a refusal: sk_drops for other reasons, too, the
	// namespace's for other listeners, too.
	v.refused = max(min(v.socketDrops, v.listenOverflows), v.refusedACKs)
	if !v.SynQueueKnown || v.SynPeak >= v.synLimit() {
		v.refusedSynQueue = min(less(v.socketDrops, v.refused), less(v.listenDrops, v.listenOverflows))
	}
	v.pressure = v.refusedSynQueue + v.syncookiesSent
	v.silent = v.synQueue + less(v.syncookiesSent, v.syncookiesRecv)
	return v
}

// less is a-b, 0 where that is negative: counters are not read at one instant.
func less(a, b uint64) uint64 { return a - min(a, b) }

// flooded tells whether SYNs found no place in the SYN queue, and more than it
// holds and more than half of the handshakes are not completed.
func (v *view) flooded() bool {
	if v.pressure <= v.refused {
		return false
	}
	if !v.ConnectionsKnown {
		// Which handshakes are completed is known of those by cookies only.
		silent := less(v.cookiesSent, v.cookiesValidated)
		return v.RefusalsKnown && silent > v.cookiesValidated && silent >= v.synLimit()
	}
	if v.silent <= v.connections {
		return false
	}
	if v.RefusalsKnown {
		return v.silent >= v.synLimit()
	}
	// The namespace's cookies are this listener's only if its queue was full.
	return v.SynQueueKnown && v.SynPeak >= v.synLimit()
}

// slow tells whether accept() did not keep up.
func (v *view) slow() bool {
	wait, source := v.wait()
	return source != unknown && wait >= longWait || v.occupied() >= busy
}

// source is where a wait is known from, as it is told.
type source string

const (
	unknown  source = "unknown"
	measured source = ""
	byLittle source = ", by Little's law"
)

// wait is the mean wait for accept() in seconds.
func (v *view) wait() (seconds float64, from source) {
	switch {
	case v.AcceptsKnown && v.waits > 0:
		return v.waited / float64(v.waits), measured
	case v.ConnectionsKnown && v.connections > 0:
		return v.connectionSeconds / float64(v.connections), byLittle
	}
	return 0, unknown
}

// occupied is the accept queue's mean length as a share of what it holds.
func (v *view) occupied() float64 {
	if v.seconds == 0 {
		return 0
	}
	return v.connectionSeconds / v.seconds / float64(v.AcceptQueueLimit+uint64(max(1, v.Sockets)))
}

// cut is whether the backlog is less than listen() asked for.
type cut uint8

const (
	uncut cut = iota
	maybeCut
	surelyCut
)

func (v *view) cut() cut {
	switch {
	case v.BacklogRequestedKnown && (v.BacklogRequested < 0 || uint64(v.BacklogRequested) > v.AcceptQueueLimit):
		return surelyCut
	case !v.BacklogRequestedKnown && v.Somaxconn >= 0 && v.AcceptQueueLimit == uint64(v.Somaxconn)*uint64(max(1, v.Sockets)):
		return maybeCut
	}
	return uncut
}

// asked is what listen() asked for, of one socket: told, or what it got where that
// is less than it could get.
func (v *view) asked() (backlog uint64, known bool) {
	switch limit := v.limit(); {
	case v.BacklogRequestedKnown:
		return v.each(uint64(max(0, v.BacklogRequested))), v.BacklogRequested >= 0
	case v.Somaxconn >= 0 && limit < uint64(v.Somaxconn):
		return limit, true
	}
	return 0, false
}

// maxBacklog is the longest that is ever advised.
const maxBacklog = 65535

// target is a backlog that would have held what was refused at once, or halve
// the peak.
func (v *view) target() uint64 {
	enough := max(2*v.limit(), v.limit()+v.burst, 8)
	if v.refused == 0 && v.refusedSynQueue == 0 {
		enough = max(2*v.limit(), 8)
	}
	power := uint64(8)
	for power < enough {
		power *= 2
	}
	return min(power, maxBacklog)
}
