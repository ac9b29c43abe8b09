package scenario

import (
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"sockq/probes/tcpstate"
)

// observe is what the kernel says that the namespace holds, and the state of
// each socket by cookie. What the kernel cannot tell, or what moves as want
// allows it, is as in want.
func (s *Stage) observe(want Expect) (Expect, map[uint64]tcpstate.State) {
	s.Helper()
	if want.Gone {
		return Expect{Gone: s.gone()}, nil
	}
	sockets := s.NS.Sockets(tcpstate.MaskAll)
	got := Expect{Events: s.events()}
	if want.Happened != nil {
		got.counters = s.counted(want.Happened)
	}
	states := make(map[uint64]tcpstate.State, len(sockets))
	listening := make(map[uint16]bool)
	requests := make(map[uint16]uint32)
	for i := range sockets {
		k := &sockets[i]
		states[k.Cookie] = k.State
		got.States[k.State.Reported()]++
		switch {
		case k.State == tcpstate.Listen:
			listening[k.Local.Port()] = true
		case k.Request():
			requests[k.Local.Port()]++
		}
	}
	for i := range sockets {
		k := &sockets[i]
		if length, limit, ok := k.AcceptQueue(); ok {
			l := Listener{
				Address: k.Local, Device: device(k.Interface),
				AcceptQueue: length, Limit: limit,
				SynQueue: requests[k.Local.Port()],
			}
			if mem, ok := k.SKMemInfo(); ok {
				l.Drops = mem.Drops
			}
			got.Listeners = append(got.Listeners, l)
		}
		receive, send, ok := k.ByteQueues()
		switch {
		case !ok || k.State.Reported() == tcpstate.Close:
		case listening[k.Local.Port()]:
			got.Inbound.add(uint64(receive), uint64(send))
		default:
			got.Outbound.add(uint64(receive), uint64(send))
		}
	}

	if !boundShown() {
		got.States[tcpstate.Close] = want.States[tcpstate.Close]
	}
	if want.Retransmits {
		for name, n := range want.Events {
			if got.Events[name] > n {
				got.Events[name] = n
			}
		}
		for i := range got.Listeners {
			for _, l := range want.Listeners {
				if l.String() == got.Listeners[i].String() {
					got.Listeners[i].Drops = min(got.Listeners[i].Drops, l.Drops)
				}
			}
		}
	}
	return got, states
}

// device is the name of the device with that index. There is only lo.
func device(index uint32) string {
	switch index {
	case 0:
		return ""
	case loopbackIndex:
		return "lo"
	}
	return fmt.Sprintf("if%d", index)
}

// events are the watched counters that rose since the scenario began.
func (s *Stage) events() map[string]uint64 {
	s.Helper()
	now := s.NS.Netstat()
	rose := make(map[string]uint64)
	for _, name := range watched {
		if n := now[name] - s.netstat[name]; n != 0 {
			rose[name] = n
		}
	}
	return rose
}

// counted are the counters that h decides, as the kernel has them since the
// scenario began.
func (s *Stage) counted(h *Happened) map[string]uint64 {
	s.Helper()
	now := s.NS.SNMP()
	counters := h.counters()
	for name := range counters {
		counters[name] = now[name] - s.snmp[name]
	}
	return counters
}

// settle waits until the kernel shows exactly want. It returns the state of
// each socket.
func (s *Stage) settle(want Expect) map[uint64]tcpstate.State {
	s.Helper()
	pause := time.Millisecond
	for deadline := time.Now().Add(patience); ; pause = min(2*pause, 100*time.Millisecond) {
		got, states := s.observe(want)
		difference := diff(want.lines(), got.lines())
		if difference == "" {
			return states
		}
		if time.Now().After(deadline) {
			s.Fatalf("the kernel does not show what the scenario says (-scenario +kernel):\n%s", difference)
		}
		time.Sleep(pause)
	}
}

// boundShown tells whether sock_diag lists bound sockets (TCPF_BOUND_INACTIVE):
// since 6.8. The release decides, not what sock_diag says, so that a kernel
// that should and does not fails the test.
var boundShown = sync.OnceValue(func() bool { return KernelAtLeast(6, 8) })

// KernelAtLeast tells whether the kernel's release is that or a later one. Tests
// decide by it what the kernel owes them.
func KernelAtLeast(major, minor int) bool {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return false
	}
	var a, b int
	if n, _ := fmt.Sscanf(unix.ByteSliceToString(name.Release[:]), "%d.%d", &a, &b); n != 2 {
		return false
	}
	return a > major || a == major && b >= minor
}
