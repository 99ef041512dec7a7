package bootstrap

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials/ec2rolecreds"
	"github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/artifact"
	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
	"github.com/hearth-sh/hearth/internal/host"
	"github.com/hearth-sh/hearth/internal/imds"
	"github.com/hearth-sh/hearth/internal/k3s"
	"github.com/hearth-sh/hearth/internal/k3s/election"
	"github.com/hearth-sh/hearth/internal/nodeconfig"
	"github.com/hearth-sh/hearth/internal/systemd"
)

// DefaultStateDir is what bootstrap remembers: result.json, installed.json
// (what it installed), election.json (its part in founding the cluster).
const DefaultStateDir = "/var/lib/hearth/bootstrap"

// Deadlines of phases that have no field in spec.timeouts. They are what a
// machine needs at its worst, not what it usually takes.
const (
	discoverWithin  = 2 * time.Minute
	configureWithin = 10 * time.Second
	preflightWithin = 30 * time.Second
	prepareWithin   = time.Minute
	installWithin   = time.Minute
	signalWithin    = time.Minute
)

// InstanceMetadata is what a run needs of *imds.Client.
type InstanceMetadata interface {
	Metadata
	ec2rolecreds.GetMetadataAPIClient
}

// Options say how to run.
type Options struct {
	// ConfigFiles are read instead of the configuration's usual sources.
	ConfigFiles []string
	// StateDir is where bootstrap remembers; DefaultStateDir when empty.
	StateDir string
	// Metadata is the instance's.
	Metadata InstanceMetadata
	// Version is bootstrap's own.
	Version string
	// Tell gets every line for people as it happens; it must not block.
	Tell func(Line)
	// Logger gets what the parts log.
	Logger *slog.Logger
}

// machine is one run's view of the instance: what is known and where to work.
type machine struct {
	o        Options
	log      *slog.Logger
	rec      *recorder
	snapshot Snapshot
	resolved nodeconfig.Resolved
	spec     v1alpha1.NodeConfigSpec
	aws      aws.Config
	host     *host.Host
	paths    k3s.Paths
	kernel   host.Kernel

	artifacts []artifact.Artifact
	// verified are the digests of artifacts that fetch has found in place.
	verified systemd.Verified
	systemd  *systemd.Manager
	elector  *election.Elector
	decision *election.Decision
	// membership is what decision comes to for this machine.
	membership k3s.Membership
	unit       systemd.Unit
	// discarded says that k3s's data was removed since the artifacts came.
	discarded bool
}

// Run turns this instance into a node. The result is complete whatever
// happened; the error is nil exactly if the result's outcome is succeeded.
func Run(ctx context.Context, o Options) (Result, error) {
	if o.StateDir == "" {
		o.StateDir = DefaultStateDir
	}
	rec := &recorder{
		begin: time.Now(), log: o.Logger, tell: o.Tell,
		result: Result{
			APIVersion: v1alpha1.APIVersion, Kind: KindResult, Run: rand.Text(), Version: o.Version,
			Outcome: OutcomeRunning, StartedAt: time.Now().UTC(),
		},
	}
	release, err := lock(o.StateDir)
	if err != nil {
		return rec.finish(err), err
	}
	defer release()
	rec.dir = o.StateDir
	m := &machine{o: o, log: o.Logger, rec: rec, paths: k3s.DefaultPaths()}
	defer m.close()
	err = m.run(ctx)
	m.conclude(ctx, err)
	return rec.finish(err), err
}

func (m *machine) close() {
	if m.decision != nil && m.decision.Hold != nil {
		m.decision.Hold.Close()
	}
	if m.systemd != nil {
		m.systemd.Close()
	}
}

func (m *machine) run(ctx context.Context) error {
	if err := m.rec.run(ctx, PhaseDiscover, discoverWithin, m.discover); err != nil {
		return err
	}
	if err := m.rec.run(ctx, PhaseConfigure, configureWithin, m.configure); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, duration(m.spec.Timeouts.Total))
	defer cancel()
	for _, phase := range []struct {
		name   PhaseName
		within time.Duration
		do     func(context.Context) error
	}{
		{PhasePreflight, preflightWithin, m.preflight},
		{PhaseFetch, duration(m.spec.Timeouts.Fetch), m.fetch},
		{PhasePrepare, prepareWithin, m.prepare},
	} {
		if err := m.rec.run(ctx, phase.name, phase.within, phase.do); err != nil {
			return err
		}
	}
	if err := m.becomeNode(ctx); err != nil {
		return err
	}
	if err := m.rec.run(ctx, PhaseProve, duration(m.spec.Timeouts.Prove), m.prove); err != nil {
		return err
	}
	return m.rec.run(ctx, PhaseSignal, signalWithin, func(ctx context.Context) error {
		return signal(ctx, m.aws, m.spec.Signal, signalled{
			Instance: m.snapshot.Identity.InstanceID, Tags: m.snapshot.Tags, Success: true,
		}, m.rec.note)
	})
}

