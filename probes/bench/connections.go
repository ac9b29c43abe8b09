package main

import (
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// connections makes connections over loopback on its namespace's thread, which
// is client and server: nothing sleeps, and the handshake takes place in the
// softirq at the end of connect().
type connections struct {
	n        *namespace
	listener uintptr
	twin     uintptr
	to       unix.RawSockaddrInet4
}

// transitions is how often inet_sock_set_state fires for a connection that the
// client closes first.
const transitions = 10

func openConnections(n *namespace) (*connections, error) {
	c := &connections{n: n, to: unix.RawSockaddrInet4{Family: unix.AF_INET, Port: 7 << 8, Addr: [4]byte{127, 0, 4, 1}}} // port 7, in network order
	err := n.do(func() error {
		// No TIME_WAIT outlives its connection: they would pile up, and the
		// next connection would look for a port among them.
		if err := os.WriteFile("/proc/sys/net/ipv4/tcp_max_tw_buckets", []byte("0"), 0); err != nil {
			return err
		}
		listener, err := openListener(unix.SockaddrInet4{Port: 7, Addr: c.to.Addr})
		if err != nil {
			return err
		}
		twin, err := openListener(unix.SockaddrInet4{Port: 8, Addr: c.to.Addr})
		c.listener, c.twin = uintptr(listener), uintptr(twin)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("listen for connections: %w", err)
	}
	return c, nil
}

func (c *connections) close() {
	unix.Close(int(c.listener))
	unix.Close(int(c.twin))
}

// make makes connections one after the other. The client closes first, the
// server at once after it.
func (c *connections) make(count int) error { return c.repeat(count, false) }

// reset makes connections that the client ends with a RST.
func (c *connections) reset(count int) error { return c.repeat(count, true) }

func (c *connections) repeat(count int, reset bool) error {
	for range count {
		if err := c.one(reset); err != nil {
			return fmt.Errorf("connection over loopback: %w", err)
		}
	}
	return nil
}

// one asks the kernel directly: the runtime's care for calls that might sleep
// would be a part of what is measured.
func (c *connections) one(reset bool) error {
	client, _, errno := unix.RawSyscall(unix.SYS_SOCKET, unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if errno != 0 {
		return errno
	}
	err := c.connect(client, reset)
	var server uintptr
	if err == nil {
		server, _, errno = unix.RawSyscall6(unix.SYS_ACCEPT4, c.listener, 0, 0, unix.SOCK_CLOEXEC, 0, 0)
	}
	_, _, _ = unix.RawSyscall(unix.SYS_CLOSE, client, 0, 0)
	if err != nil {
		return err
	}
	if errno != 0 {
		return errno
	}
	_, _, _ = unix.RawSyscall(unix.SYS_CLOSE, server, 0, 0)
	return nil
}

func (c *connections) connect(client uintptr, reset bool) error {
	if reset {
		if err := unix.SetsockoptLinger(int(client), unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
			return err
		}
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_CONNECT, client, uintptr(unsafe.Pointer(&c.to)), unix.SizeofSockaddrInet4); errno != 0 {
		return errno
	}
	return nil
}

// listen makes the listener's twin stop and listen again: little work for two
// transitions.
func (c *connections) listen(count int) error {
	for range count {
		if _, _, errno := unix.RawSyscall(unix.SYS_SHUTDOWN, c.twin, unix.SHUT_RD, 0); errno != 0 {
			return errno
		}
		if _, _, errno := unix.RawSyscall(unix.SYS_LISTEN, c.twin, 1, 0); errno != 0 {
			return errno
		}
	}
	return nil
}
