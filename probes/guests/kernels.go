package main

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

// kernel is a series of Debian's kernels, the suite whose cloud kernel is of it,
// and the machine for which it is. Versions are not pinned: the archive drops old
// ones.
type kernel struct {
	series, suite string
	machine       *machine
	modules       []string // in the order in which they are loaded
}

// name is what the user calls it.
func (k kernel) name() string { return k.suffixed(k.series) }

func (k kernel) suffixed(s string) string {
	if k.machine == amd64 {
		return s
	}
	return s + "-" + k.machine.arch
}

// newest is whatever Debian's testing has.
const newest = "newest"

var kernels = []kernel{
	{"5.10", "bullseye-security", amd64, withDCCP},
	{"6.1", "bookworm", amd64, withDCCP},
	{"6.12", "trixie", arm64, withDCCP}, // takes longest: others go on beside it
	{"6.12", "trixie", amd64, withDCCP},
	{"6.18", "trixie-backports", amd64, modules}, // among newer ones
	{newest, "forky", amd64, modules},
}

// The tests need these modules. DCCP, which shares functions with TCP, is no more
// since 6.16.
var (
	modules  = []string{"inet_diag.ko", "tcp_diag.ko", "veth.ko"}
	withDCCP = slices.Concat(modules, []string{"dccp.ko", "dccp_ipv4.ko"})
)

func kernelNames() (names []string) {
	for _, k := range kernels {
		names = append(names, k.name())
	}
	return names
}

func choose(only string) ([]kernel, error) {
	if only == "" {
		return kernels, nil
	}
	var chosen []kernel
	for name := range strings.SplitSeq(only, ",") {
		i := slices.IndexFunc(kernels, func(k kernel) bool { return k.name() == name })
		if i < 0 {
			return nil, fmt.Errorf("no kernel is called %q", name)
		}
		chosen = append(chosen, kernels[i])
	}
	return chosen, nil
}

// boot is a kernel that can be booted.
type boot struct {
	kernel
	release string
	dir     string // vmlinuz and the modules
}

func (b boot) file(name string) string { return filepath.Join(b.dir, name) }

// missing is the first file that it lacks.
func (b boot) missing() string {
	for _, name := range append([]string{"vmlinuz"}, b.modules...) {
		if _, err := os.Stat(b.file(name)); err != nil {
			return name
		}
	}
	return ""
}

// fresh is how long a kernel that was fetched is not asked for again.
const fresh = 24 * time.Hour

// fetch brings the kernels into the cache directory.
func fetch(ctx context.Context, cache string, wanted []kernel) (boots []boot, err error) {
	mirrors, err := findMirrors(ctx)
	if err != nil {
		return nil, err
	}
	for _, k := range wanted {
		b, err := k.fetch(ctx, filepath.Join(cache, k.suffixed(k.suite)), mirrors)
		if err != nil {
			return nil, fmt.Errorf("fetch the kernel %s of %s: %w", k.name(), k.suite, err)
		}
		boots = append(boots, b)
	}
	return boots, nil
}

func (k kernel) fetch(ctx context.Context, dir string, m mirrors) (boot, error) {
	cached, _ := filepath.Glob(filepath.Join(dir, "boot-*", "vmlinuz"))
	for _, file := range cached {
		b := k.at(filepath.Dir(file))
		if info, err := os.Stat(b.dir); err == nil && time.Since(info.ModTime()) < fresh && b.missing() == "" {
			return b, nil
		}
	}
	a, err := newApt(filepath.Join(dir, "apt"), k.machine.arch, m.line(k))
	if err != nil {
		return boot{}, err
	}
	if _, err := a.run(ctx, "", "apt-get", "update", "-qq"); err != nil {
		return boot{}, err
	}
	packages, err := a.packages(ctx, k.series)
	if err != nil {
		return boot{}, err
	}
	b := k.at(filepath.Join(dir, "boot-"+strings.TrimPrefix(packages[0], "linux-image-")))
	for _, file := range cached {
		if filepath.Dir(file) == b.dir && b.missing() == "" {
			now := time.Now()
			return b, os.Chtimes(b.dir, now, now)
		}
	}
	part, err := os.MkdirTemp(dir, "part-")
	if err != nil {
		return b, err
	}
	defer os.RemoveAll(part)
	if _, err := a.run(ctx, part, "apt-get", append([]string{"download", "-qq"}, packages...)...); err != nil {
		return b, err
	}
	into := filepath.Join(part, "boot")
	if err := os.Mkdir(into, 0o755); err != nil {
		return b, err
	}
	debs, err := filepath.Glob(filepath.Join(part, "*.deb"))
	if err != nil {
		return b, err
	}
	for _, deb := range debs {
		if err := unpack(ctx, deb, into, k.modules); err != nil {
			return b, fmt.Errorf("unpack %s: %w", filepath.Base(deb), err)
		}
	}
	if name := (boot{kernel: k, dir: into}).missing(); name != "" {
		return b, fmt.Errorf("the packages %v have no %s", packages, name)
	}
	for _, file := range cached { // older ones
		_ = os.RemoveAll(filepath.Dir(file))
	}
	if err := os.Rename(into, b.dir); err != nil {
		return b, err
	}
	return b, nil
}

