package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"sockq/probes"
	"sockq/probes/census"
	"sockq/probes/diagnose"
	"sockq/probes/owner"
	"sockq/probes/tcpstate"
	"sockq/probes/tracker"
)

// fakeNode is a node without a kernel.
type fakeNode struct {
	answered                           atomic.Bool // a Snapshot
	snapshot                           *probes.Snapshot
	openErr, runErr, closeErr, snapErr error
	notReady, closed                   atomic.Bool
	stuck                              chan struct{}
	opts                               probes.Options
	needs                              []probes.Need

	mu      sync.Mutex
	gate    chan struct{} // closed: Snapshot goes through
	blocked chan struct{} // told when a Snapshot waits at the gate
}

func newFakeNode() *fakeNode { return &fakeNode{snapshot: fullSnapshot()} }

func (f *fakeNode) Needs() []probes.Need { return f.needs }

// block makes every Snapshot wait until release.
func (f *fakeNode) block() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.gate, f.blocked = make(chan struct{}), make(chan struct{}, 100)
}

func (f *fakeNode) release() { close(f.gate) }

func (f *fakeNode) Snapshot() (*probes.Snapshot, error) {
	f.mu.Lock()
	gate, blocked := f.gate, f.blocked
	f.mu.Unlock()
	if gate != nil {
		blocked <- struct{}{}
		<-gate
	}
	f.answered.Store(true)
	return f.snapshot, f.snapErr
}

func (f *fakeNode) Ready() bool  { return !f.notReady.Load() }
func (f *fakeNode) Close() error { f.closed.Store(true); return f.closeErr }

func (f *fakeNode) Run(ctx context.Context) error {
	if f.runErr != nil {
		return f.runErr
	}
	<-ctx.Done()
	if f.stuck != nil {
		<-f.stuck
	}
	return ctx.Err()
}

