package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/dynamic"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

// FunctionKind is the kind of the custom resource.
const FunctionKind = "Function"

// FunctionGVR is where the API server serves functions.
func FunctionGVR() schema.GroupVersionResource {
	return schema.GroupVersionResource{Group: v1alpha1.Group, Version: "v1alpha1", Resource: v1alpha1.FunctionsResource}
}

// Function is a Function object of a cluster. Its schema, with all limits, is
// packaging/chart/hearth/crds/hearth.sh_functions.yaml, which is generated from these types.
type Function struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   v1alpha1.FunctionSpec   `json:"spec"`
	Status v1alpha1.FunctionStatus `json:"status,omitzero"`
}

// FunctionList is a list of Function objects.
type FunctionList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []Function `json:"items"`
}

// Functions reads the Function objects of a cluster and writes their status.
// It is safe for concurrent use.
type Functions struct {
	client dynamic.Interface
}

// NewFunctions returns the functions that client may see.
func NewFunctions(client dynamic.Interface) *Functions { return &Functions{client: client} }

// listPage bounds one answer of the API server; List goes on until the end.
const listPage = 500

// maxFunctions bounds what List collects. A cluster beyond it is a mistake
// that should not take the process's memory.
const maxFunctions = 100_000

// List returns the functions of a namespace ("": all namespaces) and the
// resource version from which Watch goes on without a gap.
func (c *Functions) List(ctx context.Context, namespace string) (*FunctionList, error) {
	out := &FunctionList{Items: []Function{}}
	options := metav1.ListOptions{Limit: listPage}
	for {
		page, err := c.listPage(ctx, namespace, options)
		if err != nil {
			return nil, fmt.Errorf("list functions: %w", err)
		}
		for i := range page.Items {
			f, err := fromUnstructured(&page.Items[i])
			if err != nil {
				return nil, err
			}
			out.Items = append(out.Items, *f)
		}
		if len(out.Items) > maxFunctions {
			return nil, fmt.Errorf("list functions: there are more than %d; delete some or split the cluster", maxFunctions)
		}
		out.ResourceVersion = page.GetResourceVersion()
		if options.Continue = page.GetContinue(); options.Continue == "" {
			return out, nil
		}
	}
}

func (c *Functions) listPage(ctx context.Context, namespace string, o metav1.ListOptions) (*unstructured.UnstructuredList, error) {
	ctx, cancel := context.WithTimeout(ctx, CallTimeout)
	defer cancel()
	return c.client.Resource(FunctionGVR()).Namespace(namespace).List(ctx, o)
}

// Get returns one function.
func (c *Functions) Get(ctx context.Context, namespace, name string) (*Function, error) {
	ctx, cancel := context.WithTimeout(ctx, CallTimeout)
	defer cancel()
	u, err := c.client.Resource(FunctionGVR()).Namespace(namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return nil, fmt.Errorf("get function %s/%s: %w", namespace, name, err)
	}
	return fromUnstructured(u)
}

// Event is one change that Watch saw. Function is nil for a bookmark.
type Event struct {
	// Type is watch.Added, Modified, Deleted or Bookmark.
	Type     watch.EventType
	Function *Function
	// ResourceVersion is where a later Watch goes on.
	ResourceVersion string
}

// ErrExpired says that a resource version is too old to watch from: list again.
var ErrExpired = errors.New("the API server no longer has the changes since that resource version")

// Watch calls each for every change after resourceVersion, in order, until ctx
// ends (it then returns ctx.Err()), the API server closes the connection (nil:
// watch again from the last resource version; servers do so every few
// minutes), each returns an error (returned as it is), or the version has
// expired (ErrExpired). namespace "" means all namespaces.
func (c *Functions) Watch(ctx context.Context, namespace, resourceVersion string, each func(Event) error) error {
	w, err := c.client.Resource(FunctionGVR()).Namespace(namespace).Watch(ctx, metav1.ListOptions{
		ResourceVersion:     resourceVersion,
		AllowWatchBookmarks: true,
	})
	if err != nil {
		return watchError(err)
	}
	defer w.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case e, ok := <-w.ResultChan():
			switch {
			case !ok:
				return ctx.Err()
			case e.Type == watch.Error:
				return watchError(apierrors.FromObject(e.Object))
			}
			u, ok := e.Object.(*unstructured.Unstructured)
			if !ok {
				return fmt.Errorf("watch functions: unexpected %T", e.Object)
			}
			event := Event{Type: e.Type, ResourceVersion: u.GetResourceVersion()}
			if e.Type != watch.Bookmark {
				if event.Function, err = fromUnstructured(u); err != nil {
					return err
				}
			}
			if err := each(event); err != nil {
				return err
			}
		}
	}
}

func watchError(err error) error {
	if apierrors.IsResourceExpired(err) || apierrors.IsGone(err) {
		return fmt.Errorf("watch functions: %w", ErrExpired)
	}
	return fmt.Errorf("watch functions: %w", err)
}

// SetStatus replaces the status of f, which must be as it was read: if the
// object changed since, the error is a conflict (apierrors.IsConflict) and the
// caller reads again. Conditions keep their LastTransitionTime where their
// status is unchanged. Nothing is written when nothing changes.
func (c *Functions) SetStatus(ctx context.Context, f *Function, status v1alpha1.FunctionStatus) error {
	for i := range status.Conditions {
		for _, old := range f.Status.Conditions {
			if old.Type == status.Conditions[i].Type && old.Status == status.Conditions[i].Status {
				status.Conditions[i].LastTransitionTime = old.LastTransitionTime
			}
		}
	}
	before, err := json.Marshal(f.Status)
	if err != nil {
		return fmt.Errorf("encode the status of function %s/%s: %w", f.Namespace, f.Name, err)
	}
	after, err := json.Marshal(status)
	if err != nil {
		return fmt.Errorf("encode the status of function %s/%s: %w", f.Namespace, f.Name, err)
	}
	if string(before) == string(after) {
		return nil
	}
	// A JSON patch replaces the status whole; a merge patch would leave behind
	// members that the new status leaves out. Naming the resource version makes
	// the API server refuse (409) what an older reader writes.
	patch, err := json.Marshal([]map[string]any{
		{"op": "replace", "path": "/metadata/resourceVersion", "value": f.ResourceVersion},
		{"op": "add", "path": "/status", "value": json.RawMessage(after)},
	})
	if err != nil {
		return fmt.Errorf("encode the status of function %s/%s: %w", f.Namespace, f.Name, err)
	}
	ctx, cancel := context.WithTimeout(ctx, CallTimeout)
	defer cancel()
	_, err = c.client.Resource(FunctionGVR()).Namespace(f.Namespace).Patch(ctx, f.Name, types.JSONPatchType, patch,
		metav1.PatchOptions{FieldManager: "hearth-api"}, "status")
	if err != nil {
		return fmt.Errorf("write the status of function %s/%s: %w", f.Namespace, f.Name, err)
	}
	return nil
}

func fromUnstructured(u *unstructured.Unstructured) (*Function, error) {
	f := new(Function)
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, f); err != nil {
		return nil, fmt.Errorf("read function %s/%s: %w", u.GetNamespace(), u.GetName(), err)
	}
	return f, nil
}
