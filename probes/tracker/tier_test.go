package tracker

import (
	"os"
	"path/filepath"
	"testing"
)

// The tier is found by trying; this holds it against what the kernel says of
// itself elsewhere.
func TestFindTier(t *testing.T) {
	tier, err := FindTier("/sys")
	if err != nil {
		t.Fatal(err)
	}
	_, kprobes := os.Stat("/sys/bus/event_source/devices/kprobe/type")
	switch tier {
	case TierA:
	case TierB:
		if kprobes != nil {
			t.Errorf("tier B without kprobes: %v", kprobes)
		}
	case TierC:
		if kprobes == nil {
			t.Error("tier C on a kernel with kprobes")
		}
	default:
		t.Errorf("tier %q", tier)
	}
	// What trampolines refuse, kprobes would do.
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "bus/event_source/devices/kprobe"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "bus/event_source/devices/kprobe/type"), []byte("8\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if again, err := FindTier(dir); err != nil || tier == TierC && again != TierB || tier == TierA && again != TierA {
		t.Errorf("with kprobes the tier is %q, %v", again, err)
	}
}