func fullSnapshot() *probes.Snapshot {
	host := probes.Namespace{
		Name: "host", Inode: 4026531840, Cookie: 1<<64 - 1,
		SocketsKnown: true, BoundKnown: true, SettingsKnown: true,
		Audited: [probes.AuditChecks]bool{true, true}, Differences: [probes.AuditChecks]uint64{3, 13, 14},
	}
	for i, state := range tcpstate.All {
		host.States[state] = uint64(100 + i)
	}
	host.Queues[census.Inbound] = census.Queues{ReceiveBytes: 1, SendBytes: 2, ReceiveMaxBytes: 3, SendMaxBytes: 4}
	for i := range host.Events {
		host.Events[i], host.EventsKnown[i] = uint64(i), i < 2
	}
	for i := range host.Sysctls {
		host.Sysctls[i] = -1
	}
	host.Sysctls[census.SysctlSomaxconn] = 4096
	track(&host)
	other := probes.Namespace{Name: probes.Other, SocketsKnown: true, StateSeconds: new([tcpstate.Count]tracker.Histogram)}
	other.Queues[census.Outbound].ReceiveMaxBytes = 99
	// Nothing is known of it.
	young := probes.Namespace{Name: "new", Inode: 7, Differences: [probes.AuditChecks]uint64{5}, Connects: took(2), ResetsReceived: 1}
	young.Transitions[0], young.ConnectFailures[0], young.ResetsSent = 1, 1, map[string]uint64{"tcp_flags": 1}
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	seconds := new([tcpstate.Count]tracker.Histogram)
	seconds[tcpstate.SynSent] = took(1, 0, 14)
	return &probes.Snapshot{
		StateSeconds: seconds,

		Time: at, Kernel: probes.Kernel{Release: "6.18.44", Tier: "C"},
		Namespaces: []probes.Namespace{host, young, other},
		Listeners: []probes.Listener{
			{
				ID: 1, Namespace: "host", Inode: 4026531840, Address: "[::]:80", Live: true, Sockets: 2,
				AcceptQueue: 3, AcceptQueueLimit: 8, FillRatio: 0.25, Peak: 5, PeakRatio: 0.5, FullSeconds: 1.5, ConnectionSeconds: 2.5,
				SynQueueKnown: true, SynQueue: 6, SynPeak: 7, SynQueueLimit: 8, SynLimitKnown: true, SocketDrops: 9,
				ConnectionsKnown: true, Connections: 10, AcceptsKnown: true, Accepts: 7, LastAccept: at.Add(-time.Second),
				AcceptWaitKnown: true, AcceptWait: took(0, 0, 18, 19, 20, tracker.Buckets-1), RetransmitsKnown: true, SynackRetransmits: 11,
				Drops: [tracker.DropReasons]uint64{0, 12, tracker.DropPolicy: 15}, BacklogRequestedKnown: true, BacklogRequested: 9999,
				RefusalsKnown: true, Syns: 16, CookiesSent: 17, CookiesValidated: 18,
				HalfOpenKnown: true, HalfOpenEnded: [tracker.HalfOpenEnds]uint64{19, tracker.EndExpired: 20}, Handshake: took(8, 8), Abandoned: 21,
				Owner:       probes.Owner{Process: "nginx", Namespace: "shop", Pod: "web-0", Container: "front"},
				Who:         owner.Owner{PID: 22, Others: 3, Unit: "nginx.service", Runtime: "containerd", Container: "c0ffee", PodUID: "uid", HostNetwork: true},
				GaveUpKnown: true, GaveUp: 23,
				Verdict: &diagnose.Verdict{Kind: diagnose.NearLimit, Evidence: "5 of 9", Advice: "more"}, Verdicts: 1<<diagnose.OK | 1<<diagnose.NearLimit,
			},
			{ID: 2, Namespace: "host", Inode: 4026531840, Address: "[::]:81", Sockets: 4, AcceptQueue: 1, AcceptQueueLimit: 1, FillRatio: 1,
				Peak: 5, SynQueueKnown: true, SynQueue: 1, SynPeak: 4, SynQueueLimit: 1, SynLimitKnown: true, SocketDrops: 9,
				ConnectionsKnown: true, AcceptsKnown: true, AcceptWaitKnown: true, RetransmitsKnown: true, BacklogRequestedKnown: true, BacklogRequested: 5,
				RefusalsKnown: true, HalfOpenKnown: true, Verdict: &diagnose.Verdict{Evidence: "of a listener that went"}, Verdicts: 1},
			{ID: 3, Namespace: "new", Inode: 7, Address: "[::]:82", Live: true, Sockets: 1, SynQueue: 1, SynPeak: 1, SynQueueLimit: 1,
				Connections: 1, Accepts: 1, LastAccept: at, AcceptWait: took(1), SynackRetransmits: 1, BacklogRequested: 1,
				Syns: 1, CookiesSent: 1, CookiesValidated: 1, HalfOpenEnded: [tracker.HalfOpenEnds]uint64{1}, Handshake: took(1), Abandoned: 1},
		},
		Processes: []probes.Process{{
			Namespace: "host", PodNamespace: "shop", Pod: "web-0", Process: "nginx", Processes: 2,
			CloseWait: 24, OldestCloseWait: 25 * time.Second, FinWait2: 26, OldestFinWait2: 27 * time.Second, QueuesKnown: true,
			Queues:          [census.Directions]census.Queues{{ReceiveBytes: 28, SendBytes: 29, ReceiveMaxBytes: 30, SendMaxBytes: 31}},
			ReceiveMaxKnown: [census.Directions]bool{true}, SendMaxKnown: [census.Directions]bool{true},
		}},
		Probes: []probes.Probe{
			{Name: "sockets", Mechanism: "bpf_walk", Attached: true, StatsKnown: true, Runs: 2, RunTime: time.Second, MissesKnown: true},
			{Name: "accepts", Mechanism: "none", Reason: "not in <this> version"},
			{Name: "backlog", Mechanism: "none", Reason: "not in <this> version"},
		},
		Sources: []probes.SourceStatus{
			{Name: "sockets", Up: true, Duration: 250 * time.Millisecond, LastSuccess: at},
			{Name: "listeners", Error: "boom"},
		},
		Audits: []probes.Audit{{Check: "states", Checks: 4, Skipped: 1}},
		Lost:   map[string]uint64{"listener": 0},
	}
}

