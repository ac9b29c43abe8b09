package probes

import (
	"time"

	"sockq/probes/census"
	"sockq/probes/diagnose"
	"sockq/probes/owner"
	"sockq/probes/tcpstate"
	"sockq/probes/tracker"
)

// Other is the name under which everything is summed that did not fit under
// Options.MaxListeners or Options.MaxNamespaces.
const Other = "other"

// Snapshot is the node at one instant, joined. Every face shows the same
// Snapshot. It is never changed after it was handed out.
type Snapshot struct {
	Time       time.Time
	Kernel     Kernel
	Namespaces []Namespace // ordered by name; Other last
	Listeners  []Listener  // ordered by namespace and address
	Processes  []Process   // ordered by namespace and name
	Probes     []Probe
	Sources    []SourceStatus
	Audits     []Audit
	// StateSeconds are the times that sockets spent in each state, of all
	// namespaces together; nil where unknown, or where each Namespace has its own.
	StateSeconds *[tcpstate.Count]tracker.Histogram
	Lost         map[string]uint64 // counters by what was lost; each known kind starts at 0
}

// Kernel is what the agent runs on.
type Kernel struct {
	Release string // as uname -r
	// Tier is what this kernel allows a tracer: "A" trampolines, "B"
	// kprobes, "C" tracepoints only, "" where BPF is not to be had at all.
	Tier string
}

// Namespace is a network namespace with its sockets, settings and counters.
// Under the name Other it is the sum of those over Options.MaxNamespaces and
// has neither settings nor counters nor maxima.
type Namespace struct {
	Name   string // "host", the name under --path.netns, or the inode number
	Inode  uint32
	Cookie uint64
	// Pod is the pod that the namespace belongs to, and PodNamespace its namespace;
	// "" where it is none's, or nobody knows.
	PodNamespace, Pod string
	// SocketsKnown tells that the last census counted this namespace.
	SocketsKnown bool
	// States counts sockets by reported state, mini-sockets included.
	States [tcpstate.Count]uint64
	// BoundKnown tells that States[tcpstate.Close] was counted.
	BoundKnown bool
	Queues     [census.Directions]census.Queues
	// SettingsKnown tells that Sysctls and Events were read.
	SettingsKnown bool
	Sysctls       [len(census.SysctlNames)]int64 // -1: this namespace does not have it
	Events        [len(census.EventNames)]uint64
	EventsKnown   [len(census.EventNames)]bool
	// TransitionsKnown tells that state changes are tracked. Edges are counted by
	// tcpstate.Index, Unexpected are those that the state machine does not have.
	TransitionsKnown bool
	Transitions      [tcpstate.MaxEdges]uint64
	Unexpected       map[tcpstate.Edge]uint64
	// StateSeconds are the times spent in each state; nil unless
	// Options.StatesPerNamespace.
	StateSeconds *[tcpstate.Count]tracker.Histogram
	// ConnectsKnown tells that connects are tracked: the times from SYN_SENT to
	// ESTABLISHED, and the failures.
	ConnectsKnown   bool
	Connects        tracker.Histogram
	ConnectFailures [tracker.ConnectErrors]uint64
	// ResetsKnown tells that RST segments are tracked. ResetsSent is by reason,
	// "unspecified" where the kernel gives none.
	ResetsSentKnown, ResetsReceivedKnown bool
	ResetsSent                           map[string]uint64
	ResetsReceived                       uint64
	// Differences are the distances between our numbers and the kernel's own at
	// the last audit, where Audited tells that there was one. That of AuditStates
	// is the sum of absolute differences over the states.
	Differences [AuditChecks]uint64
	Audited     [AuditChecks]bool
}

