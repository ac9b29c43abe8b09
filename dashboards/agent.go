package dashboards

import (
	"github.com/grafana/grafana-foundation-sdk/go/units"

	"sockq/collectors/catalogue"
)

// agent is whether sockq itself can be believed, and what it costs.
func agent() board {
	s := everywhere
	difference := "abs(" + s.of(catalogue.AuditDifference) + ")"
	missing := "1 - " + maxBy(also(node, catalogue.LabelProbe), s.of(catalogue.ProbeAttached))
	age := "time() - " + maxBy(also(node, catalogue.LabelSource), s.of(catalogue.SourceLastSuccess))

	return board{
		uid: agentUID, title: "sockq: agent", scope: s,
		description: "What the agents cost, what they read and when, whether their numbers are the kernel's, what they lost, and which probes each kernel allows.",
		rows: []row{
			rowOf("Now",
				lineOf(4,
					agentsDown(s),
					stats(text{"Audit difference", "The largest distance between sockq's numbers and the kernel's own at the last audits. 0 is the promise; anything else that lasts is a bug: see which check below, and report it with the kernel's version."},
						units.Short, query{"difference", maxBy(nil, difference)}).
						thresholds(fine, oneIsBad...).runbooks(auditDifference).
						tiers("On tier C only the states are audited.").
						empty("no audit took place yet, or the agent may not open sock_diag"),
					stats(text{"Lost", "What did not fit under a bound or could not be read, in the time range of the dashboard. Above 0: see what, below; most bounds have a flag."},
						units.Short, query{"lost", sumBy(nil, "increase("+s.of(catalogue.Lost)+"[$__range])")}).
						thresholds(fine, oneIsOdd...).runbooks(eventsLost),
					stats(text{"Sources down", "Sources whose last read failed, over all nodes. What they fill is absent or old: the agent's log has the error."},
						units.Short, query{"down", sumBy(nil, s.of(catalogue.SourceUp)+" == bool 0")}).
						thresholds(fine, oneIsBad...).runbooks(agentDegraded),
					stats(text{"Probes missing", "Parts of sockq that a kernel, a right or a setting does not allow, over all nodes. `sockq check` on the node says why, and what would give them. Tier C has some by nature."},
						units.Short, query{"missing", sumBy(nil, missing)}).
						runbooks(agentDegraded),
					stats(text{"CPU of the hungriest", "CPU seconds a second that the agent's process takes, on the node where it takes most; BPF programs run on the account of others. An expected value is below a hundredth; more: many listeners, or sock_diag instead of the walk."},
						units.PercentUnit, query{"cpu", maxBy(nil, cpu(s))}).
						thresholds(fine, step{0.1, look}, step{0.5, act}),
				),
			),
			rowOf("Cost",
				lineOf(8,
					graph(text{"CPU", "CPU seconds a second of the agent's process, by node. What it does in probes is on the account of the interrupted process: see the BPF programs below. Too much: raise `--listener.interval` or `--census.interval`."},
						units.PercentUnit, query{nodeLegend, topk("20", sumBy(node, cpu(s)))}),
					graph(text{"Memory", "Resident memory of the agent's process, by node. It is bounded by --max-listeners and its like; a steady climb under steady load is a bug."},
						units.BytesIEC, query{nodeLegend, topk("20", sumBy(node, s.ofAgents(s.named(processResidentMemory))))}),
					graph(text{"Open files", "Descriptors of the agent as a share of what it may open. It opens some for each network namespace; near 1 namespaces are skipped: raise LimitNOFILE."},
						units.PercentUnit, query{nodeLegend, topk("20", sumBy(node, s.ofAgents(s.named(processOpenFiles)+" / "+s.named(processMaxFiles))))}).
						share().lined(),
				),
				lineOf(8,
					graph(text{"Scrape duration", "How long Prometheus waits for the agent's metrics. Near the scrape's timeout: bound the listeners with `--max-listeners`, or look at the durations of sources."},
						units.Seconds, query{nodeLegend, topk("20", maxBy(node, s.ofAgents(s.named(scrapeDuration))))}),
					graph(text{"Series by scrape", "Samples that a scrape brings, what Prometheus has to store of a node. Above what you can afford: lower `--max-listeners`, `--max-namespaces` or `--max-processes`; the rest is summed as `other`."},
						units.Short, query{nodeLegend, topk("20", maxBy(node, s.ofAgents(s.named(scrapeSamples))))}),
					graph(text{"CPU of BPF programs", "CPU seconds a second that the probes take from whoever runs, by probe, summed over nodes. `--no-tracker.syscalls` and `--no-states.seconds` make it less."},
						units.PercentUnit, query{"{{probe}}", sumBy(by(catalogue.LabelProbe), s.rate(catalogue.ProbeRunSeconds))}).
						empty("programs are timed only with `--bpf-stats` or kernel.bpf_stats_enabled=1, which cost something themselves"),
					graph(text{"Cost of a run", "Mean time of one run of a probe's programs. Above some microseconds on a fast machine: a virtual machine without nested paging, or a debug kernel."},
						units.Seconds, query{"{{probe}}", ratio(sumBy(by(catalogue.LabelProbe), s.rate(catalogue.ProbeRunSeconds)), sumBy(by(catalogue.LabelProbe), s.rate(catalogue.ProbeRuns)))}).
						empty("programs are timed only with `--bpf-stats` or kernel.bpf_stats_enabled=1"),
				),
			),
			rowOf("Sources",
				lineOf(8,
					graph(text{"Duration of reads", "How long the last read of each source took, on the slowest node. `sockets` is the census, `listeners` the walk ten times a second, `audit` sock_diag. Long ones: very many sockets, or namespaces that have to be entered."},
						units.Seconds, query{"{{source}}", maxBy(by(catalogue.LabelSource), s.of(catalogue.SourceDuration))}),
					graph(text{"Age of sources", "Seconds since each source was last read successfully, on the node where it is longest ago. A few intervals are fine, `--census.interval` is 5 s; a line that climbs is a source that fails or hangs: its metrics are old."},
						units.Seconds, query{"{{source}} · {{instance}}", only(also(node, catalogue.LabelSource), age, "bottomk(10, "+maxBy(also(node, catalogue.LabelSource), s.of(catalogue.SourceLastSuccess)+" @ end()")+")")}).
						thresholds(fine, step{60, look}, step{300, act}).lined().runbooks(agentDegraded),
					timeline(text{"Sources that fail", "Whether the last read of a source succeeded, for those that failed in the last hour. The agent's log has the error; what the source fills is old or absent meanwhile."},
						[]word{{"1", "up", fine}, {"0", "down", act}},
						query{"{{source}} · {{instance}}", minBy(also(node, catalogue.LabelSource), only([]string{labelCluster, labelInstance, catalogue.LabelSource}, s.of(catalogue.SourceUp),
							minBy(also(node, catalogue.LabelSource), "min_over_time("+s.of(catalogue.SourceUp)+"[1h])")+" == 0")) +
							` or on () label_replace(vector(1), "source", "none failed", "", "")`}).
						runbooks(agentDegraded),
				),
			),
			rowOf("Audit",
				lineOf(8,
					graph(text{"Difference to the kernel", "Distance between sockq's numbers and the kernel's own at the last audit, by check, where it is largest. 0 is the promise. `states`: sockets by state against sock_diag; `listen_drops`, `listen_overflows`, `syn_cookies`: refusals against the kernel's counters."},
						units.Short, query{"{{check}}", maxBy(by(catalogue.LabelCheck), difference)}).
						runbooks(auditDifference).
						tiers("On tier C only the states are audited.").
						empty("no audit took place yet, or the agent may not open sock_diag"),
					graph(text{"Checks", "Comparisons a second, over all nodes. None for long: the agent may not open sock_diag in the namespaces (CAP_SYS_ADMIN), or `--audit.budget` is 0."},
						units.CountsPerSecond, query{"{{check}}", sumBy(by(catalogue.LabelCheck), s.rate(catalogue.AuditChecks))}).
						runbooks(auditDifference),
					graph(text{"Skipped", "Share of comparisons that were given up because the node changed meanwhile, or took longer than the budget. Busy nodes skip most: that is honest, not wrong. At 1 for long nothing is audited; a larger `--audit.budget` may help."},
						units.PercentUnit, query{"{{check}}", sumBy(by(catalogue.LabelCheck), s.rate(catalogue.AuditSkipped)) +
							" / (" + sumBy(by(catalogue.LabelCheck), s.rate(catalogue.AuditSkipped)) + " + " + sumBy(by(catalogue.LabelCheck), s.rate(catalogue.AuditChecks)) + " > 0)"}).
						share().empty("no audit was tried"),
				),
			),
			rowOf("Losses",
				lineOf(8,
					graph(text{"Lost, by what", "What did not fit under a bound or could not be read. `…_over_cap`: raise the flag of that name, `--max-listeners` and its like. `…_unreadable`: a right is missing, `sockq check` says which. `listener_samples`: the node is too busy to sample in time; peaks may be low."},
						units.CountsPerSecond, query{"{{what}}", sumBy(by(catalogue.LabelWhat), s.rate(catalogue.Lost)) + " > 0"}).
						runbooks(eventsLost).empty("nothing was lost"),
					graph(text{"Events missed by probes", "Events that the kernel did not hand over, since the program was already running on that CPU. Counters lack them. Above 0: other tracers may nest with sockq's probes; the audit shows whether it matters."},
						units.CountsPerSecond, query{"{{probe}}", sumBy(by(catalogue.LabelProbe), s.rate(catalogue.ProbeMisses))}).
						runbooks(eventsLost).
						empty("the kernel is older than 6.1 and counts no misses"),
				),
			),
			rowOf("Probes and versions",
				lineOf(12,
					columns(text{"Probes", "Every part of sockq on every node, and by which mechanism it is attached. Missing: `sockq check -v` on the node gives the reason in full. Tier C misses `refusals`, `half_open` and `time_wait` by nature."}, "Attached",
						column{label: catalogue.LabelProbe, title: "Probe"},
						column{label: catalogue.LabelMechanism, title: "Mechanism"},
						column{label: labelInstance, title: "Node", url: toNode(agentUID, ofRow)},
						column{expr: "1 - " + maxBy(also(node, catalogue.LabelProbe, catalogue.LabelMechanism), s.of(catalogue.ProbeAttached)), title: "Attached", words: []word{{"0", "yes", fine}, {"1", "missing", look}}},
					).runbooks(agentDegraded),
					columns(text{"Builds and kernels", "Version of the agent, release and tier of the kernel, and when the agent started. More than one version for long: a rollout is stuck. Started just now, again and again: it crashes, see its log."}, "Started",
						column{label: labelInstance, title: "Node", url: toNode(agentUID, ofRow)},
						column{label: labelVersion, title: "Version", wide: 100},
						column{label: "revision", title: "Revision", wide: 90},
						column{label: "goversion", title: "Go", wide: 90},
						column{label: "goarch", title: "CPU", wide: 70},
						column{label: labelRelease, title: "Kernel"},
						column{label: labelTier, title: "Tier", wide: 70},
						column{expr: maxBy(node, s.ofAgents(s.named(processStart))) + " * 1000", title: "Started", unit: units.DateTimeFromNow},
						column{expr: maxBy(also(node, labelVersion, "revision", "goversion", "goarch"), s.of(catalogue.BuildInfo))},
						column{expr: maxBy(also(node, labelRelease, labelTier), s.of(catalogue.KernelInfo))},
					),
				),
			),
		},
	}
}

// cpu is what the agents' processes take.
func cpu(s scope) string { return s.ofAgents(rate(s.named(processCPU))) }
