package collectors

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sys/unix"
)

// discarded is a response that nobody reads.
type discarded struct {
	header http.Header
	bytes  int
}

func (d *discarded) Header() http.Header { return d.header }
func (d *discarded) WriteHeader(int)     {}
func (d *discarded) Write(p []byte) (int, error) {
	d.bytes += len(p)
	return len(p), nil
}

// cpuTime is what this process has used, user and system, the garbage collector's included.
func cpuTime(b *testing.B) time.Duration {
	var usage unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &usage); err != nil {
		b.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// BenchmarkScrape is the page as Prometheus asks for it, all of tier C on it.
func BenchmarkScrape(b *testing.B) {
	const protobuf = "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited"
	for _, size := range []struct{ listeners, namespaces int }{{1000, 1}, {1000, 300}} {
		for _, format := range []struct{ name, accept, encoding string }{
			{"text", "text/plain", "identity"}, {"gzip", "text/plain", "gzip"},
			{"protobuf", protobuf, "identity"}, {"protobuf+gzip", protobuf, "gzip"},
		} {
			b.Run(fmt.Sprintf("listeners=%d/namespaces=%d/%s", size.listeners, size.namespaces, format.name), func(b *testing.B) {
				g := New(&fixed{snapshot: many(size.listeners, size.namespaces)})
				handler := promhttp.HandlerForTransactional(g, promhttp.HandlerOpts{})
				request := httptest.NewRequest(http.MethodGet, "/metrics", nil)
				request.Header.Set("Accept", format.accept)
				request.Header.Set("Accept-Encoding", format.encoding)
				response := &discarded{header: make(http.Header)}
				handler.ServeHTTP(response, request) // makes the series
				b.ReportAllocs()
				b.ResetTimer()
				before := cpuTime(b)
				for b.Loop() {
					clear(response.header)
					response.bytes = 0
					handler.ServeHTTP(response, request)
				}
				b.ReportMetric(float64(cpuTime(b)-before)/1e6/float64(b.N), "cpu-ms/op")
				b.ReportMetric(float64(response.bytes)/1e3, "kB")
			})
		}
	}
}
