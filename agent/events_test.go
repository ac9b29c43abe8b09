package main

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	ebpflink "github.com/cilium/ebpf/link"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"golang.org/x/sys/unix"

	"sockq/probes/scenario"
	"sockq/probes/tcpstate"
)

// families reads a scrape as protobuf.
func families(body io.Reader, header http.Header) (map[string]*dto.MetricFamily, error) {
	list := make(map[string]*dto.MetricFamily)
	decoder := expfmt.NewDecoder(body, expfmt.ResponseFormat(header))
	for {
		f := new(dto.MetricFamily)
		if err := decoder.Decode(f); errors.Is(err, io.EOF) {
			return list, nil
		} else if err != nil {
			return nil, err
		}
		list[f.GetName()] = f
	}
}

const protobuf = "application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited"

// histogram scrapes sockq as protobuf, which has native histograms.
func (p *process) histogram(name string, labels map[string]string) *dto.Histogram {
	p.t.Helper()
	req, err := http.NewRequest(http.MethodGet, p.url+"/metrics", nil)
	if err != nil {
		p.t.Fatal(err)
	}
	req.Header.Set("Accept", protobuf)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		p.t.Fatal(err)
	}
	defer resp.Body.Close()
	all, err := families(resp.Body, resp.Header)
	if err != nil {
		p.t.Fatal(err)
	}
	for _, m := range all[name].GetMetric() {
		got := make(map[string]string)
		for _, l := range m.Label {
			got[l.GetName()] = l.GetValue()
		}
		if maps.Equal(got, labels) {
			return m.Histogram
		}
	}
	p.t.Fatalf("no %s%v", name, labels)
	return nil
}

func at(ns *scenario.Namespace, l *scenario.Socket) string {
	return fmt.Sprintf("{address=%q,netns=%q}", l.Addr(), label(ns))
}

// What listen() asked for, and what the kernel made of it.
func TestRequestedBacklog(t *testing.T) {
	p := launch(t, as{})
	s := scenario.NewStage(t, scenario.IPv6)
	s.NS.Sysctl("net.core.somaxconn", "128")
	key := at(s.NS, s.Listen(9999))
	p.shows(map[string]float64{
		"sockq_listener_backlog_requested" + key:                                9999,
		"sockq_listener_accept_queue_limit" + key:                               128,
		fmt.Sprintf("sockq_sysctl{name=%q,netns=%q}", "somaxconn", label(s.NS)): 128,
	})
}

// A server that accepts after 300 ms.
func TestSlowAccept(t *testing.T) {
	p := launch(t, as{})
	s := scenario.NewStage(t, scenario.IPv4)
	var l *scenario.Socket
	for try := 1; ; try++ { // on a busy machine it may take longer
		l = s.Listen(5)
		begin := time.Now()
		s.Connect(l.Addr())
		time.Sleep(300 * time.Millisecond) // what the server does meanwhile
		l.Accept()
		if took := time.Since(begin); took <= 500*time.Millisecond {
			break
		} else if try == 10 {
			t.Fatalf("300 ms took %v", took)
		}
	}
	key := at(s.NS, l)
	bucket := func(bound string) string {
		return fmt.Sprintf("sockq_listener_accept_wait_seconds_bucket{address=%q,le=%q,netns=%q}", l.Addr(), bound, label(s.NS))
	}
	p.shows(map[string]float64{
		"sockq_listener_accepts_total" + key:             1,
		"sockq_listener_accept_wait_seconds_count" + key: 1,
		bucket("0.25"): 0,
		bucket("1"):    1, // the classic form has a bucket for every other power of two
	})
	h := p.histogram("sockq_listener_accept_wait_seconds", map[string]string{"address": l.Addr().String(), "netns": label(s.NS), "process": ownName()})
	// In schema 0 bucket -1 is (2^-2, 2^-1] s.
	if h.GetSchema() != 0 || h.GetZeroCount() != 0 || len(h.PositiveSpan) != 1 || h.PositiveSpan[0].GetOffset() != -1 ||
		h.PositiveSpan[0].GetLength() != 1 || !slices.Equal(h.PositiveDelta, []int64{1}) {
		t.Errorf("native buckets are %v, want one count in (0.25, 0.5]", h)
	}
	if sum := h.GetSampleSum(); sum < 0.3 || sum > 0.5 {
		t.Errorf("the wait was %v s", sum)
	}
}

