package scenario

import (
	"encoding/binary"
	"net/netip"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"sockq/probes/tcpstate"
)

// phase is a point in a connection's life at which the peer's RST ends it.
type phase struct {
	name, about string
	enter       func(s *Stage, l *Socket) *Conn
	outbound    bool             // not a connection to the listener
	path        []tcpstate.State // without CLOSE, that a RST leads to
	mini        bool             // no full socket is there when the RST comes
	embryonic   bool             // it was a request
	failed      string           // why connect() failed
}

// opened begins the path of a connection to a listener.
func opened(then ...tcpstate.State) []tcpstate.State {
	return append([]tcpstate.State{tcpstate.Listen, tcpstate.SynRecv, tcpstate.Established}, then...)
}

var phases = []phase{
	{
		name: "SYN_SENT", about: "the peer refuses",
		outbound: true, path: []tcpstate.State{tcpstate.Close, tcpstate.SynSent}, failed: "refused",
		enter: func(s *Stage, _ *Socket) *Conn { return s.Peer().claim(s.Begin(s.Peer().Addr(80))) },
	},
	{
		name: "SYN_RECV", about: "a request dies, the listener does not change",
		mini: true, embryonic: true,
		enter: func(s *Stage, l *Socket) *Conn {
			theirs := s.Peer().SYN(l.Addr())
			theirs.AwaitSYNACK()
			return theirs
		},
	},
	{
		name: "SYN_RECV_of_a_full_socket", about: "two SYNs crossed and connect() fails",
		outbound: true, path: []tcpstate.State{tcpstate.Close, tcpstate.SynSent, tcpstate.SynRecv}, failed: "reset",
		enter: func(s *Stage, _ *Socket) *Conn {
			theirs := s.Peer().claim(s.Begin(s.Peer().Addr(80)))
			theirs.CrossSYN()
			theirs.AwaitSYNACK()
			return theirs
		},
	},
	{
		name: "ESTABLISHED", about: "the peer aborts",
		path: opened(),
		enter: func(s *Stage, l *Socket) *Conn {
			_, theirs := s.accepted(l)
			return theirs
		},
	},
	{
		name: "FIN_WAIT1", about: "our FIN is answered with a RST",
		path: opened(tcpstate.FinWait1),
		enter: func(s *Stage, l *Socket) *Conn {
			ours, theirs := s.accepted(l)
			ours.FIN()
			theirs.AwaitFIN()
			return theirs
		},
	},
	{
		name: "FIN_WAIT2", about: "we closed our direction only, the peer aborts",
		path: opened(tcpstate.FinWait1, tcpstate.FinWait2),
		enter: func(s *Stage, l *Socket) *Conn {
			ours, theirs := s.accepted(l)
			ours.FIN()
			theirs.ACKFIN()
			return theirs
		},
	},
	{
		name: "FIN_WAIT2_of_an_orphan", about: "it ends a mini-socket",
		path: opened(tcpstate.FinWait1, tcpstate.FinWait2), mini: true,
		enter: func(s *Stage, l *Socket) *Conn {
			ours, theirs := s.accepted(l)
			ours.Close()
			theirs.ACKFIN()
			return theirs
		},
	},
	{
		name: "TIME_WAIT", about: "time-wait assassination (RFC 1337)",
		path: opened(tcpstate.FinWait1, tcpstate.FinWait2), mini: true,
		enter: func(s *Stage, l *Socket) *Conn {
			ours, theirs := s.accepted(l)
			ours.Close()
			theirs.AwaitFIN()
			theirs.FINACK()
			return theirs
		},
	},
	{
		name: "CLOSING", about: "both closed at once, then the peer aborts",
		path: opened(tcpstate.FinWait1, tcpstate.Closing),
		enter: func(s *Stage, l *Socket) *Conn {
			ours, theirs := s.accepted(l)
			ours.FIN()
			theirs.FIN()
			theirs.AwaitFIN()
			return theirs
		},
	},
	{
		name: "CLOSE_WAIT", about: "the peer closed, then it aborts",
		path: opened(tcpstate.CloseWait),
		enter: func(s *Stage, l *Socket) *Conn {
			_, theirs := s.accepted(l)
			theirs.FIN()
			return theirs
		},
	},
	{
		name: "LAST_ACK", about: "the peer closed, then we, which it answers with a RST",
		path: opened(tcpstate.CloseWait, tcpstate.LastAck),
		enter: func(s *Stage, l *Socket) *Conn {
			ours, theirs := s.accepted(l)
			theirs.FIN()
			ours.poll(unix.POLLRDHUP)
			ours.Close()
			theirs.AwaitFIN()
			return theirs
		},
	},
}

