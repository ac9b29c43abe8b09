package tracker

import (
	"errors"
	"fmt"
	"slices"
	"strconv"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"

	"sockq/probes/tcpstate"
)

// hook is a program at the entry or the return of a kernel function.
type hook struct {
	function string
	returns  bool
	// program is its name; with the number of the function's arguments ("_3")
	// where that is not the same on all kernels, or "_void" where the function
	// returns nothing; at a kprobe with "_kprobe", and with "_entry_kprobe" for
	// one at the entry that keeps what the one at the return has to know.
	program  string
	optional bool // the story is told without it
}

// attachHooks tells a story by the first mechanism that this kernel allows for all
// of its hooks.
func (t *Tracker) attachHooks(story string, spec *ebpf.CollectionSpec, hooks []hook) {
	var refused []error
	for _, mechanism := range []struct {
		name   string
		tiers  []Tier
		attach func(*ebpf.CollectionSpec, hook) (*ebpf.Program, error)
	}{
		{mechanismTrampoline, []Tier{TierA}, t.attachTrampoline},
		{mechanismKprobe, []Tier{TierA, TierB}, t.attachKprobe},
	} {
		if !slices.Contains(mechanism.tiers, t.tier) {
			continue
		}
		before := len(t.closers)
		var programs []*ebpf.Program
		var failed error
		for _, h := range hooks {
			program, err := mechanism.attach(spec, h)
			if err != nil && !h.optional {
				failed = fmt.Errorf("%s of %s: %w", mechanism.name, h.function, err)
				break
			}
			if program != nil {
				programs = append(programs, program)
			}
		}
		if failed == nil {
			t.told(story, mechanism.name, programs...)
			return
		}
		refused = append(refused, failed)
		for _, c := range slices.Backward(t.closers[before:]) {
			refused = append(refused, c.Close())
		}
		t.closers = t.closers[:before]
	}
	if len(refused) == 0 {
		refused = []error{errNoHooks}
	}
	t.untold(errors.Join(refused...), story)
}

var errNoHooks = errors.New("needs trampolines (CONFIG_DYNAMIC_FTRACE_WITH_DIRECT_CALLS) or kprobes (CONFIG_KPROBE_EVENTS), which this kernel does not allow")

func (t *Tracker) attachTrampoline(spec *ebpf.CollectionSpec, h hook) (*ebpf.Program, error) {
	var function *btf.Func
	if err := t.kernel.TypeByName(h.function, &function); err != nil {
		return nil, fmt.Errorf("the kernel has no such function: %w", err)
	}
	proto, ok := function.Type.(*btf.FuncProto)
	if !ok {
		return nil, errors.New("the kernel does not tell its arguments")
	}
	names := []string{h.program + "_" + strconv.Itoa(len(proto.Params)), h.program}
	if _, void := proto.Return.(*btf.Void); void && h.returns {
		names = slices.Insert(names, 0, h.program+"_void")
	}
	i := slices.IndexFunc(names, func(name string) bool { return spec.Programs[name] != nil })
	if i < 0 {
		return nil, fmt.Errorf("it has %d arguments, which is new", len(proto.Params))
	}
	program, err := t.loadAt(spec, names[i], h.function)
	if err != nil {
		return nil, err
	}
	return program, t.keep(link.AttachTracing(link.TracingOptions{Program: program}))
}

func (t *Tracker) attachKprobe(spec *ebpf.CollectionSpec, h hook) (*ebpf.Program, error) {
	name := h.program + "_kprobe"
	if spec.Programs[name] == nil {
		return nil, errors.New("needs its return value")
	}
	if entry := h.program + "_entry_kprobe"; spec.Programs[entry] != nil {
		program, err := t.loadAt(spec, entry, h.function)
		if err == nil {
			err = t.keep(link.Kprobe(h.function, program, nil))
		}
		if err != nil {
			return nil, err
		}
	}
	program, err := t.loadAt(spec, name, h.function)
	if err != nil {
		return nil, err
	}
	attach := link.Kprobe
	if h.returns {
		attach = link.Kretprobe
	}
	return program, t.keep(attach(h.function, program, nil))
}

// loadAt loads a program for a function other than its section's.
func (t *Tracker) loadAt(spec *ebpf.CollectionSpec, name, function string) (*ebpf.Program, error) {
	spec = spec.Copy()
	spec.Programs[name].AttachTo = function
	return t.load(spec, name)
}

func (t *Tracker) keep(attached link.Link, err error) error {
	if err != nil {
		return err
	}
	t.closers = append(t.closers, attached)
	return nil
}

// both are the hooks at the entry and at the return of a function.
func both(function, entry, exit string) []hook {
	return []hook{{function: function, program: entry}, {function: function, returns: true, program: exit}}
}

// watched are the counters of struct linux_mib that tell refusals (enum watched).
var watched = []string{
	"LINUX_MIB_LISTENOVERFLOWS", "LINUX_MIB_LISTENDROPS", "LINUX_MIB_TCPREQQFULLDROP", "LINUX_MIB_SYNCOOKIESSENT", "LINUX_MIB_SYNCOOKIESRECV",
}

