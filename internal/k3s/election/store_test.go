package election_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/ssm"
	"github.com/aws/aws-sdk-go-v2/service/ssm/types"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
	"github.com/hearth-sh/hearth/internal/ecr/mototest"
	"github.com/hearth-sh/hearth/internal/k3s/election"
	"github.com/hearth-sh/hearth/internal/k3s/election/electiontest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestDirectoryKeepsTheContract(t *testing.T) {
	root := t.TempDir()
	electiontest.Run(t, func(t *testing.T, name string) election.Store {
		return open(t, "file://"+filepath.Join(root, name), aws.Config{})
	})
}

func TestS3AndSystemsManagerKeepTheContract(t *testing.T) {
	cfg, _ := moto(t)
	t.Run("S3", func(t *testing.T) {
		if _, err := s3.NewFromConfig(cfg, pathStyle).CreateBucket(t.Context(), &s3.CreateBucketInput{Bucket: aws.String("hearth")}); err != nil {
			t.Fatal(err)
		}
		electiontest.Run(t, func(t *testing.T, name string) election.Store {
			return open(t, "s3://hearth/clusters/"+name, cfg)
		})
	})
	t.Run("Systems Manager", func(t *testing.T) {
		electiontest.Run(t, func(t *testing.T, name string) election.Store {
			return open(t, "ssm:///hearth/clusters/"+name, cfg)
		})
	})
	t.Run("a bucket that is not there is named", func(t *testing.T) {
		_, err := open(t, "s3://nowhere/x", cfg).Get(t.Context(), "generation/1/holder")
		if fault.CodeOf(err) != election.CodeMissing || !strings.Contains(err.Error(), "nowhere") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("secrets are encrypted parameters and the rest is not", func(t *testing.T) {
		store := open(t, "ssm:///hearth/types", cfg)
		client := ssm.NewFromConfig(cfg)
		for key, want := range map[string]string{
			"generation/1/holder": "String", "members/1/i-0": "String",
			"server/1/credentials": "SecureString", "agent/1/credentials": "SecureString",
		} {
			if err := store.Create(t.Context(), key, []byte("x")); err != nil {
				t.Fatal(err)
			}
			out, err := client.GetParameter(t.Context(), &ssm.GetParameterInput{Name: aws.String("/hearth/types/" + key)})
			if err != nil {
				t.Fatal(err)
			}
			if got := string(out.Parameter.Type); got != want {
				t.Errorf("%s is a %s, want %s", key, got, want)
			}
		}
	})
}

// TestSecretsAreEncryptedUnderTheKeyThatIsSaid: under the cluster's own key in
// place of the account's, and nothing else is.
func TestSecretsAreEncryptedUnderTheKeyThatIsSaid(t *testing.T) {
	cfg, _ := moto(t)
	const kms, bucket = "alias/hearth", "hearth"
	objects, parameters := s3.NewFromConfig(cfg, pathStyle), ssm.NewFromConfig(cfg)
	if _, err := objects.CreateBucket(t.Context(), &s3.CreateBucketInput{Bucket: aws.String(bucket)}); err != nil {
		t.Fatal(err)
	}
	for location, keyOf := range map[string]func(key string) string{
		"s3://" + bucket + "/c": func(key string) string {
			out, err := objects.HeadObject(t.Context(), &s3.HeadObjectInput{Bucket: aws.String(bucket), Key: aws.String("c/" + key)})
			if err != nil {
				t.Fatal(err)
			}
			return aws.ToString(out.SSEKMSKeyId)
		},
		"ssm:///c": func(key string) string {
			out, err := parameters.DescribeParameters(t.Context(), &ssm.DescribeParametersInput{ParameterFilters: []types.ParameterStringFilter{
				{Key: aws.String("Name"), Option: aws.String("Equals"), Values: []string{"/c/" + key}},
			}})
			if err != nil || len(out.Parameters) != 1 {
				t.Fatalf("%v: %+v", err, out)
			}
			return aws.ToString(out.Parameters[0].KeyId)
		},
	} {
		t.Run(strings.SplitN(location, ":", 2)[0], func(t *testing.T) {
			store, err := election.Open(location, election.OpenOptions{AWS: cfg, PathStyle: true, KMSKeyID: kms})
			if err != nil {
				t.Fatal(err)
			}
			for key, want := range map[string]string{"generation/1/holder": "", "members/1/i-0": "", "server/1/credentials": kms, "agent/1/credentials": kms} {
				if err := store.Create(t.Context(), key, []byte("a secret")); err != nil {
					t.Fatal(err)
				}
				if got := keyOf(key); got != want {
					t.Errorf("%s is encrypted under %q, not %q", key, got, want)
				}
				if got, err := store.Get(t.Context(), key); err != nil || string(got) != "a secret" {
					t.Errorf("%s is %q: %v", key, got, err)
				}
			}
		})
	}
}

// TestElectionsThroughS3AndSystemsManager has servers and agents elect at once,
// in real time, over connections that break after every few requests.
func TestElectionsThroughS3AndSystemsManager(t *testing.T) {
	cfg, broken := moto(t)
	if _, err := s3.NewFromConfig(cfg, pathStyle).CreateBucket(t.Context(), &s3.CreateBucketInput{Bucket: aws.String("hearth")}); err != nil {
		t.Fatal(err)
	}
	for _, location := range []string{"s3://hearth/cluster", "ssm:///hearth/cluster"} {
		t.Run(strings.SplitN(location, ":", 2)[0], func(t *testing.T) {
			broken.Store(7)
			defer broken.Store(0)
			var all sync.WaitGroup
			var mu sync.Mutex
			founders, generations, agents := 0, map[int]string{}, 0
			for i := range 5 {
				n := &node{store: open(t, location, cfg), name: fmt.Sprintf("i-%d", i), agent: i > 2, disk: &disk{}, timeout: 2 * time.Minute}
				e := n.elector(t)
				all.Go(func() {
					d, err := e.Elect(t.Context())
					if err != nil {
						t.Error(err)
						return
					}
					if d.Action == election.ActionFound {
						n.disk.set(d.Generation)
						if err := d.Hold.Found(t.Context(), "10.0.0.1"); err != nil {
							t.Error(err)
						}
					}
					mu.Lock()
					defer mu.Unlock()
					if d.Action == election.ActionFound {
						founders++
					}
					if n.agent {
						agents++
					}
					if ca := string(d.Credentials.ServerCA); generations[d.Generation] == "" {
						generations[d.Generation] = ca
					} else if generations[d.Generation] != ca {
						t.Errorf("%s has another CA", n.name)
					}
				})
			}
			all.Wait()
			if founders != 1 || len(generations) != 1 || agents != 2 {
				t.Errorf("%d founders, %d generations, %d agents", founders, len(generations), agents)
			}
		})
	}
}

func pathStyle(o *s3.Options) { o.UsePathStyle = true }

func open(t *testing.T, location string, cfg aws.Config) election.Store {
	t.Helper()
	s, err := election.Open(location, election.OpenOptions{AWS: cfg, PathStyle: true})
	if err != nil {
		t.Fatal(err)
	}
	if s.Location() != location {
		t.Fatalf("%s says it is at %s", location, s.Location())
	}
	return s
}

// moto runs moto behind a proxy that lets one write through at a time: it
// checks a condition and writes in two steps, which AWS does in one. Where the
// number is not 0, the proxy breaks the connection of every so manieth request,
// by turns before and after moto did what was asked.
func moto(t *testing.T) (aws.Config, *atomic.Int64) {
	t.Helper()
	target, err := url.Parse(mototest.Start(t))
	if err != nil {
		t.Fatal(err)
	}
	proxy := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(target); r.Out.Host = r.In.Host }}
	transport := &http.Transport{}
	proxy.Transport = transport
	proxy.ErrorHandler = func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) }
	var mu sync.Mutex
	var every, count atomic.Int64
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		r.Body = io.NopCloser(bytes.NewReader(b))
		if r.Method == http.MethodPut || strings.HasSuffix(r.Header.Get("X-Amz-Target"), ".PutParameter") {
			mu.Lock()
			defer mu.Unlock()
		}
		n := count.Add(1)
		if e := every.Load(); e != 0 && n%e == 0 {
			if n/e%2 == 0 {
				proxy.ServeHTTP(httptest.NewRecorder(), r)
			}
			panic(http.ErrAbortHandler)
		}
		proxy.ServeHTTP(w, r)
	}))
	client := &http.Client{Transport: &http.Transport{}}
	t.Cleanup(func() { client.CloseIdleConnections(); front.Close(); transport.CloseIdleConnections() })
	return aws.Config{
		Region: "us-east-1", BaseEndpoint: aws.String(front.URL), HTTPClient: client,
		Credentials: credentials.NewStaticCredentialsProvider("AKIDEXAMPLE", "example", ""),
	}, &every
}

