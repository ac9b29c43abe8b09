package tracker

import (
	"errors"
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"sockq/probes/scenario"
	"sockq/probes/tcpstate"
)

// act lets things of each kind happen in a namespace, which is quiet afterwards:
// two connects that are refused and a listener.
func act(tb testing.TB, ns *scenario.Namespace) map[string]uint64 {
	tb.Helper()
	listenIn(tb, ns, 5).close()
	for range 2 {
		e := within(tb, ns, unix.AF_INET, 0, 0)
		if err := unix.Connect(e.fd, loopback4(1)); err != unix.ECONNREFUSED {
			tb.Fatalf("connect to nobody: %v", err)
		}
		e.close()
	}
	return path(path(nil, 1, closed, listens, closed), 2, closed, synSent, closed)
}

// Two namespaces have counters of their own, the others share theirs.
func TestMoreNamespacesThanPlaces(t *testing.T) {
	if !needs(t, StoryConnects) {
		return
	}
	// Other programs may take the places first.
	for range 10 {
		if moreNamespacesThanPlaces(t) {
			return
		}
	}
	t.Fatal("ten times in a row another program took the place of a namespace")
}

func moreNamespacesThanPlaces(t *testing.T) (settled bool) {
	const places, all = 2, 5
	var rooms []*scenario.Namespace
	var ids []NamespaceID
	for range all + 1 {
		ns := scenario.NewNamespace(t)
		rooms, ids = append(rooms, ns), append(ids, identify(t, ns))
	}
	tr := openTracker(t, Options{Namespaces: places, StateSeconds: true, PerNamespace: true})
	var want map[string]uint64
	for _, ns := range rooms[:all] {
		want = act(t, ns)
	}
	for _, id := range ids[:places] {
		if n := happened(t, tr, id); n.Transitions == [tcpstate.MaxEdges]uint64{} {
			return false
		}
	}
	for i, id := range ids[:places] {
		transitions(t, tr, id, want)
		if n := happened(t, tr, id); n.ConnectFailures[ConnectRefused] != 2 || n.ResetsReceived != 2 || n.States[synSent].Count() != 2 {
			t.Errorf("namespace %d: %+v", i, n)
		}
	}
	list, err := tr.Namespaces()
	if err != nil {
		t.Fatal(err)
	}
	var other *Namespace
	for i := range list {
		if list[i].Members != nil {
			if other != nil {
				t.Error("there are two others")
			}
			other = &list[i]
		}
	}
	const rest = all - places
	if len(list) != places+1 || other == nil || other.ID != (NamespaceID{}) {
		t.Fatalf("%d namespaces, other is %v", len(list), other)
	}
	// Others of this machine may be among them.
	if count(other, synSent, closed) < 2*rest || other.ConnectFailures[ConnectRefused] < 2*rest ||
		other.ResetsReceived < 2*rest || other.States[synSent].Count() < 2*rest {
		t.Errorf("under other: %v, failures %v", edges(other), failures(other))
	}
	if got := lost(t, tr)["tracked_namespaces"]; got < rest {
		t.Errorf("%d namespaces lost, want at least %d", got, rest)
	}

	// The first is gone, and another one has its place.
	if err := tr.Forget(ids[0]); err != nil {
		t.Fatal(err)
	}
	if err := tr.Forget(ids[0]); err != nil {
		t.Errorf("forget again: %v", err)
	}
	transitions(t, tr, ids[0], map[string]uint64{})
	last := rooms[all]
	want = act(t, last)
	if n := happened(t, tr, ids[all]); n.Transitions == [tcpstate.MaxEdges]uint64{} {
		return false
	}
	transitions(t, tr, ids[all], want)
	n := happened(t, tr, ids[all])
	sent := uint64(2)
	if !scenario.KernelAtLeast(6, 12) {
		sent = 0 // there is no socket
	}
	if n.ConnectFailures[ConnectRefused] != 2 || n.ResetsReceived != 2 || n.States[synSent].Count() != 2 || total(n.ResetsSent) != sent {
		t.Errorf("it does not begin with 0: failures %v, resets %v and %d, %d times in SYN_SENT",
			failures(&n), n.ResetsSent, n.ResetsReceived, n.States[synSent].Count())
	}
	var key uint64
	var left int
	events := tr.maps["events"].Iterate()
	var e statesEvent
	for events.Next(&e, &key) {
		if e.Namespace == ids[0].Cookie {
			left++
		}
	}
	if left != 0 {
		t.Errorf("%d events of the namespace that is forgotten are left", left)
	}
	return true
}

