package scenario

import (
	"golang.org/x/sys/unix"

	"sockq/probes/tcpstate"
)

// closes are about how connections end in an orderly way, or are left halfway.
// The tracepoint tells nothing true of how a socket leaves FIN_WAIT2 or CLOSING
// for a time-wait mini-socket.
var closes = []Scenario{
	{
		Name: "four_way_close", About: "the client closes, later the server",
		Play: func(s *Stage) {
			l := s.Listen(5)
			client := s.Connect(l.Addr())
			server := l.Accept()
			want := s.story(l)
			want.States[tcpstate.Established] = 2
			want.Listeners[0].Took.Connections = 1
			want.Listeners[0].Took.Accepts = 1
			want.Happened.outbound(1).inbound(1)
			s.Check(want)

			client.FIN()
			want.States[tcpstate.Established] = 0
			want.States[tcpstate.FinWait2] = 1
			want.States[tcpstate.CloseWait] = 1
			want.Inbound = Queues{ReceiveBytes: 1, ReceiveMaxBytes: 1}
			want.Happened.
				took(1, tcpstate.Established, tcpstate.FinWait1, tcpstate.FinWait2).
				took(1, tcpstate.Established, tcpstate.CloseWait)
			s.Check(want)

			server.FIN()
			want.States[tcpstate.FinWait2] = 0
			want.States[tcpstate.CloseWait] = 0
			want.States[tcpstate.TimeWait] = 1
			want.Inbound = Queues{}
			want.Happened.took(1, tcpstate.CloseWait, tcpstate.LastAck, tcpstate.Close)
			s.Check(want)
		},
	},
	{
		Name: "simultaneous_close", About: "two FINs cross",
		Play: func(s *Stage) {
			l := s.Listen(5)
			ours, theirs := s.accepted(l)
			want := s.story(l)
			want.Listeners[0].Took.Connections = 1
			want.Listeners[0].Took.Accepts = 1
			ours.Close()
			theirs.FIN()
			theirs.AwaitFIN()
			want.States[tcpstate.Closing] = 1
			want.Inbound = Queues{ReceiveBytes: 1, ReceiveMaxBytes: 1, SendBytes: 1, SendMaxBytes: 1}
			want.Happened.inbound(1, tcpstate.FinWait1, tcpstate.Closing)
			s.Check(want)

			theirs.ACK()
			want.States[tcpstate.Closing] = 0
			want.States[tcpstate.TimeWait] = 1
			want.Inbound = Queues{}
			s.Check(want)
		},
	},
	{
		Name: "FIN_with_ACK_of_FIN", About: "one segment acknowledges our FIN and has the peer's: FIN_WAIT2 is passed all the same",
		Play: func(s *Stage) {
			l := s.Listen(5)
			want := s.story(l)
			for _, end := range []func(*Socket){(*Socket).FIN, (*Socket).Close} { // with an owner, and an orphan
				ours, theirs := s.accepted(l)
				end(ours)
				theirs.AwaitFIN()
				theirs.FINACK()
			}
			want.States[tcpstate.TimeWait] = 2
			want.Listeners[0].Took.Connections = 2
			want.Listeners[0].Took.Accepts = 2
			want.Happened.inbound(2, tcpstate.FinWait1, tcpstate.FinWait2)
			s.Check(want)
		},
	},
	{
		Name: "orphaned_FIN_WAIT2", About: "we closed, the peer does not, and tcp_fin_timeout ends what a mini-socket waits for",
		Play: func(s *Stage) {
			l := s.Listen(5)
			ours, theirs := s.accepted(l)
			ours.Close()
			theirs.ACKFIN()
			want := s.story(l)
			want.States[tcpstate.FinWait2] = 1
			want.Listeners[0].Took.Connections = 1
			want.Listeners[0].Took.Accepts = 1
			want.Happened.inbound(1, tcpstate.FinWait1, tcpstate.FinWait2)
			s.Check(want)

			// One whose time is up within the scenario.
			s.NS.Sysctl("net.ipv4.tcp_fin_timeout", "1")
			ours, brief := s.accepted(l)
			ours.Close()
			brief.ACKFIN()
			want.Listeners[0].Took.Connections = 2
			want.Listeners[0].Took.Accepts = 2
			want.Happened.inbound(1, tcpstate.FinWait1, tcpstate.FinWait2)
			s.Check(want)

			// The peer closes at last.
			theirs.FIN()
			want.States[tcpstate.FinWait2] = 0
			want.States[tcpstate.TimeWait] = 1
			s.Check(want)
		},
	},
	{
		Name: "CLOSE_WAIT_left_open", About: "the peers of three connections closed and our application forgot them",
		Play: func(s *Stage) {
			l := s.Listen(5)
			for range 3 {
				_, theirs := s.accepted(l)
				theirs.FIN()
			}
			want := s.story(l)
			want.States[tcpstate.CloseWait] = 3
			want.Listeners[0].Took.Connections = 3
			want.Listeners[0].Took.Accepts = 3
			want.Inbound = Queues{ReceiveBytes: 3, ReceiveMaxBytes: 1}
			want.Happened.inbound(3, tcpstate.CloseWait)
			s.Check(want)
		},
	},
	{
		Name: "listener_closed", About: "close() of a listener that nobody called, and shutdown() of another, which stays bound and listens again",
		Play: func(s *Stage) {
			closed, shut := s.Listen(5), s.Listen(5)
			closed.Close()
			shut.Shutdown(unix.SHUT_RD)
			want := Expect{
				States:   States{tcpstate.Close: 1},
				Happened: new(Happened).took(2, tcpstate.Close, tcpstate.Listen, tcpstate.Close),
			}
			s.Check(want)

			shut.Listen(5)
			again := s.listening(shut)
			again.Happened = want.Happened.took(1, tcpstate.Close, tcpstate.Listen)
			s.Check(again)
		},
	},
}
