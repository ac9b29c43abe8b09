package tracker

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"

	"sockq/probes/scenario"
)

// kernelWith is the type information of a kernel with these types.
func kernelWith(t *testing.T, types ...btf.Type) *btf.Spec {
	t.Helper()
	b, err := btf.NewBuilder(types, nil)
	if err != nil {
		t.Fatal(err)
	}
	kernel, err := b.Spec()
	if err != nil {
		t.Fatal(err)
	}
	return kernel
}

func functionOf(name string, arguments int, returns btf.Type) *btf.Func {
	proto := &btf.FuncProto{Return: returns}
	for range arguments {
		proto.Params = append(proto.Params, btf.FuncParam{Type: &btf.Int{Size: 8}})
	}
	return &btf.Func{Name: name, Type: proto, Linkage: btf.StaticFunc}
}

// TestPlan holds what is attached against what a function takes and returns: a
// program that looks for the result in the wrong place is never.
func TestPlan(t *testing.T) {
	halfOpen, err := loadHalfOpen()
	if err != nil {
		t.Fatal(err)
	}
	refusals, err := loadRefusals()
	if err != nil {
		t.Fatal(err)
	}
	result, nothing := &btf.Int{Name: "long", Size: 8}, &btf.Void{}
	began := hook{function: "f", returns: true, program: "request_began"}
	completed := hook{function: "f", returns: true, program: "request_completed"}
	dropped := hook{function: "f", returns: true, program: "request_dropped"}
	for _, test := range []struct {
		spec                *ebpf.CollectionSpec
		hook                hook
		arguments           int
		returns             btf.Type
		trampolines, probes string // programs
	}{
		{halfOpen, began, 2, result, "request_began_2", "request_began_entry_kprobe request_began_kprobe"},
		{halfOpen, began, 3, result, "request_began_3", "request_began_entry_kprobe request_began_kprobe"},
		{halfOpen, began, 3, nothing, "request_began_void", "request_began_entry_kprobe request_began_void_kprobe"},
		{halfOpen, began, 4, result, "", "request_began_entry_kprobe request_began_kprobe"},
		{halfOpen, completed, 4, result, "request_completed_4", "request_completed_entry_kprobe request_completed_kprobe"},
		{halfOpen, completed, 5, result, "", "request_completed_entry_kprobe request_completed_kprobe"},
		{halfOpen, completed, 4, nothing, "", ""},
		{refusals, dropped, 3, nothing, "request_dropped_void", "request_dropped_void_kprobe"},
	} {
		tr := &Tracker{kernel: kernelWith(t, functionOf("f", test.arguments, test.returns))}
		for want, plan := range map[string]func(*ebpf.CollectionSpec, hook) ([]placement, error){
			"by trampolines: " + test.trampolines: tr.planTrampoline, "by kprobes: " + test.probes: tr.planKprobe,
		} {
			placements, err := plan(test.spec, test.hook)
			var names []string
			for _, p := range placements {
				names = append(names, p.program)
			}
			how, want, _ := strings.Cut(want, ": ")
			if got := strings.Join(names, " "); got != want || (err == nil) != (want != "") {
				t.Errorf("%s at a function of %d arguments that returns %v: %q %s, want %q: %v",
					test.hook.program, test.arguments, test.returns, got, how, want, err)
			}
		}
	}
}

