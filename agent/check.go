package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode/utf8"

	"sockq/probes"
)

// checkOptions are the flags of sockq check.
type checkOptions struct {
	json    bool
	verbose bool
}

// check attaches what sockq would, looks once, detaches and says what works here.
func (e env) check(cfg *config) error {
	n, err := e.open(cfg.probes) // without a log: the table says it all
	if err != nil {
		return fmt.Errorf("cannot run here: start the probes: %w", err)
	}
	s, err := n.Snapshot()
	rights, unknown := findRights(e.own, cfg.needs(n))
	err = errors.Join(err, unknown)
	if err := errors.Join(err, explainClose(n.Close())); err != nil {
		return fmt.Errorf("cannot run here: %w", err)
	}
	report := newCheck(s)
	report.Rights = rights
	var out bytes.Buffer
	if cfg.check.json {
		encoder := json.NewEncoder(&out)
		encoder.SetEscapeHTML(false)
		encoder.SetIndent("", "  ")
		if err := encoder.Encode(report); err != nil {
			return err
		}
	} else {
		report.write(&out, cfg.check.verbose)
	}
	_, err = out.WriteTo(e.stdout)
	return err
}

// checkDoc is what sockq check found, and its JSON.
type checkDoc struct {
	Kernel  kernelDoc      `json:"kernel"`
	Probes  []checkedProbe `json:"probes"`
	Sources []sourceDoc    `json:"failed_sources,omitempty"`
	Rights  rights         `json:"rights"`
}

type checkedProbe struct {
	Group     string `json:"group"`
	Name      string `json:"name"`
	Tells     string `json:"tells"`
	Attached  bool   `json:"attached"`
	Mechanism string `json:"mechanism"`
	// Of what is missing, or attached in part.
	Why    string `json:"why,omitempty"`
	Needs  string `json:"needs,omitempty"`
	Reason string `json:"reason,omitempty"`
}

func newCheck(s *probes.Snapshot) checkDoc {
	doc := checkDoc{Kernel: kernelDoc{s.Kernel.Release, s.Kernel.Tier}}
	add := func(group string, st story) {
		i := slices.IndexFunc(s.Probes, func(p probes.Probe) bool { return p.Name == st.name })
		if i < 0 { // what is part of another probe is only named where it is missing
			return
		}
		p := &s.Probes[i]
		c := checkedProbe{Group: group, Name: st.name, Tells: st.tells, Attached: p.Attached, Mechanism: p.Mechanism, Reason: p.Reason}
		if p.Reason != "" {
			c.Why, c.Needs = explainProbe(p, s)
			c.Why = strings.ReplaceAll(c.Why, "\n", "; ") // of each mechanism that was tried
		}
		doc.Probes = append(doc.Probes, c)
	}
	for _, group := range storyGroups {
		for _, st := range group.stories {
			add(group.title, st)
		}
	}
	for i := range s.Sources {
		if source := &s.Sources[i]; !source.Up {
			doc.Sources = append(doc.Sources, newSourceDoc(source))
		}
	}
	return doc
}

// explainProbe says in few words why a probe is missing, and what would give it.
func explainProbe(p *probes.Probe, s *probes.Snapshot) (why, needs string) {
	st := storyOf(p.Name)
	if needs = st.needs; needs == "" && st.since != "" {
		needs = "Linux " + st.since + " or newer"
	}
	if p.Reason == "turned off" {
		return p.Reason, st.flag
	}
	for _, c := range causes {
		if strings.Contains(p.Reason, c.says) {
			return c.why, c.gives
		}
	}
	if older(s.Kernel.Release, st.since) {
		return "this kernel is older than Linux " + st.since, needs
	}
	if other := missingProbe(s, missedBy(p.Reason)); other != nil {
		return explainProbe(other, s)
	}
	if strings.Contains(p.Reason, "by kprobe: ") { // there are some, but not where they are needed
		return p.Reason, "a sockq that knows the functions of this kernel"
	}
	return p.Reason, needs
}

// missedBy is the probe without which another one cannot be, "" for none.
func missedBy(reason string) string {
	for _, says := range []string{"the census itself is sock_diag's", "needs the BPF walk"} {
		if strings.Contains(reason, says) {
			return "syn_queue" // which only the walk tells
		}
	}
	name, _ := strings.CutPrefix(reason, "needs ")
	return name
}

