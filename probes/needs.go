package probes

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Need is a capability that is used after Open, where the process has it.
type Need struct {
	Capability int
	For        string
	// Try, if there is one, counts what can be reached of what the capability may be
	// needed for: where it is as much without, there is no need.
	Try func() int
}

// Needs are all capabilities that the probes use after Open. What only attaching
// needs is none of them: from Linux 5.19 (c8644cd0efe7) the kernel asks who loads
// programs and makes maps, and not who runs and reads them.
func (p *Probes) Needs() []Need {
	var needs []Need
	need := func(why string, try func() int, capabilities ...int) {
		for _, c := range capabilities {
			needs = append(needs, Need{c, why, try})
		}
	}
	if p.usesBPF() && p.beforeLinux6() {
		need("to read BPF maps before Linux 6.0", nil, unix.CAP_BPF)
	}
	if p.sockDiag != nil && p.sockDiag.EntryError() == nil || p.auditor != nil && p.auditor.mayEnter() {
		need("to enter network namespaces, for sock_diag", nil, unix.CAP_SYS_ADMIN)
		need("to find network namespaces by their processes", nil, unix.CAP_SYS_PTRACE)
	}
	if p.owners != nil {
		if p.owners.holders == nil {
			need("to read which files processes have open", nil, unix.CAP_SYS_PTRACE, unix.CAP_DAC_READ_SEARCH)
		}
		need("to see the processes of others (hidepid)", p.tryProcesses, unix.CAP_SYS_PTRACE)
		need("to ask for pods", p.owners.finder.TryPods, unix.CAP_DAC_READ_SEARCH, unix.CAP_DAC_OVERRIDE)
	}
	need("to read the names of network namespaces", p.tryNames, unix.CAP_DAC_READ_SEARCH, unix.CAP_DAC_OVERRIDE)
	return needs
}

func (p *Probes) usesBPF() bool {
	return p.walk != nil || p.tracked != nil || p.owners != nil && p.owners.holders != nil
}

// beforeLinux6 is on the safe side of 5.19.
func (p *Probes) beforeLinux6() bool {
	var major int
	_, err := fmt.Sscanf(p.kernel.Release, "%d.", &major)
	return err != nil || major < 6
}

func (p *Probes) tryProcesses() int {
	if _, err := os.ReadFile(filepath.Join(p.opts.ProcFS, "1/stat")); err != nil {
		return 0
	}
	return 1
}

func (p *Probes) tryNames() int {
	if _, err := os.ReadDir(p.opts.NetnsPath); err != nil {
		return 0
	}
	return 1
}
