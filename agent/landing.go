package main

import (
	"html/template"
	"log/slog"
	"net/http"
	"strings"

	"github.com/prometheus/common/version"

	"sockq/probes"
)

// The names of probes and their reasons come from the kernel and the file
// system: html/template escapes them.
var landing = template.Must(template.New("landing").Parse(`<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>sockq</title>
<style>
body { font-family: system-ui, sans-serif; line-height: 1.5; max-width: 50rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse }
th, td { text-align: left; vertical-align: top; padding: .2rem 1.5rem .2rem 0 }
</style>
</head>
<body>
<h1>sockq</h1>
<p>The state of every TCP socket and the two queues of every listener (SYN queue and accept queue), in all network namespaces of this node.</p>
<ul>
{{- range .Links}}
<li><a href="{{.Relative}}">{{.Path}}</a>: {{.What}}</li>
{{- end}}
</ul>
<p>Version {{.Version}}. Kernel {{.Snapshot.Kernel.Release}}{{with .Snapshot.Kernel.Tier}}, tier {{.}}{{else}}, without BPF{{end}}.
{{len .Snapshot.Namespaces}} namespaces, {{len .Snapshot.Listeners}} listening addresses.</p>
{{- if .Probes}}
<h2>Probes</h2>
<table>
<tr><th>probe</th><th>tells</th><th>attached by</th><th>why not</th></tr>
{{- range .Probes}}
<tr><td>{{.Name}}</td><td>{{.Tells}}</td><td>{{if .Attached}}{{.Mechanism}}{{else}}not attached{{end}}</td><td>{{.Reason}}</td></tr>
{{- end}}
</table>
{{- end}}
</body>
</html>
`))

func landingPage(n node, telemetryPath string, logger *slog.Logger) http.Handler {
	links := []link{
		{telemetryPath, "metrics for Prometheus"},
		{pathSnapshot, "the same as JSON"},
		{pathReady, "200 once all sockets were counted"},
		{pathHealthy, "200 while sockq runs"},
	}
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		s, err := n.Snapshot()
		if err != nil {
			noSnapshot(w, logger, err)
			return
		}
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		err = landing.Execute(w, struct {
			Links    []link
			Version  string
			Snapshot *probes.Snapshot
			Probes   []probeRow
		}{links, version.Version, s, probeRows(s.Probes)})
		if err != nil {
			logger.Error("Landing page", "err", err)
		}
	})
}

type link struct{ Path, What string }

// Relative links work behind a proxy that serves the page under a prefix.
func (l link) Relative() string { return strings.TrimPrefix(l.Path, "/") }

// probeRow is a probe for people.
type probeRow struct {
	probes.Probe
	Tells string
}

// probeRows says a reason once for probes that follow each other and share it.
func probeRows(list []probes.Probe) []probeRow {
	rows := make([]probeRow, len(list))
	for i, p := range list {
		rows[i] = probeRow{p, storyOf(p.Name).tells}
		if i > 0 && p.Reason != "" && p.Reason == list[i-1].Reason {
			rows[i].Reason = "as above"
		}
	}
	return rows
}
