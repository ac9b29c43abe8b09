// Command bench measures what sockq costs, beside what others cost for the same
// answer, and writes the table into README.md. It needs root, 8 GB of memory
// and a quarter of an hour:
//
//	go run ./probes/bench
//
// All sockets live in network namespaces of its own, held by processes that end
// with it. CPU time is compared, user and system, of rounds that take turns, so
// that a busy machine disturbs all alike.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"sockq/probes/census"
)

// The main thread cannot end, so it must not become a namespace's.
func init() { runtime.LockOSThread() }

func main() {
	if len(os.Args) > 1 && os.Args[1] == holdCommand {
		fail(hold(os.Args[2:]))
		return
	}
	write := flag.Bool("write", true, "write the table into README.md")
	quick := flag.Bool("quick", false, "few sockets, to try it; never writes")
	rounds := flag.Int("rounds", 7, "rounds of each measurement")
	only := flag.String("only", "", "steps to run, separated by commas: "+strings.Join(stepNames(), ", ")+"; never writes")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends it at once
	b := &bench{ctx: ctx, rounds: *rounds, sizes: full}
	if *quick {
		b.sizes, *write = small, false
	}
	if *only != "" {
		b.only, *write = strings.Split(*only, ","), false
	}
	err := b.run()
	if err == nil && *write {
		err = replaceInFile(readme, b.text())
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, errNoMarkers) {
			fmt.Fprintf(os.Stderr, "bench: not written: %v\n", err)
			err = nil
		}
	}
	fail(err)
}

const readme = "README.md" // of the directory that it runs in

func fail(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// sizes are what is measured with.
type sizes struct {
	small, large                     int // sockets
	fewListeners, manyListeners      int
	namespaces, socketsOfAll         int
	pods, listenersOfAPod            int
	idleListeners, idleSockets       int
	idleWindows                      int
	eventRounds, eventBatch, calls   int // rounds, connections and system calls in each
	idleWindow, scrapeWindow, settle time.Duration
}

var (
	full = sizes{
		small: 100_000, large: 1_000_000, fewListeners: 1000, manyListeners: 10_000,
		namespaces: 100, socketsOfAll: 200_000, pods: 300, listenersOfAPod: 10, idleListeners: 100, idleSockets: 10_000,
		eventRounds: 100, eventBatch: 500, calls: 200_000,
		idleWindows: 6, idleWindow: 10 * time.Second, scrapeWindow: 2 * time.Second, settle: 20 * time.Second,
	}
	small = sizes{
		small: 10_000, large: 20_000, fewListeners: 100, manyListeners: 1000,
		namespaces: 10, socketsOfAll: 20_000, pods: 30, listenersOfAPod: 10, idleListeners: 10, idleSockets: 1000,
		eventRounds: 3, eventBatch: 100, calls: 20_000,
		idleWindows: 2, idleWindow: 2 * time.Second, scrapeWindow: time.Second, settle: 6 * time.Second,
	}
)

// bench is one run.
type bench struct {
	sizes
	ctx    context.Context
	rounds int
	only   []string // names of steps, none for all
	dir    string   // for what is compiled
	agent  string
	walk   *census.Walk
	rows   []row
	notes  []string
}

// steps are what is measured, in the order of the table.
var steps = []struct {
	name string
	run  func(*bench) error
}{
	{"idle", (*bench).idle},
	{"scrape", (*bench).scrape},
	{"events", (*bench).events},
	{"namespaces", (*bench).manyNamespaces},
	{"pods", (*bench).manyPods},
	{"masses", (*bench).masses},
}

func stepNames() (names []string) {
	for _, s := range steps {
		names = append(names, s.name)
	}
	return names
}

func (b *bench) run() (err error) {
	for _, name := range b.only {
		if !slices.Contains(stepNames(), name) {
			return fmt.Errorf("no step is called %q", name)
		}
	}
	if os.Geteuid() != 0 {
		return errors.New("needs root, for network namespaces and BPF: sudo go run ./probes/bench")
	}
	if b.dir, err = os.MkdirTemp("", "sockq-bench-"); err != nil {
		return err
	}
	defer os.RemoveAll(b.dir)
	if b.agent, err = b.buildAgent(); err != nil {
		return err
	}
	if b.walk, err = census.OpenWalk("/proc"); err != nil {
		return err
	}
	defer b.walk.Close()

	fmt.Print(b.intro(), tableHead)
	for _, step := range steps {
		if b.only != nil && !slices.Contains(b.only, step.name) {
			continue
		}
		if err := step.run(b); err != nil {
			return err
		}
	}
	for _, note := range b.notes {
		fmt.Println("\n" + note)
	}
	return nil
}

// intro says what the numbers are of.
func (b *bench) intro() string {
	var name unix.Utsname
	_ = unix.Uname(&name)
	return fmt.Sprintf("CPU time, user and system, of %d rounds that took turns; Linux %s, %d CPUs (%s), %s. Times differ between machines and hours: compare the ratios, which come from the same rounds.\n\n",
		b.rounds, unix.ByteSliceToString(name.Release[:]), runtime.NumCPU(), processor(), runtime.Version())
}

func processor() string {
	info, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(info)) {
		if name, model, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(model)
		}
	}
	return runtime.GOARCH
}

