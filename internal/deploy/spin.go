package deploy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	applyautoscalingv1 "k8s.io/client-go/applyconfigurations/autoscaling/v1"
	"k8s.io/utils/ptr"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/kube"
)

const (
	// PhaseRollout is the phase from writing the SpinApp until its pods answer.
	PhaseRollout = "rollout"

	// pollRollout is between two looks at a rollout that is under way: a pod's
	// troubles change no object that is watched.
	pollRollout = time.Second
	// ingressLag is how long after a change of an Ingress controllers surely act
	// on it: Traefik gathers changes for two seconds.
	ingressLag = 5 * time.Second
	// pollTrouble is between two looks at what waits for a person.
	pollTrouble = 30 * time.Second
	// resync is when what nobody watches (executor, autoscaler) is looked at.
	resync = 10 * time.Minute

	// maxPods bounds the pods read, maxExamined those whose events and logs are.
	maxPods     = 500
	maxExamined = 3
	maxEvents   = 50
	logLines    = 20
	logBytes    = 4 << 10
)

// Input is one function to reconcile.
type Input struct {
	// Function is the object as it is; only read. Host and routes are those of
	// its spec, whichever revision runs.
	Function *kube.Function
	// Wanted is the revision that should answer requests.
	Wanted Revision
	// Previous is the newest other revision that answered requests, which
	// comes back when Wanted does not come up; nil: none.
	Previous *Revision
	// Elsewhere says that something else answers the function's requests until
	// its pods do: no host leads to them before.
	Elsewhere bool
}

// Outcome is what Reconcile found and did.
type Outcome struct {
	// Node is the rollout's word for status.nodes. Its Name is empty where
	// there is nothing to say: leave what was said before.
	Node v1alpha1.FunctionNode
	// Phases are set when Wanted is seen to be up for the first time.
	Phases []v1alpha1.Phase
	// Removed says that nothing of spin's is left and NodeName is to go from
	// status.nodes: the function has another runtime or is being deleted.
	Removed bool
	// RequeueAfter is when to call again at the latest; 0: when something changes.
	RequeueAfter time.Duration
}

// Spin brings functions with runtime spin to the cluster. It is safe for
// concurrent use, but not for the same function.
type Spin struct {
	c *Cluster
	// unrouted are functions whose Ingress was removed, by UID, and when
	// (time.Time). A leader that does not know waits once more.
	unrouted sync.Map
	// handed are functions whose custom host is led to the engines no more, by
	// UID, and when that was seen (time.Time).
	handed sync.Map
}

// NewSpin returns a reconciler over c, whose Run must be under way and synced.
func NewSpin(c *Cluster) *Spin { return &Spin{c: c} }

// Reconcile does the next step for one function: writes what differs and says
// how far its rollout is. Nothing is written where nothing differs.
//
// A revision has failed when there was no progress for
// Settings.ProgressDeadline, or at once for a reason that waiting cannot heal;
// then Previous is applied again and stays until another revision is wanted.
// Without a Previous, the failed revision stays and is ready should it come up
// after all. A revision that answered requests once is never rolled back here:
// what befalls it later is its nodes' trouble.
//
// With an error there may be a Node all the same, which tells it to the
// function's author. Errors of the API server itself have none. The typed ones
// are *MissingCRDError, *ConflictError, *HostTakenError, *HostNameError,
// *NoBaseDomainError (or ErrNoAddress), *EnvError and *ExecutorError; they wait
// for a person, RequeueAfter says how long.
func (s *Spin) Reconcile(ctx context.Context, in Input) (Outcome, error) {
	f := in.Function
	if f.DeletionTimestamp != nil {
		return Outcome{Removed: true}, nil
	}
	if f.Spec.Runtime != v1alpha1.RuntimeSpin {
		left, err := s.remove(ctx, f)
		switch {
		case err != nil:
			return Outcome{RequeueAfter: pollRollout}, err
		case left > 0:
			return Outcome{RequeueAfter: left}, nil
		}
		return Outcome{Removed: true}, nil
	}
	out, err := s.reconcile(ctx, in)
	if err == nil {
		return out, nil
	}
	if out.Node.Name != "" {
		return out, err
	}
	e := FunctionError(err)
	if e.Code == CodeCluster {
		return Outcome{RequeueAfter: pollRollout}, err
	}
	out.RequeueAfter = pollTrouble
	out.Node = v1alpha1.FunctionNode{Name: NodeName, Revision: in.Wanted.Number, Progress: v1alpha1.ProgressQueued, Serving: said(f).Serving, Error: e, Retrying: true}
	if e.Code == CodeEnvUnsupported {
		out.Node.Progress, out.Node.Retrying = v1alpha1.ProgressFailed, false
	}
	return out, err
}

