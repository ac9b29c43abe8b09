package census

// The objects are committed; CI compiles them again with the same clang and
// fails on a difference.
//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -cc clang-19 -strip llvm-strip-19 -target amd64,arm64 -no-global-types -type walk -type namespace_sockets -type gave_up_count -cflags "-O2 -Wall -Werror -I/usr/include/x86_64-linux-gnu" sockets bpf/sockets.bpf.c
//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -cc clang-19 -strip llvm-strip-19 -target amd64,arm64 -no-global-types -cflags "-O2 -Wall -Werror -I/usr/include/x86_64-linux-gnu" bound bpf/bound.bpf.c
//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -cc clang-19 -strip llvm-strip-19 -target amd64,arm64 -no-global-types -type listener_record -cflags "-O2 -Wall -Werror -I/usr/include/x86_64-linux-gnu" listeners bpf/listeners.bpf.c
//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -cc clang-19 -strip llvm-strip-19 -target amd64,arm64 -no-global-types -type namespace_record -type list_walk -cflags "-O2 -Wall -Werror -I/usr/include/x86_64-linux-gnu" namespaces bpf/namespaces.bpf.c
//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -cc clang-19 -strip llvm-strip-19 -target amd64,arm64 -no-global-types -type reading -type process_key -type process_record -type holder_record -type held_socket -cflags "-O2 -Wall -Werror -I/usr/include/x86_64-linux-gnu" holders bpf/holders.bpf.c

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"sockq/probes/netns"
	"sockq/probes/tcpstate"
)

const (
	maxNamespaces = 4096  // MAX_NAMESPACES
	maxListeners  = 65536 // MAX_LISTENERS

	// A census that a moving socket disturbed is taken again, this often.
	maxAttempts = 3
	// The map of ports that were listened on is swept after this many censuses.
	sweepPortsEvery = 64
)

// Walk reads the kernel's own tables with BPF programs, without a lock and for
// all namespaces at once (kernel 6.4+: open-coded iterators). It needs CAP_BPF
// and CAP_PERFMON.
//
// Namespaces, Sockets and Listeners may run beside each other, but none beside
// itself.
type Walk struct {
	procfs string
	hz     int64 // jiffies a second, 0 if unknown
	known  [len(EventNames)]bool
	shared uint64 // the hashinfo that listeners of all namespaces are in

	sockets    socketsObjects
	bound      *boundObjects // nil: this kernel has no bhash2 to walk
	boundError error
	listeners  listenersObjects
	namespaces namespacesObjects

	list     sync.Mutex // the namespaces program and its records
	records  []namespacesNamespaceRecord
	found    []Namespace
	counted  []socketsNamespaceSockets
	portKeys []uint64
	ports    []uint32
	gaveUp   []socketsGaveUpCount
	result   Sockets
	listing  []listenersListenerRecord
	listened []Listener
	devices  map[[16]byte]string
	census   uint32

	lostMu sync.Mutex
	lost   map[string]uint64
}

// OpenWalk loads the walk and holds it against /proc of the calling thread's
// namespace. The error says what is missing.
func OpenWalk(procfs string) (_ *Walk, err error) {
	w := &Walk{procfs: procfs, devices: make(map[[16]byte]string), portKeys: make([]uint64, batch), ports: make([]uint32, batch), gaveUp: make([]socketsGaveUpCount, batch), lost: map[string]uint64{
		"census_sockets": 0, "census_moved": 0, "listeners": 0, "listeners_moved": 0, "listening_ports": 0, "namespaces": 0,
	}}
	defer func() {
		if err != nil {
			w.Close()
		}
	}()
	kernel, err := btf.LoadKernelSpec()
	if err != nil {
		return nil, fmt.Errorf("load kernel type information: needs a kernel with CONFIG_DEBUG_INFO_BTF=y: %w", err)
	}
	// Younger than everything else that the programs need.
	var iterator *btf.Func
	if err := kernel.TypeByName("bpf_iter_num_new", &iterator); err != nil {
		return nil, fmt.Errorf("walk the kernel's tables: needs Linux 6.4 or newer: %w", err)
	}
	if err := w.loadNamespaces(kernel); err != nil {
		return nil, Explain("load the walk over namespaces", err)
	}
	if err := loadListenersObjects(&w.listeners, nil); err != nil {
		return nil, Explain("load the walk over listeners", err)
	}
	if err := loadSocketsObjects(&w.sockets, nil); err != nil {
		return nil, Explain("load the walk over sockets", err)
	}
	w.loadBound()
	tables, err := w.tables()
	if err != nil {
		return nil, err
	}
	w.shared = tables[0].hashinfo
	if err := w.validate(); err != nil {
		return nil, fmt.Errorf("hold the walk against %s: %w", procfs, err)
	}
	return w, nil
}