func (k kernel) at(dir string) boot {
	return boot{kernel: k, release: strings.TrimPrefix(filepath.Base(dir), "boot-"), dir: dir}
}

// mirrors are where this machine gets Debian's packages from.
type mirrors struct{ main, security string }

func findMirrors(ctx context.Context) (m mirrors, err error) {
	out, err := exec.CommandContext(ctx, "apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages").Output()
	if err != nil {
		return m, fmt.Errorf("ask apt for its mirrors: %w", err)
	}
	for uri := range strings.FieldsSeq(string(out)) {
		switch uri = strings.TrimSuffix(uri, "/"); {
		case m.main == "" && strings.HasSuffix(uri, "/debian"):
			m.main = uri
		case m.security == "" && strings.HasSuffix(uri, "/debian-security"):
			m.security = uri
		}
	}
	m.main = cmp.Or(m.main, "http://deb.debian.org/debian")
	m.security = cmp.Or(m.security, "http://deb.debian.org/debian-security")
	return m, nil
}

// line is the kernel's suite in a sources.list.
func (m mirrors) line(k kernel) string {
	uri := m.main
	if strings.HasSuffix(k.suite, "-security") {
		uri = m.security
	}
	return fmt.Sprintf("deb [arch=%s signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s %s main\n", k.machine.arch, uri, k.suite)
}

// apt knows one suite, no package that is installed, and of the machine's settings
// those about how to download.
type apt struct {
	arch    string
	options []string
}

func newApt(root, arch, source string) (*apt, error) {
	for _, dir := range []string{"state/lists/partial", "cache/archives/partial"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			return nil, err
		}
	}
	list, status := filepath.Join(root, "sources.list"), filepath.Join(root, "status")
	if err := errors.Join(os.WriteFile(list, []byte(source), 0o644), os.WriteFile(status, nil, 0o644)); err != nil {
		return nil, err
	}
	a := &apt{arch: arch}
	for _, option := range []string{
		"Dir::State=" + filepath.Join(root, "state"), "Dir::State::status=" + status,
		"Dir::Cache=" + filepath.Join(root, "cache"),
		"Dir::Etc::sourcelist=" + list, "Dir::Etc::sourceparts=/dev/null",
		"Dir::Etc::preferences=/dev/null", "Dir::Etc::preferencesparts=/dev/null",
		"APT::Architecture=" + arch, "APT::Architectures=" + arch,
		"APT::Sandbox::User=", // the cache may be a directory that only we read
		"Acquire::Languages=none", "Acquire::Retries=3",
	} {
		a.options = append(a.options, "-o", option)
	}
	return a, nil
}

func (a *apt) run(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, append(slices.Clone(a.options), args...)...)
	cmd.Dir = dir
	var complaints bytes.Buffer
	cmd.Stderr = &complaints
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w\n%s", name, args[0], err, &complaints)
	}
	return out, nil
}

var (
	dependency = regexp.MustCompile(`\blinux-(?:image|binary|modules)-[0-9][^\s,(|]*`)
	numbers    = regexp.MustCompile(`[0-9]+`)
)

