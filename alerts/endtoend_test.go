package alerts_test

import (
	"cmp"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"sockq/probes/scenario"
)

// The slowest path of an alert is 15 s to the scrape, 15 s to the recording rules,
// 15 s to the alerts and 10 s that Alertmanager waits for others of the group. It is
// over when the refusals have left the rates' window of a minute, too.
const (
	toldWithin     = time.Minute
	resolvedWithin = 2*time.Minute + 10*time.Second
)

// node is a node with a healthy and an overflowing server, and all that watches it,
// at the intervals that the documentation recommends.
type node struct {
	classic, native                            *prometheus // the one that tells Alertmanager, one with native histograms
	hook                                       *webhook
	shop, quiet                                *scenario.Namespace
	begun                                      time.Time
	server, clients, quickClients, tinyClients func(int, time.Duration)
}

const shopAddress = "127.0.0.1:8080"

// TestEndToEnd watches a real node with sockq, Prometheus and Alertmanager. While it
// is healthy nobody is told of anything; when a server's accept queue overflows,
// somebody is told in time, and of nothing else; then that it is over. What
// happened has to show in each query of the dashboards, on the oldest Prometheus that
// is supported, and with native histograms on the one that $SOCKQ_PROMETHEUS names.
func TestEndToEnd(t *testing.T) {
	n := newNode(t)
	t.Run("quiet", n.staysQuiet)
	overflowed := false
	t.Run("overflow", func(t *testing.T) {
		n.overflows(t)
		overflowed = true
	})
	if !overflowed {
		return // nothing to remedy: it failed, or -run chose something else
	}
	z := newZoo(t)
	t.Run("remedy", func(t *testing.T) { n.recovers(t, z) })
	t.Run("dashboards", n.show)
}

func newNode(t *testing.T) *node {
	names := t.TempDir()
	n := &node{
		shop: scenario.NewNamed(t, names, "shop"), quiet: scenario.NewNamed(t, names, "quiet"),
		hook: startWebhook(t), begun: time.Now(),
	}
	n.server = startRole(t, n.shop, "slow-server", shopAddress, "5")
	n.clients = startRole(t, n.shop, "clients", shopAddress)
	startRole(t, n.quiet, "quick-server", "127.0.0.1:80", "511")
	n.quickClients = startRole(t, n.quiet, "quick-clients", "127.0.0.1:80")
	startRole(t, n.quiet, "tiny-server", "127.0.0.1:81", "1")
	n.tinyClients = startRole(t, n.quiet, "tiny-clients", "127.0.0.1:81")
	agent := startAgent(t, names)
	n.classic = startPrometheus(t, "prometheus", agent, "",
		fmt.Sprintf("alerting: {alertmanagers: [{static_configs: [{targets: [%q]}]}]}", startAlertmanager(t, n.hook)))
	n.native = startPrometheus(t, cmp.Or(os.Getenv("SOCKQ_PROMETHEUS"), "prometheus"), agent, "cluster: test", "", "--enable-feature=native-histograms")
	await(t, "the first scrapes", time.Minute, func() bool {
		return len(n.classic.now(t, `up{job="sockq"} == 1`)) == 1 && len(n.native.now(t, `up{job="sockq"} == 1`)) == 1
	})
	return n
}

// ours tells whether an alert is about the two servers' namespaces or sockq itself:
// other processes of this machine may have reasons for alerts.
func ours(labels map[string]string) bool {
	ns, about := labels["netns"]
	return !about || ns == "shop" || ns == "quiet"
}

