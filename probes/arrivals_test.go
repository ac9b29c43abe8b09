package probes

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"sockq/probes/census"
	"sockq/probes/tracker"
)

// counted is what the tracker counted at a listener of namespace 1.
func counted(key uint64, address string, connections, accepts uint64) tracker.Listener {
	return tracker.Listener{
		Key: key, Namespace: tracker.NamespaceID{Cookie: 1, Inode: 1}, Address: netip.MustParseAddrPort(address),
		Connections: connections, Accepts: accepts,
	}
}

// atEpoch is a monotonic clock that began with the epoch.
func atEpoch(d time.Duration) time.Time { return time.Unix(0, int64(d)) }

func newTrackedBench(max int) *bench {
	b := newBench(max)
	b.exists = func(inode uint32, _ uint64) bool { return inode != 404 }
	b.knows = knowledge{connections: true, accepts: true, retransmits: true, backlog: true, refusals: true, halfOpen: true}
	return b
}

// events samples the listeners between two equal reads of the tracker.
func (b *bench) events(listeners []census.Listener, events ...tracker.Listener) {
	b.expect(events)
	b.after(tick, listeners...)
	b.arrive(events, atEpoch)
}

const web = "0.0.0.0:80"

func TestEventsAreAddedOnce(t *testing.T) {
	b := newTrackedBench(10)
	e := counted(1, web, 5, 3)
	e.SynackRetransmits, e.Drops = 2, [tracker.DropReasons]uint64{7, 1}
	e.Drops[tracker.DropOther], e.Syns, e.CookiesSent, e.CookiesValidated, e.Abandoned = 2, 30, 31, 32, 33
	e.HalfOpenEnded = [tracker.HalfOpenEnds]uint64{34, 35, tracker.EndMigrated: 36}
	e.Handshake.Buckets[12], e.Handshake.Sum = 5, 0.5
	e.LastAccept, e.Backlog, e.LastListen = 9*time.Second, 9999, time.Second
	e.AcceptWait.Buckets[20], e.AcceptWait.Sum = 3, 1.5
	b.after(0)
	for range 3 {
		b.events([]census.Listener{listener(1, web, 2, 5)}, e)
	}
	e.Connections, e.AcceptWait.Buckets[20], e.AcceptWait.Sum = 6, 4, 2
	e.Accepts = 4
	e.Drops[tracker.DropAcceptQueueFullSYN], e.Syns, e.CookiesSent, e.CookiesValidated, e.Abandoned = 3, 40, 41, 42, 43
	e.HalfOpenEnded[tracker.EndExpired], e.Handshake.Buckets[13], e.Handshake.Sum = 45, 1, 0.75
	b.events([]census.Listener{listener(1, web, 2, 5)}, e)
	l := b.find(t, web)
	if l.Connections != 6 || l.Accepts != 4 || l.SynackRetransmits != 2 || l.Drops != e.Drops || l.AcceptWait != e.AcceptWait ||
		l.BacklogRequested != 9999 || !l.BacklogRequestedKnown || !l.LastAccept.Equal(time.Unix(9, 0)) {
		t.Errorf("listener is %+v", l)
	}
	if l.Syns != 40 || l.CookiesSent != 41 || l.CookiesValidated != 42 || l.Abandoned != 43 ||
		l.HalfOpenEnded != e.HalfOpenEnded || l.Handshake != e.Handshake {
		t.Errorf("half-open requests of the listener are %+v", l)
	}
	if !l.ConnectionsKnown || !l.AcceptsKnown || !l.AcceptWaitKnown || !l.RetransmitsKnown || !l.RefusalsKnown || !l.HalfOpenKnown {
		t.Errorf("what is known is not: %+v", l)
	}
}

func TestWhatTheTrackerCannotTellIsUnknown(t *testing.T) {
	b := newTrackedBench(10)
	b.knows = knowledge{connections: true}
	e := counted(1, web, 1, 0)
	e.Drops[tracker.DropAcceptQueueFullACK], e.Drops[tracker.DropAcceptQueueFullReset] = 4, 5
	known := e.Drops
	e.Drops[tracker.DropAcceptQueueFullSYN], e.Drops[tracker.DropOther] = 6, 7
	b.events([]census.Listener{listener(1, web, 0, 5)}, e)
	l := b.find(t, web)
	if !l.ConnectionsKnown || l.AcceptsKnown || l.AcceptWaitKnown || l.RetransmitsKnown || l.BacklogRequestedKnown ||
		l.RefusalsKnown || l.HalfOpenKnown || l.Drops != known {
		t.Errorf("listener is %+v", l)
	}
}

