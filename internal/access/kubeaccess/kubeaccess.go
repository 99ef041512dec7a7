package kubeaccess

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	authenticationclient "k8s.io/client-go/kubernetes/typed/authentication/v1"
	authorizationclient "k8s.io/client-go/kubernetes/typed/authorization/v1"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/access"
)

// How long answers are believed. Whatever is revoked in the cluster is revoked
// here that much later at most.
const (
	// TokenTTL is for a good token, unless that expires sooner: a client that
	// polls costs the API server one review in ten seconds.
	TokenTTL = 10 * time.Second
	// refusedTokenTTL is for a bad one: short, because a ServiceAccount or pod
	// that was just made may not have reached every API server yet.
	refusedTokenTTL = 2 * time.Second
	// RightsTTL is for an answer of either kind.
	RightsTTL = 5 * time.Second
)

const (
	// reviewTimeout bounds one question. An API server that needs longer is
	// treated as one that does not answer.
	reviewTimeout = 5 * time.Second
	// maxReviews is how many questions of each kind are asked at once, so that
	// somebody with many bad tokens keeps neither the API server nor this
	// process busy. More wait, reviewTimeout at most.
	maxReviews = 16
	// maxTokens and maxRights bound the answers that are kept: some 1 KiB each.
	maxTokens = 4096
	maxRights = 8192
)

const (
	// DefaultAgent is the user that nodes' agents are.
	DefaultAgent = "system:serviceaccount:hearth-system:hearth-nodeagent"
	// DefaultRemedy says how a person gets a token.
	DefaultRemedy = "Send Authorization: Bearer <token>; kubectl create token <service account> --audience " + v1alpha1.Group + " makes one"

	// nodeNameExtra is where a TokenReview says on which node the pod is that a
	// token is bound to (KEP-4193, stable since Kubernetes 1.33).
	nodeNameExtra = "authentication.kubernetes.io/node-name"
)

// Options of New. Tokens and Rights are required.
type Options struct {
	// Tokens creates TokenReviews, Rights SubjectAccessReviews: both are in
	// the ClusterRole system:auth-delegator. Their own rate limit should be
	// well above what people do in a second.
	Tokens authenticationclient.TokenReviewsGetter
	Rights authorizationclient.SubjectAccessReviewsGetter
	// Audience that tokens must be for; empty: v1alpha1.Group. A token for the
	// API server, such as every pod has, is not one, so that who gets hold of a
	// request here cannot act on the cluster with it.
	Audience string
	// Agent is the user that may make a node's calls; empty: DefaultAgent.
	Agent string
	// Remedy is the sentence that tells a caller without a token how to get
	// one; empty: DefaultRemedy.
	Remedy string
	// Now is the clock; nil means time.Now.
	Now func() time.Time
	// Logger gets what the cluster says beside its answers: why it refused a
	// token, which rule it could not evaluate. nil discards it.
	Logger *slog.Logger
}

// Access authenticates and authorizes by a cluster. It is safe for concurrent
// use. Errors of its methods are an *access.UnauthenticatedError, an
// *access.DeniedError, or match access.ErrUnavailable.
type Access struct {
	o      Options
	tokens *answers[identity]
	rights *answers[verdict]
}

// identity is what a TokenReview said: caller, or why there is none.
type identity struct {
	caller  access.Caller
	refused string
}

// verdict is what a SubjectAccessReview said.
type verdict struct {
	allowed bool
	why     string
}

// New returns an Access.
func New(o Options) (*Access, error) {
	if o.Tokens == nil || o.Rights == nil {
		return nil, errors.New("kubeaccess: no client for reviews given")
	}
	o.Audience = cmp.Or(o.Audience, v1alpha1.Group)
	o.Agent = cmp.Or(o.Agent, DefaultAgent)
	o.Remedy = cmp.Or(o.Remedy, DefaultRemedy)
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return &Access{
		o:      o,
		tokens: newAnswers[identity](maxTokens, maxReviews, reviewTimeout, o.Now),
		rights: newAnswers[verdict](maxRights, maxReviews, reviewTimeout, o.Now),
	}, nil
}