func missingProbe(s *probes.Snapshot, name string) *probes.Probe {
	i := slices.IndexFunc(s.Probes, func(p probes.Probe) bool { return p.Name == name && !p.Attached })
	if i < 0 {
		return nil
	}
	return &s.Probes[i]
}

// older tells whether a release is of a kernel before that version.
func older(release, version string) bool {
	var have, want [2]int
	if _, err := fmt.Sscanf(release, "%d.%d", &have[0], &have[1]); err != nil {
		return false
	}
	_, err := fmt.Sscanf(version, "%d.%d", &want[0], &want[1])
	return err == nil && slices.Compare(have[:], want[:]) < 0
}

// note is a cause of what is missing, with all that is missing for it.
type note struct {
	why, needs     string
	names, reasons []string
}

// checkWidth is the number of columns of the table.
const checkWidth = 100

// write writes the report for people.
func (d *checkDoc) write(w io.Writer, verbose bool) {
	tier := "without tracing"
	if d.Kernel.Tier != "" {
		tier = "tier " + d.Kernel.Tier
	}
	fmt.Fprintf(w, "sockq can run here: Linux %s, %s.\n", d.Kernel.Release, tier)
	fmt.Fprintln(w, wrap("", tierMeans[d.Kernel.Tier]))
	fmt.Fprintf(w, "\n  %-19s %-60s %s\n", "part", "what you get", "attached by")

	var notes []note
	group, attached := "", 0
	for _, p := range d.Probes {
		if p.Group != group {
			group = p.Group
			fmt.Fprintln(w, group)
		}
		how := "missing"
		if p.Attached {
			how = p.Mechanism
			attached++
		}
		if p.Why != "" {
			i := slices.IndexFunc(notes, func(n note) bool { return n.why == p.Why && n.needs == p.Needs })
			if i < 0 {
				i = len(notes)
				notes = append(notes, note{why: p.Why, needs: p.Needs})
			}
			n := &notes[i]
			n.names = append(n.names, p.Name)
			if !slices.Contains(n.reasons, p.Reason) {
				n.reasons = append(n.reasons, p.Reason)
			}
			how += fmt.Sprintf(" [%d]", i+1)
		}
		fmt.Fprintf(w, "  %-19s %-60s %s\n", p.Name, p.Tells, how)
	}

	fmt.Fprintf(w, "\n%d of %d parts are attached.", attached, len(d.Probes))
	if len(notes) > 0 && !verbose {
		fmt.Fprint(w, " What is missing, and what would give it (-v: the reasons in full):")
	}
	fmt.Fprintln(w)
	for i, n := range notes {
		fmt.Fprintln(w, wrap(fmt.Sprintf("%-5s", fmt.Sprintf("[%d]", i+1)), strings.Join(n.names, ", ")))
		fmt.Fprintln(w, wrap("     why:   ", clip(n.why, checkWidth-12)))
		if n.needs != "" {
			fmt.Fprintln(w, wrap("     needs: ", n.needs))
		}
		if verbose {
			for _, reason := range n.reasons {
				fmt.Fprintln(w, wrap("     full:  ", reason))
			}
		}
	}
	for _, s := range d.Sources {
		fmt.Fprintln(w, wrap(s.Name+" failed: ", s.Error))
	}
	d.Rights.write(w)
}

// clip cuts a text that is longer than a line.
func clip(text string, columns int) string {
	text = strings.Join(strings.Fields(text), " ")
	if utf8.RuneCountInString(text) <= columns {
		return text
	}
	return string([]rune(text)[:columns-1]) + "…"
}

// wrap breaks a text between words, into lines that begin under its first word.
func wrap(label, text string) string {
	indent := strings.Repeat(" ", utf8.RuneCountInString(label))
	var lines []string
	line, empty := label, true
	for _, word := range strings.Fields(text) {
		if !empty && utf8.RuneCountInString(line)+1+utf8.RuneCountInString(word) > checkWidth {
			lines = append(lines, line)
			line, empty = indent, true
		}
		if !empty {
			line += " "
		}
		line, empty = line+word, false
	}
	return strings.Join(append(lines, line), "\n")
}
