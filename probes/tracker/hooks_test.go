package tracker

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"sockq/probes/scenario"
)

// hookStories need trampolines or kprobes.
var hookStories = []string{StoryRefusals, StoryHalfOpen, StoryTimeWait}

// hooksSince is the kernel that each story needs that hooks tell, major and minor.
var hooksSince = map[string][2]int{
	StoryRefusals: {}, StoryIgnoredACKs: {}, StoryHalfOpen: {5, 12}, StoryTimeWait: {5, 12},
	StoryConnections: {5, 12}, StoryAccepts: {5, 12}, StoryUnroutable: {5, 12}, StoryBacklog: {5, 12},
}

// byTrampolines are stories that kprobes cannot tell.
var byTrampolines = []string{StoryConnections, StoryAccepts, StoryUnroutable, StoryBacklog}

// tier is what this kernel allows, or what the tests are to use at most.
var tier = sync.OnceValue(func() Tier {
	allowed, err := FindTier("/sys")
	if err != nil {
		panic(err)
	}
	return max(allowed, Tier(os.Getenv("SOCKQ_TEST_TIER")))
})

// shareHooks is a tracker of everything with all hooks that there are.
func shareHooks(tb testing.TB) *Tracker {
	tb.Helper()
	if sharedHooks == nil {
		opts := everything
		opts.Tier = tier()
		tr, err := Open(opts)
		if err != nil {
			tb.Fatal(err)
		}
		sharedHooks = tr
	}
	return sharedHooks
}

var sharedHooks *Tracker

// mechanismOwed is how this kernel tells a story.
func mechanismOwed(story string) string {
	needed, ok := hooksSince[story]
	owedByHooks := ok && scenario.KernelAtLeast(needed[0], needed[1])
	switch {
	case owedByHooks && tier() == TierA && (story != StoryConnections || !scenario.KernelAtLeast(6, 3)):
		return mechanismTrampoline
	case owedByHooks && tier() == TierB && !slices.Contains(byTrampolines, story):
		return mechanismKprobe
	case !owed(story):
		return mechanismNone
	case slices.Contains(syscallStories, story):
		return mechanismTracepoint
	}
	return mechanismTPBTF
}

// needsHooks tells whether this kernel has the hooks for stories.
func needsHooks(tb testing.TB, stories ...string) bool {
	tb.Helper()
	shareHooks(tb) // TestHooks says what is told
	return !slices.ContainsFunc(stories, func(story string) bool { return mechanismOwed(story) == mechanismNone })
}

// TestHooks holds what is told, and how, against README's table.
func TestHooks(t *testing.T) {
	for _, s := range shareHooks(t).Stories() {
		if want := mechanismOwed(s.Name); s.Mechanism != want || (s.Reason == "") != s.Told() || (len(s.Programs) > 0) != s.Told() {
			t.Errorf("%s is told by %s with %d programs, want it by %s: %s", s.Name, s.Mechanism, len(s.Programs), want, s.Reason)
		}
	}
}

// TestVerifierOfHooks sees that all programs stay far from the verifier's limit of a
// million instructions.
func TestVerifierOfHooks(t *testing.T) {
	for _, c := range shareHooks(t).closers {
		p, ok := c.(*ebpf.Program)
		if !ok {
			continue
		}
		info, err := p.Info()
		if err != nil {
			t.Fatal(err)
		}
		n, ok := info.VerifiedInstructions()
		if ok != scenario.KernelAtLeast(5, 16) || n > 100_000 {
			t.Errorf("%s: the verifier walks through %d instructions (known: %t)", nameOf(p), n, ok)
		}
		t.Logf("%s %s %d", kernelSeries(t), nameOf(p), n)
	}
}

