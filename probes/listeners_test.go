package probes

import (
	"math"
	"net/netip"
	"testing"
	"time"

	"sockq/probes/census"
)

// bench is a ledger with a clock of its own.
type bench struct {
	*ledger
	now time.Time
}

func newBench(max int) *bench {
	l := newLedger(100*time.Millisecond, max)
	l.name = func(inode uint32, _ uint64) string {
		if inode == 99 {
			return Other
		}
		return "host"
	}
	l.synBound = func(uint32, uint64) (uint64, bool) { return math.MaxUint64, true }
	l.namespace = func(uint32, uint64) (census.Namespace, bool) { return census.Namespace{}, false }
	return &bench{l, time.Unix(1_700_000_040, 0)} // the start of a peak window
}

func (b *bench) after(d time.Duration, listeners ...census.Listener) {
	b.now = b.now.Add(d)
	b.add(b.now, listeners)
}

func (b *bench) find(t *testing.T, address string) Listener {
	t.Helper()
	for _, l := range b.snapshot() {
		if l.Address == address {
			return l
		}
	}
	t.Fatalf("no listener %s in %+v", address, b.snapshot())
	return Listener{}
}

func listener(key uint64, address string, length, limit uint32) census.Listener {
	return census.Listener{
		Key: key, Cookie: key, Inode: 1, NetnsCookie: 1, Address: netip.MustParseAddrPort(address),
		AcceptQueue: length, Limit: limit,
	}
}

func near(t *testing.T, what string, got, want float64) {
	t.Helper()
	if math.Abs(got-want) > 1e-9 {
		t.Errorf("%s is %v, want %v", what, got, want)
	}
}

const tick = 100 * time.Millisecond

func TestQueueOverTime(t *testing.T) {
	b := newBench(10)
	b.after(0, listener(1, "0.0.0.0:80", 0, 5))
	b.after(tick, listener(1, "0.0.0.0:80", 6, 5)) // full: limit + 1
	b.after(tick, listener(1, "0.0.0.0:80", 6, 5))
	b.after(tick, listener(1, "0.0.0.0:80", 5, 5))
	b.after(tick, listener(1, "0.0.0.0:80", 0, 5))
	l := b.find(t, "0.0.0.0:80")
	near(t, "time at full", l.FullSeconds, 0.2)
	near(t, "connection seconds", l.ConnectionSeconds, 0.1*(3+6+5.5+2.5))
	if l.Peak != 6 || l.PeakRatio != 1 || l.AcceptQueue != 0 || l.AcceptQueueLimit != 5 || l.FillRatio != 0 {
		t.Errorf("listener is %+v", l)
	}
}

func TestPeakStaysForOneToTwoMinutes(t *testing.T) {
	b := newBench(10)
	b.after(0, listener(1, "0.0.0.0:80", 0, 9))
	b.after(30*time.Second, listener(1, "0.0.0.0:80", 7, 9))
	for passed := tick; passed < 3*time.Minute; passed += tick {
		b.after(tick, listener(1, "0.0.0.0:80", 1, 9))
		l := b.find(t, "0.0.0.0:80")
		switch {
		case passed <= 60*time.Second && (l.Peak != 7 || l.PeakRatio != 0.7):
			t.Fatalf("after %v the peak is %d, %v", passed, l.Peak, l.PeakRatio)
		case passed >= 120*time.Second && l.Peak != 1:
			t.Fatalf("after %v the peak is still %d", passed, l.Peak)
		}
	}
	// The agent slept: what was before is long gone.
	b.after(0, listener(1, "0.0.0.0:80", 9, 9))
	b.after(time.Hour, listener(1, "0.0.0.0:80", 2, 9))
	if l := b.find(t, "0.0.0.0:80"); l.Peak != 2 {
		t.Errorf("after an hour the peak is %d", l.Peak)
	}
}

func TestLateSamplesAreCountedAndNotMadeUp(t *testing.T) {
	b := newBench(10)
	b.after(0, listener(1, "0.0.0.0:80", 6, 5))
	b.after(time.Minute, listener(1, "0.0.0.0:80", 6, 5))
	l := b.find(t, "0.0.0.0:80")
	near(t, "time at full", l.FullSeconds, 1) // ten intervals
	near(t, "connection seconds", l.ConnectionSeconds, 6)
	if b.lateSamples != 599 {
		t.Errorf("%d samples late, want 599", b.lateSamples)
	}
}

