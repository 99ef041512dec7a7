package bootstrap

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"
	"sigs.k8s.io/yaml"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/artifact"
	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
	"github.com/hearth-sh/hearth/internal/host"
	"github.com/hearth-sh/hearth/internal/k3s"
	"github.com/hearth-sh/hearth/internal/k3s/election"
	"github.com/hearth-sh/hearth/internal/k3s/join"
	"github.com/hearth-sh/hearth/internal/k3s/pki"
	"github.com/hearth-sh/hearth/internal/nodeconfig"
	"github.com/hearth-sh/hearth/internal/systemd"
	"github.com/hearth-sh/hearth/packaging/chart"
	"github.com/hearth-sh/hearth/packaging/spinkube"
)

// CodeRestore: k3s did not restore the snapshot.
const CodeRestore fault.Code = "restore-failed"

// electionFile is this machine's part in the election, in the state directory.
const electionFile = "election.json"

// elect finds out what this machine founds or joins, and through whom.
func (m *machine) elect(ctx context.Context) error {
	if m.decision != nil && m.decision.Hold != nil {
		m.decision.Hold.Close()
	}
	m.decision = nil
	if m.elector == nil {
		var err error
		if m.elector, err = m.newElector(); err != nil {
			return err
		}
	}
	m.rec.doing("asking %s who founds the cluster", m.spec.Cluster.Store)
	d, err := m.elector.Elect(ctx)
	if err != nil {
		return err
	}
	m.decision = d
	m.rec.node(func(n *NodeResult) { n.Generation, n.Action = d.Generation, string(d.Action) })
	m.membership, err = m.findMembership(ctx)
	return err
}

func (m *machine) newElector() (*election.Elector, error) {
	config := m.aws.Copy()
	if r := m.spec.Cluster.Region; r != "" {
		config.Region = r
	}
	store, err := election.Open(m.spec.Cluster.Store, election.OpenOptions{AWS: config, PathStyle: pathStyle(), KMSKeyID: m.spec.Cluster.KMSKey})
	if err != nil {
		return nil, err
	}
	o := election.Options{
		Store: store, Instance: m.snapshot.Identity.InstanceID, Server: m.spec.Role == v1alpha1.RoleServer,
		State: election.NewFileState(filepath.Join(m.o.StateDir, electionFile)), Discard: m.discard, DataPresent: m.dataPresent,
		Lease: duration(m.spec.Cluster.Lease), FoundWithin: duration(m.spec.Timeouts.Ready) + installWithin, RestoreWithin: restoreWithin,
		Timeout: duration(m.spec.Timeouts.Join), Logger: m.log,
	}
	if r := m.spec.Cluster.Restore; r != nil {
		o.Restore = &election.Restore{Generation: r.Generation, Snapshot: r.Snapshot}
	}
	return election.New(o)
}

// dataPresent says whether this machine has a member of etcd.
func (m *machine) dataPresent() (bool, error) {
	s, err := k3s.ReadState("/", m.paths)
	return s.Etcd, err
}

// discardWithin bounds stopping a k3s that nobody wants.
const discardWithin = 90 * time.Second

// discard removes what this machine made of a generation that was given up.
func (m *machine) discard(ctx context.Context, generation int) error {
	m.rec.doing("removing what was made of generation %d, which was given up", generation)
	if err := m.connect(ctx); err != nil {
		return err
	}
	if err := m.systemd.Stop(ctx, k3s.Unit(m.spec.Role), discardWithin); err != nil {
		return err
	}
	if _, err := m.systemd.Disable(ctx, k3s.Unit(m.spec.Role)); err != nil {
		return err
	}
	if _, err := k3s.Cleanup(ctx, k3s.CleanupOptions{Paths: m.paths, Data: k3s.ClusterData}); err != nil {
		return err
	}
	m.discarded = true
	m.rec.changed()
	m.rec.warn("what was made of generation %d was removed: another server founded the cluster", generation)
	return nil
}

