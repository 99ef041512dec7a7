package machine

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/hearth-sh/hearth/test/process"
	"github.com/hearth-sh/hearth/test/slot"
)

const (
	// rootTimeout is for making the Debian root: two minutes on two idle cores.
	rootTimeout = 20 * time.Minute
	// suite is the Debian release that machines run.
	suite = "bookworm"
	// rootRecipe is part of the cache key: raise it when rootFiles change.
	rootRecipe = "3"
)

// rootPackages are what a machine image for nodes has: systemd, cloud-init and
// what Kubernetes needs beside its own programs. No package is ever installed
// on a machine afterwards.
var rootPackages = []string{
	"systemd", "systemd-sysv", "dbus", "udev", "cloud-init", "iproute2", "iputils-ping", "ca-certificates", "curl", "kmod", "procps", "mount",
	"e2fsprogs", "runc", "containernetworking-plugins", "etcd-server", "etcd-client", "iptables", "nftables", "conntrack", "ebtables", "ethtool",
	"socat", "openssl", "jq", "less",
}

// rootFiles turn the Debian root into a machine image: what a maker of images
// would have put there, and nothing that is Hearth's.
var rootFiles = map[string]string{
	"etc/machine-id": "", // every machine makes its own at its first boot
	"etc/hostname":   "localhost\n",
	// As on EC2, the resolver has a link-local address. Nothing listens there,
	// so that a lookup fails at once.
	"etc/resolv.conf": "nameserver 169.254.169.253\noptions timeout:1 attempts:1\n",
	// The address of eth0 is configured from outside. What tells cloud-init that
	// this is EC2 (and that it must use tokens) is a file of sysfs that the
	// kernel below lacks: see hypervisorUUID.
	"etc/cloud/cloud.cfg.d/99-machine.cfg": `datasource_list: [ Ec2 ]
datasource:
  Ec2:
    strict_id: false
    apply_network_config: false
    metadata_urls: [ "http://169.254.169.254" ]
network: {config: disabled}
apt: {preserve_sources_list: true}
locale: false
ssh_deletekeys: false
`,
	"etc/cloud/ds-identify.cfg": "policy: enabled\ndatasource: Ec2\n",
	hypervisorUUID:              "ec2e1916-9099-7caf-fd21-012345abcdef\n",
	// Container managers show version 1 controllers read-only.
	"etc/systemd/system/writable-cgroups.service": `[Unit]
Description=Make the cgroup controllers writable, as on a machine of one's own
DefaultDependencies=no
Before=sysinit.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c 'for c in /sys/fs/cgroup/*; do mountpoint -q "$c" && mount -o remount,bind,rw "$c"; done; exit 0'

[Install]
WantedBy=sysinit.target
`,
	"etc/systemd/journald.conf.d/machine.conf": "[Journal]\nStorage=persistent\nRateLimitIntervalSec=0\n",
	"etc/systemd/system.conf.d/machine.conf":   "[Manager]\nDefaultTimeoutStopSec=20s\n",
}

// hypervisorUUID is read by cloud-init in the image in the place of
// /sys/hypervisor/uuid: nothing can be added to a sysfs, and in a container
// cloud-init ignores DMI, the other place where EC2 says its name.
const (
	hypervisorUUID  = "etc/hypervisor-uuid"
	cloudInitSource = "usr/lib/python3/dist-packages/cloudinit/sources/DataSourceEc2.py"
)

// rootMasked are units that would do nothing but cost time, or start what
// Debian's packages brought along.
var rootMasked = []string{
	"etcd.service", "apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "e2scrub_reap.service", "fstrim.timer",
	"console-getty.service", "getty.target", "systemd-networkd-wait-online.service", "systemd-networkd.service", "systemd-networkd.socket", "nftables.service",
}

// Root returns a directory with the machine image, which nobody changes:
// machines write to overlays. It is made on first use (two minutes) in the
// user's cache; processes that ask at the same time make it once. What is
// going on is written to progress, which may be nil.
func Root(ctx context.Context, progress io.Writer) (string, error) {
	if progress == nil {
		progress = io.Discard
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("finding the cache directory (set HOME or XDG_CACHE_HOME): %w", err)
	}
	key := sha256.New()
	fmt.Fprintln(key, rootRecipe, suite, rootPackages, rootFiles, rootMasked) // maps print sorted
	dir := filepath.Join(cache, "hearth", "machine-"+hex.EncodeToString(key.Sum(nil))[:16])
	made := func() bool { _, err := os.Stat(filepath.Join(dir, "etc")); return err == nil }
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, rootTimeout)
	defer cancel()
	return dir, slot.Once(ctx, dir, made, func() error { return makeRoot(ctx, dir, progress) })
}

func makeRoot(ctx context.Context, dir string, progress io.Writer) error {
	began := time.Now()
	fmt.Fprintf(progress, "machine: making a Debian %s with systemd and cloud-init; some two minutes\n", suite)
	temp, err := os.MkdirTemp(filepath.Dir(dir), "machine-build-")
	if err != nil {
		return err
	}
	// mmdebstrap leaves no mounts behind, so this stays within the cache.
	defer os.RemoveAll(temp)
	root := filepath.Join(temp, "root")
	if _, err := process.Output(ctx, "mmdebstrap", "--quiet", "--variant=minbase", "--aptopt=APT::Install-Recommends \"false\"",
		"--include="+strings.Join(rootPackages, ","), suite, root); err != nil {
		return fmt.Errorf("%w: making a Debian root: %w", ErrCannotRun, err)
	}
	// There is no DHCP: without its client, cloud-init does not wait for it.
	for _, useless := range []string{"usr/sbin/dhclient", "sbin/dhclient", "var/lib/apt/lists", "var/cache/apt", "usr/share/doc", "usr/share/man", "usr/share/locale"} {
		if err := os.RemoveAll(filepath.Join(root, useless)); err != nil {
			return err
		}
	}
	for name, content := range rootFiles {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) { // it may be a link
			return err
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			return err
		}
	}
	source, err := os.ReadFile(filepath.Join(root, cloudInitSource))
	if err != nil {
		return err
	}
	patched := strings.ReplaceAll(string(source), `"/sys/hypervisor/uuid"`, `"/`+hypervisorUUID+`"`)
	if patched == string(source) {
		return fmt.Errorf("cloud-init of Debian %s no longer reads /sys/hypervisor/uuid: find out how it recognises EC2 now", suite)
	}
	if err := os.WriteFile(filepath.Join(root, cloudInitSource), []byte(patched), 0o644); err != nil {
		return err
	}
	for _, unit := range rootMasked {
		path := filepath.Join(root, "etc/systemd/system", unit)
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := os.Symlink("/dev/null", path); err != nil {
			return err
		}
	}
	wants := filepath.Join(root, "etc/systemd/system/sysinit.target.wants")
	if err := os.MkdirAll(wants, 0o755); err != nil {
		return err
	}
	if err := os.Symlink("/etc/systemd/system/writable-cgroups.service", filepath.Join(wants, "writable-cgroups.service")); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(root, "var/log/journal"), 0o755); err != nil {
		return err
	}
	if err := os.RemoveAll(dir); err != nil { // an incomplete one
		return err
	}
	if err := os.Rename(root, dir); err != nil {
		return fmt.Errorf("publishing the machine image: %w", err)
	}
	fmt.Fprintf(progress, "machine: made in %s\n", time.Since(began).Round(time.Second))
	return nil
}
