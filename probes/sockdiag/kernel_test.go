package sockdiag

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/sys/unix"

	"sockq/probes/tcpstate"
)

func TestAcceptQueue(t *testing.T) {
	for _, f := range bothFamilies {
		t.Run(f.name, func(t *testing.T) {
			newNetns(t)
			c := newClientHere(t)
			l := listen(t, f.loopback, 1)
			want := func(length uint32) {
				t.Helper()
				s := find(t, c, listening, l)
				got, limit, ok := s.AcceptQueue()
				if got != length || limit != 1 || !ok {
					t.Errorf("accept queue: %d/%d %t, want %d/1", got, limit, ok, length)
				}
				if r, w, ok := s.ByteQueues(); ok {
					t.Errorf("a listener has byte queues: %d, %d", r, w)
				}
				if s.State != tcpstate.Listen || s.Local != localAddress(t, l) || s.Remote.Port() != 0 {
					t.Errorf("listener: %+v", s)
				}
			}
			want(0)
			client := connectTo(t, localAddress(t, l))
			connectTo(t, localAddress(t, l))
			eventually(t, "two connections are in the queue", func() bool {
				s := find(t, c, listening, l)
				n, _, _ := s.AcceptQueue()
				return n == 2
			})
			want(2)

			s := find(t, c, Query{}, client)
			if _, _, ok := s.AcceptQueue(); ok {
				t.Error("a connection has an accept queue")
			}
			// A child that waits for accept() has no file yet.
			orphans := 0
			for _, s := range list(t, c, Query{States: tcpstate.MaskOf(tcpstate.Established)}) {
				if s.Local == localAddress(t, l) && s.Inode == 0 {
					orphans++
				}
			}
			if orphans != 2 {
				t.Errorf("%d children without an inode, want 2", orphans)
			}
			if _, _, err := unix.Accept(l); err != nil {
				t.Fatal(err)
			}
			want(1)
		})
	}
}

func TestByteQueues(t *testing.T) {
	for _, f := range bothFamilies {
		t.Run(f.name, func(t *testing.T) {
			newNetns(t)
			c := newClientHere(t)
			client, server := pair(t, listen(t, f.loopback, 1))
			queues := func(fd int) [2]uint32 {
				t.Helper()
				s := find(t, c, Query{}, fd)
				r, w, ok := s.ByteQueues()
				if !ok {
					t.Fatalf("no byte queues: %+v", s)
				}
				return [2]uint32{r, w}
			}
			if got := [2][2]uint32{queues(client), queues(server)}; got != [2][2]uint32{} {
				t.Errorf("idle connection has queues %d", got)
			}
			if _, err := unix.Write(client, []byte("hello")); err != nil {
				t.Fatal(err)
			}
			eventually(t, "five bytes are unread and acknowledged", func() bool {
				return queues(server) == [2]uint32{5, 0} && queues(client) == [2]uint32{}
			})

			// Fill the peer's buffer, then ours.
			if err := unix.SetNonblock(client, true); err != nil {
				t.Fatal(err)
			}
			written := 5
			full := make([]byte, 1<<16)
			for {
				n, err := unix.Write(client, full)
				if err == unix.EAGAIN {
					break
				}
				if err != nil {
					t.Fatal(err)
				}
				written += n
			}
			eventually(t, "all bytes are in one of the queues", func() bool {
				return queues(server)[0]+queues(client)[1] == uint32(written)
			})
			unread, err := unix.IoctlGetInt(server, unix.SIOCINQ)
			if err != nil {
				t.Fatal(err)
			}
			unsent, err := unix.IoctlGetInt(client, unix.SIOCOUTQ)
			if err != nil {
				t.Fatal(err)
			}
			if got := [2]uint32{queues(server)[0], queues(client)[1]}; got != [2]uint32{uint32(unread), uint32(unsent)} || unsent == 0 {
				t.Errorf("queues are %d, ioctls say %d and %d", got, unread, unsent)
			}
		})
	}
}

