package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sockq/collectors/catalogue"
)

func TestDocumentsAreCurrent(t *testing.T) {
	for _, s := range sections {
		hint := "run `go run ./collectors/catalogue/reference` at the root of the repository and commit " + s.path
		text, err := os.ReadFile(filepath.Join("..", "..", "..", s.path))
		if err != nil {
			t.Fatalf("%v: %s needs the lines %s and %s, then %s", err, s.path, s.begin(), s.end(), hint)
		}
		want, err := s.splice(string(text))
		if err != nil {
			t.Fatalf("%s: %v: put both markers where it belongs, then %s", s.path, err, hint)
		}
		if want != string(text) {
			t.Errorf("between %s and %s, %s is not that of the catalogue: %s", s.begin(), s.end(), s.path, hint)
		}
	}
}

func TestReferenceHasEveryMetric(t *testing.T) {
	table := reference()
	for _, m := range catalogue.All {
		if !strings.Contains(table, "`"+m.Name+"`") {
			t.Errorf("%s is missing", m.Name)
		}
	}
}

func TestUpdateReplacesWhatIsBetweenTheMarkers(t *testing.T) {
	path := filepath.Join(t.TempDir(), "README.md")
	s := section{path, "metrics", reference}
	if err := os.WriteFile(path, []byte("# x\n"+s.begin()+"\nold\n"+s.end()+"\nrest\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := s.update(path); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if want := "# x\n" + s.begin() + "\n" + reference() + s.end() + "\nrest\n"; string(got) != want {
			t.Fatalf("got %s", got)
		}
	}
	for _, text := range []string{"", s.begin(), s.end() + s.begin()} {
		if _, err := s.splice(text); err == nil {
			t.Errorf("%q: no error", text)
		}
	}
}

func TestThousands(t *testing.T) {
	for n, want := range map[int]string{0: "0", 999: "999", 1000: "1,000", 25042: "25,042", 1234567: "1,234,567"} {
		if got := thousands(n); got != want {
			t.Errorf("%d is %s, want %s", n, got, want)
		}
	}
}
