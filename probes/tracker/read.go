package tracker

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"sockq/probes/tcpstate"
)

// read is the memory of the reads.
type read struct {
	keys       []uint64
	counts     []arrivalsListenerCounts
	listeners  []Listener
	events     []statesEvent
	eventsN    []uint64
	ids        []uint64
	slots      []statesSlot
	namespaces []Namespace
	perCPU     []statesNamespaceCounts
	seconds    []statesStateHistograms
	left       Namespace // events of members of Other that were forgotten
}

// The kinds of events (enum event_kind).
const (
	eventUnexpected = iota
	eventConnectFailed
	eventResetSent
	eventResetReceived
)

// sumUnit is that of a histogram's sum in the kernel, 2^10 ns in seconds.
const sumUnit = 1024e-9

// inodeBit marks the id of a namespace that is an inode number (namespace_id).
const inodeBit = 1 << 47

// labelsBit marks a key that is made of a listener's labels (key_of_labels).
const labelsBit = 1 << 63

// otherNamespaces is the slot of those that found no place (OTHER_NAMESPACES).
const otherNamespaces = 0

// unspecified is a RST's reason where the kernel gives none.
const unspecified = "unspecified"

// batch reads a whole hash map, at most as many entries as it may have.
func batch[K, V any](m *ebpf.Map, keys []K, values []V) ([]K, []V, error) {
	const chunk = 1024
	if cap(keys) == 0 {
		keys, values = make([]K, 0, chunk), make([]V, 0, chunk)
	}
	keys, values = keys[:0], values[:0]
	var cursor ebpf.MapBatchCursor
	for size := chunk; ; {
		have := len(keys)
		keys, values = extend(keys, size), extend(values, size)
		n, err := m.BatchLookup(&cursor, keys[have:], values[have:], nil)
		keys, values = keys[:have+n], values[:have+n]
		switch {
		case errors.Is(err, ebpf.ErrKeyNotExist):
			return keys, values, nil
		case errors.Is(err, unix.ENOSPC): // a hash chain longer than the chunk
			size *= 2
		case err != nil:
			return nil, nil, err
		}
	}
}

// extend makes room for n more.
func extend[T any](s []T, n int) []T {
	if cap(s)-len(s) < n {
		s = append(make([]T, 0, 2*cap(s)+n), s...)
	}
	return s[:len(s)+n]
}

func monotonic() (time.Duration, error) {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return 0, fmt.Errorf("read monotonic clock: %w", err)
	}
	return time.Duration(now.Nano()), nil
}

// Listeners reads what happened at all listening sockets, also those that are
// gone and were not taken yet. The result is valid until the next call.
func (t *Tracker) Listeners() (_ []Listener, err error) {
	now, err := monotonic()
	if err != nil {
		return nil, err
	}
	t.keys, t.counts, err = batch(t.maps["listeners"], t.keys, t.counts)
	if err != nil {
		return nil, fmt.Errorf("read listeners: %w", err)
	}
	t.listeners = t.listeners[:0]
	for i := range t.keys {
		t.listeners = append(t.listeners, t.counts[i].listener(t.keys[i], t.cookiesMissing, now))
	}
	return t.listeners, nil
}

// Take removes what happened at a listening socket and returns it; false if there
// is no such entry. What happens there afterwards makes a new one, from 0.
func (t *Tracker) Take(key uint64) (Listener, bool, error) {
	now, err := monotonic()
	if err != nil {
		return Listener{}, false, err
	}
	var counts arrivalsListenerCounts
	m := t.maps["listeners"]
	err = m.LookupAndDelete(key, &counts)
	if errors.Is(err, ebpf.ErrNotSupported) { // before 5.14
		if err = m.Lookup(key, &counts); err == nil {
			err = m.Delete(key)
		}
	}
	switch {
	case errors.Is(err, ebpf.ErrKeyNotExist):
		return Listener{}, false, nil
	case err != nil:
		return Listener{}, false, fmt.Errorf("take listener: %w", err)
	}
	return counts.listener(key, t.cookiesMissing, now), true, nil
}

