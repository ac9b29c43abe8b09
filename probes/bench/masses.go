package main

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"sockq/probes"
	"sockq/probes/census"
	"sockq/probes/sockdiag"
)

//go:embed peer/sockdiag.c
var peerSource []byte

// The names by which targets refer to methods.
const (
	nameSS           = "`ss -tn state all`"
	nameNodeExporter = "node_exporter's tcpstat"
	namePeer         = "sock_diag dump in C"
	nameSSListening  = "`ss -ltn`"
)

// masses measures what grows with the number of sockets.
func (b *bench) masses() error {
	n, err := b.populate(b.fewListeners, b.small)
	if err != nil {
		return err
	}
	defer func() { b.vanish(n) }()
	p := b.openPeers(n)
	defer p.close()

	if err := b.census(n, p, b.small, false); err != nil {
		return err
	}
	if err := b.audit(n, b.small); err != nil {
		return err
	}
	if err := b.holders(n, b.small); err != nil {
		return err
	}
	progress("making %s sockets", count(b.large))
	if err := n.connect(b.ctx, (b.large-b.small)/2); err != nil {
		return err
	}
	if err := b.census(n, p, b.large, true); err != nil {
		return err
	}
	p.stopNodeExporter(b)
	if err := b.resident(n); err != nil {
		return err
	}
	if err := b.listeners(n, b.fewListeners, 0.1); err != nil {
		return err
	}
	if err := n.listen(b.ctx, b.manyListeners-b.fewListeners); err != nil {
		return err
	}
	return b.listeners(n, b.manyListeners, 1)
}

// peers are what the census is compared with, nil where this machine has none.
type peers struct {
	n            *namespace
	c            string // a program
	iterator     *iterator
	nodeExporter *server
}

func (b *bench) openPeers(n *namespace) *peers {
	p := &peers{n: n}
	var err error
	if p.c, err = b.compilePeer(); err != nil {
		b.leaveOut(namePeer, err)
	}
	if p.iterator, err = openIterator(); err != nil {
		b.leaveOut("iter/tcp", err)
	}
	if p.nodeExporter, err = startNodeExporter(b.ctx, n); err != nil {
		b.leaveOut(nameNodeExporter, err)
	}
	return p
}

func (p *peers) close() {
	if p.iterator != nil {
		p.iterator.close()
	}
	if p.nodeExporter != nil {
		p.nodeExporter.stop()
	}
}

func (p *peers) stopNodeExporter(b *bench) {
	if p.nodeExporter == nil {
		return
	}
	if peak, err := memory(p.nodeExporter.pid(), "VmHWM"); err == nil {
		b.add(row{what: "Memory beside " + count(b.large) + " sockets", method: nameNodeExporter, cost: megabytes(peak) + " at most"})
	}
	p.nodeExporter.stop()
	p.nodeExporter = nil
}

func (b *bench) compilePeer() (string, error) {
	source, program := filepath.Join(b.dir, "sockdiag.c"), filepath.Join(b.dir, "sockdiag")
	if err := os.WriteFile(source, peerSource, 0o600); err != nil {
		return "", err
	}
	out, err := exec.CommandContext(b.ctx, "gcc", "-O2", "-o", program, source).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("compile with gcc: %w: %s", err, bytes.TrimSpace(out))
	}
	return program, nil
}

func startNodeExporter(ctx context.Context, n *namespace) (*server, error) {
	var program string
	for _, name := range []string{"prometheus-node-exporter", "node_exporter"} {
		if path, err := exec.LookPath(name); err == nil {
			program = path
			break
		}
	}
	if program == "" {
		return nil, errors.New("not installed")
	}
	const address = serverAddress + "9100"
	return startServer(ctx, n, address, "/", program, "--collector.disable-defaults", "--collector.tcpstat", "--web.listen-address="+address)
}

// command is a run of a program inside, for its CPU time. What it prints is
// thrown away: ss writes all the same.
func (b *bench) command(n *namespace, name string, args ...string) func() (time.Duration, error) {
	return func() (took time.Duration, err error) {
		cmd := exec.CommandContext(b.ctx, name, args...)
		cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
		err = n.do(func() (err error) {
			took, err = commandTime(cmd)
			return err
		})
		return took, err
	}
}

// counted is a census by one of our sources, run inside.
func (b *bench) counted(n *namespace, sockets int, read func(context.Context) (*census.Sockets, error)) func() (time.Duration, error) {
	return n.timed(func() error {
		result, err := read(b.ctx)
		if err != nil {
			return err
		}
		found := uint64(0)
		for i := range result.Namespaces {
			if result.Namespaces[i].Inode == n.inode {
				found = sum(&result.Namespaces[i])
			}
		}
		return atLeast(found, sockets)
	})
}

