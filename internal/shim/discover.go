package shim

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	// criDeadline bounds asking CRI for its status; it answers from memory.
	criDeadline = 10 * time.Second
	// maxEnviron bounds what is read of containerd's environment.
	maxEnviron = 1 << 20
	// maxShims bounds the shim binaries that are looked at.
	maxShims = 64
)

// installDir is on every containerd's PATH, k3s's included, and is where the
// sentences in Problems send people.
const installDir = "/usr/local/bin"

// defaultPath is taken for containerd's PATH when the process cannot be read:
// systemd's default for services.
var defaultPath = []string{"/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"}

// extraDirs are where installers drop shims although containerd may not look
// there: KWasm, the runtime class manager.
var extraDirs = []string{"/usr/local/bin", "/usr/bin", "/opt/kwasm/bin", "/opt/rcm/bin"}

// defaultConfigs are read when they exist: k3s's rendered configuration and
// the place of an ordinary containerd.
var defaultConfigs = []string{
	"/var/lib/rancher/k3s/agent/etc/containerd/config.toml",
	"/var/lib/rancher/rke2/agent/etc/containerd/config.toml",
	"/etc/containerd/config.toml",
}

// DefaultMinimumVersions are the oldest shims that are accepted, by engine.
// Spin's 0.15 is the first release after those under which Python
// applications failed to start (spinframework/spin-operator#202).
func DefaultMinimumVersions() map[string]string {
	return map[string]string{"spin": "0.15.0"}
}

// StatusClient is the part of CRI's RuntimeService that Discover asks.
type StatusClient interface {
	Status(ctx context.Context, in *runtimeapi.StatusRequest, opts ...grpc.CallOption) (*runtimeapi.StatusResponse, error)
}

// RuntimeClass is what Discover wants to know of a Kubernetes RuntimeClass.
type RuntimeClass struct {
	Name    string
	Handler string
}

// DiscoverOptions say where to look.
type DiscoverOptions struct {
	// Root is where the node's file system is seen: "/" (default), or the
	// mount point of the host's root in a container.
	Root string
	// Proc is where the node's /proc is seen (default "/proc").
	Proc string
	// ContainerdPID is containerd's process as Proc shows it, for its PATH; 0
	// when not known, which makes Discover assume a service's default PATH.
	ContainerdPID int
	// CRI is the runtime service of the node; nil: do not ask.
	CRI StatusClient
	// Configs are containerd configurations, absolute on the node; nil means
	// those of k3s, RKE2 and an ordinary containerd. Missing ones are skipped.
	Configs []string
	// ExtraDirs are searched for shims beside containerd's PATH; nil means
	// where installers are known to put them.
	ExtraDirs []string
	// RuntimeClasses are those of the cluster, when known.
	RuntimeClasses []RuntimeClass
	// Extra names further Wasm engines, or another kind for a known one.
	Extra map[string]Kind
	// MinimumVersions are by engine, without "v"; nil means
	// DefaultMinimumVersions, an empty map none.
	MinimumVersions map[string]string
	// Binaries remembers versions and digests between calls; nil: every call
	// reads and runs every shim.
	Binaries *BinaryCache
}

// Inventory is what Discover found.
type Inventory struct {
	// Runtimes are the node's Wasm runtimes, sorted by Key.
	Runtimes []Runtime
	// Path is where containerd looks for shims, in order.
	Path []string
	// Problems concern the node rather than one runtime.
	Problems []string
}

// Discover finds the node's Wasm runtimes. Shims of other kinds (runc, kata)
// are left out. With an error the Inventory still holds what could be found,
// but a runtime that is missing from it need not be gone.
func Discover(ctx context.Context, options DiscoverOptions) (Inventory, error) {
	d := newDiscovery(options)
	d.findPath()
	d.findBinaries()
	errs := []error{d.findConfigs(), d.findHandlers(ctx)}
	d.merge()
	for key, runtime := range d.runtimes {
		d.describe(ctx, runtime)
		d.inventory.Runtimes = append(d.inventory.Runtimes, *d.runtimes[key])
	}
	slices.SortFunc(d.inventory.Runtimes, func(a, b Runtime) int { return strings.Compare(a.Key(), b.Key()) })
	d.matchClasses()
	if ctx.Err() != nil {
		errs = append(errs, fmt.Errorf("looking for Wasm runtimes: %w", context.Cause(ctx)))
	}
	return d.inventory, errors.Join(errs...)
}

