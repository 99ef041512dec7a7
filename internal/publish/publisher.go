package publish

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/function"
	"github.com/hearth-sh/hearth/internal/registry"
	"github.com/hearth-sh/hearth/internal/submit"
)

// DefaultPrefix begins the repositories that Hearth publishes functions to.
// What is in them and belongs to no revision is garbage; other repositories
// are their pushers' own.
const DefaultPrefix = "functions/"

// Repositories makes repositories in registries, such as ECR, that do not make
// them on the first push.
type Repositories interface {
	// Ensure returns once the repository exists. It is called before every
	// push, so it should remember. An error with a method Temporary() bool
	// that says true is worth trying again, any other is not.
	Ensure(ctx context.Context, registry, repository string) error
	// Forget is told that the registry denies having the repository, whatever
	// Ensure remembers.
	Forget(registry, repository string)
}

// Options configure a Publisher. Client is required.
type Options struct {
	// Client pushes to its registry, and fetches from any.
	Client *registry.Client
	// RepositoryPrefix begins the repositories' names and ends with a slash;
	// default DefaultPrefix.
	RepositoryPrefix string
	// Tenants gives every tenant repositories of its own, <prefix><tenant>/<name>
	// in place of <prefix><name>, and lets it fetch from no other tenant's.
	Tenants bool
	// Located names the client's registry in artifacts, for nodes elsewhere that
	// have no other way to know it.
	Located bool
	// DigestTags pushes under a tag made of the digest (registry.DigestTag).
	// An artifact is then never untagged, which clean-up policies of most
	// registries take for garbage.
	DigestTags bool
	// Repositories makes the repositories; nil: the registry does by itself.
	Repositories Repositories
	// Alias, when set, says whether a host is another name of the client's
	// registry, as ECR's have: it keeps tenants apart there, too.
	Alias func(host string) bool
}

// Publisher lets the submit API publish to one registry and fetch from any.
// Its methods may be called concurrently.
type Publisher struct {
	o Options

	// mu guards flights: without it two callers with the same bytes could both
	// take themselves for the first.
	mu      sync.Mutex
	flights map[flightKey]*flight
}

var (
	_ submit.TenantPublisher = (*Publisher)(nil)
	_ submit.Configurer      = (*Publisher)(nil)
	_ submit.Inspector       = (*Publisher)(nil)
)

// flightKey is all that goes into an artifact, and where it goes.
type flightKey struct{ repository, digest, application, environment string }

// flight is a push in progress. The rest is set before done is closed.
type flight struct {
	done     chan struct{}
	artifact v1alpha1.Artifact
	err      error
	// shared says that the outcome is as good for everyone who waits.
	shared bool
}

// NewPublisher checks the options.
func NewPublisher(o Options) (*Publisher, error) {
	if o.Client == nil {
		return nil, errors.New("publish: no registry client given")
	}
	if o.RepositoryPrefix == "" {
		o.RepositoryPrefix = DefaultPrefix
	}
	if !strings.HasSuffix(o.RepositoryPrefix, "/") || !registry.ValidRepository(o.RepositoryPrefix+"x") {
		return nil, fmt.Errorf("publish: the repository prefix %.100q must be a path in lower case that ends with a slash, such as %q", o.RepositoryPrefix, DefaultPrefix)
	}
	return &Publisher{o: o, flights: map[flightKey]*flight{}}, nil
}

// Repository is the name of the repository of a tenant's function. The tenant
// is left out unless tenants have repositories of their own.
func (p *Publisher) Repository(tenant, name string) string {
	if p.o.Tenants {
		return p.o.RepositoryPrefix + component(tenant) + "/" + component(name)
	}
	return p.o.RepositoryPrefix + component(name)
}

// component makes a DNS label a component of a repository's name. Labels may
// have hyphens in a row, which ECR does not take: those after the first become
// "x.". No two labels give the same component, since labels have no dots.
func component(label string) string {
	var b strings.Builder
	for i := range len(label) {
		if label[i] == '-' && i > 0 && label[i-1] == '-' {
			b.WriteString("x.")
			continue
		}
		b.WriteByte(label[i])
	}
	return b.String()
}

// Publish implements submit.Publisher, for registries without tenants.
func (p *Publisher) Publish(ctx context.Context, name, modulePath, digest string, meta submit.ArtifactMeta) (v1alpha1.Artifact, error) {
	return p.PublishFor(ctx, "", name, modulePath, digest, meta)
}

