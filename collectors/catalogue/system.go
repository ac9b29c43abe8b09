package catalogue

// Further labels.
const (
	LabelEvent     = "event"
	LabelName      = "name"
	LabelCheck     = "check"
	LabelProbe     = "probe"
	LabelMechanism = "mechanism"
	LabelWhat      = "what"
	LabelSource    = "source"
)

// What the kernel says of its namespaces.
var (
	KernelTCPEvents = add(Metric{
		Name: "sockq_kernel_tcp_events_total", Type: Counter, Probe: Namespaces, Tiers: AllTiers, Needs: needsWalk,
		Labels: []string{LabelNetns, LabelEvent},
		Help:   "TcpExt counters of the kernel, named as in /proc/net/netstat.",
	})
	Sysctl = add(Metric{
		Name: "sockq_sysctl", Type: Gauge, Probe: Namespaces, Tiers: AllTiers, Needs: needsWalk,
		Labels: []string{LabelNetns, LabelName},
		Help:   "Settings of net.core and net.ipv4 that decide about queues and the life of connections; times in seconds.",
	})
)

// What the agent says of itself.
var (
	AuditDifference = add(Metric{
		Name: "sockq_audit_difference", Type: Gauge, Probe: Audits, Tiers: AllTiers,
		Needs:  "`states`: setns; `listen_drops`, `listen_overflows`, `syn_cookies`: tier A or B",
		Labels: []string{LabelNetns, LabelCheck},
		Help:   "Distance between sockq's numbers and the kernel's own at the last audit of the namespace. 0 is the promise.",
	})
	AuditChecks = add(Metric{
		Name: "sockq_audit_checks_total", Type: Counter, Probe: Audits, Tiers: AllTiers,
		Labels: []string{LabelCheck},
		Help:   "Comparisons of sockq's numbers with the kernel's own.",
	})
	AuditSkipped = add(Metric{
		Name: "sockq_audit_skipped_total", Type: Counter, Probe: Audits, Tiers: AllTiers,
		Labels: []string{LabelCheck},
		Help:   "Comparisons given up because the node changed meanwhile or a bound forbade them.",
	})
	ProbeAttached = add(Metric{
		Name: "sockq_probe_attached", Type: Gauge, Probe: Agent, Tiers: AllTiers,
		Labels: []string{LabelProbe, LabelMechanism},
		Help:   "1 where the probe is attached to the kernel by this mechanism, 0 where it is not.",
	})
	ProbeMisses = add(Metric{
		Name: "sockq_probe_misses_total", Type: Counter, Probe: Agent, Tiers: AllTiers, Needs: "Linux 6.1; for kprobes and returns of system calls Linux 6.7",
		Labels: []string{LabelProbe},
		Help:   "Events that the kernel did not hand to the probe because it was already running on that CPU, or because more calls were under way than it follows.",
	})
	ProbeRuns = add(Metric{
		Name: "sockq_probe_runs_total", Type: Counter, Probe: Agent, Tiers: AllTiers, Needs: "--bpf-stats or kernel.bpf_stats_enabled=1",
		Labels: []string{LabelProbe},
		Help:   "Runs of the probe's BPF programs.",
	})
	ProbeRunSeconds = add(Metric{
		Name: "sockq_probe_run_seconds_total", Type: Counter, Probe: Agent, Tiers: AllTiers, Needs: "--bpf-stats or kernel.bpf_stats_enabled=1",
		Labels: []string{LabelProbe},
		Help:   "CPU time of the probe's BPF programs.",
	})
	Lost = add(Metric{
		Name: "sockq_lost_total", Type: Counter, Probe: Agent, Tiers: AllTiers,
		Labels: []string{LabelWhat},
		Help:   "What did not fit under a bound or could not be read, by what it was.",
	})
	SourceUp = add(Metric{
		Name: "sockq_source_up", Type: Gauge, Probe: Agent, Tiers: AllTiers,
		Labels: []string{LabelSource},
		Help:   "1 where the last read of the source succeeded, 0 where it failed.",
	})
	SourceDuration = add(Metric{
		Name: "sockq_source_duration_seconds", Type: Gauge, Probe: Agent, Tiers: AllTiers,
		Labels: []string{LabelSource},
		Help:   "How long the last read of the source took.",
	})
	SourceLastSuccess = add(Metric{
		Name: "sockq_source_last_success_timestamp_seconds", Type: Gauge, Probe: Agent, Tiers: AllTiers,
		Labels: []string{LabelSource},
		Help:   "When the source was last read successfully, in seconds since the epoch.",
	})
	KernelInfo = add(Metric{
		Name: "sockq_kernel_info", Type: Gauge, Probe: Agent, Tiers: AllTiers,
		Labels: []string{"release", "tier"},
		Help:   "1; the kernel's release and its tier: A trampolines, B kprobes, C tracepoints only, empty without BPF.",
	})
	// BuildInfo is filled by the version collector of prometheus/client_golang.
	BuildInfo = add(Metric{
		Name: "sockq_build_info", Type: Gauge, Probe: Agent, Tiers: AllTiers,
		Labels: []string{"branch", "goarch", "goos", "goversion", "revision", "tags", "version"},
		Help:   "A metric with a constant '1' value labeled by version, revision, branch, goversion from which sockq was built, and the goos and goarch for the build.",
	})
)
