# sockq as a container image: one static binary and nothing else. See "Container" in
# deploy/README.md for how it is run.
#
#   DOCKER_BUILDKIT=1 docker build --build-arg VERSION=v0.1.0 --build-arg SOURCE_DATE_EPOCH=$(git log -1 --format=%ct) -t sockq .
#
# To pin the base for good, give a digest: --build-arg GO_IMAGE=golang@sha256:…
ARG GO_IMAGE=docker.io/library/golang:1.26.8-bookworm
FROM --platform=${BUILDPLATFORM} ${GO_IMAGE} AS build
WORKDIR /src
# What it is built with is what go.mod and go.sum say, and nothing that is newer.
ENV CGO_ENABLED=0 GOTOOLCHAIN=local GOFLAGS=-mod=readonly
COPY go.mod go.sum ./
RUN go mod download
COPY . .
ARG TARGETOS=linux
ARG TARGETARCH
ARG VERSION=devel
# The same source gives the same binary: no paths, no time, no state of a repository.
RUN GOOS=${TARGETOS} GOARCH=${TARGETARCH} go build -trimpath -buildvcs=false \
    -ldflags "-s -w -buildid= -X github.com/prometheus/common/version.Version=${VERSION#v}" \
    -o /out/sockq ./agent
RUN sh agent/third-party-licenses >/out/third-party-licenses

FROM scratch
ARG VERSION=devel
ARG REVISION=unknown
ARG CREATED=1970-01-01T00:00:00Z
LABEL org.opencontainers.image.title="sockq" \
      org.opencontainers.image.description="TCP socket states and listener queues of a Linux node, for Prometheus" \
      org.opencontainers.image.licenses="Apache-2.0 AND (GPL-2.0-only OR BSD-2-Clause) AND BSD-3-Clause AND MIT" \
      org.opencontainers.image.url="https://github.com/sockq/sockq" \
      org.opencontainers.image.source="https://github.com/sockq/sockq" \
      org.opencontainers.image.vendor="the sockq authors" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
# Nobody's, so that root without capabilities, as which it runs, cannot change it.
COPY --from=build --chown=65534:65534 --chmod=0555 /out/sockq /usr/bin/sockq
COPY --chown=65534:65534 --chmod=0444 LICENSE /usr/share/doc/sockq/LICENSE
COPY --from=build --chown=65534:65534 --chmod=0444 /out/third-party-licenses /usr/share/doc/sockq/third-party-licenses
# Container runtimes give capabilities to root alone; sockq gives up all that it does
# not need before it answers.
USER 0:0
EXPOSE 10813
ENTRYPOINT ["/usr/bin/sockq"]
