package images

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"strings"
	"time"
)

// Credentials are the node's own for registries, such as those that its IAM
// role gives for ECR.
type Credentials interface {
	// Credentials returns those for a registry's host, and when they expire
	// (zero: never). An empty user means that there are none, and that the
	// pull should be tried without.
	Credentials(ctx context.Context, host string) (user, password string, expires time.Time, err error)
	// Invalidate says that the registry refused them, so that the next call
	// brings fresh ones whatever their age.
	Invalidate(host string)
}

// Secrets reads the pull secrets that this process may read.
type Secrets interface {
	// DockerConfig returns the value of .dockerconfigjson.
	DockerConfig(ctx context.Context, namespace, name string) ([]byte, error)
}

const (
	// maxDockerConfigBytes bounds a pull secret; the API allows 1 MiB.
	maxDockerConfigBytes = 1 << 20
	// credentialsTimeout bounds asking for credentials.
	credentialsTimeout = 30 * time.Second
	// expiryMargin: credentials that expire within it are not used, so that
	// they outlive the pull's first request; containerd keeps the registry's
	// answer to them for the rest.
	expiryMargin = time.Minute
)

// dockerHubHosts are the names under which docker's own tools keep
// credentials for docker.io.
var dockerHubHosts = map[string]bool{"docker.io": true, "index.docker.io": true, "registry-1.docker.io": true}

// parseDockerConfig finds the credentials for a reference in a docker
// configuration: {"auths":{"<host>[/path]":{"username","password"|"auth"}}}.
// The longest matching path counts. It returns nil if there are none.
func parseDockerConfig(raw []byte, ref Reference) (*Auth, error) {
	if len(raw) > maxDockerConfigBytes {
		return nil, errors.New("the docker configuration has more than 1 MiB")
	}
	var c struct {
		Auths map[string]struct {
			Username string `json:"username"`
			Password string `json:"password"`
			Auth     string `json:"auth"`
		} `json:"auths"`
	}
	if err := json.Unmarshal(raw, &c); err != nil {
		// The error may quote the input, and that holds a password.
		return nil, errors.New("the docker configuration is not valid JSON")
	}
	var best *Auth
	length := -1
	for key, e := range c.Auths {
		host, path, _ := strings.Cut(strings.TrimPrefix(strings.TrimPrefix(key, "https://"), "http://"), "/")
		path = strings.TrimSuffix(path, "/")
		if path == "v1" || path == "v2" {
			path = "" // https://index.docker.io/v1/ is how docker login writes it
		}
		if host != ref.Host && (!dockerHubHosts[host] || !dockerHubHosts[ref.Host]) {
			continue
		}
		repository := strings.TrimPrefix(ref.Repository, ref.Host+"/")
		if path != "" && repository != path && !strings.HasPrefix(repository, path+"/") {
			continue
		}
		user, password := e.Username, e.Password
		if user == "" && e.Auth != "" {
			b, err := base64.StdEncoding.DecodeString(strings.TrimSpace(e.Auth))
			if err != nil {
				continue
			}
			user, password, _ = strings.Cut(strings.TrimRight(string(b), "\x00"), ":")
		}
		if user == "" || len(path) <= length {
			continue
		}
		length = len(path)
		best = &Auth{Host: ref.Host, Username: user, Password: password}
	}
	if best != nil && best.Host == "docker.io" {
		best.Host = "registry-1.docker.io" // whom containerd really asks
	}
	return best, nil
}

// auths are the credentials to try for an image, in turn: those of its pull
// secrets, the node's own, and none at all if there are no others. own is the
// index of the node's own, -1 if they are not among them.
func (l *Loop) auths(ctx context.Context, w Wanted) (list []*Auth, own int, err error) {
	ctx, cancel := context.WithTimeout(ctx, credentialsTimeout)
	defer cancel()
	own = -1
	if l.o.Secrets != nil {
		for _, s := range w.PullSecrets {
			raw, err := l.o.Secrets.DockerConfig(ctx, s.Namespace, s.Name)
			if err == nil {
				var a *Auth
				if a, err = parseDockerConfig(raw, w.Reference); err == nil && a != nil {
					list = append(list, a)
				}
			}
			if err != nil {
				l.log.Debug("pull secret not used", "namespace", s.Namespace, "name", s.Name, "err", err)
			}
		}
	}
	a, err := l.ownAuth(ctx, w.Reference.Host)
	if err != nil && len(list) == 0 {
		return nil, -1, err
	}
	if a != nil {
		own = len(list)
		list = append(list, a)
	}
	if len(list) == 0 {
		list = append(list, nil)
	}
	return list, own, nil
}

// ownAuth asks for the node's own credentials; nil if there are none.
func (l *Loop) ownAuth(ctx context.Context, host string) (*Auth, error) {
	if l.o.Credentials == nil {
		return nil, nil
	}
	for range 2 {
		user, password, expires, err := l.o.Credentials.Credentials(ctx, host)
		if err != nil {
			return nil, fail(CodeCredentials, err, "no credentials for %s", host)
		}
		if user == "" {
			return nil, nil
		}
		if expires.IsZero() || expires.Sub(l.now()) > expiryMargin {
			return &Auth{Host: host, Username: user, Password: password}, nil
		}
		l.o.Credentials.Invalidate(host)
	}
	return nil, fail(CodeCredentials, nil, "credentials for %s expire within %s; check this node's clock", host, expiryMargin)
}
