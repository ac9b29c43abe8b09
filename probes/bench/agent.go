package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

// server is a process inside a namespace that is asked over HTTP.
type server struct {
	n       *namespace
	cmd     *exec.Cmd
	address string
	conn    net.Conn
	r       *bufio.Reader
}

// Servers listen on an address of their own: the connections have taken the
// ports of 127.0.0.1.
const serverAddress = "127.0.3.1:"

// startServer starts a program and waits until path answers with 200.
func startServer(ctx context.Context, n *namespace, address, path, program string, args ...string) (*server, error) {
	s := &server{n: n, cmd: exec.Command(program, args...), address: address}
	var log strings.Builder
	s.cmd.Stderr = &log // read after Wait only
	if err := n.start(s.cmd); err != nil {
		return nil, err
	}
	for {
		err := s.dial()
		if err == nil {
			if _, err = s.get(path, false); err == nil {
				return s, nil
			}
		}
		select {
		case <-ctx.Done():
			s.stop()
			return nil, ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
		if exited(s.pid()) {
			s.stop()
			return nil, fmt.Errorf("%s ended: %s", program, lastLine(log.String()))
		}
	}
}

func lastLine(log string) string {
	lines := strings.Split(strings.TrimSpace(log), "\n")
	return lines[len(lines)-1]
}

// exited tells whether a child is a zombie.
func exited(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return true
	}
	_, rest, _ := strings.Cut(string(b), ") ")
	return strings.HasPrefix(rest, "Z")
}

func (s *server) pid() int { return s.cmd.Process.Pid }

func (s *server) stop() {
	if s.conn != nil {
		s.conn.Close()
	}
	s.n.stop(s.cmd)
}

// dial connects from inside: a socket stays in the namespace it was made in.
func (s *server) dial() error {
	if s.conn != nil {
		s.conn.Close()
		s.conn = nil
	}
	return s.n.do(func() (err error) {
		if s.conn, err = net.DialTimeout("tcp4", s.address, time.Second); err == nil {
			s.r = bufio.NewReader(s.conn)
		}
		return err
	})
}

// get asks for a page on the one connection. It returns the body as it came.
func (s *server) get(path string, compressed bool) ([]byte, error) {
	if err := s.conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		return nil, err
	}
	request, err := http.NewRequest(http.MethodGet, "http://"+s.address+path, nil)
	if err != nil {
		return nil, err
	}
	request.Header.Set("Accept", "text/plain;version=0.0.4")
	if compressed {
		request.Header.Set("Accept-Encoding", "gzip")
	}
	if err := request.Write(s.conn); err != nil {
		return nil, err
	}
	response, err := http.ReadResponse(s.r, request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = errors.New(response.Status)
	}
	return body, err
}

// scrapeTime is what one scrape costs a server that does nothing else.
func (s *server) scrapeTime() (time.Duration, error) {
	before, err := processTime(s.pid())
	if err != nil {
		return 0, err
	}
	body, err := s.get("/metrics", true)
	if err != nil {
		return 0, err
	}
	if len(body) == 0 {
		return 0, errors.New("empty page")
	}
	after, err := processTime(s.pid())
	return after - before, err
}

func (b *bench) buildAgent() (string, error) {
	progress("building the agent")
	program := b.dir + "/sockq"
	cmd := exec.CommandContext(b.ctx, "go", "build", "-trimpath", "-o", program, "sockq/agent")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("build the agent: %w: %s", err, out)
	}
	return program, nil
}

func (b *bench) startAgent(n *namespace, port int, flags ...string) (*server, error) {
	address := serverAddress + strconv.Itoa(port)
	return startServer(b.ctx, n, address, "/-/ready", b.agent, append(flags, "--web.listen-address="+address, "--log.level=warn")...)
}

