package census_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sockq/probes/census"
	"sockq/probes/scenario"
	"sockq/probes/tcpstate"
)

// openWalk returns nil on kernels that are too old for the walk, where it sees
// that the walk says so.
func openWalk(t testing.TB) *census.Walk {
	t.Helper()
	walk, err := census.OpenWalk("/proc")
	if !scenario.KernelAtLeast(6, 4) {
		if err == nil {
			walk.Close()
			t.Fatal("the walk works before Linux 6.4")
		}
		if !strings.Contains(err.Error(), "needs Linux 6.4 or newer") {
			t.Fatalf("without the walk: %v", err)
		}
		t.Logf("no walk: %v", err)
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { walk.Close() })
	return walk
}

// openSockDiag sees the host's namespace and those given.
func openSockDiag(t testing.TB, namespaces ...*scenario.Namespace) *census.SockDiag {
	t.Helper()
	source, err := census.OpenSockDiag("/proc", func() (map[uint32]string, error) {
		paths := make(map[uint32]string)
		for _, n := range namespaces {
			paths[n.Inode()] = n.Path()
		}
		return paths, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { source.Close() })
	return source
}

// openSources opens all sources that this kernel has. The namespaces are those
// that sock_diag sees beside the host's.
func openSources(t testing.TB, namespaces ...*scenario.Namespace) []census.Source {
	t.Helper()
	sources := []census.Source{openSockDiag(t, namespaces...)}
	if walk := openWalk(t); walk != nil {
		sources = append(sources, walk)
	}
	return sources
}

// pairs holds connections to a listener of the namespace that nobody accepts.
func pairs(t testing.TB, n *scenario.Namespace, count int) netip.AddrPort {
	t.Helper()
	n.Sysctl("net.core.somaxconn", "65535")
	var at netip.AddrPort
	n.Do(func() {
		l := socket(t, n)
		if err := unix.Bind(l, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
			t.Fatal(err)
		}
		if err := unix.Listen(l, count); err != nil {
			t.Fatal(err)
		}
		name, err := unix.Getsockname(l)
		if err != nil {
			t.Fatal(err)
		}
		for range count {
			if err := unix.Connect(socket(t, n), name); err != nil {
				t.Fatal(err)
			}
		}
		at = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), uint16(name.(*unix.SockaddrInet4).Port))
	})
	return at
}

