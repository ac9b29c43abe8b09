package tracker

import (
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"sockq/probes/scenario"
	"sockq/probes/tcpstate"
)

// TestFlood sends SYNs that nobody follows up: what the kernel counts is what is
// counted here, nothing is lost, and no request keeps a place.
func TestFlood(t *testing.T) {
	tr := shareHooks(t)
	if !needsHooks(t, StoryRefusals) {
		return
	}
	syns := 200_000
	if testing.Short() {
		syns = 10_000
	}
	before := lost(t, tr)
	for _, cookies := range []string{"1", "0"} {
		for _, family := range []scenario.Family{scenario.IPv4, scenario.IPv6} {
			t.Run(family.String()+"/syncookies="+cookies, func(t *testing.T) {
				s := scenario.NewStage(t, family)
				s.NS.Sysctl("net.ipv4.tcp_syncookies", cookies)
				s.NS.Sysctl("net.ipv4.tcp_synack_retries", "0")
				id := identify(t, s.NS)
				l := s.Listen(128)
				for range syns / 4 {
					s.Peer().SYN(l.Addr())
				}
				become(t, "SYNs", uint64(syns/4), func() uint64 { return fatesOf(t, tr, id).Syns })
				become(t, "what the kernel counts", kernelCounts(s.NS), func() audited { return fatesOf(t, tr, id).audited() })
				if f := fatesOf(t, tr, id); cookies == "1" && sum(f.Drops) != 0 || cookies == "0" && f.CookiesSent != 0 {
					t.Errorf("with syncookies=%s: %+v", cookies, f)
				}
				become(t, "requests", 0, func() int { return len(s.NS.Sockets(tcpstate.MaskOf(synRecv))) })
				become(t, "transitions", map[string]int64{"LISTEN": 1}, func() map[string]int64 {
					n := happened(t, tr, id)
					return remaining(&n)
				})
			})
		}
	}
	for what, n := range lost(t, tr) {
		if n != before[what] {
			t.Errorf("%d %s lost", n-before[what], what)
		}
	}
}

// TestStorm opens connections in bursts that are longer than the queues.
func TestStorm(t *testing.T) {
	tr := shareHooks(t)
	if !needsHooks(t, StoryRefusals) {
		return
	}
	connections := 20_000
	if testing.Short() {
		connections = 2_000
	}
	scenario.Play(t, func() uint64 { return misses(t, tr) }, func(t testing.TB) { storms(t, tr, connections) })
}

func storms(t testing.TB, tr *Tracker, connections int) {
	t.Helper()
	const burst = 20
	ns := scenario.NewNamespace(t)
	id := identify(t, ns)
	var failed atomic.Bool
	var wait sync.WaitGroup
	const workers = 2
	for w := range workers {
		wait.Go(func() {
			ns.Do(func() {
				for i := w; i < connections/burst && !failed.Load(); i += workers {
					if err := storm(i%2 == 1, burst, 5); err != nil {
						failed.Store(true)
						t.Log(err)
					}
				}
			})
		})
	}
	wait.Wait()
	if failed.Load() {
		t.FailNow()
	}
	type view struct {
		Audited audited
		Sockets map[string]int64
	}
	if kernelCounts(ns).ListenOverflows == 0 {
		t.Error("no queue was full")
	}
	// What was refused comes to its end meanwhile.
	become(t, "difference to the kernel", "", func() string {
		kernel, ours := view{Audited: kernelCounts(ns)}, view{Audited: fatesOf(t, tr, id).audited()}
		if tr.Tells(StoryHalfOpen) && tr.Tells(StoryTimeWait) {
			n := happened(t, tr, id)
			kernel.Sockets, ours.Sockets = socketsOf(ns), remaining(&n)
		}
		return cmp.Diff(kernel, ours)
	})
}

// storm begins more connections than the accept queue of a listener holds, and
// closes all.
func storm(six bool, connections, backlog int) (err error) {
	var fds []int
	defer func() {
		for _, fd := range fds {
			err = errors.Join(err,
				unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}), unix.Close(fd))
		}
	}()
	domain, at := unix.AF_INET, loopback4(0)
	if six {
		domain, at = unix.AF_INET6, &unix.SockaddrInet6{Addr: [16]byte{15: 1}}
	}
	socket := func() (int, error) {
		fd, err := unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err == nil {
			fds = append(fds, fd)
		}
		return fd, err
	}
	l, err := socket()
	if err != nil {
		return err
	}
	if err := errors.Join(unix.Bind(l, at), unix.Listen(l, backlog)); err != nil {
		return err
	}
	if at, err = unix.Getsockname(l); err != nil {
		return err
	}
	for range connections {
		client, err := socket()
		if err != nil {
			return err
		}
		if err := unix.Connect(client, at); err != nil && !errors.Is(err, unix.EINPROGRESS) {
			return err
		}
	}
	for {
		fd, _, err := unix.Accept4(l, unix.SOCK_CLOEXEC)
		if errors.Is(err, unix.EAGAIN) {
			return nil
		}
		if err != nil {
			return err
		}
		fds = append(fds, fd)
	}
}

