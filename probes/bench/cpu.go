package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// processTime is the CPU time of a process, user and system, of all its threads
// and to the nanosecond (MAKE_PROCESS_CPUCLOCK, as clock_getcpuclockid(3)).
func processTime(pid int) (time.Duration, error) {
	const sched = 2 // CPUCLOCK_SCHED
	var t unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|sched), &t); err != nil {
		return 0, fmt.Errorf("read CPU clock of process %d: %w", pid, err)
	}
	return time.Duration(t.Nano()), nil
}

// ownTime is the CPU time of this process: what fn uses, wherever it runs, its
// garbage included. Nothing else runs meanwhile.
func ownTime(fn func() error) (time.Duration, error) {
	start, err := processTime(os.Getpid())
	if err != nil {
		return 0, err
	}
	if err := fn(); err != nil {
		return 0, err
	}
	end, err := processTime(os.Getpid())
	return end - start, err
}

// threadTime is the CPU time of the calling thread. What the kernel does in
// softirqs meanwhile is in it, unless it was built with
// CONFIG_IRQ_TIME_ACCOUNTING and the clock is a TSC.
func threadTime() (time.Duration, error) {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t); err != nil {
		return 0, fmt.Errorf("read CPU clock of the thread: %w", err)
	}
	return time.Duration(t.Nano()), nil
}

// pinned runs fn on the last CPU that the calling thread may use.
func pinned(fn func() error) (err error) {
	var all, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &all); err != nil {
		return fmt.Errorf("read CPU affinity: %w", err)
	}
	for cpu := range len(all) * 64 {
		if all.IsSet(cpu) {
			one.Zero()
			one.Set(cpu)
		}
	}
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		return fmt.Errorf("pin to a CPU: %w", err)
	}
	defer func() { err = errors.Join(err, unix.SchedSetaffinity(0, &all)) }()
	return fn()
}

// commandTime runs a command to its end and returns its CPU time (wait4).
func commandTime(cmd *exec.Cmd) (time.Duration, error) {
	if err := cmd.Run(); err != nil {
		return 0, fmt.Errorf("%s: %w", cmd, err)
	}
	return cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime(), nil
}

// memory reads a size of a process in bytes, VmRSS or VmHWM.
func memory(pid int, field string) (uint64, error) {
	kb, err := status(pid, field)
	return kb << 10, err
}

// status reads a number of /proc/<pid>/status.
func status(pid int, field string) (uint64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, field+":"); ok {
			return strconv.ParseUint(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")), 10, 64)
		}
	}
	return 0, fmt.Errorf("process %d has no %s", pid, field)
}
