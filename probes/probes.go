// Package probes is the waist of sockq: it runs the probes, joins what they
// see and hands out the node at one instant as a Snapshot.
package probes

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"sockq/probes/census"
	"sockq/probes/netns"
	"sockq/probes/owner"
	"sockq/probes/tracker"
)

// Options say what to open and how much of it to keep.
type Options struct {
	Logger           *slog.Logger
	CensusInterval   time.Duration // default 5 s
	ListenerInterval time.Duration // default 100 ms
	MaxListeners     int           // default 1,000 sets of sockets
	MaxNamespaces    int           // default 300
	MaxSockets       int           // whose times are measured, as tracker.Options.Sockets
	MaxProcesses     int           // default 200 names of processes
	Collapse         Collapse      // which listeners of a process share one series
	// NoOwners does not look whom sockets belong to. Owners says where the names of
	// pods come from; ProcFS and Logger are those above.
	NoOwners bool
	Owners   owner.Options
	// AuditBudget is the share of one CPU that audits may use, 0 for none;
	// negative for DefaultAuditBudget.
	AuditBudget float64
	BPFStats    bool   // count runs and run time of all BPF programs of the node
	ProcFS      string // default /proc
	SysFS       string // default /sys
	NetnsPath   string // default /run/netns
	// NoSyscalls leaves out what is read when system calls return, which slows
	// all system calls of the node by some nanoseconds: accepts, requested
	// backlogs, connects without a route.
	NoSyscalls bool
	// NoStateSeconds does not measure the time in each state.
	NoStateSeconds bool
	// StatesPerNamespace measures it for each namespace.
	StatesPerNamespace bool
	// Mechanism forces a source of the census; "" chooses the best.
	Mechanism census.Mechanism

	verdictWindow time.Duration // default a minute
}

// DefaultAuditBudget is half a thousandth of a CPU: 30 ms a minute.
const DefaultAuditBudget = 0.0005

func (o *Options) setDefaults() {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	o.CensusInterval = cmp.Or(o.CensusInterval, 5*time.Second)
	o.ListenerInterval = cmp.Or(o.ListenerInterval, 100*time.Millisecond)
	o.verdictWindow = cmp.Or(o.verdictWindow, verdictWindow)
	o.MaxListeners = cmp.Or(o.MaxListeners, 1000)
	o.MaxNamespaces = cmp.Or(o.MaxNamespaces, 300)
	o.MaxProcesses = cmp.Or(o.MaxProcesses, 200)
	o.ProcFS = cmp.Or(o.ProcFS, "/proc")
	o.SysFS = cmp.Or(o.SysFS, "/sys")
	o.NetnsPath = cmp.Or(o.NetnsPath, "/run/netns")
	if o.AuditBudget < 0 {
		o.AuditBudget = DefaultAuditBudget
	}
}

// Names of sources in Snapshot.Sources.
const (
	SourceSockets    = "sockets"
	SourceListeners  = "listeners"
	SourceNamespaces = "namespaces"
	SourceNames      = "names"
	SourceTracker    = "tracker"
	SourceAudit      = "audit"
	SourceRefusals   = "audit_refusals"
	SourceOwners     = "owners"
)

var errClosed = errors.New("the probes are closed")

// Probes are the running probes of the node.
type Probes struct {
	opts   Options
	log    *slog.Logger
	kernel Kernel
	source census.Source
	// The source is one of these two.
	walk     *census.Walk
	sockDiag *census.SockDiag
	names    *netns.Names
	auditor  *auditor        // nil for none
	refusals *refusalAuditor // the same
	owners   *owners         // the same
	wake     chan struct{}   // a listener waits for its owner to be found
	tracked  *tracked        // the same
	stats    io.Closer

	fixed []Probe // what was decided at the start

	namespaces sync.Mutex // one reader of source.Namespaces
	registry   *registry
	listeners  sync.Mutex // one reader of source.Listeners, and the ledger
	ledger     *ledger
	processes  processes
	closed     bool // changed under both

	mu         sync.Mutex // what follows
	counted    map[identity]census.NamespaceSockets
	countedAt  time.Time // when it began
	gaveUp     []census.GaveUp
	boundKnown bool
	sources    map[string]*SourceStatus
}

