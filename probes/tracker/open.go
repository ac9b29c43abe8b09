package tracker

// The objects are committed; CI compiles them again with the same clang and
// fails on a difference.
//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -cc clang-19 -strip llvm-strip-19 -target amd64,arm64 -no-global-types -type namespace_counts -type state_histograms -type event -type slot -type cpu -cflags "-O2 -mcpu=v3 -Wall -Werror -I/usr/include/x86_64-linux-gnu" states bpf/states.bpf.c
//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -cc clang-19 -strip llvm-strip-19 -target amd64,arm64 -no-global-types -type listener_counts -cflags "-O2 -mcpu=v3 -Wall -Werror -I/usr/include/x86_64-linux-gnu" arrivals bpf/arrivals.bpf.c
//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -cc clang-19 -strip llvm-strip-19 -target amd64,arm64 -no-global-types -cflags "-O2 -mcpu=v3 -Wall -Werror -I/usr/include/x86_64-linux-gnu" resets bpf/resets.bpf.c
//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -cc clang-19 -strip llvm-strip-19 -target amd64,arm64 -no-global-types -cflags "-O2 -mcpu=v3 -Wall -Werror -I/usr/include/x86_64-linux-gnu" accepts bpf/accepts.bpf.c
//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -cc clang-19 -strip llvm-strip-19 -target amd64,arm64 -no-global-types -cflags "-O2 -mcpu=v3 -Wall -Werror -I/usr/include/x86_64-linux-gnu" connects bpf/connects.bpf.c
//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -cc clang-19 -strip llvm-strip-19 -target amd64,arm64 -no-global-types -cflags "-O2 -mcpu=v3 -Wall -Werror -I/usr/include/x86_64-linux-gnu" timeWait bpf/timewait.bpf.c
//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -cc clang-19 -strip llvm-strip-19 -target amd64,arm64 -no-global-types -cflags "-O2 -mcpu=v3 -Wall -Werror -I/usr/include/x86_64-linux-gnu" refusals bpf/refusals.bpf.c
//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -cc clang-19 -strip llvm-strip-19 -target amd64,arm64 -no-global-types -cflags "-O2 -mcpu=v3 -Wall -Werror -I/usr/include/x86_64-linux-gnu" halfOpen bpf/halfopen.bpf.c
//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -cc clang-19 -strip llvm-strip-19 -target amd64,arm64 -no-global-types -cflags "-O2 -mcpu=v3 -Wall -Werror -I/usr/include/x86_64-linux-gnu" syscalls bpf/syscalls.bpf.c

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"

	"sockq/probes/tcpstate"
)

// Options say what to track.
type Options struct {
	SysFS      string // default /sys
	Listeners  int    // how many are counted at, from 8,192 (the default) to 65,536
	Namespaces int    // how many have counters of their own, at most 4,000; default 300
	// Sockets is of how many the times are remembered, from 16,384 to 4,194,304,
	// rounded up to a power of two; default 262,144.
	Sockets int
	// Syscalls attaches to the returns of listen(), and of accept() and connect()
	// where there are no trampolines.
	Syscalls bool
	// StateSeconds measures the time in each state, of each namespace if
	// PerNamespace.
	StateSeconds bool
	PerNamespace bool
	// Tier is at most to be used, to try it; by default what the kernel allows.
	Tier Tier
}

// maxNamespaces bounds Options.Namespaces: all have to fit into the map of slots.
const maxNamespaces = 4000

// places are those of a bucket in the table of sockets (PLACES).
const places = 16

// bucketsShift is log2 of how many buckets the table needs for that many sockets.
func bucketsShift(sockets int) int {
	sockets = max(1<<14, min(cmp.Or(sockets, 1<<18), 1<<22))
	return bits.Len(uint((sockets - 1) / places))
}