// TestPlanOfWhatIsNotBuilt sees that a kernel without IPv6 or SYN cookies needs no
// hooks there, and that it is told where IPv6 is a module.
func TestPlanOfWhatIsNotBuilt(t *testing.T) {
	net := func(members ...string) *btf.Struct {
		s := &btf.Struct{Name: "net", Size: 8}
		for _, name := range members {
			s.Members = append(s.Members, btf.Member{Name: name, Type: &btf.Int{Size: 8}})
		}
		return s
	}
	four := hook{function: "tcp_v4_reqsk_destructor", program: "request_ended"}
	six := hook{function: "tcp_v6_reqsk_destructor", program: "request_ended"}
	cookie := hook{function: "cookie_v4_check", program: "cookie_arrived"}
	cookie6 := hook{function: "cookie_v6_check", program: "cookie_arrived"}
	for _, test := range []struct {
		name   string
		kernel *btf.Spec
		want   []hook
	}{
		{"all", kernelWith(t, net("ipv4", "ipv6"), functionOf("tcp_get_cookie_sock", 4, &btf.Void{})), []hook{four, six, cookie, cookie6}},
		{"without IPv6", kernelWith(t, net("ipv4"), functionOf("tcp_get_cookie_sock", 4, &btf.Void{})), []hook{four, cookie}},
		{"without SYN cookies", kernelWith(t, net("ipv4", "ipv6")), []hook{four, six}},
		{"without both", kernelWith(t, net("ipv4")), []hook{four}},
	} {
		tr := &Tracker{kernel: test.kernel}
		if got := tr.built([]hook{four, six, cookie, cookie6}); !slices.Equal(got, test.want) {
			t.Errorf("%s: hooks are %v, want %v", test.name, got, test.want)
		}
	}
	for what, kernel := range map[string]*btf.Spec{
		"CONFIG_IPV6=m":    kernelWith(t, net("ipv4", "ipv6")),
		"no such function": kernelWith(t, net("ipv4", "ipv6"), functionOf("tcp_v6_connect", 3, &btf.Void{})),
	} {
		tr := &Tracker{kernel: kernel}
		if _, err := tr.function(six); err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("%v, want %s", err, what)
		}
	}
}

// TestOptionalHookThatFails sees that it costs what it would have told, and no more.
func TestOptionalHookThatFails(t *testing.T) {
	at, ok := map[Tier]hook{
		TierA: {function: "tcp_orphan_count_sum", program: "connection_abandoned", optional: true}, // has no argument to look at
		TierB: {function: "get_kprobe", program: "connection_abandoned", optional: true},           // which no kprobe may be at
	}[tier()]
	if !ok {
		return
	}
	closeShared(t)
	tr := openTracker(t, Options{Tier: tier()})
	specs, err := tr.specs()
	if err != nil {
		t.Fatal(err)
	}
	if tr.kernel, err = btf.LoadKernelSpec(); err != nil {
		t.Fatal(err)
	}
	plan := map[Tier]func(*ebpf.CollectionSpec, hook) ([]placement, error){TierA: tr.planTrampoline, TierB: tr.planKprobe}[tier()]
	if _, err := tr.place(specs.halfOpen, []hook{at}, plan); err == nil {
		t.Fatalf("%s has a hook", at.function)
	}
	tr.attachHooks("test", specs.halfOpen, []hook{{function: "inet_child_forget", program: "connection_abandoned"}, at})
	s := tr.Stories()[len(tr.Stories())-1]
	want := map[Tier]string{TierA: mechanismTrampoline, TierB: mechanismKprobe}[tier()]
	if s.Mechanism != want || len(s.Programs) != 1 {
		t.Errorf("it is told by %s with %d programs: %s", s.Mechanism, len(s.Programs), s.Reason)
	}
}

// TestStoryOfWhichAPartFails sees that nothing of it stays attached.
func TestStoryOfWhichAPartFails(t *testing.T) {
	if !needs(t, StoryAccepts) || !scenario.KernelAtLeast(6, 3) {
		return
	}
	root, err := openTracefs("/sys")
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	id, err := root.ReadFile("events/syscalls/sys_exit_accept4/id")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := errors.Join(number(dir, "none\n"),
		os.WriteFile(filepath.Join(dir, "kernel/tracing/events/syscalls/sys_exit_accept4/id"), id, 0o644)); err != nil {
		t.Fatal(err)
	}
	opts := everything
	opts.SysFS = dir
	for range 8 { // in any order
		tr := openTracker(t, opts)
		stories(t, tr, syscallStories...)
		for _, c := range tr.closers {
			if p, ok := c.(*ebpf.Program); ok && strings.HasPrefix(nameOf(p), "accept") {
				t.Fatalf("%s is attached", nameOf(p))
			}
		}
	}
}
