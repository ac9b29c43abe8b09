package main

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Bad places to run in. Each command makes one and executes its arguments there.
var badPlaces = map[string]func(){
	"without-bpf": func() { enter(func() error { return forbid(bpf) }) },
	// sock_diag is a netlink socket.
	"without-bpf-and-netlink": func() { enter(func() error { return forbid(append(netlink, bpf...)) }) },
	"without-btf":             func() { enter(hideBTF) },
}

func enter(place func() error) {
	runtime.LockOSThread()
	if err := place(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(3)
	}
	path, err := exec.LookPath(os.Args[1])
	if err == nil {
		err = unix.Exec(path, os.Args[1:], os.Environ())
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(3)
}

// Offsets in struct seccomp_data.
const (
	seccompNumber   = 0
	seccompArgument = 16
)

var (
	// bpf refuses bpf(2) with EPERM, as a container runtime's profile does.
	bpf = []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: seccompNumber},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_BPF, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
	}
	// netlink refuses socket(AF_NETLINK).
	netlink = []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: seccompNumber},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_SOCKET, Jf: 3},
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: seccompArgument},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.AF_NETLINK, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
	}
)

func forbid(filter []unix.SockFilter) error {
	filter = append(filter, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW})
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&program))); errno != 0 {
		return fmt.Errorf("set seccomp filter: %w", errno)
	}
	return nil
}

// hideBTF shows an empty file where the kernel's type information is.
func hideBTF() error {
	if err := privateMounts(); err != nil {
		return err
	}
	if err := unix.Mount("/dev/null", "/sys/kernel/btf/vmlinux", "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("hide BTF: %w", err)
	}
	return nil
}

// privateMounts gives the thread mounts of its own.
func privateMounts() error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("unshare mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	return nil
}
