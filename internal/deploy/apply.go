package deploy

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/hearth-sh/hearth/internal/kube"
)

// get returns an object, nil where there is none, or a *MissingCRDError.
func (c *Cluster) get(ctx context.Context, gvr schema.GroupVersionResource, namespace, name string) (*unstructured.Unstructured, error) {
	ctx, cancel := context.WithTimeout(ctx, kube.CallTimeout)
	defer cancel()
	u, err := c.dynamic.Resource(gvr).Namespace(namespace).Get(ctx, name, metav1.GetOptions{})
	switch {
	case err == nil:
		return u, nil
	case kindMissing(err):
		return nil, missingCRD(gvr)
	case apierrors.IsNotFound(err):
		return nil, nil
	}
	return nil, fmt.Errorf("get %s %s/%s: %w", gvr.Resource, namespace, name, err)
}

// kindMissing tells the 404 of a resource that the API server does not serve
// from that of an object that is not there: only the latter says which.
func kindMissing(err error) bool {
	var status apierrors.APIStatus
	if !apierrors.IsNotFound(err) || !errors.As(err, &status) {
		return false
	}
	details := status.Status().Details
	return details == nil || details.Name == "" || slices.ContainsFunc(details.Causes, func(c metav1.StatusCause) bool {
		return c.Type == metav1.CauseTypeUnexpectedServerResponse
	})
}

// apply writes wanted by server-side apply unless live, which may be nil, is
// as wanted already. It returns what is there now.
//
// Fields that another manager holds are not taken: the error is a
// *ConflictError. A manager of Hearth's own (another operation, an older name)
// gives way.
func (c *Cluster) apply(ctx context.Context, gvr schema.GroupVersionResource, live, wanted *unstructured.Unstructured) (*unstructured.Unstructured, error) {
	if live != nil && live.GetAnnotations()[annotationApplied] == wanted.GetAnnotations()[annotationApplied] && within(wanted.Object, live.Object) {
		return live, nil
	}
	ctx, cancel := context.WithTimeout(ctx, kube.CallTimeout)
	defer cancel()
	resource := c.dynamic.Resource(gvr).Namespace(wanted.GetNamespace())
	options := metav1.ApplyOptions{FieldManager: FieldManager}
	u, err := resource.Apply(ctx, wanted.GetName(), wanted, options)
	if managers, fields := conflicts(err); len(managers) > 0 {
		if slices.ContainsFunc(managers, func(m string) bool { return !strings.HasPrefix(m, FieldManager) }) {
			return nil, &ConflictError{Object: describe(wanted), Managers: managers, Fields: fields}
		}
		options.Force = true
		u, err = resource.Apply(ctx, wanted.GetName(), wanted, options)
	}
	switch {
	case err == nil:
		return u, nil
	case kindMissing(err):
		return nil, missingCRD(gvr)
	}
	return nil, fmt.Errorf("apply %s: %w", describe(wanted), err)
}

// conflictWith is the API server's message of each cause
// (apimachinery, managedfields: `conflict with "kubectl-edit" using v1`).
var conflictWith = regexp.MustCompile(`^conflict with "((?:[^"\\]|\\.)*)"`)

// conflicts reads the managers and fields of an apply conflict, sorted; none:
// err is something else.
func conflicts(err error) (managers, fields []string) {
	var status apierrors.APIStatus
	if err == nil || !apierrors.IsConflict(err) || !errors.As(err, &status) || status.Status().Details == nil {
		return nil, nil
	}
	who, what := map[string]bool{}, map[string]bool{}
	for _, cause := range status.Status().Details.Causes {
		if cause.Type != metav1.CauseTypeFieldManagerConflict {
			continue
		}
		manager := "somebody else"
		if m := conflictWith.FindStringSubmatch(cause.Message); m != nil {
			manager = m[1]
		}
		who[manager], what[cause.Field] = true, true
	}
	return slices.Sorted(maps.Keys(who)), slices.Sorted(maps.Keys(what))
}

// delete removes an object that Hearth made and that is mine. What is not there
// (a missing kind has no objects), or somebody else's, is left as it is.
func (c *Cluster) delete(ctx context.Context, gvr schema.GroupVersionResource, namespace, name string, mine func(metav1.Object) bool) error {
	u, err := c.get(ctx, gvr, namespace, name)
	var crd *MissingCRDError
	if errors.As(err, &crd) || err == nil && (u == nil || u.GetDeletionTimestamp() != nil || !ours(u) || !mine(u)) {
		return nil
	}
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, kube.CallTimeout)
	defer cancel()
	uid, background := u.GetUID(), metav1.DeletePropagationBackground
	err = c.dynamic.Resource(gvr).Namespace(namespace).Delete(ctx, name, metav1.DeleteOptions{
		Preconditions: &metav1.Preconditions{UID: &uid}, PropagationPolicy: &background,
	})
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
		return fmt.Errorf("delete %s: %w", describe(u), err)
	}
	return nil
}

// within says whether everything in wanted is the same in live, which may have
// more members: defaults, and what other managers own.
func within(wanted, live any) bool {
	switch w := wanted.(type) {
	case map[string]any:
		l, ok := live.(map[string]any)
		if !ok {
			return false
		}
		for k, v := range w {
			if !within(v, l[k]) {
				return false
			}
		}
		return true
	case []any:
		l, ok := live.([]any)
		if !ok || len(l) != len(w) {
			return false
		}
		for i := range w {
			if !within(w[i], l[i]) {
				return false
			}
		}
		return true
	}
	return wanted == live
}
