// Command guests runs the tests of the probes and of the agent's rights on Debian's
// kernels, each in a virtual machine that QEMU emulates (TCG), one of them of arm64,
// and prints what came of it:
//
//	go run ./probes/guests
//
// The oracles are the guest kernel's own: sock_diag and the counters in
// /proc/net. It needs Debian's apt, no root but to install QEMU where it is
// missing, and keeps the kernels in the user's cache directory.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	var o options
	flag.StringVar(&o.only, "kernels", "", "kernels to boot, separated by commas: "+strings.Join(kernelNames(), ", ")+"; all if empty")
	flag.StringVar(&o.tests, "tests", strings.Join(rooms, ","), "whose tests to run")
	flag.StringVar(&o.run, "run", "", "run only tests that match, as go test -run")
	flag.StringVar(&o.whole, "whole", "", "kernels on which -run is not minded: they run all tests")
	flag.IntVar(&o.count, "count", 1, "how often to run each test, as go test -count")
	flag.StringVar(&o.tier, "tier", "", "use at most this tier of the kernel, B (kprobes) or C (tracepoints)")
	flag.IntVar(&o.parallel, "parallel", 2, "guests at a time")
	flag.DurationVar(&o.limit, "timeout", 20*time.Minute, "time that a guest may take")
	flag.StringVar(&o.cache, "cache", "", "directory of the kernels and the logs (default: sockq-kernels in the user's cache directory)")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	ok, err := o.test(ctx)
	if err != nil {
		fmt.Fprintln(os.Stderr, "guests:", err)
	}
	if !ok {
		stop()
		os.Exit(1)
	}
}

// rooms are the packages whose tests run in the guests.
var rooms = []string{"sockdiag", "netns", "scenario", "census", "tracker", "probes", agent}

// agent is the room whose tests start what is shipped. Most of them need sources and
// Go, which a guest does not have: these do not.
const (
	agent      = "agent"
	agentTests = "OfThisKernel$"
)

// folder is where a room's package is.
func folder(room string) string {
	if room == "probes" || room == agent {
		return "./" + room
	}
	return "./probes/" + room
}

type options struct {
	only, tests, run, tier string
	whole                  string
	count, parallel        int
	limit                  time.Duration
	cache                  string
}

// test tells whether all tests passed on all kernels.
func (o *options) test(ctx context.Context) (bool, error) {
	began := time.Now()
	kernels, err := choose(o.only)
	if err != nil {
		return false, err
	}
	whole, err := wholeKernels(o.whole, kernels)
	if err != nil {
		return false, err
	}
	if o.cache == "" {
		dir, err := os.UserCacheDir()
		if err != nil {
			return false, err
		}
		o.cache = filepath.Join(dir, "sockq-kernels")
	}
	logs, err := newLogs(filepath.Join(o.cache, "logs"))
	if err != nil {
		return false, err
	}
	work, err := os.MkdirTemp("", "sockq-guests-")
	if err != nil {
		return false, err
	}
	defer os.RemoveAll(work)

	if err := installTools(ctx, kernels); err != nil {
		return false, err
	}
	tests := strings.Split(o.tests, ",")
	var binaries map[string]map[string]string
	var building sync.WaitGroup
	var buildError error
	building.Go(func() { binaries, buildError = buildAll(ctx, work, kernels, tests) })
	boots, err := fetch(ctx, o.cache, kernels)
	building.Wait()
	if err := errors.Join(err, buildError); err != nil {
		return false, err
	}
	fmt.Printf("kernels and tests are ready after %s; logs are in %s\n", since(began), logs)

	results := make([]result, len(boots))
	places := make(chan struct{}, max(1, o.parallel))
	var running sync.WaitGroup
	for i, b := range boots {
		places <- struct{}{}
		running.Go(func() {
			defer func() { <-places }()
			g := guest{
				boot: b, tier: o.tier, tests: tests, binaries: binaries[b.machine.arch], limit: o.limit,
				initrd: filepath.Join(work, b.name()+".initrd"), log: filepath.Join(logs, b.name()),
			}
			g.flags = func(room string) []string { return o.flags(room, whole[b.name()]) }
			results[i] = g.play(ctx)
			fmt.Println(results[i].line())
		})
	}
	running.Wait()
	if ctx.Err() != nil {
		return false, ctx.Err()
	}
	report(os.Stdout, tests, results)
	fmt.Printf("\n%s\n", since(began))
	return !slices.ContainsFunc(results, func(r result) bool { return !r.ok() }), nil
}

