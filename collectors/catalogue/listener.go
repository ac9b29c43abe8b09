package catalogue

// The labels of a listener. A label of the owner whose value is unknown is left
// out.
const (
	LabelNetns     = "netns"
	LabelAddress   = "address"
	LabelProcess   = "process"
	LabelNamespace = "namespace"
	LabelPod       = "pod"
	LabelContainer = "container"
)

var listenerLabels = []string{LabelNetns, LabelAddress, LabelProcess, LabelNamespace, LabelPod, LabelContainer}

func listener(name string, t Type, p Probe, tiers Tiers, needs, help string, more ...string) *Metric {
	m := Metric{
		Name: "sockq_listener_" + name, Help: help, Type: t, Probe: p, Tiers: tiers, Needs: needs,
		Labels: append(listenerLabels[:len(listenerLabels):len(listenerLabels)], more...),
	}
	if t == Histogram {
		m.Buckets = waitBuckets
	}
	return add(m)
}

// What the listener walk sees of the sockets that listen on one address.
var (
	AcceptQueueLength = listener("accept_queue_length", Gauge, Listeners, AllTiers, needsWalk,
		"Connections in the accept queue, waiting for accept() (ss: Recv-Q).")
	AcceptQueueLimit = listener("accept_queue_limit", Gauge, Listeners, AllTiers, needsWalk,
		"Effective backlog of the accept queue (ss: Send-Q). A queue holds one connection more.")
	AcceptQueueFillRatio = listener("accept_queue_fill_ratio", Gauge, Listeners, AllTiers, needsWalk,
		"Length / (limit + 1) of the accept queue, of the fullest socket. At 1 the queue is full.")
	AcceptQueuePeak = listener("accept_queue_peak", Gauge, Listeners, AllTiers, needsArrivals,
		"Highest length of a socket's accept queue in the last 60 to 120 seconds.")
	AcceptQueuePeakRatio = listener("accept_queue_peak_ratio", Gauge, Listeners, AllTiers, needsArrivals,
		"Highest length / (limit + 1) of a socket's accept queue in the last 60 to 120 seconds.")
	AcceptQueueFullSeconds = listener("accept_queue_full_seconds_total", Counter, Listeners, AllTiers, needsWalk,
		"Time in which the accept queue of the fullest socket was full.")
	AcceptQueueConnectionSeconds = listener("accept_queue_connection_seconds_total", Counter, Listeners, AllTiers, needsWalk,
		"Length of the accept queue integrated over time. Its rate divided by the rate of connections is the mean wait for accept().")
	SynQueueLength = listener("syn_queue_length", Gauge, Listeners, AllTiers, needsOnlyWalk,
		"Half-open connections in the SYN queue.")
	SynQueuePeak = listener("syn_queue_peak", Gauge, Listeners, AllTiers, needsOnlyWalk,
		"Highest length of a socket's SYN queue in the last 60 to 120 seconds.")
	SynQueueLimit = listener("syn_queue_limit", Gauge, Listeners, AllTiers, needsWalk,
		"Length at which the SYN queue is full: the backlog, or with tcp_syncookies=0 the smaller of it and 3/4 of tcp_max_syn_backlog.")
	AcceptQueueGaveUp = listener("accept_queue_gave_up", Gauge, Census, AllTiers, needsWalk,
		"Connections in the accept queue whose client has closed its side already, at the last census. Absent where several listeners share the port.")
	ListenerSockets = listener("sockets", Gauge, Listeners, AllTiers, needsWalk,
		"Sockets that listen on this address; more than one in a SO_REUSEPORT group.")
	SocketDrops = listener("socket_drops_total", Counter, Listeners, AllTiers, needsWalk,
		"Drops that the kernel counted at the listening sockets (sk_drops).")
)

// What the event tracker sees at a listener.
var (
	BacklogRequested = listener("backlog_requested", Gauge, TrackBacklog, AllTiers, needsSyscalls,
		"Last argument of listen(), before net.core.somaxconn clamped it; summed over the sockets.")
	Syns = listener("syns_total", Counter, TrackRefusals, TiersAB, "",
		"SYNs that reached the listener.")
	Connections = listener("connections_total", Counter, TrackConnections, AllTiers, "",
		"Handshakes completed into the accept queue.")
	Accepts = listener("accepts_total", Counter, TrackAccepts, AllTiers, needsSyscalls,
		"Connections taken from the accept queue by accept().")
	LastAccept = listener("last_accept_timestamp_seconds", Gauge, TrackAccepts, AllTiers, needsSyscalls,
		"When accept() last took a connection, in seconds since the epoch.")
	Drops = listener("drops_total", Counter, TrackIgnoredAcks, AllTiers, "on C accept_queue_full_ack and accept_queue_full_reset only, from Linux 6.17",
		"Connections or handshakes that the listener refused, by reason.", "reason")
	SynCookiesSent = listener("syn_cookies_sent_total", Counter, TrackRefusals, TiersAB, "",
		"SYN cookies sent, instead of a place in the SYN queue.")
	SynCookiesValidated = listener("syn_cookies_validated_total", Counter, TrackRefusals, TiersAB, "",
		"Final ACKs that carried a valid SYN cookie.")
	SynackRetransmits = listener("synack_retransmits_total", Counter, TrackSynackRetransmits, AllTiers, "",
		"SYN-ACKs sent again because the final ACK did not come or was ignored.")
	HalfOpenEnded = listener("half_open_ended_total", Counter, TrackHalfOpen, TiersAB, "",
		"Half-open connections that left the SYN queue, by how they ended.", "how")
	HandshakeSeconds = listener("handshake_seconds", Histogram, TrackHalfOpen, TiersAB, "",
		"Time from the SYN to the connection in the accept queue.")
	AcceptWaitSeconds = listener("accept_wait_seconds", Histogram, TrackAccepts, AllTiers, needsSyscalls,
		"Time that a connection waited in the accept queue for accept().")
	Abandoned = listener("abandoned_total", Counter, TrackHalfOpen, TiersAB, "",
		"Connections that were in the accept queue when the listener closed.")
)

// Verdict is the diagnosis of a listener.
var Verdict = listener("verdict", Gauge, Listeners, AllTiers, needsWalk,
	"1 for the current verdict on the listener, 0 for those it has had before.", "verdict")
