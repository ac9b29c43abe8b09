package tracker

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"sockq/probes/scenario"
)

// acceptorVariable makes the test binary a program that accepts, on the listener
// that it inherits as descriptor 3, as many connections as its value says, with
// accept() and accept4() in turn.
const acceptorVariable = "SOCKQ_TEST_ACCEPTOR"

func acceptor() int {
	n, err := strconv.Atoi(os.Getenv(acceptorVariable))
	if err != nil {
		return 2
	}
	for i := range n {
		if _, errno := acceptBy(3, i%2 == 0, 0, 0); errno != 0 {
			return 3
		}
	}
	return 0
}

// acceptBy calls accept(), or accept4().
func acceptBy(fd int, old bool, address, length uintptr) (int, unix.Errno) {
	if old {
		r, _, errno := unix.Syscall(unix.SYS_ACCEPT, uintptr(fd), address, length)
		return int(r), errno
	}
	r, _, errno := unix.Syscall6(unix.SYS_ACCEPT4, uintptr(fd), address, length, unix.SOCK_CLOEXEC, 0, 0)
	return int(r), errno
}

// counts waits until exactly this is counted at a listener.
func counts(tb testing.TB, tr *Tracker, id NamespaceID, key uint64, want tally) {
	tb.Helper()
	become(tb, "listener", want, func() tally { return tallyOf(heard(tb, tr, id)[key]) })
}

// acceptRoom is a namespace with a listener in it.
type acceptRoom struct {
	*testing.T
	tr *Tracker
	ns *scenario.Namespace
	id NamespaceID
	l  endpoint
}

// newAcceptRoom returns nil on kernels that tell of no accepts.
func newAcceptRoom(t *testing.T) *acceptRoom {
	t.Helper()
	if !needs(t, StoryAccepts) {
		return nil
	}
	r := &acceptRoom{T: t, tr: share(t), ns: scenario.NewNamespace(t)}
	r.id = identify(t, r.ns)
	r.l = listenIn(t, r.ns, 5)
	t.Cleanup(func() { unix.Close(r.l.fd) })
	return r
}

// dial makes connections that end with the test.
func (r *acceptRoom) dial(n int) {
	r.Helper()
	for range n {
		client := dial(r, r.ns, r.l)
		r.Cleanup(func() { unix.Close(client.fd) })
	}
}

func (r *acceptRoom) counts(connections, accepts uint64) {
	r.Helper()
	counts(r, r.tr, r.id, r.l.cookie(), tally{connections, accepts, accepts, 5, true})
	if got := len(heard(r, r.tr, r.id)); got != 1 {
		r.Errorf("%d listeners, want 1", got)
	}
}

func TestAcceptByEachCall(t *testing.T) {
	r := newAcceptRoom(t)
	if r == nil {
		return
	}
	r.dial(4)
	for i := range 4 {
		before, err := monotonic()
		r.l.must(err)
		fd, errno := acceptBy(r.l.fd, i%2 == 0, 0, 0)
		if errno != 0 {
			t.Fatal(errno)
		}
		after, err := monotonic()
		r.l.must(err, unix.Close(fd))
		if at := heard(t, r.tr, r.id)[r.l.cookie()].LastAccept; at < before || at > after {
			t.Errorf("last accept at %s, it was between %s and %s", at, before, after)
		}
	}
	r.counts(4, 4)
}

