package dashboards

import (
	"errors"
	"fmt"

	"github.com/grafana/grafana-foundation-sdk/go/cog"
	"github.com/grafana/grafana-foundation-sdk/go/cog/variants"
	"github.com/grafana/grafana-foundation-sdk/go/common"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
	"github.com/grafana/grafana-foundation-sdk/go/heatmap"
	"github.com/grafana/grafana-foundation-sdk/go/prometheus"
	"github.com/grafana/grafana-foundation-sdk/go/stat"
	"github.com/grafana/grafana-foundation-sdk/go/statetimeline"
	"github.com/grafana/grafana-foundation-sdk/go/table"
	"github.com/grafana/grafana-foundation-sdk/go/timeseries"
	"github.com/grafana/grafana-foundation-sdk/go/units"
)

// Colours, by what they ask of who looks.
const (
	fine    = "green"
	look    = "orange"
	act     = "red"
	neutral = "blue"
)

// datasource is the one that the dashboard's variable chooses.
var datasource = common.DataSourceRef{Type: cog.ToPtr("prometheus"), Uid: cog.ToPtr("${datasource}")}

// A panel is one of the SDK's, built; what all kinds have in common is set by its
// methods. Errors wait in it until the dashboard is built.
type panel struct {
	dashboard.Panel
	err error
}

// A query and the legend of its series.
type query struct{ legend, expr string }

// text is what stands in a panel's head and behind its "i": what it shows and what
// to do about it.
type text struct{ title, description string }

// stats shows numbers of now, a tile for each series.
func stats(t text, unit string, queries ...query) *panel {
	return built(describe(stat.NewPanelBuilder(), t).
		Unit(unit).
		ReduceOptions(common.NewReduceDataOptionsBuilder().Calcs([]string{"lastNotNull"})).
		ColorMode(common.BigValueColorModeValue).
		GraphMode(common.BigValueGraphModeNone).
		Orientation(common.VizOrientationAuto).
		ColorScheme(dashboard.NewFieldColorBuilder().Mode(dashboard.FieldColorModeIdThresholds)).
		Targets(targets(prometheus.PromQueryFormatTimeSeries, true, queries...))).
		thresholds(neutral)
}

// graph shows series over time.
func graph(t text, unit string, queries ...query) *panel {
	return built(describe(timeseries.NewPanelBuilder(), t).
		Unit(unit).Min(0).
		LineWidth(1).FillOpacity(0).
		ShowPoints(common.VisibilityModeNever).
		Legend(common.NewVizLegendOptionsBuilder().
			DisplayMode(common.LegendDisplayModeTable).Placement(common.LegendPlacementBottom).ShowLegend(true).
			Calcs([]string{"lastNotNull", "max"}).SortBy("Max").SortDesc(true)).
		Tooltip(common.NewVizTooltipOptionsBuilder().Mode(common.TooltipDisplayModeMulti).Sort(common.SortOrderDescending)).
		Targets(targets(prometheus.PromQueryFormatTimeSeries, false, queries...)))
}

// durations shows a histogram's buckets over time: how many took how long.
func durations(t text, buckets string) *panel {
	return built(describe(heatmap.NewPanelBuilder(), t).
		Unit(units.CountsPerSecond).
		Color(heatmap.NewHeatmapColorOptionsBuilder().
			Mode(heatmap.HeatmapColorModeScheme).Scheme("Oranges").Exponent(0.5).Steps(64)).
		YAxis(heatmap.NewYAxisConfigBuilder().Unit(units.Seconds)).
		CellValues(heatmap.NewCellValuesBuilder().Unit(units.CountsPerSecond)).
		Tooltip(heatmap.NewHeatmapTooltipBuilder().Mode(common.TooltipDisplayModeSingle)).
		Targets(targets(prometheus.PromQueryFormatHeatmap, false, query{"{{le}}", buckets})))
}

// timeline shows in words and colours what a number stands for over time.
func timeline(t text, words []word, queries ...query) *panel {
	return built(describe(statetimeline.NewPanelBuilder(), t).
		Unit(units.NoUnit).
		Mappings(inWords(words)).
		MergeValues(true).FillOpacity(80).LineWidth(0).RowHeight(0.85).PerPage(10).
		Legend(common.NewVizLegendOptionsBuilder().
			DisplayMode(common.LegendDisplayModeList).Placement(common.LegendPlacementBottom).ShowLegend(true)).
		Tooltip(common.NewVizTooltipOptionsBuilder().Mode(common.TooltipDisplayModeSingle).Sort(common.SortOrderNone)).
		Targets(targets(prometheus.PromQueryFormatTimeSeries, false, queries...)))
}

// A column of a table: the value of a query, or a label that all of its queries
// have.
type column struct {
	label string // or
	expr  string

	title string
	unit  string
	steps []step
	words []word
	url   string
	wide  uint32 // pixels; 0: as it comes
}

