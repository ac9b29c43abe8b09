package probes

import (
	"math"
	"slices"
	"strconv"
	"testing"

	"sockq/probes/census"
	"sockq/probes/tcpstate"
)

// nameTable is a netns.Names without a kernel.
type nameTable struct {
	names     map[uint32]string
	refreshed int
}

func (n *nameTable) Refresh() error { n.refreshed++; return nil }

func (n *nameTable) Name(inode uint32, initial bool) string {
	if initial {
		return "host"
	}
	if name, ok := n.names[inode]; ok {
		return name
	}
	return strconv.Itoa(int(inode))
}

func list(inodes ...uint32) (list []census.Namespace) {
	for _, inode := range inodes {
		list = append(list, census.Namespace{Inode: inode, Cookie: uint64(inode) + 1000, Initial: inode == 1})
	}
	return list
}

func names(r *registry) (names []string) {
	for _, n := range r.snapshot(nil, false) {
		names = append(names, n.Name)
	}
	return names
}

func update(t *testing.T, r *registry, named bool, inodes ...uint32) []identity {
	t.Helper()
	return r.update(list(inodes...), named)
}

func TestNamespacesComeAndGo(t *testing.T) {
	table := &nameTable{names: map[uint32]string{}}
	r := newRegistry(10, table)
	update(t, r, false, 1, 5)
	if got := names(r); !slices.Equal(got, []string{"5", "host"}) {
		t.Fatalf("names are %v", got)
	}
	update(t, r, false, 1, 5)
	if table.refreshed != 1 {
		t.Errorf("names were read %d times, nothing was new", table.refreshed)
	}
	table.names[5] = "web" // ip netns add makes the namespace first
	if renamed := update(t, r, true, 1, 5); !slices.Equal(renamed, []identity{{5, 1005}}) {
		t.Errorf("renamed are %v", renamed)
	}
	update(t, r, false, 1, 6)
	if got := names(r); !slices.Equal(got, []string{"6", "host"}) {
		t.Fatalf("names are %v", got)
	}
	if r.knows(5, 1005) || r.own != 2 || len(r.taken) != 2 {
		t.Errorf("the namespace that went is still there: %+v", r)
	}
	// The inode number comes back with another namespace.
	update(t, r, false, 1, 5)
	if got := names(r); !slices.Equal(got, []string{"host", "web"}) {
		t.Errorf("names are %v", got)
	}
}

func TestNamesAreUnique(t *testing.T) {
	r := newRegistry(10, &nameTable{names: map[uint32]string{5: "web", 6: "web"}})
	update(t, r, false, 1, 5, 6)
	if got := names(r); !slices.Equal(got, []string{"6-1006", "host", "web"}) {
		t.Errorf("names are %v", got)
	}
	if renamed := update(t, r, true, 1, 5, 6); len(renamed) != 0 {
		t.Errorf("renamed are %v", renamed)
	}
}

func TestNamespacesOverTheCapAreOther(t *testing.T) {
	r := newRegistry(2, &nameTable{})
	update(t, r, false, 1, 5, 6, 7)
	counted := map[identity]census.NamespaceSockets{}
	for _, inode := range []uint32{1, 5, 6, 7} {
		c := census.NamespaceSockets{}
		c.States[tcpstate.Established] = uint64(inode)
		c.Queues[census.Inbound] = census.Queues{ReceiveBytes: 10, SendBytes: 20, ReceiveMaxBytes: 5, SendMaxBytes: 6}
		counted[identity{inode, uint64(inode) + 1000}] = c
	}
	snapshot := r.snapshot(counted, true)
	if len(snapshot) != 3 || snapshot[2].Name != Other || r.over() != 2 {
		t.Fatalf("%d over the cap, snapshot is %+v", r.over(), snapshot)
	}
	other := snapshot[2]
	if other.States[tcpstate.Established] != 13 || other.SettingsKnown || !other.SocketsKnown {
		t.Errorf("other is %+v", other)
	}
	if q := other.Queues[census.Inbound]; q != (census.Queues{ReceiveBytes: 20, SendBytes: 40}) {
		t.Errorf("other's queues are %+v", q)
	}
	// One in Other stays there, whoever leaves.
	update(t, r, true, 1, 6, 7)
	if got := names(r); !slices.Equal(got, []string{"host", Other}) {
		t.Errorf("names are %v", got)
	}
}

// What the census did not count is not 0.
func TestNamespaceYoungerThanTheCensus(t *testing.T) {
	r := newRegistry(10, &nameTable{})
	update(t, r, false, 1, 5)
	snapshot := r.snapshot(map[identity]census.NamespaceSockets{{1, 1001}: {}}, true)
	if young := snapshot[0]; young.Name != "5" || young.SocketsKnown {
		t.Errorf("the young one is %+v", young)
	}
	if n := snapshot[1]; n.Name != "host" || !n.SocketsKnown {
		t.Errorf("the other one is %+v", n)
	}
}

func TestSynBound(t *testing.T) {
	r := newRegistry(10, &nameTable{})
	settings := list(1)
	for _, c := range []struct {
		cookies, backlog int64
		want             uint64
		known            bool
	}{
		{0, 16, 12, true},
		{0, 128, 96, true},
		{1, 16, math.MaxUint64, true},
		{2, 16, math.MaxUint64, true},
		{-1, 16, 0, false},
		{0, -1, 0, false},
	} {
		settings[0].Sysctls[census.SysctlSyncookies] = c.cookies
		settings[0].Sysctls[census.SysctlMaxSynBacklog] = c.backlog
		r.update(settings, false)
		if got, known := r.synBound(1, 1001); got != c.want || known != c.known {
			t.Errorf("tcp_syncookies=%d tcp_max_syn_backlog=%d: %d %v", c.cookies, c.backlog, got, known)
		}
	}
	if _, known := r.synBound(2, 2); known {
		t.Error("the bound of a namespace that is not there is known")
	}
}