// Open starts the probes. It fails only where not even sock_diag works; what
// else is missing is named in Snapshot.Probes and logged.
func Open(opts Options) (_ *Probes, err error) {
	opts.setDefaults()
	p := &Probes{opts: opts, log: opts.Logger, sources: make(map[string]*SourceStatus), wake: make(chan struct{}, 1)}
	defer func() {
		if err != nil {
			p.Close()
		}
	}()
	var uname unix.Utsname
	if err := unix.Uname(&uname); err != nil {
		return nil, fmt.Errorf("read kernel release: %w", err)
	}
	p.kernel.Release = unix.ByteSliceToString(uname.Release[:])
	p.names = netns.NewNames(opts.ProcFS, opts.NetnsPath)
	// The tracker first, so that what changes between the two is not missed.
	untracked := p.openTracker()
	if err := p.openSource(untracked); err != nil {
		return nil, err
	}
	if untracked != nil && p.walk != nil { // else it was said
		p.log.Warn("No events are tracked: no transitions, arrivals, accepts, connects", "reason", untracked)
	}
	p.openAudit()
	if err := p.openOwners(); err != nil {
		return nil, err
	}
	if opts.BPFStats && p.usesBPF() {
		if p.stats, err = ebpf.EnableStats(unix.BPF_STATS_RUN_TIME); err != nil {
			return nil, fmt.Errorf("count runs of BPF programs (--bpf-stats needs CAP_SYS_ADMIN): %w", err)
		}
	}
	p.registry = newRegistry(opts.MaxNamespaces, p.names)
	p.processes = processes{max: opts.MaxProcesses, own: make(map[processLabels]time.Time)}
	p.ledger = newLedger(opts.ListenerInterval, opts.MaxListeners)
	p.ledger.collapse = opts.Collapse
	if p.owners != nil {
		p.ledger.owner = p.owners.find
	}
	p.ledger.name, p.ledger.synBound, p.ledger.exists = p.registry.name, p.registry.synBound, p.registry.knows
	p.ledger.namespace, p.ledger.window = p.registry.namespace, opts.verdictWindow
	if p.tracked != nil {
		p.ledger.knows = p.tracked.ofListeners()
	}
	if p.walk == nil && p.ledger.knows.accepts && !p.ledger.knows.allAccepts {
		// What sock_diag says of the queues may be a second old.
		p.ledger.knows.accepts = false
		i := slices.IndexFunc(p.fixed, func(p Probe) bool { return p.Name == tracker.StoryAccepts })
		p.fixed[i] = Probe{Name: tracker.StoryAccepts, Mechanism: "none", Reason: "needs the BPF walk: without it nobody could tell that accepts go by unseen (io_uring)"}
	}
	if err := p.readNamespaces(true); err != nil {
		return nil, err
	}
	if err := p.sample(true); err != nil {
		return nil, err
	}
	if p.owners != nil { // series begin when their owners are known
		_ = p.readOwners(context.Background())
		if err := p.sample(true); err != nil {
			return nil, err
		}
	}
	debug.FreeOSMemory() // what it took to load the programs
	return p, nil
}

// The tracker gives places as namespaces come; some are for those that are gone
// and not forgotten yet, so that none with a name of its own finds no place.
const spareNamespaces = 64

// openTracker returns why nothing is tracked.
func (p *Probes) openTracker() error {
	tier, err := tracker.FindTier(p.opts.SysFS)
	p.kernel.Tier = string(tier)
	if err == nil {
		p.tracked, err = openTracked(tracker.Options{
			SysFS: p.opts.SysFS, Listeners: 2 * p.opts.MaxListeners, Namespaces: p.opts.MaxNamespaces + spareNamespaces,
			Sockets:  p.opts.MaxSockets,
			Syscalls: !p.opts.NoSyscalls, StateSeconds: !p.opts.NoStateSeconds, PerNamespace: p.opts.StatesPerNamespace,
		})
	}
	if err != nil {
		err = census.Explain("load the event tracker", err)
		for _, name := range tracker.StoryNames {
			p.missing(name, err)
		}
		return err
	}
	for _, story := range p.tracked.tracker.Stories() {
		p.fixed = append(p.fixed, Probe{Name: story.Name, Mechanism: story.Mechanism, Attached: story.Told(), Reason: story.Reason})
	}
	return nil
}

