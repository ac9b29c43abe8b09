// Command sockq shows the state of every TCP socket and the two queues of
// every listener, in all network namespaces of a node.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"github.com/prometheus/common/promslog"

	"sockq/collectors"
	"sockq/probes"
)

func main() {
	if os.Getenv("GOGC") == "" {
		// The heap is small and grows little: with 1,000 listeners this took
		// 45 MB of resident memory to 40, for a tenth more CPU time a scrape
		// as text and none with gzip.
		debug.SetGCPercent(50)
	}
	// A crash ends by SIGABRT: Go's exit code for it is 2, with which nobody starts
	// sockq again.
	debug.SetTraceback("crash")
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	os.Exit(env{os.Stdout, os.Stderr, openProbes, ownPrivileges{}}.run(ctx, os.Args[1:]))
}

// Exit codes. 0 is also the end by a signal.
const (
	exitOK          = 0
	exitEnvironment = 1 // the node does not give what is needed
	exitUsage       = 2 // a flag or a configuration file is wrong
)

// stopTimeout bounds each of the two steps of the end: requests in flight,
// then the probes.
const stopTimeout = 800 * time.Millisecond

// node are the running probes, as probes.Probes.
type node interface {
	collectors.Snapshotter
	Ready() bool
	Needs() []probes.Need
	Run(context.Context) error
	Close() error
}

// env is what the command finds around it.
type env struct {
	stdout, stderr io.Writer
	open           func(probes.Options) (node, error)
	own            privileges
}

func openProbes(opts probes.Options) (node, error) {
	p, err := probes.Open(opts)
	if err != nil {
		return nil, err
	}
	return p, nil
}

// run is the command. It returns its exit code, at the latest when ctx is done.
func (e env) run(ctx context.Context, args []string) int {
	cfg, err := parse(args, e.stdout)
	if err != nil {
		fmt.Fprintln(e.stderr, "sockq:", oneLine(err))
		return exitUsage
	}
	if cfg == nil { // --help or --version
		return exitOK
	}
	if cfg.check != nil {
		err = e.check(cfg)
	} else {
		err = e.serve(ctx, cfg)
	}
	if err != nil {
		fmt.Fprintln(e.stderr, "sockq:", oneLine(err))
		return exitEnvironment
	}
	return exitOK
}

// serve runs the probes and the web server until ctx is done or one of them fails.
func (e env) serve(ctx context.Context, cfg *config) error {
	cfg.log.Writer = e.stderr
	logger := promslog.New(&cfg.log)
	cfg.probes.Logger = logger

	// A port that is taken should be said before anything is attached.
	listeners, err := listen(cfg.web)
	if err != nil {
		return err
	}
	defer closeAll(listeners)
	n, err := e.open(cfg.probes)
	if err != nil {
		return fmt.Errorf("start the probes: %w", err)
	}
	dropRights(e.own, cfg.needs(n), logger)

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ended := make(chan error, 2)
	go func() { ended <- explain("run the probes", n.Run(ctx)) }()
	away := new(turnedAway)
	servers := newServers(newHandler(n, cfg, away, logger), listeners, away, logger)
	go func() { ended <- explain("serve", serveWeb(servers, listeners, cfg.web, logger)) }()
	announce(logger, cfg, listeners, n)

	running := 2
	select {
	case <-ctx.Done():
	case err = <-ended:
		running--
		if ctx.Err() != nil { // both at once: the end was asked for
			err = nil
		}
	}
	cancel()
	stopServers(servers)
	timeout := time.After(stopTimeout)
	for ; running > 0; running-- {
		select {
		case why := <-ended: // as it was told to
			logger.Debug("Ended", "why", why)
		case <-timeout:
			// The kernel detaches everything when the process is gone.
			return errors.Join(err, errors.New("the probes did not stop in time"))
		}
	}
	return errors.Join(err, explainClose(n.Close()))
}

func explainClose(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("close the probes: %w", err)
}

// explain turns the end of what should not end by itself into an error.
func explain(what string, err error) error {
	if err == nil {
		return fmt.Errorf("%s: ended unexpectedly", what)
	}
	return fmt.Errorf("%s: %w", what, err)
}

func oneLine(err error) string { return strings.Join(strings.Fields(err.Error()), " ") }
