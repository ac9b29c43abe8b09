package tcpstate

import "testing"

func TestNames(t *testing.T) {
	seen := make(map[string]bool)
	for _, s := range All {
		name := s.String()
		if seen[name] || s.Reported() != s || s >= Count {
			t.Errorf("state %d: name %q, reported as %s", uint8(s), name, s.Reported())
		}
		seen[name] = true
	}
	if len(seen) != 11 {
		t.Errorf("%d states, RFC 9293 has 11", len(seen))
	}
	for s, want := range map[State]string{
		FinWait1: "FIN_WAIT1", SynRecv: "SYN_RECV", NewSynRecv: "NEW_SYN_RECV", 0: "state 0", 42: "state 42",
	} {
		if s.String() != want {
			t.Errorf("state %d is called %q, want %q", uint8(s), s, want)
		}
	}
	if NewSynRecv.Reported() != SynRecv || BoundInactive.Reported() != Close {
		t.Error("mini-sockets and bound sockets are reported under their own names")
	}
}

func TestMasks(t *testing.T) {
	if got := MaskOf(Established, Listen); got != 1<<1|1<<10 || !got.Has(Listen) || got.Has(Close) {
		t.Errorf("mask is %#x", uint32(got))
	}
	for _, s := range All {
		if s != Close && !MaskAll.Has(s) {
			t.Errorf("%s is not among all", s)
		}
	}
	// CLOSE is asked for as what it is: bound.
	if MaskAll.Has(Close) || !MaskAll.Has(BoundInactive) {
		t.Errorf("all is %#x", uint32(MaskAll))
	}
	if MaskConnected&(MaskListen|MaskBound) != 0 {
		t.Error("a listener is connected")
	}
}
