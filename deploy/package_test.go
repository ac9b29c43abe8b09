package deploy_test

import (
	"context"
	"crypto/x509/pkix"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"sockq/probes/scenario"
)

// requested tells whether the make target asked for a test that takes minutes, and
// that its tools are there.
func requested(t *testing.T, target string, tools ...string) {
	t.Helper()
	if os.Getenv("SOCKQ_TEST") != target {
		t.Skipf("make test-%s runs it", target)
	}
	for _, tool := range tools {
		program, pkg, _ := strings.Cut(tool, ":")
		if _, err := exec.LookPath(program); err != nil {
			t.Fatalf("%v: apt-get install -y --no-install-recommends %s", err, pkg)
		}
	}
}

// tool runs a program and returns what it prints.
func tool(t *testing.T, name string, args ...string) string {
	t.Helper()
	begin := time.Now()
	cmd := exec.Command(name, args...)
	out, err := cmd.Output()
	if err != nil {
		said := ""
		if exit, ok := err.(*exec.ExitError); ok { //nolint:errorlint // Output returns it as it is
			said = string(exit.Stderr)
		}
		t.Fatalf("%s: %v: %s%s", cmd, err, out, said)
	}
	t.Logf("%s %s took %v", name, args[0], time.Since(begin).Round(time.Second))
	return string(out)
}

// situation is a listener in trouble: listen(5), seven clients, one of them in vain.
func situation(t *testing.T) (series map[string]string) {
	t.Helper()
	s := scenario.NewStage(t, scenario.IPv4)
	l := s.Listen(5)
	for range 6 {
		s.Connect(l.Addr())
	}
	s.Begin(l.Addr())
	return map[string]string{
		fmt.Sprintf("sockq_listener_accept_queue_length{address=%q,netns=\"%d\"", l.Addr(), s.NS.Inode()): "6",
		fmt.Sprintf("sockq_listener_accept_queue_limit{address=%q,netns=\"%d\"", l.Addr(), s.NS.Inode()):  "5",
		fmt.Sprintf("sockq_tcp_sockets{netns=\"%d\",state=\"ESTABLISHED\"", s.NS.Inode()):                 "12",
		fmt.Sprintf("sockq_tcp_sockets{netns=\"%d\",state=\"SYN_SENT\"", s.NS.Inode()):                    "1",
	}
}

// lacking are the series that the metrics do not have with these values; labels of
// owners may follow those that are given.
func lacking(metrics string, series map[string]string) (missing []string) {
	for name, value := range series {
		found := ""
		for line := range strings.Lines(metrics) {
			if strings.HasPrefix(line, name) {
				found = strings.TrimSpace(line)
			}
		}
		if !strings.HasSuffix(found, "} "+value) {
			missing = append(missing, fmt.Sprintf("%s…} %s: %q", name, value, found))
		}
	}
	return missing
}

