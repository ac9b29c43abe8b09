package probes

import (
	"cmp"
	"maps"
	"slices"
	"strings"
	"time"

	"sockq/probes/census"
	"sockq/probes/diagnose"
	"sockq/probes/tracker"
)

const (
	// Peaks are of this window and the one before, so that they show the
	// last 60 to 120 s whoever scrapes and how often.
	peakWindow = time.Minute
	// A set of sockets that is gone keeps its counters for this long, so
	// that they are scraped once more.
	keepVanished = 5 * time.Minute
	// A late sample stands for the time since the one before, up to this
	// many intervals; what is beyond is nobody's knowledge and not counted.
	maxGap = 10
	// maxPast bounds the sockets that are remembered after they went.
	maxPast = 65536
	// A socket has no series until somebody has looked whose it is, but not for
	// longer than this.
	ownerPatience = 2 * time.Second
)

// ledger turns samples of listening sockets into what must be remembered of
// them: peaks, time at full, the queue's integral over time, drops. It is pure:
// time and sockets come from outside.
type ledger struct {
	interval time.Duration
	max      int // sets with labels of their own
	// name is what a namespace is called; Other where it is over its cap.
	name func(inode uint32, cookie uint64) string
	// synBound is ¾ of a namespace's tcp_max_syn_backlog where that bounds
	// the SYN queue (tcp_syncookies=0), else a number that no backlog
	// reaches; false if unknown.
	synBound func(inode uint32, cookie uint64) (uint64, bool)
	// exists tells whether there is such a namespace.
	exists func(inode uint32, cookie uint64) bool
	// namespace is what was last read of a namespace, false if nothing was.
	namespace func(inode uint32, cookie uint64) (census.Namespace, bool)
	window    time.Duration // that verdicts are about
	// owner is whom a socket belongs to; false as long as nobody has looked.
	owner func(*census.Listener) (Owner, bool)
	// collapse says which listeners of a process share one series.
	collapse Collapse

	sets    map[labels]*set
	all     []*set             // the same, in the order of a Snapshot once sorted
	sorted  bool               // all is
	sockets map[uint64]*socket // by census.Listener.Key
	crowd   map[labels]int     // sockets of each address that went under Other
	many    map[labels]int     // sets of each owner, whose address is ""
	// The youngest set with labels of its own at each place.
	youngest map[place]*set
	past     map[life]ended // sockets that were lost sight of
	// What the tracker counts, by tracker.Listener.Key; knows what it can.
	arrivals map[uint64]*arrival
	knows    knowledge
	owned    int // sets with labels of their own
	waiting  int // those of them that vanished
	nextID   uint64
	unasked  bool      // the last sample met a socket that waits for its owner to be found
	last     time.Time // of the last sample
	sample   uint64    // its number

	overCap     uint64 // addresses that were put under Other
	nobodys     uint64 // sockets that the tracker alone saw, of namespaces that are gone
	evicted     uint64 // sets that gave way to others before their time
	forgiven    uint64 // accepts that went by unseen and are not waited for
	lateSamples uint64 // samples that should have been taken and were not
}

type labels struct {
	namespace, address string
	owner              Owner
}

// crew are the labels of all that is an owner's.
func (k labels) crew() labels { return labels{namespace: k.namespace, owner: k.owner} }

// place is where a set listens.
type place struct {
	inode   uint32
	cookie  uint64
	address string
}

func (s *set) place() place { return place{s.Inode, s.cookie, s.Address} }

// set is the sockets behind one pair of labels.
type set struct {
	Listener
	labels   labels
	cookie   uint64 // of the namespace
	own      bool   // false: Other
	sample   uint64 // the last in which a socket was there
	fresh    bool   // nothing to integrate from yet
	vanished time.Time
	before   uint64 // accept queue length at the sample before
	full     bool
	// Peaks of this window and the one before.
	peak, synPeak [2]uint64
	peakRatio     [2]float64
	// The same from the tracker, at arrivals.
	trackedPeak      uint64
	trackedPeakRatio float64
	unseen           bool              // accepts are missing
	requested        int64             // sum of the backlogs that its sockets asked for
	requests         int               // sockets that are known to have asked
	history          *diagnose.History // nil under Other, and where no socket was there
}

// knowledge is what the tracker can tell of listeners.
type knowledge struct{ connections, accepts, allAccepts, retransmits, backlog, refusals, halfOpen bool }

// life is a socket from its making to its end, also while it does not listen
// (shutdown), is bound to another device, or was missed by a sample.
type life struct{ key, cookie, netnsCookie uint64 }

type ended struct {
	drops uint32
	at    time.Time
}

type socket struct {
	listener census.Listener // as last seen
	labels   labels
	set      *set
	sample   uint64
	before   bool      // it listened before the first sample
	counted  uint32    // its drops that are counted
	since    time.Time // when it was first seen
}