// TestCostOfHooks says what hooks add to tracepoints in a connection's life, as the
// kernel's run statistics have it, and sees that each SYN and final ACK runs its
// programs once.
func TestCostOfHooks(t *testing.T) {
	if !needsHooks(t, StoryRefusals, StoryHalfOpen, StoryTimeWait) {
		return
	}
	closeShared(t)
	stats, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
	if err != nil {
		t.Fatal(err)
	}
	defer stats.Close()
	const connections = 500
	var costs []float64
	for _, allowed := range []Tier{TierC, tier()} {
		tr := openTracker(t, Options{Syscalls: true, Tier: allowed})
		s := scenario.NewStage(t, scenario.IPv4)
		l := s.Listen(5)
		for range connections {
			client := s.Connect(l.Addr())
			server := l.Accept()
			client.Close()
			server.Close()
		}
		s.End()
		var took time.Duration
		runs := make(map[string]uint64)
		for _, c := range tr.closers {
			p, ok := c.(*ebpf.Program)
			if !ok {
				continue
			}
			stats, err := p.Stats()
			if err != nil {
				t.Fatal(err)
			}
			took += stats.Runtime
			runs[nameOf(p)] += stats.RunCount
		}
		if allowed != TierC {
			for _, name := range []string{"syn_arrived", "syn_answered", "final_ack_arrived"} {
				if allowed == TierB {
					name += "_kprobe"
				}
				if n := runs[name]; n < connections || n > connections+connections/10 {
					t.Errorf("%s ran %d times for %d connections: %v", name, n, connections, runs)
				}
			}
		}
		costs = append(costs, float64(took.Nanoseconds())/connections)
		if err := tr.Close(); err != nil {
			t.Error(err)
		}
		tr.closers, tr.maps = nil, nil
	}
	t.Logf("%s: tracepoints take %.0f ns a connection, with tier %s it is %.0f ns: %.2f times as much",
		kernelSeries(t), costs[0], tier(), costs[1], costs[1]/costs[0])
}

// TestDCCP sees that nothing is counted of DCCP, which calls many functions of TCP's.
// It is no more since 6.16.
func TestDCCP(t *testing.T) {
	if os.Getenv("SOCKQ_TEST_GUEST") == "" || scenario.KernelAtLeast(6, 16) {
		return
	}
	closeShared(t)
	opts := everything
	opts.Tier = tier()
	tr := openTracker(t, opts)
	s := scenario.NewStage(t, scenario.IPv4)
	id := identify(t, s.NS)
	socket := func() (e endpoint) {
		s.NS.Do(func() {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DCCP|unix.SOCK_CLOEXEC, unix.IPPROTO_DCCP)
			e = endpoint{t, fd}
			e.must(err)
		})
		return e
	}
	l := socket()
	l.must(unix.Bind(l.fd, loopback4(0)), unix.Listen(l.fd, 5))
	connect := func() endpoint {
		e := socket()
		e.must(unix.Connect(e.fd, l.address()))
		return e
	}
	first, second := connect(), connect()
	connect().close()
	server := l.accept()
	first.close() // it waits
	server.hungUp()
	server.close()
	at := l.address()
	l.close() // the others are still in its queue
	second.close()
	refused := socket()
	if err := unix.Connect(refused.fd, at); err != unix.ECONNREFUSED {
		t.Errorf("connect to nobody: %v", err)
	}
	refused.close()
	s.End()
	s.Settle(scenario.Expect{Gone: true})
	// Namespaces end one after the other: time-waits and all that was in the first
	// are gone when the next is.
	next := scenario.NewStage(t, scenario.IPv4)
	next.End()
	next.Settle(scenario.Expect{Gone: true})
	transitions(t, tr, id, map[string]uint64{})
	if n := happened(t, tr, id); failuresOf(&n)+n.ResetsReceived+total(n.ResetsSent) != 0 {
		t.Errorf("failures %v, resets %v and %d", failures(&n), n.ResetsSent, n.ResetsReceived)
	}
	for _, l := range heard(t, tr, id) {
		t.Errorf("a listener: %+v", l)
	}
	become(t, "places", 0, func() (n int) {
		for _, b := range table(t, tr) {
			for _, sk := range b.Sk {
				if sk != 0 {
					n++
				}
			}
		}
		return n
	})
}

