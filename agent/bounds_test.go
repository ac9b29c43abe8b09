package main

import (
	"bufio"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"testing/synctest"
	"time"

	"sockq/probes"
)

// More requests than slots: the rest waits for its turn, but not for ever. Health is
// not bounded.
func TestRequestsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, away := newFakeNode(), new(turnedAway)
		h := newHandler(n, &config{telemetryPath: "/metrics", maxRequests: 2}, away, silent)
		n.block()
		held, late := make(chan int), make(chan *httptest.ResponseRecorder)
		for _, path := range []string{"/metrics", pathSnapshot} {
			go func() { held <- request(h, "GET", path).Code }()
			<-n.blocked
		}
		begin := time.Now()
		for _, path := range []string{"/", "/metrics", pathSnapshot} {
			go func() { late <- request(h, "GET", path) }()
		}
		synctest.Wait()
		if r := request(h, "GET", pathHealthy); r.Code != 200 || time.Since(begin) > 0 {
			t.Errorf("healthy: %d after %v", r.Code, time.Since(begin))
		}
		for range 3 {
			if r := <-late; r.Code != 503 || r.Header().Get("Retry-After") == "" || time.Since(begin) != slotTimeout {
				t.Errorf("%d after %v, Retry-After %q", r.Code, time.Since(begin), r.Header().Get("Retry-After"))
			}
		}
		if got := away.requests.Load(); got != 3 {
			t.Errorf("%d requests were counted, want 3", got)
		}
		go func() { late <- request(h, "GET", "/metrics") }()
		synctest.Wait()
		n.release()
		for range 2 {
			if status := <-held; status != 200 {
				t.Error(status)
			}
		}
		if r := <-late; r.Code != 200 {
			t.Errorf("who waited got %d", r.Code)
		}
	})
}

// serve starts a server with the real bounds.
func serve(t *testing.T, n node, maxRequests int) (srv *httptest.Server, away *turnedAway) {
	t.Helper()
	away = new(turnedAway)
	srv = httptest.NewUnstartedServer(nil)
	srv.Config = newServers(newHandler(n, &config{telemetryPath: "/metrics", maxRequests: maxRequests}, away, silent), nil, away, silent)[0]
	srv.Start()
	t.Cleanup(srv.Close)
	return srv, away
}

// dial connects from an address of this machine.
func dial(t *testing.T, to net.Addr, from string) net.Conn {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	c, err := d.Dial("tcp", to.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return c
}

// manyListeners are more than the buffers of sockets take.
func manyListeners() (many []probes.Listener) {
	for i := range 2000 {
		many = append(many, probes.Listener{ID: uint64(i), Namespace: "host", Address: fmt.Sprint("0.0.0.0:", i)})
	}
	return many
}

// askSlowly asks for metrics, whose answer begins, and does not read it.
func askSlowly(t *testing.T, to net.Addr, from string, buffer int) net.Conn {
	t.Helper()
	c := dial(t, to, from)
	if err := c.(*net.TCPConn).SetReadBuffer(buffer); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(c, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if !answered(c) {
		t.Fatal("no answer")
	}
	return c
}

// One that reads slowly loses no answer to an address that asks for many.
func TestReadersAreServedFairly(t *testing.T) {
	n := newFakeNode()
	n.snapshot.Listeners = manyListeners()
	const most = 2
	srv, away := serve(t, n, most)
	honest := askSlowly(t, srv.Listener.Addr(), "127.0.0.2", 32<<10)
	for range 3 * most {
		askSlowly(t, srv.Listener.Addr(), "127.0.0.1", 4096)
	}
	read, err := io.Copy(io.Discard, io.LimitReader(honest, 500_000))
	if err != nil || read < 500_000 {
		t.Errorf("after %d bytes the answer ends: %v", read, err)
	}
	for end := time.Now().Add(10 * time.Second); away.answers.Load() < 3*most-1; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d others lost their answers, want %d", away.answers.Load(), 3*most-1)
		}
	}
}

