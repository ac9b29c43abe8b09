package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// What the archiver of the system makes of it is what was put in.
func TestInitramfs(t *testing.T) {
	dir := t.TempDir()
	source, archive := filepath.Join(dir, "source"), filepath.Join(dir, "initrd")
	content := bytes.Repeat([]byte("odd"), 12345)
	if err := os.WriteFile(source, content, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := writeInitramfs(archive, map[string]string{"a/b/c": source, "init": source}, map[string]string{"flags.list": "", "x": "text"}); err != nil {
		t.Fatal(err)
	}
	got := unpackCPIO(t, archive)
	want := map[string]string{
		"a": "", "a/b": "", "a/b/c": string(content), "init": string(content), "flags.list": "", "x": "text",
		"dev": "", "dev/console": "", "TRAILER!!!": "",
	}
	for name, content := range want {
		if text, ok := got[name]; !ok || text != content {
			t.Errorf("%s has %d bytes (%t), want %d", name, len(text), ok, len(content))
		}
	}
	if len(got) != len(want) {
		t.Errorf("%d entries, want %d", len(got), len(want))
	}
}

// unpackCPIO reads a newc archive as its format is described: a header of 110
// letters, the name, the content, the last two up to a multiple of four.
func unpackCPIO(t *testing.T, file string) map[string]string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	number := func(at int) (n int) {
		for _, digit := range b[at : at+8] {
			n = n<<4 + strings.IndexByte("0123456789abcdef", digit)
		}
		return n
	}
	entries := make(map[string]string)
	for at := 0; at < len(b); {
		if string(b[at:at+6]) != "070701" {
			t.Fatalf("no magic number at %d", at)
		}
		size, name := number(at+54), number(at+94)
		data := (at + 110 + name + 3) &^ 3
		entries[string(b[at+110:at+110+name-1])] = string(b[data : data+size])
		at = (data + size + 3) &^ 3
	}
	return entries
}

const said = `#guest release 6.12.1-cloud-amd64
#guest begin census
=== RUN   TestA
--- PASS: TestA (0.10s)
=== RUN   TestB
=== RUN   TestB/one
    b_test.go:7: one is wrong
=== RUN   TestB/two
    b_test.go:9: two is right
=== NAME  TestB
    b_test.go:11: in all
--- FAIL: TestB (0.20s)
    --- FAIL: TestB/one (0.10s)
    --- PASS: TestB/two (0.10s)
FAIL
exit status 1

#guest end census 1
#guest begin probes
=== RUN   TestProbesOfThisKernel
    kernel_test.go:99: sockq on 6.12.1-cloud-amd64, tier A: attached x; missing y
--- PASS: TestProbesOfThisKernel (0.10s)
PASS

#guest end probes 0
#guest done
`

// A room may have no test that was asked for, a guest may not.
func TestReadsThatNoneWasAskedFor(t *testing.T) {
	const none = "#guest begin agent\ntesting: warning: no tests to run\nPASS\n#guest end agent 0\n"
	for said, want := range map[string]bool{
		none + "#guest done\n": false,
		none + "#guest begin probes\n--- PASS: TestX (0.10s)\nPASS\n#guest end probes 0\n#guest done\n": true,
		"#guest begin agent\nPASS\n#guest end agent 0\n#guest done\n":                                   false,
	} {
		var r result
		if !r.read([]byte(said)) || r.ok() != want {
			t.Errorf("%q is right: %t", said, !want)
		}
	}
}

