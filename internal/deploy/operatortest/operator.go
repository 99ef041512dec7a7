// Package operatortest stands in for SpinKube's spin-operator in tests, which
// is a program of its own in another repository. It does what the operator
// documents and what its source says it writes: of a SpinApp and its executor
// a Deployment and a Service, by server-side apply as "spin-operator", and the
// SpinApp's status. It refuses what the operator's webhooks refuse, and, being
// strict, what it does not know.
//
// Left out: runtime configuration, OpenTelemetry, volumes, components and
// liveness checks; a SpinApp that has them is refused, not half served. The
// certificates of installDefaultCACerts are not mounted.
package operatortest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/dynamic/dynamicinformer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"
	"k8s.io/utils/ptr"
)

// FieldManager is the manager of what the operator writes.
const FieldManager = "spin-operator"

const (
	appNameLabel = "core.spinkube.dev/app-name"
	httpPortName = "http-app"
	defaultPort  = 80
	callTimeout  = 10 * time.Second
)

var (
	spinApps    = schema.GroupVersionResource{Group: "core.spinkube.dev", Version: "v1alpha1", Resource: "spinapps"}
	executors   = schema.GroupVersionResource{Group: "core.spinkube.dev", Version: "v1alpha1", Resource: "spinappexecutors"}
	deployments = schema.GroupVersionResource{Group: "apps", Version: "v1", Resource: "deployments"}
	services    = schema.GroupVersionResource{Version: "v1", Resource: "services"}
)

// Options configure Start.
type Options struct {
	Config *rest.Config
	// Port is the container's port and the target of the Service. Default 80.
	Port int
	// Container changes the container that the operator would make, for nodes
	// whose shim is not Spin's: another port's probe, another command. Nil: as
	// the operator makes it.
	Container func(*corev1.Container)
}

// Operator is a running stand-in.
type Operator struct {
	o      Options
	client dynamic.Interface
	apps   cache.SharedIndexInformer
	queue  workqueue.TypedRateLimitingInterface[string]
	stop   context.CancelFunc
	done   sync.WaitGroup

	mu      sync.Mutex // guards refused, which the worker writes and tests read
	refused map[string]error
}

// Start begins to serve every SpinApp of the cluster, whose definitions must
// be there. The caller calls Close.
func Start(ctx context.Context, o Options) (*Operator, error) {
	if o.Port == 0 {
		o.Port = defaultPort
	}
	config := rest.CopyConfig(o.Config)
	config.QPS, config.Burst = 100, 200
	client, err := dynamic.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("make the operator's client: %w", err)
	}
	ctx, stop := context.WithCancel(context.WithoutCancel(ctx))
	op := &Operator{
		o: o, client: client, stop: stop, refused: make(map[string]error),
		queue: workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[string](50*time.Millisecond, 5*time.Second)),
	}
	factory := dynamicinformer.NewDynamicSharedInformerFactory(client, 0)
	op.apps = factory.ForResource(spinApps).Informer()
	owned := factory.ForResource(deployments).Informer()
	enqueue := func(obj any) {
		if gone, ok := obj.(cache.DeletedFinalStateUnknown); ok {
			obj = gone.Obj
		}
		if m, err := meta.Accessor(obj); err == nil {
			op.queue.Add(m.GetNamespace() + "/" + m.GetName())
		}
	}
	handler := cache.ResourceEventHandlerFuncs{AddFunc: enqueue, UpdateFunc: func(_, obj any) { enqueue(obj) }, DeleteFunc: enqueue}
	for _, informer := range []cache.SharedIndexInformer{op.apps, owned} {
		if _, err := informer.AddEventHandler(handler); err != nil {
			stop()
			return nil, fmt.Errorf("watch SpinApps: %w", err)
		}
	}
	factory.Start(ctx.Done())
	op.done.Add(1)
	go func() {
		defer op.done.Done()
		<-ctx.Done()
		op.queue.ShutDown()
		factory.Shutdown()
	}()
	if !cache.WaitForCacheSync(ctx.Done(), op.apps.HasSynced, owned.HasSynced) {
		op.Close()
		return nil, errors.New("the operator cannot read SpinApps and Deployments")
	}
	op.done.Add(1)
	go func() {
		defer op.done.Done()
		for op.next(ctx) {
		}
	}()
	return op, nil
}

