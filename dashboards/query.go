package dashboards

import (
	"slices"
	"strings"

	"sockq/collectors/catalogue"
)

// Labels that Prometheus adds, or its configuration.
const (
	labelCluster  = "cluster"
	labelJob      = "job"
	labelInstance = "instance"
)

// Labels for which the catalogue has no constant.
const (
	labelAlert    = "alertname"
	labelError    = "error"
	labelFrom     = "from"
	labelHow      = "how"
	labelReason   = "reason"
	labelRelease  = "release"
	labelSeverity = "severity"
	labelTier     = "tier"
	labelTo       = "to"
	labelVerdict  = "verdict"
	labelVersion  = "version"
)

// The recording rules of alerts/rules.yaml that panels show. They are the same on
// every tier: SYNs and final ACKs that a full accept queue refused, per second,
// and as a share of all attempts.
const (
	OverflowRate1m  = "sockq:listener_overflow:rate1m"
	OverflowRate5m  = "sockq:listener_overflow:rate5m"
	OverflowRatio1m = "sockq:listener_overflow:ratio_rate1m"
)

// What panels show beside sockq's own metrics: what Prometheus says of a scrape,
// and the Go client of a process.
const (
	up                    = "up"
	scrapeDuration        = "scrape_duration_seconds"
	scrapeSamples         = "scrape_samples_scraped"
	processCPU            = "process_cpu_seconds_total"
	processResidentMemory = "process_resident_memory_bytes"
	processOpenFiles      = "process_open_fds"
	processMaxFiles       = "process_max_fds"
	processStart          = "process_start_time_seconds"
	alerts                = "ALERTS"
)

// Labels to aggregate by.
var (
	node      = []string{labelCluster, labelInstance}
	namespace = []string{labelCluster, labelInstance, catalogue.LabelNetns}
	listener  = []string{
		labelCluster, labelInstance, catalogue.LabelNetns, catalogue.LabelAddress,
		catalogue.LabelProcess, catalogue.LabelNamespace, catalogue.LabelPod,
	}
	process = []string{
		labelCluster, labelInstance, catalogue.LabelNetns,
		catalogue.LabelProcess, catalogue.LabelNamespace, catalogue.LabelPod,
	}
)

// Legends of the same.
const (
	nodeLegend      = "{{instance}}"
	namespaceLegend = "{{netns}} {{namespace}} {{pod}} · {{instance}}"
	listenerLegend  = "{{address}} {{process}} {{pod}} · {{netns}} · {{instance}}"
	processLegend   = "{{process}} {{pod}} · {{netns}} · {{instance}}"
)

// A scope is what a dashboard lets its user choose: names of labels, and of the
// variables that hold the values chosen.
type scope []string

// everywhere is what every series has, whoever scraped it.
var everywhere = scope{labelCluster, labelJob, labelInstance}

// of selects what was chosen of a metric. A variable applies where the metric has
// its label.
func (s scope) of(m *catalogue.Metric, more ...string) string {
	return s.selector(m.Name, m.Labels, more)
}

// bucket selects the classic form of a histogram.
func (s scope) bucket(m *catalogue.Metric, more ...string) string {
	return s.selector(m.Name+"_bucket", m.Labels, more)
}

// rule selects what was chosen of a recording rule about listeners.
func (s scope) rule(name string) string {
	return s.selector(name, catalogue.AcceptQueueLength.Labels, nil)
}

// named selects a metric that is not sockq's own: of the targets chosen only.
func (s scope) named(name string, more ...string) string {
	return s.selector(name, nil, more)
}

func (s scope) selector(name string, labels, more []string) string {
	var matchers []string
	for _, label := range s {
		if slices.Contains(everywhere, label) || slices.Contains(labels, label) {
			matchers = append(matchers, label+`=~"$`+label+`"`)
		}
	}
	return name + "{" + strings.Join(append(matchers, more...), ", ") + "}"
}

// rate is how fast a counter grows, per second.
func (s scope) rate(m *catalogue.Metric, more ...string) string {
	return rate(s.of(m, more...))
}

// buckets is the rate of a histogram by bucket, and by more labels: of its classic
// form, and where Prometheus has only the native one, of that.
func (s scope) buckets(m *catalogue.Metric, by []string, more ...string) string {
	return sumBy(append([]string{"le"}, by...), rate(s.bucket(m, more...))) +
		" or on (" + strings.Join(by, ", ") + ") " + sumBy(by, s.rate(m, more...))
}

// quantile estimates a quantile of a histogram in either form.
func (s scope) quantile(q string, m *catalogue.Metric, by []string, more ...string) string {
	of := func(rates string) string { return "histogram_quantile(" + q + ", " + rates + ")" }
	return of(sumBy(append([]string{"le"}, by...), rate(s.bucket(m, more...)))) +
		" or on (" + strings.Join(by, ", ") + ") " + of(sumBy(by, s.rate(m, more...)))
}

// ofAgents keeps what belongs to sockq: a job may be chosen as "all", and then
// other exporters' processes are in it, too.
func (s scope) ofAgents(expr string) string {
	return expr + " and on (cluster, job, instance) " + s.of(catalogue.BuildInfo)
}

func rate(selector string) string { return "rate(" + selector + "[$__rate_interval])" }

func sumBy(labels []string, expr string) string   { return aggregate("sum", labels, expr) }
func maxBy(labels []string, expr string) string   { return aggregate("max", labels, expr) }
func minBy(labels []string, expr string) string   { return aggregate("min", labels, expr) }
func countBy(labels []string, expr string) string { return aggregate("count", labels, expr) }

func aggregate(how string, labels []string, expr string) string {
	if len(labels) == 0 {
		return how + "(" + expr + ")"
	}
	return how + " by (" + strings.Join(labels, ", ") + ") (" + expr + ")"
}

// orZero is 0 for those of base that expr has nothing to say about; both must have
// the labels.
func orZero(labels []string, expr, base string) string {
	return "(" + expr + " or on (" + strings.Join(labels, ", ") + ") 0 * " + base + ")"
}

// ratio is a / b, and nothing where b is 0.
func ratio(a, b string) string { return a + " / (" + b + " > 0)" }

func topk(k, expr string) string { return "topk(" + k + ", " + expr + ")" }

// only keeps of expr what is in other.
func only(labels []string, expr, other string) string {
	return expr + " and on (" + strings.Join(labels, ", ") + ") " + other
}

// most keeps of expr those that had most of a metric in the time shown: the same ones
// all the way, where topk alone would choose others at each step.
func most(k string, labels []string, expr, how, selector string) string {
	return only(labels, expr, topk(k, aggregate(how, labels, "max_over_time("+selector+"[$__range] @ end())")))
}

// busiest is most by a counter's increase.
func busiest(k string, labels []string, expr, selector string) string {
	return only(labels, expr, topk(k, sumBy(labels, "increase("+selector+"[$__range] @ end())")))
}

func by(labels ...string) []string { return labels }

func also(labels []string, more ...string) []string { return slices.Concat(labels, more) }

// is is a matcher.
func is(label, value string) string { return label + `="` + value + `"` }
