package scenario

import "sockq/probes/tcpstate"

// Mass tells what Listeners and Connections have made so far.
func (s *Stage) Mass() Expect { return s.mass }

// Listeners makes n listeners, each with a file descriptor, of which a process
// has 20,000 where the tests run. They are part of Mass.
func (s *Stage) Listeners(n int) []*Socket {
	s.Helper()
	first := len(s.sockets)
	s.NS.Do(func() {
		for range n {
			s.socketHere(s.Family).Bind(s.Next()).Listen(5)
		}
	})
	made := s.sockets[first:]
	for _, l := range made {
		s.mass.Listeners = append(s.mass.Listeners, Listener{Address: l.Addr(), Limit: 5})
	}
	s.mass.States[tcpstate.Listen] += uint64(n)
	return made
}

// connectionsEach is how many connections share a listener's port: as many as
// the peer has ports, without those that it has used.
const connectionsEach = 50_000

// Connections makes n established connections to the peer. They cost no file
// descriptor: they wait for accept(), which does not come. They are part of
// Mass. A stage that has a mass should not use its peer for anything else.
func (s *Stage) Connections(n int) {
	s.Helper()
	s.NS.Sysctl("net.core.somaxconn", "65535")
	for n > 0 {
		l := s.Listen(connectionsEach)
		to, count := l.Addr(), min(n, connectionsEach)
		for range count {
			c := s.Peer().Connect(to)
			delete(c.p.conns, c.link)
		}
		s.mass.Listeners = append(s.mass.Listeners,
			Listener{Address: to, AcceptQueue: uint32(count), Limit: connectionsEach})
		s.mass.States[tcpstate.Listen]++
		s.mass.States[tcpstate.Established] += uint64(count)
		n -= count
	}
}
