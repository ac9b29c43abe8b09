package owner

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"
)

// Of those that have a socket open it is the one that would accept.
func TestAcceptor(t *testing.T) {
	p := newFakeProc(t)
	p.add(1, 0, "systemd", 1, "0::/init.scope\n")
	p.add(50, 1, "sh", 50, "0::/system.slice/a.service\n")
	p.add(100, 50, "nginx", 100, "0::/system.slice/nginx.service\n")
	p.add(101, 100, "nginx", 101, "0::/system.slice/nginx.service\n")
	p.add(102, 100, "nginx", 102, "0::/system.slice/nginx.service\n")
	p.add(110, 102, "cgi", 110, "0::/system.slice/nginx.service\n")
	p.add(200, 1, "other", 200, "0::/system.slice/other.service\n")
	for _, test := range []struct {
		name   string
		pids   []uint32
		pid    uint32
		others int
	}{
		{"nobody", nil, 0, 0},
		{"one", []uint32{200}, 200, 0},
		{"master alone", []uint32{100}, 100, 0},
		{"master and workers", []uint32{102, 100, 101}, 101, 1},
		{"worker that lent its listener to a child", []uint32{102, 110}, 110, 0},
		{"all of it", []uint32{1, 100, 101, 102, 110}, 101, 1},
		{"the ancestor is behind processes without the socket", []uint32{1, 50, 110}, 110, 0},
		{"socket activation", []uint32{1, 200}, 200, 0},
		{"socket activation, not started yet", []uint32{1}, 1, 0},
		{"workers whose master ended", []uint32{101, 102, 4000}, 101, 1},
		{"strangers", []uint32{200, 101}, 101, 1},
		{"the same twice", []uint32{200, 200}, 200, 0},
		{"nobody lives", []uint32{4000}, 0, 0},
		{"nobody of several lives", []uint32{4000, 4001}, 0, 0},
		{"nobody's number", []uint32{0}, 0, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := openFake(t, p)
			got := f.Of(test.pids)
			if got.PID != test.pid || got.Others != test.others {
				t.Errorf("Of(%d) = %d and %d others, want %d and %d", test.pids, got.PID, got.Others, test.pid, test.others)
			}
		})
	}
}

// Its facts are those of the process that has the PID now, and of its program.
func TestFactsAreOfThisProcess(t *testing.T) {
	p := newFakeProc(t)
	f, now := openFake(t, p), newClock()
	f.processes.now = now.now
	p.add(7, 1, "one", 100, "0::/system.slice/one.service\n")
	wantOwner(t, f, Owner{PID: 7, Process: "one", Unit: "one.service"}, 7)

	// Another process, called the same, a moment later.
	p.add(7, 1, "one", 101, "0::/system.slice/two.service\n")
	wantOwner(t, f, Owner{PID: 7, Process: "one", Unit: "two.service"}, 7)

	// The same process, another program: it was forked, moved and told to exec.
	p.add(7, 1, "three", 101, "0::/system.slice/three.service\n")
	wantOwner(t, f, Owner{PID: 7, Process: "three", Unit: "three.service"}, 7)

	// The same program, moved: that is seen within a minute.
	p.add(7, 1, "three", 101, "0::/system.slice/four.service\n")
	wantOwner(t, f, Owner{PID: 7, Process: "three", Unit: "three.service"}, 7)
	now.pass(factsLast + 1)
	wantOwner(t, f, Owner{PID: 7, Process: "three", Unit: "four.service"}, 7)

	p.end(7)
	wantOwner(t, f, Owner{}, 7)
}

// A process that can be seen, but whose cgroup cannot be read, has a name.
func TestUnknownCgroup(t *testing.T) {
	p := newFakeProc(t)
	p.add(7, 1, "one", 100, "")
	f := openFake(t, p)
	wantOwner(t, f, Owner{PID: 7, Process: "one"}, 7)
}

func TestFactsAreBounded(t *testing.T) {
	const most = 10
	p := newFakeProc(t)
	f := open(t, Options{ProcFS: p.dir, CRI: CRIOff, MaxProcesses: most})
	p.add(1, 0, "kept", 1, "0::/a.service\n")
	kept := Owner{PID: 1, Process: "kept", Unit: "a.service"}
	wantOwner(t, f, kept, 1)
	p.add(1, 0, "kept", 1, "0::/who.would.read.it.again.service\n")
	for pid := uint32(2); pid <= 100; pid++ {
		p.add(pid, 0, fmt.Sprintf("p%d", pid), 1, "0::/\n")
		wantOwner(t, f, Owner{PID: pid, Process: fmt.Sprintf("p%d", pid)}, pid)
		wantOwner(t, f, kept, 1)
		known := f.processes
		if n := len(known.known) + len(known.before); n > most {
			t.Fatalf("%d processes are remembered", n)
		}
		if known.known[1] == nil {
			t.Fatal("who is used all the time was forgotten")
		}
	}
}

func TestManyHolders(t *testing.T) {
	p := newFakeProc(t)
	f := openFake(t, p)
	pids := make([]uint32, 0, maxHolders+50)
	for i := range uint32(maxHolders + 50) {
		pids = append(pids, 10+i)
		p.add(10+i, 1, "worker", 1, "")
	}
	rand.Shuffle(len(pids), func(i, j int) { pids[i], pids[j] = pids[j], pids[i] })
	wantOwner(t, f, Owner{PID: 10, Process: "worker", Others: maxHolders + 49}, pids...)
	wantLost(t, f, "holders_over_cap", 50)
}

