package collectors

import (
	"math"

	dto "github.com/prometheus/client_model/go"

	"sockq/collectors/catalogue"
	"sockq/probes/tracker"
)

// What all native histograms have in common. In schema 0 bucket i holds
// (2^(i-1), 2^i], so that its number is the exponent of the tracker's bucket;
// the tracker's first bucket, all of what is shorter, is the zero bucket.
var (
	nativeSchema  int32
	zeroThreshold = tracker.Bound(0)
)

// histogram is one distribution of a family, native and classic at once: the
// text format shows the classic buckets, protobuf both. All memory is its own
// from the start; a scrape sets the values.
type histogram struct {
	metric dto.Metric

	count, zeros uint64
	sum          float64
	// A single span from the lowest to the highest bucket with a count: an empty
	// bucket in between costs one byte, another span at least four.
	span   dto.BucketSpan
	offset int32
	length uint32
	spans  [1]*dto.BucketSpan
	deltas [tracker.Buckets - 1]int64

	exponents []int // of the classic buckets
	classic   []uint64
}

func newHistogram(m *catalogue.Metric, labels []*dto.LabelPair) *histogram {
	h := &histogram{exponents: m.Buckets, classic: make([]uint64, len(m.Buckets))}
	h.span = dto.BucketSpan{Offset: &h.offset, Length: &h.length}
	h.spans[0] = &h.span
	buckets := make([]dto.Bucket, len(m.Buckets))
	bounds := make([]float64, len(m.Buckets))
	list := make([]*dto.Bucket, len(m.Buckets))
	for i, exponent := range m.Buckets {
		bounds[i] = math.Ldexp(1, exponent)
		buckets[i].UpperBound, buckets[i].CumulativeCount = &bounds[i], &h.classic[i]
		list[i] = &buckets[i]
	}
	h.metric = dto.Metric{Label: labels, Histogram: &dto.Histogram{
		SampleCount: &h.count, SampleSum: &h.sum,
		Bucket: list,
		Schema: &nativeSchema, ZeroThreshold: &zeroThreshold, ZeroCount: &h.zeros,
	}}
	return h
}

func (h *histogram) set(t *tracker.Histogram) {
	h.sum = t.Sum
	h.zeros = t.Buckets[0]
	h.count = 0
	first, last := 0, -1 // of the buckets after the first that count something
	classic := 0
	for i, n := range t.Buckets {
		h.count += n
		if i > 0 && n > 0 {
			if last < 0 {
				first = i
			}
			last = i
		}
		if classic < len(h.classic) && tracker.Exponent(i) == h.exponents[classic] {
			h.classic[classic] = h.count
			classic++
		}
	}
	out := h.metric.Histogram
	if last < 0 {
		out.PositiveSpan, out.PositiveDelta = nil, nil
		return
	}
	h.offset, h.length = int32(tracker.Exponent(first)), uint32(last-first+1)
	before := uint64(0)
	for i, n := range t.Buckets[first : last+1] {
		h.deltas[i] = int64(n - before)
		before = n
	}
	out.PositiveSpan, out.PositiveDelta = h.spans[:], h.deltas[:h.length]
}
