package main

import (
	"runtime"
	"strings"

	"sockq/probes/tracker"
)

// story is a probe for people: what it tells, and which kernel gives it.
type story struct {
	name, tells string
	since       string // the first Linux that has it without trampolines or kprobes, or at all
	needs       string // of a kernel, besides BTF and the rights; "" for that Linux
	flag        string // which turns it on again
}

// storyGroups are all probes, those first that tell most of a listener in trouble.
var storyGroups = []struct {
	title   string
	stories []story
}{
	{"Listeners", []story{
		{name: "listeners", tells: "accept queues, and SYN queues where they can be read"},
		{name: "syn_queue", tells: "SYN queues", since: "6.4"},
		{name: tracker.StoryRefusals, tells: "why SYNs and final ACKs are refused", since: "5.10", needs: "Linux 5.10 or newer with trampolines or kprobes, which stock kernels have"},
		{name: tracker.StoryIgnoredACKs, tells: "final ACKs that a full accept queue refused", since: "6.17", needs: "Linux 6.17 or newer, or 5.10 or newer with trampolines or kprobes"},
		{name: tracker.StoryConnections, tells: "arrivals in accept queues, and the peak at each", since: "6.3", needs: "Linux 6.3 or newer, or 5.12 or newer with trampolines"},
		{name: tracker.StoryAccepts, tells: "accepts, and how long connections waited for them", since: "6.4", needs: "Linux 6.4 or newer, or 5.12 or newer with trampolines", flag: "--tracker.syscalls"},
		{name: tracker.StoryHalfOpen, tells: "how half-open connections end, and how long handshakes take", since: "5.12", needs: "Linux 5.12 or newer with trampolines or kprobes, which stock kernels have"},
		{name: tracker.StoryBacklog, tells: "what listen() asked for", since: "6.2", needs: "Linux 6.2 or newer, or 5.12 or newer with trampolines", flag: "--tracker.syscalls"},
		{name: tracker.StorySynackRetransmits, tells: "SYN-ACKs sent again", since: "5.12"},
	}},
	{"Connections", []story{
		{name: "sockets", tells: "sockets by state, bytes in their queues"},
		{name: "bound", tells: "sockets that are bound and not connected", since: "6.8", needs: "Linux 6.8 or newer, or 6.4 or newer with BPF"},
		{name: tracker.StoryTransitions, tells: "each change of state", since: "5.10"},
		{name: tracker.StoryStateSeconds, tells: "how long sockets stay in a state", since: "5.12", flag: "--states.seconds"},
		{name: tracker.StoryTimeWait, tells: "the states of time-wait sockets", since: "5.12", needs: "Linux 5.12 or newer with trampolines or kprobes, which stock kernels have"},
		{name: tracker.StoryConnects, tells: "how long connect() takes, and why it fails", since: "5.12"},
		{name: tracker.StoryUnroutable, tells: "connects without a route", since: "6.2", needs: "Linux 6.2 or newer, or 5.12 or newer with trampolines", flag: "--tracker.syscalls"},
		{name: tracker.StoryResetsSent, tells: "RSTs sent, and why", since: "5.10"},
		{name: tracker.StoryResetsReceived, tells: "RSTs received", since: "5.10"},
	}},
	{"Node", []story{
		{name: "namespaces", tells: "network namespaces, their settings and counters"},
		{name: "owners", tells: "whose the sockets are", since: "5.10", flag: "--owners"},
		{name: "pods", tells: "names of containers and pods", needs: "a container runtime with a CRI socket (--cri.socket), or a kubelet (--kubelet.url)"},
		{name: "audit", tells: "whether sockq counts as the kernel does", since: "6.4", flag: "--audit.budget above 0"},
	}},
}

// storyOf finds what is known of a probe, at least its name.
func storyOf(name string) story {
	for _, group := range storyGroups {
		for _, s := range group.stories {
			if s.name == name {
				return s.on(runtime.GOARCH)
			}
		}
	}
	return story{name: name}
}

