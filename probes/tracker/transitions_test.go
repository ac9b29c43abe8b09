package tracker

import (
	"maps"
	"testing"

	"golang.org/x/sys/unix"

	"sockq/probes/scenario"
	"sockq/probes/tcpstate"
)

const (
	established = tcpstate.Established
	synSent     = tcpstate.SynSent
	synRecv     = tcpstate.SynRecv
	newSynRecv  = tcpstate.NewSynRecv
	finWait1    = tcpstate.FinWait1
	finWait2    = tcpstate.FinWait2
	closed      = tcpstate.Close
	closeWait   = tcpstate.CloseWait
	lastAck     = tcpstate.LastAck
	listens     = tcpstate.Listen
	closing     = tcpstate.Closing
)

func TestFiftyConnectionsClosedByTheClient(t *testing.T) {
	tr := share(t)
	for _, family := range []scenario.Family{scenario.IPv4, scenario.IPv6} {
		s := scenario.NewStage(t, family)
		id := identify(t, s.NS)
		l := s.Listen(5)
		for range 50 {
			client := s.Connect(l.Addr())
			server := l.Accept()
			client.Close()
			server.Await(closeWait)
			server.Close()
		}
		l.Close()
		want := path(nil, 50, closed, synSent, established, finWait1, finWait2)
		want = path(want, 50, listens, synRecv, established, closeWait, lastAck, closed)
		transitions(t, tr, id, path(want, 1, closed, listens, closed))
		n := happened(t, tr, id)
		connects := map[bool]uint64{true: 50}[owed(StoryConnects)]
		if n.Connects.Count() != connects || len(failures(&n)) != 0 || n.ResetsReceived != 0 || n.ResetsSent != nil {
			t.Errorf("%d connects, failures %v, resets %v and %d", n.Connects.Count(), failures(&n), n.ResetsSent, n.ResetsReceived)
		}
	}
}

func TestSelfConnect(t *testing.T) {
	tr := share(t)
	s := scenario.NewStage(t, scenario.IPv4)
	id := identify(t, s.NS)
	at := s.Next()
	s.Socket().Bind(at).Connect(at).Close()
	transitions(t, tr, id, path(nil, 1, closed, synSent, synRecv, established, finWait1, closing))
}

func TestRefused(t *testing.T) {
	tr := share(t)
	for _, family := range []scenario.Family{scenario.IPv4, scenario.IPv6} {
		s := scenario.NewStage(t, family)
		id := identify(t, s.NS)
		nobody := s.Next()
		for range 3 {
			s.Begin(nobody).Fails(unix.ECONNREFUSED)
		}
		transitions(t, tr, id, path(nil, 3, closed, synSent, closed))
		n := happened(t, tr, id)
		want := map[string]uint64{"refused": 3}
		if !owed(StoryConnects) {
			want = nil
		}
		if got := failures(&n); !maps.Equal(got, want) {
			t.Errorf("connect failures are %v, want %v", got, want)
		}
		if n.Connects.Count() != 0 {
			t.Errorf("%d connects took a time", n.Connects.Count())
		}
	}
}

// One socket connects again and again: what it did before is over.
func TestSocketThatConnectsAgain(t *testing.T) {
	tr := share(t)
	s := scenario.NewStage(t, scenario.IPv4)
	id := identify(t, s.NS)
	l := s.Listen(5)
	k := s.Socket()
	nobody := s.Next()
	for range 3 {
		k.Begin(nobody).Fails(unix.ECONNREFUSED)
		k.Disconnect()
		k.Connect(l.Addr()).Disconnect()
		l.Accept().Close()
	}
	want := path(nil, 3, closed, synSent, closed)
	want = path(want, 3, closed, synSent, established, closed)
	want = path(want, 3, listens, synRecv, established, closed)
	transitions(t, tr, id, path(want, 1, closed, listens))
	n := happened(t, tr, id)
	left, connects := uint64(6), uint64(3)
	if !owed(StoryConnects) {
		left, connects = 0, 0
	}
	if got := n.States[synSent].Count(); got != left || n.Connects.Count() != connects {
		t.Errorf("left SYN_SENT %d times, %d connects", got, n.Connects.Count())
	}
}

// UDP and sockets of other families have states, too.
func TestOnlyTCP(t *testing.T) {
	tr := share(t)
	s := scenario.NewStage(t, scenario.IPv4)
	id, before := identify(t, s.NS), lost(t, tr)["tracked_accepts"]
	s.NS.Do(func() {
		pair := func(domain, kind int, at unix.Sockaddr) (a, b endpoint) {
			for _, e := range []*endpoint{&a, &b} {
				fd, err := unix.Socket(domain, kind|unix.SOCK_CLOEXEC, 0)
				if err != nil {
					t.Fatal(err)
				}
				*e = endpoint{t, fd}
			}
			a.must(unix.Bind(a.fd, at))
			if kind == unix.SOCK_STREAM {
				a.must(unix.Listen(a.fd, 5))
			}
			b.must(unix.Connect(b.fd, a.address()))
			return a, b
		}
		receiver, sender := pair(unix.AF_INET, unix.SOCK_DGRAM, loopback4(0))
		for range 10 {
			if _, err := unix.Write(sender.fd, []byte("x")); err != nil {
				t.Fatal(err)
			}
		}
		for range 10 {
			if _, err := unix.Read(receiver.fd, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
		}
		if err := unix.Connect(sender.fd, &unix.SockaddrInet4{Addr: [4]byte{192, 0, 2, 9}, Port: 80}); err != unix.ENETUNREACH {
			t.Fatalf("connect without a route: %v", err)
		}
		listener, client := pair(unix.AF_UNIX, unix.SOCK_STREAM, &unix.SockaddrUnix{Name: "@"})
		server := listener.accept()
		for _, e := range []endpoint{receiver, sender, listener, client, server} {
			e.close()
		}
	})
	n := happened(t, tr, id)
	if got := edges(&n); len(got) != 0 || len(failures(&n)) != 0 {
		t.Errorf("transitions %v, failures %v", got, failures(&n))
	}
	if got := heard(t, tr, id); len(got) != 0 {
		t.Errorf("listeners %v", got)
	}
	if got := lost(t, tr)["tracked_accepts"] - before; got != 0 {
		t.Errorf("%d accepts lost", got)
	}
}
