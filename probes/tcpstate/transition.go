package tcpstate

// Edge is a change from one state to another.
type Edge struct{ From, To State }

// String is "SYN_SENT→ESTABLISHED".
func (e Edge) String() string { return e.From.String() + "→" + e.To.String() }

// Sight says how Linux shows that a socket took an edge.
type Sight uint8

// The sights.
const (
	// Reported edges are those of full sockets: the tracepoint
	// sock:inet_sock_set_state tells them.
	Reported Sight = iota
	// Hidden edges are those of request and time-wait mini-sockets, or end in
	// one: no tracepoint tells them, only trampolines and kprobes do.
	Hidden
	// Never are edges of RFC 9293 that Linux does not take.
	Never
)

// Transition is an edge of the state machine.
type Transition struct {
	Edge
	Sight Sight
	Event string // of RFC 9293, with the section where it is not figure 5's
	Path  string // the kernel's functions, the one that sets the state last
}

// MaxEdges is more than there are edges that Linux takes, so that
// [MaxEdges]uint64 holds a counter for each by its Index.
const MaxEdges = 48

// Transitions are all edges, those that Linux takes first.
//
// A change to the same state is none: a listener that SOCK_DESTROY ends is
// reported from CLOSE to CLOSE, too. TCP_REPAIR has no edges of its own: a
// repaired connect() passes SYN_SENT, and a repaired socket is closed without a
// RST.
//
// The tracepoint tells FIN_WAIT2→CLOSE and CLOSING→CLOSE also when a time-wait
// mini-socket takes over (tcp_time_wait), in TIME_WAIT or, for an orphan, still
// in FIN_WAIT2.
var Transitions = []Transition{
	// Both ways to open.
	{Edge{Close, SynSent}, Reported, "OPEN call, active; send SYN", "tcp_v4_connect, tcp_v6_connect"},
	{Edge{Close, Listen}, Reported, "OPEN call, passive", "inet_csk_listen_start"},
	{Edge{SynSent, Established}, Reported, "receive SYN,ACK; send ACK", "tcp_rcv_synsent_state_process, tcp_finish_connect"},
	{Edge{SynSent, SynRecv}, Reported, "receive SYN; send SYN,ACK: simultaneous open", "tcp_rcv_synsent_state_process"},
	// What is reported is a new socket, the listener stays what it is.
	{Edge{Listen, SynRecv}, Reported, "receive SYN; send SYN,ACK", "tcp_create_openreq_child, inet_csk_clone_lock: at the final ACK, with TFO at the SYN"},
	{Edge{SynRecv, Established}, Reported, "receive ACK of SYN", "tcp_rcv_state_process"},

	// Both ways to close.
	{Edge{Established, FinWait1}, Reported, "CLOSE call; send FIN", "__tcp_close or tcp_shutdown, tcp_close_state"},
	{Edge{SynRecv, FinWait1}, Reported, "CLOSE call; send FIN", "__tcp_close, tcp_close_state: after a simultaneous open, or a child of TFO; until 6.8 tcp_shutdown, too"},
	{Edge{FinWait1, FinWait2}, Reported, "receive ACK of FIN", "tcp_rcv_state_process"},
	{Edge{FinWait1, Closing}, Reported, "receive FIN; send ACK: simultaneous close", "tcp_fin"},
	{Edge{Established, CloseWait}, Reported, "receive FIN; send ACK", "tcp_fin"},
	{Edge{CloseWait, LastAck}, Reported, "CLOSE call; send FIN", "__tcp_close or tcp_shutdown, tcp_close_state"},
	{Edge{LastAck, Close}, Reported, "receive ACK of FIN", "tcp_rcv_state_process, tcp_update_metrics, tcp_done; an abort: as from ESTABLISHED"},

	// Ends before ESTABLISHED.
	{Edge{Listen, Close}, Reported, "CLOSE call (3.10.4)", "__tcp_close, tcp_disconnect (also shutdown(SHUT_RD)), tcp_abort (SOCK_DESTROY); inet_csk_listen_start, where the port was taken meanwhile"},
	{Edge{SynSent, Close}, Reported, "CLOSE call, receive RST, or timeout (3.10.4, 3.10.7.3, 3.10.8)", "__tcp_close or tcp_disconnect; tcp_reset; tcp_write_err; tcp_v4_err, tcp_v6_err (ICMP); tcp_abort; tcp_v4_connect, tcp_v6_connect, where no port is left"},
	{Edge{SynRecv, Close}, Reported, "ABORT call, receive RST, or timeout (3.10.5, 3.10.7.4, 3.10.8)", "as from ESTABLISHED; inet_csk_prepare_forced_close, tcp_done, where a child finds no place"},

	// Aborts.
	{Edge{Established, Close}, Reported, "ABORT call, receive RST, or timeout (3.10.5, 3.10.7.4, 3.10.8)", "__tcp_close (SO_LINGER 0, or unread bytes), tcp_disconnect (also inet_child_forget), tcp_reset, tcp_write_err, tcp_keepalive_timer, tcp_abort (SOCK_DESTROY)"},
	{Edge{FinWait1, Close}, Reported, "ABORT call, receive RST, or timeout (3.10.5, 3.10.7.4, 3.10.8)", "as from ESTABLISHED; tcp_out_of_resources (too many orphans)"},
	{Edge{FinWait2, Close}, Reported, "ABORT call, receive RST, or timeout (3.10.5, 3.10.7.4, 3.10.8)", "as from ESTABLISHED; tcp_rcv_state_process or __tcp_close (TCP_LINGER2 below 0); tcp_time_wait, where no mini-socket is to be had; inet_twsk_kill of an orphan's, which is not reported"},
	{Edge{Closing, Close}, Reported, "ABORT call, receive RST, or timeout (3.10.5, 3.10.7.4, 3.10.8)", "as from ESTABLISHED; tcp_time_wait, where no mini-socket is to be had"},
	{Edge{CloseWait, Close}, Reported, "ABORT call, receive RST, or timeout (3.10.5, 3.10.7.4, 3.10.8)", "as from ESTABLISHED"},

	// Request mini-sockets.
	{Edge{Listen, NewSynRecv}, Hidden, "receive SYN; send SYN,ACK", "tcp_conn_request, inet_csk_reqsk_queue_hash_add; not with SYN cookies"},
	{Edge{NewSynRecv, SynRecv}, Hidden, "receive ACK of SYN", "tcp_check_req, inet_csk_complete_hashdance: the child's LISTEN→SYN_RECV is reported"},
	{Edge{NewSynRecv, Close}, Hidden, "receive RST, or timeout (3.10.7.4, 3.10.8)", "inet_csk_reqsk_queue_drop: tcp_check_req (RST, SYN, tcp_abort_on_overflow), tcp_req_err (ICMP), reqsk_timer_handler, tcp_abort"},

	// Time-wait mini-sockets.
	{Edge{FinWait2, TimeWait}, Hidden, "receive FIN; send ACK", "tcp_fin, tcp_time_wait; of an orphan's mini-socket tcp_timewait_state_process"},
	{Edge{Closing, TimeWait}, Hidden, "receive ACK of FIN", "tcp_rcv_state_process, tcp_time_wait"},
	{Edge{TimeWait, Close}, Hidden, "timeout of 2 MSL", "tw_timer_handler, inet_twsk_kill; inet_twsk_deschedule_put at a RST, a new SYN, a connect() that takes the port over, or SOCK_DESTROY"},

	{Edge{Listen, SynSent}, Never, "OPEN call, active, or SEND call; send SYN (3.10.1, 3.10.2)", "connect() is refused with EISCONN (inet_stream_connect), send() with EPIPE (tcp_sendmsg)"},
	{Edge{SynRecv, Listen}, Never, "receive RST", "tcp_check_req drops the request, the listener never left LISTEN; a full socket becomes CLOSE (tcp_reset)"},
	{Edge{SynRecv, CloseWait}, Never, "receive FIN; send ACK (3.10.7.4)", "tcp_rcv_state_process passes ESTABLISHED within the segment, then tcp_fin; without an acceptable ACK it drops the segment, and a SYN that has a FIN, too, also with TFO"},
	{Edge{FinWait1, TimeWait}, Never, "receive FIN and ACK of FIN; send ACK", "tcp_rcv_state_process passes FIN_WAIT2 within the segment, then tcp_fin"},
	{Edge{TimeWait, SynRecv}, Never, "receive SYN that reopens the connection (3.6.1)", "tcp_timewait_state_process answers TCP_TW_SYN: the mini-socket ends and the listener begins a request"},
}

var index = func() map[Edge]int {
	m := make(map[Edge]int)
	for i, t := range Transitions {
		if t.Sight != Never {
			m[t.Edge] = i
		}
	}
	return m
}()

// Index is the edge's place in Transitions; false for one that Linux does not
// take, so that it is unexpected.
func Index(e Edge) (int, bool) {
	i, ok := index[e]
	return i, ok
}
