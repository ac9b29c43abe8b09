package sockdiag

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"

	"sockq/probes/tcpstate"
)

// Query says which sockets a dump lists and what it tells about each.
type Query struct {
	// Family is unix.AF_INET, unix.AF_INET6 or unix.AF_UNSPEC, which is both
	// in one walk over the kernel's tables where two dumps take two.
	Family uint8
	// States are those to list, tcpstate.MaskAll for zero. SYN_RECV includes
	// half-open requests. A kernel before 6.8 ignores BOUND_INACTIVE, see
	// BoundInactiveSupported.
	States tcpstate.Mask
	// Extensions are the attributes to ask for. Each makes a dump dearer.
	Extensions Extension
	// Filter is applied in the kernel. The empty Filter filters nothing.
	Filter Filter
	// Repeats allows a socket to come more than once, which happens only if
	// sockets change during the dump. Then no cookies are kept: a seventh of
	// the CPU time, and all memory that grows with the sockets.
	Repeats bool
}

// Extension is a set of attributes that the kernel adds to full sockets on
// request (idiag_ext: bit 1<<(INET_DIAG_*-1)). Requests, time-waits and bound
// sockets get fewer or none.
type Extension uint8

// The extensions, named after INET_DIAG_* (include/uapi/linux/inet_diag.h).
const (
	ExtMemInfo   Extension = 1 << 0 // INET_DIAG_MEMINFO: Socket.MemInfo
	ExtInfo      Extension = 1 << 1 // INET_DIAG_INFO: Socket.TCPInfo
	ExtCong      Extension = 1 << 3 // INET_DIAG_CONG: Socket.CongestionControl
	ExtSKMemInfo Extension = 1 << 6 // INET_DIAG_SKMEMINFO: Socket.SKMemInfo
)

// Request types and sizes (include/uapi/linux/inet_diag.h).
const (
	tcpdiagGetsock = 18 // TCPDIAG_GETSOCK
	sizeofReq      = 60 // struct inet_diag_req
	sizeofReqV2    = 56 // struct inet_diag_req_v2
	reqBytecode    = 1  // INET_DIAG_REQ_BYTECODE
)

// request encodes q as the body of a message of type TCPDIAG_GETSOCK or
// SOCK_DIAG_BY_FAMILY.
//
// SOCK_DIAG_BY_FAMILY takes one family. The older TCPDIAG_GETSOCK ignores its
// family and dumps AF_UNSPEC (inet_diag_dump_compat), with the same states,
// extensions, bytecode and answers.
func (q Query) request(typ uint16, family uint8) ([]byte, error) {
	if q.Filter.err != nil {
		return nil, fmt.Errorf("filter: %w", q.Filter.err)
	}
	states := q.States
	if states == 0 {
		states = tcpstate.MaskAll
	}
	var b []byte
	switch typ {
	case tcpdiagGetsock:
		b = make([]byte, sizeofReq)
		b[0] = unix.AF_INET
		b[3] = byte(q.Extensions)
		binary.NativeEndian.PutUint32(b[52:], uint32(states))
	case unix.SOCK_DIAG_BY_FAMILY:
		b = make([]byte, sizeofReqV2)
		b[0] = family
		b[1] = unix.IPPROTO_TCP
		b[2] = byte(q.Extensions)
		binary.NativeEndian.PutUint32(b[4:], uint32(states))
	}
	if code := q.Filter.code; len(code) > 0 {
		b = binary.NativeEndian.AppendUint16(b, uint16(unix.SizeofNlAttr+len(code)))
		b = binary.NativeEndian.AppendUint16(b, reqBytecode)
		b = append(b, code...)
	}
	return b, nil
}
