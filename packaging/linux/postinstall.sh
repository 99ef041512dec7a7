#!/bin/sh
# Makes the engine's user and tells systemd of the units. Nothing is started
# by itself the first time; what runs already is restarted with the new binary,
# but bootstrap, which runs at the next boot.
set -e
# deb: undoing a failed upgrade or removal needs nothing of this.
case "$1" in abort-*) exit 0 ;; esac
# Works without a running systemd too, as when a machine image is built.
if command -v systemd-sysusers >/dev/null 2>&1; then systemd-sysusers /usr/lib/sysusers.d/hearth.conf; fi
[ -d /run/systemd/system ] || exit 0
systemctl daemon-reload
systemctl try-restart hearth-nodeagent.service hearth-engine.service
if ! systemctl is-enabled --quiet hearth-nodeagent.service; then
	echo "hearth: start with: systemctl enable --now hearth-nodeagent hearth-engine"
fi