// Explain turns a refusal to load into what a person can do about it. The kernel
// itself says EPERM or EINVAL for a missing capability, depending on where it
// is missed.
func Explain(doing string, err error) error {
	missing := missingCapabilities()
	switch {
	case len(missing) > 0:
		return fmt.Errorf("%s: %s missing: run sockq as root or give it CAP_BPF and CAP_PERFMON: %w", doing, strings.Join(missing, " and "), err)
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%s: this system forbids BPF (seccomp, lockdown or kernel.unprivileged_bpf_disabled): %w", doing, err)
	}
	return fmt.Errorf("%s: %w", doing, err)
}

// missingCapabilities are those that the walk needs and the calling thread does
// not have. CAP_SYS_ADMIN stands for all.
func missingCapabilities() (missing []string) {
	if Holds(unix.CAP_SYS_ADMIN) {
		return nil
	}
	if !Holds(unix.CAP_BPF) {
		missing = append(missing, "CAP_BPF")
	}
	if !Holds(unix.CAP_PERFMON) {
		missing = append(missing, "CAP_PERFMON")
	}
	return missing
}

// Holds tells whether the calling thread has a capability.
func Holds(capability int) bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	return unix.Capget(&header, &data[0]) == nil && data[capability/32].Effective&(1<<(capability%32)) != 0
}

func (w *Walk) loadNamespaces(kernel *btf.Spec) error {
	spec, err := loadNamespaces()
	if err != nil {
		return err
	}
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return err
	}
	index, err := eventIndex(kernel)
	if err != nil {
		return err
	}
	for i := range index {
		w.known[i] = index[i] != 0
	}
	if err := spec.Variables["cpus"].Set(uint32(cpus)); err != nil {
		return err
	}
	if err := spec.Variables["event_index"].Set(index); err != nil {
		return err
	}
	return spec.LoadAndAssign(&w.namespaces, nil)
}

// loadBound shares the maps of the sockets walk. Without it CLOSE is unknown.
func (w *Walk) loadBound() {
	objects := new(boundObjects)
	err := loadBoundObjects(objects, &ebpf.CollectionOptions{MapReplacements: map[string]*ebpf.Map{
		"slots":      w.sockets.Slots,
		"slots_used": w.sockets.SlotsUsed,
		"sockets":    w.sockets.Sockets,
	}})
	if err != nil {
		w.boundError = Explain("load the walk over bound sockets", err)
		return
	}
	w.bound = objects
}

// mibNames are the kernel's enumerators for EventNames, in the same order
// (include/uapi/linux/snmp.h).
var mibNames = [len(EventNames)]string{
	"LINUX_MIB_LISTENOVERFLOWS",
	"LINUX_MIB_LISTENDROPS",
	"LINUX_MIB_TCPREQQFULLDROP",
	"LINUX_MIB_TCPREQQFULLDOCOOKIES",
	"LINUX_MIB_SYNCOOKIESSENT",
	"LINUX_MIB_SYNCOOKIESRECV",
	"LINUX_MIB_SYNCOOKIESFAILED",
	"LINUX_MIB_TCPTIMEWAITOVERFLOW",
	"LINUX_MIB_TCPABORTONMEMORY",
	"LINUX_MIB_EMBRYONICRSTS",
	"LINUX_MIB_TCPDEFERACCEPTDROP",
	"LINUX_MIB_TCPFASTOPENLISTENOVERFLOW",
	"LINUX_MIB_TCPBACKLOGDROP",
	"LINUX_MIB_TCPRCVQDROP",
	"LINUX_MIB_TCPABORTONTIMEOUT",
	"LINUX_MIB_TCPABORTFAILED",
	"LINUX_MIB_TCPSYNRETRANS",
	"LINUX_MIB_TCPTIMEOUTS",
	"LINUX_MIB_PRUNECALLED",
	"LINUX_MIB_RCVPRUNED",
}

