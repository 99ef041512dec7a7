package registry

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
)

const (
	// maxConfigBytes bounds a file of credentials: a Kubernetes Secret has at
	// most 1 MiB.
	maxConfigBytes = 1 << 20
	// dockerHubKey is how Docker's configuration calls Docker Hub.
	dockerHubKey = "https://index.docker.io/v1/"
)

// DockerConfigFile is the file that `docker login` writes for this user:
// config.json in $DOCKER_CONFIG, else in ~/.docker.
func DockerConfigFile() (string, error) {
	if dir := os.Getenv("DOCKER_CONFIG"); dir != "" {
		return filepath.Join(dir, "config.json"), nil
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", fmt.Errorf("find the Docker configuration: %w; set DOCKER_CONFIG to its directory", err)
	}
	return filepath.Join(home, ".docker", "config.json"), nil
}

// ConfigKeychain takes credentials from a file in the format of Docker's
// config.json, which is also that of Kubernetes Secrets of type
// kubernetes.io/dockerconfigjson. Of the entries for a host, with or without a
// path, the one with the longest path that leads to the repository counts. A
// registry without an entry is anonymous.
//
// The file is read for each use, so that a rotated Secret counts at once, and
// may have at most 1 MiB. Credential helpers, programs that it names, are not
// run: a registry for which it names nothing else is an error.
func ConfigKeychain(file string) authn.Keychain { return configKeychain{file} }

type configKeychain struct{ file string }

// dockerConfig is the part of a config.json that has to do with credentials.
type dockerConfig struct {
	Auths       map[string]dockerAuth `json:"auths"`
	CredsStore  string                `json:"credsStore"`
	CredHelpers map[string]string     `json:"credHelpers"`
}

type dockerAuth struct {
	Username      string `json:"username"`
	Password      string `json:"password"`
	Auth          string `json:"auth"` // base64 of user:password
	IdentityToken string `json:"identitytoken"`
	RegistryToken string `json:"registrytoken"`
}

func (k configKeychain) Resolve(target authn.Resource) (authn.Authenticator, error) {
	data, err := readBounded(k.file)
	if err != nil {
		return nil, fmt.Errorf("read the registries' credentials: %w", err)
	}
	config, err := parseDockerConfig(data, target.String(), target.RegistryStr())
	if err != nil {
		return nil, fmt.Errorf("credentials of %s in %s: %w", target.RegistryStr(), k.file, err)
	}
	if config == (authn.AuthConfig{}) {
		return authn.Anonymous, nil
	}
	return authn.FromConfig(config), nil
}

// parseDockerConfig finds the credentials of a repository ("host/path") on a
// registry ("host"). They are empty when there are none. Errors show nothing
// of the content.
func parseDockerConfig(data []byte, repository, registry string) (authn.AuthConfig, error) {
	var c dockerConfig
	if err := json.Unmarshal(data, &c); err != nil {
		return authn.AuthConfig{}, errors.New("the file is not a Docker config.json; write it with `docker login` or `kubectl create secret docker-registry`")
	}
	var (
		found dockerAuth
		best  = -1
	)
	for key, entry := range c.Auths {
		if n, ok := keyMatches(key, repository, registry); ok && n > best && entry != (dockerAuth{}) {
			found, best = entry, n
		}
	}
	if best < 0 {
		helper := c.CredHelpers[registry]
		if helper == "" {
			helper = c.CredsStore
		}
		if helper != "" {
			return authn.AuthConfig{}, fmt.Errorf("they are kept by the credential helper %.50q, which is not run here; put them into the file itself", helper)
		}
		return authn.AuthConfig{}, nil
	}
	out := authn.AuthConfig{Username: found.Username, Password: found.Password, IdentityToken: found.IdentityToken, RegistryToken: found.RegistryToken}
	if found.Auth != "" {
		user, password, err := decodeBasic(found.Auth)
		if err != nil {
			return authn.AuthConfig{}, err
		}
		out.Username, out.Password = user, password
	}
	if (out.Username == "" || out.Password == "") && out.IdentityToken == "" && out.RegistryToken == "" {
		return authn.AuthConfig{}, errors.New("the entry has neither a user with a password nor a token")
	}
	return out, nil
}

// keyMatches says whether an entry of that key is for the repository, and how
// much of its path the key has.
func keyMatches(key, repository, registry string) (length int, ok bool) {
	if key == dockerHubKey {
		return 0, registry == name.DefaultRegistry
	}
	key = strings.TrimPrefix(strings.TrimPrefix(key, "https://"), "http://")
	key = strings.TrimRight(key, "/")
	key = strings.TrimSuffix(strings.TrimSuffix(key, "/v1"), "/v2") // Docker's old way to write a registry
	if key == registry {
		return 0, true
	}
	if strings.HasPrefix(key, registry+"/") && (repository == key || strings.HasPrefix(repository, key+"/")) {
		return len(key) - len(registry), true
	}
	return 0, false
}

func decodeBasic(auth string) (user, password string, err error) {
	b, err := base64.StdEncoding.DecodeString(auth)
	if err != nil {
		b, err = base64.RawStdEncoding.DecodeString(auth)
	}
	user, password, ok := strings.Cut(strings.TrimRight(string(b), "\x00\r\n"), ":")
	if err != nil || !ok || user == "" || password == "" {
		return "", "", errors.New(`the entry's "auth" is not the base64 of user:password`)
	}
	return user, password, nil
}

// PasswordKeychain gives one user's name and password to one registry (its host,
// with the port if it has one). The file has one line, user:password. It is
// read for each use.
func PasswordKeychain(registry, file string) authn.Keychain {
	return passwordKeychain{registry, file}
}

type passwordKeychain struct{ registry, file string }

func (k passwordKeychain) Resolve(target authn.Resource) (authn.Authenticator, error) {
	if target.RegistryStr() != k.registry {
		return authn.Anonymous, nil
	}
	data, err := readBounded(k.file)
	if err != nil {
		return nil, fmt.Errorf("read the password of %s: %w", k.registry, err)
	}
	line := strings.TrimRight(string(data), "\r\n")
	user, password, ok := strings.Cut(line, ":")
	if !ok || user == "" || password == "" || strings.ContainsAny(line, "\r\n\x00") {
		return nil, fmt.Errorf("%s must have one line, user:password", k.file)
	}
	return &authn.Basic{Username: user, Password: password}, nil
}

func readBounded(file string) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxConfigBytes+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxConfigBytes {
		return nil, fmt.Errorf("%s has more than %d bytes", file, maxConfigBytes)
	}
	return data, nil
}
