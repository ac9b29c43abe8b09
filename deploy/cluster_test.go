package deploy_test

import (
	"cmp"
	"crypto/tls"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

const (
	imageTag = "ghcr.io/sockq/sockq:0.1.0"
	nextTag  = "ghcr.io/sockq/sockq:next"
	// testdata/overlay has it.
	overlayTag = "registry.example.com/sockq:next"
)

// A web server in a pod, on all nodes that may be used.
const webManifest = `
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: shop}
spec:
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
        - name: server
          image: ` + busyboxTag + `
          command: [/bin/busybox, httpd, -f, -p, "8080"]
`

// What a DaemonSet with all tolerations would wait for: nodes that are none, and those without
// an image.
const otherNodes = `
apiVersion: v1
kind: Node
metadata: {name: virtual, labels: {kubernetes.io/os: linux, kubernetes.io/arch: amd64, type: virtual-kubelet}}
---
apiVersion: v1
kind: Node
metadata: {name: fargate, labels: {kubernetes.io/os: linux, kubernetes.io/arch: amd64, eks.amazonaws.com/compute-type: fargate}}
---
apiVersion: v1
kind: Node
metadata: {name: ibm, labels: {kubernetes.io/os: linux, kubernetes.io/arch: s390x}}
---
apiVersion: v1
kind: Node
metadata: {name: windows, labels: {kubernetes.io/os: windows, kubernetes.io/arch: amd64}}
`

// The chart on a real control plane and node.
func TestCluster(t *testing.T) {
	requested(t, "cluster", buildTools...)
	i := newImages(t)
	i.buildBusybox(busyboxTag, `--entrypoint=["/bin/busybox","sleep","1000000"]`) // the pause image, too
	i.buildBase()
	i.build(runtime.GOARCH, runtime.GOARCH, i.buildCache())
	c := startCluster(t, i.archive(busyboxTag, busyboxTag), i.archive("localhost/sockq:"+runtime.GOARCH, imageTag))
	c.apply(otherNodes)
	c.apply(webManifest)
	t.Cleanup(func() { // while there is a kubelet that can take pods down
		if _, err := c.try("delete", "namespace", "sockq", "monitoring", "shop", "--ignore-not-found", "--timeout=60s"); err != nil {
			t.Error(err)
		}
	})

	for _, step := range []struct {
		name string
		run  func(*cluster)
	}{
		{"objects", (*cluster).takesObjects},
		{"install", (*cluster).installs},
		{"container", (*cluster).hasWhatIsDocumented},
		{"scrape", (*cluster).isScraped},
		{"runtime restarts", (*cluster).survivesRuntime},
		{"rolling update", (*cluster).rolls},
		{"drain", (*cluster).survivesDrain},
		{"no runtime", (*cluster).missesRuntime},
		{"kubelet", (*cluster).asksKubelet},
		{"seccomp", (*cluster).hasItsProfile},
		{"TLS and a password", (*cluster).wantsPassword},
		{"kustomize", (*cluster).comesByKustomize},
	} {
		// Each goes on where the one before it ended.
		if !t.Run(step.name, func(t *testing.T) { step.run(c.in(t)) }) {
			t.FailNow()
		}
	}
}

// in is the cluster for a part of the test.
func (c *cluster) in(t *testing.T) *cluster {
	part := *c
	part.t = t
	return &part
}

// takesObjects: the API server knows every field of every object, with all values
// that are tested.
func (c *cluster) takesObjects() {
	crds, err := filepath.Glob(moduleDir(c.t, operatorModule) + "/example/prometheus-operator-crd/*monitors.yaml")
	if err != nil || len(crds) == 0 {
		c.t.Fatalf("no objects of the Prometheus operator: %v", err)
	}
	for _, path := range append(crds, filepath.Join(filepath.Dir(crds[0]), "monitoring.coreos.com_prometheusrules.yaml")) {
		c.apply(read(c.t, path))
	}
	c.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=30s")
	c.kubectl("create", "namespace", "sockq")
	c.kubectl("label", "namespace", "sockq", "pod-security.kubernetes.io/enforce=privileged")
	valueFiles, err := filepath.Glob(chart + "/ci/*.yaml")
	if err != nil || len(valueFiles) == 0 {
		c.t.Fatalf("no values to test: %v", err)
	}
	for _, values := range valueFiles {
		mustRun(c.t, []byte(template(c.t, values)), "kubectl", "apply", "--server-side", "--validate=strict", "--dry-run=server", "-f", "-")
	}
}

// helm installs the chart, or upgrades it. Listeners of others on this machine take no series
// from those of the test.
func (c *cluster) helm(args ...string) {
	c.t.Helper()
	mustRun(c.t, nil, "helm", append([]string{"upgrade", "--install", "sockq", chart, "--namespace", "sockq", "--wait", "--timeout", "2m",
		"--set", "flags.max-listeners=100000,flags.max-namespaces=5000"}, args...)...)
	c.kubectl("-n", "sockq", "rollout", "status", "daemonset/sockq", "--timeout=60s")
}

// pod is the name of the one that runs in that namespace, and its address.
func (c *cluster) pod(namespace string) (name, ip string) {
	c.t.Helper()
	eventually(c.t, 90*time.Second, "one pod runs in "+namespace, func() error {
		out, err := c.try("-n", namespace, "get", "pods", "-o", `jsonpath={range .items[*]}{.metadata.name} {.status.podIP} {.status.phase} {.metadata.deletionTimestamp}{"\n"}{end}`)
		if err != nil {
			return err
		}
		fields := strings.Fields(out)
		if strings.Contains(out, "\n") || len(fields) != 3 || fields[2] != "Running" {
			return fmt.Errorf("there are %q", out)
		}
		name, ip = fields[0], fields[1]
		return nil
	})
	return name, ip
}

func (c *cluster) metrics() (string, error) {
	c.t.Helper()
	_, ip := c.pod(c.namespace)
	resp, err := http.Get("http://" + ip + ":10813/metrics")
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("%s: %w", resp.Status, err)
	}
	return string(data), nil
}

