package cluster

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	kyaml "k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/restmapper"
	"sigs.k8s.io/yaml"
)

const (
	// fieldManager owns the fields that ApplyManifest sets.
	fieldManager = "hearth-test"
	// mappingTimeout is how long a kind may be unknown: a CRD that was applied
	// a moment ago takes a second to be served.
	mappingTimeout = 20 * time.Second
)

// ApplyManifest applies every object of a YAML stream on the server's side, in
// order, taking over fields that others own. Objects without a namespace go to
// "default". It returns the applied objects.
func (c *Cluster) ApplyManifest(ctx context.Context, manifest []byte) ([]*unstructured.Unstructured, error) {
	mapper := restmapper.NewDeferredDiscoveryRESTMapper(memory.NewMemCacheClient(c.client.Discovery()))
	documents := kyaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(manifest)))
	var out []*unstructured.Unstructured
	for {
		document, err := documents.Read()
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return out, fmt.Errorf("reading a manifest: %w", err)
		}
		object := &unstructured.Unstructured{}
		if err := yaml.Unmarshal(document, &object.Object); err != nil {
			return out, fmt.Errorf("reading a manifest: %w", err)
		}
		if len(object.Object) == 0 {
			continue // comments only
		}
		applied, err := c.apply(ctx, mapper, object)
		if err != nil {
			return out, fmt.Errorf("applying %s %s: %w", object.GetKind(), object.GetName(), err)
		}
		out = append(out, applied)
	}
}

func (c *Cluster) apply(ctx context.Context, mapper meta.ResettableRESTMapper, object *unstructured.Unstructured) (*unstructured.Unstructured, error) {
	kind := object.GroupVersionKind()
	var mapping *meta.RESTMapping
	var last error
	err := c.WaitFor(ctx, "the API server to know kind "+kind.String(), mappingTimeout, func(context.Context) (bool, error) {
		if mapping, last = mapper.RESTMapping(kind.GroupKind(), kind.Version); last != nil {
			mapper.Reset()
		}
		return last == nil, nil
	})
	if err != nil {
		return nil, errors.Join(err, last)
	}
	var resource dynamic.ResourceInterface = c.dynamic.Resource(mapping.Resource)
	if mapping.Scope.Name() == meta.RESTScopeNameNamespace {
		namespace := object.GetNamespace()
		if namespace == "" {
			namespace = metav1.NamespaceDefault
		}
		resource = c.dynamic.Resource(mapping.Resource).Namespace(namespace)
	}
	return resource.Apply(ctx, object.GetName(), object, metav1.ApplyOptions{FieldManager: fieldManager, Force: true})
}
