package alerts_test

import (
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"testing"
	"time"
)

// dashboard is what matters here of Grafana's JSON.
type dashboard struct {
	UID         string
	Panels      []panel
	Templating  struct{ List []variable }
	Annotations struct {
		List []struct {
			Name, Expr string
			BuiltIn    int
		}
	}
}

type panel struct {
	Title, Type string
	Panels      []panel // of a row
	Targets     []struct {
		RefID   string
		Expr    string
		Instant bool
	}
}

type variable struct {
	Name, Type string
	Query      json.RawMessage // a string, or an object that has one
	AllValue   string
	IncludeAll bool
}

// query is something that a dashboard asks Prometheus.
type query struct {
	where   string // uid, panel and letter
	expr    string
	instant bool
	label   string // whose values are asked for; "" for an expression
}

// legitimatelyEmpty are queries that have no data here. Each has a query that tells
// when they must have: what it lists is then there.
var legitimatelyEmpty = []exception{
	{"sockq-listener/Arrivals and accepts/A", refusals, "no tracepoint tells of SYNs"},
	{"sockq-listener/Arrivals and accepts/D", halfOpen, "no tracepoint tells of connections that nobody accepts"},
	{"sockq-listener/SYN cookies/A", refusals, "tracepoints tell of no SYN cookie"},
	{"sockq-listener/SYN cookies/B", refusals, "tracepoints tell of no SYN cookie"},
	{"sockq-listener/Ends of half-open connections/A", halfOpen, "no tracepoint tells of requests"},
	{"sockq-listener/Handshake times/A", halfOpen, "no tracepoint tells of requests"},
	{"sockq-listener/Handshake times: quantiles/A", halfOpen, "no tracepoint tells of requests"},
	{"sockq-listener/Handshake times: quantiles/B", halfOpen, "no tracepoint tells of requests"},
	{"sockq-states/Time in SYN_RECV/A", halfOpen, "no tracepoint tells of requests"},
	{"sockq-states/Time in FIN_WAIT2/A", timeWait, "FIN_WAIT2 may become a TIME_WAIT, of which no tracepoint tells"},
	{"sockq-states/Time in TIME_WAIT/A", timeWait, "no tracepoint tells of TIME_WAIT"},
	{"sockq-states/Transitions that TCP does not have/A", "sockq_tcp_unexpected_transitions_total", "there are none"},
	{"sockq-agent/Sources that fail/A", "min_over_time(sockq_source_up[10m]) == 0", "none fails"},
	{"sockq-agent/Lost, by what/A", "increase(sockq_lost_total[10m]) > 0", "nothing was lost"},
	{"sockq-agent/variable/cluster", cluster, "the target has no such label"},
	{"sockq-fleet/variable/cluster", cluster, "the target has no such label"},
	{"sockq-listener/variable/cluster", cluster, "the target has no such label"},
	{"sockq-states/variable/cluster", cluster, "the target has no such label"},
	{"sockq-listener/variable/namespace", pods, "nothing runs in a pod"},
	{"sockq-listener/variable/pod", pods, "nothing runs in a pod"},
	{"sockq-states/variable/namespace", pods, "nothing runs in a pod"},
	{"sockq-states/variable/pod", pods, "nothing runs in a pod"},
}

const (
	refusals = `sockq_probe_attached{probe="refusals"} == 1`
	halfOpen = `sockq_probe_attached{probe="half_open"} == 1`
	timeWait = `sockq_probe_attached{probe="time_wait"} == 1`
	cluster  = `sockq_build_info{cluster!=""}`
	pods     = `sockq_listener_accept_queue_limit{pod!=""}`
)

type exception struct{ where, unless, because string }

// variables are replaced as Grafana does where everything is chosen.
var variables = regexp.MustCompile(`\$\{(\w+)(?::\w+)?\}|\$(\w+)`)

