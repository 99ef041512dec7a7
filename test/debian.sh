# shellcheck shell=sh disable=SC2154 # the variables are the caller's
# Sourced by the install-deps.sh of the tests: installs Debian packages when
# something is missing. The caller sets $packages and $purpose and defines
# works(), which says whether nothing is missing.
# Needs Debian or Ubuntu, and root or sudo only when something is missing.
install_missing() {
	works && return 0
	if ! command -v apt-get >/dev/null 2>&1; then
		echo "install-deps: $purpose; install that with your package manager (on Debian: $packages)" >&2
		return 1
	fi
	if [ "$(id -u)" = 0 ]; then
		sudo=
	elif command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then
		sudo="sudo -n"
	else
		echo "install-deps: run this as root: apt-get install $packages" >&2
		return 1
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
		echo "install-deps: installed $packages, but something is still missing: $purpose" >&2
		return 1
	fi
}