// maxTakeovers bounds how often this machine may lose what it was founding to
// another one within a run: once is a slow disk, often is something else.
const maxTakeovers = 3

// becomeNode decides what to found or join, and brings k3s up for it. A founder
// that was given up meanwhile starts over, as a node that joins.
func (m *machine) becomeNode(ctx context.Context) error {
	for attempt := 1; ; attempt++ {
		err := m.rec.run(ctx, PhaseElect, duration(m.spec.Timeouts.Join), m.elect)
		if err != nil {
			return err
		}
		for _, phase := range []struct {
			name   PhaseName
			within time.Duration
			do     func(context.Context) error
		}{
			{PhaseInstall, m.installWithin(), m.install},
			{PhaseStart, duration(m.spec.Timeouts.Ready), m.start},
			{PhaseReady, duration(m.spec.Timeouts.Ready), m.ready},
		} {
			if err = m.rec.run(ctx, phase.name, phase.within, phase.do); err != nil {
				break
			}
		}
		switch {
		case err == nil:
			return nil
		case errors.Is(err, election.ErrFenced) && attempt < maxTakeovers:
			m.rec.warn("another server founds the cluster by now; this one gives up its attempt and joins")
			continue
		}
		m.abandon(ctx, err)
		return err
	}
}

// abandonWithin bounds telling the store that a founder gives up.
const abandonWithin = 15 * time.Second

// abandon lets another server found the cluster at once, instead of after the
// lease, when this one cannot.
func (m *machine) abandon(ctx context.Context, why error) {
	if m.decision == nil || m.decision.Hold == nil || errors.Is(ctx.Err(), context.Canceled) {
		return // who was interrupted goes on with the next run
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), abandonWithin)
	defer cancel()
	if err := m.decision.Hold.Abandon(ctx, string(fault.CodeOf(why))); err != nil {
		m.log.Warn("the generation was not given up; others take over after the lease", "err", err)
	}
}

func (m *machine) discover(ctx context.Context) error {
	snapshot, err := discover(ctx, m.o.Metadata)
	if err != nil {
		return err
	}
	m.snapshot = snapshot
	id := snapshot.Identity
	m.rec.node(func(n *NodeResult) { n.Name = id.InstanceID })
	m.rec.note("%s, %s in %s, %s", id.InstanceID, id.InstanceType, id.Zone, id.LifeCycle)
	m.aws, err = awsConfig(ctx, m.o.Metadata, id.Region)
	return err
}

// sources are those of the configuration, for what metadata said.
func sources(files []string, s Snapshot) nodeconfig.Sources {
	src := nodeconfig.Sources{Files: files, Instance: &nodeconfig.Instance{
		Region: s.Identity.Region, Arch: s.Identity.Architecture.GOARCH(), Spot: s.Identity.LifeCycle == imds.LifeCycleSpot,
	}}
	// With files, what tags say of the Auto Scaling group still counts.
	src.Tags = s.Tags
	if len(files) == 0 {
		src.Dir, src.UserData = nodeconfig.ConfigDir, s.UserData
	}
	return src
}

// ConfigSources are the sources that a run on this machine would use.
func ConfigSources(ctx context.Context, metadata Metadata) (nodeconfig.Sources, error) {
	s, err := discover(ctx, metadata)
	if err != nil {
		return nodeconfig.Sources{}, err
	}
	return sources(nil, s), nil
}

func (m *machine) configure(ctx context.Context) error {
	resolved, err := nodeconfig.Resolve(ctx, sources(m.o.ConfigFiles, m.snapshot))
	if err != nil {
		// Who waits can be told in spite of it, if they could be read.
		m.spec.Signal = resolved.Signal
		return err
	}
	m.resolved, m.spec = resolved, resolved.Config.Spec
	for _, n := range resolved.Notes {
		m.rec.note("%s", n)
	}
	m.rec.node(func(n *NodeResult) { n.Role, n.Pool, n.Cluster = m.spec.Role, m.spec.Pool, m.spec.Cluster.Name })
	m.rec.note("%s of cluster %s in pool %s, k3s %s", m.spec.Role, m.spec.Cluster.Name, m.spec.Pool, m.spec.K3s.Version)
	m.kernel = host.DefaultKernel().With(m.spec.Host.Modules, m.spec.Host.Sysctls)
	m.host, err = host.New(host.Options{Ledger: filepath.Join(m.o.StateDir, filepath.Base(host.DefaultLedger))})
	return err
}