// openSource has the reason why nothing is tracked, nil if events are.
func (p *Probes) openSource(untracked error) error {
	var refused error
	if p.opts.Mechanism != census.MechanismSockDiag {
		walk, err := census.OpenWalk(p.opts.ProcFS)
		if err == nil {
			p.walk, p.source = walk, walk
			p.attached("sockets", walk.Mechanism())
			p.attached("listeners", walk.Mechanism())
			p.attached("namespaces", walk.Mechanism())
			if err := walk.BoundError(); err != nil {
				p.missing("bound", err)
			} else {
				p.attached("bound", walk.Mechanism())
			}
			return nil
		}
		if p.opts.Mechanism == census.MechanismWalk {
			return err
		}
		refused = err
		if untracked == nil {
			p.log.Warn("Sockets are counted by sock_diag and not by BPF: without SYN queues and at a higher cost", "reason", err)
		} else {
			p.log.Warn("BPF cannot be used: sock_diag only, without events and SYN queues and at a higher cost",
				"reason", errors.Join(untracked, err)) // which may be an old kernel
		}
	}
	sd, err := census.OpenSockDiag(p.opts.ProcFS, p.names.Find)
	if err != nil {
		return errors.Join(err, refused)
	}
	p.source, p.sockDiag = sd, sd
	for _, name := range []string{"sockets", "listeners", "namespaces"} {
		p.attached(name, sd.Mechanism())
	}
	if sd.Bound() {
		p.attached("bound", sd.Mechanism())
	} else {
		p.missing("bound", errors.New("needs kernel 6.8 or newer, or BPF on 6.4 or newer"))
	}
	if refused == nil {
		refused = errors.New("the sock_diag source was asked for")
	}
	p.missing("syn_queue", refused)
	return nil
}

func (p *Probes) attached(name string, mechanism census.Mechanism) {
	p.fixed = append(p.fixed, Probe{Name: name, Mechanism: string(mechanism), Attached: true})
}

func (p *Probes) missing(name string, reason error) {
	p.fixed = append(p.fixed, Probe{Name: name, Mechanism: "none", Reason: reason.Error()})
}

func (p *Probes) openAudit() {
	if p.opts.AuditBudget == 0 {
		p.missing("audit", errors.New("turned off"))
		return
	}
	if p.tracked != nil && p.tracked.refused {
		p.refusals = newRefusalAuditor(p.kernelRefusals, p.trackedRefusals)
	}
	if p.walk == nil {
		p.statesUnaudited(errors.New("the census itself is sock_diag's"))
		return
	}
	count := func(ctx context.Context) (*census.Sockets, error) { return p.walk.States(ctx, true) }
	auditor, err := newAuditor(p.opts.AuditBudget, count, p.names.Find)
	if err != nil {
		p.log.Warn("States are not audited", "reason", err)
		p.statesUnaudited(err)
		return
	}
	p.auditor = auditor
	p.attached("audit", census.MechanismSockDiag)
}

// statesUnaudited says why states are not audited.
func (p *Probes) statesUnaudited(reason error) {
	if p.refusals == nil {
		p.missing("audit", reason)
		return
	}
	p.fixed = append(p.fixed, Probe{
		Name: "audit", Mechanism: string(p.source.Mechanism()), Attached: true, Reason: "refusals only: " + reason.Error(),
	})
}

// Run takes a census and listener samples at their intervals until ctx is done.
// It returns nil then.
func (p *Probes) Run(ctx context.Context) error {
	var running sync.WaitGroup
	running.Go(func() {
		pace(ctx, p.opts.ListenerInterval, func() { _ = p.sample(false) })
	})
	running.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-p.wake:
				_ = p.readOwners(ctx)
			}
		}
	})
	running.Go(func() {
		taken := 0
		var next time.Time
		takeCensus := func() {
			_ = p.readOwners(ctx) // which has a pace of its own
			start := time.Now()
			if start.Before(next) {
				return
			}
			_ = p.readNamespaces(true)
			_ = p.sample(true)
			p.observe()
			_ = p.sweep()
			_ = p.takeCensus(ctx)
			_ = p.auditRefusals()
			if p.walk == nil {
				// A dump for each namespace may take long: a fifth of a CPU at most.
				next = start.Add(5 * time.Since(start))
			}
			if taken++; p.auditor != nil && taken%auditEvery == 1 {
				_ = p.audit(ctx)
			}
		}
		takeCensus()
		every(ctx, p.opts.CensusInterval, takeCensus)
	})
	running.Wait()
	return nil
}