// The descriptor that accept() is given need not be the first one.
func TestAcceptThroughOtherDescriptors(t *testing.T) {
	r := newAcceptRoom(t)
	if r == nil {
		return
	}
	r.dial(4)
	duplicate, err := unix.Dup(r.l.fd)
	r.l.must(err)
	endpoint{t, duplicate}.accept().close()

	high, err := unix.FcntlInt(uintptr(r.l.fd), unix.F_DUPFD_CLOEXEC, 1500)
	r.l.must(err)
	endpoint{t, high}.accept().close()

	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	r.l.must(err)
	r.l.must(unix.Sendmsg(pair[0], []byte("x"), unix.UnixRights(r.l.fd), nil, 0))
	control := make([]byte, 64)
	_, n, _, _, err := unix.Recvmsg(pair[1], make([]byte, 1), control, 0)
	r.l.must(err)
	messages, err := unix.ParseSocketControlMessage(control[:n])
	r.l.must(err)
	passed, err := unix.ParseUnixRights(&messages[0])
	r.l.must(err)
	for range 2 {
		endpoint{t, passed[0]}.accept().close()
	}
	for _, fd := range []int{duplicate, high, pair[0], pair[1], passed[0]} {
		r.l.must(unix.Close(fd))
	}
	r.counts(4, 4)
}

// Processes and threads share a listener.
func TestAcceptByWorkers(t *testing.T) {
	r := newAcceptRoom(t)
	if r == nil {
		return
	}
	const each = 3
	errs := make(chan error)
	for range 2 {
		worker := exec.Command(os.Args[0])
		worker.Env = append(os.Environ(), acceptorVariable+"="+strconv.Itoa(each))
		duplicate, err := unix.FcntlInt(uintptr(r.l.fd), unix.F_DUPFD_CLOEXEC, 0)
		r.l.must(err)
		file := os.NewFile(uintptr(duplicate), "listener")
		worker.ExtraFiles = []*os.File{file}
		r.l.must(worker.Start(), file.Close())
		go func() { errs <- worker.Wait() }()
	}
	for range 2 {
		go func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			for range each {
				fd, _, err := unix.Accept4(r.l.fd, unix.SOCK_CLOEXEC)
				if err != nil {
					errs <- fmt.Errorf("accept: %w", err)
					return
				}
				unix.Close(fd)
			}
			errs <- nil
		}()
	}
	// One at a time: the queue has room for six.
	for n := range uint32(4 * each) {
		r.dial(1)
		become(t, "accepts", uint64(n)+1, func() uint64 { return heard(t, r.tr, r.id)[r.l.cookie()].Accepts })
	}
	for range 4 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	r.counts(4*each, 4*each)
}

func TestAcceptThatReturnsNothing(t *testing.T) {
	r := newAcceptRoom(t)
	if r == nil {
		return
	}
	r.l.must(unix.SetNonblock(r.l.fd, true))
	for i := range 4 {
		if _, errno := acceptBy(r.l.fd, i%2 == 0, 0, 0); errno != unix.EAGAIN {
			t.Fatal(errno)
		}
	}
	if _, errno := acceptBy(1<<20, true, 0, 0); errno != unix.EBADF {
		t.Fatal(errno)
	}
	r.dial(1)
	r.l.queued(1)
	r.l.accept().close()
	r.counts(1, 1)
}

// The kernel closes a connection whose address it cannot hand over: it left the
// queue, but accept() returned none.
func TestAcceptWithABadAddress(t *testing.T) {
	r := newAcceptRoom(t)
	if r == nil {
		return
	}
	before := lost(t, r.tr)
	r.dial(3)
	length := int32(unix.SizeofSockaddrAny)
	for i := range 2 {
		_, errno := acceptBy(r.l.fd, i == 0, 8, uintptr(unsafe.Pointer(&length)))
		if errno != unix.EFAULT {
			t.Fatal(errno)
		}
	}
	r.l.accept().close()
	r.l.queued(0)
	r.counts(3, 1)
	if got := lost(t, r.tr)["tracked_accepts"] - before["tracked_accepts"]; got != 0 {
		t.Errorf("%d accepts lost", got)
	}
}

