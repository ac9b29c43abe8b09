package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"sockq/probes"
	"sockq/probes/tracker"
)

var update = flag.Bool("update", false, "write the golden files anew")

// Reasons as probes give them.
const (
	noTable  = "needs Linux 5.12 or newer, on arm64 5.18: the table of sockets needs atomic compare and exchange"
	noHooks  = "needs trampolines (CONFIG_DYNAMIC_FTRACE_WITH_DIRECT_CALLS) or kprobes (CONFIG_KPROBE_EVENTS), which this kernel does not allow"
	noWalk   = "walk the kernel's tables: needs Linux 6.4 or newer: not found in type information"
	noRights = "load the event tracker: CAP_BPF and CAP_PERFMON missing: run sockq as root or give it CAP_BPF and CAP_PERFMON: load program: operation not permitted"
)

// checked is what probes find on a kernel with that tier where all works, but for
// those with a reason. The mechanism is that of the stories that need functions.
func checked(release, tier, hooks string, missing map[string]string) *probes.Snapshot {
	s := &probes.Snapshot{Kernel: probes.Kernel{Release: release, Tier: tier}}
	source := "bpf_walk"
	if missing["syn_queue"] != "" {
		source = "sock_diag"
	}
	for _, group := range storyGroups {
		for _, st := range group.stories {
			p := probes.Probe{Name: st.name, Mechanism: "tp_btf", Attached: true}
			switch st.name {
			case "sockets", "listeners", "namespaces", "bound":
				p.Mechanism = source
			case "audit":
				p.Mechanism = "sock_diag"
			case "owners":
				p.Mechanism = "iter"
			case "pods":
				p.Mechanism = "cri"
			case tracker.StoryBacklog, tracker.StoryAccepts:
				p.Mechanism = "tracepoint"
				if hooks == "fentry" {
					p.Mechanism = hooks
				}
			case tracker.StoryUnroutable:
				p.Mechanism = "tracepoint"
			case tracker.StoryRefusals, tracker.StoryIgnoredACKs, tracker.StoryHalfOpen, tracker.StoryTimeWait:
				if hooks != "" {
					p.Mechanism = hooks
				}
			case "syn_queue":
				if source == "bpf_walk" {
					continue
				}
			}
			if p.Reason = missing[st.name]; p.Reason != "" && !strings.Contains(p.Reason, "only") {
				p.Mechanism, p.Attached = "none", false
			}
			s.Probes = append(s.Probes, p)
		}
	}
	return s
}

func all(reason string, names ...string) map[string]string {
	missing := make(map[string]string)
	for _, name := range names {
		missing[name] = reason
	}
	return missing
}

func with(missing map[string]string, more ...string) map[string]string {
	for i := 0; i < len(more); i += 2 {
		missing[more[i]] = more[i+1]
	}
	return missing
}

// rootWithEverything has the capabilities of Linux 6.12.
const rootWithEverything = capabilities(1<<(unix.CAP_CHECKPOINT_RESTORE+1) - 1)