// A group shares its labels; one of it goes, and what it counted stays.
func TestGroupIsSummed(t *testing.T) {
	b := newTrackedBench(10)
	first, second := listener(1, web, 0, 5), listener(2, web, 0, 5)
	b.events([]census.Listener{first, second}, counted(1, web, 10, 10), counted(2, web, 1, 1))
	b.events([]census.Listener{second}, counted(1, web, 12, 12), counted(2, web, 2, 2))
	if gone := b.gone(); len(gone) != 1 || gone[0] != 1 {
		t.Fatalf("gone are %v", gone)
	}
	last := counted(1, web, 13, 12)
	last.Abandoned, last.HalfOpenEnded[tracker.EndListenerClosed] = 1, 2
	b.depart(&last, atEpoch)
	b.events([]census.Listener{second}, counted(2, web, 3, 3))
	if l := b.find(t, web); l.Connections != 16 || l.Accepts != 15 || !l.AcceptsKnown ||
		l.Abandoned != 1 || l.HalfOpenEnded[tracker.EndListenerClosed] != 2 {
		t.Errorf("listener is %+v", l)
	}
	// It listens again, under its cookie, and the tracker counts from 0.
	b.events([]census.Listener{first, second}, counted(1, web, 4, 4), counted(2, web, 3, 3))
	if l := b.find(t, web); l.Connections != 20 || l.Accepts != 19 {
		t.Errorf("listening again, listener is %+v", l)
	}
}

// sweep takes what is gone as a sweep does.
func (b *bench) sweep(t *testing.T, last ...tracker.Listener) {
	t.Helper()
	for range missedSweeps {
		b.events(nil, last...)
		b.gone()
	}
	if gone := b.gone(); len(gone) != len(last) {
		t.Fatalf("gone are %v", gone)
	}
	for i := range last {
		b.depart(&last[i], atEpoch)
	}
}

// Between two samples a listener came and went.
func TestBriefListener(t *testing.T) {
	b := newTrackedBench(1)
	b.after(0)
	b.sweep(t, counted(1, web, 3, 3))
	l := b.find(t, web)
	if l.Live || l.Connections != 3 || l.Namespace != "host" {
		t.Errorf("listener is %+v", l)
	}
	if b.owned != 1 || b.waiting != 1 {
		t.Errorf("%d sets, %d of them gone", b.owned, b.waiting)
	}
	// It leaves its place to another one.
	other := []census.Listener{listener(2, "0.0.0.0:81", 0, 5)}
	b.events(other, counted(2, "0.0.0.0:81", 1, 1))
	if l := b.find(t, "0.0.0.0:81"); l.Connections != 1 || len(b.all) != 1 {
		t.Errorf("%d sets, listener is %+v", len(b.all), l)
	}
	// Over the cap it goes under Other.
	e := counted(3, "0.0.0.0:82", 5, 5)
	e.Drops[tracker.DropSynQueueFull] = 6
	b.events(other, counted(2, "0.0.0.0:81", 1, 1), e)
	b.depart(&e, atEpoch)
	if l := b.find(t, Other); l.Connections != 5 || l.Drops[tracker.DropSynQueueFull] != 6 {
		t.Errorf("under other is %+v", l)
	}
	if len(b.crowd) != 0 || len(b.arrivals) != 1 {
		t.Errorf("nobody is there any more, but %v and %v", b.crowd, b.arrivals)
	}
	last := counted(2, "0.0.0.0:81", 1, 1)
	b.events(nil, last)
	b.depart(&last, atEpoch)
	b.after(keepVanished + time.Second)
	b.after(keepVanished + time.Second)
	if len(b.all) != 0 || b.owned != 0 || b.waiting != 0 {
		t.Errorf("%d sets stay, %d owned, %d gone", len(b.all), b.owned, b.waiting)
	}
}

// A brief listener's device has no name any more.
func TestBriefListenerOfADevice(t *testing.T) {
	b := newTrackedBench(10)
	b.after(0)
	e := counted(3, web, 5, 5)
	e.Interface = 7
	b.sweep(t, e)
	if l := b.find(t, web+"%if7"); l.Connections != 5 {
		t.Errorf("listener is %+v", l)
	}
}