// packages are those that hold the newest cloud kernel of a series in the suite,
// linux-image-<release> first. Newer kernels are split into several.
func (a *apt) packages(ctx context.Context, series string) (found []string, err error) {
	first := "linux-image-cloud-" + a.arch // which only depends on the newest
	if series != newest {
		names, err := a.run(ctx, "", "apt-cache", "pkgnames", "linux-image-"+series+".")
		if err != nil {
			return nil, err
		}
		if first = newestOf(strings.Fields(string(names)), a.arch); first == "" {
			return nil, fmt.Errorf("there is no cloud kernel %s", series)
		}
		found = append(found, first)
	}
	for todo := []string{first}; len(todo) > 0; todo = todo[1:] {
		out, err := a.run(ctx, "", "apt-cache", "show", "--no-all-versions", todo[0])
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(string(out)) {
			if !strings.HasPrefix(line, "Depends:") && !strings.HasPrefix(line, "Pre-Depends:") {
				continue
			}
			for _, name := range dependency.FindAllString(line, -1) {
				if !slices.Contains(found, name) {
					found, todo = append(found, name), append(todo, name)
				}
			}
		}
	}
	if len(found) == 0 || !strings.HasPrefix(found[0], "linux-image-") {
		return nil, fmt.Errorf("%s depends on no kernel: %v", first, found)
	}
	return found, nil
}

// newestOf is the architecture's cloud kernel with the highest numbers, "" for none.
func newestOf(names []string, arch string) string {
	names = slices.DeleteFunc(slices.Clone(names), func(name string) bool { return !strings.HasSuffix(name, "-cloud-"+arch) })
	if len(names) == 0 {
		return ""
	}
	return slices.MaxFunc(names, func(a, b string) int {
		return slices.CompareFunc(numbers.FindAllString(a, -1), numbers.FindAllString(b, -1), func(a, b string) int {
			return cmp.Or(cmp.Compare(len(a), len(b)), cmp.Compare(a, b))
		})
	})
}

// unpack takes the kernel and the modules out of a package.
func unpack(ctx context.Context, deb, into string, modules []string) (err error) {
	cmd := exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", deb)
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	defer func() {
		_, rest := io.Copy(io.Discard, pipe)
		err = errors.Join(err, rest, cmd.Wait())
	}()
	for archive := tar.NewReader(pipe); ; {
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		name := path.Base(header.Name)
		plain := strings.TrimSuffix(name, ".xz")
		switch {
		case header.Typeflag != tar.TypeReg:
			continue
		case strings.HasPrefix(name, "vmlinuz"):
			plain = "vmlinuz"
		case !slices.Contains(modules, plain):
			continue
		}
		content, err := io.ReadAll(archive)
		if err == nil && plain != name && plain != "vmlinuz" {
			content, err = unxz(ctx, content)
		}
		if err == nil {
			err = os.WriteFile(filepath.Join(into, plain), content, 0o644)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", header.Name, err)
		}
	}
}

func unxz(ctx context.Context, b []byte) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "xz", "-dc")
	cmd.Stdin = bytes.NewReader(b)
	return cmd.Output()
}

// installTools installs what the kernels need from Debian where it is missing: the
// emulators of their machines, and xz.
func installTools(ctx context.Context, kernels []kernel) error {
	programs := map[string]string{"xz": "xz-utils"} // and their packages
	for _, k := range kernels {
		programs[k.machine.qemu] = k.machine.pkg
	}
	var missing []string
	for program, name := range programs {
		if _, err := exec.LookPath(program); err != nil {
			missing = append(missing, name)
		}
	}
	if missing == nil {
		return nil
	}
	install := append([]string{"install", "-y", "-qq", "--no-install-recommends"}, missing...)
	for _, args := range [][]string{{"update", "-qq"}, install} {
		command := append([]string{"apt-get"}, args...)
		if os.Getuid() != 0 {
			command = append([]string{"sudo"}, command...)
		}
		cmd := exec.CommandContext(ctx, command[0], command[1:]...)
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("install %v: %w\n%s", missing, err, out)
		}
	}
	return nil
}
