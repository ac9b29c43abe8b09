package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sockq/probes"
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

// fakePrivileges are those that a test gives.
type fakePrivileges struct {
	id    int
	has   capabilities
	stuck error
	whole error // why no part of them can be switched off

	now, kept capabilities
}

func (f *fakePrivileges) uid() int                    { return f.id }
func (f *fakePrivileges) mayDrop() error              { return f.stuck }
func (f *fakePrivileges) held() (capabilities, error) { return f.has, nil }

func (f *fakePrivileges) with(only capabilities, fn func()) error {
	f.now = only
	fn()
	return f.whole
}

func (f *fakePrivileges) keep(only capabilities) error {
	f.kept = only
	return f.stuck
}

func setOf(list ...uintptr) (s capabilities) {
	for _, c := range list {
		s |= 1 << c
	}
	return s
}

// What is kept is what is needed and there; of what may do it, as little as does.
func TestWhichRightsAreKept(t *testing.T) {
	const bpf, admin, search, override, ptrace = unix.CAP_BPF, unix.CAP_SYS_ADMIN, unix.CAP_DAC_READ_SEARCH, unix.CAP_DAC_OVERRIDE, unix.CAP_SYS_PTRACE
	everything := setOf(bpf, admin, search, override, ptrace)
	own := new(fakePrivileges)
	worksWith := func(any ...uintptr) func() int { // works with one of them
		return func() int {
			if own.now&setOf(any...) == 0 {
				return 1
			}
			return 2
		}
	}
	for name, test := range map[string]struct {
		has   capabilities
		needs []probes.Need
		want  capabilities
	}{
		"nothing is needed": {everything, nil, 0},
		"nothing is there":  {0, []probes.Need{{Capability: admin}}, 0},
		"needed":            {everything, []probes.Need{{Capability: admin}}, setOf(admin)},
		"works without":     {everything, []probes.Need{{Capability: search, Try: func() int { return 1 }}}, 0},
		"works never":       {everything, []probes.Need{{Capability: search, Try: func() int { return 0 }}}, 0},
		"works with it":     {everything, []probes.Need{{Capability: search, Try: worksWith(search, override)}}, setOf(search)},
		"the smaller one": {everything, []probes.Need{
			{Capability: search, Try: worksWith(search, override)}, {Capability: override, Try: worksWith(search, override)}}, setOf(search)},
		"only the larger one": {everything, []probes.Need{
			{Capability: search, Try: worksWith(override)}, {Capability: override, Try: worksWith(override)}}, setOf(override)},
		"kept anyway": {everything, []probes.Need{
			{Capability: search, Try: worksWith(search, ptrace)}, {Capability: ptrace}}, setOf(ptrace)},
	} {
		t.Run(name, func(t *testing.T) {
			own.has = test.has
			got, err := findRights(own, test.needs)
			if err != nil || got.kept != test.want {
				t.Errorf("%b are kept (%v), want %b", got.kept, err, test.want)
			}
			var listed capabilities
			for _, r := range got.List {
				for _, use := range atStart {
					if use.name == r.Capability && r.Kept {
						listed |= setOf(uintptr(use.number))
					}
				}
			}
			if listed != test.want {
				t.Errorf("%b are shown as kept, want %b: %+v", listed, test.want, got.List)
			}
		})
	}
}

// Where what is needed cannot be found out, all is kept, and said; sockq runs.
func TestRightsThatCannotBeTried(t *testing.T) {
	own := &fakePrivileges{has: setOf(unix.CAP_SYS_ADMIN), whole: errors.New("switch capabilities off: it is forbidden")}
	needs := []probes.Need{{Capability: unix.CAP_SYS_ADMIN, Try: func() int { return 1 }}}
	got, err := findRights(own, needs)
	if err != nil || got.Stuck != own.whole.Error() {
		t.Errorf("stuck: %q, %v", got.Stuck, err)
	}
	var log bytes.Buffer
	dropRights(own, needs, slog.New(slog.NewTextHandler(&log, nil)))
	if want := "Rights are not given up\" reason=\"" + own.whole.Error(); !strings.Contains(log.String(), want) || own.kept != 0 {
		t.Errorf("the log says %s", log.String())
	}
}

// onAllThreads are what /proc says of each thread's rights.
func (p *process) onAllThreads(want map[string]string) {
	p.t.Helper()
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", p.cmd.Process.Pid))
	if err != nil || len(threads) < 2 {
		p.t.Fatalf("%d threads: %v", len(threads), err)
	}
	for _, thread := range threads {
		text, err := os.ReadFile(thread)
		if err != nil {
			continue // it ended
		}
		for line := range strings.Lines(string(text)) {
			name, value, _ := strings.Cut(line, ":")
			if v, ok := want[name]; ok && strings.TrimSpace(value) != v {
				p.t.Errorf("%s: %s is %s, want %s", thread, name, strings.TrimSpace(value), v)
			}
		}
	}
}

