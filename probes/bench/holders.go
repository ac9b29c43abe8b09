package main

import (
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"sockq/probes/census"
)

const nameLinks = "readlink of `/proc/*/fd/*`, without states"

// holders measures who has the sockets open: half of them, the ends that connected.
func (b *bench) holders(n *namespace, sockets int) error {
	holders, err := census.OpenHolders()
	if err != nil {
		return err
	}
	defer holders.Close()
	return b.measure(&group{
		what:     "Who holds " + count(sockets/2) + " sockets",
		baseline: nameLinks,
		methods: []*method{
			{name: nameLinks, run: n.timed(func() error {
				links, err := countLinks()
				if err != nil {
					return err
				}
				return atLeast(uint64(links), sockets/2)
			})},
			{name: "**iterator over files**", run: n.timed(func() error {
				held, err := holders.Read(b.ctx, nil, nil)
				if err != nil {
					return err
				}
				return atLeast(uint64(len(held.Listeners)), b.fewListeners)
			})},
		},
	})
}

// countLinks reads the links of all open files, without a string for each.
func countLinks() (links int, err error) {
	processes, err := os.ReadDir("/proc")
	if err != nil {
		return 0, err
	}
	entries, link := make([]byte, 32<<10), make([]byte, 64)
	var names []string
	for _, p := range processes {
		if _, err := strconv.Atoi(p.Name()); err != nil {
			continue
		}
		dir, err := unix.Open("/proc/"+p.Name()+"/fd", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			continue // it has gone
		}
		for {
			n, err := unix.ReadDirent(dir, entries)
			if n <= 0 || err != nil {
				break
			}
			_, _, names = unix.ParseDirent(entries[:n], -1, names[:0])
			for _, name := range names {
				if _, err := unix.Readlinkat(dir, name, link); err == nil {
					links++
				}
			}
		}
		unix.Close(dir)
	}
	return links, nil
}
