package main

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/urfave/cli/v2"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/client"
	"github.com/hearth-sh/hearth/internal/command"
	"github.com/hearth-sh/hearth/internal/submit"
)

func TestWhichAPIIsMeant(t *testing.T) {
	type given = map[string]string
	tests := []struct {
		name         string
		options, env given
		want         apiChoice
		refused      string
	}{
		{"nothing said is this machine", nil, nil, apiChoice{URL: client.DefaultURL, Default: true}, ""},
		{"a kubeconfig that lies around is not a wish", nil, given{"KUBECONFIG": "/kc"}, apiChoice{URL: client.DefaultURL, Default: true}, ""},
		{"an option goes before the environment", given{"api": "http://a"}, given{"HEARTH_API": "http://b", "HEARTH_URL": "http://c", "HEARTH_CONTEXT": "d"}, apiChoice{URL: "http://a"}, ""},
		{"HEARTH_API goes before its old name", nil, given{"HEARTH_API": "http://b", "HEARTH_URL": "http://c"}, apiChoice{URL: "http://b"}, ""},
		{"HEARTH_URL still works", nil, given{"HEARTH_URL": "http://c"}, apiChoice{URL: "http://c"}, ""},
		{"--cluster goes before the environment's URL", given{"cluster": ""}, given{"HEARTH_API": "http://b"}, apiChoice{Cluster: true, clusterOption: "--cluster"}, ""},
		{"--cluster keeps the environment's context", given{"cluster": ""}, given{"HEARTH_CONTEXT": "k"}, apiChoice{Cluster: true, Context: "k", clusterOption: "--cluster"}, ""},
		{"--context alone is enough", given{"context": "k"}, given{"HEARTH_CONTEXT": "other"}, apiChoice{Cluster: true, Context: "k", clusterOption: "--context"}, ""},
		{"another kubeconfig has other contexts", given{"kubeconfig": "/f"}, given{"HEARTH_CONTEXT": "k"}, apiChoice{Cluster: true, Kubeconfig: "/f", clusterOption: "--kubeconfig"}, ""},
		{"HEARTH_CONTEXT alone is enough", nil, given{"HEARTH_CONTEXT": "k"}, apiChoice{Cluster: true, Context: "k", clusterOption: "HEARTH_CONTEXT"}, ""},
		{"URL and cluster on the command line", given{"api": "http://a", "context": "k"}, nil, apiChoice{}, "--api and --context"},
		{"URL and cluster in the environment", nil, given{"HEARTH_API": "http://a", "HEARTH_CONTEXT": "k"}, apiChoice{}, "HEARTH_API and HEARTH_CONTEXT"},
		{"an empty URL", given{"api": ""}, nil, apiChoice{}, "--api is empty"},

		{"a token of the environment goes to a URL", given{"api": "https://a"}, given{"HEARTH_TOKEN": "t"}, apiChoice{URL: "https://a", Token: "t"}, ""},
		{"a token's option goes before the environment's file", given{"token": "t"}, given{"HEARTH_TOKEN_FILE": "/f"}, apiChoice{URL: client.DefaultURL, Default: true, Token: "t"}, ""},
		{"a file's option goes before the environment's token", given{"token-file": "/f"}, given{"HEARTH_TOKEN": "t"}, apiChoice{URL: client.DefaultURL, Default: true, TokenFile: "/f"}, ""},
		{"a token of the environment is not shown to a cluster", given{"cluster": ""}, given{"HEARTH_TOKEN": "t", "HEARTH_TOKEN_FILE": "/f", "HEARTH_CA_FILE": "/ca"}, apiChoice{Cluster: true, clusterOption: "--cluster"}, ""},
		{"a token on the command line is", given{"cluster": "", "token-file": "/f", "ca-file": "/ca"}, nil, apiChoice{Cluster: true, TokenFile: "/f", CAFile: "/ca", clusterOption: "--cluster"}, ""},
		{"two tokens on the command line", given{"token": "t", "token-file": "/f"}, nil, apiChoice{}, "--token and --token-file"},
		{"two tokens in the environment", nil, given{"HEARTH_TOKEN": "t", "HEARTH_TOKEN_FILE": "/f"}, apiChoice{}, "HEARTH_TOKEN and HEARTH_TOKEN_FILE"},
		{"an authority without https", given{"ca-file": "/ca"}, nil, apiChoice{}, "--ca-file is for an API with https"},
		{"an authority for https", given{"ca-file": "/ca", "api": "https://a"}, nil, apiChoice{URL: "https://a", CAFile: "/ca"}, ""},

		{"names within the cluster", given{"context": "k", "service-account": "team/robot"}, given{"HEARTH_SYSTEM_NAMESPACE": "hearth"},
			apiChoice{Cluster: true, Context: "k", SystemNamespace: "hearth", Account: "team/robot", clusterOption: "--context"}, ""},
		{"names within no cluster", given{"service-account": "x"}, nil, apiChoice{}, "--service-account is about a cluster"},
		{"names within no cluster, in the environment", nil, given{"HEARTH_SERVICE_ACCOUNT": "x"}, apiChoice{URL: client.DefaultURL, Default: true}, ""},
		{"a tenant", given{"tenant": "a"}, given{"HEARTH_TENANT": "b"}, apiChoice{URL: client.DefaultURL, Default: true, Tenant: "a"}, ""},
		{"a tenant of the environment", nil, given{"HEARTH_TENANT": "b"}, apiChoice{URL: client.DefaultURL, Default: true, Tenant: "b"}, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := chooseAPI(func(name string) (string, bool) { v, ok := tt.options[name]; return v, ok }, func(name string) string { return tt.env[name] })
			if tt.refused != "" {
				if err == nil || !strings.Contains(err.Error(), tt.refused) {
					t.Errorf("%+v %v", got, err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got, cmp.AllowUnexported(apiChoice{})); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// The same through the library, which has its own ideas of flags.
func TestOptionsAndVariablesReachTheChoice(t *testing.T) {
	for name, tt := range map[string]struct {
		args []string
		env  map[string]string
		want apiChoice
	}{
		"short and old names": {[]string{"-n", "a", "--url", "http://x"}, map[string]string{"HEARTH_API": "http://y"}, apiChoice{URL: "http://x", Tenant: "a"}},
		"variables":           {nil, map[string]string{"HEARTH_API": "http://y", "HEARTH_TENANT": "b", "HEARTH_TOKEN": "t"}, apiChoice{URL: "http://y", Tenant: "b", Token: "t"}},
		"cluster":             {[]string{"--cluster"}, map[string]string{"HEARTH_API": "http://y"}, apiChoice{Cluster: true, clusterOption: "--cluster"}},
		"no cluster":          {[]string{"--cluster=false"}, nil, apiChoice{URL: client.DefaultURL, Default: true}},
	} {
		t.Run(name, func(t *testing.T) {
			clearEnvironment(t)
			for name, value := range tt.env {
				t.Setenv(name, value)
			}
			var got apiChoice
			app := command.Prepare(&cli.App{Name: "x", Commands: []*cli.Command{{Name: "y", Flags: apiFlags("x"), Action: func(c *cli.Context) error {
				var err error
				got, err = apiOf(c)
				return err
			}}}})
			if err := app.RunContext(t.Context(), command.Reorder(app, append([]string{"x", "y"}, tt.args...))); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got, cmp.AllowUnexported(apiChoice{})); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestEveryCommandReachesTheAPITheSameWay holds the promise of one set of options.
func TestEveryCommandReachesTheAPITheSameWay(t *testing.T) {
	want := map[string]bool{}
	for _, f := range apiFlags("") {
		want[f.Names()[0]] = true
	}
	reached := 0
	var walk func(prefix string, commands []*cli.Command)
	walk = func(prefix string, commands []*cli.Command) {
		for _, c := range commands {
			has := map[string]bool{}
			for _, f := range c.Flags {
				has[f.Names()[0]] = true
			}
			if has["tenant"] || has["ca-file"] {
				reached++
				for name := range want {
					if !has[name] {
						t.Errorf("%s %s has no --%s", prefix, c.Name, name)
					}
				}
			}
			walk(prefix+" "+c.Name, c.Subcommands)
		}
	}
	walk("nodeagent", newApp().Commands)
	if reached < 10 {
		t.Errorf("only %d commands reach the API", reached)
	}
}

func TestTokenIsSentToTheAPIAndNotToFunctions(t *testing.T) {
	var mu sync.Mutex
	got := map[string]string{}
	note := func(r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		got[r.Method+" "+r.URL.Path] = r.Header.Get("Authorization")
	}
	function := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		note(r)
		_, _ = io.WriteString(w, "from the function\n")
	}))
	defer function.Close()
	api := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		note(r)
		f := sample()
		f.PathURL, f.URL = "", function.URL+"/"
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(f)
	}))
	defer api.Close()
	dir := t.TempDir()
	ca, token := filepath.Join(dir, "ca.crt"), filepath.Join(dir, "token")
	for path, content := range map[string]string{ca: string(certificatePEM(api.Certificate())), token: "s3cret\n"} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	out := execute(t, t.Context(), "", "invoke", "hello", "/p?q=1", "--api", api.URL, "--ca-file", ca, "--token-file", token)
	if out.code != 0 || out.stdout != "from the function\n" {
		t.Errorf("%+v", out)
	}
	if diff := cmp.Diff(map[string]string{"GET /v1/functions/hello": "Bearer s3cret", "GET /p": ""}, got); diff != "" {
		t.Error(diff)
	}
	out = execute(t, t.Context(), "", "functions", "get", "hello", "--api", api.URL, "--token-file", token)
	if out.code != exitUnreachable || !strings.Contains(out.stderr, "--ca-file") {
		t.Errorf("without the authority: %+v", out)
	}
}

func certificatePEM(c *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
}

func TestRefusalsNameTheAPI(t *testing.T) {
	a := newFakeAPI(t)
	got := execute(t, t.Context(), "", "functions", "get", "nope", "--api", a.URL)
	if !strings.HasSuffix(got.stderr, "\n  asked was "+a.URL+"\n") {
		t.Errorf("%+v", got)
	}
	if asked(client.DefaultURL) != "" {
		t.Error("the API that everybody expects is named")
	}
}

func TestOwnerIsHeldAgainstTheTenantGiven(t *testing.T) {
	a := newFakeAPI(t)
	for _, args := range [][]string{{"functions", "delete", "hello"}, {"logs", "hello"}, {"invoke", "hello"}, {"open", "hello"}} {
		got := execute(t, t.Context(), "", append(args, "-n", "other", "--api", a.URL)...)
		if got.code != exitRefused || !strings.Contains(got.stderr, "hello belongs to the tenant default, not to other") {
			t.Errorf("%v: %+v", args, got)
		}
		if got := execute(t, t.Context(), "", append(args, "-n", "default", "--api", a.URL)...); got.code != 0 {
			t.Errorf("%v: %+v", args, got)
		}
	}
}

func TestSubmitSendsWhatOnlyAClusterKnows(t *testing.T) {
	a := newFakeAPI(t)
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"--runtime", "spin", "--host", "hello.example.com", "--route", "/a", "--route", "/b"}, `{"runtime":"spin","host":"hello.example.com","routes":["/a","/b"]}`},
		{[]string{"--runtime", "resident"}, `{"runtime":"resident"}`},
		{[]string{"--node-selector", "pool=wasm", "--node-selector", "hearth.sh/fast=", "--node-selector", "disk-"}, `{"placement":{"nodeSelector":{"disk":null,"hearth.sh/fast":"","pool":"wasm"}}}`},
		{[]string{"--node-selector", ""}, `{"placement":null}`},
		{[]string{"--autoscaler", "hpa", "--min-replicas", "2", "--max-replicas", "5", "--target-cpu", "50"}, `{"autoscaling":{"autoscaler":"hpa","minReplicas":2,"maxReplicas":5,"targetCPUPercent":50}}`},
		{[]string{"--max-replicas", "0"}, `{"autoscaling":{"maxReplicas":0}}`},
		{[]string{"--runtime", "resident", "--autoscaler", ""}, `{"runtime":"resident","autoscaling":null}`},
		{[]string{"--host", ""}, `{"host":"","routes":[]}`},
		{[]string{"--route", ""}, `{"routes":[]}`},
	} {
		got := execute(t, t.Context(), "", append([]string{"functions", "set", "hello", "--api", a.URL}, tt.args...)...)
		if got.code != 0 || a.last() != tt.want {
			t.Errorf("%v: sent %s\n%+v", tt.args, a.last(), got)
		}
	}
	for want, args := range map[string][]string{
		"is not resident or spin": {"--runtime", "wasm"}, "begins with a slash": {"--host", "a.example.com", "--route", "a"}, "stands alone": {"--route", "", "--route", "/a"},
		"takes all labels back": {"--node-selector", "", "--node-selector", "a=b"}, "is no label": {"--node-selector", "=b"}, "LABEL- to take": {"--node-selector", "pool"},
		"is not none, hpa or keda": {"--autoscaler", "vpa"}, "give one of them": {"--autoscaler", "", "--min-replicas", "2"}, "is less than 0": {"--target-cpu", "-1"},
		"is being removed": {"--host", "", "--route", "/a"},
	} {
		if got := execute(t, t.Context(), "", append([]string{"functions", "set", "hello", "--api", a.URL}, args...)...); got.code != exitUsage || !strings.Contains(got.stderr, want) {
			t.Errorf("%v: %+v", args, got)
		}
	}
}

