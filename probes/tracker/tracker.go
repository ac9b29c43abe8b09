package tracker

import (
	"math"
	"net/netip"
	"time"

	"sockq/probes/tcpstate"
)

// Buckets is how many buckets a Histogram has (HISTOGRAM_BUCKETS).
const Buckets = 45

// minExponent is that of the first bucket's bound: 2^-20 s is about 1 µs.
const minExponent = -20

// Histogram counts durations in buckets whose upper bounds are powers of two of
// a second: bucket i holds those of at most 2^Exponent(i) s and more than half
// of that, the first all below, too, the last all above, too.
type Histogram struct {
	Buckets [Buckets]uint64 // not cumulative
	Sum     float64         // in seconds
}

// Exponent is that of bucket i's upper bound, 2^Exponent(i) s.
func Exponent(i int) int { return minExponent + i }

// Bound is the upper bound of bucket i in seconds.
func Bound(i int) float64 { return math.Ldexp(1, Exponent(i)) }

// Count is how many durations were counted.
func (h *Histogram) Count() (n uint64) {
	for _, b := range h.Buckets {
		n += b
	}
	return n
}

// AddSince adds what now counted beyond before.
func (h *Histogram) AddSince(now, before *Histogram) {
	for i := range h.Buckets {
		h.Buckets[i] += now.Buckets[i] - before.Buckets[i]
	}
	h.Sum += now.Sum - before.Sum
}

// ConnectError is why a connect() came to nothing.
type ConnectError uint8

// The errors, with the names that sockq gives them (CONNECT_* in tracker.h).
const (
	ConnectRefused ConnectError = iota
	ConnectTimeout
	ConnectHostUnreachable
	ConnectNetUnreachable
	ConnectReset
	ConnectNoPorts
	ConnectClosed // by the application, before there was an answer
	ConnectOther
	ConnectErrors // how many there are
)

// ConnectErrorNames are their names in metrics.
var ConnectErrorNames = [ConnectErrors]string{
	"refused", "timeout", "host_unreachable", "net_unreachable", "reset", "no_ports", "closed", "other",
}

// DropReason is why a listener refused a connection or a handshake.
type DropReason uint8

// The reasons, with the names that sockq gives them (DROP_* in tracker.h). Without
// the story of refusals only the first two are known.
const (
	DropAcceptQueueFullACK   DropReason = iota // the final ACK was ignored
	DropAcceptQueueFullReset                   // the final ACK was answered with a RST
	DropAcceptQueueFullSYN                     // the SYN was refused
	DropSynQueueFull                           // more requests than the backlog, without SYN cookies
	DropMaxSynBacklog                          // the last quarter of tcp_max_syn_backlog, without SYN cookies
	DropNoMemory
	DropNoRoute
	DropPolicy // a security module or a BPF program
	DropICMP   // an ICMP error ended the handshake
	DropOther
	DropReasons // how many there are
)

// DropReasonNames are their names in metrics.
var DropReasonNames = [DropReasons]string{
	"accept_queue_full_ack", "accept_queue_full_reset", "accept_queue_full_syn", "syn_queue_full", "max_syn_backlog",
	"no_memory", "no_route", "policy", "icmp", "other",
}

// HalfOpenEnd is how a half-open request ended.
type HalfOpenEnd uint8

// The ends, with the names that sockq gives them (END_* in tracker.h).
const (
	EndCompleted      HalfOpenEnd = iota // the connection is in the accept queue
	EndExpired                           // no final ACK came
	EndReset                             // a RST, or a SYN out of the window
	EndListenerClosed                    // the listener went
	EndICMP
	EndOverflowReset // the accept queue was full, with tcp_abort_on_overflow
	EndDestroyed     // SOCK_DESTROY
	EndMigrated      // another socket of the group took it over
	HalfOpenEnds     // how many there are
)

// HalfOpenEndNames are their names in metrics.
var HalfOpenEndNames = [HalfOpenEnds]string{
	"completed", "expired", "reset", "listener_closed", "icmp", "overflow_reset", "destroyed", "migrated",
}

// NamespaceID is a network namespace: its cookie (0 before Linux 5.15) and its
// inode number.
type NamespaceID struct {
	Cookie uint64
	Inode  uint32
}

// Namespace is what happened in a network namespace since the tracker began to
// look, or since the namespace began.
type Namespace struct {
	ID NamespaceID
	// Members are those that found no place and are summed here, maybe none;
	// nil for a namespace of its own.
	Members []NamespaceID
	// Transitions counts edges by their tcpstate.Index.
	Transitions [tcpstate.MaxEdges]uint64
	// Unexpected counts the edges that Linux does not take.
	Unexpected map[tcpstate.Edge]uint64
	// Connects are the times from SYN_SENT to ESTABLISHED.
	Connects        Histogram
	ConnectFailures [ConnectErrors]uint64
	ResetsSent      map[string]uint64 // by reason, "unspecified" where the kernel gives none
	ResetsReceived  uint64
	// States are the times spent in each state; nil unless Options.PerNamespace.
	States *[tcpstate.Count]Histogram
}

// Listener is what happened at one listening socket, or at all of one address.
type Listener struct {
	// Key is the socket's cookie, or its address in the kernel where it had
	// no cookie. Before Linux 5.12 it is made of the namespace, the address and
	// the interface where there is no cookie, and ByLabels tells so: there may
	// be other entries of the same socket.
	Key       uint64
	ByLabels  bool
	Namespace NamespaceID
	Address   netip.AddrPort
	Interface uint32 // index of the device that it is bound to, 0 for none

	Connections       uint64 // handshakes completed into the accept queue
	Accepts           uint64 // connections that accept() returned
	SynackRetransmits uint64
	Drops             [DropReasons]uint64
	// What StoryRefusals tells.
	Syns                          uint64 // SYNs that reached the listener
	CookiesSent, CookiesValidated uint64
	// What StoryHalfOpen tells: how requests ended, how long those took that were
	// completed (from the SYN to the accept queue), and what went with the
	// listener out of its accept queue.
	HalfOpenEnded [HalfOpenEnds]uint64
	Handshake     Histogram
	Abandoned     uint64

	LastAccept time.Duration // on the monotonic clock; 0: never
	AcceptWait Histogram
	LastListen time.Duration // the same for listen()
	Backlog    int32         // argument of the last listen(), if there was any
	// Peak is the accept queue's highest length at an arrival in this minute
	// of the monotonic clock and the one before; PeakRatio is the highest
	// length / (limit + 1).
	Peak      uint64
	PeakRatio float64
}
