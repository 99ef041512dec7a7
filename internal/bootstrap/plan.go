package bootstrap

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"strings"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/artifact"
	"github.com/hearth-sh/hearth/internal/host"
	"github.com/hearth-sh/hearth/internal/k3s"
	"github.com/hearth-sh/hearth/internal/k3s/election"
	"github.com/hearth-sh/hearth/internal/k3s/pki"
	"github.com/hearth-sh/hearth/internal/systemd"
)

// KindPlan is the kind of a Plan document.
const KindPlan = "BootstrapPlan"

// Plan is what `bootstrap run` would change.
type Plan struct {
	APIVersion string     `json:"apiVersion"`
	Kind       string     `json:"kind"`
	Node       NodeResult `json:"node"`
	// Changes says whether anything would be changed.
	Changes bool `json:"changes"`
	// Findings are those of the preflight.
	Findings  []host.Finding      `json:"findings"`
	Downloads []Download          `json:"downloads"`
	Kernel    []host.KernelChange `json:"kernel,omitempty"`
	// Files are all that bootstrap would look after, changed or not.
	Files []host.Change `json:"files"`
	// Retired are files of an earlier configuration that would go.
	Retired []string `json:"retired,omitempty"`
	// Units are services that would be started, restarted or enabled.
	Units []UnitChange `json:"units,omitempty"`
	// Commands are programs that would be run.
	Commands []string `json:"commands,omitempty"`
	// Notes say what depends on others and is decided when it runs.
	Notes []string `json:"notes,omitempty"`
}

// Download is an artifact as it is and as it would be.
type Download struct {
	Name    string         `json:"name"`
	Version string         `json:"version,omitempty"`
	Path    string         `json:"path"`
	State   artifact.State `json:"state"`
	Reason  string         `json:"reason,omitempty"`
	// Bytes would be downloaded; -1 if that is not known.
	Bytes int64    `json:"bytes"`
	URLs  []string `json:"urls,omitempty"`
}

// UnitChange is something that systemd would be asked to do.
type UnitChange struct {
	Name   string `json:"name"`
	Action string `json:"action"` // enable, start, restart
	Reason string `json:"reason,omitempty"`
}

// planWithin bounds making a plan.
const planWithin = 2 * time.Minute

// MakePlan says what Run would do, and touches nothing: nothing on this
// machine, and nothing in the cluster's store.
func MakePlan(ctx context.Context, o Options) (Plan, error) {
	ctx, cancel := context.WithTimeout(ctx, planWithin)
	defer cancel()
	if o.StateDir == "" {
		o.StateDir = DefaultStateDir
	}
	p := Plan{APIVersion: v1alpha1.APIVersion, Kind: KindPlan}
	// Nobody listens, and nothing is kept.
	m := &machine{o: o, log: o.Logger, rec: &recorder{begin: time.Now(), log: o.Logger}, paths: k3s.DefaultPaths()}
	defer m.close()
	if err := m.discover(ctx); err != nil {
		return p, classify(ctx, PhaseDiscover, planWithin, err)
	}
	if err := m.configure(ctx); err != nil {
		return p, classify(ctx, PhaseConfigure, planWithin, err)
	}
	p.Notes = append(p.Notes, m.resolved.Notes...)
	for _, step := range []func(context.Context, *Plan) error{m.planHost, m.planArtifacts, m.planCluster} {
		if err := step(ctx, &p); err != nil {
			return p, classify(ctx, PhaseConfigure, planWithin, err)
		}
	}
	p.Node = m.rec.result.Node
	p.Changes = len(p.Kernel)+len(p.Units)+len(p.Commands)+len(p.Retired) > 0
	for _, d := range p.Downloads {
		p.Changes = p.Changes || d.State != artifact.StatePresent
	}
	for _, f := range p.Files {
		p.Changes = p.Changes || f.Changed()
	}
	return p, nil
}

