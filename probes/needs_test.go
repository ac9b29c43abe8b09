package probes

import (
	"errors"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sockq/probes/owner"
	"sockq/probes/scenario"
)

// With what Needs names, and no other capability, everything that was attached goes
// on, on every kernel.
func TestNeeds(t *testing.T) {
	s := scenario.NewStage(t, scenario.IPv4)
	p, err := Open(Options{NetnsPath: t.TempDir(), AuditBudget: 1, MaxListeners: 100_000, MaxNamespaces: 10_000, Owners: owner.Options{CRI: owner.CRIOff}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	var kept [2]uint32
	for _, n := range p.Needs() {
		if n.Try == nil {
			kept[n.Capability/32] |= 1 << (n.Capability % 32)
		}
	}
	if p.walk != nil && kept != [2]uint32{1<<unix.CAP_SYS_ADMIN | 1<<unix.CAP_SYS_PTRACE, 0} {
		t.Errorf("%x is needed beside the walk", kept)
	}
	l := s.Listen(7)
	s.Connect(l.Addr())

	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var all [2]unix.CapUserData
	if err := unix.Capget(&header, &all[0]); err != nil {
		t.Fatal(err)
	}
	less := all
	for i := range less {
		less[i].Effective &= kept[i]
	}
	if err := unix.Capset(&header, &less[0]); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Capset(&header, &all[0]); err != nil {
			t.Fatal(err)
		}
	}()
	p.owners.next = time.Time{}
	if err := errors.Join(p.readNamespaces(true), p.sample(true), p.readOwners(t.Context()), p.sample(true),
		p.sweep(), p.takeCensus(t.Context()), p.auditRefusals()); err != nil {
		t.Error(err)
	}
	if p.auditor != nil {
		if err := p.audit(t.Context()); err != nil {
			t.Errorf("audit: %v", err)
		}
	}
	if !scenario.KernelAtLeast(5, 19) { // and no less
		none := all
		none[0].Effective, none[1].Effective = 0, 0
		if err := unix.Capset(&header, &none[0]); err != nil {
			t.Fatal(err)
		}
		p.owners.next = time.Time{}
		if err := p.readOwners(t.Context()); !errors.Is(err, unix.EPERM) {
			t.Errorf("maps are read without CAP_BPF: %v", err)
		}
		if err := unix.Capset(&header, &less[0]); err != nil {
			t.Fatal(err)
		}
		p.owners.next = time.Time{}
		if err := p.readOwners(t.Context()); err != nil {
			t.Error(err)
		}
	}
	snapshot, err := p.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	for _, source := range snapshot.Sources {
		if !source.Up {
			t.Errorf("%s: %s", source.Name, source.Error)
		}
	}
	if p.walk == nil { // sock_diag does not find a namespace that nobody is in
		return
	}
	for i := range snapshot.Listeners {
		if found := &snapshot.Listeners[i]; found.Inode == s.NS.Inode() && found.AcceptQueue == 1 && found.Owner.Process != "" {
			return
		}
	}
	t.Error("the listener with a connection is missing, or has no owner")
}
