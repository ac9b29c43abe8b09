package sockdiag

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// header is a struct nlmsghdr without its length.
type header struct {
	typ, flags uint16
	seq, pid   uint32
}

var (
	errShortMessage   = errors.New("short netlink message")
	errMessageLength  = errors.New("netlink message length out of bounds")
	errShortError     = errors.New("short netlink error message")
	errTruncated      = errors.New("datagram truncated")
	errNetlinkOverrun = errors.New("netlink overrun")
)

// parseMessage splits the first netlink message off a datagram. rest is what
// follows it.
func parseMessage(b []byte) (h header, body, rest []byte, err error) {
	if len(b) < unix.SizeofNlMsghdr {
		return header{}, nil, nil, fmt.Errorf("%w: %d bytes", errShortMessage, len(b))
	}
	length := binary.NativeEndian.Uint32(b)
	if length < unix.SizeofNlMsghdr || uint64(length) > uint64(len(b)) {
		return header{}, nil, nil, fmt.Errorf("%w: %d of %d bytes", errMessageLength, length, len(b))
	}
	h = header{
		typ:   binary.NativeEndian.Uint16(b[4:]),
		flags: binary.NativeEndian.Uint16(b[6:]),
		seq:   binary.NativeEndian.Uint32(b[8:]),
		pid:   binary.NativeEndian.Uint32(b[12:]),
	}
	// The last message of a datagram need not be padded.
	next := min(align(int(length)), len(b))
	return h, b[unix.SizeofNlMsghdr:length], b[next:], nil
}

// align rounds up to NLMSG_ALIGNTO, which equals NLA_ALIGNTO.
func align(n int) int { return (n + 3) &^ 3 }

// parseErrno reads the negative error number with which NLMSG_ERROR and, where
// a dump failed on the way, NLMSG_DONE begin. 0 is success.
func parseErrno(body []byte) (unix.Errno, error) {
	if len(body) < 4 {
		return 0, fmt.Errorf("%w: %d bytes", errShortError, len(body))
	}
	n := int32(binary.NativeEndian.Uint32(body))
	if n > 0 || n < -4095 {
		return 0, fmt.Errorf("netlink error number %d out of bounds", n)
	}
	return unix.Errno(-n), nil
}
