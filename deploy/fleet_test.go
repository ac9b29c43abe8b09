package deploy_test

import (
	"bytes"
	"crypto/md5"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"

	"sockq/collectors/budget"
	"sockq/collectors/catalogue"
	"sockq/probes/census"
	"sockq/probes/scenario"
)

const (
	alertRules  = "../alerts/rules.yaml"
	fleetRules  = "prometheus/fleet-rules.yaml"
	globalRules = "prometheus/global-rules.yaml"
)

// groupMost is how many rules of a group Mimir's ruler takes by default.
const groupMost = 20

type rule struct {
	Record, Alert, Expr string
	Annotations         map[string]string
}

type ruleGroup struct {
	Name  string
	Rules []rule
}

func groupsOf(t *testing.T, path string) []ruleGroup {
	t.Helper()
	var file struct{ Groups []ruleGroup }
	readYAML(t, path, &file)
	if len(file.Groups) == 0 {
		t.Fatalf("%s has no groups", path)
	}
	return file.Groups
}

func rulesOf(t *testing.T, path string) (all []rule) {
	t.Helper()
	for _, g := range groupsOf(t, path) {
		all = append(all, g.Rules...)
	}
	return all
}

var (
	sockqMetric = regexp.MustCompile(`\bsockq[_:][a-zA-Z0-9_:]+`)
	fleetName   = regexp.MustCompile(`^sockq:(node|cluster)_[a-z0-9_]+:(sum|count|max|rate5m)$`)
)

// asksFor are sockq's metrics in a rule's queries.
func (r rule) asksFor() []string {
	text := r.Expr
	for _, annotation := range r.Annotations {
		text += "\n" + annotation
	}
	return sockqMetric.FindAllString(text, -1)
}

// exposed are the names under which the catalogue's metrics are scraped, and whose they are.
func exposed() map[string]*catalogue.Metric {
	names := make(map[string]*catalogue.Metric)
	for _, m := range catalogue.All {
		names[m.Name] = m
		if m.Type == catalogue.Histogram {
			names[m.Name+"_bucket"], names[m.Name+"_sum"], names[m.Name+"_count"] = m, m, m
		}
	}
	return names
}

func TestFleetRulesByPromtool(t *testing.T) {
	mustRun(t, nil, "promtool", "check", "rules", "--lint=all", "--lint-fatal", fleetRules, globalRules)
	mustRun(t, nil, "promtool", "test", "rules", "prometheus/fleet-rules_test.yaml", "prometheus/global-rules_test.yaml")
}

// A ruler takes the groups, and may evaluate them in any order: of its own file a group
// asks only for what it records itself.
func TestGroupsOfRules(t *testing.T) {
	for _, path := range []string{alertRules, fleetRules, globalRules} {
		groups := groupsOf(t, path)
		for _, g := range groups {
			if len(g.Rules) == 0 || len(g.Rules) > groupMost {
				t.Errorf("%s: group %s has %d rules, at most %d", path, g.Name, len(g.Rules), groupMost)
			}
		}
		if path != fleetRules {
			continue
		}
		recordedBy := make(map[string]string)
		for _, g := range groups {
			for _, r := range g.Rules {
				for _, name := range r.asksFor() {
					if by, ok := recordedBy[name]; fleetName.MatchString(name) && (!ok || by != g.Name) {
						t.Errorf("%s of group %s asks for %s, which is not recorded before it there", r.Record, g.Name, name)
					}
				}
				recordedBy[r.Record] = g.Name
			}
		}
	}
}

// Fleet rules ask for what is there, are additive, and are all tested.
func TestFleetRules(t *testing.T) {
	known := make(map[string]bool)
	for name := range exposed() {
		known[name] = true
	}
	for _, r := range slices.Concat(rulesOf(t, alertRules), rulesOf(t, fleetRules)) {
		known[r.Record] = true
	}
	var tests struct {
		Tests []struct {
			Checks []struct{ Expr string } `yaml:"promql_expr_test"`
		}
	}
	readYAML(t, "prometheus/fleet-rules_test.yaml", &tests)
	tested := make(map[string]bool)
	for _, test := range tests.Tests {
		for _, c := range test.Checks {
			tested[sockqMetric.FindString(c.Expr)] = true
		}
	}
	aggregation := regexp.MustCompile(`^(sum|count|max) (by|without) `)
	for _, r := range rulesOf(t, fleetRules) {
		if !fleetName.MatchString(r.Record) || !aggregation.MatchString(r.Expr) {
			t.Errorf("%s: %s: not a sum, count or maximum of nodes or clusters", r.Record, r.Expr)
		}
		if !tested[r.Record] {
			t.Errorf("%s: fleet-rules_test.yaml does not ask for it", r.Record)
		}
		if strings.HasPrefix(r.Record, "sockq:cluster_") != strings.Contains(r.Expr, " by (cluster, job") {
			t.Errorf("%s: %s: the name is not what it aggregates to", r.Record, r.Expr)
		}
		for _, name := range r.asksFor() {
			if !known[name] {
				t.Errorf("%s: there is no %s", r.Record, name)
			}
		}
	}
}

