package scenario

import (
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"sockq/probes/tcpstate"
)

// overflows are about SYNs and final ACKs that are refused, mostly since queues are
// full, and about handshakes that take another way than through the SYN queue once.
var overflows = []Scenario{
	{
		Name: "abort_on_overflow_0", About: "the final ACK at a full accept queue is ignored; sent again when there is a place, it gets in",
		Play: func(s *Stage) {
			l, third, want := lastPlace(s, "0")
			s.Settle(want)

			l.Accept()
			third.ACK()
			want.States[tcpstate.Established] = 3
			want.States[tcpstate.SynRecv] = 0
			want.Listeners[0].SynQueue = 0
			want.Listeners[0].Took = &Took{Connections: 3, Accepts: 1, IgnoredACKs: 1, Requested: 1}
			want.Happened.inbound(1)
			s.Check(want)
		},
	},
	{
		Name: "abort_on_overflow_1", About: "the final ACK at a full accept queue is answered with a RST and the request dies",
		Play: func(s *Stage) {
			_, third, want := lastPlace(s, "1")
			third.AwaitRST()
			want.States[tcpstate.SynRecv] = 0
			want.Listeners[0].SynQueue = 0
			want.Listeners[0].Took = &Took{Connections: 2, ResetACKs: 1, Requested: 1}
			want.Events["EmbryonicRsts"] = 1
			want.Happened.ResetsSent = 1
			s.Check(want)
		},
	},
	{
		Name: "overflow_at_SYN_and_ACK", About: "a full accept queue ignores a final ACK and drops three SYNs",
		Play: func(s *Stage) {
			l, _, want := lastPlace(s, "0")
			s.Settle(want)

			for range 3 {
				s.Peer().SYN(l.Addr())
			}
			want.Listeners[0].Drops = 5
			want.Events = map[string]uint64{"ListenOverflows": 4, "ListenDrops": 4}
			s.Check(want)
		},
	},
	{
		Name: "SYN_cookies_always", About: "tcp_syncookies=2: no SYN makes a request; three cookies come back, a fourth is forged",
		Play: func(s *Stage) {
			s.NS.Sysctl("net.ipv4.tcp_syncookies", "2")
			l := s.Listen(5)
			var clients []*Conn
			for range 4 {
				clients = append(clients, s.Peer().SYN(l.Addr()))
			}
			want := s.story(l)
			want.Events = map[string]uint64{"TCPReqQFullDoCookies": 4, "SyncookiesSent": 4}
			s.Check(want)

			for _, c := range clients {
				c.AwaitSYNACK()
			}
			for _, c := range clients[:3] {
				c.ACK()
			}
			want.States[tcpstate.Established] = 3
			want.Listeners[0].AcceptQueue = 3
			want.Listeners[0].Took.Connections = 3
			want.Events["SyncookiesRecv"] = 3
			want.Happened.inbound(3)
			s.Check(want)

			forger := clients[3]
			forger.received += 1 << 16
			forger.ACK()
			forger.AwaitRST()
			want.Events["SyncookiesFailed"] = 1
			want.Happened.ResetsSent = 1
			l.Accept()
			want.Listeners[0].AcceptQueue = 2
			want.Listeners[0].Took.Accepts = 1
			s.Check(want)
		},
	},
	{
		Name: "SYN_cookies_overflow", About: "tcp_syncookies=2: two cookies come back for the last place in the accept queue, then a SYN is dropped",
		Play: func(s *Stage) {
			s.NS.Sysctl("net.ipv4.tcp_syncookies", "2")
			l := s.Listen(0)
			first, second := s.Peer().SYN(l.Addr()), s.Peer().SYN(l.Addr())
			first.AwaitSYNACK()
			second.AwaitSYNACK()
			first.ACK()
			second.ACK()
			want := s.story(l)
			want.States[tcpstate.Established] = 1
			want.Listeners[0].Limit = 0
			want.Listeners[0].AcceptQueue = 1
			want.Listeners[0].Drops = 1
			want.Listeners[0].Took = nil // no drop reason tells of the second ACK
			want.Events = map[string]uint64{
				"TCPReqQFullDoCookies": 2, "SyncookiesSent": 2, "SyncookiesRecv": 2,
				"ListenOverflows": 1, "ListenDrops": 1,
			}
			want.Happened.inbound(1)
			s.Settle(want)

			s.Peer().SYN(l.Addr())
			want.Listeners[0].Drops = 2
			want.Events["ListenOverflows"]++
			want.Events["ListenDrops"]++
			want.Events["TCPReqQFullDoCookies"]++
			s.Check(want)
		},
	},
	{
		Name: "half_open_expires", About: "tcp_synack_retries=1: two SYN-ACKs are sent again after 1 s, their requests are gone after 3 s",
		Play: func(s *Stage) {
			s.NS.Sysctl("net.ipv4.tcp_synack_retries", "1")
			l := s.Listen(5)
			began := time.Now()
			for range 2 {
				s.Peer().SYN(l.Addr()).AwaitSYNACK()
			}
			want := s.story(l)
			want.States[tcpstate.SynRecv] = 2
			want.Listeners[0].SynQueue = 2
			s.Settle(want)

			want.States[tcpstate.SynRecv] = 0
			want.Listeners[0].SynQueue = 0
			want.Listeners[0].Took.SynackRetransmits = 2
			s.Check(want)
			if took := time.Since(began); took < 2900*time.Millisecond {
				s.Errorf("half-open requests ended after %s, want 3s", took)
			}
		},
	},
	{
		Name: "duplicate_SYN", About: "of four SYNs that repeat the first the kernel answers two: it limits such answers until told not to",
		Play: func(s *Stage) {
			s.NS.Sysctl("net.ipv4.tcp_invalid_ratelimit", "60000") // ms
			l := s.Listen(5)
			theirs := s.Peer().SYN(l.Addr())
			theirs.AwaitSYNACK()
			for range 3 {
				theirs.repeatSYN()
			}
			want := s.story(l)
			want.States[tcpstate.SynRecv] = 1
			want.Listeners[0].SynQueue = 1
			want.Listeners[0].Drops = 3 // though no SYN was refused
			s.Settle(want)

			s.NS.Sysctl("net.ipv4.tcp_invalid_ratelimit", "0")
			theirs.repeatSYN()
			want.Listeners[0].Drops = 4
			s.Settle(want)

			theirs.ACK()
			want.States[tcpstate.SynRecv] = 0
			want.States[tcpstate.Established] = 1
			want.Listeners[0].SynQueue = 0
			want.Listeners[0].AcceptQueue = 1
			want.Listeners[0].Took = &Took{Connections: 1, SynackRetransmits: 2, Requested: 5}
			want.Happened.inbound(1)
			s.Check(want)
		},
	},
	{
		Name: "no_way_back", About: "two SYNs from an address without a route are dropped before there is a request",
		Play: func(s *Stage) {
			l := s.Listen(5)
			for range 2 {
				s.Peer().StraySYN(l.Addr())
			}
			want := s.story(l)
			want.Listeners[0].Drops = 2
			want.Events = map[string]uint64{"ListenDrops": 2}
			s.Check(want)
		},
	},
	{
		Name: "fast_open", About: "a SYN with data makes a connection in SYN_RECV, which is accepted before the final ACK",
		Play: func(s *Stage) {
			l := s.Listen(5)
			s.fastOpen(l, 20)
			want := s.story(l)
			want.States[tcpstate.SynRecv] = 1
			want.Listeners[0].AcceptQueue = 1
			want.Listeners[0].Took = nil // in the queue, but no handshake was completed
			want.Inbound = Queues{ReceiveBytes: 20, ReceiveMaxBytes: 20}
			want.Happened.took(1, tcpstate.Listen, tcpstate.SynRecv)
			s.Check(want)

			l.Accept()
			want.Listeners[0].AcceptQueue = 0
			s.Check(want)
		},
	},
	{
		Name: "fast_open_completed", About: "the final ACK comes to a connection that was accepted, and read, in SYN_RECV",
		Play: func(s *Stage) {
			l := s.Listen(5)
			theirs := s.fastOpen(l, 20)
			l.Accept().Read(20)
			theirs.ACK()
			want := s.story(l)
			want.States[tcpstate.Established] = 1
			want.Listeners[0].Took = &Took{Connections: 1, Accepts: 1, Requested: 5}
			want.Happened.inbound(1)
			s.Check(want)
		},
	},
}

