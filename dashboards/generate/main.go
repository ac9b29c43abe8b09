// Command generate writes the dashboards, and the ConfigMaps that carry them, into
// the directory that it is run in: go generate ./dashboards.
package main

import (
	"fmt"
	"os"

	"sockq/dashboards"
)

func main() {
	if err := generate(); err != nil {
		fmt.Fprintln(os.Stderr, "generate:", err)
		os.Exit(1)
	}
}

func generate() error {
	files, err := dashboards.Files()
	if err != nil {
		return err
	}
	for path, content := range files {
		if err := os.WriteFile(path, content, 0o644); err != nil {
			return err
		}
	}
	return nil
}
