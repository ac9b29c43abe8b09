package collectors

import (
	"errors"
	"io"
	"math"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"

	"sockq/collectors/catalogue"
	"sockq/probes"
	"sockq/probes/tcpstate"
	"sockq/probes/tracker"
)

// native are the counts of a native histogram's buckets that count something,
// by their numbers.
func native(t testing.TB, id string, h *dto.Histogram) map[int32]uint64 {
	t.Helper()
	out := make(map[int32]uint64)
	deltas := h.PositiveDelta
	number, count := int32(0), int64(0)
	for i, span := range h.PositiveSpan {
		if i > 0 && span.GetOffset() < 0 || int(span.GetLength()) > len(deltas) {
			t.Fatalf("%s: spans %v for %d deltas", id, h.PositiveSpan, len(h.PositiveDelta))
		}
		number += span.GetOffset()
		for range span.GetLength() {
			count, deltas = count+deltas[0], deltas[1:]
			if count > 0 {
				out[number] = uint64(count)
			} else if count < 0 {
				t.Errorf("%s: bucket %d counts %d", id, number, count)
			}
			number++
		}
	}
	if len(deltas) > 0 {
		t.Errorf("%s: %d deltas too many", id, len(deltas))
	}
	return out
}

// checkHistogram holds both forms of a histogram against each other.
func checkHistogram(t testing.TB, id string, h *dto.Histogram) {
	t.Helper()
	if h.GetSchema() != 0 || h.GetZeroThreshold() != math.Ldexp(1, -20) {
		t.Errorf("%s: schema %d, zero threshold %v", id, h.GetSchema(), h.GetZeroThreshold())
	}
	buckets := native(t, id, h)
	upTo := func(bound float64) uint64 {
		n := h.GetZeroCount()
		for number, count := range buckets {
			if math.Ldexp(1, int(number)) <= bound {
				n += count
			}
		}
		return n
	}
	if n := upTo(math.Inf(1)); n != h.GetSampleCount() {
		t.Errorf("%s: %d in native buckets, %d in all", id, n, h.GetSampleCount())
	}
	bound := 0.0
	for _, b := range h.Bucket {
		if b.GetUpperBound() <= bound || math.IsInf(b.GetUpperBound(), 1) {
			t.Errorf("%s: bound %v follows %v", id, b.GetUpperBound(), bound)
		}
		bound = b.GetUpperBound()
		if n := upTo(bound); n != b.GetCumulativeCount() {
			t.Errorf("%s: %d at most %v s by the classic bucket, %d by the native ones", id, b.GetCumulativeCount(), bound, n)
		}
	}
}

// Our histogram is the one that the client library makes of the same durations,
// also after it showed others.
func TestHistogramIsTheClientLibrarys(t *testing.T) {
	const last = tracker.Buckets - 1
	tests := map[string]map[int]uint64{
		"nothing":                   {},
		"the first bucket alone":    {0: 3},
		"the second bucket alone":   {1: 2},
		"the last bucket alone":     {last: 2},
		"around the zero threshold": {0: 1, 1: 2, 2: 3},
		"neighbours":                {11: 5, 12: 1, 13: 9},
		"one empty between":         {20: 5, 22: 1},
		"far apart":                 {0: 1, 1: 1, 20: 7, 21: 1, last: 4},
		"all": func() map[int]uint64 {
			m := make(map[int]uint64)
			for i := range tracker.Buckets {
				m[i] = uint64(i*7%5 + 1)
			}
			return m
		}(),
	}
	for _, metric := range []*catalogue.Metric{catalogue.AcceptWaitSeconds, catalogue.ConnectSeconds, catalogue.StateSeconds} {
		var bounds []float64
		for _, exponent := range metric.Buckets {
			bounds = append(bounds, math.Ldexp(1, exponent))
		}
		ours := newHistogram(metric, nil)
		for name, counts := range tests {
			t.Run(metric.Name+"/"+name, func(t *testing.T) {
				theirs := prometheus.NewHistogram(prometheus.HistogramOpts{
					Name: "x", Buckets: bounds,
					NativeHistogramBucketFactor: 2, NativeHistogramZeroThreshold: math.Ldexp(1, -20),
				})
				var h tracker.Histogram
				for i, n := range counts {
					h.Buckets[i] = n
					for range n {
						theirs.Observe(tracker.Bound(i))
						// Bounds below 2^-9 s are no whole number of nanoseconds.
						h.Sum += tracker.Bound(i)
					}
				}
				ours.set(&h)
				checkHistogram(t, "ours", ours.metric.Histogram)
				var m dto.Metric
				if err := theirs.Write(&m); err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(shape(t, m.Histogram), shape(t, ours.metric.Histogram)); diff != "" {
					t.Errorf("(-client library +ours):\n%s", diff)
				}
				if got, want := ours.sum, m.Histogram.GetSampleSum(); math.Abs(got-want) > 1e-6 {
					t.Errorf("sum %v, want %v", got, want)
				}
			})
		}
	}
}

