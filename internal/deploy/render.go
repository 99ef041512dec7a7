package deploy

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	autoscalingv2 "k8s.io/api/autoscaling/v2"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/utils/ptr"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/function"
	"github.com/hearth-sh/hearth/internal/kube"
)

// Names that this package gives.
const (
	// FieldManager is the manager of every field written by server-side apply.
	FieldManager = "hearth-api"
	// ManagedByLabel with the value FieldManager is on every object made here.
	ManagedByLabel = "app.kubernetes.io/managed-by"
	// FunctionLabel names the function on its SpinApp, pods, Ingress and autoscaler.
	FunctionLabel = v1alpha1.Group + "/function"
	// RevisionLabel is the revision that a SpinApp and its pods are of.
	RevisionLabel = v1alpha1.Group + "/revision"
	// AppNameLabel is what spin-operator puts on the Deployment and its pods.
	AppNameLabel = "core.spinkube.dev/app-name"
	// PartLabel tells the Ingresses of resident functions: wildcard or host.
	PartLabel = v1alpha1.Group + "/ingress"

	// NodeName is the pseudo node under which a rollout is reported.
	NodeName = "spin"
	// WildcardIngress is the Ingress of all resident functions' own names.
	WildcardIngress = "hearth-functions"
)

// Annotations of a SpinApp made here; they are its rollout's memory.
const (
	// annotationApplied is on every object: the hash of what was applied.
	annotationApplied = v1alpha1.Group + "/applied"
	// annotationStarted is when the revision in the SpinApp was put there.
	annotationStarted = v1alpha1.Group + "/rollout-started"
	// annotationFailed is a failedRollout: the wanted revision that did not
	// come up, while an older one is in the SpinApp again.
	annotationFailed = v1alpha1.Group + "/rollout-failed"
	// annotationAutoscaler is the autoscaler there is an object of.
	annotationAutoscaler = v1alpha1.Group + "/autoscaler"
)

// Defaults of Settings.
const (
	// DefaultIngressClass is the class of the ingress controller in k3s.
	DefaultIngressClass = "traefik"
	// DefaultRuntimeClass is the chart's: its pods go only to nodes that have
	// proven the runtime.
	DefaultRuntimeClass = "hearth-spin"
	// DefaultExecutor is the name that SpinKube's documentation gives it.
	DefaultExecutor = "containerd-shim-spin"
	// DefaultEngineService is the Service in front of the engines.
	DefaultEngineService = "hearth-engine"
	// DefaultProgressDeadline is how long a rollout may stand still: a slow
	// image pull on a small node fits in, a person's patience too.
	DefaultProgressDeadline = 2 * time.Minute
	// DefaultBaseDomainSetting is where the base domain is set.
	DefaultBaseDomainSetting = "the chart's value engine.baseDomain (--base-domain of the API)"

	// podOverheadMiB is what shim and Wasmtime take beside the guest's memory.
	podOverheadMiB = 64
	// maxPodMemoryMiB bounds a pod's memory limit, so that a default
	// concurrency of 32 does not ask for more than a small node has.
	maxPodMemoryMiB = 4096
	// podCPUMillis is requested so that an autoscaler has something to take
	// percents of.
	podCPUMillis = 100

	// servicePort is the port of a SpinApp's Service (spin-operator).
	servicePort = 80
	// healthPath is answered by Spin's HTTP trigger itself.
	healthPath = "/.well-known/spin/health"

	// wildcardPriority of a Traefik router lies between a rule for every host
	// (PathPrefix(`/`), 15 characters) and the shortest rule for one host (30).
	// Traefik prefers the longest rule, and that of a wildcard is a regular
	// expression longer than that of a host below it: without this, the wildcard
	// of the resident functions would win over the host of a spin function.
	wildcardPriority = "20"
	// traefikPriority is the annotation; other controllers pass over it.
	traefikPriority = "traefik.ingress.kubernetes.io/router.priority"

	// placeholderBase is the wildcard's domain until its load balancer has an
	// address: that is only given to an Ingress that exists. RFC 2606 keeps
	// the name from ever resolving, and it takes no host from anybody.
	placeholderBase = "hearth.invalid"
)

