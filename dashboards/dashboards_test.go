package dashboards

import (
	"bytes"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"sockq/collectors/catalogue"
)

func TestCommittedFilesAreWhatTheGeneratorWrites(t *testing.T) {
	files, err := made()
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range files {
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s is stale (%v): go generate ./dashboards", path, err)
		}
	}
	for _, dir := range []string{"grafana", "kubernetes"} {
		there, err := filepath.Glob(dir + "/*")
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range there {
			if _, made := files[path]; !made {
				t.Errorf("nothing makes %s", path)
			}
		}
	}
}

func TestUIDsAndLooks(t *testing.T) {
	boards := generated(t)
	if got, want := slices.Sorted(maps.Keys(boards)), []string{agentUID, fleetUID, listenerUID, statesUID}; !slices.Equal(got, want) {
		t.Errorf("dashboards are %v, want %v", got, want)
	}
	for name, d := range boards {
		if d.UID != name || !slices.Contains(d.Tags, tag) || d.Title == "" || d.Description == "" {
			t.Errorf("%s: uid %q, tags %v, title %q, description %q", name, d.UID, d.Tags, d.Title, d.Description)
		}
		if len(d.Links) != 1 || d.Links[0].Type != "dashboards" || !slices.Equal(d.Links[0].Tags, []string{tag}) || !d.Links[0].KeepTime || !d.Links[0].IncludeVars {
			t.Errorf("%s: links to the others are %+v", name, d.Links)
		}
		if len(d.Annotations.List) != 1 || d.Annotations.List[0].Datasource.UID != "${datasource}" {
			t.Fatalf("%s: annotations are %+v", name, d.Annotations.List)
		}
		q, err := parse(strings.NewReplacer("${", "$", "}\"", "\"").Replace(d.Annotations.List[0].Expr))
		if err != nil || len(q.selectors) != 1 || q.selectors[0].metric != alerts {
			t.Errorf("%s: annotations are %+v (%v)", name, q, err)
		}
		for _, p := range d.all() {
			// Neither shows anything with Prometheus' answers in Grafana 9.4.
			if p.Type == "nodeGraph" || p.Type == "canvas" {
				t.Errorf("%s: %s is a %s", name, p.Title, p.Type)
			}
		}
	}
}

func TestVariablesAreInOrder(t *testing.T) {
	want := map[string][]string{
		fleetUID:    {"datasource", "cluster", "job", "instance"},
		listenerUID: {"datasource", "cluster", "job", "instance", "namespace", "pod", "netns", "address", "process"},
		statesUID:   {"datasource", "cluster", "job", "instance", "namespace", "pod"},
		agentUID:    {"datasource", "cluster", "job", "instance"},
	}
	for uid, d := range generated(t) {
		var got []string
		for _, v := range d.Templating.List {
			got = append(got, v.Name)
			if v.Type != "query" {
				continue
			}
			// All has to let series in that lack the label.
			optional := slices.Contains([]string{"cluster", "namespace", "pod", "process"}, v.Name)
			if !v.Multi || !v.IncludeAll || v.AllValue != map[bool]string{true: ".*", false: ".+"}[optional] {
				t.Errorf("%s: %+v", uid, v)
			}
		}
		if !slices.Equal(got, want[uid]) {
			t.Errorf("%s: variables are %v, want %v", uid, got, want[uid])
		}
	}
}

