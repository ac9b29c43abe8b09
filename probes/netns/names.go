package netns

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"unicode"
	"unicode/utf8"
)

const (
	// maxNamed is how many entries of the directory of named namespaces are
	// looked at, maxProcesses how many processes.
	maxNamed     = 4096
	maxProcesses = 16384

	other = "other" // stands for a sum of namespaces
)

// Host is the name of the node's own namespace.
const Host = "host"

// Names resolves the inode of a network namespace to a name. It is safe for
// concurrent use.
type Names struct {
	procfs, netnsPath string

	mu         sync.Mutex
	named      map[uint32]string
	pid1       uint32 // 0 if unknown; read once, since it needs a right that may be given up
	unreadable uint64
	// What could not be read last time, so that it is counted once.
	failedNames, failedProcesses map[string]struct{}
}

// NewNames makes Names over a mount of procfs (/proc) and the directory in
// which ip netns keeps its mounts (/run/netns). It knows no name before the
// first Refresh.
func NewNames(procfs, netnsPath string) *Names {
	return &Names{procfs: procfs, netnsPath: netnsPath}
}

// Refresh reads the names anew; those that are gone are forgotten, and so are
// all if it fails. A directory that is not there has no names. It fails only if
// the directory is there and cannot be read. PID 1 stays where it was found.
//
// What cannot be read, or has no usable name, is skipped and counted: the link
// of PID 1 (which needs the right to ptrace it), a plain file whose mount is
// gone, a name that could be taken for something else, entries over 4096.
func (n *Names) Refresh() error {
	failed := make(map[string]struct{})
	n.mu.Lock()
	pid1 := n.pid1
	n.mu.Unlock()
	if pid1 == 0 {
		var err error
		pid1Path := filepath.Join(n.procfs, "1/ns/net")
		if pid1, err = linkInode(pid1Path); err != nil {
			failed[pid1Path] = struct{}{}
		}
	}
	entries, dirErr := n.entries(failed)
	named := make(map[uint32]string, len(entries))
	for _, entry := range entries {
		if !usable(entry) {
			failed[entry] = struct{}{}
			continue
		}
		inode, err := fileInode(filepath.Join(n.netnsPath, entry))
		if err != nil {
			if !errors.Is(err, fs.ErrNotExist) {
				failed[entry] = struct{}{}
			}
			continue
		}
		// Of several names the first in alphabetical order, whatever the
		// order of the directory.
		if _, ok := named[inode]; !ok {
			named[inode] = entry
		}
	}

	n.mu.Lock()
	defer n.mu.Unlock()
	n.pid1, n.named = pid1, named
	n.failedNames = n.count(n.failedNames, failed)
	return dirErr
}

// count adds what failed now and did not before. It returns now.
func (n *Names) count(before, now map[string]struct{}) map[string]struct{} {
	for what := range now {
		if _, ok := before[what]; !ok {
			n.unreadable++
		}
	}
	return now
}

// entries lists the directory of named namespaces, sorted.
func (n *Names) entries(failed map[string]struct{}) ([]string, error) {
	names, more, err := readNames(n.netnsPath, maxNamed)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if more || err != nil {
		failed[n.netnsPath] = struct{}{}
	}
	if err != nil {
		return nil, fmt.Errorf("list named network namespaces: %w", err)
	}
	slices.Sort(names)
	return names, nil
}

// readNames lists at most limit entries of a directory.
func readNames(dir string, limit int) (names []string, more bool, err error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, false, err
	}
	defer d.Close()
	names, err = d.Readdirnames(limit + 1)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, false, err
	}
	if len(names) > limit {
		return names[:limit], true, nil
	}
	return names, false, nil
}

// usable tells whether a file name can be shown as the name of a namespace. It
// must not be taken for the host's, for a sum, for an inode number, or for
// anything else by characters that are invisible or no text. NAME_MAX bounds it
// to 255 bytes.
func usable(name string) bool {
	if name == Host || name == other || !utf8.ValidString(name) {
		return false
	}
	if strings.Trim(name, "0123456789") == "" {
		return false
	}
	for _, r := range name {
		if !unicode.IsPrint(r) || r == ' ' {
			return false
		}
	}
	return true
}

// Name is the name of the namespace with that inode; initial tells that it is
// the kernel's init_net.
//
// "host" is the namespace of PID 1 under procfs or, where its link cannot be
// read, the initial one. It wins over every other name. Next comes the name
// under netnsPath, as long as it is printable UTF-8 without spaces and neither
// "host" nor "other" nor a number: such a namespace is shown by its inode, as
// are those without a name. A name has at most 255 bytes.
func (n *Names) Name(inode uint32, initial bool) string {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.pid1 != 0 && inode == n.pid1 || n.pid1 == 0 && initial {
		return Host
	}
	if name, ok := n.named[inode]; ok {
		return name
	}
	return strconv.FormatUint(uint64(inode), 10)
}

// Unreadable counts what could not be read since the start. What stays
// unreadable is counted once.
func (n *Names) Unreadable() uint64 {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.unreadable
}