func TestReuseportGroupIsOneSet(t *testing.T) {
	b := newBench(10)
	b.after(0, listener(1, "0.0.0.0:80", 2, 3), listener(2, "0.0.0.0:80", 4, 3), listener(3, "0.0.0.0:80", 0, 9))
	b.after(tick, listener(1, "0.0.0.0:80", 2, 3), listener(2, "0.0.0.0:80", 4, 3), listener(3, "0.0.0.0:80", 0, 9))
	l := b.find(t, "0.0.0.0:80")
	if l.Sockets != 3 || l.AcceptQueue != 6 || l.AcceptQueueLimit != 15 || l.FillRatio != 1 || l.Peak != 4 {
		t.Errorf("group is %+v", l)
	}
	near(t, "time at full", l.FullSeconds, 0.1) // of the fullest socket, not of the sum
}

func TestDropsArePerSocketAndStay(t *testing.T) {
	drops := func(key uint64, n uint32) census.Listener {
		l := listener(key, "0.0.0.0:80", 0, 5)
		l.Drops = n
		return l
	}
	b := newBench(10)
	b.after(0, drops(1, 100)) // before the agent came
	b.after(tick, drops(1, 103))
	b.after(tick, drops(1, 103), drops(2, 4)) // a new socket, counted from its birth
	b.after(tick, drops(2, 5))
	b.after(tick, drops(2, 5), drops(3, 0))
	if l := b.find(t, "0.0.0.0:80"); l.SocketDrops != 3+4+1 {
		t.Errorf("drops are %d, want 8", l.SocketDrops)
	}
	// sk_drops wraps.
	b.after(tick, drops(4, math.MaxUint32))
	before := b.find(t, "0.0.0.0:80").SocketDrops
	b.after(tick, drops(4, 1))
	if l := b.find(t, "0.0.0.0:80"); l.SocketDrops != before+2 {
		t.Errorf("drops rose by %d over the wrap, want 2", l.SocketDrops-before)
	}
}

// A socket that was lost sight of is not born again.
func TestDropsAreCountedOnce(t *testing.T) {
	b := newBench(10)
	l := listener(1, "0.0.0.0:80", 0, 5)
	l.Drops = 100
	b.after(0, l)
	b.after(tick) // shutdown(), or a sample that missed it
	l.Drops = 102
	b.after(tick, l)
	if got := b.find(t, "0.0.0.0:80"); got.SocketDrops != 2 {
		t.Errorf("after it came back drops are %d, want 2", got.SocketDrops)
	}
	l.Device, l.Drops = "eth0", 103
	b.after(tick, l)
	if got := b.find(t, "0.0.0.0:80%eth0"); got.SocketDrops != 1 {
		t.Errorf("bound to a device drops are %d, want 1", got.SocketDrops)
	}
	// Its memory is another socket's now.
	next := listener(1, "0.0.0.0:81", 0, 5)
	next.Cookie, next.Drops = 9, 4
	b.after(tick, next)
	if got := b.find(t, "0.0.0.0:81"); got.SocketDrops != 4 {
		t.Errorf("of the next socket drops are %d, want 4", got.SocketDrops)
	}
	b.after(keepVanished, next)
	b.after(peakWindow, next)
	if len(b.past) != 0 {
		t.Errorf("still remembered: %v", b.past)
	}
}

// At the cap those that are gone give way to those that live.
func TestVanishedSetsGiveWay(t *testing.T) {
	b := newBench(3)
	one, two := listener(1, "0.0.0.0:1", 1, 5), listener(2, "0.0.0.0:2", 2, 5)
	b.after(0, one, two)
	for port := 3; port < 50; port++ { // an ephemeral listener after the other
		passing := listener(uint64(port), netip.AddrPortFrom(netip.IPv4Unspecified(), uint16(port)).String(), 0, 5)
		b.after(tick, one, two, passing)
		b.after(tick, one, two)
	}
	if b.overCap != 0 || b.owned != 3 || b.waiting != 1 {
		t.Errorf("%d over the cap, %d sets, %d of them gone", b.overCap, b.owned, b.waiting)
	}
	name := "web"
	b.name = func(uint32, uint64) string { return name }
	b.renamed(1, 1)
	b.after(tick, one, two)
	live := 0
	for _, l := range b.snapshot() {
		if l.Address == Other {
			t.Errorf("a listener moved to other: %+v", l)
		}
		if l.Live && l.Namespace == "web" {
			live++
		}
	}
	if live != 2 {
		t.Errorf("%d live listeners under the new name: %+v", live, b.snapshot())
	}
}

