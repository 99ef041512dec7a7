package nodeconfig

import (
	"strings"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

// Names of the artifacts that bootstrap knows what to do with, beside the
// binaries of shims (ShimBinary).
const (
	ArtifactK3s         = "k3s"
	ArtifactAirgap      = "k3s-airgap-images"
	ArtifactECRProvider = "ecr-credential-provider"
	ArtifactNodeAgent   = "nodeagent"
	ArtifactCNIManifest = "cni-manifest"
	// ArtifactHearthImage is an archive with the image of our chart's pods, which
	// no public registry has.
	ArtifactHearthImage = "hearth-image"
)

// hearthRegistry is the host in the name of that image.
const hearthRegistry = "hearth.sh"

// PullsHearth says whether nodes pull the image of our chart's pods from a
// registry, which somebody must have said, instead of having it in an archive.
func PullsHearth(spec *v1alpha1.NodeConfigSpec) bool {
	image, _ := spec.Addons.Hearth.Values["image"].(map[string]any)
	repository, _ := image["repository"].(string)
	_, mirrored := spec.Registries.Mirrors[hearthRegistry]
	// A chart of the owner's own has an image of its own.
	return repository != "" || mirrored || spec.Addons.Hearth.Chart != ""
}

// ShimBinary is the name of the binary that k3s looks for to offer the runtime
// handler of that name, and of the artifact.
func ShimBinary(handler string) string {
	switch handler {
	// k3s's table of runtimes (pkg/agent/containerd/runtimes.go) has v2 for
	// spin and v1 for the others.
	case "spin":
		return "containerd-shim-spin-v2"
	}
	return "containerd-shim-" + handler + "-v1"
}

// derive fills in the defaults that follow from something else. It takes the
// tree as it is, valid or not.
func derive(tree *node, s Sources) *node {
	d := deriver{tree: tree, sources: s}
	d.region()
	d.artifacts()
	d.shims()
	d.network()
	d.addons()
	d.signal()
	d.timeouts()
	d.startupTaint()
	return d.tree
}

// defaultSource is the origin of what is the same on every machine.
const defaultSource = "default"

type deriver struct {
	tree    *node
	sources Sources
}

// set gives a field a value that nobody gave it.
func (d *deriver) set(value any, because string, path ...string) {
	if d.tree.at(path...) == nil {
		d.tree = d.tree.with(fromPlain(value, Origin{Source: because}), path...)
	}
}

func (d *deriver) region() {
	if d.sources.Instance == nil || d.sources.Instance.Region == "" {
		return
	}
	for _, path := range [][]string{{"spec", "cluster", "region"}, {"spec", "cluster", "snapshots", "region"}} {
		d.set(d.sources.Instance.Region, "instance metadata", path...)
	}
}

// artifact finds an entry of spec.artifacts.files, the one for this machine
// first.
func (d *deriver) artifact(name string) *node {
	files := d.tree.at("spec", "artifacts", "files")
	if files == nil {
		return nil
	}
	for _, f := range files.items {
		arch := f.get("arch").text()
		if f.get("name").text() == name && (arch == "" || d.sources.Instance == nil || arch == d.sources.Instance.Arch) {
			return f
		}
	}
	return nil
}

func (d *deriver) artifacts() {
	if k3s := d.artifact(ArtifactK3s); k3s.get("version").text() != "" {
		d.set(k3s.get("version").text(), "version of the artifact k3s", "spec", "k3s", "version")
	}
	files := d.tree.at("spec", "artifacts", "files")
	if files != nil {
		out := &node{kind: list, origin: files.origin}
		for _, f := range files.items {
			if f.kind == mapping && f.get("format") == nil {
				f = f.with(fromPlain("raw", Origin{Source: defaultSource}), "format")
			}
			out.items = append(out.items, f)
		}
		d.tree = d.tree.with(out, "spec", "artifacts", "files")
	}
	switch {
	case d.artifact(ArtifactECRProvider) != nil:
		d.set(true, "artifact "+ArtifactECRProvider, "spec", "registries", "ecr")
	case d.tree.at("spec", "artifacts", "manifest") == nil:
		d.set(false, "no artifact "+ArtifactECRProvider, "spec", "registries", "ecr")
	}
}

func (d *deriver) shims() {
	shims := d.tree.at("spec", "shims")
	if shims == nil {
		return
	}
	out := &node{kind: list, origin: shims.origin}
	for _, s := range shims.items {
		if s.kind == mapping && s.get("name").text() != "" {
			if s.get("artifact") == nil && handlerSyntax.MatchString(s.get("name").text()) {
				s = s.with(fromPlain(ShimBinary(s.get("name").text()), Origin{Source: defaultSource}), "artifact")
			}
			if s.get("required") == nil {
				s = s.with(fromPlain(true, Origin{Source: defaultSource}), "required")
			}
		}
		out.items = append(out.items, s)
	}
	d.tree = d.tree.with(out, "spec", "shims")
}

func (d *deriver) network() {
	if cni := d.tree.at("spec", "network", "cni"); cni.text() == cniFlannel {
		d.set("vxlan", defaultSource, "spec", "network", "flannelBackend")
	} else {
		d.set("none", "spec.network.cni", "spec", "network", "flannelBackend")
	}
}

func (d *deriver) addons() {
	spinkube := d.tree.at("spec", "addons", "spinkube", "enabled")
	if spinkube != nil {
		d.set(spinkube.value, "spec.addons.spinkube.enabled", "spec", "addons", "certManager", "enabled")
	}
}

func (d *deriver) signal() {
	if d.tree.at("spec", "signal", "lifecycleHook") == nil {
		return
	}
	if group := d.sources.Tags[tagAutoScalingGroup]; group != "" {
		d.set(group, "tag "+tagAutoScalingGroup, "spec", "signal", "autoScalingGroup")
	}
}

// timeouts shortens the defaults of phases for a run that is shorter.
func (d *deriver) timeouts() {
	said := d.tree.at("spec", "timeouts", "total")
	total, err := v1alpha1.Duration(said.text()).Span()
	if err != nil {
		return
	}
	for _, phase := range []string{"fetch", "join", "ready", "prove"} {
		n := d.tree.at("spec", "timeouts", phase)
		if span, err := v1alpha1.Duration(n.text()).Span(); err == nil && span > total && n.origin.Source == defaultSource {
			d.tree = d.tree.with(fromPlain(said.text(), Origin{Source: "spec.timeouts.total"}), "spec", "timeouts", phase)
		}
	}
}

// startupTaint keeps pods away until WebAssembly is proven. Only the node
// agent removes it, so a node that gets none must not have it.
func (d *deriver) startupTaint() {
	enabled := d.tree.at("spec", "addons", "hearth", "enabled")
	shims := d.tree.at("spec", "shims")
	if enabled == nil || enabled.value != true || shims == nil || len(shims.items) == 0 {
		return
	}
	o := Origin{Source: "spec.addons.hearth.enabled"}
	key, effect, _ := strings.Cut(startupTaint, ":")
	taint := (*node)(nil).with(fromPlain(key, o), "key").with(fromPlain(effect, o), "effect")
	here := d.tree.at("spec", "node", "taints")
	if here == nil {
		here = &node{kind: list, origin: o}
	}
	for _, t := range here.items {
		if t.get("key").text() == key && t.get("effect").text() == effect {
			return
		}
	}
	out := &node{kind: list, origin: here.origin, items: append(here.items[:len(here.items):len(here.items)], taint)}
	d.tree = d.tree.with(out, "spec", "node", "taints")
}

const startupTaint = v1alpha1.TaintNotReady + ":NoSchedule"
