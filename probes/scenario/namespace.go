package scenario

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"sockq/probes/netns"
	"sockq/probes/sockdiag"
	"sockq/probes/tcpstate"
)

// Namespace is a network namespace of the test's own with lo up. No process
// lives in it.
type Namespace struct {
	tb    testing.TB
	inode uint32
	path  string
	keep  func() // lets go of what keeps it

	mu            sync.Mutex
	diag          *sockdiag.Client
	netstat, snmp *os.File // in /proc/net, as opened inside
	closed        bool
}

// NewNamespace makes a network namespace, which a descriptor keeps until the
// test ends. It fails the test without root.
func NewNamespace(tb testing.TB) *Namespace {
	tb.Helper()
	return newNamespace(tb, onNewThread, keepDescriptor)
}

// Child makes a network namespace from inside n, whose settings decide about
// some of the new one's (net.ipv4.tcp_child_ehash_entries).
func (n *Namespace) Child() *Namespace {
	n.tb.Helper()
	return newNamespace(n.tb, func(fn func() error) error { return netns.Do(n.path, fn) }, keepDescriptor)
}

func keepDescriptor(link string) (string, func(), error) {
	fd, err := unix.Open(link, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", nil, fmt.Errorf("open %s: %w", link, err)
	}
	// Not /proc/self: other processes of the test may enter, too.
	path := fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), fd)
	return path, func() { unix.Close(fd) }, nil
}

// NewNamed makes a network namespace as ip netns add does: a bind mount on
// dir/name keeps it until the test ends. It fails the test without root.
func NewNamed(tb testing.TB, dir, name string) *Namespace {
	tb.Helper()
	return newNamespace(tb, onNewThread, func(link string) (string, func(), error) {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, nil, 0o444); err != nil {
			return "", nil, err
		}
		if err := unix.Mount(link, path, "", unix.MS_BIND, ""); err != nil {
			return "", nil, fmt.Errorf("bind mount %s: %w", path, err)
		}
		return path, func() {
			_ = unix.Unmount(path, unix.MNT_DETACH)
			_ = os.Remove(path)
		}, nil
	})
}

func newNamespace(tb testing.TB, on func(func() error) error, hold func(link string) (path string, keep func(), err error)) *Namespace {
	tb.Helper()
	n := &Namespace{tb: tb}
	if err := on(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unshare network namespace (needs root): %w", err)
		}
		n.path, n.keep, err = hold(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()))
		if err != nil {
			return err
		}
		tb.Cleanup(n.Close)
		if n.inode, err = netns.Self(); err != nil {
			return err
		}
		if n.diag, err = sockdiag.Dial(); err != nil {
			return err
		}
		if n.netstat, err = os.Open("/proc/thread-self/net/netstat"); err != nil {
			return err
		}
		if n.snmp, err = os.Open("/proc/thread-self/net/snmp"); err != nil {
			return err
		}
		return raiseLoopback()
	}); err != nil {
		tb.Fatalf("new network namespace: %v", err)
	}
	return n
}

// onNewThread runs fn on a thread that ends with it.
func onNewThread(fn func() error) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() { // which never ends
			defer runtime.UnlockOSThread()
			result <- onNewThread(fn)
			return
		}
		result <- fn()
	}()
	return <-result
}

// Close lets go of the namespace. It vanishes as soon as no socket keeps it.
func (n *Namespace) Close() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return
	}
	n.closed = true
	if n.diag != nil {
		n.diag.Close()
	}
	for _, f := range []*os.File{n.netstat, n.snmp} {
		if f != nil {
			f.Close()
		}
	}
	n.keep()
}

// Inode is the number of the namespace's nsfs inode.
func (n *Namespace) Inode() uint32 { return n.inode }

// Path is a file by which any process of this machine can enter the namespace,
// as long as it is not closed.
func (n *Namespace) Path() string { return n.path }

// Do runs fn inside the namespace, on a thread of its own. If fn ends the test
// (FailNow, SkipNow), so does Do.
func (n *Namespace) Do(fn func()) {
	n.tb.Helper()
	returned := false
	err := netns.Do(n.path, func() error {
		fn()
		returned = true
		return nil
	})
	if returned {
		return
	}
	if !n.tb.Failed() && !n.tb.Skipped() {
		n.tb.Fatal(err)
	}
	runtime.Goexit()
}

// Sysctl sets a setting of the namespace, such as "net.core.somaxconn".
func (n *Namespace) Sysctl(name, value string) {
	n.tb.Helper()
	n.Do(func() {
		path := "/proc/sys/" + strings.ReplaceAll(name, ".", "/")
		if err := os.WriteFile(path, []byte(value), 0); err != nil {
			n.tb.Fatalf("set sysctl %s: %v", name, err)
		}
	})
}

// ReadSysctl reads a setting of the namespace.
func (n *Namespace) ReadSysctl(name string) (value string) {
	n.tb.Helper()
	n.Do(func() {
		b, err := os.ReadFile("/proc/sys/" + strings.ReplaceAll(name, ".", "/"))
		if err != nil {
			n.tb.Fatalf("read sysctl %s: %v", name, err)
		}
		value = strings.TrimSpace(string(b))
	})
	return value
}

// Netstat reads the TcpExt counters of the namespace (/proc/net/netstat).
func (n *Namespace) Netstat() map[string]uint64 {
	n.tb.Helper()
	return n.counters(n.netstat, "TcpExt:")
}

// SNMP reads the Tcp counters of the namespace (/proc/net/snmp), those of IPv6
// included. MaxConn, which is -1, is not among them.
func (n *Namespace) SNMP() map[string]uint64 {
	n.tb.Helper()
	return n.counters(n.snmp, "Tcp:")
}

// counters reads two lines of a file: the group's names, then its values.
func (n *Namespace) counters(file *os.File, group string) map[string]uint64 {
	n.tb.Helper()
	n.mu.Lock()
	defer n.mu.Unlock()
	b := make([]byte, 64<<10)
	length, err := file.ReadAt(b, 0)
	if length == 0 {
		n.tb.Fatalf("read counters: %v", err)
	}
	counters := make(map[string]uint64)
	var names []string
	for line := range strings.Lines(string(b[:length])) {
		fields := strings.Fields(line)
		switch {
		case len(fields) == 0 || fields[0] != group:
		case names == nil:
			names = fields
		case len(fields) != len(names):
			n.tb.Fatalf("read counters: %d values for %d names", len(fields), len(names))
		default:
			for i, field := range fields[1:] {
				value, err := strconv.ParseUint(field, 10, 64)
				if names[i+1] == "MaxConn" {
					continue
				}
				if err != nil {
					n.tb.Fatalf("read counters: %v", err)
				}
				counters[names[i+1]] = value
			}
		}
	}
	return counters
}

// Sockets asks sock_diag for the namespace's sockets in the given states, with
// SKMEMINFO.
func (n *Namespace) Sockets(states tcpstate.Mask) []sockdiag.Socket {
	n.tb.Helper()
	n.mu.Lock()
	defer n.mu.Unlock()
	sockets, err := n.diag.List(sockdiag.Query{States: states, Extensions: sockdiag.ExtSKMemInfo})
	if err != nil {
		n.tb.Fatal(err)
	}
	return sockets
}
