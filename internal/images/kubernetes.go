package images

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-logr/logr"
	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	utilwait "k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

// ListLabel marks the ConfigMaps, with the value "true", whose values are
// lists of images; see [ParseList].
const ListLabel = v1alpha1.Group + "/prefetch"

const (
	// spinRuntimeClass is the RuntimeClass of SpinKube's own executor, used for
	// SpinApps whose executor names none. spinHandler is the runtime handler of
	// containerd-shim-spin, used where the cluster does not have that class.
	spinRuntimeClass = "wasmtime-spin-v2"
	spinHandler      = "spin"
	// absentRetry is how often it is looked whether a kind that the API does
	// not know has come: somebody may install SpinKube any time.
	absentRetry = 2 * time.Minute
	// settle is how long changes are gathered before there is a new snapshot:
	// a rollout changes many objects at once.
	settle = 200 * time.Millisecond
	// maxWants bounds the wishes of one object.
	maxWants = 100
	// maxSourceProblems bounds Snapshot.Problems.
	maxSourceProblems = 10
)

// KubernetesOptions configure a [Kubernetes]. Client, Dynamic, Node and
// WasmHandlers are required.
type KubernetesOptions struct {
	// Client and Dynamic only list and watch: RuntimeClasses, Pods,
	// Deployments, StatefulSets, DaemonSets, CronJobs, ServiceAccounts,
	// SpinApps, SpinAppExecutors and Functions everywhere, ConfigMaps in
	// Namespace. No Secrets: of those only the names are known.
	Client  kubernetes.Interface
	Dynamic dynamic.Interface
	// Node is this node's name.
	Node string
	// Namespace is where lists of images are taken from. Empty: from nowhere.
	Namespace string
	// WasmHandlers are the runtime handlers of this node that run Wasm.
	// Objects that want another one are not for this node. Call Look after
	// a change.
	WasmHandlers func() []string
	// NodeLabels, if set, are this node's labels: what selects other nodes by
	// nodeSelector is not wanted here. Affinities and taints are not heeded;
	// at worst an image is here without need.
	NodeLabels func() map[string]string
	// CachePath is the file (mode 0644, no secrets) with what was wanted
	// last, used until the API has answered after a start. Empty: none.
	CachePath string
	// Logger gets a line per change of the API's reachability (default: none).
	Logger *slog.Logger
}

// Kubernetes learns from the API of a cluster which images are wanted. It
// keeps a few words per object, not the objects.
//
// It watches Pods of this node and those not scheduled yet, workloads whose
// pods may come here, SpinApps and Functions if the cluster knows these kinds,
// and lists in ConfigMaps. When the API does not answer, what it said last
// counts on, also beyond a restart.
type Kubernetes struct {
	o     KubernetesOptions
	log   *slog.Logger
	kinds []*kind
	kick  chan struct{} // capacity 1: something changed

	mu       sync.Mutex
	started  bool
	cached   []Wanted // until complete
	snapshot Snapshot
	newer    chan struct{}
	saved    []Wanted // what the cache file has
}

var _ Source = (*Kubernetes)(nil)

// wish is what is kept of one object.
type wish struct {
	// class is the RuntimeClass, which must lead to a Wasm handler of this
	// node; handlers are given directly. With neither nothing is warmed.
	class    string
	handlers []string
	// spin stands for the handler of SpinApps, which executor of the namespace
	// decides (empty: the one that SpinKube would choose).
	spin      bool
	namespace string
	executor  string
	selector  map[string]string
	refs      []Reference
	secrets   []PullSecret
	// account is the ServiceAccount (namespace/name) whose pull secrets count
	// when the object has none itself.
	account string
	user    string
	urgent  bool
	// problems are what could not be read of the object.
	problems []string
}

// classWish is what is kept of a RuntimeClass.
type classWish struct {
	handler  string
	selector map[string]string
}

// executorWish is what is kept of a SpinAppExecutor.
type executorWish struct {
	// class is the RuntimeClass of its pods, empty for the usual one.
	class string
	// elsewhere: SpinApps do not become pods with their own image, because the
	// operator makes no Deployment or runs an image that brings Spin itself.
	elsewhere bool
}