// every calls fn at an interval; a tick that comes while fn runs is dropped.
func every(ctx context.Context, interval time.Duration, fn func()) {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			fn()
		}
	}
}

// pace is every for short intervals, on a thread of its own that sleeps in the
// kernel: each tick of a time.Ticker wakes several of the runtime's threads, a
// quarter of what the agent costs when nothing happens.
func pace(ctx context.Context, interval time.Duration, fn func()) {
	const nap = 200 * time.Millisecond // so that it ends soon after ctx
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for next := time.Now().Add(interval); ; next = next.Add(interval) {
		for rest := time.Until(next); rest > 0; rest = time.Until(next) {
			if ctx.Err() != nil {
				return
			}
			sleep := unix.NsecToTimespec(int64(min(rest, nap)))
			_ = unix.Nanosleep(&sleep, nil)
		}
		if ctx.Err() != nil {
			return
		}
		fn()
		if now := time.Now(); now.After(next.Add(interval)) {
			next = now // late: what was missed is not made up for
		}
	}
}

// read runs one read of a source and keeps how it went. A failure is logged when
// it begins and when it ends.
func (p *Probes) read(name string, fn func() error) error {
	start := time.Now()
	err := fn()
	p.mu.Lock()
	defer p.mu.Unlock()
	s, ok := p.sources[name]
	if !ok {
		s = &SourceStatus{Name: name, Up: true}
		p.sources[name] = s
	}
	switch {
	case errors.Is(err, context.Canceled): // the end was asked for
	case err != nil && s.Up:
		p.log.Error("Source failed", "source", name, "err", err)
	case err == nil && !s.Up:
		p.log.Info("Source works again", "source", name)
	}
	s.Duration = time.Since(start)
	s.Up, s.Error = err == nil, ""
	if err != nil {
		s.Error = err.Error()
	} else {
		s.LastSuccess = time.Now()
	}
	return err
}

// readNamespaces reads the list of namespaces and, if refresh says so or one is
// new, their names. Without names namespaces go by their inodes.
func (p *Probes) readNamespaces(refresh bool) error {
	if refresh {
		_ = p.read(SourceNames, p.names.Refresh)
	}
	return p.read(SourceNamespaces, func() error {
		p.namespaces.Lock()
		defer p.namespaces.Unlock()
		if p.closed {
			return errClosed
		}
		list, err := p.source.Namespaces()
		if err != nil {
			return err
		}
		if renamed := p.registry.update(list, refresh); len(renamed) > 0 {
			p.listeners.Lock()
			defer p.listeners.Unlock()
			for _, id := range renamed {
				p.ledger.renamed(id.inode, id.cookie)
			}
		}
		return nil
	})
}

// sample reads all listeners into the ledger, and what the tracker counted at them
// if events says so.
func (p *Probes) sample(events bool) error {
	return p.read(SourceListeners, func() error {
		strangers, err := p.addSample(false, events)
		if err != nil || !strangers {
			return err
		}
		// Their labels need their namespace's name, and its settings.
		if err := p.readNamespaces(false); err != nil {
			return err
		}
		_, err = p.addSample(true, events)
		return err
	})
}

