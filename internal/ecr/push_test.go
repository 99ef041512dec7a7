package ecr_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awsecr "github.com/aws/aws-sdk-go-v2/service/ecr"

	"github.com/hearth-sh/hearth/internal/ecr"
	"github.com/hearth-sh/hearth/internal/publish"
	"github.com/hearth-sh/hearth/internal/registry"
	"github.com/hearth-sh/hearth/internal/registry/registrytest"
	"github.com/hearth-sh/hearth/internal/submit"
)

// door makes a real registry answer as ECR does: it lets in tokens that were
// issued and not revoked, and knows the repositories that moto has.
type door struct {
	mu      sync.Mutex
	good    string // the password that is let in
	denied  string // what every push is answered with, when set
	uploads int
	before  func(*http.Request) // called for each request
	has     func(ctx context.Context, repository string) bool
	next    http.Handler
}

func (d *door) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	d.mu.Lock()
	before := d.before
	d.mu.Unlock()
	if before != nil {
		before(r)
	}
	d.mu.Lock()
	good, denied := d.good, d.denied
	if r.Method == http.MethodPost {
		d.uploads++
	}
	d.mu.Unlock()
	answer := func(status int, code, message string) {
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("WWW-Authenticate", `Basic realm="https://`+host+`/",service="ecr.amazonaws.com"`)
		w.WriteHeader(status)
		_, _ = io.WriteString(w, `{"errors":[{"code":"`+code+`","message":"`+message+`"}]}`)
	}
	user, password, given := r.BasicAuth()
	path := strings.TrimPrefix(r.URL.Path, "/v2/")
	repository, _, _ := strings.Cut(path, "/blobs/")
	repository, _, _ = strings.Cut(repository, "/manifests/")
	switch {
	case !given:
		answer(401, "UNAUTHORIZED", "Not Authorized")
	case user != "AWS" || password != good:
		answer(403, "DENIED", "Your authorization token has expired. Reauthenticate and try again.")
	case denied != "" && r.Method != http.MethodGet && r.Method != http.MethodHead:
		answer(403, "DENIED", denied)
	case path != "" && !d.has(r.Context(), repository):
		answer(404, "NAME_UNKNOWN", "The repository with name '"+repository+"' does not exist in the registry with id '123456789012'")
	default:
		r.SetBasicAuth("alice", "sesame")
		d.next.ServeHTTP(w, r)
	}
}

func (d *door) set(f func()) { d.mu.Lock(); defer d.mu.Unlock(); f() }

