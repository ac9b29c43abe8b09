package probes

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"sockq/probes/census"
	"sockq/probes/netns"
	"sockq/probes/owner"
)

// Owner is whom sockets belong to, as labels tell it; "" for what is unknown.
type Owner struct {
	Process                   string // as /proc/PID/comm
	Namespace, Pod, Container string // of Kubernetes
}

func (o Owner) compare(other Owner) int {
	return cmp.Or(cmp.Compare(o.Process, other.Process), cmp.Compare(o.Namespace, other.Namespace),
		cmp.Compare(o.Pod, other.Pod), cmp.Compare(o.Container, other.Container))
}

// Collapse says which listeners of one owner share a series, whose address ends
// in ":*".
type Collapse uint8

// The rules.
const (
	CollapseAuto   Collapse = iota // those on high ports, of a process with more than collapseAbove listeners
	CollapseAlways                 // all on high ports
	CollapseNever
)

const (
	// The default ranges of NodePorts (30000–32767) and of ports that the kernel
	// chooses (32768–60999) begin here.
	firstHighPort = 30000
	collapseAbove = 50
)

// shares tells whether a listener of an owner that has so many others joins the
// shared series.
func (c Collapse) shares(r *census.Listener, owner Owner, others int) bool {
	switch {
	case r.Address.Port() < firstHighPort || c == CollapseNever:
		return false
	case c == CollapseAlways:
		return true
	}
	return owner.Process != "" && others >= collapseAbove
}

// sharedAddress is the label of those that share a series.
func sharedAddress(r *census.Listener) string {
	host := netip.AddrPortFrom(r.Address.Addr(), 0).String()
	shared := host[:len(host)-1] + "*"
	if r.Device != "" {
		shared += "%" + device(r)
	}
	return shared
}

// Names of probes.
const (
	probeOwners = "owners"
	probePods   = "pods"
)

const (
	// A look at all open files is followed by a rest of this many times what it took.
	ownersRest = 100
	// What is known of the processes that have a listener open is believed for
	// this long.
	believeOwner = time.Minute
)

// owners knows who sockets belong to.
type owners struct {
	finder  *owner.Finder
	holders *census.Holders // nil: by the processes' lists of open files, listeners only

	rest    time.Duration // after a reading, in times of what it took
	reading sync.Mutex    // one at a time; of what follows
	next    time.Time     // no reading before
	closed  bool

	mu        sync.Mutex          // what follows
	listeners map[uint64]*holding // by the number of the socket's inode
	processes []census.Process
	pods      map[identity]owner.Owner // that a namespace belongs to, the first that was found
}

// holding is who has a listening socket open.
type holding struct {
	by    []census.ListenerHolder // ordered by PID; their names where they were told
	who   owner.Owner
	owner Owner
	asked time.Time
}

