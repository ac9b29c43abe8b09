package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/bits"
	"os"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"unsafe"

	"github.com/prometheus/exporter-toolkit/web"
	"golang.org/x/sys/unix"

	"sockq/probes"
)

// capabilities is a set of them, by their numbers.
type capabilities uint64

func (s capabilities) has(c int) bool { return s&(1<<c) != 0 }

// privileges are what the process may do. It is its own in all but some tests.
type privileges interface {
	uid() int
	// mayDrop says why nothing can be given up.
	mayDrop() error
	// held is what may be used, now or when it is switched on.
	held() (capabilities, error)
	// with runs fn on a thread that may do no more than that.
	with(only capabilities, fn func()) error
	// keep gives up all others for good, and whatever would bring them back.
	keep(only capabilities) error
}

// right is a capability that sockq has been given.
type right struct {
	Capability string `json:"capability"`
	For        string `json:"for"`
	// Kept tells that it is used as long as sockq runs; others are given up before
	// the first request is answered.
	Kept bool `json:"kept"`
}

// atStart is what capabilities are used for until everything is attached.
var atStart = []struct {
	number  int
	name, f string
}{
	{unix.CAP_BPF, "CAP_BPF", "to load BPF programs and make their maps"},
	{unix.CAP_PERFMON, "CAP_PERFMON", "to let them trace, and read the kernel's memory"},
	{unix.CAP_DAC_READ_SEARCH, "CAP_DAC_READ_SEARCH", "to find the tracepoints of system calls in tracefs"},
	{unix.CAP_SYS_PTRACE, "CAP_SYS_PTRACE", "to see which network namespace is PID 1's"},
	{unix.CAP_SYS_ADMIN, "CAP_SYS_ADMIN", "to open a tracefs that is not mounted, and for --bpf-stats"},
	{unix.CAP_SYS_RESOURCE, "CAP_SYS_RESOURCE", "to lift RLIMIT_MEMLOCK before Linux 5.11"},
	{unix.CAP_NET_BIND_SERVICE, "CAP_NET_BIND_SERVICE", "to listen on ports below 1024"},
	{unix.CAP_DAC_OVERRIDE, "CAP_DAC_OVERRIDE", "to open files that belong to others"},
}

// rights are the capabilities that this process has been given.
type rights struct {
	UID    int     `json:"uid"`
	List   []right `json:"capabilities"`
	Others int     `json:"others"` // that sockq has no use for
	// Stuck is why it keeps all of them.
	Stuck string `json:"stuck,omitempty"`

	kept capabilities
}

// findRights says what the process holds and which of it will be used.
func findRights(p privileges, needs []probes.Need) (rights, error) {
	held, err := p.held()
	if err != nil {
		return rights{}, err
	}
	r := rights{UID: p.uid(), List: []right{}}
	if err := p.mayDrop(); err != nil {
		r.Stuck = err.Error()
	}
	reasons := make(map[int][]string)
	keep := func(n probes.Need) {
		r.kept |= 1 << n.Capability
		if !slices.Contains(reasons[n.Capability], n.For) {
			reasons[n.Capability] = append(reasons[n.Capability], n.For)
		}
	}
	// First what is needed anyway: it may do for the others, too.
	for _, n := range needs {
		if n.Try == nil && held.has(n.Capability) {
			keep(n)
		}
	}
	for _, n := range needs {
		if n.Try == nil || !held.has(n.Capability) {
			continue
		}
		var without, all int
		err := p.with(r.kept, func() { without = n.Try() })
		if err == nil {
			err = p.with(r.kept|1<<n.Capability, func() { all = n.Try() })
		}
		if err != nil {
			r.Stuck = err.Error()
			break
		}
		if all > without {
			keep(n)
		}
	}
	for _, use := range atStart {
		if !held.has(use.number) {
			continue
		}
		held &^= 1 << use.number
		if why := reasons[use.number]; why != nil {
			r.List = append(r.List, right{use.name, strings.Join(why, "; "), true})
		} else {
			r.List = append(r.List, right{use.name, use.f, false})
		}
	}
	r.Others = bits.OnesCount64(uint64(held))
	return r, nil
}

// names lists those that are kept, or those that are not.
func (r *rights) names(kept bool) string {
	var names []string
	for _, right := range r.List {
		if right.Kept == kept {
			names = append(names, right.Capability)
		}
	}
	if !kept && r.Others > 0 {
		names = append(names, fmt.Sprintf("%d others", r.Others))
	}
	if len(names) == 0 {
		return "none"
	}
	return strings.Join(names, ", ")
}

