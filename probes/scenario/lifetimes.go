package scenario

import "sockq/probes/tcpstate"

// lifetimes are about namespaces.
var lifetimes = []Scenario{
	{
		Name: "namespace_without_a_process", About: "a bind mount keeps a namespace, in which nobody lives",
		Named: true,
		Play: func(s *Stage) {
			l := s.Listen(5)
			s.Peer().Connect(l.Addr())
			s.Peer().SYN(l.Addr()).AwaitSYNACK()
			want := s.story(l)
			want.States[tcpstate.Established] = 1
			want.States[tcpstate.SynRecv] = 1
			want.Listeners[0].AcceptQueue = 1
			want.Listeners[0].SynQueue = 1
			want.Listeners[0].Took.Connections = 1
			want.Happened.inbound(1)
			s.Check(want)
		},
	},
	{
		Name: "namespace_of_mini_sockets", About: "all that is left in a namespace are time-waits, which no descriptor keeps",
		Named: true,
		Play: func(s *Stage) {
			l := s.Listen(5)
			timeWaits(s, l)
			l.Close()
			s.Check(Expect{
				States: States{tcpstate.TimeWait: 2, tcpstate.FinWait2: 1},
				Happened: new(Happened).
					took(1, tcpstate.Close, tcpstate.Listen, tcpstate.Close).
					inbound(3, tcpstate.FinWait1, tcpstate.FinWait2),
			})
		},
	},
	{
		Name: "namespace_disappears", About: "a namespace goes, with its listener and its time-waits",
		Play: func(s *Stage) {
			l, other := s.Listen(5), s.Listen(5)
			s.Peer().Connect(l.Addr())
			timeWaits(s, other)
			want := s.story(l, other)
			want.States[tcpstate.Established] = 1
			want.States[tcpstate.TimeWait] = 2
			want.States[tcpstate.FinWait2] = 1
			want.Listeners[0].AcceptQueue = 1
			want.Listeners[0].Took.Connections = 1
			want.Listeners[1].Took = &Took{Connections: 3, Accepts: 3, Requested: 5}
			want.Happened.inbound(1).inbound(3, tcpstate.FinWait1, tcpstate.FinWait2)
			s.Check(want)

			s.End()
			s.Check(Expect{Gone: true})
		},
	},
}

// timeWaits leaves two TIME_WAIT and an orphaned FIN_WAIT2.
func timeWaits(s *Stage, l *Socket) {
	s.Helper()
	for i := range 3 {
		ours, theirs := s.accepted(l)
		ours.Close()
		theirs.ACKFIN()
		if i < 2 {
			theirs.FIN()
		}
	}
}
