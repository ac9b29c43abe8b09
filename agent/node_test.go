package main

import (
	"bytes"
	"fmt"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"golang.org/x/sys/unix"

	"sockq/probes/scenario"
	"sockq/probes/tcpstate"
)

// inGuest tells that this is one of the kernels of probes/guests, which puts sockq
// beside its tests.
var inGuest = os.Getenv("SOCKQ_TEST_GUEST") != ""

// binary builds sockq once, where every user can execute it.
var binary = sync.OnceValues(func() (string, error) {
	if inGuest {
		return filepath.Abs("sockq")
	}
	dir, err := os.MkdirTemp("", "sockq-test")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "sockq")
	build := exec.Command("go", "build", "-o", path, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w: %s", err, out)
	}
	return path, os.Chmod(dir, 0o755)
})

// patience is how long sockq may take, which is longest where a kernel is emulated.
const patience = 2 * time.Minute

// process is a running sockq.
type process struct {
	t   *testing.T
	cmd *exec.Cmd
	url string
	log logBuffer
}

// logBuffer is read while sockq writes.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// as is who runs sockq: root with everything, or nobody with some capabilities.
type as struct {
	nobody       bool
	capabilities []uintptr
	exactly      bool // and no way to more: also for root
	tracefs      tracefs
}

// tracefs is whether sockq finds one mounted.
type tracefs int

const (
	asItIs tracefs = iota
	mounted
	notMounted
)

// start starts a command there.
func (w as) start(cmd *exec.Cmd) error {
	if w.nobody {
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Credential:  &syscall.Credential{Uid: 65534, Gid: 65534},
			AmbientCaps: w.capabilities,
		}
	}
	if w.tracefs == asItIs && !w.exactly {
		return cmd.Start()
	}
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // which ends with it, and so does what is its own
		result <- func() error {
			if w.exactly {
				if err := bound(w.capabilities); err != nil {
					return err
				}
			}
			if w.tracefs == asItIs {
				return cmd.Start()
			}
			if err := privateMounts(); err != nil {
				return err
			}
			const place = "/sys/kernel/tracing"
			for _, dir := range []string{place, "/sys/kernel/debug"} {
				for unix.Unmount(dir, unix.MNT_DETACH) == nil {
				}
			}
			if w.tracefs == mounted {
				if err := unix.Mount("tracefs", place, "tracefs", 0, ""); err != nil {
					return fmt.Errorf("mount tracefs: %w", err)
				}
			}
			return cmd.Start()
		}()
	}()
	return <-result
}

// bound takes all others from what this thread starts, for good.
func bound(only []uintptr) error {
	for c := uintptr(0); ; c++ {
		if _, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, c, 0, 0, 0); err != nil { // the kernel knows no more of them
			break
		}
		if slices.Contains(only, c) {
			continue
		}
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil {
			return fmt.Errorf("cut the bounding set: %w", err)
		}
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	return nil
}

func launch(t *testing.T, who as, args ...string) *process {
	t.Helper()
	path, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := free.Addr().String()
	free.Close()
	p := &process{t: t, url: "http://" + address}
	p.cmd = exec.Command(path, append([]string{"--web.listen-address=" + address, "--max-listeners=100000", "--max-namespaces=5000"}, args...)...)
	p.cmd.Stdout, p.cmd.Stderr = &p.log, &p.log
	if err := who.start(p.cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill()
		_ = p.cmd.Wait()
		if t.Failed() {
			t.Logf("sockq said:\n%s", &p.log)
		}
	})
	p.await("ready", func() bool {
		resp, err := http.Get(p.url + "/-/ready")
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	})
	return p
}

func (p *process) await(what string, done func() bool) {
	p.t.Helper()
	for end := time.Now().Add(patience); !done(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			p.t.Fatalf("waited for %s in vain", what)
		}
	}
}

// ownName is what the kernel calls this process, whose most sockets are.
var ownName = sync.OnceValue(func() string {
	comm, err := os.ReadFile("/proc/self/comm")
	if err != nil {
		panic(err)
	}
	return strings.TrimSpace(string(comm))
})

