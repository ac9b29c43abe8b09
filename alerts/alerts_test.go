package alerts

import (
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/common/model"
	"go.yaml.in/yaml/v2"

	"sockq/collectors/catalogue"
	"sockq/probes"
	"sockq/probes/census"
	"sockq/probes/diagnose"
	"sockq/probes/tracker"
)

const runbooks = "https://github.com/sockq/sockq/blob/main/alerts/runbooks/"

type rule struct {
	Record, Alert, Expr string
	For                 string
	KeepFiringFor       string `yaml:"keep_firing_for"`
	Labels, Annotations map[string]string
}

// rules are those of rules.yaml, in its order.
func rules(t *testing.T) (all []rule) {
	t.Helper()
	var file struct {
		Groups []struct {
			Name, Interval string
			Rules          []rule
		}
	}
	read(t, "rules.yaml", &file)
	for _, g := range file.Groups {
		all = append(all, g.Rules...)
	}
	if len(all) == 0 {
		t.Fatal("there are no rules")
	}
	return all
}

func read(t *testing.T, path string, into any) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.UnmarshalStrict(text, into); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
}

func TestAlertsTellWhatToDo(t *testing.T) {
	files, err := filepath.Glob("runbooks/*.md")
	if err != nil {
		t.Fatal(err)
	}
	unused := make(map[string]bool)
	for _, f := range files {
		if filepath.Base(f) == "README.md" {
			continue
		}
		unused[strings.TrimSuffix(filepath.Base(f), ".md")] = true
	}
	for _, r := range rules(t) {
		if r.Alert == "" {
			continue
		}
		if !regexp.MustCompile(`^Sockq[A-Z][A-Za-z]+$`).MatchString(r.Alert) {
			t.Errorf("%s: not a name", r.Alert)
		}
		if !slices.Contains([]string{"critical", "warning", "info"}, r.Labels["severity"]) {
			t.Errorf("%s: severity %q", r.Alert, r.Labels["severity"])
		}
		for _, name := range []string{"summary", "description", "remedy", "tiers", "runbook_url"} {
			if r.Annotations[name] == "" {
				t.Errorf("%s: no %s", r.Alert, name)
			}
		}
		if url := r.Annotations["runbook_url"]; url != runbooks+r.Alert+".md" {
			t.Errorf("%s: runbook %s", r.Alert, url)
		}
		if _, err := os.Stat("runbooks/" + r.Alert + ".md"); err != nil {
			t.Errorf("%s: %v", r.Alert, err)
		}
		delete(unused, r.Alert)
		if !strings.Contains(r.Expr, "listener_") || strings.Contains(r.Expr, "sockq_lost_total") {
			continue
		}
		// Who, and what it is like.
		for name, what := range map[string]string{"summary": "$labels.address", "description": "sockq_listener_verdict{"} {
			if !strings.Contains(r.Annotations[name], what) {
				t.Errorf("%s: the %s lacks %s", r.Alert, name, what)
			}
		}
	}
	for name := range unused {
		t.Errorf("runbooks/%s.md: there is no such alert", name)
	}
}

var (
	quoted     = regexp.MustCompile("\"[^\"]*\"|`[^`]*`")
	printed    = regexp.MustCompile("printf (\"[^\"]*\"|`[^`]*`)")
	matchers   = regexp.MustCompile(`\{[^}]*\}`)
	lists      = regexp.MustCompile(`\b(on|ignoring|without|by|group_left|group_right)\s*\([^)]*\)`)
	durations  = regexp.MustCompile(`\[[^\]]*\]|\boffset\s+\w+`)
	identifier = regexp.MustCompile(`[a-zA-Z_:][a-zA-Z0-9_:]*(\s*\()?`)
	selector   = regexp.MustCompile(`([a-zA-Z_:][a-zA-Z0-9_:]*)\{([^}]*)\}`)
	matcher    = regexp.MustCompile("(\\w+)\\s*(=~|!=|=)\\s*(\"[^\"]*\"|%q)")
	words      = []string{"and", "or", "unless", "bool"}
)

// queries are a rule's expression and those in its texts.
func queries(r rule) []string {
	all := []string{r.Expr}
	for _, text := range r.Annotations {
		for _, q := range printed.FindAllStringSubmatch(text, -1) {
			all = append(all, q[1][1:len(q[1])-1])
		}
	}
	return all
}

// metricsOf are the names of metrics in a query.
func metricsOf(query string) (names []string) {
	for _, noise := range []*regexp.Regexp{matchers, quoted, lists, durations} {
		query = noise.ReplaceAllString(query, " ")
	}
	for _, name := range identifier.FindAllString(query, -1) {
		if !strings.HasSuffix(name, "(") && !slices.Contains(words, name) {
			names = append(names, name)
		}
	}
	return names
}