// accountWish is what is kept of a ServiceAccount: its pull secrets, if any.
type accountWish []PullSecret

// NewKubernetes prepares the source and reads its cache. Run does the rest.
func NewKubernetes(o KubernetesOptions) (*Kubernetes, error) {
	switch {
	case o.Client == nil, o.Dynamic == nil:
		return nil, errors.New("images: the source needs clients of the API")
	case o.Node == "":
		return nil, errors.New("images: the source needs the node's name")
	case o.WasmHandlers == nil:
		return nil, errors.New("images: the source needs to know the node's Wasm handlers")
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	k := &Kubernetes{o: o, log: o.Logger, kick: make(chan struct{}, 1), newer: make(chan struct{})}
	k.kinds = k.makeKinds()
	if o.CachePath != "" {
		cached, err := readWanted(o.CachePath)
		if err != nil {
			k.log.Warn("images wanted last are not known, waiting for the API", "file", o.CachePath, "err", err)
		}
		k.cached, k.saved = cached, cached
	}
	k.snapshot = Snapshot{Wanted: k.cached, Known: len(k.cached) > 0}
	return k, nil
}

// Snapshot implements [Source].
func (k *Kubernetes) Snapshot() (Snapshot, <-chan struct{}) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.snapshot, k.newer
}

// Look asks for a new snapshot, for instance because a handler came.
func (k *Kubernetes) Look() {
	select {
	case k.kick <- struct{}{}:
	default:
	}
}

// Run watches until ctx ends, then waits for its goroutines and returns nil.
// It may be called once.
func (k *Kubernetes) Run(ctx context.Context) error {
	k.mu.Lock()
	if k.started {
		k.mu.Unlock()
		return errors.New("images: the source is already running")
	}
	k.started = true
	k.mu.Unlock()
	var wg sync.WaitGroup
	for _, kd := range k.kinds {
		wg.Go(func() { kd.run(ctx) })
	}
	for {
		select {
		case <-ctx.Done():
			wg.Wait()
			return nil
		case <-k.kick:
		}
		if !wait(ctx, settle) {
			wg.Wait()
			return nil
		}
		k.build()
	}
}