// findMembership decides through whom this machine is part of the cluster. What
// an earlier run decided stands for as long as the data is of the same
// generation and it leads into the cluster: k3s keeps its own list of servers,
// but only from when it has seen one of them.
func (m *machine) findMembership(ctx context.Context) (k3s.Membership, error) {
	d := m.decision
	membership := k3s.Membership{
		ServerToken: d.Credentials.ServerToken, AgentToken: d.Credentials.AgentToken, Addons: m.spec.Role == v1alpha1.RoleServer,
	}
	state, err := k3s.ReadState("/", m.paths)
	if err != nil {
		return membership, err
	}
	if d.Action == election.ActionFound {
		membership.Founder = true
		// k3s would make it without syncing it, and be refused by the cluster
		// that it founded after a loss of power.
		_, err := m.nodePassword(ctx)
		return membership, err
	}
	if state.Marker != nil && state.Marker.Generation == d.Generation && state.Marker.Role == m.spec.Role && state.Marker.Node == m.snapshot.Identity.InstanceID &&
		(state.Etcd || state.AgentData) {
		before, err := readMembership(k3s.HearthConfig)
		stands := err == nil && (before.Founder || before.Server != "")
		// Only agents need the server after the first start: others have data.
		if stands && !before.Founder && !state.Etcd {
			if stands, err = leadsIn(ctx, before.Server, m.runs); err != nil {
				return membership, err
			}
			if !stands {
				m.rec.note("the server it joined through, %s, does not answer", before.Server)
			}
		}
		if stands {
			membership.Founder, membership.Server = before.Founder, before.Server
			m.rec.note("is part of generation %d already", d.Generation)
			return membership, nil
		}
	}
	if d.Action == election.ActionContinue && len(d.Servers) == 0 {
		membership.Founder = true // nobody else ever was
		return membership, nil
	}
	membership.Server, err = m.preflightJoin(ctx)
	return membership, err
}

// leadsIn says whether an agent can go on with the server that it joined through:
// it runs, whoever it runs with by now, or the server is there. It may have gone
// before k3s had its list of the others, and a loss of power may have emptied
// that; k3s would then ask for the dead one for ever.
func leadsIn(ctx context.Context, server string, runs func(context.Context) (bool, error)) (bool, error) {
	if active, err := runs(ctx); err != nil || active {
		return active, err
	}
	u, err := url.Parse(server)
	return err == nil && answersAt(ctx, u.Host), nil
}

// runs says whether k3s is up.
func (m *machine) runs(ctx context.Context) (bool, error) {
	if err := m.connect(ctx); err != nil {
		return false, err
	}
	unit, err := m.systemd.Unit(ctx, k3s.Unit(m.spec.Role))
	return unit.Active(), err
}

// readMembership reads from k3s's configuration what an earlier run decided.
func readMembership(path string) (k3s.Membership, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return k3s.Membership{}, err
	}
	var config struct {
		Server      string `json:"server"`
		ClusterInit bool   `json:"cluster-init"`
	}
	if err := yaml.Unmarshal(b, &config); err != nil {
		return k3s.Membership{}, fmt.Errorf("read %s: %w", path, err)
	}
	return k3s.Membership{Founder: config.ClusterInit, Server: config.Server}, nil
}

// preflightJoin finds a server that lets this machine in.
func (m *machine) preflightJoin(ctx context.Context) (string, error) {
	d := m.decision
	var servers []string
	if s := m.spec.Cluster.Server; s != "" {
		servers = append(servers, strings.TrimSuffix(strings.TrimPrefix(s, "https://"), "/"))
	}
	for _, s := range d.Servers {
		if s.Instance != m.snapshot.Identity.InstanceID {
			servers = append(servers, s.Address)
		}
	}
	m.rec.doing("asking %s to let this machine in", strings.Join(servers, ", "))
	password, err := m.nodePassword(ctx)
	if err != nil {
		return "", err
	}
	o := join.Options{
		Servers: servers, ServerCA: d.Credentials.ServerCA, AgentToken: d.Credentials.AgentToken,
		NodeName: m.snapshot.Identity.InstanceID, NodePassword: password, Version: m.spec.K3s.Version, Logger: m.log,
		Timeout: duration(m.spec.Timeouts.Join),
	}
	if m.spec.Role == v1alpha1.RoleServer {
		o.ServerToken = d.Credentials.ServerToken
	}
	result, err := join.Preflight(ctx, o)
	if err != nil {
		return "", err
	}
	m.rec.note("%s lets this machine in (k3s %s)", result.Server, result.Version)
	if m.spec.Role == v1alpha1.RoleServer {
		m.removeDead(ctx, result.Server)
	}
	return result.Server, nil
}

