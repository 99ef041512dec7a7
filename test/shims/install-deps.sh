#!/bin/sh
# Installs what building the test shims needs beside Rust, when it is missing:
# a C compiler (dbus and others are compiled from source), libseccomp's headers
# (youki's libcontainer), the protobuf compiler (containerd's API). runc and the
# rest of a cluster are not its business.
set -eu

packages="gcc libc6-dev pkg-config libseccomp-dev protobuf-compiler"

# Rust 1.95 or newer, where nobody installed one: Debian keeps a new one beside
# the release's own, for its browsers.
rust_works() {
	minor=$(cargo --version 2>/dev/null | sed -n 's/^cargo 1\.\([0-9]*\).*/\1/p')
	[ "${minor:-0}" -ge 95 ]
}
rust_works || packages="$packages cargo-web rustc-web"

works() {
	for tool in cc pkg-config protoc; do
		command -v $tool >/dev/null 2>&1 || return 1
	done
	pkg-config --exists libseccomp && rust_works
}

purpose="the test shims need a C compiler, pkg-config, libseccomp's headers, protoc and Rust from 1.95 on"
# shellcheck source=SCRIPTDIR/../debian.sh
. "$(dirname "$0")/../debian.sh"
install_missing
