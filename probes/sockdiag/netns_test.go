package sockdiag

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sockq/probes/tcpstate"
)

// skip skips, but in CI a test that cannot run has failed.
func skip(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}

// newNetns moves the test into a network namespace of its own, with lo up. The
// thread stays locked, so that it ends with the test's goroutine.
func newNetns(t testing.TB) {
	t.Helper()
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		skip(t, "unshare network namespace (needs root): %v", err)
	}
	fd := newSocket(t, unix.AF_INET, unix.SOCK_DGRAM)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		t.Fatal(err)
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr); err != nil {
		t.Fatalf("set lo up: %v", err)
	}
}

func newClientHere(t testing.TB) *Client {
	t.Helper()
	c, err := Dial()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func newSocket(t testing.TB, family, typ int) int {
	t.Helper()
	fd, err := unix.Socket(family, typ|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatalf("socket: %v", err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}

func family(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func localAddress(t testing.TB, fd int) netip.AddrPort {
	t.Helper()
	sa, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port))
	}
	t.Fatalf("unexpected address %T", sa)
	return netip.AddrPort{}
}

// bind makes a socket that is bound to address.
func bind(t testing.TB, address string) int {
	t.Helper()
	a := netip.MustParseAddrPort(address)
	fd := newSocket(t, family(a.Addr()), unix.SOCK_STREAM)
	if err := unix.Bind(fd, sockaddr(a)); err != nil {
		t.Fatalf("bind %s: %v", address, err)
	}
	return fd
}

func listen(t testing.TB, address string, backlog int) int {
	t.Helper()
	fd := bind(t, address)
	if err := unix.Listen(fd, backlog); err != nil {
		t.Fatalf("listen: %v", err)
	}
	return fd
}

// connectTo makes a socket that is connected to a.
func connectTo(t testing.TB, a netip.AddrPort) int {
	t.Helper()
	fd := newSocket(t, family(a.Addr()), unix.SOCK_STREAM)
	if err := unix.Connect(fd, sockaddr(a)); err != nil {
		t.Fatalf("connect to %s: %v", a, err)
	}
	return fd
}

// pair is an established connection through loopback.
func pair(t testing.TB, listener int) (client, server int) {
	t.Helper()
	client = connectTo(t, localAddress(t, listener))
	server, _, err := unix.Accept4(listener, unix.SOCK_CLOEXEC)
	if err != nil {
		t.Fatalf("accept: %v", err)
	}
	t.Cleanup(func() { unix.Close(server) })
	return client, server
}

func cookie(t testing.TB, fd int) uint64 {
	t.Helper()
	v, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// boundShown tells by the release whether sock_diag lists bound sockets: since
// 6.8.
func boundShown(t testing.TB) bool {
	t.Helper()
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		t.Fatal(err)
	}
	var major, minor int
	if _, err := fmt.Sscanf(unix.ByteSliceToString(name.Release[:]), "%d.%d", &major, &minor); err != nil {
		t.Fatal(err)
	}
	return major > 6 || major == 6 && minor >= 8
}

// list is all sockets of q by cookie.
func list(t testing.TB, c *Client, q Query) map[uint64]Socket {
	t.Helper()
	sockets, err := c.List(q)
	if err != nil {
		t.Fatal(err)
	}
	m := make(map[uint64]Socket, len(sockets))
	for _, s := range sockets {
		if _, ok := m[s.Cookie]; ok {
			t.Errorf("cookie %d was listed twice", s.Cookie)
		}
		m[s.Cookie] = s
	}
	return m
}

// find is the socket behind fd.
func find(t testing.TB, c *Client, q Query, fd int) Socket {
	t.Helper()
	s, ok := list(t, c, q)[cookie(t, fd)]
	if !ok {
		t.Fatalf("socket %d is not listed", fd)
	}
	return s
}

// eventually waits for a condition of the kernel's own making.
func eventually(t testing.TB, what string, condition func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !condition() {
		if time.Now().After(deadline) {
			t.Fatalf("timeout waiting until %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// tcpExt is a counter of the namespace's /proc/net/netstat.
func tcpExt(t testing.TB, name string) int {
	t.Helper()
	b, err := os.ReadFile("/proc/thread-self/net/netstat")
	if err != nil {
		t.Fatal(err)
	}
	lines := bytes.Split(b, []byte("\n"))
	for i := 0; i+1 < len(lines); i += 2 {
		values := bytes.Fields(lines[i+1])
		for j, field := range bytes.Fields(lines[i]) {
			if string(field) == name {
				n, err := strconv.Atoi(string(values[j]))
				if err != nil {
					t.Fatal(err)
				}
				return n
			}
		}
	}
	t.Fatalf("no counter %s", name)
	return 0
}

var bothFamilies = []struct{ name, any, loopback string }{
	{"IPv4", "0.0.0.0:0", "127.0.0.1:0"},
	{"IPv6", "[::]:0", "[::1]:0"},
}

// listening are the listeners of both families.
var listening = Query{States: tcpstate.MaskListen}
