package census

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"

	"sockq/probes/tcpstate"
)

const (
	maxProcesses      = 16384   // MAX_PROCESSES
	maxListeningPorts = 65536   // MAX_LISTENING_PORTS
	maxHolders        = 1 << 18 // a listener is counted once for each process
	holdersPerCall    = 32      // HOLDERS_PER_CALL
	batch             = 4096    // entries of a map read or written at once
)

// Holders tells who has TCP sockets open, by an iterator over the open files of
// all processes of the agent's PID namespace (iter/task_file). It needs Linux
// 5.10, CAP_BPF and CAP_PERFMON, and no right over the processes.
//
// A reading visits every open file: its cost grows with their number, not with
// what there is to tell.
//
// A socket without a file has no holder: one that waits for accept(), an orphan,
// one that is on its way through a Unix socket or registered with an io_uring
// only.
//
// Read may run beside everything else, but not beside itself.
type Holders struct {
	objects holdersObjects
	link    *link.Iter

	number    uint32 // of the last reading
	keys      []uint64
	numbers   []uint32
	ports     []uint64
	sockets   []holdersHeldSocket
	buffer    []holdersHolderRecord
	records   []holdersProcessRecord
	processes []holdersProcessKey
	readable  map[uint32]bool
	comms     map[[16]int8]string
	held      Held

	lostMu sync.Mutex
	lost   map[string]uint64
}

// Held is what processes hold, in no order.
type Held struct {
	Listeners []ListenerHolder
	Processes []Process
}

// ListenerHolder is a process that has a listening socket open: it could accept.
type ListenerHolder struct {
	// Socket is the number of the socket's inode, as Listener.Socket.
	Socket uint64
	// PID is the process' number in the agent's PID namespace.
	PID  uint32
	Comm string // of its first thread
}

// Process counts the connections that a process has open in one network
// namespace. One that several processes have open is counted at the first of
// them, an MPTCP connection by its first subflow. A process without anything to
// count is left out.
type Process struct {
	PID         uint32 // as ListenerHolder.PID
	Comm        string
	Inode       uint32 // of the network namespace
	NetnsCookie uint64 // as Namespace.Cookie; 0 before Linux 5.12
	// CloseWait and FinWait2 are connections in these states: the peer has
	// closed and the process has not, or the other way round.
	CloseWait, FinWait2 uint64
	// OldestCloseWait and OldestFinWait2 tell since which Read one of them has
	// been in that state: it has been for at least as long.
	OldestCloseWait, OldestFinWait2 time.Duration
	// QueuesKnown tells that the namespace was given to Read, and that there was
	// place for all listening ports.
	QueuesKnown bool
	Queues      [Directions]Queues
}

// OpenHolders loads the iterator. The error says what is missing.
func OpenHolders() (_ *Holders, err error) {
	h := &Holders{
		buffer: make([]holdersHolderRecord, holdersPerCall), keys: make([]uint64, batch),
		numbers: make([]uint32, batch), sockets: make([]holdersHeldSocket, batch),
		readable: make(map[uint32]bool), comms: make(map[[16]int8]string),
		lost: map[string]uint64{"holders": 0, "held_processes": 0, "held_sockets": 0, "held_ports": 0},
	}
	defer func() {
		if err != nil {
			h.Close()
		}
	}()
	// Before 5.11 maps count against what a process may lock in memory.
	locked := rlimit.RemoveMemlock()
	if err := loadHoldersObjects(&h.objects, nil); err != nil {
		if locked != nil && errors.Is(err, unix.EPERM) && len(missingCapabilities()) == 0 {
			return nil, fmt.Errorf("lift RLIMIT_MEMLOCK (needs CAP_SYS_RESOURCE before Linux 5.11): %w", locked)
		}
		return nil, Explain("load the iterator over open files (Linux 5.10+)", err)
	}
	if h.link, err = link.AttachIter(link.IterOptions{Program: h.objects.ReadFile}); err != nil {
		return nil, Explain("attach the iterator over open files", err)
	}
	return h, nil
}

// Programs are the loaded programs.
func (h *Holders) Programs() []*ebpf.Program { return []*ebpf.Program{h.objects.ReadFile} }