// build makes a snapshot of what all kinds know.
func (k *Kubernetes) build() {
	handlers := k.o.WasmHandlers()
	var labels map[string]string
	if k.o.NodeLabels != nil {
		labels = k.o.NodeLabels()
	}
	fits := func(selector map[string]string) bool {
		if k.o.NodeLabels == nil {
			return true
		}
		for key, v := range selector {
			if labels[key] != v {
				return false
			}
		}
		return true
	}
	classes := make(map[string]classWish)
	executors := make(map[string]executorWish)
	accounts := make(map[string]accountWish)
	var all []wish
	snap := Snapshot{Known: true, Complete: true}
	for _, kd := range k.kinds {
		kd.mu.Lock()
		snap.Complete = snap.Complete && kd.synced
		if !kd.failing.IsZero() && (snap.StaleSince.IsZero() || kd.failing.Before(snap.StaleSince)) {
			snap.StaleSince = kd.failing
			snap.StaleReason = fmt.Sprintf("the API does not give %s: %s", kd.name, shorten(kd.reason, 200))
		}
		for key, v := range kd.objects {
			switch v := v.(type) {
			case classWish:
				classes[key] = v // not namespaced: its key is its name
			case executorWish:
				executors[key] = v
			case accountWish:
				accounts[key] = v
			case wish:
				all = append(all, v)
			case []wish:
				all = append(all, v...)
			}
		}
		kd.mu.Unlock()
	}
	var wants []want
	for _, w := range all {
		for _, p := range w.problems {
			if len(snap.Problems) < maxSourceProblems && !slices.Contains(snap.Problems, w.user+": "+p) {
				snap.Problems = append(snap.Problems, w.user+": "+p)
			}
		}
		hs := w.handlers
		switch {
		case w.class != "":
			c, ok := classes[w.class]
			if !ok || !fits(c.selector) {
				continue
			}
			hs = []string{c.handler}
		case w.spin:
			executor := chooseExecutor(executors, w.namespace, w.executor)
			c, ok := classes[cmp.Or(executor.class, spinRuntimeClass)]
			if executor.class == "" && !ok {
				c = classWish{handler: spinHandler}
			} else if !ok {
				continue // its pods cannot be made
			}
			if executor.elsewhere || !fits(c.selector) {
				continue
			}
			hs = []string{c.handler}
		}
		if !fits(w.selector) || slices.ContainsFunc(hs, func(h string) bool { return !slices.Contains(handlers, h) }) {
			continue
		}
		if len(hs) == 0 {
			hs = []string{""}
		}
		secrets := w.secrets
		if len(secrets) == 0 {
			secrets = accounts[w.account] // as the ServiceAccount admission plugin does with pods
		}
		for _, r := range w.refs {
			for _, h := range hs {
				wants = append(wants, want{ref: r, handler: h, secrets: secrets, user: w.user, urgent: w.urgent})
			}
		}
	}
	slices.Sort(snap.Problems)
	snap.Wanted = merge(wants)

	k.mu.Lock()
	defer k.mu.Unlock()
	if snap.Complete {
		k.cached = nil
	} else {
		snap.Wanted = union(snap.Wanted, k.cached)
		snap.Known = len(snap.Wanted) > 0
	}
	if sameSnapshot(k.snapshot, snap) {
		return
	}
	if !k.snapshot.StaleSince.IsZero() && snap.StaleSince.IsZero() {
		k.log.Info("API answers again")
	} else if k.snapshot.StaleSince.IsZero() && !snap.StaleSince.IsZero() {
		k.log.Warn("API does not answer, the images wanted last stay wanted", "reason", snap.StaleReason)
	}
	k.snapshot = snap
	close(k.newer)
	k.newer = make(chan struct{})
	if snap.Complete && k.o.CachePath != "" && !sameWanted(k.saved, snap.Wanted) {
		if err := writeJSON(k.o.CachePath, wantedFile{Version: 1, Wanted: snap.Wanted}); err != nil {
			k.log.Warn("images wanted are not kept for the next start", "file", k.o.CachePath, "err", err)
			return
		}
		k.saved = snap.Wanted
	}
}

// chooseExecutor finds the executor of a SpinApp, as SpinKube's webhook chooses
// one for an app that names none: the first of the namespace by name. Without
// any it is as if the usual one were there.
func chooseExecutor(executors map[string]executorWish, namespace, name string) executorWish {
	if name != "" {
		return executors[namespace+"/"+name]
	}
	first := ""
	for key := range executors {
		if strings.HasPrefix(key, namespace+"/") && (first == "" || key < first) {
			first = key
		}
	}
	return executors[first]
}

func sameSnapshot(a, b Snapshot) bool {
	return a.Known == b.Known && a.Complete == b.Complete && a.StaleSince.Equal(b.StaleSince) &&
		a.StaleReason == b.StaleReason && slices.Equal(a.Problems, b.Problems) && sameWanted(a.Wanted, b.Wanted)
}

func sameWanted(a, b []Wanted) bool {
	return slices.EqualFunc(a, b, func(a, b Wanted) bool {
		return a.Reference == b.Reference && a.Urgent == b.Urgent && a.UserCount == b.UserCount &&
			slices.Equal(a.Handlers, b.Handlers) && slices.Equal(a.PullSecrets, b.PullSecrets) && slices.Equal(a.Users, b.Users)
	})
}

// kind follows one kind of object. It is the store of a reflector, and keeps
// of each object what keep makes of it.
type kind struct {
	name string
	// optional kinds may be unknown to the API; absentRetry is when to look
	// for them again.
	optional    bool
	absentRetry time.Duration
	// spare kinds only make the picture better: being denied them is as good
	// as there being none.
	spare   bool
	list    func(context.Context, metav1.ListOptions) (runtime.Object, error)
	watch   func(context.Context, metav1.ListOptions) (watch.Interface, error)
	example runtime.Object
	// client is what list and watch ask; fakes say by their type that they
	// cannot stream lists.
	client any
	// keep returns nil for what does not matter.
	keep func(any) any
	look func()

	mu      sync.Mutex
	objects map[string]any
	synced  bool
	failing time.Time // since when, zero while the API answers
	reason  string
	absent  func() // ends the reflector when the API does not know the kind
}

