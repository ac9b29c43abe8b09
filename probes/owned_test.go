package probes

import (
	"context"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sockq/probes/census"
	"sockq/probes/scenario"
	"sockq/probes/tcpstate"
)

// holdEnv makes the test binary a process of the name it says that does nothing but
// hold what it was given open.
const holdEnv = "SOCKQ_TEST_HOLD"

func holdOpen(name string) {
	if err := os.WriteFile("/proc/self/comm", []byte(name), 0); err != nil {
		os.Exit(1)
	}
	os.Stdout.WriteString("x")
	for {
		time.Sleep(time.Hour)
	}
}

// hold starts a process of that name that has the socket open.
func hold(t *testing.T, name string, fd int) *exec.Cmd {
	t.Helper()
	file := os.NewFile(uintptr(dup(t, fd)), "socket")
	defer file.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), holdEnv+"="+name)
	cmd.ExtraFiles = []*os.File{file}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { end(cmd) })
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatalf("%s did not start: %v", name, err)
	}
	return cmd
}

func end(cmd *exec.Cmd) {
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
}

func dup(t *testing.T, fd int) int {
	t.Helper()
	fd, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

// TestOwners looks who has listeners and connections open, while processes come
// and go.
func TestOwners(t *testing.T) {
	stage := scenario.NewStage(t, scenario.IPv4)
	ns := stage.NS
	dir := t.TempDir()
	if err := os.Symlink(ns.Path(), filepath.Join(dir, "beside")); err != nil {
		t.Fatal(err)
	}
	own, err := os.ReadFile("/proc/self/comm")
	if err != nil {
		t.Fatal(err)
	}
	self := string(own[:len(own)-1])

	at := netip.AddrPortFrom(stage.Family.Loopback(), 80)
	listener := stage.Socket().Bind(at).Listen(10)
	p, err := Open(Options{
		NetnsPath: dir, CensusInterval: 200 * time.Millisecond, MaxListeners: 1000, Logger: nil,
	})
	if err != nil {
		t.Fatal(err)
	}
	p.owners.rest, p.owners.next = 1, time.Time{} // emulated CPUs are slow
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); _ = p.Run(ctx) }()
	defer func() { stop(); <-ended; p.Close() }()

	await := func(what string, fulfilled func(*Snapshot) bool) {
		t.Helper()
		var s *Snapshot
		for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
			if s, err = p.Snapshot(); err != nil {
				t.Fatal(err)
			}
			if fulfilled(s) {
				return
			}
		}
		for _, l := range s.Listeners {
			if l.Namespace == "beside" {
				t.Logf("%s of %+v: %+v, live %t, gave up %d", l.Address, l.Owner, l.Who, l.Live, l.GaveUp)
			}
		}
		for _, process := range s.Processes {
			if process.Namespace == "beside" {
				t.Logf("%+v", process)
			}
		}
		t.Fatalf("not so: %s", what)
	}
	// live are the owners of the address' live series.
	live := func(s *Snapshot, address string) (owners []string) {
		for _, l := range s.Listeners {
			if l.Namespace == "beside" && l.Address == address && l.Live {
				owners = append(owners, l.Owner.Process)
			}
		}
		return owners
	}
	only := func(s *Snapshot, address, process string) bool {
		owners := live(s, address)
		return len(owners) == 1 && owners[0] == process
	}
	process := func(s *Snapshot, name string) *Process {
		for i := range s.Processes {
			if c := &s.Processes[i]; c.Namespace == "beside" && c.Process == name {
				return c
			}
		}
		return nil
	}
	await("a listener from before the start has its owner", func(s *Snapshot) bool {
		if len(live(s, at.String())) > 1 || len(live(s, at.String())) == 1 && !only(s, at.String(), self) {
			t.Fatalf("its first series is of %q", live(s, at.String()))
		}
		return only(s, at.String(), self)
	})

	// A new one has it from its first series on.
	second := netip.AddrPortFrom(stage.Family.Loopback(), 81)
	passed := stage.Socket().Bind(second).Listen(10)
	await("a new listener has its owner", func(s *Snapshot) bool { return len(live(s, second.String())) > 0 })
	if s, err := p.Snapshot(); err != nil || !only(s, second.String(), self) {
		t.Errorf("a new listener's first series is of %q (%v)", live(s, second.String()), err)
	}

	// Its worker is a child: it would accept.
	worker := hold(t, "worker", passed.FD())
	await("a child that has it open, too, is the owner", func(s *Snapshot) bool { return only(s, second.String(), "worker") })
	another := hold(t, "worker", passed.FD())
	end(worker)
	await("another worker of the same name goes on with its series", func(s *Snapshot) bool {
		for _, l := range s.Listeners {
			if l.Namespace == "beside" && l.Address == second.String() && l.Live {
				return l.Owner.Process == "worker" && l.Who.PID == uint32(another.Process.Pid)
			}
		}
		return false
	})
	end(another)
	await("without workers it is the master's again", func(s *Snapshot) bool { return only(s, second.String(), self) })

	// Three clients give up while they wait, two connections leak.
	for range 3 {
		client := stage.Socket()
		client.Connect(second)
		client.FIN()
	}
	var leaks []*scenario.Socket
	for range 2 {
		client := stage.Socket()
		client.Connect(at)
		leaks = append(leaks, listener.Accept())
		client.Write(7)
		client.FIN()
	}
	for _, leak := range leaks {
		leak.Await(tcpstate.CloseWait)
	}
	await("three gave up, two leak", func(s *Snapshot) bool {
		gaveUp := false
		for _, l := range s.Listeners {
			if l.Namespace == "beside" && l.Live && l.GaveUpKnown && l.GaveUp > 0 {
				gaveUp = l.Address == second.String() && l.GaveUp == 3
			}
		}
		mine, rest := process(s, self), process(s, "")
		if !gaveUp || rest == nil {
			return false
		}
		if p.owners.holders == nil {
			return true // which it says
		}
		// Of the seven bytes and a FIN each.
		in := census.Inbound
		return mine != nil && mine.CloseWait == 2 && mine.OldestCloseWait > 0 && mine.FinWait2 == 5 &&
			mine.Queues[in].ReceiveBytes == 16 && mine.Queues[in].ReceiveMaxBytes == 8 && rest.Queues[in].ReceiveBytes == 3
	})
	before := process(snapshot(t, p), self)
	if before == nil {
		return
	}
	await("they grow older", func(s *Snapshot) bool {
		mine := process(s, self)
		return mine != nil && mine.OldestCloseWait > before.OldestCloseWait
	})
	for _, leak := range leaks {
		leak.Close()
	}
	await("no leak is left", func(s *Snapshot) bool {
		mine := process(s, self)
		return mine == nil || mine.CloseWait == 0
	})
}