// passwordDir is recorded like every file, so that a reset leaves neither it nor
// the directories above it.
var passwordDir = host.File{Path: filepath.Dir(join.NodePasswordFile), Mode: fs.ModeDir | 0o755, Reason: "what proves a node's name to servers"}

// nodePassword is this machine's, which is made before k3s would do so.
func (m *machine) nodePassword(ctx context.Context) (join.Password, error) {
	if err := m.apply(ctx, []host.File{passwordDir}); err != nil {
		return join.Password{}, err
	}
	return join.NodePassword(join.NodePasswordFile)
}

// node is the identity as k3s's configuration needs it.
func node(s Snapshot) k3s.Node {
	id := s.Identity
	return k3s.Node{
		InstanceID: id.InstanceID, InstanceType: id.InstanceType, Region: id.Region, Zone: id.Zone, LifeCycle: string(id.LifeCycle),
		IPv4: id.LocalIPv4, IPv6: id.LocalIPv6, ServicesDomain: id.ServicesDomain,
	}
}

// proxy is the environment's: k3s gets what bootstrap has.
func proxy() k3s.Proxy {
	get := func(names ...string) string {
		for _, n := range names {
			if v := os.Getenv(n); v != "" {
				return v
			}
		}
		return ""
	}
	return k3s.Proxy{HTTP: get("HTTP_PROXY", "http_proxy"), HTTPS: get("HTTPS_PROXY", "https_proxy"), No: get("NO_PROXY", "no_proxy")}
}

// files are all files of this node but artifacts and the kernel's.
func (m *machine) files(membership k3s.Membership) (k3s.Rendered, error) {
	airgap := slices.ContainsFunc(m.artifacts, func(a artifact.Artifact) bool {
		return a.Name == nodeconfig.ArtifactAirgap || a.Name == nodeconfig.ArtifactHearthImage
	})
	rendered, err := k3s.Render(k3s.Input{
		Config: m.spec, Node: node(m.snapshot), Membership: membership, Paths: m.paths, Proxy: proxy(),
		Charts: map[string][]byte{k3s.AddonHearth: chart.Archive()}, Values: map[string]map[string]any{k3s.AddonHearth: chartValues(m.o.Version)}, SpinKubeCRDs: spinkube.CRDs(), AirgapImages: airgap,
	})
	rendered.Files = append(rendered.Files, aliases(m.artifacts)...)
	rendered.Files = append(rendered.Files, passwordDir)
	return rendered, err
}

// chartValues are those of our chart: the image that was made together with this
// bootstrap, under the name that `make image` gives it. The chart's own default
// would be that of whoever last wrote a version into it.
func chartValues(version string) map[string]any {
	return map[string]any{"image": map[string]any{"tag": chart.ImageTag(version)}}
}

// install writes what k3s reads when it starts.
func (m *machine) install(ctx context.Context) error {
	if m.discarded {
		// Manifests among the artifacts went with the data.
		if err := m.fetch(ctx); err != nil {
			return err
		}
		m.discarded = false
	}
	d := m.decision
	rendered, err := m.files(m.membership)
	if err != nil {
		return err
	}
	marker, err := k3s.Marker{
		Cluster: m.spec.Cluster.Name, Generation: d.Generation, Role: m.spec.Role, Node: m.snapshot.Identity.InstanceID,
		CAHash: d.Credentials.AgentToken.CAHash(),
	}.File(m.paths)
	if err != nil {
		return err
	}
	files := append(rendered.Files, marker)
	if d.Credentials.Authorities != nil {
		authorities, err := m.authorities(d.Credentials.Authorities, d.Action == election.ActionFound)
		if err != nil {
			return err
		}
		files = append(files, authorities...)
	}
	if err := m.apply(ctx, files); err != nil {
		return err
	}
	if len(rendered.Absent) > 0 {
		changes, err := m.host.Retire(ctx, rendered.Absent...)
		if err != nil {
			return err
		}
		if len(changes.Removed)+len(changes.Restored) > 0 {
			m.rec.changed()
			m.rec.note("removed %s", strings.Join(append(changes.Removed, changes.Restored...), ", "))
			for _, warning := range left(m.paths, changes.Removed) {
				m.rec.warn("%s", warning)
			}
		}
	}
	if d.Restore != nil {
		return m.restore(ctx, d.Restore.Snapshot)
	}
	return nil
}

