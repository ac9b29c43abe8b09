// Package tracker is the event side of sockq's eBPF: programs on tracepoints and, where
// the kernel allows it, at its functions, which count in BPF maps what happens to TCP
// sockets, and the reading of these maps.
package tracker

import (
	"errors"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
)

// Tier is what a kernel allows a tracer.
type Tier string

// The tiers. A stock kernel is A from 5.10 on amd64 and from 6.4 on arm64.
const (
	TierNone Tier = ""  // no BPF tracing at all: no right, no BTF or too old
	TierA    Tier = "A" // trampolines: fentry and fexit
	TierB    Tier = "B" // kprobes
	TierC    Tier = "C" // tracepoints only
)

// FindTier tries it: a trampoline is attached to a function that only listen()
// calls, and taken away again. The error says why there is not even tier C.
func FindTier(sysfs string) (Tier, error) {
	if err := liftMemlock(); err != nil {
		return TierNone, err
	}
	if tryTrampoline() == nil {
		return TierA, nil
	}
	if err := tryTracepoint(); err != nil {
		return TierNone, err
	}
	if _, err := os.Stat(filepath.Join(sysfs, "bus/event_source/devices/kprobe/type")); err == nil {
		return TierB, nil
	}
	return TierC, nil
}

// liftMemlock lifts the limit of what all processes of this user lock in memory: before
// 5.11 programs and maps count against it, also those that are tried.
func liftMemlock() error {
	lifted := rlimit.RemoveMemlock()
	if lifted == nil {
		return nil
	}
	kernel, err := btf.LoadKernelSpec()
	if err != nil {
		return nil // which is said where it is needed
	}
	var counted *btf.Struct
	if kernel.TypeByName("bpf_map_memory", &counted) != nil { // it was no right to make a map that was missing
		return nil
	}
	// It does not wrap EPERM: that would say that BPF was refused.
	return errors.New("lift RLIMIT_MEMLOCK (needs CAP_SYS_RESOURCE before Linux 5.11): " + lifted.Error())
}

func load(attach ebpf.AttachType, to string) (*ebpf.Program, error) {
	return ebpf.NewProgram(&ebpf.ProgramSpec{
		Name:         "sockq_tier",
		Type:         ebpf.Tracing,
		AttachType:   attach,
		AttachTo:     to,
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
		License:      "Dual BSD/GPL",
	})
}

func tryTrampoline() error {
	program, err := load(ebpf.AttachTraceFEntry, "inet_csk_listen_start")
	if err != nil {
		return err
	}
	defer program.Close()
	// Loading is not enough: arm64 before 6.4 refuses only here.
	attached, err := link.AttachTracing(link.TracingOptions{Program: program})
	if err != nil {
		return err
	}
	return attached.Close()
}

func tryTracepoint() error {
	program, err := load(ebpf.AttachTraceRawTp, "inet_sock_set_state")
	if err != nil {
		return err
	}
	return program.Close()
}