func (c *arrivalsListenerCounts) listener(key uint64, cookiesMissing bool, now time.Duration) Listener {
	l := Listener{
		Key:       key,
		ByLabels:  cookiesMissing && key&labelsBit != 0,
		Namespace: NamespaceID{Cookie: c.Namespace, Inode: c.Labels.Inum},
		Interface: uint32(c.Labels.Ifindex),

		Connections: c.Connections, Accepts: c.Accepts, SynackRetransmits: c.SynackRetransmits,
		Syns: c.Syns, CookiesSent: c.CookiesSent, CookiesValidated: c.CookiesValidated,
		HalfOpenEnded: c.HalfOpenEnded, Abandoned: c.Abandoned,
		Drops: c.Drops, LastAccept: time.Duration(c.LastAccept),
		LastListen: time.Duration(c.LastListen), Backlog: c.Backlog,
	}
	raw := *(*[16]byte)(unsafe.Pointer(&c.Labels.Address))
	if c.Labels.Family == unix.AF_INET6 {
		l.Address = netip.AddrPortFrom(netip.AddrFrom16(raw), c.Labels.Port)
	} else {
		l.Address = netip.AddrPortFrom(netip.AddrFrom4([4]byte(raw[:4])), c.Labels.Port)
	}
	minute := uint64(now / time.Minute)
	for i := range c.Peak {
		if c.Peak[i]>>32+1 >= minute {
			l.Peak = max(l.Peak, uint64(uint32(c.Peak[i])))
			l.PeakRatio = max(l.PeakRatio, ratio(uint32(c.PeakRatio[i])))
		}
	}
	copyHistogram(&l.AcceptWait, &c.AcceptWait.Buckets, c.AcceptWait.Sum)
	copyHistogram(&l.Handshake, &c.Handshake.Buckets, c.Handshake.Sum)
	return l
}

// ratio is in units of 2^-31, of which nine digits are right.
func ratio(units uint32) float64 { return math.Round(float64(units)/(1<<31)*1e9) / 1e9 }

func copyHistogram(h *Histogram, buckets *[Buckets]uint64, sum uint64) {
	for i, n := range buckets {
		h.Buckets[i] += n
	}
	h.Sum += float64(sum) * sumUnit
}

// Namespaces reads what happened in all namespaces. The result is valid until
// the next call.
func (t *Tracker) Namespaces() (_ []Namespace, err error) {
	t.ids, t.slots, err = batch(t.maps["slots"], t.ids, t.slots)
	if err != nil {
		return nil, fmt.Errorf("read namespaces: %w", err)
	}
	clear(t.namespaces)
	t.namespaces = t.namespaces[:0]
	places := make(map[uint64]int, len(t.ids)+1)
	add := func(n Namespace, slot uint32) error {
		if err := t.addCounts(&n, slot); err != nil {
			return err
		}
		t.namespaces = append(t.namespaces, n)
		return nil
	}
	// Other first. It has members from the first on that found no place.
	if err := add(Namespace{Members: []NamespaceID{}}, otherNamespaces); err != nil {
		return nil, err
	}
	for i, id := range t.ids {
		slot := t.slots[i]
		if slot.Number == otherNamespaces {
			other := &t.namespaces[0]
			other.Members = append(other.Members, namespaceID(id, slot.Inum))
			continue // in the place 0
		}
		places[id] = len(t.namespaces)
		if err := add(Namespace{ID: namespaceID(id, slot.Inum)}, slot.Number); err != nil {
			return nil, err
		}
	}
	if err := t.readEvents(); err != nil {
		return nil, err
	}
	for i, e := range t.events {
		t.addEvent(&t.namespaces[places[e.Namespace]], e, t.eventsN[i])
	}
	t.namespaces[0].addEvents(&t.left)
	return t.namespaces, nil
}

func (t *Tracker) readEvents() (err error) {
	t.events, t.eventsN, err = batch(t.maps["events"], t.events, t.eventsN)
	if err != nil {
		return fmt.Errorf("read events: %w", err)
	}
	return nil
}

// addEvents adds the rare events of o.
func (n *Namespace) addEvents(o *Namespace) {
	for edge, count := range o.Unexpected {
		if n.Unexpected == nil {
			n.Unexpected = make(map[tcpstate.Edge]uint64)
		}
		n.Unexpected[edge] += count
	}
	for i, count := range o.ConnectFailures {
		n.ConnectFailures[i] += count
	}
	for reason, count := range o.ResetsSent {
		if n.ResetsSent == nil {
			n.ResetsSent = make(map[string]uint64)
		}
		n.ResetsSent[reason] += count
	}
	n.ResetsReceived += o.ResetsReceived
}

func namespaceID(id uint64, inode uint32) NamespaceID {
	if id&inodeBit != 0 {
		id = 0
	}
	return NamespaceID{Cookie: id, Inode: inode}
}

func (id NamespaceID) key() uint64 {
	if id.Cookie == 0 {
		return inodeBit | uint64(id.Inode)
	}
	return id.Cookie
}

func (t *Tracker) addCounts(n *Namespace, slot uint32) error {
	if err := t.maps["namespaces"].Lookup(slot, &t.perCPU); err != nil {
		return fmt.Errorf("read counts of namespace: %w", err)
	}
	for i := range t.perCPU {
		c := &t.perCPU[i]
		for e, v := range c.Edges {
			n.Transitions[e] += v
		}
		copyHistogram(&n.Connects, &c.Connects.Buckets, c.Connects.Sum)
	}
	if !t.opts.PerNamespace {
		return nil
	}
	n.States = new([tcpstate.Count]Histogram)
	return t.addSeconds(n.States, slot)
}

