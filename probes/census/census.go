// Package census counts what is: every TCP socket by state, every listener
// with its two queues, and every network namespace with its sysctls and TcpExt
// counters.
//
// Two sources give the same answers. The walk (kernel 6.4+) reads the kernel's
// own tables with BPF programs and sees all namespaces of the node in one pass.
// The sock_diag source asks the kernel per namespace, and has to enter each.
package census

import (
	"context"
	"net/netip"
	"time"

	"sockq/probes/tcpstate"
)

// Mechanism is how a source reads the kernel.
type Mechanism string

// The mechanisms.
const (
	MechanismWalk     Mechanism = "bpf_walk"
	MechanismSockDiag Mechanism = "sock_diag"
)

// Source is where a census comes from. Its readers may run beside each other, but
// none beside itself.
type Source interface {
	// Mechanism names how this source reads the kernel.
	Mechanism() Mechanism
	// Namespaces reads the node's network namespaces with their sysctls and
	// TcpExt counters. The result is valid until the next call.
	Namespaces() ([]Namespace, error)
	// Sockets counts all sockets of all namespaces. The result is valid
	// until the next call. It ends soon after ctx.
	Sockets(ctx context.Context) (*Sockets, error)
	// Listeners reads every listening socket of the node. The result is
	// valid until the next call.
	Listeners() ([]Listener, error)
	// Lost counts what did not fit or could not be read since the start, by
	// what it was.
	Lost() map[string]uint64
	Close() error
}

// Namespace is one struct net.
type Namespace struct {
	// Inode is the number of the namespace's nsfs inode, as ls -l
	// /proc/self/ns/net shows it. It is reused when the namespace is gone.
	Inode uint32
	// Cookie is the kernel's net_cookie, never reused; 0 where unknown.
	Cookie uint64
	// Initial tells that this is the kernel's init_net.
	Initial bool
	// Read is when the counters were read. A source may answer from memory.
	Read time.Time
	// Sysctls has a value per entry of SysctlNames, -1 where this namespace
	// or kernel does not have it.
	Sysctls [len(SysctlNames)]int64
	// Events has a counter per entry of EventNames since the namespace was
	// made; those outside EventsKnown are not this kernel's.
	Events      [len(EventNames)]uint64
	EventsKnown [len(EventNames)]bool
}

// SysctlNames are the settings that decide about a listener's queues and the
// life of a connection, as the files are called under net.core and net.ipv4.
// Times are in seconds.
var SysctlNames = [...]string{
	"somaxconn",
	"tcp_max_syn_backlog",
	"tcp_syncookies",
	"tcp_abort_on_overflow",
	"tcp_synack_retries",
	"tcp_syn_retries",
	"tcp_fin_timeout",
	"tcp_max_tw_buckets",
	"tcp_max_orphans",
}

// Indices into Namespace.Sysctls.
const (
	SysctlSomaxconn = iota
	SysctlMaxSynBacklog
	SysctlSyncookies
	SysctlAbortOnOverflow
	SysctlSynackRetries
	SysctlSynRetries
	SysctlFinTimeout
	SysctlMaxTWBuckets
	SysctlMaxOrphans
)

// EventNames are the TcpExt counters that tell about queues, as
// /proc/net/netstat spells them.
var EventNames = [...]string{
	"ListenOverflows",
	"ListenDrops",
	"TCPReqQFullDrop",
	"TCPReqQFullDoCookies",
	"SyncookiesSent",
	"SyncookiesRecv",
	"SyncookiesFailed",
	"TCPTimeWaitOverflow",
	"TCPAbortOnMemory",
	"EmbryonicRsts",
	"TCPDeferAcceptDrop",
	"TCPFastOpenListenOverflow",
	"TCPBacklogDrop",
	"TCPRcvQDrop",
	"TCPAbortOnTimeout",
	"TCPAbortFailed",
	"TCPSynRetrans",
	"TCPTimeouts",
	"PruneCalled",
	"RcvPruned",
}

// Direction tells who opened a connection.
type Direction uint8

// Inbound connections have a local port on which their namespace listens;
// every other connection is outbound.
const (
	Inbound Direction = iota
	Outbound
	Directions
)

func (d Direction) String() string {
	if d == Inbound {
		return "inbound"
	}
	return "outbound"
}

// Queues are the byte queues of connections: what the application has not read
// yet (Recv-Q) and what the peer has not acknowledged yet (Send-Q). Listeners
// are never counted in.
type Queues struct {
	ReceiveBytes, SendBytes       uint64 // sums
	ReceiveMaxBytes, SendMaxBytes uint64 // of the fullest connection
}

// Sockets is a count of all sockets.
type Sockets struct {
	// Namespaces has an entry for each namespace with a socket, in no order.
	Namespaces []NamespaceSockets
	// BoundKnown tells that CLOSE was counted: sockets that are bound, but
	// neither listening nor connected.
	BoundKnown bool
	// GaveUp has an entry for each port with such a connection, in no order.
	GaveUp []GaveUp
}

// GaveUp counts connections that wait for accept() although their client has
// closed its side: they are in CLOSE_WAIT, but no application's leak.
type GaveUp struct {
	Inode       uint32 // of the network namespace
	Cookie      uint64 // as Namespace.Cookie
	Port        uint16 // the local one
	Connections uint64
}

// NamespaceSockets counts the sockets of one namespace.
type NamespaceSockets struct {
	Inode  uint32
	Cookie uint64 // as Namespace.Cookie
	States [tcpstate.Count]uint64
	Queues [Directions]Queues
}

// Listener is a listening socket at one instant.
type Listener struct {
	// Key tells sockets of one moment apart: the socket's address, or its
	// cookie where the source has nothing better.
	Key uint64
	// Cookie is the socket cookie, 0 if nobody has asked the kernel for it yet.
	Cookie uint64
	// Socket is the number of the socket's inode, as /proc/PID/fd shows it; an
	// MPTCP listener's for the TCP socket that carries it; 0 if unknown. The
	// kernel's own sockets have one, but no process that holds it.
	Socket      uint64
	Inode       uint32 // of the network namespace
	NetnsCookie uint64
	Address     netip.AddrPort
	// Device is the name of the device that the socket is bound to, "" for none;
	// Interface is its index.
	Device    string
	Interface uint32
	// AcceptQueue are the connections waiting for accept() (sk_ack_backlog),
	// Limit the effective backlog (sk_max_ack_backlog). The queue is full at
	// Limit+1.
	AcceptQueue, Limit uint32
	// SynQueue are the half-open requests (icsk_accept_queue.qlen), -1 where
	// the source cannot tell: sock_diag does not show it.
	SynQueue int64
	// Drops is sk_drops, which wraps at 2^32.
	Drops uint32
}