// track is what the tracker counted in a namespace.
func track(n *probes.Namespace) {
	n.TransitionsKnown, n.ConnectsKnown, n.ResetsSentKnown, n.ResetsReceivedKnown = true, true, true, true
	for _, e := range []tcpstate.Edge{
		{From: tcpstate.Close, To: tcpstate.SynSent}, {From: tcpstate.Close, To: tcpstate.Listen}, {From: tcpstate.LastAck, To: tcpstate.Close},
	} {
		i, _ := tcpstate.Index(e)
		n.Transitions[i] = uint64(100 + i)
	}
	n.Unexpected = map[tcpstate.Edge]uint64{{From: tcpstate.Listen, To: tcpstate.SynSent}: 1}
	n.Connects = took(3, 4, 4)
	n.ConnectFailures[tracker.ConnectRefused] = 3
	n.ResetsSent = map[string]uint64{"tcp_flags": 2, "no_socket": 0}
	n.ResetsReceived = 4
	n.StateSeconds = new([tcpstate.Count]tracker.Histogram)
	n.StateSeconds[tcpstate.Established] = took(30)
}

// took are durations, one in each of the buckets, that took 2.5 s together.
func took(buckets ...int) (h tracker.Histogram) {
	for _, b := range buckets {
		h.Buckets[b]++
	}
	h.Sum = 2.5
	return h
}

var silent = slog.New(slog.DiscardHandler)

func testHandler(n node) http.Handler {
	return newHandler(n, &config{telemetryPath: "/metrics", maxRequests: 8}, new(turnedAway), silent)
}

func request(h http.Handler, method, path string) *httptest.ResponseRecorder {
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(method, path, nil))
	return w
}

func TestEndpoints(t *testing.T) {
	tests := []struct {
		method, path string
		status       int
		contentType  string
		contains     string
	}{
		{"GET", "/", 200, "text/html; charset=utf-8", "<h1>sockq</h1>"},
		{"GET", "/metrics", 200, "text/plain; version=0.0.4; charset=utf-8; escaping=underscores", `sockq_listener_accept_queue_length{address="[::]:80",container="front",namespace="shop",netns="host",pod="web-0",process="nginx"} 3`},
		{"GET", "/metrics", 200, "", "sockq_build_info{"},
		{"GET", "/metrics", 200, "", "\nprocess_resident_memory_bytes "},
		{"GET", "/metrics", 200, "", "\ngo_goroutines "},
		{"GET", "/metrics", 200, "", "promhttp_metric_handler_requests_in_flight 1"},
		{"GET", "/api/v1/snapshot", 200, "application/json", `"address":"[::]:80"`},
		{"GET", "/-/healthy", 200, "", "healthy"},
		{"GET", "/-/ready", 200, "", "ready"},
		{"HEAD", "/metrics", 200, "", ""},
		{"HEAD", "/", 200, "text/html; charset=utf-8", ""},
		{"GET", "/nope", 404, "", ""},
		{"GET", "/metrics/", 404, "", ""},
		{"GET", "/-/nope", 404, "", ""},
		{"POST", "/metrics", 405, "", ""},
		{"DELETE", "/api/v1/snapshot", 405, "", ""},
		{"PUT", "/", 405, "", ""},
		{"POST", "/-/healthy", 405, "", ""},
		{"POST", "/nope", 404, "", ""},
	}
	h := testHandler(newFakeNode())
	for _, test := range tests {
		r := request(h, test.method, test.path)
		if r.Code != test.status {
			t.Errorf("%s %s: status %d, want %d", test.method, test.path, r.Code, test.status)
		}
		if got := r.Header().Get("Content-Type"); test.contentType != "" && got != test.contentType {
			t.Errorf("%s %s: content type %q, want %q", test.method, test.path, got, test.contentType)
		}
		if got := r.Body.String(); !strings.Contains(got, test.contains) {
			t.Errorf("%s %s: no %q in %.300q", test.method, test.path, test.contains, got)
		}
		if r.Code == 405 && r.Header().Get("Allow") != "GET, HEAD" {
			t.Errorf("%s %s: Allow %q", test.method, test.path, r.Header().Get("Allow"))
		}
	}
}

