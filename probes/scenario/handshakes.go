package scenario

import (
	"golang.org/x/sys/unix"

	"sockq/probes/tcpstate"
)

// handshakes are about how connections begin, and whole lives of connections.
var handshakes = []Scenario{
	{
		Name: "three_way_handshake", About: "SYN and SYN-ACK make no event; with the final ACK the new socket shows two",
		Play: func(s *Stage) {
			l := s.Listen(5)
			want := s.story(l)
			theirs := s.Peer().SYN(l.Addr())
			theirs.AwaitSYNACK()
			want.States[tcpstate.SynRecv] = 1
			want.Listeners[0].SynQueue = 1
			s.Check(want)

			theirs.ACK()
			want.States[tcpstate.SynRecv] = 0
			want.States[tcpstate.Established] = 1
			want.Listeners[0].SynQueue = 0
			want.Listeners[0].AcceptQueue = 1
			want.Listeners[0].Took.Connections = 1
			want.Happened.inbound(1)
			s.Check(want)

			l.Accept()
			want.Listeners[0].AcceptQueue = 0
			want.Listeners[0].Took.Accepts = 1
			s.Check(want)
		},
	},
	{
		Name: "fifty_connections", About: "fifty connections, one after the other, closed by the client",
		Play: func(s *Stage) {
			l := s.Listen(5)
			for range 50 {
				client := s.Connect(l.Addr())
				server := l.Accept()
				client.Close()
				server.poll(unix.POLLRDHUP)
				server.Close()
			}
			want := s.story(l)
			want.States[tcpstate.TimeWait] = 50
			want.Listeners[0].Took.Connections = 50
			want.Listeners[0].Took.Accepts = 50
			want.Happened.
				outbound(50, tcpstate.FinWait1, tcpstate.FinWait2).
				inbound(50, tcpstate.CloseWait, tcpstate.LastAck, tcpstate.Close)
			s.Check(want)
		},
	},
	{
		Name: "closed_by_server", About: "seven connections, all open at once, closed by the server",
		Play: func(s *Stage) {
			l := s.Listen(5)
			var clients, servers []*Socket
			for range 7 {
				clients = append(clients, s.Connect(l.Addr()))
				servers = append(servers, l.Accept())
			}
			for _, k := range servers {
				k.Close()
			}
			for _, k := range clients {
				k.poll(unix.POLLRDHUP)
				k.Close()
			}
			want := s.story(l)
			want.States[tcpstate.TimeWait] = 7
			want.Listeners[0].Took.Connections = 7
			want.Listeners[0].Took.Accepts = 7
			want.Happened.
				inbound(7, tcpstate.FinWait1, tcpstate.FinWait2).
				outbound(7, tcpstate.CloseWait, tcpstate.LastAck, tcpstate.Close)
			s.Check(want)
		},
	},
	{
		Name: "simultaneous_open", About: "two SYNs cross: SYN_RECV is a full socket's, and no listener has a part in it",
		Play: func(s *Stage) {
			client := s.Begin(s.Peer().Addr(80))
			theirs := s.Peer().claim(client)
			theirs.CrossSYN()
			theirs.AwaitSYNACK()
			want := Expect{
				States:   States{tcpstate.SynRecv: 1},
				Outbound: Queues{SendBytes: 1, SendMaxBytes: 1},
				Happened: new(Happened).took(1, tcpstate.Close, tcpstate.SynSent, tcpstate.SynRecv),
			}
			s.Check(want)

			theirs.ACK()
			client.Established()
			want.States = States{tcpstate.Established: 1}
			want.Outbound = Queues{}
			want.Happened.took(1, tcpstate.SynRecv, tcpstate.Established)
			s.Check(want)
		},
	},
	{
		Name: "self_connect", About: "a socket connects to itself, which is a simultaneous open, and closes, which is a simultaneous close",
		Play: func(s *Stage) {
			addr := s.Next()
			k := s.Socket().Bind(addr).Connect(addr)
			want := Expect{
				States: States{tcpstate.Established: 1},
				Happened: new(Happened).
					took(1, tcpstate.Close, tcpstate.SynSent, tcpstate.SynRecv, tcpstate.Established),
			}
			s.Check(want)

			k.Close()
			want.States = States{tcpstate.TimeWait: 1}
			want.Happened.took(1, tcpstate.Established, tcpstate.FinWait1, tcpstate.Closing)
			s.Check(want)
		},
	},
	{
		Name: "closed_in_SYN_RECV", About: "the application closes while two SYNs have crossed: the FIN is sent before ESTABLISHED",
		Play: func(s *Stage) {
			client := s.Begin(s.Peer().Addr(80))
			theirs := s.Peer().claim(client)
			theirs.CrossSYN()
			theirs.AwaitSYNACK()
			client.Close()
			want := Expect{
				States:   States{tcpstate.FinWait1: 1},
				Outbound: Queues{SendBytes: 2, SendMaxBytes: 2}, // SYN and FIN
				Happened: new(Happened).
					took(1, tcpstate.Close, tcpstate.SynSent, tcpstate.SynRecv, tcpstate.FinWait1),
			}
			s.Check(want)

			theirs.ACKFIN()
			want.States = States{tcpstate.FinWait2: 1}
			want.Outbound = Queues{}
			want.Happened.took(1, tcpstate.FinWait1, tcpstate.FinWait2)
			s.Check(want)
		},
	},
}

// story is listening with what it takes to listen, for a scenario that tells
// what happens.
func (s *Stage) story(ls ...*Socket) Expect {
	s.Helper()
	want := s.listening(ls...)
	want.Happened = new(Happened).took(uint64(len(ls)), tcpstate.Close, tcpstate.Listen)
	for i := range want.Listeners {
		want.Listeners[i].Took = &Took{Requested: 5}
	}
	return want
}