// Listener is the set of listening sockets behind one address of one
// namespace: one socket, or a SO_REUSEPORT group. Under the address Other it
// is the sum of those over Options.MaxListeners.
type Listener struct {
	// ID is this set's own, never reused while the process runs.
	ID        uint64
	Namespace string // as Namespace.Name when the set was first seen
	Inode     uint32
	Address   string // "0.0.0.0:80", "[::]:443", "0.0.0.0:80%vrf1", "0.0.0.0:*" for those of Collapse
	Owner     Owner  // when the set was first seen
	// Who is the owner in full, of one of the sockets that listen there now.
	Who owner.Owner
	// Live tells that a socket listens there now. A set lives on for five
	// minutes after its last socket, with its counters and peaks only.
	Live bool
	// Sockets is how many sockets listen there; lengths and limits are sums.
	Sockets                       int
	AcceptQueue, AcceptQueueLimit uint64
	// FillRatio is length / (limit + 1) of the fullest socket.
	FillRatio float64
	// Peak and PeakRatio are the highest of a single socket in the last 60
	// to 120 s.
	Peak      uint64
	PeakRatio float64
	// FullSeconds is the time in which the fullest socket was full.
	FullSeconds float64
	// ConnectionSeconds is the accept queue's length integrated over time.
	ConnectionSeconds float64
	// SynQueueKnown tells that the source can read SYN queues.
	SynQueueKnown     bool
	SynQueue, SynPeak uint64
	SynQueueLimit     uint64
	SynLimitKnown     bool   // needs the namespace's sysctls
	SocketDrops       uint64 // sum of the increases of sk_drops

	// GaveUp are connections in the accept queue whose client has closed its side,
	// at the last census; unknown where several sets share the port.
	GaveUpKnown bool
	GaveUp      uint64

	// What the tracker saw, each with whether it could.
	ConnectionsKnown bool
	Connections      uint64 // handshakes completed into the accept queue
	// AcceptsKnown is false also where connections leave the queue in a way
	// that the tracker does not see (io_uring, but on tier A).
	AcceptsKnown          bool
	Accepts               uint64
	LastAccept            time.Time // zero: never
	AcceptWaitKnown       bool
	AcceptWait            tracker.Histogram // from the accept queue to accept()
	RetransmitsKnown      bool
	SynackRetransmits     uint64
	Drops                 [tracker.DropReasons]uint64 // refused, by reason
	BacklogRequestedKnown bool
	BacklogRequested      int64 // last argument of listen()
	// RefusalsKnown tells that what became of each SYN is tracked: SYNs, cookies,
	// and all reasons of Drops.
	RefusalsKnown                 bool
	Syns                          uint64
	CookiesSent, CookiesValidated uint64
	// HalfOpenKnown tells that half-open requests are tracked.
	HalfOpenKnown bool
	HalfOpenEnded [tracker.HalfOpenEnds]uint64
	Handshake     tracker.Histogram // from the SYN to the accept queue
	Abandoned     uint64            // in the accept queue when the listener closed

	// Verdict is the diagnosis of the last minute, made anew every few seconds. It is
	// nil where nobody listens, under Other, and until there were two looks.
	Verdict  *diagnose.Verdict
	Verdicts diagnose.Seen // those that it has had
}

// Process is the connections of all processes of one name in one namespace.
type Process struct {
	Namespace string // as Namespace.Name
	// PodNamespace and Pod are the namespace's.
	PodNamespace, Pod string
	// Process is the name; Other sums those over Options.MaxProcesses. "" is what
	// no process was found to have open, queues only: connections that wait for
	// accept(), orphans, and where owners are unknown all.
	Process   string
	Processes int // how many there are
	// CloseWait are connections that the peer has closed and the process has not,
	// FinWait2 those that it has closed and the peer has not.
	CloseWait, FinWait2             uint64
	OldestCloseWait, OldestFinWait2 time.Duration // at least
	// Queues sum up those of the processes, where QueuesKnown. The maxima of "" are unknown where a
	// process has a connection as full.
	QueuesKnown                   bool
	Queues                        [census.Directions]census.Queues
	ReceiveMaxKnown, SendMaxKnown [census.Directions]bool
}

// Probe is a part of the agent that attaches to the kernel, or could not.
type Probe struct {
	Name      string
	Mechanism string // "none" where nothing is attached
	Attached  bool
	Reason    string // why not, for people; "" where attached
	// Runs and RunTime are BPF run statistics, where StatsKnown.
	StatsKnown bool
	Runs       uint64
	RunTime    time.Duration
	// Misses are the events that the kernel did not hand over because the
	// program was running on that CPU already, or since too many calls were
	// under way, where MissesKnown.
	MissesKnown bool
	Misses      uint64
}

// SourceStatus is the last read of one source.
type SourceStatus struct {
	Name        string
	Up          bool
	Duration    time.Duration
	LastSuccess time.Time // zero: never
	Error       string    // for people; "" where up
}

// AuditCheck is a kind of comparison between our numbers and the kernel's.
type AuditCheck uint8

// The checks, with the names that sockq gives them.
const (
	AuditStates          AuditCheck = iota // sockets by state: sock_diag
	AuditListenDrops                       // refusals of all reasons: TcpExt ListenDrops
	AuditListenOverflows                   // those by a full accept queue: TcpExt ListenOverflows
	AuditSynCookies                        // SYN cookies sent: TcpExt SyncookiesSent
	AuditChecks                            // how many there are
)

// AuditCheckNames are their names in metrics.
var AuditCheckNames = [AuditChecks]string{"states", "listen_drops", "listen_overflows", "syn_cookies"}

// Audit counts the comparisons of one kind.
type Audit struct {
	Check   string // one of AuditCheckNames
	Checks  uint64
	Skipped uint64 // because the node changed meanwhile, or a bound forbade it
}
