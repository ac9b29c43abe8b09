package probes

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"sockq/probes/census"
	"sockq/probes/netns"
	"sockq/probes/sockdiag"
	"sockq/probes/tcpstate"
)

const (
	// An audit takes place after every third census, if its budget allows.
	auditEvery = 3
	// What an audit did not use of its budget is kept for this long.
	auditSaving = time.Minute
)

var errDied = errors.New("the path leads to another namespace now")

// auditor holds the walk's count of sockets against sock_diag's, namespace by
// namespace: two equal dumps around ours tell that nothing moved meanwhile.
// Its rounds are for one goroutine at a time.
type auditor struct {
	budget float64 // CPU time per time
	count  func(context.Context) (*census.Sockets, error)
	find   func() (map[uint32]string, error)
	bound  bool // sock_diag lists bound sockets (6.8+)
	own    uint32
	traces bool // CAP_SYS_PTRACE: every process shows its namespace

	credit  time.Duration
	last    time.Time
	audited map[uint32]time.Time // by inode of the namespace
	// Inodes of what the walk counted before and after the last find, and what that found.
	before, after map[uint32]bool
	found         map[uint32]string

	mu          sync.Mutex
	checks      uint64
	skipped     uint64
	differences map[uint32]result // by inode of the namespace
	denied      error             // why no other namespace can be entered
	unfound     int               // namespaces with sockets to which nothing leads
}

// result is of a namespace that is known by its cookie, since its inode number
// may come back; 0 where it has no socket to tell.
type result struct{ cookie, difference uint64 }

func newAuditor(budget float64, count func(context.Context) (*census.Sockets, error), find func() (map[uint32]string, error)) (*auditor, error) {
	bound, err := sockdiag.BoundInactiveSupported()
	if err != nil {
		return nil, err
	}
	own, err := netns.Self()
	if err != nil {
		return nil, err
	}
	denied := netns.MayEnter()
	if !errors.Is(denied, unix.EPERM) {
		denied = nil
	}
	return &auditor{
		denied: denied,
		budget: budget, count: count, find: find, bound: bound, own: own, traces: census.Holds(unix.CAP_SYS_PTRACE),
		credit: time.Duration(budget * float64(auditSaving)), differences: make(map[uint32]result),
		audited: make(map[uint32]time.Time),
	}, nil
}

// round audits one namespace after the other for as long as the budget lasts,
// and goes on with the others the next time.
func (a *auditor) round(ctx context.Context, now time.Time) error {
	if !a.last.IsZero() {
		a.credit += time.Duration(a.budget * float64(now.Sub(a.last)))
		a.credit = min(a.credit, time.Duration(a.budget*float64(auditSaving)))
	}
	a.last = now
	if a.credit <= 0 {
		return nil
	}
	paths, err := a.paths()
	if err != nil {
		return err
	}
	// Those that waited longest, so new ones, come first.
	inodes := slices.SortedFunc(maps.Keys(paths), func(x, y uint32) int {
		return a.audited[x].Compare(a.audited[y])
	})
	for i, inode := range inodes {
		// The first is paid for, however dear it was to find it.
		if i > 0 && a.credit <= 0 {
			return nil
		}
		a.audited[inode] = now
		if err := a.audit(ctx, inode, paths[inode]); err != nil {
			return err
		}
	}
	return nil
}

// paths are the namespaces that can be audited, the own one with no path. To
// look through all processes for them costs credit, too.
func (a *auditor) paths() (map[uint32]string, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	start := threadTime()
	defer func() { a.credit -= threadTime() - start }()
	paths := map[uint32]string{}
	if a.mayEnter() {
		var err error
		if paths, err = a.find(); err != nil {
			return nil, fmt.Errorf("find network namespaces: %w", err)
		}
	}
	paths[a.own] = ""
	a.before, a.found = a.after, paths
	a.keep(paths)
	return paths, nil
}