// story tells what the phase and the RST do.
func (p phase) story(s *Stage, l *Socket) Expect {
	want := s.story(l)
	h, took := want.Happened, want.Listeners[0].Took
	if len(p.path) > 0 {
		h.took(1, p.path...)
	}
	if !p.outbound && !p.embryonic {
		took.Connections, took.Accepts = 1, 1
	}
	if p.embryonic {
		want.Events = map[string]uint64{"EmbryonicRsts": 1}
		want.Listeners[0].Drops = 1
		h.AttemptFails = 1
	}
	if p.failed != "" {
		h.failed(1, p.failed)
		h.AttemptFails = 1
	}
	if !p.mini {
		h.took(1, p.path[len(p.path)-1], tcpstate.Close)
		h.ResetsReceived = 1
	}
	return want
}

// resets are about connections that a RST ends, ours or the peer's.
var resets = func() []Scenario {
	var list []Scenario
	for _, p := range phases {
		list = append(list, Scenario{
			Name: "reset_in_" + p.name, About: "RST: " + p.about,
			Play: func(s *Stage) {
				l := s.Listen(5)
				p.enter(s, l).RST()
				s.Check(p.story(s, l))
			},
		})
	}
	return append(list, aborts...)
}()

// aborts are about connections that this side ends without a close.
var aborts = []Scenario{
	{
		Name: "aborted", About: "SO_LINGER of 0 s makes close() send a RST, and so do bytes that were not read",
		Play: func(s *Stage) {
			l := s.Listen(5)
			s.Connect(l.Addr()).Reset()
			l.Accept()

			client := s.Connect(l.Addr())
			server := l.Accept()
			client.Write(10)
			server.poll(unix.POLLIN)
			server.Close()

			want := s.story(l)
			want.Listeners[0].Took.Connections = 2
			want.Listeners[0].Took.Accepts = 2
			want.Happened.inbound(2, tcpstate.Close).outbound(2, tcpstate.Close)
			want.Happened.ResetsSent, want.Happened.ResetsReceived = 2, 2
			s.Check(want)
		},
	},
	{
		Name: "disconnected", About: "connect() with AF_UNSPEC aborts a connection; the same socket connects again",
		Play: func(s *Stage) {
			l := s.Listen(5)
			client := s.Connect(l.Addr())
			client.Disconnect()
			l.Accept()
			want := s.story(l)
			want.Listeners[0].Took.Connections = 1
			want.Listeners[0].Took.Accepts = 1
			want.Happened.inbound(1, tcpstate.Close).outbound(1, tcpstate.Close)
			want.Happened.ResetsSent, want.Happened.ResetsReceived = 1, 1
			s.Check(want)

			client.Connect(l.Addr())
			want.States[tcpstate.Established] = 2
			want.Listeners[0].AcceptQueue = 1
			want.Listeners[0].Took.Connections = 2
			want.Happened.inbound(1).outbound(1)
			s.Check(want)
		},
	},
	{
		Name: "timed_out_while_sending", About: "nobody acknowledges what a connection sends: ESTABLISHED ends without a RST",
		Play: func(s *Stage) {
			l := s.Listen(5)
			ours, _ := s.accepted(l)
			ours.Option(unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 1).Write(10)
			ours.Fails(unix.ETIMEDOUT)
			ours.Await(tcpstate.Close)
			want := s.story(l)
			want.Listeners[0].Took.Connections = 1
			want.Listeners[0].Took.Accepts = 1
			want.Happened.inbound(1, tcpstate.Close)
			s.Check(want)
		},
	},
	{
		Name: "data_after_close", About: "the peer sends to sockets that were closed, in FIN_WAIT1, when they are gone, and in FIN_WAIT2: three RSTs",
		Play: func(s *Stage) {
			// From 5 to 7 minutes after the machine started, when jiffies wrap
			// around 0, the kernel takes each listener for one that has sent
			// cookies (tcp_synq_no_recent_overflow).
			s.NS.Sysctl("net.ipv4.tcp_syncookies", "0")
			l := s.Listen(5)
			want := s.story(l)
			ours, theirs := s.accepted(l)
			ours.Close()
			theirs.AwaitFIN()
			theirs.Write(10)
			theirs.AwaitRST()
			want.Listeners[0].Took.Connections = 1
			want.Listeners[0].Took.Accepts = 1
			want.Happened.inbound(1, tcpstate.FinWait1, tcpstate.Close)
			want.Happened.ResetsSent = 1
			// The tracepoint is in tcp_reset, which does this, too.
			want.Happened.ResetsReceived = 1
			s.Check(want)

			theirs.reset = false
			theirs.Write(10) // it is the listener that answers
			theirs.AwaitRST()
			want.Happened.ResetsSent = 2
			s.Check(want)

			ours, theirs = s.accepted(l)
			ours.Close()
			theirs.ACKFIN()
			theirs.Write(10) // to a time-wait mini-socket in FIN_WAIT2
			theirs.AwaitRST()
			want.Listeners[0].Took.Connections = 2
			want.Listeners[0].Took.Accepts = 2
			want.Happened.inbound(1, tcpstate.FinWait1, tcpstate.FinWait2)
			want.Happened.ResetsSent = 3
			s.Check(want)
		},
	},
	{
		Name: "aborted_in_FIN_WAIT2", About: "SO_LINGER of 0 s, or TCP_LINGER2 below 0: the tracepoint does not tell it from a time-wait",
		Play: func(s *Stage) {
			l := s.Listen(5)
			ours, theirs := s.accepted(l)
			ours.FIN()
			theirs.ACKFIN()
			ours.Await(tcpstate.FinWait2)
			ours.Reset()
			theirs.AwaitRST()

			ours, theirs = s.accepted(l)
			ours.Option(unix.IPPROTO_TCP, unix.TCP_LINGER2, -1).Close()
			theirs.ACKFIN()
			theirs.AwaitRST()

			want := s.story(l)
			want.Listeners[0].Took.Connections = 2
			want.Listeners[0].Took.Accepts = 2
			want.Happened.inbound(2, tcpstate.FinWait1, tcpstate.FinWait2)
			want.Happened.ResetsSent = 2
			s.Check(want)
		},
	},
	{
		Name: "SOCK_DESTROY", About: "the administrator ends a connection, one in FIN_WAIT2, one in SYN_SENT and a request",
		Play: func(s *Stage) {
			l := s.Listen(5)
			want := s.story(l)
			client := s.Connect(l.Addr())
			server := l.Accept()
			s.Destroy(client.Addr(), l.Addr())
			client.Fails(unix.ECONNABORTED)
			server.Fails(unix.ECONNRESET)
			want.Happened.inbound(1, tcpstate.Close).outbound(1, tcpstate.Close)

			ours, theirs := s.accepted(l)
			ours.FIN()
			theirs.ACKFIN()
			ours.Await(tcpstate.FinWait2)
			s.Destroy(l.Addr(), theirs.link.local)
			theirs.AwaitRST()
			want.Happened.inbound(1, tcpstate.FinWait1, tcpstate.FinWait2, tcpstate.Close)

			client = s.Begin(s.Peer().Addr(80))
			s.Destroy(client.Addr(), s.Peer().Addr(80))
			client.Fails(unix.ECONNABORTED)
			want.Happened.took(1, tcpstate.Close, tcpstate.SynSent, tcpstate.Close).failed(1, "other")
			want.Happened.AttemptFails = 1

			theirs = s.Peer().SYN(l.Addr())
			theirs.AwaitSYNACK()
			s.Destroy(l.Addr(), theirs.link.local)

			want.Listeners[0].Took.Connections = 2
			want.Listeners[0].Took.Accepts = 2
			want.Happened.ResetsSent, want.Happened.ResetsReceived = 2, 1
			s.Check(want)
		},
	},
	{
		Name: "SOCK_DESTROY_of_a_listener", About: "the administrator ends a listener: two connections wait there and are reset, a request lives on",
		Play: func(s *Stage) {
			l := s.Listen(5)
			for range 2 {
				s.Peer().Connect(l.Addr())
			}
			s.Peer().SYN(l.Addr()).AwaitSYNACK()
			s.Destroy(l.Addr(), netip.AddrPortFrom(s.Family.Any(), 0))
			want := Expect{
				States: States{tcpstate.Close: 1, tcpstate.SynRecv: 1}, // it is still bound
				Happened: new(Happened).
					took(1, tcpstate.Close, tcpstate.Listen, tcpstate.Close).
					inbound(2, tcpstate.Close),
			}
			want.Happened.ResetsSent = 2
			s.Check(want)
		},
	},
}

