#!/usr/bin/env bash
# The README's two commands on a machine that has never seen Hearth: a new
# Debian root filesystem with git, make, curl and Go, and nothing else - no
# module cache, no build cache, no compiler, no registry.
#
#   make fresh                  both commands: as an ordinary user `make run`,
#                               a function submitted and asked, Ctrl-C; then
#                               as root what CI runs
#   make fresh ARGS=run         the first only (minutes)
#   make fresh ARGS=test        the second only (up to 75 minutes, cold)
#
# It tests what is committed. Needs root, mmdebstrap and about 15 GB in TMPDIR.
# Where this machine gets its packages from (mirrors, certificates) is carried
# over; nothing else is. Port 8080 must be free.
set -euo pipefail
cd "$(dirname "$0")/../.."

what=${1:-all}
case $what in all | run | test) ;; *) echo "fresh: say run, test or nothing, not $what" >&2; exit 2 ;; esac
[ "$(id -u)" = 0 ] || { echo "fresh: making a root filesystem needs root; run this as root" >&2; exit 1; }
for tool in mmdebstrap git curl unshare; do
	command -v $tool >/dev/null || { echo "fresh: $tool is missing; apt-get install mmdebstrap git curl util-linux" >&2; exit 1; }
done

root=$(mktemp -d "${TMPDIR:-/tmp}/hearth-fresh.XXXXXX")
say() { printf '\n== %s (%s)\n' "$*" "$(date +%H:%M:%S)"; }

# Everything below runs in namespaces of its own: whatever was started or
# mounted is gone when this ends, however it ends.
if [ -z "${HEARTH_FRESH_INSIDE:-}" ]; then
	rmdir "$root"
	exec env HEARTH_FRESH_INSIDE=1 unshare --mount --mount-proc --pid --fork --kill-child bash "$0" "$what"
fi
clean_up() {
	local dir
	for dir in dev sys proc; do umount -R -l "$root/$dir" 2>/dev/null || true; done
	[ -n "${HEARTH_KEEP_FRESH:-}" ] || rm -rf --one-file-system "$root"
}
trap clean_up EXIT
chmod 755 "$root"
mount --make-rprivate /

say "a new Debian"
. /etc/os-release
sources=/etc/apt/sources.list
[ -s "$sources" ] || sources=/etc/apt/sources.list.d/debian.sources
mmdebstrap --quiet --variant=minbase --include=ca-certificates,git,make,curl \
	"$VERSION_CODENAME" "$root" "$sources"

# copy_into FROM TO: what is there, to the same name below the new root.
copy_into() {
	if [ -e "$1" ]; then
		mkdir -p "$root$(dirname "$2")"
		cp -aL "$1" "$root$(dirname "$2")/"
	fi
}
carry() { for path in "$@"; do copy_into "$path" "$path"; done; }
carry /etc/resolv.conf /etc/apt/apt.conf.d /etc/apt/sources.list /etc/apt/sources.list.d /etc/apt/trusted.gpg.d \
	/etc/ssl/certs/ca-certificates.crt /usr/local/share/ca-certificates /etc/pip.conf
for user in ci newcomer; do
	for path in .config/go/env .cargo/config.toml .config/pip .npmrc; do
		copy_into "$HOME/$path" "/home/$user/$path"
	done
done
mkdir -p "$root/opt/go"
cp -a "$(go env GOROOT)/." "$root/opt/go/"
chroot "$root" useradd --uid 4242 --no-create-home --shell /bin/bash newcomer
mkdir -p "$root/home/newcomer"
git clone --quiet --no-local . "$root/home/newcomer/hearth"
git clone --quiet --no-local . "$root/home/ci/hearth"
chroot "$root" chown -R newcomer: /home/newcomer

mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount --rbind /dev "$root/dev"
mount --make-rslave "$root/sys" && mount --make-rslave "$root/dev"

# in_root ACCOUNT HOME COMMAND...: only what a login shell would have, and
# package mirrors.
in_root() {
	local user=$1 home=$2
	shift 2
	chroot --userspec="$user:" "$root" env -i HOME="$home" USER="$user" TERM=dumb LANG=C.UTF-8 \
		PATH=/opt/go/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
		${CI:+CI=$CI} bash -c "cd ~/hearth && $*"
}

if [ "$what" != test ]; then
	say "make run, as an ordinary user"
	# Shells start background jobs with SIGINT ignored; a terminal does not.
	in_root newcomer /home/newcomer "exec env --default-signal=INT setsid make run" >"$root/run.log" 2>&1 &
	for ((i = 0; i < 1200; i++)); do
		curl -fsS -o /dev/null http://127.0.0.1:8080/readyz 2>/dev/null && break
		kill -0 $! 2>/dev/null || { cat "$root/run.log"; echo "fresh: make run ended" >&2; exit 1; }
		sleep 1
	done
	cat "$root/run.log"
	in_root newcomer /home/newcomer "./bin/nodeagent submit examples/hello-go && ./bin/nodeagent status"
	answer=$(curl -fsS http://hello-go.localhost:8080/ --resolve hello-go.localhost:8080:127.0.0.1)
	echo "hello-go answers: $answer"
	[ -n "$answer" ] || { echo "fresh: hello-go answered nothing" >&2; exit 1; }
	say "Ctrl-C"
	pkill -INT -u 4242 -f 'nodeagent dev' 2>/dev/null || kill -INT -- -$! 2>/dev/null || true
	for ((i = 0; i < 30; i++)); do
		pgrep -u 4242 -f nodeagent >/dev/null || break
		sleep 1
	done
	! pgrep -u 4242 -af nodeagent || { echo "fresh: processes are left after Ctrl-C" >&2; exit 1; }
fi

if [ "$what" != run ]; then
	say "what CI runs, as root, with nothing cached"
	CI=${CI:-true} in_root root /home/ci "time .ci/run"
fi
say "done"
