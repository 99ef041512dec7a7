package shim

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	tasktypes "github.com/containerd/containerd/api/types/task"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/opencontainers/runtime-spec/specs-go"
	toml "github.com/pelletier/go-toml/v2"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

const (
	// Namespace is containerd's namespace for probes. Kubelet removes what it
	// does not know from "k8s.io", and only there.
	Namespace = v1alpha1.Group
	// kubernetesNamespace is where CRI keeps images, and where compiled
	// modules must be, because labels are per namespace.
	kubernetesNamespace = "k8s.io"
	// ownerLabel marks what this package creates outside its own namespace.
	ownerLabel = v1alpha1.Group + "/owner"
	ownerWarm  = "warm"

	// cleanupDeadline bounds removing one container after its run: killing a
	// shim that does not react takes containerd some ten seconds.
	cleanupDeadline = 20 * time.Second
	// outputGrace is how long output may trail behind the end of a process.
	outputGrace = 2 * time.Second
	// leaseLife keeps content of a run alive while nothing refers to it, and
	// lets containerd remove it when this process dies.
	leaseLife = 15 * time.Minute
	// pollInterval is how often the lock and a dying task are looked at.
	pollInterval = 50 * time.Millisecond

	// answerSize is what the probe writes: header, 64 hex digits, newline.
	answerSize = len("content-type: text/plain\n\n") + 64 + 1
	// maxOutput is what is kept of each output stream.
	maxOutput = 16 << 10

	// Limits of the probe's container: an engine with its code, with room. The
	// user stays root, without capabilities, as in pods that name none: Spin
	// makes a cache directory in the container's root.
	probeMemory = 512 << 20
	probePids   = 256
)

// ContainerdOptions say how to reach a containerd.
type ContainerdOptions struct {
	// Address is its socket: /run/k3s/containerd/containerd.sock,
	// /run/containerd/containerd.sock.
	Address string
	// StateDir is for the output pipes and the lock that keeps all processes
	// on this node to one container at a time (default /run/hearth/shim). The
	// shims open the pipes: it must be the same directory, under the same
	// name, for them and for this process.
	StateDir string
	// Snapshotter makes the containers' file systems, for handlers without one
	// of their own (default "overlayfs").
	Snapshotter string
	// Proc is where the processes of containerd's PID namespace are seen
	// (default "/proc"); used to tell a restarted containerd from another with
	// the same PID.
	Proc string
	// Logger (default slog.Default).
	Logger *slog.Logger
}

// Containerd is a Node and CacheNode on a containerd. It keeps one connection,
// which comes back by itself when containerd does.
type Containerd struct {
	options ContainerdOptions
	client  *containerd.Client
	log     *slog.Logger
}

// NewContainerd returns a Containerd without contacting it yet.
func NewContainerd(options ContainerdOptions) (*Containerd, error) {
	if options.StateDir == "" {
		options.StateDir = "/run/hearth/shim"
	}
	if options.Proc == "" {
		options.Proc = "/proc"
	}
	if options.Logger == nil {
		options.Logger = slog.Default()
	}
	if !filepath.IsAbs(options.Address) || !filepath.IsAbs(options.StateDir) {
		return nil, fmt.Errorf("connecting to containerd: socket %q and state directory %q must be absolute paths", options.Address, options.StateDir)
	}
	// The timeout is also the longest pause between attempts to reconnect.
	client, err := containerd.New(options.Address, containerd.WithTimeout(3*time.Second))
	if err != nil {
		return nil, fmt.Errorf("connecting to containerd at %s: %w", options.Address, err)
	}
	return &Containerd{options: options, client: client, log: options.Logger}, nil
}

// Close ends the connection.
func (c *Containerd) Close() error {
	if err := c.client.Close(); err != nil {
		return fmt.Errorf("closing the connection to containerd: %w", err)
	}
	return nil
}

// Server implements Node.
func (c *Containerd) Server(ctx context.Context) (Server, error) {
	response, err := c.client.IntrospectionService().Server(ctx)
	if err != nil {
		return Server{}, c.wrap(StageConnect, err)
	}
	server := Server{UUID: response.UUID, PID: int(response.Pid)}
	if stat, err := os.ReadFile(filepath.Join(c.options.Proc, fmt.Sprint(server.PID), "stat")); err == nil {
		server.Started = startTime(string(stat))
	}
	return server, nil
}

