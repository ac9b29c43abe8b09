package diagnose

import (
	"fmt"
	"strings"
	"testing"
	"time"
	"unsafe"
)

const window = time.Minute

var start = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// The kernels' tiers, as far as the rules tell them apart.
var (
	tierA = Observation{
		Namespace: "web", Sockets: 1, AcceptQueueLimit: 128, SynQueueKnown: true, SynQueueLimitKnown: true, SynQueueLimit: 128,
		ConnectionsKnown: true, AcceptsKnown: true, RefusalsKnown: true, BacklogRequestedKnown: true, BacklogRequested: 128,
		Somaxconn: 4096, Syncookies: 1, NamespaceKnown: true,
	}
	tierC = func() Observation {
		o := tierA
		o.RefusalsKnown = false
		return o
	}()
	// Without syscall tracepoints.
	deaf = func() Observation {
		o := tierC
		o.AcceptsKnown, o.BacklogRequestedKnown = false, false
		return o
	}()
	// Linux 5.10: refusals are told, and no event of connections.
	old = func() Observation {
		o := tierA
		o.ConnectionsKnown, o.AcceptsKnown, o.BacklogRequestedKnown, o.SynQueueKnown = false, false, false, false
		return o
	}()
	// Without BPF: what sock_diag and /proc tell.
	blind = func() Observation {
		o := deaf
		o.ConnectionsKnown, o.SynQueueKnown = false, false
		return o
	}()
)

// listening is o with another backlog, which listen() asked for.
func (o Observation) listening(backlog uint64) Observation {
	o.AcceptQueueLimit, o.SynQueueLimit, o.BacklogRequested = backlog, backlog, int64(backlog)
	return o
}

// play observes a listener for a window: happen changes the observation that
// comes after each of its steps.
func play(o Observation, happen func(i int, o *Observation)) *History {
	o.Time = start
	h := New(window, o)
	for i := range steps {
		o.Time = o.Time.Add(Every(window))
		happen(i, &o)
		h.Add(o)
	}
	return h
}

// The things that happen to a listener in a step.

// serve lets n connections in and accepts them after wait seconds each.
func (o *Observation) serve(n uint64, wait float64) {
	o.Syns += n
	o.Connections += n
	o.Accepts += n
	o.Waits += n
	o.WaitSeconds += wait * float64(n)
	o.ConnectionSeconds += wait * float64(n)
	o.LastAccept = o.Time
}

// overflow refuses n SYNs by a full accept queue.
func (o *Observation) overflow(n uint64) {
	o.Syns += n
	o.RefusedSyns += n
	o.SocketDrops += n
	o.ListenOverflows += n
	o.ListenDrops += n
	o.Peak, o.PeakRatio = o.limit()+1, 1
}

// queue makes the accept queue so long, for the whole step.
func (o *Observation) queue(length uint64) {
	o.AcceptQueue = length
	o.FillRatio = float64(length) / float64(o.limit()+1)
	o.ConnectionSeconds += float64(length) * Every(window).Seconds()
	if length > o.limit() {
		o.FullSeconds += Every(window).Seconds()
	}
	o.peak(length)
}

func (o *Observation) peak(length uint64) {
	if length > o.Peak {
		o.Peak, o.PeakRatio = length, float64(length)/float64(o.limit()+1)
	}
}

// synDrop refuses n SYNs by a full SYN queue.
func (o *Observation) synDrop(n uint64) {
	o.Syns += n
	o.SynQueueDrops += n
	o.SocketDrops += n
	o.ListenDrops += n
	o.SynPeak = o.synLimit() + 1
}

// cookie answers n SYNs by cookies, of which some come back.
func (o *Observation) cookie(n, back uint64) {
	o.Syns += n
	o.CookiesSent += n
	o.CookiesValidated += back
	o.SyncookiesSent += n
	o.SyncookiesRecv += back
	o.Connections += back
	o.Accepts += back
	o.SynPeak = o.synLimit() + 1
}

