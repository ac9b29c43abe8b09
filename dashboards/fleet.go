package dashboards

import (
	"strconv"
	"strings"

	"github.com/grafana/grafana-foundation-sdk/go/units"

	"sockq/collectors/catalogue"
)

// fleet answers who drops connections, and why, on all nodes.
func fleet() board {
	s := everywhere
	peak := maxBy(listener, s.of(catalogue.AcceptQueuePeakRatio))
	refused := orZero(listener, sumBy(listener, s.rule(OverflowRate1m)), peak)

	return board{
		uid: fleetUID, title: "sockq: fleet overview", scope: s,
		description: "Which listeners drop connections, why, and on which nodes. Start here; the tables lead to the listener and to the node.",
		rows: []row{
			rowOf("Now",
				lineOf(4,
					stats(text{"Nodes", "Nodes whose agent Prometheus scrapes. Fewer than your nodes: look at the scrape configuration, or the DaemonSet's selectors and tolerations."},
						units.Short, query{"nodes", countBy(nil, countBy(node, s.of(catalogue.BuildInfo)))}),
					agentsDown(s),
					stats(text{"Tiers", "How many nodes have kernels of which tier: A trampolines, B kprobes, C tracepoints only, none without BPF. On C it is not known why a SYN was refused, only that; `sockq check` on the node says what would give more."},
						units.Short, query{"tier {{tier}}", "label_replace(" + countBy(by(labelTier), s.of(catalogue.KernelInfo)) + `, "tier", "none", "tier", "")`}),
					stats(text{"Listeners", "Listening addresses that sockq sees, SO_REUSEPORT groups as one."},
						units.Short, query{"listeners", countBy(nil, peak)}),
					stats(text{"Refusing now", "Listeners whose full accept queue refused somebody in the last minute. Above 0: the table of the worst listeners has them, with a link to each."},
						units.Short, query{"listeners", sumBy(nil, refused+" > bool 0")}).
						thresholds(fine, oneIsBad...).runbooks(acceptQueueOverflow).
						tiers(ruled),
					stats(text{"Refused", "SYNs and final ACKs that full accept queues refused, per second, in the last minute. A client tries again after 1, 3, 7 s: its user waits, and sees a timeout in the end."},
						units.CountsPerSecond, query{"refused", sumBy(nil, refused)}).
						thresholds(fine, anyIsBad...).runbooks(acceptQueueOverflow).
						tiers(ruled),
					stats(text{"Fullest accept queue", "Highest length / (limit + 1) of any accept queue in the last 60 to 120 s. From 0.8 on the next burst may be refused, at 1 it was: raise the backlog or accept faster, the listener's verdict says which."},
						units.PercentUnit, query{"peak", maxBy(nil, peak)}).
						share().runbooks(acceptQueueNearFull),
				),
				lineOf(9,
					graph(text{"Drops by reason", "Connections and handshakes that listeners refused. `accept_queue_full_*`: the application accepts too slowly, or its backlog is short. `syn_queue_full`, `max_syn_backlog`: too many handshakes at once, or a flood. The others: memory, routes, policy. Look at the worst listeners below."},
						units.CountsPerSecond,
						query{"{{reason}}", sumBy(by(labelReason), s.rate(catalogue.Drops))},
						query{"not told apart (tier C)", sumBy(nil, dropsWithoutReason(s))}).
						dashed("not told apart.*").span(16).runbooks(acceptQueueOverflow, synQueueOverflow).
						tiers("On tier C the kernel's own count of drops at a listener (`sk_drops`) is shown as a whole; of the reasons only those of final ACKs are known there, from Linux 6.17, and they are in the whole, too.").
						empty("nobody was refused since the agents started"),
					stats(text{"Verdicts now", "How many listeners have which verdict on their last minute. `near_limit`: nobody refused yet. `burst`: a longer backlog would have held it. `clamped`: somaxconn keeps the backlog short. `slow_accept`: accept() does not keep up. `syn_flood`: handshakes are not completed. `stalled`: nobody accepts. The JSON of the agent (/api/v1/snapshot) has the advice in words."},
						units.Short, query{"{{verdict}}", countBy(by(labelVerdict), s.of(catalogue.Verdict)+" == 1")}).
						coloured(verdicts).runbooks(listenerStalled, synFlood),
				),
			),
			rowOf("Worst listeners",
				lineOf(11, worstListeners(s)),
			),
			rowOf("Alerts",
				lineOf(7,
					columns(text{"Firing", "sockq's alerts that fire on the nodes chosen, and those that are about no single node. The name leads to the runbook: meaning, diagnosis, remedy."}, "Severity",
						column{expr: byRank("critical", "warning", "info"), title: "Severity", wide: 100, words: []word{{"3", "critical", act}, {"2", "warning", look}, {"1", "info", neutral}}},
						column{label: labelAlert, title: "Alert", url: runbookBase + "${__data.fields.alertname}.md"},
						column{label: labelInstance, title: "Node", url: toNode(agentUID, ofRow)},
						column{label: catalogue.LabelNetns, title: "Netns"},
						column{label: catalogue.LabelAddress, title: "Address", url: toListener(ofRow)},
						column{label: catalogue.LabelProcess, title: "Process"},
						column{label: catalogue.LabelPod, title: "Pod"},
					).empty("no alert of sockq fires"),
				),
			),
			rowOf("Over time",
				lineOf(8,
					graph(text{"Refused by node", "SYNs and final ACKs that full accept queues refused, on the ten nodes with the most. One node alone: look at its application or its load balancing; all at once: at the traffic."},
						units.CountsPerSecond, query{nodeLegend, most("10", node, sumBy(node, s.rule(OverflowRate1m)), "sum", s.rule(OverflowRate1m))}).
						leads("Listeners of this node", toNode(listenerUID, ofSeries)).runbooks(acceptQueueOverflow).
						tiers("Needs the recording rules of alerts/rules.yaml.").
						empty("no accept queue overflowed, or the recording rules are not loaded"),
					graph(text{"Fullest accept queues", "Peaks of the last 60 to 120 s as shares of what the queue holds, of the ten listeners that come closest to it. From 0.8 on there is little room for a burst."},
						units.PercentUnit, query{listenerLegend, most("10", listener, peak, "max", s.of(catalogue.AcceptQueuePeakRatio))}).
						share().lined().leads("This listener", toListener(ofSeries)).runbooks(acceptQueueNearFull),
				),
				lineOf(8,
					graph(text{"Failed connects by error", "connect() calls of the nodes' own applications that failed. `refused`: nobody listens there. `timeout`: the peer drops SYNs, maybe from a full accept queue of its own, or a firewall does. `no_ports`: the range of local ports is used up. The TCP states dashboard has them by namespace."},
						units.CountsPerSecond, query{"{{error}}", sumBy(by(labelError), s.rate(catalogue.ConnectFailures))}).
						runbooks(connectFailureRising).
						tiers("On tier C connects that fail without a SYN need the syscall tracepoints (`--tracker.syscalls`).").
						empty("no connect() failed since the agents started"),
					graph(text{"SYN cookies and SYN-queue drops", "What the kernels count where SYN queues are full, by node. Cookies keep handshakes going without a place in the queue, but lose options. Much of either, and few completed handshakes: a SYN flood; otherwise a backlog that is too short."},
						units.CountsPerSecond,
						query{"cookies · {{instance}}", busiest("10", node, sumBy(node, s.rate(catalogue.KernelTCPEvents, is(catalogue.LabelEvent, "SyncookiesSent"))), s.of(catalogue.KernelTCPEvents, is(catalogue.LabelEvent, "SyncookiesSent")))},
						query{"dropped · {{instance}}", busiest("10", node, sumBy(node, s.rate(catalogue.KernelTCPEvents, is(catalogue.LabelEvent, "TCPReqQFullDrop"))), s.of(catalogue.KernelTCPEvents, is(catalogue.LabelEvent, "TCPReqQFullDrop")))}).
						runbooks(synFlood, synQueueOverflow),
				),
			),
			rowOf("Nodes",
				lineOf(10, nodes(s)),
			),
		},
	}
}