// find is the owner of a listening socket; false as long as nobody has looked.
func (o *owners) find(r *census.Listener) (Owner, bool) {
	if r.Socket == 0 { // nobody has it open
		return Owner{}, true
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	h := o.listeners[r.Socket]
	if h == nil {
		return Owner{}, false
	}
	return h.owner, true
}

// rests tells whether a reading would come too soon after a costly one.
func (o *owners) rests() bool {
	o.reading.Lock()
	defer o.reading.Unlock()
	return time.Now().Before(o.next)
}

// read looks who has which socket open.
func (o *owners) read(ctx context.Context, namespaces []census.Namespace, listeners []census.Listener) error {
	o.reading.Lock()
	defer o.reading.Unlock()
	if o.closed {
		return errClosed
	}
	start := time.Now()
	holders, processes, err := o.holding(ctx, namespaces, listeners)
	end := time.Now() // what follows waits for others
	o.next = end.Add(o.rest * end.Sub(start))
	o.mu.Lock()
	o.processes = processes // what is old is wrong
	o.mu.Unlock()
	if err != nil {
		return err
	}
	o.resolve(holders, listeners)
	o.findPods(namespaces, listeners)
	return nil
}

// holding are the processes that have each listening socket open, and what
// processes have open besides.
func (o *owners) holding(ctx context.Context, namespaces []census.Namespace, listeners []census.Listener) (map[uint64][]census.ListenerHolder, []census.Process, error) {
	if o.holders == nil {
		holders, err := o.scan(listeners)
		return holders, nil, err
	}
	held, err := o.holders.Read(ctx, namespaces, listeners)
	if err != nil {
		return nil, nil, err
	}
	holders := make(map[uint64][]census.ListenerHolder, len(listeners))
	for _, l := range held.Listeners {
		holders[l.Socket] = append(holders[l.Socket], l)
	}
	for _, by := range holders {
		slices.SortFunc(by, func(a, b census.ListenerHolder) int { return cmp.Compare(a.PID, b.PID) })
	}
	return holders, slices.Clone(held.Processes), nil
}

// scan looks for the sockets that are new; of the others it is known.
func (o *owners) scan(listeners []census.Listener) (map[uint64][]census.ListenerHolder, error) {
	strangers := make(map[uint64]struct{})
	holders := make(map[uint64][]census.ListenerHolder)
	o.mu.Lock()
	for i := range listeners {
		socket := listeners[i].Socket
		if h := o.listeners[socket]; h != nil && time.Since(h.asked) < believeOwner {
			holders[socket] = h.by
		} else if socket != 0 {
			strangers[socket] = struct{}{}
		}
	}
	o.mu.Unlock()
	found, err := o.finder.Scan(strangers)
	for socket, pids := range found {
		for _, pid := range pids {
			holders[socket] = append(holders[socket], census.ListenerHolder{Socket: socket, PID: pid})
		}
	}
	if errors.Is(err, owner.ErrIncomplete) { // the next one goes on, until then it is as before
		o.mu.Lock()
		for socket := range strangers {
			if h := o.listeners[socket]; h != nil && holders[socket] == nil {
				holders[socket] = h.by
			}
		}
		o.mu.Unlock()
		err = nil
	}
	return holders, err
}

// resolve asks who the processes are, where they are not known.
func (o *owners) resolve(holders map[uint64][]census.ListenerHolder, listeners []census.Listener) {
	now := time.Now()
	resolved := make(map[uint64]*holding, len(listeners))
	for i := range listeners {
		socket := listeners[i].Socket
		if socket == 0 || resolved[socket] != nil {
			continue
		}
		o.mu.Lock()
		before := o.listeners[socket]
		o.mu.Unlock()
		h := before
		same := h != nil && now.Sub(h.asked) < believeOwner && slices.Equal(h.by, holders[socket])
		if !same || h.who.Container != "" && h.who.Pod == "" {
			h = &holding{by: holders[socket]}
			if len(h.by) > 0 {
				if h.asked = now; same { // it is only about the pod
					h.asked = before.asked
				}
				pids := make([]uint32, len(h.by))
				for i := range h.by {
					pids[i] = h.by[i].PID
				}
				h.who = o.finder.Of(pids)
				if before != nil && h.who.Pod == "" && h.who.Container == before.who.Container { // nobody answered
					h.who.ContainerName, h.who.Namespace, h.who.Pod = before.who.ContainerName, before.who.Namespace, before.who.Pod
				}
				h.owner = labelsOf(&h.who)
			}
		}
		resolved[socket] = h
	}
	o.mu.Lock()
	o.listeners = resolved
	o.mu.Unlock()
}

// findPods finds whose the network namespaces are: of the pods whose processes listen
// there the one with the lowest PID. It stays so for as long as there is the
// namespace.
func (o *owners) findPods(namespaces []census.Namespace, listeners []census.Listener) {
	o.mu.Lock()
	defer o.mu.Unlock()
	found := make(map[identity]owner.Owner)
	for i := range listeners {
		h, id := o.listeners[listeners[i].Socket], identity{listeners[i].Inode, listeners[i].NetnsCookie}
		if h == nil || h.who.Pod == "" || h.who.HostNetwork {
			continue
		}
		if before, ok := found[id]; !ok || h.who.PID < before.PID {
			found[id] = h.who
		}
	}
	maps.Copy(found, o.pods)
	o.pods = make(map[identity]owner.Owner)
	for i := range namespaces {
		id := identity{namespaces[i].Inode, namespaces[i].Cookie}
		if who, ok := found[id]; ok {
			o.pods[id] = who
		}
	}
}

// labelsOf is what labels tell of an owner: of a container without a name the id as
// container engines shorten it.
func labelsOf(who *owner.Owner) Owner {
	const short = 12
	container := who.ContainerName
	if container == "" && len(who.Container) > short {
		container = who.Container[:short]
	}
	return Owner{Process: who.Process, Namespace: who.Namespace, Pod: who.Pod, Container: container}
}

// who are the owners of listening sockets in full.
func (o *owners) who(socket uint64) owner.Owner {
	o.mu.Lock()
	defer o.mu.Unlock()
	if h := o.listeners[socket]; h != nil {
		return h.who
	}
	return owner.Owner{}
}

func (o *owners) lost() map[string]uint64 {
	lost := o.finder.Lost()
	if o.holders != nil {
		maps.Copy(lost, o.holders.Lost())
	}
	return lost
}

func (o *owners) close() error {
	err := o.finder.Close() // a reading does not wait for others any more
	o.reading.Lock()
	defer o.reading.Unlock()
	o.closed = true
	if o.holders != nil {
		err = errors.Join(err, o.holders.Close())
	}
	return err
}

// describePods says where the names of pods come from.
func (o *owners) describePods(p *Probe) {
	source, err := o.finder.Pods()
	p.Mechanism, p.Attached, p.Reason = cmp.Or(source, "none"), source != "" && err == nil, ""
	switch {
	case err != nil:
		p.Mechanism, p.Reason = "none", err.Error()
	case source == "":
		p.Reason = "turned off"
	}
}

// openOwners fails only where an option is wrong.
func (p *Probes) openOwners() error {
	if p.opts.NoOwners {
		p.missing(probeOwners, errors.New("turned off"))
		return nil
	}
	opts := p.opts.Owners
	opts.Logger, opts.ProcFS = p.log, p.opts.ProcFS
	finder, err := owner.Open(opts)
	if err != nil {
		return fmt.Errorf("look for owners: %w", err)
	}
	p.owners = &owners{finder: finder, rest: ownersRest, listeners: make(map[uint64]*holding)}
	found := Probe{Name: probeOwners, Mechanism: "iter", Attached: true}
	self, readError := os.Readlink(filepath.Join(p.opts.ProcFS, "self"))
	switch {
	case p.opts.Mechanism == census.MechanismSockDiag:
		err = errors.New("the sock_diag source was asked for")
	case readError != nil || self != strconv.Itoa(os.Getpid()): // the iterator's PIDs would be others
		err = fmt.Errorf("%s is of another PID namespace than sockq: give it the node's (hostPID)", p.opts.ProcFS)
	default:
		p.owners.holders, err = census.OpenHolders()
	}
	switch {
	case err != nil:
		found.Mechanism, found.Reason = "procfs", "of listeners only: "+err.Error()
	case !firstPIDs():
		found.Reason = "of processes in sockq's own PID namespace only: in a container, give it the node's (hostPID)"
	}
	p.fixed = append(p.fixed, found, Probe{Name: probePods})
	return nil
}

// firstPIDs tells whether this process sees those of all processes: the inode of the
// kernel's first PID namespace is the same everywhere (PROC_PID_INIT_INO).
func firstPIDs() bool {
	link, err := os.Readlink("/proc/self/ns/pid")
	return err != nil || link == "pid:[4026531836]"
}

// readOwners looks whose the sockets are.
func (p *Probes) readOwners(ctx context.Context) error {
	if p.owners == nil || p.owners.rests() {
		return nil
	}
	return p.read(SourceOwners, func() error {
		p.listeners.Lock()
		listeners := p.ledger.listening()
		p.listeners.Unlock()
		if err := p.owners.read(ctx, p.registry.read(), listeners); err != nil {
			return err
		}
		p.listeners.Lock()
		defer p.listeners.Unlock()
		p.ledger.reown()
		return nil
	})
}

// addOwners adds to the listeners of a Snapshot who their owners are in full, and
// whose clients gave up.
func (p *Probes) addOwners(s *Snapshot) {
	type port struct {
		id     identity
		number uint16
	}
	places := make(map[uint64]int, len(s.Listeners)) // by ID
	for i := range s.Listeners {
		places[s.Listeners[i].ID] = i
	}
	sets := make(map[port]uint64) // whose the port is; 0: of several
	p.mu.Lock()
	defer p.mu.Unlock()
	young := make(map[uint64]bool) // sets with a socket that the census did not meet
	for _, socket := range p.ledger.sockets {
		if socket.set == nil {
			continue
		}
		r := &socket.listener
		l := &s.Listeners[places[socket.set.ID]]
		id := identity{r.Inode, r.NetnsCookie}
		if p.owners != nil && socket.set.own && l.Who.PID == 0 {
			l.Who = p.owners.who(r.Socket)
		}
		young[socket.set.ID] = young[socket.set.ID] || !socket.since.Before(p.countedAt)
		at := port{id, r.Address.Port()}
		if id, ok := sets[at]; ok && id != socket.set.ID || !socket.set.own {
			sets[at] = 0
		} else {
			sets[at] = socket.set.ID
		}
	}
	for at, id := range sets {
		if _, counted := p.counted[at.id]; id != 0 && counted && !young[id] {
			s.Listeners[places[id]].GaveUpKnown = true
		}
	}
	for _, g := range p.gaveUp {
		if id := sets[port{identity{g.Inode, g.Cookie}, g.Port}]; id != 0 {
			s.Listeners[places[id]].GaveUp += g.Connections
		}
	}
}

// addProcesses adds the processes with their connections, and the pods that
// namespaces belong to.
func (p *Probes) addProcesses(s *Snapshot) {
	var list []census.Process
	var pods map[identity]owner.Owner
	if p.owners != nil {
		p.owners.mu.Lock()
		list, pods = p.owners.processes, p.owners.pods
		p.owners.mu.Unlock()
	}
	for i := range s.Namespaces {
		n := &s.Namespaces[i]
		if pod, ok := pods[identity{n.Inode, n.Cookie}]; ok && n.Name != netns.Host && n.Name != Other {
			n.PodNamespace, n.Pod = pod.Namespace, pod.Pod
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	name := func(inode uint32, cookie uint64) string {
		if name, ok := p.registry.find(inode, cookie); ok {
			return name
		}
		return p.registry.name(inode, cookie)
	}
	s.Processes = p.processes.join(list, s.Namespaces, name, s.Time)
	s.Lost["processes_over_cap"] = p.processes.overCap
}