func TestPanelsFillTheGridWithoutOverlap(t *testing.T) {
	for uid, d := range generated(t) {
		ids := make(map[int]string)
		free := func(id int, title string) {
			if other, taken := ids[id]; taken || id == 0 {
				t.Errorf("%s: %q and %q have the id %d", uid, title, other, id)
			}
			ids[id] = title
		}
		// A cell of the grid belongs to one panel; every line is full.
		place := func(panels []grafanaPanel) {
			cells := make(map[[2]int]string)
			width := make(map[int]int)
			for _, p := range panels {
				g := p.GridPos
				if g.W < 1 || g.H < 1 || g.X < 0 || g.X+g.W > gridWidth {
					t.Errorf("%s: %q lies at %+v", uid, p.Title, g)
				}
				for y := g.Y; y < g.Y+g.H; y++ {
					width[y] += g.W
					for x := g.X; x < g.X+g.W; x++ {
						if other, taken := cells[[2]int{x, y}]; taken {
							t.Fatalf("%s: %q lies over %q", uid, p.Title, other)
						}
						cells[[2]int{x, y}] = p.Title
					}
				}
			}
			lines := slices.Sorted(maps.Keys(width))
			for i, y := range lines {
				if width[y] != gridWidth || y != lines[0]+i {
					t.Errorf("%s: line %d is %d columns wide, and follows %d lines from %d on", uid, y, width[y], i, lines[0])
				}
			}
		}
		place(d.Panels)
		for _, p := range d.Panels {
			free(p.ID, p.Title)
			if p.Type != "row" {
				continue
			}
			if p.Title == "" || p.Collapsed != (len(p.Panels) > 0) {
				t.Errorf("%s: row %q: collapsed %v with %d panels of its own", uid, p.Title, p.Collapsed, len(p.Panels))
			}
			if p.Collapsed {
				place(p.Panels)
			}
			for _, in := range p.Panels {
				free(in.ID, in.Title)
			}
		}
	}
}

// known are the metrics that may be shown, with what the catalogue says of sockq's.
func known() map[string]*catalogue.Metric {
	all := make(map[string]*catalogue.Metric)
	for _, m := range catalogue.All {
		all[m.Name] = m
		if m.Type == catalogue.Histogram {
			all[m.Name+"_bucket"] = m
		}
	}
	for _, name := range []string{
		// Recording rules.
		"sockq:listener_overflow:rate1m", "sockq:listener_overflow:rate5m", "sockq:listener_overflow:ratio_rate1m",
		// Prometheus' own.
		"up", "scrape_duration_seconds", "scrape_samples_scraped", "ALERTS",
		// Those of every process with the Go client.
		"process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds", "process_max_fds", "process_start_time_seconds",
	} {
		all[name] = nil
	}
	return all
}

func TestQueriesAskForWhatThereIs(t *testing.T) {
	metrics := known()
	labels := []string{"le", labelCluster, labelJob, labelInstance, labelAlert, labelSeverity, "alertstate"}
	for _, m := range catalogue.All {
		labels = append(labels, m.Labels...)
	}
	legend := regexp.MustCompile(`\{\{(\w+)\}\}`)
	shown := make(map[string]bool)
	for uid, d := range generated(t) {
		for _, p := range d.all() {
			for _, target := range p.Targets {
				q, err := parse(target.Expr)
				if err != nil {
					t.Errorf("%s: %s: %v", uid, p.Title, err)
				}
				for _, s := range q.selectors {
					m, ok := metrics[s.metric]
					if !ok {
						t.Errorf("%s: %s: nobody has %s", uid, p.Title, s.metric)
					}
					if m != nil {
						shown[m.Name] = true
					}
					for _, matcher := range s.matchers {
						if !slices.Contains(labels, matcher.label) || m != nil &&
							!slices.Contains(everywhere, matcher.label) && !slices.Contains(m.Labels, matcher.label) {
							t.Errorf("%s: %s: %s has no label %s", uid, p.Title, s.metric, matcher.label)
						}
					}
				}
				for _, l := range q.grouping {
					if !slices.Contains(labels, l) {
						t.Errorf("%s: %s: nothing has the label %s", uid, p.Title, l)
					}
				}
				for _, m := range legend.FindAllStringSubmatch(target.LegendFormat, -1) {
					if !slices.Contains(q.grouping, m[1]) {
						t.Errorf("%s: %s: the legend's %s is aggregated away", uid, p.Title, m[1])
					}
				}
				for _, v := range variablesOf(target.Expr) {
					if v != "__rate_interval" && v != "__range" && d.variable(v).Name == "" {
						t.Errorf("%s: %s: there is no variable %s", uid, p.Title, v)
					}
				}
			}
		}
	}
	for _, m := range catalogue.All {
		if !shown[m.Name] {
			t.Errorf("no panel shows %s", m.Name)
		}
	}
}