// The stories that the tracker can tell, as sockq_probe_attached names them.
const (
	StoryTransitions       = "transitions"
	StoryStateSeconds      = "state_seconds"
	StoryConnects          = "connects"
	StoryConnections       = "connections"
	StoryIgnoredACKs       = "ignored_acks"
	StorySynackRetransmits = "synack_retransmits"
	StoryResetsSent        = "resets_sent"
	StoryResetsReceived    = "resets_received"
	StoryAccepts           = "accepts"
	StoryBacklog           = "backlog"
	StoryUnroutable        = "unroutable_connects"
	StoryRefusals          = "refusals"  // what became of each SYN and each final ACK
	StoryHalfOpen          = "half_open" // lives of requests
	StoryTimeWait          = "time_wait" // lives of time-wait mini-sockets
)

// StoryNames are all of them.
var StoryNames = []string{
	StoryTransitions, StoryStateSeconds, StoryConnects, StoryConnections, StoryIgnoredACKs, StorySynackRetransmits,
	StoryResetsSent, StoryResetsReceived, StoryAccepts, StoryBacklog, StoryUnroutable,
	StoryRefusals, StoryHalfOpen, StoryTimeWait,
}

// Story is what a set of programs tells, or why it cannot be told.
type Story struct {
	Name      string
	Mechanism string // "tp_btf", "tracepoint"; "none" where it is not told
	Reason    string // for people; "" where it is told
	Programs  []*ebpf.Program
}

// ErrMissesUnknown is the error where the kernel does not tell what a kprobe or a
// return of a system call missed.
var ErrMissesUnknown = errors.New("needs Linux 6.7 or newer")

// Misses are the events of a program that the kernel did not hand over, because it
// was running on that CPU already (an interrupt or another task came between) or
// since more calls of a function were under way than a kretprobe can follow.
// None is lost of those that another program took over.
func (t *Tracker) Misses(p *ebpf.Program) (uint64, error) {
	if kind := p.Type(); (kind == ebpf.Kprobe || kind == ebpf.TracePoint) && !t.perfMisses {
		return 0, fmt.Errorf("read misses: %w", ErrMissesUnknown)
	}
	stats, err := p.Stats()
	if err != nil {
		return 0, fmt.Errorf("read misses: %w", err)
	}
	missed := stats.RecursionMisses
	if second := t.takenOver[p]; second != nil { // lost is what both missed: no more than either did
		also, err := second.Stats()
		if err != nil {
			return 0, fmt.Errorf("read misses: %w", err)
		}
		missed = min(missed, also.RecursionMisses)
	}
	if attached := t.kprobes[p]; attached != nil {
		info, err := attached.Info()
		if err != nil {
			return 0, fmt.Errorf("read misses: %w", err)
		}
		missed += info.PerfEvent().Kprobe().Missed
	}
	switch {
	case p == t.changedAgain || t.takesOver[p]: // it is the second
		return 0, nil
	case p == t.changed:
		var cpus []statesCpu
		if err := t.maps["cpus"].Lookup(uint32(0), &cpus); err != nil {
			return 0, fmt.Errorf("read what was taken over: %w", err)
		}
		for i := range cpus {
			missed -= min(missed, cpus[i].TakenOver)
		}
	}
	return missed, nil
}

// Told tells whether the story's programs are attached.
func (s *Story) Told() bool { return s.Mechanism != mechanismNone }

const (
	mechanismNone       = "none"
	mechanismTrampoline = "fentry"
	mechanismKprobe     = "kprobe"
	mechanismTPBTF      = "tp_btf"
	mechanismTracepoint = "tracepoint"
)

// Tracker is the attached programs and their maps. Its methods may not run
// beside each other.
type Tracker struct {
	opts    Options
	kernel  *btf.Spec
	maps    map[string]*ebpf.Map
	tier    Tier
	stories []Story
	// What the first misses the second takes over.
	changed, changedAgain *ebpf.Program
	takenOver             map[*ebpf.Program]*ebpf.Program // the same of hooks
	takesOver             map[*ebpf.Program]bool
	kprobes               map[*ebpf.Program]link.Link
	perfMisses            bool        // the kernel tells what programs on perf events miss
	closers               []io.Closer // links, then programs
	reasons               []string    // of RSTs, by number
	cookiesMissing        bool        // from sockets that nobody asked for theirs

	read
}

