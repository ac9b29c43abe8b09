package owner

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"
)

// fakeSource lists what a test says.
type fakeSource struct {
	containers map[string]container
	err        error
	reads      int
	deadline   time.Duration
}

func (*fakeSource) name() string { return "fake" }

func (s *fakeSource) try() (int, error) { return len(s.containers), nil }

func (s *fakeSource) read(ctx context.Context, t *podTable) error {
	s.reads++
	if deadline, ok := ctx.Deadline(); ok {
		s.deadline = time.Until(deadline)
	}
	for id, c := range s.containers {
		t.add(id, c)
	}
	return s.err
}

// podFinder is a Finder with made up processes, source and time.
type podFinder struct {
	*Finder
	t      *testing.T
	proc   *fakeProc
	source *fakeSource
	clock  *clock
	log    *bytes.Buffer
}

func newPodFinder(t *testing.T, most int) *podFinder {
	t.Helper()
	f := &podFinder{t: t, proc: newFakeProc(t), source: &fakeSource{containers: make(map[string]container)}, clock: newClock(), log: new(bytes.Buffer)}
	f.Finder = open(t, Options{ProcFS: f.proc.dir, CRI: CRIOff, MaxContainers: most, Logger: slog.New(slog.NewTextHandler(f.log, nil))})
	f.pods.source, f.pods.now = f.source, f.clock.now
	return f
}

func containerID(n int) string { return fmt.Sprintf("%064x", n) }

// run makes a process in a container of that number.
func (f *podFinder) run(pid uint32, n int) {
	f.t.Helper()
	f.proc.add(pid, 1, "app", 1, "0::/docker/"+containerID(n)+"\n")
}

// list lets the source know of the container.
func (f *podFinder) list(n int) {
	f.source.containers[containerID(n)] = container{name: fmt.Sprintf("c%d", n), pod: pod{uid: uid, name: fmt.Sprintf("p%d", n), namespace: "ns"}}
}

func (f *podFinder) wants(pid uint32, n int, named bool, reads int) {
	f.t.Helper()
	want := Owner{PID: pid, Process: "app", Runtime: "docker", Container: containerID(n)}
	if named {
		want.ContainerName, want.Pod, want.Namespace, want.PodUID = fmt.Sprintf("c%d", n), fmt.Sprintf("p%d", n), "ns", uid
	}
	wantOwner(f.t, f.Finder, want, pid)
	if f.source.reads != reads {
		f.t.Errorf("%d reads, want %d", f.source.reads, reads)
	}
}

// Pods are read for a container that is not known, and not again for one that is.
func TestPodsAreReadWhenNeeded(t *testing.T) {
	f := newPodFinder(t, 100)
	f.proc.add(1, 0, "plain", 1, "0::/system.slice/plain.service\n")
	wantOwner(t, f.Finder, Owner{PID: 1, Process: "plain", Unit: "plain.service"}, 1)
	if f.source.reads != 0 {
		t.Error("read for a process without a container")
	}
	f.run(10, 1)
	f.list(1)
	for range 3 {
		f.wants(10, 1, true, 1)
		f.clock.pass(time.Hour)
	}
	if f.source.deadline <= 0 || f.source.deadline > readTime {
		t.Errorf("the read had %v", f.source.deadline)
	}
}

// However many containers are new, pods are read every five seconds at most.
func TestPodsAreReadRarely(t *testing.T) {
	f := newPodFinder(t, 100)
	for n := range 50 {
		f.run(uint32(10+n), n)
	}
	for n := range 50 {
		f.wants(uint32(10+n), n, false, 1)
	}
	f.list(20)
	f.clock.pass(readEvery - 1)
	f.wants(30, 20, false, 1)
	f.clock.pass(1)
	f.wants(30, 20, true, 2)
}

// However many containers nobody knows, they do not make pods be read more often than
// one does.
func TestManyUnknownContainers(t *testing.T) {
	f := newPodFinder(t, 100)
	for n := range 60 {
		f.run(uint32(10+n), n)
	}
	for range 3600 {
		f.clock.pass(time.Second)
		for n := range 60 {
			f.Of([]uint32{uint32(10 + n)})
		}
	}
	if most := 2 * (1 + 6 + (3600-315)/300); f.source.reads > most {
		t.Errorf("%d reads in an hour, want at most %d", f.source.reads, most)
	}
}

