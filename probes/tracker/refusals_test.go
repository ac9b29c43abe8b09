package tracker

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"sockq/probes/scenario"
	"sockq/probes/tcpstate"
)

// fates is what became of SYNs, final ACKs and requests at all listeners of a
// namespace.
type fates struct {
	Syns, CookiesSent, CookiesValidated uint64
	Drops, Ended                        map[string]uint64
	Handshakes, Abandoned               uint64
}

func fatesOf(tb testing.TB, tr *Tracker, id NamespaceID) fates {
	tb.Helper()
	f := fates{Drops: make(map[string]uint64), Ended: make(map[string]uint64)}
	for _, l := range heard(tb, tr, id) {
		f.Syns += l.Syns
		f.CookiesSent += l.CookiesSent
		f.CookiesValidated += l.CookiesValidated
		f.Handshakes += l.Handshake.Count()
		f.Abandoned += l.Abandoned
		for i, n := range l.Drops {
			if n > 0 {
				f.Drops[DropReasonNames[i]] += n
			}
		}
		for i, n := range l.HalfOpenEnded {
			if n > 0 {
				f.Ended[HalfOpenEndNames[i]] += n
			}
		}
	}
	return f
}

func sum(m map[string]uint64) (n uint64) {
	for _, v := range m {
		n += v
	}
	return n
}

// audited are what the kernel counts in a namespace, too.
type audited struct{ ListenDrops, ListenOverflows, SyncookiesSent, SyncookiesRecv uint64 }

func (f fates) audited() audited {
	return audited{
		ListenDrops:     sum(f.Drops),
		ListenOverflows: f.Drops["accept_queue_full_syn"] + f.Drops["accept_queue_full_ack"] + f.Drops["accept_queue_full_reset"],
		SyncookiesSent:  f.CookiesSent, SyncookiesRecv: f.CookiesValidated,
	}
}

func kernelCounts(ns *scenario.Namespace) audited {
	n := ns.Netstat()
	return audited{n["ListenDrops"], n["ListenOverflows"], n["SyncookiesSent"], n["SyncookiesRecv"]}
}

// patient sees that no wait is longer than a test.
func patient(t testing.TB, tr *Tracker, id NamespaceID) {
	t.Helper()
	for _, l := range heard(t, tr, id) {
		if waited := l.AcceptWait.Sum + l.Handshake.Sum; waited > 600 {
			t.Errorf("connections at %s waited for %g s", l.Address, waited)
		}
	}
}

// TestFatesOfScenarios holds what became of each SYN and final ACK in all scenarios
// against the kernel's own counters, and the requests against sock_diag.
func TestFatesOfScenarios(t *testing.T) {
	tr := shareHooks(t)
	if !needsHooks(t, StoryRefusals) {
		return
	}
	var id NamespaceID
	begin := func(t testing.TB, ns *scenario.Namespace) { id = identify(t, ns) }
	scenario.RunFrom(t, begin, func() uint64 { return misses(t, tr) }, func(t testing.TB, ns *scenario.Namespace, want scenario.Expect) {
		t.Helper()
		if want.Gone {
			return
		}
		patient(t, tr, id)
		become(t, "what the kernel counts", kernelCounts(ns), func() audited { return fatesOf(t, tr, id).audited() })
		if !tr.Tells(StoryHalfOpen) || !tr.Tells(StoryTimeWait) {
			return
		}
		become(t, "sockets by transitions", socketsOf(ns), func() map[string]int64 {
			n, f := happened(t, tr, id), fatesOf(t, tr, id)
			completed, ended := count(&n, newSynRecv, synRecv), count(&n, newSynRecv, closed)
			left := remaining(&n)
			if completed != f.Ended["completed"] || completed != f.Handshakes || completed+ended != sum(f.Ended) {
				left[fmt.Sprintf("%d completed, %d ended: %v", completed, ended, f)]++
			}
			return left
		})
	})
}

// remaining is how many sockets must be in each state after these transitions.
func remaining(n *Namespace) map[string]int64 {
	var states [newSynRecv + 1]int64
	for i, change := range tcpstate.Transitions {
		if change.Sight == tcpstate.Never {
			continue
		}
		count := int64(n.Transitions[i])
		if change.From != listens || change.To == closed { // else the listener stays what it is
			states[change.From] -= count
		}
		if change.From != newSynRecv || change.To == closed { // else the child comes from LISTEN
			states[change.To] += count
		}
	}
	states[synRecv] += states[newSynRecv]
	states[closed], states[newSynRecv] = 0, 0
	return named(states[:])
}

