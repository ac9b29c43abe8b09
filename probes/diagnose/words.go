package diagnose

import (
	"fmt"
	"strconv"
	"strings"
)

// verdict puts a verdict into words.
func (v *view) verdict(k Kind) Verdict {
	out := Verdict{Kind: k}
	switch k {
	case OK:
		out.Evidence = "nobody was refused by a queue" + v.inWindow() + "; " + v.peaked() + v.beside()
	case NearLimit:
		out.Evidence = v.peaked() + "; nobody was refused" + v.inWindow() + v.waitedFor()
		out.Advice = v.raise("which halves that")
	case Burst:
		out.Evidence = v.refusedWords() + v.keptUp()
		if v.refused == 0 && (!v.ConnectionsKnown || !v.RefusalsKnown && !v.SynQueueKnown) {
			out.Evidence += "; this kernel does not tell whether handshakes are completed: it may be a SYN flood"
		}
		out.Advice = v.raise("since it bounds both queues")
		if v.refused == 0 && v.Syncookies == 0 {
			out.Advice = "Turn on SYN cookies, which serve those for whom the SYN queue has no place: " + v.sysctl("net.ipv4.tcp_syncookies", 1) + ". Else: " + out.Advice
		}
	case SlowAccept:
		out.Evidence = v.refusedWords() + fmt.Sprintf("; the accept queue was full for %s of %s, and %.0f %% full on average",
			duration(v.fullSeconds), duration(v.seconds), 100*min(1, v.occupied())) + v.waitedFor()
		out.Advice = "The application accepts too slowly, and a longer backlog makes connections wait longer: " +
			"look for CPU throttling and for work between two accept(), use more threads, processes or sockets" + v.by() + "."
		if !v.AcceptsKnown && !v.ConnectionsKnown {
			out.Evidence += "; this kernel does not tell whether accept() is called at all"
		}
	case Stalled:
		out.Evidence = v.stalledWords()
		out.Advice = "Nobody calls accept(): the process" + v.by() +
			" is stopped, deadlocked, busy with something else, or out of file descriptors. Look at its state, its threads' stacks and its open files."
	case Clamped:
		out.Evidence, out.Advice = v.clampedWords()
	case SynFlood:
		out.Evidence, out.Advice = v.floodWords()
	}
	return out
}

func (v *view) inWindow() string { return " in the last " + duration(v.seconds) }

// peaked is how full the accept queue was.
func (v *view) peaked() string {
	return fmt.Sprintf("the accept queue was %.0f %% full at its peak in the last two minutes (%s of %s)",
		100*v.PeakRatio, count(v.Peak), count(v.limit()+1))
}

// beside is what is no reason for another verdict, and should be known.
func (v *view) beside() (s string) {
	if v.RefusalsKnown && v.cookiesSent > 0 {
		s += fmt.Sprintf("; %s SYN cookies were sent for want of a place in the SYN queue, %s came back", count(v.cookiesSent), count(v.cookiesValidated))
	}
	if v.otherSyns > 0 {
		s += fmt.Sprintf("; %s SYNs were refused for other reasons (memory, route, policy)", count(v.otherSyns))
	}
	return s
}

// refusedWords tell how much was refused, and of how much.
func (v *view) refusedWords() string {
	var parts []string
	add := func(n uint64, what string) {
		if n > 0 {
			parts = append(parts, count(n)+" "+what)
		}
	}
	bound := ""
	if v.RefusalsKnown {
		add(v.refusedSyns, "SYNs refused by the full accept queue")
		add(v.refusedACKs, "final ACKs refused by the full accept queue")
		add(v.refusedSynQueue, "SYNs refused by the full SYN queue")
	} else {
		bound = "up to "
		add(v.refused, "SYNs and final ACKs refused by the full accept queue")
		add(v.refusedSynQueue, "SYNs refused by the SYN queue")
	}
	if len(parts) == 0 {
		return "nobody was refused" + v.inWindow()
	}
	s := bound + strings.Join(parts, ", ") + v.inWindow()
	if v.ConnectionsKnown {
		s += ", " + count(v.connections) + " connections came in"
	}
	return s
}

// waitedFor tells how long connections waited, where that is known.
func (v *view) waitedFor() string {
	wait, source := v.wait()
	if source == unknown {
		return ""
	}
	return "; connections waited " + duration(wait) + " for accept() on average" + string(source)
}

// keptUp tells that accept() did.
func (v *view) keptUp() string {
	wait, source := v.wait()
	if source == unknown {
		return fmt.Sprintf("; the accept queue was %.0f %% full on average", 100*v.occupied())
	}
	return "; accept() kept up: " + duration(wait) + " on average" + string(source)
}

func (v *view) stalledWords() string {
	s := fmt.Sprintf("%s connections wait and none was accepted for %s", count(v.AcceptQueue), duration(v.idle))
	switch {
	case !v.AcceptsKnown && v.ConnectionsKnown:
		s += ", by what came in and what is in the queue"
	case !v.AcceptsKnown:
		s += ", since the queue never became shorter"
	case !v.LastAccept.IsZero():
		s += ", the last " + duration(v.Time.Sub(v.LastAccept).Seconds()) + " ago"
	}
	if v.refused > 0 || v.refusedSynQueue > 0 {
		s += "; " + v.refusedWords()
	}
	return s
}

// by is the process, and its pod.
func (v *view) by() string {
	switch {
	case v.Process == "":
		return ""
	case v.Pod == "":
		return " (" + v.Process + ")"
	}
	return " (" + v.Process + " in pod " + v.Pod + ")"
}

