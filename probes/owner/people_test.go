package owner

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// The test is also the processes that it starts.
const roleVariable = "SOCKQ_OWNER_ROLE"

var roles = map[string]func() error{
	// hold keeps what it inherited until its input ends.
	"hold": func() error {
		_, err := io.Copy(io.Discard, os.Stdin)
		return err
	},
	// activator has a listener, and starts who shall accept, as systemd does.
	"activator": func() error {
		service := exec.Command("/proc/self/exe")
		service.Env = append(os.Environ(), roleVariable+"=hold")
		service.Stdin, service.ExtraFiles = os.Stdin, []*os.File{os.NewFile(3, "listener")}
		if err := service.Start(); err != nil {
			return err
		}
		fmt.Println(service.Process.Pid)
		return service.Wait()
	},
	// leaver starts two who shall accept, and goes.
	"leaver": func() error {
		for range 2 {
			worker := exec.Command("/proc/self/exe")
			worker.Env = append(os.Environ(), roleVariable+"=hold")
			worker.Stdin, worker.ExtraFiles = os.Stdin, []*os.File{os.NewFile(3, "listener")}
			if err := worker.Start(); err != nil {
				return err
			}
			fmt.Println(worker.Process.Pid)
		}
		return nil
	},
	"listen": func() error {
		listener, err := net.Listen("tcp4", "0.0.0.0:8080")
		if err != nil {
			return err
		}
		defer listener.Close()
		fmt.Println("listening")
		_, err = io.Copy(io.Discard, os.Stdin)
		return err
	},
	"scan": scanRole,
}

func TestMain(m *testing.M) {
	if role := os.Getenv(roleVariable); role != "" {
		if err := roles[role](); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// needTool fails where a test cannot be: on CI everything has to be there.
func needTool(t *testing.T, tools ...string) {
	t.Helper()
	missing := ""
	if os.Geteuid() != 0 {
		missing = "root"
	}
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			missing = tool
		}
	}
	if missing != "" && os.Getenv("CI") == "true" {
		t.Fatalf("this needs %s", missing)
	} else if missing != "" {
		t.Skipf("this needs %s", missing)
	}
}

// person is a process that a test started.
type person struct {
	t     *testing.T
	pid   uint32
	lines *bufio.Scanner
}

// begin starts a process, in a network namespace of its own if it shall; what it
// starts itself ends with its input.
func begin(t *testing.T, cmd *exec.Cmd, namespace bool) *person {
	t.Helper()
	input, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	output, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	log := new(bytes.Buffer)
	cmd.Stderr = log
	if namespace {
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		input.Close()
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("%v said %s", cmd, log)
		}
	})
	return &person{t, uint32(cmd.Process.Pid), bufio.NewScanner(output)}
}

// play is a process in a role, with a listener if there is one.
func play(t *testing.T, role string, listener *os.File) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	// The race detector would wait a second at the end.
	cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0", roleVariable+"="+role)
	if listener != nil {
		cmd.ExtraFiles = []*os.File{listener}
	}
	return cmd
}

// line is the next that the process says.
func (p *person) line() string {
	p.t.Helper()
	if !p.lines.Scan() {
		p.t.Fatalf("it said nothing: %v", p.lines.Err())
	}
	return p.lines.Text()
}

func (p *person) number() uint32 {
	p.t.Helper()
	n, err := strconv.ParseUint(p.line(), 10, 32)
	if err != nil {
		p.t.Fatal(err)
	}
	return uint32(n)
}

// listener is one of the test's own, with its inode; the test lets go of it at its
// end.
func listener(t *testing.T) (*os.File, uint64) {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	file, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	return file, inodeOf(t, file)
}

func inodeOf(t *testing.T, file *os.File) uint64 {
	t.Helper()
	info, err := file.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return info.Sys().(*syscall.Stat_t).Ino
}

// eventually polls until it is so.
func eventually(t *testing.T, what string, so func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !so(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 20 s: %s", what)
		}
	}
}

