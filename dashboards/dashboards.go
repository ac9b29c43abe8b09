// Package dashboards builds sockq's Grafana dashboards. Each of fleet.go,
// listener.go, states.go and agent.go is one, a list of rows and panels; the other
// files are what they are made of. The command generate writes them as JSON.
package dashboards

//go:generate go run ./generate

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/grafana/grafana-foundation-sdk/go/cog"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"

	"sockq/collectors/catalogue"
)

// The dashboards' uids. Links and bookmarks depend on them.
const (
	fleetUID    = "sockq-fleet"
	listenerUID = "sockq-listener"
	statesUID   = "sockq-states"
	agentUID    = "sockq-agent"
)

// tag is what all of them have, and what their links to each other go by.
const tag = "sockq"

// A board is a dashboard before it is one of Grafana's.
type board struct {
	uid, title, description string
	scope                   scope // in the order of the variables
	rows                    []row
}

// Files returns what is generated, by path below this directory.
func Files() (map[string][]byte, error) {
	files := make(map[string][]byte)
	var (
		maps []string
		errs []error
	)
	for _, b := range []board{fleet(), listeners(), states(), agent()} {
		d, err := b.build()
		if err != nil {
			errs = append(errs, fmt.Errorf("dashboard %q: %w", b.title, err))
			continue
		}
		content, err := render(d)
		if err != nil {
			errs = append(errs, fmt.Errorf("dashboard %q: %w", b.title, err))
			continue
		}
		files["grafana/"+b.uid+".json"] = content
		maps = append(maps, configMap(b.uid, content))
	}
	files["kubernetes/configmap.yaml"] = []byte("# Made by go generate ./dashboards.\n" + strings.Join(maps, "---\n"))
	return files, errors.Join(errs...)
}

// render writes v with its keys sorted and its queries legible: the SDK's own
// marshalling escapes < and >.
func render(v any) ([]byte, error) {
	raw, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	var plain any
	if err := d.Decode(&plain); err != nil {
		return nil, err
	}
	var out bytes.Buffer
	e := json.NewEncoder(&out)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	err = e.Encode(plain)
	return out.Bytes(), err
}

// configMap is what the sidecar of Grafana's Helm chart looks for. One for each
// dashboard: what kubectl apply remembers of an object has to be below 256 KiB.
func configMap(uid string, content []byte) string {
	return "apiVersion: v1\n" +
		"kind: ConfigMap\n" +
		"metadata:\n" +
		"  name: " + uid + "-dashboard\n" +
		"  labels:\n" +
		"    app.kubernetes.io/name: sockq\n" +
		"    grafana_dashboard: \"1\"\n" +
		"  annotations:\n" +
		"    grafana_folder: sockq\n" +
		"data:\n" +
		"  " + uid + ".json: |\n" +
		"    " + strings.ReplaceAll(strings.TrimSpace(string(content)), "\n", "\n    ") + "\n"
}

// build makes a dashboard of the form that Grafana 9.4 knows; that which the SDK
// prefers needs a current one.
//
//nolint:staticcheck // so it is deprecated
func (b board) build() (dashboard.Dashboard, error) {
	d, err := dashboard.NewDashboardBuilder(b.title).
		Uid(b.uid).
		Description(b.description).
		Tags([]string{tag, "tcp"}).
		Readonly().
		Tooltip(dashboard.DashboardCursorSyncCrosshair).
		Time("now-1h", "now").
		Refresh("30s").
		Variables(b.variables()).
		Annotation(b.annotation()).
		Link(dashboard.NewDashboardLinkBuilder("sockq").
			Type(dashboard.DashboardLinkTypeDashboards).Icon("external link").
			Tags([]string{tag}).AsDropdown(true).IncludeVars(true).KeepTime(true)).
		Build()
	if err != nil {
		return d, err
	}
	// The SDK puts both where one has to look for them, in a menu.
	d.Links[0].Placement, d.Annotations.List[0].Placement = nil, nil
	d.Panels, err = lay(b.rows)
	return d, err
}

// annotation marks when pages on what was chosen began and ended, one mark for all
// listeners: each warning of each would paint the graphs red. Alerts lack the labels
// that do not concern them.
func (b board) annotation() cog.Builder[dashboard.AnnotationQuery] {
	matchers := []string{`alertname=~"Sockq.+"`, is("alertstate", "firing"), is(labelSeverity, "critical")}
	for _, label := range b.scope {
		matchers = append(matchers, label+`=~"|${`+label+`}"`)
	}
	return dashboard.NewAnnotationQueryBuilder().
		Name("Critical alerts").
		Datasource(datasource).
		Enable(true).
		IconColor(act).
		Expr(maxBy(by(labelAlert), alerts+"{"+strings.Join(matchers, ", ")+"}")).
		Step("60s").
		TitleFormat("{{alertname}}").
		TagKeys(labelAlert)
}

// variables lets the user choose the data source and what the scope has, each
// among what those before it leave.
func (b board) variables() []cog.Builder[dashboard.VariableModel] {
	all := []cog.Builder[dashboard.VariableModel]{
		dashboard.NewDatasourceVariableBuilder("datasource").Label("Data source").Type("prometheus"),
	}
	for i, label := range b.scope {
		m := catalogue.BuildInfo // every agent has it
		if !slices.Contains(everywhere, label) {
			m = catalogue.AcceptQueueLimit
			if b.uid == statesUID {
				m = catalogue.TCPSockets
			}
		}
		values := "label_values(" + b.scope[:i].of(m) + ", " + label + ")"
		allValue := ".*" // also series without the label
		if label == labelJob || label == labelInstance || label == catalogue.LabelNetns || label == catalogue.LabelAddress {
			allValue = ".+"
		}
		all = append(all, dashboard.NewQueryVariableBuilder(label).
			Label(variableLabels[label]).
			Datasource(datasource).
			Query(dashboard.StringOrMap{Map: map[string]any{"query": values, "refId": label}}).
			Definition(values).
			Multi(true).IncludeAll(true).AllValue(allValue).
			Current(dashboard.VariableOption{Selected: cog.ToPtr(true), Text: list("All"), Value: list("$__all")}).
			Refresh(dashboard.VariableRefreshOnTimeRangeChanged).
			Sort(dashboard.VariableSortAlphabeticalCaseInsensitiveAsc))
	}
	return all
}

var variableLabels = map[string]string{
	labelCluster: "Cluster", labelJob: "Job", labelInstance: "Node", catalogue.LabelNamespace: "Namespace", catalogue.LabelPod: "Pod",
	catalogue.LabelNetns: "Network namespace", catalogue.LabelAddress: "Address", catalogue.LabelProcess: "Process",
}

func list(s string) dashboard.StringOrArrayOfString {
	return dashboard.StringOrArrayOfString{ArrayOfString: []string{s}}
}

// toListener opens the Listener dashboard for the listener of a table's row, or of
// a series: where says which, by the name of Grafana's variable.
func toListener(where string) string {
	return "/d/" + listenerUID + "?" + kept +
		"&var-instance=${" + where + ".instance:percentencode}" +
		"&var-netns=${" + where + ".netns:percentencode}" +
		"&var-address=${" + where + ".address:percentencode}"
}

// toNode opens a dashboard for a node.
func toNode(uid, where string) string {
	return "/d/" + uid + "?" + kept + "&var-instance=${" + where + ".instance:percentencode}"
}

const (
	// kept are the choices and the time range that a link takes along.
	kept = "${datasource:queryparam}&${cluster:queryparam}&${job:queryparam}&${__url_time_range}"

	ofRow    = "__data.fields"
	ofSeries = "__field.labels"
)
