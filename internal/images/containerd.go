package images

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	cimages "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	// criNamespace is where the CRI plugin keeps everything.
	criNamespace = "k8s.io"
	// callTimeout bounds calls that only look up or set something.
	callTimeout = 10 * time.Second
	// progressEvery is how often a pull is looked at.
	progressEvery = time.Second
	// maxManifestBytes bounds a manifest and a configuration, as registries
	// do with manifests (4 MiB).
	maxManifestBytes = 4 << 20
	// maxManifestLayers bounds what one manifest may list.
	maxManifestLayers = 1000
)

// Containerd is a node's containerd: pulls go through its CRI plugin, because
// the registry configuration of the CRI plugin (and so k3s's mirrors and
// rewrites) applies only there; what the CRI does not show is read through
// containerd's own API on the same socket.
type Containerd struct {
	client *containerd.Client
	images cri.ImageServiceClient
}

var _ Runtime = (*Containerd)(nil)

// NewContainerd prepares a client of the containerd behind the unix socket.
// Nothing is connected until the first call, and a lost connection is made
// again by the next one.
func NewContainerd(socket string) (*Containerd, error) {
	// grpc.NewClient connects lazily; containerd.New would wait.
	conn, err := grpc.NewClient("unix://"+socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20), grpc.MaxCallSendMsgSize(16<<20)),
		// A restarted containerd is to be found within seconds.
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: reconnect, MinConnectTimeout: 2 * time.Second}))
	if err != nil {
		return nil, fmt.Errorf("prepare a connection to containerd at %s: %w", socket, err)
	}
	client, err := containerd.NewWithConn(conn, containerd.WithDefaultNamespace(criNamespace))
	if err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("prepare a client of containerd at %s: %w", socket, err)
	}
	return &Containerd{client: client, images: cri.NewImageServiceClient(conn)}, nil
}

// Close drops the connection; running calls fail.
func (c *Containerd) Close() error { return c.client.Close() }

func scope(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(namespaces.WithNamespace(ctx, criNamespace), callTimeout)
}

// runtimeError is an error of a short call.
func runtimeError(ctx context.Context, err error, format string, args ...any) error {
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil && errors.Is(ctx.Err(), context.Canceled):
		return ctx.Err()
	case errdefs.IsNotFound(err):
		return fmt.Errorf("%w: %s: %w", ErrNoImage, fmt.Sprintf(format, args...), err)
	default:
		return fail(CodeRuntimeUnavailable, err, "containerd could not "+format, args...)
	}
}

// Images implements [Runtime].
func (c *Containerd) Images(ctx context.Context) ([]Image, error) {
	call, cancel := scope(ctx)
	defer cancel()
	list, err := c.client.ImageService().List(call)
	if err != nil {
		return nil, runtimeError(ctx, err, "list images")
	}
	// An image's record can outlive its content or snapshot; what the CRI
	// plugin lists is what kubelet may use.
	shown, err := c.images.ListImages(call, &cri.ListImagesRequest{})
	if err != nil {
		return nil, runtimeError(ctx, err, "list images through the CRI")
	}
	ready := make(map[string]bool)
	for _, i := range shown.GetImages() {
		for _, n := range slices.Concat(i.GetRepoTags(), i.GetRepoDigests()) {
			ready[n] = true
		}
	}
	out := make([]Image, 0, len(list))
	for _, i := range list {
		if strings.HasPrefix(i.Name, "sha256:") {
			continue // the CRI plugin's second name of an image: its ID
		}
		out = append(out, Image{
			Name: i.Name, Digest: i.Target.Digest.String(), Ready: ready[i.Name],
			Pinned: i.Labels[labelPinned] == labelPinnedValue, Ours: i.Labels[labelOurs] != "",
		})
	}
	return out, nil
}

// Protect implements [Runtime].
func (c *Containerd) Protect(ctx context.Context, name string) error {
	call, cancel := scope(ctx)
	defer cancel()
	i, err := c.client.ImageService().Get(call, name)
	if err != nil {
		return runtimeError(ctx, err, "read the labels of %s", name)
	}
	pinned, ours := i.Labels[labelPinned] == labelPinnedValue, i.Labels[labelOurs]
	value := pinOwn
	if pinned && ours != pinOwn {
		value = pinShared
	}
	if pinned && ours == value {
		return nil
	}
	return c.label(ctx, name, map[string]string{labelPinned: labelPinnedValue, labelOurs: value})
}