func named(states []int64) map[string]int64 {
	m := make(map[string]int64)
	for state, n := range states {
		if n != 0 {
			m[tcpstate.State(state).String()] = n
		}
	}
	return m
}

// socketsOf is what sock_diag has of a namespace.
func socketsOf(ns *scenario.Namespace) map[string]int64 {
	var states [tcpstate.Count]int64
	for _, s := range ns.Sockets(tcpstate.MaskAll) {
		states[s.State]++
	}
	states[closed] = 0 // bound only
	return named(states[:])
}

// TestFatesOfSuccessors sees that a listener has nothing of the one before
// it, whose address in the kernel it may have got, and that what is counted at an
// address goes on when another one listens there.
func TestFatesOfSuccessors(t *testing.T) {
	tr := shareHooks(t)
	if !needsHooks(t, StoryRefusals) {
		return
	}
	for _, family := range []scenario.Family{scenario.IPv4, scenario.IPv6} {
		t.Run(family.String(), func(t *testing.T) {
			s := scenario.NewStage(t, family)
			id := identify(t, s.NS)
			addresses := []netip.AddrPort{s.Next(), s.Next(), s.Next()}
			want := make(map[netip.AddrPort]uint64)
			entries, refused := len(addresses), uint64(0)
			const rounds = 4
			if scenario.KernelAtLeast(5, 12) { // each has a cookie
				entries *= rounds
			}
			for round := range rounds {
				for i, at := range addresses {
					l := s.Socket().Bind(at).Listen(0)
					client := s.Connect(at)
					l.Queued(1)
					for range 1 + i + 3*round {
						s.Peer().SYN(at)
						want[at]++
						refused++
					}
					become(t, "refused SYNs", refused, func() uint64 { return kernelCounts(s.NS).ListenDrops })
					client.Reset() // else the address stays taken
					l.Close()
				}
			}
			become(t, "refused SYNs", want, func() map[netip.AddrPort]uint64 {
				seen := make(map[netip.AddrPort]uint64)
				for _, l := range heard(t, tr, id) {
					seen[l.Address] += l.Drops[DropAcceptQueueFullSYN]
				}
				return seen
			})
			found := heard(t, tr, id)
			if len(found) != entries {
				t.Errorf("%d entries, want %d", len(found), entries)
			}
			for key, l := range found {
				if l.ByLabels == scenario.KernelAtLeast(5, 12) || l.ByLabels != (key>>63 == 1) {
					t.Errorf("%#x of %s is made of labels: %t", key, l.Address, l.ByLabels)
				}
			}
			become(t, "what the kernel counts", kernelCounts(s.NS), func() audited { return fatesOf(t, tr, id).audited() })
		})
	}
}

// A listener without a cookie is given one: what was counted before stays where it
// is, and nothing is counted twice.
func TestFatesOfALateCookie(t *testing.T) {
	tr := shareHooks(t)
	if !needsHooks(t, StoryRefusals) {
		return
	}
	s := scenario.NewStage(t, scenario.IPv4)
	id := identify(t, s.NS)
	l := s.Listen(0)
	s.Connect(l.Addr())
	l.Queued(1)
	for range 3 {
		s.Peer().SYN(l.Addr())
	}
	become(t, "refused SYNs", 3, func() uint64 { return fatesOf(t, tr, id).Drops["accept_queue_full_syn"] })
	cookie := s.NS.Sockets(tcpstate.MaskListen)[0].Cookie
	for range 5 {
		s.Peer().SYN(l.Addr())
	}
	want := map[bool]uint64{true: 5, false: 3}
	if scenario.KernelAtLeast(5, 12) { // it had its cookie from the beginning
		want = map[bool]uint64{true: 8}
	}
	become(t, "refused SYNs, by cookie", want, func() map[bool]uint64 {
		seen := make(map[bool]uint64)
		for key, l := range heard(t, tr, id) {
			seen[key == cookie] += l.Drops[DropAcceptQueueFullSYN]
		}
		return seen
	})
	become(t, "what the kernel counts", kernelCounts(s.NS), func() audited { return fatesOf(t, tr, id).audited() })
}

