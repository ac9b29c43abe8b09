package main

import (
	"os"
	"regexp"
	"slices"
	"testing"
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
