package main

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// attachment is something that hangs on the kernel's events.
type attachment struct {
	name   string
	attach func() (detach func() error, err error)
	rounds int     // in how many it is measured at the most, 0 for all
	most   float64 // the target, in per cent of the work without it; 0 for none
}

// emptyName is how the kernel lists the programs that do nothing.
const emptyName = "bench_empty"

// emptyPrograms are loaded once, which takes long, and attached often.
type emptyPrograms struct {
	programs  []*ebpf.Program
	attachOne func(int, *ebpf.Program) (link.Link, error)
}

func loadEmpty(count int, spec ebpf.ProgramSpec, attachOne func(int, *ebpf.Program) (link.Link, error)) (*emptyPrograms, error) {
	spec.Name, spec.License = emptyName, "Dual BSD/GPL"
	spec.Instructions = asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()}
	e := &emptyPrograms{attachOne: attachOne}
	for range count {
		program, err := ebpf.NewProgram(&spec)
		if err != nil {
			e.close()
			return nil, fmt.Errorf("load empty program: %w", err)
		}
		e.programs = append(e.programs, program)
	}
	return e, nil
}

// loadEmptyStates loads one for inet_sock_set_state.
func loadEmptyStates() (*emptyPrograms, error) {
	return loadEmpty(1, ebpf.ProgramSpec{Type: ebpf.Tracing, AttachType: ebpf.AttachTraceRawTp, AttachTo: "inet_sock_set_state"},
		func(_ int, p *ebpf.Program) (link.Link, error) {
			return link.AttachTracing(link.TracingOptions{Program: p})
		})
}

// loadEmptyExits loads those for the exits of system calls.
func loadEmptyExits(calls ...string) (*emptyPrograms, error) {
	return loadEmpty(len(calls), ebpf.ProgramSpec{Type: ebpf.TracePoint},
		func(i int, p *ebpf.Program) (link.Link, error) {
			return link.Tracepoint("syscalls", "sys_exit_"+calls[i], p, nil)
		})
}

func (e *emptyPrograms) attach() (detach func() error, err error) {
	var links []link.Link
	detach = func() (err error) {
		for _, l := range links {
			err = errors.Join(err, l.Close())
		}
		return err
	}
	for i, program := range e.programs {
		l, err := e.attachOne(i, program)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("attach empty program: %w", err), detach())
		}
		links = append(links, l)
	}
	return detach, nil
}

func (e *emptyPrograms) close() {
	for _, p := range e.programs {
		p.Close()
	}
}

// mountTracefs gives the namespace's thread, and what is started from it, a
// tracefs at the usual place, whether the machine has one or not.
func mountTracefs(n *namespace) error {
	return n.do(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("make mount namespace: %w", err)
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return fmt.Errorf("make mounts private: %w", err)
		}
		if err := unix.Mount("tracefs", "/sys/kernel/tracing", "tracefs", 0, ""); err != nil {
			return fmt.Errorf("mount tracefs: %w", err)
		}
		return nil
	})
}

// inside runs attach on the namespace's thread.
func (n *namespace) inside(attach func() (func() error, error)) func() (func() error, error) {
	return func() (detach func() error, err error) {
		err = n.do(func() (err error) {
			detach, err = attach()
			return err
		})
		return detach, err
	}
}

const nameTCPStates = "`tcpstates`"

// attachTCPStates starts tcpstates of libbpf-tools, which prints each transition,
// and waits until it is woken by them.
func attachTCPStates(ctx context.Context, c *connections) (detach func() error, err error) {
	program, err := exec.LookPath("tcpstates")
	if err != nil {
		return nil, errors.New("not installed (Debian: libbpf-tools)")
	}
	cmd := exec.Command(program)
	var log strings.Builder // read after Wait only
	cmd.Stderr = &log
	if err := c.n.start(cmd); err != nil {
		return nil, err
	}
	stop := func() error { c.n.stop(cmd); return nil }
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	const tries = 100
	for {
		before, err := status(cmd.Process.Pid, "voluntary_ctxt_switches")
		if err == nil {
			err = c.n.do(func() error { return c.make(tries) })
		}
		if err != nil {
			return nil, errors.Join(err, stop())
		}
		after, err := status(cmd.Process.Pid, "voluntary_ctxt_switches")
		if err != nil || exited(cmd.Process.Pid) {
			_ = stop()
			return nil, fmt.Errorf("tcpstates ended: %s", lastLine(log.String()))
		}
		if after-before > tries/5 { // it polls ten times a second anyway
			return stop, nil
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("start tcpstates: %w", ctx.Err()), stop())
		case <-time.After(20 * time.Millisecond):
		}
	}
}