// on is a story on another architecture: on arm64 programs compare and exchange, which
// Linux 5.12 brought, from 5.18 on.
func (s story) on(arch string) story {
	if arch == "arm64" && s.name != tracker.StorySynackRetransmits {
		s.since, s.needs = strings.ReplaceAll(s.since, "5.12", "5.18"), strings.ReplaceAll(s.needs, "5.12", "5.18")
	}
	return s
}

// tierMeans is what each tier of a kernel gives.
var tierMeans = map[string]string{
	string(tracker.TierA):    "sockq may attach to functions of the kernel by trampolines: that shows each refused SYN, and why.",
	string(tracker.TierB):    "sockq may attach to functions of the kernel by kprobes, which cost more than trampolines: that shows each refused SYN, and why.",
	string(tracker.TierC):    "sockq may attach to tracepoints only, not to functions of the kernel: it can see queues, states and most events, but not why a SYN was refused.",
	string(tracker.TierNone): "sockq may not trace: it can see queues and states, but no events. What this kernel has besides is not known before sockq may try it.",
}

// cause is a reason why a probe is missing, in few words.
type cause struct {
	says  string // part of Probe.Reason
	why   string
	gives string // what would help, whatever the story needs otherwise
}

var causes = []cause{
	{says: "CAP_BPF and CAP_PERFMON missing", why: "no right to use BPF (CAP_BPF and CAP_PERFMON)", gives: givesRights},
	{says: "CAP_BPF missing", why: "no right to use BPF (CAP_BPF)", gives: givesRights},
	{says: "CAP_PERFMON missing", why: "no right to trace (CAP_PERFMON)", gives: givesRights},
	{says: "this system forbids BPF", why: "this system forbids BPF to sockq, whatever its rights",
		gives: "a seccomp profile that allows bpf(), and no lockdown=confidentiality"},
	{says: "CONFIG_DEBUG_INFO_BTF", why: "the kernel shows no type information (BTF)",
		gives: "a kernel with CONFIG_DEBUG_INFO_BTF=y: stock kernels of distributions have it"},
	{says: "kernel.perf_event_paranoid", why: "kernel.perf_event_paranoid forbids perf events to all but CAP_SYS_ADMIN, which is Debian's way",
		gives: "kernel.perf_event_paranoid=2, or CAP_SYS_ADMIN"},
	{says: "RLIMIT_MEMLOCK", why: "no right to lock enough memory for maps", gives: "root or CAP_SYS_RESOURCE, or Linux 5.11 or newer"},
	{says: "CONFIG_DYNAMIC_FTRACE_WITH_DIRECT_CALLS", why: "this kernel allows neither trampolines nor kprobes", gives: "a kernel with trampolines or kprobes: stock kernels of distributions have them"},
	{says: "CONFIG_IPV6=m", why: "IPv6 is a module of this kernel, whose functions it does not tell", gives: "a kernel with CONFIG_IPV6=y: stock kernels of distributions have it"},
	{says: "needs CONFIG_FTRACE_SYSCALLS", why: "this kernel does not trace system calls",
		gives: "a kernel with CONFIG_FTRACE_SYSCALLS=y: stock kernels of distributions have it"},
	{says: "open tracefs: mount it", why: "tracefs is not mounted, and no right to mount it",
		gives: "tracefs on /sys/kernel/tracing and CAP_DAC_READ_SEARCH; or root"},
	{says: "open tracefs (needs root", why: "no right to read tracefs", gives: "root or CAP_DAC_READ_SEARCH"},
	{says: "the own namespace only", why: "only for the namespace that sockq runs in: it may not enter others",
		gives: "root or CAP_SYS_ADMIN; and CAP_SYS_PTRACE for namespaces without a name"},
	{says: "to find them by their processes", why: "not for namespaces that only a process leads to: it may not look at all of them",
		gives: "root or CAP_SYS_PTRACE"},
	{says: "connect: permission denied", why: "the container runtime's socket belongs to somebody else",
		gives: "root (of the systemd unit pods.conf), or --kubelet.url"},
	{says: "own PID namespace only", why: "only of the processes that are in sockq's own PID namespace", gives: "the node's PIDs (hostPID, --pid=host)"},
	{says: "the sock_diag source was asked for", why: "turned off", gives: "--census.mechanism=auto"},
}

const givesRights = "root, or CAP_BPF and CAP_PERFMON"
