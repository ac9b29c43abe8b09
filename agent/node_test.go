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
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"golang.org/x/sys/unix"

	"sockq/probes/scenario"
	"sockq/probes/tcpstate"
)

// binary builds sockq once, where every user can execute it.
var binary = sync.OnceValues(func() (string, error) {
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
	p.cmd = exec.Command(path, append([]string{"--web.listen-address=" + address, "--max-listeners=100000"}, args...)...)
	p.cmd.Stdout, p.cmd.Stderr = &p.log, &p.log
	if who.nobody {
		p.cmd.SysProcAttr = &syscall.SysProcAttr{
			Credential:  &syscall.Credential{Uid: 65534, Gid: 65534},
			AmbientCaps: who.capabilities,
		}
	}
	if err := p.cmd.Start(); err != nil {
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
	for end := time.Now().Add(30 * time.Second); !done(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			p.t.Fatalf("waited for %s in vain", what)
		}
	}
}

// metrics scrapes sockq: values by name and sorted labels, a{b="c",d="e"}.
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
				labels = append(labels, fmt.Sprintf("%s=%q", l.GetName(), l.GetValue()))
			}
			slices.Sort(labels)
			key := name + "{" + strings.Join(labels, ",") + "}"
			values[key] = m.GetGauge().GetValue() + m.GetCounter().GetValue()
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

// Two capabilities are enough for all namespaces; none shows the own one.
func TestRights(t *testing.T) {
	ns, want := scenario.Mixed.Hold(t, scenario.IPv4)
	walk := `sockq_probe_attached{mechanism="bpf_walk",probe="sockets"}`
	diag := `sockq_probe_attached{mechanism="sock_diag",probe="sockets"}`

	t.Run("BPF and PERFMON", func(t *testing.T) {
		p := launch(t, as{nobody: true, capabilities: []uintptr{unix.CAP_BPF, unix.CAP_PERFMON}})
		p.shows(states(ns, want.States))
		p.shows(map[string]float64{walk: 1})
	})
	for name, without := range map[string]struct {
		capabilities []uintptr
		missing      string
	}{
		"none":    {nil, "CAP_BPF and CAP_PERFMON missing"},
		"BPF":     {[]uintptr{unix.CAP_BPF}, "CAP_PERFMON missing"},
		"PERFMON": {[]uintptr{unix.CAP_PERFMON}, "CAP_BPF missing"},
	} {
		t.Run(name, func(t *testing.T) {
			p := launch(t, as{nobody: true, capabilities: without.capabilities})
			p.shows(map[string]float64{diag: 1})
			got := p.metrics()
			for series := range states(ns, want.States) {
				if _, there := got[series]; there {
					t.Errorf("%s is shown", series)
				}
			}
			if _, there := got[walk]; there {
				t.Error("the walk is shown as attached")
			}
			own := 0
			for series := range got {
				if strings.HasPrefix(series, "sockq_tcp_sockets{") {
					own++
				}
				if strings.HasPrefix(series, "sockq_listener_syn_queue_length") {
					t.Errorf("%s is shown, which sock_diag cannot tell", series)
				}
			}
			if own != len(tcpstate.All) {
				t.Errorf("%d series of states, want those of one namespace", own)
			}
			if said := p.log.String(); !strings.Contains(said, without.missing) {
				t.Errorf("the log does not say %q", without.missing)
			}
		})
	}
}

func programs(t *testing.T) (n int) {
	t.Helper()
	for id := ebpf.ProgramID(0); ; n++ {
		next, err := ebpf.ProgramGetNextID(id)
		if err != nil {
			return n
		}
		id = next
	}
}

// Whatever ends it, nothing is left in the kernel, and SIGTERM ends it soon.
func TestNothingIsLeftBehind(t *testing.T) {
	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		t.Run(signal.String(), func(t *testing.T) {
			before := programs(t)
			p := launch(t, as{})
			if programs(t) <= before {
				t.Fatal("sockq has no BPF program")
			}
			begin := time.Now()
			if err := p.cmd.Process.Signal(signal); err != nil {
				t.Fatal(err)
			}
			err := p.cmd.Wait()
			if took := time.Since(begin); signal == syscall.SIGTERM && (err != nil || took > 2*time.Second) {
				t.Errorf("ended after %v with %v", took, err)
			}
			p.await("the programs to go", func() bool { return programs(t) <= before })
		})
	}
}