type discovery struct {
	DiscoverOptions
	kinds     map[string]Kind
	inventory Inventory
	// beside is the directory of containerd's own executable, its last resort.
	beside string
	// binaries are the directories that hold a shim, by file name, in the
	// order they are searched.
	binaries map[string][]string
	// configured and running are the handlers in files, and those that
	// containerd has in memory; asked says that running is an answer.
	configured, running map[string]handlerConfig
	asked               bool
	runtimes            map[string]*Runtime
}

func newDiscovery(options DiscoverOptions) *discovery {
	if options.Root == "" {
		options.Root = "/"
	}
	if options.Proc == "" {
		options.Proc = "/proc"
	}
	if options.Configs == nil {
		options.Configs = defaultConfigs
	}
	if options.ExtraDirs == nil {
		options.ExtraDirs = extraDirs
	}
	if options.MinimumVersions == nil {
		options.MinimumVersions = DefaultMinimumVersions()
	}
	return &discovery{
		DiscoverOptions: options,
		kinds:           kinds(options.Extra),
		binaries:        map[string][]string{},
		configured:      map[string]handlerConfig{},
		running:         map[string]handlerConfig{},
		runtimes:        map[string]*Runtime{},
	}
}

// findPath learns where containerd looks for shims: its PATH, then beside its
// own executable (core/runtime/v2/shim_manager.go, resolveRuntimePath).
func (d *discovery) findPath() {
	d.inventory.Path = defaultPath
	if d.ContainerdPID <= 0 {
		return
	}
	process := filepath.Join(d.Proc, fmt.Sprint(d.ContainerdPID))
	if file, err := os.Open(filepath.Join(process, "environ")); err == nil {
		environ := make([]byte, maxEnviron)
		n, _ := file.Read(environ) // procfs gives it in one piece
		file.Close()
		if path, ok := parseEnviron(environ[:n]); ok {
			d.inventory.Path = path
		}
	} else {
		d.inventory.Problems = append(d.inventory.Problems,
			fmt.Sprintf("containerd's PATH cannot be read, a service's default is assumed: run the agent as root in the host's PID namespace (%v)", err))
	}
	if executable, err := os.Readlink(filepath.Join(process, "exe")); err == nil {
		d.beside = filepath.Dir(executable)
	}
}

// searched says whether containerd looks into a directory.
func (d *discovery) searched(directory string) bool {
	return slices.Contains(d.inventory.Path, directory) || directory == d.beside
}

func (d *discovery) findBinaries() {
	directories := slices.Clone(d.inventory.Path)
	if d.beside != "" {
		directories = append(directories, d.beside)
	}
	directories = append(directories, d.ExtraDirs...)
	seen := map[string]bool{}
	count := 0
	for _, directory := range directories {
		if seen[directory] {
			continue
		}
		seen[directory] = true
		entries, err := os.ReadDir(filepath.Join(d.Root, directory))
		if err != nil {
			continue // most nodes lack some of them
		}
		for _, entry := range entries {
			name, _, ok := engineName(entry.Name())
			if !ok || d.kinds[name] == "" || count == maxShims {
				continue
			}
			if info, err := os.Stat(filepath.Join(d.Root, directory, entry.Name())); err != nil || !info.Mode().IsRegular() || info.Mode()&0o111 == 0 {
				continue
			}
			d.binaries[entry.Name()] = append(d.binaries[entry.Name()], directory)
			count++
		}
	}
}

func (d *discovery) findConfigs() error {
	var errs []error
	for _, path := range d.Configs {
		handlers, err := readConfig(d.Root, path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			errs = append(errs, err)
		default:
			maps.Copy(d.configured, handlers)
		}
	}
	return errors.Join(errs...)
}