func TestAddressesAreReusedAtOnce(t *testing.T) {
	old := listener(1, "0.0.0.0:80", 0, 5)
	old.Drops = 50
	for name, change := range map[string]func(*census.Listener){
		"another cookie":               func(l *census.Listener) { l.Cookie = 77 },
		"no cookie, fewer drops":       func(l *census.Listener) { l.Drops = 2 },
		"another namespace":            func(l *census.Listener) { l.NetnsCookie = 7 },
		"another device":               func(l *census.Listener) { l.Device = "eth0" },
		"another port":                 func(l *census.Listener) { l.Address = netip.MustParseAddrPort("0.0.0.0:81") },
		"another inode for the cookie": func(l *census.Listener) { l.Inode = 3 },
	} {
		now := old
		before := old
		if name == "no cookie, fewer drops" {
			before.Cookie, now.Cookie = 0, 0
		}
		change(&now)
		if same(&before, &now) {
			t.Errorf("%s: taken for the same socket", name)
		}
	}
	first, later := old, old
	first.Cookie = 0 // nobody had asked for it
	later.Drops = 51
	if !same(&first, &later) {
		t.Error("a socket that got its cookie is taken for another one")
	}
}

func TestVanishedSetsAreKeptForFiveMinutes(t *testing.T) {
	b := newBench(10)
	b.after(0, listener(1, "0.0.0.0:80", 3, 5))
	b.after(tick, listener(1, "0.0.0.0:80", 3, 5))
	id := b.find(t, "0.0.0.0:80").ID
	b.after(tick)
	l := b.find(t, "0.0.0.0:80")
	if l.Live || l.Sockets != 0 || l.AcceptQueue != 0 || l.ConnectionSeconds == 0 || l.Peak != 3 {
		t.Errorf("vanished set is %+v", l)
	}
	// It comes back: the same series goes on, the time between is not counted.
	sum := l.ConnectionSeconds
	b.after(4*time.Minute, listener(2, "0.0.0.0:80", 5, 5))
	l = b.find(t, "0.0.0.0:80")
	if l.ID != id || !l.Live {
		t.Errorf("set that came back is %+v", l)
	}
	near(t, "connection seconds", l.ConnectionSeconds, sum)
	b.after(tick)
	b.after(keepVanished - time.Second)
	b.find(t, "0.0.0.0:80")
	b.after(time.Second)
	if list := b.snapshot(); len(list) != 0 || b.owned != 0 || len(b.sets) != 0 || len(b.sockets) != 0 {
		t.Errorf("after five minutes there is still %+v", list)
	}
}

func TestOverTheCapIsOther(t *testing.T) {
	b := newBench(2)
	one, two := listener(1, "0.0.0.0:1", 1, 5), listener(2, "0.0.0.0:2", 2, 5)
	three, four := listener(3, "0.0.0.0:3", 3, 5), listener(4, "0.0.0.0:4", 6, 5)
	b.after(0, one, two, three, four)
	other := b.find(t, Other)
	if other.Sockets != 2 || other.AcceptQueue != 9 || other.AcceptQueueLimit != 10 || other.FillRatio != 1 {
		t.Errorf("other is %+v", other)
	}
	if b.overCap != 2 || len(b.snapshot()) != 3 {
		t.Errorf("%d over the cap, %d sets", b.overCap, len(b.snapshot()))
	}
	// Room is made, but a listener never moves; a second socket of its
	// address goes where the first is.
	b.after(tick, one, three, four)
	b.after(keepVanished, one, three, four)
	second := listener(5, "0.0.0.0:3", 1, 5)
	b.after(tick, one, three, four, second)
	if other := b.find(t, Other); other.Sockets != 3 || other.AcceptQueue != 10 {
		t.Errorf("other is %+v", other)
	}
	// Once nobody listens there any more, the next one may have labels.
	b.after(tick, one, four)
	b.after(tick, one, four, listener(6, "0.0.0.0:3", 2, 5))
	if l := b.find(t, "0.0.0.0:3"); l.AcceptQueue != 2 || l.Sockets != 1 {
		t.Errorf("listener is %+v", l)
	}
	if len(b.crowd) != 1 {
		t.Errorf("crowd is %v", b.crowd)
	}
	// A namespace over its own cap has no listener with labels.
	far := listener(7, "0.0.0.0:5", 1, 5)
	far.Inode = 99
	b.after(tick, one, far)
	for _, l := range b.snapshot() {
		if l.Namespace == Other && l.Address != Other {
			t.Errorf("listener %s of the other namespaces", l.Address)
		}
	}
}

