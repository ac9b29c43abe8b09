package main

import (
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// rooms is who may import whom, besides the standard library and x/sys: a leaf
// imports nothing, a probe knows no face, a face talks to no kernel.
var rooms = map[string][]string{
	"probes/tcpstate": {},
	"probes/diagnose": {},
	"probes/sockdiag": {"sockq/probes/tcpstate", "github.com/mdlayher/netlink"},
	"probes/netns":    {"github.com/prometheus/procfs"},
	"probes/census": {
		"sockq/probes/tcpstate", "sockq/probes/sockdiag", "sockq/probes/netns", "github.com/cilium/ebpf",
	},
	"probes/owner":   {"k8s.io/cri-api", "google.golang.org/grpc"},
	"probes/tracker": {"sockq/probes/tcpstate", "github.com/cilium/ebpf"},
	"probes": {
		"sockq/probes/tcpstate", "sockq/probes/sockdiag", "sockq/probes/netns", "sockq/probes/census", "sockq/probes/tracker",
		"sockq/probes/diagnose", "sockq/probes/owner", "github.com/cilium/ebpf",
	},
	"collectors/catalogue":           {},
	"collectors/catalogue/reference": {"sockq/collectors/catalogue", "sockq/collectors/budget"},
	"collectors/budget": {
		"sockq/probes", "sockq/probes/census", "sockq/probes/tcpstate", "sockq/probes/tracker", "sockq/probes/diagnose",
		"sockq/collectors/catalogue",
	},
	"collectors": {
		"sockq/probes", "sockq/probes/census", "sockq/probes/tcpstate", "sockq/probes/tracker", "sockq/probes/diagnose",
		"sockq/collectors/catalogue",
		"github.com/prometheus/client_golang", "github.com/prometheus/client_model", "github.com/prometheus/common",
		"google.golang.org/protobuf",
	},
	"dashboards":          {"sockq/collectors/catalogue", "github.com/grafana/grafana-foundation-sdk"},
	"dashboards/generate": {"sockq/dashboards"},
	"agent": {
		"sockq", "github.com/alecthomas/kingpin", "github.com/prometheus",
	},
	"alerts/prometheusrule": {},
	// For tests and measurements only; nothing that ships imports them.
	"probes/scenario": {"sockq/probes/tcpstate", "sockq/probes/sockdiag", "sockq/probes/netns", "github.com/mdlayher/netlink", "github.com/cilium/ebpf"},
	"probes/bench":    {"sockq", "github.com/cilium/ebpf"},
	// They start the tests of the probes, and need nothing of them.
	"probes/guests":      {},
	"probes/guests/init": {},
	// It renders the chart, by helm.
	"deploy/render": {},
}

var forTestsOnly = []string{
	"sockq/probes/scenario", "sockq/probes/bench", "sockq/probes/guests", "sockq/probes/guests/init", "sockq/deploy/render",
}

// generatorsOnly brings a big library along, which nothing that ships may.
const generatorsOnly = "sockq/dashboards"

func TestRooms(t *testing.T) {
	seen := make(map[string]bool)
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		room, err := filepath.Rel("..", filepath.Dir(path))
		if err != nil {
			return err
		}
		allowed, ok := rooms[room]
		if !ok {
			t.Errorf("%s: no room is called %s", path, room)
			return nil
		}
		seen[room] = true
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		for _, spec := range file.Imports {
			imported, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return err
			}
			if !mayImport(allowed, imported) || slices.Contains(forTestsOnly, imported) ||
				imported == generatorsOnly && room != "dashboards/generate" {
				t.Errorf("%s must not import %s", path, imported)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for room := range rooms {
		if !seen[room] {
			t.Errorf("room %s is empty", room)
		}
	}
}

func mayImport(allowed []string, imported string) bool {
	first, _, _ := strings.Cut(imported, "/")
	if first != "sockq" && !strings.Contains(first, ".") || strings.HasPrefix(imported, "golang.org/x/sys/") {
		return true
	}
	return slices.ContainsFunc(allowed, func(prefix string) bool {
		if prefix != "sockq" && strings.HasPrefix(prefix, "sockq/") {
			return imported == prefix
		}
		return imported == prefix || strings.HasPrefix(imported, prefix+"/")
	})
}
