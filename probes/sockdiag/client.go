package sockdiag

import (
	"bytes"
	"errors"
	"fmt"
	"syscall"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

const (
	// The kernel fills at most 32 KiB at a time for a reader that has room
	// for it (netlink_dump).
	bufferSize  = 64 << 10
	readTimeout = 10 * time.Second
	// MaxList is how many sockets List collects at most.
	MaxList = 1 << 18
)

var (
	// ErrUnavailable says that the kernel cannot dump TCP sockets, because
	// inet_diag or tcp_diag is missing.
	ErrUnavailable = errors.New("the kernel has no sock_diag for TCP: load the modules inet_diag and tcp_diag (modprobe tcp_diag)")
	// ErrInterrupted says that the kernel marked a dump as inconsistent
	// (NLM_F_DUMP_INTR), after all its sockets were handed out. No kernel up
	// to 7.3 does that for TCP.
	ErrInterrupted = errors.New("dump interrupted: result is inconsistent")
	// ErrTooManySockets says that List found more than MaxList sockets.
	ErrTooManySockets = errors.New("too many sockets for a list")

	errBusy = errors.New("client is in use")
)

// Client is a netlink socket for dumps of TCP sockets, with its buffers. It is
// for one goroutine at a time.
//
// It keeps 64 KiB to read into and 11 to 21 bytes for each socket of the
// largest recent dump, for the cookies; that is given back by the second dump
// that needs less than an eighth of it.
type Client struct {
	conn    *netlink.Conn
	raw     syscall.RawConn
	recv    func(fd uintptr) bool // receive as a value, made once
	timeout time.Duration

	busy        bool
	twoDumps    bool // the kernel refuses TCPDIAG_GETSOCK
	unfinished  bool // a dump is under way whose end was not read
	interrupted bool
	seq, pid    uint32 // of the dump
	seen        cookieSet
	socket      Socket

	// The last datagram: its sender and size, the part not parsed yet.
	buf, rest []byte
	n         int
	errno     unix.Errno
	from      unix.RawSockaddrNetlink
}

// Dial opens a client in the network namespace of the calling thread, in which
// it stays: a caller that has changed its namespace needs
// runtime.LockOSThread. No privilege is needed; without CAP_NET_ADMIN in that
// namespace the kernel only leaves out what Socket does not show.
func Dial() (*Client, error) {
	conn, err := netlink.Dial(unix.NETLINK_SOCK_DIAG, nil)
	if err != nil {
		if errors.Is(err, unix.EPROTONOSUPPORT) {
			err = fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
		return nil, fmt.Errorf("dial sock_diag: %w", err)
	}
	c, err := newClient(conn)
	if err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("dial sock_diag: %w", err)
	}
	return c, nil
}

func newClient(conn *netlink.Conn) (*Client, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	c := &Client{
		conn:    conn,
		raw:     raw,
		timeout: readTimeout,
		buf:     make([]byte, bufferSize),
	}
	c.recv = c.receive
	return c, nil
}

// Close closes the socket. A dump that is under way fails.
func (c *Client) Close() error { return c.conn.Close() }

// Dump calls fn for each socket that q asks for, each cookie once. The Socket
// is valid only during the call. Nothing is allocated per socket.
//
// An error of fn ends the dump and is returned as it is. The client stays
// usable; the next dump first reads what the kernel still has of the old one,
// which costs as much as finishing it.
//
// More than six million sockets in one dump exceed the memory for cookies;
// then a few may come twice.
//
// It fails with ErrUnavailable if the kernel lacks sock_diag for TCP.
func (c *Client) Dump(q Query, fn func(*Socket) error) error {
	if c.busy {
		return fmt.Errorf("dump sockets: %w", errBusy)
	}
	c.busy = true
	defer func() { c.busy = false }()

	c.seen.reset()
	switch q.Family {
	case unix.AF_INET, unix.AF_INET6:
		return c.dump(q, unix.SOCK_DIAG_BY_FAMILY, q.Family, fn)
	case unix.AF_UNSPEC:
	default:
		return fmt.Errorf("dump sockets: address family %d: %w", q.Family, unix.EAFNOSUPPORT)
	}
	if !c.twoDumps {
		err := c.dump(q, tcpdiagGetsock, unix.AF_UNSPEC, fn)
		if !errors.Is(err, errNoCompat) {
			return err
		}
	}
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		if err := c.dump(q, unix.SOCK_DIAG_BY_FAMILY, family, fn); err != nil {
			return err
		}
	}
	c.twoDumps = true
	return nil
}

// List collects a dump. It fails with ErrTooManySockets, and the first MaxList
// sockets, if there are more: use Dump then.
func (c *Client) List(q Query) ([]Socket, error) {
	var list []Socket
	err := c.Dump(q, func(s *Socket) error {
		if len(list) == MaxList {
			return ErrTooManySockets
		}
		list = append(list, *s)
		list[len(list)-1].attributes = bytes.Clone(s.attributes)
		return nil
	})
	return list, err
}