// TestFates plays each reason to refuse, and each end of a request, at one listener.
func TestFates(t *testing.T) {
	tr := shareHooks(t)
	if !needsHooks(t, StoryRefusals) {
		return
	}
	type counts = map[string]uint64
	full := func(s *scenario.Stage) *scenario.Socket {
		l := s.Listen(0)
		s.Connect(l.Addr())
		return l
	}
	for name, story := range map[string]struct {
		play         func(s *scenario.Stage)
		drops, ended counts
		abandoned    uint64
	}{
		"accept_queue_full_syn": {
			play:  func(s *scenario.Stage) { s.Peer().SYN(full(s).Addr()) },
			drops: counts{"accept_queue_full_syn": 1}, ended: counts{"completed": 1},
		},
		"accept_queue_full_ack": {
			play: func(s *scenario.Stage) {
				l := s.Listen(1) // with 0, a request would be a full SYN queue
				late := s.Peer().SYN(l.Addr())
				late.AwaitSYNACK()
				s.Connect(l.Addr())
				s.Connect(l.Addr())
				late.ACK()
			},
			drops: counts{"accept_queue_full_ack": 1}, ended: counts{"completed": 2},
		},
		"accept_queue_full_reset": {
			play: func(s *scenario.Stage) {
				s.NS.Sysctl("net.ipv4.tcp_abort_on_overflow", "1")
				l := s.Listen(1) // with 0, a request would be a full SYN queue
				late := s.Peer().SYN(l.Addr())
				late.AwaitSYNACK()
				s.Connect(l.Addr())
				s.Connect(l.Addr())
				late.ACK()
				late.AwaitRST()
			},
			drops: counts{"accept_queue_full_reset": 1}, ended: counts{"completed": 2, "overflow_reset": 1},
		},
		"syn_queue_full": {
			play: func(s *scenario.Stage) {
				s.NS.Sysctl("net.ipv4.tcp_syncookies", "0")
				l := s.Listen(4)
				for range 12 {
					s.Peer().SYN(l.Addr())
				}
			},
			drops: counts{"syn_queue_full": 7},
		},
		"max_syn_backlog": {
			play: func(s *scenario.Stage) {
				s.NS.Sysctl("net.ipv4.tcp_syncookies", "0")
				s.NS.Sysctl("net.ipv4.tcp_max_syn_backlog", "16")
				l := s.Listen(64)
				for range 20 {
					s.Peer().SYN(l.Addr())
				}
			},
			drops: counts{"max_syn_backlog": 7},
		},
		"no_route": {
			play:  func(s *scenario.Stage) { s.Peer().StraySYN(s.Listen(5).Addr()) },
			drops: counts{"no_route": 1},
		},
		"policy": {
			play: func(s *scenario.Stage) {
				l := s.Listen(5)
				forbid(s, "inet_conn_request", asm.Instructions{
					asm.LoadMem(asm.R1, asm.R1, 0, asm.DWord), // the listener
					asm.FnGetSocketCookie.Call(),
				}, int64(l.Cookie()))
				s.Peer().SYN(l.Addr())
			},
			drops: counts{"policy": 1},
		},
		"reset": {
			play: func(s *scenario.Stage) {
				c := s.Peer().SYN(s.Listen(5).Addr())
				c.AwaitSYNACK()
				c.RST()
			},
			ended: counts{"reset": 1},
		},
		"icmp": {
			play: func(s *scenario.Stage) {
				c := s.Peer().SYN(s.Listen(5).Addr())
				c.AwaitSYNACK()
				c.Unreachable(1)
			},
			drops: counts{"icmp": 1}, ended: counts{"icmp": 1},
		},
		"icmp_after_the_listener": { // the request is still there
			play: func(s *scenario.Stage) {
				l := s.Listen(5)
				c := s.Peer().SYN(l.Addr())
				c.AwaitSYNACK()
				l.Close()
				c.Unreachable(1)
			},
			drops: counts{"icmp": 1}, ended: counts{"listener_closed": 1},
		},
		"expired": {
			play: func(s *scenario.Stage) {
				s.NS.Sysctl("net.ipv4.tcp_synack_retries", "0")
				s.Peer().SYN(s.Listen(5).Addr()).AwaitSYNACK()
				// Who looks into maps keeps kprobes of timers on that CPU from being told.
				become(s, "sockets", map[string]int64{"LISTEN": 1}, func() map[string]int64 { return socketsOf(s.NS) })
			},
			ended: counts{"expired": 1},
		},
		"listener_closed": {
			play: func(s *scenario.Stage) {
				l := s.Listen(5)
				c := s.Peer().SYN(l.Addr())
				c.AwaitSYNACK()
				l.Close()
				c.ACK()
			},
			ended: counts{"listener_closed": 1},
		},
		"destroyed": {
			play: func(s *scenario.Stage) {
				l := s.Listen(5)
				c := s.Peer().SYN(l.Addr())
				c.AwaitSYNACK()
				s.Destroy(l.Addr(), c.Addr())
			},
			ended: counts{"destroyed": 1},
		},
		"destroyed_in_the_accept_queue": { // it is accepted all the same
			play: func(s *scenario.Stage) {
				l := s.Listen(5)
				c := s.Peer().Connect(l.Addr())
				l.Queued(1) // before that it is a request, and ended as such
				s.Destroy(l.Addr(), c.Addr())
				l.Accept()
			},
			ended: counts{"completed": 1},
		},
		"migrated": { // from 5.14
			play: func(s *scenario.Stage) {
				s.NS.Sysctl("net.ipv4.tcp_migrate_req", "1")
				at := s.Next()
				member := func() *scenario.Socket {
					return s.Socket().Option(unix.SOL_SOCKET, unix.SO_REUSEPORT, 1).Bind(at).Listen(5)
				}
				first := member()
				c := s.Peer().SYN(at)
				c.AwaitSYNACK()
				second := member()
				first.Close()
				c.ACK()
				second.Accept()
			},
			ended: counts{"migrated": 1, "completed": 1},
		},
		"migrated_and_expired": { // by the same run of its timer, from 5.14
			play: func(s *scenario.Stage) {
				s.NS.Sysctl("net.ipv4.tcp_migrate_req", "1")
				at := s.Next()
				member := func() *scenario.Socket {
					return s.Socket().Option(unix.SOL_SOCKET, unix.SO_REUSEPORT, 1).Bind(at).Listen(5)
				}
				first := member()
				s.Peer().SYN(at).AwaitSYNACK()
				member()
				s.NS.Sysctl("net.ipv4.tcp_synack_retries", "0")
				first.Close()
				become(s, "sockets", map[string]int64{"LISTEN": 1}, func() map[string]int64 { return socketsOf(s.NS) })
			},
			ended: counts{"migrated": 1, "expired": 1},
		},
		"abandoned": {
			play: func(s *scenario.Stage) {
				l := s.Listen(5)
				s.Connect(l.Addr())
				s.Connect(l.Addr())
				l.Close()
			},
			ended: counts{"completed": 2}, abandoned: 2,
		},
	} {
		if strings.HasPrefix(name, "migrated") && !scenario.KernelAtLeast(5, 14) {
			continue
		}
		if name == "policy" && !securedByBPF() {
			continue
		}
		for _, family := range []scenario.Family{scenario.IPv4, scenario.IPv6} {
			t.Run(name+"/"+family.String(), func(t *testing.T) {
				s := scenario.NewStage(t, family)
				id := identify(t, s.NS)
				story.play(s)
				type fate struct {
					Drops, Ended counts
					Abandoned    uint64
				}
				want := fate{Drops: maps.Clone(story.drops), Ended: maps.Clone(story.ended), Abandoned: story.abandoned}
				if want.Drops == nil {
					want.Drops = counts{}
				}
				if want.Ended == nil || !tr.Tells(StoryHalfOpen) {
					want.Ended = counts{}
				}
				if !tr.Tells(StoryHalfOpen) {
					want.Abandoned = 0
				}
				become(t, "fates", want, func() fate {
					f := fatesOf(t, tr, id)
					return fate{f.Drops, f.Ended, f.Abandoned}
				})
				become(t, "what the kernel counts", kernelCounts(s.NS), func() audited { return fatesOf(t, tr, id).audited() })
				patient(t, tr, id)
				s.End()
			})
		}
	}
}