// Close ends the operator and waits for it. What it made stays.
func (op *Operator) Close() {
	op.stop()
	op.done.Wait()
}

// Refused says why a SpinApp is not served: what a webhook of the operator
// would have refused; nil: nothing is wrong with it.
func (op *Operator) Refused(namespace, name string) error {
	op.mu.Lock()
	defer op.mu.Unlock()
	return op.refused[namespace+"/"+name]
}

func (op *Operator) next(ctx context.Context) bool {
	key, quit := op.queue.Get()
	if quit {
		return false
	}
	defer op.queue.Done(key)
	err := op.reconcile(ctx, key)
	op.mu.Lock()
	if err == nil {
		delete(op.refused, key)
	} else {
		op.refused[key] = err
	}
	op.mu.Unlock()
	if err != nil {
		op.queue.AddRateLimited(key)
	} else {
		op.queue.Forget(key)
	}
	return true
}

// spec is the part of SpinAppSpec that the stand-in knows.
type spec struct {
	Executor             string                        `json:"executor"`
	Image                string                        `json:"image"`
	ImagePullSecrets     []corev1.LocalObjectReference `json:"imagePullSecrets"`
	Replicas             int32                         `json:"replicas"`
	EnableAutoscaling    bool                          `json:"enableAutoscaling"`
	Variables            []corev1.EnvVar               `json:"variables"`
	ServiceAnnotations   map[string]string             `json:"serviceAnnotations"`
	DeploymentAnnotation map[string]string             `json:"deploymentAnnotations"`
	PodAnnotations       map[string]string             `json:"podAnnotations"`
	PodLabels            map[string]string             `json:"podLabels"`
	Resources            struct {
		Limits   corev1.ResourceList `json:"limits"`
		Requests corev1.ResourceList `json:"requests"`
	} `json:"resources"`
	InvocationLimits   map[string]string `json:"invocationLimits"`
	ServiceAccountName string            `json:"serviceAccountName"`
	Checks             struct {
		Readiness *check `json:"readiness"`
	} `json:"checks"`
}

type check struct {
	HTTPGet struct {
		Path string `json:"path"`
	} `json:"httpGet"`
	InitialDelaySeconds int32 `json:"initialDelaySeconds"`
	TimeoutSeconds      int32 `json:"timeoutSeconds"`
	PeriodSeconds       int32 `json:"periodSeconds"`
	SuccessThreshold    int32 `json:"successThreshold"`
	FailureThreshold    int32 `json:"failureThreshold"`
}

type executorSpec struct {
	CreateDeployment bool `json:"createDeployment"`
	DeploymentConfig *struct {
		RuntimeClassName      *string `json:"runtimeClassName"`
		InstallDefaultCACerts bool    `json:"installDefaultCACerts"`
	} `json:"deploymentConfig"`
}

// strict decodes an object's spec and refuses members that into lacks.
func strict(u *unstructured.Unstructured, into any) error {
	b, err := json.Marshal(u.Object["spec"])
	if err != nil {
		return err
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return fmt.Errorf("%s %s/%s: %w", u.GetKind(), u.GetNamespace(), u.GetName(), err)
	}
	return nil
}

func (op *Operator) reconcile(ctx context.Context, key string) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	namespace, name, _ := strings.Cut(key, "/")
	app, err := op.client.Resource(spinApps).Namespace(namespace).Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) || err == nil && app.GetDeletionTimestamp() != nil {
		return nil
	}
	if err != nil {
		return err
	}
	var s spec
	if err := strict(app, &s); err != nil {
		return err
	}
	found, err := op.client.Resource(executors).Namespace(namespace).Get(ctx, s.Executor, metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("executor %s: %w", s.Executor, err)
	}
	var executor executorSpec
	if err := strict(found, &executor); err != nil {
		return err
	}
	if err := validate(app, s, executor); err != nil {
		return err
	}
	if executor.CreateDeployment {
		if err := op.apply(ctx, deployments, op.deployment(app, s, *executor.DeploymentConfig.RuntimeClassName)); err != nil {
			return err
		}
	}
	if err := op.apply(ctx, services, service(app, s)); err != nil {
		return err
	}
	return op.status(ctx, app, s)
}