// startTime is field 22 of /proc/<pid>/stat, in clock ticks since boot; see
// proc_pid_stat(5). The command's name before it may hold anything.
func startTime(stat string) string {
	at := strings.LastIndexByte(stat, ')')
	if at < 0 {
		return ""
	}
	if fields := strings.Fields(stat[at+1:]); len(fields) > 19 {
		return fields[19]
	}
	return ""
}

// Run implements Node.
func (c *Containerd) Run(ctx context.Context, runtime Runtime, nonce string) (Output, error) {
	unlock, err := c.lock(ctx)
	if err != nil {
		return Output{}, &RunError{StagePrepare, err}
	}
	defer unlock()
	ctx = namespaces.WithNamespace(ctx, Namespace)
	image, err := newProbeImage(runtime.Kind)
	if err != nil {
		return Output{}, &RunError{StagePrepare, err}
	}
	id := newID("probe")
	// The last to go takes the image's content with it: nothing may be left
	// when Run returns.
	ctx, release, err := c.lease(ctx, id, leases.SynchronousDelete)
	if err != nil {
		return Output{}, err
	}
	defer release()
	reference := Namespace + "/probe:" + id
	if err := c.write(ctx, reference, image); err != nil {
		return Output{}, c.wrap(StagePrepare, err)
	}
	defer c.cleanup(ctx, "image", func(ctx context.Context) error {
		return c.client.ImageService().Delete(ctx, reference)
	})

	spec := containerSpec{
		id: id, image: reference, runtime: runtime, unpack: image.unpack,
		args: append(slices.Clone(image.args), nonce),
	}
	var address string
	if runtime.Kind == KindSpin {
		if address, err = freeAddress(ctx); err != nil {
			return Output{}, &RunError{StagePrepare, err}
		}
		spec.args = image.args
		spec.env = []string{"SPIN_HTTP_LISTEN_ADDR=" + address}
		spec.hostNetwork = true
	}
	container, err := c.create(ctx, spec)
	if err != nil {
		return Output{}, err
	}
	defer container.remove(ctx)
	if err := container.start(ctx); err != nil {
		return Output{}, err
	}
	output, err := container.answer(ctx, address, nonce)
	if err != nil {
		return output, err
	}
	// Taken before the image goes. Missing keys are no failure: not every
	// shim has a cache.
	if info, err := c.client.ContentStore().Info(ctx, image.manifest.Digest); err == nil {
		output.CompileKeys = compileKeys(info.Labels)
	}
	return output, nil
}

// Clean implements Node: it empties the namespace, and removes the containers
// of Warm elsewhere.
func (c *Containerd) Clean(ctx context.Context) (int, error) {
	unlock, err := c.lock(ctx)
	if err != nil {
		return 0, &RunError{StagePrepare, err}
	}
	defer unlock()
	removed := 0
	var errs []error
	for _, place := range []struct {
		namespace string
		filters   []string
	}{
		{Namespace, nil},
		{kubernetesNamespace, []string{fmt.Sprintf("labels.%q==%s", ownerLabel, ownerWarm)}},
	} {
		ctx := namespaces.WithNamespace(ctx, place.namespace)
		found, err := c.client.ContainerService().List(ctx, place.filters...)
		if err != nil {
			return removed, c.wrap(StageConnect, err)
		}
		for _, record := range found {
			if err := c.removeContainer(ctx, record); err != nil {
				errs = append(errs, fmt.Errorf("removing leftover container %s: %w", record.ID, err))
				continue
			}
			removed++
		}
	}
	ctx = namespaces.WithNamespace(ctx, Namespace)
	leftImages, err := c.client.ImageService().List(ctx)
	errs = append(errs, err)
	for _, image := range leftImages {
		errs = append(errs, ignoreNotFound(c.client.ImageService().Delete(ctx, image.Name)))
	}
	leftLeases, err := c.client.LeasesService().List(ctx)
	errs = append(errs, err)
	for _, lease := range leftLeases {
		errs = append(errs, ignoreNotFound(c.client.LeasesService().Delete(ctx, lease, leases.SynchronousDelete)))
	}
	errs = append(errs, c.killOrphans(ctx))
	// Whoever holds the lock is the only one with pipes.
	errs = append(errs, os.RemoveAll(c.pipeDir()))
	if err := errors.Join(errs...); err != nil {
		return removed, c.wrap(StagePrepare, err)
	}
	if err := os.RemoveAll(c.createdDir()); err != nil {
		return removed, c.wrap(StagePrepare, err)
	}
	return removed, nil
}

