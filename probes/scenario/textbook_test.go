package scenario

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sockq/probes/sockdiag"
	"sockq/probes/tcpstate"
)

// What the textbooks say and what Linux does: a test for each row of the table
// in README.

func textbook(t *testing.T, play func(s *Stage)) {
	for _, family := range []Family{IPv4, IPv6} {
		t.Run(family.String(), func(t *testing.T) {
			t.Parallel()
			play(NewStage(t, family))
		})
	}
}

// only is the one socket in a state.
func (s *Stage) only(state tcpstate.State) sockdiag.Socket {
	s.Helper()
	sockets := s.NS.Sockets(tcpstate.MaskOf(state))
	if len(sockets) != 1 {
		s.Fatalf("%d sockets in %s, want 1", len(sockets), state)
	}
	return sockets[0]
}

// fires checks that the timer of a time-wait mini-socket was set to want not
// long ago.
func (s *Stage) fires(k sockdiag.Socket, want, ago time.Duration) {
	s.Helper()
	// The timer counts in ticks.
	if tick := 10 * time.Millisecond; !k.TimeWait() || k.Expires > want+tick || k.Expires < want-ago-tick {
		s.Errorf("%s fires its timer %s in %s, want %s", k.State, k.Timer, k.Expires, want)
	}
}

// TIME_WAIT lasts 60 s (TCP_TIMEWAIT_LEN), whatever tcp_fin_timeout says.
func TestTextbookTimeWait(t *testing.T) {
	for _, seconds := range []string{"1", "60", "120"} {
		t.Run("tcp_fin_timeout="+seconds, func(t *testing.T) {
			textbook(t, func(s *Stage) {
				s.NS.Sysctl("net.ipv4.tcp_fin_timeout", seconds)
				began := time.Now()
				ours, theirs := s.accepted(s.Listen(5))
				ours.FIN()
				theirs.ACKFIN()
				theirs.FIN()
				s.settleStates(States{tcpstate.Listen: 1, tcpstate.TimeWait: 1})
				k := s.only(tcpstate.TimeWait)
				s.fires(k, 60*time.Second, time.Since(began))
			})
		})
	}
}

// FIN_WAIT2 without an owner ends after tcp_fin_timeout; with one it does not.
func TestTextbookOrphanedFinWait2(t *testing.T) {
	t.Run("timer", func(t *testing.T) {
		textbook(t, func(s *Stage) {
			s.NS.Sysctl("net.ipv4.tcp_fin_timeout", "30")
			began := time.Now()
			ours, theirs := s.accepted(s.Listen(5))
			ours.Close()
			theirs.ACKFIN()
			s.settleStates(States{tcpstate.Listen: 1, tcpstate.FinWait2: 1})
			k := s.only(tcpstate.FinWait2)
			s.fires(k, 30*time.Second, time.Since(began))
		})
	})
	t.Run("end", func(t *testing.T) {
		textbook(t, func(s *Stage) {
			s.NS.Sysctl("net.ipv4.tcp_fin_timeout", "1")
			l := s.Listen(5)
			owned, theirs := s.accepted(l)
			owned.FIN()
			theirs.ACKFIN()
			began := time.Now()
			orphan, theirs := s.accepted(l)
			orphan.Close()
			theirs.ACKFIN()
			s.settleStates(States{tcpstate.Listen: 1, tcpstate.FinWait2: 2})
			s.settleStates(States{tcpstate.Listen: 1, tcpstate.FinWait2: 1})
			if took := time.Since(began); took < 900*time.Millisecond {
				t.Errorf("the orphan ended after %s, want 1s", took)
			}
			if k := s.only(tcpstate.FinWait2); k.TimeWait() || k.Inode == 0 {
				t.Errorf("the orphan is left, not the socket with an owner")
			}
		})
	})
}

// A full accept queue makes clients time out. What refuses them is a port on
// which nobody listens.
func TestTextbookFullAcceptQueue(t *testing.T) {
	textbook(t, func(s *Stage) {
		full := s.Listen(0)
		s.Connect(full.Addr())
		nobody := s.Next()

		refused := s.Begin(nobody)
		refused.poll(unix.POLLOUT)
		if err := refused.err(); err != unix.ECONNREFUSED {
			s.Errorf("connect without a listener: %v, want %v", err, unix.ECONNREFUSED)
		}
		// One more SYN after 1 s, the end 2 s later.
		late := s.Socket().Option(unix.IPPROTO_TCP, unix.TCP_SYNCNT, 1)
		began := time.Now()
		late.Begin(full.Addr()).poll(unix.POLLOUT)
		if err := late.err(); err != unix.ETIMEDOUT {
			s.Errorf("connect to a full accept queue: %v, want %v", err, unix.ETIMEDOUT)
		}
		if took := time.Since(began); took < 2500*time.Millisecond {
			s.Errorf("connect to a full accept queue ended after %s, want 3s", took)
		}
	})
}

