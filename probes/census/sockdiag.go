package census

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"sockq/probes/netns"
	"sockq/probes/sockdiag"
	"sockq/probes/tcpstate"
)

const (
	// Between two sweeps over the namespaces that have to be entered for it
	// lies at least this time and this many times what the last one took:
	// 2 % of a CPU at most.
	sweepInterval = time.Second
	sweepShare    = 50
)

// SockDiag asks the kernel for each namespace by NETLINK_SOCK_DIAG. It works on
// every kernel and needs no right for the namespace it runs in. The others it
// has to enter (CAP_SYS_ADMIN, and CAP_SYS_PTRACE to find them), and an answer
// about one costs a walk over the sockets of all.
//
// Listeners and settings of the own namespace are read at every call, those of
// the others at most once a second. The SYN queue's length is not to be had.
//
// Namespaces, Sockets and Listeners may run beside each other, but none beside
// itself.
type SockDiag struct {
	procfs string
	find   func() (map[uint32]string, error)
	own    place
	bound  bool

	connected, listening *sockdiag.Client // of the own namespace

	sockets    Sockets
	ports      map[uint16]bool   // that the namespace being counted listens on
	gaveUp     map[uint16]uint64 // connections of the namespace being counted by port
	listeners  []Listener
	elsewhere  sweep[Listener]
	namespaces []Namespace
	others     sweep[Namespace]

	mu         sync.Mutex
	unreadable uint64
	entered    bool // any of them, ever
	entryError error
	confined   error // why the own one cannot be entered again
}

// place is a namespace while a thread is in it.
type place struct {
	inode   uint32
	cookie  uint64
	initial bool
}

// sweep is what the last visit to all other namespaces found.
type sweep[T any] struct {
	found  map[uint32][]T // by inode
	failed map[uint32]bool
	next   time.Time
}

// OpenSockDiag opens sock_diag in the calling thread's namespace. find lists the
// namespaces that can be entered by inode and path.
func OpenSockDiag(procfs string, find func() (map[uint32]string, error)) (_ *SockDiag, err error) {
	s := &SockDiag{procfs: procfs, find: find, ports: make(map[uint16]bool), gaveUp: make(map[uint16]uint64)}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	if s.connected, err = sockdiag.Dial(); err != nil {
		return nil, err
	}
	if s.listening, err = sockdiag.Dial(); err != nil {
		return nil, err
	}
	if s.own, err = here(); err != nil {
		return nil, err
	}
	if s.bound, err = sockdiag.BoundInactiveSupported(); err != nil {
		return nil, fmt.Errorf("ask for bound sockets: %w", err)
	}
	s.confined = netns.MayEnter()
	return s, nil
}

// here is the calling thread's namespace.
func here() (p place, err error) {
	if p.inode, err = netns.Self(); err != nil {
		return p, err
	}
	known, initial := netns.Initial()
	p.initial = known && initial
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return p, fmt.Errorf("open a socket: %w", err)
	}
	defer unix.Close(fd)
	if cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE); err == nil { // 5.14+
		p.cookie = cookie
	}
	return p, nil
}

// Mechanism is MechanismSockDiag.
func (s *SockDiag) Mechanism() Mechanism { return MechanismSockDiag }

// Bound tells whether this kernel lists bound sockets (6.8+), so that CLOSE is
// counted.
func (s *SockDiag) Bound() bool { return s.bound }

// EntryError says why no other namespace than the own one is read, nil if they
// are, as far as they can be found.
func (s *SockDiag) EntryError() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.entryError == nil && !s.entered && errors.Is(s.confined, unix.EPERM) {
		return s.confined // none may have been found
	}
	return s.entryError
}

// Lost counts visits to namespaces that failed.
func (s *SockDiag) Lost() map[string]uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return map[string]uint64{"namespaces": s.unreadable}
}

// Close closes the sockets.
func (s *SockDiag) Close() error {
	var err error
	for _, c := range []*sockdiag.Client{s.connected, s.listening} {
		if c != nil {
			err = errors.Join(err, c.Close())
		}
	}
	return err
}

