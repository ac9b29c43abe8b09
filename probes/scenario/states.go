package scenario

import (
	"strings"

	"golang.org/x/sys/unix"

	"sockq/probes/tcpstate"
)

// still is a way to bring one socket into a state and to keep it there: the
// kernel has only this end of the connection, the other is a silent peer.
type still struct {
	name, about string
	state       tcpstate.State
	outbound    bool // not a connection to the listener
	// What the byte queues show. Sequence numbers of SYN and FIN count.
	receive, send uint64
	enter         func(s *Stage, listener *Socket)
}

// stills are the states of a connection and of a socket before it.
var stills = []still{
	{
		name: "ESTABLISHED", about: "a connection that says nothing",
		state: tcpstate.Established,
		enter: func(s *Stage, l *Socket) { s.accepted(l) },
	},
	{
		name: "SYN_SENT", about: "connect() to an address that does not answer",
		state: tcpstate.SynSent, outbound: true, send: 1,
		enter: func(s *Stage, _ *Socket) { s.Begin(s.Peer().Addr(80)) },
	},
	{
		name: "SYN_RECV", about: "half-open: a SYN without the final ACK leaves a request mini-socket",
		state: tcpstate.SynRecv,
		enter: func(s *Stage, l *Socket) { s.Peer().SYN(l.Addr()).AwaitSYNACK() },
	},
	{
		name: "SYN_RECV of a full socket", about: "both ends opened at once",
		state: tcpstate.SynRecv, outbound: true, send: 1,
		enter: func(s *Stage, _ *Socket) { s.Peer().claim(s.Begin(s.Peer().Addr(80))).CrossSYN() },
	},
	{
		name: "FIN_WAIT1", about: "we closed and the peer has not acknowledged it",
		state: tcpstate.FinWait1, send: 1,
		enter: func(s *Stage, l *Socket) {
			ours, _ := s.accepted(l)
			ours.FIN()
		},
	},
	{
		name: "FIN_WAIT2", about: "we closed, the peer has not: the socket still has an owner",
		state: tcpstate.FinWait2,
		enter: func(s *Stage, l *Socket) {
			ours, theirs := s.accepted(l)
			ours.FIN()
			theirs.ACKFIN()
		},
	},
	{
		name: "FIN_WAIT2 of an orphan", about: "the same without an owner: a time-wait mini-socket in state FIN_WAIT2",
		state: tcpstate.FinWait2,
		enter: func(s *Stage, l *Socket) {
			ours, theirs := s.accepted(l)
			ours.Close()
			theirs.ACKFIN()
		},
	},
	{
		name: "TIME_WAIT", about: "we closed first, then the peer: a time-wait mini-socket",
		state: tcpstate.TimeWait,
		enter: func(s *Stage, l *Socket) {
			ours, theirs := s.accepted(l)
			ours.Close()
			theirs.ACKFIN()
			theirs.FIN()
		},
	},
	{
		name: "CLOSE", about: "bound, neither listening nor connected",
		state: tcpstate.Close,
		enter: func(s *Stage, _ *Socket) { s.Socket().Bind(s.Next()) },
	},
	{
		name: "CLOSE_WAIT", about: "the peer closed and our application has not noticed",
		state: tcpstate.CloseWait, receive: 1,
		enter: func(s *Stage, l *Socket) {
			_, theirs := s.accepted(l)
			theirs.FIN()
		},
	},
	{
		name: "LAST_ACK", about: "the peer closed, then we, and it does not acknowledge that",
		state: tcpstate.LastAck, receive: 1, send: 1,
		enter: func(s *Stage, l *Socket) {
			ours, theirs := s.accepted(l)
			theirs.FIN()
			ours.poll(unix.POLLRDHUP)
			ours.Close()
		},
	},
	{
		name: "CLOSING", about: "both closed at once and neither acknowledged the other's FIN",
		state: tcpstate.Closing, receive: 1, send: 1,
		enter: func(s *Stage, l *Socket) {
			ours, theirs := s.accepted(l)
			ours.FIN()
			theirs.FIN()
		},
	},
}

// accepted opens a connection of the peer to l and accepts it.
func (s *Stage) accepted(l *Socket) (ours *Socket, theirs *Conn) {
	s.Helper()
	theirs = s.Peer().Connect(l.Addr())
	return l.Accept(), theirs
}

// add counts n sockets in st, the requests among them to the first listener.
func (e *Expect) add(st still, n uint64) {
	e.States[st.state] += n
	queues := &e.Inbound
	if st.outbound {
		queues = &e.Outbound
	}
	for range n {
		queues.add(st.receive, st.send)
	}
	if st.state == tcpstate.SynRecv && !st.outbound {
		e.Listeners[0].SynQueue += uint32(n)
	}
}

// states are one scenario for each state, and one for all of them at once.
var states = func() []Scenario {
	list := []Scenario{{
		Name: "LISTEN", About: "a listener that nobody calls",
		Play: func(s *Stage) { s.Check(s.listening(s.Listen(5))) },
	}}
	for _, st := range stills {
		list = append(list, Scenario{
			Name: strings.ReplaceAll(st.name, " ", "_"), About: st.about,
			Play: func(s *Stage) {
				l := s.Listen(5)
				want := s.listening(l)
				st.enter(s, l)
				want.add(st, 1)
				s.Check(want)
			},
		})
	}
	return append(list, Scenario{
		Name: "eleven_states", About: "every state at once",
		Play: func(s *Stage) {
			l := s.Listen(5)
			want := s.listening(l)
			for _, st := range stills {
				st.enter(s, l)
				want.add(st, 1)
			}
			s.Check(want)
		},
	})
}()

// listening expects listeners with a backlog of 5 and nothing else.
func (s *Stage) listening(ls ...*Socket) Expect {
	s.Helper()
	var want Expect
	for _, l := range ls {
		want.States[tcpstate.Listen]++
		want.Listeners = append(want.Listeners, Listener{Address: l.Addr(), Limit: 5})
	}
	return want
}

// Mixed is about two hundred sockets in all states.
var Mixed = Scenario{
	Name: "mixed", About: "two hundred sockets in mixed states",
	Play: func(s *Stage) {
		busy, quiet := s.Listen(64), s.Listen(5)
		want := s.listening(busy, quiet)
		want.Listeners[0].Limit = 64
		// No two states in equal numbers, so that none is taken for another.
		for i, st := range stills {
			n := 12 + i
			for range n {
				st.enter(s, busy)
			}
			want.add(st, uint64(n))
		}
		for range 3 {
			s.Peer().Connect(quiet.Addr())
		}
		want.Listeners[1].AcceptQueue = 3
		want.States[tcpstate.Established] += 3
		s.Check(want)
	},
}