// TestFailuresOfAWSAreClassified shows what moto does not: it lets everybody do
// everything.
func TestFailuresOfAWSAreClassified(t *testing.T) {
	type answer struct {
		status int
		body   string
	}
	get := func(s election.Store) error { _, err := s.Get(t.Context(), "server/1/credentials"); return err }
	create := func(s election.Store) error {
		return s.Create(t.Context(), "generation/1/holder", []byte("x"))
	}
	list := func(s election.Store) error { _, err := s.List(t.Context(), "members/1/"); return err }
	xml := func(code string) string { return "<Error><Code>" + code + "</Code><Message>m</Message></Error>" }
	for name, c := range map[string]struct {
		location string
		answer   answer
		do       func(election.Store) error
		code     fault.Code
		is       error
		says     string
	}{
		"S3 denies reading":           {"s3://b/p", answer{403, xml("AccessDenied")}, get, election.CodeDenied, nil, "s3:GetObject on arn:aws:s3:::b/p/server/1/credentials and s3:ListBucket"},
		"S3 denies writing":           {"s3://b/p", answer{403, xml("AccessDenied")}, create, election.CodeDenied, nil, "s3:PutObject on arn:aws:s3:::b/p/generation/1/holder"},
		"S3 denies listing":           {"s3://b/p", answer{403, xml("AccessDenied")}, list, election.CodeDenied, nil, "s3:ListBucket on arn:aws:s3:::b for the prefix p/"},
		"S3 denies without a reason":  {"s3://b/p", answer{403, ""}, get, election.CodeDenied, nil, "s3:GetObject"},
		"the clock is off":            {"s3://b/p", answer{403, xml("RequestTimeTooSkewed")}, create, election.CodeDenied, nil, "clock"},
		"no bucket":                   {"s3://b/p", answer{404, xml("NoSuchBucket")}, create, election.CodeMissing, nil, "bucket b"},
		"no object":                   {"s3://b/p", answer{404, xml("NoSuchKey")}, get, "", election.ErrNotFound, ""},
		"the object exists":           {"s3://b/p", answer{412, xml("PreconditionFailed")}, create, "", election.ErrExists, ""},
		"two wrote at once":           {"s3://b/p", answer{409, xml("ConditionalRequestConflict")}, create, "", nil, "ConditionalRequestConflict"},
		"S3 is slow":                  {"s3://b/p", answer{503, xml("SlowDown")}, create, "", nil, "SlowDown"},
		"S3 answers HTML":             {"s3://b/p", answer{500, "<html>"}, get, "", nil, ""},
		"no conditional writes":       {"s3://b/p", answer{501, xml("NotImplemented")}, create, election.CodeUnsupported, nil, "If-None-Match"},
		"SSM denies reading":          {"ssm:///p", answer{400, `{"__type":"AccessDeniedException","message":"m"}`}, get, election.CodeDenied, nil, "ssm:GetParameter on arn:aws:ssm:*:*:parameter/p/server/1/credentials"},
		"SSM denies listing":          {"ssm:///p", answer{400, `{"__type":"AccessDeniedException","message":"m"}`}, list, election.CodeDenied, nil, "ssm:GetParametersByPath"},
		"no parameter":                {"ssm:///p", answer{400, `{"__type":"ParameterNotFound","message":"m"}`}, get, "", election.ErrNotFound, ""},
		"the parameter exists":        {"ssm:///p", answer{400, `{"__type":"ParameterAlreadyExists","message":"m"}`}, create, "", election.ErrExists, ""},
		"SSM throttles":               {"ssm:///p", answer{400, `{"__type":"ThrottlingException","message":"m"}`}, create, "", nil, "ThrottlingException"},
		"SSM is full":                 {"ssm:///p", answer{400, `{"__type":"ParameterLimitExceeded","message":"m"}`}, create, election.CodeMissing, nil, "hold no more"},
		"the key of SSM is not there": {"ssm:///p", answer{400, `{"__type":"InvalidKeyId","message":"m"}`}, get, election.CodeDenied, nil, "kms:Decrypt"},
	} {
		t.Run(name, func(t *testing.T) {
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				w.WriteHeader(c.answer.status)
				_, _ = io.WriteString(w, c.answer.body)
			}))
			defer server.Close()
			client := &http.Client{Transport: &http.Transport{}}
			defer client.CloseIdleConnections()
			err := c.do(open(t, c.location, aws.Config{
				Region: "us-east-1", BaseEndpoint: &server.URL, HTTPClient: client,
				Credentials: credentials.NewStaticCredentialsProvider("AKIDEXAMPLE", "example", ""),
			}))
			if err == nil || fault.CodeOf(err) != c.code || c.is != nil && !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got code %q: %v", fault.CodeOf(err), err)
			}
			if c.is == nil && (errors.Is(err, election.ErrExists) || errors.Is(err, election.ErrNotFound)) {
				t.Errorf("taken for an answer: %v", err)
			}
		})
	}
}