// said is what was said of the rollout last.
func said(f *kube.Function) v1alpha1.FunctionNode {
	for _, n := range f.Status.Nodes {
		if n.Name == NodeName {
			return n
		}
	}
	return v1alpha1.FunctionNode{}
}

// answeredSince says whether a revision has answered requests since its rollout
// began, though the last word may be that it does not: an outage is told as
// serving nothing.
func answeredSince(f *kube.Function, revision int, began time.Time) bool {
	for _, r := range f.Status.History {
		if r.Revision == revision {
			return r.ActivatedAt != nil && !r.ActivatedAt.Before(began)
		}
	}
	return false
}

func (s *Spin) reconcile(ctx context.Context, in Input) (Outcome, error) {
	f := in.Function
	if err := s.ensureExecutor(ctx, f.Namespace); err != nil {
		return Outcome{}, err
	}
	app, err := s.c.get(ctx, spinAppsGVR, f.Namespace, f.Name)
	if err != nil {
		return Outcome{}, err
	}
	if wait, err := claim(app, f); err != nil {
		return Outcome{}, err
	} else if wait {
		return s.pending(in, 0, nil), nil
	}

	number, state := remembered(app)
	if state.failed != nil && (state.failed.Revision != in.Wanted.Number || in.Previous == nil) {
		state.failed = nil
	}
	target := in.Wanted
	if state.failed != nil {
		target = *in.Previous
	}
	if number != target.Number {
		state.started = s.c.o.Now()
	}
	app, scaler, err := s.write(ctx, f, app, target, state)
	if err != nil {
		return Outcome{}, err
	}
	if in.Elsewhere {
		out, err := s.takeOver(ctx, in, app, target, state)
		return s.withScaler(out, scaler), err
	}
	// The pods are worth having even where no host leads to them yet.
	hostErr := s.ensureIngress(ctx, f)
	if hostErr != nil && FunctionError(hostErr).Code == CodeCluster {
		return Outcome{}, hostErr
	}

	out, err := s.observe(ctx, in, app, target, state)
	if err != nil {
		return Outcome{}, err
	}
	if hostErr != nil && out.Node.Progress != v1alpha1.ProgressFailed {
		if out.Node.Progress == v1alpha1.ProgressReady {
			out.Node.Progress, out.RequeueAfter, out.Phases = v1alpha1.ProgressLoading, pollTrouble, nil
		}
		out.Node.Error, out.Node.Retrying = FunctionError(hostErr), true
	}
	return s.withScaler(out, scaler), hostErr
}

// withScaler adds to the word of a function that answers what keeps its
// autoscaler from doing anything, which is nobody's concern while there are
// worse troubles.
func (s *Spin) withScaler(out Outcome, scaler scalerState) Outcome {
	if out.Node.Progress != v1alpha1.ProgressReady || out.Node.Error != nil {
		return out
	}
	why, again := scaler.trouble(s.c.o.Now())
	if again > 0 {
		out.RequeueAfter = min(out.RequeueAfter, again)
	}
	if why != nil {
		out.Node.Error, out.Node.Retrying = why, true
	}
	return out
}