// Open attaches what this kernel allows, each story on its own. The error says why
// nothing can be attached at all.
func Open(opts Options) (_ *Tracker, err error) {
	opts.SysFS = cmp.Or(opts.SysFS, "/sys")
	opts.Namespaces = max(1, min(cmp.Or(opts.Namespaces, 300), maxNamespaces))
	t := &Tracker{opts: opts, maps: make(map[string]*ebpf.Map), kprobes: make(map[*ebpf.Program]link.Link),
		takenOver: make(map[*ebpf.Program]*ebpf.Program), takesOver: make(map[*ebpf.Program]bool)}
	defer func() {
		if err != nil {
			t.Close()
		}
	}()
	if t.kernel, err = btf.LoadKernelSpec(); err != nil {
		return nil, fmt.Errorf("load kernel type information: needs a kernel with CONFIG_DEBUG_INFO_BTF=y: %w", err)
	}
	if t.tier, err = FindTier(opts.SysFS); err != nil {
		return nil, fmt.Errorf("load a tracing program: %w", err)
	}
	t.tier = max(t.tier, opts.Tier) // A before B before C
	var info *btf.Struct
	t.perfMisses = t.kernel.TypeByName("bpf_link_info", &info) == nil && hasMember(info, "missed")
	var cookies *btf.Func
	t.cookiesMissing = t.kernel.TypeByName("bpf_get_socket_ptr_cookie", &cookies) != nil
	specs, err := t.specs()
	if err != nil {
		return nil, err
	}
	if err := t.newMaps(specs); err != nil {
		return nil, err
	}
	t.attachRefusals(specs.refusals)
	t.attachHalfOpen(specs.halfOpen)
	t.attachTimeWait(specs.timeWait)
	t.attachStates(specs.states)
	t.attachArrivals(specs.arrivals, specs.accepts)
	t.attachResets(specs.resets)
	t.attachSyscalls(specs.syscalls, specs.accepts, specs.connects)
	t.kernel = nil
	// What arrived before accept() was watched would never be accepted.
	if t.keys, t.counts, err = batch(t.maps["listeners"], t.keys, t.counts); err != nil {
		return nil, fmt.Errorf("read listeners: %w", err)
	}
	for _, key := range t.keys {
		if err := t.maps["listeners"].Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return nil, fmt.Errorf("begin to count: %w", err)
		}
	}
	return t, nil
}

type specs struct {
	states, arrivals, resets, syscalls, refusals, halfOpen, timeWait, accepts, connects *ebpf.CollectionSpec
}

func (t *Tracker) specs() (s specs, err error) {
	for _, load := range []struct {
		into **ebpf.CollectionSpec
		from func() (*ebpf.CollectionSpec, error)
	}{{&s.states, loadStates}, {&s.arrivals, loadArrivals}, {&s.resets, loadResets}, {&s.syscalls, loadSyscalls},
		{&s.refusals, loadRefusals}, {&s.halfOpen, loadHalfOpen},
		{&s.timeWait, loadTimeWait}, {&s.accepts, loadAccepts}, {&s.connects, loadConnects}} {
		if *load.into, err = load.from(); err != nil {
			return s, err
		}
	}
	return s, nil
}

