package tracker

import (
	"math"
	"math/big"
	"math/rand/v2"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// bucketOf is the programs' own bucket_of, alone in a program.
func bucketOf(t *testing.T) func(ns uint64) int {
	t.Helper()
	spec, err := loadStates()
	if err != nil {
		t.Fatal(err)
	}
	instructions := asm.Instructions{
		asm.LoadMem(asm.R1, asm.R1, 0, asm.DWord),
		asm.Call.Label("bucket_of"),
		asm.Return(),
	}
	within := false
	for _, ins := range spec.Programs["state_changed"].Instructions {
		if symbol := ins.Symbol(); symbol != "" {
			within = symbol == "bucket_of"
		}
		if within {
			symbol, reference := ins.Symbol(), ins.Reference()
			ins.Metadata = asm.Metadata{}
			instructions = append(instructions, ins.WithSymbol(symbol).WithReference(reference))
		}
	}
	if len(instructions) < 10 {
		t.Fatal("there is no bucket_of")
	}
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.Syscall, Flags: unix.BPF_F_SLEEPABLE, License: "Dual BSD/GPL", Instructions: instructions,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { program.Close() })
	return func(ns uint64) int {
		bucket, err := program.Run(&ebpf.RunOptions{Context: ns})
		if err != nil {
			t.Fatal(err)
		}
		return int(bucket)
	}
}

// bucketFor is the bucket of a duration, exactly: the first whose bound it does
// not exceed.
func bucketFor(ns uint64) int {
	duration := new(big.Rat).SetFrac(new(big.Int).SetUint64(ns), big.NewInt(1e9))
	for i := range Buckets - 1 {
		if duration.Cmp(new(big.Rat).SetFloat64(Bound(i))) <= 0 {
			return i
		}
	}
	return Buckets - 1
}

func TestBucketOf(t *testing.T) {
	if !needs(t, StoryStateSeconds) {
		return // nor can its programs run without a tracepoint
	}
	bucket := bucketOf(t)
	check := func(ns uint64) {
		t.Helper()
		got := bucket(ns)
		// Near a bound the fixed point is off by 76 ns and 1 in 10 million.
		slack := 76 + ns/10_000_000
		if low, high := bucketFor(ns-min(ns, slack)), bucketFor(ns+slack); got < low || got > high {
			t.Errorf("%d ns are in bucket %d, want %d to %d", ns, got, low, high)
		}
		if ns > 10_000 && ns < 1<<53 {
			exponent := math.Log2(float64(ns) / 1e9)
			if math.Abs(exponent-math.Round(exponent)) > 0.02 && Exponent(got) != min(int(math.Ceil(exponent)), Exponent(Buckets-1)) {
				t.Errorf("%d ns are in bucket up to 2^%d s, the logarithm is %f", ns, Exponent(got), exponent)
			}
		}
	}
	for ns := range uint64(5000) {
		check(ns)
	}
	for i := range Buckets {
		bound := uint64(Bound(i) * 1e9)
		for _, d := range []uint64{bound / 100, 76, 1} {
			check(bound - d)
			check(bound + d)
		}
		check(bound)
		// The bounds are upper ones.
		if i < Buckets-1 && bucket(bound+bound/10+100) != i+1 {
			t.Errorf("what exceeds the bound of bucket %d is in bucket %d", i, bucket(bound+bound/10+100))
		}
	}
	for range 20_000 {
		check(rand.Uint64() >> (10 + rand.IntN(54)))
	}
	// A clock may step back by some ns from one CPU to the next.
	for _, back := range []uint64{1, 100, 1_000_000} {
		if got := bucket(-back); got != 0 {
			t.Errorf("-%d ns are in bucket %d", back, got)
		}
	}
	// Whatever a broken clock says, it is a bucket.
	for _, ns := range []uint64{math.MaxUint64, math.MaxInt64, 1 << 63, 1 << 58} {
		if got := bucket(ns); got < 0 || got >= Buckets {
			t.Errorf("%d ns are in bucket %d", ns, got)
		}
	}
}

func TestBounds(t *testing.T) {
	if Bound(0) != math.Pow(2, -20) || Bound(20) != 1 || Bound(Buckets-1) != 1<<24 || Exponent(19) != -1 {
		t.Errorf("bounds are %v, %v, %v", Bound(0), Bound(20), Bound(Buckets-1))
	}
}

func TestAddSince(t *testing.T) {
	var now, before, sum Histogram
	before.Buckets[3], before.Sum = 2, 20
	now.Buckets[3], now.Buckets[44], now.Sum = 5, 1, 100
	sum.Buckets[3], sum.Sum = 1, 1
	sum.AddSince(&now, &before)
	if sum.Buckets[3] != 4 || sum.Buckets[44] != 1 || sum.Sum != 81 || sum.Count() != 5 {
		t.Errorf("sum is %+v", sum)
	}
}
