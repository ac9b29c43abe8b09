package probes

import (
	"cmp"
	"maps"
	"math"
	"slices"
	"strconv"
	"sync"

	"sockq/probes/census"
)

// namer is what the registry needs of netns.Names.
type namer interface {
	Refresh() error
	Name(inode uint32, initial bool) string
}

// identity tells namespaces apart: an inode number is used again when its
// namespace is gone, a cookie never; old kernels have none.
type identity struct {
	inode  uint32
	cookie uint64
}

func (a identity) compare(b identity) int {
	return cmp.Or(cmp.Compare(a.inode, b.inode), cmp.Compare(a.cookie, b.cookie))
}

// registry is the namespaces that exist, with their names.
type registry struct {
	max   int
	names namer

	mu      sync.Mutex
	known   map[identity]*namespace
	taken   map[string]identity
	own     int // namespaces with a name of their own
	overCap uint64
}

type namespace struct {
	name    string
	listed  bool // by the last list
	initial bool
	read    census.Namespace
}

func newRegistry(max int, names namer) *registry {
	return &registry{max: max, names: names, known: make(map[identity]*namespace), taken: make(map[string]identity)}
}

// update takes the list of all namespaces and, if the names were read anew, the
// names. It returns the namespaces whose name changed. For a namespace that is
// new it reads the names itself; whether that fails shows when they are read
// the next time.
func (r *registry) update(list []census.Namespace, named bool) (renamed []identity) {
	r.mu.Lock()
	defer r.mu.Unlock()
	strangers := false
	for _, n := range r.known {
		n.listed = false
	}
	for i := range list {
		id := identity{list[i].Inode, list[i].Cookie}
		n, ok := r.known[id]
		if !ok {
			n = new(namespace)
			r.known[id] = n
			strangers = true
		}
		n.listed, n.initial, n.read = true, list[i].Initial, list[i]
	}
	for id, n := range r.known {
		if !n.listed {
			r.release(n)
			delete(r.known, id)
		}
	}
	if !named && !strangers {
		return nil
	}
	if !named {
		_ = r.names.Refresh()
	}
	// In the order of their inodes, the initial one first, so that which
	// ones are over the cap does not depend on chance.
	ids := slices.SortedFunc(maps.Keys(r.known), func(a, b identity) int {
		if x, y := r.known[a].initial, r.known[b].initial; x != y {
			if x {
				return -1
			}
			return 1
		}
		return a.compare(b)
	})
	for _, id := range ids {
		n := r.known[id]
		if n.name == Other {
			continue // for as long as it exists
		}
		name := r.names.Name(id.inode, n.initial)
		if name == n.name {
			continue
		}
		if owner, ok := r.taken[name]; ok && owner != id {
			name = strconv.FormatUint(uint64(id.inode), 10) + "-" + strconv.FormatUint(id.cookie, 10)
			if name == n.name {
				continue
			}
		}
		// Also one that had no name: its listeners may have been seen first.
		renamed = append(renamed, id)
		if n.name == "" && r.own >= r.max {
			n.name = Other
			r.overCap++
			continue
		}
		r.release(n)
		n.name = name
		r.taken[name] = id
		r.own++
	}
	return renamed
}

func (r *registry) release(n *namespace) {
	if n.name != "" && n.name != Other {
		delete(r.taken, n.name)
		r.own--
	}
}

// knows tells whether a namespace was on the last list.
func (r *registry) knows(inode uint32, cookie uint64) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.known[identity{inode, cookie}] != nil
}

// identify finds a namespace on the last list, also where that has no cookies.
func (r *registry) identify(inode uint32, cookie uint64) (identity, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.identifyLocked(inode, cookie)
}

func (r *registry) identifyLocked(inode uint32, cookie uint64) (identity, bool) {
	for _, id := range []identity{{inode, cookie}, {inode, 0}} {
		if r.known[id] != nil {
			return id, true
		}
	}
	return identity{}, false
}

// find is a namespace's name, false where it is on no list.
func (r *registry) find(inode uint32, cookie uint64) (string, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	id, ok := r.identifyLocked(inode, cookie)
	if !ok {
		return "", false
	}
	return r.known[id].name, true
}

// over counts the namespaces that were put under Other.
func (r *registry) over() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.overCap
}

// name is a namespace's name; the inode's number where it is on no list.
func (r *registry) name(inode uint32, cookie uint64) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := r.known[identity{inode, cookie}]; n != nil {
		return n.name
	}
	return strconv.FormatUint(uint64(inode), 10)
}

// synBound is the length that tcp_max_syn_backlog allows a SYN queue besides the
// backlog: with tcp_syncookies=0 the last quarter is kept for peers that have
// proven themselves (tcp_conn_request), otherwise it plays no part.
func (r *registry) synBound(inode uint32, cookie uint64) (uint64, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := r.known[identity{inode, cookie}]
	if n == nil {
		return 0, false
	}
	cookies, backlog := n.read.Sysctls[census.SysctlSyncookies], n.read.Sysctls[census.SysctlMaxSynBacklog]
	switch {
	case cookies < 0 || backlog < 0:
		return 0, false
	case cookies > 0:
		return math.MaxUint64, true
	}
	return uint64(backlog - backlog>>2), true
}

// listed are the namespaces on the last list.
func (r *registry) listed() []identity {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Collect(maps.Keys(r.known))
}

// read are the namespaces on the last list, as they were read.
func (r *registry) read() []census.Namespace {
	r.mu.Lock()
	defer r.mu.Unlock()
	list := make([]census.Namespace, 0, len(r.known))
	for _, n := range r.known {
		list = append(list, n.read)
	}
	return list
}

// snapshot joins the namespaces that exist with those that the last census counted.
func (r *registry) snapshot(counted map[identity]census.NamespaceSockets, boundKnown bool) []Namespace {
	r.mu.Lock()
	defer r.mu.Unlock()
	list := make([]Namespace, 0, len(r.known)+1)
	var rest *Namespace
	for id, known := range r.known {
		c, ok := counted[id]
		n := Namespace{
			Name: known.name, Inode: id.inode, Cookie: id.cookie,
			SocketsKnown: ok,
			States:       c.States, BoundKnown: boundKnown, Queues: c.Queues,
			SettingsKnown: true,
			Sysctls:       known.read.Sysctls, Events: known.read.Events, EventsKnown: known.read.EventsKnown,
		}
		if known.name != Other {
			list = append(list, n)
			continue
		}
		if rest == nil {
			rest = &Namespace{Name: Other, BoundKnown: boundKnown}
		}
		rest.add(&n)
	}
	slices.SortFunc(list, func(a, b Namespace) int { return cmp.Compare(a.Name, b.Name) })
	if rest != nil {
		list = append(list, *rest)
	}
	return list
}

// add sums what can be summed.
func (n *Namespace) add(m *Namespace) {
	n.SocketsKnown = n.SocketsKnown || m.SocketsKnown
	for s, v := range m.States {
		n.States[s] += v
	}
	for d := range m.Queues {
		n.Queues[d].ReceiveBytes += m.Queues[d].ReceiveBytes
		n.Queues[d].SendBytes += m.Queues[d].SendBytes
	}
}
