package netns

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// errNotNamespace says that a file is none of a network namespace, as the plain
// file that ip netns leaves behind when its mount is gone.
var errNotNamespace = errors.New("not a network namespace")

// Self is the inode of the calling thread's network namespace. A caller that
// has changed its namespace needs runtime.LockOSThread.
func Self() (inode uint32, err error) {
	inode, err = linkInode("/proc/thread-self/ns/net")
	if err != nil {
		return 0, fmt.Errorf("read own network namespace: %w", err)
	}
	return inode, nil
}

// Initial tells whether the calling thread is in the kernel's init_net, without
// BPF: tcp_max_orphans is a setting of the whole kernel and so shown only there
// (ipv4_table, net/ipv4/sysctl_net_ipv4.c). known is false if /proc/sys/net
// cannot be read.
func Initial() (known, initial bool) {
	const dir = "/proc/sys/net/ipv4/"
	if _, err := os.Stat(dir + "tcp_syncookies"); err != nil {
		return false, false
	}
	switch _, err := os.Stat(dir + "tcp_max_orphans"); {
	case err == nil:
		return true, true
	case errors.Is(err, os.ErrNotExist):
		return true, false
	}
	return false, false
}

// linkInode reads the inode out of a link of procfs, "net:[4026531840]". It
// needs the right to ptrace the process (PTRACE_MODE_READ), but no descriptor.
func linkInode(path string) (uint32, error) {
	link, err := os.Readlink(path)
	if err != nil {
		return 0, err
	}
	number, ok := strings.CutPrefix(link, "net:[")
	number, closed := strings.CutSuffix(number, "]")
	inode, err := strconv.ParseUint(number, 10, 32)
	if !ok || !closed || err != nil {
		return 0, fmt.Errorf("%s: %w", path, errNotNamespace)
	}
	return uint32(inode), nil
}

// fileInode is the inode of the network namespace that is mounted on path, or
// that a symbolic link there leads to. Whatever else lies there is looked at,
// but not opened: it may be a FIFO or a device.
func fileInode(path string) (uint32, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(path, &fs); err != nil {
		return 0, fmt.Errorf("stat %s: %w", path, err)
	}
	if fs.Type != unix.NSFS_MAGIC {
		return 0, fmt.Errorf("%s: %w", path, errNotNamespace)
	}
	fd, err := open(path)
	if err != nil {
		return 0, fmt.Errorf("open %s: %w", path, err)
	}
	defer unix.Close(fd)
	typ, err := unix.IoctlRetInt(fd, unix.NS_GET_NSTYPE)
	if err != nil || typ != unix.CLONE_NEWNET {
		return 0, fmt.Errorf("%s: %w", path, errNotNamespace)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, fmt.Errorf("stat %s: %w", path, err)
	}
	return uint32(st.Ino), nil
}

func open(path string) (fd int, err error) {
	for {
		fd, err = unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
		if err != unix.EINTR {
			return fd, err
		}
	}
}