// eventIndex finds the counters' numbers on this kernel, 0 for one that it does
// not have. The enum has no name, so it is known by a member.
func eventIndex(kernel *btf.Spec) (index [len(EventNames)]uint32, err error) {
	for t, err := range kernel.All() {
		if err != nil {
			return index, err
		}
		enum, ok := t.(*btf.Enum)
		if !ok || enum.Name != "" {
			continue
		}
		numbers := make(map[string]uint32, len(enum.Values))
		for _, v := range enum.Values {
			numbers[v.Name] = uint32(v.Value)
		}
		if _, ok := numbers["LINUX_MIB_LISTENDROPS"]; !ok {
			continue
		}
		for i, name := range mibNames {
			index[i] = numbers[name]
		}
		return index, nil
	}
	return index, fmt.Errorf("enum with LINUX_MIB_LISTENDROPS: %w", btf.ErrNotFound)
}

// Mechanism is MechanismWalk.
func (w *Walk) Mechanism() Mechanism { return MechanismWalk }

// BoundError says why CLOSE cannot be counted, nil where it can.
func (w *Walk) BoundError() error { return w.boundError }

// Programs are the loaded programs by the probe that they serve.
func (w *Walk) Programs() map[string][]*ebpf.Program {
	programs := map[string][]*ebpf.Program{
		"namespaces": {w.namespaces.WalkNamespaces},
		"listeners":  {w.listeners.WalkListeners},
		"sockets":    {w.sockets.WalkStates, w.sockets.WalkQueues, w.sockets.WalkListening},
	}
	if w.bound != nil {
		programs["bound"] = []*ebpf.Program{w.bound.WalkBound}
	}
	return programs
}

// Lost counts what did not fit or moved away under a walk.
func (w *Walk) Lost() map[string]uint64 {
	w.lostMu.Lock()
	defer w.lostMu.Unlock()
	lost := make(map[string]uint64, len(w.lost))
	for what, n := range w.lost {
		lost[what] = n
	}
	return lost
}

func (w *Walk) lose(what string, n uint64) {
	if n == 0 {
		return
	}
	w.lostMu.Lock()
	w.lost[what] += n
	w.lostMu.Unlock()
}

// Close unloads the programs.
func (w *Walk) Close() error {
	err := errors.Join(w.sockets.Close(), w.listeners.Close(), w.namespaces.Close())
	if w.bound != nil {
		err = errors.Join(err, w.bound.Close())
	}
	return err
}

// bytesOf is the memory of a slice of records, for the kernel to fill.
func bytesOf[T any](s []T) []byte {
	if len(s) == 0 {
		return nil
	}
	return unsafe.Slice((*byte)(unsafe.Pointer(&s[0])), len(s)*int(unsafe.Sizeof(s[0])))
}

// grow makes s at least n long; what was in it is not kept.
func grow[T any](s []T, n int) []T {
	if cap(s) < n {
		s = make([]T, n+n/4)
	}
	return s[:n]
}

func readArray[T any](m *ebpf.Map, into []T) error {
	return mapped(m, len(bytesOf(into)), func(elements []byte) { copy(bytesOf(into), elements) })
}

func writeArray[T any](m *ebpf.Map, from []T) error {
	return mapped(m, len(bytesOf(from)), func(elements []byte) { copy(elements, bytesOf(from)) })
}