// distribution is what two histograms must have in common.
type distribution struct {
	Count, Zeros  uint64
	Schema        int32
	ZeroThreshold float64
	Native        map[int32]uint64
	Classic       map[float64]uint64
}

func shape(t *testing.T, h *dto.Histogram) distribution {
	d := distribution{
		Count: h.GetSampleCount(), Zeros: h.GetZeroCount(), Schema: h.GetSchema(), ZeroThreshold: h.GetZeroThreshold(),
		Native: native(t, "", h), Classic: make(map[float64]uint64),
	}
	for _, b := range h.Bucket {
		if !math.IsInf(b.GetUpperBound(), 1) {
			d.Classic[b.GetUpperBound()] = b.GetCumulativeCount()
		}
	}
	return d
}

// Every classic bound must be one of the tracker's, or its bucket stays empty.
func TestClassicBoundsAreTheTrackers(t *testing.T) {
	for _, m := range catalogue.All {
		for _, exponent := range m.Buckets {
			if i := exponent - tracker.Exponent(0); i < 0 || i >= tracker.Buckets {
				t.Errorf("%s: the tracker has no bound 2^%d", m.Name, exponent)
			}
		}
	}
}

// Both forms survive the way to Prometheus, the classic one as text, both as protobuf.
func TestNegotiatedFormats(t *testing.T) {
	const protobuf = "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited"
	g := New(&fixed{snapshot: full()})
	handler := promhttp.HandlerForTransactional(g, promhttp.HandlerOpts{ErrorHandling: promhttp.PanicOnError})
	// What text cannot carry is not compared.
	strip := func(h *dto.Histogram) *dto.Histogram {
		return &dto.Histogram{SampleCount: h.SampleCount, SampleSum: h.SampleSum, Bucket: slices.DeleteFunc(
			slices.Clone(h.Bucket), func(b *dto.Bucket) bool { return math.IsInf(b.GetUpperBound(), 1) })}
	}
	for _, test := range []struct {
		accept string
		native bool
	}{{protobuf, true}, {"text/plain;version=0.0.4", false}, {"", false}} {
		t.Run(test.accept, func(t *testing.T) {
			families, done, err := g.Gather()
			if err != nil {
				t.Fatal(err)
			}
			want := make(map[string]string)
			for _, f := range families {
				for i, m := range f.Metric {
					if m.Histogram != nil && !test.native {
						f.Metric[i] = &dto.Metric{Label: m.Label, Histogram: strip(m.Histogram)}
					}
				}
				want[f.GetName()] = f.String()
			}
			done()

			request := httptest.NewRequest(http.MethodGet, "/metrics", nil)
			request.Header.Set("Accept", test.accept)
			response := httptest.NewRecorder()
			handler.ServeHTTP(response, request)
			format := expfmt.ResponseFormat(response.Header())
			if (format.FormatType() == expfmt.TypeProtoDelim) != test.native {
				t.Fatalf("answered as %s", format)
			}
			decoder := expfmt.NewDecoder(response.Body, format)
			got, histograms := make(map[string]string), 0
			for {
				f := new(dto.MetricFamily)
				if err := decoder.Decode(f); errors.Is(err, io.EOF) {
					break
				} else if err != nil {
					t.Fatal(err)
				}
				for _, m := range f.Metric {
					if m.Histogram == nil {
						continue
					}
					histograms++
					if test.native {
						checkHistogram(t, f.GetName(), m.Histogram)
					} else {
						m.Histogram = strip(m.Histogram)
					}
				}
				got[f.GetName()] = f.String()
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("(-gathered +decoded):\n%s", diff)
			}
			if histograms != 5 {
				t.Errorf("%d histograms, want 5", histograms)
			}
		})
	}
}