// Lost counts what did not fit.
func (h *Holders) Lost() map[string]uint64 {
	h.lostMu.Lock()
	defer h.lostMu.Unlock()
	lost := make(map[string]uint64, len(h.lost))
	for what, n := range h.lost {
		lost[what] = n
	}
	return lost
}

func (h *Holders) lose(what string, n uint64) {
	if n == 0 {
		return
	}
	h.lostMu.Lock()
	h.lost[what] += n
	h.lostMu.Unlock()
}

// Close unloads the iterator.
func (h *Holders) Close() error {
	var err error
	if h.link != nil {
		err = h.link.Close()
	}
	return errors.Join(err, h.objects.Close())
}

// Read visits every open file. namespaces and listeners are what a Source has
// read just before: they tell the direction of connections. The result is valid
// until the next call. It ends soon after ctx.
func (h *Holders) Read(ctx context.Context, namespaces []Namespace, listeners []Listener) (*Held, error) {
	if err := h.reset(); err != nil {
		return nil, fmt.Errorf("reset holders: %w", err)
	}
	h.number++
	if err := h.tell(namespaces, listeners); err != nil {
		return nil, fmt.Errorf("tell listening ports: %w", err)
	}
	reading := [1]holdersReading{{Number: h.number}}
	if err := writeArray(h.objects.Readings, reading[:]); err != nil {
		return nil, fmt.Errorf("begin to read holders: %w", err)
	}
	if err := h.visit(ctx); err != nil {
		return nil, err
	}
	if err := readArray(h.objects.Readings, reading[:]); err != nil {
		return nil, fmt.Errorf("read holders: %w", err)
	}
	h.lose("held_sockets", uint64(reading[0].LostSockets))
	h.lose("held_processes", uint64(reading[0].LostProcesses))
	h.records = grow(h.records, int(min(reading[0].Processes, maxProcesses)))
	if err := readArray(h.objects.Processes, h.records); err != nil {
		return nil, fmt.Errorf("read processes: %w", err)
	}
	h.result()
	if err := h.forget(); err != nil {
		return nil, fmt.Errorf("forget sockets: %w", err)
	}
	return &h.held, nil
}

// reset takes the slots of the last reading back.
func (h *Holders) reset() error {
	var last [1]holdersReading
	if err := readArray(h.objects.Readings, last[:]); err != nil {
		return err
	}
	h.records = grow(h.records, int(min(last[0].Processes, maxProcesses)))
	if err := readArray(h.objects.Processes, h.records); err != nil {
		return err
	}
	h.processes = h.processes[:0]
	for i := range h.records {
		h.processes = append(h.processes, h.records[i].Key)
	}
	for keys := h.processes; len(keys) > 0; {
		n, err := h.objects.Slots.BatchDelete(keys, nil)
		if err == nil {
			break
		}
		if !errors.Is(err, ebpf.ErrKeyNotExist) {
			return err
		}
		keys = keys[n+1:] // the kernel stops at a slot that was taken back before
	}
	last[0].Processes = 0
	return writeArray(h.objects.Readings, last[:])
}

// tell stamps the ports that are listened on with the number of this reading.
func (h *Holders) tell(namespaces []Namespace, listeners []Listener) error {
	clear(h.readable)
	for i := range namespaces {
		h.readable[namespaces[i].Inode] = true
	}
	h.ports = h.ports[:0]
	for i := range listeners {
		h.ports = append(h.ports, uint64(listeners[i].Inode)<<16|uint64(listeners[i].Address.Port()))
	}
	slices.Sort(h.ports)
	h.ports = slices.Compact(h.ports)
	if n := len(h.ports); n > maxListeningPorts {
		h.lose("held_ports", uint64(n-maxListeningPorts))
		h.ports = h.ports[:maxListeningPorts]
		clear(h.readable) // any direction may be wrong
	}
	if h.stamp() == nil {
		return nil
	}
	// There may be no place beside those of the last reading.
	if err := h.forgetPorts(); err != nil {
		return err
	}
	return h.stamp()
}

