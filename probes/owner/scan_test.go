package owner

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestScan(t *testing.T) {
	f := open(t, Options{CRI: CRIOff})
	if found, err := f.Scan(nil); err != nil || len(found) != 0 {
		t.Errorf("Scan of nothing: %v, %v", found, err)
	}
	file, inode := listener(t)
	other, otherInode := listener(t)
	defer other.Close()
	self := []uint32{uint32(os.Getpid())}
	found, err := f.Scan(map[uint64]struct{}{inode: {}, otherInode: {}, 1 << 62: {}})
	if err != nil || len(found) != 2 || !slices.Equal(found[inode], self) || !slices.Equal(found[otherInode], self) {
		t.Errorf("found %v, %v", found, err)
	}
	file.Close()
	if found, err = f.Scan(map[uint64]struct{}{inode: {}}); err != nil || len(found) != 0 {
		t.Errorf("found %v, %v after it was closed", found, err)
	}
	f = open(t, Options{ProcFS: filepath.Join(t.TempDir(), "none"), CRI: CRIOff})
	if _, err := f.Scan(map[uint64]struct{}{1: {}}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Scan without a procfs: %v", err)
	}
}

// openFiles gives a made up process links.
func (p *fakeProc) openFiles(pid uint32, links ...string) {
	p.t.Helper()
	p.add(pid, 1, "app", 1, "0::/\n")
	dir := filepath.Join(p.dir, fmt.Sprint(pid), "fd")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		p.t.Fatal(err)
	}
	for i, link := range links {
		if err := os.Symlink(link, filepath.Join(dir, fmt.Sprint(i))); err != nil {
			p.t.Fatal(err)
		}
	}
}

// Whatever is behind a descriptor, only sockets are sockets.
func TestScanReadsSocketsOnly(t *testing.T) {
	p := newFakeProc(t)
	f := openFake(t, p)
	p.openFiles(5, "socket:[7]", "socket:[7]", "/dev/null", "pipe:[7]", "socket:[", "socket:[x]", "socket:[7", "/socket:[7]",
		"socket:[18446744073709551615]", "socket:[18446744073709551616]", strings.Repeat("x", 4000), "anon_inode:[eventpoll]")
	p.openFiles(3, "socket:[7]")
	p.add(9, 1, "no files", 1, "0::/\n")
	found, err := f.Scan(map[uint64]struct{}{7: {}, 8: {}, 1<<64 - 1: {}, 1844674407370955161: {}})
	if err != nil {
		t.Fatal(err)
	}
	if len(found) != 2 || !slices.Equal(found[7], []uint32{3, 5}) || !slices.Equal(found[1<<64-1], []uint32{5}) {
		t.Errorf("found %v", found)
	}
	if f.Unreadable() != 0 || f.Warning() != "" {
		t.Errorf("%d unreadable, %q", f.Unreadable(), f.Warning())
	}
}

// Where there are too many processes, one Scan goes on where the last one stopped.
func TestScanIsBounded(t *testing.T) {
	p := newFakeProc(t)
	for pid := uint32(1); pid <= 25; pid++ {
		p.openFiles(pid, "socket:[7]")
	}
	wanted := map[uint64]struct{}{7: {}}
	look := func(f *Finder, want error) []uint32 {
		found, err := f.Scan(wanted)
		if !errors.Is(err, want) {
			t.Fatalf("Scan: %v, want %v", err, want)
		}
		return found[7]
	}
	f := open(t, Options{ProcFS: p.dir, CRI: CRIOff, MaxProcesses: 10})
	for i, want := range []struct{ first, last uint32 }{{1, 10}, {11, 20}, {1, 25}, {6, 15}} {
		got := look(f, ErrIncomplete)
		switch i {
		case 2: // 21 to 25, and from the beginning
			if len(got) != 10 || got[0] != 1 || got[4] != 5 || got[5] != 21 || got[9] != 25 {
				t.Errorf("Scan %d found %d", i, got)
			}
		default:
			if len(got) != 10 || got[0] != want.first || got[9] != want.last {
				t.Errorf("Scan %d found %d, want %d to %d", i, got, want.first, want.last)
			}
		}
	}
	wantLost(t, f, "owner_scans", 4)

	// No time at all still gets on, by one process each.
	f = open(t, Options{ProcFS: p.dir, CRI: CRIOff})
	if got := look(f, nil); len(got) != 25 {
		t.Errorf("found %d", got)
	}
	wantLost(t, f, "owner_scans", 0)
	f.opts.ScanTime = -1
	seen := make(map[uint32]bool)
	for range 25 {
		for _, pid := range look(f, ErrIncomplete) {
			seen[pid] = true
		}
	}
	if len(seen) != 25 {
		t.Errorf("%d processes were seen in 25 scans", len(seen))
	}
}

// A process that cannot be read is counted once, and forgotten when it has ended.
func TestUnreadableProcesses(t *testing.T) {
	p := newFakeProc(t)
	p.openFiles(5, "socket:[7]")
	f := openFake(t, p)
	for range 2 {
		f.read(5, true)
		f.read(99, true)
	}
	f.warn()
	if f.Unreadable() != 2 || f.Warning() == "" {
		t.Errorf("%d unreadable, %q", f.Unreadable(), f.Warning())
	}
	if _, err := f.Scan(map[uint64]struct{}{7: {}}); err != nil {
		t.Fatal(err)
	}
	if f.Unreadable() != 2 || f.Warning() != "" {
		t.Errorf("%d unreadable, %q, after one can be read and the other is gone", f.Unreadable(), f.Warning())
	}
	f.read(5, true)
	wantLost(t, f, "processes_unreadable", 3)
}

