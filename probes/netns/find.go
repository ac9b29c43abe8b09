package netns

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// Find maps inodes of network namespaces to a path by which Do can enter them:
// a name under netnsPath, else the link of a process under procfs, our own
// first. It reads the directories anew.
//
// A namespace without a name and a process, kept by a socket or a descriptor,
// has no path. A path is true only for the moment: who enters it compares Self.
// Processes over 16384, and those whose link cannot be read, are skipped and
// counted. It fails if procfs cannot be listed.
func (n *Names) Find() (map[uint32]string, error) {
	paths := make(map[uint32]string)
	entries, err := n.entries(make(map[string]struct{}))
	if err != nil {
		entries = nil // Refresh tells about it
	}
	for _, entry := range entries {
		path := filepath.Join(n.netnsPath, entry)
		inode, err := fileInode(path)
		if err != nil {
			continue
		}
		if _, ok := paths[inode]; !ok {
			paths[inode] = path
		}
	}

	failed := make(map[string]struct{})
	pids, more, err := readNames(n.procfs, maxProcesses)
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	if more {
		failed[n.procfs] = struct{}{}
	}
	for _, pid := range append([]string{"self"}, pids...) {
		if _, err := strconv.ParseUint(pid, 10, 32); err != nil && pid != "self" {
			continue
		}
		path := filepath.Join(n.procfs, pid, "ns/net")
		inode, err := linkInode(path)
		switch {
		case err == nil:
			if _, ok := paths[inode]; !ok {
				paths[inode] = path
			}
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ESRCH): // it exited
		default:
			failed[path] = struct{}{}
		}
	}

	n.mu.Lock()
	defer n.mu.Unlock()
	n.failedProcesses = n.count(n.failedProcesses, failed)
	return paths, nil
}
