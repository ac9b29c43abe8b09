package tracker

import (
	"cmp"
	"maps"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"sockq/probes/scenario"
	"sockq/probes/tcpstate"
)

func TestMain(m *testing.M) {
	if os.Getenv(acceptorVariable) != "" {
		os.Exit(acceptor())
	}
	os.Exit(m.Run())
}

// Other programs of the machine have connections, too: tests look at namespaces
// and listeners of their own only. Unless it is said otherwise the tracepoints are
// tested, which all kernels have.
func openTracker(tb testing.TB, opts Options) *Tracker {
	tb.Helper()
	opts.Tier = cmp.Or(opts.Tier, TierC)
	tr, err := Open(opts)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := tr.Close(); err != nil {
			tb.Error(err)
		}
	})
	return tr
}

// share is a tracker of everything, since opening one takes half a second.
func share(tb testing.TB) *Tracker {
	tb.Helper()
	if shared == nil {
		tr, err := Open(everything)
		if err != nil {
			tb.Fatal(err)
		}
		shared = tr
	}
	return shared
}

var shared *Tracker

// closeShared leaves the machine without a tracker of ours.
func closeShared(tb testing.TB) {
	tb.Helper()
	for _, tr := range []**Tracker{&shared, &sharedHooks} {
		if *tr == nil {
			continue
		}
		if err := (*tr).Close(); err != nil {
			tb.Fatal(err)
		}
		*tr = nil
	}
}

// everything is what the tracepoints tell, which all kernels have.
var everything = Options{Syscalls: true, StateSeconds: true, PerNamespace: true, Namespaces: 2000, Tier: TierC}

// since is the kernel that each story needs, major and minor, with tracefs and
// all rights, as README's table has it.
var since = map[string][2]int{
	StoryTransitions: {}, StoryResetsSent: {}, StoryResetsReceived: {},
	StoryStateSeconds: {5, 12}, StoryConnects: {5, 12}, StorySynackRetransmits: {5, 12},
	StoryBacklog: {6, 2}, StoryUnroutable: {6, 2},
	StoryConnections: {6, 3}, StoryAccepts: {6, 3},
	StoryIgnoredACKs: {6, 17},
}

// owed tells whether this kernel owes us a story, by tracepoints.
func owed(story string) bool {
	return !slices.Contains(hookStories, story) && scenario.KernelAtLeast(since[story][0], since[story][1])
}

// programsOwed is how many programs a tracker of everything attaches, those to
// returns of system calls apart.
func programsOwed() (events, returns int) {
	events = 4 // changes of state, ends of sockets, RSTs of both directions
	if tasksInterrupt() {
		events++ // changes of state again
	}
	for _, story := range []string{StorySynackRetransmits, StoryConnections, StoryIgnoredACKs} {
		if owed(story) {
			events++
		}
	}
	for story, calls := range map[string]int{StoryAccepts: 2, StoryBacklog: 1, StoryUnroutable: 1} {
		if owed(story) {
			returns += calls
		}
	}
	return events, returns
}

// needs tells whether this kernel is able to tell the stories that a test is
// about. Where it is not, needs sees that the tracker says so.
func needs(tb testing.TB, stories ...string) bool {
	tb.Helper()
	all := true
	for _, s := range share(tb).Stories() {
		if !slices.Contains(stories, s.Name) || owed(s.Name) {
			continue
		}
		all = false
		if s.Told() || s.Reason == "" {
			tb.Errorf("%s is told by %s on a kernel that is too old for it", s.Name, s.Mechanism)
		}
		tb.Logf("%s: %s", s.Name, s.Reason)
	}
	return all
}

// identify asks the kernel for a namespace's cookie and inode number. Namespaces
// without a cookie use each other's numbers again: what the shared tracker knows
// of another one is forgotten.
func identify(tb testing.TB, ns *scenario.Namespace) (id NamespaceID) {
	tb.Helper()
	ns.Do(func() {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			tb.Fatal(err)
		}
		defer unix.Close(fd)
		if !scenario.KernelAtLeast(5, 14) {
			return
		}
		if id.Cookie, err = unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE); err != nil {
			tb.Fatal(err)
		}
	})
	id.Inode = ns.Inode()
	if id.Cookie == 0 && shared != nil {
		if _, err := shared.Namespaces(); err != nil { // what was not read is not forgotten
			tb.Fatal(err)
		}
		if err := shared.Forget(id); err != nil {
			tb.Fatal(err)
		}
	}
	return id
}

// happened is what the tracker saw in a namespace.
func happened(tb testing.TB, tr *Tracker, id NamespaceID) Namespace {
	tb.Helper()
	list, err := tr.Namespaces()
	if err != nil {
		tb.Fatal(err)
	}
	for _, n := range list {
		if n.ID == id {
			return n
		}
	}
	return Namespace{ID: id, States: new([tcpstate.Count]Histogram)}
}

// heard is what the tracker saw at the listeners of a namespace, by key.
func heard(tb testing.TB, tr *Tracker, id NamespaceID) map[uint64]Listener {
	tb.Helper()
	list, err := tr.Listeners()
	if err != nil {
		tb.Fatal(err)
	}
	found := make(map[uint64]Listener)
	for _, l := range list {
		if l.Namespace == id {
			found[l.Key] = l
		}
	}
	return found
}

func lost(tb testing.TB, tr *Tracker) map[string]uint64 {
	tb.Helper()
	m, err := tr.Lost()
	if err != nil {
		tb.Fatal(err)
	}
	return m
}

