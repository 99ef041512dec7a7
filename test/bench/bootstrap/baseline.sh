#!/bin/sh
# What a careful shell script in user-data does to make a server of this machine,
# one thing after the other: the yardstick of `bootstrap run` (see main.go). It
# has the same downloads, digests, files and waits; no election, no signature,
# no check beforehand, no sync to the disk, no proof that WebAssembly runs, all
# of which takes bootstrap time and this script none.
#
#   baseline.sh LIST
#
# LIST has a line per file: URL, sha256, path, mode. Prints a line per step: its
# name and how long it took in milliseconds.
set -eu

began=$(date +%s%3N)
step() {
	now=$(date +%s%3N)
	echo "$1 $((now - began))"
	began=$now
}

# Who this machine is.
metadata=http://169.254.169.254/latest
session=$(curl -fsS --retry 5 -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 300' "$metadata/api/token")
imds() { curl -fsS --retry 5 -H "X-aws-ec2-metadata-token: $session" "$metadata/meta-data/$1"; }
instance=$(imds instance-id)
zone=$(imds placement/availability-zone)
region=$(imds placement/region)
type=$(imds instance-type)
lifecycle=$(imds instance-life-cycle)
address=$(imds local-ipv4)
step discover

while read -r url sum path mode; do
	if echo "$sum  $path" | sha256sum --check --status 2>/dev/null; then
		continue
	fi
	temporary=$(mktemp /var/tmp/baseline.XXXXXX)
	curl -fsSL --retry 5 -o "$temporary" "$url"
	echo "$sum  $temporary" | sha256sum --check --status
	install -D -m "$mode" "$temporary" "$path"
	rm "$temporary"
done <"$1"
step fetch

printf '%s\n' overlay br_netfilter >/etc/modules-load.d/baseline.conf
for module in overlay br_netfilter; do modprobe "$module" 2>/dev/null || true; done
cat >/etc/sysctl.d/90-baseline.conf <<END
net.ipv4.ip_forward = 1
net.bridge.bridge-nf-call-iptables = 1
fs.inotify.max_user_instances = 8192
fs.inotify.max_user_watches = 524288
END
sysctl -q -p /etc/sysctl.d/90-baseline.conf 2>/dev/null || true
step prepare

secret() { head -c 16 /dev/urandom | sha256sum | cut -c 1-32; }
umask 077
mkdir -p /etc/rancher/k3s/config.yaml.d /var/lib/rancher/k3s/agent/images
secret >/etc/rancher/k3s/token
secret >/etc/rancher/k3s/agent-token
cat >/etc/rancher/k3s/config.yaml.d/10-baseline.yaml <<END
cluster-init: true
token-file: /etc/rancher/k3s/token
agent-token-file: /etc/rancher/k3s/agent-token
write-kubeconfig-mode: "0600"
node-name: $instance
node-ip: [$address]
node-label:
- hearth.sh/pool=control-plane
- node.kubernetes.io/instance-type=$type
- node.kubernetes.io/lifecycle=$lifecycle
- topology.kubernetes.io/region=$region
- topology.kubernetes.io/zone=$zone
node-taint:
- node-role.kubernetes.io/control-plane:NoSchedule
kubelet-arg:
- provider-id=aws:///$zone/$instance
- fail-cgroupv1=false
END
umask 022
cat >/etc/systemd/system/k3s.service <<END
[Unit]
Description=Lightweight Kubernetes
Wants=network-online.target
After=network-online.target
[Install]
WantedBy=multi-user.target
[Service]
Type=notify
KillMode=process
Delegate=yes
LimitNOFILE=1048576
LimitNPROC=infinity
LimitCORE=infinity
TasksMax=infinity
TimeoutStartSec=0
Restart=always
RestartSec=5s
ExecStart=/usr/local/bin/k3s server
END
systemctl daemon-reload
systemctl enable --quiet k3s.service
step install

systemctl start --no-block k3s.service
until systemctl is-active --quiet k3s.service; do sleep 0.2; done
step start

tls=/var/lib/rancher/k3s
until curl -fsS --max-time 5 --cacert $tls/agent/server-ca.crt --cert $tls/agent/client-kubelet.crt --key $tls/agent/client-kubelet.key \
	"https://127.0.0.1:6443/api/v1/nodes/$instance?pretty=false" 2>/dev/null |
	grep -q '"type":"Ready","status":"True"'; do
	sleep 0.2
done
step ready
