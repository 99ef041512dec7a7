package images

import (
	"context"
	"errors"
	"io"
	"log/slog"
)

// Labels of a containerd image.
const (
	// labelPinned makes the CRI plugin report an image as pinned, which
	// keeps kubelet's image collection away from it (containerd,
	// internal/cri/labels). Others use it too.
	labelPinned      = "io.cri-containerd.pinned"
	labelPinnedValue = "pinned"
	// labelOurs is on every image that we hold. Its value says whose the pin
	// is: pinOwn if we set it, pinShared if it was there before us.
	labelOurs = "hearth.sh/prefetch"
	pinOwn    = "pinned"
	pinShared = "shared"
	// labelK3s is k3s's mark of its own pins, from the lists and archives in
	// its images directory. At each start k3s removes both pin labels from
	// images that carry its mark, and pins those again that are still
	// listed. An image we both hold can thereby lose its pin: the next pass
	// puts it back, as ours. When we let go of an image that bears k3s's
	// mark, the pin stays.
	labelK3s = "io.cattle.k3s.pinned"
)

// Auth is a user name and password for one registry. It prints as nothing.
type Auth struct {
	// Host is the registry they are for, never sent to any other.
	Host               string
	Username, Password string
}

// String hides the password from careless formatting.
func (Auth) String() string { return "[redacted]" }

// GoString does so for %#v.
func (Auth) GoString() string { return "[redacted]" }

// LogValue does so for slog.
func (Auth) LogValue() slog.Value { return slog.StringValue("[redacted]") }

// Image is one name in the runtime's image store.
type Image struct {
	// Name is canonical, as in [Reference].Name.
	Name string
	// Digest is what Name points at: a manifest, or an index of several.
	Digest string
	// Ready says that the CRI plugin offers it to kubelet.
	Ready bool
	// Pinned says that kubelet's collection leaves this name alone, Ours that
	// we hold it.
	Pinned, Ours bool
}

// Progress is how far a pull is.
type Progress struct {
	// Done and Total are bytes of compressed content; Total is 0 while the
	// manifest is not known, and includes what was there before the pull.
	Done, Total int64
}

// Layer is a part of an image.
type Layer struct {
	MediaType string
	Digest    string
	Size      int64
}

// Manifest is the image for this machine that a digest leads to.
type Manifest struct {
	// Digest is the manifest's own, which differs from the image's for an
	// index.
	Digest string
	Layers []Layer
	// Architecture is that of the image's configuration, such as "wasm".
	Architecture string
	// Size is that of all layers and the configuration together, in bytes.
	Size int64
}

// Blob is content that stays readable until it is closed.
type Blob interface {
	io.ReaderAt
	io.Closer
	Size() int64
}

// ErrNoImage is wrapped when the runtime has no such image or content.
var ErrNoImage = errors.New("no such image on this node")

// Runtime is the container runtime of this node. Errors that are not
// ErrNoImage or those of ctx are *[Error]. [Containerd] is the real one.
type Runtime interface {
	// Images lists all names.
	Images(ctx context.Context) ([]Image, error)
	// Pull brings ref here and returns what it now points at. It calls
	// progress about once per second, never concurrently; an error from
	// progress ends the pull and is returned. auth may be nil.
	Pull(ctx context.Context, ref Reference, auth *Auth, progress func(Progress) error) (digest string, err error)
	// Protect keeps the image of that name from kubelet's collection. It may
	// be called again, and must be after anybody pulled that name: containerd
	// then replaces the labels of the name. The pull is an event, so a pass
	// comes within a second; kubelet leaves images alone that are younger
	// than two minutes (imageMinimumGCAge).
	Protect(ctx context.Context, name string) error
	// Release takes back what Protect did, and nothing else. An image that
	// is gone or not ours is not an error.
	Release(ctx context.Context, name string) error
	// Manifest reads what an image's digest leads to on this machine.
	Manifest(ctx context.Context, digest string) (Manifest, error)
	// Open opens a layer.
	Open(ctx context.Context, l Layer) (Blob, error)
	// Watch calls changed after images came, went or changed, until ctx
	// ends or the connection is lost; it never returns nil.
	Watch(ctx context.Context, changed func()) error
}