func (b *bench) states(ctx context.Context) (*census.Sockets, error) {
	return b.walk.States(ctx, false)
}

func openSockDiag(n *namespace) (sd *census.SockDiag, err error) {
	err = n.do(func() (err error) {
		sd, err = census.OpenSockDiag("/proc", none)
		return err
	})
	return sd, err
}

func (b *bench) census(n *namespace, p *peers, sockets int, judged bool) error {
	sd, err := openSockDiag(n)
	if err != nil {
		return err
	}
	defer sd.Close()
	ss := &method{name: nameSS, run: b.command(n, "ss", "-tn", "state", "all")}
	walk := &method{name: "**walk**: states, Recv-Q, Send-Q, bound", run: b.counted(n, sockets, b.walk.Sockets)}
	states := &method{name: "**walk**, states only", run: b.counted(n, sockets, b.states)}
	fallback := &method{name: "**sock_diag fallback**", run: b.counted(n, sockets, sd.Sockets)}
	g := &group{
		what:     "Census of " + count(sockets) + " sockets",
		baseline: nameSS,
		methods:  []*method{ss, walk, states, fallback},
	}
	if p.c != "" {
		g.methods = append(g.methods, &method{name: namePeer, run: b.command(n, p.c)})
	}
	if p.iterator != nil {
		g.methods = append(g.methods, &method{name: "iter/tcp, states only", run: n.timed(func() error {
			found, err := p.iterator.count()
			if err != nil {
				return err
			}
			return atLeast(found, sockets)
		})})
	}
	if p.nodeExporter != nil {
		g.methods = append(g.methods, &method{name: nameNodeExporter, run: p.nodeExporter.scrapeTime})
	}
	if judged {
		walk.targets = []target{
			{text: "≥ 6×", against: nameSS, least: 6},
			{text: "≥ 7× cheaper than node_exporter", against: nameNodeExporter, least: 7},
		}
		states.targets = []target{{text: "≥ 15×", against: nameSS, least: 15}}
		fallback.targets = []target{
			{text: "≥ 2×", against: nameSS, least: 2},
			{text: "≤ 1.15× the cost of C", against: namePeer, most: 1.15},
		}
	}
	return b.measure(g)
}

// audit measures one audit as probes makes it: two dumps around a walk.
func (b *bench) audit(n *namespace, sockets int) error {
	m := &method{name: "two dumps and a walk", run: n.timed(func() error {
		client, err := sockdiag.Dial()
		if err != nil {
			return err
		}
		defer client.Close()
		dump := func() error {
			found := uint64(0)
			if err := client.Dump(sockdiag.Query{}, func(*sockdiag.Socket) error { found++; return nil }); err != nil {
				return err
			}
			return atLeast(found, sockets)
		}
		if err := dump(); err != nil {
			return err
		}
		if _, err := b.walk.States(b.ctx, true); err != nil {
			return err
		}
		return dump()
	})}
	if err := b.measure(&group{what: "Audit of a namespace with " + count(sockets) + " sockets", methods: []*method{m}}); err != nil {
		return err
	}
	every := time.Duration(m.ms.median() / probes.DefaultAuditBudget * float64(time.Millisecond))
	b.notes = append(b.notes, fmt.Sprintf("The default budget of audits, %s of a CPU, lets one of a namespace with %s sockets take place every %v.",
		number(probes.DefaultAuditBudget*100)+" %", count(sockets), every.Round(time.Second)))
	return nil
}

func (b *bench) listeners(n *namespace, listeners int, most float64) error {
	sd, err := openSockDiag(n)
	if err != nil {
		return err
	}
	defer sd.Close()
	// What is too short to be measured once is done some times in a row.
	const times = 20
	read := func(read func() ([]census.Listener, error)) func() (time.Duration, error) {
		all := n.timed(func() error {
			for range times {
				list, err := read()
				if err != nil {
					return err
				}
				if err := atLeast(uint64(len(list)), listeners); err != nil {
					return err
				}
			}
			return nil
		})
		return func() (time.Duration, error) {
			took, err := all()
			return took / times, err
		}
	}
	return b.measure(&group{
		what:     count(listeners) + " listeners beside " + count(b.large) + " sockets",
		baseline: nameSSListening,
		methods: []*method{
			{name: nameSSListening, run: b.command(n, "ss", "-ltn")},
			{name: "**walk**, with SYN queues", run: read(b.walk.Listeners), targets: []target{
				{text: "≤ " + strconv.FormatFloat(most, 'g', -1, 64) + " ms", most: most},
				{text: "≥ 300×", against: nameSSListening, least: 300},
			}},
			{name: "**sock_diag fallback**", run: read(sd.Listeners)},
		},
	})
}
