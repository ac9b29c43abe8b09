package main

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"strconv"
	"time"

	"sockq/probes"
	"sockq/probes/census"
	"sockq/probes/tcpstate"
	"sockq/probes/tracker"
)

// The JSON of a Snapshot. What is unknown is absent; a pointer is a value that
// may be unknown. Fields are only ever added.
type snapshotDoc struct {
	Time       time.Time      `json:"time"`
	Kernel     kernelDoc      `json:"kernel"`
	Namespaces []namespaceDoc `json:"namespaces"`
	Listeners  []listenerDoc  `json:"listeners"`
	Processes  []processDoc   `json:"processes"`
	Probes     []probeDoc     `json:"probes"`
	Sources    []sourceDoc    `json:"sources"`
	Audits     []auditDoc     `json:"audits"`
	// StateSeconds by state, of all namespaces together.
	StateSeconds map[string]histogramDoc `json:"state_seconds,omitzero"`
	Lost         map[string]uint64       `json:"lost"`
}

type kernelDoc struct {
	Release string `json:"release"`
	Tier    string `json:"tier,omitempty"`
}

type namespaceDoc struct {
	Name         string `json:"name"`
	PodNamespace string `json:"pod_namespace,omitempty"`
	Pod          string `json:"pod,omitempty"`
	Inode        uint32 `json:"inode,omitempty"`
	Cookie       uint64 `json:"cookie,omitempty,string"` // may exceed what a JSON reader's double can hold
	// Sockets by state, as the kernel spells it.
	Sockets map[string]uint64 `json:"sockets,omitempty"`
	// Queues by direction, inbound or outbound.
	Queues  map[string]queuesDoc `json:"queues,omitempty"`
	Sysctls map[string]int64     `json:"sysctls,omitempty"`
	Events  map[string]uint64    `json:"events,omitempty"`
	// AuditDifference by check, as sockq_audit_difference.
	AuditDifference map[string]uint64 `json:"audit_difference,omitempty"`
	// Transitions by the state left and the state entered. What was never
	// counted is left out, here and below.
	Transitions           edgesDoc `json:"transitions,omitzero"`
	UnexpectedTransitions edgesDoc `json:"unexpected_transitions,omitzero"`
	// StateSeconds by state, where each namespace has its own.
	StateSeconds    map[string]histogramDoc `json:"state_seconds,omitzero"`
	ConnectSeconds  *histogramDoc           `json:"connect_seconds,omitempty"`
	ConnectFailures map[string]uint64       `json:"connect_failures,omitzero"` // by error
	ResetsSent      map[string]uint64       `json:"resets_sent,omitzero"`      // by reason
	ResetsReceived  *uint64                 `json:"resets_received,omitempty"`
}

// ownerDoc is the process that would accept.
type ownerDoc struct {
	PID         uint32 `json:"pid"`
	Others      int    `json:"others,omitempty"` // processes that have the socket open, too
	Unit        string `json:"unit,omitempty"`   // of systemd
	Runtime     string `json:"runtime,omitempty"`
	ContainerID string `json:"container_id,omitempty"`
	PodUID      string `json:"pod_uid,omitempty"`
	HostNetwork bool   `json:"host_network,omitempty"`
}

// processDoc is the connections of all processes of one name in one namespace; of
// "" those that no process was found to have open.
type processDoc struct {
	Netns                  string               `json:"netns"`
	Process                string               `json:"process"`
	Processes              int                  `json:"processes,omitempty"`
	CloseWait              uint64               `json:"close_wait,omitempty"`
	CloseWaitOldestSeconds float64              `json:"close_wait_oldest_seconds,omitempty"`
	FinWait2               uint64               `json:"fin_wait2,omitempty"`
	FinWait2OldestSeconds  float64              `json:"fin_wait2_oldest_seconds,omitempty"`
	Queues                 map[string]queuesDoc `json:"queues,omitempty"` // by direction
}

type queuesDoc struct {
	ReceiveBytes    uint64  `json:"receive_bytes"`
	SendBytes       uint64  `json:"send_bytes"`
	ReceiveMaxBytes *uint64 `json:"receive_max_bytes,omitempty"`
	SendMaxBytes    *uint64 `json:"send_max_bytes,omitempty"`
}

