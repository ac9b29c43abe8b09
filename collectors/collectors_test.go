package collectors

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"

	"sockq/collectors/catalogue"
	"sockq/probes"
	"sockq/probes/census"
	"sockq/probes/diagnose"
	"sockq/probes/tcpstate"
	"sockq/probes/tracker"
)

var update = flag.Bool("update", false, "write testdata anew")

// fixed hands out the same Snapshot until it is changed.
type fixed struct {
	snapshot *probes.Snapshot
	err      error
}

func (f *fixed) Snapshot() (*probes.Snapshot, error) { return f.snapshot, f.err }

// waits has a count of its own in five buckets: the first of all, two
// neighbours, one far from them, and the last of all.
func waits(n uint64) tracker.Histogram {
	h := tracker.Histogram{Sum: float64(n) / 8}
	h.Buckets[0], h.Buckets[10], h.Buckets[11], h.Buckets[24], h.Buckets[tracker.Buckets-1] = n, n+1, n+2, n+3, n+4
	return h
}

// full is a Snapshot in which every metric has a value of its own.
func full() *probes.Snapshot {
	host := probes.Namespace{
		Name: "host", Inode: 4026531840, Cookie: 1, PodNamespace: "shop", Pod: "web-0",
		SocketsKnown: true, BoundKnown: true, SettingsKnown: true,
		Differences: [probes.AuditChecks]uint64{0, 15, 16, 17}, Audited: [probes.AuditChecks]bool{true, true, true, true},
	}
	for i, state := range tcpstate.All {
		host.States[state] = uint64(100 + i)
	}
	process := probes.Process{
		Namespace: "host", PodNamespace: "shop", Pod: "web-0", Process: "nginx", Processes: 3,
		CloseWait: 45, OldestCloseWait: 46 * time.Second, FinWait2: 47, OldestFinWait2: 48 * time.Second, QueuesKnown: true,
		ReceiveMaxKnown: [census.Directions]bool{true, true}, SendMaxKnown: [census.Directions]bool{true, true},
	}
	for d := range process.Queues {
		n := uint64(1000 * (d + 1))
		process.Queues[d] = census.Queues{ReceiveBytes: n + 1, SendBytes: n + 2, ReceiveMaxBytes: n + 3, SendMaxBytes: n + 4}
	}
	for i := range host.Events {
		host.Events[i], host.EventsKnown[i] = uint64(200+i), true
	}
	for i := range host.Sysctls {
		host.Sysctls[i] = int64(300 + i)
	}
	host.TransitionsKnown, host.ConnectsKnown, host.ResetsSentKnown, host.ResetsReceivedKnown = true, true, true, true
	for i, edge := range []tcpstate.Edge{
		{From: tcpstate.Close, To: tcpstate.SynSent}, {From: tcpstate.SynSent, To: tcpstate.Established},
	} {
		if place, ok := tcpstate.Index(edge); ok {
			host.Transitions[place] = uint64(400 + i)
		}
	}
	host.Unexpected = map[tcpstate.Edge]uint64{
		{From: tcpstate.TimeWait, To: tcpstate.Established}: 411,
		{From: tcpstate.Listen, To: tcpstate.LastAck}:       410,
	}
	host.Connects = waits(500)
	for i := range host.ConnectFailures {
		host.ConnectFailures[i] = uint64(600 + i)
	}
	host.ResetsSent = map[string]uint64{"unspecified": 611, "TCP_STATE": 610}
	host.ResetsReceived = 612
	var states [tcpstate.Count]tracker.Histogram
	states[tcpstate.Established], states[tcpstate.LastAck] = waits(700), waits(800)
	return &probes.Snapshot{
		Time:         time.Unix(1700000000, 0),
		Kernel:       probes.Kernel{Release: "6.18.44", Tier: "C"},
		Namespaces:   []probes.Namespace{host},
		StateSeconds: &states,
		Processes:    []probes.Process{process},
		Listeners: []probes.Listener{{
			ID: 1, Namespace: "host", Inode: 4026531840, Address: "0.0.0.0:80", Live: true, Sockets: 2,
			Owner:       probes.Owner{Process: "nginx", Namespace: "shop", Pod: "web-0", Container: "front"},
			GaveUpKnown: true, GaveUp: 6,
			AcceptQueue: 3, AcceptQueueLimit: 8192, FillRatio: 0.25, Peak: 5, PeakRatio: 0.5,
			FullSeconds: 1.5, ConnectionSeconds: 42.5,
			SynQueueKnown: true, SynQueue: 7, SynPeak: 9, SynQueueLimit: 4096, SynLimitKnown: true,
			SocketDrops:      11,
			ConnectionsKnown: true, Connections: 21,
			AcceptsKnown: true, Accepts: 20, LastAccept: time.Unix(1700000000, 25e7),
			AcceptWaitKnown: true, AcceptWait: waits(900),
			RetransmitsKnown: true, SynackRetransmits: 22,
			Drops:                 [tracker.DropReasons]uint64{23, 24, 25, 26, 27, 28, 29, 30, 31, 32},
			BacklogRequestedKnown: true, BacklogRequested: 9999,
			RefusalsKnown: true, Syns: 33, CookiesSent: 34, CookiesValidated: 35,
			HalfOpenKnown: true, HalfOpenEnded: [tracker.HalfOpenEnds]uint64{36, 37, 38, 39, 40, 41, 42, 43},
			Handshake: waits(950), Abandoned: 44,
			Verdict: &diagnose.Verdict{Kind: diagnose.Clamped}, Verdicts: 1<<diagnose.OK | 1<<diagnose.Burst | 1<<diagnose.Clamped,
		}},
		Probes: []probes.Probe{
			{Name: "census", Mechanism: "bpf_walk", Attached: true, StatsKnown: true, Runs: 12, RunTime: 1500 * time.Millisecond},
			{Name: "transitions", Mechanism: "tp_btf", Attached: true, MissesKnown: true, Misses: 14},
			{Name: "half_open", Mechanism: "none", Reason: "needs trampolines or kprobes"},
		},
		Sources: []probes.SourceStatus{
			{Name: "sockets", Up: true, Duration: 20 * time.Millisecond, LastSuccess: time.Unix(1700000000, 5e8)},
			{Name: "listeners", Error: "dump: no buffer space available", Duration: time.Millisecond},
			{Name: "never", Error: "not read yet"},
		},
		Audits: []probes.Audit{{Check: "states", Checks: 13, Skipped: 2}, {Check: "listen_drops", Checks: 18, Skipped: 19}},
		Lost:   map[string]uint64{"namespace": 0, "listener": 4},
	}
}

