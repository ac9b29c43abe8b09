package main

import (
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

// result is what came of one guest.
type result struct {
	release string
	panic   string // of the kernel, that made a second boot necessary
	rooms   []room
	probes  []string // what sockq says that it has there
	took    time.Duration
	err     error
}

// room is what the tests of one package said.
type room struct {
	name                    string
	ended                   bool
	none                    bool // of its tests was asked for
	code                    int
	passed, failed, skipped int
	failures                []string // the failed tests, innermost first
	said                    map[string][]string
	last                    []string
}

func (r *result) ok() bool {
	return r.err == nil && slices.ContainsFunc(r.rooms, func(m room) bool { return m.passed > 0 }) && !slices.ContainsFunc(r.rooms, func(m room) bool { return !m.ok() })
}

// anyFailed tells whether a test failed, whatever came after it.
func (r *result) anyFailed() bool {
	return slices.ContainsFunc(r.rooms, func(m room) bool { return len(m.failures) > 0 || m.code != 0 })
}

// A skipped test is a failure: the tests decide by the release what to expect.
func (m *room) ok() bool {
	return m.ended && m.code == 0 && m.failed == 0 && m.skipped == 0 && (m.passed > 0 || m.none)
}

var (
	mark    = regexp.MustCompile(`^#guest (\S+) ?(\S*) ?(-?\d*)$`)
	ran     = regexp.MustCompile(`^=== (?:RUN|CONT|NAME|PAUSE) +(\S*)$`)
	verdict = regexp.MustCompile(`^\s*--- (PASS|FAIL|SKIP): (\S+) \(`)
	probes  = regexp.MustCompile(`: (sockq on .*)$`)
)

// lastLines are kept of what a test binary says.
const lastLines = 60

// read reads what a guest wrote on its second line (see init/main.go). It tells
// whether the guest came to the end.
func (r *result) read(said []byte) (done bool) {
	r.rooms, r.probes = nil, nil
	var at *room
	var test string
	for line := range strings.Lines(string(said)) {
		line = strings.TrimSuffix(line, "\n")
		if m := mark.FindStringSubmatch(line); m != nil {
			switch m[1] {
			case "release":
				r.release = m[2]
			case "begin":
				r.rooms = append(r.rooms, room{name: m[2], said: make(map[string][]string)})
				at, test = &r.rooms[len(r.rooms)-1], ""
			case "end":
				if at != nil {
					at.ended = true
					at.code, _ = strconv.Atoi(m[3])
					at = nil
				}
			case "done":
				return true
			}
			continue
		}
		if at == nil {
			continue
		}
		if at.last = append(at.last, line); len(at.last) > lastLines {
			at.last = at.last[1:]
		}
		if m := ran.FindStringSubmatch(line); m != nil {
			test = m[1]
		} else if m := verdict.FindStringSubmatch(line); m != nil {
			switch m[1] {
			case "PASS":
				at.passed++
			case "SKIP":
				at.skipped++
				at.failures = append(at.failures, m[2])
			case "FAIL":
				at.failed++
				at.failures = append(at.failures, m[2])
			}
		} else {
			at.none = at.none || line == "testing: warning: no tests to run"
			at.said[test] = append(at.said[test], line)
			if m := probes.FindStringSubmatch(line); m != nil {
				r.probes = append(r.probes, m[1])
			}
		}
	}
	return false
}

// line tells in one line how it went.
func (r *result) line() string {
	verdict := "passed"
	if !r.ok() {
		verdict = "FAILED"
	}
	return fmt.Sprintf("%s: %s in %s", r.release, verdict, r.took.Round(time.Second))
}

// report prints the matrix and what failed.
func report(w io.Writer, tests []string, results []result) {
	for _, r := range results {
		for _, m := range r.rooms {
			if m.ok() {
				continue
			}
			fmt.Fprintf(w, "\n== %s, %s: exit code %d, ended: %t\n", r.release, m.name, m.code, m.ended)
			for _, test := range m.failures {
				fmt.Fprintf(w, "--- %s\n%s\n", test, strings.Join(m.said[test], "\n"))
			}
			if len(m.failures) == 0 || !m.ended {
				fmt.Fprintf(w, "--- the last lines\n%s\n", strings.Join(m.last, "\n"))
			}
		}
		if r.err != nil {
			fmt.Fprintf(w, "\n== %s: %v\n", r.release, r.err)
		}
	}
	fmt.Fprintf(w, "\nTests and subtests, passed/failed/skipped:\n\n")
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(table, "kernel\t%s\ttime\t\n", strings.Join(tests, "\t"))
	for _, r := range results {
		fmt.Fprintf(table, "%s\t", r.release)
		for _, test := range tests {
			cell := "-"
			if i := slices.IndexFunc(r.rooms, func(m room) bool { return m.name == test }); i >= 0 {
				m := r.rooms[i]
				cell = fmt.Sprintf("%d/%d/%d", m.passed, m.failed, m.skipped)
			}
			fmt.Fprintf(table, "%s\t", cell)
		}
		fmt.Fprintf(table, "%s\t\n", r.took.Round(time.Second))
	}
	table.Flush()
	fmt.Fprintln(w)
	for _, r := range results {
		for _, line := range r.probes {
			fmt.Fprintln(w, line)
		}
		if r.panic != "" {
			fmt.Fprintf(w, "%s was booted twice; the first time its kernel panicked: %s\n", r.release, r.panic)
		}
	}
}