func socket(t testing.TB, _ *scenario.Namespace) int {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func countOf(t testing.TB, source census.Source, n *scenario.Namespace) census.NamespaceSockets {
	t.Helper()
	sockets, err := source.Sockets(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range sockets.Namespaces {
		if c.Inode == n.Inode() {
			return c
		}
	}
	return census.NamespaceSockets{Inode: n.Inode()}
}

func namespaceOf(t testing.TB, source census.Source, n *scenario.Namespace) (census.Namespace, bool) {
	t.Helper()
	list, err := source.Namespaces()
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(list, func(m census.Namespace) bool { return m.Inode == n.Inode() })
	if i < 0 {
		return census.Namespace{}, false
	}
	return list[i], true
}

// states is what sock_diag counts in a namespace.
func states(n *scenario.Namespace) (counts [tcpstate.Count]uint64) {
	for _, s := range n.Sockets(tcpstate.MaskAll) {
		counts[s.State.Reported()]++
	}
	return counts
}

// A namespace made under tcp_child_ehash_entries has an established table of its
// own (tcp_set_hashinfo, 6.1+); a small one has long chains.
func TestNamespaceWithATableOfItsOwn(t *testing.T) {
	parent := scenario.NewNamespace(t)
	if scenario.KernelAtLeast(6, 1) {
		parent.Sysctl("net.ipv4.tcp_child_ehash_entries", "16")
	}
	child := parent.Child()
	if scenario.KernelAtLeast(6, 1) {
		if entries := child.ReadSysctl("net.ipv4.tcp_ehash_entries"); entries != "16" {
			t.Fatalf("tcp_ehash_entries is %s in the child", entries)
		}
	}
	pairs(t, child, 700)
	pairs(t, parent, 30)
	for _, source := range openSources(t, parent, child) {
		for _, n := range []*scenario.Namespace{child, parent} {
			if got, want := countOf(t, source, n).States, states(n); got != want {
				t.Errorf("%s: states are %v, sock_diag has %v", source.Mechanism(), got, want)
			}
		}
		if got := countOf(t, source, child).States[tcpstate.Established]; got != 1400 {
			t.Errorf("%s: %d established, want 1400", source.Mechanism(), got)
		}
	}
}

func TestManyNamespaces(t *testing.T) {
	const count = 300
	var all []*scenario.Namespace
	for i := range count {
		n := scenario.NewNamespace(t)
		pairs(t, n, i%4)
		all = append(all, n)
	}
	for _, source := range openSources(t, all...) {
		t.Run(string(source.Mechanism()), func(t *testing.T) { manyNamespaces(t, source, all) })
	}
}

func manyNamespaces(t *testing.T, source census.Source, all []*scenario.Namespace) {
	list, err := source.Namespaces()
	if err != nil {
		t.Fatal(err)
	}
	listed := make(map[uint32]bool)
	initial := 0
	for _, n := range list {
		listed[n.Inode] = true
		if n.Initial {
			initial++
		}
	}
	if initial != 1 {
		t.Errorf("%d initial namespaces", initial)
	}
	sockets, err := source.Sockets(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	counted := make(map[uint32]census.NamespaceSockets)
	for _, c := range sockets.Namespaces {
		if _, twice := counted[c.Inode]; twice {
			t.Errorf("namespace %d is counted twice", c.Inode)
		}
		counted[c.Inode] = c
	}
	for i, n := range all {
		if !listed[n.Inode()] {
			t.Errorf("namespace %d is not listed", n.Inode())
		}
		want := [tcpstate.Count]uint64{tcpstate.Listen: 1, tcpstate.Established: uint64(2 * (i % 4))}
		if got := counted[n.Inode()].States; got != want {
			t.Errorf("namespace %d: states are %v, want %v", i, got, want)
		}
	}
	if lost := source.Lost(); !maps.Equal(lost, noLoss(lost)) {
		t.Errorf("lost: %v", lost)
	}
}

// noLoss is lost with every counter at 0.
func noLoss(lost map[string]uint64) map[string]uint64 {
	zero := make(map[string]uint64)
	for what := range lost {
		zero[what] = 0
	}
	return zero
}

// What stands still is counted exactly while others come and go around it.
func TestSocketsChangingUnderTheWalk(t *testing.T) {
	still, busy := scenario.NewNamespace(t), scenario.NewNamespace(t)
	pairs(t, still, 500)
	var source census.Source = openSockDiag(t, still, busy)
	if walk := openWalk(t); walk != nil {
		source = walk
	}
	stop := make(chan struct{})
	var churn sync.WaitGroup
	var made atomic.Uint64
	churn.Go(func() {
		busy.Do(func() {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Error(err)
				return
			}
			defer l.Close()
			for {
				select {
				case <-stop:
					return
				default:
				}
				c, err := net.Dial("tcp", l.Addr().String())
				if err != nil {
					t.Error(err)
					return
				}
				s, err := l.Accept()
				if err != nil {
					t.Error(err)
					return
				}
				// A reset leaves no TIME_WAIT, so that the ports last.
				_ = c.(*net.TCPConn).SetLinger(0)
				c.Close()
				s.Close()
				made.Add(1)
			}
		})
	})
	for i, end := 0, time.Now().Add(30*time.Second); i < 200 || made.Load() < 100 && time.Now().Before(end); i++ {
		if got := countOf(t, source, still).States[tcpstate.Established]; got != 1000 {
			t.Errorf("%d established, want 1000", got)
		}
	}
	close(stop)
	churn.Wait()
	if n := made.Load(); n < 100 {
		t.Errorf("only %d connections came and went meanwhile", n)
	}
	if got, want := countOf(t, source, busy).States, states(busy); got != want {
		t.Errorf("afterwards states are %v, sock_diag has %v", got, want)
	}
	t.Logf("%d connections came and went", made.Load())
}

// A namespace's settings and counters are its own, also without a process or a
// socket in it.
func TestSettingsAndCounters(t *testing.T) {
	n := scenario.NewNamespace(t)
	wanted := map[int]int64{
		census.SysctlSomaxconn: 1234, census.SysctlMaxSynBacklog: 777, census.SysctlSyncookies: 2,
		census.SysctlAbortOnOverflow: 1, census.SysctlSynackRetries: 3, census.SysctlSynRetries: 4,
		census.SysctlFinTimeout: 17, census.SysctlMaxTWBuckets: 4321, census.SysctlMaxOrphans: -1,
	}
	for i, v := range wanted {
		if v < 0 {
			continue
		}
		dir := "net.ipv4."
		if i == census.SysctlSomaxconn {
			dir = "net.core."
		}
		n.Sysctl(dir+census.SysctlNames[i], strconv.FormatInt(v, 10))
	}
	for _, source := range openSources(t, n) {
		got, ok := namespaceOf(t, source, n)
		if !ok {
			t.Fatalf("%s: the namespace is not listed", source.Mechanism())
		}
		if got.Initial {
			t.Errorf("%s: taken for the initial namespace", source.Mechanism())
		}
		for i, want := range wanted {
			if got.Sysctls[i] != want {
				t.Errorf("%s: %s is %d, want %d", source.Mechanism(), census.SysctlNames[i], got.Sysctls[i], want)
			}
		}
	}
	overflow(t, n)
	netstat := n.Netstat()
	if netstat["ListenOverflows"] != 3 || netstat["ListenDrops"] != 3 {
		t.Fatalf("ListenOverflows, ListenDrops are %d, %d", netstat["ListenOverflows"], netstat["ListenDrops"])
	}
	for _, source := range openSources(t, n) {
		got, _ := namespaceOf(t, source, n)
		for i, name := range census.EventNames {
			want, known := netstat[name]
			if got.EventsKnown[i] != known || got.Events[i] != want {
				t.Errorf("%s: %s is %d (%v), netstat has %d (%v)",
					source.Mechanism(), name, got.Events[i], got.EventsKnown[i], want, known)
			}
		}
	}
}

// overflow sends three SYNs to a listener whose accept queue is full.
func overflow(t *testing.T, n *scenario.Namespace) {
	t.Helper()
	n.Sysctl("net.ipv4.tcp_syn_retries", "1")
	n.Do(func() {
		l := socket(t, n)
		if err := unix.Bind(l, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
			t.Fatal(err)
		}
		if err := unix.Listen(l, 0); err != nil {
			t.Fatal(err)
		}
		name, err := unix.Getsockname(l)
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Connect(socket(t, n), name); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			c := socket(t, n)
			if err := unix.SetNonblock(c, true); err != nil {
				t.Fatal(err)
			}
			if err := unix.Connect(c, name); err != unix.EINPROGRESS {
				t.Fatalf("connect to a full queue: %v", err)
			}
			unix.Close(c) // no second SYN
		}
	})
}

// byAddress compares listeners of a namespace without what only one source has.
func byAddress(t *testing.T, source census.Source, n *scenario.Namespace) map[string]census.Listener {
	t.Helper()
	list, err := source.Listeners()
	if err != nil {
		t.Fatal(err)
	}
	found := make(map[string]census.Listener)
	for _, l := range list {
		if l.Inode != n.Inode() {
			continue
		}
		l.Key = 0
		key := fmt.Sprint(l.Address, l.Device, l.Cookie)
		if _, twice := found[key]; twice {
			t.Errorf("%s: %s is listed twice", source.Mechanism(), key)
		}
		l.SynQueue = 0
		found[key] = l
	}
	return found
}

func TestListenersAreSockDiags(t *testing.T) {
	n := scenario.NewNamespace(t)
	pairs(t, n, 7)
	n.Do(func() {
		for _, address := range []string{"0.0.0.0:80", "[::1]:81", "[::]:82"} {
			config := net.ListenConfig{}
			if address == "[::]:82" {
				config.Control = func(_, _ string, raw syscall.RawConn) error {
					var err error
					if cerr := raw.Control(func(fd uintptr) {
						err = unix.BindToDevice(int(fd), "lo")
					}); cerr != nil {
						return cerr
					}
					return err
				}
			}
			l, err := config.Listen(context.Background(), "tcp", address)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { l.Close() })
		}
	})
	overflow(t, n)
	// sock_diag first: it gives out the cookies.
	want := byAddress(t, openSockDiag(t, n), n)
	got := want
	if walk := openWalk(t); walk != nil {
		got = byAddress(t, walk, n)
	}
	if !maps.Equal(got, want) {
		t.Errorf("the walk has\n%v\nsock_diag has\n%v", got, want)
	}
	if len(want) != 5 {
		t.Errorf("%d listeners, want 5: %v", len(want), want)
	}
	devices := slices.Sorted(func(yield func(string) bool) {
		for _, l := range got {
			if !yield(l.Device) {
				return
			}
		}
	})
	if !slices.Equal(devices, []string{"", "", "", "", "lo"}) {
		t.Errorf("devices are %q", devices)
	}
	var drops uint32
	for _, l := range got {
		drops += l.Drops
		if l.Interface != 0 != (l.Device != "") {
			t.Errorf("interface of %s is %d", l.Device, l.Interface)
		}
	}
	if drops != 3 {
		t.Errorf("sk_drops sum up to %d, want 3", drops)
	}
}

