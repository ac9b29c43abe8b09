package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/alecthomas/kingpin/v2"
	"github.com/prometheus/common/promslog"
	promslogflag "github.com/prometheus/common/promslog/flag"
	"github.com/prometheus/common/version"
	"github.com/prometheus/exporter-toolkit/web"
	"github.com/prometheus/exporter-toolkit/web/kingpinflag"

	"sockq/probes"
	"sockq/probes/census"
)

// config is the command line, checked.
type config struct {
	web           *web.FlagConfig
	telemetryPath string
	maxRequests   int
	log           promslog.Config
	probes        probes.Options
	check         *checkOptions // nil to serve
}

const intro = `sockq shows the state of every TCP socket and the two queues of every listener
(SYN queue and accept queue), in all network namespaces of this Linux node.
Run it without any flag, then look:

    http://localhost:10813/                  what it is and what works here
    http://localhost:10813/metrics           for Prometheus
    http://localhost:10813/api/v1/snapshot   the same as JSON

sockq check says what works on this node, and what would give the rest.

Rights: root has them all. Short of that, on Linux 6.4 or later with BTF:

    CAP_BPF + CAP_PERFMON   all sockets of all namespaces and their events
    CAP_DAC_READ_SEARCH     what system calls return (--tracker.syscalls)
    CAP_SYS_ADMIN           the audit of namespaces other than sockq's own
    CAP_SYS_PTRACE          also of those that have no name, only a process
    the node's PIDs         whose the sockets are (in a container: hostPID)

On older kernels CAP_SYS_ADMIN is what shows other namespaces, and before 5.11
CAP_SYS_RESOURCE lets BPF maps have their memory. Without any of them sockq
shows the namespace that it runs in, and says what is missing.
What it has no more use for it gives up before it answers the first request.

Exit status: 0 ended by a signal, 1 the node does not give what is needed,
2 a flag or a configuration file is wrong.`

const checkHelp = `Attaches what sockq would with the same flags, looks once, detaches, and
prints what you get on this node: each part with how it is attached (fentry and
kprobe: functions of the kernel; tp_btf and tracepoint: its tracepoints;
bpf_walk: its tables, read by BPF; sock_diag: what ss asks), and of what is
missing why, and which kernel, right or setting would give it. It opens no port,
and may run beside sockq.

Exit status: 0 sockq can run here, maybe without parts that are named in the
table, 1 it cannot run at all, 2 a flag or a configuration file is wrong. To
insist on a part:

    sockq check --format=json |
      jq -e 'any(.probes[]; .name == "refusals" and .attached)'`

// parse reads the command line. It returns nil where the answer is already
// written, to --help and the like.
func parse(args []string, stdout io.Writer) (*config, error) {
	app := kingpin.New("sockq", intro)
	answered := false
	app.Terminate(func(int) { answered = true })
	app.UsageWriter(stdout)
	app.ErrorWriter(io.Discard)
	app.UsageTemplate(usageTemplate)
	kingpin.ManPageTemplate = manTemplate
	app.UsageFuncs(map[string]any{
		"FlagGroups": groupFlags, "IsCheck": func(c *kingpin.CmdModel) bool { return c != nil && c.Name == "check" },
		"ManVersion": func() string { return version.Version }, "Roff": roff, "RoffWord": roffWord, "ToUpper": strings.ToUpper,
	})
	app.Version(versionText())
	app.HelpFlag.Short('h').Help("Show this text. --help-man writes it as a man page.")
	app.VersionFlag.Help("Show the version.")
	cfg := addFlags(app)
	app.Command("serve", "Runs until a signal ends it, as sockq does without a command.").Hidden()
	check := addCheck(app)

	// A default command of kingpin's forgives a flag without its value.
	if context, err := app.ParseContext(args); err == nil && context.SelectedCommand == nil {
		args = append(slices.Clone(args), "serve")
	}
	command, err := app.Parse(args)
	switch {
	case answered:
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("%w; sockq --help lists the flags", err)
	}
	if command == "check" {
		cfg.check = check
	}
	return cfg, cfg.validate()
}

func addCheck(app *kingpin.Application) *checkOptions {
	opts := new(checkOptions)
	cmd := app.Command("check", checkHelp)
	cmd.Flag("format", "How to print it: table or json.").Default("table").SetValue(value{"format", "table or json", func(s string) bool {
		opts.json = s == "json"
		return s == "table" || s == "json"
	}})
	cmd.Flag("verbose", "Print the full reason of what is missing, too. JSON always has it.").Short('v').BoolVar(&opts.verbose)
	return opts
}

