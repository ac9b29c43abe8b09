package owner

import (
	"bytes"
	"errors"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

const (
	// maxHolders is how many processes that have one socket open are looked at,
	// maxAncestors how many of their ancestors.
	maxHolders   = 1024
	maxAncestors = 1024
	// A process may be moved to another cgroup, which is rare.
	factsLast    = time.Minute
	maxStatBytes = 4096
)

var errNoStat = errors.New("not what proc_pid_stat(5) describes")

// processes reads who processes are, and remembers it.
type processes struct {
	procfs string
	// Facts that were used, and those that were used before these were so many.
	known, before map[uint32]*facts
	most          int
	now           func() time.Time
}

// facts are what is known of one process.
type facts struct {
	stat
	place
	read time.Time
}

// stat is what /proc/PID/stat says of a process.
type stat struct {
	comm   string
	parent uint32 // 0 for none that can be seen
	start  uint64 // in clock ticks after boot
}

func newProcesses(procfs string, most int) *processes {
	return &processes{procfs: procfs, known: make(map[uint32]*facts), most: most, now: time.Now}
}

// facts are those of the process that has this PID now, nil if there is none. It
// reads again what may have changed: another process, another program, a minute.
func (p *processes) facts(pid uint32) *facts {
	s, err := p.stat(pid)
	if err != nil {
		return nil
	}
	f, ok := p.known[pid]
	if !ok {
		f, ok = p.before[pid]
	}
	if !ok || f.start != s.start || f.comm != s.comm || p.now().Sub(f.read) > factsLast {
		f = &facts{read: p.now()}
		if data, err := p.file(pid, "cgroup", maxCgroupBytes); err == nil { // else it just ended
			f.place = parseCgroup(string(data))
		}
	}
	f.stat = s
	if len(p.known) >= p.most/2 {
		p.before, p.known = p.known, make(map[uint32]*facts)
	}
	p.known[pid] = f
	return f
}

// acceptor is the process that would accept, of those (sorted) that have a socket
// open, and how many others there are: the lowest PID of those that are nobody's
// ancestor. It is 0 if none of several lives.
func (p *processes) acceptor(pids []uint32) (pid uint32, others int) {
	if len(pids) == 1 {
		return pids[0], 0
	}
	parents := make(map[uint32]uint32, len(pids))
	for _, pid := range pids {
		if s, err := p.stat(pid); err == nil {
			parents[pid] = s.parent
		}
	}
	holders := make(map[uint32]bool, len(parents)) // and whether they are an ancestor
	for holder := range parents {
		holders[holder] = false
	}
	met := make(map[uint32]struct{})
	left := maxAncestors
	for _, holder := range pids {
		for ancestor := parents[holder]; ancestor != 0; ancestor = parents[ancestor] {
			if _, ok := met[ancestor]; ok {
				break // so were its own
			}
			met[ancestor] = struct{}{}
			if _, ok := holders[ancestor]; ok {
				holders[ancestor] = true
				continue
			}
			if left--; left < 0 {
				break
			}
			if s, err := p.stat(ancestor); err == nil {
				parents[ancestor] = s.parent
			}
		}
	}
	for _, candidate := range pids {
		ancestor, lives := holders[candidate]
		switch {
		case !lives || ancestor:
		case pid == 0:
			pid = candidate
		default:
			others++
		}
	}
	return pid, others
}

// stat reads /proc/PID/stat, which everybody may. It fails if there is no such
// process.
func (p *processes) stat(pid uint32) (stat, error) {
	data, err := p.file(pid, "stat", maxStatBytes)
	if err != nil {
		return stat{}, err
	}
	s, ok := parseStat(data)
	if !ok {
		return stat{}, errNoStat
	}
	return s, nil
}

// parseStat reads "PID (COMM) STATE PARENT …"; the name may have anything in it,
// parentheses and line ends too.
func parseStat(data []byte) (stat, bool) {
	begin, end := bytes.IndexByte(data, '('), bytes.LastIndexByte(data, ')')
	if begin < 0 || end < begin {
		return stat{}, false
	}
	fields := strings.Fields(string(data[end+1:]))
	const parent, start = 1, 19 // fields 4 and 22 of proc_pid_stat(5)
	if len(fields) <= start {
		return stat{}, false
	}
	ppid, err := strconv.ParseUint(fields[parent], 10, 32)
	if err != nil {
		return stat{}, false
	}
	ticks, err := strconv.ParseUint(fields[start], 10, 64)
	comm := string(data[begin+1 : end])
	return stat{strings.ToValidUTF8(comm, string(utf8.RuneError)), uint32(ppid), ticks}, err == nil
}

// file reads a file about a process, or its beginning. Plainly: this is done often,
// and os.File would add a third to what it costs.
func (p *processes) file(pid uint32, file string, most int) ([]byte, error) {
	fd, err := unix.Open(p.procfs+"/"+strconv.FormatUint(uint64(pid), 10)+"/"+file, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	data := make([]byte, 0, min(most, 1024))
	for len(data) < most {
		data = slices.Grow(data, min(most-len(data), 512))
		n, err := unix.Read(fd, data[len(data):min(cap(data), most)])
		if err != nil {
			return nil, err
		}
		if n <= 0 {
			break
		}
		data = data[:len(data)+n]
	}
	return data, nil
}
