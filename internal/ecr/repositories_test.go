package ecr_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	awsecr "github.com/aws/aws-sdk-go-v2/service/ecr"
	"github.com/aws/aws-sdk-go-v2/service/ecr/types"

	"github.com/hearth-sh/hearth/internal/ecr"
	"github.com/hearth-sh/hearth/internal/ecr/mototest"
	"github.com/hearth-sh/hearth/internal/imds/imdstest"
)

// account is ECR as moto has it: a rig whose service stands in front of moto,
// and a client of the test's own.
type account struct {
	*rig
	own *awsecr.Client
}

func newAccount(t *testing.T) account {
	t.Helper()
	backend, err := url.Parse(mototest.Start(t))
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{}
	t.Cleanup(transport.CloseIdleConnections)
	r := newRig(t, func(_ *ecr.Options, s *service) {
		s.next = &httputil.ReverseProxy{Rewrite: func(p *httputil.ProxyRequest) { p.SetURL(backend); p.Out.Host = p.In.Host }, Transport: transport, ErrorLog: log.New(io.Discard, "", 0)}
	})
	return account{r, awsecr.New(awsecr.Options{
		Region: "eu-central-1", BaseEndpoint: aws.String(backend.String()), HTTPClient: &http.Client{Transport: transport},
		Credentials: credentials.NewStaticCredentialsProvider("AKIAEXAMPLE", "example", ""),
	})}
}

