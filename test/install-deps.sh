#!/bin/sh
# Installs what the guests of the tests are compiled with, when it is missing:
# clang, the WebAssembly linker, wasi-libc and the compiler runtime for wasm32.
# Needs Debian or Ubuntu, and root or sudo only when something is missing.
set -eu

packages="clang lld wasi-libc libclang-rt-dev-wasm32"

works() {
	command -v clang >/dev/null 2>&1 || return 1
	command -v wasm-ld >/dev/null 2>&1 || return 1
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
