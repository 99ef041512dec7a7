package v1alpha1

import "time"

// This file holds what a Function is in a cluster: spec and status of the
// custom resource functions.hearth.sh. The other Function of this package is
// the same thing as the submit API shows it, with its history folded in; both
// are of kind Function, told apart by who serves them. The object around spec
// and status (metadata) is Kubernetes' and lives in internal/kube, so that
// this package stays free of it.

// FunctionsResource is the plural under which a cluster serves functions.
const FunctionsResource = "functions"

// FunctionRuntime says what runs a function.
type FunctionRuntime string

// A resident function is run by the engine that every node has, with no pod
// and no cost while idle; a spin function has pods of its own under
// containerd-shim-spin and the whole host API of Spin.
const (
	RuntimeResident FunctionRuntime = "resident"
	RuntimeSpin     FunctionRuntime = "spin"
)

// FunctionSpec is what is wanted of a function. Every change of it is a new
// revision.
type FunctionSpec struct {
	// Image is the OCI artifact to run, always by digest:
	// registry/repository@sha256:<64 hexadecimal digits>. A tag may stand
	// before the digest and means nothing.
	Image string `json:"image"`
	// Runtime is what runs the function. Default resident.
	Runtime FunctionRuntime `json:"runtime,omitempty"`
	// Host is an additional DNS name that the function answers to. Names are
	// claimed cluster-wide, first come; a name belongs to the namespace whose
	// function claimed it, and functions of that namespace may share it by Routes.
	Host string `json:"host,omitempty"`
	// Routes are the paths of Host that reach the function: each begins with a
	// slash, matches itself and everything below it, and the longest that
	// matches wins. Default: "/". They mean nothing for the function's own name.
	Routes []string `json:"routes,omitempty"`
	// Limits bound what one function may take.
	Limits *FunctionLimits `json:"limits,omitempty"`
	// Env is given to the guest as environment variables; names and values
	// together are at most 64 KiB.
	Env []EnvVar `json:"env,omitempty"`
	// Placement says on which nodes a resident function is kept ready. Default:
	// on every node that has an engine. Other nodes forward to those.
	Placement *FunctionPlacement `json:"placement,omitempty"`
	// Autoscaling says how many pods a spin function has. Resident functions
	// have none: they scale to zero by themselves and at no cost.
	Autoscaling *FunctionAutoscaling `json:"autoscaling,omitempty"`
}

// FunctionPlacement says where a resident function is kept ready. Its secrets
// reach no other node.
type FunctionPlacement struct {
	// NodeSelector are labels that a node must have, with these values.
	NodeSelector map[string]string `json:"nodeSelector,omitempty"`
}

// FunctionAutoscaling says how many pods a spin function has.
type FunctionAutoscaling struct {
	// Autoscaler is what decides: none (MinReplicas pods, the default), hpa or
	// keda, each of which must be installed in the cluster.
	Autoscaler Autoscaler `json:"autoscaler,omitempty"`
	// MinReplicas is the least number of pods. Default 1.
	MinReplicas int `json:"minReplicas,omitempty"`
	// MaxReplicas is the greatest. Default: MinReplicas, at least 1; wanted
	// where an autoscaler decides.
	MaxReplicas int `json:"maxReplicas,omitempty"`
	// TargetCPUPercent is the processor time, in percent of what the pods
	// request, that the autoscaler aims for. Default 80.
	TargetCPUPercent int `json:"targetCPUPercent,omitempty"`
}

// Autoscaler decides how many pods a spin function has.
type Autoscaler string

// The autoscalers.
const (
	AutoscalerNone Autoscaler = "none"
	AutoscalerHPA  Autoscaler = "hpa"
	AutoscalerKEDA Autoscaler = "keda"
)

// Limits of what a Function object may ask for, beside those of Settings.
const (
	MaxReplicas         = 100
	DefaultMinReplicas  = 1
	MaxTargetCPUPercent = 1000
	// DefaultTargetCPUPercent leaves an autoscaler the time a new pod needs.
	DefaultTargetCPUPercent = 80
	// MaxRoutes bounds the routes of one function, MaxRouteBytes each of them.
	MaxRoutes     = 16
	MaxRouteBytes = 256
	// MaxNodeSelector bounds the labels of a placement.
	MaxNodeSelector = 16
)

// FunctionLimits bound what one function may take. The members are those of
// Settings, with the same units, limits and defaults.
type FunctionLimits struct {
	// MemoryMiB caps the guest's linear memory.
	MemoryMiB int `json:"memoryMiB,omitempty"`
	// TimeoutMS is the deadline of one request, from its arrival.
	TimeoutMS int `json:"timeoutMs,omitempty"`
	// Concurrency is how many requests run at once before others queue.
	Concurrency int `json:"concurrency,omitempty"`
}

// EnvVar is one environment variable: a value, or where to find a secret one.
type EnvVar struct {
	// Name is made of letters, digits and underscores and begins with no digit.
	Name string `json:"name"`
	// Value is for everyone to read who can read the function.
	Value string `json:"value,omitempty"`
	// SecretKeyRef names the value in a Secret of the function's namespace.
	SecretKeyRef *SecretKeyRef `json:"secretKeyRef,omitempty"`
}

// SecretKeyRef is one key of a Secret in the function's own namespace.
type SecretKeyRef struct {
	// Name is the Secret's name.
	Name string `json:"name"`
	// Key is the key of its data.
	Key string `json:"key"`
}