// authorities are the files of the generation's authorities that a founder does
// not have yet, and on any server those that a loss of power left without
// content, since k3s writes what it got from another server without syncing it.
// The rest is k3s's: it rotates what it has.
func (m *machine) authorities(a *pki.Authorities, founder bool) ([]host.File, error) {
	made, err := a.Files()
	if err != nil {
		return nil, err
	}
	var files []host.File
	for _, f := range made {
		name := filepath.Join(m.paths.ServerTLS, filepath.FromSlash(f.Path))
		torn, err := k3s.Torn(name)
		if err != nil {
			return nil, err
		}
		if _, err := os.Lstat(name); err == nil && !torn || err != nil && !founder {
			continue
		}
		files = append(files, host.File{
			Path: name, Content: f.Data, Mode: f.Mode, Secret: f.Mode.Perm()&0o077 == 0, Reason: "the authorities of this generation",
		})
	}
	return files, nil
}

// restoreWithin bounds fetching a snapshot and putting etcd back.
const restoreWithin = 10 * time.Minute

// installWithin is the deadline of the phase that also restores.
func (m *machine) installWithin() time.Duration {
	// Also where another server began the restore, which nobody asked of this one.
	if m.decision != nil && m.decision.Restore != nil {
		return installWithin + restoreWithin
	}
	return installWithin
}

// restore puts etcd's data back from a snapshot.
func (m *machine) restore(ctx context.Context, snapshot string) error {
	return restoreOnce(m.paths, m.decision.Generation, func() error {
		// A server of the generation that was lost may still try to be one.
		if err := m.connect(ctx); err != nil {
			return err
		}
		if err := m.systemd.Stop(ctx, k3s.Unit(m.spec.Role), discardWithin); err != nil {
			return err
		}
		m.rec.doing("restoring etcd from %s", snapshot)
		ctx, cancel := context.WithTimeout(ctx, restoreWithin)
		defer cancel()
		command := exec.CommandContext(ctx, k3s.Binary, k3s.RestoreArguments(snapshot)...)
		command.WaitDelay = 10 * time.Second
		out, err := command.CombinedOutput()
		if err != nil {
			return fault.New(CodeRestore, err, "see whether the snapshot is in spec.cluster.snapshots.bucket, then run "+strings.Join(command.Args, " "),
				"k3s did not restore %s: %s", snapshot, lastLines(out))
		}
		m.rec.changed()
		m.rec.note("restored etcd from %s", snapshot)
		return nil
	})
}

// restoreOnce does it unless it was done for the generation. That there is data
// of etcd says nothing: it may be what an interruption left, or that of the
// generation that was lost. The former is removed, since k3s would start with
// what there is of it; the latter is put aside by k3s (db/etcd-old-TIME).
func restoreOnce(paths k3s.Paths, generation int, restore func() error) error {
	done := []byte(strconv.Itoa(generation) + "\n")
	if b, err := os.ReadFile(paths.Restored); err == nil && bytes.Equal(b, done) {
		return nil
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("look whether etcd was restored: %w", err)
	}
	_, err := os.Lstat(paths.Restoring)
	interrupted := err == nil
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("look for %s: %w", paths.Restoring, err)
	}
	gone := []string{paths.ResetFlag} // k3s would refuse to do it twice
	if interrupted {
		gone = append(gone, paths.EtcdDir)
	}
	for _, name := range gone {
		if err := os.RemoveAll(name); err != nil {
			return fmt.Errorf("remove what an interrupted restore left: %w", err)
		}
	}
	dir := filepath.Dir(paths.Restoring)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make the directory of etcd's data: %w", err)
	}
	err = os.WriteFile(paths.Restoring, nil, 0o600)
	if err = errors.Join(err, flush(dir)); err != nil {
		return fmt.Errorf("remember that etcd is being restored: %w", err)
	}
	if err := restore(); err != nil {
		return err
	}
	// k3s does not sync all that it wrote: it must not be less than what is
	// remembered of it.
	if err := flush(dir); err != nil {
		return fmt.Errorf("keep the restored data: %w", err)
	}
	err = renameio.WriteFile(paths.Restored, done, 0o600, renameio.WithTempDir(dir))
	if err = errors.Join(err, os.Remove(paths.Restoring), flush(dir)); err != nil {
		return fmt.Errorf("remember that etcd is restored: %w", err)
	}
	return nil
}

