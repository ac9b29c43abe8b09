package sockdiag

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"sockq/probes/tcpstate"
)

// message encodes a struct nlmsghdr with its padded body.
func message(typ, flags uint16, seq, pid uint32, body []byte) []byte {
	b := binary.NativeEndian.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+len(body)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = binary.NativeEndian.AppendUint16(b, flags)
	b = binary.NativeEndian.AppendUint32(b, seq)
	b = binary.NativeEndian.AppendUint32(b, pid)
	b = append(b, body...)
	return append(b, make([]byte, align(len(b))-len(b))...)
}

// errnoBody is what NLMSG_ERROR and a failed NLMSG_DONE begin with.
func errnoBody(e unix.Errno) []byte {
	return binary.NativeEndian.AppendUint32(nil, uint32(-int32(e)))
}

func attribute(typ uint16, payload []byte) []byte {
	b := binary.NativeEndian.AppendUint16(nil, uint16(unix.SizeofNlAttr+len(payload)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = append(b, payload...)
	return append(b, make([]byte, align(len(b))-len(b))...)
}

// diagMsg encodes s as struct inet_diag_msg.
func diagMsg(s Socket) []byte {
	b := []byte{s.Family, byte(s.State), byte(s.Timer), s.Retransmits}
	b = binary.BigEndian.AppendUint16(b, s.Local.Port())
	b = binary.BigEndian.AppendUint16(b, s.Remote.Port())
	for _, a := range []netip.Addr{s.Local.Addr(), s.Remote.Addr()} {
		b = append(b, a.AsSlice()...)
		b = append(b, make([]byte, 16-len(a.AsSlice()))...)
	}
	for _, v := range []uint32{
		s.Interface, uint32(s.Cookie), uint32(s.Cookie >> 32), uint32(s.Expires / time.Millisecond),
		s.receiveQueue, s.sendQueue, s.UID, s.Inode,
	} {
		b = binary.NativeEndian.AppendUint32(b, v)
	}
	return append(b, s.attributes...)
}

func TestParseMessage(t *testing.T) {
	full := message(20, 2, 3, 4, []byte("hello"))
	for _, tt := range []struct {
		name       string
		in         []byte
		h          header
		body, rest string
		err        error
	}{
		{name: "one", in: full, h: header{20, 2, 3, 4}, body: "hello"},
		{name: "two", in: append(bytes.Clone(full), "next"...), h: header{20, 2, 3, 4}, body: "hello", rest: "next"},
		{name: "last without padding", in: full[:21], h: header{20, 2, 3, 4}, body: "hello"},
		{name: "no body", in: message(3, 2, 1, 1, nil), h: header{3, 2, 1, 1}},
		{name: "empty", in: nil, err: errShortMessage},
		{name: "short header", in: full[:15], err: errShortMessage},
		{name: "short body", in: full[:20], err: errMessageLength},
		{name: "length 0", in: make([]byte, 16), err: errMessageLength},
		{name: "length 15", in: append([]byte{15, 0, 0, 0}, make([]byte, 12)...), err: errMessageLength},
		{name: "length of all ones", in: append([]byte{255, 255, 255, 255}, make([]byte, 12)...), err: errMessageLength},
	} {
		h, body, rest, err := parseMessage(tt.in)
		if h != tt.h || string(body) != tt.body || string(rest) != tt.rest || !errors.Is(err, tt.err) {
			t.Errorf("%s: %+v %q %q %v", tt.name, h, body, rest, err)
		}
	}
}

func TestParseErrno(t *testing.T) {
	for _, tt := range []struct {
		in  []byte
		out unix.Errno
		ok  bool
	}{
		{[]byte{0, 0, 0, 0}, 0, true},
		{errnoBody(unix.ENOENT), unix.ENOENT, true},
		{append(errnoBody(unix.EBUSY), 1, 2, 3), unix.EBUSY, true},
		{nil, 0, false},
		{[]byte{1, 2, 3}, 0, false},
		{binary.NativeEndian.AppendUint32(nil, 5), 0, false},
		{binary.NativeEndian.AppendUint32(nil, 1<<31), 0, false},
	} {
		if got, err := parseErrno(tt.in); got != tt.out || (err == nil) != tt.ok {
			t.Errorf("%v: %v, %v", tt.in, got, err)
		}
	}
}

// fixture is a message that a kernel sent: testdata/*.hex, comments after #.
func fixture(t testing.TB, name string) []byte {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", name+".hex"))
	if err != nil {
		t.Fatal(err)
	}
	var digits strings.Builder
	for line := range strings.Lines(string(text)) {
		line, _, _ = strings.Cut(line, "#")
		digits.WriteString(strings.Join(strings.Fields(line), ""))
	}
	b, err := hex.DecodeString(digits.String())
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestParseSocket(t *testing.T) {
	v4 := Socket{
		Family: unix.AF_INET, State: tcpstate.Listen,
		Local: netip.MustParseAddrPort("127.0.0.1:80"), Remote: netip.MustParseAddrPort("0.0.0.0:0"),
		Interface: 7, Cookie: 0x123456789abcdef0, UID: 1000, Inode: 4242, receiveQueue: 2, sendQueue: 1,
		attributes: attribute(attrShutdown, []byte{0}),
	}
	v6 := Socket{
		Family: unix.AF_INET6, State: tcpstate.FinWait2, Timer: TimerTimeWait, Retransmits: 3, Expires: 59999 * time.Millisecond,
		Local: netip.MustParseAddrPort("[2001:db8::1]:65535"), Remote: netip.MustParseAddrPort("[::ffff:10.0.0.1]:1"),
		Cookie: 1, attributes: []byte{},
	}
	for _, want := range []Socket{v4, v6} {
		b := diagMsg(want)
		var got Socket
		if err := parseSocket(b, &got); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got, compareSockets[0], compareSockets[2]); diff != "" {
			t.Errorf("socket (-want +got):\n%s", diff)
		}
		for n := range sizeofMsg {
			if err := parseSocket(b[:n], &got); !errors.Is(err, errShortSocket) {
				t.Fatalf("%d bytes: %v", n, err)
			}
		}
	}
	b := diagMsg(v4)
	b[0] = unix.AF_UNIX
	if err := parseSocket(b, new(Socket)); err == nil {
		t.Error("a socket of AF_UNIX was taken")
	}
}

// The accessors decide by state, timer and attributes which queue there is.
func TestQueues(t *testing.T) {
	const none, accept, bytes = 0, 1, 2
	full := attribute(attrShutdown, []byte{0})
	mark := attribute(15, []byte{1, 0, 0, 0})
	for _, tt := range []struct {
		name     string
		s        Socket
		want     int
		request  bool
		timeWait bool
	}{
		{"listener", Socket{State: tcpstate.Listen, attributes: full}, accept, false, false},
		{"connection", Socket{State: tcpstate.Established, attributes: full}, bytes, false, false},
		{"connection that retransmits", Socket{State: tcpstate.Established, Timer: TimerRetransmit, attributes: full}, bytes, false, false},
		{"half-closed", Socket{State: tcpstate.FinWait2, Timer: TimerKeepalive, attributes: full}, bytes, false, false},
		{"orphan", Socket{State: tcpstate.FinWait2, Timer: TimerTimeWait, attributes: mark}, none, false, true},
		{"time-wait", Socket{State: tcpstate.TimeWait, Timer: TimerTimeWait}, none, false, true},
		{"request", Socket{State: tcpstate.SynRecv, Timer: TimerRetransmit}, none, true, false},
		{"request with mark", Socket{State: tcpstate.SynRecv, Timer: TimerRetransmit, attributes: mark}, none, true, false},
		{"fast open child", Socket{State: tcpstate.SynRecv, Timer: TimerRetransmit, attributes: append(mark, full...)}, bytes, false, false},
		{"bound", Socket{State: tcpstate.Close, attributes: full}, bytes, false, false},
	} {
		tt.s.receiveQueue, tt.s.sendQueue = 3, 4
		got := none
		if a, b, ok := tt.s.AcceptQueue(); ok {
			got |= accept
			if a != 3 || b != 4 {
				t.Errorf("%s: accept queue %d, %d", tt.name, a, b)
			}
		} else if a != 0 || b != 0 {
			t.Errorf("%s: no accept queue, yet %d, %d", tt.name, a, b)
		}
		if a, b, ok := tt.s.ByteQueues(); ok {
			got |= bytes
			if a != 3 || b != 4 {
				t.Errorf("%s: byte queues %d, %d", tt.name, a, b)
			}
		} else if a != 0 || b != 0 {
			t.Errorf("%s: no byte queues, yet %d, %d", tt.name, a, b)
		}
		if got != tt.want || tt.s.Request() != tt.request || tt.s.TimeWait() != tt.timeWait {
			t.Errorf("%s: queues %d, request %t, time-wait %t", tt.name, got, tt.s.Request(), tt.s.TimeWait())
		}
	}
}

func TestFindAttribute(t *testing.T) {
	one, two := attribute(1, []byte("a")), attribute(2, []byte("bcdef"))
	nested := attribute(unix.NLA_F_NESTED|3, []byte("n"))
	all := bytes.Join([][]byte{one, two, attribute(2, []byte("second")), nested}, nil)
	for _, tt := range []struct {
		name string
		in   []byte
		typ  uint16
		out  string
		ok   bool
	}{
		{"first", all, 1, "a", true},
		{"second", all, 2, "bcdef", true},
		{"flags", all, 3, "n", true},
		{"absent", all, 4, "", false},
		{"none", nil, 1, "", false},
		{"last without padding", one[:5], 1, "a", true},
		{"header only", attribute(1, nil), 1, "", true},
		{"short header", one[:3], 1, "", false},
		{"short payload", two[:8], 2, "", false},
		{"length 3", []byte{3, 0, 1, 0}, 1, "", false},
		{"behind a bad one", append([]byte{0, 0, 9, 0}, one...), 1, "", false},
	} {
		got, ok := findAttribute(tt.in, tt.typ)
		if string(got) != tt.out || ok != tt.ok {
			t.Errorf("%s: %q, %t, want %q, %t", tt.name, got, ok, tt.out, tt.ok)
		}
	}
}

// Attributes may be shorter than we know from older kernels, longer from newer.
func TestAttributeLengths(t *testing.T) {
	payload := make([]byte, 300)
	for i := range payload {
		payload[i] = byte(i + 1)
	}
	for _, tt := range []struct {
		name    string
		typ     uint16
		enough  int
		present func(*Socket) (any, bool)
	}{
		{"MEMINFO", attrMemInfo, 16, func(s *Socket) (any, bool) { return anyOf(s.MemInfo()) }},
		{"SKMEMINFO", attrSKMemInfo, 36, func(s *Socket) (any, bool) { return anyOf(s.SKMemInfo()) }},
		{"CGROUP_ID", attrCgroupID, 8, func(s *Socket) (any, bool) { return anyOf(s.CgroupID()) }},
		{"SKV6ONLY", attrSKV6Only, 1, func(s *Socket) (any, bool) { return anyOf(s.V6Only()) }},
	} {
		exact, ok := tt.present(&Socket{attributes: attribute(tt.typ, payload[:tt.enough])})
		if !ok {
			t.Errorf("%s: %d bytes are not enough", tt.name, tt.enough)
		}
		longer, ok := tt.present(&Socket{attributes: attribute(tt.typ, payload)})
		if !ok || longer != exact {
			t.Errorf("%s: %v with more bytes, %v without", tt.name, longer, exact)
		}
		for n := range tt.enough {
			if v, ok := tt.present(&Socket{attributes: attribute(tt.typ, payload[:n])}); ok {
				t.Errorf("%s: %v from %d bytes", tt.name, v, n)
			}
		}
	}
	m, _ := (&Socket{attributes: attribute(attrSKMemInfo, payload)}).SKMemInfo()
	if want := uint32(0x24232221); m.Drops != want {
		t.Errorf("drops %#x, want %#x", m.Drops, want)
	}
}

func anyOf[T any](v T, ok bool) (any, bool) { return v, ok }

func TestCongestionControl(t *testing.T) {
	for in, want := range map[string]string{"bbr\x00": "bbr", "cubic": "cubic", "": "", "\x00x": ""} {
		got, ok := (&Socket{attributes: attribute(attrCong, []byte(in))}).CongestionControl()
		if got != want || !ok {
			t.Errorf("%q: %q, %t", in, got, ok)
		}
	}
}

// Every offset, against the struct that x/sys generates from the kernel's header.
func TestTCPInfoOffsets(t *testing.T) {
	var raw unix.TCPInfo
	b := unsafe.Slice((*byte)(unsafe.Pointer(&raw)), unsafe.Sizeof(raw))
	for i := range b {
		b[i] = byte(i*37 + 11)
	}
	b[6], b[7] = 0xa7, 0b101
	us := func(v uint32) time.Duration { return time.Duration(v) * time.Microsecond }
	ms := func(v uint32) time.Duration { return time.Duration(v) * time.Millisecond }
	us64 := func(v uint64) time.Duration { return time.Duration(v) * time.Microsecond }
	want := TCPInfo{
		Size: len(b), State: raw.State, CAState: raw.Ca_state, Retransmits: raw.Retransmits, Probes: raw.Probes,
		Backoff: raw.Backoff, Options: raw.Options,
		SndWscale: 7, RcvWscale: 10, DeliveryRateAppLimited: true, FastopenClientFail: 2,
		RTO: us(raw.Rto), ATO: us(raw.Ato), SndMSS: raw.Snd_mss, RcvMSS: raw.Rcv_mss,
		Unacked: raw.Unacked, Sacked: raw.Sacked, Lost: raw.Lost, Retrans: raw.Retrans, Fackets: raw.Fackets,
		LastDataSent: ms(raw.Last_data_sent), LastAckSent: ms(raw.Last_ack_sent),
		LastDataRecv: ms(raw.Last_data_recv), LastAck: ms(raw.Last_ack_recv),
		PMTU: raw.Pmtu, RcvSsthresh: raw.Rcv_ssthresh, RTT: us(raw.Rtt), RTTVar: us(raw.Rttvar),
		SndSsthresh: raw.Snd_ssthresh, SndCwnd: raw.Snd_cwnd, Advmss: raw.Advmss, Reordering: raw.Reordering,
		RcvRTT: us(raw.Rcv_rtt), RcvSpace: raw.Rcv_space, TotalRetrans: raw.Total_retrans,
		PacingRate: raw.Pacing_rate, MaxPacingRate: raw.Max_pacing_rate,
		BytesAcked: raw.Bytes_acked, BytesReceived: raw.Bytes_received, SegsOut: raw.Segs_out, SegsIn: raw.Segs_in,
		NotsentBytes: raw.Notsent_bytes, MinRTT: us(raw.Min_rtt), DataSegsIn: raw.Data_segs_in, DataSegsOut: raw.Data_segs_out,
		DeliveryRate: raw.Delivery_rate, BusyTime: us64(raw.Busy_time), RwndLimited: us64(raw.Rwnd_limited),
		SndbufLimited: us64(raw.Sndbuf_limited), Delivered: raw.Delivered, DeliveredCE: raw.Delivered_ce,
		BytesSent: raw.Bytes_sent, BytesRetrans: raw.Bytes_retrans, DsackDups: raw.Dsack_dups, ReordSeen: raw.Reord_seen,
		RcvOoopack: raw.Rcv_ooopack, SndWnd: raw.Snd_wnd, RcvWnd: raw.Rcv_wnd, Rehash: raw.Rehash,
		TotalRTO: raw.Total_rto, TotalRTORecoveries: raw.Total_rto_recoveries, TotalRTOTime: ms(raw.Total_rto_time),
	}
	if diff := cmp.Diff(want, parseTCPInfo(b)); diff != "" {
		t.Errorf("TCP_INFO (-want +got):\n%s", diff)
	}

	// A newer kernel's is longer; an older one's ends earlier, even amid a field.
	newer := parseTCPInfo(append(bytes.Clone(b), 1, 2, 3, 4))
	newer.Size -= 4
	if newer != want {
		t.Error("a longer TCP_INFO is read differently")
	}
	older := parseTCPInfo(b[:138])
	if older.Size != 138 || older.BytesReceived != want.BytesReceived || older.SegsOut != 0 || older.TotalRTOTime != 0 {
		t.Errorf("TCP_INFO of 138 bytes: %+v", older)
	}
	for n := range len(b) {
		info, ok := (&Socket{attributes: attribute(attrInfo, b[:n])}).TCPInfo()
		if ok != (n >= minTCPInfo) || (!ok && info != TCPInfo{}) {
			t.Fatalf("TCP_INFO of %d bytes: %t", n, ok)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, name := range []string{"listener", "connection", "timewait", "request"} {
		b := fixture(f, name)
		f.Add(b)
		f.Add(b[:len(b)-1])
		f.Add(append(bytes.Clone(b), b...))
	}
	f.Add(message(unix.NLMSG_DONE, 2, 1, 1, nil))
	f.Add(message(unix.NLMSG_ERROR, 0, 1, 1, []byte{0xfe, 0xff, 0xff, 0xff}))
	f.Add([]byte{255, 255, 255, 255, 20, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		for len(b) > 0 {
			h, body, rest, err := parseMessage(b)
			if err != nil {
				return
			}
			if len(rest) >= len(b) || len(body) > len(b)-unix.SizeofNlMsghdr {
				t.Fatalf("%d bytes became %d and %d", len(b), len(body), len(rest))
			}
			b = rest
			if errno, err := parseErrno(body); err == nil && errno > 4095 {
				t.Fatalf("error number %d", errno)
			}
			var s Socket
			if parseSocket(body, &s) != nil {
				continue
			}
			// What is decoded encodes to the same again, but for the
			// unused part of IPv4 addresses.
			if s.Family == unix.AF_INET6 && !bytes.Equal(diagMsg(s), body) {
				t.Fatalf("message type %d: %+v is not %x", h.typ, s, body)
			}
			_, _, accept := s.AcceptQueue()
			_, _, bytes := s.ByteQueues()
			if accept && bytes || (s.Request() || s.TimeWait()) && bytes {
				t.Fatalf("queues of %+v", s)
			}
			s.MemInfo()
			s.SKMemInfo()
			s.TCPInfo()
			s.CongestionControl()
			s.CgroupID()
			s.V6Only()
			_ = s.Timer.String()
		}
	})
}