func (d dashboard) queries(t *testing.T) []query {
	t.Helper()
	values := map[string]string{
		"__rate_interval": "1m", "__interval": "15s", "__interval_ms": "15000",
		"__range": "5m", "__range_s": "300", "__range_ms": "300000",
	}
	for _, v := range d.Templating.List {
		switch {
		case v.Type == "query" && v.IncludeAll && v.AllValue != "":
			values[v.Name] = v.AllValue
		case v.Type == "query":
			t.Errorf("%s: variable %s has no value for all", d.UID, v.Name)
		}
	}
	substitute := func(where, s string) string {
		return variables.ReplaceAllStringFunc(s, func(name string) string {
			parts := variables.FindStringSubmatch(name)
			value, ok := values[parts[1]+parts[2]]
			if !ok {
				t.Errorf("%s: %s is no variable", where, name)
			}
			return value
		})
	}
	var queries []query
	add := func(where, expr string, instant bool) {
		queries = append(queries, query{where: where, expr: substitute(where, expr), instant: instant})
	}

	var panels func([]panel)
	panels = func(list []panel) {
		for _, p := range list {
			for _, target := range p.Targets {
				add(fmt.Sprintf("%s/%s/%s", d.UID, p.Title, target.RefID), target.Expr, target.Instant)
			}
			panels(p.Panels)
		}
	}
	panels(d.Panels)
	for _, a := range d.Annotations.List {
		if a.BuiltIn == 0 {
			add(d.UID+"/annotation/"+a.Name, a.Expr, false)
		}
	}
	labelValues := regexp.MustCompile(`^label_values\((?:(.*), *)?(\w+)\)$`)
	for _, v := range d.Templating.List {
		if v.Type != "query" {
			continue
		}
		where := d.UID + "/variable/" + v.Name
		var text string
		if json.Unmarshal(v.Query, &text) != nil {
			var object struct{ Query string }
			if err := json.Unmarshal(v.Query, &object); err != nil {
				t.Errorf("%s: %v", where, err)
			}
			text = object.Query
		}
		parts := labelValues.FindStringSubmatch(text)
		if parts == nil {
			t.Errorf("%s: %q is no label_values()", where, text)
			continue
		}
		queries = append(queries, query{where: where, expr: substitute(where, parts[1]), label: parts[2]})
	}
	return queries
}

// data is how many series, or values of a label, there are.
func (p *prometheus) data(q query, since time.Time) (int, error) {
	if q.label != "" {
		params := url.Values{"start": {strconv.FormatInt(since.Unix(), 10)}}
		if q.expr != "" {
			params.Set("match[]", q.expr)
		}
		var values []string
		err := p.get("label/"+q.label+"/values", params, &values)
		return len(values), err
	}
	if q.instant {
		since = time.Time{}
	}
	result, err := p.query(q.expr, since)
	return len(result), err
}

// show asks everything that the dashboards do.
func (n *node) show(t *testing.T) {
	files, err := filepath.Glob("../dashboards/grafana/*.json")
	if err != nil || len(files) == 0 {
		t.Fatalf("no dashboards: %v", err)
	}
	var queries []query
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var d dashboard
		if err := json.Unmarshal(text, &d); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		of := d.queries(t)
		if len(of) == 0 {
			t.Errorf("%s has no queries", file)
		}
		queries = append(queries, of...)
	}
	for _, kind := range []struct {
		name string
		p    *prometheus
	}{{"classic", n.classic}, {"native", n.native}} {
		t.Run(kind.name, func(t *testing.T) {
			if kind.name == "native" && len(kind.p.now(t, `sockq_listener_accept_wait_seconds_bucket`)) > 0 {
				t.Error("there are no native histograms")
			}
			for _, q := range queries {
				number, err := kind.p.data(q, n.begun)
				i := slices.IndexFunc(legitimatelyEmpty, func(e exception) bool { return e.where == q.where })
				switch {
				case err != nil:
					t.Errorf("%s: %v", q.where, err)
				case number == 0 && (i < 0 || len(kind.p.now(t, legitimatelyEmpty[i].unless)) > 0):
					t.Errorf("%s has no data: %s", q.where, q.expr)
				case number > 0 && i >= 0 && len(kind.p.now(t, legitimatelyEmpty[i].unless)) == 0:
					t.Errorf("%s has data, though %s", q.where, legitimatelyEmpty[i].because)
				}
			}
			t.Logf("%d queries", len(queries))
		})
	}
	for _, e := range legitimatelyEmpty {
		if !slices.ContainsFunc(queries, func(q query) bool { return q.where == e.where }) {
			t.Errorf("there is no %s", e.where)
		}
	}
}
