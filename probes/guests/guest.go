package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// guest is one virtual machine.
type guest struct {
	boot
	tier     string // that the tests use at most
	tests    []string
	flags    func(room string) []string
	binaries map[string]string // files of this machine by their names in the guest
	limit    time.Duration
	initrd   string
	log      string // what the log files begin with
}

// play boots the guest and reads what its tests said. A kernel that panics is
// booted once more, and only then: the emulation makes some trip over a
// breakpoint while they patch themselves (int3 in a jump label). After a test that
// failed there is no other boot, nor where another panic's trace has a BPF program.
func (g *guest) play(ctx context.Context) (r result) {
	began := time.Now()
	r = result{release: g.release}
	defer func() { r.took = time.Since(began) }()
	files := maps.Clone(g.binaries)
	for _, name := range g.modules {
		files[filepath.Join("modules", name)] = g.file(name)
	}
	texts := map[string]string{
		"modules.list": strings.Join(g.modules, "\n"),
		"tests.list":   strings.Join(g.tests, "\n"),
	}
	for _, test := range g.tests {
		texts[filepath.Join("tests", test, "flags.list")] = strings.Join(g.flags(test), "\n")
	}
	if r.err = writeInitramfs(g.initrd, files, texts); r.err != nil {
		return r
	}
	defer os.Remove(g.initrd)
	for attempt := range 2 {
		var said, console []byte
		said, console, r.err = g.run(ctx, []string{"", ".again"}[attempt])
		done := r.read(said)
		if r.err != nil || done {
			return r
		}
		r.err = errors.New("it ended before the tests did")
		oops, panicked := panicOf(console)
		if !panicked {
			return r
		}
		r.err = fmt.Errorf("its kernel panicked: %s", oops)
		if r.anyFailed() || !strings.HasPrefix(oops, "int3") && program.Match(console) {
			return r
		}
		if attempt == 0 {
			r.panic = oops
			fmt.Printf("%s: boots again, its kernel panicked: %s\n", r.release, oops)
		}
	}
	return r
}

// run boots once.
func (g *guest) run(ctx context.Context, suffix string) (said, console []byte, err error) {
	ctx, stop := context.WithTimeout(ctx, g.limit)
	defer stop()
	consoleLog, testLog := g.log+suffix+".console", g.log+suffix+".tests"
	for _, file := range []string{consoleLog, testLog} {
		if err := os.WriteFile(file, nil, 0o644); err != nil {
			return nil, nil, err
		}
	}
	out, err := exec.CommandContext(ctx, g.machine.qemu, g.arguments(consoleLog, testLog)...).CombinedOutput()
	switch {
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		err = fmt.Errorf("it took longer than %s", g.limit)
	case err != nil:
		err = fmt.Errorf("%s: %w\n%s", g.machine.qemu, err, out)
	}
	said, readError := os.ReadFile(testLog)
	console, consoleError := os.ReadFile(consoleLog)
	// The terminal turns \n into \r\n.
	return bytes.ReplaceAll(said, []byte("\r"), nil), console, errors.Join(err, readError, consoleError)
}

var (
	oops    = regexp.MustCompile(`(?m)(?:Internal error|Oops|BUG|int3|general protection fault)[^\r\n]*`)
	program = regexp.MustCompile(`bpf_prog_[0-9a-f]{16}`) // with its tag
)

// panicOf finds out from the console whether the kernel panicked, and why.
func panicOf(console []byte) (why string, panicked bool) {
	if !bytes.Contains(console, []byte("Kernel panic")) {
		return "", false
	}
	if first := oops.Find(console); first != nil {
		return string(first), true
	}
	return "panic", true
}
