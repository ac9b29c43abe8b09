package sockdiag

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"sockq/probes/tcpstate"
)

// Socket is a TCP socket as the kernel reports it (struct inet_diag_msg).
type Socket struct {
	Family uint8 // unix.AF_INET or unix.AF_INET6
	// State is as the kernel gives it: a half-open request is SYN_RECV (see
	// Request), a time-wait mini-socket TIME_WAIT or, orphaned before the
	// peer's FIN came, FIN_WAIT2 (see TimeWait), a bound socket CLOSE.
	State       tcpstate.State
	Timer       Timer
	Retransmits uint8         // of the pending timer
	Expires     time.Duration // until Timer fires, in milliseconds
	// Local and Remote are as the socket has them: a connection over IPv4 of
	// an IPv6 socket has v4-mapped addresses.
	Local, Remote netip.AddrPort
	Interface     uint32 // index of the device that it is bound to, 0 for none
	// Cookie is the socket's for its whole life, SO_COOKIE and
	// bpf_get_socket_cookie. A request, the socket that it becomes and the
	// time-wait that this leaves share one.
	Cookie uint64
	UID    uint32 // of the creator; 0 for mini-sockets
	Inode  uint32 // of the socket file; 0 for mini-sockets, orphans and what waits for accept()

	receiveQueue, sendQueue uint32
	attributes              []byte
}

// Timer is the timer that is pending for a socket (idiag_timer).
type Timer uint8

// The timers (inet_sk_diag_fill, inet_twsk_diag_fill).
const (
	TimerOff        Timer = 0
	TimerRetransmit Timer = 1 // of data, of a probe for loss, of a request's SYN-ACK
	TimerKeepalive  Timer = 2 // also the end of an orphan's FIN_WAIT2
	TimerTimeWait   Timer = 3 // only of time-wait mini-sockets
	TimerProbe      Timer = 4 // of a closed window
)

var timerNames = [...]string{"off", "on", "keepalive", "timewait", "persist"}

// String is the name that ss(8) shows.
func (t Timer) String() string {
	if int(t) < len(timerNames) {
		return timerNames[t]
	}
	return "timer " + strconv.Itoa(int(t))
}

// TimeWait tells whether s is a time-wait mini-socket. Its State is TIME_WAIT,
// or FIN_WAIT2 for an orphan whose peer has not closed yet.
func (s *Socket) TimeWait() bool { return s.Timer == TimerTimeWait }

// Request tells whether s is a half-open request in a listener's SYN queue
// rather than a full socket in SYN_RECV (a TCP Fast Open child or a
// simultaneous open).
func (s *Socket) Request() bool {
	if s.State != tcpstate.SynRecv && s.State != tcpstate.NewSynRecv {
		return false
	}
	// Every full socket comes with this one (inet_diag_msg_attrs_fill).
	_, full := s.attribute(attrShutdown)
	return !full
}

// AcceptQueue is the accept queue of a listener: the connections that wait for
// accept() (sk_ack_backlog) and the effective backlog (sk_max_ack_backlog).
// The queue is full at limit+1. ok is false for all other sockets.
func (s *Socket) AcceptQueue() (length, limit uint32, ok bool) {
	if s.State != tcpstate.Listen {
		return 0, 0, false
	}
	return s.receiveQueue, s.sendQueue, true
}

// ByteQueues are the byte queues of a full socket: what the application has
// not read (rcv_nxt - copied_seq; a FIN that was received counts as one) and
// what the peer has not acknowledged, sent or not (write_seq - snd_una; our SYN
// and FIN count). ok is false for a listener, where the kernel shows the accept
// queue in these fields, and for requests and time-waits, which have no queues.
func (s *Socket) ByteQueues() (receive, send uint32, ok bool) {
	if s.State == tcpstate.Listen || s.TimeWait() || s.Request() {
		return 0, 0, false
	}
	return s.receiveQueue, s.sendQueue, true
}

// sizeofMsg is the size of struct inet_diag_msg.
const sizeofMsg = 72

var errShortSocket = errors.New("short socket message")

// parseSocket decodes the body of a reply into s. s refers to b.
func parseSocket(b []byte, s *Socket) error {
	if len(b) < sizeofMsg {
		return fmt.Errorf("%w: %d bytes", errShortSocket, len(b))
	}
	var local, remote netip.Addr
	switch b[0] {
	case unix.AF_INET:
		local = netip.AddrFrom4([4]byte(b[8:]))
		remote = netip.AddrFrom4([4]byte(b[24:]))
	case unix.AF_INET6:
		local = netip.AddrFrom16([16]byte(b[8:]))
		remote = netip.AddrFrom16([16]byte(b[24:]))
	default:
		return fmt.Errorf("socket of address family %d", b[0])
	}
	u32 := binary.NativeEndian.Uint32
	*s = Socket{
		Family:       b[0],
		State:        tcpstate.State(b[1]),
		Timer:        Timer(b[2]),
		Retransmits:  b[3],
		Local:        netip.AddrPortFrom(local, binary.BigEndian.Uint16(b[4:])),
		Remote:       netip.AddrPortFrom(remote, binary.BigEndian.Uint16(b[6:])),
		Interface:    u32(b[40:]),
		Cookie:       uint64(u32(b[44:])) | uint64(u32(b[48:]))<<32,
		Expires:      time.Duration(u32(b[52:])) * time.Millisecond,
		receiveQueue: u32(b[56:]),
		sendQueue:    u32(b[60:]),
		UID:          u32(b[64:]),
		Inode:        u32(b[68:]),
		attributes:   b[sizeofMsg:],
	}
	return nil
}
