package probes

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"sockq/probes/census"
	"sockq/probes/scenario"
	"sockq/probes/tracker"
)

// Each reason is a ListenDrop, three of them are ListenOverflows.
func TestRefusalsAt(t *testing.T) {
	for reason, name := range tracker.DropReasonNames {
		var l tracker.Listener
		l.Drops[reason], l.CookiesSent = 3, 5
		want := refusals{AuditListenDrops: 3, AuditSynCookies: 5}
		switch name {
		case "accept_queue_full_syn", "accept_queue_full_ack", "accept_queue_full_reset":
			want[AuditListenOverflows] = 3
		}
		if got := refusalsAt(&l); got != want {
			t.Errorf("%s: got %v, want %v", name, got, want)
		}
	}
}

// The kernel's counters are found by their names.
func TestKernelRefusals(t *testing.T) {
	n := census.Namespace{Inode: 2, Cookie: 3}
	for i, name := range census.EventNames {
		n.EventsKnown[i] = name != "SyncookiesSent"
		n.Events[i] = map[string]uint64{"ListenDrops": 7, "ListenOverflows": 5, "SyncookiesSent": 4}[name]
	}
	got := newKernelRefusals([]census.Namespace{n}, true)
	want := refusals{AuditListenDrops: 7, AuditListenOverflows: 5, AuditSynCookies: 4}
	if got.counts[identity{2, 3}] != want || got.known != [AuditChecks]bool{AuditListenDrops: true, AuditListenOverflows: true} || !got.whole {
		t.Errorf("got %+v", got)
	}
}