func TestFunctionsArePublishedToECR(t *testing.T) {
	a := newAccount(t)
	// moto makes the repositories; tokens are this test's, which can tell them
	// apart and revoke them.
	moto := a.service.next
	a.service.next = nil
	a.faulty(func(_ int, w http.ResponseWriter, r *http.Request) bool {
		if strings.HasSuffix(r.Header.Get("X-Amz-Target"), ".GetAuthorizationToken") {
			return false
		}
		moto.ServeHTTP(w, r)
		return true
	})
	transport := &http.Transport{}
	t.Cleanup(transport.CloseIdleConnections)
	upstream := &url.URL{Scheme: "http", Host: registrytest.Start(t, "alice", "sesame")}
	d := &door{
		good: "token-1",
		has: func(ctx context.Context, repository string) bool {
			_, err := a.own.DescribeRepositories(ctx, &awsecr.DescribeRepositoriesInput{RepositoryNames: []string{repository}})
			return err == nil
		},
		next: &httputil.ReverseProxy{Transport: transport, ErrorLog: log.New(io.Discard, "", 0), Rewrite: func(p *httputil.ProxyRequest) { p.SetURL(upstream); p.Out.Host = host }},
	}
	web := httptest.NewServer(d)
	t.Cleanup(web.Close)
	client, err := registry.NewClient(registry.ClientOptions{
		Registry: host, RegistryKeychain: a.Keychain(), Rejected: a.Rejected,
		Dial: func(ctx context.Context) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", web.Listener.Addr().String())
		},
		Backoff: func(int) time.Duration { return time.Millisecond },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	publisher, err := publish.NewPublisher(publish.Options{
		Client: client, Tenants: true, DigestTags: true, Repositories: a.repositories(t, ecr.RepositoryOptions{}),
		Alias: func(other string) bool { return ecr.SameRegistry(host, other) },
	})
	if err != nil {
		t.Fatal(err)
	}
	push := func(name, content string) (string, error) {
		file := filepath.Join(t.TempDir(), "module.wasm")
		data := []byte("\x00asm\x01\x00\x00\x00" + content)
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
		artifact, err := publisher.PublishFor(t.Context(), "team", name, file, fmt.Sprintf("sha256:%x", sha256.Sum256(data)), submit.ArtifactMeta{})
		return artifact.Repository + "@" + artifact.Digest, err
	}
	there := func(t *testing.T, reference, content string) {
		t.Helper()
		dst := filepath.Join(t.TempDir(), "pulled")
		if _, err := publisher.FetchFor(t.Context(), "team", reference, dst, 1<<20); err != nil {
			t.Error(err)
		} else if got, err := os.ReadFile(dst); err != nil || string(got[8:]) != content {
			t.Errorf("pulled %q, %v", got, err)
		}
	}
	ok := func(t *testing.T, name, content, actions string) {
		t.Helper()
		reference, err := push(name, content)
		if err != nil {
			t.Fatal(err)
		}
		if got := a.actions(); got != actions {
			t.Errorf("ECR was asked %q, want %q", got, actions)
		}
		there(t, reference, content)
		a.actions()
	}

	t.Run("the first push makes the repository", func(t *testing.T) {
		ok(t, "hello", "one", "DescribeRepositories CreateRepository PutLifecyclePolicy GetAuthorizationToken")
		ok(t, "hello", "two", "")
	})
	t.Run("the same bytes are not sent again", func(t *testing.T) {
		before := d.uploads
		ok(t, "hello", "one", "")
		if d.uploads != before {
			t.Errorf("%d blobs were uploaded", d.uploads-before)
		}
	})
	t.Run("a name with hyphens in a row", func(t *testing.T) {
		ok(t, "a--b", "hyphens", "DescribeRepositories CreateRepository PutLifecyclePolicy")
	})
	t.Run("a repository that vanishes before the push", func(t *testing.T) {
		if _, err := a.own.DeleteRepository(t.Context(), &awsecr.DeleteRepositoryInput{RepositoryName: aws.String("functions/team/hello"), Force: true}); err != nil {
			t.Fatal(err)
		}
		ok(t, "hello", "three", "DescribeRepositories CreateRepository PutLifecyclePolicy")
	})
	t.Run("a token that dies in the middle of a push", func(t *testing.T) {
		var once sync.Once
		d.set(func() {
			d.before = func(r *http.Request) {
				if r.Method == http.MethodPatch {
					once.Do(func() { d.set(func() { d.good = "token-2" }) })
				}
			}
		})
		ok(t, "hello", "four", "GetAuthorizationToken")
		d.set(func() { d.before = nil })
	})
	t.Run("a role that may not push", func(t *testing.T) {
		d.set(func() {
			d.denied = "User: arn:aws:sts::123456789012:assumed-role/hearth-node/i-0 is not authorized to perform: ecr:InitiateLayerUpload on resource: x"
			d.good = "token-3"
		})
		a.clock(2 * time.Minute)
		_, err := push("hello", "five")
		var problem *submit.PublishError
		if !errors.As(err, &problem) || problem.Code != "registry-refused" || problem.Retryable || !strings.Contains(problem.Detail, "ecr:InitiateLayerUpload") {
			t.Errorf("%v", err)
		}
		if got := a.actions(); got != "GetAuthorizationToken" {
			t.Errorf("ECR was asked %q, want one more token and no more", got)
		}
		d.set(func() { d.denied = "" })
		ok(t, "hello", "five", "")
	})
	t.Run("another tenant's by another name of the registry", func(t *testing.T) {
		_, err := publisher.FetchFor(t.Context(), "bob", "123456789012.dkr-ecr.eu-central-1.on.aws/functions/team/hello:1", filepath.Join(t.TempDir(), "m"), 1<<20)
		var problem *submit.PublishError
		if !errors.As(err, &problem) || problem.Code != "registry-unauthorized" {
			t.Errorf("%v", err)
		}
	})
}