// A container that the source does not know is asked for again, more and more
// rarely: it may be docker's own, or new.
func TestUnknownContainers(t *testing.T) {
	f := newPodFinder(t, 100)
	f.run(10, 1)
	f.wants(10, 1, false, 1)
	for passed := time.Duration(0); passed < time.Hour; passed += time.Second {
		f.clock.pass(time.Second)
		f.Of([]uint32{10})
	}
	// After 5, 10, 20, 40, 80, 160 and then each 300 s.
	reads := f.source.reads
	if want := 1 + 6 + (3600-315)/300; reads != want {
		t.Errorf("%d reads in an hour, want %d", reads, want)
	}
	// One that is new does not wait for that.
	f.run(11, 2)
	f.list(1)
	f.list(2)
	f.clock.pass(readEvery)
	f.wants(11, 2, true, reads+1)
	f.wants(10, 1, true, reads+1)
	if len(f.pods.missed) != 0 {
		t.Errorf("%d containers are still missed", len(f.pods.missed))
	}
	if f.log.Len() != 0 {
		t.Errorf("logged: %s", f.log)
	}
}

// A source that fails is asked more and more rarely, and it is said once.
func TestFailingSource(t *testing.T) {
	f := newPodFinder(t, 100)
	f.run(10, 1)
	f.list(1)
	f.wants(10, 1, true, 1)
	if source, err := f.Pods(); source != "fake" || err != nil {
		t.Errorf("Pods() = %q, %v", source, err)
	}

	f.source.err = errors.New("it is restarting")
	f.run(11, 2)
	f.list(2)
	f.clock.pass(readEvery)
	f.wants(11, 2, false, 2)
	for range 3600 {
		f.clock.pass(time.Second)
		f.Of([]uint32{11})
	}
	if reads := 2 + 6 + (3600-315)/300; f.source.reads != reads {
		t.Errorf("%d reads in an hour, want %d", f.source.reads, reads)
	}
	wantLost(t, f.Finder, "pod_reads", uint64(f.source.reads-1))
	f.wants(10, 1, true, f.source.reads) // what was known still is
	if _, err := f.Pods(); !errors.Is(err, f.source.err) {
		t.Errorf("Pods(): %v", err)
	}
	if n := strings.Count(f.log.String(), "\n"); n != 1 || !strings.Contains(f.log.String(), "it is restarting") {
		t.Errorf("logged %d times: %s", n, f.log)
	}

	f.source.err = nil
	f.clock.pass(longestWait)
	f.wants(11, 2, true, f.source.reads+1)
	if n := strings.Count(f.log.String(), "\n"); n != 2 {
		t.Errorf("logged %d times: %s", n, f.log)
	}
	if _, err := f.Pods(); err != nil {
		t.Errorf("Pods(): %v", err)
	}

	// What failed before does not make it wait longer when it fails again.
	f.source.err = errors.New("again")
	f.run(12, 3)
	f.list(3)
	f.clock.pass(readEvery)
	reads := f.source.reads
	f.wants(12, 3, false, reads+1)
	f.source.err = nil
	f.clock.pass(readEvery)
	f.wants(12, 3, true, reads+2)
}

func TestContainersAreBounded(t *testing.T) {
	const most = 10
	f := newPodFinder(t, most)
	for n := range 3 * most {
		f.list(n)
	}
	f.run(10, 1000)
	f.wants(10, 1000, false, 1)
	if n := len(f.pods.table.containers); n != most {
		t.Errorf("%d containers are known", n)
	}
	pods := newPodTable(most)
	for n := range 3 * most {
		pods.addPod(pod{uid: fmt.Sprintf("%032x", n), name: "p"})
	}
	if n := len(pods.pods); n != most {
		t.Errorf("%d pods are known", n)
	}
	wantLost(t, f.Finder, "containers_over_cap", 2*most)
	// Nor are those that nobody knows remembered without end.
	for n := range 5 * most {
		f.run(uint32(20+n), 2000+n)
		f.clock.pass(readEvery)
		f.Of([]uint32{uint32(20 + n)})
		if len(f.pods.missed) > most {
			t.Fatalf("%d containers are missed", len(f.pods.missed))
		}
	}
}

// A pod is known by its UID before its containers are.
func TestPodByUID(t *testing.T) {
	f := newPodFinder(t, 100)
	f.proc.add(10, 1, "app", 1, "0::/kubepods/pod"+uid+"/"+idA+"\n")
	f.source.containers[idB] = container{name: "sidecar", runtime: "cri-o", pod: pod{uid: uid, name: "web", namespace: "shop", hostNetwork: true}}
	wantOwner(t, f.Finder, Owner{PID: 10, Process: "app", Container: idA, PodUID: uid, Pod: "web", Namespace: "shop", HostNetwork: true}, 10)
}

// A container inside of a pod's container belongs to the pod.
func TestContainerInContainer(t *testing.T) {
	f := newPodFinder(t, 100)
	f.proc.add(10, 1, "app", 1, "0::/kubepods/pod"+uid+"/"+idA+"/docker/"+idB+"\n")
	f.source.containers[idA] = container{name: "builder", runtime: "containerd", pod: pod{uid: uid, name: "ci", namespace: "build"}}
	wantOwner(t, f.Finder, Owner{
		PID: 10, Process: "app", Runtime: "docker", Container: idB, PodUID: uid, ContainerName: "builder", Pod: "ci", Namespace: "build",
	}, 10)
}

