package scenario

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sockq/probes/netns"
	"sockq/probes/tcpstate"
)

func TestScenarios(t *testing.T) {
	seen := make(map[string]bool)
	for _, sc := range All {
		if seen[sc.Name] || sc.About == "" || strings.ContainsAny(sc.Name, " /") {
			t.Errorf("scenario %q: two of that name, no description, or no name for a subtest", sc.Name)
		}
		seen[sc.Name] = true
	}
	checks := 0
	happened := make(map[tcpstate.Edge]uint64)
	Run(t, func(t testing.TB, ns *Namespace, want Expect) {
		checks++
		if want.Happened != nil {
			for edge, n := range want.Happened.Transitions {
				if n == 0 {
					t.Errorf("%s happened 0 times", edge)
				}
				happened[edge] += n
			}
		}
		if want.Gone {
			return
		}
		inside := uint32(0)
		ns.Do(func() {
			inode, err := netns.Self()
			if err != nil {
				t.Fatal(err)
			}
			inside = inode
		})
		if inside != ns.Inode() {
			t.Errorf("in namespace %d, want %d", inside, ns.Inode())
		}
	})
	if checks < 2*len(All)-1 {
		t.Errorf("%d checks for %d scenarios", checks, len(All))
	}
	for _, tr := range tcpstate.Transitions {
		if reported := tr.Sight == tcpstate.Reported; reported != (happened[tr.Edge] > 0) {
			t.Errorf("%s is reported: %t, and happened %d times", tr.Edge, reported, happened[tr.Edge])
		}
		delete(happened, tr.Edge)
	}
	for edge, n := range happened {
		t.Errorf("%s happened %d times and is no transition", edge, n)
	}
}

// failing runs fn with a testing.TB that takes note of failures and returns
// the messages.
func failing(t *testing.T, fn func(tb testing.TB)) string {
	r := &recorder{TB: t}
	done := make(chan struct{})
	go func() {
		defer close(done)
		fn(r)
	}()
	<-done
	return strings.Join(r.messages, "\n")
}

type recorder struct {
	testing.TB
	messages []string
}

func (r *recorder) Errorf(format string, args ...any) {
	r.messages = append(r.messages, fmt.Sprintf(format, args...))
}

func (r *recorder) Fatalf(format string, args ...any) {
	r.Errorf(format, args...)
	runtime.Goexit()
}

func TestCheckSeesWhatMoves(t *testing.T) {
	for name, move := range map[string]func(s *Stage, l *Socket){
		"a state":        func(s *Stage, l *Socket) { s.Socket().Bind(s.Next()) },
		"a limit":        func(s *Stage, l *Socket) { l.Listen(7) },
		"a SYN":          func(s *Stage, l *Socket) { s.Peer().SYN(l.Addr()).AwaitSYNACK() },
		"a connection":   func(s *Stage, l *Socket) { s.Peer().Connect(l.Addr()) },
		"another socket": func(s *Stage, l *Socket) { addr := l.Addr(); l.Close(); s.Socket().Bind(addr).Listen(5) },
	} {
		t.Run(name, func(t *testing.T) {
			if name == "a state" && !boundShown() {
				move = func(s *Stage, l *Socket) { s.Listen(5) }
			}
			var s *Stage
			message := failing(t, func(tb testing.TB) {
				s = NewStage(tb, IPv4)
				l := s.Listen(5)
				s.check = func(Expect) { move(s, l) }
				s.Check(s.listening(l))
			})
			if !strings.Contains(message, "during the check") {
				t.Errorf("failed with %q", message)
			}
		})
	}
}