// A FIN that was received counts as a byte (RFC 9293 section 3.4: it occupies
// sequence space).
func TestByteQueuesCountFIN(t *testing.T) {
	newNetns(t)
	c := newClientHere(t)
	client, server := pair(t, listen(t, "127.0.0.1:0", 1))
	if err := unix.Shutdown(client, unix.SHUT_WR); err != nil {
		t.Fatal(err)
	}
	var s Socket
	eventually(t, "the FIN has arrived", func() bool {
		s = find(t, c, Query{}, server)
		return s.State == tcpstate.CloseWait
	})
	if r, w, ok := s.ByteQueues(); r != 1 || w != 0 || !ok {
		t.Errorf("CLOSE_WAIT has queues %d, %d, %t, want 1, 0", r, w, ok)
	}
	// The other side is a real FIN_WAIT2, since its socket is open.
	eventually(t, "the FIN is acknowledged", func() bool {
		s = find(t, c, Query{}, client)
		return s.State == tcpstate.FinWait2
	})
	if r, w, ok := s.ByteQueues(); s.TimeWait() || r != 0 || w != 0 || !ok {
		t.Errorf("half-closed socket: time-wait %t, queues %d, %d, %t", s.TimeWait(), r, w, ok)
	}
}

func TestFamilies(t *testing.T) {
	newNetns(t)
	c := newClientHere(t)
	v4 := listen(t, "127.0.0.1:0", 1)
	v6 := listen(t, "[::1]:0", 1)
	dual := listen(t, "[::]:0", 1)
	mapped := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), localAddress(t, dual).Port())
	client := connectTo(t, mapped)
	server, _, err := unix.Accept4(dual, unix.SOCK_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(server)

	want := map[uint8][]int{
		unix.AF_INET:   {v4, client},
		unix.AF_INET6:  {v6, dual, server},
		unix.AF_UNSPEC: {v4, client, v6, dual, server},
	}
	check := func(t *testing.T) {
		for family, fds := range want {
			got := list(t, c, Query{Family: family})
			if len(got) != len(fds) {
				t.Errorf("family %d: %d sockets, want %d", family, len(got), len(fds))
			}
			for _, fd := range fds {
				if _, ok := got[cookie(t, fd)]; !ok {
					t.Errorf("family %d: %s is missing", family, localAddress(t, fd))
				}
			}
		}
	}
	t.Run("one walk", check)
	if c.twoDumps {
		t.Error("this kernel has no TCPDIAG_GETSOCK")
	}
	c.twoDumps = true
	t.Run("two dumps", check)

	s := find(t, c, Query{Family: unix.AF_INET6}, server)
	if !s.Local.Addr().Is4In6() || netip.AddrPortFrom(s.Remote.Addr().Unmap(), s.Remote.Port()) != localAddress(t, client) {
		t.Errorf("v4-mapped connection: %s from %s", s.Local, s.Remote)
	}
	s = find(t, c, listening, dual)
	if v6only, ok := s.V6Only(); v6only || !ok {
		t.Errorf("dual-stack listener: v6only %t, %t", v6only, ok)
	}
	if err := c.Dump(Query{Family: unix.AF_UNIX}, nil); !errors.Is(err, unix.EAFNOSUPPORT) {
		t.Errorf("AF_UNIX: %v, want EAFNOSUPPORT", err)
	}
}

func TestStates(t *testing.T) {
	newNetns(t)
	c := newClientHere(t)
	l := listen(t, "127.0.0.1:0", 1)
	client, server := pair(t, l)
	all, bound := []int{l, client, server}, []int(nil)
	if fd := bind(t, "127.0.0.1:0"); boundShown(t) {
		all, bound = append(all, fd), []int{fd}
	}
	for _, tt := range []struct {
		states tcpstate.Mask
		want   []int
	}{
		{0, all},
		{tcpstate.MaskAll, all},
		{tcpstate.MaskListen, []int{l}},
		{tcpstate.MaskConnected, []int{client, server}},
		{tcpstate.MaskBound, bound},
		{tcpstate.MaskOf(tcpstate.CloseWait), nil},
	} {
		for _, f := range []uint8{unix.AF_INET, unix.AF_UNSPEC} {
			got := list(t, c, Query{Family: f, States: tt.states})
			if len(got) != len(tt.want) {
				t.Errorf("family %d, states %#x: %d sockets, want %d", f, tt.states, len(got), len(tt.want))
			}
			for _, fd := range tt.want {
				if _, ok := got[cookie(t, fd)]; !ok {
					t.Errorf("family %d, states %#x: socket %d is missing", f, tt.states, fd)
				}
			}
		}
	}
}