// newMaps makes the maps that the programs share.
func (t *Tracker) newMaps(s specs) error {
	var none *btf.Struct
	// Elements of maps that are not allocated beforehand come from an
	// allocator that tracing programs may use since 6.1.
	allocated := t.kernel.TypeByName("bpf_mem_alloc", &none) != nil
	shift := bucketsShift(t.opts.Sockets)
	for _, spec := range []*ebpf.CollectionSpec{s.states, s.arrivals, s.resets, s.syscalls, s.refusals, s.halfOpen, s.timeWait, s.accepts, s.connects} {
		if variable := spec.Variables["sockets_shift"]; variable != nil {
			if err := variable.Set(uint32(32 - shift)); err != nil {
				return fmt.Errorf("set sockets_shift: %w", err)
			}
		}
		for name, m := range spec.Maps {
			if strings.HasPrefix(name, ".") || t.maps[name] != nil {
				continue
			}
			m = m.Copy()
			switch name {
			case "namespaces":
				m.MaxEntries = uint32(t.opts.Namespaces) + 1
			case "free_slots":
				m.MaxEntries = uint32(t.opts.Namespaces)
			case "state_seconds":
				if t.opts.PerNamespace {
					m.MaxEntries = uint32(t.opts.Namespaces) + 1
				}
			case "sockets":
				m.MaxEntries = 1 << shift
			case "listeners":
				m.MaxEntries = uint32(min(max(t.opts.Listeners, 8192), 65536))
				if allocated {
					m.Flags = 0
				}
			}
			made, err := ebpf.NewMap(m)
			if err != nil {
				return fmt.Errorf("make map %s: %w", name, err)
			}
			t.maps[name] = made
		}
	}
	for slot := range uint32(t.opts.Namespaces) {
		if err := t.maps["free_slots"].Put(nil, slot+1); err != nil {
			return fmt.Errorf("fill slots: %w", err)
		}
	}
	return nil
}

// load loads one program of a collection with the shared maps.
func (t *Tracker) load(spec *ebpf.CollectionSpec, name string) (*ebpf.Program, error) {
	loaded, err := t.loadAll(spec, map[string]*ebpf.ProgramSpec{name: spec.Programs[name]})
	return loaded[name], err
}

func (t *Tracker) loadAll(spec *ebpf.CollectionSpec, programs map[string]*ebpf.ProgramSpec) (map[string]*ebpf.Program, error) {
	spec = spec.Copy()
	spec.Programs = programs
	shared := make(map[string]*ebpf.Map)
	for name := range spec.Maps {
		if m := t.maps[name]; m != nil {
			shared[name] = m
			spec.Maps[name].MaxEntries, spec.Maps[name].Flags = m.MaxEntries(), m.Flags()
		}
	}
	collection, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: shared})
	if err != nil {
		return nil, err
	}
	defer collection.Close()
	loaded := make(map[string]*ebpf.Program)
	for name := range programs {
		loaded[name] = collection.DetachProgram(name)
		t.closers = append(t.closers, loaded[name])
	}
	return loaded, nil
}

// attach loads one program and attaches it to the tracepoint of its section.
func (t *Tracker) attach(spec *ebpf.CollectionSpec, name string) (*ebpf.Program, error) {
	program, err := t.load(spec, name)
	if err != nil {
		return nil, err
	}
	attached, err := link.AttachTracing(link.TracingOptions{Program: program})
	if err != nil {
		return nil, err
	}
	t.closers = append(t.closers, attached)
	return program, nil
}

func (t *Tracker) told(story, mechanism string, programs ...*ebpf.Program) {
	t.stories = append(t.stories, Story{Name: story, Mechanism: mechanism, Programs: programs})
}

func (t *Tracker) untold(reason error, stories ...string) {
	for _, story := range stories {
		t.stories = append(t.stories, Story{Name: story, Mechanism: mechanismNone, Reason: reason.Error()})
	}
}

// observed are the states whose times are told (1 << state). FIN_WAIT2 ends where
// a time-wait mini-socket does that takes it over, a passive SYN_RECV is a request
// first, and CLOSE is no state of a connection.
func (t *Tracker) observed() uint32 {
	if !t.opts.StateSeconds {
		return 0
	}
	states := tcpstate.MaskOf(tcpstate.SynSent, tcpstate.Established, tcpstate.FinWait1,
		tcpstate.CloseWait, tcpstate.LastAck, tcpstate.Closing, tcpstate.Listen)
	if t.Tells(StoryHalfOpen) {
		states |= tcpstate.MaskOf(tcpstate.SynRecv)
	}
	if t.Tells(StoryTimeWait) {
		states |= tcpstate.MaskOf(tcpstate.FinWait2, tcpstate.TimeWait)
	}
	return uint32(states)
}

