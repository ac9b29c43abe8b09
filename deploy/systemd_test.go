package deploy_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const unit = "systemd/sockq.service"

// directives are the values of a unit's key, as often as it is given.
func directives(t *testing.T, file, key string) (values []string) {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok && name == key {
			values = append(values, value)
		}
	}
	return values
}

// unitRoot is a root file system with sockq's unit, some drop-ins and those of systemd.
func unitRoot(t *testing.T, dropIns ...string) string {
	t.Helper()
	root := t.TempDir()
	units := filepath.Join(root, "usr/lib/systemd/system")
	if err := os.CopyFS(units, os.DirFS("/usr/lib/systemd/system")); err != nil {
		t.Fatal(err)
	}
	place := func(from, dir string, mode os.FileMode) {
		t.Helper()
		text, err := os.ReadFile(from)
		if err == nil {
			if err = os.MkdirAll(dir, 0o755); err == nil {
				err = os.WriteFile(filepath.Join(dir, filepath.Base(from)), text, mode)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	place(unit, units, 0o644)
	for _, file := range dropIns {
		place(file, filepath.Join(units, "sockq.service.d"), 0o644)
	}
	program := filepath.Join(root, "usr/bin/sockq") // which is not executed
	if err := os.MkdirAll(filepath.Dir(program), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(program, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return root
}

func dropIns(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob("systemd/*.conf")
	if err != nil || len(files) < 4 {
		t.Fatalf("the drop-ins are %q (%v)", files, err)
	}
	return files
}

// systemd knows all of the unit, and finds it as narrow as the documentation says.
func TestUnit(t *testing.T) {
	exposure := regexp.MustCompile(`Overall exposure level for sockq\.service: ([0-9.]+)`)
	for name, test := range map[string]struct {
		dropIns []string
		most    float64
	}{
		"as it is":            {nil, 3},
		"with all namespaces": {[]string{"systemd/all-namespaces.conf"}, 3},
		"with a low port":     {[]string{"systemd/low-port.conf"}, 3},
		"with pods":           {[]string{"systemd/pods.conf"}, 3},
		"with TLS":            {[]string{"systemd/tls.conf"}, 3},
		"with all there is":   {dropIns(t), 4},
	} {
		t.Run(name, func(t *testing.T) {
			root := unitRoot(t, test.dropIns...)
			out, err := exec.Command("systemd-analyze", "verify", "--man=no", "--root="+root, "sockq.service").CombinedOutput()
			if err != nil || len(out) > 0 {
				t.Errorf("systemd-analyze verify: %v: %s", err, out)
			}
			out, err = exec.Command("systemd-analyze", "security", "--no-pager", "--offline=true", "--root="+root, "sockq.service").CombinedOutput()
			level := exposure.FindSubmatch(out)
			if err != nil || level == nil {
				t.Fatalf("systemd-analyze security: %v: %s", err, out)
			}
			if got, err := strconv.ParseFloat(string(level[1]), 64); err != nil || got > test.most {
				t.Errorf("the exposure level is %s, want at most %v: %s", level[1], test.most, out)
			}
		})
	}
}

// What the unit's process may have it has, and what it does not need is not named.
func TestRightsOfTheUnit(t *testing.T) {
	for file, want := range map[string]string{
		unit:                          "CAP_BPF CAP_PERFMON CAP_DAC_READ_SEARCH",
		"systemd/all-namespaces.conf": "CAP_SYS_ADMIN CAP_SYS_PTRACE",
		"systemd/low-port.conf":       "CAP_NET_BIND_SERVICE",
	} {
		for _, key := range []string{"CapabilityBoundingSet", "AmbientCapabilities"} {
			if got := directives(t, file, key); !slices.Equal(got, []string{want}) {
				t.Errorf("%s: %s is %q, want %q", file, key, got, want)
			}
		}
	}
}