// listen(5) holds six connections.
func TestTextbookListen5Holds6(t *testing.T) {
	textbook(t, func(s *Stage) {
		l := s.Listen(5)
		for range 6 {
			s.Connect(l.Addr())
		}
		seventh := s.Begin(l.Addr())
		s.settleStates(States{tcpstate.Listen: 1, tcpstate.Established: 12, tcpstate.SynSent: 1})
		listener := s.only(tcpstate.Listen)
		if length, limit, ok := listener.AcceptQueue(); length != 6 || limit != 5 || !ok {
			s.Errorf("accept queue %d of %d, want 6 of 5", length, limit)
		}
		// With a place free the next SYN gets in.
		l.Accept()
		seventh.Established()
	})
}

// net.core.somaxconn is 4096 (128 before 5.4).
func TestTextbookSomaxconn(t *testing.T) {
	ns := NewNamespace(t)
	if got := ns.ReadSysctl("net.core.somaxconn"); got != "4096" {
		t.Errorf("somaxconn of a new namespace is %s, want 4096", got)
	}
}

// The SYN queue's size is the backlog. tcp_max_syn_backlog neither bounds it
// (with SYN cookies, as by default) nor extends it.
func TestTextbookMaxSynBacklog(t *testing.T) {
	t.Run("smaller", func(t *testing.T) {
		textbook(t, func(s *Stage) {
			s.NS.Sysctl("net.ipv4.tcp_max_syn_backlog", "16")
			if got := s.NS.ReadSysctl("net.ipv4.tcp_syncookies"); got != "1" {
				s.Errorf("tcp_syncookies of a new namespace is %s, want 1", got)
			}
			l := s.Listen(64)
			for range 65 {
				s.Peer().SYN(l.Addr())
			}
			s.settleStates(States{tcpstate.Listen: 1, tcpstate.SynRecv: 65})
		})
	})
	t.Run("larger", func(t *testing.T) {
		textbook(t, func(s *Stage) {
			s.NS.Sysctl("net.ipv4.tcp_max_syn_backlog", "4096")
			s.NS.Sysctl("net.ipv4.tcp_syncookies", "0")
			l := s.Listen(8)
			for range 30 {
				s.Peer().SYN(l.Addr())
			}
			s.settleStates(States{tcpstate.Listen: 1, tcpstate.SynRecv: 9})
		})
	})
}

// The backlog is the smaller of listen()'s argument and somaxconn, at the time
// of listen().
func TestTextbookBacklogAtListen(t *testing.T) {
	textbook(t, func(s *Stage) {
		limits := func(when string, want ...uint32) {
			s.Helper()
			var expect Expect
			for i, limit := range want {
				expect.States[tcpstate.Listen]++
				expect.Listeners = append(expect.Listeners, Listener{Address: s.sockets[i].Addr(), Limit: limit})
			}
			got, _ := s.observe(expect)
			if d := diff(expect.lines(), got.lines()); d != "" {
				s.Errorf("%s:\n%s", when, d)
			}
		}
		s.NS.Sysctl("net.core.somaxconn", "100")
		large, _ := s.Listen(500), s.Listen(50)
		limits("somaxconn 100, listen(500) and listen(50)", 100, 50)
		s.NS.Sysctl("net.core.somaxconn", "200")
		limits("after somaxconn became 200", 100, 50)
		s.NS.Sysctl("net.core.somaxconn", "20")
		limits("after somaxconn became 20", 100, 50)
		s.NS.Sysctl("net.core.somaxconn", "200")
		large.Listen(500)
		limits("after the next listen(500)", 200, 50)
	})
}

// settleStates waits until the namespace holds these states, whatever the
// queues.
func (s *Stage) settleStates(want States) {
	s.Helper()
	var got States
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		got = States{}
		for _, k := range s.NS.Sockets(tcpstate.MaskAll) {
			got[k.State.Reported()]++
		}
		if got == want {
			return
		}
	}
	s.Fatalf("sockets in states 1 to 11: %v, want %v", got[1:], want[1:])
}