// addSample reads all listeners and adds them, unless some are of a namespace
// that is not known and it matters.
func (p *Probes) addSample(anyway, events bool) (strangers bool, err error) {
	p.listeners.Lock()
	defer p.listeners.Unlock()
	if p.closed {
		return false, errClosed
	}
	stranger := func(inode uint32, cookie uint64) bool { return !p.registry.knows(inode, cookie) }
	if events = events && p.tracked != nil; events {
		counted, err := p.tracked.listeners(p.registry)
		if err != nil {
			return false, err
		}
		strangers = slices.ContainsFunc(counted, func(l tracker.Listener) bool {
			return stranger(l.Namespace.Inode, l.Namespace.Cookie)
		})
		if !strangers || anyway {
			p.ledger.expect(counted)
		}
	}
	list, err := p.source.Listeners()
	if err != nil {
		return false, err
	}
	strangers = strangers || slices.ContainsFunc(list, func(l census.Listener) bool {
		return stranger(l.Inode, l.NetnsCookie)
	})
	if strangers && !anyway {
		return true, nil
	}
	p.ledger.add(time.Now(), list)
	if p.ledger.unasked {
		select {
		case p.wake <- struct{}{}:
		default: // it is awake
		}
	}
	if events {
		counted, err := p.tracked.listeners(p.registry)
		if err != nil {
			return false, err
		}
		p.ledger.arrive(counted, wallClock())
	}
	return strangers, nil
}

// sweep takes what the tracker keeps of listeners and namespaces that are gone.
func (p *Probes) sweep() error {
	if p.tracked == nil {
		return nil
	}
	return p.read(SourceTracker, func() error {
		p.listeners.Lock()
		defer p.listeners.Unlock()
		if p.closed {
			return errClosed
		}
		clock := wallClock()
		for _, key := range p.ledger.gone() {
			l, ok, err := p.tracked.take(key)
			if err != nil {
				return err
			}
			if ok {
				p.ledger.depart(&l, clock)
			} else {
				delete(p.ledger.arrivals, key)
			}
		}
		return p.tracked.sweep(p.registry)
	})
}

