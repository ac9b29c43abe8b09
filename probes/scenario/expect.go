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
	// Happened is what led here; nil where the scenario does not say.
	Happened *Happened

	counters map[string]uint64 // what the kernel counted of Happened
}

// Happened is what happened in the namespace since the scenario began. A socket
// leaves the kernel's tables microseconds before the last of it is told.
type Happened struct {
	// Transitions are those that the tracepoint sock:inet_sock_set_state
	// tells truly: FIN_WAIT2→CLOSE and CLOSING→CLOSE, which may hide a
	// TIME_WAIT, only where the socket's error then tells that a RST or
	// SOCK_DESTROY ended the connection. No state is changed to itself.
	Transitions map[tcpstate.Edge]uint64
	// ConnectFailures are by error, as sockq_tcp_connect_failures_total has them.
	ConnectFailures map[string]uint64
	// ResetsSent are RST segments. Through 6.8 the tracepoint
	// tcp:tcp_send_reset tells only of those that a full socket sends.
	ResetsSent uint64
	// ResetsReceived are as the tracepoint tcp:tcp_receive_reset tells them,
	// which is about tcp_reset: it is silent where a RST ends a request or a
	// time-wait mini-socket, and tells of data, too, that comes to a closed
	// socket.
	ResetsReceived uint64
	// AttemptFails are, as /proc/net/snmp counts them, connections and
	// requests that ended before ESTABLISHED: not those that found no port
	// or that the application closed.
	AttemptFails uint64
}

// took counts n sockets, at least one, that went through these states.
func (h *Happened) took(n uint64, path ...tcpstate.State) *Happened {
	if h.Transitions == nil {
		h.Transitions = make(map[tcpstate.Edge]uint64)
	}
	for i := range path[1:] {
		h.Transitions[tcpstate.Edge{From: path[i], To: path[i+1]}] += n
	}
	return h
}

// inbound counts n connections to a listener and what became of them.
func (h *Happened) inbound(n uint64, then ...tcpstate.State) *Happened {
	return h.took(n, append([]tcpstate.State{tcpstate.Listen, tcpstate.SynRecv, tcpstate.Established}, then...)...)
}

// outbound counts n connections that were opened here and what became of them.
func (h *Happened) outbound(n uint64, then ...tcpstate.State) *Happened {
	return h.took(n, append([]tcpstate.State{tcpstate.Close, tcpstate.SynSent, tcpstate.Established}, then...)...)
}

// failed counts n calls of connect() that came to nothing.
func (h *Happened) failed(n uint64, why string) *Happened {
	if h.ConnectFailures == nil {
		h.ConnectFailures = make(map[string]uint64)
	}
	h.ConnectFailures[why] += n
	return h
}

// counters are those of /proc/net/snmp that h decides.
func (h *Happened) counters() map[string]uint64 {
	edge := func(from, to tcpstate.State) uint64 { return h.Transitions[tcpstate.Edge{From: from, To: to}] }
	return map[string]uint64{
		// tcp_connect, tcp_create_openreq_child
		"ActiveOpens":  edge(tcpstate.Close, tcpstate.SynSent) - h.ConnectFailures["no_ports"],
		"PassiveOpens": edge(tcpstate.Listen, tcpstate.SynRecv),
		// tcp_set_state
		"EstabResets":  edge(tcpstate.Established, tcpstate.Close) + edge(tcpstate.CloseWait, tcpstate.Close),
		"AttemptFails": h.AttemptFails,
		"OutRsts":      h.ResetsSent,
	}
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
	// Took is what came in since it listens for the first time; nil where the
	// scenario does not say.
	Took *Took
}

// Took is what a listening socket was asked and what became of it.
type Took struct {
	Connections       uint64 // handshakes completed into the accept queue
	Accepts           uint64 // taken by accept()
	AcceptsUnseen     bool   // some by io_uring, which no tracepoint shows: Accepts is unknown
	SynackRetransmits uint64 // a lower bound as long as the SYN queue is not empty
	IgnoredACKs       uint64 // final ACKs that found the accept queue full
	ResetACKs         uint64 // the same, answered with a RST (tcp_abort_on_overflow)
	Requested         int    // last argument of listen()
	// ShortPeak is the length that the accept queue had, too briefly for
	// samples to see; 0 where the scenario does not say.
	ShortPeak uint64
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
	counters := e.counters
	if e.Happened != nil {
		counters = e.Happened.counters()
	}
	for _, rose := range []map[string]uint64{e.Events, counters} {
		for _, name := range slices.Sorted(maps.Keys(rose)) {
			if n := rose[name]; n != 0 {
				add("%s +%d", name, n)
			}
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
