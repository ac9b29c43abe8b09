package netns

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// unshare makes a network namespace and hands its link to keep, before the
// thread that made it goes away.
func unshare(t *testing.T, keep func(link string) error) (inode uint32) {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("making a network namespace needs root")
		}
		t.Skip("making a network namespace needs root")
	}
	result := make(chan error)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// The main thread does not end: leave it to nobody until
			// the namespace was made elsewhere.
			defer runtime.UnlockOSThread()
			inode = unshare(t, keep)
			result <- nil
			return
		}
		result <- func() (err error) {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("unshare: %w", err)
			}
			if inode, err = Self(); err != nil {
				return err
			}
			return keep(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()))
		}()
	}()
	if err := <-result; err != nil {
		t.Fatal(err)
	}
	return inode
}

// mounted makes a namespace that only a bind mount keeps.
func mounted(t *testing.T, path string) (inode uint32) {
	t.Helper()
	if err := os.WriteFile(path, nil, 0o444); err != nil {
		t.Fatal(err)
	}
	return unshare(t, func(link string) error {
		if err := unix.Mount(link, path, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("bind mount: %w", err)
		}
		t.Cleanup(func() { _ = unix.Unmount(path, unix.MNT_DETACH) })
		return nil
	})
}

// anonymous makes a namespace that only a descriptor keeps.
func anonymous(t *testing.T) (inode uint32, path string) {
	t.Helper()
	inode = unshare(t, func(link string) error {
		fd, err := open(link)
		if err != nil {
			return err
		}
		t.Cleanup(func() { unix.Close(fd) })
		path = fmt.Sprintf("/proc/self/fd/%d", fd)
		return nil
	})
	return inode, path
}

func decimal(inode uint32) string { return strconv.FormatUint(uint64(inode), 10) }

func refresh(t *testing.T, n *Names) {
	t.Helper()
	if err := n.Refresh(); err != nil {
		t.Fatal(err)
	}
}

func wantName(t *testing.T, n *Names, inode uint32, initial bool, want string) {
	t.Helper()
	if got := n.Name(inode, initial); got != want {
		t.Errorf("Name(%d, %t) = %q, want %q", inode, initial, got, want)
	}
}

func wantUnreadable(t *testing.T, n *Names, want uint64) {
	t.Helper()
	if got := n.Unreadable(); got != want {
		t.Errorf("Unreadable() = %d, want %d", got, want)
	}
}

