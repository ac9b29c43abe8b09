package dashboards

import (
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
)

// What the rules read of a dashboard's JSON.
type grafanaBoard struct {
	UID         string         `json:"uid"`
	Title       string         `json:"title"`
	Description string         `json:"description"`
	Tags        []string       `json:"tags"`
	Editable    *bool          `json:"editable"`
	Panels      []grafanaPanel `json:"panels"`
	Templating  struct {
		List []grafanaVariable `json:"list"`
	} `json:"templating"`
	Annotations struct {
		List []struct {
			Expr       string     `json:"expr"`
			Datasource grafanaRef `json:"datasource"`
		} `json:"list"`
	} `json:"annotations"`
	Links []struct {
		Type        string   `json:"type"`
		Tags        []string `json:"tags"`
		KeepTime    bool     `json:"keepTime"`
		IncludeVars bool     `json:"includeVars"`
	} `json:"links"`
}

type grafanaRef struct {
	Type string `json:"type"`
	UID  string `json:"uid"`
}

type grafanaVariable struct {
	Name       string     `json:"name"`
	Label      string     `json:"label"`
	Type       string     `json:"type"`
	Datasource grafanaRef `json:"datasource"`
	Definition string     `json:"definition"`
	Multi      bool       `json:"multi"`
	IncludeAll bool       `json:"includeAll"`
	AllValue   string     `json:"allValue"`
	Refresh    int        `json:"refresh"`
	Query      any        `json:"query"`
}

type grafanaPanel struct {
	ID          int        `json:"id"`
	Type        string     `json:"type"`
	Title       string     `json:"title"`
	Description string     `json:"description"`
	Datasource  grafanaRef `json:"datasource"`
	Collapsed   bool       `json:"collapsed"`
	GridPos     struct {
		X, Y, W, H int
	} `json:"gridPos"`
	Targets     []grafanaTarget `json:"targets"`
	Panels      []grafanaPanel  `json:"panels"` // of a collapsed row
	FieldConfig struct {
		Defaults struct {
			Unit string `json:"unit"`
		} `json:"defaults"`
		Overrides []struct {
			Properties []struct {
				ID    string `json:"id"`
				Value any    `json:"value"`
			} `json:"properties"`
		} `json:"overrides"`
	} `json:"fieldConfig"`
}

type grafanaTarget struct {
	RefID        string     `json:"refId"`
	Expr         string     `json:"expr"`
	LegendFormat string     `json:"legendFormat"`
	Datasource   grafanaRef `json:"datasource"`
}

// all are the dashboard's panels without the rows.
func (d *grafanaBoard) all() []*grafanaPanel {
	var panels []*grafanaPanel
	for i := range d.Panels {
		if d.Panels[i].Type != "row" {
			panels = append(panels, &d.Panels[i])
		}
		for j := range d.Panels[i].Panels {
			panels = append(panels, &d.Panels[i].Panels[j])
		}
	}
	return panels
}

func (d *grafanaBoard) variable(name string) *grafanaVariable {
	for i := range d.Templating.List {
		if d.Templating.List[i].Name == name {
			return &d.Templating.List[i]
		}
	}
	return &grafanaVariable{}
}

// made are the files, as they would be written now.
var made = sync.OnceValues(Files)

// generated are the dashboards in them, by uid.
func generated(t *testing.T) map[string]*grafanaBoard {
	t.Helper()
	files, err := made()
	if err != nil {
		t.Fatal(err)
	}
	boards := make(map[string]*grafanaBoard)
	for path, content := range files {
		if !strings.HasSuffix(path, ".json") {
			continue
		}
		d := new(grafanaBoard)
		if err := json.Unmarshal(content, d); err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		boards[strings.TrimSuffix(strings.TrimPrefix(path, "grafana/"), ".json")] = d
	}
	return boards
}

