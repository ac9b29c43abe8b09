package catalogue

import (
	"regexp"
	"slices"
	"strings"
	"testing"
)

var (
	metricName = regexp.MustCompile(`^sockq_[a-z][a-z0-9_]*[a-z0-9]$`)
	labelName  = regexp.MustCompile(`^[a-z][a-z_]*$`)
)

// What promlint cannot see of metrics that are not exported yet, and what it
// does not ask of those that are.
func TestMetricsKeepTheConventions(t *testing.T) {
	seen := make(map[string]bool)
	for _, m := range All {
		if seen[m.Name] {
			t.Errorf("%s is there twice", m.Name)
		}
		seen[m.Name] = true
		if !metricName.MatchString(m.Name) {
			t.Errorf("%s: not a name", m.Name)
		}
		if counter := strings.HasSuffix(m.Name, "_total"); counter != (m.Type == Counter) {
			t.Errorf("%s is a %s", m.Name, m.Type)
		}
		if m.Type == Histogram && !strings.HasSuffix(m.Name, "_seconds") {
			t.Errorf("%s: a histogram without its unit", m.Name)
		}
		if !strings.HasSuffix(m.Help, ".") || strings.ContainsAny(m.Help, "\n|") {
			t.Errorf("%s: help must be one line of sentences: %q", m.Name, m.Help)
		}
		if len(m.Labels) == 0 {
			t.Errorf("%s: no label", m.Name)
		}
		labels := slices.Clone(m.Labels)
		slices.Sort(labels)
		if len(slices.Compact(labels)) != len(m.Labels) {
			t.Errorf("%s: a label is there twice: %v", m.Name, m.Labels)
		}
		for _, l := range m.Labels {
			if !labelName.MatchString(l) {
				t.Errorf("%s: label %q", m.Name, l)
			}
		}
		switch m.Type {
		case Gauge, Counter, Histogram:
		default:
			t.Errorf("%s: type %q", m.Name, m.Type)
		}
		switch m.Tiers {
		case AllTiers, TiersAB:
		default:
			t.Errorf("%s: tiers %q", m.Name, m.Tiers)
		}
		if (len(m.Buckets) > 0) != (m.Type == Histogram) || !slices.IsSorted(m.Buckets) ||
			len(slices.Compact(slices.Clone(m.Buckets))) != len(m.Buckets) {
			t.Errorf("%s: a %s with the classic buckets %v", m.Name, m.Type, m.Buckets)
		}
	}
}

// Appending to one metric's labels must not write into another's.
func TestLabelsAreNotShared(t *testing.T) {
	if got := append(AcceptQueueLength.Labels, "x"); got[6] != "x" || Drops.Labels[6] != "reason" || Verdict.Labels[6] != "verdict" {
		t.Errorf("labels share memory: %v, %v", Drops.Labels, Verdict.Labels)
	}
}