// TestFatesOfJoins opens an MPTCP connection over two paths: the handshake of the
// second is completed, but nobody accepts it.
func TestFatesOfJoins(t *testing.T) {
	tr := shareHooks(t)
	if !needsHooks(t, StoryRefusals, StoryHalfOpen) {
		return
	}
	ns := scenario.NewNamespace(t)
	id := identify(t, ns)
	ns.Do(func() {
		if _, err := os.Stat("/proc/sys/net/mptcp/enabled"); err != nil {
			if scenario.KernelAtLeast(6, 1) { // all that the tests run on
				t.Fatal("this kernel has no MPTCP")
			}
			t.Skip("this kernel has no MPTCP")
		}
		if err := mptcpPath([4]byte{127, 0, 0, 2}); err != nil {
			t.Fatal(err)
		}
	})
	ns.Sysctl("net.mptcp.enabled", "1")
	l := within(t, ns, unix.AF_INET, 0, unix.IPPROTO_MPTCP)
	l.must(unix.Bind(l.fd, loopback4(0)), unix.Listen(l.fd, 5))
	client := within(t, ns, unix.AF_INET, 0, unix.IPPROTO_MPTCP)
	client.must(unix.Connect(client.fd, l.address()))
	server := l.accept()
	// The second path is opened when both know that the other one speaks MPTCP.
	_, err := unix.Write(client.fd, []byte("data"))
	client.must(err)
	ends := func() map[string]uint64 { return fatesOf(t, tr, id).Ended }
	become(t, "ends of requests", map[string]uint64{"completed": 2}, ends)
	for _, l := range heard(t, tr, id) {
		if l.Connections != 1 || l.Accepts != 1 || l.Handshake.Count() != 2 {
			t.Errorf("%d connections, %d accepted, %d handshakes", l.Connections, l.Accepts, l.Handshake.Count())
		}
	}
	server.close()
	client.close()
	l.close()
	become(t, "ends of requests", map[string]uint64{"completed": 2}, ends)
	if n := happened(t, tr, id); count(&n, newSynRecv, synRecv) != 2 || count(&n, newSynRecv, closed) != 0 {
		t.Errorf("transitions are %v", edges(&n))
	}
}