// metrics scrapes sockq: values by name and sorted labels, a{b="c",d="e"}. Of a
// histogram these are its count and its cumulative buckets. What is this process'
// is added to what is nobody's.
func (p *process) metrics() map[string]float64 {
	p.t.Helper()
	resp, err := http.Get(p.url + "/metrics")
	if err != nil {
		p.t.Fatal(err)
	}
	defer resp.Body.Close()
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(resp.Body)
	if err != nil {
		p.t.Fatal(err)
	}
	values := make(map[string]float64)
	for name, f := range families {
		for _, m := range f.Metric {
			var labels []string
			for _, l := range m.Label {
				if l.GetName() == "process" && l.GetValue() == ownName() {
					continue
				}
				labels = append(labels, fmt.Sprintf("%s=%q", l.GetName(), l.GetValue()))
			}
			slices.Sort(labels)
			key := func(name string, labels ...string) string { return name + "{" + strings.Join(labels, ",") + "}" }
			h := m.GetHistogram()
			if h == nil {
				values[key(name, labels...)] += m.GetGauge().GetValue() + m.GetCounter().GetValue()
				continue
			}
			values[key(name+"_count", labels...)] += float64(h.GetSampleCount())
			for _, b := range h.Bucket {
				more := append(slices.Clone(labels), fmt.Sprintf("le=%q", strconv.FormatFloat(b.GetUpperBound(), 'g', -1, 64)))
				slices.Sort(more)
				values[key(name+"_bucket", more...)] += float64(b.GetCumulativeCount())
			}
		}
	}
	return values
}

// shows waits until the series have these values.
func (p *process) shows(want map[string]float64) {
	p.t.Helper()
	var wrong []string
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(200 * time.Millisecond) {
		got := p.metrics()
		wrong = wrong[:0]
		for _, series := range slices.Sorted(maps.Keys(want)) {
			if v, ok := got[series]; !ok {
				wrong = append(wrong, series+" is absent")
			} else if v != want[series] {
				wrong = append(wrong, fmt.Sprintf("%s is %v, want %v", series, v, want[series]))
			}
		}
		if len(wrong) == 0 {
			return
		}
		if time.Now().After(end) {
			p.t.Fatal(strings.Join(wrong, "\n"))
		}
	}
}

func label(ns *scenario.Namespace) string { return strconv.FormatUint(uint64(ns.Inode()), 10) }

// states are the series of a namespace's sockets.
func states(ns *scenario.Namespace, want scenario.States) map[string]float64 {
	series := make(map[string]float64)
	for _, s := range tcpstate.All {
		series[fmt.Sprintf("sockq_tcp_sockets{netns=%q,state=%q}", label(ns), s)] = float64(want[s])
	}
	return series
}

func TestTwoHundredSocketsInMixedStates(t *testing.T) {
	for _, family := range []scenario.Family{scenario.IPv4, scenario.IPv6} {
		t.Run(family.String(), func(t *testing.T) {
			ns, want := scenario.Mixed.Hold(t, family)
			p := launch(t, as{})
			p.shows(states(ns, want.States))
			listeners := make(map[string]float64)
			for _, l := range want.Listeners {
				key := fmt.Sprintf("{address=%q,netns=%q}", l, label(ns))
				listeners["sockq_listener_accept_queue_length"+key] = float64(l.AcceptQueue)
				listeners["sockq_listener_accept_queue_limit"+key] = float64(l.Limit)
				listeners["sockq_listener_syn_queue_length"+key] = float64(l.SynQueue)
			}
			if len(listeners) == 0 {
				t.Fatal("the scenario has no listener")
			}
			p.shows(listeners)
		})
	}
}

// The audit finds no difference, and does take place in namespaces that can be
// entered: here one with a name.
func TestAuditOfANamedNamespace(t *testing.T) {
	dir := t.TempDir()
	ns := scenario.NewNamed(t, dir, "web")
	p := launch(t, as{}, "--path.netns="+dir, "--census.interval=1s")
	p.shows(map[string]float64{
		`sockq_audit_difference{check="states",netns="web"}`: 0,
		`sockq_tcp_sockets{netns="web",state="LISTEN"}`:      0,
	})
	if checks := p.metrics()[`sockq_audit_checks_total{check="states"}`]; checks == 0 {
		t.Error("no audit was made")
	}
	ns.Close()
	p.await("the namespace to go", func() bool {
		_, there := p.metrics()[`sockq_tcp_sockets{netns="web",state="LISTEN"}`]
		return !there
	})
}

// A burst that came and went between two scrapes is in the peak.
func TestBurstBetweenScrapes(t *testing.T) {
	p := launch(t, as{})
	s := scenario.NewStage(t, scenario.IPv4)
	l := s.Listen(100)
	key := fmt.Sprintf("{address=%q,netns=%q}", l.Addr(), label(s.NS))
	p.shows(map[string]float64{"sockq_listener_accept_queue_peak" + key: 0})
	for range 33 {
		s.Connect(l.Addr())
	}
	time.Sleep(300 * time.Millisecond)
	for range 33 {
		l.Accept()
	}
	got := p.metrics()
	if length, peak := got["sockq_listener_accept_queue_length"+key], got["sockq_listener_accept_queue_peak"+key]; length != 0 || peak != 33 {
		t.Errorf("length is %v and peak %v, want 0 and 33", length, peak)
	}
	if waited := got["sockq_listener_accept_queue_connection_seconds_total"+key]; waited < 33*0.2 || waited > 33*1.5 {
		t.Errorf("connections waited %v s in all", waited)
	}
}