// What was only needed to attach is gone when the first request is answered, on all
// threads and for good.
func TestRightsAreGivenUp(t *testing.T) {
	const bpf, perfmon, admin, search, ptrace = unix.CAP_BPF, unix.CAP_PERFMON, unix.CAP_SYS_ADMIN, unix.CAP_DAC_READ_SEARCH, unix.CAP_SYS_PTRACE
	private := func(t *testing.T, name, text string) string { // that only its owner may read, who is neither root nor nobody
		dir := t.TempDir()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, path := range []string{path, dir} {
			if err := os.Chown(path, 4242, 4242); err != nil {
				t.Fatal(err)
			}
		}
		for ; dir != "/tmp" && dir != "/"; dir = filepath.Dir(dir) {
			if err := os.Chmod(dir, 0o711); err != nil {
				t.Fatal(err)
			}
		}
		return path
	}
	config := private(t, "web.yml", "http_server_config: {http2: false}\n")
	socket := filepath.Join(filepath.Dir(config), "cri.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	if err := errors.Join(os.Chmod(socket, 0o600), os.Chown(socket, 4242, 4242)); err != nil {
		t.Fatal(err)
	}
	with := func(more ...uintptr) as {
		return as{nobody: true, capabilities: append([]uintptr{bpf, perfmon}, more...)}
	}
	for name, test := range map[string]struct {
		who  as
		args []string
		kept capabilities
		said string
	}{
		"root":                             {as{}, nil, setOf(admin, ptrace), `kept="CAP_SYS_PTRACE, CAP_SYS_ADMIN" given_up="CAP_BPF, CAP_PERFMON, CAP_DAC_READ_SEARCH`},
		"root without an audit":            {as{}, []string{"--audit.budget=0"}, 0, `uid=0 kept=none`},
		"root by sock_diag":                {as{}, []string{"--census.mechanism=sock_diag"}, setOf(admin, ptrace, search), `kept="CAP_DAC_READ_SEARCH, CAP_SYS_PTRACE, CAP_SYS_ADMIN"`},
		"root with a stranger's socket":    {as{}, []string{"--audit.budget=0", "--cri.socket=" + socket}, setOf(unix.CAP_DAC_OVERRIDE), `kept=CAP_DAC_OVERRIDE`},
		"nobody":                           {as{nobody: true}, nil, 0, `uid=65534 kept=none given_up=none`},
		"nobody, BPF":                      {as{nobody: true, capabilities: []uintptr{bpf}}, nil, 0, `given_up=CAP_BPF`},
		"nobody, what is needed to attach": {with(search), nil, 0, `kept=none given_up="CAP_BPF, CAP_PERFMON, CAP_DAC_READ_SEARCH"`},
		"nobody, half of it":               {with(ptrace), nil, 0, `given_up="CAP_BPF, CAP_PERFMON, CAP_SYS_PTRACE"`},
		"nobody, what audits need":         {with(admin, ptrace), nil, setOf(admin, ptrace), `given_up="CAP_BPF, CAP_PERFMON"`},
		"nobody, and one more":             {with(unix.CAP_NET_ADMIN), nil, 0, `given_up="CAP_BPF, CAP_PERFMON, 1 others"`},
		"nobody with a private file":       {with(search), []string{"--web.config.file=" + config}, setOf(search), `kept=CAP_DAC_READ_SEARCH`},
		"nobody by another right":          {with(unix.CAP_DAC_OVERRIDE), []string{"--web.config.file=" + config}, setOf(unix.CAP_DAC_OVERRIDE), `kept=CAP_DAC_OVERRIDE`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := launch(t, test.who, test.args...)
			kept := fmt.Sprintf("%016x", uint64(test.kept))
			want := map[string]string{"CapPrm": kept, "CapEff": kept, "CapInh": "0000000000000000", "CapAmb": "0000000000000000", "NoNewPrivs": "1"}
			if !test.who.nobody { // who had CAP_SETPCAP
				want["CapBnd"] = "0000000000000000"
			}
			p.onAllThreads(want)
			if len(test.who.capabilities) > 0 { // nobody's other processes could trace it now
				// What may not be traced belongs to root (proc(5)).
				var descriptors unix.Stat_t
				if err := unix.Stat(fmt.Sprintf("/proc/%d/fd", p.cmd.Process.Pid), &descriptors); err != nil || descriptors.Uid != 0 {
					t.Errorf("its descriptors are open to uid %d, %v", descriptors.Uid, err)
				}
			}
			p.await("the log to say "+test.said, func() bool { return strings.Contains(p.log.String(), test.said) })
			_, doc := checkHere(t, test.who, test.args...)
			var shown capabilities
			for _, r := range doc.Rights.List {
				for _, use := range atStart {
					if use.name == r.Capability && r.Kept {
						shown |= setOf(uintptr(use.number))
					}
				}
			}
			if shown != test.kept || doc.Rights.Stuck != "" {
				t.Errorf("check shows %+v, want %b", doc.Rights, test.kept)
			}
			p.metrics()          // which are there
			p.onAllThreads(want) // also on threads that came since
		})
	}
}

// Namespaces that come after the start are seen, named and audited with what is left
// of root's rights.
func TestNamespacesAfterTheRightsWereGivenUp(t *testing.T) {
	for _, mechanism := range []string{"auto", "sock_diag"} {
		t.Run(mechanism, func(t *testing.T) {
			dir := t.TempDir()
			p := launch(t, as{}, "--path.netns="+dir, "--census.interval=1s", "--audit.budget=1", "--census.mechanism="+mechanism)
			scenario.NewNamed(t, dir, "late")
			want := map[string]float64{`sockq_tcp_sockets{netns="late",state="LISTEN"}`: 0}
			if mechanism == "auto" {
				s := scenario.NewStage(t, scenario.IPv4)
				want["sockq_listener_accept_queue_limit"+at(s.NS, s.Listen(7))] = 7
				want[`sockq_audit_difference{check="states",netns="late"}`] = 0
			}
			p.shows(want)
		})
	}
}
