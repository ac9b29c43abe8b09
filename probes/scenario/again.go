package scenario

import (
	"fmt"
	"runtime"
	"slices"
	"sync"
	"testing"

	"github.com/cilium/ebpf/btf"
)

// attempts is how often a scenario is played where the kernel kept events from
// programs: what is wrong fails each time.
const attempts = 3

// Play runs fn, and again if it failed while the kernel kept events from programs:
// it counted that, or it hides the time of PID 1, in which timers fire, too. One
// interrupt that finds a program running may bring the packets of many connections.
// missed is how many events it counted so far.
func Play(t testing.TB, missed func() uint64, fn func(tb testing.TB)) {
	for n := 1; ; n++ {
		before := missed()
		a := &attempt{TB: t}
		if a.run(fn); !a.failed || t.Failed() {
			return
		}
		more := missed() - before
		t.Logf("attempt %d failed, programs missed %d events", n, more)
		if n == attempts || more == 0 && !HidesInit() {
			t.FailNow()
		}
	}
}

// attempt is a test whose failure is one of several.
type attempt struct {
	testing.TB
	failed   bool
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
	a.Helper()
	a.Log(args...)
	a.Fail()
}

func (a *attempt) Errorf(format string, args ...any) {
	a.Helper()
	a.Error(fmt.Sprintf(format, args...))
}

func (a *attempt) Fatal(args ...any) {
	a.Helper()
	a.Error(args...)
	runtime.Goexit()
}

func (a *attempt) Fatalf(format string, args ...any) {
	a.Helper()
	a.Fatal(fmt.Sprintf(format, args...))
}

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