func TestVerdicts(t *testing.T) {
	type happen = func(i int, o *Observation)
	burst := func(i int, o *Observation) {
		o.serve(1000, 0.0004)
		if i == 3 {
			o.overflow(37)
		}
	}
	slow := func(_ int, o *Observation) {
		o.queue(o.limit() + 1)
		o.Connections, o.Accepts, o.Waits, o.WaitSeconds = o.Connections+10, o.Accepts+10, o.Waits+10, o.WaitSeconds+60
		o.overflow(5)
	}
	stopped := func(i int, o *Observation) {
		if i < 6 {
			o.serve(10, 0.001)
			return
		}
		if i == 6 {
			o.Connections += 3
		}
		o.queue(3)
	}
	near := func(i int, o *Observation) {
		o.serve(10, 0.001)
		if i == 1 {
			o.peak(o.limit() * 9 / 10)
		}
	}
	flood := func(_ int, o *Observation) {
		o.serve(2, 0.001)
		o.SynQueue = o.synLimit() + 1
		o.cookie(500, 1)
	}
	floodWithoutCookies := func(i int, o *Observation) {
		o.Syncookies = 0
		if i == 0 {
			o.Syns += o.synLimit() + 1
		}
		o.SynQueue = o.synLimit() + 1
		o.synDrop(500)
	}
	quiet := func(_ int, o *Observation) { o.serve(10, 0.001) }
	clamp := func(o Observation) Observation {
		o.BacklogRequested, o.Somaxconn = 4096, 128
		return o
	}
	tests := []struct {
		name   string
		on     Observation
		happen happen
		want   Kind
		words  string // in evidence and advice, between stars
	}{
		{"quiet", tierA, quiet, OK, "nobody was refused by a queue in the last 60 s"},
		{"quiet", tierC, quiet, OK, "nobody was refused"},
		{"quiet", blind, quiet, OK, "nobody was refused"},

		{"near", tierA, near, NearLimit, "89 % full at its peak*(115 of 129)*from 128 to 256"},
		{"near", tierC, near, NearLimit, "waited 1.0 ms for accept() on average*from 128"},
		{"near", blind, near, NearLimit, "nobody was refused"},
		{"near", tierA.listening(65535), near, NearLimit, "is long: spread"},
		{"near", tierA.listening(4096), near, NearLimit, "from 4,096 to 8,192*net.core.somaxconn allows 4,096 at most, so first: sysctl -w net.core.somaxconn=8192 in namespace web"},
		{"just below", tierA.listening(9), func(_ int, o *Observation) { o.peak(7) }, OK, "70 % full"},
		{"just at", tierA.listening(9), func(_ int, o *Observation) { o.peak(8) }, NearLimit, "80 % full"},
		{"full and nobody refused", tierA.listening(5), func(i int, o *Observation) {
			o.serve(100, 0.001)
			o.peak(6)
			if i == 0 {
				o.FullSeconds += 0.1
			}
		}, NearLimit, "100 % full"},

		{"burst", tierA, burst, Burst, "37 SYNs refused by the full accept queue in the last 60 s, 12,000 connections came in; accept() kept up: 0.4 ms on average"},
		{"burst", tierC, burst, Burst, "up to 37 SYNs and final ACKs*0.4 ms on average"},
		{"burst", deaf, burst, Burst, "0.4 ms on average, by Little's law"},
		{"burst", blind, burst, Burst, "0 % full on average"},
		{"burst", tierA.listening(5), burst, Burst, "from 5 to 64, *5 is the default of Python's socketserver"},
		{"burst", tierA.listening(65535), burst, Burst, "is long"},
		{"one refused", tierA, func(i int, o *Observation) {
			o.serve(1e6, 0.0001)
			if i == 0 {
				o.overflow(1)
			}
		}, Burst, "1 SYNs"},
		{"ignored ACKs", tierC, func(i int, o *Observation) {
			o.serve(10, 0.001)
			if i == 2 { // sk_drops counts them twice
				o.RefusedACKs, o.SocketDrops, o.ListenOverflows, o.ListenDrops = 4, 8, 4, 4
			}
		}, Burst, "up to 4 SYNs and final ACKs"},
		{"SYN queue, and handshakes are completed", tierA, func(_ int, o *Observation) {
			o.Syncookies = 0
			o.serve(300, 0.001)
			o.synDrop(1000)
		}, Burst, "12,000 SYNs refused by the full SYN queue*Turn on SYN cookies"},
		{"SYN queue, and handshakes are completed", tierC, func(_ int, o *Observation) {
			o.Syncookies = 0
			o.serve(300, 0.001)
			o.synDrop(1000)
		}, Burst, "up to 12,000 SYNs refused by the SYN queue"},
		{"SYN queue", blind, floodWithoutCookies, Burst, "it may be a SYN flood"},
		{"sk_drops of no refusal", tierC, func(_ int, o *Observation) { o.serve(10, 0.001); o.SocketDrops += 7 }, OK, ""},
		{"overflows of another listener", tierC, func(_ int, o *Observation) {
			o.serve(10, 0.001)
			o.ListenOverflows, o.ListenDrops = o.ListenOverflows+7, o.ListenDrops+7
		}, OK, ""},
		{"unknown namespace, was full", func() Observation { o := tierC; o.NamespaceKnown = false; return o }(), burst, Burst, "up to 37"},
		{"unknown namespace, was not full", func() Observation { o := tierC; o.NamespaceKnown = false; return o }(), func(_ int, o *Observation) {
			o.serve(10, 0.001)
			o.SocketDrops += 7
		}, OK, ""},
		{"refused for other reasons", tierA, func(_ int, o *Observation) { o.serve(10, 0.001); o.Syns, o.OtherSyns = o.Syns+2, o.OtherSyns+2 }, OK, "24 SYNs were refused for other reasons"},

		{"slow", tierA, slow, SlowAccept, "60 SYNs*full for 60 s of 60 s, and 100 % full on average; connections waited 6.0 s for accept() on average*longer backlog makes connections wait longer"},
		{"slow", tierC, slow, SlowAccept, "up to 60"},
		{"slow", deaf, slow, SlowAccept, "by Little's law"},
		{"slow", blind, slow, SlowAccept, "does not tell whether accept() is called at all"},
		{"slow", tierA.listening(65535), slow, SlowAccept, ""},
		{"slow, and clamped", clamp(tierA), slow, SlowAccept, ""},
		{"full, short waits all the time", tierA.listening(5), func(_ int, o *Observation) {
			o.queue(6) // 10 ms each
			o.Connections, o.Accepts, o.Waits, o.WaitSeconds = o.Connections+500, o.Accepts+500, o.Waits+500, o.WaitSeconds+500*0.06
			o.overflow(100)
		}, SlowAccept, "waited 60 ms"},
		{"long waits and never full", tierA, func(_ int, o *Observation) { o.serve(10, 3) }, OK, ""},
		{"waits just long", tierA, func(_ int, o *Observation) { o.serve(10, longWait); o.overflow(1) }, SlowAccept, ""},
		{"waits just not long", tierA, func(_ int, o *Observation) { o.serve(10, 0.99*longWait); o.overflow(1) }, Burst, ""},

		{"stopped", tierA, stopped, Stalled, "3 connections wait and none was accepted for 25 s, the last 30 s ago"},
		{"stopped", tierC, stopped, Stalled, "25 s"},
		{"stopped", deaf, stopped, Stalled, "by what came in and what is in the queue"},
		{"stopped", blind, stopped, Stalled, "never became shorter"},
		{"stopped and full", tierA, func(_ int, o *Observation) { o.queue(129); o.overflow(3) }, Stalled, "none was accepted for 55 s; 36 SYNs"},
		{"stopped and full, and flooded", tierA, func(i int, o *Observation) { o.queue(129); flood(i, o); o.Accepts = 0 }, Stalled, ""},
		{"stopped and clamped", clamp(tierA), func(_ int, o *Observation) { o.queue(129); o.overflow(3) }, Stalled, ""},
		{"stopped, a moment ago", tierA, func(i int, o *Observation) {
			o.serve(10, 0.001)
			if i == 11 {
				o.queue(3)
			}
		}, OK, ""},
		{"a connection in 5 s, others wait", tierA, func(_ int, o *Observation) { o.queue(20); o.Accepts++ }, OK, ""},
		{"a queue that is filled as fast as it is drained", deaf, func(_ int, o *Observation) { o.queue(20); o.Connections += 1000 }, OK, ""},
		{"waiting for the first", tierA, func(i int, o *Observation) {
			if i == 11 { // nobody came for a minute
				o.queue(1)
			}
		}, OK, ""},
		{"went on", tierA, func(i int, o *Observation) {
			stopped(i, o)
			if i == 11 {
				o.AcceptQueue, o.FillRatio = 0, 0
				o.Accepts, o.Waits, o.WaitSeconds = o.Accepts+3, o.Waits+3, o.WaitSeconds+75
			}
		}, OK, ""},

		{"clamped", clamp(tierA), burst, Clamped, "listen() asked for 4,096 and net.core.somaxconn in namespace web gave it 128*sysctl -w net.core.somaxconn=4096 in namespace web, then restart, or listen() again"},
		{"clamped", clamp(tierC), burst, Clamped, "asked for 4,096"},
		{"clamped, nearly full", clamp(tierA), near, Clamped, "nobody was refused*asked for 4,096"},
		{"clamped, and quiet", clamp(tierA), quiet, OK, ""},
		{"maybe clamped", clamp(deaf), burst, Clamped, "it may be clamped*is not known"},
		{"maybe clamped", clamp(blind), burst, Clamped, "it may be clamped"},
		{"got less than it could", deaf, burst, Burst, ""},
		{"clamped, somaxconn was raised", func() Observation { o := clamp(tierA); o.Somaxconn = 4096; return o }(), burst, Clamped, "is 4,096 by now"},
		{"listen(-1)", func() Observation { o := clamp(tierA); o.BacklogRequested = -1; return o }(), burst, Clamped, "as much as there is"},
		{"asked for what there is", tierA.listening(4096), burst, Burst, "from 4,096 to 8,192*as Go does*somaxconn=8192"},
		{"a group, clamped", func() Observation {
			o := clamp(tierA)
			o.Sockets, o.AcceptQueueLimit, o.BacklogRequested = 4, 4*128, 4*4096
			return o
		}(), burst, Clamped, "asked for 4,096 and*gave it 128"},

		{"flood", tierA, flood, SynFlood, "6,024 SYNs in the last 60 s (100 a second), 6,024 were answered and 36 of them completed the handshake; 6,000 SYN cookies sent"},
		{"flood", tierC, flood, SynFlood, "the SYN queue was full (129 of 128), 36 handshakes were completed*6,000 SYN cookies sent in namespace web and 12 came back"},
		{"flood", old, flood, SynFlood, "6,000 SYN cookies sent for want of a place in the SYN queue, 12 came back"},
		{"flood", tierA.listening(5), flood, SynFlood, ""},
		{"flood", tierA.listening(4096), flood, SynFlood, ""},
		{"flood without cookies", tierA, floodWithoutCookies, SynFlood, "6,000 SYNs dropped*sysctl -w net.ipv4.tcp_syncookies=1 in namespace web"},
		{"flood without cookies", tierC, floodWithoutCookies, SynFlood, "up to 6,000 SYNs dropped here*tcp_syncookies=1"},
		{"flood without cookies", old, floodWithoutCookies, Burst, "6,000 SYNs refused by the full SYN queue*it may be a SYN flood"},
		{"cookies, and handshakes are completed", old, func(_ int, o *Observation) { o.cookie(500, 490) }, OK, "5,880 came back"},
		{"flood, and clamped", clamp(tierA), flood, SynFlood, ""},
		{"flood and a few refused", tierA, func(i int, o *Observation) { flood(i, o); o.overflow(1) }, SynFlood, ""},
		{"a few cookies and many refused", tierA, func(i int, o *Observation) {
			o.serve(5, 0.001)
			o.cookie(1, 0)
			o.overflow(500)
		}, Burst, ""},
		{"cookies, and handshakes are completed", tierA, func(_ int, o *Observation) { o.cookie(500, 490) }, OK, "6,000 SYN cookies were sent*5,880 came back"},
		{"cookies, and handshakes are completed", tierC, func(_ int, o *Observation) { o.cookie(500, 490) }, OK, ""},
		{"a few half-open with cookies for all", tierA, func(i int, o *Observation) {
			if i == 0 { // tcp_syncookies=2 and a scan of ports
				o.Syns, o.CookiesSent = 3, 3
			}
		}, OK, ""},
		{"cookies of another listener", tierC, func(_ int, o *Observation) { o.SyncookiesSent += 500 }, OK, ""},
		{"ignored ACKs are not silent", tierA, func(i int, o *Observation) {
			o.serve(100, 0.001)
			if i == 0 {
				o.Syns += 300
				o.RefusedACKs += 400
				o.SynQueueDrops += 500
			}
		}, Burst, ""},
	}
	for i, test := range tests {
		t.Run(fmt.Sprintf("%d %s", i, test.name), func(t *testing.T) {
			got := play(test.on, test.happen).Verdict()
			t.Logf("%+v", got)
			if got.Kind != test.want {
				t.Fatalf("verdict is %s, want %s: %s", got.Kind, test.want, got.Evidence)
			}
			said := got.Evidence + "\n" + got.Advice
			for words := range strings.SplitSeq(test.words, "*") {
				_, rest, ok := strings.Cut(said, words)
				if !ok {
					t.Fatalf("%q is not in %q", words, said)
				}
				said = rest
			}
			if got.Evidence == "" || (got.Advice == "") != (got.Kind == OK) {
				t.Errorf("verdict is %+v", got)
			}
		})
	}
}