func (t *Tracker) attachStates(spec *ebpf.CollectionSpec) {
	destroyed, destroyError := t.attach(spec, "socket_destroyed")
	if err := t.setStates(spec, destroyError == nil); err != nil {
		t.untold(err, StoryTransitions, StoryStateSeconds, StoryConnects)
		return
	}
	changed, err := t.attach(spec, "state_changed")
	if err != nil {
		untimed, untimedError := t.attach(spec, "state_changed_untimed")
		if untimedError != nil {
			t.untold(untimedError, StoryTransitions)
		} else {
			t.told(StoryTransitions, mechanismTPBTF, untimed)
		}
		t.untold(fmt.Errorf("needs Linux 5.12 or newer, on arm64 5.18: %w", err), StoryStateSeconds, StoryConnects)
		return
	}
	t.changed = changed
	changes := []*ebpf.Program{changed}
	if tasksInterrupt() {
		if t.changedAgain, err = t.attach(spec, "state_changed_again"); err == nil {
			changes = append(changes, t.changedAgain)
		}
	}
	programs := slices.Clone(changes)
	if destroyed != nil {
		programs = append(programs, destroyed)
	}
	t.told(StoryTransitions, mechanismTPBTF, changes...)
	t.told(StoryConnects, mechanismTPBTF, programs...)
	if t.opts.StateSeconds {
		t.told(StoryStateSeconds, mechanismTPBTF, programs...)
	} else {
		t.untold(errTurnedOff, StoryStateSeconds)
	}
}

// setStates tells the programs of the changes of state what there is to see.
func (t *Tracker) setStates(spec *ebpf.CollectionSpec, destroyIsTraced bool) error {
	var edges [16][16]uint8
	for i, transition := range tcpstate.Transitions {
		if transition.Sight != tcpstate.Never {
			edges[transition.From][transition.To] = uint8(i) + 1
		}
	}
	for name, value := range map[string]any{
		"edges": edges, "observed": t.observed(), "per_namespace": boolean(t.opts.PerNamespace),
		"destroy_is_traced": boolean(destroyIsTraced), "time_wait_is_traced": boolean(t.Tells(StoryTimeWait)),
		"misses_are_taken_over": boolean(tasksInterrupt()),
	} {
		if err := spec.Variables[name].Set(value); err != nil {
			return fmt.Errorf("set %s: %w", name, err)
		}
	}
	return nil
}

// tasksInterrupt tells whether a task may take the CPU from a program at a
// tracepoint, which misses what that task does: then a second program is worth
// what it costs. Before Linux 7.0 only interrupts come between.
func tasksInterrupt() bool {
	version, err := features.LinuxVersionCode()
	return err == nil && version >= 7<<16
}

var errTurnedOff = errors.New("turned off")

func boolean(b bool) uint8 {
	if b {
		return 1
	}
	return 0
}

func (t *Tracker) attachArrivals(spec, hooked *ebpf.CollectionSpec) {
	tell := func(story, program, needs string) {
		attached, err := t.attach(spec, program)
		if err != nil {
			t.untold(fmt.Errorf("needs %s: %w", needs, err), story)
			return
		}
		t.told(story, mechanismTPBTF, attached)
	}
	switch {
	case !t.Tells(StoryConnects):
		t.untold(errors.New("needs the changes of state"), StoryConnections)
	case t.has("btf_trace_sk_data_ready"): // 6.3+
		tell(StoryConnections, "connection_arrived", "Linux 6.3 or newer")
	default:
		t.attachHooks(StoryConnections, hooked, []hook{
			{function: "inet_csk_complete_hashdance", returns: true, program: "child_added"},
			{function: "inet_csk_reqsk_queue_add", returns: true, program: "child_queued"},
		})
	}
	tell(StorySynackRetransmits, "synack_retransmitted", "Linux 5.12 or newer")
	if i := slices.IndexFunc(t.stories, func(s Story) bool { return s.Name == StoryRefusals && s.Told() }); i >= 0 {
		t.told(StoryIgnoredACKs, t.stories[i].Mechanism, t.stories[i].Programs...)
		return
	}
	var reasons *btf.Enum
	if err := t.kernel.TypeByName("skb_drop_reason", &reasons); err == nil {
		i := slices.IndexFunc(reasons.Values, func(v btf.EnumValue) bool { return v.Name == "SKB_DROP_REASON_TCP_LISTEN_OVERFLOW" })
		if i >= 0 && spec.Variables["listen_overflow"].Set(uint32(reasons.Values[i].Value)) == nil {
			tell(StoryIgnoredACKs, "final_ack_refused", "Linux 6.17 or newer")
			return
		}
	}
	t.untold(errors.New("needs Linux 6.17 or newer (drop reason TCP_LISTEN_OVERFLOW)"), StoryIgnoredACKs)
}

