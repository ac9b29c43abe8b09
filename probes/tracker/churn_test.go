package tracker

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"sockq/probes/scenario"
	"sockq/probes/tcpstate"
)

const (
	churnEach   = 100 // connections to a listener
	churnQueued = 2   // of these nobody accepts
	churnFailed = 5   // that nobody listens to
)

// TestChurn opens and closes 100,000 connections in all ways, at 1,000 listeners
// that come and go, and holds every count against the kernel's.
//
// The kernel skips a program that is running on that CPU already: an interrupt
// found it there. It counts that, about once in a million events; then no count
// may be too high, nor lack more than was missed, and the test is repeated. Where
// it hides the time of PID 1 from programs it does not count what it skips.
// Before 6.1 it skips nothing.
func TestChurn(t *testing.T) {
	// Where the CPU is emulated, programs take so long that a run without an
	// interrupt in one is luck.
	connections, attempts, emulated := 100_000, 8, os.Getenv("SOCKQ_TEST_GUEST") != ""
	switch {
	case emulated:
		connections, attempts = 10_000, 3
	case os.Getenv("CI") != "true" && (testing.Short() || raceDetector):
		connections = 10_000
	}
	closeShared(t)
	hides := scenario.HidesInit()
	for range attempts {
		c := churns(t, connections)
		if c.missed == 0 && (!hides || c.differs == nil) {
			for _, difference := range c.differs {
				t.Error(difference)
			}
			return
		}
		t.Logf("missed %d events: %q", c.missed, c.differs)
		if hides {
			continue
		}
		for _, difference := range c.beyond {
			t.Errorf("missed %d events, which is no reason for %s", c.missed, difference)
		}
		if c.missed > uint64(connections)/10 {
			t.Errorf("missed %d events", c.missed)
		}
		if t.Failed() {
			return
		}
	}
	if !emulated {
		t.Errorf("%d times in a row events were missed", attempts)
	}
}

// comparison is what came of one churn.
type comparison struct {
	missed  uint64   // runs of programs
	differs []string // the counts that are not the kernel's
	beyond  []string // of these, what those runs cannot have left out
}

func (c *comparison) differ(explained bool, format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	c.differs = append(c.differs, text)
	if !explained {
		c.beyond = append(c.beyond, text)
	}
}

// equal compares a count with what it has to be. Each run counts an event once.
func (c *comparison) equal(what string, got, want uint64) {
	if got != want {
		c.differ(got < want && want-got <= c.missed, "%s: %d, want %d", what, got, want)
	}
}

// nothing says what is left over. Each run removes one thing.
func (c *comparison) nothing(left uint64, what string) {
	if left != 0 {
		c.differ(left <= c.missed, "%d %s", left, what)
	}
}

func churns(t *testing.T, connections int) *comparison {
	ns := scenario.NewNamespace(t)
	ns.Sysctl("net.ipv4.tcp_max_tw_buckets", "1000")
	id := identify(t, ns)
	tr := openTracker(t, everything)
	before := lost(t, tr)
	places := func() int { return 0 }
	if owed(StoryStateSeconds) {
		owners := recordOwners(t)
		placesAreFound(t, tr, owners)
		places = func() int { return placesOf(t, tr, owners, id.Cookie) }
	}

	began := time.Now()
	var failed atomic.Bool
	var wait sync.WaitGroup
	const workers = 4
	cookies := make([][]uint64, workers)
	for w := range workers {
		wait.Go(func() {
			ns.Do(func() {
				for i := w * churnEach; i < connections && !failed.Load(); i += workers * churnEach {
					cookie, err := churn(i / churnEach)
					if err != nil {
						failed.Store(true)
						t.Error(err)
					}
					cookies[w] = append(cookies[w], cookie)
				}
			})
		})
	}
	wait.Wait()
	if failed.Load() {
		t.FailNow()
	}
	took := time.Since(began)
	t.Logf("%d connections in %s: %.0f/s", connections, took, float64(connections)/took.Seconds())
	become(t, "sockets", 0, func() int { return len(ns.Sockets(tcpstate.MaskAll &^ tcpstate.MaskOf(tcpstate.TimeWait))) })

	all, at := uint64(connections), uint64(connections/churnEach)
	n := happened(t, tr, id)
	kernel := ns.SNMP()
	for name, want := range map[string]uint64{
		"PassiveOpens": all, "ActiveOpens": all + at*churnFailed, "AttemptFails": at * churnFailed,
	} {
		if kernel[name] != want {
			t.Errorf("the kernel says %s: %d, want %d", name, kernel[name], want)
		}
	}
	c := &comparison{missed: misses(t, tr)}
	c.namespace(&n, kernel, at)
	c.listeners(t, tr, slices.Concat(cookies...), at)
	c.nothing(uint64(len(heard(t, tr, id))), "listeners are left")
	left := 0
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if left = places(); left == 0 {
			break
		}
	}
	c.nothing(uint64(left), "sockets that are gone keep their places")
	for what, n := range lost(t, tr) {
		c.nothing(n-before[what], what+" lost")
	}
	return c
}