func TestIdentity(t *testing.T) {
	newNetns(t)
	c := newClientHere(t)
	const uid = 54321
	if _, _, errno := unix.Syscall(unix.SYS_SETFSUID, uid, 0, 0); errno != 0 {
		t.Fatal(errno)
	}
	fd := newSocket(t, unix.AF_INET, unix.SOCK_STREAM)
	if _, _, errno := unix.Syscall(unix.SYS_SETFSUID, uintptr(os.Getuid()), 0, 0); errno != 0 {
		t.Fatal(errno)
	}
	if err := unix.BindToDevice(fd, "lo"); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(fd, 5); err != nil {
		t.Fatal(err)
	}
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		t.Fatal(err)
	}
	got := find(t, c, listening, fd)
	want := Socket{
		Family: unix.AF_INET, State: tcpstate.Listen,
		Local: localAddress(t, fd), Remote: netip.MustParseAddrPort("0.0.0.0:0"),
		Interface: 1, Cookie: cookie(t, fd), UID: uid, Inode: uint32(stat.Ino),
		sendQueue: 5,
	}
	if diff := cmp.Diff(want, got, compareSockets...); diff != "" {
		t.Errorf("socket (-want +got):\n%s", diff)
	}
}

var compareSockets = []cmp.Option{
	cmp.AllowUnexported(Socket{}),
	cmpopts.IgnoreFields(Socket{}, "attributes"),
	cmpopts.EquateComparable(netip.AddrPort{}),
}

func TestBoundInactive(t *testing.T) {
	newNetns(t)
	supported, err := BoundInactiveSupported()
	if err != nil || supported != boundShown(t) {
		t.Fatalf("bound sockets are supported: %t, %v", supported, err)
	}
	c := newClientHere(t)
	for _, f := range bothFamilies {
		fd := bind(t, f.loopback)
		s, ok := list(t, c, Query{States: tcpstate.MaskBound})[cookie(t, fd)]
		if ok != supported {
			t.Fatalf("%s: bound socket listed: %t, but support: %t", f.name, ok, supported)
		}
		if !supported {
			continue
		}
		if s.State != tcpstate.Close || s.Local != localAddress(t, fd) {
			t.Errorf("%s: bound socket: %+v", f.name, s)
		}
		if r, w, ok := s.ByteQueues(); r != 0 || w != 0 || !ok {
			t.Errorf("%s: bound socket has queues %d, %d, %t", f.name, r, w, ok)
		}
		if _, _, ok := s.AcceptQueue(); ok {
			t.Errorf("%s: bound socket has an accept queue", f.name)
		}
	}
	if got := list(t, c, Query{States: tcpstate.MaskListen | tcpstate.MaskConnected}); len(got) != 0 {
		t.Errorf("bound sockets were listed without being asked for: %v", got)
	}
}

func TestSKMemInfoDrops(t *testing.T) {
	newNetns(t)
	c := newClientHere(t)
	l := listen(t, "127.0.0.1:0", 0)
	q := Query{States: tcpstate.MaskListen, Extensions: ExtSKMemInfo | ExtMemInfo}
	info := func() SKMemInfo {
		s := find(t, c, q, l)
		info, ok := s.SKMemInfo()
		if !ok {
			t.Fatal("no SKMEMINFO")
		}
		return info
	}
	if n := info().Drops; n != 0 {
		t.Fatalf("new listener has %d drops", n)
	}
	if size, err := unix.GetsockoptInt(l, unix.SOL_SOCKET, unix.SO_RCVBUF); err != nil || info().Rcvbuf != uint32(size) {
		t.Errorf("receive buffer is %d, want %d (%v)", info().Rcvbuf, size, err)
	}
	connectTo(t, localAddress(t, l)) // listen(0) holds one
	for range 3 {
		fd := newSocket(t, unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK)
		if err := unix.Connect(fd, sockaddr(localAddress(t, l))); err != unix.EINPROGRESS {
			t.Fatalf("connect: %v", err)
		}
	}
	eventually(t, "three SYNs were refused", func() bool { return tcpExt(t, "ListenDrops") >= 3 })
	// SYNs are sent again meanwhile, so compare inside a bracket.
	before := tcpExt(t, "ListenDrops")
	drops := int(info().Drops)
	if after := tcpExt(t, "ListenDrops"); drops < before || drops > after {
		t.Errorf("drops are %d, ListenDrops between %d and %d", drops, before, after)
	}
	s := find(t, c, q, l)
	if m, ok := s.MemInfo(); m != (MemInfo{}) || !ok {
		t.Errorf("memory of a listener: %+v, %t", m, ok)
	}
}