// mapped shows the first bytes of a map, and only these, for as long as fn runs:
// of what is mapped all is resident memory, used or not.
func mapped(m *ebpf.Map, bytes int, fn func([]byte)) error {
	if bytes == 0 {
		return nil
	}
	memory, err := unix.Mmap(m.FD(), 0, bytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map memory: %w", err)
	}
	fn(memory)
	return unix.Munmap(memory)
}

// readNamespaces follows the kernel's list. The caller holds w.list.
func (w *Walk) readNamespaces() error {
	var list namespacesListWalk
	if _, err := w.namespaces.WalkNamespaces.Run(&ebpf.RunOptions{Context: &list, ContextOut: &list}); err != nil {
		return fmt.Errorf("walk namespaces: %w", err)
	}
	if list.Found > maxNamespaces {
		w.lose("namespaces", uint64(list.Found-maxNamespaces))
		list.Found = maxNamespaces
	}
	w.records = grow(w.records, int(list.Found))
	if err := readArray(w.namespaces.Namespaces, w.records); err != nil {
		return fmt.Errorf("read namespaces: %w", err)
	}
	if list.FirstIsInitial != 0 && len(w.records) > 0 {
		w.records[0].Initial = 1
	}
	return nil
}

// Namespaces reads all namespaces of the node.
func (w *Walk) Namespaces() ([]Namespace, error) {
	w.list.Lock()
	defer w.list.Unlock()
	start := time.Now()
	if err := w.readNamespaces(); err != nil {
		return nil, err
	}
	orphans := int64(-1) // one for the whole kernel, shown to its initial namespace only
	if v, err := netns.Sysctl(w.procfs, "net.ipv4.tcp_max_orphans"); err == nil {
		orphans = v
	}
	w.found = w.found[:0]
	for i := range w.records {
		r := &w.records[i]
		n := Namespace{Inode: r.Inum, Cookie: r.Cookie, Initial: r.Initial != 0, Read: start, Events: r.Events, EventsKnown: w.known}
		for s, v := range r.Sysctls {
			n.Sysctls[s] = int64(v)
		}
		n.Sysctls[SysctlFinTimeout] = -1
		if w.hz > 0 {
			n.Sysctls[SysctlFinTimeout] = int64(r.Sysctls[SysctlFinTimeout]) / w.hz
		}
		n.Sysctls[SysctlMaxOrphans] = -1
		if n.Initial {
			n.Sysctls[SysctlMaxOrphans] = orphans
		}
		w.found = append(w.found, n)
	}
	return w.found, nil
}

// table is an established table and whose sockets to count in it.
type table struct{ hashinfo, cookie uint64 }

// tables are the node's established tables: the one that namespaces share and
// those of namespaces that have one of their own (tcp_child_ehash_entries).
func (w *Walk) tables() ([]table, error) {
	w.list.Lock()
	defer w.list.Unlock()
	if err := w.readNamespaces(); err != nil {
		return nil, err
	}
	var tables []table
	for i := range w.records {
		if w.records[i].Initial != 0 {
			tables = append(tables, table{hashinfo: w.records[i].Hashinfo})
		}
	}
	if len(tables) == 0 {
		return nil, errors.New("find the initial network namespace")
	}
	for i := range w.records {
		if r := &w.records[i]; r.Hashinfo != tables[0].hashinfo {
			tables = append(tables, table{r.Hashinfo, r.Cookie})
		}
	}
	return tables, nil
}

// Sockets counts all sockets of the node with their byte queues.
func (w *Walk) Sockets(ctx context.Context) (*Sockets, error) {
	return w.count(ctx, w.sockets.WalkQueues, w.bound)
}

// States counts all sockets of the node by state only, and bound ones if asked
// to; each that is left out makes it cheaper. The result is valid until the next
// call of States or Sockets.
func (w *Walk) States(ctx context.Context, bound bool) (*Sockets, error) {
	if !bound {
		return w.count(ctx, w.sockets.WalkStates, nil)
	}
	return w.count(ctx, w.sockets.WalkStates, w.bound)
}

