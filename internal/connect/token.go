package connect

import (
	"context"
	"errors"
	"fmt"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const (
	// TokenLifetime is that of a token for one command, and the shortest that
	// Kubernetes makes.
	TokenLifetime = 10 * time.Minute
	// MaxTokenLifetime is the longest that may be asked for (2^32 s); clusters
	// usually give less.
	MaxTokenLifetime = (1 << 32) * time.Second
	// renewBefore is how long before its end a token is replaced, so that it
	// does not expire on its way.
	renewBefore = time.Minute
)

// Token is a bearer token for the API.
type Token struct {
	// Value is secret.
	Value string
	// ServiceAccount is namespace/name of whom it speaks for.
	ServiceAccount string
	// ExpiresAt is the cluster's word on when it ends.
	ExpiresAt time.Time
}

// String keeps the value out of logs and errors.
func (t Token) String() string { return "token of " + t.ServiceAccount }

// NewToken makes a token with the TokenRequest API. The cluster may shorten
// the lifetime; TokenLifetime is the least. Errors are *Error.
func (c *Cluster) NewToken(ctx context.Context, lifetime time.Duration) (Token, error) {
	account := c.accountNamespace + "/" + c.account
	if lifetime < TokenLifetime || lifetime > MaxTokenLifetime {
		return Token{}, &Error{Usage: true, Message: fmt.Sprintf("a token cannot live for %v; Kubernetes makes none for less than %v", lifetime, TokenLifetime)}
	}
	seconds := int64(lifetime / time.Second)
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	made, err := c.client.CoreV1().ServiceAccounts(c.accountNamespace).CreateToken(ctx, c.account, &authenticationv1.TokenRequest{
		Spec: authenticationv1.TokenRequestSpec{Audiences: []string{Audience}, ExpirationSeconds: &seconds},
	}, metav1.CreateOptions{})
	if err != nil {
		return Token{}, c.explain(err, "make tokens for the ServiceAccount "+account,
			fmt.Sprintf(`the verb create on serviceaccounts/token, resourceNames ["%s"],`, c.account),
			missing{
				message: fmt.Sprintf("there is no ServiceAccount %s in %s to make a token for", account, c),
				remedy:  "Hearth's chart makes hearth-system/" + DefaultServiceAccount + "; give another with --service-account, or a token with --token-file",
			})
	}
	if made.Status.Token == "" {
		return Token{}, &Error{Message: fmt.Sprintf("the API server of %s answered without a token", c), Err: errors.New("empty status.token")}
	}
	return Token{Value: made.Status.Token, ServiceAccount: account, ExpiresAt: made.Status.ExpirationTimestamp.Time}, nil
}

// heldToken is the token that a connection uses, and until when.
type heldToken struct {
	value string
	// until is by the monotonic clock: the one on the wall of a laptop may be
	// wrong. wall is by the other, which goes on while a laptop sleeps.
	until, wall time.Time
}

func (h heldToken) good(now time.Time) bool {
	return h.value != "" && now.Before(h.until) && now.Round(0).Before(h.wall)
}

func hold(t Token, asked time.Time) heldToken {
	until := asked.Add(TokenLifetime - renewBefore)
	return heldToken{value: t.Value, until: until, wall: until.Round(0)}
}
