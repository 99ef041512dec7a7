// Package images gets the container images of Wasm workloads onto this node
// before their first pod: it learns which are wanted, has containerd pull
// them, keeps kubelet's image collection away from them while they are
// wanted, has the shim fill its compile cache, and puts their core modules
// into the store of compiled objects.
//
// It owns the reconciliation between five parties: the [Source] (the
// Kubernetes API), the [Runtime] (containerd and its CRI plugin), the
// [Warmer] (the shims), the [Store] and the [Announcer]'s reader. It moves no
// image bytes over the network itself: containerd does, so that mirrors,
// rewrites, certificates and limits configured there apply. It never deletes
// an image, runs nothing, and writes to no Kubernetes object.
//
// Like internal/prefetch, its [Loop] is level-triggered: every event only
// says "look again", and one pass derives everything from the last snapshots.
// All lasting state is where it belongs: images and pins in containerd,
// compiled code in the store and in the shim's labels. The files this package
// writes are caches that hold no secrets; losing them costs time only.
//
// # Bandwidth
//
// Neither the CRI nor containerd has a bandwidth limit, and kubelet's
// registry QPS does not apply to pulls that are not kubelet's. The knobs that
// really bound the load are [Options].Pulls (images at once),
// [Options].PullGap (time between two starts), and, per image, containerd's
// own max_concurrent_downloads (default 3, of the CRI image plugin). A limit
// in bytes per second belongs into traffic control on containerd's egress.
package images
