package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"sockq/probes/tracker"
)

// tracked is the tracker's programs. Opening a tracker takes as long as
// thousands of connections, in which the machine's speed changes: the programs
// are loaded once, by a tracker that is closed again, and attached as it did.
type tracked struct {
	programs []storyProgram
	untold   []string // stories, with the reason why this kernel lets none tell them
}

type storyProgram struct {
	*ebpf.Program
	name, story string
}

func loadTracker(o tracker.Options) (_ *tracked, err error) {
	t, err := tracker.Open(o)
	if err != nil {
		return nil, fmt.Errorf("open tracker: %w", err)
	}
	defer func() { err = errors.Join(err, t.Close()) }()
	loaded := new(tracked)
	seen := make(map[*ebpf.Program]bool)
	for _, story := range t.Stories() {
		if !story.Told() {
			loaded.untold = append(loaded.untold, story.Name+" ("+story.Reason+")")
		}
		for _, p := range story.Programs {
			if seen[p] {
				continue
			}
			seen[p] = true
			if err := loaded.add(story.Name, p); err != nil {
				loaded.close()
				return nil, err
			}
		}
	}
	return loaded, nil
}

func (t *tracked) add(story string, p *ebpf.Program) error {
	info, err := p.Info()
	if err != nil {
		return err
	}
	clone, err := p.Clone()
	if err != nil {
		return err
	}
	t.programs = append(t.programs, storyProgram{clone, info.Name, story})
	return nil
}

func (t *tracked) close() {
	for _, p := range t.programs {
		p.Close()
	}
}

// only is the tracker with nothing but the programs of a story.
func (t *tracked) only(story string) *tracked {
	return &tracked{programs: slices.DeleteFunc(slices.Clone(t.programs), func(p storyProgram) bool { return p.story != story })}
}

func (t *tracked) attach() (detach func() error, err error) {
	var links []link.Link
	detach = func() (err error) {
		for _, l := range links {
			err = errors.Join(err, l.Close())
		}
		return err
	}
	for _, p := range t.programs {
		l, err := p.attach()
		if err != nil {
			return nil, errors.Join(fmt.Errorf("attach %s: %w", p.name, err), detach())
		}
		links = append(links, l)
	}
	return detach, nil
}

func (p storyProgram) attach() (link.Link, error) {
	if p.Type() == ebpf.TracePoint {
		return link.Tracepoint("syscalls", "sys_exit_"+strings.TrimSuffix(p.name, "_returned"), p.Program, nil)
	}
	return link.AttachTracing(link.TracingOptions{Program: p.Program})
}