// series are the metrics that there are, with their labels.
func series(t *testing.T) map[string][]string {
	known := map[string][]string{"up": nil}
	for _, m := range catalogue.All {
		known[m.Name] = m.Labels
		if m.Type == catalogue.Histogram {
			known[m.Name+"_count"] = m.Labels
		}
	}
	for _, r := range rules(t) {
		if r.Record != "" {
			known[r.Record] = nil
		}
	}
	return known
}

func TestRulesNameMetricsThatExist(t *testing.T) {
	known := series(t)
	used := make(map[string]bool)
	for _, r := range rules(t) {
		for _, query := range queries(r) {
			for _, name := range metricsOf(query) {
				if _, ok := known[name]; !ok {
					t.Errorf("%s%s: no metric is called %s", r.Alert, r.Record, name)
				}
				used[name] = true
			}
		}
	}
	for _, r := range rules(t) {
		if r.Record != "" && !used[r.Record] {
			t.Errorf("%s is recorded and no rule uses it", r.Record)
		}
	}
}

// values are what a label may be, where that is a list of the code.
var values = map[string][]string{
	"sockq_listener_drops_total.reason":   tracker.DropReasonNames[:],
	"sockq_listener_verdict.verdict":      diagnose.Names[:],
	"sockq_kernel_tcp_events_total.event": census.EventNames[:],
	"sockq_sysctl.name":                   census.SysctlNames[:],
	"sockq_probe_attached.probe":          tracker.StoryNames,
	"sockq_listener_sockets.address":      {probes.Other},
	"sockq_tcp_sockets.netns":             {probes.Other},
}

func TestSelectorsCanMatch(t *testing.T) {
	known := series(t)
	for _, r := range rules(t) {
		for _, query := range queries(r) {
			for _, s := range selector.FindAllStringSubmatch(query, -1) {
				for _, m := range matcher.FindAllStringSubmatch(s[2], -1) {
					label, value := m[1], strings.Trim(m[3], `"`)
					if !slices.Contains(known[s[1]], label) && !slices.Contains([]string{"cluster", "job", "instance"}, label) {
						t.Errorf("%s%s: %s has no label %s", r.Alert, r.Record, s[1], label)
					}
					among, ok := values[s[1]+"."+label]
					if !ok || value == "%q" {
						continue
					}
					for part := range strings.SplitSeq(value, "|") { // each alternative of a pattern
						if m[2] != "=~" {
							part = regexp.QuoteMeta(part)
						}
						if !slices.ContainsFunc(among, regexp.MustCompile("^(?:"+part+")$").MatchString) {
							t.Errorf("%s%s: no %s of %s is %s: %v", r.Alert, r.Record, label, s[1], part, among)
						}
					}
				}
			}
		}
	}
}

var without = regexp.MustCompile(`\bwithout\s*\(([^)]*)\)\s*`)

func TestListenersKeepTheirLabels(t *testing.T) {
	for _, r := range rules(t) {
		if regexp.MustCompile(`\bby\s*\(`).MatchString(r.Expr) {
			t.Errorf("%s%s: by () drops what targets are labelled with", r.Alert, r.Record)
		}
		for _, at := range without.FindAllStringSubmatchIndex(r.Expr, -1) {
			of := parenthesis(r.Expr[at[1]:])
			if !strings.Contains(of, "sockq_listener_") && !strings.Contains(of, "sockq:listener_") {
				continue
			}
			for label := range strings.SplitSeq(r.Expr[at[2]:at[3]], ",") {
				if slices.Contains(catalogue.AcceptQueueLength.Labels, strings.TrimSpace(label)) {
					t.Errorf("%s%s: without (%s) of listeners", r.Alert, r.Record, label)
				}
			}
		}
	}
}

// parenthesis is what s has from its first "(" to the ")" that closes it.
func parenthesis(s string) string {
	depth := 0
	for i, c := range s {
		switch c {
		case '(':
			depth++
		case ')':
			if depth--; depth == 0 {
				return s[:i+1]
			}
		}
	}
	return s
}

// A check is what promtool is told to expect of an alert at a time.
type check struct {
	EvalTime  string `yaml:"eval_time"`
	Alertname string
	ExpAlerts []struct {
		Labels      map[string]string `yaml:"exp_labels"`
		Annotations map[string]string `yaml:"exp_annotations"`
	} `yaml:"exp_alerts"`
}

