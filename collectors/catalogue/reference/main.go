// Command reference writes the metric reference into README.md, between its
// two markers. Run it from the root of the repository:
//
//	go run ./collectors/catalogue/reference
package main

import (
	"fmt"
	"os"
	"strings"

	"sockq/collectors/catalogue"
)

const (
	begin = "<!-- metrics:begin -->"
	end   = "<!-- metrics:end -->"
)

func main() {
	if err := update("README.md"); err != nil {
		fmt.Fprintln(os.Stderr, "reference:", err)
		os.Exit(1)
	}
}

func update(path string) error {
	old, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	text, err := splice(string(old))
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if text == string(old) {
		return nil
	}
	return os.WriteFile(path, []byte(text), 0o644)
}

// splice puts the reference between the markers of text.
func splice(text string) (string, error) {
	head, rest, ok := strings.Cut(text, begin)
	if !ok {
		return "", fmt.Errorf("no line %s", begin)
	}
	_, tail, ok := strings.Cut(rest, end)
	if !ok {
		return "", fmt.Errorf("no line %s after %s", end, begin)
	}
	return head + begin + "\n" + reference() + end + tail, nil
}

// reference is the list of metrics as Markdown: a table of those that this
// version exports, and the names of those that wait for a probe.
func reference() string {
	var b strings.Builder
	b.WriteString("| metric | type | labels | meaning | tiers | needs |\n|---|---|---|---|---|---|\n")
	for _, m := range catalogue.All {
		if m.Exported() {
			fmt.Fprintf(&b, "| `%s` | %s | %s | %s | %s | %s |\n",
				m.Name, m.Type, code(m.Labels), m.Help, m.Tiers, m.Needs)
		}
	}
	b.WriteString(`
Tiers: A kernels with BPF trampolines, B with kprobes, C with tracepoints only. What a kernel cannot give is absent, never 0.
"BPF walk": Linux 6.4 and CAP_BPF + CAP_PERFMON, for every namespace of the node. "setns": CAP_SYS_ADMIN, for namespaces other than the agent's own.

Not in this version:

`)
	for _, p := range []catalogue.Probe{catalogue.Tracker, catalogue.Owners, catalogue.Diagnosis} {
		var names []string
		for _, m := range catalogue.All {
			if m.Probe == p {
				names = append(names, m.Name)
			}
		}
		fmt.Fprintf(&b, "- with the %s: %s\n", p, code(names))
	}
	return b.String()
}

func code(words []string) string {
	return "`" + strings.Join(words, "`, `") + "`"
}
