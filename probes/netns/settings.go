package netns

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strconv"

	"github.com/prometheus/procfs"
)

// Sysctl reads one setting of the calling thread's namespace, by its dotted
// name. The error is fs.ErrNotExist where the namespace or kernel lacks it.
func Sysctl(proc, name string) (int64, error) {
	fs, err := procfs.NewFS(proc)
	if err != nil {
		return 0, err
	}
	values, err := fs.SysctlInts(name)
	if err != nil {
		return 0, fmt.Errorf("read sysctl %s: %w", name, err)
	}
	if len(values) == 0 {
		return 0, fmt.Errorf("read sysctl %s: no value", name)
	}
	return int64(values[0]), nil
}

// TCPExt reads the TcpExt counters of the calling thread's namespace
// (/proc/net/netstat), by the kernel's names; those that this kernel does not
// have are absent.
func TCPExt(proc string) (map[string]uint64, error) {
	// A thread may be in a namespace of its own, and procfs may be another
	// PID namespace's: only thread-self names this thread there.
	self, err := os.Readlink(filepath.Join(proc, "thread-self"))
	if err != nil {
		return nil, fmt.Errorf("read TcpExt: %w", err)
	}
	tid, err := strconv.Atoi(filepath.Base(self))
	if err != nil {
		return nil, fmt.Errorf("read TcpExt: %w", err)
	}
	tasks, err := procfs.NewFS(filepath.Join(proc, filepath.Dir(self)))
	if err != nil {
		return nil, fmt.Errorf("read TcpExt: %w", err)
	}
	thread, err := tasks.Proc(tid)
	if err != nil {
		return nil, fmt.Errorf("read TcpExt: %w", err)
	}
	stat, err := thread.Netstat()
	if err != nil {
		return nil, fmt.Errorf("read TcpExt: %w", err)
	}
	counters := make(map[string]uint64)
	fields := reflect.ValueOf(stat.TcpExt)
	for i := range fields.NumField() {
		if v, ok := fields.Field(i).Interface().(*float64); ok && v != nil {
			counters[fields.Type().Field(i).Name] = uint64(*v)
		}
	}
	return counters, nil
}