func (h *Holders) stamp() error {
	for i := range h.numbers {
		h.numbers[i] = h.number
	}
	for some := range slices.Chunk(h.ports, batch) {
		if _, err := h.objects.Ports.BatchUpdate(some, h.numbers[:len(some)], nil); err != nil {
			return err
		}
	}
	return nil
}

// visit runs the program for every file, as many as it takes in one call at a
// time.
func (h *Holders) visit(ctx context.Context) error {
	h.held.Listeners = h.held.Listeners[:0]
	run, err := h.link.Open()
	if err != nil {
		return fmt.Errorf("iterate over open files: %w", err)
	}
	defer run.Close()
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := run.Read(bytesOf(h.buffer))
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("iterate over open files: %w", err)
		}
		for _, r := range h.buffer[:n/len(bytesOf(h.buffer[:1]))] {
			if r.Pid != 0 {
				h.hold(ListenerHolder{Socket: r.Socket, PID: r.Pid, Comm: h.comm(r.Comm)})
			}
		}
	}
	// One that is open twice was written twice.
	slices.SortFunc(h.held.Listeners, compareHolders)
	h.held.Listeners = slices.Compact(h.held.Listeners)
	return nil
}

func (h *Holders) hold(l ListenerHolder) {
	if len(h.held.Listeners) == maxHolders {
		h.lose("holders", 1)
		return
	}
	h.held.Listeners = append(h.held.Listeners, l)
}

func compareHolders(a, b ListenerHolder) int {
	return cmp.Or(cmp.Compare(a.Socket, b.Socket), cmp.Compare(a.PID, b.PID), cmp.Compare(a.Comm, b.Comm))
}

func (h *Holders) result() {
	h.held.Processes = h.held.Processes[:0]
	for i := range h.records {
		r := &h.records[i]
		p := Process{
			PID: r.Key.Pid, Comm: h.comm(r.Comm), Inode: r.Key.Inum, NetnsCookie: r.Key.NetCookie,
			CloseWait: r.CloseWait, FinWait2: r.FinWait2,
			OldestCloseWait: time.Duration(r.OldestCloseWait), OldestFinWait2: time.Duration(r.OldestFinWait2),
			QueuesKnown: h.readable[r.Key.Inum],
		}
		for d := range p.Queues {
			if q := &r.Queues[d]; p.QueuesKnown {
				p.Queues[d] = Queues{q.ReceiveBytes, q.SendBytes, q.ReceiveMaxBytes, q.SendMaxBytes}
			}
		}
		h.held.Processes = append(h.held.Processes, p)
	}
}

// comm makes each name a string once.
func (h *Holders) comm(raw [16]int8) string {
	if name, ok := h.comms[raw]; ok {
		return name
	}
	if len(h.comms) >= maxProcesses {
		clear(h.comms)
	}
	name := unix.ByteSliceToString(bytesOf(raw[:]))
	h.comms[raw] = name
	return name
}

// forget removes what this reading has not met, and what the next one need not
// know.
func (h *Holders) forget() error {
	if err := h.forgetPorts(); err != nil {
		return err
	}
	return removeOld(h.objects.Held, h.keys, h.sockets, func(_ uint64, s *holdersHeldSocket) bool {
		state := tcpstate.State(s.State)
		return s.Reading != h.number || state != tcpstate.CloseWait && state != tcpstate.FinWait2
	})
}

func (h *Holders) forgetPorts() error {
	return removeOld(h.objects.Ports, h.keys, h.numbers, func(_ uint64, told *uint32) bool { return *told != h.number })
}

// removeOld removes the entries of a hash map that are old. keys and values are its
// buffers, of the same length.
func removeOld[V any](m *ebpf.Map, keys []uint64, values []V, old func(key uint64, value *V) bool) error {
	var cursor ebpf.MapBatchCursor
	for {
		n, err := m.BatchLookup(&cursor, keys, values, nil)
		end := errors.Is(err, ebpf.ErrKeyNotExist)
		if err != nil && !end {
			return err
		}
		remove := keys[:0]
		for i := range n {
			if old(keys[i], &values[i]) {
				remove = append(remove, keys[i])
			}
		}
		if len(remove) > 0 {
			if _, err := m.BatchDelete(remove, nil); err != nil {
				return err
			}
		}
		if end {
			return nil
		}
	}
}
