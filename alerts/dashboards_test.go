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
	"strings"
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

var variables = regexp.MustCompile(`\$\{(\w+)(?::\w+)?\}|\$(\w+)`)

// queries has its variables replaced as Grafana does: by what is chosen, or by what
// stands for all.
func (d dashboard) queries(t *testing.T, chosen map[string]string) []query {
	t.Helper()
	values := map[string]string{
		"__rate_interval": "1m", "__interval": "15s", "__interval_ms": "15000",
		"__range": "5m", "__range_s": "300", "__range_ms": "300000",
	}
	for _, v := range d.Templating.List {
		choice, ok := chosen[v.Name]
		switch {
		case ok:
			values[v.Name] = regexp.QuoteMeta(choice)
			// In a string of PromQL, in which a backslash is an escape, too.
			values[v.Name] = strings.ReplaceAll(values[v.Name], `\`, `\\`)
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

// show asks everything that the dashboards do, of everything and of one listener.
func (n *node) show(t *testing.T) {
	for name, p := range map[string]*prometheus{"classic": n.classic, "native": n.native} {
		if buckets := p.now(t, `sockq_listener_accept_wait_seconds_bucket`); (len(buckets) > 0) != (p == n.classic) {
			t.Errorf("%s: there are %d classic buckets", name, len(buckets))
		}
		listener := p.now(t, `sockq_listener_sockets{netns="shop"}`)
		if len(listener) != 1 {
			t.Fatalf("the shop has %d listeners", len(listener))
		}
		for what, chosen := range map[string]map[string]string{"all": nil, "listener": listener[0].labels} {
			t.Run(name+"/"+what, func(t *testing.T) { n.answers(t, p, chosen) })
		}
	}
}

func (n *node) answers(t *testing.T, p *prometheus, chosen map[string]string) {
	files, err := filepath.Glob("../dashboards/grafana/*.json")
	if err != nil || len(files) == 0 {
		t.Fatalf("no dashboards: %v", err)
	}
	unused := slices.Clone(legitimatelyEmpty)
	asked := 0
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var d dashboard
		if err := json.Unmarshal(text, &d); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		queries := d.queries(t, chosen)
		if len(queries) == 0 {
			t.Errorf("%s has no queries", file)
		}
		for _, q := range queries {
			asked++
			number, err := p.data(q, n.begun)
			if err != nil {
				t.Errorf("%s: %v", q.where, err)
				continue
			}
			want, because := true, ""
			for _, e := range legitimatelyEmpty {
				if e.where == q.where {
					want, because = len(p.now(t, e.unless)) > 0, e.because
				}
			}
			unused = slices.DeleteFunc(unused, func(e exception) bool { return e.where == q.where })
			switch {
			case want && number == 0:
				t.Errorf("%s has no data: %s", q.where, q.expr)
			case !want && number > 0:
				t.Errorf("%s has data, though %s: %s", q.where, because, q.expr)
			}
		}
	}
	for _, e := range unused {
		t.Errorf("there is no %s", e.where)
	}
	t.Logf("%d queries", asked)
}