// shows waits until the metrics have lines that match all of these.
func (c *cluster) shows(want ...string) {
	c.t.Helper()
	eventually(c.t, time.Minute, "the metrics show it", func() error {
		text, err := c.metrics()
		if err != nil {
			return err
		}
		for _, w := range want {
			if !regexp.MustCompile("(?m)" + w).MatchString(text) {
				related := regexp.MustCompile(`(?m)^sockq_(listener_accept_queue_limit|probe_attached|source_up).*`).FindAllString(text, -1)
				return fmt.Errorf("no line matches %s:\n%s", w, strings.Join(related, "\n"))
			}
		}
		return nil
	})
}

// listener is the line of one, by the labels that tell whose it is.
func listener(address, container, namespace, netns, pod, process string) string {
	return fmt.Sprintf(`^sockq_listener_accept_queue_limit\{address="%s",container="%s",namespace="%s",netns="%s",pod="%s",process="%s"\} [1-9]`,
		address, container, namespace, netns, pod, process)
}

// seesPods: the web server's pod and its own, each in its namespace, and what is in no
// pod, on the node's.
func (c *cluster) seesPods() {
	c.t.Helper()
	web, _ := c.pod("shop")
	own, _ := c.pod(c.namespace)
	c.shows(
		listener(`\[::\]:8080`, "server", "shop", "cni-[-0-9a-f]+", web, "busybox"),
		listener(`\[::\]:10813`, "sockq", c.namespace, "cni-[-0-9a-f]+", own, "sockq"),
		`^sockq_listener_accept_queue_limit\{address="127.0.0.1:\d+",netns="host",process="kube-apiserver"\} [1-9]`,
	)
}

// attaches: two capabilities are enough, and tracefs by its directory.
func (c *cluster) attaches() {
	c.t.Helper()
	var want []string
	for _, probe := range []string{"sockets", "transitions", "connections", "accepts", "backlog", "owners", "pods", "namespaces"} {
		want = append(want, fmt.Sprintf(`^sockq_probe_attached\{mechanism="[a-z_]+",probe=%q\} 1`, probe))
	}
	c.shows(want...)
}

func (c *cluster) installs() {
	c.helm()
	c.seesPods()
	c.attaches()
	c.shows(`^sockq_probe_attached\{mechanism="cri",probe="pods"\} 1`)

	_, address := c.pod("shop")
	for range 3 {
		resp, err := http.Get("http://" + address + ":8080/")
		if err != nil {
			c.t.Fatal(err)
		}
		resp.Body.Close()
	}
	c.shows(`^sockq_listener_accepts_total\{address="\[::\]:8080",container="server",.*\} 3$`)

	own, _ := c.pod("sockq")
	if out := c.kubectl("-n", "sockq", "exec", own, "--", "/usr/bin/sockq", "check"); !strings.HasPrefix(out, "sockq can run here") {
		c.t.Errorf("sockq check: %s", out)
	}
}