// audit checks one namespace and takes its cost from the credit. One that went
// meanwhile, or that cannot be entered, is no error.
func (a *auditor) audit(ctx context.Context, inode uint32, path string) error {
	inside := func() error {
		start := threadTime()
		defer func() { a.credit -= threadTime() - start }()
		if self, err := netns.Self(); err != nil || self != inode {
			return errors.Join(errDied, err)
		}
		client, err := sockdiag.Dial()
		if err != nil {
			return err
		}
		defer client.Close()
		return a.check(ctx, inode, client)
	}
	if path == "" {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		return inside()
	}
	err := netns.Do(path, inside)
	switch {
	case errors.Is(err, unix.EPERM):
		a.mu.Lock()
		a.denied = err
		a.mu.Unlock()
		return nil
	case errors.Is(err, errDied), errors.Is(err, unix.ENOENT), errors.Is(err, unix.EACCES):
		return nil
	}
	return err
}

// tally is a dump in short: equal tallies are of the same sockets in the same
// states. A socket that a dump repeats makes it unequal to the other one.
type tally struct {
	states [tcpstate.Count]uint64
	mixed  uint64
}

func dump(ctx context.Context, client *sockdiag.Client) (t tally, err error) {
	err = client.Dump(sockdiag.Query{Repeats: true}, func(s *sockdiag.Socket) error {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		state := s.State.Reported()
		if int(state) < len(t.states) {
			t.states[state]++
		}
		t.mixed += mix(s.Cookie<<4 | uint64(state))
		return nil
	})
	return t, err
}

// mix spreads a number over 64 bits (the finalizer of splitmix64), so that the
// sum over a set of numbers tells the set.
func mix(x uint64) uint64 {
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

func (a *auditor) check(ctx context.Context, inode uint32, client *sockdiag.Client) error {
	before, err := dump(ctx, client)
	if err != nil {
		return err
	}
	sockets, err := a.count(ctx)
	if err != nil {
		return err
	}
	var ours census.NamespaceSockets
	for _, n := range sockets.Namespaces {
		if n.Inode == inode {
			ours = n
		}
	}
	after, err := dump(ctx, client)
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.compare(sockets)
	if before != after {
		a.skipped++
		return nil
	}
	a.checks++
	a.differences[inode] = result{ours.Cookie, difference(ours.States, after.states, a.bound && sockets.BoundKnown)}
	return nil
}

// compare counts the namespaces that were there all the time, and not found.
func (a *auditor) compare(sockets *census.Sockets) {
	a.after, a.unfound = make(map[uint32]bool, len(sockets.Namespaces)), 0
	for _, n := range sockets.Namespaces {
		a.after[n.Inode] = true
		if _, ok := a.found[n.Inode]; !ok && a.before[n.Inode] {
			a.unfound++
		}
	}
}

// difference is the sum of the distances over all states.
func difference(a, b [tcpstate.Count]uint64, bound bool) (sum uint64) {
	for s := range a {
		if tcpstate.State(s) == tcpstate.Close && !bound {
			continue
		}
		sum += max(a[s], b[s]) - min(a[s], b[s])
	}
	return sum
}

// keep forgets the namespaces that are gone.
func (a *auditor) keep(paths map[uint32]string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for inode := range a.audited {
		if _, ok := paths[inode]; !ok {
			delete(a.audited, inode)
			delete(a.differences, inode)
		}
	}
}

func (a *auditor) mayEnter() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.denied == nil
}

// lacks says which namespaces are not audited, and why; "" if all are.
func (a *auditor) lacks() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case a.denied != nil:
		return "the own namespace only: " + a.denied.Error()
	case a.unfound == 0:
		return ""
	case a.traces:
		return fmt.Sprintf("without %d namespaces that have neither a name nor a process", a.unfound)
	}
	return fmt.Sprintf("without %d namespaces that have no name: to find them by their processes needs CAP_SYS_PTRACE", a.unfound)
}

// report adds the audit's results to a Snapshot.
func (a *auditor) report(s *Snapshot) {
	a.mu.Lock()
	defer a.mu.Unlock()
	s.Audits = append(s.Audits, Audit{Check: AuditCheckNames[AuditStates], Checks: a.checks, Skipped: a.skipped})
	for i := range s.Namespaces {
		n := &s.Namespaces[i]
		r, ok := a.differences[n.Inode]
		if ok && n.Name != Other && (r.cookie == 0 || r.cookie == n.Cookie) {
			n.Differences[AuditStates], n.Audited[AuditStates] = r.difference, true
		}
	}
}

func threadTime() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t); err != nil {
		return 0
	}
	return time.Duration(t.Nano())
}
