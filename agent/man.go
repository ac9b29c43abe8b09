package main

import "strings"

// manTemplate is the man page that --help-man writes, in roff.
const manTemplate = `.TH SOCKQ 8 "" "sockq {{ManVersion}}" "System administration"
.SH NAME
sockq \- TCP socket states and listener queues of a Linux node
.SH SYNOPSIS
.B sockq
.RI [ flags ]
.br
.B sockq check
.RI [ flags ]
.SH DESCRIPTION
{{.App.Help|Roff}}{{range .App.FlattenedCommands}}{{if IsCheck .}}.SH SOCKQ {{.FullCommand|ToUpper}}
{{.Help|Roff}}{{template "flags" .Flags|FlagGroups}}{{end}}{{end}}.SH FLAGS
{{template "flags" .App.Flags|FlagGroups}}
{{- define "flags"}}{{range .}}.SS {{.Title|RoffWord}}
{{range .Flags}}{{if not .Hidden}}.TP
.B {{if .Short}}\-{{.Short|Char}}, {{end}}\-\-{{if .IsBoolFlag}}[no\-]{{end}}{{.Name|RoffWord}}{{if not .IsBoolFlag}}={{.FormatPlaceHolder|RoffWord}}{{end}}
{{.Help|Roff}}{{end}}{{end}}{{end}}{{end -}}
`

// roff is a text of --help as roff, with what is indented as it stands.
func roff(text string) string {
	var out strings.Builder
	asItIs := false
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\n")
		if indented := strings.HasPrefix(line, "    "); line != "" && indented != asItIs {
			if asItIs = indented; indented {
				out.WriteString(".EX\n")
			} else {
				out.WriteString(".EE\n.PP\n")
			}
		}
		switch {
		case line != "":
			out.WriteString(roffWord(line) + "\n")
		case !asItIs:
			out.WriteString(".PP\n")
		}
	}
	if asItIs {
		out.WriteString(".EE\n")
	}
	return out.String()
}

var roffEscapes = strings.NewReplacer(`\`, `\e`, "-", `\-`)

func roffWord(text string) string {
	text = roffEscapes.Replace(text)
	if strings.HasPrefix(text, ".") || strings.HasPrefix(text, "'") {
		return `\&` + text
	}
	return text
}
