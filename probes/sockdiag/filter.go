package sockdiag

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// Filter is a condition that the kernel checks for each socket before it
// writes it into the dump (INET_DIAG_REQ_BYTECODE). It saves the copying, not
// the walk. The zero Filter matches everything.
type Filter struct {
	// code accepts by running to its end and refuses by jumping four bytes
	// past it.
	code []byte
	err  error
}

// Conditions (include/uapi/linux/inet_diag.h).
const (
	bcJmp     = 1 // INET_DIAG_BC_JMP
	bcSCond   = 7 // INET_DIAG_BC_S_COND
	bcDCond   = 8 // INET_DIAG_BC_D_COND
	bcDevCond = 9 // INET_DIAG_BC_DEV_COND

	sizeofOp = 4 // struct inet_diag_bc_op
	// maxCode bounds a filter well below the 16 bits of its jumps.
	maxCode = 32 << 10
)

var (
	errFilterPrefix = errors.New("invalid address prefix")
	errFilterLength = errors.New("too many conditions")
)

// LocalPort matches sockets with that local port.
func LocalPort(port uint16) Filter {
	return hostCondition(bcSCond, unix.AF_UNSPEC, 0, int32(port), nil)
}

// RemotePort matches sockets with that remote port.
func RemotePort(port uint16) Filter {
	return hostCondition(bcDCond, unix.AF_UNSPEC, 0, int32(port), nil)
}

// LocalPrefix matches sockets whose local address is in p. An IPv4 prefix also
// matches the v4-mapped addresses of IPv6 sockets.
func LocalPrefix(p netip.Prefix) Filter { return prefixCondition(bcSCond, p) }

// RemotePrefix matches sockets whose remote address is in p, as LocalPrefix.
func RemotePrefix(p netip.Prefix) Filter { return prefixCondition(bcDCond, p) }

// Device matches sockets that are bound to the device with that index, those
// bound to none for 0.
func Device(index uint32) Filter {
	code := binary.NativeEndian.AppendUint32(op(bcDevCond, 8, 8+sizeofOp), index)
	return Filter{code: code}
}

// And matches what all of fs match, everything if there are none.
func And(fs ...Filter) Filter {
	var all Filter
	for _, f := range fs {
		all = all.and(f)
	}
	return all
}

// Or matches what any of fs matches, nothing if there are none.
func Or(fs ...Filter) Filter {
	if len(fs) == 0 {
		return Not(Filter{})
	}
	// From the right, so that the length of what is jumped over is known.
	some := fs[len(fs)-1]
	for _, f := range slices.Backward(fs[:len(fs)-1]) {
		some = f.or(some)
	}
	return some
}

// Not matches what f does not match.
func Not(f Filter) Filter {
	// Accepting f runs into the jump, which refuses; refusing it jumps over
	// the jump to the end, which accepts.
	return f.append(op(bcJmp, sizeofOp, 2*sizeofOp), nil)
}

func (f Filter) and(g Filter) Filter {
	code := slices.Clone(f.code)
	// Where f jumped past its own end it now has to jump past g's.
	for i := 0; i < len(code); i += int(code[i+1]) {
		no := binary.NativeEndian.Uint16(code[i+2:])
		if i+int(no) > len(code) {
			binary.NativeEndian.PutUint16(code[i+2:], no+uint16(len(g.code)))
		}
	}
	return Filter{code: code, err: f.err}.append(g.code, g.err)
}

func (f Filter) or(g Filter) Filter {
	jump := op(bcJmp, sizeofOp, uint16(sizeofOp+len(g.code)))
	return f.append(jump, nil).append(g.code, g.err)
}

func (f Filter) append(code []byte, err error) Filter {
	switch {
	case f.err != nil:
		return f
	case err != nil:
		return Filter{err: err}
	case len(f.code)+len(code) > maxCode:
		return Filter{err: errFilterLength}
	}
	return Filter{code: slices.Concat(f.code, code)}
}

func prefixCondition(code byte, p netip.Prefix) Filter {
	if !p.IsValid() {
		return Filter{err: errFilterPrefix}
	}
	addr, bits := p.Addr(), p.Bits()
	if addr.Is4In6() && bits >= 96 {
		addr, bits = addr.Unmap(), bits-96
	}
	family := byte(unix.AF_INET)
	if addr.Is6() {
		family = unix.AF_INET6
	}
	return hostCondition(code, family, byte(bits), -1, addr.AsSlice())
}

// hostCondition is one struct inet_diag_hostcond; port -1 matches any.
func hostCondition(code, family, bits byte, port int32, addr []byte) Filter {
	length := sizeofOp + 8 + len(addr)
	b := op(code, byte(length), uint16(length+sizeofOp))
	b = append(b, family, bits, 0, 0)
	b = binary.NativeEndian.AppendUint32(b, uint32(port))
	return Filter{code: append(b, addr...)}
}

// op is a struct inet_diag_bc_op: yes is its own length with its arguments, no
// how far it jumps if the condition does not hold (a jump's never does).
func op(code, yes byte, no uint16) []byte {
	return binary.NativeEndian.AppendUint16([]byte{code, yes}, no)
}