func addFlags(app *kingpin.Application) *config {
	cfg := &config{web: kingpinflag.AddFlags(app, ":10813")}
	opts := &cfg.probes

	app.Flag("web.telemetry-path", "Path under which Prometheus finds the metrics.").
		Default("/metrics").StringVar(&cfg.telemetryPath)
	intFlag(app, "web.max-requests", "Most pages, scrapes and JSON documents made at one time, and most that clients read at one time. Who comes on top waits its turn, after 5 s it is told to try again (503); of too many readers one of the address that has most loses its answer. It bounds memory and CPU whatever clients do.",
		"8", &cfg.maxRequests, 1, 1000)

	durationFlag(app, "census.interval", "Time between two counts of all sockets. A count reads every socket of the node, so that half the interval is twice the CPU time.",
		"5s", &opts.CensusInterval, time.Second, 0)
	durationFlag(app, "listener.interval", "Time between two looks at the listeners' queues. What is shorter can be missed in SYN queue peaks and in the time at full; accept queue peaks are seen at each arrival from Linux 6.3, on tier A from 5.12.",
		"100ms", &opts.ListenerInterval, 10*time.Millisecond, 10*time.Second)
	app.Flag("audit.budget", "Share of one CPU that sockq may use to compare its counts with the kernel's own (sockq_audit_difference), 0 for no audit.").
		Default(strconv.FormatFloat(probes.DefaultAuditBudget, 'g', -1, 64)).SetValue(value{"audit.budget", "a number from 0 to 1, such as 0.0005", func(s string) bool {
		v, err := strconv.ParseFloat(s, 64)
		opts.AuditBudget = v
		return err == nil && v >= 0 && v <= 1
	}})
	intFlag(app, "max-listeners", "Most listening addresses with series of their own; the rest is summed under address=\"other\". It bounds what sockq costs Prometheus.",
		"1000", &opts.MaxListeners, 1, 1_000_000)
	intFlag(app, "max-namespaces", "Most network namespaces with series of their own; the rest is summed under netns=\"other\".",
		"300", &opts.MaxNamespaces, 1, 1_000_000)
	intFlag(app, "max-sockets", "Most sockets whose times are measured at one time, rounded up to a power of two: connections, listeners, half-open requests and TIME_WAIT. Each takes 32 bytes of the kernel's memory, used or not: 8 MiB by default. Of more than that, and of a few before it is full, transitions are counted, but no time in a state, no wait for accept(), no connect time and no end of a half-open request (sockq_lost_total{what=\"tracked_sockets\"}).",
		"262144", &opts.MaxSockets, 16_384, 4_194_304)
	intFlag(app, "max-processes", "Most names of processes with series of their own, in all network namespaces together; the rest is summed under process=\"other\".",
		"200", &opts.MaxProcesses, 1, 1_000_000)
	app.Flag("listener.collapse", "Which listeners on ports from 30000 on (NodePorts, ports that the kernel chose) share one series of their process, address=\"0.0.0.0:*\": auto (of a process that has more than 50 listeners), always or never.").
		Default("auto").SetValue(value{"listener.collapse", "auto, always or never", func(s string) bool {
		rule, ok := map[string]probes.Collapse{"auto": probes.CollapseAuto, "always": probes.CollapseAlways, "never": probes.CollapseNever}[s]
		opts.Collapse = rule
		return ok
	}})
	app.Flag("owners", "Look whose the sockets are: process, container, pod. --no-owners leaves it out.").
		Default("true").SetValue((*inverted)(&opts.NoOwners))
	app.Flag("cri.socket", "Socket of the container runtime, which names containers and pods; off asks none. By default the usual places are looked at.").
		StringVar(&opts.Owners.CRI)
	app.Flag("kubelet.url", "The kubelet's list of pods, instead of the container runtime, such as https://127.0.0.1:10250/pods.").
		StringVar(&opts.Owners.Kubelet)
	app.Flag("kubelet.token-file", "File with the token that the kubelet wants.").StringVar(&opts.Owners.KubeletToken)
	app.Flag("kubelet.ca-file", "File with the certificates that may have signed the kubelet's; by default the system's.").StringVar(&opts.Owners.KubeletCA)
	app.Flag("kubelet.insecure", "Accept any certificate of the kubelet.").BoolVar(&opts.Owners.KubeletInsecure)
	app.Flag("tracker.syscalls", "Read what listen(), accept() and connect() return: accepts and how long connections waited for them, requested backlogs, connects without a route. Kernels with trampolines tell these without it. It slows every system call of the node by some nanoseconds; --no-tracker.syscalls leaves it out.").
		Default("true").SetValue((*inverted)(&opts.NoSyscalls))
	app.Flag("states.seconds", "Measure how long sockets stay in each state (sockq_tcp_state_seconds). --no-states.seconds makes each change of state a little cheaper.").
		Default("true").SetValue((*inverted)(&opts.NoStateSeconds))
	app.Flag("states.per-netns", "Measure it for each network namespace, not for the node as a whole. Each gets up to 7 histograms of its own; --max-namespaces bounds them.").
		BoolVar(&opts.StatesPerNamespace)
	app.Flag("bpf-stats", "Let the kernel measure sockq's BPF programs (sockq_probe_run_seconds_total). It slows every BPF program of the node a little and needs CAP_SYS_ADMIN.").
		BoolVar(&opts.BPFStats)
	app.Flag("census.mechanism", "How to count sockets, for tests: auto, bpf_walk or sock_diag.").
		Hidden().Default("auto").SetValue(value{"census.mechanism", "auto, bpf_walk or sock_diag", func(s string) bool {
		opts.Mechanism = census.Mechanism(s)
		if s == "auto" {
			opts.Mechanism = ""
		}
		return s == "auto" || opts.Mechanism == census.MechanismWalk || opts.Mechanism == census.MechanismSockDiag
	}})

	app.Flag("path.procfs", "Where the node's procfs is mounted. In a container with a procfs of its own, mount the node's and name it here.").
		Default("/proc").StringVar(&opts.ProcFS)
	app.Flag("path.sysfs", "Where the node's sysfs is mounted.").
		Default("/sys").StringVar(&opts.SysFS)
	app.Flag("path.netns", "Where network namespaces have their names, as ip netns makes them. It need not exist.").
		Default("/run/netns").StringVar(&opts.NetnsPath)

	cfg.log.Level, cfg.log.Format = promslog.NewLevel(), promslog.NewFormat()
	app.Flag(promslogflag.LevelFlagName, promslogflag.LevelFlagHelp).Default("info").HintOptions(promslog.LevelFlagOptions...).
		SetValue(value{promslogflag.LevelFlagName, orList(promslog.LevelFlagOptions), func(s string) bool { return cfg.log.Level.Set(s) == nil }})
	app.Flag(promslogflag.FormatFlagName, promslogflag.FormatFlagHelp).Default("logfmt").HintOptions(promslog.FormatFlagOptions...).
		SetValue(value{promslogflag.FormatFlagName, orList(promslog.FormatFlagOptions), func(s string) bool { return cfg.log.Format.Set(s) == nil }})
	return cfg
}