// A verdict stands for the window and ends with it.
func TestVerdictEndsWithItsWindow(t *testing.T) {
	o := tierA
	o.Time = start
	h := New(window, o)
	for i := range 3 * steps {
		o.Time = o.Time.Add(Every(window))
		o.serve(10, 0.001)
		if i == 2 {
			o.overflow(4)
			o.Peak, o.PeakRatio = 0, 0
		}
		h.Add(o)
		want := OK
		if i >= 2 && i < 2+steps {
			want = Burst
		}
		if got := h.Verdict(); got.Kind != want {
			t.Errorf("after %d steps: %s, want %s", i+1, got.Kind, want)
		}
	}
}

// Observations that come rarely are a window each, and not twelve of them.
func TestRareObservations(t *testing.T) {
	o := tierA
	o.Time = start
	h := New(window, o)
	for i, want := range []Kind{Burst, OK} {
		o.Time = o.Time.Add(2 * window)
		o.serve(10, 0.001)
		if i == 0 {
			o.overflow(4)
			o.Peak, o.PeakRatio = 0, 0
		}
		h.Add(o)
		got := h.Verdict()
		if got.Kind != want || !strings.Contains(got.Evidence, "in the last 120 s") {
			t.Errorf("%d: %s, want %s: %s", i, got.Kind, want, got.Evidence)
		}
	}
}