// fakeProc is a procfs with processes in the given namespaces.
func fakeProc(t *testing.T, links map[string]string) string {
	t.Helper()
	proc := t.TempDir()
	for pid, link := range links {
		dir := filepath.Join(proc, pid, "ns")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if link == "" { // a link that cannot be read
			if err := os.Mkdir(filepath.Join(dir, "net"), 0o755); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if err := os.Symlink(link, filepath.Join(dir, "net")); err != nil {
			t.Fatal(err)
		}
	}
	return proc
}

func TestNamesComeAndGo(t *testing.T) {
	dir := t.TempDir()
	n := NewNames(fakeProc(t, map[string]string{"1": "net:[7]"}), dir)
	red := mounted(t, filepath.Join(dir, "red"))
	wantName(t, n, red, false, decimal(red)) // nothing was read yet
	refresh(t, n)
	wantName(t, n, red, false, "red")

	blue := mounted(t, filepath.Join(dir, "blue"))
	nameless, _ := anonymous(t)
	refresh(t, n)
	wantName(t, n, red, false, "red")
	wantName(t, n, blue, false, "blue")
	wantName(t, n, nameless, false, decimal(nameless))

	// As ip netns del does it.
	if err := unix.Unmount(filepath.Join(dir, "red"), unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, "red")); err != nil {
		t.Fatal(err)
	}
	refresh(t, n)
	wantName(t, n, red, false, decimal(red))
	wantName(t, n, blue, false, "blue")
	wantUnreadable(t, n, 0)

	if err := unix.Unmount(filepath.Join(dir, "blue"), unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	for range 2 { // what stays unreadable is counted once
		refresh(t, n)
		wantName(t, n, blue, false, decimal(blue))
		wantUnreadable(t, n, 1)
	}
}

func TestHost(t *testing.T) {
	dir := t.TempDir()
	host := mounted(t, filepath.Join(dir, "outside"))
	readable := NewNames(fakeProc(t, map[string]string{"1": fmt.Sprintf("net:[%d]", host)}), dir)
	refresh(t, readable)
	wantName(t, readable, host, false, "host")
	wantName(t, readable, 4, true, "4") // the initial one is not PID 1's
	wantUnreadable(t, readable, 0)

	for name, link := range map[string]string{
		"unreadable": "", "other": "mnt:[4026531840]", "empty": "net:[]", "large": "net:[4294967296]",
	} {
		t.Run(name, func(t *testing.T) {
			n := NewNames(fakeProc(t, map[string]string{"1": link}), dir)
			refresh(t, n)
			wantName(t, n, host, false, "outside")
			wantName(t, n, 4, true, "host")
			wantName(t, n, host, true, "host")
			wantUnreadable(t, n, 1)
		})
	}
}

func TestHostileNames(t *testing.T) {
	dir := t.TempDir()
	n := NewNames(fakeProc(t, map[string]string{"1": "net:[7]"}), dir)
	hostile := []string{
		"host", "other", "4026531840", "1", "a b", "line\nbreak", "esc\x1b[2J", "\xff\xfe",
		"right\u202eleft", "nul\u200bwidth", "nbsp\u00a0",
	}
	var inodes []uint32
	for _, name := range hostile {
		inodes = append(inodes, mounted(t, filepath.Join(dir, name)))
	}
	good := []string{"cni-5d1c7ba9-11f0", "büro", "a", strings.Repeat("x", 255), "host1", "10.0.0.1"}
	for _, name := range good {
		inodes = append(inodes, mounted(t, filepath.Join(dir, name)))
	}
	refresh(t, n)
	for i, inode := range inodes {
		want := decimal(inode)
		if i >= len(hostile) {
			want = good[i-len(hostile)]
		}
		wantName(t, n, inode, false, want)
	}
	wantUnreadable(t, n, uint64(len(hostile)))
}

func TestEntriesThatAreNoNamespaces(t *testing.T) {
	dir := t.TempDir()
	n := NewNames(fakeProc(t, map[string]string{"1": "net:[7]"}), dir)
	if err := unix.Mkfifo(filepath.Join(dir, "fifo"), 0o666); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "directory"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("loop", filepath.Join(dir, "loop")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/proc/self/ns/mnt", filepath.Join(dir, "mount-namespace")); err != nil {
		t.Fatal(err)
	}
	refresh(t, n)
	wantUnreadable(t, n, 4)

	// Two names of one namespace, one of them a link, as for docker.
	inode := mounted(t, filepath.Join(dir, "b"))
	if err := os.Symlink("b", filepath.Join(dir, "a")); err != nil {
		t.Fatal(err)
	}
	refresh(t, n)
	wantName(t, n, inode, false, "a")
	wantUnreadable(t, n, 4)
}

func TestDirectoryOfNames(t *testing.T) {
	proc := fakeProc(t, map[string]string{"1": "net:[7]"})
	absent := NewNames(proc, filepath.Join(t.TempDir(), "absent"))
	refresh(t, absent)
	wantUnreadable(t, absent, 0)

	dir := t.TempDir()
	inode := mounted(t, filepath.Join(dir, "red"))
	n := NewNames(proc, dir)
	refresh(t, n)
	n.netnsPath = filepath.Join(dir, "red")
	if err := n.Refresh(); err == nil {
		t.Error("Refresh() of a file succeeded")
	}
	wantName(t, n, inode, false, decimal(inode))
	wantUnreadable(t, n, 1)
}

func TestManyEntries(t *testing.T) {
	dir := t.TempDir()
	n := NewNames(fakeProc(t, map[string]string{"1": "net:[7]"}), dir)
	for i := range maxNamed + 10 {
		if err := os.WriteFile(filepath.Join(dir, "f"+strconv.Itoa(i)), nil, 0o444); err != nil {
			t.Fatal(err)
		}
	}
	refresh(t, n)
	wantUnreadable(t, n, maxNamed+1)
}

func TestSelfAndInitial(t *testing.T) {
	inode, path := anonymous(t)
	var inside uint32
	var known, initial bool
	err := Do(path, func() (err error) {
		inside, err = Self()
		known, initial = Initial()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if inside != inode {
		t.Errorf("Self() = %d inside of %d", inside, inode)
	}
	if !known || initial {
		t.Errorf("Initial() = %t, %t in a new namespace", known, initial)
	}

	// A process in a network namespace of its own has no way to tell where
	// the initial one is; since 6.18 that has a number of its own
	// (NET_NS_INIT_INO, include/uapi/linux/nsfs.h).
	outside, err := Self()
	if err != nil {
		t.Fatal(err)
	}
	if outside == 0xEFFFFFF9 {
		if known, initial := Initial(); !known || !initial {
			t.Errorf("Initial() = %t, %t in init_net", known, initial)
		}
	}
}

func TestDoLeaksNoThread(t *testing.T) {
	inode, path := anonymous(t)
	outside, err := Self()
	if err != nil {
		t.Fatal(err)
	}
	failure := errors.New("failure")
	for range 50 {
		if err := Do(path, func() error { return failure }); !errors.Is(err, failure) {
			t.Fatalf("Do() = %v, want the function's error", err)
		}
	}
	if err := Do(path, func() error { runtime.Goexit(); return nil }); !errors.Is(err, errNoReturn) {
		t.Errorf("Do() = %v after Goexit", err)
	}
	if now, err := Self(); err != nil || now != outside {
		t.Errorf("Self() = %d, %v after Do, want %d", now, err, outside)
	}
	// The threads end shortly after Do returned.
	deadline := time.Now().Add(10 * time.Second)
	for {
		left := 0
		tasks, err := filepath.Glob("/proc/self/task/*/ns/net")
		if err != nil {
			t.Fatal(err)
		}
		for _, task := range tasks {
			if other, err := linkInode(task); err == nil && other == inode {
				left++
			}
		}
		if left == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d threads are left in the namespace", left)
		}
		time.Sleep(time.Millisecond)
	}
}

func TestDoErrors(t *testing.T) {
	_, path := anonymous(t)
	never := func() error { t.Error("the function was called"); return nil }
	if err := Do(filepath.Join(t.TempDir(), "absent"), never); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Do() = %v, want %v", err, os.ErrNotExist)
	}
	if err := Do("/proc/self/ns/uts", never); !errors.Is(err, unix.EINVAL) {
		t.Errorf("Do() = %v, want %v", err, unix.EINVAL)
	}

	// Capabilities are a thread's own: drop them where the thread ends.
	inode := make(chan error)
	go func() {
		runtime.LockOSThread()
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var none [2]unix.CapUserData
		if err := unix.Capset(&header, &none[0]); err != nil {
			inode <- err
			return
		}
		inode <- enter(path)
	}()
	err := <-inode
	if !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "CAP_SYS_ADMIN") {
		t.Errorf("enter() without capabilities = %v", err)
	}
}