// text is the whole page as a scrape sees it. It checks on the way what a
// registry would, since a Gatherer has none behind it.
func text(t testing.TB, g prometheus.TransactionalGatherer) string {
	t.Helper()
	families, done, err := g.Gather()
	defer done()
	if err != nil {
		t.Fatal(err)
	}
	checkConsistent(t, families)
	var b bytes.Buffer
	for _, f := range families {
		if _, err := expfmt.MetricFamilyToText(&b, f); err != nil {
			t.Fatal(err)
		}
	}
	return b.String()
}

func checkConsistent(t testing.TB, families []*dto.MetricFamily) {
	t.Helper()
	seen := make(map[string]bool)
	for i, f := range families {
		if i > 0 && families[i-1].GetName() >= f.GetName() {
			t.Errorf("%s follows %s", f.GetName(), families[i-1].GetName())
		}
		for _, m := range f.Metric {
			id := f.GetName()
			for j, l := range m.Label {
				if !utf8.ValidString(l.GetValue()) {
					t.Errorf("%s: label %s is not UTF-8: %q", f.GetName(), l.GetName(), l.GetValue())
				}
				if j > 0 && m.Label[j-1].GetName() >= l.GetName() {
					t.Errorf("%s: label %s follows %s", f.GetName(), l.GetName(), m.Label[j-1].GetName())
				}
				id += fmt.Sprintf(",%s=%q", l.GetName(), l.GetValue())
			}
			if seen[id] {
				t.Errorf("%s is there twice", id)
			}
			seen[id] = true
			if (m.Gauge != nil) != (f.GetType() == dto.MetricType_GAUGE) || (m.Counter != nil) != (f.GetType() == dto.MetricType_COUNTER) ||
				(m.Histogram != nil) != (f.GetType() == dto.MetricType_HISTOGRAM) {
				t.Errorf("%s: value and type %v differ", id, f.GetType())
			}
			if m.Histogram != nil {
				checkHistogram(t, id, m.Histogram)
			}
		}
	}
}