// While accept() waits another thread closes the descriptor: the connection is
// accepted, and nobody can tell where.
func TestAcceptOnADescriptorThatIsGone(t *testing.T) {
	r := newAcceptRoom(t)
	if r == nil {
		return
	}
	key, address := r.l.cookie(), r.l.address()
	duplicate, err := unix.Dup(r.l.fd)
	r.l.must(err)
	tid := make(chan int)
	accepted := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		tid <- unix.Gettid()
		fd, errno := acceptBy(duplicate, false, 0, 0)
		if errno != 0 {
			accepted <- errno
			return
		}
		accepted <- unix.Close(fd)
	}()
	sleeping(t, <-tid, unix.SYS_ACCEPT4)
	before := lost(t, r.tr)["tracked_accepts"]
	r.l.must(unix.Close(duplicate))
	client := within(t, r.ns, unix.AF_INET, 0, 0)
	client.must(unix.Connect(client.fd, address), <-accepted)
	client.close()
	counts(t, r.tr, r.id, key, tally{1, 0, 0, 5, true})
	if got := lost(t, r.tr)["tracked_accepts"] - before; got != 1 {
		t.Errorf("%d accepts lost, want 1", got)
	}
}

// sleeping waits until a thread sleeps in a system call.
func sleeping(tb testing.TB, tid, call int) {
	tb.Helper()
	become(tb, "system call", strconv.Itoa(call), func() string {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/syscall", tid))
		number, _, _ := strings.Cut(string(b), " ")
		return strings.TrimSpace(number)
	})
}

// A client that is gone before accept() is accepted all the same.
func TestAcceptOfWhatWasReset(t *testing.T) {
	r := newAcceptRoom(t)
	if r == nil {
		return
	}
	for range 2 {
		dial(t, r.ns, r.l).reset()
	}
	dial(t, r.ns, r.l).close()
	r.l.queued(3)
	for range 3 {
		r.l.accept().close()
	}
	r.counts(3, 3)
}

// What is not accepted ends with the listener.
func TestNeverAccepted(t *testing.T) {
	r := newAcceptRoom(t)
	if r == nil {
		return
	}
	key := r.l.cookie()
	r.dial(3)
	r.l.queued(3)
	r.l.accept().close()
	r.l.must(unix.Shutdown(r.l.fd, unix.SHUT_RD))
	counts(t, r.tr, r.id, key, tally{3, 1, 1, 5, true})
}

// MPTCP's own sockets have states, too, that are not TCP's. Its listener is the
// TCP socket that carries it, which nobody can ask for its cookie.
func TestAcceptMPTCP(t *testing.T) {
	if !needs(t, StoryAccepts) {
		return
	}
	tr, ns := share(t), scenario.NewNamespace(t)
	id := identify(t, ns)
	has := false
	ns.Do(func() {
		_, err := os.Stat("/proc/sys/net/mptcp/enabled")
		has = err == nil
	})
	if !has {
		if os.Getenv("CI") == "true" {
			t.Fatal("this kernel has no MPTCP")
		}
		t.Skip("this kernel has no MPTCP")
	}
	ns.Sysctl("net.mptcp.enabled", "1")
	l := within(t, ns, unix.AF_INET, 0, unix.IPPROTO_MPTCP)
	l.must(unix.Bind(l.fd, loopback4(0)), unix.Listen(l.fd, 7))
	for _, protocol := range []int{unix.IPPROTO_TCP, unix.IPPROTO_MPTCP, unix.IPPROTO_MPTCP} {
		client := within(t, ns, unix.AF_INET, 0, protocol)
		client.must(unix.Connect(client.fd, l.address()))
		l.accept().reset()
		client.close()
	}
	become(t, "listeners", []tally{{3, 3, 3, 7, true}}, func() (list []tally) {
		for _, found := range heard(t, tr, id) {
			list = append(list, tallyOf(found))
		}
		return list
	})
	l.close()
	become(t, "connections", [5]uint64{3, 3, 3, 3, 1}, func() [5]uint64 {
		n := happened(t, tr, id)
		return [5]uint64{
			count(&n, closed, synSent), count(&n, synSent, established),
			count(&n, listens, synRecv), count(&n, synRecv, established), count(&n, listens, closed),
		}
	})
	if n := happened(t, tr, id); n.Unexpected != nil {
		t.Errorf("unexpected transitions %v", n.Unexpected)
	}
}
