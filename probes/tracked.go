package probes

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"sockq/probes/tcpstate"
	"sockq/probes/tracker"
)

// tracked is the tracker with what was learnt of its namespaces.
type tracked struct {
	tracker    *tracker.Tracker
	namespaces map[tracker.NamespaceID]*trackedNamespace
	other      tracker.Namespace // what happened in all that are called Other
	nobodys    uint64            // namespaces that were gone before the census saw them
	// What was refused at listeners that were taken, for the audit; refused tells
	// that all refusals are counted.
	refused  bool
	departed map[tracker.NamespaceID]refusals
}

type trackedNamespace struct {
	other  bool              // it is called Other, as long as it exists
	summed tracker.Namespace // what of it is in the sum of Other
	seen   bool              // by the census
	missed int               // sweeps in a row for which it did not exist
}

// A namespace that is on no list may be new: it is forgotten when it is not on
// the next one either.
const missedSweeps = 2

func openTracked(opts tracker.Options) (*tracked, error) {
	t, err := tracker.Open(opts)
	if err != nil {
		return nil, err
	}
	joined := &tracked{
		tracker: t, namespaces: make(map[tracker.NamespaceID]*trackedNamespace),
		refused: t.Tells(tracker.StoryRefusals), departed: make(map[tracker.NamespaceID]refusals),
	}
	if opts.PerNamespace {
		joined.other.States = new([tcpstate.Count]tracker.Histogram)
	}
	return joined, nil
}

func (t *tracked) ofListeners() knowledge {
	return knowledge{
		connections: t.tracker.Tells(tracker.StoryConnections),
		accepts:     t.tracker.Tells(tracker.StoryAccepts),
		allAccepts:  t.tracker.TellsAllAccepts(),
		retransmits: t.tracker.Tells(tracker.StorySynackRetransmits),
		backlog:     t.tracker.Tells(tracker.StoryBacklog),
		refusals:    t.refused,
		halfOpen:    t.tracker.Tells(tracker.StoryHalfOpen),
	}
}

func (t *tracked) programs(probe string) []*ebpf.Program {
	for _, story := range t.tracker.Stories() {
		if story.Name == probe {
			return story.Programs
		}
	}
	return nil
}

// wallClock turns times of the monotonic clock into those of the wall.
func wallClock() func(time.Duration) time.Time {
	var monotonic unix.Timespec
	now := time.Now()
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &monotonic)
	return func(at time.Duration) time.Time { return now.Add(at - time.Duration(monotonic.Nano())) }
}

// listeners reads what was counted at listeners, with their namespaces as the
// census knows them.
func (t *tracked) listeners(r *registry) ([]tracker.Listener, error) {
	list, err := t.tracker.Listeners()
	if err != nil {
		return nil, err
	}
	for i := range list {
		n := &list[i].Namespace
		if id, ok := r.identify(n.Inode, n.Cookie); ok {
			n.Cookie = id.cookie
		}
	}
	return list, nil
}

// take takes what was counted at a listener that is gone.
func (t *tracked) take(key uint64) (tracker.Listener, bool, error) {
	l, ok, err := t.tracker.Take(key)
	if ok && t.refused {
		r := t.departed[l.Namespace]
		r.add(refusalsAt(&l))
		t.departed[l.Namespace] = r
	}
	return l, ok, err
}

// refusals reads what was refused in each namespace.
func (t *tracked) refusals() (map[identity]refusals, error) {
	list, err := t.tracker.Listeners()
	if err != nil {
		return nil, err
	}
	return sumRefusals(list, t.departed), nil
}

// count reads all namespaces, and adds to the sum of Other what happened in those
// that are called so.
func (t *tracked) count(r *registry) ([]tracker.Namespace, error) {
	list, err := t.tracker.Namespaces()
	if err != nil {
		return nil, err
	}
	for i := range list {
		n := &list[i]
		known := t.namespaces[n.ID]
		if known == nil {
			known = new(trackedNamespace)
			t.namespaces[n.ID] = known
		}
		name, listed := r.find(n.ID.Inode, n.ID.Cookie)
		known.seen = known.seen || listed
		known.other = known.other || len(n.Members) > 0 || listed && name == Other
		if known.other {
			addSince(&t.other, n, &known.summed)
			known.summed = *n
		}
	}
	return list, nil
}

