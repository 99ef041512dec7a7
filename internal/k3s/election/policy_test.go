package election_test

import (
	"bytes"
	"encoding/json"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
	"github.com/hearth-sh/hearth/internal/k3s/election"
)

const policyDocs = "../../../docs/bootstrap.md"

// oneOrMany is how IAM writes lists.
type oneOrMany []string

func (l *oneOrMany) UnmarshalJSON(b []byte) error {
	var one string
	if json.Unmarshal(b, &one) == nil {
		*l = []string{one}
		return nil
	}
	return json.Unmarshal(b, (*[]string)(l))
}

type policy struct {
	Statement []struct {
		Effect    string
		Action    oneOrMany
		Resource  oneOrMany
		Condition map[string]map[string]oneOrMany
	}
}

// policies are those of docs/bootstrap.md, in its order.
func policies(t *testing.T) map[string]policy {
	t.Helper()
	docs, err := os.ReadFile(policyDocs)
	if err != nil {
		t.Fatal(err)
	}
	var found []policy
	for _, block := range regexp.MustCompile("(?s)```json\n(.*?)```").FindAllSubmatch(docs, -1) {
		if !bytes.Contains(block[1], []byte(`"Statement"`)) {
			continue
		}
		var p policy
		decoder := json.NewDecoder(bytes.NewReader(block[1]))
		decoder.DisallowUnknownFields()
		if err := decoder.Decode(&struct {
			Version string
			*policy
		}{policy: &p}); err != nil {
			t.Fatalf("%v in\n%s", err, block[1])
		}
		found = append(found, p)
	}
	names := []string{"s3 SERVER", "s3 AGENT", "ssm SERVER", "ssm AGENT"}
	if len(found) != len(names) {
		t.Fatalf("%s has %d policies, want those of %q", policyDocs, len(found), names)
	}
	out := map[string]policy{}
	for i, name := range names {
		out[name] = found[i]
	}
	return out
}

func matches(patterns []string, s string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool {
		expression := strings.NewReplacer(`\*`, ".*", `\?`, ".").Replace(regexp.QuoteMeta(p))
		return regexp.MustCompile("^" + expression + "$").MatchString(s)
	})
}

// allows is as much of IAM as the policies use; other conditions allow nothing.
func (p policy) allows(r request) bool {
	for _, s := range p.Statement {
		if s.Effect != "Allow" || !matches(s.Action, r.action) || !matches(s.Resource, r.resource) {
			continue
		}
		met := true
		for operator, keys := range s.Condition {
			for key, patterns := range keys {
				met = met && operator == "StringLike" && key == "s3:prefix" && matches(patterns, r.prefix)
			}
		}
		if met {
			return true
		}
	}
	return false
}

// request is what IAM decides on.
type request struct{ action, resource, prefix string }

// iam is in front of moto, which lets everybody do everything: it knows a role
// by its access key, and refuses what the role's policy does not allow.
type iam struct {
	t        *testing.T
	scheme   string
	policies map[string]policy
	front    http.Handler

	mu   sync.Mutex
	made map[string][]request // by role
}

var accessKey = regexp.MustCompile(`Credential=([A-Z]+)/`)

func (g *iam) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	key := accessKey.FindStringSubmatch(r.Header.Get("Authorization"))
	if key == nil {
		g.t.Errorf("%s %s is not signed", r.Method, r.URL)
		return
	}
	role := key[1]
	asked, ok := described(r, body)
	if !ok {
		g.t.Errorf("what %s %s of %q asks for is not known here", r.Method, r.URL, r.Header.Get("X-Amz-Target"))
	}
	g.mu.Lock()
	g.made[role] = append(g.made[role], asked)
	g.mu.Unlock()
	p := g.policies[g.scheme+" "+role]
	if !p.allows(asked) {
		deny(w, g.scheme)
		return
	}
	answer := httptest.NewRecorder()
	g.front.ServeHTTP(answer, r)
	if answer.Code == http.StatusNotFound && asked.action == "s3:GetObject" {
		// Who may not list may not learn what does not exist.
		bucket, object, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
		listing := request{"s3:ListBucket", "arn:aws:s3:::" + bucket, object}
		if !p.allows(listing) {
			deny(w, g.scheme)
			return
		}
	}
	for name, values := range answer.Header() {
		w.Header()[name] = values
	}
	w.WriteHeader(answer.Code)
	_, _ = w.Write(answer.Body.Bytes())
}

func deny(w http.ResponseWriter, scheme string) {
	if scheme == "ssm" {
		w.Header().Set("Content-Type", "application/x-amz-json-1.1")
		w.WriteHeader(http.StatusBadRequest)
		_, _ = io.WriteString(w, `{"__type":"AccessDeniedException","message":"no policy allows it"}`)
		return
	}
	w.WriteHeader(http.StatusForbidden)
	_, _ = io.WriteString(w, "<Error><Code>AccessDenied</Code><Message>no policy allows it</Message></Error>")
}

// described says what a request asks for, in the words of policies.
func described(r *http.Request, body []byte) (request, bool) {
	if target := r.Header.Get("X-Amz-Target"); target != "" {
		action, ok := strings.CutPrefix(target, "AmazonSSM.")
		var in struct{ Name, Path string }
		if json.Unmarshal(body, &in) != nil || in.Name == "" == (in.Path == "") {
			ok = false
		}
		return request{action: "ssm:" + action, resource: "arn:aws:ssm:eu-central-1:123456789012:parameter" + in.Name + in.Path}, ok
	}
	bucket, object, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	switch {
	case r.Method == http.MethodGet && object == "" && r.URL.Query().Get("list-type") == "2":
		return request{"s3:ListBucket", "arn:aws:s3:::" + bucket, r.URL.Query().Get("prefix")}, true
	case r.Method == http.MethodGet && object != "":
		return request{action: "s3:GetObject", resource: "arn:aws:s3:::" + bucket + "/" + object}, true
	case r.Method == http.MethodPut && object != "":
		return request{action: "s3:PutObject", resource: "arn:aws:s3:::" + bucket + "/" + object}, true
	}
	return request{}, false
}

