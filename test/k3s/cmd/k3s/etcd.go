package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"
)

const (
	etcdctlTimeout = 20 * time.Second
	// learnerPoll is how often learners are looked at; k3s takes 15 s.
	learnerPoll = 3 * time.Second
)

// etcd is the member of this server.
type etcd struct {
	o    *options
	n    node
	pki  pki
	name string
}

type member struct {
	ID         uint64   `json:"ID"`
	Name       string   `json:"name"`
	PeerURLs   []string `json:"peerURLs"`
	ClientURLs []string `json:"clientURLs"`
	IsLearner  bool     `json:"isLearner"`
}

func (e *etcd) dir() string       { return e.o.dataDir("server/db/etcd") }
func (e *etcd) peerURL() string   { return "https://" + e.n.ip.String() + ":2380" }
func (e *etcd) clientURL() string { return "https://" + e.n.ip.String() + ":2379" }

// initialized says whether this server was a member before: then flags that
// found or join are ignored.
func (e *etcd) initialized() bool { return exists(filepath.Join(e.dir(), "member/wal")) }

// setName gives the member a name of its own, which stays with its data.
func (e *etcd) setName(force bool) error {
	path := filepath.Join(e.dir(), "name")
	if content, err := os.ReadFile(path); err == nil && !force {
		if e.name = string(content); e.name == "" {
			return fmt.Errorf("the name of etcd's member in %s is empty", path)
		}
		return nil
	}
	if err := os.MkdirAll(e.dir(), 0o700); err != nil {
		return err
	}
	e.name = e.n.name + "-" + randomHex(4)
	return writeFile(path, []byte(e.name), 0o600)
}

// bury puts the data of a member that was removed aside, so that the server
// joins anew.
func (e *etcd) bury() error {
	if !exists(filepath.Join(e.dir(), "tombstone")) {
		return nil
	}
	slog.Info("tombstone file has been detected, removing data dir to rejoin the cluster")
	return os.Rename(e.dir(), fmt.Sprintf("%s-old-%d", e.dir(), time.Now().Unix()))
}

// start runs etcd. cluster is its initial one, "existing" or "new" its state.
func (e *etcd) start(g *group, cluster, state string) error { return e.run(g, cluster, state, false) }

// startForced runs etcd on the data that is there; alone makes it forget the
// other members.
func (e *etcd) startForced(g *group, alone bool) error { return e.run(g, "", "", alone) }

func (e *etcd) run(g *group, cluster, state string, alone bool) error {
	if err := os.MkdirAll(e.dir(), 0o700); err != nil {
		return err
	}
	var env []string
	if runtime.GOARCH == "arm64" {
		env = []string{"ETCD_UNSUPPORTED_ARCH=arm64"} // etcd 3.4 refuses to start without
	}
	args := []string{
		"etcd", "--name=" + e.name, "--data-dir=" + e.dir(),
		"--listen-client-urls=https://127.0.0.1:2379," + e.clientURL(), "--advertise-client-urls=" + e.clientURL(),
		"--listen-peer-urls=https://127.0.0.1:2380," + e.peerURL(), "--initial-advertise-peer-urls=" + e.peerURL(),
		"--client-cert-auth", "--trusted-ca-file=" + e.pki.path("etcd/server-ca.crt"),
		"--cert-file=" + e.pki.path("etcd/server-client.crt"), "--key-file=" + e.pki.path("etcd/server-client.key"),
		"--peer-client-cert-auth", "--peer-trusted-ca-file=" + e.pki.path("etcd/peer-ca.crt"),
		"--peer-cert-file=" + e.pki.path("etcd/peer-server-client.crt"), "--peer-key-file=" + e.pki.path("etcd/peer-server-client.key"),
		"--election-timeout=5000", "--heartbeat-interval=500", "--snapshot-count=10000", "--logger=zap", "--log-level=warn",
	}
	if cluster != "" {
		args = append(args, "--initial-cluster="+cluster, "--initial-cluster-state="+state)
	}
	if alone {
		args = append(args, "--force-new-cluster")
	}
	for _, arg := range e.o.all("etcd-arg") {
		args = append(args, "--"+arg)
	}
	c, err := g.start("etcd", "", env, args...)
	if err != nil {
		return err
	}
	go func() { // ends with etcd
		<-c.done
		if strings.Contains(tail(filepath.Join(logDir, "etcd.log")), "permanently removed from the cluster") {
			slog.Info("this node has been removed from the cluster please restart k3s to rejoin the cluster")
			_ = writeFile(filepath.Join(e.dir(), "tombstone"), nil, 0o600)
		}
	}()
	return nil
}

// ctl runs etcdctl against endpoints, the local one when there are none.
func (e *etcd) ctl(ctx context.Context, input []byte, endpoints []string, args ...string) ([]byte, error) {
	if len(endpoints) == 0 {
		endpoints = []string{"https://127.0.0.1:2379"}
	}
	ctx, cancel := context.WithTimeout(ctx, etcdctlTimeout)
	defer cancel()
	argv := append([]string{"--endpoints=" + strings.Join(endpoints, ","), "--cacert=" + e.pki.path("etcd/server-ca.crt"),
		"--cert=" + e.pki.path("etcd/client.crt"), "--key=" + e.pki.path("etcd/client.key"), "--dial-timeout=2s", "--command-timeout=10s"}, args...)
	cmd := exec.CommandContext(ctx, "etcdctl", argv...)
	cmd.Env = append(os.Environ(), "ETCDCTL_API=3")
	cmd.Stdin, cmd.WaitDelay = bytes.NewReader(input), time.Second
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("etcdctl %s: %w: %s", args[0], err, strings.TrimSpace(errs.String()))
	}
	return out.Bytes(), nil
}

