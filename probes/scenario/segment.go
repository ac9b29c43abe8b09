package scenario

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Flags of a TCP segment (RFC 9293 section 3.1).
const (
	flagFIN = 1 << 0
	flagSYN = 1 << 1
	flagRST = 1 << 2
	flagACK = 1 << 4
)

// segment is a TCP segment without options.
type segment struct {
	from, to netip.AddrPort
	seq, ack uint32
	flags    byte
	window   uint16
	data     []byte
}

const (
	sizeofIPv4 = 20
	sizeofIPv6 = 40
	sizeofTCP  = 20
)

// packet is s with its IP header. The kernel fills in the checksum of IPv4's.
func (s segment) packet() []byte {
	b := make([]byte, 0, sizeofTCP+len(s.data))
	b = binary.BigEndian.AppendUint16(b, s.from.Port())
	b = binary.BigEndian.AppendUint16(b, s.to.Port())
	b = binary.BigEndian.AppendUint32(b, s.seq)
	b = binary.BigEndian.AppendUint32(b, s.ack)
	b = append(b, sizeofTCP/4<<4, s.flags)
	b = binary.BigEndian.AppendUint16(b, s.window)
	b = append(b, 0, 0, 0, 0) // checksum, urgent pointer
	b = append(b, s.data...)
	binary.BigEndian.PutUint16(b[16:], s.checksum(b))
	return packet(s.from.Addr(), s.to.Addr(), unix.IPPROTO_TCP, b)
}

// checksum is that of tcp, over the pseudo header and itself.
func (s segment) checksum(tcp []byte) uint16 {
	return checksum(pseudoHeader(s.from.Addr(), s.to.Addr(), unix.IPPROTO_TCP, len(tcp)), tcp)
}

// unreachable is the ICMP error that the address from sends about s (RFC 792,
// RFC 4443): destination unreachable, with that code.
func (s segment) unreachable(from netip.Addr, code byte) []byte {
	to := s.from.Addr()
	protocol, b := byte(unix.IPPROTO_ICMP), []byte{3, code, 0, 0, 0, 0, 0, 0}
	quoted := sizeofIPv4 + 8
	if to.Is6() {
		protocol, b[0], quoted = unix.IPPROTO_ICMPV6, 1, sizeofIPv6+8
	}
	b = append(b, s.packet()[:quoted]...)
	var pseudo []byte // which ICMP has for IPv6 only
	if to.Is6() {
		pseudo = pseudoHeader(from, to, protocol, len(b))
	}
	binary.BigEndian.PutUint16(b[2:], checksum(pseudo, b))
	return packet(from, to, protocol, b)
}

// packet puts an IP header before payload.
func packet(from, to netip.Addr, protocol byte, payload []byte) []byte {
	var b []byte
	if from.Is4() {
		b = make([]byte, sizeofIPv4, sizeofIPv4+len(payload))
		b[0] = 4<<4 | sizeofIPv4/4
		binary.BigEndian.PutUint16(b[2:], uint16(sizeofIPv4+len(payload)))
		b[8] = 64 // time to live
		b[9] = protocol
		copy(b[12:], from.AsSlice())
		copy(b[16:], to.AsSlice())
	} else {
		b = make([]byte, sizeofIPv6, sizeofIPv6+len(payload))
		b[0] = 6 << 4
		binary.BigEndian.PutUint16(b[4:], uint16(len(payload)))
		b[6] = protocol
		b[7] = 64 // hop limit
		copy(b[8:], from.AsSlice())
		copy(b[24:], to.AsSlice())
	}
	return append(b, payload...)
}

// pseudoHeader holds what a checksum covers besides the payload.
func pseudoHeader(from, to netip.Addr, protocol byte, length int) []byte {
	b := append(from.AsSlice(), to.AsSlice()...)
	return append(b, 0, protocol, byte(length>>8), byte(length))
}

// checksum is the one's complement of the sum over both.
func checksum(pseudo, payload []byte) uint16 {
	sum := uint32(0)
	for _, b := range [][]byte{pseudo, payload} {
		for ; len(b) >= 2; b = b[2:] {
			sum += uint32(binary.BigEndian.Uint16(b))
		}
		if len(b) == 1 {
			sum += uint32(b[0]) << 8
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// parseSegment reads an IP packet without extension headers. ok is false for
// what is no TCP segment.
func parseSegment(b []byte) (s segment, ok bool) {
	var from, to netip.Addr
	switch {
	case len(b) >= sizeofIPv4 && b[0]>>4 == 4 && b[9] == unix.IPPROTO_TCP:
		header, length := int(b[0]&0xf)*4, int(binary.BigEndian.Uint16(b[2:]))
		if header < sizeofIPv4 || length < header || length > len(b) {
			return segment{}, false
		}
		from, to = netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:]))
		b = b[header:length]
	case len(b) >= sizeofIPv6 && b[0]>>4 == 6 && b[6] == unix.IPPROTO_TCP:
		length := int(binary.BigEndian.Uint16(b[4:]))
		if length > len(b)-sizeofIPv6 {
			return segment{}, false
		}
		from, to = netip.AddrFrom16([16]byte(b[8:])), netip.AddrFrom16([16]byte(b[24:]))
		b = b[sizeofIPv6:][:length]
	default:
		return segment{}, false
	}
	if len(b) < sizeofTCP {
		return segment{}, false
	}
	header := int(b[12]>>4) * 4
	if header < sizeofTCP || header > len(b) {
		return segment{}, false
	}
	return segment{
		from:   netip.AddrPortFrom(from, binary.BigEndian.Uint16(b)),
		to:     netip.AddrPortFrom(to, binary.BigEndian.Uint16(b[2:])),
		seq:    binary.BigEndian.Uint32(b[4:]),
		ack:    binary.BigEndian.Uint32(b[8:]),
		flags:  b[13],
		window: binary.BigEndian.Uint16(b[14:]),
		data:   b[header:],
	}, true
}
