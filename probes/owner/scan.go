package owner

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ErrIncomplete tells that a Scan ended before it had seen all processes.
var ErrIncomplete = errors.New("not all processes were seen in time")

// namesAtOnce is how many entries of a directory are read at once.
const namesAtOnce = 1024

// Scan tells which processes have these sockets open, by the inode numbers of
// sockfs (ls -l /proc/PID/fd: "socket:[N]"), the PIDs of each sorted. It reads
// every descriptor of every process: ask it only for sockets that are new.
//
// The files of other users' processes need CAP_SYS_PTRACE, and CAP_DAC_READ_SEARCH
// to list them: processes that cannot be read are left out and counted
// (Unreadable, Warning). A thread that shares no files with its process is not
// seen. Where ScanTime or MaxProcesses do not suffice, it fails with ErrIncomplete
// beside what it found: others may have these sockets open, too, and the next Scan
// begins with those that this one did not see. Otherwise it fails only if procfs
// cannot be listed.
func (f *Finder) Scan(inodes map[uint64]struct{}) (map[uint64][]uint32, error) {
	f.scan.Lock()
	defer f.scan.Unlock()
	found := make(map[uint64][]uint32)
	if len(inodes) == 0 {
		return found, nil
	}
	pids, err := f.listProcesses()
	if err != nil {
		return nil, err
	}
	// Those after the one at which the last Scan stopped come first.
	first, _ := slices.BinarySearch(pids, f.scanFrom)
	stop := time.Now().Add(f.opts.ScanTime)
	f.scanFrom = 0
	for i, pid := range slices.Concat(pids[first:], pids[:first]) {
		if i >= f.opts.MaxProcesses || i > 0 && time.Now().After(stop) {
			f.scanFrom, err = pid, ErrIncomplete
			break
		}
		refused := f.openFiles(pid, inodes, found, stop)
		f.read(pid, errors.Is(refused, fs.ErrPermission))
		if errors.Is(refused, ErrIncomplete) {
			f.scanFrom, err = pid+1, ErrIncomplete // not this one again and again
			break
		}
	}
	if err != nil {
		f.lost.scans.Add(1)
	}
	for _, holders := range found {
		slices.Sort(holders)
	}
	for pid := range f.refused {
		if _, lives := slices.BinarySearch(pids, pid); !lives {
			delete(f.refused, pid)
		}
	}
	f.warn()
	return found, err
}

// listProcesses lists the processes under procfs, sorted.
func (f *Finder) listProcesses() (pids []uint32, err error) {
	d, err := os.Open(f.opts.ProcFS)
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	defer d.Close()
	for {
		names, err := d.Readdirnames(namesAtOnce)
		for _, name := range names {
			if pid, err := strconv.ParseUint(name, 10, 32); err == nil {
				pids = append(pids, uint32(pid))
			}
		}
		if errors.Is(err, io.EOF) {
			slices.Sort(pids)
			return pids, nil
		}
		if err != nil {
			return nil, fmt.Errorf("list processes: %w", err)
		}
	}
}

// openFiles adds the process to those that have one of the sockets open. It fails
// with ErrIncomplete where the time was up before all of its files were seen, and
// with a permission error where they may not be.
func (f *Finder) openFiles(pid uint32, inodes map[uint64]struct{}, found map[uint64][]uint32, stop time.Time) error {
	d, err := os.Open(filepath.Join(f.opts.ProcFS, strconv.FormatUint(uint64(pid), 10), "fd"))
	if err != nil {
		return err
	}
	defer d.Close()
	dir := int(d.Fd())
	link := make([]byte, len("socket:[]")+20)
	for {
		names, err := d.Readdirnames(namesAtOnce)
		for _, name := range names {
			n, err := unix.Readlinkat(dir, name, link)
			if errors.Is(err, fs.ErrPermission) {
				return err
			}
			if err != nil {
				continue // closed since
			}
			if inode, ok := socketInode(link[:n]); ok {
				_, asked := inodes[inode]
				if holders := found[inode]; asked && (len(holders) == 0 || holders[len(holders)-1] != pid) {
					found[inode] = append(holders, pid)
				}
			}
		}
		if err != nil { // the end, or the process's
			return nil
		}
		if time.Now().After(stop) {
			return ErrIncomplete
		}
	}
}

// socketInode reads "socket:[N]".
func socketInode(link []byte) (uint64, bool) {
	number, ok := bytes.CutPrefix(link, []byte("socket:["))
	if !ok {
		return 0, false
	}
	number, ok = bytes.CutSuffix(number, []byte("]"))
	if !ok {
		return 0, false
	}
	inode, err := strconv.ParseUint(string(number), 10, 64)
	return inode, err == nil
}

// read keeps whether a process could be read, and counts it when it no longer can.
func (f *Finder) read(pid uint32, refused bool) {
	if !refused {
		delete(f.refused, pid)
		return
	}
	if _, ok := f.refused[pid]; !ok {
		f.lost.unreadable.Add(1)
		f.refused[pid] = struct{}{}
	}
}

// warn tells what would help with processes that could not be read, and logs it
// once.
func (f *Finder) warn() {
	if len(f.refused) == 0 {
		f.warning.Store(nil)
		return
	}
	warning := "the open files of some processes may not be read"
	if missing := missingCapabilities(); len(missing) > 0 {
		warning += ": give sockq " + strings.Join(missing, " and ")
	} else {
		warning += ", in spite of CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH: a security module or a user namespace forbids it"
	}
	f.warning.Store(&warning)
	if !f.warned {
		f.warned = true
		f.log.Warn("Some sockets have no owner", "reason", warning, "processes", len(f.refused))
	}
}

// missingCapabilities are those that looking into other users' processes needs and
// this one does not have.
func missingCapabilities() (missing []string) {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if unix.Capget(&header, &data[0]) != nil {
		return nil
	}
	has := func(capability int) bool { return data[capability/32].Effective&(1<<(capability%32)) != 0 }
	if !has(unix.CAP_SYS_PTRACE) {
		missing = append(missing, "CAP_SYS_PTRACE")
	}
	if !has(unix.CAP_DAC_READ_SEARCH) && !has(unix.CAP_DAC_OVERRIDE) {
		missing = append(missing, "CAP_DAC_READ_SEARCH")
	}
	return missing
}