// mptcpPath lets connections of the calling thread's namespace open another path,
// from that address.
func mptcpPath(from [4]byte) error {
	const controller = 16 // GENL_ID_CTRL
	conn, err := netlink.Dial(unix.NETLINK_GENERIC, nil)
	if err != nil {
		return err
	}
	defer conn.Close()
	call := func(family uint16, command byte, flags netlink.HeaderFlags, attributes func(*netlink.AttributeEncoder)) ([]netlink.Message, error) {
		encoder := netlink.NewAttributeEncoder()
		attributes(encoder)
		body, err := encoder.Encode()
		if err != nil {
			return nil, err
		}
		return conn.Execute(netlink.Message{
			Header: netlink.Header{Type: netlink.HeaderType(family), Flags: netlink.Request | flags},
			Data:   append([]byte{command, 1, 0, 0}, body...), // struct genlmsghdr
		})
	}
	answers, err := call(controller, unix.CTRL_CMD_GETFAMILY, 0, func(a *netlink.AttributeEncoder) {
		a.String(unix.CTRL_ATTR_FAMILY_NAME, "mptcp_pm")
	})
	if err != nil {
		return err
	}
	decoder, err := netlink.NewAttributeDecoder(answers[0].Data[4:])
	if err != nil {
		return err
	}
	var family uint16
	for decoder.Next() {
		if decoder.Type() == unix.CTRL_ATTR_FAMILY_ID {
			family = decoder.Uint16()
		}
	}
	// The names of include/uapi/linux/mptcp.h.
	const (
		commandAddAddr, commandSetLimits = 1, 5
		attrAddr, attrSubflows           = 1, 3
		addrFamily, addr4, addrFlags     = 1, 3, 6
		flagSubflow                      = 1 << 1
	)
	_, err = call(family, commandSetLimits, netlink.Acknowledge, func(a *netlink.AttributeEncoder) { a.Uint32(attrSubflows, 2) })
	if err != nil {
		return err
	}
	_, err = call(family, commandAddAddr, netlink.Acknowledge, func(a *netlink.AttributeEncoder) {
		a.Nested(attrAddr, func(a *netlink.AttributeEncoder) error {
			a.Uint16(addrFamily, unix.AF_INET)
			a.Bytes(addr4, from[:])
			a.Uint32(addrFlags, flagSubflow)
			return nil
		})
	})
	return errors.Join(err, decoder.Err())
}

// securedByBPF tells whether BPF is among the kernel's security modules: in Debian's
// it is by default since 6.1.
func securedByBPF() bool {
	modules, _ := os.ReadFile("/sys/kernel/security/lsm")
	return os.Getenv("SOCKQ_TEST_GUEST") != "" && scenario.KernelAtLeast(6, 1) || slices.Contains(strings.Split(string(modules), ","), "bpf")
}

// forbid is a security module until the test ends: it refuses where its instructions
// leave the number in R0.
func forbid(tb testing.TB, what string, instructions asm.Instructions, number int64) {
	tb.Helper()
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "forbid", Type: ebpf.LSM, AttachType: ebpf.AttachLSMMac, AttachTo: what, License: "GPL",
		Instructions: append(instructions,
			asm.LoadImm(asm.R1, number, asm.DWord),
			asm.Mov.Imm(asm.R2, 0),
			asm.JNE.Reg(asm.R0, asm.R1, "allow"),
			asm.Mov.Imm(asm.R2, -int32(unix.EPERM)),
			asm.Mov.Reg(asm.R0, asm.R2).WithSymbol("allow"),
			asm.Return(),
		),
	})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { program.Close() })
	attached, err := link.AttachLSM(link.LSMOptions{Program: program})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { attached.Close() })
}