// A namespace went with a listener that nobody saw, and its number may be
// another one's by now.
func TestListenerOfANamespaceThatIsGone(t *testing.T) {
	b := newTrackedBench(10)
	young := listener(2, web, 1, 5)
	b.after(0, young)
	e := counted(1, web, 100, 100)
	e.Namespace = tracker.NamespaceID{Cookie: 404, Inode: 404}
	b.events([]census.Listener{young}, e)
	b.depart(&e, atEpoch)
	if l := b.find(t, web); !l.Live || l.Connections != 0 || len(b.all) != 1 {
		t.Errorf("%d sets, listener is %+v", len(b.all), l)
	}
}

// A namespace went, but a sample had met its listener: what it counted is shown.
func TestBriefNamespace(t *testing.T) {
	b := newTrackedBench(10)
	r := listener(1, web, 0, 5)
	r.Inode, r.NetnsCookie = 404, 404
	b.after(0)
	b.after(tick, r)
	e := counted(1, web, 3, 3)
	e.Namespace = tracker.NamespaceID{Cookie: 404, Inode: 404}
	b.sweep(t, e)
	if l := b.find(t, web); l.Connections != 3 || l.Accepts != 3 || b.nobodys != 0 {
		t.Errorf("%d are nobody's, listener is %+v", b.nobodys, l)
	}
	e.Key, e.Address = 2, netip.MustParseAddrPort("0.0.0.0:81")
	b.sweep(t, e)
	if b.nobodys != 1 || len(b.all) != 1 {
		t.Errorf("%d are nobody's, %d sets", b.nobodys, len(b.all))
	}
}

// A group asked for what all its sockets asked for; who asked before the agent
// looked makes it unknown.
func TestRequestedBacklogOfAGroup(t *testing.T) {
	b := newTrackedBench(10)
	b.after(0)
	both := []census.Listener{listener(1, web, 0, 128), listener(2, web, 0, 128)}
	first, second := counted(1, web, 0, 0), counted(2, web, 0, 0)
	first.Backlog, first.LastListen, second.Backlog, second.LastListen = 9999, time.Second, 9999, 2*time.Second
	b.events(both, first, second)
	if l := b.find(t, web); !l.BacklogRequestedKnown || l.BacklogRequested != 2*9999 || l.AcceptQueueLimit != 256 {
		t.Errorf("listener is %+v", l)
	}
	second.LastListen = 0
	b.events(both, first, second)
	if l := b.find(t, web); l.BacklogRequestedKnown {
		t.Errorf("listener is %+v", l)
	}
}

// A sample that missed the socket is no end of it.
func TestSocketThatIsMetLate(t *testing.T) {
	b := newTrackedBench(10)
	b.after(0)
	e := counted(1, web, 3, 3)
	b.events(nil, e)
	if len(b.gone()) != 0 || len(b.all) != 0 {
		t.Error("it is gone before anybody looked")
	}
	b.events([]census.Listener{listener(1, web, 0, 5)}, e)
	if l := b.find(t, web); l.Connections != 3 || len(b.gone()) != 0 {
		t.Errorf("listener is %+v", l)
	}
}

func TestRenamedNamespaceCountsOn(t *testing.T) {
	b := newTrackedBench(10)
	b.events([]census.Listener{listener(1, web, 0, 5)}, counted(1, web, 3, 3))
	b.name = func(uint32, uint64) string { return "web" }
	b.renamed(1, 1)
	b.events([]census.Listener{listener(1, web, 0, 5)}, counted(1, web, 5, 5))
	for _, l := range b.snapshot() {
		if want := map[string]uint64{"host": 3, "web": 2}[l.Namespace]; l.Connections != want {
			t.Errorf("%s has %d connections, want %d", l.Namespace, l.Connections, want)
		}
	}
}

// byLabels is what the tracker counted at listeners that had no cookie.
func byLabels(key uint64, address string, drops uint64) tracker.Listener {
	e := counted(key, address, 0, 0)
	e.ByLabels, e.Drops[tracker.DropSynQueueFull] = true, drops
	return e
}