// worstListeners ranks by the peak and by what was refused, so that listeners that
// refuse come first on every tier and without recording rules, too.
func worstListeners(s scope) *panel {
	peak := maxBy(listener, s.of(catalogue.AcceptQueuePeakRatio))
	worst := topk("25", peak+
		" + "+orZero(listener, sumBy(listener, s.rule(OverflowRate5m)), peak)+
		" + "+orZero(listener, sumBy(listener, s.rate(catalogue.Drops)), peak))
	of := func(expr string) string { return only(listener, expr, worst) }

	return columns(text{"Worst listeners", "The 25 listeners that refuse most, then those whose accept queues came closest to their limits. The address leads to the listener's dashboard, which says whether to raise the backlog, raise somaxconn, or accept faster."}, "Refused",
		column{label: labelInstance, title: "Node", url: toNode(agentUID, ofRow), wide: 110},
		column{label: catalogue.LabelNetns, title: "Netns", wide: 110},
		column{label: catalogue.LabelAddress, title: "Address", url: toListener(ofRow), wide: 150},
		column{label: catalogue.LabelProcess, title: "Process", wide: 110},
		column{label: catalogue.LabelNamespace, title: "Namespace", wide: 100},
		column{label: catalogue.LabelPod, title: "Pod"},
		column{label: labelVerdict, title: "Verdict", words: verdictNames(), wide: 100},
		column{expr: of(orZero(listener, sumBy(listener, s.rule(OverflowRate5m)), peak)), title: "Refused", unit: units.CountsPerSecond, steps: anyIsBad},
		column{expr: of(orZero(listener, sumBy(listener, s.rate(catalogue.SocketDrops)), peak)), title: "Socket drops", unit: units.CountsPerSecond, steps: anyIsOdd},
		column{expr: of(peak), title: "Peak", unit: units.PercentUnit, steps: nearFull},
		column{expr: of(maxBy(listener, s.of(catalogue.AcceptQueueFillRatio))), title: "Fill now", unit: units.PercentUnit, steps: nearFull},
		column{expr: of(meanWait(s)), title: "Mean wait", unit: units.Seconds, steps: []step{{1, look}}},
		column{expr: of(sumBy(listener, s.of(catalogue.AcceptQueueLimit))), title: "Limit", unit: units.NoUnit},
		column{expr: of(maxBy(also(listener, labelVerdict), s.of(catalogue.Verdict)+" == 1"))},
	).runbooks(acceptQueueOverflow, acceptQueueNearFull, acceptWaitLong).
		tiers("Refused: by the recording rules, over five minutes; 0 where they are not loaded. On tier C it is estimated from socket drops.")
}

