# Hearth's few targets. `make run` and `make test` need only Go and, for the
# tests, Debian packages that test/install-deps.sh installs by itself.

GO      ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS := -s -w -X main.version=$(VERSION)
# Binaries are static: the same file runs in a container, on a node, on a laptop.
export CGO_ENABLED = 0

.PHONY: run build test lint bench e2e arm64 docs fuzz clean

## run: everything on this machine; ends on a screen that says what to try next
run: build
	./bin/nodeagent dev $(ARGS)

## build: the binaries, into bin/
build:
	$(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/ ./cmd/...

## test: everything that must hold: unit tests with the race detector, arm64
## under emulation, the shipped binary end to end, the crash test
test:
	sh test/install-deps.sh
	$(GO) vet ./...
	CGO_ENABLED=1 $(GO) test -race -p 1 -timeout 20m $$($(GO) list ./... | grep -v /test/)
	$(MAKE) arm64
	$(MAKE) e2e

## arm64: the packages whose behaviour depends on the processor, emulated
arm64:
	GOARCH=arm64 $(GO) test -short -timeout 20m -exec qemu-aarch64-static ./internal/wasm/ ./internal/precompile/

## e2e: drives the shipped binary over HTTP and kills it at random
e2e: build
	HEARTH_BINARY=$(CURDIR)/bin/nodeagent $(GO) test -p 1 -timeout 30m -count=1 ./test/... $(ARGS)

## bench: the table of docs/benchmarks.md, measured in one run on this machine
bench: build
	sh test/install-deps.sh
	HEARTH_BINARY=$(CURDIR)/bin/nodeagent $(GO) run ./test/bench $(ARGS)

## lint: golangci-lint, built from source by its own module in test/lint
lint:
	cd test/lint && CGO_ENABLED=0 $(GO) build -o ../../bin/golangci-lint github.com/golangci/golangci-lint/v2/cmd/golangci-lint
	./bin/golangci-lint run

## docs: writes the generated references anew
docs:
	$(GO) test ./cmd/nodeagent -run 'Documentation|Golden' -update -count=1

clean:
	rm -rf bin
