# The short way to what is done often. Everything works without make, too.

build:
	CGO_ENABLED=0 go build -trimpath -o sockq ./agent

# Installs what the tests need and runs them as root, as the README says.
test:
	bash .ci/test

# Boots six of Debian's kernels in QEMU, one of them for arm64, and runs the tests of
# the probes and of the agent's rights there.
test-kernels:
	go run ./probes/guests

# Checks the Helm chart with helm, kubeconform, kube-score and kustomize.
test-chart:
	bash .ci/chart

# Installs the chart on a real Kubernetes control plane and node, here; builds them first.
test-cluster:
	bash .ci/cluster

# Renders deploy/kubernetes from the chart; needs helm.
render:
	go run ./deploy/render

# A healthy node under load for five minutes, watched by Prometheus: no alert.
test-alerts-quiet:
	PACKAGES=./alerts SOCKQ_QUIET=5m bash .ci/test -v -count=1 -run 'TestEndToEnd/^quiet$$'

# Makes the Debian package, installs it on a Debian that systemd booted in a container,
# and removes it again. Root; deploy/package_test.go says what it needs.
test-package:
	SOCKQ_TEST=package go test ./deploy -count=1 -v -timeout 20m -run TestPackage

# Builds the image for both architectures, without a registry, and runs it by runc with
# each set of capabilities. Root; deploy/image_test.go says what it needs.
test-image:
	SOCKQ_TEST=image go test ./deploy -count=1 -v -timeout 40m -run TestImage

# The Debian package of this machine's architecture, in the directory dist.
package:
	deploy/debian/build dist

# Makes again what is generated: the BPF objects (clang-19, llvm-19 and libbpf-dev from
# Debian), the dashboards, the PrometheusRule.
generate:
	go generate ./...

# Measures against ss, iter/tcp and sock_diag, and writes the README's table.
bench:
	go run ./probes/bench

.PHONY: build test test-kernels test-chart test-cluster render test-alerts-quiet test-package test-image package generate bench