// pipeDir holds the output pipes of the run in progress.
func (c *Containerd) pipeDir() string { return filepath.Join(c.options.StateDir, "pipes") }

// lock waits for this node's turn: proofs and warming are serialised across
// processes, because two task creates at once can make runwasi's compile
// cache fail (its lease has a constant name).
func (c *Containerd) lock(ctx context.Context) (unlock func(), err error) {
	if err := os.MkdirAll(c.options.StateDir, 0o700); err != nil {
		return nil, fmt.Errorf("making the directory for the lock: %w", err)
	}
	file, err := os.OpenFile(filepath.Join(c.options.StateDir, "lock"), os.O_CREATE|os.O_RDWR|syscall.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the node's lock: %w", err)
	}
	for {
		err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { file.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			file.Close()
			return nil, fmt.Errorf("locking %s: %w", file.Name(), err)
		}
		if err := pause(ctx, pollInterval); err != nil {
			file.Close()
			return nil, fmt.Errorf("waiting for another probe on this node: %w", err)
		}
	}
}

// lease protects what is created until release is called, or leaseLife is over.
func (c *Containerd) lease(ctx context.Context, id string, options ...leases.DeleteOpt) (leased context.Context, release func(), err error) {
	service := c.client.LeasesService()
	lease, err := service.Create(ctx, leases.WithID(id), leases.WithExpiration(leaseLife))
	if err != nil {
		return nil, nil, c.wrap(StageConnect, err)
	}
	return leases.WithLease(ctx, lease.ID), func() {
		c.cleanup(ctx, "lease", func(ctx context.Context) error {
			return service.Delete(ctx, lease, options...)
		})
	}, nil
}

// cleanup does one piece of tidying up, also when ctx is over. What fails here
// does not change a result; Clean tries again at the next start.
func (c *Containerd) cleanup(ctx context.Context, what string, do func(context.Context) error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupDeadline)
	defer cancel()
	if err := ignoreNotFound(do(ctx)); err != nil {
		c.log.WarnContext(ctx, "leftover of a probe could not be removed, the next start tries again", "what", what, "error", err)
	}
}

// write puts an image into the content store.
func (c *Containerd) write(ctx context.Context, reference string, image probeImage) error {
	store := c.client.ContentStore()
	children := map[string]string{"containerd.io/gc.ref.content.0": image.config.Digest.String()}
	blobs := []blob{image.config}
	for i, layer := range image.layers {
		children[fmt.Sprintf("containerd.io/gc.ref.content.%d", i+1)] = layer.Digest.String()
		blobs = append(blobs, layer)
	}
	for _, blob := range blobs {
		if err := content.WriteBlob(ctx, store, reference+"@"+blob.Digest.String(), bytes.NewReader(blob.data), blob.Descriptor); err != nil {
			return fmt.Errorf("writing the probe image: %w", err)
		}
	}
	if err := content.WriteBlob(ctx, store, reference, bytes.NewReader(image.manifest.data), image.manifest.Descriptor, content.WithLabels(children)); err != nil {
		return fmt.Errorf("writing the probe image: %w", err)
	}
	record := images.Image{Name: reference, Target: image.manifest.Descriptor}
	if _, err := c.client.ImageService().Create(ctx, record); err != nil {
		return fmt.Errorf("recording the probe image: %w", err)
	}
	return nil
}

// containerSpec is what a container of ours differs in.
type containerSpec struct {
	id, image   string
	runtime     Runtime
	args, env   []string
	labels      map[string]string
	unpack      bool
	hostNetwork bool
}

// runningContainer is a container with a task, and its output.
type runningContainer struct {
	c              *Containerd
	record         containers.Container
	task           containerd.Task
	stdout, stderr *cappedBuffer
	closeIO        func()
}

