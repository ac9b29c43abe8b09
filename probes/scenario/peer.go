package scenario

import (
	"errors"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// Peer is a TCP endpoint of raw segments, at an address of which the kernel's
// TCP knows nothing. It says what it is told to say and keeps silent otherwise:
// it neither acknowledges nor retransmits on its own. It has no file
// descriptor per connection.
type Peer struct {
	s         *Stage
	addr      netip.Addr
	out, in   int // raw socket, packet socket
	port      uint16
	conns     map[link]*Conn
	buf       []byte
	unclaimed []segment // SYNs of the kernel that nobody answered yet
}

// link is a connection as the peer names its ends.
type link struct{ local, remote netip.AddrPort }

// Conn is the peer's end of a connection.
type Conn struct {
	p        *Peer
	link     link
	next     uint32 // sequence number of what we send next
	received uint32 // and of what the kernel sends next
	told     uint32 // what of that the kernel was told, by an ACK
	window   uint16
	synAck   bool // we have got it
	fin      bool // we have got it
	reset    bool // we have got one
}

// patience bounds every wait for something that has to happen. An emulated
// machine is slow.
const patience = 20 * time.Second

// firstPeerPort is where the ports of connections that a peer opens start.
const firstPeerPort = 10000

func newPeer(s *Stage, family Family) *Peer {
	s.Helper()
	p := &Peer{
		s: s, addr: family.silent(), port: firstPeerPort,
		out: -1, in: -1,
		conns: make(map[link]*Conn), buf: make([]byte, 1<<16),
	}
	s.Cleanup(p.close)
	s.NS.Do(func() {
		if err := p.open(family); err != nil {
			s.Fatalf("new peer: %v", err)
		}
	})
	return p
}

func (p *Peer) open(family Family) (err error) {
	protocol := uint16(unix.ETH_P_IP)
	if family == IPv6 {
		protocol = unix.ETH_P_IPV6
	}
	// IPPROTO_RAW implies IP_HDRINCL and IPV6_HDRINCL.
	p.out, err = unix.Socket(family.domain(), unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return err
	}
	if family == IPv6 {
		err = joinAnycast(p.out, p.addr)
	} else {
		err = routeToNowhere(p.addr)
	}
	if err != nil {
		return err
	}
	// Protocol 0 receives nothing, so that all gets through the filter.
	p.in, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return err
	}
	if err := p.filter(family); err != nil {
		return err
	}
	return unix.Bind(p.in, &unix.SockaddrLinklayer{Protocol: htons(protocol), Ifindex: loopbackIndex})
}

// filter lets only packets in whose destination begins as the peer's address.
func (p *Peer) filter(family Family) error {
	destination := uint32(16)
	if family == IPv6 {
		destination = 24
	}
	a := p.addr.AsSlice()
	prefix := uint32(a[0])<<24 | uint32(a[1])<<16 | uint32(a[2])<<8 | uint32(a[3])
	program := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: destination},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: prefix, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: 1 << 16},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0},
	}
	return unix.SetsockoptSockFprog(p.in, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER,
		&unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]})
}

func (p *Peer) close() {
	for _, fd := range []*int{&p.out, &p.in} {
		if *fd >= 0 {
			unix.Close(*fd)
			*fd = -1
		}
	}
}

// Addr is the peer's address with a port for a kernel socket to connect to.
func (p *Peer) Addr(port uint16) netip.AddrPort { return netip.AddrPortFrom(p.addr, port) }

// SYN asks for a connection, from the peer's next port, and does nothing more.
func (p *Peer) SYN(to netip.AddrPort) *Conn {
	p.s.Helper()
	c := &Conn{p: p, link: link{p.Addr(p.port), to}, next: 1000, window: 0xffff}
	p.port++
	if p.port < firstPeerPort {
		p.port = firstPeerPort
	}
	p.conns[c.link] = c
	c.send(flagSYN, nil)
	c.next++
	return c
}

// StraySYN asks for a connection from an address to which there is no route.
func (p *Peer) StraySYN(to netip.AddrPort) {
	p.s.Helper()
	s := segment{from: netip.AddrPortFrom(p.addr.Next(), p.port), to: to, seq: 1000, flags: flagSYN, window: 0xffff}
	p.send(to.Addr(), s.packet())
}

// Connect opens a connection: SYN, SYN-ACK, ACK.
func (p *Peer) Connect(to netip.AddrPort) *Conn {
	p.s.Helper()
	c := p.SYN(to)
	c.AwaitSYNACK()
	c.ACK()
	return c
}

// Answer completes the connection that client has begun to one of the peer's
// ports.
func (p *Peer) Answer(client *Socket) *Conn {
	p.s.Helper()
	c := p.claim(client)
	c.ACKSYN()
	return c
}

// claim is the peer's end of the connection that client has begun. It has not
// been answered.
func (p *Peer) claim(client *Socket) *Conn {
	p.s.Helper()
	local := client.Addr()
	var c *Conn
	p.await("a SYN from "+local.String(), func() bool {
		for i, syn := range p.unclaimed {
			if syn.from == local {
				p.unclaimed = append(p.unclaimed[:i], p.unclaimed[i+1:]...)
				c = &Conn{
					p: p, link: link{syn.to, syn.from}, next: 1000,
					received: syn.seq + 1, window: 0xffff,
				}
				return true
			}
		}
		return false
	})
	p.conns[c.link] = c
	return c
}