// namespace compares what happened to at listeners and their connections.
func (c *comparison) namespace(n *Namespace, kernel map[string]uint64, at uint64) {
	all := at * churnEach
	c.equal("passive opens", count(n, listens, synRecv), kernel["PassiveOpens"])
	c.equal("active opens", count(n, closed, synSent)-n.ConnectFailures[ConnectNoPorts], kernel["ActiveOpens"])
	c.equal("aborts", count(n, established, closed)+count(n, closeWait, closed), kernel["EstabResets"])
	c.equal("began to listen", count(n, closed, listens), at)
	c.equal("ceased to listen", count(n, listens, closed), at)
	c.equal("clients connected", count(n, synSent, established), all)
	c.equal("servers connected", count(n, synRecv, established), all)
	if scenario.KernelAtLeast(6, 12) { // RSTs without a socket, too
		c.equal("resets", total(n.ResetsSent), kernel["OutRsts"])
	}
	if len(n.Unexpected) != 0 {
		c.differ(false, "unexpected changes: %v", n.Unexpected)
	}
	if owed(StoryConnects) {
		c.equal("connects", n.Connects.Count(), kernel["PassiveOpens"])
		c.equal("failed attempts", n.ConnectFailures[ConnectRefused], kernel["AttemptFails"])
		c.equal("failed connects", failuresOf(n), kernel["AttemptFails"])
	}
	if owed(StoryStateSeconds) {
		c.equal("left SYN_SENT", n.States[synSent].Count(), kernel["ActiveOpens"])
		c.equal("left LISTEN", n.States[listens].Count(), at)
		c.equal("left ESTABLISHED", n.States[established].Count(), 2*all)
		for _, state := range []tcpstate.State{finWait1, closeWait, lastAck, closing} {
			into := uint64(0)
			for i, tr := range tcpstate.Transitions {
				if tr.To == state {
					into += n.Transitions[i]
				}
			}
			c.equal("left "+state.String(), n.States[state].Count(), into)
		}
	}
}

// listeners takes the listeners with these cookies and compares what happened there.
func (c *comparison) listeners(t *testing.T, tr *Tracker, cookies []uint64, at uint64) {
	if !owed(StoryAccepts) {
		return
	}
	var connections, accepts, waits uint64
	const accepted = churnEach - churnQueued
	for _, cookie := range cookies {
		l, ok, err := tr.Take(cookie)
		if err != nil {
			t.Fatal(err)
		}
		if !ok {
			c.differ(c.missed >= churnEach, "listener %d is unknown", cookie)
		}
		c.equal(fmt.Sprintf("connections of listener %d", cookie), l.Connections, churnEach)
		c.equal(fmt.Sprintf("accepts of listener %d", cookie), l.Accepts, accepted)
		c.equal(fmt.Sprintf("waits of listener %d", cookie), l.AcceptWait.Count(), accepted)
		connections += l.Connections
		accepts += l.Accepts
		waits += l.AcceptWait.Count()
	}
	c.equal("connections of all listeners", connections, at*churnEach)
	c.equal("accepts of all listeners", accepts, at*accepted)
	c.equal("waits of all listeners", waits, at*accepted)
}

