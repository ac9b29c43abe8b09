package owner

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// fakeRuntime is a container runtime that answers what a test says.
type fakeRuntime struct {
	cri.UnimplementedRuntimeServiceServer
	sandboxes  []*cri.PodSandbox
	containers []*cri.Container
	hostPods   map[string]bool // sandboxes on the node's network
	statuses   atomic.Int32    // that were asked for
	versions   atomic.Int32    // too
	hang       bool
}

func (r *fakeRuntime) Version(ctx context.Context, _ *cri.VersionRequest) (*cri.VersionResponse, error) {
	r.versions.Add(1)
	if r.hang {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return &cri.VersionResponse{RuntimeName: "faked"}, nil
}

func (r *fakeRuntime) ListPodSandbox(context.Context, *cri.ListPodSandboxRequest) (*cri.ListPodSandboxResponse, error) {
	return &cri.ListPodSandboxResponse{Items: r.sandboxes}, nil
}

func (r *fakeRuntime) ListContainers(context.Context, *cri.ListContainersRequest) (*cri.ListContainersResponse, error) {
	return &cri.ListContainersResponse{Containers: r.containers}, nil
}

func (r *fakeRuntime) PodSandboxStatus(_ context.Context, request *cri.PodSandboxStatusRequest) (*cri.PodSandboxStatusResponse, error) {
	r.statuses.Add(1)
	options := &cri.NamespaceOption{Network: cri.NamespaceMode_POD}
	if r.hostPods[request.PodSandboxId] {
		options.Network = cri.NamespaceMode_NODE
	}
	return &cri.PodSandboxStatusResponse{Status: &cri.PodSandboxStatus{
		Linux: &cri.LinuxPodSandboxStatus{Namespaces: &cri.Namespace{Options: options}},
	}}, nil
}

func (r *fakeRuntime) addPod(id, uid, podName, namespace string) {
	r.sandboxes = append(r.sandboxes, &cri.PodSandbox{Id: id, Metadata: &cri.PodSandboxMetadata{Name: podName, Uid: uid, Namespace: namespace}})
}

func (r *fakeRuntime) addContainer(id, sandbox, containerName string, labels map[string]string) {
	r.containers = append(r.containers, &cri.Container{Id: id, PodSandboxId: sandbox, Metadata: &cri.ContainerMetadata{Name: containerName}, Labels: labels})
}

// socketDir is short enough for the path of a socket.
func socketDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "owner")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// serve lets a runtime, or with nil something else that speaks gRPC, answer at a
// socket.
func serve(t *testing.T, socket string, r *fakeRuntime) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(socket), 0o755); err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	if r != nil {
		cri.RegisterRuntimeServiceServer(server, r)
	}
	done := make(chan error)
	go func() { done <- server.Serve(listener) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-done; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			t.Error(err)
		}
	})
}

// openRuntime is a Finder that asks a runtime about the process 10 in container A.
func openRuntime(t *testing.T, r *fakeRuntime, log *bytes.Buffer) (*Finder, *fakeProc) {
	t.Helper()
	socket := filepath.Join(socketDir(t), "cri.sock")
	serve(t, socket, r)
	p := newFakeProc(t)
	p.add(10, 1, "app", 1, "0::/kubepods/pod"+uid+"/"+idA+"\n")
	return open(t, Options{ProcFS: p.dir, CRI: "unix://" + socket, Logger: slog.New(slog.NewTextHandler(log, nil))}), p
}