// columns shows queries of now as a table: rows that agree in all labels of all
// queries are one. It is sorted by the column of that title, the highest first.
func columns(t text, sortedBy string, of ...column) *panel {
	b := describe(table.NewPanelBuilder(), t).
		Unit(units.Short).
		Filterable(true).
		SortBy([]cog.Builder[common.TableSortByFieldState]{
			common.NewTableSortByFieldStateBuilder().DisplayName(sortedBy).Desc(true),
		}).
		Footer(common.NewTableFooterOptionsBuilder().Show(false).Reducer([]string{"sum"}))

	of = append([]column{{label: labelCluster, title: "Cluster"}}, of...) // where there are several
	var queries []query
	for _, c := range of {
		if c.expr != "" {
			queries = append(queries, query{"", c.expr})
		}
	}
	hidden := map[string]any{"Time": true}
	order := make(map[string]any)
	values := 0
	for i, c := range of {
		field := c.label
		if c.expr != "" {
			field = "Value"
			if len(queries) > 1 {
				field = "Value #" + refID(values)
			}
			values++
		}
		order[field] = i
		if c.title == "" { // it is there for its labels
			hidden[field] = true
			continue
		}
		b.OverrideByName(field, c.properties())
	}
	if len(queries) > 1 {
		b.WithTransformation(dashboard.DataTransformerConfig{Id: "merge", Options: map[string]any{}})
	}
	b.WithTransformation(dashboard.DataTransformerConfig{Id: "organize", Options: map[string]any{
		"excludeByName": hidden, "indexByName": order, "renameByName": map[string]any{},
	}})
	return built(b.Targets(targets(prometheus.PromQueryFormatTable, true, queries...)))
}

func (c column) properties() []dashboard.DynamicConfigValue {
	p := []dashboard.DynamicConfigValue{{Id: "displayName", Value: c.title}}
	unit := c.unit
	if c.label != "" {
		unit = units.String // a namespace's number is its name
	}
	if unit != "" {
		p = append(p, dashboard.DynamicConfigValue{Id: "unit", Value: unit})
	}
	if c.wide > 0 {
		p = append(p, dashboard.DynamicConfigValue{Id: "custom.width", Value: c.wide})
	}
	if c.url != "" {
		p = append(p, dashboard.DynamicConfigValue{Id: "links", Value: []any{map[string]any{"title": "Open", "url": c.url}}})
	}
	if len(c.words) > 0 {
		p = append(p, dashboard.DynamicConfigValue{Id: "mappings", Value: inWords(c.words)})
	}
	if len(c.steps) > 0 || len(c.words) > 0 {
		p = append(p, dashboard.DynamicConfigValue{Id: "thresholds", Value: stepped("transparent", c.steps)})
	}
	if len(c.steps) > 0 || len(c.words) > 0 {
		p = append(p,
			dashboard.DynamicConfigValue{Id: "custom.cellOptions", Value: map[string]any{"type": "color-background", "mode": "basic"}},
			dashboard.DynamicConfigValue{Id: "custom.displayMode", Value: "color-background"}, // Grafana 9.4's name of it
		)
	}
	return p
}

// thresholds colours values: base below the first step.
func (p *panel) thresholds(base string, steps ...step) *panel {
	config := stepped(base, steps)
	p.FieldConfig.Defaults.Thresholds = &config
	return p
}

// share is for ratios that become serious at 0.8 and are full at 1. A queue can hold
// a little more, where connections arrive on several CPUs at once.
func (p *panel) share() *panel {
	p.FieldConfig.Defaults.Min = cog.ToPtr(0.0)
	if custom, ok := p.FieldConfig.Defaults.Custom.(*timeseries.FieldConfig); ok {
		custom.AxisSoftMax = cog.ToPtr(1.0)
	}
	return p.thresholds(fine, nearFull...)
}

// lined draws the thresholds into a graph.
func (p *panel) lined() *panel {
	if custom, ok := p.FieldConfig.Defaults.Custom.(*timeseries.FieldConfig); ok {
		custom.ThresholdsStyle = &common.GraphThresholdsStyleConfig{Mode: common.GraphThresholdsStyleModeDashed}
		return p
	}
	p.err = errors.Join(p.err, fmt.Errorf("%q is no graph", *p.Title))
	return p
}

// stacked draws the series of a graph on top of each other: their sum matters.
func (p *panel) stacked() *panel {
	if custom, ok := p.FieldConfig.Defaults.Custom.(*timeseries.FieldConfig); ok {
		custom.Stacking = &common.StackingConfig{Mode: cog.ToPtr(common.StackingModeNormal), Group: cog.ToPtr("A")}
		custom.FillOpacity = cog.ToPtr(40.0)
		return p
	}
	p.err = errors.Join(p.err, fmt.Errorf("%q is no graph", *p.Title))
	return p
}

