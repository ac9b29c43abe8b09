package probes

import (
	"strconv"
	"time"

	"sockq/probes/census"
	"sockq/probes/tracker"
)

// Accepts that went by unseen are forgiven, and counted as lost, when there were no
// more for this long while this many times as many were seen.
const (
	forgiveAfter = time.Minute
	forgiveShare = 100
)

// arrival is what the tracker counted at one listening socket, as far as it was
// added to a set.
type arrival struct {
	set    *set             // nil: no sample has met the socket
	seen   tracker.Listener // what was added
	live   bool
	sweeps int // in which there was no such socket
	// The queue holds what was there before the tracker, and the connections
	// since, less the accepts since.
	first       int64 // what was there before, at least
	firstKnown  bool
	lastListen  time.Duration
	connections uint64 // before the queue was looked at
	accepts     uint64
	// The accepts that went by unseen: how many, since when, and how many were
	// seen then.
	unseen      int64
	unseenSince time.Time
	seenThen    uint64
}

// expect takes what the tracker counted before the listeners are sampled.
func (l *ledger) expect(listeners []tracker.Listener) {
	for i := range listeners {
		e := &listeners[i]
		a := l.arrivals[e.Key]
		if a == nil {
			a = new(arrival)
			l.arrivals[e.Key] = a
		}
		a.connections, a.accepts = e.Connections, e.Accepts
	}
}

// arrive adds what the tracker counted, after a sample. clock turns the tracker's
// times into those of the wall.
func (l *ledger) arrive(listeners []tracker.Listener, clock func(time.Duration) time.Time) {
	sockets := make(map[uint64]*socket, len(l.sockets))
	for _, s := range l.sockets {
		if s.listener.Cookie != 0 {
			sockets[s.listener.Cookie] = s
		}
	}
	for _, s := range l.all {
		s.trackedPeak, s.trackedPeakRatio, s.unseen = 0, 0, false
		s.requested, s.requests = 0, 0
	}
	for i := range listeners {
		e := &listeners[i]
		a := l.arrivals[e.Key]
		expected := a != nil
		if a == nil { // made since it was expected
			a = new(arrival)
			l.arrivals[e.Key] = a
		}
		s := sockets[e.Key]
		if s == nil {
			s = l.sockets[e.Key] // known by its address
		}
		// Whose key is its labels stands for sockets that may be there or not: it
		// is as long as something happens. When it is made it has no labels yet.
		if e.ByLabels && expected && a.set == nil && !l.unasked {
			a.set = l.place(e)
		}
		l.succeed(a, e)
		if a.live = s != nil || e.ByLabels && a.set != nil && *e != a.seen; a.live {
			a.sweeps = 0
		}
		if s != nil && s.set != nil {
			a.set = s.set
		}
		if a.set == nil { // the next sample finds the socket, or it departs
			continue
		}
		a.add(e, clock)
		a.set.trackedPeak = max(a.set.trackedPeak, e.Peak)
		a.set.trackedPeakRatio = max(a.set.trackedPeakRatio, e.PeakRatio)
		if s != nil && e.LastListen > 0 {
			a.set.requested += int64(e.Backlog)
			a.set.requests++
		}
		if s != nil && l.knows.accepts && !l.knows.allAccepts {
			l.forgiven += a.balance(s, e, l.last)
			a.set.unseen = a.set.unseen || a.unseen > 0
		}
	}
	for _, s := range l.all { // as limits are: of all sockets together
		if s.Live {
			s.BacklogRequested, s.BacklogRequestedKnown = s.requested, s.requests == s.Sockets
		}
	}
}

// depart adds the last of what the tracker counted at a socket that is gone.
func (l *ledger) depart(e *tracker.Listener, clock func(time.Duration) time.Time) {
	a := l.arrivals[e.Key]
	if a == nil {
		a = new(arrival)
	}
	delete(l.arrivals, e.Key)
	if a.set == nil {
		a.set = l.place(e)
	}
	l.succeed(a, e)
	if a.set == nil {
		l.nobodys++
		return
	}
	a.add(e, clock)
	a.set.peak[0] = max(a.set.peak[0], e.Peak)
	a.set.peakRatio[0] = max(a.set.peakRatio[0], e.PeakRatio)
}

// succeed turns to the set that is there now, where the key is its labels: whoever
// listens there next has it, too, and his namespace may have the number of one that
// is gone.
func (l *ledger) succeed(a *arrival, e *tracker.Listener) {
	if !e.ByLabels || a.set == nil || a.set.Live {
		return
	}
	if _, next := l.met(e); next != nil && next.Live {
		a.set = next
	}
}