// A relabeling of remote-write.yaml.
type relabeling struct {
	SourceLabels []string `yaml:"source_labels"`
	Regex        string
	Action       string
}

func (r relabeling) drops(labels map[string]string) bool {
	var values []string
	for _, label := range r.SourceLabels {
		values = append(values, labels[label])
	}
	return regexp.MustCompile("^(?:" + r.Regex + ")$").MatchString(strings.Join(values, ";"))
}

func dropped(t *testing.T) []relabeling {
	t.Helper()
	var config struct {
		RemoteWrite []struct {
			Relabelings []relabeling `yaml:"write_relabel_configs"`
		} `yaml:"remote_write"`
	}
	readYAML(t, "prometheus/remote-write.yaml", &config)
	if len(config.RemoteWrite) != 1 || len(config.RemoteWrite[0].Relabelings) == 0 {
		t.Fatalf("no relabelings: %+v", config)
	}
	return config.RemoteWrite[0].Relabelings
}

// What the rules ask for is written; what is dropped exists.
func TestRemoteWriteKeepsWhatRulesNeed(t *testing.T) {
	drops := dropped(t)
	written := func(labels map[string]string) bool {
		return !slices.ContainsFunc(drops, func(r relabeling) bool { return r.drops(labels) })
	}
	valued := regexp.MustCompile(`(\w+)\{[^}]*\b(event|name)=~?"([A-Za-z0-9_|]+)"`)
	metrics := exposed()
	for _, r := range slices.Concat(rulesOf(t, alertRules), rulesOf(t, fleetRules)) {
		for _, name := range r.asksFor() {
			if metrics[name] != nil && !written(map[string]string{"__name__": name, "job": "sockq"}) {
				t.Errorf("%s%s asks for %s, which is dropped", r.Record, r.Alert, name)
			}
		}
		text := r.Expr
		for _, annotation := range r.Annotations {
			text += "\n" + annotation
		}
		for _, m := range valued.FindAllStringSubmatch(text, -1) {
			for value := range strings.SplitSeq(m[3], "|") {
				if !written(map[string]string{"__name__": m[1], m[2]: value, "job": "sockq"}) {
					t.Errorf("%s%s asks for %s of %s=%q, which is dropped", r.Record, r.Alert, m[1], m[2], value)
				}
			}
		}
	}
	var samples []map[string]string
	for name := range metrics {
		samples = append(samples, map[string]string{"__name__": name})
	}
	for _, event := range census.EventNames {
		samples = append(samples, map[string]string{"__name__": catalogue.KernelTCPEvents.Name, "event": event})
	}
	for _, name := range census.SysctlNames {
		samples = append(samples, map[string]string{"__name__": catalogue.Sysctl.Name, "name": name})
	}
	for _, library := range []string{"go_goroutines", "promhttp_metric_handler_requests_total"} {
		samples = append(samples, map[string]string{"__name__": library, "job": "sockq"})
	}
	lists := regexp.MustCompile(`\(([A-Za-z_]+\|[A-Za-z_|]+)\)`) // of plain names
	for _, r := range drops {
		if r.Action != "drop" || !slices.ContainsFunc(samples, r.drops) {
			t.Errorf("%+v drops nothing", r)
		}
		for _, list := range lists.FindAllStringSubmatch(r.Regex, -1) {
			for name := range strings.SplitSeq(list[1], "|") {
				one := r
				one.Regex = strings.Replace(r.Regex, list[1], name, 1)
				if !slices.ContainsFunc(samples, one.drops) {
					t.Errorf("%s: there is no %s", r.Regex, name)
				}
			}
		}
	}
}

