package alerts_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"sockq/probes/scenario"
)

// This test binary is servers and clients, too, in processes of their own: who they
// are is what it is called then.
var roles = map[string]func(args []string) error{
	"slow-server":   serve,
	"quick-server":  serve,
	"tiny-server":   serve,
	"clients":       connect,
	"tiny-clients":  connect,
	"quick-clients": connect,
}

func init() {
	role, ok := roles[filepath.Base(os.Args[0])]
	if !ok {
		return
	}
	if err := role(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// startRole starts a server or clients in a namespace. What it returns tells it what
// to do.
func startRole(t *testing.T, ns *scenario.Namespace, role string, args ...string) (tell func(n int, pause time.Duration)) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(t.TempDir(), role) // the kernel calls a process by its file
	if err := os.Symlink(self, link); err != nil {
		t.Fatal(err)
	}
	stdin := start(t, "nsenter", append([]string{"--net=" + ns.Path(), link}, args...)...)
	return func(n int, pause time.Duration) {
		if _, err := fmt.Fprintln(stdin, n, pause); err != nil {
			t.Error(err)
		}
	}
}

// serve is a server: ADDRESS BACKLOG. Each line "BACKLOG PAUSE" of its input lets it
// listen again, as after a change of its configuration, and pause after each accept().
func serve(args []string) error {
	l, err := net.Listen("tcp", args[0])
	if err != nil {
		return err
	}
	raw, err := l.(syscall.Conn).SyscallConn()
	if err != nil {
		return err
	}
	listen := func(backlog int) error {
		var failed error
		return errors.Join(raw.Control(func(fd uintptr) { failed = syscall.Listen(int(fd), backlog) }), failed)
	}
	backlog, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	if err := listen(backlog); err != nil {
		return err
	}
	var pause atomic.Int64
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			go func() {
				defer conn.Close()
				_, _ = io.Copy(conn, conn)
			}()
			time.Sleep(time.Duration(pause.Load()))
		}
	}()
	return commands(func(backlog int, between time.Duration) error {
		pause.Store(int64(between))
		return listen(backlog)
	})
}

// connect is clients of ADDRESS. Each line "HOW-MANY PAUSE" of its input starts so
// many: each connects, is answered, closes and pauses. They wait for an answer as
// long as the kernel does.
func connect(args []string) error {
	return commands(func(clients int, pause time.Duration) error {
		for range clients {
			go func() {
				for ; ; time.Sleep(pause) {
					if err := ask(args[0]); err != nil {
						fmt.Fprintln(os.Stderr, err)
					}
				}
			}()
		}
		return nil
	})
}

// commands reads the input until it ends.
func commands(do func(int, time.Duration) error) error {
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		var number int
		var between string
		if _, err := fmt.Sscan(lines.Text(), &number, &between); err != nil {
			return err
		}
		d, err := time.ParseDuration(between)
		if err != nil {
			return err
		}
		if err := do(number, d); err != nil {
			return err
		}
	}
	return lines.Err()
}

func ask(address string) error {
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("?")); err != nil {
		return err
	}
	_, err = io.ReadFull(conn, make([]byte, 1))
	return err
}