// rules are those of grafana/dashboard-linter, by its names for them. They report
// where they are broken and why.
var rules = map[string]func(d *grafanaBoard, report func(where, why string)){
	"template-datasource-rule": func(d *grafanaBoard, report func(where, why string)) {
		v := d.variable("datasource")
		if v.Type != "datasource" || v.Query != "prometheus" || v.Label != "Data source" {
			report("datasource", fmt.Sprintf("%+v", *v))
		}
	},
	"template-job-rule": func(d *grafanaBoard, report func(where, why string)) { targetVariable(d, "job", "Job", report) },
	"template-instance-rule": func(d *grafanaBoard, report func(where, why string)) {
		targetVariable(d, "instance", "Instance", report)
	},
	"template-label-promql-rule": func(d *grafanaBoard, report func(where, why string)) {
		for _, v := range d.Templating.List {
			if v.Type != "query" {
				continue
			}
			m := labelValues.FindStringSubmatch(v.Definition)
			query, _ := v.Query.(map[string]any)
			if m == nil || query["query"] != v.Definition || m[2] != v.Name {
				report(v.Name, fmt.Sprintf("%q, %v", v.Definition, v.Query))
			} else if _, err := parse(m[1]); err != nil {
				report(v.Name, err.Error())
			}
		}
	},
	"template-on-time-change-reload-rule": func(d *grafanaBoard, report func(where, why string)) {
		for _, v := range d.Templating.List {
			if v.Type == "query" && v.Refresh != 2 {
				report(v.Name, "is not asked for when the time range changes")
			}
		}
	},
	"template-unused-rule": func(d *grafanaBoard, report func(where, why string)) {
		for _, v := range d.Templating.List {
			used := v.Type == "datasource"
			for _, p := range d.all() {
				for _, t := range p.Targets {
					used = used || slices.Contains(variablesOf(t.Expr), v.Name)
				}
			}
			if !used {
				report(v.Name, "is in no query")
			}
		}
	},
	"uneditable-dashboard-rule": func(d *grafanaBoard, report func(where, why string)) {
		if d.Editable == nil || *d.Editable {
			report("editable", "must be false")
		}
	},
	"panel-datasource-rule": func(d *grafanaBoard, report func(where, why string)) {
		for _, p := range d.all() {
			refs := []grafanaRef{p.Datasource}
			for _, t := range p.Targets {
				refs = append(refs, t.Datasource)
			}
			for _, ref := range refs {
				if ref != (grafanaRef{"prometheus", "${datasource}"}) {
					report(p.Title, fmt.Sprintf("%+v", ref))
				}
			}
		}
	},
	"panel-title-description-rule": func(d *grafanaBoard, report func(where, why string)) {
		for _, p := range d.all() {
			if p.Title == "" || len(p.Description) < 40 {
				report(p.Title, "title or description is missing")
			}
		}
	},
	"panel-units-rule": func(d *grafanaBoard, report func(where, why string)) {
		for _, p := range d.all() {
			got := []any{p.FieldConfig.Defaults.Unit}
			for _, o := range p.FieldConfig.Overrides {
				for _, property := range o.Properties {
					if property.ID == "unit" {
						got = append(got, property.Value)
					}
				}
			}
			for _, unit := range got {
				// Of Grafana's ids of units those that are in use here.
				if !slices.Contains([]any{"none", "short", "percentunit", "s", "string", "cps", "bytes", "dateTimeFromNow"}, unit) {
					report(p.Title, fmt.Sprintf("unit %q", unit))
				}
			}
		}
	},
	"panel-no-targets-rule": func(d *grafanaBoard, report func(where, why string)) {
		for _, p := range d.all() {
			if len(p.Targets) == 0 {
				report(p.Title, "has no query")
			}
		}
	},
	"target-promql-rule": func(d *grafanaBoard, report func(where, why string)) {
		for _, p := range d.all() {
			for _, t := range p.Targets {
				if _, err := parse(t.Expr); err != nil || t.Expr == "" {
					report(p.Title, fmt.Sprintf("%s: %v", t.Expr, err))
				}
			}
		}
	},
	"target-rate-interval-rule": func(d *grafanaBoard, report func(where, why string)) {
		eachSelector(d, func(p *grafanaPanel, s selector) {
			if s.function == "rate" && s.window != "$__rate_interval" {
				report(p.Title, s.metric+" over "+s.window)
			}
		})
	},
	"target-job-rule":      func(d *grafanaBoard, report func(where, why string)) { targetMatcher(d, "job", report) },
	"target-instance-rule": func(d *grafanaBoard, report func(where, why string)) { targetMatcher(d, "instance", report) },
	"target-counter-agg-rule": func(d *grafanaBoard, report func(where, why string)) {
		eachSelector(d, func(p *grafanaPanel, s selector) {
			if strings.HasSuffix(s.metric, "_total") && (s.window == "" || s.function != "rate" && s.function != "increase") {
				report(p.Title, s.metric+" is a counter")
			}
		})
	},
	// pint's promql/regexp, which the linter does not have.
	"needless-regexp": func(d *grafanaBoard, report func(where, why string)) {
		eachSelector(d, func(p *grafanaPanel, s selector) {
			for _, m := range s.matchers {
				if (m.op == "=~" || m.op == "!~") && !strings.ContainsAny(m.value, "$|.*+") {
					report(p.Title, fmt.Sprintf("%+v", m))
				}
			}
		})
	},
}

var (
	labelValues = regexp.MustCompile(`^label_values\((.+), ([a-z]+)\)$`)
	variable    = regexp.MustCompile(`\$\{?([a-z_]+)`)
)

func variablesOf(expr string) []string {
	var names []string
	for _, m := range variable.FindAllStringSubmatch(expr, -1) {
		names = append(names, m[1])
	}
	return names
}

func targetVariable(d *grafanaBoard, name, label string, report func(where, why string)) {
	v := d.variable(name)
	if v.Type != "query" || v.Datasource.UID != "${datasource}" || !v.Multi || !v.IncludeAll || v.AllValue != ".+" {
		report(name, fmt.Sprintf("%+v", *v))
	}
	if v.Label != label {
		report(name+" label", "is "+v.Label)
	}
}

