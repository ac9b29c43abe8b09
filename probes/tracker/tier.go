// Package tracker is the event side of sockq's eBPF: programs on tracepoints and, where
// the kernel allows it, at its functions, which count in BPF maps what happens to TCP
// sockets, and the reading of these maps.
package tracker

import (
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
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