func TestMemInfo(t *testing.T) {
	newNetns(t)
	c := newClientHere(t)
	client, server := pair(t, listen(t, "127.0.0.1:0", 1))
	if _, err := unix.Write(client, make([]byte, 10000)); err != nil {
		t.Fatal(err)
	}
	q := Query{Extensions: ExtMemInfo | ExtSKMemInfo}
	eventually(t, "the bytes have arrived", func() bool {
		s := find(t, c, q, server)
		r, _, _ := s.ByteQueues()
		return r == 10000
	})
	s := find(t, c, q, server)
	m, ok := s.MemInfo()
	sk, ok2 := s.SKMemInfo()
	if !ok || !ok2 || m.Rmem < 10000 || m.Rmem != sk.RmemAlloc || m.Fmem != sk.FwdAlloc {
		t.Errorf("memory: %+v %t, %+v %t", m, ok, sk, ok2)
	}
}

func TestTCPInfo(t *testing.T) {
	newNetns(t)
	c := newClientHere(t)
	client, server := pair(t, listen(t, "127.0.0.1:0", 1))
	if _, err := unix.Write(client, make([]byte, 12345)); err != nil {
		t.Fatal(err)
	}
	q := Query{Extensions: ExtInfo | ExtCong}
	eventually(t, "the bytes are acknowledged", func() bool {
		s := find(t, c, q, client)
		_, w, _ := s.ByteQueues()
		return w == 0
	})
	for _, fd := range []int{client, server} {
		raw, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		if err != nil {
			t.Fatal(err)
		}
		s := find(t, c, q, fd)
		got, ok := s.TCPInfo()
		if !ok {
			t.Fatal("no TCP_INFO")
		}
		want := parseTCPInfo(unsafe.Slice((*byte)(unsafe.Pointer(raw)), unsafe.Sizeof(*raw)))
		moving := cmpopts.IgnoreFields(TCPInfo{}, "Size", "LastDataSent", "LastAckSent", "LastDataRecv", "LastAck", "ATO")
		if diff := cmp.Diff(want, got, moving); diff != "" {
			t.Errorf("TCP_INFO (-getsockopt +sock_diag):\n%s", diff)
		}
		name, err := unix.GetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION)
		if got, ok := s.CongestionControl(); got != name || !ok || err != nil {
			t.Errorf("congestion control %q, %t, want %q (%v)", got, ok, name, err)
		}
	}
	s := find(t, c, q, client)
	if info, _ := s.TCPInfo(); info.BytesSent != 12345 || info.BytesAcked != 12346 || info.SndMSS == 0 || info.RTT == 0 {
		t.Errorf("TCP_INFO of the client: %+v", info) // BytesAcked counts the SYN
	}
	s = find(t, c, Query{}, client)
	if _, ok := s.TCPInfo(); ok {
		t.Error("TCP_INFO without being asked for")
	}
	if _, ok := s.SKMemInfo(); ok {
		t.Error("SKMEMINFO without being asked for")
	}
}

func TestCgroupID(t *testing.T) {
	newNetns(t)
	c := newClientHere(t)
	s := find(t, c, listening, listen(t, "127.0.0.1:0", 1))
	got, ok := s.CgroupID()
	if !ok {
		t.Fatal("no CGROUP_ID")
	}
	b, err := os.ReadFile("/proc/thread-self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		path, ok := strings.CutPrefix(line, "0::")
		if !ok {
			continue
		}
		mnt := t.TempDir()
		if err := unix.Mount("cgroup2", mnt, "cgroup2", unix.MS_RDONLY, ""); err != nil {
			skip(t, "mount cgroup2: %v", err)
		}
		defer func() { _ = unix.Unmount(mnt, unix.MNT_DETACH) }()
		var stat unix.Stat_t
		if err := unix.Stat(mnt+strings.TrimSpace(path), &stat); err != nil {
			t.Fatal(err)
		}
		if got != stat.Ino {
			t.Errorf("cgroup id %d, want %d", got, stat.Ino)
		}
		return
	}
	skip(t, "no cgroup v2: %q", b)
}

