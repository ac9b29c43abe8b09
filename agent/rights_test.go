package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sockq/probes/scenario"
	"sockq/probes/tcpstate"
	"sockq/probes/tracker"
)

// The stories by what they are told with on a kernel without trampolines.
var (
	byTracepoints = []string{
		tracker.StoryTransitions, tracker.StoryStateSeconds, tracker.StoryConnects, tracker.StoryConnections,
		tracker.StoryIgnoredACKs, tracker.StorySynackRetransmits, tracker.StoryResetsSent, tracker.StoryResetsReceived,
	}
	bySyscalls        = []string{tracker.StoryAccepts, tracker.StoryBacklog, tracker.StoryUnroutable}
	beyondTracepoints = []string{tracker.StoryRefusals, tracker.StoryHalfOpen, tracker.StoryTimeWait}
)

// told are the series that name a mechanism for each story, untold those that say
// that there is none.
func told(mechanism string, stories []string) map[string]float64 {
	series := make(map[string]float64)
	for _, name := range stories {
		series[fmt.Sprintf("sockq_probe_attached{mechanism=%q,probe=%q}", mechanism, name)] = 1
	}
	return series
}

func untold(stories []string) map[string]float64 {
	series := told("none", stories)
	for s := range series {
		series[s] = 0
	}
	return series
}

// lacks tells that nothing is shown under these names, not even 0.
func (p *process) lacks(prefixes ...string) {
	p.t.Helper()
	got := p.metrics()
	for _, series := range slices.Sorted(maps.Keys(got)) {
		for _, prefix := range prefixes {
			if strings.HasPrefix(series, prefix) {
				p.t.Errorf("%s is shown: %v", series, got[series])
			}
		}
	}
}

// What each story shows.
var (
	shownByTracepoints = []string{
		"sockq_tcp_transitions", "sockq_tcp_unexpected", "sockq_tcp_state_seconds", "sockq_tcp_connect", "sockq_listener_connections_total",
		"sockq_listener_drops", "sockq_listener_synack", "sockq_tcp_resets",
	}
	shownBySyscalls = []string{
		"sockq_listener_accepts", "sockq_listener_last_accept", "sockq_listener_accept_wait", "sockq_listener_backlog_requested",
	}
	shownBeyond = []string{
		"sockq_listener_syns", "sockq_listener_syn_cookies", "sockq_listener_half_open", "sockq_listener_handshake", "sockq_listener_abandoned",
		`sockq_audit_difference{check="listen_`, `sockq_audit_checks_total{check="listen_`, `sockq_audit_checks_total{check="syn_`,
	}
)

// probesDoc is a snapshot's list of probes.
type probesDoc struct{ Probes []probeDoc }