// misses is how many events the programs of the tracker missed.
func misses(t *testing.T, tr *Tracker) (n uint64) {
	t.Helper()
	seen := make(map[*ebpf.Program]bool)
	for _, story := range tr.Stories() {
		for _, p := range story.Programs {
			if seen[p] {
				continue
			}
			seen[p] = true
			missed, err := tr.Misses(p)
			if err != nil && !errors.Is(err, ErrMissesUnknown) {
				t.Fatal(err)
			}
			n += missed
		}
	}
	return n
}

// placesAreFound sees that a listener, a client and a child have places, and
// that they do no more when they are gone.
func placesAreFound(t *testing.T, tr *Tracker, owners *ebpf.Map) {
	t.Helper()
	ns := scenario.NewNamespace(t)
	l := listenIn(t, ns, 5)
	client := dial(t, ns, l)
	cookie := identify(t, ns).Cookie
	become(t, "places", 3, func() int { return placesOf(t, tr, owners, cookie) })
	client.close()
	l.close()
	become(t, "places", 0, func() int { return placesOf(t, tr, owners, cookie) })
}

func total(m map[string]uint64) (n uint64) {
	for _, v := range m {
		n += v
	}
	return n
}

func failuresOf(n *Namespace) (sum uint64) {
	for _, v := range n.ConnectFailures {
		sum += v
	}
	return sum
}

// churn is the life of a listener and its connections, in the namespace of the
// thread. It returns the listener's cookie.
func churn(number int) (cookie uint64, err error) {
	var fds []int
	defer func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	}()
	domain, nobody, at := unix.AF_INET, loopback4(1), loopback4(0)
	if number%2 == 1 {
		domain = unix.AF_INET6
		nobody, at = &unix.SockaddrInet6{Addr: [16]byte{15: 1}, Port: 1}, &unix.SockaddrInet6{Addr: [16]byte{15: 1}}
	}
	socket := func() (int, error) { return unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0) }
	l, err := socket()
	if err != nil {
		return 0, err
	}
	fds = append(fds, l)
	if err := errors.Join(
		unix.SetsockoptInt(l, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1), unix.Bind(l, at), unix.Listen(l, churnEach),
	); err != nil {
		return 0, err
	}
	if cookie, err = unix.GetsockoptUint64(l, unix.SOL_SOCKET, unix.SO_COOKIE); err != nil {
		return 0, err
	}
	if at, err = unix.Getsockname(l); err != nil {
		return 0, err
	}
	for i := range churnEach - churnQueued {
		client, err := socket()
		if err != nil {
			return 0, err
		}
		if err := unix.Connect(client, at); err != nil {
			return 0, errors.Join(err, unix.Close(client))
		}
		server, errno := acceptBy(l, i%5 == 0, 0, 0)
		if errno != 0 {
			return 0, errors.Join(errno, unix.Close(client))
		}
		first, second := client, server
		if i%2 == 0 {
			first, second = server, client
		}
		if i%4 >= 2 {
			err = unix.SetsockoptLinger(first, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
		}
		if err := errors.Join(err, unix.Close(first), unix.Close(second)); err != nil {
			return 0, err
		}
	}
	for range churnQueued {
		client, err := socket()
		if err != nil {
			return 0, err
		}
		fds = append(fds, client)
		if err := unix.Connect(client, at); err != nil {
			return 0, err
		}
	}
	for end := time.Now().Add(10 * time.Second); ; {
		info, err := unix.GetsockoptTCPInfo(l, unix.IPPROTO_TCP, unix.TCP_INFO)
		if err != nil {
			return 0, err
		}
		if info.Unacked == churnQueued {
			break
		}
		if time.Now().After(end) {
			return 0, errors.New("a connection did not arrive")
		}
	}
	for range churnFailed {
		client, err := socket()
		if err != nil {
			return 0, err
		}
		err = unix.Connect(client, nobody)
		unix.Close(client)
		if !errors.Is(err, unix.ECONNREFUSED) {
			return 0, errors.Join(errors.New("connect to nobody"), err)
		}
	}
	return cookie, nil
}

