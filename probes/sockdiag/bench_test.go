package sockdiag

import (
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"sockq/probes/tcpstate"
)

// BenchmarkDump reports the cost of a dump and, as ns/socket, what is left of
// it per socket beside the walk over the empty buckets.
func BenchmarkDump(b *testing.B) {
	newNetns(b)
	c := newClientHere(b)
	const pairs = 4000
	population(b, pairs)
	for _, bb := range []struct {
		name     string
		q        Query
		twoDumps bool
		want     int
	}{
		{"both families in one walk", Query{}, false, 2*pairs + 1},
		{"both families in two dumps", Query{}, true, 2*pairs + 1},
		{"IPv4", Query{Family: unix.AF_INET}, false, 2*pairs + 1},
		{"IPv4 with TCP_INFO and SKMEMINFO", Query{Family: unix.AF_INET, Extensions: ExtInfo | ExtSKMemInfo}, false, 2*pairs + 1},
		{"no socket", Query{States: tcpstate.MaskOf(tcpstate.CloseWait)}, false, 0},
		{"listeners", Query{States: tcpstate.MaskListen}, false, 1},
	} {
		b.Run(bb.name, func(b *testing.B) {
			b.ReportAllocs()
			c.twoDumps = bb.twoDumps
			var queued uint64
			n := 0
			count := func(s *Socket) error {
				n++
				if r, w, ok := s.ByteQueues(); ok {
					queued += uint64(r) + uint64(w)
				}
				return nil
			}
			for b.Loop() {
				n = 0
				if err := c.Dump(bb.q, count); err != nil {
					b.Fatal(err)
				}
			}
			if n != bb.want {
				b.Fatal(fmt.Errorf("%d sockets, want %d", n, bb.want))
			}
			if n > 1 {
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(n), "ns/socket")
			}
		})
	}
}
