package main

import (
	"bufio"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"slices"
)

// cpio writes an archive in the newc format, which the kernel unpacks as its
// first root (Documentation/driver-api/early-userspace/buffer-format.rst). It
// keeps the first error.
type cpio struct {
	w     *bufio.Writer
	inode int
	made  map[string]bool // directories
	err   error
}

func newCPIO(w io.Writer) *cpio {
	return &cpio{w: bufio.NewWriter(w), made: map[string]bool{".": true}}
}

const (
	modeDirectory = 0o040755
	modeFile      = 0o100755
	modeCharacter = 0o020600
)

func (c *cpio) entry(name string, mode, major, minor int, content []byte) {
	c.inode++
	if c.err == nil {
		_, c.err = fmt.Fprintf(c.w, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
			c.inode, mode, 0, 0, 1, 0, len(content), 0, 0, major, minor, len(name)+1, 0, name)
	}
	c.pad(110 + len(name) + 1)
	c.write(content)
	c.pad(len(content))
}

func (c *cpio) write(b []byte) {
	if c.err == nil {
		_, c.err = c.w.Write(b)
	}
}

// pad fills up to a multiple of four.
func (c *cpio) pad(n int) { c.write(make([]byte, -n&3)) }

func (c *cpio) directory(name string) {
	if c.made[name] {
		return
	}
	c.directory(path.Dir(name))
	c.made[name] = true
	c.entry(name, modeDirectory, 0, 0, nil)
}

func (c *cpio) file(name string, content []byte) {
	c.directory(path.Dir(name))
	c.entry(name, modeFile, 0, 0, content)
}

func (c *cpio) close() error {
	c.entry("TRAILER!!!", 0, 0, 0, nil)
	if c.err != nil {
		return c.err
	}
	return c.w.Flush()
}

// writeInitramfs makes the guest's only file system of files of this machine, by
// their names in the guest, and of texts.
func writeInitramfs(to string, files map[string]string, texts map[string]string) (err error) {
	f, err := os.Create(to)
	if err != nil {
		return err
	}
	defer func() {
		if closeError := f.Close(); err == nil {
			err = closeError
		}
	}()
	c := newCPIO(f)
	c.directory("dev")
	c.entry("dev/console", modeCharacter, 5, 1, nil)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		content, err := os.ReadFile(files[name])
		if err != nil {
			return err
		}
		c.file(name, content)
	}
	for _, name := range slices.Sorted(maps.Keys(texts)) {
		c.file(name, []byte(texts[name]))
	}
	return c.close()
}