func (t *Tracker) addSeconds(states *[tcpstate.Count]Histogram, slot uint32) error {
	if err := t.maps["state_seconds"].Lookup(slot, &t.seconds); err != nil {
		return fmt.Errorf("read times in states: %w", err)
	}
	for i := range t.seconds {
		for s := range states {
			h := &t.seconds[i].States[s]
			copyHistogram(&states[s], &h.Buckets, h.Sum)
		}
	}
	return nil
}

func (t *Tracker) addEvent(n *Namespace, e statesEvent, count uint64) {
	switch e.Kind {
	case eventUnexpected:
		if n.Unexpected == nil {
			n.Unexpected = make(map[tcpstate.Edge]uint64)
		}
		n.Unexpected[tcpstate.Edge{From: tcpstate.State(e.Detail >> 8), To: tcpstate.State(e.Detail)}] += count
	case eventConnectFailed:
		if e.Detail < uint32(ConnectErrors) {
			n.ConnectFailures[e.Detail] += count
		}
	case eventResetSent:
		if n.ResetsSent == nil {
			n.ResetsSent = make(map[string]uint64)
		}
		n.ResetsSent[t.resetReason(e.Detail)] += count
	case eventResetReceived:
		n.ResetsReceived += count
	}
}

func (t *Tracker) resetReason(number uint32) string {
	if int(number) < len(t.reasons) && t.reasons[number] != "" {
		return t.reasons[number]
	}
	return unspecified
}

// StatesPerNamespace tells whether each Namespace has times of its own.
func (t *Tracker) StatesPerNamespace() bool { return t.opts.PerNamespace }

// StateSeconds reads the times spent in each state on the whole node; nil if they
// are not measured, or by namespace.
func (t *Tracker) StateSeconds() (*[tcpstate.Count]Histogram, error) {
	if t.opts.PerNamespace || !t.Tells(StoryStateSeconds) {
		return nil, nil
	}
	states := new([tcpstate.Count]Histogram)
	if err := t.addSeconds(states, 0); err != nil {
		return nil, err
	}
	return states, nil
}

// Forget removes what happened in namespaces that are gone. What Other counted of
// its members stays in its sum.
func (t *Tracker) Forget(ids ...NamespaceID) error {
	if len(ids) == 0 {
		return nil
	}
	if err := t.readEvents(); err != nil {
		return err
	}
	forgotten := make(map[uint64]statesSlot, len(ids))
	for _, id := range ids {
		var slot statesSlot
		err := t.maps["slots"].Lookup(id.key(), &slot)
		if err == nil {
			err = t.maps["slots"].Delete(id.key())
		}
		switch {
		case errors.Is(err, ebpf.ErrKeyNotExist):
			continue
		case err != nil:
			return fmt.Errorf("forget namespace: %w", err)
		}
		forgotten[id.key()] = slot
		if slot.Number == otherNamespaces {
			continue
		}
		if err := t.giveBack(slot.Number); err != nil {
			return err
		}
	}
	for i, e := range t.events {
		slot, ok := forgotten[e.Namespace]
		if !ok {
			continue
		}
		if slot.Number == otherNamespaces {
			t.addEvent(&t.left, e, t.eventsN[i])
		}
		if err := t.maps["events"].Delete(e); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("forget events: %w", err)
		}
	}
	return nil
}

// giveBack clears a slot, of which no CPU must know any more, for the next namespace.
func (t *Tracker) giveBack(slot uint32) error {
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return err
	}
	clearSlot := func(name string, key uint32, zeros any) error {
		if err := t.maps[name].Put(key, zeros); err != nil {
			return fmt.Errorf("clear %s of a namespace: %w", name, err)
		}
		return nil
	}
	err = errors.Join(
		clearSlot("last_slots", 0, make([]uint64, cpus)),
		clearSlot("namespaces", slot, make([]statesNamespaceCounts, cpus)),
	)
	if t.opts.PerNamespace {
		err = errors.Join(err, clearSlot("state_seconds", slot, make([]statesStateHistograms, cpus)))
	}
	if err != nil {
		return err
	}
	if err := t.maps["free_slots"].Put(nil, slot); err != nil {
		return fmt.Errorf("give back slot: %w", err)
	}
	return nil
}

// lostNames are what was lost, by enum lost.
var lostNames = [...]string{
	"tracked_sockets", "tracked_namespaces", "tracked_listeners", "tracked_events", "tracked_accepts",
}

// Lost counts what found no place.
func (t *Tracker) Lost() (map[string]uint64, error) {
	lost := make(map[string]uint64, len(lostNames))
	var perCPU []uint64
	for what, name := range lostNames {
		if err := t.maps["lost"].Lookup(uint32(what), &perCPU); err != nil {
			return nil, fmt.Errorf("read what was lost: %w", err)
		}
		lost[name] = 0
		for _, n := range perCPU {
			lost[name] += n
		}
	}
	return lost, nil
}
