package node_test

import (
	"crypto/rand"
	"fmt"
	"hash/fnv"
	"net/http"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/test/cluster"
	"github.com/hearth-sh/hearth/test/ecr"
)

// earlyRepository finds a repository whose image this node pulls among the
// first of a fleet. Nodes start to pull an image at a place between 0 and 30 s
// that a hash of both names gives (images.Options.Spread); a test need not wait.
func earlyRepository(node, host, prefix string) string {
	for i := 0; ; i++ {
		repository := fmt.Sprintf("%s-%d", prefix, i)
		h := fnv.New64a()
		_, _ = h.Write([]byte(node + "\x00" + host + "/" + repository + ":1"))
		if h.Sum64()%100_003 < 2_000 { // 0.6 s
			return repository
		}
	}
}

// pushAs is push to a registry that wants a user's password.
func pushAs(t *testing.T, host, user, password, repository string, image v1.Image) {
	t.Helper()
	reference, err := name.ParseReference(host+"/"+repository+":1", name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{DisableKeepAlives: true}
	if err := remote.Write(reference, image, remote.WithContext(t.Context()), remote.WithTransport(transport),
		remote.WithAuth(&authn.Basic{Username: user, Password: password})); err != nil {
		t.Fatal(err)
	}
}

// allWarm waits until all images that wasmNode wants are warm, so many.
func allWarm(t *testing.T, n int) {
	t.Helper()
	waitStatus(t, wasmNode, fmt.Sprintf("%d images to be warm", n), func(s v1alpha1.NodeStatus) bool {
		return s.Images != nil && s.Images.Total == n && s.Images.Warm == n
	})
}

// emulatedECR is ECR, and the registry behind it.
type emulatedECR struct {
	*ecr.Service
	registry *cluster.Registry
	endpoint string // of ECR's API, as nodes reach it
}

func startECR(t *testing.T) *emulatedECR {
	t.Helper()
	registry, err := bench.Registry(t.Context(), cluster.RegistryOptions{})
	if err != nil {
		t.Fatal(err)
	}
	service := ecr.Start(t, ecr.Options{IP: bench.HostIP(), Registry: registry.Host})
	service.On(t, bench.Node(wasmNode))
	return &emulatedECR{service, registry, service.Endpoint}
}

// imagesComeByTheNodesRoleAlone wants an agent of wasmNode that has asked e for
// nothing yet and whose instance has the role's access key.
func (e *emulatedECR) imagesComeByTheNodesRoleAlone(t *testing.T, role string) {
	bring := func(t *testing.T, app string, n int) {
		t.Helper()
		module := marked(t, "out of ECR "+rand.Text())
		repository := earlyRepository(wasmNode, ecr.Host, app)
		push(t, e.registry, repository, wasmImage(t, module))
		deploy(t, app, ecr.Host+"/"+repository+":1", 0)
		allWarm(t, n)
		if !compiled(wasmNode, module) {
			t.Error("the store has no object of the module")
		}
	}
	bring(t, "ecr-first", 1)
	issued := e.Tokens()
	if len(issued) != 1 {
		t.Fatalf("%d tokens were issued, want one", len(issued))
	}
	if issued[0].Key != role {
		t.Errorf("the token was asked for with the access key %q, the role's is %q", issued[0].Key, role)
	}
	if n := e.Refusals(); n != 0 {
		t.Errorf("the registry refused %d requests", n)
	}

	e.Revoke(issued[0].Password)
	bring(t, "ecr-second", 2)
	if issued := e.Tokens(); len(issued) != 2 {
		t.Errorf("%d tokens were issued, want exactly one in place of the revoked", len(issued))
	}
	if n := e.Refusals(); n == 0 {
		t.Error("the revoked token was never refused: nothing was shown")
	}
}
