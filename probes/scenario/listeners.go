package scenario

import (
	"net/netip"

	"golang.org/x/sys/unix"

	"sockq/probes/tcpstate"
)

// listeners are about who listens where.
var listeners = []Scenario{
	{
		Name: "SO_REUSEPORT", About: "three sockets share an address, each with queues of its own",
		Play: func(s *Stage) {
			addr := netip.AddrPortFrom(s.Family.Any(), firstPort)
			var group []*Socket
			for i := range 3 {
				k := s.Socket().Option(unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
				group = append(group, k.Bind(addr).Listen(5+i))
			}
			// The hash of the addresses would choose; a program makes it
			// known who gets what: 1, 2 and 3 connections.
			for i := range group {
				group[0].chooseInGroup(uint32(i))
				for range i + 1 {
					s.Peer().Connect(netip.AddrPortFrom(s.Family.Loopback(), firstPort))
				}
			}
			s.Check(Expect{
				States: States{tcpstate.Listen: 3, tcpstate.Established: 6},
				Listeners: []Listener{
					{Address: addr, AcceptQueue: 1, Limit: 5, Took: &Took{Connections: 1, Requested: 5}},
					{Address: addr, AcceptQueue: 2, Limit: 6, Took: &Took{Connections: 2, Requested: 6}},
					{Address: addr, AcceptQueue: 3, Limit: 7, Took: &Took{Connections: 3, Requested: 7}},
				},
				Happened: new(Happened).took(3, tcpstate.Close, tcpstate.Listen).inbound(6),
			})
		},
	},
	{
		Name: "dual_stack", About: "an IPv6 listener serves IPv4 clients under v4-mapped addresses",
		Families: []Family{IPv6},
		Play: func(s *Stage) {
			addr := netip.AddrPortFrom(IPv6.Any(), firstPort)
			l := s.Socket().Option(unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 0).Bind(addr).Listen(5)
			v4 := netip.AddrPortFrom(IPv4.Loopback(), firstPort)
			v6 := netip.AddrPortFrom(IPv6.Loopback(), firstPort)

			s.socket(IPv4).Connect(v4).Write(10)
			s.socket(IPv6).Connect(v6).Write(20)
			s.peer(IPv4).SYN(v4).AwaitSYNACK()
			s.peer(IPv6).SYN(v6).AwaitSYNACK()
			want := Expect{
				States: States{tcpstate.Listen: 1, tcpstate.Established: 4, tcpstate.SynRecv: 2},
				Listeners: []Listener{{
					Address: addr, AcceptQueue: 2, Limit: 5, SynQueue: 2, Took: &Took{Connections: 2, Requested: 5},
				}},
				Inbound:  Queues{ReceiveBytes: 30, ReceiveMaxBytes: 20},
				Happened: new(Happened).took(1, tcpstate.Close, tcpstate.Listen).inbound(2).outbound(2),
			}
			s.Check(want)

			// The time-wait of a v4-mapped connection.
			theirs := s.peer(IPv4).Connect(v4)
			l.Accept()
			l.Accept()
			l.Accept().Close()
			theirs.ACKFIN()
			theirs.FIN()
			want.States[tcpstate.TimeWait] = 1
			want.Listeners[0].AcceptQueue = 0
			want.Listeners[0].Took = &Took{Connections: 3, Accepts: 3, Requested: 5}
			want.Happened.inbound(1, tcpstate.FinWait1, tcpstate.FinWait2)
			s.Check(want)
		},
	},
	{
		Name: "bound_to_device", About: "listeners for lo alone; one of them shares its port with a listener for the rest",
		Play: func(s *Stage) {
			first, second := netip.AddrPortFrom(s.Family.Any(), firstPort), netip.AddrPortFrom(s.Family.Any(), firstPort+1)
			s.Socket().bindToLoopback().Bind(first).Listen(5)
			// Without SO_REUSEPORT they would exclude each other. Nobody
			// calls them: which one would get it depends on the family.
			for i, k := range []*Socket{s.Socket().bindToLoopback(), s.Socket()} {
				k.Option(unix.SOL_SOCKET, unix.SO_REUSEPORT, 1).Bind(second).Listen(6 + i)
			}
			for range 2 {
				s.Peer().Connect(netip.AddrPortFrom(s.Family.Loopback(), firstPort))
			}
			s.Check(Expect{
				States: States{tcpstate.Listen: 3, tcpstate.Established: 2},
				Listeners: []Listener{
					{Address: first, Device: "lo", AcceptQueue: 2, Limit: 5, Took: &Took{Connections: 2, Requested: 5}},
					{Address: second, Device: "lo", Limit: 6, Took: &Took{Requested: 6}},
					{Address: second, Limit: 7, Took: &Took{Requested: 7}},
				},
				Happened: new(Happened).took(3, tcpstate.Close, tcpstate.Listen).inbound(2),
			})
		},
	},
	{
		Name: "reset_while_queued", About: "a client resets before accept(): gone from the list, still in the queue",
		Play: func(s *Stage) {
			l := s.Listen(5)
			s.Peer().Connect(l.Addr())
			s.Peer().Connect(l.Addr()).RST()
			s.Peer().Connect(l.Addr())
			want := s.story(l)
			want.States[tcpstate.Established] = 2
			want.Listeners[0].AcceptQueue = 3
			want.Listeners[0].Took.Connections = 3
			want.Happened.inbound(3).took(1, tcpstate.Established, tcpstate.Close)
			want.Happened.ResetsReceived = 1
			s.Check(want)

			// accept() still returns it.
			for range 3 {
				l.Accept()
			}
			want.Listeners[0].AcceptQueue = 0
			want.Listeners[0].Took.Accepts = 3
			s.Check(want)
		},
	},
}

func (k *Socket) bindToLoopback() *Socket {
	k.s.Helper()
	if err := unix.BindToDevice(k.fd, "lo"); err != nil {
		k.s.Fatalf("bind to device: %v", err)
	}
	return k
}

// chooseInGroup makes every connection to the SO_REUSEPORT group go to the
// member that was the index-th to listen.
func (k *Socket) chooseInGroup(index uint32) {
	k.s.Helper()
	program := unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: index}
	err := unix.SetsockoptSockFprog(k.fd, unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_CBPF,
		&unix.SockFprog{Len: 1, Filter: &program})
	if err != nil {
		k.s.Fatalf("attach program to SO_REUSEPORT group: %v", err)
	}
}
