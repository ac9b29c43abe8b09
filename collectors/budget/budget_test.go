package budget

import (
	"slices"
	"testing"

	"sockq/collectors/catalogue"
	"sockq/probes/tcpstate"
)

// A metric with a label of its own, beyond those of its thing, has more than one series.
// collectors compares the numbers with the exporter's.
func TestEachLabelIsCounted(t *testing.T) {
	things := map[Thing][]string{
		Listener: catalogue.AcceptQueueLength.Labels, Namespace: catalogue.ResetsReceived.Labels, Process: catalogue.CloseWaitSockets.Labels,
		Node: catalogue.ResetsReceived.Labels,
	}
	for _, m := range catalogue.All {
		if Of(m) == Agent || m == catalogue.UnexpectedTransitions {
			continue
		}
		own := slices.ContainsFunc(m.Labels, func(l string) bool { return !slices.Contains(things[Of(m)], l) })
		got := Scrape{Tier: "A", Native: true}.Metric(m)
		// What may be absent has one series at most.
		if own != (got.Most > 1) || got.Usual > got.Most {
			t.Errorf("%s with the labels %v has %+v", m.Name, m.Labels, got)
		}
		if onC := (Scrape{Tier: "C", Native: true}).Metric(m); onC.Usual > got.Usual || onC.Most > got.Most {
			t.Errorf("%s: %+v on C, %+v on A", m.Name, onC, got)
		}
	}
}

func TestUsualEdgesAreTaken(t *testing.T) {
	for _, e := range usualEdges {
		if _, ok := tcpstate.Index(e); !ok {
			t.Errorf("%v is no edge of Linux", e)
		}
	}
}

func TestNodeIsTheSum(t *testing.T) {
	s := Scrape{Tier: "C"}
	none, one := s.Node(Count{}), s.Node(Count{Listeners: 2, Namespaces: 3, Processes: 4})
	if none != s.One(Node).plus(s.One(Agent), 1) {
		t.Errorf("an empty node has %+v", none)
	}
	l, n, p := s.One(Listener), s.One(Namespace), s.One(Process)
	if want := none.Most + 2*l.Most + 3*n.Most + 4*p.Most; one.Most != want {
		t.Errorf("%d series at most, want %d", one.Most, want)
	}
	if want := none.Usual + 2*l.Usual + 3*n.Usual + 4*p.Usual; one.Usual != want {
		t.Errorf("%d series usually, want %d", one.Usual, want)
	}
	apart := Scrape{Tier: "C", PerNetns: true}
	if got, want := apart.One(Namespace), n.plus(s.One(Node), 1); got != want || apart.One(Node) != (Series{}) {
		t.Errorf("with --states.per-netns a namespace has %+v, want %+v", got, want)
	}
}
