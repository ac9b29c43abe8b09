package main

import (
	"context"
	"fmt"
	"slices"
	"time"
)

// samples are one value a round.
type samples []float64

// median is the middle value, or the mean of the two in the middle; 0 of none.
func (s samples) median() float64 {
	if len(s) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(s))
	mid := len(sorted) / 2
	if len(sorted)%2 == 1 {
		return sorted[mid]
	}
	return (sorted[mid-1] + sorted[mid]) / 2
}

// mean is the average, 0 of none.
func (s samples) mean() (mean float64) {
	for _, v := range s {
		mean += v / float64(len(s))
	}
	return mean
}

// over divides round by round: what one costs in times of the other, under the
// same noise. Rounds without a cost are left out.
func (s samples) over(other samples) samples {
	var ratios samples
	for i := range min(len(s), len(other)) {
		if other[i] > 0 {
			ratios = append(ratios, s[i]/other[i])
		}
	}
	return ratios
}

// spread is the median with the least and the largest value.
func (s samples) spread(unit string) string {
	if len(s) == 0 {
		return "–"
	}
	return number(s.median()) + unit + s.bounds()
}

// bounds are the least and the largest value, nothing if there is only one.
func (s samples) bounds() string {
	if len(s) < 2 {
		return ""
	}
	return fmt.Sprintf(" (%s–%s)", number(slices.Min(s)), number(slices.Max(s)))
}

// in divides by a unit.
func (s samples) in(unit float64) samples {
	divided := make(samples, len(s))
	for i, v := range s {
		divided[i] = v / unit
	}
	return divided
}

// quantile is the value that a share q of all values do not exceed, between two
// of them in proportion; 0 of none.
func (s samples) quantile(q float64) float64 {
	if len(s) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(s))
	at := q * float64(len(sorted)-1)
	low := int(at)
	high := min(low+1, len(sorted)-1)
	return sorted[low] + (at-float64(low))*(sorted[high]-sorted[low])
}

// quartiles is the median with the values between which the middle half lies.
func (s samples) quartiles(unit string) string {
	if len(s) == 0 {
		return "–"
	}
	return fmt.Sprintf("%s%s (quartiles %s to %s)", number(s.median()), unit, number(s.quantile(0.25)), number(s.quantile(0.75)))
}

// number has three digits that count.
func number(v float64) string {
	switch {
	case v < 0:
		return "−" + number(-v)
	case v >= 99.95:
		return fmt.Sprintf("%.0f", v)
	case v >= 9.995:
		return fmt.Sprintf("%.1f", v)
	case v >= 0.9995 || v == 0:
		return fmt.Sprintf("%.2f", v)
	}
	return fmt.Sprintf("%.3f", v)
}

// method is one way to do what a group measures.
type method struct {
	name    string
	run     func() (time.Duration, error)
	targets []target
	ms      samples // CPU milliseconds, one a round
}

// target is what a method should reach: so many times cheaper than another at
// the least, or so dear at the most.
type target struct {
	text    string
	against string  // the method to compare with, "" for none
	least   float64 // times cheaper than that
	most    float64 // times the cost of that, or milliseconds without it
}

// group is a set of methods that answer the same question.
type group struct {
	what     string
	baseline string // the method that the table's ratio refers to
	methods  []*method
}

// measure runs A B C A B C…, after one round that is not counted.
func (g *group) measure(ctx context.Context, rounds int) error {
	for round := range rounds + 1 {
		for _, m := range g.methods {
			if err := ctx.Err(); err != nil {
				return err
			}
			took, err := m.run()
			if err != nil {
				return fmt.Errorf("%s, %s: %w", g.what, m.name, err)
			}
			if round > 0 {
				m.ms = append(m.ms, milliseconds(took))
			}
		}
	}
	return nil
}

func (g *group) find(name string) *method {
	for _, m := range g.methods {
		if m.name == name {
			return m
		}
	}
	return nil
}

// rows are the group's part of the table.
func (g *group) rows() []row {
	rows := make([]row, 0, len(g.methods))
	base := g.find(g.baseline)
	for _, m := range g.methods {
		r := row{what: g.what, method: m.name, cost: m.ms.spread(" ms")}
		switch {
		case base == m:
			r.ratio = "1"
		case base != nil:
			r.ratio = base.ms.over(m.ms).spread("")
		}
		for _, t := range m.targets {
			r.verdicts = append(r.verdicts, g.judge(m, t))
		}
		rows = append(rows, r)
	}
	return rows
}

func (g *group) judge(m *method, t target) verdict {
	if t.against == "" {
		return verdict{t.text, yesNo(m.ms.median() <= t.most)}
	}
	other := g.find(t.against)
	if other == nil {
		return verdict{t.text, "not measured"}
	}
	ratios := other.ms.over(m.ms)
	met := ratios.median() >= t.least
	if t.most > 0 {
		ratios = m.ms.over(other.ms)
		met = ratios.median() <= t.most
	}
	v := verdict{t.text, yesNo(met)}
	if t.against != g.baseline {
		v.met += ", " + ratios.spread("×")
	}
	return v
}

func yesNo(met bool) string {
	if met {
		return "yes"
	}
	return "**no**"
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
