package owner

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// fakeProc is a procfs of processes that a test makes up.
type fakeProc struct {
	t   *testing.T
	dir string
}

func newFakeProc(t *testing.T) *fakeProc { return &fakeProc{t, t.TempDir()} }

func (p *fakeProc) write(pid uint32, file, data string) {
	p.t.Helper()
	dir := filepath.Join(p.dir, strconv.FormatUint(uint64(pid), 10))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		p.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, file), []byte(data), 0o644); err != nil {
		p.t.Fatal(err)
	}
}

// add makes a process that began at that time, in ticks; without a cgroup if that is
// "".
func (p *fakeProc) add(pid, parent uint32, comm string, start int, cgroup string) {
	p.t.Helper()
	p.write(pid, "stat", fmt.Sprintf("%d (%s) S %d%s %d 0 0\n", pid, comm, parent, strings.Repeat(" 0", 17), start))
	if cgroup != "" {
		p.write(pid, "cgroup", cgroup)
	}
}

func (p *fakeProc) end(pid uint32) {
	p.t.Helper()
	if err := os.RemoveAll(filepath.Join(p.dir, strconv.FormatUint(uint64(pid), 10))); err != nil {
		p.t.Fatal(err)
	}
}

func open(t *testing.T, opts Options) *Finder {
	t.Helper()
	opts.ScanTime = cmp.Or(opts.ScanTime, time.Minute) // however busy the machine is
	f, err := Open(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// openFake is a Finder over made up processes that asks nobody for pods.
func openFake(t *testing.T, p *fakeProc) *Finder {
	t.Helper()
	return open(t, Options{ProcFS: p.dir, CRI: CRIOff})
}

func wantOwner(t *testing.T, f *Finder, want Owner, pids ...uint32) {
	t.Helper()
	if got := f.Of(pids); got != want {
		t.Errorf("Of(%d)\n got %+v\nwant %+v", pids, got, want)
	}
}

func wantLost(t *testing.T, f *Finder, what string, want uint64) {
	t.Helper()
	got, ok := f.Lost()[what]
	if !ok || got != want {
		t.Errorf("lost %s: %d (known: %t), want %d", what, got, ok, want)
	}
}

// clock is a time that a test moves.
type clock struct{ at time.Time }

func newClock() *clock { return &clock{time.Unix(1000, 0)} }

func (c *clock) now() time.Time { return c.at }

func (c *clock) pass(d time.Duration) { c.at = c.at.Add(d) }
