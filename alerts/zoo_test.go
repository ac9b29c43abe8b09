package alerts_test

import (
	"net/netip"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sockq/probes/scenario"
)

// zoo is a namespace in which everything that a dashboard shows happens again and
// again: a rate needs two samples of a series that begins with its first event.
type zoo struct {
	s                             *scenario.Stage
	server, short, flooded, stuck *scenario.Socket
	nobody, nowhere               netip.AddrPort
	timingOut                     *scenario.Socket
	rounds                        int
	last                          time.Time
}

func newZoo(t *testing.T) *zoo {
	scenario.Mixed.Hold(t, scenario.IPv4) // sockets in all states
	s := scenario.NewStage(t, scenario.IPv4)
	s.NS.Sysctl("net.core.somaxconn", "64")
	s.NS.Sysctl("net.ipv4.tcp_max_tw_buckets", "2")
	z := &zoo{
		s: s, server: s.Listen(1000), short: s.Listen(1), flooded: s.Listen(4), stuck: s.Listen(8),
		nobody: s.Next(), nowhere: netip.MustParseAddrPort("203.0.113.1:80"),
	}
	for range 2 {
		s.Peer().Connect(z.stuck.Addr())
	}
	s.Peer().Connect(z.stuck.Addr()).FIN() // gives up

	_, ours := z.accepted()
	ours.Write(1000) // nobody acknowledges it
	theirs, _ := z.accepted()
	theirs.Write(1000) // nobody reads it
	theirs, ours = z.accepted()
	ours.FIN()
	theirs.ACKFIN()
	return z
}

// accepted is a new connection from the peer.
func (z *zoo) accepted() (*scenario.Conn, *scenario.Socket) {
	theirs := z.s.Peer().Connect(z.server.Addr())
	return theirs, z.server.Accept()
}

// round lets everything happen once, every two seconds.
func (z *zoo) round() {
	if time.Since(z.last) < 2*time.Second {
		return
	}
	z.last = time.Now()
	z.rounds++
	either := strconv.Itoa(z.rounds % 2)

	// The accept queue overflows at final ACKs and SYNs.
	z.s.NS.Sysctl("net.ipv4.tcp_abort_on_overflow", either)
	late := z.s.Peer().SYN(z.short.Addr())
	late.AwaitSYNACK()
	for range 2 {
		z.s.Peer().Connect(z.short.Addr())
	}
	late.ACK()
	for range 2 {
		z.s.Peer().SYN(z.short.Addr())
	}
	for range 2 {
		z.short.Accept().Reset()
	}
	late.RST()

	// The SYN queue does.
	z.s.NS.Sysctl("net.ipv4.tcp_syncookies", either)
	var last *scenario.Conn
	for range 12 {
		last = z.s.Peer().SYN(z.flooded.Addr())
	}
	if either == "1" {
		last.AwaitSYNACK() // with a cookie
		last.ACK()
		z.flooded.Accept().Reset()
	}

	// connect() fails.
	z.s.Begin(z.nobody).Fails(unix.ECONNREFUSED)
	z.s.Socket().CannotConnect(z.nowhere, unix.ENETUNREACH)
	if z.timingOut != nil {
		z.timingOut.Fails(unix.ETIMEDOUT)
		z.timingOut.Close()
	}
	z.timingOut = z.s.Socket().Option(unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 1).Begin(z.s.Peer().Addr(80))

	// Connections end: more TIME_WAITs than the namespace allows, RSTs, two FINs that
	// cross, a leak.
	for range 3 {
		client := z.s.Connect(z.server.Addr())
		ours := z.server.Accept()
		client.Close()
		ours.Close()
	}
	theirs, ours := z.accepted()
	theirs.RST()
	ours.Close()
	_, ours = z.accepted()
	ours.Reset()
	theirs, ours = z.accepted()
	ours.FIN()
	theirs.FIN()
	theirs.RST()
	ours.Close()
	theirs, _ = z.accepted()
	theirs.FIN()
}