// lastPlace is a listener with room for two connections, which it has when the
// final ACK of a third comes, and what is to be seen where that is ignored.
func lastPlace(s *Stage, abortOnOverflow string) (l *Socket, third *Conn, want Expect) {
	s.Helper()
	s.NS.Sysctl("net.ipv4.tcp_abort_on_overflow", abortOnOverflow)
	l = s.Listen(1)
	s.Peer().Connect(l.Addr())
	second, third := s.Peer().SYN(l.Addr()), s.Peer().SYN(l.Addr())
	second.AwaitSYNACK()
	third.AwaitSYNACK()
	second.ACK()
	l.queued(2)
	third.ACK()
	want = s.story(l)
	want.States[tcpstate.Established] = 2
	want.States[tcpstate.SynRecv] = 1
	want.Listeners[0].Limit = 1
	want.Listeners[0].AcceptQueue = 2
	want.Listeners[0].SynQueue = 1
	want.Listeners[0].Drops = 2 // both counts are of the third's ACK
	want.Listeners[0].Took = &Took{Connections: 2, IgnoredACKs: 1, Requested: 1}
	want.Events = map[string]uint64{"ListenOverflows": 1, "ListenDrops": 1}
	want.Happened.inbound(2)
	return l, third, want
}

// repeatSYN sends the SYN again.
func (c *Conn) repeatSYN() {
	c.p.s.Helper()
	c.next--
	c.send(flagSYN, nil)
	c.next++
}

// fastOpen sends l a SYN with data and no cookie, which the namespace is told to
// take (RFC 7413), and waits for the answer.
func (s *Stage) fastOpen(l *Socket, bytes int) *Conn {
	s.Helper()
	// TFO_SERVER_ENABLE, TFO_SERVER_COOKIE_NOT_REQD (include/net/tcp.h)
	s.NS.Sysctl("net.ipv4.tcp_fastopen", strconv.Itoa(0x2|0x200))
	l.Option(unix.IPPROTO_TCP, unix.TCP_FASTOPEN, 5)
	p := s.Peer()
	c := &Conn{p: p, link: link{p.Addr(p.port), l.Addr()}, next: 1000, window: 0xffff}
	p.port++
	p.conns[c.link] = c
	c.send(flagSYN, make([]byte, bytes))
	c.next += 1 + uint32(bytes)
	c.AwaitSYNACK()
	return c
}
