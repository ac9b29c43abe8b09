package probes

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sockq/probes/census"
	"sockq/probes/diagnose"
	"sockq/probes/scenario"
	"sockq/probes/tracker"
)

// diagnosed starts probes whose verdicts are about seconds: more of them in a kernel
// guest, which is slow, and where other namespaces are looked at once a second.
func diagnosed(t *testing.T) (p *Probes, dir string) {
	t.Helper()
	window := 2400 * time.Millisecond
	if os.Getenv("SOCKQ_TEST_GUEST") != "" || mechanism() == census.MechanismSockDiag {
		window = 18 * time.Second
	}
	dir = t.TempDir()
	p, err := Open(Options{
		NetnsPath: dir, MaxListeners: 100_000, MaxNamespaces: 10_000,
		CensusInterval: diagnose.Every(window), ListenerInterval: 20 * time.Millisecond, verdictWindow: window,
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { defer close(ended); _ = p.Run(ctx) }()
	t.Cleanup(func() { stop(); <-ended; p.Close() })
	return p, dir
}

// patient is a listener on a stage and the probes that look at it.
type patient struct {
	*scenario.Stage
	t    *testing.T
	p    *Probes
	addr netip.AddrPort
}

// admit makes a stage that the probes can look at.
func admit(outer, t *testing.T, p *Probes, dir string) *patient {
	t.Helper()
	s := scenario.NewStage(t, scenario.IPv4)
	if !scenario.KernelAtLeast(5, 14) {
		occupy(outer, t, s.NS)
	}
	if p.walk == nil {
		link := filepath.Join(dir, fmt.Sprint("ns", s.NS.Inode()))
		if err := os.Symlink(s.NS.Path(), link); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.Remove(link) })
	}
	return &patient{Stage: s, t: t, p: p}
}

func (c *patient) look() *Listener {
	c.Helper()
	s, err := c.p.Snapshot()
	if err != nil {
		c.Fatal(err)
	}
	for i := range s.Listeners {
		if l := &s.Listeners[i]; l.Live && l.Inode == c.NS.Inode() && l.Address == c.addr.String() {
			return l
		}
	}
	return nil
}

// until looks at the listener until it is so, and lets something happen before
// each look.
func (c *patient) until(what string, so func(*Listener) bool, happen func()) *Listener {
	c.Helper()
	var last *Listener
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if happen != nil {
			happen()
		}
		if last = c.look(); last != nil && so(last) {
			return last
		}
	}
	if last == nil {
		c.Fatalf("no listener %s", c.addr)
	}
	c.Fatalf("%s: waited for %s in vain: %+v, verdict %+v", c.addr, what, last, last.Verdict)
	return nil
}

// is waits for a verdict whose evidence says what words say.
func (c *patient) is(kind diagnose.Kind, words string, happen func()) {
	c.Helper()
	l := c.until(fmt.Sprintf("%s, %q", kind, words), func(l *Listener) bool {
		return l.Verdict != nil && l.Verdict.Kind == kind && strings.Contains(l.Verdict.Evidence, words)
	}, happen)
	c.Logf("%s\nevidence: %s\nadvice: %s", kind, l.Verdict.Evidence, l.Verdict.Advice)
	if !l.Verdicts.Has(kind) {
		c.Errorf("%s is not among the verdicts %b", kind, l.Verdicts)
	}
}

// healthy waits for the first verdict on a new listener.
func (c *patient) healthy(l *scenario.Socket) {
	c.Helper()
	c.addr = l.Addr()
	// An owner found late starts new series, and what is counted then may be in either.
	c.until("its owner", func(l *Listener) bool { return l.Owner.Process != "" }, nil)
	c.is(diagnose.OK, "nobody was refused", nil)
}

// refuse lets as many connections in as the queue of listen(backlog) holds and
// sends a few SYNs more; then all are accepted.
func (c *patient) refuse(l *scenario.Socket, backlog int) {
	c.Helper()
	before := c.NS.Netstat()["ListenOverflows"]
	for range backlog + 1 {
		c.Peer().Connect(l.Addr())
	}
	for range 4 {
		c.Peer().SYN(l.Addr())
	}
	eventually(c.t, func() []string {
		if n := c.NS.Netstat()["ListenOverflows"] - before; n != 4 {
			return []string{fmt.Sprintf("%d SYNs were refused", n)}
		}
		return nil
	})
	for range backlog + 1 {
		l.Accept()
	}
}

// exactly is what the evidence says where each refused SYN is counted; elsewhere
// it is as much, since nobody else is there.
func exactly(words string) string {
	if told(tracker.StoryRefusals) {
		return words + " SYNs refused by the full accept queue"
	}
	return "up to " + words + " SYNs and final ACKs refused by the full accept queue"
}

