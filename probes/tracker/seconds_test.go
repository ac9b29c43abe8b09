package tracker

import (
	"testing"
	"time"

	"sockq/probes/scenario"
	"sockq/probes/tcpstate"
)

// stopwatch holds a histogram of one duration against what it can have been at
// least and at most.
type stopwatch struct {
	tb         testing.TB
	early      time.Duration // before the state began
	late       time.Duration // after it began
	low, high  time.Duration
	bucketLow  int
	bucketHigh int
}

func clock(tb testing.TB) time.Duration {
	tb.Helper()
	now, err := monotonic()
	if err != nil {
		tb.Fatal(err)
	}
	return now
}

// start runs what begins a state.
func start(tb testing.TB, begin func()) *stopwatch {
	tb.Helper()
	w := &stopwatch{tb: tb, early: clock(tb)}
	begin()
	w.late = clock(tb)
	return w
}

// stop waits and runs what ends the state.
func (w *stopwatch) stop(after time.Duration, end func()) {
	w.tb.Helper()
	time.Sleep(after)
	w.low = clock(w.tb) - w.late
	end()
	w.high = clock(w.tb) - w.early
	w.bucketLow, w.bucketHigh = bucketFor(uint64(w.low)), bucketFor(uint64(w.high))
}

func (w *stopwatch) check(what string, h *Histogram) {
	w.tb.Helper()
	if h.Count() != 1 || h.Sum < w.low.Seconds() || h.Sum > w.high.Seconds() {
		w.tb.Errorf("%s: %d times, in all %g s, want one of %s to %s", what, h.Count(), h.Sum, w.low, w.high)
	}
	for i, n := range h.Buckets {
		if n != 0 && (i < w.bucketLow || i > w.bucketHigh) {
			w.tb.Errorf("%s: bucket %d, want %d to %d", what, i, w.bucketLow, w.bucketHigh)
		}
	}
}

// What the tracker cannot tell it does not tell.
var unobserved = []tcpstate.State{synRecv, finWait2, tcpstate.TimeWait, closed}

func TestStateSeconds(t *testing.T) {
	if !needs(t, StoryStateSeconds) {
		return
	}
	for _, family := range []scenario.Family{scenario.IPv4, scenario.IPv6} {
		t.Run(family.String(), func(t *testing.T) {
			tr, s := share(t), scenario.NewStage(t, family)
			id := identify(t, s.NS)

			var l, client, server *scenario.Socket
			var theirs *scenario.Conn
			listening := start(t, func() { l = s.Listen(5) })

			// An inbound connection that the peer closes.
			var established1 *stopwatch
			waiting := start(t, func() {
				established1 = start(t, func() {
					theirs = s.Peer().Connect(l.Addr())
					become(t, "connections", 1, func() uint64 {
						n := happened(t, tr, id)
						return count(&n, synRecv, established)
					})
				})
			})
			waiting.stop(300*time.Millisecond, func() { server = l.Accept() })
			var closeWaiting, lastAcking *stopwatch
			established1.stop(0, func() {
				closeWaiting = start(t, func() {
					theirs.FIN()
					server.Await(closeWait)
				})
			})
			closeWaiting.stop(100*time.Millisecond, func() { lastAcking = start(t, server.Close) })
			lastAcking.stop(70*time.Millisecond, func() {
				theirs.ACKFIN()
				become(t, "ends", 1, func() uint64 {
					n := happened(t, tr, id)
					return count(&n, lastAck, closed)
				})
			})

			n := happened(t, tr, id)
			established1.check("ESTABLISHED", &n.States[established])
			closeWaiting.check("CLOSE_WAIT", &n.States[closeWait])
			lastAcking.check("LAST_ACK", &n.States[lastAck])
			for _, heard := range heard(t, tr, id) {
				waiting.check("accept wait", &heard.AcceptWait)
				if waiting.high < 500*time.Millisecond && heard.AcceptWait.Buckets[19] != 1 {
					t.Errorf("300 ms are not in the bucket up to 0.5 s: %v", heard.AcceptWait.Buckets)
				}
			}

			// An outbound connection that is closed here, at the same time as there.
			var finWaiting, closingToo *stopwatch
			connecting := start(t, func() { client = s.Begin(s.Peer().Addr(80)) })
			connecting.stop(1500*time.Millisecond, func() {
				theirs = s.Peer().Answer(client)
				client.Established()
			})
			finWaiting = start(t, client.FIN)
			finWaiting.stop(60*time.Millisecond, func() {
				closingToo = start(t, func() {
					theirs.FIN()
					client.Await(closing)
				})
			})
			closingToo.stop(40*time.Millisecond, func() {
				theirs.ACKFIN()
				client.Close()
				become(t, "sockets", 0, func() int {
					return len(s.NS.Sockets(tcpstate.MaskOf(closing)))
				})
			})
			listening.stop(0, l.Close)

			n = happened(t, tr, id)
			connecting.check("SYN_SENT", &n.States[synSent])
			connecting.check("connect", &n.Connects)
			if connecting.high < 2*time.Second && n.Connects.Buckets[21] != 1 {
				t.Errorf("1.5 s are not in the bucket up to 2 s: %v", n.Connects.Buckets)
			}
			finWaiting.check("FIN_WAIT1", &n.States[finWait1])
			closingToo.check("CLOSING", &n.States[closing])
			listening.check("LISTEN", &n.States[listens])
			for _, state := range unobserved {
				if h := n.States[state]; h != (Histogram{}) {
					t.Errorf("%s: %+v", state, h)
				}
			}
		})
	}
}