// PublishFor pushes the module into the repository of a tenant's function and
// returns once the registry has acknowledged all of it. Of many who publish the
// same bytes at once, one pushes; if that one leaves before it is done, the next
// goes on with its own file. Bytes that are there already are not sent again.
//
// Errors are *submit.PublishError, or the context's.
func (p *Publisher) PublishFor(ctx context.Context, tenant, name, modulePath, digest string, meta submit.ArtifactMeta) (v1alpha1.Artifact, error) {
	if p.o.Tenants && tenant == "" {
		return v1alpha1.Artifact{}, fmt.Errorf("publish %s: this registry keeps tenants apart, and no tenant was given", name)
	}
	if digest == "" { // pushes in progress are told apart by it
		return v1alpha1.Artifact{}, fmt.Errorf("publish %s: the module's digest is missing", name)
	}
	repository := p.Repository(tenant, name)
	module := registry.Module{Path: modulePath, Digest: digest, Size: meta.SizeBytes}
	spin, err := spinOptions(name, meta.Application)
	if err != nil {
		return v1alpha1.Artifact{}, err
	}
	environment, err := json.Marshal([]any{spin.Env, spin.Variables}) // in the order of names
	if err != nil {
		return v1alpha1.Artifact{}, err
	}
	artifact, err := p.once(ctx, flightKey{repository, digest, name, string(environment)}, func() (v1alpha1.Artifact, error) {
		return p.push(ctx, repository, module, registry.PublishOptions{Spin: spin, DigestTag: p.o.DigestTags})
	})
	if err != nil {
		return v1alpha1.Artifact{}, pushProblem(repository, err)
	}
	return p.located(artifact), nil
}

// spinOptions describe the application of a function with this environment.
func spinOptions(name string, a submit.Application) (registry.SpinOptions, error) {
	o := registry.SpinOptions{Name: name, Executor: registry.ExecutorWAGI, Env: a.Env}
	names, err := function.SpinVariables(slices.Collect(maps.Keys(a.Env)), a.Secrets)
	if err != nil {
		return o, err
	}
	if len(names) > 0 {
		o.Variables = make(map[string]registry.SpinVariable, len(names))
	}
	for name, variable := range names {
		if value, plain := a.Env[name]; plain {
			o.Variables[variable] = registry.SpinVariable{Default: &value}
		} else {
			o.Variables[variable] = registry.SpinVariable{Secret: true}
		}
	}
	return o, nil
}

// Configure implements submit.Configurer. What it can tell is its own is what it
// would build of the module and the Application that from is said to have: the
// same bytes, and so the same digest.
func (p *Publisher) Configure(ctx context.Context, tenant, name string, from v1alpha1.Artifact, module string, size int64, was, app submit.Application) (v1alpha1.Artifact, error) {
	repository := p.Repository(tenant, name)
	if from.Repository != repository || from.Registry != "" && from.Registry != p.o.Client.Registry() && (p.o.Alias == nil || !p.o.Alias(from.Registry)) {
		return from, nil
	}
	published := registry.Module{Digest: module, Size: size}
	if !builds(from.Digest, published, name, was) {
		return from, nil
	}
	spin, err := spinOptions(name, app)
	if err != nil {
		return from, err
	}
	artifact, err := p.push(ctx, repository, published, registry.PublishOptions{Spin: spin, DigestTag: p.o.DigestTags})
	if err != nil {
		return from, pushProblem(repository, err)
	}
	return p.located(artifact), nil
}

// builds says whether the artifact of that digest is what is built of the module
// for a function with this Application.
func builds(digest string, module registry.Module, name string, a submit.Application) bool {
	spin, err := spinOptions(name, a)
	if err != nil {
		return false
	}
	image, err := registry.BuildSpin(module, spin)
	if err != nil {
		return false
	}
	built, err := image.Digest()
	return err == nil && built.String() == digest
}

func (p *Publisher) located(a v1alpha1.Artifact) v1alpha1.Artifact {
	if p.o.Located && a.Registry == "" {
		a.Registry = p.o.Client.Registry()
	}
	return a
}

// once runs push for the first of those with the same key and gives its outcome
// to the others, when it is theirs as well.
func (p *Publisher) once(ctx context.Context, key flightKey, push func() (v1alpha1.Artifact, error)) (v1alpha1.Artifact, error) {
	for {
		p.mu.Lock()
		f, others := p.flights[key]
		if !others {
			f = &flight{done: make(chan struct{})}
			p.flights[key] = f
		}
		p.mu.Unlock()
		if !others {
			p.lead(ctx, key, f, push)
			return f.artifact, f.err
		}
		select {
		case <-f.done:
		case <-ctx.Done():
			return v1alpha1.Artifact{}, fmt.Errorf("waiting for a push of the same module: %w", ctx.Err())
		}
		if f.shared {
			return f.artifact, f.err
		}
	}
}

func (p *Publisher) lead(ctx context.Context, key flightKey, f *flight, push func() (v1alpha1.Artifact, error)) {
	defer func() { // even if push panics, nobody waits for ever
		p.mu.Lock()
		delete(p.flights, key)
		p.mu.Unlock()
		close(f.done)
	}()
	f.artifact, f.err = push()
	f.shared = f.err == nil || (ctx.Err() == nil && registrys(f.err))
}

// registrys says whether an error is the registry's, not of the one file that
// was pushed or of who pushed it.
func registrys(err error) bool {
	var unmade *ensureError
	return errors.As(err, &unmade) || errors.Is(err, registry.ErrUnavailable) || errors.Is(err, registry.ErrUnauthorized) ||
		errors.Is(err, registry.ErrNotFound) || errors.Is(err, registry.ErrRefused)
}

