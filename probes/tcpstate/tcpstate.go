// Package tcpstate is the TCP state machine as Linux runs it: the states and
// their names. It is pure data and imports nothing of sockq.
package tcpstate

import "strconv"

// State is a TCP state with the kernel's number (include/net/tcp_states.h).
type State uint8

// The states, in the kernel's order and spelling. RFC 9293 section 3.3.2 has
// eleven of them; NEW_SYN_RECV is how Linux marks a request mini-socket and
// BOUND_INACTIVE is a name that only sock_diag uses (6.8+).
const (
	Established   State = 1
	SynSent       State = 2
	SynRecv       State = 3
	FinWait1      State = 4
	FinWait2      State = 5
	TimeWait      State = 6
	Close         State = 7
	CloseWait     State = 8
	LastAck       State = 9
	Listen        State = 10
	Closing       State = 11
	NewSynRecv    State = 12
	BoundInactive State = 13

	// Count is one more than the highest state that a socket is reported
	// in, so that [Count]uint64 holds one counter for each.
	Count = 12
)

// All lists the eleven states that sockq reports, in the kernel's order.
var All = [...]State{
	Established, SynSent, SynRecv, FinWait1, FinWait2, TimeWait,
	Close, CloseWait, LastAck, Listen, Closing,
}

var names = [...]string{
	Established:   "ESTABLISHED",
	SynSent:       "SYN_SENT",
	SynRecv:       "SYN_RECV",
	FinWait1:      "FIN_WAIT1",
	FinWait2:      "FIN_WAIT2",
	TimeWait:      "TIME_WAIT",
	Close:         "CLOSE",
	CloseWait:     "CLOSE_WAIT",
	LastAck:       "LAST_ACK",
	Listen:        "LISTEN",
	Closing:       "CLOSING",
	NewSynRecv:    "NEW_SYN_RECV",
	BoundInactive: "BOUND_INACTIVE",
}

// String is the kernel's spelling without its TCP_ prefix, "state 42" for a
// number that has none.
func (s State) String() string {
	if int(s) < len(names) && names[s] != "" {
		return names[s]
	}
	return "state " + strconv.Itoa(int(s))
}

// Reported is the state that sockq (and ss) shows for s: a request mini-socket
// is SYN_RECV, a bound socket is CLOSE.
func (s State) Reported() State {
	switch s {
	case NewSynRecv:
		return SynRecv
	case BoundInactive:
		return Close
	}
	return s
}

// Mask is a set of states, bit 1<<State each, as sock_diag takes it
// (TCPF_* in include/net/tcp_states.h).
type Mask uint32

// MaskOf is the set of the given states.
func MaskOf(states ...State) Mask {
	var m Mask
	for _, s := range states {
		m |= 1 << s
	}
	return m
}

// Has tells whether s is in the set.
func (m Mask) Has(s State) bool { return m&(1<<s) != 0 }

// Sets that callers ask for.
const (
	// MaskListen are listeners; sock_diag answers it without a walk over
	// the table of established sockets.
	MaskListen = Mask(1 << Listen)
	// MaskConnected is every state of a socket in the established table:
	// all but LISTEN and CLOSE, request and time-wait mini-sockets included.
	MaskConnected = Mask(1<<Established | 1<<SynSent | 1<<SynRecv | 1<<FinWait1 | 1<<FinWait2 |
		1<<TimeWait | 1<<CloseWait | 1<<LastAck | 1<<Closing | 1<<NewSynRecv)
	// MaskBound are sockets that are bound but neither listening nor
	// connected (6.8+; older kernels ignore the bit).
	MaskBound = Mask(1 << BoundInactive)
	// MaskAll is everything that sockq counts.
	MaskAll = MaskListen | MaskConnected | MaskBound
)
