package main

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"sockq/probes/tracker"
)

// The names of attachments.
const (
	nameNothing     = "nothing attached"
	nameAgain       = "nothing attached, measured like the following"
	nameEmpty       = "empty program at each transition"
	nameTransitions = "**tracker**, transitions only"
	nameQuiet       = "**tracker**, without system calls"
	nameTracker     = "**tracker**"
	nameTimed       = "**tracker**, with time in state"
)

// The targets.
const (
	mostShare      = 3.0  // per cent of a bare connection's CPU time
	mostShareTimed = 8.0  // with time in state
	mostTransition = 40.0 // nanoseconds
)

// attachments are all that is compared.
type attachments struct {
	empty             *emptyPrograms
	transitionProgram string // name of the tracker's

	nothing, none, transitions, quiet, tracker, timed *attachment
	tcpstates                                         *attachment // nil where it is not to be had

	closers []func()
}

func (a *attachments) close() {
	for _, c := range a.closers {
		c()
	}
}

// events measures what it costs to look at each event.
func (b *bench) events() error {
	n, err := newNamespace()
	if err != nil {
		return err
	}
	defer func() { b.vanish(n) }()
	if err := mountTracefs(n); err != nil {
		b.leaveOut("events", err)
		return nil
	}
	c, err := openConnections(n)
	if err != nil {
		return err
	}
	defer c.close()
	a := new(attachments)
	defer a.close()
	if err := b.load(a, c); err != nil {
		return err
	}

	var floor, bare float64 // nanoseconds
	strangers := make(map[string]bool)
	for _, measure := range []func() error{
		func() (err error) { floor, err = b.floor(c, a); return err },
		func() (err error) { bare, err = b.connectionCost(c, a); return err },
		func() error { return b.programCost(c, a, floor, bare) },
		func() error { return b.connectionRate(c, a) },
		func() error { return b.systemCalls(c, a) },
	} {
		if err := measure(); err != nil {
			return err
		}
		found, err := n.strangers()
		if err != nil {
			return err
		}
		maps.Copy(strangers, found)
	}
	if len(strangers) > 0 {
		b.notes = append(b.notes, "Programs of others were loaded meanwhile, and what they cost is in all rows about events: "+
			strings.Join(slices.Sorted(maps.Keys(strangers)), ", ")+".")
	}
	return nil
}

// load loads all that is to be attached.
func (b *bench) load(a *attachments, c *connections) (err error) {
	if a.empty, err = loadEmptyStates(); err != nil {
		return err
	}
	a.closers = append(a.closers, a.empty.close)
	var loaded [3]*tracked
	for i, o := range []tracker.Options{{}, {Syscalls: true}, {Syscalls: true, StateSeconds: true}} {
		if loaded[i], err = loadTracker(o); err != nil {
			return err
		}
		a.closers = append(a.closers, loaded[i].close)
	}
	quiet, usual, timed := loaded[0], loaded[1], loaded[2]
	if len(timed.untold) > 0 {
		b.leaveOut("parts of the tracker", errors.New(strings.Join(timed.untold, ", ")))
	}
	transitions := quiet.only(tracker.StoryTransitions)
	if len(transitions.programs) == 0 {
		return errors.New("the tracker sees no transitions")
	}
	a.transitionProgram = transitions.programs[0].name

	a.nothing = &attachment{name: nameAgain, attach: func() (func() error, error) { return func() error { return nil }, nil }}
	a.none = &attachment{name: nameEmpty, attach: a.empty.attach}
	a.transitions = &attachment{name: nameTransitions, attach: c.n.inside(transitions.attach)}
	a.quiet = &attachment{name: nameQuiet, attach: c.n.inside(quiet.attach)}
	a.tracker = &attachment{name: nameTracker, attach: c.n.inside(usual.attach), most: mostShare}
	a.timed = &attachment{name: nameTimed, attach: c.n.inside(timed.attach), most: mostShareTimed}

	tcpstates := &attachment{name: nameTCPStates, rounds: b.rounds, attach: func() (func() error, error) { return attachTCPStates(b.ctx, c) }}
	detach, err := tcpstates.attach()
	if err != nil {
		b.leaveOut(nameTCPStates, err)
		return nil
	}
	a.tcpstates = tcpstates
	return detach()
}

// floor returns what an empty program costs at a transition in nanoseconds. A
// connection is too long to see it well.
func (b *bench) floor(c *connections, a *attachments) (float64, error) {
	const transitions = 2
	w := &work{n: c.n, what: "transitions", count: 10 * b.eventBatch, do: c.listen}
	all, err := b.differences(w, b.eventRounds, a.nothing, a.none)
	if err != nil {
		return 0, err
	}
	for _, d := range all {
		b.add(row{what: "A transition, of listen() and shutdown()", method: d.name, cost: d.more.in(transitions).quartiles(" ns") + " more"})
	}
	return all[1].more.in(transitions).median(), nil
}

