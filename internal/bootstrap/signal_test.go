package bootstrap

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"sync"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/google/go-cmp/cmp"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
	"github.com/hearth-sh/hearth/internal/bootstrap/sigv4test"
	"github.com/hearth-sh/hearth/internal/shim"
)

// queryAPI answers Auto Scaling and CloudFormation in their query protocol, since
// moto knows neither of the two actions. So it is as strict as AWS: about the
// signature, the version and service of each action, and parameters, of which it
// knows those that are sent and no more.
type queryAPI struct {
	t      *testing.T
	mu     sync.Mutex
	asked  []url.Values
	refuse map[string]string // action to the error's code
	status int
}

// role signs requests.
var role = sigv4test.Credentials{AccessKeyID: "ASIAEXAMPLE", SecretAccessKey: "secret", SessionToken: "session"}

// actions are what queryAPI knows: the service, and the version of its API.
var actions = map[string]struct{ service, version string }{
	"CompleteLifecycleAction": {"autoscaling", "2011-01-01"},
	"SignalResource":          {"cloudformation", "2010-05-15"},
}

func (q *queryAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		q.t.Error(err)
	}
	form, err := url.ParseQuery(string(body))
	if kind := r.Header.Get("Content-Type"); err != nil || r.Method != http.MethodPost || r.URL.RequestURI() != "/" || kind != "application/x-www-form-urlencoded" {
		q.t.Errorf("%s %s with %s is no request of the query protocol: %v", r.Method, r.URL.RequestURI(), kind, err)
	}
	action := form.Get("Action")
	if err := sigv4test.Verify(r, body, role, "eu-central-1", actions[action].service); err != nil {
		q.t.Errorf("%s: %v", action, err)
	}
	if v := form["Version"]; len(v) != 1 || v[0] != actions[action].version {
		q.t.Errorf("%s is of the version %q", action, v)
	}
	form.Del("Version")
	q.mu.Lock()
	defer q.mu.Unlock()
	q.asked = append(q.asked, form)
	if code := q.refuse[action]; code != "" {
		w.WriteHeader(q.status)
		fmt.Fprintf(w, `<ErrorResponse><Error><Type>Sender</Type><Code>%s</Code><Message>because</Message></Error><RequestId>r</RequestId></ErrorResponse>`, code)
		return
	}
	fmt.Fprintf(w, `<%sResponse><%sResult/><ResponseMetadata><RequestId>r</RequestId></ResponseMetadata></%sResponse>`, action, action, action)
}

func (q *queryAPI) config(t *testing.T) aws.Config {
	t.Helper()
	q.t = t
	server := httptest.NewServer(q)
	t.Cleanup(server.Close)
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	return aws.Config{
		Region: "eu-central-1", BaseEndpoint: &server.URL, HTTPClient: client, RetryMaxAttempts: 1,
		Credentials: credentials.NewStaticCredentialsProvider(role.AccessKeyID, role.SecretAccessKey, role.SessionToken),
	}
}

// completes and signals are the requests, with all their parameters.
func completes(result, group string) url.Values {
	return url.Values{"Action": {"CompleteLifecycleAction"}, "AutoScalingGroupName": {group}, "LifecycleHookName": {"hook"}, "InstanceId": {"i-1"}, "LifecycleActionResult": {result}}
}

func signals(status string) url.Values {
	return url.Values{"Action": {"SignalResource"}, "StackName": {"stack"}, "LogicalResourceId": {"Servers"}, "UniqueId": {"i-1"}, "Status": {status}}
}