func (w *Walk) count(ctx context.Context, connected *ebpf.Program, bound *boundObjects) (*Sockets, error) {
	for attempt := 1; ; attempt++ {
		moved, err := w.countOnce(ctx, connected, bound)
		if err != nil {
			return nil, err
		}
		if moved == 0 {
			break
		}
		if attempt == maxAttempts {
			w.lose("census_moved", uint64(moved))
			break
		}
	}
	var used [1]uint32
	if err := readArray(w.sockets.SlotsUsed, used[:]); err != nil {
		return nil, fmt.Errorf("read slots: %w", err)
	}
	w.counted = grow(w.counted, int(min(used[0], maxNamespaces)))
	if err := readArray(w.sockets.Sockets, w.counted); err != nil {
		return nil, fmt.Errorf("read socket counts: %w", err)
	}
	w.result.Namespaces = w.result.Namespaces[:0]
	w.result.BoundKnown = bound != nil
	for i := range w.counted {
		c := &w.counted[i]
		n := NamespaceSockets{Inode: uint32(c.Inum), Cookie: c.Cookie}
		copy(n.States[:], c.States[:tcpstate.Count])
		for d := range n.Queues {
			q := &c.Queues[d]
			n.Queues[d] = Queues{q.ReceiveBytes, q.SendBytes, q.ReceiveMaxBytes, q.SendMaxBytes}
		}
		w.result.Namespaces = append(w.result.Namespaces, n)
	}
	if err := w.readGaveUp(); err != nil {
		return nil, fmt.Errorf("read who gave up: %w", err)
	}
	return &w.result, nil
}

// readGaveUp keeps what this census has counted and removes the rest.
func (w *Walk) readGaveUp() error {
	w.result.GaveUp = w.result.GaveUp[:0]
	return removeOld(w.sockets.GaveUp, w.portKeys, w.gaveUp, func(key uint64, g *socketsGaveUpCount) bool {
		if g.Census != w.census {
			return true
		}
		w.result.GaveUp = append(w.result.GaveUp, GaveUp{g.Inum, key >> 16, uint16(key), uint64(g.Connections)})
		return false
	})
}

// countOnce walks every table once. moved counts the chains that a socket left
// under the walk; then the counts may be off by a few.
func (w *Walk) countOnce(ctx context.Context, connected *ebpf.Program, bound *boundObjects) (moved uint32, err error) {
	tables, err := w.tables()
	if err != nil {
		return 0, err
	}
	if err := w.reset(); err != nil {
		return 0, fmt.Errorf("reset socket counts: %w", err)
	}
	w.census++
	shared := tables[0]
	m, ports, err := w.walk(ctx, w.sockets.WalkListening, shared)
	if err != nil {
		return 0, fmt.Errorf("walk listening sockets: %w", err)
	}
	moved += m
	w.lose("listening_ports", uint64(ports))
	for _, t := range tables {
		m, lost, err := w.walk(ctx, connected, t)
		if err != nil {
			return 0, fmt.Errorf("walk connected sockets: %w", err)
		}
		moved += m
		w.lose("census_sockets", uint64(lost))
	}
	if bound != nil {
		_, lost, err := w.walk(ctx, bound.WalkBound, shared)
		if err != nil {
			return 0, fmt.Errorf("walk bound sockets: %w", err)
		}
		w.lose("census_sockets", uint64(lost))
	}
	if w.census%sweepPortsEvery == 0 {
		old := func(_ uint64, seen *uint32) bool { return *seen != w.census }
		if err := removeOld(w.sockets.Listening, w.portKeys, w.ports, old); err != nil {
			return 0, fmt.Errorf("forget listening ports: %w", err)
		}
	}
	return moved, nil
}

// bucketsPerCall bounds a call on an empty table, NODES_PER_CALL one on a full table.
const bucketsPerCall = 1 << 14

// No table is larger. One that seems to be went with its namespace under the
// walk, and its memory is something else by now.
const maxBuckets = 1 << 25

