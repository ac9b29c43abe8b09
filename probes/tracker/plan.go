package tracker

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

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
	// where it finds the result behind them, or "_void" where the function
	// returns nothing; at a kprobe with "_kprobe", and with "_entry_kprobe" for
	// one at the entry that keeps what the one at the return has to know.
	program  string
	optional bool   // the story is told without it
	again    string // a program that takes over what this one misses, where tasks interrupt
}

// attachHooks tells a story by the first mechanism that this kernel allows for all
// of its hooks.
func (t *Tracker) attachHooks(story string, spec *ebpf.CollectionSpec, hooks []hook) {
	var refused []error
	for _, mechanism := range []struct {
		name  string
		tiers []Tier
		plan  func(*ebpf.CollectionSpec, hook) ([]placement, error)
	}{
		{mechanismTrampoline, []Tier{TierA}, t.planTrampoline},
		{mechanismKprobe, []Tier{TierA, TierB}, t.planKprobe},
	} {
		if !slices.Contains(mechanism.tiers, t.tier) {
			continue
		}
		programs, err := t.place(spec, hooks, mechanism.plan)
		if err != nil && slices.ContainsFunc(hooks, isOptional) {
			programs, err = t.place(spec, slices.DeleteFunc(slices.Clone(hooks), isOptional), mechanism.plan)
		}
		if err == nil {
			t.told(story, mechanism.name, programs...)
			return
		}
		refused = append(refused, fmt.Errorf("by %s: %w", mechanism.name, err))
	}
	if len(refused) == 0 {
		refused = []error{errNoHooks}
	}
	t.untold(errors.Join(refused...), story)
}

func isOptional(h hook) bool { return h.optional }

// placement is a program of the spec at a function.
type placement struct {
	program, function string
	attach            func(*ebpf.Program) (link.Link, error)
	takesOver         bool // what the one before it misses
}

// place loads what the hooks need at once, which is much cheaper than one after the
// other, and attaches it: all or nothing.
func (t *Tracker) place(spec *ebpf.CollectionSpec, hooks []hook, plan func(*ebpf.CollectionSpec, hook) ([]placement, error)) (_ []*ebpf.Program, err error) {
	before := len(t.closers)
	defer func() {
		if err != nil {
			err = errors.Join(err, t.takeBack(before))
		}
	}()
	var placements []placement
	for _, h := range hooks {
		planned, err := plan(spec, h)
		if err != nil && !h.optional {
			return nil, fmt.Errorf("%s: %w", h.function, err)
		}
		placements = append(placements, planned...)
	}
	at := make(map[string]*ebpf.ProgramSpec)
	name := func(p placement) string { return fmt.Sprint(p.program, " at ", p.function, " ", p.takesOver) }
	for _, p := range placements {
		copied := spec.Programs[p.program].Copy()
		copied.AttachTo = p.function
		at[name(p)] = copied
	}
	loaded, err := t.loadAll(spec, at)
	if err != nil {
		return nil, err
	}
	var programs []*ebpf.Program
	for _, p := range placements {
		program := loaded[name(p)]
		attached, err := p.attach(program)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", p.function, err)
		}
		t.closers = append(t.closers, attached)
		if program.Type() == ebpf.Kprobe {
			t.kprobes[program] = attached
		}
		if p.takesOver {
			t.takenOver[programs[len(programs)-1]], t.takesOver[program] = program, true
		}
		programs = append(programs, program)
	}
	return programs, nil
}

// takeBack detaches what was attached after the first closers.
func (t *Tracker) takeBack(first int) (err error) {
	for _, c := range slices.Backward(t.closers[first:]) {
		err = errors.Join(err, c.Close())
	}
	t.closers = t.closers[:first]
	return err
}

var errNoHooks = errors.New("needs trampolines (CONFIG_DYNAMIC_FTRACE_WITH_DIRECT_CALLS) or kprobes (CONFIG_KPROBE_EVENTS), which this kernel does not allow")

func (t *Tracker) planTrampoline(spec *ebpf.CollectionSpec, h hook) ([]placement, error) {
	proto, err := t.function(h)
	if err != nil {
		return nil, err
	}
	programs := []string{h.program}
	if h.again != "" && tasksInterrupt() {
		programs = append(programs, h.again)
	}
	var planned []placement
	for i, program := range programs {
		names := []string{program + "_" + strconv.Itoa(len(proto.Params)), program}
		if h.returnsNothing(proto) {
			names = []string{program + "_void"}
		}
		at := slices.IndexFunc(names, func(name string) bool { return spec.Programs[name] != nil })
		if at < 0 {
			return nil, fmt.Errorf("it has %d arguments and returns %v, which is new", len(proto.Params), proto.Return)
		}
		planned = append(planned, placement{names[at], h.function, func(p *ebpf.Program) (link.Link, error) {
			return link.AttachTracing(link.TracingOptions{Program: p})
		}, i > 0})
	}
	return planned, nil
}

