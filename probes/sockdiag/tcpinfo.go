package sockdiag

import (
	"encoding/binary"
	"time"
)

// TCPInfo is struct tcp_info (include/uapi/linux/tcp.h). Kernels append to it:
// Size tells how much this one filled in, everything after that is 0.
type TCPInfo struct {
	Size int // bytes; 6.18 has 280

	State, CAState               uint8
	Retransmits, Probes, Backoff uint8
	Options                      uint8 // TCPI_OPT_*
	SndWscale, RcvWscale         uint8
	DeliveryRateAppLimited       bool
	FastopenClientFail           uint8

	RTO, ATO       time.Duration
	SndMSS, RcvMSS uint32
	// Unacked and Sacked are counts of segments; of a listener the accept
	// queue and its limit, as Socket.AcceptQueue.
	Unacked, Sacked, Lost, Retrans, Fackets          uint32
	LastDataSent, LastAckSent, LastDataRecv, LastAck time.Duration // since
	PMTU, RcvSsthresh                                uint32
	RTT, RTTVar                                      time.Duration
	SndSsthresh, SndCwnd, Advmss, Reordering         uint32
	RcvRTT                                           time.Duration
	RcvSpace, TotalRetrans                           uint32

	PacingRate, MaxPacingRate            uint64 // bytes a second, all ones for no limit
	BytesAcked, BytesReceived            uint64
	SegsOut, SegsIn                      uint32
	NotsentBytes                         uint32
	MinRTT                               time.Duration
	DataSegsIn, DataSegsOut              uint32
	DeliveryRate                         uint64 // bytes a second
	BusyTime, RwndLimited, SndbufLimited time.Duration
	Delivered, DeliveredCE               uint32
	BytesSent, BytesRetrans              uint64
	DsackDups, ReordSeen                 uint32
	RcvOoopack, SndWnd                   uint32
	RcvWnd, Rehash                       uint32 // 6.2+
	TotalRTO, TotalRTORecoveries         uint16 // 6.7+, as what follows
	TotalRTOTime                         time.Duration
}

// minTCPInfo is struct tcp_info up to tcpi_total_retrans, which every kernel
// has.
const minTCPInfo = 104

// TCPInfo needs ExtInfo and a full socket that is not just bound.
func (s *Socket) TCPInfo() (TCPInfo, bool) {
	b, ok := s.attribute(attrInfo)
	if !ok || len(b) < minTCPInfo {
		return TCPInfo{}, false
	}
	return parseTCPInfo(b), true
}

func parseTCPInfo(b []byte) TCPInfo {
	u32 := func(offset int) uint32 {
		if len(b) < offset+4 {
			return 0
		}
		return binary.NativeEndian.Uint32(b[offset:])
	}
	u64 := func(offset int) uint64 {
		if len(b) < offset+8 {
			return 0
		}
		return binary.NativeEndian.Uint64(b[offset:])
	}
	u16 := func(offset int) uint16 {
		if len(b) < offset+2 {
			return 0
		}
		return binary.NativeEndian.Uint16(b[offset:])
	}
	ms := func(offset int) time.Duration { return time.Duration(u32(offset)) * time.Millisecond }
	us := func(offset int) time.Duration { return time.Duration(u32(offset)) * time.Microsecond }
	us64 := func(offset int) time.Duration { return time.Duration(u64(offset)) * time.Microsecond }

	return TCPInfo{
		Size:        len(b),
		State:       b[0],
		CAState:     b[1],
		Retransmits: b[2],
		Probes:      b[3],
		Backoff:     b[4],
		Options:     b[5],
		// Bit-fields, as little-endian machines have them.
		SndWscale:              b[6] & 0xf,
		RcvWscale:              b[6] >> 4,
		DeliveryRateAppLimited: b[7]&1 != 0,
		FastopenClientFail:     b[7] >> 1 & 3,

		RTO:          us(8),
		ATO:          us(12),
		SndMSS:       u32(16),
		RcvMSS:       u32(20),
		Unacked:      u32(24),
		Sacked:       u32(28),
		Lost:         u32(32),
		Retrans:      u32(36),
		Fackets:      u32(40),
		LastDataSent: ms(44),
		LastAckSent:  ms(48),
		LastDataRecv: ms(52),
		LastAck:      ms(56),
		PMTU:         u32(60),
		RcvSsthresh:  u32(64),
		RTT:          us(68),
		RTTVar:       us(72),
		SndSsthresh:  u32(76),
		SndCwnd:      u32(80),
		Advmss:       u32(84),
		Reordering:   u32(88),
		RcvRTT:       us(92),
		RcvSpace:     u32(96),
		TotalRetrans: u32(100),

		PacingRate:         u64(104),
		MaxPacingRate:      u64(112),
		BytesAcked:         u64(120),
		BytesReceived:      u64(128),
		SegsOut:            u32(136),
		SegsIn:             u32(140),
		NotsentBytes:       u32(144),
		MinRTT:             us(148),
		DataSegsIn:         u32(152),
		DataSegsOut:        u32(156),
		DeliveryRate:       u64(160),
		BusyTime:           us64(168),
		RwndLimited:        us64(176),
		SndbufLimited:      us64(184),
		Delivered:          u32(192),
		DeliveredCE:        u32(196),
		BytesSent:          u64(200),
		BytesRetrans:       u64(208),
		DsackDups:          u32(216),
		ReordSeen:          u32(220),
		RcvOoopack:         u32(224),
		SndWnd:             u32(228),
		RcvWnd:             u32(232),
		Rehash:             u32(236),
		TotalRTO:           u16(240),
		TotalRTORecoveries: u16(242),
		TotalRTOTime:       ms(244),
	}
}
