// Package owner tells who a socket belongs to: the process that would accept,
// its systemd unit, its container, its pod.
//
// Who has a socket open comes from elsewhere (a BPF iterator over all files) or,
// without BPF, from Scan. What a process is called and which cgroup it is in can
// be read by everybody; pods are named by the container runtime (CRI) or the
// kubelet, if there is one that may be asked.
//
// Everything that is read here was written by others: it is bounded, and text is
// made valid UTF-8.
package owner

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Options say where to look, and how much of it.
type Options struct {
	Logger *slog.Logger // nil for none
	ProcFS string       // default /proc
	// Root is where the node's root file system is, for the usual CRI sockets;
	// default /.
	Root string
	// CRI is the unix socket of the container runtime, with or without unix://
	// before it; "" looks for the usual ones under Root, unless Kubelet is given;
	// "off" asks none.
	CRI string
	// Kubelet is the URL of the kubelet's list of pods, such as
	// https://127.0.0.1:10250/pods; "" asks none. It excludes CRI.
	Kubelet string
	// KubeletToken is a file with a bearer token, read anew for each request;
	// KubeletCA one with the certificates that may sign the kubelet's, "" for the
	// system's. Both need https. KubeletInsecure accepts any certificate.
	KubeletToken, KubeletCA string
	KubeletInsecure         bool

	// MaxProcesses bounds the processes that a Scan looks at, and those that are
	// remembered; default 16,384. MaxContainers bounds the containers, and the
	// pods, that are remembered; default 4,096.
	MaxProcesses, MaxContainers int
	// ScanTime bounds a Scan; the next one goes on where it stopped. Default 1 s.
	ScanTime time.Duration
}

var errOff = errors.New("turned off")

// CRIOff as Options.CRI asks no container runtime.
const CRIOff = "off"

func (o *Options) setDefaults() {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	o.ProcFS = cmp.Or(o.ProcFS, "/proc")
	o.Root = cmp.Or(o.Root, "/")
	o.MaxProcesses = cmp.Or(o.MaxProcesses, 16384)
	o.MaxContainers = cmp.Or(o.MaxContainers, 4096)
	o.ScanTime = cmp.Or(o.ScanTime, time.Second)
}

// Owner is who a socket belongs to. What is not known, or does not apply, is empty.
type Owner struct {
	// PID is the process that would accept, 0 if none of those asked for lives.
	PID uint32
	// Process is what the kernel calls it (comm): at most 15 bytes, often of the
	// program's name, but each process may choose its own. Made valid UTF-8, which
	// may make it longer; otherwise as it is, line ends included.
	Process string
	// Others have the socket open, too: further workers, but no ancestors.
	Others int
	// Unit is the innermost systemd unit of the cgroup path that is not a
	// container's: nginx.service, session-3.scope.
	Unit string
	// Runtime is what runs the container: docker, containerd, cri-o, podman, runc,
	// crun, or as the runtime or the kubelet calls it.
	Runtime string
	// Container is the id of the container, 64 hexadecimal digits.
	Container string
	// ContainerName, Pod, Namespace are Kubernetes' names.
	ContainerName, Pod, Namespace string
	PodUID                        string
	// HostNetwork tells that the pod shares the node's network namespace; false
	// also where nobody said so.
	HostNetwork bool
}

// Finder finds owners. It is safe for concurrent use; an Of waits for another, and a
// Scan for another.
type Finder struct {
	opts Options
	log  *slog.Logger

	mu        sync.Mutex // of Of
	processes *processes
	pods      *pods

	scan     sync.Mutex          // of Scan
	scanFrom uint32              // where the last one stopped, 0 at the end
	refused  map[uint32]struct{} // processes that could not be read
	warned   bool
	warning  atomic.Pointer[string]

	stop context.CancelFunc
	lost lost
}

// lost counts what was turned away.
type lost struct {
	holders, containers, podReads, scans, unreadable atomic.Uint64
}

// Open makes a Finder. It reads nothing yet, and fails only where an option is
// wrong.
func Open(opts Options) (*Finder, error) {
	opts.setDefaults()
	f := &Finder{opts: opts, log: opts.Logger, refused: make(map[uint32]struct{})}
	source, err := openSource(&opts)
	if err != nil {
		return nil, fmt.Errorf("open owners: %w", err)
	}
	ctx, stop := context.WithCancel(context.Background())
	f.stop = stop
	f.processes = newProcesses(opts.ProcFS, opts.MaxProcesses)
	f.pods = newPods(ctx, source, opts.MaxContainers, f.log, &f.lost)
	if c, ok := source.(*criSource); ok && len(c.sockets()) == 0 {
		none := errNoSource
		f.pods.failed.Store(&none)
	}
	return f, nil
}

