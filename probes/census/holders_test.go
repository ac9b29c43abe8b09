package census_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"reflect"
	"slices"
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

// patience bounds what takes no time.
const patience = 20 * time.Second

func openHolders(t testing.TB) *census.Holders {
	t.Helper()
	holders, err := census.OpenHolders()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { holders.Close() })
	return holders
}

// readHolders reads what processes hold, with what the source knows.
func readHolders(t testing.TB, holders *census.Holders, source census.Source) *census.Held {
	t.Helper()
	namespaces, err := source.Namespaces()
	if err != nil {
		t.Fatal(err)
	}
	listeners, err := source.Listeners()
	if err != nil {
		t.Fatal(err)
	}
	held, err := holders.Read(context.Background(), namespaces, listeners)
	if err != nil {
		t.Fatal(err)
	}
	return held
}

// heldIn is what is held of one namespace, in order and without ages.
func heldIn(n *scenario.Namespace, held *census.Held, listeners map[uint64]bool) (in census.Held) {
	for _, l := range held.Listeners {
		if listeners[l.Socket] {
			in.Listeners = append(in.Listeners, l)
		}
	}
	for _, p := range held.Processes {
		if p.Inode == n.Inode() {
			p.OldestCloseWait, p.OldestFinWait2, p.NetnsCookie = 0, 0, 0
			in.Processes = append(in.Processes, p)
		}
	}
	slices.SortFunc(in.Listeners, func(a, b census.ListenerHolder) int {
		return cmp.Or(cmp.Compare(a.Socket, b.Socket), cmp.Compare(a.PID, b.PID))
	})
	slices.SortFunc(in.Processes, func(a, b census.Process) int { return cmp.Compare(a.PID, b.PID) })
	return in
}

// wantHeld is the same from sock_diag and /proc/PID/fd. listeners are the
// numbers of the listening sockets.
func wantHeld(t testing.TB, n *scenario.Namespace) (want census.Held, listeners map[uint64]bool) {
	t.Helper()
	type socketOf struct {
		state         tcpstate.State
		port          uint16
		receive, send uint64
	}
	sockets, ports := make(map[string]socketOf), make(map[uint16]bool)
	listeners = make(map[uint64]bool)
	for _, s := range n.Sockets(tcpstate.MaskAll) {
		if s.Inode == 0 {
			continue
		}
		of := socketOf{state: s.State, port: s.Local.Port()}
		if s.State == tcpstate.Listen {
			ports[of.port] = true
			listeners[uint64(s.Inode)] = true
		} else if receive, send, ok := s.ByteQueues(); ok {
			of.receive, of.send = uint64(receive), uint64(send)
		}
		sockets[fmt.Sprintf("socket:[%d]", s.Inode)] = of
	}
	files := readLinks(t)
	slices.SortStableFunc(files, func(a, b fileOf) int { return cmp.Compare(a.pid, b.pid) })
	counted := make(map[string]bool)
	processes := make(map[uint32]*census.Process)
	for _, f := range files {
		s, ok := sockets[f.link]
		if !ok || s.state == tcpstate.Close {
			continue
		}
		comm := commOf(t, f.pid)
		if s.state == tcpstate.Listen {
			var inode uint64
			if _, err := fmt.Sscanf(f.link, "socket:[%d]", &inode); err != nil {
				t.Fatal(err)
			}
			l := census.ListenerHolder{Socket: inode, PID: f.pid, Comm: comm}
			if !slices.Contains(want.Listeners, l) {
				want.Listeners = append(want.Listeners, l)
			}
			continue
		}
		waits := s.state == tcpstate.CloseWait || s.state == tcpstate.FinWait2
		if counted[f.link] || !waits && s.receive|s.send == 0 {
			continue
		}
		counted[f.link] = true
		p := processes[f.pid]
		if p == nil {
			p = &census.Process{PID: f.pid, Comm: comm, Inode: n.Inode(), QueuesKnown: true}
			processes[f.pid] = p
		}
		switch s.state {
		case tcpstate.CloseWait:
			p.CloseWait++
		case tcpstate.FinWait2:
			p.FinWait2++
		}
		direction := census.Outbound
		if ports[s.port] {
			direction = census.Inbound
		}
		q := &p.Queues[direction]
		q.ReceiveBytes += s.receive
		q.SendBytes += s.send
		q.ReceiveMaxBytes = max(q.ReceiveMaxBytes, s.receive)
		q.SendMaxBytes = max(q.SendMaxBytes, s.send)
	}
	for _, p := range processes {
		want.Processes = append(want.Processes, *p)
	}
	return heldIn(n, &want, listeners), listeners
}