func (m *machine) planHost(ctx context.Context, p *Plan) error {
	r, err := m.requirements(readClocks(ctx, clockSources(m.snapshot.Identity)))
	if err != nil {
		return err
	}
	if p.Findings, err = m.host.Preflight(ctx, r); err != nil {
		return err
	}
	if p.Kernel, err = m.host.PlanKernel(ctx, m.kernel); err != nil {
		return err
	}
	for _, c := range p.Kernel {
		p.Commands = append(p.Commands, c.Command)
	}
	files, err := m.host.KernelFiles(m.kernel)
	if err != nil {
		return err
	}
	p.Files, err = m.host.Plan(ctx, files)
	return err
}

func (m *machine) planArtifacts(ctx context.Context, p *Plan) error {
	f, err := m.fetcher(nil)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := m.pin(ctx, f.InspectManifest); err != nil {
		return err
	}
	statuses, err := f.Inspect(ctx, m.artifacts)
	for _, s := range statuses {
		d := Download{Name: s.Artifact.Name, Version: s.Artifact.Version, Path: s.Artifact.Path, State: s.State, Reason: s.Reason, Bytes: s.Download}
		if s.State == artifact.StateMissing || s.State == artifact.StateDiffers {
			d.URLs = s.Artifact.URLs
		}
		p.Downloads = append(p.Downloads, d)
	}
	return err
}

// planCluster shows the files for what this machine would most likely be, which
// only the election decides.
func (m *machine) planCluster(ctx context.Context, p *Plan) error {
	state, err := k3s.ReadState("/", m.paths)
	if err != nil {
		return err
	}
	name := k3s.Unit(m.spec.Role)
	membership := k3s.Membership{Addons: m.spec.Role == v1alpha1.RoleServer}
	before, err := readMembership(k3s.HearthConfig)
	known := err == nil && state.Marker != nil && (before.Founder || before.Server != "")
	switch {
	case known:
		membership.Founder, membership.Server = before.Founder, before.Server
		m.rec.node(func(n *NodeResult) { n.Generation, n.Action = state.Marker.Generation, string(election.ActionContinue) })
	case m.spec.Role == v1alpha1.RoleServer:
		membership.Founder = true
		p.Notes = append(p.Notes, "shown as the first server; if another one founded the cluster, this one joins it and has `server` in place of `cluster-init`")
	default:
		membership.Server = "https://SERVER-FROM-THE-STORE:6443"
		p.Notes = append(p.Notes, "which server it joins through is decided when it runs")
	}
	if membership.AgentToken, membership.ServerToken, err = m.plannedTokens(); err != nil {
		return err
	}
	rendered, err := m.files(membership)
	if err != nil {
		return err
	}
	files := rendered.Files
	generation, err := m.plannedGeneration(state.Marker, known, membership)
	if err != nil {
		return err
	}
	files = append(slices.Clip(files), generation...)
	if !known {
		p.Notes = append(p.Notes, "tokens and authorities come from "+m.spec.Cluster.Store+" or are made when it founds the cluster")
	} else {
		files = withoutTokens(files, m.paths)
	}
	changes, err := m.host.Plan(ctx, files)
	if err != nil {
		return err
	}
	if !known {
		for i, c := range changes {
			if slices.ContainsFunc(generation, func(f host.File) bool { return f.Path == c.Path }) {
				changes[i].SHA256, changes[i].Diff = "", ""
			}
		}
	}
	p.Files = append(p.Files, changes...)
	retired, err := m.host.PlanRetire(ctx, rendered.Absent...)
	if err != nil {
		return err
	}
	p.Retired = append(retired.Removed, retired.Restored...)
	if r := m.spec.Cluster.Restore; r != nil && (!state.Etcd || state.Marker != nil && state.Marker.Generation <= r.Generation) {
		p.Commands = append(p.Commands, strings.Join(append([]string{k3s.Binary}, k3s.RestoreArguments(r.Snapshot)...), " "))
	}
	return m.planUnit(ctx, p, name, rendered)
}