// create makes the container and its task; the shim runs from here on.
func (c *Containerd) create(ctx context.Context, spec containerSpec) (*runningContainer, error) {
	options, err := runtimeOptions(spec.runtime)
	if err != nil {
		return nil, &RunError{StagePrepare, err}
	}
	cgroup := path.Join("/", Namespace, spec.id)
	if spec.runtime.systemdCgroup() {
		cgroup = "system.slice:hearth:" + spec.id
	}
	specOptions := []oci.SpecOpts{
		oci.WithProcessArgs(spec.args...),
		oci.WithEnv(spec.env),
		oci.WithCgroup(cgroup),
		oci.WithMemoryLimit(probeMemory),
		oci.WithPidsLimit(probePids),
		oci.WithCapabilities(nil),
		oci.WithNoNewPrivileges,
	}
	if spec.hostNetwork {
		specOptions = append(specOptions, oci.WithHostNamespace(specs.NetworkNamespace))
	}
	if err := c.remember(spec.id); err != nil {
		return nil, &RunError{StagePrepare, err}
	}
	containerOptions := []containerd.NewContainerOpts{
		// The shims look the image up by this name.
		containerd.WithImageName(spec.image),
		containerd.WithRuntime(spec.runtime.RuntimeType, options),
		containerd.WithContainerLabels(spec.labels),
	}
	snapshotter := cmp.Or(spec.runtime.Snapshotter, c.options.Snapshotter, defaults.DefaultSnapshotter)
	if spec.unpack {
		image, err := c.client.GetImage(ctx, spec.image)
		if err != nil {
			return nil, c.wrap(StagePrepare, err)
		}
		if err := image.Unpack(ctx, snapshotter); err != nil {
			return nil, c.wrap(StagePrepare, fmt.Errorf("unpacking the probe image: %w", err))
		}
		containerOptions = append(containerOptions, containerd.WithSnapshotter(snapshotter), containerd.WithNewSnapshot(spec.id, image))
	} else {
		containerOptions = append(containerOptions, withEmptySnapshot(c.client, snapshotter, spec.id))
	}
	containerOptions = append(containerOptions, containerd.WithNewSpec(specOptions...))
	container, err := c.client.NewContainer(ctx, spec.id, containerOptions...)
	if err != nil {
		c.cleanup(ctx, "snapshot", func(ctx context.Context) error {
			return c.client.SnapshotService(snapshotter).Remove(ctx, spec.id)
		})
		return nil, c.wrap(StagePrepare, err)
	}
	record, err := container.Info(ctx, containerd.WithoutRefreshedMetadata)
	if err != nil {
		return nil, c.wrap(StagePrepare, err)
	}
	running := &runningContainer{
		c: c, record: record,
		stdout: newCappedBuffer(maxOutput), stderr: newCappedBuffer(maxOutput),
		closeIO: func() {},
	}
	var taskOptions []containerd.NewTaskOpts
	if spec.runtime.RuntimePath != "" {
		taskOptions = append(taskOptions, containerd.WithRuntimePath(spec.runtime.RuntimePath))
	}
	creator := cio.NewCreator(cio.WithStreams(nil, running.stdout, running.stderr), cio.WithFIFODir(c.pipeDir()))
	running.task, err = container.NewTask(ctx, creator, taskOptions...)
	if err != nil {
		err = c.wrap(StageCreate, err)
		running.remove(ctx)
		return nil, err
	}
	if streams := running.task.IO(); streams != nil {
		running.closeIO = sync.OnceFunc(func() {
			streams.Cancel()
			streams.Close()
		})
	}
	return running, nil
}

// withEmptySnapshot gives a container an empty file system of its own. Without
// one the runtime would make its mount points in containerd's bundle, which
// containerd then cannot remove.
func withEmptySnapshot(client *containerd.Client, snapshotter, key string) containerd.NewContainerOpts {
	return func(ctx context.Context, _ *containerd.Client, record *containers.Container) error {
		if _, err := client.SnapshotService(snapshotter).Prepare(ctx, key, ""); err != nil {
			return fmt.Errorf("making an empty file system: %w", err)
		}
		record.Snapshotter, record.SnapshotKey = snapshotter, key
		return nil
	}
}