func targetMatcher(d *grafanaBoard, label string, report func(where, why string)) {
	eachSelector(d, func(p *grafanaPanel, s selector) {
		if !slices.Contains(s.matchers, matcher{label, "=~", "$" + label}) {
			report(p.Title, fmt.Sprintf("%s%+v", s.metric, s.matchers))
		}
	})
}

func eachSelector(d *grafanaBoard, do func(*grafanaPanel, selector)) {
	for _, p := range d.all() {
		for _, t := range p.Targets {
			q, err := parse(t.Expr)
			if err != nil {
				continue // target-promql-rule's
			}
			for _, s := range q.selectors {
				do(p, s)
			}
		}
	}
}

// excluded is where a rule is broken on purpose, and why.
var excluded = map[string]string{
	// One agent is one node, and in Kubernetes instance is its name: that is what users look for.
	"template-instance-rule: instance label": "all",
	// An alert about a job as a whole, SockqAgentDown by absent(), has neither label:
	// the panel lets those in that lack them, by instance=~"|${instance}".
	"target-job-rule: Firing":      fleetUID,
	"target-instance-rule: Firing": fleetUID,
}

func lint(d *grafanaBoard) map[string]string {
	broken := make(map[string]string)
	for name, rule := range rules {
		rule(d, func(where, why string) { broken[name+": "+where] = why })
	}
	return broken
}

func TestDashboardsKeepTheLintersRules(t *testing.T) {
	for uid, d := range generated(t) {
		broken := lint(d)
		for what, why := range broken {
			if where := excluded[what]; where != "all" && where != uid {
				t.Errorf("%s: %s: %s", uid, what, why)
			}
		}
		for what, where := range excluded {
			if _, needed := broken[what]; !needed && (where == "all" || where == uid) {
				t.Errorf("%s: the exclusion of %s is not needed", uid, what)
			}
		}
	}
}

// A rule that nothing breaks proves nothing.
func TestRulesAreBroken(t *testing.T) {
	expr := func(expr string) func(*grafanaBoard) {
		return func(d *grafanaBoard) { d.all()[0].Targets[0].Expr = expr }
	}
	const chosen = `{job=~"$job", instance=~"$instance"}`
	breaks := map[string][]func(*grafanaBoard){
		"template-datasource-rule": {func(d *grafanaBoard) { d.variable("datasource").Query = "loki" }},
		"template-job-rule":        {func(d *grafanaBoard) { d.variable("job").AllValue = ".*" }, func(d *grafanaBoard) { d.variable("job").Name = "j" }},
		"template-instance-rule":   {func(d *grafanaBoard) { d.variable("instance").Multi = false }},
		"template-label-promql-rule": {
			func(d *grafanaBoard) { d.variable("job").Definition = "labels(up{}, job)" },
			func(d *grafanaBoard) { d.variable("job").Definition = "label_values(up{, job)" },
		},
		"template-on-time-change-reload-rule": {func(d *grafanaBoard) { d.variable("job").Refresh = 1 }},
		"template-unused-rule": {func(d *grafanaBoard) {
			d.Templating.List = append(d.Templating.List, grafanaVariable{Name: "idle", Type: "custom"})
		}},
		"uneditable-dashboard-rule":    {func(d *grafanaBoard) { d.Editable = nil }},
		"panel-datasource-rule":        {func(d *grafanaBoard) { d.all()[0].Datasource.UID = "mine" }, func(d *grafanaBoard) { d.all()[0].Targets[0].Datasource.UID = "" }},
		"panel-title-description-rule": {func(d *grafanaBoard) { d.all()[0].Description = "" }, func(d *grafanaBoard) { d.all()[0].Title = "" }},
		"panel-units-rule":             {func(d *grafanaBoard) { d.all()[0].FieldConfig.Defaults.Unit = "seconds" }},
		"panel-no-targets-rule":        {func(d *grafanaBoard) { d.all()[0].Targets = nil }},
		"target-promql-rule":           {expr(""), expr("sum(up" + chosen), expr("up"), expr("sum(up{job})"), expr("total(up" + chosen + ")")},
		"target-rate-interval-rule":    {expr("sum(rate(x_total" + chosen + "[5m]))")},
		"target-job-rule":              {expr(`up{instance=~"$instance"}`), expr(`up{job="$job", instance=~"$instance"}`)},
		"target-instance-rule":         {expr(`up{job=~"$job"}`)},
		"target-counter-agg-rule":      {expr("sum(x_total" + chosen + ")"), expr("sum(min_over_time(x_total" + chosen + "[5m]))")},
		"needless-regexp":              {expr(`up{job=~"$job", instance=~"$instance", reason=~"plain"}`)},
	}
	for _, name := range slices.Sorted(maps.Keys(rules)) {
		if len(breaks[name]) == 0 {
			t.Errorf("%s: nothing breaks it", name)
		}
		for i, damage := range breaks[name] {
			d := generated(t)[agentUID]
			count := func() int {
				places := make(map[string]bool)
				rules[name](d, func(where, _ string) { places[where] = true })
				return len(places)
			}
			before := count()
			damage(d)
			if after := count(); after <= before {
				t.Errorf("%s is broken in %d places before damage %d, in %d after it", name, before, i, after)
			}
		}
	}
}
