package access

import (
	"errors"
	"fmt"
	"net/http"
	"strings"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

// MaxTokenBytes bounds a token. Those of Kubernetes have some 1200 bytes, those
// of identity providers with many groups several thousand.
const MaxTokenBytes = 16 << 10

// Resource is what actions are about, as a Role names it.
const Resource = "functions." + v1alpha1.Group

// Verb is what is done, as a Role names it.
type Verb string

// The verbs. A change of settings and a rollback are updates.
const (
	VerbCreate Verb = "create"
	VerbUpdate Verb = "update"
	VerbGet    Verb = "get"
	VerbList   Verb = "list"
	VerbDelete Verb = "delete"
)

// SubresourceLog is the subresource of a function's log.
const SubresourceLog = "log"

// Caller is who makes a request. The zero value is nobody.
type Caller struct {
	// User is unique among all callers of one source.
	User string
	// UID tells a user from an earlier one of that name; it may be empty.
	UID    string
	Groups []string
	// Extra is what else the source says of the caller.
	Extra map[string][]string

	// grant is what the token file allows the caller's token.
	grant *grant
}

// Action is what a caller wants to do.
type Action struct {
	Verb Verb
	// Tenant is the namespace; empty means all of them.
	Tenant string
	// Function is the object's name; empty for a list.
	Function string
	// Subresource is SubresourceLog or empty.
	Subresource string
}

// String completes the sentence "somebody may not …".
func (a Action) String() string {
	resource := Resource
	if a.Subresource != "" {
		resource = "functions/" + a.Subresource + "." + v1alpha1.Group
	}
	if a.Tenant == "" {
		return fmt.Sprintf("%s %s in all namespaces", a.Verb, resource)
	}
	return fmt.Sprintf("%s %s in the namespace %q", a.Verb, resource, a.Tenant)
}

// ErrUnavailable: it cannot be found out right now who somebody is or what
// they may do. It is never a reason to let anybody in, nor to tell a caller
// that a token is bad.
var ErrUnavailable = errors.New("access cannot be decided right now")

// UnauthenticatedError: the request names nobody. Its text never has a token
// in it.
type UnauthenticatedError struct {
	// Presented: there was a token, and it is not accepted.
	Presented bool
	// Reason is a sentence without its full stop.
	Reason string
	// Remedy is a sentence that says how to get a token; it may be empty.
	Remedy string
}

func (e *UnauthenticatedError) Error() string { return e.Reason }

// DeniedError: the caller is known and may not do it.
type DeniedError struct {
	User   string
	Action Action
	// Why is for the log, not for the caller.
	Why string
}

func (e *DeniedError) Error() string {
	return fmt.Sprintf("%q may not %s", e.User, e.Action)
}

// NodeError: the caller is known and may not speak for a node, or not for this
// one.
type NodeError struct {
	User string
	// Reason is a sentence without its full stop, in lower case.
	Reason string
}

func (e *NodeError) Error() string { return fmt.Sprintf("%q: %s", e.User, e.Reason) }

// BearerToken returns the token of a request's Authorization header (RFC
// 6750, section 2.1), or an *UnauthenticatedError without a remedy. Tokens in
// the query or a form are not accepted: they end up in logs.
func BearerToken(r *http.Request) (string, error) {
	values := r.Header.Values("Authorization")
	if len(values) == 0 {
		return "", &UnauthenticatedError{Reason: "The request has no token"}
	}
	if len(values) > 1 {
		return "", &UnauthenticatedError{Presented: true, Reason: "The request has more than one Authorization header"}
	}
	scheme, token, _ := strings.Cut(values[0], " ")
	token = strings.Trim(token, " ")
	switch {
	case !strings.EqualFold(scheme, "Bearer"):
		return "", &UnauthenticatedError{Reason: "The Authorization header is not of the form Bearer <token>"}
	case token == "":
		return "", &UnauthenticatedError{Reason: "The token is empty"}
	case len(token) > MaxTokenBytes:
		return "", &UnauthenticatedError{Presented: true, Reason: fmt.Sprintf("The token is longer than %d bytes", MaxTokenBytes)}
	case strings.ContainsFunc(token, notTokenCharacter):
		return "", &UnauthenticatedError{Presented: true, Reason: "The token has characters that no token has"}
	}
	return token, nil
}

// notTokenCharacter is the complement of RFC 6750's b64token.
func notTokenCharacter(c rune) bool {
	return (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && !strings.ContainsRune("-._~+/=", c)
}
