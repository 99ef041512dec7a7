package main

import (
	"archive/zip"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	mathrand "math/rand/v2"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/robfig/cron/v3"
)

const (
	compressedExtension = ".zip"
	// snapshotJitter keeps servers from taking theirs at the same instant.
	snapshotJitter = 5 * time.Second
	// saveTimeout bounds what etcdctl takes for one.
	saveTimeout = 5 * time.Minute
)

// snapshotDir is where snapshots are. k3s makes the default one and no other.
func (s *server) snapshotDir() (string, error) {
	dir := s.o.get("etcd-snapshot-dir")
	if usual := s.o.dataDir("server/db/snapshots"); dir == "" || dir == usual {
		return usual, os.MkdirAll(usual, 0o700)
	}
	info, err := os.Stat(dir)
	if err == nil && !info.IsDir() {
		err = fmt.Errorf("%s is not a directory", dir)
	}
	if err != nil {
		return "", fmt.Errorf("failed to get etcd-snapshot-dir: %w", err)
	}
	return dir, nil
}

// checkSnapshots looks at settings of which k3s says nothing until it is too late:
// with a schedule that it cannot read it takes no snapshots.
func checkSnapshots(o *options) error {
	plan, err := cron.ParseStandard(o.get("etcd-snapshot-schedule-cron"))
	if err == nil && plan.Next(time.Now()).IsZero() {
		err = fmt.Errorf("%q never comes", o.get("etcd-snapshot-schedule-cron"))
	}
	if err != nil {
		return fmt.Errorf("etcd-snapshot-schedule-cron: %w", err)
	}
	if _, err := time.ParseDuration(o.get("etcd-s3-timeout")); err != nil {
		return fmt.Errorf("etcd-s3-timeout: %w", err)
	}
	if strings.ContainsAny(o.get("etcd-s3-endpoint"), "/ ") {
		return fmt.Errorf("etcd-s3-endpoint is HOST or HOST:PORT, not %q", o.get("etcd-s3-endpoint"))
	}
	if (o.get("etcd-s3-access-key") == "") != (o.get("etcd-s3-secret-key") == "") {
		return errors.New("of etcd-s3-access-key and etcd-s3-secret-key one is missing")
	}
	if o.is("etcd-s3") && o.get("etcd-s3-bucket") == "" {
		return errors.New("s3 bucket name was not set")
	}
	if o.get("cluster-reset-restore-path") != "" && !o.is("cluster-reset") {
		return errors.New("invalid flag use; --cluster-reset required with --cluster-reset-restore-path")
	}
	return nil
}

// schedule takes snapshots until ctx ends.
func (s *server) schedule(ctx context.Context) error {
	if s.o.is("etcd-disable-snapshots") {
		return nil
	}
	plan, err := cron.ParseStandard(s.o.get("etcd-snapshot-schedule-cron"))
	if err != nil {
		return err
	}
	go func() { // ends with ctx
		for {
			if sleep(ctx, time.Until(plan.Next(time.Now()))+mathrand.N(snapshotJitter)) != nil {
				return
			}
			if err := s.takeSnapshot(ctx, s.o.get("etcd-snapshot-name"), true); err != nil && ctx.Err() == nil {
				slog.Error("Failed to take scheduled snapshot", "error", err)
			}
		}
	}()
	return nil
}

// takeSnapshot saves etcd's data here, and in the bucket if there is one. What
// fails there costs k3s nothing but a line in its log, and an error here; pruning
// is for scheduled snapshots.
func (s *server) takeSnapshot(ctx context.Context, name string, prune bool) error {
	dir, err := s.snapshotDir()
	if err != nil {
		return err
	}
	file := filepath.Join(dir, fmt.Sprintf("%s-%s-%d", name, s.n.name, time.Now().Round(time.Second).Unix()))
	slog.Info("Saving etcd snapshot to " + file)
	if err := s.etcd.save(ctx, file); err != nil {
		return err
	}
	if s.o.is("etcd-snapshot-compress") {
		if file, err = compress(file); err != nil {
			return fmt.Errorf("failed to compress snapshot: %w", err)
		}
	}
	if prune {
		if err := pruneDir(dir, name, s.o.number("etcd-snapshot-retention")); err != nil {
			return fmt.Errorf("failed to apply local snapshot retention policy: %w", err)
		}
	}
	if !s.o.is("etcd-s3") {
		return nil
	}
	b, err := s.bucket(ctx)
	if err != nil {
		return fmt.Errorf("unable to initialize S3 client: %w", err)
	}
	err = s.upload(ctx, b, file)
	if prune {
		// Also after a failure: a bucket that is full is a reason for one.
		err = errors.Join(err, b.prune(ctx, name))
	}
	if err == nil {
		slog.Info("S3 upload complete for " + filepath.Base(file))
	}
	return err
}

