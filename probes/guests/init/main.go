// Command init is the first and only program of a kernel guest (see
// probes/guests): it makes the machine ready, runs the tests and powers off.
//
// What the tests print goes to the second serial line, between lines of its own:
//
//	#guest release <release>
//	#guest begin <test>
//	#guest end <test> <exit code>
//	#guest done
package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

func main() {
	if err := run(); err != nil {
		fmt.Println("init:", err) // on the console
	}
	unix.Sync()
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF); err != nil {
		fmt.Println("init: power off:", err)
	}
}

func run() error {
	if err := mountAll(); err != nil {
		return err
	}
	for _, name := range list("/modules.list") {
		if err := load(filepath.Join("/modules", name)); err != nil {
			return fmt.Errorf("load %s: %w", name, err)
		}
	}
	if err := raiseLoopback(); err != nil {
		return fmt.Errorf("raise lo: %w", err)
	}
	limit := unix.Rlimit{Cur: 20_000, Max: 20_000}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("raise the number of open files: %w", err)
	}
	// The kernel hands over what it does not know of its command line.
	out, err := os.OpenFile(os.Getenv("SOCKQ_GUEST_LINE"), os.O_WRONLY|unix.O_NOCTTY, 0)
	if err != nil {
		return err
	}
	defer out.Close()
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return err
	}
	fmt.Fprintf(out, "#guest release %s\n", unix.ByteSliceToString(name.Release[:]))
	for _, test := range list("/tests.list") {
		fmt.Fprintf(out, "#guest begin %s\n", test)
		fmt.Fprintf(out, "\n#guest end %s %d\n", test, play(out, test))
	}
	fmt.Fprintln(out, "#guest done")
	// TCSBRK with an argument other than 0 is tcdrain().
	return unix.IoctlSetInt(int(out.Fd()), unix.TCSBRK, 1)
}

// list reads the lines of a file.
func list(file string) []string {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil
	}
	return strings.Fields(string(b))
}

func mountAll() error {
	for _, m := range []struct{ kind, at string }{
		{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}, {"tmpfs", "/tmp"}, {"tmpfs", "/run"},
		{"tracefs", "/sys/kernel/tracing"}, {"bpf", "/sys/fs/bpf"}, {"cgroup2", "/sys/fs/cgroup"},
	} {
		if err := os.MkdirAll(m.at, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.kind, m.at, m.kind, 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m.at, err)
		}
	}
	return nil
}

func load(module string) error {
	f, err := os.Open(module)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}

func raiseLoopback() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	lo.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, lo)
}

// play runs a test binary in its directory and returns the exit code.
func play(out *os.File, test string) int {
	dir := filepath.Join("/tests", test)
	cmd := exec.Command(filepath.Join(dir, test+".test"), append([]string{"-test.v", "-test.timeout=12m"}, list(filepath.Join(dir, "flags.list"))...)...)
	cmd.Dir = dir
	cmd.Env = []string{"CI=true", "SOCKQ_TEST_GUEST=1", "TMPDIR=/tmp", "HOME=/tmp", "PATH=/"}
	if tier, ok := os.LookupEnv("SOCKQ_TEST_TIER"); ok {
		cmd.Env = append(cmd.Env, "SOCKQ_TEST_TIER="+tier)
	}
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Run(); err != nil {
		fmt.Fprintln(out, err)
	}
	return cmd.ProcessState.ExitCode()
}