// Check tells what is wrong with the options, without asking anybody.
func (o *Options) Check() error {
	_, err := openSource(o)
	return err
}

// openSource is who may be asked for pods, nil for nobody.
func openSource(opts *Options) (podSource, error) {
	switch {
	case opts.Kubelet != "" && opts.CRI != "" && opts.CRI != CRIOff:
		return nil, errors.New("the container runtime and the kubelet tell the same: give one of the two")
	case opts.Kubelet != "":
		return newKubeletSource(opts)
	case opts.KubeletToken != "" || opts.KubeletCA != "" || opts.KubeletInsecure:
		return nil, errors.New("a token and certificates need the kubelet's URL")
	case opts.CRI == CRIOff:
		return nil, nil
	}
	socket := strings.TrimPrefix(opts.CRI, "unix://")
	if socket != "" && !filepath.IsAbs(socket) {
		return nil, fmt.Errorf("container runtime %q: give the path of a unix socket, such as /run/containerd/containerd.sock", opts.CRI)
	}
	return &criSource{socket: socket, root: opts.Root}, nil
}

// Close ends what is under way. What is asked later knows no further pods.
func (f *Finder) Close() error {
	f.stop()
	return nil
}

// Of tells who a socket belongs to that these processes, by their PIDs in
// ProcFS, have open: the process that would accept, and how many others could.
//
// Processes that started others that have the socket open are left out: the
// master of nginx, systemd for a service that it activates. Of the rest it is the
// one with the lowest PID. More than 1,024 processes are counted, but only the
// lowest PIDs looked at.
//
// It reads /proc/PID/stat of each, and may wait 2 s for the container runtime or
// the kubelet where it meets a container that it does not know.
func (f *Finder) Of(pids []uint32) Owner {
	f.mu.Lock()
	defer f.mu.Unlock()
	over := 0
	pids = slices.Compact(slices.Sorted(slices.Values(pids)))
	if len(pids) > maxHolders {
		over = len(pids) - maxHolders
		f.lost.holders.Add(uint64(over))
		pids = pids[:maxHolders]
	}
	pid, others := f.processes.acceptor(pids)
	if pid == 0 {
		return Owner{}
	}
	facts := f.processes.facts(pid)
	if facts == nil {
		return Owner{} // it just ended; the next look finds another
	}
	o := Owner{PID: pid, Process: facts.comm, Others: others + over, Unit: facts.unit, Runtime: facts.runtime, PodUID: facts.podUID}
	if n := len(facts.containers); n > 0 {
		o.Container = facts.containers[n-1]
		c := f.pods.find(facts.containers[:n-facts.ofUser], facts.podUID)
		o.ContainerName, o.Pod, o.Namespace, o.HostNetwork = c.name, c.pod.name, c.pod.namespace, c.pod.hostNetwork
		o.Runtime = cmp.Or(o.Runtime, c.runtime)
		o.PodUID = cmp.Or(o.PodUID, c.pod.uid)
	}
	return o
}

// Pods says who is asked for the names of pods: "kubelet", "cri", or "" for nobody.
// The error is why the last attempt failed, why the first would, or why nobody is
// asked.
func (f *Finder) Pods() (source string, err error) {
	err = f.pods.err()
	switch {
	case f.pods.source == nil:
		return "", errOff
	case errors.Is(err, errNoSource):
		return "", err
	}
	return f.pods.source.name(), err
}

// TryPods counts the files from which the names of pods are read, each time anew, and
// that the calling thread may open: sockets of container runtimes, the kubelet's token.
func (f *Finder) TryPods() int {
	if f.pods.source == nil {
		return 0
	}
	n, _ := f.pods.source.try()
	return n
}

// Unreadable counts processes whose open files a Scan was not allowed to read,
// each once.
func (f *Finder) Unreadable() uint64 { return f.lost.unreadable.Load() }

// Warning says what Scan cannot see and which right would show it, "" if it sees
// everything.
func (f *Finder) Warning() string {
	if w := f.warning.Load(); w != nil {
		return *w
	}
	return ""
}

// Lost counts since the start what was turned away, by what it was:
// holders_over_cap (processes that had a socket open and were not looked at),
// containers_over_cap (not remembered, once per read), pod_reads (of the runtime
// or the kubelet, that failed), owner_scans (that ended before they had seen all
// processes), processes_unreadable (as Unreadable).
func (f *Finder) Lost() map[string]uint64 {
	return map[string]uint64{
		"holders_over_cap":     f.lost.holders.Load(),
		"containers_over_cap":  f.lost.containers.Load(),
		"pod_reads":            f.lost.podReads.Load(),
		"owner_scans":          f.lost.scans.Load(),
		"processes_unreadable": f.lost.unreadable.Load(),
	}
}