// takeOver has hosts lead to the function once its pods answer, and says that
// it is ready when they do.
func (s *Spin) takeOver(ctx context.Context, in Input, app *unstructured.Unstructured, target Revision, state rollout) (Outcome, error) {
	out, err := s.observe(ctx, in, app, target, state)
	if err != nil || out.Node.Progress != v1alpha1.ProgressReady {
		out.Node.Serving = 0
		return out, err
	}
	err = s.ensureIngress(ctx, in.Function)
	if err != nil && FunctionError(err).Code == CodeCluster {
		return Outcome{}, err
	}
	i := s.c.cachedIngress(in.Function.Namespace, in.Function.Name)
	if err == nil && i != nil && s.c.o.Now().Sub(i.CreationTimestamp.Time) > ingressLag && s.handedOver(in.Function) {
		return out, nil
	}
	out.Node.Progress, out.Node.Serving, out.Phases, out.RequeueAfter = v1alpha1.ProgressLoading, 0, nil, pollRollout
	if err != nil {
		out.Node.Error, out.Node.Retrying, out.RequeueAfter = FunctionError(err), true, pollTrouble
	}
	return out, err
}

// handedOver says whether no controller of Ingresses leads the function's custom
// host to the engines any more.
func (s *Spin) handedOver(f *kube.Function) bool {
	if f.Spec.Host == "" {
		return true
	}
	if leads(s.c.cachedIngress(s.c.o.Namespace, hostIngressName(f.Spec.Host)), f.Spec.Host, f.Spec.Routes) {
		s.handed.Delete(f.UID)
		return false
	}
	since, _ := s.handed.LoadOrStore(f.UID, s.c.o.Now())
	if s.c.o.Now().Sub(since.(time.Time)) <= ingressLag {
		return false
	}
	s.handed.Delete(f.UID)
	return true
}

// claim says whether an object under the function's name is in the way: for a
// moment (wait), because an earlier function's is being removed, or for good.
func claim(u *unstructured.Unstructured, f *kube.Function) (wait bool, err error) {
	switch {
	case u == nil || controlledBy(u, f) && u.GetDeletionTimestamp() == nil:
		return false, nil
	case u.GetDeletionTimestamp() != nil || ofEarlier(u, f):
		return true, nil
	}
	return false, &ConflictError{Object: describe(u), Owner: "was not made for this function"}
}

func (s *Spin) ensureExecutor(ctx context.Context, namespace string) error {
	live, err := s.c.get(ctx, executorsGVR, namespace, s.c.set.Executor)
	if err != nil {
		return err
	}
	if live == nil || ours(live) {
		wanted, err := s.c.set.executor(namespace)
		if err != nil {
			return err
		}
		_, err = s.c.apply(ctx, executorsGVR, live, wanted)
		return err
	}
	// Somebody else's is used as it is, if it can be.
	creates, _, _ := unstructured.NestedBool(live.Object, "spec", "createDeployment")
	class, _, _ := unstructured.NestedString(live.Object, "spec", "deploymentConfig", "runtimeClassName")
	image, _, _ := unstructured.NestedString(live.Object, "spec", "deploymentConfig", "spinImage")
	switch {
	case !creates:
		return &ExecutorError{Namespace: namespace, Name: live.GetName(), Problem: "makes no Deployments (createDeployment is false)"}
	case class == "" && image == "":
		return &ExecutorError{Namespace: namespace, Name: live.GetName(), Problem: "names neither a runtimeClassName nor a spinImage"}
	}
	return nil
}

// remembered reads the revision in a SpinApp and its rollout.
func remembered(app *unstructured.Unstructured) (number int, state rollout) {
	if app == nil {
		return 0, rollout{}
	}
	number, err := strconv.Atoi(app.GetLabels()[RevisionLabel])
	if err != nil {
		return 0, rollout{} // somebody took the label: roll out again
	}
	annotations := app.GetAnnotations()
	if state.started, err = time.Parse(time.RFC3339Nano, annotations[annotationStarted]); err != nil {
		return 0, rollout{}
	}
	var failed failedRollout
	if json.Unmarshal([]byte(annotations[annotationFailed]), &failed) == nil && failed.Revision > 0 {
		state.failed = &failed
	}
	return number, state
}

