package scenario

import (
	"errors"
	"net/netip"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"sockq/probes/tcpstate"
)

// Family is the IP version that a scenario plays over.
type Family uint8

// The families.
const (
	IPv4 Family = 4
	IPv6 Family = 6
)

func (f Family) String() string {
	if f == IPv6 {
		return "IPv6"
	}
	return "IPv4"
}

// Loopback is 127.0.0.1 or ::1.
func (f Family) Loopback() netip.Addr {
	if f == IPv6 {
		return netip.IPv6Loopback()
	}
	return netip.AddrFrom4([4]byte{127, 0, 0, 1})
}

// Any is 0.0.0.0 or ::.
func (f Family) Any() netip.Addr {
	if f == IPv6 {
		return netip.IPv6Unspecified()
	}
	return netip.IPv4Unspecified()
}

// silent is the address of a Peer, out of the blocks for documentation (RFC
// 5737, RFC 3849).
func (f Family) silent() netip.Addr {
	if f == IPv6 {
		return netip.MustParseAddr("2001:db8::1")
	}
	return netip.MustParseAddr("192.0.2.1")
}

func (f Family) domain() int {
	if f == IPv6 {
		return unix.AF_INET6
	}
	return unix.AF_INET
}

// Socket is a TCP socket of the kernel, with a file descriptor. Its methods
// fail the test where the kernel refuses.
type Socket struct {
	s  *Stage
	fd int
}

// Socket makes a socket that is in no state yet.
func (s *Stage) Socket() *Socket { s.Helper(); return s.socket(s.Family) }

func (s *Stage) socket(family Family) (k *Socket) {
	s.Helper()
	s.NS.Do(func() { k = s.socketHere(family) })
	return k
}

// socketHere is socket for a thread that is in the namespace.
func (s *Stage) socketHere(family Family) *Socket {
	s.Helper()
	fd, err := unix.Socket(family.domain(), unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_TCP)
	if err != nil {
		s.Fatalf("socket: %v", err)
	}
	return s.own(fd)
}

// own closes fd when the test ends, at the latest.
func (s *Stage) own(fd int) *Socket {
	k := &Socket{s, fd}
	s.sockets = append(s.sockets, k)
	return k
}

// FD is the socket's descriptor.
func (k *Socket) FD() int { return k.fd }

// Bind takes an address and says nothing to anybody. Like servers do, it sets
// SO_REUSEADDR.
func (k *Socket) Bind(addr netip.AddrPort) *Socket {
	k.s.Helper()
	k.Option(unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	if err := unix.Bind(k.fd, sockaddr(addr)); err != nil {
		k.s.Fatalf("bind %s: %v", addr, err)
	}
	return k
}

// Listen calls listen(2), again if need be.
func (k *Socket) Listen(backlog int) *Socket {
	k.s.Helper()
	if err := unix.Listen(k.fd, backlog); err != nil {
		k.s.Fatalf("listen(%d): %v", backlog, err)
	}
	return k
}

// Begin calls connect(2) and does not wait for an answer.
func (k *Socket) Begin(to netip.AddrPort) *Socket {
	k.s.Helper()
	if err := unix.Connect(k.fd, sockaddr(to)); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		k.s.Fatalf("connect %s: %v", to, err)
	}
	return k
}

// Connect calls connect(2) and waits until the connection is established.
func (k *Socket) Connect(to netip.AddrPort) *Socket {
	k.s.Helper()
	k.Begin(to).Established()
	return k
}

// Established waits until a connection that was begun is established.
func (k *Socket) Established() {
	k.s.Helper()
	k.poll(unix.POLLOUT)
	if err := k.err(); err != 0 {
		k.s.Fatalf("connect: %v", err)
	}
}

// Fails waits until the socket has an error, which has to be want, and takes it.
func (k *Socket) Fails(want unix.Errno) {
	k.s.Helper()
	k.poll(unix.POLLERR)
	if err := k.err(); err != want {
		k.s.Fatalf("socket ended with %v, want %v", err, want)
	}
}

// err takes the pending error of a socket.
func (k *Socket) err() unix.Errno {
	k.s.Helper()
	errno, err := unix.GetsockoptInt(k.fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err != nil {
		k.s.Fatalf("get SO_ERROR: %v", err)
	}
	return unix.Errno(errno)
}

// CannotConnect calls connect(2), which has to return want at once.
func (k *Socket) CannotConnect(to netip.AddrPort, want unix.Errno) {
	k.s.Helper()
	if err := unix.Connect(k.fd, sockaddr(to)); !errors.Is(err, want) {
		k.s.Fatalf("connect %s: %v, want %v", to, err, want)
	}
}

// Disconnect calls connect(2) with AF_UNSPEC, after which the socket is as new.
func (k *Socket) Disconnect() {
	k.s.Helper()
	var addr unix.RawSockaddrAny // AF_UNSPEC
	_, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(k.fd), uintptr(unsafe.Pointer(&addr)), unix.SizeofSockaddrAny)
	if errno != 0 {
		k.s.Fatalf("disconnect: %v", errno)
	}
}