// TestAcceptsAtOnce takes each connection out of the queue while the final ACK that
// put it there is still at work on another CPU: its request is completed once.
func TestAcceptsAtOnce(t *testing.T) {
	tr := shareHooks(t)
	if !needsHooks(t, StoryRefusals, StoryHalfOpen) {
		return
	}
	connections := uint64(5_000)
	if testing.Short() {
		connections = 1_000
	}
	ns := scenario.NewNamespace(t)
	id := identify(t, ns)
	const burst = 50
	l := listenIn(t, ns, burst)
	l.must(unix.SetNonblock(l.fd, true))
	var accepted atomic.Uint64
	var over atomic.Bool
	var wait sync.WaitGroup
	wait.Go(func() {
		for !over.Load() {
			fd, _, err := unix.Accept4(l.fd, unix.SOCK_CLOEXEC)
			if err == nil {
				accepted.Add(1)
				unix.Close(fd)
			}
		}
	})
	defer wait.Wait()
	defer over.Store(true)
	ns.Do(func() {
		for i := range connections {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			client := endpoint{t, fd}
			client.must(err, unix.Connect(fd, l.address()))
			client.reset()
			if i%burst == burst-1 {
				become(t, "accepted", i+1, accepted.Load)
			}
		}
	})
	become(t, "completed", map[string]uint64{"ends": connections, "transitions": connections, "accepts": connections}, func() map[string]uint64 {
		n := happened(t, tr, id)
		m := map[string]uint64{"ends": fatesOf(t, tr, id).Ended["completed"], "transitions": count(&n, newSynRecv, synRecv)}
		for _, l := range heard(t, tr, id) {
			m["accepts"] += l.Accepts
		}
		return m
	})
}

// TestMoreRequestsThanPlaces lets more requests wait than the smallest table has
// places for: those that found one begin and end, the others are lost.
func TestMoreRequestsThanPlaces(t *testing.T) {
	if !needsHooks(t, StoryRefusals, StoryHalfOpen) {
		return
	}
	closeShared(t)
	opts := everything
	opts.Tier, opts.Sockets = tier(), 1
	tr := openTracker(t, opts)
	const requests = 17_000
	if room := int(tr.maps["sockets"].MaxEntries()) * places; room >= requests {
		t.Fatalf("room for %d requests", room)
	}
	s := scenario.NewStage(t, scenario.IPv4)
	id := identify(t, s.NS)
	s.NS.Sysctl("net.core.somaxconn", "20000")
	l := s.Listen(20_000)
	before := lost(t, tr)["tracked_sockets"]
	for range requests {
		s.Peer().SYN(l.Addr())
	}
	s.NS.Sysctl("net.ipv4.tcp_synack_retries", "0") // each ends with its next timer
	for end := time.Now().Add(time.Minute); len(s.NS.Sockets(tcpstate.MaskOf(synRecv))) > 0; time.Sleep(100 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("there are still requests")
		}
	}
	// SYN-ACKs that are sent again, all at once, make lo drop some SYNs.
	n, f := happened(t, tr, id), fatesOf(t, tr, id)
	begun, ended, missing := count(&n, listens, newSynRecv), count(&n, newSynRecv, closed), lost(t, tr)["tracked_sockets"]-before
	t.Logf("of %d requests %d began, %d ended, %d were lost", f.Syns, begun, ended, missing)
	if begun != ended || ended != sum(f.Ended) || begun == 0 || missing == 0 || begun+missing != f.Syns {
		t.Errorf("of %d requests %d began, %d ended, %d of them told, and %d were lost", f.Syns, begun, ended, sum(f.Ended), missing)
	}
}

// TestLifeLeavesNothing sees that a connection's whole life, from the SYN to the
// end of its TIME_WAIT, leaves nothing behind in the table of sockets.
func TestLifeLeavesNothing(t *testing.T) {
	if os.Getenv("SOCKQ_TEST_GUEST") == "" { // other programs have sockets here
		t.Log("told by the kernel guests")
		return
	}
	if !needsHooks(t, StoryRefusals, StoryHalfOpen, StoryTimeWait) {
		return
	}
	closeShared(t)
	opts := everything
	opts.Tier = tier()
	tr := openTracker(t, opts)
	for _, family := range []scenario.Family{scenario.IPv4, scenario.IPv6} {
		s := scenario.NewStage(t, family)
		l := s.Listen(5)
		client := s.Connect(l.Addr())
		server := l.Accept()
		client.Close()
		server.Await(closeWait)
		server.Close()
		if got := socketsOf(s.NS); got["TIME_WAIT"] != 1 {
			t.Errorf("sockets are %v", got)
		}
		s.End()
	}
	become(t, "places taken", 0, func() (taken int) {
		for _, b := range table(t, tr) {
			for _, sk := range b.Sk {
				if sk != 0 {
					taken++
				}
			}
		}
		return taken
	})
}