// write applies the SpinApp and autoscaler of a revision and returns them as
// they are now.
func (s *Spin) write(ctx context.Context, f *kube.Function, live *unstructured.Unstructured, target Revision, state rollout) (app *unstructured.Unstructured, scaler scalerState, err error) {
	wanted, err := s.c.set.spinApp(f, target, state)
	if err != nil {
		return nil, scaler, err
	}
	// Before the annotation that tells of it goes, the autoscaler must.
	if live != nil {
		old, kind := v1alpha1.Autoscaler(live.GetAnnotations()[annotationAutoscaler]), wanted.GetAnnotations()[annotationAutoscaler]
		switch {
		case string(old) == kind:
		case old == "":
			err = s.keepReplicas(ctx, f, live)
		default:
			err = s.removeAutoscaler(ctx, f, old)
		}
		if err != nil {
			return nil, scaler, err
		}
	}
	if app, err = s.c.apply(ctx, spinAppsGVR, live, wanted); err != nil {
		return nil, scaler, err
	}
	if wanted, err = s.c.set.autoscaler(f, target); err != nil || wanted == nil {
		return app, scaler, err
	}
	gvr := autoscalerKind(scaling(target.Spec.Autoscaling).Autoscaler)
	existing, err := s.c.get(ctx, gvr, f.Namespace, f.Name)
	if err != nil {
		return nil, scaler, err
	}
	if wait, err := claim(existing, f); err != nil {
		return nil, scaler, err
	} else if wait {
		return nil, scaler, fmt.Errorf("%s of an earlier function is still being removed", describe(existing))
	}
	if existing == nil {
		// KEDA refuses, or gives up for minutes on, what is to scale nothing.
		d, err := s.deployment(ctx, f)
		if err != nil {
			return nil, scaler, err
		}
		if d == nil || !ownedBy(d, app) {
			scaler.waits = true
			return app, scaler, nil
		}
	}
	scaler.object, err = s.c.apply(ctx, gvr, existing, wanted)
	if apierrors.IsForbidden(err) || apierrors.IsInvalid(err) || apierrors.IsBadRequest(err) {
		// A webhook's word, or a policy's: the pods are worth having without.
		scaler.refused, err = err, nil
	}
	return app, scaler, err
}

// keepReplicas becomes an owner of how many pods the Deployment is to have,
// beside the operator. With autoscaling the operator gives that field up, and
// one that nobody owns goes back to its default: of many pods, one would be
// left until the autoscaler looks. An autoscaler's first change takes the field
// from us, and so does the operator's where autoscaling is turned off.
func (s *Spin) keepReplicas(ctx context.Context, f *kube.Function, app *unstructured.Unstructured) error {
	d, err := s.deployment(ctx, f)
	if err != nil || d == nil || !ownedBy(d, app) {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, kube.CallTimeout)
	defer cancel()
	scale := applyautoscalingv1.Scale().WithName(d.Name).WithNamespace(d.Namespace).
		WithSpec(applyautoscalingv1.ScaleSpec().WithReplicas(ptr.Deref(d.Spec.Replicas, 1)))
	if _, err := s.c.client.AppsV1().Deployments(d.Namespace).ApplyScale(ctx, d.Name, scale, metav1.ApplyOptions{FieldManager: FieldManager}); err != nil {
		return fmt.Errorf("keep the number of pods of Deployment %s/%s: %w", d.Namespace, d.Name, err)
	}
	return nil
}

func autoscalerKind(a v1alpha1.Autoscaler) schema.GroupVersionResource {
	if a == v1alpha1.AutoscalerKEDA {
		return scaledObjectsGVR
	}
	return hpasGVR
}