// The times in states are the node's or each namespace's, never both.
func TestStateSecondsPerNamespace(t *testing.T) {
	const count = "sockq_tcp_state_seconds_count"
	src := &fixed{snapshot: full()}
	g := New(src)
	want := []string{count + `{state="ESTABLISHED"} 3510`, count + `{state="LAST_ACK"} 4010`}
	if diff := cmp.Diff(want, lines(text(t, g), count)); diff != "" {
		t.Errorf("node-wide (-want +got):\n%s", diff)
	}
	s := full()
	s.Namespaces[0].PodNamespace, s.Namespaces[0].Pod = "", ""
	s.Namespaces = append(s.Namespaces, s.Namespaces[0])
	s.Namespaces[1].Name = probes.Other
	s.Namespaces[0].StateSeconds, s.StateSeconds = s.StateSeconds, nil
	var other [tcpstate.Count]tracker.Histogram
	other[tcpstate.CloseWait].Buckets[20] = 5
	s.Namespaces[1].StateSeconds = &other
	src.snapshot = s
	want = []string{
		count + `{netns="host",state="ESTABLISHED"} 3510`,
		count + `{netns="other",state="CLOSE_WAIT"} 5`,
		count + `{netns="host",state="LAST_ACK"} 4010`,
	}
	got := lines(text(t, g), count)
	slices.Sort(got)
	slices.Sort(want)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("per namespace (-want +got):\n%s", diff)
	}
}

// A counter of a set whose last socket went stays; so do those of Other.
func TestCountersOutliveTheListener(t *testing.T) {
	s := full()
	s.Listeners[0].Live = false
	other := s.Listeners[0]
	other.ID, other.Address, other.LastAccept = 2, probes.Other, time.Time{}
	s.Listeners = append(s.Listeners, other)
	page := text(t, New(&fixed{snapshot: s}))
	for name, want := range map[string]int{
		"connections_total": 2, "accepts_total": 2, "drops_total": 20, "synack_retransmits_total": 2,
		"syns_total": 2, "half_open_ended_total": 16, "abandoned_total": 2, "handshake_seconds_count": 2,
		"accept_wait_seconds_count": 2, "last_accept_timestamp_seconds": 1, "backlog_requested": 0,
	} {
		if got := lines(page, "sockq_listener_"+name+"{"); len(got) != want {
			t.Errorf("%s: %s, want %d series", name, strings.Join(got, " "), want)
		}
	}
}

// Series whose labels are not known before keep their order, whatever comes first.
func TestVaryingSeriesAreOrdered(t *testing.T) {
	src := &fixed{snapshot: full()}
	g := New(src)
	const prefix = `sockq_tcp_resets_sent_total{namespace="shop",netns="host",pod="web-0",reason=`
	check := func(sent map[string]uint64, want ...string) {
		t.Helper()
		src.snapshot.Namespaces[0].ResetsSent = sent
		for i := range want {
			want[i] = prefix + want[i]
		}
		if diff := cmp.Diff(want, lines(text(t, g), prefix)); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	}
	check(map[string]uint64{"m": 1}, `"m"} 1`)
	check(map[string]uint64{"z": 3, "m": 2, "a": 1}, `"a"} 1`, `"m"} 2`, `"z"} 3`)
	check(map[string]uint64{"z": 4, "a": 1, "b": 9}, `"a"} 1`, `"b"} 9`, `"z"} 4`)
	check(nil)
}
