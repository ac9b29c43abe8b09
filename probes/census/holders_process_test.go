package census_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"

	"sockq/probes/census"
	"sockq/probes/scenario"
)

// A process of its own is this binary again, told by this variable what to be:
// a name and what follows. It answers with a line and ends with its input.
const processVariable = "SOCKQ_TEST_HOLDER"

func init() {
	be, ok := os.LookupEnv(processVariable)
	if !ok {
		return
	}
	os.Unsetenv(processVariable)
	name, argument, _ := strings.Cut(be, " ")
	// init runs on the first thread, whose name is the process'.
	err := os.WriteFile("/proc/self/comm", []byte(name), 0)
	answer := any(os.Getpid())
	if err == nil {
		switch name {
		case "opens":
			err = openFiles(argument)
		case "duplicates":
			err = duplicateInput(argument)
		case "reads":
			answer, err = readHeld()
		case "reads-limited":
			// Before 5.11 it needs what a service manager may give.
			if err = errors.Join(rlimit.RemoveMemlock(), limitCapabilities()); err == nil {
				answer, err = readHeld()
			}
		}
	}
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(answer)
	}
	if err == nil {
		_, err = io.Copy(io.Discard, os.Stdin)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// process is a child.
type process struct {
	t       testing.TB
	cmd     *exec.Cmd
	input   io.Closer
	answers *bufio.Reader
}

// startProcess has the files as its descriptors from 3 on.
func startProcess(t testing.TB, be string, attributes *syscall.SysProcAttr, files ...int) *process {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), processVariable+"="+be)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = attributes
	for _, fd := range files {
		copied, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		file := os.NewFile(uintptr(copied), "socket")
		defer file.Close()
		cmd.ExtraFiles = append(cmd.ExtraFiles, file)
	}
	input, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	output, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := &process{t, cmd, input, bufio.NewReader(output)}
	t.Cleanup(p.end)
	return p
}

func (p *process) pid() uint32 { return uint32(p.cmd.Process.Pid) }

// answer waits until the process is what it was told to be.
func (p *process) answer(into any) {
	p.t.Helper()
	line, err := p.answers.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, into)
	}
	if err != nil {
		p.t.Fatalf("answer of process %d: %q: %v", p.pid(), line, err)
	}
}

func (p *process) end() {
	if p.cmd.ProcessState != nil {
		return
	}
	p.input.Close()
	if err := p.cmd.Wait(); err != nil {
		p.t.Errorf("process %d: %v", p.pid(), err)
	}
}

// startHolder is a process that keeps the files open.
func startHolder(t testing.TB, name string, files ...int) *process {
	t.Helper()
	p := startProcess(t, name, nil, files...)
	var pid uint32
	p.answer(&pid)
	return p
}

// readHeld reads once and keeps a listener open meanwhile. It tells the number
// of that, too.
func readHeld() (answer ownHeld, err error) {
	l, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return answer, err
	}
	if err := unix.Listen(l, 1); err != nil {
		return answer, err
	}
	var stat unix.Stat_t
	if err := unix.Fstat(l, &stat); err != nil {
		return answer, err
	}
	holders, err := census.OpenHolders()
	if err != nil {
		return answer, err
	}
	defer holders.Close()
	held, err := holders.Read(context.Background(), nil, nil)
	if err != nil {
		return answer, err
	}
	return ownHeld{PID: uint32(os.Getpid()), Socket: stat.Ino, Held: held}, nil
}

type ownHeld struct {
	PID    uint32
	Socket uint64
	Held   *census.Held
}

// limitCapabilities leaves the calling thread CAP_BPF and CAP_PERFMON.
func limitCapabilities() error {
	var data [2]unix.CapUserData
	for _, capability := range []int{unix.CAP_BPF, unix.CAP_PERFMON} {
		data[capability/32].Effective |= 1 << (capability % 32)
	}
	data[0].Permitted, data[1].Permitted = data[0].Effective, data[1].Effective
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	return unix.Capset(&header, &data[0])
}

// openFiles opens as many, half of them TCP sockets: connections, both ends, of
// which some have something to tell.
func openFiles(count string) error {
	n, err := strconv.Atoi(count)
	if err != nil {
		return err
	}
	l, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := unix.Listen(l, 128); err != nil {
		return err
	}
	to, err := unix.Getsockname(l)
	if err != nil {
		return err
	}
	to.(*unix.SockaddrInet4).Addr = [4]byte{127, 0, 0, 1}
	for i := range n / 4 {
		client, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		if err := unix.Connect(client, to); err != nil {
			return err
		}
		if _, _, err := unix.Accept4(l, unix.SOCK_CLOEXEC); err != nil {
			return err
		}
		if i%10 == 0 { // CLOSE_WAIT and FIN_WAIT2
			if err := unix.Shutdown(client, unix.SHUT_WR); err != nil {
				return err
			}
		}
	}
	for range n / 2 {
		if _, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
			return err
		}
	}
	return nil
}

// duplicateInput opens as many files that are no sockets.
func duplicateInput(count string) error {
	n, err := strconv.Atoi(count)
	if err != nil {
		return err
	}
	for range n {
		if _, err := unix.FcntlInt(0, unix.F_DUPFD_CLOEXEC, 0); err != nil {
			return err
		}
	}
	return nil
}

// startInside starts a process in the namespace.
func startInside(t testing.TB, n *scenario.Namespace, be string) (p *process) {
	t.Helper()
	n.Do(func() { p = startProcess(t, be, nil) })
	return p
}