func (t *Tracker) attachRefusals(spec *ebpf.CollectionSpec) {
	if t.tier != TierA && t.tier != TierB {
		t.untold(errNoHooks, StoryRefusals)
		return
	}
	indexes, err := enumerators(t.kernel, watched)
	if err == nil {
		err = spec.Variables["counter_index"].Set(indexes)
	}
	if err != nil {
		t.untold(err, StoryRefusals)
		return
	}
	t.attachHooks(StoryRefusals, spec, slices.Concat(
		both("tcp_conn_request", "syn_arrived", "syn_answered"),
		both("tcp_check_req", "final_ack_arrived", "final_ack_taken"),
		both("cookie_v4_check", "cookie_arrived", "cookie_taken"),
		both("cookie_v6_check", "cookie_arrived", "cookie_taken"),
		both("tcp_req_err", "request_failed", "request_dropped"),
		[]hook{
			{function: "inet_reqsk_alloc", returns: true, program: "request_allocated", optional: true},
			{function: "security_inet_conn_request", returns: true, program: "request_allowed", optional: true},
			{function: "tcp_v4_route_req", returns: true, program: "request_routed", optional: true},
			{function: "tcp_v6_route_req", returns: true, program: "request_routed", optional: true},
		}))
}

// enumerators finds the values of an anonymous enum's enumerators.
func enumerators(kernel *btf.Spec, names []string) ([]uint32, error) {
	for typ, err := range kernel.All() { // an enum without a name is not to be found otherwise
		if err != nil {
			return nil, fmt.Errorf("find enumerators: %w", err)
		}
		enum, ok := typ.(*btf.Enum)
		if !ok || enum.Name != "" {
			continue
		}
		values := make([]uint32, 0, len(names))
		for _, name := range names {
			if i := slices.IndexFunc(enum.Values, func(v btf.EnumValue) bool { return v.Name == name }); i >= 0 {
				values = append(values, uint32(enum.Values[i].Value))
			}
		}
		if len(values) == len(names) {
			return values, nil
		}
	}
	return nil, fmt.Errorf("the kernel does not count %v", names)
}

func (t *Tracker) attachHalfOpen(spec *ebpf.CollectionSpec) {
	if !t.Tells(StoryRefusals) { // what a final ACK comes to is an end, too
		t.untold(errors.New("needs "+StoryRefusals), StoryHalfOpen)
		return
	}
	states := tcpstate.Mask(0)
	if t.opts.StateSeconds {
		states = tcpstate.MaskOf(tcpstate.SynRecv)
	}
	if err := t.setEdges(spec, states, map[string]tcpstate.Edge{
		"request_begins_edge":    {From: tcpstate.Listen, To: tcpstate.NewSynRecv},
		"request_completes_edge": {From: tcpstate.NewSynRecv, To: tcpstate.SynRecv},
		"request_ends_edge":      {From: tcpstate.NewSynRecv, To: tcpstate.Close},
	}); err != nil {
		t.untold(err, StoryHalfOpen)
		return
	}
	t.attachHooks(StoryHalfOpen, spec, []hook{
		// Those that end a request first, so that none stays that began.
		{function: "tcp_v4_reqsk_destructor", program: "request_ended"},
		{function: "tcp_v6_reqsk_destructor", program: "request_ended"},
		{function: "inet_csk_complete_hashdance", returns: true, program: "request_completed"},
		{function: "reqsk_timer_handler", program: "request_timer_fired"},
		{function: "tcp_abort", program: "socket_aborted"},
		{function: "inet_reqsk_clone", returns: true, program: "request_cloned", optional: true}, // 5.14+
		{function: "inet_child_forget", program: "connection_abandoned"},
		{function: "inet_csk_reqsk_queue_hash_add", returns: true, program: "request_began"},
	})
}

func (t *Tracker) attachTimeWait(spec *ebpf.CollectionSpec) {
	states := tcpstate.Mask(0)
	if t.opts.StateSeconds {
		states = tcpstate.MaskOf(tcpstate.FinWait2, tcpstate.TimeWait)
	}
	if err := t.setEdges(spec, states, map[string]tcpstate.Edge{
		"waits_edge":       {From: tcpstate.FinWait2, To: tcpstate.TimeWait},
		"ends_edge":        {From: tcpstate.TimeWait, To: tcpstate.Close},
		"orphan_ends_edge": {From: tcpstate.FinWait2, To: tcpstate.Close},
	}); err != nil {
		t.untold(err, StoryTimeWait)
		return
	}
	takesOver := "inet_twsk_hashdance_schedule" // 6.8+
	var function *btf.Func
	if t.kernel.TypeByName(takesOver, &function) != nil {
		takesOver = "inet_twsk_hashdance"
	}
	t.attachHooks(StoryTimeWait, spec, slices.Concat(
		[]hook{{function: "inet_twsk_kill", program: "waiting_ends"}},
		both("tcp_timewait_state_process", "segment_for_waiting", "segment_processed"),
		[]hook{{function: takesOver, program: "socket_waits"}},
	))
}

// setEdges tells a program the numbers of edges, and the states whose times it
// measures.
func (t *Tracker) setEdges(spec *ebpf.CollectionSpec, states tcpstate.Mask, edges map[string]tcpstate.Edge) error {
	values := map[string]any{"observed": uint32(states), "per_namespace": boolean(t.opts.PerNamespace)}
	for name, edge := range edges {
		i, ok := tcpstate.Index(edge)
		if !ok {
			return fmt.Errorf("%s is no edge", edge)
		}
		values[name] = uint32(i)
	}
	for name, value := range values {
		if err := spec.Variables[name].Set(value); err != nil {
			return fmt.Errorf("set %s: %w", name, err)
		}
	}
	return nil
}