// With TCP_DEFER_ACCEPT the final ACK leaves the request where it is.
func TestRequest(t *testing.T) {
	for _, f := range bothFamilies {
		t.Run(f.name, func(t *testing.T) {
			newNetns(t)
			c := newClientHere(t)
			l := bind(t, f.loopback)
			if err := unix.SetsockoptInt(l, unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT, 30); err != nil {
				t.Fatal(err)
			}
			if err := unix.Listen(l, 5); err != nil {
				t.Fatal(err)
			}
			client := connectTo(t, localAddress(t, l))
			var request Socket
			eventually(t, "the request is listed", func() bool {
				for _, s := range list(t, c, Query{States: tcpstate.MaskOf(tcpstate.SynRecv)}) {
					request = s
					return true
				}
				return false
			})
			if !request.Request() || request.TimeWait() || request.Timer != TimerRetransmit ||
				request.Local != localAddress(t, l) || request.Remote != localAddress(t, client) ||
				request.UID != 0 || request.Inode != 0 || request.Cookie == 0 || request.Expires == 0 {
				t.Errorf("request: %+v", request)
			}
			if _, _, ok := request.ByteQueues(); ok {
				t.Error("a request has byte queues")
			}
			if _, ok := request.CgroupID(); ok {
				t.Error("a request has a cgroup")
			}
			// The socket that it becomes keeps the cookie.
			if _, err := unix.Write(client, []byte{1}); err != nil {
				t.Fatal(err)
			}
			server, _, err := unix.Accept4(l, unix.SOCK_CLOEXEC)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(server)
			if got := cookie(t, server); got != request.Cookie {
				t.Errorf("socket has cookie %d, its request had %d", got, request.Cookie)
			}
		})
	}
}

func TestTimeWait(t *testing.T) {
	for _, f := range bothFamilies {
		t.Run(f.name, func(t *testing.T) {
			newNetns(t)
			c := newClientHere(t)
			l := listen(t, f.loopback, 1)
			client, err := unix.Socket(family(localAddress(t, l).Addr()), unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			if err := unix.Connect(client, sockaddr(localAddress(t, l))); err != nil {
				t.Fatal(err)
			}
			server, _, err := unix.Accept4(l, unix.SOCK_CLOEXEC)
			if err != nil {
				t.Fatal(err)
			}
			id, address := cookie(t, client), localAddress(t, client)
			check := func(state tcpstate.State) {
				t.Helper()
				var s Socket
				eventually(t, fmt.Sprintf("the socket is in %s", state), func() bool {
					s = list(t, c, Query{States: tcpstate.MaskOf(state)})[id]
					return s.State == state
				})
				if !s.TimeWait() || s.Timer != TimerTimeWait || s.Local != address || s.UID != 0 || s.Inode != 0 ||
					s.Expires <= 50*time.Second || s.Expires > 61*time.Second {
					t.Errorf("time-wait: %+v", s)
				}
				if _, _, ok := s.ByteQueues(); ok {
					t.Errorf("a time-wait in %s has byte queues", state)
				}
			}
			// An acknowledgement that meets close() leaves a full socket
			// (tcp_rcv_state_process, sock_owned_by_user).
			if err := unix.Shutdown(client, unix.SHUT_WR); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the FIN is acknowledged", func() bool {
				return list(t, c, Query{States: tcpstate.MaskOf(tcpstate.FinWait2)})[id].State == tcpstate.FinWait2
			})
			unix.Close(client)
			check(tcpstate.FinWait2)
			unix.Close(server)
			check(tcpstate.TimeWait)
		})
	}
}

// Without any capability.
func TestUnprivileged(t *testing.T) {
	newNetns(t)
	l := listen(t, "127.0.0.1:0", 1)
	client, _ := pair(t, l)
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	if err := unix.Capset(&header, &none[0]); err != nil {
		t.Fatal(err)
	}
	c := newClientHere(t)
	if n := len(list(t, c, Query{})); n != 3 {
		t.Errorf("%d sockets, want 3", n)
	}
	q := Query{Extensions: ExtSKMemInfo | ExtInfo, Filter: LocalPort(localAddress(t, client).Port())}
	s := find(t, c, q, client)
	if _, ok := s.SKMemInfo(); !ok {
		t.Error("no SKMEMINFO")
	}
	if _, ok := s.TCPInfo(); !ok {
		t.Error("no TCP_INFO")
	}
	if ok, err := BoundInactiveSupported(); err != nil {
		t.Errorf("bound inactive: %t, %v", ok, err)
	}
}
