package sockdiag

import (
	"bytes"
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// nlaTypeMask leaves out NLA_F_NESTED and NLA_F_NET_BYTEORDER.
const nlaTypeMask = 1<<14 - 1

// Attributes of a reply (INET_DIAG_*, include/uapi/linux/inet_diag.h).
const (
	attrMemInfo   = 1
	attrInfo      = 2
	attrCong      = 4
	attrSKMemInfo = 7
	attrShutdown  = 8
	attrSKV6Only  = 11
	attrCgroupID  = 21
)

// findAttribute is the payload of the first attribute of that type in b. It
// stops where the attributes are malformed.
func findAttribute(b []byte, typ uint16) ([]byte, bool) {
	for len(b) >= unix.SizeofNlAttr {
		length := int(binary.NativeEndian.Uint16(b))
		if length < unix.SizeofNlAttr || length > len(b) {
			return nil, false
		}
		if binary.NativeEndian.Uint16(b[2:])&nlaTypeMask == typ {
			return b[unix.SizeofNlAttr:length], true
		}
		b = b[min(align(length), len(b)):]
	}
	return nil, false
}

// attribute finds an attribute of s.
func (s *Socket) attribute(typ uint16) ([]byte, bool) { return findAttribute(s.attributes, typ) }

// MemInfo is struct inet_diag_meminfo, in bytes.
type MemInfo struct {
	Rmem uint32 // memory of the receive queue (sk_rmem_alloc)
	Wmem uint32 // memory of the send queue (sk_wmem_queued)
	Fmem uint32 // allocated ahead (sk_forward_alloc)
	Tmem uint32 // memory on its way through the network stack (sk_wmem_alloc)
}

// MemInfo needs ExtMemInfo and a full socket.
func (s *Socket) MemInfo() (MemInfo, bool) {
	b, ok := s.attribute(attrMemInfo)
	if !ok || len(b) < 16 {
		return MemInfo{}, false
	}
	u32 := binary.NativeEndian.Uint32
	return MemInfo{Rmem: u32(b), Wmem: u32(b[4:]), Fmem: u32(b[8:]), Tmem: u32(b[12:])}, true
}

// SKMemInfo is SK_MEMINFO_* (sk_get_meminfo), in bytes but for Drops.
type SKMemInfo struct {
	RmemAlloc  uint32
	Rcvbuf     uint32
	WmemAlloc  uint32
	Sndbuf     uint32
	FwdAlloc   uint32
	WmemQueued uint32
	Optmem     uint32
	Backlog    uint32
	// Drops is sk_drops, which wraps at 2^32: for a listener the SYNs and
	// ACKs that it refused and more (a duplicate SYN, a RST, a deferred ACK),
	// so it is not ListenDrops.
	Drops uint32
}

// SKMemInfo needs ExtSKMemInfo and a full socket.
func (s *Socket) SKMemInfo() (SKMemInfo, bool) {
	b, ok := s.attribute(attrSKMemInfo)
	if !ok || len(b) < 36 {
		return SKMemInfo{}, false
	}
	u32 := binary.NativeEndian.Uint32
	return SKMemInfo{
		RmemAlloc:  u32(b),
		Rcvbuf:     u32(b[4:]),
		WmemAlloc:  u32(b[8:]),
		Sndbuf:     u32(b[12:]),
		FwdAlloc:   u32(b[16:]),
		WmemQueued: u32(b[20:]),
		Optmem:     u32(b[24:]),
		Backlog:    u32(b[28:]),
		Drops:      u32(b[32:]),
	}, true
}

// CongestionControl is the name of the congestion control of a full socket. It
// needs ExtCong.
func (s *Socket) CongestionControl() (string, bool) {
	b, ok := s.attribute(attrCong)
	if !ok {
		return "", false
	}
	name, _, _ := bytes.Cut(b, []byte{0})
	return string(name), true
}

// CgroupID is the id of the cgroup (v2) in which a full socket was made, the
// inode number of the cgroup's directory (in 5.10, not in 5.4; without being
// asked for).
func (s *Socket) CgroupID() (uint64, bool) {
	b, ok := s.attribute(attrCgroupID)
	if !ok || len(b) < 8 {
		return 0, false
	}
	return binary.NativeEndian.Uint64(b), true
}

// V6Only tells whether a listening or bound IPv6 socket refuses IPv4 (without
// being asked for). ok is false for all others.
func (s *Socket) V6Only() (v6only, ok bool) {
	b, ok := s.attribute(attrSKV6Only)
	if !ok || len(b) < 1 {
		return false, false
	}
	return b[0] != 0, true
}