// run follows the kind until ctx ends.
func (kd *kind) run(ctx context.Context) {
	for ctx.Err() == nil {
		rctx, cancel := context.WithCancel(ctx)
		kd.mu.Lock()
		kd.absent = cancel
		kd.mu.Unlock()
		lw := &cache.ListWatch{
			ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
				out, err := kd.list(ctx, o)
				kd.answered(ctx, err)
				return out, err
			},
			WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
				out, err := kd.watch(ctx, o)
				kd.answered(ctx, err)
				return out, err
			},
		}
		// answered and the snapshot say what is wrong; klog need not.
		silent := logr.Discard()
		cache.NewReflectorWithOptions(cache.ToListWatcherWithWatchListSemantics(lw, kd.client), kd.example, kd,
			cache.ReflectorOptions{Name: "images " + kd.name, Logger: &silent, Backoff: watchBackoff()}).RunWithContext(klog.NewContext(rctx, silent))
		cancel()
		// Either ctx ended, or the API does not know the kind.
		if !wait(ctx, kd.absentRetry*9/10+rand.N(kd.absentRetry/5)) {
			return
		}
	}
}

// watchBackoff is between attempts to watch an API server that is away.
// client-go's own grows to a minute: for that long after the API server is
// back, a node would not hear which images its new pods need. Three to six
// seconds for each of a dozen kinds are three requests a second, and the jitter
// keeps a fleet's apart.
func watchBackoff() *utilwait.Backoff {
	return &utilwait.Backoff{Duration: 500 * time.Millisecond, Factor: 2, Jitter: 1, Cap: 3 * time.Second, Steps: 16}
}

// answered takes in how the API answered.
func (kd *kind) answered(ctx context.Context, err error) {
	kd.mu.Lock()
	defer kd.mu.Unlock()
	switch {
	case err == nil:
		if kd.failing.IsZero() {
			return
		}
		kd.failing, kd.reason = time.Time{}, ""
	case ctx.Err() != nil:
		return
	case kd.optional && (apierrors.IsNotFound(err) || meta.IsNoMatchError(err)), kd.spare && apierrors.IsForbidden(err):
		clear(kd.objects)
		kd.synced, kd.failing, kd.reason = true, time.Time{}, ""
		kd.absent()
	case apierrors.IsResourceExpired(err) || apierrors.IsGone(err):
		return // an ordinary end of a watch; a list follows
	default:
		if kd.failing.IsZero() {
			kd.failing = time.Now()
			kd.reason = err.Error()
		}
	}
	kd.look()
}

func (kd *kind) set(obj any) error {
	key, err := cache.MetaNamespaceKeyFunc(obj)
	if err != nil {
		return err
	}
	v := kd.keep(obj)
	kd.mu.Lock()
	defer kd.mu.Unlock()
	if _, was := kd.objects[key]; v == nil && !was {
		return nil
	}
	if v == nil {
		delete(kd.objects, key)
	} else {
		kd.objects[key] = v
	}
	kd.look()
	return nil
}

// Add implements cache.ReflectorStore.
func (kd *kind) Add(obj any) error { return kd.set(obj) }

// Update implements cache.ReflectorStore.
func (kd *kind) Update(obj any) error { return kd.set(obj) }

// Delete implements cache.ReflectorStore.
func (kd *kind) Delete(obj any) error {
	key, err := cache.DeletionHandlingMetaNamespaceKeyFunc(obj)
	if err != nil {
		return err
	}
	kd.mu.Lock()
	defer kd.mu.Unlock()
	if _, was := kd.objects[key]; was {
		delete(kd.objects, key)
		kd.look()
	}
	return nil
}