// scanned is what a Scan by another process found.
type scanned struct {
	Found      []uint32
	Unreadable uint64
	Warning    string
	Logged     int
}

const inodeVariable = "SOCKQ_OWNER_INODE"

// scanRole scans twice for a socket.
func scanRole() error {
	var inode uint64
	if _, err := fmt.Sscan(os.Getenv(inodeVariable), &inode); err != nil {
		return err
	}
	log := new(bytes.Buffer)
	f, err := Open(Options{CRI: CRIOff, ScanTime: time.Minute, Logger: slog.New(slog.NewTextHandler(log, nil))})
	if err != nil {
		return err
	}
	defer f.Close()
	var found map[uint64][]uint32
	for range 2 {
		if found, err = f.Scan(map[uint64]struct{}{inode: {}}); err != nil {
			return err
		}
	}
	return json.NewEncoder(os.Stdout).Encode(scanned{found[inode], f.Unreadable(), f.Warning(), bytes.Count(log.Bytes(), []byte("\n"))})
}

// Which rights show whose sockets. What is missing is counted, said once, and with
// the rights that would help.
func TestRights(t *testing.T) {
	needTool(t, "setpriv")
	const nobody, ptrace, list = 65534, "sys_ptrace", "dac_read_search"
	start := func(user uint32) (pid uint32, inode uint64) {
		file, inode := listener(t)
		defer file.Close()
		return beginAs(t, play(t, "hold", file), user).pid, inode
	}
	ofRoot, rootInode := start(0)
	ofUser, userInode := start(1234)
	_, privateInode := start(nobody)

	for _, test := range []struct {
		name             string
		user             uint32
		rights           []string
		seesRoot, sees   bool
		wants, wantsNone string
	}{
		{"nobody", nobody, nil, false, false, "give sockq CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH", ""},
		{"nobody who may trace", nobody, []string{ptrace}, false, false, "give sockq CAP_DAC_READ_SEARCH", ptrace},
		{"nobody who may list", nobody, []string{list}, false, false, "give sockq CAP_SYS_PTRACE", list},
		{"nobody with both", nobody, []string{ptrace, list}, true, true, "", "give"},
		// Not allowed to look into those that have more rights, such as this test.
		{"bare root", 0, nil, false, false, "give sockq CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH", ""},
		{"root who may trace", 0, []string{ptrace}, true, false, "give sockq CAP_DAC_READ_SEARCH", ptrace},
		{"root with both", 0, []string{ptrace, list}, true, true, "", "give"},
	} {
		t.Run(test.name, func(t *testing.T) {
			root := scanAs(t, test.user, test.rights, rootInode)
			if sees := slices.Equal(root.Found, []uint32{ofRoot}); sees != test.seesRoot {
				t.Errorf("of root's process: %+v", root)
			}
			user := scanAs(t, test.user, test.rights, userInode)
			if sees := slices.Equal(user.Found, []uint32{ofUser}); sees != test.sees {
				t.Errorf("of another user's process: %+v", user)
			}
			if !test.sees && (user.Unreadable == 0 || user.Logged != 1) {
				t.Errorf("%+v: not counted, or not logged once", user)
			}
			if test.wants != "" && !strings.HasSuffix(user.Warning, test.wants) || test.wantsNone != "" && strings.Contains(user.Warning, test.wantsNone) {
				t.Errorf("warning %q, want %q", user.Warning, test.wants)
			}
		})
	}
	t.Run("one's own", func(t *testing.T) {
		if got := scanAs(t, nobody, nil, privateInode); len(got.Found) != 1 {
			t.Errorf("%+v", got)
		}
	})
}

// beginAs starts a process as a user, who has no rights unless it is root.
func beginAs(t *testing.T, cmd *exec.Cmd, user uint32) *person {
	t.Helper()
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: user, Gid: user}}
	return begin(t, cmd, false)
}

// scanAs is what a user sees who has these rights alone.
func scanAs(t *testing.T, user uint32, rights []string, inode uint64) (s scanned) {
	t.Helper()
	cmd := play(t, "scan", nil)
	if user == 0 { // root has what its bounding set leaves, others what is ambient
		set := "-all"
		for _, right := range rights {
			set += ",+" + right
		}
		exe, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		env := cmd.Env
		cmd = exec.Command("setpriv", "--bounding-set", set, "--inh-caps", "-all", exe)
		cmd.Env = env
	} else {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: user, Gid: user}}
		for _, right := range rights {
			cmd.SysProcAttr.AmbientCaps = append(cmd.SysProcAttr.AmbientCaps, map[string]uintptr{
				"sys_ptrace": unix.CAP_SYS_PTRACE, "dac_read_search": unix.CAP_DAC_READ_SEARCH,
			}[right])
		}
	}
	cmd.Env = append(cmd.Env, fmt.Sprintf("%s=%d", inodeVariable, inode))
	cmd.Stderr = t.Output()
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %v", cmd, err)
	}
	if err := json.Unmarshal(out, &s); err != nil {
		t.Fatal(err)
	}
	return s
}