func (s *Spin) removeAutoscaler(ctx context.Context, f *kube.Function, a v1alpha1.Autoscaler) error {
	if a == "" {
		return nil
	}
	gvr := autoscalerKind(a)
	return s.c.delete(ctx, gvr, f.Namespace, f.Name, func(o metav1.Object) bool { return controlledBy(o, f) })
}

// ensureIngress makes the hosts that are to be had lead to the function and
// returns why others do not.
func (s *Spin) ensureIngress(ctx context.Context, f *kube.Function) error {
	var live *unstructured.Unstructured
	var since time.Time
	var has []string
	if i := s.c.cachedIngress(f.Namespace, f.Name); i != nil {
		m, err := runtime.DefaultUnstructuredConverter.ToUnstructured(i)
		if err != nil {
			return fmt.Errorf("read Ingress %s/%s: %w", f.Namespace, f.Name, err)
		}
		live = &unstructured.Unstructured{Object: m}
		live.SetAPIVersion("networking.k8s.io/v1")
		live.SetKind("Ingress")
		if wait, err := claim(live, f); err != nil || wait {
			return err // when the earlier one is gone, the watch calls again
		}
		since, has = i.CreationTimestamp.Time, hostsOf(i)
	}
	free := func(host string) error {
		if slices.Contains(has, host) {
			return s.c.TakenBy(host, since)
		}
		return s.c.TakenBy(host, time.Time{})
	}
	ownHost, problem := s.c.Host(f.Namespace, f.Name)
	if problem == nil {
		if problem = free(ownHost); problem != nil {
			ownHost = ""
		}
	}
	custom := f.Spec.Host
	if custom != "" {
		if err := free(custom); err != nil {
			problem, custom = errors.Join(err, problem), ""
		}
	}
	wanted, err := s.c.set.spinIngress(f, ownHost, custom)
	if err != nil {
		return err
	}
	if wanted == nil {
		if live == nil {
			return problem
		}
		return errors.Join(s.removeIngress(ctx, f), problem)
	}
	if _, err := s.c.apply(ctx, ingressesGVR, live, wanted); err != nil {
		return err
	}
	return problem
}

func (s *Spin) removeIngress(ctx context.Context, f *kube.Function) error {
	return s.c.delete(ctx, ingressesGVR, f.Namespace, f.Name, func(o metav1.Object) bool { return controlledBy(o, f) })
}

// remove takes away what an earlier runtime spin left. The SpinApp goes last:
// while it is there, so may be the rest, and its pods answer what ingress
// controllers, which act on changes with a delay, still send them: left is for
// how long. A function that never was spin costs no request once the watch of
// SpinApps has seen them all.
func (s *Spin) remove(ctx context.Context, f *kube.Function) (left time.Duration, err error) {
	if s.c.spinApps.hasSynced() {
		_, found, err := s.c.spinApps.objects.GetByKey(f.Namespace + "/" + f.Name)
		if i := s.c.cachedIngress(f.Namespace, f.Name); err == nil && !found && (i == nil || !controlledBy(i, f)) {
			s.unrouted.Delete(f.UID)
			return 0, nil
		}
	}
	app, err := s.c.get(ctx, spinAppsGVR, f.Namespace, f.Name)
	var missing *MissingCRDError
	if errors.As(err, &missing) {
		app, err = nil, nil
	}
	if err != nil {
		return 0, err
	}
	if app != nil && controlledBy(app, f) {
		if err := s.removeAutoscaler(ctx, f, v1alpha1.Autoscaler(app.GetAnnotations()[annotationAutoscaler])); err != nil {
			return 0, err
		}
	}
	if i := s.c.cachedIngress(f.Namespace, f.Name); i != nil && controlledBy(i, f) {
		if err := s.removeIngress(ctx, f); err != nil {
			return 0, err
		}
	}
	if app == nil {
		s.unrouted.Delete(f.UID)
		return 0, nil
	}
	if !controlledBy(app, f) {
		return 0, nil
	}
	since, _ := s.unrouted.LoadOrStore(f.UID, s.c.o.Now())
	if left := ingressLag - s.c.o.Now().Sub(since.(time.Time)); left > 0 {
		return left, nil
	}
	return 0, s.c.delete(ctx, spinAppsGVR, f.Namespace, f.Name, func(o metav1.Object) bool { return controlledBy(o, f) })
}