// walk calls a program until it reached the end of its table.
func (w *Walk) walk(ctx context.Context, program *ebpf.Program, t table) (moved, lost uint32, err error) {
	state := socketsWalk{Hashinfo: t.hashinfo, Cookie: t.cookie, Census: w.census}
	for {
		if err := ctx.Err(); err != nil {
			return 0, 0, err
		}
		start := state.Start
		state.End = start + bucketsPerCall
		ret, err := program.Run(&ebpf.RunOptions{Context: &state, ContextOut: &state})
		if err != nil {
			return 0, 0, err
		}
		if ret != 0 {
			return 0, 0, errors.New("the kernel has no such table")
		}
		if state.Start == start {
			return state.Moved, state.Lost, nil
		}
		if state.Start > maxBuckets {
			return state.Moved + 1, state.Lost, nil
		}
	}
}

// reset takes the slots back.
func (w *Walk) reset() error {
	var used [1]uint32
	if err := readArray(w.sockets.SlotsUsed, used[:]); err != nil {
		return err
	}
	n := int(min(used[0], maxNamespaces))
	w.counted = grow(w.counted, n)
	if err := readArray(w.sockets.Sockets, w.counted); err != nil {
		return err
	}
	for i := range w.counted {
		if err := w.sockets.Slots.Delete(w.counted[i].Cookie); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return err
		}
	}
	clear(w.counted)
	if err := writeArray(w.sockets.Sockets, w.counted); err != nil {
		return err
	}
	used[0] = 0
	return writeArray(w.sockets.SlotsUsed, used[:])
}

// Listeners reads every listening socket of the node.
func (w *Walk) Listeners() ([]Listener, error) {
	var state socketsWalk
	for attempt := 1; ; attempt++ {
		state = socketsWalk{Hashinfo: w.shared}
		ret, err := w.listeners.WalkListeners.Run(&ebpf.RunOptions{Context: &state, ContextOut: &state})
		if err != nil {
			return nil, fmt.Errorf("walk listeners: %w", err)
		}
		if ret != 0 {
			return nil, errors.New("walk listeners: the kernel has no such table")
		}
		if state.Moved == 0 {
			break
		}
		if attempt == maxAttempts {
			w.lose("listeners_moved", uint64(state.Moved))
			break
		}
	}
	if state.Seen > maxListeners {
		w.lose("listeners", uint64(state.Seen-maxListeners))
	}
	w.listing = grow(w.listing, int(min(state.Seen, maxListeners)))
	if err := readArray(w.listeners.Listeners, w.listing); err != nil {
		return nil, fmt.Errorf("read listeners: %w", err)
	}
	w.listened = w.listened[:0]
	for i := range w.listing {
		r := &w.listing[i]
		w.listened = append(w.listened, Listener{
			Key: r.Key, Cookie: r.Cookie, Socket: r.Socket, Inode: r.Inum, NetnsCookie: r.NetCookie,
			Address: r.addrPort(), Device: w.device(r), Interface: uint32(r.Ifindex),
			AcceptQueue: r.AcceptQueue, Limit: r.Limit, SynQueue: int64(int32(r.SynQueue)), Drops: r.Drops,
		})
	}
	return w.listened, nil
}

func (r *listenersListenerRecord) addrPort() netip.AddrPort {
	raw := *(*[16]byte)(unsafe.Pointer(&r.Address))
	if r.Family == unix.AF_INET6 {
		return netip.AddrPortFrom(netip.AddrFrom16(raw), r.Port)
	}
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte(raw[:4])), r.Port)
}

// device is the name of the device that the socket is bound to. Names repeat,
// so each is made a string once; the kernel sets what a name may be.
func (w *Walk) device(r *listenersListenerRecord) string {
	if r.Ifindex == 0 {
		return ""
	}
	raw := *(*[16]byte)(unsafe.Pointer(&r.Device))
	if raw[0] == 0 {
		return "if" + strconv.Itoa(int(r.Ifindex))
	}
	if name, ok := w.devices[raw]; ok {
		return name
	}
	if len(w.devices) >= maxListeners {
		clear(w.devices)
	}
	name := unix.ByteSliceToString(raw[:])
	w.devices[raw] = name
	return name
}
