package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"go.uber.org/goleak"

	"sockq/probes"
)

func TestMain(m *testing.M) {
	if inGuest { // where there is no place for copies of this binary, which no test needs there
		os.Exit(m.Run())
	}
	commands := map[string]func(){"sockq": main}
	maps.Copy(commands, badPlaces)
	testscript.Main(m, commands)
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(e *testscript.Env) error {
			taken, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				return err
			}
			e.Defer(func() { taken.Close() })
			e.Setenv("TAKEN", taken.Addr().String())
			free, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				return err
			}
			e.Setenv("FREE", free.Addr().String())
			e.Values["clock"] = new(time.Time)
			return free.Close()
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"fails": fails, "get": get, "signal": sendSignal, "clock": clock, "within": within,
		},
	})
}

// fails CODE command...: the command exits with CODE and says why in one line.
func fails(ts *testscript.TestScript, _ bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != want {
		ts.Fatalf("got %v, want exit code %d", err, want)
	}
	said := ts.ReadFile("stderr")
	if ts.ReadFile("stdout") != "" || strings.Count(said, "\n") != 1 || !strings.HasPrefix(said, "sockq: ") {
		ts.Fatalf("want one line on standard error, got %q", said)
	}
}

// get URL: asks until the answer is 200.
func get(ts *testscript.TestScript, _ bool, args []string) {
	client := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	var last string
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		resp, err := client.Get(args[0])
		if err != nil {
			last = err.Error()
			continue
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode == http.StatusOK {
			return
		}
		last = resp.Status + " " + string(body)
	}
	ts.Fatalf("%s: %s", args[0], last)
}

// sendSignal TERM|INT: to what runs in the background; testscript's kill knows no SIGTERM.
func sendSignal(ts *testscript.TestScript, _ bool, args []string) {
	sig := map[string]os.Signal{"TERM": syscall.SIGTERM, "INT": syscall.SIGINT}[args[0]]
	for _, cmd := range ts.BackgroundCmds() {
		ts.Check(cmd.Process.Signal(sig))
	}
}

func clock(ts *testscript.TestScript, _ bool, _ []string) {
	*ts.Value("clock").(*time.Time) = time.Now()
}

// within DURATION: of the last clock.
func within(ts *testscript.TestScript, _ bool, args []string) {
	limit, err := time.ParseDuration(args[0])
	ts.Check(err)
	if took := time.Since(*ts.Value("clock").(*time.Time)); took > limit {
		ts.Fatalf("took %v, want at most %v", took, limit)
	}
}

// result of a run.
type result struct {
	code int
	took time.Duration // from the end of the context
	said string
}

// start runs the command with a fake node on a port of its own. stop ends it.
func start(t *testing.T, n *fakeNode, args ...string) (url string, stop func() result) {
	t.Helper()
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := free.Addr().String()
	free.Close()
	ctx, cancel := context.WithCancel(context.Background())
	code := make(chan int, 1)
	var stderr bytes.Buffer
	go func() {
		e := env{io.Discard, &stderr, func(o probes.Options) (node, error) { n.opts = o; return n, n.openErr }, new(fakePrivileges)}
		code <- e.run(ctx, append([]string{"--web.listen-address=" + address}, args...))
	}()
	stop = func() result {
		begin := time.Now()
		cancel()
		r := result{code: <-code, took: time.Since(begin)}
		r.said = stderr.String()
		t.Log(r.said)
		return r
	}
	return "http://" + address, stop
}

