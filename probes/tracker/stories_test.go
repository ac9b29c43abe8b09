package tracker

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"sockq/probes/scenario"
)

var syscallStories = []string{StoryAccepts, StoryBacklog, StoryUnroutable}

// stories holds what a tracker tells against what it should not tell, because the
// kernel is too old for it or for another reason.
func stories(t *testing.T, tr *Tracker, untold ...string) {
	t.Helper()
	var names []string
	for _, s := range tr.Stories() {
		names = append(names, s.Name)
		if told := owed(s.Name) && !slices.Contains(untold, s.Name); s.Told() != told || tr.Tells(s.Name) != told {
			t.Errorf("%s is told: %t, want %t: %s", s.Name, s.Told(), told, s.Reason)
			continue
		}
		mechanism := mechanismTPBTF
		if slices.Contains(syscallStories, s.Name) {
			mechanism = mechanismTracepoint
		}
		if s.Told() && (s.Mechanism != mechanism || s.Reason != "" || len(s.Programs) == 0) {
			t.Errorf("%s is told by %s with %d programs: %s", s.Name, s.Mechanism, len(s.Programs), s.Reason)
		}
		if !s.Told() && (s.Mechanism != "none" || !strings.Contains(s.Reason, " ") || len(s.Programs) != 0) {
			t.Errorf("%s is not told, since %q, by %s with %d programs", s.Name, s.Reason, s.Mechanism, len(s.Programs))
		}
	}
	slices.Sort(names)
	if want := slices.Sorted(slices.Values(StoryNames)); !slices.Equal(names, want) {
		t.Errorf("stories are %v, want %v", names, want)
	}
	if tr.Tells("nonsense") {
		t.Error("it tells nonsense")
	}
}

func TestStories(t *testing.T) {
	stories(t, share(t))
	stories(t, openTracker(t, Options{Syscalls: true}), StoryStateSeconds)
	stories(t, openTracker(t, Options{StateSeconds: true}), syscallStories...)
	stories(t, openTracker(t, Options{}), append(syscallStories, StoryStateSeconds)...)
}

// Without tracefs the tracker mounts its own; one that is broken costs what
// needs it, and no more.
func TestTracefs(t *testing.T) {
	const events = "kernel/tracing/events/syscalls"
	for _, test := range []struct {
		name   string
		make   func(dir string) error
		untold []string
	}{
		{"absent", func(string) error { return nil }, nil},
		{"empty", func(dir string) error { return os.MkdirAll(filepath.Join(dir, "kernel/tracing"), 0o755) }, nil},
		{"not_a_directory", func(dir string) error {
			return errors.Join(os.Mkdir(filepath.Join(dir, "kernel"), 0o755),
				os.WriteFile(filepath.Join(dir, "kernel/tracing"), nil, 0o644))
		}, syscallStories},
		{"without_system_calls", func(dir string) error { return os.MkdirAll(filepath.Join(dir, events), 0o755) }, syscallStories},
		{"without_numbers", func(dir string) error { return number(dir, "none\n") }, syscallStories},
		{"with_wrong_numbers", func(dir string) error { return number(dir, "4000000000\n") }, syscallStories},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			if err := test.make(dir); err != nil {
				t.Fatal(err)
			}
			before := descriptors(t)
			opts := everything
			opts.SysFS = dir
			tr, err := Open(opts)
			if err != nil {
				t.Fatal(err)
			}
			stories(t, tr, test.untold...)
			if err := tr.Close(); err != nil {
				t.Error(err)
			}
			same(t, before)
		})
	}
}

// What needs perf events is refused to CAP_PERFMON by Debian's kernels, which is said,
// and nothing else. All of it is there where the setting is as elsewhere.
func TestPerfEventsWithoutSysAdmin(t *testing.T) {
	const setting = "/proc/sys/kernel/perf_event_paranoid"
	text, err := os.ReadFile(setting)
	if err != nil {
		t.Fatal(err)
	}
	level, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	opts, all := everything, share(t)
	if tier() == TierB {
		opts.Tier, all = TierB, shareHooks(t)
	}
	if _, err := os.Stat("/sys/kernel/tracing/events"); err != nil { // nobody mounted it
		opts.SysFS = t.TempDir()
		at := filepath.Join(opts.SysFS, "kernel/tracing")
		if err := errors.Join(os.MkdirAll(at, 0o755), unix.Mount("tracefs", at, "tracefs", 0, "")); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = unix.Unmount(at, unix.MNT_DETACH) }()
	}
	compare := func(refused bool) {
		t.Helper()
		some := openWith(t, opts, unix.CAP_BPF, unix.CAP_PERFMON, unix.CAP_DAC_READ_SEARCH, unix.CAP_SYS_RESOURCE).Stories()
		for _, want := range all.Stories() {
			got := some[slices.IndexFunc(some, func(s Story) bool { return s.Name == want.Name })]
			if refused && slices.Contains([]string{mechanismTracepoint, mechanismKprobe}, want.Mechanism) {
				byRefusals := slices.Contains([]string{StoryIgnoredACKs, StoryHalfOpen}, want.Name)
				if why := "kernel.perf_event_paranoid at most 2"; got.Told() || !strings.Contains(got.Reason, why) && !byRefusals {
					t.Errorf("%s is told by %s, want it refused because of %s: %s", got.Name, got.Mechanism, why, got.Reason)
				}
			} else if got.Mechanism != want.Mechanism {
				t.Errorf("%s is told by %s, with all rights by %s: %s", got.Name, got.Mechanism, want.Mechanism, got.Reason)
			}
		}
	}
	if compare(level > 2); level <= 2 {
		return
	}
	if err := os.WriteFile(setting, []byte("2"), 0o644); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := os.WriteFile(setting, text, 0o644); err != nil {
			t.Error(err)
		}
	}()
	compare(false)
}