type listenerDoc struct {
	ID         uint64 `json:"id"`
	Netns      string `json:"netns"`
	NetnsInode uint32 `json:"netns_inode,omitempty"`
	Address    string `json:"address"`
	// The labels of the owner, and who it is in full.
	Process      string         `json:"process,omitempty"`
	PodNamespace string         `json:"pod_namespace,omitempty"`
	Pod          string         `json:"pod,omitempty"`
	Container    string         `json:"container,omitempty"`
	Owner        *ownerDoc      `json:"owner,omitempty"`
	Live         bool           `json:"live"`
	Sockets      *int           `json:"sockets,omitempty"`
	AcceptQueue  acceptQueueDoc `json:"accept_queue"`
	SynQueue     *synQueueDoc   `json:"syn_queue,omitempty"`
	SocketDrops  uint64         `json:"socket_drops"`
	GaveUp       *uint64        `json:"gave_up,omitempty"` // clients, while they waited for accept()
	// BacklogRequested is the last argument of listen(), AcceptQueue.Limit what
	// became of it.
	BacklogRequested    *int64            `json:"backlog_requested,omitempty"`
	Connections         *uint64           `json:"connections,omitempty"`
	Accepts             *uint64           `json:"accepts,omitempty"`
	LastAccept          *time.Time        `json:"last_accept,omitempty"`
	AcceptWaitSeconds   *histogramDoc     `json:"accept_wait_seconds,omitempty"`
	SynackRetransmits   *uint64           `json:"synack_retransmits,omitempty"`
	Drops               map[string]uint64 `json:"drops,omitempty"` // by reason, each from its first
	Syns                *uint64           `json:"syns,omitempty"`
	SynCookiesSent      *uint64           `json:"syn_cookies_sent,omitempty"`
	SynCookiesValidated *uint64           `json:"syn_cookies_validated,omitempty"`
	HalfOpenEnded       map[string]uint64 `json:"half_open_ended,omitzero"` // by how, each from its first
	HandshakeSeconds    *histogramDoc     `json:"handshake_seconds,omitempty"`
	Abandoned           *uint64           `json:"abandoned,omitempty"`
	Verdict             *verdictDoc       `json:"verdict,omitempty"`
}

type verdictDoc struct {
	Name     string `json:"name"`
	Evidence string `json:"evidence"`
	Advice   string `json:"advice,omitempty"`
}

type acceptQueueDoc struct {
	Length            *uint64  `json:"length,omitempty"`
	Limit             *uint64  `json:"limit,omitempty"`
	FillRatio         *float64 `json:"fill_ratio,omitempty"`
	Peak              uint64   `json:"peak"`
	PeakRatio         float64  `json:"peak_ratio"`
	FullSeconds       float64  `json:"full_seconds"`
	ConnectionSeconds float64  `json:"connection_seconds"`
}

type synQueueDoc struct {
	Length *uint64 `json:"length,omitempty"`
	Limit  *uint64 `json:"limit,omitempty"`
	Peak   *uint64 `json:"peak,omitempty"`
}

type histogramDoc struct {
	Count      uint64     `json:"count"`
	SumSeconds float64    `json:"sum_seconds"`
	Buckets    bucketsDoc `json:"buckets"`
}

// bucketsDoc is an object of those buckets that count something, shortest first:
// {"0.25":3} are three durations of at most 0.25 s, and of more than half of
// that. The last, "+Inf", holds all that is longer, too.
type bucketsDoc [tracker.Buckets]uint64

func (b bucketsDoc) MarshalJSON() ([]byte, error) {
	out := []byte{'{'}
	for i, n := range b {
		if n == 0 {
			continue
		}
		bound := "+Inf"
		if i < len(b)-1 {
			bound = strconv.FormatFloat(tracker.Bound(i), 'g', -1, 64)
		}
		if len(out) > 1 {
			out = append(out, ',')
		}
		out = fmt.Appendf(out, "%q:%d", bound, n)
	}
	return append(out, '}'), nil
}

type probeDoc struct {
	Name       string   `json:"name"`
	Mechanism  string   `json:"mechanism"`
	Attached   bool     `json:"attached"`
	Reason     string   `json:"reason,omitempty"`
	Runs       *uint64  `json:"runs,omitempty"`
	RunSeconds *float64 `json:"run_seconds,omitempty"`
	Misses     *uint64  `json:"misses,omitempty"`
}

type sourceDoc struct {
	Name            string     `json:"name"`
	Up              bool       `json:"up"`
	DurationSeconds *float64   `json:"duration_seconds,omitempty"`
	LastSuccess     *time.Time `json:"last_success,omitempty"`
	Error           string     `json:"error,omitempty"`
}

type auditDoc struct {
	Check   string `json:"check"`
	Checks  uint64 `json:"checks"`
	Skipped uint64 `json:"skipped"`
}

func snapshotJSON(n node, logger *slog.Logger) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		s, err := n.Snapshot()
		if err != nil {
			noSnapshot(w, logger, err)
			return
		}
		body, err := json.Marshal(newSnapshotDoc(s))
		if err != nil {
			noSnapshot(w, logger, err)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(append(body, '\n'))
	})
}