func TestWhoWaitsIsTold(t *testing.T) {
	both := v1alpha1.SignalConfig{LifecycleHook: "hook", CloudFormation: &v1alpha1.CloudFormationSignal{Stack: "stack", Resource: "Servers"}}
	tags := map[string]string{groupTag: "group"}
	for _, tt := range []struct {
		name   string
		config v1alpha1.SignalConfig
		tags   map[string]string
		fails  bool // whether the run did
		refuse map[string]string
		status int
		asked  []url.Values
		code   fault.Code
		passes bool
		notes  int
	}{
		{name: "nobody", asked: nil},
		{name: "success", config: both, tags: tags, asked: []url.Values{completes("CONTINUE", "group"), signals("SUCCESS")}, notes: 2},
		{name: "failure", config: both, tags: tags, fails: true, asked: []url.Values{completes("ABANDON", "group"), signals("FAILURE")}, notes: 2},
		{name: "the configured group", config: v1alpha1.SignalConfig{LifecycleHook: "hook", AutoScalingGroup: "mine"}, tags: tags, asked: []url.Values{completes("CONTINUE", "mine")}, notes: 1},
		{name: "no group is known, the other one is told all the same", config: both, asked: []url.Values{signals("SUCCESS")}, code: CodeSignalFailed, notes: 1},
		{name: "an instance that is in service already", config: v1alpha1.SignalConfig{LifecycleHook: "hook"}, tags: tags,
			refuse: map[string]string{"CompleteLifecycleAction": "ValidationError"}, status: 400, asked: []url.Values{completes("CONTINUE", "group")}, notes: 1},
		{name: "denied", config: both, tags: tags, refuse: map[string]string{"CompleteLifecycleAction": "AccessDenied"}, status: 403,
			asked: []url.Values{completes("CONTINUE", "group"), signals("SUCCESS")}, code: CodeSignalDenied, notes: 1},
		{name: "an unknown stack", config: v1alpha1.SignalConfig{CloudFormation: both.CloudFormation}, refuse: map[string]string{"SignalResource": "ValidationError"}, status: 400,
			asked: []url.Values{signals("SUCCESS")}, code: CodeSignalFailed},
		{name: "too many requests", config: v1alpha1.SignalConfig{CloudFormation: both.CloudFormation}, refuse: map[string]string{"SignalResource": "Throttling"}, status: 400,
			asked: []url.Values{signals("SUCCESS")}, code: CodeSignalFailed, passes: true},
		{name: "an error of AWS's", config: v1alpha1.SignalConfig{CloudFormation: both.CloudFormation}, refuse: map[string]string{"SignalResource": "InternalFailure"}, status: 500,
			asked: []url.Values{signals("SUCCESS")}, code: CodeSignalFailed, passes: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			q := &queryAPI{refuse: tt.refuse, status: tt.status}
			notes := 0
			err := signal(t.Context(), q.config(t), tt.config, signalled{Instance: "i-1", Tags: tt.tags, Success: !tt.fails, Reason: "because"}, func(string, ...any) { notes++ })
			if fault.CodeOf(err) != tt.code || fault.IsTransient(err) != tt.passes || (err == nil) != (tt.code == "") {
				t.Errorf("%q: %v", fault.CodeOf(err), err)
			}
			if diff := cmp.Diff(tt.asked, q.asked); diff != "" {
				t.Error(diff)
			}
			if notes != tt.notes {
				t.Errorf("%d notes", notes)
			}
		})
	}
}

func TestEveryConfiguredRuntimeMustRun(t *testing.T) {
	no := false
	ok := shim.Proof{OK: true}
	for _, tt := range []struct {
		name   string
		shims  []v1alpha1.ShimConfig
		proofs map[string]shim.Proof
		err    error
		proven []string
		code   fault.Code
		passes bool
		warned int
	}{
		{name: "none is configured"},
		{name: "all run", shims: []v1alpha1.ShimConfig{{Name: "spin"}, {Name: "wasmtime"}}, proofs: map[string]shim.Proof{"spin": ok, "wasmtime": ok}, proven: []string{"spin", "wasmtime"}},
		{name: "one is missing", shims: []v1alpha1.ShimConfig{{Name: "spin"}, {Name: "wasmtime"}}, proofs: map[string]shim.Proof{"spin": ok}, proven: []string{"spin"}, code: CodeRuntimeMissing},
		{name: "an optional one is missing", shims: []v1alpha1.ShimConfig{{Name: "spin"}, {Name: "wasmtime", Required: &no}}, proofs: map[string]shim.Proof{"spin": ok}, proven: []string{"spin"}, warned: 1},
		{name: "one that ended early is tried again", shims: []v1alpha1.ShimConfig{{Name: "spin"}}, proofs: map[string]shim.Proof{"spin": {Code: shim.CodeTimeout, Message: "no answer."}}, code: CodeRuntimeUnproven, passes: true},
		{name: "one that is not there is not", shims: []v1alpha1.ShimConfig{{Name: "spin"}}, proofs: map[string]shim.Proof{"spin": {Code: "not-found", Message: "no binary"}}, code: CodeRuntimeUnproven},
		{name: "containerd does not answer", shims: []v1alpha1.ShimConfig{{Name: "spin"}}, err: fault.Passing(CodeContainerd, nil, "", "no answer"), code: CodeContainerd, passes: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			warned := 0
			proven, err := prove(t.Context(), tt.shims, func(context.Context, []string, *slog.Logger) (map[string]shim.Proof, error) { return tt.proofs, tt.err },
				slog.New(slog.DiscardHandler), func(string, ...any) {}, func(string, ...any) { warned++ })
			if fault.CodeOf(err) != tt.code || fault.IsTransient(err) != tt.passes || (err == nil) != (tt.code == "") || warned != tt.warned {
				t.Errorf("%q, %d warnings: %v", fault.CodeOf(err), warned, err)
			}
			if diff := cmp.Diff(tt.proven, proven); diff != "" {
				t.Error(diff)
			}
		})
	}
}
