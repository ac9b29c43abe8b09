// Command prometheusrule writes alerts/prometheusrule.yaml, the rules of
// alerts/rules.yaml as the Prometheus Operator takes them. Run it from the root of
// the repository:
//
//	go run ./alerts/prometheusrule
package main

import (
	"bytes"
	"fmt"
	"os"
)

//go:generate go -C ../.. run ./alerts/prometheusrule

// The namespace is that of the release or of kubectl.
const head = `# Made of alerts/rules.yaml by go generate ./alerts/...; do not edit.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: sockq
  labels:
    app.kubernetes.io/name: sockq
spec:
`

func main() {
	if err := write("alerts/rules.yaml", "alerts/prometheusrule.yaml"); err != nil {
		fmt.Fprintln(os.Stderr, "prometheusrule:", err)
		os.Exit(1)
	}
}

func write(from, to string) error {
	rules, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, wrap(rules), 0o644)
}

// wrap puts the text of rules under spec. What is indented as a whole means the
// same, block scalars included.
func wrap(rules []byte) []byte {
	wrapped := []byte(head)
	for line := range bytes.Lines(rules) {
		if len(bytes.TrimSpace(line)) > 0 {
			wrapped = append(wrapped, "  "...)
		}
		wrapped = append(wrapped, line...)
	}
	return wrapped
}
