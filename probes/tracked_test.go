package probes

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"sockq/probes/census"
	"sockq/probes/scenario"
	"sockq/probes/tcpstate"
	"sockq/probes/tracker"
)

var synSent = func() int {
	i, _ := tcpstate.Index(tcpstate.Edge{From: tcpstate.Close, To: tcpstate.SynSent})
	return i
}()

func snapshot(t testing.TB, p *Probes) *Snapshot {
	t.Helper()
	s, err := p.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func namespaceOf(s *Snapshot, name string) *Namespace {
	i := slices.IndexFunc(s.Namespaces, func(n Namespace) bool { return n.Name == name })
	if i < 0 {
		return nil
	}
	return &s.Namespaces[i]
}

// Namespaces over the cap are summed, also after they are gone: a sum of counters
// never falls. Others on the machine may be in the sum, too.
func TestTrackedNamespacesOverTheCap(t *testing.T) {
	dir := t.TempDir()
	p, err := Open(Options{NetnsPath: dir, MaxNamespaces: 1, MaxListeners: 100_000, AuditBudget: 0, StatesPerNamespace: true, NoOwners: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	connects := func() (uint64, uint64) {
		n := namespaceOf(snapshot(t, p), Other)
		if n == nil {
			return 0, 0
		}
		if !n.TransitionsKnown || (n.StateSeconds != nil) != told(tracker.StoryStateSeconds) {
			t.Fatalf("other is %+v", n)
		}
		if n.StateSeconds == nil { // these are never too few
			return n.Transitions[synSent], n.Transitions[synSent]
		}
		return n.Transitions[synSent], n.StateSeconds[tcpstate.SynSent].Count()
	}
	before, beforeSeconds := connects()
	for range 3 {
		s := scenario.NewStage(t, scenario.IPv4)
		if p.walk == nil {
			enter(t, p, dir, s.NS, false)
			if err := p.readNamespaces(true); err != nil {
				t.Fatal(err)
			}
		}
		l := s.Listen(8)
		for range 5 {
			s.Connect(l.Addr())
		}
		connects() // while it exists
		for range 2 {
			s.Connect(l.Addr())
		}
		s.End()
		if p.walk == nil {
			enter(t, p, dir, s.NS, true)
		}
		for range missedSweeps {
			if err := p.readNamespaces(false); err != nil {
				t.Fatal(err)
			}
			if err := p.sweep(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if after, seconds := connects(); after < before+21 || seconds < beforeSeconds+21 {
		t.Errorf("%d connects, then %d, want 21 more; %d times in SYN_SENT, then %d", before, after, beforeSeconds, seconds)
	}
}

// The stories that tracepoints alone do not tell.
var beyondTracepoints = []string{tracker.StoryRefusals, tracker.StoryHalfOpen, tracker.StoryTimeWait}

// What is turned off or cannot be attached is absent and named.
func TestWhatIsNotTrackedIsNamed(t *testing.T) {
	p, err := Open(Options{NetnsPath: t.TempDir(), MaxListeners: 100_000, MaxNamespaces: 10_000, NoSyscalls: true, NoStateSeconds: true, NoOwners: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	stage := scenario.NewStage(t, scenario.IPv6)
	l := stage.Listen(5)
	stage.Connect(l.Addr())
	l.Accept()
	s := snapshot(t, p)
	inside := p.ledger.knows.allAccepts // by a trampoline, which is on no system call
	if s.StateSeconds != nil {
		t.Error("there are times in states")
	}
	for _, x := range s.Listeners {
		if x.Inode != stage.NS.Inode() {
			continue
		}
		connections := map[bool]uint64{true: 1}[told(tracker.StoryConnections)]
		if x.AcceptsKnown != inside || x.AcceptWaitKnown != inside || x.BacklogRequestedKnown != inside ||
			x.ConnectionsKnown != told(tracker.StoryConnections) || x.Connections != connections {
			t.Errorf("listener is %+v", x)
		}
	}
	for _, name := range tracker.StoryNames {
		i := slices.IndexFunc(s.Probes, func(p Probe) bool { return p.Name == name })
		if i < 0 {
			t.Errorf("%s is not named", name)
			continue
		}
		if !told(name) {
			if s.Probes[i].Attached {
				t.Errorf("%s is attached, this kernel is too old for it", name)
			}
			continue
		}
		if probe := s.Probes[i]; slices.Contains(beyondTracepoints, name) && !probe.Attached && probe.Mechanism == "none" && probe.Reason != "" {
			continue
		}
		if slices.Contains([]string{tracker.StoryAccepts, tracker.StoryBacklog, tracker.StoryUnroutable}, name) && inside && s.Probes[i].Attached {
			continue
		}
		off := slices.Contains([]string{tracker.StoryAccepts, tracker.StoryBacklog, tracker.StoryUnroutable, tracker.StoryStateSeconds}, name)
		if probe := s.Probes[i]; probe.Attached == off || off && probe.Reason != "turned off" || off != (probe.Mechanism == "none") {
			t.Errorf("probe is %+v", probe)
		} else if !off && !probe.MissesKnown {
			t.Errorf("%s tells no misses", name)
		}
	}
}

// Runs of programs are counted where there are some, also where there is no walk.
func TestRunsAreCounted(t *testing.T) {
	p, err := Open(Options{NetnsPath: t.TempDir(), Mechanism: census.MechanismSockDiag, BPFStats: true, NoOwners: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	scenario.NewStage(t, scenario.IPv4).Listen(5)
	probes := snapshot(t, p).Probes
	i := slices.IndexFunc(probes, func(p Probe) bool { return p.Name == tracker.StoryTransitions })
	if i < 0 || !probes[i].StatsKnown || probes[i].Runs == 0 || probes[i].RunTime == 0 {
		t.Errorf("probes are %+v", probes)
	}
}

// Listeners come and go between two samples, and nothing they counted is lost.
func TestListenersComeAndGo(t *testing.T) {
	stage, dir := scenario.NewStage(t, scenario.IPv4), t.TempDir()
	if err := os.Symlink(stage.NS.Path(), filepath.Join(dir, "beside")); err != nil {
		t.Fatal(err)
	}
	p := open(t, mechanism(), dir)
	addr := stage.Next()
	const rounds, each = 40, 5
	for i := range rounds {
		l := stage.Socket().Bind(addr).Listen(8)
		for range each {
			c := stage.Connect(addr)
			l.Accept().Reset()
			c.Reset()
		}
		l.Close()
		switch i % 4 {
		case 1:
			snapshot(t, p)
		case 3:
			if err := p.sweep(); err != nil {
				t.Fatal(err)
			}
		}
	}
	for range missedSweeps {
		if err := p.sample(true); err != nil {
			t.Fatal(err)
		}
		if err := p.sweep(); err != nil {
			t.Fatal(err)
		}
	}
	var connections, accepts uint64
	s := snapshot(t, p)
	for _, l := range s.Listeners {
		if l.Inode == stage.NS.Inode() {
			connections += l.Connections
			accepts += l.Accepts
			if l.Address != addr.String() || l.Live {
				t.Errorf("listener is %+v", l)
			}
		}
	}
	want := uint64(rounds * each)
	if !told(tracker.StoryConnections) {
		want = 0
	}
	if connections != want || accepts != want {
		t.Errorf("%d connections and %d accepts, want %d", connections, accepts, want)
	}
	left, err := p.tracked.tracker.Listeners()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range left {
		if l.Namespace.Inode == stage.NS.Inode() {
			t.Errorf("the tracker keeps %+v", l)
		}
	}
	for what, n := range s.Lost {
		if n > 0 && strings.HasPrefix(what, "tracked") {
			t.Errorf("lost %d %s", n, what)
		}
	}
}

// A namespace that is gone leaves nothing behind, and one that is new begins at 0.
func TestTrackedNamespaceIsForgotten(t *testing.T) {
	dir := t.TempDir()
	p := open(t, mechanism(), dir)
	find := func(inode uint32) *tracker.Namespace {
		list, err := p.tracked.tracker.Namespaces()
		if err != nil {
			t.Fatal(err)
		}
		for i := range list {
			if list[i].ID.Inode == inode {
				return &list[i]
			}
		}
		return nil
	}
	s := scenario.NewStage(t, scenario.IPv4)
	if err := os.Symlink(s.NS.Path(), filepath.Join(dir, "young")); err != nil {
		t.Fatal(err)
	}
	l := s.Listen(5)
	s.Connect(l.Addr())
	lookAgain(t, p)
	if err := p.readNamespaces(true); err != nil {
		t.Fatal(err)
	}
	if n := namespaceOf(snapshot(t, p), "young"); n == nil || n.Transitions[synSent] != 1 {
		t.Fatalf("namespace is %+v", n)
	}
	if find(s.NS.Inode()) == nil {
		t.Fatal("the tracker does not know it")
	}
	inode := s.NS.Inode()
	s.End()
	eventually(t, func() []string { // the kernel takes its time
		if err := p.readNamespaces(true); err != nil {
			t.Fatal(err)
		}
		if err := p.sweep(); err != nil {
			t.Fatal(err)
		}
		if n := find(inode); n != nil {
			return []string{fmt.Sprintf("the tracker keeps %+v", n)}
		}
		return nil
	})
	if n := namespaceOf(snapshot(t, p), "young"); n != nil {
		t.Errorf("still shown: %+v", n)
	}
}