// What README.md says of the share that is written is what the budget has.
func TestRemoteWriteSaves(t *testing.T) {
	drops := dropped(t)
	written := func(m *catalogue.Metric, suffix string, series int, label string, values []string) (n int) {
		if label == "" {
			values = make([]string, series)
		}
		for _, value := range values {
			labels := map[string]string{"__name__": m.Name + suffix, label: value, "job": "sockq"}
			if !slices.ContainsFunc(drops, func(r relabeling) bool { return r.drops(labels) }) {
				n++
			}
		}
		return n
	}
	text := read(t, "prometheus/README.md")
	for _, scrape := range []budget.Scrape{{Tier: "A"}, {Tier: "C"}, {Tier: "A", Native: true}, {Tier: "C", Native: true}} {
		left := make(map[budget.Thing]int)
		for _, m := range catalogue.All {
			thing, series := budget.Of(m), scrape.Metric(m).Usual
			switch {
			case m == catalogue.KernelTCPEvents:
				left[thing] += written(m, "", series, "event", census.EventNames[:])
			case m == catalogue.Sysctl:
				left[thing] += written(m, "", series, "name", census.SysctlNames[:])
			case m.Type == catalogue.Histogram && !scrape.Native:
				each := series / (len(m.Buckets) + 3)
				left[thing] += written(m, "_bucket", series-2*each, "", nil) + written(m, "_sum", each, "", nil) + written(m, "_count", each, "", nil)
			default:
				left[thing] += written(m, "", series, "", nil)
			}
		}
		for _, thing := range []budget.Thing{budget.Listener, budget.Namespace} {
			if of := fmt.Sprintf("%d of %d", left[thing], scrape.One(thing).Usual); !strings.Contains(text, of) {
				t.Errorf("README.md does not say that of %+v, thing %d, %s are written", scrape, thing, of)
			}
		}
	}
}

// The examples take of one node what the budget says of sockq's defaults at most, and not
// much more.
func TestSampleLimit(t *testing.T) {
	worst := budget.Scrape{Tier: "A"}.Node(budget.Count{Listeners: 1001, Namespaces: 301, Processes: 501}).Most
	for _, name := range []string{"scrape", "remote-write"} {
		var config struct {
			ScrapeConfigs []struct {
				SampleLimit int `yaml:"sample_limit"`
			} `yaml:"scrape_configs"`
		}
		readYAML(t, "prometheus/"+name+".yaml", &config)
		if got := config.ScrapeConfigs[0].SampleLimit; got < worst || got > worst*21/20 {
			t.Errorf("%s.yaml has the limit %d, the budget at most %d series", name, got, worst)
		}
	}
}

// site is a directory with all that the examples refer to, and the examples as they are,
// but for paths, addresses and how often things happen.
type site struct {
	t   *testing.T
	dir string
}

const every = "2s"

// patience is for a machine that has other things to do.
const patience = 90 * time.Second

var often = regexp.MustCompile(`(?m)^(\s*(?:scrape_|evaluation_)?interval:) \d+s`)

func newSite(t *testing.T) *site {
	s := &site{t, t.TempDir()}
	for _, path := range []string{alertRules, fleetRules, globalRules} {
		s.write(filepath.Base(path), often.ReplaceAllString(read(t, path), "$1 "+every))
	}
	s.write("nodes.yaml", "[]")
	return s
}