// Nothing was read yet of the namespace that is forgotten.
func TestForgetAtOnce(t *testing.T) {
	tr := openTracker(t, everything)
	ns := scenario.NewNamespace(t)
	id := identify(t, ns)
	act(t, ns)
	if err := tr.Forget(id); err != nil {
		t.Fatal(err)
	}
	if n := happened(t, tr, id); len(edges(&n)) != 0 {
		t.Errorf("what is forgotten happened: %v", edges(&n))
	}
}

func TestForgetNobody(t *testing.T) {
	if err := share(t).Forget(NamespaceID{Cookie: 1 << 40, Inode: 1}); err != nil {
		t.Error(err)
	}
}

// Where a socket finds no place, its times are lost, and nothing else.
func TestSocketsTableIsFull(t *testing.T) {
	if !needs(t, StoryStateSeconds) {
		return
	}
	tr := openTracker(t, everything)
	ns := scenario.NewNamespace(t)
	id := identify(t, ns)
	full := make([]bucket, tr.maps["sockets"].MaxEntries())
	keys := make([]uint32, len(full))
	for i := range full {
		keys[i] = uint32(i)
		for p := range full[i].Sk {
			full[i].Sk[p] = 1 // no socket's address
		}
	}
	if _, err := tr.maps["sockets"].BatchUpdate(keys, full, nil); err != nil {
		t.Fatal(err)
	}
	before := lost(t, tr)["tracked_sockets"]
	l := listenIn(t, ns, 5)
	client := dial(t, ns, l)
	server := l.accept()
	client.close()
	server.hungUp()
	server.close()
	l.close()
	want := path(nil, 1, closed, synSent, established, finWait1, finWait2)
	want = path(want, 1, listens, synRecv, established, closeWait, lastAck, closed)
	transitions(t, tr, id, path(want, 1, closed, listens, closed))
	if got := lost(t, tr)["tracked_sockets"] - before; got < 3 {
		t.Errorf("%d sockets lost, want 3 at least", got)
	}
	n := happened(t, tr, id)
	if *n.States != [tcpstate.Count]Histogram{} || n.Connects.Count() != 0 {
		t.Errorf("times are %+v, %d connects", *n.States, n.Connects.Count())
	}
	for _, l := range heard(t, tr, id) {
		if got := tallyOf(l); got != (tally{1, 1, 0, 5, true}) {
			t.Errorf("listener %+v", got)
		}
	}
}

func TestBucketsShift(t *testing.T) {
	for sockets, want := range map[int]int{0: 14, 1: 10, 16_384: 10, 16_385: 11, 20_000: 11, 262_144: 14, 4_194_304: 18, 1 << 30: 18} {
		if got := bucketsShift(sockets); got != want {
			t.Errorf("for %d sockets 2^%d buckets, want 2^%d", sockets, got, want)
		}
	}
}

// More sockets than the smallest table has places for: each is measured or lost.
func TestMoreSocketsThanPlaces(t *testing.T) {
	if !needs(t, StoryStateSeconds) {
		return
	}
	closeShared(t)
	opts := everything
	opts.Sockets = 1
	tr := openTracker(t, opts)
	const sockets = 17_000
	if room := int(tr.maps["sockets"].MaxEntries()) * places; room >= sockets {
		t.Fatalf("room for %d sockets", room)
	}
	s := scenario.NewStage(t, scenario.IPv4)
	id := identify(t, s.NS)
	s.NS.Sysctl("net.core.somaxconn", "20000")
	before := lost(t, tr)["tracked_sockets"]
	l := s.Listen(20_000)
	for range sockets {
		s.Peer().Connect(l.Addr())
	}
	become(t, "connections", sockets, func() int {
		n := happened(t, tr, id)
		return int(count(&n, synRecv, established))
	})
	after := lost(t, tr)["tracked_sockets"]
	s.End() // with RSTs
	var n Namespace
	become(t, "connections that are gone", sockets, func() int {
		n = happened(t, tr, id)
		return int(count(&n, established, closed))
	})
	measured, missing := n.States[established].Count(), after-before
	t.Logf("of %d sockets %d were measured, %d lost", sockets, measured, missing)
	// Other programs of a machine have sockets, too; a guest has none.
	if missing+measured < sockets || measured == 0 || os.Getenv("SOCKQ_TEST_GUEST") != "" && missing+measured != sockets {
		t.Errorf("of %d sockets %d were measured, %d lost", sockets, measured, missing)
	}
}

