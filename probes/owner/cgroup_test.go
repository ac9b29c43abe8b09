package owner

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const (
	idA = "0f9a1c3b5d7e8f60718293a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c6d7e8"
	idB = "b2d3f4a5968778695a4b3c2d1e0f0e1d2c3b4a5968778695a4b3c2d1e0f0e1d2"
	uid = "6c6f9a2e-1d5b-4b8e-9c57-0d4cbbf0f3a1"
	// As systemd spells it, since - is its separator.
	uidSlice  = "6c6f9a2e_1d5b_4b8e_9c57_0d4cbbf0f3a1"
	uidStatic = "8cd6b44b0b1e4d5b8f1f0c5c0a8a3d2e" // of a static pod: a hash
)

func ids(ids ...string) []string { return ids }

// Paths as the runtimes make them, A and B for ids.
func TestCgroupPaths(t *testing.T) {
	for _, test := range []struct {
		name, path string
		want       place
	}{
		{"root", "/", place{}},
		{"kernel's or a container's own root", "", place{}},
		{"systemd service", "/system.slice/nginx.service", place{unit: "nginx.service"}},
		{"instance", "/system.slice/system-postgresql.slice/postgresql@15-main.service", place{unit: "postgresql@15-main.service"}},
		{"escaped name", `/system.slice/system-serial\x2dgetty.slice/serial-getty@ttyS0.service`, place{unit: "serial-getty@ttyS0.service"}},
		{"name that the kernel would take for a file", "/system.slice/_cpu.service", place{unit: "cpu.service"}},
		{"delegated service", "/system.slice/app.service/workers/3", place{unit: "app.service"}},
		{"session", "/user.slice/user-1000.slice/session-3.scope", place{unit: "session-3.scope"}},
		{"user's service", "/user.slice/user-1000.slice/user@1000.service/app.slice/syncthing.service", place{unit: "syncthing.service"}},
		{"PID 1", "/init.scope", place{unit: "init.scope"}},
		{"service of a slice of its own", "/web.slice/web-front.slice/caddy.service", place{unit: "caddy.service"}},
		{"removed", "/system.slice/old.service (deleted)", place{unit: "old.service"}},
		{"socket unit", "/system.slice/cups.socket", place{unit: "cups.socket"}},
		{"slice only", "/user.slice", place{}},
		{"nothing but a suffix", "/.service", place{}},

		{"docker, cgroupfs", "/docker/A", place{runtime: "docker", containers: ids(idA)}},
		{"docker, systemd", "/system.slice/docker-A.scope", place{runtime: "docker", containers: ids(idA)}},
		{"docker in a slice", "/ci.slice/docker-A.scope", place{runtime: "docker", containers: ids(idA)}},
		{"docker, systemd in the container", "/docker/A/system.slice/nginx.service", place{unit: "nginx.service", runtime: "docker", containers: ids(idA)}},
		{"docker, rootless", "/user.slice/user-1000.slice/user@1000.service/user.slice/docker-A.scope", place{unit: "user@1000.service", runtime: "docker", containers: ids(idA), ofUser: 1}},
		{"docker in docker", "/docker/A/docker/B", place{runtime: "docker", containers: ids(idA, idB)}},

		{"containerd, systemd", "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podU_.slice/cri-containerd-A.scope", place{runtime: "containerd", containers: ids(idA), podUID: uid}},
		{"containerd, guaranteed", "/kubepods.slice/kubepods-podU_.slice/cri-containerd-A.scope", place{runtime: "containerd", containers: ids(idA), podUID: uid}},
		{"containerd, static pod", "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podS.slice/cri-containerd-A.scope", place{runtime: "containerd", containers: ids(idA), podUID: uidStatic}},
		{"kubepods, cgroupfs", "/kubepods/besteffort/podU/A", place{containers: ids(idA), podUID: uid}},
		{"kubepods, guaranteed", "/kubepods/podU/A", place{containers: ids(idA), podUID: uid}},
		{"kubepods, static pod", "/kubepods/burstable/podS/A", place{containers: ids(idA), podUID: uidStatic}},
		{"kubepods without QoS", "/k8s.io/A", place{runtime: "containerd", containers: ids(idA)}},
		{"containerd told a systemd path", "/system.slice/containerd.service/kubepods-besteffort-podU_.slice:cri-containerd:A", place{unit: "containerd.service", runtime: "containerd", containers: ids(idA), podUID: uid}},
		{"the same at the root", "/kubepods-burstable-podU_.slice:cri-containerd:A", place{runtime: "containerd", containers: ids(idA), podUID: uid}},
		{"nerdctl, cgroupfs", "/default/A", place{runtime: "containerd", containers: ids(idA)}},
		{"nerdctl, systemd", "/system.slice/nerdctl-A.scope", place{runtime: "containerd", containers: ids(idA)}},
		{"docker under kubelet", "/kubepods/burstable/podU/A", place{containers: ids(idA), podUID: uid}},
		{"kind", "/system.slice/docker-A.scope/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-podU_.slice/cri-containerd-B.scope", place{runtime: "containerd", containers: ids(idA, idB), podUID: uid}},
		{"kind, cgroupfs", "/docker/A/kubelet/kubepods/besteffort/podU/B", place{containers: ids(idA, idB), podUID: uid}},
		{"docker in a pod", "/kubepods/burstable/podU/A/docker/B", place{runtime: "docker", containers: ids(idA, idB), podUID: uid}},

		{"CRI-O, systemd", "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podU_.slice/crio-A.scope", place{runtime: "cri-o", containers: ids(idA), podUID: uid}},
		{"CRI-O, child group of crun", "/kubepods.slice/kubepods-podU_.slice/crio-A.scope/container", place{runtime: "cri-o", containers: ids(idA), podUID: uid}},
		{"CRI-O, cgroupfs", "/kubepods/besteffort/podU/crio-A", place{runtime: "cri-o", containers: ids(idA), podUID: uid}},
		{"CRI-O's monitor", "/kubepods.slice/kubepods-podU_.slice/crio-conmon-A.scope", place{unit: "crio-conmon-A.scope", podUID: uid}},
		{"CRI-O's monitor, cgroupfs", "/kubepods/besteffort/podU/crio-conmon-A", place{podUID: uid}},

		{"podman, systemd", "/machine.slice/libpod-A.scope", place{runtime: "podman", containers: ids(idA)}},
		{"podman, child group", "/machine.slice/libpod-A.scope/container", place{runtime: "podman", containers: ids(idA)}},
		{"podman, cgroupfs", "/libpod_parent/libpod-A", place{runtime: "podman", containers: ids(idA)}},
		{"podman, pod", "/machine.slice/machine-libpod_pod_B.slice/libpod-A.scope", place{runtime: "podman", containers: ids(idA)}},
		{"podman, pod, cgroupfs", "/libpod_parent/B/libpod-A", place{runtime: "podman", containers: ids(idB, idA)}},
		{"podman, rootless", "/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-A.scope/container", place{unit: "user@1000.service", runtime: "podman", containers: ids(idA), ofUser: 1}},
		{"podman, quadlet", "/system.slice/caddy.service/libpod-payload-A", place{unit: "caddy.service", runtime: "podman", containers: ids(idA)}},
		{"podman's monitor", "/machine.slice/libpod-conmon-A.scope", place{unit: "libpod-conmon-A.scope"}},

		{"runc", "/A", place{containers: ids(idA)}},
		{"runc, systemd", "/system.slice/runc-A.scope", place{runtime: "runc", containers: ids(idA)}},
		{"runc below the cgroup of who started it", "/process_api/3505a19fdaee10d832ec73323ee5e1cd/A", place{containers: ids(idA)}},

		{"seen from a pod: another container of it", "/../A", place{containers: ids(idA)}},
		{"seen from a pod: another pod", "/../../podU/A", place{containers: ids(idA), podUID: uid}},
		{"seen from a pod: another class", "/../../../kubepods-besteffort.slice/kubepods-besteffort-podU_.slice/cri-containerd-A.scope", place{runtime: "containerd", containers: ids(idA), podUID: uid}},
		{"seen from a container: a service", "/../../system.slice/nginx.service", place{unit: "nginx.service"}},
		{"seen from a container: what is around it", "/..", place{}},

		{"a user's, called like another's container", "/user.slice/user-1000.slice/user@1000.service/app.slice/cri-containerd-A.scope", place{unit: "user@1000.service", runtime: "containerd", containers: ids(idA), ofUser: 1}},
		{"a user's, called like a pod's", "/user.slice/user-1000.slice/user@1000.service/kubepods-podU_.slice/cri-containerd-A.scope", place{unit: "user@1000.service", runtime: "containerd", containers: ids(idA), ofUser: 1}},
		{"a user's, as runc is told it", "/user.slice/user-1000.slice/user@1000.service/kubepods-podU_.slice:cri-containerd:A", place{unit: "user@1000.service", runtime: "containerd", containers: ids(idA), ofUser: 1}},
		{"a user's, seen from a service of its slice", "/../user@1000.service/kubepods/podU/A", place{unit: "user@1000.service", containers: ids(idA), ofUser: 1}},
		{"a user's in a container", "/docker/A/user.slice/user-1000.slice/user@1000.service/app.slice/cri-containerd-B.scope", place{unit: "user@1000.service", runtime: "containerd", containers: ids(idA, idB), ofUser: 1}},
		{"a pod's in a pod", "/kubepods/podU/A/kubepods/podS/B", place{containers: ids(idA, idB), podUID: uid}},

		{"id too short", "/docker/" + idA[1:], place{}},
		{"id too long", "/docker/a" + idA, place{}},
		{"id in capitals", "/docker/" + strings.ToUpper(idA), place{}},
		{"anybody's prefix", "/evil-A", place{}},
		{"no pod", "/kubepods/besteffort/pod1234/A", place{containers: ids(idA)}},
		{"dashes at the wrong places", "/kubepods/pod6c6f9a2e1-d5b-4b8e-9c57-0d4cbbf0f3a1/A", place{containers: ids(idA)}},
		{"containers without end", strings.Repeat("/A", 1000), place{containers: ids(idA, idA, idA, idA)}},
		{"no text", "/system.slice/\xff\x1b[2J.service", place{unit: "��[2J.service"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			replace := strings.NewReplacer("A", idA, "B", idB, "podU_", "pod"+uidSlice, "podU", "pod"+uid, "podS", "pod"+uidStatic)
			if strings.ContainsAny(test.path, "AB") && !strings.Contains(test.path, idA) {
				test.path, test.want.unit = replace.Replace(test.path), replace.Replace(test.want.unit)
			}
			if diff := cmp.Diff(test.want, parsePath(test.path), cmp.AllowUnexported(place{})); diff != "" {
				t.Errorf("%s (-want +got):\n%s", test.path, diff)
			}
		})
	}
}