// connectionCost returns the CPU time of a connection that nobody looks at, in
// nanoseconds.
func (b *bench) connectionCost(c *connections, a *attachments) (bare float64, err error) {
	w := &work{n: c.n, what: "connections", count: b.eventBatch, do: c.make}
	all, err := b.differences(w, b.eventRounds, a.nothing, a.none, a.transitions, a.quiet, a.tracker, a.timed, a.tcpstates)
	if err != nil {
		return 0, err
	}
	bare = all[0].bare.median()
	what := fmt.Sprintf("A connection over loopback, %d transitions", transitions)
	b.add(row{what: what, method: nameNothing, cost: all[0].bare.in(microsecond).quartiles(" µs")})
	for _, d := range all {
		r := row{what: what, method: d.name, cost: d.more.in(microsecond).quartiles(" µs") + " more, " + number(d.share().median()) + " %"}
		if d.most > 0 {
			r.verdicts = []verdict{atMost(d.most, " %", d.share())}
		}
		b.add(r)
	}
	return bare, nil
}

const microsecond = float64(time.Microsecond)

func atMost(most float64, unit string, got samples) verdict {
	return verdict{"≤ " + strconv.FormatFloat(most, 'g', -1, 64) + unit, yesNo(got.median() <= most)}
}

// programCost tells what each program costs by the kernel's run statistics. They
// are far more precise than the CPU time of a connection, but miss what the
// tracepoints of system calls cost around their programs: targets for the whole
// refer to CPU time.
func (b *bench) programCost(c *connections, a *attachments, floor, bare float64) error {
	const what = "BPF programs, by run statistics"
	closed := &work{n: c.n, count: b.eventBatch, do: c.make}
	reset := &work{n: c.n, count: b.eventBatch, do: c.reset}
	b.add(row{what: what, method: "empty program, by CPU time", cost: number(floor) + " ns", ratio: "1"})
	seen := make(map[string]bool)
	for _, m := range []struct {
		*attachment
		*work
		sum bool
	}{{a.tracker, closed, true}, {a.tracker, reset, false}, {a.timed, closed, true}, {a.tcpstates, closed, false}} {
		if m.attachment == nil {
			continue
		}
		programs, none, err := b.programs(m.work, m.attachment, a.empty)
		if err != nil {
			return err
		}
		for _, p := range programs {
			timed := m.attachment == a.timed && p.name == a.transitionProgram
			if seen[p.name] && !timed {
				continue
			}
			seen[p.name] = true
			cost := p.above(none, floor)
			r := row{what: what, method: fmt.Sprintf("%s: `%s`, %s a connection", m.name, p.name, number(p.runs.median())), cost: cost.quartiles(" ns"), ratio: number(floor / cost.median())}
			if p.name == a.transitionProgram && !timed {
				r.verdicts = []verdict{atMost(mostTransition, " ns", cost)}
			}
			b.add(r)
		}
		if m.sum {
			sum := together(programs, none, floor)
			share := sum.in(bare / 100)
			b.add(row{what: what, method: m.name + ": all, a connection", cost: sum.in(microsecond).quartiles(" µs") + ", " + number(share.median()) + " %"})
		}
	}
	return nil
}

// connectionRate compares how many connections can be made in a time.
func (b *bench) connectionRate(c *connections, a *attachments) error {
	count := 4 * b.eventBatch
	g := &group{what: fmt.Sprintf("Time to make %s connections", number(float64(count))), baseline: nameTCPStates}
	for _, at := range []*attachment{a.tcpstates, a.tracker, {name: nameNothing, attach: a.nothing.attach}} {
		if at == nil {
			continue
		}
		g.methods = append(g.methods, &method{name: at.name, run: func() (took time.Duration, err error) {
			detach, err := at.attach()
			if err != nil {
				return 0, err
			}
			defer func() { err = errors.Join(err, detach()) }()
			err = c.n.do(func() error {
				start := time.Now()
				err := c.make(count)
				took = time.Since(start)
				return err
			})
			return took, err
		}})
		if at == a.tracker {
			g.methods[len(g.methods)-1].targets = []target{{text: "≥ 8× the rate", against: nameTCPStates, least: 8}}
		}
	}
	return b.measure(g)
}

// systemCalls measures what tracepoints of system calls cost one that nobody
// looks at: the kernel takes a slower path through all of them.
func (b *bench) systemCalls(c *connections, a *attachments) error {
	exits, err := loadEmptyExits("accept", "accept4")
	if err != nil {
		return err
	}
	defer exits.close()
	attachExits := c.n.inside(exits.attach)
	detach, err := attachExits()
	if err != nil {
		b.leaveOut("tracepoints of system calls", err)
		return nil
	}
	if err := detach(); err != nil {
		return err
	}
	w := &work{n: c.n, what: "system calls", count: b.calls, do: func(count int) error {
		for range count {
			_, _, _ = unix.RawSyscall(unix.SYS_GETPPID, 0, 0, 0)
		}
		return nil
	}}
	all, err := b.differences(w, 3*b.rounds, a.nothing,
		&attachment{name: "empty programs at the exits of accept() and accept4()", attach: attachExits}, a.quiet, a.tracker)
	if err != nil {
		return err
	}
	const what = "getppid()"
	b.add(row{what: what, method: nameNothing, cost: all[0].bare.quartiles(" ns")})
	for _, d := range all {
		b.add(row{what: what, method: d.name, cost: d.more.quartiles(" ns") + " more"})
	}
	return nil
}