// A listener has no cookie, and goes by its labels until a sample gives it one.
func TestListenerWithoutACookie(t *testing.T) {
	b := newTrackedBench(10)
	dropped := func(want uint64) {
		t.Helper()
		l := b.find(t, web)
		if got := l.Drops[tracker.DropSynQueueFull]; got != want || l.BacklogRequestedKnown {
			t.Errorf("%d were dropped, want %d: %+v", got, want, l)
		}
	}
	gone := func(want ...uint64) {
		t.Helper()
		if got := b.gone(); !slices.Equal(got, want) {
			t.Errorf("gone are %d, want %d", got, want)
		}
	}
	const labels = 1 << 63
	one := []census.Listener{listener(1, web, 0, 5)}
	b.after(0)
	b.arrive([]tracker.Listener{byLabels(labels, web, 1)}, atEpoch) // the entry may not be whole
	if len(b.all) != 0 {
		t.Errorf("%d sets", len(b.all))
	}
	b.events(nil, byLabels(labels, web, 3)) // and no sample has met the socket
	dropped(3)
	gone()
	named := counted(1, web, 0, 0)
	named.Drops[tracker.DropSynQueueFull] = 10
	b.events(one, byLabels(labels, web, 5), named)
	dropped(15)
	gone() // something happens there yet
	b.events(one, byLabels(labels, web, 5), named)
	dropped(15)
	gone(labels)
	last := byLabels(labels, web, 6)
	b.depart(&last, atEpoch)
	dropped(16)
	// The next one at that address.
	b.events(one, named, byLabels(labels, web, 2))
	b.events([]census.Listener{listener(2, web, 0, 5)}, named, byLabels(labels, web, 4))
	dropped(20)
	if len(b.all) != 1 || b.owned != 1 || b.waiting != 0 {
		t.Errorf("%d sets, %d owned, %d gone", len(b.all), b.owned, b.waiting)
	}
}

// The name of its device is that of the socket that a sample met.
func TestListenerWithoutACookieOfADevice(t *testing.T) {
	b := newTrackedBench(10)
	r := listener(1, web, 0, 5)
	r.Device, r.Interface = "eth0", 7
	other := listener(2, web, 0, 5)
	other.Device, other.Interface = "eth1", 8
	e := byLabels(3, web, 5)
	e.Interface = 7
	b.after(0)
	b.events([]census.Listener{other, r}, e)
	if l := b.find(t, web+"%eth0"); l.Drops[tracker.DropSynQueueFull] != 5 || len(b.all) != 2 {
		t.Errorf("%d sets, listener is %+v", len(b.all), l)
	}
}

// Nobody knows its namespace: it is not kept for ever.
func TestListenerWithoutACookieOfNobody(t *testing.T) {
	b := newTrackedBench(10)
	b.after(0)
	e := byLabels(1, web, 0)
	e.Namespace = tracker.NamespaceID{Cookie: 404, Inode: 404}
	for range missedSweeps {
		if gone := b.gone(); len(gone) != 0 {
			t.Errorf("gone are %d", gone)
		}
		e.Drops[tracker.DropSynQueueFull]++
		b.events(nil, e)
	}
	b.gone()
	if gone := b.gone(); len(gone) != 1 || len(b.all) != 0 {
		t.Errorf("gone are %d, %d sets", gone, len(b.all))
	}
}

func TestRenamedNamespaceOfListenersWithoutACookie(t *testing.T) {
	b := newTrackedBench(10)
	b.after(0)
	b.events(nil, byLabels(1, web, 3))
	b.name = func(uint32, uint64) string { return "web" }
	b.renamed(1, 1)
	b.events(nil, byLabels(1, web, 5))
	for _, l := range b.snapshot() {
		if want := map[string]uint64{"host": 3, "web": 2}[l.Namespace]; l.Drops[tracker.DropSynQueueFull] != want {
			t.Errorf("%s has %+v, want %d", l.Namespace, l, want)
		}
	}
}

