package main

import (
	"fmt"
	"strconv"
	"strings"

	"sockq/collectors/budget"
)

// scrapes are the columns of the budget.
var scrapes = []struct {
	name string
	budget.Scrape
}{
	{"tiers A and B", budget.Scrape{Tier: "A"}},
	{"tier C", budget.Scrape{Tier: "C"}},
	{"A and B, native", budget.Scrape{Tier: "A", Native: true}},
	{"C, native", budget.Scrape{Tier: "C", Native: true}},
}

// scrapeInterval is what the alerts want, in seconds.
const scrapeInterval = 15

// worked are examples of nodes.
var worked = []struct {
	name string
	budget.Count
}{
	{"a virtual machine with a service or two", budget.Count{Listeners: 20, Namespaces: 1, Processes: 15}},
	{"a Kubernetes node, 30 pods", budget.Count{Listeners: 100, Namespaces: 31, Processes: 60}},
	{"a large one, 110 pods", budget.Count{Listeners: 300, Namespaces: 111, Processes: 200}},
	{"a host of 1,000 listeners", budget.Count{Listeners: 1000, Namespaces: 1, Processes: 50}},
	{"the same, all of one process and on ports from 30000, `--listener.collapse=auto`", budget.Count{Listeners: 51, Namespaces: 1, Processes: 50}},
	{"all that the flags' defaults allow", mostOf(1000, 300, 200)},
	{"`--max-listeners=200 --max-namespaces=50 --max-processes=50`", mostOf(200, 50, 50)},
	{"`--max-listeners=50 --max-namespaces=1 --max-processes=1`", mostOf(50, 1, 1)},
}

// mostOf is what the three bounds allow: each sums the rest in one more, that of the
// processes in one more of each namespace.
func mostOf(listeners, namespaces, processes int) budget.Count {
	return budget.Count{Listeners: listeners + 1, Namespaces: namespaces + 1, Processes: processes + namespaces + 1}
}

const (
	fleetOf = 1000      // nodes
	shardOf = 1_000_000 // series of a Prometheus
)

// budgets are the tables of deploy/prometheus/README.md.
func budgets() string {
	var b strings.Builder
	header := func(first string) {
		b.WriteString("\n| " + first)
		for _, s := range scrapes {
			b.WriteString(" | " + s.name)
		}
		b.WriteString(" |\n|---" + strings.Repeat("|---", len(scrapes)) + "|\n")
	}
	row := func(first string, cell func(budget.Scrape) string) {
		b.WriteString("| " + first)
		for _, s := range scrapes {
			b.WriteString(" | " + cell(s.Scrape))
		}
		b.WriteString(" |\n")
	}
	header("series of")
	for _, thing := range []struct {
		name string
		budget.Thing
	}{
		{"a listener", budget.Listener},
		{"a network namespace", budget.Namespace},
		{"a name of processes in a namespace", budget.Process},
		{"the node's times in states", budget.Node},
	} {
		row(thing.name, func(s budget.Scrape) string { return between(s.One(thing.Thing)) })
	}
	row("these, of each namespace, with `--states.per-netns`", func(s budget.Scrape) string {
		together := s.One(budget.Namespace)
		s.PerNetns = true
		apart := s.One(budget.Namespace)
		return between(budget.Series{Usual: apart.Usual - together.Usual, Most: apart.Most - together.Most})
	})
	row("sockq itself, Go and its process", func(budget.Scrape) string { return "< " + strconv.Itoa(budget.AgentMost) })

	header("a node: listeners, namespaces, processes")
	for _, n := range worked {
		row(fmt.Sprintf("%s: %s, %s, %s", n.name, thousands(n.Listeners), thousands(n.Namespaces), thousands(n.Processes)),
			func(s budget.Scrape) string { return between(s.Node(n.Count)) })
	}

	header(fmt.Sprintf("%s such nodes: series usually; samples/s at %d s; shards", thousands(fleetOf), scrapeInterval))
	for _, n := range worked {
		row(n.name, func(s budget.Scrape) string {
			series := fleetOf * s.Node(n.Count).Usual
			return fmt.Sprintf("%.1f M; %s; %d", float64(series)/1e6, thousands((series/scrapeInterval+500)/1000*1000), (series+shardOf-1)/shardOf)
		})
	}
	b.WriteString("\n")
	return b.String()
}

// between is "31 to 40".
func between(s budget.Series) string {
	if s.Usual == s.Most {
		return thousands(s.Most)
	}
	return thousands(s.Usual) + " to " + thousands(s.Most)
}

// thousands is n as "12,345".
func thousands(n int) string {
	digits := strconv.Itoa(n)
	for i := len(digits) - 3; i > 0; i -= 3 {
		digits = digits[:i] + "," + digits[i:]
	}
	return digits
}