// Replace implements cache.ReflectorStore.
func (kd *kind) Replace(list []any, _ string) error {
	objects := make(map[string]any)
	for _, obj := range list {
		key, err := cache.MetaNamespaceKeyFunc(obj)
		if err != nil {
			return err
		}
		if v := kd.keep(obj); v != nil {
			objects[key] = v
		}
	}
	kd.mu.Lock()
	defer kd.mu.Unlock()
	kd.objects, kd.synced = objects, true
	kd.look()
	return nil
}

// Resync implements cache.ReflectorStore; there is nothing to do.
func (kd *kind) Resync() error { return nil }

// Transformer implements cache.TransformingStore: what the reflector itself
// gathers of a long list is trimmed too.
func (kd *kind) Transformer() cache.TransformFunc {
	return func(obj any) (any, error) {
		if a, err := meta.Accessor(obj); err == nil {
			a.SetManagedFields(nil)
			a.SetAnnotations(nil)
		}
		return obj, nil
	}
}

// These are reached without types of their own, because a cluster need not
// know them.
var (
	spinApps         = schema.GroupVersionResource{Group: "core.spinkube.dev", Version: "v1alpha1", Resource: "spinapps"}
	spinAppExecutors = schema.GroupVersionResource{Group: "core.spinkube.dev", Version: "v1alpha1", Resource: "spinappexecutors"}
	functions        = schema.GroupVersionResource{Group: v1alpha1.Group, Version: "v1alpha1", Resource: "functions"}
)

// listWatcher is what typed clients have in common.
type listWatcher[L runtime.Object] interface {
	List(ctx context.Context, o metav1.ListOptions) (L, error)
	Watch(ctx context.Context, o metav1.ListOptions) (watch.Interface, error)
}

func newKind[L runtime.Object](k *Kubernetes, client any, name string, c listWatcher[L], example runtime.Object, narrow metav1.ListOptions, keep func(any) any) *kind {
	with := func(o metav1.ListOptions) metav1.ListOptions {
		o.FieldSelector, o.LabelSelector = narrow.FieldSelector, narrow.LabelSelector
		return o
	}
	return &kind{
		name: name, example: example, client: client, keep: keep, look: k.Look, absentRetry: absentRetry, objects: make(map[string]any),
		list:  func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) { return c.List(ctx, with(o)) },
		watch: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) { return c.Watch(ctx, with(o)) },
	}
}