// where is the namespace.
func (v *view) where() string {
	if v.Namespace == "host" {
		return "of the host"
	}
	return "in namespace " + v.Namespace
}

// raise says to what the backlog should be raised, where that is set, and the
// sysctl where it has to follow.
func (v *view) raise(why string) string {
	target := v.target()
	if target <= v.limit() {
		return "The backlog of " + count(v.limit()) + " is long: spread the connections over more sockets (SO_REUSEPORT), processes or hosts."
	}
	s := fmt.Sprintf("Raise the backlog of listen() from %s to %s, %s%s.", count(v.limit()), count(target), why, v.setting())
	switch {
	case v.Somaxconn < 0:
		s += " net.core.somaxconn " + v.where() + " must allow it."
	case target > uint64(v.Somaxconn):
		s += fmt.Sprintf(" net.core.somaxconn allows %s at most, so first: %s.", count(uint64(v.Somaxconn)), v.sysctl("net.core.somaxconn", target))
	}
	return s
}

func (v *view) sysctl(name string, value uint64) string {
	return "sysctl -w " + name + "=" + strconv.FormatUint(value, 10) + " " + v.where()
}

func (v *view) clampedWords() (evidence, advice string) {
	if v.refused > 0 || v.refusedSynQueue > 0 {
		evidence = v.refusedWords() + v.keptUp()
	} else {
		evidence = v.peaked() + "; nobody was refused" + v.inWindow()
	}
	want := v.target()
	asked, known := v.asked()
	got, somaxconn := count(v.limit()), "net.core.somaxconn "+v.where()
	switch {
	case v.cut() == maybeCut:
		evidence += fmt.Sprintf("; the backlog is %s, as much as %s allows: it may be clamped", got, somaxconn)
		return evidence, fmt.Sprintf("What listen() asked for is not known. If it was more than %s: %s. Then restart, or listen() again. Else raise the backlog, too%s.",
			got, v.sysctl("net.core.somaxconn", want), v.setting())
	case known:
		want = min(asked, maxBacklog)
		evidence += fmt.Sprintf("; listen() asked for %s and %s gave it %s", count(asked), somaxconn, got)
	default:
		evidence += fmt.Sprintf("; listen() asked for as much as there is and %s gave it %s", somaxconn, got)
	}
	if v.Somaxconn >= 0 && uint64(v.Somaxconn) >= want {
		return evidence, fmt.Sprintf("%s is %s by now, which holds from the next listen(): restart, or listen() again.", somaxconn, count(uint64(v.Somaxconn)))
	}
	return evidence, v.sysctl("net.core.somaxconn", want) + ", then restart" + v.by() + ", or listen() again."
}

func (v *view) floodWords() (evidence, advice string) {
	switch answered := less(v.syns, v.refusedSyns+v.synQueueDrops+v.otherSyns); {
	case v.RefusalsKnown && v.ConnectionsKnown:
		evidence = fmt.Sprintf("%s SYNs%s (%s a second), %s were answered and %s of them completed the handshake; %s SYN cookies sent, %s SYNs dropped for want of a place in the SYN queue",
			count(v.syns), v.inWindow(), rate(v.syns, v.seconds), count(answered), count(min(answered, v.connections)), count(v.cookiesSent), count(v.refusedSynQueue))
	case v.RefusalsKnown:
		evidence = fmt.Sprintf("%s SYNs%s (%s a second), %s were answered; %s SYN cookies sent for want of a place in the SYN queue, %s came back",
			count(v.syns), v.inWindow(), rate(v.syns, v.seconds), count(answered), count(v.cookiesSent), count(v.cookiesValidated))
	default:
		evidence = fmt.Sprintf("the SYN queue was full (%s of %s), %s handshakes were completed%s; %s SYN cookies sent %s and %s came back, up to %s SYNs dropped here",
			count(v.SynPeak), count(v.synLimit()), count(v.connections), v.inWindow(),
			count(v.syncookiesSent), v.where(), count(v.syncookiesRecv), count(v.refusedSynQueue))
	}
	if v.Syncookies == 0 {
		return evidence, "Turn on SYN cookies: " + v.sysctl("net.ipv4.tcp_syncookies", 1) +
			". Then find where the SYNs come from, and limit them before they get here."
	}
	return evidence, "SYN cookies keep the listener reachable. Find where the SYNs come from, or why clients do not get the SYN-ACK (routes, firewalls), " +
		"and limit them before they get here; fewer net.ipv4.tcp_synack_retries free the SYN queue earlier."
}

// rate is n a second.
func rate(n uint64, seconds float64) string {
	if seconds <= 0 {
		return "0"
	}
	return count(uint64(float64(n)/seconds + 0.5))
}

// count writes a number as people do: 12,000.
func count(n uint64) string {
	s := strconv.FormatUint(n, 10)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// duration writes seconds with two digits that mean something.
func duration(seconds float64) string {
	switch {
	case seconds >= 10:
		return count(uint64(seconds+0.5)) + " s"
	case seconds >= 1:
		return strconv.FormatFloat(seconds, 'f', 1, 64) + " s"
	case seconds >= 10e-3:
		return strconv.FormatFloat(seconds*1e3, 'f', 0, 64) + " ms"
	}
	return strconv.FormatFloat(max(0, seconds)*1e3, 'f', 1, 64) + " ms"
}