// TestVerdicts lets each verdict come true.
func TestVerdicts(t *testing.T) {
	p, dir := diagnosed(t)
	for _, test := range []struct {
		kind diagnose.Kind
		name string
		play func(c *patient)
	}{
		{diagnose.NearLimit, "eight of ten places are taken for a moment", func(c *patient) {
			l := c.Listen(9)
			c.healthy(l)
			for range 8 {
				c.Peer().Connect(l.Addr())
			}
			c.until("the peak", func(l *Listener) bool { return l.Peak == 8 }, nil)
			for range 8 {
				l.Accept()
			}
			c.is(diagnose.NearLimit, "80 % full at its peak in the last two minutes (8 of 10)", nil)
		}},
		{diagnose.Burst, "nine clients call listen(4) at once, and are accepted at once", func(c *patient) {
			l := c.Listen(4)
			c.healthy(l)
			c.refuse(l, 4)
			c.is(diagnose.Burst, exactly("4"), nil)
			// The window ends, and the peak of one to two minutes is left, if it was seen.
			if told(tracker.StoryConnections) {
				c.is(diagnose.NearLimit, "100 % full at its peak", nil)
			} else {
				c.is(diagnose.OK, "nobody was refused", nil)
			}
		}},
		{diagnose.SlowAccept, "the application accepts now and then, and the queue is always full", func(c *patient) {
			l := c.Listen(4)
			c.healthy(l)
			for range 5 {
				c.Peer().Connect(l.Addr())
			}
			turn := 0
			c.is(diagnose.SlowAccept, "", func() {
				if turn++; turn%5 == 0 {
					c.Peer().SYN(l.Addr()) // for which there is no place
					l.Accept()
					c.Peer().Connect(l.Addr())
				}
			})
		}},
		{diagnose.Stalled, "the process is stopped while clients call", func(c *patient) {
			server := c.serve()
			server.connect(2)
			c.until("no queue", func(l *Listener) bool { return l.AcceptQueue == 0 }, nil)
			c.is(diagnose.OK, "nobody was refused", nil)
			server.signal(unix.SIGSTOP)
			server.stopped()
			server.connect(3)
			c.is(diagnose.Stalled, "3 connections wait and none was accepted for ", nil)
			server.signal(unix.SIGCONT)
			c.is(diagnose.OK, "", nil)
		}},
		{diagnose.Clamped, "listen(64) where net.core.somaxconn is 4", func(c *patient) {
			c.NS.Sysctl("net.core.somaxconn", "4")
			l := c.Listen(64)
			c.healthy(l)
			c.refuse(l, 4)
			words := "it may be clamped"
			if told(tracker.StoryBacklog) {
				words = "listen() asked for 64 and net.core.somaxconn in namespace " + c.look().Namespace + " gave it 4"
			}
			c.is(diagnose.Clamped, words, nil)
		}},
		{diagnose.SynFlood, "SYNs without end, answered by cookies", func(c *patient) { c.flood("1") }},
		{diagnose.SynFlood, "SYNs without end, and no cookies", func(c *patient) { c.flood("0") }},
	} {
		t.Run(test.kind.String(), func(st *testing.T) {
			st.Log(test.name)
			test.play(admit(t, st, p, dir))
		})
	}
}

// flood sends SYNs to which nobody stands.
func (c *patient) flood(cookies string) {
	c.Helper()
	c.NS.Sysctl("net.ipv4.tcp_syncookies", cookies)
	l := c.Listen(8)
	c.healthy(l)
	kind, words := diagnose.SynFlood, ""
	switch {
	case told(tracker.StoryRefusals) && told(tracker.StoryConnections):
		words = "and 0 of them completed the handshake"
	case told(tracker.StoryRefusals) && cookies == "1":
		words = " SYN cookies sent for want of a place in the SYN queue, 0 came back"
	case told("syn_queue"):
		words = "0 handshakes were completed"
	case cookies == "0": // nobody sees the SYN queue, or what came of it
		kind, words = diagnose.Burst, "it may be a SYN flood"
	default:
		return // what the cookies of a namespace are for is not to be told
	}
	c.is(kind, words, func() {
		for range 5 {
			c.Peer().SYN(l.Addr())
		}
	})
}

// server is a process that accepts, in a patient's namespace.
type server struct {
	c   *patient
	cmd *exec.Cmd
}