// Release implements [Runtime].
func (c *Containerd) Release(ctx context.Context, name string) error {
	call, cancel := scope(ctx)
	defer cancel()
	i, err := c.client.ImageService().Get(call, name)
	if err != nil {
		if errdefs.IsNotFound(err) {
			return nil
		}
		return runtimeError(ctx, err, "read the labels of %s", name)
	}
	set := map[string]string{labelOurs: ""} // containerd removes empty labels
	switch i.Labels[labelOurs] {
	case "":
		return nil
	case pinOwn:
		if i.Labels[labelK3s] == "" {
			set[labelPinned] = ""
		}
	}
	err = c.label(ctx, name, set)
	if errors.Is(err, ErrNoImage) {
		return nil
	}
	return err
}

// label sets exactly these labels in one transaction; others stay as they are.
func (c *Containerd) label(ctx context.Context, name string, labels map[string]string) error {
	call, cancel := scope(ctx)
	defer cancel()
	paths := make([]string, 0, len(labels))
	for k := range labels {
		paths = append(paths, "labels."+k)
	}
	_, err := c.client.ImageService().Update(call, cimages.Image{Name: name, Labels: labels}, paths...)
	return runtimeError(ctx, err, "set the labels of %s", name)
}

// Manifest implements [Runtime].
func (c *Containerd) Manifest(ctx context.Context, d string) (Manifest, error) {
	call, cancel := scope(ctx)
	defer cancel()
	return c.manifest(call, digest.Digest(d))
}

func (c *Containerd) manifest(ctx context.Context, d digest.Digest) (Manifest, error) {
	store := c.client.ContentStore()
	info, err := store.Info(ctx, d)
	if err != nil {
		return Manifest{}, runtimeError(ctx, err, "find manifest %s", d)
	}
	if info.Size > maxManifestBytes {
		return Manifest{}, fail(CodeUnpullable, nil, "manifest %s has %d bytes, more than %d", d, info.Size, maxManifestBytes)
	}
	desc := ocispec.Descriptor{Digest: d, Size: info.Size}
	raw, err := content.ReadBlob(ctx, store, desc)
	if err != nil {
		return Manifest{}, runtimeError(ctx, err, "read manifest %s", d)
	}
	if desc.MediaType, err = manifestType(raw); err != nil {
		return Manifest{}, fail(CodeUnpullable, err, "manifest %s cannot be read", d)
	}
	m, err := cimages.Manifest(ctx, smallBlobs{store}, desc, platforms.Default())
	if errors.Is(err, errLargeBlob) {
		return Manifest{}, fail(CodeUnpullable, err, "manifest %s cannot be read", d)
	}
	if err != nil {
		return Manifest{}, runtimeError(ctx, err, "read the manifest that %s leads to", d)
	}
	if len(m.Layers) > maxManifestLayers {
		return Manifest{}, fail(CodeUnpullable, nil, "manifest %s has %d layers, more than %d", d, len(m.Layers), maxManifestLayers)
	}
	out := Manifest{Digest: d.String(), Size: max(m.Config.Size, 0)}
	for _, l := range m.Layers {
		out.Layers = append(out.Layers, Layer{MediaType: l.MediaType, Digest: l.Digest.String(), Size: l.Size})
		out.Size += max(l.Size, 0)
	}
	// During a pull the configuration may not be here yet.
	if raw, err := content.ReadBlob(ctx, smallBlobs{store}, m.Config); err == nil {
		out.Architecture = architecture(raw)
	}
	return out, nil
}

// Open implements [Runtime].
func (c *Containerd) Open(ctx context.Context, l Layer) (Blob, error) {
	ctx = namespaces.WithNamespace(ctx, criNamespace)
	r, err := c.client.ContentStore().ReaderAt(ctx, ocispec.Descriptor{Digest: digest.Digest(l.Digest), Size: l.Size})
	if err != nil {
		return nil, runtimeError(ctx, err, "open layer %s", l.Digest)
	}
	return r, nil
}

