package scenario

import (
	"encoding/binary"
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"sockq/probes/tcpstate"
)

// accepts are about how connections leave the accept queue, and about listeners
// that begin and end.
var accepts = []Scenario{
	{
		Name: "short_burst", About: "33 connections come at once and are accepted within milliseconds, between two samples",
		Play: func(s *Stage) {
			l := s.Listen(64)
			for range 33 {
				s.Peer().Connect(l.Addr())
			}
			l.queued(33)
			for range 33 {
				l.Accept()
			}
			want := s.story(l)
			want.States[tcpstate.Established] = 33
			want.Listeners[0].Limit = 64
			want.Listeners[0].Took = &Took{Connections: 33, Accepts: 33, ShortPeak: 33, Requested: 64}
			want.Happened.inbound(33)
			s.Check(want)
		},
	},
	{
		Name: "backlog_clamped", About: "listen(9999) with net.core.somaxconn=128 gets 128, listen(50) on the same socket gets 50",
		Play: func(s *Stage) {
			s.NS.Sysctl("net.core.somaxconn", "128")
			l := s.Listen(9999)
			s.Peer().Connect(l.Addr())
			want := s.story(l)
			want.States[tcpstate.Established] = 1
			want.Listeners[0].AcceptQueue = 1
			want.Listeners[0].Limit = 128
			want.Listeners[0].Took = &Took{Connections: 1, Requested: 9999}
			want.Happened.inbound(1)
			s.Check(want)

			l.Listen(50)
			s.Peer().Connect(l.Addr())
			want.States[tcpstate.Established] = 2
			want.Listeners[0].AcceptQueue = 2
			want.Listeners[0].Limit = 50
			want.Listeners[0].Took = &Took{Connections: 2, Requested: 50}
			want.Happened.inbound(1)
			s.Check(want)
		},
	},
	{
		Name: "closed_with_a_full_queue", About: "a listener closes: the six connections in its queue are reset, the one that was accepted lives on",
		Play: func(s *Stage) {
			l := s.Listen(5)
			s.Peer().Connect(l.Addr())
			l.Accept()
			var clients []*Conn
			for range 6 {
				clients = append(clients, s.Peer().Connect(l.Addr()))
			}
			want := s.story(l)
			want.States[tcpstate.Established] = 7
			want.Listeners[0].AcceptQueue = 6
			want.Listeners[0].Took = &Took{Connections: 7, Accepts: 1, Requested: 5}
			want.Happened.inbound(7)
			s.Check(want)

			l.Close()
			for _, c := range clients {
				c.AwaitRST()
			}
			want = Expect{States: States{tcpstate.Established: 1}, Happened: want.Happened}
			want.Happened.
				took(1, tcpstate.Listen, tcpstate.Close).
				took(6, tcpstate.Established, tcpstate.Close)
			want.Happened.ResetsSent = 6
			s.Check(want)
		},
	},
	{
		Name: "listens_again", About: "shutdown(SHUT_RD) ends a listener and resets its queue; listen() on the same socket begins again",
		Play: func(s *Stage) {
			l := s.Listen(5)
			addr := l.Addr()
			for range 2 {
				s.Peer().Connect(addr)
			}
			l.Accept()
			want := s.story(l)
			want.States[tcpstate.Established] = 2
			want.Listeners[0].AcceptQueue = 1
			want.Listeners[0].Took = &Took{Connections: 2, Accepts: 1, Requested: 5}
			want.Happened.inbound(2)
			s.Check(want)

			l.Shutdown(unix.SHUT_RD)
			stopped := Expect{States: States{tcpstate.Established: 1, tcpstate.Close: 1}, Happened: want.Happened}
			want.Happened.
				took(1, tcpstate.Listen, tcpstate.Close).
				took(1, tcpstate.Established, tcpstate.Close)
			want.Happened.ResetsSent = 1
			s.Check(stopped)

			l.Listen(7)
			for range 3 {
				s.Peer().Connect(addr)
			}
			l.Accept()
			want.States[tcpstate.Established] = 4
			want.Listeners[0].AcceptQueue = 2
			want.Listeners[0].Limit = 7
			want.Listeners[0].Took = &Took{Connections: 5, Accepts: 2, Requested: 7}
			want.Happened.took(1, tcpstate.Close, tcpstate.Listen).inbound(3)
			s.Check(want)
		},
	},
	{
		Name: "accept_io_uring", About: "of six connections accept4() takes two and io_uring three",
		Play: func(s *Stage) {
			l := s.Listen(5)
			for range 6 {
				s.Peer().Connect(l.Addr())
			}
			want := s.story(l)
			want.States[tcpstate.Established] = 6
			want.Listeners[0].AcceptQueue = 6
			want.Listeners[0].Took.Connections = 6
			want.Happened.inbound(6)
			s.Settle(want)

			for range 2 {
				l.Accept()
			}
			want.Listeners[0].AcceptQueue = 4
			want.Listeners[0].Took.Accepts = 2
			s.Check(want)

			l.acceptByRing(3)
			want.Listeners[0].AcceptQueue = 1
			want.Listeners[0].Took.Accepts = 5
			want.Listeners[0].Took.AcceptsUnseen = true
			s.Check(want)
		},
	},
	{
		Name: "accept_blocked", About: "a thread waits in accept() before each of three connections comes",
		Play: func(s *Stage) {
			l := s.Listen(5)
			for range 3 {
				accepted := l.acceptOnThread()
				s.Peer().Connect(l.Addr())
				accepted()
			}
			want := s.story(l)
			want.States[tcpstate.Established] = 3
			want.Listeners[0].Took.Connections = 3
			want.Listeners[0].Took.Accepts = 3
			want.Happened.inbound(3)
			s.Check(want)
		},
	},
	{
		Name: "accept_what_was_closed", About: "of six connections in the queue the clients have closed three and reset one: accept() returns them all",
		Play: func(s *Stage) {
			l := s.Listen(5)
			var clients []*Conn
			for range 6 {
				clients = append(clients, s.Peer().Connect(l.Addr()))
			}
			for _, c := range clients[:3] {
				c.FIN()
			}
			clients[3].RST()
			want := s.story(l)
			want.States[tcpstate.Established] = 2
			want.States[tcpstate.CloseWait] = 3
			want.Inbound = Queues{ReceiveBytes: 3, ReceiveMaxBytes: 1}
			want.Listeners[0].AcceptQueue = 6
			want.Listeners[0].Took.Connections = 6
			want.Happened.inbound(6).
				took(3, tcpstate.Established, tcpstate.CloseWait).
				took(1, tcpstate.Established, tcpstate.Close)
			want.Happened.ResetsReceived = 1
			s.Check(want)

			for range 6 {
				l.Accept()
			}
			want.Listeners[0].AcceptQueue = 0
			want.Listeners[0].Took.Accepts = 6
			s.Check(want)
		},
	},
	{
		Name: "SO_REUSEPORT_accepts", About: "of three sockets that share an address two accept",
		Play: func(s *Stage) {
			to := s.Next()
			var group []*Socket
			for range 3 {
				k := s.Socket().Option(unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
				group = append(group, k.Bind(to).Listen(5))
			}
			for i := range group {
				group[0].chooseInGroup(uint32(i))
				for range 3 {
					s.Peer().Connect(to)
				}
			}
			want := s.story(group...)
			want.States[tcpstate.Established] = 9
			want.Happened.inbound(9)
			for i := range group {
				want.Listeners[i].AcceptQueue = uint32(3 - i)
				want.Listeners[i].Took.Connections = 3
				want.Listeners[i].Took.Accepts = uint64(i)
				for range i {
					group[i].Accept()
				}
			}
			s.Check(want)
		},
	},
	{
		Name: "MPTCP", About: "an MPTCP listener accepts a TCP and an MPTCP client: counted are the TCP sockets that carry it",
		Play: func(s *Stage) {
			// A kernel without CONFIG_MPTCP does not have it, which
			// leaves the TCP client.
			listener, clients := s.Socket, []*Socket{s.Socket()}
			if s.hasMPTCP() {
				s.NS.Sysctl("net.mptcp.enabled", "1")
				listener, clients = s.mptcpSocket, append(clients, s.mptcpSocket())
			} else {
				s.Log("this kernel has no MPTCP")
			}
			l := listener().Bind(s.Next()).Listen(5)
			for _, c := range clients {
				c.Connect(l.Addr())
				l.Accept()
			}
			n := uint64(len(clients))
			want := s.story(l)
			want.States[tcpstate.Established] = 2 * n
			want.Listeners[0].Took.Connections = n
			want.Listeners[0].Took.Accepts = n
			want.Happened.outbound(n).inbound(n)
			s.Check(want)
		},
	},
}

// queued waits until that many connections wait for accept(), without a look
// into the kernel's tables.
func (k *Socket) queued(connections uint32) {
	k.s.Helper()
	for deadline := time.Now().Add(patience); ; {
		info, err := unix.GetsockoptTCPInfo(k.fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		switch {
		case err != nil:
			k.s.Fatalf("get TCP_INFO: %v", err)
		case info.Unacked == connections:
			return
		case time.Now().After(deadline):
			k.s.Fatalf("%d connections in the accept queue, want %d", info.Unacked, connections)
		}
	}
}

// hasMPTCP tells whether the namespace has the sysctl: since 5.6, where the
// kernel was built with it.
func (s *Stage) hasMPTCP() (has bool) {
	s.Helper()
	s.NS.Do(func() {
		_, err := os.Stat("/proc/sys/net/mptcp/enabled")
		has = err == nil
	})
	return has
}

func (s *Stage) mptcpSocket() (k *Socket) {
	s.Helper()
	s.NS.Do(func() {
		fd, err := unix.Socket(s.Family.domain(), unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_MPTCP)
		if err != nil {
			s.Fatalf("MPTCP socket: %v", err)
		}
		k = s.own(fd)
	})
	return k
}

// acceptOnThread calls accept(2), which waits, on a thread of its own. It
// returns when that thread sleeps; accepted then waits for the connection.
func (k *Socket) acceptOnThread() (accepted func() *Socket) {
	k.s.Helper()
	if err := unix.SetNonblock(k.fd, false); err != nil {
		k.s.Fatalf("make socket blocking: %v", err)
	}
	// A test that fails must not leave the thread behind.
	k.s.Cleanup(func() { _ = unix.Shutdown(k.fd, unix.SHUT_RD) })
	type result struct {
		fd  uintptr
		err unix.Errno
	}
	thread, done := make(chan int, 1), make(chan result, 1)
	listener := uintptr(k.fd)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		thread <- unix.Gettid()
		fd, _, err := unix.Syscall(unix.SYS_ACCEPT, listener, 0, 0)
		done <- result{fd, err}
	}()
	path := fmt.Sprintf("/proc/self/task/%d/syscall", <-thread)
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		// The number of the system call that it sleeps in, or "running".
		b, err := os.ReadFile(path)
		if err != nil {
			k.s.Fatal(err)
		}
		if strings.HasPrefix(string(b), fmt.Sprintf("%d ", unix.SYS_ACCEPT)) {
			break
		}
		if time.Now().After(deadline) {
			k.s.Fatalf("accept() does not wait: the thread is in system call %s", b)
		}
	}
	return func() *Socket {
		k.s.Helper()
		select {
		case r := <-done:
			if r.err != 0 {
				k.s.Fatalf("accept: %v", r.err)
			}
			return k.s.own(int(r.fd))
		case <-time.After(patience):
			k.s.Fatal("waited for accept() in vain")
			return nil
		}
	}
}

