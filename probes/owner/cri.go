package owner

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// maxMessage bounds an answer of the container runtime, in bytes: 4,096 containers
// of 2 kB each.
const maxMessage = 8 << 20

// usualSockets are where container runtimes listen, under the root.
var usualSockets = []string{
	"run/containerd/containerd.sock",
	"run/crio/crio.sock",
	"run/k3s/containerd/containerd.sock",
	"run/k0s/containerd.sock",
	"run/cri-dockerd.sock",
	"var/snap/microk8s/common/run/containerd.sock",
}

// What the kubelet writes at each container.
const (
	labelPod       = "io.kubernetes.pod.name"
	labelNamespace = "io.kubernetes.pod.namespace"
	labelUID       = "io.kubernetes.pod.uid"
)

// criSource asks the container runtime, runtime.v1 over a unix socket.
type criSource struct {
	socket string // "" looks for one under root
	root   string
	// hostNetwork is known of these sandboxes: each is asked about once.
	hostNetwork map[string]bool
}

func (*criSource) name() string { return "cri" }

// sockets are those that may be asked.
func (c *criSource) sockets() (paths []string) {
	if c.socket != "" {
		return []string{c.socket}
	}
	for _, usual := range usualSockets {
		path := filepath.Join(c.root, usual)
		if info, err := os.Stat(path); err == nil && info.Mode().Type() == os.ModeSocket {
			paths = append(paths, path)
		}
	}
	return paths
}

func (c *criSource) try() (n int, denied error) {
	for _, path := range c.sockets() {
		err := unix.Faccessat(unix.AT_FDCWD, path, unix.W_OK, unix.AT_EACCESS)
		switch {
		case err == nil:
			n++
		case denied == nil:
			denied = fmt.Errorf("ask %s: connect: %w", path, err)
		}
	}
	return n, denied
}

// read asks at each socket: beside the kubelet's runtime there may be one without
// pods, or Docker's containerd, which does not speak CRI. It fails where none answers.
func (c *criSource) read(ctx context.Context, t *podTable) error {
	before := c.hostNetwork
	c.hostNetwork = make(map[string]bool)
	answered, failed := false, errNoSource
	sockets := c.sockets()
	for i, socket := range sockets {
		err := c.askInTurn(ctx, socket, len(sockets)-i, before, t)
		switch {
		case err == nil:
			answered = true
		case c.socket == "" && status.Code(err) == codes.Unimplemented:
		case errors.Is(failed, errNoSource):
			failed = fmt.Errorf("ask %s: %w", socket, err)
		}
	}
	if answered {
		return nil
	}
	c.hostNetwork = before
	return failed
}

// askInTurn leaves time for those that are asked after this one.
func (c *criSource) askInTurn(ctx context.Context, socket string, left int, before map[string]bool, t *podTable) error {
	if deadline, ok := ctx.Deadline(); ok && left > 1 {
		share, cancel := context.WithTimeout(ctx, time.Until(deadline)/time.Duration(left))
		defer cancel()
		ctx = share
	}
	return c.ask(ctx, socket, before, t)
}

// ask connects anew each time: it happens rarely, and the runtime may have been
// restarted.
func (c *criSource) ask(ctx context.Context, socket string, before map[string]bool, t *podTable) error {
	conn, err := grpc.NewClient("passthrough:///cri",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
		grpc.WithAuthority("localhost"), grpc.WithDisableServiceConfig(), grpc.WithNoProxy())
	if err != nil {
		return err
	}
	defer conn.Close()
	return c.list(ctx, cri.NewRuntimeServiceClient(conn), before, t)
}

func (c *criSource) list(ctx context.Context, client cri.RuntimeServiceClient, before map[string]bool, t *podTable) error {
	version, err := client.Version(ctx, &cri.VersionRequest{})
	if err != nil {
		return err
	}
	runtime := printable(version.RuntimeName)
	sandboxes, err := client.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{
		Filter: &cri.PodSandboxFilter{State: &cri.PodSandboxStateValue{State: cri.PodSandboxState_SANDBOX_READY}},
	})
	if err != nil {
		return err
	}
	containers, err := client.ListContainers(ctx, &cri.ListContainersRequest{
		Filter: &cri.ContainerFilter{State: &cri.ContainerStateValue{State: cri.ContainerState_CONTAINER_RUNNING}},
	})
	if err != nil {
		return err
	}
	for _, s := range sandboxes.Items {
		shares, known := before[s.Id]
		if !known && len(t.containers) < t.most {
			shares, known = sharesNetwork(ctx, client, s.Id)
		}
		if known && len(c.hostNetwork) < t.most {
			c.hostNetwork[s.Id] = shares
		}
		m := s.GetMetadata()
		t.add(s.Id, container{runtime: runtime, pod: pod{
			uid: printable(m.GetUid()), name: printable(m.GetName()), namespace: printable(m.GetNamespace()), hostNetwork: shares,
		}})
	}
	for _, c := range containers.Containers {
		// A sandbox may be gone before its containers are.
		p := pod{uid: printable(c.Labels[labelUID]), name: printable(c.Labels[labelPod]), namespace: printable(c.Labels[labelNamespace])}
		if sandbox, ok := t.containers[c.PodSandboxId]; ok {
			p = sandbox.pod
		}
		t.add(c.Id, container{name: printable(c.GetMetadata().GetName()), runtime: runtime, pod: p})
	}
	return nil
}

// sharesNetwork tells whether a pod has the node's network namespace. Where that is
// not said in time, it stays unknown until the next read.
func sharesNetwork(ctx context.Context, client cri.RuntimeServiceClient, sandbox string) (shares, known bool) {
	answer, err := client.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: sandbox})
	if err != nil {
		return false, false
	}
	options := answer.GetStatus().GetLinux().GetNamespaces().GetOptions()
	return options.GetNetwork() == cri.NamespaceMode_NODE, options != nil
}
