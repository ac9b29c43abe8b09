package deploy_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v2"
)

const chart = "helm/sockq"

// daemonSet is what the tests read of one.
type daemonSet struct {
	Kind string
	Spec struct {
		Template struct {
			Spec podSpec
		}
	}
}

type podSpec struct {
	HostPID                      bool  `yaml:"hostPID"`
	HostNetwork                  bool  `yaml:"hostNetwork"`
	AutomountServiceAccountToken *bool `yaml:"automountServiceAccountToken"`
	Containers                   []struct {
		Name, Image string
		Args        []string
		Ports       []struct {
			Name          string
			ContainerPort int `yaml:"containerPort"`
		}
		SecurityContext struct {
			Privileged               *bool
			AllowPrivilegeEscalation *bool  `yaml:"allowPrivilegeEscalation"`
			ReadOnlyRootFilesystem   *bool  `yaml:"readOnlyRootFilesystem"`
			RunAsUser                *int64 `yaml:"runAsUser"`
			Capabilities             struct{ Add, Drop []string }
			SeccompProfile           struct{ Type string } `yaml:"seccompProfile"`
		} `yaml:"securityContext"`
		VolumeMounts []struct {
			Name      string
			MountPath string `yaml:"mountPath"`
			ReadOnly  bool   `yaml:"readOnly"`
		} `yaml:"volumeMounts"`
	}
	Volumes []struct {
		Name     string
		HostPath *struct{ Path, Type string } `yaml:"hostPath"`
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func readYAML(t *testing.T, path string, into any) {
	t.Helper()
	if err := yaml.Unmarshal([]byte(read(t, path)), into); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
}

func defaults(t *testing.T) *podSpec {
	t.Helper()
	var ds daemonSet
	readYAML(t, "kubernetes/daemonset.yaml", &ds)
	spec := &ds.Spec.Template.Spec
	if ds.Kind != "DaemonSet" || len(spec.Containers) != 1 || spec.Containers[0].Name != "sockq" {
		t.Fatalf("no DaemonSet of one container: %+v", ds)
	}
	return spec
}

// help is what sockq --help prints.
func help(t *testing.T) string {
	t.Helper()
	cmd := exec.Command("go", "run", "./agent", "--help")
	cmd.Dir = ".."
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return string(out)
}

// The manifests and what they are made from have the sums of the last render.
func TestManifestsAreFresh(t *testing.T) {
	listed := make(map[string]string)
	for line := range strings.Lines(read(t, "kubernetes/sha256sums")) {
		sum, name, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "  deploy/")
		listed[name] = sum
	}
	for _, dir := range []string{chart, "kubernetes"} {
		err := filepath.WalkDir(dir, func(name string, d os.DirEntry, err error) error {
			if err != nil || d.IsDir() || name == "kubernetes/sha256sums" {
				return err
			}
			if got := fmt.Sprintf("%x", sha256.Sum256([]byte(read(t, name)))); got != listed[name] {
				t.Errorf("deploy/%s has changed since the manifests were rendered: go run ./deploy/render", name)
			}
			delete(listed, name)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for name := range listed {
		t.Errorf("deploy/%s is gone since the manifests were rendered: go run ./deploy/render", name)
	}
}

// The chart has the rules and dashboards that there are, as they are.
func TestCopiesAreFresh(t *testing.T) {
	for dir, patterns := range map[string][]string{
		chart + "/files":            {"../alerts/rules.yaml", "prometheus/fleet-rules.yaml"},
		chart + "/files/dashboards": {"../dashboards/grafana/*.json"},
	} {
		var originals []string
		for _, pattern := range patterns {
			names, err := filepath.Glob(pattern)
			if err != nil || len(names) == 0 {
				t.Fatalf("there are no %s", pattern)
			}
			originals = append(originals, names...)
		}
		for _, original := range originals {
			if read(t, original) != read(t, filepath.Join(dir, filepath.Base(original))) {
				t.Errorf("%s has changed since it was copied into the chart: go run ./deploy/render", original)
			}
		}
		copied, err := filepath.Glob(filepath.Join(dir, "*.*"))
		if err != nil || len(copied) != len(originals) {
			t.Errorf("the chart has %q, there are %q", copied, originals)
		}
	}
}

// What the manifests give is what sockq --help asks for, and nothing else.
func TestRights(t *testing.T) {
	spec := defaults(t)
	container := spec.Containers[0]
	is := func(p *bool, want bool) bool { return p != nil && *p == want }

	security := container.SecurityContext
	if !is(security.Privileged, false) || !is(security.AllowPrivilegeEscalation, false) || !is(security.ReadOnlyRootFilesystem, true) ||
		security.SeccompProfile.Type != "RuntimeDefault" || !slices.Equal(security.Capabilities.Drop, []string{"ALL"}) {
		t.Errorf("security context: %+v", security)
	}
	if !is(spec.AutomountServiceAccountToken, false) || !spec.HostPID || spec.HostNetwork {
		t.Errorf("pod: %+v", spec)
	}
	for _, v := range spec.Volumes {
		i := slices.IndexFunc(container.VolumeMounts, func(m struct {
			Name      string
			MountPath string `yaml:"mountPath"`
			ReadOnly  bool   `yaml:"readOnly"`
		}) bool {
			return m.Name == v.Name
		})
		if v.HostPath == nil || i < 0 || !container.VolumeMounts[i].ReadOnly || container.VolumeMounts[i].MountPath != v.HostPath.Path {
			t.Errorf("volume %s is not mounted read-only where it is on the node", v.Name)
		}
	}

	text := help(t)
	enough := regexp.MustCompile(`(?m)^ +CAP_(\w+) \+ CAP_(\w+)  `).FindStringSubmatch(text)
	if enough == nil || !slices.Equal(security.Capabilities.Add, enough[1:]) {
		t.Errorf("the DaemonSet has %v, sockq --help asks for %q", security.Capabilities.Add, enough)
	}
	var values struct{ Capabilities map[string]bool }
	readYAML(t, chart+"/values.yaml", &values)
	named := make(map[string]bool)
	for _, m := range regexp.MustCompile(`\bCAP_(\w+)`).FindAllStringSubmatch(text, -1) {
		named[strings.ReplaceAll(strings.ToLower(m[1]), "_", "")] = true
	}
	for name, on := range values.Capabilities {
		if !named[strings.ToLower(name)] {
			t.Errorf("sockq --help does not know CAP_%s", name)
		}
		delete(named, strings.ToLower(name))
		if on != (name == "bpf" || name == "perfmon") {
			t.Errorf("capability %s is %t by default", name, on)
		}
	}
	for name := range named {
		t.Errorf("the chart does not offer the capability %s", name)
	}
}

// notOfTheChart are flags that make no sense in a pod.
var notOfTheChart = []string{"help", "version", "web.systemd-socket", "path.procfs", "path.sysfs", "path.netns"}

// Each flag of sockq can be set by a value, and each flag that the chart sets is one.
func TestFlags(t *testing.T) {
	text := help(t)
	var flags []string
	for _, m := range regexp.MustCompile(`(?m)^ +(?:-\w, )?--(?:\[no-\])?([a-z][-.a-z0-9]*)`).FindAllStringSubmatch(text, -1) {
		flags = append(flags, m[1])
	}
	var schema struct {
		Properties struct {
			Flags struct{ Properties map[string]any }
		}
	}
	if err := json.Unmarshal([]byte(read(t, chart+"/values.schema.json")), &schema); err != nil {
		t.Fatal(err)
	}
	offered := slices.Clone(notOfTheChart)
	for name := range schema.Properties.Flags.Properties {
		offered = append(offered, name)
	}
	for _, m := range regexp.MustCompile(`(?m)^ +- --(?:no-)?([-.a-z0-9]+)`).FindAllStringSubmatch(read(t, chart+"/templates/daemonset.yaml"), -1) {
		if !slices.Contains(offered, m[1]) {
			offered = append(offered, m[1])
		}
	}
	slices.Sort(flags)
	slices.Sort(offered)
	if flags = slices.Compact(flags); !slices.Equal(flags, offered) {
		t.Errorf("sockq has the flags\n%v\nthe chart\n%v", flags, offered)
	}

	port := regexp.MustCompile(`--web.listen-address=(:\d+)`).FindStringSubmatch(text)
	container := defaults(t).Containers[0]
	if port == nil || !slices.Contains(container.Args, port[0]) || len(container.Ports) != 1 || fmt.Sprintf(":%d", container.Ports[0].ContainerPort) != port[1] {
		t.Errorf("sockq listens on %q, the DaemonSet has %+v and %q", port, container.Ports, container.Args)
	}
}

// The schema knows each value, and the README explains it.
func TestValues(t *testing.T) {
	var schema map[string]any
	if err := json.Unmarshal([]byte(read(t, chart+"/values.schema.json")), &schema); err != nil {
		t.Fatal(err)
	}
	var values yaml.MapSlice
	readYAML(t, chart+"/values.yaml", &values)
	_, section, _ := strings.Cut(read(t, chart+"/README.md"), "\n## Values\n")
	section, _, _ = strings.Cut(section, "\n## ")
	var explained []string
	for _, m := range regexp.MustCompile("(?m)^\\| `([^`]+)`").FindAllStringSubmatch(section, -1) {
		explained = append(explained, m[1])
	}
	var names []string
	for _, v := range values {
		names = append(names, v.Key.(string))
		known(t, schema, v.Key.(string), v)
	}
	if !slices.Equal(explained, names) {
		t.Errorf("the README explains %q, there are %q", explained, names)
	}
}

func known(t *testing.T, schema map[string]any, path string, v yaml.MapItem) {
	t.Helper()
	properties, _ := schema["properties"].(map[string]any)
	below, ok := properties[v.Key.(string)].(map[string]any)
	if !ok {
		t.Errorf("the schema does not know %s", path)
		return
	}
	children, _ := v.Value.(yaml.MapSlice)
	if _, free := below["properties"]; !free {
		return // anything goes
	}
	for _, child := range children {
		known(t, below, path+"."+child.Key.(string), child)
	}
}

// command runs a tool and returns what it says.
func command(stdin []byte, name string, args ...string) (string, error) {
	cmd := exec.Command(name, args...)
	cmd.Stdin = bytes.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func mustRun(t *testing.T, stdin []byte, name string, args ...string) string {
	t.Helper()
	out, err := command(stdin, name, args...)
	if err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return out
}

// unscored are kube-score's checks that the chart's README gives reasons against.
func unscored(t *testing.T) (tests []string) {
	t.Helper()
	_, section, _ := strings.Cut(read(t, chart+"/README.md"), "\n## Checks\n")
	for _, m := range regexp.MustCompile("(?m)^\\| `([-a-z]+)` \\| \\S").FindAllStringSubmatch(section, -1) {
		tests = append(tests, m[1])
	}
	if len(tests) == 0 {
		t.Fatal("the README names no checks")
	}
	return tests
}

// scored are the values of which kube-score has something to say; the others turn off
// what it wants.
var scored = []string{"values.yaml", "kubelet-values.yaml"}

func TestChart(t *testing.T) {
	requested(t, "chart")
	schemas := writeSchemas(t)
	valueFiles, err := filepath.Glob(chart + "/ci/*.yaml")
	if err != nil || len(valueFiles) == 0 {
		t.Fatalf("no values to test: %v", err)
	}
	for _, values := range append([]string{chart + "/values.yaml"}, valueFiles...) {
		t.Run(filepath.Base(values), func(t *testing.T) {
			mustRun(t, nil, "helm", "lint", "--strict", chart, "-f", values)
			manifests := template(t, values)
			conform(t, schemas, manifests)
			if slices.Contains(scored, filepath.Base(values)) {
				score := []string{"score", "-", "--ignore-container-cpu-limit"}
				for _, test := range unscored(t) {
					score = append(score, "--ignore-test", test)
				}
				mustRun(t, []byte(manifests), "kube-score", score...)
			}
		})
	}
	t.Run("misspelt", func(t *testing.T) {
		manifests := template(t, chart+"/ci/rights-values.yaml")
		for was, is := range map[string]string{"hostPID:": "hostPid:", "honorLabels:": "honourLabels:", "containerPort: 10813": "containerPort: http"} {
			if out, err := kubeconform(schemas, strings.Replace(manifests, was, is, 1)); err == nil {
				t.Errorf("%s instead of %s passes: %s", is, was, out)
			}
		}
	})
	t.Run("kustomize", func(t *testing.T) { conform(t, schemas, mustRun(t, nil, "kustomize", "build", "kubernetes")) })
	t.Run("overlay", func(t *testing.T) {
		manifests := mustRun(t, nil, "kustomize", "build", "testdata/overlay")
		conform(t, schemas, manifests)
		for _, gone := range []string{"kind: Namespace", "namespace: sockq", "ghcr.io"} {
			if strings.Contains(manifests, gone) {
				t.Errorf("there is %s", gone)
			}
		}
		for _, there := range []string{"kind: PodMonitor", "kind: PrometheusRule", "image: " + overlayTag, "- --census.interval=10s"} {
			if !strings.Contains(manifests, there) {
				t.Errorf("there is no %s", there)
			}
		}
	})
}

// kubeVersion is told to helm, which takes itself for one of 1.20 when it was built by
// go install.
const kubeVersion = "1.36"

func template(t *testing.T, values string, args ...string) string {
	t.Helper()
	return mustRun(t, nil, "helm", append([]string{"template", "sockq", chart, "--namespace", "sockq", "--kube-version", kubeVersion, "-f", values}, args...)...)
}

// What values make of single objects.
func TestChartRenders(t *testing.T) {
	requested(t, "chart")
	const kubelet = "pods.source=kubelet,pods.kubelet.url=https://"
	const names = `
    - ports:
        - port: 53
          protocol: UDP
        - port: 53
          protocol: TCP
`
	for _, test := range []struct {
		set, from, has, lacks string
	}{
		{"seccompProfile.type=Localhost,seccompProfile.localhostProfile=sockq.json", "daemonset", `
            seccompProfile:
              localhostProfile: sockq.json
              type: Localhost
`, "RuntimeDefault"},
		{"affinity=null", "daemonset", "", "affinity"},
		{"prometheusRule.enabled=true", "prometheusrule", "\n  name: sockq\n", "fleet"},
		{"prometheusRule.enabled=true,prometheusRule.fleet=true", "prometheusrule", "\n  name: sockq-fleet\n", ""},
		{"port=1024", "networkpolicy", "\n  egress: []\n", "from:"},
		{kubelet + "$(NODE_IP):10250/pods", "networkpolicy", "\n    - ports:\n        - port: 10250\n", names},
		{kubelet + "$(NODE_IP)/pods", "networkpolicy", "\n    - ports:\n        - port: 443\n", names},
		{kubelet + "[$(NODE_IP)]:10250/pods", "networkpolicy", "\n    - ports:\n        - port: 10250\n", names},
		{kubelet + "[fd00::10]/pods", "networkpolicy", "\n    - ports:\n        - port: 443\n", names},
		{kubelet + "192.0.2.1:10255/pods", "networkpolicy", "\n    - ports:\n        - port: 10255\n", names},
		{kubelet + "$(NODE_NAME):10250/pods", "networkpolicy", names, ""},
		{kubelet + "10.nodes.example.com/pods", "networkpolicy", names, ""},
	} {
		manifest := template(t, chart+"/values.yaml", "--set", test.set, "--show-only", "templates/"+test.from+".yaml")
		if !strings.Contains(manifest, test.has) || (test.lacks != "" && strings.Contains(manifest, test.lacks)) {
			t.Errorf("--set %s: want%sand no %q:\n%s", test.set, test.has, test.lacks, manifest)
		}
	}
}

// Another chart may depend on this one, on a condition.
func TestChartOfAChart(t *testing.T) {
	requested(t, "chart")
	parent := t.TempDir()
	if err := os.CopyFS(filepath.Join(parent, "charts/sockq"), os.DirFS(chart)); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"Chart.yaml":  "{apiVersion: v2, name: parent, version: 1.0.0, dependencies: [{name: sockq, version: 0.1.0, condition: sockq.enabled}]}",
		"values.yaml": "{global: {region: west}, sockq: {enabled: true, port: 9999}}",
	} {
		if err := os.WriteFile(filepath.Join(parent, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for enabled, want := range map[string]bool{"true": true, "false": false} {
		out := mustRun(t, nil, "helm", "template", "all", parent, "--kube-version", kubeVersion, "--set", "sockq.enabled="+enabled)
		if got := strings.Contains(out, "--web.listen-address=:9999"); got != want {
			t.Errorf("enabled=%s: there is a DaemonSet: %t", enabled, got)
		}
	}
}

func conform(t *testing.T, schemas, manifests string) {
	t.Helper()
	if out, err := kubeconform(schemas, manifests); err != nil {
		t.Errorf("kubeconform: %v: %s", err, out)
	}
}

func kubeconform(schemas, manifests string) (string, error) {
	return command([]byte(manifests), "kubeconform", "-strict", "-schema-location", schemas+"/{{.ResourceKind}}{{.KindSuffix}}.json", "-")
}

// TestSchemaOfTheChart: wrong values are refused, with their names.
func TestSchemaOfTheChart(t *testing.T) {
	requested(t, "chart")
	for set, says := range map[string]string{
		"port=0":                            "port",
		"port=80":                           "port",
		"port=70000":                        "port",
		"prot=10813":                        "prot",
		"capabilities.netAdmin=true":        "netAdmin",
		"capabilities.bpf=maybe":            "bpf",
		"pods.source=docker":                "source",
		"pods.criSocket=containerd.sock":    "criSocket",
		"pods.kubelet.url=http://node/pods": "url",
		"pods.kubelet.resource=nodes":       "resource",
		"pods.source=kubelet,serviceAccount.create=false": "name",
		"seccompProfile.type=Localhost":                   "localhostProfile",
		"flags.census\\.intervall=5s":                     "census.intervall",
		"flags.census\\.interval=5":                       "census.interval",
		"flags.max-sockets=1":                             "max-sockets",
		"flags.web\\.listen-address=:1":                   "web.listen-address",
		"image.digest=sha256:abc":                         "digest",
		"podMonitor.endpoint.honorLabels=no":              "endpoint",
		"podMonitor.spec.selector=all":                    "spec",
		"serviceMonitor.spec.endpoints=none":              "spec",
		"prometheusRule.fleet=maybe":                      "fleet",
		"terminationGracePeriodSeconds=0":                 "terminationGracePeriodSeconds",
		"probes.scheme=https":                             "scheme",
		"networkPolicy.from[0].pods=everyone":             "from",
	} {
		out, err := command(nil, "helm", "template", "sockq", chart, "--kube-version", kubeVersion, "--set", set)
		if err == nil || !strings.Contains(out, says) || !strings.Contains(out, "values don't meet the specifications of the schema") {
			t.Errorf("--set %s: %v: %s", set, err, out)
		}
	}
}

// moduleDir is where the go command keeps a module.
func moduleDir(t *testing.T, module string) string {
	t.Helper()
	cmd := exec.Command("go", "mod", "download", "-json", module)
	cmd.Dir = t.TempDir() // in no module: this is none of sockq's own
	out, err := cmd.Output()
	var answer struct{ Dir, Error string }
	if json.Unmarshal(out, &answer) != nil || err != nil || answer.Dir == "" {
		t.Fatalf("download %s: %v: %s", module, err, answer.Error)
	}
	return answer.Dir
}

// writeSchemas writes those of Kubernetes and of the Prometheus operator for
// kubeconform, from the modules that they are published with, and strict: they allow
// no field that they do not name.
func writeSchemas(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	write := func(kind, group, version string, schema any) {
		group, _, _ = strings.Cut(group, ".")
		name := strings.ToLower(strings.Join(slices.DeleteFunc([]string{kind, group, version}, func(s string) bool { return s == "" }), "-"))
		data, err := json.Marshal(schema)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name+".json"), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}

	var swagger struct{ Definitions map[string]map[string]any }
	if err := json.Unmarshal([]byte(read(t, moduleDir(t, kubernetesModule)+"/api/openapi-spec/swagger.json")), &swagger); err != nil {
		t.Fatal(err)
	}
	for name, definition := range swagger.Definitions {
		if definition["format"] == "int-or-string" || strings.HasSuffix(name, ".resource.Quantity") {
			definition["type"] = []string{"string", "number"}
		}
		strict(definition)
	}
	for name, definition := range swagger.Definitions {
		kinds, _ := definition["x-kubernetes-group-version-kind"].([]any)
		if len(kinds) != 1 || !strings.HasPrefix(name, "io.k8s.api.") {
			continue
		}
		needed := make(map[string]any)
		gather(swagger.Definitions, name, needed)
		kind := kinds[0].(map[string]any)
		write(kind["kind"].(string), kind["group"].(string), kind["version"].(string), map[string]any{"$ref": "#/definitions/" + name, "definitions": needed})
	}

	crds, err := filepath.Glob(moduleDir(t, operatorModule) + "/example/prometheus-operator-crd/*.yaml")
	if err != nil || len(crds) == 0 {
		t.Fatalf("no objects of the Prometheus operator: %v", err)
	}
	for _, path := range crds {
		var crd struct {
			Spec struct {
				Group    string
				Names    struct{ Kind string }
				Versions []struct {
					Name   string
					Schema struct {
						OpenAPIV3Schema any `yaml:"openAPIV3Schema"`
					}
				}
			}
		}
		readYAML(t, path, &crd)
		for _, v := range crd.Spec.Versions {
			schema := plainMaps(v.Schema.OpenAPIV3Schema).(map[string]any)
			strict(schema)
			write(crd.Spec.Names.Kind, crd.Spec.Group, v.Name, schema)
		}
	}
	return dir
}

// strict allows no further fields where a schema names some.
func strict(schema any) {
	switch s := schema.(type) {
	case map[string]any:
		_, more := s["additionalProperties"]
		if _, names := s["properties"].(map[string]any); names && !more && s["x-kubernetes-preserve-unknown-fields"] == nil {
			s["additionalProperties"] = false
		}
		for key, below := range s {
			if key != "enum" && key != "default" && key != "example" {
				strict(below)
			}
		}
	case []any:
		for _, below := range s {
			strict(below)
		}
	}
}

// gather finds the definitions that one of them needs.
func gather(all map[string]map[string]any, name string, needed map[string]any) {
	if _, ok := needed[name]; ok {
		return
	}
	needed[name] = all[name]
	data, err := json.Marshal(all[name])
	if err != nil {
		panic(err) // it was JSON
	}
	for _, m := range regexp.MustCompile(`"\$ref":"#/definitions/([^"]+)"`).FindAllSubmatch(data, -1) {
		gather(all, string(m[1]), needed)
	}
}

// plainMaps makes what encoding/json can write of what YAML has.
func plainMaps(v any) any {
	switch v := v.(type) {
	case map[any]any:
		out := make(map[string]any, len(v))
		for key, value := range v {
			out[fmt.Sprint(key)] = plainMaps(value)
		}
		return out
	case []any:
		for i := range v {
			v[i] = plainMaps(v[i])
		}
	}
	return v
}

// The modules that publish what objects look like.
const (
	kubernetesModule = "k8s.io/kubernetes@v1.36.3"
	operatorModule   = "github.com/prometheus-operator/prometheus-operator@v0.93.0"
)