// What a mini-socket stands for takes as long as it does: a request is SYN_RECV, and
// an orphan that closed first is in FIN_WAIT2, then in TIME_WAIT.
func TestSecondsOfMiniSockets(t *testing.T) {
	if !needsHooks(t, StoryHalfOpen, StoryTimeWait) {
		return
	}
	for _, family := range []scenario.Family{scenario.IPv4, scenario.IPv6} {
		t.Run(family.String(), func(t *testing.T) {
			tr, s := shareHooks(t), scenario.NewStage(t, family)
			id := identify(t, s.NS)
			l := s.Listen(5)
			requests := func() int { return len(s.NS.Sockets(tcpstate.MaskOf(synRecv))) }
			var theirs *scenario.Conn
			requested := start(t, func() {
				theirs = s.Peer().SYN(l.Addr())
				theirs.AwaitSYNACK()
				become(t, "requests", 1, requests)
			})
			requested.stop(100*time.Millisecond, func() {
				theirs.ACK()
				become(t, "requests", 0, requests)
			})
			server := l.Accept()
			waiting := func(state tcpstate.State) {
				become(t, state.String(), 1, func() int { return len(s.NS.Sockets(tcpstate.MaskOf(state))) })
			}
			finWaiting := start(t, func() {
				server.Close()
				theirs.AwaitFIN()
				theirs.ACKFIN()
				waiting(finWait2)
			})
			var timeWaiting *stopwatch
			finWaiting.stop(100*time.Millisecond, func() {
				timeWaiting = start(t, func() {
					theirs.FIN()
					waiting(tcpstate.TimeWait)
				})
			})
			timeWaiting.stop(100*time.Millisecond, func() {
				s.End()
				become(t, "ends of TIME_WAIT", 1, func() uint64 {
					n := happened(t, tr, id)
					return count(&n, tcpstate.TimeWait, closed)
				})
			})
			n := happened(t, tr, id)
			requested.check("SYN_RECV", &n.States[synRecv])
			finWaiting.check("FIN_WAIT2", &n.States[finWait2])
			timeWaiting.check("TIME_WAIT", &n.States[tcpstate.TimeWait])
			if n := count(&n, finWait2, closed); n != 0 {
				t.Errorf("%d times FIN_WAIT2→CLOSE", n)
			}
		})
	}
}

// A connect() that comes to nothing takes no time to connect, but is in SYN_SENT
// as long as it is.
func TestSecondsOfAFailedConnect(t *testing.T) {
	if !needs(t, StoryStateSeconds) {
		return
	}
	tr, s := share(t), scenario.NewStage(t, scenario.IPv4)
	id := identify(t, s.NS)
	var client *scenario.Socket
	w := start(t, func() { client = s.Begin(s.Peer().Addr(80)) })
	w.stop(50*time.Millisecond, client.Close)
	n := happened(t, tr, id)
	w.check("SYN_SENT", &n.States[synSent])
	if n.Connects.Count() != 0 || n.ConnectFailures[ConnectClosed] != 1 {
		t.Errorf("%d connects, failures %v", n.Connects.Count(), failures(&n))
	}
}