// visit calls fn in every namespace but the own one that can be entered, until
// ctx is done. Those that cannot be read are counted and returned; one that went
// meanwhile is neither.
func (s *SockDiag) visit(ctx context.Context, fn func(place, *sockdiag.Client) error) (failed map[uint32]bool, err error) {
	s.mu.Lock()
	denied := s.entryError != nil
	s.mu.Unlock()
	if denied {
		return nil, nil
	}
	paths, err := s.find()
	if err != nil {
		return nil, fmt.Errorf("find network namespaces: %w", err)
	}
	failed = make(map[uint32]bool)
	for inode, path := range paths {
		if inode == s.own.inode {
			continue
		}
		if ctx.Err() != nil {
			return failed, ctx.Err()
		}
		entered := false
		err := netns.Do(path, func() error {
			entered = true
			p, err := here()
			if err != nil {
				return err
			}
			if p.inode != inode {
				return errors.New("the path leads to another namespace now")
			}
			client, err := sockdiag.Dial()
			if err != nil {
				return err
			}
			defer client.Close()
			return fn(p, client)
		})
		if ctx.Err() != nil {
			return failed, ctx.Err()
		}
		s.mu.Lock()
		s.entered = s.entered || entered
		if err != nil && !errors.Is(err, os.ErrNotExist) { // else it is read, or it went
			failed[inode] = true
			s.unreadable++
		}
		// Who may enter none need not try the others.
		if !s.entered && errors.Is(err, unix.EPERM) {
			s.entryError = err
		}
		denied = s.entryError != nil
		s.mu.Unlock()
		if denied {
			break
		}
	}
	return failed, nil
}

// again visits the other namespaces if it is time to. What was found in one that
// cannot be read now is kept once.
func again[T any](s *SockDiag, last *sweep[T], fn func(place, *sockdiag.Client) ([]T, error)) error {
	start := time.Now()
	if start.Before(last.next) {
		return nil
	}
	found := make(map[uint32][]T)
	failed, err := s.visit(context.Background(), func(p place, c *sockdiag.Client) error {
		list, err := fn(p, c)
		if err == nil {
			found[p.inode] = list
		}
		return err
	})
	last.next = start.Add(max(sweepInterval, sweepShare*time.Since(start)))
	if err != nil {
		return err
	}
	for inode := range failed {
		if before, ok := last.found[inode]; ok && !last.failed[inode] {
			found[inode] = before
		}
	}
	last.found, last.failed = found, failed
	return nil
}

// Namespaces reads the settings and counters of the namespaces.
func (s *SockDiag) Namespaces() ([]Namespace, error) {
	runtime.LockOSThread() // for the counters of this thread's namespace
	defer runtime.UnlockOSThread()
	own, err := s.settings(s.own)
	if err != nil {
		return nil, err
	}
	err = again(s, &s.others, func(p place, _ *sockdiag.Client) ([]Namespace, error) {
		n, err := s.settings(p)
		return []Namespace{n}, err
	})
	if err != nil {
		return nil, err
	}
	s.namespaces = append(s.namespaces[:0], own)
	for _, found := range s.others.found {
		s.namespaces = append(s.namespaces, found...)
	}
	return s.namespaces, nil
}

func (s *SockDiag) settings(p place) (Namespace, error) {
	n := Namespace{Inode: p.inode, Cookie: p.cookie, Initial: p.initial, Read: time.Now()}
	for i := range SysctlNames {
		n.Sysctls[i] = -1
		if v, err := netns.Sysctl(s.procfs, sysctlPath(i)); err == nil {
			n.Sysctls[i] = v
		}
	}
	events, err := netns.TCPExt(s.procfs)
	if err != nil {
		return n, err
	}
	for i, name := range EventNames {
		n.Events[i], n.EventsKnown[i] = events[name]
	}
	return n, nil
}

