package main

import (
	"encoding/json"
	"log/slog"
	"net/http"
	"time"

	"sockq/probes"
	"sockq/probes/census"
	"sockq/probes/tcpstate"
)

// The JSON of a Snapshot. What is unknown is absent; a pointer is a value that
// may be unknown. Fields are only ever added.
type snapshotDoc struct {
	Time       time.Time         `json:"time"`
	Kernel     kernelDoc         `json:"kernel"`
	Namespaces []namespaceDoc    `json:"namespaces"`
	Listeners  []listenerDoc     `json:"listeners"`
	Probes     []probeDoc        `json:"probes"`
	Sources    []sourceDoc       `json:"sources"`
	Audits     []auditDoc        `json:"audits"`
	Lost       map[string]uint64 `json:"lost"`
}

type kernelDoc struct {
	Release string `json:"release"`
	Tier    string `json:"tier,omitempty"`
}

type namespaceDoc struct {
	Name   string `json:"name"`
	Inode  uint32 `json:"inode,omitempty"`
	Cookie uint64 `json:"cookie,omitempty,string"` // may exceed what a JSON reader's double can hold
	// Sockets by state, as the kernel spells it.
	Sockets map[string]uint64 `json:"sockets,omitempty"`
	// Queues by direction, inbound or outbound.
	Queues  map[string]queuesDoc `json:"queues,omitempty"`
	Sysctls map[string]int64     `json:"sysctls,omitempty"`
	Events  map[string]uint64    `json:"events,omitempty"`
	// AuditDifference by check, as sockq_audit_difference.
	AuditDifference map[string]uint64 `json:"audit_difference,omitempty"`
}

type queuesDoc struct {
	ReceiveBytes    uint64  `json:"receive_bytes"`
	SendBytes       uint64  `json:"send_bytes"`
	ReceiveMaxBytes *uint64 `json:"receive_max_bytes,omitempty"`
	SendMaxBytes    *uint64 `json:"send_max_bytes,omitempty"`
}

type listenerDoc struct {
	ID          uint64         `json:"id"`
	Netns       string         `json:"netns"`
	NetnsInode  uint32         `json:"netns_inode,omitempty"`
	Address     string         `json:"address"`
	Live        bool           `json:"live"`
	Sockets     *int           `json:"sockets,omitempty"`
	AcceptQueue acceptQueueDoc `json:"accept_queue"`
	SynQueue    *synQueueDoc   `json:"syn_queue,omitempty"`
	SocketDrops uint64         `json:"socket_drops"`
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

type probeDoc struct {
	Name       string   `json:"name"`
	Mechanism  string   `json:"mechanism"`
	Attached   bool     `json:"attached"`
	Reason     string   `json:"reason,omitempty"`
	Runs       *uint64  `json:"runs,omitempty"`
	RunSeconds *float64 `json:"run_seconds,omitempty"`
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
		Probes:     each(s.Probes, newProbeDoc),
		Sources:    each(s.Sources, newSourceDoc),
		Audits:     each(s.Audits, func(a *probes.Audit) auditDoc { return auditDoc{a.Check, a.Checks, a.Skipped} }),
		Lost:       s.Lost,
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

// known is v where it is known, else nil.
func known[T any](v T, ok bool) *T {
	if !ok {
		return nil
	}
	return &v
}

func newNamespaceDoc(n *probes.Namespace) namespaceDoc {
	doc := namespaceDoc{Name: n.Name, Inode: n.Inode, Cookie: n.Cookie}
	if n.Audited {
		doc.AuditDifference = map[string]uint64{"states": n.StateDifference}
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

func newProbeDoc(p *probes.Probe) probeDoc {
	return probeDoc{
		p.Name, p.Mechanism, p.Attached, p.Reason,
		known(p.Runs, p.StatsKnown), known(p.RunTime.Seconds(), p.StatsKnown),
	}
}

func newSourceDoc(s *probes.SourceStatus) sourceDoc {
	return sourceDoc{
		s.Name, s.Up, known(s.Duration.Seconds(), s.Duration > 0),
		known(s.LastSuccess, !s.LastSuccess.IsZero()), s.Error,
	}
}