func newLedger(interval time.Duration, max int) *ledger {
	return &ledger{
		interval: interval,
		max:      max,
		window:   verdictWindow,
		owner:    func(*census.Listener) (Owner, bool) { return Owner{}, true },
		sets:     make(map[labels]*set),
		sockets:  make(map[uint64]*socket),
		crowd:    make(map[labels]int),
		many:     make(map[labels]int),
		youngest: make(map[place]*set),
		past:     make(map[life]ended),
		arrivals: make(map[uint64]*arrival),
	}
}

// same tells whether now is the socket that was seen as before: kernels reuse
// addresses at once, and a cookie may be given out late but never changes.
func same(before, now *census.Listener) bool {
	if before.Address != now.Address || before.Inode != now.Inode ||
		before.NetnsCookie != now.NetnsCookie || before.Device != now.Device {
		return false
	}
	if before.Cookie != now.Cookie && before.Cookie != 0 {
		return false
	}
	return before.Cookie != 0 || int32(now.Drops-before.Drops) >= 0
}

// add takes the sample of all listening sockets at now. What a socket dropped
// before the agent looked for the first time is not counted; one that came
// later is counted from its birth.
func (l *ledger) add(now time.Time, listeners []census.Listener) {
	first := l.last.IsZero()
	var elapsed time.Duration
	if !first {
		elapsed = max(0, now.Sub(l.last))
	}
	if missed := elapsed/l.interval - 1; missed > 0 {
		l.lateSamples += uint64(missed)
	}
	elapsed = min(elapsed, maxGap*l.interval)
	turns := 2
	if !first {
		turns = int(min(2, now.UnixNano()/int64(peakWindow)-l.last.UnixNano()/int64(peakWindow)))
	}
	l.last = now
	l.sample++
	l.unasked = false

	for _, s := range l.all {
		s.turn(turns)
	}
	for i := range listeners {
		r := &listeners[i]
		s, ok := l.sockets[r.Key]
		if ok && !same(&s.listener, r) {
			l.forget(r.Key, s)
			ok = false
		}
		if !ok {
			s = &socket{before: first, counted: r.Drops, since: now}
			if !first {
				s.counted = l.remember(r)
			}
			l.sockets[r.Key] = s
		}
		s.listener = *r
		s.sample = l.sample
		if s.set == nil {
			if _, asked := l.owner(r); !asked && now.Sub(s.since) < ownerPatience {
				l.unasked = true
				continue
			}
			l.assign(s, r)
		}
		s.countDrops()
		l.see(s.set, r)
	}
	if len(l.sockets) > len(listeners) {
		for key, s := range l.sockets {
			if s.sample != l.sample {
				l.forget(key, s)
			}
		}
	}
	gone := false
	for _, s := range l.all {
		if s.sample == l.sample {
			s.integrate(elapsed)
		} else if l.vanish(s, now) {
			gone = true
		}
	}
	if gone {
		l.drop(now)
	}
	if turns > 0 {
		maps.DeleteFunc(l.past, func(_ life, e ended) bool { return now.Sub(e.at) >= keepVanished })
	}
}

// turn moves the peak windows on.
func (s *set) turn(windows int) {
	for range windows {
		s.peak = [2]uint64{0, s.peak[0]}
		s.synPeak = [2]uint64{0, s.synPeak[0]}
		s.peakRatio = [2]float64{0, s.peakRatio[0]}
	}
}

// see adds one socket to its set in this sample.
func (l *ledger) see(s *set, r *census.Listener) {
	if s.sample != l.sample {
		s.sample = l.sample
		if s.fresh = !s.Live; s.fresh && s.own && !s.vanished.IsZero() {
			l.waiting-- // it came back
		}
		s.Live = true
		s.Sockets, s.AcceptQueue, s.AcceptQueueLimit, s.FillRatio = 0, 0, 0, 0
		s.SynQueue, s.SynQueueLimit, s.SynQueueKnown, s.SynLimitKnown = 0, 0, true, true
		s.full = false
	}
	length, limit := uint64(r.AcceptQueue), uint64(r.Limit)
	ratio := float64(length) / float64(limit+1)
	s.Sockets++
	s.AcceptQueue += length
	s.AcceptQueueLimit += limit
	s.FillRatio = max(s.FillRatio, ratio)
	s.full = s.full || length > limit
	s.peak[0] = max(s.peak[0], length)
	s.peakRatio[0] = max(s.peakRatio[0], ratio)
	if r.SynQueue >= 0 {
		s.SynQueue += uint64(r.SynQueue)
		s.synPeak[0] = max(s.synPeak[0], uint64(r.SynQueue))
	} else {
		s.SynQueueKnown = false
	}
	if bound, ok := l.synBound(r.Inode, r.NetnsCookie); ok {
		s.SynQueueLimit += min(limit, bound)
	} else {
		s.SynLimitKnown = false
	}
}