// flush writes the file system of a directory to its disk.
func flush(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer func() { _ = d.Close() }()
	if err := unix.Syncfs(int(d.Fd())); err != nil {
		return fmt.Errorf("sync the file system of %s: %w", dir, err)
	}
	return nil
}

// lastLines is the end of a program's output, for a message.
func lastLines(out []byte) string {
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	return strings.Join(lines[max(0, len(lines)-3):], "; ")
}

func (m *machine) connect(ctx context.Context) error {
	if m.systemd != nil {
		return nil
	}
	var err error
	m.systemd, err = systemd.Connect(ctx, systemd.Options{})
	return err
}

// inputs are the files that a running k3s was started from.
func (m *machine) inputs(membership k3s.Membership) (systemd.Inputs, error) {
	rendered, err := m.files(membership)
	if err != nil {
		return systemd.Inputs{}, err
	}
	return m.verified.ReadInputs(m.inputPaths(rendered)...)
}

// inputPaths are those of the files that k3s starts from.
func (m *machine) inputPaths(rendered k3s.Rendered) []string {
	var paths []string
	for _, f := range rendered.Files {
		// Servers apply manifests by themselves.
		if !f.Mode.IsDir() && !strings.HasPrefix(f.Path, m.paths.Manifests+"/") {
			paths = append(paths, f.Path)
		}
	}
	for _, a := range m.artifacts {
		if filepath.Dir(a.Path) == k3s.ShimDir && a.Name != "nodeagent" || filepath.Dir(a.Path) == k3s.CredentialProviderDir {
			paths = append(paths, a.Path)
		}
	}
	slices.Sort(paths)
	return slices.Compact(paths)
}

// maxRestarts is how often k3s may fail to come up within a start. One that
// joins fails while the server it joins through is busy with another one.
const maxRestarts = 10

// startPoll is between two looks at k3s's unit: every node waits half of it.
const startPoll = 50 * time.Millisecond

