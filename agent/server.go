package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/exporter-toolkit/web"

	"sockq/probes"
)

// Bounds that hold whatever clients do. A client that reads its answer slowly
// loses it after writeTimeout, and with it the slot that it held.
const (
	readHeaderTimeout = 5 * time.Second
	readTimeout       = 10 * time.Second
	writeTimeout      = 15 * time.Second
	idleTimeout       = 2 * time.Minute
	maxHeaderBytes    = 16 << 10
	maxConnections    = 256
)

func newServer(h http.Handler, logger *slog.Logger) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: readHeaderTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		ConnState:         boundConnections(maxConnections),
		// Strangers can cause these lines at will.
		ErrorLog: slog.NewLogLogger(logger.Handler(), slog.LevelDebug),
	}
}

// boundConnections keeps at most limit connections open. The next one takes the
// place of the one that has waited longest for a request, so that idle clients
// lock nobody out; where all are busy it is closed itself.
func boundConnections(limit int) func(net.Conn, http.ConnState) {
	var mu sync.Mutex
	idle := make(map[net.Conn]time.Time, limit) // since when; zero while a request runs
	return func(c net.Conn, state http.ConnState) {
		mu.Lock()
		defer mu.Unlock()
		switch state {
		case http.StateNew:
			if len(idle) >= limit && !closeOldest(idle) {
				c.Close()
				return
			}
			idle[c] = time.Now()
		case http.StateActive, http.StateIdle:
			if _, ok := idle[c]; !ok {
				return // closed to make room
			}
			idle[c] = time.Time{}
			if state == http.StateIdle {
				idle[c] = time.Now()
			}
		case http.StateClosed, http.StateHijacked:
			delete(idle, c)
		}
	}
}

func closeOldest(idle map[net.Conn]time.Time) bool {
	var oldest net.Conn
	for c, since := range idle {
		if !since.IsZero() && (oldest == nil || since.Before(idle[oldest])) {
			oldest = c
		}
	}
	if oldest == nil {
		return false
	}
	delete(idle, oldest)
	oldest.Close()
	return true
}

// listen opens the ports of --web.listen-address. It leaves to the toolkit what
// only the toolkit can open: systemd's sockets and vsock.
func listen(flags *web.FlagConfig) ([]net.Listener, error) {
	if byToolkit(flags) {
		return nil, nil
	}
	var out []net.Listener
	for _, address := range *flags.WebListenAddresses {
		l, err := net.Listen("tcp", address)
		if err != nil {
			closeAll(out)
			return nil, explainListen(address, err)
		}
		out = append(out, l)
	}
	return out, nil
}

func byToolkit(flags *web.FlagConfig) bool { return *flags.WebSystemdSocket || onVsock(flags) }

func onVsock(flags *web.FlagConfig) bool {
	return slices.ContainsFunc(*flags.WebListenAddresses, func(address string) bool {
		return strings.HasPrefix(address, "vsock://")
	})
}

func explainListen(address string, err error) error {
	var errno syscall.Errno
	errors.As(err, &errno)
	switch errno {
	case syscall.EADDRINUSE:
		return fmt.Errorf("port of %s is taken, perhaps by another sockq; choose another with --web.listen-address", address)
	case syscall.EACCES:
		return fmt.Errorf("no right to listen on %s; choose a port above 1023 with --web.listen-address", address)
	}
	return fmt.Errorf("%w; choose another address with --web.listen-address", err)
}

func closeAll(listeners []net.Listener) {
	for _, l := range listeners {
		l.Close()
	}
}

func serveWeb(server *http.Server, listeners []net.Listener, flags *web.FlagConfig, logger *slog.Logger) error {
	if byToolkit(flags) {
		return web.ListenAndServe(server, flags, logger)
	}
	return web.ServeMultiple(listeners, server, flags, logger)
}

// stopServer lets requests in flight end for a moment.
func stopServer(server *http.Server) {
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	if server.Shutdown(ctx) != nil {
		server.Close()
	}
}

// announce says where to look, what works here, and why the rest does not.
func announce(logger *slog.Logger, cfg *config, listeners []net.Listener, n node) {
	for _, l := range listeners {
		if *cfg.web.WebConfigFile != "" { // http or https, the toolkit's log tells
			logger.Info("sockq is up", "address", l.Addr().String())
		} else {
			logger.Info("sockq is up", "url", localURL(l.Addr()))
		}
	}
	s, err := n.Snapshot()
	if err != nil {
		logger.Error("No snapshot", "err", err)
		return
	}
	attached, missing := probeNames(s.Probes)
	logger.Info("Probes", "kernel", s.Kernel.Release, "tier", s.Kernel.Tier, "attached", attached, "missing", missing)
}

func probeNames(list []probes.Probe) (attached, missing string) {
	var yes, no, reasons []string
	for i, p := range list {
		if p.Attached {
			yes = append(yes, p.Name+" ("+p.Mechanism+")")
			continue
		}
		no = append(no, p.Name)
		if i+1 == len(list) || list[i+1].Attached || list[i+1].Reason != p.Reason {
			no[len(no)-1] += ": " + p.Reason // of all since the last one
			reasons = append(reasons, strings.Join(no, ", "))
			no = nil
		}
	}
	return strings.Join(yes, ", "), strings.Join(reasons, "; ")
}

// localURL is how a browser on this machine reaches a listener.
func localURL(a net.Addr) string {
	t, ok := a.(*net.TCPAddr)
	if !ok {
		return a.String()
	}
	host := t.IP.String()
	if t.IP.IsUnspecified() {
		host = "localhost"
	}
	return "http://" + net.JoinHostPort(host, fmt.Sprint(t.Port)) + "/"
}