// Settings are those of the cluster. The zero value of a member is its default
// except where it says otherwise.
type Settings struct {
	// BaseDomain is the domain below which functions answer. Empty: made of
	// the ingress controller's address.
	BaseDomain string
	// BaseDomainSetting says in errors where BaseDomain is set.
	BaseDomainSetting string
	// HostTemplate makes a function's own host.
	HostTemplate HostTemplate
	// IngressClass is the class of all Ingresses; ClusterDefaultClass leaves it
	// to the cluster.
	IngressClass string
	// IngressAnnotations are put on every Ingress.
	IngressAnnotations map[string]string
	// RuntimeClass is that of executors made here.
	RuntimeClass string
	// Executor is the name of the SpinAppExecutor in each namespace.
	Executor string
	// ImagePullSecrets are Secrets of the tenants' namespaces. None by default:
	// nodes have credentials of their own.
	ImagePullSecrets []string
	// ProgressDeadline is how long a rollout may stand still.
	ProgressDeadline time.Duration
	// EngineService is the Service of the engines, in Options.Namespace, and
	// EnginePort its port (default 80).
	EngineService string
	EnginePort    int
}

// ClusterDefaultClass as Settings.IngressClass names no class, which leaves it
// to the cluster's default one.
const ClusterDefaultClass = "-"

// withDefaults fills in what is not set, and checks what is.
func (s Settings) withDefaults() (Settings, error) {
	var err error
	if s.HostTemplate, err = ParseHostTemplate(string(s.HostTemplate)); err != nil {
		return s, err
	}
	if s.BaseDomain != "" {
		if _, err := BaseDomainFrom(s.BaseDomain, nil); err != nil {
			return s, err
		}
	}
	if s.ProgressDeadline < 0 || s.EnginePort < 0 || s.EnginePort > 65535 {
		return s, fmt.Errorf("a progress deadline of %s and an engine port of %d are out of range", s.ProgressDeadline, s.EnginePort)
	}
	s.BaseDomainSetting = or(s.BaseDomainSetting, DefaultBaseDomainSetting)
	s.IngressClass = or(s.IngressClass, DefaultIngressClass)
	s.RuntimeClass = or(s.RuntimeClass, DefaultRuntimeClass)
	s.Executor = or(s.Executor, DefaultExecutor)
	s.ProgressDeadline = or(s.ProgressDeadline, DefaultProgressDeadline)
	s.EngineService = or(s.EngineService, DefaultEngineService)
	s.EnginePort = or(s.EnginePort, 80)
	return s, nil
}

func or[T comparable](v, otherwise T) T {
	var zero T
	if v == zero {
		return otherwise
	}
	return v
}

// Revision is one revision of a function as it is to run: the spec that was
// recorded, of which Image, Limits, Env and Autoscaling count here. Secret
// values are named, never held.
type Revision struct {
	Number int
	Spec   v1alpha1.FunctionSpec
}

// failedRollout is what annotationFailed holds.
type failedRollout struct {
	Revision int                    `json:"revision"`
	Error    v1alpha1.FunctionError `json:"error"`
}

// rollout is what a SpinApp remembers beside its revision.
type rollout struct {
	started time.Time
	failed  *failedRollout
}

// object is the start of an object for server-side apply.
func object(apiVersion, kind, namespace, name string) *unstructured.Unstructured {
	u := &unstructured.Unstructured{Object: map[string]any{"apiVersion": apiVersion, "kind": kind, "metadata": map[string]any{}}}
	u.SetNamespace(namespace)
	u.SetName(name)
	u.SetLabels(map[string]string{ManagedByLabel: FieldManager})
	return u
}

// own makes the Function the owner: deleting it deletes u.
func own(u *unstructured.Unstructured, f *kube.Function) {
	u.SetOwnerReferences([]metav1.OwnerReference{{
		APIVersion: v1alpha1.APIVersion, Kind: kube.FunctionKind, Name: f.Name, UID: f.UID,
		Controller: ptr.To(true), BlockOwnerDeletion: ptr.To(true),
	}})
	labels := u.GetLabels()
	labels[FunctionLabel] = f.Name
	u.SetLabels(labels)
}

// seal notes a hash of u on it, by which a later reconciliation knows that
// these very fields, and no others, were applied.
func seal(u *unstructured.Unstructured) (*unstructured.Unstructured, error) {
	b, err := json.Marshal(u.Object) // maps are written in the order of their keys
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", describe(u), err)
	}
	sum := sha256.Sum256(b)
	annotations := u.GetAnnotations()
	if annotations == nil {
		annotations = make(map[string]string, 1)
	}
	annotations[annotationApplied] = hex.EncodeToString(sum[:8])
	u.SetAnnotations(annotations)
	return u, nil
}

