package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sockq/collectors/catalogue"
)

func TestReadmeIsCurrent(t *testing.T) {
	const hint = "run `go run ./collectors/catalogue/reference` at the root of the repository and commit README.md"
	text, err := os.ReadFile(filepath.Join("..", "..", "..", "README.md"))
	if err != nil {
		t.Fatalf("%v: README.md needs the lines %s and %s, then %s", err, begin, end, hint)
	}
	want, err := splice(string(text))
	if err != nil {
		t.Fatalf("README.md: %v: put both markers where the metric reference belongs, then %s", err, hint)
	}
	if want != string(text) {
		t.Fatalf("the metric reference in README.md is not that of the catalogue: %s", hint)
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
	if err := os.WriteFile(path, []byte("# x\n"+begin+"\nold\n"+end+"\nrest\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := update(path); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if want := "# x\n" + begin + "\n" + reference() + end + "\nrest\n"; string(got) != want {
			t.Fatalf("got %s", got)
		}
	}
	for _, text := range []string{"", begin, end + begin} {
		if _, err := splice(text); err == nil {
			t.Errorf("%q: no error", text)
		}
	}
}