// requirements are what the machine must offer for this configuration.
func (m *machine) requirements(clocks []host.ClockSample) (host.Requirements, error) {
	r := host.Requirements{
		Arch: m.snapshot.Identity.Architecture.GOARCH(), MinMemory: host.MinMemoryAgent,
		MaxClockOffset: duration(m.spec.Host.MaxClockOffset), Clocks: clocks, Kernel: m.kernel,
		AllowCgroupV1: k3s.AllowsCgroupV1(m.spec.K3s.Config),
	}
	if m.spec.Role == v1alpha1.RoleServer {
		r.MinMemory = host.MinMemoryServer
	}
	if r.Arch != runtime.GOARCH {
		return r, fault.New(host.CodeArchitecture, nil, "fetch the bootstrap for "+r.Arch, "this bootstrap is for %s, the instance is %s", runtime.GOARCH, r.Arch)
	}
	if q := m.spec.Host.MinDiskFree; q != "" {
		free, err := parseQuantity(q)
		if err != nil {
			return r, err
		}
		r.MinDiskFree = free
	}
	return r, nil
}

func (m *machine) preflight(ctx context.Context) error {
	r, err := m.requirements(readClocks(ctx, clockSources(m.snapshot.Identity)))
	if err != nil {
		return err
	}
	report, err := m.host.Preflight(ctx, r)
	if err != nil {
		return err
	}
	for _, w := range report.Warnings() {
		m.rec.warn("%s; %s", w.Fact, w.Remedy)
	}
	return report.Err()
}

// prepare sets the kernel up, now and for every boot.
func (m *machine) prepare(ctx context.Context) error {
	files, err := m.host.KernelFiles(m.kernel)
	if err != nil {
		return err
	}
	if err := m.apply(ctx, files); err != nil {
		return err
	}
	changes, err := m.host.ApplyKernel(ctx, m.kernel)
	for _, c := range changes {
		m.rec.changed()
		m.rec.note("%s", c.Command)
	}
	return err
}

// apply writes files and notes what changed.
func (m *machine) apply(ctx context.Context, files []host.File) error {
	changes, err := m.host.Apply(ctx, files)
	for _, c := range changes {
		if !c.Changed() {
			continue
		}
		m.rec.changed()
		note := string(c.Action) + " " + c.Path
		if c.Backup != "" {
			note += ", what was there is kept as " + c.Backup
		}
		m.rec.note("%s", note)
	}
	return err
}

// fetcher is for all artifacts of this machine.
func (m *machine) fetcher(progress func(artifact.Event)) (*artifact.Fetcher, error) {
	return artifact.New(artifact.Options{
		// What is there already is nobody's news, and was read once by then.
		Installing: func(ctx context.Context, a artifact.Artifact) error {
			_, err := m.host.Record(ctx, a.Path, installedDigest(a).String(), "artifact "+a.String())
			return err
		},
		StateDir: filepath.Join(m.o.StateDir, "artifacts"), Timeout: duration(m.spec.Timeouts.Fetch),
		S3: s3.NewFromConfig(m.aws, func(o *s3.Options) { o.UsePathStyle = pathStyle() }), UserAgent: "hearth-bootstrap/" + m.o.Version,
		Progress: progress, Logger: m.log,
	})
}

// pathStyle is for S3 of other makers, which have no name for every bucket:
// they are those whose endpoint somebody set.
func pathStyle() bool {
	return os.Getenv("AWS_ENDPOINT_URL_S3") != "" || os.Getenv("AWS_ENDPOINT_URL") != ""
}