func describe(u *unstructured.Unstructured) string {
	return fmt.Sprintf("%s %s/%s", u.GetKind(), u.GetNamespace(), u.GetName())
}

// executor renders the SpinAppExecutor of a namespace (spin-operator,
// api/v1alpha1/spinappexecutor_types.go). It belongs to no function: they share it.
func (s Settings) executor(namespace string) (*unstructured.Unstructured, error) {
	u := object(spinAPIVersion, "SpinAppExecutor", namespace, s.Executor)
	u.Object["spec"] = map[string]any{
		"createDeployment": true,
		"deploymentConfig": map[string]any{"runtimeClassName": s.RuntimeClass, "installDefaultCACerts": true},
	}
	return seal(u)
}

// spinApp renders the SpinApp of a revision (spin-operator,
// api/v1alpha1/spinapp_types.go). The Deployment and the Service that the
// operator makes of it have the same name.
//
// A function's concurrency and timeout have no counterpart in Spin; memory
// bounds each invocation, and the pod as a whole where it is under pressure.
func (s Settings) spinApp(f *kube.Function, r Revision, state rollout) (*unstructured.Unstructured, error) {
	u := object(spinAPIVersion, "SpinApp", f.Namespace, f.Name)
	own(u, f)
	number := strconv.Itoa(r.Number)
	labels := u.GetLabels()
	labels[RevisionLabel] = number
	u.SetLabels(labels)
	annotations := map[string]string{annotationStarted: state.started.UTC().Format(time.RFC3339Nano)}
	if state.failed != nil {
		b, err := json.Marshal(state.failed)
		if err != nil {
			return nil, fmt.Errorf("encode the failed rollout of %s/%s: %w", f.Namespace, f.Name, err)
		}
		annotations[annotationFailed] = string(b)
	}

	memory, concurrency := v1alpha1.DefaultMemoryMiB, v1alpha1.DefaultConcurrency
	if l := r.Spec.Limits; l != nil {
		memory, concurrency = or(l.MemoryMiB, memory), or(l.Concurrency, concurrency)
	}
	least := podOverheadMiB + memory
	most := max(least, min(podOverheadMiB+memory*concurrency, maxPodMemoryMiB))

	variables, err := variables(r.Spec.Env)
	if err != nil {
		return nil, err
	}
	spec := map[string]any{
		"image":            r.Spec.Image,
		"executor":         s.Executor,
		"podLabels":        map[string]any{FunctionLabel: f.Name, RevisionLabel: number},
		"invocationLimits": map[string]any{"memory": mebibytes(memory)},
		"resources": map[string]any{
			"requests": map[string]any{"cpu": resource.NewMilliQuantity(podCPUMillis, resource.DecimalSI).String(), "memory": mebibytes(least)},
			"limits":   map[string]any{"memory": mebibytes(most)},
		},
		"checks": map[string]any{"readiness": map[string]any{
			"httpGet": map[string]any{"path": healthPath},
			// One second, not none: the operator's types leave out a zero and
			// the schema's default is ten.
			"initialDelaySeconds": int64(1), "periodSeconds": int64(2), "timeoutSeconds": int64(2), "failureThreshold": int64(3), "successThreshold": int64(1),
		}},
	}
	if len(variables) > 0 {
		spec["variables"] = variables
	}
	if len(s.ImagePullSecrets) > 0 {
		secrets := make([]any, len(s.ImagePullSecrets))
		for i, name := range s.ImagePullSecrets {
			secrets[i] = map[string]any{"name": name}
		}
		spec["imagePullSecrets"] = secrets
	}
	scale := scaling(r.Spec.Autoscaling)
	if scale.Autoscaler == v1alpha1.AutoscalerNone {
		spec["replicas"] = int64(scale.MinReplicas)
	} else {
		// The operator then leaves the Deployment's replicas alone, and refuses
		// a SpinApp that names any.
		spec["enableAutoscaling"] = true
		annotations[annotationAutoscaler] = string(scale.Autoscaler)
	}
	u.SetAnnotations(annotations)
	u.Object["spec"] = spec
	return seal(u)
}

func mebibytes(n int) string {
	return resource.NewQuantity(int64(n)<<20, resource.BinarySI).String()
}