// Addr is the peer's end.
func (c *Conn) Addr() netip.AddrPort { return c.link.local }

// ACKSYN answers the kernel's SYN with a SYN-ACK.
func (c *Conn) ACKSYN() {
	c.p.s.Helper()
	c.told = c.received
	c.send(flagSYN|flagACK, nil)
	c.next++
}

// CrossSYN answers the kernel's SYN with a SYN, as if both had opened at once.
func (c *Conn) CrossSYN() {
	c.p.s.Helper()
	c.send(flagSYN, nil)
	c.next++
}

// AwaitSYNACK waits for the kernel's SYN-ACK.
func (c *Conn) AwaitSYNACK() {
	c.p.s.Helper()
	c.p.await("a SYN-ACK for "+c.link.local.String(), func() bool { return c.synAck })
}

// AwaitFIN waits for the kernel's FIN and does not acknowledge it.
func (c *Conn) AwaitFIN() {
	c.p.s.Helper()
	c.p.await("a FIN for "+c.link.local.String(), func() bool { return c.fin })
}

// AwaitRST waits for the kernel's RST.
func (c *Conn) AwaitRST() {
	c.p.s.Helper()
	c.p.await("a RST for "+c.link.local.String(), func() bool { return c.reset })
}

// ACK acknowledges everything that was received.
func (c *Conn) ACK() {
	c.p.s.Helper()
	c.told = c.received
	c.send(flagACK, nil)
}

// ACKFIN waits for the kernel's FIN and acknowledges it.
func (c *Conn) ACKFIN() {
	c.p.s.Helper()
	c.AwaitFIN()
	c.ACK()
}

// FIN closes the peer's direction. It acknowledges nothing new.
func (c *Conn) FIN() {
	c.p.s.Helper()
	c.send(flagFIN|flagACK, nil)
	c.next++
}

// FINACK closes the peer's direction and acknowledges everything that was
// received, with one segment.
func (c *Conn) FINACK() {
	c.p.s.Helper()
	c.told = c.received
	c.FIN()
}

// RST aborts the connection. To a SYN of the kernel it is a refusal, since it
// acknowledges everything that was received.
func (c *Conn) RST() {
	c.p.s.Helper()
	c.told = c.received
	c.send(flagRST|flagACK, nil)
}

// Unreachable answers the kernel's SYN with an ICMP error, destination
// unreachable with that code.
func (c *Conn) Unreachable(code byte) {
	c.p.s.Helper()
	syn := segment{from: c.link.remote, to: c.link.local, seq: c.received - 1, flags: flagSYN}
	c.p.send(syn.from.Addr(), syn.unreachable(c.p.addr, code))
}

// Write sends that many bytes. It acknowledges nothing new.
func (c *Conn) Write(bytes int) {
	c.p.s.Helper()
	c.send(flagACK, make([]byte, bytes))
	c.next += uint32(bytes)
}

// Window says, with everything that is sent from now on, how many bytes the
// kernel may send.
func (c *Conn) Window(bytes uint16) { c.window = bytes }

func (c *Conn) send(flags byte, data []byte) {
	c.p.s.Helper()
	s := segment{
		from: c.link.local, to: c.link.remote,
		seq: c.next, ack: c.told, flags: flags, window: c.window, data: data,
	}
	c.p.send(s.to.Addr(), s.packet())
}

func (p *Peer) send(to netip.Addr, packet []byte) {
	p.s.Helper()
	if err := unix.Sendto(p.out, packet, 0, sockaddr(netip.AddrPortFrom(to, 0))); err != nil {
		p.s.Fatalf("send packet: %v", err)
	}
}

// await reads what the kernel sends until done.
func (p *Peer) await(what string, done func() bool) {
	p.s.Helper()
	for deadline := time.Now().Add(patience); !done(); {
		n, _, err := unix.Recvfrom(p.in, p.buf, 0)
		switch {
		case err == nil:
			if s, ok := parseSegment(p.buf[:n]); ok {
				p.receive(s)
			}
		case errors.Is(err, unix.EAGAIN):
			if time.Now().After(deadline) {
				p.s.Fatalf("waited for %s in vain", what)
			}
			_, _ = unix.Poll([]unix.PollFd{{Fd: int32(p.in), Events: unix.POLLIN}}, 100)
		case errors.Is(err, unix.EINTR):
		default:
			p.s.Fatalf("receive segment: %v", err)
		}
	}
}

func (p *Peer) receive(s segment) {
	c := p.conns[link{s.to, s.from}]
	switch {
	case c == nil:
		if s.flags&(flagSYN|flagACK) == flagSYN {
			p.unclaimed = append(p.unclaimed, s)
		}
		return
	case s.flags&flagRST != 0:
		c.reset = true
		return
	case s.flags&flagSYN != 0:
		if !c.synAck && s.flags&flagACK != 0 && s.ack == c.next {
			c.synAck = true
			c.received = s.seq + 1
		}
		return
	case s.seq != c.received: // sent again
		return
	}
	c.received += uint32(len(s.data))
	if s.flags&flagFIN != 0 {
		c.received++
		c.fin = true
	}
}

// awaitBytes waits for that many bytes of data, more than were acknowledged.
func (c *Conn) awaitBytes(bytes uint32) {
	c.p.s.Helper()
	c.p.await("data for "+c.link.local.String(), func() bool { return c.received-c.told >= bytes })
}
