package scenario

import (
	"fmt"
	"runtime"
	"slices"
	"sync"
	"testing"

	"github.com/cilium/ebpf/btf"
)

// attempts is how often a scenario is played where the kernel hides events: what is
// wrong fails each time.
const attempts = 3

// play runs fn, and where the kernel hides events again if it failed.
//
// What a timer does to a socket is missed there as often as PID 1 runs.
func play(t *testing.T, fn func(tb testing.TB)) {
	if !HidesInit() {
		fn(t)
		return
	}
	for n := 1; ; n++ {
		a := &attempt{TB: t}
		if a.run(fn); !a.failed || t.Failed() {
			return
		}
		for _, line := range a.said {
			t.Logf("attempt %d: %s", n, line)
		}
		if n == attempts {
			t.Fatalf("%d attempts failed", n)
		}
	}
}

// attempt is a test whose failure is one of several.
type attempt struct {
	testing.TB
	failed   bool
	said     []string
	cleanups []func()
}

func (a *attempt) run(fn func(tb testing.TB)) {
	ended := make(chan struct{})
	go func() { // Fatal ends it
		defer close(ended)
		defer a.cleanUp()
		fn(a)
	}()
	<-ended
}

func (a *attempt) cleanUp() {
	for len(a.cleanups) > 0 {
		last := len(a.cleanups) - 1
		fn := a.cleanups[last]
		a.cleanups = slices.Delete(a.cleanups, last, last+1)
		fn()
	}
}

func (a *attempt) Cleanup(fn func()) { a.cleanups = append(a.cleanups, fn) }
func (a *attempt) Failed() bool      { return a.failed }
func (a *attempt) Fail()             { a.failed = true }

func (a *attempt) FailNow() {
	a.Fail()
	runtime.Goexit()
}

func (a *attempt) Error(args ...any) {
	a.said = append(a.said, fmt.Sprint(args...))
	a.Fail()
}

func (a *attempt) Errorf(format string, args ...any) { a.Error(fmt.Sprintf(format, args...)) }

func (a *attempt) Fatal(args ...any) {
	a.Error(args...)
	runtime.Goexit()
}

func (a *attempt) Fatalf(format string, args ...any) { a.Fatal(fmt.Sprintf(format, args...)) }

// HidesInit tells whether this is one of the microVM kernels that run no program of
// anybody else in the time of PID 1, nor in interrupts that come then, and do not count
// it.
var HidesInit = sync.OnceValue(func() bool {
	kernel, err := btf.LoadKernelSpec()
	if err != nil {
		return false // it runs no program at all
	}
	var aux *btf.Struct
	if err := kernel.TypeByName("bpf_prog_aux", &aux); err != nil {
		return false
	}
	return slices.ContainsFunc(aux.Members, func(m btf.Member) bool { return m.Name == "init_owned" })
})
