// Command render writes what is made from the Helm chart: the manifests in
// deploy/kubernetes, and before that the copies of rules and dashboards in the chart,
// which cannot read outside of itself. It needs helm in PATH; run it from the top of
// the repository.
package main

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

const (
	chart    = "deploy/helm/sockq"
	rendered = "deploy/kubernetes"
	// sums are those of all that the manifests were made from, and their own: with
	// them a test without helm tells that they are stale.
	sums = rendered + "/sha256sums"
)

// manifests are rendered from a template of the chart each.
var manifests = map[string]string{
	"serviceaccount.yaml":                 "serviceaccount.yaml",
	"daemonset.yaml":                      "daemonset.yaml",
	"networkpolicy.yaml":                  "networkpolicy.yaml",
	"prometheus-operator/podmonitor.yaml": "podmonitor.yaml",

	"prometheus-operator/prometheusrule.yaml": "prometheusrule.yaml",
}

// copies are where the chart has what it takes from elsewhere.
var copies = map[string]string{
	"alerts/rules.yaml":                  chart + "/files",
	"deploy/prometheus/fleet-rules.yaml": chart + "/files",
	"dashboards/grafana/*.json":          chart + "/files/dashboards",
}

// turnedOn are values beyond the defaults: what of it belongs to no base is a
// component.
var turnedOn = []string{"podMonitor.enabled=true", "prometheusRule.enabled=true"}

func main() {
	check := flag.Bool("check", false, "write nothing; fail if something is stale")
	flag.Parse()
	if err := render(*check); err != nil {
		fmt.Fprintln(os.Stderr, "render:", err)
		os.Exit(1)
	}
}

func render(check bool) error {
	put := write
	if check {
		put = compare
	}
	for _, files := range []func() (map[string][]byte, error){copiedFiles, manifestFiles} {
		if err := putAll(files, put); err != nil {
			return err
		}
	}
	list, err := sumUp()
	if err != nil {
		return err
	}
	return put(sums, list)
}

func putAll(files func() (map[string][]byte, error), put func(string, []byte) error) error {
	all, err := files()
	if err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(all)) {
		err = errors.Join(err, put(name, all[name]))
	}
	return err
}

func write(name string, data []byte) error {
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	return os.WriteFile(name, data, 0o644)
}

func compare(name string, want []byte) error {
	if got, err := os.ReadFile(name); err != nil || !bytes.Equal(got, want) {
		return fmt.Errorf("%s is stale: go run ./deploy/render", name)
	}
	return nil
}

// copiedFiles are those of the chart that are copies.
func copiedFiles() (map[string][]byte, error) {
	files := make(map[string][]byte)
	for pattern, to := range copies {
		names, err := filepath.Glob(pattern)
		if err != nil || len(names) == 0 {
			return nil, fmt.Errorf("there are no %s", pattern)
		}
		for _, name := range names {
			if files[path.Join(to, filepath.Base(name))], err = os.ReadFile(name); err != nil {
				return nil, err
			}
		}
	}
	return files, nil
}

// manifestFiles renders the chart.
func manifestFiles() (map[string][]byte, error) {
	// A helm that was built by go install takes itself for one of Kubernetes 1.20.
	args := []string{"template", "sockq", chart, "--namespace", "sockq", "--kube-version", "1.36"}
	for _, value := range turnedOn {
		args = append(args, "--set", value)
	}
	var stderr bytes.Buffer
	cmd := exec.Command("helm", args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("helm: %w: %s", err, stderr.Bytes())
	}
	byTemplate := make(map[string]string)
	for document := range strings.SplitSeq(string(out), "---\n") {
		source, text, ok := strings.Cut(document, "\n")
		if template, found := strings.CutPrefix(source, "# Source: sockq/templates/"); found && ok {
			if byTemplate[template] != "" {
				text = "---\n" + text
			}
			byTemplate[template] += plain(text)
		}
	}
	files := make(map[string][]byte)
	for name, template := range manifests {
		text, ok := byTemplate[template]
		if !ok {
			return nil, fmt.Errorf("the chart renders no %s", template)
		}
		files[path.Join(rendered, name)] = []byte("# Made by go run ./deploy/render from " + chart + ".\n" + text)
	}
	return files, nil
}

// plain takes away what is true of Helm's releases only.
func plain(text string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		if !strings.Contains(line, "helm.sh/chart:") && !strings.Contains(line, "app.kubernetes.io/managed-by:") {
			b.WriteString(line)
		}
	}
	return b.String()
}

// sumUp lists the chart and what was made from it, as sha256sum does.
func sumUp() ([]byte, error) {
	var list bytes.Buffer
	add := func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || name == sums {
			return err
		}
		data, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		fmt.Fprintf(&list, "%x  %s\n", sha256.Sum256(data), filepath.ToSlash(name))
		return nil
	}
	for _, dir := range []string{chart, rendered} {
		if err := filepath.WalkDir(dir, add); err != nil {
			return nil, err
		}
	}
	return list.Bytes(), nil
}