func (s *site) write(name, text string) string {
	s.t.Helper()
	path := filepath.Join(s.dir, name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
	return path
}

// example is one of the examples under another name; replaced are pairs of what has to be in it
// and what is there instead.
func (s *site) example(name, as string, replaced ...string) (path string) {
	s.t.Helper()
	text := read(s.t, "prometheus/"+name)
	for pair := range slices.Chunk(replaced, 2) {
		if !strings.Contains(text, pair[0]) {
			s.t.Fatalf("%s has no %s", name, pair[0])
		}
		text = strings.ReplaceAll(text, pair[0], pair[1])
	}
	text = strings.ReplaceAll(text, "/etc/prometheus/sockq", s.dir)
	return s.write(as, often.ReplaceAllString(text, "$1 "+every))
}

// promtool takes the examples, with the files that they name.
func TestFleetExamples(t *testing.T) {
	s := newSite(t)
	mustRun(t, nil, "promtool", "check", "config", s.example("scrape.yaml", "scrape.yaml"))
	mustRun(t, nil, "promtool", "check", "config", s.example("federation.yaml", "federation.yaml"))
	mustRun(t, nil, "promtool", "check", "config", "--agent", s.example("remote-write.yaml", "remote-write.yaml"))
}

// In Kubernetes each node is one shard's, whatever the address of its pod is. Debian's Prometheus
// cannot ask Kubernetes: it gets what that would answer.
func TestShardsInKubernetes(t *testing.T) {
	example := regexp.MustCompile("(?s)```yaml\n(scrape_configs:.*?)```").FindStringSubmatch(read(t, "prometheus/README.md"))
	if example == nil {
		t.Fatal("README.md has no example")
	}
	discovery := regexp.MustCompile(`(?m)^    kubernetes_sd_configs: .*\n`)
	if !discovery.MatchString(example[1]) || !strings.Contains(example[1], `regex: "0"`) {
		t.Fatalf("not what it should be: %s", example[1])
	}
	const nodes = 8
	pods := "    static_configs:\n"
	for i := range nodes {
		for _, pod := range []struct{ address, app, port string }{
			{"10.0.1", "sockq", "metrics"}, {"10.0.2", "sockq", "metrics"}, {"10.0.3", "sockq", "other"}, {"10.0.4", "other", "metrics"},
		} {
			pods += fmt.Sprintf("      - targets: ['%s.%d:10813']\n        labels: {__meta_kubernetes_pod_label_app_kubernetes_io_name: %s, "+
				"__meta_kubernetes_pod_container_port_name: %s, __meta_kubernetes_pod_node_name: node-%d}\n", pod.address, i, pod.app, pod.port, i)
		}
	}
	s := newSite(t)
	var owners [nodes]string // by node: the shards that scrape it
	for _, shard := range []string{"0", "1"} {
		config := s.write("kubernetes.yaml", discovery.ReplaceAllLiteralString(strings.Replace(example[1], `regex: "0"`, fmt.Sprintf("regex: %q", shard), 1), pods))
		var targets []struct{ Labels map[string]string }
		eventually(t, patience, "promtool has looked", func() error {
			out, err := command(nil, "promtool", "check", "service-discovery", "--timeout=2s", config, "sockq")
			if err == nil {
				err = json.Unmarshal([]byte(out), &targets)
			}
			if err == nil && len(targets) != 4*nodes {
				err = fmt.Errorf("%d pods", len(targets))
			}
			return err
		})
		for _, target := range targets {
			if len(target.Labels) == 0 {
				continue // dropped
			}
			var node int
			if _, err := fmt.Sscanf(target.Labels["instance"], "node-%d", &node); err != nil {
				t.Fatalf("%v: %v", err, target.Labels)
			}
			owners[node] += shard
		}
	}
	both := make(map[string]bool)
	for node, shards := range owners {
		if shards != "00" && shards != "11" { // its pod before and after an update
			t.Errorf("node-%d is of the shards %q", node, shards)
		}
		both[shards] = true
	}
	if len(both) != 2 {
		t.Errorf("all nodes are of the shards %v", both)
	}
}

// The operator's object has the same groups.
func TestFleetRulesForTheOperator(t *testing.T) {
	example := regexp.MustCompile("(?s)```sh\n(.*) \\| kubectl apply .*?```").FindStringSubmatch(read(t, "prometheus/README.md"))
	if example == nil {
		t.Fatal("README.md has no example")
	}
	s := newSite(t)
	path := s.write("rule.yaml", mustRun(t, nil, "sh", "-c", "cd .. && "+example[1]))
	var object struct {
		Kind string
		Spec struct{ Groups []ruleGroup }
	}
	readYAML(t, path, &object)
	if want := groupsOf(t, fleetRules); object.Kind != "PrometheusRule" || !reflect.DeepEqual(object.Spec.Groups, want) {
		t.Errorf("%+v, want the groups %+v", object, want)
	}
}

// starter starts processes that the kernel kills when this one ends, however it does:
// their parent is a thread that ends with it.
var starter = sync.OnceValue(func() chan<- func() {
	starts := make(chan func())
	go func() {
		runtime.LockOSThread()
		for start := range starts {
			start()
		}
	}()
	return starts
})

// start runs a program until the test ends.
func (s *site) start(name string, args ...string) {
	s.t.Helper()
	var log bytes.Buffer
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = &log, &log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	starter() <- func() { started <- cmd.Start() }
	if err := <-started; err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if s.t.Failed() {
			s.t.Logf("%s said:\n%s", strings.Join(cmd.Args, " "), &log)
		}
	})
}

// prometheus starts one and returns its address.
func (s *site) prometheus(name, config string, args ...string) (address string) {
	s.t.Helper()
	address = "127.0.0.1:" + freePorts(s.t, 1)[0]
	s.start("prometheus", append(args, "--config.file="+config, "--web.listen-address="+address)...)
	eventually(s.t, patience, name, func() error {
		resp, err := http.Get("http://" + address + "/-/ready")
		if err != nil {
			return err
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("%s", resp.Status)
		}
		return nil
	})
	return address
}

func (s *site) data(name string) string {
	return "--storage.tsdb.path=" + filepath.Join(s.dir, name)
}

// ask is a query's result: the value by the label given.
func ask(address, query, label string) (map[string]float64, error) {
	resp, err := http.Get("http://" + address + "/api/v1/query?query=" + url.QueryEscape(query))
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	var answer struct {
		Error string
		Data  struct {
			Result []struct {
				Metric map[string]string
				Value  [2]any
			}
		}
	}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		return nil, err
	}
	if answer.Error != "" {
		return nil, fmt.Errorf("%s: %s", query, answer.Error)
	}
	values := make(map[string]float64)
	for _, r := range answer.Data.Result {
		text, _ := r.Value[1].(string)
		value, err := strconv.ParseFloat(text, 64)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", query, err)
		}
		values[r.Metric[label]] = value
	}
	return values, nil
}

