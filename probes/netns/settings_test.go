package netns

import (
	"errors"
	"io/fs"
	"testing"
)

func TestParseTCPExt(t *testing.T) {
	const good = "TcpExt: ListenOverflows ListenDrops\nTcpExt: 3 18446744073709551615\nIpExt: InNoRoutes\nIpExt: 7\n"
	counters, err := parseTCPExt(good)
	if err != nil {
		t.Fatal(err)
	}
	if len(counters) != 2 || counters["ListenOverflows"] != 3 || counters["ListenDrops"] != 1<<64-1 {
		t.Errorf("counters are %v", counters)
	}
	for name, bad := range map[string]string{
		"nothing":        "",
		"no values":      "TcpExt: ListenDrops\n",
		"too few values": "TcpExt: ListenDrops ListenOverflows\nTcpExt: 1\n",
		"no number":      "TcpExt: ListenDrops\nTcpExt: -1\n",
		"another table":  "IpExt: ListenDrops\nIpExt: 1\n",
	} {
		if counters, err := parseTCPExt(bad); err == nil {
			t.Errorf("%s: parsed as %v", name, counters)
		}
	}
}

func TestTCPExtOfThisKernel(t *testing.T) {
	counters, err := TCPExt("/proc")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"ListenDrops", "ListenOverflows", "SyncookiesSent", "TCPAbortOnMemory"} {
		if _, ok := counters[name]; !ok {
			t.Errorf("no %s among %d counters", name, len(counters))
		}
	}
}

func TestSysctl(t *testing.T) {
	if v, err := Sysctl("/proc", "net.core.somaxconn"); err != nil || v <= 0 {
		t.Errorf("somaxconn is %d, %v", v, err)
	}
	if _, err := Sysctl("/proc", "net.ipv4.no_such_setting"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a setting that is not there: %v", err)
	}
}
