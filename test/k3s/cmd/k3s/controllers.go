package main

import (
	"context"
	"crypto/sha256"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/restmapper"
	"sigs.k8s.io/yaml"
)

const (
	// manifestInterval is k3s's.
	manifestInterval = 15 * time.Second
	// nodeInterval is between two looks at the nodes; k3s watches them.
	nodeInterval = time.Second
	// memberFinalizer keeps a server's Node until its etcd member is removed.
	memberFinalizer    = "wrangler.cattle.io/managed-etcd-controller"
	memberAnnotation   = "etcd.k3s.cattle.io/node-name"
	addressAnnotation  = "etcd.k3s.cattle.io/node-address"
	uninitializedTaint = "node.cloudprovider.kubernetes.io/uninitialized"
)

//go:embed manifests/*.yaml
var packagedManifests embed.FS

// controllers are what a server does for the cluster; every one of them may
// run on several servers at a time. They end with ctx.
func (s *server) controllers(ctx context.Context) {
	go func() {
		for sleep(ctx, nodeInterval) == nil {
			if err := s.nodes(ctx); err != nil && ctx.Err() == nil {
				slog.Error("looking after nodes", "error", err)
			}
		}
	}()
	if err := s.stage(); err != nil {
		slog.Error("writing the packaged manifests", "error", err)
	}
	done := map[string][sha256.Size]byte{}
	for {
		s.deploy(ctx, done)
		if sleep(ctx, manifestInterval) != nil {
			return
		}
	}
}

// nodes marks this server's node, initializes new ones as the embedded cloud
// controller does, and removes the members of those that go.
func (s *server) nodes(ctx context.Context) error {
	client := s.core.Load().typed.CoreV1().Nodes()
	list, err := client.List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	var errs []error
	for i := range list.Items {
		node := &list.Items[i]
		before := node.DeepCopy()
		switch {
		case node.DeletionTimestamp != nil:
			if !slices.Contains(node.Finalizers, memberFinalizer) {
				continue
			}
			// A server does not remove itself: the others have to.
			if node.Name == s.n.name && len(list.Items) > 1 {
				continue
			}
			if err := s.etcd.remove(ctx, node.Annotations[memberAnnotation], node.Annotations[addressAnnotation]); err != nil {
				errs = append(errs, err)
				continue
			}
			node.Finalizers = slices.DeleteFunc(node.Finalizers, func(f string) bool { return f == memberFinalizer })
		case node.Name == s.n.name:
			if node.Labels == nil {
				node.Labels = map[string]string{}
			}
			if node.Annotations == nil {
				node.Annotations = map[string]string{}
			}
			node.Labels["node-role.kubernetes.io/control-plane"], node.Labels["node-role.kubernetes.io/etcd"] = "true", "true"
			node.Annotations[memberAnnotation], node.Annotations[addressAnnotation] = s.etcd.name, s.n.ip.String()
			if !slices.Contains(node.Finalizers, memberFinalizer) {
				node.Finalizers = append(node.Finalizers, memberFinalizer)
			}
		}
		if !s.o.is("disable-cloud-controller") && node.DeletionTimestamp == nil {
			initialize(node)
		}
		if !equalNodes(before, node) {
			if _, err := client.Update(ctx, node, metav1.UpdateOptions{FieldManager: "k3s"}); err != nil {
				errs = append(errs, err) // another server was first: seen next time
			}
		}
	}
	return errors.Join(errs...)
}

// initialize is k3s's cloud controller: it keeps what the kubelet set.
func initialize(node *corev1.Node) {
	if !slices.ContainsFunc(node.Spec.Taints, func(t corev1.Taint) bool { return t.Key == uninitializedTaint }) {
		return
	}
	if node.Spec.ProviderID == "" {
		node.Spec.ProviderID = "k3s://" + node.Name
	}
	if node.Labels["node.kubernetes.io/instance-type"] == "" {
		node.Labels["node.kubernetes.io/instance-type"], node.Labels["beta.kubernetes.io/instance-type"] = "k3s", "k3s"
	}
	node.Spec.Taints = slices.DeleteFunc(node.Spec.Taints, func(t corev1.Taint) bool { return t.Key == uninitializedTaint })
}