func TestFunctionOfAClusterShowsItsNodes(t *testing.T) {
	f := sample()
	f.PathURL, f.Warm, f.State = "", "2/3", v1alpha1.StateReady
	f.Settings.Host, f.Settings.Routes = "hello.example.com", []string{"/a"}
	f.Settings.Placement = &v1alpha1.FunctionPlacement{NodeSelector: map[string]string{"pool": "wasm"}}
	spin := f
	spin.Name, spin.Settings.Runtime, spin.Warm = "spun", v1alpha1.RuntimeSpin, "1/1"
	spin.Settings.Autoscaling = &v1alpha1.FunctionAutoscaling{Autoscaler: v1alpha1.AutoscalerHPA, MinReplicas: 1, MaxReplicas: 4}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		w.Header().Set("Content-Type", "application/json")
		switch {
		case r.URL.Path == "/v1/functions":
			_ = json.NewEncoder(w).Encode(v1alpha1.FunctionList{Items: []v1alpha1.Function{f, spin}})
		case strings.HasSuffix(r.URL.Path, "spun"):
			_ = json.NewEncoder(w).Encode(spin)
		default:
			_ = json.NewEncoder(w).Encode(f)
		}
	}))
	defer server.Close()
	text := ""
	for _, args := range [][]string{{"functions", "list"}, {"functions", "get", "hello"}, {"functions", "get", "spun"}, {"submit", wasmFile(t, "hello.wasm")}} {
		got := execute(t, t.Context(), "", append(args, "--api", server.URL)...)
		if got.code != 0 {
			t.Errorf("%v: %+v", args, got)
		}
		text += "-- " + strings.Join(args[:min(len(args), 2)], " ") + " --\n" + got.stdout
		text = strings.ReplaceAll(text, args[len(args)-1], filepath.Base(args[len(args)-1]))
	}
	golden(t, "cluster-functions", text)
}