// idle measures the agent that nobody asks. The one without the audit runs at
// the same time, for the same noise.
func (b *bench) idle() error {
	n, err := b.populate(b.idleListeners, b.idleSockets)
	if err != nil {
		return err
	}
	defer func() { b.vanish(n) }()
	plain, err := b.startAgent(n, 10813)
	if err != nil {
		return err
	}
	defer plain.stop()
	unaudited, err := b.startAgent(n, 10814, "--audit.budget=0")
	if err != nil {
		return err
	}
	defer unaudited.stop()
	progress("measuring: idle agent")
	if err := b.sleep(b.idleWindow); err != nil { // the start is no idling
		return err
	}
	agents := []*server{plain, unaudited}
	shares := make([]samples, len(agents))
	for range b.idleWindows {
		used, err := b.window(b.idleWindow, agents...)
		if err != nil {
			return err
		}
		for i := range agents {
			shares[i] = append(shares[i], 100*used[i].Seconds()/b.idleWindow.Seconds())
		}
	}
	what := fmt.Sprintf("Idle, %s listeners, %s sockets", count(b.idleListeners), count(b.idleSockets))
	b.add(
		row{what: what, method: "**agent**", cost: mean(shares[0]) + " of a CPU", verdicts: []verdict{{"≤ 0.5 %", yesNo(shares[0].mean() <= 0.5)}}},
		row{what: what, method: "agent, `--audit.budget=0`", cost: mean(shares[1]) + " of a CPU"},
	)
	return nil
}

// mean is an average share with its spread: work that comes at intervals is in
// some windows and not in others, so that a median would not tell.
func mean(s samples) string { return number(s.mean()) + " %" + s.bounds() }

// window lets time go by and returns what the servers used meanwhile.
func (b *bench) window(d time.Duration, servers ...*server) ([]time.Duration, error) {
	used := make([]time.Duration, len(servers))
	for i, s := range servers {
		before, err := processTime(s.pid())
		if err != nil {
			return nil, err
		}
		used[i] = -before
	}
	if err := b.sleep(d); err != nil {
		return nil, err
	}
	for i, s := range servers {
		after, err := processTime(s.pid())
		if err != nil {
			return nil, err
		}
		used[i] += after
	}
	return used, nil
}

const scrapesPerWindow = 10

// scrape measures a scrape as what the agent uses more than without one.
func (b *bench) scrape() error {
	what := "Scrape with " + count(b.fewListeners) + " listeners"
	if err := b.scrapeOf(what, "listen"); err != nil {
		return err
	}
	return b.scrapeOf(what+" that accepted", "accept")
}

// scrapeOf makes the listeners after the agent's start, so that it sees what
// happens to them.
func (b *bench) scrapeOf(what, hold string) error {
	n, err := newNamespace()
	if err != nil {
		return err
	}
	defer func() { b.vanish(n) }()
	return b.scrapeIn(n, what, 25, func() error { return n.hold(b.ctx, hold, b.fewListeners) })
}

// scrapeIn fills the node after the agent's start. A scrape may take at most that
// many milliseconds, 0 for as many as it likes.
func (b *bench) scrapeIn(n *namespace, what string, most float64, fill func() error, flags ...string) error {
	// Without a census in some windows and not in others; samples of the
	// listeners go on.
	agent, err := b.startAgent(n, 10813, append(flags, "--census.interval=1h", "--audit.budget=0")...)
	if err != nil {
		return err
	}
	defer agent.stop()
	if err := fill(); err != nil {
		return err
	}
	progress("measuring: %s", what)
	kinds := []*scrapes{{name: "**agent**, text", agent: agent}, {name: "**agent**, gzip, as Prometheus asks", compressed: true, agent: agent}}
	for _, k := range kinds { // the first is dearer
		if _, err := agent.get("/metrics", k.compressed); err != nil {
			return err
		}
	}
	for range b.rounds {
		idle, err := b.window(b.scrapeWindow, agent)
		if err != nil {
			return err
		}
		for _, k := range kinds {
			if err := k.window(b, idle[0]); err != nil {
				return err
			}
		}
	}
	for _, k := range kinds {
		r := row{what: what, method: fmt.Sprintf("%s: %.0f kB", k.name, float64(k.bytes)/1000), cost: k.ms.spread(" ms")}
		if most > 0 {
			r.verdicts = []verdict{{fmt.Sprintf("≤ %v ms", most), yesNo(k.ms.median() <= most)}}
		}
		b.add(r)
	}
	text := kinds[0]
	b.notes = append(b.notes, fmt.Sprintf("%s has %s series and makes %s allocations of %s kB together, the samples of the listeners between two scrapes included.",
		what, count(text.series), count(int(text.allocations.median())), number(text.allocated.median()/1000)))
	return nil
}

