package main

import "slices"

// machine is what QEMU emulates of an architecture.
type machine struct {
	arch     string // as Debian and Go name it
	qemu     string
	pkg      string // Debian's, that has qemu
	emulated []string
	// There are two serial lines: the kernel's console, and one for what the tests
	// say, for which a device is added.
	device           string
	console, results string // what the kernel calls the lines
}

var amd64 = &machine{
	arch: "amd64", qemu: "qemu-system-x86_64", pkg: "qemu-system-x86",
	// cx16 is left out: with it 6.12 crashed now and then.
	emulated: []string{"-cpu", "max,-cx16"},
	device:   "isa-serial", console: "ttyS0", results: "ttyS1",
}

var arm64 = &machine{
	arch: "arm64", qemu: "qemu-system-aarch64", pkg: "qemu-system-arm",
	// The architecture's own authentication of pointers is slow to emulate.
	emulated: []string{"-machine", "virt", "-cpu", "max,pauth-impdef=on"},
	device:   "pci-serial", console: "ttyAMA0", results: "ttyS0",
}

// arguments are QEMU's.
func (g *guest) arguments(consoleLog, testLog string) []string {
	m := g.machine
	line := "console=" + m.console + " panic=-1 oops=panic quiet SOCKQ_GUEST_LINE=/dev/" + m.results
	if g.tier != "" {
		line += " SOCKQ_TEST_TIER=" + g.tier
	}
	return append(slices.Clone(m.emulated),
		// One thread for all CPUs: with one for each, kernels panicked now and
		// then, and it is no faster while there are as many guests as CPUs.
		"-accel", "tcg,thread=single", "-m", "1G", "-smp", "2",
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
		"-serial", "file:"+consoleLog,
		"-chardev", "file,id=results,path="+testLog, "-device", m.device+",chardev=results",
		"-kernel", g.file("vmlinuz"), "-initrd", g.initrd,
		"-append", line,
	)
}