// Who forks in a chain without end does not make sockq follow it.
func TestLongDescent(t *testing.T) {
	p := newFakeProc(t)
	f := openFake(t, p)
	const length = maxAncestors + 100
	for pid := uint32(1); pid <= length; pid++ {
		p.add(pid, pid-1, "deep", int(pid), "")
	}
	wantOwner(t, f, Owner{PID: 900, Process: "deep"}, 900, 400, 1)
	wantOwner(t, f, Owner{PID: 1, Process: "deep", Others: 1}, length, 1) // too far away
}

// A parent that is its own grandchild is a PID that was given away meanwhile.
func TestCircle(t *testing.T) {
	p := newFakeProc(t)
	f := openFake(t, p)
	p.add(5, 6, "five", 1, "0::/\n")
	p.add(6, 5, "six", 1, "0::/\n")
	p.add(7, 7, "seven", 1, "0::/\n")
	p.add(8, 9, "eight", 1, "0::/\n")
	wantOwner(t, f, Owner{}, 5, 6, 7)
	wantOwner(t, f, Owner{PID: 8, Process: "eight"}, 7, 8)
}

func TestStat(t *testing.T) {
	rest := " S 7" + strings.Repeat(" 0", 17) + " 123 0 0\n"
	for _, test := range []struct {
		name, data string
		want       stat
		ok         bool
	}{
		{"plain", "9 (nginx)" + rest, stat{"nginx", 7, 123}, true},
		{"parentheses", "9 (a) S 1 (b)" + rest, stat{"a) S 1 (b", 7, 123}, true},
		{"only parentheses", "9 (()))" + rest, stat{"()))"[:3], 7, 123}, true},
		{"line end", "9 (a\nb)" + rest, stat{"a\nb", 7, 123}, true},
		{"nothing", "9 ()" + rest, stat{"", 7, 123}, true},
		{"escape", "9 (\x1b[2J)" + rest, stat{"\x1b[2J", 7, 123}, true},
		{"no UTF-8", "9 (\xff\xfeo)" + rest, stat{"�o", 7, 123}, true},
		{"empty", "", stat{}, false},
		{"no name", "9 nginx" + rest, stat{}, false},
		{"the wrong way round", "9 )nginx(" + rest, stat{}, false},
		{"short", "9 (nginx) S 7 0 0", stat{}, false},
		{"no number", strings.Replace("9 (nginx)"+rest, "S 7", "S x", 1), stat{}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, ok := parseStat([]byte(test.data))
			if ok != test.ok || ok && got != test.want {
				t.Errorf("%q: %+v, %t; want %+v, %t", test.data, got, ok, test.want, test.ok)
			}
		})
	}
}

// Files about processes are read to a bound, whatever is in them.
func TestHugeFiles(t *testing.T) {
	p := newFakeProc(t)
	f := openFake(t, p)
	p.add(7, 1, "one", 100, "0::/system.slice/one.service\n"+strings.Repeat("9:x:/y\n", 1<<20))
	wantOwner(t, f, Owner{PID: 7, Process: "one", Unit: "one.service"}, 7)
	p.write(7, "stat", "7 ("+strings.Repeat("x", 1<<20)+") S 1")
	wantOwner(t, f, Owner{}, 7)
	if _, err := f.processes.stat(7); !errors.Is(err, errNoStat) {
		t.Error(err)
	}
}

func TestPrintable(t *testing.T) {
	for in, want := range map[string]string{
		"":                            "",
		"web-7d4b9c6f5-x2x9p":         "web-7d4b9c6f5-x2x9p",
		"Möve 鴎":                      "Möve 鴎",
		"a\nb\tc\x00d\x1b[31m\u202ee": "a�b�c�d�[31m�e",
		"\xff\xfe":                    "�",
		strings.Repeat("x", 1<<20):    strings.Repeat("x", maxName),
		strings.Repeat("\n", 1<<20):   strings.Repeat("�", maxName/3),
		strings.Repeat("é", 200):      strings.Repeat("é", 126),
		strings.Repeat("é", 126):      strings.Repeat("é", 126),
	} {
		got := printable(in)
		if !utf8.ValidString(got) || len(got) > maxName {
			t.Errorf("%d bytes of %q", len(got), got)
		}
		if got != want {
			t.Errorf("%.20q… = %q, want %q", in, got, want)
		}
	}
}

func BenchmarkOf(b *testing.B) {
	f, err := Open(Options{CRI: CRIOff})
	if err != nil {
		b.Fatal(err)
	}
	self := []uint32{uint32(os.Getpid())}
	b.ReportAllocs()
	for b.Loop() {
		if f.Of(self).PID == 0 {
			b.Fatal("not found")
		}
	}
}

func BenchmarkScan(b *testing.B) {
	f, err := Open(Options{CRI: CRIOff, ScanTime: time.Minute})
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := f.Scan(map[uint64]struct{}{1: {}}); err != nil {
			b.Fatal(err)
		}
	}
}

// Faces ask for counters while owners are looked for.
func TestConcurrentUse(t *testing.T) {
	f, self := open(t, Options{Root: t.TempDir()}), uint32(os.Getpid())
	_, inode := listener(t)
	var running sync.WaitGroup
	for _, use := range []func(){
		func() {
			if f.Of([]uint32{self, 1}).PID != self {
				t.Error("the test is nobody")
			}
		},
		func() {
			if found, err := f.Scan(map[uint64]struct{}{inode: {}}); err != nil || len(found) != 1 {
				t.Errorf("found %v, %v", found, err)
			}
		},
		func() { f.Lost() },
		func() { f.Warning() },
		func() { _, _ = f.Pods() },
		func() { f.Close() },
	} {
		running.Go(func() {
			for range 20 {
				use()
			}
		})
	}
	running.Wait()
}