// scrapes are scrapes of one kind.
type scrapes struct {
	name       string
	agent      *server
	compressed bool

	bytes, series          int
	ms                     samples
	allocations, allocated samples // a scrape
}

func (k *scrapes) window(b *bench, idle time.Duration) error {
	var first, last []byte
	before, err := processTime(k.agent.pid())
	if err != nil {
		return err
	}
	for i := range scrapesPerWindow {
		start := time.Now()
		body, err := k.agent.get("/metrics", k.compressed)
		if err != nil {
			return err
		}
		if i == 0 {
			first = body
		}
		last = body
		if err := b.sleep(b.scrapeWindow/scrapesPerWindow - time.Since(start)); err != nil {
			return err
		}
	}
	after, err := processTime(k.agent.pid())
	if err != nil {
		return err
	}
	k.ms = append(k.ms, milliseconds(after-before-idle)/scrapesPerWindow)
	k.bytes = len(last)
	if !k.compressed {
		k.series = series(last)
		const between = scrapesPerWindow - 1
		k.allocations = append(k.allocations, (value(last, "go_memstats_mallocs_total")-value(first, "go_memstats_mallocs_total"))/between)
		k.allocated = append(k.allocated, (value(last, "go_memstats_alloc_bytes_total")-value(first, "go_memstats_alloc_bytes_total"))/between)
	}
	return nil
}

// series counts the samples on a page.
func series(page []byte) (n int) {
	for line := range strings.Lines(string(page)) {
		if line[0] != '#' {
			n++
		}
	}
	return n
}

// value finds a metric without labels, 0 if it is not there.
func value(page []byte, name string) float64 {
	for line := range strings.Lines(string(page)) {
		if rest, ok := strings.CutPrefix(line, name+" "); ok {
			v, _ := strconv.ParseFloat(strings.TrimSpace(rest), 64)
			return v
		}
	}
	return 0
}

// resident measures the agent's memory beside many sockets, while it takes a
// census, audits and is scraped.
func (b *bench) resident(n *namespace) error {
	progress("measuring: memory of the agent")
	what := "Memory beside " + count(b.large) + " sockets"
	plain, err := b.residentAgent(n)
	if err != nil {
		return err
	}
	unaudited, err := b.residentAgent(n, "--audit.budget=0")
	if err != nil {
		return err
	}
	b.add(
		row{what: what, method: "**agent**", cost: megabytes(plain) + " at most", verdicts: []verdict{{"≤ 40 MB", yesNo(plain <= 40<<20)}}},
		row{what: what, method: "agent, `--audit.budget=0`", cost: megabytes(unaudited) + " at most"},
	)
	return nil
}

func (b *bench) residentAgent(n *namespace, flags ...string) (peak uint64, err error) {
	agent, err := b.startAgent(n, 10813, flags...)
	if err != nil {
		return 0, err
	}
	defer agent.stop()
	for end := time.Now().Add(b.settle); time.Now().Before(end); {
		if _, err := agent.get("/metrics", true); err != nil {
			return 0, err
		}
		if err := b.sleep(time.Second); err != nil {
			return 0, err
		}
	}
	return memory(agent.pid(), "VmHWM")
}

func megabytes(b uint64) string { return number(float64(b)/(1<<20)) + " MB" }
