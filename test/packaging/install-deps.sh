#!/bin/sh
# Installs what the tests of the packages need, when it is missing: a container
# that boots systemd (systemd-nspawn) and a Debian to boot in it (mmdebstrap),
# what reads rpm packages, and a checker of shell scripts.
set -eu

packages="systemd-container mmdebstrap rpm shellcheck iproute2"

# What only root can run is beside everyone else's PATH.
PATH="$PATH:/usr/sbin:/sbin"

works() {
	for tool in systemd-nspawn mmdebstrap rpm shellcheck dpkg-deb ip nsenter; do
		command -v $tool >/dev/null 2>&1 || return 1
	done
}

purpose="the tests of the packages need systemd-nspawn, mmdebstrap, rpm, shellcheck, dpkg-deb and ip"
# shellcheck source=SCRIPTDIR/../debian.sh
. "$(dirname "$0")/../debian.sh"
install_missing