// answers waits until a query's result is as wanted.
func (s *site) answers(address, query, label string, want map[string]float64) {
	s.t.Helper()
	eventually(s.t, patience, query, func() error {
		got, err := ask(address, query, label)
		if err == nil && !maps.Equal(got, want) {
			err = fmt.Errorf("%v, want %v", got, want)
		}
		return err
	})
}

func (s *site) value(address, query string) float64 {
	s.t.Helper()
	var got map[string]float64
	eventually(s.t, patience, query, func() (err error) {
		if got, err = ask(address, query, ""); err == nil && len(got) != 1 {
			err = fmt.Errorf("%v", got)
		}
		return err
	})
	return got[""]
}

// hashmod is Prometheus's relabeling of that name.
func hashmod(value string, modulus uint64) uint64 {
	sum := md5.Sum([]byte(value))
	return binary.BigEndian.Uint64(sum[8:]) % modulus
}

// sockq starts an agent that has places for the listeners of other programs, too.
func (s *site) sockq(args ...string) {
	s.t.Helper()
	binary := filepath.Join(s.dir, "sockq")
	build := exec.Command("go", "build", "-o", binary, "../agent")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		s.t.Fatalf("go build: %v: %s", err, out)
	}
	s.start(binary, append(args, "--max-listeners=5000")...)
}

