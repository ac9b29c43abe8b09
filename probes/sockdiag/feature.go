package sockdiag

import (
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"

	"sockq/probes/tcpstate"
)

// BoundInactiveSupported tells whether this kernel lists sockets that are
// bound, but neither listening nor connected (TCPF_BOUND_INACTIVE, 6.8+). It
// tries, in the calling thread's network namespace: it binds a socket and looks
// for it. That costs a dump; the answer is the same until the next boot.
func BoundInactiveSupported() (bool, error) {
	// Both sockets have to be in the same namespace.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return false, fmt.Errorf("create socket: %w", err)
	}
	defer unix.Close(fd)
	// 127.0.0.1 cannot be had where lo is down.
	if err := unix.Bind(fd, &unix.SockaddrInet4{}); err != nil {
		return false, fmt.Errorf("bind socket: %w", err)
	}
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
	if err != nil {
		return false, fmt.Errorf("get socket cookie: %w", err)
	}

	c, err := Dial()
	if err != nil {
		return false, err
	}
	defer c.Close()
	supported := false
	err = c.Dump(Query{Family: unix.AF_INET, States: tcpstate.MaskBound}, func(s *Socket) error {
		supported = supported || s.Cookie == cookie
		return nil
	})
	return supported, err
}