// value is a flag's value that says what it wants when it gets something else:
// kingpin's own values do not even name the flag.
type value struct {
	flag, want string
	set        func(string) bool
}

func (v value) Set(s string) error {
	if !v.set(s) {
		return fmt.Errorf("--%s=%s: give %s", v.flag, s, v.want)
	}
	return nil
}

func (v value) String() string { return "" }

// inverted is the value of a flag that turns something on, kept in an option that
// turns it off.
type inverted bool

func (i *inverted) Set(s string) error {
	on, err := strconv.ParseBool(s)
	*i = inverted(!on)
	return err
}

func (i *inverted) String() string { return strconv.FormatBool(!bool(*i)) }

// IsBoolFlag lets kingpin take --no-NAME, and --NAME without a value.
func (i *inverted) IsBoolFlag() bool { return true }

// durationFlag adds a time of least to most, without an upper bound if most is 0.
func durationFlag(app *kingpin.Application, name, help, def string, p *time.Duration, least, most time.Duration) {
	want := fmt.Sprintf("a time of %v or more, such as %s", least, def)
	if most > 0 {
		want = fmt.Sprintf("a time from %v to %v, such as %s", least, most, def)
	}
	app.Flag(name, help).Default(def).SetValue(value{name, want, func(s string) bool {
		d, err := time.ParseDuration(s)
		*p = d
		return err == nil && d >= least && (most == 0 || d <= most)
	}})
}

func intFlag(app *kingpin.Application, name, help, def string, p *int, least, most int) {
	want := fmt.Sprintf("a whole number from %d to %d, such as %s", least, most, def)
	app.Flag(name, help).Default(def).SetValue(value{name, want, func(s string) bool {
		n, err := strconv.Atoi(s)
		*p = n
		return err == nil && n >= least && n <= most
	}})
}

func orList(words []string) string {
	last := len(words) - 1
	return strings.Join(words[:last], ", ") + " or " + words[last]
}