// Sockets dumps all sockets of all namespaces that can be entered.
func (s *SockDiag) Sockets(ctx context.Context) (*Sockets, error) {
	s.sockets = Sockets{Namespaces: s.sockets.Namespaces[:0], BoundKnown: s.bound, GaveUp: s.sockets.GaveUp[:0]}
	if err := s.count(ctx, s.own, s.connected); err != nil {
		return nil, err
	}
	if _, err := s.visit(ctx, func(p place, client *sockdiag.Client) error { return s.count(ctx, p, client) }); err != nil {
		return nil, err
	}
	return &s.sockets, nil
}

// count adds the sockets of one namespace. Like the walk, it may count a socket
// twice that changes while it is counted. Listeners come first in a dump
// (inet_diag_dump_icsk), so the connections after them know their direction.
func (s *SockDiag) count(ctx context.Context, p place, client *sockdiag.Client) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	n := NamespaceSockets{Inode: p.inode, Cookie: p.cookie}
	clear(s.ports)
	clear(s.gaveUp)
	err := client.Dump(sockdiag.Query{Repeats: true}, func(sk *sockdiag.Socket) error {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		state := sk.State.Reported()
		if int(state) < len(n.States) {
			n.States[state]++
		}
		if state == tcpstate.Listen {
			s.ports[sk.Local.Port()] = true
			return nil
		}
		if state == tcpstate.CloseWait && sk.Inode == 0 { // close() would have left CLOSE_WAIT
			s.gaveUp[sk.Local.Port()]++
		}
		receive, send, ok := sk.ByteQueues()
		if !ok || state == tcpstate.Close || receive|send == 0 {
			return nil
		}
		direction := Outbound
		if s.ports[sk.Local.Port()] {
			direction = Inbound
		}
		n.Queues[direction].add(uint64(receive), uint64(send))
		return nil
	})
	if err != nil {
		return err
	}
	s.sockets.Namespaces = append(s.sockets.Namespaces, n)
	for port, connections := range s.gaveUp {
		s.sockets.GaveUp = append(s.sockets.GaveUp, GaveUp{p.inode, p.cookie, port, connections})
	}
	return nil
}

func (q *Queues) add(receive, send uint64) {
	q.ReceiveBytes += receive
	q.SendBytes += send
	q.ReceiveMaxBytes = max(q.ReceiveMaxBytes, receive)
	q.SendMaxBytes = max(q.SendMaxBytes, send)
}

// Listeners dumps the listening sockets.
func (s *SockDiag) Listeners() ([]Listener, error) {
	var err error
	if s.listeners, err = list(s.listeners[:0], s.own, s.listening); err != nil {
		return nil, err
	}
	err = again(s, &s.elsewhere, func(p place, c *sockdiag.Client) ([]Listener, error) {
		return list(nil, p, c)
	})
	if err != nil {
		return nil, err
	}
	for _, found := range s.elsewhere.found {
		s.listeners = append(s.listeners, found...)
	}
	return s.listeners, nil
}

func list(into []Listener, p place, client *sockdiag.Client) ([]Listener, error) {
	query := sockdiag.Query{States: tcpstate.MaskListen, Extensions: sockdiag.ExtSKMemInfo}
	err := client.Dump(query, func(sk *sockdiag.Socket) error {
		length, limit, ok := sk.AcceptQueue()
		if !ok || len(into) == maxListeners {
			return nil
		}
		memory, _ := sk.SKMemInfo()
		into = append(into, Listener{
			Key: sk.Cookie, Cookie: sk.Cookie, Socket: uint64(sk.Inode), Inode: p.inode, NetnsCookie: p.cookie,
			Address: sk.Local, Device: deviceName(sk.Interface), Interface: sk.Interface,
			AcceptQueue: length, Limit: limit, SynQueue: -1, Drops: memory.Drops,
		})
		return nil
	})
	return into, err
}

// deviceName asks the calling thread's namespace.
func deviceName(index uint32) string {
	if index == 0 {
		return ""
	}
	unknown := "if" + strconv.Itoa(int(index))
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return unknown
	}
	defer unix.Close(fd)
	request, err := unix.NewIfreq("x")
	if err != nil {
		return unknown
	}
	request.SetUint32(index)
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFNAME, request); err != nil {
		return unknown
	}
	return request.Name()
}
