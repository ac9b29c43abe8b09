package main

import (
	"errors"
	"fmt"
	"os"
	"strings"
)

// row is a line of the table. Its cells are Markdown.
type row struct {
	what, method, cost, ratio string
	verdicts                  []verdict
}

// verdict is a target and whether it was met.
type verdict struct{ target, met string }

const tableHead = "| what | how | CPU, median (min–max) | times cheaper than the first of its group | target | met |\n|---|---|---|---|---|---|\n"

func (r row) String() string {
	var targets, met []string
	for _, v := range r.verdicts {
		targets, met = append(targets, v.target), append(met, v.met)
	}
	return fmt.Sprintf("| %s | %s | %s | %s | %s | %s |\n", r.what, r.method, r.cost, r.ratio,
		strings.Join(targets, "; "), strings.Join(met, "; "))
}

const (
	beginMark = "<!-- bench:begin -->\n"
	endMark   = "<!-- bench:end -->"
)

var errNoMarkers = errors.New("no lines " + strings.TrimSpace(beginMark) + " and " + endMark)

// replace puts text between the markers of a document, which must be there once
// and in order.
func replace(document, text string) (string, error) {
	before, rest, ok := strings.Cut(document, beginMark)
	if !ok {
		return "", errNoMarkers
	}
	_, after, ok := strings.Cut(rest, endMark)
	if !ok || strings.Contains(after, beginMark) || strings.Contains(after, endMark) {
		return "", errNoMarkers
	}
	return before + beginMark + "\n" + strings.TrimSpace(text) + "\n\n" + endMark + after, nil
}

// replaceInFile writes into the file as it is, so that it keeps its owner.
func replaceInFile(path, text string) error {
	document, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	replaced, err := replace(string(document), text)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return os.WriteFile(path, []byte(replaced), 0o644)
}