// TestAFunctionWithoutAURLIsSaidToHaveNone: nobody is handed a blank to copy.
func TestAFunctionWithoutAURLIsSaidToHaveNone(t *testing.T) {
	const why = "the load balancer has only a name"
	f := sample()
	f.URL, f.PathURL, f.Warm, f.State = "", "", "1/1", v1alpha1.StateReady
	f.Warnings = []v1alpha1.FunctionError{{Code: "no-base-domain", Detail: why}}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		w.Header().Set("Content-Type", "application/json")
		if r.URL.Path == "/v1/functions" {
			_ = json.NewEncoder(w).Encode(v1alpha1.FunctionList{Items: []v1alpha1.Function{f}})
			return
		}
		_ = json.NewEncoder(w).Encode(f)
	}))
	defer server.Close()
	for _, c := range []struct {
		args           []string
		code           int
		stdout, stderr string // to be found there
	}{
		{[]string{"submit", wasmFile(t, "hello.wasm")}, 0, "no URL leads to it yet", "warning: " + why},
		{[]string{"submit", "-o", "json", wasmFile(t, "hello.wasm")}, 0, `"warnings"`, "warning: " + why},
		{[]string{"functions", "get", "hello"}, 0, why, ""},
		{[]string{"functions", "list"}, 0, " -\n", ""},
		{[]string{"open", "hello"}, exitNotReady, "", why},
		{[]string{"invoke", "hello"}, exitNotReady, "", why},
	} {
		got := execute(t, t.Context(), "", append(c.args, "--api", server.URL)...)
		if got.code != c.code || !strings.Contains(got.stdout, c.stdout) || !strings.Contains(got.stderr, c.stderr) || strings.Contains(got.stdout, "curl") {
			t.Errorf("%v: %+v", c.args, got)
		}
	}
}