// hasWhatIsDocumented: what the kernel says of the process.
func (c *cluster) hasWhatIsDocumented() {
	own, _ := c.pod("sockq")
	pid := c.process(own)
	status := read(c.t, "/proc/"+pid+"/status")
	// CAP_BPF is 39, CAP_PERFMON 38: the most that it could have. After the start it has
	// neither, from Linux 6.0.
	for _, want := range []string{`CapBnd:\t000000c000000000`, `CapEff:\t000000[0c]000000000`, `NoNewPrivs:\t1`, `Seccomp:\t2`} {
		if !regexp.MustCompile(`(?m)^` + want + `$`).MatchString(status) {
			c.t.Errorf("the process has no %s:\n%s", want, status)
		}
	}
	mounts := read(c.t, "/proc/"+pid+"/mounts")
	for _, path := range []string{"/", "/sys", "/run/containerd", "/run/netns", "/sys/kernel/tracing"} {
		if !regexp.MustCompile(`(?m)^\S+ ` + path + ` \S+ ro[, ]`).MatchString(mounts) {
			c.t.Errorf("%s is not mounted read-only:\n%s", path, mounts)
		}
	}
	if strings.Contains(mounts, "/run/secrets/kubernetes.io") {
		c.t.Error("there is a token")
	}
	cgroup := regexp.MustCompile(`(?m)^\d+:(?:memory)?:(.+)$`).FindStringSubmatch(read(c.t, "/proc/"+pid+"/cgroup"))
	for _, file := range []string{"/sys/fs/cgroup/memory" + cgroup[1] + "/memory.max_usage_in_bytes", "/sys/fs/cgroup" + cgroup[1] + "/memory.peak"} {
		if peak, err := os.ReadFile(file); err == nil {
			c.t.Logf("memory, BPF maps and page cache with it: at most %s bytes", strings.TrimSpace(string(peak)))
		}
	}
}

// As the Prometheus operator writes it, before the relabelings of a PodMonitor; only that
// what Kubernetes would tell of the pod is told by the test, since Debian's Prometheus
// cannot ask.
const scrapeConfig = `
scrape_configs:
  - job_name: podMonitor/sockq/sockq/0
    scrape_interval: 1s
    honor_labels: %t
    static_configs:
      - targets: ["%s:10813"]
        labels:
          __meta_kubernetes_namespace: sockq
          __meta_kubernetes_pod_name: %s
          __meta_kubernetes_pod_container_name: sockq
          __meta_kubernetes_pod_node_name: %s
          __meta_kubernetes_pod_label_app_kubernetes_io_name: %s
    relabel_configs:
      - {source_labels: [__meta_kubernetes_namespace], target_label: namespace}
      - {source_labels: [__meta_kubernetes_pod_container_name], target_label: container}
      - {source_labels: [__meta_kubernetes_pod_name], target_label: pod}
      - {source_labels: [__meta_kubernetes_pod_label_app_kubernetes_io_name], target_label: job}
      - {target_label: endpoint, replacement: metrics}
`

