package sockdiag

import (
	"math/rand/v2"
	"testing"
)

func TestCookieSet(t *testing.T) {
	var set cookieSet
	r := rand.New(rand.NewPCG(1, 2))
	want := make(map[uint64]bool)
	for i := range uint64(50000) {
		// Sequential like the kernel's, repeated, and spread.
		for _, cookie := range []uint64{i + 1, r.Uint64N(1000) + 1, r.Uint64() | 1} {
			if got := set.add(cookie); got == want[cookie] {
				t.Fatalf("add %#x: new %t, want %t", cookie, got, !want[cookie])
			}
			want[cookie] = true
		}
	}
	if set.used != len(want) {
		t.Errorf("%d cookies, want %d", set.used, len(want))
	}
	set.reset()
	if set.used != 0 || !set.add(1) || set.add(1) {
		t.Error("the set was not emptied")
	}
}

func TestCookieSetZero(t *testing.T) {
	var set cookieSet
	for range 3 {
		if !set.add(0) {
			t.Fatal("no cookie was taken for a cookie")
		}
	}
	if set.slots != nil {
		t.Error("the empty set has memory")
	}
}

func TestCookieSetLimit(t *testing.T) {
	set := cookieSet{limit: 1 << 12}
	forgot := 0
	for i := range uint64(100000) {
		before := set.used
		if !set.add(i + 1) {
			t.Fatalf("%d is not new", i+1)
		}
		if set.used < before {
			forgot++
		}
		if len(set.slots) > set.limit {
			t.Fatalf("%d slots exceed the limit", len(set.slots))
		}
		if set.add(i + 1) {
			t.Fatalf("%d is new twice", i+1)
		}
	}
	if forgot != 100000/(1<<12/4*3) {
		t.Errorf("forgot %d times", forgot)
	}
}

func TestCookieSetShrinks(t *testing.T) {
	var set cookieSet
	use := func(n int) int {
		set.reset()
		for i := range n {
			set.add(uint64(i + 1))
		}
		return len(set.slots)
	}
	big := use(1 << 20)
	if got := use(1000); got != big {
		t.Errorf("%d slots right after a big dump, want %d", got, big)
	}
	if got := use(1000); got != 2048 {
		t.Errorf("%d slots after two small dumps, want 2048", got)
	}
	if n := testing.AllocsPerRun(10, func() { use(1000) }); n != 0 {
		t.Errorf("%.0f allocations with the memory at hand", n)
	}
}
