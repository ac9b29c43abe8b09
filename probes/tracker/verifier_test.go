package tracker

import (
	"bufio"
	"cmp"
	"flag"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"sockq/probes/scenario"
)

var update = flag.Bool("update", false, "write testdata/verifier.txt anew for this kernel's series")

// program is one on a series of kernels, such as 6.18.
type program struct{ name, series string }

// TestVerifier compares how many instructions the verifier walks through, which
// its limit of a million is about, with what was recorded for this series. They
// differ between builds of one series, too: in kernel guests they only have to
// stay far from the limit.
func TestVerifier(t *testing.T) {
	tr := openTracker(t, everything)
	specs, err := tr.specs()
	if err != nil {
		t.Fatal(err)
	}
	if err := tr.setStates(specs.states, true); err != nil {
		t.Fatal(err)
	}
	others := []string{"state_changed_untimed"} // which this kernel does not need
	if owed(StoryStateSeconds) && tr.changedAgain == nil {
		others = append(others, "state_changed_again")
	}
	for _, name := range others {
		if _, err := tr.load(specs.states, name); err != nil {
			t.Fatal(err)
		}
	}
	var programs []*ebpf.Program
	for _, c := range tr.closers {
		if p, ok := c.(*ebpf.Program); ok {
			programs = append(programs, p)
		}
	}
	if events, returns := programsOwed(); len(programs) != events+returns+len(others) {
		t.Errorf("%d programs", len(programs))
	}
	compareVerified(t, programs)
}

func compareVerified(t *testing.T, programs []*ebpf.Program) {
	t.Helper()
	if os.Getenv("SOCKQ_TEST_GUEST") != "" {
		for _, p := range programs {
			info, err := p.Info()
			if err != nil {
				t.Fatal(err)
			}
			n, ok := info.VerifiedInstructions()
			if ok != scenario.KernelAtLeast(5, 16) || n > 100_000 {
				t.Errorf("%s: the verifier walks through %d instructions (known: %t)", nameOf(p), n, ok)
			}
			t.Logf("%s %s %d", kernelSeries(t), nameOf(p), n)
		}
		return
	}
	const file = "testdata/verifier.txt"
	recorded := readVerified(t, file)
	series := kernelSeries(t)
	known := false
	for at := range recorded {
		known = known || at.series == series
	}
	if !known && !*update {
		t.Logf("nothing is recorded for Linux %s", series)
		return
	}
	for _, p := range programs {
		info, err := p.Info()
		if err != nil {
			t.Fatal(err)
		}
		n, ok := info.VerifiedInstructions()
		if !ok {
			t.Fatalf("%s: this kernel does not count", p)
		}
		at := program{nameOf(p), series}
		if *update {
			recorded[at] = n
			continue
		}
		was, ok := recorded[at]
		if !ok {
			t.Errorf("%s is not recorded: go test -run Verifier -update", at.name)
		} else if n > was+was/10 {
			t.Errorf("%s: the verifier walks through %d instructions, recorded are %d", at.name, n, was)
		}
	}
	if *update {
		writeVerified(t, file, recorded)
	}
}

// nameOf is the program's own name; the kernel keeps 15 letters of it.
func nameOf(p *ebpf.Program) string {
	_, name, _ := strings.Cut(p.String(), "(")
	name, _, _ = strings.Cut(name, ")")
	return name
}

func kernelSeries(t *testing.T) string {
	t.Helper()
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		t.Fatal(err)
	}
	var major, minor int
	if _, err := fmt.Sscanf(unix.ByteSliceToString(name.Release[:]), "%d.%d", &major, &minor); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%d.%d", major, minor)
}

func readVerified(t *testing.T, file string) map[program]uint32 {
	t.Helper()
	recorded := make(map[program]uint32)
	f, err := os.Open(file)
	if os.IsNotExist(err) && *update {
		return recorded
	}
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		var at program
		var n uint32
		if _, err := fmt.Sscan(lines.Text(), &at.series, &at.name, &n); err != nil {
			t.Fatalf("read %s: %q: %v", file, lines.Text(), err)
		}
		recorded[at] = n
	}
	return recorded
}

func writeVerified(t *testing.T, file string, recorded map[program]uint32) {
	t.Helper()
	var b strings.Builder
	for _, at := range slices.SortedFunc(maps.Keys(recorded), func(a, b program) int {
		return cmp.Or(cmp.Compare(a.series, b.series), cmp.Compare(a.name, b.name))
	}) {
		fmt.Fprintf(&b, "%s %s %d\n", at.series, at.name, recorded[at])
	}
	if err := os.WriteFile(file, []byte(b.String()), 0o644); err != nil {
		t.Fatal(err)
	}
}
