package scenario

import "sockq/probes/tcpstate"

// queues are about bytes that were not read and not acknowledged.
var queues = []Scenario{
	{
		Name: "unread", About: "the application does not read what it is sent",
		Play: func(s *Stage) {
			l := s.Listen(5)
			client := s.Connect(l.Addr())
			server := l.Accept()
			client.Write(1000)
			server.Write(30)
			other := s.Connect(l.Addr())
			other.Write(300) // not even accepted
			want := s.story(l)
			want.States[tcpstate.Established] = 4
			want.Listeners[0].AcceptQueue = 1
			want.Listeners[0].Took = &Took{Connections: 2, Accepts: 1, Requested: 5}
			want.Happened.inbound(2).outbound(2)
			want.Inbound = Queues{ReceiveBytes: 1300, ReceiveMaxBytes: 1000}
			want.Outbound = Queues{ReceiveBytes: 30, ReceiveMaxBytes: 30}
			s.Check(want)

			server.Read(400)
			want.Inbound = Queues{ReceiveBytes: 900, ReceiveMaxBytes: 600}
			s.Check(want)

			// Without a listener nothing is inbound.
			l.Accept()
			l.Close()
			s.Check(Expect{
				States:   States{tcpstate.Established: 4},
				Outbound: Queues{ReceiveBytes: 930, ReceiveMaxBytes: 600},
				Happened: want.Happened.took(1, tcpstate.Listen, tcpstate.Close),
			})
		},
	},
	{
		Name: "unsent", About: "the peer's window lets 100 of 700 bytes through and it acknowledges none",
		Play: func(s *Stage) {
			l := s.Listen(5)
			theirs := s.Peer().SYN(l.Addr())
			theirs.AwaitSYNACK()
			theirs.Window(100)
			theirs.ACK()
			l.Accept().Write(700)
			client := s.Begin(s.Peer().Addr(80))
			s.Peer().Answer(client)
			client.Established()
			client.Write(50)
			want := s.story(l)
			want.States[tcpstate.Established] = 2
			want.Listeners[0].Took = &Took{Connections: 1, Accepts: 1, Requested: 5}
			want.Happened.inbound(1).outbound(1)
			want.Inbound = Queues{SendBytes: 700, SendMaxBytes: 700}
			want.Outbound = Queues{SendBytes: 50, SendMaxBytes: 50}
			s.Check(want)

			// Acknowledged, but the window stays closed for the rest.
			theirs.Window(0)
			theirs.awaitBytes(100)
			theirs.ACK()
			want.Inbound = Queues{SendBytes: 600, SendMaxBytes: 600}
			s.Check(want)
		},
	},
	{
		Name: "both_ways", About: "a connection with a full receive queue that still sends",
		Play: func(s *Stage) {
			l := s.Listen(5)
			ours, theirs := s.accepted(l)
			theirs.Write(500)
			theirs.FIN()
			ours.Write(70)
			want := s.story(l)
			want.States[tcpstate.CloseWait] = 1
			want.Listeners[0].Took = &Took{Connections: 1, Accepts: 1, Requested: 5}
			want.Happened.inbound(1, tcpstate.CloseWait)
			// The FIN counts as one byte.
			want.Inbound = Queues{ReceiveBytes: 501, ReceiveMaxBytes: 501, SendBytes: 70, SendMaxBytes: 70}
			s.Check(want)
		},
	},
}
