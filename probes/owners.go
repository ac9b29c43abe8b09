package probes

import (
	"cmp"
	"net/netip"

	"sockq/probes/census"
)

// Owner is whom sockets belong to, as labels tell it; "" for what is unknown.
type Owner struct {
	Process                   string // as /proc/PID/comm
	Namespace, Pod, Container string // of Kubernetes
}

func (o Owner) compare(other Owner) int {
	return cmp.Or(cmp.Compare(o.Process, other.Process), cmp.Compare(o.Namespace, other.Namespace),
		cmp.Compare(o.Pod, other.Pod), cmp.Compare(o.Container, other.Container))
}

// Collapse says which listeners of one owner share a series, whose address ends
// in ":*".
type Collapse uint8

// The rules.
const (
	CollapseAuto   Collapse = iota // those on high ports, of a process with more than collapseAbove listeners
	CollapseAlways                 // all on high ports
	CollapseNever
)

const (
	// The default ranges of NodePorts (30000–32767) and of ports that the kernel
	// chooses (32768–60999) begin here.
	firstHighPort = 30000
	collapseAbove = 50
)

// shares tells whether a listener of an owner that has so many others joins the
// shared series.
func (c Collapse) shares(r *census.Listener, owner Owner, others int) bool {
	switch {
	case r.Address.Port() < firstHighPort || c == CollapseNever:
		return false
	case c == CollapseAlways:
		return true
	}
	return owner.Process != "" && others >= collapseAbove
}

// sharedAddress is the label of those that share a series.
func sharedAddress(r *census.Listener) string {
	host := netip.AddrPortFrom(r.Address.Addr(), 0).String()
	shared := host[:len(host)-1] + "*"
	if r.Device != "" {
		shared += "%" + device(r)
	}
	return shared
}
