package k3s

import (
	"encoding/base64"
	"path"

	"sigs.k8s.io/yaml"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
	"github.com/hearth-sh/hearth/internal/host"
)

// Names of addons, as in AddonsConfig.
const (
	AddonHearth      = "hearth"
	AddonSpinKube    = "spinkube"
	AddonCertManager = "certManager"
)

const (
	// SpinRuntimeClass is the class that SpinKube's samples and executor name
	// (config/samples/spin-runtime-class.yaml of spin-operator). k3s's own class
	// for the handler is called spin.
	SpinRuntimeClass = "wasmtime-spin-v2"
	spinHandler      = "spin"
	// maxChart bounds an archive within a HelmChart: etcd takes 1.5 MiB an
	// object, and base64 adds a third.
	maxChart = 1 << 20
)

// upstream is where an addon's chart comes from unless the NodeConfig says
// otherwise. None is Docker Hub, nor are the charts' images.
type upstream struct {
	name, namespace, chart, version string
	values                          map[string]any
}

var upstreams = map[string]upstream{
	AddonHearth:      {name: "hearth", namespace: "hearth-system"},
	AddonSpinKube:    {name: "spin-operator", namespace: "spin-operator", chart: "oci://ghcr.io/spinframework/charts/spin-operator", version: "0.6.1"},
	AddonCertManager: {name: "cert-manager", namespace: "cert-manager", chart: "oci://quay.io/jetstack/charts/cert-manager", version: "v1.19.1", values: map[string]any{"crds": map[string]any{"enabled": true}}},
}

// ChartOf is the name of the HelmChart in a manifest of an addon, by the
// manifest's path; "" for any other file.
func ChartOf(paths Paths, file string) string {
	for addon, manifest := range map[string]string{AddonHearth: manifestHearth, AddonCertManager: manifestCertManager, AddonSpinKube: manifestSpinKube} {
		if file == (Input{Paths: paths}).manifest(manifest) {
			return upstreams[addon].name
		}
	}
	return ""
}

// helmChart is helm.cattle.io/v1 HelmChart (k3s-io/helm-controller).
type helmChart struct {
	APIVersion string            `json:"apiVersion"`
	Kind       string            `json:"kind"`
	Metadata   map[string]string `json:"metadata"`
	Spec       helmChartSpec     `json:"spec"`
}

type helmChartSpec struct {
	Chart           string `json:"chart,omitempty"`
	ChartContent    string `json:"chartContent,omitempty"`
	Version         string `json:"version,omitempty"`
	TargetNamespace string `json:"targetNamespace"`
	CreateNamespace bool   `json:"createNamespace"`
	ValuesContent   string `json:"valuesContent,omitempty"`
	// Bootstrap makes the installing Job tolerate the control plane's taint and
	// run on the host network of a server: else, in a cluster whose only nodes
	// are tainted servers, nothing would ever install what untaints the others.
	Bootstrap bool `json:"bootstrap"`
}

// manifest is the path of an addon's manifest. What is before the first dot is
// the name of k3s's Addon object (basename of pkg/deploy/controller.go), which
// must be nobody else's.
func (in Input) manifest(name string) string { return path.Join(in.Paths.Manifests, name+".yaml") }

const (
	manifestHearth       = "hearth-addon"
	manifestCertManager  = "hearth-cert-manager"
	manifestSpinKubeCRDs = "hearth-spinkube-crds"
	manifestSpinKube     = "hearth-spinkube"
	manifestSpinExecutor = "hearth-spinkube-executor"
)