// validate is what the operator's webhooks check (spinapp_webhook.go).
func validate(app *unstructured.Unstructured, s spec, executor executorSpec) error {
	switch {
	case !executor.CreateDeployment && len(s.DeploymentAnnotation)+len(s.PodAnnotations) > 0:
		return errors.New("annotations are forbidden where the executor makes no Deployment")
	case executor.CreateDeployment && (executor.DeploymentConfig == nil || executor.DeploymentConfig.RuntimeClassName == nil):
		return errors.New("the executor must name a runtimeClassName")
	case s.EnableAutoscaling && s.Replicas != 0:
		return errors.New("replicas cannot be set when autoscaling is enabled")
	case !s.EnableAutoscaling && s.Replicas < 1:
		return errors.New("replicas must be at least 1")
	}
	for k, v := range s.InvocationLimits {
		if k != "memory" {
			return fmt.Errorf("unknown invocation limit %q", k)
		}
		q, err := resource.ParseQuantity(v)
		if err != nil {
			return fmt.Errorf("invocationLimits.memory: %w", err)
		}
		if limit, ok := s.Resources.Limits[corev1.ResourceMemory]; ok && q.Cmp(limit) > 0 {
			return errors.New("invocationLimits.memory exceeds resources.limits.memory")
		}
	}
	_, _, err := unstructured.NestedString(app.Object, "spec", "image")
	return err
}

func owner(app *unstructured.Unstructured) []metav1.OwnerReference {
	return []metav1.OwnerReference{*metav1.NewControllerRef(app, spinApps.GroupVersion().WithKind("SpinApp"))}
}

func readyLabels(name string) map[string]string {
	return map[string]string{appNameLabel: name, "core.spinkube.dev/app." + name + ".status": "ready"}
}

func (op *Operator) deployment(app *unstructured.Unstructured, s spec, class string) *appsv1.Deployment {
	name := app.GetName()
	var env []corev1.EnvVar
	for _, v := range s.Variables {
		v.Name = "SPIN_VARIABLE_" + strings.ToUpper(v.Name)
		env = append(env, v)
	}
	env = append(env, corev1.EnvVar{Name: "SPIN_HTTP_LISTEN_ADDR", Value: fmt.Sprintf("0.0.0.0:%d", op.o.Port)})
	if v, ok := s.InvocationLimits["memory"]; ok {
		q := resource.MustParse(v) // validated
		env = append(env, corev1.EnvVar{Name: "SPIN_MAX_INSTANCE_MEMORY", Value: fmt.Sprint(q.Value())})
	}
	container := corev1.Container{
		Name: name, Image: s.Image, Command: []string{"/"}, Env: env,
		Ports:     []corev1.ContainerPort{{Name: httpPortName, ContainerPort: int32(op.o.Port)}},
		Resources: corev1.ResourceRequirements{Limits: s.Resources.Limits, Requests: s.Resources.Requests},
	}
	if c := s.Checks.Readiness; c != nil {
		container.ReadinessProbe = &corev1.Probe{
			ProbeHandler:        corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: c.HTTPGet.Path, Port: intstr.FromInt(op.o.Port)}},
			InitialDelaySeconds: c.InitialDelaySeconds, TimeoutSeconds: c.TimeoutSeconds, PeriodSeconds: c.PeriodSeconds,
			SuccessThreshold: c.SuccessThreshold, FailureThreshold: c.FailureThreshold,
		}
	}
	if op.o.Container != nil {
		op.o.Container(&container)
	}
	template := maps.Clone(s.PodLabels)
	if template == nil {
		template = make(map[string]string)
	}
	maps.Copy(template, readyLabels(name))
	account := s.ServiceAccountName
	if account == "" {
		account = "default"
	}
	d := &appsv1.Deployment{
		TypeMeta:   metav1.TypeMeta{APIVersion: "apps/v1", Kind: "Deployment"},
		ObjectMeta: metav1.ObjectMeta{Namespace: app.GetNamespace(), Name: name, Labels: map[string]string{appNameLabel: name}, Annotations: s.DeploymentAnnotation, OwnerReferences: owner(app)},
		Spec: appsv1.DeploymentSpec{
			Selector: &metav1.LabelSelector{MatchLabels: readyLabels(name)},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: template, Annotations: s.PodAnnotations},
				Spec: corev1.PodSpec{
					RuntimeClassName: &class, ServiceAccountName: account, Containers: []corev1.Container{container}, ImagePullSecrets: s.ImagePullSecrets,
				},
			},
		},
	}
	if !s.EnableAutoscaling {
		d.Spec.Replicas = ptr.To(s.Replicas)
	}
	return d
}

