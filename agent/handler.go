package main

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"strconv"
	"sync"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"sockq/collectors"
)

// The paths besides --web.telemetry-path.
const (
	pathLanding  = "/"
	pathHealthy  = "/-/healthy"
	pathReady    = "/-/ready"
	pathSnapshot = "/api/v1/snapshot"
)

func newHandler(n node, cfg *config, logger *slog.Logger) http.Handler {
	slots := make(chan struct{}, cfg.maxRequests)
	mux := http.NewServeMux()
	handle := func(path string, h http.Handler) { mux.Handle("GET "+path, secured(h)) } // and HEAD
	handle(pathLanding+"{$}", bounded(slots, landingPage(n, cfg.telemetryPath, logger)))
	handle(cfg.telemetryPath, bounded(slots, metrics(n, logger)))
	handle(pathSnapshot, bounded(slots, snapshotJSON(n, logger)))
	handle(pathHealthy, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		say(w, "sockq is healthy.")
	}))
	handle(pathReady, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if !n.Ready() {
			http.Error(w, "sockq is not ready: no census yet.", http.StatusServiceUnavailable)
			return
		}
		say(w, "sockq is ready.")
	}))
	return mux
}

func say(w http.ResponseWriter, text string) { _, _ = io.WriteString(w, text+"\n") }

func metrics(n node, logger *slog.Logger) http.Handler {
	registry := collectors.NewRegistry()
	return promhttp.InstrumentMetricHandler(registry, promhttp.HandlerForTransactional(
		prometheus.NewMultiTRegistry(collectors.New(n), prometheus.ToTransactionalGatherer(registry)),
		promhttp.HandlerOpts{
			ErrorLog: slog.NewLogLogger(logger.Handler(), slog.LevelError),
			Registry: registry,
		},
	))
}

// secured tells browsers to take a page for what it is and nothing more.
func secured(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Content-Type-Options", "nosniff")
		w.Header().Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'")
		h.ServeHTTP(w, r)
	})
}

// bounded makes as many answers at one time as there are slots. An answer is
// made in memory first, so that a client that reads slowly holds its slot but
// none of the locks below.
func bounded(slots chan struct{}, h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case slots <- struct{}{}:
			defer func() { <-slots }()
		default:
			w.Header().Set("Retry-After", "1")
			http.Error(w, fmt.Sprintf("sockq makes %d answers at a time (--web.max-requests); try again.", cap(slots)), http.StatusServiceUnavailable)
			return
		}
		body := bodies.Get().(*bytes.Buffer)
		defer bodies.Put(body)
		body.Reset()
		a := answer{header: make(http.Header), status: http.StatusOK, Buffer: body}
		h.ServeHTTP(&a, r)
		maps.Copy(w.Header(), a.header)
		w.Header().Set("Content-Length", strconv.Itoa(body.Len()))
		w.WriteHeader(a.status)
		_, _ = w.Write(body.Bytes()) // the client may be gone
	})
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

// noSnapshot answers where the probes gave none.
func noSnapshot(w http.ResponseWriter, logger *slog.Logger, err error) {
	logger.Error("No snapshot", "err", err)
	http.Error(w, "no snapshot: "+oneLine(err), http.StatusInternalServerError)
}