func (k *Kubernetes) makeKinds() []*kind {
	c := k.o.Client
	all := metav1.ListOptions{}
	template := func(what, ns, name string, t corev1.PodTemplateSpec) any {
		return podWish(t.Spec, ns, fmt.Sprintf("%s %s/%s", what, ns, name), false)
	}
	pod := func(obj any) any {
		p, ok := obj.(*corev1.Pod)
		if !ok || p.Spec.NodeName != "" && p.Spec.NodeName != k.o.Node ||
			p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed {
			return nil
		}
		return podWish(p.Spec, p.Namespace, fmt.Sprintf("pod %s/%s", p.Namespace, p.Name), p.Spec.NodeName != "")
	}
	kinds := []*kind{
		newKind(k, c, "RuntimeClasses", c.NodeV1().RuntimeClasses(), &nodev1.RuntimeClass{}, all, func(obj any) any {
			r, ok := obj.(*nodev1.RuntimeClass)
			if !ok {
				return nil
			}
			w := classWish{handler: r.Handler}
			if r.Scheduling != nil {
				w.selector = maps.Clone(r.Scheduling.NodeSelector)
			}
			return w
		}),
		newKind(k, c, "Pods of this node", c.CoreV1().Pods(""), &corev1.Pod{}, metav1.ListOptions{FieldSelector: "spec.nodeName=" + k.o.Node}, pod),
		newKind(k, c, "unscheduled Pods", c.CoreV1().Pods(""), &corev1.Pod{}, metav1.ListOptions{FieldSelector: "spec.nodeName="}, pod),
		newKind(k, c, "Deployments", c.AppsV1().Deployments(""), &appsv1.Deployment{}, all, func(obj any) any {
			o, ok := obj.(*appsv1.Deployment)
			if !ok {
				return nil
			}
			return template("deployment", o.Namespace, o.Name, o.Spec.Template)
		}),
		newKind(k, c, "StatefulSets", c.AppsV1().StatefulSets(""), &appsv1.StatefulSet{}, all, func(obj any) any {
			o, ok := obj.(*appsv1.StatefulSet)
			if !ok {
				return nil
			}
			return template("statefulset", o.Namespace, o.Name, o.Spec.Template)
		}),
		newKind(k, c, "DaemonSets", c.AppsV1().DaemonSets(""), &appsv1.DaemonSet{}, all, func(obj any) any {
			o, ok := obj.(*appsv1.DaemonSet)
			if !ok {
				return nil
			}
			return template("daemonset", o.Namespace, o.Name, o.Spec.Template)
		}),
		newKind(k, c, "CronJobs", c.BatchV1().CronJobs(""), &batchv1.CronJob{}, all, func(obj any) any {
			o, ok := obj.(*batchv1.CronJob)
			if !ok {
				return nil
			}
			return template("cronjob", o.Namespace, o.Name, o.Spec.JobTemplate.Spec.Template)
		}),
		newKind(k, c, "ServiceAccounts", c.CoreV1().ServiceAccounts(""), &corev1.ServiceAccount{}, all, accountSecrets),
		newKind(k, k.o.Dynamic, "SpinAppExecutors", k.o.Dynamic.Resource(spinAppExecutors), &unstructured.Unstructured{}, all, executorOf),
		newKind(k, k.o.Dynamic, "SpinApps", k.o.Dynamic.Resource(spinApps), &unstructured.Unstructured{}, all, spinAppWish),
		newKind(k, k.o.Dynamic, "Functions", k.o.Dynamic.Resource(functions), &unstructured.Unstructured{}, all, functionWish),
	}
	for _, kd := range kinds {
		switch kd.name {
		case "ServiceAccounts":
			kd.spare = true
		case "SpinAppExecutors":
			kd.optional, kd.spare = true, true
		case "SpinApps", "Functions":
			kd.optional = true
		}
	}
	if k.o.Namespace != "" {
		kinds = append(kinds, newKind(k, c, "lists of images", c.CoreV1().ConfigMaps(k.o.Namespace), &corev1.ConfigMap{},
			metav1.ListOptions{LabelSelector: ListLabel + "=true"}, func(obj any) any {
				m, ok := obj.(*corev1.ConfigMap)
				if !ok || m.Labels[ListLabel] != "true" {
					return nil
				}
				return listWishes(m)
			}))
	}
	return kinds
}

// podWish is what a pod or pod template wishes; nil without a RuntimeClass.
// Its ordinary containers are wished too: the pod does not start without them.
func podWish(s corev1.PodSpec, namespace, user string, urgent bool) any {
	if s.RuntimeClassName == nil || *s.RuntimeClassName == "" {
		return nil
	}
	w := wish{class: *s.RuntimeClassName, selector: maps.Clone(s.NodeSelector), user: user, urgent: urgent, account: account(namespace, s.ServiceAccountName)}
	for _, c := range slices.Concat(s.InitContainers, s.Containers) {
		w.image(c.Image)
	}
	for _, p := range s.ImagePullSecrets {
		w.secret(namespace, p.Name)
	}
	return w
}

// account is the key of a pod's ServiceAccount.
func account(namespace, name string) string { return namespace + "/" + cmp.Or(name, "default") }

// accountSecrets reads the names of a ServiceAccount's pull secrets.
func accountSecrets(obj any) any {
	a, ok := obj.(*corev1.ServiceAccount)
	if !ok || len(a.ImagePullSecrets) == 0 {
		return nil
	}
	var w wish
	for _, s := range a.ImagePullSecrets {
		w.secret(a.Namespace, s.Name)
	}
	return accountWish(w.secrets)
}

