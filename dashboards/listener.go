package dashboards

import (
	"strings"

	"github.com/grafana/grafana-foundation-sdk/go/units"

	"sockq/collectors/catalogue"
)

// listeners is everything about a listener, or a few.
func listeners() board {
	s := scope{
		labelCluster, labelJob, labelInstance, catalogue.LabelNamespace, catalogue.LabelPod,
		catalogue.LabelNetns, catalogue.LabelAddress, catalogue.LabelProcess,
	}
	// fullest keeps a graph legible when many listeners are chosen.
	fullest := func(expr string) string {
		return most("10", listener, expr, "max", s.of(catalogue.AcceptQueuePeakRatio))
	}
	each := func(m *catalogue.Metric) string { return fullest(sumBy(listener, s.of(m))) }

	return board{
		uid: listenerUID, title: "sockq: listener", scope: s,
		description: "Both queues of a listener, what came in, what was refused and why, how long connections waited, and whose it is. Choose one by its address; of more than ten the ten with the highest peaks are drawn where each has a line of its own, sums and heatmaps are of all chosen.",
		rows: []row{
			rowOf("Now",
				lineOf(4,
					stats(text{"Fill", "Accept queue: length / (limit + 1), of the fullest socket. At 1 every SYN is refused until accept() takes one out."},
						units.PercentUnit, query{"now", maxBy(nil, s.of(catalogue.AcceptQueueFillRatio))}).share().runbooks(acceptQueueOverflow),
					stats(text{"Peak", "The same at its highest in the last 60 to 120 s, short bursts between scrapes included. From 0.8 on raise the backlog or accept faster."},
						units.PercentUnit, query{"peak", maxBy(nil, s.of(catalogue.AcceptQueuePeakRatio))}).share().runbooks(acceptQueueNearFull),
					stats(text{"Refused", "Share of the attempts that the full accept queue refused in the last minute, of the listener that refused most. Clients try again, so a tenth refused is not a tenth of users lost, but all of those wait at least a second."},
						units.PercentUnit, query{"refused", maxBy(nil, orZero(listener, maxBy(listener, s.rule(OverflowRatio1m)), maxBy(listener, s.of(catalogue.AcceptQueuePeakRatio))))}).
						thresholds(fine, step{1e-9, look}, step{0.1, act}).runbooks(acceptQueueOverflow).
						tiers(ruled),
					stats(text{"Mean wait", "How long a connection waits for accept() on average, by Little's law. Long, and the queue is full: the application is too slow, a longer backlog only makes clients wait longer."},
						units.Seconds, query{"mean", maxBy(nil, meanWait(s))}).
						thresholds(fine, step{0.5, look}, step{1, act}).runbooks(acceptWaitLong).
						empty("no connection came in"),
					stats(text{"Last accept", "When accept() last took a connection. Long ago while the queue is not empty: the application is stuck; look at its threads and its CPU limit."},
						units.DateTimeFromNow, query{"accept", maxBy(nil, s.of(catalogue.LastAccept)) + " * 1000"}).
						runbooks(listenerStalled).
						tiers("On tier C it needs the syscall tracepoints (`--tracker.syscalls`).").
						empty("nothing was accepted since the agent started"),
					stats(text{"Gave up waiting", "Connections in the accept queue whose client has closed its side already, at the last census. The application will answer nobody: it accepts too late. Absent where several listeners share the port."},
						units.Short, query{"gave up", sumBy(nil, s.of(catalogue.AcceptQueueGaveUp))}).
						thresholds(fine, oneIsOdd...).runbooks(acceptWaitLong).
						empty("several listeners share the port, or nobody knows who holds it"),
				),
				lineOf(9,
					timeline(text{"Verdicts", "The diagnosis of each listener over its last minute, every 5 s. The agent's JSON (/api/v1/snapshot on the node) has its evidence in numbers and the advice in words; the runbooks have more."},
						verdicts, query{listenerLegend, fullest(currentVerdict(s))}).
						runbooks(listenerStalled, backlogClamped, synFlood),
				),
			),
			rowOf("Accept queue",
				lineOf(9,
					graph(text{"Length, peak and limit", "Connections that wait for accept(): at the scrape, at the highest of the last 60 to 120 s, and the effective backlog, min(argument of listen(), somaxconn at that time). A queue holds one more than its limit. Lengths and limits of a SO_REUSEPORT group are sums, the peak is its fullest socket's. Peaks at the limit: raise it, if waits are short; otherwise accept faster."},
						units.Short,
						query{"length · " + listenerLegend, each(catalogue.AcceptQueueLength)},
						query{"peak · " + listenerLegend, fullest(maxBy(listener, s.of(catalogue.AcceptQueuePeak)))},
						query{"limit · " + listenerLegend, each(catalogue.AcceptQueueLimit)}).
						dashed("limit · .*").runbooks(acceptQueueNearFull, acceptQueueOverflow),
					graph(text{"Fill ratio", "Length and peak / (limit + 1), of the fullest socket, and the share of time in which it was full. Peaks at 1 with little time at full are bursts: a longer backlog holds them. Full for long: it is the application."},
						units.PercentUnit,
						query{"now · " + listenerLegend, fullest(maxBy(listener, s.of(catalogue.AcceptQueueFillRatio)))},
						query{"peak · " + listenerLegend, fullest(maxBy(listener, s.of(catalogue.AcceptQueuePeakRatio)))},
						query{"time full · " + listenerLegend, fullest(maxBy(listener, s.rate(catalogue.AcceptQueueFullSeconds)))}).
						share().lined().runbooks(acceptQueueNearFull),
				),
				lineOf(9,
					graph(text{"Arrivals and accepts", "What reached the listener: SYNs, handshakes completed into the queue, accept() calls that took one out, and connections that were lost when the listener closed. Completed above accepted for long: the queue fills. SYNs far above completed: they are refused, or a flood."},
						units.CountsPerSecond,
						query{"SYNs", sumBy(nil, s.rate(catalogue.Syns))},
						query{"completed", sumBy(nil, s.rate(catalogue.Connections))},
						query{"accepted", sumBy(nil, s.rate(catalogue.Accepts))},
						query{"abandoned", sumBy(nil, s.rate(catalogue.Abandoned))}).
						tiers("SYNs and abandoned on tiers A and B only; accepts on tier C from syscall tracepoints, absent for applications that accept by io_uring."),
					graph(text{"Drops by reason", "What was refused and why. `accept_queue_full_syn`, `_ack`, `_reset`: a full accept queue. `syn_queue_full`, `max_syn_backlog`: a full SYN queue. `no_memory`, `no_route`, `policy`, `icmp`: not the queues. Dashed: the kernel's own count at the socket (`sk_drops`), of all reasons."},
						units.CountsPerSecond,
						query{"{{reason}}", sumBy(by(labelReason), s.rate(catalogue.Drops))},
						query{"socket drops", sumBy(nil, s.rate(catalogue.SocketDrops))}).
						dashed("socket drops").runbooks(acceptQueueOverflow, synQueueOverflow).
						tiers("On tier C reasons are known only of final ACKs, from Linux 6.17; the socket drops are there on every tier, with SYNs that were refused."),
				),
			),
			rowOf("Waits for accept()",
				lineOf(9,
					durations(text{"Waits", "How long connections waited in the accept queue, by how many of them. A second cloud far above the first: some wait for a busy or throttled worker."},
						s.buckets(catalogue.AcceptWaitSeconds, nil)).runbooks(acceptWaitLong).
						tiers("On tier C it needs the syscall tracepoints (`--tracker.syscalls`).").
						empty("no accept() was seen"),
					graph(text{"Waits: quantiles and mean", "Half of the connections, and one in a hundred, waited longer than that; the mean is Little's law, which needs no accept() to be seen, and counts those that still wait. Above 1 s clients notice: add workers or CPU, a longer backlog does not help."},
						units.Seconds,
						query{"half", s.quantile("0.5", catalogue.AcceptWaitSeconds, nil)},
						query{"one in a hundred", s.quantile("0.99", catalogue.AcceptWaitSeconds, nil)},
						query{"mean · " + listenerLegend, fullest(meanWait(s))}).
						runbooks(acceptWaitLong).
						tiers("On tier C quantiles need the syscall tracepoints (`--tracker.syscalls`); the mean is there on every tier.").
						empty("no connection came in"),
				),
			),
			rowOf("SYN queue and handshakes",
				lineOf(8,
					graph(text{"SYN queue: length, peak and limit", "Half-open connections: at the scrape, at the highest of the last 60 to 120 s, and where the queue is full. At the limit the kernel drops SYNs, or answers with cookies. Raise the backlog; is it a flood, leave tcp_syncookies on."},
						units.Short,
						query{"length · " + listenerLegend, each(catalogue.SynQueueLength)},
						query{"peak · " + listenerLegend, fullest(maxBy(listener, s.of(catalogue.SynQueuePeak)))},
						query{"limit · " + listenerLegend, each(catalogue.SynQueueLimit)}).
						dashed("limit · .*").runbooks(synQueueOverflow).
						tiers("Length and peak need the BPF walk, Linux 6.4."),
					graph(text{"SYN cookies", "Handshakes answered without a place in the SYN queue, and those of them that were completed. Sent without being validated: a SYN flood, which the cookies are there for. Both alike: the SYN queue is too short for honest traffic."},
						units.CountsPerSecond,
						query{"sent", sumBy(nil, s.rate(catalogue.SynCookiesSent))},
						query{"validated", sumBy(nil, s.rate(catalogue.SynCookiesValidated))}).
						runbooks(synFlood).
						tiers("Tiers A and B only; on C see the node's counters in the fleet overview.").
						empty("tier C cannot tell whose the cookies are"),
					graph(text{"SYN-ACKs sent again", "Answers to SYNs whose final ACK did not come, or was ignored by a full accept queue. With drops: the queue. Without: clients that do not answer, or packets lost on the way."},
						units.CountsPerSecond, query{"retransmits", sumBy(nil, s.rate(catalogue.SynackRetransmits))}).runbooks(synFlood).
						empty("the kernel is older than 5.12"),
				),
				lineOf(8,
					graph(text{"Ends of half-open connections", "How those in the SYN queue left it. `completed` is the good one; `expired`: the final ACK never came, a flood or a lossy path; `reset`: the client gave up; `overflow_reset`: tcp_abort_on_overflow refused it with a RST."},
						units.CountsPerSecond, query{"{{how}}", sumBy(by(labelHow), s.rate(catalogue.HalfOpenEnded))}).stacked().
						runbooks(synFlood).
						tiers("Tiers A and B only.").
						empty("no handshake ended since the agent started, or the node is of tier C"),
					durations(text{"Handshake times", "From the SYN to the connection in the accept queue: a round trip to the client. Clouds at 1, 3, 7 s are packets sent again: lost, or refused by a full accept queue."},
						s.buckets(catalogue.HandshakeSeconds, nil)).
						tiers("Tiers A and B only.").
						empty("no handshake was completed, or the node is of tier C"),
					graph(text{"Handshake times: quantiles", "Half of the handshakes, and one in a hundred, took longer than that. A rise of the first: the network; of the second alone: packets lost or refused."},
						units.Seconds,
						query{"half", s.quantile("0.5", catalogue.HandshakeSeconds, nil)},
						query{"one in a hundred", s.quantile("0.99", catalogue.HandshakeSeconds, nil)}).
						tiers("Tiers A and B only.").
						empty("no handshake was completed, or the node is of tier C"),
				),
			),
			rowOf("Whose, and how long a backlog",
				lineOf(8, owners(s)),
				lineOf(8, backlogs(s)),
			),
		},
	}
}