func TestRuntime(t *testing.T) {
	r := &fakeRuntime{hostPods: map[string]bool{containerID(2): true}}
	r.addPod(containerID(1), uid, "web-0", "shop")
	r.addPod(containerID(2), uidStatic, "proxy", "kube-system")
	r.addContainer(idA, containerID(1), "server", nil)
	r.addContainer(idB, containerID(1), "sidecar", nil) // shares the sandbox
	r.addContainer(containerID(3), containerID(2), "proxy", nil)
	r.addContainer(containerID(4), containerID(9), "late", map[string]string{ // its sandbox is gone
		labelPod: "batch", labelNamespace: "jobs", labelUID: "6c6f9a2e-1d5b-4b8e-9c57-000000000000",
	})
	log := new(bytes.Buffer)
	f, p := openRuntime(t, r, log)
	p.add(11, 1, "app", 1, "0::/"+idB+"\n")
	p.add(12, 1, "pause", 1, "0::/"+containerID(1)+"\n")
	p.add(13, 1, "app", 1, "0::/system.slice/cri-containerd-"+containerID(3)+".scope\n")
	p.add(14, 1, "app", 1, "0::/"+containerID(4)+"\n")
	web := Owner{Process: "app", Runtime: "faked", Pod: "web-0", Namespace: "shop", PodUID: uid}
	for pid, change := range map[uint32]func(o *Owner){
		10: func(o *Owner) { o.Container, o.ContainerName = idA, "server" },
		11: func(o *Owner) { o.Container, o.ContainerName = idB, "sidecar" },
		12: func(o *Owner) { o.Container, o.Process = containerID(1), "pause" },
		13: func(o *Owner) {
			*o = Owner{Process: "app", Runtime: "containerd", Container: containerID(3), ContainerName: "proxy", Pod: "proxy", Namespace: "kube-system", PodUID: uidStatic, HostNetwork: true}
		},
		14: func(o *Owner) {
			o.Container, o.ContainerName, o.Pod, o.Namespace, o.PodUID = containerID(4), "late", "batch", "jobs", "6c6f9a2e-1d5b-4b8e-9c57-000000000000"
		},
	} {
		want := web
		change(&want)
		want.PID = pid
		wantOwner(t, f, want, pid)
	}
	if source, err := f.Pods(); source != "cri" || err != nil {
		t.Errorf("Pods() = %q, %v", source, err)
	}
	if log.Len() != 0 {
		t.Errorf("logged: %s", log)
	}
	// A sandbox is asked about once.
	now := newClock()
	now.at = time.Now().Add(time.Hour)
	f.pods.now = now.now
	r.addPod(containerID(7), "", "new", "ns")
	p.add(15, 1, "app", 1, "0::/"+containerID(7)+"\n")
	wantOwner(t, f, Owner{PID: 15, Process: "app", Runtime: "faked", Container: containerID(7), Pod: "new", Namespace: "ns"}, 15)
	if n := r.statuses.Load(); n != 3 {
		t.Errorf("%d sandboxes were asked about, want 3", n)
	}
}

// A runtime is found where it usually listens, one that speaks no CRI passed over.
func TestRuntimeIsFound(t *testing.T) {
	root := socketDir(t)
	p := newFakeProc(t)
	now := newClock()
	f := open(t, Options{ProcFS: p.dir, Root: root})
	f.pods.now = now.now
	if source, err := f.Pods(); source != "" || err == nil { // before anybody asked
		t.Errorf("Pods() = %q, %v", source, err)
	}
	p.add(10, 1, "app", 1, "0::/docker/"+idA+"\n")
	nameless := Owner{PID: 10, Process: "app", Runtime: "docker", Container: idA}
	wantOwner(t, f, nameless, 10)
	if source, err := f.Pods(); source != "" || err == nil || !strings.Contains(err.Error(), "no container runtime") {
		t.Errorf("Pods() = %q, %v", source, err)
	}
	serve(t, filepath.Join(root, "run/containerd/containerd.sock"), nil)
	now.pass(time.Minute)
	wantOwner(t, f, nameless, 10)

	r := new(fakeRuntime)
	r.addPod(containerID(1), uid, "web", "shop")
	r.addContainer(idA, containerID(1), "server", nil)
	serve(t, filepath.Join(root, "run/crio/crio.sock"), r)
	now.pass(time.Minute)
	wantOwner(t, f, Owner{PID: 10, Process: "app", Runtime: "docker", Container: idA, ContainerName: "server", Pod: "web", Namespace: "shop", PodUID: uid}, 10)
	if source, err := f.Pods(); source != "cri" || err != nil {
		t.Errorf("Pods() = %q, %v", source, err)
	}
	wantLost(t, f, "pod_reads", 0)
}

// Before anybody asks a runtime it is known that nobody will be able to.
func TestRuntimeThatCannotBeAsked(t *testing.T) {
	socket := filepath.Join(socketDir(t), "cri.sock")
	f := open(t, Options{ProcFS: newFakeProc(t).dir, CRI: socket})
	if source, err := f.Pods(); source != "cri" || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Pods() = %q, %v", source, err)
	}
	serve(t, socket, new(fakeRuntime))
	if source, err := f.Pods(); source != "cri" || err != nil {
		t.Errorf("Pods() = %q, %v", source, err)
	}
}

