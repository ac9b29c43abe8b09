package main

import (
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// burn uses CPU time until the process has used as much as d more.
func burn(t *testing.T, d time.Duration) {
	t.Helper()
	start, err := processTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for {
		now, err := processTime(os.Getpid())
		if err != nil {
			t.Fatal(err)
		}
		if now-start >= d {
			return
		}
	}
}

func TestOwnTime(t *testing.T) {
	const work = 30 * time.Millisecond
	took, err := ownTime(func() error { burn(t, work); return nil })
	if err != nil {
		t.Fatal(err)
	}
	if took < work {
		t.Errorf("took %v, want %v at least", took, work)
	}
	slept, err := ownTime(func() error { time.Sleep(work); return nil })
	if err != nil {
		t.Fatal(err)
	}
	if slept >= work {
		t.Errorf("sleeping took %v of CPU", slept)
	}
}

func TestCommandTime(t *testing.T) {
	took, err := commandTime(exec.Command("sh", "-c", "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done"))
	if err != nil {
		t.Fatal(err)
	}
	if took <= 0 {
		t.Errorf("a loop took %v", took)
	}
	if _, err := commandTime(exec.Command("sh", "-c", "exit 3")); err == nil || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("commandTime() = %v of a command that failed", err)
	}
}

func TestOtherProcess(t *testing.T) {
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	if _, err := processTime(cmd.Process.Pid); err != nil {
		t.Error(err)
	}
	size, err := memory(cmd.Process.Pid, "VmRSS")
	if err != nil || size == 0 {
		t.Errorf("memory() = %d, %v", size, err)
	}
	if _, err := memory(cmd.Process.Pid, "VmNothing"); err == nil {
		t.Error("a size that is not there was read")
	}
	if exited(cmd.Process.Pid) {
		t.Error("a sleeping process exited")
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(10 * time.Second)
	for !exited(cmd.Process.Pid) { // a zombie until it is waited for
		if time.Now().After(deadline) {
			t.Fatal("a killed process did not exit")
		}
		time.Sleep(time.Millisecond)
	}
}