// Four nodes, which are one, two shards of a cluster that scrape two each, with TLS and
// a password, one of them native histograms, a global Prometheus that federates them, and
// two agents that write the same to a further one, whose rules find the same.
func TestFleet(t *testing.T) {
	s := newSite(t)
	shards, addresses := fourNodes(t)
	_, port, err := net.SplitHostPort(addresses[0])
	if err != nil {
		t.Fatal(err)
	}
	ca := newAuthority(t, s.dir)
	var ips []string
	for _, a := range addresses {
		ip, _, _ := net.SplitHostPort(a)
		ips = append(ips, ip)
	}
	ca.issue(t, "sockq", pkix.Name{CommonName: "sockq"}, ips...)
	s.write("password", "fakepassword")
	s.write("nodes.yaml", "- targets: ['"+strings.Join(addresses, "', '")+"']\n")
	s.sockq("--web.listen-address=0.0.0.0:"+port, "--web.config.file="+s.example("web.yml", "web.yml"))
	s.wantsPassword(addresses[0])

	works, refuses := scenario.NewStage(t, scenario.IPv4), scenario.NewStage(t, scenario.IPv4)
	const limit = "    sample_limit:"
	// What else is on this machine is not the fleet's.
	ours := fmt.Sprintf("    metric_relabel_configs: [{source_labels: [netns], regex: '|%d|%d', action: keep}]\n", works.NS.Inode(), refuses.NS.Inode())
	const quiet = "127.0.0.1:9" // where no Alertmanager is
	native := [2][]string{1: {"--enable-feature=native-histograms"}}
	var cluster []string
	for i := range 2 {
		name := strconv.Itoa(i)
		config := s.example("scrape.yaml", "scrape-"+name+".yaml", "alertmanager.example.com:9093", quiet, `"0"`, strconv.Quote(name), limit, ours+limit)
		cluster = append(cluster, s.prometheus("shard "+name, config, append(native[i], s.data(name))...))
	}
	global := s.prometheus("the global one", s.example("federation.yaml", "federation.yaml", "alertmanager.example.com:9093", quiet,
		"prometheus.eu-1.example.com:9090", cluster[0], "prometheus.us-1.example.com:9090", cluster[1]), s.data("global"))
	var ruleFiles []string
	for _, path := range []string{alertRules, fleetRules, globalRules} {
		ruleFiles = append(ruleFiles, filepath.Join(s.dir, filepath.Base(path)))
	}
	central := s.prometheus("the central one",
		s.write("central.yaml", "global: {evaluation_interval: "+every+"}\nrule_files: ["+strings.Join(ruleFiles, ", ")+"]\n"),
		s.data("central"), "--web.enable-remote-write-receiver", "--enable-feature=native-histograms")
	for i := range 2 {
		name := strconv.Itoa(i)
		config := s.example("remote-write.yaml", "remote-write-"+name+".yaml", "https://mimir.example.com/api/v1/push", "http://"+central+"/api/v1/write",
			`"0"`, strconv.Quote(name), "eu-1-0", "eu-1-"+name, limit, ours+limit, "name: fleet", fmt.Sprintf("name: fleet\n    send_native_histograms: %t", native[i] != nil))
		s.prometheus("agent "+name, config, append(native[i], "--enable-feature=agent", "--storage.agent.path="+filepath.Join(s.dir, "agent-"+name))...)
	}

	// Each node is one shard's.
	for i, c := range cluster {
		want := make(map[string]float64)
		for _, node := range shards[i] {
			want[node] = 1
		}
		s.answers(c, `up{job="sockq"}`, "instance", want)
	}

	l := works.Listen(16)
	for range 3 {
		client := works.Connect(l.Addr())
		server := l.Accept()
		client.Close()
		server.Close()
	}
	full := refuses.Listen(2)
	where := fmt.Sprintf(`netns="%d", address=%q`, refuses.NS.Inode(), full.Addr())
	s.answers(cluster[0], `count(sockq_listener_socket_drops_total{`+where+`})`, "", map[string]float64{"": 2})
	s.answers(cluster[1], `count(sockq_listener_socket_drops_total{`+where+`})`, "", map[string]float64{"": 2})
	for range 3 {
		refuses.Connect(full.Addr())
	}
	for range 20 {
		refuses.Begin(full.Addr())
	}

	all := make(map[string]float64)
	for _, node := range addresses {
		all[node] = 1
	}
	s.answers(global, `ALERTS{alertname="SockqAcceptQueueOverflow", alertstate="firing", severity="critical", `+where+`}`, "instance", all)
	s.answers(global, `count by (instance) (sockq:listener_overflow:ratio_rate5m{`+where+`})`, "instance", all)
	s.answers(global, `count by (instance) (sockq:node_kernel:count{cluster="eu-1", job="sockq"})`, "instance", all)
	s.answers(global, `sum by (cluster) (sockq:cluster_nodes:count)`, "cluster", map[string]float64{"eu-1": 4})
	s.answers(global, `sum by (cluster) (sockq:cluster_listeners:sum)`, "cluster", map[string]float64{"eu-1": 8})
	s.answers(global, `sum by (cluster) (sockq:cluster_listeners_refusing:sum)`, "cluster", map[string]float64{"eu-1": 4})
	s.answers(global, `count({__name__=~"sockq_.+"})`, "", map[string]float64{}) // nothing else comes

	// The central one's rules see the same, of fewer series.
	s.answers(central, `ALERTS{alertname="SockqAcceptQueueOverflow", alertstate="firing", severity="critical", `+where+`}`, "instance", all)
	s.answers(central, `sum by (cluster) (sockq:cluster_nodes:count)`, "cluster", map[string]float64{"eu-1": 4})
	s.answers(central, `sum by (cluster) (sockq:cluster_listeners_refusing:sum)`, "cluster", map[string]float64{"eu-1": 4})
	s.answers(central, `count by (shard) (up{job="sockq"})`, "shard", map[string]float64{"eu-1-0": 2, "eu-1-1": 2})
	s.answers(central, `count({__name__=~"sockq_tcp_state_seconds.*|go_.+|sockq_sysctl", name!~"somaxconn|tcp_.*(backlog|cookies|buckets)"})`, "", map[string]float64{})
	for _, address := range []string{global, central} {
		s.answers(address, `count(ALERTS{alertname=~"SockqFederationDown|SockqShardSilent"})`, "", map[string]float64{})
	}

	for i, c := range cluster {
		s.holdsTheBudget(c, shards[i][0], fmt.Sprintf(`netns="%d", address=%q`, works.NS.Inode(), l.Addr()), native[i] != nil)
	}
	node := shards[0][0]
	scraped := s.value(cluster[0], fmt.Sprintf(`scrape_samples_post_metric_relabeling{instance=%q}`, node))
	sent := s.value(central, fmt.Sprintf(`count({job="sockq", instance=%q, __name__!~".*:.*|ALERTS.*"})`, node))
	recorded := s.value(global, fmt.Sprintf(`count({instance=%q, __name__=~"sockq:node_.+"})`, node))
	perCluster := s.value(global, `count({__name__=~"sockq:cluster_.+", shard="0"})`)
	t.Logf("of %v series of the node %v are sent, %v recorded; %v of the cluster by a shard", scraped, sent, recorded, perCluster)
	if recorded > 40 || perCluster > 55 {
		t.Errorf("%v series are recorded of the node, %v of the cluster", recorded, perCluster)
	}
}

