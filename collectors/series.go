package collectors

import (
	"slices"
	"strings"

	dto "github.com/prometheus/client_model/go"

	"sockq/collectors/catalogue"
)

// series is one line of a family. Its labels and the protobuf around its value
// are made once; a scrape sets the value.
type series struct {
	metric dto.Metric
	value  float64
}

func newSeries(t catalogue.Type, labels []*dto.LabelPair) *series {
	s := &series{metric: dto.Metric{Label: labels}}
	if t == catalogue.Counter {
		s.metric.Counter = &dto.Counter{Value: &s.value}
	} else {
		s.metric.Gauge = &dto.Gauge{Value: &s.value}
	}
	return s
}

// labels pairs names with values, in the order of the names' letters as every
// Prometheus client has them. A label without a value is no label.
func labels(names []string, values ...string) []*dto.LabelPair {
	out := make([]*dto.LabelPair, 0, len(names))
	for i := range names {
		if value := validUTF8(values[i]); value != "" {
			out = append(out, &dto.LabelPair{Name: &names[i], Value: &value})
		}
	}
	slices.SortFunc(out, func(a, b *dto.LabelPair) int { return strings.Compare(a.GetName(), b.GetName()) })
	return out
}

// family collects the series of one metric for one scrape.
type family struct {
	metric *catalogue.Metric
	dto.MetricFamily
}

func newFamily(m *catalogue.Metric) *family {
	f := &family{metric: m}
	f.Name, f.Help = &m.Name, &m.Help
	switch m.Type {
	case catalogue.Counter:
		f.Type = dto.MetricType_COUNTER.Enum()
	case catalogue.Histogram:
		f.Type = dto.MetricType_HISTOGRAM.Enum()
	default:
		f.Type = dto.MetricType_GAUGE.Enum()
	}
	return f
}

// show puts m into this scrape.
func (f *family) show(m *dto.Metric) { f.Metric = append(f.Metric, m) }

// add makes a series for this scrape alone.
func (f *family) add(value float64, labelValues ...string) {
	s := newSeries(f.metric.Type, labels(f.metric.Labels, labelValues...))
	s.value = value
	f.show(&s.metric)
}
