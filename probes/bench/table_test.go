package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestRow(t *testing.T) {
	r := row{what: "Census", method: "walk", cost: "1 ms", ratio: "7", verdicts: []verdict{{"≥ 6×", "yes"}, {"≥ 9×", "**no**"}}}
	if got, want := r.String(), "| Census | walk | 1 ms | 7 | ≥ 6×; ≥ 9× | yes; **no** |\n"; got != want {
		t.Errorf("row is %q, want %q", got, want)
	}
	cells := strings.Count((row{}).String(), "|")
	for line := range strings.Lines(tableHead) {
		if strings.Count(line, "|") != cells {
			t.Errorf("%q has not the %d bars of a row", line, cells)
		}
	}
}

func TestReplace(t *testing.T) {
	const document = "# sockq\n\n<!-- bench:begin -->\nold\n<!-- bench:end -->\n\nLimits\n"
	const want = "# sockq\n\n<!-- bench:begin -->\n\n| new |\n\n<!-- bench:end -->\n\nLimits\n"
	for _, document := range []string{document, want} { // again, too
		got, err := replace(document, "| new |\n")
		if err != nil || got != want {
			t.Errorf("replace() = %q, %v, want %q", got, err, want)
		}
	}
	for name, bad := range map[string]string{
		"empty":     "",
		"no end":    "<!-- bench:begin -->\nold\n",
		"no begin":  "old\n<!-- bench:end -->\n",
		"backwards": "<!-- bench:end -->\n<!-- bench:begin -->\n",
		"twice":     document + document,
	} {
		if got, err := replace(bad, "new"); !errors.Is(err, errNoMarkers) {
			t.Errorf("%s: replace() = %q, %v", name, got, err)
		}
	}
}

func TestReplaceInFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "README.md")
	if err := replaceInFile(path, "new"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("replaceInFile() = %v without a file", err)
	}
	if err := os.WriteFile(path, []byte("no markers"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := replaceInFile(path, "new"); !errors.Is(err, errNoMarkers) {
		t.Errorf("replaceInFile() = %v without markers", err)
	}
	if b, _ := os.ReadFile(path); string(b) != "no markers" {
		t.Errorf("the file without markers is %q now", b)
	}
	if err := os.WriteFile(path, []byte(beginMark+endMark+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := replaceInFile(path, "new"); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(path); string(b) != beginMark+"\nnew\n\n"+endMark+"\n" {
		t.Errorf("the file is %q now", b)
	}
}

func TestPage(t *testing.T) {
	page := []byte("# HELP a A.\n# TYPE a counter\na 1\nab{c=\"# d\"} 2\ngo_memstats_mallocs_total 1.5e+06\n")
	if got := series(page); got != 3 {
		t.Errorf("%d series, want 3", got)
	}
	if got := value(page, "go_memstats_mallocs_total"); got != 1.5e6 {
		t.Errorf("value is %v", got)
	}
	if got := value(page, "ab"); got != 0 {
		t.Errorf("a metric with labels has the value %v", got)
	}
}
