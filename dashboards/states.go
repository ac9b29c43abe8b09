package dashboards

import (
	"strings"

	"github.com/grafana/grafana-foundation-sdk/go/units"

	"sockq/collectors/catalogue"
)

// The states as metrics name them.
const (
	established = "ESTABLISHED"
	synSent     = "SYN_SENT"
	synRecv     = "SYN_RECV"
	finWait1    = "FIN_WAIT1"
	finWait2    = "FIN_WAIT2"
	timeWait    = "TIME_WAIT"
	closeWait   = "CLOSE_WAIT"
	lastAck     = "LAST_ACK"
	closing     = "CLOSING"
)

// states is what sockets do between connect() and the last ACK.
func states() board {
	s := scope{labelCluster, labelJob, labelInstance, catalogue.LabelNamespace, catalogue.LabelPod}
	in := func(states ...string) string {
		if len(states) == 1 {
			return is(catalogue.LabelState, states[0])
		}
		return catalogue.LabelState + `=~"` + strings.Join(states, "|") + `"`
	}
	sockets := func(states ...string) string { return sumBy(nil, s.of(catalogue.TCPSockets, in(states...))) }
	fullest := func(expr string) string {
		return most("10", namespace, expr, "sum", s.of(catalogue.TCPSockets, in(timeWait)))
	}
	edge := by(labelFrom, labelTo)
	// Each is absent until it is first counted.
	connected := sumBy(nil, s.rate(catalogue.Transitions, is(labelFrom, synSent), is(labelTo, established)))
	failed := sumBy(nil, s.rate(catalogue.ConnectFailures))
	connects := "(" + orZero(nil, failed, connected) + " + " + orZero(nil, connected, failed) + ")"

	return board{
		uid: statesUID, title: "sockq: TCP states", scope: s,
		description: "Sockets by state, how they move between states and how long they stay, connects and why they fail, resets, TIME_WAIT, leaks, bytes in queues. Namespace and pod are Kubernetes'; what the kernel knows only of network namespaces is shown for those that hold the pods chosen.",
		rows: []row{
			rowOf("Now",
				lineOf(4,
					stats(text{"Established", "Connections that are open. How many are too many depends on the application; a steady climb is a leak, or a client without a pool."},
						units.Short, query{"established", sockets(established)}),
					stats(text{"Connecting", "SYN_SENT: connects that wait for an answer. Many: the peer drops SYNs, see connect failures below."},
						units.Short, query{"SYN_SENT", sockets(synSent)}),
					stats(text{"Half-open", "SYN_RECV: handshakes of clients that are not complete. Many: a flood or a lossy path, see the listeners."},
						units.Short, query{"SYN_RECV", sockets(synRecv)}).runbooks(synFlood),
					stats(text{"TIME_WAIT", "Connections that were closed from this side, kept for 60 s. They cost little; what matters is how close they are to tcp_max_tw_buckets, below, and whether local ports run out."},
						units.Short, query{"TIME_WAIT", sockets(timeWait)}).runbooks(timeWaitOverflow),
					stats(text{"CLOSE_WAIT", "The peer has closed, the application has not. A few pass by; if they grow the application leaks connections: see which, and how old they are, below."},
						units.Short, query{"CLOSE_WAIT", sockets(closeWait)}).runbooks(closeWaitLeak),
					stats(text{"Failed connects", "Share of connect() calls that failed. Above a twentieth look at the errors below."},
						units.PercentUnit, query{"failed", ratio(orZero(nil, failed, connected), connects)}).
						thresholds(fine, step{0.05, look}, step{0.5, act}).runbooks(connectFailureRising).
						tiers("On tier C connects without a route count only with the syscall tracepoints (`--tracker.syscalls`).").
						empty("nobody called connect()"),
				),
			),
			rowOf("Sockets by state",
				lineOf(9,
					graph(text{"All states", "Exact counts of each census (5 s), half-open requests and time-wait mini-sockets included, as `ss -tan` shows them. CLOSE are bound sockets that neither listen nor connect."},
						units.Short, query{"{{state}}", sumBy(by(catalogue.LabelState), s.of(catalogue.TCPSockets))}),
					graph(text{"States on the way", "Those that a socket should leave soon. SYN_SENT grows: peers do not answer. SYN_RECV: clients do not. FIN_WAIT2: peers do not close. CLOSE_WAIT: the own application does not. LAST_ACK, CLOSING, FIN_WAIT1: the last packets are lost, or peers are gone."},
						units.Short, query{"{{state}}", sumBy(by(catalogue.LabelState), s.of(catalogue.TCPSockets, in(synSent, synRecv, finWait1, finWait2, closing, closeWait, lastAck)))}).
						runbooks(closeWaitLeak),
				),
			),
			rowOf("Transitions",
				lineOf(10,
					graph(text{"Transitions", "How many sockets a second go from one state to another, the 20 busiest ways. What opens has to close: compare the arrivals in a state with the departures from it."},
						units.CountsPerSecond, query{"{{from}} → {{to}}", busiest("20", edge, sumBy(edge, s.rate(catalogue.Transitions)), s.of(catalogue.Transitions))}).
						span(14).
						tiers("On tier C transitions of half-open requests and TIME_WAIT are missing, and closes that may hide a TIME_WAIT."),
					columns(text{"From → to", "The same now, with all ways. Straight from ESTABLISHED to CLOSE are resets and aborts; from SYN_SENT to CLOSE failed connects."}, "Per second",
						column{label: labelFrom, title: "From"},
						column{label: labelTo, title: "To"},
						column{expr: sumBy(edge, s.rate(catalogue.Transitions)), title: "Per second", unit: units.CountsPerSecond},
					).tiers("On tier C transitions of half-open requests and TIME_WAIT are missing, and closes that may hide a TIME_WAIT."),
				),
				lineOf(6,
					graph(text{"Transitions that TCP does not have", "Ways that the state machine does not know: lost events of the agent, or a kernel that does what others do not. If there are any, compare with events lost on the Agent dashboard, and tell sockq's developers the kernel's version."},
						units.CountsPerSecond, query{"{{from}} → {{to}}", sumBy(edge, s.rate(catalogue.UnexpectedTransitions))}).
						runbooks(eventsLost).empty("there was none"),
				),
			),
			rowOf("Connects",
				lineOf(9,
					durations(text{"Connect times", "From the SYN sent to the connection established: a round trip. Clouds at 1, 3, 7 s: SYNs were sent again, the peer drops some; a full accept queue there does that."},
						s.buckets(catalogue.ConnectSeconds, nil)).
						empty("no connect() succeeded, or the kernel is older than 5.12"),
					graph(text{"Connect times: quantiles", "Half of the connects, and one in a hundred, took longer than that. The second at 1 s or above: SYNs are lost or dropped at the peer."},
						units.Seconds,
						query{"half", s.quantile("0.5", catalogue.ConnectSeconds, nil)},
						query{"one in a hundred", s.quantile("0.99", catalogue.ConnectSeconds, nil)}).
						empty("no connect() succeeded, or the kernel is older than 5.12"),
					graph(text{"Failed connects by error", "`refused`: nobody listens there, or its queue answers with RST. `timeout`: SYNs are dropped, by a full queue or a firewall. `host_unreachable`, `net_unreachable`: routes. `no_ports`: local ports are used up; reuse connections, or widen net.ipv4.ip_local_port_range. `closed`: the application gave up first."},
						units.CountsPerSecond, query{"{{error}}", sumBy(by(labelError), s.rate(catalogue.ConnectFailures))}).stacked().
						runbooks(connectFailureRising).
						tiers("On tier C those without a route need the syscall tracepoints (`--tracker.syscalls`).").
						empty("no connect() failed since the agents started"),
				),
			),
			rowOf("Resets",
				lineOf(8,
					graph(text{"Resets sent, by reason", "RSTs that the nodes sent. Many: something connects to closed ports, or applications close with unread bytes. The reason is the kernel's own."},
						units.CountsPerSecond, query{"{{reason}}", sumBy(by(labelReason), s.rate(catalogue.ResetsSent))}).stacked().
						tiers("Reasons from Linux 6.10; before 6.12 those that belong to no socket are missing.").
						empty("no RST was sent since the agents started"),
					graph(text{"Resets received", "RSTs that ended something here: connects to closed ports, peers that crashed, or middleboxes that forgot the connection. With failed connects by `refused` they are the former."},
						units.CountsPerSecond, query{"received", sumBy(nil, s.rate(catalogue.ResetsReceived))}).
						empty("no RST was received since the agents started"),
				),
			),
			rowOf("TIME_WAIT",
				lineOf(8,
					graph(text{"TIME_WAIT against its limit", "Sockets in TIME_WAIT by network namespace, the ten with the most, and tcp_max_tw_buckets there (dashed). At the limit the kernel ends connections without TIME_WAIT: raise the sysctl, or let clients reuse connections."},
						units.Short,
						query{namespaceLegend, fullest(sumBy(also(namespace, catalogue.LabelNamespace, catalogue.LabelPod), s.of(catalogue.TCPSockets, in(timeWait))))},
						query{"limit · {{netns}} · {{instance}}", fullest(maxBy(namespace, s.of(catalogue.Sysctl, is(catalogue.LabelName, "tcp_max_tw_buckets"))))}).
						dashed("limit · .*").runbooks(timeWaitOverflow),
					graph(text{"TIME_WAIT fill", "The same as a share of the limit. From 0.8 on raise tcp_max_tw_buckets in that namespace."},
						units.PercentUnit,
						query{"{{netns}} · {{instance}}", fullest(ratio(sumBy(namespace, s.of(catalogue.TCPSockets, in(timeWait))), maxBy(namespace, s.of(catalogue.Sysctl, is(catalogue.LabelName, "tcp_max_tw_buckets")))))}).
						share().lined().runbooks(timeWaitOverflow),
					graph(text{"TIME_WAIT refused", "Connections that ended without TIME_WAIT because the limit was reached (TCPTimeWaitOverflow). Late packets of theirs may disturb a new connection on the same ports. Above 0: raise tcp_max_tw_buckets."},
						units.CountsPerSecond, query{"{{netns}} · {{instance}}", only(namespace, sumBy(namespace, s.rate(catalogue.KernelTCPEvents, is(catalogue.LabelEvent, "TCPTimeWaitOverflow"))), sumBy(namespace, s.of(catalogue.TCPSockets)))}).
						runbooks(timeWaitOverflow),
				),
			),
			rowOf("Connections that are not closed",
				lineOf(9,
					columns(text{"CLOSE_WAIT by process", "The peer closed, this process did not: every one is a descriptor that it forgot. Many and old: the application lacks a close() where a peer hangs up first; a restart frees them."}, "Sockets",
						column{label: catalogue.LabelProcess, title: "Process"},
						column{expr: some(s, catalogue.CloseWaitSockets), title: "Sockets", unit: units.NoUnit, wide: 80},
						column{expr: only(process, maxBy(process, s.of(catalogue.CloseWaitOldest)), some(s, catalogue.CloseWaitSockets)), title: "Oldest", unit: units.Seconds, steps: []step{{300, look}, {3600, act}}, wide: 90},
						column{label: catalogue.LabelNamespace, title: "Namespace"},
						column{label: catalogue.LabelPod, title: "Pod"},
						column{label: catalogue.LabelNetns, title: "Netns"},
						column{label: labelInstance, title: "Node", url: toNode(agentUID, ofRow)},
					).runbooks(closeWaitLeak).
						tiers("Needs CAP_BPF, CAP_PERFMON and the host's PID namespace.").
						empty("no process holds a socket in CLOSE_WAIT, or the agent may not see who does"),
					columns(text{"FIN_WAIT2 by process", "This process closed for writing, the peer did not answer with its own close. Old ones: peers that hang, or a half-closed protocol that is meant so. Those that no process holds end after tcp_fin_timeout."}, "Sockets",
						column{label: catalogue.LabelProcess, title: "Process"},
						column{expr: some(s, catalogue.FinWait2Sockets), title: "Sockets", unit: units.NoUnit, wide: 80},
						column{expr: only(process, maxBy(process, s.of(catalogue.FinWait2Oldest)), some(s, catalogue.FinWait2Sockets)), title: "Oldest", unit: units.Seconds, steps: []step{{300, look}, {3600, act}}, wide: 90},
						column{label: catalogue.LabelNamespace, title: "Namespace"},
						column{label: catalogue.LabelPod, title: "Pod"},
						column{label: catalogue.LabelNetns, title: "Netns"},
						column{label: labelInstance, title: "Node", url: toNode(agentUID, ofRow)},
					).
						tiers("Needs CAP_BPF, CAP_PERFMON and the host's PID namespace.").
						empty("no process holds a socket in FIN_WAIT2, or the agent may not see who does"),
				),
				lineOf(8,
					graph(text{"CLOSE_WAIT by process over time", "The ten processes with the most. A line that only climbs is a leak."},
						units.Short, query{processLegend, most("10", process, sumBy(process, s.of(catalogue.CloseWaitSockets)), "sum", s.of(catalogue.CloseWaitSockets))}).
						runbooks(closeWaitLeak).
						tiers("Needs CAP_BPF, CAP_PERFMON and the host's PID namespace.").
						empty("no process holds a socket in CLOSE_WAIT, or the agent may not see who does"),
					graph(text{"Age of the oldest in CLOSE_WAIT", "How long a process has had its oldest one, at least: sockets older than the agent count from its start. It climbs by a second a second while nobody closes it."},
						units.Seconds, query{processLegend, most("10", process, maxBy(process, s.of(catalogue.CloseWaitOldest)), "max", s.of(catalogue.CloseWaitOldest))}).
						runbooks(closeWaitLeak).
						tiers("Needs CAP_BPF, CAP_PERFMON and the host's PID namespace.").
						empty("no process holds a socket in CLOSE_WAIT, or the agent may not see who does"),
				),
			),
			rowOf("Bytes in queues",
				lineOf(9,
					graph(text{"Recv-Q by process", "Bytes that arrived and the application has not read, summed over its connections at the last census, the ten highest. Growing: it reads too slowly. Without a process: connections that wait for accept()."},
						units.BytesIEC, query{"{{direction}} " + processLegend, most("10", also(process, catalogue.LabelDirection), sumBy(also(process, catalogue.LabelDirection), s.of(catalogue.ReceiveQueueBytes)), "sum", s.of(catalogue.ReceiveQueueBytes))}),
					graph(text{"Send-Q by process", "Bytes that the peers have not acknowledged, summed, the ten highest. Growing: the peers read too slowly, or the path is congested or broken."},
						units.BytesIEC, query{"{{direction}} " + processLegend, most("10", also(process, catalogue.LabelDirection), sumBy(also(process, catalogue.LabelDirection), s.of(catalogue.SendQueueBytes)), "sum", s.of(catalogue.SendQueueBytes))}),
				),
				lineOf(9,
					graph(text{"Recv-Q: fullest connection", "The same of one connection each: one slow reader among many shows here and not in the sum."},
						units.BytesIEC, query{"{{direction}} " + processLegend, most("10", also(process, catalogue.LabelDirection), maxBy(also(process, catalogue.LabelDirection), s.of(catalogue.ReceiveQueueMaxBytes)), "max", s.of(catalogue.ReceiveQueueMaxBytes))}),
					graph(text{"Send-Q: fullest connection", "The same of one connection each: one slow peer among many shows here and not in the sum."},
						units.BytesIEC, query{"{{direction}} " + processLegend, most("10", also(process, catalogue.LabelDirection), maxBy(also(process, catalogue.LabelDirection), s.of(catalogue.SendQueueMaxBytes)), "max", s.of(catalogue.SendQueueMaxBytes))}),
				),
			),
			collapsed("Time in a state",
				lineOf(9,
					graph(text{"Time in a state: half of the sockets", "Half of the sockets that left a state stayed longer in it than that."},
						units.Seconds, query{"{{state}}", s.quantile("0.5", catalogue.StateSeconds, by(catalogue.LabelState))}).
						tiers(dwellTiers).empty("no socket left a state"),
					graph(text{"Time in a state: one in a hundred", "One in a hundred stayed longer than that. CLOSE_WAIT in minutes: an application that closes late, or when it is stopped."},
						units.Seconds, query{"{{state}}", s.quantile("0.99", catalogue.StateSeconds, by(catalogue.LabelState))}).
						tiers(dwellTiers).empty("no socket left a state"),
				),
				lineOf(8,
					s.dwell(synSent, "Waits for the peer's SYN-ACK, also of connects that failed. At 1, 3, 7 s and more: SYNs were sent again."),
					s.dwell(synRecv, "Half-open handshakes of clients. Long ones end by themselves, after tcp_synack_retries."),
					s.dwell(established, "How long connections live. Very short ones: a client without a pool, which pays a handshake for each request."),
				),
				lineOf(8,
					s.dwell(finWait1, "Closed here, and the FIN is not acknowledged yet. Long: the peer is gone, or its window is closed."),
					s.dwell(finWait2, "Closed here, and the peer has not closed. Long: the peer holds on to it."),
					s.dwell(timeWait, "60 s, always: less are those that a new connection or a RST ended early."),
				),
				lineOf(8,
					s.dwell(closeWait, "The peer closed; how long the application took to close, too. Long: it does not look whether its peer is there."),
					s.dwell(lastAck, "Closed on both sides, and the last ACK is outstanding. Long: it was lost, or the peer is gone."),
					s.dwell(closing, "Both sides closed at once. Rare, and short."),
				),
			),
		},
	}
}

const dwellTiers = "On tier C without TIME_WAIT, SYN_RECV and FIN_WAIT2. Of whole nodes, and empty when a pod is chosen, unless the agents run with `--states.per-netns`; sockets older than the agent are not in it."

// dwell is how long sockets stayed in a state, by how many of them.
func (s scope) dwell(state, meaning string) *panel {
	return durations(text{"Time in " + state, meaning},
		s.buckets(catalogue.StateSeconds, nil, is(catalogue.LabelState, state))).
		tiers(dwellTiers).empty("no socket left this state")
}

// some are the processes that have any.
func some(s scope, sockets *catalogue.Metric) string { return sumBy(process, s.of(sockets)) + " > 0" }