// integrate adds the time since the sample before: the queue's length as a
// straight line between the two, full as it is now.
func (s *set) integrate(elapsed time.Duration) {
	if !s.fresh {
		s.ConnectionSeconds += elapsed.Seconds() * float64(s.before+s.AcceptQueue) / 2
		if s.full {
			s.FullSeconds += elapsed.Seconds()
		}
	}
	s.before = s.AcceptQueue
}

// vanish tells whether the set has been without a socket for long enough.
func (l *ledger) vanish(s *set, now time.Time) bool {
	if s.Live {
		s.Live, s.vanished = false, now
		if s.own {
			l.waiting++
		}
		s.Sockets, s.AcceptQueue, s.AcceptQueueLimit, s.FillRatio = 0, 0, 0, 0
		s.SynQueue, s.SynQueueLimit = 0, 0
	}
	return now.Sub(s.vanished) >= keepVanished
}

// drop removes the sets that vanished long ago.
func (l *ledger) drop(now time.Time) {
	for _, s := range slices.Clone(l.all) {
		if !s.Live && now.Sub(s.vanished) >= keepVanished {
			l.remove(s)
		}
	}
}

// assign gives a socket the set of its labels. Where there are too many, the
// socket's address goes under Other for as long as a socket listens there, so
// that a listener never moves between Other and labels of its own.
func (l *ledger) assign(s *socket, r *census.Listener) {
	namespace := l.name(r.Inode, r.NetnsCookie)
	owner, _ := l.owner(r)
	s.labels = labels{namespace, address(r), owner}
	if l.sets[s.labels] == nil && l.collapse.shares(r, owner, l.many[s.labels.crew()]) {
		s.labels.address = sharedAddress(r)
	}
	key, own := s.labels, true
	if l.sets[key] == nil && (namespace == Other || l.crowd[key] > 0 || !l.room()) {
		if l.crowd[key] == 0 {
			l.overCap++
		}
		l.crowd[key]++
		key, own = labels{namespace: namespace, address: Other}, false
	}
	s.set = l.sets[key]
	if s.set != nil && own && (s.set.Inode != r.Inode || s.set.cookie != r.NetnsCookie) {
		// Another namespace got the number or the name of one that is gone.
		l.remove(s.set)
		s.set = nil
	}
	if s.set == nil {
		s.set = l.begin(key, r.Inode, r.NetnsCookie, own)
	}
}

// room tells whether there may be one more set with labels of its own. At the
// cap the set that vanished first gives way: it has been scraped most.
func (l *ledger) room() bool {
	if l.owned < l.max {
		return true
	}
	if l.waiting == 0 {
		return false
	}
	var first *set
	for _, s := range l.all {
		if s.own && !s.Live && !s.vanished.IsZero() && (first == nil || s.vanished.Before(first.vanished)) {
			first = s
		}
	}
	if first == nil {
		return false
	}
	l.evicted++
	l.remove(first)
	return true
}

func (l *ledger) begin(key labels, inode uint32, cookie uint64, own bool) *set {
	l.nextID++
	s := &set{
		Listener: Listener{ID: l.nextID, Namespace: key.namespace, Inode: inode, Address: key.address, Owner: key.owner},
		labels:   key,
		cookie:   cookie,
		own:      own,
	}
	if own {
		l.owned++
		l.many[key.crew()]++
		l.youngest[s.place()] = s
		s.history = diagnose.New(l.window, l.observation(s))
	}
	l.sets[key] = s
	l.all = append(l.all, s)
	l.sorted = false
	return s
}

func (l *ledger) remove(s *set) {
	delete(l.sets, s.labels)
	if s.own {
		if at := s.place(); l.youngest[at] == s {
			delete(l.youngest, at)
		}
		less(l.many, s.labels.crew())
		l.owned--
		if !s.Live && !s.vanished.IsZero() {
			l.waiting--
		}
	}
	l.all = slices.DeleteFunc(l.all, func(o *set) bool { return o == s })
}

func (s *socket) countDrops() {
	s.set.SocketDrops += uint64(s.listener.Drops - s.counted)
	s.counted = s.listener.Drops
}

func (l *ledger) forget(key uint64, s *socket) {
	if s.set == nil && s.counted != s.listener.Drops { // nobody found its owner in time
		l.assign(s, &s.listener)
		s.countDrops()
		l.unseen(s.set)
	}
	l.leave(s)
	delete(l.sockets, key)
	if len(l.past) < maxPast {
		l.past[life{key, s.listener.Cookie, s.listener.NetnsCookie}] = ended{s.listener.Drops, l.last}
	}
}