// pin finds out which artifacts are wanted and what their digests are. read
// reads the signed list.
func (m *machine) pin(ctx context.Context, read func(context.Context, artifact.ManifestSource) (*artifact.Manifest, error)) error {
	var list *artifact.Manifest
	if url := m.spec.Artifacts.Manifest; url != "" {
		source := artifact.ManifestSource{Name: manifestSeries, URLs: []string{url}}
		for _, key := range m.spec.Artifacts.PublicKeys {
			public, err := artifact.ParsePublicKey(key)
			if err != nil {
				return fmt.Errorf("spec.artifacts.publicKeys: %w", err)
			}
			source.Trust.Keys = append(source.Trust.Keys, public)
		}
		var err error
		if list, err = read(ctx, source); err != nil {
			return err
		}
	}
	goarch := m.snapshot.Identity.Architecture.GOARCH()
	if err := nodeconfig.CheckArtifacts(m.resolved, known(list, goarch)); err != nil {
		return err
	}
	var err error
	m.artifacts, err = pinned(m.spec, list, goarch)
	if err != nil {
		return fault.New(artifact.CodeManifestNoEntry, err, "see docs/bootstrap.md on artifacts", "not every file of this node is known")
	}
	if m.spec.Registries.ECR == nil {
		provider := slices.ContainsFunc(m.artifacts, func(a artifact.Artifact) bool { return a.Name == nodeconfig.ArtifactECRProvider })
		m.spec.Registries.ECR = &provider
	}
	return nil
}

func (m *machine) fetch(ctx context.Context) error {
	f, err := m.fetcher(m.downloading)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := m.pin(ctx, f.Manifest); err != nil {
		return err
	}
	results, err := f.Fetch(ctx, m.artifacts)
	if err == nil {
		m.verified = systemd.Verified{At: time.Now(), SHA256: map[string]string{}}
		for _, a := range m.artifacts {
			m.verified.SHA256[a.Path] = installedDigest(a).String()
		}
	}
	for _, r := range results {
		switch r.Outcome {
		case artifact.OutcomePresent, artifact.OutcomeFailed:
			continue
		case artifact.OutcomeRepaired, artifact.OutcomeInstalled, artifact.OutcomeReplaced:
		}
		m.rec.changed()
		note := fmt.Sprintf("%s %s as %s", r.Outcome, r.Artifact.String(), r.Artifact.Path)
		if r.Mirror != "" {
			note += fmt.Sprintf(", %.1f MiB from %s in %s", float64(r.Downloaded)/(1<<20), r.Mirror, r.Timing.Total.Round(time.Millisecond))
		}
		m.rec.note("%s", note)
	}
	return err
}

// installedDigest is that of the file which an artifact becomes.
func installedDigest(a artifact.Artifact) artifact.Digest {
	if a.InstalledSHA256.IsZero() {
		return a.SHA256
	}
	return a.InstalledSHA256
}

// downloading tells who watches about downloads.
func (m *machine) downloading(e artifact.Event) {
	switch e.Phase {
	case artifact.PhaseDownload:
		if e.Total > 0 {
			// Tens: a line per quarter of a second is too much for a console.
			m.rec.doing("downloading %s: %d %% of %d MiB", e.Name, e.Bytes*10/e.Total*10, e.Total>>20)
		}
	case artifact.PhaseRetry:
		m.rec.say(Line{Phase: PhaseFetch, Text: fmt.Sprintf("%s: %s; trying on", e.Name, oneLine(e.Err)), Warning: true})
	case artifact.PhaseCheck, artifact.PhaseInstall, artifact.PhaseDone:
	}
}

func (m *machine) prove(ctx context.Context) error {
	proven, err := prove(ctx, m.spec.Shims, proveWasm(k3s.ContainerdSocket), m.log, m.rec.note, m.rec.warn)
	m.rec.node(func(n *NodeResult) { n.Proven = proven })
	return err
}

// conclude counts the run and tells those who wait that this instance will be no
// node: at once if another run would fail in the same way, else when runs have
// failed for longer than one may take.
func (m *machine) conclude(ctx context.Context, err error) {
	if err != nil && errors.Is(ctx.Err(), context.Canceled) {
		return // the next run goes on
	}
	tried, failed := count(m.o.StateDir, time.Since(m.rec.begin), err == nil)
	if failed != nil {
		m.log.Warn("this run was not counted", "err", failed)
	}
	if err == nil {
		return
	}
	overdue := tried.overdue(duration(m.spec.Timeouts.Total))
	if overdue {
		m.rec.overdue(tried)
	}
	if overdue || !fault.IsTransient(err) {
		m.signalFailure(ctx, err)
	}
}

// signalFailure tells those who wait that this instance will be no node. Without
// metadata nobody knows which instance it is, and nobody can be told.
func (m *machine) signalFailure(ctx context.Context, err error) {
	if m.snapshot.Identity.InstanceID == "" {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), signalWithin)
	defer cancel()
	if failed := signal(ctx, m.aws, m.spec.Signal, signalled{
		Instance: m.snapshot.Identity.InstanceID, Tags: m.snapshot.Tags, Reason: oneLine(err),
	}, m.rec.note); failed != nil {
		m.rec.warn("nobody was told: %s", oneLine(failed))
	}
}