func (a account) repositories(t *testing.T, o ecr.RepositoryOptions) *ecr.Repositories {
	t.Helper()
	p, err := a.Repositories(o)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// actions are what ECR was asked for since the last time, in order.
func (a account) actions() string {
	a.service.mu.Lock()
	defer a.service.mu.Unlock()
	var out []string
	for _, h := range a.service.headers {
		_, action, _ := strings.Cut(h.Get("X-Amz-Target"), ".")
		out = append(out, action)
	}
	a.service.headers = nil
	return strings.Join(out, " ")
}

// faulty has something else answer some requests; nil ends that.
func (a account) faulty(f func(n int, w http.ResponseWriter, r *http.Request) bool) {
	a.service.mu.Lock()
	defer a.service.mu.Unlock()
	a.service.fault = f
}

func (a account) policy(t *testing.T, repository string) string {
	t.Helper()
	out, err := a.own.GetLifecyclePolicy(t.Context(), &awsecr.GetLifecyclePolicyInput{RepositoryName: &repository})
	var none *types.LifecyclePolicyNotFoundException
	if errors.As(err, &none) {
		return ""
	}
	if err != nil {
		t.Fatal(err)
	}
	return *out.LifecyclePolicyText
}

func TestARepositoryIsMadeOnTheFirstPushOnly(t *testing.T) {
	a := newAccount(t)
	const repository = "functions/team/hello"
	p := a.repositories(t, ecr.RepositoryOptions{ScanOnPush: true, UntaggedDays: 3})
	ensure := func(p *ecr.Repositories, want string) {
		t.Helper()
		if err := p.Ensure(t.Context(), host, repository); err != nil {
			t.Fatal(err)
		}
		if got := a.actions(); got != want {
			t.Errorf("ECR was asked %q, want %q", got, want)
		}
	}
	ensure(p, "DescribeRepositories CreateRepository PutLifecyclePolicy")
	ensure(p, "")
	out, err := a.own.DescribeRepositories(t.Context(), &awsecr.DescribeRepositoriesInput{RepositoryNames: []string{repository}})
	if err != nil {
		t.Fatal(err)
	}
	if r := out.Repositories[0]; r.ImageTagMutability != types.ImageTagMutabilityImmutable || !r.ImageScanningConfiguration.ScanOnPush {
		t.Errorf("made with %q tags, scan %+v", r.ImageTagMutability, r.ImageScanningConfiguration)
	}
	var policy struct {
		Rules []struct {
			Selection map[string]any
			Action    map[string]any
		}
	}
	if err := json.Unmarshal([]byte(a.policy(t, repository)), &policy); err != nil || len(policy.Rules) != 1 ||
		policy.Rules[0].Selection["tagStatus"] != "untagged" || policy.Rules[0].Selection["countNumber"] != 3.0 || policy.Rules[0].Action["type"] != "expire" {
		t.Errorf("policy %+v, %v", policy, err)
	}
	// Another process finds it; this one looks again when told to.
	ensure(a.repositories(t, ecr.RepositoryOptions{}), "DescribeRepositories GetLifecyclePolicy")
	if _, err := a.own.DeleteRepository(t.Context(), &awsecr.DeleteRepositoryInput{RepositoryName: aws.String(repository)}); err != nil {
		t.Fatal(err)
	}
	ensure(p, "")
	p.Forget(host, repository)
	ensure(p, "DescribeRepositories CreateRepository PutLifecyclePolicy")
	// Its other names are the same registry.
	if err := p.Ensure(t.Context(), host+":443", repository); err != nil || a.actions() != "" {
		t.Error("another name of the registry is taken for another registry")
	}
	if err := a.repositories(t, ecr.RepositoryOptions{UntaggedDays: -1}).Ensure(t.Context(), host, "functions/kept"); err != nil || a.policy(t, "functions/kept") != "" {
		t.Errorf("%v; policy %q", err, a.policy(t, "functions/kept"))
	}
	if _, err := a.Repositories(ecr.RepositoryOptions{UntaggedDays: 366}); err == nil {
		t.Error("366 days were taken")
	}
}

func TestALifecyclePolicyIsPutOnlyWhereOursIsMissing(t *testing.T) {
	a := newAccount(t)
	theirs := `{"rules":[{"rulePriority":1,"selection":{"tagStatus":"any","countType":"imageCountMoreThan","countNumber":9},"action":{"type":"expire"}}]}`
	for repository, tc := range map[string]struct {
		tags types.ImageTagMutability
		put  string
		want func(string) bool
	}{
		"functions/unfinished": {types.ImageTagMutabilityImmutable, "", func(s string) bool { return strings.Contains(s, `"untagged"`) }},
		"functions/theirs":     {types.ImageTagMutabilityImmutable, theirs, func(s string) bool { return strings.Contains(s, "imageCountMoreThan") }},
		"functions/by-hand":    {types.ImageTagMutabilityMutable, "", func(s string) bool { return s == "" }},
	} {
		if _, err := a.own.CreateRepository(t.Context(), &awsecr.CreateRepositoryInput{RepositoryName: &repository, ImageTagMutability: tc.tags}); err != nil {
			t.Fatal(err)
		}
		if tc.put != "" {
			if _, err := a.own.PutLifecyclePolicy(t.Context(), &awsecr.PutLifecyclePolicyInput{RepositoryName: &repository, LifecyclePolicyText: &tc.put}); err != nil {
				t.Fatal(err)
			}
		}
		if err := a.repositories(t, ecr.RepositoryOptions{}).Ensure(t.Context(), host, repository); err != nil {
			t.Fatal(err)
		}
		if got := a.policy(t, repository); !tc.want(got) {
			t.Errorf("%s has the policy %s", repository, got)
		}
	}
}

func TestReplicasThatMakeOneRepositoryBothSucceed(t *testing.T) {
	a := newAccount(t)
	replicas := []*ecr.Repositories{a.repositories(t, ecr.RepositoryOptions{}), a.repositories(t, ecr.RepositoryOptions{})}
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			if err := replicas[i%2].Ensure(t.Context(), host, "functions/hello"); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if asked := a.actions(); strings.Count(asked, "DescribeRepositories") != 2 || strings.Count(asked, "CreateRepository") > 2 {
		t.Errorf("ECR was asked %s", asked)
	}
	// The race itself: it is made between our look and our creation.
	made := false
	a.faulty(func(_ int, _ http.ResponseWriter, r *http.Request) bool {
		if strings.HasSuffix(r.Header.Get("X-Amz-Target"), ".CreateRepository") {
			made = true
			if _, err := a.own.CreateRepository(t.Context(), &awsecr.CreateRepositoryInput{RepositoryName: aws.String("functions/raced")}); err != nil {
				t.Error(err)
			}
		}
		return false
	})
	if err := replicas[0].Ensure(t.Context(), host, "functions/raced"); err != nil || !made {
		t.Errorf("%v, raced %v", err, made)
	}
}

const noPermission = "User: arn:aws:sts::123456789012:assumed-role/hearth-node/i-0123456789abcdef0 is not authorized to perform: ecr:CreateRepository on resource: arn:aws:ecr:eu-central-1:123456789012:repository/functions/hello because no identity-based policy allows the ecr:CreateRepository action"

func TestWhatKeepsARepositoryFromBeingMadeIsSaid(t *testing.T) {
	a := newAccount(t)
	refuse := func(status int, code, message string) func(http.ResponseWriter) {
		return func(w http.ResponseWriter) {
			w.Header().Set("Content-Type", "application/x-amz-json-1.1")
			w.WriteHeader(status)
			_ = json.NewEncoder(w).Encode(map[string]string{"__type": code, "message": message})
		}
	}
	for name, tc := range map[string]struct {
		action    string
		fault     func(http.ResponseWriter)
		times     int
		kind      error // nil: survived
		temporary bool
		says      []string
	}{
		"may not create":             {"CreateRepository", refuse(400, "AccessDeniedException", noPermission), 99, ecr.ErrRepositoryDenied, false, []string{"allow ecr:CreateRepository", "the role hearth-node"}},
		"may not create, says less":  {"CreateRepository", refuse(403, "AccessDeniedException", ""), 99, ecr.ErrRepositoryDenied, false, []string{"allow ecr:CreateRepository", "the instance's role"}},
		"may not look, may create":   {"DescribeRepositories", refuse(400, "AccessDeniedException", ""), 99, nil, false, nil},
		"may not put the policy":     {"PutLifecyclePolicy", refuse(400, "AccessDeniedException", ""), 99, nil, false, nil},
		"too many repositories":      {"CreateRepository", refuse(400, "LimitExceededException", "the quota"), 99, ecr.ErrLimit, false, []string{"quota"}},
		"a name ECR does not take":   {"CreateRepository", refuse(400, "InvalidParameterException", "Invalid parameter at 'repositoryName'"), 99, ecr.ErrRefused, false, []string{"prefix", "Invalid parameter"}},
		"throttled twice":            {"CreateRepository", refuse(400, "ThrottlingException", ""), 2, nil, false, nil},
		"away once":                  {"DescribeRepositories", refuse(500, "ServerException", ""), 1, nil, false, nil},
		"away":                       {"DescribeRepositories", refuse(503, "ServiceUnavailable", ""), 99, ecr.ErrUnavailable, true, []string{"recovers"}},
		"the session is old":         {"CreateRepository", refuse(400, "ExpiredTokenException", ""), 1, nil, false, nil},
		"and stays old":              {"CreateRepository", refuse(400, "ExpiredTokenException", ""), 99, ecr.ErrRepositoryDenied, false, []string{"clock"}},
		"an answer that is not ECRs": {"CreateRepository", func(w http.ResponseWriter) { _, _ = w.Write([]byte("<html>")) }, 99, ecr.ErrUnavailable, true, nil},
	} {
		t.Run(name, func(t *testing.T) {
			hits := 0
			a.faulty(func(_ int, w http.ResponseWriter, r *http.Request) bool {
				if !strings.HasSuffix(r.Header.Get("X-Amz-Target"), "."+tc.action) || hits >= tc.times {
					return false
				}
				hits++
				tc.fault(w)
				return true
			})
			defer a.faulty(nil)
			p := a.repositories(t, ecr.RepositoryOptions{})
			repository := "functions/" + strings.NewReplacer(" ", "-", ",", "").Replace(strings.ToLower(name))
			err := p.Ensure(t.Context(), host, repository)
			if !errors.Is(err, tc.kind) || hits == 0 {
				t.Fatalf("%v after %d faults, want %v", err, hits, tc.kind)
			}
			if tc.kind == nil {
				return
			}
			var typed *ecr.RepositoryError
			if !errors.As(err, &typed) || typed.Temporary() != tc.temporary || typed.Action != "ecr:"+tc.action {
				t.Errorf("%+v", typed)
			}
			for _, s := range tc.says {
				if !strings.Contains(err.Error(), s) {
					t.Errorf("%q does not say %q", err, s)
				}
			}
			// Not asked for again at once; then it succeeds.
			before := hits
			a.faulty(nil)
			if again := p.Ensure(t.Context(), host, repository); !errors.Is(again, tc.kind) || hits != before {
				t.Errorf("repeated at once: %v", again)
			}
			a.clock(10 * time.Second)
			if err := p.Ensure(t.Context(), host, repository); err != nil {
				t.Errorf("later: %v", err)
			}
		})
	}
}

func TestWhoWaitsForARepositoryMayLeave(t *testing.T) {
	a := newAccount(t)
	p := a.repositories(t, ecr.RepositoryOptions{})
	ctx, cancel := context.WithCancel(t.Context())
	a.faulty(func(int, http.ResponseWriter, *http.Request) bool { cancel(); return false })
	// The first leaves in the middle; what it did not finish, the next does.
	if err := p.Ensure(ctx, host, "functions/left"); err != nil && !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	a.faulty(nil)
	if err := p.Ensure(t.Context(), host, "functions/left"); err != nil {
		t.Errorf("the next one: %v", err)
	}
	if err := p.Ensure(ctx, host, "functions/other"); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

func TestRepositoriesOfOthersAreNotMade(t *testing.T) {
	r := newRig(t)
	p, err := r.Repositories(ecr.RepositoryOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Ensure(t.Context(), "registry.example.org:5000", "functions/hello"); err != nil {
		t.Errorf("%v", err)
	}
	if err := p.Ensure(t.Context(), "public.ecr.aws", "x/hello"); !errors.Is(err, ecr.ErrNotECR) {
		t.Errorf("%v", err)
	}
	p.Forget("registry.example.org:5000", "functions/hello")
	if n := r.service.count(); n != 0 {
		t.Errorf("ECR was asked %d times", n)
	}
	r.imds.Update(func(c *imdstest.Config) { c.Role = "" })
	if err := p.Ensure(t.Context(), host, "functions/hello"); !errors.Is(err, ecr.ErrUnavailable) || !strings.Contains(err.Error(), "attach an instance profile whose role allows ecr:DescribeRepositories") {
		t.Errorf("%v", err)
	}
	for _, tc := range []struct {
		a, b string
		same bool
	}{
		{host, host, true},
		{host, "123456789012.dkr-ecr.eu-central-1.on.aws", true},
		{host, "123456789012.dkr.ecr-fips.eu-central-1.amazonaws.com", true},
		{host, "123456789012.dkr.ecr.eu-west-1.amazonaws.com", false},
		{host, "210987654321.dkr.ecr.eu-central-1.amazonaws.com", false},
		{host, "registry.example.org", false},
		{"registry.example.org", "registry.example.org", false},
	} {
		if got := ecr.SameRegistry(tc.a, tc.b); got != tc.same {
			t.Errorf("%s and %s: %v", tc.a, tc.b, got)
		}
	}
}