func TestCheckTable(t *testing.T) {
	const entry = "the own namespace only: enter network namespace /proc/thread-self/ns/net: operation not permitted: this needs CAP_SYS_ADMIN"
	failed := checked("6.12.57+deb13-cloud-amd64", "A", "fentry", map[string]string{
		tracker.StoryRefusals: "by fentry: tcp_check_req: it has 7 arguments, which is new\nby kprobe: tcp_conn_request: needs trampolines",
		tracker.StoryHalfOpen: "needs refusals",
		tracker.StoryTimeWait: "by kprobe: inet_twsk_kill: " + strings.Repeat("a verifier that says more than fits into a line ", 5),
		"audit":               entry,
	})
	toEnter := []probes.Need{
		{Capability: unix.CAP_SYS_ADMIN, For: "to enter network namespaces, for sock_diag"},
		{Capability: unix.CAP_SYS_PTRACE, For: "to find network namespaces by their processes"},
	}
	failed.Sources = []probes.SourceStatus{
		{Name: "listeners", Up: true},
		{Name: "names", Error: "read /run/netns: " + strings.Repeat("permission denied ", 8)},
	}
	for name, test := range map[string]struct {
		snapshot *probes.Snapshot
		verbose  bool
		own      fakePrivileges
		needs    []probes.Need
	}{
		"tier-a": {snapshot: checked("6.18.12-1~bpo13+1-amd64", "A", "fentry", nil),
			own: fakePrivileges{id: 65534, has: 1<<unix.CAP_BPF | 1<<unix.CAP_PERFMON | 1<<unix.CAP_DAC_READ_SEARCH}},
		// What README shows.
		"tier-c": {own: fakePrivileges{has: rootWithEverything}, needs: toEnter, snapshot: checked("6.18.44-fc-v509", "C", "", with(
			all(noHooks, tracker.StoryRefusals, tracker.StoryTimeWait), tracker.StoryHalfOpen, "needs refusals"))},
		"no-rights": {verbose: true, snapshot: checked("6.12.57+deb13-cloud-amd64", "", "", with(
			all(noRights, slices.Concat(tracker.StoryNames, []string{"syn_queue"})...),
			"owners", "of listeners only: load the iterator over open files: CAP_BPF and CAP_PERFMON missing", "pods", "no container runtime that speaks CRI was found at the usual sockets",
			"audit", "the census itself is sock_diag's", "sockets", entry, "listeners", entry, "bound", entry, "namespaces", entry))},
		"old-kernel": {own: fakePrivileges{has: rootWithEverything, stuck: errors.New("sockq was built with cgo; build it with CGO_ENABLED=0")},
			needs: append([]probes.Need{{Capability: unix.CAP_BPF, For: "to read BPF maps before Linux 6.0"}}, toEnter...), snapshot: checked("5.10.0-36-cloud-amd64", "B", "kprobe", with(
				all("needs Linux 5.12 or newer, on arm64 5.18: load program: invalid argument: unknown func bpf_get_socket_cookie#46",
					tracker.StoryStateSeconds, tracker.StoryConnects, tracker.StorySynackRetransmits),
				tracker.StoryConnections, "needs the changes of state", tracker.StoryAccepts, "needs connections",
				tracker.StoryBacklog, "load program: invalid argument: program of this type cannot use helper bpf_get_current_task_btf#158",
				tracker.StoryUnroutable, "needs connects",
				tracker.StoryHalfOpen, noTable, tracker.StoryTimeWait, noTable,
				"syn_queue", noWalk, "bound", "needs kernel 6.8 or newer, or BPF on 6.4 or newer",
				"audit", "refusals only: the census itself is sock_diag's"))},
		"strange": {snapshot: failed},
	} {
		t.Run(name, func(t *testing.T) {
			n := &fakeNode{snapshot: test.snapshot, needs: test.needs}
			args := []string{"check"}
			if test.verbose {
				args = append(args, "-v")
			}
			code, got, said := runCheckAs(&test.own, n, args...)
			if code != exitOK || said != "" || !n.closed.Load() {
				t.Errorf("exit code %d, closed %t, said %q", code, n.closed.Load(), said)
			}
			fits(t, got)
			golden := filepath.Join("testdata", "check", name+".txt")
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("got\n%s\nwant\n%s", got, want)
			}
		})
	}
}

// runCheck runs the command with a fake node.
func runCheck(n *fakeNode, args ...string) (code int, stdout, stderr string) {
	return runCheckAs(new(fakePrivileges), n, args...)
}

func runCheckAs(own privileges, n *fakeNode, args ...string) (code int, stdout, stderr string) {
	var out, said bytes.Buffer
	e := env{&out, &said, func(o probes.Options) (node, error) { n.opts = o; return n, n.openErr }, own}
	code = e.run(context.Background(), args)
	return code, out.String(), said.String()
}