// add puts what was counted into a Snapshot.
func (t *tracked) add(s *Snapshot, r *registry) error {
	list, err := t.count(r)
	if err != nil {
		return err
	}
	lost, err := t.tracker.Lost()
	if err != nil {
		return err
	}
	maps.Copy(s.Lost, lost)
	s.Lost["namespaces_gone"] = t.nobodys
	if s.StateSeconds, err = t.tracker.StateSeconds(); err != nil {
		return err
	}
	counted := make(map[identity]*tracker.Namespace, len(list))
	for i := range list {
		for _, id := range identities(&list[i]) {
			if id, ok := r.identify(id.Inode, id.Cookie); ok {
				counted[id] = &list[i]
			}
		}
	}
	nothing := tracker.Namespace{}
	if t.tracker.StatesPerNamespace() {
		nothing.States = new([tcpstate.Count]tracker.Histogram)
	}
	for i := range s.Namespaces {
		n := &s.Namespaces[i]
		switch c := counted[identity{n.Inode, n.Cookie}]; {
		case n.Name == Other:
			t.show(n, &t.other)
		case c == nil:
			t.show(n, &nothing)
		case c.Members == nil: // else it is in the sum of Other
			t.show(n, c)
		}
	}
	if t.otherCounted() && !slices.ContainsFunc(s.Namespaces, func(n Namespace) bool { return n.Name == Other }) {
		n := Namespace{Name: Other}
		t.show(&n, &t.other)
		s.Namespaces = append(s.Namespaces, n)
	}
	return nil
}

// otherCounted tells whether anything was ever counted under Other.
func (t *tracked) otherCounted() bool {
	for _, n := range t.namespaces {
		if n.other {
			return true
		}
	}
	return t.other.Transitions != [tcpstate.MaxEdges]uint64{}
}

// show copies what was counted into a namespace of a Snapshot.
func (t *tracked) show(n *Namespace, c *tracker.Namespace) {
	n.TransitionsKnown = t.tracker.Tells(tracker.StoryTransitions)
	n.Transitions, n.Unexpected = c.Transitions, maps.Clone(c.Unexpected)
	n.ConnectsKnown = t.tracker.Tells(tracker.StoryConnects)
	n.Connects, n.ConnectFailures = c.Connects, c.ConnectFailures
	n.ResetsSentKnown = t.tracker.Tells(tracker.StoryResetsSent)
	n.ResetsReceivedKnown = t.tracker.Tells(tracker.StoryResetsReceived)
	n.ResetsSent, n.ResetsReceived = maps.Clone(c.ResetsSent), c.ResetsReceived
	if t.tracker.Tells(tracker.StoryStateSeconds) {
		n.StateSeconds = c.States
	}
}

// sweep forgets the namespaces that are gone.
func (t *tracked) sweep(r *registry) error {
	for id := range t.departed {
		if _, exists := r.identify(id.Inode, id.Cookie); !exists {
			delete(t.departed, id)
		}
	}
	list, err := t.count(r)
	if err != nil {
		return err
	}
	var gone []tracker.NamespaceID
	for i := range list {
		for _, id := range identities(&list[i]) {
			known := t.namespaces[id]
			if known == nil { // it found no place
				known = new(trackedNamespace)
				t.namespaces[id] = known
			}
			if _, exists := r.identify(id.Inode, id.Cookie); exists {
				known.missed = 0
			} else if known.missed++; known.missed >= missedSweeps {
				gone = append(gone, id)
				if !known.seen && list[i].Members == nil {
					t.nobodys++
				}
				delete(t.namespaces, id)
			}
		}
	}
	return t.tracker.Forget(gone...)
}

// identities are the namespaces whose counts these are.
func identities(n *tracker.Namespace) []tracker.NamespaceID {
	if n.Members != nil {
		return n.Members
	}
	return []tracker.NamespaceID{n.ID}
}

// addSince adds to sum what now has beyond before.
func addSince(sum, now, before *tracker.Namespace) {
	for i := range sum.Transitions {
		sum.Transitions[i] += now.Transitions[i] - before.Transitions[i]
	}
	addSinceByKey(&sum.Unexpected, now.Unexpected, before.Unexpected)
	sum.Connects.AddSince(&now.Connects, &before.Connects)
	for i := range sum.ConnectFailures {
		sum.ConnectFailures[i] += now.ConnectFailures[i] - before.ConnectFailures[i]
	}
	addSinceByKey(&sum.ResetsSent, now.ResetsSent, before.ResetsSent)
	sum.ResetsReceived += now.ResetsReceived - before.ResetsReceived
	if now.States == nil {
		return
	}
	// A Snapshot that was handed out keeps the old one.
	states := *sum.States
	earlier := cmp.Or(before.States, new([tcpstate.Count]tracker.Histogram))
	for i := range states {
		states[i].AddSince(&now.States[i], &earlier[i])
	}
	sum.States = &states
}

func addSinceByKey[K comparable](sum *map[K]uint64, now, before map[K]uint64) {
	for key, n := range now {
		if *sum == nil {
			*sum = make(map[K]uint64)
		}
		(*sum)[key] += n - before[key]
	}
}
