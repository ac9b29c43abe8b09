// Command reference writes what is made from the catalogue into the documents that
// have it, between two markers each: the metric reference and the budget of series. Run
// it from the root of the repository:
//
//	go run ./collectors/catalogue/reference
package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"sockq/collectors/catalogue"
)

// A section of a document is made from the catalogue.
type section struct {
	path string
	name string // in its markers
	text func() string
}

var sections = []section{
	{"README.md", "metrics", reference},
	{"deploy/prometheus/README.md", "budget", budgets},
}

func (s section) begin() string { return "<!-- " + s.name + ":begin -->" }
func (s section) end() string   { return "<!-- " + s.name + ":end -->" }

func main() {
	for _, s := range sections {
		if err := s.update(s.path); err != nil {
			fmt.Fprintln(os.Stderr, "reference:", err)
			os.Exit(1)
		}
	}
}

func (s section) update(path string) error {
	old, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	text, err := s.splice(string(old))
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if text == string(old) {
		return nil
	}
	return os.WriteFile(path, []byte(text), 0o644)
}

// splice puts the section between its markers in text.
func (s section) splice(text string) (string, error) {
	head, rest, ok := strings.Cut(text, s.begin())
	if !ok {
		return "", fmt.Errorf("no line %s", s.begin())
	}
	_, tail, ok := strings.Cut(rest, s.end())
	if !ok {
		return "", fmt.Errorf("no line %s after %s", s.end(), s.begin())
	}
	return head + s.begin() + "\n" + s.text() + s.end() + tail, nil
}

// reference is the list of metrics as Markdown.
func reference() string {
	const owner = "`process`, `namespace`, `pod`, `container`"
	var b strings.Builder
	b.WriteString("| metric | type | labels | meaning | tiers | needs |\n|---|---|---|---|---|---|\n")
	for _, m := range catalogue.All {
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s | %s | %s |\n",
			m.Name, m.Type, strings.Replace(code(m.Labels), owner, "*owner*", 1), m.Help, m.Tiers, m.Needs)
	}
	b.WriteString(`
*owner*: ` + owner + `, each where it is known (see [Owners](#owners)); so it is with the labels ` + "`process`, `namespace`, `pod`" + ` of others.

Tiers: A kernels with BPF trampolines, B with kprobes, C with tracepoints only. What a kernel cannot give is absent, never 0.
"BPF walk": Linux 6.4 and CAP_BPF + CAP_PERFMON, for every namespace of the node. "setns": CAP_SYS_ADMIN, for namespaces other than the agent's own.

Series of transitions, states, errors, reasons and ends of half-open connections begin when they are first counted, all other counters at 0.
Histograms are native (schema 0, for a scrape in protobuf) and classic at once. The highest power of two is 2^24 s; what took longer is counted there. The classic bounds, in seconds:

`)
	for _, m := range catalogue.All {
		if m.Type == catalogue.Histogram {
			fmt.Fprintf(&b, "- `%s`: %s\n", m.Name, powers(m.Buckets))
		}
	}
	return b.String()
}

// powers are 2^n for each exponent.
func powers(exponents []int) string {
	words := make([]string, len(exponents))
	for i, n := range exponents {
		if n < 0 {
			words[i] = "2^" + strconv.Itoa(n)
		} else {
			words[i] = strconv.Itoa(1 << n)
		}
	}
	return strings.Join(words, ", ")
}

func code(words []string) string {
	return "`" + strings.Join(words, "`, `") + "`"
}
