package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

func (s *server) snapshotDir() string {
	if dir := s.o.get("etcd-snapshot-dir"); dir != "" {
		return dir
	}
	return s.o.dataDir("server/db/snapshots")
}

// snapshotCommand is "etcd-snapshot save|ls|delete", on a running server.
func snapshotCommand(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return errors.New("etcd-snapshot needs save, ls or delete")
	}
	name, rest := "on-demand", []string{}
	var names []string
	for i := 1; i < len(args); i++ {
		switch arg := args[i]; {
		case arg == "--name" && i+1 < len(args):
			i++
			name = args[i]
		case strings.HasPrefix(arg, "--name="):
			name = strings.TrimPrefix(arg, "--name=")
		case strings.HasPrefix(arg, "-"):
			rest = append(rest, arg)
		default:
			names = append(names, arg)
		}
	}
	o, err := loadOptions(serverCommand, rest, os.Environ())
	if err != nil {
		return err
	}
	n, err := o.node()
	if err != nil {
		return err
	}
	s := &server{o: o, n: n, pki: pki{dir: o.dataDir("server/tls")}}
	s.etcd = &etcd{o: o, n: n, pki: s.pki}
	switch args[0] {
	case "save":
		if o.is("etcd-s3") {
			return errors.New("this stand-in for k3s takes no snapshots to S3")
		}
		if err := os.MkdirAll(s.snapshotDir(), 0o700); err != nil {
			return err
		}
		path := filepath.Join(s.snapshotDir(), fmt.Sprintf("%s-%s-%d", name, n.name, time.Now().Unix()))
		if _, err := s.etcd.ctl(ctx, nil, nil, "snapshot", "save", path); err != nil {
			return err
		}
		slog.Info("Snapshot " + filepath.Base(path) + " saved.")
		return nil
	case "ls", "list":
		entries, err := os.ReadDir(s.snapshotDir())
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		fmt.Println("Name Location Size Created")
		for _, entry := range entries {
			info, err := entry.Info()
			if err != nil {
				continue
			}
			fmt.Printf("%s file://%s %d %s\n", entry.Name(), filepath.Join(s.snapshotDir(), entry.Name()), info.Size(), info.ModTime().UTC().Format(time.RFC3339))
		}
		return nil
	case "delete":
		for _, name := range names {
			if err := os.Remove(filepath.Join(s.snapshotDir(), filepath.Base(name))); err != nil {
				return err
			}
		}
		return nil
	}
	return fmt.Errorf("etcd-snapshot has no %s here", args[0])
}

// reset makes this server the only member of its etcd, from a snapshot if one
// is given, and ends.
func (s *server) reset(ctx context.Context) error {
	snapshot := s.o.get("cluster-reset-restore-path")
	if exists(s.resetFlag()) {
		return errors.New("managed etcd cluster membership was previously reset, please remove the cluster-reset flag and start k3s normally. If you need to perform another cluster reset, you must first manually delete the file at " + s.resetFlag())
	}
	if snapshot == "" && !s.etcd.initialized() {
		return errors.New("cluster-reset was set, but this server has no etcd data")
	}
	if snapshot != "" {
		if !filepath.IsAbs(snapshot) {
			snapshot = filepath.Join(s.snapshotDir(), snapshot)
		}
		if info, err := os.Stat(snapshot); err != nil || info.IsDir() {
			return fmt.Errorf("etcd: snapshot path does not exist: %s", snapshot)
		}
		if exists(s.etcd.dir()) {
			if err := os.Rename(s.etcd.dir(), fmt.Sprintf("%s-old-%d", s.etcd.dir(), time.Now().Unix())); err != nil {
				return err
			}
		}
		s.etcd.name = s.n.name + "-" + randomHex(4)
		restored := s.etcd.dir() + ".restored"
		_ = os.RemoveAll(restored)
		cmd := exec.CommandContext(ctx, "etcdctl", "snapshot", "restore", snapshot, "--skip-hash-check=true", "--name="+s.etcd.name, "--data-dir="+restored,
			"--initial-cluster="+s.etcd.name+"="+s.etcd.peerURL(), "--initial-advertise-peer-urls="+s.etcd.peerURL())
		cmd.Env = append(os.Environ(), "ETCDCTL_API=3")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("restoring the snapshot: %w: %s", err, out)
		}
		if err := os.Rename(restored, s.etcd.dir()); err != nil {
			return err
		}
		if err := writeFile(filepath.Join(s.etcd.dir(), "name"), []byte(s.etcd.name), 0o600); err != nil {
			return err
		}
	} else if err := s.etcd.setName(false); err != nil {
		return err
	}
	// A server that is new to the cluster has keys of its own until it has read
	// the cluster's, which the token opens.
	if err := s.prepare(); err != nil {
		return err
	}
	if err := s.etcd.startForced(s.g, snapshot == ""); err != nil {
		return err
	}
	if err := s.etcd.ready(ctx); err != nil {
		return err
	}
	files, err := s.etcd.loadBootstrap(ctx, s.secret)
	if err != nil {
		return err
	}
	if files != nil {
		if err := writeShared(s.o, files); err != nil {
			return err
		}
	}
	if err := writeFile(s.resetFlag(), nil, 0o600); err != nil {
		return err
	}
	s.g.stop()
	slog.Info("Managed etcd cluster membership has been reset, restart without --cluster-reset flag now. Backup and delete ${datadir}/server/db on each peer etcd server and rejoin the nodes")
	return nil
}
