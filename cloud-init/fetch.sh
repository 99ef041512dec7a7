# Fetches bootstrap with a digest known beforehand and has systemd run it.
# Everything else is bootstrap's work. Replace the three values; the digests are
# of the binary itself, not of the download.
set -eu
url=https://example.com/hearth/v1.0.0/bootstrap-linux-$(uname -m).gz
sha256_x86_64=0000000000000000000000000000000000000000000000000000000000000000
sha256_aarch64=0000000000000000000000000000000000000000000000000000000000000000

to=/usr/local/bin/bootstrap
case $(uname -m) in x86_64) sha256=$sha256_x86_64 ;; *) sha256=$sha256_aarch64 ;; esac
verify() { echo "$sha256  $1" | sha256sum --check --status 2>/dev/null; }
fetch() { curl --fail --silent --show-error --location --max-time 120 "$url" | gunzip >"$to.new"; }
verify "$to" || for try in 1 2 3 4 5 6 7 8 9 10; do
  fetch && verify "$to.new" && chmod 755 "$to.new" && sync "$to.new" && mv "$to.new" "$to" && break
  echo "bootstrap not fetched, try $try" >&2
  rm -f "$to.new"
  sleep "$try"
done
verify "$to"
"$to" enable
