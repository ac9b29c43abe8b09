package deploy_test

import (
	"bytes"
	"crypto/sha256"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sockq/probes/scenario"
	"sockq/probes/tcpstate"
)

// aTracefs is a tracefs of its own, since the machine need not have one mounted.
func aTracefs(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tracefs", dir, "tracefs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

// maxImage is what the image may have, in bytes.
const maxImage = 25_000_000

// brief are the scenarios whose half-open requests end within the second that lies
// between two counts of the running agent.
var brief = []string{"request_outlives_listener", "SOCK_DESTROY_of_a_listener"}

// images are built into a storage of their own.
type images struct {
	t       *testing.T
	storage []string // buildah's and podman's flags
	tracefs string
}

// buildTools are what images are built with.
var buildTools = []string{"buildah:buildah", "busybox:busybox-static"}

func newImages(t *testing.T) *images {
	t.Helper()
	dir := t.TempDir()
	i := &images{t: t, storage: []string{"--root=" + filepath.Join(dir, "storage"), "--runroot=" + filepath.Join(dir, "run")}}
	t.Cleanup(func() { // layers are mounts
		_ = exec.Command("buildah", append(slices.Clone(i.storage), "rm", "--all")...).Run()
		_ = exec.Command("buildah", append(slices.Clone(i.storage), "rmi", "--all", "--force")...).Run()
		_ = exec.Command("umount", filepath.Join(dir, "storage/overlay")).Run()
	})
	return i
}

// buildBase makes what the Dockerfile builds with, under the name that it has there: no
// registry is asked. Its Go is this machine's, mounted for each build.
func (i *images) buildBase() {
	i.t.Helper()
	dockerfile, err := os.ReadFile("../Dockerfile")
	if err != nil {
		i.t.Fatal(err)
	}
	name := regexp.MustCompile(`(?m)^ARG GO_IMAGE=(\S+)$`).FindSubmatch(dockerfile)
	if name == nil {
		i.t.Fatal("the Dockerfile names no GO_IMAGE")
	}
	if version := strings.TrimPrefix(runtime.Version(), "go"); !strings.Contains(string(name[1]), ":"+version+"-") {
		i.t.Errorf("the Dockerfile builds with %s, the tests with Go %s", name[1], version)
	}
	i.buildBusybox(string(name[1]), "--env=PATH=/usr/local/go/bin:/bin", "--env=GOPATH=/go", "--env=GOCACHE=/cache")
}

// buildBusybox makes an image of busybox alone.
func (i *images) buildBusybox(tag string, config ...string) {
	i.t.Helper()
	container := strings.TrimSpace(i.buildah("from", "scratch"))
	root := strings.TrimSpace(i.buildah("mount", container))
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		i.t.Fatal(err)
	}
	for _, dir := range []string{"bin", "tmp"} {
		if err := os.Mkdir(filepath.Join(root, dir), 0o755); err != nil {
			i.t.Fatal(err)
		}
	}
	tool(i.t, "cp", busybox, filepath.Join(root, "bin/busybox"))
	if err := os.Symlink("busybox", filepath.Join(root, "bin/sh")); err != nil {
		i.t.Fatal(err)
	}
	i.buildah(append(append([]string{"config"}, config...), container)...)
	i.buildah("commit", "--quiet", "--rm", container, tag)
}

// buildCache lets a build know what this machine has compiled before.
func (i *images) buildCache() (flag string) {
	i.t.Helper()
	return "--volume=" + strings.TrimSpace(tool(i.t, "go", "env", "GOCACHE")) + ":/cache"
}

// archive writes an image to a file, for another storage to take in.
func (i *images) archive(tag, name string) (path string) {
	i.t.Helper()
	path = filepath.Join(i.t.TempDir(), "image.tar")
	i.buildah("push", "--quiet", tag, "docker-archive:"+path+":"+name)
	return path
}

func (i *images) buildah(args ...string) string {
	i.t.Helper()
	return tool(i.t, "buildah", append(slices.Clone(i.storage), args...)...)
}