// findHandlers asks the running containerd, which may have been started before
// its configuration was changed.
func (d *discovery) findHandlers(ctx context.Context) error {
	if d.CRI == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, criDeadline)
	defer cancel()
	status, err := d.CRI.Status(ctx, &runtimeapi.StatusRequest{Verbose: true})
	if err != nil {
		return fmt.Errorf("asking containerd for its runtime handlers: %w", err)
	}
	d.asked = true
	for _, handler := range status.GetRuntimeHandlers() {
		// containerd before 2.0 reports none, and the default's name is empty.
		if name := handler.GetName(); name != "" && len(d.running) < maxHandlers {
			d.running[name] = d.configured[name]
		}
	}
	if config, ok := status.GetInfo()["config"]; ok {
		handlers, err := parseCRIConfig(config)
		if err != nil {
			return err
		}
		maps.Copy(d.running, handlers)
	}
	return nil
}

// merge makes one Runtime per Wasm handler, and one per shim that has none.
func (d *discovery) merge() {
	handlers := maps.Clone(d.configured)
	maps.Copy(handlers, d.running)
	used := map[string]bool{}
	for name, config := range handlers {
		binary := binaryName(config.Type)
		if config.Path != "" {
			binary = filepath.Base(config.Path)
		}
		engine, runtimeType, ok := engineName(binary)
		if !ok || d.kinds[engine] == "" {
			continue
		}
		runtime := &Runtime{
			Name: engine, Kind: d.kinds[engine], Handler: name,
			RuntimeType: config.Type, RuntimePath: config.Path,
			Options:     config.Options,
			Snapshotter: cmp.Or(config.Snapshotter, d.configured[name].Snapshotter),
		}
		if runtime.RuntimeType == "" {
			runtime.RuntimeType = runtimeType
		}
		if _, ok := d.configured[name]; ok {
			runtime.Sources = addSorted(runtime.Sources, SourceConfig)
		}
		if _, ok := d.running[name]; ok {
			runtime.Sources = addSorted(runtime.Sources, SourceCRI)
		} else if d.asked {
			runtime.Problems = append(runtime.Problems,
				fmt.Sprintf("the handler %q is in containerd's configuration file, but the running containerd does not have it: restart containerd", name))
		}
		d.runtimes[name] = runtime
		used[binary] = true
	}
	for binary := range d.binaries {
		if used[binary] {
			continue
		}
		engine, runtimeType, _ := engineName(binary)
		runtime := &Runtime{Name: engine, Kind: d.kinds[engine], RuntimeType: runtimeType}
		runtime.Problems = append(runtime.Problems,
			fmt.Sprintf("%s is installed, but containerd has no runtime handler of type %s: restart k3s, which looks for shims when it starts, or add the handler to containerd's configuration", binary, runtimeType))
		d.runtimes[runtimeType] = runtime
	}
}

