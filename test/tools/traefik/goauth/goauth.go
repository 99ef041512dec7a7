// Package auth has what Traefik's authentication middlewares need to compile.
// The fork they use cannot be had; tests use none of them, and who does is
// refused.
package auth

import "net/http"

// SecretProvider gives a user's secret.
type SecretProvider func(user, realm string) string

// CheckSecret refuses.
func CheckSecret(_, _ string) bool { return false }

// BasicAuth refuses.
type BasicAuth struct {
	Realm   string
	Secrets SecretProvider
}

// RequireAuth answers that nobody is let in.
func (*BasicAuth) RequireAuth(w http.ResponseWriter, _ *http.Request) { refuse(w) }

// DigestAuth refuses.
type DigestAuth struct{}

// NewDigestAuthenticator makes one that refuses.
func NewDigestAuthenticator(string, SecretProvider) *DigestAuth { return &DigestAuth{} }

// DigestAuthParams reads none.
func DigestAuthParams(string) map[string]string { return nil }

// CheckAuth knows nobody.
func (*DigestAuth) CheckAuth(*http.Request) (string, *string) { return "", nil }

// RequireAuth answers that nobody is let in.
func (*DigestAuth) RequireAuth(w http.ResponseWriter, _ *http.Request) { refuse(w) }

// RequireAuthStale answers that nobody is let in.
func (*DigestAuth) RequireAuthStale(w http.ResponseWriter, _ *http.Request) { refuse(w) }

func refuse(w http.ResponseWriter) {
	http.Error(w, "built without authentication", http.StatusUnauthorized)
}
