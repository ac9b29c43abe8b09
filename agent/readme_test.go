package main

import (
	"io/fs"
	"os"
	"path/filepath"
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

// Each relative link in the documentation leads to a file that is there, and to a heading
// in it.
func TestLinksLead(t *testing.T) {
	anchors := func(path string) (all []string) {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`(?m)^#+ (.+)$`).FindAllStringSubmatch(string(text), -1) {
			kept := regexp.MustCompile(`[^\p{L}\p{N} _-]`).ReplaceAllString(strings.ToLower(m[1]), "")
			all = append(all, strings.ReplaceAll(kept, " ", "-"))
		}
		return all
	}
	followed := 0
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || filepath.Ext(path) != ".md" {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for _, m := range regexp.MustCompile(`\]\(([^)\s]+)\)`).FindAllStringSubmatch(string(text), -1) {
			file, anchor, _ := strings.Cut(m[1], "#")
			if strings.Contains(file, "://") {
				continue
			}
			followed++
			target := path
			if file != "" {
				target = filepath.Join(filepath.Dir(path), file)
			}
			if _, err := os.Stat(target); err != nil {
				t.Errorf("%s links to %s, which is not there", path, m[1])
			} else if anchor != "" && !slices.Contains(anchors(target), anchor) {
				t.Errorf("%s links to %s, which has no such heading", path, m[1])
			}
		}
		return nil
	})
	if err != nil || followed == 0 {
		t.Fatalf("%d links: %v", followed, err)
	}
}
