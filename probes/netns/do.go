package netns

import (
	"errors"
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

var errNoReturn = errors.New("function did not return")

// Do runs fn inside the network namespace behind path and returns its error. fn
// runs on a thread of its own that ends with it, so that nothing else ever runs
// in that namespace; goroutines that fn starts are outside. Sockets that fn
// makes stay in the namespace.
//
// It fails with EPERM without CAP_SYS_ADMIN, and with an error of its own if fn
// ends by runtime.Goexit.
func Do(path string, fn func() error) error {
	result := make(chan error, 1)
	go func() {
		err := errNoReturn
		defer func() { result <- err }()

		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// The main thread cannot end, and /proc/self shows its
			// namespace. Held here, it is not what the next try gets.
			defer runtime.UnlockOSThread()
			err = Do(path, fn)
			return
		}
		// Never unlocked: the runtime ends the thread with the goroutine.
		if err = enter(path); err == nil {
			err = errNoReturn
			err = fn()
		}
	}()
	return <-result
}

// MayEnter says why this process may enter no namespace: it tries the one that it
// is in. It fails with EPERM without CAP_SYS_ADMIN.
func MayEnter() error { return Do("/proc/thread-self/ns/net", func() error { return nil }) }

func enter(path string) error {
	fd, err := open(path)
	if err != nil {
		return fmt.Errorf("open network namespace %s: %w", path, err)
	}
	defer unix.Close(fd)
	err = unix.Setns(fd, unix.CLONE_NEWNET)
	switch {
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("enter network namespace %s: %w: this needs CAP_SYS_ADMIN", path, err)
	case err != nil:
		return fmt.Errorf("enter network namespace %s: %w", path, err)
	}
	return nil
}