// A burst that is accepted at once is in the peak, however rarely queues are
// looked at.
func TestBurstThatIsAcceptedAtOnce(t *testing.T) {
	p := launch(t, as{}, "--listener.interval=10s", "--census.interval=1h")
	s := scenario.NewStage(t, scenario.IPv4)
	l := s.Listen(100)
	var clients []*scenario.Socket
	begin := time.Now()
	for range 30 {
		clients = append(clients, s.Begin(l.Addr()))
	}
	for _, c := range clients {
		c.Established()
	}
	for range 30 {
		l.Accept()
	}
	t.Logf("30 connections came and went in %v", time.Since(begin))
	key := at(s.NS, l)
	p.shows(map[string]float64{
		"sockq_listener_accept_queue_peak" + key:   30,
		"sockq_listener_accept_queue_length" + key: 0,
		"sockq_listener_connections_total" + key:   30,
		"sockq_listener_accepts_total" + key:       30,
	})
}

// holdings are what a process has in the kernel: ids by kind, as
// /proc/PID/fdinfo names them, and the number of its perf events.
func holdings(t *testing.T, pid int) (ids map[string][]uint32, perfEvents int) {
	t.Helper()
	ids = make(map[string][]uint32)
	dir := fmt.Sprintf("/proc/%d", pid)
	files, err := os.ReadDir(filepath.Join(dir, "fd"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if target, _ := os.Readlink(filepath.Join(dir, "fd", f.Name())); target == "anon_inode:[perf_event]" {
			perfEvents++
		}
		info, err := os.ReadFile(filepath.Join(dir, "fdinfo", f.Name()))
		if errors.Is(err, os.ErrNotExist) {
			continue // a connection that ended
		} else if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(info)) {
			kind, value, _ := strings.Cut(line, ":")
			if kind != "prog_id" && kind != "map_id" && kind != "link_id" {
				continue
			}
			id, err := strconv.ParseUint(strings.TrimSpace(value), 10, 32)
			if err != nil {
				t.Fatal(err)
			}
			if !slices.Contains(ids[kind], uint32(id)) { // a link names its program, too
				ids[kind] = append(ids[kind], uint32(id))
			}
		}
	}
	return ids, perfEvents
}

// exists tells whether the kernel has an object with that id.
func exists(t *testing.T, kind string, id uint32) bool {
	t.Helper()
	var object io.Closer
	var err error
	switch kind {
	case "prog_id":
		object, err = ebpf.NewProgramFromID(ebpf.ProgramID(id))
	case "map_id":
		object, err = ebpf.NewMapFromID(ebpf.MapID(id))
	case "link_id":
		object, err = ebpflink.NewFromID(ebpflink.ID(id))
	}
	if errors.Is(err, os.ErrNotExist) {
		return false
	}
	if err != nil {
		t.Fatal(err)
	}
	object.Close()
	return true
}

// Whatever ends it, nothing is left in the kernel, and SIGTERM ends it soon. A perf
// event that is left would keep the program of its system call. A crash, which SIGQUIT
// is to Go, is no wrong flag.
func TestNothingIsLeftBehind(t *testing.T) {
	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL, syscall.SIGQUIT} {
		t.Run(signal.String(), func(t *testing.T) {
			p := launch(t, as{})
			ids, perfEvents := holdings(t, p.cmd.Process.Pid)
			if perfEvents != 4 { // accept, accept4, listen, connect
				t.Errorf("sockq has %d perf events", perfEvents)
			}
			if len(ids["map_id"]) == 0 || len(ids["link_id"]) == 0 {
				t.Errorf("sockq has no maps or no links: %v", ids)
			}
			var names []string
			for _, id := range ids["prog_id"] {
				program, err := ebpf.NewProgramFromID(ebpf.ProgramID(id))
				if err != nil {
					t.Fatal(err)
				}
				info, err := program.Info()
				program.Close()
				if err != nil {
					t.Fatal(err)
				}
				names = append(names, info.Name)
			}
			for _, name := range []string{
				"walk_namespaces", "state_changed", "socket_destroyed", "connection_arrived", "final_ack_refused", "synack_retransmitted",
				"reset_sent", "reset_received", "accept_returned", "accept4_returned", "listen_returned", "connect_returned",
			} {
				if !slices.ContainsFunc(names, func(n string) bool { return n == name || n == name[:min(len(name), 15)] }) {
					t.Errorf("sockq has no program %s: %v", name, names)
				}
			}
			begin := time.Now()
			if err := p.cmd.Process.Signal(signal); err != nil {
				t.Fatal(err)
			}
			err := p.cmd.Wait()
			if took := time.Since(begin); signal == syscall.SIGTERM && (err != nil || took > 2*time.Second) {
				t.Errorf("ended after %v with %v", took, err)
			}
			if status := p.cmd.ProcessState.Sys().(syscall.WaitStatus); signal == syscall.SIGQUIT && status.Signal() != syscall.SIGABRT {
				t.Errorf("ended with %v", err)
			}
			for kind, list := range ids {
				for _, id := range list {
					p.await(fmt.Sprintf("%s %d to go", kind, id), func() bool { return !exists(t, kind, id) })
				}
			}
		})
	}
}