// currentVerdict is the number of the verdict, see verdicts.
func currentVerdict(s scope) string {
	var numbers []string
	for _, v := range verdicts {
		numbers = append(numbers, v.number+" * ("+s.of(catalogue.Verdict, is(labelVerdict, v.text))+" == 1)")
	}
	return maxBy(listener, strings.Join(numbers, " or "))
}

func owners(s scope) *panel {
	whole := also(listener, catalogue.LabelContainer)
	return columns(text{"Owner", "Who would accept: the process, and its container and pod where known. No process: its socket is open nowhere that sockq may look, `sockq check` says which right is missing. Rows without connections are former owners, kept for five minutes."}, "Connections",
		column{label: catalogue.LabelAddress, title: "Address", url: toListener(ofRow)},
		column{label: labelInstance, title: "Node", url: toNode(agentUID, ofRow)},
		column{label: catalogue.LabelNetns, title: "Netns"},
		column{label: catalogue.LabelProcess, title: "Process"},
		column{label: catalogue.LabelNamespace, title: "Namespace"},
		column{label: catalogue.LabelPod, title: "Pod"},
		column{label: catalogue.LabelContainer, title: "Container"},
		column{expr: sumBy(whole, s.of(catalogue.ListenerSockets)), title: "Sockets", unit: units.Short},
		column{expr: sumBy(whole, s.rate(catalogue.Connections)), title: "Connections", unit: units.CountsPerSecond},
	)
}

