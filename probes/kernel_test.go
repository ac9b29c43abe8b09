package probes

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"sockq/probes/census"
	"sockq/probes/owner"
	"sockq/probes/scenario"
	"sockq/probes/tracker"
)

// release is a kernel's, major and minor.
type release [2]int

func (r release) here() bool { return scenario.KernelAtLeast(r[0], r[1]) }

// since is the kernel that each probe needs, with BTF, tracefs and all rights, as
// README's table has it.
var since = map[string]release{
	"sockets": {}, "listeners": {}, "namespaces": {},
	"bound": walkSince, "audit": walkSince, "syn_queue": walkSince,
	probeOwners:                    {},
	tracker.StoryTransitions:       {},
	tracker.StoryStateSeconds:      {5, 12},
	tracker.StoryConnects:          {5, 12},
	tracker.StoryConnections:       {6, 3},
	tracker.StoryAccepts:           walkSince, // which tells of accepts that go by unseen
	tracker.StoryBacklog:           {6, 2},
	tracker.StoryUnroutable:        {6, 2},
	tracker.StorySynackRetransmits: {5, 12},
	tracker.StoryIgnoredACKs:       {6, 17},
	tracker.StoryResetsSent:        {},
	tracker.StoryResetsReceived:    {},
	tracker.StoryRefusals:          {},
	tracker.StoryHalfOpen:          {5, 12},
	tracker.StoryTimeWait:          {5, 12},
}

// tier is what this kernel allows.
var tier = sync.OnceValue(func() tracker.Tier {
	tier, _ := tracker.FindTier("/sys") // none where it fails
	return tier
})

// hooked tells whether this kernel has trampolines or kprobes.
func hooked() bool { return tier() == tracker.TierA || tier() == tracker.TierB }

var walkSince = release{6, 4}

// told tells whether this kernel owes us a probe.
func told(name string) bool {
	r, ok := since[name]
	if !ok {
		panic("no probe " + name)
	}
	switch name {
	case tracker.StoryRefusals, tracker.StoryHalfOpen, tracker.StoryTimeWait:
		return hooked() && r.here()
	case tracker.StoryIgnoredACKs, "audit": // part of the refusals, and of these at least
		return hooked() || r.here()
	case tracker.StoryConnections, tracker.StoryAccepts, tracker.StoryBacklog, tracker.StoryUnroutable:
		return tier() == tracker.TierA && scenario.KernelAtLeast(5, 12) || r.here()
	}
	return r.here()
}

// mechanism is the census' source on this kernel.
func mechanism() census.Mechanism {
	if walkSince.here() {
		return census.MechanismWalk
	}
	return census.MechanismSockDiag
}

// refused tells that this kernel is too old for the walk. There it sees that the
// walk says so.
func refused(t *testing.T) bool {
	t.Helper()
	if walkSince.here() {
		return false
	}
	p, err := Open(Options{Mechanism: census.MechanismWalk, NetnsPath: t.TempDir(), NoOwners: true})
	if err == nil {
		p.Close()
		t.Error("the walk works before Linux 6.4")
	} else if !strings.Contains(err.Error(), "needs Linux 6.4 or newer") {
		t.Errorf("without the walk: %v", err)
	}
	return true
}

// TestProbesOfThisKernel holds what is attached, and what is not, against README.
func TestProbesOfThisKernel(t *testing.T) {
	p, err := Open(Options{NetnsPath: t.TempDir(), AuditBudget: 1, Owners: owner.Options{CRI: owner.CRIOff}})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if p.source.Mechanism() != mechanism() {
		t.Errorf("sockets are counted by %s, want %s", p.source.Mechanism(), mechanism())
	}
	var attached, missing []string
	seen := make(map[string]bool)
	for _, probe := range snapshot(t, p).Probes {
		if seen[probe.Name] = true; probe.Name == probePods {
			if probe.Attached || probe.Reason != "turned off" {
				t.Errorf("probe is %+v", probe)
			}
			continue
		}
		if _, ok := since[probe.Name]; !ok {
			t.Errorf("probe %+v is unheard of", probe)
			continue
		}
		partly := probe.Name == "audit" && strings.HasPrefix(probe.Reason, "refusals only: ")
		if probe.Attached != told(probe.Name) || probe.Attached != (probe.Reason == "" || partly) {
			t.Errorf("probe is %+v, want it attached: %t", probe, told(probe.Name))
		}
		if probe.Attached {
			attached = append(attached, fmt.Sprintf("%s (%s)", probe.Name, probe.Mechanism))
		} else {
			missing = append(missing, probe.Name)
		}
	}
	for name := range since {
		// What is part of another probe is only named where it is missing.
		if !seen[name] && (name != "syn_queue" || !told(name)) {
			t.Errorf("%s is not named", name)
		}
	}
	slices.Sort(attached)
	slices.Sort(missing)
	t.Logf("sockq on %s, tier %s: attached %s; missing %s",
		p.kernel.Release, p.kernel.Tier, strings.Join(attached, ", "), strings.Join(missing, ", "))
}
