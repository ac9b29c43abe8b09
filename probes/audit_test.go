package probes

import (
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"

	"sockq/probes/scenario"
)

// The audit says of how many namespaces it knows that it cannot enter them.
func TestAuditSaysWhatItDoesNotFind(t *testing.T) {
	s := scenario.NewStage(t, scenario.IPv4) // that only a descriptor keeps
	s.Listen(5)
	p := open(t, mechanism(), t.TempDir())
	if p.walk == nil { // what it does not find is not counted, either
		return
	}
	a := p.auditor
	all := map[uint32]string{}
	add := func() {
		for _, n := range snapshot(t, p).Namespaces {
			if all[n.Inode] == "" {
				all[n.Inode] = fmt.Sprintf("/proc/self/fd/none%d", n.Inode)
			}
		}
	}
	add()
	all[s.NS.Inode()] = s.NS.Path()
	round := func() string {
		t.Helper()
		a.credit = time.Second
		if err := p.audit(t.Context()); err != nil {
			t.Fatal(err)
		}
		for _, probe := range p.probes() {
			if probe.Name == "audit" && probe.Attached {
				return probe.Reason
			}
		}
		t.Fatal("there is no audit")
		return ""
	}
	find := func(but uint32) {
		a.find = func() (map[uint32]string, error) {
			add() // namespaces that somebody else made meanwhile
			found := maps.Clone(all)
			delete(found, but)
			return found, nil
		}
	}

	find(0)
	if said := round(); said != "" {
		t.Errorf("at first it says %q", said)
	}
	find(s.NS.Inode())
	for a.traces = range map[bool]bool{false: true, true: true} {
		want := "without 1 namespaces that have "
		if said := round(); !strings.HasPrefix(said, want) || strings.Contains(said, "CAP_SYS_PTRACE") == a.traces {
			t.Errorf("with CAP_SYS_PTRACE: %t, it says %q", a.traces, said)
		}
	}
	// One that comes between the two is no reason.
	late := scenario.NewStage(t, scenario.IPv4)
	find(late.NS.Inode())
	late.Listen(5)
	if said := round(); said != "" {
		t.Errorf("of a new namespace it says %q", said)
	}
	if said := round(); said == "" {
		t.Error("of a namespace that stays it says nothing")
	}
	find(0)
	all[late.NS.Inode()] = late.NS.Path()
	if said := round(); said != "" {
		t.Errorf("of those that it finds it says %q", said)
	}
}