// Tells tells whether a story is told.
func (t *Tracker) Tells(story string) bool {
	return slices.ContainsFunc(t.stories, func(s Story) bool { return s.Name == story && s.Told() })
}

// TellsAllAccepts tells whether no accept goes by unseen: those by io_uring, and by
// system calls of 32-bit programs, make no system call return that is watched.
func (t *Tracker) TellsAllAccepts() bool {
	return slices.ContainsFunc(t.stories, func(s Story) bool {
		return s.Name == StoryAccepts && s.Mechanism == mechanismTrampoline
	})
}

func (t *Tracker) attachResets(spec *ebpf.CollectionSpec) {
	if arguments(t.kernel, "tcp_send_reset") >= 3 {
		t.reasons = resetReasons(t.kernel)
	}
	err := spec.Variables["has_reason"].Set(boolean(t.reasons != nil))
	for _, story := range []struct{ name, program string }{
		{StoryResetsSent, "reset_sent"}, {StoryResetsReceived, "reset_received"},
	} {
		var attached *ebpf.Program
		if err == nil {
			attached, err = t.attach(spec, story.program)
		}
		if err != nil {
			t.untold(err, story.name)
			continue
		}
		t.told(story.name, mechanismTPBTF, attached)
	}
}

// has tells whether the kernel has that typedef.
func (t *Tracker) has(name string) bool {
	var typ *btf.Typedef
	return t.kernel.TypeByName(name, &typ) == nil
}

// hasMember tells whether a structure, or one inside it, has a member of that name.
func hasMember(typ btf.Type, name string) bool {
	var members []btf.Member
	switch typ := btf.UnderlyingType(typ).(type) {
	case *btf.Struct:
		members = typ.Members
	case *btf.Union:
		members = typ.Members
	}
	return slices.ContainsFunc(members, func(m btf.Member) bool { return m.Name == name || hasMember(m.Type, name) })
}

// arguments is how many a tracepoint hands over on this kernel.
func arguments(kernel *btf.Spec, tracepoint string) int {
	var pointer *btf.Typedef
	if err := kernel.TypeByName("btf_trace_"+tracepoint, &pointer); err != nil {
		return 0
	}
	if p, ok := pointer.Type.(*btf.Pointer); ok {
		if f, ok := p.Target.(*btf.FuncProto); ok {
			return len(f.Params) - 1 // the first is the tracer's own
		}
	}
	return 0
}

// resetReasons are the names of enum sk_rst_reason, "tcp_flags" for
// SK_RST_REASON_TCP_FLAGS.
func resetReasons(kernel *btf.Spec) []string {
	var enum *btf.Enum
	if err := kernel.TypeByName("sk_rst_reason", &enum); err != nil {
		return nil
	}
	var names []string
	for _, v := range enum.Values {
		name := strings.ToLower(strings.TrimPrefix(v.Name, "SK_RST_REASON_"))
		if v.Value < 256 && name != "max" {
			names = append(names, make([]string, max(0, int(v.Value)+1-len(names)))...)
			names[v.Value] = name
		}
	}
	return names
}

// Stories are all that the tracker knows of, told or not.
func (t *Tracker) Stories() []Story { return t.stories }

// Close detaches everything.
func (t *Tracker) Close() error {
	var err error
	for _, c := range slices.Backward(t.closers) {
		err = errors.Join(err, c.Close())
	}
	for _, m := range t.maps {
		err = errors.Join(err, m.Close())
	}
	return err
}
