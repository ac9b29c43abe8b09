package owner

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	goruntime "runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func randomID(t *testing.T) string {
	t.Helper()
	b := make([]byte, idLength/2)
	if _, err := rand.Read(b); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(b)
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// newCgroup is the path of a cgroup below which a test puts its containers; nothing
// is left of it. It need not be there yet.
func newCgroup(t *testing.T) string {
	t.Helper()
	path := "/sockq-test-" + randomID(t)[:8]
	t.Cleanup(func() {
		for _, mounted := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/*"} {
			tops, err := filepath.Glob(mounted + path)
			if err != nil {
				t.Fatal(err)
			}
			for _, top := range tops {
				run(t, "find", top, "-depth", "-type", "d", "-exec", "rmdir", "{}", ";")
			}
		}
	})
	return path
}

// What accepts in the containers of these tests, made of a busybox alone.
var listens = []string{"/bin/busybox", "nc", "-l", "-p", "8080"}

// startContainer lets runc run listens, as a runtime would that chose this cgroup;
// "" leaves that to runc.
func startContainer(t *testing.T, id, cgroup string) (pid uint32) {
	t.Helper()
	bundle := socketDir(t)
	for name, data := range busybox(t) {
		path := filepath.Join(bundle, "rootfs", name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, data, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	run(t, "runc", "spec", "--bundle", bundle)
	path := filepath.Join(bundle, "config.json")
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var config map[string]any
	if err := json.Unmarshal(data, &config); err != nil {
		t.Fatal(err)
	}
	process := config["process"].(map[string]any)
	process["terminal"], process["args"] = false, listens
	if cgroup != "" {
		config["linux"].(map[string]any)["cgroupsPath"] = cgroup
	}
	if data, err = json.Marshal(config); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	state := filepath.Join(bundle, "state")
	t.Cleanup(func() { run(t, "runc", "--root", state, "delete", "--force", id) })
	pidFile := filepath.Join(bundle, "pid")
	// A detached container keeps what it has for output: no pipe of ours.
	cmd := exec.Command("runc", "--root", state, "--log", filepath.Join(bundle, "log"), "run", "--detach", "--bundle", bundle, "--pid-file", pidFile, id)
	if err := cmd.Run(); err != nil {
		log, _ := os.ReadFile(filepath.Join(bundle, "log"))
		t.Fatalf("%v: %v: %s", cmd, err, log)
	}
	if data, err = os.ReadFile(pidFile); err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscan(string(data), &pid); err != nil {
		t.Fatal(err)
	}
	return pid
}

// busybox is a root file system with bin/busybox and, if it is not a static one, its
// libraries.
func busybox(t *testing.T) map[string][]byte {
	t.Helper()
	path, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatal(err)
	}
	files := make(map[string][]byte)
	from := map[string]string{"bin/busybox": path}
	libraries, _ := exec.Command("ldd", path).Output() // fails for a static one
	for _, library := range regexp.MustCompile(`(/\S+) \(0x`).FindAllStringSubmatch(string(libraries), -1) {
		from[strings.TrimPrefix(library[1], "/")] = library[1]
	}
	for name, path := range from {
		if files[name], err = os.ReadFile(path); err != nil {
			t.Fatal(err)
		}
	}
	return files
}

// Containers as runc makes them, in the cgroups that runtimes tell it.
func TestContainersOfRunc(t *testing.T) {
	needTool(t, "runc", "busybox", "nsenter", "ss")
	for _, test := range []struct {
		name, cgroup string // with ID for the id
		want         Owner
	}{
		{"its own choice", "", Owner{}},
		{"docker", "/docker/ID", Owner{Runtime: "docker"}},
		{"a pod", "/kubepods/burstable/pod" + uid + "/ID", Owner{PodUID: uid}},
		{"containerd told a systemd path", "/kubepods-besteffort-pod" + uidSlice + ".slice:cri-containerd:ID", Owner{Runtime: "containerd", PodUID: uid}},
		{"CRI-O", "/kubepods.slice/kubepods-pod" + uidSlice + ".slice/crio-ID.scope", Owner{Runtime: "cri-o", PodUID: uid}},
		{"podman in a service", "/system.slice/caddy.service/libpod-payload-ID", Owner{Runtime: "podman", Unit: "caddy.service"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			id, cgroup := randomID(t), test.cgroup
			if strings.HasPrefix(cgroup, "/") {
				cgroup = newCgroup(t) + cgroup
			}
			pid := startContainer(t, id, strings.ReplaceAll(cgroup, "ID", id))
			f := open(t, Options{CRI: CRIOff})
			test.want.PID, test.want.Process, test.want.Container = pid, "busybox", id
			wantOwner(t, f, test.want, scan(t, f, listenerOn(t, pid, 8080))...)

			if top, _, ok := strings.Cut(strings.TrimPrefix(cgroup, "/"), "/"); ok {
				got := parseCgroup(cgroupSeenFrom(t, "/"+top+"/elsewhere", pid))
				if !slices.Equal(got.containers, ids(id)) || got.runtime != test.want.Runtime || got.podUID != test.want.PodUID || got.unit != test.want.Unit {
					t.Errorf("seen from another cgroup namespace: %+v", got)
				}
			}
		})
	}
}

// cgroupSeenFrom is the file of a process as one reads it whose cgroup namespace
// begins at that path, in a container.
func cgroupSeenFrom(t *testing.T, path string, pid uint32) string {
	t.Helper()
	join := ""
	for _, mounted := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/*"} {
		tops, err := filepath.Glob(mounted + filepath.Dir(path))
		if err != nil {
			t.Fatal(err)
		}
		for _, top := range tops {
			if err := os.Mkdir(filepath.Join(top, filepath.Base(path)), 0o755); err != nil {
				t.Fatal(err)
			}
			// An empty cpuset takes no process.
			join += fmt.Sprintf("echo $$ 2>/dev/null >%s/%s/cgroup.procs || true\n", top, filepath.Base(path))
		}
	}
	data := run(t, "sh", "-c", join+fmt.Sprintf("exec unshare --cgroup cat /proc/%d/cgroup", pid))
	if !strings.Contains(data, ":/../") {
		t.Fatalf("no path is a relative one: %s", data)
	}
	return data
}

// imageName is that of the one image, for containers and sandboxes.
const imageName = "sockq.test/busybox:1"

// writeImage makes an archive of an image that is busybox.
func writeImage(t *testing.T, path string) {
	t.Helper()
	archive := func(files map[string][]byte) []byte {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for name, data := range files {
			if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: int64(len(data))}); err != nil {
				t.Fatal(err)
			}
			if _, err := w.Write(data); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	layer := archive(busybox(t))
	config := fmt.Sprintf(`{"architecture":%q,"os":"linux","config":{"Entrypoint":["/bin/busybox","sleep","1000000"]},"rootfs":{"type":"layers","diff_ids":["sha256:%x"]}}`,
		goruntime.GOARCH, sha256.Sum256(layer))
	manifest := fmt.Sprintf(`[{"Config":"config.json","RepoTags":[%q],"Layers":["layer.tar"]}]`, imageName)
	image := archive(map[string][]byte{"manifest.json": []byte(manifest), "config.json": []byte(config), "layer.tar": layer})
	if err := os.WriteFile(path, image, 0o600); err != nil {
		t.Fatal(err)
	}
}

// containerd is a real one with directories of its own.
type containerd struct {
	t              *testing.T
	socket, cgroup string
	client         cri.RuntimeServiceClient
}

const containerdConfig = `version = 2
root = "DIR/root"
state = "DIR/state"
[grpc]
  address = "DIR/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "IMAGE"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "native"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "DIR/cni"
    conf_dir = "DIR/cni"
`

// A network for pods that is none: no test needs their addresses to work.
const (
	noNetwork = `{"cniVersion":"0.4.0","name":"none","plugins":[{"type":"none"}]}`
	noPlugin  = `#!/bin/sh
[ "$CNI_COMMAND" = ADD ] || exit 0
echo '{"cniVersion":"0.4.0","interfaces":[{"name":"eth0","sandbox":"'"$CNI_NETNS"'"}],"ips":[{"version":"4","address":"192.0.2.1/32","interface":0}]}'
`
)

func startContainerd(t *testing.T) *containerd {
	t.Helper()
	dir := socketDir(t)
	c := &containerd{t: t, socket: filepath.Join(dir, "containerd.sock"), cgroup: newCgroup(t)}
	if err := os.Mkdir(filepath.Join(dir, "cni"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"config.toml": strings.NewReplacer("DIR", dir, "IMAGE", imageName).Replace(containerdConfig),
		"cni/none":    noPlugin, "cni/loopback": noPlugin, "cni/10-none.conflist": noNetwork,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("containerd", "--config", filepath.Join(dir, "config.toml"))
	log := new(bytes.Buffer)
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("containerd said %s", log)
		}
	})
	conn, err := grpc.NewClient("unix://"+c.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	c.client = cri.NewRuntimeServiceClient(conn)
	eventually(t, "containerd answers", func() bool {
		_, err := c.client.Version(c.context(), &cri.VersionRequest{})
		return err == nil
	})
	image := filepath.Join(dir, "image.tar")
	writeImage(t, image)
	run(t, "ctr", "--address", c.socket, "--namespace", "k8s.io", "images", "import", image)
	images := cri.NewImageServiceClient(conn)
	eventually(t, "containerd has the image", func() bool {
		status, err := images.ImageStatus(c.context(), &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: imageName}})
		return err == nil && status.Image != nil
	})
	return c
}

func (c *containerd) context() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	c.t.Cleanup(cancel)
	return ctx
}

// pod runs one, in a cgroup as the kubelet names it.
func (c *containerd) pod(podName, uid string, network cri.NamespaceMode) (*cri.PodSandboxConfig, string) {
	c.t.Helper()
	config := &cri.PodSandboxConfig{
		Metadata: &cri.PodSandboxMetadata{Name: podName, Uid: uid, Namespace: "shop"},
		Linux: &cri.LinuxPodSandboxConfig{
			CgroupParent:    c.cgroup + "/kubepods/besteffort/pod" + uid,
			SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: &cri.NamespaceOption{Network: network}},
		},
	}
	sandbox, err := c.client.RunPodSandbox(c.context(), &cri.RunPodSandboxRequest{Config: config})
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() {
		if _, err := c.client.StopPodSandbox(c.context(), &cri.StopPodSandboxRequest{PodSandboxId: sandbox.PodSandboxId}); err != nil {
			c.t.Error(err)
		}
		if _, err := c.client.RemovePodSandbox(c.context(), &cri.RemovePodSandboxRequest{PodSandboxId: sandbox.PodSandboxId}); err != nil {
			c.t.Error(err)
		}
	})
	return config, sandbox.PodSandboxId
}

// container runs one in the pod that listens on the port.
func (c *containerd) container(config *cri.PodSandboxConfig, sandbox, containerName string, port uint16) (id string, pid uint32) {
	c.t.Helper()
	created, err := c.client.CreateContainer(c.context(), &cri.CreateContainerRequest{
		PodSandboxId: sandbox, SandboxConfig: config,
		Config: &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: containerName},
			Image:    &cri.ImageSpec{Image: imageName},
			Command:  append(slices.Clone(listens[:len(listens)-1]), fmt.Sprint(port)),
			Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{
				NamespaceOptions: config.Linux.SecurityContext.NamespaceOptions,
			}},
		},
	})
	if err != nil {
		c.t.Fatal(err)
	}
	if _, err := c.client.StartContainer(c.context(), &cri.StartContainerRequest{ContainerId: created.ContainerId}); err != nil {
		c.t.Fatal(err)
	}
	status, err := c.client.ContainerStatus(c.context(), &cri.ContainerStatusRequest{ContainerId: created.ContainerId, Verbose: true})
	if err != nil {
		c.t.Fatal(err)
	}
	var info struct{ Pid uint32 }
	if err := json.Unmarshal([]byte(status.Info["info"]), &info); err != nil {
		c.t.Fatal(err)
	}
	return created.ContainerId, info.Pid
}

// freePort is one on which nobody listens in this namespace.
func freePort(t *testing.T) uint16 {
	t.Helper()
	l, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return uint16(l.Addr().(*net.TCPAddr).Port)
}

// Pods of a real containerd: two containers share a sandbox, one pod is on this
// namespace's network, where something else listens, too.
func TestPodsOfContainerd(t *testing.T) {
	needTool(t, "containerd", "ctr", "runc", "busybox", "nsenter", "ss")
	c := startContainerd(t)
	const hostUID = "1f0e1d2c-3b4a-4968-8778-695a4b3c2d1e"
	web, webSandbox := c.pod("web-0", uid, cri.NamespaceMode_POD)
	edge, edgeSandbox := c.pod("edge", hostUID, cri.NamespaceMode_NODE)
	serverID, server := c.container(web, webSandbox, "server", 8080)
	sidecarID, sidecar := c.container(web, webSandbox, "sidecar", 8081)
	port := freePort(t)
	proxyID, proxy := c.container(edge, edgeSandbox, "proxy", port)
	neighbour := freePort(t)
	plain := begin(t, exec.Command(listens[0], append(slices.Clone(listens[1:len(listens)-1]), fmt.Sprint(neighbour))...), false)

	f := open(t, Options{CRI: c.socket})
	want := Owner{Process: "busybox", Runtime: "containerd", Namespace: "shop"}
	for _, test := range []struct {
		pid                          uint32
		port                         uint16
		container, name, pod, podUID string
		host                         bool
	}{
		{server, 8080, serverID, "server", "web-0", uid, false},
		{sidecar, 8081, sidecarID, "sidecar", "web-0", uid, false},
		{proxy, port, proxyID, "proxy", "edge", hostUID, true},
	} {
		want := want
		want.PID, want.Container, want.ContainerName, want.Pod, want.PodUID, want.HostNetwork = test.pid, test.container, test.name, test.pod, test.podUID, test.host
		wantOwner(t, f, want, scan(t, f, listenerOn(t, test.pid, test.port))...)
	}
	wantAccepts(t, f, listenerOn(t, plain.pid, neighbour), plain.pid, "busybox", 0)
	if got := f.Of([]uint32{plain.pid}); got.Pod != "" || got.HostNetwork {
		t.Errorf("the neighbour is %+v", got)
	}
	if source, err := f.Pods(); source != "cri" || err != nil {
		t.Errorf("Pods() = %q, %v", source, err)
	}
}
