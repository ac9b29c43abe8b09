package main

import (
	"os"
	"strings"
	"testing"
	"time"

	"sockq/probes/tracker"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("not root")
		}
		t.Skip("needs root")
	}
}

func testConnections(t *testing.T) *connections {
	t.Helper()
	needRoot(t)
	n, err := newNamespace()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.close)
	c, err := openConnections(n)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.close)
	return c
}

// What costs are divided by is what took place.
func TestTransitionsOfConnections(t *testing.T) {
	c := testConnections(t)
	seen, err := tracker.Open(tracker.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := seen.Close(); err != nil {
			t.Error(err)
		}
	}()
	last := uint64(0)
	changes := func() uint64 {
		t.Helper()
		all, err := seen.Namespaces()
		if err != nil {
			t.Fatal(err)
		}
		total := uint64(0)
		for _, n := range all {
			if n.ID.Inode == c.n.inode {
				for _, count := range n.Transitions {
					total += count
				}
			}
		}
		since := total - last
		last = total
		return since
	}
	const count = 20
	for _, work := range []struct {
		what string
		do   func(int) error
		want uint64 // transitions each
	}{
		// The tracker leaves out the client's FIN_WAIT2 to CLOSE, which as a
		// rule is a TIME_WAIT's beginning.
		{"closed connections", c.make, transitions - 1},
		{"reset connections", c.reset, 6},
		{"listen() and shutdown()", c.listen, 2},
		{"closed connections, again", c.make, transitions - 1},
	} {
		if err := c.n.do(func() error { return work.do(count) }); err != nil {
			t.Fatal(err)
		}
		if got := changes(); got != work.want*count {
			t.Errorf("%d %s make %d transitions, want %d", count, work.what, got, work.want*count)
		}
	}
}

func TestRunStatistics(t *testing.T) {
	c := testConnections(t)
	empty, err := loadEmptyStates()
	if err != nil {
		t.Fatal(err)
	}
	defer empty.close()
	loaded, err := loadTracker(tracker.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer loaded.close()
	only := loaded.only(tracker.StoryTransitions)
	if len(only.programs) != 1 {
		t.Fatalf("%d programs see transitions, want 1", len(only.programs))
	}
	b := &bench{ctx: t.Context(), rounds: 1}
	w := &work{n: c.n, count: 200, do: c.make}
	used, none, err := b.programs(w, &attachment{attach: only.attach}, empty)
	if err != nil {
		t.Fatal(err)
	}
	if len(used) != 1 || used[0].name != only.programs[0].name {
		t.Fatalf("used are %v, want %v", used, only.programs)
	}
	for _, p := range append(used, none) {
		// Sockets of others come on top.
		if runs := p.runs.median(); runs < transitions || runs > 2*transitions {
			t.Errorf("%s ran %v times a connection, want %d", p.name, runs, transitions)
		}
		if p.ns.median() <= 0 {
			t.Errorf("%s took %v ns", p.name, p.ns)
		}
	}
	own, err := c.n.ownPrograms()
	if err != nil {
		t.Fatal(err)
	}
	info, err := only.programs[0].Info()
	if err != nil {
		t.Fatal(err)
	}
	if id, _ := info.ID(); !own[id] {
		t.Errorf("program %d is not among the own, %v", id, own)
	}
	strangers, err := c.n.strangers()
	if err != nil {
		t.Fatal(err)
	}
	if strangers["`"+emptyName+"`"] {
		t.Errorf("the own empty program is a stranger: %v", strangers)
	}
}

func TestCostOfProgram(t *testing.T) {
	none := &program{ns: samples{60, 70}}
	p := &program{ns: samples{100, 105}, runs: samples{10, 10}}
	q := &program{ns: samples{60, 0}, runs: samples{2, 0}}
	if got := p.above(none, 45); got[0] != 85 || got[1] != 80 {
		t.Errorf("costs are %v", got)
	}
	if got := together([]*program{p, q}, none, 45); got[0] != 850+90 || got[1] != 800 {
		t.Errorf("costs of a connection are %v", got)
	}
}

// The attachment is there during every other batch, and what it costs is found.
func TestDifferences(t *testing.T) {
	c := testConnections(t)
	attached, attaches, batches := false, 0, 0
	w := &work{n: c.n, what: "spinning", count: 10, do: func(count int) error {
		if count == 10 {
			batches++
			if attached != (batches%2 == 0) {
				t.Errorf("attached is %t in batch %d", attached, batches)
			}
		}
		d := 100 * time.Microsecond
		if attached {
			d *= 5
		}
		return spin(time.Duration(count) * d)
	}}
	b := &bench{ctx: t.Context()}
	dear := &attachment{attach: func() (func() error, error) {
		attached = true
		attaches++
		return func() error { attached = false; return nil }, nil
	}, rounds: 3}
	all, err := b.differences(w, 5, dear, nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(all) != 1 || attaches != 3 || batches != 7 || len(all[0].more) != 3 {
		t.Fatalf("%d differences, %d times attached, %d batches, %v", len(all), attaches, batches, all[0].more)
	}
	// It spins until the thread has used the time, so it cannot use less.
	if got := all[0].share().median(); got < 200 || got > 600 {
		t.Errorf("four times more is %v %%", got)
	}
}

func spin(d time.Duration) error {
	start, err := threadTime()
	for now := start; err == nil && now-start < d; {
		now, err = threadTime()
	}
	return err
}

func TestEventsAttach(t *testing.T) {
	c := testConnections(t)
	if err := mountTracefs(c.n); err != nil {
		t.Fatal(err)
	}
	exits, err := loadEmptyExits("accept", "accept4")
	if err != nil {
		t.Fatal(err)
	}
	defer exits.close()
	loaded, err := loadTracker(tracker.Options{Syscalls: true, StateSeconds: true})
	if err != nil {
		t.Fatal(err)
	}
	defer loaded.close()
	for _, attach := range []func() (func() error, error){exits.attach, loaded.attach} {
		detach, err := c.n.inside(attach)()
		if err != nil {
			t.Fatal(err)
		}
		if err := detach(); err != nil {
			t.Error(err)
		}
	}
	if mounts, err := os.ReadFile("/proc/self/mounts"); err != nil || strings.Contains(string(mounts), "tracefs /sys/kernel/tracing") != tracefsBefore {
		t.Errorf("tracefs is mounted for all: %v", err)
	}
}

var tracefsBefore = func() bool {
	mounts, _ := os.ReadFile("/proc/self/mounts")
	return strings.Contains(string(mounts), "tracefs /sys/kernel/tracing")
}()

func TestUnknownStep(t *testing.T) {
	b := &bench{ctx: t.Context(), only: []string{"scrape", "nothing"}}
	if err := b.run(); err == nil || !strings.Contains(err.Error(), `"nothing"`) {
		t.Errorf("run() = %v", err)
	}
}
