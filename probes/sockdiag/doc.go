// Package sockdiag is a client of NETLINK_SOCK_DIAG (sock_diag(7)) for TCP: it
// asks the kernel for sockets by state and address and decodes what comes
// back. It is useful on its own.
package sockdiag
