package probes

import (
	"fmt"
	"testing"
	"time"

	"sockq/probes/census"
)

func queues(bytes, most uint64) [census.Directions]census.Queues {
	return [census.Directions]census.Queues{{ReceiveBytes: bytes, ReceiveMaxBytes: most}}
}

// What no process has open is the rest of what the census counted.
func TestProcesses(t *testing.T) {
	p := processes{max: 10, own: make(map[processLabels]time.Time)}
	name := func(inode uint32, _ uint64) string { return map[uint32]string{1: "host", 2: "web"}[inode] }
	list := []census.Process{
		{PID: 7, Comm: "nginx", Inode: 2, CloseWait: 2, OldestCloseWait: time.Second, QueuesKnown: true, Queues: queues(10, 6)},
		{PID: 8, Comm: "nginx", Inode: 2, CloseWait: 3, OldestCloseWait: time.Minute, FinWait2: 1, QueuesKnown: true, Queues: queues(5, 5)},
		{PID: 9, Comm: "curl", Inode: 2, Queues: queues(99, 99)}, // not known
	}
	namespaces := []Namespace{
		{Name: "host", SocketsKnown: true, Queues: queues(8, 8)},
		{Name: "new"},
		{Name: "web", PodNamespace: "shop", Pod: "web-0", SocketsKnown: true, Queues: queues(20, 6)},
	}
	got := p.join(list, namespaces, name, time.Now())
	var rows []string
	for _, r := range got {
		rows = append(rows, fmt.Sprintf("%s %s/%s %q: %d, %d %v, %d; %d %d %t", r.Namespace, r.PodNamespace, r.Pod, r.Process, r.Processes,
			r.CloseWait, r.OldestCloseWait, r.FinWait2, r.Queues[0].ReceiveBytes, r.Queues[0].ReceiveMaxBytes, r.ReceiveMaxKnown[0]))
	}
	want := []string{
		`host / "": 0, 0 0s, 0; 8 8 true`,
		`web shop/web-0 "": 0, 0 0s, 0; 5 0 false`,
		`web shop/web-0 "curl": 1, 0 0s, 0; 0 0 false`,
		`web shop/web-0 "nginx": 2, 5 1m0s, 1; 15 6 true`,
	}
	if fmt.Sprint(rows) != fmt.Sprint(want) {
		t.Errorf("got\n%q, want\n%q", rows, want)
	}
}

func TestProcessesOverTheCap(t *testing.T) {
	p := processes{max: 3, own: make(map[processLabels]time.Time)}
	name := func(uint32, uint64) string { return "host" }
	processes := func(from, to int) (list []census.Process) {
		for i := from; i < to; i++ {
			list = append(list, census.Process{PID: uint32(i), Comm: fmt.Sprint("p", i), CloseWait: 1})
		}
		return list
	}
	now := time.Now()
	other := func(list []census.Process) (closeWait uint64) {
		for _, r := range p.join(list, nil, name, now) {
			if r.Process == Other {
				closeWait = r.CloseWait
			}
		}
		return closeWait
	}
	for range 3 { // counted once, however often it is looked at
		if n := other(processes(0, 8)); n != 5 || p.overCap != 5 {
			t.Errorf("%d are other's, %d were over the cap", n, p.overCap)
		}
	}
	// Those that are gone keep their place for a while.
	now = now.Add(keepProcess - time.Second)
	if n := other(processes(3, 5)); n != 2 {
		t.Errorf("%d are other's", n)
	}
	now = now.Add(2 * time.Second)
	if n := other(processes(3, 5)); n != 0 || p.overCap != 5 {
		t.Errorf("%d are other's, %d were over the cap", n, p.overCap)
	}
}

// A process may call itself anything.
func TestNamesOfProcesses(t *testing.T) {
	p := processes{max: 10, own: make(map[processLabels]time.Time)}
	list := []census.Process{{Comm: "", CloseWait: 1}, {Comm: "\xff", CloseWait: 2}, {Comm: "\xfe", CloseWait: 4}}
	got := p.join(list, []Namespace{{Name: "host", SocketsKnown: true, Queues: queues(8, 8)}}, func(uint32, uint64) string { return "host" }, time.Now())
	if len(got) != 2 || got[0].Process != "" || got[0].Queues[0].ReceiveBytes != 8 || got[1].Process != "\uFFFD" || got[1].CloseWait != 7 {
		t.Errorf("processes are %+v", got)
	}
}
