#!/bin/sh
# Stops the services when the package goes; on an upgrade (deb: "upgrade" or
# "failed-upgrade", rpm: 1) they run on until the new one restarts them.
set -e
case "$1" in upgrade | failed-upgrade | 1) exit 0 ;; esac
if [ -e /var/lib/hearth/bootstrap/installed.json ]; then
	echo "hearth: k3s and what bootstrap installed stay; \`bootstrap reset --yes\` of this package removes them"
fi
[ -d /run/systemd/system ] || exit 0
systemctl disable --now hearth-nodeagent.service hearth-engine.service hearth-bootstrap.service || true
