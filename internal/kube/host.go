package kube

import (
	"fmt"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

// HostKind is the kind of the custom resource that claims names.
const HostKind = "Host"

// Host is a Host object: the claim of the name it is called by.
type Host struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec v1alpha1.HostSpec `json:"spec"`
}

// NewHost returns the claim of a name, for creating it.
func NewHost(name string, spec v1alpha1.HostSpec) *Host {
	return &Host{
		TypeMeta:   metav1.TypeMeta{APIVersion: v1alpha1.APIVersion, Kind: HostKind},
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       spec,
	}
}

// HostList is a list of Host objects.
type HostList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []Host `json:"items"`
}

// NewRESTClient returns a client of the resources of group hearth.sh that
// speaks in Function and Host objects and their lists. It takes limits and
// identity from config.
func NewRESTClient(config *rest.Config) (*rest.RESTClient, error) {
	version := schema.GroupVersion{Group: v1alpha1.Group, Version: "v1alpha1"}
	scheme := runtime.NewScheme()
	scheme.AddKnownTypes(version, &Function{}, &FunctionList{}, &Host{}, &HostList{})
	metav1.AddToGroupVersion(scheme, version)
	config = rest.CopyConfig(config)
	config.GroupVersion, config.APIPath = &version, "/apis"
	config.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	config.ContentType, config.AcceptContentTypes = runtime.ContentTypeJSON, runtime.ContentTypeJSON
	client, err := rest.RESTClientFor(config)
	if err != nil {
		return nil, fmt.Errorf("make the client of group %s: %w", v1alpha1.Group, err)
	}
	return client, nil
}