func TestFind(t *testing.T) {
	dir := t.TempDir()
	red := mounted(t, filepath.Join(dir, "red"))
	if err := os.WriteFile(filepath.Join(dir, "stale"), nil, 0o444); err != nil {
		t.Fatal(err)
	}
	unreachable, _ := anonymous(t)
	inhabited, link := anonymous(t)
	var child *exec.Cmd
	err := Do(link, func() error {
		child = exec.Command("/proc/self/exe", "-test.run=^TestFindChild$")
		child.Env = append(os.Environ(), "NETNS_TEST_CHILD=1")
		stdin, err := child.StdinPipe()
		if err != nil {
			return err
		}
		t.Cleanup(func() { stdin.Close(); _ = child.Wait() })
		return child.Start()
	})
	if err != nil {
		t.Fatal(err)
	}

	n := NewNames("/proc", dir)
	paths, err := n.Find()
	if err != nil {
		t.Fatal(err)
	}
	self, err := Self()
	if err != nil {
		t.Fatal(err)
	}
	for inode, want := range map[uint32]string{
		red:       filepath.Join(dir, "red"),
		self:      "/proc/self/ns/net",
		inhabited: fmt.Sprintf("/proc/%d/ns/net", child.Process.Pid),
	} {
		if paths[inode] != want {
			t.Errorf("path of %d is %q, want %q", inode, paths[inode], want)
		}
		err := Do(paths[inode], func() error {
			now, err := Self()
			if err == nil && now != inode {
				err = fmt.Errorf("in %d, want %d", now, inode)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
	if path, ok := paths[unreachable]; ok {
		t.Errorf("path of a namespace that only a descriptor keeps: %q", path)
	}
}

// TestFindChild is the process of TestFind: it lives until its parent lets go.
func TestFindChild(t *testing.T) {
	if os.Getenv("NETNS_TEST_CHILD") == "" {
		return
	}
	_, _ = os.Stdin.Read(make([]byte, 1))
}

func TestFindInFakeProc(t *testing.T) {
	proc := fakeProc(t, map[string]string{
		"1": "net:[7]", "2": "net:[7]", "3": "", "4": "net:[8]", "self": "net:[8]", "irq": "net:[9]", "5": "net:[-1]",
	})
	n := NewNames(proc, filepath.Join(proc, "none"))
	for range 2 {
		paths, err := n.Find()
		if err != nil {
			t.Fatal(err)
		}
		if paths[8] != filepath.Join(proc, "self/ns/net") {
			t.Errorf("path of our own namespace is %q", paths[8])
		}
		if len(paths) != 2 || filepath.Dir(filepath.Dir(filepath.Dir(paths[7]))) != proc {
			t.Errorf("Find() = %v", paths)
		}
		wantUnreadable(t, n, 2)
	}
	if _, err := NewNames(filepath.Join(proc, "absent"), proc).Find(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Find() = %v, want %v", err, os.ErrNotExist)
	}
}