// save writes a snapshot, which etcdctl makes beside its place and renames.
func (e *etcd) save(ctx context.Context, file string) error {
	ctx, cancel := context.WithTimeout(ctx, saveTimeout)
	defer cancel()
	// The whole command has no timeout: it takes as long as there is data.
	cmd := exec.CommandContext(ctx, "etcdctl", "--endpoints=https://127.0.0.1:2379", "--cacert="+e.pki.path("etcd/server-ca.crt"),
		"--cert="+e.pki.path("etcd/client.crt"), "--key="+e.pki.path("etcd/client.key"), "snapshot", "save", file)
	cmd.Env, cmd.WaitDelay = append(os.Environ(), "ETCDCTL_API=3"), time.Second
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("saving the snapshot: %w: %s", err, out)
	}
	return nil
}

func (e *etcd) members(ctx context.Context, endpoints ...string) ([]member, error) {
	out, err := e.ctl(ctx, nil, endpoints, "member", "list", "--write-out=json")
	if err != nil {
		return nil, err
	}
	var list struct {
		Members []member `json:"members"`
	}
	return list.Members, json.Unmarshal(out, &list)
}

// join makes this server a learner of the cluster and starts it.
func (e *etcd) join(ctx context.Context, g *group, a *access) error {
	info, err := a.get(ctx, "/db/info")
	if err != nil {
		return err
	}
	var known struct {
		Members []member `json:"members"`
	}
	if err := json.Unmarshal(info, &known); err != nil {
		return err
	}
	var endpoints []string
	for _, m := range known.Members {
		endpoints = append(endpoints, m.ClientURLs...)
	}
	for {
		members, err := e.members(ctx, endpoints...)
		if err != nil {
			return fmt.Errorf("listing the members of etcd: %w", err)
		}
		add := true
		var cluster []string
		for _, m := range members {
			mine := len(m.PeerURLs) > 0 && m.PeerURLs[0] == e.peerURL()
			if m.Name == "" && mine {
				m.Name = e.name
			}
			if m.Name == e.name && mine {
				add = false
			}
			nodeName := m.Name
			if hyphen := strings.LastIndex(m.Name, "-"); hyphen > 1 {
				nodeName = m.Name[:hyphen]
			}
			if m.Name != e.name && nodeName == e.n.name {
				_ = os.Remove(filepath.Join(e.dir(), "name"))
				return errors.New("ETCD join failed: duplicate node name found, please use a unique name for this node")
			}
			if len(m.PeerURLs) > 0 {
				cluster = append(cluster, m.Name+"="+m.PeerURLs[0])
			}
		}
		if add {
			slog.Info("Adding member to etcd cluster", "name", e.name, "peer", e.peerURL(), "cluster", cluster)
			_, err := e.ctl(ctx, nil, endpoints, "member", "add", e.name, "--learner", "--peer-urls="+e.peerURL())
			if err != nil && (strings.Contains(err.Error(), "too many learner") || strings.Contains(err.Error(), "unhealthy cluster")) {
				slog.Info("Waiting for other members to finish joining etcd cluster", "error", err)
				if err := sleep(ctx, time.Second); err != nil {
					return err
				}
				continue
			}
			if err != nil {
				return fmt.Errorf("ETCD join failed: %w", err)
			}
			cluster = append(cluster, e.name+"="+e.peerURL())
		}
		slog.Info("Starting etcd", "cluster", cluster)
		return e.start(g, strings.Join(cluster, ","), "existing")
	}
}

// ready waits until this member answers and votes.
func (e *etcd) ready(ctx context.Context) error {
	return poll(ctx, time.Second, func() (bool, error) {
		out, err := e.ctl(ctx, nil, nil, "endpoint", "status", "--write-out=json")
		if err != nil {
			slog.Info("Failed to test data store connection", "error", err)
			return false, nil
		}
		var status []struct {
			Status struct {
				Leader    uint64 `json:"leader"`
				IsLearner bool   `json:"isLearner"`
			}
		}
		if err := json.Unmarshal(out, &status); err != nil || len(status) == 0 || status[0].Status.Leader == 0 {
			return false, nil
		}
		if status[0].Status.IsLearner {
			slog.Info("Failed to test data store connection: this server has not yet been promoted from learner to voting member")
			return false, nil
		}
		// A linearizable read: etcd has a quorum.
		if _, err := e.ctl(ctx, nil, nil, "get", "/bootstrap", "--keys-only"); err != nil {
			slog.Info("Failed to test data store connection", "error", err)
			return false, nil
		}
		return true, nil
	})
}

// promote makes learners that caught up voting members, until ctx ends.
func (e *etcd) promote(ctx context.Context) {
	for sleep(ctx, learnerPoll) == nil {
		members, err := e.members(ctx)
		if err != nil {
			continue
		}
		for _, m := range members {
			if m.IsLearner && m.Name != e.name {
				if _, err := e.ctl(ctx, nil, nil, "member", "promote", formatID(m.ID)); err != nil {
					slog.Info("The learner is not in sync yet", "member", m.Name, "error", err)
				} else {
					slog.Info("Promoted learner to voting member", "member", m.Name)
				}
			}
		}
	}
}

// remove takes a member out, by its name or address.
func (e *etcd) remove(ctx context.Context, name, address string) error {
	members, err := e.members(ctx)
	if err != nil {
		return err
	}
	for _, m := range members {
		if m.Name == name || len(m.PeerURLs) > 0 && m.PeerURLs[0] == "https://"+address+":2380" {
			slog.Info("Removing member from etcd cluster", "member", m.Name)
			if _, err := e.ctl(ctx, nil, nil, "member", "remove", formatID(m.ID)); err != nil {
				return err
			}
		}
	}
	return nil
}

func formatID(id uint64) string { return strconv.FormatUint(id, 16) }