// What is used of io_uring (include/uapi/linux/io_uring.h, 5.5+).
const (
	ringOffSQ       = 0          // IORING_OFF_SQ_RING
	ringOffCQ       = 0x8000000  // IORING_OFF_CQ_RING
	ringOffSQEs     = 0x10000000 // IORING_OFF_SQES
	ringOpAccept    = 13         // IORING_OP_ACCEPT
	ringGetEvents   = 1          // IORING_ENTER_GETEVENTS
	sizeofRingEntry = 64         // struct io_uring_sqe
	sizeofRingEvent = 16         // struct io_uring_cqe
)

// ringParams is struct io_uring_params.
type ringParams struct {
	sqEntries, cqEntries uint32
	_                    [8]uint32 // flags, sq_thread_cpu and _idle, features, wq_fd, resv
	sq                   struct {  // struct io_sqring_offsets
		head, tail, mask, entries, flags, dropped, array uint32
		_                                                [3]uint32
	}
	cq struct { // struct io_cqring_offsets
		head, tail, mask, entries, overflow, events, flags uint32
		_                                                  [3]uint32
	}
}

// acceptByRing takes n connections out of the accept queue, in which they are,
// by io_uring.
func (k *Socket) acceptByRing(n int) {
	k.s.Helper()
	var params ringParams
	r, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, uintptr(n), uintptr(unsafe.Pointer(&params)), 0)
	if errno != 0 {
		k.s.Fatalf("io_uring_setup: %v (io_uring has to be allowed here: sysctl kernel.io_uring_disabled=0, no seccomp filter against it)", errno)
	}
	ring := int(r)
	defer unix.Close(ring)
	area := func(offset int64, bytes uint32) []byte {
		b, err := unix.Mmap(ring, offset, int(bytes), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			k.s.Fatalf("map io_uring: %v", err)
		}
		k.s.Cleanup(func() { _ = unix.Munmap(b) })
		return b
	}
	submissions := area(ringOffSQ, params.sq.array+4*params.sqEntries)
	entries := area(ringOffSQEs, sizeofRingEntry*params.sqEntries)
	completions := area(ringOffCQ, params.cq.events+sizeofRingEvent*params.cqEntries)

	for i := range n {
		e := entries[sizeofRingEntry*i:]
		e[0] = ringOpAccept
		binary.NativeEndian.PutUint32(e[4:], uint32(k.fd))
		binary.NativeEndian.PutUint32(e[28:], unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
		binary.NativeEndian.PutUint32(submissions[params.sq.array+4*uint32(i):], uint32(i))
	}
	word := func(b []byte, offset uint32) *uint32 { return (*uint32)(unsafe.Pointer(&b[offset])) }
	atomic.StoreUint32(word(submissions, params.sq.tail), uint32(n))
	_, _, errno = unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(ring), uintptr(n), uintptr(n), ringGetEvents, 0, 0)
	if errno != 0 {
		k.s.Fatalf("io_uring_enter: %v", errno)
	}
	if got := atomic.LoadUint32(word(completions, params.cq.tail)); got != uint32(n) {
		k.s.Fatalf("io_uring completed %d of %d", got, n)
	}
	for i := range n {
		event := completions[int(params.cq.events)+sizeofRingEvent*i:]
		result := int32(binary.NativeEndian.Uint32(event[8:]))
		if result < 0 {
			k.s.Fatalf("accept by io_uring: %v", unix.Errno(-result))
		}
		k.s.own(int(result))
	}
}