func equalNodes(a, b *corev1.Node) bool {
	return slices.Equal(a.Finalizers, b.Finalizers) && len(a.Spec.Taints) == len(b.Spec.Taints) && a.Spec.ProviderID == b.Spec.ProviderID &&
		fmt.Sprint(a.Labels) == fmt.Sprint(b.Labels) && fmt.Sprint(a.Annotations) == fmt.Sprint(b.Annotations)
}

func (s *server) manifests() string { return s.o.dataDir("server/manifests") }

// stage writes the packaged manifests that are not disabled.
func (s *server) stage() error {
	if err := os.MkdirAll(s.manifests(), 0o700); err != nil {
		return err
	}
	return fs.WalkDir(packagedManifests, "manifests", func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		name := filepath.Base(path)
		if slices.Contains(s.o.split("disable"), strings.TrimSuffix(name, ".yaml")) || exists(filepath.Join(s.manifests(), name+".skip")) {
			return nil
		}
		content, err := packagedManifests.ReadFile(path)
		if err != nil {
			return err
		}
		return writeFile(filepath.Join(s.manifests(), name), content, 0o600)
	})
}

// deploy applies every manifest that changed. One that fails is tried again
// at the next look; unknown fields are errors, which k3s lets pass.
func (s *server) deploy(ctx context.Context, done map[string][sha256.Size]byte) {
	_ = filepath.WalkDir(s.manifests(), func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() || !slices.Contains([]string{".yaml", ".yml", ".json"}, filepath.Ext(path)) || exists(path+".skip") {
			return nil
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return nil
		}
		sum := sha256.Sum256(content)
		if done[path] == sum {
			return nil
		}
		if err := s.apply(ctx, content); err != nil {
			if ctx.Err() == nil {
				slog.Error("Failed to process config: failed to process "+path, "error", err)
			}
			return nil
		}
		slog.Info("Applied manifest at " + path)
		done[path] = sum
		return nil
	})
}

func (s *server) apply(ctx context.Context, content []byte) error {
	core := s.core.Load()
	groups, err := restmapper.GetAPIGroupResources(discovery.NewDiscoveryClient(core.typed.Discovery().RESTClient()))
	if err != nil {
		return err
	}
	mapper := restmapper.NewDiscoveryRESTMapper(groups)
	var errs []error
	for document := range strings.SplitSeq("\n"+string(content), "\n---") {
		var object map[string]any
		if err := yaml.Unmarshal([]byte(document), &object); err != nil {
			return err
		}
		if len(object) == 0 {
			continue
		}
		u := &unstructured.Unstructured{Object: object}
		kind := u.GroupVersionKind()
		mapping, err := mapper.RESTMapping(schema.GroupKind{Group: kind.Group, Kind: kind.Kind}, kind.Version)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		resource := core.dynamic.Resource(mapping.Resource)
		data, err := u.MarshalJSON()
		if err != nil {
			return err
		}
		force := true
		options := metav1.PatchOptions{FieldManager: "deploy@" + s.n.name, Force: &force, FieldValidation: metav1.FieldValidationStrict}
		if mapping.Scope.Name() == meta.RESTScopeNameNamespace {
			namespace := u.GetNamespace()
			if namespace == "" {
				namespace = metav1.NamespaceDefault
			}
			_, err = resource.Namespace(namespace).Patch(ctx, u.GetName(), types.ApplyPatchType, data, options)
		} else {
			_, err = resource.Patch(ctx, u.GetName(), types.ApplyPatchType, data, options)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s %s: %w", kind.Kind, u.GetName(), err))
		}
	}
	return errors.Join(errs...)
}
