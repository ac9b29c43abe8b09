package main

//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -cc clang-19 -strip llvm-strip-19 -target amd64,arm64 -no-global-types -cflags "-O2 -Wall -Werror -I/usr/include/x86_64-linux-gnu" itertcp bpf/itertcp.bpf.c

import (
	"errors"
	"fmt"
	"io"

	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// iterator counts the sockets of the calling thread's namespace by iter/tcp.
type iterator struct {
	objects itertcpObjects
	link    *link.Iter
}

func openIterator() (*iterator, error) {
	it := new(iterator)
	if err := loadItertcpObjects(&it.objects, nil); err != nil {
		return nil, fmt.Errorf("load iter/tcp: %w", err)
	}
	var err error
	if it.link, err = link.AttachIter(link.IterOptions{Program: it.objects.CountTcp}); err != nil {
		it.objects.Close()
		return nil, fmt.Errorf("attach iter/tcp: %w", err)
	}
	return it, nil
}

func (it *iterator) count() (total uint64, err error) {
	var states [13]uint64
	if err := it.objects.States.Put(uint32(0), states); err != nil {
		return 0, err
	}
	run, err := it.link.Open()
	if err != nil {
		return 0, err
	}
	defer run.Close()
	for {
		_, err := run.Read(make([]byte, 64))
		if errors.Is(err, unix.EAGAIN) { // a million objects without output
			continue
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return 0, fmt.Errorf("read iter/tcp: %w", err)
		}
	}
	if err := it.objects.States.Lookup(uint32(0), &states); err != nil {
		return 0, err
	}
	for _, n := range states {
		total += n
	}
	return total, nil
}

func (it *iterator) close() {
	it.link.Close()
	it.objects.Close()
}