func TestRead(t *testing.T) {
	var r result
	if !r.read([]byte(said)) || r.ok() || r.release != "6.12.1-cloud-amd64" || len(r.rooms) != 2 {
		t.Fatalf("read %+v", r)
	}
	census, probes := r.rooms[0], r.rooms[1]
	if census.passed != 2 || census.failed != 2 || census.skipped != 0 || census.code != 1 || census.ok() ||
		!slices.Equal(census.failures, []string{"TestB", "TestB/one"}) {
		t.Errorf("census is %+v", census)
	}
	if !probes.ok() || probes.passed != 1 ||
		!slices.Equal(r.probes, []string{"sockq on 6.12.1-cloud-amd64, tier A: attached x; missing y"}) {
		t.Errorf("probes are %+v, %q", probes, r.probes)
	}
	var b strings.Builder
	report(&b, []string{"census", "netns", "probes"}, []result{r})
	for _, want := range []string{"b_test.go:7: one is wrong", "b_test.go:11: in all", "2/2/0", "1/0/0", "attached x; missing y"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("the report lacks %q:\n%s", want, &b)
		}
	}
	if strings.Contains(b.String(), "two is right") {
		t.Errorf("the report tells what passed:\n%s", &b)
	}
}

// Whatever is cut off, skipped or without a test is no success.
func TestWhatIsNoSuccess(t *testing.T) {
	good := said[strings.Index(said, "#guest begin probes"):]
	for name, text := range map[string]string{
		"nothing":      "",
		"cut off":      good[:strings.Index(good, "PASS\n")],
		"exit code":    strings.Replace(good, "end probes 0", "end probes 2", 1),
		"killed":       strings.Replace(good, "end probes 0", "end probes -1", 1),
		"skipped":      strings.Replace(good, "--- PASS", "--- SKIP", 1),
		"without test": "#guest begin probes\nPASS\n#guest end probes 0\n#guest done\n",
	} {
		var r result
		if r.read([]byte(text)); r.ok() {
			t.Errorf("%s: %+v", name, r)
		}
	}
	var r result
	if !r.read([]byte(good)) || !r.ok() {
		t.Errorf("the good one: %+v", r)
	}
}

// A panic is retried once, a failure of a test never, nor what BPF programs did.
func TestPlay(t *testing.T) {
	good := said[strings.Index(said, "#guest begin probes"):]
	const oops = "int3: 0000 [#1] SMP\nRIP: 0010:ip_rcv\nKernel panic - not syncing\n"
	for name, test := range map[string]struct {
		said, console [2]string // of each boot
		boots         int
		ok            bool
	}{
		"passes":              {[2]string{good}, [2]string{}, 1, true},
		"panics":              {[2]string{"", good}, [2]string{oops}, 2, true},
		"panics twice":        {[2]string{"", ""}, [2]string{oops, oops}, 2, false},
		"panics and fails":    {[2]string{"", said}, [2]string{oops}, 2, false},
		"fails":               {[2]string{said, good}, [2]string{}, 1, false},
		"fails and panics":    {[2]string{strings.TrimSuffix(said, "#guest done\n"), good}, [2]string{oops}, 1, false},
		"panics in a program": {[2]string{"", good}, [2]string{strings.ReplaceAll(oops, "int3", "Oops") + "bpf_prog_0123456789abcdef_x\n"}, 1, false},
		"ends":                {[2]string{"", good}, [2]string{}, 1, false},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			write := func(name, text string) {
				t.Helper()
				if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			for i, suffix := range []string{"", ".again"} {
				write("said"+suffix, test.said[i])
				write("panic"+suffix, test.console[i])
			}
			write("vmlinuz", "")
			for _, module := range modules {
				write(module, "")
			}
			// It has two serial lines, the console and what the tests say.
			write(amd64.qemu, `#!/bin/sh
echo >> boots
for arg; do
	case $arg in
	file:*.again.console) cat panic.again > "${arg#file:}";;
	file:*.console) cat panic > "${arg#file:}";;
	*path=*.again.tests) cat said.again > "${arg#*path=}";;
	*path=*.tests) cat said > "${arg#*path=}";;
	esac
done
`)
			t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
			t.Chdir(dir)
			g := guest{boot: boot{kernel: kernel{machine: amd64, modules: modules}, dir: dir}, binaries: map[string]string{}, limit: time.Minute, initrd: filepath.Join(dir, "initrd"), log: filepath.Join(dir, "log")}
			r := g.play(t.Context())
			boots, err := os.ReadFile("boots")
			if err != nil || len(boots) != test.boots || r.ok() != test.ok || (r.panic != "") != (test.boots == 2) {
				t.Errorf("%d boots (%v), ok: %t, panic %q, %v", len(boots), err, r.ok(), r.panic, r.err)
			}
			var b strings.Builder
			report(&b, []string{"probes"}, []result{r})
			if told := strings.Contains(b.String(), "booted twice; the first time its kernel panicked: int3: 0000"); told != (test.boots == 2) {
				t.Errorf("the report says:\n%s", &b)
			}
		})
	}
}

