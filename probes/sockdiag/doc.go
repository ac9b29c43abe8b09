// Package sockdiag is a client of NETLINK_SOCK_DIAG (sock_diag(7)) for TCP: it
// asks the kernel for sockets by state and address and decodes what comes
// back. It is useful on its own.
//
// A dump is a walk, not a snapshot: sockets that come and go meanwhile may be
// missed, and the kernel repeats some where it resumes in a hash bucket that
// changed. A [Client] hands out each cookie once.
//
// What a dump costs depends on the states asked for. Listeners alone are read
// from their own small table. Any other state walks the table of connections,
// which all network namespaces of the node share (unless a namespace was made
// with net.ipv4.tcp_child_ehash_entries set): the price of passing all its
// buckets and the other namespaces' sockets, from one to tens of milliseconds,
// is paid per dump and so per namespace.
package sockdiag
