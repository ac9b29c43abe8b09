package main

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"sockq/probes/scenario"
	"sockq/probes/tracker"
)

// attached is what sockq_probe_attached says.
func (p *process) attached() map[string]float64 {
	p.t.Helper()
	got := p.metrics()
	maps.DeleteFunc(got, func(series string, _ float64) bool { return !strings.HasPrefix(series, "sockq_probe_attached{") })
	return got
}

// instead changes the mechanism of some probes, "none" for what is missing.
func instead(attached map[string]float64, mechanism string, probes ...string) map[string]float64 {
	attached = maps.Clone(attached)
	maps.DeleteFunc(attached, func(series string, _ float64) bool {
		return slices.ContainsFunc(probes, func(name string) bool { return strings.Contains(series, fmt.Sprintf("probe=%q", name)) })
	})
	if mechanism == "none" {
		maps.Copy(attached, untold(probes))
	} else {
		maps.Copy(attached, told(mechanism, probes))
	}
	return attached
}

// mechanisms are those of the probes that are attached.
func mechanisms(attached map[string]float64) map[string]string {
	by := make(map[string]string)
	for series, v := range attached {
		if m := attachedSeries.FindStringSubmatch(series); m != nil && v == 1 {
			by[m[2]] = m[1]
		}
	}
	return by
}

var attachedSeries = regexp.MustCompile(`^sockq_probe_attached{mechanism="(\w+)",probe="(\w+)"}$`)

// checks is how often sockq's numbers were compared with the kernel's.
func (p *process) checks() (n float64) {
	p.t.Helper()
	for series, v := range p.metrics() {
		if strings.HasPrefix(series, "sockq_audit_checks_total{") {
			n += v
		}
	}
	return n
}

// owns tells whether sockq says that the listener is this process'.
func (p *process) owns(address netip.AddrPort) bool {
	p.t.Helper()
	response, err := http.Get(p.url + "/metrics")
	if err != nil {
		p.t.Fatal(err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		p.t.Fatal(err)
	}
	return strings.Contains(string(text), fmt.Sprintf("sockq_listener_accept_queue_length{address=%q,netns=\"host\",process=%q} ", address, ownName()))
}

// liftMemlock lets what is started now lock all memory, until the test ends.
func liftMemlock(t *testing.T) {
	t.Helper()
	var before unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &before); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Setrlimit(unix.RLIMIT_MEMLOCK, &before) })
}

// withoutBPF is what is left of what is attached.
func withoutBPF(attached map[string]float64) map[string]float64 {
	attached = instead(attached, "none", append([]string{"syn_queue", "audit", "bound"}, tracker.StoryNames...)...)
	if scenario.KernelAtLeast(6, 8) {
		attached = instead(attached, "sock_diag", "bound")
	}
	attached = instead(attached, "sock_diag", "sockets", "listeners", "namespaces")
	return instead(attached, "procfs", "owners")
}

// crowded is a listener of this process' namespace: one connection was accepted, two
// wait, and a SYN was refused.
func crowded(t *testing.T) (address netip.AddrPort) {
	t.Helper()
	socket := func() int {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		return fd
	}
	listener := socket()
	if err := errors.Join(unix.Bind(listener, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), unix.Listen(listener, 1)); err != nil {
		t.Fatal(err)
	}
	name, err := unix.Getsockname(listener)
	if err != nil {
		t.Fatal(err)
	}
	here := name.(*unix.SockaddrInet4)
	connect := func() (client int) {
		client = socket()
		if err := unix.Connect(client, here); err != nil && !errors.Is(err, unix.EINPROGRESS) {
			t.Fatalf("connect: %v", err)
		}
		return client
	}
	ready := func(fd int, events int16) {
		t.Helper()
		if n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: events}}, 10_000); n != 1 {
			t.Fatalf("a connection does not come: %v", err)
		}
	}
	for i := range 3 {
		ready(connect(), unix.POLLOUT)
		if ready(listener, unix.POLLIN); i > 0 {
			continue
		}
		fd, _, err := unix.Accept4(listener, unix.SOCK_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
	}
	if err := unix.Shutdown(connect(), unix.SHUT_RDWR); err != nil { // before it asks again
		t.Fatal(err)
	}
	return netip.AddrPortFrom(netip.AddrFrom4(here.Addr), uint16(here.Port))
}

// neighbours are two namespaces, one with a name in dir, one that only a process leads
// to. It returns the label of the second.
func neighbours(t *testing.T, dir string) (nameless string) {
	t.Helper()
	scenario.NewNamed(t, dir, "named")
	path, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, "--web.listen-address=127.0.0.1:1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	if err := cmd.Process.Signal(unix.SIGSTOP); err != nil { // that it is there is all that it is for
		t.Fatal(err)
	}
	link, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	return strings.Trim(link, "net:[]")
}