// Where a listener finds no place, its counts are lost, and nothing else.
func TestListenersMapIsFull(t *testing.T) {
	if !needs(t, StoryAccepts) {
		return
	}
	tr := openTracker(t, everything)
	ns := scenario.NewNamespace(t)
	id := identify(t, ns)
	m := tr.maps["listeners"]
	for i := range uint64(m.MaxEntries()) {
		if err := m.Put(1<<48+i, arrivalsListenerCounts{}); err != nil {
			break // others of this machine listen, too
		}
	}
	if list, err := tr.Listeners(); err != nil || len(list) != int(m.MaxEntries()) {
		t.Fatalf("read %d of %d listeners: %v", len(list), m.MaxEntries(), err)
	}
	before := lost(t, tr)
	l := listenIn(t, ns, 5)
	client := dial(t, ns, l)
	l.accept().close()
	if found := heard(t, tr, id); len(found) != 0 {
		t.Errorf("listeners %v", found)
	}
	// listen(), the arrival, accept()
	after := lost(t, tr)
	if got := after["tracked_listeners"] - before["tracked_listeners"]; got < 3 {
		t.Errorf("%d events of listeners lost, want 3 at least", got)
	}
	if n := happened(t, tr, id); count(&n, synRecv, established) != 1 {
		t.Errorf("transitions are %v", edges(&n))
	}
	if _, ok, err := tr.Take(1 << 48); !ok || err != nil {
		t.Fatalf("took nothing: %v", err)
	}
	client.close()
	l.close()
}

// More than one batch of entries is read, each once.
func TestManyListeners(t *testing.T) {
	tr := openTracker(t, everything)
	const many = 5000
	for i := range uint64(many) {
		if err := tr.maps["listeners"].Put(1<<48+i, arrivalsListenerCounts{Namespace: 1 << 48, Connections: i}); err != nil {
			t.Fatal(err)
		}
	}
	found := heard(t, tr, NamespaceID{Cookie: 1 << 48})
	for i := range uint64(many) {
		if found[1<<48+i].Connections != i {
			t.Fatalf("listener %d is %+v", i, found[1<<48+i])
		}
	}
	list, err := tr.Listeners()
	if err != nil {
		t.Fatal(err)
	}
	seen := make(map[uint64]bool)
	for _, l := range list {
		if seen[l.Key] {
			t.Fatalf("listener %d twice", l.Key)
		}
		seen[l.Key] = true
	}
}

func TestNamespacesAreBounded(t *testing.T) {
	tr := openTracker(t, Options{Namespaces: 1 << 30})
	if got := tr.maps["namespaces"].MaxEntries(); got > 1<<16 {
		t.Errorf("room for %d namespaces", got)
	}
}

// What Other counted of a namespace stays when that is forgotten: counters do not
// fall.
func TestForgottenMemberStaysInOther(t *testing.T) {
	closeShared(t)
	tr := openTracker(t, Options{Namespaces: 1})
	other := func() *Namespace {
		list, err := tr.Namespaces()
		if err != nil {
			t.Fatal(err)
		}
		if list[0].Members == nil {
			t.Fatalf("the first is %+v", list[0])
		}
		return &list[0]
	}
	var members []NamespaceID
	for range 3 {
		ns := scenario.NewNamespace(t)
		act(t, ns)
		members = append(members, identify(t, ns))
	}
	before, refused := *other(), uint64(4)
	if !owed(StoryConnects) {
		refused = 0
	}
	if before.ConnectFailures[ConnectRefused] < refused || before.ResetsReceived < 4 || len(before.Members) < 2 {
		t.Fatalf("other is %+v", before)
	}
	if err := tr.Forget(members...); err != nil {
		t.Fatal(err)
	}
	after := other()
	if after.ConnectFailures[ConnectRefused] < before.ConnectFailures[ConnectRefused] || after.ResetsReceived < before.ResetsReceived ||
		total(after.ResetsSent) < total(before.ResetsSent) || count(after, synSent, closed) < count(&before, synSent, closed) {
		t.Errorf("other was\n%+v, is\n%+v", before, after)
	}
	for _, id := range members {
		if slices.Contains(after.Members, id) {
			t.Errorf("%v is still a member", id)
		}
	}
}

// A raw socket that carries TCP is none of TCP's.
func TestRawSocketIsNoConnect(t *testing.T) {
	ns := scenario.NewNamespace(t)
	id := identify(t, ns)
	tr := openTracker(t, everything)
	ns.Do(func() {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		if err := unix.Connect(fd, &unix.SockaddrInet4{Addr: [4]byte{198, 51, 100, 1}}); !errors.Is(err, unix.ENETUNREACH) {
			t.Fatalf("connect without a route: %v", err)
		}
	})
	if n := happened(t, tr, id); failuresOf(&n) != 0 {
		t.Errorf("failures %v", failures(&n))
	}
}