// start has systemd start k3s, or restart one that was started from something
// else than what is there now.
func (m *machine) start(ctx context.Context) error {
	if err := m.connect(ctx); err != nil {
		return err
	}
	name := k3s.Unit(m.spec.Role)
	inputs, err := m.inputs(m.membership)
	if err != nil {
		return err
	}
	unit, err := m.systemd.Unit(ctx, name)
	if err != nil {
		return err
	}
	// systemd reads a unit that it is asked for the first time; reading all of
	// them again is what takes long, on a machine with many.
	if unit.NeedsReload || unit.LoadState != "loaded" {
		if err := m.systemd.Reload(ctx); err != nil {
			return err
		}
		if unit, err = m.systemd.Unit(ctx, name); err != nil {
			return err
		}
	}
	restart, why := systemd.NeedsRestart(systemd.DefaultMarkerDir, unit, inputs)
	if unit.Active() && !restart {
		m.rec.note("%s runs with what is there", name)
		m.unit = unit
		return nil
	}
	if !unit.Active() {
		torn, err := k3s.RemoveTorn(m.paths)
		for _, name := range torn {
			m.rec.changed()
			m.rec.note("removed %s, which a loss of power left without content; k3s makes it anew", name)
		}
		if err != nil {
			return err
		}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if hold := m.decision.Hold; hold != nil {
		// No sense in waiting for what nobody will join.
		stop := make(chan struct{})
		done := make(chan struct{})
		go func() {
			defer close(done)
			select {
			case <-hold.Fenced():
				cancel(election.ErrFenced)
			case <-stop:
			}
		}()
		defer func() { close(stop); <-done }()
	}
	deadline, _ := ctx.Deadline()
	options := systemd.WaitOptions{
		Timeout: time.Until(deadline), MaxRestarts: maxRestarts, Poll: startPoll,
		Progress: func(p systemd.Progress) {
			text := p.Unit.ActiveState
			if n := len(p.Journal); n > 0 {
				text += ": " + p.Journal[n-1]
			}
			m.rec.doing("%s is %s", name, text)
		},
	}
	m.rec.changed()
	if restart && why != "" && unit.ActiveState != "inactive" && unit.ActiveState != "failed" {
		m.rec.note("restarting %s: %s", name, why)
		m.unit, err = m.systemd.Restart(ctx, name, options)
	} else {
		if err := m.systemd.ResetFailed(ctx, name); err != nil {
			return err
		}
		m.unit, err = m.systemd.Start(ctx, name, options)
	}
	if cause := context.Cause(ctx); errors.Is(cause, election.ErrFenced) {
		return fault.New(election.CodeFenced, election.ErrFenced, "", "this server's attempt to found the cluster was given up by another")
	}
	if err != nil {
		return err
	}
	return systemd.MarkStarted(systemd.DefaultMarkerDir, m.unit, inputs)
}

// address is where others reach this server.
func (m *machine) address() string {
	id := m.snapshot.Identity
	for _, a := range []netip.Addr{id.LocalIPv4, id.LocalIPv6} {
		if a.IsValid() {
			return a.String()
		}
	}
	return ""
}

// ready makes a founder's cluster the one that others join, and waits until
// the node is Ready.
func (m *machine) ready(ctx context.Context) error {
	d := m.decision
	name := k3s.Unit(m.spec.Role)
	if d.Hold != nil {
		m.rec.doing("announcing that the cluster is founded")
		if err := d.Hold.Found(ctx, m.address()); err != nil {
			return err
		}
		m.rec.note("founded generation %d of cluster %s", d.Generation, m.spec.Cluster.Name)
		d.Hold = nil
	}
	// From here on systemd may start it at boot: it is part of a cluster.
	if changed, err := m.systemd.Enable(ctx, name); err != nil {
		return err
	} else if changed {
		m.rec.changed()
	}
	looked := time.Now()
	watch := func(ctx context.Context) error {
		if time.Since(looked) < time.Second {
			return nil
		}
		looked = time.Now()
		unit, err := m.systemd.Unit(ctx, name)
		if err != nil {
			return nil //nolint:nilerr // systemd that is busy is asked again
		}
		if unit.ActiveState == "failed" || unit.Restarts > m.unit.Restarts+maxRestarts {
			return fault.Passing(systemd.CodeUnitLoops, nil, "see journalctl -u "+name, "%s does not stay up: %s", name, unit)
		}
		return nil
	}
	state, err := waitReady(ctx, m.paths.KubeletKubeconfig, m.snapshot.Identity.InstanceID, m.unit.Started, watch, m.rec.doing)
	if err != nil {
		return m.whyNotReady(ctx, name, err)
	}
	m.rec.note("the node is Ready, kubelet %s", state.Version)
	if err := m.label(ctx, state); err != nil {
		m.rec.warn("the node has not got the labels of its configuration: %s; the next run tries again", oneLine(err))
	}
	if m.spec.Role != v1alpha1.RoleServer {
		return nil
	}
	return m.elector.Announce(ctx, d.Generation, m.address())
}

// unitWithin bounds asking systemd for one unit after the time was up.
const unitWithin = 5 * time.Second

// whyNotReady says so where the node is not Ready because k3s does not stay up.
func (m *machine) whyNotReady(ctx context.Context, name string, err error) error {
	if errors.Is(ctx.Err(), context.Canceled) || fault.CodeOf(err) == systemd.CodeUnitLoops {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), unitWithin)
	defer cancel()
	unit, failed := m.systemd.Unit(ctx, name)
	if failed != nil || unit.Active() && unit.Restarts <= m.unit.Restarts {
		return err
	}
	return fault.Passing(systemd.CodeUnitLoops, err, "see journalctl -u "+name, "%s does not stay up: %s", name, unit)
}