func fits(t *testing.T, table string) {
	t.Helper()
	for line := range strings.Lines(table) {
		if n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); n > checkWidth {
			t.Errorf("%d columns: %s", n, line)
		}
	}
}

func TestCheckFails(t *testing.T) {
	for want, n := range map[string]*fakeNode{
		"sockq: cannot run here: start the probes: open sock_diag: operation not permitted\n": {openErr: errors.New("open sock_diag:\n operation not permitted")},
		"sockq: cannot run here: boom\n":                   {snapErr: errors.New("boom")},
		"sockq: cannot run here: close the probes: boom\n": {snapshot: fullSnapshot(), closeErr: errors.New("boom")},
	} {
		code, stdout, said := runCheck(n, "check")
		if code != exitEnvironment || stdout != "" || said != want {
			t.Errorf("exit code %d, output %q, said %q, want %q", code, stdout, said, want)
		}
	}
}

// The agent's flags are those of check.
func TestCheckOpensWhatSockqWould(t *testing.T) {
	flags := []string{"--no-tracker.syscalls", "--max-listeners=7", "--path.netns=/x", "--audit.budget=0"}
	n := &fakeNode{snapshot: fullSnapshot()}
	if code, _, said := runCheck(n, append([]string{"check"}, flags...)...); code != exitOK {
		t.Fatalf("exit code %d: %s", code, said)
	}
	cfg, err := parse(flags, &bytes.Buffer{})
	if err != nil {
		t.Fatal(err)
	}
	if n.opts != cfg.probes {
		t.Errorf("the probes were opened with %+v, sockq opens them with %+v", n.opts, cfg.probes)
	}
}

func TestReadmeShowsTheTable(t *testing.T) {
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	table, err := os.ReadFile("testdata/check/tier-c.txt")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(readme), "```\n"+string(table)+"```\n") {
		t.Error("README does not show testdata/check/tier-c.txt")
	}
}

// checkHere runs the real command.
func checkHere(t *testing.T, who as, args ...string) (table string, doc checkDoc) {
	t.Helper()
	path, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	for _, format := range []string{"table", "json"} {
		var stdout, stderr bytes.Buffer
		cmd := exec.Command(path, append([]string{"check", "--format=" + format}, args...)...)
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		err := who.start(cmd)
		if err == nil {
			err = cmd.Wait()
		}
		if err != nil || stderr.Len() > 0 {
			t.Fatalf("sockq check: %v: %s", err, &stderr)
		}
		if format == "table" {
			table = stdout.String()
		} else if err := json.Unmarshal(stdout.Bytes(), &doc); err != nil {
			t.Fatal(err)
		}
	}
	fits(t, table)
	return table, doc
}

func (d *checkDoc) find(t *testing.T, name string) checkedProbe {
	t.Helper()
	i := slices.IndexFunc(d.Probes, func(p checkedProbe) bool { return p.Name == name })
	if i < 0 {
		t.Fatalf("%s is not named: %+v", name, d.Probes)
	}
	return d.Probes[i]
}

// What check says is what sockq attaches, beside a sockq that runs.
func TestCheckOfThisNode(t *testing.T) {
	p := launch(t, as{})
	table, doc := checkHere(t, as{})
	var want, got []string
	for _, probe := range p.snapshot().Probes {
		want = append(want, probe.Name+" "+probe.Mechanism)
	}
	for _, probe := range doc.Probes {
		got = append(got, probe.Name+" "+probe.Mechanism)
		if probe.Attached == (probe.Why != "") || probe.Attached == (probe.Needs != "") {
			t.Errorf("%+v", probe)
		}
	}
	slices.Sort(want)
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("check says %v, sockq has %v", got, want)
	}
	if len(doc.Sources) > 0 {
		t.Errorf("sources failed: %+v", doc.Sources)
	}
	if doc.Kernel.Tier != string(tracker.TierC) {
		return
	}
	const note = `refusals, half_open, time_wait
     why:   this kernel allows neither trampolines nor kprobes
     needs: a kernel with trampolines or kprobes: stock kernels of distributions have them
`
	if !strings.Contains(table, note) {
		t.Errorf("no %q in\n%s", note, table)
	}
}