// Authenticate finds out whose bearer token the request has.
func (a *Access) Authenticate(ctx context.Context, r *http.Request) (access.Caller, error) {
	token, err := access.BearerToken(r)
	if err != nil {
		var ue *access.UnauthenticatedError
		if errors.As(err, &ue) {
			ue.Remedy = a.o.Remedy
		}
		return access.Caller{}, err
	}
	id, err := a.tokens.get(ctx, sha256.Sum256([]byte(token)), func(ctx context.Context) (identity, time.Duration, error) {
		return a.review(ctx, token)
	})
	if err != nil {
		return access.Caller{}, a.unavailable(ctx, "find out who sent the request", err)
	}
	if id.refused != "" {
		return access.Caller{}, &access.UnauthenticatedError{Presented: true, Reason: id.refused, Remedy: a.o.Remedy}
	}
	return id.caller, nil
}

// review asks the cluster about a token.
func (a *Access) review(ctx context.Context, token string) (identity, time.Duration, error) {
	answer, err := a.o.Tokens.TokenReviews().Create(ctx, &authenticationv1.TokenReview{
		Spec: authenticationv1.TokenReviewSpec{Token: token, Audiences: []string{a.o.Audience}},
	}, metav1.CreateOptions{})
	if err != nil {
		return identity{}, 0, err
	}
	status := answer.Status
	claims := readClaims(token)
	switch {
	case !status.Authenticated:
		a.o.Logger.DebugContext(ctx, "the cluster refused a token", "why", status.Error)
		return identity{refused: claims.refusal(a.o.Audience, a.o.Now())}, refusedTokenTTL, nil
	case !slices.Contains(status.Audiences, a.o.Audience):
		// An authenticator that knows nothing of audiences takes any token.
		return identity{refused: fmt.Sprintf("The token is not for the audience %s", a.o.Audience)}, refusedTokenTTL, nil
	case status.User.Username == "":
		return identity{refused: "The token names nobody"}, refusedTokenTTL, nil
	}
	caller := access.Caller{User: status.User.Username, UID: status.User.UID, Groups: status.User.Groups}
	for name, values := range status.User.Extra {
		if caller.Extra == nil {
			caller.Extra = map[string][]string{}
		}
		caller.Extra[name] = values
	}
	ttl := TokenTTL
	if claims.Expiry > 0 {
		ttl = min(ttl, time.Unix(claims.Expiry, 0).Sub(a.o.Now()))
	}
	return identity{caller: caller}, ttl, nil
}

// Authorize asks whether the caller may act. What concerns one function is
// asked of all functions of the namespace first, as most roles grant it (an
// empty name means all, says the API of reviews): one answer then serves
// whoever reads a thousand functions, in place of one for each.
func (a *Access) Authorize(ctx context.Context, c access.Caller, act access.Action) error {
	if c.User == "" {
		return &access.DeniedError{Action: act, Why: "nobody is asking"}
	}
	if act.Function != "" {
		all := act
		all.Function = ""
		answer, err := a.verdict(ctx, c, all)
		if err != nil {
			return a.unavailable(ctx, "find out what the caller may do", err)
		}
		if answer.allowed {
			return nil
		}
	}
	answer, err := a.verdict(ctx, c, act)
	switch {
	case err != nil:
		return a.unavailable(ctx, "find out what the caller may do", err)
	case !answer.allowed:
		return &access.DeniedError{User: c.User, Action: act, Why: answer.why}
	}
	return nil
}