// With the documented capabilities, and no way to others, sockq attaches on this kernel
// what root does, gives up what is not kept, and goes on. Without one of them it loses
// what the documentation says, and says so.
func TestRightsOfThisKernel(t *testing.T) {
	const bpf, perfmon, search, admin, ptrace = unix.CAP_BPF, unix.CAP_PERFMON, unix.CAP_DAC_READ_SEARCH, unix.CAP_SYS_ADMIN, unix.CAP_SYS_PTRACE
	var old []uintptr // what old kernels ask for besides
	if !scenario.KernelAtLeast(5, 11) {
		old = []uintptr{unix.CAP_SYS_RESOURCE}
	}
	var always capabilities
	if !scenario.KernelAtLeast(6, 0) {
		always = setOf(bpf)
	}
	dir := t.TempDir()
	for _, d := range []string{dir, filepath.Dir(dir)} {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	nameless := neighbours(t, dir)
	start := func(t *testing.T, who as) *process {
		who.tracefs = mounted
		return launch(t, who, "--path.netns="+dir, "--cri.socket=off", "--census.interval=1s", "--audit.budget=1")
	}
	root := start(t, as{})
	everything := root.attached()
	noTracefs := maps.Clone(everything)
	for probe, mechanism := range mechanisms(everything) {
		if mechanism == "tracepoint" {
			noTracefs = instead(noTracefs, "none", probe)
		}
	}
	needed := func(more ...uintptr) []uintptr { return slices.Concat([]uintptr{bpf, perfmon}, old, more) }

	type row struct {
		name         string
		uid0         bool
		capabilities []uintptr
		memory       bool // RLIMIT_MEMLOCK is lifted for it
		attached     map[string]float64
		kept         capabilities
		named, all   bool // what can be entered of them
		why          string
	}
	tests := []row{
		{name: "nobody", capabilities: needed(search), attached: everything, kept: always},
		{name: "root of a container", uid0: true, capabilities: needed(), attached: everything, kept: always},
		{name: "nobody, for all namespaces", capabilities: needed(search, admin, ptrace), attached: everything,
			kept: always | setOf(admin, ptrace), named: true, all: true},
		{name: "without DAC_READ_SEARCH and SYS_PTRACE", capabilities: needed(admin), attached: noTracefs,
			kept: always | setOf(admin), named: true, why: "needs root or CAP_DAC_READ_SEARCH"},
		{name: "without BPF", capabilities: append([]uintptr{perfmon, search}, old...), attached: withoutBPF(everything), kept: setOf(search), why: "CAP_BPF missing"},
		{name: "without PERFMON", capabilities: append([]uintptr{bpf, search}, old...), attached: withoutBPF(everything), kept: setOf(search), why: "CAP_PERFMON missing"},
	}
	if old != nil {
		tests = append(tests,
			row{name: "without SYS_RESOURCE", capabilities: []uintptr{bpf, perfmon, search}, attached: withoutBPF(everything), kept: setOf(search), why: "CAP_SYS_RESOURCE"},
			row{name: "without SYS_RESOURCE, with memory", capabilities: []uintptr{bpf, perfmon, search}, memory: true, attached: everything, kept: always})
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			if test.memory { // of this process, that is
				liftMemlock(t)
			} else {
				t.Parallel()
			}
			p := start(t, as{nobody: !test.uid0, capabilities: test.capabilities, exactly: true})
			if got := p.attached(); !maps.Equal(got, test.attached) {
				t.Errorf("attached is %v, want %v", got, test.attached)
			}
			by := mechanisms(test.attached)
			for probe := range mechanisms(everything) {
				if by[probe] == "" && slices.Contains(tracker.StoryNames, probe) {
					p.lackBecause([]string{probe}, test.why)
					if !strings.Contains(p.log.String(), test.why) {
						t.Errorf("the log does not say %q", test.why)
					}
				}
			}
			rights := map[string]string{
				"CapInh": "0000000000000000", "CapAmb": "0000000000000000", "NoNewPrivs": "1",
				"CapPrm": fmt.Sprintf("%016x", uint64(test.kept)), "CapEff": fmt.Sprintf("%016x", uint64(test.kept)),
				"CapBnd": fmt.Sprintf("%016x", uint64(setOf(test.capabilities...))),
			}
			p.onAllThreads(rights)

			// From here on with what is left.
			compared := p.checks()
			address := crowded(t)
			at := fmt.Sprintf("{address=%q,netns=%q}", address, "host")
			want := map[string]float64{"sockq_listener_accept_queue_length" + at: 2, "sockq_listener_accept_queue_limit" + at: 1}
			for probe, shown := range map[string]struct {
				series string
				value  float64
			}{
				tracker.StoryConnections: {"sockq_listener_connections_total" + at, 3},
				tracker.StoryAccepts:     {"sockq_listener_accepts_total" + at, 1},
				tracker.StoryBacklog:     {"sockq_listener_backlog_requested" + at, 1},
				tracker.StoryRefusals:    {fmt.Sprintf("sockq_listener_drops_total{address=%q,netns=%q,reason=%q}", address, "host", "accept_queue_full_syn"), 1},
			} {
				if by[probe] != "" {
					want[shown.series] = shown.value
				}
			}
			p.shows(want)
			if by["owners"] == "iter" {
				p.await("the listener's owner", func() bool { return p.owns(address) })
			}
			if by["audit"] != "" {
				p.await("an audit", func() bool { return p.checks() > compared })
			}

			walks := by["sockets"] == "bpf_walk" // through all of them
			for netns, entered := range map[string]bool{"named": test.named, nameless: test.all} {
				series := fmt.Sprintf(`sockq_tcp_sockets{netns=%q,state="LISTEN"}`, netns)
				if walks || entered {
					p.shows(map[string]float64{series: 0})
				} else {
					p.lacks(series)
				}
			}
			audited := func(netns string) string {
				return fmt.Sprintf("sockq_audit_difference{check=%q,netns=%q}", "states", netns)
			}
			if walks {
				p.shows(map[string]float64{audited("host"): 0})
				for netns, may := range map[string]bool{"named": test.named, nameless: test.all} {
					if may {
						p.shows(map[string]float64{audited(netns): 0})
					} else {
						p.lacks(audited(netns))
					}
				}
			}
			p.onAllThreads(rights)
		})
	}
}