// Network namespaces with none to a thousand listeners that work have as many series as the
// budget says, in both forms of histograms.
func TestBudgetOfANode(t *testing.T) {
	s := newSite(t)
	address := "127.0.0.1:" + freePorts(t, 1)[0]
	s.sockq("--web.listen-address=" + address)
	eventually(t, patience, "sockq is ready", func() error {
		_, err := s.scraped(address, false)
		return err
	})
	stages := make(map[int]*scenario.Stage)
	for _, n := range []int{0, 10, 100, 1000} {
		stages[n] = scenario.NewStage(t, scenario.IPv4)
		for _, l := range stages[n].Listeners(n) {
			client := stages[n].Connect(l.Addr())
			server := l.Accept()
			client.Close()
			server.Close()
		}
	}
	for _, native := range []bool{false, true} {
		eventually(t, patience, fmt.Sprintf("the budget, native histograms: %t", native), func() error {
			page, err := s.scraped(address, native)
			if err != nil {
				return err
			}
			scrape := budget.Scrape{Tier: page.tier, Native: native}
			for n, stage := range stages {
				netns := strconv.Itoa(int(stage.NS.Inode()))
				if got, want := page.of[budget.Listener][netns], n*scrape.One(budget.Listener).Usual; got != want {
					return fmt.Errorf("%d listeners have %d series, the budget %d", n, got, want)
				}
				// One without connections has no transitions, nor bytes of the fullest.
				got, want := page.of[budget.Namespace][netns], scrape.One(budget.Namespace)
				if got < want.Usual*3/4 || got > want.Most {
					return fmt.Errorf("a namespace of %d listeners has %d series, the budget %+v", n, got, want)
				}
			}
			t.Logf("tier %s, native %t: a listener has %d series, namespaces %v", page.tier, native, scrape.One(budget.Listener).Usual, slices.Sorted(maps.Values(page.of[budget.Namespace])))
			return nil
		})
	}
}

// scraped is a page as Prometheus takes it: series by what they are about and by network namespace.
type scraped struct {
	tier catalogue.Tiers
	of   map[budget.Thing]map[string]int
}

func (s *site) scraped(address string, native bool) (page scraped, err error) {
	request, err := http.NewRequest(http.MethodGet, "http://"+address+"/metrics", nil)
	if err != nil {
		return page, err
	}
	if native {
		request.Header.Set("Accept", string(expfmt.NewFormat(expfmt.TypeProtoDelim)))
	}
	resp, err := http.DefaultClient.Do(request)
	if err != nil {
		return page, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return page, fmt.Errorf("%s", resp.Status)
	}
	page.of = map[budget.Thing]map[string]int{budget.Listener: {}, budget.Namespace: {}}
	metrics := exposed()
	for decoder := expfmt.NewDecoder(resp.Body, expfmt.ResponseFormat(resp.Header)); ; {
		var family dto.MetricFamily
		if err := decoder.Decode(&family); errors.Is(err, io.EOF) {
			return page, nil
		} else if err != nil {
			return page, err
		}
		for _, m := range family.Metric {
			labels := make(map[string]string)
			for _, l := range m.Label {
				labels[l.GetName()] = l.GetValue()
			}
			if family.GetName() == catalogue.KernelInfo.Name {
				page.tier = catalogue.Tiers(labels["tier"])
			}
			metric := metrics[family.GetName()]
			if metric == nil {
				continue
			}
			thing := budget.Of(metric)
			if thing == budget.Process && labels[catalogue.LabelProcess] == "" {
				thing = budget.Namespace // what no process has open
			}
			if page.of[thing] == nil {
				continue
			}
			series := 1
			if h := m.Histogram; h != nil && !native {
				series = len(h.Bucket) + 2 // sum, count
			}
			page.of[thing][labels[catalogue.LabelNetns]] += series
		}
	}
}

// authorities are those that clients trust.
func (s *site) authorities() *x509.CertPool {
	s.t.Helper()
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM([]byte(read(s.t, filepath.Join(s.dir, "ca.crt")))) {
		s.t.Fatal("no certificate")
	}
	return pool
}

// wantsPassword: with web.yml no path is without TLS, or without the password.
func (s *site) wantsPassword(address string) {
	s.t.Helper()
	pool := s.authorities()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: pool}}}
	status := func(scheme, path, password string) (int, error) {
		request, err := http.NewRequest(http.MethodGet, scheme+"://"+address+path, nil)
		if err != nil {
			return 0, err
		}
		if password != "" {
			request.SetBasicAuth("prometheus", password)
		}
		resp, err := client.Do(request)
		if err != nil {
			return 0, err
		}
		resp.Body.Close()
		return resp.StatusCode, nil
	}
	eventually(s.t, patience, "sockq is ready", func() error {
		code, err := status("https", "/-/ready", "fakepassword")
		if err == nil && code != http.StatusOK {
			err = fmt.Errorf("%d", code)
		}
		return err
	})
	for _, path := range []string{"/", "/metrics", "/api/v1/snapshot", "/-/healthy"} {
		for password, want := range map[string]int{"": http.StatusUnauthorized, "wrong": http.StatusUnauthorized, "fakepassword": http.StatusOK} {
			if got, err := status("https", path, password); err != nil || got != want {
				s.t.Errorf("%s with the password %q: %d, %v, want %d", path, password, got, err, want)
			}
		}
		if got, err := status("http", path, "fakepassword"); err == nil && got != http.StatusBadRequest {
			s.t.Errorf("%s without TLS: %d", path, got)
		}
	}
}

