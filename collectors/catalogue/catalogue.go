// Package catalogue is the only home of the metrics' names, help texts, types,
// labels and tiers. Collectors, dashboards, alerts and the README's reference
// take them from here.
package catalogue

// Type is a metric's type, spelt as in the Prometheus exposition format.
type Type string

// The types.
const (
	Gauge     Type = "gauge"
	Counter   Type = "counter"
	Histogram Type = "histogram"
)

// Probe is the part of the agent that fills a metric; those that exist are
// called so in sockq_probe_attached too.
type Probe string

// The probes.
const (
	Census     Probe = "sockets"
	Listeners  Probe = "listeners"
	Namespaces Probe = "namespaces"
	Audits     Probe = "audit"
	Agent      Probe = "agent"
	Owners     Probe = "owners"

	// Those of the event tracker.
	TrackTransitions       Probe = "transitions"
	TrackStateSeconds      Probe = "state_seconds"
	TrackConnects          Probe = "connects"
	TrackConnections       Probe = "connections" // arrivals at listeners
	TrackAccepts           Probe = "accepts"
	TrackBacklog           Probe = "backlog"
	TrackSynackRetransmits Probe = "synack_retransmits"
	TrackIgnoredAcks       Probe = "ignored_acks"
	TrackResetsSent        Probe = "resets_sent"
	TrackResetsReceived    Probe = "resets_received"
	TrackHalfOpen          Probe = "half_open" // lives of requests
	TrackRefusals          Probe = "refusals"  // what became of each SYN
)

// Tiers are the kernels that can fill a metric, a letter each: A has
// trampolines, B kprobes, C tracepoints only.
type Tiers string

// The combinations that occur.
const (
	AllTiers Tiers = "ABC"
	TiersAB  Tiers = "AB"
)

// Metric describes one metric family.
type Metric struct {
	Name   string
	Help   string
	Type   Type
	Labels []string // in the order in which series are built
	Tiers  Tiers
	// Needs says for people what else it takes, beyond a tier; "" for nothing.
	Needs string
	Probe Probe
	// Buckets are those of a histogram's classic form: the exponents of their
	// upper bounds, 2^n seconds each. The native form has all powers of two.
	Buckets []int
}

// All lists every metric in the order of the reference: that of the files'
// names, and of the declarations within each.
var All []*Metric

// Classic buckets, few of them: each is a series of every listener.
var (
	waitBuckets  = []int{-13, -10, -8, -6, -4, -2, 0, 2, 4, 6}       // 122 µs to 64 s
	stateBuckets = []int{-10, -7, -4, -2, 0, 2, 4, 6, 8, 10, 13, 16} // 1 ms to 18 h
)

func add(m Metric) *Metric {
	All = append(All, &m)
	return &m
}

// What metrics need beyond a tier.
const (
	// Without the walk each namespace has to be entered.
	needsWalk = "BPF walk or setns"
	// sock_diag has no field for the SYN queue.
	needsOnlyWalk = "BPF walk"
	// The queues of all are known by the census, whose they are by the owners.
	needsHolders  = "CAP_BPF and CAP_PERFMON, host PID namespace"
	needsSyscalls = "on B and C syscall tracepoints"
	// Tier C reads the depth where a listener is told of an arrival.
	needsArrivals = needsWalk + "; at each arrival from Linux 6.3, on A from 5.12, else of samples"
)
