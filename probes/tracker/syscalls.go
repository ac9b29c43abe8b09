package tracker

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// attachSyscalls attaches to what applications call: inside the kernel where there are
// trampolines, which costs other calls nothing, needs no tracefs and sees io_uring,
// else where system calls return.
func (t *Tracker) attachSyscalls(spec, accepts, connects *ebpf.CollectionSpec) {
	stories := []struct {
		name     string
		programs map[string]string // by system call
		needs    string            // a story
		inside   *ebpf.CollectionSpec
		hooks    []hook // of inside
	}{
		// Without the arrivals nobody could tell that accept() is called in
		// ways that make no system call return.
		{StoryAccepts, map[string]string{"accept4": "accept4_returned", "accept": "accept_returned"}, StoryConnections, accepts, []hook{
			{function: "inet_csk_accept", returns: true, program: "child_accepted", again: "child_accepted_again"},
		}},
		{StoryBacklog, map[string]string{"listen": "listen_returned"}, "", accepts, []hook{
			{function: "__sys_listen", returns: true, program: "listen_returned"},
			{function: "__sys_listen_socket", returns: true, program: "listen_succeeded", optional: true},
		}},
		{StoryUnroutable, map[string]string{"connect": "connect_returned"}, StoryConnects, connects, []hook{
			{function: "__inet_stream_connect", returns: true, program: "connect_ended"},
			{function: "security_socket_connect", returns: true, program: "connect_allowed"},
		}},
	}
	root, err := openTracefs(t.opts.SysFS)
	if err == nil {
		defer root.Close()
	}
	for _, story := range stories {
		lacks := story.needs != "" && !t.Tells(story.needs)
		var inside error                                    // why not inside the kernel
		if t.tier == TierA && !lacks && !t.cookiesMissing { // nor is any of the stories told before 5.12
			var programs []*ebpf.Program
			if programs, inside = t.place(story.inside, story.hooks, t.planTrampoline); inside == nil {
				t.told(story.name, mechanismTrampoline, programs...)
				continue
			}
		}
		switch {
		case !t.opts.Syscalls:
			t.untold(errors.Join(inside, errTurnedOff), story.name)
			continue
		case err != nil:
			t.untold(errors.Join(inside, err), story.name)
			continue
		}
		before := len(t.closers)
		var programs []*ebpf.Program
		var failed error
		if lacks {
			failed = fmt.Errorf("needs %s", story.needs)
		}
		for call, name := range story.programs {
			if failed != nil {
				break
			}
			var program *ebpf.Program
			if program, failed = t.load(spec, name); failed == nil {
				failed = t.attachReturn(root, call, program)
			}
			programs = append(programs, program)
		}
		if failed != nil {
			t.untold(errors.Join(inside, failed, t.takeBack(before)), story.name)
			continue
		}
		t.told(story.name, mechanismTracepoint, programs...)
	}
}

// openTracefs opens the directory where the kernel numbers its tracepoints. Where
// nobody has mounted it, it is mounted for this process alone, and gone with it.
func openTracefs(sysfs string) (*os.Root, error) {
	var refused error
	for _, dir := range []string{"kernel/tracing", "kernel/debug/tracing"} {
		root, err := os.OpenRoot(filepath.Join(sysfs, dir))
		if err == nil {
			if _, err = root.Stat("events/syscalls"); err == nil {
				return root, nil
			}
			root.Close()
		}
		if !errors.Is(err, fs.ErrNotExist) {
			refused = err
		}
	}
	if refused != nil {
		return nil, fmt.Errorf("open tracefs (needs root or CAP_DAC_READ_SEARCH): %w", refused)
	}
	context, err := unix.Fsopen("tracefs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("open tracefs: mount it on %s, or give sockq CAP_SYS_ADMIN and CAP_DAC_READ_SEARCH: %w", filepath.Join(sysfs, "kernel/tracing"), err)
	}
	defer unix.Close(context)
	if err := unix.FsconfigCreate(context); err != nil {
		return nil, fmt.Errorf("open tracefs: %w", err)
	}
	mount, err := unix.Fsmount(context, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY)
	if err != nil {
		return nil, fmt.Errorf("open tracefs: %w", err)
	}
	defer unix.Close(mount)
	root, err := os.OpenRoot(fmt.Sprintf("/proc/self/fd/%d", mount))
	if err != nil {
		return nil, fmt.Errorf("open tracefs (needs root or CAP_DAC_READ_SEARCH): %w", err)
	}
	return root, nil
}

// explainPerf says what refuses perf events to who has CAP_PERFMON: Debian's kernels,
// where kernel.perf_event_paranoid is 3 unless somebody lowers it.
func explainPerf(err error) error {
	if errors.Is(err, unix.EACCES) {
		return fmt.Errorf("needs CAP_SYS_ADMIN, or kernel.perf_event_paranoid at most 2: %w", err)
	}
	return err
}

// event is a perf event by which a program is attached to a tracepoint.
type event int

func (e event) Close() error { return unix.Close(int(e)) }

// attachReturn runs the program whenever the system call returns, on every CPU.
func (t *Tracker) attachReturn(tracefs *os.Root, call string, program *ebpf.Program) error {
	text, err := tracefs.ReadFile("events/syscalls/sys_exit_" + call + "/id")
	if err != nil {
		return fmt.Errorf("find the tracepoint of %s(): needs CONFIG_FTRACE_SYSCALLS: %w", call, err)
	}
	id, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
	if err != nil {
		return fmt.Errorf("find the tracepoint of %s(): %w", call, err)
	}
	// A program on a tracepoint runs for all CPUs, whichever the event is for.
	fd, err := unix.PerfEventOpen(&unix.PerfEventAttr{
		Type: unix.PERF_TYPE_TRACEPOINT, Config: id,
		Sample_type: unix.PERF_SAMPLE_RAW, Sample: 1, Wakeup: 1,
	}, -1, 0, -1, unix.PERF_FLAG_FD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("open the tracepoint of %s(): %w", call, explainPerf(err))
	}
	t.closers = append(t.closers, event(fd))
	if err := unix.IoctlSetInt(fd, unix.PERF_EVENT_IOC_SET_BPF, program.FD()); err != nil {
		return fmt.Errorf("attach to the tracepoint of %s(): %w", call, err)
	}
	if err := unix.IoctlSetInt(fd, unix.PERF_EVENT_IOC_ENABLE, 0); err != nil {
		return fmt.Errorf("enable the tracepoint of %s(): %w", call, err)
	}
	return nil
}
