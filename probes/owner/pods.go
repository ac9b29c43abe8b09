package owner

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"
)

const (
	readTime    = 2 * time.Second // for one read of all pods
	readEvery   = 5 * time.Second // at most
	longestWait = 5 * time.Minute // after failures, and for a container that nobody knows
)

// pod is one of Kubernetes.
type pod struct {
	uid, name, namespace string
	hostNetwork          bool
}

// container is one of a pod. The pod's sandbox is one without a name.
type container struct {
	name    string
	runtime string
	pod     pod
}

// errNoSource: there is nobody to ask.
var errNoSource = errors.New("no container runtime that speaks CRI was found at the usual sockets")

var errLate = fmt.Errorf("no whole answer within %v", readTime)

// podSource lists the containers of the node.
type podSource interface {
	name() string
	// read lists them into t. It fails with errNoSource where nobody can be asked.
	read(ctx context.Context, t *podTable) error
	// try counts the files that read needs and that the calling thread may open, and
	// says why it may not open one.
	try() (n int, denied error)
}

// podTable are the containers of one read, by their ids, and their pods by UID.
type podTable struct {
	containers map[string]container
	pods       map[string]pod
	most       int
	over       uint64 // that found no place
}

func newPodTable(most int) *podTable {
	return &podTable{containers: make(map[string]container), pods: make(map[string]pod), most: most}
}

// add takes over a container, and its pod. Ids that are none are left out.
func (t *podTable) add(id string, c container) {
	if !isID(id) {
		return
	}
	if _, ok := t.containers[id]; !ok && len(t.containers) >= t.most {
		t.over++
		return
	}
	t.containers[id] = c
	t.addPod(c.pod)
}

// addPod takes over a pod, whose containers may not be known yet.
func (t *podTable) addPod(p pod) {
	if _, ok := t.pods[p.uid]; isUID(p.uid) && (ok || len(t.pods) < t.most) {
		t.pods[p.uid] = p
	}
}

// find looks for the outermost of these containers that is known and has a pod, since
// who is in it may call further ones anything; else only for the pod.
func (t *podTable) find(ids []string, podUID string) (c container, found bool) {
	for _, id := range ids {
		if known, ok := t.containers[id]; ok {
			c, found = known, true
			if c.pod != (pod{}) {
				return c, true
			}
		}
	}
	if !found {
		c.pod = t.pods[podUID]
	}
	return c, found
}

// pods knows the containers of the node. It reads them again only for one that it
// does not know.
type pods struct {
	ctx    context.Context // of the Finder
	source podSource       // nil for none
	table  *podTable
	failed atomic.Pointer[error] // with what the last read ended, nil before the first
	wait   time.Duration         // until the next read, after a failure
	next   time.Time             // when there may be one
	missed map[string]*absentee  // that were asked for, and not in the last read
	most   int
	log    *slog.Logger
	lost   *lost
	now    func() time.Time
}

// absentee is a container that the source does not know: docker's own, or one so
// new that the kubelet does not list it yet.
type absentee struct {
	wait time.Duration
	next time.Time // when to ask again
}

func newPods(ctx context.Context, source podSource, most int, log *slog.Logger, lost *lost) *pods {
	return &pods{
		ctx: ctx, source: source, table: newPodTable(most), missed: make(map[string]*absentee),
		most: most, log: log, lost: lost, now: time.Now,
	}
}

// find tells about the outermost of these containers, which may be none, that is known
// and has a pod. It asks the source if none is known, as often as that may be done.
func (p *pods) find(ids []string, podUID string) container {
	c, found := p.table.find(ids, podUID)
	if found || len(ids) == 0 || p.source == nil || p.ctx.Err() != nil {
		return c
	}
	m := p.miss(ids[len(ids)-1])
	if now := p.now(); now.Before(p.next) || now.Before(m.next) {
		return c
	}
	p.refresh()
	c, _ = p.table.find(ids, podUID)
	return c
}

// err is why the last read failed, and before the first why that would. It does not
// wait for one.
func (p *pods) err() error {
	if err := p.failed.Load(); err != nil {
		return *err
	}
	if p.source == nil {
		return nil
	}
	if n, denied := p.source.try(); n == 0 {
		return denied
	}
	return nil
}

// miss remembers that the container was asked for.
func (p *pods) miss(id string) *absentee {
	m := p.missed[id]
	if m == nil {
		if len(p.missed) >= p.most {
			clear(p.missed)
		}
		m = &absentee{wait: readEvery / 2}
		p.missed[id] = m
	}
	return m
}

func (p *pods) refresh() {
	ctx, cancel := context.WithTimeout(p.ctx, readTime)
	defer cancel()
	table := newPodTable(p.most)
	err := p.source.read(ctx, table)
	if p.ctx.Err() != nil {
		return // closed
	}
	if err != nil && ctx.Err() != nil {
		err = errLate // whatever that made of it
	}
	before := p.failed.Load()
	failedBefore := before != nil && *before != nil && !errors.Is(*before, errNoSource)
	p.failed.Store(&err)
	if errors.Is(err, errNoSource) {
		p.next = p.now().Add(readEvery)
		return
	}
	if err != nil {
		p.wait = min(max(2*p.wait, readEvery), longestWait)
		p.next = p.now().Add(p.wait)
		p.lost.podReads.Add(1)
		if !failedBefore {
			p.log.Warn("Pods have no names: their list cannot be read", "source", p.source.name(), "reason", err)
		}
		return
	}
	if failedBefore {
		p.log.Info("The list of pods can be read again", "source", p.source.name())
	}
	p.table, p.wait, p.next = table, 0, p.now().Add(readEvery)
	p.lost.containers.Add(table.over)
	for id, m := range p.missed {
		if _, ok := table.containers[id]; ok {
			delete(p.missed, id)
			continue
		}
		m.wait = min(2*m.wait, longestWait)
		m.next = p.now().Add(m.wait)
	}
}