func commOf(t testing.TB, pid uint32) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

// compareHeld waits until what moves has come to rest, and returns what both say.
func compareHeld(t testing.TB, n *scenario.Namespace, holders *census.Holders, source census.Source) census.Held {
	t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		want, listeners := wantHeld(t, n)
		got := heldIn(n, readHolders(t, holders, source), listeners)
		if reflect.DeepEqual(got, want) {
			return got
		}
		if time.Now().After(end) {
			t.Fatalf("held are\n%+v\nsock_diag and /proc have\n%+v", got, want)
		}
	}
}

// listenIn returns a listener on a port of its own.
func listenIn(t testing.TB, n *scenario.Namespace, protocol int) (fd int) {
	t.Helper()
	n.Do(func() {
		var err error
		if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, protocol); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
			t.Fatal(err)
		}
		if err := unix.Listen(fd, 64); err != nil {
			t.Fatal(err)
		}
	})
	return fd
}

func portOf(t testing.TB, fd int) uint16 {
	t.Helper()
	name, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	return uint16(name.(*unix.SockaddrInet4).Port)
}

func connectTo(t testing.TB, n *scenario.Namespace, listener int) (client int) {
	t.Helper()
	n.Do(func() {
		name, err := unix.Getsockname(listener)
		if err != nil {
			t.Fatal(err)
		}
		client = socket(t, n)
		if err := unix.Connect(client, name); err != nil {
			t.Fatal(err)
		}
	})
	return client
}

func acceptFrom(t testing.TB, listener int) (server int) {
	t.Helper()
	server, _, err := unix.Accept4(listener, unix.SOCK_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(server) })
	return server
}

func connectedTo(t testing.TB, n *scenario.Namespace, listener int) (client, server int) {
	t.Helper()
	client = connectTo(t, n, listener)
	return client, acceptFrom(t, listener)
}

// closeSocket closes what the end of the test would close: the number must not be
// another file's then.
func closeSocket(t testing.TB, fd int) {
	t.Helper()
	null, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(null)
	if err := unix.Dup3(null, fd, unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
}

func inodeOf(t testing.TB, fd int) uint64 {
	t.Helper()
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		t.Fatal(err)
	}
	return stat.Ino
}

func write(t testing.TB, fd, bytes int) {
	t.Helper()
	if n, err := unix.Write(fd, make([]byte, bytes)); n != bytes || err != nil {
		t.Fatalf("write: %d, %v", n, err)
	}
}

func duplicate(t testing.TB, fd int) {
	t.Helper()
	other, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(other) })
}

func hasMPTCP(n *scenario.Namespace) (has bool) {
	n.Do(func() {
		_, err := os.Stat("/proc/sys/net/mptcp/enabled")
		has = err == nil
	})
	return has
}