// place finds the set of a socket by its labels, where no sample has met it under
// its key: it may have come and gone between two reads. It is nil where its
// namespace went, too, before anybody saw the socket.
func (l *ledger) place(e *tracker.Listener) *set {
	r, met := l.met(e)
	if met != nil || !l.exists(r.Inode, r.NetnsCookie) {
		return met
	}
	brief := &socket{listener: r}
	l.assign(brief, &r)
	found := brief.set
	l.leave(brief)
	l.unseen(found)
	return found
}

// met finds a set of these labels that a sample has met, nil if there is none.
func (l *ledger) met(e *tracker.Listener) (r census.Listener, _ *set) {
	r = census.Listener{Inode: e.Namespace.Inode, NetnsCookie: e.Namespace.Cookie, Address: e.Address}
	if e.Interface != 0 {
		for _, s := range l.sockets {
			o := &s.listener
			if o.Inode == r.Inode && o.NetnsCookie == r.NetnsCookie && o.Address == r.Address && o.Interface == e.Interface && s.set != nil {
				return r, s.set
			}
		}
		// The device has a name as long as there is a socket.
		r.Device = "if" + strconv.FormatUint(uint64(e.Interface), 10)
	}
	// Nobody knows whose it was: the youngest series of the address is it.
	youngest := l.youngest[place{r.Inode, r.NetnsCookie, address(&r)}]
	if youngest == nil && r.Address.Port() >= firstHighPort {
		youngest = l.youngest[place{r.Inode, r.NetnsCookie, sharedAddress(&r)}]
	}
	if youngest != nil && l.exists(r.Inode, r.NetnsCookie) && youngest.Namespace != l.name(r.Inode, r.NetnsCookie) {
		return r, nil
	}
	return r, youngest
}

// unseen lets a set vanish of which no sample has met a socket.
func (l *ledger) unseen(s *set) {
	if s.sample > 0 || !s.vanished.IsZero() {
		return
	}
	s.vanished = l.last
	if s.own {
		l.waiting++
	}
}

// add adds what happened since the last time.
func (a *arrival) add(e *tracker.Listener, clock func(time.Duration) time.Time) {
	s, seen := a.set, &a.seen
	s.Connections += e.Connections - seen.Connections
	s.Accepts += e.Accepts - seen.Accepts
	s.SynackRetransmits += e.SynackRetransmits - seen.SynackRetransmits
	for reason := range e.Drops {
		s.Drops[reason] += e.Drops[reason] - seen.Drops[reason]
	}
	s.Syns += e.Syns - seen.Syns
	s.CookiesSent += e.CookiesSent - seen.CookiesSent
	s.CookiesValidated += e.CookiesValidated - seen.CookiesValidated
	for how := range e.HalfOpenEnded {
		s.HalfOpenEnded[how] += e.HalfOpenEnded[how] - seen.HalfOpenEnded[how]
	}
	s.Abandoned += e.Abandoned - seen.Abandoned
	s.Handshake.AddSince(&e.Handshake, &seen.Handshake)
	s.AcceptWait.AddSince(&e.AcceptWait, &seen.AcceptWait)
	if e.LastAccept > seen.LastAccept {
		if at := clock(e.LastAccept); at.After(s.LastAccept) {
			s.LastAccept = at
		}
	}
	a.seen = *e
}

// balance looks for accepts that went by unseen: then fewer wait than must. What
// was counted before the look at the queue and after it leans to the other side,
// so that no connection on its way is taken for one. It returns how many it
// gives up for lost.
func (a *arrival) balance(s *socket, e *tracker.Listener, now time.Time) (forgiven uint64) {
	length := int64(s.listener.AcceptQueue)
	if !a.firstKnown && s.before || e.LastListen != a.lastListen && a.firstKnown {
		// After a shutdown() it listens again with an empty queue.
		a.first = length + int64(a.accepts) - int64(e.Connections)
	}
	a.firstKnown, a.lastListen = true, e.LastListen
	unseen := max(0, a.first+int64(a.connections)-int64(e.Accepts)-length)
	if unseen != a.unseen {
		a.unseen, a.unseenSince, a.seenThen = unseen, now, e.Accepts
	} else if unseen > 0 && now.Sub(a.unseenSince) >= forgiveAfter && e.Accepts-a.seenThen >= forgiveShare*uint64(unseen) {
		a.first -= unseen
		a.unseen = 0
		return uint64(unseen)
	}
	return 0
}

// gone are the sockets that the tracker counted at and that listen no more. One
// that no sample has met may be of a namespace that is looked at later.
func (l *ledger) gone() (keys []uint64) {
	for key, a := range l.arrivals {
		if a.live {
			continue
		}
		if a.sweeps++; a.set != nil || a.sweeps >= missedSweeps {
			keys = append(keys, key)
		}
	}
	return keys
}
