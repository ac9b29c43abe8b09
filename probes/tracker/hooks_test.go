package tracker

import (
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"sockq/probes/scenario"
)

// hookStories need trampolines or kprobes.
var hookStories = []string{StoryRefusals, StoryHalfOpen, StoryTimeWait}

// hooksSince is the kernel that each story needs that hooks tell, major and minor.
var hooksSince = map[string][2]int{
	StoryRefusals: {}, StoryIgnoredACKs: {}, StoryHalfOpen: {5, 12}, StoryTimeWait: {5, 12},
	StoryConnections: {5, 12}, StoryAccepts: {5, 12},
}

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
	case owedByHooks && tier() == TierB && story != StoryConnections && story != StoryAccepts:
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
