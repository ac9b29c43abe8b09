package sockdiag

import (
	"errors"
	"fmt"
	"os"
	"time"
	"unsafe"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// refusal is an error number with which the kernel ended a dump.
type refusal struct{ errno unix.Errno }

func (r refusal) Error() string { return r.errno.Error() }
func (r refusal) Unwrap() error { return r.errno }

var (
	errEnd = errors.New("end of dump")
	// errNoCompat never leaves the package.
	errNoCompat = errors.New("no TCPDIAG_GETSOCK")
)

// dump makes one request and hands out the answer.
func (c *Client) dump(q Query, typ uint16, family uint8, fn func(*Socket) error) error {
	body, err := q.request(typ, family)
	if err != nil {
		return fmt.Errorf("dump sockets: %w", err)
	}
	if err := c.drain(); err != nil {
		return fmt.Errorf("finish previous dump of sockets: %w", err)
	}
	m, err := c.conn.Send(netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(typ), Flags: netlink.Request | netlink.Dump},
		Data:   body,
	})
	if err != nil {
		return fmt.Errorf("request dump of sockets: %w", err)
	}
	c.seq, c.pid = m.Header.Sequence, m.Header.PID
	c.unfinished, c.interrupted = true, false

	for first := true; ; first = false {
		h, body, err := c.next()
		switch {
		case errors.Is(err, errEnd):
			if c.interrupted {
				return fmt.Errorf("dump sockets: %w", ErrInterrupted)
			}
			return nil
		case err != nil:
			if first && typ == tcpdiagGetsock && isUnknownRequest(err) {
				return errNoCompat
			}
			return fmt.Errorf("dump sockets: %w", explain(err))
		case h.typ != typ:
			continue
		}
		if err := parseSocket(body, &c.socket); err != nil {
			return fmt.Errorf("dump sockets: %w", err)
		}
		if !q.Repeats && !c.seen.add(c.socket.Cookie) {
			continue
		}
		if err := fn(&c.socket); err != nil {
			return err
		}
	}
}

// isUnknownRequest tells whether the kernel does not know the request
// (sock_diag_rcv_msg); EINVAL may also mean that it refused the filter.
func isUnknownRequest(err error) bool {
	var r refusal
	return errors.As(err, &r) && (r.errno == unix.EOPNOTSUPP || r.errno == unix.EINVAL)
}

// explain names what is missing behind a refusal: ENOENT says that no handler
// is registered for the family (inet_diag) or the protocol (tcp_diag).
func explain(err error) error {
	var r refusal
	if errors.As(err, &r) && r.errno == unix.ENOENT {
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return err
}

// drain reads what is left of a dump that was given up, because the kernel
// refuses another one meanwhile (EBUSY).
func (c *Client) drain() error {
	for c.unfinished {
		_, _, err := c.next()
		switch {
		case err == nil, errors.Is(err, errEnd), errors.As(err, new(refusal)), errors.As(err, new(malformed)):
		case errors.Is(err, os.ErrDeadlineExceeded):
			// Its end was in a datagram that was lost.
			c.unfinished = false
		default:
			return err
		}
	}
	return nil
}

// malformed is an error in what the kernel sent.
type malformed struct{ error }

func (m malformed) Unwrap() error { return m.error }

// next is the next message of the dump that is under way, errEnd after the last.
// Messages of others are skipped.
func (c *Client) next() (header, []byte, error) {
	for {
		for len(c.rest) > 0 {
			h, body, rest, err := parseMessage(c.rest)
			c.rest = rest
			if err != nil {
				return header{}, nil, malformed{err}
			}
			if h.seq != c.seq || h.pid != c.pid {
				continue
			}
			if h.flags&unix.NLM_F_DUMP_INTR != 0 {
				c.interrupted = true
			}
			switch h.typ {
			case unix.NLMSG_NOOP:
				continue
			case unix.NLMSG_OVERRUN:
				return header{}, nil, malformed{errNetlinkOverrun}
			case unix.NLMSG_ERROR, unix.NLMSG_DONE:
				c.rest = nil
				c.unfinished = false
				// A DONE without a number is a plain end.
				if h.typ == unix.NLMSG_DONE && len(body) == 0 {
					return header{}, nil, errEnd
				}
				errno, err := parseErrno(body)
				switch {
				case err != nil:
					return header{}, nil, malformed{err}
				case errno != 0:
					return header{}, nil, refusal{errno}
				}
				return header{}, nil, errEnd
			}
			return h, body, nil
		}
		if err := c.read(); err != nil {
			return header{}, nil, err
		}
	}
}

// read reads one datagram of the kernel into rest.
func (c *Client) read() error {
	c.rest = nil
	if err := c.conn.SetReadDeadline(time.Now().Add(c.timeout)); err != nil {
		return err
	}
	for {
		if err := c.raw.Read(c.recv); err != nil {
			return fmt.Errorf("receive: %w", err)
		}
		switch {
		case c.errno != 0:
			return fmt.Errorf("receive: %w", c.errno)
		case c.from.Pid != 0:
			// Whoever is root in this namespace can send to our socket.
			continue
		case c.n > len(c.buf):
			return malformed{fmt.Errorf("%w: %d bytes", errTruncated, c.n)}
		}
		c.rest = c.buf[:c.n]
		return nil
	}
}

// receive makes one recvfrom(2), for syscall.RawConn.Read: false waits until
// the socket is readable. unix.Recvfrom would allocate the sender's address.
func (c *Client) receive(fd uintptr) bool {
	for {
		size := uint32(unix.SizeofSockaddrNetlink)
		n, _, errno := unix.Syscall6(unix.SYS_RECVFROM, fd,
			uintptr(unsafe.Pointer(&c.buf[0])), uintptr(len(c.buf)),
			unix.MSG_DONTWAIT|unix.MSG_TRUNC,
			uintptr(unsafe.Pointer(&c.from)), uintptr(unsafe.Pointer(&size)))
		switch errno {
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			return false
		}
		c.n, c.errno = int(n), errno
		return true
	}
}
