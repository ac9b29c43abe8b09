# The short way to what is done often. Everything works without make, too.

build:
	CGO_ENABLED=0 go build -trimpath -o sockq ./agent

# Installs what the tests need and runs them as root, as the README says.
test:
	bash .ci/test

# Boots six of Debian's kernels in QEMU, one of them for arm64, and runs the probes'
# tests there.
test-kernels:
	go run ./probes/guests

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

# Compiles the BPF objects again (clang-19, llvm-19 and libbpf-dev from Debian).
generate:
	go generate ./...

# Measures against ss, iter/tcp and sock_diag, and writes the README's table.
bench:
	go run ./probes/bench

.PHONY: build test test-kernels test-package test-image package generate bench