// A client certificate can be asked for, and certificates are renewed without a restart.
func TestClientCertificates(t *testing.T) {
	s := newSite(t)
	ca, stranger := newAuthority(t, s.dir), newAuthority(t, t.TempDir())
	ca.issue(t, "sockq", pkix.Name{CommonName: "sockq"}, "127.0.0.1")
	clients := map[string]string{
		"": "", "ours": ca.issue(t, "client", pkix.Name{CommonName: "prometheus"}), "a stranger's": stranger.issue(t, "client", pkix.Name{CommonName: "prometheus"}),
	}
	address := "127.0.0.1:" + freePorts(t, 1)[0]
	s.sockq("--web.listen-address="+address, "--web.config.file="+s.write("web.yml",
		"tls_server_config: {cert_file: sockq.crt, key_file: sockq.key, client_auth_type: RequireAndVerifyClientCert, client_ca_file: ca.crt}\n"))
	pool := s.authorities()
	ask := func(name string) (serial string, err error) {
		config := &tls.Config{RootCAs: pool}
		if path := clients[name]; path != "" {
			pair, err := tls.LoadX509KeyPair(path+".crt", path+".key")
			if err != nil {
				t.Fatal(err)
			}
			// Also one that the server has not asked for.
			config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }
		}
		client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: config}}
		resp, err := client.Get("https://" + address + "/-/ready")
		if err != nil {
			return "", err
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return "", fmt.Errorf("%s", resp.Status)
		}
		return resp.TLS.PeerCertificates[0].SerialNumber.String(), nil
	}
	var first string
	eventually(t, patience, "sockq is ready", func() (err error) {
		first, err = ask("ours")
		return err
	})
	for _, name := range []string{"", "a stranger's"} {
		if _, err := ask(name); err == nil {
			t.Errorf("a client with the certificate %q is let in", name)
		}
	}
	ca.issue(t, "sockq", pkix.Name{CommonName: "sockq"}, "127.0.0.1")
	if second, err := ask("ours"); err != nil || second == first {
		t.Errorf("the certificate is still number %s, %s, %v", first, second, err)
	}
}

// fourNodes are addresses of this machine, two for each of two shards.
func fourNodes(t *testing.T) (shards [2][]string, all []string) {
	t.Helper()
	for range 100 {
		shards, all = [2][]string{}, nil
		port := freePorts(t, 1)[0]
		for i := range 4 {
			node := net.JoinHostPort(fmt.Sprintf("127.0.0.%d", i+1), port)
			shard := hashmod(node, 2)
			shards[shard] = append(shards[shard], node)
			all = append(all, node)
		}
		if len(shards[0]) == 2 {
			return shards, all
		}
	}
	t.Fatal("there is no such port")
	return shards, nil
}

// holdsTheBudget compares what a node has with what collectors/budget says.
func (s *site) holdsTheBudget(address, node, worker string, native bool) {
	s.t.Helper()
	var tiers map[string]float64
	eventually(s.t, patience, "the tier", func() (err error) {
		if tiers, err = ask(address, fmt.Sprintf(`sockq_kernel_info{instance=%q}`, node), "tier"); err == nil && len(tiers) != 1 {
			err = fmt.Errorf("%v", tiers)
		}
		return err
	})
	scrape := budget.Scrape{Tier: catalogue.Tiers(slices.Collect(maps.Keys(tiers))[0]), Native: native}
	s.answers(address, fmt.Sprintf(`count({__name__=~"sockq_listener_.+", instance=%q, %s})`, node, worker), "",
		map[string]float64{"": float64(scrape.One(budget.Listener).Usual)})

	var things []string
	for name, m := range exposed() {
		if budget.Of(m) != budget.Agent {
			things = append(things, name)
		}
	}
	own := s.value(address, fmt.Sprintf(`count({instance=%q, __name__!~"%s|up|scrape_.+|.+:.+|ALERTS.*"})`, node, strings.Join(things, "|")))
	count := budget.Count{
		Listeners:  int(s.value(address, fmt.Sprintf(`count(sockq_listener_socket_drops_total{instance=%q})`, node))),
		Namespaces: int(s.value(address, fmt.Sprintf(`count(sockq_tcp_sockets{instance=%q, state="LISTEN"})`, node))),
		Processes:  int(s.value(address, fmt.Sprintf(`count(sockq_process_close_wait_sockets{instance=%q})`, node))),
	}
	scraped := s.value(address, fmt.Sprintf(`scrape_samples_post_metric_relabeling{instance=%q}`, node))
	want := scrape.Node(count)
	s.t.Logf("%+v: %v series, budget %+v; of sockq itself %v, budget %d", count, scraped, want, own, budget.AgentMost)
	if int(scraped) > want.Most || own > budget.AgentMost {
		s.t.Errorf("the node has %v series, the budget %d; of sockq itself %v, budget %d", scraped, want.Most, own, budget.AgentMost)
	}
}