// Clients that do not read their answers hold neither the slots nor a scrape, and the
// first of them lose theirs.
func TestSlowClientsHoldNobody(t *testing.T) {
	n := newFakeNode()
	n.snapshot.Listeners = manyListeners()
	const most = 2
	srv, away := serve(t, n, most)
	for range 2 * most {
		askSlowly(t, srv.Listener.Addr(), "127.0.0.1", 4096)
	}
	for range 2 {
		begin := time.Now()
		resp, err := srv.Client().Get(srv.URL + "/metrics")
		if err != nil {
			t.Fatal(err)
		}
		_, err = io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		if took := time.Since(begin); resp.StatusCode != 200 || err != nil || took > slotTimeout {
			t.Errorf("%s after %v, %v", resp.Status, took, err)
		}
	}
	// All but the last of them have made room.
	for end := time.Now().Add(10 * time.Second); away.answers.Load() < 2*most-1; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d slow clients lost their answers, want %d", away.answers.Load(), 2*most-1)
		}
	}
}

// A body that does not come holds neither a slot nor its connection, also where the
// client has no password.
func TestBodiesAreRefused(t *testing.T) {
	srv, away := serve(t, newFakeNode(), 1)
	guarded, stop := start(t, newFakeNode(), "--web.config.file="+writeConfig(t, users))
	ask(t, guarded).Body.Close()
	defer stop()
	open, closed := srv.Listener.Addr().String(), guarded[len("http://"):]
	for _, test := range []struct{ address, asks, length string }{
		{open, "GET /metrics", "Content-Length: 100000"},
		{open, "OPTIONS *", "Content-Length: 4000"},
		{closed, "GET /metrics", "Transfer-Encoding: chunked"},
		{closed, "OPTIONS *", "Content-Length: 4000"},
	} {
		to, err := net.ResolveTCPAddr("tcp", test.address)
		if err != nil {
			t.Fatal(err)
		}
		c := dial(t, to, "127.0.0.1")
		begin := time.Now()
		_, _ = io.WriteString(c, test.asks+" HTTP/1.1\r\nHost: x\r\n"+test.length+"\r\n\r\n1")
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		_, err = io.Copy(io.Discard, c) // until it is closed
		if took := time.Since(begin); resp.StatusCode != http.StatusRequestEntityTooLarge || err != nil || took > readTimeout/2 {
			t.Errorf("%s, %s: %s after %v, %v", test.asks, test.length, resp.Status, took, err)
		}
	}
	if got := away.requests.Load(); got != 2 {
		t.Errorf("%d requests were counted, want 2", got)
	}
}

// forFew is a server for so many connections, whose /busy waits for release.
func forFew(t *testing.T, most, mostOfOne int) (open *connections, ask func(from, path string) net.Conn, entered, release chan struct{}) {
	t.Helper()
	entered, release = make(chan struct{}), make(chan struct{})
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/busy" {
			entered <- struct{}{}
			<-release
		}
		say(w, "x")
	}))
	open = newConnections(most, mostOfOne, new(turnedAway))
	srv.Config.ConnState = open.changed
	srv.Start()
	t.Cleanup(srv.Close)
	return open, func(from, path string) net.Conn {
		t.Helper()
		c := dial(t, srv.Listener.Addr(), from)
		_, _ = io.WriteString(c, "GET "+path+" HTTP/1.1\r\nHost: x\r\n\r\n")
		return c
	}, entered, release
}

func answered(c net.Conn) bool {
	_, err := io.ReadFull(c, make([]byte, 15))
	return err == nil
}

// awaitIdle waits until the server has seen that so many connections are idle.
func (b *connections) awaitIdle(t *testing.T, want int) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		idle := 0
		b.mu.Lock()
		for _, known := range b.open {
			if !known.idle.IsZero() {
				idle++
			}
		}
		b.mu.Unlock()
		if idle == want {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%d connections are idle, want %d", idle, want)
		}
	}
}

