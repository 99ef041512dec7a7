#!/bin/sh
# Runs tests of packages and keeps what failed, for the end of `make test`:
# whoever reads only the end of a long log learns what to look at.
#
#   run.sh NAME PACKAGES [go test flags]
#
# Up to three tests that fail are run once more: with real clusters on two
# processors, a test can run out of time through no fault of its own. One that
# fails again fails the run; one that passes is called unsteady and listed at
# the end as well. A data race is never given a second chance.
set -eu
name=$1 packages=$2
shift 2
kept=bin/tests
mkdir -p "$kept"
log=$kept/$name.log
rm -f "$kept/$name".*
status=0
# A pipe would hide how the tests ended.
mkfifo "$kept/$name.pipe"
tee "$log" <"$kept/$name.pipe" &
./bin/gotestsum --format standard-quiet --hide-summary skipped \
	--rerun-fails=1 --rerun-fails-max-failures=3 --rerun-fails-run-root-test --rerun-fails-abort-on-data-race \
	--rerun-fails-report="$kept/$name.unsteady" \
	--packages="$packages" -- "$@" >"$kept/$name.pipe" 2>&1 || status=$?
wait
rm -f "$kept/$name.pipe"
# The summary, without what clusters logged meanwhile.
sed -n '/^=== Failed/,$p' "$log" | cut -c1-400 | tail -n 120 >"$kept/$name.summary"
if [ "$status" != 0 ]; then
	[ -s "$kept/$name.summary" ] || tail -n 60 "$log" | cut -c1-400 >"$kept/$name.summary"
	mv "$kept/$name.summary" "$kept/$name.failed"
elif [ -s "$kept/$name.unsteady" ]; then
	cat "$kept/$name.summary" >>"$kept/$name.unsteady"
fi
rm -f "$kept/$name.summary"
exit "$status"
