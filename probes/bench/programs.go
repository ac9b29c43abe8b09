package main

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// program is what the kernel's run statistics say of a BPF program.
type program struct {
	*ebpf.Program
	name string
	last *ebpf.ProgramStats
	runs samples // a connection
	ns   samples // a run, 0 in rounds without one
}

// programIDs are the BPF programs that processes hold, by their descriptors.
func programIDs(pids ...int) (map[ebpf.ProgramID]bool, error) {
	found := make(map[ebpf.ProgramID]bool)
	for _, pid := range pids {
		dir := fmt.Sprintf("/proc/%d/fdinfo/", pid)
		files, err := os.ReadDir(dir)
		if err != nil {
			return nil, err
		}
		for _, file := range files {
			info, err := os.ReadFile(dir + file.Name())
			if err != nil { // closed meanwhile
				continue
			}
			for line := range strings.Lines(string(info)) {
				if id, ok := strings.CutPrefix(line, "prog_id:"); ok {
					n, err := strconv.ParseUint(strings.TrimSpace(id), 10, 32)
					if err != nil {
						return nil, err
					}
					found[ebpf.ProgramID(n)] = true
				}
			}
		}
	}
	return found, nil
}

// ownPrograms are those of this process and of the namespace's.
func (n *namespace) ownPrograms() (map[ebpf.ProgramID]bool, error) {
	pids := []int{os.Getpid()}
	for _, cmd := range n.held {
		pids = append(pids, cmd.Process.Pid)
	}
	return programIDs(pids...)
}

// strangers are the names of other programs that look at events, or could: what
// they cost is in all that is measured.
func (n *namespace) strangers() (map[string]bool, error) {
	own, err := n.ownPrograms()
	if err != nil {
		return nil, err
	}
	names := make(map[string]bool)
	for id := ebpf.ProgramID(0); ; {
		if id, err = ebpf.ProgramGetNextID(id); err != nil {
			if errors.Is(err, os.ErrNotExist) {
				err = nil
			}
			return names, err
		}
		if own[id] {
			continue
		}
		p, err := ebpf.NewProgramFromID(id)
		if err != nil { // gone
			continue
		}
		info, err := p.Info()
		if err == nil && slices.Contains(eventTypes, p.Type()) {
			names["`"+info.Name+"`"] = true
		}
		p.Close()
	}
}

var eventTypes = []ebpf.ProgramType{ebpf.Tracing, ebpf.RawTracepoint, ebpf.RawTracepointWritable, ebpf.TracePoint, ebpf.Kprobe}

// openPrograms opens the own ones.
func (n *namespace) openPrograms() (programs []*program, err error) {
	ids, err := n.ownPrograms()
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			closePrograms(programs)
		}
	}()
	for _, id := range slices.Sorted(maps.Keys(ids)) {
		p, err := ebpf.NewProgramFromID(id)
		if err != nil {
			return programs, err
		}
		programs = append(programs, &program{Program: p})
		info, err := p.Info()
		if err != nil {
			return programs, err
		}
		programs[len(programs)-1].name = info.Name
	}
	return programs, nil
}

func closePrograms(programs []*program) {
	for _, p := range programs {
		p.Close()
	}
}

// read notes the runs since the last time.
func (p *program) read(count int) error {
	now, err := p.Stats()
	if err != nil {
		return err
	}
	if p.last != nil {
		runs, ns := float64(now.RunCount-p.last.RunCount), 0.
		if runs > 0 {
			ns = float64(now.Runtime-p.last.Runtime) / runs
		}
		p.runs, p.ns = append(p.runs, runs/float64(count)), append(p.ns, ns)
	}
	p.last = now
	return nil
}

// programs returns the run statistics of what an attachment brings and of an
// empty program beside it, over some batches of work.
func (b *bench) programs(w *work, a *attachment, empty *emptyPrograms) (used []*program, none *program, err error) {
	progress("measuring: programs of %s", a.name)
	detachEmpty, err := empty.attach()
	if err != nil {
		return nil, nil, err
	}
	defer func() { err = errors.Join(err, detachEmpty()) }()
	detach, err := a.attach()
	if err != nil {
		return nil, nil, err
	}
	defer func() { err = errors.Join(err, detach()) }()
	statistics, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
	if err != nil {
		return nil, nil, fmt.Errorf("enable run statistics: %w", err)
	}
	defer statistics.Close()
	programs, err := w.n.openPrograms()
	if err != nil {
		return nil, nil, err
	}
	defer closePrograms(programs)
	for round := range 2*b.rounds + 1 {
		if round > 0 {
			if _, err := b.batch(w); err != nil {
				return nil, nil, err
			}
		}
		for _, p := range programs {
			if err := p.read(w.count + w.warm()); err != nil {
				return nil, nil, err
			}
		}
	}
	const seldom = 0.01 // a connection: somebody else's
	for _, p := range programs {
		switch {
		case p.runs.median() < seldom:
		case p.name == emptyName:
			none = p
		default:
			used = append(used, p)
		}
	}
	if none == nil {
		return nil, nil, errors.New("the empty program did not run")
	}
	return used, none, nil
}

// above is what a run of the program costs: its time above that of the empty
// one, which has the clock's own time in it too, and what an empty one costs.
func (p *program) above(none *program, floor float64) samples {
	cost := make(samples, len(p.ns))
	for i := range cost {
		cost[i] = p.ns[i] - none.ns[i] + floor
	}
	return cost
}

// together is what the programs cost a connection, in nanoseconds.
func together(programs []*program, none *program, floor float64) samples {
	total := make(samples, len(none.ns))
	for _, p := range programs {
		for i, cost := range p.above(none, floor) {
			total[i] += cost * p.runs[i]
		}
	}
	return total
}
