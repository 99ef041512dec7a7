#!/bin/sh
# The store and the logs go only when asked to (deb: purge); they can be made
# again, and a reinstall finds them warm. What bootstrap remembers stays for as
# long as what it installed: without it nothing could remove that.
set -e
if [ "$1" = purge ]; then
	rm -rf /var/log/hearth /etc/hearth
	if [ -e /var/lib/hearth/bootstrap/installed.json ]; then
		find /var/lib/hearth -mindepth 1 -maxdepth 1 ! -name bootstrap -exec rm -rf {} +
	else
		rm -rf /var/lib/hearth
	fi
fi
if [ -d /run/systemd/system ]; then systemctl daemon-reload; fi