// recordOwners keeps, for each socket's address in the kernel, the cookie of the
// namespace that the last socket there belonged to: addresses are used again,
// also by other programs of this machine.
func recordOwners(t *testing.T) *ebpf.Map {
	t.Helper()
	kernel, err := btf.LoadKernelSpec()
	if err != nil {
		t.Fatal(err)
	}
	owners, err := ebpf.NewMap(&ebpf.MapSpec{Name: "owners", Type: ebpf.Hash, KeySize: 8, ValueSize: 8, MaxEntries: 1 << 18})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { owners.Close() })
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "record_owner", Type: ebpf.Tracing, AttachType: ebpf.AttachTraceRawTp, AttachTo: "inet_sock_set_state",
		License: "Dual BSD/GPL",
		Instructions: asm.Instructions{
			asm.LoadMem(asm.R1, asm.R1, 0, asm.DWord),
			asm.StoreMem(asm.RFP, -8, asm.R1, asm.DWord),
			asm.LoadMem(asm.R2, asm.R1, offset(t, kernel, "sock_common", "skc_net"), asm.DWord),
			asm.LoadMem(asm.R2, asm.R2, offset(t, kernel, "net", "net_cookie"), asm.DWord),
			asm.StoreMem(asm.RFP, -16, asm.R2, asm.DWord),
			asm.LoadMapPtr(asm.R1, owners.FD()),
			asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, -8),
			asm.Mov.Reg(asm.R3, asm.RFP), asm.Add.Imm(asm.R3, -16),
			asm.Mov.Imm(asm.R4, 0),
			asm.FnMapUpdateElem.Call(),
			asm.Mov.Imm(asm.R0, 0),
			asm.Return(),
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { program.Close() })
	attached, err := link.AttachTracing(link.TracingOptions{Program: program})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { attached.Close() })
	return owners
}

func offset(t *testing.T, kernel *btf.Spec, name, field string) int16 {
	t.Helper()
	var s *btf.Struct
	if err := kernel.TypeByName(name, &s); err != nil {
		t.Fatal(err)
	}
	for _, m := range s.Members {
		if m.Name == field {
			return int16(m.Offset.Bytes())
		}
	}
	t.Fatalf("struct %s has no %s", name, field)
	return 0
}

// placesOf counts the places of the sockets table that a namespace's sockets have.
func placesOf(t *testing.T, tr *Tracker, owners *ebpf.Map, cookie uint64) (n int) {
	t.Helper()
	for _, bucket := range table(t, tr) {
		for _, sk := range bucket.Sk {
			var owner uint64
			if sk != 0 && owners.Lookup(sk, &owner) == nil && owner == cookie {
				n++
			}
		}
	}
	return n
}

// bucket is struct sockets_bucket.
type bucket struct {
	Sk     [16]uint64
	Places [16]place
}

type place struct {
	Since, Arrived uint64
	State, WaitsAs uint32
}

// table is the whole sockets table.
func table(t *testing.T, tr *Tracker) []bucket {
	t.Helper()
	m := tr.maps["sockets"]
	buckets := make([]bucket, m.MaxEntries())
	keys := make([]uint32, len(buckets))
	var cursor ebpf.MapBatchCursor
	n, err := m.BatchLookup(&cursor, keys, buckets, nil)
	if n != len(buckets) || err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		t.Fatalf("read sockets table: %d buckets, %v", n, err)
	}
	return buckets
}