// Of all namespaces together there is no telling whose a duration is. A day in
// CLOSE_WAIT is ours.
func TestStateSecondsOfTheNode(t *testing.T) {
	if !needs(t, StoryStateSeconds) {
		return
	}
	tr := openTracker(t, Options{StateSeconds: true})
	ns := scenario.NewNamespace(t)
	l := listenIn(t, ns, 5)
	before, err := tr.StateSeconds()
	if err != nil || before == nil {
		t.Fatalf("seconds are %v, %v", before, err)
	}
	client := dial(t, ns, l)
	server := l.accept()
	client.close()
	server.hungUp()
	day := 24 * time.Hour
	rewind(t, tr, tcpstate.CloseWait, day)
	server.close()
	l.close()
	b := bucketFor(uint64(day))
	become(t, "CLOSE_WAIT of a day", true, func() bool {
		now, err := tr.StateSeconds()
		if err != nil {
			t.Fatal(err)
		}
		h, earlier := now[closeWait], before[closeWait]
		grown := h.Buckets[b] - earlier.Buckets[b]
		return grown > 0 && h.Sum-earlier.Sum >= day.Seconds()
	})
	n := happened(t, tr, identify(t, ns))
	if n.States != nil || tr.StatesPerNamespace() {
		t.Error("a namespace has seconds of its own")
	}
	now, err := tr.StateSeconds()
	if err != nil {
		t.Fatal(err)
	}
	for _, state := range unobserved {
		if now[state] != (Histogram{}) {
			t.Errorf("%s: %+v", state, now[state])
		}
	}
}

// rewind lets all sockets that are in a state now be in it for longer.
func rewind(t *testing.T, tr *Tracker, state tcpstate.State, by time.Duration) {
	t.Helper()
	for i, b := range table(t, tr) {
		changed := false
		for p := range b.Places {
			if b.Sk[p] != 0 && b.Places[p].State == uint32(state) {
				b.Places[p].Since -= uint64(by)
				changed = true
			}
		}
		if changed {
			if err := tr.maps["sockets"].Put(uint32(i), b); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// Without the option no state takes a time, but connects do.
func TestWithoutStateSeconds(t *testing.T) {
	if !needs(t, StoryConnects, StoryAccepts) {
		return
	}
	tr := openTracker(t, Options{Syscalls: true})
	ns := scenario.NewNamespace(t)
	l := listenIn(t, ns, 5)
	client := dial(t, ns, l)
	server := l.accept()
	if seconds, err := tr.StateSeconds(); err != nil || seconds != nil {
		t.Errorf("seconds are %v, %v", seconds, err)
	}
	n := happened(t, tr, identify(t, ns))
	if n.States != nil || n.Connects.Count() != 1 {
		t.Errorf("seconds are %v, %d connects", n.States, n.Connects.Count())
	}
	if w := heard(t, tr, n.ID)[l.cookie()].AcceptWait; w.Count() != 1 {
		t.Errorf("accept waits are %v", w)
	}
	for _, e := range []endpoint{client, server, l} {
		e.close()
	}
}

// What began before the tracker did lasts nobody knows how long.
func TestSocketsOlderThanTheTracker(t *testing.T) {
	if !needs(t, StoryStateSeconds) {
		return
	}
	s := scenario.NewStage(t, scenario.IPv4)
	id := identify(t, s.NS)
	l := s.Listen(5)
	connecting := s.Begin(s.Peer().Addr(80))
	client := s.Connect(l.Addr())
	server := l.Accept()
	other := s.Connect(l.Addr())
	left := l.Accept()
	other.Close()
	left.Await(closeWait)
	s.Connect(l.Addr()) // not accepted yet
	tr := openTracker(t, everything)

	s.Peer().Answer(connecting)
	connecting.Established()
	connecting.Reset()
	client.Close()
	server.Await(closeWait)
	server.Close()
	left.Close()
	queued := l.Accept()
	queued.Close()
	l.Close()
	want := path(nil, 1, synSent, established, closed)
	want = path(want, 1, established, finWait1, finWait2)
	want = path(want, 1, established, closeWait)
	want = path(want, 2, closeWait, lastAck, closed)
	want = path(want, 1, listens, closed)
	want = path(want, 1, established, finWait1, finWait2) // the queued one's
	want = path(want, 1, established, closeWait)
	transitions(t, tr, id, want)
	n := happened(t, tr, id)
	if *n.States != [tcpstate.Count]Histogram{} || n.Connects.Count() != 0 {
		t.Errorf("seconds are %+v, %d connects", *n.States, n.Connects.Count())
	}
	for key, l := range heard(t, tr, id) {
		if l.Accepts != 1 || l.AcceptWait.Count() != 0 || l.Connections != 0 {
			t.Errorf("listener %d: %+v", key, l)
		}
	}
}
