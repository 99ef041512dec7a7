package ecr

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"regexp"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/service/ecr"
	"github.com/aws/aws-sdk-go-v2/service/ecr/types"
	"github.com/aws/smithy-go"

	"github.com/hearth-sh/hearth/internal/imds"
)

const (
	// DefaultUntaggedDays is how long ECR keeps images without a tag.
	DefaultUntaggedDays = 14
	// maxUntaggedDays is below what ECR takes: more is a slip.
	maxUntaggedDays = 365
	// maxKnown bounds the repositories that are remembered; ECR lets an account
	// have 100,000 in a region. Forgetting costs a call each.
	maxKnown = 1 << 16
)

// RepositoryOptions say how repositories are made. The zero value is usable.
type RepositoryOptions struct {
	// ScanOnPush has ECR look for known vulnerabilities in what is pushed. It
	// knows packages of operating systems, not WebAssembly: off is the default.
	ScanOnPush bool
	// UntaggedDays is how many days ECR keeps images without a tag: 0 means
	// DefaultUntaggedDays, a negative number that ECR keeps them for ever, at
	// most 365.
	UntaggedDays int
}

// Repositories makes repositories of private registries when they are first
// pushed to: with immutable tags, ECR's default encryption, and a lifecycle
// policy that expires images without a tag. Images with one are never expired
// by it; who pushes what must stay, pushes it under a tag.
//
// It is safe for concurrent use and starts no goroutine: one of those who need
// a repository makes it. The role needs ecr:DescribeRepositories and
// ecr:CreateRepository; ecr:GetLifecyclePolicy and ecr:PutLifecyclePolicy are
// only missed in the log.
type Repositories struct {
	source *Source
	o      RepositoryOptions
	policy string // "": none

	mu    sync.Mutex
	known map[repositoryKey]*repositoryEntry
}

type repositoryKey struct {
	registry   Registry
	repository string
}

// repositoryEntry is what is known of one repository.
type repositoryEntry struct {
	// turn is held by the caller that asks ECR. A channel, so that those who
	// wait can leave with their context.
	turn chan struct{}

	// Guarded by Repositories.mu.
	exists  bool
	quiet   time.Time // until then a failure is repeated, not asked for again
	failure error
}

// RepositoryError is why a repository does not exist, as far as ECR says.
type RepositoryError struct {
	// Kind is ErrRepositoryDenied, ErrLimit, ErrRefused or ErrUnavailable.
	Kind error
	// Repository as it was asked for.
	Repository string
	// Action is the API action that failed, and with ErrRepositoryDenied the
	// permission that is missing: "ecr:CreateRepository".
	Action string
	// Role is the IAM role that ECR saw, when it says so.
	Role string
	// Advice is what to do, Err the cause.
	Advice string
	Err    error
}

func (e *RepositoryError) Error() string {
	return fmt.Sprintf("%v: %s for %s: %s (%.500s)", e.Kind, e.Action, e.Repository, e.Advice, e.Err)
}

// Unwrap returns the kind and the cause.
func (e *RepositoryError) Unwrap() []error { return []error{e.Kind, e.Err} }

// Temporary says whether the same call may succeed later.
func (e *RepositoryError) Temporary() bool { return errors.Is(e.Kind, ErrUnavailable) }

// Repositories returns what makes repositories with this source's role.
func (s *Source) Repositories(o RepositoryOptions) (*Repositories, error) {
	if o.UntaggedDays == 0 {
		o.UntaggedDays = DefaultUntaggedDays
	}
	if o.UntaggedDays > maxUntaggedDays {
		return nil, fmt.Errorf("images without a tag can be kept for 1 to %d days, or, with a negative number, for ever; not for %d", maxUntaggedDays, o.UntaggedDays)
	}
	p := &Repositories{source: s, o: o, known: map[repositoryKey]*repositoryEntry{}}
	if o.UntaggedDays > 0 {
		policy, err := lifecyclePolicy(o.UntaggedDays)
		if err != nil {
			return nil, err
		}
		p.policy = policy
	}
	return p, nil
}

// lifecyclePolicy is the document that ECR evaluates about once a day. Its
// format: "Lifecycle policy properties" in the Amazon ECR user guide.
func lifecyclePolicy(days int) (string, error) {
	type object = map[string]any
	b, err := json.Marshal(object{"rules": []object{{
		"rulePriority": 1,
		"description":  "Hearth: what an unfinished push left; everything that a revision may refer to has a tag",
		"selection":    object{"tagStatus": "untagged", "countType": "sinceImagePushed", "countUnit": "days", "countNumber": days},
		"action":       object{"type": "expire"},
	}}})
	return string(b), err
}