// Watch implements [Runtime].
func (c *Containerd) Watch(ctx context.Context, changed func()) error {
	ctx, cancel := context.WithCancel(namespaces.WithNamespace(ctx, criNamespace))
	defer cancel()
	events, errs := c.client.EventService().Subscribe(ctx, `topic~="^/images/"`)
	for {
		select {
		case <-events:
			changed()
		case err := <-errs:
			if err == nil {
				err = errors.New("the stream ended")
			}
			return runtimeError(ctx, err, "tell of changed images")
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// ImageRoot is the directory in which containerd keeps images, as the CRI
// plugin tells it: the filesystem whose free space decides about pulls.
func (c *Containerd) ImageRoot(ctx context.Context) (string, error) {
	call, cancel := scope(ctx)
	defer cancel()
	r, err := c.images.ImageFsInfo(call, &cri.ImageFsInfoRequest{})
	if err != nil {
		return "", runtimeError(ctx, err, "tell where it keeps images")
	}
	for _, f := range r.GetImageFilesystems() {
		if m := f.GetFsId().GetMountpoint(); m != "" {
			return m, nil
		}
	}
	return "", fail(CodeRuntimeUnavailable, nil, "containerd does not tell where it keeps images")
}

// Pull implements [Runtime].
func (c *Containerd) Pull(ctx context.Context, ref Reference, auth *Auth, progress func(Progress) error) (string, error) {
	pull, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	req := &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref.Name, UserSpecifiedImage: ref.Name}}
	if auth != nil {
		// The address keeps containerd from sending the password to a mirror
		// of that registry. A mirror has credentials of its own, in
		// containerd's hosts.toml or k3s's registries.yaml.
		req.Auth = &cri.AuthConfig{Username: auth.Username, Password: auth.Password, ServerAddress: "https://" + auth.Host}
	}
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		c.follow(pull, ref, progress, cancel)
	}()
	_, err := c.images.PullImage(pull, req)
	cause := context.Cause(pull)
	cancel(nil)
	<-watched
	if err != nil {
		if ctx.Err() != nil {
			return "", ctx.Err()
		}
		if cause != nil {
			return "", cause // progress ended it
		}
		e := pullError(ref, err)
		if e.Code == CodeDigestMismatch {
			c.dropDamaged(ctx, ref, e.Detail)
		}
		return "", e
	}
	call, done := scope(ctx)
	defer done()
	i, err := c.client.ImageService().Get(call, ref.Name)
	if err != nil {
		return "", runtimeError(ctx, err, "find %s right after pulling it", ref.Name)
	}
	got := i.Target.Digest.String()
	if ref.Digest != "" && got != ref.Digest {
		return "", fail(CodeDigestMismatch, nil, "containerd's image %s points at %s; remove it with `crictl rmi` and see who re-tags images on this node", ref.Name, got)
	}
	return got, nil
}

// failedIngest finds the name of an ingest in a message of containerd.
var failedIngest = regexp.MustCompile(`[a-z]+-sha256:[0-9a-f]{64}`)

// dropDamaged removes what containerd has of blobs that turned out not to be
// what their digests say. containerd 2.4 itself keeps such an ingest and goes
// on from its end: every later pull of that blob, kubelet's too, fails with
// the same words although the registry is sound again, for a day until the
// ingest is collected.
func (c *Containerd) dropDamaged(ctx context.Context, ref Reference, message string) {
	call, cancel := scope(ctx)
	defer cancel()
	drop := make(map[string]bool)
	for _, name := range failedIngest.FindAllString(message, 4) {
		drop[name[strings.Index(name, "sha256:"):]] = true
	}
	if ref.Digest != "" {
		drop[ref.Digest] = true
		if m, err := c.manifest(call, digest.Digest(ref.Digest)); err == nil {
			for _, l := range m.Layers {
				drop[l.Digest] = true
			}
		}
	}
	statuses, err := c.client.ContentStore().ListStatuses(call)
	if err != nil {
		return // the next failure leads here again
	}
	for _, s := range statuses {
		if i := strings.LastIndex(s.Ref, "sha256:"); i >= 0 && drop[s.Ref[i:]] {
			_ = c.client.ContentStore().Abort(call, s.Ref)
		}
	}
}

// follow reports a pull's progress until pull ends.
//
// The CRI tells nothing while it pulls, so this reads containerd's content
// store: the manifest is fetched first and names the blobs, those are either
// there, or being ingested under a name that ends in their digest. This is
// also where an image's size is known for the first time: asking the registry
// ourselves beforehand would go around mirrors and rewrites.
func (c *Containerd) follow(pull context.Context, ref Reference, progress func(Progress) error, cancel context.CancelCauseFunc) {
	t := time.NewTicker(progressEvery)
	defer t.Stop()
	began := time.Now()
	known := digest.Digest(ref.Digest)
	var last Progress
	for {
		select {
		case <-pull.Done():
			return
		case <-t.C:
		}
		if known == "" {
			known = c.findManifest(pull, ref, began)
		}
		// Without an answer nothing moved, as far as anybody can tell; that
		// is what must be reported for a stall to be noticed.
		if p, err := c.progress(pull, known); err == nil {
			last = p
		}
		if err := progress(last); err != nil {
			cancel(err)
			return
		}
	}
}