// For each right and setting that is missing, check names it.
// In a container without the node's processes sockq says whose sockets it knows.
func TestCheckInAPIDNamespace(t *testing.T) {
	path, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("unshare", "--fork", "--pid", "--mount-proc", path, "check", "--format=json").Output()
	var doc checkDoc
	if err == nil {
		err = json.Unmarshal(out, &doc)
	}
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if p := doc.find(t, "owners"); !p.Attached || !strings.Contains(p.Why, "own PID namespace") || !strings.Contains(p.Needs, "hostPID") {
		t.Errorf("owners are %+v", p)
	}
}

// rootsSocket is the path of a socket that nobody else may connect to.
func rootsSocket(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	listener, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestCheckSaysWhatWouldGiveIt(t *testing.T) {
	two := []uintptr{unix.CAP_BPF, unix.CAP_PERFMON}
	const turnedOff = "turned off"
	for name, test := range map[string]struct {
		who        as
		args       []string
		parts      []string
		why, needs string
	}{
		"no right":     {who: as{nobody: true}, parts: []string{"syn_queue", "transitions", "accepts", "refusals", "audit"}, why: "CAP_BPF and CAP_PERFMON", needs: "root, or CAP_BPF and CAP_PERFMON"},
		"no BPF":       {who: as{nobody: true, capabilities: two[1:]}, parts: []string{"syn_queue", "transitions"}, why: "CAP_BPF", needs: "CAP_BPF"},
		"no PERFMON":   {who: as{nobody: true, capabilities: two[:1]}, parts: []string{"syn_queue", "transitions"}, why: "CAP_PERFMON", needs: "CAP_PERFMON"},
		"no SYS_ADMIN": {who: as{nobody: true, capabilities: two}, parts: []string{"audit"}, why: "may not enter others", needs: "CAP_SYS_ADMIN"},
		"neither":      {who: as{nobody: true}, parts: []string{"sockets", "listeners", "namespaces"}, why: "may not enter others", needs: "CAP_SYS_ADMIN"},
		"tracefs not readable": {who: as{nobody: true, capabilities: two, tracefs: mounted}, parts: []string{"accepts", "backlog", "unroutable_connects"},
			why: "no right to read tracefs", needs: "CAP_DAC_READ_SEARCH"},
		"no tracefs": {who: as{nobody: true, capabilities: two, tracefs: notMounted}, parts: []string{"accepts", "backlog", "unroutable_connects"},
			why: "tracefs is not mounted", needs: "tracefs on /sys/kernel/tracing"},
		"no right to ask for pods": {who: as{nobody: true, capabilities: two}, args: []string{"--cri.socket=" + rootsSocket(t)}, parts: []string{"pods"},
			why: "socket belongs to somebody else", needs: "pods.conf"},
		"no system calls":  {args: []string{"--no-tracker.syscalls"}, parts: []string{"unroutable_connects"}, why: turnedOff, needs: "--tracker.syscalls"},
		"no state seconds": {args: []string{"--no-states.seconds"}, parts: []string{"state_seconds"}, why: turnedOff, needs: "--states.seconds"},
		"no audit":         {args: []string{"--audit.budget=0"}, parts: []string{"audit"}, why: turnedOff, needs: "--audit.budget above 0"},
		"no walk":          {args: []string{"--census.mechanism=sock_diag"}, parts: []string{"syn_queue", "accepts"}, why: turnedOff, needs: "--census.mechanism=auto"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, doc := checkHere(t, test.who, test.args...)
			for _, part := range test.parts {
				if p := doc.find(t, part); !strings.Contains(p.Why, test.why) || !strings.Contains(p.Needs, test.needs) {
					t.Errorf("%+v, want it missing for %q, and %q to give it", p, test.why, test.needs)
				}
			}
		})
	}
}