func count(n *Namespace, from, to tcpstate.State) uint64 {
	i, ok := tcpstate.Index(tcpstate.Edge{From: from, To: to})
	if !ok {
		panic("no such edge")
	}
	return n.Transitions[i]
}

// edges are the transitions that happened, by name.
func edges(n *Namespace) map[string]uint64 {
	m := make(map[string]uint64)
	for i, count := range n.Transitions {
		if count != 0 {
			m[tcpstate.Transitions[i].String()] = count
		}
	}
	for e, count := range n.Unexpected {
		m["unexpected "+e.String()] = count
	}
	return m
}

// path counts n sockets that go through these states.
func path(m map[string]uint64, n uint64, states ...tcpstate.State) map[string]uint64 {
	if m == nil {
		m = make(map[string]uint64)
	}
	for i := range states[1:] {
		m[tcpstate.Edge{From: states[i], To: states[i+1]}.String()] += n
	}
	return m
}

func failures(n *Namespace) map[string]uint64 {
	m := make(map[string]uint64)
	for i, count := range n.ConnectFailures {
		if count != 0 {
			m[ConnectErrorNames[i]] = count
		}
	}
	return m
}

// become waits until got returns want. Softirqs may be late.
func become[T any](tb testing.TB, what string, want T, got func() T) {
	tb.Helper()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		difference := gocmp.Diff(want, got())
		if difference == "" {
			return
		}
		if time.Now().After(end) {
			tb.Fatalf("%s (-want +got):\n%s", what, difference)
		}
	}
}

// transitions waits until these happened in the namespace, and no others.
func transitions(tb testing.TB, tr *Tracker, id NamespaceID, want map[string]uint64) {
	tb.Helper()
	become(tb, "transitions", want, func() map[string]uint64 {
		n := happened(tb, tr, id)
		return edges(&n)
	})
}

// tally is what is counted at a listener.
type tally struct {
	Connections, Accepts, Waits uint64
	Backlog                     int32
	Listened                    bool
}

func tallyOf(l Listener) tally {
	return tally{l.Connections, l.Accepts, l.AcceptWait.Count(), l.Backlog, l.LastListen > 0}
}

func tallies(listeners map[uint64]Listener) map[uint64]tally {
	m := make(map[uint64]tally)
	for key, l := range maps.All(listeners) {
		m[key] = tallyOf(l)
	}
	return m
}

// endpoint is a socket of the test with its descriptor.
type endpoint struct {
	tb testing.TB
	fd int
}

// within makes a TCP socket in a namespace.
func within(tb testing.TB, ns *scenario.Namespace, domain, flags, protocol int) (e endpoint) {
	tb.Helper()
	ns.Do(func() {
		fd, err := unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|flags, protocol)
		if err != nil {
			tb.Fatal(err)
		}
		e = endpoint{tb, fd}
	})
	return e
}

func loopback4(port int) unix.Sockaddr {
	return &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: port}
}

// listenIn makes a listener that blocks.
func listenIn(tb testing.TB, ns *scenario.Namespace, backlog int) endpoint {
	tb.Helper()
	e := within(tb, ns, unix.AF_INET, 0, unix.IPPROTO_TCP)
	e.must(unix.Bind(e.fd, loopback4(0)), unix.Listen(e.fd, backlog))
	return e
}

func (e endpoint) must(errs ...error) {
	e.tb.Helper()
	for _, err := range errs {
		if err != nil {
			e.tb.Fatal(err)
		}
	}
}

func (e endpoint) address() unix.Sockaddr {
	e.tb.Helper()
	sa, err := unix.Getsockname(e.fd)
	e.must(err)
	return sa
}

func (e endpoint) addrPort() netip.AddrPort {
	e.tb.Helper()
	switch sa := e.address().(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port))
	}
	e.tb.Fatal("no address")
	return netip.AddrPort{}
}

func (e endpoint) cookie() uint64 {
	e.tb.Helper()
	cookie, err := unix.GetsockoptUint64(e.fd, unix.SOL_SOCKET, unix.SO_COOKIE)
	e.must(err)
	return cookie
}

// dial opens a connection to a listener of the namespace.
func dial(tb testing.TB, ns *scenario.Namespace, to endpoint) endpoint {
	tb.Helper()
	e := within(tb, ns, unix.AF_INET, 0, unix.IPPROTO_TCP)
	e.must(unix.Connect(e.fd, to.address()))
	return e
}

// queued waits until that many connections wait for accept().
func (e endpoint) queued(n uint32) {
	e.tb.Helper()
	become(e.tb, "accept queue", n, func() uint32 {
		info, err := unix.GetsockoptTCPInfo(e.fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		e.must(err)
		return info.Unacked
	})
}

func (e endpoint) accept() endpoint {
	e.tb.Helper()
	fd, _, err := unix.Accept4(e.fd, unix.SOCK_CLOEXEC)
	e.must(err)
	return endpoint{e.tb, fd}
}

func (e endpoint) close() {
	e.tb.Helper()
	e.must(unix.Close(e.fd))
}

// reset closes with a RST.
func (e endpoint) reset() {
	e.tb.Helper()
	e.must(unix.SetsockoptLinger(e.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}))
	e.close()
}

// hungUp waits for the peer's FIN.
func (e endpoint) hungUp() {
	e.tb.Helper()
	fds := []unix.PollFd{{Fd: int32(e.fd), Events: unix.POLLRDHUP}}
	for {
		n, err := unix.Poll(fds, 10_000)
		if err == unix.EINTR {
			continue
		}
		if n != 1 {
			e.tb.Fatalf("waited for a FIN in vain: %v", err)
		}
		return
	}
}
