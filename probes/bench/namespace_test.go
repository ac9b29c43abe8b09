package main

import (
	"os"
	"testing"
	"time"

	"sockq/probes/sockdiag"
	"sockq/probes/tcpstate"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == holdCommand {
		fail(hold(os.Args[2:]))
		return
	}
	os.Exit(m.Run())
}

// All methods of the bench see the sockets that it makes, and none is left.
func TestHeldSockets(t *testing.T) {
	needRoot(t)
	const connections, listeners = 50, 7
	n, err := newNamespace()
	if err != nil {
		t.Fatal(err)
	}
	closed := false
	defer func() {
		if !closed {
			n.close()
		}
	}()
	if err := n.listen(t.Context(), listeners); err != nil {
		t.Fatal(err)
	}
	if err := n.connect(t.Context(), connections); err != nil {
		t.Fatal(err)
	}
	var client *sockdiag.Client
	if err := n.do(func() (err error) { client, err = sockdiag.Dial(); return err }); err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	states := func() (states [tcpstate.Count]int) {
		if err := client.Dump(sockdiag.Query{}, func(s *sockdiag.Socket) error { states[s.State]++; return nil }); err != nil {
			t.Fatal(err)
		}
		return states
	}
	// One listener more is what the connections are made to.
	var want [tcpstate.Count]int
	want[tcpstate.Established], want[tcpstate.Listen] = 2*connections, listeners+1
	if got := states(); got != want {
		t.Errorf("sockets by state are %v, want %v", got, want)
	}

	it, err := openIterator()
	if err != nil {
		t.Fatal(err)
	}
	defer it.close()
	for range 2 { // its counts begin anew
		err = n.do(func() error {
			found, err := it.count()
			if err == nil && found != 2*connections+listeners+1 {
				t.Errorf("iter/tcp counts %d sockets, want %d", found, 2*connections+listeners+1)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	sd, err := openSockDiag(n)
	if err != nil {
		t.Fatal(err)
	}
	defer sd.Close()
	b := &bench{ctx: t.Context()}
	read := func(want int) error { _, err := b.counted(n, want, sd.Sockets)(); return err }
	if err := read(2*connections + listeners + 1); err != nil {
		t.Error(err)
	}
	if err := read(2*connections + listeners + 2); err == nil {
		t.Error("one socket too few is not noticed")
	}

	n.close()
	closed = true
	// A reset leaves nothing behind, TIME_WAIT neither.
	deadline := time.Now().Add(10 * time.Second)
	for states() != [tcpstate.Count]int{} {
		if time.Now().After(deadline) {
			t.Fatalf("sockets are left: %v", states())
		}
		time.Sleep(time.Millisecond)
	}
}