// build builds a copy of the source, somewhere else each time, and returns the binary.
func (i *images) build(tag, arch string, flags ...string) (binary []byte) {
	i.t.Helper()
	source := i.t.TempDir()
	tool(i.t, "cp", "-a", "../agent", "../collectors", "../probes", "../go.mod", "../go.sum", "../LICENSE", "../Dockerfile", "../.dockerignore", source)
	i.buildah(slices.Concat([]string{"build-using-dockerfile", "--quiet", "--isolation=chroot", "--pull-never", "--no-cache", "--timestamp=1700000000",
		"--platform=linux/" + arch, "--build-arg=BUILDPLATFORM=linux/" + runtime.GOARCH,
		"--build-arg=VERSION=v1.2.3", "--build-arg=REVISION=0123456789abcdef", "--build-arg=CREATED=2023-11-14T22:13:20Z",
		"--volume=" + strings.TrimSpace(tool(i.t, "go", "env", "GOROOT")) + ":/usr/local/go",
		"--volume=" + strings.TrimSpace(tool(i.t, "go", "env", "GOMODCACHE")) + ":/go/pkg/mod",
		"--tag=localhost/sockq:" + tag}, flags, []string{source})...)
	container := strings.TrimSpace(i.buildah("from", "--pull-never", "localhost/sockq:"+tag))
	root := strings.TrimSpace(i.buildah("mount", container))
	var files []string
	if err := filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			files = append(files, strings.TrimPrefix(path, root))
		}
		return err
	}); err != nil {
		i.t.Fatal(err)
	}
	if want := []string{"/usr/bin/sockq", "/usr/share/doc/sockq/LICENSE", "/usr/share/doc/sockq/third-party-licenses"}; !slices.Equal(files, want) {
		i.t.Errorf("the image has %q, want %q", files, want)
	}
	if owner := tool(i.t, "stat", "-c", "%u:%g %a", filepath.Join(root, "usr/bin/sockq")); owner != "65534:65534 555\n" {
		i.t.Errorf("the binary is %q", owner)
	}
	if licenses := read(i.t, filepath.Join(root, "usr/share/doc/sockq/third-party-licenses")); !strings.Contains(licenses, "==== github.com/cilium/ebpf ") {
		i.t.Errorf("the licenses of others are %.100q", licenses)
	}
	binary, err := os.ReadFile(filepath.Join(root, "usr/bin/sockq"))
	if err != nil {
		i.t.Fatal(err)
	}
	i.buildah("rm", container)
	return binary
}

// check tells that the image is small, of that architecture and says what it is.
func (i *images) check(t *testing.T, arch string, binary []byte) {
	t.Helper()
	f, err := elf.NewFile(bytes.NewReader(binary))
	if err != nil {
		t.Fatal(err)
	}
	if libraries, err := f.ImportedLibraries(); err != nil || len(libraries) > 0 {
		t.Errorf("the binary needs %v (%v)", libraries, err)
	}
	if want := map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}[arch]; f.Machine != want {
		t.Errorf("the image for %s has a binary for %s", arch, f.Machine)
	}
	var inspected []struct {
		Size         int
		Architecture string
		Config       struct {
			User   string
			Labels map[string]string
		}
	}
	said := tool(t, "podman", append(slices.Clone(i.storage), "image", "inspect", "localhost/sockq:"+arch)...)
	if err := json.Unmarshal([]byte(said), &inspected); err != nil || len(inspected) != 1 {
		t.Fatalf("%v: %s", err, said)
	}
	image := inspected[0]
	t.Logf("%s: %d bytes", arch, image.Size)
	if image.Size > maxImage || image.Architecture != arch || image.Config.User != "0:0" {
		t.Errorf("%s: %+v", arch, image)
	}
	for label, want := range map[string]string{"version": "v1.2.3", "revision": "0123456789abcdef", "created": "2023-11-14T22:13:20Z", "title": "sockq", "source": "https://github.com/sockq/sockq"} {
		if got := image.Config.Labels["org.opencontainers.image."+label]; got != want {
			t.Errorf("%s: label %s is %q, want %q", arch, label, got, want)
		}
	}
}

// contained is a sockq in a container.
type contained struct {
	t    *testing.T
	name string
	url  string
	args []string // podman's
}

