#!/bin/sh
# Prints the version of a deb or rpm for a version of the source tree.
#
#	version.sh v1.2.3             1.2.3             a release
#	version.sh v1.2.3-rc.1        1.2.3~rc.1        sorts before 1.2.3
#	version.sh v1.2.3-4-gabc1234  1.2.3+4.gabc1234  sorts after 1.2.3
#	version.sh abc1234-dirty      0~git.abc1234.dirty  no release yet; sorts before all
#
# dpkg wants a digit first, rpm allows no hyphen; both sort "~" before nothing
# at all, and "+" after it (deb-version(7), rpm-version(7)).
set -eu
case "${1:-}" in
'' | *[!A-Za-z0-9.+_-]*)
	echo "version.sh: \"${1:-}\" is not a version; give one such as v1.2.3, or what git describe prints" >&2
	exit 2
	;;
esac
printf '%s\n' "$1" | sed -E \
	-e 's/^v([0-9])/\1/' \
	-e 's/_/./g' \
	-e 's/-dirty$/.dirty/' \
	-e '/^[0-9]+\.[0-9]+(\.[0-9]+)?([-+.]|$)/!{s/-/./g; s/^/0~git./; b' -e '}' \
	-e 's/^([0-9.]*[0-9])\.dirty$/\1+dirty/' \
	-e 's/-([0-9]+)-g([0-9a-f]+)(\.dirty)?$/+\1.g\2\3/' \
	-e 's/-/~/' \
	-e 's/-/./g'
