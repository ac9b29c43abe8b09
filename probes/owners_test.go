package probes

import (
	"fmt"
	"testing"

	"sockq/probes/census"
	"sockq/probes/tracker"
)

// owned is a bench whose listeners belong to whom the test says, by their keys.
// Those that it says nothing of wait.
func owned(max int) (*bench, map[uint64]Owner) {
	b := newBench(max)
	owners := make(map[uint64]Owner)
	b.owner = func(r *census.Listener) (Owner, bool) {
		owner, asked := owners[r.Key]
		return owner, asked
	}
	return b, owners
}

func TestListenerWaitsForItsOwner(t *testing.T) {
	b, owners := owned(10)
	owners[9] = Owner{}
	b.after(0, listener(9, "0.0.0.0:9", 0, 5))
	l := listener(1, "0.0.0.0:80", 2, 5)
	l.Drops = 3
	b.after(tick, l)
	if list := b.snapshot(); !b.unasked || len(list) != 1 {
		t.Fatalf("before anybody looked: %t, %+v", b.unasked, list)
	}
	owners[1] = Owner{Process: "nginx"}
	l.Drops = 4
	b.after(tick, l)
	if got := b.find(t, "0.0.0.0:80"); b.unasked || got.Owner != owners[1] || got.SocketDrops != 4 || got.AcceptQueue != 2 {
		t.Errorf("then: %t, %+v", b.unasked, got)
	}
	// One that nobody finds has a series in the end, one that went before too, if
	// it dropped something.
	slow, brief, idle := listener(2, "0.0.0.0:81", 0, 5), listener(3, "0.0.0.0:82", 0, 5), listener(4, "0.0.0.0:83", 0, 5)
	brief.Drops = 7
	b.after(tick, l, slow, brief, idle)
	b.after(ownerPatience, l, slow)
	if got := b.find(t, "0.0.0.0:81"); got.Owner != (Owner{}) || !got.Live {
		t.Errorf("of a listener that nobody found: %+v", got)
	}
	if got := b.find(t, "0.0.0.0:82"); got.Live || got.SocketDrops != 7 {
		t.Errorf("of a listener that went: %+v", got)
	}
	if n := len(b.snapshot()); n != 4 {
		t.Errorf("%d series", n)
	}
	b.after(keepVanished, l, slow)
	if n := len(b.snapshot()); n != 2 {
		t.Errorf("%d series are left", n)
	}
}

func TestOwnerFoundLateStartsNewSeries(t *testing.T) {
	b, owners := owned(10)
	owners[1] = Owner{}
	l := listener(1, "0.0.0.0:80", 2, 5)
	b.after(0, l)
	l.Drops = 3
	b.after(tick, l)
	owners[1] = Owner{Process: "nginx", Pod: "web-0"}
	b.reown()
	l.Drops = 5
	b.after(tick, l)
	list := b.snapshot()
	if len(list) != 2 || list[0].Owner != (Owner{}) || list[1].Owner != owners[1] {
		t.Fatalf("series are of %+v", list)
	}
	if list[0].Live || list[0].SocketDrops != 3 || !list[1].Live || list[1].SocketDrops != 2 || list[1].Sockets != 1 {
		t.Errorf("before the owner was known %+v, then %+v", list[0], list[1])
	}
	// Who is not known any more is still the owner.
	owners[1] = Owner{}
	b.reown()
	b.after(tick, l)
	if list = b.snapshot(); len(list) != 2 || !list[1].Live {
		t.Errorf("then %+v", list)
	}
}

func TestSocketsOfOneOwnerShareSeries(t *testing.T) {
	b, owners := owned(10)
	owners[1], owners[2], owners[3] = Owner{Process: "nginx"}, Owner{Process: "nginx"}, Owner{Process: "envoy"}
	b.after(0, listener(1, "0.0.0.0:80", 2, 5), listener(2, "0.0.0.0:80", 3, 5), listener(3, "0.0.0.0:80", 4, 5))
	list := b.snapshot()
	if len(list) != 2 || list[0].Owner.Process != "envoy" || list[0].AcceptQueue != 4 || list[1].Sockets != 2 || list[1].AcceptQueue != 5 {
		t.Errorf("series are %+v", list)
	}
}