func newSnapshotDoc(s *probes.Snapshot) snapshotDoc {
	doc := snapshotDoc{
		Time:       s.Time,
		Kernel:     kernelDoc{s.Kernel.Release, s.Kernel.Tier},
		Namespaces: each(s.Namespaces, newNamespaceDoc),
		Listeners:  each(s.Listeners, newListenerDoc),
		Processes:  each(s.Processes, newProcessDoc),
		Probes:     each(s.Probes, newProbeDoc),
		Sources:    each(s.Sources, newSourceDoc),
		Audits:     each(s.Audits, func(a *probes.Audit) auditDoc { return auditDoc{a.Check, a.Checks, a.Skipped} }),
		Lost:       s.Lost,

		StateSeconds: newStatesDoc(s.StateSeconds),
	}
	if doc.Lost == nil {
		doc.Lost = map[string]uint64{}
	}
	return doc
}

// each never returns nil, which JSON would call null.
func each[T, D any](list []T, doc func(*T) D) []D {
	out := make([]D, len(list))
	for i := range list {
		out[i] = doc(&list[i])
	}
	return out
}

// counted are the counts of what was counted at all, by name.
func counted(names []string, counts []uint64) map[string]uint64 {
	out := make(map[string]uint64)
	for i, n := range counts {
		if n > 0 {
			out[names[i]] = n
		}
	}
	return out
}

// edgesDoc are the counts of edges by their ends.
type edgesDoc map[string]map[string]uint64

func (d edgesDoc) add(e tcpstate.Edge, n uint64) {
	if n == 0 {
		return
	}
	from := e.From.String()
	if d[from] == nil {
		d[from] = make(map[string]uint64)
	}
	d[from][e.To.String()] = n
}

func newHistogramDoc(h *tracker.Histogram) histogramDoc {
	return histogramDoc{h.Count(), h.Sum, h.Buckets}
}

// newStatesDoc shows the states that were ever left: which those can be depends
// on the tier. nil is unknown.
func newStatesDoc(states *[tcpstate.Count]tracker.Histogram) map[string]histogramDoc {
	if states == nil {
		return nil
	}
	doc := make(map[string]histogramDoc)
	for _, state := range tcpstate.All {
		if h := newHistogramDoc(&states[state]); h.Count > 0 {
			doc[state.String()] = h
		}
	}
	return doc
}

// known is v where it is known, else nil.
func known[T any](v T, ok bool) *T {
	if !ok {
		return nil
	}
	return &v
}

func newNamespaceDoc(n *probes.Namespace) namespaceDoc {
	doc := namespaceDoc{Name: n.Name, PodNamespace: n.PodNamespace, Pod: n.Pod, Inode: n.Inode, Cookie: n.Cookie}
	for check, audited := range n.Audited {
		if audited {
			if doc.AuditDifference == nil {
				doc.AuditDifference = make(map[string]uint64)
			}
			doc.AuditDifference[probes.AuditCheckNames[check]] = n.Differences[check]
		}
	}
	if n.SocketsKnown {
		doc.Sockets = make(map[string]uint64, len(tcpstate.All))
		for _, state := range tcpstate.All {
			if state != tcpstate.Close || n.BoundKnown {
				doc.Sockets[state.String()] = n.States[state]
			}
		}
		doc.Queues = make(map[string]queuesDoc, census.Directions)
		for d := range census.Directions {
			q, maxima := n.Queues[d], n.Name != probes.Other
			doc.Queues[d.String()] = queuesDoc{
				q.ReceiveBytes, q.SendBytes,
				known(q.ReceiveMaxBytes, maxima), known(q.SendMaxBytes, maxima),
			}
		}
	}
	if n.SettingsKnown {
		doc.Sysctls = make(map[string]int64, len(n.Sysctls))
		for i, v := range n.Sysctls {
			if v != -1 {
				doc.Sysctls[census.SysctlNames[i]] = v
			}
		}
		doc.Events = make(map[string]uint64, len(n.Events))
		for i, v := range n.Events {
			if n.EventsKnown[i] {
				doc.Events[census.EventNames[i]] = v
			}
		}
	}
	if n.TransitionsKnown {
		taken, unexpected := make(edgesDoc), make(edgesDoc)
		for _, t := range tcpstate.Transitions {
			if i, ok := tcpstate.Index(t.Edge); ok {
				taken.add(t.Edge, n.Transitions[i])
			}
		}
		for edge, count := range n.Unexpected {
			unexpected.add(edge, count)
		}
		doc.Transitions, doc.UnexpectedTransitions = taken, unexpected
	}
	doc.StateSeconds = newStatesDoc(n.StateSeconds)
	doc.ConnectSeconds = known(newHistogramDoc(&n.Connects), n.ConnectsKnown)
	if n.ConnectsKnown {
		doc.ConnectFailures = counted(tracker.ConnectErrorNames[:], n.ConnectFailures[:])
	}
	if n.ResetsSentKnown {
		doc.ResetsSent = make(map[string]uint64)
		for reason, count := range n.ResetsSent {
			if count > 0 {
				doc.ResetsSent[reason] = count
			}
		}
	}
	doc.ResetsReceived = known(n.ResetsReceived, n.ResetsReceivedKnown)
	return doc
}

