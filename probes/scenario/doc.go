// Package scenario is the tests' library of things that happen to TCP sockets.
//
// Each Scenario plays in a network namespace of its own, over IPv4 or IPv6, and
// stops at one or more points where everything stands still. There the package
// compares the kernel's own view, sock_diag and /proc/net/netstat, with what the
// scenario says, exactly, and hands over to the caller, who compares a view of
// his own.
//
// It makes everything by system calls and netlink messages from Go, with
// nothing but lo, so that the same scenarios run in a virtual machine that has
// no other file: kernels 5.10 to 7.x, as root.
package scenario