func TestPanicOf(t *testing.T) {
	for console, want := range map[string]string{
		"[    1.0] int3: 0000 [#1] SMP\r\n[ 2.0] Kernel panic - not syncing\r\n":                                                "int3: 0000 [#1] SMP",
		"[ 1.0] Internal error: synchronous external abort: 0000000096000010 [#1] SMP\r\n[ 2.0] Kernel panic - not syncing\r\n": "Internal error: synchronous external abort: 0000000096000010 [#1] SMP",
		"Kernel panic - not syncing": "panic",
	} {
		if why, ok := panicOf([]byte(console)); !ok || why != want {
			t.Errorf("%q: %q, %t", console, why, ok)
		}
	}
	if why, ok := panicOf([]byte("[ 1.0] reboot: Power down")); ok {
		t.Errorf("no panic: %q", why)
	}
}

func TestChoose(t *testing.T) {
	all, err := choose("")
	if err != nil || len(all) != 6 {
		t.Errorf("all are %v, %v", all, err)
	}
	two, err := choose("6.1,newest")
	if err != nil || len(two) != 2 || two[0].suite != "bookworm" || two[1].suite != "forky" {
		t.Errorf("two are %v, %v", two, err)
	}
	three, err := choose("6.12-arm64,6.12,newest")
	if err != nil || len(three) != 3 || three[0].machine != arm64 || three[1].machine != amd64 || three[0].suite != three[1].suite {
		t.Errorf("three are %v, %v", three, err)
	}
	for _, name := range []string{"2.4", "6.1-arm64", "6.12-amd64"} {
		if _, err := choose("6.1," + name); err == nil {
			t.Errorf("there is a %s", name)
		}
	}
}

// Whatever a guest keeps by its name is its own, also where two are of one suite.
func TestNames(t *testing.T) {
	names, places := make(map[string]bool), make(map[string]bool)
	for _, k := range kernels {
		names[k.name()], places[k.suffixed(k.suite)] = true, true
	}
	if len(names) != len(kernels) || len(places) != len(kernels) || !names["6.12"] || !names["6.12-arm64"] {
		t.Errorf("names are %v, places %v", names, places)
	}
}