// Who looks at an empty panel has to learn whether the kernel cannot give it.
func TestPanelsSayWhichTiersTheyNeed(t *testing.T) {
	metrics := known()
	for uid, d := range generated(t) {
		eachSelector(d, func(p *grafanaPanel, s selector) {
			m := metrics[s.metric]
			switch {
			case m == nil:
			case m.Tiers == catalogue.TiersAB && !strings.Contains(strings.ToLower(p.Description), "tiers a and b"):
				t.Errorf("%s: %s does not say that %s is of tiers A and B", uid, p.Title, s.metric)
			case strings.Contains(m.Needs, "on C ") && !strings.Contains(strings.ToLower(p.Description), "tier c"):
				t.Errorf("%s: %s does not say what %s lacks on tier C", uid, p.Title, s.metric)
			}
		})
	}
}

func TestLinksLeadSomewhere(t *testing.T) {
	files, err := made()
	if err != nil {
		t.Fatal(err)
	}
	var (
		board   = regexp.MustCompile(`/d/([a-z0-9-]+)`)
		runbook = regexp.MustCompile(`https?://[^"]+`)
		asked   = regexp.MustCompile(`\$\{__(?:data\.fields|field\.labels)\.(\w+)`)
	)
	runbooks := map[string]bool{runbookBase + "${__data.fields.alertname}.md": true}
	for _, name := range []string{
		"AcceptQueueOverflow", "AcceptQueueNearFull", "SynQueueOverflow", "SynFlood", "AcceptWaitLong", "ListenerStalled", "BacklogClamped",
		"CloseWaitLeak", "TimeWaitOverflow", "ConnectFailuresRising", "AuditDifference", "EventsLost", "AgentDown", "AgentDegraded",
	} {
		runbooks[runbookBase+"Sockq"+name+".md"] = false
	}
	for path, content := range files {
		if !strings.HasSuffix(path, ".json") {
			continue
		}
		for _, m := range board.FindAllStringSubmatch(string(content), -1) {
			if _, ok := files["grafana/"+m[1]+".json"]; !ok {
				t.Errorf("%s: there is no dashboard %s", path, m[1])
			}
		}
		for _, url := range runbook.FindAllString(string(content), -1) {
			if _, ok := runbooks[url]; !ok {
				t.Errorf("%s: %s is no runbook", path, url)
			}
			runbooks[url] = true
		}
		for _, m := range asked.FindAllStringSubmatch(string(content), -1) {
			if !slices.Contains([]string{"instance", "netns", "address", "alertname"}, m[1]) {
				t.Errorf("%s: a link asks for %s", path, m[1])
			}
		}
	}
	for url, linked := range runbooks {
		if !linked {
			t.Errorf("no panel leads to %s", url)
		}
	}
}

func TestConfigMapsCarryTheDashboards(t *testing.T) {
	files, err := made()
	if err != nil {
		t.Fatal(err)
	}
	maps := strings.Split(string(files["kubernetes/configmap.yaml"]), "\n---\n")
	if len(maps) != 4 {
		t.Errorf("%d ConfigMaps, want 4", len(maps))
	}
	for _, m := range maps {
		// kubectl apply keeps the object in an annotation.
		if len(m) > 256<<10 {
			t.Errorf("a ConfigMap has %d bytes", len(m))
		}
		head, body, _ := strings.Cut(m, ".json: |\n")
		uid := head[strings.LastIndexByte(head, ' ')+1:]
		got := strings.ReplaceAll("\n"+strings.TrimRight(body, "\n"), "\n    ", "\n")[1:] + "\n"
		if got != string(files["grafana/"+uid+".json"]) {
			t.Errorf("the ConfigMap of %q does not have its dashboard", uid)
		}
		for _, want := range []string{`    grafana_dashboard: "1"`, `    grafana_folder: sockq`, "  name: " + uid + "-dashboard"} {
			if !strings.Contains(head, want+"\n") {
				t.Errorf("the ConfigMap of %s lacks %q", uid, want)
			}
		}
	}
}