// Accepts that no system call returns: connections leave the queue, and nobody
// saw how. Then there is no count rather than a wrong one.
func TestUnseenAccepts(t *testing.T) {
	b := newTrackedBench(10)
	b.after(0)
	at := func(length uint32, connections, accepts uint64) bool {
		b.events([]census.Listener{listener(1, web, length, 5)}, counted(1, web, connections, accepts))
		l := b.find(t, web)
		if l.AcceptWaitKnown != l.AcceptsKnown {
			t.Error("waits are known, accepts are not")
		}
		return l.AcceptsKnown
	}
	if !at(3, 3, 0) || !at(1, 3, 2) {
		t.Error("accepts are unknown, though all were seen")
	}
	if at(0, 3, 2) {
		t.Error("an accept is missing, and they are known")
	}
	if !at(0, 3, 3) {
		t.Error("it was only late")
	}
	if at(0, 5, 4) || at(0, 50, 49) || at(2, 500, 497) {
		t.Error("an accept is missing, and they are known")
	}
	// One in hundreds, and none for a minute.
	if b.after(forgiveAfter, listener(1, web, 0, 5)); !at(0, 1000, 999) || !at(0, 1001, 1000) || b.forgiven != 1 {
		t.Errorf("an accept is not forgiven: %d", b.forgiven)
	}
	for n := uint64(1); n < 10; n++ { // by io_uring
		b.after(forgiveAfter, listener(1, web, 0, 5))
		if at(0, 1001+1000*n, 1000+990*n) {
			t.Error("accepts are missing, more and more, and they are known")
		}
	}
}

// What came between the two reads of the tracker around a sample is no evidence.
func TestConnectionsInFlightAreNotUnseenAccepts(t *testing.T) {
	b := newTrackedBench(10)
	b.after(0)
	for n := uint64(1); n < 100; n += 2 {
		b.expect([]tracker.Listener{counted(1, web, n, n-1)})
		b.after(tick, listener(1, web, 1, 5))
		b.arrive([]tracker.Listener{counted(1, web, n+2, n+1)}, atEpoch)
		if l := b.find(t, web); !l.AcceptsKnown {
			t.Fatalf("after %d connections accepts are unknown", n)
		}
	}
}

// Connections that waited before the agent started are accepted, too.
func TestAcceptsOfWhatWaitedBefore(t *testing.T) {
	b := newTrackedBench(10)
	b.after(0, listener(1, web, 4, 5))
	b.events([]census.Listener{listener(1, web, 4, 5)}, counted(1, web, 1, 1)) // three of the old ones and the new one
	b.events([]census.Listener{listener(1, web, 0, 5)}, counted(1, web, 1, 5))
	if l := b.find(t, web); !l.AcceptsKnown || l.Accepts != 5 || l.Connections != 1 {
		t.Errorf("listener is %+v", l)
	}
}

// After shutdown() and another listen() the queue is empty, and nobody accepted
// what was in it.
func TestListeningAgainIsNoUnseenAccept(t *testing.T) {
	b := newTrackedBench(10)
	b.after(0)
	e := counted(1, web, 5, 2)
	e.LastListen = time.Second
	b.events([]census.Listener{listener(1, web, 3, 5)}, e)
	e.Connections, e.LastListen = 6, 2*time.Second
	b.events([]census.Listener{listener(1, web, 1, 5)}, e)
	if l := b.find(t, web); !l.AcceptsKnown || l.Accepts != 2 {
		t.Errorf("listener is %+v", l)
	}
	b.events([]census.Listener{listener(1, web, 0, 5)}, e)
	if l := b.find(t, web); l.AcceptsKnown {
		t.Error("an accept is missing, and they are known")
	}
}

// Bursts that no sample saw are in the peak: of a set its fullest socket's.
func TestPeakAtArrivals(t *testing.T) {
	b := newTrackedBench(10)
	first, second := counted(1, web, 30, 30), counted(2, web, 9, 9)
	first.Peak, first.PeakRatio = 30, 0.5
	second.Peak, second.PeakRatio = 9, 0.9
	both := []census.Listener{listener(1, web, 0, 59), listener(2, web, 0, 9)}
	b.events(both, first, second)
	if l := b.find(t, web); l.Peak != 30 || l.PeakRatio != 0.9 {
		t.Errorf("listener is %+v", l)
	}
	// The first socket goes; its peak stays as long as a sample's would.
	b.events(both[1:], first, second)
	b.depart(&first, atEpoch)
	b.events(both[1:], second)
	if l := b.find(t, web); l.Peak != 30 {
		t.Errorf("after the socket was gone, listener is %+v", l)
	}
	second.Peak, second.PeakRatio = 0, 0 // two minutes later
	b.after(2*time.Minute, both[1:]...)
	b.events(both[1:], second)
	if l := b.find(t, web); l.Peak != 0 || l.PeakRatio != 0 {
		t.Errorf("two minutes later, listener is %+v", l)
	}
}