func TestBusyConnectionsAreBounded(t *testing.T) {
	open, ask, entered, release := forFew(t, 2, 2)
	first := ask("127.0.0.1", "/busy")
	<-entered
	second := ask("127.0.0.1", "/busy")
	<-entered
	if answered(ask("127.0.0.1", "/")) {
		t.Error("a third connection was served")
	}
	close(release)
	if !answered(first) || !answered(second) {
		t.Error("a busy connection lost its answer")
	}
	if got := open.away.connections.Load(); got != 1 {
		t.Errorf("%d connections were counted, want 1", got)
	}
}

// Clients that keep idle connections lock nobody out.
func TestIdleConnectionsGiveWay(t *testing.T) {
	open, ask, _, _ := forFew(t, 2, 2)
	for i := range 10 {
		if !answered(ask("127.0.0.1", "/")) {
			t.Fatalf("connection %d was refused beside idle ones", i)
		}
		open.awaitIdle(t, min(i+1, 2))
	}
	if got := open.away.connections.Load(); got != 8 {
		t.Errorf("%d connections were counted, want 8", got)
	}
}

// An address that has many connections takes no place from one that has few, idle or
// busy, up to its own bound or to that of all.
func TestAddressesAreServedFairly(t *testing.T) {
	const quiet, greedy, third = "127.0.0.1", "127.0.0.2", "127.0.0.3"
	for name, mostOfOne := range map[string]int{"of all": 4, "of one": 3} {
		t.Run(name, func(t *testing.T) {
			open, ask, entered, release := forFew(t, 4, mostOfOne)
			defer close(release)
			mine := ask(quiet, "/")
			if !answered(mine) {
				t.Fatal("refused")
			}
			open.awaitIdle(t, 1)
			for range 3 {
				ask(greedy, "/busy")
				<-entered
			}
			if answered(ask(greedy, "/")) {
				t.Error("one more of the greedy address was served")
			}
			if _, _ = io.WriteString(mine, "GET / HTTP/1.1\r\nHost: x\r\n\r\n"); !answered(mine) {
				t.Error("the quiet one was thrown out")
			}
		})
	}
	t.Run("newcomer", func(t *testing.T) {
		open, ask, _, _ := forFew(t, 4, 4)
		mine := ask(quiet, "/")
		if !answered(mine) {
			t.Fatal("refused")
		}
		open.awaitIdle(t, 1)
		for i := range 6 { // which is longer idle than these
			ask(greedy, "/")
			open.awaitIdle(t, min(2+i, 4))
		}
		if !answered(ask(third, "/")) {
			t.Error("a newcomer was refused")
		}
		if _, _ = io.WriteString(mine, "GET / HTTP/1.1\r\nHost: x\r\n\r\n"); !answered(mine) {
			t.Error("the quiet one was thrown out")
		}
	})
}

// The bounds hold for what listens at several places together.
func TestServersShareTheirBounds(t *testing.T) {
	servers := newServers(http.NotFoundHandler(), make([]net.Listener, 2), new(turnedAway), silent)
	client, server := net.Pipe()
	defer client.Close()
	if err := client.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	for range maxOfAnAddress {
		_, c := net.Pipe()
		servers[0].ConnState(c, http.StateNew)
		servers[0].ConnState(c, http.StateActive)
	}
	servers[1].ConnState(server, http.StateNew)
	if _, err := client.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("one too many was not closed: %v", err)
	}
}

// A client of TLS that reads nothing does not delay those that take its place.
func TestConnectionsAreClosedAtOnce(t *testing.T) {
	_, certificate := newCertificate(t, 1)
	client, server := net.Pipe()
	defer client.Close()
	c := tls.Server(server, &tls.Config{Certificates: []tls.Certificate{certificate}, SessionTicketsDisabled: true})
	done := make(chan error)
	go func() { done <- tls.Client(client, &tls.Config{InsecureSkipVerify: true}).Handshake() }()
	if err := c.Handshake(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	open := newConnections(1, 1, new(turnedAway))
	open.changed(c, http.StateNew)
	open.changed(c, http.StateIdle)
	_, next := net.Pipe()
	begin := time.Now()
	open.changed(next, http.StateNew)
	if took := time.Since(begin); took > 2*time.Second {
		t.Errorf("it took %v", took)
	}
	if _, err := server.Write(nil); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("it is still open: %v", err)
	}
}