// findManifest finds the manifest that a tag is being pulled as: one that
// containerd has marked since began as from that repository. It does so at
// every pull, also of what an earlier one left behind.
func (c *Containerd) findManifest(ctx context.Context, ref Reference, began time.Time) digest.Digest {
	call, cancel := scope(ctx)
	defer cancel()
	var found digest.Digest
	_, repository, _ := strings.Cut(ref.Repository, "/")
	host, err := url.Parse("registry://" + ref.Host)
	if err != nil {
		return ""
	}
	label := "containerd.io/distribution.source." + host.Hostname() // it leaves the port out
	_ = c.client.ContentStore().Walk(call, func(i content.Info) error {
		// containerd's clock is ours, read a moment apart.
		if found != "" || i.Size > maxManifestBytes || i.UpdatedAt.Before(began.Add(-time.Second)) {
			return nil
		}
		if !slices.Contains(strings.Split(i.Labels[label], ","), repository) {
			return nil
		}
		if raw, err := content.ReadBlob(call, smallBlobs{c.client.ContentStore()}, ocispec.Descriptor{Digest: i.Digest, Size: i.Size}); err == nil {
			if _, err := manifestType(raw); err == nil {
				found = i.Digest
			}
		}
		return nil
	}, fmt.Sprintf("labels.%q", label))
	return found
}

// progress adds up what is there of the image that d leads to.
func (c *Containerd) progress(ctx context.Context, d digest.Digest) (Progress, error) {
	call, cancel := scope(ctx)
	defer cancel()
	if d == "" {
		return Progress{}, nil
	}
	m, err := c.manifest(call, d)
	if errors.Is(err, ErrNoImage) {
		return Progress{}, nil
	}
	if err != nil {
		return Progress{}, err
	}
	statuses, err := c.client.ContentStore().ListStatuses(call)
	if err != nil {
		return Progress{}, err
	}
	coming := make(map[string]int64, len(statuses))
	for _, s := range statuses {
		if i := strings.LastIndex(s.Ref, "sha256:"); i >= 0 {
			coming[s.Ref[i:]] = s.Offset
		}
	}
	var p Progress
	for _, l := range m.Layers {
		p.Total += l.Size
		if offset, ok := coming[l.Digest]; ok {
			p.Done += min(offset, l.Size)
		} else if _, err := c.client.ContentStore().Info(call, digest.Digest(l.Digest)); err == nil {
			p.Done += l.Size
		}
	}
	return p, nil
}

// pullPatterns classify what containerd's resolver and fetcher say. The CRI
// passes it on as text of one gRPC code, so text is all there is; what is not
// recognised is thought to be passing.
var pullPatterns = []struct {
	code string
	text []string
}{
	{CodeDiskFull, []string{"no space left on device", "disk quota exceeded"}},
	{CodeUnauthorized, []string{"401 unauthorized", "403 forbidden", "authorization failed", "no basic auth credentials", "failed to authorize", "insufficient_scope", "pull access denied", "authentication required"}},
	{CodeDigestMismatch, []string{"unexpected commit digest", "unexpected commit size", "failed size validation", "read past expected size", "digest mismatch"}},
	{CodeRegistryUnavailable, []string{"connection refused", "no such host", "i/o timeout", "tls handshake", "429 too many requests", "unexpected eof", "connection reset", "no route to host"}},
	{CodeUnpullable, []string{"no match for platform", "number of layers and diffids", "unknown image config", "unsupported media type", "unexpected media type", "mismatched image rootfs and manifest layers", "invalid checksum digest", "get image diffids", "unmarshal image config", "invalid character", "unsupported image"}},
	{CodeNotFound, []string{"not found", "404", "does not exist", "manifest unknown", "name unknown"}},
}

// pullError turns what PullImage answered into an *Error.
func pullError(ref Reference, err error) *Error {
	s := status.Convert(err)
	text := strings.ToLower(s.Message())
	code := CodeRegistryUnavailable
	for _, p := range pullPatterns {
		if slices.ContainsFunc(p.text, func(t string) bool { return strings.Contains(text, t) }) {
			code = p.code
			break
		}
	}
	// containerd itself being gone comes from gRPC, not from the CRI plugin.
	if s.Code() == codes.Unavailable && (strings.Contains(text, "containerd.sock") || strings.Contains(text, "error reading from server") || strings.Contains(text, "transport") || strings.Contains(text, "unix")) {
		code = CodeRuntimeUnavailable
	}
	if s.Code() == codes.Unimplemented {
		return fail(CodeRuntimeUnavailable, nil, "containerd has no CRI image service: %s; enable its CRI plugin", shorten(s.Message(), 200))
	}
	if code == CodeDiskFull {
		return fail(code, nil, "no room was left on the disk of containerd's images while %s was pulled and unpacked; free space there, or give the disk more", ref.Name)
	}
	// The message names the reference twice and can be long.
	return fail(code, nil, "containerd could not pull %s: %s", ref.Name, shorten(s.Message(), 400))
}

// shorten keeps the end of a message, where the cause is, on one line.
func shorten(s string, limit int) string {
	s = strings.ToValidUTF8(strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, s), "?")
	if len(s) <= limit {
		return s
	}
	return "…" + strings.ToValidUTF8(s[len(s)-limit:], "")
}