// FunctionStatus is what became of a function.
type FunctionStatus struct {
	// ObservedGeneration is the metadata.generation that this status is about.
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// URL reaches the function.
	URL string `json:"url,omitempty"`
	// Revision is the newest wanted revision.
	Revision int `json:"revision,omitempty"`
	// ActiveRevision is the revision that answers requests; absent while there
	// is none.
	ActiveRevision int `json:"activeRevision,omitempty"`
	// Warm says for people on how many of the nodes that should have the
	// function it answers without compiling, such as 2/3.
	Warm string `json:"warm,omitempty"`
	// WarmNodes is the first number of Warm.
	WarmNodes int `json:"warmNodes,omitempty"`
	// WantedNodes is the second number of Warm.
	WantedNodes int `json:"wantedNodes,omitempty"`
	// Nodes is what each node said last, by name. Nodes that said nothing yet
	// are not there.
	Nodes []FunctionNode `json:"nodes,omitempty"`
	// History is what became of each revision that is kept, oldest first.
	History []RevisionStatus `json:"history,omitempty"`
	// Conditions say how far the function is; Ready is true while the newest
	// wanted revision answers requests.
	Conditions []Condition `json:"conditions,omitempty"`
}

// FunctionNode is one node's part of a function's status.
type FunctionNode struct {
	// Name is the node's.
	Name string `json:"name"`
	// Revision is the revision that Progress speaks of.
	Revision int `json:"revision"`
	// Progress is how far it is; a node's steps between queued and loading are
	// not written one by one.
	Progress RevisionProgress `json:"progress"`
	// Serving is the revision that answers requests on the node; absent: none.
	Serving int `json:"serving,omitempty"`
	// Error says why Progress is failed, or, with Retrying, what is in the way.
	Error *FunctionError `json:"error,omitempty"`
	// Retrying is true while the node goes on trying.
	Retrying bool `json:"retrying,omitempty"`
}

// RevisionStatus is what became of one revision.
type RevisionStatus struct {
	// Revision is its number.
	Revision int `json:"revision"`
	// State is pending, ready or failed.
	State FunctionState `json:"state"`
	// Error says why State is failed, or, with Retrying, what is in the way.
	Error *FunctionError `json:"error,omitempty"`
	// Retrying is true while State is pending and Error is thought to pass.
	Retrying bool `json:"retrying,omitempty"`
	// ActivatedAt is when the revision last began to answer requests.
	ActivatedAt *time.Time `json:"activatedAt,omitempty"`
	// Phases says where the time went on the node that was ready first.
	Phases []Phase `json:"phases,omitempty"`
}

// ConditionReady is the type of the condition that sums up a function.
const ConditionReady = "Ready"

// Condition is one aspect of an object's state, in the shape of a Kubernetes
// condition (metav1.Condition).
type Condition struct {
	// Type is the aspect, in CamelCase.
	Type string `json:"type"`
	// Status is True, False or Unknown.
	Status ConditionStatus `json:"status"`
	// ObservedGeneration is the metadata.generation the condition was set for.
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// LastTransitionTime is when Status last changed, to the second.
	LastTransitionTime time.Time `json:"lastTransitionTime"`
	// Reason is stable, one word in CamelCase.
	Reason string `json:"reason"`
	// Message is one sentence for people.
	Message string `json:"message"`
}

// ConditionStatus is the state of a condition.
type ConditionStatus string

// A condition is unknown when whoever should say has not, or no longer does.
const (
	ConditionTrue    ConditionStatus = "True"
	ConditionFalse   ConditionStatus = "False"
	ConditionUnknown ConditionStatus = "Unknown"
)

// HostsResource is the plural under which a cluster serves claims of names.
const HostsResource = "hosts"

// HostSpec says whose a name is. The object is called by the name itself: the
// name of a function, or an additional DNS name of one. Since there can be
// only one object of a name in a cluster, making it is the claim.
type HostSpec struct {
	// Namespace has the name: no function of another may use it.
	Namespace string `json:"namespace"`
	// Function is the function that claimed it.
	Function string `json:"function"`
	// LastRevision is, of a function's own name, the highest revision number
	// ever given to it or about to be. Numbers go on from here when a function
	// of that name is made anew.
	LastRevision int `json:"lastRevision,omitempty"`
	// ClaimedAt is when the namespace got the name.
	ClaimedAt *time.Time `json:"claimedAt,omitempty"`
	// ReleasedAt is when the function was deleted; absent while the name is used.
	ReleasedAt *time.Time `json:"releasedAt,omitempty"`
}

// Names that Hearth gives to things on a cluster's Node objects. Nothing else
// on a Node is ever written.
const (
	// RuntimeLabelPrefix starts the label of each proven runtime:
	// hearth.sh/runtime-<name>=true, present exactly while the proof holds.
	RuntimeLabelPrefix = Group + "/runtime-"
	// NodeConditionWasmReady is the type of the node condition.
	NodeConditionWasmReady = "WasmReady"
	// TaintNotReady keeps pods off a node until Wasm is proven on it
	// (NoSchedule; set at registration).
	TaintNotReady = Group + "/not-ready"
	// TaintInterruption keeps pods off a node that is about to go (NoSchedule).
	TaintInterruption = Group + "/interruption"
	// AnnotationCordonedBy is there while the node is cordoned by Hearth, and
	// says why: the kind of the notice. Without it a cordon is someone else's.
	AnnotationCordonedBy = Group + "/cordoned-by"
	// AnnotationInterruption holds the notice that is being acted upon, as
	// JSON, so that a restarted agent goes on with it.
	AnnotationInterruption = Group + "/interruption"
)