// verdict asks about exactly this action.
func (a *Access) verdict(ctx context.Context, c access.Caller, act access.Action) (verdict, error) {
	return a.rights.get(ctx, rightsKey(c, act), func(ctx context.Context) (verdict, time.Duration, error) {
		extra := map[string]authorizationv1.ExtraValue{}
		for name, values := range c.Extra {
			extra[name] = values
		}
		resource, _, _ := strings.Cut(access.Resource, ".")
		review, err := a.o.Rights.SubjectAccessReviews().Create(ctx, &authorizationv1.SubjectAccessReview{
			Spec: authorizationv1.SubjectAccessReviewSpec{
				User: c.User, UID: c.UID, Groups: c.Groups, Extra: extra,
				ResourceAttributes: &authorizationv1.ResourceAttributes{
					Verb: string(act.Verb), Group: v1alpha1.Group, Version: "v1alpha1", Resource: resource,
					Subresource: act.Subresource, Namespace: act.Tenant, Name: act.Function,
				},
			},
		}, metav1.CreateOptions{})
		if err != nil {
			return verdict{}, 0, err
		}
		s := review.Status
		if s.EvaluationError != "" {
			a.o.Logger.WarnContext(ctx, "the cluster could not evaluate every rule", "user", c.User, "action", act.String(), "error", s.EvaluationError)
		}
		// An authorizer that could not evaluate a rule has not allowed it.
		return verdict{s.Allowed && !s.Denied, strings.TrimSpace(s.Reason + " " + s.EvaluationError)}, RightsTTL, nil
	})
}

// Node returns the name of the node whose agent makes the request. The token
// must be the agent's and bound to a pod on that node (or to the node): the
// API server vouches for the binding, so the agent of one node cannot speak
// for another.
func (a *Access) Node(ctx context.Context, r *http.Request) (string, error) {
	c, err := a.Authenticate(ctx, r)
	if err != nil {
		return "", err
	}
	if c.User != a.o.Agent {
		return "", &access.NodeError{User: c.User, Reason: "only the agents of nodes may make this call"}
	}
	names := c.Extra[nodeNameExtra]
	if len(names) != 1 || names[0] == "" {
		return "", &access.NodeError{User: c.User, Reason: "the token is not bound to a pod on a node; mount a projected token of audience " + a.o.Audience}
	}
	return names[0], nil
}

// unavailable makes the error of a question that was not answered.
func (a *Access) unavailable(ctx context.Context, doing string, err error) error {
	if errors.Is(ctx.Err(), context.Canceled) {
		return ctx.Err() // the client left
	}
	if apierrors.IsForbidden(err) {
		err = fmt.Errorf("bind the ClusterRole system:auth-delegator to this process: %w", err)
	}
	return fmt.Errorf("%s: %w: %w", doing, access.ErrUnavailable, err)
}

// rightsKey is the same for the same question only: every part has its length
// before it.
func rightsKey(c access.Caller, act access.Action) [sha256.Size]byte {
	h := sha256.New()
	part := func(values ...string) {
		fmt.Fprintf(h, "%d;", len(values))
		for _, v := range values {
			fmt.Fprintf(h, "%d:%s", len(v), v)
		}
	}
	part(c.User, c.UID, string(act.Verb), act.Tenant, act.Function, act.Subresource)
	part(slices.Sorted(slices.Values(c.Groups))...)
	for _, name := range slices.Sorted(maps.Keys(c.Extra)) {
		part(name)
		part(c.Extra[name]...)
	}
	return [sha256.Size]byte(h.Sum(nil))
}

// claims are what a JSON web token says of itself (RFC 7519). Nothing here was
// verified: they explain a refusal, and shorten how long an answer is kept.
type claims struct {
	Expiry   int64    `json:"exp"`
	Audience audience `json:"aud"`
}

// audience is a string or a list of them (RFC 7519, section 4.1.3).
type audience []string

func (a *audience) UnmarshalJSON(data []byte) error {
	var one string
	if json.Unmarshal(data, &one) == nil {
		*a = audience{one}
		return nil
	}
	return json.Unmarshal(data, (*[]string)(a))
}

// readClaims returns no claims for a token of another kind.
func readClaims(token string) claims {
	var c claims
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return c
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil || json.Unmarshal(payload, &c) != nil {
		return claims{}
	}
	return c
}

// refusal is the likeliest reason for a token to be refused.
func (c claims) refusal(wanted string, now time.Time) string {
	switch {
	case c.Expiry > 0 && !now.Before(time.Unix(c.Expiry, 0)):
		return "The token has expired"
	case len(c.Audience) > 0 && !slices.Contains(c.Audience, wanted):
		return fmt.Sprintf("The token is for another audience than %s", wanted)
	}
	return "The cluster does not accept the token; what it was made for may have been deleted"
}
