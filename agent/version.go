package main

import (
	"runtime/debug"

	"github.com/prometheus/common/version"
)

// The linker sets version.Version for a release; else it is what the go
// command knows.
func init() {
	if version.Version != "" {
		return
	}
	version.Version = "(devel)"
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		version.Version = info.Main.Version
	}
}

func versionText() string { return version.Print("sockq") }