// A start after kill -9 finds what was there before: what happens to it is counted,
// but nobody knows since when it is in its state.
func TestStartFindsWhatWasThere(t *testing.T) {
	earlier := launch(t, as{})
	s := scenario.NewStage(t, scenario.IPv4)
	l := s.Listen(50)
	client := s.Connect(l.Addr())
	server := l.Accept()
	var waiting []*scenario.Socket
	for range 3 {
		waiting = append(waiting, s.Connect(l.Addr()))
	}
	silent := s.Peer().SYN(l.Addr())
	silent.AwaitSYNACK()
	if err := earlier.cmd.Process.Signal(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = earlier.cmd.Wait()

	p := launch(t, as{}, "--states.per-netns")
	key, netns := at(s.NS, l), label(s.NS)
	p.shows(map[string]float64{
		"sockq_listener_accept_queue_length" + key:                                       3,
		"sockq_listener_syn_queue_length" + key:                                          1,
		"sockq_listener_connections_total" + key:                                         0,
		"sockq_listener_accepts_total" + key:                                             0,
		fmt.Sprintf("sockq_tcp_sockets{netns=%q,state=%q}", netns, tcpstate.Established): 8,
	})
	p.lacks("sockq_listener_backlog_requested"+key, "sockq_listener_last_accept_timestamp_seconds"+key)

	for range waiting {
		l.Accept()
	}
	silent.ACK()
	l.Accept()
	client.Close()
	server.Await(tcpstate.CloseWait)
	server.Close()
	waiting[0].Reset()
	transition := func(from, to tcpstate.State) string {
		return fmt.Sprintf("sockq_tcp_transitions_total{from=%q,netns=%q,to=%q}", from, netns, to)
	}
	p.shows(map[string]float64{
		"sockq_listener_accept_queue_length" + key: 0,
		"sockq_listener_connections_total" + key:   1,
		"sockq_listener_accepts_total" + key:       4,
		// The wait of those that came earlier is not known.
		"sockq_listener_accept_wait_seconds_count" + key:                1,
		transition(tcpstate.SynRecv, tcpstate.Established):              1,
		transition(tcpstate.Established, tcpstate.FinWait1):             1,
		transition(tcpstate.Established, tcpstate.CloseWait):            1,
		transition(tcpstate.CloseWait, tcpstate.LastAck):                1,
		transition(tcpstate.LastAck, tcpstate.Close):                    1,
		transition(tcpstate.Established, tcpstate.Close):                2, // who sends the RST, and who gets it
		fmt.Sprintf("sockq_tcp_connect_seconds_count{netns=%q}", netns): 0,
	})
	p.lacks(fmt.Sprintf("sockq_tcp_state_seconds_count{netns=%q", netns))

	s.Connect(l.Addr()).Reset()
	p.shows(map[string]float64{
		fmt.Sprintf("sockq_tcp_state_seconds_count{netns=%q,state=%q}", netns, tcpstate.Established): 2,
		fmt.Sprintf("sockq_tcp_state_seconds_count{netns=%q,state=%q}", netns, tcpstate.SynSent):     1,
		fmt.Sprintf("sockq_tcp_connect_seconds_count{netns=%q}", netns):                              1,
	})
}
