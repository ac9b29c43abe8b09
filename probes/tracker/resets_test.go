package tracker

import (
	"testing"

	"golang.org/x/sys/unix"

	"sockq/probes/scenario"
)

// resets is what was counted of RST segments.
type resets struct {
	Sent     map[string]uint64
	Received uint64
}

func resetsOf(tb testing.TB, tr *Tracker, id NamespaceID) resets {
	tb.Helper()
	n := happened(tb, tr, id)
	return resets{n.ResetsSent, n.ResetsReceived}
}

func TestResets(t *testing.T) {
	for _, test := range []struct {
		name string
		play func(s *scenario.Stage)
		want resets
		full bool // a socket that is no mini-socket sends it
	}{
		{"nobody_listens", func(s *scenario.Stage) {
			s.Begin(s.Next()).Fails(unix.ECONNREFUSED)
		}, resets{map[string]uint64{"no_socket": 1}, 1}, false},
		{"SO_LINGER", func(s *scenario.Stage) {
			l := s.Listen(5)
			s.Connect(l.Addr()).Reset()
			l.Accept()
		}, resets{map[string]uint64{"tcp_state": 1}, 1}, true},
		{"TCP_LINGER2", func(s *scenario.Stage) {
			l := s.Listen(5)
			theirs := s.Peer().Connect(l.Addr())
			ours := l.Accept().Option(unix.IPPROTO_TCP, unix.TCP_LINGER2, -1)
			ours.FIN()
			theirs.ACKFIN()
			ours.Await(finWait2)
			ours.Close()
			theirs.AwaitRST()
		}, resets{map[string]uint64{"tcp_abort_on_linger": 1}, 0}, true},
		{"unread_bytes", func(s *scenario.Stage) {
			l := s.Listen(5)
			client := s.Connect(l.Addr())
			server := l.Accept()
			client.Write(10)
			client.FIN()
			server.Await(closeWait)
			server.Close()
		}, resets{map[string]uint64{"tcp_abort_on_close": 1}, 1}, true},
		{"time_wait", func(s *scenario.Stage) {
			l := s.Listen(5)
			theirs := s.Peer().Connect(l.Addr())
			l.Accept().Close()
			theirs.ACKFIN()
			theirs.Write(10) // to a mini-socket in FIN_WAIT2
			theirs.AwaitRST()
		}, resets{map[string]uint64{"tcp_timewait_socket": 1}, 0}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			for _, family := range []scenario.Family{scenario.IPv4, scenario.IPv6} {
				tr, s := share(t), scenario.NewStage(t, family)
				id := identify(t, s.NS)
				test.play(s)
				want := test.want
				switch {
				case !test.full && !scenario.KernelAtLeast(6, 12): // not traced
					want.Sent = nil
				case !scenario.KernelAtLeast(6, 10): // without reasons
					want.Sent = map[string]uint64{unspecified: 1}
				}
				become(t, "resets", want, func() resets { return resetsOf(t, tr, id) })
				if sent := s.NS.SNMP()["OutRsts"]; sent != total(test.want.Sent) {
					t.Errorf("the kernel says that it sent %d", sent)
				}
			}
		})
	}
}

// Numbers of reasons differ between kernels, and some have no name.
func TestResetReasons(t *testing.T) {
	tr := share(t)
	first := "not_specified"
	if !scenario.KernelAtLeast(6, 10) {
		first = unspecified
	}
	for number, want := range map[uint32]string{0: first, 1 << 20: unspecified} {
		if got := tr.resetReason(number); got != want {
			t.Errorf("reason %d is called %q, want %q", number, got, want)
		}
	}
	if got := (&Tracker{}).resetReason(0); got != unspecified {
		t.Errorf("without reasons, it is called %q", got)
	}
}