// scaling returns a with its defaults.
func scaling(a *v1alpha1.FunctionAutoscaling) v1alpha1.FunctionAutoscaling {
	var out v1alpha1.FunctionAutoscaling
	if a != nil {
		out = *a
	}
	out.Autoscaler = or(out.Autoscaler, v1alpha1.AutoscalerNone)
	out.MinReplicas = or(out.MinReplicas, 1)
	out.MaxReplicas = max(out.MaxReplicas, out.MinReplicas)
	out.TargetCPUPercent = or(out.TargetCPUPercent, 80)
	return out
}

// variables makes Spin variables of a function's environment. A guest reads them
// through wasi:config or fermyon:spin/variables where its application declares
// them, as those that Hearth publishes do.
func variables(env []v1alpha1.EnvVar) ([]any, error) {
	var plain, secrets []string
	for _, e := range env {
		if e.SecretKeyRef != nil {
			secrets = append(secrets, e.Name)
		} else {
			plain = append(plain, e.Name)
		}
	}
	names, err := function.SpinVariables(plain, secrets)
	var bad *function.SpinNameError
	if errors.As(err, &bad) {
		return nil, &EnvError{Name: bad.Name, Problem: bad.Problem}
	}
	if err != nil {
		return nil, err
	}
	out := make([]any, 0, len(env))
	for _, e := range env {
		name, ok := names[e.Name]
		if !ok {
			continue // it is an environment variable only
		}
		v := map[string]any{"name": name}
		switch {
		case e.SecretKeyRef != nil:
			v["valueFrom"] = map[string]any{"secretKeyRef": map[string]any{"name": e.SecretKeyRef.Name, "key": e.SecretKeyRef.Key}}
		case e.Value != "":
			v["value"] = e.Value
		}
		out = append(out, v)
	}
	slices.SortFunc(out, func(a, b any) int {
		return strings.Compare(a.(map[string]any)["name"].(string), b.(map[string]any)["name"].(string))
	})
	return out, nil
}

// autoscaler renders the HorizontalPodAutoscaler or ScaledObject of a
// revision; nil: none is asked for.
func (s Settings) autoscaler(f *kube.Function, r Revision) (*unstructured.Unstructured, error) {
	scale := scaling(r.Spec.Autoscaling)
	var u *unstructured.Unstructured
	switch scale.Autoscaler {
	case v1alpha1.AutoscalerHPA:
		u = object("autoscaling/v2", "HorizontalPodAutoscaler", f.Namespace, f.Name)
		spec, err := runtime.DefaultUnstructuredConverter.ToUnstructured(&autoscalingv2.HorizontalPodAutoscalerSpec{
			ScaleTargetRef: autoscalingv2.CrossVersionObjectReference{APIVersion: "apps/v1", Kind: "Deployment", Name: f.Name},
			MinReplicas:    ptr.To(int32(scale.MinReplicas)),
			MaxReplicas:    int32(scale.MaxReplicas),
			Metrics: []autoscalingv2.MetricSpec{{
				Type: autoscalingv2.ResourceMetricSourceType,
				Resource: &autoscalingv2.ResourceMetricSource{Name: "cpu", Target: autoscalingv2.MetricTarget{
					Type: autoscalingv2.UtilizationMetricType, AverageUtilization: ptr.To(int32(scale.TargetCPUPercent)),
				}},
			}},
		})
		if err != nil {
			return nil, fmt.Errorf("encode the autoscaler of %s/%s: %w", f.Namespace, f.Name, err)
		}
		u.Object["spec"] = spec
	case v1alpha1.AutoscalerKEDA:
		// keda.sh/v1alpha1 ScaledObject; its cpu scaler needs a minimum of one.
		u = object(kedaAPIVersion, scaledObjectKind, f.Namespace, f.Name)
		u.Object["spec"] = map[string]any{
			"scaleTargetRef":  map[string]any{"apiVersion": "apps/v1", "kind": "Deployment", "name": f.Name},
			"minReplicaCount": int64(scale.MinReplicas), "maxReplicaCount": int64(scale.MaxReplicas),
			"triggers": []any{map[string]any{
				"type": "cpu", "metricType": "Utilization", "metadata": map[string]any{"value": strconv.Itoa(scale.TargetCPUPercent)},
			}},
		}
	default:
		return nil, nil
	}
	own(u, f)
	return seal(u)
}