func nodes(s scope) *panel {
	missing := "1 - " + maxBy(also(node, catalogue.LabelProbe), s.of(catalogue.ProbeAttached))
	return columns(text{"Each node", "Every node with its agent. Down: is the pod or the service running, does the port answer? Probes missing: `sockq check` on the node names each, with the kernel, right or setting that would give it; tier C has some by nature."}, "Refused",
		column{label: labelInstance, title: "Node", url: toNode(agentUID, ofRow)},
		column{label: labelTier, title: "Tier", wide: 70},
		column{label: labelRelease, title: "Kernel"},
		column{expr: maxBy(node, targetsOfSockq(s)), title: "Agent", words: []word{{"1", "up", fine}, {"0", "DOWN", act}}, wide: 90},
		column{expr: sumBy(node, missing), title: "Probes missing", unit: units.Short, steps: oneIsOdd},
		column{expr: sumBy(node, s.of(catalogue.SourceUp)+" == bool 0"), title: "Sources down", unit: units.Short, steps: oneIsBad},
		column{expr: countBy(node, maxBy(listener, s.of(catalogue.AcceptQueuePeakRatio))), title: "Listeners", unit: units.Short},
		column{expr: orZero(node, sumBy(node, s.rule(OverflowRate5m)), maxBy(node, s.of(catalogue.BuildInfo))), title: "Refused", unit: units.CountsPerSecond, steps: anyIsBad},
		column{expr: maxBy(node, s.of(catalogue.AcceptQueuePeakRatio)), title: "Fullest", unit: units.PercentUnit, steps: nearFull},
		column{expr: maxBy(node, "abs("+s.of(catalogue.AuditDifference)+")"), title: "Audit difference", unit: units.Short, steps: oneIsBad},
		column{expr: maxBy(also(node, labelTier, labelRelease), s.of(catalogue.KernelInfo))},
	).runbooks(agentDown, agentDegraded)
}