// Await waits until the socket is in that state.
func (k *Socket) Await(state tcpstate.State) {
	k.s.Helper()
	var got tcpstate.State
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		info, err := unix.GetsockoptTCPInfo(k.fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		if err != nil {
			k.s.Fatalf("get TCP_INFO: %v", err)
		}
		if got = tcpstate.State(info.State); got == state {
			return
		}
	}
	k.s.Fatalf("waited for a socket in %s, it is in %s", state, got)
}

// Queued waits until that many connections wait for accept(). It asks for no cookie,
// as sock_diag would.
func (k *Socket) Queued(n uint32) {
	k.s.Helper()
	var got uint32
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		info, err := unix.GetsockoptTCPInfo(k.fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		if err != nil {
			k.s.Fatalf("get TCP_INFO: %v", err)
		}
		if got = info.Unacked; got == n {
			return
		}
	}
	k.s.Fatalf("waited for %d connections in an accept queue, there are %d", n, got)
}

// Accept takes the first connection out of the accept queue. It waits for one.
func (k *Socket) Accept() *Socket {
	k.s.Helper()
	k.poll(unix.POLLIN)
	fd, _, err := unix.Accept4(k.fd, unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
	if err != nil {
		k.s.Fatalf("accept: %v", err)
	}
	return k.s.own(fd)
}

// Write writes that many bytes.
func (k *Socket) Write(bytes int) {
	k.s.Helper()
	if n, err := unix.Write(k.fd, make([]byte, bytes)); n != bytes {
		k.s.Fatalf("write %d bytes: wrote %d, %v", bytes, n, err)
	}
}

// Read waits for that many bytes and reads them.
func (k *Socket) Read(bytes int) {
	k.s.Helper()
	for b := make([]byte, bytes); len(b) > 0; {
		k.poll(unix.POLLIN)
		n, err := unix.Read(k.fd, b)
		if n <= 0 {
			k.s.Fatalf("read: %d left of %d bytes, %v", len(b), bytes, err)
		}
		b = b[n:]
	}
}

// FIN closes our direction and keeps the socket: shutdown(SHUT_WR).
func (k *Socket) FIN() {
	k.s.Helper()
	k.Shutdown(unix.SHUT_WR)
}

// Shutdown calls shutdown(2).
func (k *Socket) Shutdown(how int) {
	k.s.Helper()
	if err := unix.Shutdown(k.fd, how); err != nil {
		k.s.Fatalf("shutdown: %v", err)
	}
}

// Close calls close(2). What the kernel still has to do is an orphan's.
func (k *Socket) Close() {
	k.s.Helper()
	if k.fd < 0 {
		return
	}
	if err := unix.Close(k.fd); err != nil {
		k.s.Errorf("close: %v", err)
	}
	k.fd = -1
}

// Reset closes the socket with a RST: SO_LINGER of 0 s.
func (k *Socket) Reset() {
	k.s.Helper()
	linger := unix.Linger{Onoff: 1}
	if err := unix.SetsockoptLinger(k.fd, unix.SOL_SOCKET, unix.SO_LINGER, &linger); err != nil {
		k.s.Fatalf("set SO_LINGER: %v", err)
	}
	k.Close()
}

// Option sets an option of the socket.
func (k *Socket) Option(level, name, value int) *Socket {
	k.s.Helper()
	if err := unix.SetsockoptInt(k.fd, level, name, value); err != nil {
		k.s.Fatalf("set socket option %d of level %d: %v", name, level, err)
	}
	return k
}

// Addr is the socket's own address.
func (k *Socket) Addr() netip.AddrPort {
	k.s.Helper()
	sa, err := unix.Getsockname(k.fd)
	if err != nil {
		k.s.Fatalf("getsockname: %v", err)
	}
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port))
	}
	k.s.Fatalf("getsockname: address of type %T", sa)
	return netip.AddrPort{}
}

// poll waits until one of the events came.
// Cookie is the kernel's own number of the socket.
func (k *Socket) Cookie() uint64 {
	k.s.Helper()
	cookie, err := unix.GetsockoptUint64(k.fd, unix.SOL_SOCKET, unix.SO_COOKIE)
	if err != nil {
		k.s.Fatalf("read cookie: %v", err)
	}
	return cookie
}

func (k *Socket) poll(events int16) {
	k.s.Helper()
	fds := []unix.PollFd{{Fd: int32(k.fd), Events: events}}
	for deadline := time.Now().Add(patience); ; {
		n, err := unix.Poll(fds, 100)
		switch {
		case n == 1:
			return
		case err != nil && !errors.Is(err, unix.EINTR):
			k.s.Fatalf("poll: %v", err)
		case time.Now().After(deadline):
			k.s.Fatalf("waited for a socket in vain")
		}
	}
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}
