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
// found it there. It counts that, about once in a million events; then the
// test is repeated. Where it hides the time of PID 1 from programs it does not
// count what it skips.
func TestChurn(t *testing.T) {
	if !needs(t, StoryAccepts, StoryStateSeconds) {
		return
	}
	connections := 100_000
	switch {
	case os.Getenv("SOCKQ_TEST_GUEST") != "": // where the CPU is emulated
		connections = 20_000
	case os.Getenv("CI") != "true" && (testing.Short() || raceDetector):
		connections = 10_000
	}
	closeShared(t)
	hides := hidesInit(t)
	for range 5 {
		missed, problems := churns(t, connections)
		if missed == 0 && (!hides || problems == nil) {
			for _, problem := range problems {
				t.Error(problem)
			}
			return
		}
		t.Logf("missed %d events: %q", missed, problems)
		if os.Getenv("SOCKQ_TEST_GUEST") != "" && missed <= uint64(connections)/10 {
			return
		}
	}
	t.Error("five times in a row events were missed")
}

// churns returns how many events were missed, and what is wrong.
func churns(t *testing.T, connections int) (missed uint64, problems []string) {
	ns := scenario.NewNamespace(t)
	ns.Sysctl("net.ipv4.tcp_max_tw_buckets", "1000")
	id := identify(t, ns)
	owners := recordOwners(t)
	tr := openTracker(t, everything)
	before := lost(t, tr)
	placesAreFound(t, tr, owners)

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

	wrong := func(format string, args ...any) { problems = append(problems, fmt.Sprintf(format, args...)) }
	all, at := uint64(connections), uint64(connections/churnEach)
	refused, queued := at*churnFailed, at*churnQueued
	n := happened(t, tr, id)
	kernel := ns.SNMP()
	into := func(state tcpstate.State) (n0 uint64) {
		for i, tr := range tcpstate.Transitions {
			if tr.To == state {
				n0 += n.Transitions[i]
			}
		}
		return n0
	}
	for name, c := range map[string]struct{ got, kernel, want uint64 }{
		"passive opens":      {count(&n, listens, synRecv), kernel["PassiveOpens"], all},
		"active opens":       {count(&n, closed, synSent) - n.ConnectFailures[ConnectNoPorts], kernel["ActiveOpens"], all + refused},
		"failed attempts":    {n.ConnectFailures[ConnectRefused], kernel["AttemptFails"], refused},
		"aborts":             {count(&n, established, closed) + count(&n, closeWait, closed), kernel["EstabResets"], kernel["EstabResets"]},
		"resets":             {total(n.ResetsSent), kernel["OutRsts"], kernel["OutRsts"]},
		"connects":           {n.Connects.Count(), kernel["PassiveOpens"], all},
		"left SYN_SENT":      {n.States[synSent].Count(), kernel["ActiveOpens"], all + refused},
		"left LISTEN":        {n.States[listens].Count(), at, at},
		"began to listen":    {count(&n, closed, listens), at, at},
		"ceased to listen":   {count(&n, listens, closed), at, at},
		"clients connected":  {count(&n, synSent, established), all, all},
		"servers connected":  {count(&n, synRecv, established), all, all},
		"left ESTABLISHED":   {n.States[established].Count(), 2 * all, 2 * all},
		"left FIN_WAIT1":     {n.States[finWait1].Count(), into(finWait1), into(finWait1)},
		"left CLOSE_WAIT":    {n.States[closeWait].Count(), into(closeWait), into(closeWait)},
		"left LAST_ACK":      {n.States[lastAck].Count(), into(lastAck), into(lastAck)},
		"left CLOSING":       {n.States[closing].Count(), into(closing), into(closing)},
		"failed connects":    {failuresOf(&n), refused, refused},
		"unexpected changes": {uint64(len(n.Unexpected)), 0, 0},
	} {
		if c.got != c.kernel || c.got != c.want {
			wrong("%s: %d, the kernel says %d, want %d", name, c.got, c.kernel, c.want)
		}
	}

	connected, accepted := uint64(0), uint64(0)
	for _, cookie := range slices.Concat(cookies...) {
		l, ok, err := tr.Take(cookie)
		if err != nil {
			t.Fatal(err)
		}
		if !ok || l.Connections != churnEach || l.Accepts != churnEach-churnQueued || l.AcceptWait.Count() != l.Accepts {
			wrong("listener %d is %t: %d connections, %d accepts, %d waits", cookie, ok, l.Connections, l.Accepts, l.AcceptWait.Count())
		}
		connected += l.Connections
		accepted += l.Accepts
	}
	if connected != all || accepted != all-queued {
		wrong("all listeners: %d connections and %d accepts, want %d and %d", connected, accepted, all, all-queued)
	}
	if rest := heard(t, tr, id); len(rest) != 0 {
		wrong("%d listeners are left", len(rest))
	}
	left := 0
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if left = places(t, tr, owners, id.Cookie); left == 0 {
			break
		}
	}
	if left != 0 {
		wrong("%d sockets that are gone keep their places", left)
	}
	for what, n := range lost(t, tr) {
		if n != before[what] {
			wrong("%d %s lost", n-before[what], what)
		}
	}
	seen := make(map[*ebpf.Program]bool)
	for _, story := range tr.Stories() {
		for _, p := range story.Programs {
			if seen[p] {
				continue
			}
			seen[p] = true
			n, err := tr.Misses(p)
			if err != nil {
				t.Fatal(err)
			}
			missed += n
		}
	}
	return missed, problems
}

// placesAreFound sees that a listener, a client and a child have places, and
// that they do no more when they are gone.
func placesAreFound(t *testing.T, tr *Tracker, owners *ebpf.Map) {
	t.Helper()
	ns := scenario.NewNamespace(t)
	l := listenIn(t, ns, 5)
	client := dial(t, ns, l)
	cookie := identify(t, ns).Cookie
	become(t, "places", 3, func() int { return places(t, tr, owners, cookie) })
	client.close()
	l.close()
	become(t, "places", 0, func() int { return places(t, tr, owners, cookie) })
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

// hidesInit tells whether this kernel runs no program of anybody else in the time
// of PID 1, interrupts included: a patch of some microVM kernels.
func hidesInit(t *testing.T) bool {
	t.Helper()
	kernel, err := btf.LoadKernelSpec()
	if err != nil {
		t.Fatal(err)
	}
	var aux *btf.Struct
	if err := kernel.TypeByName("bpf_prog_aux", &aux); err != nil {
		t.Fatal(err)
	}
	return slices.ContainsFunc(aux.Members, func(m btf.Member) bool { return m.Name == "init_owned" })
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

// places counts the places of the sockets table that a namespace's sockets have.
func places(t *testing.T, tr *Tracker, owners *ebpf.Map, cookie uint64) (n int) {
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

type place struct{ Since, Arrived, State uint64 }

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