// TestTheDocumentedPoliciesAreWhatAnElectionNeeds has servers and an agent elect
// under the policies of docs/bootstrap.md, enforced: nothing that they do is
// refused, everything that is allowed is used, and an agent reads nothing of the
// servers'.
func TestTheDocumentedPoliciesAreWhatAnElectionNeeds(t *testing.T) {
	all := policies(t)
	cfg, _ := moto(t)
	if _, err := s3.NewFromConfig(cfg, pathStyle).CreateBucket(t.Context(), &s3.CreateBucketInput{Bucket: aws.String("example-hearth-state")}); err != nil {
		t.Fatal(err)
	}
	target, err := url.Parse(aws.ToString(cfg.BaseEndpoint))
	if err != nil {
		t.Fatal(err)
	}
	for _, location := range []string{"s3://example-hearth-state/production", "ssm:///hearth/production"} {
		scheme, _, _ := strings.Cut(location, ":")
		t.Run(scheme, func(t *testing.T) {
			transport := &http.Transport{}
			proxy := &httputil.ReverseProxy{Transport: transport, Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(target); r.Out.Host = r.In.Host }}
			gate := &iam{t: t, scheme: scheme, policies: all, front: proxy, made: map[string][]request{}}
			front := httptest.NewServer(gate)
			client := &http.Client{Transport: &http.Transport{}}
			t.Cleanup(func() { client.CloseIdleConnections(); front.Close(); transport.CloseIdleConnections() })
			as := func(role string) election.Store {
				c := cfg.Copy()
				c.Region, c.BaseEndpoint, c.HTTPClient = "eu-central-1", aws.String(front.URL), client
				c.Credentials = credentials.NewStaticCredentialsProvider(role, "example", "")
				return open(t, location, c)
			}
			newNode := func(role, name string) *node {
				return &node{store: as(role), name: name, agent: role == "AGENT", disk: &disk{}, timeout: 2 * time.Minute}
			}
			// A founder that gives up, and comes back to found the next one.
			founder, second, agent := newNode("SERVER", "i-1"), newNode("SERVER", "i-2"), newNode("AGENT", "i-3")
			if d := founder.elect(t); d.Action != election.ActionFound {
				t.Fatalf("got %+v", d)
			} else if err := d.Hold.Abandon(t.Context(), "a test"); err != nil {
				t.Fatal(err)
			}
			if d := founder.found(t, "10.0.0.1"); d.Generation != 2 {
				t.Fatalf("got %+v", d)
			}
			if d := second.elect(t); d.Action != election.ActionJoin || len(d.Servers) != 1 {
				t.Fatalf("got %+v", d)
			}
			if err := second.elector(t).Announce(t.Context(), 2, "10.0.0.2"); err != nil {
				t.Fatal(err)
			}
			if d := founder.elect(t); d.Action != election.ActionContinue {
				t.Fatalf("got %+v", d)
			}
			for range 2 {
				if d := agent.elect(t); d.Action != election.ActionJoin || len(d.Servers) != 2 {
					t.Fatalf("got %+v", d)
				}
			}
			if err := second.elector(t).Leave(t.Context(), 2, "10.0.0.2"); err != nil {
				t.Fatal(err)
			}
			gate.mu.Lock()
			made := maps.Clone(gate.made)
			gate.mu.Unlock()
			// What is refused is asked for without the election, which would wait
			// for a policy that takes its time to spread.
			for name, do := range map[string]func(election.Store) error{
				"read the servers' credentials": func(s election.Store) error { _, err := s.Get(t.Context(), "server/2/credentials"); return err },
				"write a member":                func(s election.Store) error { return s.Put(t.Context(), "members/2/i-3", []byte("{}")) },
				"hold a generation":             func(s election.Store) error { return s.Create(t.Context(), "generation/3/holder", []byte("{}")) },
			} {
				if err := do(as("AGENT")); fault.CodeOf(err) != election.CodeDenied {
					t.Errorf("an agent may %s: %v", name, err)
				}
			}
			for _, role := range []string{"SERVER", "AGENT"} {
				for _, r := range made[role] {
					if role == "AGENT" && strings.Contains(r.resource+r.prefix, "/server/") {
						t.Errorf("an agent's election asks for %+v", r)
					}
				}
				for _, s := range all[scheme+" "+role].Statement {
					for _, action := range s.Action {
						for _, resource := range s.Resource {
							if !ofStore(resource) {
								continue // EC2's answers and backups are no part of the election
							}
							used := slices.ContainsFunc(made[role], func(r request) bool {
								return matches([]string{action}, r.action) && matches([]string{resource}, r.resource)
							})
							if !used {
								t.Errorf("%s: nothing needs %s on %s", role, action, resource)
							}
						}
					}
				}
			}
			if t.Failed() {
				t.Log(made)
			}
		})
	}
}

// ofStore says whether a policy's resource is the cluster's store.
func ofStore(resource string) bool {
	return strings.Contains(resource, "example-hearth-state") || strings.Contains(resource, "parameter/hearth/")
}