func (s *Spin) pending(in Input, serving int, why *v1alpha1.FunctionError) Outcome {
	return Outcome{RequeueAfter: pollRollout, Node: v1alpha1.FunctionNode{
		Name: NodeName, Revision: in.Wanted.Number, Progress: v1alpha1.ProgressQueued, Serving: serving, Error: why, Retrying: why != nil,
	}}
}

// observe looks at what the operator and the cluster made of the SpinApp, and
// takes the rollout back when it failed.
func (s *Spin) observe(ctx context.Context, in Input, app *unstructured.Unstructured, target Revision, state rollout) (Outcome, error) {
	f, wanted := in.Function, in.Wanted.Number
	d, err := s.deployment(ctx, f)
	if err != nil {
		return Outcome{}, err
	}
	if d != nil && !ownedBy(d, app) {
		if metav1.GetControllerOf(d) == nil || metav1.GetControllerOf(d).Kind != "SpinApp" {
			return Outcome{}, &ConflictError{Object: fmt.Sprintf("Deployment %s/%s", d.Namespace, d.Name), Owner: "was not made for the function's SpinApp"}
		}
		d = nil // of an earlier SpinApp, and about to go
	}
	before := said(f)
	up := before.Revision == wanted && before.Progress == v1alpha1.ProgressReady || before.Serving == wanted ||
		answeredSince(in.Function, wanted, state.started)

	if complete(d, target) {
		out := Outcome{RequeueAfter: resync, Node: v1alpha1.FunctionNode{Name: NodeName, Revision: wanted, Progress: v1alpha1.ProgressReady, Serving: target.Number}}
		if state.failed != nil {
			out.Node.Progress, out.Node.Error = v1alpha1.ProgressFailed, ptr.To(state.failed.Error)
			return out, nil
		}
		// A pod may be told to answer before its Deployment says so: until the
		// whole rollout was told to be ready, its time is news.
		if before.Revision != wanted || before.Progress != v1alpha1.ProgressReady {
			out.Phases = []v1alpha1.Phase{{Name: PhaseRollout, Milliseconds: float64(s.c.o.Now().Sub(state.started)) / float64(time.Millisecond)}}
		}
		return out, nil
	}

	pods, err := s.pods(ctx, f)
	if err != nil {
		return Outcome{}, err
	}
	serving := servingRevision(pods, wanted)
	number := strconv.Itoa(target.Number)
	pods = slices.DeleteFunc(pods, func(p corev1.Pod) bool { return p.Labels[RevisionLabel] != number })
	why := diagnose(s.evidence(ctx, d, pods))
	late := s.c.o.Now().Sub(progressed(d, target, state)) > s.c.set.ProgressDeadline
	if late && why == nil {
		why = s.stuck(d, f)
	}

	out := s.pending(in, serving, nil)
	if len(pods) > 0 {
		out.Node.Progress = v1alpha1.ProgressLoading
	}
	switch {
	case why == nil:
	case up || !late && !why.terminal:
		out.Node.Error, out.Node.Retrying = ptr.To(why.FunctionError), true
	case state.failed != nil:
		// The older revision is back and does not come up either.
		out.Node.Error = ptr.To(why.FunctionError)
		out.Node.Error.Detail = fmt.Sprintf("%s; revision %d, which answered before, does not come up again: %s", state.failed.Error.Detail, target.Number, why.Detail)
		out.Node.Error.Code = state.failed.Error.Code
	case in.Previous == nil:
		out.Node.Progress, out.Node.Error, out.RequeueAfter = v1alpha1.ProgressFailed, ptr.To(why.FunctionError), pollTrouble
		return out, nil
	default:
		state = rollout{started: s.c.o.Now(), failed: &failedRollout{Revision: wanted, Error: why.FunctionError}}
		if _, _, err := s.write(ctx, f, app, *in.Previous, state); err != nil {
			return Outcome{}, err
		}
		s.c.o.Logger.InfoContext(ctx, "a revision did not come up, and the one before it is back", "namespace", f.Namespace, "function", f.Name,
			"revision", wanted, "previous", in.Previous.Number, "code", why.Code, "reason", why.Detail)
	}
	if state.failed != nil {
		out.Node.Progress, out.Node.Retrying = v1alpha1.ProgressFailed, false
		if out.Node.Error == nil {
			out.Node.Error = ptr.To(state.failed.Error)
		}
	}
	return out, nil
}