// isScraped: with the PodMonitor's relabelings the labels tell whose a listener is, and
// not where sockq runs.
func (c *cluster) isScraped() {
	var monitor struct {
		Spec struct {
			PodMetricsEndpoints []struct {
				HonorLabels bool `yaml:"honorLabels"`
				Relabelings []struct {
					SourceLabels []string `yaml:"sourceLabels"`
					TargetLabel  string   `yaml:"targetLabel"`
					Regex        string
					Action       string
				}
			} `yaml:"podMetricsEndpoints"`
		}
	}
	readYAML(c.t, "kubernetes/prometheus-operator/podmonitor.yaml", &monitor)
	endpoint := monitor.Spec.PodMetricsEndpoints[0]
	own, ip := c.pod("sockq")
	node := c.kubectl("-n", "sockq", "get", "pod", own, "-o", "jsonpath={.spec.nodeName}")
	label := c.kubectl("-n", "sockq", "get", "pod", own, "-o", `jsonpath={.metadata.labels.app\.kubernetes\.io/name}`)
	config := fmt.Sprintf(scrapeConfig, endpoint.HonorLabels, ip, own, node, label)
	for _, r := range endpoint.Relabelings {
		config += fmt.Sprintf("      - {source_labels: [%s], target_label: %q, regex: %q, action: %s}\n",
			strings.Join(r.SourceLabels, ", "), r.TargetLabel, cmp.Or(r.Regex, "(.*)"), r.Action)
	}
	config = strings.NewReplacer(`target_label: "", `, "", "source_labels: [], ", "").Replace(config)
	address := "127.0.0.1:" + freePorts(c.t, 1)[0]
	c.start("prometheus", "--config.file="+c.write("prometheus.yml", config), "--storage.tsdb.path="+c.dir+"/tsdb", "--web.listen-address="+address)

	web, _ := c.pod("shop")
	const name = "sockq_listener_accept_queue_limit"
	eventually(c.t, time.Minute, "Prometheus has the listeners", func() error {
		resp, err := http.Get("http://" + address + "/api/v1/series?match[]=" + name)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		var answer struct{ Data []map[string]string }
		if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
			return err
		}
		for _, want := range []map[string]string{
			{"process": "busybox", "namespace": "shop", "pod": web, "container": "server"},
			{"process": "kube-apiserver", "netns": "host"},
		} {
			i := slices.IndexFunc(answer.Data, func(labels map[string]string) bool { return labels["process"] == want["process"] })
			if i < 0 {
				return fmt.Errorf("nothing of %v in %v", want, answer.Data)
			}
			got := answer.Data[i]
			delete(got, "address")
			if want["netns"] == "" {
				delete(got, "netns")
			}
			want["__name__"], want["instance"], want["job"] = name, nodeName, "sockq"
			if !maps.Equal(got, want) {
				return fmt.Errorf("got %v, want %v", got, want)
			}
		}
		return nil
	})
}

// containerOf is the id of the one in a pod.
func (c *cluster) containerOf(namespace, pod string) string {
	c.t.Helper()
	id := c.kubectl("-n", namespace, "get", "pod", pod, "-o", "jsonpath={.status.containerStatuses[0].containerID}")
	return strings.TrimPrefix(id, "containerd://")
}

// process is the PID of sockq in a pod.
func (c *cluster) process(pod string) string {
	c.t.Helper()
	id := c.containerOf("sockq", pod)
	for line := range strings.Lines(mustRun(c.t, nil, "ctr", "--namespace", "k8s.io", "tasks", "list")) {
		if fields := strings.Fields(line); len(fields) > 1 && fields[0] == id {
			return fields[1]
		}
	}
	c.t.Fatalf("no process of container %s", id)
	return ""
}

// survivesRuntime: pods that come after a restart of containerd have names, too.
func (c *cluster) survivesRuntime() {
	c.containerd.end()
	c.containerd.begin()
	c.awaitContainerd()
	c.namesNewPods()
}

// namesNewPods: those that are younger than sockq, which was never restarted.
func (c *cluster) namesNewPods() {
	c.t.Helper()
	c.kubectl("-n", "shop", "delete", "pod", "--all", "--wait")
	c.seesPods()
	if n := c.kubectl("-n", "sockq", "get", "pods", "-o", "jsonpath={.items[*].status.containerStatuses[*].restartCount}"); n != "0" {
		c.t.Errorf("sockq was restarted %s times", n)
	}
}

// rolls: another image with another flag takes over, and finds what was there, but
// nothing of the pod that it replaces.
func (c *cluster) rolls() {
	before, _ := c.pod("sockq")
	c.helm("--set", "image.tag=next", "--set", `flags.census\.interval=2s`)
	after, _ := c.pod("sockq")
	if before == after {
		c.t.Errorf("%s was not replaced", before)
	}
	if image := c.kubectl("-n", "sockq", "get", "pod", after, "-o", "jsonpath={.spec.containers[0].image}"); image != nextTag {
		c.t.Errorf("the image is %s", image)
	}
	if line := read(c.t, "/proc/"+c.process(after)+"/cmdline"); !strings.Contains(line, "--census.interval=2s\x00") {
		c.t.Errorf("the command line is %q", line)
	}
	c.seesPods()
	if series := c.seriesOf(`pod="` + before + `"`); len(series) > 0 {
		c.t.Errorf("%s is gone, but has %q", before, series)
	}
}

