package scenario

import "sockq/probes/tcpstate"

// synQueues are about half-open requests.
var synQueues = []Scenario{
	{
		// 6.5 and 6.6 keep one less.
		Name: "SYN_queue_full", About: "without SYN cookies, twelve SYNs to listen(8): nine wait, three are dropped",
		Play: func(s *Stage) {
			s.NS.Sysctl("net.ipv4.tcp_syncookies", "0")
			l := s.Listen(8)
			for range 12 {
				s.Peer().SYN(l.Addr())
			}
			s.Check(Expect{
				States: States{tcpstate.Listen: 1, tcpstate.SynRecv: 9},
				Listeners: []Listener{{
					Address: l.Addr(), Limit: 8, SynQueue: 9, Drops: 3, Took: &Took{Requested: 8},
				}},
				Events:   map[string]uint64{"TCPReqQFullDrop": 3, "ListenDrops": 3},
				Happened: new(Happened).took(1, tcpstate.Close, tcpstate.Listen),
			})
		},
	},
	{
		Name: "last_quarter", About: "without SYN cookies, the last quarter of tcp_max_syn_backlog is for proven peers",
		Play: func(s *Stage) {
			s.NS.Sysctl("net.ipv4.tcp_syncookies", "0")
			s.NS.Sysctl("net.ipv4.tcp_max_syn_backlog", "16")
			l := s.Listen(64)
			for range 20 {
				s.Peer().SYN(l.Addr())
			}
			s.Check(Expect{
				States: States{tcpstate.Listen: 1, tcpstate.SynRecv: 13},
				Listeners: []Listener{{
					Address: l.Addr(), Limit: 64, SynQueue: 13, Drops: 7, Took: &Took{Requested: 64},
				}},
				Events:   map[string]uint64{"ListenDrops": 7},
				Happened: new(Happened).took(1, tcpstate.Close, tcpstate.Listen),
			})
		},
	},
	{
		Name: "SYN_cookies", About: "with SYN cookies, the SYN queue stays full and cookies serve the rest",
		Play: func(s *Stage) {
			s.NS.Sysctl("net.ipv4.tcp_syncookies", "1")
			l := s.Listen(8)
			var clients []*Conn
			for range 12 {
				clients = append(clients, s.Peer().SYN(l.Addr()))
			}
			want := Expect{
				States:    States{tcpstate.Listen: 1, tcpstate.SynRecv: 9},
				Listeners: []Listener{{Address: l.Addr(), Limit: 8, SynQueue: 9, Took: &Took{Requested: 8}}},
				Events:    map[string]uint64{"TCPReqQFullDoCookies": 3, "SyncookiesSent": 3},
				Happened:  new(Happened).took(1, tcpstate.Close, tcpstate.Listen),
			}
			s.Check(want)

			// The last one got a cookie and brings it back.
			last := clients[11]
			last.AwaitSYNACK()
			last.ACK()
			want.States[tcpstate.Established] = 1
			want.Listeners[0].AcceptQueue = 1
			want.Listeners[0].Took.Connections = 1
			want.Events["SyncookiesRecv"] = 1
			want.Happened.inbound(1)
			s.Check(want)
		},
	},
	{
		Name: "request_outlives_listener", About: "half-open requests stay when their listener closes",
		Play: func(s *Stage) {
			l := s.Listen(5)
			for range 3 {
				s.Peer().SYN(l.Addr()).AwaitSYNACK()
			}
			l.Close()
			s.Check(Expect{
				States:   States{tcpstate.SynRecv: 3},
				Happened: new(Happened).took(1, tcpstate.Close, tcpstate.Listen, tcpstate.Close),
			})
		},
	},
}
