# Hearth's few targets. `make run` and `make test` need only Go and, for the
# tests, Debian packages that test/install-deps.sh installs by itself.

GO      ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
# Asked once: one run of make makes one version.
VERSION := $(VERSION)
# A tag may hold no "+", which versions may.
IMAGE_TAG ?= $(subst +,-,$(VERSION))
# Files in packages have the time of the commit, so that the same commit makes
# the same packages.
SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || echo 315532800)
LDFLAGS := -s -w -X main.version=$(VERSION)
# Binaries are static: the same file runs in a container, on a node, on a laptop.
export CGO_ENABLED = 0

.PHONY: run build test test-keda vet race runner test-tools lint bench bench-cluster bench-functions bench-bootstrap e2e arm64 soak fresh image binaries packages manifests packaging-tools docs clean

## run: everything on this machine; ends on a screen that says what to try next.
## Builds nodeagent without the clients of clusters (tag local), which are most
## of what a first build compiles; `make build` puts the whole one in its place.
run:
	$(GO) build -trimpath -tags local -ldflags '$(LDFLAGS)' -o bin/ ./cmd/nodeagent
	./bin/nodeagent dev $(ARGS)

## build: the binaries, into bin/
build:
	$(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/ ./cmd/...

## test: everything that must hold: unit tests with the race detector, arm64
## under emulation, the shipped binary end to end, the crash test. Each part runs
## whatever the others do; what failed or was unsteady is said at the end
test: test-tools
	rm -rf bin/tests
	$(MAKE) -k vet race arm64 e2e; status=$$?; sh test/runner/report.sh; exit $$status

## test-keda: KEDA, whose operator takes six minutes to build when nothing is
## cached, gives a function pods on a cluster; needs root
test-keda: build test-tools
	HEARTH_KEDA=1 HEARTH_BINARY=$(CURDIR)/bin/nodeagent $(GO) test -timeout 60m -count=1 -v -run '^TestKEDA' ./test/functions

vet:
	$(GO) vet ./...

## race: unit tests with the race detector; what measures memory, without it
race: runner
	$(GO) test ./internal/wasm
	$(GO) test -run TestPeakMemory ./internal/artifact
	CGO_ENABLED=1 sh test/runner/run.sh unit "$$($(GO) list ./... | grep -v /test/ | tr '\n' ' ')" -race -p 3 -timeout 20m

# gotestsum, built from source by its own module.
runner:
	cd test/runner && $(GO) build -o ../../bin/gotestsum gotest.tools/gotestsum

# What the tests install and build once: Debian packages, Kubernetes and
# containerd from their Go modules, a Wasm shim with cargo, helm. Cached in the
# user's cache directory; clusters need root, so without it nothing is built.
test-tools:
	sh test/install-deps.sh
	sh test/packaging/install-deps.sh
	[ "$$(id -u)" != 0 ] || $(GO) run ./test/cluster/cmd/cluster build
	[ "$$(id -u)" != 0 ] || $(GO) run ./test/shims/cmd/shims
	$(MAKE) packaging-tools

## arm64: the packages whose behaviour depends on the processor, emulated
arm64:
	GOARCH=arm64 $(GO) test -short -timeout 20m -exec qemu-aarch64-static ./internal/wasm/ ./internal/precompile/

# These first: what starts last should not take longest.
LONGEST = ./test/functions ./test/node ./test/bootstrap

## e2e: drives the shipped binary over HTTP and kills it at random
e2e: build test-tools runner
	HEARTH_BINARY=$(CURDIR)/bin/nodeagent sh test/runner/run.sh e2e "$(LONGEST) ./test/..." -p 3 -timeout 30m -count=1 $(ARGS)

## soak: what takes its time: hundreds of images, dozens of kills, ten minutes
## without an API server, ten minutes of killing everything on one machine, ten
## minutes of changing functions on a cluster whose parts are killed
soak: build test-tools
	HEARTH_SOAK=1 $(GO) test -timeout 60m -count=1 -v -run TestManyImages ./internal/images
	HEARTH_SOAK=1 $(GO) test -timeout 60m -count=1 ./internal/publish
	HEARTH_SOAK=1 HEARTH_BINARY=$(CURDIR)/bin/nodeagent $(GO) test -timeout 90m -count=1 -v -p 1 ./test/node ./test/k3s ./test/bootstrap
	HEARTH_SOAK=1 HEARTH_BINARY=$(CURDIR)/bin/nodeagent $(GO) test -timeout 60m -count=1 -v -run '^TestSoak$$' ./test/functions
	HEARTH_BINARY=$(CURDIR)/bin/nodeagent $(GO) test -timeout 60m -count=1 -v ./test/crash -crash.duration=10m

## fresh: both commands of the README in a new Debian with nothing cached
fresh:
	./test/fresh/fresh.sh $(ARGS)

## bench: the table of docs/benchmarks.md, measured in one run on this machine
bench: build
	sh test/install-deps.sh
	HEARTH_BINARY=$(CURDIR)/bin/nodeagent $(GO) run ./test/bench $(ARGS)
	[ "$$(id -u)" != 0 ] || [ -n "$(findstring -only,$(ARGS))" ] || $(MAKE) bench-functions ARGS='$(filter -check -v,$(ARGS))'
	[ "$$(id -u)" != 0 ] || [ -n "$(findstring -only,$(ARGS))" ] || $(MAKE) bench-bootstrap ARGS='$(filter -check -v,$(ARGS))'

## bench-cluster: the node agent on a real cluster, measured in one run; needs root
bench-cluster: build test-tools
	HEARTH_BINARY=$(CURDIR)/bin/nodeagent $(GO) run ./test/bench/cluster $(ARGS)

## bench-functions: functions on a real cluster of three nodes, from submit to
## answer and a thousand of them, measured in one run; needs root
bench-functions: build test-tools
	HEARTH_BINARY=$(CURDIR)/bin/nodeagent $(GO) run ./test/bench/functions $(ARGS)

## bench-bootstrap: from machine to node, beside a shell script that does the
## same, measured in one run; needs root
bench-bootstrap: test-tools
	sh test/packaging/install-deps.sh
	$(GO) run ./test/bench/bootstrap $(ARGS)

## lint: golangci-lint, built from source by its own module in test/lint
lint:
	cd test/lint && CGO_ENABLED=0 $(GO) build -o ../../bin/golangci-lint github.com/golangci/golangci-lint/v2/cmd/golangci-lint
	./bin/golangci-lint run

## image: the container image for both processors, as an OCI layout and an archive
image: binaries
	$(GO) run ./packaging/image -version $(VERSION) -name hearth.sh/nodeagent:$(IMAGE_TAG) -output dist/image -archive dist/image.tar \
		linux/arm64=dist/linux-arm64 linux/amd64=dist/linux-amd64

# The binaries for both processors, and the manual pages they print.
binaries:
	for arch in arm64 amd64; do GOARCH=$$arch $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o dist/linux-$$arch/ ./cmd/... || exit 1; done
	for name in bootstrap nodeagent; do HOME=/home/you ./dist/linux-$$($(GO) env GOHOSTARCH)/$$name man > dist/$$name.8 || exit 1; done

## packages: deb and rpm for both processors, into dist/packages
packages: binaries packaging-tools
	rm -rf dist/packages && mkdir -p dist/packages
	version=$$(sh packaging/linux/version.sh $(VERSION)) && \
	for arch in arm64 amd64; do for kind in deb rpm; do \
		SOURCE_DATE_EPOCH=$(SOURCE_DATE_EPOCH) VERSION=$$version GOARCH=$$arch BINARIES=dist/linux-$$arch MANPAGES=dist \
			./bin/nfpm package -f packaging/linux/nfpm.yaml -p $$kind -t dist/packages/ || exit 1; \
	done; done

## manifests: packaging/manifests/hearth.yaml, rendered from the chart
manifests: packaging-tools
	$(GO) test ./test/packaging -run "TheManifestsAreTheChart|TheDocumentedValues" -update -count=1

# helm and nfpm, built from source by their own module.
packaging-tools:
	cd packaging/tools && $(GO) build -trimpath -o ../../bin/ helm.sh/helm/v4/cmd/helm github.com/goreleaser/nfpm/v2/cmd/nfpm

## docs: writes the generated references and templates anew
docs:
	$(GO) test ./cmd/nodeagent ./cmd/bootstrap ./api/... ./internal/kube ./internal/nodeconfig -update -count=1
	$(GO) test ./test/packaging -run TestUserDataIsTheExamples -update -count=1

clean:
	rm -rf bin dist