// Listeners that are there and those that departed make the sum of their
// namespace, which a census without cookies finds, too.
func TestSumRefusals(t *testing.T) {
	at := func(cookie uint64, inode uint32, drops uint64) tracker.Listener {
		return tracker.Listener{
			Namespace: tracker.NamespaceID{Cookie: cookie, Inode: inode},
			Drops:     [tracker.DropReasons]uint64{tracker.DropAcceptQueueFullSYN: drops, tracker.DropICMP: 1},
		}
	}
	got := sumRefusals(
		[]tracker.Listener{at(1, 10, 100), at(2, 20, 200), at(1, 10, 300), at(0, 30, 5)},
		map[tracker.NamespaceID]refusals{
			{Cookie: 1, Inode: 10}: {AuditListenDrops: 1000, AuditSynCookies: 7},
			{Inode: 30}:            {AuditListenOverflows: 2},
		},
	)
	first := refusals{AuditListenDrops: 1402, AuditListenOverflows: 400, AuditSynCookies: 7}
	second := refusals{AuditListenDrops: 201, AuditListenOverflows: 200}
	want := map[identity]refusals{
		{10, 1}: first, {10, 0}: first, {20, 2}: second, {20, 0}: second,
		{30, 0}: {AuditListenDrops: 6, AuditListenOverflows: 7},
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(identity{})); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// glance is what a round sees of one counter.
type glance struct {
	before, ours, after uint64
	difference          uint64
	compared            bool
}

func TestOffset(t *testing.T) {
	for name, looks := range map[string][]glance{
		"nothing moves": {{100, 5, 100, 0, false}, {100, 5, 100, 0, true}, {107, 12, 107, 0, true}},
		"one too few, and it stays so": {
			{100, 5, 100, 0, false}, {101, 5, 101, 1, true}, {101, 5, 101, 1, true}, {110, 14, 110, 1, true}, {110, 15, 110, 0, true},
		},
		"one too many":        {{100, 5, 100, 0, false}, {103, 9, 103, 1, true}},
		"inside the bracket":  {{100, 5, 100, 0, false}, {110, 17, 120, 0, true}, {110, 25, 120, 0, true}, {110, 15, 120, 0, true}},
		"outside the bracket": {{100, 5, 100, 0, false}, {110, 13, 120, 2, true}, {110, 28, 120, 3, true}},
		"a first look while it moves is narrowed down": {
			{100, 5, 110, 0, false},    // 95 to 105 ahead
			{200, 100, 220, 0, true},   // 100 to 120
			{203, 100, 203, 0, true},   // 103
			{204, 100, 204, 1, true},   // was possible before
			{1000, 900, 1002, 1, true}, // 100 to 102
		},
		"ours is ahead of the kernel's": {{0, 5, 0, 0, false}, {1, 6, 1, 0, true}, {1, 7, 1, 1, true}},
	} {
		t.Run(name, func(t *testing.T) {
			var o offset
			for i, l := range looks {
				difference, compared := o.hold(l.before, l.ours, l.after)
				if difference != l.difference || compared != l.compared {
					t.Errorf("look %d: %d, %t, want %d, %t", i, difference, compared, l.difference, l.compared)
				}
			}
		})
	}
}

// staged is an auditor whose reads are played to it; drops are ListenDrops by
// namespace.
type staged struct {
	*refusalAuditor
	kernels [2]map[identity]uint64 // before, after
	counted map[identity]uint64
	whole   bool
	calls   string
	// The kernel's second answer in a round is the first one, from memory.
	remembers bool
	memory    *kernelRefusals
}

func newStaged() *staged {
	s := &staged{whole: true}
	kernel := func() (kernelRefusals, error) {
		counts := s.kernels[0]
		if s.calls != "" {
			counts = s.kernels[1]
		}
		s.calls += "k"
		read := kernelRefusals{counts: make(map[identity]refusals), known: [AuditChecks]bool{AuditListenDrops: true}, whole: s.whole}
		read.read = make(map[identity]time.Time)
		for id, n := range counts {
			read.counts[id], read.read[id] = refusals{AuditListenDrops: n}, time.Now()
		}
		if s.memory != nil && len(s.calls) > 1 {
			return *s.memory, nil
		}
		s.memory = nil
		if s.remembers {
			s.memory = &read
		}
		return read, nil
	}
	ours := func() (map[identity]refusals, error) {
		s.calls += "o"
		sums := make(map[identity]refusals)
		for id, n := range s.counted {
			sums[id] = refusals{AuditListenDrops: n}
		}
		return sums, nil
	}
	s.refusalAuditor = newRefusalAuditor(kernel, ours)
	s.settle = func() error { s.calls += "s"; return nil }
	return s
}

// see plays one round in which nothing moves, or in which namespaces appear in
// after only.
func (s *staged) see(t *testing.T, kernel, ours map[identity]uint64, after ...map[identity]uint64) {
	t.Helper()
	s.kernels, s.counted, s.calls = [2]map[identity]uint64{kernel, kernel}, ours, ""
	if len(after) > 0 {
		s.kernels[1] = after[0]
	}
	if err := s.round(); err != nil {
		t.Fatal(err)
	}
	if s.calls != "ksosk" {
		t.Fatalf("the reads are %s", s.calls)
	}
}

// shows is what a Snapshot of these namespaces has of the check.
func (s *staged) shows(t *testing.T, names map[identity]string, want map[string]uint64) {
	t.Helper()
	var snapshot Snapshot
	for id, name := range names {
		if name != Other {
			snapshot.Namespaces = append(snapshot.Namespaces, Namespace{Name: name, Inode: id.inode, Cookie: id.cookie})
		}
	}
	if slices.Contains(slices.Collect(maps.Values(names)), Other) {
		snapshot.Namespaces = append(snapshot.Namespaces, Namespace{Name: Other})
	}
	s.report(&snapshot, func(inode uint32, cookie uint64) string { return names[identity{inode, cookie}] })
	got := make(map[string]uint64)
	for _, n := range snapshot.Namespaces {
		if n.Audited[AuditListenDrops] {
			got[n.Name] = n.Differences[AuditListenDrops]
		}
		if n.Audited[AuditStates] || n.Audited[AuditSynCookies] {
			t.Errorf("%s: audited %v", n.Name, n.Audited)
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

type drops = map[identity]uint64

func TestRefusalsAudit(t *testing.T) {
	old, young, brief := identity{1, 11}, identity{2, 22}, identity{3, 33}
	names := map[identity]string{old: "old", young: "young"}
	s := newStaged()
	s.see(t, drops{old: 1000}, nil)
	s.shows(t, names, map[string]uint64{}) // nothing to compare with yet
	s.see(t, drops{old: 1004}, drops{old: 4})
	s.shows(t, names, map[string]uint64{"old": 0})
	// What refused before anybody looked is held against 0.
	s.see(t, drops{old: 1004, young: 7}, drops{old: 4, young: 6})
	s.shows(t, names, map[string]uint64{"old": 0, "young": 1})
	// One that comes during a round is compared in the next one.
	s.see(t, drops{old: 1004, young: 7}, drops{old: 3, young: 7}, drops{old: 1004, young: 7, brief: 2})
	s.shows(t, names, map[string]uint64{"old": 1, "young": 0})
	s.see(t, drops{old: 1004, young: 7, brief: 3}, drops{old: 4, young: 7, brief: 1})
	s.shows(t, map[identity]string{brief: "brief", old: "old"}, map[string]uint64{"old": 0, "brief": 2})
	// It goes during a round.
	s.see(t, drops{old: 1004, young: 7, brief: 3}, drops{old: 4, young: 7, brief: 1}, drops{old: 1004, young: 7})
	s.shows(t, map[identity]string{brief: "brief"}, map[string]uint64{})
	if checks, skipped := s.checks[AuditListenDrops], s.skipped[AuditListenDrops]; checks != 10 || skipped != 2 || len(s.namespaces) != 2 {
		t.Errorf("%d checks, %d skipped, %d namespaces", checks, skipped, len(s.namespaces))
	}
	if s.checks[AuditSynCookies]+s.skipped[AuditSynCookies] != 0 {
		t.Error("a counter that the kernel does not have was compared")
	}
}

// A namespace that is found late may be an old one, where not all are listed.
func TestRefusalsAuditWithoutAllNamespaces(t *testing.T) {
	old, late := identity{1, 11}, identity{2, 0}
	names := map[identity]string{old: "old", late: "late"}
	s := newStaged()
	s.whole = false
	s.see(t, drops{old: 1}, nil)
	s.see(t, drops{old: 1, late: 500}, nil)
	s.shows(t, names, map[string]uint64{"old": 0})
	s.see(t, drops{old: 1, late: 501}, drops{late: 1})
	s.shows(t, names, map[string]uint64{"old": 0, "late": 0})
	// Another one got its inode number, and there are no cookies.
	s.see(t, drops{old: 1, late: 3}, drops{late: 1})
	s.shows(t, names, map[string]uint64{"old": 0})
	s.see(t, drops{old: 1, late: 5}, drops{late: 2})
	s.shows(t, names, map[string]uint64{"old": 0, "late": 1})
}

// Where the kernel's count after ours comes from memory, that of the next round
// stands for it.
func TestRefusalsAuditFromMemory(t *testing.T) {
	id := identity{1, 11}
	names := map[identity]string{id: "it"}
	s := newStaged()
	s.remembers = true
	s.see(t, drops{id: 1000}, drops{id: 5}) // these five were counted after the kernel's
	s.shows(t, names, map[string]uint64{})
	s.see(t, drops{id: 1005}, drops{id: 9}) // the first look: 995 to 1,000
	s.shows(t, names, map[string]uint64{})
	s.see(t, drops{id: 1009}, drops{id: 9}) // 996 to 1,000
	s.shows(t, names, map[string]uint64{"it": 0})
	s.see(t, drops{id: 1010}, drops{id: 9}) // one more than we saw, at most 1,001: not told apart yet
	s.shows(t, names, map[string]uint64{"it": 0})
	s.see(t, drops{id: 1010}, drops{id: 9})
	s.see(t, drops{id: 1010}, drops{id: 9})
	s.shows(t, names, map[string]uint64{"it": 1})
}

// Over the cap the differences are summed, those of no name are left out.
func TestRefusalsAuditOfOther(t *testing.T) {
	a, b, c, d := identity{1, 1}, identity{2, 2}, identity{3, 3}, identity{4, 4}
	s := newStaged()
	s.see(t, nil, nil)
	s.see(t, drops{a: 1, b: 2, c: 4, d: 8}, nil)
	s.shows(t, map[identity]string{a: "a", b: Other, c: Other}, map[string]uint64{"a": 1, Other: 6})
}

func TestRefusalsAuditThatFails(t *testing.T) {
	s := newStaged()
	boom := errors.New("boom")
	s.settle = func() error { return boom }
	if err := s.round(); !errors.Is(err, boom) || s.begun {
		t.Errorf("error is %v", err)
	}
}

// The audit with the kernel's own counters, and with counts that are right and
// one short.
func TestRefusalsAuditTellsALie(t *testing.T) {
	if refused(t) {
		return
	}
	p := open(t, census.MechanismWalk, t.TempDir())
	var stage *scenario.Stage
	short := uint64(0)
	p.refusals = newRefusalAuditor(p.kernelRefusals, func() (map[identity]refusals, error) {
		if stage == nil {
			return nil, nil
		}
		n := stage.NS.Netstat()
		all := refusals{
			AuditListenDrops: n["ListenDrops"] - short, AuditListenOverflows: n["ListenOverflows"] - short,
			AuditSynCookies: n["SyncookiesSent"] - short,
		}
		sums := make(map[identity]refusals)
		for _, id := range p.registry.listed() {
			if id.inode == stage.NS.Inode() {
				sums[id] = all
			}
		}
		return sums, nil
	})
	audit := func() {
		t.Helper()
		if err := p.readNamespaces(false); err != nil {
			t.Fatal(err)
		}
		if err := p.auditRefusals(); err != nil {
			t.Fatal(err)
		}
	}
	audit()
	stage = scenario.NewStage(t, scenario.IPv4)
	stage.NS.Sysctl("net.ipv4.tcp_syncookies", "2")
	l := stage.Listen(1)
	for range 2 {
		stage.Connect(l.Addr())
	}
	for range 3 {
		stage.Peer().SYN(l.Addr()) // once: nothing moves afterwards
	}
	eventually(t, func() []string {
		if n := stage.NS.Netstat(); n["ListenOverflows"] < 3 || n["ListenDrops"] < 3 || n["SyncookiesSent"] < 2 {
			return []string{"nothing was refused"}
		}
		return nil
	})
	for _, short = range []uint64{0, 1, 0} {
		audit()
		s := snapshot(t, p)
		i := slices.IndexFunc(s.Namespaces, func(n Namespace) bool { return n.Inode == stage.NS.Inode() })
		if i < 0 {
			t.Fatal("the namespace is not shown")
		}
		for check := AuditListenDrops; check < AuditChecks; check++ {
			if n := &s.Namespaces[i]; !n.Audited[check] || n.Differences[check] != short {
				t.Errorf("%s: audited %t, difference %d, want %d", AuditCheckNames[check], n.Audited[check], n.Differences[check], short)
			}
		}
		if n := len(s.Audits); n != int(AuditChecks) || s.Audits[n-1].Check != "syn_cookies" || s.Audits[n-1].Checks == 0 {
			t.Errorf("audits are %+v", s.Audits)
		}
	}
}

// The audit of what tracepoints alone tell of refusals: ignored ACKs it counts
// right, also when their listener has departed, a refused SYN it misses.
func TestRefusalsAuditOfTheTracker(t *testing.T) {
	if refused(t) || !told(tracker.StoryIgnoredACKs) {
		return
	}
	p := open(t, census.MechanismWalk, t.TempDir())
	missed := uint64(1)
	if p.tracked.refused {
		missed = 0
	}
	p.tracked.refused = true
	p.refusals = newRefusalAuditor(p.kernelRefusals, p.trackedRefusals)
	if err := p.auditRefusals(); err != nil {
		t.Fatal(err)
	}
	stage := scenario.NewStage(t, scenario.IPv4)
	want := func(what string, drops uint64) {
		t.Helper()
		if err := p.readNamespaces(false); err != nil {
			t.Fatal(err)
		}
		if err := p.auditRefusals(); err != nil {
			t.Fatal(err)
		}
		s := snapshot(t, p)
		i := slices.IndexFunc(s.Namespaces, func(n Namespace) bool { return n.Inode == stage.NS.Inode() })
		if i < 0 {
			t.Fatal("the namespace is not shown")
		}
		expect := [AuditChecks]uint64{AuditListenDrops: drops, AuditListenOverflows: drops}
		if n := &s.Namespaces[i]; n.Differences != expect || !n.Audited[AuditListenDrops] {
			t.Errorf("%s: differences are %v, want %v", what, n.Differences, expect)
		}
	}
	stage.NS.Sysctl("net.ipv4.tcp_synack_retries", "1")
	full := stage.Listen(1)
	stage.Peer().Connect(full.Addr())
	conns := []*scenario.Conn{stage.Peer().SYN(full.Addr()), stage.Peer().SYN(full.Addr())}
	for _, c := range conns {
		c.AwaitSYNACK()
	}
	for _, c := range conns { // the first finds the last place
		c.ACK()
	}
	refused := func(n uint64) {
		t.Helper()
		eventually(t, func() []string {
			if got := stage.NS.Netstat()["ListenOverflows"]; got != n {
				return []string{fmt.Sprintf("%d were refused, want %d", got, n)}
			}
			return nil
		})
	}
	refused(1)
	want("an ignored ACK", 0)
	stage.Peer().SYN(full.Addr())
	refused(2)
	want("a refused SYN", missed)
	full.Close()
	for range missedSweeps {
		if err := p.sample(true); err != nil {
			t.Fatal(err)
		}
		if err := p.sweep(); err != nil {
			t.Fatal(err)
		}
	}
	want("the listener departed", missed)
	departed := func() (drops uint64) {
		for n, r := range p.tracked.departed {
			if n.Inode == stage.NS.Inode() {
				drops += r[AuditListenDrops]
			}
		}
		return drops
	}
	if n := departed(); n != 2-missed {
		t.Errorf("%d refusals are known of those that departed, want %d", n, 2-missed)
	}
	inode := stage.NS.Inode()
	stage.End()
	eventually(t, func() []string { // the kernel takes its time
		if err := p.readNamespaces(true); err != nil {
			t.Fatal(err)
		}
		if err := p.sweep(); err != nil {
			t.Fatal(err)
		}
		if n := departed(); n != 0 {
			return []string{fmt.Sprintf("%d refusals are known of a namespace that is gone", n)}
		}
		return nil
	})
	if err := p.auditRefusals(); err != nil {
		t.Fatal(err)
	}
	for id := range p.refusals.namespaces {
		if id.inode == inode {
			t.Errorf("the audit keeps %+v", id)
		}
	}
}

// Listeners come and go, one at the address of another: each series has its own,
// and goes on when somebody listens there again.
func TestRefusalsOfSeries(t *testing.T) {
	if !told(tracker.StoryRefusals) {
		return
	}
	dir := t.TempDir()
	p := open(t, mechanism(), dir)
	stage := scenario.NewStage(t, scenario.IPv4)
	enter(t, p, dir, stage.NS, false)
	auditRefusals(t, p, stage.NS)
	look := func() {
		t.Helper()
		lookAgain(t, p)
		if err := p.sample(true); err != nil {
			t.Fatal(err)
		}
		if err := p.sweep(); err != nil {
			t.Fatal(err)
		}
		auditRefusals(t, p, stage.NS)
	}
	first, second := stage.Next(), stage.Next()
	want := make(map[string]uint64)
	for round, at := range []netip.AddrPort{first, second, first, first, second, first} {
		refused := stage.NS.Netstat()["ListenDrops"]
		l := stage.Socket().Bind(at).Listen(0)
		client := stage.Connect(at)
		l.Queued(1)
		syns := func(n uint64) {
			t.Helper()
			for range n {
				stage.Peer().SYN(at)
			}
			want[at.String()] += n
			refused += n
			eventually(t, func() []string {
				if got := stage.NS.Netstat()["ListenDrops"]; got != refused {
					return []string{fmt.Sprintf("%d were refused, want %d", got, refused)}
				}
				return nil
			})
		}
		syns(uint64(1 + round))
		if round%2 == 0 { // else nobody looks while it is there
			look()
			syns(2) // it has a cookie
		}
		client.Reset() // else the address stays taken
		l.Close()
		if round%3 != 0 { // else the next one comes first
			look()
		}
	}
	for range missedSweeps + 1 {
		look()
	}
	s := snapshot(t, p)
	got, series := make(map[string]uint64), 0
	for _, l := range s.Listeners {
		if l.Inode == stage.NS.Inode() {
			got[l.Address] += l.Drops[tracker.DropAcceptQueueFullSYN]
			series++
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("refused SYNs (-want +got):\n%s", diff)
	}
	if series != 2 || s.Lost["listeners_gone"] != 0 {
		t.Errorf("%d series, lost %v", series, s.Lost)
	}
	left, err := p.tracked.tracker.Listeners()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range left {
		if l.Namespace.Inode == stage.NS.Inode() {
			t.Errorf("left is %+v", l)
		}
	}
	i := slices.IndexFunc(s.Namespaces, func(n Namespace) bool { return n.Inode == stage.NS.Inode() })
	if n := &s.Namespaces[i]; !n.Audited[AuditListenDrops] || !n.Audited[AuditListenOverflows] {
		t.Errorf("audited %v", n.Audited)
	}
}

// Where nobody tells of refusals, nothing of their audit is shown.
func TestRefusalsAreAuditedWhereTold(t *testing.T) {
	p := open(t, mechanism(), t.TempDir())
	told := p.tracked.tracker.Tells(tracker.StoryRefusals)
	for range 2 {
		if err := p.auditRefusals(); err != nil {
			t.Fatal(err)
		}
	}
	s := snapshot(t, p)
	audited := slices.ContainsFunc(s.Namespaces, func(n Namespace) bool { return n.Audited[AuditListenDrops] })
	named := slices.ContainsFunc(s.Audits, func(a Audit) bool { return a.Check == "listen_drops" })
	if audited != told || named != told {
		t.Errorf("told %t, audited %t, named %t", told, audited, named)
	}
	for _, l := range s.Listeners {
		if l.RefusalsKnown != told {
			t.Fatalf("told %t, listener is %+v", told, l)
		}
	}
}
