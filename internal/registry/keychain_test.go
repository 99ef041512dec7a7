package registry

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
)

func resolve(t *testing.T, k authn.Keychain, image string) (authn.AuthConfig, error) {
	t.Helper()
	repo, err := name.NewRepository(image)
	if err != nil {
		t.Fatal(err)
	}
	a, err := authn.Resolve(t.Context(), k, repo)
	if err != nil {
		return authn.AuthConfig{}, err
	}
	c, err := authn.Authorization(t.Context(), a)
	if err != nil {
		t.Fatal(err)
	}
	return *c, nil
}

func writeFile(t *testing.T, content string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "credentials")
	if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestTheConfigFilesEntryOfTheLongestPathCounts(t *testing.T) {
	file := writeFile(t, `{"auths": {
		"registry.example.org":        {"auth": "YWxpY2U6c2VzYW1l"},
		"https://registry.example.org/team/": {"username": "team", "password": "t"},
		"registry.example.org/team/deep": {"username": "deep", "password": "d"},
		"https://old.example.org/v1/": {"username": "old", "password": "o:o"},
		"https://index.docker.io/v1/": {"identitytoken": "hub"},
		"token.example.org:5000":      {"registrytoken": "bearer"},
		"empty.example.org":           {}
	}, "HttpHeaders": {}}`)
	for image, want := range map[string]authn.AuthConfig{
		"registry.example.org/hello":       {Username: "alice", Password: "sesame"},
		"registry.example.org/teams/x":     {Username: "alice", Password: "sesame"},
		"registry.example.org/team/x":      {Username: "team", Password: "t"},
		"registry.example.org/team/deep":   {Username: "deep", Password: "d"},
		"registry.example.org/team/deep/x": {Username: "deep", Password: "d"},
		"old.example.org/x":                {Username: "old", Password: "o:o"},
		"library/alpine":                   {IdentityToken: "hub"},
		"token.example.org:5000/x":         {RegistryToken: "bearer"},
		"token.example.org/x":              {},
		"empty.example.org/x":              {},
		"evil-registry.example.org/x":      {},
	} {
		got, err := resolve(t, ConfigKeychain(file), image)
		if err != nil || got != want {
			t.Errorf("%s: %+v, %v", image, got, err)
		}
	}
}

func TestFilesOfCredentialsThatSayNothingUsableAreErrors(t *testing.T) {
	const image = "registry.example.org/hello"
	for what, tc := range map[string]struct{ content, says string }{
		"not JSON":               {`hunter2`, "docker login"},
		"a helper for all":       {`{"credsStore": "pass"}`, `helper "pass"`},
		"a helper for this":      {`{"credHelpers": {"registry.example.org": "ecr-login"}}`, "ecr-login"},
		"auth not base64":        {`{"auths": {"registry.example.org": {"auth": "hunter2!"}}}`, "base64"},
		"auth without password":  {`{"auths": {"registry.example.org": {"auth": "YWxpY2U="}}}`, "base64"},
		"user without password":  {`{"auths": {"registry.example.org": {"username": "hunter2"}}}`, "neither"},
		"larger than any Secret": {strings.Repeat(" ", maxConfigBytes+1), "more than"},
	} {
		_, err := resolve(t, ConfigKeychain(writeFile(t, tc.content)), image)
		if err == nil || !strings.Contains(err.Error(), tc.says) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := resolve(t, ConfigKeychain(filepath.Join(t.TempDir(), "none")), image); err == nil {
		t.Error("a missing file is not noticed")
	}
	for _, content := range []string{"", "alice", "alice:", ":sesame", "alice:sesame\nbob:open\n"} {
		if _, err := resolve(t, PasswordKeychain("registry.example.org", writeFile(t, content)), image); err == nil {
			t.Errorf("%q was taken for a user and a password", content)
		}
	}
}

func TestAPasswordFileIsForOneRegistryAndReadAnew(t *testing.T) {
	file := writeFile(t, "alice:ses:ame\n")
	k := PasswordKeychain("registry.example.org:5000", file)
	if got, err := resolve(t, k, "registry.example.org:5000/x"); err != nil || got != (authn.AuthConfig{Username: "alice", Password: "ses:ame"}) {
		t.Errorf("%+v, %v", got, err)
	}
	if got, err := resolve(t, k, "registry.example.org/x"); err != nil || got != (authn.AuthConfig{}) {
		t.Errorf("the password went to another registry: %+v, %v", got, err)
	}
	if err := os.WriteFile(file, []byte("alice:new"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := resolve(t, k, "registry.example.org:5000/x"); err != nil || got.Password != "new" {
		t.Errorf("after its rotation: %+v, %v", got, err)
	}
}

func TestTheDockerConfigurationIsFound(t *testing.T) {
	t.Setenv("DOCKER_CONFIG", "/etc/hearth/registry")
	if f, err := DockerConfigFile(); err != nil || f != "/etc/hearth/registry/config.json" {
		t.Errorf("%q, %v", f, err)
	}
	t.Setenv("DOCKER_CONFIG", "")
	t.Setenv("HOME", "/home/alice")
	if f, err := DockerConfigFile(); err != nil || f != "/home/alice/.docker/config.json" {
		t.Errorf("%q, %v", f, err)
	}
}

func FuzzParseDockerConfig(f *testing.F) {
	f.Add([]byte(`{"auths": {"registry.example.org/team": {"auth": "YWxpY2U6c2VzYW1l"}}}`), "registry.example.org/team/x")
	f.Add([]byte(`{"auths": {"https://registry.example.org/v1/": {"username": "a", "password": "b"}}, "credsStore": "x"}`), "registry.example.org/x")
	f.Fuzz(func(t *testing.T, data []byte, repository string) {
		registry, _, _ := strings.Cut(repository, "/")
		c, err := parseDockerConfig(data, repository, registry)
		if err != nil && c != (authn.AuthConfig{}) {
			t.Errorf("%+v with %v", c, err)
		}
		if (c.Username == "") != (c.Password == "") && c.IdentityToken == "" && c.RegistryToken == "" {
			t.Errorf("half a login: %+v", c)
		}
	})
}