// ensureError is why a repository that is missing was not made.
type ensureError struct{ err error }

func (e *ensureError) Error() string { return e.err.Error() }
func (e *ensureError) Unwrap() error { return e.err }

// push makes the repository if need be, and pushes.
func (p *Publisher) push(ctx context.Context, repository string, module registry.Module, o registry.PublishOptions) (v1alpha1.Artifact, error) {
	if p.o.Repositories == nil {
		return p.o.Client.Publish(ctx, repository, module, o)
	}
	host := p.o.Client.Registry()
	ensured := p.o.Repositories.Ensure(ctx, host, repository)
	if ensured != nil && ctx.Err() != nil {
		return v1alpha1.Artifact{}, ensured
	}
	// Also when it could not be ensured: it may be there, made by someone who
	// lets us push and no more.
	artifact, err := p.o.Client.Publish(ctx, repository, module, o)
	if errors.Is(err, registry.ErrNotFound) && ensured == nil {
		// Deleted since we looked, or so new that not all of the registry
		// knows of it.
		p.o.Repositories.Forget(host, repository)
		if ensured = p.o.Repositories.Ensure(ctx, host, repository); ensured == nil {
			artifact, err = p.o.Client.Publish(ctx, repository, module, o)
		}
	}
	if ensured != nil && (errors.Is(err, registry.ErrNotFound) || errors.Is(err, registry.ErrUnauthorized)) {
		return v1alpha1.Artifact{}, &ensureError{ensured}
	}
	return artifact, err
}

// Fetch implements submit.Publisher. Where tenants have repositories of their
// own it fetches from none of them.
func (p *Publisher) Fetch(ctx context.Context, imageRef, dst string, maxBytes int64) (v1alpha1.Artifact, error) {
	return p.FetchFor(ctx, "", imageRef, dst, maxBytes)
}

// FetchFor resolves an OCI reference to a digest and writes the artifact's one
// Wasm layer, at most maxBytes of it, to dst. What other tenants have published
// is refused: the registry would give it to us, not knowing for whom we ask.
//
// Errors are *submit.PublishError, or the context's.
func (p *Publisher) FetchFor(ctx context.Context, tenant, imageRef, dst string, maxBytes int64) (v1alpha1.Artifact, error) {
	host, repository, err := p.o.Client.Locate(imageRef)
	if err != nil {
		return v1alpha1.Artifact{}, fetchProblem(err)
	}
	if err := p.grants(tenant, host, repository); err != nil {
		return v1alpha1.Artifact{}, err
	}
	artifact, _, err := p.o.Client.Fetch(ctx, imageRef, dst, registry.PullOptions{MaxBytes: maxBytes})
	if err != nil {
		return artifact, fetchProblem(err)
	}
	return p.located(artifact), nil
}

// Inspect implements submit.Inspector: by the manifest alone, which must be in
// the repository that the artifact names. What tenants have published is theirs,
// as for FetchFor, also where size is known already.
//
// Errors are *submit.PublishError, or the context's.
func (p *Publisher) Inspect(ctx context.Context, tenant string, a v1alpha1.Artifact, spin bool, size int64) (int64, error) {
	if err := p.grants(tenant, cmp.Or(a.Registry, p.o.Client.Registry()), a.Repository); err != nil {
		return 0, err
	}
	if size > 0 {
		return size, nil
	}
	d, err := p.o.Client.Describe(ctx, a)
	if err != nil {
		return 0, fetchProblem(err)
	}
	if d.NotWasm == nil {
		return d.ModuleBytes, nil
	}
	if spin {
		return d.LayerBytes, nil // the shim reads more kinds of applications than we do
	}
	return 0, fetchProblem(d.NotWasm)
}

// grants says whether a tenant may use what is in a repository: not what another
// one has published. An empty tenant has no repositories.
func (p *Publisher) grants(tenant, host, repository string) error {
	home := p.o.Client.Registry()
	ours := host == home || canonical(host) == canonical(home) || p.o.Alias != nil && p.o.Alias(host)
	if p.o.Tenants && ours && strings.HasPrefix(repository, p.o.RepositoryPrefix) &&
		(tenant == "" || !strings.HasPrefix(repository, p.o.RepositoryPrefix+component(tenant)+"/")) {
		return &submit.PublishError{
			Code: "registry-unauthorized", Detail: "The repository holds functions of another tenant. Submit the module itself, or an image of your own.",
			Err: submit.ErrImageOfAnother,
		}
	}
	return nil
}

// canonical is one way to write a registry's host of several that reach it.
func canonical(host string) string {
	name, port, err := net.SplitHostPort(host)
	if err != nil {
		name, port = host, ""
	}
	name = strings.TrimSuffix(strings.ToLower(name), ".")
	if port == "" || port == "443" || port == "80" {
		return name
	}
	return net.JoinHostPort(name, port)
}
