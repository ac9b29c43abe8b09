package netns

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

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
// (/proc/net/netstat, netstat_seq_show), by the kernel's names; those that this
// kernel does not have are absent. The procfs library has a reader too, which
// leaves some of them out (v0.22: TCPAbortOnMemory, TCPBacklogDrop…).
func TCPExt(proc string) (map[string]uint64, error) {
	// A thread may be in a namespace of its own: /proc/net is the process's.
	b, err := os.ReadFile(filepath.Join(proc, "thread-self/net/netstat"))
	if err != nil {
		return nil, fmt.Errorf("read TcpExt: %w", err)
	}
	counters, err := parseTCPExt(string(b))
	if err != nil {
		return nil, fmt.Errorf("read TcpExt: %w", err)
	}
	return counters, nil
}

// parseTCPExt pairs the line of names with the line of values.
func parseTCPExt(netstat string) (map[string]uint64, error) {
	var names []string
	for line := range strings.Lines(netstat) {
		rest, ok := strings.CutPrefix(line, "TcpExt:")
		if !ok {
			continue
		}
		fields := strings.Fields(rest)
		if names == nil {
			names = fields
			continue
		}
		if len(fields) != len(names) {
			return nil, fmt.Errorf("%d names and %d values", len(names), len(fields))
		}
		counters := make(map[string]uint64, len(names))
		for i, name := range names {
			v, err := strconv.ParseUint(fields[i], 10, 64)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
			counters[name] = v
		}
		return counters, nil
	}
	return nil, errors.New("no TcpExt lines")
}