// seriesOf are those with a label.
func (c *cluster) seriesOf(label string) []string {
	c.t.Helper()
	text, err := c.metrics()
	if err != nil {
		c.t.Fatal(err)
	}
	return regexp.MustCompile(`(?m)^.*[{,]`+regexp.QuoteMeta(label)+`.*$`).FindAllString(text, -1)
}

// survivesDrain: sockq stays while the others go, and sees them come back.
func (c *cluster) survivesDrain() {
	own, _ := c.pod("sockq")
	mounts := "/proc/" + c.process(own) + "/mounts"
	pod, _ := c.pod("shop")
	web := c.containerOf("shop", pod)
	label := regexp.MustCompile(`netns="cni-[^"]+"`).FindString(strings.Join(c.seriesOf(`pod="`+pod+`"`), "\n"))
	if label == "" {
		c.t.Fatalf("%s is in no namespace", pod)
	}
	if !strings.Contains(read(c.t, mounts), web) {
		c.t.Errorf("sockq does not see what the runtime has mounted for %s", web)
	}
	c.kubectl("drain", nodeName, "--ignore-daemonsets", "--timeout=60s")
	if still, _ := c.pod("sockq"); still != own {
		c.t.Errorf("%s went, %s came", own, still)
	}
	if out := c.kubectl("-n", "shop", "get", "pods", "-o", "jsonpath={.items[*].status.phase}"); out != "Pending" {
		c.t.Errorf("in shop there are pods that are %q", out)
	}
	eventually(c.t, 10*time.Second, "sockq holds nothing of a container that is gone", func() error {
		if strings.Contains(read(c.t, mounts), web) {
			return errors.New("it holds a mount")
		}
		return nil
	})
	// Beside peaks of the last minute only what is scraped once more.
	kept := regexp.MustCompile(`^sockq_listener_\w+_(total|bucket|sum|count|peak|peak_ratio)\{`)
	eventually(c.t, 30*time.Second, "what is gone has no series", func() error {
		for _, series := range c.seriesOf(label) {
			if !kept.MatchString(series) {
				return errors.New(series)
			}
		}
		return nil
	})
	c.kubectl("uncordon", nodeName)
	c.seesPods()
}

// missesRuntime: where the runtime's socket is elsewhere containers have their ids, and sockq
// says so.
func (c *cluster) missesRuntime() {
	const socket = "/run/containerd/elsewhere/containerd.sock"
	c.helm("--set", "pods.criSocket="+socket)
	web, _ := c.pod("shop")
	c.shows(
		fmt.Sprintf(`^sockq_listener_accept_queue_limit\{address="\[::\]:8080",container="%.12s",netns="cni-[-0-9a-f]+",process="busybox"\} [1-9]`, c.containerOf("shop", web)),
		`^sockq_probe_attached\{mechanism="none",probe="pods"\} 0`,
	)
	own, _ := c.pod("sockq")
	if log := c.kubectl("-n", "sockq", "logs", own); !strings.Contains(log, "Pods have no names") || !strings.Contains(log, socket) {
		c.t.Errorf("the log does not say that there is no %s:\n%s", socket, log)
	}
}

// asksKubelet: with a token that can read pods and nothing else, and again after the
// kubelet has restarted.
func (c *cluster) asksKubelet() {
	port := c.kubectl("get", "node", nodeName, "-o", "jsonpath={.status.daemonEndpoints.kubeletEndpoint.Port}")
	c.helm("--set", "pods.source=kubelet", "--set", "pods.kubelet.url=https://$(NODE_IP):"+port+"/pods")
	c.seesPods()
	c.shows(`^sockq_probe_attached\{mechanism="kubelet",probe="pods"\} 1`)
	own, _ := c.pod("sockq")
	mounts := read(c.t, "/proc/"+c.process(own)+"/mounts")
	if strings.Contains(mounts, "/run/containerd ") || !strings.Contains(mounts, "/run/secrets/sockq ") {
		c.t.Errorf("the pod has mounted\n%s", mounts)
	}
	c.kubelet.end()
	c.kubelet.begin()
	c.namesNewPods()
	// kubectl answers no with exit status 1.
	for what, may := range map[string]string{
		"get nodes --subresource=pods": "yes", "get nodes --subresource=proxy": "no", "create nodes --subresource=proxy": "no",
		"get nodes": "no", "list pods": "no", "get secrets": "no",
	} {
		out, _ := command(nil, "kubectl", append([]string{"auth", "can-i", "--as=system:serviceaccount:sockq:sockq"}, strings.Fields(what)...)...)
		if !strings.HasSuffix(strings.TrimSpace(out), may) {
			c.t.Errorf("may sockq %s: %s", what, out)
		}
	}
}