// openWith opens a tracker on a thread that has only these capabilities.
func openWith(t *testing.T, opts Options, only ...int) *Tracker {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var all, less [2]unix.CapUserData
	if err := unix.Capget(&header, &all[0]); err != nil {
		t.Fatal(err)
	}
	for i := range less {
		less[i].Permitted, less[i].Inheritable = all[i].Permitted, all[i].Inheritable
	}
	for _, c := range only {
		less[c/32].Effective |= all[c/32].Effective & (1 << (c % 32))
	}
	if err := unix.Capset(&header, &less[0]); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Capset(&header, &all[0]); err != nil {
			t.Fatal(err)
		}
	}()
	return openTracker(t, opts)
}

// number gives system calls an event number.
func number(dir, text string) error {
	var errs []error
	for _, call := range []string{"accept", "accept4", "listen", "connect"} {
		at := filepath.Join(dir, "kernel/tracing/events/syscalls/sys_exit_"+call)
		errs = append(errs, os.MkdirAll(at, 0o755), os.WriteFile(filepath.Join(at, "id"), []byte(text), 0o644))
	}
	return errors.Join(errs...)
}

// descriptors counts the descriptors of this process by what they are, which is
// all that keeps a program, a map or a link of ours in the kernel.
func descriptors(t *testing.T) map[string]int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	kinds := make(map[string]int)
	for _, e := range entries {
		to, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err == nil && (strings.Contains(to, "bpf") || strings.Contains(to, "perf") || strings.Contains(to, "tracing")) {
			kinds[to]++
		}
	}
	return kinds
}

func same(t *testing.T, before map[string]int) {
	t.Helper()
	if now := descriptors(t); fmt.Sprint(now) != fmt.Sprint(before) {
		t.Errorf("descriptors are %v, they were %v", now, before)
	}
}

func TestCloseLeavesNothing(t *testing.T) {
	closeShared(t)
	before := descriptors(t)
	tr, err := Open(everything)
	if err != nil {
		t.Fatal(err)
	}
	var programs, maps, links []uint32
	for _, c := range tr.closers {
		switch c := c.(type) {
		case *ebpf.Program:
			info, err := c.Info()
			if err != nil {
				t.Fatal(err)
			}
			id, _ := info.ID()
			programs = append(programs, uint32(id))
		case link.Link:
			if info, err := c.Info(); err == nil {
				links = append(links, uint32(info.ID))
			}
		}
	}
	for _, m := range tr.maps {
		info, err := m.Info()
		if err != nil {
			t.Fatal(err)
		}
		id, _ := info.ID()
		maps = append(maps, uint32(id))
	}
	events, returns := programsOwed()
	if len(programs) != events+returns || len(maps) < 9 || len(links) != events || descriptors(t)["anon_inode:[perf_event]"] != returns {
		t.Errorf("%d programs, %d maps, %d links, descriptors %v", len(programs), len(maps), len(links), descriptors(t))
	}
	if err := tr.Close(); err != nil {
		t.Error(err)
	}
	same(t, before)
	// The kernel lets go of them a moment later.
	become(t, "what is left", 0, func() (left int) {
		for _, id := range programs {
			if p, err := ebpf.NewProgramFromID(ebpf.ProgramID(id)); err == nil {
				p.Close()
				left++
			}
		}
		for _, id := range maps {
			if m, err := ebpf.NewMapFromID(ebpf.MapID(id)); err == nil {
				m.Close()
				left++
			}
		}
		for _, id := range links {
			if l, err := link.NewFromID(link.ID(id)); err == nil {
				l.Close()
				left++
			}
		}
		return left
	})
}

// Descriptors run out at one point after another: the tracker is not opened, or
// tells less, and leaves nothing.
func TestOpenThatFails(t *testing.T) {
	before := descriptors(t)
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	failed, partly := 0, 0
	for more := range 10 {
		few := limit
		few.Cur = uint64(len(entries) + 4*more)
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &few); err != nil {
			t.Fatal(err)
		}
		tr, err := Open(everything)
		if e := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); e != nil {
			t.Fatal(e)
		}
		if err != nil {
			failed++
		} else {
			if slices.ContainsFunc(tr.Stories(), func(s Story) bool { return !s.Told() }) {
				partly++
			}
			if err := tr.Close(); err != nil {
				t.Error(err)
			}
		}
		same(t, before)
	}
	if failed < 2 || partly < 2 {
		t.Errorf("of 10 trackers %d failed and %d were not told all", failed, partly)
	}
}

// Two trackers do not disturb each other.
func TestTwoTrackers(t *testing.T) {
	if !needs(t, StoryAccepts) {
		return
	}
	one, two := share(t), openTracker(t, everything)
	ns := scenario.NewNamespace(t)
	id := identify(t, ns)
	l := listenIn(t, ns, 5)
	client := dial(t, ns, l)
	l.accept().close()
	for _, tr := range []*Tracker{one, two} {
		counts(t, tr, id, l.cookie(), tally{1, 1, 1, 5, true})
	}
	client.close()
	l.close()
}