// write writes them for people.
func (r *rights) write(w io.Writer) {
	if len(r.List) == 0 && r.Others == 0 {
		fmt.Fprintf(w, "\nNo capability is held, as uid %d.\n", r.UID)
		return
	}
	fmt.Fprintf(w, "\n%-23s used\n", fmt.Sprintf("Rights, as uid %d", r.UID))
	for _, right := range r.List {
		when := "at the start"
		if right.Kept {
			when = "always"
		}
		fmt.Fprintln(w, wrap(fmt.Sprintf("  %-21s %-13s ", right.Capability, when), right.For))
	}
	if r.Others > 0 {
		fmt.Fprintf(w, "  %-21s never\n", fmt.Sprintf("%d others", r.Others))
	}
	if r.Stuck != "" {
		fmt.Fprintln(w, wrap("All are kept: ", r.Stuck))
	} else {
		fmt.Fprintln(w, "What is not used always is given up before the first request is answered.")
	}
}

// dropRights gives up what is not used any more.
func dropRights(p privileges, needs []probes.Need, logger *slog.Logger) {
	r, err := findRights(p, needs)
	if err == nil && r.Stuck != "" {
		err = errors.New(r.Stuck)
	}
	if err == nil {
		err = p.keep(r.kept)
	}
	if err != nil {
		logger.Warn("Rights are not given up", "reason", err)
		return
	}
	logger.Info("Rights", "uid", r.UID, "kept", r.names(true), "given_up", r.names(false))
}

// needs are the capabilities that the web server uses, and the probes.
func (c *config) needs(n node) []probes.Need {
	needs := n.Needs()
	if file := *c.web.WebConfigFile; file != "" { // which is read again at each request
		try := func() int {
			if web.Validate(file) != nil {
				return 0
			}
			return 1
		}
		for _, capability := range []int{unix.CAP_DAC_READ_SEARCH, unix.CAP_DAC_OVERRIDE} {
			needs = append(needs, probes.Need{Capability: capability, For: "to read the web configuration", Try: try})
		}
	}
	if onVsock(c.web) { // opened when it is served
		needs = append(needs, probes.Need{Capability: unix.CAP_NET_BIND_SERVICE, For: "to listen on vsock"})
	}
	return needs
}

// ownPrivileges are those of this process.
type ownPrivileges struct{}

func (ownPrivileges) uid() int { return os.Geteuid() }

func (ownPrivileges) mayDrop() error {
	return onAllThreads("look for all threads", unix.SYS_GETPID, 0, 0, 0)
}

// capget reads the calling thread's: all threads have the same, but in with.
func capget() (header unix.CapUserHeader, data [2]unix.CapUserData, err error) {
	header.Version = unix.LINUX_CAPABILITY_VERSION_3
	if err := unix.Capget(&header, &data[0]); err != nil {
		return header, data, fmt.Errorf("read capabilities: %w", err)
	}
	return header, data, nil
}

func (ownPrivileges) held() (capabilities, error) {
	_, data, err := capget()
	return capabilities(data[0].Permitted) | capabilities(data[1].Permitted)<<32, err
}

func (ownPrivileges) with(only capabilities, fn func()) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	header, before, err := capget()
	if err != nil {
		return err
	}
	less := before
	less[0].Effective, less[1].Effective = uint32(only), uint32(only>>32)
	if err := unix.Capset(&header, &less[0]); err != nil {
		return fmt.Errorf("switch capabilities off: %w", err)
	}
	fn()
	if err := unix.Capset(&header, &before[0]); err != nil {
		return fmt.Errorf("switch capabilities on: %w", err)
	}
	return nil
}

// onAllThreads makes a system call whose result is the same on all threads.
//
//go:uintptrescapes
func onAllThreads(doing string, call, a, b, c uintptr) error {
	switch _, _, errno := syscall.AllThreadsSyscall(call, a, b, c); errno {
	case 0:
		return nil
	case syscall.ENOTSUP: // not all threads are the runtime's
		return errors.New("sockq was built with cgo; build it with CGO_ENABLED=0")
	default:
		return fmt.Errorf("%s: %w", doing, errno)
	}
}

func (p ownPrivileges) keep(only capabilities) error {
	if err := onAllThreads("set no_new_privs", unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0); err != nil {
		return err
	}
	held, err := p.held()
	if err != nil {
		return err
	}
	for c := uintptr(0); held.has(unix.CAP_SETPCAP); c++ {
		there, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, c, 0, 0, 0)
		if err != nil { // the kernel knows no more of them
			break
		}
		if there == 0 {
			continue
		}
		if err := onAllThreads("empty the bounding set", unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, c, 0); err != nil {
			return err
		}
	}
	if err := onAllThreads("clear ambient capabilities", unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0); err != nil {
		return err
	}
	if held != only {
		// With its capabilities it loses what keeps other processes of the same user
		// from its memory and descriptors.
		if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
			return fmt.Errorf("forbid others to trace sockq: %w", err)
		}
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	for i := range data {
		set := uint32(only >> (32 * i))
		data[i] = unix.CapUserData{Effective: set, Permitted: set}
	}
	return onAllThreads("give up capabilities", unix.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&data[0])), 0)
}