func TestReadyAfterTheFirstCensus(t *testing.T) {
	n := newFakeNode()
	n.notReady.Store(true)
	h := testHandler(n)
	if r := request(h, "GET", pathReady); r.Code != 503 {
		t.Errorf("before: %d", r.Code)
	}
	if r := request(h, "GET", pathHealthy); r.Code != 200 {
		t.Errorf("healthy before: %d", r.Code)
	}
	n.notReady.Store(false)
	if r := request(h, "GET", pathReady); r.Code != 200 {
		t.Errorf("after: %d", r.Code)
	}
}

func TestNoSnapshot(t *testing.T) {
	n := newFakeNode()
	n.snapErr = errors.New("boom")
	h := testHandler(n)
	for _, path := range []string{"/", "/metrics", pathSnapshot} {
		r := request(h, "GET", path)
		if got := r.Body.String(); r.Code != 500 || !strings.Contains(got, "boom") {
			t.Errorf("%s: %d %q", path, r.Code, got)
		}
	}
}

// Other paths can be chosen for the metrics, and the page leads there.
func TestTelemetryPath(t *testing.T) {
	h := newHandler(newFakeNode(), &config{telemetryPath: "/a/b", maxRequests: 1}, new(turnedAway), silent)
	if r := request(h, "GET", "/a/b"); r.Code != 200 {
		t.Error(r.Code)
	}
	if r := request(h, "GET", "/metrics"); r.Code != 404 {
		t.Error(r.Code)
	}
	if got := request(h, "GET", "/").Body.String(); !strings.Contains(got, `href="a/b"`) {
		t.Error(got)
	}
}

func TestLandingPageSaysWhatIsMissing(t *testing.T) {
	got := request(testHandler(newFakeNode()), "GET", "/").Body.String()
	for _, want := range []string{
		"Kernel 6.18.44, tier C.",
		"<tr><td>sockets</td><td>sockets by state, bytes in their queues</td><td>bpf_walk</td><td></td></tr>",
		"<tr><td>accepts</td><td>accepts, and how long connections waited for them</td><td>not attached</td><td>not in &lt;this&gt; version</td></tr>",
		"<tr><td>backlog</td><td>what listen() asked for</td><td>not attached</td><td>as above</td></tr>",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in %s", want, got)
		}
	}
}

func TestEachStoryIsExplained(t *testing.T) {
	for _, name := range tracker.StoryNames {
		if s := storyOf(name); s.tells == "" || s.since == "" {
			t.Errorf("nobody says what %s tells, or what it needs", name)
		}
	}
}

func TestStoriesOfArchitectures(t *testing.T) {
	for _, test := range []struct{ name, arch, since, needs string }{
		{tracker.StoryHalfOpen, "amd64", "5.12", "Linux 5.12 or newer with trampolines or kprobes, which stock kernels have"},
		{tracker.StoryHalfOpen, "arm64", "5.18", "Linux 5.18 or newer with trampolines or kprobes, which stock kernels have"},
		{tracker.StoryAccepts, "arm64", "6.4", "Linux 6.4 or newer, or 5.18 or newer with trampolines"},
		{tracker.StorySynackRetransmits, "arm64", "5.12", ""},
	} {
		for _, group := range storyGroups {
			for _, s := range group.stories {
				if s.name != test.name {
					continue
				}
				if got := s.on(test.arch); got.since != test.since || got.needs != test.needs {
					t.Errorf("%s on %s: %q, %q", test.name, test.arch, got.since, got.needs)
				}
			}
		}
	}
}

