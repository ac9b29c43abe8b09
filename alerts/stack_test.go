package alerts_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// starter starts processes that the kernel kills when this one ends, however it
// does: their parent is a thread that ends with it.
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

// logBuffer is read while a process writes.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// start starts a process that lives until the test ends at most. What it is told
// goes to its standard input.
func start(t *testing.T, path string, args ...string) (stdin io.Writer) {
	t.Helper()
	var log logBuffer
	cmd := exec.Command(path, args...)
	cmd.Stdout, cmd.Stderr = &log, &log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	result := make(chan error)
	starter() <- func() { result <- cmd.Start() }
	if err := <-result; err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	var status error
	go func() {
		defer close(ended)
		status = cmd.Wait()
	}()
	t.Cleanup(func() {
		select {
		case <-ended:
			t.Errorf("%s ended by itself: %v", filepath.Base(path), status)
		default:
			_ = cmd.Process.Kill()
			<-ended
		}
		if t.Failed() {
			t.Logf("%s said:\n%s", filepath.Base(path), &log)
		}
	})
	return in
}

// freeAddress is a loopback address that was free just now.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func write(t *testing.T, path, text string) string {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// await waits until done, which may fail the test, returns true. Between its calls
// it does what else there is to do.
func await(t *testing.T, what string, patience time.Duration, done func() bool, meanwhile ...func()) {
	t.Helper()
	for end := time.Now().Add(patience); !done(); time.Sleep(200 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited for %s in vain, for %v", what, patience)
		}
		for _, do := range meanwhile {
			do()
		}
	}
}

func ready(t *testing.T, what, address string) {
	t.Helper()
	await(t, what, time.Minute, func() bool {
		resp, err := http.Get("http://" + address + "/-/ready")
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	})
}

// startAgent builds and starts sockq, which finds names of namespaces in a directory.
func startAgent(t *testing.T, names string) (address string) {
	t.Helper()
	binary := filepath.Join(t.TempDir(), "sockq")
	build := exec.Command("go", "build", "-o", binary, "../agent")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v: %s", err, out)
	}
	address = freeAddress(t)
	start(t, binary, "--web.listen-address="+address, "--path.netns="+names, "--bpf-stats")
	ready(t, "sockq", address)
	return address
}

// notified is an alert as a webhook is told of it.
type notified struct {
	Status              string
	Labels, Annotations map[string]string
	StartsAt            time.Time
	at                  time.Time
}

func (n notified) String() string {
	return fmt.Sprintf("%s %v since %v: %s", n.Status, n.Labels, n.StartsAt.Format(time.TimeOnly), n.Annotations["summary"])
}

// webhook collects what Alertmanager tells.
type webhook struct {
	url string

	mu   sync.Mutex
	told []notified
}

func startWebhook(t *testing.T) *webhook {
	w := new(webhook)
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		var message struct{ Alerts []notified }
		if err := json.NewDecoder(r.Body).Decode(&message); err != nil {
			t.Errorf("webhook: %v", err)
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		for _, alert := range message.Alerts {
			alert.at = time.Now()
			w.told = append(w.told, alert)
		}
	}))
	t.Cleanup(server.Close)
	w.url = server.URL
	return w
}

func (w *webhook) all() []notified {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]notified(nil), w.told...)
}

var (
	receiversBlock = regexp.MustCompile(`(?m)^receivers:\n((?:[ #-].*\n|\n)*)`)
	receiverItem   = regexp.MustCompile(`(?m)^ *- name: *(\S+) *\n`)
	groupInterval  = regexp.MustCompile(`(?m)^( *group_interval:).*$`)
)

