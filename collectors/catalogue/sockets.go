package catalogue

// Further labels.
const (
	LabelState     = "state"
	LabelDirection = "direction"
)

// namespaceLabels are those of a network namespace, which may be a pod's.
func namespaceLabels(more ...string) []string {
	return append([]string{LabelNetns, LabelNamespace, LabelPod}, more...)
}

// What the census sees: all sockets of the node.
var (
	TCPSockets = add(Metric{
		Name: "sockq_tcp_sockets", Type: Gauge, Probe: Census, Tiers: AllTiers, Needs: needsWalk,
		Labels: namespaceLabels(LabelState),
		Help:   "TCP sockets by state at the last census, request and time-wait mini-sockets included. CLOSE are bound sockets that neither listen nor connect.",
	})
	ReceiveQueueBytes    = queue("receive_queue_bytes", "Bytes that applications have not read yet (Recv-Q), summed over the connections at the last census.")
	ReceiveQueueMaxBytes = queue("receive_queue_max_bytes", "Bytes that the application has not read yet (Recv-Q), of the fullest connection at the last census.")
	SendQueueBytes       = queue("send_queue_bytes", "Bytes that peers have not acknowledged yet (Send-Q), summed over the connections at the last census.")
	SendQueueMaxBytes    = queue("send_queue_max_bytes", "Bytes that the peer has not acknowledged yet (Send-Q), of the fullest connection at the last census.")
)

func queue(name, help string) *Metric {
	return add(Metric{
		Name: "sockq_tcp_" + name, Help: help, Type: Gauge, Probe: Census, Tiers: AllTiers, Needs: needsWalk,
		Labels: []string{LabelNetns, LabelProcess, LabelNamespace, LabelPod, LabelDirection},
	})
}

// What the event tracker sees of connections.
var (
	Transitions = add(Metric{
		Name: "sockq_tcp_transitions_total", Type: Counter, Probe: TrackTransitions, Tiers: AllTiers,
		Needs:  "on C without those of half-open requests and TIME_WAIT, and without closes that may hide a TIME_WAIT",
		Labels: namespaceLabels("from", "to"),
		Help:   "Transitions of TCP sockets from one state to another. A series begins when it is first counted.",
	})
	UnexpectedTransitions = add(Metric{
		Name: "sockq_tcp_unexpected_transitions_total", Type: Counter, Probe: TrackTransitions, Tiers: AllTiers,
		Labels: namespaceLabels("from", "to"),
		Help:   "Transitions that the TCP state machine does not have. A series begins when it is first counted.",
	})
	StateSeconds = add(Metric{
		Name: "sockq_tcp_state_seconds", Type: Histogram, Probe: TrackStateSeconds, Tiers: AllTiers,
		Needs:  "on C without TIME_WAIT, SYN_RECV and FIN_WAIT2; netns only with --states.per-netns",
		Labels: namespaceLabels(LabelState), Buckets: stateBuckets,
		Help: "Time that TCP sockets spent in a state, observed when they left it. Sockets older than the agent are never observed.",
	})
	ConnectSeconds = add(Metric{
		Name: "sockq_tcp_connect_seconds", Type: Histogram, Probe: TrackConnects, Tiers: AllTiers,
		Labels: namespaceLabels(), Buckets: waitBuckets,
		Help: "Time from the SYN sent to the connection established.",
	})
	ConnectFailures = add(Metric{
		Name: "sockq_tcp_connect_failures_total", Type: Counter, Probe: TrackConnects, Tiers: AllTiers,
		Needs:  "on B and C syscall tracepoints for those without a route",
		Labels: namespaceLabels("error"),
		Help:   "Calls of connect() that failed, by error.",
	})
	ResetsSent = add(Metric{
		Name: "sockq_tcp_resets_sent_total", Type: Counter, Probe: TrackResetsSent, Tiers: AllTiers,
		Needs:  "the reason from Linux 6.10",
		Labels: namespaceLabels("reason"),
		Help:   "RST segments sent, by reason.",
	})
	ResetsReceived = add(Metric{
		Name: "sockq_tcp_resets_received_total", Type: Counter, Probe: TrackResetsReceived, Tiers: AllTiers,
		Labels: namespaceLabels(),
		Help:   "RST segments received.",
	})
)

// What the owners of sockets add.
var (
	CloseWaitSockets = process("close_wait_sockets",
		"Connections that the peer closed and the process did not (CLOSE_WAIT). Those that wait for accept() are nobody's.")
	CloseWaitOldest = process("close_wait_oldest_seconds",
		"How long the process has had its oldest connection in CLOSE_WAIT, at least.")
	FinWait2Sockets = process("fin_wait2_sockets",
		"Connections that the process closed for writing and the peer did not (FIN_WAIT2).")
	FinWait2Oldest = process("fin_wait2_oldest_seconds",
		"How long the process has had its oldest connection in FIN_WAIT2, at least.")
)

func process(name, help string) *Metric {
	return add(Metric{
		Name: "sockq_process_" + name, Help: help, Type: Gauge, Probe: Owners, Tiers: AllTiers, Needs: needsHolders,
		Labels: []string{LabelNetns, LabelProcess, LabelNamespace, LabelPod},
	})
}