// validate finds what no flag can tell of itself, and what only the node can tell.
func (c *config) validate() error {
	if c.probes.StatesPerNamespace && c.probes.NoStateSeconds {
		return errors.New("--states.per-netns: --no-states.seconds leaves nothing to measure; give one of the two")
	}
	if err := checkTelemetryPath(c.telemetryPath); err != nil {
		return err
	}
	for _, address := range *c.web.WebListenAddresses {
		if err := checkListenAddress(address); err != nil {
			return err
		}
	}
	for _, dir := range []struct{ flag, path string }{{"procfs", c.probes.ProcFS}, {"sysfs", c.probes.SysFS}} {
		if info, err := os.Stat(dir.path); err != nil || !info.IsDir() {
			return fmt.Errorf("--path.%s=%s: no such directory; give the one where the node's %s is mounted", dir.flag, dir.path, dir.flag)
		}
	}
	if _, err := os.Lstat(filepath.Join(c.probes.ProcFS, "self")); err != nil {
		return fmt.Errorf("--path.procfs=%s: there is no procfs; give the directory where the node's is mounted", c.probes.ProcFS)
	}
	if info, err := os.Stat(c.probes.NetnsPath); err == nil && !info.IsDir() {
		return fmt.Errorf("--path.netns=%s: not a directory; give the one with the names of network namespaces, such as /run/netns", c.probes.NetnsPath)
	}
	if !c.probes.NoOwners {
		if err := c.probes.Owners.Check(); err != nil {
			return fmt.Errorf("--cri.socket, --kubelet.*: %w", err)
		}
	}
	if err := web.Validate(*c.web.WebConfigFile); err != nil {
		return fmt.Errorf("--web.config.file=%s: %w; give a readable web configuration (sockq --help says where its format is described), or leave the flag out", *c.web.WebConfigFile, err)
	}
	return nil
}

func checkTelemetryPath(p string) error {
	switch {
	case !strings.HasPrefix(p, "/"), path.Clean(p) != p, strings.ContainsAny(p, "{} \t?#%"):
		return fmt.Errorf("--web.telemetry-path=%s: give a plain path that begins with /, such as /metrics", p)
	case slices.Contains([]string{pathLanding, pathHealthy, pathReady, pathSnapshot}, p):
		return fmt.Errorf("--web.telemetry-path=%s: sockq serves something else there; give another path, such as /metrics", p)
	}
	return nil
}

func checkListenAddress(address string) error {
	if strings.HasPrefix(address, "vsock://") {
		u, err := url.Parse(address)
		if err == nil {
			_, err = strconv.ParseUint(u.Port(), 10, 32)
		}
		if err != nil {
			return fmt.Errorf("--web.listen-address=%s: give vsock://:port, such as vsock://:10813", address)
		}
		return nil
	}
	_, port, err := net.SplitHostPort(address)
	if err == nil {
		_, err = net.LookupPort("tcp", port)
	}
	if err != nil {
		var inner *net.AddrError
		if errors.As(err, &inner) {
			err = errors.New(inner.Err)
		}
		return fmt.Errorf("--web.listen-address=%s: %w; give [host]:port, such as :10813 or 127.0.0.1:10813", address, err)
	}
	return nil
}

const usageTemplate = `usage: {{.App.Name}}{{if .Context.SelectedCommand | IsCheck}} check [<flags>]

{{.Context.SelectedCommand.Help}}
{{else}} [<flags>] [check]

{{.App.Help}}
{{end -}}
{{range .Context.Flags|FlagGroups}}
{{.Title}}:
{{.Flags|FlagsToTwoColumns|FormatTwoColumns}}{{end -}}
`

type flagGroup struct {
	Title string
	Flags []*kingpin.FlagModel
}

// groupFlags sorts the flags for --help by the first word of their names.
func groupFlags(flags []*kingpin.FlagModel) []flagGroup {
	groups := []flagGroup{
		{Title: "What sockq check prints"},
		{Title: "What is measured, and what it may cost"},
		{Title: "Whose the sockets are"},
		{Title: "Web server"},
		{Title: "Where the node's file systems are"},
		{Title: "Log, on standard error"},
		{Title: "Help"},
	}
	of := map[string]int{
		"format": 0, "verbose": 0, "owners": 2, "cri": 2, "kubelet": 2, "web": 3, "path": 4, "log": 5, "help": 6, "version": 6,
	}
	for _, f := range flags {
		word, _, _ := strings.Cut(f.Name, ".")
		i, ok := of[word]
		if !ok {
			i = 1
		}
		g := &groups[i]
		g.Flags = append(g.Flags, f)
	}
	return slices.DeleteFunc(groups, func(g flagGroup) bool { return len(g.Flags) == 0 })
}
