package main

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestMedian(t *testing.T) {
	for _, c := range []struct {
		values samples
		want   float64
	}{
		{nil, 0},
		{samples{4}, 4},
		{samples{9, 1}, 5},
		{samples{9, 1, 2}, 2},
		{samples{10, 1, 2, 4}, 3},
	} {
		before := slices.Clone(c.values)
		if got := c.values.median(); got != c.want {
			t.Errorf("median of %v is %v, want %v", c.values, got, c.want)
		}
		if !slices.Equal(before, c.values) {
			t.Errorf("median changed %v to %v", before, c.values)
		}
	}
}

func TestMean(t *testing.T) {
	if got := (samples{1, 2, 6}).mean(); got != 3 {
		t.Errorf("mean is %v, want 3", got)
	}
	if got := (samples{}).mean(); got != 0 {
		t.Errorf("mean of nothing is %v", got)
	}
}

func TestQuantile(t *testing.T) {
	for _, c := range []struct {
		values  samples
		q, want float64
	}{
		{nil, 0.5, 0},
		{samples{4}, 0.25, 4},
		{samples{5, 1, 3, 2, 4}, 0.25, 2},
		{samples{5, 1, 3, 2, 4}, 0.75, 4},
		{samples{1, 2}, 0.25, 1.25},
		{samples{2, 1}, 1, 2},
		{samples{2, 1}, 0, 1},
	} {
		if got := c.values.quantile(c.q); got != c.want {
			t.Errorf("quantile %v of %v is %v, want %v", c.q, c.values, got, c.want)
		}
	}
	if got, want := (samples{-500, 1000, 250}).in(1000).quartiles(" µs"), "0.250 µs (quartiles −0.125 to 0.625)"; got != want {
		t.Errorf("quartiles are %q, want %q", got, want)
	}
	if got := (samples{}).quartiles(" µs"); got != "–" {
		t.Errorf("quartiles of nothing are %q", got)
	}
}

func TestSpread(t *testing.T) {
	for want, values := range map[string]samples{
		"–":                  nil,
		"7.00 ms":            {7},
		"2.00 ms (1.00–300)": {300, 1, 2},
	} {
		if got := values.spread(" ms"); got != want {
			t.Errorf("spread of %v is %q, want %q", values, got, want)
		}
	}
}

func TestNumber(t *testing.T) {
	for v, want := range map[float64]string{
		0: "0.00", 0.0314: "0.031", 0.9994: "0.999", 0.9996: "1.00", 9.994: "9.99", 9.996: "10.0", 99.94: "99.9", 99.96: "100", 2808.4: "2808", -0.5: "−0.500",
	} {
		if got := number(v); got != want {
			t.Errorf("number(%v) = %q, want %q", v, got, want)
		}
	}
}

func TestCount(t *testing.T) {
	for n, want := range map[int]string{
		0: "0", 100: "100", 1000: "1,000", 4693: "4,693", 10_000: "10k", 10_500: "10,500", 100_000: "100k", 1_000_000: "1M", 1_500_000: "1500k",
	} {
		if got := count(n); got != want {
			t.Errorf("count(%d) = %q, want %q", n, got, want)
		}
	}
}

// The median of ratios is not the ratio of medians: a slow round slows both.
func TestRatiosAreOfOneRound(t *testing.T) {
	slow, fast := samples{10, 100, 12}, samples{1, 10, 2}
	if got, want := slow.over(fast), (samples{10, 10, 6}); !slices.Equal(got, want) {
		t.Errorf("ratios are %v, want %v", got, want)
	}
	if got := (samples{1, 4}).over(samples{0, 2}); !slices.Equal(got, samples{2}) {
		t.Errorf("ratios are %v with a free round", got)
	}
}

func TestJudge(t *testing.T) {
	base := &method{name: "base", ms: samples{100, 120, 140}}
	walk := &method{name: "walk", ms: samples{10, 10, 10}}
	near := &method{name: "near", ms: samples{110, 120, 140}}
	g := &group{what: "census", baseline: "base", methods: []*method{base, walk, near}}
	for _, c := range []struct {
		m    *method
		t    target
		want string
	}{
		{walk, target{against: "base", least: 12}, "yes"},
		{walk, target{against: "base", least: 12.1}, "**no**"},
		{walk, target{against: "near", least: 12}, "yes, 12.0× (11.0–14.0)"},
		{near, target{against: "walk", most: 12}, "yes, 12.0× (11.0–14.0)"},
		{near, target{against: "walk", most: 11.9}, "**no**, 12.0× (11.0–14.0)"},
		{walk, target{most: 10}, "yes"},
		{walk, target{most: 9.9}, "**no**"},
		{walk, target{against: "absent", least: 1}, "not measured"},
	} {
		if got := g.judge(c.m, c.t); got.met != c.want {
			t.Errorf("%s with %+v: %q, want %q", c.m.name, c.t, got.met, c.want)
		}
	}
}

func TestRoundsTakeTurns(t *testing.T) {
	var order []string
	run := func(name string, took time.Duration) func() (time.Duration, error) {
		return func() (time.Duration, error) { order = append(order, name); return took, nil }
	}
	g := &group{what: "census", baseline: "a", methods: []*method{
		{name: "a", run: run("a", 4*time.Millisecond)},
		{name: "b", run: run("b", time.Millisecond)},
	}}
	if err := g.measure(t.Context(), 2); err != nil {
		t.Fatal(err)
	}
	if got, want := strings.Join(order, ""), "ababab"; got != want { // the first round is for warmth
		t.Errorf("order is %s, want %s", got, want)
	}
	rows := g.rows()
	if rows[0].cost != "4.00 ms (4.00–4.00)" || rows[0].ratio != "1" {
		t.Errorf("the first row is %+v", rows[0])
	}
	if rows[1].cost != "1.00 ms (1.00–1.00)" || rows[1].ratio != "4.00 (4.00–4.00)" {
		t.Errorf("the second row is %+v", rows[1])
	}
}

func TestRoundsEnd(t *testing.T) {
	failure := errors.New("failure")
	g := &group{what: "census", methods: []*method{{name: "walk", run: func() (time.Duration, error) { return 0, failure }}}}
	err := g.measure(t.Context(), 1)
	if !errors.Is(err, failure) || !strings.Contains(err.Error(), "census, walk") {
		t.Errorf("measure() = %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := g.measure(ctx, 1); !errors.Is(err, context.Canceled) {
		t.Errorf("measure() = %v after the end", err)
	}
}
