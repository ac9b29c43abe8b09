package tracker

import "testing"

func BenchmarkListeners(b *testing.B) {
	tr := openTracker(b, everything)
	for i := range uint64(1000) {
		if err := tr.maps["listeners"].Put(1<<48+i, arrivalsListenerCounts{Connections: i}); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportAllocs()
	for b.Loop() {
		if list, err := tr.Listeners(); err != nil || len(list) < 1000 {
			b.Fatal(len(list), err)
		}
	}
}

func BenchmarkNamespaces(b *testing.B) {
	for _, per := range []bool{false, true} {
		name := map[bool]string{false: "counts", true: "with_seconds"}[per]
		b.Run(name, func(b *testing.B) {
			opts := everything
			opts.PerNamespace = per
			tr := openTracker(b, opts)
			for i := range uint64(300) {
				if err := tr.maps["slots"].Put(1<<40+i, statesSlot{Number: uint32(i) + 1}); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportAllocs()
			for b.Loop() {
				if list, err := tr.Namespaces(); err != nil || len(list) < 300 {
					b.Fatal(len(list), err)
				}
			}
		})
	}
}
