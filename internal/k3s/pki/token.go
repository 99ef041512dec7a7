package pki

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"strings"
)

// User is whom a token authenticates, in k3s's words.
type User string

// The users that k3s knows. A server's token opens everything, the keys of the
// authorities included; a node's only what an agent needs.
const (
	UserServer User = "server"
	UserNode   User = "node"
)

const (
	tokenPrefix = "K10"
	hashLength  = 2 * sha256.Size
	// secretBytes is how much randomness is in a token, as much as k3s takes.
	secretBytes = 16
	// maxSecretBytes bounds the secret of tokens that others made.
	maxSecretBytes = 1 << 10
	maxTokenBytes  = len(tokenPrefix) + hashLength + len("::server:") + maxSecretBytes
)

var (
	// ErrToken says that a text is no token in k3s's secure format.
	ErrToken = errors.New("not a k3s token in the secure format K10<hash>::<user>:<secret>")
	// ErrCAMismatch says that a CA bundle is not the one a token names.
	ErrCAMismatch = errors.New("the CA certificate is not the one the token names")
)

// Token lets a node join, and names the authority of the cluster that it may
// be shown to: "K10<hash>::<user>:<secret>", k3s's secure format. However it
// is printed, logged or marshalled, the secret stays inside; Reveal alone
// gives it. The zero Token is no token.
type Token struct {
	caHash string
	user   User
	secret string
}

// NewToken makes a token with a new secret for servers signed by serverCA, the
// bytes of server-ca.crt.
func NewToken(user User, serverCA []byte) (Token, error) {
	if user != UserServer && user != UserNode {
		return Token{}, fmt.Errorf("%w: no such user as %q", ErrToken, user)
	}
	hash, err := CAHash(serverCA)
	if err != nil {
		return Token{}, err
	}
	secret := make([]byte, secretBytes)
	if _, err := rand.Read(secret); err != nil {
		return Token{}, fmt.Errorf("make a token: %w", err)
	}
	return Token{caHash: hash, user: user, secret: hex.EncodeToString(secret)}, nil
}

// ParseToken reads a token in the secure format. White space around it, as
// files have, is ignored. k3s's short format is refused, since it names no
// authority and would have a node trust whatever answers. Errors wrap ErrToken
// and contain nothing of s.
func ParseToken(s string) (Token, error) {
	if len(s) > maxTokenBytes+2 {
		return Token{}, fmt.Errorf("%w: %d bytes, more than %d", ErrToken, len(s), maxTokenBytes)
	}
	rest, ok := strings.CutPrefix(strings.TrimSpace(s), tokenPrefix)
	if !ok {
		return Token{}, fmt.Errorf("%w: no %s at its start", ErrToken, tokenPrefix)
	}
	hash, rest, ok := strings.Cut(rest, "::")
	if !ok || len(hash) != hashLength || strings.Trim(hash, "0123456789abcdef") != "" {
		return Token{}, fmt.Errorf("%w: no hash of %d lower-case hex digits", ErrToken, hashLength)
	}
	user, secret, _ := strings.Cut(rest, ":")
	if User(user) != UserServer && User(user) != UserNode {
		return Token{}, fmt.Errorf("%w: its user is neither %s nor %s", ErrToken, UserServer, UserNode)
	}
	if secret == "" || len(secret) > maxSecretBytes {
		return Token{}, fmt.Errorf("%w: a secret of %d bytes", ErrToken, len(secret))
	}
	// k3s keeps secrets in a CSV file and tokens in files of one line.
	for _, r := range secret {
		if r <= ' ' || r > '~' || r == '"' || r == ',' {
			return Token{}, fmt.Errorf("%w: its secret has characters other than printable ASCII without quotes and commas", ErrToken)
		}
	}
	return Token{caHash: hash, user: User(user), secret: secret}, nil
}

// Reveal returns the token as k3s reads it, from token-file or agent-token-file.
// Whoever has it can join; it belongs in files of mode 0600 and nowhere else.
func (t Token) Reveal() string {
	return tokenPrefix + t.caHash + "::" + string(t.user) + ":" + t.secret
}

// Secret returns the password that goes with User in HTTP basic authentication
// against k3s's supervisor. It is as secret as Reveal.
func (t Token) Secret() string { return t.secret }

// User returns whom the token authenticates.
func (t Token) User() User { return t.user }

// CAHash returns the hash of the authority the token names, see CAHash.
func (t Token) CAHash() string { return t.caHash }

// IsZero says whether this is no token.
func (t Token) IsZero() bool { return t == Token{} }

// Equal compares in a time that does not depend on the secrets.
func (t Token) Equal(other Token) bool {
	return subtle.ConstantTimeCompare([]byte(t.Reveal()), []byte(other.Reveal())) == 1
}

// VerifyCA checks that a CA bundle is the one the token names. Errors wrap
// ErrCAMismatch or ErrMalformed.
func (t Token) VerifyCA(bundle []byte) error {
	hash, err := CAHash(bundle)
	if err != nil {
		return err
	}
	if subtle.ConstantTimeCompare([]byte(hash), []byte(t.caHash)) != 1 {
		return fmt.Errorf("%w: it hashes to %s, the token has %s", ErrCAMismatch, hash, t.caHash)
	}
	return nil
}

// String shows the kind of token and which authority it names.
func (t Token) String() string {
	if t.IsZero() {
		return "no token"
	}
	return tokenPrefix + t.caHash[:min(12, len(t.caHash))] + "…::" + string(t.user) + ":REDACTED"
}

// Format prints String whatever the verb, since %#v would print the secret.
func (t Token) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(t.String())) }

// LogValue logs String.
func (t Token) LogValue() slog.Value { return slog.StringValue(t.String()) }

// MarshalText always fails, so that no token gets into a document because it
// was part of something that did.
func (t Token) MarshalText() ([]byte, error) {
	return nil, errors.New("a token is not marshalled by accident; use Reveal")
}
