package deploy_test

import (
	"encoding/json"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// profile is seccomp.json, which is in Docker's form, in the form of OCI runtimes.
func profile(t *testing.T, capabilities []string) map[string]any {
	t.Helper()
	var docker struct {
		DefaultAction   string
		DefaultErrnoRet int
		ArchMap         []struct{ Architecture string }
		Syscalls        []struct {
			Names    []string
			Action   string
			Includes struct{ Caps []string }
			Args     []struct {
				Index    uint   `json:"index"`
				Value    uint64 `json:"value"`
				ValueTwo uint64 `json:"valueTwo"`
				Op       string `json:"op"`
			}
		}
	}
	if err := json.Unmarshal([]byte(read(t, "seccomp.json")), &docker); err != nil {
		t.Fatal(err)
	}
	var calls []map[string]any
	for _, c := range docker.Syscalls {
		if !slices.ContainsFunc(c.Includes.Caps, func(c string) bool { return !slices.Contains(capabilities, c) }) {
			call := map[string]any{"names": c.Names, "action": c.Action}
			if len(c.Args) > 0 {
				call["args"] = c.Args
			}
			calls = append(calls, call)
		}
	}
	return map[string]any{"defaultAction": docker.DefaultAction, "defaultErrnoRet": docker.DefaultErrnoRet, "syscalls": calls,
		"architectures": []string{map[string]string{"amd64": "SCMP_ARCH_X86_64", "arm64": "SCMP_ARCH_AARCH64"}[runtime.GOARCH]}}
}

// TestSeccomp runs sockq by runc as a container engine would that was told what the
// documentation says: the profile lacks no system call. make test-image does so with
// the image.
func TestSeccomp(t *testing.T) {
	bundle := t.TempDir()
	binary := filepath.Join(bundle, "rootfs/usr/bin/sockq")
	build := exec.Command("go", "build", "-o", binary, "./agent")
	build.Dir, build.Env = "..", append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	tool(t, "runc", "spec", "--bundle", bundle)
	two := []string{"CAP_BPF", "CAP_PERFMON"}
	for name, test := range map[string]struct {
		capabilities []string
		kept         string // of them
		own          bool   // the audit is of its own namespace only
	}{
		"with what is needed": {two, "0000000000000000", true},
		"to audit":            {append(slices.Clone(two), "CAP_SYS_ADMIN", "CAP_SYS_PTRACE"), "0000000000280000", false},
	} {
		t.Run(name, func(t *testing.T) {
			free, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			address := free.Addr().String()
			free.Close()
			var config map[string]any
			path := filepath.Join(bundle, "config.json")
			if err := json.Unmarshal([]byte(read(t, path)), &config); err != nil {
				t.Fatal(err)
			}
			process, linux := config["process"].(map[string]any), config["linux"].(map[string]any)
			process["terminal"] = false
			process["args"] = []string{"/usr/bin/sockq", "--web.listen-address=" + address, "--census.interval=1s", "--audit.budget=1", "--cri.socket=off"}
			process["capabilities"] = map[string]any{"bounding": test.capabilities, "effective": test.capabilities, "permitted": test.capabilities}
			linux["namespaces"] = []map[string]any{{"type": "mount"}, {"type": "ipc"}, {"type": "uts"}} // not pid, not network
			linux["seccomp"] = profile(t, test.capabilities)
			config["mounts"] = []map[string]any{
				{"destination": "/proc", "type": "proc", "source": "proc"},
				{"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
				{"destination": "/sys", "type": "bind", "source": "/sys", "options": []string{"bind", "ro"}},
				{"destination": "/sys/kernel/tracing", "type": "bind", "source": aTracefs(t), "options": []string{"bind", "ro"}},
			}
			text, err := json.Marshal(config)
			if err == nil {
				err = os.WriteFile(path, text, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
			id := "sockq-" + address[len("127.0.0.1:"):]
			said, err := os.Create(filepath.Join(t.TempDir(), "log"))
			if err != nil {
				t.Fatal(err)
			}
			defer said.Close()
			cmd := exec.Command("runc", "--root", filepath.Join(bundle, "state"), "run", "--bundle", bundle, id)
			cmd.Stdout, cmd.Stderr = said, said
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer func() {
				_ = exec.Command("runc", "--root", filepath.Join(bundle, "state"), "delete", "--force", id).Run()
				_ = cmd.Wait()
				if t.Failed() {
					t.Log(read(t, said.Name()))
				}
			}()
			c := &contained{t: t, url: "http://" + address}
			c.awaitReady()
			c.shows(map[string]string{
				`sockq_probe_attached{mechanism="bpf_walk",probe="sockets"`: "1",
				`sockq_probe_attached{mechanism="iter",probe="owners"`:      "1",
				`sockq_audit_difference{check="states",netns="host"`:        "0",
			})
			for _, probe := range []string{"accepts", "backlog", "unroutable_connects", "transitions"} {
				if why := c.reason(probe); why != "" {
					t.Errorf("%s: %s", probe, why)
				}
			}
			// Other tests may have namespaces that nothing leads to.
			why := c.reason("audit")
			if strings.HasPrefix(why, "the own namespace only") != test.own || strings.Contains(why, "needs CAP_SYS_PTRACE") {
				t.Errorf("audit: %s", why)
			}
			var state struct{ PID int }
			if err := json.Unmarshal([]byte(tool(t, "runc", "--root", filepath.Join(bundle, "state"), "state", id)), &state); err != nil {
				t.Fatal(err)
			}
			status := read(t, filepath.Join("/proc", strconv.Itoa(state.PID), "status"))
			for _, line := range []string{"CapPrm:\t" + test.kept, "CapEff:\t" + test.kept, "NoNewPrivs:\t1", "Seccomp:\t2"} {
				if !strings.Contains(status, line+"\n") {
					t.Errorf("the process does not have %q: %s", line, status)
				}
			}
			if log := read(t, said.Name()); strings.Contains(log, "level=WARN") || strings.Contains(log, "level=ERROR") {
				t.Errorf("it says %s", log)
			}
		})
	}
}