// What users or those in a pod call like somebody else's container is not taken for it.
func TestNamesakes(t *testing.T) {
	f := newPodFinder(t, 100)
	f.source.containers[idA] = container{name: "server", runtime: "containerd", pod: pod{uid: uid, name: "web", namespace: "shop"}}
	f.source.containers[idB] = container{name: "other", runtime: "containerd", pod: pod{uid: uidStatic, name: "attacker", namespace: "shop"}}
	users := "0::/user.slice/user-1000.slice/user@1000.service/"
	f.proc.add(10, 1, "app", 1, users+"app.slice/cri-containerd-"+idA+".scope\n")
	f.proc.add(11, 1, "app", 1, users+"kubepods/pod"+uid+"/"+idA+"\n")
	f.proc.add(12, 1, "app", 1, "0::/kubepods/pod"+uidStatic+"/"+idB+"/kubepods/pod"+uid+"/"+idA+"\n")
	wantOwner(t, f.Finder, Owner{PID: 10, Process: "app", Unit: "user@1000.service", Runtime: "containerd", Container: idA}, 10)
	wantOwner(t, f.Finder, Owner{PID: 11, Process: "app", Unit: "user@1000.service", Container: idA}, 11)
	if f.source.reads != 0 {
		t.Error("pods were read for what users call containers")
	}
	wantOwner(t, f.Finder, Owner{
		PID: 12, Process: "app", Runtime: "containerd", Container: idA, ContainerName: "other", Pod: "attacker", Namespace: "shop", PodUID: uidStatic,
	}, 12)
}

// Pods on the node's network, the node's own services and each other are told apart
// by their cgroups, though all of them listen in one namespace.
func TestHostNetwork(t *testing.T) {
	f := newPodFinder(t, 100)
	f.proc.add(10, 1, "nginx", 1, "0::/system.slice/nginx.service\n")
	f.proc.add(11, 1, "nginx", 1, "0::/kubepods/pod"+uid+"/"+idA+"\n")
	f.proc.add(12, 1, "nginx", 1, "0::/kubepods/pod"+uidStatic+"/"+idB+"\n")
	f.source.containers[idA] = container{name: "proxy", runtime: "cri-o", pod: pod{uid, "edge", "web", true}}
	f.source.containers[idB] = container{name: "proxy", runtime: "cri-o", pod: pod{uidStatic, "core", "web", true}}
	wantOwner(t, f.Finder, Owner{PID: 10, Process: "nginx", Unit: "nginx.service"}, 10)
	for pid, want := range map[uint32]Owner{
		11: {Pod: "edge", PodUID: uid, Container: idA},
		12: {Pod: "core", PodUID: uidStatic, Container: idB},
	} {
		want.PID, want.Process, want.Runtime, want.ContainerName, want.Namespace, want.HostNetwork = pid, "nginx", "cri-o", "proxy", "web", true
		wantOwner(t, f.Finder, want, pid)
	}
}

func TestOptions(t *testing.T) {
	for name, opts := range map[string]Options{
		"both":                   {CRI: "/run/x.sock", Kubelet: "https://127.0.0.1:10250/pods"},
		"relative socket":        {CRI: "x.sock"},
		"tcp":                    {CRI: "tcp://127.0.0.1:1"},
		"no URL":                 {Kubelet: "127.0.0.1:10250"},
		"no host":                {Kubelet: "https:///pods"},
		"another scheme":         {Kubelet: "ftp://127.0.0.1/pods"},
		"token in the clear":     {Kubelet: "http://127.0.0.1:10255/pods", KubeletToken: "/x"},
		"no file of authorities": {Kubelet: "https://127.0.0.1:10250/pods", KubeletCA: "/nonexistent"},
		"no authorities":         {Kubelet: "https://127.0.0.1:10250/pods", KubeletCA: "/dev/null"},
		"token without kubelet":  {KubeletToken: "/x"},
	} {
		if f, err := Open(opts); err == nil {
			t.Errorf("%s: opened", name)
			f.Close()
		}
	}
	f := open(t, Options{CRI: CRIOff})
	if source, err := f.Pods(); source != "" || !errors.Is(err, errOff) {
		t.Errorf("Pods() = %q, %v", source, err)
	}
	for _, wrong := range []string{"ftp://me:secret@127.0.0.1/pods", "me:secret@127.0.0.1:10250/pods", "https://me:secret@", "http://me:secret@%zz/pods"} {
		if _, err := Open(Options{Kubelet: wrong}); err == nil || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v", wrong, err)
		}
	}
	f = open(t, Options{Kubelet: "http://127.0.0.1:10255/pods"})
	if source, err := f.Pods(); source != "kubelet" || err != nil {
		t.Errorf("Pods() = %q, %v", source, err)
	}
}