// listenerOn waits until somebody listens on the port in the namespace of a process,
// and returns the socket's inode.
func listenerOn(t *testing.T, pid uint32, port uint16) (inode uint64) {
	t.Helper()
	eventually(t, fmt.Sprintf("somebody listens on port %d", port), func() bool {
		for _, file := range []string{"tcp", "tcp6"} {
			data, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", pid, file))
			if err != nil {
				t.Fatal(err)
			}
			for line := range strings.Lines(string(data)) {
				fields := strings.Fields(line)
				if fields[3] != "0A" || !strings.HasSuffix(fields[1], fmt.Sprintf(":%04X", port)) {
					continue
				}
				if inode, err = strconv.ParseUint(fields[9], 10, 64); err != nil {
					t.Fatal(err)
				}
				return true
			}
		}
		return false
	})
	return inode
}

// scan is who has the socket open by Scan, and by ss in the namespace of one of them.
func scan(t *testing.T, f *Finder, inode uint64) []uint32 {
	t.Helper()
	found, err := f.Scan(map[uint64]struct{}{inode: {}})
	if err != nil {
		t.Fatal(err)
	}
	pids := found[inode]
	if len(pids) == 0 {
		t.Fatalf("nobody has the socket %d open", inode)
	}
	out, err := exec.Command("nsenter", "-t", fmt.Sprint(pids[0]), "-n", "ss", "-Hltnpe").Output()
	if err != nil {
		t.Fatal(err)
	}
	var want []uint32
	for line := range strings.Lines(string(out)) {
		if !strings.Contains(line, fmt.Sprintf(" ino:%d ", inode)) {
			continue
		}
		for _, match := range regexp.MustCompile(`pid=(\d+)`).FindAllStringSubmatch(line, -1) {
			pid, err := strconv.ParseUint(match[1], 10, 32)
			if err != nil {
				t.Fatal(err)
			}
			want = append(want, uint32(pid))
		}
	}
	slices.Sort(want)
	if want = slices.Compact(want); !slices.Equal(pids, want) {
		t.Errorf("%d have the socket open, ss says %d: %s", pids, want, out)
	}
	return pids
}

// childrenOf are the processes whose parent it is, sorted.
func childrenOf(t *testing.T, parent uint32) (pids []uint32) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/status")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(data), fmt.Sprintf("\nPPid:\t%d\n", parent)) {
			var pid uint32
			if _, err := fmt.Sscanf(file, "/proc/%d/status", &pid); err != nil {
				t.Fatal(err)
			}
			pids = append(pids, pid)
		}
	}
	slices.Sort(pids)
	return pids
}

// comm is what the kernel calls a process.
func comm(t *testing.T, pid uint32) string {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSuffix(string(data), "\n")
}

// wantAccepts tells that a process accepts, and how many others could. Where the
// test itself runs decides about the unit.
func wantAccepts(t *testing.T, f *Finder, inode uint64, pid uint32, process string, others int) {
	t.Helper()
	got := f.Of(scan(t, f, inode))
	want := Owner{PID: pid, Process: process, Others: others, Unit: got.Unit, Runtime: got.Runtime, Container: got.Container, PodUID: got.PodUID}
	if got != want || process != comm(t, pid) {
		t.Errorf("got %+v\nwant %+v, whom the kernel calls %q", got, want, comm(t, pid))
	}
}

