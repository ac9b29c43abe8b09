package main

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"sockq/probes/diagnose"
)

// Each row of "What the textbooks say, what Linux does" is held by a test.
func TestTextbookTableIsHeldByTests(t *testing.T) {
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	tests, err := os.ReadFile("../probes/scenario/textbook_test.go")
	if err != nil {
		t.Fatal(err)
	}
	var named, there []string
	for _, m := range regexp.MustCompile("`(TestTextbook\\w+)`").FindAllStringSubmatch(string(readme), -1) {
		named = append(named, m[1])
	}
	for _, m := range regexp.MustCompile(`(?m)^func (TestTextbook\w+)\(`).FindAllStringSubmatch(string(tests), -1) {
		there = append(there, m[1])
	}
	slices.Sort(named)
	slices.Sort(there)
	if len(named) == 0 || !slices.Equal(named, there) {
		t.Errorf("the README names %v, there are %v", named, there)
	}
}

// The table of verdicts has all of them.
func TestVerdictTable(t *testing.T) {
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	var named []string
	_, section, _ := strings.Cut(string(readme), "\n## Verdicts\n")
	section, _, _ = strings.Cut(section, "\n## ")
	for _, m := range regexp.MustCompile("(?m)^\\| `(\\w+)` \\|").FindAllStringSubmatch(section, -1) {
		named = append(named, m[1])
	}
	if !slices.Equal(named, diagnose.Names[:]) {
		t.Errorf("the README names %v, there are %v", named, diagnose.Names)
	}
}