// Each machine gets a kernel of its own architecture, from the mirror of its suite.
func TestLine(t *testing.T) {
	m := mirrors{main: "http://main/debian", security: "http://security/debian-security"}
	for want, k := range map[string]kernel{
		"deb [arch=amd64 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://security/debian-security bullseye-security main\n": {"5.10", "bullseye-security", amd64, nil},
		"deb [arch=arm64 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://main/debian trixie main\n":                         {"6.12", "trixie", arm64, nil},
	} {
		if got := m.line(k); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

// The kernel says where QEMU listens: its console on one line, the tests on the other.
func TestArguments(t *testing.T) {
	for m, want := range map[*machine][]string{
		amd64: {"-cpu max,-cx16", "-device isa-serial,chardev=results", "console=ttyS0 ", " SOCKQ_GUEST_LINE=/dev/ttyS1"},
		arm64: {"-machine virt", "-cpu max,pauth-impdef=on", "-device pci-serial,chardev=results", "console=ttyAMA0 ", " SOCKQ_GUEST_LINE=/dev/ttyS0"},
	} {
		g := guest{boot: boot{kernel: kernel{machine: m}, dir: "/boot"}, initrd: "/initrd"}
		want = append(want, "-accel tcg,thread=single", "-serial file:/a", "-chardev file,id=results,path=/b", "-kernel /boot/vmlinuz -initrd /initrd")
		got := strings.Join(g.arguments("/a", "/b"), " ")
		for _, part := range want {
			if !strings.Contains(got, part) {
				t.Errorf("%s: %q lacks %q", m.arch, got, part)
			}
		}
		if strings.Contains(got, "SOCKQ_TEST_TIER") {
			t.Errorf("%s: a tier is forced: %q", m.arch, got)
		}
		g.tier = "B"
		if got := strings.Join(g.arguments("/a", "/b"), " "); !strings.HasSuffix(got, " SOCKQ_TEST_TIER=B") {
			t.Errorf("%s: no tier is forced: %q", m.arch, got)
		}
	}
}

// Of the agent only what is for guests is run, unless something else was asked for.
func TestFlags(t *testing.T) {
	for want, o := range map[string]options{
		"-test.count=2 -test.run=OfThisKernel$": {count: 2},
		"-test.count=1 -test.run=Other":         {count: 1, run: "Other"},
	} {
		if got := strings.Join(o.flags(agent, false), " "); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	for want, o := range map[string]options{"-test.count=1": {count: 1}, "-test.count=3": {count: 3, run: "Other"}} {
		if got := strings.Join(o.flags("tracker", true), " "); got != want {
			t.Errorf("the tracker gets %q, want %q", got, want)
		}
	}
	few, err := choose("5.10,newest")
	if err != nil {
		t.Fatal(err)
	}
	if whole, err := wholeKernels("newest", few); err != nil || !whole["newest"] || whole["5.10"] {
		t.Errorf("whole are %v, %v", whole, err)
	}
	if _, err := wholeKernels("6.1", few); err == nil {
		t.Error("a kernel that is not booted is whole")
	}
}

func TestDependency(t *testing.T) {
	for line, want := range map[string]string{
		"Depends: linux-image-6.1.0-50-cloud-amd64 (= 6.1.176-1)":                                "linux-image-6.1.0-50-cloud-amd64",
		"Depends: kmod, linux-base (>= 4.3~), initramfs-tools | linux-initramfs-tool":            "",
		"Depends: linux-base-7.2, linux-binary-7.2.12+deb14-cloud-amd64, linux-modules-7.2(= 1)": "linux-binary-7.2.12+deb14-cloud-amd64 linux-modules-7.2",
	} {
		if got := strings.Join(dependency.FindAllString(line, -1), " "); got != want {
			t.Errorf("%q: %q, want %q", line, got, want)
		}
	}
}

func TestNewestOf(t *testing.T) {
	names := []string{
		"linux-image-6.18.9+deb13-cloud-amd64", "linux-image-6.18.15+deb13-cloud-amd64",
		"linux-image-6.18.15+deb13-cloud-amd64-dbg", "linux-image-6.18.16+deb13-cloud-arm64", "linux-image-6.18.20+deb13-amd64", "linux-image-6.18.5+deb13-cloud-amd64",
	}
	if got := newestOf(names, "amd64"); got != names[1] {
		t.Errorf("the newest is %q", got)
	}
	if got := newestOf(names, "arm64"); got != names[3] {
		t.Errorf("the newest of arm64 is %q", got)
	}
	if got := newestOf(names[2:5], "amd64"); got != "" {
		t.Errorf("the newest of none is %q", got)
	}
}

// The init is static and builds with what the guests' other programs do.
func TestInitBuilds(t *testing.T) {
	t.Chdir("../..")
	dir := t.TempDir()
	files, err := buildAll(t.Context(), dir, kernels, nil)
	if err != nil || len(files) != 2 {
		t.Fatalf("%v, %v", files, err)
	}
	for arch, files := range files {
		out, err := exec.Command("go", "version", "-m", files["init"]).CombinedOutput()
		if err != nil || !strings.Contains(string(out), "CGO_ENABLED=0") || !strings.Contains(string(out), "GOARCH="+arch) {
			t.Errorf("%s: %v: %s", arch, err, out)
		}
	}
	if _, err := build(t.Context(), dir, "amd64", []string{"nonsense"}); err == nil {
		t.Error("nonsense has tests")
	}
}