// executorOf reads a SpinAppExecutor (spin-operator,
// api/v1alpha1/spinappexecutor_types.go): spec.createDeployment and, in
// spec.deploymentConfig, runtimeClassName or spinImage.
func executorOf(obj any) any {
	u, ok := obj.(*unstructured.Unstructured)
	if !ok {
		return nil
	}
	creates, found, _ := unstructured.NestedBool(u.Object, "spec", "createDeployment")
	class, _, _ := unstructured.NestedString(u.Object, "spec", "deploymentConfig", "runtimeClassName")
	spin, _, _ := unstructured.NestedString(u.Object, "spec", "deploymentConfig", "spinImage")
	return executorWish{class: class, elsewhere: found && !creates || spin != ""}
}

func (w *wish) image(name string) {
	if len(w.refs) >= maxWants {
		return
	}
	r, err := ParseReference(name)
	if err != nil {
		if len(w.problems) < maxListProblems {
			w.problems = append(w.problems, err.Error())
		}
		return
	}
	if !slices.Contains(w.refs, r) {
		w.refs = append(w.refs, r)
	}
}

func (w *wish) secret(namespace, name string) {
	if name != "" && len(w.secrets) < maxPullSecrets {
		w.secrets = append(w.secrets, PullSecret{Namespace: namespace, Name: name})
	}
}

// spinAppWish reads a SpinApp (spin-operator, api/v1alpha1/spinapp_types.go):
// spec.image, spec.executor, spec.imagePullSecrets and spec.serviceAccountName.
func spinAppWish(obj any) any {
	u, ok := obj.(*unstructured.Unstructured)
	if !ok {
		return nil
	}
	w := wish{spin: true, namespace: u.GetNamespace(), user: fmt.Sprintf("spinapp %s/%s", u.GetNamespace(), u.GetName())}
	w.executor, _, _ = unstructured.NestedString(u.Object, "spec", "executor")
	serviceAccount, _, _ := unstructured.NestedString(u.Object, "spec", "serviceAccountName")
	w.account = account(u.GetNamespace(), serviceAccount)
	name, _, _ := unstructured.NestedString(u.Object, "spec", "image")
	w.image(name)
	secrets, _, _ := unstructured.NestedSlice(u.Object, "spec", "imagePullSecrets")
	for _, s := range secrets {
		if m, ok := s.(map[string]any); ok {
			name, _ := m["name"].(string)
			w.secret(u.GetNamespace(), name)
		}
	}
	return w
}

// functionWish reads a Function of the Spin runtime: spec.image. Those of the
// resident engine need no image here: the agent brings their artifacts into the
// store itself, with credentials that containerd may not have.
func functionWish(obj any) any {
	u, ok := obj.(*unstructured.Unstructured)
	if !ok {
		return nil
	}
	if r, _, _ := unstructured.NestedString(u.Object, "spec", "runtime"); r != "spin" {
		return nil
	}
	name, _, _ := unstructured.NestedString(u.Object, "spec", "image")
	if name == "" {
		return nil
	}
	w := wish{namespace: u.GetNamespace(), user: fmt.Sprintf("function %s/%s", u.GetNamespace(), u.GetName()), spin: true}
	w.image(name)
	return w
}

// listWishes reads the lists of a ConfigMap, one wish per handler.
func listWishes(m *corev1.ConfigMap) any {
	byHandler := make(map[string]*wish)
	user := fmt.Sprintf("list %s/%s", m.Namespace, m.Name)
	base := &wish{user: user}
	byHandler[""] = base
	images := 0
	for _, key := range slices.Sorted(maps.Keys(m.Data)) {
		entries, problems := ParseList(m.Data[key])
		for _, p := range problems {
			if len(base.problems) < maxListProblems {
				base.problems = append(base.problems, fmt.Sprintf("%.60s: %s", key, p))
			}
		}
		for _, e := range entries {
			if images++; images > MaxListImages {
				return wishes(byHandler)
			}
			w := byHandler[e.Handler]
			if w == nil {
				w = &wish{user: user, handlers: []string{e.Handler}}
				byHandler[e.Handler] = w
			}
			w.refs = append(w.refs, e.Reference)
		}
	}
	return wishes(byHandler)
}

func wishes(m map[string]*wish) any {
	out := make([]wish, 0, len(m))
	for _, h := range slices.Sorted(maps.Keys(m)) {
		out = append(out, *m[h])
	}
	return out
}