func (r *runningContainer) start(ctx context.Context) error {
	if err := r.task.Start(ctx); err != nil {
		return r.c.wrap(StageStart, err)
	}
	return nil
}

// answer waits for the probe's end, or, when it has an address, for what it
// says over HTTP. Output without end ends the wait too.
func (r *runningContainer) answer(ctx context.Context, address, nonce string) (Output, error) {
	waiting, stop := context.WithCancel(ctx)
	defer stop()
	exit, err := r.task.Wait(waiting)
	if err != nil {
		return Output{}, r.c.wrap(StageAnswer, err)
	}
	var asked chan httpAnswer
	if address != "" {
		asked = make(chan httpAnswer, 1)
		go func() { asked <- ask(waiting, address, nonce) }()
	}
	select {
	case <-r.stdout.full:
	case <-r.stderr.full:
	case response := <-asked:
		if response.err != nil {
			return r.output(), &RunError{StageAnswer, response.err}
		}
		output := r.output()
		output.Stdout, output.Truncated = response.body, response.truncated
		return output, nil
	case result := <-exit:
		if err := result.Error(); err != nil {
			return r.output(), r.c.wrap(StageAnswer, err)
		}
		if address != "" {
			return r.output(), &RunError{StageAnswer, fmt.Errorf("the runtime ended with status %d before it answered%s", result.ExitCode(), quoted(r.output().Stderr))}
		}
		// The last bytes may still be in the pipe. They are complete when
		// the shim has let go of it, which deleting the task makes it do.
		r.remove(ctx)
		output := r.output()
		output.ExitStatus = result.ExitCode()
		return output, nil
	case <-ctx.Done():
		return r.output(), &RunError{StageAnswer, context.Cause(ctx)}
	}
	return r.output(), nil
}

func (r *runningContainer) output() Output {
	out, truncated := r.stdout.take()
	errs, _ := r.stderr.take()
	return Output{Stdout: out, Truncated: truncated, Stderr: errs}
}

// remove ends the task whatever it is doing and removes the container. Calling
// it again does nothing.
func (r *runningContainer) remove(ctx context.Context) {
	r.c.cleanup(ctx, "container", func(ctx context.Context) error {
		err := r.c.removeContainer(ctx, r.record)
		// Unread output would keep the copying goroutines; a shim that died
		// without closing its ends is given a moment, then cut off.
		if r.task != nil && r.task.IO() != nil {
			drained := make(chan struct{})
			go func() {
				r.task.IO().Wait()
				close(drained)
			}()
			select {
			case <-drained:
			case <-time.After(outputGrace):
			}
			r.closeIO()
			<-drained
		}
		if err == nil {
			r.c.forget(r.record.ID)
		}
		return err
	})
}

// removeContainer kills and deletes a container's task, then the container
// with its snapshot.
func (c *Containerd) removeContainer(ctx context.Context, record containers.Container) error {
	if err := c.removeTask(ctx, record.ID); err != nil {
		return err
	}
	if record.SnapshotKey != "" {
		if err := ignoreNotFound(c.client.SnapshotService(record.Snapshotter).Remove(ctx, record.SnapshotKey)); err != nil {
			return fmt.Errorf("removing the snapshot of %s: %w", record.ID, err)
		}
	}
	if err := ignoreNotFound(c.client.ContainerService().Delete(ctx, record.ID)); err != nil {
		return fmt.Errorf("removing container %s: %w", record.ID, err)
	}
	return nil
}

