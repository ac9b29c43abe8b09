package diagnose

import "time"

// steps is into how many a window is divided.
const steps = 12

// History is what happened at a listener in the last window of time. It takes
// 1.4 kB, whatever happens.
type History struct {
	window time.Duration
	last   Observation
	ring   [steps]step
	count  int // of steps that were taken
}

// step is what happened between two observations. Counts that do not fit are cut
// off: they are only compared and told to people.
type step struct {
	seconds                               float32
	synQueue                              uint32 // its length at the end
	connections                           uint32
	syns, refusedSyns, refusedACKs        uint32
	synQueueDrops, otherSyns              uint32
	cookiesSent, cookiesValidated         uint32
	socketDrops                           uint32
	listenOverflows, listenDrops          uint32 // of the whole namespace, as the following
	syncookiesSent, syncookiesRecv        uint32
	waits                                 uint32
	waited, fullSeconds, connectionSecond float32
	idle                                  bool // connections waited and none was taken
}

// New begins a history with what was counted up to then.
func New(window time.Duration, o Observation) *History {
	return &History{window: window, last: o}
}

// Every is the time between two observations.
func Every(window time.Duration) time.Duration { return window / steps }

// Due tells whether it is time for the next observation. One that comes a little
// early is not put off.
func (h *History) Due(now time.Time) bool {
	return now.Sub(h.last.Time) >= Every(h.window)*9/10
}

// Add takes the next observation.
func (h *History) Add(o Observation) {
	before := &h.last
	s := step{
		seconds:     float32(o.Time.Sub(before.Time).Seconds()),
		synQueue:    clip(o.SynQueue),
		connections: clip(o.Connections - before.Connections),
		syns:        clip(o.Syns - before.Syns),
		refusedSyns: clip(o.RefusedSyns - before.RefusedSyns), refusedACKs: clip(o.RefusedACKs - before.RefusedACKs),
		synQueueDrops: clip(o.SynQueueDrops - before.SynQueueDrops), otherSyns: clip(o.OtherSyns - before.OtherSyns),
		cookiesSent: clip(o.CookiesSent - before.CookiesSent), cookiesValidated: clip(o.CookiesValidated - before.CookiesValidated),
		socketDrops: clip(o.SocketDrops - before.SocketDrops),
		waits:       clip(o.Waits - before.Waits), waited: float32(o.WaitSeconds - before.WaitSeconds),
		fullSeconds:      float32(o.FullSeconds - before.FullSeconds),
		connectionSecond: float32(o.ConnectionSeconds - before.ConnectionSeconds),
		idle:             idle(before, &o),
	}
	switch {
	case o.NamespaceKnown && before.NamespaceKnown:
		s.listenOverflows, s.listenDrops = clip(o.ListenOverflows-before.ListenOverflows), clip(o.ListenDrops-before.ListenDrops)
		s.syncookiesSent, s.syncookiesRecv = clip(o.SyncookiesSent-before.SyncookiesSent), clip(o.SyncookiesRecv-before.SyncookiesRecv)
	case o.PeakRatio >= 1: // it was full, and that is what it must have been
		s.listenOverflows, s.listenDrops = s.socketDrops, s.socketDrops
	}
	h.ring[h.count%steps] = s
	h.count++
	h.last = o
}

func clip(n uint64) uint32 { return uint32(min(n, 1<<32-1)) }

// idle tells whether connections waited all the time and none was taken: what
// came in and did not make the queue longer was. Where arrivals are not seen
// either, the queue must not have shrunk; a full one may be filled again at once.
func idle(before, now *Observation) bool {
	switch {
	case before.AcceptQueue == 0 || now.AcceptQueue == 0:
		return false
	case before.AcceptsKnown && now.AcceptsKnown:
		return now.Accepts == before.Accepts
	case before.ConnectionsKnown && now.ConnectionsKnown:
		return before.AcceptQueue+now.Connections-before.Connections <= now.AcceptQueue
	}
	return now.AcceptQueue >= before.AcceptQueue && now.FillRatio < 1
}

// sums are what happened in a window of time.
type sums struct {
	seconds, waited, fullSeconds, connectionSeconds float64
	idle                                            float64 // seconds up to now

	connections, syns, waits                                     uint64
	refusedSyns, refusedACKs, synQueueDrops, otherSyns           uint64
	cookiesSent, cookiesValidated                                uint64
	socketDrops                                                  uint64
	listenOverflows, listenDrops, syncookiesSent, syncookiesRecv uint64
	synQueue                                                     uint64 // longest at the end of a step
	burst                                                        uint64 // most refusals in one step
}

// sum adds up the window's steps, the last first.
func (h *History) sum() (w sums) {
	idle := true
	for i := range min(h.count, steps) {
		s := &h.ring[(h.count-1-i)%steps]
		seconds := float64(s.seconds)
		if i > 0 && w.seconds+seconds > slack*h.window.Seconds() {
			break
		}
		if idle = idle && s.idle; idle {
			w.idle += seconds
		}
		w.seconds += seconds
		w.waited += float64(s.waited)
		w.fullSeconds += float64(s.fullSeconds)
		w.connectionSeconds += float64(s.connectionSecond)
		w.synQueue = max(w.synQueue, uint64(s.synQueue))
		w.connections += uint64(s.connections)
		w.syns += uint64(s.syns)
		w.waits += uint64(s.waits)
		w.refusedSyns += uint64(s.refusedSyns)
		w.refusedACKs += uint64(s.refusedACKs)
		w.synQueueDrops += uint64(s.synQueueDrops)
		w.otherSyns += uint64(s.otherSyns)
		w.cookiesSent += uint64(s.cookiesSent)
		w.cookiesValidated += uint64(s.cookiesValidated)
		w.socketDrops += uint64(s.socketDrops)
		w.listenOverflows += uint64(s.listenOverflows)
		w.listenDrops += uint64(s.listenDrops)
		w.syncookiesSent += uint64(s.syncookiesSent)
		w.syncookiesRecv += uint64(s.syncookiesRecv)
		refused := uint64(s.refusedSyns) + uint64(s.refusedACKs) + uint64(s.synQueueDrops)
		if !h.last.RefusalsKnown {
			refused = uint64(s.socketDrops)
		}
		w.burst = max(w.burst, refused)
	}
	return w
}

// slack is how much later than planned observations may come.
const slack = 1.05