// addons renders what servers apply. One file each: what fails, such as the
// executor until the operator's webhook answers, is tried again every 15
// seconds and holds up nothing else.
func (r *renderer) addons(in Input) error {
	a := in.Config.Addons
	for _, addon := range []struct {
		name, manifest string
		config         v1alpha1.AddonConfig
	}{
		{AddonHearth, manifestHearth, a.Hearth},
		{AddonCertManager, manifestCertManager, a.CertManager},
		{AddonSpinKube, manifestSpinKube, a.SpinKube},
	} {
		if !enabled(addon.config) {
			r.absent = append(r.absent, in.manifest(addon.manifest))
			continue
		}
		chart, err := in.helmChart(addon.name, addon.config)
		if err != nil {
			return err
		}
		if err := r.yaml(in.manifest(addon.manifest), "addon "+addon.name, chart); err != nil {
			return err
		}
	}
	if !enabled(a.SpinKube) {
		r.absent = append(r.absent, in.manifest(manifestSpinKubeCRDs), in.manifest(manifestSpinExecutor))
		return nil
	}
	if len(in.SpinKubeCRDs) == 0 {
		return fault.New(CodeAddon, nil, "report it: this build of bootstrap lacks them; until then set addons.spinkube.enabled to false", "the resource definitions of SpinKube are missing")
	}
	r.files = append(r.files, host.File{Path: in.manifest(manifestSpinKubeCRDs), Content: in.SpinKubeCRDs, Mode: 0o644, Reason: "resource definitions of SpinKube"})

	class := map[string]any{"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": map[string]any{"name": SpinRuntimeClass}, "handler": spinHandler}
	if enabled(a.Hearth) {
		// Only where the agent has seen a module run; without the agent nobody
		// would ever set the label.
		class["scheduling"] = map[string]any{"nodeSelector": map[string]any{v1alpha1.RuntimeLabelPrefix + spinHandler: "true"}}
	}
	executor := map[string]any{
		"apiVersion": "core.spinkube.dev/v1alpha1", "kind": "SpinAppExecutor",
		"metadata": map[string]any{"name": "containerd-shim-spin", "namespace": "default"},
		"spec":     map[string]any{"createDeployment": true, "deploymentConfig": map[string]any{"runtimeClassName": SpinRuntimeClass, "installDefaultCACerts": true}},
	}
	content := []byte(header)
	for _, object := range []any{class, executor} {
		b, err := yaml.Marshal(object)
		if err != nil {
			return err
		}
		content = append(append(content, "---\n"...), b...)
	}
	r.files = append(r.files, host.File{Path: in.manifest(manifestSpinExecutor), Content: content, Mode: 0o644, Reason: "lets SpinKube use the node's shim"})
	return nil
}

func enabled(a v1alpha1.AddonConfig) bool { return a.Enabled != nil && *a.Enabled }

func (in Input) helmChart(addon string, c v1alpha1.AddonConfig) (helmChart, error) {
	up := upstreams[addon]
	h := helmChart{
		APIVersion: "helm.cattle.io/v1", Kind: "HelmChart",
		Metadata: map[string]string{"name": up.name, "namespace": "kube-system"},
		Spec:     helmChartSpec{TargetNamespace: up.namespace, CreateNamespace: true, Bootstrap: true},
	}
	archive, under := in.Charts[addon], up.values
	switch {
	case c.Chart != "":
		h.Spec.Chart, h.Spec.Version = c.Chart, c.Version
	case len(archive) > maxChart:
		return h, fault.New(CodeAddon, nil, "publish it, and set addons."+addon+".chart to its address", "the chart of the addon %s has %d bytes; at most %d fit into a manifest", addon, len(archive), maxChart)
	case len(archive) > 0:
		h.Spec.ChartContent = base64.StdEncoding.EncodeToString(archive)
		under = merge(under, in.Values[addon])
	case up.chart != "":
		h.Spec.Chart, h.Spec.Version = up.chart, up.version
		if c.Version != "" {
			h.Spec.Version = c.Version
		}
	default:
		return h, fault.New(CodeAddon, nil, "set addons."+addon+".chart, or addons."+addon+".enabled to false", "no chart is known for the addon %s", addon)
	}
	values := merge(under, c.Values)
	if len(values) > 0 {
		b, err := yaml.Marshal(values)
		if err != nil {
			return h, fault.New(CodeAddon, err, "correct addons."+addon+".values", "writing the values of the addon %s failed", addon)
		}
		h.Spec.ValuesContent = string(b)
	}
	return h, nil
}

// merge lays maps over each other, as Helm does with values.
func merge(under, over map[string]any) map[string]any {
	out := map[string]any{}
	for k, v := range under {
		out[k] = v
	}
	for k, v := range over {
		below, ok1 := out[k].(map[string]any)
		above, ok2 := v.(map[string]any)
		if ok1 && ok2 {
			v = merge(below, above)
		}
		out[k] = v
	}
	return out
}