// Destroy asks sock_diag to end the socket with these addresses (SOCK_DESTROY).
func (s *Stage) Destroy(local, remote netip.AddrPort) {
	s.Helper()
	b := []byte{byte(s.Family.domain()), unix.IPPROTO_TCP, 0, 0} // struct inet_diag_req_v2
	b = binary.NativeEndian.AppendUint32(b, uint32(tcpstate.MaskAll))
	b = binary.BigEndian.AppendUint16(b, local.Port())
	b = binary.BigEndian.AppendUint16(b, remote.Port())
	for _, a := range []netip.AddrPort{local, remote} {
		var address [16]byte
		copy(address[:], a.Addr().AsSlice())
		b = append(b, address[:]...)
	}
	b = append(b, make([]byte, 4)...)                   // any interface
	b = binary.NativeEndian.AppendUint64(b, ^uint64(0)) // INET_DIAG_NOCOOKIE
	s.NS.Do(func() {
		conn, err := netlink.Dial(unix.NETLINK_SOCK_DIAG, nil)
		if err != nil {
			s.Fatalf("destroy socket: %v", err)
		}
		defer conn.Close()
		const sockDestroy = 21 // SOCK_DESTROY (include/uapi/linux/sock_diag.h)
		if _, err := conn.Execute(netlink.Message{
			Header: netlink.Header{Type: sockDestroy, Flags: netlink.Request | netlink.Acknowledge}, Data: b,
		}); err != nil {
			s.Fatalf("destroy socket %s to %s: %v", local, remote, err)
		}
	})
}
