package probes

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/sys/unix"

	"sockq/probes/census"
	"sockq/probes/netns"
	"sockq/probes/scenario"
	"sockq/probes/sockdiag"
	"sockq/probes/tcpstate"
	"sockq/probes/tracker"
)

// open starts probes that find the namespaces of dir and are driven by hand.
func open(t testing.TB, mechanism census.Mechanism, dir string) *Probes {
	t.Helper()
	p, err := Open(Options{Mechanism: mechanism, NetnsPath: dir, AuditBudget: 1, MaxListeners: 100_000, MaxNamespaces: 10_000, NoOwners: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

// openBeside starts probes that can enter a namespace.
func openBeside(t *testing.T, ns *scenario.Namespace) *Probes {
	t.Helper()
	dir := t.TempDir()
	if err := os.Symlink(ns.Path(), filepath.Join(dir, "beside")); err != nil {
		t.Fatal(err)
	}
	return open(t, census.MechanismWalk, dir)
}

// TestScenarios holds the Snapshot against every scenario: what sockq shows is
// what the scenario did, what sock_diag has, and what ss prints.
func TestScenarios(t *testing.T) {
	dir := t.TempDir()
	p := open(t, mechanism(), dir)
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { // the samples between the checks, for the peaks
		defer close(ended)
		every(ctx, p.opts.ListenerInterval, func() { _ = p.sample(false) })
	}()
	defer func() { stop(); <-ended }()
	outer := t
	scenario.RunFrom(t, func(t testing.TB, ns *scenario.Namespace) {
		if !scenario.KernelAtLeast(5, 14) {
			forget(t, p, ns)
			occupy(outer, t, ns)
		}
		enter(t, p, dir, ns, false)
		auditRefusals(t, p, ns) // what comes is held against this
	}, func() uint64 { return missed(p) }, func(t testing.TB, ns *scenario.Namespace, want scenario.Expect) {
		t.Helper()
		enter(t, p, dir, ns, want.Gone)
		if want.Gone {
			eventually(t, func() []string {
				if n, _ := look(t, p, ns); n != nil {
					return []string{"the namespace is still shown"}
				}
				return nil
			})
			return
		}
		report(t, compare(t, p, ns, want))
		auditRefusals(t, p, ns)
		if p.walk != nil {
			audit(t, p, ns)
		}
	})
	if p.walk == nil {
		if p.auditor != nil {
			t.Error("sock_diag audits itself")
		}
		return
	}
	if p.auditor.checks == 0 || p.auditor.skipped > p.auditor.checks {
		t.Errorf("%d audits, %d skipped", p.auditor.checks, p.auditor.skipped)
	}
}

// missed is how many events the kernel kept from the tracker's programs.
func missed(p *Probes) (n uint64) {
	for _, probe := range p.probes() {
		n += probe.Misses
	}
	return n
}

// enter lets the sock_diag source find a namespace, once it is not gone, and look
// at it now and not in a second.
func enter(t testing.TB, p *Probes, dir string, ns *scenario.Namespace, gone bool) {
	t.Helper()
	if p.walk != nil {
		return
	}
	link := filepath.Join(dir, fmt.Sprintf("ns%d", ns.Inode()))
	if err := os.Remove(link); err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	if !gone {
		if err := os.Symlink(ns.Path(), link); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.Remove(link) })
	}
	lookAgain(t, p)
}

// lookAgain gives the probes a sock_diag source that has not looked yet.
func lookAgain(t testing.TB, p *Probes) {
	t.Helper()
	if p.walk != nil {
		return
	}
	now, err := census.OpenSockDiag(p.opts.ProcFS, p.names.Find)
	if err != nil {
		t.Fatal(err)
	}
	p.namespaces.Lock()
	p.listeners.Lock()
	before := p.sockDiag
	p.source, p.sockDiag = now, now
	p.listeners.Unlock()
	p.namespaces.Unlock()
	before.Close()
}

// occupy keeps a namespace when its test has ended. Without cookies namespaces go
// by their inode numbers, and the next one gets the lowest that is free.
func occupy(until, t testing.TB, ns *scenario.Namespace) {
	t.Helper()
	t.Cleanup(func() {
		fd, err := unix.Open(ns.Path(), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return // it is gone
		}
		until.Cleanup(func() { unix.Close(fd) })
	})
}

// forget lets the tracker forget the namespace that had the same inode number.
func forget(t testing.TB, p *Probes, ns *scenario.Namespace) {
	t.Helper()
	if _, err := p.tracked.tracker.Namespaces(); err != nil { // what was not read is not forgotten
		t.Fatal(err)
	}
	if err := p.tracked.tracker.Forget(tracker.NamespaceID{Inode: ns.Inode()}); err != nil {
		t.Fatal(err)
	}
}

// TestScenariosWithoutBPF does the same for some with the sock_diag source, which
// looks at other namespaces now and then.
func TestScenariosWithoutBPF(t *testing.T) {
	if !walkSince.here() {
		return // TestScenarios plays all of them so
	}
	dir := t.TempDir()
	p := open(t, census.MechanismSockDiag, dir)
	played := 0
	for _, sc := range scenario.All {
		if !slices.Contains([]string{"mixed", "unread", "SO_REUSEPORT", "bound_to_device", "SYN_cookies"}, sc.Name) {
			continue
		}
		played++
		t.Run(sc.Name, func(t *testing.T) {
			ns, want := sc.Hold(t, scenario.IPv6)
			// Its name is known before its listeners, or they count anew with it.
			enter(t, p, dir, ns, false)
			eventually(t, func() []string { return compare(t, p, ns, want) })
		})
	}
	if played != 5 {
		t.Errorf("%d scenarios played", played)
	}
}

func eventually(t testing.TB, problems func() []string) {
	t.Helper()
	for end := time.Now().Add(15 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		found := problems()
		if len(found) == 0 || time.Now().After(end) {
			report(t, found)
			return
		}
	}
}

func report(t testing.TB, problems []string) {
	t.Helper()
	for _, p := range problems {
		t.Error(p)
	}
}

// compare tells in what the Snapshot differs from a scenario.
func compare(t testing.TB, p *Probes, ns *scenario.Namespace, want scenario.Expect) (problems []string) {
	t.Helper()
	add := func(format string, args ...any) { problems = append(problems, fmt.Sprintf(format, args...)) }
	before := ns.Netstat()
	n, listeners := look(t, p, ns)
	if n == nil {
		return []string{"the namespace is not shown"}
	}
	bound, err := sockdiag.BoundInactiveSupported() // the walk does not need it
	if err != nil {
		t.Fatal(err)
	}
	if !n.SocketsKnown || n.BoundKnown != (bound || p.walk != nil) {
		add("sockets are known: %v, bound ones: %v", n.SocketsKnown, n.BoundKnown)
	}
	if !n.BoundKnown {
		want.States[tcpstate.Close] = 0
	}
	if n.States != want.States {
		add("states are\n%v, want\n%v", n.States, want.States)
	}
	for d, q := range map[census.Direction]scenario.Queues{census.Inbound: want.Inbound, census.Outbound: want.Outbound} {
		if n.Queues[d] != census.Queues(q) {
			add("%s queues are %+v, want %+v", d, n.Queues[d], q)
		}
	}
	after := ns.Netstat()
	for i, event := range census.EventNames {
		low, known := before[event]
		if v := n.Events[i]; known != n.EventsKnown[i] || v < low || v > after[event] {
			add("%s is %d (%v), netstat has %d to %d (%v)", event, v, n.EventsKnown[i], low, after[event], known)
		}
	}
	problems = append(problems, compareListeners(p.walk != nil, listeners, want)...)
	problems = append(problems, compareHappened(n, want.Happened)...)
	problems = append(problems, compareTook(p, listeners, want.Listeners)...)
	if os.Getenv("SOCKQ_TEST_GUEST") != "" { // a kernel guest has no file but the tests
		return problems
	}
	return append(problems, compareSS(t, ns, n, listeners)...)
}

// look takes a census and finds a namespace and its live listeners in the
// Snapshot.
func look(t testing.TB, p *Probes, ns *scenario.Namespace) (*Namespace, map[string]Listener) {
	t.Helper()
	if err := p.readNamespaces(true); err != nil {
		t.Fatal(err)
	}
	if err := p.takeCensus(context.Background()); err != nil {
		t.Fatal(err)
	}
	s, err := p.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	listeners := make(map[string]Listener)
	for _, l := range s.Listeners {
		if l.Inode == ns.Inode() && l.Live {
			listeners[l.Address] = l
		}
	}
	i := slices.IndexFunc(s.Namespaces, func(n Namespace) bool { return n.Inode == ns.Inode() })
	if i < 0 {
		return nil, listeners
	}
	return &s.Namespaces[i], listeners
}

// compareListeners folds the sockets of an address, as the labels do.
func compareListeners(walk bool, got map[string]Listener, want scenario.Expect) (problems []string) {
	add := func(format string, args ...any) { problems = append(problems, fmt.Sprintf(format, args...)) }
	folded := make(map[string]*Listener)
	for _, l := range want.Listeners {
		f := folded[l.String()]
		if f == nil {
			f = new(Listener)
			folded[l.String()] = f
		}
		f.Sockets++
		f.AcceptQueue += uint64(l.AcceptQueue)
		f.AcceptQueueLimit += uint64(l.Limit)
		f.FillRatio = max(f.FillRatio, float64(l.AcceptQueue)/float64(l.Limit+1))
		f.SynQueue += uint64(l.SynQueue)
		f.SocketDrops += uint64(l.Drops)
		f.Peak = max(f.Peak, uint64(l.Peak), uint64(l.AcceptQueue))
	}
	if len(got) != len(folded) {
		add("%d listeners, want %d: %+v", len(got), len(folded), got)
	}
	for address, w := range folded {
		g, ok := got[address]
		if !ok {
			add("listener %s is not shown", address)
			continue
		}
		if g.Sockets != w.Sockets || g.AcceptQueue != w.AcceptQueue || g.AcceptQueueLimit != w.AcceptQueueLimit || g.FillRatio != w.FillRatio {
			add("listener %s is %+v, want %+v", address, g, *w)
		}
		if g.SocketDrops < w.SocketDrops || g.SocketDrops > w.SocketDrops && !want.Retransmits {
			add("listener %s dropped %d, want %d", address, g.SocketDrops, w.SocketDrops)
		}
		if g.SynQueueKnown != walk || walk && g.SynQueue != w.SynQueue {
			add("SYN queue of %s is %d (known: %v), want %d", address, g.SynQueue, g.SynQueueKnown, w.SynQueue)
		}
		// The visits of sock_diag are too rare for what drains.
		if walk && g.Peak < w.Peak {
			add("peak of %s is %d, want %d", address, g.Peak, w.Peak)
		}
	}
	return problems
}

// compareHappened holds the tracker's counts against what a scenario did.
func compareHappened(n *Namespace, want *scenario.Happened) (problems []string) {
	add := func(format string, args ...any) { problems = append(problems, fmt.Sprintf(format, args...)) }
	if len(n.Unexpected) > 0 {
		add("unexpected transitions: %v", n.Unexpected)
	}
	for story, known := range map[string]bool{
		tracker.StoryTransitions: n.TransitionsKnown, tracker.StoryConnects: n.ConnectsKnown,
		tracker.StoryResetsSent: n.ResetsSentKnown, tracker.StoryResetsReceived: n.ResetsReceivedKnown,
	} {
		if known != told(story) {
			add("%s are known: %t", story, known)
		}
	}
	if want == nil {
		return problems
	}
	got := make(map[tcpstate.Edge]uint64)
	for i, count := range n.Transitions {
		if count > 0 && tcpstate.Transitions[i].Sight == tcpstate.Reported {
			got[tcpstate.Transitions[i].Edge] = count
		}
	}
	// Where time-wait mini-sockets are tracked, more ends are told: of orphans, and
	// where no mini-socket takes over.
	for _, from := range []tcpstate.State{tcpstate.FinWait2, tcpstate.Closing} {
		end := tcpstate.Edge{From: from, To: tcpstate.Close}
		if told(tracker.StoryTimeWait) && want.Transitions[end] < got[end] {
			if got[end] = want.Transitions[end]; got[end] == 0 {
				delete(got, end)
			}
		}
	}
	if d := cmp.Diff(want.Transitions, got, cmpopts.EquateEmpty()); d != "" {
		add("transitions (-scenario +tracker):\n%s", d)
	}
	failures := make(map[string]uint64)
	for i, count := range n.ConnectFailures {
		if count > 0 {
			failures[tracker.ConnectErrorNames[i]] = count
		}
	}
	failed, connects := want.ConnectFailures, want.Transitions[tcpstate.Edge{From: tcpstate.SynSent, To: tcpstate.Established}]
	if !told(tracker.StoryConnects) || !told(tracker.StoryUnroutable) && want.Transitions[tcpstate.Edge{From: tcpstate.Close, To: tcpstate.SynSent}] == 0 {
		failed = nil
	}
	if !told(tracker.StoryConnects) {
		connects = 0
	}
	if d := cmp.Diff(failed, failures, cmpopts.EquateEmpty()); d != "" {
		add("failed connects (-scenario +tracker):\n%s", d)
	}
	if n.Connects.Count() != connects {
		add("%d connects were timed, want %d", n.Connects.Count(), connects)
	}
	var sent uint64
	for _, count := range n.ResetsSent {
		sent += count
	}
	// Before 6.12 those are missing for which there is no socket.
	if sent > want.ResetsSent || sent < want.ResetsSent && scenario.KernelAtLeast(6, 12) || n.ResetsReceived != want.ResetsReceived {
		add("RSTs: %d sent, %d received, want %d and %d", sent, n.ResetsReceived, want.ResetsSent, want.ResetsReceived)
	}
	return problems
}

// compareTook does the same for listeners, where the scenario says it of all
// sockets of an address.
func compareTook(p *Probes, got map[string]Listener, want []scenario.Listener) (problems []string) {
	add := func(format string, args ...any) { problems = append(problems, fmt.Sprintf(format, args...)) }
	took := make(map[string]*scenario.Took)
	half := make(map[string]bool) // open
	for _, l := range want {
		half[l.String()] = half[l.String()] || l.SynQueue > 0
		if l.Took == nil {
			took[l.String()] = nil
			continue
		}
		sum, ok := took[l.String()]
		switch {
		case !ok:
			sum = new(scenario.Took)
			took[l.String()] = sum
		case sum == nil:
			continue
		}
		sum.Connections += l.Took.Connections
		sum.Accepts += l.Took.Accepts
		sum.AcceptsUnseen = sum.AcceptsUnseen || l.Took.AcceptsUnseen
		sum.SynackRetransmits += l.Took.SynackRetransmits
		sum.IgnoredACKs += l.Took.IgnoredACKs
		sum.ResetACKs += l.Took.ResetACKs
		sum.Requested += l.Took.Requested
		sum.ShortPeak = max(sum.ShortPeak, l.Took.ShortPeak)
	}
	for address, w := range took {
		g, ok := got[address]
		if !ok || w == nil {
			continue
		}
		if !told(tracker.StoryConnections) {
			w.Connections, w.ShortPeak = 0, 0
		}
		if g.ConnectionsKnown != told(tracker.StoryConnections) || g.Connections != w.Connections {
			add("%s took %d connections (known: %v), want %d", address, g.Connections, g.ConnectionsKnown, w.Connections)
		}
		switch {
		case p.ledger.knows.allAccepts:
			w.AcceptsUnseen = false
		case p.walk == nil: // nobody could tell that accepts are unseen
			w.AcceptsUnseen = true
		}
		if !told(tracker.StorySynackRetransmits) {
			w.SynackRetransmits = 0
		}
		if g.AcceptsKnown == w.AcceptsUnseen || g.AcceptsKnown && g.Accepts != w.Accepts {
			add("%s accepted %d (known: %v), want %d (unseen: %v)", address, g.Accepts, g.AcceptsKnown, w.Accepts, w.AcceptsUnseen)
		}
		if g.AcceptsKnown && g.AcceptWait.Count() != g.Accepts {
			add("%s: %d waits for %d accepts", address, g.AcceptWait.Count(), g.Accepts)
		}
		if g.LastAccept.IsZero() != (!g.AcceptsKnown || w.Accepts == 0) {
			add("%s: last accept at %v after %d", address, g.LastAccept, w.Accepts)
		}
		again := g.SynackRetransmits
		if half[address] { // they go on being sent again
			again = min(again, w.SynackRetransmits)
		}
		if g.RetransmitsKnown != told(tracker.StorySynackRetransmits) || again != w.SynackRetransmits {
			add("%s sent %d SYN-ACKs again (known: %v), want %d", address, g.SynackRetransmits, g.RetransmitsKnown, w.SynackRetransmits)
		}
		if !told(tracker.StoryIgnoredACKs) {
			w.IgnoredACKs, w.ResetACKs = 0, 0
		}
		if ignored, reset := g.Drops[tracker.DropAcceptQueueFullACK], g.Drops[tracker.DropAcceptQueueFullReset]; ignored != w.IgnoredACKs || reset != w.ResetACKs {
			add("%s ignored %d final ACKs and reset %d, want %d and %d", address, ignored, reset, w.IgnoredACKs, w.ResetACKs)
		}
		if g.Peak < w.ShortPeak {
			add("the peak of %s is %d, want %d", address, g.Peak, w.ShortPeak)
		}
		if !told(tracker.StoryBacklog) {
			w.Requested = 0
		}
		if g.BacklogRequestedKnown != told(tracker.StoryBacklog) || g.BacklogRequested != int64(w.Requested) {
			add("%s: listen(%d) (known: %v), want listen(%d)", address, g.BacklogRequested, g.BacklogRequestedKnown, w.Requested)
		}
	}
	return problems
}

// compareSS holds the Snapshot against what ss prints in the namespace: the
// states that it shows, and the listeners.
func compareSS(t testing.TB, ns *scenario.Namespace, n *Namespace, listeners map[string]Listener) (problems []string) {
	t.Helper()
	add := func(format string, args ...any) { problems = append(problems, fmt.Sprintf(format, args...)) }
	var states [tcpstate.Count]uint64
	type queues struct{ length, limit uint64 }
	shown := make(map[string]queues)
	for _, fields := range ss(t, ns, "-Htan") {
		state, ok := ssStates[fields[0]]
		if !ok {
			t.Fatalf("ss shows a state %q", fields[0])
		}
		states[state]++
	}
	for _, fields := range ss(t, ns, "-Htln") {
		length, err1 := strconv.ParseUint(fields[1], 10, 64)
		limit, err2 := strconv.ParseUint(fields[2], 10, 64)
		if err1 != nil || err2 != nil {
			t.Fatalf("ss prints %q", fields)
		}
		q := shown[ssAddress(fields[3])]
		shown[ssAddress(fields[3])] = queues{q.length + length, q.limit + limit}
	}
	for _, s := range tcpstate.All {
		if s != tcpstate.Close && states[s] != n.States[s] {
			add("%d sockets in %s, ss shows %d", n.States[s], s, states[s])
		}
	}
	if len(shown) != len(listeners) {
		add("%d listeners, ss shows %v", len(listeners), shown)
	}
	for address, l := range listeners {
		if got := (queues{l.AcceptQueue, l.AcceptQueueLimit}); got != shown[ssAddress(address)] {
			add("listener %s has %+v, ss shows %+v", address, got, shown[ssAddress(address)])
		}
	}
	return problems
}

// ssAddress is an address of either kind in one spelling: ss puts the device
// before the port and writes :: as *.
func ssAddress(s string) string {
	s, device, _ := strings.Cut(s, "%")
	if colon := strings.LastIndex(device, ":"); colon >= 0 {
		s, device = s+device[colon:], device[:colon]
	}
	s = strings.Replace(strings.Replace(s, "[::]", "*", 1), "0.0.0.0:", "*:", 1)
	return s + "%" + device
}

var ssStates = map[string]tcpstate.State{
	"ESTAB": tcpstate.Established, "SYN-SENT": tcpstate.SynSent, "SYN-RECV": tcpstate.SynRecv,
	"FIN-WAIT-1": tcpstate.FinWait1, "FIN-WAIT-2": tcpstate.FinWait2, "TIME-WAIT": tcpstate.TimeWait,
	"UNCONN": tcpstate.Close, "CLOSE-WAIT": tcpstate.CloseWait, "LAST-ACK": tcpstate.LastAck,
	"LISTEN": tcpstate.Listen, "CLOSING": tcpstate.Closing,
}

// ss runs ss inside the namespace and splits what it prints.
func ss(t testing.TB, ns *scenario.Namespace, flags string) (lines [][]string) {
	t.Helper()
	path, err := exec.LookPath("ss")
	if err != nil {
		t.Fatal("ss is missing: apt-get install iproute2")
	}
	var out []byte
	if err := netns.Do(ns.Path(), func() (err error) {
		out, err = exec.Command(path, flags).Output()
		return err
	}); err != nil {
		t.Fatalf("run ss %s: %v", flags, err)
	}
	for line := range strings.Lines(string(out)) {
		if fields := strings.Fields(line); len(fields) > 0 {
			lines = append(lines, fields)
		}
	}
	return lines
}

// audit runs rounds until the namespace was audited, and expects no difference.
func audit(t testing.TB, p *Probes, ns *scenario.Namespace) {
	t.Helper()
	p.auditor.find = func() (map[uint32]string, error) {
		return map[uint32]string{ns.Inode(): ns.Path()}, nil
	}
	for end := time.Now().Add(10 * time.Second); ; {
		delete(p.auditor.audited, ns.Inode())
		delete(p.auditor.differences, ns.Inode())
		p.auditor.credit = time.Second
		if err := p.audit(context.Background()); err != nil {
			t.Fatal(err)
		}
		if r, ok := p.auditor.differences[ns.Inode()]; ok {
			if r.difference != 0 {
				t.Errorf("audit difference is %d", r.difference)
			}
			return
		}
		if time.Now().After(end) {
			t.Fatal("no audit came about")
		}
	}
}

// auditRefusals expects that all that the kernel refused in the namespace was
// counted. The first look of sock_diag's tells nothing yet.
func auditRefusals(t testing.TB, p *Probes, ns *scenario.Namespace) {
	t.Helper()
	if p.refusals == nil {
		return
	}
	if err := p.readNamespaces(true); err != nil {
		t.Fatal(err)
	}
	if err := p.auditRefusals(); err != nil {
		t.Fatal(err)
	}
	s := snapshot(t, p)
	i := slices.IndexFunc(s.Namespaces, func(n Namespace) bool { return n.Inode == ns.Inode() })
	if i < 0 {
		t.Fatal("the namespace is not shown")
	}
	for check := AuditListenDrops; check < AuditChecks; check++ {
		if n := &s.Namespaces[i]; n.Differences[check] != 0 {
			t.Errorf("%s: the difference is %d", AuditCheckNames[check], n.Differences[check])
		}
	}
}

// An audit that finds what is not there says so.
func TestAuditTellsALie(t *testing.T) {
	if refused(t) {
		return // sock_diag cannot audit itself
	}
	ns, want := scenario.Mixed.Hold(t, scenario.IPv4)
	p := openBeside(t, ns)
	honest := p.auditor.count
	p.auditor.count = func(ctx context.Context) (*census.Sockets, error) {
		sockets, err := honest(ctx)
		for i := range sockets.Namespaces {
			if n := &sockets.Namespaces[i]; n.Inode == ns.Inode() {
				n.States[tcpstate.Established] += 3
				n.States[tcpstate.Listen]--
			}
		}
		return sockets, err
	}
	if err := p.audit(context.Background()); err != nil {
		t.Fatal(err)
	}
	s, err := p.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range s.Namespaces {
		if n.Inode == ns.Inode() && (!n.Audited[AuditStates] || n.Differences[AuditStates] != 4) {
			t.Errorf("difference is %d (audited: %v), want 4", n.Differences[AuditStates], n.Audited[AuditStates])
		}
	}
	if want.States[tcpstate.Established] == 0 {
		t.Errorf("nothing was there: %v", want.States)
	}
}

// An audit while sockets come and go is given up, not wrong.
func TestAuditIsSkippedWhileSocketsMove(t *testing.T) {
	if refused(t) {
		return // sock_diag cannot audit itself
	}
	s := scenario.NewStage(t, scenario.IPv4)
	p := openBeside(t, s.NS)
	l := s.Listen(100)
	honest := p.auditor.count
	p.auditor.count = func(ctx context.Context) (*census.Sockets, error) {
		s.Connect(l.Addr()) // between the dumps
		return honest(ctx)
	}
	if err := p.audit(context.Background()); err != nil {
		t.Fatal(err)
	}
	if _, ok := p.auditor.differences[s.NS.Inode()]; ok || p.auditor.skipped == 0 {
		t.Errorf("differences are %v, %d skipped", p.auditor.differences, p.auditor.skipped)
	}
}

// The budget bounds how often audits take place.
func TestAuditKeepsItsBudget(t *testing.T) {
	if refused(t) {
		return // sock_diag cannot audit itself
	}
	p := open(t, census.MechanismWalk, t.TempDir())
	p.auditor.budget = 0.001
	p.auditor.credit = 0
	now := time.Now()
	p.auditor.last = now
	if err := p.auditor.round(context.Background(), now); err != nil {
		t.Fatal(err)
	}
	if p.auditor.checks+p.auditor.skipped != 0 {
		t.Fatal("an audit without credit")
	}
	for range 100 {
		now = now.Add(time.Second)
		if err := p.auditor.round(context.Background(), now); err != nil {
			t.Fatal(err)
		}
		if p.auditor.credit > 60*time.Millisecond {
			t.Fatalf("credit grew to %v", p.auditor.credit)
		}
	}
	if p.auditor.checks+p.auditor.skipped == 0 {
		t.Error("no audit in 100 s with a budget of 100 ms")
	}
}

// A scrape may outlive the server; it must not outlive the process by a crash.
func TestSnapshotAfterClose(t *testing.T) {
	p := open(t, mechanism(), t.TempDir())
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	s, err := p.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	for _, source := range s.Sources {
		if source.Up && source.Name != SourceNames {
			t.Errorf("source %s is up", source.Name)
		}
	}
}

// Names are a comfort: without them namespaces go by their inodes.
func TestNamesThatCannotBeRead(t *testing.T) {
	file := filepath.Join(t.TempDir(), "netns")
	if err := os.WriteFile(file, nil, 0o644); err != nil { // no directory
		t.Fatal(err)
	}
	p := open(t, mechanism(), file)
	s, err := p.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	up := make(map[string]bool)
	for _, source := range s.Sources {
		up[source.Name] = source.Up
	}
	if up[SourceNames] || !up[SourceNamespaces] || len(s.Namespaces) == 0 {
		t.Errorf("sources up: %v, %d namespaces", up, len(s.Namespaces))
	}
}