// A set has a verdict while a socket is there, from the second look on.
func TestVerdictOfASet(t *testing.T) {
	b := newBench(1)
	b.name = func(uint32, uint64) string { return "host" }
	has := func(address string, want bool) Listener {
		t.Helper()
		l := b.find(t, address)
		if (l.Verdict != nil) != want {
			t.Fatalf("verdict of %s is %+v", address, l.Verdict)
		}
		return l
	}
	first, second := listener(1, "0.0.0.0:80", 9, 9), listener(2, "0.0.0.0:81", 0, 9)
	b.after(0, first, second)
	b.observe()
	has("0.0.0.0:80", false)
	b.after(time.Second, first, second) // too early
	b.observe()
	has("0.0.0.0:80", false)
	b.after(4*time.Second, first, second)
	b.observe()
	if l := has("0.0.0.0:80", true); l.Verdict.Kind != diagnose.NearLimit || l.Verdicts != 1<<diagnose.NearLimit {
		t.Errorf("verdict is %+v of %b", l.Verdict, l.Verdicts)
	}
	has(Other, false)

	first.AcceptQueue = 0
	b.after(3*time.Minute, first, second)
	b.observe()
	seen := diagnose.Seen(1<<diagnose.NearLimit | 1<<diagnose.OK)
	if l := has("0.0.0.0:80", true); l.Verdict.Kind != diagnose.OK || l.Verdicts != seen {
		t.Errorf("verdict is %+v of %b", l.Verdict, l.Verdicts)
	}

	b.after(5*time.Second, second)
	has("0.0.0.0:80", false) // it went
	b.observe()
	b.after(5*time.Second, first, second)
	b.observe()
	has("0.0.0.0:80", false) // it came back
	b.after(5*time.Second, first, second)
	b.observe()
	if l := has("0.0.0.0:80", true); l.Verdicts != seen {
		t.Errorf("verdicts were %b", l.Verdicts)
	}
}

// What the kernel counted in the namespace before a listener came is none of its.
func TestVerdictBeginsWithItsListener(t *testing.T) {
	b := newBench(1)
	n := census.Namespace{}
	for _, event := range []int{listenOverflows, listenDrops} {
		n.Events[event], n.EventsKnown[event] = 100, true
	}
	b.namespace = func(uint32, uint64) (census.Namespace, bool) { return n, true }
	l := listener(1, "0.0.0.0:80", 0, 9)
	b.after(0)
	b.after(tick, l)
	l.Drops = 7 // of which two were refusals
	n.Events[listenOverflows], n.Events[listenDrops] = 102, 102
	b.after(5*time.Second, l)
	b.observe()
	if v := b.find(t, "0.0.0.0:80").Verdict; v == nil || v.Kind != diagnose.Burst || !strings.HasPrefix(v.Evidence, "up to 2 SYNs") {
		t.Errorf("verdict is %+v", v)
	}
}

func BenchmarkObserve(b *testing.B) {
	l := newBench(1000)
	var listeners []census.Listener
	for i := range 1000 {
		listeners = append(listeners, listener(uint64(i+1), fmt.Sprintf("0.0.0.0:%d", i+1), 1, 128))
	}
	l.after(0, listeners...)
	b.ReportAllocs()
	for b.Loop() {
		b.StopTimer()
		l.after(5*time.Second, listeners...)
		b.StartTimer()
		l.observe()
	}
}

const serverEnv = "SOCKQ_TEST_SERVER"

// serve starts it, by running the tests' binary again.
func (c *patient) serve() *server {
	c.Helper()
	c.addr = c.Next()
	self, err := os.Executable()
	if err != nil {
		c.Fatal(err)
	}
	s := &server{c, exec.Command(self)}
	s.cmd.Env = append(os.Environ(), serverEnv+"="+c.addr.String())
	s.cmd.Stderr = os.Stderr
	if _, err := s.cmd.StdinPipe(); err != nil { // the server ends with it
		c.Fatal(err)
	}
	c.NS.Do(func() {
		if err := s.cmd.Start(); err != nil {
			c.Fatal(err)
		}
	})
	c.Cleanup(func() {
		_ = s.cmd.Process.Kill()
		_ = s.cmd.Wait()
	})
	c.is(diagnose.OK, "nobody was refused", nil)
	return s
}

func (s *server) connect(n int) {
	s.c.Helper()
	for range n {
		s.c.Connect(s.c.addr)
	}
}

func (s *server) signal(sig unix.Signal) {
	s.c.Helper()
	if err := s.cmd.Process.Signal(sig); err != nil {
		s.c.Fatal(err)
	}
}

// stopped waits until all threads of the server are.
func (s *server) stopped() {
	s.c.Helper()
	threads := fmt.Sprintf("/proc/%d/task/*/stat", s.cmd.Process.Pid)
	running := func() bool {
		stats, _ := filepath.Glob(threads)
		for _, path := range stats {
			if stat, err := os.ReadFile(path); err != nil || !strings.Contains(string(stat), ") T ") {
				return true
			}
		}
		return false
	}
	for end := time.Now().Add(10 * time.Second); running(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			s.c.Fatal("the server does not stop")
		}
	}
}

func TestMain(m *testing.M) {
	if addr := os.Getenv(serverEnv); addr != "" {
		fmt.Fprintln(os.Stderr, "server:", acceptAll(addr))
		os.Exit(1)
	}
	if name := os.Getenv(holdEnv); name != "" {
		holdOpen(name)
	}
	os.Exit(m.Run())
}

func acceptAll(addr string) error {
	l, err := net.Listen("tcp4", addr)
	if err != nil {
		return err
	}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	for {
		if _, err := l.Accept(); err != nil {
			return err
		}
	}
}