// The page of a full Snapshot, to the letter.
func TestWholePage(t *testing.T) {
	got := text(t, New(&fixed{snapshot: full()}))
	path := filepath.Join("testdata", "full.prom")
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("go test ./collectors -update writes it anew (-want +got):\n%s", diff)
	}
}

func TestPromlint(t *testing.T) {
	problems, err := promlint.New(strings.NewReader(text(t, New(&fixed{snapshot: full()})))).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

// pedantic hands families to a registry that checks everything.
type pedantic struct{ families []*dto.MetricFamily }

func (pedantic) Describe(chan<- *prometheus.Desc) {}

func (p pedantic) Collect(out chan<- prometheus.Metric) {
	for _, f := range p.families {
		for _, m := range f.Metric {
			var names []string
			for _, l := range m.Label {
				names = append(names, l.GetName())
			}
			out <- gathered{prometheus.NewDesc(f.GetName(), f.GetHelp(), names, nil), m}
		}
	}
}

// gathered is a metric that was gathered before.
type gathered struct {
	desc   *prometheus.Desc
	metric *dto.Metric
}

func (g gathered) Desc() *prometheus.Desc { return g.desc }

func (g gathered) Write(m *dto.Metric) error {
	m.Label, m.Gauge, m.Counter, m.Histogram = g.metric.Label, g.metric.Gauge, g.metric.Counter, g.metric.Histogram
	return nil
}

// A pedantic registry finds nothing wrong with the families, and gathers the same.
func TestPedanticRegistry(t *testing.T) {
	g := New(&fixed{snapshot: full()})
	want := text(t, g)
	families, done, err := g.Gather()
	defer done()
	if err != nil {
		t.Fatal(err)
	}
	r := prometheus.NewPedanticRegistry()
	r.MustRegister(pedantic{families})
	checked, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	lines := func(s string) []string { l := strings.Split(s, "\n"); slices.Sort(l); return l }
	var b bytes.Buffer
	for _, f := range checked {
		if _, err := expfmt.MetricFamilyToText(&b, f); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff(lines(want), lines(b.String())); diff != "" {
		t.Error(diff)
	}
}

// Every family is in the catalogue as it is exported, and the other way round.
func TestCatalogueIsThePage(t *testing.T) {
	families, done, err := prometheus.NewMultiTRegistry(
		New(&fixed{snapshot: full()}), prometheus.ToTransactionalGatherer(NewRegistry())).Gather()
	defer done()
	if err != nil {
		t.Fatal(err)
	}
	exported := make(map[string]*dto.MetricFamily)
	for _, f := range families {
		if strings.HasPrefix(f.GetName(), "sockq_") {
			exported[f.GetName()] = f
		}
	}
	for _, m := range catalogue.All {
		f := exported[m.Name]
		delete(exported, m.Name)
		if f == nil {
			t.Errorf("%s is not on the page", m.Name)
			continue
		}
		if f.GetHelp() != m.Help {
			t.Errorf("%s: help %q, catalogue %q", m.Name, f.GetHelp(), m.Help)
		}
		if got := strings.ToLower(f.GetType().String()); got != string(m.Type) {
			t.Errorf("%s: type %s, catalogue %s", m.Name, got, m.Type)
		}
		for _, s := range f.Metric {
			var names []string
			for _, l := range s.Label {
				names = append(names, l.GetName())
			}
			slices.Sort(names)
			want := slices.Sorted(slices.Values(m.Labels))
			if m == catalogue.StateSeconds { // of the whole node
				want = []string{catalogue.LabelState}
			}
			if !slices.Equal(names, want) {
				t.Errorf("%s: labels %v, catalogue %v", m.Name, names, want)
			}
		}
	}
	for name := range exported {
		t.Errorf("%s is not in the catalogue", name)
	}
}

// series are the lines of a page that begin with a prefix.
func lines(page, prefix string) []string {
	var out []string
	for l := range strings.Lines(page) {
		if strings.HasPrefix(l, prefix) {
			out = append(out, strings.TrimSuffix(l, "\n"))
		}
	}
	return out
}

// What is unknown has no series, whatever the field says.
func TestUnknownIsAbsent(t *testing.T) {
	tests := map[string]struct {
		change func(*probes.Snapshot)
		gone   []string // prefixes of lines that disappear; all else stays
	}{
		"sockets not counted": {
			func(s *probes.Snapshot) { s.Namespaces[0].SocketsKnown = false },
			[]string{"sockq_tcp_sockets"},
		},
		"bound sockets not counted": {
			func(s *probes.Snapshot) { s.Namespaces[0].BoundKnown = false },
			[]string{`sockq_tcp_sockets{namespace="shop",netns="host",pod="web-0",state="CLOSE"}`},
		},
		"settings not read": {
			func(s *probes.Snapshot) { s.Namespaces[0].SettingsKnown = false },
			[]string{"sockq_sysctl", "sockq_kernel_tcp_events_total"},
		},
		"a sysctl that the namespace does not have": {
			func(s *probes.Snapshot) { s.Namespaces[0].Sysctls[census.SysctlMaxTWBuckets] = -1 },
			[]string{`sockq_sysctl{name="tcp_max_tw_buckets",netns="host"}`},
		},
		"a counter that the kernel does not have": {
			func(s *probes.Snapshot) { s.Namespaces[0].EventsKnown[1] = false },
			[]string{`sockq_kernel_tcp_events_total{event="ListenDrops",netns="host"}`},
		},
		"not audited": {
			func(s *probes.Snapshot) { s.Namespaces[0].Audited = [probes.AuditChecks]bool{} },
			[]string{"sockq_audit_difference"},
		},
		"refusals not audited": {
			func(s *probes.Snapshot) { s.Namespaces[0].Audited[probes.AuditListenOverflows] = false },
			[]string{`sockq_audit_difference{check="listen_overflows",netns="host"}`},
		},
		"SYN queue unknown": {
			func(s *probes.Snapshot) { s.Listeners[0].SynQueueKnown = false },
			[]string{"sockq_listener_syn_queue_length", "sockq_listener_syn_queue_peak"},
		},
		"SYN limit unknown": {
			func(s *probes.Snapshot) { s.Listeners[0].SynLimitKnown = false },
			[]string{"sockq_listener_syn_queue_limit"},
		},
		"a set after its last socket": {
			func(s *probes.Snapshot) { s.Listeners[0].Live = false },
			[]string{
				"sockq_listener_accept_queue_length", "sockq_listener_accept_queue_limit", "sockq_listener_accept_queue_fill_ratio",
				"sockq_listener_syn_queue_length", "sockq_listener_syn_queue_limit", "sockq_listener_sockets",
				"sockq_listener_backlog_requested", "sockq_listener_accept_queue_gave_up", "sockq_listener_verdict",
			},
		},
		"no verdict yet": {
			func(s *probes.Snapshot) { s.Listeners[0].Verdict = nil },
			[]string{"sockq_listener_verdict"},
		},
		"a verdict that it never had": {
			func(s *probes.Snapshot) { s.Listeners[0].Verdicts &^= 1 << diagnose.Burst },
			[]string{`sockq_listener_verdict{address="0.0.0.0:80",container="front",namespace="shop",netns="host",pod="web-0",process="nginx",verdict="burst"}`},
		},
		"queues of a process not counted": {
			func(s *probes.Snapshot) {
				p := &s.Processes[0]
				p.QueuesKnown, p.ReceiveMaxKnown, p.SendMaxKnown = false, [census.Directions]bool{}, [census.Directions]bool{}
			},
			[]string{"sockq_tcp_receive_queue_", "sockq_tcp_send_queue_"},
		},
		"transitions not tracked": {
			func(s *probes.Snapshot) { s.Namespaces[0].TransitionsKnown = false },
			[]string{"sockq_tcp_transitions_total", "sockq_tcp_unexpected_transitions_total"},
		},
		"a transition not seen yet": {
			func(s *probes.Snapshot) {
				i, _ := tcpstate.Index(tcpstate.Edge{From: tcpstate.SynSent, To: tcpstate.Established})
				s.Namespaces[0].Transitions[i] = 0
				s.Namespaces[0].Unexpected[tcpstate.Edge{From: tcpstate.Listen, To: tcpstate.LastAck}] = 0
			},
			[]string{
				`sockq_tcp_transitions_total{from="SYN_SENT",namespace="shop",netns="host",pod="web-0",to="ESTABLISHED"}`,
				`sockq_tcp_unexpected_transitions_total{from="LISTEN",namespace="shop",netns="host",pod="web-0",to="LAST_ACK"}`,
			},
		},
		"times in states not tracked": {
			func(s *probes.Snapshot) { s.StateSeconds = nil },
			[]string{"sockq_tcp_state_seconds"},
		},
		"a state not left yet": {
			func(s *probes.Snapshot) { s.StateSeconds[tcpstate.LastAck] = tracker.Histogram{} },
			[]string{
				`sockq_tcp_state_seconds_bucket{state="LAST_ACK"`, `sockq_tcp_state_seconds_sum{state="LAST_ACK"`,
				`sockq_tcp_state_seconds_count{state="LAST_ACK"`,
			},
		},
		"connects not tracked": {
			func(s *probes.Snapshot) { s.Namespaces[0].ConnectsKnown = false },
			[]string{"sockq_tcp_connect_seconds", "sockq_tcp_connect_failures_total"},
		},
		"an error not seen yet": {
			func(s *probes.Snapshot) { s.Namespaces[0].ConnectFailures[tracker.ConnectNoPorts] = 0 },
			[]string{`sockq_tcp_connect_failures_total{error="no_ports",namespace="shop",netns="host",pod="web-0"}`},
		},
		"sent resets not tracked": {
			func(s *probes.Snapshot) { s.Namespaces[0].ResetsSentKnown = false },
			[]string{"sockq_tcp_resets_sent_total"},
		},
		"a reason not seen yet": {
			func(s *probes.Snapshot) {
				s.Namespaces[0].ResetsSent["TCP_STATE"] = 0
				s.Listeners[0].Drops[tracker.DropAcceptQueueFullReset] = 0
				s.Listeners[0].HalfOpenEnded[tracker.EndICMP] = 0
			},
			[]string{
				`sockq_tcp_resets_sent_total{namespace="shop",netns="host",pod="web-0",reason="TCP_STATE"}`,
				`sockq_listener_drops_total{address="0.0.0.0:80",container="front",namespace="shop",netns="host",pod="web-0",process="nginx",reason="accept_queue_full_reset"}`,
				`sockq_listener_half_open_ended_total{address="0.0.0.0:80",container="front",how="icmp",namespace="shop",netns="host",pod="web-0",process="nginx"}`,
			},
		},
		"received resets not tracked": {
			func(s *probes.Snapshot) { s.Namespaces[0].ResetsReceivedKnown = false },
			[]string{"sockq_tcp_resets_received_total"},
		},
		"arrivals not tracked": {
			func(s *probes.Snapshot) { s.Listeners[0].ConnectionsKnown = false },
			[]string{"sockq_listener_connections_total"},
		},
		"accepts not tracked": {
			func(s *probes.Snapshot) { s.Listeners[0].AcceptsKnown = false },
			[]string{"sockq_listener_accepts_total", "sockq_listener_last_accept_timestamp_seconds"},
		},
		"no accept yet": {
			func(s *probes.Snapshot) { s.Listeners[0].LastAccept = time.Time{} },
			[]string{"sockq_listener_last_accept_timestamp_seconds"},
		},
		"accept waits not tracked": {
			func(s *probes.Snapshot) { s.Listeners[0].AcceptWaitKnown = false },
			[]string{"sockq_listener_accept_wait_seconds"},
		},
		"SYN-ACKs not tracked": {
			func(s *probes.Snapshot) { s.Listeners[0].RetransmitsKnown = false },
			[]string{"sockq_listener_synack_retransmits_total"},
		},
		"refusals not tracked": {
			func(s *probes.Snapshot) { s.Listeners[0].RefusalsKnown = false },
			[]string{"sockq_listener_syns_total", "sockq_listener_syn_cookies_sent_total", "sockq_listener_syn_cookies_validated_total"},
		},
		"half-open requests not tracked": {
			func(s *probes.Snapshot) { s.Listeners[0].HalfOpenKnown = false },
			[]string{"sockq_listener_half_open_ended_total", "sockq_listener_handshake_seconds", "sockq_listener_abandoned_total"},
		},
		"listen() before the agent": {
			func(s *probes.Snapshot) { s.Listeners[0].BacklogRequestedKnown = false },
			[]string{"sockq_listener_backlog_requested"},
		},
		"misses not counted": {
			func(s *probes.Snapshot) { s.Probes[1].MissesKnown = false },
			[]string{"sockq_probe_misses_total"},
		},
		"no BPF statistics": {
			func(s *probes.Snapshot) { s.Probes[0].StatsKnown = false },
			[]string{"sockq_probe_runs_total", "sockq_probe_run_seconds_total"},
		},
		"a source never read with success": {
			func(s *probes.Snapshot) { s.Sources[0].LastSuccess = time.Time{} },
			[]string{"sockq_source_last_success_timestamp_seconds"},
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			want := lines(text(t, New(&fixed{snapshot: full()})), "sockq_")
			want = slices.DeleteFunc(want, func(l string) bool {
				return slices.ContainsFunc(test.gone, func(p string) bool { return strings.HasPrefix(l, p) })
			})
			s := full()
			test.change(s)
			if diff := cmp.Diff(want, lines(text(t, New(&fixed{snapshot: s})), "sockq_")); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// Other has sums only: no maxima, no settings.
func TestOther(t *testing.T) {
	s := full()
	other := s.Namespaces[0]
	other.PodNamespace, other.Pod = "", ""
	other.Name, other.SettingsKnown, other.Audited = probes.Other, false, [probes.AuditChecks]bool{}
	s.Namespaces = append(s.Namespaces, other)
	page := text(t, New(&fixed{snapshot: s}))
	var got []string
	for _, l := range lines(page, "sockq_") {
		if strings.Contains(l, `netns="other"`) {
			name, _, _ := strings.Cut(l, "{")
			got = append(got, name)
		}
	}
	want := []string{
		"sockq_tcp_connect_failures_total", "sockq_tcp_connect_seconds_bucket", "sockq_tcp_connect_seconds_sum", "sockq_tcp_connect_seconds_count",
		"sockq_tcp_resets_received_total", "sockq_tcp_resets_sent_total",
		"sockq_tcp_sockets", "sockq_tcp_transitions_total", "sockq_tcp_unexpected_transitions_total",
	}
	if diff := cmp.Diff(want, slices.Compact(got)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if n := len(lines(page, "sockq_tcp_sockets{")); n != 2*len(tcpstate.All) {
		t.Errorf("%d series of states for two namespaces", n)
	}
}

// What no process has open is no process', and without a leak nothing is oldest.
func TestProcesses(t *testing.T) {
	s := full()
	s.Processes[0].CloseWait = 0
	rest := s.Processes[0]
	rest.Process = ""
	s.Processes = append(s.Processes, rest)
	page := text(t, New(&fixed{snapshot: s}))
	for prefix, want := range map[string]int{
		"sockq_process_close_wait_sockets{": 1, "sockq_process_close_wait_oldest_seconds{": 0, "sockq_process_fin_wait2_oldest_seconds{": 1,
		"sockq_tcp_receive_queue_bytes{": 4, `sockq_tcp_receive_queue_bytes{direction="inbound",namespace="shop",netns="host",pod="web-0"} 1001`: 1,
	} {
		if got := lines(page, prefix); len(got) != want {
			t.Errorf("%s: %q, want %d", prefix, got, want)
		}
	}
}

// A namespace that comes back under its name brings a second set with the same
// labels; the page must have each series once.
func TestSetsWithTheSameLabels(t *testing.T) {
	const drops = "sockq_listener_socket_drops_total"
	old := probes.Listener{ID: 1, Namespace: "a", Address: "0.0.0.0:80", SocketDrops: 100}
	young := probes.Listener{ID: 2, Namespace: "a", Address: "0.0.0.0:80", SocketDrops: 2, Live: true}
	youngest := probes.Listener{ID: 3, Namespace: "a", Address: "0.0.0.0:80", SocketDrops: 3}
	tests := []struct {
		listeners []probes.Listener
		want      string
	}{
		{[]probes.Listener{old}, "100"},
		{[]probes.Listener{old, young}, "2"},
		{[]probes.Listener{young, old}, "2"},
		{[]probes.Listener{young, youngest}, "2"},
		{[]probes.Listener{old, youngest}, "3"},
		{[]probes.Listener{youngest, old}, "3"},
	}
	src := &fixed{}
	g := New(src)
	for i, test := range tests {
		src.snapshot = &probes.Snapshot{Listeners: test.listeners}
		want := []string{drops + `{address="0.0.0.0:80",netns="a"} ` + test.want}
		if diff := cmp.Diff(want, lines(text(t, g), drops)); diff != "" {
			t.Errorf("%d (-want +got):\n%s", i, diff)
		}
	}
	// Distinct as bytes, equal as UTF-8.
	src.snapshot = &probes.Snapshot{
		Namespaces: []probes.Namespace{
			{Name: "n\xff", Audited: [probes.AuditChecks]bool{true}},
			{Name: "n\xfe", Audited: [probes.AuditChecks]bool{true}, Differences: [probes.AuditChecks]uint64{1}},
		},
		Listeners: []probes.Listener{{ID: 1, Namespace: "n\xff", Address: "[::]:1%\xff"}, {ID: 2, Namespace: "n\xfe", Address: "[::]:1%\xfe"}},
	}
	page := text(t, g)
	if got := lines(page, drops); len(got) != 1 {
		t.Errorf("listeners whose names are not UTF-8: %q", got)
	}
	if got := lines(page, "sockq_audit_difference{"); len(got) != 1 || !strings.HasSuffix(got[0], " 0") {
		t.Errorf("namespaces whose names are not UTF-8: %q", got)
	}
}

// What is gone leaves the page and the memory; what stays keeps its series.
func TestGoneIsForgotten(t *testing.T) {
	src := &fixed{snapshot: many(10, 10)}
	g := New(src)
	first := text(t, g)
	stays := g.listeners.rows[listenerKey(&src.snapshot.Listeners[3])]
	src.snapshot = &probes.Snapshot{
		Namespaces: src.snapshot.Namespaces[2:3],
		Listeners:  src.snapshot.Listeners[3:4],
	}
	page := text(t, g)
	if got := len(lines(page, "sockq_listener_socket_drops_total{")); got != 1 {
		t.Errorf("%d listeners on the page, want 1", got)
	}
	if len(g.listeners.rows) != 1 || len(g.namespaces.rows) != 1 {
		t.Errorf("%d listeners and %d namespaces kept, want 1 and 1", len(g.listeners.rows), len(g.namespaces.rows))
	}
	if g.listeners.rows[listenerKey(&src.snapshot.Listeners[0])] != stays {
		t.Error("the series of a listener that stayed were made anew")
	}
	for _, f := range g.families {
		for _, m := range f.Metric[len(f.Metric):cap(f.Metric)] {
			if m != nil {
				t.Fatalf("%s keeps a series that is gone", f.metric.Name)
			}
		}
	}
	src.snapshot = many(10, 10)
	if diff := cmp.Diff(first, text(t, g)); diff != "" {
		t.Errorf("all back (-first +now):\n%s", diff)
	}
}

func TestSnapshotError(t *testing.T) {
	src := &fixed{err: errors.New("boom")}
	g := New(src)
	for range 2 { // the second must not wait for the first
		families, done, err := g.Gather()
		done()
		if !errors.Is(err, src.err) || len(families) != 0 {
			t.Fatalf("got %d families and error %v", len(families), err)
		}
	}
	src.snapshot, src.err = full(), nil
	text(t, g)
}

// counting hands out Snapshots in which every value is the same, and one more
// than in the last.
type counting struct {
	mu sync.Mutex
	n  uint64
}

func (c *counting) Snapshot() (*probes.Snapshot, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.n++
	s := many(20, 3)
	for i := range s.Listeners {
		s.Listeners[i].AcceptQueue, s.Listeners[i].SocketDrops = c.n, c.n
	}
	return s, nil
}

// Scrapes at the same time show one Snapshot each, never a mixture.
func TestConcurrentScrapes(t *testing.T) {
	g := New(new(counting))
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			last := ""
			for range 50 {
				page := text(t, g)
				var values []string
				for _, prefix := range []string{"sockq_listener_accept_queue_length{", "sockq_listener_socket_drops_total{"} {
					for _, l := range lines(page, prefix) {
						values = append(values, l[strings.LastIndexByte(l, ' '):])
					}
				}
				if n := len(values); n != 40 {
					t.Errorf("%d values, want 40", n)
				}
				if values = slices.Compact(values); len(values) != 1 || values[0] == last {
					t.Errorf("one page shows the Snapshots %v, the last was %s", values, last)
				}
				last = values[0]
			}
		})
	}
	wg.Wait()
}

// many is a Snapshot of a busy node.
func many(listeners, namespaces int) *probes.Snapshot {
	one := full()
	s := &probes.Snapshot{Time: one.Time, Kernel: one.Kernel, Probes: one.Probes, Sources: one.Sources, Audits: one.Audits, Lost: one.Lost}
	s.StateSeconds = one.StateSeconds
	for i := range namespaces {
		n := one.Namespaces[0]
		n.Name = fmt.Sprintf("%010d", 4026531840+i)
		s.Namespaces = append(s.Namespaces, n)
	}
	for i := range listeners {
		l := one.Listeners[0]
		l.ID, l.Namespace = uint64(i), s.Namespaces[i*namespaces/listeners].Name
		l.Address = fmt.Sprintf("10.%d.%d.1:%d", i>>8, i&0xff, 10000+i)
		l.AcceptQueue, l.FillRatio, l.ConnectionSeconds = uint64(i%128), float64(i%128)/129, float64(i)*1.2345
		l.AcceptWait = waits(uint64(i) * 1000)
		s.Listeners = append(s.Listeners, l)
	}
	return s
}

// TestScrapeAllocatesLittle holds the bound that the agent states: what a
// scrape allocates does not grow with the listeners and namespaces.
func TestScrapeAllocatesLittle(t *testing.T) {
	allocs := func(listeners, namespaces int) float64 {
		g := New(&fixed{snapshot: many(listeners, namespaces)})
		return testing.AllocsPerRun(20, func() {
			_, done, err := g.Gather()
			if err != nil {
				t.Fatal(err)
			}
			done()
		})
	}
	if few, lots := allocs(1, 1), allocs(1000, 300); lots > few {
		t.Errorf("%v allocations with 1,000 listeners, %v with one", lots, few)
	}
}