// text is what goes into the README.
func (b *bench) text() string {
	var text strings.Builder
	text.WriteString(b.intro() + tableHead)
	for _, r := range b.rows {
		text.WriteString(r.String())
	}
	for _, note := range b.notes {
		text.WriteString("\n" + note + "\n")
	}
	return text.String()
}

func (b *bench) add(rows ...row) {
	for _, r := range rows {
		fmt.Print(r)
	}
	b.rows = append(b.rows, rows...)
}

func (b *bench) leaveOut(what string, why error) {
	b.notes = append(b.notes, fmt.Sprintf("Left out: %s: %v.", what, why))
	progress("left out: %s: %v", what, why)
}

func (b *bench) measure(g *group) error {
	progress("measuring: %s", g.what)
	if err := g.measure(b.ctx, b.rounds); err != nil {
		return err
	}
	b.add(g.rows()...)
	return nil
}

func progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, time.Now().Format("15:04:05 ")+format+"\n", args...)
}

// sleep fails when the bench is to end.
func (b *bench) sleep(d time.Duration) error {
	select {
	case <-b.ctx.Done():
		return b.ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// populate makes a namespace with sockets, of which listeners come on top.
func (b *bench) populate(listeners, sockets int) (*namespace, error) {
	progress("making %s listeners and %s sockets", count(listeners), count(sockets))
	n, err := newNamespace()
	if err != nil {
		return nil, err
	}
	if err := errors.Join(n.listen(b.ctx, listeners), n.connect(b.ctx, sockets/2)); err != nil {
		n.close()
		return nil, err
	}
	return n, nil
}

// vanish closes namespaces and waits until the kernel has let go of their
// sockets, so that the next measurement does not count them.
func (b *bench) vanish(gone ...*namespace) {
	for _, n := range gone {
		n.close()
	}
	for range 600 {
		sockets, err := b.walk.States(context.Background(), false)
		if err != nil {
			return
		}
		left := uint64(0)
		for i := range sockets.Namespaces {
			for _, n := range gone {
				if sockets.Namespaces[i].Inode == n.inode {
					left += sum(&sockets.Namespaces[i])
				}
			}
		}
		if left == 0 || b.ctx.Err() != nil {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// manyNamespaces compares one walk with a sweep over the namespaces.
func (b *bench) manyNamespaces() error {
	progress("making %d namespaces with %s sockets", b.namespaces, count(b.socketsOfAll))
	all, err := b.crowd(b.namespaces, func(n *namespace) error { return n.connect(b.ctx, b.socketsOfAll/b.namespaces/2) })
	defer func() { b.vanish(all...) }()
	if err != nil {
		return err
	}
	return b.sweep(fmt.Sprintf("%d namespaces, %s sockets", b.namespaces, count(b.socketsOfAll)), all, b.socketsOfAll)
}

// manyPods is a node of Kubernetes: many namespaces with some listeners each.
func (b *bench) manyPods() error {
	listeners := b.pods * b.listenersOfAPod
	progress("making %d namespaces with %s listeners", b.pods, count(listeners))
	all, err := b.crowd(b.pods, func(n *namespace) error { return n.listen(b.ctx, b.listenersOfAPod) })
	defer func() { b.vanish(all...) }()
	if err != nil {
		return err
	}
	what := fmt.Sprintf("%d namespaces, %s listeners", b.pods, count(listeners))
	if err := b.sweep(what, all, listeners); err != nil {
		return err
	}
	return b.scrapeIn(all[0], "Scrape with "+what, 0, func() error { return nil },
		"--max-listeners="+strconv.Itoa(2*listeners), "--max-namespaces="+strconv.Itoa(2*b.pods))
}

// crowd makes namespaces and fills them.
func (b *bench) crowd(namespaces int, fill func(*namespace) error) (all []*namespace, err error) {
	for range namespaces {
		n, err := newNamespace()
		if err != nil {
			return all, err
		}
		all = append(all, n)
		if err := fill(n); err != nil {
			return all, err
		}
	}
	return all, nil
}

// sweep counts the sockets of these namespaces in both ways.
func (b *bench) sweep(what string, all []*namespace, sockets int) error {
	paths := make(map[uint32]string)
	for _, n := range all {
		paths[n.inode] = n.path
	}
	first := all[0]
	var sweep *census.SockDiag
	err := first.do(func() (err error) {
		sweep, err = census.OpenSockDiag("/proc", func() (map[uint32]string, error) { return paths, nil })
		return err
	})
	if err != nil {
		return err
	}
	defer sweep.Close()
	counted := func(read func(context.Context) (*census.Sockets, error)) func() (time.Duration, error) {
		return first.timed(func() error {
			read, err := read(b.ctx)
			if err != nil {
				return err
			}
			found := uint64(0)
			for i := range read.Namespaces {
				if _, ok := paths[read.Namespaces[i].Inode]; ok {
					found += sum(&read.Namespaces[i])
				}
			}
			return atLeast(found, sockets)
		})
	}
	const sweepName = "sock_diag, one namespace after the other"
	return b.measure(&group{
		what:     what,
		baseline: sweepName,
		methods: []*method{
			{name: sweepName, run: counted(sweep.Sockets)},
			{name: "**one walk**", run: counted(b.walk.Sockets), targets: []target{{text: "≥ 30×", against: sweepName, least: 30}}},
			{name: "one walk, states only", run: counted(func(ctx context.Context) (*census.Sockets, error) { return b.walk.States(ctx, false) })},
		},
	})
}

// timed is fn as a method's run: on the namespace's thread.
func (n *namespace) timed(fn func() error) func() (time.Duration, error) {
	return func() (took time.Duration, err error) {
		err = n.do(func() (err error) {
			took, err = ownTime(fn)
			return err
		})
		return took, err
	}
}

func sum(n *census.NamespaceSockets) (total uint64) {
	for _, count := range n.States {
		total += count
	}
	return total
}

// atLeast holds every method to the same answer.
func atLeast(found uint64, want int) error {
	if found < uint64(want) {
		return fmt.Errorf("found %d of %d sockets", found, want)
	}
	return nil
}

// none is for a sock_diag source that stays in its namespace.
func none() (map[uint32]string, error) { return nil, nil }

// count is a number of things as a person writes it.
func count(n int) string {
	switch {
	case n >= 1_000_000 && n%1_000_000 == 0:
		return fmt.Sprintf("%dM", n/1_000_000)
	case n >= 10_000 && n%1000 == 0:
		return fmt.Sprintf("%dk", n/1000)
	case n >= 1000:
		return fmt.Sprintf("%d,%03d", n/1000, n%1000)
	}
	return fmt.Sprint(n)
}