func TestTokensOnTheirWay(t *testing.T) {
	for target, want := range map[string]bool{
		"http://127.0.0.1:8080": false, "http://localhost:1": false, "http://hearth.localhost": false, "http://[::1]:80": false,
		"https://hearth.example.com": false, "unix:///run/api.sock": false, "http://hearth.example.com": true, "http://10.0.0.1:8080": true,
	} {
		if got := inTheClear(target); got != want {
			t.Errorf("%s: %v", target, got)
		}
	}
	dir := t.TempDir()
	for name, content := range map[string]string{"empty": "\n", "two": "a b", "large": strings.Repeat("x", maxTokenBytes+1)} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if token, err := readToken(path); err == nil || token != "" || strings.Contains(err.Error(), "a b") {
			t.Errorf("%s: %q %v", name, token, err)
		}
	}
}

func TestOpenPrintsAndOpensOnlyWhereSomebodySeesIt(t *testing.T) {
	a := newFakeAPI(t)
	got := execute(t, t.Context(), "", "open", "hello", "--api", a.URL)
	if got.code != 0 || got.stdout != "http://hello.localhost:8080/\n" || got.stderr != "" {
		t.Errorf("%+v", got)
	}
	display := func(name string) string {
		if name == "DISPLAY" {
			return ":0"
		}
		return ""
	}
	none := func(string) string { return "" }
	if p := browserProgram("linux", none) + browserProgram("linux", display) + browserProgram("darwin", none); p != "xdg-openopen" {
		t.Error(p)
	}
	looked := false
	look := func(string) (string, error) { looked = true; return "", os.ErrNotExist }
	for _, u := range []string{"file:///etc/passwd", "javascript:alert(1)", "--help", "http://"} {
		f := v1alpha1.Function{URL: u}
		if err := openBrowser(context.Background(), f, display, look); err == nil {
			t.Errorf("%s was opened", u)
		}
	}
	if err := openBrowser(context.Background(), v1alpha1.Function{URL: "https://hello.example.com/"}, display, look); err != nil || !looked {
		t.Error(err, looked)
	}
}

