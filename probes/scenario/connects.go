package scenario

import (
	"errors"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"sockq/probes/tcpstate"
)

// connects are about calls of connect() that come to nothing.
var connects = []Scenario{
	{
		Name: "refused", About: "three connects to a port on which nobody listens",
		Play: func(s *Stage) {
			nobody := s.Next()
			for range 3 {
				s.Begin(nobody).Fails(unix.ECONNREFUSED)
			}
			want := Expect{Happened: new(Happened).
				took(3, tcpstate.Close, tcpstate.SynSent, tcpstate.Close).failed(3, "refused")}
			want.Happened.AttemptFails = 3
			want.Happened.ResetsSent, want.Happened.ResetsReceived = 3, 3
			s.Check(want)
		},
	},
	{
		Name: "timed_out", About: "an address does not answer until TCP_USER_TIMEOUT, which the second SYN's timer looks at",
		Play: func(s *Stage) {
			timesOut(s, s.Socket().Option(unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 1))
		},
	},
	{
		Name: "retries_used_up", About: "an address does not answer, nor does it the second SYN, which is the last",
		Families: []Family{IPv4}, // it takes 3 s
		Play: func(s *Stage) {
			if KernelAtLeast(6, 5) {
				s.NS.Sysctl("net.ipv4.tcp_syn_linear_timeouts", "0")
			}
			timesOut(s, s.Socket().Option(unix.IPPROTO_TCP, unix.TCP_SYNCNT, 1))
		},
	},
	{
		Name: "unreachable_by_ICMP", About: "a router answers SYNs: to two hosts and one network there is no way",
		Play: func(s *Stage) {
			host, network := byte(1), byte(0) // ICMP_HOST_UNREACH, ICMP_NET_UNREACH
			if s.Family == IPv6 {
				host, network = 3, 0 // ICMPV6_ADDR_UNREACH, ICMPV6_NOROUTE
			}
			for code, err := range map[byte]unix.Errno{host: unix.EHOSTUNREACH, network: unix.ENETUNREACH} {
				client := s.Begin(s.Peer().Addr(80))
				s.Peer().claim(client).Unreachable(code)
				client.Fails(err)
			}
			// A connect() that waits tells the error, too.
			client := s.Socket().Bind(s.Next())
			result := client.wait(s.Peer().Addr(80))
			router := s.Peer().claim(client)
			for waits := true; waits; {
				router.Unreachable(host) // for nothing where connect() is not yet asleep (LockDroppedIcmps)
				select {
				case err := <-result:
					waits = false
					if !errors.Is(err, unix.EHOSTUNREACH) {
						s.Fatalf("connect: %v, want %v", err, unix.EHOSTUNREACH)
					}
				case <-time.After(200 * time.Millisecond):
				}
			}
			client.Close()
			want := Expect{Happened: new(Happened).
				took(3, tcpstate.Close, tcpstate.SynSent, tcpstate.Close).
				failed(2, "host_unreachable").failed(1, "net_unreachable")}
			want.Happened.AttemptFails = 3
			s.Check(want)
		},
	},
	{
		Name: "unreachable_locally", About: "the routing table has no way, or forbids it: connect() fails before there is a state",
		Play: func(s *Stage) {
			prefix := s.Family.silent().AsSlice()
			address := func(last byte) netip.AddrPort {
				prefix[len(prefix)-1] = last
				addr, _ := netip.AddrFromSlice(prefix)
				return netip.AddrPortFrom(addr, 80)
			}
			unreachable, prohibited := address(2), address(3)
			s.NS.Do(func() {
				for addr, kind := range map[netip.Addr]byte{
					unreachable.Addr(): unix.RTN_UNREACHABLE, prohibited.Addr(): unix.RTN_PROHIBIT,
				} {
					if err := addRoute(addr, unix.RT_SCOPE_UNIVERSE, kind, netip.Addr{}); err != nil {
						s.Fatal(err)
					}
				}
			})
			s.Socket().CannotConnect(address(4), unix.ENETUNREACH)
			for range 2 {
				s.Socket().CannotConnect(unreachable, unix.EHOSTUNREACH)
			}
			for range 3 {
				s.Socket().CannotConnect(prohibited, unix.EACCES)
			}
			s.Check(Expect{Happened: new(Happened).
				failed(1, "net_unreachable").failed(2, "host_unreachable").failed(3, "other")})
		},
	},
	{
		Name: "no_ports_left", About: "both local ports are in use toward a server, and so is the one that is asked for",
		Play: func(s *Stage) {
			l := s.Listen(5)
			s.NS.Sysctl("net.ipv4.ip_local_port_range", "40000 40001")
			for range 2 {
				s.Connect(l.Addr())
			}
			for range 3 {
				s.Socket().CannotConnect(l.Addr(), unix.EADDRNOTAVAIL)
			}
			port := s.Next()
			s.Socket().Bind(port).Connect(l.Addr())
			second := s.Socket().Bind(port)
			second.CannotConnect(l.Addr(), unix.EADDRNOTAVAIL)
			second.Close()
			want := s.story(l)
			want.States[tcpstate.Established] = 6
			want.Listeners[0].AcceptQueue = 3
			want.Listeners[0].Took.Connections = 3
			want.Happened.inbound(3).outbound(3).
				took(4, tcpstate.Close, tcpstate.SynSent, tcpstate.Close).failed(4, "no_ports")
			s.Check(want)
		},
	},
	{
		Name: "closed_before_an_answer", About: "the application gives up: close(), shutdown(), connect() with AF_UNSPEC",
		Play: func(s *Stage) {
			for _, give := range []func(*Socket){
				(*Socket).Close,
				(*Socket).Reset,
				func(k *Socket) { k.Shutdown(unix.SHUT_RDWR) },
				(*Socket).Disconnect,
			} {
				give(s.Begin(s.Peer().Addr(80)))
			}
			s.Check(Expect{Happened: new(Happened).
				took(4, tcpstate.Close, tcpstate.SynSent, tcpstate.Close).failed(4, "closed")})
		},
	},
}

// timesOut lets k connect to an address that does not answer.
func timesOut(s *Stage, k *Socket) {
	s.Helper()
	k.Begin(s.Peer().Addr(80))
	want := Expect{
		States:   States{tcpstate.SynSent: 1},
		Outbound: Queues{SendBytes: 1, SendMaxBytes: 1},
		Happened: new(Happened).took(1, tcpstate.Close, tcpstate.SynSent),
	}
	s.Settle(want)
	k.Fails(unix.ETIMEDOUT)
	k.Await(tcpstate.Close)
	want = Expect{Happened: want.Happened.took(1, tcpstate.SynSent, tcpstate.Close).failed(1, "timeout")}
	want.Happened.AttemptFails = 1
	s.Check(want)
}

// wait calls connect(2) on another thread, which waits for an answer. What it
// returns gets connect's error.
func (k *Socket) wait(to netip.AddrPort) <-chan error {
	k.s.Helper()
	if err := unix.SetNonblock(k.fd, false); err != nil {
		k.s.Fatalf("let socket block: %v", err)
	}
	result := make(chan error, 1)
	go func() { result <- unix.Connect(k.fd, sockaddr(to)) }()
	return result
}