// pruneDir keeps the newest snapshots of a directory.
func pruneDir(dir, prefix string, keep int) error {
	if keep < 1 {
		return nil
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var names []string
	for _, entry := range entries {
		if !entry.IsDir() && strings.HasPrefix(entry.Name(), prefix) {
			names = append(names, entry.Name())
		}
	}
	slices.SortStableFunc(names, func(a, b string) int { return int(takenAt(b) - takenAt(a)) })
	for _, name := range names[min(len(names), keep):] {
		slog.Info("Removing local snapshot " + filepath.Join(dir, name))
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	return nil
}

// takenAt is the time in a snapshot's name, in seconds, or 0.
func takenAt(name string) int64 {
	name = strings.TrimSuffix(name, compressedExtension)
	at, _ := strconv.ParseInt(name[strings.LastIndexByte(name, '-')+1:], 10, 64)
	return at
}

func compress(file string) (string, error) {
	in, err := os.Open(file)
	if err != nil {
		return "", err
	}
	defer in.Close()
	out, err := os.OpenFile(file+compressedExtension, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return "", err
	}
	defer out.Close()
	archive := zip.NewWriter(out)
	entry, err := archive.Create(filepath.Base(file))
	if err != nil {
		return "", err
	}
	if _, err := io.Copy(entry, in); err != nil {
		return "", err
	}
	return file + compressedExtension, errors.Join(archive.Close(), os.Remove(file))
}

// decompress puts the snapshot of an archive beside it.
func decompress(file string) (string, error) {
	archive, err := zip.OpenReader(file)
	if err != nil {
		return "", err
	}
	defer archive.Close()
	if len(archive.File) != 1 {
		return "", fmt.Errorf("%s is not the archive of one snapshot", file)
	}
	in, err := archive.File[0].Open()
	if err != nil {
		return "", err
	}
	defer in.Close()
	plain := strings.TrimSuffix(file, compressedExtension)
	return plain, writeFrom(plain, in)
}

// writeFrom writes a file that only root reads.
func writeFrom(file string, in io.Reader) error {
	out, err := os.OpenFile(file, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// snapshotCommand is "etcd-snapshot save|ls|delete|prune", on a running server.
func snapshotCommand(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return errors.New("etcd-snapshot needs save, ls, delete or prune")
	}
	name, rest := "", []string{}
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
	s.secret = s.savedSecret()
	s.etcd = &etcd{o: o, n: n, pki: s.pki}
	dir, err := s.snapshotDir()
	if err != nil {
		return err
	}
	var b *bucket
	if args[0] != "save" && o.is("etcd-s3") {
		if b, err = s.bucket(ctx); err != nil {
			return fmt.Errorf("failed to initialize S3 client: %w", err)
		}
	}
	switch args[0] {
	case "save":
		if name == "" {
			name = "on-demand"
		}
		return s.takeSnapshot(ctx, name, false)
	case "ls", "list":
		return s.listSnapshots(ctx, dir, b)
	case "delete":
		for _, name := range names {
			name = filepath.Base(name)
			err := os.Remove(filepath.Join(dir, name))
			if b != nil {
				// Where it is not, there is nothing to do.
				err = b.remove(ctx, name)
			}
			if err != nil {
				return err
			}
		}
		return nil
	case "prune":
		if name == "" {
			name = o.get("etcd-snapshot-name")
		}
		if b != nil {
			if err := b.prune(ctx, name); err != nil {
				return err
			}
		}
		return pruneDir(dir, name, o.number("etcd-snapshot-retention"))
	}
	return fmt.Errorf("etcd-snapshot has no %s here", args[0])
}

func (s *server) listSnapshots(ctx context.Context, dir string, b *bucket) error {
	fmt.Println("Name Location Size Created")
	if b != nil {
		objects, err := b.list(ctx, "")
		if err != nil {
			return err
		}
		for _, object := range objects {
			fmt.Printf("%s s3://%s/%s %d %s\n", path.Base(*object.Key), b.name, *object.Key, *object.Size, object.LastModified.UTC().Format(time.RFC3339))
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		info, err := entry.Info()
		if err != nil {
			continue
		}
		fmt.Printf("%s file://%s %d %s\n", entry.Name(), filepath.Join(dir, entry.Name()), info.Size(), info.ModTime().UTC().Format(time.RFC3339))
	}
	return nil
}

// given finds the snapshot to restore: with --etcd-s3 that of its name in the
// bucket and nowhere else, without it the file at its path. k3s looks for a path
// that is not absolute in its data directory, where nobody has one.
func (s *server) given(ctx context.Context, snapshot string) (string, error) {
	if s.o.is("etcd-s3") {
		slog.Info("Retrieving etcd snapshot " + snapshot + " from S3")
		b, err := s.bucket(ctx)
		if err != nil {
			return "", fmt.Errorf("failed to initialize S3 client: %w", err)
		}
		dir, err := s.snapshotDir()
		if err != nil {
			return "", err
		}
		if snapshot, err = b.download(ctx, snapshot, dir); err != nil {
			return "", fmt.Errorf("failed to download snapshot from S3: %w", err)
		}
		slog.Info("S3 download complete for " + snapshot)
	}
	if info, err := os.Stat(snapshot); err != nil || info.IsDir() || !filepath.IsAbs(snapshot) {
		return "", fmt.Errorf("etcd: snapshot path does not exist: %s", snapshot)
	}
	if strings.HasSuffix(snapshot, compressedExtension) {
		return decompress(snapshot)
	}
	return snapshot, nil
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
		var err error
		if snapshot, err = s.given(ctx, snapshot); err != nil {
			return err
		}
		if exists(s.etcd.dir()) {
			if err := os.Rename(s.etcd.dir(), fmt.Sprintf("%s-old-%d", s.etcd.dir(), time.Now().Unix())); err != nil {
				return err
			}
		}
		s.etcd.name = s.n.name + "-" + randomHex(4)
		// In place, as k3s does: an interruption leaves half of it there.
		cmd := exec.CommandContext(ctx, "etcdctl", "snapshot", "restore", snapshot, "--skip-hash-check=true", "--name="+s.etcd.name, "--data-dir="+s.etcd.dir(),
			"--initial-cluster="+s.etcd.name+"="+s.etcd.peerURL(), "--initial-advertise-peer-urls="+s.etcd.peerURL())
		cmd.Env = append(os.Environ(), "ETCDCTL_API=3")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("restoring the snapshot: %w: %s", err, out)
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
