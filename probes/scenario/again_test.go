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
	if !failing.failed || !slices.Equal(failing.said, []string{"1 of 2", "the end"}) {
		t.Errorf("failed: %v, said %q", failing.failed, failing.said)
	}
	if want := []string{"second cleanup", "first cleanup"}; !slices.Equal(steps, want) {
		t.Errorf("steps are %q, want %q", steps, want)
	}
	passing := &attempt{TB: t}
	passing.run(func(tb testing.TB) { tb.Log("nothing is wrong") })
	if passing.failed || len(passing.said) > 0 {
		t.Errorf("failed: %v, said %q", passing.failed, passing.said)
	}
}