// The known defaults inform the advice.
func TestWhereTheBacklogIsSet(t *testing.T) {
	for _, test := range []struct {
		process string
		asked   int64
		want    string
	}{
		{"nginx", 511, "(nginx: backlog= of the listen directive)"},
		{"", 511, "(511 is the default of nginx, Apache, Redis, Node.js, PHP-FPM)"},
		{"java", 100, "(Tomcat: acceptCount)"},
		{"java", 50, "(Java: the backlog of ServerSocket)"},
		{"java", 1024, "(Tomcat: acceptCount; Java: the backlog of ServerSocket)"},
		{"python3.11", 5, "(Python's socketserver: request_queue_size)"},
		{"python3", 128, "(Python: the argument of socket.listen())"},
		{"haproxy", 700, "(HAProxy: backlog, by default maxconn)"},
		{"api", 4096, "as Go does"},
		{"node_exporter", 4096, "as Go does"},
		{"php-fpm8.2", 511, "(PHP-FPM: listen.backlog)"},
		{"", 4096, "as Go does"},
		{"api", 511, "of listen() from 511 to 1,024, which halves that."},
		{"", 77, "of listen() from 77 to 256, which halves that."},
	} {
		o := tierA.listening(uint64(test.asked))
		o.Process = test.process
		v := play(o, func(_ int, o *Observation) { o.peak(o.limit()) }).Verdict()
		if v.Kind != NearLimit || !strings.Contains(v.Advice, test.want) {
			t.Errorf("%s, listen(%d): %s: %q, want %q", test.process, test.asked, v.Kind, v.Advice, test.want)
		}
	}
}

