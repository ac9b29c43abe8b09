package scenario

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// The index of lo is the same in every namespace.
const loopbackIndex = 1

// raiseLoopback brings lo up in the calling thread's namespace, which also
// gives it 127.0.0.1 and ::1.
func raiseLoopback() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("raise lo: %w", err)
	}
	defer unix.Close(fd)
	request, err := unix.NewIfreq("lo")
	if err != nil {
		return fmt.Errorf("raise lo: %w", err)
	}
	request.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, request); err != nil {
		return fmt.Errorf("raise lo: %w", err)
	}
	return nil
}

// routeToNowhere routes an IPv4 address over lo in the calling thread's
// namespace, such that packets to it are sent, but neither received by anyone
// nor answered. 127.0.0.1 is what sockets get as their own address.
func routeToNowhere(addr netip.Addr) error {
	return addRoute(addr, unix.RT_SCOPE_LINK, unix.RTN_UNICAST, IPv4.Loopback())
}

// addRoute adds a route to one address to the calling thread's namespace. It
// goes over lo where it has a preferred source.
func addRoute(addr netip.Addr, scope, kind byte, source netip.Addr) error {
	family := byte(unix.AF_INET)
	if addr.Is6() {
		family = unix.AF_INET6
	}
	attributes := netlink.NewAttributeEncoder()
	attributes.Bytes(unix.RTA_DST, addr.AsSlice())
	if source.IsValid() {
		attributes.Bytes(unix.RTA_PREFSRC, source.AsSlice())
		attributes.Uint32(unix.RTA_OIF, loopbackIndex)
	}
	body, err := attributes.Encode()
	if err != nil {
		return fmt.Errorf("add route to %s: %w", addr, err)
	}
	header := []byte{ // struct rtmsg
		family, byte(addr.BitLen()), 0, 0,
		unix.RT_TABLE_MAIN, unix.RTPROT_STATIC, scope, kind,
		0, 0, 0, 0,
	}
	_, err = rtnetlink(unix.RTM_NEWROUTE, netlink.Acknowledge|netlink.Create|netlink.Excl, append(header, body...))
	if err != nil {
		return fmt.Errorf("add route to %s: %w", addr, err)
	}
	return nil
}

// joinAnycast does for an IPv6 address what routeToNowhere does for IPv4, as
// long as the socket fd is open. IPv6 refuses to send over a unicast route to
// lo (fib6_is_reject). What comes to an anycast address is received, but TCP
// does not answer it with a RST (ipv6_unicast_destination in
// tcp_v6_send_reset).
//
// A host may only join a prefix that it has an address in, a router any. lo is
// made a router's: a new address gets its route later, by a work queue.
func joinAnycast(fd int, addr netip.Addr) error {
	if err := os.WriteFile("/proc/sys/net/ipv6/conf/lo/forwarding", []byte("1"), 0); err != nil {
		return err
	}
	request := unix.IPv6Mreq{Multiaddr: addr.As16(), Interface: loopbackIndex}
	if err := unix.SetsockoptIPv6Mreq(fd, unix.IPPROTO_IPV6, unix.IPV6_JOIN_ANYCAST, &request); err != nil {
		return fmt.Errorf("join anycast address %s: %w", addr, err)
	}
	return nil
}

func rtnetlink(typ netlink.HeaderType, flags netlink.HeaderFlags, data []byte) ([]netlink.Message, error) {
	conn, err := netlink.Dial(unix.NETLINK_ROUTE, nil)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	return conn.Execute(netlink.Message{
		Header: netlink.Header{Type: typ, Flags: netlink.Request | flags},
		Data:   data,
	})
}

const (
	netnsaNSID = 1 // NETNSA_NSID, NETNSA_FD (include/uapi/linux/net_namespace.h)
	netnsaFD   = 3
)

// giveID gives the namespace behind fd an id in the calling thread's namespace,
// where countIDs sees it until the kernel has taken it off its list of
// namespaces (unhash_nsid, called by cleanup_net).
func giveID(fd int) error {
	attributes := netlink.NewAttributeEncoder()
	attributes.Uint32(netnsaFD, uint32(fd))
	attributes.Uint32(netnsaNSID, 0)
	body, err := attributes.Encode()
	if err != nil {
		return fmt.Errorf("give network namespace an id: %w", err)
	}
	// struct rtgenmsg, padded
	_, err = rtnetlink(unix.RTM_NEWNSID, netlink.Acknowledge, append(make([]byte, 4), body...))
	if err != nil {
		return fmt.Errorf("give network namespace an id: %w", err)
	}
	return nil
}

func countIDs() (int, error) {
	messages, err := rtnetlink(unix.RTM_GETNSID, netlink.Dump, make([]byte, 4))
	if err != nil {
		return 0, fmt.Errorf("list ids of network namespaces: %w", err)
	}
	return len(messages), nil
}

// htons is for the kernel's interfaces that want network byte order.
func htons(v uint16) uint16 {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], v)
	return binary.NativeEndian.Uint16(b[:])
}