// backlogs are per socket: those of a SO_REUSEPORT group are summed in the metrics,
// the settings apply to each.
func backlogs(s scope) *panel {
	sockets := sumBy(listener, s.of(catalogue.ListenerSockets))
	setting := func(name string) string {
		return "0 * " + sockets + " + on (cluster, instance, netns) group_left () " +
			maxBy(namespace, s.of(catalogue.Sysctl, is(catalogue.LabelName, name)))
	}
	return columns(text{"Backlog: asked for, got, allowed", "Per socket: the argument of listen(), the limit in force, and the namespace's somaxconn now. Limit = somaxconn below what was asked for: raise the sysctl in that namespace, then restart or listen() again, a running listener keeps its limit. Limit = asked: raise it in the application."}, "Peak",
		column{label: catalogue.LabelAddress, title: "Address", url: toListener(ofRow)},
		column{label: labelInstance, title: "Node"},
		column{label: catalogue.LabelNetns, title: "Netns"},
		column{label: catalogue.LabelProcess, title: "Process"},
		column{label: catalogue.LabelNamespace, title: "Namespace"},
		column{label: catalogue.LabelPod, title: "Pod"},
		column{expr: maxBy(listener, s.of(catalogue.BacklogRequested)), title: "Asked for", unit: units.NoUnit},
		column{expr: sumBy(listener, s.of(catalogue.AcceptQueueLimit)) + " / " + sockets, title: "Limit", unit: units.NoUnit},
		column{expr: setting("somaxconn"), title: "somaxconn", unit: units.NoUnit},
		column{expr: setting("tcp_max_syn_backlog"), title: "tcp_max_syn_backlog", unit: units.NoUnit},
		column{expr: setting("tcp_syncookies"), title: "tcp_syncookies", unit: units.NoUnit},
		column{expr: maxBy(listener, s.of(catalogue.AcceptQueuePeak)), title: "Peak", unit: units.NoUnit},
	).runbooks(backlogClamped).
		tiers("What was asked for is known of listen() calls since the agent started; on tier C it needs the syscall tracepoints (`--tracker.syscalls`).")
}
