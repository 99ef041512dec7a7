package ecr

import (
	"context"

	"github.com/google/go-containerregistry/pkg/authn"
)

// Keychain gives a source's credentials to go-containerregistry.
type Keychain struct{ source *Source }

var _ authn.ContextKeychain = Keychain{}

// Keychain returns the source as one of go-containerregistry's. Hosts that are
// not ECR's are anonymous, so it can stand first in a chain of keychains.
func (s *Source) Keychain() Keychain { return Keychain{s} }

// Resolve implements authn.Keychain.
func (k Keychain) Resolve(target authn.Resource) (authn.Authenticator, error) {
	return k.ResolveContext(context.Background(), target)
}

// ResolveContext implements authn.ContextKeychain. It exchanges nothing: the
// authenticator it returns asks for the credentials of each request, so that a
// pull outlives the token it began with.
func (k Keychain) ResolveContext(_ context.Context, target authn.Resource) (authn.Authenticator, error) {
	host := target.RegistryStr()
	if _, ok := ParseHost(host); !ok {
		return authn.Anonymous, nil
	}
	return authenticator{k.source, host}, nil
}

// Rejected is Invalidate for clients that know the credentials as
// go-containerregistry does, such as registry.ClientOptions.Rejected.
func (s *Source) Rejected(host string, used authn.AuthConfig) (retry bool) {
	return s.Invalidate(host, Credentials{Username: used.Username, Password: used.Password})
}

type authenticator struct {
	source *Source
	host   string
}

var _ authn.ContextAuthenticator = authenticator{}

// Authorization implements authn.Authenticator.
func (a authenticator) Authorization() (*authn.AuthConfig, error) {
	return a.AuthorizationContext(context.Background()) // Source has deadlines
}

// AuthorizationContext implements authn.ContextAuthenticator. The public
// registry is used anonymously when there are no credentials for it.
func (a authenticator) AuthorizationContext(ctx context.Context) (*authn.AuthConfig, error) {
	c, err := a.source.Credentials(ctx, a.host)
	if err != nil {
		if r, _ := ParseHost(a.host); r.Public && ctx.Err() == nil {
			a.source.log.Debug("the public gallery is used without credentials", "error", err)
			return &authn.AuthConfig{}, nil
		}
		return nil, err
	}
	return &authn.AuthConfig{Username: c.Username, Password: c.Password}, nil
}