func TestEachAlertFiresAndIsSilentAndResolves(t *testing.T) {
	var file struct {
		Tests []struct {
			Name   string
			Checks []check `yaml:"alert_rule_test"`
		}
	}
	text, err := os.ReadFile("rules_test.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(text, &file); err != nil { // promtool is strict
		t.Fatal(err)
	}
	fires := func(r rule, c check) bool {
		return c.Alertname == r.Alert && slices.ContainsFunc(c.ExpAlerts, func(a struct {
			Labels      map[string]string `yaml:"exp_labels"`
			Annotations map[string]string `yaml:"exp_annotations"`
		}) bool {
			for name, value := range r.Labels {
				if a.Labels[name] != value {
					return false
				}
			}
			return true
		})
	}
	for _, r := range rules(t) {
		if r.Alert == "" {
			continue
		}
		fired, resolved, silent := false, false, false
		for _, test := range file.Tests {
			var since model.Duration
			firing, looked := false, false
			for _, c := range test.Checks {
				if c.Alertname != r.Alert {
					continue
				}
				looked = true
				at, err := model.ParseDuration(c.EvalTime)
				if err != nil {
					t.Fatal(err)
				}
				switch {
				case fires(r, c):
					fired, firing, since = true, true, at
				case firing && at > since:
					resolved = true
				}
			}
			silent = silent || looked && !firing
		}
		if !fired || !resolved || !silent {
			t.Errorf("%s %v: fires %v, resolves %v, is silent in a near miss %v", r.Alert, r.Labels, fired, resolved, silent)
		}
	}
}

func TestRulesByPromtool(t *testing.T) {
	promtool, err := exec.LookPath("promtool")
	if err != nil {
		t.Fatal("promtool is needed: Debian's package prometheus has it, bash .ci/test installs it")
	}
	for _, args := range [][]string{
		{"check", "rules", "--lint=all", "--lint-fatal", "rules.yaml"},
		{"test", "rules", "rules_test.yaml"},
	} {
		out, err := exec.Command(promtool, args...).CombinedOutput()
		if err != nil {
			t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
}

var comparison = regexp.MustCompile(`^(\w+) (=~|!=|=) "(.*)"$`)

// Alertmanager checks the example's form in the end-to-end test; this is
// about the alerts that there are.
func TestAlertmanagerExampleFitsTheAlerts(t *testing.T) {
	var file struct {
		Route struct {
			Receiver string
			GroupBy  []string `yaml:"group_by"`
			Routes   []struct {
				Receiver string
				Matchers []string
			}
		}
		InhibitRules []struct {
			Source []string `yaml:"source_matchers"`
			Target []string `yaml:"target_matchers"`
			Equal  []string
		} `yaml:"inhibit_rules"`
		Receivers []struct{ Name string }
	}
	text, err := os.ReadFile("alertmanager.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(text, &file); err != nil {
		t.Fatal(err)
	}
	var alerts []map[string]string // labels
	for _, r := range rules(t) {
		if r.Alert != "" {
			labels := maps.Clone(r.Labels)
			labels["alertname"] = r.Alert
			alerts = append(alerts, labels)
		}
	}
	matches := func(labels map[string]string, list []string) bool {
		for _, text := range list {
			m := comparison.FindStringSubmatch(text)
			if m == nil {
				t.Fatalf("not a matcher: %s", text)
			}
			pattern := m[3]
			if m[2] != "=~" {
				pattern = regexp.QuoteMeta(pattern)
			}
			if regexp.MustCompile("^(?:"+pattern+")$").MatchString(labels[m[1]]) == (m[2] == "!=") {
				return false
			}
		}
		return true
	}
	some := func(list []string) bool {
		return slices.ContainsFunc(alerts, func(labels map[string]string) bool { return matches(labels, list) })
	}
	// A page is for critical alerts only, and nobody is told of info.
	for _, labels := range alerts {
		receiver := file.Route.Receiver
		for _, route := range file.Route.Routes {
			if matches(labels, route.Matchers) {
				receiver = route.Receiver
				break
			}
		}
		if want := map[string]string{"critical": "page", "warning": "ticket", "info": "nobody"}[labels["severity"]]; receiver != want {
			t.Errorf("%v goes to %s", labels, receiver)
		}
	}
	for _, route := range file.Route.Routes {
		if !some(route.Matchers) {
			t.Errorf("route %v: there is no such alert", route.Matchers)
		}
	}
	for _, rule := range file.InhibitRules {
		if !some(rule.Source) || !some(rule.Target) {
			t.Errorf("inhibition %v of %v: there is no such alert", rule.Source, rule.Target)
		}
		for _, label := range rule.Equal {
			if !slices.Contains(file.Route.GroupBy, label) {
				t.Errorf("inhibition by %s: notifications are not grouped by it", label)
			}
		}
	}
	for _, label := range catalogue.AcceptQueueLength.Labels {
		if !slices.Contains(file.Route.GroupBy, label) {
			t.Errorf("%s does not tell listeners apart", label)
		}
	}
}