func TestWhoIsNamed(t *testing.T) {
	v := view{Observation: new(Observation)}
	for _, test := range []struct{ process, pod, want string }{
		{"", "", ""}, {"", "shop/web-0", ""}, {"nginx", "", " (nginx)"}, {"nginx", "shop/web-0", " (nginx in pod shop/web-0)"},
	} {
		v.Process, v.Pod = test.process, test.pod
		if got := v.by(); got != test.want {
			t.Errorf("%q in %q: %q, want %q", test.process, test.pod, got, test.want)
		}
	}
}

func TestSeen(t *testing.T) {
	var s Seen
	s.Add(Burst)
	s.Add(SynFlood)
	for k := range Kinds {
		if s.Has(k) != (k == Burst || k == SynFlood) {
			t.Errorf("%s: %t", k, s.Has(k))
		}
	}
}

// README says what a listener's history costs.
func TestHistoryIsSmall(t *testing.T) {
	if size := unsafe.Sizeof(History{}); size > 1400 {
		t.Errorf("a history takes %d bytes", size)
	} else {
		t.Logf("a history takes %d bytes", size)
	}
}

func TestNumbersForPeople(t *testing.T) {
	for n, want := range map[uint64]string{0: "0", 999: "999", 1000: "1,000", 1234567: "1,234,567"} {
		if got := count(n); got != want {
			t.Errorf("count(%d) is %s", n, got)
		}
	}
	for seconds, want := range map[float64]string{0.0004: "0.4 ms", 0.06: "60 ms", 2.34: "2.3 s", 60.2: "60 s", -1: "0.0 ms"} {
		if got := duration(seconds); got != want {
			t.Errorf("duration(%v) is %s, want %s", seconds, got, want)
		}
	}
}