// Whole files, of both versions of cgroup and of both at once.
func TestCgroupFiles(t *testing.T) {
	for _, test := range []struct {
		name, data string
		want       place
	}{
		{"v2", "0::/system.slice/ssh.service\n", place{unit: "ssh.service"}},
		{"v2 without a line end", "0::/system.slice/ssh.service", place{unit: "ssh.service"}},
		{"v1", "12:hugetlb:/docker/A\n3:cpu,cpuacct:/docker/A\n1:name=systemd:/docker/A\n", place{runtime: "docker", containers: ids(idA)}},
		{"v1, of systemd", "9:name=systemd:/system.slice/cron.service\n4:memory:/system.slice/cron.service\n2:cpu:/\n", place{unit: "cron.service"}},
		{"both, containers in v1", "9:name=systemd:/A\n4:memory:/process_api/x/A\n1:cpu:/A\n0::/\n", place{containers: ids(idA)}},
		{"both, units in v2", "4:memory:/user.slice\n1:name=systemd:/user.slice/user-0.slice/session-1.scope\n0::/user.slice/user-0.slice/session-1.scope\n", place{unit: "session-1.scope"}},
		{"v1 with a path that systemd did not make", "5:devices:/kubepods/besteffort/podU/A\n1:name=systemd:/system.slice/containerd.service\n", place{unit: "containerd.service", containers: ids(idA), podUID: uid}},
		{"colons in the path", "7:pids:/kubepods-besteffort-podU_.slice:cri-containerd:A\n", place{runtime: "containerd", containers: ids(idA), podUID: uid}},
		{"named hierarchy", "13:name=elogind:/3\n1:name=systemd:/system.slice/ssh.service\n", place{unit: "ssh.service"}},
		{"v2 is believed before systemd's", "1:name=systemd:/system.slice/b.service/A\n0::/system.slice/a.service/B\n", place{unit: "a.service", containers: ids(idB)}},
		{"systemd's is believed before others", "4:memory:/b.service/A\n1:name=systemd:/a.service/B\n", place{unit: "a.service", containers: ids(idB)}},
		{"what says more is believed before all", "4:memory:/docker/A/docker/B\n1:name=systemd:/docker/A\n", place{runtime: "docker", containers: ids(idA, idB)}},
		{"nothing", "", place{}},
		{"no fields", "a\n\n::\n0:\n", place{}},
	} {
		t.Run(test.name, func(t *testing.T) {
			data := strings.NewReplacer("A", idA, "B", idB, "podU_", "pod"+uidSlice, "podU", "pod"+uid).Replace(test.data)
			if diff := cmp.Diff(test.want, parseCgroup(data), cmp.AllowUnexported(place{})); diff != "" {
				t.Errorf("%s (-want +got):\n%s", data, diff)
			}
		})
	}
}

func FuzzCgroup(f *testing.F) {
	f.Add("0::/kubepods.slice/kubepods-pod" + uidSlice + ".slice/cri-containerd-" + idA + ".scope\n")
	f.Add("1:name=systemd:/../docker/" + idA + "/" + idB + " (deleted)\n")
	f.Fuzz(func(t *testing.T, data string) {
		p := parseCgroup(data)
		if len(p.containers) > maxNested || len(p.unit) > maxName || p.podUID != "" && !isUID(p.podUID) {
			t.Fatalf("%+v", p)
		}
		for _, id := range p.containers {
			if !isID(id) {
				t.Fatalf("%q is no id", id)
			}
		}
	})
}