// removeTask speaks to the task service itself: the client's Task.Delete
// refuses tasks that were created and never started, and waits for an end that
// runwasi's shims do not report for those.
func (c *Containerd) removeTask(ctx context.Context, id string) error {
	tasks := c.client.TaskService()
	for {
		// The answer does not matter: a task that is not running cannot be
		// killed, and deleting tells whether it is gone.
		_, _ = tasks.Kill(ctx, &tasksapi.KillRequest{ContainerID: id, Signal: uint32(syscall.SIGKILL), All: true})
		_, err := tasks.Delete(ctx, &tasksapi.DeleteTaskRequest{ContainerID: id})
		if err = ignoreNotFound(errgrpc.ToNative(err)); err == nil {
			// A shim that forgot the task answers "not found", and so does
			// containerd when it has none. Only the latter is the end.
			var state *tasksapi.GetResponse
			state, err = tasks.Get(ctx, &tasksapi.GetRequest{ContainerID: id})
			if errdefs.IsNotFound(errgrpc.ToNative(err)) || err == nil && state.GetProcess().GetStatus() == tasktypes.Status_UNKNOWN {
				return nil
			}
		}
		if unreachable(err) {
			return err
		}
		if pause(ctx, pollInterval) != nil {
			return fmt.Errorf("removing task %s: %w", id, errors.Join(err, context.Cause(ctx)))
		}
	}
}

// runtimeOptions makes of a handler's options what CRI makes of them
// (internal/cri/config, GenerateRuntimeOptions): containerd's own message for
// runc, the TOML text in a generic message for every other shim.
func runtimeOptions(runtime Runtime) (any, error) {
	if runtime.Options == nil {
		return nil, nil
	}
	body, err := toml.Marshal(runtime.Options)
	if err != nil {
		return nil, fmt.Errorf("writing the options of handler %q: %w", runtime.Handler, err)
	}
	if runtime.RuntimeType == "io.containerd.runc.v2" {
		options := &runcoptions.Options{}
		if err := toml.Unmarshal(body, options); err != nil {
			return nil, fmt.Errorf("reading the options of handler %q: %w", runtime.Handler, err)
		}
		return options, nil
	}
	options := &runtimeoptions.Options{}
	if err := toml.Unmarshal(body, options); err != nil {
		return nil, fmt.Errorf("reading the options of handler %q: %w", runtime.Handler, err)
	}
	if options.ConfigPath == "" {
		options.ConfigBody = body
	}
	return options, nil
}

// wrap turns containerd's errors into RunErrors that say what callers must
// tell apart.
func (c *Containerd) wrap(stage Stage, err error) error {
	if unreachable(err) {
		return &RunError{stage, fmt.Errorf("%w at %s: %w", ErrUnreachable, c.options.Address, err)}
	}
	// containerd reports these two only in words (core/runtime/v2,
	// resolveRuntimePath).
	if text := err.Error(); stage == StageCreate && (strings.Contains(text, "binary not installed") || strings.Contains(text, "invalid custom binary path")) {
		return &RunError{stage, fmt.Errorf("%w: %w", ErrShimNotFound, err)}
	}
	return &RunError{stage, err}
}

// unreachable says whether an error is containerd's absence. Its own services
// answer "unavailable" for a shim whose connection broke, in so many words.
func unreachable(err error) bool {
	if err == nil {
		return false
	}
	if code := status.Code(err); code != codes.Unavailable && !errdefs.IsUnavailable(err) {
		return false
	}
	text := err.Error()
	return !strings.Contains(text, "ttrpc")
}

func ignoreNotFound(err error) error {
	if errdefs.IsNotFound(err) || status.Code(err) == codes.NotFound {
		return nil
	}
	return err
}

// newID returns a name for a container, image and lease: unique on this node,
// and short enough for a cgroup and a socket path.
func newID(what string) string {
	var random [8]byte
	rand.Read(random[:]) // never fails: it ends the process instead
	return what + "-" + hex.EncodeToString(random[:])
}

func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-timer.C:
		return nil
	}
}

// cappedBuffer keeps the first bytes of a stream, swallows the rest, and says
// when there was more.
type cappedBuffer struct {
	mu     sync.Mutex // one goroutine copies, another takes
	buffer limitedBuffer
	// full is closed when the limit was exceeded.
	full chan struct{}
	over bool
}

func newCappedBuffer(limit int) *cappedBuffer {
	return &cappedBuffer{buffer: limitedBuffer{limit: limit}, full: make(chan struct{})}
}

func (b *cappedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(p) > b.buffer.limit-b.buffer.Len() && !b.over {
		b.over = true
		close(b.full)
	}
	return b.buffer.Write(p)
}

func (b *cappedBuffer) take() (data []byte, truncated bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return bytes.Clone(b.buffer.Bytes()), b.over
}