// hasItsProfile: with seccomp.json where the kubelet has profiles, sockq has these system
// calls and no other.
func (c *cluster) hasItsProfile() {
	type seccomp struct {
		DefaultAction string
		Syscalls      []struct {
			Names  []string
			Action string
			Args   []struct {
				Index, Value, ValueTwo uint64
				Op                     string
			}
		}
	}
	var profile seccomp
	text := read(c.t, "seccomp.json")
	if err := json.Unmarshal([]byte(text), &profile); err != nil {
		c.t.Fatal(err)
	}
	c.write("kubelet/seccomp/sockq.json", text)
	c.helm("--set", "seccompProfile.type=Localhost,seccompProfile.localhostProfile=sockq.json")
	c.attaches()
	c.seesPods()
	own, _ := c.pod("sockq")
	var container struct {
		Spec struct {
			Linux struct{ Seccomp seccomp }
		}
	}
	info := mustRun(c.t, nil, "ctr", "--namespace", "k8s.io", "containers", "info", c.containerOf("sockq", own))
	if err := json.Unmarshal([]byte(info), &container); err != nil {
		c.t.Fatal(err)
	}
	if got := container.Spec.Linux.Seccomp; len(profile.Syscalls) == 0 || !reflect.DeepEqual(got, profile) {
		c.t.Errorf("the runtime has\n%+v, want\n%+v", got, profile)
	}
}

// The hash is of fakepassword.
const webConfig = `
tls_server_config: {cert_file: /etc/sockq/web/tls.crt, key_file: /etc/sockq/web/tls.key}
basic_auth_users: {prometheus: $2y$10$QOauhQNbBCuQDKes6eFzPeMqBSjb7Mr5DUmpZ/VcEd00UAV/LDeSi}
`

// wantsPassword: with a web configuration from a Secret.
func (c *cluster) wantsPassword() {
	certificate := c.authority.issue(c.t, "web", pkix.Name{CommonName: "sockq"}, c.node)
	c.kubectl("-n", "sockq", "create", "secret", "generic", "sockq-web", "--from-file=web-config.yml="+c.write("web-config.yml", webConfig),
		"--from-file=tls.crt="+certificate+".crt", "--from-file=tls.key="+certificate+".key")
	c.helm("--set", "webConfig.secretName=sockq-web")
	_, ip := c.pod("sockq")
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}} // the pod's address is in no certificate
	for password, want := range map[string]int{"": http.StatusUnauthorized, "wrong": http.StatusUnauthorized, "fakepassword": http.StatusOK} {
		request, err := http.NewRequest(http.MethodGet, "https://"+ip+":10813/metrics", nil)
		if err != nil {
			c.t.Fatal(err)
		}
		if password != "" {
			request.SetBasicAuth("prometheus", password)
		}
		resp, err := client.Do(request)
		if err != nil {
			c.t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != want {
			c.t.Errorf("with password %q: %s", password, resp.Status)
		}
	}
}

// comesByKustomize: without Helm, in a namespace that forbids less than the default, and in
// one that was there before.
func (c *cluster) comesByKustomize() {
	mustRun(c.t, nil, "helm", "uninstall", "sockq", "--namespace", "sockq", "--wait")
	c.kubectl("delete", "namespace", "sockq", "--wait")
	c.kubectl("apply", "-k", "kubernetes")
	c.kubectl("-n", "sockq", "rollout", "status", "daemonset/sockq", "--timeout=60s")
	c.kubectl("delete", "-k", "kubernetes", "--wait")

	c.namespace = "monitoring"
	c.kubectl("create", "namespace", c.namespace)
	c.kubectl("label", "namespace", c.namespace, "pod-security.kubernetes.io/enforce=privileged")
	c.kubectl("apply", "-k", "testdata/overlay")
	c.kubectl("-n", c.namespace, "rollout", "status", "daemonset/sockq", "--timeout=60s")
	c.seesPods()
	c.kubectl("delete", "-k", "testdata/overlay", "--wait")
	c.kubectl("get", "namespace", c.namespace)
}
