package deploy

import (
	"errors"
	"fmt"
	"strings"

	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

// Codes of v1alpha1.FunctionError that this package gives. They are stable.
const (
	// CodeRuntimeMissing: a node cannot run Wasm, or the RuntimeClass is not there.
	CodeRuntimeMissing = "runtime-missing"
	// CodeWrongArchitecture: the image is for another processor.
	CodeWrongArchitecture = "wrong-architecture"
	// CodeMissingImport: the shim does not have what the module imports.
	CodeMissingImport = "missing-import"
	// CodeImagePull: a node cannot get the image; the detail is the registry's answer.
	CodeImagePull = "image-pull"
	// CodeContainerRefused: the container could not be made.
	CodeContainerRefused = "container-refused"
	// CodeCrashed: the function's process ended again and again.
	CodeCrashed = "crashed"
	// CodeOutOfMemory: the pod took more memory than it may.
	CodeOutOfMemory = "out-of-memory"
	// CodeUnschedulable: no node takes the pod.
	CodeUnschedulable = "unschedulable"
	// CodeQuota: the namespace's quota does not allow the pods.
	CodeQuota = "quota-exceeded"
	// CodePodRefused: the API server does not take the pods.
	CodePodRefused = "pod-refused"
	// CodeNotReady: the pod runs and does not answer.
	CodeNotReady = "not-ready"
	// CodeOperatorMissing: nobody makes Deployments of SpinApps.
	CodeOperatorMissing = "operator-missing"
	// CodeRolloutTimeout: nothing moved, and nothing says why.
	CodeRolloutTimeout = "rollout-timeout"
	// CodeCRDMissing: the cluster does not know a kind.
	CodeCRDMissing = "crd-missing"
	// CodeConflict: another manager or owner has what would be written.
	CodeConflict = "conflict"
	// CodeHostTaken: another Ingress has the host.
	CodeHostTaken = "host-taken"
	// CodeHostInvalid: the host that the template makes is no DNS name.
	CodeHostInvalid = "host-invalid"
	// CodeNoBaseDomain: there is nothing to make a host of.
	CodeNoBaseDomain = "no-base-domain"
	// CodeEnvUnsupported: an environment variable cannot be a variable of Spin.
	CodeEnvUnsupported = "env-unsupported"
	// CodeExecutorUnusable: the namespace's executor makes no Deployments.
	CodeExecutorUnusable = "executor-unusable"
	// CodeAutoscaler: the function answers, but its autoscaler does nothing.
	CodeAutoscaler = "autoscaler-idle"
	// CodeCluster: the API server did not do what it was asked.
	CodeCluster = "cluster-error"
)

// MissingCRDError says that the cluster lacks a kind.
type MissingCRDError struct {
	// CRD is the definition's name, such as spinapps.core.spinkube.dev.
	CRD string
	// Install is what installs it, one sentence.
	Install string
}

func (e *MissingCRDError) Error() string {
	return fmt.Sprintf("the cluster has no %s; %s", e.CRD, e.Install)
}

func missingCRD(gvr schema.GroupVersionResource) *MissingCRDError {
	e := &MissingCRDError{CRD: gvr.GroupResource().String()}
	switch gvr.Group {
	case spinAppsGVR.Group:
		e.Install = "install SpinKube: apply spin-operator.crds.yaml of the spin-operator release, then its chart, or use runtime resident"
	case scaledObjectsGVR.Group:
		e.Install = "install KEDA with its chart (kedacore/keda), or set autoscaler to hpa or none"
	default:
		e.Install = "install what brings it"
	}
	return e
}

// ConflictError says that somebody else owns what would have been written.
type ConflictError struct {
	// Object is such as "SpinApp team/hello".
	Object string
	// Managers are the field managers (who wrote it last), Fields what they
	// own; both empty where the whole object is someone else's.
	Managers, Fields []string
	// Owner says whose the whole object is.
	Owner string
}

func (e *ConflictError) Error() string {
	if len(e.Managers) > 0 {
		return fmt.Sprintf("%s of %s was set by %s; undo that change (kubectl apply with --force-conflicts --field-manager=%s takes it back), then it is reconciled again",
			strings.Join(e.Fields, ", "), e.Object, quoted(e.Managers), FieldManager)
	}
	return fmt.Sprintf("%s exists already and %s; delete or rename it, or give the function another name", e.Object, e.Owner)
}

func quoted(names []string) string {
	out := make([]string, len(names))
	for i, n := range names {
		out[i] = fmt.Sprintf("%q", n)
	}
	return strings.Join(out, ", ")
}

// HostTakenError says that an Ingress of somebody else has the host.
type HostTakenError struct {
	Host string
	// Namespace and Name are the Ingress's.
	Namespace, Name string
}

func (e *HostTakenError) Error() string {
	return fmt.Sprintf("host %s is taken by Ingress %s/%s; delete that Ingress or choose another host", e.Host, e.Namespace, e.Name)
}

// HostNameError says that a host would be no DNS name.
type HostNameError struct {
	Host     string
	Template HostTemplate
	Problem  string
}

func (e *HostNameError) Error() string {
	return fmt.Sprintf("the host %s, made by the template %q, is no DNS name: %s; shorten the name or change the template", e.Host, e.Template, e.Problem)
}

// NoBaseDomainError says that the load balancer has a name and no address, so
// that only a person can say which domain leads to it.
type NoBaseDomainError struct {
	// Names are the load balancer's.
	Names []string
	// Setting says where the base domain is set.
	Setting string
}

func (e *NoBaseDomainError) Error() string {
	setting := e.Setting
	if setting == "" {
		setting = DefaultBaseDomainSetting
	}
	return fmt.Sprintf("the load balancer has only the name %s, below which no function can have a host; make a wildcard DNS record (*.fn.example.com CNAME %s) and set %s to its domain (fn.example.com)",
		strings.Join(e.Names, ", "), e.Names[0], setting)
}

// EnvError says that a secret cannot reach a guest of Spin.
type EnvError struct {
	Name, Problem string
}

func (e *EnvError) Error() string {
	return fmt.Sprintf("the secret %s cannot become a variable of Spin: %s; rename it or use the runtime resident", e.Name, e.Problem)
}

// ExecutorError says that the namespace's executor cannot be used.
type ExecutorError struct {
	Namespace, Name, Problem string
}

func (e *ExecutorError) Error() string {
	return fmt.Sprintf("SpinAppExecutor %s/%s, which is not Hearth's, %s; change it, or delete it and a fitting one is made", e.Namespace, e.Name, e.Problem)
}

// FunctionError tells err, which is one of this package's, to people who look at
// the function.
func FunctionError(err error) *v1alpha1.FunctionError {
	var (
		crd      *MissingCRDError
		conflict *ConflictError
		taken    *HostTakenError
		host     *HostNameError
		base     *NoBaseDomainError
		env      *EnvError
		executor *ExecutorError
	)
	switch {
	case errors.As(err, &crd):
		return &v1alpha1.FunctionError{Code: CodeCRDMissing, Detail: crd.Error()}
	case errors.As(err, &conflict):
		return &v1alpha1.FunctionError{Code: CodeConflict, Detail: conflict.Error()}
	case errors.As(err, &taken):
		return &v1alpha1.FunctionError{Code: CodeHostTaken, Detail: taken.Error()}
	case errors.As(err, &host):
		return &v1alpha1.FunctionError{Code: CodeHostInvalid, Detail: host.Error()}
	case errors.As(err, &base):
		return &v1alpha1.FunctionError{Code: CodeNoBaseDomain, Detail: base.Error()}
	case errors.Is(err, ErrNoAddress):
		return &v1alpha1.FunctionError{Code: CodeNoBaseDomain, Detail: ErrNoAddress.Error()}
	case errors.As(err, &env):
		return &v1alpha1.FunctionError{Code: CodeEnvUnsupported, Detail: env.Error()}
	case errors.As(err, &executor):
		return &v1alpha1.FunctionError{Code: CodeExecutorUnusable, Detail: executor.Error()}
	}
	return &v1alpha1.FunctionError{Code: CodeCluster, Detail: excerpt(err.Error())}
}
