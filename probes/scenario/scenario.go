package scenario

import (
	"maps"
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// Scenario is something that happens to sockets.
type Scenario struct {
	Name     string // of the subtest
	About    string
	Families []Family // nil for both
	Named    bool     // a bind mount keeps the namespace, else a descriptor
	Play     func(s *Stage)
}

// Stage is where a scenario plays: a namespace, with sockets and peers in it
// that live until the test ends.
type Stage struct {
	testing.TB
	NS     *Namespace
	Family Family

	check   func(Expect)
	last    Expect
	mass    Expect
	netstat map[string]uint64 // when the scenario began
	snmp    map[string]uint64
	sockets []*Socket
	peers   map[Family]*Peer
	port    uint16
	gone    func() bool
}

// firstPort is where the ports of a stage's listeners start.
const firstPort = 8000

// NewStage is a stage without a scenario, for tests that tell their own story.
func NewStage(tb testing.TB, family Family) *Stage {
	tb.Helper()
	return newStage(tb, NewNamespace(tb), family)
}

func newStage(tb testing.TB, ns *Namespace, family Family) *Stage {
	tb.Helper()
	s := &Stage{TB: tb, NS: ns, Family: family, peers: make(map[Family]*Peer), port: firstPort}
	tb.Cleanup(s.closeSockets)
	s.netstat, s.snmp = ns.Netstat(), ns.SNMP()
	return s
}

func (s *Stage) closeSockets() {
	for _, k := range s.sockets {
		k.Close()
	}
}

// Next is the next free address on loopback.
func (s *Stage) Next() netip.AddrPort {
	s.port++
	return netip.AddrPortFrom(s.Family.Loopback(), s.port-1)
}

// Listen starts to listen on the next free address.
func (s *Stage) Listen(backlog int) *Socket {
	s.Helper()
	return s.Socket().Bind(s.Next()).Listen(backlog)
}

// Connect opens a connection.
func (s *Stage) Connect(to netip.AddrPort) *Socket {
	s.Helper()
	return s.Socket().Connect(to)
}

// Begin asks for a connection and waits for no answer.
func (s *Stage) Begin(to netip.AddrPort) *Socket {
	s.Helper()
	return s.Socket().Begin(to)
}

// Peer is the stage's silent peer.
func (s *Stage) Peer() *Peer { s.Helper(); return s.peer(s.Family) }

func (s *Stage) peer(family Family) *Peer {
	s.Helper()
	if s.peers[family] == nil {
		s.peers[family] = newPeer(s, family)
	}
	return s.peers[family]
}

// Settle waits until the kernel, by sock_diag and /proc/net/netstat, shows
// exactly want. The test fails if it does not come to that.
func (s *Stage) Settle(want Expect) {
	s.Helper()
	s.settle(want)
}

// Check is where a scenario stands still: it settles, lets the caller compare
// his own view with want, and sees that nothing moved meanwhile.
func (s *Stage) Check(want Expect) {
	s.Helper()
	s.last = want
	before := s.settle(want)
	if s.check == nil {
		return
	}
	s.check(want)
	got, after := s.observe(want)
	if difference := diff(want.lines(), got.lines()); difference != "" {
		s.Fatalf("moved during the check (-scenario +kernel):\n%s", difference)
	}
	if !maps.Equal(before, after) {
		s.Fatalf("sockets changed during the check: %v, then %v", before, after)
	}
}

// End closes everything on the stage, the namespace last. A RST ends what is
// still connected, since an orphan would keep the namespace.
func (s *Stage) End() {
	s.Helper()
	s.gone = s.NS.watch()
	for _, k := range s.sockets {
		if k.fd >= 0 {
			k.Reset()
		}
	}
	for _, p := range s.peers {
		p.close()
	}
	s.NS.Close()
}

// Run plays all scenarios, a subtest each and in it one for each family. At
// each point where one stands still it compares the kernel's view with the
// scenario's and calls check, which may be nil.
//
// A check takes seconds at most: see Hold. It can name the namespace for others
// by a symbolic link to ns.Path(). What is Expect.Gone cannot be entered.
func Run(t *testing.T, check func(tb testing.TB, ns *Namespace, want Expect)) {
	RunFrom(t, nil, func() uint64 { return 0 }, check)
}

// RunFrom is Run that calls begin, which may be nil, in each new namespace before
// anything happens there, and plays a scenario again that failed while missed grew:
// the events that the kernel kept from the programs under test, so far.
func RunFrom(t *testing.T, begin func(tb testing.TB, ns *Namespace), missed func() uint64,
	check func(tb testing.TB, ns *Namespace, want Expect)) {
	for _, sc := range All {
		t.Run(sc.Name, func(t *testing.T) {
			for _, family := range sc.families() {
				t.Run(family.String(), func(t *testing.T) {
					Play(t, missed, func(tb testing.TB) {
						s := sc.stage(tb, family)
						if begin != nil {
							begin(tb, s.NS)
						}
						s.check = func(want Expect) {
							if check != nil {
								check(tb, s.NS, want)
							}
						}
						sc.Play(s)
					})
				})
			}
		})
	}
}

// Hold plays a scenario up to the end and leaves what its last Check says
// standing until the test ends. The kernel's own timers end it, too: half-open
// requests, time-waits and orphans last a minute, the requests of a full SYN
// queue seven seconds (reqsk_timer_handler).
func (sc Scenario) Hold(tb testing.TB, family Family) (*Namespace, Expect) {
	tb.Helper()
	if !slices.Contains(sc.families(), family) {
		tb.Fatalf("scenario %s does not play over %s", sc.Name, family)
	}
	s := sc.stage(tb, family)
	sc.Play(s)
	return s.NS, s.last
}

func (sc Scenario) families() []Family {
	if sc.Families == nil {
		return []Family{IPv4, IPv6}
	}
	return sc.Families
}

func (sc Scenario) stage(tb testing.TB, family Family) *Stage {
	tb.Helper()
	tb.Log(sc.About)
	if sc.Named {
		return newStage(tb, NewNamed(tb, tb.TempDir(), "scenario"), family)
	}
	return newStage(tb, NewNamespace(tb), family)
}

// watch returns a function that tells whether the kernel still has the
// namespace, without keeping it.
func (n *Namespace) watch() (gone func() bool) {
	n.tb.Helper()
	fd, err := unix.Open(n.path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		n.tb.Fatalf("watch network namespace: %v", err)
	}
	defer unix.Close(fd)
	watcher := NewNamespace(n.tb)
	watcher.Do(func() {
		if err := giveID(fd); err != nil {
			n.tb.Fatal(err)
		}
	})
	return func() (gone bool) {
		watcher.Do(func() {
			ids, err := countIDs()
			if err != nil {
				n.tb.Fatal(err)
			}
			gone = ids == 0
		})
		return gone
	}
}

// All are the scenarios.
var All = slices.Concat(
	states, backlogs, synQueues, listeners, queues, lifetimes,
	handshakes, closes, connects, resets, overflows, accepts, []Scenario{Mixed},
)
