package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"sockq/probes/netns"
)

// namespace is a network namespace of the bench's own with a thread that lives
// in it. The thread starts the namespace's processes, which the kernel kills
// when it ends (PR_SET_PDEATHSIG follows the thread, not the process).
type namespace struct {
	inode  uint32
	path   string // by which other threads and processes enter
	fd     int
	calls  chan func()
	ended  chan struct{}
	held   []*exec.Cmd
	blocks int // of addresses, given to holders
}

func newNamespace() (*namespace, error) {
	n := &namespace{fd: -1, calls: make(chan func()), ended: make(chan struct{})}
	ready := make(chan error)
	go func() {
		defer close(n.ended)
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		err := n.set()
		ready <- err
		if err != nil {
			return
		}
		for call := range n.calls {
			call()
		}
	}()
	if err := <-ready; err != nil {
		return nil, fmt.Errorf("make network namespace: %w", err)
	}
	return n, nil
}

func (n *namespace) set() (err error) {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return err
	}
	if n.inode, err = netns.Self(); err != nil {
		return err
	}
	if err := raiseLoopback(); err != nil {
		return err
	}
	for name, value := range map[string]string{
		"core/somaxconn": "65535", "ipv4/ip_local_port_range": "1024 65535",
	} {
		if err := os.WriteFile("/proc/sys/net/"+name, []byte(value), 0); err != nil {
			return err
		}
	}
	n.fd, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	n.path = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.fd)
	return err
}

func raiseLoopback() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	request, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	request.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, request)
}

// do runs fn on the thread inside.
func (n *namespace) do(fn func() error) error {
	result := make(chan error, 1)
	n.calls <- func() { result <- fn() }
	return <-result
}

// close kills what was started inside and lets go of the namespace.
func (n *namespace) close() {
	for _, cmd := range n.held {
		_ = cmd.Process.Kill()
	}
	for _, cmd := range n.held {
		_ = cmd.Wait()
	}
	close(n.calls)
	<-n.ended
	unix.Close(n.fd)
}

// start starts a process inside that lives until stop or close.
func (n *namespace) start(cmd *exec.Cmd) error {
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	if err := n.do(cmd.Start); err != nil {
		return err
	}
	n.held = append(n.held, cmd)
	return nil
}

func (n *namespace) stop(cmd *exec.Cmd) {
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	for i := range n.held {
		if n.held[i] == cmd {
			n.held = append(n.held[:i], n.held[i+1:]...)
			return
		}
	}
}

// The hidden command that holds sockets for the bench, since a process may open
// only so many files.
const holdCommand = "hold-sockets"

// filesPerHolder leaves some of the smallest usual limit, 20,000.
const filesPerHolder = 18_000

// connect makes connections inside, two sockets each: the accepting half stays
// in the accept queue of one of the holders' listeners.
func (n *namespace) connect(ctx context.Context, connections int) error {
	return n.hold(ctx, "connect", connections)
}

// listen makes listeners inside.
func (n *namespace) listen(ctx context.Context, listeners int) error {
	return n.hold(ctx, "listen", listeners)
}

func (n *namespace) hold(ctx context.Context, what string, sockets int) error {
	for sockets > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		var running []*holder
		for range runtime.NumCPU() {
			if sockets == 0 {
				break
			}
			count := min(sockets, filesPerHolder)
			sockets -= count
			h, err := n.startHolder(what, count)
			if err != nil {
				return err
			}
			running = append(running, h)
		}
		for _, h := range running {
			if err := h.wait(); err != nil {
				return err
			}
		}
	}
	return nil
}

type holder struct{ stdout *os.File }

func (n *namespace) startHolder(what string, count int) (*holder, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer w.Close()
	n.blocks++
	cmd := exec.Command("/proc/self/exe", holdCommand, what, strconv.Itoa(n.blocks), strconv.Itoa(count))
	cmd.Stdout, cmd.Stderr = w, os.Stderr
	if err := n.start(cmd); err != nil {
		r.Close()
		return nil, fmt.Errorf("start holder: %w", err)
	}
	return &holder{r}, nil
}

// wait waits for the holder's one line.
func (h *holder) wait() error {
	defer h.stdout.Close()
	b := make([]byte, 64)
	n, err := h.stdout.Read(b)
	if err != nil || strings.TrimSpace(string(b[:n])) != "ready" {
		return errors.New("a holder of sockets failed")
	}
	return nil
}

// hold is the hidden command: make sockets, say so, keep them until killed.
func hold(args []string) error {
	if len(args) != 3 {
		return errors.New("hold-sockets is called by the bench only")
	}
	block, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	count, err := strconv.Atoi(args[2])
	if err != nil {
		return err
	}
	// Addresses of the block's own, so that neither ports nor chains meet.
	switch args[0] {
	case "connect":
		err = holdConnections(unix.SockaddrInet4{Port: 7, Addr: [4]byte{127, 0, 1, byte(block)}}, count)
	case "listen":
		err = holdListeners([4]byte{127, 0, 2, byte(block)}, count, listenOn)
	case "accept":
		err = holdListeners([4]byte{127, 0, 2, byte(block)}, count, acceptOn)
	default:
		err = fmt.Errorf("hold-sockets %s: unknown", args[0])
	}
	if err != nil {
		return err
	}
	if _, err := os.Stdout.WriteString("ready\n"); err != nil {
		return err
	}
	for { // pause(2) is not on every architecture
		if err := unix.Nanosleep(&unix.Timespec{Sec: 3600}, nil); err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

func holdConnections(to unix.SockaddrInet4, count int) error {
	// The listener has the lowest descriptor: at the end it goes first and
	// resets all connections, which leaves no TIME_WAIT.
	if err := listenOn(to); err != nil {
		return err
	}
	for i := range count {
		fd, err := tcpSocket()
		if err != nil {
			return err
		}
		if err := unix.Connect(fd, &to); err != nil {
			return fmt.Errorf("connection %d: %w", i, err)
		}
	}
	return nil
}

func holdListeners(address [4]byte, count int, listen func(unix.SockaddrInet4) error) error {
	for i := range count {
		if err := listen(unix.SockaddrInet4{Port: 2000 + i, Addr: address}); err != nil {
			return fmt.Errorf("listener %d: %w", i, err)
		}
	}
	return nil
}

func listenOn(address unix.SockaddrInet4) error {
	_, err := openListener(address)
	return err
}

func openListener(address unix.SockaddrInet4) (int, error) {
	fd, err := tcpSocket()
	if err != nil {
		return -1, err
	}
	if err := unix.Bind(fd, &address); err != nil {
		return -1, fmt.Errorf("bind: %w", err)
	}
	return fd, unix.Listen(fd, 65535)
}

// acceptOn listens and accepts some connections, one longer in the queue than the
// other, so that waits are in several buckets.
func acceptOn(address unix.SockaddrInet4) error {
	listener, err := openListener(address)
	if err != nil {
		return err
	}
	const connections = 8
	for range connections {
		client, err := tcpSocket()
		if err != nil {
			return err
		}
		if err := unix.Connect(client, &address); err != nil {
			return err
		}
		defer unix.Close(client)
	}
	for range connections {
		server, _, err := unix.Accept4(listener, unix.SOCK_CLOEXEC)
		if err != nil {
			return err
		}
		defer unix.Close(server)
	}
	return nil
}

func tcpSocket() (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("socket: %w", err)
	}
	return fd, nil
}
