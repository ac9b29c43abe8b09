package probes

import (
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"sockq/probes/census"
	"sockq/probes/tracker"
)

// refusals are what happened at the listeners of a namespace, or the kernel's own
// counts of it, by the check that compares the two; AuditStates is none of these.
type refusals [AuditChecks]uint64

// refusalEvents are the kernel's counters. ListenDrops counts each refused SYN,
// final ACK and ICMP error once (tcp_listendrop); ListenOverflows those of them for
// which the accept queue was full (tcp_conn_request, tcp_v4_syn_recv_sock,
// tcp_v6_syn_recv_sock).
var refusalEvents = [AuditChecks]string{
	AuditListenDrops: "ListenDrops", AuditListenOverflows: "ListenOverflows", AuditSynCookies: "SyncookiesSent",
}

// refusalsAt are those at one listener.
func refusalsAt(l *tracker.Listener) (r refusals) {
	for _, n := range l.Drops {
		r[AuditListenDrops] += n
	}
	for _, reason := range []tracker.DropReason{
		tracker.DropAcceptQueueFullSYN, tracker.DropAcceptQueueFullACK, tracker.DropAcceptQueueFullReset,
	} {
		r[AuditListenOverflows] += l.Drops[reason]
	}
	r[AuditSynCookies] = l.CookiesSent
	return r
}

func (r *refusals) add(more refusals) {
	for check, n := range more {
		r[check] += n
	}
}

// sumRefusals sums up, by namespace, what happened at listeners that are there and
// at those that departed. A census without cookies finds the namespaces by their
// inodes alone.
func sumRefusals(listeners []tracker.Listener, departed map[tracker.NamespaceID]refusals) map[identity]refusals {
	sums := make(map[identity]refusals)
	add := func(n tracker.NamespaceID, r refusals) {
		ids := []identity{{n.Inode, n.Cookie}, {n.Inode, 0}}
		if n.Cookie == 0 {
			ids = ids[1:]
		}
		for _, id := range ids {
			sum := sums[id]
			sum.add(r)
			sums[id] = sum
		}
	}
	for i := range listeners {
		add(listeners[i].Namespace, refusalsAt(&listeners[i]))
	}
	for n, r := range departed {
		add(n, r)
	}
	return sums
}

// kernelRefusals is a read of the kernel's counters of all namespaces.
type kernelRefusals struct {
	counts map[identity]refusals
	read   map[identity]time.Time
	known  [AuditChecks]bool // what this kernel counts
	// whole tells that no namespace was left out, now or before.
	whole bool
}

func newKernelRefusals(list []census.Namespace, whole bool) kernelRefusals {
	read := kernelRefusals{counts: make(map[identity]refusals, len(list)), read: make(map[identity]time.Time, len(list)), whole: whole}
	for i := range list {
		read.read[identity{list[i].Inode, list[i].Cookie}] = list[i].Read
	}
	for check, name := range refusalEvents {
		event := slices.Index(census.EventNames[:], name)
		if event < 0 {
			continue
		}
		for i := range list {
			n := &list[i]
			id := identity{n.Inode, n.Cookie}
			r := read.counts[id]
			r[check] = n.Events[event]
			read.counts[id] = r
			read.known[check] = n.EventsKnown[event]
		}
	}
	return read
}

// refusalAuditor holds what the tracker counts at listeners against the kernel's
// counters, namespace by namespace: the kernel's, ours, the kernel's again. Its
// rounds are for one goroutine at a time.
type refusalAuditor struct {
	kernel func() (kernelRefusals, error)
	ours   func() (map[identity]refusals, error)
	// settle waits for the end of all that the kernel is doing with segments: one of
	// the two counted before it is then counted by the other, too.
	settle func() error

	mu         sync.Mutex
	begun      bool // there was a first round
	namespaces map[identity]*balance
	checks     [AuditChecks]uint64
	skipped    [AuditChecks]uint64
}

// balance is that of one namespace.
type balance struct {
	offsets     [AuditChecks]offset
	last        refusals // by the kernel's count
	differences [AuditChecks]uint64
	audited     [AuditChecks]bool
	// A look at ours that waits for the kernel's count after it: where that comes
	// from memory, the next round has it.
	open         bool
	before, ours refusals
	at           time.Time
}

// offset is the kernel's count without ours. It never changes: it is what the
// kernel had counted when the tracker began. Each round narrows down where it is.
type offset struct {
	low, high int64
	known     bool
}