// dashed sets the series of a limit off from those that it limits.
func (p *panel) dashed(legends string) *panel {
	return p.override(dashboard.MatcherConfig{Id: "byRegexp", Options: legends},
		dashboard.DynamicConfigValue{Id: "custom.lineStyle", Value: map[string]any{"fill": "dash", "dash": []int{8, 6}}},
		dashboard.DynamicConfigValue{Id: "custom.fillOpacity", Value: 0},
	)
}

// coloured gives the series of these names their words' colours.
func (p *panel) coloured(words []word) *panel {
	for _, w := range words {
		p.override(dashboard.MatcherConfig{Id: "byName", Options: w.text},
			dashboard.DynamicConfigValue{Id: "color", Value: map[string]any{"mode": "fixed", "fixedColor": w.colour}})
	}
	return p
}

func (p *panel) override(of dashboard.MatcherConfig, properties ...dashboard.DynamicConfigValue) *panel {
	p.FieldConfig.Overrides = append(p.FieldConfig.Overrides,
		dashboard.DashboardFieldConfigSourceOverrides{Matcher: of, Properties: properties})
	return p
}

// span takes that many of the row's 24 columns; panels without share the rest.
func (p *panel) span(columns uint32) *panel {
	p.GridPos = &dashboard.GridPos{W: columns}
	return p
}

// leads adds a link to the values.
func (p *panel) leads(title, url string) *panel {
	p.FieldConfig.Defaults.Links = append(p.FieldConfig.Defaults.Links, link(title, url))
	return p
}

// runbooks links the panel to those of alerts about it.
func (p *panel) runbooks(alerts ...Alert) *panel {
	for _, a := range alerts {
		l := link("Runbook: "+string(a), a.runbook())
		l.TargetBlank = true
		p.Links = append(p.Links, l)
	}
	return p
}

// tiers says where the panel has no data, or less.
func (p *panel) tiers(sentence string) *panel { return p.say(sentence) }

// empty says what it means when the panel has no data, where that is normal.
func (p *panel) empty(meaning string) *panel {
	if p.Type != "table" { // there it would stand in each cell without a value
		p.FieldConfig.Defaults.NoValue = &meaning
	}
	return p.say("No data is normal: " + meaning + ".")
}

func (p *panel) say(sentence string) *panel {
	*p.Description += "\n\n" + sentence
	return p
}

// A step of thresholds: the colour from that value on.
type step struct {
	from   float64
	colour string
}

var (
	nearFull = []step{{0.8, look}, {1, act}}
	anyIsBad = []step{{1e-9, act}}
	anyIsOdd = []step{{1e-9, look}}
	oneIsBad = []step{{1, act}}
	oneIsOdd = []step{{1, look}}
)

func stepped(base string, steps []step) dashboard.ThresholdsConfig {
	config := dashboard.ThresholdsConfig{Mode: dashboard.ThresholdsModeAbsolute, Steps: []dashboard.Threshold{{Color: base}}}
	for _, s := range steps {
		config.Steps = append(config.Steps, dashboard.Threshold{Value: cog.ToPtr(s.from), Color: s.colour})
	}
	return config
}

// A word for a number.
type word struct {
	number, text, colour string
}

func inWords(words []word) []dashboard.ValueMapping {
	m := dashboard.NewValueMap()
	for i, w := range words {
		m.Options[w.number] = dashboard.ValueMappingResult{Text: &w.text, Color: &w.colour, Index: cog.ToPtr(int32(i))}
	}
	return []dashboard.ValueMapping{{ValueMap: m}}
}

// builder is what the SDK's builders of panels have in common.
type builder[B any] interface {
	cog.Builder[dashboard.Panel]
	Title(string) B
	Description(string) B
	Datasource(common.DataSourceRef) B
}

func describe[B builder[B]](b B, t text) B {
	return b.Title(t.title).Description(t.description).Datasource(datasource)
}

func built(b cog.Builder[dashboard.Panel]) *panel {
	p, err := b.Build()
	return &panel{p, err}
}

func targets(format prometheus.PromQueryFormat, now bool, queries ...query) []cog.Builder[variants.Dataquery] {
	var all []cog.Builder[variants.Dataquery]
	for i, q := range queries {
		b := prometheus.NewDataqueryBuilder().
			Datasource(datasource).
			RefId(refID(i)).
			Expr(q.expr).
			LegendFormat(q.legend).
			Format(format).
			EditorMode(prometheus.QueryEditorModeCode)
		if now {
			b.Instant()
		} else {
			b.Range()
		}
		all = append(all, b)
	}
	return all
}

func refID(i int) string { return string(rune('A' + i)) }

func link(title, url string) dashboard.DashboardLink {
	return dashboard.DashboardLink{
		Title: title, Type: dashboard.DashboardLinkTypeLink, Url: &url, Icon: "external link", Tags: []string{},
	}
}