func (t *Tracker) planKprobe(spec *ebpf.CollectionSpec, h hook) (planned []placement, err error) {
	proto, err := t.function(h)
	if err != nil {
		return nil, err
	}
	program := h.program + "_kprobe"
	if h.returnsNothing(proto) {
		program = h.program + "_void_kprobe"
	}
	if spec.Programs[program] == nil {
		return nil, errors.New("needs trampolines")
	}
	entry := func(p *ebpf.Program) (link.Link, error) {
		attached, err := link.Kprobe(h.function, p, nil)
		return attached, explainPerf(err)
	}
	if name := h.program + "_entry_kprobe"; spec.Programs[name] != nil {
		planned = append(planned, placement{name, h.function, entry, false})
	}
	if h.returns {
		entry = func(p *ebpf.Program) (link.Link, error) {
			attached, err := link.Kretprobe(h.function, p, nil)
			return attached, explainPerf(err)
		}
	}
	return append(planned, placement{program, h.function, entry, false}), nil
}

// function is what the kernel says of a hook's function.
func (t *Tracker) function(h hook) (*btf.FuncProto, error) {
	var function, six *btf.Func
	switch err := t.kernel.TypeByName(h.function, &function); {
	case err != nil && h.isOfIPv6() && t.kernel.TypeByName("tcp_v6_connect", &six) != nil:
		return nil, errors.New("IPv6 is a module of this kernel (CONFIG_IPV6=m), whose functions it does not tell")
	case err != nil:
		return nil, fmt.Errorf("the kernel has no such function: %w", err)
	}
	proto, ok := function.Type.(*btf.FuncProto)
	if !ok {
		return nil, errors.New("the kernel does not tell its arguments")
	}
	return proto, nil
}

// returnsNothing tells of a hook at the return that there is no result.
func (h hook) returnsNothing(proto *btf.FuncProto) bool {
	_, void := proto.Return.(*btf.Void)
	return void && h.returns
}

func (h hook) isOfIPv6() bool { return strings.Contains(h.function, "_v6_") }

// built leaves out the hooks at what the kernel was built without, and never does:
// IPv6 (CONFIG_IPV6=n) and SYN cookies (CONFIG_SYN_COOKIES=n).
func (t *Tracker) built(hooks []hook) []hook {
	var net *btf.Struct
	six := t.kernel.TypeByName("net", &net) != nil ||
		slices.ContainsFunc(net.Members, func(m btf.Member) bool { return m.Name == "ipv6" })
	var cookie *btf.Func
	cookies := t.kernel.TypeByName("tcp_get_cookie_sock", &cookie) == nil
	return slices.DeleteFunc(hooks, func(h hook) bool {
		return h.isOfIPv6() && !six || strings.HasPrefix(h.function, "cookie_") && !cookies
	})
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
		err = errors.Join(spec.Variables["counter_index"].Set(indexes),
			spec.Variables["cookies_are_missing"].Set(boolean(t.cookiesMissing)))
	}
	if err != nil {
		t.untold(err, StoryRefusals)
		return
	}
	t.attachHooks(StoryRefusals, spec, t.built(slices.Concat(
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
		})))
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

// Socket cookies came to tracing programs with the same kernel.
var errNoTable = errors.New("needs Linux 5.12 or newer, on arm64 5.18: the table of sockets needs atomic compare and exchange")

func (t *Tracker) attachHalfOpen(spec *ebpf.CollectionSpec) {
	if !t.Tells(StoryRefusals) { // what a final ACK comes to is an end, too
		t.untold(errors.New("needs "+StoryRefusals), StoryHalfOpen)
		return
	}
	if t.cookiesMissing {
		t.untold(errNoTable, StoryHalfOpen)
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
	t.attachHooks(StoryHalfOpen, spec, t.built([]hook{
		// Those that end a request first, so that none stays that began.
		{function: "tcp_v4_reqsk_destructor", program: "request_ended", again: "request_ended"},
		{function: "tcp_v6_reqsk_destructor", program: "request_ended", again: "request_ended"},
		{function: "inet_csk_complete_hashdance", returns: true, program: "request_completed"},
		{function: "reqsk_timer_handler", program: "request_timer_fired"},
		{function: "tcp_abort", program: "socket_aborted"},
		{function: "inet_reqsk_clone", returns: true, program: "request_cloned", optional: true}, // 5.14+
		{function: "inet_child_forget", program: "connection_abandoned"},
		{function: "inet_csk_reqsk_queue_hash_add", returns: true, program: "request_began"},
	}))
}

func (t *Tracker) attachTimeWait(spec *ebpf.CollectionSpec) {
	if t.cookiesMissing {
		t.untold(errNoTable, StoryTimeWait)
		return
	}
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
