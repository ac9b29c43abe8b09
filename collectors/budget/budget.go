// Package budget computes from the catalogue how many series sockq costs a Prometheus.
package budget

import (
	"slices"

	"sockq/collectors/catalogue"
	"sockq/probes"
	"sockq/probes/census"
	"sockq/probes/diagnose"
	"sockq/probes/tcpstate"
	"sockq/probes/tracker"
)

// Thing is what a series is about.
type Thing int

// The things.
const (
	Listener  Thing = iota // a set of labels of listeners
	Namespace              // a network namespace
	Process                // a name of processes that have connections, in a namespace
	Node                   // what is counted for all namespaces together
	Agent                  // sockq itself
)

// Of is what a metric's series are about.
func Of(m *catalogue.Metric) Thing {
	has := func(label string) bool { return slices.Contains(m.Labels, label) }
	switch {
	case has(catalogue.LabelAddress):
		return Listener
	case has(catalogue.LabelProcess):
		return Process
	case m == catalogue.StateSeconds:
		return Node // unless --states.per-netns
	case has(catalogue.LabelNetns):
		return Namespace
	}
	return Agent
}

// Scrape is what decides about series beside what there is on the node.
type Scrape struct {
	Tier     catalogue.Tiers // one of them
	Native   bool            // histograms in their native form only
	PerNetns bool            // --states.per-netns
}

// Series says how many there are. Usual are those of a thing that works: connections
// come and go in the ordinary way and nobody is refused. Most are there when all
// that can go wrong has, once.
type Series struct{ Usual, Most int }

func (s Series) plus(t Series, times int) Series {
	return Series{s.Usual + times*t.Usual, s.Most + times*t.Most}
}

// AgentMost is more than sockq has about itself, its Go runtime and its process. How
// many these are depends on the Go version and on what is turned on.
const AgentMost = 200

// resetReasons are those of enum sk_rst_reason in Linux 6.18.
const resetReasons = 25

// usualEdges are taken by connections that are opened and closed in the ordinary way,
// from both ends, and by their listener.
var usualEdges = []tcpstate.Edge{
	{From: tcpstate.Close, To: tcpstate.Listen}, {From: tcpstate.Listen, To: tcpstate.Close},
	{From: tcpstate.Close, To: tcpstate.SynSent}, {From: tcpstate.SynSent, To: tcpstate.Established},
	{From: tcpstate.Listen, To: tcpstate.NewSynRecv}, {From: tcpstate.NewSynRecv, To: tcpstate.SynRecv},
	{From: tcpstate.Listen, To: tcpstate.SynRecv}, {From: tcpstate.SynRecv, To: tcpstate.Established},
	{From: tcpstate.Established, To: tcpstate.FinWait1}, {From: tcpstate.FinWait1, To: tcpstate.FinWait2},
	{From: tcpstate.FinWait2, To: tcpstate.TimeWait}, {From: tcpstate.TimeWait, To: tcpstate.Close},
	{From: tcpstate.Established, To: tcpstate.CloseWait}, {From: tcpstate.CloseWait, To: tcpstate.LastAck},
	{From: tcpstate.LastAck, To: tcpstate.Close},
}

// trampolines tells whether the tier has them, or kprobes, in their place.
func (s Scrape) trampolines() bool { return s.Tier != "C" }

func (s Scrape) edges() (n Series) {
	for _, t := range tcpstate.Transitions {
		if t.Sight == tcpstate.Never || t.Sight == tcpstate.Hidden && !s.trampolines() {
			continue
		}
		n.Most++
		if slices.Contains(usualEdges, t.Edge) {
			n.Usual++
		}
	}
	return n
}

// states are those in which time is measured: none in CLOSE.
func (s Scrape) states() (n Series) {
	for _, state := range tcpstate.All {
		switch state {
		case tcpstate.Close:
			continue
		case tcpstate.SynRecv, tcpstate.FinWait2, tcpstate.TimeWait:
			if !s.trampolines() {
				continue
			}
		}
		n.Most++
		if state != tcpstate.Closing {
			n.Usual++
		}
	}
	return n
}

// combinations are how many of the values of a metric's own labels, those beyond the
// thing's, there are.
func (s Scrape) combinations(m *catalogue.Metric) Series {
	all := func(n int) Series { return Series{n, n} }
	rare := func(n int) Series { return Series{0, n} }
	switch m {
	case catalogue.Drops:
		if !s.trampolines() {
			return rare(2) // of final ACKs
		}
		return rare(len(tracker.DropReasonNames))
	case catalogue.HalfOpenEnded:
		return Series{1, len(tracker.HalfOpenEndNames)}
	case catalogue.Verdict:
		return Series{1, len(diagnose.Names)}
	case catalogue.TCPSockets:
		return all(len(tcpstate.All))
	case catalogue.ReceiveQueueBytes, catalogue.ReceiveQueueMaxBytes, catalogue.SendQueueBytes, catalogue.SendQueueMaxBytes:
		return all(int(census.Directions))
	case catalogue.Transitions:
		return s.edges()
	case catalogue.UnexpectedTransitions:
		return Series{} // there are no such
	case catalogue.StateSeconds:
		return s.states()
	case catalogue.ConnectFailures:
		return rare(len(tracker.ConnectErrorNames))
	case catalogue.ResetsSent:
		return rare(resetReasons)
	case catalogue.KernelTCPEvents:
		return all(len(census.EventNames))
	case catalogue.Sysctl:
		return all(len(census.SysctlNames))
	case catalogue.AuditDifference:
		if !s.trampolines() {
			return all(1) // states
		}
		return all(len(probes.AuditCheckNames))
	case catalogue.CloseWaitOldest, catalogue.FinWait2Oldest:
		return rare(1)
	}
	return all(1)
}

// Metric is how many series one thing has of a metric; of the agent's own metrics that
// is not known.
func (s Scrape) Metric(m *catalogue.Metric) Series {
	if m.Tiers == catalogue.TiersAB && !s.trampolines() {
		return Series{}
	}
	each := 1
	if m.Type == catalogue.Histogram && !s.Native {
		each = len(m.Buckets) + 3 // le="+Inf", sum, count
	}
	return Series{}.plus(s.combinations(m), each)
}

// One is how many series one more thing costs.
func (s Scrape) One(t Thing) (sum Series) {
	for _, m := range catalogue.All {
		about := Of(m)
		if m == catalogue.StateSeconds && s.PerNetns {
			about = Namespace
		}
		// What no process has open is summed by namespace.
		rest := t == Namespace && slices.Contains(m.Labels, catalogue.LabelDirection)
		if about == t && t != Agent || rest {
			sum = sum.plus(s.Metric(m), 1)
		}
	}
	if t == Agent {
		return Series{AgentMost, AgentMost}
	}
	return sum
}

// Count is how many things there are on a node.
type Count struct{ Listeners, Namespaces, Processes int }

// Node is how many series a node has.
func (s Scrape) Node(c Count) Series {
	return s.One(Agent).plus(s.One(Node), 1).
		plus(s.One(Listener), c.Listeners).plus(s.One(Namespace), c.Namespaces).plus(s.One(Process), c.Processes)
}