// staysQuiet loads the healthy servers for a minute, or for $SOCKQ_QUIET.
func (n *node) staysQuiet(t *testing.T) {
	duration := time.Minute
	if v := os.Getenv("SOCKQ_QUIET"); v != "" {
		var err error
		if duration, err = time.ParseDuration(v); err != nil || duration < time.Minute {
			t.Fatalf("SOCKQ_QUIET is %s, has to be a duration of a minute at least", v)
		}
	}
	n.quickClients(10, 30*time.Millisecond)
	n.tinyClients(1, 20*time.Millisecond)
	begin := time.Now()
	await(t, "the end", duration+time.Minute, func() bool {
		for _, s := range n.classic.now(t, `ALERTS{alertstate="firing"}`) {
			if ours(s.labels) {
				t.Fatalf("after %v of quiet there is %v", time.Since(begin).Round(time.Second), s.labels)
			}
		}
		return time.Since(begin) > duration
	})
	for _, s := range n.classic.now(t, fmt.Sprintf(`present_over_time(ALERTS{alertstate="pending"}[%ds])`, int(duration.Seconds()))) {
		t.Logf("was pending: %v", s.labels)
	}
	for _, alert := range n.hook.all() {
		if ours(alert.Labels) {
			t.Errorf("somebody was told: %v", alert)
		}
	}
	for _, want := range []struct {
		address string
		least   float64
	}{{"127.0.0.1:80", 100}, {"127.0.0.1:81", 10}} {
		got := n.classic.now(t, fmt.Sprintf(`rate(sockq_listener_connections_total{netns="quiet", address=%q}[1m])`, want.address))
		if len(got) != 1 || got[0].value < want.least {
			t.Errorf("load at %s: %v connections a second, want %v at least", want.address, got, want.least)
		} else {
			t.Logf("%s: %.0f connections a second", want.address, got[0].value)
		}
	}
}

// told is what the webhook has of ours with that status.
func (n *node) told(status string) (alerts []notified) {
	for _, alert := range n.hook.all() {
		if alert.Status == status && ours(alert.Labels) {
			alerts = append(alerts, alert)
		}
	}
	return alerts
}

// overflows makes the shop slow, and then busy.
func (n *node) overflows(t *testing.T) {
	n.server(5, 500*time.Millisecond)
	overflows := n.shop.Netstat()["ListenOverflows"]
	n.clients(40, time.Second)
	await(t, "an overflow", 20*time.Second, func() bool { return n.shop.Netstat()["ListenOverflows"] > overflows })
	begin := time.Now()
	await(t, "an alert", 2*toldWithin, func() bool { return len(n.told("firing")) > 0 })

	alert := n.told("firing")[0]
	delay := alert.at.Sub(begin).Round(100 * time.Millisecond)
	t.Logf("%v after the overflow began: %v", delay, alert)
	if delay >= toldWithin {
		t.Errorf("told after %v, want less than %v", delay, toldWithin)
	}
	for label, want := range map[string]string{
		"alertname": "SockqAcceptQueueOverflow", "severity": "critical",
		"netns": "shop", "address": shopAddress, "process": "slow-server", "job": "sockq",
	} {
		if got := alert.Labels[label]; got != want {
			t.Errorf("label %s is %q, want %q", label, got, want)
		}
	}
	for _, name := range []string{"summary", "description"} {
		if text := alert.Annotations[name]; !strings.Contains(text, "shop") || !strings.Contains(text, shopAddress) {
			t.Errorf("%s does not name the listener: %q", name, text)
		}
	}
	if text := alert.Annotations["description"]; !strings.Contains(text, "slow-server") {
		t.Errorf("description does not name the process: %q", text)
	}
	for name, text := range alert.Annotations {
		if strings.TrimSpace(text) == "" || strings.Contains(text, "<no value>") || strings.Contains(text, "<error") {
			t.Errorf("annotation %s is %q", name, text)
		}
	}
	if _, err := os.Stat(filepath.Join("runbooks", path.Base(alert.Annotations["runbook_url"]))); err != nil {
		t.Error(err)
	}
}

// recovers gives the shop a longer backlog and lets it accept.
func (n *node) recovers(t *testing.T, z *zoo) {
	n.server(4096, 0)
	begin := time.Now()
	await(t, "the end of the alert", resolvedWithin, func() bool { return len(n.told("resolved")) > 0 }, z.round)
	alert := n.told("resolved")[0]
	t.Logf("%v after the remedy: %v", alert.at.Sub(begin).Round(100*time.Millisecond), alert)

	name := func(a notified) string { return a.Labels["alertname"] + " " + a.Labels["netns"] }
	for _, alert := range slices.Concat(n.told("firing"), n.told("resolved")) {
		if name(alert) != "SockqAcceptQueueOverflow shop" {
			t.Errorf("somebody was told of something else: %v", alert)
		}
	}
	for _, s := range n.classic.now(t, `ALERTS`) {
		t.Logf("still: %v", s.labels)
	}
}