// Beside the kubelet's runtime there is one without pods, one with others, one that
// hangs and one that ended without taking its socket away.
func TestSeveralRuntimes(t *testing.T) {
	root := socketDir(t)
	at := func(socket string) string { return filepath.Join(root, socket) }
	p, now := newFakeProc(t), newClock()
	p.add(10, 1, "app", 1, "0::/docker/"+idA+"\n")
	p.add(11, 1, "app", 1, "0::/docker/"+idB+"\n")
	kubelets, others := &fakeRuntime{hostPods: map[string]bool{containerID(1): true}}, new(fakeRuntime)
	kubelets.addPod(containerID(1), uid, "web", "shop")
	kubelets.addContainer(idA, containerID(1), "server", nil)
	others.addPod(containerID(2), uidStatic, "ci", "build")
	others.addContainer(idB, containerID(2), "runner", nil)
	serve(t, at("run/containerd/containerd.sock"), new(fakeRuntime))
	serve(t, at("run/k3s/containerd/containerd.sock"), kubelets)
	serve(t, at("run/k0s/containerd.sock"), others)
	f := open(t, Options{ProcFS: p.dir, Root: root})
	f.pods.now = now.now
	both := func() {
		t.Helper()
		wantOwner(t, f, Owner{PID: 10, Process: "app", Runtime: "docker", Container: idA, ContainerName: "server", Pod: "web", Namespace: "shop", PodUID: uid, HostNetwork: true}, 10)
		wantOwner(t, f, Owner{PID: 11, Process: "app", Runtime: "docker", Container: idB, ContainerName: "runner", Pod: "ci", Namespace: "build", PodUID: uidStatic}, 11)
	}
	both()

	serve(t, at("run/crio/crio.sock"), &fakeRuntime{hang: true})
	gone, err := net.ListenUnix("unix", &net.UnixAddr{Name: at("run/cri-dockerd.sock"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	gone.SetUnlinkOnClose(false)
	gone.Close()
	others.addPod(containerID(3), "", "new", "ns")
	p.add(12, 1, "app", 1, "0::/docker/"+containerID(3)+"\n")
	now.pass(time.Minute)
	wantOwner(t, f, Owner{PID: 12, Process: "app", Runtime: "docker", Container: containerID(3), Pod: "new", Namespace: "ns"}, 12)
	both()
	// A sandbox is asked about once.
	if n := kubelets.statuses.Load() + others.statuses.Load(); n != 3 {
		t.Errorf("%d sandboxes were asked about, want 3", n)
	}
	wantLost(t, f, "pod_reads", 0)
}

func TestRuntimeIsNotThere(t *testing.T) {
	p := newFakeProc(t)
	p.add(10, 1, "app", 1, "0::/docker/"+idA+"\n")
	log := new(bytes.Buffer)
	f := open(t, Options{ProcFS: p.dir, CRI: filepath.Join(socketDir(t), "cri.sock"), Logger: slog.New(slog.NewTextHandler(log, nil))})
	start := time.Now()
	wantOwner(t, f, Owner{PID: 10, Process: "app", Runtime: "docker", Container: idA}, 10)
	if passed := time.Since(start); passed > readTime {
		t.Errorf("took %v", passed)
	}
	wantLost(t, f, "pod_reads", 1)
	if !strings.Contains(log.String(), "no such file") {
		t.Errorf("logged: %s", log)
	}
}

// One that was named, and does not speak CRI, is said to fail.
func TestRuntimeWithoutCRI(t *testing.T) {
	log := new(bytes.Buffer)
	socket := filepath.Join(socketDir(t), "cri.sock")
	serve(t, socket, nil)
	p := newFakeProc(t)
	p.add(10, 1, "app", 1, "0::/docker/"+idA+"\n")
	f := open(t, Options{ProcFS: p.dir, CRI: socket, Logger: slog.New(slog.NewTextHandler(log, nil))})
	wantOwner(t, f, Owner{PID: 10, Process: "app", Runtime: "docker", Container: idA}, 10)
	wantLost(t, f, "pod_reads", 1)
	if !strings.Contains(log.String(), "Unimplemented") {
		t.Errorf("logged: %s", log)
	}
}

// A runtime that hangs costs two seconds, and nothing once the Finder is closed.
func TestRuntimeHangs(t *testing.T) {
	f, _ := openRuntime(t, &fakeRuntime{hang: true}, new(bytes.Buffer))
	want := Owner{PID: 10, Process: "app", Container: idA, PodUID: uid}
	start := time.Now()
	wantOwner(t, f, want, 10)
	if passed := time.Since(start); passed < readTime/2 || passed > 2*readTime {
		t.Errorf("took %v", passed)
	}
	now := newClock()
	now.at = time.Now().Add(time.Hour)
	f.pods.now = now.now
	f.Close()
	start = time.Now()
	wantOwner(t, f, want, 10)
	if passed := time.Since(start); passed > readTime/2 {
		t.Errorf("took %v after Close", passed)
	}
	wantLost(t, f, "pod_reads", 1) // before it
}

// Of does not wait for a runtime that hangs once the Finder is closed.
func TestCloseWhileRuntimeHangs(t *testing.T) {
	r := &fakeRuntime{hang: true}
	f, _ := openRuntime(t, r, new(bytes.Buffer))
	found := make(chan Owner)
	go func() { found <- f.Of([]uint32{10}) }()
	eventually(t, "the runtime is asked", func() bool { return r.versions.Load() > 0 })
	start := time.Now()
	f.Close()
	if got, want := <-found, (Owner{PID: 10, Process: "app", Container: idA, PodUID: uid}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if passed := time.Since(start); passed > readTime/2 {
		t.Errorf("took %v after Close", passed)
	}
	wantLost(t, f, "pod_reads", 0)
}

// Names without end, lists without end, and what is no name.
func TestHostileRuntime(t *testing.T) {
	t.Run("names", func(t *testing.T) {
		r := new(fakeRuntime)
		r.addPod(containerID(1), uid, strings.Repeat("p", 1<<20), "a\nb\x1b[2J")
		r.addPod("no id", "no uid", "x", "y")
		r.addPod(strings.Repeat("f", 65), "", "", "")
		r.sandboxes = append(r.sandboxes, &cri.PodSandbox{Id: containerID(5)}) // without metadata
		r.addContainer(idA, containerID(1), "��\r\n", nil)
		r.containers = append(r.containers, &cri.Container{Id: idB, PodSandboxId: containerID(5)})
		f, p := openRuntime(t, r, new(bytes.Buffer))
		p.add(11, 1, "app", 1, "0::/"+idB+"\n")
		wantOwner(t, f, Owner{
			PID: 10, Process: "app", Runtime: "faked", Container: idA, PodUID: uid,
			ContainerName: "����", Pod: strings.Repeat("p", maxName), Namespace: "a�b�[2J",
		}, 10)
		wantOwner(t, f, Owner{PID: 11, Process: "app", Runtime: "faked", Container: idB}, 11)
	})
	t.Run("too many", func(t *testing.T) {
		r := new(fakeRuntime)
		for n := range 6000 {
			r.addContainer(containerID(100+n), containerID(1), "c", nil)
		}
		f, _ := openRuntime(t, r, new(bytes.Buffer))
		f.Of([]uint32{10})
		if n := len(f.pods.table.containers); n != 4096 {
			t.Errorf("%d containers are known", n)
		}
		wantLost(t, f, "containers_over_cap", 6000-4096)
	})
	t.Run("too large", func(t *testing.T) {
		r := new(fakeRuntime)
		for n := range 9 {
			r.addContainer(containerID(n), containerID(1), strings.Repeat("c", 1<<20), nil)
		}
		log := new(bytes.Buffer)
		f, _ := openRuntime(t, r, log)
		wantOwner(t, f, Owner{PID: 10, Process: "app", Container: idA, PodUID: uid}, 10)
		wantLost(t, f, "pod_reads", 1)
		if !strings.Contains(log.String(), "larger than max") || log.Len() > 1000 {
			t.Errorf("logged: %s", log)
		}
	})
	t.Run("no gRPC", func(t *testing.T) {
		socket := filepath.Join(socketDir(t), "cri.sock")
		listener, err := net.Listen("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		defer listener.Close()
		go func() {
			for {
				conn, err := listener.Accept()
				if err != nil {
					return
				}
				fmt.Fprint(conn, "HTTP/1.1 200 OK\r\n\r\nhello")
				conn.Close()
			}
		}()
		p := newFakeProc(t)
		p.add(10, 1, "app", 1, "0::/"+idA+"\n")
		f := open(t, Options{ProcFS: p.dir, CRI: socket})
		wantOwner(t, f, Owner{PID: 10, Process: "app", Container: idA}, 10)
		wantLost(t, f, "pod_reads", 1)
	})
}
