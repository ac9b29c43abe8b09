// Package diagnose says what is wrong with a listener, from what was seen of it
// in the last minute: one verdict, its evidence in words and numbers, and what to
// change. Its rules are pure; it asks neither the kernel nor the clock.
package diagnose

import "time"

// Kind is what a verdict says.
type Kind uint8

// The verdicts. Which one it is where several would do: see History.Verdict.
const (
	OK         Kind = iota // nobody was refused, and the accept queue has room
	NearLimit              // nobody was refused yet
	Burst                  // refused, while accept() kept up
	SlowAccept             // refused or full, since accept() did not keep up
	Stalled                // connections wait and nobody calls accept()
	Clamped                // refused or nearly so, by less than listen() asked for
	SynFlood               // handshakes are begun and not completed
	Kinds                  // how many there are
)

// Names are their names in metrics.
var Names = [Kinds]string{"ok", "near_limit", "burst", "slow_accept", "stalled", "clamped", "syn_flood"}

func (k Kind) String() string { return Names[k] }

// Seen is a set of verdicts.
type Seen uint8

// Add puts a verdict into the set.
func (s *Seen) Add(k Kind) { *s |= 1 << k }

// Has tells whether a verdict is in the set.
func (s Seen) Has(k Kind) bool { return s&(1<<k) != 0 }

// Verdict is the diagnosis of a listener at one instant.
type Verdict struct {
	Kind     Kind
	Evidence string // in words and numbers
	Advice   string // what to change; "" for OK
}

// Observation is what is known at one instant of the sockets that listen on one
// address. Counters only grow. Lengths, limits and counters are sums over the
// sockets; peaks and ratios are those of the fullest one.
type Observation struct {
	Time      time.Time
	Namespace string // "host", a name, or a number
	Process   string // the listening process' comm, "" where unknown
	Pod       string // NAMESPACE/NAME of Kubernetes, "" where it is none or unknown

	Sockets                       int
	AcceptQueue, AcceptQueueLimit uint64 // a queue holds one more than its limit
	FillRatio                     float64
	Peak                          uint64 // in the last 60 to 120 s, as PeakRatio
	PeakRatio                     float64
	FullSeconds                   float64
	ConnectionSeconds             float64 // the accept queue's length integrated over time

	SynQueueKnown      bool
	SynQueue, SynPeak  uint64
	SynQueueLimitKnown bool
	SynQueueLimit      uint64

	SocketDrops      uint64 // sk_drops, which counts more than refusals
	ConnectionsKnown bool
	Connections      uint64 // that got into the accept queue
	// AcceptsKnown is false where connections leave the queue unseen. The next four
	// are of no use then.
	AcceptsKnown bool
	Accepts      uint64
	LastAccept   time.Time // zero: never
	Waits        uint64    // accepts whose wait was measured
	WaitSeconds  float64   // their waits' sum

	// RefusalsKnown tells that what became of each SYN is counted.
	RefusalsKnown                 bool
	Syns                          uint64
	RefusedSyns, RefusedACKs      uint64 // by a full accept queue
	SynQueueDrops                 uint64 // by a full SYN queue, or its last quarter
	OtherSyns                     uint64 // refused for other reasons
	CookiesSent, CookiesValidated uint64

	BacklogRequestedKnown bool
	BacklogRequested      int64 // negative: as much as there is
	Somaxconn, Syncookies int64 // of the namespace, -1 where unknown
	// NamespaceKnown tells that the namespace's TcpExt counters are known.
	NamespaceKnown                 bool
	ListenOverflows, ListenDrops   uint64
	SyncookiesSent, SyncookiesRecv uint64
}

// each is a set's sum as it is for one socket.
func (o *Observation) each(sum uint64) uint64 { return sum / uint64(max(1, o.Sockets)) }

// limit is the effective backlog of one socket.
func (o *Observation) limit() uint64 { return o.each(o.AcceptQueueLimit) }

// synLimit is the length at which the SYN queue of one socket is full.
func (o *Observation) synLimit() uint64 {
	if o.SynQueueLimitKnown {
		return o.each(o.SynQueueLimit)
	}
	return o.limit()
}