func TestAMachineWithoutCredentialsIsTold(t *testing.T) {
	for _, location := range []string{"s3://b/p", "ssm:///p"} {
		n := &node{name: "i-1", disk: &disk{}, patience: 100 * time.Millisecond, store: open(t, location, aws.Config{
			Region: "us-east-1",
			Credentials: aws.NewCredentialsCache(aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
				return aws.Credentials{}, errors.New("no EC2 IMDS role found")
			})),
		})}
		n.fails(t, election.CodeCredentials, "profile with a role")
	}
}

func TestOpenRefusesLocations(t *testing.T) {
	for _, location := range []string{
		"", "x", "/var/lib/x", "http://x/y", "s3://", "s3://bucket", "s3://bucket/", "s3:bucket/x", "s3://bucket/a/../b", "s3://bucket/a//b",
		"s3://bucket/a?x=1", "s3://u:p@bucket/a", "ssm://", "ssm:///", "ssm://host/x", "file://", "file://host/x", "file:///", "s3://%zz/x",
	} {
		if _, err := election.Open(location, election.OpenOptions{}); fault.CodeOf(err) != election.CodeLocation {
			t.Errorf("%q: got %v", location, err)
		}
	}
}

func TestDirectoryLeavesNothingHalfWritten(t *testing.T) {
	root := t.TempDir()
	store := election.NewDirectory(root)
	if err := store.Create(t.Context(), "server/1/credentials", []byte("x")); err != nil {
		t.Fatal(err)
	}
	if err := store.Create(t.Context(), "server/1/credentials", []byte("y")); !errors.Is(err, election.ErrExists) {
		t.Fatal(err)
	}
	var files []string
	err := filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if info.Mode().Perm()&0o077 != 0 && path != root {
			t.Errorf("%s has mode %o", path, info.Mode().Perm())
		}
		if !d.IsDir() {
			files = append(files, strings.TrimPrefix(path, root))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(files) != 1 || files[0] != "/server/1/credentials" {
		t.Errorf("got %q", files)
	}
}

func TestDirectoryThatIsDeniedSaysSo(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o500); err != nil {
		t.Fatal(err)
	}
	denied := make(chan error, 1)
	go func() {
		// Root is denied nothing: its thread, which ends with this goroutine,
		// meets files as nobody does.
		if os.Geteuid() == 0 {
			runtime.LockOSThread()
			if err := unix.Setfsuid(65534); err != nil {
				denied <- err
				return
			}
		}
		denied <- election.NewDirectory(filepath.Join(dir, "x")).Create(context.Background(), "a", []byte("x"))
	}()
	if err := <-denied; fault.CodeOf(err) != election.CodeDenied {
		t.Errorf("got %v", err)
	}
}
