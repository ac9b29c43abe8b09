package census_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"runtime"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sockq/probes/scenario"
)

// BenchmarkHolders compares a Read of 20,000 files, half of them TCP sockets,
// with what there is otherwise: a readlinkat() of every /proc/PID/fd/*, which does
// not even tell a state. Both take turns on one thread, whose CPU time counts.
func BenchmarkHolders(b *testing.B) {
	n := scenario.NewNamespace(b)
	const processes, files = 4, 5000
	for range processes {
		p := startInside(b, n, "opens "+strconv.Itoa(files))
		var pid uint32
		p.answer(&pid)
	}
	holders := openHolders(b)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var iterator, procfs time.Duration
	visited := 0
	for b.Loop() {
		start := threadTime(b)
		if _, err := holders.Read(context.Background(), nil, nil); err != nil {
			b.Fatal(err)
		}
		between := threadTime(b)
		visited += countLinks(b)
		iterator += between - start
		procfs += threadTime(b) - between
	}
	if least := b.N * processes * files; visited < least {
		b.Fatalf("%d files visited, want %d at least", visited, least)
	}
	b.ReportMetric(0, "ns/op") // of both
	b.ReportMetric(float64(iterator.Nanoseconds())/float64(visited), "iterator-ns/file")
	b.ReportMetric(float64(procfs.Nanoseconds())/float64(visited), "procfs-ns/file")
	b.ReportMetric(float64(procfs)/float64(iterator), "procfs/iterator")
}

func threadTime(t testing.TB) time.Duration {
	t.Helper()
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &now); err != nil {
		t.Fatal(err)
	}
	return time.Duration(now.Nano())
}

// countLinks reads all links of /proc/*/fd without a path or a string for each.
func countLinks(b *testing.B) (links int) {
	b.Helper()
	processes, err := os.ReadDir("/proc")
	if err != nil {
		b.Fatal(err)
	}
	entries, link := make([]byte, 32<<10), make([]byte, 64)
	var names []string
	for _, p := range processes {
		if _, err := strconv.ParseUint(p.Name(), 10, 32); err != nil {
			continue
		}
		dir, err := unix.Open("/proc/"+p.Name()+"/fd", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			continue // it has gone
		}
		for {
			n, err := unix.ReadDirent(dir, entries)
			if n <= 0 || err != nil {
				break
			}
			_, _, names = unix.ParseDirent(entries[:n], -1, names[:0])
			for _, name := range names {
				if _, err := unix.Readlinkat(dir, name, link); err == nil {
					links++
				}
			}
		}
		unix.Close(dir)
	}
	return links
}

// fileOf is an open file of a process: what the link in /proc/PID/fd says.
type fileOf struct {
	pid  uint32
	link string
}

// readLinks reads all of /proc/*/fd. What goes meanwhile is left out.
func readLinks(t testing.TB) (files []fileOf) {
	t.Helper()
	processes, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range processes {
		pid, err := strconv.ParseUint(p.Name(), 10, 32)
		if err != nil {
			continue
		}
		dir := "/proc/" + p.Name() + "/fd"
		entries, err := os.ReadDir(dir)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			link, err := os.Readlink(dir + "/" + e.Name())
			if err == nil {
				files = append(files, fileOf{uint32(pid), link})
			}
		}
	}
	return files
}