func TestObserveDiffers(t *testing.T) {
	s := NewStage(t, IPv4)
	l := s.Listen(5)
	for range 6 {
		s.Peer().Connect(l.Addr())
	}
	s.Peer().SYN(l.Addr())
	right := s.listening(l)
	right.States[tcpstate.Established] = 6
	right.Listeners[0].AcceptQueue = 6
	right.Listeners[0].Drops = 1
	right.Events = map[string]uint64{"ListenOverflows": 1, "ListenDrops": 1}
	s.Settle(right)

	for name, wrong := range map[string]func(*Expect){
		"state":       func(e *Expect) { e.States[tcpstate.Established]++ },
		"queue":       func(e *Expect) { e.Listeners[0].AcceptQueue-- },
		"limit":       func(e *Expect) { e.Listeners[0].Limit++ },
		"SYN queue":   func(e *Expect) { e.Listeners[0].SynQueue++ },
		"drops":       func(e *Expect) { e.Listeners[0].Drops = 0 },
		"device":      func(e *Expect) { e.Listeners[0].Device = "lo" },
		"no listener": func(e *Expect) { e.Listeners = nil },
		"listeners":   func(e *Expect) { e.Listeners = append(e.Listeners, e.Listeners[0]) },
		"bytes":       func(e *Expect) { e.Inbound.SendBytes++ },
		"event":       func(e *Expect) { e.Events = map[string]uint64{"ListenOverflows": 1} },
		"lower bound": func(e *Expect) { e.Retransmits = true; e.Listeners[0].Drops = 2 },
	} {
		want := right
		want.Listeners = append([]Listener(nil), right.Listeners...)
		wrong(&want)
		got, _ := s.observe(want)
		if diff(want.lines(), got.lines()) == "" {
			t.Errorf("%s: no difference seen", name)
		}
	}
}

func TestHappenedDiffers(t *testing.T) {
	s := NewStage(t, IPv4)
	l := s.Listen(5)
	s.Connect(l.Addr()).Reset()
	s.Begin(s.Next()).Fails(unix.ECONNREFUSED)
	s.Peer().SYN(l.Addr()).AwaitSYNACK()
	right := func() Expect {
		want := s.story(l)
		want.States[tcpstate.SynRecv] = 1
		want.Listeners[0].AcceptQueue = 1
		want.Listeners[0].SynQueue = 1
		want.Happened.
			inbound(1, tcpstate.Close).outbound(1, tcpstate.Close).
			took(1, tcpstate.Close, tcpstate.SynSent, tcpstate.Close).failed(1, "refused")
		want.Happened.AttemptFails = 1
		want.Happened.ResetsSent, want.Happened.ResetsReceived = 2, 2
		return want
	}
	s.Settle(right())

	for name, wrong := range map[string]func(*Happened){
		"PassiveOpens": func(h *Happened) { h.took(1, tcpstate.Listen, tcpstate.SynRecv) },
		"ActiveOpens":  func(h *Happened) { h.took(1, tcpstate.Close, tcpstate.SynSent) },
		"no_ports":     func(h *Happened) { h.failed(1, "no_ports") },
		"EstabResets":  func(h *Happened) { h.took(1, tcpstate.CloseWait, tcpstate.Close) },
		"AttemptFails": func(h *Happened) { h.AttemptFails = 0 },
		"OutRsts":      func(h *Happened) { h.ResetsSent++ },
	} {
		want := right()
		wrong(want.Happened)
		got, _ := s.observe(want)
		if diff(want.lines(), got.lines()) == "" {
			t.Errorf("%s: no difference seen", name)
		}
	}
}

func TestHold(t *testing.T) {
	ns, want := Mixed.Hold(t, IPv6)
	total := uint64(0)
	for _, state := range tcpstate.All {
		n := want.States[state]
		if n == 0 {
			t.Errorf("no socket in %s", state)
		}
		total += n
	}
	if total < 200 {
		t.Errorf("%d sockets, want 200 or more", total)
	}
	var got States
	for _, k := range ns.Sockets(tcpstate.MaskAll) {
		got[k.State.Reported()]++
	}
	if !boundShown() {
		got[tcpstate.Close] = want.States[tcpstate.Close]
	}
	if got != want.States {
		t.Errorf("states %v, want %v", got, want.States)
	}
}

func TestDoEndsTheTest(t *testing.T) {
	ns := NewNamespace(t)
	after := false
	message := failing(t, func(tb testing.TB) {
		ns := &Namespace{tb: failedTB{tb}, path: ns.Path()}
		ns.Do(func() { tb.Fatalf("inside") })
		after = true
	})
	if after || message != "inside" {
		t.Errorf("Do returned: %t, message %q", after, message)
	}
}

// failedTB is what a testing.TB says after FailNow.
type failedTB struct{ testing.TB }

func (failedTB) Failed() bool { return true }