func ownedBy(o metav1.Object, app *unstructured.Unstructured) bool {
	ref := metav1.GetControllerOf(o)
	return ref != nil && ref.UID == app.GetUID()
}

func (s *Spin) deployment(ctx context.Context, f *kube.Function) (*appsv1.Deployment, error) {
	ctx, cancel := context.WithTimeout(ctx, kube.CallTimeout)
	defer cancel()
	d, err := s.c.client.AppsV1().Deployments(f.Namespace).Get(ctx, f.Name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("get Deployment %s/%s: %w", f.Namespace, f.Name, err)
	}
	return d, nil
}

// of says whether the Deployment's template is that of the revision.
func of(d *appsv1.Deployment, r Revision) bool {
	if d == nil || d.Spec.Template.Labels[RevisionLabel] != strconv.Itoa(r.Number) {
		return false
	}
	return slices.ContainsFunc(d.Spec.Template.Spec.Containers, func(c corev1.Container) bool {
		// An executor with spinImage has the image among the arguments.
		return c.Image == r.Spec.Image || slices.Contains(c.Args, r.Spec.Image)
	})
}

// complete says whether all pods are of the revision and at least as many as
// it must have are available. More may be on their way: an autoscaler's.
func complete(d *appsv1.Deployment, r Revision) bool {
	if !of(d, r) || d.Status.ObservedGeneration < d.Generation || d.Status.UpdatedReplicas != d.Status.Replicas {
		return false
	}
	least := min(int32(scaling(r.Spec.Autoscaling).MinReplicas), ptr.Deref(d.Spec.Replicas, 1))
	return d.Status.AvailableReplicas >= least
}

// progressed is when a rollout last moved: the Deployment controller notes
// every pod that comes up.
func progressed(d *appsv1.Deployment, r Revision, state rollout) time.Time {
	last := state.started
	if !of(d, r) {
		return last
	}
	for _, c := range d.Status.Conditions {
		if c.Type == appsv1.DeploymentProgressing && c.LastUpdateTime.After(last) {
			last = c.LastUpdateTime.Time
		}
	}
	return last
}

func (s *Spin) pods(ctx context.Context, f *kube.Function) ([]corev1.Pod, error) {
	ctx, cancel := context.WithTimeout(ctx, kube.CallTimeout)
	defer cancel()
	list, err := s.c.client.CoreV1().Pods(f.Namespace).List(ctx, metav1.ListOptions{
		LabelSelector: labels.Set{FunctionLabel: f.Name, AppNameLabel: f.Name}.String(), Limit: maxPods,
	})
	if err != nil {
		return nil, fmt.Errorf("list the pods of function %s/%s: %w", f.Namespace, f.Name, err)
	}
	return list.Items, nil
}

