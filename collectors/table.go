package collectors

import (
	"strings"

	dto "github.com/prometheus/client_model/go"

	"sockq/collectors/catalogue"
)

// column is one series that every row of a table may have.
type column[T any] struct {
	metric *catalogue.Metric
	label  string // the value of the metric's label after the row's own, "" if it has none
	value  func(*T) (v float64, known bool)
}

// key are the values of a row's labels, "" where it has fewer.
type key [2]string

// row is the series of one thing, kept from scrape to scrape.
type row[T any] struct {
	scrape uint64 // the last that saw it
	item   *T     // what that scrape shows
	series []series
}

// table keeps the series of many things of a kind.
type table[T any] struct {
	columns []column[T]
	// key names an item, prefer chooses between two of one name: Prometheus
	// refuses a page that has a series twice.
	key    func(*T) key
	prefer func(a, b *T) bool // a over b

	families []*family // of the columns
	rows     map[key]*row[T]
	order    []*row[T] // those of this scrape
	scrape   uint64
}

func newTable[T any](g *Gatherer, columns []column[T], k func(*T) key, prefer func(a, b *T) bool) table[T] {
	t := table[T]{columns: columns, key: k, prefer: prefer, rows: make(map[key]*row[T])}
	for _, c := range columns {
		t.families = append(t.families, g.family(c.metric))
	}
	return t
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
	// One family after the other, so that each is in the items' order.
	for i := range t.columns {
		for _, r := range t.order {
			if v, known := t.columns[i].value(r.item); known {
				t.families[i].show(&r.series[i], v)
			}
		}
	}
	for _, r := range t.order {
		r.item = nil
	}
}

func (t *table[T]) newRow(k key) *row[T] {
	r := &row[T]{series: make([]series, len(t.columns))}
	var own []*dto.LabelPair // shared by the columns without a label of theirs
	for i, c := range t.columns {
		if c.label != "" {
			r.series[i].init(c.metric.Type, labels(c.metric.Labels, k[0], c.label))
			continue
		}
		if own == nil {
			own = labels(c.metric.Labels, k[:]...)
		}
		r.series[i].init(c.metric.Type, own)
	}
	return r
}

// validUTF8 is s as a label's value: the names of namespaces and devices may be
// any bytes.
func validUTF8(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }
