#!/bin/sh
# Installs what the tests need beside Go, when it is missing: clang, the
# WebAssembly linker, wasi-libc and the compiler runtime for wasm32 (guests),
# gcc (the race detector), qemu (arm64), docker-registry with htpasswd (a
# registry that is not ours).
# Needs Debian or Ubuntu, and root or sudo only when something is missing.
set -eu

packages="clang lld wasi-libc libclang-rt-dev-wasm32 gcc libc6-dev qemu-user-static docker-registry apache2-utils"

works() {
	for tool in clang wasm-ld gcc qemu-aarch64-static docker-registry htpasswd; do
		command -v $tool >/dev/null 2>&1 || return 1
	done
	dir=$(mktemp -d)
	printf '#include <stdio.h>\nint main(void) { return puts("") < 0; }\n' >"$dir/probe.c"
	status=0
	clang --target=wasm32-wasi -O2 -o "$dir/probe.wasm" "$dir/probe.c" >/dev/null 2>&1 || status=1
	rm -rf "$dir"
	return $status
}

works && exit 0

if ! command -v apt-get >/dev/null 2>&1; then
	echo "install-deps: the tests need a C compiler for WebAssembly (clang, wasm-ld, wasi-libc, compiler-rt for wasm32); install them with your package manager" >&2
	exit 1
fi
if [ "$(id -u)" = 0 ]; then
	sudo=
elif command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then
	sudo="sudo -n"
else
	echo "install-deps: run this as root: apt-get install $packages" >&2
	exit 1
fi

echo "install-deps: installing $packages" >&2
export DEBIAN_FRONTEND=noninteractive
# Lists may be missing on a fresh image; updating them costs seconds otherwise.
# shellcheck disable=SC2086 # both are lists of words
$sudo apt-get install -y -q --no-install-recommends $packages >/dev/null 2>&1 || {
	$sudo apt-get update -q >/dev/null
	$sudo apt-get install -y -q --no-install-recommends $packages >/dev/null
}
if ! works; then
	echo "install-deps: installed $packages, but clang still cannot build for wasm32-wasi" >&2
	exit 1
fi
