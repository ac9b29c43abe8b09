package probes

import (
	"cmp"
	"maps"
	"slices"
	"strings"
	"time"

	"sockq/probes/census"
)

// keepProcess is how long a process' labels stay its own when there is nothing to
// tell of it.
const keepProcess = 5 * time.Minute

// processes bounds the names of processes that have series of their own.
type processes struct {
	max     int
	own     map[processLabels]time.Time // and when there was last something to tell
	over    int                         // in the last Snapshot
	overCap uint64                      // names that were put under Other
}

type processLabels struct{ namespace, process string }

// name is what a process is called: Other where there are too many.
func (p *processes) name(l processLabels, now time.Time) string {
	if _, ok := p.own[l]; !ok && len(p.own) >= p.max {
		return Other
	}
	p.own[l] = now
	return l.process
}

// join sums the connections of processes by name, and adds for each
// namespace, under the name "", what none of them has open.
func (p *processes) join(list []census.Process, namespaces []Namespace, name func(inode uint32, cookie uint64) string, now time.Time) []Process {
	rows := make(map[processLabels]*Process)
	row := func(l processLabels) *Process {
		if rows[l] == nil {
			rows[l] = &Process{Namespace: l.namespace, Process: l.process}
		}
		return rows[l]
	}
	maps.DeleteFunc(p.own, func(_ processLabels, last time.Time) bool { return now.Sub(last) >= keepProcess })
	over := make(map[processLabels]struct{})
	for i := range list {
		c := &list[i]
		// A process may call itself anything, also nothing.
		label := processLabels{name(c.Inode, c.NetnsCookie), cmp.Or(strings.ToValidUTF8(c.Comm, "\uFFFD"), "\uFFFD")}
		shown := processLabels{label.namespace, p.name(label, now)}
		if shown != label {
			over[label] = struct{}{}
		}
		row(shown).add(c)
	}
	p.overCap += uint64(max(0, len(over)-p.over))
	p.over = len(over)
	named := slices.Collect(maps.Values(rows))
	pods := make(map[string]*Namespace)
	for i := range namespaces {
		n := &namespaces[i]
		if n.SocketsKnown {
			rest := row(processLabels{namespace: n.Name})
			rest.Queues, rest.QueuesKnown = n.Queues, true
		}
		pods[n.Name] = n
	}
	for _, r := range named {
		if rest := rows[processLabels{namespace: r.Namespace}]; rest != nil {
			rest.less(r)
		}
	}
	joined := make([]Process, 0, len(rows))
	for _, r := range rows {
		if n := pods[r.Namespace]; n != nil {
			r.PodNamespace, r.Pod = n.PodNamespace, n.Pod
		}
		for d, q := range r.Queues {
			known := r.QueuesKnown && r.Namespace != Other
			r.ReceiveMaxKnown[d] = known && (r.Process != "" || q.ReceiveMaxBytes > 0 || q.ReceiveBytes == 0)
			r.SendMaxKnown[d] = known && (r.Process != "" || q.SendMaxBytes > 0 || q.SendBytes == 0)
		}
		joined = append(joined, *r)
	}
	slices.SortFunc(joined, func(a, b Process) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Process, b.Process))
	})
	return joined
}

func (p *Process) add(c *census.Process) {
	p.Processes++
	p.CloseWait += c.CloseWait
	p.FinWait2 += c.FinWait2
	p.OldestCloseWait = max(p.OldestCloseWait, c.OldestCloseWait)
	p.OldestFinWait2 = max(p.OldestFinWait2, c.OldestFinWait2)
	if !c.QueuesKnown {
		return
	}
	p.QueuesKnown = true
	for d := range p.Queues {
		q, more := &p.Queues[d], &c.Queues[d]
		q.ReceiveBytes += more.ReceiveBytes
		q.SendBytes += more.SendBytes
		q.ReceiveMaxBytes = max(q.ReceiveMaxBytes, more.ReceiveMaxBytes)
		q.SendMaxBytes = max(q.SendMaxBytes, more.SendMaxBytes)
	}
}

// less takes away what a process has open. The two were not counted at the same
// instant. The fullest connection is one of the rest only if no process has it.
func (p *Process) less(named *Process) {
	for d := range p.Queues {
		q, n := &p.Queues[d], &named.Queues[d]
		q.ReceiveBytes -= min(q.ReceiveBytes, n.ReceiveBytes)
		q.SendBytes -= min(q.SendBytes, n.SendBytes)
		if n.ReceiveMaxBytes >= q.ReceiveMaxBytes {
			q.ReceiveMaxBytes = 0
		}
		if n.SendMaxBytes >= q.SendMaxBytes {
			q.SendMaxBytes = 0
		}
	}
}
