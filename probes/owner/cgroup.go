package owner

import (
	"cmp"
	"strings"
)

const (
	maxCgroupBytes = 64 << 10 // of /proc/PID/cgroup
	maxNested      = 4        // containers in containers
	idLength       = 64
)

// place is what the cgroup of a process tells.
type place struct {
	unit    string
	runtime string // of the innermost container
	// containers are the ids of the container and of those around it, the
	// innermost last.
	containers []string
	// ofUser are how many of them, the innermost, an ordinary user may have named:
	// they are nobody's word for whose pod it is.
	ofUser int
	podUID string // of the outermost pod
}

// parseCgroup reads /proc/PID/cgroup. Of the hierarchies of cgroup v1 each may say
// something else: v2 is believed first, then systemd's own, then the rest.
//
// Seen from another cgroup namespace paths begin with /.. and lack what the two
// have in common; what is left is read all the same.
func parseCgroup(data string) place {
	var ranked [3][]string
	for line := range strings.Lines(data) {
		fields := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(fields) != 3 {
			continue
		}
		rank := 2
		switch fields[1] {
		case "":
			rank = 0
		case "name=systemd":
			rank = 1
		}
		ranked[rank] = append(ranked[rank], fields[2])
	}
	var result place
	for _, paths := range ranked {
		for _, path := range paths {
			p := parsePath(path)
			result.unit = cmp.Or(result.unit, p.unit)
			if len(p.containers) > len(result.containers) {
				result.containers, result.runtime, result.ofUser = p.containers, p.runtime, p.ofUser
			}
			result.podUID = cmp.Or(result.podUID, p.podUID)
		}
	}
	return result
}

// parsePath reads the path of one cgroup, from the root inwards.
func parsePath(path string) place {
	var p place
	parent, ofUser := "", false
	for element := range strings.SplitSeq(strings.TrimSuffix(path, " (deleted)"), "/") {
		if element == "" || element == ".." {
			continue
		}
		ofUser = ofUser || isUsers(element)
		// runc without systemd, told a path for systemd: SLICE:RUNTIME:ID.
		if fields := strings.Split(element, ":"); len(fields) == 3 && isID(fields[2]) {
			p.readPod(fields[0], ofUser)
			p.enter(fields[2], runtimes[fields[1]], ofUser)
		} else if id, runtime, ok := containerOf(element, parent); ok {
			p.enter(id, runtime, ofUser)
		} else {
			p.readPod(element, ofUser)
			if isUnit(element) {
				// systemd puts _ before what the kernel would take for a file of its own.
				p.unit = printable(strings.TrimPrefix(element, "_"))
			}
		}
		parent = element
	}
	return p
}

// isUsers tells whether everything below it is a user's, who may call it anything:
// systemd-run --user --scope --unit=cri-containerd-ID.
func isUsers(element string) bool {
	return element == "user.slice" || strings.HasPrefix(element, "user@") && strings.HasSuffix(element, ".service")
}

// enter goes into a container. More than maxNested are not entered.
func (p *place) enter(id, runtime string, ofUser bool) {
	if len(p.containers) == maxNested {
		return
	}
	p.containers, p.runtime = append(p.containers, id), runtime
	if ofUser {
		p.ofUser++
	}
}

// runtimes are what stands before an id in the name of a cgroup, and whose id it
// is. What stands there for the monitor of a container (crio-conmon) is not here.
var runtimes = map[string]string{
	"docker":         "docker",
	"cri-containerd": "containerd",
	"nerdctl":        "containerd",
	"crio":           "cri-o",
	"libpod":         "podman",
	"libpod-payload": "podman",
	"runc":           "runc",
	"crun":           "crun",
}

// parents are the cgroups in which each child is called by its id alone. Under
// kubepods it may be any runtime's.
var parents = map[string]string{
	"docker":  "docker",
	"k8s.io":  "containerd",
	"default": "containerd", // the namespace of nerdctl
}

func containerOf(element, parent string) (id, runtime string, ok bool) {
	element = strings.TrimSuffix(element, ".scope")
	if isID(element) {
		return element, parents[parent], true
	}
	i := strings.LastIndexByte(element, '-')
	if i < 0 || !isID(element[i+1:]) {
		return "", "", false
	}
	runtime, ok = runtimes[element[:i]]
	return element[i+1:], runtime, ok
}

// readPod takes over the UID of a pod from pod1234-… or, systemd's way,
// kubepods-burstable-pod1234_….slice. Who is in a pod may make further ones.
func (p *place) readPod(element string, ofUser bool) {
	if ofUser || p.podUID != "" {
		return
	}
	uid, isSlice := strings.CutSuffix(element, ".slice")
	if isSlice {
		uid = uid[strings.LastIndexByte(uid, '-')+1:]
	}
	uid, ok := strings.CutPrefix(uid, "pod")
	if uid = strings.ReplaceAll(uid, "_", "-"); ok && isUID(uid) {
		p.podUID = uid
	}
}

// isUID tells whether it is a pod's UID: a UUID or, of static pods, 32 digits.
func isUID(s string) bool {
	if len(s) == 36 && s[8] == '-' && s[13] == '-' && s[18] == '-' && s[23] == '-' {
		s = s[:8] + s[9:13] + s[14:18] + s[19:23] + s[24:]
	}
	return len(s) == 32 && isHex(s)
}

func isID(s string) bool { return len(s) == idLength && isHex(s) }

func isHex(s string) bool { return strings.Trim(s, "0123456789abcdef") == "" }

func isUnit(element string) bool {
	for _, suffix := range []string{".service", ".scope", ".socket", ".mount", ".swap"} {
		if len(element) > len(suffix) && strings.HasSuffix(element, suffix) {
			return true
		}
	}
	return false
}