// takeCensus counts all sockets.
func (p *Probes) takeCensus(ctx context.Context) error {
	return p.read(SourceSockets, func() error {
		start := time.Now()
		listed := p.registry.listed()
		sockets, err := p.source.Sockets(ctx)
		if err != nil {
			return err
		}
		counted := make(map[identity]census.NamespaceSockets, len(listed))
		if p.walk != nil { // it sees all: one in which it met no socket has none
			for _, id := range listed {
				counted[id] = census.NamespaceSockets{}
			}
		}
		for _, n := range sockets.Namespaces {
			counted[identity{n.Inode, n.Cookie}] = n
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		p.counted, p.boundKnown, p.countedAt = counted, sockets.BoundKnown, start
		p.gaveUp = append(p.gaveUp[:0], sockets.GaveUp...)
		return nil
	})
}

func (p *Probes) audit(ctx context.Context) error {
	return p.read(SourceAudit, func() error { return p.auditor.round(ctx, time.Now()) })
}

func (p *Probes) auditRefusals() error {
	if p.refusals == nil {
		return nil
	}
	return p.read(SourceRefusals, p.refusals.round)
}

func (p *Probes) kernelRefusals() (kernelRefusals, error) {
	p.namespaces.Lock()
	defer p.namespaces.Unlock()
	if p.closed {
		return kernelRefusals{}, errClosed
	}
	list, err := p.source.Namespaces()
	if err != nil {
		return kernelRefusals{}, err
	}
	// sock_diag may find an old namespace late.
	return newKernelRefusals(list, p.walk != nil && p.source.Lost()["namespaces"] == 0), nil
}

func (p *Probes) trackedRefusals() (map[identity]refusals, error) {
	p.listeners.Lock()
	defer p.listeners.Unlock()
	if p.closed {
		return nil, errClosed
	}
	return p.tracked.refusals()
}

// Snapshot reads the listeners and namespaces anew and joins them with the
// last census. It costs O(listeners) and O(namespaces), never O(sockets). A
// source that fails is named in it; the others are there.
func (p *Probes) Snapshot() (*Snapshot, error) {
	_ = p.readNamespaces(false)
	_ = p.sample(true)
	s := &Snapshot{Time: time.Now(), Kernel: p.kernel, Probes: p.probes(), Lost: p.lost()}

	p.listeners.Lock()
	s.Listeners = p.ledger.snapshot()
	s.Lost["listeners_over_cap"] = p.ledger.overCap
	s.Lost["listener_samples"] = p.ledger.lateSamples
	s.Lost["listeners_gone"] = p.ledger.nobodys
	s.Lost["listeners_evicted"] = p.ledger.evicted
	forgiven := p.ledger.forgiven
	p.addOwners(s)
	p.listeners.Unlock()

	p.mu.Lock()
	counted, boundKnown := p.counted, p.boundKnown
	p.mu.Unlock()
	s.Namespaces = p.registry.snapshot(counted, boundKnown)
	p.addProcesses(s)
	p.addTracked(s)
	if p.tracked != nil {
		s.Lost["tracked_accepts"] += forgiven
	}

	p.mu.Lock()
	for _, name := range slices.Sorted(maps.Keys(p.sources)) {
		s.Sources = append(s.Sources, *p.sources[name])
	}
	p.mu.Unlock()
	s.Lost["namespaces_over_cap"] = p.registry.over()
	if p.auditor != nil {
		p.auditor.report(s)
	}
	if p.refusals != nil {
		p.refusals.report(s, p.registry.name)
	}
	return s, nil
}

func (p *Probes) lost() map[string]uint64 {
	lost := p.source.Lost()
	lost["namespaces_unreadable"] = p.names.Unreadable()
	if p.owners != nil {
		maps.Copy(lost, p.owners.lost())
	}
	return lost
}

// probes are the parts of the agent with their run statistics.
func (p *Probes) probes() []Probe {
	probes := slices.Clone(p.fixed)
	for i := range probes {
		probe := &probes[i]
		if probe.Name == "audit" && p.auditor != nil {
			probe.Reason = p.auditor.lacks()
		}
		if probe.Name == probePods && p.owners != nil {
			p.owners.describePods(probe)
		}
		if p.sockDiag != nil && probe.Mechanism == string(census.MechanismSockDiag) && probe.Name != "audit" {
			if err := p.sockDiag.EntryError(); err != nil {
				probe.Reason = "the own namespace only: " + err.Error()
			}
		}
		programs := p.programs(probe.Name)
		probe.MissesKnown = len(programs) > 0
		for _, program := range programs {
			missed, known := p.misses(program)
			probe.MissesKnown = probe.MissesKnown && known
			probe.Misses += missed
			stats, err := program.Stats()
			if err != nil {
				continue
			}
			if stats.RunCount > 0 {
				probe.StatsKnown = true
				probe.Runs += stats.RunCount
				probe.RunTime += stats.Runtime
			}
		}
	}
	return probes
}

// misses of the walk's programs, which we call, there are none to know of.
func (p *Probes) misses(program *ebpf.Program) (missed uint64, known bool) {
	if p.tracked == nil || program.Type() == ebpf.Syscall {
		return 0, false
	}
	missed, err := p.tracked.tracker.Misses(program)
	return missed, err == nil
}

// programs are those of a probe. None after Close.
func (p *Probes) programs(probe string) []*ebpf.Program {
	if probe == probeOwners && p.owners != nil && p.owners.holders != nil {
		return p.owners.holders.Programs()
	}
	if p.walk != nil {
		if programs := p.walk.Programs()[probe]; programs != nil {
			return programs
		}
	}
	if p.tracked != nil {
		return p.tracked.programs(probe)
	}
	return nil
}

// addTracked adds what the tracker counted in namespaces.
func (p *Probes) addTracked(s *Snapshot) {
	if p.tracked == nil {
		return
	}
	_ = p.read(SourceTracker, func() error {
		p.listeners.Lock()
		defer p.listeners.Unlock()
		if p.closed {
			return errClosed
		}
		return p.tracked.add(s, p.registry)
	})
}

// Ready tells whether the first census was taken.
func (p *Probes) Ready() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.counted != nil
}

// Close detaches everything. Run must have returned; a Snapshot after it shows
// what was known before.
func (p *Probes) Close() error {
	p.namespaces.Lock()
	defer p.namespaces.Unlock()
	p.listeners.Lock()
	defer p.listeners.Unlock()
	p.closed = true
	var err error
	if p.stats != nil {
		err = p.stats.Close()
	}
	if p.tracked != nil {
		err = errors.Join(err, p.tracked.tracker.Close())
	}
	if p.owners != nil {
		err = errors.Join(err, p.owners.close())
	}
	if p.source != nil {
		err = errors.Join(err, p.source.Close())
	}
	return err
}
