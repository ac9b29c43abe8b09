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
	"syscall"
	"time"

	"github.com/prometheus/exporter-toolkit/web"

	"sockq/probes"
)

// Bounds that hold whatever clients do. A client that reads its answer slowly
// loses it after writeTimeout, or sooner where others wait.
const (
	readHeaderTimeout = 5 * time.Second
	readTimeout       = 10 * time.Second
	writeTimeout      = 15 * time.Second
	idleTimeout       = 2 * time.Minute
	slotTimeout       = 5 * time.Second // Prometheus' own for a scrape is 10 s
	maxHeaderBytes    = 16 << 10
	maxConnections    = 256
	maxOfAnAddress    = 32
	sendBuffer        = 128 << 10 // of a connection; the kernel takes twice as much
)

func newServer(h http.Handler, open *connections, logger *slog.Logger) *http.Server {
	// HTTP/2 lets each connection have hundreds of requests, and those that reset
	// them at once thousands, which no bound of connections bounds.
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	return &http.Server{
		Handler:           h,
		Protocols:         protocols,
		ReadHeaderTimeout: readHeaderTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		ConnState:         open.changed,
		// Go's own answer to OPTIONS * waits for a body, before any password.
		DisableGeneralOptionsHandler: true,
		// Strangers can cause these lines at will.
		ErrorLog: slog.NewLogLogger(logger.Handler(), slog.LevelDebug),
	}
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

// newServers makes a server for each listener, since the toolkit changes what it
// serves; or one for the listeners that the toolkit opens.
func newServers(h http.Handler, listeners []net.Listener, away *turnedAway, logger *slog.Logger) []*http.Server {
	open := newConnections(maxConnections, maxOfAnAddress, away)
	if len(listeners) == 0 {
		// Here the password is asked for first: who has none and sends no body that it
		// announced holds its connection for readTimeout.
		return []*http.Server{newServer(withoutBody(h, away), open, logger)}
	}
	servers := make([]*http.Server, len(listeners))
	for i := range servers {
		server := newServer(h, open, logger)
		server.BaseContext = func(net.Listener) context.Context {
			// Only now, since the toolkit has put what asks for a password before
			// the handler: bodies are refused to strangers, too.
			server.Handler = withoutBody(server.Handler, away)
			return context.Background()
		}
		servers[i] = server
	}
	return servers
}

// serveWeb ends when the first of the servers does.
func serveWeb(servers []*http.Server, listeners []net.Listener, flags *web.FlagConfig, logger *slog.Logger) error {
	if byToolkit(flags) {
		return web.ListenAndServe(servers[0], flags, logger)
	}
	ended := make(chan error, len(listeners))
	for i, l := range listeners {
		go func() { ended <- web.Serve(l, servers[i], flags, logger) }()
	}
	return <-ended
}

// stopServers lets requests in flight end for a moment.
func stopServers(servers []*http.Server) {
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	for _, server := range servers {
		if server.Shutdown(ctx) != nil {
			server.Close()
		}
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
