package scenario

import (
	"slices"
	"testing"
)

func TestAttempt(t *testing.T) {
	var steps []string
	step := func(s string) func() { return func() { steps = append(steps, s) } }
	failing := &attempt{TB: t}
	failing.run(func(tb testing.TB) {
		tb.Cleanup(step("first cleanup"))
		tb.Cleanup(step("second cleanup"))
		tb.Errorf("%d of %d", 1, 2)
		if !tb.Failed() {
			t.Error("an error is no failure")
		}
		tb.Fatal("the end")
		step("after the end")()
	})
	if !failing.failed {
		t.Error("what failed did not fail")
	}
	if want := []string{"second cleanup", "first cleanup"}; !slices.Equal(steps, want) {
		t.Errorf("steps are %q, want %q", steps, want)
	}
	passing := &attempt{TB: t}
	passing.run(func(tb testing.TB) { tb.Log("nothing is wrong") })
	if passing.failed {
		t.Error("what passed failed")
	}
}

// Only what the kernel kept from programs excuses a failure, and not three times.
func TestPlayAgain(t *testing.T) {
	once := 1
	if HidesInit() {
		once = attempts
	}
	for name, test := range map[string]struct {
		misses  []uint64 // of each attempt
		fails   int      // attempts that fail
		attempt int      // the last
		failed  bool
	}{
		"passes":                          {misses: []uint64{0}, attempt: 1},
		"passes though events are missed": {misses: []uint64{1}, attempt: 1},
		"fails":                           {misses: []uint64{0, 0, 0}, fails: 3, attempt: once, failed: true},
		"fails once":                      {misses: []uint64{6, 0}, fails: 1, attempt: 2},
		"fails each time":                 {misses: []uint64{6, 1, 1}, fails: 3, attempt: 3, failed: true},
	} {
		t.Run(name, func(t *testing.T) {
			number, missed := 0, uint64(41) // earlier ones
			outer := &attempt{TB: t}
			outer.run(func(tb testing.TB) {
				Play(tb, func() uint64 { return missed }, func(tb testing.TB) {
					missed += test.misses[number]
					if number++; number <= test.fails {
						tb.Error("as it should")
					}
				})
			})
			if number != test.attempt || outer.failed != test.failed {
				t.Errorf("%d attempts, failed: %t; want %d, %t", number, outer.failed, test.attempt, test.failed)
			}
		})
	}
}