// ruled is what tiles say that are 0 where there is no rule's result, since that is
// also how rules say that nobody was refused.
const ruled = "Needs the recording rules of alerts/rules.yaml, and is 0 where they are not loaded."

// byRank are the alerts that fire on the nodes chosen, as numbers to sort by, the
// gravest highest; those that are about no single target have neither job nor instance.
func byRank(severities ...string) string {
	labels := by(labelCluster, labelAlert, labelInstance, catalogue.LabelNetns, catalogue.LabelAddress, catalogue.LabelProcess, catalogue.LabelPod)
	var ranks []string
	for i, severity := range severities {
		firing := alerts + `{alertname=~"Sockq.+", alertstate="firing", ` + is(labelSeverity, severity) + `, cluster=~"|${cluster}", job=~"|${job}", instance=~"|${instance}"}`
		ranks = append(ranks, strconv.Itoa(len(severities)-i)+" * "+maxBy(labels, firing))
	}
	return strings.Join(ranks, " or ")
}

func agentsDown(s scope) *panel {
	return stats(text{"Down", "Targets of sockq's jobs that Prometheus could not scrape just now. Their nodes are not watched: see whether the agent runs and its port answers."},
		units.Short, query{"down", sumBy(nil, "1 - "+targetsOfSockq(s))}).
		thresholds(fine, oneIsBad...).runbooks(agentDown)
}

// targetsOfSockq is up of the targets chosen whose job has had an agent in the last
// day: with all jobs chosen, up knows other exporters, too.
func targetsOfSockq(s scope) string {
	return "(" + s.named(up) + " and on (cluster, job) present_over_time(" + s.of(catalogue.BuildInfo) + "[1d]))"
}

// dropsWithoutReason are the drops of listeners on nodes that cannot say why.
func dropsWithoutReason(s scope) string {
	return s.rate(catalogue.SocketDrops) +
		" unless on (cluster, job, instance) " + s.of(catalogue.ProbeAttached, is(catalogue.LabelProbe, string(catalogue.TrackRefusals))) + " == 1"
}

// meanWait is Little's law: how many waited on average, divided by how many came in
// a second.
func meanWait(s scope) string {
	return ratio(sumBy(listener, s.rate(catalogue.AcceptQueueConnectionSeconds)), sumBy(listener, s.rate(catalogue.Connections)))
}

// verdicts from harmless to worst.
var verdicts = []word{
	{"0", "ok", fine},
	{"1", "near_limit", "yellow"},
	{"2", "burst", look},
	{"3", "clamped", "dark-orange"},
	{"4", "slow_accept", act},
	{"5", "syn_flood", "purple"},
	{"6", "stalled", "dark-red"},
}

// verdictNames are for where the verdict is a label.
func verdictNames() []word {
	var names []word
	for _, v := range verdicts {
		names = append(names, word{v.text, v.text, v.colour})
	}
	return names
}
