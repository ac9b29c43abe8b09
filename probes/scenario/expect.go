package scenario

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"sockq/probes/tcpstate"
)

// Expect is what a namespace holds, to the last socket, while a scenario
// stands still.
type Expect struct {
	// States counts sockets by reported state: a request is SYN_RECV, an
	// orphaned FIN_WAIT2 mini-socket FIN_WAIT2, and CLOSE is a socket that is
	// bound, but neither listening nor connected.
	States States
	// Inbound connections have a local port on which the namespace listens.
	Inbound, Outbound Queues
	// Listeners has an entry for each listening socket, in no order.
	Listeners []Listener
	// Events are the TcpExt counters that rose since the scenario began, and
	// by how much; those about listeners that are not named here did not.
	Events map[string]uint64
	// Retransmits tells that clients are sending SYNs again: the listeners'
	// Drops and the Events that are named are lower bounds.
	Retransmits bool
	// Gone tells that the namespace does not exist any more.
	Gone bool
}

// States counts sockets by state.
type States = [tcpstate.Count]uint64

// Queues are the byte queues of connections, as sock_diag counts them: a FIN
// that was received is one byte that was not read, a SYN or FIN of ours that
// was not acknowledged one byte that was not sent. Requests and time-waits have
// none. It converts to census.Queues.
type Queues struct {
	ReceiveBytes, SendBytes       uint64 // sums
	ReceiveMaxBytes, SendMaxBytes uint64 // of the fullest connection
}

func (q *Queues) add(receive, send uint64) {
	q.ReceiveBytes += receive
	q.SendBytes += send
	q.ReceiveMaxBytes = max(q.ReceiveMaxBytes, receive)
	q.SendMaxBytes = max(q.SendMaxBytes, send)
}

// Listener is one listening socket.
type Listener struct {
	Address netip.AddrPort
	Device  string // that it is bound to, "" for none
	// AcceptQueue are the connections that wait for accept(), Limit is the
	// effective backlog.
	AcceptQueue, Limit uint32
	// SynQueue are the half-open requests.
	SynQueue uint32
	// Drops is sk_drops.
	Drops uint32
	// Peak is the length that the accept queue had for 300 ms before this
	// moment, 0 if it was never longer than now. sock_diag cannot tell.
	Peak uint32
}

// String is the address as sockq's labels have it, "0.0.0.0:80%lo".
func (l Listener) String() string {
	if l.Device != "" {
		return l.Address.String() + "%" + l.Device
	}
	return l.Address.String()
}

func compareListeners(a, b Listener) int {
	return cmp.Or(
		cmp.Compare(a.String(), b.String()), cmp.Compare(a.AcceptQueue, b.AcceptQueue),
		cmp.Compare(a.Limit, b.Limit), cmp.Compare(a.SynQueue, b.SynQueue), cmp.Compare(a.Drops, b.Drops),
	)
}

// watched are the TcpExt counters about listeners and their queues.
var watched = [...]string{
	"ListenOverflows", "ListenDrops", "TCPReqQFullDrop", "TCPReqQFullDoCookies",
	"SyncookiesSent", "SyncookiesRecv", "SyncookiesFailed", "EmbryonicRsts",
	"TCPTimeWaitOverflow", "TCPDeferAcceptDrop", "TCPAbortOnMemory",
}

// lines is e as text, to compare and to read.
func (e Expect) lines() []string {
	if e.Gone {
		return []string{"namespace gone"}
	}
	var lines []string
	add := func(format string, args ...any) { lines = append(lines, fmt.Sprintf(format, args...)) }
	for _, state := range tcpstate.All {
		if n := e.States[state]; n != 0 {
			add("%s %d", state, n)
		}
	}
	for _, l := range slices.SortedFunc(slices.Values(e.Listeners), compareListeners) {
		add("listener %s: accept queue %d of %d, SYN queue %d, drops %d", l, l.AcceptQueue, l.Limit, l.SynQueue, l.Drops)
	}
	for _, d := range []struct {
		name string
		Queues
	}{{"inbound", e.Inbound}, {"outbound", e.Outbound}} {
		if d.Queues != (Queues{}) {
			add("%s: receive %d (fullest %d), send %d (fullest %d)",
				d.name, d.ReceiveBytes, d.ReceiveMaxBytes, d.SendBytes, d.SendMaxBytes)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(e.Events)) {
		if n := e.Events[name]; n != 0 {
			add("%s +%d", name, n)
		}
	}
	return lines
}

// diff tells in which lines got differs from want, "" if in none.
func diff(want, got []string) string {
	if slices.Equal(want, got) {
		return ""
	}
	var b strings.Builder
	for _, line := range want {
		if !slices.Contains(got, line) {
			fmt.Fprintf(&b, "- %s\n", line)
		}
	}
	for _, line := range got {
		if !slices.Contains(want, line) {
			fmt.Fprintf(&b, "+ %s\n", line)
		}
	}
	if b.Len() == 0 { // the same lines, but not as often
		return fmt.Sprintf("- %s\n+ %s\n", strings.Join(want, "\n- "), strings.Join(got, "\n+ "))
	}
	return b.String()
}
