package tcpstate

import (
	"slices"
	"strings"
	"testing"
)

func TestTransitions(t *testing.T) {
	seen := make(map[Edge]bool)
	taken, never := 0, false
	for i, tr := range Transitions {
		if seen[tr.Edge] {
			t.Errorf("%s twice", tr.Edge)
		}
		seen[tr.Edge] = true
		if tr.Event == "" || tr.Path == "" {
			t.Errorf("%s: event %q, path %q", tr.Edge, tr.Event, tr.Path)
		}
		if tr.From == tr.To {
			t.Errorf("%s is no change", tr.Edge)
		}
		place, ok := Index(tr.Edge)
		switch {
		case tr.Sight == Never:
			never = true
			if ok {
				t.Errorf("%s is never taken and has place %d", tr.Edge, place)
			}
			continue
		case never:
			t.Errorf("%s comes after an edge that is never taken", tr.Edge)
		case !ok || place != i || Transitions[place].Edge != tr.Edge:
			t.Errorf("%s has place %d (%t), want %d", tr.Edge, place, ok, i)
		}
		taken++
		// Who has no event of its own is a mini-socket.
		mini := slices.ContainsFunc([]State{tr.From, tr.To}, func(s State) bool { return s == NewSynRecv || s == TimeWait })
		if mini != (tr.Sight == Hidden) {
			t.Errorf("%s: sight %d", tr.Edge, tr.Sight)
		}
	}
	if taken > MaxEdges {
		t.Errorf("%d edges, room for %d", taken, MaxEdges)
	}
	for _, e := range []Edge{{Close, Close}, {Listen, SynSent}, {Close, Established}, {BoundInactive, SynSent}, {0, 42}} {
		if i, ok := Index(e); ok {
			t.Errorf("%s has place %d", e, i)
		}
	}
	if got := (Edge{SynSent, Established}).String(); got != "SYN_SENT→ESTABLISHED" {
		t.Errorf("edge is called %q", got)
	}
}

// The lines of RFC 9293's figure 5 and the footnotes, as the states are called
// here. SYN_RECV is both a request and a full socket.
func TestFigure5(t *testing.T) {
	for _, line := range strings.Fields(`
		CLOSE→LISTEN CLOSE→SYN_SENT LISTEN→CLOSE LISTEN→SYN_RECV LISTEN→SYN_SENT
		SYN_RECV→LISTEN SYN_RECV→ESTABLISHED SYN_RECV→FIN_WAIT1
		SYN_SENT→CLOSE SYN_SENT→SYN_RECV SYN_SENT→ESTABLISHED
		ESTABLISHED→FIN_WAIT1 ESTABLISHED→CLOSE_WAIT
		FIN_WAIT1→FIN_WAIT2 FIN_WAIT1→CLOSING FIN_WAIT1→TIME_WAIT
		FIN_WAIT2→TIME_WAIT CLOSING→TIME_WAIT TIME_WAIT→CLOSE
		CLOSE_WAIT→LAST_ACK LAST_ACK→CLOSE`) {
		if !slices.ContainsFunc(Transitions, func(tr Transition) bool { return tr.String() == line }) {
			t.Errorf("%s is missing", line)
		}
	}
}

func TestReachable(t *testing.T) {
	reach := func(from State, forward bool) Mask {
		found := MaskOf(from)
		for grown := Mask(0); grown != found; {
			grown = found
			for _, tr := range Transitions {
				here, there := tr.From, tr.To
				if !forward {
					here, there = there, here
				}
				if tr.Sight != Never && found.Has(here) {
					found |= MaskOf(there)
				}
			}
		}
		return found
	}
	for _, s := range append(All[:], NewSynRecv) {
		if !reach(Close, true).Has(s) {
			t.Errorf("%s cannot be reached", s)
		}
		if !reach(Close, false).Has(s) {
			t.Errorf("%s never ends", s)
		}
	}
	// A RST, or SOCK_DESTROY, ends every state at once.
	for _, s := range append(All[:], NewSynRecv) {
		if _, ok := Index(Edge{s, Close}); !ok && s != Close {
			t.Errorf("%s cannot be aborted", s)
		}
	}
}
