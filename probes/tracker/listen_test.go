package tracker

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"sockq/probes/scenario"
	"sockq/probes/tcpstate"
)

func TestBacklogs(t *testing.T) {
	t.Run("returns of system calls", func(t *testing.T) {
		if needs(t, StoryBacklog) {
			backlogs(t, share(t))
		}
	})
	t.Run("hooks", func(t *testing.T) {
		if needsHooks(t, StoryBacklog) {
			backlogs(t, shareHooks(t))
		}
	})
}

func backlogs(t *testing.T, tr *Tracker) {
	t.Helper()
	s := scenario.NewStage(t, scenario.IPv4)
	id := identify(t, s.NS)
	s.NS.Sysctl("net.core.somaxconn", "128")
	want := make(map[uint64]tally)
	for _, asked := range []int{-1, 0, 1, 128, 9999, 1<<31 - 1} {
		l := listenIn(t, s.NS, asked)
		defer l.close()
		want[l.cookie()] = tally{Backlog: int32(asked), Listened: true}
	}
	again := listenIn(t, s.NS, 9999)
	defer again.close()
	again.must(unix.Listen(again.fd, 50), unix.Listen(again.fd, 7))
	want[again.cookie()] = tally{Backlog: 7, Listened: true}

	// These are no TCP listeners, or none at all.
	bare := within(t, s.NS, unix.AF_INET, 0, 0)
	taken := within(t, s.NS, unix.AF_INET, 0, 0)
	defer taken.close()
	taken.must(unix.SetsockoptInt(taken.fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
	bare.must(unix.SetsockoptInt(bare.fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
	bare.must(unix.Bind(bare.fd, loopback4(0)))
	taken.must(unix.Bind(taken.fd, bare.address()), unix.Listen(taken.fd, 3))
	want[taken.cookie()] = tally{Backlog: 3, Listened: true}
	if err := unix.Listen(bare.fd, 3); err != unix.EADDRINUSE {
		t.Errorf("listen on a taken address: %v", err)
	}
	bare.close()

	become(t, "listeners", want, func() map[uint64]tally { return tallies(heard(t, tr, id)) })
	n := happened(t, tr, id)
	// Who finds the port taken was in LISTEN for a moment.
	if starts, ends := count(&n, closed, listens), count(&n, listens, closed); starts != 9 || ends != 1 || n.Unexpected != nil {
		t.Errorf("%d began to listen, %d ended, unexpected %v", starts, ends, n.Unexpected)
	}
}

func TestAddresses(t *testing.T) {
	if !needs(t, StoryBacklog) {
		return
	}
	tr, ns := share(t), scenario.NewNamespace(t)
	id := identify(t, ns)
	type where struct {
		Address   string
		Interface uint32
	}
	want := make(map[uint64]where)
	for _, at := range []struct {
		domain int
		addr   unix.Sockaddr
		device string
	}{
		{unix.AF_INET, loopback4(0), ""},
		{unix.AF_INET, &unix.SockaddrInet4{}, ""},
		{unix.AF_INET, &unix.SockaddrInet4{}, "lo"},
		{unix.AF_INET6, &unix.SockaddrInet6{Addr: netip.IPv6Loopback().As16()}, ""},
		{unix.AF_INET6, &unix.SockaddrInet6{}, ""},
		{unix.AF_INET6, &unix.SockaddrInet6{Addr: netip.MustParseAddr("::ffff:127.0.0.1").As16()}, ""},
	} {
		l := within(t, ns, at.domain, 0, 0)
		defer l.close()
		w := where{}
		if at.device != "" {
			ns.Do(func() { l.must(unix.BindToDevice(l.fd, at.device)) })
			w.Interface = 1
		}
		l.must(unix.Bind(l.fd, at.addr), unix.Listen(l.fd, 5))
		w.Address = l.addrPort().String()
		want[l.cookie()] = w
	}
	become(t, "addresses", want, func() map[uint64]where {
		got := make(map[uint64]where)
		for key, l := range heard(t, tr, id) {
			got[key] = where{l.Address.String(), l.Interface}
		}
		return got
	})
}

// The same socket listens, is shut down and listens again: its cookie is the
// same, and what was taken meanwhile is not counted twice nor lost.
func TestListensAgain(t *testing.T) {
	r := newAcceptRoom(t)
	if r == nil {
		return
	}
	key := r.l.cookie()
	take := func(want tally) {
		t.Helper()
		counts(t, r.tr, r.id, key, want)
		l, ok, err := r.tr.Take(key)
		if err != nil || !ok || tallyOf(l) != want || l.Namespace != r.id || l.Address != r.l.addrPort() {
			t.Errorf("took %+v, %t, %v, want %+v", l, ok, err, want)
		}
		if l, ok, err := r.tr.Take(key); err != nil || ok {
			t.Errorf("took again: %+v, %v", l, err)
		}
	}
	r.dial(2)
	r.l.accept().close()
	take(tally{2, 1, 1, 5, true})

	r.l.must(unix.Shutdown(r.l.fd, unix.SHUT_RD), unix.Listen(r.l.fd, 7))
	r.dial(1)
	take(tally{1, 0, 0, 7, true})
	r.dial(2)
	r.l.queued(3)
	for range 3 {
		r.l.accept().close()
	}
	// One wait began before the entry did.
	take(tally{2, 3, 3, 0, false})

	r.l.must(unix.Shutdown(r.l.fd, unix.SHUT_RD))
	if len(heard(t, r.tr, r.id)) != 0 {
		t.Errorf("after the end: %v", heard(t, r.tr, r.id))
	}
	n := happened(t, r.tr, r.id)
	if starts, ends := count(&n, closed, listens), count(&n, listens, closed); starts != 2 || ends != 2 {
		t.Errorf("began to listen %d times, ended %d times", starts, ends)
	}
}

// Nobody asked a listener for its cookie before the tracker came: its address in
// the kernel is the key until a connection comes, then it has a cookie.
func TestListenerOlderThanTheTracker(t *testing.T) {
	if !needs(t, StoryAccepts) {
		return
	}
	closeShared(t)
	ns := scenario.NewNamespace(t)
	nameless, named := listenIn(t, ns, 5), listenIn(t, ns, 5)
	defer nameless.close()
	defer named.close()
	cookie := named.cookie()
	for _, l := range []endpoint{nameless, named} {
		for range 2 {
			client := dial(t, ns, l)
			defer client.close()
		}
		l.queued(2)
	}
	tr := openTracker(t, everything)
	id := identify(t, ns)

	for _, l := range []endpoint{nameless, named} {
		l.accept().close()
		l.must(unix.Listen(l.fd, 6))
	}
	// What was in the queue before the tracker came waited nobody knows since when.
	old := tally{Accepts: 1, Backlog: 6, Listened: true}
	found := heard(t, tr, id)
	if len(found) != 2 || tallyOf(found[cookie]) != old {
		t.Fatalf("listeners are %+v", found)
	}
	delete(found, cookie)
	var key uint64
	for key = range found {
		if l := found[key]; tallyOf(l) != old || l.Address != nameless.addrPort() {
			t.Errorf("key %#x: %+v", key, l)
		}
	}

	for _, l := range []endpoint{nameless, named} {
		client := dial(t, ns, l)
		defer client.close()
		l.queued(2)
		for range 2 {
			l.accept().close()
		}
	}
	want := map[uint64]tally{cookie: {1, 3, 1, 6, true}}
	if key == nameless.cookie() { // from another tracker on this machine
		want[key] = tally{1, 3, 1, 6, true}
	} else {
		if key>>63 == 0 {
			t.Errorf("%#x is no address of the kernel", key)
		}
		want[key], want[nameless.cookie()] = old, tally{1, 2, 1, 0, false}
	}
	now := heard(t, tr, id)
	if difference := cmp.Diff(want, tallies(now)); difference != "" {
		t.Errorf("listeners (-want +got):\n%s", difference)
	}
	if got := now[nameless.cookie()].Address; got != nameless.addrPort() {
		t.Errorf("address is %s", got)
	}
}

// A burst that is over within milliseconds.
func TestPeak(t *testing.T) {
	if !needs(t, StoryConnections) {
		return
	}
	tr, s := share(t), scenario.NewStage(t, scenario.IPv6)
	id := identify(t, s.NS)
	l := s.Listen(31)
	for range 12 {
		s.Peer().Connect(l.Addr())
	}
	for range 12 {
		l.Accept()
	}
	s.Peer().Connect(l.Addr())
	l.Accept()
	key := s.NS.Sockets(tcpstate.MaskListen)[0].Cookie
	counts(t, tr, id, key, tally{13, 13, 13, 31, true})
	got := heard(t, tr, id)[key]
	if got.Peak != 12 || got.PeakRatio != 12.0/32 {
		t.Errorf("peak %d, %v of its limit", got.Peak, got.PeakRatio)
	}
}