// TestMissesOfKretprobes lets more calls of a function be under way than the kernel
// keeps track of for a kretprobe: what ran and what was missed are all calls.
func TestMissesOfKretprobes(t *testing.T) {
	if tier() != TierB {
		return
	}
	closeShared(t)
	stats, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
	if err != nil {
		t.Fatal(err)
	}
	defer stats.Close()
	tr := openTracker(t, Options{Tier: TierB})
	specs, err := tr.specs()
	if err != nil {
		t.Fatal(err)
	}
	// Any program does that ends at once.
	tr.kernel, err = btf.LoadKernelSpec()
	if err != nil {
		t.Fatal(err)
	}
	programs, err := tr.place(specs.refusals, []hook{{function: "inet_csk_accept", returns: true, program: "request_routed"}}, tr.planKprobe)
	if err != nil {
		t.Fatal(err)
	}
	const calls = 40 // the kernel follows 10, or two for each CPU
	s := scenario.NewStage(t, scenario.IPv4)
	l := listenIn(t, s.NS, calls)
	var wait sync.WaitGroup
	for range calls {
		wait.Go(func() { l.accept().close() })
	}
	waiting := func() (n int) {
		tasks, err := filepath.Glob("/proc/self/task/*/wchan")
		l.must(err)
		for _, task := range tasks {
			if where, _ := os.ReadFile(task); strings.HasPrefix(string(where), "inet_csk_") {
				n++
			}
		}
		return n
	}
	become(t, "calls of accept()", calls, waiting)
	for range calls {
		dial(t, s.NS, l).close()
	}
	wait.Wait()
	if !scenario.KernelAtLeast(6, 7) {
		if n, err := tr.Misses(programs[0]); !errors.Is(err, ErrMissesUnknown) {
			t.Errorf("%d misses, %v", n, err)
		}
		return
	}
	ran, err := programs[0].Stats()
	if err != nil {
		t.Fatal(err)
	}
	missed, err := tr.Misses(programs[0])
	if err != nil || missed == 0 || ran.RunCount == 0 || missed+ran.RunCount != calls {
		t.Errorf("of %d calls %d ran and %d were missed: %v", calls, ran.RunCount, missed, err)
	}
}

// TestUnroutableConnects sees connects that fail without a SYN, whoever calls, and
// nothing else. System calls of other names show by trampolines only.
func TestUnroutableConnects(t *testing.T) {
	tr := shareHooks(t)
	if !needsHooks(t, StoryUnroutable) {
		return
	}
	inside := mechanismOwed(StoryUnroutable) == mechanismTrampoline
	for _, test := range []struct {
		family scenario.Family
		domain int
		to     unix.Sockaddr
	}{
		{scenario.IPv4, unix.AF_INET, &unix.SockaddrInet4{Addr: [4]byte{198, 51, 100, 1}, Port: 80}},
		{scenario.IPv6, unix.AF_INET6, &unix.SockaddrInet6{Addr: [16]byte{0x20, 0x01, 0x0d, 0xb8}, Port: 80}},
	} {
		t.Run(test.family.String(), func(t *testing.T) {
			ns := scenario.NewNamespace(t)
			id := identify(t, ns)
			want := make(map[string]uint64)
			fails := func(what, name string, wantError error, call func(fd int) error, protocols ...int) {
				t.Helper()
				for _, protocol := range protocols {
					e := within(t, ns, test.domain, 0, protocol)
					if err := call(e.fd); !errors.Is(err, wantError) {
						t.Errorf("%s: %v, want %v", what, err, wantError)
					}
					e.close()
					want[name]++
				}
			}
			connect := func(fd int) error { return unix.Connect(fd, test.to) }
			protocols := []int{unix.IPPROTO_TCP}
			ns.Do(func() {
				if fd, err := unix.Socket(test.domain, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_MPTCP); err == nil {
					unix.Close(fd)
					protocols = append(protocols, unix.IPPROTO_MPTCP)
				}
			})
			fails("connect", "net_unreachable", unix.ENETUNREACH, connect, protocols...)
			fastOpen := func(fd int) error { return unix.Sendto(fd, []byte("data"), unix.MSG_FASTOPEN, test.to) }
			if inside {
				fails("sendto", "net_unreachable", unix.ENETUNREACH, fastOpen, unix.IPPROTO_TCP)
			}
			// This is no connection.
			ns.Do(func() {
				fd, err := unix.Socket(test.domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
				if err != nil {
					t.Fatal(err)
				}
				defer unix.Close(fd)
				if err := connect(fd); !errors.Is(err, unix.ENETUNREACH) {
					t.Errorf("connect of UDP: %v", err)
				}
			})
			if securedByBPF() {
				forbid(t, "socket_connect", asm.Instructions{
					asm.FnGetCurrentPidTgid.Call(), asm.RSh.Imm(asm.R0, 32),
				}, int64(os.Getpid()))
				forbidden := protocols
				if !inside { // MPTCP has no TCP socket yet
					forbidden = protocols[:1]
				}
				fails("connect that is forbidden", "other", unix.EPERM, connect, forbidden...)
			}
			become(t, "failures", want, func() map[string]uint64 {
				n := happened(t, tr, id)
				return failures(&n)
			})
			transitions(t, tr, id, map[string]uint64{})
		})
	}
}
