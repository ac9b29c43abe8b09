package scenario

import (
	"fmt"
	"strconv"
	"time"

	"sockq/probes/tcpstate"
)

// backlogs are about the length and the limit of the accept queue.
var backlogs = []Scenario{
	tenCallers(0), tenCallers(1), tenCallers(5),
	{
		Name: "ten_clients", About: "the classic demonstration: listen(5), ten clients, no accept()",
		Play: func(s *Stage) {
			l := s.Listen(5)
			for range 6 {
				s.Connect(l.Addr())
			}
			for range 4 {
				s.Begin(l.Addr())
			}
			want := Expect{
				States: States{
					tcpstate.Listen: 1, tcpstate.Established: 12, tcpstate.SynSent: 4,
				},
				Listeners: []Listener{{
					Address: l.Addr(), AcceptQueue: 6, Limit: 5, Drops: 4,
					Took: &Took{Connections: 6, Requested: 5},
				}},
				Outbound:    Queues{SendBytes: 4, SendMaxBytes: 1}, // their SYNs
				Events:      map[string]uint64{"ListenOverflows": 4, "ListenDrops": 4},
				Retransmits: true,
				Happened: new(Happened).
					took(1, tcpstate.Close, tcpstate.Listen).
					inbound(6).outbound(6).took(4, tcpstate.Close, tcpstate.SynSent),
			}
			s.Check(want)
		},
	},
	{
		Name: "final_ACK_ignored", About: "two clients shake hands at once for the last place: one stays half-open",
		Play: func(s *Stage) {
			l := s.Listen(1)
			s.Peer().Connect(l.Addr())
			second, third := s.Peer().SYN(l.Addr()), s.Peer().SYN(l.Addr())
			second.AwaitSYNACK()
			third.AwaitSYNACK()
			second.ACK()
			third.ACK()
			s.Check(Expect{
				States: States{tcpstate.Listen: 1, tcpstate.Established: 2, tcpstate.SynRecv: 1},
				// sk_drops counts an ignored ACK twice.
				Listeners: []Listener{{
					Address: l.Addr(), AcceptQueue: 2, Limit: 1, SynQueue: 1, Drops: 2,
					Took: &Took{Connections: 2, IgnoredACKs: 1, Requested: 1},
				}},
				Events:   map[string]uint64{"ListenOverflows": 1, "ListenDrops": 1},
				Happened: new(Happened).took(1, tcpstate.Close, tcpstate.Listen).inbound(2),
			})
		},
	},
	{
		Name: "burst", About: "33 connections come at once and are accepted 300 ms later",
		Play: func(s *Stage) {
			l := s.Listen(64)
			for range 33 {
				s.Connect(l.Addr())
			}
			want := Expect{
				States: States{tcpstate.Listen: 1, tcpstate.Established: 66},
				Listeners: []Listener{{
					Address: l.Addr(), AcceptQueue: 33, Limit: 64,
					Took: &Took{Connections: 33, Requested: 64},
				}},
				Happened: new(Happened).took(1, tcpstate.Close, tcpstate.Listen).inbound(33).outbound(33),
			}
			s.Settle(want)
			time.Sleep(300 * time.Millisecond) // the burst's length, not a wait for something
			for range 33 {
				l.Accept()
			}
			want.Listeners[0].AcceptQueue = 0
			want.Listeners[0].Peak = 33
			want.Listeners[0].Took.Accepts = 33
			s.Check(want)
		},
	},
	{
		Name: "second_listen", About: "listen() again with another backlog changes the limit and leaves the queue",
		Play: func(s *Stage) {
			l := s.Listen(5)
			want := s.story(l)
			s.Check(want)

			l.Listen(10)
			for range 11 {
				s.Peer().Connect(l.Addr())
			}
			want.States[tcpstate.Established] = 11
			want.Listeners[0].Limit, want.Listeners[0].AcceptQueue = 10, 11
			want.Listeners[0].Took = &Took{Connections: 11, Requested: 10}
			want.Happened.inbound(11)
			s.Check(want)

			l.Listen(2)
			want.Listeners[0].Limit = 2
			want.Listeners[0].Took.Requested = 2
			s.Check(want)
		},
	},
	{
		Name: "clamped", About: "listen(-1) and a backlog above net.core.somaxconn get somaxconn",
		Play: func(s *Stage) {
			somaxconn, err := strconv.Atoi(s.NS.ReadSysctl("net.core.somaxconn"))
			if err != nil {
				s.Fatal(err)
			}
			minusOne, above, below := s.Listen(-1), s.Listen(somaxconn+1), s.Listen(somaxconn-1)
			want := s.story(minusOne, above, below)
			want.Listeners[0].Limit = uint32(somaxconn)
			want.Listeners[0].Took.Requested = -1
			want.Listeners[1].Limit = uint32(somaxconn)
			want.Listeners[1].Took.Requested = somaxconn + 1
			want.Listeners[2].Limit = uint32(somaxconn - 1)
			want.Listeners[2].Took.Requested = somaxconn - 1
			s.Check(want)
		},
	},
}

// tenCallers is listen(backlog) with ten clients that shake hands one after
// the other, and nobody who accepts. backlog+1 fit in. They do not send their
// SYNs again, so that all counts are exact.
func tenCallers(backlog int) Scenario {
	return Scenario{
		Name:  fmt.Sprintf("listen_%d", backlog),
		About: fmt.Sprintf("listen(%d) and ten clients: %d get in, the SYNs of the others are dropped", backlog, backlog+1),
		Play: func(s *Stage) {
			l := s.Listen(backlog)
			fit := backlog + 1
			for range fit {
				s.Peer().Connect(l.Addr())
			}
			for range 10 - fit {
				s.Peer().SYN(l.Addr())
			}
			refused := uint64(10 - fit)
			s.Check(Expect{
				States: States{tcpstate.Listen: 1, tcpstate.Established: uint64(fit)},
				Listeners: []Listener{{
					Address: l.Addr(), AcceptQueue: uint32(fit), Limit: uint32(backlog), Drops: uint32(refused),
					Took: &Took{Connections: uint64(fit), Requested: backlog},
				}},
				Events:   map[string]uint64{"ListenOverflows": refused, "ListenDrops": refused},
				Happened: new(Happened).took(1, tcpstate.Close, tcpstate.Listen).inbound(uint64(fit)),
			})
		},
	}
}