func TestKubeconfigThatIsNotThere(t *testing.T) {
	t.Setenv("HOME", t.TempDir())
	t.Setenv("KUBECONFIG", "")
	for _, args := range [][]string{{"functions", "list", "--cluster"}, {"logs", "hello", "--context", "k3s"}, {"token"}} {
		got := execute(t, t.Context(), "", args...)
		if got.code != exitUsage || !strings.Contains(got.stderr, "kubeconfig") {
			t.Errorf("%v: %+v", args, got)
		}
	}
}

func TestCompletionKnowsOptions(t *testing.T) {
	saved := os.Args
	defer func() { os.Args = saved }()
	os.Args = []string{"nodeagent", "logs", "-", command.CompletionRequest} // the library looks there
	got := execute(t, t.Context(), "", "logs", "-", command.CompletionRequest)
	for _, f := range apiFlags("") {
		if !strings.Contains(got.stdout, "--"+f.Names()[0]) {
			t.Errorf("--%s is missing in %s", f.Names()[0], got.stdout)
		}
	}
	out := execute(t, t.Context(), "", "completion", "fish")
	if !strings.Contains(out.stdout, "-l token-file") {
		t.Error("fish does not know --token-file")
	}
}

func TestProblemsOfAccessHaveRemedies(t *testing.T) {
	known := map[string]bool{}
	for _, k := range submit.Problems() {
		known[k.Code] = true
	}
	for _, code := range []string{"unauthorized", "forbidden", "quota-exceeded", "runtime-unsupported"} {
		if known[code] && problemRemedy(&client.ProblemError{Problem: v1alpha1.Problem{Type: submit.ProblemBase + code}}) == "" {
			t.Errorf("%s has no remedy", code)
		}
	}
}

// clearEnvironment forgets what the person who runs the tests has set.
func clearEnvironment(t *testing.T) {
	t.Helper()
	for _, pair := range os.Environ() {
		if name, _, _ := strings.Cut(pair, "="); strings.HasPrefix(name, "HEARTH_") {
			t.Setenv(name, "")
		}
	}
}