// hold compares another look with what is known of the offset: the distance
// between the two, false where this is the first look.
func (o *offset) hold(before, ours, after uint64) (difference uint64, compared bool) {
	low, high := int64(before-ours), int64(after-ours)
	switch {
	case !o.known:
		*o = offset{low, high, true}
		return 0, false
	case low > o.high:
		return uint64(low - o.high), true
	case high < o.low:
		return uint64(o.low - high), true
	}
	o.low, o.high = max(o.low, low), min(o.high, high)
	return 0, true
}

func newRefusalAuditor(kernel func() (kernelRefusals, error), ours func() (map[identity]refusals, error)) *refusalAuditor {
	return &refusalAuditor{kernel: kernel, ours: ours, settle: settle, namespaces: make(map[identity]*balance)}
}

func (a *refusalAuditor) round() error {
	before, err := a.kernel()
	if err != nil {
		return err
	}
	if err := a.settle(); err != nil {
		return err
	}
	ours, err := a.ours()
	if err != nil {
		return err
	}
	if err := a.settle(); err != nil {
		return err
	}
	at := time.Now()
	after, err := a.kernel()
	if err != nil {
		return err
	}
	a.compare(before, ours, at, after)
	return nil
}

// compare holds a look at ours, at that time, against the kernel's counts.
func (a *refusalAuditor) compare(before kernelRefusals, ours map[identity]refusals, at time.Time, after kernelRefusals) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for id := range before.counts {
		if _, ok := after.counts[id]; !ok {
			a.skip(&after)
		}
	}
	for id, last := range after.counts {
		first, ok := before.counts[id]
		if !ok {
			a.skip(&after)
			continue
		}
		b := a.namespaces[id]
		if b == nil {
			b = new(balance)
			a.namespaces[id] = b
			if a.begun && before.whole { // it is younger than the tracker: both began at 0
				for check := range b.offsets {
					b.offsets[check].known = true
				}
			}
		}
		b.renew(first)
		if b.open && !before.read[id].Before(b.at) {
			a.balance(b, &after.known, b.before, b.ours, first)
		}
		if b.open = after.read[id].Before(at); b.open {
			b.before, b.ours, b.at = first, ours[id], at
		} else {
			a.balance(b, &after.known, first, ours[id], last)
		}
	}
	for id := range a.namespaces {
		if _, ok := after.counts[id]; !ok {
			delete(a.namespaces, id)
		}
	}
	a.begun = true
}

// skip counts a namespace that came or went during the round.
func (a *refusalAuditor) skip(read *kernelRefusals) {
	for check, known := range read.known {
		if known {
			a.skipped[check]++
		}
	}
}

// renew forgets what was found where another namespace got the inode number.
func (b *balance) renew(before refusals) {
	for check := range before {
		if before[check] < b.last[check] {
			b.offsets[check], b.audited[check], b.open = offset{}, false, false
		}
	}
}

func (a *refusalAuditor) balance(b *balance, known *[AuditChecks]bool, before, ours, after refusals) {
	for check, known := range known {
		if !known {
			continue
		}
		b.last[check] = after[check]
		difference, compared := b.offsets[check].hold(before[check], ours[check], after[check])
		if compared {
			a.checks[check]++
			b.differences[check], b.audited[check] = difference, true
		}
	}
}

// report adds the audit's results to a Snapshot. The differences of namespaces
// that are called Other are summed.
func (a *refusalAuditor) report(s *Snapshot, name func(inode uint32, cookie uint64) string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for check, event := range refusalEvents {
		if event != "" {
			s.Audits = append(s.Audits, Audit{Check: AuditCheckNames[check], Checks: a.checks[check], Skipped: a.skipped[check]})
		}
	}
	shown := make(map[identity]*Namespace, len(s.Namespaces))
	var other *Namespace
	for i := range s.Namespaces {
		if n := &s.Namespaces[i]; n.Name == Other {
			other = n
		} else {
			shown[identity{n.Inode, n.Cookie}] = n
		}
	}
	for id, b := range a.namespaces {
		n := shown[id]
		if n == nil && name(id.inode, id.cookie) == Other {
			n = other
		}
		if n == nil {
			continue
		}
		for check, audited := range b.audited {
			if audited {
				n.Differences[check] += b.differences[check]
				n.Audited[check] = true
			}
		}
	}
}

// settle waits for an RCU grace period (membarrier of Linux 4.3 and newer): the
// kernel handles a segment, its counters and the programs attached to it, under
// one rcu_read_lock.
func settle() error {
	const membarrierGlobal = 1
	if _, _, errno := unix.Syscall(unix.SYS_MEMBARRIER, membarrierGlobal, 0, 0); errno != 0 {
		return fmt.Errorf("wait until counters are settled (membarrier, which a kernel with nohz_full does not have): %w", errno)
	}
	return nil
}