// plannedGeneration are the files that depend on the generation this machine
// becomes part of. Those of one that is not known yet have content that only
// stands for it, and is not shown.
func (m *machine) plannedGeneration(before *k3s.Marker, known bool, membership k3s.Membership) ([]host.File, error) {
	marker := k3s.Marker{
		Cluster: m.spec.Cluster.Name, Generation: 1, Role: m.spec.Role, Node: m.snapshot.Identity.InstanceID, CAHash: membership.AgentToken.CAHash(),
	}
	if known {
		marker = *before
	}
	file, err := marker.File(m.paths)
	if err != nil {
		return nil, err
	}
	if known {
		return []host.File{file}, nil
	}
	files := []host.File{file}
	if !membership.Founder {
		return files, nil
	}
	ca, err := pki.Generate(time.Now())
	if err != nil {
		return nil, err
	}
	authorities, err := m.authorities(ca, true)
	return append(files, authorities...), err
}

// withoutTokens leaves out what cannot be compared without the store.
func withoutTokens(files []host.File, paths k3s.Paths) []host.File {
	var out []host.File
	for _, f := range files {
		if f.Path != paths.TokenFile && f.Path != paths.AgentTokenFile {
			out = append(out, f)
		}
	}
	return out
}

// plannedTokens stand for those that are not known: they only have to have the
// form of tokens, and are shown to nobody.
func (m *machine) plannedTokens() (agent, server pki.Token, err error) {
	ca, err := pki.Generate(time.Now())
	if err != nil {
		return agent, server, err
	}
	if agent, err = pki.NewToken(pki.UserNode, ca.ServerCA()); err != nil || m.spec.Role != v1alpha1.RoleServer {
		return agent, server, err
	}
	server, err = pki.NewToken(pki.UserServer, ca.ServerCA())
	return agent, server, err
}

func (m *machine) planUnit(ctx context.Context, p *Plan, name string, rendered k3s.Rendered) error {
	if err := m.connect(ctx); err != nil {
		p.Notes = append(p.Notes, "systemd cannot be asked: "+oneLine(err))
		return nil
	}
	unit, err := m.systemd.Unit(ctx, name)
	if err != nil {
		return err
	}
	if unit.UnitFileState != "enabled" {
		p.Units = append(p.Units, UnitChange{Name: name, Action: "enable", Reason: "starts at every boot once it is part of the cluster"})
	}
	if !unit.Active() {
		p.Units = append(p.Units, UnitChange{Name: name, Action: "start", Reason: "is " + unit.ActiveState})
		return nil
	}
	// What there will be, not what there is: k3s need not restart for a file that
	// becomes again what it was started from.
	will, why := map[string]string{}, ""
	for _, f := range rendered.Files {
		if i := slices.IndexFunc(p.Files, func(c host.Change) bool { return c.Path == f.Path && c.Changed() }); i >= 0 && !f.Mode.IsDir() {
			sum := sha256.Sum256(f.Content)
			will[f.Path] = hex.EncodeToString(sum[:])
		}
	}
	for _, a := range m.artifacts {
		i := slices.IndexFunc(p.Downloads, func(d Download) bool { return d.Path == a.Path })
		if i >= 0 && (p.Downloads[i].State == artifact.StateMissing || p.Downloads[i].State == artifact.StateDiffers) {
			will[a.Path] = installedDigest(a).String()
		}
	}
	paths := m.inputPaths(rendered)
	for _, path := range paths {
		if will[path] != "" && why == "" {
			why = path + " changes"
		}
	}
	inputs, err := systemd.ExpectInputs(will, paths...)
	if err != nil {
		return err
	}
	if restart, reason := systemd.NeedsRestart(systemd.DefaultMarkerDir, unit, inputs); restart {
		p.Units = append(p.Units, UnitChange{Name: name, Action: "restart", Reason: cmp.Or(why, reason)})
	}
	return nil
}