// ingressPath is one path of an Ingress, to Service:port.
func ingressPath(path, service string, port int) networkingv1.HTTPIngressPath {
	return networkingv1.HTTPIngressPath{
		Path: path, PathType: ptr.To(networkingv1.PathTypePrefix),
		Backend: networkingv1.IngressBackend{Service: &networkingv1.IngressServiceBackend{
			Name: service, Port: networkingv1.ServiceBackendPort{Number: int32(port)},
		}},
	}
}

func ingressRule(host string, paths ...networkingv1.HTTPIngressPath) networkingv1.IngressRule {
	return networkingv1.IngressRule{Host: host, IngressRuleValue: networkingv1.IngressRuleValue{
		HTTP: &networkingv1.HTTPIngressRuleValue{Paths: paths},
	}}
}

// routesOf returns a function's paths below its custom host, sorted.
func routesOf(routes []string) []string {
	if len(routes) == 0 {
		return []string{"/"}
	}
	out := slices.Sorted(slices.Values(routes))
	return slices.Compact(out)
}

// fillIngress completes an Ingress that object began.
func (s Settings) fillIngress(u *unstructured.Unstructured, annotations map[string]string, rules []networkingv1.IngressRule) (*unstructured.Unstructured, error) {
	spec := networkingv1.IngressSpec{Rules: rules}
	if s.IngressClass != ClusterDefaultClass {
		spec.IngressClassName = &s.IngressClass
	}
	m, err := runtime.DefaultUnstructuredConverter.ToUnstructured(&spec)
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", describe(u), err)
	}
	u.Object["spec"] = m
	all := make(map[string]string, len(annotations)+len(s.IngressAnnotations)+1)
	for _, set := range []map[string]string{annotations, s.IngressAnnotations} {
		for k, v := range set {
			all[k] = v
		}
	}
	if len(all) > 0 {
		u.SetAnnotations(all)
	}
	return seal(u)
}

// spinIngress renders the Ingress of a spin function: its own host (empty:
// none yet) and its custom one, to the Service that the operator makes.
func (s Settings) spinIngress(f *kube.Function, ownHost, custom string) (*unstructured.Unstructured, error) {
	u := object("networking.k8s.io/v1", "Ingress", f.Namespace, f.Name)
	own(u, f)
	var rules []networkingv1.IngressRule
	if ownHost != "" {
		rules = append(rules, ingressRule(ownHost, ingressPath("/", f.Name, servicePort)))
	}
	if custom != "" && custom != ownHost {
		var paths []networkingv1.HTTPIngressPath
		for _, r := range routesOf(f.Spec.Routes) {
			paths = append(paths, ingressPath(r, f.Name, servicePort))
		}
		rules = append(rules, ingressRule(custom, paths...))
	}
	if len(rules) == 0 {
		return nil, nil
	}
	return s.fillIngress(u, nil, rules)
}

// wildcardIngress renders the Ingress of resident functions' own hosts.
func (s Settings) wildcardIngress(namespace string, hosts []string) (*unstructured.Unstructured, error) {
	u := object("networking.k8s.io/v1", "Ingress", namespace, WildcardIngress)
	u.SetLabels(map[string]string{ManagedByLabel: FieldManager, PartLabel: "wildcard"})
	rules := make([]networkingv1.IngressRule, len(hosts))
	for i, h := range hosts {
		rules[i] = ingressRule(h, ingressPath("/", s.EngineService, s.EnginePort))
	}
	return s.fillIngress(u, map[string]string{traefikPriority: wildcardPriority}, rules)
}

// hostIngress renders the Ingress of one custom host of resident functions.
func (s Settings) hostIngress(namespace, host string, routes []string) (*unstructured.Unstructured, error) {
	u := object("networking.k8s.io/v1", "Ingress", namespace, hostIngressName(host))
	u.SetLabels(map[string]string{ManagedByLabel: FieldManager, PartLabel: "host"})
	var paths []networkingv1.HTTPIngressPath
	for _, r := range routesOf(routes) {
		paths = append(paths, ingressPath(r, s.EngineService, s.EnginePort))
	}
	return s.fillIngress(u, nil, []networkingv1.IngressRule{ingressRule(host, paths...)})
}

// hostIngressName is readable where the host is short enough, and always
// unique.
func hostIngressName(host string) string {
	if name := "host." + host; len(name) <= maxHost {
		return name
	}
	sum := sha256.Sum256([]byte(host))
	return "host-sum-" + hex.EncodeToString(sum[:16])
}