// wholeKernels are those that run all tests, which have to be among the others.
func wholeKernels(list string, kernels []kernel) (map[string]bool, error) {
	whole := make(map[string]bool)
	for name := range strings.SplitSeq(list, ",") {
		if name != "" && !slices.ContainsFunc(kernels, func(k kernel) bool { return k.name() == name }) {
			return nil, fmt.Errorf("-whole: %q is not booted", name)
		}
		whole[name] = true
	}
	return whole, nil
}

// flags are those of a room's tests, on a kernel that runs all of them or not.
func (o *options) flags(room string, whole bool) []string {
	flags := []string{fmt.Sprintf("-test.count=%d", o.count)}
	if o.run != "" && !whole {
		return append(flags, "-test.run="+o.run)
	}
	if room == agent {
		return append(flags, "-test.run="+agentTests)
	}
	return flags
}

// kept is how long logs are.
const kept = 7 * 24 * time.Hour

// newLogs makes a directory for this run and removes those of old ones.
func newLogs(dir string) (string, error) {
	old, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		return "", err
	}
	for _, name := range old {
		if info, err := os.Stat(name); err == nil && time.Since(info.ModTime()) > kept {
			if err := os.RemoveAll(name); err != nil {
				return "", err
			}
		}
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	return os.MkdirTemp(dir, time.Now().Format("2006-01-02T15-04-05-"))
}

func since(t time.Time) time.Duration { return time.Since(t).Round(time.Second) }

// buildAll builds for each architecture among the kernels.
func buildAll(ctx context.Context, dir string, kernels []kernel, tests []string) (map[string]map[string]string, error) {
	built := make(map[string]map[string]string)
	for _, k := range kernels {
		arch := k.machine.arch
		if built[arch] != nil {
			continue
		}
		files, err := build(ctx, filepath.Join(dir, arch), arch, tests)
		if err != nil {
			return nil, err
		}
		built[arch] = files
	}
	return built, nil
}

// build compiles the guests' programs, static. It returns their files by the path in
// the guest.
func build(ctx context.Context, dir, arch string, tests []string) (map[string]string, error) {
	files := map[string]string{"init": filepath.Join(dir, "init")}
	arguments := [][]string{{"build", "-o", files["init"], "./probes/guests/init"}}
	for _, name := range tests {
		if !slices.Contains(rooms, name) {
			return nil, fmt.Errorf("no tests are called %q", name)
		}
		pkg := folder(name)
		binary := filepath.Join(dir, name+".test")
		files[testPath(name)] = binary
		arguments = append(arguments, []string{"test", "-c", "-o", binary, "-ldflags=-s -w", pkg})
		if name == agent {
			files["tests/agent/sockq"] = filepath.Join(dir, "sockq")
			arguments = append(arguments, []string{"build", "-o", files["tests/agent/sockq"], "-ldflags=-s -w", pkg})
			continue
		}
		data, err := filepath.Glob(filepath.Join(pkg, "testdata", "*"))
		if err != nil {
			return nil, err
		}
		for _, file := range data {
			files[filepath.Join("tests", name, "testdata", filepath.Base(file))] = file
		}
	}
	for _, args := range arguments {
		cmd := exec.CommandContext(ctx, "go", args...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOARCH="+arch)
		if out, err := cmd.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, out)
		}
	}
	return files, nil
}

// testPath is where a test binary is in the guest.
func testPath(name string) string { return filepath.Join("tests", name, name+".test") }
