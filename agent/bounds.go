package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"sockq/probes"
)

// turnedAway counts what clients did not get because of the bounds below.
type turnedAway struct {
	connections atomic.Uint64 // closed for others, or at once
	requests    atomic.Uint64 // refused: no slot in time, or a body
	answers     atomic.Uint64 // not read in time, or not before others wanted to read theirs
}

// countingNode adds to what a node lost what the web server turned away.
type countingNode struct {
	node
	away *turnedAway
}

func (n countingNode) Snapshot() (*probes.Snapshot, error) {
	s, err := n.node.Snapshot()
	if err != nil {
		return nil, err
	}
	counted := *s
	counted.Lost = map[string]uint64{
		"web_connections": n.away.connections.Load(),
		"web_requests":    n.away.requests.Load(),
		"web_answers":     n.away.answers.Load(),
	}
	maps.Copy(counted.Lost, s.Lost)
	return &counted, nil
}

// connections are those that are open, at most so many, and so many of one address.
type connections struct {
	most, mostOfOne int
	away            *turnedAway

	mu   sync.Mutex
	open map[net.Conn]*connection
}

type connection struct {
	address string
	idle    time.Time // since when it waits for a request; zero while one runs
}

func newConnections(most, mostOfOne int, away *turnedAway) *connections {
	return &connections{most: most, mostOfOne: mostOfOne, away: away, open: make(map[net.Conn]*connection)}
}

// changed is the server's ConnState.
func (b *connections) changed(c net.Conn, state http.ConnState) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch state {
	case http.StateNew:
		address := addressOf(c)
		if !b.makeRoom(address) {
			b.turnAway(c)
			return
		}
		if t, ok := beneath(c).(*net.TCPConn); ok {
			// Else the kernel keeps megabytes for who does not read.
			_ = t.SetWriteBuffer(sendBuffer)
		}
		b.open[c] = &connection{address, time.Now()}
	case http.StateActive, http.StateIdle:
		known := b.open[c]
		if known == nil {
			return // closed to make room
		}
		known.idle = time.Time{}
		if state == http.StateIdle {
			known.idle = time.Now()
		}
	case http.StateClosed, http.StateHijacked:
		delete(b.open, c)
	}
}

// makeRoom closes a connection where that is needed for one more of this address:
// the one that has waited longest for a request, so that idle clients lock nobody
// out, of the address that has most, so that one that has many locks out itself.
func (b *connections) makeRoom(address string) bool {
	of := make(map[string]int)
	for _, known := range b.open {
		of[known.address]++
	}
	full := of[address] >= b.mostOfOne
	if !full && len(b.open) < b.most {
		return true
	}
	var oldest net.Conn
	var found connection
	for c, known := range b.open {
		mayGo := known.address == address || !full && of[known.address] > of[address]
		if !mayGo || known.idle.IsZero() {
			continue
		}
		if more := of[known.address] - of[found.address]; oldest == nil || more > 0 || more == 0 && known.idle.Before(found.idle) {
			oldest, found = c, *known
		}
	}
	if oldest == nil {
		return false
	}
	delete(b.open, oldest)
	b.turnAway(oldest)
	return true
}

func (b *connections) turnAway(c net.Conn) {
	b.away.connections.Add(1)
	beneath(c).Close()
}

// beneath is the connection that TLS is spoken over. Closed itself, one of TLS
// would wait for the client to take its goodbye.
func beneath(c net.Conn) net.Conn {
	if t, ok := c.(*tls.Conn); ok {
		return t.NetConn()
	}
	return c
}

// addressOf is who has a connection, without the port.
func addressOf(c net.Conn) string {
	whole := c.RemoteAddr().String()
	host, _, err := net.SplitHostPort(whole)
	if err != nil {
		return whole
	}
	return host
}

// withoutBody refuses requests that have a body. No answer needs one, and the
// server would wait for what is missing of it before it answers.
func withoutBody(h http.Handler, away *turnedAway) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength == 0 {
			h.ServeHTTP(w, r)
			return
		}
		away.requests.Add(1)
		_ = http.NewResponseController(w).SetReadDeadline(time.Now())
		w.Header().Set("Connection", "close")
		http.Error(w, "sockq takes no request with a body.", http.StatusRequestEntityTooLarge)
	})
}

// slots bound the answers that are made at one time, and those that clients read.
type slots struct {
	making chan struct{}
	away   *turnedAway

	mu      sync.Mutex
	readers []*reader // in the order in which they began
}

// reader is a client that reads its answer.
type reader struct {
	*http.ResponseController
	address string
}

func newSlots(most int, away *turnedAway) *slots {
	return &slots{making: make(chan struct{}, most), away: away}
}

// bounded makes an answer in memory first, so that a client that reads slowly
// holds neither a place among those that are made nor one of the locks below.
func (s *slots) bounded(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !s.enter(r.Context()) {
			if r.Context().Err() == nil { // else the client is gone
				s.away.requests.Add(1)
			}
			w.Header().Set("Retry-After", "1")
			http.Error(w, fmt.Sprintf("sockq makes %d answers at a time (--web.max-requests); try again.", cap(s.making)), http.StatusServiceUnavailable)
			return
		}
		body := bodies.Get().(*bytes.Buffer)
		defer bodies.Put(body)
		body.Reset()
		a := answer{header: make(http.Header), status: http.StatusOK, Buffer: body}
		s.answer(&a, h, r)
		maps.Copy(w.Header(), a.header)
		w.Header().Set("Content-Length", strconv.Itoa(body.Len()))
		w.WriteHeader(a.status)
		host, _, _ := net.SplitHostPort(r.RemoteAddr)
		client := &reader{http.NewResponseController(w), host}
		s.begin(client)
		defer s.end(client)
		// Other errors are those of clients that are gone.
		if _, err := w.Write(body.Bytes()); errors.Is(err, os.ErrDeadlineExceeded) {
			s.away.answers.Add(1)
		}
	})
}

// enter waits for its turn, in the order of requests.
func (s *slots) enter(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, slotTimeout)
	defer cancel()
	select {
	case s.making <- struct{}{}:
		return true
	case <-ctx.Done():
		return false
	}
}

func (s *slots) answer(a *answer, h http.Handler, r *http.Request) {
	defer func() { <-s.making }() // also after a panic
	h.ServeHTTP(a, r)
}

// begin lets one more client read. Where there are as many as answers may be made, one
// loses the rest of its answer: of the address that has most, the new one counted, the
// one that has read longest.
func (s *slots) begin(client *reader) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.readers) == cap(s.making) {
		of := map[string]int{client.address: 1}
		for _, r := range s.readers {
			of[r.address]++
		}
		most := 0
		for i, r := range s.readers {
			if of[r.address] > of[s.readers[most].address] {
				most = i
			}
		}
		_ = s.readers[most].SetWriteDeadline(time.Now())
		s.readers = slices.Delete(s.readers, most, most+1)
	}
	s.readers = append(s.readers, client)
}

func (s *slots) end(client *reader) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.readers = slices.DeleteFunc(s.readers, func(r *reader) bool { return r == client })
}

// answer is a response in memory.
type answer struct {
	header http.Header
	status int
	*bytes.Buffer
}

func (a *answer) Header() http.Header    { return a.header }
func (a *answer) WriteHeader(status int) { a.status = status }

// bodies are kept for the next answer: a page is a megabyte with 1,000 listeners.
var bodies = sync.Pool{New: func() any { return new(bytes.Buffer) }}