// startAlertmanager starts Alertmanager with the example of this directory, of which
// only two things are changed: receivers that tell somebody tell the webhook, and
// they are told after 10 s that an alert was resolved.
func startAlertmanager(t *testing.T, hook *webhook) (address string) {
	t.Helper()
	example, err := os.ReadFile("alertmanager.yaml")
	if err != nil {
		t.Fatal(err)
	}
	blocks := receiversBlock.FindAllStringSubmatch(string(example), -1)
	if len(blocks) != 1 {
		t.Fatalf("alertmanager.yaml has %d blocks of receivers", len(blocks))
	}
	receivers := "receivers:\n"
	items := receiverItem.FindAllStringSubmatchIndex(blocks[0][1], -1)
	for i, item := range items {
		end := len(blocks[0][1])
		if i+1 < len(items) {
			end = items[i+1][0]
		}
		receivers += "  - name: " + blocks[0][1][item[2]:item[3]] + "\n"
		if strings.Contains(blocks[0][1][item[1]:end], "_configs:") {
			receivers += "    webhook_configs: [{url: '" + hook.url + "', send_resolved: true}]\n"
		}
	}
	config := strings.Replace(string(example), blocks[0][0], receivers, 1)
	config = groupInterval.ReplaceAllString(config, "$1 10s")

	dir := t.TempDir()
	address = freeAddress(t)
	start(t, "prometheus-alertmanager",
		"--config.file="+write(t, filepath.Join(dir, "alertmanager.yaml"), config),
		"--storage.path="+dir, "--web.listen-address="+address, "--cluster.listen-address=")
	ready(t, "Alertmanager", address)
	return address
}

// prometheus is a running one.
type prometheus struct{ url string }

// startPrometheus starts Prometheus with the rules of this directory and what else its
// configuration says. labels are those of the target.
func startPrometheus(t *testing.T, binary, agent, labels, more string, args ...string) *prometheus {
	t.Helper()
	rules, err := filepath.Abs("rules.yaml")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	config := fmt.Sprintf(`
global: {scrape_interval: 15s, evaluation_interval: 15s}
rule_files: [%s]
scrape_configs:
  - job_name: sockq
    static_configs: [{targets: [%q], labels: {%s}}]
%s
`, rules, agent, labels, more)
	address := freeAddress(t)
	start(t, binary, append([]string{
		"--config.file=" + write(t, filepath.Join(dir, "prometheus.yaml"), config),
		"--storage.tsdb.path=" + filepath.Join(dir, "data"), "--web.listen-address=" + address,
	}, args...)...)
	ready(t, "Prometheus", address)
	return &prometheus{url: "http://" + address}
}

// get asks the API for something and fails where it answers with a warning.
func (p *prometheus) get(path string, params url.Values, data any) error {
	resp, err := http.Get(p.url + "/api/v1/" + path + "?" + params.Encode())
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	var answer struct {
		Status, Error   string
		Warnings, Infos []string
		Data            json.RawMessage
	}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		return err
	}
	if answer.Status != "success" {
		return errors.New(answer.Error)
	}
	if said := append(answer.Warnings, answer.Infos...); len(said) > 0 {
		return fmt.Errorf("warns: %s", strings.Join(said, "; "))
	}
	return json.Unmarshal(answer.Data, data)
}

// series is one of a query's result, with its last value. Value is 0 for a
// native histogram.
type series struct {
	labels map[string]string
	value  float64
}

// query asks for an expression at this moment, or in steps of 15 s since then.
func (p *prometheus) query(expr string, since time.Time) ([]series, error) {
	type sample [2]any
	var data struct {
		Result []struct {
			Metric map[string]string
			Value  *sample
			Values []sample
		}
	}
	path, params := "query", url.Values{"query": {expr}}
	if !since.IsZero() {
		path = "query_range"
		params.Set("start", strconv.FormatInt(since.Unix(), 10))
		params.Set("end", strconv.FormatInt(time.Now().Unix(), 10))
		params.Set("step", "15")
	}
	if err := p.get(path, params, &data); err != nil {
		return nil, fmt.Errorf("%s: %w", expr, err)
	}
	var result []series
	for _, r := range data.Result {
		if r.Value == nil && len(r.Values) > 0 {
			r.Value = &r.Values[len(r.Values)-1]
		}
		s := series{labels: r.Metric}
		if r.Value != nil {
			text, ok := r.Value[1].(string)
			if !ok {
				return nil, fmt.Errorf("%s: the value %v is no string", expr, r.Value[1])
			}
			var err error
			if s.value, err = strconv.ParseFloat(text, 64); err != nil {
				return nil, fmt.Errorf("%s: %w", expr, err)
			}
		}
		result = append(result, s)
	}
	return result, nil
}

// now is query at this moment, which has to be understood.
func (p *prometheus) now(t *testing.T, expr string) []series {
	t.Helper()
	result, err := p.query(expr, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	return result
}
