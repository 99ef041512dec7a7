#!/bin/sh
# Installs what the tests need beside Go, when it is missing: clang, the
# WebAssembly linker, wasi-libc and the compiler runtime for wasm32 (guests),
# gcc (the race detector), qemu (arm64), docker-registry with htpasswd (a
# registry that is not ours), and what a real Kubernetes cluster on this machine
# needs beside the programs that test/cluster builds (runc, CNI plugins, etcd,
# packet filters), and Python (an emulator of AWS). Where Debian starts an etcd of its own, it does no harm: the
# tests use other addresses.
set -eu

packages="clang lld wasi-libc libclang-rt-dev-wasm32 gcc libc6-dev qemu-user-static docker-registry apache2-utils"
cluster_packages="runc containernetworking-plugins etcd-server iproute2 iptables nftables conntrack"
packages="$packages $cluster_packages python3 python3-venv"

# What only root can run is beside everyone else's PATH.
PATH="$PATH:/usr/sbin:/sbin"

cluster_works() {
	for tool in runc etcd ip iptables nft conntrack nsenter unshare; do
		command -v $tool >/dev/null 2>&1 || return 1
	done
	for plugin in ptp host-local portmap loopback; do
		[ -x /usr/lib/cni/$plugin ] || return 1
	done
}

works() {
	for tool in clang wasm-ld gcc qemu-aarch64-static docker-registry htpasswd; do
		command -v $tool >/dev/null 2>&1 || return 1
	done
	cluster_works || return 1
	python3 -c 'import venv, ensurepip' >/dev/null 2>&1 || return 1
	dir=$(mktemp -d)
	printf '#include <stdio.h>\nint main(void) { return puts("") < 0; }\n' >"$dir/probe.c"
	status=0
	clang --target=wasm32-wasi -O2 -o "$dir/probe.wasm" "$dir/probe.c" >/dev/null 2>&1 || status=1
	rm -rf "$dir"
	return $status
}

purpose="the tests need a C compiler for WebAssembly (clang, wasm-ld, wasi-libc, compiler-rt for wasm32), gcc, qemu, a registry, Python, and what a cluster is made of"
# shellcheck source=SCRIPTDIR/debian.sh
. "$(dirname "$0")/debian.sh"
install_missing