func TestSourcesAgree(t *testing.T) {
	a, b := scenario.NewNamespace(t), scenario.NewNamespace(t)
	pairs(t, a, 40)
	pairs(t, b, 3)
	sources := openSources(t, a, b)
	for n, connections := range map[*scenario.Namespace]uint64{a: 40, b: 3} {
		first := countOf(t, sources[0], n)
		for _, source := range sources {
			if got := countOf(t, source, n); got != first {
				t.Errorf("%s has %+v, %s %+v", source.Mechanism(), got, sources[0].Mechanism(), first)
			}
		}
		if first.States[tcpstate.Established] != 2*connections || first.Cookie == 0 && scenario.KernelAtLeast(5, 14) {
			t.Errorf("counted: %+v", first)
		}
	}
}

// A namespace that cannot be entered costs itself only.
func TestUnreadableNamespaceIsCounted(t *testing.T) {
	n := scenario.NewNamespace(t)
	pairs(t, n, 3)
	source, err := census.OpenSockDiag("/proc", func() (map[uint32]string, error) {
		return map[uint32]string{n.Inode(): n.Path(), 77: "/proc/self/ns/mnt", 78: t.TempDir()}, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	if got := countOf(t, source, n).States[tcpstate.Established]; got != 6 {
		t.Errorf("%d established, want 6", got)
	}
	if lost := source.Lost()["namespaces"]; lost != 2 {
		t.Errorf("%d namespaces lost, want 2", lost)
	}
	if err := source.EntryError(); err != nil {
		t.Errorf("entry error: %v", err)
	}
}

func TestNamespaceThatDisappears(t *testing.T) {
	walk := openWalk(t)
	if walk == nil {
		return // sock_diag sees what it can enter
	}
	n := scenario.NewNamespace(t)
	pairs(t, n, 0)
	if _, ok := namespaceOf(t, walk, n); !ok {
		t.Fatal("the namespace is not listed")
	}
	first, _ := namespaceOf(t, walk, n)
	empty := scenario.NewNamespace(t)
	before, ok := namespaceOf(t, walk, empty)
	if !ok {
		t.Fatal("a namespace without process or socket is not listed")
	}
	empty.Close()
	gone := func() bool {
		list, err := walk.Namespaces()
		if err != nil {
			t.Fatal(err)
		}
		return !slices.ContainsFunc(list, func(m census.Namespace) bool { return m.Cookie == before.Cookie })
	}
	for end := time.Now().Add(10 * time.Second); !gone(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the namespace is still listed")
		}
	}
	if after, ok := namespaceOf(t, walk, n); !ok || after.Cookie != first.Cookie {
		t.Errorf("the other namespace is %+v", after)
	}
}

func TestCensusEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	for _, source := range openSources(t) {
		if _, err := source.Sockets(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", source.Mechanism(), err)
		}
	}
}