// run starts the image as the README says, with these capabilities and no other.
func (i *images) run(t *testing.T, capabilities []string, flags ...string) *contained {
	t.Helper()
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := free.Addr().String()
	free.Close()
	profile, err := filepath.Abs("seccomp.json")
	if err != nil {
		t.Fatal(err)
	}
	c := &contained{t: t, name: "sockq-test-" + address[len("127.0.0.1:"):], url: "http://" + address,
		args: append(slices.Clone(i.storage), "--runtime=runc", "--cgroup-manager=cgroupfs", "--events-backend=none")}
	args := append(slices.Clone(c.args), "run", "--detach", "--name="+c.name, "--log-driver=k8s-file",
		"--network=host", "--read-only", "--read-only-tmpfs=false", "--cap-drop=ALL", "--security-opt=no-new-privileges",
		"--security-opt=seccomp="+profile, "--ulimit=nofile=20000:20000", "--ulimit=nproc=20000:20000")
	if !slices.Contains(flags, "no names") {
		if err := os.MkdirAll("/run/netns", 0o755); err != nil { // Docker makes what it mounts, podman does not
			t.Fatal(err)
		}
		args = append(args, "--volume=/run/netns:/run/netns:ro,rslave")
	}
	for _, c := range capabilities {
		args = append(args, "--cap-add="+c)
	}
	if !slices.Contains(flags, "no PIDs") {
		args = append(args, "--pid=host")
	}
	for _, flag := range flags {
		if socket, ok := strings.CutPrefix(flag, "socket "); ok {
			args = append(args, "--volume="+socket+":/run/containerd/containerd.sock")
		}
	}
	if !slices.Contains(flags, "no tracefs") {
		args = append(args, "--volume="+i.tracefs+":/sys/kernel/tracing:ro")
	}
	args = append(args, "localhost/sockq:"+runtime.GOARCH, "--web.listen-address="+address, "--census.interval=1s", "--max-listeners=100000", "--max-namespaces=5000")
	for _, flag := range flags {
		if strings.HasPrefix(flag, "--") {
			args = append(args, flag)
		}
	}
	tool(t, "podman", args...)
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(c.log())
		}
		_ = exec.Command("podman", append(slices.Clone(c.args), "rm", "--force", "--time=5", c.name)...).Run()
	})
	c.awaitReady()
	return c
}

func (c *contained) awaitReady() {
	c.t.Helper()
	c.await("ready", func() bool {
		response, err := http.Get(c.url + "/-/ready")
		if err != nil {
			return false
		}
		response.Body.Close()
		return response.StatusCode == http.StatusOK
	})
}

func (c *contained) await(what string, done func() bool) {
	c.t.Helper()
	eventually(c.t, patience, what, func() error {
		if !done() {
			return errors.New("not yet")
		}
		return nil
	})
}

func (c *contained) log() string {
	out, err := exec.Command("podman", append(slices.Clone(c.args), "logs", c.name)...).CombinedOutput()
	if err != nil {
		c.t.Logf("podman logs: %v", err)
	}
	return string(out)
}