// Listeners and connections of a process, of several, open twice, handed over,
// with bytes in every queue.
func TestHoldersAreThoseOfProc(t *testing.T) {
	n := scenario.NewNamespace(t)
	a, b := listenIn(t, n, 0), listenIn(t, n, 0)
	duplicate(t, a)

	var leaks []int
	for range 5 {
		client, server := connectedTo(t, n, a)
		closeSocket(t, client)
		leaks = append(leaks, server)
	}
	duplicate(t, leaks[0])
	for range 3 { // CLOSE_WAIT and FIN_WAIT2
		client, _ := connectedTo(t, n, b)
		if err := unix.Shutdown(client, unix.SHUT_WR); err != nil {
			t.Fatal(err)
		}
	}
	client, server := connectedTo(t, n, a)
	write(t, client, 10)
	write(t, server, 4)
	_, server = connectedTo(t, n, b)
	write(t, server, 7)
	full, _ := connectedTo(t, n, b) // until the peer's window is closed
	if err := unix.SetNonblock(full, true); err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := unix.Write(full, make([]byte, 1<<16)); err == unix.EAGAIN {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	inodes := map[uint64]bool{inodeOf(t, a): true, inodeOf(t, b): true}
	if hasMPTCP(n) {
		n.Sysctl("net.mptcp.enabled", "1")
		m := listenIn(t, n, unix.IPPROTO_MPTCP)
		client, _ := connectedTo(t, n, m)
		closeSocket(t, client)
		inodes[inodeOf(t, m)] = true
	} else if scenario.KernelAtLeast(6, 1) {
		t.Error("this kernel has no MPTCP")
	}

	shares := startHolder(t, "shares", a, leaks[1], leaks[2])
	alone := startHolder(t, "alone", a, a, leaks[3], leaks[4])
	closeSocket(t, leaks[3])
	closeSocket(t, leaks[4])

	for _, source := range openSources(t, n) {
		t.Run(string(source.Mechanism()), func(t *testing.T) {
			holders := openHolders(t)
			held := compareHeld(t, n, holders, source)
			var of []uint32
			for _, l := range held.Listeners {
				if l.Socket == inodeOf(t, a) {
					of = append(of, l.PID)
				}
			}
			slices.Sort(of)
			if want := sorted(uint32(os.Getpid()), shares.pid(), alone.pid()); !slices.Equal(of, want) {
				t.Errorf("holders of the first listener are %d, want %d", of, want)
			}
			i := slices.IndexFunc(held.Processes, func(p census.Process) bool { return p.PID == alone.pid() })
			if i < 0 || held.Processes[i].Comm != "alone" || held.Processes[i].CloseWait != 2 {
				t.Errorf("the two leaks of process %d are not among %+v", alone.pid(), held.Processes)
			}
			var sum census.Process
			for _, p := range held.Processes {
				sum.CloseWait += p.CloseWait
				sum.FinWait2 += p.FinWait2
			}
			if want := uint64(5 + 3 + len(inodes) - 2); sum.CloseWait != want || sum.FinWait2 != 3 {
				t.Errorf("%d in CLOSE_WAIT, %d in FIN_WAIT2, want %d and 3", sum.CloseWait, sum.FinWait2, want)
			}
			listeners, err := source.Listeners()
			if err != nil {
				t.Fatal(err)
			}
			sockets := make(map[uint64]bool)
			for _, l := range listeners {
				if l.Inode == n.Inode() {
					sockets[l.Socket] = true
				}
			}
			if !maps.Equal(sockets, inodes) {
				t.Errorf("the listeners' sockets are %v, want %v", sockets, inodes)
			}
			if lost := holders.Lost(); !maps.Equal(lost, noLoss(lost)) {
				t.Errorf("lost: %v", lost)
			}
		})
	}
}

// More files than the kernel visits in one call.
func TestHoldersOfManyFiles(t *testing.T) {
	n := scenario.NewNamespace(t)
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	const count = 20_000 // FILES_PER_CALL are 16,384
	each := int(min(limit.Cur, 20_000)) - 100
	for open := 0; ; open += each {
		l := listenIn(t, n, 0)
		client, server := connectedTo(t, n, l)
		closeSocket(t, client)
		startHolder(t, fmt.Sprint("duplicates ", each), l, server)
		closeSocket(t, server)
		if open >= count {
			break
		}
	}
	holders := openHolders(t)
	for range 2 {
		compareHeld(t, n, holders, openSockDiag(t, n))
	}
}

func sorted(of ...uint32) []uint32 {
	slices.Sort(of)
	return of
}

// own is what this process holds of the namespace.
func own(t testing.TB, n *scenario.Namespace, held *census.Held) (p census.Process) {
	t.Helper()
	for _, p := range held.Processes {
		if p.Inode == n.Inode() && p.PID == uint32(os.Getpid()) {
			return p
		}
	}
	return p
}

// The direction is told for namespaces whose listeners are given only.
func TestHoldersWithoutListeners(t *testing.T) {
	n := scenario.NewNamespace(t)
	client, _ := connectedTo(t, n, listenIn(t, n, 0))
	write(t, client, 10)
	holders := openHolders(t)
	held, err := holders.Read(context.Background(), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	p := own(t, n, held)
	if p.PID == 0 || p.QueuesKnown || p.Queues != [census.Directions]census.Queues{} {
		t.Errorf("queues without a direction: %+v", p)
	}
	if p.NetnsCookie == 0 && scenario.KernelAtLeast(5, 12) {
		t.Error("the namespace's cookie is not known")
	}
}

// How long a connection waits to be closed is never said too long, and from the
// second reading on not shorter than the time between.
func TestHoldersAges(t *testing.T) {
	n := scenario.NewNamespace(t)
	l := listenIn(t, n, 0)
	client, server := connectedTo(t, n, l)
	if err := unix.Shutdown(client, unix.SHUT_WR); err != nil {
		t.Fatal(err)
	}
	source, holders := openSockDiag(t, n), openHolders(t)
	compareHeld(t, n, openHolders(t), source) // has arrived
	first := time.Now()
	p := own(t, n, readHolders(t, holders, source))
	known := time.Now()
	if p.CloseWait != 1 || p.FinWait2 != 1 || p.OldestCloseWait != 0 || p.OldestFinWait2 != 0 {
		t.Fatalf("at first: %+v", p)
	}
	for range 3 {
		least := time.Since(known)
		p = own(t, n, readHolders(t, holders, source))
		most := time.Since(first)
		for state, age := range map[string]time.Duration{"CLOSE_WAIT": p.OldestCloseWait, "FIN_WAIT2": p.OldestFinWait2} {
			if age < least || age > most {
				t.Errorf("%s for %s, want between %s and %s", state, age, least, most)
			}
		}
	}
	// Another one in the same state has an age of its own.
	closeSocket(t, server)
	closeSocket(t, client)
	client, _ = connectedTo(t, n, l)
	closeSocket(t, client)
	compareHeld(t, n, openHolders(t), source)
	p = own(t, n, readHolders(t, holders, source))
	if p.CloseWait != 1 || p.FinWait2 != 0 || p.OldestCloseWait != 0 || p.OldestFinWait2 != 0 {
		t.Errorf("another one: %+v", p)
	}
}

// Who closed while it waited for accept() is no leak of the application.
func TestGaveUp(t *testing.T) {
	n := scenario.NewNamespace(t)
	l, other := listenIn(t, n, 0), listenIn(t, n, 0)
	for range 2 {
		client, _ := connectedTo(t, n, l)
		closeSocket(t, client)
	}
	for range 3 {
		closeSocket(t, connectTo(t, n, l))
	}
	connectTo(t, n, l) // waits
	connectTo(t, n, other)
	port := portOf(t, l)
	for end := time.Now().Add(patience); states(n)[tcpstate.CloseWait] != 5; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d in CLOSE_WAIT, want 5", states(n)[tcpstate.CloseWait])
		}
	}
	for _, source := range openSources(t, n) {
		gaveUp := func() (of []census.GaveUp) {
			sockets, err := source.Sockets(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			for _, g := range sockets.GaveUp {
				if g.Inode == n.Inode() {
					of = append(of, g)
				}
			}
			return of
		}
		cookie := countOf(t, source, n).Cookie
		holders := openHolders(t)
		for range 3 { // the last census is forgotten
			want := []census.GaveUp{{Inode: n.Inode(), Cookie: cookie, Port: port, Connections: 3}}
			if got := gaveUp(); !slices.Equal(got, want) {
				t.Errorf("%s: gave up: %+v, want %+v", source.Mechanism(), got, want)
			}
			if p := own(t, n, readHolders(t, holders, source)); p.CloseWait != 2 {
				t.Errorf("%s: %d leaks, want 2", source.Mechanism(), p.CloseWait)
			}
		}
	}
	for range 4 {
		acceptFrom(t, l)
	}
	for _, source := range openSources(t, n) {
		sockets, err := source.Sockets(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		for _, g := range sockets.GaveUp {
			if g.Inode == n.Inode() {
				t.Errorf("%s: all are accepted, but %+v", source.Mechanism(), g)
			}
		}
		if p := own(t, n, readHolders(t, openHolders(t), source)); p.CloseWait != 5 {
			t.Errorf("%s: %d leaks, want 5", source.Mechanism(), p.CloseWait)
		}
	}
}

// The numbers of processes are those of the reader's PID namespace, whose
// processes are all that it sees.
func TestHoldersInAPIDNamespace(t *testing.T) {
	inside := startProcess(t, "reads", &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID})
	var answer ownHeld
	inside.answer(&answer)
	want := []census.ListenerHolder{{Socket: answer.Socket, PID: 1, Comm: "reads"}}
	if answer.PID != 1 || !slices.Equal(answer.Held.Listeners, want) {
		t.Errorf("inside: %+v, want %+v", answer, want)
	}
	held, err := openHolders(t).Read(context.Background(), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	want[0].PID = inside.pid()
	i := slices.IndexFunc(held.Listeners, func(l census.ListenerHolder) bool { return l.Socket == answer.Socket })
	if i < 0 || held.Listeners[i] != want[0] {
		t.Errorf("outside: %+v, want %+v", held.Listeners, want[0])
	}
}

func TestHoldersWithTwoCapabilities(t *testing.T) {
	n := scenario.NewNamespace(t)
	l := listenIn(t, n, 0)
	limited := startProcess(t, "reads-limited", nil)
	var answer ownHeld
	limited.answer(&answer)
	for _, want := range []census.ListenerHolder{
		{Socket: answer.Socket, PID: limited.pid(), Comm: "reads-limited"},
		{Socket: inodeOf(t, l), PID: uint32(os.Getpid()), Comm: commOf(t, uint32(os.Getpid()))},
	} {
		if !slices.Contains(answer.Held.Listeners, want) {
			t.Errorf("%+v is not among %+v", want, answer.Held.Listeners)
		}
	}
}

// What stands still is told exactly while processes and sockets come and go, and
// who has gone is not told any more.
func TestHoldersWhileProcessesComeAndGo(t *testing.T) {
	still, busy := scenario.NewNamespace(t), scenario.NewNamespace(t)
	files := []int{listenIn(t, still, 0)}
	for range 3 {
		client, server := connectedTo(t, still, files[0])
		closeSocket(t, client)
		files = append(files, server)
	}
	// Not in this process: what it starts has its files, too, until exec().
	startHolder(t, "still", files...)
	for _, fd := range files {
		closeSocket(t, fd)
	}
	source, holders := openSockDiag(t, still), openHolders(t)
	want := compareHeld(t, still, holders, source)
	if len(want.Listeners) != 1 || len(want.Processes) != 1 || want.Processes[0].CloseWait != 3 {
		t.Fatalf("held are %+v", want)
	}
	_, listeners := wantHeld(t, still)

	shared := listenIn(t, busy, 0)
	_, leak := connectedTo(t, busy, shared)
	stop := make(chan struct{})
	var churn sync.WaitGroup
	var mu sync.Mutex
	gone := make(map[uint32]bool)
	var opened atomic.Uint64
	more := func() bool {
		select {
		case <-stop:
			return false
		default:
			return true
		}
	}
	churn.Go(func() {
		for more() {
			p := startHolder(t, "comes", shared, leak)
			p.end()
			mu.Lock()
			gone[p.pid()] = true
			mu.Unlock()
		}
	})
	churn.Go(func() {
		for more() {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err == nil {
				err = unix.Listen(fd, 1)
			}
			if err != nil {
				t.Error(err)
				return
			}
			unix.Close(fd)
			opened.Add(1)
		}
	})
	count := func() (n int, before map[uint32]bool) {
		mu.Lock()
		defer mu.Unlock()
		return len(gone), maps.Clone(gone)
	}
	check := func(before map[uint32]bool) {
		held := readHolders(t, holders, source)
		if got := heldIn(still, held, listeners); !reflect.DeepEqual(got, want) {
			t.Errorf("held are\n%+v\nwant\n%+v", got, want)
		}
		for _, l := range held.Listeners {
			if before[l.PID] {
				t.Errorf("process %d had gone, but holds %+v", l.PID, l)
			}
		}
		for _, p := range held.Processes {
			if p.PID == 0 || before[p.PID] {
				t.Errorf("process %d had gone, but holds %+v", p.PID, p)
			}
		}
	}
	for i, end := 0, time.Now().Add(patience); ; i++ {
		n, before := count()
		check(before)
		if i >= 100 && n >= 10 && opened.Load() >= 100 {
			break
		}
		if time.Now().After(end) {
			t.Errorf("only %d processes and %d listeners came and went", n, opened.Load())
			break
		}
	}
	close(stop)
	churn.Wait()
	n, before := count()
	check(before)
	if lost := holders.Lost(); !maps.Equal(lost, noLoss(lost)) {
		t.Errorf("lost: %v", lost)
	}
	t.Logf("%d processes and %d listeners came and went", n, opened.Load())
}

// What finds no place is counted as lost and nowhere else.
func TestHoldersThatFindNoPlace(t *testing.T) {
	n := scenario.NewNamespace(t)
	client, _ := connectedTo(t, n, listenIn(t, n, 0))
	closeSocket(t, client)
	source := openSockDiag(t, n)
	compareHeld(t, n, openHolders(t), source)

	holders := openHolders(t)
	if err := holders.FillSockets(); err != nil {
		t.Fatal(err)
	}
	if p := own(t, n, readHolders(t, holders, source)); p.PID != 0 || holders.Lost()["held_sockets"] == 0 {
		t.Errorf("without a place: %+v, lost: %v", p, holders.Lost())
	}
	before := holders.Lost()
	if p := own(t, n, readHolders(t, holders, source)); p.CloseWait != 1 || !maps.Equal(holders.Lost(), before) {
		t.Errorf("with a place again: %+v, lost: %v", p, holders.Lost())
	}

	if err := holders.FillProcesses(); err != nil {
		t.Fatal(err)
	}
	if p := own(t, n, readHolders(t, holders, source)); p.PID != 0 || holders.Lost()["held_processes"] == 0 {
		t.Errorf("without a place: %+v, lost: %v", p, holders.Lost())
	}
}

// The ports of the last reading make place for those of this one.
func TestHoldersOfOtherPorts(t *testing.T) {
	holders := openHolders(t)
	for inode := range uint32(3) {
		listeners := make([]census.Listener, 1<<16)
		for port := range listeners {
			listeners[port] = census.Listener{Inode: inode, Address: netip.AddrPortFrom(netip.IPv4Unspecified(), uint16(port))}
		}
		if _, err := holders.Read(context.Background(), nil, listeners); err != nil {
			t.Errorf("reading %d: %v", inode, err)
		}
	}
	if lost := holders.Lost(); !maps.Equal(lost, noLoss(lost)) {
		t.Errorf("lost: %v", lost)
	}
}

// A reading that ended while it took slots back does not fail the next ones, nor
// does a slot of before stay.
func TestHoldersAfterHalfAReset(t *testing.T) {
	n := scenario.NewNamespace(t)
	l := listenIn(t, n, 0)
	var leaks []int
	for range 3 {
		client, server := connectedTo(t, n, l)
		closeSocket(t, client)
		leaks = append(leaks, server)
	}
	for _, leak := range leaks {
		startHolder(t, "leaks", leak)
		closeSocket(t, leak)
	}
	source, holders := openSockDiag(t, n), openHolders(t)
	compareHeld(t, n, holders, source)
	for range 3 {
		if err := holders.LoseSlots(); err != nil {
			t.Fatal(err)
		}
		compareHeld(t, n, holders, source)
	}
}

func TestHoldersEndWithTheirContext(t *testing.T) {
	n := scenario.NewNamespace(t)
	client, _ := connectedTo(t, n, listenIn(t, n, 0))
	closeSocket(t, client)
	source, holders := openSockDiag(t, n), openHolders(t)
	compareHeld(t, n, holders, source)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := holders.Read(ctx, nil, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("read: %v", err)
	}
	if p := own(t, n, readHolders(t, holders, source)); p.CloseWait != 1 {
		t.Errorf("afterwards: %+v", p)
	}
}