// servingRevision is the revision that answers while another one comes: the
// newest that has ready pods and is not the wanted one, or else that.
func servingRevision(pods []corev1.Pod, wanted int) int {
	older, newest := 0, 0
	for i := range pods {
		n, err := strconv.Atoi(pods[i].Labels[RevisionLabel])
		if err != nil || !ready(&pods[i]) || pods[i].DeletionTimestamp != nil {
			continue
		}
		if n == wanted {
			newest = n
		} else {
			older = max(older, n)
		}
	}
	return or(older, newest)
}

// evidence reads events and logs only when asked for, and of few pods.
func (s *Spin) evidence(ctx context.Context, d *appsv1.Deployment, pods []corev1.Pod) evidence {
	events, logs := 0, 0
	return evidence{
		deployment: d, pods: pods,
		events: func(p *corev1.Pod) []corev1.Event {
			if events++; events > maxExamined {
				return nil
			}
			return s.events(ctx, p)
		},
		logs: func(p *corev1.Pod) (string, bool) {
			if logs++; logs > maxExamined {
				return "", true
			}
			return s.logs(ctx, p)
		},
	}
}

// events are those of a pod, oldest first; none when they cannot be read: they
// only explain.
func (s *Spin) events(ctx context.Context, p *corev1.Pod) []corev1.Event {
	ctx, cancel := context.WithTimeout(ctx, kube.CallTimeout)
	defer cancel()
	list, err := s.c.client.CoreV1().Events(p.Namespace).List(ctx, metav1.ListOptions{
		FieldSelector: fields.Set{"involvedObject.kind": "Pod", "involvedObject.name": p.Name, "type": corev1.EventTypeWarning}.String(), Limit: maxEvents,
	})
	if err != nil {
		s.c.o.Logger.DebugContext(ctx, "events cannot be read", "namespace", p.Namespace, "pod", p.Name, "error", err)
		return nil
	}
	slices.SortStableFunc(list.Items, func(a, b corev1.Event) int { return eventTime(a).Compare(eventTime(b)) })
	return list.Items
}

func eventTime(e corev1.Event) time.Time {
	switch {
	case e.Series != nil:
		return e.Series.LastObservedTime.Time
	case !e.LastTimestamp.IsZero():
		return e.LastTimestamp.Time
	}
	return e.EventTime.Time
}

// logs are the last words of a pod's container that ended; false when they
// cannot be read.
func (s *Spin) logs(ctx context.Context, p *corev1.Pod) (string, bool) {
	ctx, cancel := context.WithTimeout(ctx, kube.CallTimeout)
	defer cancel()
	previous := len(p.Status.ContainerStatuses) > 0 && p.Status.ContainerStatuses[0].State.Terminated == nil
	words, err := s.c.client.CoreV1().Pods(p.Namespace).GetLogs(p.Name, &corev1.PodLogOptions{
		Previous: previous, TailLines: ptr.To[int64](logLines), LimitBytes: ptr.To[int64](logBytes),
	}).DoRaw(ctx)
	if err == nil && logsGone(string(words)) {
		err = errors.New(excerpt(string(words)))
	}
	if err != nil {
		s.c.o.Logger.DebugContext(ctx, "logs cannot be read", "namespace", p.Namespace, "pod", p.Name, "error", err)
		return "", false
	}
	return string(words), true
}

// stuck explains a rollout that stands still for no reason that can be seen.
func (s *Spin) stuck(d *appsv1.Deployment, f *kube.Function) *failure {
	if d == nil {
		return failed(false, CodeOperatorMissing, "nothing made a Deployment of SpinApp %s/%s within %s; install spin-operator, or see whether it runs and what it logs", f.Namespace, f.Name, s.c.set.ProgressDeadline)
	}
	return failed(false, CodeRolloutTimeout, "%d of %d pods are available and nothing moved for %s; see kubectl describe deployment %s -n %s",
		d.Status.AvailableReplicas, ptr.Deref(d.Spec.Replicas, 1), s.c.set.ProgressDeadline, f.Name, f.Namespace)
}