func (c *contained) get(path string) string {
	c.t.Helper()
	response, err := http.Get(c.url + path)
	if err != nil {
		c.t.Fatal(err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		c.t.Fatal(err)
	}
	return string(text)
}

// shows waits until the metrics have these series.
func (c *contained) shows(series map[string]string) {
	c.t.Helper()
	eventually(c.t, patience, "the metrics", func() error {
		if missing := lacking(c.get("/metrics"), series); missing != nil {
			return fmt.Errorf("they lack %q", missing)
		}
		return nil
	})
}

// status is what /proc says of the container's process.
func (c *contained) status() string {
	c.t.Helper()
	pid := strings.TrimSpace(tool(c.t, "podman", append(slices.Clone(c.args), "inspect", "--format={{.State.Pid}}", c.name)...))
	text, err := os.ReadFile("/proc/" + pid + "/status")
	if err != nil {
		c.t.Fatal(err)
	}
	return string(text)
}

// reason is why a probe is missing.
func (c *contained) reason(probe string) string {
	c.t.Helper()
	var doc struct {
		Probes []struct {
			Name, Reason string
		}
	}
	if err := json.Unmarshal([]byte(c.get("/api/v1/snapshot")), &doc); err != nil {
		c.t.Fatal(err)
	}
	for _, p := range doc.Probes {
		if p.Name == probe {
			return p.Reason
		}
	}
	return "not named"
}

// TestImage builds the image without a registry and runs it by runc: with what the
// README says it is right in every scenario, and what each right that is missing costs
// is what the README says, and named.
func TestImage(t *testing.T) {
	emulator := "qemu-" + map[string]string{"amd64": "aarch64", "arm64": "x86_64"}[runtime.GOARCH] + "-static"
	requested(t, "image", append(buildTools, "podman:podman", "runc:runc", "ip:iproute2", emulator+":qemu-user-static")...)
	i := newImages(t)
	i.tracefs = aTracefs(t)
	t.Cleanup(func() { _ = exec.Command("podman", append(slices.Clone(i.storage), "rm", "--all", "--force")...).Run() })
	i.buildBase()
	known := i.buildCache()
	first := i.build(runtime.GOARCH, runtime.GOARCH, known)
	i.check(t, runtime.GOARCH, first)
	t.Run("two builds", func(t *testing.T) {
		again := i.build("again", runtime.GOARCH) // compiled anew
		if a, b := sha256.Sum256(first), sha256.Sum256(again); a != b {
			t.Errorf("they give two binaries, %x and %x", a, b)
		}
	})
	t.Run("the other architecture", func(t *testing.T) {
		arch := map[string]string{"amd64": "arm64", "arm64": "amd64"}[runtime.GOARCH]
		binary := i.build(arch, arch, known)
		i.check(t, arch, binary)
		path := filepath.Join(t.TempDir(), "sockq")
		if err := os.WriteFile(path, binary, 0o755); err != nil {
			t.Fatal(err)
		}
		if said := tool(t, emulator, path, "--version"); !strings.Contains(said, "sockq, version 1.2.3 ") || !strings.Contains(said, "linux/"+arch) {
			t.Errorf("--version says %s", said)
		}
		tool(t, emulator, path, "--help-man")
	})

	two := []string{"BPF", "PERFMON"}
	four := []string{"BPF", "PERFMON", "SYS_ADMIN", "SYS_PTRACE"}
	without := func(all []string, one string) []string {
		return slices.DeleteFunc(slices.Clone(all), func(c string) bool { return c == one })
	}
	t.Run("scenarios", func(t *testing.T) {
		c := i.run(t, two)
		for _, line := range []string{"CapPrm:\t0000000000000000", "CapEff:\t0000000000000000", "CapBnd:\t000000c000000000", "NoNewPrivs:\t1", "Seccomp:\t2"} {
			if status := c.status(); !strings.Contains(status, line+"\n") {
				t.Errorf("the process does not have %q: %s", line, status)
			}
		}
		c.shows(map[string]string{
			`sockq_probe_attached{mechanism="bpf_walk",probe="sockets"`: "1",
			`sockq_probe_attached{mechanism="iter",probe="owners"`:      "1",
		})
		for _, probe := range []string{"accepts", "backlog", "unroutable_connects", "transitions"} {
			if strings.Contains(c.get("/metrics"), `sockq_probe_attached{mechanism="none",probe="`+probe) {
				t.Errorf("%s is not attached: %s", probe, c.reason(probe))
			}
		}
		scenario.Run(t, func(tb testing.TB, ns *scenario.Namespace, want scenario.Expect) {
			tb.Helper()
			scene := strings.Split(tb.Name(), "/")[2]
			if want.Gone || slices.Contains(brief, scene) {
				return
			}
			series := make(map[string]string)
			for _, state := range tcpstate.All {
				series[fmt.Sprintf("sockq_tcp_sockets{netns=\"%d\",state=%q", ns.Inode(), state)] = fmt.Sprint(want.States[state])
			}
			for end := time.Now().Add(20 * time.Second); ; time.Sleep(200 * time.Millisecond) {
				missing := lacking(c.get("/metrics"), series)
				if missing == nil {
					return
				}
				if time.Now().After(end) {
					tb.Fatalf("the metrics lack %q", missing)
				}
			}
		})
		for line := range strings.Lines(c.log()) {
			if strings.Contains(line, "level=WARN") || strings.Contains(line, "level=ERROR") {
				t.Errorf("it says %s", line)
			}
		}
	})

	series := situation(t)
	nameless := exec.Command("unshare", "--net", "sleep", "infinity") // that only a process leads to
	if err := nameless.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = nameless.Process.Kill()
		_ = nameless.Wait()
	})
	inside := func() (netns string) {
		link, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", nameless.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		return strings.Trim(link, "net:[]")
	}
	outside, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(10 * time.Second); inside() == strings.Trim(outside, "net:[]"); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("unshare makes no network namespace")
		}
	}
	audit := func(check string) map[string]string {
		return map[string]string{`sockq_audit_difference{check="states",netns="` + check + `"`: "0"}
	}
	for name, test := range map[string]struct {
		capabilities []string
		flags        []string
		blind        bool // for other namespaces
		audited      bool // those without a name, too
		unowned      bool
		unnamed      bool
		shows        map[string]string
		reasons      map[string]string // why probes are missing
		log          string
	}{
		"with what is needed": {capabilities: two},
		"without BPF": {capabilities: without(two, "BPF"), blind: true, log: "CAP_BPF missing",
			reasons: map[string]string{"syn_queue": "CAP_BPF missing", "transitions": "CAP_BPF missing"}},
		"without PERFMON": {capabilities: without(two, "PERFMON"), blind: true, log: "CAP_PERFMON missing",
			reasons: map[string]string{"syn_queue": "CAP_PERFMON missing", "transitions": "CAP_PERFMON missing"}},
		"without any": {blind: true, log: "CAP_BPF and CAP_PERFMON missing"},
		"without tracefs": {capabilities: two, flags: []string{"no tracefs"},
			reasons: map[string]string{"accepts": "mount it on /sys/kernel/tracing", "backlog": "mount it on /sys/kernel/tracing"}},
		"to audit": {capabilities: four, flags: []string{"--audit.budget=1"}, audited: true},
		"to audit, without SYS_ADMIN": {capabilities: without(four, "SYS_ADMIN"), flags: []string{"--audit.budget=1"},
			reasons: map[string]string{"audit": "the own namespace only"}},
		"to audit, without SYS_PTRACE": {capabilities: without(four, "SYS_PTRACE"), flags: []string{"--audit.budget=1"},
			reasons: map[string]string{"audit": "namespaces that have no name: to find them by their processes needs CAP_SYS_PTRACE"}},
		"without the node's PIDs": {capabilities: two, flags: []string{"no PIDs"}, unowned: true,
			reasons: map[string]string{"owners": "own PID namespace only"}},
		"without the names of namespaces": {capabilities: two, flags: []string{"no names"}, unnamed: true},
		"with the runtime's socket": {capabilities: two, flags: []string{"socket " + filepath.Join(runtimeSocket(t), "containerd.sock")},
			shows: map[string]string{`sockq_probe_attached{mechanism="cri",probe="pods"`: "1"}},
		"without the runtime's socket": {capabilities: two, reasons: map[string]string{"pods": "no container runtime that speaks CRI was found"}},
	} {
		t.Run(name, func(t *testing.T) {
			c := i.run(t, test.capabilities, test.flags...)
			if !test.blind {
				c.shows(series)
			} else if missing := lacking(c.get("/metrics"), series); len(missing) != len(series) {
				t.Errorf("of %d series only %q are missing", len(series), missing)
			}
			c.shows(test.shows)
			for probe, why := range test.reasons {
				c.await(fmt.Sprintf("%s to be missing because of %q", probe, why), func() bool { return strings.Contains(c.reason(probe), why) })
			}
			if !test.blind {
				process := filepath.Base(os.Args[0])
				c.await(fmt.Sprintf("sockets of %s to have an owner: %t", process, !test.unowned), func() bool {
					return strings.Contains(c.get("/metrics"), fmt.Sprintf("process=%q", process)) != test.unowned
				})
				ns := c.name // made after sockq was started
				tool(t, "ip", "netns", "add", ns)
				defer tool(t, "ip", "netns", "delete", ns)
				if test.unnamed {
					ns = strings.TrimSpace(tool(t, "stat", "-c", "%i", "/run/netns/"+ns))
				}
				c.shows(map[string]string{fmt.Sprintf("sockq_tcp_sockets{netns=%q,state=\"ESTABLISHED\"", ns): "0"})
			}
			if !test.blind {
				c.shows(audit("host"))
			}
			if test.audited {
				c.shows(audit(inside()))
			} else if missing := lacking(c.get("/metrics"), audit(inside())); missing == nil {
				t.Error("a namespace without a name is audited")
			}
			if !strings.Contains(c.log(), test.log) {
				t.Errorf("the log does not say %q", test.log)
			}
		})
	}
}