// remember is what is counted already of a socket that comes back, 0 of a new
// one. Without a cookie fewer drops than before tell that it is another one.
func (l *ledger) remember(r *census.Listener) uint32 {
	id := life{r.Key, r.Cookie, r.NetnsCookie}
	before, ok := l.past[id]
	delete(l.past, id)
	if !ok || r.Cookie == 0 && int32(r.Drops-before.drops) < 0 {
		return 0
	}
	return before.drops
}

// leave takes a socket out of its set; what it counted there stays.
func (l *ledger) leave(s *socket) {
	if s.set != nil && !s.set.own {
		less(l.crowd, s.labels)
	}
	s.set = nil
}

// less takes one from a count.
func less(counts map[labels]int, key labels) {
	if counts[key]--; counts[key] <= 0 {
		delete(counts, key)
	}
}

// listening are the sockets that the last sample met.
func (l *ledger) listening() []census.Listener {
	list := make([]census.Listener, 0, len(l.sockets))
	for _, s := range l.sockets {
		list = append(list, s.listener)
	}
	return list
}

// reown lets the next sample start new series for the sockets that turned out to
// belong to somebody else: labels are frozen when a series starts. What is in
// Other stays there.
func (l *ledger) reown() {
	left := make(map[*set]struct{})
	for _, s := range l.sockets {
		if s.set == nil || !s.set.own {
			continue
		}
		if owner, _ := l.owner(&s.listener); owner != s.labels.owner && owner != (Owner{}) {
			left[s.set] = struct{}{}
			l.leave(s)
		}
	}
	for _, a := range l.arrivals { // others are joined by their sockets
		if _, ok := left[a.set]; ok && a.seen.ByLabels {
			a.set = nil
		}
	}
}

// renamed starts new sets for the sockets of a namespace whose name changed:
// labels are frozen when a series starts. Only the peaks go along, since they
// are of the same sockets.
func (l *ledger) renamed(inode uint32, cookie uint64) {
	for _, s := range l.sockets {
		if s.listener.Inode == inode && s.listener.NetnsCookie == cookie {
			l.leave(s)
		}
	}
	for _, a := range l.arrivals { // others are joined by their sockets
		if n := a.seen.Namespace; a.seen.ByLabels && n.Inode == inode && n.Cookie == cookie {
			a.set = nil
		}
	}
	name := l.name(inode, cookie)
	for _, old := range slices.Clone(l.all) {
		if !old.own || !old.Live || old.Inode != inode || old.cookie != cookie || old.Namespace == name {
			continue
		}
		l.vanish(old, l.last)
		key := labels{name, old.labels.address, old.labels.owner}
		if name == Other || l.sets[key] != nil || !l.room() {
			continue
		}
		s := l.begin(key, inode, cookie, true)
		s.peak, s.synPeak, s.peakRatio = old.peak, old.synPeak, old.peakRatio
	}
}

// snapshot copies the sets as they are.
func (l *ledger) snapshot() []Listener {
	if !l.sorted {
		slices.SortFunc(l.all, func(a, b *set) int {
			return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Address, b.Address), a.Owner.compare(b.Owner))
		})
		l.sorted = true
	}
	listeners := make([]Listener, len(l.all))
	for i, s := range l.all {
		listeners[i] = l.show(s)
	}
	return listeners
}

// show copies a set as it is.
func (l *ledger) show(s *set) Listener {
	out := s.Listener
	out.Peak = max(s.peak[0], s.peak[1], s.trackedPeak)
	out.PeakRatio = max(s.peakRatio[0], s.peakRatio[1], s.trackedPeakRatio)
	out.SynPeak = max(s.synPeak[0], s.synPeak[1])
	out.ConnectionsKnown = l.knows.connections
	out.AcceptsKnown = l.knows.accepts && !s.unseen
	out.AcceptWaitKnown = out.AcceptsKnown
	if !out.AcceptsKnown {
		out.LastAccept = time.Time{}
	}
	out.RetransmitsKnown = l.knows.retransmits
	out.RefusalsKnown = l.knows.refusals
	if !l.knows.refusals {
		clear(out.Drops[tracker.DropAcceptQueueFullSYN:])
	}
	out.HalfOpenKnown = l.knows.halfOpen
	if !s.Live {
		out.Verdict = nil
	}
	return out
}

// address is the label of a listener's address. A device's name is whatever its
// namespace's owner made of it.
func address(r *census.Listener) string {
	if r.Device == "" {
		return r.Address.String()
	}
	return r.Address.String() + "%" + device(r)
}

func device(r *census.Listener) string { return strings.ToValidUTF8(r.Device, "?") }
