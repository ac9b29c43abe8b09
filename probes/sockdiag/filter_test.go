package sockdiag

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"sockq/probes/tcpstate"
)

// condition is a Filter beside what it should do.
type condition struct {
	name   string
	filter Filter
	match  func(*Socket) bool
}

func leaves(sockets []Socket) []condition {
	prefix := func(p netip.Prefix, a netip.Addr) bool {
		return p.Contains(a) || a.Is4In6() && p.Contains(a.Unmap())
	}
	all := []condition{
		{"everything", Filter{}, func(*Socket) bool { return true }},
		{"nothing", Or(), func(*Socket) bool { return false }},
		{"no device", Device(0), func(s *Socket) bool { return s.Interface == 0 }},
		{"lo", Device(1), func(s *Socket) bool { return s.Interface == 1 }},
	}
	for _, s := range []string{"127.0.0.1/32", "127.0.0.0/30", "127.0.0.3/32", "0.0.0.0/0", "::1/128", "::/0", "10.0.0.0/9", "::ffff:127.0.0.1/127"} {
		p := netip.MustParsePrefix(s)
		unmapped := p
		if p.Addr().Is4In6() {
			unmapped = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
		}
		all = append(all,
			condition{"local " + s, LocalPrefix(p), func(s *Socket) bool { return prefix(unmapped, s.Local.Addr()) }},
			condition{"remote " + s, RemotePrefix(p), func(s *Socket) bool { return prefix(unmapped, s.Remote.Addr()) }})
	}
	for i := range 4 {
		s := sockets[i*len(sockets)/4]
		local, remote := s.Local.Port(), s.Remote.Port()
		all = append(all,
			condition{fmt.Sprint("local port ", local), LocalPort(local), func(s *Socket) bool { return s.Local.Port() == local }},
			condition{fmt.Sprint("remote port ", remote), RemotePort(remote), func(s *Socket) bool { return s.Remote.Port() == remote }})
	}
	return all
}

// tree combines leaves at random.
func tree(r *rand.Rand, leaves []condition, depth int) condition {
	if depth == 0 || r.IntN(5) == 0 {
		return leaves[r.IntN(len(leaves))]
	}
	if r.IntN(3) == 0 {
		c := tree(r, leaves, depth-1)
		return condition{"not(" + c.name + ")", Not(c.filter), func(s *Socket) bool { return !c.match(s) }}
	}
	var parts []condition
	var filters []Filter
	name := ""
	for range 1 + r.IntN(3) {
		c := tree(r, leaves, depth-1)
		parts, filters = append(parts, c), append(filters, c.filter)
		name += c.name + "; "
	}
	if r.IntN(2) == 0 {
		return condition{"and(" + name + ")", And(filters...), func(s *Socket) bool {
			return !slices.ContainsFunc(parts, func(c condition) bool { return !c.match(s) })
		}}
	}
	return condition{"or(" + name + ")", Or(filters...), func(s *Socket) bool {
		return slices.ContainsFunc(parts, func(c condition) bool { return c.match(s) })
	}}
}

// The kernel chooses the same sockets as the conditions written in Go.
func TestFilter(t *testing.T) {
	newNetns(t)
	c := newClientHere(t)
	for _, address := range []string{"127.0.0.1:0", "127.0.0.2:0", "127.0.0.3:0", "[::1]:0", "[::]:0"} {
		l := listen(t, address, 5)
		pair(t, l)
		pair(t, l)
		if l := localAddress(t, l); l.Addr().IsUnspecified() {
			connectTo(t, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), l.Port()))
		}
	}
	device := newSocket(t, unix.AF_INET6, unix.SOCK_STREAM)
	if err := unix.BindToDevice(device, "lo"); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(device, 5); err != nil {
		t.Fatal(err)
	}
	all, err := c.List(Query{States: tcpstate.MaskListen | tcpstate.MaskConnected})
	if err != nil {
		t.Fatal(err)
	}

	conditions := leaves(all)
	r := rand.New(rand.NewPCG(1, 2))
	for range 300 {
		conditions = append(conditions, tree(r, conditions[:min(len(conditions), 28)], 4))
	}
	matches := 0
	for _, cond := range conditions {
		for _, family := range []uint8{unix.AF_UNSPEC, unix.AF_INET, unix.AF_INET6} {
			got := list(t, c, Query{Family: family, Filter: cond.filter})
			want := 0
			for _, s := range all {
				if (family != unix.AF_UNSPEC && s.Family != family) || !cond.match(&s) {
					continue
				}
				want++
				if _, ok := got[s.Cookie]; !ok {
					t.Errorf("family %d, %s: %s to %s is missing", family, cond.name, s.Local, s.Remote)
				}
			}
			if len(got) != want {
				t.Errorf("family %d, %s: %d sockets, want %d", family, cond.name, len(got), want)
			}
			matches += want
		}
	}
	if matches == 0 || matches == len(all)*len(conditions)*2 {
		t.Errorf("%d matches prove nothing", matches)
	}
}

func TestFilterErrors(t *testing.T) {
	invalid := LocalPrefix(netip.Prefix{})
	for name, f := range map[string]Filter{
		"leaf": invalid, "and": And(LocalPort(1), invalid), "and first": And(invalid, LocalPort(1)),
		"or": Or(LocalPort(1), invalid), "or first": Or(invalid, LocalPort(1)), "not": Not(invalid),
	} {
		if _, err := (Query{Filter: f}).request(tcpdiagGetsock, 0); !errors.Is(err, errFilterPrefix) {
			t.Errorf("%s: %v, want %v", name, err, errFilterPrefix)
		}
	}
	many := make([]Filter, 10000)
	for i := range many {
		many[i] = LocalPort(uint16(i))
	}
	for name, f := range map[string]Filter{"and": And(many...), "or": Or(many...)} {
		if _, err := (Query{Filter: f}).request(tcpdiagGetsock, 0); !errors.Is(err, errFilterLength) {
			t.Errorf("%s of too many: %v, want %v", name, err, errFilterLength)
		}
	}
}

// A thousand alternatives still fit, and the last one is reached.
func TestFilterLong(t *testing.T) {
	newNetns(t)
	c := newClientHere(t)
	l := listen(t, "127.0.0.1:2000", 1)
	many := make([]Filter, 1000)
	for i := range many {
		many[i] = LocalPort(uint16(1001 + i))
	}
	for name, f := range map[string]Filter{"or": Or(many...), "and": And(Not(Or(many[:999]...)), many[999])} {
		got := list(t, c, Query{States: tcpstate.MaskListen, Filter: f})
		if _, ok := got[cookie(t, l)]; !ok || len(got) != 1 {
			t.Errorf("%s: %d sockets, want 1", name, len(got))
		}
	}
	if got := list(t, c, Query{States: tcpstate.MaskListen, Filter: Not(Or(many...))}); len(got) != 0 {
		t.Errorf("not: %d sockets, want none", len(got))
	}
}