func TestSynQueue(t *testing.T) {
	b := newBench(10)
	bound, known := uint64(12), true
	b.synBound = func(uint32, uint64) (uint64, bool) { return bound, known }
	a, c := listener(1, "[::]:80", 0, 16), listener(2, "[::]:80", 0, 8)
	a.SynQueue, c.SynQueue = 4, 5
	b.after(0, a, c)
	l := b.find(t, "[::]:80")
	if !l.SynQueueKnown || l.SynQueue != 9 || l.SynPeak != 5 || !l.SynLimitKnown || l.SynQueueLimit != 12+8 {
		t.Errorf("listener is %+v", l)
	}
	known = false
	a.SynQueue = -1
	b.after(tick, a, c)
	if l := b.find(t, "[::]:80"); l.SynQueueKnown || l.SynLimitKnown {
		t.Errorf("listener is %+v", l)
	}
}

func TestRenamedNamespaceStartsNewSets(t *testing.T) {
	b := newBench(10)
	name := "4026532000"
	b.name = func(uint32, uint64) string { return name }
	l := listener(1, "0.0.0.0:80", 1, 5)
	l.Drops = 7
	b.after(0, l)
	l.Drops = 9
	b.after(tick, l)
	l.AcceptQueue = 6
	b.after(tick, l)
	name = "web"
	b.renamed(1, 1)
	l.Drops, l.AcceptQueue = 10, 0
	b.after(tick, l)
	got := map[string]Listener{}
	for _, l := range b.snapshot() {
		got[l.Namespace] = l
	}
	if len(got) != 2 || got["4026532000"].SocketDrops != 2 || got["web"].SocketDrops != 1 || got["web"].Peak != 6 {
		t.Errorf("sets by namespace are %+v", got)
	}
	if got["4026532000"].Live || !got["web"].Live {
		t.Errorf("sets by namespace are %+v", got)
	}
}

// The number of a namespace that is gone comes back with another one.
func TestAnotherNamespaceOfTheSameNameStartsAtZero(t *testing.T) {
	b := newBench(1)
	l := listener(1, "0.0.0.0:80", 4, 5)
	b.after(0, l)
	l.Drops = 9
	b.after(tick, l)
	b.after(tick)
	other := listener(2, "0.0.0.0:80", 1, 5)
	other.NetnsCookie = 2
	b.after(tick, other)
	got := b.find(t, "0.0.0.0:80")
	if got.SocketDrops != 0 || got.Peak != 1 || len(b.snapshot()) != 1 || b.owned != 1 {
		t.Errorf("listener is %+v, %d sets", got, b.owned)
	}
}

func TestAddressLabel(t *testing.T) {
	for want, l := range map[string]census.Listener{
		"0.0.0.0:80":             {Address: netip.MustParseAddrPort("0.0.0.0:80")},
		"[::]:443":               {Address: netip.MustParseAddrPort("[::]:443")},
		"0.0.0.0:80%vrf1":        {Address: netip.MustParseAddrPort("0.0.0.0:80"), Device: "vrf1"},
		"[::ffff:127.0.0.1]:443": {Address: netip.MustParseAddrPort("[::ffff:127.0.0.1]:443")},
		"0.0.0.0:80%a?":          {Address: netip.MustParseAddrPort("0.0.0.0:80"), Device: "a\xff"},
	} {
		if got := address(&l); got != want {
			t.Errorf("label is %q, want %q", got, want)
		}
	}
}

func BenchmarkSample(b *testing.B) {
	l := newBench(1000)
	var listeners []census.Listener
	for i := range 1000 {
		listeners = append(listeners, listener(uint64(i+1), netip.AddrPortFrom(netip.IPv4Unspecified(), uint16(i+1)).String(), 1, 5))
	}
	l.after(0, listeners...)
	b.ReportAllocs()
	for b.Loop() {
		l.after(tick, listeners...)
	}
}