func TestCollapse(t *testing.T) {
	for _, c := range []struct {
		rule       Collapse
		owner      Owner
		low, high  int // listeners
		own, share int // series of their own, sockets that share one
	}{
		{CollapseAuto, Owner{Process: "ftpd"}, 10, 40, 50, 0},
		{CollapseAuto, Owner{Process: "ftpd"}, 10, 41, 50, 1},
		{CollapseAuto, Owner{Process: "ftpd"}, 10, 100, 50, 60},
		{CollapseAuto, Owner{Process: "ftpd"}, 100, 0, 100, 0},
		{CollapseAuto, Owner{}, 0, 100, 100, 0},
		{CollapseAlways, Owner{}, 3, 7, 3, 7},
		{CollapseNever, Owner{Process: "ftpd"}, 0, 100, 100, 0},
	} {
		b, owners := owned(1000)
		b.collapse = c.rule
		var all []census.Listener
		add := func(port int) {
			key := uint64(len(all) + 1)
			owners[key] = c.owner
			all = append(all, listener(key, fmt.Sprintf("0.0.0.0:%d", port), 1, 5))
		}
		for i := range c.low {
			add(1000 + i)
		}
		for i := range c.high {
			add(30000 + i)
		}
		b.after(0, all...)
		b.after(tick, all...)
		own, share := 0, 0
		for _, l := range b.snapshot() {
			if l.Address == "0.0.0.0:*" {
				share = l.Sockets
			} else {
				own++
			}
		}
		if own != c.own || share != c.share {
			t.Errorf("%+v: %d series of their own, %d sockets share one", c, own, share)
		}
	}
}

// The sockets of one address are one set, however many they are.
func TestCollapseKeepsGroupsTogether(t *testing.T) {
	b, owners := owned(1000)
	var all []census.Listener
	for key := range uint64(120) {
		owners[key+1] = Owner{Process: "envoy"}
		port := 30080
		if key >= 60 {
			port = 31000 + int(key)%2
		}
		all = append(all, listener(key+1, fmt.Sprintf("0.0.0.0:%d", port), 1, 5))
	}
	b.after(0, all...)
	list := b.snapshot()
	if len(list) != 3 || list[0].Address != "0.0.0.0:30080" || list[0].Sockets != 60 || list[1].Sockets != 30 || list[2].Sockets != 30 {
		t.Errorf("sets are %+v", list)
	}
}

// Where the key is the labels, whoever listens there next has it, too.
func TestOwnerOfTheNextCountsByLabels(t *testing.T) {
	b := newTrackedBench(10)
	owners := map[uint64]Owner{1: {Process: "old"}, 2: {Process: "new"}}
	b.owner = func(r *census.Listener) (Owner, bool) { return owners[r.Key], true }
	const labels = 1 << 63
	b.events([]census.Listener{listener(1, web, 0, 5)}, byLabels(labels, web, 3))
	b.events([]census.Listener{listener(1, web, 0, 5)}, byLabels(labels, web, 4))
	b.events([]census.Listener{listener(2, web, 0, 5)}, byLabels(labels, web, 7))
	b.events([]census.Listener{listener(2, web, 0, 5)}, byLabels(labels, web, 8))
	last := byLabels(labels, web, 9)
	b.depart(&last, atEpoch)
	sets := b.snapshot()
	if len(sets) != 2 {
		t.Errorf("%d sets, want 2", len(sets))
	}
	for _, s := range sets {
		if want := map[string]uint64{"old": 4, "new": 5}[s.Owner.Process]; s.Drops[tracker.DropSynQueueFull] != want {
			t.Errorf("of %q %d were refused, want %d", s.Owner.Process, s.Drops[tracker.DropSynQueueFull], want)
		}
	}
}

// On old kernels what is counted by labels belongs to whoever listens there now.
func TestOwnerFoundLateOfCountsByLabels(t *testing.T) {
	b := newTrackedBench(10)
	owners := map[uint64]Owner{1: {}}
	b.owner = func(r *census.Listener) (Owner, bool) { owner, asked := owners[r.Key]; return owner, asked }
	l := listener(1, web, 0, 5)
	b.events([]census.Listener{l}, byLabels(1, web, 3))
	b.events([]census.Listener{l}, byLabels(1, web, 4))
	owners[1] = Owner{Process: "nginx"}
	b.reown()
	b.events([]census.Listener{l}, byLabels(1, web, 9))
	for _, s := range b.snapshot() {
		if want := map[string]uint64{"": 4, "nginx": 5}[s.Owner.Process]; s.Drops[tracker.DropSynQueueFull] != want {
			t.Errorf("of %q %d were refused, want %d", s.Owner.Process, s.Drops[tracker.DropSynQueueFull], want)
		}
	}
}