// The master of nginx starts workers, which accept.
func TestNginx(t *testing.T) {
	needTool(t, "nginx", "nsenter", "ss")
	dir := socketDir(t)
	config := filepath.Join(dir, "nginx.conf")
	paths := ""
	for _, name := range []string{"client_body", "proxy", "fastcgi", "uwsgi", "scgi"} {
		paths += fmt.Sprintf("%s_temp_path %s;\n", name, filepath.Join(dir, name))
	}
	text := fmt.Sprintf("daemon off;\nmaster_process on;\nworker_processes 3;\npid %s/pid;\nerror_log stderr;\nevents {}\nhttp {\naccess_log off;\n%sserver { listen 8080; }\n}\n", dir, paths)
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	nginx := begin(t, exec.Command("nginx", "-p", dir, "-c", config), true)
	inode := listenerOn(t, nginx.pid, 8080)
	var workers []uint32
	eventually(t, "nginx has three workers", func() bool {
		workers = childrenOf(t, nginx.pid)
		return len(workers) == 3
	})
	f := open(t, Options{CRI: CRIOff})
	wantAccepts(t, f, inode, workers[0], "nginx", 2)

	// A worker that dies is replaced; the lowest PID is another one now.
	if err := syscall.Kill(int(workers[0]), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "nginx has three other workers", func() bool {
		now := childrenOf(t, nginx.pid)
		return len(now) == 3 && !slices.Contains(now, workers[0])
	})
	wantAccepts(t, f, inode, slices.Min(childrenOf(t, nginx.pid)), "nginx", 2)
}

// The program that was activated, not the one that listened for it.
func TestSocketActivation(t *testing.T) {
	needTool(t, "systemd-socket-activate", "ip", "nsenter", "ss")
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	activate := begin(t, exec.Command("sh", "-c", `ip link set lo up && exec "$@"`, "sh",
		"systemd-socket-activate", "-l", "127.0.0.1:8080", "-E", roleVariable+"=hold", exe), true)
	inode := listenerOn(t, activate.pid, 8080)
	f := open(t, Options{CRI: CRIOff})
	wantAccepts(t, f, inode, activate.pid, "systemd-socket-", 0)

	// The first client makes it exec the service, whose PID is the same.
	client := exec.Command("nsenter", "-t", fmt.Sprint(activate.pid), "-n", "bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/8080")
	if out, err := client.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	eventually(t, "the service runs", func() bool { return comm(t, activate.pid) == filepath.Base(exe)[:min(15, len(filepath.Base(exe)))] })
	wantAccepts(t, f, inode, activate.pid, comm(t, activate.pid), 0)
}

// The socket of a service that systemd started is open in both.
func TestInheritedListener(t *testing.T) {
	needTool(t, "nsenter", "ss")
	file, inode := listener(t)
	activator := begin(t, play(t, "activator", file), false)
	service := activator.number()
	file.Close()
	f := open(t, Options{CRI: CRIOff})
	wantAccepts(t, f, inode, service, comm(t, service), 0)
}

// Who made the listener is still there, but not who started the workers.
func TestOrphanedWorkers(t *testing.T) {
	needTool(t, "nsenter", "ss")
	file, inode := listener(t)
	leaver := begin(t, play(t, "leaver", file), false)
	workers := []uint32{leaver.number(), leaver.number()}
	file.Close()
	f := open(t, Options{CRI: CRIOff})
	eventually(t, "only the workers have it open", func() bool {
		found, err := f.Scan(map[uint64]struct{}{inode: {}})
		return err == nil && slices.Equal(found[inode], workers)
	})
	wantAccepts(t, f, inode, slices.Min(workers), comm(t, workers[0]), 1)
}

// Two that listen on the same address, in two namespaces, are two sockets.
func TestSameAddressInTwoNamespaces(t *testing.T) {
	needTool(t, "nsenter", "ss")
	one, other := begin(t, play(t, "listen", nil), true), begin(t, play(t, "listen", nil), true)
	one.line()
	other.line()
	f := open(t, Options{CRI: CRIOff})
	inodes := []uint64{listenerOn(t, one.pid, 8080), listenerOn(t, other.pid, 8080)}
	if inodes[0] == inodes[1] {
		t.Fatal("one socket in two namespaces")
	}
	wantAccepts(t, f, inodes[0], one.pid, comm(t, one.pid), 0)
	wantAccepts(t, f, inodes[1], other.pid, comm(t, other.pid), 0)
}