// Ensure returns nil when the repository exists on a private registry, which it
// has then made, if need be, and remembers. Of registries that are not ECR's it
// knows nothing and returns nil. A failure is repeated to callers for five
// seconds. Errors are *RepositoryError, ErrNotECR for the public registry, or
// the context's.
func (p *Repositories) Ensure(ctx context.Context, registry, repository string) error {
	r, ok := ParseHost(registry)
	if !ok {
		return nil
	}
	if r.Public {
		return fmt.Errorf("%w that functions are published to: %s is public; configure a private one, <account>.dkr.ecr.<region>.amazonaws.com", ErrNotECR, registry)
	}
	e := p.entry(repositoryKey{r, repository})
	if done, err := p.settled(e); done {
		return err
	}
	select {
	case e.turn <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("waiting for the repository %s: %w", repository, ctx.Err())
	}
	defer func() { <-e.turn }()
	if done, err := p.settled(e); done { // another caller was faster
		return err
	}
	within, cancel := context.WithTimeout(ctx, p.source.timeout)
	defer cancel()
	err := p.make(within, r, repository)
	if ctx.Err() != nil && err != nil {
		return fmt.Errorf("making the repository %s: %w", repository, ctx.Err())
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	e.exists, e.failure, e.quiet = err == nil, err, time.Time{}
	if err != nil {
		e.quiet = p.source.now().Add(failurePause)
	}
	return err
}

// Forget has the next Ensure ask ECR: a registry has said that it does not know
// the repository.
func (p *Repositories) Forget(registry, repository string) {
	r, ok := ParseHost(registry)
	if !ok {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if e := p.known[repositoryKey{r, repository}]; e != nil {
		e.exists = false
	}
}

func (p *Repositories) entry(k repositoryKey) *repositoryEntry {
	p.mu.Lock()
	defer p.mu.Unlock()
	e := p.known[k]
	if e == nil {
		if len(p.known) >= maxKnown {
			clear(p.known) // callers that hold an entry go on with that
		}
		e = &repositoryEntry{turn: make(chan struct{}, 1)}
		p.known[k] = e
	}
	return e
}

// settled says whether ECR need not be asked.
func (p *Repositories) settled(e *repositoryEntry) (bool, error) {
	now := p.source.now()
	p.mu.Lock()
	defer p.mu.Unlock()
	if e.exists {
		return true, nil
	}
	return now.Before(e.quiet), e.failure
}

// make looks for the repository, and creates it when there is none.
func (p *Repositories) make(ctx context.Context, r Registry, repository string) error {
	client, log := p.source.private(r), p.source.log.With("repository", repository, "account", r.Account, "region", r.Region)
	var found *ecr.DescribeRepositoriesOutput
	err := p.do(func() (err error) {
		found, err = client.DescribeRepositories(ctx, &ecr.DescribeRepositoriesInput{RegistryId: &r.Account, RepositoryNames: []string{repository}})
		return err
	})
	var (
		missing *types.RepositoryNotFoundException
		exists  *types.RepositoryAlreadyExistsException
	)
	switch {
	case err == nil && len(found.Repositories) > 0:
		if found.Repositories[0].ImageTagMutability == types.ImageTagMutabilityImmutable {
			p.keepPolicy(ctx, client, r, repository, log)
		}
		return nil
	case err == nil || errors.As(err, &missing):
	case refused(err):
		// A role that may create but not look: creating says whether it is there.
		log.Warn("repositories cannot be looked up; creating", "error", explainRepository(ctx, "ecr:DescribeRepositories", repository, err))
	default:
		return explainRepository(ctx, "ecr:DescribeRepositories", repository, err)
	}

	err = p.do(func() error {
		_, err := client.CreateRepository(ctx, &ecr.CreateRepositoryInput{
			RegistryId: &r.Account, RepositoryName: &repository,
			ImageTagMutability:         types.ImageTagMutabilityImmutable,
			ImageScanningConfiguration: &types.ImageScanningConfiguration{ScanOnPush: p.o.ScanOnPush},
		})
		return err
	})
	switch {
	case errors.As(err, &exists):
		return nil // another replica's; it has put the policy
	case err != nil:
		return explainRepository(ctx, "ecr:CreateRepository", repository, err)
	}
	log.Info("made a repository")
	p.putPolicy(ctx, client, r, repository, log)
	return nil
}

// keepPolicy puts the policy where there is none: whoever made the repository
// may have died before it had one. A policy that somebody else put is theirs.
func (p *Repositories) keepPolicy(ctx context.Context, client *ecr.Client, r Registry, repository string, log *slog.Logger) {
	if p.policy == "" {
		return
	}
	err := p.do(func() error {
		_, err := client.GetLifecyclePolicy(ctx, &ecr.GetLifecyclePolicyInput{RegistryId: &r.Account, RepositoryName: &repository})
		return err
	})
	var none *types.LifecyclePolicyNotFoundException
	switch {
	case errors.As(err, &none):
		p.putPolicy(ctx, client, r, repository, log)
	case err != nil:
		log.Warn("whether a repository has a lifecycle policy cannot be read; what unfinished pushes leave may stay there", "error", explainRepository(ctx, "ecr:GetLifecyclePolicy", repository, err))
	}
}

// putPolicy is not worth failing a push for: without it garbage costs a little.
func (p *Repositories) putPolicy(ctx context.Context, client *ecr.Client, r Registry, repository string, log *slog.Logger) {
	if p.policy == "" {
		return
	}
	if err := p.do(func() error {
		_, err := client.PutLifecyclePolicy(ctx, &ecr.PutLifecyclePolicyInput{RegistryId: &r.Account, RepositoryName: &repository, LifecyclePolicyText: &p.policy})
		return err
	}); err != nil {
		log.Warn("a repository has no lifecycle policy; what unfinished pushes leave stays there", "error", explainRepository(ctx, "ecr:PutLifecyclePolicy", repository, err))
	}
}

// do calls ECR, and once more with new credentials of the role when those it
// had are too old.
func (p *Repositories) do(f func() error) error {
	err := f()
	if expiredRole(err) {
		p.source.role.Invalidate()
		err = f()
	}
	return err
}

// refused says whether ECR said no for lack of a permission.
func refused(err error) bool {
	var api smithy.APIError
	return errors.As(err, &api) && !expiredRole(err) && (statusOf(err) == http.StatusForbidden || accessDenied[api.ErrorCode()])
}

var accessDenied = map[string]bool{"AccessDeniedException": true, "AccessDenied": true, "UnauthorizedOperation": true}

func statusOf(err error) int {
	var answer interface{ HTTPStatusCode() int }
	if errors.As(err, &answer) {
		return answer.HTTPStatusCode()
	}
	return 0
}

// What IAM says of a denial: "User: arn:aws:sts::123456789012:assumed-role/ROLE/
// SESSION is not authorized to perform: ACTION on resource: …".
var (
	deniedAction = regexp.MustCompile(`not authorized to perform: (ecr:[A-Za-z]{1,64})`)
	deniedRole   = regexp.MustCompile(`:assumed-role/([\w+=,.@-]{1,64})/`)
)

// explainRepository makes one sentence of the SDK's error.
func explainRepository(ctx context.Context, action, repository string, err error) error {
	e := &RepositoryError{Kind: ErrUnavailable, Repository: repository, Action: action, Err: err, Advice: "check the instance's role and its way to ECR"}
	var (
		metadata *imds.Error
		api      smithy.APIError
	)
	switch {
	case errors.As(err, &metadata):
		e.Advice = "the instance's role gives no credentials"
		if errors.Is(metadata, imds.ErrNotFound) {
			e.Advice = "the instance has no IAM role; attach an instance profile whose role allows " + action
		}
		e.Err = metadata
	case errors.As(err, &api):
		message := api.ErrorMessage()
		e.Err = fmt.Errorf("%s: %.300s", api.ErrorCode(), message)
		switch code := api.ErrorCode(); {
		case expiredRole(err):
			e.Kind, e.Advice = ErrRepositoryDenied, "the role's credentials are not accepted; check this machine's clock, and that the role still exists"
		case refused(err):
			e.Kind = ErrRepositoryDenied
			if m := deniedAction.FindStringSubmatch(message); m != nil {
				e.Action = m[1]
			}
			whom := "the instance's role"
			if m := deniedRole.FindStringSubmatch(message); m != nil {
				e.Role, whom = m[1], "the role "+m[1]
			}
			e.Advice = "allow " + e.Action + " on it to " + whom + ", or create the repository by other means"
		case code == "LimitExceededException":
			e.Kind, e.Advice = ErrLimit, "delete repositories that are no longer needed or ask AWS for a higher quota of repositories"
		case statusOf(err)/100 == 4 && statusOf(err) != http.StatusTooManyRequests && code != "ThrottlingException":
			e.Kind, e.Advice = ErrRefused, "check the repository prefix that is configured"
		default:
			e.Advice = "it usually recovers, else see the AWS health dashboard"
		}
	case errors.Is(ctx.Err(), context.Canceled):
		return fmt.Errorf("making the repository %s: %w", repository, context.Canceled)
	}
	return e
}
