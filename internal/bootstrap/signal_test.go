package bootstrap

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/google/go-cmp/cmp"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
	"github.com/hearth-sh/hearth/internal/shim"
)

// queryAPI answers Auto Scaling and CloudFormation in their query protocol;
// moto knows neither of the two actions.
type queryAPI struct {
	mu     sync.Mutex
	asked  []url.Values
	refuse map[string]string // action to the error's code
	status int
}

func (q *queryAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	_ = r.ParseForm()
	q.mu.Lock()
	defer q.mu.Unlock()
	q.asked = append(q.asked, r.PostForm)
	action := r.PostForm.Get("Action")
	if code := q.refuse[action]; code != "" {
		w.WriteHeader(q.status)
		fmt.Fprintf(w, `<ErrorResponse><Error><Type>Sender</Type><Code>%s</Code><Message>because</Message></Error><RequestId>r</RequestId></ErrorResponse>`, code)
		return
	}
	fmt.Fprintf(w, `<%sResponse><%sResult/><ResponseMetadata><RequestId>r</RequestId></ResponseMetadata></%sResponse>`, action, action, action)
}

func (q *queryAPI) config(t *testing.T) aws.Config {
	t.Helper()
	server := httptest.NewServer(q)
	t.Cleanup(server.Close)
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	return aws.Config{
		Region: "eu-central-1", BaseEndpoint: &server.URL, HTTPClient: client, RetryMaxAttempts: 1,
		Credentials: credentials.NewStaticCredentialsProvider("AKIAEXAMPLE", "secret", ""),
	}
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
		asked  []string
		code   fault.Code
		passes bool
		notes  int
	}{
		{name: "nobody", asked: nil},
		{name: "success", config: both, tags: tags, asked: []string{"CompleteLifecycleAction CONTINUE group", "SignalResource SUCCESS"}, notes: 2},
		{name: "failure", config: both, tags: tags, fails: true, asked: []string{"CompleteLifecycleAction ABANDON group", "SignalResource FAILURE"}, notes: 2},
		{name: "the configured group", config: v1alpha1.SignalConfig{LifecycleHook: "hook", AutoScalingGroup: "mine"}, tags: tags, asked: []string{"CompleteLifecycleAction CONTINUE mine"}, notes: 1},
		{name: "no group is known, the other one is told all the same", config: both, asked: []string{"SignalResource SUCCESS"}, code: CodeSignalFailed, notes: 1},
		{name: "an instance that is in service already", config: v1alpha1.SignalConfig{LifecycleHook: "hook"}, tags: tags,
			refuse: map[string]string{"CompleteLifecycleAction": "ValidationError"}, status: 400, asked: []string{"CompleteLifecycleAction CONTINUE group"}, notes: 1},
		{name: "denied", config: both, tags: tags, refuse: map[string]string{"CompleteLifecycleAction": "AccessDenied"}, status: 403,
			asked: []string{"CompleteLifecycleAction CONTINUE group", "SignalResource SUCCESS"}, code: CodeSignalDenied, notes: 1},
		{name: "an unknown stack", config: v1alpha1.SignalConfig{CloudFormation: both.CloudFormation}, refuse: map[string]string{"SignalResource": "ValidationError"}, status: 400,
			asked: []string{"SignalResource SUCCESS"}, code: CodeSignalFailed},
		{name: "too many requests", config: v1alpha1.SignalConfig{CloudFormation: both.CloudFormation}, refuse: map[string]string{"SignalResource": "Throttling"}, status: 400,
			asked: []string{"SignalResource SUCCESS"}, code: CodeSignalFailed, passes: true},
		{name: "an error of AWS's", config: v1alpha1.SignalConfig{CloudFormation: both.CloudFormation}, refuse: map[string]string{"SignalResource": "InternalFailure"}, status: 500,
			asked: []string{"SignalResource SUCCESS"}, code: CodeSignalFailed, passes: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			q := &queryAPI{refuse: tt.refuse, status: tt.status}
			notes := 0
			err := signal(t.Context(), q.config(t), tt.config, signalled{Instance: "i-1", Tags: tt.tags, Success: !tt.fails, Reason: "because"}, func(string, ...any) { notes++ })
			if fault.CodeOf(err) != tt.code || fault.IsTransient(err) != tt.passes || (err == nil) != (tt.code == "") {
				t.Errorf("%q: %v", fault.CodeOf(err), err)
			}
			var asked []string
			for _, f := range q.asked {
				asked = append(asked, strings.TrimSpace(f.Get("Action")+" "+f.Get("LifecycleActionResult")+f.Get("Status")+" "+f.Get("AutoScalingGroupName")))
				if f.Get("InstanceId")+f.Get("UniqueId") != "i-1" {
					t.Errorf("about whom? %v", f)
				}
			}
			if diff := cmp.Diff(tt.asked, asked); diff != "" {
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