// describe finds the binary that containerd would run for a runtime, its
// version and its digest, and says what is wrong with it.
func (d *discovery) describe(ctx context.Context, runtime *Runtime) {
	problem := func(format string, values ...any) {
		runtime.Problems = append(runtime.Problems, fmt.Sprintf(format, values...))
	}
	name := binaryName(runtime.RuntimeType)
	directories := d.binaries[name]
	switch {
	case runtime.RuntimePath != "":
		if _, err := os.Stat(filepath.Join(d.Root, runtime.RuntimePath)); err != nil {
			problem("the configuration fixes the shim's place (runtime_path) as %s, which is not there: install it or correct the path", runtime.RuntimePath)
			return
		}
		runtime.Binary = runtime.RuntimePath
	case len(directories) == 0:
		problem("containerd has the runtime handler %q of type %s, but %s is not on its PATH: install it into %s", runtime.Handler, runtime.RuntimeType, name, installDir)
		return
	default:
		at := slices.IndexFunc(directories, d.searched)
		if at < 0 {
			hint := ""
			if named, _ := runtime.Options[optionBinaryName].(string); filepath.Dir(named) == directories[0] {
				hint = "; the option BinaryName does not help, containerd does not use it to find shims"
			}
			problem("%s is in %s, but containerd's PATH does not include that directory: link it into %s%s", name, directories[0], installDir, hint)
		}
		runtime.Binary = filepath.Join(directories[max(at, 0)], name)
	}
	runtime.Sources = addSorted(runtime.Sources, SourceBinary)

	if systemd, ok := d.runcSystemdCgroup(); ok && runtime.Handler != "" && systemd != runtime.systemdCgroup() {
		problem("the handler %q has SystemdCgroup = %t where runc has %t: pods would be accounted in the wrong cgroup; set it alike", runtime.Handler, !systemd, systemd)
	}
	// A link may lead out of the root we see; what it leads to is what counts
	// for its owner.
	real, err := resolve(d.Root, runtime.Binary)
	if err == nil {
		runtime.Digest, runtime.Version, err = d.Binaries.inspect(ctx, d.Root, real)
	}
	minimum := d.MinimumVersions[runtime.Name]
	switch {
	case err != nil:
		problem("the version is not known: %v", err)
	case olderThan(runtime.Version, minimum):
		runtime.TooOld = true
		problem("%s %s is older than %s, the oldest that is accepted: upgrade the shim", name, runtime.Version, minimum)
	}
}

// runcSystemdCgroup is the cgroup driver that ordinary pods get.
func (d *discovery) runcSystemdCgroup() (on, known bool) {
	for _, handlers := range []map[string]handlerConfig{d.running, d.configured} {
		if config, ok := handlers["runc"]; ok && config.Options != nil {
			return Runtime{Options: config.Options}.systemdCgroup(), true
		}
	}
	return false, false
}

// matchClasses adds RuntimeClasses to the runtimes they lead to. One that
// leads nowhere is only worth a word when its engine is here under another
// handler: k3s creates classes for every engine it has ever heard of.
func (d *discovery) matchClasses() {
	for _, class := range d.RuntimeClasses {
		matched := false
		for i := range d.inventory.Runtimes {
			runtime := &d.inventory.Runtimes[i]
			if runtime.Handler != "" && runtime.Handler == class.Handler {
				runtime.RuntimeClasses = addSorted(runtime.RuntimeClasses, class.Name)
				runtime.Sources = addSorted(runtime.Sources, SourceRuntimeClass)
				matched = true
			}
		}
		if matched {
			continue
		}
		for _, runtime := range d.inventory.Runtimes {
			if runtime.Handler != "" && strings.HasPrefix(class.Handler, runtime.Name+"-") || class.Handler == runtime.Name && runtime.Handler != "" {
				d.inventory.Problems = append(d.inventory.Problems,
					fmt.Sprintf("the RuntimeClass %q asks for the handler %q, which this node does not have; it has %s as %q: name that handler in the RuntimeClass", class.Name, class.Handler, runtime.Name, runtime.Handler))
				break
			}
		}
	}
}

// maxLinks bounds a chain of symbolic links, like the kernel's ELOOP.
const maxLinks = 40

// resolve follows symbolic links as a process with the given root would, and
// returns the path within that root.
func resolve(root, path string) (string, error) {
	rest := strings.Split(strings.Trim(filepath.Clean(path), "/"), "/")
	at := "/"
	for links := 0; len(rest) > 0; {
		next := filepath.Join(at, rest[0])
		rest = rest[1:]
		info, err := os.Lstat(filepath.Join(root, next))
		if err != nil {
			return "", fmt.Errorf("following %s: %w", path, err)
		}
		if info.Mode()&os.ModeSymlink == 0 {
			at = next
			continue
		}
		if links++; links > maxLinks {
			return "", fmt.Errorf("following %s: more than %d symbolic links", path, maxLinks)
		}
		target, err := os.Readlink(filepath.Join(root, next))
		if err != nil {
			return "", fmt.Errorf("following %s: %w", path, err)
		}
		if filepath.IsAbs(target) {
			at = "/"
		}
		rest = append(strings.Split(strings.Trim(filepath.Clean(target), "/"), "/"), rest...)
	}
	return at, nil
}
