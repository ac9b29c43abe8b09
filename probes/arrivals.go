package probes

import (
	"math"
	"strconv"
	"time"

	"sockq/probes/census"
	"sockq/probes/tracker"
)

// unseenReads is after how many reads in a row that lack an accept() it is taken
// for certain that accepts go by unseen.
const unseenReads = 3

// arrival is what the tracker counted at one listening socket, as far as it was
// added to a set.
type arrival struct {
	set  *set
	seen tracker.Listener // what was added
	live bool
	// The queue holds what was there before the tracker, and the connections
	// since, less the accepts since.
	first       int64 // what was there before, at least
	firstKnown  bool
	connections uint64 // before the queue was looked at
	accepts     uint64
	unseen      int // reads in a row that lack accepts
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
	}
	for i := range listeners {
		e := &listeners[i]
		a := l.arrivals[e.Key]
		if a == nil { // made since it was expected
			a = new(arrival)
			l.arrivals[e.Key] = a
		}
		s := sockets[e.Key]
		if s == nil {
			s = l.sockets[e.Key] // known by its address
		}
		a.live = s != nil
		l.place(a, s, e)
		a.add(e, clock)
		a.set.trackedPeak = max(a.set.trackedPeak, e.Peak)
		a.set.trackedPeakRatio = max(a.set.trackedPeakRatio, e.PeakRatio)
		if s != nil {
			a.balance(s, e)
			a.set.unseen = a.set.unseen || a.unseen > 0
			a.set.acceptsUnseen = a.set.acceptsUnseen || a.unseen >= unseenReads
		}
	}
}

// depart adds the last of what the tracker counted at a socket that is gone.
func (l *ledger) depart(e *tracker.Listener, clock func(time.Duration) time.Time) {
	a := l.arrivals[e.Key]
	if a == nil {
		a = new(arrival)
	}
	l.place(a, nil, e)
	a.add(e, clock)
	a.set.peak[0] = max(a.set.peak[0], e.Peak)
	a.set.peakRatio[0] = max(a.set.peakRatio[0], e.PeakRatio)
	delete(l.arrivals, e.Key)
}

// place finds the set: that of the socket, or that of its labels, where it came
// and went between two samples. What happened in a namespace that is gone before
// anybody saw the socket is nobody's.
func (l *ledger) place(a *arrival, s *socket, e *tracker.Listener) {
	if s != nil && s.set != nil {
		a.set = s.set
		return
	}
	if a.set != nil {
		return
	}
	r := census.Listener{Inode: e.Namespace.Inode, NetnsCookie: e.Namespace.Cookie, Address: e.Address}
	if e.Interface != 0 {
		r.Device = "if" + strconv.FormatUint(uint64(e.Interface), 10)
	}
	if !l.exists(r.Inode, r.NetnsCookie) {
		a.set = &set{removed: true}
		return
	}
	brief := &socket{listener: r}
	l.assign(brief, &r)
	a.set = brief.set
	if a.set.sample == 0 && a.set.vanished.IsZero() { // nobody was there at a sample
		a.set.vanished = l.last
		if a.set.own {
			l.waiting++
		}
	}
	l.leave(brief)
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
	s.AcceptWait.AddSince(&e.AcceptWait, &seen.AcceptWait)
	if e.LastAccept > seen.LastAccept {
		if at := clock(e.LastAccept); at.After(s.LastAccept) {
			s.LastAccept = at
		}
	}
	if e.BacklogKnown {
		s.BacklogRequested, s.BacklogRequestedKnown = int64(e.Backlog), true
	}
	a.seen = *e
}

// balance looks for accepts that went by unseen: then fewer wait than must. What
// was counted before the look at the queue and after it leans to the other side,
// so that no connection on its way is taken for one.
func (a *arrival) balance(s *socket, e *tracker.Listener) {
	length := int64(s.listener.AcceptQueue)
	if !a.firstKnown {
		a.firstKnown = true
		if s.before {
			a.first = max(0, length+int64(a.accepts)-int64(e.Connections))
		}
	}
	if a.first+int64(a.connections)-int64(e.Accepts) > length {
		a.unseen = min(a.unseen+1, math.MaxInt32)
	} else {
		a.unseen = 0
	}
}

// gone are the sockets that the tracker counted at and that listen no more.
func (l *ledger) gone() (keys []uint64) {
	for key, a := range l.arrivals {
		if a.set != nil && !a.live {
			keys = append(keys, key)
		}
	}
	return keys
}