// TestPackage installs the Debian package on a Debian that systemd booted (in a
// container on this machine's kernel), where the unit runs as it is shipped, and
// removes it without a trace.
func TestPackage(t *testing.T) {
	requested(t, "package", "mmdebstrap:mmdebstrap", "systemd-nspawn:systemd-container", "lintian:lintian")
	debs := make([]string, 2)
	for i := range debs {
		dir := t.TempDir()
		tool(t, "debian/build", dir)
		found, err := filepath.Glob(filepath.Join(dir, "*.deb"))
		if err != nil || len(found) != 1 {
			t.Fatalf("%v is there: %v", found, err)
		}
		if i == 0 {
			if said := tool(t, "lintian", "--allow-root", "--fail-on=error,warning", found[0]); said != "" {
				t.Errorf("lintian says %s", said)
			}
		}
		text, err := os.ReadFile(found[0])
		if err != nil {
			t.Fatal(err)
		}
		debs[i] = string(text)
	}
	if debs[0] != debs[1] {
		t.Error("two builds give two packages")
	}

	root := filepath.Join(t.TempDir(), "debian")
	tool(t, "mmdebstrap", "--quiet", "--variant=minbase", "--include=systemd,systemd-sysv,dbus,curl,iproute2,man-db,bash-completion,zsh", "bookworm", root)
	script, err := os.ReadFile("testdata/package.sh")
	if err != nil {
		t.Fatal(err)
	}
	certificates := t.TempDir()
	authority := newAuthority(t, certificates)
	authority.issue(t, "tls", pkix.Name{CommonName: "sockq"}, "127.0.0.1")
	if err := os.CopyFS(filepath.Join(root, "root/tls"), os.DirFS(certificates)); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{
		"root/sockq.deb":                   debs[0],
		"root/package.sh":                  string(script),
		"root/tls/web.yml":                 "tls_server_config: {cert_file: tls.crt, key_file: tls.key}\n",
		"etc/systemd/system/check.service": "[Service]\nType=idle\nExecStart=/bin/bash /root/package.sh\n",
		"etc/systemd/system/multi-user.target.wants/check.service": "",
	} {
		path := filepath.Join(root, name)
		err := os.MkdirAll(filepath.Dir(path), 0o755)
		if err == nil && content == "" {
			err = os.Symlink("../check.service", path)
		} else if err == nil {
			err = os.WriteFile(path, []byte(content), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}

	series := situation(t)
	// A network namespace of its own keeps its port apart; sockq sees all.
	ctx, stop := context.WithTimeout(t.Context(), 10*time.Minute)
	defer stop()
	boot := exec.CommandContext(ctx, "systemd-nspawn", "--directory="+root, "--boot", "--quiet", "--register=no", "--keep-unit", "--console=pipe",
		"--private-network", "--bind="+runtimeSocket(t)+":/run/containerd", "--capability=CAP_BPF,CAP_PERFMON", "--system-call-filter=bpf perf_event_open")
	out, err := boot.CombinedOutput()
	log, _ := os.ReadFile(filepath.Join(root, "root/log"))
	defer func() {
		if t.Failed() {
			t.Logf("systemd-nspawn: %v: %s\n%s", err, out, log)
		}
	}()
	found := func(name string) string {
		text, err := os.ReadFile(filepath.Join(root, "root/found", name))
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	for name, want := range map[string]string{
		"enabled": "enabled\n", "active": "active\n", "named": `sockq_tcp_sockets{netns="late",state="ESTABLISHED"} 0` + "\n",
		"completed": "--max-processes\n", "completed-by-zsh": "--max-processes\n", "man": "1\n", "man-warnings": "",
		"restarts": "0\n", "active-again": "active\n", "active-after-kill": "active\n", "active-after-upgrade": "active\n",
		"default-after-upgrade": "ARGS=\"--census.interval=1s\"\n", "restarted-by-upgrade": "restarted\n", "enabled-after-disable": "disabled\n",
		"pods":                `sockq_probe_attached{mechanism="cri",probe="pods"} 1` + "\n",
		"active-after-remove": "inactive\n", "default-after-remove": "ARGS=\"--census.interval=1s \"\n",
		"installed-after": "", "user-after": "", "left-after": "",
	} {
		if got := found(name); got != want {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
	}
	for _, line := range []string{
		"CapPrm:\t0000000000000000", "CapEff:\t0000000000000000", "CapAmb:\t0000000000000000", "CapBnd:\t000000c000000004",
		"NoNewPrivs:\t1", "Seccomp:\t2",
	} {
		if !strings.Contains(found("status"), line+"\n") {
			t.Errorf("the process does not have %q: %s", line, found("status"))
		}
	}
	if audited := found("audited"); !strings.HasPrefix(audited, `sockq_audit_difference{check="states"`) || !strings.HasSuffix(audited, " 0\n") {
		t.Errorf("with the drop-in a namespace without a name (%s) shows %q", found("nameless"), audited)
	}
	// CAP_SYS_PTRACE and CAP_SYS_ADMIN.
	if kept := "CapEff:\t0000000000280000\n"; !strings.Contains(found("status-audited"), kept) {
		t.Errorf("with the drop-in the process does not have %q: %s", kept, found("status-audited"))
	}
	for name, root := range map[string]bool{"status": false, "status-audited": false, "status-pods": true, "status-low-port": false, "status-tls": false} {
		if strings.Contains(found(name), "Uid:\t0\t") != root {
			t.Errorf("%s: it runs as root: %t", name, !root)
		}
		if name != "status-audited" && !strings.Contains(found(name), "CapPrm:\t0000000000000000\n") {
			t.Errorf("%s: it has capabilities: %s", name, found(name))
		}
	}
	if said := found("pods-before"); !strings.Contains(said, "permission denied") {
		t.Errorf("a user without rights shows of pods %q", said)
	}
	for _, name := range []string{"low-port", "tls"} {
		if n, err := strconv.Atoi(strings.TrimSpace(found(name))); err != nil || n == 0 {
			t.Errorf("%s: %q series are there", name, found(name))
		}
	}
	for _, probe := range []string{`mechanism="bpf_walk",probe="sockets"`, `mechanism="iter",probe="owners"`, `mechanism="tp_btf",probe="transitions"`} {
		series["sockq_probe_attached{"+probe] = "1"
	}
	for _, probe := range []string{"accepts", "backlog"} { // by hook or by tracepoint
		if strings.Contains(found("metrics"), `sockq_probe_attached{mechanism="none",probe="`+probe) {
			t.Errorf("%s is not attached", probe)
		}
	}
	if missing := lacking(found("metrics"), series); missing != nil {
		t.Errorf("the metrics lack %q", missing)
	}
	if before, after := found("before"), found("after"); before != after {
		had := make(map[string]bool)
		for line := range strings.Lines(before) {
			had[line] = true
		}
		for line := range strings.Lines(after) {
			if !had[line] {
				t.Errorf("left: %s", line)
			}
			delete(had, line)
		}
		t.Errorf("lost: %v", had)
	}
	if strings.Contains(found("journal"), "level=ERROR") {
		t.Errorf("the journal has errors: %s", found("journal"))
	}
}
