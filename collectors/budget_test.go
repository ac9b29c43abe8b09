package collectors

import (
	"testing"
	"time"

	"sockq/collectors/budget"
	"sockq/collectors/catalogue"
	"sockq/probes"
	"sockq/probes/census"
	"sockq/probes/diagnose"
	"sockq/probes/tcpstate"
	"sockq/probes/tracker"
)

// everything is a Snapshot in which all that can go wrong has, once.
func everything() *probes.Snapshot {
	s := full()
	n := &s.Namespaces[0]
	for i := range n.Transitions {
		n.Transitions[i] = 1
	}
	n.Unexpected = nil
	for state := range s.StateSeconds {
		s.StateSeconds[state] = waits(1)
	}
	s.StateSeconds[tcpstate.Close] = tracker.Histogram{} // not measured
	s.Listeners[0].Verdicts = 1<<diagnose.Kinds - 1
	return s
}

// onTierC takes away what tracepoints do not tell.
func onTierC(s *probes.Snapshot) {
	l := &s.Listeners[0]
	l.RefusalsKnown, l.HalfOpenKnown = false, false
	clear(l.Drops[tracker.DropAcceptQueueFullReset+1:])
	n := &s.Namespaces[0]
	for _, t := range tcpstate.Transitions {
		if i, taken := tcpstate.Index(t.Edge); taken && t.Sight == tcpstate.Hidden {
			n.Transitions[i] = 0
		}
	}
	for _, state := range []tcpstate.State{tcpstate.SynRecv, tcpstate.FinWait2, tcpstate.TimeWait} {
		s.StateSeconds[state] = tracker.Histogram{}
	}
	n.Audited = [probes.AuditChecks]bool{probes.AuditStates: true}
}

// The budget's most are what the exporter shows then, metric by metric.
func TestBudgetIsThePage(t *testing.T) {
	for _, tier := range []catalogue.Tiers{"A", "B", "C"} {
		s := everything()
		if tier == "C" {
			onTierC(s)
		}
		families, done, err := New(&fixed{snapshot: s}).Gather()
		if err != nil {
			t.Fatal(err)
		}
		classic, native := make(map[string]int), make(map[string]int)
		for _, f := range families {
			for _, m := range f.Metric {
				native[f.GetName()]++
				classic[f.GetName()]++
				if m.Histogram != nil {
					classic[f.GetName()] += len(m.Histogram.Bucket) + 2 // le="+Inf", sum, count; counted once
				}
			}
		}
		done()
		for _, m := range catalogue.All {
			if budget.Of(m) == budget.Agent {
				continue
			}
			want := native[m.Name]
			if m == catalogue.ResetsSent { // the names are the kernel's
				if want = (budget.Scrape{Tier: tier, Native: true}).Metric(m).Most; want < len(s.Namespaces[0].ResetsSent) {
					t.Errorf("%s: the kernel has more reasons", m.Name)
				}
				native[m.Name], classic[m.Name] = want, want
			}
			if got := (budget.Scrape{Tier: tier, Native: true}).Metric(m).Most; got != want {
				t.Errorf("%s, tier %s, native: the budget has %d series, the page %d", m.Name, tier, got, want)
			}
			if got := (budget.Scrape{Tier: tier}).Metric(m).Most; got != classic[m.Name] {
				t.Errorf("%s, tier %s: the budget has %d series, the page %d", m.Name, tier, got, classic[m.Name])
			}
		}
	}
}

// working is a listener to which connections come and that refuses nobody.
func working(s *probes.Snapshot) {
	l := &s.Listeners[0]
	l.Drops = [tracker.DropReasons]uint64{}
	l.HalfOpenEnded = [tracker.HalfOpenEnds]uint64{tracker.EndCompleted: 1}
	l.Verdicts, l.Verdict = 1<<diagnose.OK, &diagnose.Verdict{Kind: diagnose.OK}
	n := &s.Namespaces[0]
	n.ConnectFailures = [tracker.ConnectErrors]uint64{}
	n.ResetsSent = nil
	p := &s.Processes[0]
	p.CloseWait, p.OldestCloseWait, p.FinWait2, p.OldestFinWait2 = 0, 0, 0, 0
}

// What is usual is what a node shows on which nothing fails. Which edges and states
// are is a list of the budget's.
func TestUsualBudgetIsThePage(t *testing.T) {
	for _, tier := range []catalogue.Tiers{"A", "C"} {
		s := everything()
		working(s)
		if tier == "C" {
			onTierC(s)
		}
		families, done, err := New(&fixed{snapshot: s}).Gather()
		if err != nil {
			t.Fatal(err)
		}
		page := make(map[string]int)
		for _, f := range families {
			page[f.GetName()] = len(f.Metric)
		}
		done()
		for _, m := range catalogue.All {
			if budget.Of(m) == budget.Agent || m == catalogue.Transitions || m == catalogue.StateSeconds {
				continue
			}
			if got := (budget.Scrape{Tier: tier, Native: true}).Metric(m).Usual; got != page[m.Name] {
				t.Errorf("%s, tier %s: the budget has %d series, the page %d", m.Name, tier, got, page[m.Name])
			}
		}
	}
}

// A node of many things has as many times what one costs, and those that no process has
// open are its namespaces'.
func TestBudgetOfManyThings(t *testing.T) {
	one := everything()
	s := everything()
	s.Listeners, s.Namespaces, s.Processes = nil, nil, nil
	count := budget.Count{Listeners: 70, Namespaces: 6, Processes: 15}
	names := []string{"a", "b", "c", "d", "e", "f"}
	for _, name := range names[:count.Namespaces] {
		n := one.Namespaces[0]
		n.Name, n.ResetsSent = name, nil
		s.Namespaces = append(s.Namespaces, n)
		rest := probes.Process{
			Namespace: name, QueuesKnown: true,
			ReceiveMaxKnown: [census.Directions]bool{true, true}, SendMaxKnown: [census.Directions]bool{true, true},
		}
		s.Processes = append(s.Processes, rest)
	}
	for i := range count.Processes {
		p := one.Processes[0]
		p.Process, p.OldestCloseWait = string(rune('a'+i)), time.Second
		s.Processes = append(s.Processes, p)
	}
	for i := range count.Listeners {
		l := one.Listeners[0]
		l.ID, l.Address = uint64(i), string(rune('0'+i))
		s.Listeners = append(s.Listeners, l)
	}
	page := 0
	for _, m := range catalogue.All {
		if budget.Of(m) != budget.Agent {
			page += len(lines(text(t, New(&fixed{snapshot: s})), m.Name+"{"))
			if m.Type == catalogue.Histogram {
				for _, part := range []string{"_bucket{", "_sum{", "_count{"} {
					page += len(lines(text(t, New(&fixed{snapshot: s})), m.Name+part))
				}
			}
		}
	}
	scrape := budget.Scrape{Tier: "A"}
	want := scrape.Node(count).Most - budget.AgentMost - count.Namespaces*scrape.Metric(catalogue.ResetsSent).Most
	if page != want {
		t.Errorf("the page has %d series, the budget %d", page, want)
	}
}