func TestNamed(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "red")
	t.Run("open", func(t *testing.T) {
		ns := NewNamed(t, dir, "red")
		names := netns.NewNames("/proc", dir)
		if err := names.Refresh(); err != nil {
			t.Fatal(err)
		}
		if got := names.Name(ns.Inode(), false); got != "red" || ns.Path() != path {
			t.Errorf("name %q, path %s", got, ns.Path())
		}
	})
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("%s after the test: %v", path, err)
	}

	// One without a name is found by a symbolic link.
	ns := NewNamespace(t)
	if err := os.Symlink(ns.Path(), filepath.Join(dir, "blue")); err != nil {
		t.Fatal(err)
	}
	names := netns.NewNames("/proc", dir)
	if err := names.Refresh(); err != nil {
		t.Fatal(err)
	}
	if got := names.Name(ns.Inode(), false); got != "blue" {
		t.Errorf("name %q, want blue", got)
	}
}

func TestMass(t *testing.T) {
	for _, family := range []Family{IPv4, IPv6} {
		t.Run(family.String(), func(t *testing.T) {
			s := NewStage(t, family)
			s.Listeners(500)
			began := time.Now()
			s.Connections(2000)
			t.Logf("%s a connection", time.Since(began)/2000)
			s.Check(s.Mass())
		})
	}
}

func TestPeerNeverAnswers(t *testing.T) {
	for _, family := range []Family{IPv4, IPv6} {
		t.Run(family.String(), func(t *testing.T) {
			s := NewStage(t, family)
			client := s.Begin(s.Peer().Addr(80))
			theirs := s.Peer().claim(client)
			// An answer, RST or ICMP, would have come by now.
			want := Expect{States: States{tcpstate.SynSent: 1}, Outbound: Queues{SendBytes: 1, SendMaxBytes: 1}}
			s.Check(want)

			theirs.ACKSYN()
			client.Established()
			s.Check(Expect{States: States{tcpstate.Established: 1}})

			client.Reset()
			theirs.AwaitRST()
			s.Check(Expect{})
		})
	}
}

func TestSegment(t *testing.T) {
	for _, s := range []segment{
		{
			from: netip.MustParseAddrPort("192.0.2.1:10000"), to: netip.MustParseAddrPort("127.0.0.1:80"),
			seq: 1, ack: 0xfffffffe, flags: flagSYN | flagACK, window: 100, data: []byte("odd"),
		},
		{
			from: netip.MustParseAddrPort("[2001:db8::1]:10000"), to: netip.MustParseAddrPort("[::1]:80"),
			seq: 0xffffffff, flags: flagRST, data: []byte{},
		},
	} {
		b := s.packet()
		got, ok := parseSegment(b)
		if !ok || got.from != s.from || got.to != s.to || got.seq != s.seq || got.ack != s.ack ||
			got.flags != s.flags || got.window != s.window || string(got.data) != string(s.data) {
			t.Errorf("parseSegment(%+v.packet()) = %+v, %t", s, got, ok)
		}
		// A right checksum adds up to zero.
		if sum := s.checksum(b[len(b)-sizeofTCP-len(s.data):]); sum != 0 {
			t.Errorf("checksum of a segment with its checksum is %#x", sum)
		}
		for i := range b {
			if _, ok := parseSegment(b[:i]); ok {
				t.Errorf("parsed %d of %d bytes", i, len(b))
			}
		}
	}
	for _, b := range [][]byte{
		nil,
		{0: 4<<4 | 4, 9: unix.IPPROTO_TCP, 39: 0},
		{0: 4<<4 | 5, 9: unix.IPPROTO_UDP, 39: 0},
		{0: 4<<4 | 5, 3: 40, 9: unix.IPPROTO_TCP, 32: 4 << 4, 39: 0},
		{0: 4<<4 | 5, 3: 40, 9: unix.IPPROTO_TCP, 32: 15 << 4, 39: 0},
		{0: 5 << 4, 59: 0},
	} {
		if s, ok := parseSegment(b); ok {
			t.Errorf("parseSegment(%x) = %+v", b, s)
		}
	}
}

func TestDiff(t *testing.T) {
	for _, c := range []struct{ want, got, diff string }{
		{"a,b", "a,b", ""},
		{"a", "b", "- a\n+ b\n"},
		{"a,b", "b", "- a\n"},
		{"a,a", "a", "- a\n- a\n+ a\n"},
	} {
		if got := diff(strings.Split(c.want, ","), strings.Split(c.got, ",")); got != c.diff {
			t.Errorf("diff(%s, %s) = %q, want %q", c.want, c.got, got, c.diff)
		}
	}
}