// The JSON to the letter: others build on it.
func TestSnapshotJSON(t *testing.T) {
	got := request(testHandler(newFakeNode()), "GET", pathSnapshot).Body.String()
	want, err := os.ReadFile(filepath.Join("testdata", "snapshot.json"))
	if err != nil {
		t.Fatal(err)
	}
	var compact, indented bytes.Buffer
	if err := json.Compact(&compact, want); err != nil {
		t.Fatal(err)
	}
	if err := json.Indent(&indented, []byte(got), "", "  "); err != nil {
		t.Fatal(err)
	}
	if *update {
		if err := os.WriteFile(filepath.Join("testdata", "snapshot.json"), append(indented.Bytes(), '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if diff := cmp.Diff(compact.String()+"\n", got); diff != "" {
		t.Errorf("got\n%s", indented.String())
	}
}

// An empty Snapshot has empty lists, not null.
func TestEmptySnapshotJSON(t *testing.T) {
	got := request(testHandler(&fakeNode{snapshot: &probes.Snapshot{}}), "GET", pathSnapshot).Body.String()
	want := `{"time":"0001-01-01T00:00:00Z","kernel":{"release":""},"namespaces":[],"listeners":[],"processes":[],"probes":[],"sources":[],"audits":[],"lost":{"web_answers":0,"web_connections":0,"web_requests":0}}` + "\n"
	if got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestServerBounds(t *testing.T) {
	s := newServers(http.NotFoundHandler(), nil, new(turnedAway), silent)[0]
	if s.ReadHeaderTimeout <= 0 || s.ReadTimeout <= 0 || s.WriteTimeout <= 0 || s.IdleTimeout <= 0 {
		t.Errorf("a timeout is missing: %+v", s)
	}
	srv := httptest.NewUnstartedServer(nil)
	srv.Config = s
	srv.Start()
	defer srv.Close()
	req, err := http.NewRequest("GET", srv.URL, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-Big", strings.Repeat("x", 2*maxHeaderBytes))
	resp, err := srv.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
		t.Error(resp.Status)
	}
}

// Prometheus may ask for protobuf; the families are made for it too.
func TestProtobuf(t *testing.T) {
	req := httptest.NewRequest("GET", "/metrics", nil)
	req.Header.Set("Accept", protobuf)
	w := httptest.NewRecorder()
	testHandler(newFakeNode()).ServeHTTP(w, req)
	all, err := families(w.Body, w.Header())
	if err != nil {
		t.Fatal(err)
	}
	states := len(all["sockq_tcp_sockets"].GetMetric())
	if want := 2*len(tcpstate.All) - 1; states != want { // other has no CLOSE
		t.Errorf("%d series of states, want %d", states, want)
	}
}

// A compressed page is the same page; who does not want it gets it plain, and an
// error is plain.
func TestCompression(t *testing.T) {
	node := newFakeNode()
	h := newHandler(node, &config{telemetryPath: "/metrics", maxRequests: 8}, new(turnedAway), silent)
	fetch := func(accept ...string) *httptest.ResponseRecorder {
		r := httptest.NewRequest(http.MethodGet, "/metrics", nil)
		r.Header["Accept-Encoding"] = accept
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		return w
	}
	listeners := func(r io.Reader) (lines []string) {
		page, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(page)) {
			if strings.HasPrefix(line, "sockq_listener_") {
				lines = append(lines, line)
			}
		}
		return lines
	}
	plain := listeners(fetch().Body)
	if len(plain) == 0 {
		t.Fatal("no listener on the page")
	}
	for accept, packed := range map[string]bool{
		"gzip": true, "deflate, gzip;q=0.5": true, "br,gzip": true, "gzip; q=0.05": true,
		"": false, "identity": false, "gzip;q=0": false, "gzip; q=0.000": false, "gzip;q=x": false, "gzipped": false,
	} {
		answer := fetch(accept)
		if got := answer.Header().Get("Content-Encoding") == "gzip"; got != packed {
			t.Errorf("%q: compressed: %v, want %v", accept, got, packed)
			continue
		}
		var body io.Reader = answer.Body
		if packed {
			var err error
			if body, err = gzip.NewReader(body); err != nil {
				t.Fatal(err)
			}
		}
		if d := cmp.Diff(plain, listeners(body)); d != "" {
			t.Errorf("%q: %s", accept, d)
		}
	}
	node.snapErr = errors.New("boom")
	answer := fetch("gzip")
	text, err := io.ReadAll(answer.Body)
	if err != nil || answer.Code != http.StatusInternalServerError || answer.Header().Get("Content-Encoding") != "" || !strings.Contains(string(text), "boom") {
		t.Errorf("an error is %d %q %q, %v", answer.Code, answer.Header(), text, err)
	}
}