func newListenerDoc(l *probes.Listener) listenerDoc {
	doc := listenerDoc{
		ID: l.ID, Netns: l.Namespace, NetnsInode: l.Inode, Address: l.Address, Live: l.Live,
		Sockets: known(l.Sockets, l.Live),
		AcceptQueue: acceptQueueDoc{
			Length:    known(l.AcceptQueue, l.Live),
			Limit:     known(l.AcceptQueueLimit, l.Live),
			FillRatio: known(l.FillRatio, l.Live),
			Peak:      l.Peak, PeakRatio: l.PeakRatio, FullSeconds: l.FullSeconds, ConnectionSeconds: l.ConnectionSeconds,
		},
		SocketDrops: l.SocketDrops,
		Process:     l.Owner.Process, PodNamespace: l.Owner.Namespace, Pod: l.Owner.Pod, Container: l.Owner.Container,
		GaveUp: known(l.GaveUp, l.Live && l.GaveUpKnown),

		BacklogRequested:  known(l.BacklogRequested, l.Live && l.BacklogRequestedKnown),
		Connections:       known(l.Connections, l.ConnectionsKnown),
		Accepts:           known(l.Accepts, l.AcceptsKnown),
		LastAccept:        known(l.LastAccept, l.AcceptsKnown && !l.LastAccept.IsZero()),
		AcceptWaitSeconds: known(newHistogramDoc(&l.AcceptWait), l.AcceptWaitKnown),
		SynackRetransmits: known(l.SynackRetransmits, l.RetransmitsKnown),
		Drops:             counted(tracker.DropReasonNames[:], l.Drops[:]),

		Syns:                known(l.Syns, l.RefusalsKnown),
		SynCookiesSent:      known(l.CookiesSent, l.RefusalsKnown),
		SynCookiesValidated: known(l.CookiesValidated, l.RefusalsKnown),
		HandshakeSeconds:    known(newHistogramDoc(&l.Handshake), l.HalfOpenKnown),
		Abandoned:           known(l.Abandoned, l.HalfOpenKnown),
	}
	if who := &l.Who; who.PID != 0 {
		doc.Owner = &ownerDoc{
			PID: who.PID, Others: who.Others, Unit: who.Unit, Runtime: who.Runtime,
			ContainerID: who.Container, PodUID: who.PodUID, HostNetwork: who.HostNetwork,
		}
	}
	if l.HalfOpenKnown {
		doc.HalfOpenEnded = counted(tracker.HalfOpenEndNames[:], l.HalfOpenEnded[:])
	}
	if v := l.Verdict; l.Live && v != nil {
		doc.Verdict = &verdictDoc{v.Kind.String(), v.Evidence, v.Advice}
	}
	syn := synQueueDoc{
		Length: known(l.SynQueue, l.Live && l.SynQueueKnown),
		Limit:  known(l.SynQueueLimit, l.Live && l.SynLimitKnown),
		Peak:   known(l.SynPeak, l.SynQueueKnown),
	}
	if syn != (synQueueDoc{}) {
		doc.SynQueue = &syn
	}
	return doc
}

func newProcessDoc(p *probes.Process) processDoc {
	doc := processDoc{
		Netns: p.Namespace, Process: p.Process, Processes: p.Processes,
		CloseWait: p.CloseWait, CloseWaitOldestSeconds: p.OldestCloseWait.Seconds(),
		FinWait2: p.FinWait2, FinWait2OldestSeconds: p.OldestFinWait2.Seconds(),
	}
	if !p.QueuesKnown {
		return doc
	}
	doc.Queues = make(map[string]queuesDoc, census.Directions)
	for d, q := range p.Queues {
		doc.Queues[census.Direction(d).String()] = queuesDoc{
			q.ReceiveBytes, q.SendBytes,
			known(q.ReceiveMaxBytes, p.ReceiveMaxKnown[d]), known(q.SendMaxBytes, p.SendMaxKnown[d]),
		}
	}
	return doc
}

func newProbeDoc(p *probes.Probe) probeDoc {
	return probeDoc{
		p.Name, p.Mechanism, p.Attached, p.Reason,
		known(p.Runs, p.StatsKnown), known(p.RunTime.Seconds(), p.StatsKnown),
		known(p.Misses, p.MissesKnown),
	}
}

func newSourceDoc(s *probes.SourceStatus) sourceDoc {
	return sourceDoc{
		s.Name, s.Up, known(s.Duration.Seconds(), s.Duration > 0),
		known(s.LastSuccess, !s.LastSuccess.IsZero()), s.Error,
	}
}