// ask asks until something answers.
func ask(t *testing.T, url string) *http.Response {
	t.Helper()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		resp, err := client.Get(url)
		if err == nil {
			return resp
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

func TestRunEndsCleanly(t *testing.T) {
	defer goleak.VerifyNone(t)
	n := newFakeNode()
	url, stop := start(t, n, "--census.interval=7s", "--listener.interval=50ms", "--audit.budget=0", "--max-listeners=10",
		"--max-namespaces=20", "--max-sockets=20000", "--bpf-stats", "--no-tracker.syscalls", "--states.per-netns", "--path.netns=/x", "--census.mechanism=sock_diag", "--log.level=error")
	resp := ask(t, url+"/-/healthy")
	resp.Body.Close()
	if r := stop(); r.code != exitOK || r.took > 2*time.Second {
		t.Errorf("exit code %d after %v", r.code, r.took)
	}
	if !n.closed.Load() {
		t.Error("the probes were not closed")
	}
	n.opts.Logger = nil
	want := probes.Options{
		NoSyscalls: true, StatesPerNamespace: true,
		CensusInterval: 7 * time.Second, ListenerInterval: 50 * time.Millisecond, MaxListeners: 10, MaxNamespaces: 20, MaxProcesses: 200, MaxSockets: 20_000,
		BPFStats: true, ProcFS: "/proc", SysFS: "/sys", NetnsPath: "/x", Mechanism: "sock_diag",
	}
	if n.opts != want {
		t.Errorf("the probes were opened with %+v, want %+v", n.opts, want)
	}
}

// What is on unless a flag turns it off.
func TestFlagsThatAreOn(t *testing.T) {
	for _, test := range []struct {
		args                                 []string
		noSyscalls, noSeconds, perNamespaces bool
	}{
		{nil, false, false, false},
		{[]string{"--tracker.syscalls", "--states.seconds"}, false, false, false},
		{[]string{"--no-tracker.syscalls"}, true, false, false},
		{[]string{"--no-states.seconds", "--no-states.per-netns"}, false, true, false},
		{[]string{"--states.per-netns"}, false, false, true},
	} {
		cfg, err := parse(test.args, io.Discard)
		if err != nil {
			t.Fatal(err)
		}
		if o := cfg.probes; o.NoSyscalls != test.noSyscalls || o.NoStateSeconds != test.noSeconds || o.StatesPerNamespace != test.perNamespaces {
			t.Errorf("%v: %+v", test.args, o)
		}
	}
}

// The probes end when they are told to; that is no failure, whoever is first.
func TestRunEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for range 20 {
		var stderr bytes.Buffer
		e := env{io.Discard, &stderr, func(probes.Options) (node, error) { return newFakeNode(), nil }, new(fakePrivileges)}
		if code := e.run(ctx, []string{"--web.listen-address=127.0.0.1:0", "--log.level=error"}); code != exitOK || stderr.Len() > 0 {
			t.Fatalf("exit code %d, said %q", code, stderr.String())
		}
	}
}

// A scrape that hangs in the probes does not hold the agent.
func TestRunEndsWithAScrapeInFlight(t *testing.T) {
	defer goleak.VerifyNone(t)
	n := newFakeNode()
	url, stop := start(t, n)
	ask(t, url+"/-/healthy").Body.Close()
	for deadline := time.Now().Add(10 * time.Second); !n.answered.Load(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) { // announce asks for one
			t.Fatal("nobody asked for a snapshot")
		}
	}
	n.block()
	scraped := make(chan struct{})
	go func() {
		defer close(scraped)
		client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
		if resp, err := client.Get(url + "/metrics"); err == nil {
			resp.Body.Close()
		}
	}()
	<-n.blocked
	if r := stop(); r.code != exitOK || r.took > 2*time.Second {
		t.Errorf("exit code %d after %v", r.code, r.took)
	}
	n.release()
	<-scraped
}

// A client that is connected and says nothing does not hold the agent either.
func TestRunEndsWithAnIdleClient(t *testing.T) {
	defer goleak.VerifyNone(t)
	url, stop := start(t, newFakeNode())
	ask(t, url+"/-/healthy").Body.Close()
	c, err := net.Dial("tcp", strings.TrimPrefix(url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, "GET /metrics HTTP/1.1\r\nHost: x\r\n"); err != nil {
		t.Fatal(err)
	}
	if r := stop(); r.code != exitOK || r.took > 2*time.Second {
		t.Errorf("exit code %d after %v", r.code, r.took)
	}
}

func TestRunFails(t *testing.T) {
	tests := map[string]struct {
		node *fakeNode
		want string
	}{
		"the probes cannot be opened": {
			&fakeNode{openErr: errors.New("open sock_diag:\n operation not permitted")},
			"sockq: start the probes: open sock_diag: operation not permitted\n",
		},
		"the probes end": {
			&fakeNode{snapshot: fullSnapshot(), runErr: errors.New("census: boom")},
			"sockq: run the probes: census: boom\n",
		},
		"the probes cannot be closed": {
			&fakeNode{snapshot: fullSnapshot(), runErr: errors.New("a"), closeErr: errors.New("b")},
			"sockq: run the probes: a close the probes: b\n",
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			defer goleak.VerifyNone(t)
			var stderr bytes.Buffer
			e := env{io.Discard, &stderr, func(probes.Options) (node, error) { return test.node, test.node.openErr }, new(fakePrivileges)}
			if code := e.run(t.Context(), []string{"--web.listen-address=127.0.0.1:0", "--log.level=error"}); code != exitEnvironment {
				t.Errorf("exit code %d, want %d", code, exitEnvironment)
			}
			if got := stderr.String(); got != test.want {
				t.Errorf("said %q, want %q", got, test.want)
			}
		})
	}
}

// Probes that do not end are left behind: the process ends all the same.
func TestRunDoesNotWaitForProbesForEver(t *testing.T) {
	n := newFakeNode()
	n.stuck = make(chan struct{})
	defer close(n.stuck)
	url, stop := start(t, n)
	ask(t, url+"/-/healthy").Body.Close()
	if r := stop(); r.code != exitEnvironment || r.took > 2*time.Second {
		t.Errorf("exit code %d after %v", r.code, r.took)
	}
	if n.closed.Load() {
		t.Error("the probes were closed while they ran")
	}
}
