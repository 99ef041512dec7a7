#!/bin/sh
# Says what run.sh kept: which tests were unsteady and which failed, and how.
set -eu
for file in bin/tests/*.unsteady; do
	[ -s "$file" ] || continue
	echo "Failed once and was run again ($file):"
	cat "$file"
done
for file in bin/tests/*.failed; do
	[ -s "$file" ] || continue
	echo "Failed ($file):"
	cat "$file"
done
