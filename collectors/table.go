package collectors

import (
	"slices"
	"sort"
	"strings"

	dto "github.com/prometheus/client_model/go"

	"sockq/collectors/catalogue"
	"sockq/probes/tracker"
)

// columns are the series that every row of a table may have.
type columns[T any] struct {
	values     []valueColumn[T]
	histograms []histogramColumn[T]
	varying    []varyingColumn[T]
}

// A valueColumn is a gauge or a counter.
type valueColumn[T any] struct {
	metric *catalogue.Metric
	value  func(*T) (v float64, known bool)
	more   []string // values of the metric's labels after the row's own
}

// A histogramColumn is a histogram, nil where it is unknown.
type histogramColumn[T any] struct {
	metric *catalogue.Metric
	value  func(*T) *tracker.Histogram
	more   []string
}

// A varyingColumn is as many series as the item has.
type varyingColumn[T any] struct {
	metric *catalogue.Metric
	fill   func(*T, *varying)
}

// key are the values of a row's labels, "" where it has none.
type key [6]string

// row is the series of one thing, kept from scrape to scrape. Each is made when
// it is first shown.
type row[T any] struct {
	key    key
	scrape uint64           // the last that saw it
	item   *T               // what that scrape shows
	own    []*dto.LabelPair // shared by the series without a label of theirs

	values     []*series
	histograms []*histogram
	varying    []varying
}

// labels are those of a series of the row.
func (r *row[T]) labels(m *catalogue.Metric, more []string) []*dto.LabelPair {
	names, own := m.Labels, r.key[:len(m.Labels)-len(more)]
	if len(more) > 0 {
		return labels(names, slices.Concat(own, more)...)
	}
	if r.own == nil {
		r.own = labels(names, own...)
	}
	return r.own
}

// varying are the series of one row and metric whose labels are not known
// before they are counted, in the order of these labels.
type varying struct {
	scrape uint64
	all    []varyingSeries
	labels func(more []string) []*dto.LabelPair
	metric *catalogue.Metric
}

type varyingSeries struct {
	*series
	more   []string
	scrape uint64 // the last that set it
}

// set sets the series with these values of the metric's labels after the row's own.
func (v *varying) set(value float64, more ...string) {
	i := sort.Search(len(v.all), func(i int) bool { return slices.Compare(v.all[i].more, more) >= 0 })
	if i == len(v.all) || !slices.Equal(v.all[i].more, more) {
		kept := slices.Clone(more) // so that more needs no memory of the heap
		v.all = slices.Insert(v.all, i, varyingSeries{
			series: newSeries(v.metric.Type, v.labels(kept)), more: kept,
		})
	}
	v.all[i].value, v.all[i].scrape = value, v.scrape
}

// table keeps the series of many things of a kind.
type table[T any] struct {
	columns columns[T]
	// key names an item, prefer chooses between two of one name: Prometheus
	// refuses a page that has a series twice.
	key    func(*T) key
	prefer func(a, b *T) bool // a over b

	family func(*catalogue.Metric) *family
	rows   map[key]*row[T]
	order  []*row[T] // those of this scrape
	scrape uint64
}

func newTable[T any](g *Gatherer, c columns[T], k func(*T) key, prefer func(a, b *T) bool) table[T] {
	return table[T]{columns: c, key: k, prefer: prefer, family: g.family, rows: make(map[key]*row[T])}
}

// show puts the items that are there now into the families, and forgets the
// series of those that are not.
func (t *table[T]) show(items []T) {
	t.scrape++
	t.order = t.order[:0]
	for i := range items {
		item := &items[i]
		k := t.key(item)
		r := t.rows[k]
		if r == nil {
			r = t.newRow(k)
			t.rows[k] = r
		}
		if r.scrape != t.scrape {
			r.scrape, r.item = t.scrape, item
			t.order = append(t.order, r)
		} else if t.prefer(item, r.item) {
			r.item = item
		}
	}
	if len(t.rows) > len(t.order) {
		for k, r := range t.rows {
			if r.scrape != t.scrape {
				delete(t.rows, k)
			}
		}
	}
	t.showValues()
	t.showHistograms()
	t.showVarying()
	for _, r := range t.order {
		r.item = nil
	}
}

func (t *table[T]) newRow(k key) *row[T] {
	r := &row[T]{
		key:        k,
		values:     make([]*series, len(t.columns.values)),
		histograms: make([]*histogram, len(t.columns.histograms)),
		varying:    make([]varying, len(t.columns.varying)),
	}
	for i, c := range t.columns.varying {
		r.varying[i].metric = c.metric
		r.varying[i].labels = func(more []string) []*dto.LabelPair { return r.labels(c.metric, more) }
	}
	return r
}

// One column after the other, so that each family is in the items' order.

func (t *table[T]) showValues() {
	for i, c := range t.columns.values {
		f := t.family(c.metric)
		for _, r := range t.order {
			v, known := c.value(r.item)
			if !known {
				continue
			}
			s := r.values[i]
			if s == nil {
				s = newSeries(c.metric.Type, r.labels(c.metric, c.more))
				r.values[i] = s
			}
			s.value = v
			f.show(&s.metric)
		}
	}
}

func (t *table[T]) showHistograms() {
	for i, c := range t.columns.histograms {
		f := t.family(c.metric)
		for _, r := range t.order {
			v := c.value(r.item)
			if v == nil {
				continue
			}
			h := r.histograms[i]
			if h == nil {
				h = newHistogram(c.metric, r.labels(c.metric, c.more))
				r.histograms[i] = h
			}
			h.set(v)
			f.show(&h.metric)
		}
	}
}

func (t *table[T]) showVarying() {
	for i, c := range t.columns.varying {
		f := t.family(c.metric)
		for _, r := range t.order {
			v := &r.varying[i]
			v.scrape = t.scrape
			c.fill(r.item, v)
			for _, s := range v.all {
				if s.scrape == t.scrape {
					f.show(&s.metric)
				}
			}
		}
	}
}

// validUTF8 is s as a label's value: the names of namespaces and devices may be
// any bytes.
func validUTF8(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }
