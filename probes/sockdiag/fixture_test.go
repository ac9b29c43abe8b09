package sockdiag

import (
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"sockq/probes/tcpstate"
)

// What a kernel sent, beside what it means.
func TestFixtures(t *testing.T) {
	type attributes struct {
		SKMemInfo  *SKMemInfo
		MemInfo    *MemInfo
		BytesIn    uint64
		Info       bool
		Congestion string
		Cgroup     uint64
		V6Only     bool
		Request    bool
	}
	for _, tt := range []struct {
		name       string
		socket     Socket
		attributes attributes
	}{
		{
			"listener",
			Socket{
				Family: unix.AF_INET6, State: tcpstate.Listen,
				Local: netip.MustParseAddrPort("[::1]:8080"), Remote: netip.MustParseAddrPort("[::]:0"),
				Cookie: 51, Inode: 27120, receiveQueue: 1, sendQueue: 1,
			},
			attributes{
				SKMemInfo: &SKMemInfo{Rcvbuf: 131072, Sndbuf: 16384}, MemInfo: &MemInfo{},
				Info: true, Congestion: "bbr", Cgroup: 1, V6Only: true,
			},
		},
		{
			"connection",
			Socket{
				Family: unix.AF_INET6, State: tcpstate.Established,
				Local: netip.MustParseAddrPort("[::1]:8080"), Remote: netip.MustParseAddrPort("[::1]:37566"),
				Cookie: 52, Inode: 27122, receiveQueue: 5,
			},
			attributes{
				SKMemInfo: &SKMemInfo{RmemAlloc: 837, Rcvbuf: 131072, Sndbuf: 3939840, FwdAlloc: 3259},
				MemInfo:   &MemInfo{Rmem: 837, Fmem: 3259},
				BytesIn:   5, Info: true, Congestion: "bbr", Cgroup: 1,
			},
		},
		{
			"request",
			Socket{
				Family: unix.AF_INET, State: tcpstate.SynRecv, Timer: TimerRetransmit, Expires: 996 * time.Millisecond,
				Local: netip.MustParseAddrPort("127.0.0.1:8081"), Remote: netip.MustParseAddrPort("127.0.0.1:55256"),
				Cookie: 56,
			},
			attributes{Request: true},
		},
		{
			"timewait",
			Socket{
				Family: unix.AF_INET, State: tcpstate.FinWait2, Timer: TimerTimeWait, Expires: time.Minute,
				Local: netip.MustParseAddrPort("127.0.0.1:52674"), Remote: netip.MustParseAddrPort("127.0.0.1:8082"),
				Cookie: 4127,
			},
			attributes{},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h, body, rest, err := parseMessage(fixture(t, tt.name))
			if err != nil || len(rest) != 0 || h != (header{typ: tcpdiagGetsock, flags: unix.NLM_F_MULTI, seq: 1, pid: 1}) {
				t.Fatalf("message: %+v, %d bytes left, %v", h, len(rest), err)
			}
			var s Socket
			if err := parseSocket(body, &s); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.socket, s, compareSockets...); diff != "" {
				t.Errorf("socket (-want +got):\n%s", diff)
			}
			var got attributes
			if m, ok := s.SKMemInfo(); ok {
				got.SKMemInfo = &m
			}
			if m, ok := s.MemInfo(); ok {
				got.MemInfo = &m
			}
			info, ok := s.TCPInfo()
			got.BytesIn, got.Info = info.BytesReceived, ok && info.Size == 280
			got.Congestion, _ = s.CongestionControl()
			got.Cgroup, _ = s.CgroupID()
			got.V6Only, _ = s.V6Only()
			got.Request = s.Request()
			if diff := cmp.Diff(tt.attributes, got); diff != "" {
				t.Errorf("attributes (-want +got):\n%s", diff)
			}
		})
	}
}