func service(app *unstructured.Unstructured, s spec) *corev1.Service {
	name := app.GetName()
	return &corev1.Service{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Service"},
		ObjectMeta: metav1.ObjectMeta{Namespace: app.GetNamespace(), Name: name, Labels: map[string]string{appNameLabel: name}, Annotations: s.ServiceAnnotations, OwnerReferences: owner(app)},
		Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeClusterIP, Selector: readyLabels(name),
			Ports: []corev1.ServicePort{{Port: 80, Protocol: corev1.ProtocolTCP, TargetPort: intstr.FromString(httpPortName)}},
		},
	}
}

// apply is the operator's server-side apply, which forces.
func (op *Operator) apply(ctx context.Context, gvr schema.GroupVersionResource, obj metav1.Object) error {
	m, err := runtime.DefaultUnstructuredConverter.ToUnstructured(obj)
	if err != nil {
		return err
	}
	delete(m, "status")
	u := &unstructured.Unstructured{Object: m}
	unstructured.RemoveNestedField(m, "metadata", "creationTimestamp")
	unstructured.RemoveNestedField(m, "spec", "template", "metadata", "creationTimestamp")
	_, err = op.client.Resource(gvr).Namespace(u.GetNamespace()).Apply(ctx, u.GetName(), u, metav1.ApplyOptions{FieldManager: FieldManager, Force: true})
	return err
}

// status writes the SpinApp's status from its Deployment, when it changed.
func (op *Operator) status(ctx context.Context, app *unstructured.Unstructured, s spec) error {
	name := app.GetName()
	var conditions []metav1.Condition
	if list, found, _ := unstructured.NestedSlice(app.Object, "status", "conditions"); found {
		b, err := json.Marshal(list)
		if err != nil {
			return err
		}
		if err := json.Unmarshal(b, &conditions); err != nil {
			return err
		}
	}
	status := map[string]any{"activeScheduler": s.Executor, "serviceName": name, "readyReplicas": int64(0)}
	set := func(kind string, state metav1.ConditionStatus, reason, message string) {
		meta.SetStatusCondition(&conditions, metav1.Condition{Type: kind, Status: state, Reason: reason, Message: message})
	}
	u, err := op.client.Resource(deployments).Namespace(app.GetNamespace()).Get(ctx, name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		set("Available", metav1.ConditionUnknown, "DeploymentNotFound", "Deployment not found")
		set("Progressing", metav1.ConditionUnknown, "DeploymentNotFound", "Deployment not found")
	case err != nil:
		return err
	default:
		var d appsv1.Deployment
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, &d); err != nil {
			return err
		}
		status["deploymentName"], status["readyReplicas"] = name, int64(d.Status.ReadyReplicas)
		for _, c := range d.Status.Conditions {
			if slices.Contains([]appsv1.DeploymentConditionType{appsv1.DeploymentAvailable, appsv1.DeploymentProgressing}, c.Type) {
				set(string(c.Type), metav1.ConditionStatus(c.Status), c.Reason, c.Message)
			}
		}
	}
	status["conditions"] = conditions
	patch, err := json.Marshal(map[string]any{"status": status})
	if err != nil {
		return err
	}
	_, err = op.client.Resource(spinApps).Namespace(app.GetNamespace()).Patch(ctx, name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: FieldManager}, "status")
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}
