package census

import (
	"errors"
	"fmt"
	"io/fs"
	"runtime"

	"sockq/probes/netns"
)

// validate holds what the walk reads of the calling thread's own namespace
// against procfs, so that a kernel whose structures mean something else is
// noticed and not believed. It also learns how many jiffies make a second.
func (w *Walk) validate() error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	inode, err := netns.Self()
	if err != nil {
		return err
	}
	before, err := netns.TCPExt(w.procfs)
	if err != nil {
		return err
	}
	namespaces, err := w.Namespaces()
	if err != nil {
		return err
	}
	after, err := netns.TCPExt(w.procfs)
	if err != nil {
		return err
	}
	for i := range namespaces {
		if namespaces[i].Inode == inode {
			return w.compare(&namespaces[i], before, after)
		}
	}
	return fmt.Errorf("network namespace %d is not on the kernel's list of %d", inode, len(namespaces))
}

func (w *Walk) compare(own *Namespace, before, after map[string]uint64) error {
	for i, name := range EventNames {
		low, known := before[name]
		if !known || !own.EventsKnown[i] {
			continue
		}
		if v := own.Events[i]; v < low || v > after[name] {
			return fmt.Errorf("%s is %d there and %d in the walk", name, low, v)
		}
	}
	for i := range SysctlNames {
		v, err := netns.Sysctl(w.procfs, sysctlPath(i))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		switch i {
		case SysctlMaxOrphans:
		case SysctlFinTimeout:
			w.learnHZ(own.Inode, v)
		default:
			if own.Sysctls[i] != v {
				return fmt.Errorf("%s is %d there and %d in the walk", SysctlNames[i], v, own.Sysctls[i])
			}
		}
	}
	return nil
}

// learnHZ compares tcp_fin_timeout in jiffies, as struct net has it, with the
// seconds that procfs shows. A namespace with 0 s teaches nothing: then the
// setting stays unknown.
func (w *Walk) learnHZ(inode uint32, seconds int64) {
	w.list.Lock()
	defer w.list.Unlock()
	for i := range w.records {
		if r := &w.records[i]; r.Inum == inode && seconds > 0 {
			w.hz = int64(r.Sysctls[SysctlFinTimeout]) / seconds
		}
	}
}

func sysctlPath(i int) string {
	if i == SysctlSomaxconn {
		return "net.core." + SysctlNames[i]
	}
	return "net.ipv4." + SysctlNames[i]
}