func (p *process) snapshot() (doc probesDoc) {
	p.t.Helper()
	resp, err := http.Get(p.url + pathSnapshot)
	if err != nil {
		p.t.Fatal(err)
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(&doc); err != nil {
		p.t.Fatal(err)
	}
	return doc
}

// lackBecause tells that the stories are not told, for a reason that says why.
func (p *process) lackBecause(stories []string, why string) {
	p.t.Helper()
	doc := p.snapshot()
	for _, name := range stories {
		i := slices.IndexFunc(doc.Probes, func(d probeDoc) bool { return d.Name == name })
		if i < 0 || doc.Probes[i].Attached || !strings.Contains(doc.Probes[i].Reason, why) {
			p.t.Errorf("%s is not missing because of %q: %+v", name, why, doc.Probes)
		}
	}
}

// warnings are the lines of the log that warn.
func (p *process) warnings() (lines []string) {
	for line := range strings.Lines(p.log.String()) {
		if strings.Contains(line, "level=WARN") || strings.Contains(line, "level=ERROR") {
			lines = append(lines, line)
		}
	}
	return lines
}

// happenings makes something happen of everything that is tracked, in a namespace
// of its own, and returns what there is to see of it with tracepoints, and with
// system calls.
func happenings(t *testing.T) (tracepoints, syscalls map[string]float64) {
	t.Helper()
	s := scenario.NewStage(t, scenario.IPv4)
	s.NS.Sysctl("net.ipv4.tcp_synack_retries", "1")
	full, quick := s.Listen(1), s.Listen(100)

	s.Peer().Connect(full.Addr())
	second, third := s.Peer().SYN(full.Addr()), s.Peer().SYN(full.Addr())
	second.AwaitSYNACK()
	third.AwaitSYNACK()
	second.ACK()
	third.ACK() // finds no place; the SYN-ACK will be sent again

	client := s.Connect(quick.Addr())
	server := quick.Accept()
	client.Close()
	server.Await(tcpstate.CloseWait)
	server.Close()

	nobody := s.Next()
	for range 3 {
		s.Begin(nobody).Fails(unix.ECONNREFUSED)
	}
	s.Socket().CannotConnect(netip.MustParseAddrPort("198.51.100.1:80"), unix.ENETUNREACH)

	// How often is the kernel's affair: a timer that is late sends it less often.
	var again uint64
	for end := time.Now().Add(10 * time.Second); again == 0; time.Sleep(50 * time.Millisecond) {
		if again = s.NS.Netstat()["TCPSynRetrans"]; time.Now().After(end) {
			t.Fatal("the kernel does not send the SYN-ACK again")
		}
	}
	netns := label(s.NS)
	tracepoints = map[string]float64{
		"sockq_listener_connections_total" + at(s.NS, full):                                                                   2,
		"sockq_listener_connections_total" + at(s.NS, quick):                                                                  1,
		fmt.Sprintf("sockq_listener_drops_total{address=%q,netns=%q,reason=%q}", full.Addr(), netns, "accept_queue_full_ack"): 1,
		"sockq_listener_synack_retransmits_total" + at(s.NS, full):                                                            float64(again),
		"sockq_listener_synack_retransmits_total" + at(s.NS, quick):                                                           0,
		fmt.Sprintf("sockq_tcp_connect_seconds_count{netns=%q}", netns):                                                       1,
		fmt.Sprintf("sockq_tcp_connect_failures_total{error=%q,netns=%q}", "refused", netns):                                  3,
		fmt.Sprintf("sockq_tcp_resets_sent_total{netns=%q,reason=%q}", netns, "no_socket"):                                    3,
		fmt.Sprintf("sockq_tcp_resets_received_total{netns=%q}", netns):                                                       3,
	}
	for path, n := range map[string]float64{
		"CLOSE LISTEN": 2, "CLOSE SYN_SENT": 4, "SYN_SENT CLOSE": 3, "SYN_SENT ESTABLISHED": 1,
		"LISTEN SYN_RECV": 3, "SYN_RECV ESTABLISHED": 3, "ESTABLISHED FIN_WAIT1": 1, "FIN_WAIT1 FIN_WAIT2": 1,
		"ESTABLISHED CLOSE_WAIT": 1, "CLOSE_WAIT LAST_ACK": 1, "LAST_ACK CLOSE": 1,
	} {
		from, to, _ := strings.Cut(path, " ")
		tracepoints[fmt.Sprintf("sockq_tcp_transitions_total{from=%q,netns=%q,to=%q}", from, netns, to)] = n
	}
	for state, n := range map[tcpstate.State]float64{
		tcpstate.SynSent: 4, tcpstate.Established: 2, tcpstate.FinWait1: 1, tcpstate.CloseWait: 1, tcpstate.LastAck: 1,
	} {
		tracepoints[fmt.Sprintf("sockq_tcp_state_seconds_count{netns=%q,state=%q}", netns, state)] = n
	}
	syscalls = map[string]float64{
		"sockq_listener_accepts_total" + at(s.NS, full):                                              0,
		"sockq_listener_accepts_total" + at(s.NS, quick):                                             1,
		"sockq_listener_accept_wait_seconds_count" + at(s.NS, quick):                                 1,
		"sockq_listener_backlog_requested" + at(s.NS, full):                                          1,
		"sockq_listener_backlog_requested" + at(s.NS, quick):                                         100,
		fmt.Sprintf("sockq_tcp_connect_failures_total{error=%q,netns=%q}", "net_unreachable", netns): 1,
	}
	return tracepoints, syscalls
}

// Two capabilities are enough for all namespaces and their events, but for what
// system calls return: that needs tracefs, and the right to read there.
func TestRights(t *testing.T) {
	ns, want := scenario.Mixed.Hold(t, scenario.IPv4)
	walk := `sockq_probe_attached{mechanism="bpf_walk",probe="sockets"}`
	diag := `sockq_probe_attached{mechanism="sock_diag",probe="sockets"}`
	tier, err := tracker.FindTier("/sys")
	if err != nil {
		t.Fatal(err)
	}

	for name, test := range map[string]struct {
		tracefs tracefs
		more    []uintptr
		missing string // of what system calls return; "" for nothing
	}{
		"tracefs mounted":                        {mounted, nil, "needs root or CAP_DAC_READ_SEARCH"},
		"tracefs mounted, DAC_READ_SEARCH":       {mounted, []uintptr{unix.CAP_DAC_READ_SEARCH}, ""},
		"no tracefs":                             {notMounted, nil, "mount it on /sys/kernel/tracing, or give sockq CAP_SYS_ADMIN"},
		"no tracefs, DAC_READ_SEARCH":            {notMounted, []uintptr{unix.CAP_DAC_READ_SEARCH}, "mount it on /sys/kernel/tracing, or give sockq CAP_SYS_ADMIN"},
		"no tracefs, SYS_ADMIN":                  {notMounted, []uintptr{unix.CAP_SYS_ADMIN}, "needs root or CAP_DAC_READ_SEARCH"},
		"no tracefs, SYS_ADMIN, DAC_READ_SEARCH": {notMounted, []uintptr{unix.CAP_SYS_ADMIN, unix.CAP_DAC_READ_SEARCH}, ""},
	} {
		t.Run("BPF and PERFMON/"+name, func(t *testing.T) {
			t.Parallel()
			who := as{nobody: true, capabilities: append([]uintptr{unix.CAP_BPF, unix.CAP_PERFMON}, test.more...), tracefs: test.tracefs}
			p := launch(t, who, "--states.per-netns")
			p.shows(states(ns, want.States))
			p.shows(map[string]float64{walk: 1})
			p.shows(told("tp_btf", byTracepoints))
			tracepoints, syscalls := happenings(t)
			p.shows(tracepoints)
			if tier == tracker.TierC {
				p.shows(untold(beyondTracepoints))
				p.lacks(shownBeyond...)
			}
			if test.missing == "" {
				p.shows(told("tracepoint", bySyscalls))
				p.shows(syscalls)
			} else {
				p.shows(untold(bySyscalls))
				p.lacks(slices.AppendSeq(slices.Clone(shownBySyscalls), maps.Keys(syscalls))...)
				p.lackBecause(bySyscalls, test.missing)
			}
			if said := p.warnings(); len(said) > 0 {
				t.Errorf("the log warns: %q", said)
			}
		})
	}

	for name, without := range map[string]struct {
		capabilities []uintptr
		missing      string
	}{
		"none":    {nil, "CAP_BPF and CAP_PERFMON missing"},
		"BPF":     {[]uintptr{unix.CAP_BPF, unix.CAP_DAC_READ_SEARCH}, "CAP_PERFMON missing"},
		"PERFMON": {[]uintptr{unix.CAP_PERFMON, unix.CAP_DAC_READ_SEARCH}, "CAP_BPF missing"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := launch(t, as{nobody: true, capabilities: without.capabilities, tracefs: mounted})
			p.shows(map[string]float64{diag: 1})
			got := p.metrics()
			for series := range states(ns, want.States) {
				if _, there := got[series]; there {
					t.Errorf("%s is shown", series)
				}
			}
			if _, there := got[walk]; there {
				t.Error("the walk is shown as attached")
			}
			own := 0
			for series := range got {
				if strings.HasPrefix(series, "sockq_tcp_sockets{") {
					own++
				}
				if strings.HasPrefix(series, "sockq_listener_syn_queue_length") {
					t.Errorf("%s is shown, which sock_diag cannot tell", series)
				}
			}
			if own != len(tcpstate.All) {
				t.Errorf("%d series of states, want those of one namespace", own)
			}
			stories := slices.Concat(byTracepoints, bySyscalls, beyondTracepoints)
			p.shows(untold(stories))
			p.lacks(slices.Concat(shownByTracepoints, shownBySyscalls, shownBeyond)...)
			p.lackBecause(stories, without.missing)
			if said := p.warnings(); len(said) != 2 || !strings.Contains(said[0], without.missing) || !strings.Contains(said[1], "CAP_SYS_PTRACE") {
				t.Errorf("the log does not warn once of %q, and once of what it costs owners: %q", without.missing, said)
			}
		})
	}
}

// What is turned off is absent and named.
func TestTurnedOff(t *testing.T) {
	t.Run("tracker.syscalls", func(t *testing.T) {
		t.Parallel()
		p := launch(t, as{}, "--no-tracker.syscalls", "--states.per-netns")
		tracepoints, syscalls := happenings(t)
		p.shows(told("tp_btf", byTracepoints))
		p.shows(tracepoints)
		p.shows(untold(bySyscalls))
		p.lacks(slices.AppendSeq(slices.Clone(shownBySyscalls), maps.Keys(syscalls))...)
		p.lackBecause(bySyscalls, "turned off")
	})
	t.Run("states.seconds", func(t *testing.T) {
		t.Parallel()
		p := launch(t, as{}, "--no-states.seconds")
		tracepoints, syscalls := happenings(t)
		const seconds = "sockq_tcp_state_seconds"
		maps.DeleteFunc(tracepoints, func(series string, _ float64) bool { return strings.HasPrefix(series, seconds) })
		p.shows(tracepoints)
		p.shows(syscalls)
		off := []string{tracker.StoryStateSeconds}
		p.shows(untold(off))
		p.lacks(seconds)
		p.lackBecause(off, "turned off")
	})
}
